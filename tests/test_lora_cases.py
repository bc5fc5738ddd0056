"""What is easily wrong in the LoRA operations: layouts, frozen operands, many tokens, mixed dtypes, a second backward.

`test_lora_ops` holds the formulas; the cases here are single properties. They run on the CPU through the reference
path, in the Triton interpreter (``test_in_the_interpreter`` starts that run) and on a GPU (marker ``gpu``).
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from test_lora_ops import DEVICES, check, in_float64, leaves, projection, run, tensor

from fast_unsloth_patch.ops.lora_linear import Adapter, Projection, lora_linear
from fast_unsloth_patch.ops.lora_mlp import lora_mlp
from fast_unsloth_patch.ops.lora_qkv import lora_qkv
from fast_unsloth_patch.reference.lora import lora_linear_ref, lora_mlp_ref, lora_qkv_ref

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HEAD = 16


def mlp_group(device, ranks=(4, 4, 4), width=40, inner=72, **options):
    sizes = (inner, width), (inner, width), (width, inner)
    return [projection(n, k, r, device=device, **options) for (n, k), r in zip(sizes, ranks)]


def qkv_group(device, ranks=(4, 4, 4), width=40, **options):
    return [projection(n, width, r, device=device, **options) for n, r in zip((64, 32, 32), ranks)]


def angles(seq, device, dtype=torch.float32):
    return [tensor(1, seq, HEAD, device=device, dtype=dtype, grad=False) for _ in "cs"]


def exact(t):
    return t.detach().double().requires_grad_()


def transposed(p, part):
    """The projection with its A or B stored the other way round."""
    turned = getattr(p.adapter, part).detach().t().contiguous().t().requires_grad_()
    return p._replace(adapter=p.adapter._replace(**{part: turned}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", ["a", "b"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("rank", [4, 100])  # 100: added before the GEMM and not by the SwiGLU kernels
def test_factors_of_any_layout(device, part, dropout, rank):
    """A kernel that takes a transposed A or B for a contiguous one reads the wrong numbers, in bounds."""
    group = mlp_group(device, (rank,) * 3, dropout=dropout, train=False)
    x = tensor(2, 9, 40, device=device)
    seed = torch.randn(2, 9, 40, device=device)
    results = []
    for case in (group, [transposed(p, part) for p in group]):
        torch.manual_seed(3)
        y = lora_mlp(x, *case)
        results.append([y, *torch.autograd.grad(y, [x, *leaves(*case)], seed)])
    check(results[1], [t.double() for t in results[0]], 2.5e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_base_weight_and_gradient_of_any_layout(device):
    p = projection(24, 40, 4, device=device)
    p = p._replace(weight=p.weight.detach().t().contiguous().t().requires_grad_())
    x = tensor(3, 40, 5, device=device).detach().transpose(1, 2).requires_grad_()
    y, want = lora_linear(x, p), lora_linear_ref(exact(x), in_float64(p))
    check([y], [want], 2.5e-6)
    row = torch.randn(24, device=device)
    for seed in (
        row.expand(3, 5, 24),
        torch.ones(1, device=device).expand(3, 5, 24),
        row.view(24, 1, 1).expand(24, 5, 3).permute(2, 1, 0),
    ):
        x64, p64 = exact(x), in_float64(p)
        wanted = torch.autograd.grad(lora_linear_ref(x64, p64), [x64, *leaves(p64)], seed.double())
        check(torch.autograd.grad(lora_linear(x, p), [x, *leaves(p)], seed), wanted, 2.5e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("trainable", ["x", "a", "b", "weight", "ab", "xb"])
def test_any_part_may_be_frozen(device, trainable, dropout):
    """The gradients of what is trainable do not depend on what else is."""

    def chosen(t, name):
        return t.detach().requires_grad_(name in wanted)

    everything = mlp_group(device, dropout=dropout), qkv_group(device, dropout=dropout)
    x = tensor(1, 9, 40, device=device)
    cos, sin = angles(9, device)
    results = []
    for wanted in (("x", "a", "b", "weight"), ("weight",) if trainable == "weight" else tuple(trainable)):
        groups = [
            [
                Projection(
                    chosen(p.weight, "weight"), None,
                    p.adapter._replace(a=chosen(p.adapter.a, "a"), b=chosen(p.adapter.b, "b")),
                )
                for p in group
            ]
            for group in everything
        ]  # fmt: skip
        mine = chosen(x, "x")
        torch.manual_seed(3)
        out = [lora_mlp(mine, *groups[0]), *lora_qkv(mine, *groups[1], cos, sin, HEAD), lora_linear(mine, groups[0][0])]
        sum((o * torch.arange(o.numel(), device=device).view(o.shape) / o.numel()).sum() for o in out).backward()
        grads = {"x": [mine.grad]}
        for name in ("a", "b"):
            grads[name] = [getattr(p.adapter, name).grad for group in groups for p in group]
        grads["weight"] = [p.weight.grad for group in groups for p in group]
        results.append({name: grads[name] for name in wanted})
        assert all(t is None for name in grads if name not in wanted for t in grads[name])
    for name, found in results[1].items():
        check(found, [t.double() for t in results[0][name]], 2.5e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device):
    mlp, qkv = mlp_group(device), qkv_group(device)
    for shape in ((0, 3, 40), (2, 0, 40)):
        x = tensor(*shape, device=device)
        y = lora_mlp(x, *mlp, residual=x)
        q, k, v = lora_qkv(x, *qkv, *angles(shape[1], device), HEAD)
        assert y.shape == shape and q.shape == (shape[0], 4, shape[1], HEAD) and k.shape == v.shape
        grads = torch.autograd.grad([y.sum(), q.sum() + k.sum() + v.sum()], [x, *leaves(*mlp, *qkv)])
        assert grads[0].shape == shape and not any(g.any() for g in grads[1:])


# Block sizes, splits and the choice between kernels and library GEMMs change with the number of tokens. Of the mixed
# dtypes the interpreter has fp32 with fp16 only.
FULL, HALF = torch.float32, torch.float16 if INTERPRETED else torch.bfloat16
TOKENS = [(2100, FULL, HALF)]
if not INTERPRETED:
    TOKENS += [(600, HALF, HALF), (2100, HALF, HALF), (4200, HALF, HALF), (4200, HALF, FULL), (4200, FULL, FULL)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "dtype", "adapter_dtype"), TOKENS)
def test_many_tokens(device, tokens, dtype, adapter_dtype):
    options = {"device": device, "dtype": dtype, "adapter_dtype": adapter_dtype, "train": False}
    mlp = mlp_group(ranks=(8, 3, 20), **options)
    x = tensor(1, tokens, 40, device=device, dtype=dtype)
    eps = max(torch.finfo(dtype).eps, torch.finfo(adapter_dtype).eps)
    # Sums over the tokens: fp32 errors of the order of eps sqrt(T).
    tolerance = 2e-5 if eps < 1e-5 else 4 * eps
    run(lora_mlp, lora_mlp_ref, x, mlp, exact(x), [in_float64(p) for p in mlp], tolerance)
    qkv = qkv_group(ranks=(8, 0, 3), **options)
    cos, sin = angles(tokens, device, dtype)

    def reference(x, *group):
        return lora_qkv_ref(x, *group, cos.double(), sin.double(), HEAD)

    exact_qkv = [in_float64(p) for p in qkv]
    run(lambda x, *g: lora_qkv(x, *g, cos, sin, HEAD), reference, x, qkv, exact(x), exact_qkv, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_two_backwards_are_equal(device, dropout):
    """Nothing that the second one needs is written over by the first."""
    mlp, qkv = mlp_group(device, dropout=dropout), qkv_group(device, dropout=dropout)
    x = tensor(2, 9, 40, device=device)
    q, k, v = lora_qkv(x, *qkv, *angles(9, device), HEAD)
    out = [lora_mlp(x, *mlp, residual=x), q, k, v, lora_linear(x, mlp[0])]
    seeds = [torch.randn_like(o) for o in out]
    wanted = [x, *leaves(*mlp, *qkv)]
    first = torch.autograd.grad(out, wanted, seeds, retain_graph=True)
    second = torch.autograd.grad(out, wanted, seeds)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, wanted, seeds)


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_that_comes_in_is_only_read(device):
    mlp, qkv = mlp_group(device), qkv_group(device)
    x = tensor(2, 9, 40, device=device)
    out = [*lora_qkv(x, *qkv, *angles(9, device), HEAD), lora_mlp(x, *mlp, residual=x), lora_linear(x, mlp[0])]
    seeds = [torch.randn_like(o) for o in out]
    before = [x.detach().clone(), *(s.clone() for s in seeds)]
    torch.autograd.grad(out, [x, *leaves(*mlp, *qkv)], seeds)
    assert all(torch.equal(a, b) for a, b in zip(before, [x, *seeds], strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_one_output_of_three(device):
    qkv = qkv_group(device, ranks=(4, 0, 4))
    x = tensor(1, 9, 40, device=device)
    cos, sin = angles(9, device)
    x64, group64 = exact(x), [in_float64(p) for p in qkv]
    for i in range(3):
        got = lora_qkv(x, *qkv, cos, sin, HEAD)[i]
        want = lora_qkv_ref(x64, *group64, cos.double(), sin.double(), HEAD)[i]
        seed = torch.randn_like(got)
        (dx,) = torch.autograd.grad(got, x, seed)
        check([dx], torch.autograd.grad(want, x64, seed.double()), 2.5e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_zero_and_negative_scaling(device):
    group = [projection(n, 40, 4, device=device, scaling=s) for n, s in zip((64, 32, 32), (0.0, -2.0, 0.5))]
    x = tensor(1, 9, 40, device=device)
    cos, sin = angles(9, device)
    out = lora_qkv(x, *group, cos, sin, HEAD)
    x64, group64 = exact(x), [in_float64(p) for p in group]
    seeds = [torch.randn_like(o) for o in out]
    got = torch.autograd.grad(out, [x, *leaves(*group)], seeds)
    want = torch.autograd.grad(
        lora_qkv_ref(x64, *group64, cos.double(), sin.double(), HEAD), [x64, *leaves(*group64)],
        [s.double() for s in seeds],
    )  # fmt: skip
    for a, b in zip(got, want, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_everything_is_dropped(device):
    """p = 1 keeps nothing and divides by nothing: the layer without its update, and no gradient for A and B."""
    p = projection(24, 40, 4, device=device, dropout=1.0)
    x = tensor(5, 40, device=device)
    y = lora_linear(x, p)
    check([y], [lora_linear_ref(exact(x), in_float64(p)._replace(adapter=None))], 2.5e-6)
    da, db = torch.autograd.grad(y.sum(), [p.adapter.a, p.adapter.b])
    assert not da.any() and not db.any()


def test_autocast_leaves_float64_alone():
    """As it does for ``F.linear``: eligible are the floating types up to float32."""
    p = projection(24, 40, 4, device="cpu", dtype=torch.float64)
    x = tensor(5, 40, device="cpu", dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = lora_linear(x, p), lora_linear_ref(x, p)
    assert got.dtype is want.dtype is torch.float64
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_in_forward_only_and_in_backward_too(device):
    """Where backward runs does not change it."""
    mlp, qkv = mlp_group(device), qkv_group(device)
    x = tensor(2, 9, 40, device=device)
    cos, sin = angles(9, device)
    seeds, results = None, []
    for inside in (False, True):
        with torch.autocast(device, HALF):
            out = [lora_mlp(x, *mlp), *lora_qkv(x, *qkv, cos, sin, HEAD), lora_linear(x, mlp[0])]
            assert all(o.dtype is HALF for o in out)
        seeds = seeds or [torch.randn_like(o) for o in out]
        with torch.autocast(device, HALF, enabled=inside):
            results.append(torch.autograd.grad(out, [x, *leaves(*mlp, *qkv)], seeds))
    assert all(g.dtype is torch.float32 for g in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_down_s_adapter_that_does_not_fit_is_named():
    gate, up, down = mlp_group("cpu")
    wrong = Adapter(torch.randn(4, 71), down.adapter.b, 1.0)
    with pytest.raises(ValueError, match=r"LoRA A \(4, 71\)"):
        lora_mlp(torch.randn(2, 40), gate, up, down._replace(adapter=wrong))


def test_a_residual_that_does_not_fit_is_named():
    x = torch.randn(2, 9, 40)
    with pytest.raises(ValueError, match=r"residual \(40,\)"):
        lora_mlp(x, *mlp_group("cpu"), residual=torch.randn(40))


@pytest.mark.skipif(INTERPRETED, reason="this is the run that the test starts")
def test_in_the_interpreter():
    """Every case above through the Triton kernels."""
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
