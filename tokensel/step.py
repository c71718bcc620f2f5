"""One selection step: the data path from a batch to a loss, steps 1 to 7 in order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from tokensel.documents import (
    IGNORE_INDEX,
    PROMPTS,
    document_index,
    positions_in_document,
    prompt_keys,
    token_keys,
)
from tokensel.history import LastSeen, LiveHistory, segments_and_mask
from tokensel.model import PatchedModel
from tokensel.ops.loss import selected_cross_entropy
from tokensel.ops.prompt_mass import HEAD_WEIGHTS, prompt_attention_mass, uniform_prompt_mass
from tokensel.ops.stats import token_stats, token_stats_pair
from tokensel.parallel import mean_over_ranks, replicated_as
from tokensel.select.methods import SelectionMethod
from tokensel.select.signals import RECORDED, TokenSignals

ROWS = ("token", "predictor")


@dataclass
class SelectionOutput(ModelOutput):
    """What a forward with `selection=` returns. [B, S] tensors are label-aligned; all but `loss` are detached.

    Attributes:
        loss: scalar, Σ weight · nll / denominator; plus, where the model's config has output_router_logits on, what
            the model adds to its own loss to balance its experts.
        weights: float32, 0 = dropped.
        response: bool, the tokens that competed.
        sample: int64, the number of the sample that a token belongs to.
        score: float32, the method's score.
        nll: float32, current negative log-likelihood, nats; 0 off the response.
        history_nll: float32 or None, the same under the history.
        mass: float32 or None, attention mass on the prompt.
        entropy: float32 or None, of the current prediction, nats. correct: bool or None, whether no other token was
            likelier than the label. Both only with `token_metrics`.
    """

    loss: Tensor | None = None
    weights: Tensor | None = None
    response: Tensor | None = None
    sample: Tensor | None = None
    score: Tensor | None = None
    nll: Tensor | None = None
    history_nll: Tensor | None = None
    mass: Tensor | None = None
    entropy: Tensor | None = None
    correct: Tensor | None = None


def responses(
    labels: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(response [B, S] bool, sample [B, S] int64): the tokens that compete, and the document each belongs to.

    A document's first token is never one: nothing predicts it.
    """
    segments, _ = segments_and_mask(attention_mask, position_ids)
    segments = torch.zeros_like(labels) if segments is None else segments
    return (labels != IGNORE_INDEX) & predictable(attention_mask, position_ids, labels), document_index(segments)


def predictable(attention_mask: Tensor | None, position_ids: Tensor | None, like: Tensor) -> Tensor:
    """Tokens that another token of their document stands before: [B, S] bool, the shape of `like`."""
    segments, mask = segments_and_mask(attention_mask, position_ids)
    found = torch.ones_like(like, dtype=torch.bool)
    found[:, :1] = False
    if segments is not None:
        found[:, 1:] = segments[:, 1:] == segments[:, :-1]
    if mask is not None:
        found[:, 1:] &= mask[:, 1:] & mask[:, :-1]
    return found


@dataclass
class Selection:
    """How to select in a step; pass it to a patched model: `model(**batch, selection=Selection(...)).loss`.

    Attributes:
        method: from `tokensel.methods.get`.
        history: a live history (`tokensel.history`), or None where `history_nll` comes with the batch or is not needed.
        denominator: of the loss; None = what the method counts in this micro-batch, the number kept for most (the
            published behaviour), or one global number for the optimizer step.
        row: whose query row measures the prompt mass of a token: "token", its own (the paper), or "predictor", the
            position before, which predicts it.
        prompt: which keys are prompt: "all", "first" or "context" (`tokensel.documents.prompt_keys`).
        sink: the first tokens of each document that do not count as prompt (attention sinks stay in the denominator).
        head_weights: how heads count in the mass, "mean" or "entropy" (`prompt_attention_mass`).
        step, samples_seen: optimizer steps and samples done, for seeded draws and `rel_warmup`.
        impl: of statistics, mass and loss.
        score_only: leave out the loss (None), to rank several micro-batches together: what is chosen then comes
            with each batch as `chosen_weights`.
        token_metrics: return each token's entropy, and whether it was the likeliest, for logging.
        router_share: factor of the router's loss: 1 / micro-batches of an optimizer step, if `denominator` is its.
    """

    method: SelectionMethod
    history: LiveHistory | None = None
    denominator: Tensor | float | None = None
    row: str = "token"
    prompt: str = "all"
    sink: int = 0
    head_weights: str = "mean"
    step: int = 0
    samples_seen: int = 0
    impl: str = "auto"
    score_only: bool = False
    token_metrics: bool = False
    router_share: float = 1.0

    def __post_init__(self) -> None:
        if self.method.scope == "dataset":
            raise ValueError(
                f"method {self.method.name!r} ranks the whole dataset: run `tokensel select --method "
                f"{self.method.name}` and train with --method weighted on its output, or set scope='batch'"
            )
        if self.head_weights not in HEAD_WEIGHTS:
            raise ValueError(f"head_weights must be one of {', '.join(HEAD_WEIGHTS)}; got {self.head_weights!r}")
        if self.sink < 0:
            raise ValueError(f"sink must not be negative (tokens); got {self.sink}")
        if self.row not in ROWS:
            raise ValueError(f"row must be one of {', '.join(ROWS)}; got {self.row!r}")
        if self.prompt not in PROMPTS:
            raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}; got {self.prompt!r}")
        if (self.row, self.prompt) == ("predictor", "context"):
            raise ValueError(
                "row='predictor' cannot be combined with prompt='context': the row that predicts an answer's first "
                "token stands before that answer; use row='token' or prompt='all'"
            )

    def __call__(self, patched: PatchedModel, **batch: Tensor) -> SelectionOutput:
        """Runs the step inside the model's forward. batch: input_ids, labels, and what else the model takes; perhaps
        recorded losses (`tokensel.select.signals.RECORDED`) and `token_weights`, all [B, S] and label-aligned."""
        # 1. batch: token ids, labels, padding or packing boundaries, perhaps recorded losses and weights
        labels, given, chosen = (batch.pop(name, None) for name in ("labels", "token_weights", "chosen_weights"))
        losses = {name: batch.pop(name) for name in RECORDED if name in batch}
        input_ids, padding, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
        response, sample = responses(labels, padding, positions)
        labels = torch.where(response, labels, IGNORE_INDEX)  # (B, S)
        if given is not None:  # prompt tokens that the data gives a weight are trained, too, but do not compete
            given = torch.where(predictable(padding, positions, input_ids), given, 0)
        trained = response if given is None else response | (given != 0)
        predicted = torch.where(response, labels, torch.where(trained, input_ids, IGNORE_INDEX))
        next_labels = _left(predicted, IGNORE_INDEX)  # row t predicts token t + 1

        # 2. history forward, only if the history is live and the method looks at it
        history_hidden = None
        if self.history is not None and self.history.signal in self.method.needs:
            if self.history.shares_head:
                history_hidden = self.history.hidden(patched, batch)  # (B, S, D)
            else:
                losses[self.history.signal] = self.history.token_nll(batch, labels, self.impl)  # (B, S)

        # 3. current forward of the backbone; q and k of the chosen layers are captured on the way
        with patched.capture() as captured:
            hidden, router_loss = patched.backbone_and_router_loss(batch)  # (B, S, D)
            signals = self._signals_beside_loss(captured, input_ids, labels, response, sample, padding, positions)

        def statistics_to_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> SelectionOutput:
            head = {"bias": bias, "impl": self.impl, **patched.head_options}
            # 4. token statistics of both models, without logits
            moments = {"entropy": self.token_metrics or not self.method.needs.isdisjoint(("entropy", "logp_var"))}
            if history_hidden is None:
                stats = token_stats(hidden, weight, next_labels, **head, **moments)
            else:
                models = (hidden, weight), (replicated_as(hidden, history_hidden), weight)
                stats, old = token_stats_pair(*models, next_labels, **head, **moments)
                losses[self.history.signal] = _right(old.nll)
            if isinstance(self.history, LastSeen) and self.history.signal in losses:
                known, now = losses[self.history.signal], _right(stats.nll)
                training = patched.model.training and not self.score_only
                losses[self.history.signal] = self.history.visit(batch, labels, known, now, remember=training)
            # 5. scores
            measured = {"nll": stats.nll, "entropy": stats.entropy, "logp_var": stats.logp_var}
            measured = {name: _right(value) for name, value in measured.items() if value is not None}
            known = TokenSignals(response, sample, weight=given, **measured, **losses, **signals)
            score = self.method.score(known)
            # 6. keep
            weights = self.method.select(score, known) if chosen is None else chosen
            if given is not None:
                weights = torch.where(response, weights, given)
            # 7. loss on kept rows
            loss = None
            if not self.score_only:
                keep = _left(weights, 0)
                denominator = self._denominator(response, sample, given, weights)
                loss = selected_cross_entropy(
                    hidden, weight, next_labels, keep, stats=stats, denominator=denominator, **head
                )
                if router_loss is not None:
                    loss = loss + self.router_share * router_loss
            found = {"nll": known.nll, "history_nll": known.history_nll, "mass": known.mass}
            if self.token_metrics:
                found |= {"entropy": known.entropy, "correct": _right(stats.correct)}
            return SelectionOutput(loss, weights, response, sample, score, **found)

        return patched.call_head(statistics_to_loss, hidden)

    def _denominator(self, response: Tensor, sample: Tensor, given: Tensor | None, weights: Tensor) -> Tensor | float:
        if self.denominator is not None:
            return self.denominator
        count = self.method.count(response, sample, given)
        return weights.abs().sum() if count is None else count

    def _signals_beside_loss(self, captured, input_ids, labels, response, sample, padding, positions) -> dict:
        """The signals that do not come from the head: attention mass, its uniform value, token keys, progress."""
        signals: dict = {"step": self.step, "samples_seen": self.samples_seen}
        segments, mask = segments_and_mask(padding, positions)
        if "key" in self.method.needs:
            signals["key"] = token_keys(input_ids, segments, mask)
        if "mass" in self.method.needs:
            prompt, turns = prompt_keys(labels, self.prompt, segments)
            if self.sink:
                prompt = prompt & (positions_in_document(input_ids, segments, mask) >= self.sink)
            masks = {"key_mask": mask, "segment_ids": segments, "turn_ids": turns}
            predictor = self.row == "predictor"
            queries = _left(response, False) if predictor else response
            mass, uniform = [], []
            for layer in captured():
                if layer.group is not None and self.head_weights != "mean":
                    raise ValueError(
                        f"head_weights={self.head_weights!r} is not supported where ranks share the heads of a layer; "
                        "use head_weights='mean'"
                    )
                options = {**masks, **layer.options, "head_weights": self.head_weights, "impl": self.impl}
                heads = prompt_attention_mass(layer.q, layer.k, prompt, query_mask=queries, **options)
                mass.append(mean_over_ranks(heads, layer.group))
                uniform.append(uniform_prompt_mass(prompt, window=layer.options["window"], **masks))
            for name, values in (("mass", mass), ("uniform_mass", uniform)):
                mean = torch.stack(values).mean(0)  # over layers, (B, S)
                signals[name] = _right(mean) if predictor else mean
        return signals


def _left(x: Tensor, last: float) -> Tensor:
    """Label-aligned [B, S] to row-aligned: entry t speaks of token t + 1."""
    return torch.cat([x[:, 1:], torch.full_like(x[:, :1], last)], dim=1)


def _right(x: Tensor) -> Tensor:
    """Row-aligned [B, S] to label-aligned; nothing predicts the first token, which gets 0."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
