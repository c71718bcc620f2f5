"""Launches that are written down and not made: what a call would run on a chip that need not be there.

The public functions run on meta tensors, which have shapes and no values, and the launcher compiles with the types,
divisibilities and constants that it would see on the chip.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tokensel_kernels import tiles

META = torch.device("meta")
_run = JITFunction.run


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, what it was called with, and how many programs."""

    kernel: JITFunction
    programs: int
    args: tuple = field(repr=False)
    kwargs: dict

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    @property
    def bound(self) -> dict:
        """Arguments and constants by their names."""
        return dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.kwargs

    def compile(self, target: GPUTarget) -> object:
        """What Triton would run, compiled as the launcher compiles it.

        Raises:
            What Triton raises where it cannot compile for the target.
        """
        with _active(_AbsentChip(target)):
            return _run(self.kernel, *self.args, grid=(self.programs,), warmup=True, **self.kwargs)


class _AbsentChip:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"{self._target.backend} {self._target.arch}"  # a key: each chip has kernels of its own

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return META


@contextlib.contextmanager
def _active(chip: _AbsentChip) -> Iterator[None]:
    before = driver._active
    driver.set_active(chip)
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def written_down(family: str, processors: int) -> Iterator[list[Launch]]:
    """Within, calls on meta tensors take the tiles of a chip family, and their launches are listed and not made."""
    launches: list[Launch] = []

    def write_down(self: JITFunction, *args: object, grid: tuple, warmup: bool, **kwargs: object) -> None:
        programs = 1
        for n in grid:
            programs *= n
        launches.append(Launch(self, programs, args, kwargs))

    before = tiles.chip_family
    tiles.chip_family = lambda device: (family, processors) if device.type == "meta" else before(device)
    JITFunction.run = write_down
    try:
        yield launches
    finally:
        JITFunction.run = _run
        tiles.chip_family = before
