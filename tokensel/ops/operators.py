"""Functions that torch.compile sees as one operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def custom_operator(name: str, schema: str, fake: Callable[..., R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Registers a function as `tokensel::name` for compiled graphs.

    Eager code needs no operator: it calls the function itself, which a debugger can look into.

    Args:
        schema: of the operator, "(Tensor x, ...) -> Tensor".
        fake: gives empty results of the right shapes.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        def separate(*args: P.args, **kwargs: P.kwargs) -> object:
            """An operator's results may not be views of one tensor."""
            result = function(*args, **kwargs)
            return [t.clone() for t in result] if isinstance(result, list) else result

        operator = torch.library.custom_op(f"tokensel::{name}", separate, mutates_args=(), schema=schema)
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            compute = getattr(torch.ops.tokensel, name) if torch.compiler.is_compiling() else function
            result: R = compute(*args, **kwargs)
            return result

        return call

    return decorate
