"""One selection step: the data path from a batch to a loss, steps 1 to 7 in order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from tokensel.attention import prompt_attention_mass, uniform_prompt_mass
from tokensel.documents import IGNORE_INDEX, PROMPTS, document_index, prompt_keys, token_keys
from tokensel.history import AdapterOff, segments_and_mask
from tokensel.loss import selected_cross_entropy
from tokensel.methods import TokenSelector
from tokensel.model import Seam
from tokensel.scores import TokenSignals
from tokensel.stats import token_stats, token_stats_pair

ROWS = ("token", "predictor")


@dataclass
class SelectionOutput(ModelOutput):
    """What a forward with `selection=` returns. [B, S] tensors are label-aligned; all but `loss` are detached.

    Attributes:
        loss: scalar, Σ weight · nll / denominator.
        weights: float32, 0 = dropped.
        response: bool, the tokens that competed.
        score: float32, the method's score.
        nll: float32, current negative log-likelihood, nats; 0 off the response.
        history_nll: float32 or None, the same under the history.
        mass: float32 or None, attention mass on the prompt.
    """

    loss: Tensor | None = None
    weights: Tensor | None = None
    response: Tensor | None = None
    score: Tensor | None = None
    nll: Tensor | None = None
    history_nll: Tensor | None = None
    mass: Tensor | None = None


def responses(
    labels: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(response [B, S] bool, sample [B, S] int64): the tokens that compete, and the document each belongs to.

    A document's first token is never one: nothing predicts it.
    """
    segments, mask = segments_and_mask(attention_mask, position_ids)
    segments = torch.zeros_like(labels) if segments is None else segments
    response = labels != IGNORE_INDEX
    predicted = torch.zeros_like(response)
    predicted[:, 1:] = segments[:, 1:] == segments[:, :-1]
    if mask is not None:
        response = response & mask
        predicted[:, 1:] &= mask[:, :-1]
    return response & predicted, document_index(segments)


@dataclass
class Selection:
    """How to select in a step; pass it to a patched model: `model(**batch, selection=Selection(...)).loss`.

    Attributes:
        method: from `tokensel.methods.get`.
        history: a live history (`AdapterOff`), or None where `history_nll` comes with the batch or is not needed.
        denominator: of the loss; None = the number kept in this micro-batch (the published behaviour), or one global
            number for the optimizer step.
        row: whose query row measures the prompt mass of a token: "token", its own (the paper), or "predictor", the
            position before, which predicts it.
        prompt: which keys are prompt: "all", "first" or "context" (`tokensel.documents.prompt_keys`).
        step, samples_seen: optimizer steps and samples done, for seeded draws and `rel_warmup`.
        impl: of statistics, mass and loss.
    """

    method: TokenSelector
    history: AdapterOff | None = None
    denominator: Tensor | float | None = None
    row: str = "token"
    prompt: str = "all"
    step: int = 0
    samples_seen: int = 0
    impl: str = "auto"

    def __post_init__(self) -> None:
        if self.row not in ROWS:
            raise ValueError(f"row must be one of {', '.join(ROWS)}; got {self.row!r}")
        if self.prompt not in PROMPTS:
            raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}; got {self.prompt!r}")
        if (self.row, self.prompt) == ("predictor", "context"):
            raise ValueError(
                "row='predictor' cannot be combined with prompt='context': the row that predicts an answer's first "
                "token stands before that answer; use row='token' or prompt='all'"
            )

    def __call__(self, seam: Seam, **batch: Tensor) -> SelectionOutput:
        """Runs the step inside the model's forward. batch: input_ids, labels, and what else the model takes."""
        # 1. batch: token ids, labels, padding or packing boundaries, perhaps recorded history
        labels, history_nll = batch.pop("labels"), batch.pop("history_nll", None)
        input_ids, padding, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
        response, sample = responses(labels, padding, positions)
        labels = torch.where(response, labels, IGNORE_INDEX)  # (B, S)
        next_labels = _left(labels, IGNORE_INDEX)  # row t predicts token t + 1

        # 2. history forward, only if the history is live and the method looks at it
        history_hidden = None
        if self.history is not None and "history_nll" in self.method.needs:
            with self.history():
                history_hidden = seam.backbone(batch)  # (B, S, D)

        # 3. current forward of the backbone; q and k of the chosen layers are captured on the way
        with seam.capture() as captured:
            hidden = seam.backbone(batch)  # (B, S, D)
            signals = self._signals_beside_loss(captured, input_ids, labels, response, sample, padding, positions)

        def statistics_to_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> SelectionOutput:
            head = {"bias": bias, "impl": self.impl, **seam.head_options}
            # 4. token statistics of both models, without logits
            if history_hidden is None:
                stats, past = token_stats(hidden, weight, next_labels, **head), history_nll
            else:
                stats, old = token_stats_pair((hidden, weight), (history_hidden, weight), next_labels, **head)
                past = _right(old.nll)
            # 5. scores
            known = TokenSignals(response, sample, nll=_right(stats.nll), history_nll=past, **signals)
            score = self.method.score(known)
            # 6. keep
            weights = self.method.select(score, known).float()
            # 7. loss on kept rows
            loss = selected_cross_entropy(
                hidden, weight, next_labels, _left(weights, 0), stats=stats, denominator=self.denominator, **head
            )
            return SelectionOutput(loss, weights, response, score, known.nll, history_nll=past, mass=known.mass)

        return seam.call_head(statistics_to_loss, hidden)

    def _signals_beside_loss(self, captured, input_ids, labels, response, sample, padding, positions) -> dict:
        """The signals that do not come from the head: attention mass, its uniform value, token keys, progress."""
        signals: dict = {"step": self.step, "samples_seen": self.samples_seen}
        segments, mask = segments_and_mask(padding, positions)
        if "key" in self.method.needs:
            signals["key"] = token_keys(input_ids, segments, mask)
        if "mass" in self.method.needs:
            prompt, turns = prompt_keys(labels, self.prompt, segments)
            masks = {"key_mask": mask, "segment_ids": segments, "turn_ids": turns}
            predictor = self.row == "predictor"
            queries = _left(response, False) if predictor else response
            mass, uniform = [], []
            for layer in captured():
                mass.append(
                    prompt_attention_mass(
                        layer.q, layer.k, prompt, query_mask=queries, impl=self.impl, **masks, **layer.options
                    )
                )
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
