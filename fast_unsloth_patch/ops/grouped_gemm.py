"""Products of rows with the weight of each row's expert, and what LoRA adds to them, without asking who has how many.

=====================  ==================================  ========================================
`grouped_gemm`         y_r = x_r W_e^T + u_r B_e^T
`grouped_gemm_swiglu`  h_r = silu(gate_r) * up_r           gate and up side by side in the above
`grouped_gemm_dx`      dx_r = dy_r W_e + du_r A_e          W_e read as it lies
`grouped_outer`        G_e = left_e^T right_e              the gradients of weights and adapters
=====================  ==================================  ========================================

e is the expert of row r. Rows come from `routing.gather`: those of an expert together, in whole blocks, so that no tile
has two experts. There are three ways, and the first that takes the operands is used:

* **Kernels** on compute capability 9.0 (`covers`), persistent and with tensor descriptors as those of ``ops/gemm.py``:
  the update is one more step onto the fp32 accumulator, SwiGLU happens before the result is written, and a packed
  weight is unpacked a few experts at a time into one buffer. That of `grouped_outer` is an ordinary one, for a narrow
  operand beside a wide one as LoRA has them, on every GPU that kernels run on.
* **Torch's grouped product** (``torch.nn.functional.grouped_mm``) for weights in bfloat16 on other GPUs, with the
  update and SwiGLU behind it, and for the gradients of weights.
* **A loop over the experts**, ``reference/grouped_gemm.py``: on a CPU, and on a GPU for what neither of them takes, at
  the price of one host sync.

Rows from ``routing.ends[-1]`` on belong to nobody: they are not read, and in results they hold anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device.dispatch import use_triton
from ..device.launch import INTERPRETED, device_limits, launch
from ..reference.grouped_gemm import (
    GroupedUpdate,
    grouped_gemm_dx_ref,
    grouped_gemm_ref,
    grouped_outer_ref,
)
from ._grouped_gemm_kernels import (
    grouped_gemm_dx_kernel,
    grouped_gemm_kernel,
    grouped_gemm_swiglu_kernel,
    grouped_outer_kernel,
)
from .gemm import _CAPABILITY, _DTYPES, Tile, _with_scratch
from .lora_mlp import swiglu_of
from .routing import Routing

# Fewer are few tokens, whose blocks are mostly padding.
MIN_ROWS = 1024
SLOTS = (16, 32, 64)
# Of the buffer that a packed weight is unpacked into; one expert may be larger.
BUFFER_BYTES = 256 << 20
# Not measured yet; those of `gemm`.
FORWARD = Tile(128, 256, 64, 16, 8, 3)
SWIGLU = Tile(128, 128, 64, 16, 8, 3)
BACKWARD = Tile(128, 256, 64, 16, 8, 3)
OUTER = Tile(128, 0, 64, 0, 4, 4)  # m columns of the wide operand in k rows at a time
_OUTER_DTYPES = (torch.float32, *_DTYPES)
# Results of up to 64 columns: x A^T and dy B. Bound by reading x, so many small programs.
_SKINNY = 64
_SKINNY_PROGRAMS = 3  # for each processor
# Torch 2.9 has it under its first name alone.
_grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def _tile(tile: Tile, width: int) -> Tile:
    """``tile``, or one for a result of few columns."""
    return tile if width > _SKINNY else Tile(64, max(16, 1 << (width - 1).bit_length()), 128, 16, 4, 4)


def _aligned(t: Tensor) -> bool:
    # What descriptors and torch's grouped product can hold, for elements of 16 bits; t may be a contiguous stack.
    return t.stride(-1) == 1 and not (t.shape[-1] | t.stride(-2)) & 7 and not t.data_ptr() & 15


def covers(x: Tensor, weight: Any, routing: Routing, update: GroupedUpdate | None = None) -> bool:
    """Whether the kernels take these operands and are meant to.

    True on compute capability 9.0 in bfloat16 or float16, for at least ``MIN_ROWS`` rows in blocks that are a multiple
    of 128; for weights of x's dtype, contiguous, or packed, with N and K divisible by 8, and rows of x of unit stride,
    all at multiples of 16 bytes; for u in x's dtype, of 16, 32 or 64 slots. `grouped_gemm_swiglu` also wants I to be
    divisible by 8, and `grouped_gemm_dx` N by 64, or by 128 where K is 64 at most.
    """
    return x.shape[0] >= MIN_ROWS and _fits(x, weight, routing, update, None, FORWARD)


def _fits(
    x: Tensor, weight: Any, routing: Routing, update: GroupedUpdate | None, out: Tensor | None, tile: Tile
) -> bool:
    """`covers`, for any number of rows."""
    dtype = x.dtype
    if dtype not in _DTYPES or not use_triton(x) or routing.block % tile.m:
        return False
    if not (INTERPRETED or device_limits(x.get_device()).capability == _CAPABILITY):
        return False
    if weight.shape[1] & 7 or weight.shape[2] & 7 or not all([_aligned(t) for t in (x, out) if t is not None]):
        return False
    if out is not None and out.dtype is not dtype:
        return False
    if update is not None and (
        update.u.dtype is not dtype or update.u.stride(1) != 1 or update.u.shape[1] not in SLOTS
    ):
        return False
    return not isinstance(weight, Tensor) or (
        weight.dtype is dtype and weight.is_contiguous() and not weight.data_ptr() & 15
    )


def _library_fits(*operands: Tensor) -> bool:
    """Whether torch's grouped product takes these, matrices of rows or stacks of them."""
    return _grouped_mm is not None and all(
        [t.is_cuda and use_triton(t) and t.dtype is torch.bfloat16 and _aligned(t) for t in operands]
    )


def _library(
    x: Tensor, weight: Any, routing: Routing, update: GroupedUpdate | None, out: Tensor | None, by_rows: bool
) -> Tensor | None:
    """The product by torch's grouped one, or None where that does not take it.

    ``by_rows``: x W_e^T + u B_e^T; else x W_e + u A_e.
    """
    if update is not None:
        update = update._replace(factors=update.factors.to(update.u.dtype).contiguous())
    stack = isinstance(weight, Tensor) and weight.is_contiguous() and not weight.shape[1] & 7
    if not stack or not _library_fits(x, weight, *(update or ())):
        return None

    def product(rows: Tensor, stack: Tensor) -> Tensor:
        return _grouped_mm(rows, stack.transpose(1, 2) if by_rows else stack, offs=routing.ends)

    y = product(x, weight)
    if update is not None:
        return torch.add(y, product(*update), out=y if out is None else out)
    return y if out is None else out.copy_(y)


def _check(
    x: Tensor, columns: int, routing: Routing, update: GroupedUpdate | None, factor: tuple[int, int, int], axis: int
) -> None:
    """x is [R, columns]; the update's factors are ``factor`` but for the slots, their dimension ``axis``."""
    rows = routing.pairs.shape[0]
    if x.dim() != 2 or x.shape != (rows, columns):
        raise ValueError(f"expected [{rows}, {columns}] for this routing and weight, got {tuple(x.shape)}")
    if factor[0] != routing.ends.shape[0]:
        raise ValueError(f"expected the weights of {routing.ends.shape[0]} experts, got {factor[0]}")
    if update is None:
        return
    wanted = list(factor)
    wanted[axis] = update.u.shape[-1]
    if update.u.shape != (rows, wanted[axis]) or list(update.factors.shape) != wanted:
        raise ValueError(
            f"expected u [{rows}, slots] and factors {wanted}, got {tuple(update.u.shape)} and "
            f"{tuple(update.factors.shape)}"
        )


def _check_out(out: Tensor | None, rows: int, columns: int) -> None:
    if out is not None and out.shape != (rows, columns):
        raise ValueError(f"expected out [{rows}, {columns}], got {tuple(out.shape)}")


def _parts(weight: Any, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """First expert, last (exclusive) and their values, in one piece or, of a packed weight, in one buffer in turn."""
    experts, n, k = weight.shape
    if isinstance(weight, Tensor):
        yield 0, experts, weight
        return
    most = min(experts, max(1, BUFFER_BYTES // (n * k * dtype.itemsize)))
    buffer = torch.empty((most, n, k), dtype=dtype, device=weight.device)
    for first in range(0, experts, most):
        count = min(most, experts - first)
        weight.dequantize(first, count, out=buffer[:count])
        yield first, first + count, buffer


def _launch(
    kernel: Any,
    x: Tensor,
    weight: Any,
    n: int,
    routing: Routing,
    update: GroupedUpdate | None,
    out: Tensor | None,
    width: int,
    tile: Tile,
) -> Tensor:
    """The result [R, width] of ``kernel``, launched on as many programs as run at once for each part of the weight.

    ``n`` is the kernel's N.
    """
    rows = x.shape[0]
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device) if out is None else out
    u, factors, slots = x, x, 0
    if update is not None:
        u, slots = update.u, update.u.shape[1]
        factors = update.factors.to(u.dtype).contiguous()
    programs = device_limits(x.get_device()).sm_count * (_SKINNY_PROGRAMS if width <= _SKINNY else 1)
    grid = (min(rows // tile.m * -(-width // tile.n), programs),)
    consts = (slots, tile.m, tile.n, tile.k, tile.group)
    for first, last, values in _parts(weight, x.dtype):
        args = (
            x, values, u, factors, y, routing.ends, rows, weight.shape[2], n, first, last,
            x.stride(0), u.stride(0), y.stride(0),
        )  # fmt: skip
        copy_context().run(_with_scratch, kernel, grid, args, consts, tile)
    return y


def grouped_gemm(
    x: Tensor,
    weight: Any,
    routing: Routing,
    *,
    update: GroupedUpdate | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """``y_r = x_r W_e^T + u_r B_e^T`` for the expert e of row r.

    Args:
        x: [R, K], the rows of `routing`.
        weight: [E, N, K] of x's dtype (the loop converts others); or a packed stack, anything with ``shape``,
            ``dtype``, ``device`` and ``dequantize(first, count, out=None, dtype=None) -> [count, N, K]``.
        routing: where each expert's rows are.
        update: u [R, slots] in x's dtype and ``B`` [E, N, slots] in any.
        out: where to write [R, N] (rows may be strided); None: a new tensor.
        tile: another tile than the measured one, for any number of rows (tests, benchmarks).

    Returns:
        [R, N] in x's dtype; rows of zeros give zeros, rows that nobody uses are not written. Sums are fp32; rounded
        once, but for torch's grouped product, whose update is rounded by itself.

    Raises:
        ValueError: shapes that do not fit.
    """
    experts, n, k = weight.shape
    _check(x, k, routing, update, (experts, n, k), 2)
    _check_out(out, x.shape[0], n)
    chosen = tile or _tile(FORWARD, n)
    if (tile or x.shape[0] >= MIN_ROWS) and _fits(x, weight, routing, update, out, chosen):
        return _launch(grouped_gemm_kernel, x, weight, n, routing, update, out, n, chosen)
    y = _library(x, weight, routing, update, out, True)
    return grouped_gemm_ref(x, weight, routing.ends, update=update, out=out) if y is None else y


def grouped_gemm_swiglu(
    x: Tensor, weight: Any, routing: Routing, *, update: GroupedUpdate | None = None, tile: Tile | None = None
) -> Tensor:
    """``h_r = silu(gate_r) * up_r`` with ``[gate_r, up_r] = x_r W_e^T + u_r B_e^T``.

    Args:
        x: [R, K], the rows of `routing`.
        weight: [E, 2 I, K], the rows of gate and then those of up; otherwise as in `grouped_gemm`.
        routing: where each expert's rows are.
        update: u [R, slots] in x's dtype and ``B`` [E, 2 I, slots] in any.
        tile: another tile than the measured one, for any number of rows (tests, benchmarks).

    Returns:
        [R, I] in x's dtype; gate and up are rounded to it too, as if they had been written (the kernels do not).

    Raises:
        ValueError: shapes that do not fit.
    """
    experts, n, k = weight.shape
    _check(x, k, routing, update, (experts, n, k), 2)
    if n % 2:
        raise ValueError(f"expected the rows of gate and as many of up, got {n}")
    chosen = tile or SWIGLU
    enough = (tile or x.shape[0] >= MIN_ROWS) and n % 16 == 0
    if enough and _fits(x, weight, routing, update, None, chosen):
        return _launch(grouped_gemm_swiglu_kernel, x, weight, n // 2, routing, update, None, n // 2, chosen)
    both = _library(x, weight, routing, update, None, True)
    # By the same steps as where gate and up are kept: a layer's numbers do not depend on whether it is recomputed.
    return swiglu_of(grouped_gemm_ref(x, weight, routing.ends, update=update) if both is None else both)


def grouped_gemm_dx(
    dy: Tensor,
    weight: Any,
    routing: Routing,
    *,
    update: GroupedUpdate | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """``dx_r = dy_r W_e + du_r A_e`` for the expert e of row r.

    Args:
        dy: [R, N], the rows of `routing`.
        weight: [E, N, K], as in `grouped_gemm`.
        routing: where each expert's rows are.
        update: du [R, slots] in dy's dtype and ``A`` [E, slots, K] in any.
        out: where to write [R, K] (rows may be strided); None: a new tensor.
        tile: another tile than the measured one, for any number of rows (tests, benchmarks).

    Returns:
        [R, K] in dy's dtype, as in `grouped_gemm`.

    Raises:
        ValueError: shapes that do not fit.
    """
    experts, n, k = weight.shape
    _check(dy, n, routing, update, (experts, n, k), 1)
    _check_out(out, dy.shape[0], k)
    chosen = tile or _tile(BACKWARD, k)
    # A step beyond N would multiply zeros with rows of the next expert, and zero times infinity is not zero.
    enough = (tile or dy.shape[0] >= MIN_ROWS) and n % chosen.k == 0
    if enough and _fits(dy, weight, routing, update, out, chosen):
        return _launch(grouped_gemm_dx_kernel, dy, weight, n, routing, update, out, k, chosen)
    dx = _library(dy, weight, routing, update, out, False)
    return grouped_gemm_dx_ref(dy, weight, routing.ends, update=update, out=out) if dx is None else dx


def _outer_fits(left: Tensor, right: Tensor, routing: Routing, dtype: torch.dtype, tile: Tile) -> bool:
    """Whether the kernel takes these: all slots of the narrower operand are in one tile."""
    return (
        left.dtype in _DTYPES
        and use_triton(left)
        and dtype in _OUTER_DTYPES
        and min(left.shape[1], right.shape[1]) in SLOTS
        and left.stride(1) == right.stride(1) == 1
        and routing.block % tile.k == 0
    )


def grouped_outer(
    left: Tensor, right: Tensor, routing: Routing, dtype: torch.dtype, *, tile: Tile | None = None
) -> Tensor:
    """``G_e = left_e^T right_e`` over the rows of each expert.

    Args:
        left: [R, M] and right: [R, N] of one dtype, the rows of `routing`.
        routing: where each expert's rows are.
        dtype: of the result.
        tile: another than the measured one (tests, benchmarks), as ``OUTER`` is; where one of the operands is narrow.

    Returns:
        [E, M, N]; zeros for an expert without rows. Sums are fp32, in the order of rows. Of fp16 operands they are
        rounded to fp16 first (a loss scaler finds its scale by what overflows there), and by torch's grouped product,
        which takes two wide operands in bfloat16, to bfloat16.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    rows = routing.pairs.shape[0]
    if left.dim() != 2 or right.dim() != 2 or left.shape[0] != rows or right.shape[0] != rows:
        raise ValueError(f"expected matrices of {rows} rows, got {tuple(left.shape)} and {tuple(right.shape)}")
    if left.dtype is not right.dtype:
        raise ValueError(f"expected operands of one dtype, got {left.dtype} and {right.dtype}")
    if _outer_fits(left, right, routing, dtype, tile or OUTER):
        return _outer_narrow(left, right, routing, dtype, tile or OUTER)
    if routing.block % 8 or not _library_fits(left, right):
        return grouped_outer_ref(left, right, routing.ends, dtype)
    result = _grouped_mm(left.t(), right, offs=routing.ends)
    # Not every version and GPU writes anything for an empty one (pytorch issue 172439).
    empty = torch.diff(routing.ends, prepend=routing.ends.new_zeros(1)) == 0
    return result.masked_fill_(empty[:, None, None], 0).to(dtype)


def _outer_narrow(left: Tensor, right: Tensor, routing: Routing, dtype: torch.dtype, tile: Tile) -> Tensor:
    """`grouped_outer` by the kernel, whose first operand is the wide one."""
    experts, m, n = routing.ends.shape[0], left.shape[1], right.shape[1]
    result = torch.empty((experts, m, n), dtype=dtype, device=left.device)
    by_left = m >= n
    wide, narrow = (left, right) if by_left else (right, left)
    strides = (n, 1) if by_left else (1, n)
    launch(
        grouped_outer_kernel,
        (experts * -(-wide.shape[1] // tile.m),),
        (wide, narrow, result, routing.ends, wide.shape[1], wide.stride(0), narrow.stride(0), *strides),
        (narrow.shape[1], left.dtype is torch.float16, tile.m, tile.k),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return result
