"""Tiny Llamas, Mistrals, Mixtrals, plain or with LoRA, the patches on or off, and runs of both arms to compare."""

from __future__ import annotations

import copy
import functools
import importlib
import os
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from fast_unsloth_patch.install import is_absent, put
from fast_unsloth_patch.registry import MISSING, PATCHES
from fast_unsloth_patch.status import tally

# Those with a dense MLP; Mixtral, which has experts in its place, is tested beside them.
FAMILIES = ("llama", "mistral")
# What the patch of a layer's second half is called.
MLP = {"llama": "mlp", "mistral": "mlp", "mixtral": "moe"}
FORWARDS = (
    *(
        f"{family}.{name}"
        for family, mlp in MLP.items()
        for name in ("rms_norm", "attention", mlp, "decoder_layer", "checkpointing")
    ),
    "peft.linear",
)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ALL[:4]
# Decoder layers of a tiny model.
LAYERS = 2
# From 5.23 on transformers checkpoints a layer's forward, before that the call of the layer with its hooks.
HOOKS_OUTSIDE = "__init_subclass__" in vars(GradientCheckpointingLayer)
# Relative to stock in float32: the fidelity contract.
FP32 = 1e-5


@contextmanager
def patched(*ids: str):
    """The patches ``ids`` installed without the mechanism of ``apply``; on leaving, the stock objects are back."""
    saved = []
    try:
        for patch in PATCHES:
            if patch.id not in (ids or FORWARDS) or is_absent(patch):
                continue
            owner_name, attribute = patch.target.split(".")
            owner = getattr(importlib.import_module(patch.module), owner_name)
            stock = owner.__dict__.get(attribute, MISSING)
            module, builder = patch.replacement.split(":")
            new = getattr(importlib.import_module(module), builder)(stock, tally(patch.id))
            put(owner, attribute, functools.wraps(stock)(new) if patch.kind == "forward" else new)
            saved.append((owner, attribute, stock))
        yield
    finally:
        for owner, attribute, stock in saved:
            delattr(owner, attribute) if stock is MISSING else setattr(owner, attribute, stock)


def hits() -> dict[str, int]:
    """Fast forwards and recomputations so far, by patch."""
    return {patch.id: tally(patch.id).forward + tally(patch.id).recomputed for patch in PATCHES}


def backwards() -> dict[str, int]:
    return {patch.id: tally(patch.id).backward for patch in PATCHES}


def fallbacks(patch_id: str) -> dict[str, int]:
    return dict(tally(patch_id).fallbacks)


_TINY: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
    "pad_token_id": 0,
}


def tiny_config(**overrides: Any) -> LlamaConfig:
    return LlamaConfig(**{**_TINY, **overrides})


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A model with random weights, neither close to linear or to zero nor so large that attention saturates.

    (Saturated, a bf16 gradient is off by 10 or, once in ten seeds, by 70 %, stock's as well.)
    """
    torch.manual_seed(seed)
    return _filled(LlamaForCausalLM(tiny_config(**overrides)), dtype)


def mistral(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> MistralForCausalLM:
    """The same model as a Mistral. Its default ``sliding_window`` is longer than any tiny batch."""
    torch.manual_seed(seed)
    return _filled(MistralForCausalLM(MistralConfig(**{**_TINY, **overrides})), dtype)


def mixtral(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> MixtralForCausalLM:
    """The same with four experts, of which each token takes two."""
    torch.manual_seed(seed)
    size = {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}
    return _filled(MixtralForCausalLM(MixtralConfig(**{**_TINY, **size, **overrides})), dtype)


def causal_lm(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any):
    return {"llama": llama, "mistral": mistral, "mixtral": mixtral}[family](dtype, seed, **overrides)


def _filled(model, dtype: torch.dtype):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.2)
            elif parameter.dim() == 1:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, 0.7 / parameter.shape[-1] ** 0.5)
    return model.to(dtype).train()


def lora(model, *, adapter_dtype: torch.dtype | None = None, seed: int = 1, **overrides: Any):
    """PEFT's LoRA on every projection (of Mixtral: of its attention), with a B that is not zero."""
    targets = ATTENTION if family_of(model) == "mixtral" else ALL
    values: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": list(targets), "lora_dropout": 0.0}
    model = get_peft_model(model, LoraConfig(**{**values, **overrides}))
    fill_adapters(model, seed, adapter_dtype)
    return model.train()


def fill_adapters(model, seed: int, dtype: torch.dtype | None = None) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                gain = 1.0 if "lora_A" in name else 0.3
                parameter.normal_(0.0, gain / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else gain)
                if dtype is not None:
                    parameter.data = parameter.data.to(dtype)


def batch(rows: int = 2, length: int = 12, seed: int = 2, vocab: int = 128) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


class Result(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor | None
    grads: dict[str, torch.Tensor]
    output: Any


def run(
    model, inputs: dict[str, Any], *, autocast: torch.dtype | None = None, keep_logits: bool = True, **kwargs: Any
) -> Result:
    """One training step without the optimizer."""
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast):
        output = model(**inputs, **kwargs)
    output.loss.backward()
    grads = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Result(output.loss.detach(), output.logits.detach() if keep_logits else None, grads, output)


def oracle(model, inputs: dict[str, Any], **kwargs: Any) -> Result:
    """The stock step in float64, from the same weights. Call it with no patch installed."""
    kwargs.pop("autocast", None)
    model = copy.deepcopy(model).double()
    if family_of(model) == "mixtral":  # torch's grouped product knows no float64.
        (model.get_base_model() if hasattr(model, "peft_config") else model).config._experts_implementation = "eager"
    return run(model, inputs, **kwargs)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance of ``a`` from ``b``."""
    a, b = a.double(), b.double()
    norm = b.norm().item()
    return (a - b).norm().item() / norm if norm else a.norm().item()


def assert_same(fast: Result, stock: Result, tolerance: float = FP32) -> None:
    """Loss, logits and every gradient within ``tolerance``, the same gradients and the same dtypes."""
    assert fast.grads.keys() == stock.grads.keys()
    pairs = {"loss": (fast.loss, stock.loss), **{n: (fast.grads[n], stock.grads[n]) for n in stock.grads}}
    if stock.logits is not None:
        pairs["logits"] = (fast.logits, stock.logits)
    far = {}
    for name, (a, b) in pairs.items():
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if not distance(a, b) <= tolerance:
            far[name] = distance(a, b)
    assert not far, far


def assert_as_good(fast: Result, stock: Result, exact: Result, factor: float = 2.5) -> None:
    """Low precision: fast and stock differ by no more than their roundings do.

    Two results that each carry independent errors of the size e that stock has against float64 are sqrt(2) e apart.
    """
    assert fast.grads.keys() == stock.grads.keys()
    far = {}
    for name in ["loss", "logits", *stock.grads]:
        a, b, c = ((getattr(r, name) if name in ("loss", "logits") else r.grads[name]) for r in (fast, stock, exact))
        assert a.dtype == b.dtype, name
        # A single number may be lucky: its error is taken from the logits, which it is made of.
        scale = distance(stock.logits, exact.logits) if name == "loss" else distance(b, c)
        if not distance(a, b) <= factor * scale:
            far[name] = (distance(a, b), scale)
    assert not far, far


def both(model, inputs, **kwargs):
    """The fast and the stock run: the fast path's forwards and backwards are counted in one, absent from the other."""
    forward, backward = hits(), backwards()
    with patched():
        fast = run(model, inputs, **kwargs)
    new_forward = {k: hits()[k] - forward[k] for k in forward}
    new_backward = {k: backwards()[k] - backward[k] for k in backward}
    stock = run(model, inputs, **kwargs)
    assert {k: hits()[k] - forward[k] for k in forward} == new_forward, "the stock arm took the fast path"
    return fast, stock, new_forward, new_backward


def check(
    model,
    inputs,
    *,
    norm=2 * LAYERS + 1,
    attention=LAYERS,
    mlp=LAYERS,
    linear=0,
    layer=None,
    tolerance=FP32,
    **kwargs,
):
    """Fast equals stock, with exactly these fast forwards; a layer's for every two norms unless ``layer`` says."""
    fast, stock, forward, _ = both(model, inputs, **kwargs)
    assert_same(fast, stock, tolerance)
    family = family_of(model)
    names = (*(f"{family}.{name}" for name in ("rms_norm", "attention", MLP[family], "decoder_layer")), "peft.linear")
    assert tuple(forward[name] for name in names) == (
        norm,
        attention,
        mlp,
        norm // 2 if layer is None else layer,
        linear,
    )
    others = {name: n for name, n in forward.items() if n and name not in (*names, f"{family}.checkpointing")}
    assert not others, others
    return fast, stock


def family_of(model) -> str:
    """``"llama"``, ``"mistral"`` or ``"mixtral"``, of a model in whatever wrapper."""
    return next(
        m.config.model_type for m in model.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)
    )


def layers_of(model):
    return model.get_base_model().model.layers if hasattr(model, "peft_config") else model.model.layers
