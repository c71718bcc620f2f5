"""Before anything is imported: no hub, no thread warnings, kernels that run without a GPU. For a test: a fixed seed."""

from __future__ import annotations

import importlib.util
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each worker

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels run on the CPU, in Triton's interpreter

from torch.utils._python_dispatch import TorchDispatchMode


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=1, help="of each command in tests/data/test_faults.py")
    parser.addoption("--seed", type=int, default=0, help="of the moments at which they come")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _untraced_interpreter():
    """While a kernel is interpreted coverage looks away: it would double the time, and counts no kernel anyway."""
    if sys.gettrace() is None or "TRITON_INTERPRET" not in os.environ or not importlib.util.find_spec("triton"):
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launch_untraced(*args, **kwargs):
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return launch(*args, **kwargs)
        finally:
            sys.settrace(trace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch_untraced)
        yield


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.fixture
def largest_tensor():
    """`with largest_tensor: ...`, then `largest_tensor.elements`."""
    return LargestTensor()


@pytest.fixture
def no_interpreter(monkeypatch):
    """As for somebody who has neither a GPU nor asked for the interpreter."""
    if importlib.util.find_spec("triton"):
        # a kernel is interpreted or compiled from its import on: other tests, in any order, want it interpreted
        for name in ("attention_mass", "vocab_grad", "vocab_stats"):
            importlib.import_module(f"tokensel_kernels.{name}")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
