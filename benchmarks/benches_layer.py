"""More of what `kernels.py` measures, in the form of `benches.py`: documents, and passes that are fused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from benches import DTYPE, EPS, Bench, Call
from floor import attention_flops
from shapes import LORA_RANK, Shape
from torch import Tensor

from fast_unsloth_patch import reference
from fast_unsloth_patch.ops.attention import varlen_attention
from fast_unsloth_patch.ops.down_outer import down_outer
from fast_unsloth_patch.ops.lora_mlp import swiglu_of
from fast_unsloth_patch.ops.low_rank import Siblings, down, outer
from fast_unsloth_patch.ops.rms_norm import residual_rms_norm
from fast_unsloth_patch.ops.swiglu import swiglu_bwd
from fast_unsloth_patch.ops.swiglu_low_rank import covers, swiglu_down, swiglu_outer
from fast_unsloth_patch.reference.attention import varlen_attention_ref

DOCUMENTS = 16


def _randn(*size: int, device: str, grad: bool = True, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(size, device=device).to(dtype).requires_grad_(grad)


def _packed_attention(shape: Shape, tokens: int, device: str) -> Bench:
    """One row of 16 documents of one length (of 8 tokens at least).

    "dense" is what stock runs: a dense mask, with which no flash kernel runs, and for which grouped heads are copied
    out. "varlen": as documents of several lengths run. "rows": the documents as a batch.
    """
    count = min(DOCUMENTS, tokens // 8)
    length, scaling = tokens // count, shape.head_dim**-0.5
    ends = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
    document = torch.arange(tokens, device=device) // length
    mask = (document[:, None] == document).tril()[None, None]

    def as_batch(t: Tensor, rows: int) -> Tensor:
        return t.unflatten(0, (rows, -1)).transpose(1, 2)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        q, k, v = (as_batch(t, 1) for t in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling).transpose(1, 2).flatten(0, 1)

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (as_batch(t, count) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scaling)
        return out.transpose(1, 2).flatten(0, 1)

    flops = attention_flops(shape, [length] * count)
    impls: dict[str, Call] = {
        "fast": partial(varlen_attention, cu_seqlens=ends, max_length=length, scaling=scaling),
        # One call a document: the oracle in float64, for which a dense mask would take tens of GiB.
        "torch": partial(varlen_attention_ref, cu_seqlens=ends, scaling=scaling),
        "dense": dense,
        "varlen": partial(varlen_attention, cu_seqlens=ends, max_length=length + 1, scaling=scaling),
        "rows": rows,
    }
    heads = (shape.heads, *2 * [shape.kv_heads])
    inputs = tuple(_randn(tokens, n, shape.head_dim, device=device) for n in heads)
    return Bench(inputs, impls, {"forward": flops, "backward": 2.5 * flops}, gemm=True)


def _residual_rms_norm(shape: Shape, tokens: int, device: str) -> Bench:
    """The addition before a norm, and the norm."""
    x, delta = (_randn(tokens, shape.hidden, device=device) for _ in range(2))
    weight = (1 + 0.1 * torch.randn(shape.hidden, device=device)).to(DTYPE)

    def stock(x: Tensor, delta: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + delta
        return reference.rms_norm_ref(summed, w, EPS), summed

    # forward reads two and writes two; backward reads the sum and two gradients, and writes one
    work = {"forward": 4.0 * x.nbytes, "backward": 4.0 * x.nbytes}
    impls = {"fast": lambda x, delta, w: residual_rms_norm(x, delta, w, EPS), "torch": stock}
    return Bench((x, delta, weight), impls, work)


def _down_outer(shape: Shape, tokens: int, device: str) -> Bench:
    """dY B and dB of q, k, v; "apart": in two passes over dY."""
    widths = [shape.heads * shape.head_dim, *2 * [shape.kv_heads * shape.head_dim]]
    starts = (0, widths[0], widths[0] + widths[1])
    dy = _randn(tokens, sum(widths), device=device, grad=False)
    u = _randn(tokens, 3 * LORA_RANK, device=device, grad=False)
    b = tuple(_randn(n, LORA_RANK, device=device, grad=False, dtype=torch.float32) for n in widths)

    def siblings(b: tuple[Tensor, ...]) -> Siblings:
        return Siblings(b, (1.0,) * 3, True, starts)

    def fast(dy: Tensor, u: Tensor, *b: Tensor) -> tuple[Tensor, ...]:
        d, grads = down_outer(dy, u, siblings(b), DTYPE)
        return d, *grads

    def apart(dy: Tensor, u: Tensor, *b: Tensor) -> tuple[Tensor, ...]:
        return down(dy, siblings(b), DTYPE), *outer(dy, u, siblings(b), DTYPE)

    def stock(dy: Tensor, u: Tensor, *b: Tensor) -> tuple[Tensor, ...]:
        parts, us = dy.split(widths, 1), u.split(LORA_RANK, 1)
        d = torch.cat([torch.mm(part, m.to(part.dtype)) for part, m in zip(parts, b)], 1)
        wide = torch.promote_types(dy.dtype, torch.float32)
        return d, *(torch.mm(part.t(), one).to(wide) for part, one in zip(parts, us))

    impls = {"fast": fast, "torch": stock, "apart": apart}
    return Bench((dy, u, *b), impls, {"forward": float(dy.nbytes)})


def _swiglu_down(shape: Shape, tokens: int, device: str) -> Bench:
    """SwiGLU and h A^T of the down projection; "apart": a kernel and a library GEMM, h between them."""
    gu = _randn(tokens, 2 * shape.intermediate, device=device, grad=False)
    a = _randn(LORA_RANK, shape.intermediate, device=device, grad=False) * 0.02

    def apart(gu: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        h = swiglu_of(gu)
        return h, torch.mm(h, a.t())

    def stock(gu: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        gate, up = gu.chunk(2, 1)
        h = F.silu(gate) * up
        return h, torch.mm(h, a.t())

    impls = {"fast": swiglu_down if covers(gu, LORA_RANK) else apart, "torch": stock, "apart": apart}
    return Bench((gu, a), impls, {"forward": 1.5 * gu.nbytes})


def _swiglu_outer(shape: Shape, tokens: int, device: str) -> Bench:
    """SwiGLU's backward and dA of the down projection; "apart": a kernel and a library GEMM, h between them."""
    width = shape.intermediate
    dh = _randn(tokens, width, device=device, grad=False)
    gu = _randn(tokens, 2 * width, device=device, grad=False)
    du = _randn(tokens, LORA_RANK, device=device, grad=False)
    out = torch.empty_like(gu)

    def fast(dh: Tensor, gu: Tensor, du: Tensor) -> tuple[Tensor, ...]:
        g = swiglu_outer(dh, gu, out, du, LORA_RANK, torch.float32)
        return out, g

    def apart(dh: Tensor, gu: Tensor, du: Tensor) -> tuple[Tensor, ...]:
        (gate, up), h = gu.chunk(2, 1), torch.empty_like(dh)
        swiglu_bwd(dh, gate, up, out=tuple(out.chunk(2, 1)), product=h)
        return out, torch.mm(du.t(), h).float()

    def stock(dh: Tensor, gu: Tensor, du: Tensor) -> tuple[Tensor, ...]:
        gate, up = gu.chunk(2, 1)
        silu = F.silu(gate)
        dgate = torch.ops.aten.silu_backward(dh * up, gate)
        return torch.cat((dgate, dh * silu), 1), torch.mm(du.t(), silu * up).float()

    impls = {"fast": fast if covers(dh, LORA_RANK) else apart, "torch": stock, "apart": apart}
    return Bench((dh, gu, du), impls, {"forward": float(dh.nbytes + 2 * gu.nbytes)})


LAYER_OPS: dict[str, Callable[[Shape, int, str], Bench]] = {
    "packed_attention": _packed_attention,
    "residual_rms_norm": _residual_rms_norm,
    "down_outer": _down_outer,
    "swiglu_down": _swiglu_down,
    "swiglu_outer": _swiglu_outer,
}
