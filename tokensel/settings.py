"""A command's settings, and how they are read: a YAML file gives a parser its defaults, flags win over it."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn


@dataclass
class DataArguments:
    """The model and the text, common to score and train."""

    model_name_or_path: str = field(  # type: ignore[assignment]  # required: `settings.parse` asks for it
        default=None, metadata={"help": "Directory or hub name of any causal language model with its tokenizer."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the weights; auto is what the model was saved in."}
    )
    dataset_name: list[str] | str = field(  # type: ignore[assignment]  # required: `settings.parse` asks for it
        default=None,
        metadata={
            "help": "Files (JSON, JSON lines, CSV, TSV, Parquet; .gz and .zst, too), a directory of them, or the name "
            "of a Hugging Face dataset."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a directory or of a Hugging Face dataset."})
    role_names: str | None = field(
        default=None,
        metadata={
            "help": "Other names of roles in the messages, as a mapping in YAML or 'bot=assistant' as a flag; the chat "
            "template's names are on the right."
        },
    )
    rejected_weight: float = field(
        default=0.0,
        metadata={
            "help": "Of preference pairs: the weight of the rejected answers, which become rows of their own (-1 for "
            "critical_tokens). 0 leaves them out."
        },
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and encode rows as they are used, and download no more of a Hugging Face dataset; training "
            "needs max_steps then. Files are scored so in any case."
        },
    )
    max_length: int = field(
        default=2048, metadata={"help": "Rows are cut to this many tokens; cuts are counted and told."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template for chats: a Jinja file, or 'trl' for TRL's training version of the model's own, "
            "which TRL's trainer takes for assistant_only_loss. Default: the tokenizer's."
        },
    )
    turns: Literal["last", "each"] = field(
        default="last",
        metadata={
            "help": "Of chats whose template rewrites earlier turns (without their reasoning, say): 'last' trains the "
            "last answer, 'each' makes of each answer a row that ends with it."
        },
    )


@dataclass
class ScoreArguments(DataArguments):
    """Settings of `tokensel score`."""

    output: str = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "What to write: a Parquet file, if the name ends in .parquet, else a directory of them. Must not "
            "exist yet."
        },
    )
    tokens_per_batch: int = field(
        default=8192, metadata={"help": "Tokens in a forward pass, of rows of like length with their padding."}
    )
    batch_size: int | None = field(default=None, metadata={"help": "Rows in a forward pass, instead."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; default: cuda where there is one."})
    device_map: str | None = field(
        default=None, metadata={"help": "auto: spread the model over all GPUs of one process, and memory and disk."}
    )
    fully_shard: bool = field(
        default=False, metadata={"help": "Spread the model over the ranks of torchrun (FSDP2): one that fits no GPU."}
    )
    ray_actors: int | None = field(
        default=None, metadata={"help": "Score on this many actors of Ray Data, which hold the model (tokensel[ray])."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Weights in 8 bits, by bitsandbytes."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Weights in 4 bits, by bitsandbytes."})
    impl: str = field(
        default="auto", metadata={"help": "Implementation of the statistics: auto, chunked, fused or reference."}
    )
    without_prompt: bool = field(
        default=False,
        metadata={
            "help": "Score the response tokens alone, behind the tokenizer's BOS (EOS where it has none), for t_shirt."
        },
    )
    both_answers: bool = field(
        default=False,
        metadata={
            "help": "Of preference pairs, record both answers with the tokens that TRL's DPOTrainer makes of them: its "
            "reference, for tokensel.use_token_logprobs."
        },
    )
    contrast_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Score under softmax(2 z - z'), z' of this model of wrong answers, for critical_tokens."},
    )


@dataclass
class SelectArguments:
    """Settings of `tokensel select`."""

    method: str = field(  # type: ignore[assignment]
        default=None, metadata={"help": "A method that ranks by recorded losses, or random."}
    )
    method_args: str | None = field(default=None, metadata={"help": "Its parameters, as of `tokensel train`."})
    recorded: str = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Stores that `tokensel score` made of one dataset: base=a.parquet,reference=b.parquet."},
    )
    output: str = field(  # type: ignore[assignment]  # required: `settings.parse` asks for it
        default=None,
        metadata={"help": "Weights to write, for weights_store: a file or a directory, as of `tokensel score`."},
    )


@dataclass
class RunArguments(DataArguments):
    """Settings of `tokensel train` beside transformers.TrainingArguments and the selection's. LoRA names are TRL's."""

    eval_dataset_name: list[str] | None = field(
        default=None, metadata={"help": "Held-out rows, as dataset_name; default with eval_dataset_split: the same."}
    )
    eval_dataset_split: str | None = field(
        default=None, metadata={"help": "Split of the held-out rows, as dataset_split; default: the same."}
    )
    prompt_weight: float = field(
        default=0.0, metadata={"help": "Weight of prompt tokens; not 0 trains them, too (weighted instruction tuning)."}
    )
    response_weight: float = field(
        default=1.0, metadata={"help": "Weight of response tokens, a factor of weights that the data gives."}
    )
    packing: bool = field(
        default=False, metadata={"help": "Concatenate the rows of a batch without padding; documents stay apart."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of all weights."})
    lora_r: int = field(default=64, metadata={"help": "LoRA rank (the paper's 64)."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha (the paper's 16)."})
    lora_dropout: float = field(default=0.1, metadata={"help": "LoRA dropout (the paper's 0.1)."})
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "'all-linear' (never the head), or names separated by commas."}
    )


# Settings of earlier versions, and what to do without them.
GONE = {"head_weights": "it went in 0.2, and every head counts the same; leave it out"}


def parse(types: Sequence[Any], argv: Sequence[str], program: str, about: str, required: Sequence[str]) -> list[Any]:
    """Objects of dataclasses from an optional YAML file in front and flags behind it.

    Args:
        types: whose fields are the settings.
        program, about: what `--help` says above them.
        required: names of settings that must be there, in either place.
    Raises:
        ValueError: the YAML file is not a mapping or not YAML; a setting that does not exist or is of the wrong type; a
            required one that is missing. FileNotFoundError: there is no such file.
    """
    from transformers import HfArgumentParser

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message} (`{program} --help` lists all settings)")

    parser = HfArgumentParser(types, prog=program, description=about, allow_abbrev=False)
    parser.error = refuse  # type: ignore[method-assign]  # one line, as any other error, instead of a page of usage
    if argv and not argv[0].startswith("-"):
        _set_defaults(parser, Path(argv[0]), program)
        argv = argv[1:]
    settings, unused = parser.parse_known_args(list(argv))
    for flag in unused:
        if (name := flag.lstrip("-").partition("=")[0].replace("-", "_")) in GONE:
            raise ValueError(f"{name}: {GONE[name]}")
    if unused:
        refuse(f"unknown: {' '.join(unused)}{_nearest(unused[0].lstrip('-'), [a.dest for a in parser._actions])}")
    missing = [name for name in required if getattr(settings, name) is None]
    if missing:
        raise ValueError(f"missing setting: {', '.join(missing)} (in the YAML file or as --{missing[0]} VALUE)")
    return list(parser.parse_args_into_dataclasses(args=list(argv)))


def _set_defaults(parser: argparse.ArgumentParser, path: Path, program: str) -> None:
    settings = _read_yaml(path)
    # the first action of a name: `--no_NAME`, which turns it off, comes behind
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    for name in settings.keys() & GONE.keys():
        raise ValueError(f"{path}: {name}: {GONE[name]}")
    unknown = sorted(str(name) for name in settings if name not in actions)
    if unknown:
        hint = _nearest(unknown[0], list(actions)) if len(unknown) == 1 else ""
        raise ValueError(f"{path}: unknown settings {', '.join(unknown)}{hint}; `{program} --help` lists all")
    for name, value in settings.items():
        several = actions[name].nargs in ("+", "*")
        if isinstance(value, list) and (not several or not value):
            raise ValueError(f"{path}: {name} takes {'at least ' if several else ''}one value; got {value}")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            values = [_converted(parser, actions[name], v, path) for v in values]
            parser.set_defaults(**{name: values if several else values[0]})


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}; the first argument is a YAML file, flags begin with --")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a mapping of settings to values; found {type(settings).__name__}")
    return settings


def _converted(parser: argparse.ArgumentParser, action: argparse.Action, value: object, path: Path) -> object:
    """A YAML value as the flag of the same text would be read; argparse checks no default that is not text."""
    try:
        converted: object = parser._get_value(action, json.dumps(value) if isinstance(value, dict) else str(value))
        parser._check_value(action, converted)
    except argparse.ArgumentError as error:
        parser.error(f"{path}: {error}")
    return converted


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
