"""What each work is given, and how its outputs are checked: float64, in blocks or on a sample of rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed.cases import Case
from tokensel.select.rules import top_share

SAMPLE_ROWS = 256  # rows are samples of this many response tokens
CHECKED = 32  # rows of a gradient or a mass that are compared


def _largest(*differences: Tensor) -> float:
    """Of absolute values; a NaN among them is the largest (Python's max would pass over it)."""
    return float(torch.cat([d.detach().double().abs().flatten() for d in differences]).max())


def _std_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((value.double() - exact).norm() / exact.norm())


class Inputs:
    """Seeded, so that a second process has the same."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device, self.dtype, self.rho = case, device, getattr(torch, case.dtype), case.rho
        self.generator = torch.Generator(device).manual_seed(0)
        self.mark: Callable[[str], None] = lambda part: None  # the clock's, while it runs
        self.square = {"cuda": 8192, "cpu": 2048}[device.type] if case.model != "tiny" else 64

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return self.draw(torch.empty(shape, dtype=self.dtype, device=self.device), std)

    def draw(self, out: Tensor, std: float = 1.0) -> Tensor:
        for part in out.split(2**14):  # not a float32 copy of a whole head
            part.copy_(torch.empty(part.shape, device=self.device).normal_(std=std, generator=self.generator))
        return out

    def new_labels(self, N: int, V: int) -> Tensor:
        return torch.randint(V, (N,), generator=self.generator, device=self.device)

    trained: tuple[Tensor, ...] = ()  # whose gradients a run leaves; their memory is not the way's

    def redraw(self) -> None:
        """New values in place, between rounds: no way profits from what it has seen. Outputs are checked before."""

    def clear(self) -> None:
        for tensor in self.trained:
            tensor.grad = None


def capped(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else softcap * torch.tanh(z / softcap)


class HeadInputs(Inputs):
    """Hidden states and head of two models; gradients are left in `hidden` and `weight`."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        N, V, D = case.tokens, case.shape.vocabulary, case.shape.hidden
        self.softcap = case.softcap
        self.hidden = self.normal(N, D)  # (N, D)
        self.weight = self.normal(V, D, std=2 / math.sqrt(D))  # (V, D): logits with a spread of 2
        self.history_hidden = (self.hidden + 0.05 * self.normal(N, D)).to(self.dtype)  # the model a little earlier
        self.history_weight = self.weight.clone()
        self.labels = self.new_labels(N, V)
        self.sample = torch.arange(N, device=device) // SAMPLE_ROWS
        self.given_keep = self.keep(*torch.rand(2, N, generator=self.generator, device=device))
        self.trained = (self.hidden.requires_grad_(), self.weight.requires_grad_())

    @torch.no_grad()
    def redraw(self) -> None:
        if self.case.work == "kept_backward":
            return  # its ways hold statistics of the first draw
        self.draw(self.hidden)
        self.history_hidden.copy_(self.hidden + 0.05 * self.normal(*self.hidden.shape))
        self.labels.random_(len(self.weight), generator=self.generator)

    def keep(self, nll: Tensor, history_nll: Tensor) -> Tensor:
        return top_share(history_nll - nll, torch.ones_like(self.labels, dtype=torch.bool), self.sample, self.rho)

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        """float64 log-sum-exp of every row and losses under both models: [lse, nll, history_nll]."""
        (lse, nll), (_, history_nll) = (
            self._exact_lse_and_nll(x, w)
            for x, w in ((self.hidden, self.weight), (self.history_hidden, self.history_weight))
        )
        return [lse, nll, history_nll]

    def _exact_lse_and_nll(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x, w = x.detach().double(), w.detach()
        blocks = [capped(x @ part.double().T, self.softcap).logsumexp(1) for part in w.split(8192)]
        lse = torch.stack(blocks).logsumexp(0)
        return lse, lse - capped((x * w[self.labels].double()).sum(1), self.softcap)

    def errors(self, out: dict) -> dict[str, float]:
        lse, *exact = self.exact
        if "nll" in out:
            return {"nll": _largest(*(a - b for a, b in zip(out["nll"], exact, strict=True)))}
        keep, exact_keep = out["keep"], self.given_keep
        if self.case.work == "selection_step":
            exact_keep = self.keep(*exact)
        errors = {"loss": float((out["loss"] - exact[0][keep].mean()).abs()), "kept": int((keep != exact_keep).sum())}
        kept, share = keep.nonzero()[:, 0], 1 / int(keep.sum())

        def d_logits(rows: Tensor, columns: Tensor) -> Tensor:
            """(softmax - onehot) / kept, of rows and columns of the logits."""
            z = capped(self.hidden.detach()[rows].double() @ self.weight.detach()[columns].double().T, self.softcap)
            slope = 1.0 if self.softcap is None else 1 - (z / self.softcap) ** 2
            return share * slope * ((z - lse[rows, None]).exp() - (self.labels[rows, None] == columns).double())

        rows = kept[:: max(1, len(kept) // CHECKED)][:CHECKED]
        V = len(self.weight)
        everything = torch.arange(V, device=self.device)
        d_hidden = sum(d_logits(rows, c) @ self.weight.detach()[c].double() for c in everything.split(8192))
        columns = torch.cat([self.labels[rows], everything[:: V // CHECKED]])
        d_weight = d_logits(kept, columns).T @ self.hidden.detach()[kept].double()
        errors["d_hidden"] = _std_error(self.hidden.grad[rows], d_hidden)
        errors["d_weight"] = _std_error(self.weight.grad[columns], d_weight)
        return errors


class LogitsInputs(Inputs):
    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        N, V = case.tokens, case.shape.vocabulary
        self.logits, self.history_logits = self.normal(N, V, std=2), self.normal(N, V, std=2)  # (N, V)
        self.labels = self.new_labels(N, V)

    def errors(self, out: dict) -> dict[str, float]:
        rows = slice(0, CHECKED)
        pairs = zip(out["nll"], (self.logits, self.history_logits), strict=True)
        exact = [(a[rows], F.cross_entropy(z[rows].double(), self.labels[rows], reduction="none")) for a, z in pairs]
        return {"nll": _largest(*(a - b for a, b in exact))}


def eager_mass(q: Tensor, k: Tensor, prompt: Tensor) -> Tensor:
    """q, k [B, Hq, S, d], prompt [B, S] -> [B, S]."""
    S, d = q.shape[2:]
    z = (q @ k.transpose(-1, -2)).float() * d**-0.5  # (B, Hq, S, S)
    causal = torch.ones(S, S, dtype=torch.bool, device=q.device).tril()
    p = z.masked_fill(~causal, -torch.inf).softmax(-1).mean(1)  # (B, S, S)
    return (p * prompt[:, None]).sum(-1) * ~prompt


class AttentionInputs(Inputs):
    """One layer's queries and keys; the first quarter of the sequence is prompt."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        m, S = case.shape, case.tokens
        self.q, self.k = self.normal(1, m.heads, S, m.head_size), self.normal(1, m.key_heads, S, m.head_size)
        self.prompt = (torch.arange(S, device=device) < S // 4)[None]  # (1, S)

    @torch.no_grad()
    def redraw(self) -> None:
        self.draw(self.q), self.draw(self.k)
        if "expanded_k" in vars(self):
            self.expanded_k.unflatten(1, (self.k.shape[1], -1)).copy_(self.k[:, :, None])
        if "lse" in vars(self):
            self.lse.copy_(self.flash()[1])

    @functools.cached_property
    def expanded_k(self) -> Tensor:
        return self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)

    def flash(self) -> tuple[Tensor, Tensor]:
        """PyTorch's own kernel: (attention's output, log-sum-exp)."""
        name = "_scaled_dot_product_flash_attention" + ("_for_cpu" if self.device.type == "cpu" else "")
        return getattr(torch.ops.aten, name)(self.q, self.k, self.k, 0.0, True)[:2]

    @functools.cached_property
    def lse(self) -> Tensor:
        return self.flash()[1].float()

    def errors(self, out: dict) -> dict[str, float]:
        S, d = self.q.shape[2:]
        step = max(1, (S - S // 4) // CHECKED)
        differences = [out["mass"] * self.prompt]  # zero; but NaN where a response's mass is not finite
        for i in range(S // 4, S, step):
            k = self.k[0, :, : i + 1].double()
            z = torch.einsum("hgd,hkd->hgk", self.q[0, :, i].double().unflatten(0, (len(k), -1)), k) * d**-0.5
            exact = z.softmax(-1)[..., : S // 4].sum(-1).mean()
            differences.append(out["mass"][0, i] - exact)
        return {"mass": _largest(*differences)}


class ModelInputs(Inputs):
    """A Llama of the model's sizes with random weights, and a batch whose first quarter is prompt."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        import transformers

        import tokensel

        m, (B, S) = case.shape, (case.batch, case.tokens)
        self.config = transformers.LlamaConfig(
            vocab_size=m.vocabulary,
            hidden_size=m.hidden,
            intermediate_size=m.mlp,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            num_key_value_heads=m.key_heads,
            head_dim=m.head_size,
            max_position_embeddings=S,
            attn_implementation="sdpa",
        )
        with device, torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = transformers.LlamaForCausalLM(self.config).to(self.dtype).train()
        tokensel.apply_to(self.model)  # a forward without selection= is the model's own
        self.input_ids = self.new_labels(B * S, m.vocabulary).view(B, S)
        self.labels = self.input_ids.clone()
        self.labels[:, : S // 4] = -100
        self.trained = tuple(self.model.parameters())
        self.gradients: list[tuple[Tensor, list[Tensor]]] = []  # (keep, exact gradients) of what was asked for
        # the history's losses: the model's own, moved a little
        self.response = self.labels[:, 1:] != -100
        own = torch.zeros(B, S, device=device)
        own[:, 1:] = torch.where(self.response, self._nll(), 0)
        noise = torch.empty_like(own).normal_(std=0.1, generator=self.generator)
        self.history_nll = torch.where(self.labels != -100, own + noise, 0)

    @torch.no_grad()
    def redraw(self) -> None:  # the history's losses stay: as many tokens are kept, only others
        self.input_ids.random_(self.config.vocab_size, generator=self.generator)
        self.labels.copy_(torch.where(self.labels == -100, -100, self.input_ids))

    def _sample_nll(self, model: torch.nn.Module, ids: Tensor) -> Tensor:
        """ids (S,) -> (S - 1,), the head's product in float32."""
        hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
        return F.cross_entropy(hidden.float() @ model.lm_head.weight.float().T, ids[1:], reduction="none")

    @torch.no_grad()
    def _nll(self) -> Tensor:
        return torch.stack([self._sample_nll(self.model, ids) for ids in self.input_ids])  # (B, S - 1)

    def mass(self, x: Tensor) -> Tensor:
        """The last layer's attention mass from its input x (B, S, D), by the [S, S] softmax -> (B, S)."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        layer = self.model.model.layers[-1]
        attention, x = layer.self_attn, layer.input_layernorm(x)
        q, k = (
            p(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj)
        )
        positions = torch.arange(x.shape[1], device=self.device)[None]
        q, k = apply_rotary_pos_emb(q, k, *self.model.model.rotary_emb(x, positions))
        return eager_mass(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), self.labels[: len(x)] == -100)

    @functools.cached_property
    def exact_keep(self) -> Tensor:
        """By the model's own losses and masses (B, S - 1)."""
        with torch.no_grad():
            inputs = [
                self.model.model(input_ids=ids[None], use_cache=False, output_hidden_states=True).hidden_states[-2]
                for ids in self.input_ids
            ]
            mass = torch.cat([self.mass(x) for x in inputs])
        return self.keep(self._nll(), mass[:, 1:])

    @functools.cached_property
    def float32_model(self) -> torch.nn.Module:
        if self.dtype == torch.float32:
            return self.model
        with self.device, torch.random.fork_rng():
            model = type(self.model)(self.config)
        model.load_state_dict(self.model.state_dict())
        return model

    def _checked(self, head: Tensor, layer: Tensor) -> list[Tensor]:
        """Rows of the gradients: of the head, those of some labels and some others."""
        columns = torch.cat([self.input_ids[:, -CHECKED:].flatten(), torch.arange(CHECKED, device=self.device)])
        return [head[columns], layer[:CHECKED]]

    def _exact_gradients(self, keep: Tensor) -> list[Tensor]:
        for measured_keep, gradients in self.gradients:
            if torch.equal(measured_keep, keep):
                return gradients
        model, total = self.float32_model, None
        for ids, kept in zip(self.input_ids, keep, strict=True):  # one at a time: float32 takes twice the memory
            loss = self._sample_nll(model, ids)[kept].sum() / keep.sum()
            own = torch.autograd.grad(loss, [model.lm_head.weight, model.model.layers[0].mlp.down_proj.weight])
            own = self._checked(*own)
            total = own if total is None else [a + b for a, b in zip(total, own, strict=True)]
        self.gradients.append((keep, total))
        return total

    def keep(self, nll: Tensor, mass: Tensor) -> Tensor:
        """ssToken's rule on [B, S - 1] losses and masses of the tokens after the first."""
        rel = torch.where(self.response, self.history_nll[:, 1:] - nll, torch.nan)
        low = rel.nan_to_num(torch.inf).amin(1, keepdim=True)
        high = rel.nan_to_num(-torch.inf).amax(1, keepdim=True)
        score = torch.where(self.response, 0.5 * (rel - low) / (high - low) + 0.5 * mass, -torch.inf)
        wanted = math.ceil(self.rho * int(self.response[0].sum()))  # every sample has as many responses
        return torch.zeros_like(self.response).scatter_(1, score.topk(wanted, dim=1).indices, True)

    def errors(self, out: dict) -> dict[str, float]:
        keep = out.get("keep", self.response)  # (B, S - 1)
        errors = {"loss": float((out["loss"] - self._nll()[keep].mean()).abs())}
        if "keep" in out:
            wanted = self.exact_keep.sum(1)  # of each sample
            errors["kept_count"] = int((keep.sum(1) - wanted).abs().sum())
            if not out.get("live"):  # whose history is the model itself: what is kept hangs on rounding
                errors["kept_share"] = float((keep & ~self.exact_keep).sum() / wanted.sum())
        weights = self.model.lm_head.weight, self.model.model.layers[0].mlp.down_proj.weight
        pairs = zip(self._checked(*(w.grad for w in weights)), self._exact_gradients(keep), strict=True)
        d_head, d_layer = (_std_error(a, b.double()) for a, b in pairs)
        return errors | {"d_head": d_head, "d_layer": d_layer}


INPUTS: dict[str, type[Inputs]] = {
    **dict.fromkeys(("pair_stats", "kept_backward", "selection_step"), HeadInputs),
    "stats_from_logits": LogitsInputs,
    "attention_mass": AttentionInputs,
    "training_step": ModelInputs,
}
