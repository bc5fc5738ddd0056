"""Rows of one document without padding: no mask, no search for one, and everything else as stock has it."""

from __future__ import annotations

import pytest
import torch
from packed_cases import EVERYTHING, packed, reasons, step, tiny
from test_packing import with_attentions, with_cache, with_eager, with_given_cache, with_hook_on_arguments
from tiny_llama import FP32, LAYERS, assert_same, batch, distance, hits, layers_of, patched
from transformers import masking_utils
from transformers.models.llama import modeling_llama as modeling

from fast_unsloth_patch import switch

LENGTH = 12


def plain():
    return batch(2, LENGTH)


def with_positions():
    return plain() | {"position_ids": torch.arange(LENGTH)[None]}


def with_ones():
    return plain() | {"attention_mask": torch.ones(2, LENGTH, dtype=torch.int64)}


def with_both():
    return with_positions() | with_ones()


BATCHES = [plain, with_positions, with_ones, with_both]


@pytest.fixture
def built(monkeypatch):
    """How often transformers has looked whether a mask is needed."""
    calls = []
    stock = masking_utils._ignore_causal_mask_sdpa
    monkeypatch.setattr(
        masking_utils, "_ignore_causal_mask_sdpa", lambda *args, **kwargs: calls.append(1) or stock(*args, **kwargs)
    )
    return calls


def both_arms(model, inputs, built, **kwargs):
    """Losses and gradients are the same; how often a mask was looked for with the patches and without."""
    before = reasons(model)
    with patched(*EVERYTHING):
        new = step(model, inputs, use_cache=False, **kwargs)
    fast = len(built)
    assert reasons(model) == before, "nothing to pack is no fall-back"
    taken = hits()
    assert_same(new, step(model, inputs, use_cache=False, **kwargs))
    assert hits() == taken, "the stock arm took the fast path"
    assert len(built) > fast, "the spy is where stock comes by"
    return fast


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("family", ["llama", "mistral None", "mistral 13"])
def test_no_mask(family, inputs, checkpointing, built):
    model = tiny(family)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    name = f"{family.split()[0]}.attention"
    before = hits()[name]
    assert both_arms(model, inputs(), built) == 0
    assert hits()[name] >= before + LAYERS


@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("window", [3, LENGTH])
def test_a_window_within_the_row_needs_stocks_mask(window, inputs, built):
    assert both_arms(tiny(f"mistral {window}"), inputs(), built) > 0


@pytest.mark.parametrize("family", ["llama", "mistral 13"])
def test_layers_that_run_stock_get_no_mask(family, built, monkeypatch):
    model = tiny(family)
    for layer in layers_of(model):
        layer.self_attn.q_proj.register_forward_hook(lambda *args: None)
    seen = []
    stock = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: seen.append(kwargs.get("attn_mask")) or stock(*args, **kwargs),
    )
    assert both_arms(model, plain(), built) == 0
    assert seen == [None] * 2 * LAYERS


@pytest.mark.parametrize("case", [with_eager, with_attentions, with_hook_on_arguments])
@pytest.mark.parametrize("inputs", BATCHES)
def test_stock_looks_for_itself(inputs, case, monkeypatch):
    """And layers, with their hooks, get what stock gives them."""
    model = tiny("llama")
    given = inputs()
    kwargs = case(model, given)
    masks = []
    create = masking_utils.create_causal_mask

    def spy(*args, **kwargs):
        masks.append(kwargs["attention_mask"])
        return create(*args, **kwargs)

    monkeypatch.setattr(modeling, "create_causal_mask", spy)
    monkeypatch.setattr(masking_utils, "create_causal_mask", spy)
    with patched(*EVERYTHING):
        new = step(model, given, **kwargs)
    assert masks == [given.get("attention_mask")]
    assert_same(new, step(model, given, **kwargs))


@pytest.mark.parametrize("case", [with_cache, with_given_cache])
def test_with_a_cache(case):
    model = tiny("llama").eval()
    given = {"input_ids": plain()["input_ids"]}
    outputs = []
    for arm in (patched(*EVERYTHING), patched()):
        kwargs = case(model, given)
        with arm, torch.no_grad():
            outputs.append(model(**given, **kwargs))
    assert distance(outputs[0].logits, outputs[1].logits) < FP32
    assert [out.past_key_values.get_seq_length() for out in outputs] == [LENGTH, LENGTH]


def test_evaluation_and_generation(built):
    model = tiny("llama").eval()
    ids = plain()["input_ids"]
    with torch.no_grad():
        with patched(*EVERYTHING):
            fast = model(ids, use_cache=False).logits
            assert len(built) == 1, "evaluation is stock's"
            chosen = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert distance(fast, model(ids, use_cache=False).logits) < FP32
        assert torch.equal(chosen, model.generate(ids, max_new_tokens=4, do_sample=False))


def test_disabled_and_kept_stock(built):
    model = tiny("llama")
    with patched(*EVERYTHING):
        with switch.disabled():
            step(model, plain(), use_cache=False)
        assert len(built) == 1
        switch.keep_stock(model)
        step(model, plain(), use_cache=False)
        assert len(built) == 2


def test_a_packed_step_between(built):
    model = tiny("llama")
    assert both_arms(model, plain(), built) == 0
    with patched(*EVERYTHING):
        packed_step = step(model, packed([5, 7], [12]), use_cache=False)
    assert_same(packed_step, step(model, packed([5, 7], [12]), use_cache=False))
    fast = len(built)
    with patched(*EVERYTHING):
        step(model, plain(), use_cache=False)
    assert len(built) == fast


@pytest.mark.gpu
def test_gpu_the_host_does_not_wait():
    from test_packing import gpu_model, waits

    model = gpu_model("llama")
    with patched(*EVERYTHING):
        assert waits(model, batch(2, 128), use_cache=False) == 0
        ones = batch(2, 128) | {"attention_mask": torch.ones(2, 128, dtype=torch.int64)}
        assert waits(model, ones, use_cache=False) == 1
