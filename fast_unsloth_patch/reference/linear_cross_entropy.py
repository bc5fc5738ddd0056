"""Linear + cross-entropy in plain PyTorch: the oracle of the tests and the baseline of the benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_cross_entropy_ref(hidden, weight, labels, *, num_items=None, ignore_index=-100):
    """``cross_entropy(hidden W^T, labels)`` with all logits in memory, as Hugging Face's ``ForCausalLMLoss`` has it.

    Args:
        hidden: [T, H].
        weight: [V, H].
        labels: [T] int64, already shifted.
        num_items: None for the mean over the labels that are not ``ignore_index``, else what their sum is divided by.
        ignore_index: label of the rows that do not count.
    Returns:
        The loss, fp32; fp64 for fp64 operands, so that the oracle is not limited by its own rounding.
    """
    logits = F.linear(hidden, weight)
    if logits.dtype is not torch.float64:
        logits = logits.float()
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)
    return loss if num_items is None else loss / num_items
