"""LLaMA-Factory's supervised fine-tuning with token selection:

    python examples/llamafactory_recipe.py config.yaml      (or torchrun ... in front, as for its own launcher)

config.yaml is what `llamafactory-cli train` takes for `stage: sft`, with one mapping more, whose keys are the fields of
tokensel.SelectionArguments:

    tokensel: {method: sstoken, method_args: {gamma: 0.5, rho: 0.6}, history: adapter_off}

LLaMA-Factory pins its own transformers, TRL and PEFT, so the tests cannot install it. They run this file against a
stand-in for what it uses of version 0.9.5: `train.tuner.run_exp` and the trainer class of `train.sft.workflow`, which
has no hook of its own and is therefore replaced. It was not run in LLaMA-Factory itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from llamafactory.train import tuner
from llamafactory.train.sft import workflow

import tokensel

config = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
chosen = tokensel.SelectionArguments(**config.pop("tokensel"))


class SelectiveSeq2SeqTrainer(tokensel.TokenSelectionMixin, workflow.CustomSeq2SeqTrainer):
    """LLaMA-Factory's trainer with token selection."""

    def __init__(self, *, args, **kwargs) -> None:
        vars(args).update(vars(chosen))  # its parser refuses settings that it does not know
        super().__init__(args=args, **kwargs)


workflow.CustomSeq2SeqTrainer = SelectiveSeq2SeqTrainer
tuner.run_exp(config)
