"""A mixture of SwiGLU experts with LoRA in plain PyTorch, expert by expert."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def expert_factors_ref(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """PEFT's stacked factors taken apart: A [E * r, K] -> [E, r, K], B [N, r * E] -> [E, N, r]."""
    return a.view(num_experts, -1, a.shape[1]), b.view(b.shape[0], -1, num_experts).permute(2, 0, 1)


def lora_experts_ref(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: tuple[Tensor, Tensor | None, Tensor | None, float],
    down: tuple[Tensor, Tensor | None, Tensor | None, float],
) -> Tensor:
    """``y_t = sum_j w_tj down_e(silu(gate_e(x_t)) * up_e(x_t))`` with ``e = index_tj``, by autograd's own operations.

    Args:
        x: [T, H].
        top_k_index, top_k_weights: [T, k].
        gate_up, down: weight [E, N, K], A [E * r, K], B [N, r * E] and scaling; A and B None without LoRA.
    """
    y = torch.zeros_like(x)
    num_experts = gate_up[0].shape[0]

    def project(rows: Tensor, operands: tuple[Tensor, Tensor | None, Tensor | None, float], expert: int) -> Tensor:
        weight, a, b, scaling = operands
        out = F.linear(rows, weight[expert])
        if a is not None and b is not None:
            stack_a, stack_b = expert_factors_ref(a, b, num_experts)
            out = out + F.linear(F.linear(rows, stack_a[expert]), stack_b[expert]) * scaling
        return out

    for expert in range(num_experts):
        token, choice = torch.where(top_k_index == expert)
        gate, up = project(x[token], gate_up, expert).chunk(2, -1)
        z = project(F.silu(gate) * up, down, expert)
        y = y.index_add(0, token, (z * top_k_weights[token, choice, None]).to(y.dtype))
    return y
