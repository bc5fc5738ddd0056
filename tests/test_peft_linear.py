"""PEFT's ``lora.Linear``: against stock under every dtype and state, dropout by its own mask."""

from __future__ import annotations

import pytest
import torch
from lora_layer import compare, count, data, layer_of, make, step
from peft import LoraConfig, get_peft_model
from tiny_llama import FP32, fallbacks, fill_adapters, patched
from torch import nn

from fast_unsloth_patch import switch


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
    compare(
        make(torch.float32),
        autocast=torch.bfloat16,
        dtype=torch.bfloat16,
        tolerance=2 * torch.finfo(torch.bfloat16).eps,
    )
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
