"""RMSNorm in plain PyTorch, with the roundings of transformers' LlamaRMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_fwd_ref(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``y = weight * (x * rstd).to(x.dtype)`` and ``rstd = (mean(x^2) + eps)^-1/2``.

    Args:
        x: [..., H]. Squares and mean are taken in float32, or in float64 if x is float64.
        weight: [H], any floating dtype; y has the promoted dtype.

    Returns:
        y [..., H] and rstd [..., 1] in the accumulation dtype.
    """
    xf = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (xf * rstd).to(x.dtype), rstd


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The differentiable reference: the first result of `rms_norm_fwd_ref`."""
    return rms_norm_fwd_ref(x, weight, eps)[0]


def rms_norm_bwd_ref(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm_ref`: with ``n = x rstd`` and ``g = dy weight``, in the accumulation dtype,

    ``dx = rstd (g - n mean(g n)) (+ dsum)`` and ``dweight = sum_T dy n.to(x.dtype)``.
    """
    xhat = x.to(rstd.dtype) * rstd
    dyf = dy.to(rstd.dtype)
    g = dyf * weight.to(rstd.dtype)
    dx = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    if dsum is not None:
        dx = dx + dsum
    dweight = (dyf * xhat.to(x.dtype)).flatten(0, -2).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)
