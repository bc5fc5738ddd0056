"""The persistent GEMM against formulas in float64: the reference on the CPU, the kernels in the interpreter
(``test_interpreter`` runs this file again), compiled for sm_90 without a GPU, and on one (marker ``gpu``).
"""

import os
import re
import subprocess
import threading
from typing import NamedTuple

import pytest
import torch

from fast_unsloth_patch.ops import gemm as module
from fast_unsloth_patch.ops.gemm import Tile, Update, covers, gemm, gemm_dx, gemm_swiglu

INTERPRETED = "TRITON_INTERPRET" in os.environ
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPU = pytest.mark.gpu
# Tiles of the interpreter: so small that tests of a few rows have several, and one that is not full.
TINY = Tile(16, 32, 16, 2, 4, 2)


def tolerance(dtype):
    # Relative L2: half an eps for the one rounding of the 16-bit dtypes; for float32 the sums of a hundred products.
    return torch.finfo(dtype).eps * (8 if dtype is FP32 else 0.5)


class Problem(NamedTuple):
    """x [T, K] (or x K-major dy), sibling weights [N_j, K], and B_j or A_j with their u: the kernels' own operands."""

    x: torch.Tensor
    dy: torch.Tensor
    weights: list
    forward: Update
    backward: Update
    bias: torch.Tensor
    residual: torch.Tensor
    addend: torch.Tensor


def rows(tokens, width, dtype, device):
    """[T, width] whose rows are a little further apart than they are long."""
    return torch.randn(tokens, width + 16, device=device).to(dtype)[:, 8 : width + 8]


def update(tokens, factors, ranks, dtype, device):
    starts, at = [], 0
    for rank in ranks:
        starts.append(at)
        at += module.rank_slots(rank) if rank else 0
    u = torch.full((tokens, at + 8), float("nan"), device=device, dtype=dtype)  # nobody reads beyond a rank
    for start, rank in zip(starts, ranks):
        u[:, start : start + rank] = torch.randn(tokens, rank, device=device)
    return Update(u, factors, starts)


def problem(tokens, k, widths, ranks, dtype, device, adapters=FP32):
    total = sum(widths)

    def draw(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape, device=device) * scale).to(dtype)

    weights = [draw(n, k, scale=k**-0.5) for n in widths]
    b = [draw(n, r, scale=0.3, dtype=adapters) if r else None for n, r in zip(widths, ranks)]
    a = [draw(r, k, scale=0.3, dtype=adapters) if r else None for r in ranks]
    return Problem(
        rows(tokens, k, dtype, device), rows(tokens, total, dtype, device), weights,
        update(tokens, b, ranks, dtype, device), update(tokens, a, ranks, dtype, device),
        draw(total, dtype=FP32), rows(tokens, total, dtype, device), rows(tokens, k, dtype, device),
    )  # fmt: skip


def forward_oracle(p, j):
    y = p.x.double() @ p.weights[j].double().t()
    b, start = p.forward.factors[j], p.forward.starts[j]
    if b is None:
        return y
    return y + p.forward.u[:, start : start + b.shape[1]].double() @ b.to(p.x.dtype).double().t()


def gemm_oracle(p):
    y = torch.cat([forward_oracle(p, j) for j in range(len(p.weights))], 1)
    return y + p.bias.double() + p.residual.double()


def swiglu_oracle(p):
    gate, up = (forward_oracle(p, j).to(p.x.dtype).double() for j in range(2))
    return gate / (1 + torch.exp(-gate)) * up


def dx_oracle(p):
    dx, column = p.addend.double(), 0
    for weight, a, start in zip(p.weights, p.backward.factors, p.backward.starts):
        dx = dx + p.dy[:, column : column + weight.shape[0]].double() @ weight.double()
        column += weight.shape[0]
        if a is not None:
            dx = dx + p.backward.u[:, start : start + a.shape[0]].double() @ a.to(p.x.dtype).double()
    return dx


def run(op, p, **options):
    if op == "gemm":
        return gemm(p.x, p.weights, update=p.forward, bias=p.bias, residual=p.residual, **options), gemm_oracle(p)
    if op == "swiglu":
        return gemm_swiglu(p.x, *p.weights, update=p.forward, **options), swiglu_oracle(p)
    return gemm_dx(p.dy, p.weights, update=p.backward, addend=p.addend, **options), dx_oracle(p)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


SMALL = [
    ("gemm", 1, (40,), (4,)),
    ("gemm", 50, (64, 32), (16, 20)),
    ("gemm", 19, (32, 64, 32), (8, 0, 16)),
    ("gemm", 33, (64, 32, 32), (0, 0, 0)),
    ("swiglu", 19, (40, 40), (4, 16)),
    ("swiglu", 50, (64, 64), (0, 24)),
    ("dx", 1, (40,), (4,)),
    ("dx", 50, (64, 32), (16, 20)),
    ("dx", 19, (32, 64, 32), (8, 0, 16)),
    ("dx", 33, (16, 32, 16), (0, 0, 0)),
]


@pytest.mark.parametrize("dtype", [FP32, FP16] if INTERPRETED else [FP32, FP16, BF16])
@pytest.mark.parametrize(("op", "tokens", "widths", "ranks"), SMALL)
def test_matches_float64(op, tokens, widths, ranks, dtype, poisoned_empty):
    p = problem(tokens, 72, widths, ranks, dtype, "cpu")
    for tile in [TINY] if INTERPRETED else [None]:
        got, want = run(op, p, tile=tile)
        assert got.dtype is dtype and got.is_contiguous()
        assert relative(got, want) <= tolerance(dtype)


QWEN = (3584, 512, 512)
LARGE = [
    ("gemm", 8192, 4096, (4096, 1024, 1024), (16, 16, 16)),
    ("gemm", 2049, 4096, (4096,), (8,)),
    ("gemm", 2500, 14336, (4096,), (64,)),
    ("gemm", 4096, 3584, QWEN, (16, 0, 32)),
    ("gemm", 2048, 72, (1000,), (0,)),
    ("swiglu", 8192, 4096, (14336, 14336), (16, 16)),
    ("swiglu", 2049, 2048, (8192, 8192), (64, 0)),
    ("swiglu", 2050, 72, (1000, 1000), (0, 0)),
    ("dx", 8192, 4096, (4096, 1024, 1024), (16, 16, 16)),
    ("dx", 2500, 4096, (14336, 14336), (8, 64)),
    ("dx", 2049, 14336, (4096,), (16,)),
    ("dx", 4096, 3584, QWEN, (0, 16, 0)),
    ("dx", 2048, 1000, (72,), (0,)),
]


@GPU
@pytest.mark.parametrize(
    ("op", "tokens", "k", "widths", "ranks", "dtype"),
    [(*case, BF16) for case in LARGE] + [(*case, FP16) for case in LARGE[::4]],
)
def test_model_sizes(op, tokens, k, widths, ranks, dtype, poisoned_empty):
    p = problem(tokens, k, widths, ranks, dtype, "cuda")
    assert covers(p.x, p.weights, ranks) or widths == (1000, 1000)
    got, want = run(op, p)
    assert relative(got, want) <= tolerance(dtype)
    assert torch.equal(got, run(op, p)[0])


@GPU
def test_adapters_in_other_dtypes():
    for adapters in (BF16, FP16):
        p = problem(2048, 512, (512, 256), (16, 32), BF16, "cuda", adapters)
        assert relative(*run("gemm", p)) <= tolerance(BF16) and relative(*run("dx", p)) <= tolerance(BF16)
    mixed = p._replace(forward=p.forward._replace(factors=[p.forward.factors[0].float(), p.forward.factors[1]]))
    assert relative(*run("gemm", mixed)) <= tolerance(BF16)


DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["gemm", "swiglu", "dx"])
def test_writes_out_and_nothing_beside_it(op, device):
    dtype, tile = (FP32, TINY) if device == "cpu" else (BF16, None)
    siblings = 2 if op == "swiglu" else 1
    p = problem(300 if device == "cuda" else 21, 72, (40,) * siblings, (4,) * siblings, dtype, device)
    want = run(op, p, tile=tile)[0]
    tokens, width = want.shape
    around = torch.full((tokens + 3, width + 24), 7.0, dtype=dtype, device=device)
    out = around[1 : tokens + 1, 8 : width + 8]
    assert run(op, p, tile=tile, out=out)[0] is out
    assert torch.equal(out, want)
    out.fill_(7.0)
    assert torch.equal(around, torch.full_like(around, 7.0))


@GPU
def test_swiglu_has_the_bits_of_its_parts():
    """What is kept and what is recomputed must not differ: `gemm`, then SwiGLU's own kernel."""
    from fast_unsloth_patch.ops.lora_mlp import _swiglu_forward

    p = problem(2500, 1024, (2816, 2816), (16, 16), BF16, "cuda")
    gu = gemm(p.x, p.weights, update=p.forward)
    assert torch.equal(gemm_swiglu(p.x, *p.weights, update=p.forward), _swiglu_forward(gu, None, [None, None]))


@pytest.mark.parametrize("device", DEVICES)
def test_out_may_be_what_is_added(device):
    dtype, tile = (FP32, TINY) if device == "cpu" else (BF16, None)
    p = problem(300 if device == "cuda" else 21, 72, (40,), (4,), dtype, device)
    for op, added in (("gemm", p.residual), ("dx", p.addend)):
        want = run(op, p, tile=tile)[0]
        run(op, p, tile=tile, out=added)
        assert torch.equal(added, want)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_and_no_update(device):
    dtype = FP32 if device == "cpu" else BF16
    p = problem(0, 72, (40,), (4,), dtype, device)
    assert run("gemm", p)[0].shape == (0, 40) and run("dx", p)[0].shape == (0, 72)
    p = problem(21, 72, (40, 40), (0, 0), dtype, device)
    assert torch.equal(gemm_swiglu(p.x, *p.weights, tile=TINY if device == "cpu" else None),
                       run("swiglu", p, tile=TINY if device == "cpu" else None)[0])  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.skipif(INTERPRETED, reason="bfloat16 is wrong there")
def test_error_not_above_stock(device):
    p = problem(512, 256, (256,), (16,), BF16, device)
    weight, b, u = p.weights[0], p.forward.factors[0].to(BF16), p.forward.u[:, :16]
    stock = torch.nn.functional.linear(p.x, weight, p.bias.to(BF16)) + u @ b.t() + p.residual
    got, want = run("gemm", p)
    assert relative(got, want) < 0.8 * relative(stock, want)
    assert relative(stock, want) < 2 * torch.finfo(BF16).eps


def test_mismatch_is_named():
    p = problem(5, 72, (32, 64), (8, 8), FP32, "cpu")
    u, factors, starts = p.forward
    with pytest.raises(ValueError, match=r"expected \[T, 72\].*\(5, 64\)"):
        gemm(p.x[:, :64], p.weights)
    with pytest.raises(ValueError, match=r"expected \[T, 96\]"):
        gemm_dx(p.dy[:, :32], p.weights)
    with pytest.raises(ValueError, match=r"factor \(64, 8\) at column 0"):
        gemm(p.x, p.weights, update=Update(u, factors[::-1], (0, 0)))
    with pytest.raises(ValueError, match="2 factors and starts"):
        gemm(p.x, p.weights, update=Update(u, factors[:1], starts))
    with pytest.raises(ValueError, match=r"at column 36"):
        gemm(p.x, p.weights, update=Update(u, factors, (0, 36)))
    with pytest.raises(ValueError, match=r"residual \[5, 96\]"):
        gemm(p.x, p.weights, residual=p.residual[:, :64])
    with pytest.raises(ValueError, match=r"up \[32, 72\]"):
        gemm_swiglu(p.x, *p.weights)
    with pytest.raises(ValueError, match=r"out \[5, 72\]"):
        gemm_dx(p.dy, p.weights, out=p.addend[:4])


@GPU
def test_operands_that_are_not_covered():
    p = problem(2048, 512, (512, 256), (16, 16), BF16, "cuda")
    for weights in ([p.weights[0].t().contiguous().t(), p.weights[1]], [p.weights[0][:-8], p.weights[1]]):
        assert not covers(p.x, weights)
        with pytest.raises(ValueError, match="ask `covers` first"):
            gemm(p.x, weights)
    with pytest.raises(ValueError, match="u with rows of unit stride"):
        gemm(p.x, p.weights, update=p.forward._replace(u=p.forward.u.float()))


@GPU
def test_another_thread_launches_too():
    """Autograd's backward runs in one, where Triton knows no allocator."""
    p = problem(256, 512, (512,), (16,), BF16, "cuda")
    results = []
    thread = threading.Thread(target=lambda: results.append(run("dx", p)))
    thread.start()
    thread.join()
    assert relative(*results[0]) <= tolerance(BF16)


@GPU
def test_large_values_of_silu():
    p = problem(256, 64, (128, 128), (0, 0), BF16, "cuda")
    p.weights[0].mul_(1e4)
    got, want = run("swiglu", p)
    assert got.isfinite().all() and relative(got, want) <= tolerance(BF16)


needs_triton = pytest.mark.skipif(INTERPRETED, reason="compiles kernels")


@pytest.fixture
def cases(tmp_path, monkeypatch):
    """kernel_cases, with a compiler cache of this test's own."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    import kernel_cases

    return kernel_cases


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_update(tokens, *factors):
    return Update(meta(tokens, 64 * len(factors)), factors, [64 * j for j in range(len(factors))])


def forward_of_a_layer(tokens, rank=16, dtype=BF16):
    factor = lambda n: meta(n, rank, dtype=FP32)  # noqa: E731
    x, qkv = meta(tokens, 4096, dtype=dtype), [meta(n, 4096, dtype=dtype) for n in (4096, 1024, 1024)]
    wide = [meta(14336, 4096, dtype=dtype) for _ in range(2)]
    down = meta(4096, 14336, dtype=dtype)

    def low(*factors):
        u, *rest = meta_update(tokens, *factors)
        return Update(u.to(dtype), *rest)

    gemm(x, qkv, update=low(*map(factor, (4096, 1024, 1024))))
    gemm(x, wide, update=low(factor(14336), factor(14336)))
    gemm_swiglu(x, *wide, update=low(factor(14336), factor(14336)))
    gemm(meta(tokens, 14336, dtype=dtype), [down], update=low(factor(4096)), residual=x)


def backward_of_a_layer(tokens, rank=16, dtype=BF16):
    def low(k, n):
        u, *rest = meta_update(tokens, *[meta(rank, k, dtype=FP32)] * n)
        return Update(u.to(dtype), *rest)

    for k, widths in ((4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (14336, (4096,))):
        weights = [meta(n, k, dtype=dtype) for n in widths]
        gemm_dx(meta(tokens, sum(widths), dtype=dtype), weights, update=low(k, len(widths)))
    gemm_dx(meta(tokens, 4096, dtype=dtype), [meta(4096, 4096, dtype=dtype)], addend=meta(tokens, 4096, dtype=dtype))


def compiled(kernel_cases, calls):
    """(case, compiled kernel) of every launch of ``calls`` on sm_90, each specialisation once."""
    from fast_unsloth_patch.device.launch import target_limits

    with kernel_cases.recorded(target_limits(90, 132)) as launches:
        calls()
    found = {}
    for kernel, args, consts, options in launches:
        case = kernel_cases._as_case("8B", kernel, args, consts, options)
        found.setdefault(case.specialisation(), case)
    return [(case, kernel_cases.build(case, 90)) for case in found.values()]


@needs_triton
@pytest.mark.parametrize("layer", [forward_of_a_layer, backward_of_a_layer])
def test_compiles_without_spills(layer, cases, tmp_path):
    from triton import knobs

    from fast_unsloth_patch.device.launch import SHARED_MEMORY

    built = compiled(cases, lambda: layer(8192))
    assert len(built) == 4
    for case, kernel in built:
        assert kernel.metadata.shared <= SHARED_MEMORY[90], case
        used = cases.resources(kernel, tmp_path)
        assert used["STACK"] == 0, f"{case} spills: {used}"
        command = [knobs.nvidia.nvdisasm.path, str(tmp_path / "kernel.cubin")]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "UTMALDG", "UTMASTG")}
        assert all(found.values()), f"{case} does not use the tensor cores or the memory accelerator: {found}"


@needs_triton
@pytest.mark.parametrize(("rank", "dtype"), [(8, FP16), (module.MAX_SLOTS, BF16)])
def test_other_ranks_and_dtypes_fit(rank, dtype, cases):
    from fast_unsloth_patch.device.launch import SHARED_MEMORY

    for layer in (forward_of_a_layer, backward_of_a_layer):
        for case, kernel in compiled(cases, lambda layer=layer: layer(4099, rank, dtype)):
            assert kernel.metadata.shared <= SHARED_MEMORY[90], case


@needs_triton
def test_what_is_covered(cases):
    from fast_unsloth_patch.device.launch import target_limits

    x, qkv = meta(2048, 4096), [meta(n, 4096) for n in (4096, 1024, 1024)]
    with cases.recorded(target_limits(90)):
        assert covers(x, qkv) and covers(x, qkv, (16, 64), meta(2048, 6144)) and covers(meta(2048, 72), [meta(8, 72)])
        assert not covers(meta(2047, 4096), qkv)
        assert not covers(x, qkv, (16, 65))
        assert not covers(x, [*qkv, qkv[0]])
        assert not covers(x, [qkv[0], meta(1000, 4096)])
        assert not covers(x, [meta(4100, 4096)])
        assert not covers(meta(2048, 4100), [meta(4096, 4100)])
        assert not covers(x, [meta(4096, 4096).t()])
        assert not covers(x, [qkv[0].float()])
        assert not covers(x.float(), [qkv[0].float()])
        assert not covers(meta(4096, 2048).t(), qkv)
        assert not covers(meta(2048, 4100)[:, :4096], qkv)
        assert not covers(x, qkv, (), meta(2048, 6144, dtype=FP32))
    for capability in (80, 89, 100, 120):
        with cases.recorded(target_limits(capability)):
            assert not covers(x, qkv)
    assert not covers(torch.empty(2048, 64, dtype=BF16), [torch.empty(64, 64, dtype=BF16)])


@needs_triton
def test_the_allocator_is_set_for_the_launch_alone(cases, monkeypatch):
    import triton
    from triton.runtime import _allocation

    def mine(size, alignment, stream):
        raise AssertionError("somebody else's allocator")

    triton.set_allocator(mine)
    seen = []
    with cases.recorded(cases._launch.target_limits(90)):
        monkeypatch.setattr(module, "launch", lambda *a, **k: seen.append(_allocation._allocator.get()))
        gemm(meta(64, 64), [meta(64, 64)])
        thread = threading.Thread(target=lambda: gemm(meta(64, 64), [meta(64, 64)]))
        thread.start()
        thread.join()
    assert seen == [module._scratch] * 2 and _allocation._allocator.get() is mine


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
def test_interpreter(run_python):
    done = run_python(None, env={"TRITON_INTERPRET": "1"}, args=("-m", "pytest", "-q", "-x", "-m", "not gpu", __file__))
    assert done.returncode == 0, done.stdout + done.stderr
