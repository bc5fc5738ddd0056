"""Tiny Mixtrals and their sparse blocks, with LoRA on the experts or without, and runs of both paths to compare."""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from tiny_llama import FP32, backwards, distance, fill_adapters, hits, patched
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock, MixtralTopKRouter

from fast_unsloth_patch.weights.nf4_experts import Nf4Experts, Packed

HIDDEN, INTER, EXPERTS, CHOICES, LAYERS = 32, 48, 4, 2, 2
MOE = "mixtral.moe"
# PEFT before 0.20 adapts a stack [E, N, K] by A [E r, N] and B [K, r E]. Only the newer layout has a fast path.
TURNED_ROUND = "_did_swap_in_out_features" not in inspect.getsource(ParamWrapper)

_TINY: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": CHOICES,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
    "pad_token_id": 0,
}


def config(experts: str | None = "grouped_mm", **overrides: Any) -> MixtralConfig:
    return MixtralConfig(**{**_TINY, "experts_implementation": experts, **overrides})


def _fill(module: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.7 / parameter.shape[-1] ** 0.5)


def block(dtype: torch.dtype = torch.float32, experts: str | None = "grouped_mm", **overrides: Any):
    """A sparse block by itself."""
    torch.manual_seed(0)
    made = MixtralSparseMoeBlock(config(experts, **overrides))
    _fill(made)
    return made.to(dtype).train()


def mixtral(dtype: torch.dtype = torch.float32, experts: str | None = "grouped_mm", **overrides: Any):
    torch.manual_seed(0)
    made = MixtralForCausalLM(config(experts, **overrides))
    _fill(made)
    return made.to(dtype).train()


EXPERTS_ONLY = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": []}


def lora(model, *, adapter_dtype: torch.dtype | None = None, **overrides: Any):
    """PEFT's LoRA, by default on the experts only, with a B that is not zero."""
    values: dict[str, Any] = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0}
    if not {"target_modules", "target_parameters"} & overrides.keys():
        values.update(EXPERTS_ONLY)
    model = get_peft_model(model, LoraConfig(**{**values, **overrides}))
    fill_adapters(model, 1, adapter_dtype)
    return model.train()


class Net(nn.Module):
    """A sparse block where PEFT and ``step`` can find it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x)


def lora_block(dtype: torch.dtype = torch.float32, experts: str | None = "grouped_mm", adapter_dtype=None, **overrides):
    return lora(Net(block(dtype, experts)), adapter_dtype=adapter_dtype, **overrides)


def block_of(model) -> nn.Module:
    """The first sparse block in ``model``."""
    return next(m for m in model.modules() if isinstance(m, MixtralSparseMoeBlock))


def experts_of(model) -> nn.Module:
    """Its bare experts, inside whatever wrappers."""
    experts = block_of(model).experts
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
    return experts


def wrapper_of(model, name: str) -> nn.Module:
    """PEFT's wrapper of the parameter ``name``."""
    experts = block_of(model).experts
    while experts.parameter_name != name:
        experts = experts.base_layer
    return experts


def in_four_bits(model) -> nn.Module:
    """Makes the experts' weights 4-bit ones of random values. Returns a copy that has these values as plain weights."""
    generator = torch.Generator().manual_seed(7)
    stacks = {}
    for name in ("gate_up_proj", "down_proj"):
        experts, n, k = shape = getattr(experts_of(model), name).shape
        packed = torch.randint(0, 256, (experts, n * k // 2), generator=generator, dtype=torch.uint8)
        absmax = 0.4 * torch.rand(experts, n * k // 64, generator=generator)
        parts = Packed(packed, absmax, None, None, None, "nf4", 64, 0)
        stacks[name] = Nf4Experts.of(parts, shape, getattr(experts_of(model), name).dtype)
        setattr(experts_of(model), name, nn.Parameter(stacks[name].dequantize(), requires_grad=False))
    plain = copy.deepcopy(model)
    for name, stack in stacks.items():
        setattr(experts_of(model), name, stack.as_parameter())
    return plain


def favour(model, *shares: float) -> None:
    """Bias every gate by its hook, so that the experts with larger shares get more tokens; -inf: none."""

    def hook(module, args, output):
        logits = output[0] + torch.tensor(shares, dtype=output[0].dtype)
        top, index = logits.float().softmax(-1).topk(module.top_k, dim=-1)
        return logits, top / top.sum(-1, keepdim=True), index

    for module in model.modules():
        if isinstance(module, MixtralTopKRouter):
            module.register_forward_hook(hook)


def fix_routing(model, seed: int = 5) -> None:
    """Every gate chooses by chance instead of by its logits; its weights stay the softmax of the chosen ones.

    Where two runs round differently, near ties fall to one expert in the one and to another in the other: no tolerance
    holds for that.
    """

    def hook(module, args, output):
        logits = output[0]
        generator = torch.Generator().manual_seed(seed)
        index = torch.rand(logits.shape, generator=generator).topk(module.top_k, dim=-1).indices
        chosen = logits.float().softmax(-1).gather(1, index)
        return logits, chosen / chosen.sum(-1, keepdim=True), index

    for module in model.modules():
        if isinstance(module, MixtralTopKRouter):
            module.register_forward_hook(hook)


def data(shape: tuple[int, ...] = (2, 9), dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(*shape, HIDDEN, generator=generator).to(dtype),
        torch.randn(*shape, HIDDEN, generator=generator),
    )


def step(model, x: torch.Tensor, dy: torch.Tensor, autocast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Output, dx, router logits and the gradient of every parameter that has one, of a sparse block."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    logits: list[torch.Tensor] = []
    handle = block_of(model).gate.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
        y = model(x)
    handle.remove()
    assert len(logits) == 1, "the gate runs once"
    y.backward(dy.to(y.dtype))
    result = {"y": y.detach(), "dx": x.grad, "router logits": logits[0].detach()}
    result |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return result


def in_float64(model):
    """A copy in float64, with the implementation that takes it."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, MixtralExperts):
            module.config._experts_implementation = "eager"
    return model


def exact_step(model, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Stock's step in float64, from the same weights."""
    return step(in_float64(model), x.double(), dy)


def both_steps(model, x, dy, autocast=None, *, fast: bool = True):
    """A step with the patch, taken ``fast`` or not at all, and one without."""
    with patched(MOE):
        before, behind = hits()[MOE], backwards()[MOE]
        new = step(model, x, dy, autocast)
        assert hits()[MOE] - before == backwards()[MOE] - behind == int(fast)
    before = hits()[MOE]
    stock = step(model, x, dy, autocast)
    assert hits()[MOE] == before
    assert new.keys() == stock.keys()
    for name, expected in stock.items():
        assert new[name].dtype == expected.dtype and new[name].shape == expected.shape, name
    return new, stock


def compare(
    model, *, shape=(2, 9), dtype=torch.float32, autocast=None, fast: bool = True, tolerance: float = FP32
) -> dict[str, torch.Tensor]:
    """Fast equals stock in everything that ``step`` returns."""
    new, stock = both_steps(model, *data(shape, dtype), autocast, fast=fast)
    assert_close(new, stock, tolerance if fast else 0.0)
    return stock


def assert_close(new: dict[str, torch.Tensor], stock: dict[str, torch.Tensor], tolerance: float) -> None:
    far = {name: distance(new[name], stock[name]) for name in stock if distance(new[name], stock[name]) > tolerance}
    assert not far, far


def as_good(new, stock, exact, factor: float = 2.5) -> None:
    """Low precision: fast and stock differ by no more than their roundings do (`tiny_llama.assert_as_good`)."""
    far = {}
    for name, expected in stock.items():
        error = distance(expected, exact[name])
        if distance(new[name], expected) > factor * error:
            far[name] = (distance(new[name], expected), error)
    assert not far, far
