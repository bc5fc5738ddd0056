"""``recompute="full"`` and ``"auto"``: which layers are not recomputed.

Under gradient checkpointing a layer's forward runs twice. *Keeping* a layer means running its checkpointed region
directly: autograd then holds its activations until backward, and nothing is recomputed. The numbers are the same.

``"full"`` keeps the last layer before a fused loss with a frozen head: its recompute would follow its forward with
nothing but the loss in between, which holds one chunk of logits (a small one then) where stock holds all of them.
``"auto"`` spends free GPU memory on layers; how many is for ``budget.py`` to say.

Nothing here is a collective, so ranks may keep different layers. That is safe where a recompute does not communicate:
DDP, FSDP and FSDP2 of whole layers. Where it does (ZeRO-3, tensor parallelism, units inside the layer, a context that
is split over ranks), nothing is kept; the collectives that a recompute starts are counted, too, while measuring.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..switch import _STOCK, KEEP_STOCK_FLAG
from . import budget
from .layer_end import forward_of, is_plain_checkpoint

# Attention functions of transformers, which do not communicate by themselves.
_LOCAL_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


class LastLayer:
    """The layer after which only a fused loss follows, and whether its activations are kept until backward."""

    __slots__ = ("kept", "layer")

    def __init__(self, layer: nn.Module | None) -> None:
        self.layer = layer
        self.kept = False


_LAST: ContextVar[LastLayer | None] = ContextVar("fast_unsloth_last_layer", default=None)


@contextlib.contextmanager
def loss_follows(model: nn.Module, head: torch.Tensor) -> Iterator[LastLayer]:
    """Round the forward of a base model whose hidden states go into the fused loss at once.

    A ``head`` that trains has its gradient in fp32 there, where the peak of a step may be: then nothing is kept.
    """
    layers = model._modules.get("layers")
    known = isinstance(layers, nn.ModuleList) and len(layers) > 0 and not head.requires_grad
    last = LastLayer(layers[-1] if known else None)  # type: ignore[index]
    token = _LAST.set(last)
    try:
        yield last
    finally:
        _LAST.reset(token)


class Full:
    """The policy: all layers are recomputed, but for the last one before a fused loss."""

    def __init__(self) -> None:
        self._kept = False

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def run(self, region: Any, args: tuple[Any, ...]) -> Any:
        """Run a region of a layer: kept if it is the last, else checkpointed as the script wants it."""
        last = _LAST.get()
        if (
            last is None
            or region.layer is not last.layer
            or _left_to_stock(region)
            or _why_recomputed(region, args)
            or _communication(region)
            or not _may_keep(region, args)
        ):
            return region.checkpoint(region, *args)
        region.keeps = last.kept = self._kept = True
        return region(*args)

    def describe(self) -> str:
        return "all layers recomputed but the last, which the loss follows" if self._kept else ""


class Auto:
    """The policy: a budget a device, from :meth:`start` to :meth:`stop`."""

    def __init__(self) -> None:
        self._budgets: dict[torch.device, budget.Budget] = {}
        self._hook: Any = None
        self._apart: weakref.WeakKeyDictionary[nn.Module, tuple[str | None]] = weakref.WeakKeyDictionary()

    def start(self) -> None:
        self._budgets = {}
        if self._hook is None:
            self._hook = register_optimizer_step_post_hook(self._on_step)

    def stop(self) -> None:
        self._budgets = {}
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def run(self, region: Any, args: tuple[Any, ...]) -> Any:
        """Run a region of a layer: kept, or checkpointed as the script wants it."""
        if _left_to_stock(region):
            return region.checkpoint(region, *args)
        found = self._budget(region, args)
        if isinstance(found, str):
            region.tally.fall_back(f"auto: {found}")
        else:
            if found.keeps(region.layer, args[0]) and _may_keep(region, args):
                region.keeps = True
                return found.run_kept(region, args)
            if found.measuring:
                region.budget = found
        return region.checkpoint(region, *args)

    def describe(self) -> str:
        return "; ".join(each.describe() for each in self._budgets.values()) or "no layer has been checkpointed yet"

    def _budget(self, region: Any, args: tuple[Any, ...]) -> budget.Budget | str:
        """The budget that decides on this call, or why none does."""
        if reason := _why_recomputed(region, args):
            return reason
        hidden = args[0]
        found = self._budgets.get(hidden.device)
        if found is None:
            if budget.memory_of(hidden.device) is None:
                return f"no memory budget on {hidden.device.type}"
            found = self._budgets[hidden.device] = budget.Budget(hidden.device)
        if found.reason is not None:
            return found.reason
        known = self._apart.get(region.layer)
        if known is None:
            known = self._apart[region.layer] = (_communication(region),)
        return found if known[0] is None else known[0]

    def _on_step(self, optimizer: object, args: object, kwargs: object) -> None:
        if torch.compiler.is_compiling():
            return
        for each in self._budgets.values():
            if (memory := budget.memory_of(each.device)) is not None:
                each.on_step(memory)


def _left_to_stock(region: Any) -> bool:
    return bool(_STOCK.get()) or KEEP_STOCK_FLAG in region.layer.__dict__ or not torch.is_grad_enabled()


def _why_recomputed(region: Any, args: tuple[Any, ...]) -> str | None:
    """Why a region must be checkpointed as the script wants it, under any policy, or None."""
    if not args or type(args[0]) is not torch.Tensor:
        return "first argument is no plain tensor"
    if not is_plain_checkpoint(region.checkpoint):
        return "other checkpoint function"
    if _reentrant(region.checkpoint) and _recording():
        return "outputs recorded in a reentrant region"
    # An outer region's recompute must save what its forward has saved.
    if torch._C._current_graph_task_id() != -1 or saved_tensors_hooked():
        return "inside another region or saved-tensors hooks"
    return None


def _may_keep(region: Any, args: tuple[Any, ...]) -> bool:
    """A reentrant checkpoint gives no gradients where no argument needs one, and neither may a kept layer."""
    return not _reentrant(region.checkpoint) or any(_needs_gradient(arg) for arg in args)


def _needs_gradient(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _reentrant(checkpoint: Any) -> bool:
    asked = getattr(checkpoint, "keywords", {}).get("use_reentrant")
    return True if asked is None else bool(asked)


def _recording() -> bool:
    """Whether transformers records outputs of modules, router logits for example.

    What is recorded in the forward of a reentrant region has no gradient: a loss made of it (Mixtral's balancing loss)
    trains nothing there. In a kept layer it would.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    return capturing is not None and bool(capturing._active_collector.get())


def _communication(region: Any) -> str | None:
    hooks_inside = not forward_of(region.function, region.layer)[1]
    return communication(region.layer, gathers=hooks_inside and _reentrant(region.checkpoint))


def communication(layer: nn.Module, gathers: bool) -> str | None:
    """What would make a recompute of ``layer`` communicate with other ranks, as far as the layer shows it, or None.

    Args:
        layer: a decoder layer.
        gathers: FSDP2's hooks on the layer would gather again in the recompute: they are inside the region (before
            transformers 5.23), and it is a reentrant one, whose forward leaves them nothing to hang backward on.
    """
    if not budget.several_ranks():
        return None
    for module in layer.modules():
        names = {cls.__name__ for cls in type(module).__mro__}
        if "FullyShardedDataParallel" in names or ("FSDPModule" in names and module is not layer):
            return "units of FSDP inside the layer"
        if "_is_hooked" in module.__dict__ or "_hf_tp_plan" in module.__dict__:
            return "tensor parallelism"
    sharded = any(cls.__name__ == "FSDPModule" for cls in type(layer).__mro__)
    for parameter in layer.parameters():
        if hasattr(parameter, "ds_id"):
            return "ZeRO-3"
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and (not sharded or mesh.ndim > 1):
            return "tensor parallelism"
    if sharded and gathers:
        return "FSDP2 with reentrant checkpoints"
    config = getattr(layer._modules.get("self_attn"), "config", None)
    attention = getattr(config, "_attn_implementation", None)
    return None if attention in _LOCAL_ATTENTION else f"attention {attention}"


def saved_tensors_hooked() -> bool:
    """Whether saved tensors go through somebody's hooks here: an outer checkpoint, ``save_on_cpu``, a profiler."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
