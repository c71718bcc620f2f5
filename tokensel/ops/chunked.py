"""Statistics by blocks of the vocabulary, whose logits are float32 whatever the inputs are; nothing of width V is held.

On a CPU plain PyTorch on blocks sized to the cache; on a GPU the library's products into a block that stays in L2,
behind each of which a Triton kernel reads it once. On a GPU the host waits for nothing, and no shape depends on a
value: a CUDA graph can capture it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokensel.ops.block_shapes import TILE, chip_of, resident_block
from tokensel.ops.products import exact_products, product
from tokensel.ops.token_stats import TokenStats, no_stats, stats_of_sums, sums_of

CACHE_BYTES = 2**22  # of logits at once, which are read several times
# exp of less than this is denormal, which costs a CPU twenty times as long, and adds nothing to a sum that holds exp(0)
SMALLEST_EXPONENT = -80.0

Models = Sequence[tuple[Tensor, Tensor]]  # (hidden (N, D), weight (V, D)) of each


class Head(NamedTuple):
    """What becomes of a product on its way to a logit: softcap · tanh(logit_scale · (product + bias) / softcap)."""

    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float = 1.0

    def tempered(self, temperature: float) -> Head:
        """The head whose logits are this one's over the temperature: again one with a softcap and a scale."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return Head(self.bias, softcap, self.logit_scale / temperature)


def vocabulary_blocks(
    rows: int, vocabulary: int, workspace_mib: float, columns: int = 2048, models: int = 1
) -> tuple[int, int]:
    """(rows, columns) of a float32 block of each model's logits that fits the workspace.

    2,048 columns keep a block of some thousand rows near the cache and its product at full speed (measured on two
    AMX cores, D = 1024: 313 GFLOP/s in float32 at 2,048 columns, 249 at 8,192).

    Raises:
        ValueError: a workspace that is too small for one row.
    """
    columns = min(vocabulary, columns)
    row_bytes = 4 * columns * models
    most_rows = int(workspace_mib * 2**20) // row_bytes
    if most_rows < 1:
        raise ValueError(
            f"workspace_mib={workspace_mib:g} holds no row of {models} x {columns} float32 logits; it needs at least "
            f"{math.ceil(row_bytes / 2**10) / 2**10:.4f}"
        )
    return min(max(rows, 1), most_rows), columns


def logits_block(x: Tensor, w: Tensor, head: Head, out: Tensor) -> Tensor:
    """z of `reference.head_logits` for a block, written into `out`. x (R, D), w (C, D), bias (C,), out (R, C)."""
    return _to_logits(torch.mm(x, w.T, out=out), head)


def _to_logits(product: Tensor, head: Head) -> Tensor:
    """Products (R, C) with a block of the head to its logits, in place; bias (C,)."""
    if head.bias is not None:
        product += head.bias
    if head.logit_scale != 1.0:
        product *= head.logit_scale
    if head.softcap is not None:
        product.div_(head.softcap).tanh_().mul_(head.softcap)
    return product


def _contrasted(positive: Tensor, negative: Tensor, contrast: float) -> Tensor:
    """(1 + contrast) z - contrast z' of blocks of logits, in place of the first."""
    return positive.mul_(1 + contrast).sub_(negative, alpha=contrast)


def in_float32(block: Tensor, copy: Tensor) -> Tensor:
    """A block of the head in the dtype of `copy`: itself, or copied there, so that no block is allocated anew."""
    return block if block.dtype == copy.dtype else copy[: len(block)].copy_(block)


def label_logits(models: Models, labels: Tensor, head: Head, contrast: float | None = None) -> Tensor:
    """The logit of each row's label by a product of its own: [models, N], or [1, N] of the contrast of two.

    -inf where no row of the head is the label's. labels (N,)
    """
    inside = (labels >= 0) & (labels < models[0][1].shape[0])
    y = torch.where(inside, labels, 0)
    bias = None if head.bias is None else head.bias[y][:, None]
    logits = []
    for x, w in models:
        dtype = torch.promote_types(x.dtype, torch.float32)
        parts = zip(x.split(1024), y.split(1024), strict=True)  # as many rows of the head at once
        dots = torch.cat([torch.linalg.vecdot(some.to(dtype), w[at].to(dtype)) for some, at in parts])
        logits.append(_to_logits(dots[:, None], head._replace(bias=None if bias is None else bias.to(dtype)))[:, 0])
    z = torch.stack(logits) if contrast is None else _contrasted(logits[0], logits[1], contrast)[None]
    return torch.where(inside, z, -torch.inf)


def block_stats(z: Tensor, labels: Tensor, wanted: Sequence[str], label_logit: Tensor | None = None) -> TokenStats:
    """Statistics of a block of logits, which is overwritten.

    z (R, C); labels (R,) counted from the block's start; label_logit (R,) is what `rank` compares with.
    """
    inside = (labels >= 0) & (labels < z.shape[1])
    target = z.gather(1, torch.where(inside, labels, 0)[:, None])[:, 0]
    target = torch.where(inside, target, -torch.inf)
    top1 = z.amax(1)  # (R,)
    fields = {}
    if "logit_sum" in wanted:
        fields["logit_sum"] = z.sum(1)
    if label_logit is not None:  # which is another sum of the same products: the label itself does not count
        fields["rank"] = ((z > label_logit[:, None]).sum(1) - (target > label_logit).long()).to(z.dtype)
    if "entropy" not in wanted:
        # PyTorch's softmax goes over a row while it is in the nearest cache; its largest value is 1 / Σ exp(z - top1)
        p = torch.softmax(z, 1, out=z)
        lse = torch.where(top1.isfinite(), top1 - p.amax(1).log(), top1)
    else:
        pivot = torch.where(top1.isfinite(), top1, 0)
        z.sub_(pivot[:, None])
        z.clamp_(min=SMALLEST_EXPONENT)
        p = z.exp()
        total = p.sum(1)
        p /= total[:, None]
        mean = (p * z).sum(1)  # E[z] - pivot
        lse = torch.where(top1.isfinite(), pivot + total.log(), top1)
        fields |= {"entropy": total.log() - mean, "top1": top1}
    if "renyi2" in wanted:
        fields["renyi2"] = torch.where(top1.isfinite(), -torch.linalg.vecdot(p, p).log(), 0)
    if "entropy" in wanted:
        fields["logp_var"] = p.mul_(z.sub_(mean[:, None]).square_()).sum(1)
    return TokenStats(lse, target, **fields)


def hidden_stats(
    models: Models,
    labels: Tensor,
    head: Head,
    wanted: Sequence[str],
    ignore_index: int,
    workspace_mib: float,
    contrast: float = 0.0,
    label_logit: Tensor | None = None,
) -> TokenStats:
    """Statistics of one model, or of the contrast (1 + contrast) z - contrast z' of two. labels, label_logit (N,)."""
    hidden, weight = models[0]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    V = weight.shape[0]
    stats = no_stats(labels, dtype, wanted)
    responses = (labels != ignore_index).nonzero()[:, 0]
    R, C = vocabulary_blocks(len(responses), V, workspace_mib, models=len(models))
    workspace = torch.empty(len(models), R * C, dtype=dtype, device=hidden.device)
    copies = [torch.empty(C, w.shape[1], dtype=dtype, device=w.device) for _, w in models]
    with exact_products(hidden.dtype):
        for rows in responses.split(R):
            inputs, y = [x[rows].to(dtype) for x, _ in models], labels[rows]
            of_label = None if label_logit is None else label_logit[rows]
            joined: TokenStats | None = None
            for start in range(0, V, C):
                bias = None if head.bias is None else head.bias[start : start + C].to(dtype)
                block = []
                for x, (_, weight), space, copy in zip(inputs, models, workspace, copies, strict=True):
                    w = in_float32(weight[start : start + C], copy)  # (C, D)
                    out = space[: len(rows) * len(w)].view(len(rows), len(w))
                    block.append(logits_block(x, w, head._replace(bias=bias), out))
                z = block[0] if len(block) == 1 else _contrasted(block[0], block[1], contrast)
                part = block_stats(z, y - start, wanted, of_label)
                joined = part if joined is None else TokenStats.merge([joined, part])
            if joined is not None:
                stats.write(rows, joined)
    return stats


def gpu_block(
    N: int, V: int, like: Tensor, workspace_mib: float, *, blocks: int = 1, most_columns: int | None = None
) -> tuple[int, int]:
    """(rows, columns) of `blocks` blocks of float32 logits that share L2 and the workspace.

    Raises:
        ValueError: a workspace that is too small for one row.
    """
    chip = chip_of(like.device)
    chip = chip._replace(cache_bytes=chip.cache_bytes // blocks)
    most_bytes = workspace_mib * 2**20 / blocks
    block = resident_block(N, V, most_bytes, chip, most_columns=most_columns, sums=most_columns is not None)
    R, C = block or vocabulary_blocks(N, V, workspace_mib, columns=TILE[1], models=blocks)
    return min(max(N, 1), R), C


def hidden_stats_on_gpu(
    models: Models,
    labels: Tensor,
    head: Head,
    wanted: Sequence[str],
    ignore_index: int,
    workspace_mib: float,
    contrast: float | None = None,
    label_logit: Tensor | None = None,
) -> list[TokenStats]:
    """Blocks of one model's logits after the other's, which a kernel reads once; with `contrast` those of two in one.

    label_logit [results, N] is what `rank` compares with.

    Ignored rows are multiplied too: to leave them out, the host would have to wait for their number.
    """
    from tokensel_kernels.logits_stats import write_logits_sums

    N, V = len(labels), models[0][1].shape[0]
    blocks = 1 if contrast is None else 2
    R, C = gpu_block(N, V, labels, workspace_mib, blocks=blocks)
    workspace = torch.empty(blocks, R, C, dtype=torch.float32, device=labels.device)
    results = len(models) if contrast is None else 1
    sums = torch.empty(sums_of(wanted), results, -(-V // C), N, dtype=torch.float32, device=labels.device)
    # sliced once: a block takes the chip less than a hundred microseconds, and the host must be ahead of it
    columns_of = [slice(start, min(start + C, V)) for start in range(0, V, C)]
    shares = [(columns, [w[columns].T for _, w in models]) for columns in columns_of]
    for first in range(0, N, R):
        rows = slice(first, min(first + R, N))
        y, inputs, into = labels[rows], [x[rows] for x, _ in models], sums[..., rows]
        of_label = None if label_logit is None else label_logit[:, rows]
        for share, (columns, weights) in enumerate(shares):
            spaces = workspace[:, : len(y), : columns.stop - columns.start]  # rows begin at multiples of 16 bytes
            part = head if head.bias is None else head._replace(bias=head.bias[columns])
            common: dict[str, Any] = {"first_column": columns.start, "ignore_index": ignore_index}
            if contrast is None:
                for model, (x, w) in enumerate(zip(inputs, weights, strict=True)):
                    z, place = product(x, w, spaces[0]), slice(model, model + 1)
                    common["label_logit"] = None if of_label is None else of_label[place]
                    write_logits_sums([z], y, into[:, place, share], **common, **part._asdict())
            else:  # the kernel reads logits, not products
                triples = zip(inputs, weights, spaces, strict=True)
                positive, negative = (_to_logits(product(x, w, space), part) for x, w, space in triples)
                common["label_logit"] = of_label
                write_logits_sums([_contrasted(positive, negative, contrast)], y, into[:, :, share], **common)
    return stats_of_sums(sums, labels, ignore_index, wanted)


def logits_stats(
    logits: Tensor,
    labels: Tensor,
    wanted: Sequence[str],
    ignore_index: int,
    workspace_mib: float,
    label_logit: Tensor | None = None,
) -> TokenStats:
    """Statistics of logits (N, V) that exist already; the caller's are never overwritten. label_logit (N,)"""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    stats = no_stats(labels, dtype, wanted)
    V = logits.shape[1]
    R, _ = vocabulary_blocks(len(labels), V, workspace_mib, columns=V)
    R = min(R, max(1, CACHE_BYTES // (4 * V)))
    workspace = torch.empty(R, V, dtype=dtype, device=logits.device)
    for rows in (labels != ignore_index).nonzero()[:, 0].split(R):
        copy = workspace[: len(rows)]
        if logits.dtype == dtype:
            torch.index_select(logits, 0, rows, out=copy)
        else:
            copy.copy_(logits[rows])
        of_label = None if label_logit is None else label_logit[rows]
        stats.write(rows, block_stats(copy, labels[rows], wanted, of_label))
    return stats
