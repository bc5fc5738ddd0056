"""Predicates "may the fast path run here?", asked before it runs: None, or a short stable reason to run stock.

The reasons are the keys of ``status().rows[...].fallbacks``: they name a state ("eval", "compiling"), never a value
that changes from call to call, so that counting them cannot grow without bound.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules import module as _nn_module

from ..device.dispatch import unsupported
from ..switch import KEEP_STOCK_FLAG, stock_only

_functorch_level = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_grad_enabled = torch.is_grad_enabled


def blocked(module: nn.Module, x: object) -> str | None:
    """Why ``module``, called with ``x``, must run its stock forward whatever its children are, or None.

    In this order: "disabled" (inside ``disabled()``), "keep_stock", "compiling", "eval" (evaluation mode without
    gradients), "tensor subclass" (DTensor, FakeTensor, fx Proxy, ...), "functorch transform", "dispatch mode"
    (selective checkpointing, make_fx, FlopCounterMode: they intercept torch calls, and a kernel launch is none),
    "tracing", "empty input", then what the ops do not cover on this device ("dtype int64", "device mps", "compute
    capability 7.5", ...).

    ``torch.compile`` is asked about first, so that nothing else is traced. Costs about 0.5 us on CUDA, 0.8 us on a CPU.
    """
    if torch.compiler.is_compiling():
        return "compiling"
    if stock_only():
        return "disabled"
    state = module.__dict__
    if state.get(KEEP_STOCK_FLAG):
        return "keep_stock"
    if not state["training"] and not _grad_enabled():
        return "eval"
    if type(x) is not torch.Tensor:
        return "tensor subclass"
    if _functorch_level() is not None:
        return "functorch transform"
    if _dispatch_modes():
        return "dispatch mode"
    if _tracing_state() is not None:
        return "tracing"
    if x.numel() == 0:
        return "empty input"
    return unsupported(x)


def holder_of(module: nn.Module, name: str) -> dict:
    """The dict in which the attribute ``name`` of ``module``, a parameter, is found, in Python's order.

    FSDP1 replaces the parameters of a gathered unit by plain tensors in ``__dict__``: from forward to backward with
    ``use_orig_params=False``, and with True in the backward pass, where checkpointing recomputes. (In the forward pass
    they are in ``_parameters`` besides.) A recompute that looked there alone would not take the path of its forward.
    The replicas of ``nn.DataParallel`` have plain tensors too, and stay stock.
    """
    state = module.__dict__
    return state if name in state and "_is_replica" not in state else state["_parameters"]


def hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` runs more than the forward of its class."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or state.get("_compiled_call_impl") is not None
    )


def hooked_globally() -> bool:
    """Whether calling any module does."""
    return bool(
        _nn_module._global_forward_hooks
        or _nn_module._global_forward_pre_hooks
        or _nn_module._global_backward_hooks
        or _nn_module._global_backward_pre_hooks
    )


def cache_argument(stock: Callable) -> str:
    """What ``stock`` calls its key-value cache: ``"past_key_values"``, from transformers 5.24 on ``"cache"``.

    The same name goes for the calls that ``stock`` makes and for its output. A forward that stands for ``stock`` names
    the parameter ``cache`` and takes the old name, which every version accepts, from its keyword arguments.
    """
    return "cache" if "cache" in inspect.signature(stock).parameters else "past_key_values"
