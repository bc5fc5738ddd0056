"""A linear layer with its LoRA update, as one differentiable operation.

``y = x W^T + bias + s (dropout(x) A^T) B^T``.

What is saved is x and ``u = dropout(x) A^T`` (r wide), which is never recomputed; ``dY B`` is computed once, for dA
and dX; W gets a gradient only when it is trainable. The low-rank update is written first and the library GEMM
accumulates onto it, so that y is rounded once more than a plain linear layer and not three times. The formulas are
the low-rank ones of Hu et al., "LoRA" (2021); ordering the products so that nothing of the size of W or of x is
formed besides the result was first shown by Unsloth's public description of its LoRA kernels. The code here is our
own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from ._autograd import once_differentiable
from ._operands import (
    Adapter,
    Parameters,
    Projection,
    check_width,
    factors,
    flatten,
    operands,
    resolve_dtypes,
    rows,
    without_autocast,
)
from ._siblings import Input, Low, Memo, draw_masks, keep_input, linear_forward, project_down, seed_for
from ._siblings_backward import siblings_backward

__all__ = ["Adapter", "LoraLinear", "Projection", "lora_linear"]


class LoraLinear(Function):
    """Autograd node of ``lora_linear``; saves x, u, the masks and the parameters."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, lora_bias, values, dtypes, seed, memo, tally):
        (op,) = operands((weight, bias, a, b, lora_bias), (values,))
        x2d = rows(x, dtypes.x)
        masks = draw_masks(x2d, [op], seed) if a is not None else None
        low = project_down(x2d, [op], masks, dtypes.low, memo)
        # Not a view: FSDP2 warns of those.
        y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=dtypes.y, device=x.device)
        linear_forward(x2d, op, low.u, dtypes, y.view(x2d.shape[0], weight.shape[0]))
        kept = keep_input(x, x2d, dtypes, ctx.needs_input_grad[1:6])
        ctx.save_for_backward(*kept, *low, masks)
        ctx.parameters = Parameters.of((weight, bias, a, b, lora_bias))
        ctx.values, ctx.dtypes, ctx.tally = values, dtypes, tally
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if ctx.tally is not None:
            ctx.tally.hit_backward()
        *kept, u, packed, masks = ctx.saved_tensors
        group = operands(ctx.parameters.unchanged(), (ctx.values,))
        with without_autocast(dy):
            dx, (grads,) = siblings_backward(
                rows(dy, ctx.dtypes.x),
                Input(*kept),
                Low(u, packed),
                group,
                masks,
                ctx.dtypes,
                ctx.needs_input_grad[1:6],
                need_dx=ctx.needs_input_grad[0],
            )
        if dx is not None:
            dx = dx.view(ctx.x_shape).to(ctx.x_dtype)
        return dx, *grads, None, None, None, None, None


def lora_linear(x: torch.Tensor, proj: Projection, *, memo: Memo | None = None, tally: Any = None) -> torch.Tensor:
    """``x W^T + bias + scaling * (dropout(x) A^T) B^T``.

    Under autocast everything is computed in the autocast dtype. Without it the base GEMM runs in x's dtype and the
    low-rank branch in the adapter's, as in PEFT; the sum is rounded to the base dtype once. A packed weight whose layer
    computes in a dtype of its own (bitsandbytes) has its base GEMM in that without autocast.

    Args:
        x: [..., K].
        proj: weight, bias and adapter; any of the parameters may be trainable.
        memo: carries ``x A^T`` from the forward of a checkpointed region to its recompute.
        tally: object with ``hit_backward()``, called once a backward.

    Returns:
        [..., N] in the autocast dtype, or in x's; always in x's where the weight has a compute dtype of its own.

    Raises:
        ValueError: if the last dimension of x is not K.
    """
    check_width(x.shape[-1], proj)
    dtypes = resolve_dtypes(x, proj)
    return LoraLinear.apply(x, *flatten(proj), factors(proj), dtypes, seed_for(x, proj), memo, tally)
