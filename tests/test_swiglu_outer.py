"""SwiGLU's backward with the gradient of lora_A against float64: in the interpreter (``test_interpreter`` runs this
file again) and on a GPU.
"""

import os

import pytest
import torch
from test_grouped_gemm import BF16, FP16, FP32, GPU, INTERPRETED, relative

from fast_unsloth_patch.ops import swiglu_outer as module
from fast_unsloth_patch.ops.swiglu_outer import covers, swiglu_outer

DEVICES = ["cpu"] if "TRITON_INTERPRET" in os.environ else [pytest.param("cuda", marks=GPU)]
DTYPES = [FP32, FP16] if INTERPRETED else [BF16, FP16]


def make(tokens, width, slots, dtype, device):
    torch.manual_seed(0)
    return (torch.randn(tokens, n, device=device).to(dtype) for n in (width, 2 * width, slots))


def wanted(dh, gu, du):
    """dgu and G in float64, of the rounded h."""
    grad, (gate, up) = dh.double(), gu.double().chunk(2, 1)
    sig = torch.sigmoid(gate)
    silu = gate * sig
    dgu = torch.cat((grad * up * (sig + silu * (1 - sig)), grad * silu), 1)
    return dgu, du.double().T @ (silu * up).to(dh.dtype).double()


def check(dh, gu, out, du, rank):
    """Runs the op on ``gu`` into ``out``, which may be ``gu``; returns G."""
    dgu, want = wanted(dh, gu, du)
    g = swiglu_outer(dh, gu, out, du, rank, FP32)
    eps = torch.finfo(dh.dtype).eps * (8 if dh.dtype is FP32 else 0.5)
    assert relative(out, dgu) <= eps
    # of fp16 operands G is rounded to fp16 once
    assert g.shape == (rank, dh.shape[1])
    assert relative(g, want[:rank]) <= (eps if dh.dtype is FP16 else 2e-5)
    return g


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("tokens", "width", "rank", "slots"), [(70, 168, 16, 16), (33, 64, 5, 16), (257, 200, 24, 32)])
def test_small(tokens, width, rank, slots, splits, dtype, device, poisoned_empty, monkeypatch):
    dh, gu, du = make(tokens, width, slots, dtype, device)
    du[:, rank:] = 0
    assert covers(dh, slots)
    blocks = -(-tokens // 16)
    monkeypatch.setattr(module, "split_rows", lambda *_: -(-blocks // splits) * 16)
    check(dh, gu, torch.empty_like(gu), du, rank)
    check(dh, gu, gu, du, rank)


@GPU
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_model_sizes(dtype):
    dh, gu, du = make(8192, 14336, 16, dtype, "cuda")
    out = torch.empty_like(gu)
    g = check(dh, gu, out, du, 16)
    assert torch.equal(g, swiglu_outer(dh, gu, torch.empty_like(gu), du, 16, FP32))


def test_what_is_not_covered():
    assert not covers(torch.zeros(4, 64, dtype=torch.float64), 16)
    assert not covers(torch.zeros(0, 64), 16)
    assert not covers(torch.zeros(4, 64), 64)


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
def test_interpreter(run_python):
    done = run_python(None, env={"TRITON_INTERPRET": "1"}, args=("-m", "pytest", "-q", "-x", "-m", "not gpu", __file__))
    assert done.returncode == 0, done.stdout + done.stderr
