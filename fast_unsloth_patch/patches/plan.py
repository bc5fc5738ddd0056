"""Which operands a patched forward hands to the ops, or why it must run stock: kept while nothing has changed.

Asking every child module of a layer for its state costs more than the kernels of a small step. So the answer is kept
with the module as a ``Plan``, and a call only compares what can change the answer: child modules, parameters
(identity, dtype, device; ``param.data = ...`` changes the last two in place), PEFT's state, dropout, hooks, instance
forwards, autocast. Whatever differs makes a new plan, so nothing has to tell us that it changed anything. What the
ops read off the tensors themselves (values, strides, ``requires_grad``) is not part of it.

Only plans that say "fast" are kept. A reason is worked out again at each call: stock is slow anyway, and then there
is nothing to invalidate.

A plan holds its owner's children, never its owner: the module stays free of reference cycles, its memory is released
at once. What was replaced in the module stays alive until the module's next fast or refused call.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as _nn_module
from torch.utils.hooks import RemovableHandle

from ..ops.lora_linear import Adapter, Projection
from . import packed
from .guards import holder_of

_KEY = "_fast_unsloth_plan"
_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16))
_AUTOCAST = frozenset((torch.bfloat16, torch.float16))
_LINEAR_FORWARD = nn.Linear.forward
# PEFT's LoRA layers whose forward is base + scaling B A dropout(x), over whichever base.
_LORA_LAYERS = (
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.gptq", "GPTQLoraLinear"),
)


class _Inlined(NamedTuple):
    """A module whose ``__call__`` the fast path leaves out: the known one, of the known type, nothing hung on it."""

    holder: dict  # the _modules that it is found in
    key: str
    module: nn.Module
    kind: type
    state: dict  # its __dict__
    label: str  # what to call it in a reason


class _Leaf(NamedTuple):
    """Parameters of an ``nn.Linear`` that the ops read: a plain child, or base layer, A or B of a ``lora.Linear``."""

    holder: dict  # where the weight is found: the module's _parameters or, inside FSDP1, its __dict__
    weight: torch.Tensor
    bias_holder: dict
    bias: torch.Tensor | None
    dtype: torch.dtype


class _Lora(NamedTuple):
    """The state of a PEFT LoRA layer: everything its forward would look at before it computes."""

    state: dict | None  # its __dict__; None: the owner of the plan itself
    modules: dict
    containers: tuple[nn.Module, nn.Module, nn.Module]  # lora_A, lora_B, lora_dropout
    active: str | list[str]
    absent: tuple[str, ...]  # active names that this layer has no adapter for
    name: str | None  # the one that it has
    scaling: float
    dropout: dict | None  # __dict__ of the nn.Dropout, None for nn.Identity
    p: float


class Plan:
    """The operands of one module's fast path, and the fingerprint under which they hold."""

    __slots__ = (
        "autocast",
        "biases",
        "device",
        "device_type",
        "dtype",
        "hook_epoch",
        "index",
        "inlined",
        "leaves",
        "lora",
        "modules",
        "packed",
        "projections",
        "size",
    )

    def __init__(self, modules: dict, x: torch.Tensor) -> None:
        self.modules = modules
        self.size = len(modules)
        self.dtype = x.dtype
        self.device = x.device
        self.device_type = x.device.type
        self.index = x.get_device()
        self.autocast = _autocast_dtype(self.device_type)
        self.hook_epoch = RemovableHandle.next_id
        self.projections: list[Projection] = []
        # Of the kinds above, kept as plain tuples: those unpack three times as fast.
        self.inlined: list[tuple] = []
        self.leaves: list[tuple] = []
        self.packed: list[tuple] = []  # packed.Base
        self.biases: list[tuple[torch.Tensor, torch.dtype]] = []
        self.lora: list[tuple] = []

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or pickled module takes no plan along, it would name the original's children. NoneType needs no
        # import of this package: what was pickled with the patches on loads without them.
        return type(None), ()


def children_plan(
    module: nn.Module, names: tuple[str, ...], x: torch.Tensor, act_types: tuple[type, ...] = ()
) -> Plan | str:
    """The plan of a module that is made of the linear children ``names``; or the reason to run stock.

    Args:
        module: the attention or MLP module.
        names: its linear children; ``plan.projections`` has this order.
        x: its input, already past ``guards.blocked``.
        act_types: the types that the child ``act_fn`` may have; empty if there is no such child.
    """
    state = module.__dict__
    plan = state.get(_KEY)
    if plan is not None and _holds(plan, state, x):
        return plan
    modules = state["_modules"]
    plan = Plan(modules, x)
    reason = _unknown_child(modules, names, act_types)
    for name in names:
        reason = reason or _add_child(plan, name)
    if act_types:
        reason = reason or _add_activation(plan, act_types)
    return _keep(state, plan, reason or _hooked(plan))


def self_plan(module: nn.Module, x: torch.Tensor) -> Plan | str:
    """The plan of a PEFT LoRA layer that was called itself (so its own hooks have run); or the reason to run stock."""
    state = module.__dict__
    plan = state.get(_KEY)
    if plan is not None and _holds(plan, state, x):
        return plan
    plan = Plan(state["_modules"], x)
    return _keep(state, plan, _add_lora(plan, "LoRA layer", state, owner=True) or _hooked(plan))


def _keep(state: dict, plan: Plan, reason: str | None) -> Plan | str:
    if reason is not None:
        state.pop(_KEY, None)
        return reason
    state[_KEY] = plan
    return plan


def _holds(plan: Plan, state: dict, x: torch.Tensor) -> bool:
    """Whether ``plan`` still describes the module with this ``__dict__``, called with ``x``."""
    modules = state["_modules"]
    if (
        modules is not plan.modules
        or len(modules) != plan.size
        or x.dtype is not plan.dtype
        or x.get_device() != plan.index
        or _autocast_dtype(plan.device_type) is not plan.autocast
        or nn.Linear.forward is not _LINEAR_FORWARD
    ):
        return False
    index = plan.index
    try:
        for holder, key, module, kind, own, _ in plan.inlined:
            if holder[key] is not module or type(module) is not kind or "forward" in own:
                return False
        for holder, weight, bias_holder, bias, dtype in plan.leaves:
            if (
                holder["weight"] is not weight
                or bias_holder["bias"] is not bias
                or weight.dtype is not dtype
                or weight.get_device() != index
            ):
                return False
        for holds, module, weight, known, _ in plan.packed:
            if not holds(module, weight, known):
                return False
        for own, own_modules, containers, active, absent, name, scaling, dropout, p in plan.lora:
            if own is None:
                own = state
            if (
                own["_disable_adapters"]
                or own["merged_adapters"]
                or own["_active_adapter"] != active
                or not own["cast_input_dtype_enabled"]
                or own_modules["lora_A"] is not containers[0]
                or own_modules["lora_B"] is not containers[1]
                or own_modules["lora_dropout"] is not containers[2]
            ):
                return False
            for missing in absent:
                if missing in containers[0].__dict__["_modules"]:
                    return False
            if name is not None and (
                own["scaling"][name] is not scaling
                or name in own["lora_variant"]
                or (dropout is not None and _dropout_p(dropout) != p)
            ):
                return False
    except KeyError:
        # An attribute, a parameter or a child that the plan knows is gone.
        return False
    for bias, dtype in plan.biases:
        if bias.dtype is not dtype or bias.get_device() != index:
            return False
    # Every hook registration anywhere counts this up; only then are the modules' own tables worth reading.
    epoch = RemovableHandle.next_id
    if epoch != plan.hook_epoch:
        if _hooked(plan) is not None:
            return False
        plan.hook_epoch = epoch
    return True


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _dropout_p(state: dict) -> float:
    """The probability in force in an ``nn.Dropout`` with this ``__dict__``: its own training flag counts."""
    return state["p"] if state["training"] else 0.0


def _hooked(plan: Plan) -> str | None:
    if (
        _nn_module._global_forward_hooks
        or _nn_module._global_forward_pre_hooks
        or _nn_module._global_backward_hooks
        or _nn_module._global_backward_pre_hooks
    ):
        return "global module hooks"
    for *_, state, label in plan.inlined:
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
        ):
            return f"hooks on {label}"
    return None


def _unknown_child(modules: dict, names: tuple[str, ...], act_types: tuple[type, ...]) -> str | None:
    known = {*names, "act_fn"} if act_types else set(names)
    missing = known - modules.keys()
    if missing:
        return f"no child {min(missing)}"
    unknown = modules.keys() - known
    return f"unknown child {min(unknown)}" if unknown else None


def _add_activation(plan: Plan, act_types: tuple[type, ...]) -> str | None:
    act = plan.modules["act_fn"]
    if type(act) not in act_types:
        return f"activation {type(act).__name__}"
    return _inline(plan, plan.modules, "act_fn", "act_fn")


def _inline(plan: Plan, holder: dict, key: str, label: str) -> str | None:
    module = holder[key]
    state = module.__dict__
    if "forward" in state:
        return f"forward of {label} replaced"
    plan.inlined.append(tuple(_Inlined(holder, key, module, type(module), state, label)))
    return None


def _add_child(plan: Plan, name: str) -> str | None:
    child = plan.modules[name]
    if _is_lora_layer(child):
        return _inline(plan, plan.modules, name, name) or _add_lora(plan, name, child.__dict__, owner=False)
    base = _add_base(plan, name, plan.modules, name, "child", fused=True)
    if isinstance(base, str):
        return base
    plan.projections.append(Projection(base.weight, base.bias, None))
    return None


def _is_lora_layer(module: nn.Module) -> bool:
    kind = type(module)
    for home, name in _LORA_LAYERS:
        loaded = sys.modules.get(home)
        if loaded is not None and kind is getattr(loaded, name, None):
            return True
    return False


def _add_lora(plan: Plan, label: str, state: dict, *, owner: bool) -> str | None:
    """Add the LoRA layer with this ``__dict__``, which may be the owner of the plan."""
    modules = state["_modules"]
    base = _add_base(plan, label, modules, "base_layer", "base layer", fused=not owner)
    if isinstance(base, str):
        return base
    if "quant_linear_module" in modules:  # what the GPTQ layer calls: the base layer by its old name
        if modules["quant_linear_module"] is not modules["base_layer"]:
            return "base layer replaced"
        _inline(plan, modules, "quant_linear_module", label)
    containers = (modules["lora_A"], modules["lora_B"], modules["lora_dropout"])
    a_modules, b_modules, dropouts = (container.__dict__["_modules"] for container in containers)
    found = active_adapter(state, a_modules)
    if isinstance(found, str):
        return found
    own = None if owner else state
    if found.name is None:
        plan.lora.append(tuple(_Lora(own, modules, containers, found.active, found.absent, None, 1.0, None, 0.0)))
        plan.projections.append(Projection(base.weight, base.bias, None))
        return None
    name, scaling = found.name, found.scaling
    a = _add_leaf(plan, label, a_modules, name, "lora_A")
    if isinstance(a, str):
        return a
    b = _add_leaf(plan, label, b_modules, name, "lora_B")
    if isinstance(b, str):
        return b
    if a.bias is not None:
        return "bias on lora_A"
    if plan.autocast is None:
        if a.dtype is not b.dtype:
            return "dtype mismatch"
        # An op over siblings computes their low-rank branches in one dtype.
        if any(other.adapter is not None and other.adapter.a.dtype is not a.dtype for other in plan.projections):
            return "adapters of several dtypes"
    reason = _dropout_reason(dropouts[name]) or _inline(plan, dropouts, name, label)
    if reason is not None:
        return reason
    dropout = dropouts[name].__dict__ if type(dropouts[name]) is nn.Dropout else None
    p = 0.0 if dropout is None else _dropout_p(dropout)
    plan.lora.append(tuple(_Lora(own, modules, containers, found.active, found.absent, name, scaling, dropout, p)))
    plan.projections.append(Projection(base.weight, base.bias, Adapter(a.weight, b.weight, float(scaling), p, b.bias)))
    return None


class Active(NamedTuple):
    """The adapter that a PEFT LoRA layer applies.

    Args:
        active: what the layer says, copied: a list may be changed in place.
        absent: those of them that it has no adapter for.
        name: the one that it has, or None.
        scaling: of that one.
    """

    active: str | list[str]
    absent: tuple[str, ...]
    name: str | None
    scaling: Any


def active_adapter(state: dict, a_modules: dict) -> Active | str:
    """The one active adapter of the layer with this ``__dict__`` and these ``lora_A``, or the reason to run stock."""
    if state["merged_adapters"]:
        return "merged"
    if state["_disable_adapters"]:
        return "adapters disabled"
    if not state["cast_input_dtype_enabled"]:
        return "input cast disabled"
    active = state["_active_adapter"] if isinstance(state["_active_adapter"], str) else list(state["_active_adapter"])
    names = [active] if isinstance(active, str) else active
    present = [name for name in names if name in a_modules]
    absent = tuple(name for name in names if name not in a_modules)
    if not present:
        return Active(active, absent, None, 1.0)
    if len(present) > 1:
        return "several active adapters"
    name = present[0]
    if name in state["lora_variant"]:
        return "variant: " + type(state["lora_variant"][name]).__name__.removesuffix("LinearVariant").lower()
    scaling = state["scaling"][name]
    if type(scaling) not in (float, int):
        return f"scaling of type {type(scaling).__name__}"
    return Active(active, absent, name, scaling)


def _dropout_reason(dropout: nn.Module) -> str | None:
    if type(dropout) is nn.Identity:
        return None
    if type(dropout) is not nn.Dropout:
        return f"dropout type {type(dropout).__name__}"
    if dropout.inplace:
        return "dropout in place"
    return "dropout of everything" if _dropout_p(dropout.__dict__) >= 1.0 else None


def _add_base(plan: Plan, label: str, holder: dict, key: str, kind: str, *, fused: bool) -> _Leaf | packed.Base | str:
    """Check and add a base layer, ``holder[key]``: an ``nn.Linear`` or one with a packed weight."""
    module = holder[key]
    if type(module) is nn.Linear:
        return _add_leaf(plan, label, holder, key, kind)
    base = packed.describe(module, plan.dtype, plan.device, plan.autocast, fused=fused)
    if base is None:
        return f"{kind} type {type(module).__name__}"
    reason = base if isinstance(base, str) else _inline(plan, holder, key, label)
    if reason is not None:
        return reason
    plan.packed.append(tuple(base))
    return base


def _add_leaf(plan: Plan, label: str, holder: dict, key: str, kind: str) -> _Leaf | str:
    """Check and add one ``nn.Linear``, ``holder[key]``; ``kind`` is "child", "base layer", "lora_A" or "lora_B"."""
    linear = holder[key]
    if type(linear) is not nn.Linear:
        return f"{kind} type {type(linear).__name__}"
    if nn.Linear.forward is not _LINEAR_FORWARD:
        return "nn.Linear.forward replaced"
    weight_holder, bias_holder = holder_of(linear, "weight"), holder_of(linear, "bias")
    weight, bias = weight_holder.get("weight"), bias_holder.get("bias")
    if weight is None:
        return "weight is no parameter"
    for tensor in (weight, bias):
        if tensor is None:
            continue
        if type(tensor) not in (nn.Parameter, torch.Tensor):
            return f"{type(tensor).__name__} weight"
        if tensor.device != plan.device:
            return "meta weight" if tensor.is_meta else "weight on another device"
    reason = _dtype_reason(plan, weight, bias, base=kind in ("child", "base layer")) or _inline(
        plan, holder, key, label
    )
    if reason is not None:
        return reason
    if bias is not None:
        plan.biases.append((bias, bias.dtype))
    leaf = _Leaf(weight_holder, weight, bias_holder, bias, weight.dtype)
    plan.leaves.append(tuple(leaf))
    return leaf


def _dtype_reason(plan: Plan, weight: torch.Tensor, bias: torch.Tensor | None, *, base: bool) -> str | None:
    """Autocast brings float32 and half types together; without it ``F.linear`` wants one dtype, PEFT casts for A."""
    if plan.autocast is not None:
        dtypes = {plan.dtype, weight.dtype} if bias is None else {plan.dtype, weight.dtype, bias.dtype}
        return None if dtypes <= _FLOATS and plan.autocast in _AUTOCAST else "dtype under autocast"
    if (bias is not None and bias.dtype is not weight.dtype) or (base and weight.dtype is not plan.dtype):
        return "dtype mismatch"
    return None if weight.dtype in _FLOATS or weight.dtype is plan.dtype else "dtype mismatch"
