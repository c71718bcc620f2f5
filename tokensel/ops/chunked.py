"""Walks over blocks of the vocabulary, whose logits are float32 whatever the inputs are; nothing of width V is held.

On a CPU plain PyTorch on blocks sized to the cache; on a GPU the library's products into a block that stays in L2,
behind each of which a Triton kernel reads it once. Statistics of hidden states and of logits, and the gradients of
kept rows. On a GPU the host waits for nothing, and no shape depends on a value: a CUDA graph can capture it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokensel.ops.block_shapes import TILE, chip_of, resident_block
from tokensel.ops.products import add_product, exact_products, gradient_product_dtype, product
from tokensel.ops.token_stats import TokenStats, no_stats, stats_of_sums

WORKSPACE_MIB = 256.0  # of the gradients' blocks
CACHE_BYTES = 2**22  # of logits at once, which are read several times
# exp of less than this is denormal, which costs a CPU twenty times as long, and adds nothing to a sum that holds exp(0)
SMALLEST_EXPONENT = -80.0

Models = Sequence[tuple[Tensor, Tensor]]  # (hidden (N, D), weight (V, D)) of each
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # in hidden, weight and bias, where wanted


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


def _in_float32(block: Tensor, copy: Tensor) -> Tensor:
    """A block of the head in the dtype of `copy`: itself, or copied there, so that no block is allocated anew."""
    return block if block.dtype == copy.dtype else copy[: len(block)].copy_(block)


def block_stats(z: Tensor, labels: Tensor, entropy: bool) -> TokenStats:
    """Statistics of a block of logits, which is overwritten. z (R, C); labels (R,) counted from the block's start."""
    inside = (labels >= 0) & (labels < z.shape[1])
    target = z.gather(1, torch.where(inside, labels, 0)[:, None])[:, 0]
    target = torch.where(inside, target, -torch.inf)
    top1 = z.amax(1)  # (R,)
    if not entropy:
        # PyTorch's softmax goes over a row while it is in the nearest cache; its largest value is 1 / Σ exp(z - top1)
        largest = torch.softmax(z, 1, out=z).amax(1)
        return TokenStats(torch.where(top1.isfinite(), top1 - largest.log(), top1), target)
    pivot = torch.where(top1.isfinite(), top1, 0)
    z.sub_(pivot[:, None])
    z.clamp_(min=SMALLEST_EXPONENT)
    p = z.exp()
    total = p.sum(1)
    p /= total[:, None]
    mean = (p * z).sum(1)  # E[z] - pivot
    variance = p.mul_(z.sub_(mean[:, None]).square_()).sum(1)
    lse = torch.where(top1.isfinite(), pivot + total.log(), top1)
    return TokenStats(lse, target, entropy=total.log() - mean, logp_var=variance, top1=top1)


def hidden_stats(
    models: Models,
    labels: Tensor,
    head: Head,
    entropy: bool,
    ignore_index: int,
    workspace_mib: float,
    contrast: float = 0.0,
) -> TokenStats:
    """Statistics of one model, or of the contrast (1 + contrast) z - contrast z' of two. labels (N,)."""
    hidden, weight = models[0]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    V = weight.shape[0]
    stats = no_stats(labels, dtype, entropy)
    responses = (labels != ignore_index).nonzero()[:, 0]
    R, C = vocabulary_blocks(len(responses), V, workspace_mib, models=len(models))
    workspace = torch.empty(len(models), R * C, dtype=dtype, device=hidden.device)
    copies = [torch.empty(C, w.shape[1], dtype=dtype, device=w.device) for _, w in models]
    with exact_products(hidden.dtype):
        for rows in responses.split(R):
            inputs, y = [x[rows].to(dtype) for x, _ in models], labels[rows]
            joined: TokenStats | None = None
            for start in range(0, V, C):
                bias = None if head.bias is None else head.bias[start : start + C].to(dtype)
                block = []
                for x, (_, weight), space, copy in zip(inputs, models, workspace, copies, strict=True):
                    w = _in_float32(weight[start : start + C], copy)  # (C, D)
                    out = space[: len(rows) * len(w)].view(len(rows), len(w))
                    block.append(logits_block(x, w, head._replace(bias=bias), out))
                z = block[0] if len(block) == 1 else _contrasted(block[0], block[1], contrast)
                part = block_stats(z, y - start, entropy)
                joined = part if joined is None else TokenStats.merge([joined, part])
            if joined is not None:
                stats.write(rows, joined)
    return stats


def _gpu_block(
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
    entropy: bool,
    ignore_index: int,
    workspace_mib: float,
    contrast: float | None = None,
) -> list[TokenStats]:
    """Blocks of one model's logits after the other's, which a kernel reads once; with `contrast` those of two in one.

    Ignored rows are multiplied too: to leave them out, the host would have to wait for their number.
    """
    from tokensel_kernels.logits_stats import write_logits_sums

    N, V = len(labels), models[0][1].shape[0]
    blocks = 1 if contrast is None else 2
    R, C = _gpu_block(N, V, labels, workspace_mib, blocks=blocks)
    workspace = torch.empty(blocks, R, C, dtype=torch.float32, device=labels.device)
    results = len(models) if contrast is None else 1
    sums = torch.empty(5 if entropy else 3, results, -(-V // C), N, dtype=torch.float32, device=labels.device)
    # sliced once: a block takes the chip less than a hundred microseconds, and the host must be ahead of it
    columns_of = [slice(start, min(start + C, V)) for start in range(0, V, C)]
    shares = [(columns, [w[columns].T for _, w in models]) for columns in columns_of]
    for first in range(0, N, R):
        rows = slice(first, min(first + R, N))
        y, inputs, into = labels[rows], [x[rows] for x, _ in models], sums[..., rows]
        for share, (columns, weights) in enumerate(shares):
            spaces = workspace[:, : len(y), : columns.stop - columns.start]  # rows begin at multiples of 16 bytes
            part = head if head.bias is None else head._replace(bias=head.bias[columns])
            common = {"first_column": columns.start, "ignore_index": ignore_index}
            if contrast is None:
                for model, (x, w) in enumerate(zip(inputs, weights, strict=True)):
                    z = product(x, w, spaces[0])
                    write_logits_sums([z], y, into[:, model : model + 1, share], **common, **part._asdict())
            else:  # the kernel reads logits, not products
                triples = zip(inputs, weights, spaces, strict=True)
                positive, negative = (_to_logits(product(x, w, space), part) for x, w, space in triples)
                write_logits_sums([_contrasted(positive, negative, contrast)], y, into[:, :, share], **common)
    return stats_of_sums(sums, labels, ignore_index)


def logits_stats(logits: Tensor, labels: Tensor, entropy: bool, ignore_index: int, workspace_mib: float) -> TokenStats:
    """Statistics of logits (N, V) that exist already; the caller's are never overwritten."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    stats = no_stats(labels, dtype, entropy)
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
        stats.write(rows, block_stats(copy, labels[rows], entropy))
    return stats


def gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficient: Tensor,
    lse: Tensor,
    head: Head,
    want: Sequence[bool],
    terms: Tensor | None = None,
) -> Gradients:
    """Gradients by dz = coefficient · (p - onehot), or with terms dz = p (terms[0] - terms[1] log p) - coefficient ·
    onehot. hidden (N, D), weight (V, D); labels, coefficient and lse (N,), terms (2, N)."""
    want_hidden, want_weight, want_bias = want
    dtype = lse.dtype
    V, D = weight.shape
    kept = kept_rows(coefficient, terms).nonzero()[:, 0]
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if want_hidden else None
    d_bias = torch.zeros(V, dtype=dtype, device=hidden.device) if want_bias else None
    if len(kept) == 0 or not (want_hidden or want_weight or want_bias):
        d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if want_weight else None
        return d_hidden, d_weight, _as_bias(d_bias, head)
    R, C = vocabulary_blocks(len(kept), V, WORKSPACE_MIB)
    narrow = gradient_product_dtype(hidden.dtype)
    workspace = torch.empty(R * C, dtype=dtype, device=hidden.device)
    rounded = torch.empty(R * C if narrow != dtype else 0, dtype=narrow, device=hidden.device)
    head_copy, gradient_copy = torch.empty(2, C, D, dtype=dtype, device=hidden.device)
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else None
    x = hidden[kept]  # (K, D)
    x, exact_x = x.to(narrow), x.to(dtype)
    y, log_z = labels[kept], lse[kept]
    upstream = coefficient[kept] * head.logit_scale  # (K,)
    of_p = None if terms is None else terms[:, kept] * head.logit_scale  # (2, K)
    d_x = torch.zeros_like(exact_x) if want_hidden else None
    # dW is summed over the blocks of rows in its own place if that is wide enough for their number
    in_place = weight.dtype == (narrow if len(kept) <= R else dtype)
    with exact_products(hidden.dtype):
        for start in range(0, V, C):
            exact_w = _in_float32(weight[start : start + C], head_copy)  # (C, D)
            w = exact_w if narrow == dtype else weight[start : start + C]
            bias = None if head.bias is None else head.bias[start : start + C].to(dtype)
            if d_weight is not None:
                dw = d_weight[start : start + C] if in_place else gradient_copy[: len(w)]
            for first in range(0, len(kept), R):
                rows = slice(first, first + R)
                shape = len(x[rows]), len(w)
                out = workspace[: math.prod(shape)].view(shape)
                z = logits_block(exact_x[rows], exact_w, head._replace(bias=bias), out)
                some = None if of_p is None else of_p[:, rows]
                dz = _logits_gradient(z, y[rows] - start, log_z[rows], upstream[rows], head.softcap, some)  # (R, C)
                if d_bias is not None:
                    d_bias[start : start + C] += dz.sum(0)
                if narrow != dtype:
                    dz = rounded[: math.prod(shape)].view(shape).copy_(dz)
                if d_x is not None:
                    add_product(d_x[rows], dz, w)
                if d_weight is not None:
                    add_product(dw, dz.T, x[rows], beta=min(first, 1))
            if d_weight is not None and not in_place:
                d_weight[start : start + C] = dw
    if d_hidden is not None and d_x is not None:
        d_hidden[kept] = d_x.to(hidden.dtype)
    return d_hidden, d_weight, _as_bias(d_bias, head)


def _as_bias(gradient: Tensor | None, head: Head) -> Tensor | None:
    return None if gradient is None or head.bias is None else gradient.to(head.bias.dtype)


def kept_rows(coefficient: Tensor, terms: Tensor | None) -> Tensor:
    """Whether a row has a gradient at all: (N,), (2, N) -> (N,) bool."""
    return coefficient != 0 if terms is None else (coefficient != 0) | (terms != 0).any(0)


def _logits_gradient(
    z: Tensor, labels: Tensor, lse: Tensor, upstream: Tensor, softcap: float | None, terms: Tensor | None
) -> Tensor:
    """`gradients`' dz times dz/du in place, u being the logits before the softcap. z (R, C), terms (2, R)."""
    slope = None if softcap is None else 1 - (z / softcap) ** 2
    log_p = z.sub_(lse[:, None]).clamp_(min=SMALLEST_EXPONENT)
    inside = ((labels >= 0) & (labels < z.shape[1])).nonzero()[:, 0]
    at = inside, labels[inside]
    if terms is None:
        log_p.exp_()[at] -= 1
        z *= upstream[:, None]
    else:
        of_p, of_log_p = terms[:, :, None]  # (R, 1) each
        factor = torch.addcmul(of_p, of_log_p, log_p, value=-1)
        log_p.exp_().mul_(factor)
        z[at] -= upstream[inside]
    return z if slope is None else z.mul_(slope)


def gradient_limits(N: int, element_size: int) -> tuple[float, int]:
    """(MiB of a block's logits, columns of a block): its gradient takes two thirds of the workspace, they the rest."""
    return WORKSPACE_MIB / 3, int(WORKSPACE_MIB * 2**20 * 2 / 3) // (max(N, 1) * element_size)


def gradients_on_gpu(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficient: Tensor,
    lse: Tensor,
    head: Head,
    want: Sequence[bool],
    terms: Tensor | None = None,
) -> Gradients:
    """`gradients` by the library's products, and a kernel that turns a block of them into its gradient.

    The host does not know how many rows are kept, and the library has no product whose size is on the device and whose
    result is float32 (`torch._grouped_mm` gives its inputs' type). So dropped rows are multiplied, too, as zeros:
    3 · 2 N V D operations whatever is kept. impl="fused" stops at the kept rows.
    """
    from tokensel_kernels.block_grad import write_block_gradient

    want_hidden, want_weight, want_bias = want
    (N, D), V = hidden.shape, weight.shape[0]
    mib, most_columns = gradient_limits(N, hidden.element_size())
    R, C = _gpu_block(N, V, hidden, mib, most_columns=most_columns)
    workspace = torch.empty(R, C, dtype=torch.float32, device=hidden.device)
    gradient = torch.empty(N, C, dtype=hidden.dtype, device=hidden.device)
    # a dropped row may be anything; 0 · NaN would be NaN, and exp(z - inf) is 0
    dropped = ~kept_rows(coefficient, terms)
    x, log_z = hidden.masked_fill(dropped[:, None], 0), lse.masked_fill(dropped, torch.inf)
    d_x = torch.zeros(N, D, dtype=torch.float32, device=hidden.device) if want_hidden else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else None
    d_bias = torch.empty_like(head.bias) if want_bias and head.bias is not None else None
    parts = [slice(first, min(first + R, N)) for first in range(0, N, R)]
    of_p = [None] * len(parts) if terms is None else [terms[:, rows] for rows in parts]
    cut = [
        (rows, x[rows], [t[rows] for t in (labels, coefficient, log_z)], some)
        for rows, some in zip(parts, of_p, strict=True)
    ]
    for start in range(0, V, C):
        block = slice(start, min(start + C, V))
        w = weight[block]  # (C, D)
        dz = gradient[:, : len(w)]  # (N, C)
        bias = None if head.bias is None else head.bias[block].contiguous()
        options = {"bias": bias, "first_column": start, "softcap": head.softcap, "logit_scale": head.logit_scale}
        for rows, some_x, of_rows, some in cut:
            z = product(some_x, w.T, workspace[: len(some_x), : len(w)])  # (R, C)
            write_block_gradient(z, *of_rows, dz[rows], terms=some, **options)
        if d_x is not None:
            add_product(d_x, dz, w)
        if d_weight is not None:
            torch.mm(dz.T, x, out=d_weight[block])  # accumulated in float32, rounded once
        if d_bias is not None:
            d_bias[block] = dz.sum(0, dtype=torch.float32)
    return None if d_x is None else d_x.to(hidden.dtype), d_weight, d_bias
