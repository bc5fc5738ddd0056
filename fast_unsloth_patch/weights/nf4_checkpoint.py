"""A stack of 4-bit experts in a state dict or a checkpoint.

It stands there as bitsandbytes' own weights do, under its name and the suffixes of `to_dict`. Only the offset of the
double quantisation, one number for a matrix, is a list here, one number an expert.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..reference.nf4 import CODES
from . import WeightLayoutError
from .nf4_experts import OFFSET_WIDTH, Nf4Experts, Packed, layout_problem

__all__ = ["SUFFIXES", "from_dict", "register_state_hooks", "stored_problem", "to_dict"]

STATE = "quant_state.bitsandbytes__"
# What may follow the name of a stack and a dot.
SUFFIXES = ("nested_absmax", "nested_quant_map", "quant_map", "absmax", *(STATE + quant_type for quant_type in CODES))


def to_dict(stack: Nf4Experts) -> dict[str, Tensor]:
    """The tensors of a state dict by the suffix of their name; the packed values, [E N K / 2, 1], have none."""
    settings: dict[str, Any] = {
        "quant_type": stack.quant_type,
        "blocksize": stack.blocksize,
        "dtype": str(stack.stored_dtype).removeprefix("torch."),
        "shape": list(stack.shape),
    }
    code = torch.tensor(CODES[stack.quant_type], dtype=torch.float32, device=stack.device)
    tensors = {"": stack.packed.view(-1, 1), "absmax": stack.absmax.view(-1), "quant_map": code}
    if stack.absmax2 is not None and stack.code2 is not None and stack.offset is not None:
        # A copy of the code: stacks may share it, and safetensors refuses tensors that share storage.
        tensors.update(nested_absmax=stack.absmax2.view(-1), nested_quant_map=stack.code2.clone())
        settings.update(
            nested_blocksize=stack.blocksize2, nested_dtype="float32", nested_offset=stack.offset[:, 0].tolist()
        )
    blob = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8, device=stack.device)
    return {**tensors, STATE + stack.quant_type: blob}


def from_dict(
    name: str, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype | None = None
) -> Nf4Experts:
    """The stack of what `to_dict` made, or of what a checkpoint holds in its place.

    Args:
        name: of the parameter, for messages.
        tensors: by suffix.
        shape: of the parameter, [E, N, K].
        dtype: of the parameter; default the one that the weights had before they were quantised.

    Raises:
        WeightLayoutError: which tensor is missing or does not fit, expected and found.
    """
    blob = next((tensor for suffix, tensor in tensors.items() if suffix.startswith(STATE)), None)
    problem = stored_problem(name, {suffix: tensor.numel() for suffix, tensor in tensors.items()}, blob, shape)
    if problem is not None or blob is None:
        raise WeightLayoutError(problem)
    settings = _settings(name, blob)
    experts, stored = shape[0], getattr(torch, settings["dtype"])
    absmax2 = code2 = offset = None
    if "nested_offset" in settings:
        absmax2, code2 = tensors["nested_absmax"].reshape(experts, -1), tensors["nested_quant_map"]
        first = torch.tensor(settings["nested_offset"], dtype=torch.float32, device=tensors[""].device)
        offset = nn.functional.pad(first[:, None], (0, OFFSET_WIDTH - 1))
    parts = Packed(
        tensors[""].reshape(experts, -1), tensors["absmax"].reshape(experts, -1), absmax2, code2, offset,
        settings["quant_type"], settings["blocksize"], settings.get("nested_blocksize", 0),
    )  # fmt: skip
    problem = layout_problem(parts, shape, stored)
    if problem is not None:
        raise WeightLayoutError(f"{name}: {problem}")
    return Nf4Experts.wrap(parts, shape, dtype or stored, stored)


def stored_problem(name: str, found: Mapping[str, int], blob: Tensor | None, shape: Sequence[int]) -> str | None:
    """What about a stack in a checkpoint does not fit (which tensor, expected and found), or None.

    Args:
        name: of the parameter.
        found: how many elements each of its tensors has, by suffix.
        blob: the one whose suffix begins with ``quant_state``, which says how it is quantised.
        shape: of the parameter, [E, N, K].

    Raises:
        WeightLayoutError: a blob that says nothing.
    """
    if blob is None:
        return f"{name}.{STATE}nf4 (or fp4): expected the settings of the quantisation, found no such tensor"
    settings = _settings(name, blob)
    if settings["shape"] != list(shape):
        return f"{name}: expected {list(shape)}, found {settings['shape']} in the checkpoint"
    blocks = -(-math.prod(shape[1:]) // settings["blocksize"])
    expected = {"": math.prod(shape) // 2, "absmax": shape[0] * blocks}
    if "nested_offset" in settings:
        offsets, blocks2 = settings["nested_offset"], -(-blocks // settings["nested_blocksize"])
        expected.update(nested_absmax=shape[0] * blocks2, nested_quant_map=256)
        if not isinstance(offsets, list) or len(offsets) != shape[0]:
            return f"{name}.{STATE}*: expected {shape[0]} nested offsets, found {offsets!r}"
    for suffix, numel in expected.items():
        if suffix not in found:
            return f"{_key(name, suffix)}: expected {numel} elements, found no such tensor"
        if found[suffix] != numel:
            return f"{_key(name, suffix)}: expected {numel} elements for {list(shape)}, found {found[suffix]}"
    return None


def _settings(name: str, blob: Tensor) -> dict[str, Any]:
    try:
        settings = json.loads(bytes(blob.reshape(-1).tolist()))
        sizes = [settings["blocksize"], *([settings["nested_blocksize"]] if "nested_offset" in settings else [])]
        known = settings["quant_type"] in CODES and isinstance(settings["shape"], list)
        known = known and isinstance(getattr(torch, settings["dtype"], None), torch.dtype)
    except (ValueError, TypeError, KeyError) as error:
        raise WeightLayoutError(f"{name}.{STATE}*: expected bitsandbytes' settings in JSON, found {error!r}") from error
    if not known or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise WeightLayoutError(f"{name}.{STATE}*: expected settings of nf4 or fp4, found {settings}")
    return settings


def register_state_hooks(module: nn.Module) -> None:
    """From now on ``module.state_dict()`` has the tensors of `to_dict` in the place of a stack, as bitsandbytes' own
    layers do, and ``load_state_dict`` takes them.
    """
    module.register_state_dict_post_hook(_unstack)
    module.register_load_state_dict_pre_hook(_restack)


def _unstack(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in module._parameters:
        stack = state.get(prefix + name)
        if isinstance(stack, Nf4Experts):
            state.update({_key(prefix + name, suffix): part for suffix, part in to_dict(stack).items()})


def _restack(module: nn.Module, state: dict[str, Any], prefix: str, *_report: Any) -> None:
    for name, parameter in module._parameters.items():
        base = prefix + name
        suffixes = [suffix for suffix in ("", *SUFFIXES) if _key(base, suffix) in state]
        if parameter is None or suffixes in ([], [""]):
            continue
        tensors = {suffix: state.pop(_key(base, suffix)) for suffix in suffixes}
        stack = state[base] = from_dict(base, tensors, parameter.shape, parameter.dtype)
        if not isinstance(parameter, Nf4Experts):
            module.register_parameter(name, nn.Parameter(stack.to(parameter.device), requires_grad=False))


def _key(name: str, suffix: str) -> str:
    return f"{name}.{suffix}" if suffix else name
