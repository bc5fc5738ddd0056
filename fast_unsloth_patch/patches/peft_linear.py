"""Forwards of PEFT's LoRA layers: one adapter on a dense, bitsandbytes or GPTQ linear layer of any model."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ..ops.lora_linear import lora_linear
from ..status import Tally
from . import checkpointing, guards
from .plan import self_plan


def linear_forward(stock: Callable, tally: Tally) -> Callable:
    """``x W^T + bias + scaling * (dropout(x) A^T) B^T (+ scaling * lora_bias)`` as one op.

    Of ``lora.Linear``, ``lora.bnb.Linear4bit`` (the base in bitsandbytes' compute dtype, the result in the input's)
    and ``lora.gptq.GPTQLoraLinear``. A layer that a patched attention or MLP has inlined does not come here. Subclasses
    that inherit this forward (torchao's) and calls with PEFT's extra arguments (mixed batches) run stock.
    """
    kind = getattr(sys.modules[stock.__module__], stock.__qualname__.partition(".")[0])

    def forward(self, x, *args, **kwargs):
        reason = guards.blocked(self, x)
        if reason is None and type(self) is not kind:
            reason = f"type {type(self).__name__}"
        if reason is None and (args or kwargs):
            reason = "mixed batch" if kwargs.get("adapter_names") is not None else "extra arguments"
        plan = self_plan(self, x) if reason is None else reason
        if isinstance(plan, str):
            tally.fall_back(plan)
            return stock(self, x, *args, **kwargs)
        tally.hit(checkpointing.recomputing())
        return lora_linear(x, plan.projections[0], tally=tally)

    return forward
