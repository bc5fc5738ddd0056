"""Packed and padded batches, tiny Mistrals, and a comparison of both arms with every patch on."""

from __future__ import annotations

from typing import Any

import torch
from tiny_llama import FP32, LAYERS, Result, assert_same, batch, fallbacks, hits, lora, patched, run, tiny_config
from transformers import MistralConfig, MistralForCausalLM

from fast_unsloth_patch.registry import PATCHES
from fast_unsloth_patch.status import tally

_SIZES = {
    "attention_dropout",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "vocab_size",
}
EVERYTHING = tuple(patch.id for patch in PATCHES)


def mistral(window: int | None, **overrides: Any) -> MistralForCausalLM:
    """As `tiny_llama.llama`, with a sliding window."""
    torch.manual_seed(0)
    llama_config = tiny_config(**overrides).to_dict()
    config = MistralConfig(sliding_window=window)
    config.update({name: value for name, value in llama_config.items() if name in _SIZES})
    config._attn_implementation = "sdpa"
    model = MistralForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.7 / parameter.shape[-1] ** 0.5)
    return model.train()


def tiny(family: str, **overrides: Any):
    """A LoRA model: "llama", or "mistral" with a window (``"mistral 3"``) or none (``"mistral None"``)."""
    from tiny_llama import llama

    name, _, window = family.partition(" ")
    if name == "llama":
        return lora(llama(**overrides))
    return lora(mistral(None if window == "None" else int(window), **overrides))


def packed(*rows: list[int], seed: int = 2) -> dict[str, Any]:
    """Rows of documents of these lengths; the first token of each is not a target."""
    inputs = batch(len(rows), sum(rows[0]), seed=seed)
    inputs["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    inputs["labels"][inputs["position_ids"] == 0] = -100
    return inputs


def padded(left: list[int], right: list[int], length: int = 14, seed: int = 2) -> dict[str, Any]:
    """One row for each pair, with so many padded tokens at its ends; labels are -100 there."""
    inputs = batch(len(left), length, seed=seed)
    mask = torch.ones_like(inputs["input_ids"])
    for row, (before, after) in enumerate(zip(left, right)):
        mask[row, :before] = 0
        mask[row, length - after :] = 0
    inputs["input_ids"][mask == 0] = 0
    inputs["attention_mask"] = mask
    inputs["labels"][mask == 0] = -100
    return inputs


def step(model, inputs: dict[str, Any], **kwargs: Any) -> Result:
    return run(model, inputs, keep_logits=False, **kwargs)


def family_of(model) -> str:
    return model.config.model_type


def compare(
    model, inputs: dict[str, Any], *, fast: bool = True, tolerance: float = FP32, times: int = 1, **kwargs: Any
):
    """Both arms are equal, and the packing patch took its path ``times`` forward and backward, or not at all.

    Attention is fast in both cases: without packing it runs with the mask that stock builds.
    """
    family = family_of(model)
    counts = tally(f"{family}.packing")
    before, forward, backward = hits(), counts.forward, counts.backward
    with patched(*EVERYTHING):
        new = step(model, inputs, **kwargs)
    assert (counts.forward - forward, counts.backward - backward) == ((times, times) if fast else (0, 0))
    after = hits()
    assert after[f"{family}.attention"] - before[f"{family}.attention"] >= (LAYERS if fast else 0)
    old = step(model, inputs, **kwargs)
    assert hits() == after, "the stock arm took the fast path"
    assert_same(new, old, tolerance)
    return new, old


def reasons(model) -> dict[str, int]:
    return fallbacks(f"{family_of(model)}.packing")


def tokens_seen(module) -> list[int]:
    """Fills with the number of tokens that each call of ``module`` gets."""
    seen: list[int] = []
    stock = type(module).forward

    def forward(x):
        seen.append(x.shape[:-1].numel())
        return stock(module, x)

    module.forward = forward
    forward.__module__ = "torch.hooked_by_the_test"
    return seen
