"""Products by expert against formulas in float64: the loop and torch's grouped product on the CPU, the kernels in the
interpreter (``test_interpreter`` runs this file again), compiled for sm_90 without a GPU, and on one (``gpu``).
"""

import os
import re
import subprocess
import threading
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from fast_unsloth_patch.ops import gemm as launcher
from fast_unsloth_patch.ops import grouped_gemm as module
from fast_unsloth_patch.ops.gemm import Tile
from fast_unsloth_patch.ops.grouped_gemm import (
    GroupedUpdate,
    covers,
    grouped_gemm,
    grouped_gemm_dx,
    grouped_gemm_swiglu,
    grouped_outer,
)
from fast_unsloth_patch.ops.routing import Routing, route

INTERPRETED = "TRITON_INTERPRET" in os.environ
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPU = pytest.mark.gpu
DTYPES = [FP32, FP16] if INTERPRETED else [FP32, FP16, BF16]
# In the interpreter tiles so small that a few rows have several, and one that is not full; on a CPU there are none.
TINY = Tile(16, 32, 16, 2, 4, 2)
TILE = TINY if INTERPRETED else None
NAN = float("nan")


def tolerance(dtype):
    # Relative L2: half an eps for the one rounding of the 16-bit dtypes; for float32 the sums of a hundred products.
    return torch.finfo(dtype).eps * (8 if dtype is FP32 else 0.5)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def routing_of(counts, block, device="cpu", unused=1):
    """Experts with these many rows, and a few blocks that nobody uses; the pairs are of one choice a token."""
    blocks = [-(-count // block) for count in counts]
    ends = torch.tensor(blocks).cumsum(0) * block
    pairs = torch.full(((sum(blocks) + unused) * block,), -1)
    taken = 0
    for end, n, count in zip(ends.tolist(), blocks, counts):
        start = end - n * block
        pairs[start : start + count] = torch.arange(taken, taken + count)
        taken += count
    rows = torch.empty(taken, 1, dtype=torch.int64)
    rows[pairs[pairs >= 0], 0] = torch.nonzero(pairs >= 0)[:, 0]
    return Routing(*(t.to(device, torch.int32) for t in (pairs, rows, ends)), block)


def rows_of(routing, width, dtype, strided=False):
    """[R, width]: random where there is a pair, zeros in padding, NaN where nobody is."""
    device, count = routing.pairs.device, routing.pairs.shape[0]
    x = torch.randn(count, width + (16 if strided else 0), device=device).to(dtype)
    x[routing.pairs < 0] = 0
    x[used(routing) :] = NAN
    return x[:, 8 : width + 8] if strided else x


def used(routing):
    return int(routing.ends[-1])


class Packed:
    """A stack of eight bits and a scale an expert, that notes what it was asked for."""

    def __init__(self, weight):
        self.scale = weight.abs().amax((1, 2), keepdim=True).float() / 127
        self.values = (weight.float() / self.scale).round().to(torch.int8)
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.asked, self.buffers = [], set()

    def dequantize(self, first, count, out=None, dtype=None):
        self.asked.append((first, count))
        part = slice(first, first + count)
        values = (self.values[part] * self.scale[part]).to(dtype or self.dtype)
        if out is None:
            return values
        self.buffers.add(out.data_ptr())
        return out.copy_(values)

    def whole(self):
        return (self.values * self.scale).to(self.dtype)


class Problem(NamedTuple):
    """x [R, K] and dy [R, N] with the weights [E, N, K], B [E, N, slots] and A [E, slots, K] with their u."""

    routing: Routing
    x: torch.Tensor
    dy: torch.Tensor
    weight: torch.Tensor
    forward: GroupedUpdate
    backward: GroupedUpdate


def problem(counts, n, k, dtype, slots=16, block=16, device="cpu", adapters=None):
    routing = routing_of(counts, block, device)

    def draw(*shape, scale, dtype=dtype):
        return (torch.randn(len(counts), *shape, device=device) * scale).to(dtype)

    u, du = (rows_of(routing, slots, dtype) for _ in range(2))
    return Problem(
        routing, rows_of(routing, k, dtype, strided=True), rows_of(routing, n, dtype), draw(n, k, scale=k**-0.5),
        GroupedUpdate(u, draw(n, slots, scale=0.3, dtype=adapters or dtype)),
        GroupedUpdate(du, draw(slots, k, scale=0.3, dtype=adapters or dtype)),
    )  # fmt: skip


def oracle(rows, stack, routing):
    """rows_r stack_e in float64, expert by expert."""
    bounds = [0, *routing.ends.tolist()]
    spans = zip(bounds, bounds[1:], stack)
    return torch.cat([rows[start:end].double() @ matrix.double() for start, end, matrix in spans])


def wanted(op, p, update=True):
    if op == "dx":
        y = oracle(p.dy, p.weight, p.routing)
        return y + oracle(p.backward.u, p.backward.factors.to(p.x.dtype), p.routing) if update else y
    y = oracle(p.x, p.weight.mT, p.routing)
    if update:
        y = y + oracle(p.forward.u, p.forward.factors.to(p.x.dtype).mT, p.routing)
    if op == "gemm":
        return y
    gate, up = y.to(p.x.dtype).double().chunk(2, 1)
    return gate / (1 + torch.exp(-gate)) * up


def run(op, p, update=True, weight=None, **options):
    function = {"gemm": grouped_gemm, "swiglu": grouped_gemm_swiglu, "dx": grouped_gemm_dx}[op]
    rows, given = (p.dy, p.backward) if op == "dx" else (p.x, p.forward)
    given = given if update else None
    return function(rows, p.weight if weight is None else weight, p.routing, update=given, **options)


def check(got, want, p, dtype):
    count = used(p.routing)
    assert got.dtype is dtype and got.shape == (p.routing.pairs.shape[0], want.shape[1])
    assert got[:count].isfinite().all()
    assert not got[:count][p.routing.pairs[:count] < 0].any()  # zeros in, zeros out
    if count:
        assert relative(got[:count], want) <= tolerance(dtype)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched."""
    names = []
    for where in (launcher, module):
        real = where.launch
        monkeypatch.setattr(
            where, "launch", lambda kernel, *a, real=real, **k: (names.append(name_of(kernel)), real(kernel, *a, **k))
        )
    return names


def name_of(kernel):
    return getattr(kernel, "__name__", None) or kernel.fn.__name__


OPS = ["gemm", "swiglu", "dx"]
COUNTS = [(5, 0, 33, 16), (0, 0, 7), (21,), (0, 0), (16, 32, 0, 0, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("op", OPS)
def test_matches_float64(op, counts, update, dtype, poisoned_empty, launched):
    n = {"gemm": 40, "swiglu": 80, "dx": 48}[op]
    p = problem(counts, n, 72, dtype)
    check(run(op, p, update, tile=TILE), wanted(op, p, update), p, dtype)
    kernel = {"gemm": "grouped_gemm", "swiglu": "grouped_gemm_swiglu", "dx": "grouped_gemm_dx"}[op] + "_kernel"
    assert launched == ([kernel] if INTERPRETED else [])


@pytest.mark.parametrize(("op", "tile"), [("gemm", (64, 16, 16)), ("dx", (64, 16, 16)), ("dx", (64, 256, 16))])
def test_other_tiles(op, tile, poisoned_empty):
    """Two tiles to a block of rows, and one that is stored by halves."""
    p = problem((5, 0, 130), 32, 264 if tile[1] > 16 else 16, FP32, 32, 128)
    tile = Tile(*tile, 2, 4, 2) if INTERPRETED else None
    check(run(op, p, tile=tile), wanted(op, p), p, FP32)


@pytest.mark.parametrize("op", OPS)
def test_packed_weights_are_unpacked_a_few_at_a_time(op, poisoned_empty, launched, monkeypatch):
    p = problem((5, 0, 33, 16, 20), 80, 72, FP16)
    packed = Packed(p.weight)
    p = p._replace(weight=packed.whole())
    monkeypatch.setattr(module, "BUFFER_BYTES", 2 * 80 * 72 * 2 + 100)
    check(run(op, p, weight=packed, tile=TILE), wanted(op, p), p, FP16)
    assert packed.asked == ([(0, 2), (2, 2), (4, 1)] if INTERPRETED else [(0, 1), (2, 1), (3, 1), (4, 1)])
    assert len(packed.buffers) == 1 and len(launched) == (3 if INTERPRETED else 0)
    monkeypatch.setattr(module, "BUFFER_BYTES", 100)
    packed.asked.clear()
    check(run(op, p, weight=packed, tile=TILE), wanted(op, p), p, FP16)
    assert packed.asked == [(e, 1) for e in range(5) if INTERPRETED or e != 1]


@pytest.mark.parametrize("op", OPS)
def test_another_experts_values_do_not_leak(op):
    p = problem((20, 0, 18), 48, 72, FP32)
    want = wanted(op, p)[:32]
    for e in (1, 2):
        p.weight[e] = float("inf")
        p.forward.factors[e] = p.backward.factors[e] = NAN
    got = run(op, p, tile=TILE)[:32]
    assert relative(got, want) <= tolerance(FP32)


@pytest.mark.parametrize("op", ["gemm", "dx"])
def test_writes_out_and_nothing_beside_it(op):
    p = problem((5, 0, 33), 48, 72, FP32)
    width = 48 if op == "gemm" else 72
    around = torch.full((p.x.shape[0] + 2, width + 24), 7.0)
    out = around[1:-1, 8 : width + 8]
    assert run(op, p, tile=TILE, out=out) is out
    check(out, wanted(op, p), p, FP32)
    out.fill_(7.0)
    assert torch.equal(around, torch.full_like(around, 7.0))


def test_what_the_kernels_do_not_take(launched):
    """Widths, slots and layouts of every kind have a way, and it is right."""
    for n, k, slots in ((44, 72, 16), (40, 68, 16), (40, 72, 8), (40, 72, 48)):
        p = problem((5, 0, 33), n, k, FP32, slots)
        for op in OPS:
            check(run(op, p, tile=TILE), wanted(op, p), p, FP32)
    p = problem((5, 33), 48, 72, FP32)
    turned = p._replace(weight=p.weight.mT.contiguous().mT)
    for op in OPS:
        check(run(op, turned, tile=TILE), wanted(op, p), p, FP32)
    half = p._replace(weight=p.weight.to(BF16))
    check(run("gemm", half, tile=TILE), wanted("gemm", half), p, FP32)
    p = problem((5, 33), 48, 72, FP32, block=8)
    check(run("gemm", p, tile=TILE), wanted("gemm", p), p, FP32)
    # Steps of 16 along 40 rows would end in those of the next expert; 20 columns are no multiple of 16 bytes.
    p = problem((5, 33), 40, 72, FP32)
    for op in ("dx", "swiglu"):
        check(run(op, p, tile=TILE), wanted(op, p), p, FP32)
    assert launched == []


OUTERS = [(16, 72), (72, 16), (32, 200), (136, 64), (16, 16), (72, 40), (1, 24)]


def outer_wanted(left, right, routing):
    starts = [0, *routing.ends.tolist()]
    parts = [left[a:b].double().t() @ right[a:b].double() for a, b in pairwise(starts)]
    return torch.stack(parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), OUTERS)
def test_outer(m, n, dtype, poisoned_empty, launched):
    routing = routing_of((70, 0, 130, 1, 0), 64)
    left, right = rows_of(routing, m, dtype, strided=True), rows_of(routing, n, dtype)
    for result in (dtype, FP32):
        got = grouped_outer(left, right, routing, result)
        assert got.dtype is result and got.is_contiguous()
        # Of fp16 there is one rounding to fp16 whatever the result is; elsewhere only the result's.
        rounded = FP16 if dtype is FP16 else result
        assert relative(got, outer_wanted(left, right, routing)) <= tolerance(rounded)
        assert not got[1].any() and not got[4].any()
    narrow = min(m, n) in (16, 32, 64)
    assert launched == (["grouped_outer_kernel"] * 2 if INTERPRETED and narrow else [])


def test_outer_with_another_tile(launched):
    routing = routing_of((17, 0, 130), 16)
    left, right = rows_of(routing, 16, FP32), rows_of(routing, 72, FP32)
    got = grouped_outer(left, right, routing, FP32, tile=Tile(32, 0, 16, 0, 4, 2))
    assert relative(got, outer_wanted(left, right, routing)) <= tolerance(FP32)
    assert launched == (["grouped_outer_kernel"] if INTERPRETED else [])


def test_outer_overflows_where_stock_does():
    routing = routing_of((64, 3), 64)
    left, right = rows_of(routing, 16, FP16).fill_(60.0), rows_of(routing, 24, FP16).fill_(60.0)
    got = grouped_outer(left, right, routing, FP32)
    assert got[0].isinf().all()
    assert torch.equal(grouped_outer(left / 60, right, routing, FP32)[0], torch.full((16, 24), 3840.0))


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch has it from 2.10 on")
class TestLibrary:
    """Torch's grouped product, which has a CPU path of its own to compare with."""

    @pytest.fixture(autouse=True)
    def _taken(self, monkeypatch):
        monkeypatch.setattr(module, "_library_fits", lambda *operands: all(map(module._aligned, operands)))
        monkeypatch.setattr(module, "_fits", lambda *_: False)
        monkeypatch.setattr(module, "_outer_fits", lambda *_: False)
        for name in ("grouped_gemm_ref", "grouped_gemm_dx_ref", "grouped_outer_ref"):
            monkeypatch.setattr(module, name, None)

    @pytest.mark.parametrize("update", [False, True])
    @pytest.mark.parametrize("counts", COUNTS[:3])
    @pytest.mark.parametrize("op", OPS)
    def test_products(self, op, counts, update):
        p = problem(counts, 80, 72, FP32, adapters=FP16)
        check(run(op, p, update), wanted(op, p, update), p, FP32)

    @pytest.mark.parametrize("update", [False, True])
    def test_out(self, update):
        p = problem((5, 0, 33), 40, 72, FP32)
        out = torch.empty(p.x.shape[0], 56)[:, 8:48]
        assert run("gemm", p, update, out=out) is out
        check(out, wanted("gemm", p, update), p, FP32)

    def test_outer_of_nobody_is_zero(self, monkeypatch):
        real = module._grouped_mm

        def leaves_it(left, right, offs):
            result = real(left, right, offs=offs)
            result[1], result[4] = NAN, 7.0
            return result

        monkeypatch.setattr(module, "_grouped_mm", leaves_it)
        routing = routing_of((70, 0, 130, 1, 0), 64)
        left, right = rows_of(routing, 40, FP32), rows_of(routing, 72, FP32)
        got = grouped_outer(left, right, routing, FP32)
        assert relative(got, outer_wanted(left, right, routing)) <= tolerance(FP32)
        assert not got[1].any() and not got[4].any()


def test_rows_of_a_real_routing():
    """With `route`, whose own experts and ends these are."""
    routing = route(torch.randint(0, 5, (40, 2)), 5, 16)
    x, weight = rows_of(routing, 32, FP32), torch.randn(5, 24, 32)
    got = grouped_gemm(x, weight, routing, tile=TILE)[: used(routing)]
    assert relative(got, oracle(x, weight.mT, routing)) <= tolerance(FP32)


def test_mismatch_is_named():
    p = problem((5, 33), 48, 72, FP32)
    with pytest.raises(ValueError, match=r"expected \[80, 72\].*\(80, 64\)"):
        grouped_gemm(p.x[:, :64], p.weight, p.routing)
    with pytest.raises(ValueError, match=r"expected \[80, 48\].*\(64, 48\)"):
        grouped_gemm_dx(p.dy[:64], p.weight, p.routing)
    with pytest.raises(ValueError, match="weights of 2 experts, got 1"):
        grouped_gemm(p.x, p.weight[:1], p.routing)
    with pytest.raises(ValueError, match=r"factors \[2, 48, 16\], got \(80, 16\) and \(2, 16, 72\)"):
        grouped_gemm(p.x, p.weight, p.routing, update=p.backward)
    with pytest.raises(ValueError, match=r"factors \[2, 16, 72\]"):
        grouped_gemm_dx(p.dy, p.weight, p.routing, update=p.forward)
    with pytest.raises(ValueError, match=r"u \[80, slots\].*\(64, 16\)"):
        grouped_gemm_swiglu(p.x, p.weight, p.routing, update=p.forward._replace(u=p.forward.u[:64]))
    with pytest.raises(ValueError, match=r"out \[80, 48\], got \(80, 40\)"):
        grouped_gemm(p.x, p.weight, p.routing, out=torch.empty(80, 40))
    with pytest.raises(ValueError, match="as many of up, got 47"):
        grouped_gemm_swiglu(p.x, p.weight[:, :47], p.routing)
    with pytest.raises(ValueError, match=r"80 rows, got \(80, 72\) and \(64, 48\)"):
        grouped_outer(p.x, p.dy[:64], p.routing, FP32)
    with pytest.raises(ValueError, match=r"one dtype, got torch.float32 and torch.float16"):
        grouped_outer(p.x, p.dy.to(FP16), p.routing, FP32)


# Rows of each expert: Mixtral's of 4x2048 tokens, a quarter of them (float64 is large), a skewed batch's.
EVEN = (2048, 2100, 1990, 2048, 2050, 2046, 2052, 2050)
SHORT = (512, 600, 500, 510, 514, 400, 512, 640)
SKEWED = (9000, 0, 3000, 17, 128, 2200, 0, 2039)
LARGE = [
    ("swiglu", SHORT, 28672, 4096, 16),
    ("gemm", SHORT, 28672, 4096, 16),
    ("gemm", EVEN, 4096, 14336, 16),
    ("dx", SHORT, 28672, 4096, 16),
    ("dx", EVEN, 4096, 14336, 16),
    ("gemm", SKEWED, 1000, 4096, 64),
    ("swiglu", SKEWED, 2000, 520, 32),
    ("dx", SKEWED, 4096, 1000, 64),
    ("gemm", (0, 0, 1500, 0), 4096, 4096, 16),
    ("gemm", EVEN, 16, 4096, 0),
    ("gemm", SKEWED, 64, 14336, 0),
    ("dx", EVEN, 28672, 16, 0),
    ("dx", SKEWED, 4096, 32, 0),
    ("gemm", SKEWED, 4096, 16, 0),
    ("dx", (1, 1, 1, 1), 64, 4096, 0),
]


@GPU
@pytest.mark.parametrize(
    ("op", "counts", "n", "k", "slots", "dtype"),
    [(*case, BF16) for case in LARGE] + [(*case, FP16) for case in LARGE[5:]],
)
def test_model_sizes(op, counts, n, k, slots, dtype, launched, monkeypatch):
    p = problem(counts, n, k, dtype, slots or 16, 128, "cuda")
    monkeypatch.setattr(module, "MIN_ROWS", 0)
    got = run(op, p, bool(slots))
    if torch.cuda.get_device_capability() == (9, 0):
        assert covers(p.x, p.weight, p.routing) and len(launched) == 1
    check(got, wanted(op, p, bool(slots)), p, dtype)
    count = used(p.routing)
    assert torch.equal(got[:count], run(op, p, bool(slots))[:count])


@GPU
@pytest.mark.parametrize("op", OPS)
def test_packed_on_a_gpu(op, launched, monkeypatch):
    p = problem(SKEWED, 2048, 1024, BF16, 16, 128, "cuda")
    packed = Packed(p.weight)
    p = p._replace(weight=packed.whole())
    monkeypatch.setattr(module, "BUFFER_BYTES", 3 * 2048 * 1024 * 2)
    check(run(op, p, weight=packed), wanted(op, p), p, BF16)
    if torch.cuda.get_device_capability() == (9, 0):
        assert len(launched) == 3 and packed.asked == [(0, 3), (3, 3), (6, 2)]
        count = used(p.routing)
        assert torch.equal(run(op, p)[:count], run(op, p, weight=packed)[:count])


@GPU
@pytest.mark.parametrize("op", OPS)
def test_the_library_on_a_gpu(op, launched, monkeypatch):
    """Its update is rounded by itself, and so is the sum."""
    p = problem(SKEWED, 2048, 1024, BF16, 16, 128, "cuda")
    monkeypatch.setattr(module, "_fits", lambda *_: False)
    for name in ("grouped_gemm_ref", "grouped_gemm_dx_ref"):
        monkeypatch.setattr(module, name, None)
    count = used(p.routing)
    want = wanted(op, p)
    assert relative(run(op, p)[:count], want) <= 3 * tolerance(BF16)
    assert not [name for name in launched if name.startswith("grouped")]


@GPU
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("m", "n"), [(16, 4096), (28672, 16), (64, 14336), (1000, 32), (2048, 1024)])
def test_outer_on_a_gpu(m, n, dtype, poisoned_empty):
    routing = routing_of(SKEWED, 128, "cuda")
    left, right = rows_of(routing, m, dtype), rows_of(routing, n, dtype)
    got = grouped_outer(left, right, routing, FP32)
    wide = min(m, n) > 64
    rounded = dtype if wide or dtype is FP16 else FP32
    # Sums of 9,000 products of 16 bits in fp32.
    limit = tolerance(rounded) if rounded is not FP32 else 2e-5
    assert relative(got, outer_wanted(left, right, routing)) <= limit
    assert not got[1].any() and not got[6].any()
    assert torch.equal(got, grouped_outer(left, right, routing, FP32))


@GPU
def test_no_host_sync():
    """On compute capability 9.0; torch's grouped product has one of its own before it."""
    p = problem(EVEN, 1024, 512, BF16, 16, 128, "cuda")
    calls = [lambda op=op: run(op, p) for op in OPS] + [lambda: grouped_outer(p.x, p.forward.u, p.routing, FP32)]
    calls += [lambda: grouped_outer(p.x, p.dy, p.routing, BF16)]
    for call in calls:  # compiles
        call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU
def test_another_thread_launches_too():
    """Autograd's backward runs in one, where Triton knows no allocator."""
    p = problem(SHORT, 512, 512, BF16, 16, 128, "cuda")
    results = []
    thread = threading.Thread(target=lambda: results.append(run("dx", p)))
    thread.start()
    thread.join()
    check(results[0], wanted("dx", p), p, BF16)


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


def meta_routing(rows, experts=8, block=128):
    shapes = (rows,), (rows // 4, 2), (experts,)
    return Routing(*(meta(*shape, dtype=torch.int32) for shape in shapes), block)


def products_of_a_layer(rows=17280, slots=16, dtype=BF16, hidden=4096, intermediate=14336, experts=8):
    """What Mixtral's experts with adapters multiply, forward and backward."""
    routing = meta_routing(rows, experts)
    make = lambda *shape: meta(*shape, dtype=dtype)  # noqa: E731
    for n, k in ((2 * intermediate, hidden), (hidden, intermediate)):
        x, dy, weight, u = make(rows, k), make(rows, n), make(experts, n, k), make(rows, slots)
        b, a = make(experts, n, slots), make(experts, slots, k)
        for adapted in (True, False):
            forward, backward = (GroupedUpdate(u, b), GroupedUpdate(u, a)) if adapted else (None, None)
            grouped_gemm(x, weight, routing, update=forward)
            grouped_gemm_dx(dy, weight, routing, update=backward)
            if n > k:
                grouped_gemm_swiglu(x, weight, routing, update=forward)
        grouped_gemm(x, a, routing)
        grouped_gemm_dx(dy, b, routing)
        for result in (dtype, FP32):
            grouped_outer(u, x, routing, result)
            grouped_outer(dy, u, routing, result)


def compiled(kernel_cases, calls):
    """(case, compiled kernel) of every launch of ``calls`` on sm_90, each specialisation once."""
    from fast_unsloth_patch.device.launch import target_limits

    with kernel_cases.recorded(target_limits(90, 132)) as launches:
        calls()
    found = {}
    for kernel, args, consts, options in launches:
        case = kernel_cases._as_case("8x7B", kernel, args, consts, options)
        found.setdefault(case.specialisation(), case)
    return [(case, kernel_cases.build(case, 90)) for case in found.values()]


@needs_triton
def test_compiles_without_spills(cases, tmp_path):
    from triton import knobs

    from fast_unsloth_patch.device.launch import SHARED_MEMORY

    built = compiled(cases, products_of_a_layer)
    assert {case.kernel.__name__ for case, _ in built} == {
        "grouped_gemm_kernel", "grouped_gemm_swiglu_kernel", "grouped_gemm_dx_kernel", "grouped_outer_kernel"
    }  # fmt: skip
    for case, kernel in built:
        assert kernel.metadata.shared <= SHARED_MEMORY[90], case
        used = cases.resources(kernel, tmp_path)
        assert used["STACK"] == 0, f"{case} spills: {used}"
        command = [knobs.nvidia.nvdisasm.path, str(tmp_path / "kernel.cubin")]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = ("HGMMA",) if "outer" in case.kernel.__name__ else ("HGMMA", "UTMALDG", "UTMASTG")
        found = {name: len(re.findall(rf"\b{name}\b", code)) for name in names}
        assert all(found.values()), f"{case} does not use the tensor cores or the memory accelerator: {found}"


@needs_triton
@pytest.mark.parametrize(("slots", "dtype"), [(32, FP16), (64, BF16)])
def test_other_slots_and_dtypes_fit(slots, dtype, cases, tmp_path):
    from fast_unsloth_patch.device.launch import SHARED_MEMORY

    for case, kernel in compiled(cases, lambda: products_of_a_layer(2304, slots, dtype, 2048, 7168, 16)):
        assert kernel.metadata.shared <= SHARED_MEMORY[90], case
        assert cases.resources(kernel, tmp_path)["STACK"] == 0, case


@needs_triton
def test_packed_stacks_launch_for_a_few_experts(cases):
    from fast_unsloth_patch.device.launch import target_limits

    class Stack:
        shape, dtype, device = (8, 4096, 14336), BF16, torch.device("meta")

        def dequantize(self, first, count, out=None, dtype=None):
            assert out.shape == (count, 4096, 14336) and out.dtype is BF16

    with cases.recorded(target_limits(90, 132)) as launches:
        grouped_gemm(meta(17280, 14336), Stack(), meta_routing(17280))
    spans = [args[9:11] for _, args, _, _ in launches]
    assert spans == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert {args[1].shape for _, args, _, _ in launches} == {(2, 4096, 14336)}


@needs_triton
def test_what_is_covered(cases):
    from fast_unsloth_patch.device.launch import target_limits

    rows, weight = meta_routing(2048), meta(8, 1024, 512)
    x, u = meta(2048, 512), meta(2048, 16)
    with cases.recorded(target_limits(90)):
        assert covers(x, weight, rows) and covers(x, weight, rows, GroupedUpdate(u, meta(8, 1024, 16, dtype=FP32)))
        assert covers(x.half(), weight.half(), rows) and covers(x, weight, meta_routing(2048, block=256))
        assert not covers(meta(896, 512), weight, meta_routing(896))
        assert not covers(x, weight, meta_routing(2048, block=64))
        assert not covers(x.float(), weight.float(), rows)
        assert not covers(x, weight.float(), rows)
        assert not covers(x, meta(8, 512, 1024).mT, rows)
        assert not covers(x, meta(8, 1020, 512), rows)
        assert not covers(meta(2048, 508), meta(8, 1024, 508), rows)
        assert not covers(meta(2048, 516)[:, :512], weight, rows)
        for other in (meta(2048, 128), meta(2048, 24), u.float(), meta(16, 2048).t()):
            assert not covers(x, weight, rows, GroupedUpdate(other, meta(8, 1024, other.shape[1])))
    for capability in (80, 89, 100, 120):
        with cases.recorded(target_limits(capability)) as launches:
            assert not covers(x, weight, rows)
            grouped_gemm(x, weight, rows)
            assert launches == []
    cpu = torch.empty
    assert not covers(cpu(2048, 512, dtype=BF16), cpu(8, 1024, 512, dtype=BF16), rows)


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
def test_interpreter(run_python):
    done = run_python(None, env={"TRITON_INTERPRET": "1"}, args=("-m", "pytest", "-q", "-x", "-m", "not gpu", __file__))
    assert done.returncode == 0, done.stdout + done.stderr
