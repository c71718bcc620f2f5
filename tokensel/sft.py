"""TRL's SFTTrainer with token selection; packing, chat templates, masks and LoRA are TRL's. Only this needs TRL."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from tokensel.arguments import SelectionArguments
from tokensel.trainer import TokenSelectionMixin


@dataclass
class SelectiveSFTConfig(SelectionArguments, SFTConfig):
    """trl.SFTConfig and SelectionArguments in one."""


class SelectiveSFTTrainer(TokenSelectionMixin, SFTTrainer):
    """trl.SFTTrainer with token selection; `args` is a SelectiveSFTConfig."""
