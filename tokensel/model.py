"""The patched model (steps 1 to 3): its forward takes `selection=`, its head is a place to call into.

Nothing of the model is copied; `remove` puts everything back.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokensel.capture import AttentionCapture
from tokensel.documents import IGNORE_INDEX, to_labels, to_rows
from tokensel.families import (
    model_without_head,
    plain_head,
    possible_head_options,
    refuse_fused_loss,
    refuse_other_aux_loss,
    router_loss_of,
)
from tokensel.ops.stats import token_stats
from tokensel.ops.vocab_parallel import replicated_as

R = TypeVar("R")


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model computes without dropout inside; each module is what it was afterwards."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _PastHooks:
    """What was computed in a tensor-parallel head, on its way out: the head's hooks take its output for a DTensor of
    logits, which they would redistribute or make local."""

    placements = None

    def __init__(self, result: object) -> None:
        self._result = result

    def redistribute(self, *_, **__) -> _PastHooks:
        return self

    def to_local(self) -> object:
        return self._result


class Forward:
    """A function in the place of a module's forward, called as `function(module, forward, ...)` with the one before it.

    It copies and pickles with its module, as a method does. An instance attribute hides the class's forward; one that
    was already there (accelerate's) is kept for later.
    """

    def __init__(self, module: nn.Module, function: Callable) -> None:
        self.function, self.__self__ = function, module
        self.before, self.inner = module.__dict__.get("forward"), cast(Any, module.forward)
        module.forward = self

    def __call__(self, *args, **kwargs):
        return self.function(self.__self__, self.inner, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner)

    @property
    def __func__(self) -> Callable:
        """As a method's, of any module: accelerate wraps it and binds it again, to a copy too."""
        function, forward = self.function, self.inner.__func__  # of a method; else there is none here either

        def unbound(module: nn.Module, *args, **kwargs):
            return function(module, functools.partial(forward, module), *args, **kwargs)

        unbound.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        return unbound

    __wrapped__ = __func__  # and nothing below: where accelerate takes off mixed precision, it binds the last of them

    def undo(self) -> None:
        """Puts back what was there before."""
        if self.before is None:
            self.__self__.__dict__.pop("forward", None)
        else:
            self.__self__.forward = self.before


def _model_forward(model: Any, forward: Callable, *args, selection=None, **kwargs):
    """The patched model's: with `selection`, the selection's own way through it; a trainer's question has an answer."""
    if selection is None:
        asked = kwargs.get("fused_lm_head") and model._tokensel_patched.answer
        return asked(model._tokensel_patched, *args, **kwargs) if asked else forward(*args, **kwargs)
    if args:
        raise TypeError("with selection=, pass the model's inputs by keyword (input_ids=..., labels=...)")
    missing = kwargs.get("input_ids") is None
    if missing or kwargs.get("past_key_values") is not None:
        needs = f"with selection=, the model {'needs input_ids' if missing else 'takes no past_key_values'}"
        raise ValueError(f"{needs}; adapters that hand over embeddings or keys (prompt and prefix tuning) do not work")
    return selection(model._tokensel_patched, **kwargs)


def _head_forward(head: Any, forward: Callable, hidden: Tensor, *args, tokensel_function=None, **kwargs):
    """The patched head's: with `tokensel_function`, that function of hidden, weight and bias."""
    if tokensel_function is None:
        return forward(hidden, *args, **kwargs)
    weight, device = head.weight, hidden.device.type
    if torch.is_autocast_enabled(device):  # as the head's own product would
        hidden, weight = (t.to(torch.get_autocast_dtype(device)) for t in (hidden, weight))
    if not hasattr(weight, "device_mesh"):
        return tokensel_function(hidden, weight, head.bias)
    return _PastHooks(tokensel_function(replicated_as(weight, hidden), weight, head.bias))


class PatchedModel:
    """A causal language model that `apply_to` has patched.

    Attributes:
        model: the unwrapped causal language model.
        head_options: softcap and logit_scale of the model's head, as `token_stats` takes them; found by the self-test.
        attention: what captures q and k; layers: indices of the layers where it does.
        keeps_documents_apart: whether the model's masks follow position_ids that restart (packing).
        answer: what a trainer's own question is answered by (`tokensel.trl_logprobs`), or None.
    """

    def __init__(self, model: PreTrainedModel, layer: int | Sequence[int] | None) -> None:
        self.model = model
        refuse_fused_loss(model)
        self._head = plain_head(model)
        self._base = model_without_head(model)
        self.attention = AttentionCapture(model, self._base, layer)
        self.layers = self.attention.layers
        self.keeps_documents_apart = False  # until the self-test has seen it
        self._router_loss = router_loss_of(model)
        self.head_options: dict = {}
        self.answer: Any = None

    def backbone(self, inputs: dict) -> Tensor:
        """Forward of the model without its head -> final hidden states [B, S, D]."""
        return self.backbone_and_aux_loss(inputs)[0]

    @property
    def router_weight(self) -> float:
        """The factor of `aux_loss` in the model's own loss."""
        return self._router_loss.weight if self._router_loss else 0.0

    def backbone_and_aux_loss(self, inputs: dict) -> tuple[Tensor, Tensor | None]:
        """(final hidden states [B, S, D], what balances the experts of a mixture, unweighted, or None).

        The latter is scalar, and there where `output_router_logits` is on, in the inputs or else in the config.

        Raises:
            ValueError: packing, in a model that lets packed documents see each other; a head that has been replaced.
        """
        self._refuse_replaced()
        given = {name: value for name, value in inputs.items() if value is not None}  # PEFT passes Nones along
        if "position_ids" in given and "attention_mask" not in given and not self.keeps_documents_apart:
            raise ValueError(
                f"{type(self.model).__name__} lets packed documents see each other: its attention mask does not follow "
                "position_ids. Pad the rows instead (packing false, and an attention_mask)"
            )
        given |= {"use_cache": False, "return_dict": True}
        asked = given.get("output_router_logits")
        in_config = getattr(self.model.config.get_text_config(), "output_router_logits", False)
        if self._router_loss is None or not (in_config if asked is None else asked):
            return self._base(**given).last_hidden_state, None
        out = self._base(**given | {"output_router_logits": True})
        return out.last_hidden_state, self._router_loss(out.router_logits, given.get("attention_mask"))

    def _refuse_replaced(self) -> None:
        for name, now, patched in (
            ("head", self.model.get_output_embeddings(), self._head),
            ("base model", model_without_head(self.model), self._base),
        ):
            if now is not patched:
                raise ValueError(
                    f"the {name} of {type(self.model).__name__} has been replaced since apply_to (it is another "
                    f"{type(now).__name__}); call tokensel.apply_to(model) again, which takes a plain torch.nn.Linear "
                    "as the head"
                )

    def with_whole_head(self, function: Callable[[Tensor, Tensor, Tensor | None], R], hidden: Tensor) -> R:
        """`function(hidden, weight, bias)`, called back from inside the head's own forward.

        It is the only place where a sharded weight is whole: calling the module is what has FSDP and ZeRO-3 gather it
        first, and scatter it afterwards.
        """
        result: Any = self._head(hidden, tokensel_function=function)
        return cast(R, result.to_local() if isinstance(result, _PastHooks) else result)

    @torch.no_grad()
    def token_nll(self, inputs: dict, labels: Tensor, *, impl: str = "auto") -> Tensor:
        """Negative log-likelihood of label-aligned `labels` [B, S], nats, 0 where ignored -> [B, S] float32."""
        next_labels = to_rows(labels, IGNORE_INDEX)
        hidden, options = self.backbone(inputs), {"impl": impl, **self.head_options}
        stats = self.with_whole_head(lambda h, w, b: token_stats(h, w, next_labels, bias=b, **options), hidden)
        return to_labels(stats.nll)

    def install(self) -> None:
        self.attention.install()
        self._forwards = Forward(self.model, _model_forward), Forward(self._head, _head_forward)
        self.model._tokensel_patched = self  # type: ignore[assignment]

    def uninstall(self) -> None:
        for module in self.model.modules():  # a copy of the head may stand in its place by now
            forward = module.__dict__.get("forward")
            if isinstance(forward, Forward) and forward not in self._forwards:
                forward.undo()
        for forward in self._forwards:
            forward.undo()
        self.attention.uninstall()
        del self.model._tokensel_patched

    def __deepcopy__(self, memo: dict) -> PatchedModel:
        memo[id(self)] = copied = object.__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """For `torch.save` of the whole model.

        Raises:
            ValueError: the model's forward has been wrapped since; a method is pickled by name, so that the wrapper
                would be lost, and the selection with it.
        """
        if not isinstance(self.model.__dict__.get("forward"), Forward):
            raise ValueError(
                f"{type(self.model).__name__} cannot be pickled: its forward has been wrapped since apply_to (by "
                "accelerate for mixed precision, say). Save its weights (save_pretrained, or its state_dict), or call "
                "tokensel.remove(model) first"
            )
        return self.__dict__

    @torch.no_grad()
    def self_test(self) -> None:
        """Compares statistics and attention mass with the model's own, on seven tokens and one of padding.

        The padding has the model make its mask. Finds `head_options`.

        Raises:
            ValueError: they differ, i.e. the model does something to logits or scores that is not known here.
        """
        weight = self._head.weight
        position = torch.arange(8, device=weight.device)[None]
        ids, valid, prompt = position % weight.shape[0], (position < 7).long(), position % 3 == 0  # (1, 8)
        inputs = {"input_ids": ids, "attention_mask": valid}
        with eval_mode(self.model):
            with self.attention.probing(prompt), self.attention.armed() as take:
                hidden, aux_loss = self.backbone_and_aux_loss(inputs)
                captured = take() if self.layers else []
            own = self.model(**inputs, use_cache=False, return_dict=True)
            self.keeps_documents_apart = self._documents_stay_apart(ids)
        if getattr(own, "logits", None) is None:
            raise ValueError(
                f"the forward of {type(self.model).__name__} returns no logits: a library that makes the loss itself "
                "has replaced it; switch that off"
            )
        if hasattr(weight, "device_mesh") and own.logits.shape[-1] != weight.shape[0]:
            raise ValueError(
                f"the head of {type(self.model).__name__} is spread over ranks already, and hands out "
                f"{own.logits.shape[-1]} of {weight.shape[0]} logits; call apply_to before the model is sharded"
            )
        self._find_head_options(hidden, ids, valid, own.logits)
        refuse_other_aux_loss(self.model, aux_loss, getattr(own, "aux_loss", None))
        self.attention.compare_mass(captured, prompt, valid.bool())

    def _documents_stay_apart(self, ids: Tensor) -> bool:
        """Whether the second of two packed documents, ids[:, 4:], is the same whatever the first one is."""
        if "position_ids" not in inspect.signature(self._base.forward).parameters:
            return False
        positions = torch.arange(4, device=ids.device).repeat(2)[None]
        one, other = (
            self._base(input_ids=packed, position_ids=positions, use_cache=False, return_dict=True).last_hidden_state
            for packed in (ids, torch.cat([ids[:, :4].flip(1), ids[:, 4:]], dim=1))
        )
        # masked keys weigh exactly 0, but other rows may change how a mixture of experts rounds
        return bool((one - other)[:, 4:].abs().max() <= 4 * torch.finfo(one.dtype).eps * one.abs().max())

    def _find_head_options(self, hidden: Tensor, ids: Tensor, valid: Tensor, logits: Tensor) -> None:
        """Of what the config may mean, takes what reproduces the model's own logits [1, 8, V]."""
        logits = logits.double()
        expected = logits.logsumexp(-1) - logits.gather(-1, ids[..., None])[..., 0]  # (1, 8)
        eps = torch.finfo(self._head.weight.dtype).eps
        allowed = 4 * eps * logits.abs().max() + 64 * torch.finfo(torch.float32).eps
        name, width = type(self.model).__name__, self._head.weight.shape[1]
        if hidden.shape[-1] != width:
            states = f"{name}'s hidden states are {hidden.shape[-1]} wide, its head {width}"
            raise ValueError(f"{states}: it transforms them in between, which is not supported")
        differences = []
        for options in possible_head_options(self.model):
            compute = functools.partial(token_stats, labels=ids, impl="chunked", **options)
            stats = self.with_whole_head(lambda h, w, b, compute=compute: compute(h, w, bias=b), hidden)  # type: ignore[misc]
            differences.append((stats.nll - expected)[valid.bool()].abs().max())
            if differences[-1] <= allowed:
                self.head_options = options
                return
        raise ValueError(
            f"{name}'s own logits differ from head(hidden), tried with "
            f"{' and '.join(map(str, possible_head_options(self.model)))}: negative log-likelihoods by at least "
            f"{min(differences):.3g} nats (allowed {allowed:.3g}). The model changes its logits in a way that is not "
            "supported; use the functions (tokensel.token_stats_from_logits) instead of apply_to."
        )


def unwrap(model: Any) -> PreTrainedModel:
    """The causal language model inside PEFT, torch.compile and data-parallel wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif not isinstance(model, PreTrainedModel) and hasattr(model, "module"):
            model = model.module
        else:
            break
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be (a wrapper of) a transformers PreTrainedModel; got {type(model).__name__}")
    return model


def refuse_patched(model: nn.Module) -> PreTrainedModel:
    """The unwrapped model. Raises ValueError if it is patched already."""
    base = unwrap(model)
    if hasattr(base, "_tokensel_patched"):
        raise ValueError(f"{type(base).__name__} is patched already; call tokensel.remove(model) first")
    return base


def apply_to(model: nn.Module, layer: int | Sequence[int] | None = -1) -> PatchedModel:
    """Gives a causal language model an opt-in `selection=` keyword in its forward.

    Without the keyword the model computes what it did, bit for bit. With it (`tokensel.Selection`) the head's logits
    are never made. On eight tokens, statistics and attention are compared with the model's own.

    Args:
        model: a transformers causal language model, or a PEFT model around it.
        layer: whose attention is captured; -1 = the last layer with full attention. Of several, [-1, -2], the prompt
            mass is the mean. None = capture nothing, for methods that do not measure attention: then models that do
            not use transformers' attention interface are supported, too.
    Returns:
        The patched model; `tokensel.remove(model)` undoes it. A deep copy of the model is a patched model of its own.
        If it was patched already, this takes the place of the earlier patch, or leaves that where it raises.
    Raises:
        TypeError: not a transformers model; layer is neither an int nor a sequence of ints.
        ValueError: an adapter on the head or of virtual tokens, a layer that does not exist or is named twice,
            attention that cannot be captured, logits that cannot be reproduced.
    """
    base = unwrap(model)
    peft = getattr(model, "active_peft_config", None)
    if peft is not None and peft.is_prompt_learning:
        raise ValueError(
            f"{type(peft).__name__} puts virtual tokens before the batch's, whose losses and prompts would be off by "
            "their number; use LoRA"
        )
    earlier: PatchedModel | None = getattr(base, "_tokensel_patched", None)
    if earlier is not None:
        earlier.uninstall()
    try:
        patched = PatchedModel(base, layer)
        patched.answer = None if earlier is None else earlier.answer
        patched.install()
        try:
            patched.self_test()
        except BaseException:
            patched.uninstall()
            raise
    except BaseException:
        if earlier is not None:
            earlier.install()
        raise
    return patched


def remove(model: nn.Module) -> None:
    """Undoes `apply_to`.

    Raises:
        ValueError: the model is not patched.
    """
    base: Any = unwrap(model)
    if not hasattr(base, "_tokensel_patched"):
        raise ValueError(f"{type(base).__name__} is not patched; there is nothing to remove")
    base._tokensel_patched.uninstall()
