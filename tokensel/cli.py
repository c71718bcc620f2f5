"""The commands: `score` records losses, `select` ranks a whole dataset by them, `train` fine-tunes with selection."""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tokensel
from tokensel.ops.checks import check_positive

DESCRIPTION = f"""tokensel {tokensel.__version__}: token-level data selection for LLM fine-tuning

  tokensel score CONFIG.yaml [--flag value ...]   record each response token's loss under a model, once
  tokensel select CONFIG.yaml [--flag value ...]  rank all tokens of a dataset by recorded losses, without a model
  tokensel train CONFIG.yaml [--flag value ...]   fine-tune on the tokens that a method keeps
  tokensel score --help | select --help | ...     every setting, in YAML and as a flag
  tokensel methods [NAME]                         list the methods, or explain one and its parameters
  tokensel report RUN [RUN ...]                   draw which tokens a run kept, and why, as a page
  tokensel kernels --arch CHIP [--json FILE]      compile all kernels for a chip, present or not, and report
  tokensel tune --output FILE                     time other tiles on this GPU; TOKENSEL_TILES=FILE takes the fastest
  tokensel --version

A first run on your own data, a JSONL file of {{"prompt": ..., "completion": ...}},
{{"question": ..., "answer": ...}} or chat {{"messages": [...]}}:

  tokensel score --model_name_or_path MODEL --dataset_name data.jsonl --output history.parquet
  tokensel train --model_name_or_path MODEL --dataset_name data.jsonl --use_peft true \\
      --method sstoken --method_args gamma=0.5,rho=0.6 --history recorded --history_store history.parquet \\
      --output_dir run

`score` and `select` go on where they were killed when the same command is run again: what is done stays in
OUTPUT.partial until the output is complete. To select over the whole dataset, once, before training:

  tokensel score --model_name_or_path BASE --dataset_name data.jsonl --output base.parquet
  tokensel score --model_name_or_path REFERENCE --dataset_name data.jsonl --output reference.parquet
  tokensel select --method token_cleaning --method_args rho=0.6 \\
      --recorded base=base.parquet,reference=reference.parquet --output selected.parquet
  tokensel train --model_name_or_path BASE --dataset_name data.jsonl --method weighted \\
      --weights_store selected.parquet --output_dir run

Messages, rows and tokens may carry weights (`"weight"`, `"token_weights"`), negative ones too: --method weighted.
With LoRA no recording is needed: --history adapter_off takes the model without its adapters as the history.
Settings may stand in a YAML file; flags win over it. Compare with --method random at the same rho before you
believe in a gain.
"""


@dataclass
class DataArguments:
    """The model and the text, common to score and train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Directory or hub name of any causal language model with its tokenizer."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the weights; auto is what the model was saved in."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A JSONL file, or the name of a Hugging Face dataset."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hugging Face dataset."})
    max_length: int = field(
        default=2048, metadata={"help": "Rows are cut to this many tokens; cuts are counted and told."}
    )


@dataclass
class ScoreArguments(DataArguments):
    """Settings of `tokensel score`."""

    output: str | None = field(default=None, metadata={"help": "Parquet file to write; must not exist yet."})
    batch_size: int = field(default=16, metadata={"help": "Rows in a forward pass."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; default: cuda where there is one."})
    impl: str = field(
        default="auto", metadata={"help": "Implementation of the statistics: auto, chunked, fused or reference."}
    )
    without_prompt: bool = field(
        default=False,
        metadata={
            "help": "Score the response tokens alone, behind the tokenizer's BOS (EOS where it has none), for t_shirt."
        },
    )
    contrast_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Score under softmax(2 z - z'), z' of this model of wrong answers, for critical_tokens."},
    )


@dataclass
class SelectArguments:
    """Settings of `tokensel select`."""

    method: str | None = field(default=None, metadata={"help": "A method that ranks by recorded losses, or random."})
    method_args: str | None = field(default=None, metadata={"help": "Its parameters, as of `tokensel train`."})
    recorded: str | None = field(
        default=None,
        metadata={"help": "Stores that `tokensel score` made of one dataset: base=a.parquet,reference=b.parquet."},
    )
    output: str | None = field(
        default=None, metadata={"help": "Parquet file of weights to write, for weights_store; must not exist yet."}
    )


@dataclass
class RunArguments(DataArguments):
    """Settings of `tokensel train` beside transformers.TrainingArguments and the selection's. LoRA names are TRL's."""

    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out rows, as dataset_name."})
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


ABOUT = {  # above the lists of settings, which are long
    "tokensel score": "Records the loss of every response token under a model, once: the history of `tokensel train "
    "--history recorded`. Needs --model_name_or_path, --dataset_name and --output. Run again, it goes on where it was "
    "killed.",
    "tokensel select": "Ranks all tokens of a dataset by recorded losses, without a model, and writes weights for "
    "`tokensel train --weights_store`. Needs --method, --recorded and --output. Run again, it goes on where it was "
    "killed.",
    "tokensel train": "Fine-tunes on the response tokens that a method keeps. Needs --model_name_or_path, "
    "--dataset_name and --output_dir. The settings of the selection (--method to --impl) stand last; the many before "
    "them are transformers.TrainingArguments. `tokensel --help` shows a first run.",
}


def _parse(dataclass_types: list[type], argv: list[str], program: str, required: tuple[str, ...]) -> list:
    """Settings from an optional YAML file in front and flags behind it; flags win.

    Raises:
        ValueError: the YAML file is missing, is not a mapping, or holds a setting that does not exist; a value of the
            wrong type; a required setting that is not there.
    """
    from transformers import HfArgumentParser

    def refuse(message: str) -> None:
        raise ValueError(f"{message} (`{program} --help` lists all settings)")

    parser = HfArgumentParser(dataclass_types, prog=program, description=ABOUT[program])
    parser.error = refuse  # one line, as any other error, instead of a page of usage
    if argv and not argv[0].startswith("-"):
        several = {action.dest: action.nargs in ("+", "*") for action in parser._actions}
        argv = _flags_of_yaml(Path(argv[0]), several, program) + argv[1:]
    given, unused = parser.parse_known_args(argv)
    if unused:
        refuse(f"unknown: {' '.join(unused)}")
    missing = [name for name in required if getattr(given, name) is None]
    if missing:
        raise ValueError(f"missing setting: {', '.join(missing)} (in the YAML file or as --{missing[0]} VALUE)")
    return list(parser.parse_args_into_dataclasses(args=argv))


def _flags_of_yaml(path: Path, several: dict[str, bool], program: str) -> list[str]:
    """A YAML file's settings as flags, so that both are read, converted and checked by the same parser.

    Args:
        several: of every setting that exists, whether it takes more than one value.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}; the first argument is a YAML file, flags begin with --")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a mapping of settings to values; found {type(settings).__name__}")
    unknown = sorted(str(name) for name in settings if name not in several)
    if unknown:
        raise ValueError(f"{path}: unknown settings {', '.join(unknown)}; `{program} --help` lists all")
    flags = []
    for name, value in settings.items():
        if isinstance(value, list) and not several[name]:
            raise ValueError(f"{path}: {name} takes one value; got {value}")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return flags


def _load_tokenizer(settings: DataArguments):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model_name_or_path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_model(settings: DataArguments):
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(settings.model_name_or_path, dtype=settings.dtype)
    except SafetensorError as error:
        raise ValueError(f"{settings.model_name_or_path} holds a damaged weights file: {error}") from error


def _load_contrast(settings: ScoreArguments, tokenizer):
    from transformers import AutoTokenizer

    from tokensel.store import tokenizer_fingerprint

    name = settings.contrast_model_name_or_path
    if tokenizer_fingerprint(AutoTokenizer.from_pretrained(name)) != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"contrast_model_name_or_path {name} has another tokenizer than {settings.model_name_or_path}; a contrast "
            "is of two models with the same tokens"
        )
    return _load_model(replace(settings, model_name_or_path=name))


def _encode(name: str, split: str, tokenizer, max_length: int, **weights: float):
    from tokensel.data import RowError, encode_rows, load_rows, place_of_row

    try:
        rows, report = encode_rows(load_rows(name, split), tokenizer, max_length, **weights)
    except RowError as error:
        raise ValueError(f"{place_of_row(name, error.row)}: {error.reason}") from error
    print(f"{name}: {report}", flush=True)
    return rows, report


def _check_fit(name: str, report, tokenizer, model) -> None:
    """Refuses here what fails in the forward with an index error that names nothing, or, with rotary positions, not
    at all.

    Raises:
        ValueError: rows longer than the model has positions, or a token without an embedding.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and report.longest > positions:
        raise ValueError(
            f"{name} has rows of up to {report.longest} tokens, but {model.name_or_path} has {positions} positions; "
            f"cut them with --max_length {positions}, or, if its positions reach further (YaRN and the like), raise "
            "max_position_embeddings in its config.json"
        )
    known, needed = model.get_input_embeddings().num_embeddings, max(report.largest_id, tokenizer.pad_token_id or 0)
    if needed >= known:
        raise ValueError(
            f"token {needed} ({tokenizer.convert_ids_to_tokens(needed)!r}) has no embedding: {model.name_or_path} has "
            f"{known}. The tokenizer belongs to another model, or tokens were added without "
            "model.resize_token_embeddings"
        )


def peak_memory_mib(device: str) -> float:
    """Peak of this process: allocated on a GPU, resident on a CPU. MiB."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _check_new(output: str) -> None:
    if Path(output).exists():
        raise ValueError(f"output {output} exists; move it away or choose another name")


def _tell_resumed(journal) -> None:
    if len(journal.keys):
        print(f"going on with {journal.directory}: {len(journal.keys):,} documents are done", flush=True)


def score(settings: ScoreArguments) -> dict[str, float]:
    """Records the negative log-likelihood of every response token under a model -> rows, tokens, mean NLL."""
    import time

    import torch
    from transformers import DataCollatorForSeq2Seq

    from tokensel import offline
    from tokensel.journal import Journal
    from tokensel.model import apply_to
    from tokensel.store import HistoryWriter, tokenizer_fingerprint

    check_positive("batch_size", settings.batch_size)
    _check_new(settings.output)
    if settings.without_prompt and settings.contrast_model_name_or_path:
        raise ValueError("without_prompt and contrast_model_name_or_path make stores of different kinds; choose one")
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}") from error
    tokenizer = _load_tokenizer(settings)
    rows, report = _encode(settings.dataset_name, settings.dataset_split, tokenizer, settings.max_length)
    rows = rows.select_columns(["input_ids", "labels"])
    model = _load_model(settings)
    _check_fit(settings.dataset_name, report, tokenizer, model)
    identity = offline.identify(rows)
    belongs_to = {
        "command": "score",
        "model_name_or_path": settings.model_name_or_path,
        "weights": offline.weights_fingerprint(model),
        "dtype": str(model.dtype),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "dataset": identity.digest,
        "max_length": settings.max_length,
        "without_prompt": settings.without_prompt,
    }
    content, negative = "nll", None
    if settings.contrast_model_name_or_path:
        content = "contrast_nll"
        model_of_wrong = _load_contrast(settings, tokenizer)
        belongs_to["contrast_model_name_or_path"] = settings.contrast_model_name_or_path
        belongs_to["contrast_weights"] = offline.weights_fingerprint(model_of_wrong)
        negative = apply_to(model_of_wrong.to(device).eval(), layer=None)
    first_token = None
    if settings.without_prompt:
        content = "alone_nll"
        first_token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    losses = offline.losses_under(
        apply_to(model.to(device).eval(), layer=None),
        DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"),
        device,
        settings.impl,
        first_token,
        negative,
    )
    with Journal(settings.output, belongs_to) as journal:
        _tell_resumed(journal)
        started = time.perf_counter()
        tokens = offline.record_losses(journal, rows, identity, losses, settings.batch_size)
        seconds = time.perf_counter() - started
        writer = HistoryWriter(
            settings.output,
            tokenizer=tokenizer,
            model=settings.model_name_or_path,
            max_length=settings.max_length,
            dataset=settings.dataset_name,
            content=content,
            if_disk_is_full=journal.advice,
        )
        order = identity.keys[identity.documents()]
        count, total = offline.publish(journal, writer, order)
    summary = {
        "rows": len(rows),
        "documents": len(order),
        "response_tokens": count,
        "mean_nll": total / max(count, 1),
        "tokens_per_second": tokens / seconds,
        "peak_memory_mib": peak_memory_mib(device),
    }
    same = f" ({len(rows) - len(order)} of them repeated)" if len(order) < len(rows) else ""
    print(
        f"{settings.output}: {len(rows)} rows{same}, {count} response tokens, mean NLL {summary['mean_nll']:.4f} nats, "
        f"{summary['tokens_per_second']:.0f} tokens/s, peak memory {summary['peak_memory_mib']:.0f} MiB"
    )
    return summary


def select(settings: SelectArguments) -> dict[str, float]:
    """Ranks all tokens of a dataset by recorded losses, without a model -> documents, tokens, share kept."""
    from tokensel import offline
    from tokensel.arguments import SelectionArguments, parse_recorded
    from tokensel.journal import Journal
    from tokensel.store import HistoryWriter

    _check_new(settings.output)
    method = SelectionArguments(method=settings.method, method_args=settings.method_args).build_method()
    files = {f"{name}_nll": file for name, file in parse_recorded(settings.recorded).items()}
    offline.check_offline(method, files)
    with offline.RecordedDataset(files) as data:
        belongs_to = {
            "command": "select",
            "method": settings.method,
            "method_args": settings.method_args,
            "recorded": files,
            "stores": data.digest,
        }
        with Journal(settings.output, belongs_to) as journal:
            _tell_resumed(journal)
            offline.select_tokens(method, data, journal)
            made = data.metadata
            writer = HistoryWriter(
                settings.output,
                max_length=made["max_length"],
                dataset=made["dataset"],
                content="weight",
                if_disk_is_full=journal.advice,
            )
            writer.metadata |= {name: belongs_to[name] for name in ("method", "method_args", "recorded")}
            writer.metadata["tokenizer"] = made["tokenizer"]
            count, kept = offline.publish(journal, writer)
    summary = {
        "documents": made["documents"],
        "response_tokens": count,
        "kept": int(kept),
        "kept_share": kept / count,
        "peak_memory_mib": peak_memory_mib("cpu"),
    }
    print(
        f"{settings.output}: {made['documents']} documents, kept {int(kept)} of {count} response tokens "
        f"({summary['kept_share']:.2%}), peak memory {summary['peak_memory_mib']:.0f} MiB"
    )
    return summary


def last_complete_checkpoint(output_dir: str) -> str:
    """The newest checkpoint that was written to its end: the trainer's state is the last file of one.

    Raises:
        FileNotFoundError: there is none.
    """
    complete = [p for p in Path(output_dir).glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    if not complete:
        raise FileNotFoundError(f"{output_dir} holds no complete checkpoint to resume from")
    return str(max(complete, key=lambda p: int(p.name.rpartition("-")[2])))


def train(settings: RunArguments, arguments) -> dict[str, float]:
    """Fine-tunes with token selection and saves the model (or adapter) to `output_dir` -> the metrics."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, set_seed

    from tokensel.data import SelectionCollator
    from tokensel.trainer import SelectiveTrainer

    arguments.build_method()  # a wrong name should not have to wait for the model to load
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint == "last":
        checkpoint = last_complete_checkpoint(arguments.output_dir)
    elif checkpoint is None and any(Path(arguments.output_dir).glob("checkpoint-*")):
        raise ValueError(
            f"output_dir {arguments.output_dir} already holds checkpoints; go on with --resume_from_checkpoint last "
            "or choose another output_dir"
        )
    set_seed(arguments.seed)
    tokenizer = _load_tokenizer(settings)
    names = [name for name in (settings.dataset_name, settings.eval_dataset_name) if name]
    weights = {"prompt_weight": settings.prompt_weight, "response_weight": settings.response_weight}
    encoded = {name: _encode(name, settings.dataset_split, tokenizer, settings.max_length, **weights) for name in names}
    model = _load_model(settings)
    for name, (_, report) in encoded.items():
        _check_fit(name, report, tokenizer, model)
    if settings.use_peft:
        from peft import LoraConfig, get_peft_model

        targets = settings.lora_target_modules
        lora = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=targets if targets == "all-linear" else targets.split(","),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
        if arguments.gradient_checkpointing:
            model.enable_input_require_grads()
    rows, held_out = encoded[settings.dataset_name][0], None
    if settings.eval_dataset_name:
        held_out = encoded[settings.eval_dataset_name][0].select_columns(["input_ids", "labels"])
    packed = DataCollatorWithFlattening(return_tensors="pt")
    collator = packed if settings.packing else DataCollatorForSeq2Seq(tokenizer, return_tensors="pt")
    trainer = SelectiveTrainer(
        model,
        arguments,
        data_collator=SelectionCollator(collator),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = dict(result.metrics)
    if held_out is not None:
        metrics |= trainer.evaluate()
    metrics |= trainer.selection_totals()
    metrics["peak_memory_mib"] = peak_memory_mib(str(trainer.args.device))
    trainer.save_metrics("all", metrics)
    steps = trainer.state.global_step
    held = f"held-out loss {metrics['eval_loss']:.4f}, " if held_out is not None else ""
    print(
        f"{arguments.output_dir}: {steps} steps, train loss {metrics['train_loss']:.4f}, {held}"
        f"kept {metrics['kept_share']:.1%} of {metrics['responses']:.0f} response tokens, "
        f"{metrics['tokens_per_second']:.0f} tokens/s, peak memory {metrics['peak_memory_mib']:.0f} MiB"
    )
    return metrics


def kernels(arch: str, json_file: str | None) -> list[dict]:
    """Compiles every Triton kernel and tile for a chip and prints what the compiler says -> the reports."""
    from dataclasses import asdict

    from tqdm.auto import tqdm

    from tokensel.ops.checks import AUTO_RULE
    from tokensel.report import format_table
    from tokensel_kernels import compiled, roofline

    reports = list(tqdm(compiled.reports(arch), desc=f"compile for {arch}", unit="kernel"))
    print(format_table([compiled.as_row(report) for report in reports]))
    shapes = ((8192, 128256, 4096), (8192, 151936, 3584))
    calls = [call for shape in shapes for call in roofline.estimates(*shape)]
    calls += [call for length in (8192, 131072) for call in roofline.attention_estimates(length)]
    print("\nWhat the calls compute and move, and the least time that takes:")
    print(format_table([roofline.as_row(call) for call in calls]))
    print()
    print(f'impl="auto" is: {AUTO_RULE}')
    found = [asdict(report) for report in reports]
    if json_file:
        Path(json_file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def list_methods(argv: list[str]) -> None:
    """Prints a table of all methods, or one method's formula and parameters."""
    import inspect

    from tokensel import methods
    from tokensel.report import format_table

    if not argv:
        columns = ("method", "scope", "needs", "score and rule")
        print(format_table([{c: row[c] for c in columns} for row in methods.describe()], left=columns))
        print("\n`tokensel methods NAME` explains one; set them with --method NAME --method_args rho=0.6")
        return
    if len(argv) > 1:
        raise ValueError(f"`tokensel methods` takes one name at most; got {' '.join(argv)}")
    methods.get(argv[0])  # refuses an unknown name
    (row,) = (row for row in methods.describe() if row["method"] == argv[0])
    print(f"{argv[0]}: {inspect.getdoc(methods.builder(argv[0]))}\n")
    print(f"parameters: {row['parameters']}\nscope: {row['scope']}\nneeds: {row['needs']}")


def report(argv: list[str]) -> Path:
    """Draws runs that were trained with --record_samples as one self-contained page -> its path."""
    from argparse import ArgumentParser

    from tokensel.report import write_selection_page
    from tokensel.report.watch import load_run

    parser = ArgumentParser(prog="tokensel report", description=report.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a training")
    parser.add_argument("--output", type=Path, help="HTML file to write; default: selection.html in the first run")
    given = parser.parse_args(argv)
    page = given.output or given.runs[0] / "selection.html"
    write_selection_page(page, [load_run(run) for run in given.runs], title="Which tokens were kept, and why")
    print(f"{page}: {len(given.runs)} runs")
    return page


def tune(settings) -> None:
    """Times tiles around the known-good ones on the GPU at hand, and writes the fastest to a file that
    TOKENSEL_TILES=FILE makes the kernels take. Some minutes."""
    import torch

    if Path(settings.output).exists():
        raise ValueError(f"output {settings.output} exists; move it away or choose another name")
    if not torch.cuda.is_available():
        raise ValueError(
            "tokensel tune times kernels on the GPU at hand, and PyTorch finds none; the tiles that are shipped need "
            "no tuning (tokensel kernels --arch CHIP reports them)"
        )
    from tokensel_kernels import tiles, tune

    if tiles.interpreting():
        raise ValueError("kernels are interpreted, not timed, under TRITON_INTERPRET=1; unset it")
    dtype = getattr(torch, settings.dtype)
    device = torch.device("cuda", torch.cuda.current_device())
    shapes = (settings.rows, settings.vocabulary, settings.hidden, settings.sequence)
    found = tune.tune(tune.calls(*shapes, dtype, device), tiles.chip_family(device)[0], dtype.itemsize)
    tiles.write_tiles(settings.output, found)
    print(f"{settings.output}: use it with TOKENSEL_TILES={settings.output}")


def _parse_tune(argv: list[str]):
    from argparse import ArgumentParser

    parser = ArgumentParser(prog="tokensel tune", description=tune.__doc__)
    parser.add_argument("--output", required=True, help="file to write; must not exist yet")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rows", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size")
    parser.add_argument("--sequence", type=int, default=8192, help="length that attention mass is timed at")
    return parser.parse_args(argv)


def _parse_kernels(argv: list[str]) -> tuple[str, str | None]:
    from argparse import ArgumentParser

    parser = ArgumentParser(prog="tokensel kernels", description=kernels.__doc__)
    parser.add_argument("--arch", required=True, help="sm_80, sm_90, sm_100 or gfx942")
    parser.add_argument("--json", help="also write the reports to this file")
    given = parser.parse_args(argv)
    return given.arch, given.json


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `tokensel` command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(DESCRIPTION)
        return 0
    if argv[0] == "--version":
        print(f"tokensel {tokensel.__version__}")
        return 0
    command, rest = argv[0], argv[1:]
    try:
        if command == "score":
            required = ("model_name_or_path", "dataset_name", "output")
            score(*_parse([ScoreArguments], rest, "tokensel score", required))
        elif command == "select":
            select(*_parse([SelectArguments], rest, "tokensel select", ("method", "recorded", "output")))
        elif command == "train":
            from tokensel.arguments import SelectiveTrainingArguments

            required = ("model_name_or_path", "dataset_name", "output_dir")
            train(*_parse([RunArguments, SelectiveTrainingArguments], rest, "tokensel train", required))
        elif command == "methods":
            list_methods(rest)
        elif command == "report":
            report(rest)
        elif command == "kernels":
            kernels(*_parse_kernels(rest))
        elif command == "tune":
            tune(_parse_tune(rest))
        else:
            raise ValueError(
                f"unknown command {command!r}; there are score, select, train, methods, report, kernels "
                "and tune (tokensel --help)"
            )
    except (ValueError, LookupError, OSError, ImportError, NotImplementedError) as error:
        if os.environ.get("TOKENSEL_TRACEBACK"):
            raise
        print(f"tokensel: error: {error}\n(set TOKENSEL_TRACEBACK=1 to see where)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
