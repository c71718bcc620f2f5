"""An Axolotl plugin that trains on kept tokens. With this file on PYTHONPATH, in Axolotl's YAML:

    plugins: [axolotl_plugin.TokenSelectionPlugin]
    tokensel: {method: sstoken, method_args: {gamma: 0.5, rho: 0.6}, history: adapter_off}
    sample_packing: false

The keys under `tokensel` are the fields of tokensel.SelectionArguments; the trainer reads them from its arguments.

Axolotl pins its own transformers, TRL and PEFT, so the tests cannot install it. They drive this class through a
stand-in for the contract that Axolotl 0.19 documents in `axolotl.integrations.base`; it was not run in Axolotl itself.
"""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from tokensel import TokenSelectionMixin


class TokenSelectionSettings(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    tokensel: dict | None = None


class TokenSelectionPlugin(BasePlugin):
    def get_input_args(self) -> str:
        return f"{__name__}.TokenSelectionSettings"

    def get_training_args_mixin(self) -> str:
        return "tokensel.trainer.SelectionArguments"

    def get_training_args(self, cfg) -> dict:
        return dict(cfg.tokensel or {})

    def get_trainer_cls(self, cfg) -> type | None:
        if not cfg.tokensel:
            return None
        if cfg.sample_packing:
            raise ValueError(
                "sample_packing marks documents by numbers in attention_mask, which only Axolotl's patched attention "
                "reads; set sample_packing: false"
            )
        from axolotl.core.trainers import AxolotlTrainer

        class SelectiveAxolotlTrainer(TokenSelectionMixin, AxolotlTrainer):
            """Axolotl's trainer with token selection."""

        return SelectiveAxolotlTrainer
