"""Token-level data selection for LLM fine-tuning, as a kernel library.

Functions on plain tensors are here at once; what needs transformers (`apply_to`, `remove`, `Selection`, the
trainers, of which two need TRL) is loaded when it is first asked for, so that `import tokensel` needs torch alone.
"""

from __future__ import annotations

import importlib

from tokensel import methods
from tokensel.attention import prompt_attention_mass, uniform_prompt_mass
from tokensel.loss import selected_cross_entropy
from tokensel.methods import TokenSelector, TokenSignals
from tokensel.stats import TokenStats, token_stats, token_stats_contrast, token_stats_from_logits, token_stats_pair

__version__ = "0.1.0"

_NEEDS_TRANSFORMERS = {
    "AdapterEMA": "history",
    "AdapterOff": "history",
    "HistoryStore": "store",
    "LastSeen": "history",
    "ModelCopy": "history",
    "OtherModel": "history",
    "Selection": "step",
    "SelectionArguments": "arguments",
    "SelectionOutput": "step",
    "SelectiveSFTConfig": "sft",
    "SelectiveSFTTrainer": "sft",
    "SelectiveTrainer": "trainer",
    "SelectiveTrainingArguments": "arguments",
    "TokenSelectionMixin": "trainer",
    "apply_to": "model",
    "remove": "model",
}

__all__ = [
    "TokenSelector",
    "TokenSignals",
    "TokenStats",
    "methods",
    "prompt_attention_mass",
    "selected_cross_entropy",
    "token_stats",
    "token_stats_contrast",
    "token_stats_from_logits",
    "token_stats_pair",
    "uniform_prompt_mass",
    *_NEEDS_TRANSFORMERS,
]


def __getattr__(name: str) -> object:
    if name not in _NEEDS_TRANSFORMERS:
        raise AttributeError(f"module 'tokensel' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tokensel.{_NEEDS_TRANSFORMERS[name]}"), name)
