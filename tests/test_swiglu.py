"""SwiGLU against its oracle in float64 and stock's expression; test_rms_norm.py says how the cases run."""

import itertools
import os

import pytest
import torch

from fast_unsloth_patch.device.dispatch import use_triton
from fast_unsloth_patch.ops import swiglu as module
from fast_unsloth_patch.ops.swiglu import swiglu, swiglu_bwd, swiglu_fwd
from fast_unsloth_patch.reference import swiglu_ref
from fast_unsloth_patch.status import tally

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16]
if "TRITON_INTERPRET" not in os.environ:  # bfloat16 is wrong in the interpreter, and never goes there
    DTYPES += [torch.bfloat16]


def tolerance(dtype):
    # Relative L2. Two roundings of at most eps / 2 in the low dtypes; in float32 the exponential adds a few ulp.
    return torch.finfo(dtype).eps * (4 if dtype is torch.float32 else 1)


def inputs(shape, dtype, device, layout="dense"):
    if layout == "stacked":  # the two halves of one GEMM's output
        both = 2 * torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)
        pair = both.chunk(2, dim=-1)
    elif layout == "columns":
        pair = [
            2 * torch.randn(*shape[:-2], *shape[:-3:-1], device=device).to(dtype).transpose(-1, -2) for _ in range(2)
        ]
    else:
        pair = [2 * torch.randn(shape, device=device).to(dtype) for _ in range(2)]
    return [t.detach().requires_grad_() for t in pair]


def run(fn, gate, up, dy):
    y = fn(gate, up)
    return y, *torch.autograd.grad(y, (gate, up), dy)


def oracle(gate, up, dy):
    return run(swiglu_ref, *(t.detach().double().requires_grad_() for t in (gate, up)), dy.double())


def errors(got, want):
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(got, want, strict=True)]


SHAPES = [(2, 3, 40), (5, 1030), (3, 1), (1, 1024)]
LAYOUTS = ["dense", "stacked", "columns"]
# Compiling is what a GPU case costs: there one shape meets every dtype, the others one layout each.
CASES = [("cpu", *case) for case in itertools.product(SHAPES, LAYOUTS, DTYPES)]
CASES += [
    pytest.param("cuda", *case, marks=pytest.mark.gpu)
    for case in (
        *((SHAPES[0], "stacked", dtype) for dtype in DTYPES),
        *((shape, layout, torch.float16) for shape, layout in zip(SHAPES[1:], ("stacked", "dense", "columns"))),
        (SHAPES[0], "columns", torch.float16),
    )
]


@pytest.mark.parametrize(("device", "shape", "layout", "dtype"), CASES)
def test_matches_float64(device, shape, layout, dtype, poisoned_empty):
    gate, up = inputs(shape, dtype, device, layout)
    dy = torch.randn(shape, device=device).to(dtype)
    got = run(swiglu, gate, up, dy)
    assert got[0].is_contiguous() and all(t.dtype == dtype for t in got)
    assert all(error <= tolerance(dtype) for error in errors(got, oracle(gate, up, dy)))


MODELS = [(4, 128, 14336), (513, 8192), (77, 11008), (70000, 136)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.bfloat16) for shape in MODELS), *((MODELS[0], t) for t in (torch.float16, torch.float32))],
)
def test_model_sizes(shape, dtype, poisoned_empty):
    gate, up = inputs(shape, dtype, "cuda", "stacked")
    dy = torch.randn_like(gate)
    got = run(swiglu, gate, up, dy)
    assert all(error <= tolerance(dtype) for error in errors(got, oracle(gate, up, dy)))
    assert all(torch.equal(a, b) for a, b in zip(got, run(swiglu, gate, up, dy), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_not_above_stock(dtype, device):
    ours, stock = torch.zeros(3), torch.zeros(3)
    for seed in range(16):
        torch.manual_seed(seed)
        gate, up = inputs((8, 96), dtype, device)
        dy = torch.randn_like(gate)
        want = oracle(gate, up, dy)
        for total, fn in ((ours, swiglu), (stock, swiglu_ref)):
            got = run(fn, gate, up, dy)
            total += torch.stack([(a.double() - b).pow(2).sum().cpu() for a, b in zip(got, want, strict=True)])
    assert (ours.sqrt() <= 1.1 * stock.sqrt()).all(), (ours / stock).sqrt()


@pytest.mark.parametrize("device", DEVICES)
def test_large_inputs_do_not_overflow(device):
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], device=device, requires_grad=True)
    up = torch.full_like(gate, 0.5).requires_grad_()
    got, want = (run(fn, gate, up, torch.ones_like(gate)) for fn in (swiglu, swiglu_ref))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-30)


def test_gradcheck():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_outputs_may_be_the_inputs(dtype, device):
    gate, up = (t.detach() for t in inputs((4, 40), dtype, device, "stacked"))
    dy = torch.randn(4, 40, device=device).to(dtype)
    want_y = swiglu_fwd(gate, up)
    want = swiglu_bwd(dy, gate, up)
    kept = torch.empty_like(dy)
    got = swiglu_bwd(dy, gate, up, product=kept)
    assert torch.equal(kept, want_y) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    # Gradients over gate and up, the product over dy: the backward of a whole MLP in the memory it has.
    assert swiglu_bwd(dy, gate, up, out=(gate, up), product=dy)[0] is gate
    assert torch.equal(gate, want[0]) and torch.equal(up, want[1]) and torch.equal(dy, want_y)


@pytest.mark.parametrize("device", DEVICES)
def test_forward_over_its_input(device):
    gate, up = (t.detach() for t in inputs((4, 40), torch.float32, device))
    want = swiglu_fwd(gate, up)
    assert swiglu_fwd(gate, up, out=up) is up
    assert torch.equal(up, want)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    gate, up = inputs((0, 3, 24), torch.float32, device)
    y = swiglu(gate, up)
    dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    assert y.shape == dgate.shape == dup.shape == (0, 3, 24)


def test_mismatch_is_named():
    gate, up = inputs((2, 24), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"\(2, 24\) torch.float32 and \(2, 12\)"):
        swiglu(gate, up[:, :12])
    with pytest.raises(ValueError, match=r"torch\.float16"):
        swiglu(gate, up.half())


def test_counts_its_backward_and_launches_kernels_where_it_should(monkeypatch):
    launched = []
    real = module.launch
    monkeypatch.setattr(module, "launch", lambda kernel, *a, **k: (launched.append(kernel), real(kernel, *a, **k)))
    counter = tally("test.swiglu")
    before = counter.backward
    gate, up = inputs((2, 24), torch.float32, "cpu")
    torch.autograd.grad(swiglu(gate, up, tally=counter).sum(), (gate, up))
    assert counter.backward == before + 1
    assert use_triton(gate) is bool(os.environ.get("TRITON_INTERPRET"))
    assert len(launched) == (2 if use_triton(gate) else 0)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is the run it starts")
def test_interpreter(run_python):
    done = run_python(None, env={"TRITON_INTERPRET": "1"}, args=("-m", "pytest", "-q", "-x", "-m", "not gpu", __file__))
    assert done.returncode == 0, done.stdout + done.stderr
