"""Tiny Llamas on quantised bases: NF4 as ``from_pretrained`` loads it, GPTQ as gptqmodel packs it, and what to hold
them against: the stock run, and a float64 model of the same values.

Widths are multiples of 64 and no less: where a block ends within a row, bitsandbytes' CPU kernels do not agree.
bitsandbytes and gptqmodel are imported by the functions that need them.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft import prepare_model_for_kbit_training
from tiny_llama import FP32, LAYERS, assert_as_good, assert_same, fallbacks, hits, llama, lora, patched, run
from torch import nn
from transformers import LlamaForCausalLM

LINEARS = ("peft.linear", "peft.linear4bit", "peft.gptq")
# What takes part besides the loss, which the packed weights do not meet.
IDS = ("llama.rms_norm", "llama.attention", "llama.mlp", "llama.checkpointing", *LINEARS)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PROJECTIONS = 7
Q_V = ["q_proj", "v_proj"]


class Variant(NamedTuple):
    """One way to fine-tune: keyword arguments of the base, of LoRA, and how it is run."""

    base: Mapping[str, Any] = MappingProxyType({})
    lora: Mapping[str, Any] = MappingProxyType({})
    checkpoint: bool | None = None  # use_reentrant; None: no checkpointing
    autocast: torch.dtype | None = None
    kbit: bool = False


BIASES = {"attention_bias": True, "mlp_bias": True}
LORA_BIAS = {"lora_bias": True}
RANKS = {
    "rank_pattern": {"q_proj": 2, "v_proj": 5, "gate_proj": 16, "down_proj": 1},
    # A rank of 1 with the usual alpha would saturate attention, and then even stock is 1e-5 from float64.
    "alpha_pattern": {"q_proj": 3, "v_proj": 10, "up_proj": 5, "down_proj": 2},
}
# Pairs of features, not their product.
VARIANTS = {
    "all seven": Variant(),
    "q, v, reentrant": Variant(lora={"target_modules": Q_V}, checkpoint=True),
    "q, v, biases, autocast, k-bit": Variant(BIASES, {"target_modules": Q_V}, None, BF16, True),
    "lora_bias, biases, non-reentrant, k-bit": Variant(BIASES, LORA_BIAS, False, None, True),
    "lora_bias, reentrant, autocast": Variant({}, LORA_BIAS, True, BF16),
    "rsLoRA, non-reentrant, autocast, k-bit": Variant({}, {"use_rslora": True}, False, BF16, True),
    "rsLoRA, ranks, biases": Variant(BIASES, {"use_rslora": True, **RANKS}),
    "ranks, reentrant, k-bit": Variant({}, RANKS, True, None, True),
    "bf16": Variant({"dtype": BF16}),
    "bf16, biases, lora_bias, autocast": Variant({"dtype": BF16, **BIASES}, LORA_BIAS, None, BF16),
    "bf16, bf16 adapters, ranks, non-reentrant": Variant({"dtype": BF16}, {"adapter_dtype": BF16, **RANKS}, False),
    "bf16, q, v, reentrant, autocast, k-bit": Variant({"dtype": BF16}, {"target_modules": Q_V}, True, BF16, True),
    "bf16, non-reentrant, k-bit": Variant({"dtype": BF16}, {}, False, None, True),
    "bf16, bf16 adapters, autocast, k-bit": Variant({"dtype": BF16}, {"adapter_dtype": BF16}, None, BF16, True),
}


def nf4(dtype: torch.dtype = F32, *, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """Saved in ``dtype`` and loaded in 4 bits; ``options`` of `load_4bit`, the others of the configuration."""
    ours = {name: options.pop(name) for name in LOADING & options.keys()}
    with tempfile.TemporaryDirectory() as folder:
        llama(dtype, seed, **options).save_pretrained(folder)
        return load_4bit(folder, dtype, **ours)


LOADING = {"quant_type", "double", "compute", "storage", "device"}


def load_4bit(
    folder: str,
    dtype: torch.dtype,
    *,
    quant_type: str = "nf4",
    double: bool = True,
    compute: torch.dtype | None = None,
    storage: torch.dtype = torch.uint8,
    device: str = "cpu",
) -> LlamaForCausalLM:
    """The checkpoint in ``folder`` with 4-bit linear layers; ``compute`` is ``dtype`` unless it is given."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute or dtype,
        bnb_4bit_quant_storage=storage,
    )
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map={"": device})
    return model.train()


def gptq(
    dtype: torch.dtype = F32,
    *,
    bits: int = 4,
    group_size: int = 32,
    act_order: bool = False,
    kernel: str = "TorchLinear",
    scales: torch.dtype | None = None,
    inference: bool = False,
    device: str = "cpu",
    seed: int = 0,
    **overrides: Any,
) -> LlamaForCausalLM:
    """Rounded to the nearest values between the extremes of each group, and packed by gptqmodel.

    ``inference`` keeps its tensors, which no one may write to outside inference mode; else they are ordinary copies.
    """
    model = llama(dtype, seed, **overrides)
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            parent, _, child = name.rpartition(".")
            packed = _packed(linear, bits, group_size, act_order, kernel)
            packed.scales = packed.scales.to(scales or (BF16 if dtype is BF16 else F16))
            if not inference:
                for key, tensor in packed.named_buffers():
                    setattr(packed, key, tensor.clone())
            setattr(model.get_submodule(parent), child, packed)
    model.quantization_method = "gptq"  # as transformers marks what it loads
    return model.to(device).train()


def _packed(linear: nn.Linear, bits: int, group_size: int, act_order: bool, kernel: str) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear

    kind = {"TorchLinear": TorchLinear, "TritonV2Linear": TritonV2Linear}[kernel]
    k, n, bias = linear.in_features, linear.out_features, linear.bias
    module = kind(
        bits=bits, group_size=group_size, sym=False, desc_act=act_order, in_features=k, out_features=n,
        bias=bias is not None, pack_dtype=torch.int32,
    )  # fmt: skip
    source = nn.Linear(k, n, bias=bias is not None)
    source.weight.data = linear.weight.data.float()
    if bias is not None:
        source.bias.data = bias.data.float()
    g_idx = torch.arange(k, dtype=torch.int32) // (k if group_size == -1 else group_size)
    if act_order:
        g_idx = g_idx[torch.randperm(k)]
    groups, top = int(g_idx.max()) + 1, 2**bits - 1
    low, high = (
        torch.stack([extreme(source.weight.data[:, g_idx == g], 1).values for g in range(groups)], 1)
        for extreme in (torch.min, torch.max)
    )
    scale = (high - low) / top
    module.pack_block(source, scale, (-low / scale).round().clamp(0, top).to(torch.int32), g_idx)
    if bias is not None:
        module.bias = module.bias.to(bias.dtype)
    return module


def adapted(model, *, kbit: bool = False, checkpoint: bool | None = None, **config: Any):
    """LoRA on it, after ``prepare_model_for_kbit_training`` if ``kbit``; ``checkpoint`` is ``use_reentrant``."""
    if kbit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = lora(model, **config)
    model.enable_input_require_grads()
    if checkpoint is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint})
    return model


def is_packed(module: nn.Module) -> bool:
    # A layer of PEFT shows the weight of its base.
    own = hasattr(module, "qweight") or type(getattr(module, "weight", None)).__name__ == "Params4bit"
    return own and not hasattr(module, "lora_A")


def packed_layers(model) -> dict[str, nn.Module]:
    """The quantised linear layers by name, each once."""
    return {name: module for name, module in model.named_modules() if is_packed(module)}


def values(layer: nn.Module) -> torch.Tensor:
    """The weight [N, K] in the dtype that it is unpacked to, by the library that packed it."""
    if hasattr(layer, "qweight"):
        return layer.dequantize_weight().detach().t()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def in_float64(model):
    """A copy in float64 whose quantised layers are dense."""
    model = copy.deepcopy(model)
    for name, layer in packed_layers(model).items():
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        dense.weight.data = values(layer).double()
        if layer.bias is not None:
            dense.bias.data = layer.bias.data.double()
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, child, dense.requires_grad_(False))
        if hasattr(parent, "quant_linear_module"):
            parent.quant_linear_module = dense
    return model.double()


def requantise(layer: nn.Module, weight: torch.Tensor, blocksize: int = 64) -> None:
    """Another weight in a ``Linear4bit``, quantised as the one before: a new parameter with a new state."""
    from bitsandbytes.nn import Params4bit

    old = layer.weight
    layer.weight = Params4bit(
        weight.to(old.quant_state.dtype),
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=layer,
    ).to(old.device)


def both(model, inputs, ids=IDS, **kwargs):
    """The fast step, the stock step, and the fast forwards by patch, of which the stock step has none."""
    before = hits()
    with patched(*ids):
        fast = run(model, inputs, **kwargs)
    counts = {name: hits()[name] - before[name] for name in before}
    before = hits()
    stock = run(model, inputs, **kwargs)
    assert hits() == before, "the stock arm took the fast path"
    return fast, stock, counts


def assert_counts(counts, *, attention=0, mlp=0, **linears) -> None:
    got = {name: counts[name] for name in ("llama.attention", "llama.mlp", *LINEARS)}
    wanted = {"llama.attention": attention, "llama.mlp": mlp, **{name: 0 for name in LINEARS}}
    assert got == {**wanted, **{f"peft.{name}": times for name, times in linears.items()}}


def check(model, inputs, *, attention=LAYERS, mlp=LAYERS, ids=IDS, tolerance=FP32, exact=None, linears=None, **kwargs):
    """Fast equals stock within ``tolerance``, or, if ``exact`` is given, differs no more than stock's roundings do."""
    fast, stock, counts = both(model, inputs, ids, **kwargs)
    if exact is None:
        assert_same(fast, stock, tolerance)
    else:
        assert_as_good(fast, stock, exact)
    assert_counts(counts, attention=attention, mlp=mlp, **(linears or {}))
    return fast, stock


def check_variant(variant: Variant, model, inputs, **expected: int) -> None:
    """One of the ``VARIANTS``, over ``model``: fast forwards as ``expected``, doubled by checkpointing."""
    model = adapted(model, kbit=variant.kbit, checkpoint=variant.checkpoint, **variant.lora)
    precise = variant.autocast is None and variant.base.get("dtype", F32) is F32
    exact = None if precise else run(in_float64(model), inputs, use_cache=False)
    times = 1 if variant.checkpoint is None else 2
    expected = {name: times * count for name, count in expected.items()}
    attention, mlp = expected.pop("attention"), expected.pop("mlp")
    check(
        model, inputs, attention=attention, mlp=mlp, linears=expected, exact=exact,
        autocast=variant.autocast, use_cache=False,
    )  # fmt: skip


def reasons(patch_id: str):
    """Call it after a step for the reasons that this step added."""
    before = fallbacks(patch_id)
    return lambda: {r: n - before.get(r, 0) for r, n in fallbacks(patch_id).items() if n > before.get(r, 0)}


@torch.no_grad()
def zero(layer: nn.Module) -> None:
    """The weight becomes 0, which both kinds represent exactly."""
    if hasattr(layer, "qweight"):
        layer.scales.zero_()
    else:
        requantise(layer, torch.zeros(layer.out_features, layer.in_features))


def outcome(module: nn.Module, x: torch.Tensor) -> tuple[type, str] | None:
    """The type and text of what ``module(x)`` raises, or None."""
    try:
        module(x)
    except (RuntimeError, ValueError, LookupError, ArithmeticError, AssertionError) as error:
        return type(error), str(error)
    return None
