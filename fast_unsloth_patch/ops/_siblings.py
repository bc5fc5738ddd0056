"""What LoRA projections that share an input have in common: dropout masks, forward and backward.

Large products go to the persistent GEMM (`gemm`) where it runs, which adds the updates as it goes; else to the library.

``y_j = x W_j^T + bias_j + u_j B_j^T`` with ``u_j = s_j dropout_j(x) A_j^T``. One projection (``lora_linear``), q, k, v
(``lora_qkv``), gate and up (``lora_mlp``) are one, three and two siblings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..device.dispatch import use_triton
from ..weights import dequantize_stacked
from ..weights.dense import DenseWeight
from . import down_outer, gemm
from ._operands import (
    TENSORS,
    Dtypes,
    Normed,
    OperandGrads,
    Operands,
    Projection,
    adapted,
    keep_scale,
    reads_input,
    rows,
)
from .dropout import draw_seed, dropout_bits
from .low_rank import (
    LIBRARY_TOKENS,
    MAX_SLOTS,
    Layout,
    Siblings,
    by_library,
    down,
    expand,
    layout_of,
    mm_wide,
    outer,
    pack,
)

_WIDE = 8192
_LONG = 8192


def draw_masks(
    x: torch.Tensor, group: list[Operands], seed: torch.Tensor | None, stream: int = 0
) -> torch.Tensor | None:
    """Independent keep masks for the adapters of ``group`` that drop out, int32 [J, T, words], or None if none does.

    Args:
        x: [T, K], the input that is masked (only its shape and device are used).
        group: the projections with an adapter.
        seed: from ``draw_seed``; None if nothing drops out.
        stream: distinguishes groups that share a seed; a group takes at most three.
    """
    if seed is None or all(op.dropout == 0.0 for op in group):
        return None
    kernel = use_triton(x)
    tokens, width = x.shape
    rates = [op.dropout for op in group]
    if len(set(rates)) == 1:
        return dropout_bits(seed, rates[0], len(rates), tokens, width, kernel=kernel, stream=stream)
    parts = [dropout_bits(seed, p, 1, tokens, width, kernel=kernel, stream=stream + i) for i, p in enumerate(rates)]
    return torch.cat(parts)


def seed_for(x: torch.Tensor, *projections: Projection) -> torch.Tensor | None:
    """A fresh seed if any adapter drops out."""
    for projection in projections:
        if projection.adapter is not None and projection.adapter.dropout > 0.0:
            return draw_seed(x.device)
    return None


class Input(NamedTuple):
    """The input of siblings as it is kept for backward.

    Args:
        x: [T, K] in the compute dtype, or what was normed to give it; None where backward reads neither.
        rstd: of the norm; None where x is the input itself.
        norm_weight: [K], of the norm.
    """

    x: torch.Tensor | None
    rstd: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None


def keep_input(x: torch.Tensor, x2d: torch.Tensor, dtypes: Dtypes, needs: tuple[bool, ...]) -> Input:
    """What to keep of the input ``x`` (``x2d`` [T, K] in the compute dtype), so that dA can be formed.

    Where x is a norm's result (`Normed`), the norm's own input does: with ``x = weight * (n * rstd)``,
    ``dA = du^T x = ((rstd * du)^T n) * weight``. Not for dW, which would need a pass, and in bf16 only: in fp16 a
    product of n overflows elsewhere than stock's.
    """
    if not reads_input(needs):
        return Input(None)
    normed = Normed.of(x)
    if (
        normed is None
        or any(needs[0::TENSORS])
        or not (dtypes.base is dtypes.low is normed.x.dtype is torch.bfloat16)
        or x2d.shape[0] < LIBRARY_TOKENS
    ):
        return Input(x2d)
    return Input(rows(normed.x, dtypes.base), normed.rstd, normed.weight)


def layout(group: list[Operands]) -> Layout:
    """Where the adapters of ``group`` are in u."""
    return layout_of(tuple([op.a.shape[0] for op in group if op.a is not None]))


class Low(NamedTuple):
    """What the forward keeps of its low-rank branch.

    Args:
        u: ``scaling * dropout(x) A^T`` of all adapters [T, slots]: the scaling is in it, so that y takes ``u B^T``
            and dB is ``dy^T u``.
        packed: the scaled A's in the compute dtype [slots, K], where library GEMMs run; else None.
    """

    u: torch.Tensor | None
    packed: torch.Tensor | None


class Memo(NamedTuple):
    """Carries `Low` from one call of an op to another call on the same operands (a checkpointed region's recompute).

    Args:
        low: u and packed of the earlier call, or None.
        keep: takes them for a later call.
    """

    low: tuple[torch.Tensor | None, ...] | None
    keep: Callable[..., None]


def project_down(
    x: torch.Tensor, group: list[Operands], masks: torch.Tensor | None, dtype: torch.dtype, memo: Memo | None = None
) -> Low:
    """u of the adapters of ``group``; empty if there is none. With masks, which are drawn anew, no ``memo`` counts."""
    if memo is None or masks is not None:
        return _project_down(x, group, masks, dtype)
    if memo.low is not None:
        return Low(*memo.low)
    low = _project_down(x, group, masks, dtype)
    memo.keep(*low)
    return low


def _project_down(x: torch.Tensor, group: list[Operands], masks: torch.Tensor | None, dtype: torch.dtype) -> Low:
    with_adapter = adapted(group)
    if not with_adapter:
        return Low(None, None)
    a = tuple([op.a.contiguous() for op in with_adapter])  # type: ignore[union-attr]
    if by_library(x, tuple([m.shape[0] for m in a]), masks, dtype):
        buffer, _ = pack(Siblings(a, tuple([op.scaling for op in with_adapter])), dtype)
        packed = buffer.view(-1, x.shape[1])
        return Low(torch.mm(x, packed.t()), packed)
    scales = tuple([op.scaling * keep_scale(op.dropout) for op in with_adapter])
    return Low(down(x, Siblings(a, scales, masks=masks), dtype), None)


def effective_bias(op: Operands, dtype: torch.dtype) -> torch.Tensor | None:
    """Base bias plus scaled LoRA bias, in the compute dtype."""
    if op.lora_bias is None:
        return None if op.bias is None else op.bias.to(dtype)
    bias = op.lora_bias * op.scaling
    return (bias if op.bias is None else op.bias + bias).to(dtype)


def base_values(
    group: list[Operands], dtype: torch.dtype, *, forward: bool
) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
    """The base weights' values in ``dtype``: each [N, K], and all one under another where packed ones were unpacked.

    Nobody keeps them: the forward's are gone when it has ended, backward unpacks anew.
    """
    weights = [op.weight for op in group]
    if all([isinstance(w, torch.Tensor) for w in weights]):
        return [w.to(dtype) for w in weights], None  # type: ignore[union-attr]
    frozen = [DenseWeight(w) if isinstance(w, torch.Tensor) else w for w in weights]
    if len({w.k_contiguous for w in frozen}) > 1:
        return [w.dequantize(dtype=dtype, direct=forward and w.direct) for w in frozen], None
    stacked = dequantize_stacked(frozen, dtype=dtype, forward=forward)
    return stacked.split([w.shape[0] for w in frozen]), stacked


def base_value(op: Operands, dtype: torch.dtype, *, forward: bool) -> torch.Tensor:
    """The values [N, K] of one base weight in ``dtype``; see `base_values`."""
    weight = op.weight
    if isinstance(weight, torch.Tensor):
        return weight.to(dtype)
    return weight.dequantize(dtype=dtype, direct=forward and weight.direct)


def _base_gemm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, *, accumulate: bool
) -> torch.Tensor:
    """``y (+)= x W^T + bias``, written into y."""
    if accumulate:
        y.addmm_(x, weight.t())
        return y if bias is None else y.add_(bias)
    return torch.mm(x, weight.t(), out=y) if bias is None else torch.addmm(bias, x, weight.t(), out=y)


def _update(u: torch.Tensor, group: list[Operands], factors: list[torch.Tensor | None]) -> gemm.Update:
    """What `gemm` adds to a product of ``group``: u [T, slots] and a factor each, None for one without an adapter."""
    starts = iter(layout(group).starts)
    return gemm.Update(u, factors, [0 if op.a is None else next(starts) for op in group])


def _by_gemm(x: torch.Tensor, weights: Sequence[torch.Tensor], group: list[Operands], dtypes: Dtypes) -> bool:
    """Whether the persistent GEMM takes a product of x with the weights of ``group`` and adds its updates.

    Measured (benchmarks/results/h200-notes.md): without an update the library is as fast, and with many columns of x
    the passes over the result that an update costs do not count.
    """
    ranks = [op.a.shape[0] for op in group if op.a is not None]
    return (
        bool(ranks)
        and dtypes.base is dtypes.low is dtypes.x
        and not any([op.bias is not None or op.lora_bias is not None for op in group])
        and gemm.covers(x, weights, ranks)
    )


def linear_forward(
    x: torch.Tensor,
    op: Operands,
    u: torch.Tensor | None,
    dtypes: Dtypes,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> None:
    """One projection of x [T, K] with its u [T, slots], written into ``out`` [T, N] of ``dtypes.y``.

    Args:
        residual: [T, N] of out's dtype, added to it: last, or in one rounding with all the rest. Rounded together with
            the update alone, it would swallow it: B is small, above all in the first steps.
    """
    weight, bias = base_value(op, dtypes.base, forward=True), effective_bias(op, dtypes.base)
    x = x.to(dtypes.base)
    if u is not None and x.shape[1] <= _LONG and dtypes.y is dtypes.base and _by_gemm(x, [weight], [op], dtypes):
        gemm.gemm(x, [weight], update=_update(u, [op], [op.b]), residual=residual, out=out)
        return
    if dtypes.y is dtypes.base:
        if u is not None:
            add_update(u, op, dtypes.low, out)
        _base_gemm(x, weight, bias, out, accumulate=u is not None)
    else:
        y = torch.empty(out.shape, dtype=dtypes.base, device=out.device)
        out.copy_(_base_gemm(x, weight, bias, y, accumulate=False))
        if u is not None:
            add_update(u, op, dtypes.low, out, add=True)
    if residual is not None:
        out.add_(residual)


def siblings_forward(
    x: torch.Tensor, group: list[Operands], low: Low, y: torch.Tensor, dtypes: Dtypes, *, updates_later: bool
) -> bool:
    """All projections of x [T, K] side by side into y [T, sum of N].

    Args:
        updates_later: the caller's next kernel can add the updates; then they may be left out.

    Returns:
        Whether the updates are in y.
    """
    place, start, at = layout(group), 0, 0
    weights, stacked = base_values(group, dtypes.base, forward=True)
    if low.u is not None and _by_gemm(x, weights, group, dtypes):
        gemm.gemm(x, weights, update=_update(low.u, group, [op.b for op in group]), out=y)
        return True
    biases = [effective_bias(op, dtypes.base) for op in group]
    if stacked is not None and updates_later and not any([bias is not None for bias in biases]):
        torch.mm(x, stacked.t(), out=y)
        return False
    for op, weight, bias in zip(group, weights, biases):
        part = y[:, start : start + weight.shape[0]]
        start += weight.shape[0]
        first = op.a is not None and not updates_later
        if first:
            u = low.u[:, place.starts[at] : place.starts[at] + place.slots[at]]  # type: ignore[index]
            add_update(u, op, dtypes.low, part)
            at += 1
        _base_gemm(x, weight, bias, part, accumulate=first)
    return not updates_later


def swiglu_forward(x: torch.Tensor, group: list[Operands], low: Low, dtypes: Dtypes) -> torch.Tensor | None:
    """``silu(gate) * up`` [T, I] of the siblings gate and up, neither of which is written; None where no kernel does
    that.
    """
    if low.u is None or x.shape[0] < gemm.MIN_TOKENS:
        return None
    weights, _ = base_values(group, dtypes.base, forward=True)
    if not _by_gemm(x, weights, group, dtypes):
        return None
    return gemm.gemm_swiglu(x, *weights, update=_update(low.u, group, [op.b for op in group]))


def input_gradient(
    dy: torch.Tensor, weights: Sequence[torch.Tensor], group: list[Operands], du: torch.Tensor | None, dtypes: Dtypes
) -> torch.Tensor | None:
    """``sum_j dy_j W_j + du_j A_j`` [T, K] in one GEMM, for siblings without masks; None where no kernel does that."""
    if du is None or not _by_gemm(dy, weights, group, dtypes):
        return None
    return gemm.gemm_dx(dy, weights, update=_update(du, group, [op.a for op in group]))


def add_update(
    u: torch.Tensor, op: Operands, dtype: torch.dtype, y: torch.Tensor, *, add: bool = False
) -> torch.Tensor:
    """``y (+)= u B^T`` for one adapter, written into y."""
    return expand(u, Siblings((op.b.contiguous(),), (1.0,), by_rows=True), dtype, y, add=add)  # type: ignore[union-attr]


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
