"""The fidelity contract: the fast run is the stock run within rounding, loss and every gradient.

In float32: within 1e-5 relative. In bf16: the root mean square of the error against float64 stock, pooled over seeds,
at most 1.1 times stock's own. One run proves nothing there, so each figure pools what it needs to stand still: 32
seeds of a whole gradient, 128 of the loss, which is a single number.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
from tiny_llama import (
    FAMILIES,
    FP32,
    assert_same,
    batch,
    causal_lm,
    distance,
    family_of,
    fill_adapters,
    hits,
    lora,
    patched,
    run,
)

from fast_unsloth_patch.registry import PATCHES

# RMSNorm, attention, MLP, loss, checkpointing, PEFT: whatever the registry has.
EVERYTHING = tuple(patch.id for patch in PATCHES)
PARTS = ("rms_norm", "attention", "mlp", "decoder_layer", "loss")
WORST = 1.1
GRADIENT_SEEDS = 32
LOSS_SEEDS = 128


class Case(NamedTuple):
    base: torch.dtype
    adapter: torch.dtype | None  # None: full fine-tuning
    autocast: torch.dtype | None
    checkpointing: bool = False
    family: str = "llama"


BF16, F32 = torch.bfloat16, torch.float32
CASES = {
    "autocast, bf16 base, fp32 adapters": Case(BF16, F32, BF16),
    "autocast, fp32 base and adapters": Case(F32, F32, BF16),
    "pure bf16, bf16 adapters": Case(BF16, BF16, None),
    "pure bf16, fp32 adapters": Case(BF16, F32, None),
    "autocast, full fine-tuning, checkpointing": Case(F32, None, BF16, True),
    "pure bf16, full fine-tuning": Case(BF16, None, None),
    "Mistral, autocast, bf16 base, fp32 adapters": Case(BF16, F32, BF16, True, "mistral"),
}


def make(case: Case, **size):
    # Mistral's window is shorter than any row here.
    model = causal_lm(case.family, case.base, **({"sliding_window": 5} if case.family == "mistral" else {}), **size)
    if case.adapter is not None:
        model = lora(model, adapter_dtype=case.adapter)
        model.enable_input_require_grads()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@torch.no_grad()
def refill(model, seed: int) -> None:
    """Other weights in the same model, with the same spreads: building one costs more than running it."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        spread = 0.2 if name.endswith("norm.weight") else 0.7 / parameter.shape[-1] ** 0.5
        parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, spread)
    fill_adapters(model, seed)


def assert_fast(model, before: dict[str, int]) -> None:
    family = family_of(model)
    assert all(hits()[k] > before[k] for k in (f"{family}.{part}" for part in PARTS))


def inputs_of(seed: int, rows: int, length: int) -> dict[str, torch.Tensor]:
    inputs = batch(rows=rows, length=length, seed=seed)
    inputs["labels"][0, : length // 3] = -100
    return inputs


class Errors:
    """Sums of squared relative errors of both arms, by quantity."""

    def __init__(self) -> None:
        self.fast: dict[str, float] = {}
        self.stock: dict[str, float] = {}

    def add(self, name: str, fast: torch.Tensor, stock: torch.Tensor, exact: torch.Tensor) -> None:
        self.fast[name] = self.fast.get(name, 0.0) + distance(fast, exact) ** 2
        self.stock[name] = self.stock.get(name, 0.0) + distance(stock, exact) ** 2

    def ratios(self) -> dict[str, float]:
        return {name: math.sqrt(self.fast[name] / self.stock[name]) for name in self.fast}


def pooled(case: Case, device: str, rows: int, length: int, loss_seeds: int, **size) -> dict[str, float]:
    """RMS error of fast over that of stock, for the loss and each gradient."""
    model = make(case, **size).to(device)
    twin = copy.deepcopy(model).double()
    errors = Errors()
    for seed in range(max(loss_seeds, GRADIENT_SEEDS)):
        refill(model, seed)
        twin.load_state_dict(model.state_dict())
        inputs = inputs_of(seed, rows, length)
        if seed < GRADIENT_SEEDS:
            exact = run(twin, inputs, keep_logits=False)
            stock = run(model, inputs, autocast=case.autocast, keep_logits=False)
            before = hits()
            with patched(*EVERYTHING):
                fast = run(model, inputs, autocast=case.autocast, keep_logits=False)
            assert_fast(model, before)
            assert fast.grads.keys() == stock.grads.keys() == exact.grads.keys()
            for name, expected in exact.grads.items():
                errors.add(name, fast.grads[name], stock.grads[name], expected)
            losses = fast.loss, stock.loss, exact.loss
        else:
            losses = forward_losses(model, twin, inputs, case)
        errors.add("loss", *losses)
    return errors.ratios()


@torch.no_grad()
def forward_losses(model, twin, inputs, case: Case):
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in inputs.items()}

    def loss(of, autocast):
        with torch.autocast(device.type, dtype=autocast or BF16, enabled=autocast is not None):
            return of(**inputs).loss

    with patched(*EVERYTHING):
        fast = loss(model, case.autocast)
    return fast, loss(model, case.autocast), loss(twin, None)


@pytest.mark.parametrize("name", CASES)
def test_bf16(name):
    ratios = pooled(CASES[name], "cpu", rows=2, length=12, loss_seeds=LOSS_SEEDS)
    worse = {quantity: ratio for quantity, ratio in ratios.items() if not ratio <= WORST}
    assert not worse, worse


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["lora", "lora checkpointing", "full", "full checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32(family, kind, seed):
    case = Case(F32, F32 if kind.startswith("lora") else None, None, kind.endswith("checkpointing"), family)
    model = make(case)
    refill(model, seed)
    inputs = inputs_of(seed, 2, 12)
    before = hits()
    with patched(*EVERYTHING):
        fast = run(model, inputs, keep_logits=False)
    assert_fast(model, before)
    assert_same(fast, run(model, inputs, keep_logits=False), FP32)


def test_two_fast_runs_are_bitwise_equal():
    model = lora(causal_lm("llama", BF16), lora_dropout=0.2)
    with patched(*EVERYTHING):
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append(run(model, inputs_of(0, 2, 12), keep_logits=False))
    assert torch.equal(runs[0].loss, runs[1].loss)
    assert all(torch.equal(runs[0].grads[n], runs[1].grads[n]) for n in runs[0].grads)


GPU_SIZE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_bf16(name):
    ratios = pooled(CASES[name], "cuda", rows=2, length=200, loss_seeds=2 * LOSS_SEEDS, **GPU_SIZE)
    worse = {quantity: ratio for quantity, ratio in ratios.items() if not ratio <= WORST}
    assert not worse, worse


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["lora", "lora checkpointing", "full", "full checkpointing"])
def test_gpu_fp32(kind):
    case = Case(F32, F32 if kind.startswith("lora") else None, None, kind.endswith("checkpointing"))
    model = make(case, **GPU_SIZE).cuda()
    inputs = inputs_of(0, 2, 200)
    with patched(*EVERYTHING):
        fast = run(model, inputs, keep_logits=False)
    assert_same(fast, run(model, inputs, keep_logits=False), FP32)


@pytest.mark.gpu
def test_gpu_two_fast_runs_are_bitwise_equal():
    model = lora(causal_lm("llama", BF16, **GPU_SIZE), lora_dropout=0.2).cuda()
    with patched(*EVERYTHING):
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append(run(model, inputs_of(0, 2, 200), keep_logits=False))
    assert torch.equal(runs[0].loss, runs[1].loss)
    assert all(torch.equal(runs[0].grads[n], runs[1].grads[n]) for n in runs[0].grads)
