"""Forwards of the parts of a decoder layer, for Llama and for the families that are written like it.

The module's own children are inlined (q, k, v with RoPE; gate, up, down), everything else stays with transformers:
the cache, the choice of the attention function and its masks, recording of outputs. Each builder takes the stock
forward and its patch's counters, and returns the new forward, which calls the stock one whenever its conditions do
not hold.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import SiLUActivation

from ..ops._siblings import Memo
from ..ops.lora_linear import lora_linear
from ..ops.lora_mlp import lora_mlp
from ..ops.lora_qkv import lora_qkv
from ..ops.rms_norm import residual_rms_norm, rms_norm
from ..status import Tally
from . import checkpointing, guards
from .documents import PACKING, WHOLE
from .guards import holder_of
from .plan import Plan, children_plan

_ATTENTION_CHILDREN = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_CHILDREN = ("gate_proj", "up_proj", "down_proj")
_SILU = (nn.SiLU, SiLUActivation)


def rms_norm_forward(stock: Callable, tally: Tally) -> Callable:
    """``weight * (x * rsqrt(mean(x^2) + eps)).to(x.dtype)`` in one pass."""

    def reason_for_stock(self, hidden_states):
        return guards.blocked(self, hidden_states) or _norm_weight_reason(self, hidden_states)

    def forward(self, hidden_states):
        reason = reason_for_stock(self, hidden_states)
        if reason is not None:
            tally.fall_back(reason)
            return stock(self, hidden_states)
        tally.hit(checkpointing.recomputing())
        return rms_norm(hidden_states, holder_of(self, "weight")["weight"], self.variance_epsilon, tally=tally)

    def with_residual(self, residual, delta, layer=None):
        """The norm of ``residual + delta``, and that sum; without a delta, of the residual. ``layer`` counts too."""
        reason = reason_for_stock(self, residual)
        if reason is None and delta is not None:
            reason = _addition_reason(residual, delta)
        if reason is not None:
            tally.fall_back(reason)
            summed = residual if delta is None else residual + delta
            return stock(self, summed), summed
        tally.hit(checkpointing.recomputing())
        weight = holder_of(self, "weight")["weight"]
        counters = tally if layer is None else _Both(tally, layer)
        return residual_rms_norm(residual, delta, weight, self.variance_epsilon, tally=counters)

    with_residual.forward = forward  # type: ignore[attr-defined]
    forward.with_residual = with_residual  # type: ignore[attr-defined]
    return forward


def _addition_reason(residual: torch.Tensor, delta: torch.Tensor) -> str | None:
    if type(delta) is not torch.Tensor or delta.shape != residual.shape:
        return "addition of other shapes"
    if delta.device != residual.device:
        return "addition from another device"
    return None if delta.dtype is residual.dtype else guards.unsupported(delta)


def _norm_weight_reason(module: nn.Module, x: torch.Tensor) -> str | None:
    weight = holder_of(module, "weight").get("weight")
    if weight is None:
        return "weight is no parameter"
    if type(weight) is not nn.Parameter and type(weight) is not torch.Tensor:
        return f"{type(weight).__name__} weight"
    if weight.device != x.device:
        return "meta weight" if weight.is_meta else "weight on another device"
    return None


def attention_forward(stock: Callable, tally: Tally) -> Callable:
    """Of attention that looks as far back as its mask does: Llama's. See `_attention_forward`."""
    return _attention_forward(stock, tally, windowed=False)


def windowed_attention_forward(stock: Callable, tally: Tally) -> Callable:
    """Of attention that tells the attention function ``config.sliding_window``: Mistral's and Mixtral's. See
    `_attention_forward`.
    """
    return _attention_forward(stock, tally, windowed=True)


def _attention_forward(stock: Callable, tally: Tally, *, windowed: bool) -> Callable:
    """q, k, v with RoPE as one op, the stock attention function, o_proj as one op.

    Whatever function ``config._attn_implementation`` names gets what the stock forward would give it: q, k, v as
    [B, heads, S, head_dim], the mask, dropout, scaling and all keyword arguments.
    """
    modeling = sys.modules[stock.__module__]
    rotary = _own_rotary(modeling)
    tells_cache_kwargs = guards.cache_argument(stock) == "cache"

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        by_old_name = kwargs.pop("past_key_values", None)
        if cache is None:
            cache = by_old_name
        packing = kwargs.pop(PACKING, None)
        if packing is WHOLE:
            packing = attention_mask = None
        plan = (
            guards.blocked(self, hidden_states)
            or _rotary_reason(self, hidden_states, position_embeddings, modeling, rotary)
            or children_plan(self, _ATTENTION_CHILDREN, hidden_states)
        )
        # Without autocast, cos and sin of another dtype would promote q and k.
        if isinstance(plan, Plan) and plan.autocast is None and position_embeddings[0].dtype is not hidden_states.dtype:
            plan = "rotary dtype"
        if packing is not None and isinstance(plan, Plan):
            plan = packing.refused(self, plan.autocast or hidden_states.dtype) or plan
        if isinstance(plan, str):
            tally.fall_back(plan)
            if packing is not None:
                return packing.run_stock(stock, self, hidden_states, position_embeddings, kwargs)
            return stock(self, hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        tally.hit(checkpointing.recomputing())
        q_proj, k_proj, v_proj, o_proj = plan.projections
        cos, sin = position_embeddings
        query, key, value = lora_qkv(
            hidden_states, q_proj, k_proj, v_proj, cos, sin, self.head_dim, memo=_memo(self, "qkv"), tally=tally
        )
        # One backward counts once, in the op that backward reaches last.
        o_tally = None if value.requires_grad else tally
        if packing is not None:
            attn_output = packing.attend(query, key, value, self.scaling).reshape(*hidden_states.shape[:-1], -1)
            return lora_linear(attn_output, o_proj, memo=_memo(self, "o"), tally=o_tally), None
        if cache is not None:
            told = {"kwargs": kwargs} if tells_cache_kwargs else {}
            key, value = cache.update(key, value, self.layer_idx, **told)
        attention = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling.eager_attention_forward
        )
        if windowed:
            kwargs["sliding_window"] = getattr(self.config, "sliding_window", None)
        attn_output, attn_weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1)
        return lora_linear(attn_output, o_proj, memo=_memo(self, "o"), tally=o_tally), attn_weights

    forward.takes_packing = forward  # type: ignore[attr-defined]  # itself, for wrappers copy attributes
    return forward


def _own_rotary(modeling: ModuleType) -> object | None:
    """transformers' own ``apply_rotary_pos_emb``, a module where ``kernels`` is installed; None if already replaced."""
    rotary = modeling.apply_rotary_pos_emb
    own = isinstance(rotary, nn.Module) or (isinstance(rotary, FunctionType) and rotary.__module__ == modeling.__name__)
    return rotary if own else None


def _rotary_reason(
    module: nn.Module, x: torch.Tensor, position_embeddings: Any, modeling: ModuleType, rotary: object | None
) -> str | None:
    """None if stock would apply transformers' rotary embedding with plain cos and sin [1 or B, S, head_dim]."""
    # Looked up at each call, as the stock forward does; a hub kernel comes as an instance forward of the same object.
    current = modeling.apply_rotary_pos_emb
    if current is not rotary or "forward" in current.__dict__:
        return "rotary function replaced"
    if x.dim() != 3:
        return "input not 3-D"
    if type(position_embeddings) not in (tuple, list) or len(position_embeddings) != 2:
        return "position embeddings"
    cos, sin = position_embeddings
    if type(cos) is not torch.Tensor or type(sin) is not torch.Tensor:
        return "position embeddings"
    shape, (batch, length, _) = cos.shape, x.shape
    if (
        len(shape) != 3
        or shape[0] not in (1, batch)
        or shape[1] != length
        or shape[2] != module.head_dim
        or shape[2] % 2
    ):
        return "rotary shape"
    if sin.shape != shape or sin.dtype is not cos.dtype or not cos.dtype.is_floating_point:
        return "rotary shape"
    if cos.device != x.device or sin.device != x.device:
        return "rotary on another device"
    return "rotary with gradient" if cos.requires_grad or sin.requires_grad else None


def mlp_forward(stock: Callable, tally: Tally) -> Callable:
    """``down(silu(gate(x)) * up(x))`` as one op."""

    def with_residual(self, x, residual):
        """The same added to ``residual``, unless that is None."""
        plan = guards.blocked(self, x) or children_plan(self, _MLP_CHILDREN, x, _SILU)
        if isinstance(plan, str):
            tally.fall_back(plan)
            y = stock(self, x)
            return y if residual is None else residual + y
        tally.hit(checkpointing.recomputing())
        gate, up, down = plan.projections
        return lora_mlp(
            x,
            gate,
            up,
            down,
            residual=residual,
            # Whoever has wrapped this forward, or calls it from a subclass, reads what it returns.
            need_output=type(self).forward is not forward or not checkpointing.output_unused(self),
            keep=torch.is_grad_enabled() and not checkpointing.discarded(),
            memos=(_memo(self, "gate_up"), _memo(self, "down")),
            tally=tally,
        )

    def forward(self, x):
        return with_residual(self, x, None)

    with_residual.forward = forward  # type: ignore[attr-defined]
    forward.with_residual = with_residual  # type: ignore[attr-defined]
    return forward


def decoder_layer_forward(stock: Callable, tally: Tally) -> Callable:
    """Of a layer with Llama's order of arguments. See `_decoder_layer_forward`."""
    run = _decoder_layer_forward(stock, tally)
    cache_argument = guards.cache_argument(stock)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        cache=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        by_old_name = kwargs.pop("past_key_values", None)
        kwargs[cache_argument] = by_old_name if cache is None else cache
        kwargs["attention_mask"] = attention_mask
        kwargs["position_ids"] = position_ids
        kwargs["use_cache"] = use_cache
        kwargs["position_embeddings"] = position_embeddings
        return run(self, hidden_states, kwargs)

    forward.ends_with_mlp = True  # type: ignore[attr-defined]
    return forward


def moe_decoder_layer_forward(stock: Callable, tally: Tally) -> Callable:
    """Of a layer with Mixtral's: position embeddings first, ``use_cache`` among the others. See
    `_decoder_layer_forward`.
    """
    run = _decoder_layer_forward(stock, tally)
    cache_argument = guards.cache_argument(stock)

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, position_ids=None, cache=None, **kwargs
    ):
        by_old_name = kwargs.pop("past_key_values", None)
        kwargs[cache_argument] = by_old_name if cache is None else cache
        kwargs["position_embeddings"] = position_embeddings
        kwargs["attention_mask"] = attention_mask
        kwargs["position_ids"] = position_ids
        return run(self, hidden_states, kwargs)

    forward.ends_with_mlp = True  # type: ignore[attr-defined]
    return forward


def _decoder_layer_forward(stock: Callable, tally: Tally) -> Callable:
    """``h = x + attention(norm(x))``, ``h + mlp(norm(h))``: each addition in the pass of the norm or the MLP beside it.

    Attention is called as the module it is. The norms and the MLP are entered past their ``__call__`` where nothing
    hangs on it: their patches are on, and nobody has hooked them; otherwise they are called as modules too.

    The forwards made of it are marked ``ends_with_mlp``, which `checkpointing.output_unused` wants to know of a layer:
    the MLP's values go into the sum that is returned.

    Returns:
        A function of the layer, the hidden states, and what else the layer was given, by the names that ``stock`` and
        attention have for it.
    """

    def run(self, hidden_states, given):
        reason = guards.blocked(self, hidden_states)
        input_norm = _joined(self, "input_layernorm") if reason is None else None
        if input_norm is None:
            tally.fall_back(reason or "input_layernorm runs by itself")
            return stock(self, hidden_states, **given)
        tally.hit(checkpointing.recomputing())
        normed, residual = input_norm(hidden_states, None, tally)
        attn_output, _ = self.self_attn(hidden_states=normed, **given)
        norm = _joined(self, "post_attention_layernorm")
        if norm is None:
            residual = residual + attn_output
            normed = self.post_attention_layernorm(residual)
        else:
            normed, residual = norm(residual, attn_output)
        mlp = _joined(self, "mlp")
        return residual + self.mlp(normed) if mlp is None else mlp(normed, residual)

    return run


class _Both(NamedTuple):
    """Counts a backward for two patches."""

    first: Tally
    second: Tally

    def hit_backward(self) -> None:
        self.first.hit_backward()
        self.second.hit_backward()


def _memo(module: nn.Module, name: str) -> Memo:
    """What carries an op's small products from the forward of a checkpointed region to its recompute."""
    return Memo(checkpointing.kept(module, name), partial(checkpointing.keep, module, name))


def _joined(layer: nn.Module, name: str) -> Callable | None:
    """``with_residual`` of the child's patched forward; None where the child must be called as a module."""
    child: Any = layer._modules.get(name)
    forward = getattr(type(child), "forward", None)  # torch.jit's modules have none on their class
    with_residual = getattr(forward, "with_residual", None)
    # Not the copy of it that functools.wraps leaves on whatever wraps our forward.
    if child is None or with_residual is None or with_residual.forward is not forward:
        return None
    if guards.hooked(child) or guards.hooked_globally():
        return None
    return partial(with_residual, child)
