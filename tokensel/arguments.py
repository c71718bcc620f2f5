"""The settings of a training with token selection, as fields of the trainer's arguments, and what they rule out."""

from __future__ import annotations

import copy
import json
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from tokensel import methods
from tokensel.select.methods import SelectionMethod
from tokensel.select.signals import RECORDED

HISTORIES = {  # name -> (what it is, what it costs)
    "none": ("no history", "nothing"),
    "recorded": ("losses that `tokensel score` computed once", "nothing per step"),
    "last_seen": ("each document's losses when it was last trained on", "4 bytes a token of host memory"),
    "adapter_off": ("the same model with its adapters disabled", "one forward per step, no memory"),
    "adapter_ema": (
        "an average of the adapters' weights over the run",
        "one forward per step, the adapters again",
    ),
    "frozen": ("the model as it was when the run began", "one forward per step, the trained weights again"),
    "ema": ("an average of all trained weights over the run", "one forward per step, the trained weights again"),
    "reference": ("another model with the same tokenizer", "one forward of it per step, and its weights"),
}
_HISTORY_SETTINGS = {  # and the histories that read them
    "history_decay": ("adapter_ema", "ema"),
    "history_device": ("frozen", "ema", "reference"),
    "history_8bit": ("reference",),
}
DENOMINATORS = ("step", "micro_batch")


@dataclass
class SelectionArguments:
    """What `TokenSelectionMixin` reads from the trainer's arguments."""

    method: str = field(  # type: ignore[assignment]  # required: `build_method` asks for it
        default=None, metadata={"help": f"Selection method: {', '.join(methods.names())}."}
    )
    method_args: str | None = field(
        default=None,
        metadata={"help": "The method's parameters, as a mapping in YAML or 'gamma=0.5,rho=0.6' as a flag."},
    )
    history: str = field(
        default="auto",
        metadata={
            "help": "Where the history's losses come from. 'auto': 'recorded' where history_store is given, 'none' "
            "where the method needs none, 'adapter_off' where the model has adapters, else 'frozen'; it says which. "
            + " ".join(f"'{name}': {what}; costs {costs}." for name, (what, costs) in HISTORIES.items())
        },
    )
    history_store: str | None = field(
        default=None, metadata={"help": "The Parquet file that `tokensel score` wrote, for history 'recorded'."}
    )
    history_decay: float | None = field(
        default=None,
        metadata={
            "help": "For 'adapter_ema' and 'ema': the share of itself that the average keeps in an optimizer step, in "
            "[0, 1]; default 0.99, which looks back about 100 steps. 1 is frozen."
        },
    )
    history_device: str | None = field(
        default=None,
        metadata={
            "help": "For 'frozen', 'ema' and 'reference': another device to run on, or 'cpu' to keep the weights on "
            "the CPU and bring them over layer by layer in each pass. Default: where the model is."
        },
    )
    history_model_name_or_path: str | None = field(
        default=None, metadata={"help": "For 'reference': directory or hub name of the model, with its tokenizer."}
    )
    history_8bit: bool = field(
        default=False, metadata={"help": "For 'reference': hold its linear layers in 8 bits (needs torchao)."}
    )
    recorded: str | None = field(
        default=None,
        metadata={
            "help": "Further recorded losses that a method needs, as a mapping in YAML or 'base=a.parquet,"
            f"reference=b.parquet' as a flag; names: {', '.join(n.removesuffix('_nll') for n in RECORDED)}."
        },
    )
    weights_store: str | None = field(
        default=None,
        metadata={
            "help": "The Parquet file of weights that `tokensel select` wrote: what it dropped is not trained. With "
            "method 'weighted' all that it kept is; another method selects among that."
        },
    )
    layer: list[int] = field(
        default_factory=lambda: [-1],
        metadata={
            "help": "Layers whose attention is measured, by methods that do (the mean of several); -1 is the last one "
            "with full attention."
        },
    )
    row: str = field(
        default="token",
        metadata={
            "help": "Query row that measures a token's attention: its own ('token') or 'predictor', the one before."
        },
    )
    prompt: str = field(
        default="all",
        metadata={
            "help": "Keys that count as prompt: 'all' non-response tokens, the 'first' prompt, or the whole "
            "'context' before the token's own answer."
        },
    )
    sink: int = field(
        default=0,
        metadata={"help": "The first tokens of each document that do not count as prompt (attention sinks)."},
    )
    loss_denominator: str = field(
        default="step",
        metadata={
            "help": "'step': one number of kept tokens for the optimizer step, over accumulation and ranks. "
            "'micro_batch': mean over each micro-batch, then mean of means, as published."
        },
    )
    record_samples: int = field(
        default=0,
        metadata={"help": "Record what becomes of this many training rows at each epoch's end, for `tokensel report`."},
    )
    impl: str = field(default="auto", metadata={"help": "Implementation: auto, chunked, fused or reference."})

    def selection_settings(self) -> dict[str, object]:
        """The settings above, which all ranks have to share; of files only which ones there are, not where."""
        settings = {f.name: getattr(self, f.name) for f in fields(SelectionArguments)}
        settings["method_args"] = parse_mapping("method_args", self.method_args, "gamma=0.5,rho=0.6")
        settings["history_store"] = "none" if self.history_store is None else "a file"
        settings["history_model_name_or_path"] = "none" if self.history_model_name_or_path is None else "a model"
        del settings["history_device"]
        settings["recorded"] = sorted(parse_mapping("recorded", self.recorded, "base=base.parquet"))
        return settings

    def build_method(self) -> SelectionMethod:
        """The method that `method` and `method_args` name.

        Raises:
            ValueError: no method or an unknown one, an unknown parameter, or a value that is not a number, true, false,
                null or a word.
        """
        if self.method is None:
            raise ValueError(f"method is missing, and has no default; set it to one of {', '.join(methods.names())}")
        parameters = parse_mapping("method_args", self.method_args, "gamma=0.5,rho=0.6")
        try:
            return methods.get(self.method, **parameters)
        except TypeError as error:
            raise ValueError(f"method_args: {error}") from error


def parse_mapping(name: str, text: str | dict | None, example: str) -> dict:
    """'gamma=0.5,rho=0.6' (or a mapping, or JSON) -> {"gamma": 0.5, "rho": 0.6}.

    Raises:
        ValueError: neither a mapping nor text of these forms; names the setting and shows the example.
    """
    if not text:
        return {}
    if isinstance(text, dict):
        return dict(text)
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a mapping or text such as {example}; got {text!r}")
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{name} {text[:200]!r} is not JSON: {error}") from error
    parsed = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ValueError(f"{name} must look like {example}; cannot read {part!r}")
        try:
            parsed[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key.strip()] = value.strip()
    return parsed


def parse_recorded(text: str | dict | None) -> dict[str, str]:
    """The setting `recorded` -> {"base": FILE, ...}.

    Raises:
        ValueError: not of that form, or losses that no method knows.
    """
    files = parse_mapping("recorded", text, "base=base.parquet,reference=reference.parquet")
    for name in files:
        if f"{name}_nll" not in RECORDED:
            known = ", ".join(n.removesuffix("_nll") for n in RECORDED)
            raise ValueError(f"recorded: unknown losses {name!r}; there are {known}")
    return files


@dataclass
class SelectiveTrainingArguments(SelectionArguments, TrainingArguments):
    """transformers.TrainingArguments and SelectionArguments in one."""


def refuse_contradictions(settings: SelectionArguments) -> None:
    """Refuses settings that do not exist or do not go together; a trainer's arguments may carry our fields alone.

    `history` is a chosen one: "auto" has become its choice.
    """
    if settings.history not in HISTORIES:
        raise ValueError(f"history must be one of auto, {', '.join(HISTORIES)}; got {settings.history!r}")
    if settings.loss_denominator not in DENOMINATORS:
        raise ValueError(
            f"loss_denominator must be one of {', '.join(DENOMINATORS)}; got {settings.loss_denominator!r}"
        )
    if not isinstance(settings.record_samples, int) or settings.record_samples < 0:
        raise ValueError(
            f"record_samples must be a number of training rows, 0 for none; got {settings.record_samples!r}"
        )
    for name, needed_by in (("history_store", "recorded"), ("history_model_name_or_path", "reference")):
        if (settings.history == needed_by) != (getattr(settings, name) is not None):
            raise ValueError(f"history={needed_by!r} and {name} go together; set both or neither")
    for name, users in _HISTORY_SETTINGS.items():
        if getattr(settings, name) not in (None, False) and settings.history not in users:
            raise ValueError(f"{name} is for history {' or '.join(users)}, but history is {settings.history!r}")


def with_defaults(args: Any) -> Any:
    """A copy of a trainer's arguments, with the defaults of those fields of SelectionArguments that they lack."""
    args = copy.copy(args)  # which trackers are shown and checkpoints keep: the caller's may serve another model next
    for each in fields(SelectionArguments):
        if not hasattr(args, each.name):
            default = each.default if each.default_factory is MISSING else each.default_factory()
            setattr(args, each.name, default)
    return args


def is_of_trl(value: object) -> bool:
    return any(cls.__module__.startswith("trl.") for cls in type(value).__mro__)


def refuse_arguments(args: Any, method: SelectionMethod | None, of_trl: bool) -> None:
    """Refuses what a trainer cannot be made of, or what would train another loss than the selection step's.

    The base trainers patch the model by these settings when they are built, so this comes before; it turns Liger's loss
    off. A setting that a trainer's arguments do not have is not looked at.

    Args:
        args: the trainer's, or None.
        method: one that is built already.
        of_trl: whether the trainer is TRL's.
    """
    if method is None and getattr(args, "method", None) is None:
        ours = "SelectiveSFTConfig" if of_trl else "SelectiveTrainingArguments"
        raise ValueError(
            f"method is missing, and has no default; set it to one of {', '.join(methods.names())}: give the trainer "
            f"args={ours}(method=...), or method=tokensel.methods.get(...) beside plain arguments"
        )
    if args is None:
        return
    if of_trl and hasattr(args, "method") and not is_of_trl(args):
        raise TypeError(f"args of a trainer of TRL must be a SelectiveSFTConfig; got {type(args).__name__}")
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor is not supported with token selection; set it to 0")
    loss_type = getattr(args, "loss_type", None)  # of TRL; "chunked_nll" is how it computes the same loss
    if loss_type not in (None, "nll", "chunked_nll"):
        raise ValueError(
            f"loss_type must be 'nll': the loss is made inside the selection step; got {loss_type!r}. Choose by "
            "method instead (method='dft' is TRL's loss_type='dft')"
        )
    if getattr(args, "packing", False) and args.packing_strategy == "wrapped":
        raise ValueError(
            "packing_strategy='wrapped' loses the boundaries of documents: they are cut anywhere and see each other, "
            "so neither a token's prompt nor its recorded history can be told. Use packing_strategy='bfd'"
        )
    if args.use_liger_kernel:
        liger = args.liger_kernel_config or {}
        if liger.get("fused_linear_cross_entropy"):
            raise ValueError(
                "liger_kernel_config turns fused_linear_cross_entropy on, which replaces the model's forward and with "
                "it the selection step; take it out (Liger's kernels of the layers stay on)"
            )
        args.liger_kernel_config = {**liger, "fused_linear_cross_entropy": False}
