"""The products of ``ops/gemm.py`` in plain PyTorch: sums in fp32 (float64 for float64 input) and one rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Update(NamedTuple):
    """What LoRA adds to a product of up to three siblings.

    Args:
        u: [T, slots], the small operands of all adapters side by side, as ``ops.low_rank.down`` lays them out.
        factors: one a sibling, or None where it has no adapter: ``B_j`` [N_j, r_j] in a forward, ``A_j`` [r_j, K] in a
            backward; contiguous, in any floating dtype: rounded to u's dtype.
        starts: first column of u that belongs to each sibling (not read where the factor is None).
    """

    u: Tensor
    factors: Sequence[Tensor | None]
    starts: Sequence[int]


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype is torch.float64 else t.float()


def _forward(x: Tensor, weights: Sequence[Tensor], update: Update | None) -> list[Tensor]:
    """``x W_j^T + u_j B_j^T``, not rounded."""
    parts = [_wide(x) @ _wide(weight).t() for weight in weights]
    if update is not None:
        for j, (b, start) in enumerate(zip(update.factors, update.starts)):
            if b is not None:
                u = update.u[:, start : start + b.shape[1]]
                parts[j] = parts[j] + _wide(u) @ _wide(b.to(u.dtype)).t()
    return parts


def gemm_ref(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    update: Update | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``y_j = x W_j^T + u_j B_j^T`` side by side [T, sum of N_j], plus bias and residual."""
    y = torch.cat(_forward(x, weights, update), 1)
    if bias is not None:
        y = y + _wide(bias)
    if residual is not None:
        y = y + _wide(residual)
    return y.to(x.dtype)


def gemm_swiglu_ref(x: Tensor, gate: Tensor, up: Tensor, *, update: Update | None = None) -> Tensor:
    """``silu(x Wg^T + ug Bg^T) * (x Wu^T + uu Bu^T)`` [T, N], from factors rounded to x's dtype."""
    left, right = (_wide(t.to(x.dtype)) for t in _forward(x, (gate, up), update))
    return (F.silu(left) * right).to(x.dtype)


def gemm_dx_ref(
    dy: Tensor, weights: Sequence[Tensor], *, update: Update | None = None, addend: Tensor | None = None
) -> Tensor:
    """``dx = sum_j dy_j W_j + du_j A_j + addend`` [T, K], with dy_j side by side in dy [T, sum of N_j]."""
    widths = [weight.shape[0] for weight in weights]
    products = [_wide(part) @ _wide(weight) for part, weight in zip(dy.split(widths, 1), weights)]
    dx = torch.stack(products).sum(0)
    if update is not None:
        for a, start in zip(update.factors, update.starts):
            if a is not None:
                du = update.u[:, start : start + a.shape[0]]
                dx = dx + _wide(du) @ _wide(a.to(du.dtype))
    if addend is not None:
        dx = dx + _wide(addend)
    return dx.to(dy.dtype)
