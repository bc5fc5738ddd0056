"""Mixtral's sparse block and whole tiny Mixtrals, fast against stock, without LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from mixtral_cases import (
    CHOICES,
    EXPERTS,
    LAYERS,
    MOE,
    as_good,
    assert_close,
    block,
    block_of,
    both_steps,
    compare,
    data,
    exact_step,
    experts_of,
    favour,
    fix_routing,
    in_float64,
    mixtral,
)
from tiny_llama import FP32, assert_as_good, assert_same, batch, distance, fallbacks, hits, patched, run

from fast_unsloth_patch.patches import mixtral as patch
from fast_unsloth_patch.status import tally

STOCKS = ["eager", "grouped_mm"]
UNEVEN = (4.0, 1.0, 0.0, -1.0)
EMPTY = (1.0, float("-inf"), 0.0, float("-inf"))
ONE_FOR_ALL = (0.0, 9.0, float("-inf"), -9.0)


@pytest.mark.parametrize("implementation", [*STOCKS, "batched_mm", None])
@pytest.mark.parametrize("shape", [(2, 9), (1, 1), (3, 1), (1, 37)])
def test_block_equals_stock(implementation, shape):
    compare(block(experts=implementation), shape=shape)


@pytest.mark.parametrize("implementation", STOCKS)
@pytest.mark.parametrize("shares", [UNEVEN, EMPTY, ONE_FOR_ALL], ids=["uneven", "empty", "one"])
def test_loads(implementation, shares):
    """However the tokens are spread; what an expert without tokens gets is a gradient of zeros, as in stock."""
    model = block(experts=implementation)
    favour(model, *shares)
    stock = compare(model)
    assert (stock["experts.down_proj"][1].abs().sum() == 0) == (shares is EMPTY)


@pytest.mark.parametrize("implementation", STOCKS)
@pytest.mark.parametrize("trainable", ["experts", "gate", "gate_up_proj", "down_proj", "nothing"])
def test_frozen_parts(implementation, trainable):
    model = block(experts=implementation)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    stock = compare(model)
    assert any(name.startswith(("gate", "experts")) for name in stock) == (trainable != "nothing")


def test_no_dense_gradient_of_frozen_experts():
    """Nothing of the stacks' size is kept for backward but the stacks."""
    model = block()
    experts_of(model).requires_grad_(False)
    saved = []
    with patched(MOE), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(data()[0].requires_grad_()).sum().backward()
    own = {p.data_ptr() for p in model.parameters()}
    assert saved and not [t.shape for t in saved if t.dim() == 3 and t.data_ptr() not in own]


@pytest.mark.parametrize("choices", [1, 3, EXPERTS])
def test_number_of_choices(choices):
    model = block(num_experts_per_tok=choices)
    model.gate.requires_grad_(choices > 1)  # a single choice weighs 1: its gate's gradient is rounding error
    compare(model)


@pytest.mark.parametrize("implementation", STOCKS)
def test_bfloat16_is_as_good(implementation):
    model = block(torch.bfloat16, implementation)
    fix_routing(model)
    new, stock = both_steps(model, *data(dtype=torch.bfloat16))
    x, dy = data(dtype=torch.bfloat16)
    as_good(new, stock, exact_step(model, x, dy))


def test_float64():
    """Routing weights are float32 in stock, whatever the model is."""
    compare(block(torch.float64, "eager"), dtype=torch.float64, tolerance=1e-7)


@pytest.mark.parametrize(
    ("implementation", "weights", "x", "reason"),
    [
        ("eager", torch.float32, torch.float32, None),
        ("eager", torch.bfloat16, torch.float32, None),
        ("eager", torch.bfloat16, torch.bfloat16, None),
        ("grouped_mm", torch.float32, torch.float32, None),
        ("grouped_mm", torch.float32, torch.bfloat16, None),
        ("grouped_mm", torch.bfloat16, torch.float32, None),
        ("batched_mm", torch.bfloat16, torch.float32, None),
        ("batched_mm", torch.float32, torch.float32, "dtype under autocast"),
    ],
)
def test_autocast(implementation, weights, x, reason):
    """``eager`` computes in autocast's dtype, ``grouped_mm`` in the weights': so exactly where those are float32."""
    model = block(weights, implementation)
    fix_routing(model)
    new, stock = both_steps(model, *data(dtype=x), torch.bfloat16, fast=reason is None)
    if reason is not None:
        assert fallbacks(MOE) == {reason: 1}
        assert_close(new, stock, 0.0)
        return
    inputs, dy = data(dtype=x)
    as_good(new, stock, exact_step(model, inputs, dy))
    if implementation == "grouped_mm" and weights is x is torch.float32:
        # All but what passes the gate's backward, which rounds to bfloat16.
        assert_close(new, {n: t for n, t in stock.items() if n not in ("dx", "gate.weight")}, FP32)


def test_mixed_dtypes_without_autocast():
    """``grouped_mm`` casts the input to the weights' dtype; elsewhere it is an error, and stays stock's."""
    model = block(torch.bfloat16, "grouped_mm")
    model.gate.float()
    fix_routing(model)
    new, stock = both_steps(model, *data())
    x, dy = data()
    as_good(new, stock, exact_step(model, x, dy))
    experts_of(model).config._experts_implementation = "eager"
    with patched(MOE), pytest.raises(RuntimeError, match="dtype"):
        model(x)
    assert fallbacks(MOE) == {"dtype mismatch": 1}


# Whole models.


def _counts():
    return hits()[MOE]


@pytest.mark.parametrize("implementation", STOCKS)
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_model_equals_stock(implementation, checkpointing):
    """Loss with the auxiliary loss, logits, router logits, every gradient; everything is trained."""
    model = mixtral(experts=implementation)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    given = {**batch(vocab=96), "output_router_logits": True}
    with patched(MOE, "mixtral.checkpointing"):
        before = _counts()
        fast = run(model, given)
        assert _counts() - before == LAYERS * (1 if checkpointing is None else 2)
        assert not fallbacks(MOE)
    stock = run(model, given)
    assert_same(fast, stock)
    assert distance(fast.output.aux_loss, stock.output.aux_loss) <= FP32
    assert len(fast.output.router_logits) == len(stock.output.router_logits) == LAYERS
    for a, b in zip(fast.output.router_logits, stock.output.router_logits):
        assert distance(a, b) <= FP32


@pytest.mark.parametrize("implementation", STOCKS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_model_in_bfloat16(implementation, autocast):
    model = mixtral(torch.bfloat16 if autocast is None else torch.float32, implementation)
    fix_routing(model)
    inputs = batch(vocab=96)
    with patched(MOE):
        fast = run(model, inputs, autocast=autocast)
    assert tally(MOE).backward == LAYERS
    assert_as_good(fast, run(model, inputs, autocast=autocast), run(in_float64(model), inputs))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_takes_the_routing_of_the_forward(reentrant):
    """A gate that chooses otherwise in the recompute (last bits decide near ties) moves no row of what was kept."""
    model = mixtral()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = batch(vocab=96)
    with patched(MOE, "mixtral.checkpointing"):
        expected = run(model, inputs)
        routes = []
        original = patch.lora_experts

        def swapped(x, index, weights, *args, **kwargs):
            routes.append(kwargs["memo"].low is not None)
            return original(x, index.flip(1) if routes[-1] else index, weights, *args, **kwargs)

        patch.lora_experts = swapped
        try:
            again = run(model, inputs)
        finally:
            patch.lora_experts = original
    assert routes == [False] * LAYERS + [True] * LAYERS
    assert all(torch.equal(again.grads[name], grad) for name, grad in expected.grads.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_leaves_out_the_last_product(reentrant):
    """And the forward what the recompute saves again."""
    model = mixtral()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    given = []
    original = patch.lora_experts

    def seen(*args, **kwargs):
        given.append((kwargs["need_output"], kwargs["keep"]))
        return original(*args, **kwargs)

    patch.lora_experts = seen
    try:
        with patched(MOE, "mixtral.checkpointing"):
            fast = run(model, batch(vocab=96))
    finally:
        patch.lora_experts = original
    assert given == [(True, False)] * LAYERS + [(False, True)] * LAYERS
    assert_same(fast, run(model, batch(vocab=96)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_with_residual(dtype, residual_dtype):
    """The decoder layer's addition, joined: the same dtype, rounded less."""
    model = block(dtype)
    fix_routing(model)
    x, residual = data(dtype=dtype)
    residual = residual.to(residual_dtype)
    stock = residual + model(x)
    with patched(MOE):
        fast = type(model).forward.with_residual(model, x, residual)
        model.jitter_noise = 0.5
        type(model).forward.with_residual(model, x.clone(), residual)
        assert fallbacks(MOE) == {"router jitter": 1} and hits()[MOE] == 1
    assert fast.dtype == stock.dtype and fast.shape == stock.shape
    assert distance(fast, stock) <= (FP32 if dtype is torch.float32 else 2e-2)


def test_deepcopied_model_trains_by_itself():
    model = mixtral()
    inputs = batch(vocab=96)
    with patched(MOE):
        run(model, inputs)
        twin = copy.deepcopy(model)
        experts_of(twin).gate_up_proj.data.mul_(2)
        fast, original = run(twin, inputs), run(model, inputs)
    assert_same(fast, run(twin, inputs))
    assert_same(original, run(model, inputs))


def test_counts_of_the_model_are_of_the_block():
    """The block's forward is the only one that is patched here; nothing else of the model counts."""
    model = mixtral()
    with patched(MOE):
        before = hits()
        run(model, batch(vocab=96))
        assert {name: n - before[name] for name, n in hits().items() if n - before[name]} == {MOE: LAYERS}
    assert block_of(model).top_k == CHOICES
