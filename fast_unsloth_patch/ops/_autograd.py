"""What every op's autograd Function needs beside its formulas."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Decorates a Function's backward: gradients of its gradients raise instead of being wrong.

    torch's decorator of this name does so only if an incoming gradient requires grad. With ``create_graph=True`` and a
    plain incoming gradient (a gradient penalty on the loss itself) it returns tensors without a graph, and the terms
    that come through the op are silently missing from the second derivative.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        # Grad mode is on in backward exactly under create_graph.
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        raising = torch._C._functions.DelayedError(
            b"this fast op can be differentiated once only; use fast_unsloth_patch.disabled() for higher derivatives", 1
        )
        return tuple(
            raising(out.detach().requires_grad_()) if isinstance(out, Tensor) and out.is_floating_point() else out
            for out in outputs
        )

    return wrapper
