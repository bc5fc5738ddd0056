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
def _tiles(x_row, a_ptr, n, at_x, at_a, cols, row_mask, N: tl.constexpr, GATED: tl.constexpr):
    # gate and up (or h, twice) and A of the columns from n on.
    col_mask = n + cols < N
    mask = row_mask[:, None] & col_mask[None, :]
    x = tl.load(x_row + n + at_x, mask=mask, other=0.0)
    up = x
    if GATED:
        up = tl.load(x_row + N + n + at_x, mask=mask, other=0.0)
    a = tl.load(a_ptr + n + at_a, mask=col_mask[None, :], other=0.0)
    return x, up, a


@jit(do_not_specialize=["T"])
def swiglu_down_kernel(
    x_ptr, a_ptr, h_ptr, u_ptr, T,
    N: tl.constexpr, GATED: tl.constexpr, SLOTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # From gate and up side by side, of which h is made and written, or from h itself.
    STRIDE: tl.constexpr = 2 * N if GATED else N
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    lanes, cols, slots = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N), tl.arange(0, SLOTS)
    row_mask = first + lanes < T
    at_x = lanes[:, None] * STRIDE + cols[None, :]
    at_h = lanes[:, None] * N + cols[None, :]
    at_a = slots[:, None] * N + cols[None, :]
    x_row, h_row = x_ptr + first * STRIDE, h_ptr + first * N
    u = tl.zeros([BLOCK_T, SLOTS], tl.float32)
    x, up, a = _tiles(x_row, a_ptr, 0, at_x, at_a, cols, row_mask, N, GATED)
    for n in tl.range(0, N, BLOCK_N):
        # Asked for before these are used.
        next_x, next_up, next_a = _tiles(x_row, a_ptr, n + BLOCK_N, at_x, at_a, cols, row_mask, N, GATED)
        h = x
        if GATED:
            gate = x.to(tl.float32)
            h = (gate * tl.sigmoid(gate) * up.to(tl.float32)).to(h_ptr.dtype.element_ty)
            tl.store(h_row + n + at_h, h, mask=row_mask[:, None] & (n + cols < N)[None, :])
        u = tl.dot(h, tl.trans(a), u, input_precision="ieee")
        x, up, a = next_x, next_up, next_a
    u_at = u_ptr + first * SLOTS + lanes[:, None] * SLOTS + slots[None, :]
    tl.store(u_at, u.to(u_ptr.dtype.element_ty), mask=row_mask[:, None])


def _config(slots: int, limits: Limits) -> Config | None:
    if INTERPRETED and slots in BLOCKS:
        return _INTERPRETED
    return next((c for c in BLOCKS.get(slots, ()) if c.min_capability <= limits.capability), None)


def covers(x: Tensor, slots: int) -> bool:
    """Whether there is a kernel for this (x is gate and up, or h): else SwiGLU and the product are to be called."""
    if not use_triton(x) or x.dtype not in DTYPES or not x.numel():
        return False
    return _config(slots, device_limits(x.get_device())) is not None


def swiglu_down(gu: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """``h = silu(gate) up`` and ``u = h A^T``.

    Args:
        gu: [T, 2 N] contiguous, gate and up, bfloat16 or float16.
        packed: [slots, N] contiguous, of gu's dtype: A scaled, zero beyond the rank (`low_rank.pack`); `covers` has
            been asked.

    Returns:
        h [T, N] and u [T, slots] in gu's dtype. u is of the rounded h, its sums are fp32.
    """
    h = gu.new_empty((gu.shape[0], packed.shape[1]))
    return h, _run(gu, packed, h)


def hidden_down(h: Tensor, packed: Tensor) -> Tensor:
    """The u of `swiglu_down`, to the bit, of an h [T, N] contiguous that is there already.

    So a layer whose gate and up are kept trains as one that is recomputed, where h comes from a product's epilogue.
    """
    return _run(h, packed, None)


def _run(x: Tensor, packed: Tensor, h: Tensor | None) -> Tensor:
    tokens, (slots, width) = x.shape[0], packed.shape
    config = _config(slots, device_limits(x.get_device()))
    (block_t, block_n), num_warps, num_stages, _, _ = config  # type: ignore[misc]
    u = x.new_empty((tokens, slots))
    args, consts = (x, packed, x if h is None else h, u, tokens), (width, h is not None, slots, block_t, block_n)
    launch(swiglu_down_kernel, (-(-tokens // block_t),), args, consts, num_warps=num_warps, num_stages=num_stages)
    return u
