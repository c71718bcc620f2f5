"""Token-level data selection for LLM fine-tuning, as a kernel library.

Functions on plain tensors are here at once; what needs transformers (`apply_to`, `remove`, `Selection`, the
trainers, of which some need TRL) is loaded when it is first asked for, so that `import tokensel` needs torch alone.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING

from tokensel import _moved
from tokensel.ops.divergence import token_divergence
from tokensel.ops.logprobs import TopLogprobs, logprobs_at, top_logprobs
from tokensel.ops.loss import selected_cross_entropy, token_logprobs
from tokensel.ops.prompt_mass import prompt_attention_mass, uniform_prompt_mass
from tokensel.ops.prompt_mass_varlen import prompt_attention_mass_varlen
from tokensel.ops.stats import token_stats, token_stats_contrast, token_stats_from_logits, token_stats_pair
from tokensel.ops.token_stats import TokenStats
from tokensel.select import methods
from tokensel.select.method import SelectionMethod
from tokensel.select.signals import TokenSignals

if TYPE_CHECKING:
    from tokensel.arguments import SelectionArguments, SelectiveTrainingArguments
    from tokensel.choose_history import auto_history
    from tokensel.history import AdapterEMA, AdapterOff, LastSeen, ModelCopy, OtherModel
    from tokensel.model import apply_to, remove
    from tokensel.recording import record_losses
    from tokensel.sft import SelectiveSFTConfig, SelectiveSFTTrainer
    from tokensel.step import Selection, SelectionOutput
    from tokensel.store import HistoryStore
    from tokensel.trainer import SelectiveTrainer, TokenSelectionMixin
    from tokensel.trl_logprobs import use_token_logprobs

__version__ = "0.2.0"

_LAZY = {  # name -> module
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
    "auto_history": "choose_history",
    "record_losses": "recording",
    "remove": "model",
    "use_token_logprobs": "trl_logprobs",
}

__all__ = [
    "AdapterEMA",
    "AdapterOff",
    "HistoryStore",
    "LastSeen",
    "ModelCopy",
    "OtherModel",
    "Selection",
    "SelectionArguments",
    "SelectionMethod",
    "SelectionOutput",
    "SelectiveSFTConfig",
    "SelectiveSFTTrainer",
    "SelectiveTrainer",
    "SelectiveTrainingArguments",
    "TokenSelectionMixin",
    "TokenSignals",
    "TokenStats",
    "TopLogprobs",
    "apply_to",
    "auto_history",
    "logprobs_at",
    "methods",
    "prompt_attention_mass",
    "prompt_attention_mass_varlen",
    "record_losses",
    "remove",
    "selected_cross_entropy",
    "token_divergence",
    "token_logprobs",
    "token_stats",
    "token_stats_contrast",
    "token_stats_from_logits",
    "token_stats_pair",
    "top_logprobs",
    "uniform_prompt_mass",
    "use_token_logprobs",
]

_moved.install()


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(f"tokensel.{_LAZY[name]}"), name)
    if name in _moved.NAMES:
        new = _moved.NAMES[name]
        warnings.warn(f"tokensel.{name} is now tokensel.{new}; the old name goes with 0.3", FutureWarning, stacklevel=2)
        return globals()[new]
    raise AttributeError(f"module 'tokensel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
