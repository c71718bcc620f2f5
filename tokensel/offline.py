"""Before training: `score` records losses of a dataset under a model, `select` ranks all its tokens by them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy
import torch
from transformers import DataCollatorForSeq2Seq

from tokensel.arguments import ScoreArguments, SelectArguments, SelectionArguments, parse_recorded
from tokensel.loading import check_fit, encode_dataset, load_contrast_model, load_model, load_tokenizer
from tokensel.metrics import peak_memory_mib
from tokensel.model import apply_to
from tokensel.ops.checks import check_positive
from tokensel.ranking import RecordedDataset, check_offline, select_tokens
from tokensel.recording import identify, record_losses, response_losses, weights_fingerprint
from tokensel.store import HistoryWriter, tokenizer_fingerprint
from tokensel.store.shards import Shards


def _check_new(output: str) -> None:
    if Path(output).exists():
        raise ValueError(f"output {output} exists; move it away or choose another name")


def _tell_resumed(shards: Shards) -> None:
    if len(shards.keys):
        print(f"going on with {shards.directory}: {len(shards.keys):,} documents are done", flush=True)


def score(settings: ScoreArguments) -> dict[str, float]:
    """Records the negative log-likelihood of every response token under a model -> rows, tokens, mean NLL."""
    check_positive("batch_size", settings.batch_size)
    _check_new(settings.output)
    if settings.without_prompt and settings.contrast_model_name_or_path:
        raise ValueError("without_prompt and contrast_model_name_or_path make stores of different kinds; choose one")
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}") from error
    tokenizer = load_tokenizer(settings)
    rows, counts = encode_dataset(settings, settings.dataset_name, tokenizer)
    rows = rows.select_columns(["input_ids", "labels"])
    model = load_model(settings)
    check_fit(settings.dataset_name, counts, tokenizer, model)
    identity = identify(rows)
    belongs_to = {
        "command": "score",
        "model_name_or_path": settings.model_name_or_path,
        "weights": weights_fingerprint(model),
        "dtype": str(model.dtype),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "dataset": identity.digest,
        "max_length": settings.max_length,
        "without_prompt": settings.without_prompt,
    }
    content, negative = "nll", None
    if settings.contrast_model_name_or_path:
        content = "contrast_nll"
        model_of_wrong = load_contrast_model(settings, tokenizer)
        belongs_to["contrast_model_name_or_path"] = settings.contrast_model_name_or_path
        belongs_to["contrast_weights"] = weights_fingerprint(model_of_wrong)
        negative = apply_to(model_of_wrong.to(device).eval(), layer=None)  # type: ignore[arg-type]
    first_token = None
    if settings.without_prompt:
        content = "alone_nll"
        first_token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    losses = response_losses(
        apply_to(model.to(device).eval(), layer=None),  # type: ignore[arg-type]
        DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"),
        device,
        settings.impl,
        first_token,
        negative,
    )
    with Shards(settings.output, belongs_to) as shards:
        _tell_resumed(shards)
        started = time.perf_counter()
        tokens = record_losses(shards, rows, identity, losses, settings.batch_size)
        seconds = time.perf_counter() - started
        writer = HistoryWriter(
            settings.output,
            tokenizer=tokenizer,
            model=settings.model_name_or_path,
            max_length=settings.max_length,
            dataset=settings.dataset_name,
            content=content,
            if_disk_is_full=shards.advice,
        )
        order = identity.keys[identity.documents()]
        count, total = publish(shards, writer, order)
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
    _check_new(settings.output)
    method = SelectionArguments(method=settings.method, method_args=settings.method_args).build_method()
    files = {f"{name}_nll": file for name, file in parse_recorded(settings.recorded).items()}
    check_offline(method, files)
    with RecordedDataset(files) as data:
        belongs_to = {
            "command": "select",
            "method": settings.method,
            "method_args": settings.method_args,
            "recorded": files,
            "stores": data.digest,
        }
        with Shards(settings.output, belongs_to) as shards:
            _tell_resumed(shards)
            select_tokens(method, data, shards)
            made = data.metadata
            writer = HistoryWriter(
                settings.output,
                max_length=made["max_length"],
                dataset=made["dataset"],
                content="weight",
                if_disk_is_full=shards.advice,
            )
            writer.metadata |= {name: belongs_to[name] for name in ("method", "method_args", "recorded")}
            writer.metadata["tokenizer"] = made["tokenizer"]
            count, kept = publish(shards, writer)
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


def publish(shards: Shards, writer: HistoryWriter, order: numpy.ndarray | None = None) -> tuple[int, float]:
    """Turns shards into the store that `writer` makes and removes them -> (values, their sum).

    Args:
        order: keys in the order of the store; None = as recorded.
    """
    count, total = 0, 0.0
    with writer:
        for key, values in shards.documents(order):
            writer.append(key, values)
            responses = values[~numpy.isnan(values)]
            count, total = count + len(responses), total + float(responses.sum(dtype=numpy.float64))
    shards.remove()
    return count, total
