"""Causal attention over documents that lie one after another, one library call a document."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F


def varlen_attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
) -> torch.Tensor:
    """``softmax(scaling q k^T + mask) v`` inside each document, differentiable by autograd.

    Args:
        q: [T, Hq, D]; k, v: [T, Hk, D], Hq a multiple of Hk.
        cu_seqlens: [documents + 1] int, from 0 to T.
        scaling: of the scores.
        window: a token sees that many, itself and those before it; None: all of its document.

    Returns:
        [T, Hq, D] contiguous.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[0]:
        raise ValueError(f"cu_seqlens run from {bounds[0]} to {bounds[-1]}, expected 0 to {q.shape[0]}")
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    parts = []
    for start, end in pairwise(bounds):
        length = end - start
        mask = None
        if window is not None and window < length:
            at = torch.arange(length, device=q.device)
            back = at[:, None] - at[None, :]
            mask = (back >= 0) & (back < window)
        qd, kd, vd = (t[None, :, start:end] for t in (q, k, v))
        parts.append(
            F.scaled_dot_product_attention(qd, kd, vd, attn_mask=mask, is_causal=mask is None, scale=scaling)[0]
        )
    return torch.cat(parts, dim=1).transpose(0, 1).contiguous()
