"""LoRA on GPTQ layers, quantised or packed on the spot: the fast run against stock PEFT. Run by `test_gptq_lora`."""

from __future__ import annotations

import pytest
import quantised_cases as cases
import torch
from quantised_llama import (
    BF16,
    F16,
    F32,
    LAYERS,
    PROJECTIONS,
    VARIANTS,
    adapted,
    check,
    check_variant,
    gptq,
    in_float64,
    packed_layers,
    values,
)
from tiny_llama import batch, distance, llama, run
from transformers import GPTQConfig, LlamaForCausalLM

EVERY_LAYER = PROJECTIONS * LAYERS


@pytest.fixture(autouse=True)
def _no_compiler():
    """gptqmodel compiles what it unpacks with, which takes longer than all of these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("name", VARIANTS)
def test_same_as_stock(name):
    variant = VARIANTS[name]
    check_variant(variant, gptq(**variant.base), batch(), attention=LAYERS, mlp=LAYERS)


PACKED = [
    {"bits": 8, "group_size": 64},
    {"bits": 2, "group_size": -1},
    {"group_size": 16, "act_order": True},
    {"bits": 8, "act_order": True, "scales": BF16},
    {"kernel": "TritonV2Linear", "scales": F32, "inference": True},
]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("options", PACKED, ids=str)
def test_packed_as(options, dtype):
    model = adapted(gptq(dtype, **options))
    check(model, batch(), exact=run(in_float64(model), batch()) if dtype is BF16 else None)
    check(model, batch(), exact=run(in_float64(model), batch()), autocast=BF16)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A folder with a checkpoint that gptqmodel has quantised by its own method."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("quantised")
    llama(F16).save_pretrained(source)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(128)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1").save_pretrained(source)
    model = GPTQModel.load(str(source), QuantizeConfig(bits=4, group_size=32, desc_act=True), device="cpu")
    ids = torch.randint(1, 128, (16, 1, 64))
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=1)
    model.save(str(folder))
    return folder


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_loaded_from_a_checkpoint(quantised, dtype):
    """v1 zero points on disk, groups in activation order, scales in fp16 whatever the model's dtype."""
    config = GPTQConfig(bits=4, backend="gptq_torch")
    model = LlamaForCausalLM.from_pretrained(quantised, dtype=dtype, quantization_config=config, device_map="cpu")
    layers = packed_layers(model)
    assert len(layers) == EVERY_LAYER and {type(layer).__name__ for layer in layers.values()} == {"TorchLinear"}
    assert distance(values(layers["model.layers.0.mlp.up_proj"]), llama().model.layers[0].mlp.up_proj.weight) < 0.2
    model = adapted(model, kbit=True, checkpoint=False)
    exact = run(in_float64(model), batch(), use_cache=False)
    for autocast in (None, BF16):
        precise = autocast is None and dtype is F32
        check(
            model,
            batch(),
            attention=2 * LAYERS,
            mlp=2 * LAYERS,
            exact=None if precise else exact,
            autocast=autocast,
            use_cache=False,
        )


@pytest.mark.parametrize("name", ["lora_bias, reentrant, autocast", "rsLoRA, ranks, biases", "bf16"])
def test_linears_alone(name, monkeypatch):
    cases.linears_alone(monkeypatch, "peft.gptq", VARIANTS[name], gptq(**VARIANTS[name].base))


def test_children_of_several_kinds():
    cases.mixed_children(gptq)


def test_children_of_all_kinds():
    """Dense, NF4 and GPTQ side by side."""
    pytest.importorskip("bitsandbytes")
    from quantised_llama import nf4

    model, other = gptq(), nf4()
    for layer, donor in zip(model.model.layers, other.model.layers):
        layer.self_attn.k_proj, layer.mlp.up_proj = donor.self_attn.k_proj, donor.mlp.up_proj
    model.is_loaded_in_4bit = True
    check(adapted(model), batch())


def test_dropout():
    cases.masks_of_q_k_and_v_are_independent(gptq)
    cases.masks_of_gate_and_up_are_independent(gptq)
    cases.mask_of_a_linear_and_its_gradients(gptq, "peft.gptq")
    cases.dropout_has_the_distribution_of_stock(gptq)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_recompute_draws_the_same_masks(reentrant):
    cases.the_recompute_draws_the_same_masks(gptq, reentrant)


FIDELITY = {
    "bf16": ({"dtype": BF16}, None, {}),
    "bf16, fp16 scales, autocast": ({"dtype": BF16, "scales": F16}, BF16, {}),
    "bf16, bf16 adapters": ({"dtype": BF16}, None, {"adapter_dtype": BF16}),
}


@pytest.mark.parametrize("name", FIDELITY)
def test_bf16(name):
    base, autocast, options = FIDELITY[name]
    cases.rms_errors(lambda seed: gptq(seed=seed, **base), autocast, **options)


@pytest.mark.parametrize("checkpoint", [None, False])
def test_nothing_unpacked_is_kept(checkpoint, monkeypatch):
    cases.nothing_unpacked_is_kept(adapted(gptq(BF16), checkpoint=checkpoint), monkeypatch)


def test_saves_what_stock_loads(tmp_path):
    cases.saves_what_stock_loads(gptq, tmp_path)
