"""Recording losses before training: what the documents of a dataset are, and each response token's loss under a model.

It streams: memory holds the documents in flight, and a run that was killed goes on from its shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from tokensel.documents import IGNORE_INDEX, document_keys, documents_of, to_labels, to_rows
from tokensel.model import PatchedModel, apply_to, eval_mode, remove, unwrap
from tokensel.ops.checks import check_positive
from tokensel.ops.stats import token_stats_contrast
from tokensel.store import HistoryWriter, tokenizer_fingerprint
from tokensel.store.shards import Shards, publish


class Identity(NamedTuple):
    """What the documents of a dataset are. n rows."""

    keys: numpy.ndarray  # (n,) int64, the hash of each row's token ids
    lengths: numpy.ndarray  # (n,) int64
    largest_id: int  # of the tokens
    digest: str  # sha256 (hex) of all token ids and of which tokens are responses, in order

    def documents(self) -> numpy.ndarray:
        """Numbers of the rows to score, in order: of rows with equal token ids the first."""
        return numpy.sort(numpy.unique(self.keys, return_index=True)[1])


def identify(rows: Iterable[dict]) -> Identity:
    """Hashes rows of `input_ids` and `labels`, in order, holding a thousand at a time."""
    digest, keys, lengths, largest = hashlib.sha256(), [], [], 0
    waiting: list[dict] = []

    def take() -> None:
        nonlocal largest
        sizes = torch.tensor([len(row["input_ids"]) for row in waiting])
        ids = torch.tensor([token for row in waiting for token in row["input_ids"]])
        segments = torch.repeat_interleave(torch.arange(len(waiting)), sizes)
        hashes = document_keys(ids[None], segments[None])[0][sizes.cumsum(0) - sizes]
        responses = bytes(label != IGNORE_INDEX for row in waiting for label in row["labels"])
        digest.update(hashes.numpy().tobytes() + sizes.numpy().tobytes() + responses)
        largest = max(largest, int(ids.max()))
        keys.append(hashes.numpy())
        lengths.append(sizes.numpy())
        waiting.clear()

    for row in rows:
        waiting.append(row)
        if len(waiting) == 1024:
            take()
    if waiting:
        take()
    if not keys:
        raise ValueError("there is no row, and so nothing to record")
    return Identity(numpy.concatenate(keys), numpy.concatenate(lengths), largest, digest.hexdigest())


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over name, shape, dtype and the first 64 entries of each parameter: notices a retrained model."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:64].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def without_prompt(row: dict, first_token: int) -> dict:
    """The response tokens of a row alone, behind one token that predicts the first of them.

    Of the prompt, earlier turns of a conversation included, nothing stays.
    """
    response = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE_INDEX]
    return {"input_ids": [first_token, *response], "labels": [IGNORE_INDEX, *response]}


def _refuse_other_responses(identity: Identity, document: Callable[[int], dict], row_of: numpy.ndarray) -> None:
    """Two prompts of the same tokens, cut, leave two documents; one set of losses cannot be of both."""
    equal = identity.keys.argsort(kind="stable")
    for one, other in itertools.pairwise(equal):
        if identity.keys[one] == identity.keys[other]:
            a, b = ([label != IGNORE_INDEX for label in document(int(n))["labels"]] for n in (one, other))
            if a != b:
                raise ValueError(
                    f"rows {row_of[one]} and {row_of[other]} have the same token ids and different response tokens, so "
                    "without their prompts they are two documents, which a store does not tell apart; leave one out"
                )


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
) -> Callable[[list[dict]], list[Tensor]]:
    """The function from documents to the losses of their response tokens under a model that `apply_to` has patched.

    Args:
        first_token: given, the losses are those of the responses behind this token alone (`without_prompt`).
        negative: given, the losses are those under the contrast of `patched` with this model (`contrast_nll`).
    """
    device: Any = patched.model.get_input_embeddings().weight.device

    @torch.no_grad()
    def losses(rows: list[dict]) -> list[Tensor]:
        if first_token is not None:
            rows = [without_prompt(row, first_token) for row in rows]
        ids, labels = (
            pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=padding)
            for name, padding in (("input_ids", 0), ("labels", IGNORE_INDEX))
        )  # (B, S)
        sizes = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = (torch.arange(ids.shape[1]) < sizes[:, None]).long()
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if negative is None:
            nll = patched.token_nll(batch, labels.to(device), impl=impl)
        else:
            nll = contrast_nll(patched, negative, batch, labels.to(device), impl)
        return [values[mine] for values, mine in zip(nll.cpu(), labels != IGNORE_INDEX, strict=True)]

    return losses


def score_documents(
    shards: Shards,
    document: Callable[[int], dict],
    identity: Identity,
    losses: Callable[[list[dict]], list[Tensor]],
    batch_size: int,
) -> int:
    """Puts the losses of all documents that the shards lack into them -> tokens of those that this run scored.

    Batches of like length waste no padding; the longest come first, so that too little memory shows at once.

    Args:
        document: its number -> `input_ids` and `labels`; of documents with equal token ids the first is scored, with
            the response tokens of all of them.
        losses: documents -> for each the negative log-likelihoods of its response tokens, nats, in order.
    Raises:
        ValueError: a loss that is not finite; names document and token.
    """
    documents = identity.documents()
    order = documents[numpy.argsort(-identity.lengths[documents], kind="stable")]
    order = order[~numpy.isin(identity.keys[order], shards.keys)]
    equal = identity.keys.argsort(kind="stable")  # numbers, with those of equal documents side by side

    def with_all_labels(number: int) -> dict:
        begin, end = (
            numpy.searchsorted(identity.keys, identity.keys[number], side, sorter=equal) for side in ("left", "right")
        )
        whole = document(number)
        for other in equal[begin:end]:
            if other != number:
                labels = zip(whole["labels"], document(int(other))["labels"], strict=True)
                whole["labels"] = [theirs if mine == IGNORE_INDEX else mine for mine, theirs in labels]
        return whole

    done, left = int(shards.lengths.sum()), int(identity.lengths[order].sum())
    with tqdm(total=done + left, initial=done, unit="token", unit_scale=True, desc="score") as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = [with_all_labels(int(i)) for i in numbers]
            values = []
            for number, row, nll in zip(numbers, batch, losses(batch), strict=True):
                response = numpy.array(row["labels"]) != IGNORE_INDEX
                values.append(numpy.full(len(response), numpy.nan, numpy.float32))
                values[-1][response] = nll.numpy()
                wrong = response & ~numpy.isfinite(values[-1])
                if wrong.any():
                    raise ValueError(
                        f"row {number}: the loss of token {int(wrong.argmax())} is {values[-1][wrong][0]}; the scoring "
                        "model must give finite losses (try float32 or bfloat16 instead of float16)"
                    )
            lengths = identity.lengths[numbers].astype(numpy.int32)
            shards.append(identity.keys[numbers], lengths, numpy.concatenate(values))
            bar.update(int(lengths.sum()))
    shards.flush()
    return left


@contextlib.contextmanager
def _scoring(model: nn.Module) -> Iterator[PatchedModel]:
    """The model, patched and without dropout inside; afterwards it is what it was."""
    was = getattr(unwrap(model), "_tokensel_patched", None)
    patched = apply_to(model, layer=None) if was is None else was
    try:
        with eval_mode(model):
            yield patched
    finally:
        if was is None:
            remove(model)


def refuse_existing(path: str | os.PathLike[str]) -> None:
    if Path(path).exists():
        raise ValueError(f"output {path} exists; move it away or choose another name")


def record_losses(
    model: nn.Module,
    rows: Any,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    batch_size: int = 16,
    impl: str = "auto",
    first_token: int | None = None,
    negative: nn.Module | None = None,
    model_name: str | None = None,
    dataset: str = "",
    max_length: int | None = None,
    chat: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Records the loss of every response token of `rows` under a model in a store, for `history="recorded"`.

    A document is found again by its token ids, so the rows must be those that are trained: tokenised, with labels.
    What a killed run has done stays in `path` + ".partial", and the same call goes on from there.

    Args:
        model: a transformers causal language model, perhaps with adapters, which are on; it runs where it is.
        rows: a Dataset, or another sequence of mappings as `documents_of` reads them: `input_ids` and `labels`, or the
            prompts and answers of a trainer of preferences of TRL.
        path: the Parquet file to make; must not exist yet.
        tokenizer: a trainer with another one will refuse the store; None = it is not compared.
        batch_size: documents in a forward pass.
        impl: of the statistics.
        first_token: score the responses alone, behind this token (`t_shirt`).
        negative: score under softmax(2 z - z'), z' of this model (`critical_tokens`).
        model_name, dataset, chat: what a later error says the store was made from (see `HistoryWriter`).
        max_length: so is this; prompts with answers are cut to it, as TRL cuts them.
    Returns:
        rows, documents, response_tokens, mean_nll (nats), tokens_per_second.
    Raises:
        TypeError: rows that cannot be read by number, as a stream.
        ValueError: a path that exists, no row, a row without token ids, a token that the model has no embedding for, a
            loss that is not finite, an unfinished run of other settings, a model that `apply_to` refuses, or, with
            `first_token`, rows of equal token ids and different labels.
    """
    check_positive("batch_size", batch_size)
    refuse_existing(path)
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise TypeError(
            f"rows must have a length and be read by number, to score the longest first; got {type(rows).__name__}. "
            "Make a Dataset of a stream: datasets.Dataset.from_list(list(rows))"
        )
    if first_token is not None and negative is not None:
        raise ValueError("first_token and negative make stores of different kinds; give one")
    counts: list[int] = []  # documents of each row

    def all_documents() -> Iterator[dict]:
        for number in range(len(rows)):
            try:
                documents = documents_of(rows[number], max_length)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
            counts.append(len(documents))
            yield from documents

    identity = identify(all_documents())
    row_of = numpy.repeat(numpy.arange(len(counts)), counts)
    first = numpy.cumsum(counts) - counts

    def document(number: int) -> dict:
        return documents_of(rows[int(row_of[number])], max_length)[number - first[row_of[number]]]

    if first_token is not None:
        _refuse_other_responses(identity, document, row_of)
    for what, scored in {"the model": model, "the negative model": negative}.items():
        table: Any = None if scored is None else unwrap(scored).get_input_embeddings().weight
        if table is not None and identity.largest_id >= table.shape[0]:
            raise ValueError(
                f"token {identity.largest_id} of the rows has no embedding: {what} has {table.shape[0]}. They were "
                "made with the tokenizer of another model"
            )
    name = model_name or str(unwrap(model).name_or_path) or type(unwrap(model)).__name__
    belongs_to = {
        "command": "score",
        "model_name_or_path": name,
        "weights": weights_fingerprint(model),
        "dtype": str(unwrap(model).dtype),
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "dataset": identity.digest,
        "max_length": max_length,
        "without_prompt": first_token is not None,
    }
    if negative is not None:
        belongs_to["contrast_model_name_or_path"] = str(unwrap(negative).name_or_path)
        belongs_to["contrast_weights"] = weights_fingerprint(negative)
    content = "alone_nll" if first_token is not None else "nll" if negative is None else "contrast_nll"
    with contextlib.ExitStack() as stack:
        shards = stack.enter_context(Shards(path, belongs_to))
        shards.tell()
        patched = stack.enter_context(_scoring(model))
        other = None if negative is None else stack.enter_context(_scoring(negative))
        losses = response_losses(patched, impl, first_token, other)
        started = time.perf_counter()
        tokens = score_documents(shards, document, identity, losses, batch_size)
        seconds = time.perf_counter() - started
        writer = HistoryWriter(
            path,
            tokenizer=tokenizer,
            model=name,
            max_length=max_length,
            dataset=dataset,
            content=content,
            chat=chat,
            if_disk_is_full=shards.advice,
        )
        count, total = publish(shards, writer, identity.keys[identity.documents()])
    return {
        "rows": len(rows),
        "documents": len(identity.documents()),
        "response_tokens": count,
        "mean_nll": total / max(count, 1),
        "tokens_per_second": tokens / seconds,
    }
