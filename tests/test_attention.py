"""Variable-length attention against attention with a dense mask in float64: forward and all gradients."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from fast_unsloth_patch.ops import attention as op
from fast_unsloth_patch.ops.attention import varlen_attention, varlen_unsupported

LENGTHS = [5, 1, 12, 7]


def bounds_of(lengths) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def dense(q, k, v, bounds, scaling, window=None):
    """The definition, token by token of the mask: same document, not later, inside the window."""
    total = q.shape[0]
    mask = torch.zeros(total, total, dtype=torch.bool)
    for start, end in pairwise(bounds.tolist()):
        for i in range(start, end):
            mask[i, max(start, i + 1 - (window or total)) : i + 1] = True
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * scaling
    weights = scores.masked_fill(~mask.to(q.device), -math.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def operands(lengths, hq, hk, d, dtype, device="cpu", seed=0):
    """q, k, v as views of one buffer, as `lora_qkv` lays them, and a gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    buffer = torch.randn(total, hq + 2 * hk, d, generator=generator, dtype=torch.float64)
    grad = torch.randn(total, hq, d, generator=generator, dtype=torch.float64)
    buffer = buffer.to(device, dtype).requires_grad_()
    return buffer, grad.to(device, dtype)


def results(function, buffer, grad, hq, hk, bounds, **kwargs):
    q, k, v = buffer.split((hq, hk, hk), 1)
    out = function(q, k, v, bounds, **kwargs)
    return out.detach(), torch.autograd.grad(out, buffer, grad)[0]


@pytest.mark.parametrize("window", [None, 1, 3, 7, 12, 40])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_against_dense_mask(heads, window):
    hq, hk = heads
    bounds = bounds_of(LENGTHS)
    buffer, grad = operands(LENGTHS, hq, hk, 8, torch.float32)
    fast = results(
        lambda *args, **kwargs: varlen_attention(*args, max(LENGTHS), **kwargs),
        buffer,
        grad,
        hq,
        hk,
        bounds,
        scaling=0.3,
        window=window,
    )
    exact = results(
        dense, buffer.detach().double().requires_grad_(), grad.double(), hq, hk, bounds, scaling=0.3, window=window
    )
    assert fast[0].dtype is torch.float32 and fast[0].is_contiguous()
    for a, b in zip(fast, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", ["equal", "longer window", "window", "deterministic", "unequal"])
def test_documents_of_one_length_are_rows(case, device, monkeypatch):
    """sdpa runs them, and there alone; the numbers are those of the definition."""
    called, sdpa = [], op.F.scaled_dot_product_attention
    monkeypatch.setattr(op.F, "scaled_dot_product_attention", lambda *a, **k: called.append(k) or sdpa(*a, **k))
    lengths = [5, 6, 7] if case == "unequal" else [6, 6, 6]
    window = {"window": 3, "longer window": 6}.get(case)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    bounds, (buffer, grad) = bounds_of(lengths), operands(lengths, 4, 2, 8, dtype, device)
    if case == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    options = {"scaling": 0.3, "window": window}
    fast = results(
        lambda *args, **kwargs: varlen_attention(*args, max(lengths), **kwargs),
        buffer, grad, 4, 2, bounds.to(device), **options,
    )  # fmt: skip
    exact = results(dense, buffer.detach().double().requires_grad_(), grad.double(), 4, 2, bounds, **options)
    limit = 1e-5 if device == "cpu" else 2e-2
    for a, b in zip(fast, exact):
        torch.testing.assert_close(a.double(), b, rtol=limit, atol=limit)
    assert fast[0].is_contiguous()
    # The reference calls it for each document.
    assert sum("enable_gqa" in options for options in called) == (case in ("equal", "longer window"))


def test_documents_do_not_see_each_other():
    bounds = bounds_of([4, 6])
    buffer, _ = operands([4, 6], 2, 2, 8, torch.float64)
    q, k, v = buffer.split((2, 2, 2), 1)
    out = varlen_attention(q, k, v, bounds, 6, scaling=1.0)
    assert torch.autograd.grad(out[4:].sum(), buffer, retain_graph=True)[0][:4].abs().max() == 0
    assert torch.autograd.grad(out[:4].sum(), buffer)[0][4:].abs().max() == 0


def test_bounds_that_do_not_cover_the_tokens_are_an_error():
    x = torch.randn(5, 2, 8)
    with pytest.raises(ValueError, match="expected 0 to 5"):
        varlen_attention(x, x, x, torch.tensor([0, 3], dtype=torch.int32), 3, scaling=1.0)


def test_reasons(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert varlen_unsupported(cpu, torch.float32, 20) is None
    assert varlen_unsupported(cuda, torch.float32, 64) == "attention in float32"
    assert varlen_unsupported(cuda, torch.bfloat16, 20) == "head size 20"
    assert varlen_unsupported(cuda, torch.bfloat16, 264) == "head size 264"
    monkeypatch.setattr(op, "_has_flash", lambda: False)
    assert varlen_unsupported(cuda, torch.bfloat16, 64) == "no flash attention"
    monkeypatch.setattr(op, "_has_flash", lambda: True)
    for size in (64, 96, 128, 256):
        assert varlen_unsupported(cuda, torch.float16, size) is None
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert varlen_unsupported(cuda, torch.float16, 64) == "flash attention disabled"


def test_the_operator_has_the_arguments_that_are_passed():
    """Of every torch that CI has: its schema, a derivative, and how ``torch.nn.attention.varlen`` calls it."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    assert [argument.name for argument in schema.arguments][: len(op._ARGUMENTS)] == op._ARGUMENTS
    backward = torch.ops.aten._flash_attention_backward.default._schema
    assert {"cum_seq_q", "window_size_left", "window_size_right"} <= {a.name for a in backward.arguments}


# ---- the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 37, 100])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_gpu_against_dense_mask(head_dim, heads, window, dtype):
    """RMS error against float64 within three roundings of a value, of the result and of each of dq, dk, dv."""
    hq, hk = heads
    lengths = [130, 1, 77, 256, 3]
    bounds = bounds_of(lengths)
    buffer, grad = operands(lengths, hq, hk, head_dim, dtype, "cuda")
    scaling = head_dim**-0.5
    fast = results(
        lambda *args, **kwargs: varlen_attention(*args, max(lengths), **kwargs),
        buffer,
        grad,
        hq,
        hk,
        bounds.cuda(),
        scaling=scaling,
        window=window,
    )
    exact = results(
        dense, buffer.detach().double().requires_grad_(), grad.double(), hq, hk, bounds, scaling=scaling, window=window
    )
    parts = [(fast[0], exact[0]), *zip(fast[1].split((hq, hk, hk), 1), exact[1].split((hq, hk, hk), 1))]
    for name, (a, b) in zip(("out", "dq", "dk", "dv"), parts):
        # A window of one token has gradients of zero for q and k.
        scale = b.norm() if b.abs().max() > 1e-9 else exact[1].norm()
        assert not a.isnan().any()
        assert ((a.double() - b).norm() / scale).item() < 3 * torch.finfo(dtype).eps, name


@pytest.mark.gpu
def test_gpu_documents_of_one_token():
    """With grouped heads torch's kernel has a path of its own for them, whose backward does not fit."""
    buffer, grad = operands([1] * 9, 8, 2, 64, torch.bfloat16, "cuda")
    bounds = bounds_of([1] * 9).cuda()
    out, dbuffer = results(
        lambda *args, **kwargs: varlen_attention(*args, 1, **kwargs), buffer, grad, 8, 2, bounds, scaling=1.0
    )
    v = buffer.detach()[:, 10:]
    torch.testing.assert_close(out, v.repeat_interleave(4, 1), rtol=0, atol=0)
    # dv is a sum over four heads, which flash rounds to bf16 one by one.
    torch.testing.assert_close(dbuffer[:, 10:].float(), grad.float().unflatten(1, (2, 4)).sum(2), rtol=2e-2, atol=2e-2)
    assert dbuffer[:, :10].float().abs().max() < 1e-2


@pytest.mark.gpu
def test_gpu_deterministic_when_asked():
    buffer, grad = operands([512, 256, 256], 8, 2, 64, torch.bfloat16, "cuda")
    bounds = bounds_of([512, 256, 256]).cuda()

    def once():
        return results(
            lambda *args, **kwargs: varlen_attention(*args, 512, **kwargs), buffer, grad, 8, 2, bounds, scaling=0.1
        )

    torch.use_deterministic_algorithms(True)
    try:
        first, second = once(), once()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
