"""Recording losses before training: what the documents of a dataset are, and each response token's loss under a model.

It streams: memory holds the documents in flight, and a run that was killed goes on from its shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tokensel.documents import IGNORE_INDEX, document_keys, to_labels, to_rows
from tokensel.model import PatchedModel
from tokensel.ops.stats import token_stats_contrast
from tokensel.store.shards import Shards


class Identity(NamedTuple):
    """What the documents of a dataset are. n rows."""

    keys: numpy.ndarray  # (n,) int64, the hash of each row's token ids
    lengths: numpy.ndarray  # (n,) int64
    digest: str  # sha256 (hex) of all token ids and of which tokens are responses, in order

    def documents(self) -> numpy.ndarray:
        """Numbers of the rows to score, in order: of rows with equal token ids the first."""
        return numpy.sort(numpy.unique(self.keys, return_index=True)[1])


def identify(rows: Iterable[dict]) -> Identity:
    """Hashes rows of `input_ids` and `labels`, in order, holding a thousand at a time."""
    digest, keys, lengths = hashlib.sha256(), [], []
    waiting: list[dict] = []

    def take() -> None:
        sizes = torch.tensor([len(row["input_ids"]) for row in waiting])
        ids = torch.tensor([token for row in waiting for token in row["input_ids"]])
        segments = torch.repeat_interleave(torch.arange(len(waiting)), sizes)
        hashes = document_keys(ids[None], segments[None])[0][sizes.cumsum(0) - sizes]
        responses = bytes(label != IGNORE_INDEX for row in waiting for label in row["labels"])
        digest.update(hashes.numpy().tobytes() + sizes.numpy().tobytes() + responses)
        keys.append(hashes.numpy())
        lengths.append(sizes.numpy())
        waiting.clear()

    for row in rows:
        waiting.append(row)
        if len(waiting) == 1024:
            take()
    if waiting:
        take()
    return Identity(numpy.concatenate(keys), numpy.concatenate(lengths), digest.hexdigest())


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
    patched: PatchedModel,
    collate: Callable[[list[dict[str, Any]]], Any],
    device: str,
    impl: str,
    first_token: int | None = None,
    negative: PatchedModel | None = None,
) -> Callable[[list[dict]], list[Tensor]]:
    """The function from rows to losses that `record_losses` takes: those under a model that `apply_to` has patched.

    Args:
        collate: pads rows to tensors.
        first_token: given, the losses are those of the responses behind this token alone (`without_prompt`).
        negative: given, the losses are those under the contrast of `patched` with this model (`contrast_nll`).
    """

    @torch.no_grad()
    def losses(rows: list[dict]) -> list[Tensor]:
        if first_token is not None:
            rows = [without_prompt(row, first_token) for row in rows]
        batch = collate(rows).to(device)
        labels = batch.pop("labels")  # (B, S)
        if negative is None:
            nll = patched.token_nll(batch, labels, impl=impl)
        else:
            nll = contrast_nll(patched, negative, batch, labels, impl)
        return [values[mine] for values, mine in zip(nll.cpu(), (labels != IGNORE_INDEX).cpu(), strict=True)]

    return losses


def record_losses(
    shards: Shards,
    rows,
    identity: Identity,
    losses: Callable[[list[dict]], list[Tensor]],
    batch_size: int,
) -> int:
    """Puts the losses of all documents that the shards lack into them -> tokens of the rows that this run scored.

    Batches of like length waste no padding; the longest come first, so that too little memory shows at once.

    Args:
        rows: rows of `input_ids` and `labels` by number; of rows with equal token ids the first is scored.
        losses: rows -> for each the negative log-likelihoods of its response tokens, nats, in order.
    Raises:
        ValueError: a loss that is not finite; names row and token.
    """
    documents = identity.documents()
    order = documents[numpy.argsort(-identity.lengths[documents], kind="stable")]
    order = order[~numpy.isin(identity.keys[order], shards.keys)]
    done, left = int(shards.lengths.sum()), int(identity.lengths[order].sum())
    with tqdm(total=done + left, initial=done, unit="token", unit_scale=True, desc="score") as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = [rows[int(i)] for i in numbers]
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
