"""The q, k, v projections of an attention layer with their LoRA updates and rotary embedding, as one differentiable
operation.

The projections go side by side into one [T, (Hq + 2 Hk) D] buffer, by one persistent GEMM with their low-rank updates,
or by three library GEMMs without; one kernel then rotates q and k in place and adds what updates are missing (a tile of
``u B^T`` in registers), so that LoRA costs no pass of its own. The backward's
first kernel rotates dq and dk back and lays dq, dk, dv side by side, whatever strides attention's backward gave them;
the rest is ``siblings_backward``.

The rotation is Su et al., "RoFormer" (2021), in the half-split layout of Hugging Face: ``y0 = x0 cos0 - x1 sin0``,
``y1 = x1 cos1 + x0 sin1``, in fp32 with one rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from ..device.dispatch import use_triton
from ..device.launch import jit, launch, tl
from ._autograd import once_differentiable
from ._operands import (
    TENSORS,
    Operands,
    Parameters,
    Projection,
    adapted,
    check_width,
    factors,
    flatten,
    one_dtype,
    operands,
    rows,
    without_autocast,
)
from ._siblings import Input, Low, Memo, base_values, draw_masks, keep_input, project_down, seed_for, siblings_forward
from ._siblings_backward import siblings_backward
from .low_rank import layout_of, precision, rank_slots, widened
from .rope import rope

# Ranks whose slots exceed this are added by `expand` before the GEMM: their tile of B would not stay in registers.
_MAX_FUSED_SLOTS = 64
_HEADS_PER_PROGRAM = 4


@jit
def _rotation(cos_ptr, sin_ptr, rows, row_mask, half, half_mask, S, cos_sb, cos_ss, HALF: tl.constexpr):
    at = (rows // S) * cos_sb + (rows % S) * cos_ss
    mask = row_mask[:, None] & half_mask[None, :]
    first = at[:, None] + half[None, :]
    cos0 = tl.load(cos_ptr + first, mask=mask, other=0.0).to(tl.float32)
    cos1 = tl.load(cos_ptr + first + HALF, mask=mask, other=0.0).to(tl.float32)
    sin0 = tl.load(sin_ptr + first, mask=mask, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + first + HALF, mask=mask, other=0.0).to(tl.float32)
    return cos0, cos1, sin0, sin1


@jit(do_not_specialize=["T", "S"])
def _qkv_fwd_kernel(
    y_ptr, u_ptr, b0_ptr, b1_ptr, b2_ptr, cos_ptr, sin_ptr, T, S, cos_sb, cos_ss,
    HQ: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, ROTATE: tl.constexpr,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr,
    HEADS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF
    STRIDE: tl.constexpr = (HQ + 2 * HK) * D
    LAST: tl.constexpr = HQ + 2 * HK if WIDTH else HQ + HK  # without updates there is nothing to do for v
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < T
    half = tl.arange(0, HALF_BLOCK)
    half_mask = half < HALF
    ranks = tl.arange(0, SLOTS)
    mask = row_mask[:, None] & half_mask[None, :]
    if ROTATE:
        cos0, cos1, sin0, sin1 = _rotation(cos_ptr, sin_ptr, rows, row_mask, half, half_mask, S, cos_sb, cos_ss, HALF)
    for i in range(0, HEADS):
        head = tl.program_id(1) * HEADS + i
        if head < LAST:
            at = y_ptr + rows[:, None] * STRIDE + head * D + half[None, :]
            x0 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            x1 = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
            if WIDTH:
                b_ptr, rank, first, row = b0_ptr, R0, U0, head * D
                if head >= HQ:
                    b_ptr, rank, first, row = b1_ptr, R1, U1, (head - HQ) * D
                if head >= HQ + HK:
                    b_ptr, rank, first, row = b2_ptr, R2, U2, (head - HQ - HK) * D
                rank_mask = ranks < rank
                u = tl.load(
                    u_ptr + rows[:, None] * WIDTH + (first + ranks)[None, :],
                    mask=row_mask[:, None] & rank_mask[None, :],
                    other=0.0,
                )
                b_at = b_ptr + (row + half)[None, :] * rank + ranks[:, None]
                b_mask = rank_mask[:, None] & half_mask[None, :]
                b_low = tl.load(b_at, mask=b_mask, other=0.0).to(u.dtype)
                b_high = tl.load(b_at + HALF * rank, mask=b_mask, other=0.0).to(u.dtype)
                x0 += tl.dot(u, b_low, input_precision=PRECISION)
                x1 += tl.dot(u, b_high, input_precision=PRECISION)
            y0, y1 = x0, x1
            if ROTATE:  # noqa: SIM102  (a run-time condition would have to be computed where the constexpr says no)
                if head < HQ + HK:
                    y0 = x0 * cos0 - x1 * sin0
                    y1 = x1 * cos1 + x0 * sin1
            tl.store(at, y0.to(y_ptr.dtype.element_ty), mask=mask)
            tl.store(at + HALF, y1.to(y_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["T", "S"])
def _qkv_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, out_ptr, cos_ptr, sin_ptr, T, S, cos_sb, cos_ss,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss,
    HQ: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, ROTATE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF
    STRIDE: tl.constexpr = (HQ + 2 * HK) * D
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < T
    half = tl.arange(0, HALF_BLOCK)
    half_mask = half < HALF
    mask = row_mask[:, None] & half_mask[None, :]
    if ROTATE:
        cos0, cos1, sin0, sin1 = _rotation(cos_ptr, sin_ptr, rows, row_mask, half, half_mask, S, cos_sb, cos_ss, HALF)
    for i in range(0, HEADS):
        head = tl.program_id(1) * HEADS + i
        if head < HQ + 2 * HK:
            ptr, local, sb, sh, ss = dq_ptr, head, q_sb, q_sh, q_ss
            if head >= HQ:
                ptr, local, sb, sh, ss = dk_ptr, head - HQ, k_sb, k_sh, k_ss
            if head >= HQ + HK:
                ptr, local, sb, sh, ss = dv_ptr, head - HQ - HK, v_sb, v_sh, v_ss
            row_at = (rows // S) * sb + (rows % S) * ss + local.to(tl.int64) * sh
            at = ptr + row_at[:, None] + half[None, :]
            d0 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            d1 = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
            x0, x1 = d0, d1
            if ROTATE:  # noqa: SIM102  (a run-time condition would have to be computed where the constexpr says no)
                if head < HQ + HK:
                    x0 = d0 * cos0 + d1 * sin1
                    x1 = d1 * cos1 - d0 * sin0
            out_at = out_ptr + rows[:, None] * STRIDE + head * D + half[None, :]
            tl.store(out_at, x0.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(out_at + HALF, x1.to(out_ptr.dtype.element_ty), mask=mask)


def _block_t(tokens: int) -> int:
    return 32 if tokens >= 2048 else 16


def _grid(tokens: int, heads: int) -> tuple[int, int]:
    return -(-tokens // _block_t(tokens)), -(-heads // _HEADS_PER_PROGRAM)


def _rotate_reference(x, cos, sin, backward=False):
    """x [B, H, S, D] rotated (or rotated back), in fp32."""
    half = x.shape[-1] // 2
    cos, sin = widened(cos).unsqueeze(1), widened(sin).unsqueeze(1)
    x0, x1 = widened(x).split(half, -1)
    cos0, cos1, sin0, sin1 = cos[..., :half], cos[..., half:], sin[..., :half], sin[..., half:]
    if backward:
        return torch.cat((x0 * cos0 + x1 * sin1, x1 * cos1 - x0 * sin0), -1)
    return torch.cat((x0 * cos0 - x1 * sin0, x1 * cos1 + x0 * sin1), -1)


def _heads(y: torch.Tensor, batch: int, seq: int, heads: tuple[int, int], head_dim: int) -> tuple[torch.Tensor, ...]:
    """q, k, v [B, heads, S, D] as views of the stacked projections [T, (Hq + 2 Hk) D]."""
    hq, hk = heads
    y = y.view(batch, seq, hq + 2 * hk, head_dim).transpose(1, 2)
    return y[:, :hq], y[:, hq : hq + hk], y[:, hq + hk :]


def _fused_ranks(group: list[Operands]) -> tuple[int, ...]:
    return tuple(op.a.shape[0] for op in adapted(group))  # type: ignore[union-attr]


def _add_and_rotate(y, u, group, ranks, cos, sin, shape, heads, head_dim, rotate):
    """Adds ``u B^T`` to y and rotates its q and k heads, in place."""
    tokens = y.shape[0]
    if not rotate and not ranks:
        return
    b, offsets, rank_of = [], [], []
    starts, at = layout_of(ranks).starts, 0
    for op in group:
        present = bool(ranks) and op.b is not None
        b.append(op.b.contiguous() if present else y)
        rank_of.append(op.b.shape[1] if present else 0)
        offsets.append(starts[at] if present else 0)
        at += present
    filler = next((t for t in b if t is not y), y)
    b = [filler if t is y else t for t in b]
    if len({t.dtype for t in b}) > 1:
        # The kernel picks one of three pointers, so they are of one type; it would round them to u's dtype anyway.
        b = [t.to(u.dtype) for t in b]
    slots = max((rank_slots(r) for r in ranks), default=16)
    half = head_dim // 2
    args = (
        y,
        y if u is None else u,
        *b,
        cos,
        sin,
        tokens,
        shape[1],
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(1),
    )
    consts = (
        *heads, half, max(16, 1 << (half - 1).bit_length()), rotate, slots, u.shape[1] if ranks else 0, *rank_of,
        *offsets, _HEADS_PER_PROGRAM, precision(y.dtype if u is None else u.dtype), _block_t(tokens),
    )  # fmt: skip
    last = heads[0] + (2 * heads[1] if ranks else heads[1])
    launch(_qkv_fwd_kernel, _grid(tokens, last), args, consts, num_warps=4, num_stages=2)


def _unrotate(grads, cos, sin, shape, heads, head_dim, rotate, dtype):
    """dq, dk, dv [B, heads, S, D] of any strides, q and k rotated back, side by side as [T, (Hq + 2 Hk) D]."""
    batch, seq = shape
    dq, dk, dv = grads
    tokens = batch * seq
    out = torch.empty((tokens, (heads[0] + 2 * heads[1]) * head_dim), dtype=dtype, device=dq.device)
    if not use_triton(out):
        parts = _heads(out, batch, seq, heads, head_dim)
        for part, grad, turn in zip(parts, grads, (rotate, rotate, False)):
            part.copy_(_rotate_reference(grad, cos, sin, backward=True) if turn else grad)
        return out
    if tokens == 0:
        return out
    dq, dk, dv = (g if g.stride(-1) == 1 and g.dtype is dq.dtype else g.to(dq.dtype).contiguous() for g in grads)
    half = head_dim // 2
    args = (
        dq, dk, dv, out, cos, sin, tokens, seq, cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
    )  # fmt: skip
    consts = (*heads, half, max(16, 1 << (half - 1).bit_length()), rotate, _HEADS_PER_PROGRAM, _block_t(tokens))
    launch(_qkv_bwd_kernel, _grid(tokens, heads[0] + 2 * heads[1]), args, consts, num_warps=4, num_stages=2)
    return out


class LoraQKV(Function):
    """Autograd node of ``lora_qkv``; saves x (or what the norm before it saves), u, the masks, cos, sin and the
    parameters.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, *rest):
        *tensors, values, dtypes, head_dim, rotate, seed, memo, tally = rest
        group = operands(tuple(tensors), values)
        batch, seq, _ = x.shape
        x2d = rows(x, dtypes.base)
        widths = [op.weight.shape[0] for op in group]
        heads = (widths[0] // head_dim, widths[1] // head_dim)
        masks = draw_masks(x2d, adapted(group), seed)
        low = project_down(x2d, group, masks, dtypes.low, memo)
        y = torch.empty((batch * seq, sum(widths)), dtype=dtypes.base, device=x.device)
        kernel = use_triton(y) and y.numel() > 0
        ranks = _fused_ranks(group)
        fused = kernel and all(rank_slots(r) <= _MAX_FUSED_SLOTS for r in ranks)
        weights = base_values(group, dtypes.base, forward=True)
        fused = not siblings_forward(x2d, group, weights, low, y, dtypes, updates_later=fused)
        del weights  # unpacked ones are large
        if kernel:
            _add_and_rotate(
                y,
                low.u if fused else None,
                group,
                ranks if fused else (),
                cos,
                sin,
                (batch, seq),
                heads,
                head_dim,
                rotate,
            )
        elif rotate:
            for part in _heads(y, batch, seq, heads, head_dim)[:2]:
                part.copy_(_rotate_reference(part, cos, sin))
        kept = keep_input(x, x2d, dtypes, ctx.needs_input_grad[3 : 3 + 3 * TENSORS])
        ctx.save_for_backward(*kept, *low, masks, cos, sin)
        ctx.parameters = Parameters.of(tuple(tensors))
        ctx.values, ctx.dtypes, ctx.tally = values, dtypes, tally
        ctx.layout = (x.shape, x.dtype, heads, head_dim, rotate)
        return _heads(y, batch, seq, heads, head_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        if ctx.tally is not None:
            ctx.tally.hit_backward()
        *kept, u, packed, masks, cos, sin = ctx.saved_tensors
        x_shape, x_dtype, heads, head_dim, rotate = ctx.layout
        group = operands(ctx.parameters.unchanged(), ctx.values)
        with without_autocast(cos):
            dy = _unrotate(grads, cos, sin, x_shape[:2], heads, head_dim, rotate, ctx.dtypes.base)
            dx, parts = siblings_backward(
                dy,
                Input(*kept),
                Low(u, packed),
                group,
                masks,
                ctx.dtypes,
                ctx.needs_input_grad[3 : 3 + 3 * TENSORS],
                need_dx=ctx.needs_input_grad[0],
            )
        if dx is not None:
            dx = dx.view(x_shape).to(x_dtype)
        return dx, None, None, *parts[0], *parts[1], *parts[2], None, None, None, None, None, None, None


def lora_qkv(
    x: torch.Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_dim: int,
    *,
    memo: Memo | None = None,
    tally: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projections of x to q, k, v, each with its own adapter (or none), RoPE applied to q and k.

    Args:
        x: [B, S, K].
        q, k, v: projections; q's output is Hq * head_dim wide, k's and v's Hk * head_dim. Each adapter may have its
            own rank, scaling and dropout; masks are independent.
        cos, sin: [1 or B, S, R], R <= head_dim even; where R < head_dim the first R dimensions of a head rotate.
        head_dim: D.
        memo: carries ``x A^T`` from the forward of a checkpointed region to its recompute.
        tally: object with ``hit_backward()``, called once a backward.

    Returns:
        q [B, Hq, S, D], k and v [B, Hk, S, D], in the compute dtype of ``lora_linear``: views of one [B, S, Hq + 2
        Hk, D] buffer, a layout that attention kernels read as it is.

    Raises:
        ValueError: for widths that do not divide into heads, or operands that do not fit.
    """
    check_width(x.shape[-1], q, k, v)
    for name, projection in (("q", q), ("k", k), ("v", v)):
        if projection.weight.shape[0] % head_dim or head_dim % 2:
            raise ValueError(
                f"{name} is {projection.weight.shape[0]} wide, expected a multiple of an even head size, got {head_dim}"
            )
    if k.weight.shape[0] != v.weight.shape[0]:
        raise ValueError(f"k is {k.weight.shape[0]} wide and v {v.weight.shape[0]}, expected the same number of heads")
    if (
        cos.shape != sin.shape
        or cos.shape[0] not in (1, x.shape[0])
        or cos.shape[1] != x.shape[1]
        or cos.shape[2] > head_dim
    ):
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit x {tuple(x.shape)}: "
            f"expected [1 or {x.shape[0]}, {x.shape[1]}, <= {head_dim}]"
        )
    rotate = cos.shape[-1] == head_dim
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    out = LoraQKV.apply(
        x, cos, sin, *flatten(q), *flatten(k), *flatten(v), (factors(q), factors(k), factors(v)),
        one_dtype(x, q, k, v), head_dim, rotate, seed_for(x, q, k, v), memo, tally,
    )  # fmt: skip
    if rotate:
        return out
    q_rotated, k_rotated = rope(out[0], out[1], cos, sin)
    return q_rotated, k_rotated, out[2]
