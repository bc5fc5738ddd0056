"""QLoRA on bitsandbytes' 4-bit layers: the fast run against stock PEFT, from checkpoints loaded in 4 bits."""

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
    in_float64,
    nf4,
    packed_layers,
    reasons,
)
from tiny_llama import batch, run

pytest.importorskip("bitsandbytes")


def expected(base: torch.dtype, compute: torch.dtype, autocast: torch.dtype | None, adapters: int = PROJECTIONS):
    """What is fast: attention and MLP; or, where layers compute in another dtype than their input's, each linear."""
    if autocast is None and base is not compute:
        return {"attention": 0, "mlp": 0, "linear4bit": adapters * LAYERS}
    return {"attention": LAYERS, "mlp": LAYERS}


@pytest.mark.parametrize("name", VARIANTS)
def test_same_as_stock(name):
    variant = VARIANTS[name]
    compute = variant.base.get("dtype", F32)
    adapters = len(variant.lora.get("target_modules", range(PROJECTIONS)))
    counts = expected(F32 if variant.kbit else compute, compute, variant.autocast, adapters)
    check_variant(variant, nf4(**variant.base), batch(), **counts)


# (quant type, double quantisation, storage, dtype, compute dtype)
LOADED = [
    ("nf4", True, torch.uint8, F32, F32),
    ("nf4", True, BF16, BF16, BF16),
    ("nf4", False, torch.uint8, BF16, F32),  # the default compute dtype on the usual model
    ("nf4", False, BF16, F32, BF16),
    ("fp4", True, torch.uint8, F32, F32),
    ("fp4", True, BF16, BF16, F32),
    ("fp4", False, torch.uint8, BF16, BF16),
    ("fp4", False, F32, F32, F32),
    ("nf4", True, F16, F32, F16),
]


@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize(("quant_type", "double", "storage", "dtype", "compute"), LOADED, ids=str)
def test_loaded_as(quant_type, double, storage, dtype, compute, autocast):
    model = adapted(nf4(dtype, quant_type=quant_type, double=double, storage=storage, compute=compute))
    layer = next(iter(packed_layers(model).values()))
    assert layer.weight.dtype is storage and layer.weight.quant_state.nested is double
    assert layer.weight.quant_type == quant_type and layer.compute_dtype is compute
    precise = autocast is None and dtype is compute is F32
    exact = None if precise else run(in_float64(model), batch())
    counts = expected(dtype, compute, autocast)
    if autocast is BF16 and compute is F16:
        counts = {"attention": 0, "mlp": 0}
    linears = {name: counts[name] for name in counts.keys() - {"attention", "mlp"}}
    new = reasons("llama.mlp")
    check(
        model, batch(), attention=counts["attention"], mlp=counts["mlp"], linears=linears, exact=exact,
        autocast=autocast,
    )  # fmt: skip
    declined = "compute dtype" if autocast is None else "compute dtype under autocast"
    assert new() == ({} if counts["mlp"] else {declined: LAYERS})


@pytest.mark.parametrize("name", ["lora_bias, reentrant, autocast", "rsLoRA, ranks, biases", "bf16"])
def test_linears_alone(name, monkeypatch):
    cases.linears_alone(monkeypatch, "peft.linear4bit", VARIANTS[name], nf4(**VARIANTS[name].base))


@pytest.mark.parametrize("storage", [torch.uint8, BF16])
def test_children_of_several_kinds(storage):
    cases.mixed_children(lambda: nf4(storage=storage))


def test_dropout():
    cases.masks_of_q_k_and_v_are_independent(nf4)
    cases.masks_of_gate_and_up_are_independent(nf4)
    cases.mask_of_a_linear_and_its_gradients(nf4, "peft.linear4bit")
    cases.dropout_has_the_distribution_of_stock(nf4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_recompute_draws_the_same_masks(reentrant):
    cases.the_recompute_draws_the_same_masks(nf4, reentrant)


FIDELITY = {
    "bf16": ({"dtype": BF16}, None, {}),
    "bf16, autocast": ({"dtype": BF16}, BF16, {}),
    "bf16, bf16 adapters": ({"dtype": BF16}, None, {"adapter_dtype": BF16}),
    "bf16, k-bit, autocast": ({"dtype": BF16}, BF16, {"kbit": True}),
}


@pytest.mark.parametrize("name", FIDELITY)
def test_bf16(name):
    base, autocast, options = FIDELITY[name]
    cases.rms_errors(lambda seed: nf4(seed=seed, **base), autocast, **options)


@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize("checkpoint", [None, False])
def test_nothing_unpacked_is_kept(checkpoint, autocast, monkeypatch):
    model = adapted(nf4(), checkpoint=checkpoint)
    with torch.autocast("cpu", BF16, enabled=autocast is not None):
        cases.nothing_unpacked_is_kept(model, monkeypatch)


# ---- saving


@pytest.mark.parametrize("storage", [torch.uint8, BF16])
def test_saves_what_stock_loads(storage, tmp_path):
    cases.saves_what_stock_loads(lambda: nf4(storage=storage), tmp_path)
