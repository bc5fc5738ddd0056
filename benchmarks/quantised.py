"""Base weights of four bits in the benchmarks: made layer by layer, filled alike in every implementation, counted.

`qlora`: bitsandbytes' `Linear4bit` as `from_pretrained` makes it with `load_in_4bit`, `bnb_4bit_quant_type="nf4"` and
`bnb_4bit_use_double_quant` (blocks of 64, uint8 storage, compute dtype = the model's). `gptq`: gptqmodel's
`TritonV2Linear`, on a CPU its `TorchLinear`: 4 bits, groups of 128, symmetric, in the order of the columns, fp16
scales. Under `qlora` the stacked weights of experts are packed too, each expert by itself, which is what this library's
`quantize_experts()` makes `from_pretrained` do. Importing this file loads none of these libraries, nor torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

MODES = ("qlora", "gptq")
BLOCKSIZE, BLOCKSIZE2 = 64, 256
BITS, GROUP = 4, 128
# Integers of -7 to 7, uniform but for the zero, which comes twice as often, have a standard deviation of 4.18.
SCALE = 0.02 / 4.18


def _nf4(linear: Any) -> Any:
    """The `Linear4bit` of a dense layer, quantised where its weight is."""
    import bitsandbytes as bnb

    weight = linear.weight.data
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=weight.dtype, compress_statistics=True,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4", module=layer
    )
    return layer.to(weight.device)


def _gptq(linear: Any) -> Any:
    """A GPTQ layer of a dense layer's size; its weight is zero until `fill_gptq`."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear

    on_gpu = linear.weight.is_cuda
    layer = (TritonV2Linear if on_gpu else TorchLinear)(
        bits=BITS, group_size=GROUP, sym=True, desc_act=False, in_features=linear.in_features,
        out_features=linear.out_features, bias=False, pack_dtype=torch.int32, register_buffers=True,
    ).to(linear.weight.device)  # fmt: skip
    layer.qzero_format(format=2)
    # As gptqmodel's loader does. It would compile what dequantises, which a CPU is not here for.
    layer.optimized = not on_gpu
    layer.post_init()
    return layer


def nf4(values: Any) -> tuple[Any, Any]:
    """The bytes and the state that bitsandbytes makes of a weight, as everything here is packed."""
    import bitsandbytes.functional

    found: tuple[Any, Any] = bitsandbytes.functional.quantize_4bit(
        values, blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4"
    )
    return found


def nf4_values(values: Any) -> Any:
    """A weight packed and unpacked, in its own dtype."""
    import bitsandbytes.functional

    return bitsandbytes.functional.dequantize_4bit(*nf4(values))


def _pack_stacks(experts: Any) -> None:
    """Of a layer's experts, stacks of four bits in the place of those that were just made; zero until `fill_stack`."""
    import torch

    from fast_unsloth_patch.weights.nf4_experts import Nf4Experts

    for name, stack in list(experts.named_parameters(recurse=False)):
        zero = nf4(torch.zeros(stack.shape[1:], dtype=stack.dtype, device=stack.device))
        setattr(experts, name, Nf4Experts.stack([zero] * stack.shape[0]).as_parameter())


def is_stack(parameter: Any) -> bool:
    """Is that a stack of experts' weights in four bits? Asked without importing its class."""
    return hasattr(parameter, "stored_dtype")


def fill_stack(parameter: Any, matrices: Iterable[Any]) -> None:
    """Writes what bitsandbytes makes of each expert's values into a packed stack, whose tensors stay the same."""
    parameter.copy_(type(parameter).stack([nf4(values) for values in matrices]))


@contextlib.contextmanager
def packed_layers(mode: str, names: tuple[str, ...]) -> Iterator[None]:
    """While this is entered, every `nn.Linear` that is built as a child of one of these names is a packed one.

    Each is replaced when its parent gets it, so that there is never more than one dense weight at a time; under `qlora`
    so are the stacks of a child named "experts", of which there is never more than one layer's.
    """
    import torch
    from torch.nn.modules.module import register_module_module_registration_hook

    pack = {"qlora": _nf4, "gptq": _gptq}[mode]

    def replace(parent: Any, name: str, child: Any) -> Any:
        stacks = mode == "qlora" and name == "experts"
        if not stacks and (name not in names or type(child) is not torch.nn.Linear):
            return None
        # transformers builds a model with its dtype as the default one; quantising is no part of building
        building = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            if stacks:
                _pack_stacks(child)
            layer = child if stacks else pack(child)
        finally:
            torch.set_default_dtype(building)
        layer._is_hf_initialized = True  # transformers would draw a normal distribution into the packed bytes
        return layer

    handle = register_module_module_registration_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def is_packed_by_qlora(name: str, linears: tuple[str, ...]) -> bool:
    """Is that, by its canonical name, a weight of one of these linear layers, or a stack of experts' weights?"""
    parts = name.split(".")
    return parts[-2:] in ([linear, "weight"] for linear in linears) or parts[-2:-1] == ["experts"]


def is_gptq(module: Any) -> bool:
    return hasattr(module, "qweight") and hasattr(module, "g_idx")


def _layout(packed: Any, state: Any) -> dict[str, Any]:
    """All that decides what the bytes of a 4-bit weight mean, and how many there are."""
    found = {
        "quant_type": state.quant_type, "blocksize": state.blocksize, "dtype": state.dtype, "shape": list(state.shape),
        "storage": packed.dtype, "size": packed.numel(), "double quantisation": state.nested,
    }  # fmt: skip
    tensors = {"absmax": state.absmax}
    if state.nested:
        found["state2.blocksize"] = state.state2.blocksize
        tensors |= {"offset": state.offset, "state2.absmax": state.state2.absmax, "state2.code": state.state2.code}
    for name, tensor in tensors.items():
        found[name] = f"{tensor.dtype} [{tensor.numel()}]" if hasattr(tensor, "numel") else type(tensor).__name__
    return found


def fill_nf4(name: str, parameter: Any, values: Any) -> None:
    """Writes what bitsandbytes makes of `values` into a packed parameter and its state, whose tensors stay the same.

    Raises:
        ValueError: the parameter's layout is not the one that `_nf4` gives to the stock arm.
    """
    packed, new = nf4(values)
    state = parameter.quant_state
    expected, found = _layout(packed, new), _layout(parameter, state)
    for what in expected:
        if found.get(what) != expected[what]:
            raise ValueError(f"{name}: {what}: expected {expected[what]}, found {found.get(what)}")
    pairs = [(parameter.data, packed), (state.absmax, new.absmax), (state.offset, new.offset)]
    pairs += [(state.state2.absmax, new.state2.absmax), (state.state2.code, new.state2.code)]
    for old, wanted in pairs:
        old.copy_(wanted.view_as(old))


def fill_gptq(module: Any, generator: Any) -> None:
    """Draws integers and scales so that the weight is about N(0, 0.02); the zero points are 8."""
    import torch

    device, size = module.qweight.device, module.qweight.shape
    words = torch.randint(-(2**31), 2**31, size, generator=generator, device=device, dtype=torch.int32)
    # A field of 0 becomes 8, or else the mean would not be zero.
    some = (words | words >> 1 | words >> 2 | words >> 3) & 0x11111111
    module.qweight.copy_(words | (some ^ 0x11111111) << 3)
    module.qzeros.fill_(0x88888888 - 2**32)
    # not all alike: a wrong group has to show
    spread = torch.rand(module.scales.shape, generator=generator, device=device)
    module.scales.copy_(SCALE * (0.75 + 0.5 * spread))


def packed_weights(model: Any) -> int:
    """How many base weights are packed."""
    fours = sum(hasattr(p, "quant_state") or is_stack(p) for p in model.parameters())
    return fours + sum(map(is_gptq, model.modules()))


def packed_bytes(mode: str, n: int, k: int) -> float:
    """Bytes of one packed weight [n, k]."""
    if mode == "qlora":
        blocks = n * k / BLOCKSIZE
        return n * k / 2 + blocks + 4 * blocks / BLOCKSIZE2
    groups = -(-k // GROUP)
    return n * k * BITS / 8 + groups * n * (2 + BITS / 8)
