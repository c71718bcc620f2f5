"""Attention scores of some queries over some keys, a block that stays near the cache at a time; never [S, S]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2 * 2**20 // 4  # of a float32 block; 2 MiB stay near the cache


class ScoreBlock(NamedTuple):
    """Scaled scores of the G query heads that share a key head."""

    heads: slice  # of the query heads
    rows: Tensor  # (R,) queries
    columns: Tensor  # (C,) keys
    scores: Tensor  # (G, R, C)


def score_blocks(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    columns: Tensor,
    scale: float,
    softcap: float | None,
    in_order: bool,
) -> Iterator[ScoreBlock]:
    """Scores of one sequence. q (Hq, Q, d), k (Hk, K, d), rows (n,) of q, columns (m,) of k, going up.

    in_order: rows and columns number the same tokens, so no column behind a block's last row is needed.
    """
    Hk, _, d = k.shape
    G = q.shape[0] // Hk
    dtype = torch.promote_types(q.dtype, torch.float32)
    if len(rows) == 0 or len(columns) == 0:
        return
    R = max(1, BLOCK_ELEMENTS // (G * len(columns)))
    for head in range(Hk):
        k_head = k[head, columns].to(dtype)  # (m, d)
        heads = slice(head * G, (head + 1) * G)
        for i in rows.split(R):
            last = int(torch.searchsorted(columns, i[-1], right=True)) if in_order else len(columns)
            if last == 0:
                continue
            rows_q = q[heads, i].to(dtype).reshape(-1, d) * scale
            z = (rows_q @ k_head[:last].T).view(G, len(i), last)
            if softcap is not None:
                z.div_(softcap).tanh_().mul_(softcap)
            yield ScoreBlock(heads, i, columns[:last], z)
