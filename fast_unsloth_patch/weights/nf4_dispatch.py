"""What torch's operations do with a stack of 4-bit experts: some keep it packed, most get values, a few are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import WeightLayoutError

__all__ = ["describe", "dispatch"]

_aten: Any = torch.ops.aten
# Code that would put a shard of values in a stack's place. (DDP, which copies parameters, is elsewhere.)
_SHARDERS = ("torch.distributed.fsdp", "torch.distributed.tensor.placement_types")


def dispatch(kind: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``func`` of stacks, instances of ``kind``, among its arguments."""
    handler = _HANDLERS.get(func)
    if handler is not None and isinstance(args[0], kind):
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if func.namespace == "c10d":
        return _collective(kind, func, args, kwargs)
    _refuse_writes(kind, func, args, kwargs)
    _refuse_sharding(kind)
    args, kwargs = tree_map_only(kind, kind.dequantize, (tuple(args), dict(kwargs)))
    return func(*args, **kwargs)


def describe(value: Any) -> str:
    """``value`` in a message: dtype, shape and device of a tensor, the type of anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {list(value.shape)} on {value.device}"


def _refuse_writes(kind: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            for leaf in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(leaf, kind):
                    raise RuntimeError(
                        f"{func} would write to {leaf!r}: weights of four bits cannot be changed; to merge an adapter, "
                        "for example, replace the parameter by its dequantize() first"
                    )


def _refuse_sharding(kind: Any) -> None:
    """An error if the code that is about to get values is one of `_SHARDERS`."""
    frame: Any = sys._getframe(1)
    between = (__name__, kind.__module__, "torch.functional", "torch._tensor")
    while frame is not None and frame.f_globals.get("__name__") in between:
        frame = frame.f_back
    if frame is not None and str(frame.f_globals.get("__name__")).startswith(_SHARDERS):
        raise RuntimeError(
            "experts of four bits cannot be sharded: they would be unpacked. Leave them whole on every rank, with "
            "packed = {p for p in model.parameters() if isinstance(p, Nf4Experts)}: in each call "
            "fully_shard(..., ignored_params=packed), or FullyShardedDataParallel(..., ignored_states=packed); "
            "accelerate's plugin takes the MixtralExperts modules as ignored_modules. Or use DDP"
        )


def _collective(kind: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Broadcast what stacks hold. The other collectives are refused: their schemas do not say what they write to."""
    if func is not torch.ops.c10d.broadcast_.default:
        raise RuntimeError(f"{func} of experts of four bits: use their dequantize(), or the tensors in their parts")
    tensors, *others = args
    work = None
    for tensor in tensors:
        for part in tensor.parts if isinstance(tensor, kind) else (tensor,):
            if isinstance(part, Tensor):
                if work is not None:
                    work.wait()
                _, work = func([part], *others, **kwargs)
    return tensors, work


def _alias(x: Any) -> Any:
    return x.wrap(x.parts, x.shape, x.dtype, x.stored_dtype)


def _view(x: Any, size: Sequence[int]) -> Any:
    return _alias(x) if tuple(size) == tuple(x.shape) else NotImplemented


def _clone(x: Any, *, memory_format: Any = None) -> Any:
    return x.wrap(x.parts.map(torch.clone), x.shape, x.dtype, x.stored_dtype)


def _to_copy(x: Any, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_layout: Any) -> Any:
    # Values are rounded to stored_dtype and to one dtype more. Packed, a third rounding would take the second's place,
    # which is the same unless the second one changes anything.
    dtype = dtype or x.dtype
    exact = x.dtype in (x.stored_dtype, torch.float32, torch.float64)
    if not dtype.is_floating_point or not (exact or dtype is x.dtype):
        return NotImplemented
    parts = x.parts.map(lambda part: part.to(device or part.device, non_blocking=non_blocking, copy=True))
    return x.wrap(parts, x.shape, dtype, x.stored_dtype)


def _select(x: Any, dim: int, index: int) -> Any:
    if dim not in (0, -3):
        return NotImplemented
    return x.dequantize(int(index) + (x.shape[0] if index < 0 else 0), 1)[0]


def _slice(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if dim not in (0, -3):
        return NotImplemented
    first, last, step = slice(start, end, step).indices(x.shape[0])
    if (first, last, step) == (0, x.shape[0], 1):
        return _alias(x)
    return x.dequantize(first, max(last - first, 0))[::step]


def _index(x: Any, indices: Sequence[Tensor | None]) -> Any:
    # On CUDA a look at the indices would be a wait for the device.
    index = indices[0] if len(indices) == 1 else None
    if index is None or index.device.type != "cpu" or index.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    chosen = [x.select(0, e) for e in index.reshape(-1).tolist()]
    values = torch.stack(chosen) if chosen else x.dequantize(0, 0)
    return values.view(*index.shape, *x.shape[1:])


def _copy(x: Any, source: Tensor, non_blocking: bool = False) -> Any:
    """From another stack; or from values that are those it has: DDP sends every rank the parameters of the first."""
    if not isinstance(source, type(x)):
        if source.shape == x.shape and torch.equal(x.dequantize(), source.to(x.dtype)):
            return x
        raise RuntimeError(f"{x!r} cannot take other values: expected 4-bit weights, found {describe(source)}")
    for name, mine, other in zip(x.parts._fields, x.parts, source.parts):
        found = (other.dtype, other.shape) if isinstance(other, Tensor) else other
        expected = (mine.dtype, mine.shape) if isinstance(mine, Tensor) else mine
        if found != expected:
            raise WeightLayoutError(f"copy of {name} to {x!r}: expected {expected}, found {found}")
    if x.stored_dtype is not source.stored_dtype:
        raise WeightLayoutError(f"copy to {x!r}: expected {x.stored_dtype}, found {source.stored_dtype}")
    for mine, other in zip(x.parts, source.parts):
        if isinstance(mine, Tensor) and isinstance(other, Tensor):
            mine.copy_(other, non_blocking=non_blocking)
    return x


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.lift_fresh.default: _alias,
    _aten.view.default: _view,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.index.Tensor: _index,
    _aten.copy_.default: _copy,
}
