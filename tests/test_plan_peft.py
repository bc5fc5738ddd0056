"""The plan of a single ``lora.Linear``: every change between two steps is seen, copies bring none."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lora_layer import IN, OUT, compare, data, layer_of, make, step
from tiny_llama import (
    distance,
    fallbacks,
    patched,
)
from torch import nn
from torch.nn.utils import parametrize

from fast_unsloth_patch.patches import plan as plans


def _scaling(layer):
    layer.scaling["default"] *= 3


def _new_a(layer):
    layer.lora_A["default"] = nn.Linear(IN, 6, bias=False)
    layer.lora_B["default"] = nn.Linear(6, OUT, bias=False)


def _new_base(layer):
    layer.base_layer = nn.Linear(IN, OUT)


def _weight_data(layer):
    layer.base_layer.weight.data = torch.randn(OUT, IN)
    layer.lora_B["default"].weight.data = torch.randn(OUT, 4)


def _new_parameter(layer):
    layer.base_layer.weight = nn.Parameter(torch.randn(OUT, IN))


def _bias_gone(layer):
    layer.base_layer.bias = None


def _bias_grows(layer):
    layer.lora_B["default"].bias = nn.Parameter(torch.randn(OUT))


def _adapters_half(layer):
    for container in (layer.lora_A, layer.lora_B):
        container["default"].weight.data = container["default"].weight.data.bfloat16().float().to(torch.float64)


def _frozen_adapter(layer):
    layer.lora_A["default"].weight.requires_grad_(False)


def _trainable_base(layer):
    layer.base_layer.weight.requires_grad_(True)


def _containers(layer):
    layer.lora_A = nn.ModuleDict({"default": nn.Linear(IN, 4, bias=False)})


def _other_adapter(layer):
    layer.lora_A["other"] = nn.Linear(IN, 2, bias=False)
    layer.lora_B["other"] = nn.Linear(2, OUT, bias=False)
    layer.lora_dropout["other"] = nn.Identity()
    layer.scaling["other"] = 0.7
    layer._active_adapter = "other"


def _no_active(layer):
    layer._active_adapter = "nowhere"


def _active_list(layer):
    layer._active_adapter = ["nowhere", "default"]


def _transposed(layer):
    layer.base_layer.weight.data = torch.randn(IN, OUT).t()


FAST_CHANGES = [
    _scaling,
    _new_a,
    _new_base,
    _weight_data,
    _new_parameter,
    _bias_gone,
    _bias_grows,
    _frozen_adapter,
    _trainable_base,
    _containers,
    _other_adapter,
    _no_active,
    _active_list,
    _transposed,
]


def _twice(module, args, output):
    return output * 2


def _hooked(part):
    def change(layer):
        part(layer).register_forward_hook(_twice)

    return change


def _hooks_dict_replaced(layer):
    base = layer.base_layer
    base._forward_hooks = type(base._forward_hooks)()
    base.register_forward_hook(_twice)


def _own_forward(part):
    def change(layer):
        module = part(layer)
        module.forward = lambda x: type(module).forward(module, x) * 2

    return change


def _subclass(layer):
    class Doubling(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    layer.base_layer.__class__ = Doubling


def _a_subclass(layer):
    class Doubling(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    new = Doubling(IN, 4, bias=False)
    layer.lora_A["default"] = new


def _dropout_replaced(layer):
    class Doubling(nn.Module):
        def forward(self, x):
            return x * 2

    layer.lora_dropout["default"] = Doubling()


def _parametrized(layer):
    class Doubling(nn.Module):
        def forward(self, weight):
            return weight * 2

    parametrize.register_parametrization(layer.base_layer, "weight", Doubling())


def _fake_variant(layer):
    class TripleLinearVariant:
        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            return result * 3

    layer.lora_variant["default"] = TripleLinearVariant()


def _tensor_scaling(layer):
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])


def _float64_adapters(layer):
    for part in (layer.lora_A["default"], layer.lora_B["default"]):
        part.weight.data = part.weight.data.double()


def _a(layer):
    return layer.lora_A["default"]


def _b(layer):
    return layer.lora_B["default"]


def _base(layer):
    return layer.base_layer


def _dropout(layer):
    return layer.lora_dropout["default"]


STOCK_CHANGES = {
    "hook on base": _hooked(_base),
    "hook on A": _hooked(_a),
    "hook on B": _hooked(_b),
    "hook on dropout": _hooked(_dropout),
    "hook in a new table": _hooks_dict_replaced,
    "forward of base": _own_forward(_base),
    "forward of A": _own_forward(_a),
    "forward of B": _own_forward(_b),
    "forward of dropout": _own_forward(_dropout),
    "class of base": _subclass,
    "class of A": _a_subclass,
    "dropout": _dropout_replaced,
    "parametrized": _parametrized,
    "variant": _fake_variant,
    "scaling tensor": _tensor_scaling,
    "float64 adapters": _float64_adapters,
}


@pytest.mark.parametrize("change", FAST_CHANGES, ids=lambda f: f.__name__)
def test_a_change_between_steps_is_seen(change):
    model = make()
    compare(model)
    change(layer_of(model))
    compare(model)


@pytest.mark.parametrize("name", STOCK_CHANGES)
def test_a_change_between_steps_runs_stock(name):
    model = make()
    x, dy = data()
    old = step(model, x, dy)
    compare(model)
    STOCK_CHANGES[name](layer_of(model))
    compare(model, fast=False)
    # Where the change alters the result, the comparison above had something to see.
    if name not in ("scaling tensor", "float64 adapters"):
        assert distance(step(model, x, dy)["y"], old["y"]) > 0.1


def test_hook_removed_is_fast_again():
    model = make()
    compare(model)
    handle = layer_of(model).base_layer.register_forward_hook(_twice)
    compare(model, fast=False)
    handle.remove()
    compare(model)


def test_backward_hooks_on_bypassed_modules_run():
    model = make()
    compare(model)
    seen = []
    layer_of(model).lora_A["default"].register_full_backward_hook(lambda *a: seen.append(a))
    with patched("peft.linear"):
        step(model, *data())
    assert len(seen) == 1


def test_global_hook_is_seen():
    model = make()
    compare(model)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, nn.Linear) else None
    )
    try:
        compare(model, fast=False)
    finally:
        handle.remove()
    assert fallbacks("peft.linear")["global module hooks"] == 1
    compare(model)


def test_replaced_linear_class_forward_is_seen(monkeypatch):
    model = make()
    compare(model)
    stock = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: stock(self, x) * 2)
    compare(model, fast=False)


def test_hooks_of_the_layer_itself_run_and_stay_fast():
    """They run in its ``__call__``, which is not bypassed."""
    model = make()
    layer_of(model).register_forward_hook(_twice)
    compare(model)


def test_autocast_switched_between_steps():
    model = make()
    compare(model)
    compare(model, autocast=torch.bfloat16, tolerance=2 * torch.finfo(torch.bfloat16).eps)
    compare(model)


def test_dtype_switched_between_steps():
    model = make()
    compare(model)
    model.to(torch.bfloat16)
    compare(model, dtype=torch.bfloat16, tolerance=2 * torch.finfo(torch.bfloat16).eps)


def test_merge_and_unmerge_between_steps():
    model = make()
    layer_of(model).base_layer.requires_grad_(True)
    compare(model)
    model.merge_adapter()
    compare(model, fast=False)
    model.unmerge_adapter()
    compare(model)


def test_copies_bring_no_plan():
    model = make()
    compare(model)
    layer = layer_of(model)
    assert type(layer.__dict__[plans._KEY]) is plans.Plan
    other = copy.deepcopy(layer)
    assert other.__dict__[plans._KEY] is None
    blob = pickle.dumps(layer.__dict__[plans._KEY])
    assert b"fast_unsloth" not in blob and pickle.loads(blob) is None
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    compare(twin)
    compare(model)


def test_a_shallow_copy_reads_its_own_children():
    model = make()
    compare(model)
    replica = copy.copy(layer_of(model))
    replica.__dict__["_modules"] = dict(replica.__dict__["_modules"], base_layer=nn.Linear(IN, OUT))
    model.base_model.model.layer = replica
    compare(model)


def test_no_reference_cycle():
    import gc
    import weakref

    model = make()
    compare(model)
    gc.collect()
    gc.disable()
    try:
        ref = weakref.ref(layer_of(model))
        plan = layer_of(model).__dict__[plans._KEY]
        assert not any(obj is layer_of(model).__dict__ for obj in gc.get_referents(plan))
        del plan
        model.base_model.model.layer = nn.Identity()
        assert ref() is None
    finally:
        gc.enable()
