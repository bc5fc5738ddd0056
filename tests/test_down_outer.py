"""Both skinny products of one pass against the reference in float64.

The same cases run on the CPU (reference path), in the Triton interpreter (``test_in_the_interpreter`` runs this file
again in a subprocess), and on a GPU (marker ``gpu``).
"""

from __future__ import annotations

import os
import subprocess
import sys

import kernel_cases
import pytest
import torch

from fast_unsloth_patch.device.launch import TARGETS, target_limits
from fast_unsloth_patch.ops.down_outer import covers, down_outer, split_rows, stripe_of
from fast_unsloth_patch.ops.low_rank import Siblings, layout_of
from fast_unsloth_patch.reference.down_outer import down_outer_ref

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu"] if INTERPRETED else ["cpu", GPU]
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def operands(tokens, widths, ranks, device, dtype, *, by_rows=True, mats_dtype=FP32, spare=0, shuffled=False):
    """x, u and siblings, and what the reference takes: float64 of the values that the op computes with."""
    layout = layout_of(ranks)
    starts, at = [], 0
    for width in widths:
        starts.append(at)
        at += width
    if shuffled:  # the siblings' columns of x in another order than the siblings
        starts = [at - start - width for start, width in zip(starts, widths)]
    x = torch.randn(tokens, at + spare).to(device, dtype)[:, :at]
    shapes = [(w, r) if by_rows else (r, w) for w, r in zip(widths, ranks)]
    mats = tuple(torch.randn(shape).to(device, mats_dtype) for shape in shapes)
    # What lies beyond a rank is not to be read.
    u = torch.full((tokens, layout.width), float("nan"), device=device, dtype=dtype)
    parts = [torch.randn(tokens, r).to(device, dtype) for r in ranks]
    for part, first in zip(parts, layout.starts):
        u[:, first : first + part.shape[1]] = part
    scales = tuple(0.5 + j for j in range(len(widths)))
    siblings = Siblings(mats, scales, by_rows=by_rows, starts=tuple(starts))
    exact = down_outer_ref(
        x.double(), [p.double() for p in parts], [m.to(dtype).double() for m in mats], scales, starts=starts,
        by_rows=by_rows,
    )  # fmt: skip
    return x, u, siblings, exact


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


def check(d, grads, siblings, exact, dtype):
    ranks = tuple(m.shape[1 if siblings.by_rows else 0] for m in siblings.mats)
    layout = layout_of(ranks)
    # d is rounded to the compute dtype; G is not but where its matrices are, or fp16 is.
    eps = torch.finfo(dtype).eps
    assert d.dtype is dtype and d.shape[1] == layout.width
    for j, (rank, first, slots) in enumerate(zip(ranks, layout.starts, layout.slots)):
        assert error(d[:, first : first + rank], exact[0][j]) < max(eps, 2e-6)
        assert not d[:, first + rank : first + slots].any()
        g, m = grads[j], siblings.mats[j]
        assert g.shape == m.shape and g.dtype is m.dtype and g.is_contiguous()
        rounded = dtype is FP16 or m.dtype is not FP32
        assert error(g, exact[1][j]) < (max(eps, torch.finfo(m.dtype).eps) if rounded else 2e-6)


SHAPES = [
    (70, (96,), (16,), {"spare": 8}),
    (33, (130,), (5,), {"by_rows": False}),
    (130, (96, 40, 33), (16, 3, 8), {"spare": 8}),
    (65, (64, 64), (20, 8), {}),
    (1, (48, 64), (8, 32), {"by_rows": False, "shuffled": True}),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "widths", "ranks", "options"), SHAPES)
def test_against_the_reference(device, tokens, widths, ranks, options, poisoned_empty):
    x, u, siblings, exact = operands(tokens, widths, ranks, device, FP32, **options)
    assert covers(x, siblings, FP32) == INTERPRETED
    check(*down_outer(x, u, siblings, FP32), siblings, exact, FP32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("tokens", "widths", "ranks", "options"),
    [
        (2000, (14336, 14336), (16, 16), {}),
        (1030, (4096, 1024, 1024), (8, 16, 16), {"spare": 16}),
        (512, (4096,), (32,), {"mats_dtype": BF16}),
        (777, (1000,), (16,), {"by_rows": False, "mats_dtype": FP16}),
        (64, (1001, 333), (16, 32), {"spare": 3}),  # rows at odd addresses
    ],
)
def test_low_precision(dtype, tokens, widths, ranks, options, poisoned_empty):
    x, u, siblings, exact = operands(tokens, widths, ranks, "cuda", dtype, **options)
    assert covers(x, siblings, dtype)
    d, grads = down_outer(x, u, siblings, dtype)
    check(d, grads, siblings, exact, dtype)
    for _ in range(3):
        again, grads_again = down_outer(x, u, siblings, dtype)
        assert torch.equal(d, again) and all(torch.equal(a, b) for a, b in zip(grads, grads_again))


@pytest.mark.gpu
def test_a_gradient_that_overflows_fp16_is_infinite():
    """A loss scaler must find what stock's GEMM in fp16 would have shown it."""
    x, u, siblings, _ = operands(64, (64,), (16,), "cuda", FP16)
    _, (g,) = down_outer(torch.full_like(x, 400.0), torch.full_like(u, 400.0), siblings, FP16)
    assert g.dtype is FP32 and g.isinf().all()


def test_what_it_does_not_cover_takes_the_reference():
    x, u, siblings, exact = operands(20, (16,), (64,), "cpu", FP32)
    assert not covers(x, siblings, FP32)  # more than 32 slots
    check(*down_outer(x, u, siblings, FP32), siblings, exact, FP32)
    x, u, siblings, exact = operands(20, (16,), (8,), "cpu", FP32)
    assert not covers(x, siblings._replace(masks=torch.zeros(1, 20, 1, dtype=torch.int32)), FP32)
    assert not covers(x, siblings, BF16) and not covers(x[:0], siblings, FP32)
    down, (grad,) = down_outer(x[:0], u[:0], siblings, FP32)
    assert down.shape == (0, 16) and not grad.any()


def test_rows_are_split_to_fill_the_chip():
    for tokens, stripes, programs in ((8192, 56, 132), (8192, 12, 132), (512, 56, 132), (32768, 8, 264), (3, 1, 4)):
        rows = split_rows(tokens, stripes, 64, programs)
        assert rows % 64 == 0 and 0 < rows < tokens + 64
        waves = stripes * -(-tokens // rows) / programs
        assert waves <= 1 or waves / -(-waves // 1) > 0.9  # the last is no small rest
    assert split_rows(8192, 12, 64, 132) == 12 * 64  # one wave


def launches(capability, dtype, tokens, widths, ranks, by_rows, mats_dtype):
    def meta(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    limits = target_limits(capability, 132)
    mats = tuple(meta(*((w, r) if by_rows else (r, w)), dtype=mats_dtype) for w, r in zip(widths, ranks))
    starts = tuple(sum(widths[:j]) for j in range(len(widths)))
    siblings = Siblings(mats, (1.0,) * len(mats), by_rows=by_rows, starts=starts)
    with kernel_cases.recorded(limits) as found:
        x, u = meta(tokens, sum(widths), dtype=dtype), meta(tokens, layout_of(ranks).width, dtype=dtype)
        assert covers(x, siblings, dtype)
        down_outer(x, u, siblings, dtype)
    return [kernel_cases._as_case("8B", kernel, args, consts, options) for kernel, args, consts, options in found]


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize(
    "case",
    [
        (BF16, 8192, (14336, 14336), (16, 16), True, FP32),
        (BF16, 512, (4096, 1024, 1024), (8, 32, 4), True, BF16),
        (FP16, 8192, (14336,), (16,), False, FP32),
    ],
    ids=["gate,up", "q,k,v", "hidden"],
)
def test_compiles_without_spills(capability, case, tmp_path, monkeypatch):
    """And takes no more shared memory than the table says."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    for launched in launches(capability, *case):
        compiled = kernel_cases.build(launched, capability)
        stripe = stripe_of(dict(launched.constexprs)["SLOTS"], target_limits(capability))
        assert compiled.metadata.shared <= stripe.smem, f"{launched} needs {compiled.metadata.shared}"
        used = kernel_cases.resources(compiled, tmp_path)
        assert used["STACK"] == 0, f"{launched} spills: {used}"


def test_other_chips_take_two_passes():
    for capability in TARGETS:
        assert INTERPRETED or (stripe_of(16, target_limits(capability)) is not None) == (capability in (90, 100))
    assert stripe_of(64, target_limits(90)) is None


@pytest.mark.skipif(INTERPRETED, reason="this is what runs it")
def test_in_the_interpreter():
    """Every case above through the Triton kernels, in fp32."""
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
