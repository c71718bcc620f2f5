"""Every case of the suite, declared once, and what it costs by the algorithm.

| work              | what is timed                                                                          |
| pair_stats        | losses of every row under two models, from hidden states                               |
| stats_from_logits | the same from logits that exist already                                                |
| kept_backward     | loss of kept rows and its backward into hidden states and head, the statistics known   |
| selection_step    | pair_stats, selection by REL, kept_backward                                            |
| attention_mass    | one layer's attention mass on the prompt, the first quarter of the sequence            |
| training_step     | a whole model's forward and backward, with selection or without                        |

A group is what belongs in one table: the works, `step` for the two kinds of step, `memory` for cases that are run once
for their peak, `growth` for cases that differ in one size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatch

from tokensel_kernels.roofline import Estimate, attention_estimates, estimates
from tokensel_kernels.shapes import SHAPES, Shape

# Gemma's softcap is a case's own: few peers have it
MODELS = SHAPES | {
    "CPU-sized": Shape(128256, 1024, 8, 2, 64, 2, 2048),
    "small": Shape(32000, 256, 8, 2, 64, 4, 1024),
    "tiny": Shape(150, 32, 4, 2, 16, 2, 48),
}


@dataclass(frozen=True)
class Case:
    """Work of one shape. `tokens` is N, the rows, or the length S of a sequence; `vocabulary` None is the model's."""

    group: str
    work: str
    model: str
    tokens: int
    dtype: str = "bfloat16"
    rho: float = 0.6
    batch: int = 1
    vocabulary: int | None = None
    softcap: float | None = None

    @property
    def name(self) -> str:
        parts = [self.group, *([self.work] if self.work != self.group else []), self.model]
        parts.append(f"{self.batch}x{self.tokens}" if self.batch > 1 else str(self.tokens))
        parts += [f"V{self.vocabulary}"] if self.vocabulary else []
        parts += [f"rho{self.rho:g}"] if self.rho != 0.6 else []
        parts += [f"softcap{self.softcap:g}"] if self.softcap else []
        return "/".join([*parts, self.dtype])

    @property
    def shape(self) -> Shape:
        model = MODELS[self.model]
        return dataclasses.replace(model, vocabulary=self.vocabulary) if self.vocabulary else model

    @property
    def costs(self) -> list[Estimate]:
        """Operations and bytes by the algorithm, one entry a call (bytes are of bfloat16)."""
        m, N = self.shape, self.tokens * self.batch
        # the first quarter of a sequence is prompt and does not go through the head
        rows = self.batch * (self.tokens - self.tokens // 4) if self.work == "training_step" else N
        calls = {call.kernel.split(",")[0]: call for call in estimates(rows, m.vocabulary, m.hidden, rho=self.rho)}
        stats, logits = calls["hidden_stats"], calls["logits_stats"]
        backward = [calls[f"{part}_gradient"] for part in ("logits", "hidden", "head")]
        mass, *_ = attention_estimates(self.tokens, m.heads, m.key_heads, m.head_size)
        if self.work == "training_step":  # recorded history: one model's statistics
            head = [dataclasses.replace(stats, operations=stats.operations / 2, bytes=stats.bytes / 2), *backward]
            mass = dataclasses.replace(mass, operations=self.batch * mass.operations, bytes=self.batch * mass.bytes)
            attention = 6.0 * self.batch * self.tokens**2 * m.heads * m.head_size * m.layers
            weights = 2.0 * m.backbone_parameters
            return [Estimate("backbone", self.name, 3 * weights * N + attention, 3 * weights), *head, mass]
        return {
            "pair_stats": [stats],
            "stats_from_logits": [logits],
            "kept_backward": backward,
            "selection_step": [stats, *backward],
            "attention_mass": [mass],
        }[self.work]

    @property
    def operations(self) -> float:
        return sum(call.operations for call in self.costs)

    @property
    def bytes(self) -> float:
        return sum(call.bytes for call in self.costs) * (2 if self.dtype == "float32" else 1)


def _cases(group: str, work: str, models: list[str], tokens: list[int], **fields) -> list[Case]:
    return [Case(group, work, model, n, **fields) for model in models for n in tokens]


REAL = ["Llama-3.1-8B", "Llama-3.2-3B", "Qwen2.5-7B", "Qwen2.5-14B", "Gemma-2-2B"]
FLOAT32, BFLOAT16 = {"dtype": "float32"}, {"dtype": "bfloat16"}

# In the order in which they run: when time is short, the last ones are left out.
SETS: dict[str, list[Case]] = {
    "gpu": [
        *_cases("pair_stats", "pair_stats", REAL, [8192]),
        *_cases("kept_backward", "kept_backward", REAL, [8192]),
        *[Case(work, work, "Gemma-2-2B", 8192, softcap=30.0) for work in ("pair_stats", "kept_backward")],
        *_cases("attention_mass", "attention_mass", ["Llama-3.1-8B"], [2048, 8192, 32768, 131072]),
        *_cases("step", "training_step", ["Llama-3.2-3B"], [2048], batch=4),
        *_cases("step", "selection_step", ["Llama-3.1-8B"], [8192]),
        *_cases("stats_from_logits", "stats_from_logits", ["Llama-3.1-8B", "Qwen2.5-7B"], [8192]),
        *_cases("attention_mass", "attention_mass", ["Qwen2.5-7B", "Gemma-2-2B"], [8192]),
        *_cases("memory", "selection_step", ["Llama-3.1-8B"], [16384, 32768, 65536]),
        *[Case("growth", "selection_step", "Llama-3.1-8B", 8192, vocabulary=v) for v in (32000, 64000, 256000)],
        *[Case("growth", "selection_step", "Llama-3.1-8B", n) for n in (2048, 4096, 16384)],
        *[Case("growth", "selection_step", "Llama-3.1-8B", 8192, rho=rho) for rho in (0.2, 1.0)],
    ],
    "cpu": [
        *_cases("attention_mass", "attention_mass", ["CPU-sized"], [512, 1024, 2048, 4096], **FLOAT32),
        *_cases("step", "selection_step", ["CPU-sized"], [2048], **FLOAT32),
        *_cases("stats_from_logits", "stats_from_logits", ["Qwen2.5-0.5B"], [256], **FLOAT32),
        *_cases("pair_stats", "pair_stats", ["Qwen2.5-0.5B"], [256], **FLOAT32),
        *_cases("kept_backward", "kept_backward", ["Qwen2.5-0.5B"], [256], **FLOAT32),
        *_cases("step", "training_step", ["small"], [512], batch=2, **FLOAT32),
        *_cases("memory", "attention_mass", ["CPU-sized"], [8192], **FLOAT32),
        *[Case("growth", "selection_step", "small", 1024, "float32", vocabulary=v) for v in (16000, 32000, 64000)],
        *[Case("growth", "selection_step", "small", n, "float32") for n in (512, 2048)],
        *[Case("growth", "selection_step", "small", 1024, "float32", rho=rho) for rho in (0.2, 1.0)],
        # many times as slow where the processor has no bfloat16 units
        *_cases("attention_mass", "attention_mass", ["CPU-sized"], [2048], **BFLOAT16),
        *_cases("step", "selection_step", ["CPU-sized"], [2048], **BFLOAT16),
    ],
    "smoke": [
        *[Case(work, work, "tiny", 24, "float32") for work in ("stats_from_logits", "kept_backward")],
        Case("pair_stats", "pair_stats", "tiny", 24),
        Case("kept_backward", "kept_backward", "tiny", 24, "float32", softcap=3.0),
        Case("attention_mass", "attention_mass", "tiny", 32, "float32"),
        Case("step", "training_step", "tiny", 16, "float32", batch=2),
        Case("memory", "selection_step", "tiny", 24, "float32"),
    ],
}


def chosen(name: str, patterns: list[str]) -> list[Case]:
    """The cases of a set whose names match one of the patterns (`*` matches anything); all, without patterns.

    Raises:
        ValueError: a pattern that matches no case; the message lists the known names.
    """
    cases = SETS[name]
    for pattern in patterns:
        if not any(fnmatch(case.name, pattern) for case in cases):
            names = "\n  ".join(case.name for case in cases)
            raise ValueError(f"no case of the set {name} is called {pattern!r}; known are\n  {names}")
    return [case for case in cases if not patterns or any(fnmatch(case.name, pattern) for pattern in patterns)]
