"""SwiGLU, ``silu(gate) * up``: one pass forward, one pass backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device.dispatch import use_triton
from ..device.launch import as_rows, jit, launch, tl
from ..reference.swiglu import swiglu_bwd_ref, swiglu_ref
from ._autograd import once_differentiable

_MAX_BLOCK = 1024


@jit
def _swiglu_fwd_kernel(
    gate_ptr, up_ptr, out_ptr, stride_gt, stride_ut, stride_ot, N: tl.constexpr, BLOCK: tl.constexpr
):
    # A one-dimensional grid: rows x column blocks, because the other grid dimensions end at 65,535.
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    gate = tl.load(gate_ptr + row * stride_gt + cols, mask=mask, other=0.0)
    up = tl.load(up_ptr + row * stride_ut + cols, mask=mask, other=0.0).to(tl.float32)
    g = gate.to(tl.float32)
    # Stock rounds silu(gate) before the product.
    act = (g * tl.sigmoid(g)).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * stride_ot + cols, act * up, mask=mask)


@jit
def _swiglu_bwd_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    product_ptr,
    stride_dyt,
    stride_gt,
    stride_ut,
    stride_dgt,
    stride_dut,
    stride_pt,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    dy = tl.load(dy_ptr + row * stride_dyt + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gt + cols, mask=mask, other=0.0)
    up = tl.load(up_ptr + row * stride_ut + cols, mask=mask, other=0.0).to(tl.float32)
    g = gate.to(tl.float32)
    s = tl.sigmoid(g)
    act = (g * s).to(gate.dtype).to(tl.float32)
    tl.store(dgate_ptr + row * stride_dgt + cols, dy * up * (s * (1 + g * (1 - s))), mask=mask)
    tl.store(dup_ptr + row * stride_dut + cols, dy * act, mask=mask)
    if PRODUCT:
        tl.store(product_ptr + row * stride_pt + cols, act * up, mask=mask)


def _settings(n: int) -> tuple[int, int]:
    # (BLOCK, num_warps): 8 elements a thread and operand, 16 bytes in bf16. 1,024 divides every MLP width of Llama 3.
    block = min(_MAX_BLOCK, 1 << (n - 1).bit_length())
    return block, max(1, block // 256)


def swiglu_fwd(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` into ``out`` [..., N] (rows of unit stride; may be gate or up) or into a new tensor."""
    if not use_triton(gate):
        y = swiglu_ref(gate, up).contiguous()
        return y if out is None else out.copy_(y)
    if out is None:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        n = gate.shape[-1]
        gate, up, rows = as_rows(gate), as_rows(up), out.view(-1, n)
        block, num_warps = _settings(n)
        launch(
            _swiglu_fwd_kernel,
            (gate.shape[0] * -(-n // block),),
            (gate, up, rows, gate.stride(0), up.stride(0), rows.stride(0)),
            {"N": n, "BLOCK": block},
            num_warps=num_warps,
        )
    return out


def swiglu_bwd(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    product: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(dgate, dup)`` from the gradient of the product and the saved inputs.

    Args:
        dy, gate, up: [..., N] of one dtype.
        out: where to write dgate and dup (rows of unit stride); may be (gate, up) themselves. None: new
            tensors.
        product: receives ``silu(gate) * up`` in the same pass, for a caller that did not keep it; may be dy.
    """
    if not use_triton(gate):
        grads = swiglu_bwd_ref(dy, gate, up)
        if product is not None:
            product.copy_(swiglu_ref(gate, up))
        return grads if out is None else (out[0].copy_(grads[0]), out[1].copy_(grads[1]))
    if out is None:
        out = (
            torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
            torch.empty(gate.shape, dtype=up.dtype, device=gate.device),
        )
    if gate.numel():
        n = gate.shape[-1]
        dy, gate, up = as_rows(dy), as_rows(gate), as_rows(up)
        dgate, dup = out[0].view(-1, n), out[1].view(-1, n)
        kept = None if product is None else product.view(-1, n)
        block, num_warps = _settings(n)
        launch(
            _swiglu_bwd_kernel,
            (gate.shape[0] * -(-n // block),),
            (
                dy,
                gate,
                up,
                dgate,
                dup,
                kept,
                dy.stride(0),
                gate.stride(0),
                up.stride(0),
                dgate.stride(0),
                dup.stride(0),
                0 if kept is None else kept.stride(0),
            ),
            {"N": n, "BLOCK": block, "PRODUCT": kept is not None},
            num_warps=num_warps,
        )
    return out


class SwiGLU(torch.autograd.Function):
    """Saves gate and up; silu(gate) is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, tally: Any) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.tally = tally
        return swiglu_fwd(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dgate, dup = swiglu_bwd(dy, gate, up)
        if ctx.tally is not None:
            ctx.tally.hit_backward()
        return dgate, dup, None


def swiglu(gate: Tensor, up: Tensor, *, tally: Any = None) -> Tensor:
    """``silu(gate) * up``, as LlamaMLP computes it between its projections.

    Args:
        gate, up: [..., N], one shape and dtype (float32, bfloat16, float16; float64 by the reference), any layout; a
            copy is made only if the last dimension has a stride.
        tally: counts the backward pass (`status.Tally`), or None.

    Returns:
        [..., N], contiguous, of the same dtype. Differentiable once.

    Raises:
        ValueError: gate and up differ in shape or dtype.

    Computed in float32; silu(gate) is rounded to the dtype before the product, as in stock. Nothing is written in
    place. SwiGLU: Shazeer, 2020.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            "swiglu takes gate and up of one shape and dtype; got "
            f"{tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
        )
    return SwiGLU.apply(gate, up, tally)
