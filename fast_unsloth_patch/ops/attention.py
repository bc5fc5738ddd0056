"""Attention over packed documents: variable-length, causal, with a sliding window, by the library's kernels.

On CUDA it is the FlashAttention that torch ships (Dao, "FlashAttention-2", 2023) in its variable-length form, through
the aten operator that ``torch.nn.attention.varlen.varlen_attn`` wraps. That module is younger than torch 2.9, asks for
``enable_gqa`` in some versions and does not know it in others, and adds two custom operators of host time to every
call; the operator has had one signature since torch 2.9, a derivative of its own, and serves grouped heads and windows
throughout. Whoever activates FlashAttention-3 or 4 in torch (``activate_flash_attention_impl``) replaces the same
operator, and so what runs here. As stock's flash attention does, backward adds into dq in no fixed order unless
``torch.use_deterministic_algorithms(True)`` is set (with ``warn_only`` PyTorch only warns).

Documents of one length are the rows of a batch, and run as such by sdpa, as a batch would: PyTorch may choose a kernel
that is faster there (cuDNN's, which on an H200 is twice as fast).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from ..reference.attention import varlen_attention_ref

_FLASH_DTYPES = (torch.bfloat16, torch.float16)
# fmt: off
_ARGUMENTS = [
    "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask",
    "scale", "window_size_left", "window_size_right",
]
# fmt: on


@cache
def _has_flash() -> bool:
    """Does this build of torch have the operator, with the arguments that are passed below?"""
    operator = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if operator is None or not torch.backends.cuda.is_flash_attention_available():
        return False
    known = [argument.name for argument in operator.default._schema.arguments]
    return known[: len(_ARGUMENTS)] == _ARGUMENTS


def varlen_unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `varlen_attention` does not cover heads of this size and dtype on this device, or None if it does."""
    if device.type != "cuda":
        return None
    if dtype not in _FLASH_DTYPES:
        return f"attention in {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"head size {head_dim}"
    # The script's switch of the same kernel under sdpa.
    if not torch.backends.cuda.flash_sdp_enabled():
        return "flash attention disabled"
    return None if _has_flash() else "no flash attention"


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
    *,
    scaling: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention inside each of the documents that lie one after another in T.

    ``out_i = sum_j softmax_j(scaling q_i k_j) v_j`` over the tokens j <= i of i's document, of these the last
    ``window`` only. No mask is built, no score outside a document is computed, and the host waits for nothing.

    Args:
        q: [T, Hq, D], any strides with a contiguous last dimension; on CUDA bf16 or fp16, D a multiple of 8 up to 256.
        k, v: [T, Hk, D], Hq a multiple of Hk, likewise.
        cu_seqlens: [documents + 1] int32 on the same device, rising from 0 to T.
        max_length: of the longest document; not checked on CUDA, where a larger one is only slower unless it is T over
            the number of documents.
        scaling: of the scores.
        window: a token sees that many tokens, itself included; None: its whole document up to itself.

    Returns:
        [T, Hq, D] contiguous, of q's dtype; scores and sums are fp32.
    """
    tokens, documents = q.shape[0], cu_seqlens.numel() - 1
    if window is not None and window >= max_length:
        window = None
    if window is None and documents * max_length == tokens and not torch.are_deterministic_algorithms_enabled():
        grouped = q.shape[1] != k.shape[1]
        q, k, v = (t.unflatten(0, (documents, max_length)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1).contiguous()
    if not q.is_cuda:
        return varlen_attention_ref(q, k, v, cu_seqlens, scaling=scaling, window=window)
    return torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_length,
        max_length,
        0.0,
        True,
        False,
        scale=scaling,
        # Flash counts the tokens before the query's own.
        window_size_left=-1 if window is None else window - 1,
        # Implied by is_causal. Said, or documents of one token with grouped heads take a path without a backward.
        window_size_right=0,
    )[0]
