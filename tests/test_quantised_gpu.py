"""Quantised bases on a GPU, stock and fast: low precision, masks, waiting, memory.

Over NF4 here; over GPTQ in the process that `test_gptq_lora` starts, with ``FAST_UNSLOTH_TEST_BASE=gptq``.
``FAST_UNSLOTH_TEST_DEVICE=cpu`` runs the same code in small without a GPU: all but what only a GPU can show.
"""

from __future__ import annotations

import os

import pytest
import quantised_cases as cases
import torch
from quantised_llama import BF16, F16, F32, IDS, adapted, assert_counts, both, gptq, in_float64, nf4, reasons
from test_gpu_training import DEVICE, LAYERS, LENGTH, ON_GPU, ROWS, SIZE, assert_identical, inputs_of, only_on_gpu
from test_gpu_training import waiting_is_an_error as no_waiting
from tiny_llama import assert_as_good, assert_same, distance, hits, patched, run

BASE = os.environ.get("FAST_UNSLOTH_TEST_BASE", "nf4")
pytestmark = [pytest.mark.gpu] if ON_GPU else []
if BASE == "nf4":
    pytest.importorskip("bitsandbytes")


def make(dtype: torch.dtype = BF16, **options):
    """One size for all: each new specialisation of a kernel costs 0.4 s."""
    options = {**SIZE, "vocab_size": 1024, **options}
    if BASE == "nf4":
        return nf4(dtype, device=DEVICE, **options)
    return gptq(dtype, device=DEVICE, kernel="TritonV2Linear" if ON_GPU else "TorchLinear", **options)


# Base, adapters, autocast, k-bit preparation, LoRA and base options.
CASES = {
    "bf16": (BF16, F32, None, False, {}),
    "bf16, autocast": (BF16, F32, BF16, False, {}),
    "bf16, bf16 adapters": (BF16, BF16, None, False, {}),
    "bf16, k-bit, autocast": (BF16, F32, BF16, True, {}),
    "bf16, biases": (BF16, F32, BF16, False, {"attention_bias": True, "mlp_bias": True}),
    "fp16": (F16, F32, None, False, {}),
    "fp16, autocast": (F16, F32, F16, False, {}),
    "fp16, fp16 adapters": (F16, F16, None, False, {}),
}


def step(model, autocast=BF16, seed: int = 7):
    torch.manual_seed(seed)
    return run(model, inputs_of(), autocast=autocast, keep_logits=False, use_cache=False)


@pytest.mark.parametrize("checkpoint", [None, True, False])
@pytest.mark.parametrize("name", CASES)
def test_low_precision(name, checkpoint):
    """Fast and stock differ by no more than two results with stock's roundings do, over four seeds."""
    dtype, adapter_dtype, autocast, kbit, options = CASES[name]
    lora = {"lora_bias": True} if options else {}
    apart = cases.Apart()
    for seed in range(4):
        made = make(dtype, seed=seed, **options)
        model = adapted(made, kbit=kbit, checkpoint=checkpoint, adapter_dtype=adapter_dtype, seed=seed, **lora)
        inputs = inputs_of(seed)
        exact = run(in_float64(model), inputs, use_cache=False)
        fast, stock, counts = both(model, inputs, autocast=autocast, use_cache=False)
        times = LAYERS if checkpoint is None else 2 * LAYERS
        assert_counts(counts, attention=times, mlp=times)
        apart.add(fast, stock, exact)
    apart.check()


@pytest.mark.parametrize("autocast", [None, BF16])
def test_fidelity_in_bf16(autocast):
    cases.rms_errors(lambda seed: make(BF16, seed=seed), autocast, length=LENGTH // 2, rows=ROWS)


LINEAR = "linear4bit" if BASE == "nf4" else "gptq"


@pytest.mark.parametrize("kbit", [False, True])
@pytest.mark.parametrize("autocast", [None, BF16])
def test_linears_alone(autocast, kbit):
    """After the k-bit preparation, without autocast, a 4-bit layer computes in another dtype than its input's."""
    model = adapted(make(), kbit=kbit, checkpoint=False)
    exact = run(in_float64(model), inputs_of(), use_cache=False)
    ids = ("llama.checkpointing", f"peft.{LINEAR}")
    fast, stock, counts = both(model, inputs_of(), ids, autocast=autocast, use_cache=False)
    assert_counts(counts, **{LINEAR: 2 * 7 * LAYERS})
    assert_as_good(fast, stock, exact)


def test_float32():
    model = adapted(make(F32))
    fast, stock, counts = both(model, inputs_of())
    assert_counts(counts, attention=LAYERS, mlp=LAYERS)
    assert_same(fast, stock)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_equals_not_checkpointed(reentrant):
    """With dropout, to the bit; and so are two runs."""
    model = adapted(make(), lora_dropout=0.1)
    with patched(*IDS):
        plain, again, other = step(model), step(model), step(model, seed=8)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        before = hits()["llama.mlp"]
        recomputed = step(model)
    assert hits()["llama.mlp"] == before + 2 * LAYERS
    assert_identical(again, plain)
    assert_identical(recomputed, plain)
    assert distance(other.loss, plain.loss) > 0


def test_dropout():
    """Masks, their scale, and the gradients through them, in float32."""

    def small(**options):
        return make(F32, **{"hidden_size": 64, "num_attention_heads": 4, **options})

    cases.mask_of_a_linear_and_its_gradients(small, f"peft.{LINEAR}", device=DEVICE)


@pytest.mark.parametrize(("dropout", "checkpoint"), [(0.0, None), (0.1, True), (0.1, False)])
def test_never_waits(dropout, checkpoint):
    """After the first step, which describes the weights, no call waits for the GPU (the mask is a 4-D one)."""
    model, inputs = adapted(make(), checkpoint=checkpoint, lora_dropout=dropout), inputs_of()
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=DEVICE).tril().expand(ROWS, 1, -1, -1)
    items = torch.tensor(17, device=DEVICE)

    def loss():
        with torch.autocast(DEVICE, dtype=BF16):
            return model(**inputs, attention_mask=mask, num_items_in_batch=items, use_cache=False).loss

    with patched(*IDS, "llama.loss"):
        loss().backward()
        before = hits()["llama.attention"]
        with no_waiting():
            loss().backward()
    assert hits()["llama.attention"] == before + (LAYERS if checkpoint is None else 2 * LAYERS - 1)


@pytest.mark.parametrize("checkpoint", [None, False])
def test_nothing_unpacked_is_kept(checkpoint, monkeypatch):
    cases.nothing_unpacked_is_kept(adapted(make(), checkpoint=checkpoint), monkeypatch, DEVICE)


@only_on_gpu
@pytest.mark.parametrize("checkpoint", [None, False])
def test_memory(checkpoint):
    """Between forward and backward less than an unpacked MLP; at the peak no more than that and what is kept."""
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = adapted(make(**size), checkpoint=checkpoint)
    inputs = {name: t[:1, :8].contiguous() for name, t in inputs_of().items()}
    mlp = 2 * 3 * 1024 * 4096
    with patched(*IDS):
        run(model, inputs, autocast=BF16, keep_logits=False, use_cache=False)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", BF16):
            loss = model(**inputs, use_cache=False).loss
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
    # 8 tokens: a layer keeps 16 rows of 4096 and as many of 1024, in 4 bytes at most, for each.
    assert kept < 8 * LAYERS * 4 * (16 * 4096 + 16 * 1024) < mlp, kept / 2**20
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert peak < mlp + kept + gradients, (peak / 2**20, mlp / 2**20)


@only_on_gpu
@pytest.mark.skipif(BASE != "gptq", reason="a kernel of gptqmodel")
def test_triton_kernel_in_evaluation_runs_stock():
    """Without a backward: gptqmodel's own returns too few gradients (7.7.0)."""
    model = adapted(make()).eval()
    new, before = reasons("llama.mlp"), hits()
    losses = []
    for ids in (IDS, ()):
        with patched(*ids or ("llama.rms_norm",)), torch.autocast(DEVICE, BF16):
            losses.append(model(**{k: v.to(DEVICE) for k, v in inputs_of().items()}).loss.detach())
    assert {k: v for k, v in hits().items() if k != "llama.rms_norm" and v != before[k]} == {}
    assert new() == {"TritonV2Linear in evaluation mode": LAYERS}
    assert distance(*losses) < 0.01
