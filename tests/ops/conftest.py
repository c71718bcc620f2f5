"""Fixtures that several files of this folder share."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import DEVICE, widened_product

import tokensel.ops.block_shapes
import tokensel.ops.chunked
import tokensel.ops.chunked_grad
import tokensel.ops.loss
import tokensel.ops.stats
from tokensel.ops.products import HAS_TRITON

# without Triton the kernels' modules cannot even be imported
collect_ignore_glob = [] if HAS_TRITON else ["test_kernels*.py"]


@pytest.fixture
def gpu_chunked(monkeypatch):
    """Chunked as it runs on a GPU, in small blocks; without one, around products of the CPU."""
    chip = tokensel.ops.block_shapes.Chip(processors=3, cache_bytes=2**15)
    monkeypatch.setattr(tokensel.ops.chunked, "chip_of", lambda device: chip)
    for module in (tokensel.ops.block_shapes, tokensel.ops.chunked):
        monkeypatch.setattr(module, "TILE", (8, 64))
    if DEVICE == "cpu":
        for module in (tokensel.ops.stats, tokensel.ops.loss):
            monkeypatch.setattr(module, "on_gpu", lambda like: True)
        for module in (tokensel.ops.chunked, tokensel.ops.chunked_grad):
            monkeypatch.setattr(module, "product", widened_product)
        add_product = lambda total, a, b: total.add_(a.float() @ b.float())  # noqa: E731
        monkeypatch.setattr(tokensel.ops.chunked_grad, "add_product", add_product)


@pytest.fixture
def poisoned_scratch(monkeypatch):
    """What a kernel does not write is NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(torch.nan) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
