"""Bases in 4 bits that change between two steps, that run stock with a reason, or that do not fit."""

from __future__ import annotations

import copy
import tempfile

import pytest
import quantised_states as states
import torch
from quantised_llama import (
    BF16,
    F32,
    IDS,
    LAYERS,
    PROJECTIONS,
    adapted,
    check,
    in_float64,
    nf4,
    outcome,
    reasons,
    requantise,
)
from tiny_llama import batch, distance, layers_of, llama, patched, run

pytest.importorskip("bitsandbytes")

# ---- changes between two steps: a stale plan is a wrong result


def first(model, part="mlp.up_proj"):
    return layers_of(model)[0].get_submodule(part).base_layer


def _other_weight(model):
    layer = first(model)
    requantise(layer, torch.randn(layer.out_features, layer.in_features) / 8)


def _new_state(model):
    layer = first(model)
    state = copy.copy(layer.weight.quant_state)
    state.absmax = state.absmax.flip(0)
    layer.weight.quant_state = layer.quant_state = state


def _state_changed(model):
    state = first(model, "self_attn.k_proj").weight.quant_state
    state.state2 = copy.copy(state.state2)
    state.state2.absmax = 2 * state.state2.absmax


def _absmax_in_place(model):
    first(model).weight.quant_state.offset.mul_(-2)


def _packed_in_place(model):
    packed = first(model).weight.data
    packed.copy_(packed.flip(0))


def _data_replaced(model):
    weight = first(model, "self_attn.q_proj").weight
    weight.data = weight.data.flip(0)


def _loaded(model):
    other = adapted(nf4(seed=5), seed=6)
    model.load_state_dict(other.state_dict(), strict=False)


def _loaded_by_assignment(model):
    """The packed data then is a plain parameter, whose state the module has."""
    name = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    state = {name: model.state_dict()[name].flip(0)}
    model.load_state_dict(state, strict=False, assign=True)


def _merged_and_unmerged(model):
    model.merge_adapter()
    model.unmerge_adapter()


CHANGES = [
    _other_weight, _new_state, _state_changed, _absmax_in_place, _packed_in_place, _data_replaced, _loaded,
    _loaded_by_assignment, _merged_and_unmerged,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_is_seen(change):
    model = adapted(nf4())
    before, _ = check(model, batch())
    change(model)
    after, _ = check(model, batch())
    assert distance(after.logits, before.logits) > 1e-2


def test_compute_dtype_changed():
    model = adapted(nf4())
    check(model, batch())
    first(model).compute_dtype = BF16
    new = reasons("llama.mlp")
    check(model, batch(), mlp=LAYERS - 1, linears={"linear4bit": 3}, exact=run(in_float64(model), batch()))
    assert new() == {"compute dtype": 1}
    first(model).compute_dtype = F32
    check(model, batch())


def test_layers_cast():
    """``to(dtype)`` of a layer changes adapters and bias, not what is packed in uint8."""
    model = adapted(nf4(mlp_bias=True))
    check(model, batch())
    layers_of(model)[0].mlp.to(BF16)
    new = reasons("llama.mlp")
    check(model, batch(), mlp=LAYERS - 1, exact=run(in_float64(model), batch()), linears={"linear4bit": 0})
    # Stock casts a bias back to the compute dtype, in place.
    assert new() == {"bias dtype": 1} and first(model).bias.dtype is F32
    check(model, batch(), exact=run(in_float64(model), batch()))


def test_changes_of_peft():
    states.changes_of_peft(nf4, "linear4bit")


def test_autocast_switched():
    states.another_input_dtype(nf4)


def test_merged_runs_stock():
    model = adapted(nf4())
    unmerged = run(model, batch())
    model.merge_adapter()
    for embedding in (model.get_input_embeddings(), layers_of(model)[0].input_layernorm):
        embedding.weight.requires_grad_(True)
    new = reasons("llama.attention")
    merged, _ = check(model, batch(), attention=0, mlp=0)
    assert new() == {"merged": LAYERS} and distance(merged.loss, unmerged.loss) < 0.05


# ---- what runs stock


def test_compute_dtype_not_set_yet():
    """The layer takes it from its first input: once, as stock."""
    model = adapted(nf4())
    layer = first(model)
    layer.compute_dtype, layer.compute_type_is_set = None, False
    reason = {"compute dtype not set yet": 1}
    counts = {"mlp": LAYERS - 1, "linears": {"linear4bit": 2}}
    states.falls_back(model, {"llama.mlp": reason, "peft.linear4bit": reason}, **counts)
    assert layer.compute_dtype is F32
    states.falls_back(model, {"llama.mlp": {}, "peft.linear4bit": {}})


def test_bias_of_another_dtype():
    """Stock casts it in place: once."""
    model = adapted(nf4(attention_bias=True))
    bias = first(model, "self_attn.v_proj").bias
    bias.data = bias.data.to(BF16)
    counts = {"attention": LAYERS - 1, "linears": {"linear4bit": 3}}
    states.falls_back(model, {"llama.attention": {"bias dtype": 1}, "peft.linear4bit": {"bias dtype": 1}}, **counts)
    assert bias.dtype is F32
    states.falls_back(model, {"llama.attention": {}, "peft.linear4bit": {}})


def test_rows_that_end_within_a_block():
    """On a CPU bitsandbytes unpacks these in two ways."""
    model = adapted(nf4())
    layer = first(model)
    requantise(layer, torch.randn(128, 64) / 8, blocksize=128)
    reason = {"rows that end within a block": 1}
    counts = {"mlp": LAYERS - 1, "linears": {"linear4bit": 2}}
    states.falls_back(model, {"llama.mlp": reason, "peft.linear4bit": reason}, **counts)


def test_packed_for_inference():
    """What an evaluation leaves behind on a CPU with AVX512-BF16."""
    model = adapted(nf4())
    layer = first(model)
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("a CPU without AVX512-BF16: bitsandbytes packs nothing")
    check(model, batch())
    model.eval()
    with torch.no_grad(), patched(*IDS):
        model(**batch())
    assert layer.weight.quant_state.packing_format_for_cpu
    model.train()
    reason = "quant_state: packed for inference on this CPU; call train() before the first forward"
    wanted = {"llama.attention": {reason: LAYERS}, "llama.mlp": {reason: LAYERS}}
    states.falls_back(model, {**wanted, "peft.linear4bit": {reason: PROJECTIONS * LAYERS}}, attention=0, mlp=0)


def test_storage_cast():
    """``to(dtype)`` casts what is packed in floats, and ruins it; it is not read as if nothing had happened."""
    model = adapted(nf4(storage=BF16))
    check(model, batch())
    mlp = layers_of(model)[0].mlp
    mlp.to(F32)
    x, new = torch.randn(3, 64, requires_grad=True), reasons("llama.mlp")
    stock = outcome(mlp, x)
    with patched(*IDS):
        assert outcome(mlp, x) == stock
    (reason,) = new()
    assert reason.startswith("weight: expected 4096 contiguous bytes for [128, 64], found 8192 (torch.float32")


def test_classes_of_bitsandbytes():
    from bitsandbytes.nn import Linear4bit, LinearNF4

    class Doubling(Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    model = adapted(nf4())
    first(model).__class__ = LinearNF4
    check(model, batch())
    first(model).__class__ = Doubling
    reason = {"base layer type Doubling": 1}
    counts = {"mlp": LAYERS - 1, "linears": {"linear4bit": 2}}
    states.falls_back(model, {"llama.mlp": reason, "peft.linear4bit": reason}, **counts)


def test_dora():
    reason = {"variant: dora": LAYERS}
    wanted = {
        "llama.attention": reason,
        "llama.mlp": reason,
        "peft.linear4bit": {"variant: dora": PROJECTIONS * LAYERS},
    }
    states.falls_back(adapted(nf4(), use_dora=True), wanted, attention=0, mlp=0)


def test_several_adapters_and_disabled():
    states.several_adapters_and_disabled(adapted(nf4(), target_modules=["up_proj"]), "peft.linear4bit")


def test_eight_bits():
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        config = BitsAndBytesConfig(load_in_8bit=True)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=F32, quantization_config=config, device_map={"": "cpu"})
    model = adapted(model.train())
    reason = {"child type Linear8bitLt": LAYERS}
    states.falls_back(model, {"llama.attention": reason, "llama.mlp": reason}, attention=0, mlp=0)
    losses, optimizer = [], torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with patched(*IDS):
        for _ in range(4):
            losses.append(model(**batch()).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1


# ---- what does not fit: which tensor, expected and found


def _shape(layer):
    layer.weight.quant_state.shape = torch.Size((64, 128))


def _set(name, value):
    def spoil(layer):
        state = layer.weight.quant_state
        setattr(state, name, value(getattr(state, name)))

    return spoil


def _data(change):
    def spoil(layer):
        layer.weight.data = change(layer.weight.data)

    return spoil


def _no_state(layer):
    layer.weight.quant_state = layer.quant_state = None


BAD = {
    "short": (_data(lambda t: t[:-1]), "weight: expected 4096 contiguous bytes for [128, 64], found 4095"),
    "storage": (_data(torch.Tensor.int), "weight: expected uint8, float32, bfloat16 or float16 storage, found torch"),
    "no state": (_no_state, "quant_state: expected the state of a quantised weight, found None"),
    "shape": (_shape, "quant_state.shape: expected [128, 64], found [64, 128]"),
    "3-D": (_set("shape", lambda _: (4, 64, 32)), "quant_state.shape: expected [N, K], found [4, 64, 32]"),
    "dtype": (_set("dtype", lambda _: torch.float64), "quant_state.dtype: expected float32, bfloat16 or float16, "),
    "absmax": (_set("absmax", torch.Tensor.float), "quant_state.absmax: expected 128 contiguous torch.uint8 on cpu"),
    "blocksize": (_set("blocksize", lambda _: 48), "quant_state.blocksize: expected one of"),
    "type": (_set("quant_type", lambda _: "nf3"), "quant_state.quant_type: expected nf4 or fp4, found 'nf3'"),
}


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit(name, stepped):
    states.does_not_fit(adapted(nf4()), *BAD[name], "peft.linear4bit", stepped=stepped)
