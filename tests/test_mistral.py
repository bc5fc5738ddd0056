"""Mistral, whole: the sliding window, grouped heads, head sizes, caches, padding, losses, dtypes, against stock."""

from __future__ import annotations

import inspect

import pytest
import torch
from test_windowed_attention import LENGTH, padded
from tiny_llama import (
    FORWARDS,
    FP32,
    LAYERS,
    assert_as_good,
    assert_same,
    batch,
    both,
    check,
    distance,
    fallbacks,
    hits,
    llama,
    lora,
    mistral,
    oracle,
    patched,
    run,
)
from transformers import DynamicCache
from transformers.models.mistral import modeling_mistral

from fast_unsloth_patch.errors import FastPatchError
from fast_unsloth_patch.registry import PATCHES

EVERYTHING = tuple(patch.id for patch in PATCHES)


# ---- what is trained


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj"]},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "v_proj": 16, "layers.1.mlp.down_proj": 1}},
        {"lora_bias": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_lora(config):
    check(lora(mistral(), **config), batch())


def test_full_fine_tuning():
    fast, stock, forward, backward = both(mistral(), batch())
    assert_same(fast, stock)
    assert len(fast.grads) == 9 * LAYERS + 3
    counted = {name: n for name, n in forward.items() if n}
    norms = 2 * LAYERS + 1
    assert counted == {
        "mistral.rms_norm": norms,
        "mistral.attention": LAYERS,
        "mistral.mlp": LAYERS,
        "mistral.decoder_layer": LAYERS,
    }
    parts = {name: backward[f"mistral.{name}"] for name in ("rms_norm", "attention", "mlp")}
    assert parts == {"rms_norm": norms, "attention": LAYERS, "mlp": LAYERS}


def test_the_families_are_apart():
    ours = [name for name in FORWARDS if name.startswith("mistral.")]
    before = hits()
    with patched(*ours):
        run(llama(), batch())
    assert hits() == before
    with patched(*(name for name in FORWARDS if name.startswith("llama."))):
        run(mistral(), batch())
    assert hits() == before


def test_it_computes_what_llama_does():
    """With the same weights and no window: both families run the same code."""
    model, twin = mistral(sliding_window=None, rms_norm_eps=1e-6), llama(rms_norm_eps=1e-6)
    twin.load_state_dict(model.state_dict())
    with patched():
        assert_same(run(model, batch()), run(twin, batch()), 1e-7)


# ---- dtypes


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("base", "adapter"), [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, None)]
)
def test_low_precision(base, adapter, autocast):
    if autocast is None and base is torch.float32:
        base = torch.float16
    model = mistral(base, sliding_window=5)
    if adapter is not None:
        model = lora(model, adapter_dtype=adapter)
    inputs = batch(rows=4, length=24)
    fast, stock, forward, _ = both(model, inputs, autocast=autocast)
    assert forward["mistral.decoder_layer"] == forward["mistral.attention"] == forward["mistral.mlp"] == LAYERS
    assert_as_good(fast, stock, oracle(model, inputs))


# ---- caches, generation, the loss


@pytest.mark.parametrize("window", [None, 3])
def test_continuing_a_cache_in_training(window):
    """Fewer queries than keys; with a window the cache forgets."""
    model = lora(mistral(sliding_window=window))
    first, second = batch(), batch(seed=9)

    def step():
        model.zero_grad()
        cache = model(input_ids=first["input_ids"], use_cache=True).past_key_values
        assert type(cache) is DynamicCache
        loss = model(**second, past_key_values=cache, use_cache=True).loss
        loss.backward()
        kept = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return [loss.detach(), *kept, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    before = hits()["mistral.attention"]
    with patched():
        fast = step()
    assert hits()["mistral.attention"] == before + 2 * LAYERS
    stock = step()
    assert len(fast) == len(stock) and all(distance(a, b) <= FP32 for a, b in zip(fast, stock))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("training", [True, False])
def test_generate(training, window):
    """Greedy tokens of a left-padded batch: stock in evaluation, fast where a script forgot ``eval()``."""
    model = lora(mistral(sliding_window=window)).train(training)
    ids = batch(rows=2, length=5)["input_ids"]
    ids[1, :2] = 0
    arguments = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 6, "do_sample": False}
    before = hits()
    with torch.no_grad(), patched():
        fast = model.generate(**arguments)
    assert (hits() != before) is training and bool(fallbacks("mistral.attention")) is not training
    assert torch.equal(fast, model.generate(**arguments))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("case", ["plain", "packed", "left", "right", "accumulated", "no labels"])
def test_every_patch(case, window):
    """Loss, packing and padding too, as ``apply()`` installs them."""
    inputs = padded(case) if case in ("left", "right") else batch(rows=2, length=LENGTH)
    if case == "packed":
        inputs["position_ids"] = torch.tensor([[*range(5), *range(7)], [*range(8), *range(4)]])
    if case == "accumulated":
        inputs["num_items_in_batch"] = torch.tensor(40)
    model = lora(mistral(sliding_window=window))
    if case == "no labels":
        labels = inputs.pop("labels")
        model.loss = lambda logits: torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def step():
        if case != "no labels":
            return run(model, inputs, keep_logits=case not in ("left", "right"), use_cache=False)
        model.zero_grad()
        logits = model(**inputs, use_cache=False).logits
        loss = model.loss(logits)
        loss.backward()
        return [loss, logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    before = hits()
    with patched(*EVERYTHING):
        fast = step()
    counted = {name for name, n in hits().items() if n > before[name]}
    expected = {f"mistral.{name}" for name in ("rms_norm", "attention", "mlp", "decoder_layer")}
    if case != "no labels":
        expected.add("mistral.loss")
    if case in ("packed", "left", "right"):
        expected.add("mistral.packing")
    assert counted == expected
    stock = step()
    if case == "no labels":
        assert all(distance(a, b) <= FP32 for a, b in zip(fast, stock, strict=True))
    else:
        assert_same(fast, stock)


def test_trainer_sees_the_stock_signature():
    """Otherwise it would drop the columns of the batch, or average accumulated gradients wrongly."""
    signature = inspect.signature(modeling_mistral.MistralForCausalLM.forward)
    with patched(*EVERYTHING):
        assert inspect.signature(modeling_mistral.MistralForCausalLM.forward) == signature
        assert inspect.signature(mistral().forward).parameters.keys() == signature.parameters.keys() - {"self"}


def test_advice_names_the_family():
    model = mistral()
    with patched(*EVERYTHING):
        logits = model(**batch()).logits
    # As FSDP frees a gathered weight.
    model.lm_head.weight.untyped_storage().resize_(0)
    with pytest.raises(FastPatchError, match=r'apply\(exclude="mistral\.loss"\)'):
        logits.sum()


# ---- the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 7, 4096])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("checkpoint", [None, True, False])
def test_gpu_fp32(checkpoint, implementation, window):
    size = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = lora(mistral(sliding_window=window, attn_implementation=implementation, **size)).cuda()
    if checkpoint is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint})
    times = 1 if checkpoint is None else 2
    counts = {"norm": 2 * LAYERS * times + 1, "attention": LAYERS * times, "mlp": LAYERS * times}
    # Torch 2.11 has no kernel of flex attention for fewer than 128 tokens in fp32, in stock either.
    length = 150 if implementation == "flex_attention" else 37
    check(model, batch(rows=3, length=length), use_cache=False, **counts)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 16])
def test_gpu_bf16(window, head_dim):
    size = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": head_dim}
    model = lora(mistral(torch.bfloat16, sliding_window=window, **size)).cuda()
    inputs = batch(rows=4, length=64)
    fast, stock, forward, _ = both(model, inputs)
    assert forward["mistral.decoder_layer"] == LAYERS
    assert_as_good(fast, stock, oracle(model, inputs))
