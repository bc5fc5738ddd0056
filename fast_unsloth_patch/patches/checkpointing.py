"""Recompute policy under gradient checkpointing: which call is a recompute, and what it need not compute.

Hugging Face's ``GradientCheckpointingLayer`` checkpoints one layer by
``self._gradient_checkpointing_func(partial(forward, self, **kwargs), *args)``. :func:`checkpointing_func` makes that
attribute a property of the layer's class. It hands out the script's own function, which now receives a :class:`_Region`
in place of the partial: one object a checkpointed call, which torch keeps for the backward pass and calls again to
recompute. So the region knows

* by its own call count, whether a call is the forward (the first) or a recompute. "Are we inside backward?" is no test:
  under a user's checkpoint round several layers a layer's first call, whose output is needed, happens inside backward;
* the fast-or-stock decision of the forward (:func:`fast_unsloth_patch.switch.disabled`), and re-enters it in every
  recompute, which on CUDA runs in autograd's thread, where no context variable of the script's is set.

Why the output of the layer's MLP may be left out in a recompute (:func:`output_unused`). Both of torch's checkpoints
discard what the recompute returns: the reentrant one only hangs the incoming gradient on it (it needs the shape and
the graph, not the values), the non-reentrant one does not look at it. In the stock decoder layer the MLP's output
``y`` goes into ``residual + y`` and from there into the return value only, and an addition saves neither operand for
backward. Hence no gradient depends on the values of ``y``: they may be anything of the right shape, dtype and graph.
Everything that the MLP itself saves for its backward is computed as always. torch's early stop does not do this for
us: an ``autograd.Function`` saves its tensors after its forward has returned, so it cannot be cut short from outside.

Counted (``status()``): regions run and recomputed; as fall-backs those that recomputed everything, and why.

Limit: a region that the script checkpoints itself, with Hugging Face's checkpointing off, is not seen. It recomputes
everything, and by the switch's state at that time: there ``disabled()`` must be round the backward pass too.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module_globals
from torch.utils import checkpoint as _torch_checkpoint

from ..errors import PatchUnavailableError
from ..status import Tally
from ..switch import _STOCK

_NAME = "_gradient_checkpointing_func"
_POLICIES = ("full", "stock")

# Arguments of torch's checkpoint that do not look at what the region computes. `context_fn` does (selective
# checkpointing replays outputs by their order), `debug` compares the operations of forward and recompute.
_HARMLESS = {"use_reentrant", "preserve_rng_state", "determinism_check", "early_stop"}

# The end of the stock decoder layer, from which `output_unused` draws its conclusion.
_TAIL = ["hidden_states = self.mlp(hidden_states)", "hidden_states = residual + hidden_states", "return hidden_states"]

_policy = "full"


def set_policy(policy: str) -> None:
    """Choose what a recompute leaves out: ``"full"``, everything that is not needed, or ``"stock"``, nothing.

    Args:
        policy: ``"full"`` or ``"stock"``. May change at any time, also between a forward and its backward.
    Raises:
        ValueError: another policy.
    """
    global _policy
    if policy not in _POLICIES:
        raise ValueError(f"recompute policy must be one of {', '.join(map(repr, _POLICIES))}, not {policy!r}")
    _policy = policy


def recomputing() -> bool:
    """True inside the second or a later call of a checkpointed region, False elsewhere and while compiling.

    A recompute runs with gradients. What runs without them inside it (a teacher asked from a hook) is a forward of its
    own, for which transformers makes no region from 5.24 on.
    """
    return not torch.compiler.is_compiling() and _RECOMPUTED.get() is not None and torch.is_grad_enabled()


def output_unused(module: nn.Module) -> bool:
    """True if nothing will read the values that ``module`` returns in this call.

    Only under the policy ``"full"``, in a recompute of a region that is exactly one decoder layer with the stock
    forward, checkpointed by torch's own function without ``context_fn``, when ``module`` is that layer's ``mlp`` and
    neither it nor the layer is hooked. All of it is looked up now, not in the forward: the script may have added a
    hook since.

    Args:
        module: the module that is being called.
    Returns:
        True if the values are not needed; shape, dtype, device and the autograd graph of the output always are.
    """
    if _policy != "full" or not recomputing():
        return False
    region = _RECOMPUTED.get()
    if region is None or region.layer._modules.get("mlp") is not module:
        return False
    reason = region.why_complete(module)
    if reason is not None:
        region.tally.fall_back(reason)
    return reason is None


class _Region:
    """One checkpointed call of one layer: the function that torch runs in the forward and again in each recompute."""

    __slots__ = ("called", "checkpoint", "function", "layer", "stock", "tally")

    def __init__(
        self, layer: nn.Module, checkpoint: Callable[..., Any], function: Callable[..., Any], tally: Tally
    ) -> None:
        self.layer = layer
        self.tally = tally
        self.checkpoint = checkpoint
        self.function = function
        self.called = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recompute, self.called = self.called, True
        if not recompute:
            self.stock = _STOCK.get()
        if self.stock:
            self.tally.fall_back("disabled")
        else:
            self.tally.hit(recompute)
        if not recompute and _RECOMPUTED.get() is None:
            return self.function(*args, **kwargs)
        stock_token = _STOCK.set(self.stock)
        # None for a forward: if it runs inside another region's recompute, its output is needed there.
        region_token = _RECOMPUTED.set(self if recompute else None)
        try:
            # A recompute usually ends by an exception: torch's early stop.
            return self.function(*args, **kwargs)
        finally:
            _RECOMPUTED.reset(region_token)
            _STOCK.reset(stock_token)

    def why_complete(self, mlp: nn.Module) -> str | None:
        """Why the recompute must compute the output of the layer's ``mlp`` too, or None: nothing reads it."""
        if _hooked(self.layer) or _hooked(mlp):
            return "hooks on the layer"
        if _hooked_globally():
            return "global module hooks"
        if not _ends_with_mlp(_forward_of(self.function, self.layer)):
            return "unknown layer forward"
        return None if _is_plain_checkpoint(self.checkpoint) else "other checkpoint function"


_RECOMPUTED: ContextVar[_Region | None] = ContextVar("fast_unsloth_recomputed_region", default=None)


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
        return self.checkpoint(_Region(self.layer, self.checkpoint, function, self.tally), *args, **kwargs)

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

    return property(get, set_, delete, "The checkpoint function that the script chose, told forward from recompute.")


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _hooked_globally() -> bool:
    return bool(
        _module_globals._global_forward_hooks
        or _module_globals._global_forward_pre_hooks
        or _module_globals._global_backward_hooks
        or _module_globals._global_backward_pre_hooks
    )


def _forward_of(function: object, layer: nn.Module) -> object:
    """The plain forward that ``function`` runs if it runs ``layer`` and nothing else, otherwise None.

    transformers 5.23 passes ``partial(forward, layer, **kwargs)``; before it ``partial(super().__call__, **kwargs)``,
    which is ``nn.Module.__call__`` bound to the layer.
    """
    if type(function) is not partial:
        return None
    inner, args = function.func, function.args
    if len(args) == 1 and args[0] is layer:
        return inner
    if not args and inner == MethodType(nn.Module.__call__, layer):
        return type(layer).forward
    return None


@lru_cache(maxsize=64)
def _ends_with_mlp(forward: object) -> bool:
    """Is ``forward`` written as the stock decoder layer's: the MLP once, added to the residual, and returned?

    Reads the source of the code that runs (not of what it claims to wrap), so a replaced forward is judged by itself;
    no source, no claim. The one wrapper that is looked through is transformers' own for renamed arguments (from 5.24 on
    on the layer's forward), which calls what it wraps and returns its result.
    """
    while isinstance(forward, FunctionType) and forward.__globals__["__name__"] == "transformers.utils.deprecation":
        forward = forward.__wrapped__  # type: ignore[attr-defined]
    if not isinstance(forward, FunctionType):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward.__code__))).body[0]
    except (OSError, SyntaxError):
        return False
    if not isinstance(tree, ast.FunctionDef) or [ast.unparse(line) for line in tree.body[-len(_TAIL) :]] != _TAIL:
        return False
    return sum(isinstance(node, ast.Attribute) and node.attr == "mlp" for node in ast.walk(tree)) == 1


def _is_plain_checkpoint(checkpoint: object) -> bool:
    """Is it torch's own ``checkpoint``, bare or with arguments that do not look at what the region computes?"""
    if type(checkpoint) is partial:
        if checkpoint.args or not _HARMLESS.issuperset(checkpoint.keywords):
            return False
        checkpoint = checkpoint.func
    # Some libraries put their own function in torch's place, so the name alone proves nothing.
    return (
        checkpoint is _torch_checkpoint.checkpoint
        and isinstance(checkpoint, FunctionType)
        and checkpoint.__globals__["__name__"].startswith("torch.")
    )
