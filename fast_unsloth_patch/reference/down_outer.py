"""The oracle of ``ops/down_outer``: both skinny products in plain PyTorch, one after the other."""

from __future__ import annotations

import torch


def down_outer_ref(x, u, mats, scales, *, starts=None, by_rows=True):
    """``d_j = s_j x_j M_j`` and ``G_j = x_j^T u_j`` (both transposed where M_j is stored transposed).

    Args:
        x: [T, K].
        u: one [T, r_j] a matrix.
        mats: [K_j, r_j] where ``by_rows``, or else [r_j, K_j].
        scales: one factor a matrix, of d only.
        starts: first column of x that belongs to each matrix; by default they follow each other.

    Returns:
        The list of d_j [T, r_j] and the list of G_j in the shape of M_j.
    """
    downs, outers, at = [], [], 0
    for j, (m, scale, u_j) in enumerate(zip(mats, scales, u)):
        width = m.shape[0] if by_rows else m.shape[1]
        start = at if starts is None else starts[j]
        x_j = x[:, start : start + width]
        at = start + width
        downs.append(scale * torch.mm(x_j, m if by_rows else m.t()))
        outers.append(torch.mm(x_j.t(), u_j) if by_rows else torch.mm(u_j.t(), x_j))
    return downs, outers
