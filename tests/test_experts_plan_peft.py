"""The plan of experts inside PEFT's wrappers: every state that may change between two steps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mixtral_cases import (
    EXPERTS,
    HIDDEN,
    INTER,
    MOE,
    TURNED_ROUND,
    assert_close,
    block_of,
    compare,
    data,
    experts_of,
    lora_block,
    step,
    wrapper_of,
)
from peft import LoraConfig
from tiny_llama import FP32, distance, fallbacks, fill_adapters, hits, patched
from torch import nn

from fast_unsloth_patch.patches import plan as plans

# `test_experts_plan.test_factors_turned_round` shows what happens there.
pytestmark = pytest.mark.skipif(TURNED_ROUND, reason="PEFT before 0.20 runs stock")

GATE_UP, DOWN = "gate_up_proj", "down_proj"


# What changes between two steps and stays fast. The change is seen, and seen rightly: fast is what stock then is.


def _scaling(model):
    wrapper_of(model, DOWN).scaling["default"] *= 3


def _new_adapter(model):
    wrapper = wrapper_of(model, GATE_UP)
    wrapper.lora_A["default"] = nn.Linear(HIDDEN, 5 * EXPERTS, bias=False)
    wrapper.lora_B["default"] = nn.Linear(5 * EXPERTS, 2 * INTER, bias=False)


def _adapter_data(model):
    for factor in (wrapper_of(model, DOWN).lora_A, wrapper_of(model, DOWN).lora_B):
        factor["default"].weight.data = torch.randn_like(factor["default"].weight)


def _written(model):
    wrapper_of(model, DOWN).lora_B["default"].weight.data.mul_(3)


def _rank_data(model):
    """Another rank in the same parameters."""
    wrapper = wrapper_of(model, DOWN)
    wrapper.lora_A["default"].weight.data = torch.randn(EXPERTS * 2, INTER)
    wrapper.lora_B["default"].weight.data = torch.randn(HIDDEN, 2 * EXPERTS)
    for factor in (wrapper.lora_A, wrapper.lora_B):
        factor["default"].weight.grad = None


def _adapters_half(model):
    for factor in (wrapper_of(model, GATE_UP).lora_A, wrapper_of(model, GATE_UP).lora_B):
        factor["default"].weight.data = factor["default"].weight.data.bfloat16()


def _frozen_a(model):
    wrapper_of(model, GATE_UP).lora_A["default"].weight.requires_grad_(False)


def _trained_weight(model):
    experts_of(model).down_proj.requires_grad_(True)


def _other_adapter(model):
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=_PARAMETERS))
    fill_adapters(model, 4)
    model.set_adapter("other")


_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _nowhere(model):
    wrapper_of(model, DOWN)._active_adapter = ["nowhere"]


def _list(model):
    wrapper_of(model, DOWN)._active_adapter = ["nowhere", "default"]


def _merged_and_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


def _unwrapped(model):
    block_of(model)._modules["experts"] = wrapper_of(model, GATE_UP)


@pytest.mark.parametrize(
    "change",
    [
        _scaling,
        _new_adapter,
        _adapter_data,
        _written,
        _rank_data,
        _adapters_half,
        _frozen_a,
        _trained_weight,
        _other_adapter,
        _nowhere,
        _list,
        _merged_and_back,
        _unwrapped,
    ],
)
def test_changes_between_steps(change):
    model = lora_block()
    with patched(MOE):
        before = step(model, *data())
    change(model)
    # Factors that PEFT rounds to bfloat16 and back differ from ours by nothing: the weights are float32.
    new = compare(model, tolerance=5e-3 if change is _adapters_half else FP32)
    if change is not _merged_and_back and change is not _list:
        assert new.keys() != before.keys() or any(distance(new[name], before[name]) > 1e-3 for name in new)


# What runs stock.


def _disabled(model):
    model.base_model.disable_adapter_layers()


def _merged(model):
    model.merge_adapter()


def _half_merged(model):
    wrapper_of(model, GATE_UP).merge()


def _two_active(model):
    _other_adapter(model)
    model.base_model.set_adapter(["default", "other"])


def _variant(model):
    wrapper_of(model, DOWN).lora_variant["default"] = object()


def _no_swap(model):
    """What PEFT before 0.20 does not know."""
    del wrapper_of(model, DOWN)._did_swap_in_out_features


def _hook(part):
    def change(model):
        part(model).register_forward_hook(lambda module, args, output: output * 2)

    return change


def _pre_hook(model):
    """As PEFT hands a mixed batch to its layers."""
    block_of(model).experts.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))


def _own_forward(model):
    wrapper = wrapper_of(model, DOWN)
    original = wrapper.forward
    wrapper.forward = lambda *args: original(*args) * 2


class _Sharded(torch.Tensor):
    def __deepcopy__(self, memo):
        return self.detach().clone().requires_grad_(self.requires_grad)


def _sharded(model):
    linear = wrapper_of(model, GATE_UP).lora_A["default"]
    weight = linear.weight.detach().as_subclass(_Sharded)
    del linear.weight
    linear.weight = weight


def _scaling_tensor(model):
    wrapper_of(model, GATE_UP).scaling["default"] = torch.tensor(2.0)


def _double_adapter(model):
    wrapper_of(model, GATE_UP).lora_A["default"].double()


def _wrong_shape(model):
    wrapper_of(model, DOWN).lora_A["default"].weight.data = torch.randn(EXPERTS * 2, INTER)


def _other_parameter(model):
    wrapper_of(model, DOWN).parameter_name = "act_fn"


def _twice(model):
    wrapper_of(model, DOWN).parameter_name = GATE_UP


def _own_wrapper(model):
    class Wrapper(type(wrapper_of(model, DOWN))):
        pass

    wrapper_of(model, DOWN).__class__ = Wrapper


def _no_cast(model):
    wrapper_of(model, DOWN).cast_input_dtype_enabled = False


STOCK_CHANGES = [
    (_disabled, "adapters disabled"),
    (_merged, "merged"),
    (_half_merged, "merged"),
    (_two_active, "several active adapters"),
    (_variant, "variant: object"),
    (_hook(lambda model: wrapper_of(model, DOWN)), "hooks on experts"),
    (_hook(lambda model: wrapper_of(model, GATE_UP)), "hooks on experts"),
    (_hook(experts_of), "hooks on experts"),
    (_pre_hook, "hooks on experts"),
    (_hook(lambda model: wrapper_of(model, DOWN).lora_A["default"]), "hooks on adapter of down_proj"),
    (_hook(lambda model: wrapper_of(model, GATE_UP).lora_B["default"]), "hooks on adapter of gate_up_proj"),
    (_own_forward, "forward of experts replaced"),
    (_sharded, "_Sharded weight"),
    (_double_adapter, "dtype mismatch"),
    (_no_cast, "input cast disabled"),
    (_own_wrapper, "experts type Wrapper"),
    (_scaling_tensor, "scaling of type Tensor"),
    (_wrong_shape, "adapter of another shape"),
]
# Set when PEFT builds its layers, and not again.
COLD_CHANGES = [
    (_no_swap, "factors turned round, as PEFT before 0.20 has them"),
    (_other_parameter, "adapter on another parameter"),
    (_twice, "several adapters on gate_up_proj"),
]


def _outcome(model, x):
    try:
        return model(x.clone()).detach()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize(
    ("change", "reason", "warm"),
    [*((*case, warm) for case in STOCK_CHANGES for warm in (False, True)), *((*case, False) for case in COLD_CHANGES)],
)
def test_falls_back(change, reason, warm):
    """Before the first step or between two, with the reason counted; the result or the error is stock's."""
    model = lora_block()
    x = data()[0]
    with patched(MOE):
        if warm:
            model(x)
        change(model)
        twin = copy.deepcopy(model)  # an error leaves PEFT's parametrization behind
        fast = _outcome(model, x)
        assert fallbacks(MOE) == {reason: 1} and hits()[MOE] == int(warm)
        assert plans._KEY not in block_of(model).__dict__
    stock = _outcome(twin, x)
    assert torch.equal(fast, stock) if isinstance(fast, torch.Tensor) else fast == stock


def test_one_model_through_its_life():
    """Disabled, merged, another adapter, and back: each step is what stock's is."""
    model = lora_block()
    compare(model)
    with model.disable_adapter():
        compare(model, fast=False)
    compare(model)
    model.merge_adapter()
    compare(model, fast=False)
    model.unmerge_adapter()
    compare(model)
    _other_adapter(model)
    compare(model)
    model.set_adapter("default")
    compare(model)
    model.delete_adapter("other")
    compare(model)
    handle = block_of(model).experts.register_forward_hook(lambda module, args, output: output * 2)
    compare(model, fast=False)
    handle.remove()
    compare(model)
    bare = model.merge_and_unload()
    bare.requires_grad_(True)
    compare(bare)
    assert fallbacks(MOE) == {"adapters disabled": 1, "merged": 1, "hooks on experts": 1}


def test_plan_is_kept_and_goes_with_no_copy():
    model = lora_block()
    with patched(MOE):
        step(model, *data())
        kept = block_of(model).__dict__[plans._KEY]
        step(model, *data())
        assert block_of(model).__dict__[plans._KEY] is kept
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert block_of(twin).__dict__[plans._KEY] is None
        experts_of(twin).down_proj.data.mul_(3)
        _scaling(twin)
        compare(twin)
    compare(model)


def test_stock_step_between_fast_ones():
    """Stock registers a parametrization on the experts and removes it: nothing of it stays in a plan."""
    model = lora_block()
    with patched(MOE):
        expected = step(model, *data())
    step(model, *data())
    with patched(MOE):
        again = step(model, *data())
    assert_close(again, expected, 0.0)
