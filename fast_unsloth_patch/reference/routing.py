"""Routing of tokens to experts in plain PyTorch: rows grouped by expert, each group padded to whole blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def route_ref(top_k_index: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """A stable sort of the pairs (token, choice) by expert.

    Args:
        top_k_index: [T, k], integers; a pair with an index outside 0 .. num_experts - 1 gets no row.
        num_experts: E.
        block: each expert's rows are padded to a multiple of it.

    Returns:
        pairs [R], rows [T, k], ends [E], int32, as `ops.routing.Routing` describes them. Nothing
        is read back from the device.
    """
    device, n_pairs = top_k_index.device, top_k_index.numel()
    n_rows = (n_pairs + min(num_experts, n_pairs) * (block - 1)) // block * block
    index = top_k_index.reshape(-1).long()
    index = index.masked_fill((index < 0) | (index >= num_experts), num_experts)
    counts = (index[:, None] == torch.arange(num_experts, device=device)).sum(0)
    ends = ((counts + block - 1) // block * block).cumsum(0)
    # Per expert: where its rows begin, and how many pairs come before its own in their sorted order.
    zero = counts.new_zeros(1)
    first, before = torch.cat([zero, ends]), torch.cat([zero, counts.cumsum(0)])
    by_expert = index.argsort(stable=True)
    expert = index[by_expert]
    row = first[expert] + torch.arange(n_pairs, device=device) - before[expert]
    # The pairs of nobody come last, into one row too many.
    row = row.masked_fill(expert == num_experts, n_rows)
    pairs = torch.full((n_rows + 1,), -1, device=device).index_copy_(0, row, by_expert)[:n_rows]
    rows = torch.empty_like(row).index_copy_(0, by_expert, row.masked_fill(row == n_rows, -1))
    return pairs.int(), rows.view(top_k_index.shape).int(), ends.int()


def _accumulation(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype is torch.float64 for t in tensors) else torch.float32


def gather_ref(x: Tensor, pairs: Tensor, k: int, scale: Tensor | None = None) -> Tensor:
    """``out[r] = x[pairs[r] // k] (* scale[pair])``, zeros where pairs is -1; differentiable.

    Args:
        x: [T, H].
        pairs: [R].
        k: choices a token has.
        scale: [T, k]; the product is taken in float32 (float64 if either is) and rounded once, to x's dtype.
    """
    pair = pairs.long().clamp_min(0)
    out = x[pair // k]
    if scale is not None:
        kind = _accumulation(x, scale)
        out = (out.to(kind) * scale.reshape(-1)[pair, None].to(kind)).to(x.dtype)
    return out.masked_fill((pairs < 0)[:, None], 0.0)


def combine_ref(
    z: Tensor,
    rows: Tensor,
    weights: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``out[t] = sum_j (weights[t, j] *) z[rows[t, j]] (+ residual[t])``, summed in that order; differentiable.

    Args:
        z: [R, H].
        rows: [T, k]; -1 counts as a row of zeros.
        weights: [T, k].
        residual: [T, H].
        dtype: of the result, by default z's; the sum is float32 (float64 if an operand is), rounded once.
    """
    kind = _accumulation(z, weights, residual)
    total = z.new_zeros((rows.shape[0], z.shape[1]), dtype=kind)
    for j in range(rows.shape[1]):
        row = rows[:, j].long()
        chosen = z[row.clamp_min(0)].masked_fill((row < 0)[:, None], 0.0).to(kind)
        total = total + (chosen if weights is None else chosen * weights[:, j, None].to(kind))
    if residual is not None:
        total = total + residual.to(kind)
    return total.to(z.dtype if dtype is None else dtype)
