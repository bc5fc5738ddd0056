"""The skinny products of expert adapters against formulas in float64: two grouped products on the CPU, the kernels in
the interpreter (``test_interpreter`` runs this file again) and on a GPU.
"""

import pytest
import torch
from test_grouped_gemm import (
    BF16,
    COUNTS,
    DTYPES,
    EVEN,
    FP16,
    FP32,
    GPU,
    INTERPRETED,
    SKEWED,
    name_of,
    oracle,
    outer_wanted,
    relative,
    routing_of,
    rows_of,
    tolerance,
    used,
)

from fast_unsloth_patch.ops import grouped_low_rank as module
from fast_unsloth_patch.ops.grouped_low_rank import grouped_down, grouped_down_outer

DOWN = ["grouped_down_outer_kernel", "grouped_down_sum_kernel"]
BOTH = [*DOWN, "grouped_outer_sum_kernel"]


@pytest.fixture
def launched(monkeypatch):
    names, real = [], module.launch
    monkeypatch.setattr(
        module, "launch", lambda kernel, *a, **k: (names.append(name_of(kernel)), real(kernel, *a, **k))
    )
    return names


def problem(counts, width, slots, dtype, block=32, device="cpu"):
    """Rows [R, width] and [R, slots], and B [E, width, slots] of the adapters."""
    routing = routing_of(counts, block, device)
    factor = (torch.randn(len(counts), width, slots, device=device) * width**-0.5).to(dtype)
    return routing, rows_of(routing, width, dtype, strided=True), rows_of(routing, slots, dtype), factor


def check(got, want, routing, dtype):
    assert got.dtype is dtype
    assert relative(got[: used(routing)], want) <= tolerance(dtype) if want.numel() else got.numel() >= 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [16, 32])
@pytest.mark.parametrize("counts", COUNTS)
def test_down(counts, slots, dtype, poisoned_empty, launched):
    routing, x, _, b = problem(counts, 168, slots, dtype)
    want = oracle(x, b, routing)
    check(grouped_down(x, b, routing, by_rows=True), want, routing, dtype)
    check(grouped_down(x, b.mT.contiguous(), routing, by_rows=False), want, routing, dtype)
    assert launched == (DOWN * 2 if INTERPRETED else [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3, 7])
@pytest.mark.parametrize(("counts", "slots"), [((70, 0, 130, 1, 0), 16), ((0, 0, 65), 32), ((33,), 16), ((0, 0), 16)])
def test_down_and_outer(counts, slots, splits, dtype, poisoned_empty, launched, monkeypatch):
    """However the rows are cut: within an expert, with several experts in a range, at their border."""
    routing, x, u, b = problem(counts, 168, slots, dtype)
    blocks = -(-x.shape[0] // 32)
    monkeypatch.setattr(module, "split_rows", lambda *_: -(-blocks // splits) * 32)
    for result in (dtype, FP32):
        d, g = grouped_down_outer(x, u, b, routing, result)
        check(d, oracle(x, b, routing), routing, dtype)
        assert g.dtype is result and g.is_contiguous()
        rounded = FP16 if dtype is FP16 else result
        want = outer_wanted(x, u, routing)
        assert relative(g, want) <= tolerance(rounded) if want.any() else not g.any()
        assert not any(g[e].any() for e, count in enumerate(counts) if not count)
    assert launched == (BOTH * 2 if INTERPRETED else [])


def test_another_experts_values_do_not_leak():
    routing, x, u, b = problem((40, 0, 30), 168, 16, FP32)
    b[1:] = float("nan")
    x[64:], u[64:] = float("inf"), float("nan")
    d, g = grouped_down_outer(x, u, b, routing, FP32)
    assert relative(d[:64], x[:64].double() @ b[0].double()) <= tolerance(FP32)
    assert relative(g[0], x[:64].double().T @ u[:64].double()) <= tolerance(FP32)


def test_what_the_kernels_do_not_take(launched):
    for slots, block, dtype in ((64, 32, FP32), (16, 8, FP32), (16, 32, torch.float64)):
        routing, x, u, b = problem((40, 0, 30), 72, slots, dtype, block)
        d, g = grouped_down_outer(x, u, b, routing, dtype)
        assert relative(d[: used(routing)], oracle(x, b, routing)) <= tolerance(FP32)
        assert relative(g, outer_wanted(x, u, routing)) <= tolerance(FP32)
        turned = grouped_down(x, b.mT.contiguous(), routing, by_rows=False)
        assert relative(turned[: used(routing)], oracle(x, b, routing)) <= tolerance(FP32)
    assert launched == []


def test_outer_overflows_where_stock_does():
    routing, x, u, b = problem((64, 3), 64, 16, FP16)
    _, g = grouped_down_outer(x.fill_(60.0), u.fill_(60.0), b, routing, FP32)
    assert g[0].isinf().all()


@GPU
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("slots", [16, 32, 64])
@pytest.mark.parametrize(("counts", "width"), [(EVEN, 4096), (SKEWED, 28672), (SKEWED, 14336), ((0, 0, 1500), 1000)])
def test_model_sizes(counts, width, slots, dtype, launched):
    routing, x, u, b = problem(counts, width, slots, dtype, 128, "cuda")
    d, g = grouped_down_outer(x, u, b, routing, FP32)
    if torch.cuda.get_device_capability() == (9, 0):
        assert launched == (BOTH if slots < 64 else [])
    want = oracle(x, b, routing)
    check(d, want, routing, dtype)
    # Sums of 9,000 products of 16 bits in fp32.
    assert relative(g, outer_wanted(x, u, routing)) <= (tolerance(FP16) if dtype is FP16 else 2e-5)
    again = grouped_down_outer(x, u, b, routing, FP32)
    assert torch.equal(d[: used(routing)], again[0][: used(routing)]) and torch.equal(g, again[1])
    check(grouped_down(x, b.mT.contiguous(), routing, by_rows=False), want, routing, dtype)


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
def test_interpreter(run_python):
    done = run_python(None, env={"TRITON_INTERPRET": "1"}, args=("-m", "pytest", "-q", "-x", "-m", "not gpu", __file__))
    assert done.returncode == 0, done.stdout + done.stderr
