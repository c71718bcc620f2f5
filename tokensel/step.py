"""One selection step: the data path from a batch to a loss, steps 1 to 7 in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from tokensel.capture import Captured
from tokensel.documents import IGNORE_INDEX, PROMPTS, BatchLayout, to_labels, to_rows
from tokensel.history import LastSeen, LiveHistory
from tokensel.model import PatchedModel
from tokensel.ops.loss import selected_cross_entropy
from tokensel.ops.prompt_mass import prompt_attention_mass, uniform_prompt_mass
from tokensel.ops.stats import StatsOptions, token_stats, token_stats_pair
from tokensel.ops.token_stats import MOMENTS
from tokensel.ops.vocab_parallel import replicated_as
from tokensel.parallel import gather_over_ranks, mean_over_ranks, sum_over_ranks
from tokensel.select.methods import SelectionMethod
from tokensel.select.signals import MEASURED, RECORDED, TokenSignals

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
        aux_loss: scalar or None, what balances a mixture of experts, before its weight.
    """

    loss: Tensor | None = None
    # these are always there; ModelOutput wants a default of every field but the first
    weights: Tensor = None  # type: ignore[assignment]
    response: Tensor = None  # type: ignore[assignment]
    sample: Tensor = None  # type: ignore[assignment]
    score: Tensor = None  # type: ignore[assignment]
    nll: Tensor = None  # type: ignore[assignment]
    history_nll: Tensor | None = None
    mass: Tensor | None = None
    entropy: Tensor | None = None
    correct: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass
class Progress:
    """How far a run is: what draws at random, warms up or averages looks at it.

    Attributes:
        steps: optimizer steps done.
        samples: samples trained on in them.
        rows: rows of this process's batches since the last step, [B] of each added up.
    """

    steps: int = 0
    samples: int = 0
    rows: int = 0


@dataclass
class Selection:
    """How to select in a step; pass it to a patched model, and let it advance with the optimizer::

        selection = Selection(method, history=history)
        model(**batch, selection=selection).loss.backward()
        optimizer.step()
        selection.step()

    The copies that `dataclasses.replace` makes share what advances: method, history and progress. What runs under
    `torch.no_grad()` is an evaluation, and moves none of it.

    Attributes:
        method: from `tokensel.methods.get`.
        history: a live history (`tokensel.history`), or None where `history_nll` comes with the batch or is not needed.
        denominator: of the loss; None = what the method counts in this micro-batch, the number kept for most (the
            published behaviour), or one global number for the optimizer step.
        row: whose query row measures the prompt mass of a token: "token", its own (the paper), or "predictor", the
            position before, which predicts it.
        prompt: which keys are prompt: "all", "first" or "context" (`tokensel.documents.prompt_keys`).
        sink: the first tokens of each document that do not count as prompt (attention sinks stay in the denominator).
        impl: of statistics, mass and loss.
        score_only: leave out the loss (None), to rank several micro-batches together: what is chosen then comes
            with each batch as `chosen_weights`.
        token_metrics: return each token's entropy, and whether it was the likeliest, for logging.
        router_share: factor of the router's loss: 1 / micro-batches of an optimizer step, if `denominator` is its.
        progress: optimizer steps and samples done, for seeded draws, warm-ups and averages.
    """

    method: SelectionMethod
    history: LiveHistory | None = None
    denominator: Tensor | float | None = None
    row: str = "token"
    prompt: str = "all"
    sink: int = 0
    impl: str = "auto"
    score_only: bool = False
    token_metrics: bool = False
    router_share: float = 1.0
    progress: Progress = field(default_factory=Progress, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.method, SelectionMethod):
            raise TypeError(f"method must be what tokensel.methods.get(NAME) gives; got {self.method!r}")
        if self.history is not None and not isinstance(self.history, LiveHistory):
            raise TypeError(
                "history must be None or a live history: tokensel.auto_history(model), AdapterOff(model), "
                f"ModelCopy(model), ...; got {self.history!r}"
            )
        if self.method.scope == "dataset":
            raise ValueError(
                f"method {self.method.name!r} ranks the whole dataset: run `tokensel select --method "
                f"{self.method.name}` and train with --method weighted on its output, or set scope='batch'"
            )
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

    def step(self, samples: int | None = None) -> None:
        """Advances after `optimizer.step()`: the progress, the history, and a rule with a state.

        With several processes each calls it: what a history or a rule has seen is joined over the default group.

        Args:
            samples: trained on in this optimizer step, in all processes. None = the rows of the batches since the last
                step, added up over processes; packed rows count as one each. Give it where processes share rows, as
                under tensor parallelism.
        Raises:
            ValueError: no forward has used this selection since the last step.
        """
        if not self.progress.rows:
            raise ValueError(
                "no forward has used this selection since the last step(), so nothing was selected. Call it once after "
                "each optimizer.step(); is the model patched (tokensel.apply_to(model)) and called with selection=?"
            )
        self.progress.steps += 1
        self.progress.samples += sum(gather_over_ranks([self.progress.rows])) if samples is None else samples
        self.progress.rows = 0
        if self.history is not None:
            self.history.after_step(gather_over_ranks)
        if hasattr(self.method.rule, "after_step"):
            self.method.rule.after_step(sum_over_ranks)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: names and numbers, and a flat dict of tensors that are not copied.

        Save it beside the optimizer's, after `step()`; `torch.load(..., weights_only=True)` reads it.
        """
        tensors = {
            f"{part}.{name}": tensor for part, owner in self._owners() for name, tensor in owner.state_dict().items()
        }
        return {
            "method": self.method.name,
            "history": "none" if self.history is None else self.history.name,
            "steps": self.progress.steps,
            "samples": self.progress.samples,
            "tensors": tensors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; nothing is changed where it is refused.

        Raises:
            ValueError: it belongs to another method, history or model.
        """
        own = self.state_dict()
        if missing := sorted(own.keys() - state.keys()):
            raise ValueError(f"state lacks {missing[0]!r}; give what Selection.state_dict() returned")
        for name in ("steps", "samples"):
            if type(state[name]) is not int or state[name] < 0:
                raise ValueError(f"state: {name} must be a whole number, at least 0; got {state[name]!r}")
        if not isinstance(state["tensors"], dict) or not all(isinstance(t, Tensor) for t in state["tensors"].values()):
            raise ValueError("state: tensors must be a dict of tensors; give what Selection.state_dict() returned")
        for name in ("method", "history"):
            if state[name] != own[name]:
                raise ValueError(
                    f"state belongs to {name} {state[name]!r}, but this selection has {own[name]!r}; resume with "
                    f"{state[name]!r}, or start anew"
                )
        names = [{n for n in of["tensors"] if n.startswith("rule.")} for of in (own, state)]
        if names[0] != names[1]:
            raise ValueError(
                f"state belongs to another rule of method {own['method']!r}: it has {sorted(names[1])}, this selection "
                f"{sorted(names[0])}; resume with the parameters that it was made with"
            )
        for part, owner in self._owners():
            tensors = {n.removeprefix(f"{part}."): t for n, t in state["tensors"].items() if n.startswith(f"{part}.")}
            owner.load_state_dict(tensors)
        self.progress.steps, self.progress.samples, self.progress.rows = state["steps"], state["samples"], 0

    def _owners(self) -> list[tuple[str, Any]]:
        """(name, object) of those whose tensors advance."""
        owners = [("history", self.history), ("rule", self.method.rule)]
        return [(name, owner) for name, owner in owners if hasattr(owner, "state_dict")]

    def __call__(
        self, patched: PatchedModel, layout: BatchLayout | None = None, **batch: Tensor | None
    ) -> SelectionOutput:
        """Runs the step inside the model's forward.

        Args:
            layout: of the batch, where somebody has made it already.
            batch: input_ids, labels, and what else the model takes; perhaps recorded losses
                (`tokensel.select.signals.RECORDED`) and `token_weights`, all [B, S] and label-aligned.
        """
        # 1. batch: token ids, labels, padding or packing boundaries, perhaps recorded losses and weights
        layout = BatchLayout.from_batch(batch) if layout is None else layout
        _, given, chosen = (batch.pop(name, None) for name in ("labels", "token_weights", "chosen_weights"))
        losses: dict[str, Any] = {name: batch.pop(name) for name in RECORDED if name in batch}
        response = layout.response  # (B, S)
        trained_labels = layout.response_labels
        if given is not None:  # prompt tokens that the data gives a weight are trained, too, but do not compete
            given = torch.where(layout.predictable, given, 0)
            trained_labels = torch.where(~response & (given != 0), layout.input_ids, trained_labels)
        next_labels = to_rows(trained_labels, IGNORE_INDEX)
        # not by the model's mode: it may be trained without dropout, as it is after from_pretrained
        training = torch.is_grad_enabled() and not self.score_only
        if training:
            self.progress.rows += len(layout.labels)

        # 2. history forward, only if the history is live and the method looks at it
        history_hidden = None
        if self.history is not None and self.history.signal in self.method.needs:
            self.history.check(patched)
            if self.history.shares_head:
                history_hidden = self.history.hidden(patched, batch)  # (B, S, D)
            else:
                losses[self.history.signal] = self.history.token_nll(layout, batch, self.impl)  # (B, S)

        # 3. current forward of the backbone; q and k of the chosen layers are captured on the way
        with patched.attention.armed() as captured:
            hidden, aux_loss = patched.backbone_and_aux_loss(batch)  # (B, S, D)
            signals = self._signals_beside_losses(layout, captured)

        def score_keep_and_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> SelectionOutput:
            head = {"bias": bias, "impl": self.impl, **patched.head_options}
            # 4. token statistics of both models, without logits
            needs = self.method.needs
            asked: StatsOptions = {"renyi2": "renyi2" in needs, "rank": "rank" in needs}
            asked["entropy"] = self.token_metrics or not needs.isdisjoint(MOMENTS)
            if self.history is None or history_hidden is None:
                stats = token_stats(hidden, weight, next_labels, **asked, **head)
            else:
                models = (hidden, weight), (replicated_as(hidden, history_hidden), weight)
                stats, history_stats = token_stats_pair(*models, next_labels, **asked, **head)
                losses[self.history.signal] = to_labels(history_stats.nll)
            if isinstance(self.history, LastSeen) and self.history.signal in losses:
                seen, nll = losses[self.history.signal], to_labels(stats.nll)
                losses[self.history.signal] = self.history.visit(layout, seen, nll, remember=training)
            # 5. scores
            fields = {"nll": stats.nll} | stats.fields()
            measured: dict[str, Any] = {name: to_labels(v) for name, v in fields.items() if name in MEASURED}
            signals["vocab_size"] = weight.shape[0]
            tokens = TokenSignals(response, layout.sample, weight=given, **measured, **losses, **signals)
            score = self.method.score(tokens)
            # 6. keep
            weights = self.method.select(score, tokens) if chosen is None else chosen
            if given is not None:
                weights = torch.where(response, weights, given)
            # 7. loss on kept rows
            loss = None
            if not self.score_only:
                denominator = self._denominator(layout, given, weights)
                keep = to_rows(weights, 0)
                loss = selected_cross_entropy(
                    hidden, weight, next_labels, keep, stats=stats, denominator=denominator, **head
                )
                if aux_loss is not None:
                    loss = loss + self.router_share * patched.router_weight * aux_loss
            shown: dict[str, Any] = {"nll": tokens.nll, "history_nll": tokens.history_nll, "mass": tokens.mass}
            shown["aux_loss"] = None if aux_loss is None else aux_loss.detach()
            if self.token_metrics and stats.correct is not None:
                shown |= {"entropy": tokens.entropy, "correct": to_labels(stats.correct)}
            return SelectionOutput(loss, weights, response, layout.sample, score, **shown)

        return patched.with_whole_head(score_keep_and_loss, hidden)

    def _denominator(self, layout: BatchLayout, given: Tensor | None, weights: Tensor) -> Tensor | float:
        if self.denominator is not None:
            return self.denominator
        count = self.method.count(layout.response, layout.sample, given)
        return weights.abs().sum() if count is None else count

    def _signals_beside_losses(self, layout: BatchLayout, captured: Callable[[], list[Captured]]) -> dict[str, Any]:
        """The signals that do not come from the head: attention mass, its uniform value, token keys, progress."""
        signals: dict[str, Any] = {"step": self.progress.steps, "samples_seen": self.progress.samples}
        if "key" in self.method.needs:
            signals["key"] = layout.token_keys()
        if "mass" in self.method.needs:
            prompt, turns = layout.prompt_keys(self.prompt)
            if self.sink:
                prompt = prompt & (layout.positions() >= self.sink)
            masks = {"key_mask": layout.key_mask, "segment_ids": layout.segment_ids, "turn_ids": turns}
            predictor = self.row == "predictor"
            queries = to_rows(layout.response, False) if predictor else layout.response
            mass, uniform = [], []
            for layer in captured():
                options = {**masks, **layer.options, "impl": self.impl}
                heads = prompt_attention_mass(layer.q, layer.k, prompt, query_mask=queries, **options)
                mass.append(mean_over_ranks(heads, layer.group))
                uniform.append(uniform_prompt_mass(prompt, window=layer.options["window"], **masks))
            for name, values in (("mass", mass), ("uniform_mass", uniform)):
                mean = torch.stack(values).mean(0)  # over layers, (B, S)
                signals[name] = to_labels(mean) if predictor else mean
        return signals
