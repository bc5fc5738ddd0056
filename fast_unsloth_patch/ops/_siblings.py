"""What LoRA projections that share an input have in common: dropout masks, what is kept for backward, forward.

Large products go to the persistent GEMM (`gemm`) where it runs, which adds the updates as it goes; else to the library.

``y_j = x W_j^T + bias_j + u_j B_j^T`` with ``u_j = s_j dropout_j(x) A_j^T``. One projection (``lora_linear``), q, k, v
(``lora_qkv``), gate and up (``lora_mlp``) are one, three and two siblings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..device.dispatch import use_triton
from ..weights import dequantize_stacked
from ..weights.dense import DenseWeight
from . import gemm
from ._operands import (
    TENSORS,
    Dtypes,
    Normed,
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
    Layout,
    Siblings,
    by_library,
    down,
    expand,
    layout_of,
    pack,
)

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


# Each base weight, and all one under another where packed ones were unpacked.
Values = tuple[Sequence[torch.Tensor], torch.Tensor | None]


def base_values(group: list[Operands], dtype: torch.dtype, *, forward: bool) -> Values:
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


def update_of(u: torch.Tensor, group: list[Operands], factors: list[torch.Tensor | None]) -> gemm.Update:
    """What `gemm` adds to a product of ``group``: u [T, slots] and a factor each, None for one without an adapter."""
    starts = iter(layout(group).starts)
    return gemm.Update(u, factors, [0 if op.a is None else next(starts) for op in group])


def takes_gemm(x: torch.Tensor, weights: Sequence[torch.Tensor], group: list[Operands], dtypes: Dtypes) -> bool:
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
    if u is not None and x.shape[1] <= _LONG and dtypes.y is dtypes.base and takes_gemm(x, [weight], [op], dtypes):
        gemm.gemm(x, [weight], update=update_of(u, [op], [op.b]), residual=residual, out=out)
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
    x: torch.Tensor,
    group: list[Operands],
    values: Values,
    low: Low,
    y: torch.Tensor,
    dtypes: Dtypes,
    *,
    updates_later: bool,
) -> bool:
    """All projections of x [T, K] side by side into y [T, sum of N].

    Args:
        values: `base_values` of the group.
        updates_later: the caller's next kernel can add the updates; then they may be left out.

    Returns:
        Whether the updates are in y.
    """
    place, start, at = layout(group), 0, 0
    weights, stacked = values
    if low.u is not None and takes_gemm(x, weights, group, dtypes):
        gemm.gemm(x, weights, update=update_of(low.u, group, [op.b for op in group]), out=y)
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


def swiglu_forward(
    x: torch.Tensor, group: list[Operands], values: Values, low: Low, dtypes: Dtypes
) -> torch.Tensor | None:
    """``silu(gate) * up`` [T, I] of the siblings gate and up, neither of which is written; None where no kernel does
    that.
    """
    weights, _ = values
    if low.u is None or not takes_gemm(x, weights, group, dtypes):
        return None
    return gemm.gemm_swiglu(x, *weights, update=update_of(low.u, group, [op.b for op in group]))


def add_update(
    u: torch.Tensor, op: Operands, dtype: torch.dtype, y: torch.Tensor, *, add: bool = False
) -> torch.Tensor:
    """``y (+)= u B^T`` for one adapter, written into y."""
    return expand(u, Siblings((op.b.contiguous(),), (1.0,), by_rows=True), dtype, y, add=add)  # type: ignore[union-attr]
