"""Before training: `score` records losses of a dataset under a model, `select` ranks all its tokens by them."""

from __future__ import annotations

import torch

from tokensel.arguments import SelectionArguments, parse_recorded
from tokensel.data.rows import told
from tokensel.loading import chat_of, check_fit, encode_dataset, load_contrast_model, load_model, load_tokenizer
from tokensel.metrics import peak_memory_mib
from tokensel.ops.checks import check_positive
from tokensel.ranking import RecordedDataset, check_offline, select_tokens
from tokensel.recording import record_losses, refuse_existing
from tokensel.settings import ScoreArguments, SelectArguments
from tokensel.store import HistoryWriter
from tokensel.store.shards import Shards, publish


def score(settings: ScoreArguments) -> dict[str, float]:
    """Records the negative log-likelihood of every response token under a model -> rows, tokens, mean NLL."""
    check_positive("batch_size", settings.batch_size)
    refuse_existing(settings.output)
    if settings.without_prompt and settings.contrast_model_name_or_path:
        raise ValueError("without_prompt and contrast_model_name_or_path make stores of different kinds; choose one")
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}") from error
    tokenizer = load_tokenizer(settings)
    split, both = settings.dataset_split, settings.both_answers
    rows, counts = encode_dataset(settings, settings.dataset_name, split, tokenizer, both_answers=both)
    rows = rows.select_columns(["input_ids", "labels"])
    model = load_model(settings)
    check_fit(settings.dataset_name, counts, tokenizer, model)
    negative = None
    if settings.contrast_model_name_or_path:
        negative = load_contrast_model(settings, tokenizer).to(device)  # type: ignore[arg-type]
    first_token = None
    if settings.without_prompt:
        first_token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    summary = record_losses(
        model.to(device),  # type: ignore[arg-type]
        rows,
        settings.output,
        tokenizer=tokenizer,
        batch_size=settings.batch_size,
        impl=settings.impl,
        first_token=first_token,
        negative=negative,
        model_name=settings.model_name_or_path,
        dataset=told(settings.dataset_name),
        max_length=settings.max_length,
        chat=chat_of(settings, counts, tokenizer),
    )
    summary["peak_memory_mib"] = peak_memory_mib(device)
    repeated = len(rows) - summary["documents"]
    same = f" ({repeated} of them repeated)" if repeated else ""
    print(
        f"{settings.output}: {len(rows)} rows{same}, {summary['response_tokens']} response tokens, "
        f"mean NLL {summary['mean_nll']:.4f} nats, {summary['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {summary['peak_memory_mib']:.0f} MiB"
    )
    return summary


def select(settings: SelectArguments) -> dict[str, float]:
    """Ranks all tokens of a dataset by recorded losses, without a model -> documents, tokens, share kept."""
    refuse_existing(settings.output)
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
            shards.tell()
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
            writer.metadata |= {name: made.get(name) for name in ("tokenizer", "chat")}
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
