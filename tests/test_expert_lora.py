"""PEFT's LoRA on Mixtral's experts, fast against stock: the block, whole models, saved adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from mixtral_cases import (
    EXPERTS,
    LAYERS,
    MOE,
    TURNED_ROUND,
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
    in_four_bits,
    lora,
    lora_block,
    mixtral,
    step,
    wrapper_of,
)
from peft import PeftModel
from safetensors.torch import load_file
from tiny_llama import FP32, assert_as_good, assert_same, batch, distance, fallbacks, hits, patched, run

from fast_unsloth_patch.status import tally

# `test_experts_plan.test_factors_turned_round` shows what happens there.
pytestmark = pytest.mark.skipif(TURNED_ROUND, reason="PEFT before 0.20 runs stock")

STOCKS = ["eager", "grouped_mm"]
GATE_UP, DOWN = "gate_up_proj", "down_proj"


@pytest.mark.parametrize("implementation", [*STOCKS, "batched_mm"])
@pytest.mark.parametrize("targets", [(GATE_UP, DOWN), (DOWN, GATE_UP), (GATE_UP,), (DOWN,)])
def test_block_equals_stock(implementation, targets):
    """Both or either, nested in the order in which PEFT finds them."""
    model = lora_block(experts=implementation, target_modules=[], target_parameters=[f"experts.{t}" for t in targets])
    stock = compare(model)
    assert sum("lora_" in name for name in stock) == 2 * len(targets)


@pytest.mark.parametrize("order", [(GATE_UP, DOWN), (DOWN, GATE_UP)])
def test_nesting(order):
    """Wrapped by hand: PEFT itself may change its mind about the order."""
    model = lora_block()
    wrappers = [wrapper_of(model, name) for name in order]
    wrappers[0]._modules["base_layer"] = experts_of(model)
    wrappers[1]._modules["base_layer"] = wrappers[0]
    block_of(model)._modules["experts"] = wrappers[1]
    assert [block_of(model).experts.parameter_name, block_of(model).experts.base_layer.parameter_name] == [*order][::-1]
    compare(model)


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 37)])
def test_shapes(shape):
    compare(lora_block(), shape=shape)


@pytest.mark.parametrize("implementation", STOCKS)
def test_empty_experts_get_zeros(implementation):
    model = lora_block(experts=implementation)
    favour(model, 1.0, float("-inf"), 0.0, float("-inf"))
    stock = compare(model)
    b = next(grad for name, grad in stock.items() if "lora_B" in name).view(-1, 3, EXPERTS)
    assert b[..., 1].abs().sum() == 0 and b[..., 0].abs().sum() > 0


@pytest.mark.parametrize("trainable", ["lora_A", "lora_B", "lora_", "experts"])
def test_frozen_parts(trainable):
    """Of the adapters, and trained weights under them."""
    model = lora_block()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    compare(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 1},
        {"r": 17, "lora_alpha": 5},
        {"use_rslora": True},
        {"rank_pattern": {"mlp.experts.gate_up_proj": 5}, "alpha_pattern": {"mlp.experts.down_proj": 31}},
    ],
    ids=["r1", "r17", "rslora", "patterns"],
)
def test_ranks(settings):
    compare(lora_block(**settings))


def test_rank_pattern_took():
    """Else the case above would prove nothing."""
    model = lora_block(rank_pattern={"mlp.experts.gate_up_proj": 5})
    ranks = {name: wrapper_of(model, name).lora_A["default"].weight.shape[0] // EXPERTS for name in (GATE_UP, DOWN)}
    assert ranks == {GATE_UP: 5, DOWN: 3}


@pytest.mark.parametrize("implementation", STOCKS)
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_bfloat16_is_as_good(implementation, adapters):
    model = lora_block(torch.bfloat16, implementation, adapters)
    fix_routing(model)
    x, dy = data(dtype=torch.bfloat16)
    new, stock = both_steps(model, x, dy)
    as_good(new, stock, exact_step(model, x, dy))


@pytest.mark.parametrize("implementation", STOCKS)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_autocast(implementation, weights, adapters):
    model = lora_block(weights, implementation, adapters)
    fix_routing(model)
    x, dy = data()
    new, stock = both_steps(model, x, dy, torch.bfloat16)
    as_good(new, stock, exact_step(model, x, dy))


@pytest.mark.parametrize("implementation", STOCKS)
@pytest.mark.parametrize("targets", [(), (GATE_UP, DOWN), (DOWN,)])
def test_four_bit_experts(implementation, targets):
    """As stock with the same values in plain weights; between two steps the weights become 4-bit ones."""
    model = block(experts=implementation)
    model.requires_grad_(False)
    if targets:
        parameters = [f"mlp.experts.{name}" for name in targets]
        model = lora_block(experts=implementation, target_modules=[], target_parameters=parameters)
    x, dy = data()
    with patched(MOE):
        step(model, x, dy)
        plain = in_four_bits(model)
        new = step(model, x, dy)
        assert hits()[MOE] == tally(MOE).backward == 2 and not fallbacks(MOE)
    stock = step(plain, x, dy)
    assert new.keys() == stock.keys()
    assert_close(new, stock, FP32)


def test_four_bit_experts_with_other_values():
    """`param.data = ...` keeps the parameter, and a plan must not keep what was in it."""
    model = lora_block()
    in_four_bits(model)
    x, dy = data()
    with patched(MOE):
        step(model, x, dy)
        experts = experts_of(model)
        stack = experts.down_proj
        turned = stack.parts._replace(packed=stack.packed.flip(0))
        stack.data = type(stack).of(turned, stack.shape, stack.stored_dtype)
        assert experts.down_proj is stack
        new = step(model, x, dy)
    plain = copy.deepcopy(model)
    for name in ("gate_up_proj", "down_proj"):
        values = getattr(experts_of(plain), name).dequantize()
        setattr(experts_of(plain), name, torch.nn.Parameter(values, requires_grad=False))
    assert_close(new, step(plain, x, dy), FP32)


# Whole models.

TARGETS = {
    "experts": {"target_modules": ["w1", "w2", "w3"]},
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "both": {"target_modules": ["q_proj", "o_proj", "w1", "w2", "w3"]},
    "parameters": {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_model_equals_stock(targets, reentrant):
    """ "all-linear" trains the router too, by an adapter on it."""
    model = lora(mixtral(), **TARGETS[targets])
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    given = {**batch(vocab=96), "output_router_logits": True}
    with patched(MOE, "mixtral.checkpointing"):
        fast = run(model, given)
        assert hits()[MOE] == LAYERS * (1 if reentrant is None else 2) and not fallbacks(MOE)
        assert tally(MOE).backward == LAYERS
    stock = run(model, given)
    assert_same(fast, stock)
    assert distance(fast.output.aux_loss, stock.output.aux_loss) <= FP32
    assert any("experts" in name for name in stock.grads) == (targets != "attention")
    assert any("gate." in name for name in stock.grads) == (targets == "all-linear")


@pytest.mark.parametrize("implementation", STOCKS)
def test_model_in_bfloat16(implementation):
    model = lora(mixtral(torch.bfloat16, implementation), **TARGETS["both"])
    fix_routing(model)
    inputs = batch(vocab=96)
    with patched(MOE):
        fast = run(model, inputs)
        assert tally(MOE).backward == LAYERS
    assert_as_good(fast, run(model, inputs), run(in_float64(model), inputs))


def test_router_trained_beside_frozen_adapters():
    model = lora(mixtral(), **TARGETS["experts"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("gate.weight"))
    with patched(MOE):
        fast = run(model, batch(vocab=96))
        assert tally(MOE).backward == LAYERS
    assert_same(fast, run(model, batch(vocab=96)))
    assert len(fast.grads) == LAYERS


def _logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("targets", ["experts", "all-linear"])
def test_saved_adapter_is_stock_s(targets, tmp_path):
    """Trained fast, loaded in stock PEFT: the same outputs; and trained in stock PEFT, loaded in fast ones."""
    inputs = batch(vocab=96)

    def trained(*patches):
        model = lora(mixtral(), **TARGETS[targets])
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with patched(*patches):
            for _ in range(3):
                model(**inputs).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return model

    fast, stock = trained(MOE), trained("llama.mlp")
    assert hits()[MOE] == 3 * LAYERS
    for name, model in (("fast", fast), ("stock", stock)):
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("fast", "stock")]
    assert files[0].keys() == files[1].keys()
    assert all(distance(files[0][name], saved) <= FP32 for name, saved in files[1].items())
    # By the same path, from the same numbers: the same bits.
    in_stock = PeftModel.from_pretrained(mixtral(), tmp_path / "fast", is_trainable=True)
    assert torch.equal(_logits(in_stock, inputs), _logits(fast, inputs))
    with patched(MOE):
        in_fast = PeftModel.from_pretrained(mixtral(), tmp_path / "stock", is_trainable=True)
        new = run(in_fast.train(), inputs)
        assert hits()[MOE] == 4 * LAYERS
    assert_same(new, run(stock, inputs))


def test_two_runs_are_bitwise_equal():
    model = lora(mixtral(), **TARGETS["both"])
    with patched(MOE):
        first, second = run(model, batch(vocab=96)), run(model, batch(vocab=96))
    assert all(torch.equal(second.grads[name], grad) for name, grad in first.grads.items())
