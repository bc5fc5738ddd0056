"""Rotary position embedding in plain PyTorch, with the roundings of transformers' apply_rotary_pos_emb."""

from __future__ import annotations

import torch
from torch import Tensor


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _rotate_half_transposed(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], -x[..., :half]), dim=-1)


def rope_ref(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``y = x cos + rotate_half(x) sin`` on the first R of the D channels of q and k; the others pass through.

    Args:
        q: [B, heads, S, D]; k: [B, kv_heads, S, D].
        cos, sin: [1 or B, S, R], R even and at most D; their two halves need not be equal.

    Returns:
        q and k rotated, in the dtype that q (k) and cos promote to.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotary = cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        turning = x[..., :rotary]
        turned = turning * cos + _rotate_half(turning) * sin
        return turned if rotary == x.shape[-1] else torch.cat((turned, x[..., rotary:]), dim=-1)

    return rotate(q), rotate(k)


def rope_bwd_ref(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, q_dtype: torch.dtype, k_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of `rope_ref` for q and k: ``dx = dy cos + rotate_half^T(dy sin)``, exact for halves that differ.

    Both products are rounded to the dtype of x before they are added, as autograd does with stock's two products.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotary = cos.shape[-1]

    def rotate(dy: Tensor, dtype: torch.dtype) -> Tensor:
        turned = dy[..., :rotary]
        dx = (turned * cos).to(dtype) + _rotate_half_transposed((turned * sin).to(dtype))
        return dx if rotary == dy.shape[-1] else torch.cat((dx, dy[..., rotary:].to(dtype)), dim=-1)

    return rotate(dq, q_dtype), rotate(dk, k_dtype)
