"""Logits that are computed when somebody looks at them.

The fused loss needs no logits, but a model's output has them, and anything may read them. So the output is Hugging
Face's own, and its ``logits`` are a :class:`LazyLogits`: a ``torch.Tensor`` that knows its shape, dtype, device and
place in the autograd graph from the start, and its values from the first operation that asks for them.

Why a tensor, and not an output object with a lazy field: everything that walks outputs does it in its own way.
accelerate iterates ``items()`` and rebuilds the mapping, DDP reads ``values()``, FSDP2 flattens the pytree and with an
output dtype takes the object apart by ``getattr`` on dataclass fields, each of which a reading script does too. Only
the value can tell a walk from a read: walks look at metadata, register hooks, cast or clone. All of it stays lazy.

Two hooks divide the work. ``__torch_function__`` sees what Python does with the tensor: metadata and casts go to the
tensor as it is, everything else gets a plain tensor in its place (`LazyLogits.plain`), so ``numpy()`` and
``data_ptr()`` work too. Whatever comes in below that, C++ extensions and ``autograd.Function``, is served by
``__torch_dispatch__``. Gradients come through the lazy tensor's own node in both cases, so hooks that a walk put on it
run as they would on stock logits.

Limit: the fused loss does not depend on these logits, so the gradient of the *loss* with respect to them
(``retain_grad``, ``autograd.grad(loss, logits)``) does not exist. Asking for it is a read, after two of which the stock
loss runs, where it does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_map_only

from ..errors import FastPatchError, warn

_Tensor = torch.Tensor


def _getters(*names: str) -> list[Any]:
    return [getattr(_Tensor, name).__get__ for name in names]


# What runs on the lazy tensor as it is, for it needs no values. Casts go on to `__torch_dispatch__`, lazy there too.
_NATIVE: frozenset[Any] = frozenset(
    [
        *_getters("_base", "device", "dtype", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mkldnn"),
        *_getters("is_quantized", "is_sparse", "itemsize", "layout", "nbytes", "ndim", "output_nr", "requires_grad"),
        *_getters("shape"),
        _Tensor.__hash__,
        _Tensor.__len__,
        _Tensor._is_view,
        _Tensor.bfloat16,
        _Tensor.clone,
        _Tensor.detach,
        _Tensor.dim,
        _Tensor.double,
        _Tensor.element_size,
        _Tensor.float,
        _Tensor.get_device,
        _Tensor.half,
        _Tensor.is_complex,
        _Tensor.is_contiguous,
        _Tensor.is_floating_point,
        _Tensor.numel,
        _Tensor.register_hook,
        _Tensor.size,
        _Tensor.stride,
        _Tensor.to,
        torch.clone,
        torch.detach,
        torch.is_complex,
        torch.is_floating_point,
        torch.numel,
    ]
)
_ALIASES = frozenset((torch.ops.aten.detach.default, torch.ops.aten.alias.default))
_CAST = torch.ops.aten._to_copy.default
_CLONE = torch.ops.aten.clone.default

_optimizer_steps = 0
_watching = False


def _watch_optimizers() -> None:
    """Count optimizer steps from now on: fused and bitsandbytes ones leave no trace in a weight's ``_version``."""
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_post_hook(_count_step)


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


class _State:
    """The reads of one model: two training steps running that read their logits, and it should not be lazy."""

    __slots__ = ("last_read", "reads_logits", "step")

    def __init__(self) -> None:
        self.step = 0
        self.last_read = -1
        self.reads_logits = False

    def note_read(self, step: int) -> None:
        if step - self.last_read == 1:
            self.reads_logits = True
        self.last_read = step


# Beside the model and not in it, so that copies and pickles of a model know nothing of it.
_STATES: weakref.WeakKeyDictionary[torch.nn.Module, _State] = weakref.WeakKeyDictionary()


def reads_logits(model: torch.nn.Module) -> bool:
    """True if the script read the logits of ``model`` in two training steps running, in this step or earlier."""
    state = _STATES.get(model)
    return state is not None and state.reads_logits


class _Source:
    """Values that are computed once, and shared by every alias of a lazy tensor as storage would be."""

    __slots__ = ("compute", "values")

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self.compute: Callable[[], torch.Tensor] | None = compute
        self.values: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        if self.values is None:
            assert self.compute is not None
            # A script may look inside inference_mode and use what it saw outside.
            with torch.inference_mode(False), torch.no_grad():
                self.values = self.compute().detach()
            self.compute = None
        return self.values


class _Head:
    """``lm_head`` as it was in the forward: operands, autocast, and what shows that the weight has changed since."""

    __slots__ = ("autocast", "family", "hidden", "kind", "state", "step", "steps_before", "version", "weight")

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, state: _State, family: str) -> None:
        self.family = family
        self.hidden = hidden.detach()
        self.weight = weight.detach()
        self.kind = hidden.device.type
        self.autocast = torch.is_autocast_enabled(self.kind), torch.get_autocast_dtype(self.kind)
        self.state = state
        self.step = state.step
        self.version = weight._version
        self.steps_before = _optimizer_steps if weight.requires_grad else None

    def region(self) -> torch.autocast:
        enabled, dtype = self.autocast
        return torch.autocast(self.kind, dtype=dtype, enabled=enabled)

    def compute(self) -> torch.Tensor:
        weight = self.weight
        if weight.untyped_storage().nbytes() < weight.numel() * weight.element_size():
            raise FastPatchError(
                "the logits were read after FSDP had freed lm_head.weight. Read them where the forward returns with "
                "reshard_after_forward=False on the root module, or leave the loss to Hugging Face: "
                f'apply(exclude="{self.family}.loss")'
            )
        self.state.note_read(self.step)
        if weight._version != self.version or self.steps_before not in (None, _optimizer_steps):
            self.state.reads_logits = True
            warn(
                "logits-after-step",
                "the logits of a training step were first read after the optimizer had changed lm_head.weight, so they "
                "were computed with the new weight. The loss of this model runs stock from now on, which keeps them.",
            )
        with self.region():
            return F.linear(self.hidden, weight)


class LazyLogits(torch.Tensor):
    """A tensor whose values are computed at the first operation that needs them; see the module."""

    _source: _Source
    _real: torch.Tensor | None

    @staticmethod
    def __new__(cls, source: _Source, like: torch.Tensor, shape: Any, dtype: torch.dtype) -> LazyLogits:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=like.device)
        self._source = source
        self._real = None
        return self

    def plain(self) -> torch.Tensor:
        """The plain tensor that everything but a walk gets, connected to this one in the autograd graph."""
        if self._real is None:
            # Whatever mode the reader is in: stock logits have their gradient whoever looks at them.
            with torch.inference_mode(False), torch.enable_grad():
                self._real = _Materialise.apply(self)
        return self._real

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _NATIVE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.plain, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # torch declares no cls
        kwargs = kwargs or {}
        first = args[0] if args else None
        if type(first) is LazyLogits:
            source = first._source
            if func in _ALIASES:
                return LazyLogits(source, first, _shape(first), _dtype(first))
            if func is _CLONE:
                return LazyLogits(_Source(lambda: source.get().clone()), first, _shape(first), _dtype(first))
            if func is _CAST and kwargs.keys() <= {"dtype"}:
                dtype = kwargs["dtype"]
                return LazyLogits(_Source(lambda: source.get().to(dtype)), first, _shape(first), dtype)
        args, kwargs = tree_map_only(LazyLogits, lambda t: t._source.get(), (args, kwargs))
        return func(*args, **kwargs)


def _shape(t: torch.Tensor) -> torch.Size:
    with torch._C.DisableTorchFunctionSubclass():
        return t.shape


def _dtype(t: torch.Tensor) -> torch.dtype:
    with torch._C.DisableTorchFunctionSubclass():
        return t.dtype


class _Connect(torch.autograd.Function):
    """hidden, weight -> lazy logits: ``F.linear`` in the graph, without its GEMM."""

    @staticmethod
    def forward(ctx, hidden, weight, head, dtype):
        ctx.save_for_backward(hidden, weight)
        ctx.region = head.region
        return LazyLogits(_Source(head.compute), hidden, (*hidden.shape[:-1], weight.shape[0]), dtype)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        dhidden = dweight = None
        with ctx.region():
            if ctx.needs_input_grad[0]:
                dhidden = torch.matmul(grad, weight).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                dweight = torch.matmul(grad.flatten(0, -2).t(), hidden.flatten(0, -2)).to(weight.dtype)
        return dhidden, dweight, None, None


class _Materialise(torch.autograd.Function):
    """Lazy logits -> the same values as a plain tensor; they share memory."""

    @staticmethod
    def forward(ctx, lazy):
        return lazy._source.get().detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def lazy_logits(model: torch.nn.Module, hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``F.linear(hidden, weight)``, computed in the autocast state of this moment when the result is first used.

    Every call is a training step of ``model`` for `reads_logits`.

    Args:
        model: whose logits they are.
        hidden: [..., H].
        weight: [V, H].
        dtype: of the logits.
    Returns:
        A `LazyLogits` [..., V].
    """
    state = _STATES.get(model)
    if state is None:
        state = _STATES[model] = _State()
    state.step += 1
    if weight.requires_grad:
        _watch_optimizers()
    config: Any = model.config
    return _Connect.apply(hidden, weight, _Head(hidden, weight, state, config.model_type), dtype)
