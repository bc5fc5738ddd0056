"""``load_in_4bit`` for Mixtral's experts: what stands for methods of transformers' ``Bnb4BitHfQuantizer``.

transformers 5 keeps the experts of a layer as two parameters, [E, 2I, H] and [E, H, I], and its bitsandbytes quantiser
knows linear layers only. Between its own steps these methods name the experts' parameters as ones to quantise. Its
loader then reads what belongs to one parameter, merges it, hands it over to be quantised, and lets it go before the
next: so no more than one layer's experts are ever there in full.

Whatever else the quantiser does is stock: every method calls the one it stands for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import FastPatchError, warn
from ..quantize import say, wanted
from ..status import Tally
from ..weights import WeightLayoutError
from ..weights.nf4_checkpoint import SUFFIXES, from_dict, register_state_hooks, stored_problem
from ..weights.nf4_experts import Nf4Experts

# Modules whose parameters are stacks of experts, by class and module, and those parameters.
_EXPERTS = {("transformers.models.mixtral.modeling_mixtral", "MixtralExperts"): ("gate_up_proj", "down_proj")}
# Where one layer's stack stands in a checkpoint; the router and the experts have another name there.
_STORED = re.compile(r"(layers\.\d+\.)(?:mlp|block_sparse_moe)(\.experts\.(?:gate_up_proj|down_proj))(?:\.(.+))?$")
_UNIT = 2**30
_BLOCKSIZE = 64  # bitsandbytes' own, which BitsAndBytesConfig cannot change
# On a quantiser that has found experts: their parameters' names.
_NAMES = "_fast_unsloth_experts"


def before_weight_loading(stock: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    """For ``_process_model_before_weight_loading``: which parameters it is about."""

    def _process_model_before_weight_loading(self: Any, model: Any, device_map: Any, **kwargs: Any) -> Any:
        result = stock(self, model, device_map, **kwargs)
        found = list(_stacks(model))
        names = (
            _stored_names(self, found, kwargs.get("checkpoint_files")) if self.pre_quantized else _chosen(self, found)
        )
        if names:
            setattr(self, _NAMES, names)
            # The rules by which a checkpoint's tensors become parameters are asked of this object, under this name by
            # every version; in some its class only inherits the method.
            self.get_weight_conversions = partial(_conversions, self, type(self).get_weight_conversions)
        return result

    return _process_model_before_weight_loading


def param_needs_quantization(stock: Callable[..., bool], tally: Tally) -> Callable[..., bool]:
    """For the method of this name."""

    def needs(self: Any, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in getattr(self, _NAMES, ()) or stock(self, model, param_name, **kwargs)

    return needs


def get_quantize_ops(stock: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    """For the method of this name: one operation for both kinds of parameters, for it is not told which one it is."""

    def ops(self: Any) -> Any:
        return Quantize(self, stock(self), tally) if getattr(self, _NAMES, ()) else stock(self)

    return ops


def after_weight_loading(stock: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    """For ``_process_model_after_weight_loading``: how the model is to be saved, and the line."""

    def _process_model_after_weight_loading(self: Any, model: Any, **kwargs: Any) -> Any:
        result = stock(self, model, **kwargs)
        if names := getattr(self, _NAMES, ()):
            self.__dict__.pop("get_weight_conversions", None)
            _finish(model, names, self.pre_quantized)
        return result

    return _process_model_after_weight_loading


def dequantize(stock: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    """For ``_dequantize``, behind ``model.dequantize()``: experts too."""

    def _dequantize(self: Any, model: Any, dtype: torch.dtype | None = None) -> Any:
        model = stock(self, model, dtype=dtype)
        for _, module, parameter in _stacks(model):
            stack = getattr(module, parameter)
            if isinstance(stack, Nf4Experts):
                setattr(module, parameter, nn.Parameter(stack.dequantize(dtype=dtype), requires_grad=False))
        return model

    return _dequantize


class Quantize:
    """The loader's operation (``ConversionOps``) on what is to be quantised; linear layers go to ``stock``."""

    def __init__(self, hf_quantizer: Any, stock: Any, tally: Tally) -> None:
        self.hf_quantizer = hf_quantizer
        self.stock = stock
        self.tally = tally

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any) -> dict[str, Any]:
        if full_layer_name not in getattr(self.hf_quantizer, _NAMES):
            return self.stock.convert(input_dict, full_layer_name=full_layer_name, **kwargs)
        (found,) = input_dict.values()
        input_dict.clear()
        values = found[0] if isinstance(found, list) else found
        self.tally.hit()
        return {full_layer_name: quantize(values, self.hf_quantizer.quantization_config).as_parameter()}


class Deserialize:
    """The loader's operation on the tensors that `nf4_checkpoint.to_dict` has made."""

    def __init__(self, hf_quantizer: Any, parameter: str) -> None:
        # By an attribute of this name the loader knows that the tensors are not to be cast.
        self.hf_quantizer = hf_quantizer
        self.parameter = parameter

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **_kwargs: Any
    ) -> dict[str, Any]:
        tensors = {
            key.removeprefix(self.parameter).removeprefix("."): value[0] if isinstance(value, list) else value
            for key, value in input_dict.items()
        }
        if full_layer_name not in getattr(self.hf_quantizer, _NAMES):
            return {self.parameter: tensors[""]}  # a stack that was left as it was
        reference = model.get_parameter(full_layer_name)
        stack = from_dict(full_layer_name, tensors, reference.shape, reference.dtype)
        return {self.parameter: stack.as_parameter()}


def quantize(values: Tensor, config: Any) -> Nf4Experts:
    """The stack of the experts [E, N, K], each quantised by bitsandbytes as ``config`` says."""
    from bitsandbytes.functional import quantize_4bit

    return Nf4Experts.stack(
        [
            quantize_4bit(
                expert.contiguous(),
                blocksize=_BLOCKSIZE,
                compress_statistics=config.bnb_4bit_use_double_quant,
                quant_type=config.bnb_4bit_quant_type,
            )
            for expert in values
        ]
    )


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name of the parameter, module, attribute."""
    for name, module in model.named_modules():
        for parameter in _EXPERTS.get((type(module).__module__, type(module).__name__), ()):
            if module._parameters.get(parameter) is not None:
                yield f"{name}.{parameter}", module, parameter


def _chosen(quantizer: Any, found: Sequence[tuple[str, nn.Module, str]]) -> frozenset[str]:
    """The stacks to quantise: those that the configuration does not skip, if it is wanted at all."""
    if not found or not wanted():
        return frozenset()
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = quantizer.modules_to_not_convert
    names, odd = set(), []
    for name, module, parameter in found:
        _, n, k = getattr(module, parameter).shape
        if not should_convert_module(name, skipped):
            continue
        if n * k % _BLOCKSIZE:
            odd.append(f"{name} ({n} x {k})")
        else:
            names.add(name)
    if odd:
        warn(
            "quantize-experts",
            f"not quantised, for an expert is not a multiple of {_BLOCKSIZE} values: {', '.join(odd)}",
        )
    return frozenset(names)


def _stored_names(
    quantizer: Any, found: Sequence[tuple[str, nn.Module, str]], files: Sequence[str] | None
) -> frozenset[str]:
    """The stacks that a checkpoint of a quantised model holds in four bits.

    Raises:
        WeightLayoutError: which tensor is missing or does not fit, expected and found; before anything is loaded.
        FastPatchError: experts are to be quantised, and the checkpoint has them in full.
    """
    if not found:
        return frozenset()
    readable = [file for file in files or () if str(file).endswith(".safetensors")]
    if not readable:  # a state dict from memory, or pickles: the operation looks at what comes
        return frozenset(name for name, _, _ in found) if wanted() else frozenset()
    stored, blobs = _read(readable)
    names = set()
    for name, module, parameter in found:
        match = _STORED.search(name)
        key = name if match is None else match[1] + match[2]
        suffixes = stored.get(key, {})
        if any(suffix for suffix in suffixes):
            problem = stored_problem(name, suffixes, blobs.get(key), getattr(module, parameter).shape)
            if problem is not None:
                raise WeightLayoutError(problem)
            names.add(name)
    if not names and wanted():
        raise FastPatchError(
            "quantize_experts(): this checkpoint is quantised already, its experts are not, and such a one cannot be "
            "quantised further while it is loaded; take the original checkpoint, or call quantize_experts(False)"
        )
    return frozenset(names)


def _read(files: Sequence[str]) -> tuple[dict[str, dict[str, int]], dict[str, Tensor]]:
    """What the headers of the checkpoint say of stacks: elements by suffix, and the settings of the quantisation."""
    from safetensors import safe_open

    stored: dict[str, dict[str, int]] = {}
    blobs: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as reader:
            for key in list(reader.keys()):
                if (match := _STORED.search(key)) is None:
                    continue
                layer, stack, suffix = match.groups("")
                size = 1
                for length in reader.get_slice(key).get_shape():
                    size *= length
                stored.setdefault(layer + stack, {})[suffix] = size
                if suffix.startswith("quant_state."):
                    blobs[layer + stack] = reader.get_tensor(key)
    return stored, blobs


def _conversions(quantizer: Any, stock: Callable[[Any], list[Any]]) -> list[Any]:
    """The rules for the tensors of packed stacks, then the quantiser's own."""
    if not quantizer.pre_quantized:
        return stock(quantizer)
    from transformers.core_model_loading import WeightConverter

    parameters = sorted({name.rpartition(".")[2] for name in getattr(quantizer, _NAMES)})
    targets = [f"experts.{parameter}" for parameter in parameters]
    # The longest names first: some versions take the first that is found anywhere in a key.
    ours = [
        WeightConverter(
            source_patterns=[*(f"{target}.{suffix}" for suffix in SUFFIXES), target],
            target_patterns=target,
            operations=[cast("Any", Deserialize(quantizer, target))],
        )
        for target in targets
    ]
    return [*ours, *stock(quantizer)]


def _finish(model: Any, names: frozenset[str], loaded: bool) -> None:
    """The model's state dict is to have the packed tensors, which are saved under the names that they have there."""
    stacks = {name: getattr(module, parameter) for name, module, parameter in _stacks(model) if name in names}
    packed = {name: stack for name, stack in stacks.items() if isinstance(stack, Nf4Experts)}
    if missing := sorted(stacks.keys() - packed.keys()):
        warn("quantize-experts", f"not quantised, for the checkpoint does not have them: {', '.join(missing)}")
    modules = {id(module): module for name, module, _ in _stacks(model) if name in packed}
    for module in modules.values():
        register_state_hooks(module)
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [c for c in conversions if not _is_undone(c)]
    if packed:
        say(_line(packed, len(modules), loaded))


def _is_undone(conversion: Any) -> bool:
    """Whether saving is to leave out what reverses ``conversion``.

    That would cut a stack up into the linear layers of a checkpoint; and for what unpacks a quantised checkpoint, ours
    or transformers' own, there is no reverse: it raises.
    """
    parameters = tuple(f"experts.{parameter}" for names in _EXPERTS.values() for parameter in names)
    return any(target.endswith(parameters) for target in conversion.target_patterns) or any(
        hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ())
    )


def _line(packed: Mapping[str, Nf4Experts], layers: int, loaded: bool) -> str:
    first = next(iter(packed.values()))
    before = sum(stack.numel() * stack.dtype.itemsize for stack in packed.values())
    after = sum(stack.nbytes for stack in packed.values())
    double = ", double quantisation" if first.absmax2 is not None else ""
    return (
        f"{'loaded' if loaded else 'quantised'} the experts of {layers} layers in {first.quant_type}{double}: "
        f"{after / _UNIT:.2f} GiB instead of {before / _UNIT:.2f} GiB in {str(first.dtype).removeprefix('torch.')}"
    )
