"""SwiGLU in plain PyTorch, with the roundings of transformers' LlamaMLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``; silu(gate) is rounded to the dtype of gate before the product."""
    return F.silu(gate) * up


def swiglu_bwd_ref(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu_ref`: with ``s = sigmoid(gate)``, in float32 (float64 for float64),

    ``dgate = dy up s (1 + gate (1 - s))`` and ``dup = dy silu(gate).to(gate.dtype)``.
    """
    acc = torch.promote_types(gate.dtype, torch.float32)
    g, dyf = gate.to(acc), dy.to(acc)
    s = torch.sigmoid(g)
    dgate = dyf * up.to(acc) * (s * (1 + g * (1 - s)))
    dup = dyf * (g * s).to(gate.dtype)
    return dgate.to(gate.dtype), dup.to(up.dtype)
