"""Base layers with a packed weight, as operands of a plan: bitsandbytes' ``Linear4bit``, gptqmodel's kernels.

Each kind is described once (`describe`), and the description is checked at each call (``Base.holds``). Neither library
is imported here: a layer of theirs exists only where it was.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..weights import FrozenWeight, WeightLayoutError, gptq, nf4
from ..weights.gptq import GPTQWeight
from ..weights.nf4 import Nf4Weight
from .guards import holder_of

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# To make one waits for the GPU: kept while the module lives, beside it and not in it, where copies would take it along.
_GPTQ: weakref.WeakKeyDictionary[nn.Module, GPTQWeight] = weakref.WeakKeyDictionary()


class Base(NamedTuple):
    """A described base layer.

    Args:
        holds: whether ``(module, weight, known)`` still are what they were: the check of every call.
        module: the layer.
        weight: its weight, for the ops.
        known: what ``holds`` compares with.
        bias: [N], or None.
    """

    holds: Callable[[Any, Any, Any], bool]
    module: nn.Module
    weight: FrozenWeight
    known: tuple[Any, ...]
    bias: torch.Tensor | None


def describe(
    module: nn.Module, x_dtype: torch.dtype, device: torch.device, autocast: torch.dtype | None, *, fused: bool
) -> Base | str | None:
    """The operands of a layer with a packed weight, or the reason to run stock; None if it is no such layer.

    Args:
        module: the layer.
        x_dtype, device: of its input.
        autocast: the dtype of autocast, None without.
        fused: it is to run together with its siblings, whose intermediates are of one dtype.
    """
    bitsandbytes = sys.modules.get("bitsandbytes.nn.modules")
    if bitsandbytes is not None and type(module) in (
        bitsandbytes.Linear4bit,
        bitsandbytes.LinearNF4,
        bitsandbytes.LinearFP4,
    ):
        return _linear4bit(module, x_dtype, device, autocast, fused=fused)
    gptqmodel = sys.modules.get("gptqmodel.nn_modules.qlinear")
    if gptqmodel is not None and isinstance(module, gptqmodel.BaseQuantLinear):
        return _gptq(module, x_dtype, device, autocast)
    return None


def _quant_state(param: torch.Tensor, state: dict[str, Any]) -> Any:
    # Inside FSDP2's forward the parameter is a plain one, without its state.
    own = getattr(param, "quant_state", None)
    return state.get("quant_state") if own is None else own


def _linear4bit(
    module: Any, x_dtype: torch.dtype, device: torch.device, autocast: torch.dtype | None, *, fused: bool
) -> Base | str:
    state = module.__dict__
    if not state.get("compute_type_is_set", False):
        return "compute dtype not set yet"  # the stock forward takes it from its first input
    weights, biases = holder_of(module, "weight"), holder_of(module, "bias")
    param, bias = weights.get("weight"), biases.get("bias")
    if param is None:
        return "weight is no parameter"
    if not isinstance(param, torch.Tensor) or type(param).__name__ not in ("Params4bit", "Parameter", "Tensor"):
        return f"{type(param).__name__} weight"
    if param.device != device:
        return "meta weight" if param.is_meta else "weight on another device"
    quant_state = _quant_state(param, state)
    problem = nf4.layout_problem(param, quant_state)
    if problem is not None:
        return problem
    shape = (module.out_features, module.in_features)
    if tuple(quant_state.shape) != shape:
        return f"quant_state.shape: expected {list(shape)}, found {list(quant_state.shape)}"
    if device.type == "cpu" and shape[1] % quant_state.blocksize:
        return "rows that end within a block"  # which bitsandbytes' own CPU kernels dequantise in two ways
    compute = state["compute_dtype"]
    dtype = x_dtype if compute is None else compute
    if x_dtype not in _FLOATS or dtype not in _FLOATS:
        return "dtype mismatch"
    if autocast is None and fused and dtype is not x_dtype:
        return "compute dtype"
    if autocast is not None and dtype not in (autocast, torch.float32):
        return "compute dtype under autocast"
    if bias is not None and (type(bias) not in (nn.Parameter, torch.Tensor) or bias.dtype is not dtype):
        return "bias dtype"  # the stock forward casts it in place
    weight = Nf4Weight.of(param, quant_state, dtype, direct=hasattr(torch.ops.bitsandbytes, "gemm_4bit"))
    return Base(_linear4bit_holds, module, weight, (state, weights, biases, bias, compute), bias)


def _linear4bit_holds(module: Any, weight: Nf4Weight, known: tuple[Any, ...]) -> bool:
    state, weights, biases, bias, compute = known
    param = weights["weight"]
    return (
        state["compute_dtype"] is compute
        and biases["bias"] is bias
        and weight.describes(param, _quant_state(param, state))
        and (bias is None or (bias.dtype is weight.dtype and bias.device == weight.device))
    )


def _gptq(module: Any, x_dtype: torch.dtype, device: torch.device, autocast: torch.dtype | None) -> Base | str:
    problem = gptq.layout_problem(module)
    if problem is not None:
        return problem
    if module.qweight.device != device:
        return "meta weight" if module.qweight.is_meta else "weight on another device"
    if x_dtype not in _FLOATS or autocast not in (None, torch.bfloat16, torch.float16):
        return "dtype mismatch"
    reason = _gptq_mode(module)
    if reason is not None:
        return reason
    weight = _GPTQ.get(module)
    if weight is None or not weight.describes(module):
        try:
            weight = _GPTQ[module] = GPTQWeight.of(module)
        except WeightLayoutError as error:  # of values, which a predicate that runs at each call cannot look at
            return str(error)
    bias = module.bias
    if bias is not None and (not isinstance(bias, torch.Tensor) or bias.device != device):
        return "bias on another device"
    return Base(_gptq_holds, module, weight, (bias,), bias)


def _gptq_mode(module: Any) -> str | None:
    # In evaluation this kernel rounds its values in another way.
    evaluates = not module.training and type(module).__name__ == "TritonV2Linear"
    return "TritonV2Linear in evaluation mode" if evaluates else None


def _gptq_holds(module: Any, weight: GPTQWeight, known: tuple[Any, ...]) -> bool:
    return weight.describes(module) and module.bias is known[0] and _gptq_mode(module) is None
