"""The LoRA operations against plain PyTorch: forward and every gradient.

The same cases run three ways: on the CPU through the reference path, in the Triton interpreter
(``test_in_the_interpreter`` runs this file again in a subprocess), and on a GPU (marker ``gpu``).
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fast_unsloth_patch.ops import _siblings, _siblings_backward, down_outer, gemm, swiglu_low_rank
from fast_unsloth_patch.ops import lora_mlp as mlp
from fast_unsloth_patch.ops._operands import adapted, factors, flatten, operands
from fast_unsloth_patch.ops._siblings import Memo, draw_masks
from fast_unsloth_patch.ops.dropout import draw_seed, dropout_bits
from fast_unsloth_patch.ops.lora_linear import Adapter, Projection, lora_linear
from fast_unsloth_patch.ops.lora_mlp import lora_mlp
from fast_unsloth_patch.ops.lora_qkv import lora_qkv
from fast_unsloth_patch.ops.rms_norm import residual_rms_norm
from fast_unsloth_patch.reference.lora import lora_linear_ref, lora_mlp_ref, lora_qkv_ref, unpack_dropout_bits

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = pytest.param("cpu", id="cpu")
GPU = pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)
DEVICES = [CPU] if INTERPRETED else [CPU, GPU]


class Tally:
    def __init__(self):
        self.backward = 0

    def hit_backward(self):
        self.backward += 1


def tensor(*shape, device, dtype=torch.float32, scale=1.0, grad=True):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(device, dtype).requires_grad_(grad)


def projection(
    n,
    k,
    r,
    *,
    device,
    dtype=torch.float32,
    adapter_dtype=None,
    bias=False,
    lora_bias=False,
    scaling=1.5,
    dropout=0.0,
    train=True,
):
    adapter = None
    adapter_dtype = adapter_dtype or dtype
    if r:
        adapter = Adapter(
            tensor(r, k, device=device, dtype=adapter_dtype, scale=k**-0.5),
            tensor(n, r, device=device, dtype=adapter_dtype, scale=r**-0.5),
            scaling,
            dropout,
            tensor(n, device=device, dtype=adapter_dtype) if lora_bias else None,
        )
    weight = tensor(n, k, device=device, dtype=dtype, scale=k**-0.5, grad=train)
    return Projection(weight, tensor(n, device=device, dtype=dtype, grad=train) if bias else None, adapter)


def leaves(*projections):
    found = []
    for p in projections:
        found += [p.weight, p.bias]
        if p.adapter is not None:
            found += [p.adapter.a, p.adapter.b, p.adapter.bias]
    return [t for t in found if t is not None and t.requires_grad]


def in_float64(p):
    def copy(t):
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    adapter = p.adapter and p.adapter._replace(a=copy(p.adapter.a), b=copy(p.adapter.b), bias=copy(p.adapter.bias))
    return Projection(copy(p.weight), copy(p.bias), adapter)


def check(fast, exact, tolerance):
    for i, (a, b) in enumerate(zip(fast, exact, strict=True)):
        assert a is not None, f"tensor {i} has no gradient"
        assert a.shape == b.shape
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-30)
        assert error < tolerance, f"tensor {i} of shape {tuple(b.shape)}: relative error {error:.2e}"


def tolerance_of(dtype, adapter_dtype):
    # One rounding of the result and two of r-wide operands (bf16, fp16); reordered fp32 sums of at most 500 terms.
    worst = max(torch.finfo(dtype).eps, torch.finfo(adapter_dtype or dtype).eps)
    return 2.5e-6 if worst < 1e-5 else 2 * worst


def run(fn, ref, x, projections, exact_x, exact_projections, tolerance, extra=()):
    out = fn(x, *projections)
    exact = ref(exact_x, *exact_projections)
    out, exact = (o if isinstance(o, tuple) else (o,) for o in (out, exact))
    check(out, exact, tolerance)
    seeds = [torch.randn(e.shape, dtype=torch.float64).to(e.device) for e in exact]
    grads = torch.autograd.grad(out, [x, *leaves(*projections), *extra], [s.to(o.dtype) for s, o in zip(seeds, out)])
    seeds = [s.to(o.dtype).double() for s, o in zip(seeds, out)]
    exact_grads = torch.autograd.grad(exact, [exact_x, *leaves(*exact_projections)], seeds)
    check(grads[: len(exact_grads)], exact_grads, tolerance)
    return grads


DTYPES = [
    pytest.param(torch.float32, None, id="fp32"),
    pytest.param(torch.bfloat16, None, id="bf16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-fp32"),
    pytest.param(torch.float16, None, id="fp16"),
]
if INTERPRETED:
    DTYPES = DTYPES[:1]


def cases(*sizes):
    """All dtypes and sizes on the CPU. Compiling is what a GPU case costs: there the first size in every dtype, the
    others in one, in turn.
    """
    found = [pytest.param("cpu", *dtypes.values, *size) for size in sizes for dtypes in DTYPES]
    if not INTERPRETED:
        few = [(dtypes, sizes[0]) for dtypes in DTYPES] + list(zip((DTYPES * 2)[1:], sizes[1:]))
        found += [pytest.param("cuda", *dtypes.values, *size, marks=pytest.mark.gpu) for dtypes, size in few]
    return found


@pytest.mark.parametrize(
    ("device", "dtype", "adapter_dtype", "shape", "n", "r", "options"),
    cases(
        ((2, 9, 80), 48, 8, {}),
        ((5, 33), 70, 3, {"bias": True, "lora_bias": True}),
        ((1, 64), 32, 20, {"train": False}),
        ((3, 40), 24, 0, {"bias": True}),
        ((2, 3, 48), 40, 150, {"train": False}),  # more slots than the kernels take
    ),
)
def test_lora_linear(device, dtype, adapter_dtype, shape, n, r, options, poisoned_empty):
    p = projection(n, shape[-1], r, device=device, dtype=dtype, adapter_dtype=adapter_dtype, **options)
    x = tensor(*shape, device=device, dtype=dtype)
    tally = Tally()
    run(
        lambda x, p: lora_linear(x, p, tally=tally), lora_linear_ref,
        x, [p], x.detach().double().requires_grad_(), [in_float64(p)], tolerance_of(dtype, adapter_dtype),
    )  # fmt: skip
    assert tally.backward == 1


@pytest.mark.parametrize(
    ("device", "dtype", "adapter_dtype", "ranks", "head_dim", "rotary", "options"),
    cases(
        ((8, 8, 8), 16, 16, {}),
        ((4, 0, 20), 24, 24, {"bias": True, "lora_bias": True}),
        ((0, 0, 0), 16, 8, {}),
        ((8, 0, 8), 32, 16, {"train": False}),
        ((100, 0, 4), 16, 16, {"train": False}),  # added before the GEMM
    ),
)
def test_lora_qkv(device, dtype, adapter_dtype, ranks, head_dim, rotary, options, poisoned_empty):
    batch, seq, width = 2, 11, 72
    sizes = (4 * head_dim, 2 * head_dim, 2 * head_dim)
    group = [
        projection(n, width, r, device=device, dtype=dtype, adapter_dtype=adapter_dtype, scaling=0.5 + i, **options)
        for i, (n, r) in enumerate(zip(sizes, ranks))
    ]
    x = tensor(batch, seq, width, device=device, dtype=dtype)
    cos = tensor(batch, seq, rotary, device=device, dtype=dtype, grad=False)  # the halves differ: the general case
    sin = tensor(batch, seq, rotary, device=device, dtype=dtype, grad=False)
    tolerance = tolerance_of(dtype, adapter_dtype)
    if rotary < head_dim:
        tolerance *= 2  # a second op, hence a second rounding
    run(
        lambda x, *g: lora_qkv(x, *g, cos, sin, head_dim),
        lambda x, *g: lora_qkv_ref(x, *g, cos.double(), sin.double(), head_dim),
        x, group, x.detach().double().requires_grad_(), [in_float64(p) for p in group], tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_lora_qkv_shares_cos_over_the_batch_and_takes_any_strides(device):
    group = [projection(n, 24, r, device=device) for n, r in ((32, 4), (16, 0), (16, 4))]
    x = tensor(24, 7, 3, device=device).permute(2, 1, 0)  # no dimension contiguous as stored
    cos, sin = (tensor(1, 7, 8, device=device, grad=False) for _ in "cs")
    exact_x = x.detach().double().requires_grad_()
    leaf = x.detach().requires_grad_()
    run(
        lambda x, *g: lora_qkv(x, *g, cos, sin, 8), lambda x, *g: lora_qkv_ref(x, *g, cos.double(), sin.double(), 8),
        leaf, group, exact_x, [in_float64(p) for p in group], 2.5e-6,
    )  # fmt: skip


MLP_CASES = [
    ((8, 8, 8), {}),
    ((4, 0, 20), {"bias": True, "lora_bias": True}),
    ((0, 0, 0), {}),
    ((0, 16, 0), {"train": False}),
    ((100, 4, 100), {"train": False}),
]


@pytest.mark.parametrize(("device", "dtype", "adapter_dtype", "ranks", "options"), cases(*MLP_CASES))
@pytest.mark.parametrize("retained", [False, True])
def test_lora_mlp(device, dtype, adapter_dtype, ranks, options, retained, poisoned_empty):
    width, inner = 40, 72
    sizes = ((inner, width), (inner, width), (width, inner))
    group = [
        projection(n, k, r, device=device, dtype=dtype, adapter_dtype=adapter_dtype, scaling=0.5 + i, **options)
        for i, ((n, k), r) in enumerate(zip(sizes, ranks))
    ]
    x = tensor(2, 9, width, device=device, dtype=dtype)
    residual = tensor(2, 9, width, device=device, dtype=dtype)
    exact_x, exact_residual = (t.detach().double().requires_grad_() for t in (x, residual))
    exact_group = [in_float64(p) for p in group]
    out = lora_mlp(x, *group, residual=residual)
    exact = lora_mlp_ref(exact_x, *exact_group, residual=exact_residual)
    tolerance = 2 * tolerance_of(dtype, adapter_dtype)
    check([out], [exact], tolerance)
    seed = torch.randn(exact.shape, dtype=torch.float64).to(device, dtype)
    wanted = [x, residual, *leaves(*group)]
    grads = torch.autograd.grad(out, wanted, seed, retain_graph=retained)
    if retained:  # an in-place backward would have destroyed gate and up
        grads = torch.autograd.grad(out, wanted, seed)
    check(grads, torch.autograd.grad(exact, [exact_x, exact_residual, *leaves(*exact_group)], seed.double()), tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_lora_mlp_without_output_has_the_same_gradients(device, dropout):
    group = [
        projection(n, k, 4, device=device, dropout=dropout, train=False) for n, k in ((72, 40), (72, 40), (40, 72))
    ]
    x = tensor(2, 9, 40, device=device)
    seed = torch.randn(2, 9, 40, device=device)
    results = []
    for need_output in (True, False):
        torch.manual_seed(3)
        y = lora_mlp(x, *group, need_output=need_output)
        results.append([y, *torch.autograd.grad(y, [x, *leaves(*group)], seed)])
    assert results[1][0].shape == results[0][0].shape and not results[1][0].any()
    for kept, skipped in zip(results[0][1:], results[1][1:]):
        assert torch.equal(kept, skipped)


def drawn_masks(x2d, group, seed, stream=0):
    """The masks that an op draws for ``group``, as numbers of 0 and 1, one [T, K] a projection (None without an
    adapter).
    """
    ops = operands(sum((flatten(p) for p in group), ()), tuple(factors(p) for p in group))
    bits = draw_masks(x2d, adapted(ops), seed, stream)
    masks = iter(unpack_dropout_bits(bits, x2d.shape[-1]).double())
    return [next(masks) if p.adapter is not None else None for p in group]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rates", "rank"),
    [((0.25, 0.25, 0.25), 4), ((0.1, 0.0, 0.5), 4), ((0.25, 0.25, 0.25), 64)],  # 3 x 64: more than one launch takes
)
def test_dropout_is_peft_s_with_independent_masks(device, rates, rank):
    """With the masks it drew the op is the reference: values, gradient scale 1 / (1 - p), one mask a projection."""
    width, tokens = 40, 22
    group = [projection(n, width, rank, device=device, dropout=p, train=False) for n, p in zip((32, 16, 16), rates)]
    x = tensor(2, tokens // 2, width, device=device)
    cos, sin = (tensor(1, tokens // 2, 8, device=device, grad=False) for _ in "cs")
    torch.manual_seed(11)
    seed = draw_seed(x.device)
    masks = drawn_masks(x.detach().view(tokens, width), group, seed)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])

    def fn(x, *g):
        torch.manual_seed(11)
        return lora_qkv(x, *g, cos, sin, 8)

    run(
        fn,
        lambda x, *g: lora_qkv_ref(x, *g, cos.double(), sin.double(), 8, masks=[m.view(2, -1, width) for m in masks]),
        x, group, x.detach().double().requires_grad_(), [in_float64(p) for p in group], 2.5e-6,
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_mlp_dropout(device):
    sizes = ((72, 40), (72, 40), (40, 72))
    group = [projection(n, k, 4, device=device, dropout=0.3, train=False) for n, k in sizes]
    x = tensor(2, 9, 40, device=device)
    torch.manual_seed(5)
    seed = draw_seed(x.device)
    masks = drawn_masks(x.detach().view(18, 40), group[:2], seed)
    masks += drawn_masks(torch.empty(18, 72, device=device), group[2:], seed, stream=8)

    def fn(x, *g):
        torch.manual_seed(5)
        return lora_mlp(x, *g)

    run(
        fn, lambda x, *g: lora_mlp_ref(x, *g, masks=[m.view(2, 9, -1) for m in masks]),
        x, group, x.detach().double().requires_grad_(), [in_float64(p) for p in group], 5e-6,
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_dropout_bits_statistics(device, p):
    tokens, width = (64, 100) if INTERPRETED else (400, 1000)
    seed = torch.tensor([123456789012345], device=device)
    kernel = INTERPRETED or device == "cuda"
    bits = dropout_bits(seed, p, 2, tokens, width, kernel=kernel)
    kept = unpack_dropout_bits(bits, width).double()
    n = kept[0].numel()
    sigma = (p * (1 - p) / n) ** 0.5
    for mask in kept:
        assert abs(mask.mean().item() - (1 - p)) <= 5 * sigma + 2**-17
    if 0 < p < 1:
        centred = kept - (1 - p)
        variance = p * (1 - p)
        neighbours = (centred[:, :, 1:] * centred[:, :, :-1]).mean() / variance
        siblings = (centred[0] * centred[1]).mean() / variance
        rows = (centred[:, 1:] * centred[:, :-1]).mean() / variance
        for correlation in (neighbours, siblings, rows):
            assert abs(correlation.item()) < 5 * n**-0.5
        other = unpack_dropout_bits(dropout_bits(seed, p, 1, tokens, width, kernel=kernel, stream=8), width)[0]
        assert not torch.equal(other.double(), kept[0])
    assert torch.equal(bits, dropout_bits(seed, p, 2, tokens, width, kernel=kernel))


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device):
    p = projection(16, 24, 4, device=device)
    x = tensor(0, 24, device=device)
    y = lora_linear(x, p)
    y.sum().backward()
    assert y.shape == (0, 16) and x.grad.shape == (0, 24)
    assert not p.adapter.a.grad.any() and not p.adapter.b.grad.any()


def test_operands_that_do_not_fit_are_named():
    p = projection(16, 24, 4, device="cpu")
    with pytest.raises(ValueError, match=r"25 features.*\(16, 24\)"):
        lora_linear(torch.randn(2, 25), p)
    with pytest.raises(ValueError, match=r"LoRA A \(4, 20\)"):
        lora_linear(torch.randn(2, 24), p._replace(adapter=p.adapter._replace(a=torch.randn(4, 20))))
    with pytest.raises(ValueError, match="do not fit"):
        lora_mlp(torch.randn(2, 24), p, p, p)
    with pytest.raises(ValueError, match="multiple of an even head size"):
        lora_qkv(torch.randn(1, 2, 24), p, p, p, torch.randn(1, 2, 6), torch.randn(1, 2, 6), 6)


def test_parameters_written_to_between_forward_and_backward_are_noticed():
    """As autograd notices it for saved tensors; they are not saved, for the sake of checkpointing's hooks."""
    p = projection(16, 24, 4, device="cpu")
    y = lora_linear(torch.randn(3, 24, requires_grad=True), p)
    with torch.no_grad():
        p.adapter.b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_input_that_backward_does_not_read_is_not_kept():
    """Layers without adapter over frozen weights (the whole MLP, with PEFT's default targets) need no activation."""
    frozen = projection(16, 24, 0, device="cpu", train=False)
    adapted = projection(16, 24, 4, device="cpu", train=False)
    x = torch.randn(3, 24, requires_grad=True)
    # Older torch clears a node with its last output, so they are held.
    y, y_adapted = lora_linear(x, frozen), lora_linear(x, adapted)
    assert y.grad_fn.saved_tensors[0] is None and y_adapted.grad_fn.saved_tensors[0] is not None


def with_the_kernels_of_large_products(monkeypatch, device):
    """Settings with which they run: dtype, tokens, and two widths. Small ones in the interpreter."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("a GPU's")
    if not INTERPRETED:
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("of compute capability 9.0")
        return torch.bfloat16, 2048, 1024, 256
    monkeypatch.setattr(gemm, "MIN_TOKENS", 1)
    for module in (_siblings_backward, mlp):
        monkeypatch.setattr(module, "LIBRARY_TOKENS", 1)
    for name in ("FORWARD", "SWIGLU", "BACKWARD"):
        monkeypatch.setattr(gemm, name, gemm.Tile(16, 32, 16, 2, 4, 2))
    return torch.float32, 6, 64, 32


def calls_of(monkeypatch, *functions):
    """The names of these functions, (module, name) each, in the order in which they are called."""
    called = []
    for module, name in functions:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name, **k: (called.append(name), real(*a, **k))[1])
    return called


OF_SWIGLU = tuple((swiglu_low_rank, name) for name in ("swiglu_down", "hidden_down", "swiglu_outer"))


@pytest.mark.parametrize("op", ["linear", "qkv", "mlp", "mlp, nothing kept"])
@pytest.mark.parametrize("device", DEVICES)
def test_through_the_persistent_gemm(device, op, monkeypatch):
    """Where it runs it takes every large product, with the updates: forward, dx, and the MLP's hidden activation. So
    do the one pass over dy, and those in which SwiGLU leaves what it makes for the adapter of down.
    """
    dtype, tokens, n, small = with_the_kernels_of_large_products(monkeypatch, device)
    called = calls_of(
        monkeypatch, (gemm, "gemm"), (gemm, "gemm_swiglu"), (gemm, "gemm_dx"), (down_outer, "down_outer"), *OF_SWIGLU
    )
    make = lambda n, k, r=8, **kw: projection(n, k, r, device=device, dtype=dtype, train=False, **kw)  # noqa: E731
    x = tensor(2, tokens // 2, n, device=device, dtype=dtype)
    x64 = x.detach().double().requires_grad_()
    cos, sin = (torch.randn(1, tokens // 2, 16, device=device) for _ in range(2))
    if op == "linear":
        projections, expected = [make(small, n)], ["gemm", "down_outer", "gemm_dx"]
        fast, ref = lora_linear, lora_linear_ref
    elif op == "qkv":
        projections = [make(n, n), make(small, n, 0), make(small, n, scaling=0.5)]
        expected = ["gemm", "down_outer", "gemm_dx"]
        fast = lambda x, *p: lora_qkv(x, *p, cos, sin, 16)  # noqa: E731
        ref = lambda x, *p: lora_qkv_ref(x, *p, cos.double(), sin.double(), 16)  # noqa: E731
    else:
        projections = [make(2 * n, n), make(2 * n, n, scaling=0.5), make(n, 2 * n)]
        residual = torch.randn_like(x)
        kept = op == "mlp"
        fast = lambda x, *p: lora_mlp(x, *p, residual=residual, keep=kept)  # noqa: E731
        ref = lambda x, *p: lora_mlp_ref(x, *p) + residual.double()  # noqa: E731
        backward = ["down_outer", "gemm_dx", "swiglu_outer", "down_outer", "gemm_dx"]
        expected = ["gemm", "swiglu_down", "gemm", *backward] if kept else ["gemm_swiglu", "hidden_down", "gemm"]
    exact = [in_float64(p) for p in projections]
    tolerance = tolerance_of(dtype, None)
    if op == "mlp, nothing kept":
        with torch.no_grad():
            check([fast(x, *projections)], [ref(x64, *exact)], tolerance)
    else:
        run(fast, ref, x, projections, x64, exact, tolerance)
    assert called == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adapters", [(8, 8, 8), (0, 0, 8), (8, 8, 0)])
@pytest.mark.parametrize("trains", [False, True])
def test_what_swiglu_makes_for_the_adapter_of_down(device, adapters, trains, monkeypatch):
    """h A^T in the forward, dA in the backward, unless the weight of down trains, whose gradient needs h itself."""
    dtype, tokens, n, _ = with_the_kernels_of_large_products(monkeypatch, device)
    called = calls_of(monkeypatch, *OF_SWIGLU)
    group = [
        projection(*size, rank, device=device, dtype=dtype, train=trains and size == (n, 2 * n))
        for size, rank in zip(((2 * n, n), (2 * n, n), (n, 2 * n)), adapters, strict=True)
    ]
    x = tensor(2, tokens // 2, n, device=device, dtype=dtype)
    exact = x.detach().double().requires_grad_(), [in_float64(p) for p in group]
    run(lora_mlp, lora_mlp_ref, x, group, *exact, 2 * tolerance_of(dtype, None))
    assert called == (["swiglu_down", *([] if trains else ["swiglu_outer"])] if adapters[2] else [])


@pytest.mark.parametrize("device", DEVICES)
def test_u_of_down_in_a_recompute(device, monkeypatch):
    """It comes from the forward, or without a memo from h, which then has to be there; the gradients are the same."""
    dtype, tokens, n, _ = with_the_kernels_of_large_products(monkeypatch, device)
    group = [
        projection(*size, 8, device=device, dtype=dtype, train=False) for size in ((2 * n, n), (2 * n, n), (n, 2 * n))
    ]
    x = tensor(2, tokens // 2, n, device=device, dtype=dtype)
    seed = torch.randn_like(x)
    lows = []
    memos = (None, Memo(None, lambda *low: lows.append(low)))

    def gradients(**kwargs):
        y = lora_mlp(x, *group, **kwargs)
        return y, torch.autograd.grad(y, [x, *leaves(*group)], seed)

    y, wanted = gradients(memos=memos)
    for keep in (True, False):
        with torch.no_grad():
            assert torch.equal(lora_mlp(x, *group, memos=memos, keep=keep), y)
    assert len(lows) == 3 and all(torch.equal(u, lows[0][0]) for u, _ in lows), "kept or not, the same bits"
    called = calls_of(monkeypatch, *OF_SWIGLU)
    again, known = gradients(memos=(None, Memo(lows[0], None)))
    assert torch.equal(again, y) and all(map(torch.equal, known, wanted)) and called == ["swiglu_outer"]
    check(gradients(need_output=False)[1], wanted, tolerance_of(dtype, None))
    assert called == ["swiglu_outer"], "dB needs u, u needs h"
    known = gradients(need_output=False, memos=(None, Memo(lows[0], None)))[1]
    assert all(map(torch.equal, known, wanted)) and called == ["swiglu_outer"] * 2


@pytest.mark.parametrize("tokens", [64, 2048])
@pytest.mark.parametrize("device", DEVICES)
def test_small_update_beside_a_large_residual(device, tokens):
    """As B is small in the first steps, so is the update: a step of bf16 at the residual's size is a hundred times as
    large. Rounded with the residual alone it would be gone; with all of the sum it is there on average.
    """
    if INTERPRETED:
        pytest.skip("bf16")
    dtype = torch.bfloat16
    gate, up, down = (
        projection(n, k, 8, device=device, dtype=dtype, train=False) for n, k in ((256, 64), (256, 64), (64, 256))
    )
    x = tensor(tokens, 64, device=device, dtype=dtype, grad=False)
    residual = tensor(tokens, 64, device=device, dtype=dtype, scale=8.0, grad=False)
    with torch.no_grad():
        down.adapter.b.mul_(1e-3)
        without = down._replace(adapter=down.adapter._replace(b=torch.zeros_like(down.adapter.b)))
        with_update, base = (lora_mlp(x, gate, up, d, residual=residual).double() for d in (down, without))
        exact = [in_float64(p) for p in (gate, up, down, without)]
        expected = lora_mlp_ref(x.double(), *exact[:3]) - lora_mlp_ref(x.double(), *exact[:2], exact[3])
    share = ((with_update - base) * expected).sum() / expected.pow(2).sum()
    assert abs(share - 1) < (0.3 if tokens == 64 else 0.1)  # seen: 0.07, 0.02


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("device", DEVICES)
def test_keeps_what_the_norm_keeps(device, dropout, monkeypatch):
    """After a norm, bf16: dA comes from the norm's own input, which is as exact, and the norm's result is let go."""
    if INTERPRETED:
        pytest.skip("bf16")
    monkeypatch.setattr(_siblings, "LIBRARY_TOKENS", 1)
    bf16, squared = torch.bfloat16, {True: 0.0, False: 0.0}
    for seed in range(16):
        torch.manual_seed(seed)
        x = tensor(2, 24, 64, device=device, dtype=bf16)
        weight = (1 + 0.3 * torch.randn(64)).to(device, bf16)
        q, k, v = (
            projection(n, 64, 8, device=device, dtype=bf16, adapter_dtype=torch.float32, train=False, dropout=dropout)
            for n in (64, 32, 32)
        )
        cos, sin = torch.ones(1, 24, 16, device=device), torch.zeros(1, 24, 16, device=device)
        grads, masks = {}, None
        with torch.autocast(device, bf16):
            for marked in (True, False):
                normed, _ = residual_rms_norm(x, None, weight, 1e-5)
                given = normed if marked else normed.view_as(normed)
                saved = []
                torch.manual_seed(seed)
                with torch.autograd.graph.saved_tensors_hooks(
                    lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t
                ):
                    out = lora_qkv(given, q, k, v, cos, sin, 16)
                assert any(t.data_ptr() == normed.data_ptr() for t in saved) is not marked
                masks = next((t for t in saved if t.dtype is torch.int32), None)
                dy = [torch.randn(o.shape, device=device).to(bf16) for o in out]
                grads[marked] = torch.autograd.grad(out, [p.adapter.a for p in (q, k, v)], dy)
        exact = in_float64(q), in_float64(k), in_float64(v)
        n64 = x.detach().double()
        n64 = n64 * torch.rsqrt(n64.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
        for j, p in enumerate(exact):
            keep = 1.0 if masks is None else unpack_dropout_bits(masks[j], 64).double().view(2, 24, 64) / (1 - dropout)
            dy64 = dy[j].transpose(1, 2).reshape(48, -1).double()
            want = p.adapter.scaling * (dy64 @ p.adapter.b).t() @ (n64 * keep).view(48, 64)
            for marked, got in grads.items():
                squared[marked] += ((got[j].double() - want).norm() / want.norm()).item() ** 2
    assert 0 < squared[True] <= 1.1**2 * squared[False]


def test_written_to_after_the_norm(monkeypatch):
    """A norm's result that somebody changed in place is an input like any other."""
    monkeypatch.setattr(_siblings, "LIBRARY_TOKENS", 1)
    x, weight = tensor(24, 64, device="cpu", dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
    p = projection(32, 64, 8, device="cpu", dtype=torch.bfloat16, train=False)
    with torch.no_grad():
        normed, _ = residual_rms_norm(x, None, weight, 1e-5)
        normed.mul_(2)
    out = lora_linear(normed, p)
    dy = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, p.adapter.a, dy)
    (want,) = torch.autograd.grad(lora_linear(normed.clone(), p), p.adapter.a, dy)
    assert torch.equal(got, want)


@pytest.mark.skipif(INTERPRETED, reason="this is the run that the test starts")
def test_in_the_interpreter():
    """Every case above through the Triton kernels, in fp32."""
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
