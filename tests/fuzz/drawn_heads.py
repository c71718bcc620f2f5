"""Hidden states, heads and labels: a few numbers that hypothesis draws and shrinks, and the tensors they stand for."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from tokensel.ops import chunked, chunked_grad, divergence, logprobs

# a thing that is named twice is drawn twice as often
impls = st.sampled_from(["chunked", "chunked", "chunked", "reference"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHIFTS = {"plain": 0.0, "large": 1e4, "small": -1e4, "impossible": 0.0}


class Tensors(NamedTuple):
    hidden: Tensor  # [..., D]
    weight: Tensor  # (V, D)
    labels: Tensor  # [...]
    bias: Tensor | None  # (V,)
    valid: Tensor  # [...] bool, the rows whose label counts


@dataclass(frozen=True)
class Head:
    """What tensors are made of; printed as it is when a test fails."""

    leading: tuple[int, ...]
    V: int
    D: int
    dtype: torch.dtype
    weight_dtype: torch.dtype | None  # None = that of the hidden states
    spread: float
    whole: bool  # small whole numbers, so that logits are exact and many are equal
    bias: str | None
    softcap: float | None
    logit_scale: float
    temperature: float
    labels: str
    ignore_index: int
    int32: bool
    strides: str
    poison: bool  # NaN in rows that are ignored
    columns: int  # of a block of the vocabulary
    rows: int  # of a block
    seed: int

    @property
    def options(self) -> dict:
        """What becomes of a product on its way to a logit."""
        return {"softcap": self.softcap, "logit_scale": self.logit_scale, "temperature": self.temperature}

    @property
    def blocks(self) -> int:
        return -(-self.V // self.columns)

    @property
    def result_dtype(self) -> torch.dtype:
        wide = torch.promote_types(self.dtype, self.weight_dtype or self.dtype)
        return torch.promote_types(wide, torch.float32)

    def workspace_mib(self, *, columns: int | None = None, models: int = 1) -> float:
        """Room for so many rows as were drawn."""
        return self.rows * 4 * models * min(self.V, columns or self.columns) / 2**20

    def generator(self, salt: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 7 + salt)

    def matrix(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float, generator: torch.Generator) -> Tensor:
        if self.whole:
            values = torch.randint(-2, 3, shape, generator=generator).to(dtype)
        else:
            values = (torch.randn(shape, generator=generator) * scale).to(dtype)
        return laid_out(values, self.strides)

    def tensors(self) -> Tensors:
        random = self.generator()
        hidden = self.matrix((*self.leading, self.D), self.dtype, self.spread, random)
        weight = self.matrix((self.V, self.D), self.weight_dtype or self.dtype, 3 / self.D**0.5, random)
        labels = torch.randint(0, self.V, self.leading, generator=random)
        ignored = torch.rand(self.leading, generator=random) < {"all": 0.0, "some": 0.4, "none": 1.0}[self.labels]
        labels = torch.where(ignored, self.ignore_index, labels)
        labels = laid_out(labels.int() if self.int32 else labels, self.strides)
        valid = labels != self.ignore_index
        if self.poison:
            hidden[~valid] = torch.nan
        return Tensors(hidden, weight, labels, self.bias_of(random), valid)

    def bias_of(self, random: torch.Generator) -> Tensor | None:
        if self.bias is None:
            return None
        bias = torch.randn(self.V, generator=random) + SHIFTS[self.bias]
        if self.bias == "impossible":
            bias[1::2] = -torch.inf
        return bias.to(self.weight_dtype or self.dtype)


def laid_out(values: Tensor, strides: str) -> Tensor:
    """The same values, elsewhere in memory."""
    if strides == "gaps" and values.dim():
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), 77)
        wide[..., ::2] = values
        return wide[..., ::2]
    if strides == "transposed" and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if strides == "offset":
        return torch.cat([values.new_full((3,), 77), values.flatten()])[3:].view(values.shape)
    return values


@contextlib.contextmanager
def small_blocks(head: Head, models: int = 1):
    """Blocks of the drawn size, so that a few columns are many blocks; yields nothing."""
    mib = head.workspace_mib(models=models)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(chunked.vocabulary_blocks, "__defaults__", (head.columns, 1)))
        for module in (chunked_grad, divergence, logprobs):
            stack.enter_context(mock.patch.object(module, "WORKSPACE_MIB", mib))
        yield


# seldom none: there would be nothing to compare
shapes = st.one_of(
    st.tuples(st.integers(1, 9)),
    st.tuples(st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 4)),
    st.sampled_from([(), (0,), (2, 0), (1, 2, 3)]),
)
vocabularies = st.one_of(st.integers(1, 40), st.sampled_from([2047, 2048, 2049, 2300, 4097]))


def heads(**fixed) -> st.SearchStrategy[Head]:
    """Any of them; `fixed` replaces what is drawn for a field."""
    drawn = {
        "leading": shapes,
        # one in eight is wider than a block of 2,048
        "V": st.integers(0, 7).flatmap(lambda n: vocabularies if n == 7 else st.integers(1, 40)),
        "D": st.one_of(st.integers(1, 12), st.sampled_from([33, 64])),
        "dtype": st.sampled_from(DTYPES),
        "weight_dtype": st.one_of(st.none(), st.sampled_from(DTYPES)),
        "spread": st.sampled_from([1.0, 1.0, 0.0, 1e-3, 30.0, 300.0]),
        "whole": st.sampled_from([False, False, True]),
        "bias": st.sampled_from([None, *SHIFTS]),
        "softcap": st.sampled_from([None, 0.5, 6.0, 30.0]),
        "logit_scale": st.sampled_from([1.0, 0.25, 1.7]),
        "temperature": st.sampled_from([1.0, 0.7, 2.5]),
        "labels": st.sampled_from(["some", "all", "some", "all", "some", "none"]),
        "ignore_index": st.sampled_from([-100, -1, 3, 10**6]),
        "int32": st.booleans(),
        "strides": st.sampled_from(["plain", "gaps", "transposed", "offset"]),
        "poison": st.booleans(),
        "columns": st.sampled_from([2048, 1, 3, 16]),
        "rows": st.integers(1, 5),
        "seed": st.integers(0, 2**20),
    }
    drawn |= {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in fixed.items()}
    # of 4,097 columns no block of one, or an example takes a second
    return st.builds(Head, **drawn).filter(lambda head: head.blocks <= 150)
