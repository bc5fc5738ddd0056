"""Attention with a sliding window, as Mistral and Mixtral have it: window, padding, heads, dropout, against stock."""

from __future__ import annotations

import importlib

import pytest
import torch
from tiny_llama import (
    FP32,
    LAYERS,
    assert_same,
    batch,
    causal_lm,
    check,
    distance,
    hits,
    layers_of,
    lora,
    patched,
    run,
)
from transformers import AttentionInterface

LENGTH = 12
# None, as Mistral-7B has it from v0.2 on, and Mixtral; shorter than the rows, as long, and longer, as v0.1 has it.
WINDOWS = (None, 3, LENGTH, 4096)
families = pytest.mark.parametrize("family", ["mistral", "mixtral"])


def modeling(family: str):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def padded(side: str) -> dict[str, torch.Tensor]:
    inputs = batch(rows=3, length=LENGTH)
    mask = torch.ones_like(inputs["input_ids"])
    for row, n in enumerate((0, 4, 7)):
        mask[row, slice(0, n) if side == "left" else slice(LENGTH - n, None)] = 0
    return {**inputs, "attention_mask": mask, "labels": inputs["labels"].masked_fill(mask == 0, -100)}


@families
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("window", WINDOWS)
def test_sliding_window(family, window, implementation):
    check(lora(causal_lm(family, sliding_window=window, attn_implementation=implementation)), batch(length=LENGTH))


@families
def test_the_window_is_seen(family):
    model = lora(causal_lm(family, sliding_window=3))
    with patched():
        narrow = run(model, batch(length=LENGTH))
        model.config.sliding_window = None
        wide = run(model, batch(length=LENGTH))
    assert abs(narrow.loss - wide.loss) > 0.01


@families
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family, side, window, implementation):
    """With the mask that stock makes: without the loss patch nothing is left out."""
    check(lora(causal_lm(family, sliding_window=window, attn_implementation=implementation)), padded(side))


@families
@pytest.mark.parametrize("window", [None, 3])
def test_flex_attention(family, window):
    """On a CPU it has no backward: the forward, in training mode, and not compiled."""
    model = lora(causal_lm(family, sliding_window=window, attn_implementation="flex_attention"))
    before = hits()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        with patched():
            fast = model(**padded("right"))
        assert hits()[f"{family}.decoder_layer"] == before[f"{family}.decoder_layer"] + LAYERS
        stock = model(**padded("right"))
    assert distance(fast.logits, stock.logits) <= FP32 and distance(fast.loss, stock.loss) <= FP32


@families
@pytest.mark.parametrize("window", [None, 3, 4096])
def test_attention_gets_what_stock_gives_it(family, window):
    """Window, mask, dropout, scaling and every keyword argument reach the attention function, and no others."""
    seen, eager = [], modeling(family).eager_attention_forward

    def spy(module, query, key, value, mask, **kwargs):
        seen.append({"shapes": (query.shape, key.shape, value.shape), "mask": mask, "module": module, **kwargs})
        return eager(module, query, key, value, None, **{**kwargs, "dropout": 0.0})

    AttentionInterface.register("fup_windowed_spy", spy)
    model = lora(
        causal_lm(family, attn_implementation="fup_windowed_spy", attention_dropout=0.25, sliding_window=window)
    )
    check(model, batch(), custom_argument=7, use_cache=False)
    fast, stock = seen[:LAYERS], seen[LAYERS:]
    assert len(fast) == len(stock) == LAYERS
    for a, b in zip(fast, stock):
        assert a.keys() == b.keys() and a["sliding_window"] == window and a["custom_argument"] == 7
        assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


@families
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_dropout_is_stock(family, implementation):
    model = lora(causal_lm(family, attn_implementation=implementation, attention_dropout=0.3))
    results = []
    torch.manual_seed(4)
    with patched():
        results.append(run(model, batch()))
    torch.manual_seed(4)
    results.append(run(model, batch()))
    assert_same(*results)
    for layer in layers_of(model):
        layer.self_attn.attention_dropout = 0.0
    assert abs(run(model, batch()).loss - results[0].loss) > 1e-3


@families
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 4, 16), (4, 2, 16), (4, 1, 16), (2, 1, 64), (2, 2, 96), (2, 1, 128), (2, 1, 256)],
)
def test_heads(family, heads, kv_heads, head_dim):
    model = causal_lm(
        family, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, num_hidden_layers=1
    )
    check(lora(model), batch(), norm=3, attention=1, mlp=1)
