"""The floor of each work: its own operations and nothing else, timed in the same run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks.speed.inputs import AttentionInputs, HeadInputs, Inputs, LogitsInputs, ModelInputs
from tokensel.ops.chunked import vocabulary_blocks
from tokensel.ops.products import exact_products, gradient_product_dtype


def _head_floor(work: str, s: HeadInputs, native: bool = False) -> Callable:
    """The matrix products of the work and nothing else: on a GPU the library's own, whole; on a CPU in tokensel's
    blocks and precision, or as on a GPU (`native`): in the inputs' type, half precision in and half precision out."""
    x, history_x, w, history_w = (t.detach() for t in (s.hidden, s.history_hidden, s.weight, s.history_weight))
    kept = x[: int(s.given_keep.sum())]
    narrow_kept, narrow_w = kept, w  # what the gradient of the logits is multiplied with
    (N, D), V = x.shape, len(w)
    R, C = N, V
    if s.device.type == "cpu" and not native:
        narrow = gradient_product_dtype(s.dtype)
        narrow_kept, narrow_w = kept.to(narrow), w.to(narrow)
        x, history_x, w, history_w, kept = (t.float() for t in (x, history_x, w, history_w, kept))
        R, C = vocabulary_blocks(N, V, 256)
    z, narrow_z = x.new_empty(R, C), torch.randn(R, C, device=s.device).to(narrow_kept.dtype)
    dx, dw = torch.zeros_like(narrow_kept), narrow_kept.new_empty(C, D)
    models = [] if work == "kept_backward" else [(x, w), (history_x, history_w)]
    backward = work != "pair_stats"

    def run() -> None:
        with exact_products(s.dtype):
            for start in range(0, V, C):
                columns = slice(start, start + C)
                for rows, head in [*models, *([(kept, w)] if backward else [])]:
                    for part in rows.split(R):
                        torch.mm(part, head[columns].T, out=z[: len(part), : len(head[columns])])
                for first in range(0, len(kept) if backward else 0, R):
                    part, head = narrow_kept[first : first + R], narrow_w[columns]
                    dz = narrow_z[: len(part), : len(head)]
                    dx[first : first + R].addmm_(dz, head)
                    torch.mm(dz.T, part, out=dw[: len(head)])

    return run


def _logits_floor(s: LogitsInputs) -> Callable:
    """A copy of one model's logits moves as many bytes as reading both models'."""
    copy = torch.empty_like(s.logits)

    def run() -> None:
        copy.copy_(s.logits)

    return run


def _square_floor(s: AttentionInputs | ModelInputs) -> Callable:
    """A square product: its rate turns the work's operations into seconds."""
    a, b = torch.randn(2, s.square, s.square, device=s.device).to(s.dtype)
    out = torch.empty_like(a)

    def run() -> None:
        torch.mm(a, b, out=out)

    return run


FLOORS: dict[str, Callable] = {
    **{work: functools.partial(_head_floor, work) for work in ("pair_stats", "kept_backward", "selection_step")},
    "stats_from_logits": _logits_floor,
    "attention_mass": _square_floor,
    "training_step": _square_floor,
}


def native_floor(s: Inputs) -> Callable | None:
    """The floor of a head's work in the inputs' type, where it is another than FLOORS has: half precision on a CPU."""
    if isinstance(s, HeadInputs) and s.device.type == "cpu" and s.dtype != torch.float32:
        return _head_floor(s.case.work, s, native=True)
    return None
