"""Where the history's statistics come from (step 2): recorded in a store, or a live pass of an earlier model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokensel.adapters import adapter_layers, quick_look, refuse_rewritten_base
from tokensel.documents import BatchLayout
from tokensel.model import PatchedModel, apply_to, eval_mode, refuse_patched, remove, unwrap
from tokensel.ops.checks import check_number, check_token_range


class LiveHistory:
    """A history that runs in the step: another state of the model, another model, or what the run itself has seen.

    Attributes:
        name: one of `tokensel.arguments.HISTORIES`, which a saved state is known by.
        signal: name of the TokenSignals field that it answers for.
        shares_head: whether its head is the current model's, so that one launch serves both; it then has
            `hidden(patched, batch) -> [B, S, D]`, and otherwise `token_nll(layout, batch, impl) -> [B, S]`, nats.
    """

    name: str
    signal: str = "history_nll"
    shares_head: bool = False

    def check(self, patched: PatchedModel) -> None:
        """Called before each pass, with the model that asks.

        Raises:
            ValueError: it is not the history of that model, or no longer.
        """

    def hidden(self, patched: PatchedModel, batch: dict[str, Any]) -> Tensor:
        """Final hidden states under the history, [B, S, D], of one that shares the head."""
        raise NotImplementedError

    def token_nll(self, layout: BatchLayout, batch: dict[str, Any], impl: str = "auto") -> Tensor:
        """Negative log-likelihood of the response tokens, nats, [B, S], of one that does not."""
        raise NotImplementedError

    def after_step(self, gather: Callable[[list[Any]], list[Any]] = list) -> None:
        """To be called after each optimizer step. gather: joins lists of host objects over ranks, in rank order."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs, as tensors; empty where nothing changes during the run."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            ValueError: it is of another model or kind of history.
        """


class AdapterOff(LiveHistory):
    """The history is the base model: a pass with every adapter disabled and dropout off.

    Equal to PEFT's `disable_adapter()`, by the layers' own flag, without toggling `requires_grad` in each step.
    """

    name = "adapter_off"
    shares_head = True

    def __init__(self, model: nn.Module) -> None:
        """Args: model: a PEFT model whose trained parameters are all in its adapters.

        Raises:
            ValueError: no adapter, or base weights that disabling the adapters would not bring back: they are trained,
                adapters are merged into them, or the adapters' initialisation rewrote them (PiSSA and the like).
        """
        self.model = model
        self._seen: Any = None  # the last look at the model that found nothing wrong
        self._switches()

    def _switches(self) -> list[nn.Module]:
        """The adapter layers of now: some may have been added, merged or joined by trained base weights since."""
        layers, look = quick_look(self.model)
        if look != self._seen:
            adapter_layers(self.model, "adapter_off", "history 'recorded' or 'frozen'")
            refuse_rewritten_base(self.model, layers)
            self._seen = look
        return layers

    def check(self, patched: PatchedModel) -> None:
        _refuse_other(patched, self.model)

    def hidden(self, patched: PatchedModel, batch: dict[str, Any]) -> Tensor:
        """Final hidden states under the history, [B, S, D]."""
        with self():
            return patched.backbone(batch)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """The model is its history inside: adapters disabled, eval mode, no gradient."""
        switches: list[Any] = self._switches()
        before = [switch._disable_adapters for switch in switches]
        for switch in switches:
            switch._disable_adapters = True
        try:
            with eval_mode(self.model), torch.no_grad():
                yield
        finally:
            for switch, off in zip(switches, before, strict=True):
                switch._disable_adapters = off


def _refuse_other(patched: PatchedModel, source: nn.Module) -> None:
    """A state of a model is the history of that model alone: a copy of the model has other weights."""
    if patched.model is not unwrap(source):
        raise ValueError(
            f"the history is of another model than this {type(patched.model).__name__}, such as the one that it is a "
            "copy of; make one of this model"
        )


class OtherModel(LiveHistory):
    """Another model: a reference of any hidden size whose token ids mean the same (Rho-1, token cleaning).

    Its head may have more or fewer rows than the current model's, as where one of the two vocabularies is padded: each
    model's softmax is over its own head.
    """

    name = "reference"

    def __init__(
        self,
        model: nn.Module,
        signal: str = "reference_nll",
        device: torch.device | str | None = None,
        offload: bool = False,
    ) -> None:
        """Args:
            model: a transformers causal language model, not patched; it is kept, moved and put into eval mode.
            signal: the TokenSignals field that it answers for.
            device: where it runs; None = where it is.
            offload: its weights stay on the CPU and are brought to `device` layer by layer in each pass.
        Raises:
            ValueError: patched already, as the model that is trained; what `tokensel.apply_to` refuses.
        """
        self.signal, self.offload = signal, offload
        self.model = refuse_patched(model).eval().requires_grad_(False)
        head = self.model.get_output_embeddings().weight
        self.device = torch.device(device) if device is not None else head.device
        self.rows = min(head.shape[0], int(self.model.get_input_embeddings().num_embeddings))  # type: ignore[arg-type]
        if offload or device is not None:
            self.model.to("cpu" if offload else self.device)  # type: ignore[arg-type]
        self.patched = apply_to(self.model, layer=None)  # nobody looks at its attention
        if offload:
            from accelerate import cpu_offload

            for module in self.model.modules():  # what is not a parameter is small and stays with the computation
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(self.device))
            cpu_offload(self.model, execution_device=self.device, state_dict=self.model.state_dict())

    def token_nll(self, layout: BatchLayout, batch: dict[str, Any], impl: str = "auto") -> Tensor:
        """Negative log-likelihood of the response tokens, nats, 0 elsewhere -> [B, S].

        Raises:
            ValueError: a token that the model has no row for; on an accelerator an asynchronous assertion, instead.
        """
        ids, labels = layout.input_ids, layout.response_labels
        if layout.key_mask is not None:
            ids = ids.masked_fill(~layout.key_mask, 0)  # a token that was added for padding alone is not used
        check_token_range(ids, self.rows, f"the history's {type(self.model).__name__}")
        there = {
            n: value.to(self.device) for n, value in (batch | {"input_ids": ids}).items() if isinstance(value, Tensor)
        }
        return self.patched.token_nll(batch | there, labels.to(self.device), impl=impl).to(labels.device)


class ModelCopy(OtherModel):
    """An earlier state of the model itself: frozen as it was, or an exponential moving average over the run.

    After each optimizer step, every trained weight w of the copy becomes decay · w + (1 - decay) · w_now; decay 1 is
    frozen. It is the average of weights: of LoRA's factors A and B, whose product is not the average of the products.
    Averages are float32 at least, since a bfloat16 weight would not feel a step of 1 - decay. Only trained weights
    are copied; all others are the model's own, unless the copy lives elsewhere. The copy is no part of the model, so
    no optimizer sees it and it is never saved with the model or its adapters.
    """

    def __init__(
        self, model: nn.Module, decay: float = 1.0, device: torch.device | str | None = None, offload: bool = False
    ) -> None:
        """Args:
            model: the model that is trained, perhaps with PEFT adapters, before anything shards it.
            decay: in [0, 1]; 1 = frozen.
            device, offload: as in `OtherModel`.
        Raises:
            ValueError: decay outside [0, 1], nothing to train, sharded weights.
        """
        check_number("history_decay", decay)
        if not 0 <= decay <= 1:
            raise ValueError(
                f"history_decay must be in [0, 1], the share of itself that the history keeps; got {decay}"
            )
        self.decay, self.source, self._seen = decay, unwrap(model), None
        self.name = "frozen" if decay == 1 else "ema"
        home = torch.device("cpu") if offload else None if device is None else torch.device(device)
        self.values: dict[str, Tensor] = {}  # the history's trained weights
        self.copied: dict[str, nn.Parameter] = {}  # the same as the copy computes with them
        own: dict[int, Tensor] = {}  # parameters and buffers of the copy, by the id of the model's
        for name, tensor in (*self.source.named_parameters(), *self.source.named_buffers()):
            if tensor.requires_grad:
                dtype = tensor.dtype if decay == 1 else torch.promote_types(tensor.dtype, torch.float32)
                self.values[name] = _whole(name, tensor).to(home or tensor.device, dtype, copy=True)
                # where the types agree this is one storage, so that moving the average moves the copy
                self.copied[name] = nn.Parameter(self.values[name].to(tensor.dtype), requires_grad=False)
                own[id(tensor)] = self.copied[name]
            elif home is None:
                own[id(tensor)] = tensor
        if not self.values:
            raise ValueError("the model has no trained parameter (requires_grad), so it has no history of its own")
        head = self.source.get_output_embeddings()
        twin = copy.deepcopy(self.source, own)
        if hasattr(twin, "_tokensel_patched"):
            remove(twin)
        super().__init__(twin, "history_nll", device, offload)
        self.shares_head = home is None and not any(p.requires_grad for p in head.parameters())

    def check(self, patched: PatchedModel) -> None:
        _refuse_other(patched, self.source)
        if (look := quick_look(self.source)[1]) == self._seen:
            return
        own = {id(p) for p in self.model.parameters()}
        for name, parameter in self.source.named_parameters():
            # a frozen copy goes without the weights that it shares with nobody
            if parameter.requires_grad and name not in self.values and (self.decay < 1 or id(parameter) in own):
                raise ValueError(
                    f"history={self.name!r} has no copy of {name}, which was frozen or not there when it was made and "
                    "is trained now; make the history after all parameters that are trained have requires_grad"
                )
        self._seen = look

    @torch.no_grad()
    def hidden(self, patched: PatchedModel, batch: dict[str, Any]) -> Tensor:
        """Final hidden states under the history, [B, S, D]."""
        return self.patched.backbone(batch)

    def after_step(self, gather: Callable[[list[Any]], list[Any]] = list) -> None:
        """Moves the average towards the model's weights of now."""
        if self.decay == 1:
            return
        now = dict(self.source.named_parameters())
        for name, value in self.values.items():
            value.lerp_(_whole(name, now[name]).to(value), 1 - self.decay)
        self._to_copy()

    def _to_copy(self) -> None:
        for name, value in self.values.items():
            if self.copied[name].dtype != value.dtype:
                self.copied[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        return self.values

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        other = sorted(state.keys() ^ self.values.keys())
        other += [
            n
            for n, value in self.values.items()
            if n in state and (state[n].shape != value.shape or not state[n].is_floating_point())
        ]
        if other:
            raise ValueError(
                f"the saved history is of another model: {other[0]} and {len(other) - 1} more weights are missing, new "
                "or of another shape or type; resume with the model and the adapters that the run began with"
            )
        for name, value in self.values.items():
            value.copy_(state[name])
        self._to_copy()


def _whole(name: str, parameter: Tensor) -> Tensor:
    if hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id"):
        raise ValueError(
            f"{name} is sharded (FSDP2 or ZeRO-3), and a copy or an average of sharded weights is not supported; use "
            "history 'recorded', 'last_seen' or 'adapter_off'"
        )
    return parameter.detach()


class AdapterEMA(ModelCopy):
    """An average of the adapters' weights over the run; the base model is shared, so that it costs the adapters again.

    With decay 1 it is the adapters as they began, which is `AdapterOff` where LoRA's B began at 0.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Args: as in `ModelCopy`.

        Raises:
            ValueError: no adapter, or trained parameters outside of adapters.
        """
        adapter_layers(model, "adapter_ema", "history 'ema'")
        super().__init__(model, decay)
        self.name = "adapter_ema"


class LastSeen(LiveHistory):
    """The NLL that each document had when it was last trained on, in host memory: a history for several epochs.

    It is the current model's loss in that step, so with dropout where the model has any. A document is found by the
    hash of its token ids, as in a store. On the first visit nothing is known, and the history is the current loss
    itself: REL 0 on every token, as during `rel_warmup`, so that `sstoken` scores by attention alone and a method that
    knows REL only keeps each sample's first tokens.

    `Selection.step()` makes known what was seen in an optimizer step.
    """

    name = "last_seen"

    def __init__(self) -> None:
        self._seen: dict[int, Tensor] = {}  # by document key; a loss for each token, NaN where it was no response
        self._visits: list[tuple[BatchLayout, Tensor]] = []  # (layout, losses [B, S]) since the last optimizer step

    def token_nll(self, layout: BatchLayout, batch: dict[str, Any], impl: str = "auto") -> Tensor:
        """What was seen of each token, [B, S] float; NaN where nothing was. Waits for the device, for the token ids."""
        documents = layout.host_documents
        unseen, parts = torch.tensor(torch.nan), []
        for key, length in zip(documents.keys.tolist(), documents.lengths.tolist(), strict=True):
            part = self._seen.get(key, unseen.expand(length))
            if len(part) != length:  # taken, it would shift the losses of all documents behind it
                raise ValueError(
                    f"history 'last_seen' has {len(part)} losses of a document of {length} tokens: its saved state is "
                    "damaged; resume from another checkpoint"
                )
            parts.append(part)
        values = torch.cat([unseen.expand(0), *parts])
        nll = torch.full(documents.valid.shape, torch.nan, dtype=values.dtype).masked_scatter_(documents.valid, values)
        return nll.to(layout.labels.device, non_blocking=True)

    def visit(self, layout: BatchLayout, seen: Tensor, nll: Tensor, remember: bool) -> Tensor:
        """Notes the current losses [B, S] and returns `seen` with them where nothing was seen."""
        if remember:
            self._visits.append((layout, torch.where(layout.response, nll.detach(), torch.nan)))
        return torch.where(seen.isnan(), nll, seen)

    def after_step(self, gather: Callable[[list[Any]], list[Any]] = list) -> None:
        """What was seen in this step, on every rank: in the next epoch a document may come to another one."""
        seen: list[tuple[int, Tensor]] = []
        for layout, nll in self._visits:
            documents = layout.host_documents
            parts = nll.cpu()[documents.valid].split(documents.lengths.tolist())
            seen += zip(documents.keys.tolist(), (part.clone() for part in parts), strict=True)
        self._visits = []
        self._seen.update(gather(seen))

    def state_dict(self) -> dict[str, Tensor]:
        losses = list(self._seen.values())
        return {
            "key": torch.tensor(list(self._seen), dtype=torch.int64),
            "length": torch.tensor([len(nll) for nll in losses], dtype=torch.int64),
            "nll": torch.cat(losses) if losses else torch.empty(0),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        try:
            key, length, nll = (state[name] for name in ("key", "length", "nll"))
        except KeyError as error:
            raise ValueError(f"the saved history lacks {error}; resume from another checkpoint") from error
        whole = key.dtype == length.dtype == torch.int64 and nll.is_floating_point()
        whole = whole and key.dim() == nll.dim() == 1 and key.shape == length.shape
        # none longer than all first, or a sum could overflow to the right number
        whole = whole and bool(((length >= 0) & (length <= len(nll))).all()) and int(length.sum()) == len(nll)
        if not whole:
            raise ValueError(
                "the saved history is damaged: key and length must be int64, one of each a document, and nll must "
                f"have as many losses as these are long; got {[list(t.shape) for t in (key, length, nll)]} of "
                f"{[t.dtype for t in (key, length, nll)]}; resume from another checkpoint"
            )
        self._seen = dict(zip(key.tolist(), nll.split(length.tolist()), strict=True))
        self._visits = []  # of a step that did not end
