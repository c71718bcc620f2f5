"""Before training: `score` records losses of a dataset under a model, `select` ranks all its tokens by them."""

from __future__ import annotations

from typing import Any

from tokensel.arguments import SelectionArguments, parse_recorded
from tokensel.data.rows import told
from tokensel.loading import (
    EncodedRows,
    chat_of,
    first_token_of,
    load_scoring_models,
    load_tokenizer,
    naming_what_fits,
    scoring_device,
)
from tokensel.metrics import peak_memory_mib
from tokensel.model_facts import ModelFacts, facts_of
from tokensel.ops.checks import check_positive
from tokensel.parallel import is_first_rank, joined_ranks, launched_ranks, on_first_rank, rank_of_ranks
from tokensel.ranking import RecordedDataset, check_offline, select_tokens
from tokensel.recording import TOKENS_PER_BATCH, record, refuse_existing, scoring
from tokensel.settings import ScoreArguments, SelectArguments
from tokensel.store import HistoryWriter
from tokensel.store.shards import Shards, publish


def score(settings: ScoreArguments) -> dict[str, float]:
    """Records the negative log-likelihood of every response token under a model -> rows, tokens, mean NLL.

    The ranks that torchrun or `accelerate launch` has started share the work.
    """
    check_positive("batch_size", settings.batch_size)
    check_positive("tokens_per_batch", settings.tokens_per_batch)
    check_positive("ray_actors", settings.ray_actors)
    if settings.batch_size is not None and settings.tokens_per_batch != TOKENS_PER_BATCH:
        raise ValueError("batch_size and tokens_per_batch both say how much goes through the model at once; give one")
    if settings.without_prompt and settings.contrast_model_name_or_path:
        raise ValueError("without_prompt and contrast_model_name_or_path make stores of different kinds; choose one")
    with joined_ranks():
        on_first_rank(lambda: refuse_existing(settings.output))
        tokenizer = load_tokenizer(settings)
        rows = EncodedRows(settings, tokenizer)
        common: dict[str, Any] = {
            "tokenizer": tokenizer,
            "tokens_per_batch": settings.tokens_per_batch,
            "batch_size": settings.batch_size,
            "first_token": first_token_of(tokenizer) if settings.without_prompt else None,
            "dataset": told(settings.dataset_name),
            "max_length": settings.max_length,
            "chat": lambda: chat_of(settings, rows.counts, tokenizer),
        }
        with naming_what_fits():
            how = _record_on_ray if settings.ray_actors else _record_here
            summary = how(settings, rows, tokenizer, common)
        if is_first_rank():
            _tell(settings, summary)
    return summary


def _record_here(settings: ScoreArguments, rows: EncodedRows, tokenizer: Any, common: dict[str, Any]) -> dict:
    device, models = scoring_device(settings), {}

    def load() -> dict[str, ModelFacts]:
        models.update(load_scoring_models(settings, tokenizer, device))
        names = {"": settings.model_name_or_path}
        return {kind: facts_of(model, names.get(kind)) for kind, model in models.items()}

    score = scoring(models, settings.impl, common["first_token"])
    return record(load, rows, settings.output, score, **common) | {"peak_memory_mib": peak_memory_mib(device)}


def _record_on_ray(settings: ScoreArguments, rows: EncodedRows, tokenizer: Any, common: dict[str, Any]) -> dict:
    from tokensel import on_ray

    on_ray.start(settings)
    summary = record(lambda: on_ray.facts(settings), rows, settings.output, on_ray.scoring(settings), **common)
    return summary | {"peak_memory_mib": peak_memory_mib("cpu")}


def _tell(settings: ScoreArguments, summary: dict[str, float]) -> None:
    repeated, ranks = summary["rows"] - summary["documents"], rank_of_ranks()[1]
    same = f" ({repeated} of them repeated)" if repeated else ""
    of_all = f" of {ranks} ranks" if ranks > 1 else f" of {settings.ray_actors} actors" if settings.ray_actors else ""
    print(
        f"{settings.output}: {summary['rows']} rows{same}, {summary['response_tokens']} response tokens, "
        f"mean NLL {summary['mean_nll']:.4f} nats, {summary['tokens_per_second']:.0f} tokens/s{of_all}, "
        f"peak memory {summary['peak_memory_mib']:.0f} MiB"
    )


def select(settings: SelectArguments) -> dict[str, float]:
    """Ranks all tokens of a dataset by recorded losses, without a model -> documents, tokens, share kept."""
    if launched_ranks() > 1:
        raise ValueError("select reads and writes, and needs no ranks; start it once, without torchrun")
    refuse_existing(settings.output)
    method = SelectionArguments(method=settings.method, method_args=settings.method_args).build_method()
    files = {f"{name}_nll": file for name, file in parse_recorded(settings.recorded).items()}
    check_offline(method, files)
    data = RecordedDataset(files)
    belongs_to = {
        "command": "select",
        "method": settings.method,
        "method_args": settings.method_args,
        "recorded": files,
        "stores": data.digest,
    }
    with Shards(settings.output) as shards:
        shards.begin(belongs_to)
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
