"""The experts' op against plain PyTorch: forward and every gradient, on the CPU, in the interpreter and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fast_unsloth_patch.ops import _expert_kernels, _siblings, grouped_gemm
from fast_unsloth_patch.ops import lora_experts as module
from fast_unsloth_patch.ops._siblings import Memo
from fast_unsloth_patch.ops.lora_experts import ExpertAdapter, ExpertProjection, lora_experts
from fast_unsloth_patch.ops.rms_norm import residual_rms_norm
from fast_unsloth_patch.reference.experts import lora_experts_ref

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = pytest.param("cpu", id="cpu")
GPU = pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)
DEVICES = [CPU] if INTERPRETED else [CPU, GPU]
HIDDEN, INNER, EXPERTS, TOP = 32, 40, 4, 2
EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.float16: 9.8e-4, torch.bfloat16: 7.9e-3}


class Tally:
    backward = 0

    def hit_backward(self):
        self.backward += 1


def make(
    tokens=13,
    *,
    dtype=torch.float32,
    adapter_dtype=None,
    ranks=(3, 5),
    trainable=False,
    load="uneven",
    device="cpu",
    experts=EXPERTS,
    top=TOP,
    hidden=HIDDEN,
    inner=INNER,
):
    """x, index, routing weights and both projections; everything that may get a gradient is a leaf."""
    generator = torch.Generator().manual_seed(5)

    def tensor(*shape, scale=1.0, kind=dtype, grad=True):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return values.to(device, kind).requires_grad_(grad)

    def projection(n, k, rank):
        adapter = None
        if rank:
            kind = adapter_dtype or dtype
            adapter = ExpertAdapter(
                tensor(experts * rank, k, scale=k**-0.5, kind=kind),
                tensor(n, rank * experts, scale=rank**-0.5, kind=kind),
                1.7,
            )
        return ExpertProjection(tensor(experts, n, k, scale=k**-0.5, grad=trainable), adapter)

    scores = torch.rand(tokens, experts, generator=generator)
    if load == "uneven":
        scores[:, 0] += 0.5
    elif load == "empty":
        scores[:, 1] = -1.0
    elif load == "one":
        scores[:, 2] += 10.0
    values, index = scores.topk(top, -1)
    weights = torch.softmax(values, -1).to(device, torch.float64 if dtype is torch.float64 else torch.float32)
    return (
        tensor(tokens, hidden),
        index.to(device),
        weights.detach().requires_grad_(),
        projection(2 * inner, hidden, ranks[0]),
        projection(hidden, inner, ranks[1]),
    )


def leaves(x, index, weights, gate_up, down, *more):
    found = {"x": x, "weights": weights, **{f"more{i}": t for i, t in enumerate(more)}}
    for name, (weight, adapter) in (("gate_up", gate_up), ("down", down)):
        found[name] = weight
        if adapter is not None:
            found[f"{name}.a"], found[f"{name}.b"] = adapter.a, adapter.b
    return {name: t for name, t in found.items() if t.requires_grad}


def in_double(x, index, weights, gate_up, down):
    """The same operands as leaves in float64, as `lora_experts_ref` takes them."""
    double = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in (x, weights)}

    def operands(projection):
        weight, adapter = projection
        parts = (weight,) if adapter is None else (weight, adapter.a, adapter.b)
        double.update({id(t): t.detach().double().requires_grad_(t.requires_grad) for t in parts})
        parts = tuple(double[id(t)] for t in parts)
        return (*parts, adapter.scaling) if adapter is not None else (*parts, None, None, 0.0)

    args = (double[id(x)], index, double[id(weights)], operands(gate_up), operands(down))
    return args, double


def check(case, tolerance, *, run=lora_experts, residual=None, **kwargs):
    named = leaves(*case, *([] if residual is None else [residual]))
    args, double = in_double(*case)
    expected = lora_experts_ref(*args)
    inputs = {name: double[id(t)] for name, t in named.items() if id(t) in double}
    if residual is not None:
        inputs["more0"] = residual.detach().double().requires_grad_()
        expected = expected + inputs["more0"]
        kwargs["residual"] = residual
    dy = torch.randn(expected.shape, dtype=torch.float64, device=expected.device) / expected.shape[0]
    wanted = dict(zip(inputs, torch.autograd.grad(expected, inputs.values(), dy)))
    y = run(*case, **kwargs)
    assert y.dtype is case[0].dtype and y.shape == case[0].shape
    for t in named.values():
        t.grad = None
    y.backward(dy.to(y.dtype))
    grads = {name: t.grad for name, t in named.items()}
    far = {}
    for name, got, want in [("y", y, expected), *((name, grads[name], wanted[name]) for name in wanted)]:
        assert name == "y" or got.dtype is named[name].dtype
        distance = ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
        if not distance <= tolerance:
            far[name] = distance
    assert not far and grads.keys() == wanted.keys(), far
    return y, grads


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("load", ["uneven", "empty", "one"])
@pytest.mark.parametrize("ranks", [(3, 5), (0, 4), (8, 0), (0, 0), (16, 16)])
def test_equals_plain_pytorch(ranks, load, device, poisoned_empty):
    case = make(ranks=ranks, load=load, trainable=ranks == (3, 5), device=device)
    check(case, 4 * HIDDEN * EPS[torch.float32] if device == "cpu" else 2e-3)


@pytest.mark.parametrize("tokens,top,experts", [(1, 2, 4), (1, 1, 1), (5, 4, 4), (40, 1, 8), (33, 3, 5)])
def test_shapes(tokens, top, experts, poisoned_empty):
    check(make(tokens, top=top, experts=experts, trainable=True), 4 * HIDDEN * EPS[torch.float32])


@pytest.mark.skipif(INTERPRETED, reason="float64 runs through the reference")
def test_float64():
    check(make(dtype=torch.float64, trainable=True), 1e-13)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bfloat16 is wrong")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16(adapter_dtype, device):
    check(make(40, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, device=device), 3 * EPS[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bfloat16 is wrong")
@pytest.mark.parametrize("load", ["uneven", "empty"])
@pytest.mark.parametrize("trainable", [False, True])
def test_on_a_gpu_with_enough_rows_for_its_kernels(trainable, load):
    """Where the persistent kernels run, they do; the result is bf16's whichever way it was computed."""
    sizes = {"tokens": 1500, "hidden": 256, "inner": 384, "experts": 8}
    case = make(**sizes, dtype=torch.bfloat16, adapter_dtype=torch.float32, ranks=(16, 8), trainable=trainable,
                load=load, device="cuda")  # fmt: skip
    if torch.cuda.get_device_capability() == (9, 0):
        x, index, _, gate_up, _ = case
        routing = module.route(index, 8, module._block(x, torch.bfloat16))
        assert grouped_gemm.covers(module.gather(x.detach(), routing), gate_up.weight.detach(), routing)
    check(case, 3 * EPS[torch.bfloat16])


@pytest.mark.parametrize("device", DEVICES)
def test_residual_is_added_in_the_same_rounding(device):
    case = make(device=device)
    residual = torch.randn(13, HIDDEN, device=device, requires_grad=True)
    check(case, 4 * HIDDEN * EPS[torch.float32] if device == "cpu" else 2e-3, residual=residual)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bfloat16 is wrong")
def test_after_a_norm_its_input_is_kept(monkeypatch):
    """With the gradients that the norm's result would give, pooled over seeds as good; not for a trained weight."""
    monkeypatch.setattr(_siblings, "LIBRARY_TOKENS", 1)
    squared = {True: 0.0, False: 0.0}
    for seed in range(8):
        torch.manual_seed(seed)
        x, index, weights, gate_up, down = make(40, dtype=torch.bfloat16, adapter_dtype=torch.float32)
        x = torch.randn(40, HIDDEN).to(torch.bfloat16).requires_grad_()
        norm = torch.rand(HIDDEN).add(0.5).to(torch.bfloat16)
        dy = torch.randn(40, HIDDEN).to(torch.bfloat16)
        exact = x.detach().double()
        exact = (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * norm.double()).requires_grad_()
        args, double = in_double(exact, index, weights, gate_up, down)
        (wanted,) = torch.autograd.grad(lora_experts_ref(*args), double[id(gate_up.adapter.a)], dy.double())
        for marked in (True, False):
            normed, _ = residual_rms_norm(x, None, norm, 1e-5)
            given = normed if marked else normed.view_as(normed)
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: (saved.append(t.data_ptr()), t)[1], lambda t: t
            ):
                y = lora_experts(given, index, weights, gate_up, down)
            assert (normed.data_ptr() in saved) is not marked
            (got,) = torch.autograd.grad(y, gate_up.adapter.a, dy)
            assert got.dtype is torch.float32
            squared[marked] += ((got.double() - wanted).norm() / wanted.norm()).item() ** 2
    assert 0 < squared[True] <= 1.1**2 * squared[False]
    trained = make(40, dtype=torch.bfloat16, trainable=True)
    normed, _ = residual_rms_norm(trained[0], None, norm, 1e-5)
    lora_experts(normed, *trained[1:]).sum().backward()


class Store:
    """What `checkpointing.keep` and `kept` do for a region, by hand."""

    def __init__(self):
        self.tensors = None

    def memo(self):
        return Memo(self.tensors, self.keep)

    def keep(self, *tensors):
        self.tensors = tuple(None if t is None else t.detach() for t in tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memos", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recompute_leaves_out_the_output(reentrant, memos, device, monkeypatch):
    """The first call keeps nothing for backward, the second computes no output; together they are one step."""
    case, store, calls = make(device=device), Store(), []
    routed = []
    monkeypatch.setattr(module, "route", lambda *args, route=module.route: routed.append(1) or route(*args))

    def run(x, index, weights, gate_up, down):
        def region(x, weights):
            first = not calls
            calls.append(first)
            memo = store.memo() if memos else None
            return lora_experts(x, index, weights, gate_up, down, need_output=first, keep=not first, memo=memo)

        return checkpoint(region, x, weights, use_reentrant=reentrant)

    check(case, 4 * HIDDEN * EPS[torch.float32] if device == "cpu" else 2e-3, run=run)
    assert calls == [True, False] and len(routed) == (1 if memos else 2)


def test_an_output_that_nobody_needs_is_not_computed(monkeypatch):
    case = make()
    products = []

    def counted(product):
        def call(x, weight, *args, **kwargs):
            products.append(tuple(weight.shape))
            return product(x, weight, *args, **kwargs)

        return call

    for name in ("grouped_down", "grouped_gemm", "grouped_gemm_swiglu"):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    y = lora_experts(*case, need_output=False)
    assert y.shape == case[0].shape and not y.any()
    assert products == [(EXPERTS, 16, HIDDEN), (EXPERTS, 2 * INNER, HIDDEN)]


@pytest.mark.parametrize("device", DEVICES)
def test_two_backwards_are_equal_to_the_bit(device):
    case = make(40, trainable=True, device=device)
    y = lora_experts(*case)
    named = leaves(*case)
    dy = torch.ones_like(y)
    first = torch.autograd.grad(y, named.values(), dy, retain_graph=True)
    second = torch.autograd.grad(y, named.values(), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    again = torch.autograd.grad(lora_experts(*case), named.values(), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_only_what_is_asked_for_is_computed(monkeypatch):
    """No product of two activations for a frozen weight, and none for a frozen adapter."""
    outer = []

    def counted(name, product):
        return lambda *args: outer.append(name) or product(*args)

    for name in ("grouped_outer", "grouped_down_outer"):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    case = make()
    case[3].adapter.a.requires_grad_(False)
    case[4].adapter.b.requires_grad_(False)
    y = lora_experts(*case)
    torch.autograd.grad(y.sum(), [t for t in leaves(*case).values()])
    assert outer == ["grouped_outer", "grouped_down_outer"]


def test_counts_one_backward_and_takes_no_second_derivative():
    tally, case = Tally(), make()
    lora_experts(*case, tally=tally).sum().backward()
    assert tally.backward == 1
    (dx,) = torch.autograd.grad(lora_experts(*case).square().sum(), [case[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        dx.sum().backward()


def test_a_weight_changed_before_backward_raises():
    case = make()
    y = lora_experts(*case)
    with torch.no_grad():
        case[3].adapter.b.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.skipif(INTERPRETED, reason="autocast on a CPU is bfloat16")
def test_autocast_does_not_reach_inside():
    """The dtype is the caller's choice: transformers' grouped_mm computes in the weights' whatever autocast says."""
    case = make()
    plain = lora_experts(*case)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_experts(*case)
    assert torch.equal(plain, y)
    assert lora_experts(*case, dtype=torch.bfloat16).dtype is torch.float32


def test_a_packed_stack_is_unpacked_where_it_is_used():
    class Packed:
        requires_grad = False

        def __init__(self, dense):
            self.dense, self.shape, self.dtype, self.device = dense, dense.shape, dense.dtype, dense.device

        def dequantize(self, first=0, count=None, out=None, dtype=None):
            part = self.dense[first : None if count is None else first + count].to(dtype or self.dtype)
            return part.clone() if out is None else out.copy_(part)

    x, index, weights, gate_up, down = make()
    packed = [ExpertProjection(Packed(p.weight), p.adapter) for p in (gate_up, down)]
    named = leaves(x, index, weights, gate_up, down)
    dense = lora_experts(x, index, weights, gate_up, down)
    wanted = torch.autograd.grad(dense.sum(), named.values())
    y = lora_experts(x, index, weights, *packed)
    assert torch.equal(y, dense)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.sum(), named.values()), wanted))


def test_the_swiglu_kernel_takes_padding_for_zero(poisoned_empty):
    pairs = torch.tensor([1, -1, 0, 2, -1], dtype=torch.int32)
    gu, dh = torch.randn(5, 12), torch.randn(5, 6)
    gu[pairs < 0], dh[pairs < 0] = float("nan"), float("nan")
    weights = torch.rand(3)
    used = pairs >= 0
    gate, up = gu[used].clone().requires_grad_().chunk(2, 1)
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    h = torch.nn.functional.silu(gate) * up
    dgate, dup = torch.autograd.grad(h, (gate, up), dh[used] * weights[pairs[used].long(), None])
    expected_dw = (h.detach() * dh[used]).sum(1)
    dgu = torch.full_like(gu, float("nan"))
    dw = _expert_kernels.weighted_swiglu_bwd(dh, gu, dgu, pairs, weights)
    torch.testing.assert_close(dgu[used], torch.cat((dgate, dup), 1))
    torch.testing.assert_close(dh[used], h.detach())
    torch.testing.assert_close(dw[used], expected_dw)
    assert not dgu[~used].any() and not dh[~used].any() and not dw[~used].any()


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda x, i, w, g, d: (x[:, :-1], i, w, g, d), "do not fit x"),
        (lambda x, i, w, g, d: (x, i[:-1], w, g, d), "top_k_index"),
        (
            lambda x, i, w, g, d: (x, i, w, g._replace(adapter=g.adapter._replace(b=g.adapter.b.t())), d),
            "do not fit gate_up",
        ),
        (lambda x, i, w, g, d: (x, i, w, g, ExpertProjection(d.weight.mT, None)), "do not fit x"),
    ],
)
def test_operands_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        lora_experts(*change(*make()))
    with pytest.raises(ValueError, match="residual"):
        lora_experts(*make(), residual=torch.zeros(1, HIDDEN))


@pytest.mark.skipif(INTERPRETED, reason="runs this file in the interpreter")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:]
