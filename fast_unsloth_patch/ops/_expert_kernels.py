"""Kernels of the experts' MLP between its grouped products, and PEFT's factors laid out for those."""

from __future__ import annotations

import torch

from ..device.dispatch import use_triton
from ..device.launch import jit, launch, tl
from .low_rank import rank_slots, widened

_BLOCK = 1024


@jit
def _weighted_swiglu_bwd_kernel(
    dh_ptr, gu_ptr, dgu_ptr, pairs_ptr, weights_ptr, dw_ptr, N: tl.constexpr, BLOCK: tl.constexpr
):
    # A program has a whole row, so that the sum over it needs no second pass. Padding is not read; it becomes zero.
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(pairs_ptr + row)
    used = tl.where(pair < 0, 0, N)
    weight = tl.load(weights_ptr + tl.maximum(pair, 0)).to(tl.float32)
    dh_ptr += row * N
    gu_ptr += row * (2 * N)
    dgu_ptr += row * (2 * N)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside, mask = cols < N, cols < used
        gate = tl.load(gu_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gu_ptr + N + cols, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        sig = tl.sigmoid(gate)
        silu = gate * sig
        h = (silu * up).to(dh_ptr.dtype.element_ty)
        total += h.to(tl.float32) * dh
        dh *= weight
        dgate = dh * up * (sig + silu * (1.0 - sig))
        tl.store(dgu_ptr + cols, dgate.to(dgu_ptr.dtype.element_ty), mask=inside)
        tl.store(dgu_ptr + N + cols, (dh * silu).to(dgu_ptr.dtype.element_ty), mask=inside)
        tl.store(dh_ptr + cols, h, mask=inside)
    tl.store(dw_ptr + row, tl.sum(total, axis=0))


def weighted_swiglu_bwd(
    dh: torch.Tensor, gu: torch.Tensor, dgu: torch.Tensor, pairs: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Backward of ``w h`` with ``h = silu(gate) * up``, from the gradient that comes before the weight.

    ``dw = <h, dh>``, ``dgate = w dh up silu'(gate)``, ``dup = w dh silu(gate)``. So neither the expert's output nor
    another product with its weights is needed for the gradient of a routing weight: ``<z, dy> = <h, W_down^T dy>``.

    Args:
        dh: [R, I], the gradient of the unweighted h; becomes h.
        gu: [R, 2 I], gate and up.
        dgu: [R, 2 I], receives dgate and dup; may be gu.
        pairs: [R] int32: the index in ``weights`` of each row's, -1: none (its gradients are zero).
        weights: [pairs], float.

    Returns:
        dw [R] in float32 (float64 for float64 operands).
    """
    rows, width = dh.shape
    if not use_triton(dh):
        used = (pairs >= 0)[:, None]
        gate, up = (widened(t).masked_fill(~used, 0.0) for t in gu.split(width, 1))
        grad = widened(dh).masked_fill(~used, 0.0)
        weight = widened(weights)[pairs.clamp_min(0).long()][:, None]
        sig = torch.sigmoid(gate)
        silu = gate * sig
        h = (silu * up).to(dh.dtype)
        dw = (widened(h) * grad).sum(1)
        grad = grad * weight
        dgate, dup = grad * up * (sig + silu * (1.0 - sig)), grad * silu
        dgu[:, :width], dgu[:, width:] = dgate, dup  # only now: dgu may be gu
        dh.copy_(h)
        return dw
    dw = torch.empty(rows, dtype=torch.float32, device=dh.device)
    if rows:
        block = min(_BLOCK, 1 << (width - 1).bit_length())
        launch(_weighted_swiglu_bwd_kernel, (rows,), (dh, gu, dgu, pairs, weights, dw), (width, block))
    return dw


def pack_a(a: torch.Tensor, num_experts: int, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """PEFT's A [E * r, K], times its scaling, as [E, slots, K]: zero in the slots beyond the rank."""
    stack = (a.view(num_experts, -1, a.shape[1]) * scaling).to(dtype)
    return _padded(stack, 1)


def pack_b(b: torch.Tensor, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """PEFT's B [N, r * E], whose columns run over the experts first, as [E, N, slots]."""
    stack = b.view(b.shape[0], -1, num_experts).permute(2, 0, 1).to(dtype, memory_format=torch.contiguous_format)
    return _padded(stack.contiguous(), 2)


def _padded(stack: torch.Tensor, axis: int) -> torch.Tensor:
    rank = stack.shape[axis]
    slots = rank_slots(rank)
    if slots == rank:
        return stack
    shape = list(stack.shape)
    shape[axis] = slots
    out = stack.new_zeros(shape)
    out.narrow(axis, 0, rank).copy_(stack)
    return out


def unpack_a(grad: torch.Tensor, a: torch.Tensor, num_experts: int, scaling: float) -> torch.Tensor:
    """The gradient [E, slots, K] of the packed A as that of A."""
    rank = a.shape[0] // num_experts
    return (grad[:, :rank].reshape(a.shape) * scaling).to(a.dtype)


def unpack_b(grad: torch.Tensor, b: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The gradient [E, N, slots] of the packed B as that of B."""
    rank = b.shape[1] // num_experts
    return grad[:, :, :rank].permute(1, 2, 0).reshape(b.shape).to(b.dtype)
