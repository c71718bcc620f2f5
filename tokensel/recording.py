"""Recording losses before training: each response token's loss under a model.

It streams: memory holds the documents in flight, and a run that was killed goes on from its shards. The ranks of a job
share the batches among them. What a batch holds depends on the documents alone, so that any number of ranks, killed and
resumed or not, writes the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from tokensel.documents import IGNORE_INDEX, to_labels, to_rows
from tokensel.model import PatchedModel, apply_to, eval_mode, remove, unwrap
from tokensel.model_facts import ModelFacts, check_fit, facts_of
from tokensel.ops.checks import check_positive
from tokensel.ops.stats import token_stats_contrast
from tokensel.ops.vocab_parallel import is_dtensor
from tokensel.parallel import check_ranks_agree, gather_over_ranks, naming_lost_ranks, on_first_rank, rank_of_ranks
from tokensel.store import HistoryWriter, tokenizer_fingerprint
from tokensel.store.encoded import EncodedDocuments, write_documents
from tokensel.store.shards import Shards, publish, shards_of

TOKENS_PER_BATCH = 8192


def without_prompt(document: numpy.ndarray, first_token: int) -> numpy.ndarray:
    """The response tokens of a document alone, behind one token that predicts the first of them. (length, 2) int32.

    Of the prompt, earlier turns of a conversation included, nothing stays.
    """
    response = document[document[:, 1] != IGNORE_INDEX]
    return numpy.concatenate([numpy.array([[first_token, IGNORE_INDEX]], numpy.int32), response])


def contrast_nll(positive: PatchedModel, negative: PatchedModel, inputs: dict, labels: Tensor, impl: str) -> Tensor:
    """Negative log-likelihood under softmax(2 z_positive - z_negative) (cDPO, arXiv 2411.19943).

    Args:
        positive, negative: the two models, patched.
        inputs: input_ids and attention_mask [B, S]; labels: [B, S], label-aligned.
    Returns:
        [B, S] float32, nats, 0 where ignored.
    Raises:
        ValueError: heads that differ in vocabulary, bias, softcap or scale.
    """
    next_labels = to_rows(labels, IGNORE_INDEX)
    if positive.head_options != negative.head_options:
        both = f"{positive.head_options} and {negative.head_options}"
        raise ValueError(f"the heads of the two models must have equal softcap and scale; got {both}")
    negative_hidden = negative.backbone(inputs)

    def contrast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        def with_negative(_, negative_weight: Tensor, negative_bias: Tensor | None) -> Tensor:
            biases = [b for b in (bias, negative_bias) if b is not None]
            if len(biases) == 1 or len(biases) == 2 and not torch.equal(*biases):
                raise ValueError("the heads of the two models have different biases, which is not supported")
            models = (hidden, weight), (negative_hidden, negative_weight)
            return token_stats_contrast(*models, next_labels, bias=bias, impl=impl, **positive.head_options).nll

        return negative.with_whole_head(with_negative, negative_hidden)

    nll = positive.with_whole_head(contrast, positive.backbone(inputs))
    return to_labels(nll)


def response_losses(
    patched: PatchedModel, impl: str = "auto", first_token: int | None = None, negative: PatchedModel | None = None
) -> Callable[[list[numpy.ndarray]], list[numpy.ndarray]]:
    """The function from documents to the losses of their response tokens under a model that `apply_to` has patched.

    It takes documents as (length, 2) int32, id and label of each token, and gives float32 nats of their response
    tokens, in order.

    Args:
        first_token: given, the losses are those of the responses behind this token alone (`without_prompt`).
        negative: given, the losses are those under the contrast of `patched` with this model (`contrast_nll`).
    """
    device: Any = patched.model.get_input_embeddings().weight.device
    device = "cpu" if device.type == "meta" else device  # a weight that lies on a disk is brought to where its input is

    @torch.no_grad()
    def losses(documents: list[numpy.ndarray]) -> list[numpy.ndarray]:
        if first_token is not None:
            documents = [without_prompt(document, first_token) for document in documents]
        ids, labels = (
            pad_sequence(
                [torch.from_numpy(document[:, column].astype(numpy.int64)) for document in documents],
                batch_first=True,
                padding_value=padding,
            )
            for column, padding in ((0, 0), (1, IGNORE_INDEX))
        )  # (B, S)
        sizes = torch.tensor([len(document) for document in documents])
        mask = (torch.arange(ids.shape[1]) < sizes[:, None]).long()
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

        def score(model: PatchedModel, **inputs: Any) -> Tensor:
            if negative is None:
                return model.token_nll(inputs, labels.to(device), impl=impl)
            return contrast_nll(model, negative, inputs, labels.to(device), impl)

        # inside the model's own forward, which is where the weights of a sharded one are gathered
        nll = patched.model(**batch, selection=score)
        return [values[mine].numpy() for values, mine in zip(nll.cpu(), labels != IGNORE_INDEX, strict=True)]

    return losses


def batches_of(lengths: numpy.ndarray, tokens: int, most: int | None = None) -> list[numpy.ndarray]:
    """Numbers of documents that go through the model together, of like length, the longest first.

    So padding is next to nothing, and too little memory shows at once.

    Args:
        lengths: (n,) of the documents.
        tokens: of a batch with its padding, at most; one document is a batch however long it is.
        most: documents of a batch at most, instead.
    """
    order: numpy.ndarray = numpy.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = most or max(tokens // max(int(lengths[order[start]]), 1), 1)
        batches.append(order[start : start + size])
        start += size
    return batches


def not_done(shards: Shards, documents: EncodedDocuments, batches: list[numpy.ndarray]) -> list[numpy.ndarray]:
    """The batches without the documents that the shards have had from the start."""
    done = numpy.isin(documents.keys, shards.keys)
    return [left for batch in batches if len(left := batch[~done[batch]])]


def score_documents(
    shards: Shards,
    documents: EncodedDocuments,
    losses: Callable[[list[numpy.ndarray]], list[numpy.ndarray]],
    batches: list[numpy.ndarray],
    in_step: bool = False,
) -> int:
    """Puts the losses of what the shards lack into them, this rank's share of the batches -> their tokens.

    Args:
        losses: documents -> for each the negative log-likelihoods of its response tokens, nats, in order.
        batches: numbers of the documents of each.
        in_step: all ranks have to call `losses` equally often, as those of a sharded model.
    Raises:
        ValueError: a loss that is not finite; names row and token.
    """
    rank, ranks = rank_of_ranks()
    left = not_done(shards, documents, batches)
    mine = left[rank::ranks]
    sizes = [int(documents.lengths[batch].sum()) for batch in mine]
    title = "score" if ranks == 1 else f"score (rank 0 of {ranks})"
    with tqdm(total=sum(sizes), unit="token", unit_scale=True, desc=title, disable=rank > 0) as bar:
        for batch, size in zip(mine, sizes, strict=True):
            with naming_lost_ranks() if in_step else contextlib.nullcontext():
                values = losses_of(documents, batch, losses)
            shards.append(documents.keys[batch], documents.lengths[batch].astype(numpy.int32), values)
            bar.update(size)
    shards.flush()
    if in_step and len(mine) < len(left[::ranks]):  # it has a share in the others' last batch
        with naming_lost_ranks():
            losses([documents[int(left[-1][0])]])
    return sum(sizes)


def losses_of(
    documents: EncodedDocuments, batch: numpy.ndarray, losses: Callable[[list[numpy.ndarray]], list[numpy.ndarray]]
) -> numpy.ndarray:
    """The losses of all tokens of a batch, one document after the other, NaN where a token is no response."""
    some, values = [documents[int(number)] for number in batch], []
    for number, document, nll in zip(batch, some, losses(some), strict=True):
        response = document[:, 1] != IGNORE_INDEX
        values.append(numpy.full(len(response), numpy.nan, numpy.float32))
        values[-1][response] = nll
        wrong = response & ~numpy.isfinite(values[-1])
        if wrong.any():
            raise ValueError(
                f"row {documents.row_of[number]}: the loss of token {int(wrong.argmax())} is {values[-1][wrong][0]}; "
                "the scoring model must give finite losses (try float32 or bfloat16 instead of float16)"
            )
    return numpy.concatenate(values)


@contextlib.contextmanager
def _scoring(model: nn.Module) -> Iterator[PatchedModel]:
    """The model, patched and without dropout inside; afterwards it is what it was."""
    was = getattr(unwrap(model), "_tokensel_patched", None)
    if was is None:
        if any(is_dtensor(parameter) for parameter in model.parameters()):
            raise ValueError("the model is sharded already; call tokensel.apply_to(model, layer=None) before it is")
        with torch.autocast(unwrap(model).device.type, enabled=False):  # which the comparison of logits would see
            patched = apply_to(model, layer=None)
    else:
        patched = was
    try:
        with eval_mode(model):
            yield patched
    finally:
        if was is None:
            remove(model)


def refuse_existing(path: str | os.PathLike[str]) -> None:
    if Path(path).exists():
        left = shards_of(path)
        more = f" ({left} is left of its making, and may be removed)" if left.is_dir() else ""
        raise ValueError(f"output {path} exists{more}; move it away or choose another name")


def _each(rows: Any) -> Iterator[Any]:
    """The rows in order; by number where they are no iterable, as those of a torch Dataset, which stops at no index."""
    return iter(rows) if hasattr(rows, "__iter__") else (rows[i] for i in range(len(rows)))


def record_losses(
    model: nn.Module,
    rows: Any,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    batch_size: int | None = None,
    impl: str = "auto",
    first_token: int | None = None,
    negative: nn.Module | None = None,
    model_name: str | None = None,
    dataset: str = "",
    max_length: int | None = None,
    chat: Callable[[], dict[str, Any] | None] = lambda: None,
) -> dict[str, float]:
    """Records the loss of every response token of `rows` under a model in a store, for `history="recorded"`.

    A document is found again by its token ids, so the rows must be those that are trained: tokenised, with labels.
    What a killed run has done stays in `path` + ".partial", and the same call goes on from there. Where there is a
    process group all its ranks make the call, with the same arguments, and share the work.

    Args:
        model: a transformers causal language model, perhaps with adapters, which are on; it runs where it is. It may be
            sharded over the ranks, or laid over several devices.
        rows: mappings as `documents_of` reads them: `input_ids` and `labels`, or the prompts and answers of a trainer
            of preferences of TRL. A Dataset, a stream or any iterable; read once, in order, on rank 0.
        path: what to make: a Parquet file, if the name ends so, or else a directory of such (`HistoryWriter`); must not
            exist yet.
        tokenizer: a trainer with another one will refuse the store; None = it is not compared.
        tokens_per_batch: tokens in a forward pass with their padding, at most, but for one document that is longer.
        batch_size: documents in a forward pass, instead.
        impl: of the statistics.
        first_token: score the responses alone, behind this token (`t_shirt`).
        negative: score under softmax(2 z - z'), z' of this model (`critical_tokens`).
        model_name, dataset: what a later error says the store was made from (see `HistoryWriter`).
        max_length: so is this; prompts with answers are cut to it, as TRL cuts them.
        chat: called once the rows have been read: how their chats became tokens, for later errors, too.
    Returns:
        rows, documents, response_tokens, mean_nll (nats), tokens_per_second (of all ranks).
    Raises:
        ValueError: a path that exists, no row, a row without token ids, a token that the model has no embedding or no
            position for, a loss that is not finite, an unfinished run of other settings, ranks with different settings,
            a model that `apply_to` refuses, or, with `first_token`, rows of equal token ids and different labels.
    """
    if first_token is not None and negative is not None:
        raise ValueError("first_token and negative make stores of different kinds; give one")
    models = {"": model} if negative is None else {"": model, "contrast_": negative}
    return record(
        lambda: {kind: facts_of(each, model_name if not kind else None) for kind, each in models.items()},
        rows,
        path,
        scoring(models, impl, first_token),
        tokenizer=tokenizer,
        tokens_per_batch=tokens_per_batch,
        batch_size=batch_size,
        first_token=first_token,
        dataset=dataset,
        max_length=max_length,
        chat=chat,
    )


def scoring(
    models: Mapping[str, nn.Module], impl: str, first_token: int | None
) -> Callable[[Shards, EncodedDocuments, list[numpy.ndarray]], int]:
    """The function that puts the losses of batches into shards in this process, as `record` calls it.

    Args:
        models: the one that scores is "", that of wrong answers "contrast_"; looked at when the function is called.
    """

    def score(shards: Shards, documents: EncodedDocuments, batches: list[numpy.ndarray]) -> int:
        with contextlib.ExitStack() as stack:
            patched, *other = (stack.enter_context(_scoring(each)) for each in models.values())
            losses = response_losses(patched, impl, first_token, *other)
            in_step = any(is_dtensor(parameter) for parameter in models[""].parameters())
            return score_documents(shards, documents, losses, batches, in_step)

    return score


def record(
    load: Callable[[], dict[str, ModelFacts]],
    rows: Any,
    path: str | os.PathLike[str],
    score: Callable[[Shards, EncodedDocuments, list[numpy.ndarray]], int],
    *,
    tokenizer: Any,
    tokens_per_batch: int,
    batch_size: int | None,
    first_token: int | None,
    dataset: str,
    max_length: int | None,
    chat: Callable[[], dict[str, Any] | None],
) -> dict[str, float]:
    """`record_losses`, whoever scores.

    Args:
        load: called once the rows have been read, so that no bad row waits for a model: what has to be known of the one
            that scores, "", and of that of wrong answers, "contrast_".
        score: puts the losses of all batches into the shards, but for documents that they have -> tokens that it
            scored.
    """
    if isinstance(rows, Mapping) or not (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
        raise TypeError(f"rows must be an iterable of mappings, one a row; got {type(rows).__name__}")
    check_positive("tokens_per_batch", tokens_per_batch)
    check_positive("batch_size", batch_size)
    check_ranks_agree(
        {
            "output": str(path),
            "max_length": max_length,
            "tokens_per_batch": tokens_per_batch,
            "batch_size": batch_size,
            "first_token": first_token,
        }
    )
    on_first_rank(lambda: refuse_existing(path))
    with Shards(path) as shards:
        file = shards.directory / "documents"
        documents = on_first_rank(lambda: write_documents(file, _each(rows), max_length, first_token is not None))
        models, largest = load(), max(documents.largest_id, first_token or 0)
        belongs_to: dict[str, Any] = {"command": "score"}
        for kind, model in models.items():
            check_fit(dataset or "rows", int(documents.lengths.max()), largest, model.limits, tokenizer)
            belongs_to |= {f"{kind}model_name_or_path": model.limits.name, f"{kind}weights": model.weights}
        belongs_to |= {
            "dtype": models[""].dtype,
            "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
            "max_length": max_length,
            "without_prompt": first_token,
        }
        check_ranks_agree(belongs_to)
        content = "alone_nll" if first_token is not None else "nll" if len(models) == 1 else "contrast_nll"
        shards.begin(belongs_to | {"dataset": documents.digest})
        started, numbers = time.perf_counter(), documents.numbers()
        lengths = documents.lengths if first_token is None else documents.responses + 1
        batches = [numbers[batch] for batch in batches_of(lengths[numbers], tokens_per_batch, batch_size)]
        tokens = sum(gather_over_ranks([score(shards, documents, batches)]))
        seconds = time.perf_counter() - started
        writer = HistoryWriter(
            path,
            tokenizer=tokenizer,
            model=models[""].limits.name,
            max_length=max_length,
            dataset=dataset,
            content=content,
            chat=chat(),
            if_disk_is_full=shards.advice,
        )
        count, total = publish(shards, writer, documents.keys[numbers])
    return {
        "rows": documents.rows,
        "documents": len(numbers),
        "response_tokens": count,
        "mean_nll": total / max(count, 1),
        "tokens_per_second": tokens / seconds,
    }
