"""LoRA projections in plain PyTorch: the oracle of the tests and the baseline of the benchmarks.

Written with autograd-differentiable torch calls only, in the order PEFT's own forward uses, so that it can be run in
float64 and differentiated. Dropout masks are explicit arguments: a random mask could not be compared with anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .rope import rope_ref


def lora_linear_ref(x, proj, *, mask=None):
    """``x W^T + bias + scaling * (dropout(x) A^T) B^T (+ scaling * lora_bias)``.

    Args:
        x: [..., K].
        proj: a ``Projection``.
        mask: [..., K] of 0 and 1, or None; kept values are divided by ``1 - dropout`` as ``nn.Dropout`` does.
    """
    y = F.linear(x, proj.weight, proj.bias)
    if proj.adapter is None:
        return y
    adapter = proj.adapter
    dropped = x if mask is None else x * mask / (1.0 - adapter.dropout)
    return y + F.linear(F.linear(dropped, adapter.a), adapter.b, adapter.bias) * adapter.scaling


def lora_qkv_ref(x, q, k, v, cos, sin, head_dim, *, masks=(None, None, None)):
    """The three projections of an attention layer, split into heads, RoPE on q and k: [B, heads, S, head_dim] each."""
    heads = []
    for proj, mask in zip((q, k, v), masks):
        y = lora_linear_ref(x, proj, mask=mask)
        heads.append(y.view(*x.shape[:-1], -1, head_dim).transpose(1, 2))
    rotated = rope_ref(heads[0], heads[1], cos, sin)
    return rotated[0], rotated[1], heads[2]


def lora_mlp_ref(x, gate, up, down, *, residual=None, masks=(None, None, None)):
    """``(residual +) down(silu(gate(x)) * up(x))``."""
    hidden = F.silu(lora_linear_ref(x, gate, mask=masks[0])) * lora_linear_ref(x, up, mask=masks[1])
    y = lora_linear_ref(hidden, down, mask=masks[2])
    return y if residual is None else residual + y


def unpack_dropout_bits(bits: torch.Tensor, width: int) -> torch.Tensor:
    """Bit-packed keep masks [J, T, ceil(width / 32)] (int32) as booleans [J, T, width]: element k is bit k % 32 of
    word k // 32.
    """
    shifts = torch.arange(32, device=bits.device, dtype=torch.int32)
    return ((bits.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :width].bool()
