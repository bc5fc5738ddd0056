"""GPTQ bases that change between two steps, run stock, or do not fit. Run by `test_gptq_lora`."""

from __future__ import annotations

import copy

import pytest
import quantised_states as states
import torch
from quantised_llama import BF16, LAYERS, PROJECTIONS, adapted, check, gptq, in_float64, outcome, reasons
from tiny_llama import batch, distance, layers_of, patched, run

EVERY_LAYER = PROJECTIONS * LAYERS

# ---- changes between two steps


def first(model, part="mlp.up_proj"):
    return layers_of(model)[0].get_submodule(part).base_layer


def _qweight_replaced(model):
    first(model).qweight = first(model).qweight.flip(0)


def _qweight_in_place(model):
    first(model, "self_attn.q_proj").qweight.bitwise_xor_(0x11111111)


def _qzeros_replaced(model):
    first(model).qzeros = first(model).qzeros ^ 0x11111111


def _scales_in_place(model):
    first(model, "self_attn.o_proj").scales.mul_(-0.5)


def _scales_replaced(model):
    first(model, "mlp.down_proj").scales = first(model, "mlp.down_proj").scales.bfloat16() * 0.5


def _g_idx_replaced(model):
    first(model).g_idx = first(model).g_idx.flip(0)


def _g_idx_in_place(model):
    first(model).g_idx.copy_(1 - first(model).g_idx)


def _data_replaced(model):
    first(model).qweight.data = first(model).qweight.data.flip(0)


def _loaded(model):
    model.load_state_dict(adapted(gptq(seed=5), seed=6).state_dict())


def _kernel_replaced(model):
    layer = layers_of(model)[0].mlp.up_proj
    layer.base_layer = layer.quant_linear_module = copy.deepcopy(first(model))
    layer.base_layer.scales.mul_(-1)


CHANGES = [
    _qweight_replaced,
    _qweight_in_place,
    _qzeros_replaced,
    _scales_in_place,
    _scales_replaced,
    _g_idx_replaced,
    _g_idx_in_place,
    _data_replaced,
    _loaded,
    _kernel_replaced,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_is_seen(change):
    model = adapted(gptq())
    before, _ = check(model, batch())
    change(model)
    after, _ = check(model, batch())
    assert distance(after.logits, before.logits) > 1e-2


def test_layers_cast():
    """``to(dtype)`` casts scales and adapters, in place for the former."""
    model = adapted(gptq())
    check(model, batch())
    layers_of(model)[0].mlp.to(BF16)
    assert first(model).scales.dtype is BF16
    check(model, batch(), exact=run(in_float64(model), batch()))


def test_changes_of_peft():
    states.changes_of_peft(gptq, "gptq")


def test_autocast_switched():
    states.another_input_dtype(gptq)


# ---- what runs stock


def _inference_only(layer):
    kind = type(layer)
    layer.__class__ = type("MarlinLinear", (kind,), {"SUPPORTS_TRAINING": False})


def _other_kernel(layer):
    layer.__class__ = type("TorchAtenLinear", (type(layer),), {})


def _rotation(layer):
    layer.online_full_had = True


ADVICE = "load the model with GPTQConfig(..., backend='gptq_triton') or 'gptq_torch'"
KERNELS = {
    "no backward": (_inference_only, f"MarlinLinear has no backward: {ADVICE}"),
    "not known": (_other_kernel, "GPTQ kernel: expected TorchLinear or TritonV2Linear, found TorchAtenLinear"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name):
    """Which kernel it is and what to load instead."""
    change, wanted = KERNELS[name]
    model = adapted(gptq())
    for layer in layers_of(model):
        change(layer.mlp.gate_proj.base_layer)
    new, own = reasons("llama.mlp"), reasons("peft.gptq")
    check(model, batch(), mlp=0, linears={"gptq": 2 * LAYERS})
    for found in (new(), own()):
        (reason,) = found
        assert reason.startswith(wanted) and ADVICE in reason and found[reason] == LAYERS


def test_triton_kernel_in_evaluation():
    """It rounds its values in another way there. (Its own code needs a GPU.)"""
    mlp = layers_of(adapted(gptq(kernel="TritonV2Linear")))[0].mlp
    mlp.up_proj.base_layer.eval()
    new = reasons("llama.mlp")
    with patched("llama.mlp"):
        outcome(mlp, torch.randn(3, 64, requires_grad=True))
        assert new() == {"TritonV2Linear in evaluation mode": 1}
        mlp.up_proj.base_layer.train()
        assert outcome(mlp, torch.randn(3, 64, requires_grad=True)) is None
    assert new() == {"TritonV2Linear in evaluation mode": 1}


def test_qalora():
    model = adapted(gptq(), use_qalora=True, qalora_group_size=16)
    reason = {"variant: qalora": LAYERS}
    wanted = {"llama.attention": reason, "llama.mlp": reason, "peft.gptq": {"variant: qalora": EVERY_LAYER}}
    states.falls_back(model, wanted, attention=0, mlp=0)


def test_several_adapters_and_disabled():
    states.several_adapters_and_disabled(adapted(gptq(), target_modules=["up_proj"]), "peft.gptq")


# ---- what does not fit: which tensor, expected and found


def _set(name, value):
    return lambda layer: setattr(layer, name, value(getattr(layer, name)))


BAD = {
    "qweight": (_set("qweight", lambda t: t[:-1]), "qweight: expected contiguous int32 [8, 128], found int32 [7, 128]"),
    "qzeros": (_set("qzeros", torch.Tensor.long), "qzeros: expected contiguous int32 [2, 16], found int64 [2, 16]"),
    "scales": (_set("scales", torch.Tensor.double), "scales: expected contiguous float16 or bfloat16 or float32 [2, 1"),
    "g_idx": (_set("g_idx", lambda t: t[:-1]), "g_idx: expected contiguous int32 or int64 [64], found int32 [63]"),
    "strides": (_set("qweight", lambda t: t.T.contiguous().T), "qweight: expected contiguous int32 [8, 128], found st"),
    "groups": (_set("g_idx", lambda t: t + 1), "g_idx: expected values in [-2, 1], found [1, 2]"),
    "bits": (_set("bits", lambda _: 3), "bits: expected 2, 4 or 8, found 3"),
}


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit(name, stepped):
    states.does_not_fit(adapted(gptq()), *BAD[name], "peft.gptq", stepped=stepped)
