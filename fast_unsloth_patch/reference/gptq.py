"""Dequantisation of GPTQ weights in plain PyTorch, with the roundings of gptqmodel's TorchLinear."""

from __future__ import annotations

import torch
from torch import Tensor


def gptq_unpack_ref(words: Tensor, bits: int, dim: int) -> Tensor:
    """The unsigned fields of int32 ``words``, lowest bits first, along ``dim`` (0 or 1), which gets 32 / bits times as
    long; int32.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    # A shift to the right of a negative int32 fills with ones; the mask takes them away.
    fields = (words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (1 - dim))) & ((1 << bits) - 1)
    return fields.flatten(dim, dim + 1)


def v1_to_v2_addend(bits: int) -> int:
    """What makes words of zero points stored as ``zero - 1`` (v1, the checkpoint's format) such of ``zero`` (v2): a one
    in every field.

    gptqmodel adds it to whole words, and takes it off them to write a checkpoint: a field of all ones carries into its
    neighbour, which undoes the borrow that a zero point of 0 left there.
    """
    return ((1 << 32) - 1) // ((1 << bits) - 1)


def gptq_dequantize_ref(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    *,
    bits: int,
    qzero_format: int = 2,
    dtype: torch.dtype | None = None,
    direct: bool = False,
) -> Tensor:
    """``W[k, n] = scales[g[k], n] (q[k, n] - zero[g[k], n])``

    Args:
        qweight: [ceil(K bits / 32), N] int32, packed along K.
        qzeros: [G, ceil(N bits / 32)] int32, packed along N.
        scales: [G, N] float16, bfloat16 or float32.
        g_idx: [K] group of each row, integers in [-G, G).
        bits: 2, 4 or 8.
        qzero_format: 1 if the zero points are stored less one, else 2.
        dtype: of the result; by default that of scales.
        direct: round the product once, to ``dtype``; else to the dtype of scales first.

    Returns:
        [K, N]. The product is exact in float32: a scale has at most 11 bits in float16, the difference at most 9.
    """
    if qzero_format == 1:
        qzeros = qzeros + v1_to_v2_addend(bits)
    groups = g_idx.long()
    q = gptq_unpack_ref(qweight, bits, 0)[: g_idx.shape[0]]
    zeros = gptq_unpack_ref(qzeros, bits, 1)[:, : scales.shape[1]]
    w = scales.float()[groups] * (q - zeros[groups]).float()
    if not direct:
        w = w.to(scales.dtype)
    return w.to(scales.dtype if dtype is None else dtype)
