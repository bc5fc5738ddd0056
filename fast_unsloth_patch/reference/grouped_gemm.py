"""The products of ``ops/grouped_gemm.py`` in plain PyTorch, one expert after another.

The rows of expert e are ``ends[e - 1] : ends[e]``; rows from ``ends[-1]`` on belong to nobody, and the results have
nothing in them. Sums are fp32 (float64 for float64 input), rounded once. On a GPU the loop reads ``ends`` on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class GroupedUpdate(NamedTuple):
    """What the experts' adapters add to a product.

    Args:
        u: [R, slots] in the compute dtype, the small operand of each row's expert.
        factors: ``B`` [E, N, slots] for ``grouped_gemm`` and ``grouped_gemm_swiglu``, ``A`` [E, slots, K] for
            ``grouped_gemm_dx``; rounded to u's dtype.
    """

    u: Tensor
    factors: Tensor


def _summed(t: Tensor) -> Tensor:
    # A GPU adds up products of 16 bits in fp32 by itself. On a CPU they are made fp32.
    return t if t.dtype is torch.float64 or (t.is_cuda and t.dtype.itemsize == 2) else t.float()


def _filled(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """Expert, first row and last row (exclusive) of the experts that have any (meta tensors know of none)."""
    for expert, (start, end) in enumerate(pairwise([0, *([] if ends.is_meta else ends.tolist())])):
        if start < end:
            yield expert, start, end


def _matrices(weight: Any, ends: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, int, Tensor]]:
    """`_filled` with the expert's weight [N, K] in ``dtype``; that of a packed one is gone at the next step."""
    buffer = None
    for expert, start, end in _filled(ends):
        if isinstance(weight, Tensor):
            yield expert, start, end, weight[expert].to(dtype)
            continue
        if buffer is None:
            buffer = torch.empty((1, *weight.shape[1:]), dtype=dtype, device=weight.device)
        yield expert, start, end, weight.dequantize(expert, 1, out=buffer)[0]


def _product(rows: Tensor, matrix: Tensor, u: Tensor | None, factor: Tensor | None) -> Tensor:
    """``rows matrix + u factor``."""
    rows, matrix = _summed(rows), _summed(matrix)
    if u is None or factor is None:
        return rows @ matrix
    return torch.addmm(_summed(u) @ _summed(factor.to(u.dtype)), rows, matrix)


def grouped_gemm_ref(
    x: Tensor, weight: Any, ends: Tensor, *, update: GroupedUpdate | None = None, out: Tensor | None = None
) -> Tensor:
    """``y_r = x_r W_e^T + u_r B_e^T`` [R, N]."""
    y = torch.empty((x.shape[0], weight.shape[1]), dtype=x.dtype, device=x.device) if out is None else out
    for e, start, end, w in _matrices(weight, ends, x.dtype):
        u, b = (None, None) if update is None else (update.u[start:end], update.factors[e].t())
        y[start:end] = _product(x[start:end], w.t(), u, b)
    return y


def grouped_gemm_swiglu_ref(x: Tensor, weight: Any, ends: Tensor, *, update: GroupedUpdate | None = None) -> Tensor:
    """``silu(gate) * up`` [R, I] for gate and up side by side in ``grouped_gemm_ref``, rounded to x's dtype."""
    width = weight.shape[1] // 2
    h = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
    for e, start, end, w in _matrices(weight, ends, x.dtype):
        u, b = (None, None) if update is None else (update.u[start:end], update.factors[e].t())
        both = _product(x[start:end], w.t(), u, b).to(x.dtype)
        gate, up = (part if part.dtype is torch.float64 else part.float() for part in both.split(width, 1))
        h[start:end] = gate * torch.sigmoid(gate) * up
    return h


def grouped_gemm_dx_ref(
    dy: Tensor, weight: Any, ends: Tensor, *, update: GroupedUpdate | None = None, out: Tensor | None = None
) -> Tensor:
    """``dx_r = dy_r W_e + du_r A_e`` [R, K]."""
    dx = torch.empty((dy.shape[0], weight.shape[2]), dtype=dy.dtype, device=dy.device) if out is None else out
    for e, start, end, w in _matrices(weight, ends, dy.dtype):
        du, a = (None, None) if update is None else (update.u[start:end], update.factors[e])
        dx[start:end] = _product(dy[start:end], w, du, a)
    return dx


def grouped_outer_ref(left: Tensor, right: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """``left_e^T right_e`` [E, M, N] in ``dtype``; zeros for an expert without rows.

    One of fp16 operands is rounded to fp16 first: a loss scaler finds its scale by what overflows there.
    """
    result = torch.zeros((ends.shape[0], left.shape[1], right.shape[1]), dtype=dtype, device=left.device)
    for e, start, end in _filled(ends):
        a, b = left[start:end].t(), right[start:end]
        if a.is_cuda and a.dtype is torch.bfloat16 and dtype is torch.float32:
            torch.mm(a, b, out_dtype=dtype, out=result[e])
        else:
            product = _summed(a) @ _summed(b)
            result[e] = product.to(torch.float16) if a.dtype is torch.float16 else product
    return result
