"""RMSNorm with the semantics of Hugging Face: float32 inside, cast to the input's dtype, then times the weight; and the
addition to the residual stream before it, in the same pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device.dispatch import use_triton
from ..device.launch import as_rows, device_limits, jit, launch, tl
from ..reference.rms_norm import rms_norm_bwd_ref, rms_norm_fwd_ref
from ._autograd import once_differentiable
from ._operands import Normed

# A row lives in the registers of one program; beyond this they would only spill, and the reference runs instead.
_MAX_H = 32768
_REDUCE_ROWS, _REDUCE_COLS = 64, 32


@jit(do_not_specialize=["n_rows"])
def _rms_norm_fwd_kernel(
    x_ptr,
    delta_ptr,  # added to x first, or None
    sum_ptr,  # where the sum goes
    w_ptr,
    y_ptr,
    rstd_ptr,
    stride_xt,
    stride_dt,
    n_rows,
    eps,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_H)
    mask = (rows < n_rows)[:, None] & (cols < H)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xt + cols[None, :], mask=mask, other=0.0)
    if ADD:
        delta = tl.load(delta_ptr + rows[:, None] * stride_dt + cols[None, :], mask=mask, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows[:, None] * H + cols[None, :], x, mask=mask)
    xf = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(xf * xf, axis=1) / H + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    w = tl.load(w_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
    normed = (xf * rstd[:, None]).to(x.dtype).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * H + cols[None, :], normed * w[None, :], mask=mask)


@jit(do_not_specialize=["n_rows", "n_tiles"])
def _rms_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    rstd_ptr,
    dsum_ptr,  # gradient that reached x past the norm, or None
    dx_ptr,
    partial_ptr,  # [programs, H] float32, or None
    stride_dyt,
    stride_xt,
    stride_dst,
    n_rows,
    n_tiles,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    NEED_DW: tl.constexpr,
    ADD: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    w = tl.load(w_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK_H), dtype=tl.float32)
    for tile in range(0, n_tiles):
        rows = (pid * n_tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (rows < n_rows)[:, None] & (cols < H)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xt + cols[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + rows[:, None] * stride_dyt + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        xhat = x.to(tl.float32) * rstd
        g = dy * w[None, :]
        mean = tl.sum(g * xhat, axis=1) / H
        dx = rstd * (g - xhat * mean[:, None])
        if ADD:
            dx += tl.load(dsum_ptr + rows[:, None] * stride_dst + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows[:, None] * H + cols[None, :], dx, mask=mask)
        if NEED_DW:
            dw += dy * xhat.to(x.dtype).to(tl.float32)
    if NEED_DW:
        tl.store(partial_ptr + pid * H + cols, tl.sum(dw, axis=0), mask=cols < H)


@jit(do_not_specialize=["n_partials"])
def _rms_norm_dw_kernel(
    partial_ptr, dw_ptr, n_partials, H: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in range(0, n_partials, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < n_partials)[:, None] & (cols < H)[None, :]
        total += tl.load(partial_ptr + rows[:, None] * H + cols[None, :], mask=mask, other=0.0)
    tl.store(dw_ptr + cols, tl.sum(total, axis=0), mask=cols < H)


def _tile(h: int) -> tuple[int, int, int]:
    # (BLOCK_H, ROWS, num_warps): about 2,048 elements a program, 16 a thread (two 16-byte loads in bf16) up to 16
    # warps.
    block = 1 << (h - 1).bit_length()
    rows = max(1, 2048 // block)
    return block, rows, min(16, max(1, block * rows // 512))


def _dw_programs(n_rows: int, rows: int, num_warps: int, sm_count: int) -> tuple[int, int]:
    # (programs, tiles each). Enough programs to fill the device twice over, few enough that the partial sums stay a
    # small part of the traffic: at least four tiles each.
    tiles = -(-n_rows // rows)
    programs = min(-(-tiles // 4), sm_count * max(1, 32 // num_warps))
    each = -(-tiles // programs)
    return -(-tiles // each), each


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, rstd, summed)``: summed is ``x + delta``, or x without a delta; rstd holds one number a row, float32, in
    whatever shape the path that ran wants back.
    """
    h = x.shape[-1]
    if not use_triton(x) or h > _MAX_H:
        summed = x if delta is None else x + delta
        y, rstd = rms_norm_fwd_ref(summed, weight, eps)
        return y.contiguous(), rstd, summed
    kind = x.dtype if delta is None or delta.dtype == x.dtype else torch.promote_types(x.dtype, delta.dtype)
    dtype = kind if weight.dtype == kind else torch.promote_types(kind, weight.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    n_rows = x.numel() // h
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    summed = x if delta is None else torch.empty(x.shape, dtype=kind, device=x.device)
    if n_rows:
        block, rows, num_warps = _tile(h)
        x = as_rows(x)
        stride = 0
        if delta is not None:
            delta = as_rows(delta)
            stride = delta.stride(0)
        launch(
            _rms_norm_fwd_kernel,
            (-(-n_rows // rows),),
            (x, delta, summed, weight.contiguous(), y, rstd, x.stride(0), stride, n_rows, eps),
            {"H": h, "BLOCK_H": block, "ROWS": rows, "ADD": delta is not None},
            num_warps=num_warps,
        )
    return y, rstd, summed


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None = None, *, need_dw: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``(dx, dweight or None)`` from what `rms_norm_fwd` returned (x is its sum); dx with ``dsum`` added, if given;
    dweight by two-stage float32 sums, no atomics.
    """
    h = x.shape[-1]
    if not use_triton(x) or h > _MAX_H:
        dx, dw = rms_norm_bwd_ref(dy, x, weight, rstd, dsum)
        return dx, dw if need_dw else None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n_rows = x.numel() // h
    if not n_rows:
        return dx, torch.zeros_like(weight) if need_dw else None
    block, rows, num_warps = _tile(h)
    x, dy = as_rows(x), as_rows(dy)
    stride = 0
    if dsum is not None:
        dsum = as_rows(dsum)
        stride = dsum.stride(0)
    programs, each, partial = -(-n_rows // rows), 1, None
    if need_dw:
        programs, each = _dw_programs(n_rows, rows, num_warps, device_limits(x.get_device()).sm_count)
        partial = torch.empty((programs, h), dtype=torch.float32, device=x.device)
    launch(
        _rms_norm_bwd_kernel,
        (programs,),
        (
            dy, x, weight.contiguous(), rstd, dsum, dx, partial, dy.stride(0), x.stride(0), stride, n_rows, each,
        ),
        {"H": h, "BLOCK_H": block, "ROWS": rows, "NEED_DW": need_dw, "ADD": dsum is not None},
        num_warps=num_warps,
    )  # fmt: skip
    if partial is None:
        return dx, None
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    launch(
        _rms_norm_dw_kernel,
        (-(-h // _REDUCE_COLS),),
        (partial, dw, programs),
        {"H": h, "BLOCK_ROWS": _REDUCE_ROWS, "BLOCK_COLS": _REDUCE_COLS},
    )
    return dx, dw


class RMSNorm(torch.autograd.Function):
    """Saves x, weight and one float32 a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, tally: Any) -> Tensor:
        y, rstd, _ = rms_norm_fwd(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.tally = tally
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[:2]
        dx, dw = rms_norm_bwd(dy, x, weight, rstd, need_dw=need_dw)
        if ctx.tally is not None:
            ctx.tally.hit_backward()
        return dx if need_dx else None, dw, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, tally: Any = None) -> Tensor:
    """Root-mean-square norm as LlamaRMSNorm computes it.

    ``y = weight * (x * (mean(x^2) + eps)^-1/2).to(x.dtype)``

    Args:
        x: [..., H], float32, bfloat16 or float16 (float64 by the reference), any layout; a copy is made only if the
            last dimension has a stride. Autocast changes nothing, as in stock.
        weight: [H], any floating dtype.
        eps: added to the mean of squares.
        tally: counts the backward pass (`status.Tally`), or None.

    Returns:
        y [..., H], contiguous, in the dtype that x and weight promote to. Differentiable once, in x and weight.

    Accumulates in float32. Nothing is written in place. Bitwise reproducible on the same device. The formula of the
    backward is that of the RMSNorm paper (Zhang and Sennrich, 2019).
    """
    return RMSNorm.apply(x, weight, eps, tally)


class ResidualRMSNorm(torch.autograd.Function):
    """Autograd node of ``residual_rms_norm``; saves the sum, weight and one float32 a row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, tally: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, rstd, summed = rms_norm_fwd(x, weight, eps, delta)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rstd)
        ctx.save_for_backward(summed, weight, rstd)
        ctx.tally, ctx.dtypes = tally, (x.dtype, None if delta is None else delta.dtype)
        return y, summed, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        summed, weight, rstd = ctx.saved_tensors
        need_x, need_delta, need_dw = ctx.needs_input_grad[:3]
        dtype, delta_dtype = ctx.dtypes
        if ctx.tally is not None:
            ctx.tally.hit_backward()
        if dy is None:
            total, dw = dsum, None
        else:
            total, dw = rms_norm_bwd(dy, summed, weight, rstd, dsum, need_dw=need_dw)
        if total is None:
            return None, None, dw, None, None
        return (
            total.to(dtype) if need_x else None,
            total.to(delta_dtype) if need_delta else None,
            dw,
            None,
            None,
        )


def residual_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, tally: Any = None
) -> tuple[Tensor, Tensor]:
    """The residual stream after an addition, and its norm: ``summed = x + delta``, ``y = rms_norm(summed)``.

    One pass forward; in backward one more, which takes the gradients of both results:
    ``dx = ddelta = dsummed + rms_norm_backward(dy)``, rounded once where stock rounds twice.

    Args:
        x: [..., H], the residual stream; dtypes and layout as for ``rms_norm``.
        delta: [..., H], what a block adds to it; or None, where only the two gradients are to be joined.
        weight: [H], any floating dtype.
        eps: added to the mean of squares.
        tally: counts the backward pass (`status.Tally`), or None.

    Returns:
        y [..., H], contiguous and marked as `Normed`, and summed [..., H] in the dtype that x and delta promote to (x
        itself without a delta). Differentiable once.

    Raises:
        ValueError: if delta has another shape than x.
    """
    if delta is not None and delta.shape != x.shape:
        raise ValueError(f"delta is {tuple(delta.shape)}, expected the shape of x, {tuple(x.shape)}")
    y, summed, rstd = ResidualRMSNorm.apply(x, delta, weight, eps, tally)
    Normed.mark(y, summed, rstd, weight)
    return y, summed
