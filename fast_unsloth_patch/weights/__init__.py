"""Frozen base weights: what the linear ops multiply by, however it is stored.

One kind of storage is one file: `dense`, `nf4`, `gptq`. An op asks a weight for its shape and for its values in a
buffer of its own choosing, and knows nothing of how they are packed. Nothing here is trainable, and nothing is kept:
the values of a packed weight exist while the op that asked for them uses them.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import FastPatchError

__all__ = ["FrozenWeight", "WeightLayoutError", "check_outs", "dequantize_stacked"]


class WeightLayoutError(FastPatchError, ValueError):
    """A packed weight, or the buffer for its values, that does not fit: which tensor, expected and found."""


class FrozenWeight(Protocol):
    """What an op may ask of a weight that gets no gradient."""

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]: output and input features, as of ``nn.Linear.weight``."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values unless another is asked for."""

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What the layer computes in without autocast, its input cast there and its output back; None: in its input's
        dtype, without casts.
        """

    @property
    def direct(self) -> bool:
        """Whether the layer's forward rounds the values once. (Its backward always takes them as `dequantize` does
        without ``direct``.)
        """

    @property
    def device(self) -> torch.device:
        """Where the storage is and the values will be."""

    @property
    def k_contiguous(self) -> bool:
        """Which dimension of a buffer for the values has unit stride: K, else N. The other may have any."""

    def dequantize(
        self, out: Tensor | None = None, dtype: torch.dtype | None = None, *, direct: bool = False
    ) -> Tensor:
        """The values [N, K], in ``out`` if that is given; ``direct``: rounded once, to the result's dtype.

        A kind that can write several weights in one launch has a static ``dequantize_many(weights, outs, direct=...)``
        besides.
        """

    def identity(self) -> tuple[Hashable, ...]:
        """Equal for two descriptions of the same storage, while both exist; for the fingerprint of a plan."""


def check_outs(weights: Sequence[FrozenWeight], outs: Sequence[Tensor]) -> None:
    """Raises WeightLayoutError unless every buffer can take the values of its weight."""
    for weight, out in zip(weights, outs, strict=True):
        if (
            tuple(out.shape) != tuple(weight.shape)
            or out.device != weight.device
            or not out.is_floating_point()
            or (out.shape[1] > 1 and out.stride(1) != 1)
        ):
            raise WeightLayoutError(
                f"out: expected floating {list(weight.shape)} on {weight.device} with unit stride in its rows, "
                f"found {out.dtype} {list(out.shape)} on {out.device}, strides {list(out.stride())}"
            )


def dequantize_stacked(
    weights: Sequence[FrozenWeight],
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    forward: bool = False,
) -> Tensor:
    """The values of weights with the same K, one under another: q, k, v or gate, up for one GEMM.

    Args:
        weights: of any kinds; neighbours of one kind are handed over together.
        out: [sum of N, K], or None for a new buffer.
        dtype: of a new buffer; default the first weight's.
        forward: the values that the layers' own forward multiplies by, else those of their backward.

    Returns:
        The buffer.

    Raises:
        WeightLayoutError: widths or orders that differ, or a buffer that does not fit.
    """
    rows, first = [weight.shape[0] for weight in weights], weights[0]
    n, k = sum(rows), first.shape[1]
    if any(weight.shape[1] != k or weight.k_contiguous is not first.k_contiguous for weight in weights):
        found = [f"{list(weight.shape)}{'' if weight.k_contiguous else ' by columns'}" for weight in weights]
        raise WeightLayoutError(f"weights to stack: expected one K and one order, found {', '.join(found)}")
    if out is None:
        dtype = dtype or first.dtype
        out = torch.empty((n, k) if first.k_contiguous else (k, n), dtype=dtype, device=first.device)
        out = out if first.k_contiguous else out.t()
    elif tuple(out.shape) != (n, k):
        raise WeightLayoutError(f"out: expected {[n, k]}, found {list(out.shape)}")
    alike = itertools.groupby(zip(weights, out.split(rows)), key=lambda pair: (type(pair[0]), pair[0].direct))
    for (kind, direct), group in alike:
        pairs = list(group)
        together = getattr(kind, "dequantize_many", None)
        if together is not None:
            together(*zip(*pairs), direct=forward and direct)
        else:
            for weight, part in pairs:
                weight.dequantize(out=part, direct=forward and direct)
    return out
