"""Times tiles around the known-good ones on the GPU at hand, and says which won: what `tokensel tune` writes.

For each kind of product the tile of the table is the start. Its neighbours differ in one number (rows, columns or
depth halved or doubled, warps, a pipeline stage more or less); the fastest becomes the start of the next round, until
no neighbour is faster. What the chip cannot compile or hold is skipped. Each kind is timed through the public function
that uses it, on random inputs of the shapes given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor
from triton.runtime.errors import TritonError

from tokensel_kernels import tiles
from tokensel_kernels.attention_mass import attention_mass
from tokensel_kernels.tiles import AttentionTile, ProductTile
from tokensel_kernels.vocab_grad import selected_gradients
from tokensel_kernels.vocab_stats import hidden_stats

WORTH = 0.98  # a neighbour that saves less than 2 % is not told from noise


def neighbours(tile: ProductTile | AttentionTile) -> Iterator[ProductTile | AttentionTile]:
    """Tiles that differ from this one in one number."""
    for field in ("rows", "columns", "keys", "depth", "warps"):
        if value := getattr(tile, field, None):
            for changed in (value // 2, value * 2):
                if changed >= (1 if field == "warps" else 16):
                    yield dataclasses.replace(tile, **{field: changed})
    for stages in (tile.stages - 1, tile.stages + 1):
        if stages >= 1:
            yield dataclasses.replace(tile, stages=stages)


def calls(N: int, V: int, D: int, S: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    """The call that each kind of tile is timed by: N rows, vocabulary V, hidden size D; S of 32 heads over 8 of 128."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float32, device=device).to(dtype)

    x, w, bias = normal(N, D), normal(V, D) / D**0.5, normal(V)
    labels = torch.randint(0, V, (N,), device=device)
    coefficient = (torch.arange(N, device=device) % 5 < 3).float() / N  # 60 % kept
    lse = torch.full((N,), 10.0, device=device)
    plain = {"bias": None, "softcap": None, "logit_scale": 1.0}
    full = {"bias": bias, "softcap": 30.0, "logit_scale": 1.0}
    pair = ([(x, w), (x, w)], labels)
    q, k = normal(1, 32, S, 128), normal(1, 8, S, 128)
    position = torch.arange(S, device=device)[None]
    prompt = position < S // 4
    masks = (prompt, ~prompt, None, None, None)  # no padding, one document, one turn
    scores = {"lse": None, "scale": 128**-0.5, "softcap": None, "sinks": None}

    def gradients() -> object:
        return selected_gradients(x, w, labels, coefficient, lse, want=(True, True, False), **plain)

    return {
        "stats": lambda: hidden_stats(*pair, entropy=False, ignore_index=-100, **plain),
        "full_stats": lambda: hidden_stats(*pair, entropy=True, ignore_index=-100, **full),
        "gradient": gradients,
        "matmul": gradients,
        "attention": lambda: attention_mass(q, k, *masks, **scores),
    }


def tune(
    timed: dict[str, Callable[[], object]],
    family: str,
    size: int,
    *,
    milliseconds: Callable[[Callable], float] | None = None,
    tell: Callable[[str], None] = print,
) -> tiles.Table:
    """The fastest tiles found for a chip family and element size, as a table of what was timed.

    `tiles.TILES` holds them from then on.

    Args:
        timed: kind -> call, from `calls`.
        milliseconds: how long a call takes; None means the median of `triton.testing.do_bench`.
    """
    milliseconds = milliseconds or (lambda call: triton.testing.do_bench(call, return_mode="median"))
    table = tiles.TILES[family]

    def cost(kind: str, tile: ProductTile | AttentionTile) -> float | None:
        before = table[kind][size]
        table[kind][size] = tile
        try:
            if tiles.misfit(table, size):
                return None
            return milliseconds(timed[kind])
        except (TritonError, RuntimeError) as error:  # too much shared memory, or more than the compiler can do
            if not isinstance(error, TritonError) and "PassManager" not in str(error):
                raise
            tell(f"{kind}: {tile} does not run: {str(error).partition(chr(10))[0]}")
            return None
        finally:
            table[kind][size] = before

    for kind in timed:
        best, seen = table[kind][size], {table[kind][size]}
        fastest = start = cost(kind, best)
        if fastest is None:
            raise RuntimeError(f"the table's own tile of {kind}, {best}, does not run on this GPU")
        improved = True
        while improved:
            improved = False
            for tile in neighbours(best):
                if tile not in seen:
                    seen.add(tile)
                    took = cost(kind, tile)
                    if took is not None and took < WORTH * fastest:
                        best, fastest, improved = tile, took, True
                        break
        table[kind][size] = best
        tell(f"{kind}: {start:.3f} ms before, {fastest:.3f} ms with {best} ({len(seen)} tiles timed)")
    return {family: {kind: {size: table[kind][size]} for kind in timed}}
