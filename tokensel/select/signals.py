"""What is known of each token before it is kept or dropped: the signals that scorers read."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tokensel.ops.checks import check_same_device, check_shape, check_tensor

# Losses that are recorded before training, and how: what a method needs and does not find is named with this.
RECORDED = {
    "history_nll": "a history: history 'recorded' with history_store, or a live one (adapter_off, ema, ...)",
    "base_nll": "the base model's losses: `tokensel score` with the base model, then recorded: {base: FILE}",
    "reference_nll": "a reference model's losses: history 'reference' with history_model_name_or_path, or `tokensel "
    "score` with that model, then recorded: {reference: FILE}",
    "shuffled_nll": "losses of a model trained on shuffled prompt-response pairs: `tokensel score` with that model, "
    "then recorded: {shuffled: FILE}",
    "alone_nll": "losses of the response without its prompt: `tokensel score --without_prompt true`, then recorded: "
    "{alone: FILE}",
    "contrast_nll": "losses under the contrast of two models: `tokensel score --contrast_model_name_or_path NEGATIVE`, "
    "then recorded: {contrast: FILE}",
}
# by the step itself, of the current model
MEASURED = ("nll", "entropy", "logp_var", "renyi2", "rank", "mass", "uniform_mass")


@dataclass(frozen=True)
class TokenSignals:
    """What is known of each token before it is kept or dropped. All tensors have one shape, [N] or [B, S].

    Attributes:
        response: bool, the tokens that compete.
        sample: int64 in [0, N), which sample a token belongs to (`tokensel.documents.document_index`).
        nll: float, current negative log-likelihood, nats.
        entropy: float, entropy of the current prediction, nats. logp_var: variance of log p under it, nats².
        renyi2: float, its Rényi-2 entropy, nats. rank: float, how many tokens are likelier than the label.
        mass: float, attention mass on the prompt.
        uniform_mass: float, what a uniform attention would put there (for `debias`).
        history_nll, base_nll, reference_nll, shuffled_nll, alone_nll, contrast_nll: float, negative log-likelihood
            under another model or input, nats; `RECORDED` says which and how it is made.
        weight: float, the weight that the data gives a token (`token_weights`), also negative; None = 1 everywhere.
        key: int64 identity of the token (`tokensel.documents.token_keys`), what seeded random draws from.
        vocab_size: V, how many tokens the model can predict.
        step: optimizer steps done, so that random selection draws anew each step.
        samples_seen: samples trained on before this optimizer step (for `rel_warmup`).
    """

    response: Tensor
    sample: Tensor
    nll: Tensor | None = None
    entropy: Tensor | None = None
    logp_var: Tensor | None = None
    renyi2: Tensor | None = None
    rank: Tensor | None = None
    mass: Tensor | None = None
    uniform_mass: Tensor | None = None
    history_nll: Tensor | None = None
    base_nll: Tensor | None = None
    reference_nll: Tensor | None = None
    shuffled_nll: Tensor | None = None
    alone_nll: Tensor | None = None
    contrast_nll: Tensor | None = None
    weight: Tensor | None = None
    key: Tensor | None = None
    vocab_size: int | None = None
    step: int = 0
    samples_seen: int = 0

    def __post_init__(self) -> None:
        if check_tensor("response", self.response).dtype != torch.bool:
            raise TypeError(f"response must be torch.bool; got {self.response.dtype}")
        size = self.vocab_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 2):
            raise ValueError(f"vocab_size must be a whole number of tokens, 2 or more; got {size!r}")
        names = [f.name for f in fields(self) if f.name not in ("response", "vocab_size", "step", "samples_seen")]
        tensors = {name: getattr(self, name) for name in names}
        for name, value in tensors.items():
            if value is not None:
                check_shape(name, check_tensor(name, value), tuple(self.response.shape), "the shape of response")
        check_same_device(response=self.response, **tensors)

    def __getitem__(self, name: str) -> Tensor:
        """A signal that a method needs, and so has been given.

        Raises:
            ValueError: it is None.
        """
        value = getattr(self, name)
        if value is None:
            how = f"; it needs {RECORDED[name]}" if name in RECORDED else ""
            raise ValueError(f"signals.{name} is None{how}")
        tensor: Tensor = value
        return tensor
