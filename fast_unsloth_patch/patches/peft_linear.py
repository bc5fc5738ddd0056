"""Forward of PEFT's ``lora.Linear``: one adapter on a dense linear layer of any model."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ..ops.lora_linear import lora_linear
from ..status import tally
from . import checkpointing, guards
from .plan import self_plan

_LINEAR = tally("peft.linear")


def linear_forward(stock: Callable) -> Callable:
    """``x W^T + bias + scaling * (dropout(x) A^T) B^T (+ scaling * lora_bias)`` as one op.

    A layer that a patched attention or MLP has inlined does not come here. Subclasses that inherit this forward
    (torchao's) and calls with PEFT's extra arguments (mixed batches) run stock.
    """
    linear_type = sys.modules[stock.__module__].Linear

    def forward(self, x, *args, **kwargs):
        reason = guards.blocked(self, x)
        if reason is None and type(self) is not linear_type:
            reason = f"type {type(self).__name__}"
        if reason is None and (args or kwargs):
            reason = "mixed batch" if kwargs.get("adapter_names") is not None else "extra arguments"
        plan = self_plan(self, x) if reason is None else reason
        if isinstance(plan, str):
            _LINEAR.fall_back(plan)
            return stock(self, x, *args, **kwargs)
        _LINEAR.hit(checkpointing.recomputing())
        return lora_linear(x, plan.projections[0], tally=_LINEAR)

    return forward
