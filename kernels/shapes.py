"""Sizes of models that people train, for reports and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its head and its attention have."""

    vocabulary: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    layers: int
    mlp: int

    @property
    def backbone_parameters(self) -> int:
        attention = self.hidden * self.head_size * 2 * (self.heads + self.key_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp)


SHAPES = {
    "Llama-3.2-3B": Shape(128256, 3072, 24, 8, 128, 28, 8192),
    "Llama-3.1-8B": Shape(128256, 4096, 32, 8, 128, 32, 14336),
    "Qwen2.5-7B": Shape(152064, 3584, 28, 4, 128, 28, 18944),
    "Qwen2.5-14B": Shape(152064, 5120, 40, 8, 128, 48, 13824),
    "Gemma-2-2B": Shape(256000, 2304, 8, 4, 256, 26, 9216),
    "Qwen2.5-0.5B": Shape(151936, 896, 14, 2, 64, 24, 4864),
}


def shape_named(name: str) -> Shape:
    """The shape of a model.

    Raises:
        ValueError: a name that is not known; the message lists those that are.
    """
    if name not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {name!r}")
    return SHAPES[name]
