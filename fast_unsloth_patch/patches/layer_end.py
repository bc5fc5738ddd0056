"""What ``checkpointing.output_unused`` must know before it believes that nobody reads a decoder layer's MLP.

Four questions, each answered from the code that runs, never from names that it carries: does a function run this
layer and nothing else (:func:`forward_of`); does a forward hand the MLP's values on into its result and nowhere else
(:func:`ends_with_mlp`); is what it saves for backward seen by torch's checkpoint alone (:func:`saved_by_checkpoint`);
and, for a region that the script checkpoints itself, is torch's checkpoint recomputing this very layer
(:func:`rerun_by_torch`).
"""

from __future__ import annotations

import ast
import dis
import inspect
import sys
import textwrap
from functools import lru_cache, partial
from types import CodeType, FrameType, FunctionType, MethodType

import torch
from torch import nn
from torch.utils import checkpoint as _torch_checkpoint

# Arguments of torch's checkpoint that do not look at what the region computes. `context_fn` does (selective
# checkpointing replays outputs by their order), `debug` compares the operations of forward and recompute.
_HARMLESS = {"use_reentrant", "preserve_rng_state", "determinism_check", "early_stop"}

# The end of the stock decoder layer.
_TAIL = ["hidden_states = self.mlp(hidden_states)", "hidden_states = residual + hidden_states", "return hidden_states"]

# Wrappers of transformers' own that call what they wrap and return its result: for renamed arguments (from 5.24 on on
# the layer's forward), and the one that checkpoints it (from 5.23 on).
_TRANSPARENT = ("transformers.utils.deprecation", "transformers.modeling_layers")

# Our own decoder layers say it of themselves. The mark is believed only of code of this package: `functools.wraps`
# copies it onto whatever wraps the forward.
_MARK = "ends_with_mlp"
_OURS = __name__.rpartition(".")[0] + "."

# Frames between the call of the MLP and the call of its layer: the forwards of both, and what wraps them.
_NEAR = 16


def forward_of(function: object, layer: nn.Module) -> tuple[object, bool]:
    """The plain forward that ``function`` runs if it runs ``layer`` and nothing else, and whether without its hooks.

    transformers 5.23 passes ``partial(forward, layer, **kwargs)``: the layer's hooks stay outside the region. Before
    it, ``partial(super().__call__, **kwargs)``, which is ``nn.Module.__call__`` bound to the layer.
    """
    if type(function) is partial:
        inner, args = function.func, function.args
        if len(args) == 1 and args[0] is layer:
            return inner, True
        if not args and inner == MethodType(nn.Module.__call__, layer):
            return type(layer).forward, False
    return None, False


@lru_cache(maxsize=64)
def ends_with_mlp(forward: object) -> bool:
    """Is ``forward`` written as the stock decoder layer's: the MLP once, added to the residual, and returned?

    Reads the source of the code that runs (not of what it claims to wrap), so a replaced forward is judged by itself;
    no source, no claim.
    """
    while type(forward) is FunctionType and forward.__globals__["__name__"] in _TRANSPARENT:
        forward = forward.__dict__.get("__wrapped__")
    if type(forward) is not FunctionType:  # wrapt's wrappers say that they are instances of it.
        return False
    if forward.__globals__["__name__"].startswith(_OURS):
        return forward.__dict__.get(_MARK) is True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward.__code__))).body[0]
    except (OSError, SyntaxError):
        return False
    if not isinstance(tree, ast.FunctionDef) or [ast.unparse(line) for line in tree.body[-len(_TAIL) :]] != _TAIL:
        return False
    return sum(isinstance(node, ast.Attribute) and node.attr == "mlp" for node in ast.walk(tree)) == 1


def is_plain_checkpoint(checkpoint: object) -> bool:
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


def saved_by_checkpoint() -> bool:
    """Whether what is saved for backward here goes to a non-reentrant checkpoint of torch's, and to no other hooks."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", None) == _torch_checkpoint.__name__


def rerun_by_torch(mlp: nn.Module) -> nn.Module | None:
    """The layer that holds ``mlp``, if torch's checkpoint is calling it again and will discard what it returns.

    For ``torch.utils.checkpoint.checkpoint(layer, ...)`` of the script's own. The Python stack says who called the
    layer: torch's recomputation itself (``recompute_fn`` throws the result away, ``CheckpointFunction.backward`` only
    hangs the incoming gradients on it), directly or through functions that return the layer's result as their own.
    A layer's first call inside another region's recompute has another caller, and a region of several layers ends in
    code that does more with the result than return it: of both nothing is claimed.

    Args:
        mlp: the module that is being called.
    Returns:
        The layer, or None. Whether its forward and its hooks allow to leave something out is not looked at.
    """
    # Selective checkpointing counts operations, in a dispatch mode.
    if torch._C._current_graph_task_id() == -1 or torch._C._len_torch_dispatch_stack():
        return None
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_NEAR):
        if frame is None:
            return None
        if frame.f_code is _CALL:
            module = frame.f_locals["self"]
            if module._modules.get("mlp") is mlp:
                break
        frame = frame.f_back
    else:
        return None
    caller = frame.f_back
    if caller is None or caller.f_code is not _WRAPPED_CALL:
        return None
    caller = caller.f_back
    while caller is not None and not _is_recomputation(caller.f_code):
        if not _returns_what_it_called(caller.f_code, caller.f_lasti):
            return None
        caller = caller.f_back
    return None if caller is None else module


_CALL = nn.Module._call_impl.__code__
_WRAPPED_CALL = nn.Module._wrapped_call_impl.__code__
_REENTRANT = inspect.unwrap(_torch_checkpoint.CheckpointFunction.backward).__code__


def _is_recomputation(code: CodeType) -> bool:
    return code is _REENTRANT or (
        code.co_name == "recompute_fn" and code.co_filename == _REENTRANT.co_filename and "fn" in code.co_freevars
    )


@lru_cache(maxsize=256)
def _returns_what_it_called(code: CodeType, last: int) -> bool:
    """Is the call that a frame of ``code`` is in, at offset ``last``, followed by the return of its result?"""
    called = False
    for instruction in dis.get_instructions(code):
        if called and instruction.offset > last:
            return instruction.opname == "RETURN_VALUE"
        # The offset of a running call may point into the cache behind it.
        called = instruction.offset <= last and instruction.opname.startswith("CALL")
    return False
