"""Which operands the experts of a Mixtral block hand to ``lora_experts``, or why they must run stock.

A plan in the manner of ``plan.py``: kept with the block, compared with a cheap fingerprint at each call, made anew when
anything differs. The experts are transformers' ``MixtralExperts``, bare or inside PEFT's ``ParamWrapper``, one for each
adapted parameter, nested in whichever order. A wrapper's forward parametrises the experts with ``W + s B A`` for the
time of a call; a plan takes A and B themselves.

What stock computes in is part of the answer. transformers' ``grouped_mm`` casts to the weights' dtype, whatever
autocast says; ``eager`` is made of linear layers, which autocast casts. The other implementations are taken where both
would do the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import SiLUActivation

from ..ops.lora_experts import ExpertAdapter, ExpertProjection
from ..ops.routing import MAX_EXPERTS
from .guards import holder_of
from .plan import (
    _AUTOCAST,
    _FLOATS,
    _KEY,
    Plan,
    _add_leaf,
    _holds,
    _hooked,
    _inline,
    _keep,
    _Lora,
    _unknown_child,
    active_adapter,
)

_EXPERTS = ("transformers.models.mixtral.modeling_mixtral", "MixtralExperts")
_DISPATCH = "transformers.integrations.moe"
_WRAPPER = ("peft.tuners.lora.layer", "ParamWrapper")
# 4-bit expert stacks: tensor subclasses of this module, which is imported by whoever makes one.
_PACKED = ("fast_unsloth_patch.weights.nf4_experts", "Nf4Experts")
_PARAMETERS = ("gate_up_proj", "down_proj")
_SILU = (nn.SiLU, SiLUActivation)
# How `use_experts_implementation` decorates MixtralExperts, where the version at hand says so.
_LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}


class _Stack(NamedTuple):
    """A parameter of the experts."""

    holder: dict  # where it is found: _parameters or, inside FSDP1, the __dict__
    name: str
    weight: torch.Tensor
    dtype: torch.dtype


class _Code(NamedTuple):
    """What the experts would run: their class, their settings and the function that these choose."""

    state: dict  # their __dict__
    kind: Any
    forward: Callable
    apply_gate: Callable
    experts: int
    config: Any
    implementation: str | None
    function: Callable | None  # None: the forward that is written in the class


class ExpertsPlan(Plan):
    """The operands of a block's experts, and the fingerprint under which they hold.

    Attributes:
        gate_up, down: the projections.
        compute: the dtype that stock would compute them in.
    """

    __slots__ = ("code", "compute", "down", "frozen", "gate_up", "shapes", "stacks")

    code: _Code
    compute: torch.dtype
    down: ExpertProjection
    gate_up: ExpertProjection

    def __init__(self, modules: dict, x: torch.Tensor) -> None:
        super().__init__(modules, x)
        self.stacks: list[tuple] = []
        self.frozen: list[tuple[Any, Any]] = []  # 4-bit stacks, and what they hold
        # Of every operand. `param.data = ...`, with which some libraries empty a parameter, keeps its identity.
        self.shapes: list[tuple[torch.Tensor, tuple[int, ...]]] = []


def experts_plan(block: nn.Module, x: torch.Tensor) -> ExpertsPlan | str:
    """The plan of a sparse block made of ``gate`` and ``experts``; or the reason to run stock.

    Args:
        block: the block. Its gate is called as a module and is no part of the plan.
        x: its input, already past ``guards.blocked``.
    """
    state = block.__dict__
    plan = state.get(_KEY)
    if plan is not None and _holds(plan, state, x) and _experts_hold(plan):
        return plan
    plan = ExpertsPlan(state["_modules"], x)
    reason = (
        _unknown_child(plan.modules, ("gate", "experts"), ()) or _add_experts(plan, block, x.shape[-1]) or _hooked(plan)
    )
    return _keep(state, plan, reason)  # type: ignore[return-value]


def _experts_hold(plan: ExpertsPlan) -> bool:
    """Whether the experts still are what ``plan`` says, beyond what ``plan.py`` compares."""
    state, kind, forward, apply_gate, count, config, implementation, function = plan.code
    if (
        state["num_experts"] != count
        or state["config"] is not config
        or config._experts_implementation != implementation
        or _registered(implementation) is not function
        or kind.forward is not forward
        or kind._apply_gate is not apply_gate
        or state.get("_is_expert_parallel", False)
        or "_apply_gate" in state
    ):
        return False
    device = plan.device
    for holder, name, weight, dtype in plan.stacks:
        if holder.get(name) is not weight or weight.dtype is not dtype or weight.device != device:
            return False
    # `param.data = ...` changes what a stack holds, and not which one it is.
    if any(weight.frozen() is not frozen for weight, frozen in plan.frozen):
        return False
    return all(tensor.shape == shape for tensor, shape in plan.shapes)


def _add_experts(plan: ExpertsPlan, block: nn.Module, hidden: int) -> str | None:
    """Add the experts of ``block`` and the wrappers round them, from the outermost inwards."""
    wrapper_kind, holder, key = _loaded(_WRAPPER), plan.modules, "experts"
    adapters: dict[str, ExpertAdapter | None] = {}
    wrappers: list[tuple[nn.Module, str]] = []
    while type(holder[key]) is wrapper_kind:
        wrapper = holder[key]
        name = wrapper.parameter_name
        if name not in _PARAMETERS:
            return "adapter on another parameter"
        if name in adapters:
            return f"several adapters on {name}"
        adapters[name] = None
        reason = _inline(plan, holder, key, "experts")
        if reason is not None:
            return reason
        wrappers.append((wrapper, name))
        holder, key = wrapper.__dict__["_modules"], "base_layer"
    reason = _inline(plan, holder, key, "experts") or _describe(plan, holder[key], hidden)
    if reason is not None:
        return reason
    weights = {name: weight for _, name, weight, _ in plan.stacks}
    for wrapper, name in wrappers:
        adapter = _add_wrapper(plan, wrapper, name, weights[name].shape)
        if isinstance(adapter, str):
            return adapter
        adapters[name] = adapter
    plan.frozen = [(weight, weight.frozen()) for weight in weights.values() if _is_packed(weight)]
    given = {id(weight): frozen for weight, frozen in plan.frozen}
    plan.gate_up, plan.down = (
        ExpertProjection(given.get(id(weights[name]), weights[name]), adapters.get(name)) for name in _PARAMETERS
    )
    return None


def _describe(plan: ExpertsPlan, experts: nn.Module, hidden: int) -> str | None:
    """Add the bare experts: their code, their weights, what they compute in."""
    kind: Any = type(experts)
    if (kind.__module__, kind.__qualname__) != _EXPERTS:
        return f"experts type {kind.__name__}"
    state = experts.__dict__
    if not (_is_dispatch(kind.forward) and _is_dispatch(kind._apply_gate)) or "_apply_gate" in state:
        return "forward of experts replaced"
    if state.get("_is_expert_parallel", False):
        return "expert parallel"
    if any(state.get(name, value) != value for name, value in _LAYOUT.items()):
        return "experts of another layout"
    modules = state["_modules"]
    act_kind = type(modules.get("act_fn"))
    if act_kind not in _SILU:
        return f"activation {act_kind.__name__}"
    config = state["config"]
    implementation = config._experts_implementation
    function = _registered(implementation)
    count = state["num_experts"]
    plan.code = _Code(state, kind, kind.forward, kind._apply_gate, count, config, implementation, function)
    return (
        _inline(plan, modules, "act_fn", "act_fn")
        or _add_weights(plan, experts, hidden)
        or _implementation_reason(implementation, function)
        or _choose_dtype(plan)
    )


def _is_dispatch(function: object) -> bool:
    """Is it transformers' own code? Names are no proof: `functools.wraps` copies them."""
    return getattr(function, "__globals__", {}).get("__name__") == _DISPATCH


def _registered(implementation: str | None) -> Callable | None:
    return sys.modules[_DISPATCH].ALL_EXPERTS_FUNCTIONS.get(implementation)


def _implementation_reason(name: str | None, function: Callable | None) -> str | None:
    if name in (None, "eager"):
        return None if function is None else "experts implementation of another library"
    if function is None:
        return "unknown experts implementation"
    home = getattr(function, "__globals__", {}).get("__name__", "")
    return None if home.startswith("transformers.integrations.") else "experts implementation of another library"


def _add_weights(plan: ExpertsPlan, experts: nn.Module, hidden: int) -> str | None:
    """Add [E, 2 I, H] and [E, H, I]: whole, on the input's device, of one dtype."""
    for name in _PARAMETERS:
        holder = holder_of(experts, name)
        weight = holder.get(name)
        if weight is None:
            return f"{name} is no parameter"
        if type(weight) not in (nn.Parameter, torch.Tensor) and not _is_packed(weight):
            return f"{type(weight).__name__} weight"
        if weight.device != plan.device:
            return "meta weight" if weight.is_meta else "weight on another device"
        plan.stacks.append(tuple(_Stack(holder, name, weight, weight.dtype)))
        plan.shapes.append((weight, weight.shape))
    shapes = [tuple(weight.shape) for _, _, weight, _ in plan.stacks]
    config = plan.code.config
    # The counts that the class was built with: a rank's share of the experts is as regular as all of them.
    count, width = config.num_local_experts, config.intermediate_size
    if count > MAX_EXPERTS:
        return f"more than {MAX_EXPERTS} experts"
    if plan.code.experts != count or shapes != [(count, 2 * width, hidden), (count, hidden, width)]:
        return "expert weights of another shape"
    return None


def _is_packed(weight: object) -> bool:
    kind = _loaded(_PACKED)
    return kind is not None and isinstance(weight, kind)


def _loaded(name: tuple[str, str]) -> Any:
    """The class of this module and name; None where nobody has imported it."""
    return getattr(sys.modules.get(name[0]), name[1], None)


def _choose_dtype(plan: ExpertsPlan) -> str | None:
    """Set ``plan.compute`` to what stock computes in, or say why that is unclear or an error."""
    dtypes = {dtype for *_, dtype in plan.stacks}
    (dtype, *others) = dtypes
    if others or not (dtype in _FLOATS or dtype is plan.dtype):
        return "dtype mismatch"
    autocast, implementation = plan.autocast, plan.code.implementation
    if implementation == "grouped_mm":
        if dtype not in _FLOATS:
            return "dtype mismatch"
        plan.compute = dtype
    elif autocast is None:
        if dtype is not plan.dtype:
            return "dtype mismatch"
        plan.compute = dtype
    elif autocast not in _AUTOCAST or not {dtype, plan.dtype} <= _FLOATS:
        return "dtype under autocast"
    elif implementation in (None, "eager") or autocast is dtype:
        plan.compute = autocast
    else:
        return "dtype under autocast"
    return None


def _add_wrapper(plan: ExpertsPlan, wrapper: nn.Module, name: str, shape: torch.Size) -> ExpertAdapter | str | None:
    """Check and add a ``ParamWrapper`` on the stack ``name`` [E, N, K]: its adapter, or None if none is active."""
    state = wrapper.__dict__
    label = f"adapter of {name}"
    modules = state["_modules"]
    containers = (modules["lora_A"], modules["lora_B"], modules["lora_dropout"])
    a_modules, b_modules = (container.__dict__["_modules"] for container in containers[:2])
    found = active_adapter(state, a_modules)
    if isinstance(found, str):
        return found
    lora = _Lora(state, modules, containers, found.active, found.absent, found.name, found.scaling, None, 0.0)
    if found.name is None:
        plan.lora.append(tuple(lora))
        return None
    if not state.get("_did_swap_in_out_features", False):
        return "factors turned round, as PEFT before 0.20 has them"
    a = _add_leaf(plan, label, a_modules, found.name, "lora_A")
    if isinstance(a, str):
        return a
    b = _add_leaf(plan, label, b_modules, found.name, "lora_B")
    if isinstance(b, str):
        return b
    if a.bias is not None or b.bias is not None:
        return "bias on the adapter"
    experts, rows, columns = shape
    rank = a.weight.shape[0] // experts
    if rank == 0 or a.weight.shape != (rank * experts, columns) or b.weight.shape != (rows, rank * experts):
        return "adapter of another shape"
    plan.shapes += [(a.weight, a.weight.shape), (b.weight, b.weight.shape)]
    plan.lora.append(tuple(lora))
    return ExpertAdapter(a.weight, b.weight, float(found.scaling))
