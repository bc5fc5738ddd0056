"""Rotary position embedding of q and k in one launch, any stride layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device.dispatch import use_triton
from ..device.launch import jit, launch, tl
from ..reference.rope import rope_bwd_ref, rope_ref
from ._autograd import once_differentiable


@jit
def _rope_tile(
    x_ptr,
    y_ptr,
    c1,
    s1,
    c2,
    s2,
    stride_xh,
    stride_yh,
    heads,
    mask,
    half_cols,
    HALF: tl.constexpr,
    D: tl.constexpr,
    PASS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    # One tile [heads, HALF] of either half of one token, then the channels that do not turn. Both halves are read
    # before either is written, so y may be x.
    x_row = x_ptr + heads[:, None] * stride_xh
    y_row = y_ptr + heads[:, None] * stride_yh
    x1 = tl.load(x_row + half_cols[None, :], mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_row + HALF + half_cols[None, :], mask=mask, other=0.0).to(tl.float32)
    # One rounding, by the stores. To round each product as stock does would not give stock's bits either: the compiler
    # narrows the whole expression to bfloat16 and contracts a product and the sum there.
    if BACKWARD:
        y1 = x1 * c1 + x2 * s2
        y2 = x2 * c2 - x1 * s1
    else:
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
    tl.store(y_row + half_cols[None, :], y1, mask=mask)
    tl.store(y_row + HALF + half_cols[None, :], y2, mask=mask)
    if 2 * HALF < D:
        cols = 2 * HALF + tl.arange(0, PASS)
        rest = tl.max(mask.to(tl.int32), axis=1)[:, None] > 0
        rest = rest & (cols < D)[None, :]
        tl.store(y_row + cols[None, :], tl.load(x_row + cols[None, :], mask=rest, other=0.0), mask=rest)


@jit(do_not_specialize=["seq_len"])
def _rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    oq_ptr,
    ok_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_oqb,
    stride_oqh,
    stride_oqs,
    stride_okb,
    stride_okh,
    stride_oks,
    stride_cb,
    stride_cs,
    seq_len,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PASS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    # Token in the first grid dimension; in the second the blocks of q's heads, then those of k's.
    token = tl.program_id(0)
    b = (token // seq_len).to(tl.int64)
    s = (token % seq_len).to(tl.int64)
    half_cols = tl.arange(0, BLOCK_HALF)
    in_half = half_cols < HALF
    cs = b * stride_cb + s * stride_cs + half_cols
    c1 = tl.load(cos_ptr + cs, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin_ptr + cs, mask=in_half, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos_ptr + cs + HALF, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin_ptr + cs + HALF, mask=in_half, other=0.0).to(tl.float32)[None, :]
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    offs_h = tl.arange(0, BLOCK_HEADS)
    if block < q_blocks:
        heads = block * BLOCK_HEADS + offs_h
        mask = (heads < Q_HEADS)[:, None] & in_half[None, :]
        x_ptr = q_ptr + b * stride_qb + s * stride_qs
        y_ptr = oq_ptr + b * stride_oqb + s * stride_oqs
        heads = heads.to(tl.int64)
        _rope_tile(x_ptr, y_ptr, c1, s1, c2, s2, stride_qh, stride_oqh, heads, mask, half_cols, HALF, D, PASS, BACKWARD)
    else:
        heads = (block - q_blocks) * BLOCK_HEADS + offs_h
        mask = (heads < K_HEADS)[:, None] & in_half[None, :]
        x_ptr = k_ptr + b * stride_kb + s * stride_ks
        y_ptr = ok_ptr + b * stride_okb + s * stride_oks
        heads = heads.to(tl.int64)
        _rope_tile(x_ptr, y_ptr, c1, s1, c2, s2, stride_kh, stride_okh, heads, mask, half_cols, HALF, D, PASS, BACKWARD)


def _blocks(q_heads: int, k_heads: int, head_dim: int, half: int) -> tuple[dict[str, int], int]:
    # Constexprs and num_warps: up to 16 heads a program, 8 channels of each half a thread (16 bytes in bf16).
    block_half = 1 << (half - 1).bit_length()
    block_heads = min(16, 1 << (max(q_heads, k_heads) - 1).bit_length())
    consts = {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "HALF": half,
        "D": head_dim,
        "BLOCK_HEADS": block_heads,
        "BLOCK_HALF": block_half,
        "PASS": 1 << max(head_dim - 2 * half - 1, 0).bit_length(),
    }
    return consts, min(8, max(1, block_heads * block_half // 256))


def _run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, out: tuple[Tensor, Tensor], backward: bool) -> None:
    batch, q_heads, seq_len, head_dim = q.shape
    if not batch * seq_len:
        return
    q = q if q.stride(3) == 1 else q.contiguous()
    k = k if k.stride(3) == 1 else k.contiguous()
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    out_q, out_k = out
    consts, num_warps = _blocks(q_heads, k.shape[1], head_dim, cos.shape[2] // 2)
    consts["BACKWARD"] = backward
    block_heads = consts["BLOCK_HEADS"]
    launch(
        _rope_kernel,
        (batch * seq_len, -(-q_heads // block_heads) - (-k.shape[1] // block_heads)),
        (
            q,
            k,
            cos,
            sin,
            out_q,
            out_k,
            *q.stride()[:3],
            *k.stride()[:3],
            *out_q.stride()[:3],
            *out_k.stride()[:3],
            cos.stride(0) if cos.shape[0] > 1 else 0,
            cos.stride(1),
            seq_len,
        ),
        consts,
        num_warps=num_warps,
    )


def _empty_rotated(x: Tensor, dtype: torch.dtype) -> Tensor:
    # In the order of x's strides, as stock's element-wise result has it; the kernel wants the last one to be 1.
    y = torch.empty_like(x, dtype=dtype)
    return y if y.stride(3) == 1 else torch.empty(x.shape, dtype=dtype, device=x.device)


def rope_fwd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """q and k rotated, into ``out`` (last stride 1; may be (q, k) themselves: in place) or into new tensors."""
    if not use_triton(q):
        turned = rope_ref(q, k, cos, sin)
        return turned if out is None else (out[0].copy_(turned[0]), out[1].copy_(turned[1]))
    if out is None:
        out = (
            _empty_rotated(q, q.dtype if q.dtype == cos.dtype else torch.promote_types(q.dtype, cos.dtype)),
            _empty_rotated(k, k.dtype if k.dtype == cos.dtype else torch.promote_types(k.dtype, cos.dtype)),
        )
    _run(q, k, cos, sin, out, False)
    return out


def rope_bwd(
    dq: Tensor,
    dk: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients for q and k, into ``out`` (last stride 1; may be (dq, dk) themselves: in place) or into new tensors."""
    if not use_triton(dq):
        turned = rope_bwd_ref(dq, dk, cos, sin, q_dtype, k_dtype)
        return turned if out is None else (out[0].copy_(turned[0]), out[1].copy_(turned[1]))
    if out is None:
        out = _empty_rotated(dq, q_dtype), _empty_rotated(dk, k_dtype)
    _run(dq, dk, cos, sin, out, True)
    return out


class RoPE(torch.autograd.Function):
    """Saves cos and sin only: the rotation is linear in q and k."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, tally: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.dtypes = q.dtype, k.dtype
        ctx.tally = tally
        return rope_fwd(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        dq, dk = rope_bwd(dq, dk, cos, sin, *ctx.dtypes)
        if ctx.tally is not None:
            ctx.tally.hit_backward()
        return dq, dk, None, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, tally: Any = None) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of q and k, as transformers' ``apply_rotary_pos_emb`` computes it.

    ``y = x cos + rotate_half(x) sin`` on the first R channels, ``rotate_half(x) = (-x2, x1)``; the others pass through.

    Args:
        q: [B, heads, S, D]; k: [B, kv_heads, S, D]; float32, bfloat16, float16 (float64 by the reference), any strides.
        cos, sin: [1 or B, S, R], R even, R <= D, any floating dtype; scaled rope and position ids come in through them.
            They get no gradient. Their two halves may differ.
        tally: counts the backward pass (`status.Tally`), or None.

    Returns:
        q and k rotated, in the order of their strides, in the dtype each promotes to with cos. Differentiable once.

    Raises:
        ValueError: shapes that do not go together.

    The kernel computes in float32 and rounds once, where stock rounds both products and the sum; the reference path
    has stock's roundings. Nothing is written in place. RoPE: Su et al., 2021; rotating q and k in one launch:
    Liger-Kernel.
    """
    rotary = cos.shape[-1]
    if (
        rotary % 2
        or rotary > q.shape[-1]
        or cos.shape != sin.shape
        or cos.shape[0] not in (1, q.shape[0])
        or cos.shape[1] != q.shape[2]
        or k.shape[0] != q.shape[0]
        or k.shape[2:] != q.shape[2:]
    ):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, cos, sin))
        raise ValueError(f"rope takes q, k [B, heads, S, D] and cos, sin [1 or B, S, R <= D, even]; got {shapes}")
    return RoPE.apply(q, k, cos, sin, tally)
