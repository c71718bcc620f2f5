"""What is true in float64, and how far from it roundings alone can lead.

Elsewhere the budget is twice the error of the eager computation. Of a single row that error may be zero by luck, so
here the roundings are counted: those of a product by its terms, those of a softmax by its lse, and what follows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def assert_within(name: str, ours: Tensor, exact: Tensor, allowed: Tensor) -> None:
    """Entry by entry. What is not finite has to be the same, but for numbers that the type of `ours` cannot hold."""
    exact, largest = exact.detach(), torch.finfo(ours.dtype).max
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)} instead of {list(exact.shape)}"
    ours = ours.detach().double()
    overflow = ours.isinf() & (exact.abs() + allowed >= largest) & (ours.sign() == exact.sign())
    right = (ours == exact) | ((ours - exact).abs() <= allowed) | overflow
    if not right.all():
        at = tuple((~right).nonzero()[0].tolist())
        allowed = torch.as_tensor(allowed).expand(exact.shape)
        raise AssertionError(f"{name}{list(at)}: {ours[at]:.9g} instead of {exact[at]:.9g}, allowed {allowed[at]:.3g}")


class Distribution:
    """softmax(z) of logits z (N, V) in float64, computed by others in `dtype` with logits that may be off by `error`.

    Attributes:
        rounding: how far the lse, and so a log-probability beside its own logit, may be off. (N,)
    """

    def __init__(self, z: Tensor, error: Tensor, dtype: torch.dtype, blocks: int = 1):
        self.z, self.error, self.eps, self.blocks = z, error, torch.finfo(dtype).eps, blocks
        self.lse = z.logsumexp(-1)
        self.log_p = z - self.lse[:, None]
        self.p = self.log_p.exp()
        # blocks are joined by their lse, whose rounding is one of its own size
        self.size = self.lse.detach().abs().clamp(min=1 + math.log(z.shape[1]))
        self.rounding = error.amax(-1) + self.eps * (6 + blocks) * self.size

    @property
    def log_p_or_0(self) -> Tensor:
        """0 where nothing is possible, as in p log p."""
        return torch.where(self.z == -torch.inf, 0, self.log_p)

    def at(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(logit of the label, what it may be off): labels (N,) -> (N,) each."""
        target, error = (x.gather(-1, labels[:, None])[:, 0] for x in (self.z, self.error))
        return target, error + 2 * self.eps * target.detach().abs()

    def entropy(self) -> Tensor:
        return -(self.p * self.log_p_or_0).sum(-1)

    def statistics(self, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Every field of TokenStats but the rank: (value, allowed error). labels (N,)"""
        r, eps = self.rounding, self.eps
        (target, of_target), entropy = self.at(labels), self.entropy()
        variance = (self.p * (self.log_p_or_0 + entropy[:, None]) ** 2).sum(-1)
        deviation = variance.sqrt()
        # derivatives in the logits: of the entropy -p (log p + H), which add up to no more than the deviation
        return {
            "lse": (self.lse, r),
            "target_logit": (target, of_target),
            "nll": (self.lse - target, r + of_target),
            "top1": (self.z.amax(-1), r),
            "entropy": (entropy, r * (2 + deviation)),
            "logp_var": (variance, 2 * r * (1 + deviation + variance) + r**2),
            "renyi2": (-(self.p**2).sum(-1).log(), 4 * r),
            "logit_sum": (
                self.z.sum(-1),
                self.error.sum(-1) + eps * (8 + self.blocks) * self.z.abs().nan_to_num(posinf=0).sum(-1),
            ),
        }

    def ranks(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(fewest, most) logits above the label's: those as near as their rounding may stand on either side."""
        target, of_target = self.at(labels)
        near = self.error + of_target[:, None]
        other = torch.arange(self.z.shape[1]) != labels[:, None]
        above = (self.z - near > target[:, None]) & other
        return above.sum(-1), ((self.z + near >= target[:, None]) & other & (self.z > -torch.inf)).sum(-1)


class Logits(Distribution):
    """The distribution of a head over hidden states (N, D), and the gradients of whatever is made of it."""

    def __init__(self, hidden, weight, dtype, bias=None, softcap=None, logit_scale=1.0, temperature=1.0, blocks=1):
        self.x, self.w = hidden.detach().double().reshape(-1, hidden.shape[-1]), weight.detach().double()
        self.product = (self.x @ self.w.T).requires_grad_()  # (N, V)
        shift = torch.zeros(len(weight)).double() if bias is None else bias.detach().double()
        before = (self.product + shift) * logit_scale
        self.softcap, self.scale, self.temperature = softcap, abs(logit_scale / temperature), temperature
        z = (before if softcap is None else softcap * torch.tanh(before / softcap)) / temperature
        terms = self.x.abs() @ self.w.abs().T + shift.abs().nan_to_num(posinf=0)
        eps = torch.finfo(dtype).eps
        error = eps * ((self.x.shape[1] + 3) * terms * self.scale + 4 * z.detach().abs().nan_to_num(posinf=0))
        super().__init__(z, error, dtype, blocks)

    def gradients(self, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(gradient in the products (N, V), gradients in hidden, weight and bias) of a float64 scalar."""
        (d,) = torch.autograd.grad(loss, self.product)
        return d, {"hidden": d @ self.w, "weight": d.T @ self.x, "bias": d.sum(0)}

    def gradient_errors(self, d: Tensor, mass: Tensor, rounding: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """How far each of the gradients may be off.

        Args:
            d: gradient in the products. mass: what the roundings of the gradient in the logits are shares of, no less
                than that gradient: a probability less one is as wrong as the probability. (N, V)
            rounding: of those shares. (N,)
            like: hidden, weight and bias; their types are those of the gradients.
        """
        slope, of_slope = torch.ones_like(d), torch.zeros_like(d)
        if self.softcap is not None:
            z = self.z.detach().abs() * self.temperature / self.softcap
            slope = 1 - z**2
            of_slope = 2 * z * self.error * self.temperature / self.softcap + 3 * self.eps
        share = rounding[:, None] + 8 * self.eps
        e = self.scale * mass * (slope * share + of_slope)
        e = e + self.scale * 1e-30 * mass.amax(-1, keepdim=True)  # exponents end at -80
        narrow = torch.promote_types(like["hidden"].dtype, like["weight"].dtype)
        narrow = torch.finfo(narrow).eps if narrow == torch.bfloat16 else 0.0  # products of the gradient, too
        errors = {"hidden": e @ self.w.abs(), "weight": e.T @ self.x.abs(), "bias": e.sum(0)}
        sizes = {"hidden": d.abs() @ self.w.abs(), "weight": d.abs().T @ self.x.abs(), "bias": d.abs().sum(0)}
        for name, size in sizes.items():
            terms = d.shape[1] if name == "hidden" else d.shape[0]
            info = torch.finfo(like[name].dtype)
            of_product = self.eps * (8 + math.sqrt(terms)) + (0 if name == "bias" else 3 * narrow) + 2 * info.eps
            errors[name] = errors[name] + of_product * size + info.tiny * info.eps
        return errors
