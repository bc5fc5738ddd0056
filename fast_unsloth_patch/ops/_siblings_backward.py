"""Backward of LoRA projections that share an input: the gradients of x, of the adapters, of trainable weights.

``du_j = s_j dy_j B_j``, ``dB_j = dy_j^T u_j`` and ``dA_j = du_j^T dropout(x)`` are bound by reading an activation each:
dy is read once for the first two, and x is what the norm before it keeps (`Input`). ``dx`` is one large product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..device.dispatch import use_triton
from . import down_outer, gemm
from ._operands import TENSORS, Dtypes, OperandGrads, Operands, adapted, keep_scale
from ._siblings import Input, Low, base_values, layout, takes_gemm, update_of
from .low_rank import LIBRARY_TOKENS, MAX_SLOTS, Siblings, by_library, down, expand, mm_wide, outer, pack

_WIDE = 8192


def siblings_backward(
    dy: torch.Tensor,
    kept: Input,
    low: Low,
    group: list[Operands],
    masks: torch.Tensor | None,
    dtypes: Dtypes,
    needs: tuple[bool, ...],
    *,
    need_dx: bool,
) -> tuple[torch.Tensor | None, list[OperandGrads]]:
    """Backward of projections that share the input x.

    ``du_j = s_j dy_j B_j``; ``dx = sum_j dy_j W_j + c_j (du_j A_j) * m_j``; ``dA = du^T dropout(x)``; ``dB = dy^T
    u``; ``dW = dy^T x``.

    Args:
        dy: [T, sum of N], the siblings' gradients side by side, in ``dtypes.x``.
        kept: what ``keep_input`` kept of x, in ``dtypes.x``.
        low: what ``project_down`` gave.
        group: the siblings.
        masks: keep masks of the siblings that have an adapter, or None.
        needs: ``needs_input_grad`` of the siblings' tensors, five each.
        need_dx: whether dx is wanted.

    Returns:
        dx [T, K] or None, and the gradients of each sibling.
    """
    starts = [0]
    for op in group:
        starts.append(starts[-1] + op.weight.shape[0])
    grads: list[dict[str, Any]] = [{} for _ in group]
    where = [i for i, op in enumerate(group) if op.a is not None]
    du = None
    if where:
        need_a = any([needs[i * TENSORS + 2] for i in where])
        need_b = any([needs[i * TENSORS + 3] for i in where])
        some = [group[i] for i in where]
        firsts = [starts[i] for i in where]
        dbs: list[torch.Tensor] = []
        if need_b and (need_a or need_dx):
            du, dbs = output_gradients(dy, low.u, some, firsts, dtypes)
        elif need_b:
            dbs = b_gradients(dy, low.u, some, firsts, dtypes)
        elif need_a or need_dx:
            du = down_gradient(dy, some, firsts, dtypes)
        for i, db in zip(where, dbs):
            grads[i]["b"] = db
        if need_a:
            for i, da in zip(where, a_gradients(du, kept, some, masks, dtypes)):  # type: ignore[arg-type]
                grads[i]["a"] = da
    for i, op in enumerate(group):
        dy_i = dy[:, starts[i] : starts[i + 1]]
        grads[i].update(base_grads(dy_i, kept.x, op, needs[i * TENSORS : (i + 1) * TENSORS]))
    dx = _siblings_dx(dy, group, low, du, masks, dtypes) if need_dx else None
    return dx, [OperandGrads(**g) for g in grads]


def _siblings_dx(dy, group: list[Operands], low: Low, du: torch.Tensor | None, masks, dtypes: Dtypes) -> torch.Tensor:
    """``sum_j dy_j W_j + c_j (du_j A_j) * m_j``."""
    weights, stacked = base_values(group, dtypes.base, forward=False)
    dx = input_gradient(dy, weights, group, du, dtypes) if masks is None else None
    if dx is not None:
        return dx
    if du is not None:
        dx = _low_dx(du, low, adapted(group), masks, dtypes)
    if stacked is not None:
        return _add_base_dx(dx, dy, stacked, dtypes)
    start = 0
    for weight in weights:
        dx = _add_base_dx(dx, dy[:, start : start + weight.shape[0]], weight, dtypes)
        start += weight.shape[0]
    return dx  # type: ignore[return-value]  # there is at least one sibling


def _add_base_dx(dx: torch.Tensor | None, dy: torch.Tensor, weight: torch.Tensor, dtypes: Dtypes) -> torch.Tensor:
    """``dx + dy W``, written into dx if there is one."""
    if dtypes.x is not dtypes.base:
        part = torch.mm(dy.to(dtypes.base), weight).to(dtypes.x)
        return part if dx is None else dx.add_(part)
    return torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)


def _columns_of(dy: torch.Tensor, group: list[Operands], starts: list[int]) -> list[torch.Tensor]:
    return [dy[:, start : start + op.weight.shape[0]] for op, start in zip(group, starts)]


def output_gradients(
    dy: torch.Tensor, u: torch.Tensor | None, group: list[Operands], starts: list[int], dtypes: Dtypes
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``du_j = s_j dy_j B_j`` and ``dB_j = dy_j^T u_j``, in one pass over dy where a kernel does that."""
    on_dy = _on_dy(group, starts)
    if dy.shape[0] >= LIBRARY_TOKENS and dtypes.x is dtypes.low and down_outer.covers(dy, on_dy, dtypes.low):
        return down_outer.down_outer(dy, u, on_dy, dtypes.low)  # type: ignore[arg-type]
    return down_gradient(dy, group, starts, dtypes), b_gradients(dy, u, group, starts, dtypes)


def _on_dy(group: list[Operands], starts: list[int]) -> Siblings:
    b = tuple([op.b.contiguous() for op in group])  # type: ignore[union-attr]
    return Siblings(b, tuple([op.scaling for op in group]), by_rows=True, starts=tuple(starts))


def b_gradients(dy, u, group: list[Operands], starts: list[int], dtypes: Dtypes) -> list[torch.Tensor]:
    """``dB_j = dy_j^T u_j``."""
    if dtypes.x is not dtypes.low:
        b = tuple([op.b.contiguous() for op in group])  # type: ignore[union-attr]
        return outer(dy, u, Siblings(b, (1.0,) * len(group), by_rows=True, starts=tuple(starts)), dtypes.low)
    place = layout(group)
    grads = []
    for part, op, at, n in zip(_columns_of(dy, group, starts), group, place.starts, place.slots):
        db = mm_wide(part.t(), u[:, at : at + n], op.b.dtype)  # type: ignore[union-attr]
        rank = op.b.shape[1]  # type: ignore[union-attr]
        grads.append(db if rank == n else db[:, :rank].contiguous())
    return grads


def down_gradient(dy: torch.Tensor, group: list[Operands], starts: list[int], dtypes: Dtypes) -> torch.Tensor:
    """``du_j = s_j dy_j B_j`` [T, slots] of projections with an adapter; ``starts``: their first columns in dy."""
    on_dy = _on_dy(group, starts)
    # One launch for all siblings is as fast as a GEMM each, but for the widest.
    ranks = tuple([m.shape[1] for m in on_dy.mats])
    if not by_library(dy, ranks, None, dtypes.low) or (
        dy.shape[1] <= _WIDE and use_triton(dy) and layout(group).width <= MAX_SLOTS
    ):
        return down(dy, on_dy, dtypes.low)
    _, packed = pack(on_dy, dtypes.low)
    if len(group) == 1:
        return torch.mm(_columns_of(dy, group, starts)[0], packed[0])
    place = layout(group)
    du = torch.empty((dy.shape[0], place.width), dtype=dtypes.low, device=dy.device)
    for part, matrix, at, n in zip(_columns_of(dy, group, starts), packed, place.starts, place.slots):
        torch.mm(part, matrix, out=du[:, at : at + n])
    return du


def a_gradients(
    du: torch.Tensor, kept: Input, group: list[Operands], masks: torch.Tensor | None, dtypes: Dtypes
) -> list[torch.Tensor]:
    """``dA_j = du_j^T dropout(x)``."""
    x, rstd, norm_weight = kept
    assert x is not None  # an adapter that trains reads it
    if rstd is not None:
        du = torch.mul(du, rstd.view(-1, 1), out=torch.empty_like(du))
    if not by_library(x, tuple([op.a.shape[0] for op in group]), masks, dtypes.low):  # type: ignore[union-attr]
        grads = outer(x, du, on_input(group, masks), dtypes.low)
        return grads if norm_weight is None else [da.mul_(norm_weight) for da in grads]
    da = mm_wide(du.t(), x, group[0].a.dtype)  # type: ignore[union-attr]
    if norm_weight is not None:
        da.mul_(norm_weight)
    return [da[at : at + op.a.shape[0]] for op, at in zip(group, layout(group).starts)]  # type: ignore[union-attr]


def _low_dx(du, low: Low, group: list[Operands], masks, dtypes: Dtypes) -> torch.Tensor:
    """``sum_j c_j (du_j A_j) * m_j`` [T, K], for the base GEMMs to accumulate on."""
    dx = torch.empty((du.shape[0], group[0].a.shape[1]), dtype=dtypes.x, device=du.device)  # type: ignore[union-attr]
    if low.packed is None:
        return expand(du, on_input(group, masks), dtypes.low, dx)
    # The packed A's carry the scaling, which du has already.
    undo = [1.0 / op.scaling if op.scaling else 0.0 for op in group]
    if len(set(undo)) == 1:
        return dx.addmm_(du, low.packed, beta=0, alpha=undo[0])
    place = layout(group)
    for i, (at, n) in enumerate(zip(place.starts, place.slots)):
        dx.addmm_(du[:, at : at + n], low.packed[at : at + n], beta=0 if i == 0 else 1, alpha=undo[i])
    return dx


def on_input(group: list[Operands], masks: torch.Tensor | None) -> Siblings:
    a = tuple([op.a.contiguous() for op in group])  # type: ignore[union-attr]
    return Siblings(a, tuple([keep_scale(op.dropout) for op in group]), masks=masks)


def base_grads(
    dy: torch.Tensor, x: torch.Tensor | None, op: Operands, needs: tuple[bool, ...]
) -> dict[str, torch.Tensor]:
    """Gradients of the base weight and of the biases, where needed; ``needs`` in the order of the tensor arguments."""
    need_weight, need_bias, _, _, need_lora_bias = needs
    grads = {}
    if need_weight:
        grads["weight"] = torch.mm(dy.t(), x).to(op.weight.dtype)  # type: ignore[arg-type]
    if need_bias or need_lora_bias:
        total = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        if need_bias:
            grads["bias"] = total.to(op.bias.dtype)  # type: ignore[union-attr]
        if need_lora_bias:
            grads["lora_bias"] = (total * op.scaling).to(op.lora_bias.dtype)  # type: ignore[union-attr]
    return grads


def input_gradient(
    dy: torch.Tensor, weights: Sequence[torch.Tensor], group: list[Operands], du: torch.Tensor | None, dtypes: Dtypes
) -> torch.Tensor | None:
    """``sum_j dy_j W_j + du_j A_j`` [T, K] in one GEMM, for siblings without masks; None where no kernel does that."""
    if du is None or not takes_gemm(dy, weights, group, dtypes):
        return None
    return gemm.gemm_dx(dy, weights, update=update_of(du, group, [op.a for op in group]))
