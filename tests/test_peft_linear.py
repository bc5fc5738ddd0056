"""PEFT's ``lora.Linear``: against stock under every dtype, dropout by its own mask, and a plan that is never stale."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import FP32, distance, fallbacks, fill_adapters, hits, patched
from torch import nn
from torch.nn.utils import parametrize

from fast_unsloth_patch import switch
from fast_unsloth_patch.patches import plan as plans

IN, OUT = 24, 40


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=bias)

    def forward(self, x, **kwargs):
        return self.layer(x, **kwargs)


def make(base_dtype=torch.float32, adapter_dtype=None, bias=True, seed=0, **config):
    torch.manual_seed(seed)
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["layer"], "lora_dropout": 0.0}
    model = get_peft_model(Net(bias).to(base_dtype), LoraConfig(**{**values, **config}))
    fill_adapters(model, 1, adapter_dtype)
    return model.train()


def layer_of(model):
    return model.base_model.model.layer


def step(model, x, dy, autocast=None):
    """Output, dx and the gradients of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
        y = model(x)
    y.backward(dy.to(y.dtype))
    result = {"y": y.detach(), "dx": x.grad}
    result |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return result


def data(shape=(3, 5), dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(*shape, IN, generator=generator).to(dtype),
        torch.randn(*shape, OUT, generator=generator),
    )


def count():
    return hits()["peft.linear"]


def compare(model, *, autocast=None, dtype=torch.float32, shape=(3, 5), fast=True, tolerance=FP32):
    """A step with the patch and one without; the patch was taken ``fast`` or not at all."""
    x, dy = data(shape, dtype)
    with patched("peft.linear"):
        before = count()
        new = step(model, x, dy, autocast)
        assert (count() > before) == fast
    before = count()
    stock = step(model, x, dy, autocast)
    assert count() == before
    assert new.keys() == stock.keys()
    for name, expected in stock.items():
        assert new[name].dtype == expected.dtype and new[name].shape == expected.shape, name
        assert distance(new[name], expected) <= tolerance, (name, distance(new[name], expected))


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (1,)])
def test_shapes(shape):
    compare(make(), shape=shape)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"lora_bias": True, "bias": False},
        {"bias": False},
        {"r": 1},
        {"r": 64},
        {"bias": "base", "lora_alpha": 0},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_configurations(config):
    bias = config.pop("bias", True) is not False
    compare(make(bias=bias, **config))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_dtypes(base, adapter, autocast):
    """Stock has two references, autocast on and off; each with its own dtypes of the output and of the gradients."""
    if {base, adapter, autocast} == {torch.float32, None}:
        tolerance = FP32
    else:
        # Independent roundings of a few steps; the largest eps among the dtypes that occur.
        tolerance = 2 * max(torch.finfo(t).eps for t in (base, adapter, autocast) if t is not None)
    compare(make(base, adapter), autocast=autocast, dtype=base, tolerance=tolerance)


def test_input_of_another_dtype_than_the_weight():
    compare(make(torch.float32), autocast=torch.bfloat16, dtype=torch.bfloat16, tolerance=2 * torch.finfo(torch.bfloat16).eps)
    x, _ = data(dtype=torch.bfloat16)
    with patched("peft.linear"), pytest.raises(RuntimeError, match="dtype"):
        make(torch.float32)(x)
    assert fallbacks("peft.linear")["dtype mismatch"] > 0


def test_trainable_base():
    model = make()
    layer_of(model).base_layer.requires_grad_(True)
    compare(model)
    layer_of(model).base_layer.weight.requires_grad_(False)
    compare(model)


# ---- states that run stock


def _merged(model):
    model.merge_adapter()


def _disabled(model):
    model.base_model.disable_adapter_layers()
    layer_of(model).base_layer.requires_grad_(True)


def _two_active(model):
    model.add_adapter("other", LoraConfig(r=3, target_modules=["layer"]))
    fill_adapters(model, 5)
    model.base_model.set_adapter(["default", "other"])


def _cast_disabled(model):
    layer_of(model).cast_input_dtype_enabled = False


@pytest.mark.parametrize(
    "change, reason",
    [
        (_merged, "merged"),
        (_disabled, "adapters disabled"),
        (_two_active, "several active adapters"),
        (_cast_disabled, "input cast disabled"),
    ],
)
def test_states_that_run_stock(change, reason):
    model = make()
    change(model)
    if change is _merged:
        layer_of(model).base_layer.requires_grad_(True)
    before = fallbacks("peft.linear").get(reason, 0)
    compare(model, fast=False)
    assert fallbacks("peft.linear")[reason] == before + 1


def test_dora_runs_stock():
    before = fallbacks("peft.linear").get("variant: dora", 0)
    compare(make(use_dora=True), fast=False)
    assert fallbacks("peft.linear")["variant: dora"] == before + 1


def test_mixed_batch_runs_stock():
    model = make()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["layer"]))
    fill_adapters(model, 5)
    model.eval()
    x, _ = data((2,))
    names = ["default", "other"]
    stock = model(x, adapter_names=names)
    before = count()
    with patched("peft.linear"):
        new = model(x, adapter_names=names)
    assert count() == before and fallbacks("peft.linear")["mixed batch"] > 0
    assert torch.equal(new, stock) and not torch.equal(stock[1], model(x)[1])


def test_subclass_runs_stock():
    class Inheriting(type(layer_of(make()))):
        pass

    model = make()
    layer_of(model).__class__ = Inheriting
    compare(model, fast=False)
    assert fallbacks("peft.linear")["type Inheriting"] == 1


def test_disabled_and_keep_stock():
    model = make()
    x, dy = data()
    before = count()
    with patched("peft.linear"):
        with switch.disabled():
            step(model, x, dy)
        switch.keep_stock(model)
        step(model, x, dy)
    assert count() == before


# ---- a plan that is never stale: every change between two steps


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


# ---- dropout


def _visible_dropout(p, n=64, seed=0):
    """W = 0, A = B = 1: the output is the dropped-out input."""
    torch.manual_seed(seed)

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(n, n, bias=False)

        def forward(self, x):
            return self.layer(x)

    model = get_peft_model(Square(), LoraConfig(r=n, lora_alpha=n, lora_dropout=p, target_modules=["layer"])).train()
    layer = layer_of(model)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A["default"].weight.copy_(torch.eye(n))
        layer.lora_B["default"].weight.copy_(torch.eye(n))
    return model, layer


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_mask_and_gradients(p):
    model, layer = _visible_dropout(p)
    x = (torch.rand(200, 64) + 0.5).requires_grad_()
    dy = torch.randn(200, 64)
    before = count()
    with patched("peft.linear"):
        y = model(x)
        y.backward(dy)
    assert count() == before + 1
    mask = y.detach() != 0
    # The keep probability is rounded to a multiple of 2**-16; 5 sigma of a binomial.
    sigma = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.float().mean().item() - (1 - p)) < 5 * sigma + 2**-17
    assert 0 < mask.float().mean(0).std() < 5 * (p * (1 - p) / 200) ** 0.5, "columns are not independent"
    dropped = x.detach() * mask / (1 - p)
    torch.testing.assert_close(y.detach(), dropped)
    torch.testing.assert_close(x.grad, dy * mask / (1 - p))
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, dy.T @ dropped, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, dy.T @ dropped, rtol=1e-5, atol=1e-4)


def test_dropout_masks_differ_from_call_to_call_and_follow_the_seed():
    model, _ = _visible_dropout(0.5)
    x = torch.ones(50, 64)
    with patched("peft.linear"):
        torch.manual_seed(7)
        first, second = model(x), model(x)
        torch.manual_seed(7)
        again = model(x)
    assert torch.equal(first, again)
    agreement = (first == second).float().mean().item()
    assert abs(agreement - 0.5) < 5 * (0.25 / first.numel()) ** 0.5


def test_dropout_switched_between_steps():
    model, layer = _visible_dropout(0.5)
    x = torch.ones(50, 64)
    dropout = layer.lora_dropout["default"]
    with patched("peft.linear"):
        assert (model(x) == 0).any()
        dropout.eval()
        assert torch.equal(model(x), x), "the module's own flag counts"
        dropout.train()
        layer.training = False
        assert (model(x) == 0).any()
        dropout.p = 0.0
        assert torch.equal(model(x), x)
        dropout.p = 0.75
        assert set(model(x).unique().tolist()) == {0.0, 4.0}
        layer.lora_dropout["default"] = nn.Identity()
        assert torch.equal(model(x), x)


def test_dropout_that_the_op_does_not_do_runs_stock():
    for change, reason in (
        (lambda layer: setattr(layer.lora_dropout["default"], "p", 1.0), "dropout of everything"),
        (lambda layer: setattr(layer.lora_dropout["default"], "inplace", True), "dropout in place"),
        (lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.5)}), "dropout type AlphaDropout"),
    ):
        model, layer = _visible_dropout(0.5)
        change(layer)
        before, hit = fallbacks("peft.linear").get(reason, 0), count()
        with patched("peft.linear"):
            model(torch.ones(3, 64))
        assert count() == hit and fallbacks("peft.linear")[reason] == before + 1
