"""Routing of tokens to experts against loops over pairs; test_rms_norm.py says how the cases run."""

import itertools
import os

import pytest
import torch

from fast_unsloth_patch.device.dispatch import use_triton
from fast_unsloth_patch.device.launch import HAS_TRITON, target_limits
from fast_unsloth_patch.ops import routing as module
from fast_unsloth_patch.ops.routing import Routing, combine, gather, route
from fast_unsloth_patch.reference.routing import combine_ref, gather_ref, route_ref

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INTERPRETED = "TRITON_INTERPRET" in os.environ
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [FP32, FP16, BF16]


def by_hand(index, num_experts, block):
    """The three tensors of a Routing, as lists, pair by pair."""
    n_pairs, k = len(index) * len(index[0]), len(index[0])
    pairs, rows, ends = [], [None] * n_pairs, []
    for expert in range(num_experts):
        for pair in range(n_pairs):
            if index[pair // k][pair % k] == expert:
                rows[pair] = len(pairs)
                pairs.append(pair)
        pairs += [-1] * (-len(pairs) % block)
        ends.append(len(pairs))
    size = (n_pairs + min(num_experts, n_pairs) * (block - 1)) // block * block
    pairs += [-1] * (size - len(pairs))
    rows = [-1 if row is None else row for row in rows]
    return pairs, [rows[i : i + k] for i in range(0, n_pairs, k)], ends


def assert_by_hand(routing, index, num_experts, block):
    assert type(routing) is Routing and routing.block == block
    for name, got, want in zip(Routing._fields, routing, by_hand(index.tolist(), num_experts, block)):
        assert got.dtype == torch.int32 and got.is_contiguous() and got.device == index.device, name
        assert got.tolist() == want, name


def choices(tokens, k, num_experts, device="cpu", among=None):
    """Distinct experts for each token, as topk gives them; only of the list ``among``, if given, more of the first."""
    among = list(range(num_experts)) if among is None else among
    odds = torch.linspace(2.0, 0.1, len(among)).expand(tokens, -1)
    return torch.tensor(among)[torch.multinomial(odds, k)].to(device)


# tokens, k, experts, the experts that are chosen. 300 x 2 pairs are three chunks of the counting sort; 300 x 8 to 256
# experts are more chunks than are added up at once, and more rows than its programs take at once.
ROUTES = {
    "uneven": (37, 2, 8, None),
    "empty": (23, 2, 8, [6, 1, 3]),
    "one token": (1, 2, 8, None),
    "one pair": (1, 1, 8, [5]),
    "one expert": (70, 1, 8, [3]),
    "the last": (33, 1, 8, [7]),
    "k = 1": (50, 1, 8, None),
    "chunks": (300, 2, 8, None),
    "not a power": (41, 3, 5, None),
    "only one": (19, 1, 1, None),
    "many": (300, 8, 256, None),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("name", ROUTES)
def test_route(name, block, device, poisoned_empty):
    tokens, k, num_experts, among = ROUTES[name]
    index = choices(tokens, k, num_experts, device, among)
    assert_by_hand(route(index, num_experts, block), index, num_experts, block)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("programs", [1, 2, 3])
def test_route_by_few_programs(programs, device, monkeypatch, poisoned_empty):
    """As with very many pairs, each takes several tiles of them."""
    monkeypatch.setattr(module, "_SORT_PROGRAMS", programs)
    index = choices(700, 2, 8, device)
    assert_by_hand(route(index, 8, 16), index, 8, 16)


LAYOUTS = {
    "transposed": lambda index: index.t().contiguous().t(),
    "every second": lambda index: torch.stack([index, index * 0 - 9], 1).flatten(0, 1)[::2],
    "columns": lambda index: torch.cat([index * 0 - 9, index], 1)[:, index.shape[1] :],
    "expanded": lambda index: index[:1].expand(index.shape),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_route_of_strided_indices(layout, dtype, device, poisoned_empty):
    index = LAYOUTS[layout](choices(29, 2, 8, device).to(dtype))
    assert not index.is_contiguous() and index.dtype == dtype
    assert_by_hand(route(index, 8, 16), index, 8, 16)


@pytest.mark.parametrize("device", DEVICES)
def test_pairs_of_nobody(device, poisoned_empty):
    """An index that is no expert's has no row and counts as zeros; 2**32 + 1 is not expert 1."""
    index = choices(40, 2, 6, device)
    index[3, 0], index[7, 1], index[39, 1], index[20] = -1, 6, 2**32 + 1, 8  # 6 and 8: within the power of two
    routing = route(index, 6, 16)
    assert_by_hand(routing, index, 6, 16)
    assert [routing.rows[t, j].item() for t, j in ((3, 0), (7, 1), (39, 1), (20, 0), (20, 1))] == [-1] * 5
    x = torch.randn(40, 24, device=device)
    want = x * ((index >= 0) & (index < 6)).sum(1, keepdim=True)
    torch.testing.assert_close(combine(gather(x, routing), routing), want, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "k", "num_experts"), [(8192, 2, 8), (65537, 2, 8), (8192, 8, 256), (1, 8, 256)])
def test_route_of_models(tokens, k, num_experts, poisoned_empty):
    """Of the sizes of training, the same bits in every run."""
    index = choices(tokens, k, num_experts, "cuda")
    routing = route(index, num_experts, 128)
    for got, want in zip(routing, route_ref(index.cpu(), num_experts, 128)):
        assert torch.equal(got.cpu(), want)
    for _ in range(10):
        again = route(index, num_experts, 128)
        assert all(torch.equal(a, b) for a, b in zip(routing[:3], again[:3]))


@pytest.mark.gpu
def test_no_sync():
    index, x = choices(300, 2, 8, "cuda"), torch.randn(300, 64, device="cuda")
    for data in (x, x.double()):  # float64 takes the reference
        combine(gather(data, route(index, 8, 16)), route(index, 8, 16))  # compiles
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            routing = route(index, 8, 16)
            combine(gather(data, routing, data[:, :2]), routing, data[:, :2], data)
            route_ref(index, 8, 16)
        finally:
            torch.cuda.set_sync_debug_mode(before)


# Width, and how x and z lie in memory.
SHAPES = [(64, "dense"), (72, "rows"), (1030, "dense"), (1, "dense"), (40, "columns")]


def strided(kind, x):
    if kind == "rows":  # every second row of a wider buffer, NaN elsewhere
        wide = x.new_full((2 * x.shape[0], x.shape[1] + 3), float("nan"))
        wide[::2, : x.shape[1]] = x
        return wide[::2, : x.shape[1]]
    return x.t().contiguous().t() if kind == "columns" else x


def cases(shapes, *others):
    """All on the CPU; on a GPU, where compiling is what a case costs, the first shape with all, others with the first
    of each."""
    for shape in shapes:
        for other in itertools.product(*others):
            yield "cpu", shape, *other
            if shape is shapes[0] or other == tuple(o[0] for o in others):
                yield pytest.param("cuda", shape, *other, marks=pytest.mark.gpu)


def example(tokens=23, k=2, device="cpu", block=16):
    return route(choices(tokens, k, 8, device, [4, 1, 6][: k + 1]), 8, block)


@pytest.mark.parametrize(("device", "shape", "dtype", "scale"), [*cases(SHAPES, DTYPES, [FP32, None, BF16, FP16])])
def test_gather(device, shape, dtype, scale, poisoned_empty):
    (width, layout), routing = shape, example(device=device)
    x = strided(layout, torch.randn(23, width, device=device).to(dtype))
    factors = None if scale is None else strided(layout, torch.randn(23, 2, device=device).to(scale))
    out = gather(x, routing, factors)
    assert out.shape == (len(routing.pairs), width) and out.dtype == dtype and out.is_contiguous()
    want = torch.zeros(len(routing.pairs), width, dtype=dtype, device=device)
    for row, pair in enumerate(routing.pairs.tolist()):
        if pair >= 0:
            token, choice = divmod(pair, 2)
            want[row] = x[token] if scale is None else x[token].float() * factors[token, choice].float()
    assert torch.equal(out, want)


def combined(z, routing, weights, residual, kind):
    """Choice by choice in the dtype ``kind``, the residual last."""
    total = torch.zeros(len(routing.rows), z.shape[1], dtype=kind, device=z.device)
    for t, rows in enumerate(routing.rows.tolist()):
        for j, row in enumerate(rows):
            total[t] += z[row].to(kind) if weights is None else z[row].to(kind) * weights[t, j].to(kind)
        if residual is not None:
            total[t] += residual[t].to(kind)
    return total


def operands(routing, width, dtype, layout="dense"):
    """z, NaN in the rows that nobody may read; weights, residual."""
    tokens, device = len(routing.rows), routing.rows.device
    z = torch.randn(len(routing.pairs), width, device=device).to(dtype)
    z[routing.pairs < 0] = float("nan")
    weights = torch.rand(routing.rows.shape, device=device)
    return strided(layout, z), weights, strided(layout, torch.randn(tokens, width, device=device))


@pytest.mark.parametrize(
    ("device", "shape", "dtype", "weighted", "added", "out"),
    [*cases(SHAPES, DTYPES, [FP32, None, BF16], [FP32, None, FP16], [None, FP32])],
)
def test_combine(device, shape, dtype, weighted, added, out, poisoned_empty):
    (width, layout), routing = shape, example(device=device)
    z, weights, residual = operands(routing, width, dtype, layout)
    weights = None if weighted is None else weights.to(weighted)
    residual = None if added is None else residual.to(added)
    got = combine(z, routing, weights, residual, out)
    assert got.shape == (23, width) and got.dtype == (out or dtype) and got.is_contiguous()
    # Three terms: at most three roundings to fp32 of what is summed, and one to the result's dtype.
    want = combined(z, routing, weights, residual, FP64)
    terms = combined(z.abs(), routing, weights, None if residual is None else residual.abs(), FP64)
    allowed = 3 * torch.finfo(FP32).eps * terms + torch.finfo(got.dtype).eps / 2 * want.abs()
    assert ((got.double() - want).abs() <= allowed).all()
    if device == "cpu":  # compiled, a product and a sum are one operation
        assert torch.equal(got, combined(z, routing, weights, residual, FP32).to(got.dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", range(1, 9))
def test_order_of_choice_and_one_rounding(k, device):
    """fp32 sums of numbers that do not add up in any other order; in float64 they would give another result."""
    routing = route(choices(13, k, 9, device), 9, 16)
    values = torch.tensor([1.0, 3e8, 1.0, -3e8, 5.0, 7e8, 3.0, -7e8][:k], device=device)
    z = torch.full((len(routing.pairs), 32), float("nan"), device=device)
    z[routing.rows.long()] = values[:, None].expand(13, k, 32)
    residual = torch.full((13, 32), 0.5, device=device)
    want = 0.0
    for value in (*values.tolist(), 0.5):
        want = torch.tensor(want + value, dtype=FP32).item()
    got = combine(z, routing, None, residual)
    assert got.eq(want).all()
    exact = combine(z.double(), routing, None, residual)
    assert exact.dtype == FP64 and exact.eq(values.double().sum().item() + 0.5).all()
    assert k < 4 or not exact.eq(want).any()
    # What is rounded to a low dtype is the sum in fp32.
    z, weights, residual = operands(routing, 40, FP16)
    full = combine(z, routing, weights, residual, FP32)
    assert all(torch.equal(combine(z, routing, weights, residual, dtype), full.to(dtype)) for dtype in (FP16, BF16))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [4096, 14336])
@pytest.mark.parametrize("dtype", DTYPES)
def test_model_sizes(width, dtype, poisoned_empty):
    """At Mixtral's sizes; against the reference, twice the same bits."""
    routing = route(choices(8191, 2, 8, "cuda"), 8, 128)
    x = torch.randn(8191, width, device="cuda").to(dtype)
    weights, residual = torch.rand(8191, 2, device="cuda"), torch.randn(8191, width, device="cuda")
    z = gather(x, routing, weights)
    assert torch.equal(z, gather_ref(x, routing.pairs, 2, weights))
    assert torch.equal(z, gather(x, routing, weights))
    z[routing.pairs < 0] = float("nan")
    got = combine(z, routing, weights, residual)
    want = combine_ref(z.double(), routing.rows, weights.double(), residual.double())
    assert (got.double() - want).norm() <= torch.finfo(dtype).eps * want.norm()
    assert torch.equal(got, combine(z, routing, weights, residual))


@pytest.mark.gpu
def test_more_than_int32_elements():
    """Offsets beyond 2**31 elements, both ways."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB")
    index = choices(70000, 2, 8, "cuda")
    routing = route(index, 8, 128)
    x = torch.randn(70000, 1, device="cuda").to(BF16).expand(-1, 16384).contiguous()
    z = gather(x, routing)
    assert z.numel() > 2**31
    token = (routing.pairs.clamp_min(0) // 2).long()
    assert torch.equal(z[:, -1], x[token, -1].masked_fill(routing.pairs < 0, 0.0))
    assert torch.equal(combine(z, routing), 2 * x)


@pytest.mark.parametrize("device", DEVICES)
def test_bitwise_the_same_again(device):
    index = choices(61, 2, 8, device)
    z, weights, residual = operands(route(index, 8, 16), 72, FP16)

    def run():
        routing = route(index, 8, 16)
        out = combine(z, routing, weights, residual)
        return *routing[:3], out, gather(out, routing, weights)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_each_is_the_gradient_of_the_other(dtype, weighted, device, poisoned_empty):
    routing = example(k=3, device=device)
    (n_rows,), tokens = routing.pairs.shape, len(routing.rows)
    weights = torch.rand(tokens, 3, device=device).to(dtype) if weighted else None
    x, dout = (torch.randn(tokens, 40, device=device).to(dtype).requires_grad_() for _ in range(2))
    z, dz = (torch.randn(n_rows, 40, device=device).to(dtype).requires_grad_() for _ in range(2))
    with torch.no_grad():
        got = combine(dz, routing, weights), gather(dout, routing, weights)
    (dx,) = torch.autograd.grad(gather_ref(x, routing.pairs, 3, weights), x, dz)
    (gradient,) = torch.autograd.grad(combine_ref(z, routing.rows, weights), z, dout)
    for mine, autograd in zip(got, (dx, gradient)):
        torch.testing.assert_close(mine, autograd, rtol=1e-5 if dtype is FP32 else 1e-12, atol=1e-6)
    assert got[1][routing.pairs < 0].eq(0).all() and got[1].abs().sum() > 0


def test_the_references_are_differentiable():
    routing = example(tokens=5, k=2)
    x, residual = (torch.randn(5, 3, dtype=FP64, requires_grad=True) for _ in range(2))
    scale = torch.rand(5, 2, dtype=FP64, requires_grad=True)
    z = torch.randn(len(routing.pairs), 3, dtype=FP64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, scale: gather_ref(x, routing.pairs, 2, scale), (x, scale))
    assert torch.autograd.gradcheck(lambda *args: combine_ref(args[0], routing.rows, *args[1:]), (z, scale, residual))


@pytest.mark.parametrize("device", DEVICES)
def test_one_float64_operand(device):
    """All is computed in float64 then, and no kernel runs."""
    routing = example(device=device)
    z, weights, residual = operands(routing, 24, FP32)
    x = torch.randn(23, 24, device=device)
    got = combine(z, routing, weights.double(), residual)
    assert torch.equal(got, combine_ref(z.double(), routing.rows, weights, residual).float())
    assert torch.equal(gather(x, routing, weights.double()), gather_ref(x.double(), routing.pairs, 2, weights).float())
    assert combine(z, routing, dtype=FP64).dtype == FP64


INDICES = {
    "int64 or int32; got torch.float32": (torch.zeros(3, 2), 8, 16),
    r"k from 1 to 8; got \(6,\)": (torch.zeros(6, dtype=torch.int64), 8, 16),
    r"got \(3, 9\)": (torch.zeros(3, 9, dtype=torch.int64), 8, 16),
    r"got \(3, 0\)": (torch.zeros(3, 0, dtype=torch.int64), 8, 16),
    r"T at least 1 .*got \(0, 2\)": (torch.zeros(0, 2, dtype=torch.int64), 8, 16),
    "got 0 experts": (torch.zeros(3, 2, dtype=torch.int64), 0, 16),
    "from 1 to 256 experts .*got 257 experts": (torch.zeros(3, 2, dtype=torch.int64), 257, 16),
    "and blocks of 0": (torch.zeros(3, 2, dtype=torch.int64), 8, 0),
}


@pytest.mark.parametrize("message", INDICES)
def test_bad_index_is_named(message):
    with pytest.raises(ValueError, match=message):
        route(*INDICES[message])


def test_bad_operands_are_named():
    routing = example()
    z, weights, residual = operands(routing, 24, FP32)
    with pytest.raises(ValueError, match=r"x must be .* each of 23 tokens; got \(22, 24\)"):
        gather(residual[1:], routing)
    with pytest.raises(ValueError, match=r"got \(1, 23, 24\)"):
        gather(residual[None], routing)
    with pytest.raises(ValueError, match=r"x must be a floating matrix.*torch\.int64"):
        gather(residual.long(), routing)
    with pytest.raises(ValueError, match=r"scale must be .*\(23, 2\); got \(23,\)"):
        gather(residual, routing, weights[:, 0])
    with pytest.raises(ValueError, match=r"z must be .* each of \d+ rows; got \(23, 24\)"):
        combine(residual, routing)
    with pytest.raises(ValueError, match=r"weights must be .*got \(23, 2\) torch\.int32"):
        combine(z, routing, weights.int())
    with pytest.raises(ValueError, match=r"residual must be .* each of 23 tokens"):
        combine(z, routing, residual=residual[1:])
    with pytest.raises(ValueError, match="residual is 23 wide and z 24"):
        combine(z, routing, residual=residual[:, 1:])
    with pytest.raises(ValueError, match=r"dtype must be floating; got torch\.int8"):
        combine(z, routing, dtype=torch.int8)


@pytest.mark.parametrize("device", DEVICES)
def test_launches_kernels_where_it_should(device, monkeypatch):
    launched = []
    real = module.launch
    monkeypatch.setattr(module, "launch", lambda kernel, *a, **k: (launched.append(kernel), real(kernel, *a, **k)))
    x = torch.randn(5, 24, device=device)
    assert use_triton(x) is (INTERPRETED or device == "cuda")
    kernels = [module._count_kernel, module._place_kernel, module._gather_kernel, module._combine_kernel]
    routing = route(choices(5, 2, 8, device), 8, 16)
    combine(gather(x, routing), routing)
    assert launched == (kernels if use_triton(x) else [])
    del launched[:]
    combine(gather(x.double(), routing), routing)
    gather(x, routing, x[:, :2].double())
    combine(gather(x, routing), routing, dtype=FP64)
    assert launched == (kernels[2:3] if use_triton(x) else [])


def calls():
    """Launches of training at Mixtral's size, and of odd sizes."""

    def empty(*shape, dtype=BF16):
        return torch.empty(shape, dtype=dtype, device="meta")

    for tokens, k, num_experts, width, block, kinds in (
        (8192, 2, 8, 4096, 128, [torch.int64]),
        (512, 2, 8, 4096, 128, [torch.int64]),
        (7, 8, 256, 2048, 64, [torch.int32, torch.int64]),
        (7, 4, 128, 64, 128, [torch.int64]),
        (7, 6, 64, 64, 128, [torch.int64]),
        (1, 1, 1, 1, 16, [torch.int32]),
        (33, 3, 5, 1030, 16, [torch.int64]),
    ):
        for kind in kinds:
            routing = route(empty(tokens, k, dtype=kind), num_experts, block)
        for dtype, other in itertools.product(DTYPES, [None, *DTYPES]) if k == 2 else ((BF16, FP32), (FP16, None)):
            scale, residual = (None, None) if other is None else (empty(tokens, k, dtype=FP32), empty(tokens, width))
            z = gather(empty(tokens, width, dtype=dtype), routing, scale)
            combine(z, routing, scale, None if residual is None else residual.to(other), other)


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="needs Triton's compiler")
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_spills(capability, tmp_path, monkeypatch):
    import kernel_cases

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    with kernel_cases.recorded(target_limits(capability, 132)) as launches:
        calls()
    found = {}
    for launch in launches:
        case = kernel_cases._as_case("8B", *launch)
        found.setdefault(case.specialisation(), case)
    assert {case.kernel for case in found.values()} == {
        module._count_kernel, module._place_kernel, module._gather_kernel, module._combine_kernel,
    }  # fmt: skip
    for case in found.values():
        compiled = kernel_cases.build(case, capability)
        assert kernel_cases.resources(compiled, tmp_path)["STACK"] == 0, case
        assert compiled.metadata.shared <= 48 * 1024, case
        if "16" in case.signature[0][1] and dict(case.constexprs)["H"] == 4096:  # bf16, fp16
            assert ".v4.b32" in compiled.asm["ptx"], case


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
def test_interpreter(run_python):
    args = ("-m", "pytest", "-q", "-x", "-m", "not gpu", __file__)
    done = run_python(None, env={"TRITON_INTERPRET": "1"}, args=args, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
