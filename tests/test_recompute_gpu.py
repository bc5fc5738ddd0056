"""``recompute="auto"`` and ``"offload"`` on a GPU: the allocator's own limit, real copies, and the same bits as "full".

The model is wide enough for its activations to be seen in the allocator's counts: 16 MiB an input, 100 MiB and more a
kept layer, at 8192 tokens.
"""

from __future__ import annotations

import gc
import os
from functools import partial

import pytest
import torch
from tiny_llama import batch, llama, lora, patched
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fast_unsloth_patch.patches import budget, checkpointing
from fast_unsloth_patch.status import tally

pytestmark = pytest.mark.gpu
# Without it cuBLAS refuses deterministic products; looked at once in a process, at the first of them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

TALLY = tally("llama.checkpointing")
WIDTH = 1024
MIB = 1 << 20


@pytest.fixture(autouse=True)
def clean():
    """No cap, the default policy and an empty cache before and after."""

    def reset():
        checkpointing.set_policy("full")
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.reset_peak_memory_stats()

    reset()
    # The same bits twice: flash attention's backward adds in any order unless it is told not to (with warn_only it only
    # warns), cuDNN's always.
    torch.use_deterministic_algorithms(True)
    with patched(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield
    torch.use_deterministic_algorithms(False)
    reset()


def build(use_reentrant=False, layers=8, adapter_dtype=None):
    config = {"hidden_size": WIDTH, "intermediate_size": 2816, "num_attention_heads": 8, "num_hidden_layers": layers}
    with torch.device("cuda"):
        model = lora(llama(torch.bfloat16, max_position_embeddings=8192, **config), adapter_dtype=adapter_dtype)
    model.enable_input_require_grads()
    function = partial(checkpoint, use_reentrant=use_reentrant)
    model.get_base_model()._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    return model.cuda()


def train(model, shapes, seed=0):
    """One optimizer step a shape (rows, length); what each recomputed, and the adapters at the end."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    recomputed = []
    for step, (rows, length) in enumerate(shapes):
        before = TALLY.recomputed
        inputs = {name: t.cuda() for name, t in batch(rows, length, seed=seed + step).items()}
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recomputed.append(TALLY.recomputed - before)
    torch.cuda.synchronize()
    return recomputed, [p.detach().clone() for p in model.parameters() if p.requires_grad]


def assert_same_bits(got, wanted):
    far = {i: (a - b).abs().max().item() for i, (a, b) in enumerate(zip(got, wanted)) if not torch.equal(a, b)}
    assert len(got) == len(wanted) and not far, f"{len(far)} of {len(wanted)} adapters differ: {far}"


def under(policy, shapes, **options):
    """A fresh model trained under ``policy``; peak bytes and reserved bytes besides."""
    checkpointing.set_policy("stock")
    checkpointing.set_policy(policy)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    recomputed, adapters = train(build(**options), shapes)
    return recomputed, adapters, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


both_kinds = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
# PEFT's default over a bf16 model are fp32 adapters; with bf16 ones the persistent GEMM runs.
adapters = pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@adapters
def test_two_runs_have_the_same_bits(adapter_dtype):
    """What all the others stand on: if this fails, it is not the policies that differ."""
    shapes = [(2, 2048)] * 3
    runs = [under("full", shapes, adapter_dtype=adapter_dtype)[1] for _ in range(2)]
    assert_same_bits(*runs)


@both_kinds
@adapters
def test_auto_keeps_layers_where_memory_is_free(adapter_dtype, use_reentrant):
    shapes, options = [(2, 2048)] * 10, {"use_reentrant": use_reentrant, "adapter_dtype": adapter_dtype}
    _, wanted, full, _ = under("full", shapes, **options)
    recomputed, got, auto, _ = under("auto", shapes, **options)
    assert recomputed[:2] == [8, 8] and recomputed[-1] == 0
    assert_same_bits(got, wanted)
    assert auto > full + 200 * MIB
    assert "8 of 8 layers kept on cuda:0" in checkpointing.describe()


@pytest.mark.parametrize("slack", [1.02, 1.15, 1.5, 2.0])
def test_auto_never_runs_out_where_full_fits(slack):
    shapes = [*[(1, 512)] * 4, *[(1, 1024)] * 6, *[(2, 1024)] * 6, *[(1, 2048)] * 6, (1, 300), *[(4, 2048)] * 12]
    shapes += [(1, 700), (3, 2048), (4, 1024), (1, 4096), (2, 4096), (4, 2048)]
    _, wanted, _, reserved = under("full", shapes)
    total = torch.cuda.mem_get_info()[1]
    # The cap is the least that full recomputation was seen to run in, times the slack.
    cap = reserved * slack + 64 * MIB
    torch.cuda.set_per_process_memory_fraction(cap / total)
    under("full", shapes)
    recomputed, got, _, used = under("auto", shapes)
    assert used <= cap + MIB
    assert_same_bits(got, wanted)
    if slack >= 1.5:
        assert min(recomputed[-18:]) < 8, "layers are kept where there is room"
    print(f"\ncap {cap / MIB:.0f} MiB, used {used / MIB:.0f}: {recomputed}\n{checkpointing.describe()}")


def test_memory_that_another_tensor_takes():
    shapes = [(4, 2048)] * 8
    _, _, _, reserved = under("full", shapes)
    torch.cuda.set_per_process_memory_fraction(4 * reserved / torch.cuda.mem_get_info()[1])
    checkpointing.set_policy("auto")
    model = build()
    recomputed, _ = train(model, shapes)
    assert recomputed[-1] < 8
    free = 4 * reserved - torch.cuda.memory_allocated()
    block = torch.empty(int(free - 1.1 * reserved), dtype=torch.uint8, device="cuda")
    assert train(model, [(4, 2048)])[0][0] > recomputed[-1]
    del block


def test_limit_is_the_fraction_and_what_the_device_has():
    free, total = torch.cuda.mem_get_info()
    seen = budget.memory_of(torch.device("cuda", 0))
    assert abs(seen.limit - (free + torch.cuda.memory_reserved())) < 64 * MIB
    torch.cuda.set_per_process_memory_fraction(0.02)
    assert budget.memory_of(torch.device("cuda", 0)).limit == pytest.approx(0.02 * total, abs=1)
    assert (seen.allocated, seen.peak) == (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())


@both_kinds
@adapters
def test_offload(adapter_dtype, use_reentrant):
    layers, shapes = 16, [(2, 4096)] * 4
    held = 2 * 4096 * WIDTH * 2
    options = {"use_reentrant": use_reentrant, "adapter_dtype": adapter_dtype, "layers": layers}
    _, wanted, full, _ = under("full", shapes, **options)
    recomputed, got, offloaded, _ = under("offload", shapes, **options)
    assert recomputed == [layers] * 4
    assert_same_bits(got, wanted)
    # All inputs but the three that may be on the GPU at once.
    assert full - offloaded > 0.9 * (layers - 3) * held
    (host,) = checkpointing._runner.hosts.values()
    assert host.stores == 4 * layers and host.loads == 4 * (layers - 1)
    assert host.pinned == layers * held, "buffers are used again"


def test_offload_in_the_forward_has_two_inputs_on_the_gpu():
    checkpointing.set_policy("offload")
    layers, held = 16, 2 * 4096 * WIDTH * 2
    model = build(layers=layers)
    seen = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(lambda *_: seen.append(torch.cuda.memory_allocated()))
    train(model, [(2, 4096)])  # what libraries allocate once
    seen.clear()
    train(model, [(2, 4096)])
    # Between layers the host is far ahead of the GPU; the memory must not be. Beside its input a layer leaves u of its
    # adapters, in fp32, for its recompute; before transformers 5.23 hooks run in that too.
    low = 2 * 4096 * 7 * 16 * 4
    assert max(memory - i * low for i, memory in enumerate(seen[:layers])) - seen[0] <= 3 * held + MIB


def test_offload_with_growing_rows():
    shapes = [(1, 1024), (1, 4096), (2, 4096), (1, 2048)]
    _, wanted, _, _ = under("full", shapes)
    _, got, _, _ = under("offload", shapes)
    assert_same_bits(got, wanted)
