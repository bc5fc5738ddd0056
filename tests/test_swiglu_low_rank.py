"""SwiGLU with what it makes for the adapter of the down projection, in one pass each way, against float64: in the
interpreter (``test_interpreter`` runs this file again) and on a GPU.
"""

import os

import pytest
import torch
from test_grouped_gemm import BF16, FP16, FP32, GPU, INTERPRETED, relative

from fast_unsloth_patch.ops import swiglu_low_rank
from fast_unsloth_patch.ops.swiglu_low_rank import covers, hidden_down, swiglu_down, swiglu_outer

DEVICES = ["cpu"] if "TRITON_INTERPRET" in os.environ else [pytest.param("cuda", marks=GPU)]
DTYPES = [FP32, FP16] if INTERPRETED else [BF16, FP16]
SMALL = [(70, 168, 16, 16), (33, 64, 5, 16), (257, 200, 24, 32)]  # tokens, width, rank, slots


def make(device, dtype, *shapes):
    torch.manual_seed(0)
    return (torch.randn(shape, device=device).to(dtype) for shape in shapes)


def eps(dtype):
    return torch.finfo(dtype).eps * (8 if dtype is FP32 else 0.5)


def parts(gu):
    """sigmoid(gate), silu(gate), up in float64."""
    gate, up = gu.double().chunk(2, 1)
    sig = torch.sigmoid(gate)
    return sig, gate * sig, up


def check_down(gu, packed):
    """Runs the op; returns u."""
    _, silu, up = parts(gu)
    h, u = swiglu_down(gu, packed)
    assert torch.equal(hidden_down(h, packed), u), "a layer is kept or recomputed with the same bits"
    assert h.dtype is u.dtype is gu.dtype
    assert relative(h, silu * up) <= eps(gu.dtype)
    assert relative(u, h.double() @ packed.double().T) <= eps(gu.dtype)
    return u


def check_outer(dh, gu, out, du, rank):
    """Runs the op on ``gu`` into ``out``, which may be ``gu``; returns G."""
    sig, silu, up = parts(gu)
    grad = dh.double()
    dgu = torch.cat((grad * up * (sig + silu * (1 - sig)), grad * silu), 1)
    want = du.double().T @ (silu * up).to(dh.dtype).double()
    g = swiglu_outer(dh, gu, out, du, rank, FP32)
    assert relative(out, dgu) <= eps(dh.dtype)
    # of fp16 operands G is rounded to fp16 once
    assert g.shape == (rank, dh.shape[1])
    assert relative(g, want[:rank]) <= (eps(FP16) if dh.dtype is FP16 else 2e-5)
    return g


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "rank", "slots"), SMALL)
def test_forward(tokens, width, rank, slots, dtype, device, poisoned_empty):
    gu, packed = make(device, dtype, (tokens, 2 * width), (slots, width))
    packed[rank:] = 0
    assert covers(gu, slots)
    u = check_down(gu, packed)
    assert not u[:, rank:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("tokens", "width", "rank", "slots"), SMALL)
def test_backward(tokens, width, rank, slots, splits, dtype, device, poisoned_empty, monkeypatch):
    dh, gu, du = make(device, dtype, (tokens, width), (tokens, 2 * width), (tokens, slots))
    du[:, rank:] = 0
    assert covers(dh, slots)
    blocks = -(-tokens // 16)
    monkeypatch.setattr(swiglu_low_rank, "split_rows", lambda *_: -(-blocks // splits) * 16)
    check_outer(dh, gu, torch.empty_like(gu), du, rank)
    check_outer(dh, gu, gu, du, rank)


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_that_overflows_fp16_is_infinite(device):
    """As stock's product in fp16 would be: a loss scaler must find it."""
    dh, gu, du = (torch.full((64, n), 200.0, device=device, dtype=FP16) for n in (64, 128, 16))
    assert swiglu_outer(dh, gu, torch.empty_like(gu), du, 16, FP32).isinf().all()


@GPU
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_model_sizes(dtype):
    dh, gu, du, packed = make("cuda", dtype, (8192, 14336), (8192, 28672), (8192, 16), (16, 14336))
    packed *= 0.02
    assert torch.equal(check_down(gu, packed), swiglu_down(gu, packed)[1])
    g = check_outer(dh, gu, torch.empty_like(gu), du, 16)
    assert torch.equal(g, swiglu_outer(dh, gu, torch.empty_like(gu), du, 16, FP32))


def test_what_is_not_covered():
    assert not covers(torch.zeros(4, 64, dtype=torch.float64), 16)
    assert not covers(torch.zeros(0, 64), 16)
    assert not covers(torch.zeros(4, 64), 64)


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
def test_interpreter(run_python):
    done = run_python(None, env={"TRITON_INTERPRET": "1"}, args=("-m", "pytest", "-q", "-x", "-m", "not gpu", __file__))
    assert done.returncode == 0, done.stdout + done.stderr
