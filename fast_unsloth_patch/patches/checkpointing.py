"""Recompute under gradient checkpointing: which call is a recompute, what it may leave out, and whether it takes place.

Hugging Face's ``GradientCheckpointingLayer`` checkpoints one layer by
``self._gradient_checkpointing_func(partial(forward, self, **kwargs), *args)``. :func:`checkpointing_func` makes that
attribute a property of the layer's class. It hands out the script's own function, which now receives a :class:`_Region`
in place of the partial: one object a checkpointed call, which torch keeps for the backward pass and calls again to
recompute. So the region knows

* by its own call count, whether a call is the forward (the first) or a recompute. "Are we inside backward?" is no test:
  under a user's checkpoint round several layers a layer's first call, whose output is needed, happens inside backward;
* the fast-or-stock decision of the forward (:func:`fast_unsloth_patch.switch.disabled`), and re-enters it in every
  recompute, which on CUDA runs in autograd's thread, where no context variable of the script's is set;
* what the forward hands to its recompute (:func:`keep`, :func:`kept`).

Policies (:func:`set_policy`): ``"stock"`` recomputes everything; the others leave out what nothing reads. ``"full"``
does not recompute the last layer before a fused loss, ``"auto"`` keeps layers from being recomputed as far as memory
allows (both in ``recompute.py``), ``"offload"`` (``offload.py``) moves the layers' inputs to the host.

Why the output of the layer's MLP may be left out in a recompute (:func:`output_unused`). Both of torch's checkpoints
discard what the recompute returns: the reentrant one only hangs the incoming gradient on it (it needs the shape and
the graph, not the values), the non-reentrant one does not look at it. In the stock decoder layer the MLP's output
``y`` goes into ``residual + y`` and from there into the return value only, and an addition saves neither operand for
backward. Hence no gradient depends on the values of ``y``: they may be anything of the right shape, dtype and graph.
Everything that the MLP itself saves for its backward is computed as always. torch's early stop does not do this for
us: an ``autograd.Function`` saves its tensors after its forward has returned, so it cannot be cut short from outside.

Counted (``status()``): regions run and recomputed; as fall-backs those that recomputed everything, and why.

Regions that the script checkpoints itself, by ``torch.utils.checkpoint.checkpoint(layer, ...)`` with Hugging Face's
checkpointing off, hand us no function. Their recompute is recognised on the Python stack
(:func:`layer_end.rerun_by_torch`) and leaves out the same; it is decided by the switch's state at that time (there
``disabled()`` must be round the backward pass too), counts as another forward of the parts, and is neither kept nor
offloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import PatchUnavailableError
from ..status import Tally
from ..switch import _STOCK
from . import layer_end
from .guards import hooked, hooked_globally
from .offload import Offload
from .recompute import Auto, Full

_NAME = "_gradient_checkpointing_func"

_POLICIES: dict[str, type[Full | Auto | Offload] | None] = {
    "full": Full,
    "stock": None,
    "auto": Auto,
    "offload": Offload,
}

_policy = "full"
# What runs the regions in place of the script's checkpoint function; None under "stock".
_runner: Full | Auto | Offload | None = Full()


def set_policy(policy: str) -> None:
    """Choose what a recompute leaves out, and whether it takes place.

    Args:
        policy: ``"stock"``, ``"full"``, ``"auto"`` or ``"offload"``. May change at any time, also between a forward and
            its backward.
    Raises:
        ValueError: another policy.
    """
    global _policy, _runner
    if policy not in _POLICIES:
        raise ValueError(f"recompute policy must be one of {', '.join(map(repr, _POLICIES))}, not {policy!r}")
    if policy == _policy:
        return
    if _runner is not None:
        _runner.stop()
    _policy = policy
    runner = _POLICIES[policy]
    _runner = None if runner is None else runner()
    if _runner is not None:
        _runner.start()


def describe() -> str:
    """What the policy has chosen so far, in words; empty for policies without a choice."""
    return "" if _runner is None else _runner.describe()


def recomputing() -> bool:
    """True inside the second or a later call of a checkpointed region, False elsewhere and while compiling.

    A recompute runs with gradients. What runs without them inside it (a teacher asked from a hook) is a forward of its
    own, for which transformers makes no region from 5.24 on.
    """
    if torch.compiler.is_compiling():
        return False
    region = _REGION.get()
    return region is not None and region.recompute and torch.is_grad_enabled()


def output_unused(module: nn.Module) -> bool:
    """True if nothing will read the values that ``module`` returns in this call.

    Never under the policy ``"stock"``. Only in a recompute of a region that is exactly one decoder layer with a forward
    that ends as the stock one's, checkpointed by torch's own function without ``context_fn``, when ``module`` is that
    layer's ``mlp`` and nobody has hooked what runs. All of it is looked up now, not in the forward: the script may have
    added a hook since.

    Args:
        module: the module that is being called.
    Returns:
        True if the values are not needed; shape, dtype, device and the autograd graph of the output always are.
    """
    if _policy == "stock" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    region = _REGION.get()
    if region is None or not region.recompute:
        layer = layer_end.rerun_by_torch(module)
        tally = None if layer is None else _tally_of(layer)
        if layer is None or tally is None:
            return False
        reason = _why_complete(layer, module, type(layer).forward, hooks_outside=False)
        if reason is None:
            tally.hit(recomputing=True)
    else:
        layer, tally = region.layer, region.tally
        if layer._modules.get("mlp") is not module:
            return False
        forward, hooks_outside = layer_end.forward_of(region.function, layer)
        reason = _why_complete(layer, module, forward, hooks_outside)
        if reason is None and not layer_end.is_plain_checkpoint(region.checkpoint):
            reason = "other checkpoint function"
    if reason is not None:
        tally.fall_back(reason)
    return reason is None


def _why_complete(layer: nn.Module, mlp: nn.Module, forward: object, hooks_outside: bool) -> str | None:
    """Why the recompute must compute the output of the layer's ``mlp`` too, or None: nothing reads it."""
    if hooked(mlp) or (hooked(layer) and not hooks_outside):
        return "hooks on the layer"
    if hooked_globally():
        return "global module hooks"
    return None if layer_end.ends_with_mlp(forward) else "unknown layer forward"


def discarded() -> bool:
    """True if nobody will read what is saved for backward in this call: the forward of a checkpointed region.

    Its recompute saves the same again, and torch's own checkpoint reads only that. Shapes and dtypes must be right: it
    compares them. Never under the policy ``"stock"``, nor for a layer that is kept; nor where other saved-tensors hooks
    inside the region would read it, or where the script has turned gradients on in a reentrant one.
    """
    region = _REGION.get()
    return (
        region is not None
        and not (region.recompute or region.keeps or region.stock)
        and _policy != "stock"
        and layer_end.is_plain_checkpoint(region.checkpoint)
        and (not torch.is_grad_enabled() or layer_end.saved_by_checkpoint())
    )


def keep(module: nn.Module, name: str, *tensors: torch.Tensor | None) -> None:
    """In the forward of a checkpointed region: keep ``tensors`` for the recompute, which asks for them by :func:`kept`.

    For what is small and costs much to compute again, as ``x A^T`` of an adapter. They are detached, and let go when
    the recompute ends or nobody can backpropagate any more. Elsewhere, and under ``"stock"``, nothing is kept.

    Args:
        module: whose they are; with ``name`` the key. A module that runs twice in a region keeps nothing, for a key
            would not tell the calls apart.
        name: what they are.
        tensors: any number, None among them.
    """
    region = _REGION.get()
    if region is None or region.recompute or region.keeps or region.stock or _policy == "stock":
        return
    key = id(module), name
    store = region.store
    if store is None:
        store = region.store = {}
    store[key] = () if key in store else tuple(None if t is None else t.detach() for t in tensors)


def kept(module: nn.Module, name: str) -> tuple[torch.Tensor | None, ...] | None:
    """In a recompute: what :func:`keep` was given under this key in the forward, or None: compute it."""
    region = _REGION.get()
    if region is None or not region.recompute or region.store is None or not torch.is_grad_enabled():
        return None
    return region.store.get((id(module), name)) or None


class _Region:
    """One checkpointed call of one layer: the function that torch runs in the forward and again in each recompute.

    Attributes:
        layer, checkpoint, function, tally: whose call it is, what checkpoints it, what it runs, where it counts.
        recompute: in a call, whether it is the second or a later one.
        stock: the forward's decision, for all calls.
        keeps: there will be no recompute: ``"auto"`` has decided to keep the layer's activations.
        budget: what measures the recompute, or None.
        store: what the forward keeps for the recompute, by module and name.
    """

    __slots__ = (
        "budget",
        "called",
        "checkpoint",
        "function",
        "keeps",
        "layer",
        "recompute",
        "stock",
        "store",
        "tally",
    )

    def __init__(
        self, layer: nn.Module, checkpoint: Callable[..., Any], function: Callable[..., Any], tally: Tally
    ) -> None:
        self.layer = layer
        self.tally = tally
        self.checkpoint = checkpoint
        self.function = function
        self.called = False
        self.recompute = False
        self.keeps = False
        self.budget: Any = None
        self.store: dict[tuple[int, str], tuple[torch.Tensor | None, ...]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.recompute, self.called = self.called, True
        if not self.recompute:
            self.stock = _STOCK.get()
        if self.stock:
            self.tally.fall_back("disabled")
        else:
            self.tally.hit(self.recompute)
        stock_token = _STOCK.set(self.stock)
        # Set for a forward too: if it runs inside another region's recompute, its output is needed there.
        region_token = _REGION.set(self)
        try:
            # A recompute usually ends by an exception: torch's early stop.
            if self.recompute and self.budget is not None:
                return self.budget.rerun(self.function, args, kwargs)
            return self.function(*args, **kwargs)
        finally:
            if self.recompute:
                self.store = None
            _REGION.reset(region_token)
            _STOCK.reset(stock_token)


_REGION: ContextVar[_Region | None] = ContextVar("fast_unsloth_region", default=None)


class _Checkpointed:
    """The script's checkpoint function as its layer sees it: passes a region for the function to be checkpointed.

    Attributes (``keywords`` of a partial, say) are the script's function's. Pickles as that function, without us.
    """

    __slots__ = ("checkpoint", "layer", "tally")

    def __init__(self, layer: nn.Module, checkpoint: Callable[..., Any], tally: Tally) -> None:
        self.tally = tally
        self.layer = layer
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        region = _Region(self.layer, self.checkpoint, function, self.tally)
        # Keywords may be the checkpoint function's or the layer's: whose, a policy cannot tell.
        if _runner is None or kwargs:
            return self.checkpoint(region, *args, **kwargs)
        return _runner.run(region, args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoint, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (self.checkpoint,)


def checkpointing_func(stock: object, tally: Tally) -> property:
    """Build the property that stands for ``_gradient_checkpointing_func`` on a decoder-layer class.

    The script's own function stays in the instance's ``__dict__`` under the same name, where Hugging Face puts it: set
    before the patch, it is found; after ``unapply()`` it is found again; copies and pickles of the layer know nothing
    of us. A plain property, because torch.compile traces one without a graph break (no other descriptor); while
    compiling it returns the script's function itself.

    Args:
        stock: the class attribute of that name; what is neither callable nor a descriptor stands for "there is none".
        tally: counters of the patch.
    Returns:
        The property. It raises ``AttributeError`` while checkpointing was never enabled, as the stock attribute does.
    Raises:
        PatchUnavailableError: the class attribute is a data descriptor: another library keeps the function elsewhere.
    """
    if hasattr(type(stock), "__set__"):
        raise PatchUnavailableError(f"{_NAME} of the class is already a {type(stock).__name__} of another library")
    bind = getattr(type(stock), "__get__", None)
    exists = callable(stock) or bind is not None

    def get(self: Any) -> Any:
        # The instance's dict, said so that torch.compile really looks there: dynamo of torch 2.9 to 2.11 takes
        # self.__dict__[name] for self.name, which is this property again, and so on without end.
        attributes = super(nn.Module, self).__getattribute__("__dict__")
        try:
            checkpoint = attributes[_NAME]
        except KeyError:
            if not exists:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {_NAME!r}") from None
            checkpoint = stock if bind is None else bind(stock, self, type(self))
        if torch.compiler.is_compiling():
            tally.fall_back("compiling")
            return checkpoint
        return _Checkpointed(self, checkpoint, tally)

    def set_(self: Any, value: Any) -> None:
        # What a script reads from one layer and writes to another is ours: keep its own.
        self.__dict__[_NAME] = value.checkpoint if type(value) is _Checkpointed else value

    def delete(self: Any) -> None:
        try:
            del self.__dict__[_NAME]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {_NAME!r}") from None

    get.tally = tally  # type: ignore[attr-defined]
    return property(get, set_, delete, "The checkpoint function that the script chose, told forward from recompute.")


def _tally_of(layer: nn.Module) -> Tally | None:
    """The counters of the property on the class of ``layer``; None: there is none of ours."""
    found = getattr(type(layer), _NAME, None)
    return getattr(found.fget, "tally", None) if type(found) is property else None
