"""The forward of Mixtral's sparse mixture of experts: the gate as the module it is, the experts as one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..ops.lora_experts import lora_experts
from ..ops.routing import MAX_CHOICES
from ..status import Tally
from . import checkpointing, guards
from .decoder import _memo
from .experts import experts_plan


def moe_forward(stock: Callable, tally: Tally) -> Callable:
    """``sum_j w_tj down_e(silu(gate_e(x_t)) * up_e(x_t))`` over the experts ``e`` that the gate chooses for a token.

    Router logits are recorded by hooks on the gate, which therefore runs by its ``__call__`` in every call, recomputes
    included. The experts, and PEFT's wrappers round them, are inlined.
    """

    def with_residual(self, hidden_states, residual):
        """The same added to ``residual``, unless that is None."""
        plan = (
            guards.blocked(self, hidden_states)
            or _block_reason(self, hidden_states)
            or experts_plan(self, hidden_states)
        )
        if isinstance(plan, str):
            tally.fall_back(plan)
            y = stock(self, hidden_states)
            return y if residual is None else residual + y
        x = hidden_states.view(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(x)
        reason = _routing_reason(x, index, weights)
        if reason is not None:
            # The gate has run: what is left of the stock forward, not that forward again.
            tally.fall_back(reason)
            y = self.experts(x, index, weights).reshape(hidden_states.shape)
            return y if residual is None else residual + y
        tally.hit(checkpointing.recomputing())
        return lora_experts(
            hidden_states,
            index,
            weights,
            plan.gate_up,
            plan.down,
            dtype=plan.compute,
            residual=residual,
            # Whoever has wrapped this forward, or calls it from a subclass, reads what it returns.
            need_output=type(self).forward is not forward or not checkpointing.output_unused(self),
            keep=torch.is_grad_enabled() and not checkpointing.discarded(),
            memo=_memo(self, "experts"),
            tally=tally,
        )

    def forward(self, hidden_states):
        return with_residual(self, hidden_states, None)

    with_residual.forward = forward  # type: ignore[attr-defined]
    forward.with_residual = with_residual  # type: ignore[attr-defined]
    return forward


def _block_reason(block: Any, x: torch.Tensor) -> str | None:
    if block.training and block.jitter_noise > 0:
        return "router jitter"  # drawn over the input, in place
    if x.dim() != 3:
        return "input not 3-D"
    return None if x.is_contiguous() else "input not contiguous"


def _routing_reason(x: torch.Tensor, index: Any, weights: Any) -> str | None:
    """None if the gate returned what transformers' own does: [T, k] expert numbers and float32 weights."""
    if type(index) is not torch.Tensor or type(weights) is not torch.Tensor:
        return "routing of another type"
    if index.dim() != 2 or index.shape[0] != x.shape[0] or index.shape != weights.shape:
        return "routing of another shape"
    if index.dtype is not torch.int64 or weights.dtype is not torch.float32:
        return "routing of another dtype"
    if index.shape[1] > MAX_CHOICES:
        return f"more than {MAX_CHOICES} choices"
    return None if index.device == x.device == weights.device else "routing on another device"
