"""SwiGLU and the down projection's ``x A^T`` in one pass.

``h = silu(gate) * up`` is both what the down projection multiplies and what its lora_A does: ``u = h A^T``. Here h is
written and not read again for u. A program owns a range of rows and walks along them with its part of u in registers.
"""

from __future__ import annotations

from torch import Tensor

from ..device.dispatch import use_triton
from ..device.launch import INTERPRETED, Config, Limits, device_limits, jit, launch, tl
from .down_outer import DTYPES

# By slots: rows and columns of a block. Measured with 16 slots: 178 us for 8192 x 14336, of which 166 is the memory's.
BLOCKS = {
    16: (Config((32, 256), num_warps=8, num_stages=1, min_capability=90),),
    32: (Config((32, 256), num_warps=8, num_stages=1, min_capability=90),),
}
_INTERPRETED = Config((16, 64))


@jit
def _tiles(gu_row, a_ptr, n, at_gu, at_a, cols, row_mask, N: tl.constexpr):
    # gate, up and A of the columns from n on.
    col_mask = n + cols < N
    mask = row_mask[:, None] & col_mask[None, :]
    gate = tl.load(gu_row + n + at_gu, mask=mask, other=0.0)
    up = tl.load(gu_row + N + n + at_gu, mask=mask, other=0.0)
    a = tl.load(a_ptr + n + at_a, mask=col_mask[None, :], other=0.0)
    return gate, up, a


@jit(do_not_specialize=["T"])
def swiglu_down_kernel(
    gu_ptr, a_ptr, h_ptr, u_ptr, T,
    N: tl.constexpr, SLOTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    lanes, cols, slots = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N), tl.arange(0, SLOTS)
    row_mask = first + lanes < T
    at_gu = lanes[:, None] * (2 * N) + cols[None, :]
    at_h = lanes[:, None] * N + cols[None, :]
    at_a = slots[:, None] * N + cols[None, :]
    gu_row, h_row = gu_ptr + first * (2 * N), h_ptr + first * N
    u = tl.zeros([BLOCK_T, SLOTS], tl.float32)
    gate, up, a = _tiles(gu_row, a_ptr, 0, at_gu, at_a, cols, row_mask, N)
    for n in tl.range(0, N, BLOCK_N):
        # Asked for before these are used.
        next_gate, next_up, next_a = _tiles(gu_row, a_ptr, n + BLOCK_N, at_gu, at_a, cols, row_mask, N)
        x = gate.to(tl.float32)
        h = (x * tl.sigmoid(x) * up.to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_row + n + at_h, h, mask=row_mask[:, None] & (n + cols < N)[None, :])
        u = tl.dot(h, tl.trans(a), u, input_precision="ieee")
        gate, up, a = next_gate, next_up, next_a
    u_at = u_ptr + first * SLOTS + lanes[:, None] * SLOTS + slots[None, :]
    tl.store(u_at, u.to(u_ptr.dtype.element_ty), mask=row_mask[:, None])


def _config(slots: int, limits: Limits) -> Config | None:
    if INTERPRETED and slots in BLOCKS:
        return _INTERPRETED
    return next((c for c in BLOCKS.get(slots, ()) if c.min_capability <= limits.capability), None)


def covers(gu: Tensor, slots: int) -> bool:
    """Whether there is a kernel for this: else SwiGLU and the product with h are to be called."""
    if not use_triton(gu) or gu.dtype not in DTYPES or not gu.numel():
        return False
    return _config(slots, device_limits(gu.get_device())) is not None


def swiglu_down(gu: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """``h = silu(gate) up`` and ``u = h A^T``.

    Args:
        gu: [T, 2 N] contiguous, gate and up, bfloat16 or float16.
        packed: [slots, N] contiguous, of gu's dtype: A scaled, zero beyond the rank (`low_rank.pack`); `covers` has
            been asked.

    Returns:
        h [T, N] and u [T, slots] in gu's dtype. u is of the rounded h, its sums are fp32.
    """
    tokens, (slots, width) = gu.shape[0], packed.shape
    config = _config(slots, device_limits(gu.get_device()))
    (block_t, block_n), num_warps, num_stages, _, _ = config  # type: ignore[misc]
    h, u = gu.new_empty((tokens, width)), gu.new_empty((tokens, slots))
    args, consts = (gu, packed, h, u, tokens), (width, slots, block_t, block_n)
    launch(swiglu_down_kernel, (-(-tokens // block_t),), args, consts, num_warps=num_warps, num_stages=num_stages)
    return h, u
