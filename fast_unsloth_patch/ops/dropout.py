"""Keep masks of LoRA dropout, one bit an element.

PEFT drops the input of every projection independently: seven masks a Llama layer, 319 million draws at 8192 tokens of
the 8B shape. Drawing them again in every pass that needs them would cost more than the passes, so the mask is drawn
once where the forward (or its recompute) runs and kept as one bit an element until that layer's backward.

A word of 32 keep bits is a bit-sliced Bernoulli variable: fold random words from the least significant bit of the
16-bit threshold upwards, ``r <- r | w`` where the threshold's bit is 1 and ``r <- r & w`` where it is 0; each bit of
r is then 1 with probability threshold / 65536. That is one operation a word instead of 32 comparisons. The random
words are Philox-4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), all four
outputs used.
"""

from __future__ import annotations

import torch

from ..device.launch import jit, launch, tl
from ..reference.lora import unpack_dropout_bits

_WORDS_PER_PROGRAM = 512


@jit
def _philox7(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(7):
        hi0 = tl.umulhi(c0, 0xD2511F53)
        lo0 = c0 * 0xD2511F53
        hi1 = tl.umulhi(c2, 0xCD9E8D57)
        lo1 = c2 * 0xCD9E8D57
        c0 = hi1 ^ c1 ^ k0
        c1 = lo1
        c2 = hi0 ^ c3 ^ k1
        c3 = lo0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@jit(do_not_specialize=["n_words"])
def _dropout_bits_kernel(
    bits_ptr, seed_ptr, n_words, STREAM: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    low = (offs & 0xFFFFFFFF).to(tl.uint32)
    high = (offs >> 32).to(tl.uint32)
    kept = tl.zeros([BLOCK], tl.uint32)
    for call in tl.static_range(4):
        # The four lowest threshold bits come from the first call: skip calls whose bits cannot matter (trailing zeros).
        if ((THRESHOLD >> (4 * call)) & 15) != 0 or (THRESHOLD & ((1 << (4 * call)) - 1)) != 0:
            w0, w1, w2, w3 = _philox7(low, high, low * 0 + call, low * 0 + STREAM, k0, k1)
            kept = (kept | w0) if (THRESHOLD >> (4 * call)) & 1 else (kept & w0)
            kept = (kept | w1) if (THRESHOLD >> (4 * call + 1)) & 1 else (kept & w1)
            kept = (kept | w2) if (THRESHOLD >> (4 * call + 2)) & 1 else (kept & w2)
            kept = (kept | w3) if (THRESHOLD >> (4 * call + 3)) & 1 else (kept & w3)
    tl.store(bits_ptr + offs, kept.to(tl.int32, bitcast=True), mask=offs < n_words)


def draw_seed(device: torch.device) -> torch.Tensor:
    """One int64 from torch's own generator of the device: reproducible by ``manual_seed``, restored by checkpointing,
    no host sync.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout_bits(seed: torch.Tensor, p: float, masks: int, tokens: int, width: int, *, kernel: bool, stream: int = 0):
    """Bit-packed keep masks.

    Args:
        seed: [1] int64, from ``draw_seed``.
        p: probability of dropping, 0 <= p <= 1; the probability used is the nearest multiple of 2**-16.
        masks: J, number of independent masks.
        tokens, width: T and K, the shape that is masked.
        kernel: run the Triton kernel; False: draw the same distribution (another sequence) from torch's generator.
        stream: distinguishes masks drawn from one seed.

    Returns:
        int32 [J, T, ceil(K / 32)]; element k of a row is kept when bit k % 32 of word k // 32 is set.
    """
    words = (width + 31) // 32
    threshold = 65536 - round(p * 65536)  # keep probability in units of 2**-16
    bits = torch.empty((masks, tokens, words), dtype=torch.int32, device=seed.device)
    if threshold >= 65536:
        return bits.fill_(-1)
    if not kernel:
        return _dropout_bits_reference(seed, threshold, bits, stream)
    n_words = bits.numel()
    grid = (max(1, (n_words + _WORDS_PER_PROGRAM - 1) // _WORDS_PER_PROGRAM),)
    launch(_dropout_bits_kernel, grid, (bits, seed, n_words), (stream, threshold, _WORDS_PER_PROGRAM), num_warps=4)
    return bits


def _dropout_bits_reference(seed: torch.Tensor, threshold: int, bits: torch.Tensor, stream: int) -> torch.Tensor:
    """The same distribution from torch's generator, seeded by the same number (another sequence than the kernel's)."""
    generator = torch.Generator(device=bits.device)
    generator.manual_seed((int(seed.item()) + 0x9E3779B9 * stream) & (2**63 - 1))
    draws = torch.randint(0, 65536, (*bits.shape, 32), dtype=torch.int32, device=bits.device, generator=generator)
    weights = 1 << torch.arange(32, device=bits.device, dtype=torch.int64)
    packed = ((draws < threshold).long() * weights).sum(-1)
    return bits.copy_(torch.where(packed >= 2**31, packed - 2**32, packed))


def apply_dropout_bits(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """``x`` [T, K] with the dropped elements zeroed (not rescaled); ``bits`` [T, ceil(K / 32)]."""
    return x * unpack_dropout_bits(bits.unsqueeze(0), x.shape[-1])[0].to(x.dtype)
