"""Documents of one step as the attention modules see them, and when the layers may be given such.

Stock's sdpa attention gets a dense mask for packed rows and for padding, with which no flash kernel runs, and grouped
key and value heads are copied out. Here the layers get a :class:`Packing` instead, in the keyword ``fast_packing``,
which the stock forwards of model and layers hand on to every attention module (`decoder.attention_forward`). It
travels in the layers' arguments, so checkpointing recomputes with it. Rows that need no mask get :data:`WHOLE`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..ops._autograd import once_differentiable
from ..ops.attention import varlen_attention, varlen_unsupported
from ..status import Tally
from . import guards

PACKING = "fast_packing"

_STOCK_MASK = masking_utils.sdpa_mask
# Whose hooks may see the placeholder mask and rows without padding: they move and cast tensors, or are not listening.
_HOOKS_OF = ("torch.", "transformers.utils.output_capturing")


class Packing:
    """The documents of one step.

    Attributes:
        cu_seqlens: [documents + 1] int32, where they begin and end among all tokens of the batch, row after row.
        max_length: of the longest one.
        tokens: in documents; rows after them attend to nothing.
        window: sliding window, None: none, or as long as the longest document.
    """

    __slots__ = ("_build_mask", "_counts_backward", "_mask", "_tally", "cu_seqlens", "max_length", "tokens", "window")

    def __init__(
        self,
        cu_seqlens: torch.Tensor,
        max_length: int,
        tokens: int,
        window: int | None,
        build_mask: Callable[[], torch.Tensor],
        tally: Tally,
    ) -> None:
        self.cu_seqlens = cu_seqlens
        self.max_length = max_length
        self.tokens = tokens
        self.window = None if window is None or window >= max_length else window
        self._build_mask = build_mask
        self._mask: torch.Tensor | None = None
        self._tally = tally
        self._counts_backward = False

    def refused(self, attention: nn.Module, dtype: torch.dtype) -> str | None:
        """Why `attend` cannot stand for the attention of this module, computed in ``dtype``, or None."""
        return _core_reason(attention, self.cu_seqlens.device, dtype)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention inside each document: query [B, Hq, S, D], key, value [B, Hk, S, D] -> [B S, Hq, D]."""
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
        total = q.shape[0]
        if self.tokens < total:
            q, k, v = q[: self.tokens], k[: self.tokens], v[: self.tokens]
        out = varlen_attention(q, k, v, self.cu_seqlens, self.max_length, scaling=scaling, window=self.window)
        if self.tokens < total:
            out = torch.cat((out, out.new_zeros((total - self.tokens, *out.shape[1:]))))
        if not self._counts_backward and out.requires_grad:
            self._counts_backward = True
            out = _CountBackward.apply(out, self._tally)
        return out

    def dense_mask(self) -> torch.Tensor:
        """The mask that stock would have built."""
        if self._mask is None:
            self._mask = self._build_mask()
        return self._mask

    def run_stock(
        self,
        stock: Callable[..., tuple[torch.Tensor, Any]],
        attention: nn.Module,
        hidden: torch.Tensor,
        position_embeddings: Any,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, Any]:
        """The stock forward of an attention module with the mask that stock would have built."""
        return stock(attention, hidden, position_embeddings, self.dense_mask(), None, **kwargs)


class Whole:
    """Stands for a `Packing` where every row is one document without padding: stock's sdpa then has no mask.

    That it has none stock finds out by a dozen small kernels, on which the host waits.
    """


WHOLE = Whole()


class _CountBackward(torch.autograd.Function):
    """The identity, once a step: tells that backward has come through."""

    @staticmethod
    def forward(ctx, x, tally):
        ctx.tally = tally
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ctx.tally.hit_backward()
        return grad, None


class Call(NamedTuple):
    """A call of the base model, and the module of transformers that its forward comes from."""

    modeling: ModuleType
    model: Any
    input_ids: Any
    attention_mask: Any
    position_ids: Any
    cache: Any
    inputs_embeds: Any
    use_cache: Any
    kwargs: dict[str, Any]

    def inputs(self) -> torch.Tensor | None:
        """What the layers' input is made of, [B, S] or [B, S, H]; None where stock is going to complain."""
        given = self.input_ids if self.inputs_embeds is None else self.inputs_embeds
        if (self.input_ids is None) is (self.inputs_embeds is None) or not isinstance(given, torch.Tensor):
            return None
        return given if given.dim() == (2 if self.inputs_embeds is None else 3) else None

    def option(self, name: str) -> Any:
        """A keyword, else what the configuration says, as transformers looks options up."""
        return self.kwargs.get(name, getattr(self.model.config, name, None))

    def window(self) -> int | None:
        """The sliding window of the mask that the model makes."""
        windowed = hasattr(self.modeling, "create_sliding_window_causal_mask")
        return self.model.config.sliding_window if windowed else None

    def mask_builder(self, shape: tuple[int, int], device: torch.device) -> Callable[[], torch.Tensor]:
        """A function that makes the mask that stock would make in this call, of B x S tokens."""
        modeling, config = self.modeling, self.model.config
        mask, position_ids, windowed = self.attention_mask, self.position_ids, self.window() is not None

        def build() -> torch.Tensor:
            create = modeling.create_sliding_window_causal_mask if windowed else modeling.create_causal_mask
            return create(
                config=config,
                inputs_embeds=torch.empty((*shape, 0), device=device),
                attention_mask=mask,
                position_ids=position_ids,
                **{guards.cache_argument(create): None},
            )

        return build


_PROBES: dict[torch.device, torch.Tensor] = {}


def blocked(model: nn.Module, x: torch.Tensor) -> str | None:
    """`guards.blocked` for a model's input ``x``, which may be indices: guards know activations."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or x.numel() == 0:
        return guards.blocked(model, x)
    probe = _PROBES.get(x.device)
    if probe is None:
        probe = _PROBES[x.device] = torch.zeros(1, device=x.device)
    return guards.blocked(model, probe)


def needs_no_mask(call: Call, length: int) -> bool:
    """Whether rows of ``length`` tokens, each one document without padding, may go without a mask and without stock's
    search for one.
    """
    window = call.window()
    return (window is None or length < window) and _why_stock_arguments(call) is None


def why_stock(call: Call, inputs: torch.Tensor) -> str | None:
    """Why the layers must see what stock gives them and cannot have a `Packing`, or None."""
    reason = _why_stock_arguments(call)
    if reason is not None:
        return reason
    if torch.is_autocast_enabled(inputs.device.type):
        dtype = torch.get_autocast_dtype(inputs.device.type)
    else:
        dtype = inputs.dtype if inputs.is_floating_point() else call.model.dtype
    return _core_reason(call.model.layers[-1].self_attn, inputs.device, dtype)


def _why_stock_arguments(call: Call) -> str | None:
    """Why the layers must see the arguments that stock gives them, or None."""
    config = call.model.config
    if config._attn_implementation != "sdpa":
        return f"attention {config._attn_implementation}"
    if (
        call.modeling.ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is not sdpa_attention_forward
        or masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not _STOCK_MASK
        or call.modeling.create_causal_mask is not masking_utils.create_causal_mask
    ):
        return "attention function replaced"
    # Stock makes a cache if it is asked to, by the argument or else the configuration, but not under checkpointing.
    use_cache = config.use_cache if call.use_cache is None else call.use_cache
    if call.cache is not None or (use_cache and not (call.model.training and call.model.gradient_checkpointing)):
        return "cache"
    if call.option("is_causal") not in (None, True):
        return "not causal"
    if call.option("output_attentions"):
        return "attentions asked for"
    window = call.window()
    if window is not None and window < 1:
        return "sliding window"
    if not len(call.model.layers):
        return "no layers"
    for layer in call.model.layers:
        attention = getattr(layer, "self_attn", None)
        forward = getattr(type(attention), "forward", None)
        if getattr(forward, "takes_packing", None) is not forward or forward is None:
            return "attention not patched"
        if "forward" in layer.__dict__ or "forward" in attention.__dict__:
            return "forward of a layer replaced"
        if not type(layer).forward.__module__.startswith(("transformers.", "torch.")):
            return "unknown layer"
    return "hooks on a layer" if hooks_of(call.model).on_arguments else None


def _core_reason(attention: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    if attention.training and attention.attention_dropout:
        return "attention dropout"
    return varlen_unsupported(device, dtype, attention.head_dim)


class Hooks(NamedTuple):
    """Hooks of others that would notice: arguments of a layer that differ, rows that are missing inside the layers."""

    epoch: int
    on_arguments: bool
    on_rows: bool


_HOOKS: weakref.WeakKeyDictionary[nn.Module, Hooks] = weakref.WeakKeyDictionary()


def hooks_of(model: Any) -> Hooks:
    """Looked for again whenever a hook was registered anywhere, or there were some."""
    epoch = RemovableHandle.next_id
    known = _HOOKS.get(model)
    if known is not None and known.epoch == epoch and not known.on_arguments and not known.on_rows:
        return known
    on_arguments = on_rows = guards.hooked_globally()
    for layer in model.layers:
        for module in (layer, layer.self_attn):
            for hooks, with_kwargs in (
                (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
                (module._forward_hooks, module._forward_hooks_with_kwargs),
            ):
                on_arguments = on_arguments or any(_is_foreign(hooks[key]) for key in with_kwargs if key in hooks)
    for part in (*model.layers, model.norm, model.rotary_emb):
        for module in part.modules():
            on_rows = on_rows or (guards.hooked(module) and any(map(_is_foreign, _what_hangs_on(module))))
    _HOOKS[model] = hooks = Hooks(epoch, on_arguments, on_rows)
    return hooks


def _what_hangs_on(module: nn.Module) -> list[Any]:
    return [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
        *([module.__dict__["forward"]] if "forward" in module.__dict__ else ()),
    ]


def _is_foreign(hook: Any) -> bool:
    return not (getattr(hook, "__module__", None) or "").startswith(_HOOKS_OF)
