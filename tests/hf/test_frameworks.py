"""One example a trainer, each run on its tiny model. Axolotl and LLaMA-Factory cannot be installed beside the
development set (they pin other releases), so stand-ins offer what their public interfaces promise."""

from __future__ import annotations

import importlib
import runpy
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from training import PLAIN, ROWS, TOKENIZER, build_lora
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from tokensel.trainer import TokenSelectionMixin

EXAMPLES = Path(__file__).parents[2] / "examples"
FRAMEWORKS = ["raw_loop", "trainer", "trl_sft", "lightning_module", "axolotl_plugin", "llamafactory_recipe"]
CHOSEN = {"method": "sstoken", "method_args": {"gamma": 0.5, "rho": 0.6}, "history": "adapter_off"}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_example_is_at_most_60_lines(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60


def kept_a_share(metrics):
    """A run on live history that kept ceil(0.6 n) of each sample, and moved away from its base."""
    return 0.6 <= metrics["kept_share"] < 0.63 and abs(metrics["rel_mean"]) > 1e-4 and 0 < metrics["prompt_mass"] < 1


@pytest.mark.parametrize("name", ["trainer", "trl_sft"])
def test_a_trainer_example_trains(name, tmp_path, monkeypatch):
    if name == "trl_sft":
        pytest.importorskip("trl", reason="TRL is not installed")
    monkeypatch.chdir(tmp_path)
    trainer = runpy.run_path(str(EXAMPLES / f"{name}.py"))["trainer"]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) >= 3 and logged[-1] < logged[0] - 0.05
    assert kept_a_share(trainer.selection_totals())


def test_the_lightning_example_trains(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(lightning.LightningModule, "log", lambda self, name, value: seen.append((name, float(value))))
    example = runpy.run_path(str(EXAMPLES / "lightning_module.py"))
    trainer, module = example["trainer"], example["module"]
    logged = [value for name, value in seen if name == "loss"]
    assert trainer.global_step == len(logged) == 16
    assert sum(logged[-4:]) < sum(logged[:4]) - 0.2
    assert all(0.6 <= value < 0.65 for name, value in seen if name == "kept_share")
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert (checkpoint["selection"]["steps"], checkpoint["selection"]["samples"]) == (16, 128)
    module.selection.progress.steps = 0
    module.on_load_checkpoint(checkpoint)
    assert module.selection.progress.steps == 16


def stand_in(monkeypatch, **modules):
    """Puts modules under their dotted names, `_` for `.`, and the packages above them."""
    for name, contents in modules.items():
        parts = name.split("_")
        for i in range(1, len(parts) + 1):
            dotted = ".".join(parts[:i])
            if dotted not in sys.modules:
                monkeypatch.setitem(sys.modules, dotted, types.ModuleType(dotted))
                if i > 1:
                    setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], sys.modules[dotted])
        vars(sys.modules[".".join(parts)]).update(contents)


class BasePlugin:
    """What axolotl.integrations.base.BasePlugin promises of the methods that the plugin overrides."""

    def get_input_args(self):
        """Dotted path of a pydantic model: what the plugin adds to the configuration."""

    def get_training_args_mixin(self):
        """Dotted path of a dataclass: what the plugin adds to the training arguments."""

    def get_training_args(self, cfg):
        """Values for those, from the configuration."""

    def get_trainer_cls(self, cfg):
        """The trainer's class, or None to leave it."""


class AxolotlTrainer(Trainer):
    """Takes its arguments by keyword, some its own, and looks at the model's forward afterwards, as Axolotl's does."""

    def __init__(self, *args, bench_data_collator=None, eval_data_collator=None, dataset_tags=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def by_path(dotted):
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.fixture
def plugin(monkeypatch):
    pytest.importorskip("pydantic", reason="Axolotl brings pydantic")
    stand_in(
        monkeypatch,
        axolotl_integrations_base={"BasePlugin": BasePlugin},
        axolotl_core_trainers={"AxolotlTrainer": AxolotlTrainer},
    )
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "axolotl_plugin", raising=False)
    yield by_path("axolotl_plugin.TokenSelectionPlugin")()
    sys.modules.pop("axolotl_plugin", None)


def test_the_axolotl_plugin_brings_settings_and_trainer(plugin, tmp_path):
    given = by_path(plugin.get_input_args())(tokensel=CHOSEN)  # a pydantic model, as Axolotl validates its YAML
    cfg = types.SimpleNamespace(**given.model_dump(), sample_packing=False)

    class Mixins(by_path(plugin.get_training_args_mixin())):
        """Axolotl derives a plain class from the mixins and a dataclass from that."""

        model_type: str | None = None

    @dataclass
    class Arguments(Mixins, TrainingArguments):
        axolotl_only: str | None = field(default=None)

    args = Arguments(output_dir=str(tmp_path), **PLAIN, **plugin.get_training_args(cfg))
    assert (args.method, args.history) == ("sstoken", "adapter_off")
    cls = plugin.get_trainer_cls(cfg)
    assert issubclass(cls, TokenSelectionMixin) and issubclass(cls, AxolotlTrainer)
    collator = DataCollatorForSeq2Seq(TOKENIZER, return_tensors="pt")
    trainer = cls(
        model=build_lora(random_adapter=False),
        train_dataset=ROWS,
        eval_dataset=None,
        args=args,
        data_collator=collator,
        callbacks=[],
        processing_class=TOKENIZER,
        bench_data_collator=collator,
        eval_data_collator=collator,
        dataset_tags=["rows"],
    )
    trainer.train()
    assert kept_a_share(trainer.selection_totals())
    assert trainer.model_accepts_loss_kwargs  # or the loss would be divided once more


def test_the_axolotl_plugin_leaves_other_runs_alone_and_refuses_packing(plugin):
    assert plugin.get_trainer_cls(types.SimpleNamespace(tokensel=None, sample_packing=True)) is None
    with pytest.raises(ValueError, match="sample_packing: false"):
        plugin.get_trainer_cls(types.SimpleNamespace(tokensel=CHOSEN, sample_packing=True))


class CustomSeq2SeqTrainer(Seq2SeqTrainer):
    """Signature and order of llamafactory.train.sft.trainer.CustomSeq2SeqTrainer."""

    def __init__(self, finetuning_args, processor, model_args=None, gen_kwargs=None, ref_model=None, **kwargs):
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(**kwargs)
        self.finetuning_args = finetuning_args


@pytest.mark.parametrize("change", [{}, {"history": "none"}])
def test_the_llamafactory_recipe_trains(tmp_path, monkeypatch, change):
    made = []

    def run_exp(args=None, callbacks=None):
        """What LLaMA-Factory does with a mapping: refuses unknown keys, and looks the trainer up in its workflow."""
        known = Seq2SeqTrainingArguments(**args)
        workflow = sys.modules["llamafactory.train.sft.workflow"]
        made.append(
            workflow.CustomSeq2SeqTrainer(
                model=build_lora(random_adapter=False),
                args=known,
                finetuning_args=types.SimpleNamespace(),
                data_collator=DataCollatorForSeq2Seq(TOKENIZER, return_tensors="pt"),
                callbacks=callbacks,
                gen_kwargs={},
                ref_model=None,
                train_dataset=ROWS,
                tokenizer=TOKENIZER,
                processor=None,
            )
        )
        made[-1].train()

    stand_in(
        monkeypatch,
        llamafactory_train_tuner={"run_exp": run_exp},
        llamafactory_train_sft_workflow={"CustomSeq2SeqTrainer": CustomSeq2SeqTrainer},
    )
    import yaml

    config = PLAIN | {"output_dir": str(tmp_path / "out"), "tokensel": CHOSEN | change}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["llamafactory_recipe.py", str(tmp_path / "config.yaml")])
    if change:
        with pytest.raises(ValueError, match="needs a history"):
            runpy.run_path(str(EXAMPLES / "llamafactory_recipe.py"))
        return
    runpy.run_path(str(EXAMPLES / "llamafactory_recipe.py"))
    assert kept_a_share(made[0].selection_totals())
