"""RMSNorm against its oracle in float64 and against transformers' own module.

Run as it is, the CPU cases take the op's reference path; `test_interpreter` runs the same cases through the Triton
interpreter; the ``gpu`` ones run the compiled kernels.
"""

import itertools
import os

import pytest
import torch

from fast_unsloth_patch.device.dispatch import use_triton
from fast_unsloth_patch.ops import rms_norm as module
from fast_unsloth_patch.ops.rms_norm import residual_rms_norm, rms_norm
from fast_unsloth_patch.reference import rms_norm_ref
from fast_unsloth_patch.status import Tally, tally

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EPS = 1e-5


def tolerance(dtype):
    # Relative L2. Two roundings of at most eps / 2 each in the low dtypes; in float32 the sums over H and T add a few.
    return torch.finfo(dtype).eps * (8 if dtype is torch.float32 else 1)


def assert_close(actual, expected, what=""):
    expected = expected.double()
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= tolerance(actual.dtype), f"{what} {error=}"


def strided(kind, x):
    if kind == "rows":  # every second row of a wider buffer
        wide = x.new_zeros(2 * x.shape[0], *x.shape[1:-1], x.shape[-1] + 3)
        wide[::2, ..., : x.shape[-1]] = x
        return wide[::2, ..., : x.shape[-1]]
    if kind == "columns":  # the last dimension is not the dense one
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


def inputs(shape, dtype, weight_dtype, device, layout="dense"):
    x = strided(layout, torch.randn(shape, device=device).to(dtype)).detach().requires_grad_()
    weight = (1 + 0.2 * torch.randn(shape[-1], device=device)).to(weight_dtype).requires_grad_()
    return x, weight


def oracle(x, weight, dy):
    x64, w64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    y = rms_norm_ref(x64, w64, EPS)
    return y, *torch.autograd.grad(y, (x64, w64), dy.double())


SHAPES = [((3, 5, 72), "dense"), ((7, 64), "rows"), ((2, 3, 40), "columns"), ((1, 1), "dense"), ((70, 33), "dense")]
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]
# Compiling is what a GPU case costs: there one shape meets every pair of dtypes, and every shape one pair.
CASES = [("cpu", *shape, *pair) for shape, pair in itertools.product(SHAPES, PAIRS)]
CASES += [
    pytest.param("cuda", *shape, *pair, marks=pytest.mark.gpu)
    for shape, pair in (*((SHAPES[0], pair) for pair in PAIRS), *((shape, PAIRS[3]) for shape in SHAPES[1:]))
]


@pytest.mark.parametrize(("device", "shape", "layout", "dtype", "weight_dtype"), CASES)
def test_matches_float64(device, shape, layout, dtype, weight_dtype, poisoned_empty):
    x, weight = inputs(shape, dtype, weight_dtype, device, layout)
    dy = torch.randn(shape, device=device).to(torch.promote_types(dtype, weight_dtype))
    y = rms_norm(x, weight, EPS)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    assert y.is_contiguous() and y.dtype == dy.dtype and dx.dtype == dtype and dw.dtype == weight_dtype
    want = oracle(x, weight, dy)
    # y is rounded to the dtype of x on the way, whatever its own.
    y_error = (y.double() - want[0]).norm() / want[0].norm()
    assert y_error <= max(tolerance(dtype), tolerance(y.dtype))
    dw_error = (dw.double() - want[2]).norm() / want[2].norm()
    assert dw_error <= max(tolerance(dtype), tolerance(weight_dtype))
    # At H = 1 the gradient is zero but for eps: nothing relative to hold it to.
    assert torch.isfinite(dx).all()
    if shape[-1] > 1:
        assert_close(dx, want[1], "dx")


MODELS = [(4, 128, 4096), (1, 513, 2048), (77, 5000), (9, 16384), (3, 32768), (5, 40000)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.bfloat16) for shape in MODELS),
        *((MODELS[0], t) for t in (torch.float16, torch.float32)),
        (MODELS[4], torch.float32),
    ],
)
def test_model_sizes(shape, dtype, poisoned_empty):
    x, weight = inputs(shape, dtype, dtype, "cuda")
    dy = torch.randn_like(x)
    y = rms_norm(x, weight, EPS)
    got = y, *torch.autograd.grad(y, (x, weight), dy)
    for name, a, b in zip(("y", "dx", "dw"), got, oracle(x, weight, dy), strict=True):
        assert_close(a, b, name)
    again = rms_norm(x, weight, EPS)
    again = again, *torch.autograd.grad(again, (x, weight), dy)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_not_above_stock(dtype):
    ours, stock = torch.zeros(3), torch.zeros(3)
    for seed in range(16):
        torch.manual_seed(seed)
        x, weight = inputs((256, 2048), dtype, dtype, "cuda")
        dy = torch.randn_like(x)
        want = oracle(x, weight, dy)
        for total, fn in ((ours, rms_norm), (stock, rms_norm_ref)):
            y = fn(x, weight, EPS)
            got = y, *torch.autograd.grad(y, (x, weight), dy)
            total += torch.stack([(a.double() - b).pow(2).sum().cpu() for a, b in zip(got, want, strict=True)])
    assert (ours.sqrt() <= 1.1 * stock.sqrt()).all(), (ours / stock).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_matches_transformers(dtype, autocast, device):
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the reference path is what this compares on a CPU")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(72, eps=1e-6).to(device, dtype)
    with torch.no_grad():
        norm.weight.add_(0.2 * torch.randn_like(norm.weight))
    x = torch.randn(2, 9, 72, device=device).to(dtype).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        want = norm(x)
        got = rms_norm(x, norm.weight, norm.variance_epsilon)
    assert got.dtype == want.dtype
    dy = torch.randn_like(want)
    want = want, *torch.autograd.grad(want, (x, norm.weight), dy)
    got = got, *torch.autograd.grad(got, (x, norm.weight), dy)
    if device == "cpu":
        assert torch.equal(got[0], want[0])
    for name, a, b in zip(("y", "dx", "dw"), got, want, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= 2 * tolerance(dtype), name


def test_gradcheck():
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))


@pytest.mark.parametrize("device", DEVICES)
def test_only_what_is_needed(device):
    x, weight = inputs((5, 72), torch.float32, torch.float32, device)
    dy = torch.randn_like(x)
    want = oracle(x, weight, dy)
    (dx,) = torch.autograd.grad(rms_norm(x, weight.detach(), EPS), x, dy)
    (dw,) = torch.autograd.grad(rms_norm(x.detach(), weight, EPS), weight, dy)
    assert_close(dx, want[1])
    assert_close(dw, want[2])


RESIDUALS = [
    (*shape, *pair, given)
    for shape, pair, given in (
        (SHAPES[0], PAIRS[0], "both"),
        (SHAPES[1], PAIRS[0], "both"),
        (SHAPES[2], PAIRS[3], "both"),
        (SHAPES[0], PAIRS[2], "both"),
        (SHAPES[4], PAIRS[1], "both"),
        (SHAPES[0], PAIRS[0], "normed"),
        (SHAPES[0], PAIRS[0], "summed"),
    )
]


@pytest.mark.parametrize(("shape", "layout", "dtype", "weight_dtype", "given"), RESIDUALS)
@pytest.mark.parametrize("delta_dtype", [None, "same", torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_residual(device, shape, layout, dtype, weight_dtype, given, delta_dtype, poisoned_empty):
    """``summed = x + delta`` and its norm, with a gradient to both results, or to one."""
    x, weight = inputs(shape, dtype, weight_dtype, device, layout)
    delta = None
    if delta_dtype is not None:
        kind = dtype if delta_dtype == "same" else delta_dtype
        delta = strided(layout, torch.randn(shape, device=device).to(kind)).detach().requires_grad_()
    wanted = [t for t in (x, delta, weight) if t is not None]
    y, summed = residual_rms_norm(x, delta, weight, EPS)
    kind = dtype if delta is None else torch.promote_types(dtype, delta.dtype)
    assert summed.dtype == kind and y.dtype == torch.promote_types(kind, weight_dtype) and y.is_contiguous()

    exact = [t.detach().double().requires_grad_() for t in wanted]
    # What is normed is the rounded sum, as in stock.
    added = exact[0] if delta is None else exact[0] + exact[1]
    added = added + (summed.detach().double() - added.detach())
    want = rms_norm_ref(added, exact[-1], EPS), added
    assert torch.equal(summed, x if delta is None else x + delta)
    assert (y.double() - want[0]).norm() <= max(tolerance(kind), tolerance(y.dtype)) * want[0].norm()

    which = {"both": (0, 1), "normed": (0,), "summed": (1,)}[given]
    grads = [torch.randn(shape, device=device).to((y, summed)[i].dtype) for i in which]
    got = torch.autograd.grad([(y, summed)[i] for i in which], wanted, grads, allow_unused=True)
    want_grads = torch.autograd.grad([want[i] for i in which], exact, [g.double() for g in grads], allow_unused=True)
    for name, a, b, t in zip(("x", "delta", "weight"), got, want_grads, wanted):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == t.dtype
            error = (a.double() - b).norm() / b.norm()
            assert error <= 2 * max(tolerance(dtype), tolerance(weight_dtype), tolerance(a.dtype)), (name, error)


def test_residual_of_another_shape():
    with pytest.raises(ValueError, match=r"delta is \(8,\), expected the shape of x, \(2, 8\)"):
        residual_rms_norm(torch.zeros(2, 8), torch.zeros(8), torch.ones(8), EPS)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    x, weight = inputs((0, 4, 72), torch.float32, torch.float32, device)
    y = rms_norm(x, weight, EPS)
    dx, dw = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(weight))


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_a_sum_is_an_expanded_tensor(device):
    x, weight = inputs((4, 72), torch.float32, torch.float32, device)
    dx, dw = torch.autograd.grad(rms_norm(x, weight, EPS).sum(), (x, weight))
    want = oracle(x, weight, torch.ones_like(x))
    assert_close(dx, want[1])
    assert_close(dw, want[2])


def test_counts_its_backward_and_differentiates_once():
    counter = tally("test.rms_norm")
    assert isinstance(counter, Tally)
    before = counter.backward
    x, weight = inputs((2, 8), torch.float32, torch.float32, "cpu")
    (dx,) = torch.autograd.grad(rms_norm(x, weight, EPS, tally=counter).sum(), x, create_graph=True)
    assert counter.backward == before + 1
    with pytest.raises(RuntimeError, match="differentiated once only"):
        dx.sum().backward()


def test_launches_kernels_where_it_should(monkeypatch):
    launched = []
    real = module.launch
    monkeypatch.setattr(module, "launch", lambda kernel, *a, **k: (launched.append(kernel), real(kernel, *a, **k)))
    x, weight = inputs((3, 8), torch.float32, torch.float32, "cpu")
    torch.autograd.grad(rms_norm(x, weight, EPS).sum(), (x, weight))
    assert use_triton(x) is bool(os.environ.get("TRITON_INTERPRET"))
    assert len(launched) == (3 if use_triton(x) else 0)


def test_dw_programs_cover_every_row_once():
    for n_rows in (1, 3, 64, 513, 8192, 65537):
        for rows in (1, 32):
            programs, each = module._dw_programs(n_rows, rows, 8, 132)
            assert (programs - 1) * each * rows < n_rows <= programs * each * rows


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is the run it starts")
def test_interpreter(run_python):
    done = run_python(None, env={"TRITON_INTERPRET": "1"}, args=("-m", "pytest", "-q", "-x", "-m", "not gpu", __file__))
    assert done.returncode == 0, done.stdout + done.stderr
