"""Dequantisation of bitsandbytes' 4-bit weights in plain PyTorch, with bitsandbytes' roundings.

A weight [N, K] is cut, row after row, into blocks of ``blocksize`` values. A value is kept as the index, four bits, of
one of 16 codes; what multiplies the codes of a block is its ``absmax``. Two values share a byte, the first in the high
half. With double quantisation the absmax is itself kept as a byte (Dettmers et al., "QLoRA", 2023, section 3):

``absmax[b] = code2[absmax8[b]] * absmax2[b // blocksize2] + offset``    product and sum rounded to float32
``w[i] = code[nibble[i]] * absmax[i // blocksize]``                      rounded to float32, then to the result's dtype
"""

from __future__ import annotations

import torch
from torch import Tensor

# The float32 codes in the order of their indices, as bitsandbytes' kernels have them. NF4: quantiles of the normal
# distribution. FP4: sign, two bits of exponent, one of mantissa; both zeros are +0.
CODES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": tuple(
        sign * value / 12 if value else 0.0
        for sign in (1.0, -1.0)
        for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}


def nested_absmax_ref(absmax8: Tensor, code2: Tensor, absmax2: Tensor, offset: Tensor, blocksize2: int) -> Tensor:
    """The float32 absmax of each block from its double quantisation.

    Args:
        absmax8: [blocks] uint8.
        code2: [256] float32.
        absmax2: [ceil(blocks / blocksize2)] float32.
        offset: one float32.
        blocksize2: blocks that share a value of absmax2.
    """
    scale = absmax2.repeat_interleave(blocksize2)[: absmax8.numel()]
    return code2[absmax8.long()] * scale + offset


def dequantize_4bit_ref(
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    *,
    quant_type: str,
    blocksize: int,
    through: torch.dtype | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K] in ``dtype``.

    Args:
        packed: ceil(N K / 2) bytes, in a tensor of any dtype.
        absmax: [ceil(N K / blocksize)] float32.
        shape: N, K.
        quant_type: "nf4" or "fp4".
        blocksize: even.
        through: a dtype that values are rounded to before they are brought to ``dtype``, or None.
    """
    n = shape[0] * shape[1]
    code = torch.tensor(CODES[quant_type], dtype=torch.float32, device=packed.device)
    raw = packed.detach().reshape(-1).view(torch.uint8)[: (n + 1) // 2]
    # A byte at a time: one look-up for both its values.
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)
    values = pairs[raw.long()].view(-1)[:n]
    full = n - n % blocksize
    values[:full].view(-1, blocksize).mul_(absmax[: full // blocksize, None])
    values[full:].mul_(absmax[full // blocksize :])
    return (values if through is None else values.to(through)).to(dtype).view(shape)
