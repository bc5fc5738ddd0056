"""RoPE against its oracle in float64 and against transformers' function; test_rms_norm.py says how the cases run."""

import itertools
import os

import pytest
import torch

from fast_unsloth_patch.device.dispatch import use_triton
from fast_unsloth_patch.ops import rope as module
from fast_unsloth_patch.ops.rope import rope, rope_bwd, rope_fwd
from fast_unsloth_patch.reference import rope_ref
from fast_unsloth_patch.status import tally

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INTERPRETED = "TRITON_INTERPRET" in os.environ
DTYPES = [torch.float32, torch.float16]
MIXED = []
if not INTERPRETED:  # bfloat16 is wrong in the interpreter, and never goes there
    DTYPES += [torch.bfloat16]
    MIXED = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]


def tolerance(dtype, device):
    """Relative L2. The kernels round once, by at most eps / 2; the reference three times, as stock does."""
    eps = torch.finfo(dtype).eps
    if dtype is not torch.float32 and (INTERPRETED or device == "cuda"):
        return 0.51 * eps  # float32 arithmetic takes less than the hundredth
    return 1.5 * eps


def heads(batch, n, seq, dim, dtype, device, layout):
    if layout == "bhsd":
        x = torch.randn(batch, n, seq, dim, device=device)
    elif layout == "bshd":  # what q_proj(x).view(...).transpose(1, 2) is
        x = torch.randn(batch, seq, n, dim, device=device).transpose(1, 2)
    elif layout == "slice":  # part of a stacked q, k, v buffer
        x = torch.randn(batch, seq, n + 3, dim, device=device)[:, :, 1 : n + 1].transpose(1, 2)
    elif layout == "columns":
        x = torch.randn(batch, n, dim, seq, device=device).transpose(2, 3)
    return x.to(dtype).detach().requires_grad_()


def angles(batch, seq, rotary, dtype, device):
    return [torch.randn(batch, seq, rotary, device=device).to(dtype) for _ in range(2)]


def run(fn, q, k, cos, sin, grads):
    out = fn(q, k, cos, sin)
    return *out, *torch.autograd.grad(out, (q, k), [g.to(o.dtype) for g, o in zip(grads, out, strict=True)])


def oracle(q, k, cos, sin, grads):
    q, k = (t.detach().double().requires_grad_() for t in (q, k))
    return run(rope_ref, q, k, cos.double(), sin.double(), grads)


def errors(got, want):
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(got, want, strict=True)]


SHAPES = [(2, 4, 2, 5, 16, 16, 1), (2, 3, 1, 3, 20, 12, 2), (1, 18, 2, 2, 6, 6, 1), (1, 1, 1, 1, 2, 2, 1)]
LAYOUTS = ["bhsd", "bshd", "slice", "columns"]
PAIRS = [*((t, t) for t in DTYPES), *MIXED]
# Compiling is what a GPU case costs: there each shape meets one layout, and one pair of dtypes or all.
CASES = [("cpu", *case) for case in itertools.product(SHAPES, LAYOUTS, PAIRS)]
FEW = [(SHAPES[1], "slice", pair) for pair in PAIRS]
FEW += [(shape, layout, (torch.bfloat16,) * 2) for shape, layout in zip(SHAPES, LAYOUTS) if shape != SHAPES[1]]
FEW += [(SHAPES[0], "columns", (torch.float16,) * 2), (SHAPES[2], "bshd", (torch.float32,) * 2)]
CASES += [pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in FEW]


@pytest.mark.parametrize(("device", "shape", "layout", "dtypes"), CASES)
def test_matches_float64(device, shape, layout, dtypes, poisoned_empty):
    batch, n, kv, seq, dim, rotary, cos_batch = shape
    dtype, cos_dtype = dtypes
    q, k = (heads(batch, m, seq, dim, dtype, device, layout) for m in (n, kv))
    cos, sin = angles(cos_batch, seq, rotary, cos_dtype, device)
    grads = [torch.randn(t.shape, device=device).to(torch.promote_types(dtype, cos_dtype)) for t in (q, k)]
    before = [t.detach().clone() for t in (q, k)]
    got = run(rope, q, k, cos, sin, grads)
    assert [t.dtype for t in got] == [torch.promote_types(dtype, cos_dtype)] * 2 + [dtype] * 2
    assert all(torch.equal(a, b) for a, b in zip((q, k), before, strict=True))
    for error, t in zip(errors(got, oracle(q, k, cos, sin, grads)), got, strict=True):
        assert error <= tolerance(t.dtype, device)
    # The reference has stock's roundings: nothing is left to differ.
    if dtype == cos_dtype != torch.float32 and device == "cpu" and not INTERPRETED:
        want = run(rope_ref, q, k, cos, sin, grads)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


MODELS = [(32, 8, 128), (32, 8, 64), (24, 24, 80), (128, 8, 128), (3, 5, 256)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "kv", "dim", "dtype"),
    [*((*model, torch.bfloat16) for model in MODELS), *((32, 8, 128, t) for t in (torch.float16, torch.float32))],
)
def test_model_sizes(n, kv, dim, dtype, poisoned_empty):
    q, k = (heads(2, m, 517, dim, dtype, "cuda", "slice") for m in (n, kv))
    cos, sin = angles(1, 517, dim, dtype, "cuda")
    grads = [torch.randn_like(t) for t in (q, k)]
    want = oracle(q, k, cos, sin, grads)
    ours, stock = (errors(run(fn, q, k, cos, sin, grads), want) for fn in (rope, rope_ref))
    assert all(error <= tolerance(dtype, "cuda") for error in ours)
    # A million elements: one rounding against three is no matter of luck.
    assert all(a <= 1.1 * b for a, b in zip(ours, stock, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_transformers(dtype):
    if INTERPRETED:
        pytest.skip("the reference path is what this compares on a CPU")
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    q, k = (heads(2, m, 7, 16, dtype, "cpu", "bshd") for m in (4, 2))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3]])
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    grads = [torch.randn(t.shape) for t in (q, k)]
    got = run(rope, q, k, cos, sin, grads)
    want = run(apply_rotary_pos_emb, q, k, cos, sin, grads)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert [t.stride() for t in got[:2]] == [t.stride() for t in want[:2]]


def test_gradcheck_with_halves_that_differ():
    q, k = (torch.randn(1, m, 3, 6, dtype=torch.float64, requires_grad=True) for m in (2, 1))
    cos, sin = (torch.randn(1, 3, 4, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))


@pytest.mark.parametrize("device", DEVICES)
def test_in_place(device):
    q, k = (heads(2, m, 3, 8, torch.float32, device, "slice").detach() for m in (4, 2))
    cos, sin = angles(1, 3, 6, torch.float32, device)
    want = rope_fwd(q, k, cos, sin)
    out = rope_fwd(q.clone(), k.clone(), cos, sin)
    q2, k2 = q.clone(), k.clone()
    assert rope_fwd(q2, k2, cos, sin, out=(q2, k2))[0] is q2
    for a, b, c in zip(want, out, (q2, k2), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    want = rope_bwd(q, k, cos, sin, torch.float32, torch.float32)
    rope_bwd(q, k, cos, sin, torch.float32, torch.float32, out=(q, k))
    assert torch.equal(q, want[0]) and torch.equal(k, want[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used(used, device):
    q, k = (heads(1, m, 3, 8, torch.float32, device, "bshd") for m in (4, 2))
    cos, sin = angles(1, 3, 8, torch.float32, device)
    got = torch.autograd.grad(rope(q, k, cos, sin)[used].sum(), (q, k))
    want = torch.autograd.grad(rope_ref(q, k, cos, sin)[used].sum(), (q, k), allow_unused=True, materialize_grads=True)
    assert torch.equal(got[1 - used], torch.zeros_like(got[1 - used]))
    assert errors(got[used : used + 1], want[used : used + 1])[0] <= tolerance(torch.float32, device)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device):
    q, k = (heads(2, m, 0, 8, torch.float32, device, "bhsd") for m in (4, 2))
    cos, sin = angles(1, 0, 8, torch.float32, device)
    out = rope(q, k, cos, sin)
    dq, dk = torch.autograd.grad(out[0].sum() + out[1].sum(), (q, k))
    assert dq.shape == q.shape and dk.shape == k.shape


@pytest.mark.parametrize("rotary", [3, 10])
def test_bad_shapes_are_named(rotary):
    q, k = (heads(1, m, 3, 8, torch.float32, "cpu", "bhsd") for m in (4, 2))
    with pytest.raises(ValueError, match=rf"got .*\(1, 3, {rotary}\)"):
        rope(q, k, *angles(1, 3, rotary, torch.float32, "cpu"))


def test_counts_its_backward_and_launches_kernels_where_it_should(monkeypatch):
    launched = []
    real = module.launch
    monkeypatch.setattr(module, "launch", lambda kernel, *a, **k: (launched.append(kernel), real(kernel, *a, **k)))
    counter = tally("test.rope")
    before = counter.backward
    q, k = (heads(1, m, 3, 8, torch.float32, "cpu", "bhsd") for m in (4, 2))
    out = rope(q, k, *angles(1, 3, 8, torch.float32, "cpu"), tally=counter)
    torch.autograd.grad(out, (q, k), [torch.ones_like(t) for t in out])
    assert counter.backward == before + 1
    assert use_triton(q) is INTERPRETED
    assert len(launched) == (2 if use_triton(q) else 0)


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
def test_interpreter(run_python):
    done = run_python(None, env={"TRITON_INTERPRET": "1"}, args=("-m", "pytest", "-q", "-x", "-m", "not gpu", __file__))
    assert done.returncode == 0, done.stdout + done.stderr
