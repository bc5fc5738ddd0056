"""What `kernels.py` measures: each op at one size, its operands, who computes it, and the work that nobody can avoid.

PyTorch's side is what stock runs: the formulas of `reference`, and for LoRA what PEFT does, ``F.linear(x, W) +
lora_B(lora_A(dropout(x))) * scaling``. The LoRA ops have fp32 adapters under bf16 autocast, as under Trainer; PEFT's
cast of x to the adapters' dtype is left out, to PyTorch's advantage.
"""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from quantised import BITS, BLOCKSIZE, BLOCKSIZE2, GROUP, packed_bytes
from shapes import LORA_ALPHA, LORA_RANK, Shape
from torch import Tensor

from fast_unsloth_patch import reference
from fast_unsloth_patch.ops.dropout import draw_seed, dropout_bits
from fast_unsloth_patch.ops.linear_cross_entropy import linear_cross_entropy, prepare_labels
from fast_unsloth_patch.ops.lora_linear import Adapter, Projection, lora_linear
from fast_unsloth_patch.ops.lora_mlp import lora_mlp
from fast_unsloth_patch.ops.lora_qkv import lora_qkv
from fast_unsloth_patch.ops.low_rank import Siblings, down, expand, mm_wide, outer, pack
from fast_unsloth_patch.ops.rms_norm import rms_norm
from fast_unsloth_patch.ops.rope import rope
from fast_unsloth_patch.ops.swiglu import swiglu
from fast_unsloth_patch.reference.gptq import gptq_dequantize_ref
from fast_unsloth_patch.reference.linear_cross_entropy import linear_cross_entropy_ref
from fast_unsloth_patch.reference.lora import lora_linear_ref, lora_mlp_ref, lora_qkv_ref, unpack_dropout_bits
from fast_unsloth_patch.reference.nf4 import dequantize_4bit_ref, nested_absmax_ref
from fast_unsloth_patch.weights import dequantize_stacked
from fast_unsloth_patch.weights.gptq import GPTQWeight
from fast_unsloth_patch.weights.nf4 import Nf4Weight

DTYPE = torch.bfloat16
EPS = 1e-5
SCALING = LORA_ALPHA / LORA_RANK
DROPOUT = 0.1

Call = Callable[..., Any]


class Bench(NamedTuple):
    """One op at one size."""

    inputs: tuple[Tensor, ...]  # those that require grad are differentiated
    impls: dict[str, Call]  # "fast", "torch" (also the float64 oracle) and others
    work: dict[str, float]  # of "forward", "backward" or "both" in one call: bytes, or operations if `gemm`
    gemm: bool = False
    oracle: Call | None = None  # where "torch" is none: it draws other random numbers
    # Of a forward whose result is random, or exact: how far off, less than 1 being allowed.
    errors: Callable[[Call], float] | None = None
    no_output: bool = False  # the forward only prepares the backward


def _liger(module: str, name: str) -> Call | None:
    try:
        found = importlib.import_module(f"liger_kernel.ops.{module}")
    except ImportError:
        return None
    apply: Call = getattr(found, name).apply
    return apply


def _impls(fast: Call, torch_: Call, liger: Call | None = None, **others: Call) -> dict[str, Call]:
    return {"fast": fast, "torch": torch_} | ({"liger": liger} if liger else {}) | others


def _randn(*shape: int, device: str, grad: bool = True, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_(grad)


def _both_ways(forward: float, backward: float) -> dict[str, float]:
    return {"forward": forward, "backward": backward}


def _rms_norm(shape: Shape, tokens: int, device: str, *, trainable: bool) -> Bench:
    x = _randn(tokens, shape.hidden, device=device)
    weight = (1 + 0.1 * torch.randn(shape.hidden, device=device)).to(DTYPE).requires_grad_(trainable)
    liger = _liger("rms_norm", "LigerRMSNormFunction")
    return Bench(
        (x, weight),
        _impls(
            lambda x, w: rms_norm(x, w, EPS),
            lambda x, w: reference.rms_norm_ref(x, w, EPS),
            liger and (lambda x, w: liger(x, w, EPS)),
        ),
        _both_ways(2.0 * x.nbytes, 3.0 * x.nbytes),
    )


def _angles(seq: int, head_dim: int, device: str) -> tuple[Tensor, Tensor]:
    positions = torch.arange(seq, device=device)[:, None]
    frequencies = 1e4 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.cat([positions * frequencies] * 2, dim=-1)[None]
    return angles.cos().to(DTYPE), angles.sin().to(DTYPE)


def _sequences(tokens: int) -> tuple[int, int]:
    """Batch and sequence length."""
    seq = min(tokens, 2048)
    return tokens // seq, seq


def _rope(shape: Shape, tokens: int, device: str) -> Bench:
    batch, seq = _sequences(tokens)
    # As attention has them: [B, S, heads, D] seen as [B, heads, S, D].
    q, k = (
        _randn(batch, seq, heads, shape.head_dim, device=device, grad=False).transpose(1, 2).requires_grad_()
        for heads in (shape.heads, shape.kv_heads)
    )
    moved = 2.0 * (q.nbytes + k.nbytes)
    return Bench(
        (q, k, *_angles(seq, shape.head_dim, device)),
        _impls(rope, reference.rope_ref, _liger("rope", "LigerRopeFunction")),
        _both_ways(moved, moved),
    )


def _swiglu(shape: Shape, tokens: int, device: str) -> Bench:
    gate, up = (_randn(tokens, shape.intermediate, device=device) for _ in range(2))
    return Bench(
        (gate, up),
        _impls(swiglu, reference.swiglu_ref, _liger("swiglu", "LigerSiLUMulFunction")),
        _both_ways(3.0 * gate.nbytes, 5.0 * gate.nbytes),
    )


# The factors of a projection as leaves of a bench: weight (frozen), A, B.
FACTORS = 3


def _factors(n: int, k: int, device: str) -> tuple[Tensor, ...]:
    return (
        _randn(n, k, device=device, grad=False, scale=k**-0.5),
        _randn(LORA_RANK, k, device=device, scale=k**-0.5, dtype=torch.float32),
        _randn(n, LORA_RANK, device=device, scale=0.1, dtype=torch.float32),
    )


def _projections(factors: tuple[Tensor, ...], dropout: float = 0.0) -> list[Projection]:
    groups = (factors[i : i + FACTORS] for i in range(0, len(factors), FACTORS))
    return [Projection(weight, None, Adapter(a, b, SCALING, dropout)) for weight, a, b in groups]


def _autocast(fn: Call, device: str) -> Call:
    def call(*inputs: Any) -> Any:
        with torch.autocast(device, DTYPE):
            return fn(*inputs)

    return call


def _lora_flops(tokens: int, *sizes: tuple[int, int]) -> tuple[float, float]:
    """Forward and backward of projections [N, K] with frozen weights: base GEMMs, and the adapters' two and four."""
    base = sum(2.0 * tokens * n * k for n, k in sizes)
    skinny = sum(2.0 * tokens * LORA_RANK * (n + k) for n, k in sizes)
    return base + skinny, base + 2 * skinny


def _lora_linear(shape: Shape, tokens: int, device: str, *, module: str) -> Bench:
    width = shape.intermediate if module == "down" else shape.heads * shape.head_dim
    size = shape.hidden, width
    return Bench(
        (_randn(tokens, width, device=device), *_factors(*size, device)),
        _impls(
            _autocast(lambda x, *f: lora_linear(x, *_projections(f)), device),
            _autocast(lambda x, *f: lora_linear_ref(x, *_projections(f)), device),
        ),
        _both_ways(*_lora_flops(tokens, size)),
        gemm=True,
    )


def _lora_qkv(shape: Shape, tokens: int, device: str) -> Bench:
    batch, seq = _sequences(tokens)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = [(n, shape.hidden) for n in (queries, keys, keys)]
    factors = [t for size in sizes for t in _factors(*size, device)]

    def call(fn: Call, x: Tensor, cos: Tensor, sin: Tensor, *f: Tensor) -> Any:
        return fn(x, *_projections(f), cos, sin, shape.head_dim)

    return Bench(
        (_randn(batch, seq, shape.hidden, device=device), *_angles(seq, shape.head_dim, device), *factors),
        _impls(_autocast(partial(call, lora_qkv), device), _autocast(partial(call, lora_qkv_ref), device)),
        _both_ways(*_lora_flops(tokens, *sizes)),
        gemm=True,
    )


def _peft_mlp(x: Tensor, *factors: Tensor) -> Tensor:
    """With PyTorch's own dropout, as PEFT has it."""

    def linear(x: Tensor, p: Projection) -> Tensor:
        adapter = p.adapter
        assert adapter is not None
        dropped = F.dropout(x, adapter.dropout)
        return F.linear(x, p.weight) + F.linear(F.linear(dropped, adapter.a), adapter.b) * adapter.scaling

    gate, up, last = _projections(factors, DROPOUT)
    return linear(F.silu(linear(x, gate)) * linear(x, up), last)


def _masked_mlp(x: Tensor, *factors: Tensor) -> Tensor:
    """The oracle under dropout: with the masks that `lora_mlp` draws from the same state of the generator."""
    gate, up, last = _projections(factors, DROPOUT)
    seed = draw_seed(x.device)

    def drawn(count: int, width: int, stream: int) -> Tensor:
        bits = dropout_bits(seed, DROPOUT, count, x.shape[0], width, kernel=x.is_cuda, stream=stream)
        return unpack_dropout_bits(bits, width)

    masks = *drawn(2, x.shape[1], 0), *drawn(1, gate.weight.shape[0], 8)
    return lora_mlp_ref(x, gate, up, last, masks=masks)


def _lora_mlp(shape: Shape, tokens: int, device: str, *, dropout: float = 0.0, need_output: bool = True) -> Bench:
    wide = shape.intermediate, shape.hidden
    factors = [t for size in (wide, wide, wide[::-1]) for t in _factors(*size, device)]
    forward, backward = _lora_flops(tokens, wide, wide, wide[::-1])
    if not need_output:
        forward, _ = _lora_flops(tokens, wide, wide)

    def fast(x: Tensor, *f: Tensor) -> Tensor:
        return lora_mlp(x, *_projections(f, dropout), need_output=need_output)

    stock = _peft_mlp if dropout else (lambda x, *f: lora_mlp_ref(x, *_projections(f)))
    return Bench(
        (_randn(tokens, shape.hidden, device=device), *factors),
        _impls(_autocast(fast, device), _autocast(stock, device)),
        _both_ways(forward, backward),
        gemm=True,
        oracle=_autocast(_masked_mlp, device) if dropout else None,
        no_output=not need_output,
    )


def _linear_cross_entropy(shape: Shape, tokens: int, device: str) -> Bench:
    hidden = _randn(tokens, shape.hidden, device=device)
    weight = _randn(shape.vocab, shape.hidden, device=device, grad=False, scale=shape.hidden**-0.5)
    labels = torch.randint(shape.vocab, (tokens,), device=device)
    # In training the labels are looked at before the layers run.
    kept = prepare_labels(labels, labels, vocab_size=shape.vocab)
    liger = _liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")

    def liger_loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        assert liger is not None
        out = liger(x, w, labels)
        return out[0] if isinstance(out, tuple) else out

    return Bench(
        (hidden, weight, labels),
        _impls(
            lambda x, w, labels: linear_cross_entropy(x, w, None, kept=kept),
            linear_cross_entropy_ref,
            liger and liger_loss,
        ),
        # Gradients are made in the forward by some and in the backward by others.
        {"both": 4.0 * tokens * shape.vocab * shape.hidden},
        gemm=True,
    )


def _dropout_bits(shape: Shape, tokens: int, device: str) -> Bench:
    """Three masks of the hidden size, against the dropout of three projections' inputs."""
    x = _randn(tokens, shape.hidden, device=device, grad=False)

    def fast(x: Tensor) -> Tensor:
        seed = draw_seed(x.device)
        return dropout_bits(seed, DROPOUT, 3, x.shape[0], x.shape[1], kernel=x.is_cuda)

    def stock(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.dropout(x, DROPOUT) for _ in range(3))

    def errors(fn: Call) -> float:
        """How far the share of kept elements is from what it should be, in units of 5 standard deviations."""
        out = fn(torch.ones_like(x))
        kept = unpack_dropout_bits(out, x.shape[1]) if isinstance(out, Tensor) else torch.stack(out) != 0
        sigma = (DROPOUT * (1 - DROPOUT) / kept.numel()) ** 0.5
        return abs(kept.double().mean().item() - (1 - DROPOUT)) / (5 * sigma)

    return Bench((x,), _impls(fast, stock), {"forward": 3.0 * x.numel() / 8}, errors=errors)


def _adapters(shape: Shape, device: str) -> list[Tensor]:
    return [_randn(LORA_RANK, shape.hidden, device=device, grad=False, dtype=torch.float32) for _ in "qkv"]


def _down(shape: Shape, tokens: int, device: str) -> Bench:
    """u of q, k, v."""
    x = _randn(tokens, shape.hidden, device=device, grad=False)

    def library(x: Tensor, *a: Tensor) -> Tensor:
        return torch.mm(x, pack(Siblings(a, (1.0,) * 3), DTYPE)[0].view(-1, x.shape[1]).t())

    def stock(x: Tensor, *a: Tensor) -> Tensor:
        return torch.cat([F.linear(x, m.to(x.dtype)) for m in a], 1)

    fast = lambda x, *a: down(x, Siblings(a, (1.0,) * 3), DTYPE)  # noqa: E731
    impls = _impls(fast, stock, library=library)
    return Bench((x, *_adapters(shape, device)), impls, {"forward": float(x.nbytes)})


def _outer(shape: Shape, tokens: int, device: str) -> Bench:
    """dA of q, k, v."""
    x = _randn(tokens, shape.hidden, device=device, grad=False)
    u = _randn(tokens, 3 * LORA_RANK, device=device, grad=False)
    like = _adapters(shape, device)
    wide = torch.float32

    def stock(x: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        parts = (torch.mm(part.t(), x) for part in u.split(LORA_RANK, 1))
        return tuple(part.to(torch.promote_types(part.dtype, wide)) for part in parts)

    impls = _impls(
        lambda x, u: tuple(outer(x, u, Siblings(tuple(like), (1.0,) * 3), DTYPE)),
        stock,
        library=lambda x, u: tuple(mm_wide(u.t(), x, wide).split(LORA_RANK)),
    )
    return Bench((x, u), impls, {"forward": float(x.nbytes)})


def _expand(shape: Shape, tokens: int, device: str) -> Bench:
    """The low-rank part of dx of q, k, v."""
    u = _randn(tokens, 3 * LORA_RANK, device=device, grad=False)
    written = float(tokens * shape.hidden * DTYPE.itemsize)

    def fast(u: Tensor, *a: Tensor) -> Tensor:
        y = torch.empty((u.shape[0], a[0].shape[1]), dtype=u.dtype, device=u.device)
        return expand(u, Siblings(a, (1.0,) * 3), DTYPE, y)

    def library(u: Tensor, *a: Tensor) -> Tensor:
        return torch.mm(u, pack(Siblings(a, (1.0,) * 3), DTYPE)[0].view(-1, a[0].shape[1]))

    def stock(u: Tensor, *a: Tensor) -> Tensor:
        return sum(torch.mm(part, m.to(u.dtype)) for part, m in zip(u.split(LORA_RANK, 1), a))  # type: ignore[return-value]

    impls = _impls(fast, stock, library=library)
    return Bench((u, *_adapters(shape, device)), impls, {"forward": written})


def _rows(shape: Shape, modules: str) -> list[int]:
    """N of the weights [N, hidden] that are dequantised together."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {"gate": [shape.intermediate], "gate_up": 2 * [shape.intermediate], "qkv": [queries, keys, keys]}[modules]


def _dequantised(inputs: tuple[Tensor, ...], impls: dict[str, Call], mode: str, rows: list[int], k: int) -> Bench:
    """Weights [N, k] of `rows` N; a result is a tensor of all their rows or a tuple of the weights' values."""
    reference_values = impls["torch"]

    def errors(fn: Call) -> float:
        got = fn()
        return float((reference_values() != (torch.cat(got) if isinstance(got, tuple) else got)).sum())

    impls = {name: lambda *_, fn=fn: fn() for name, fn in impls.items()}
    moved = sum(packed_bytes(mode, n, k) + n * k * DTYPE.itemsize for n in rows)
    return Bench(inputs, impls, {"forward": moved}, errors=errors)


def _random_nf4(n: int, k: int, device: str) -> tuple[Tensor, Any]:
    """Packed bytes of a weight [n, k] and what bitsandbytes calls its quant_state, doubly quantised."""
    blocks = n * k // BLOCKSIZE
    second = types.SimpleNamespace(
        absmax=torch.rand(-(-blocks // BLOCKSIZE2), device=device), code=torch.linspace(-1, 1, 256, device=device),
        blocksize=BLOCKSIZE2, dtype=torch.float32, nested=False,
    )  # fmt: skip
    state = types.SimpleNamespace(
        absmax=torch.randint(256, (blocks,), dtype=torch.uint8, device=device), shape=torch.Size((n, k)), code=None,
        blocksize=BLOCKSIZE, quant_type="nf4", dtype=DTYPE, nested=True, offset=torch.tensor(1.1, device=device),
        state2=second,
    )  # fmt: skip
    return torch.randint(256, (n * k // 2, 1), dtype=torch.uint8, device=device), state


def _nf4(shape: Shape, device: str, *, modules: str) -> Bench:
    """Against bitsandbytes: its call for each weight."""
    rows, k = _rows(shape, modules), shape.hidden
    packed = [_random_nf4(n, k, device) for n in rows]
    weights = [Nf4Weight.of(*pair) for pair in packed]

    def stock() -> Tensor:
        def values(raw: Tensor, s: Any) -> Tensor:
            absmax = nested_absmax_ref(s.absmax, s.state2.code, s.state2.absmax, s.offset, s.state2.blocksize)
            return dequantize_4bit_ref(raw, absmax, s.shape, quant_type="nf4", blocksize=s.blocksize, dtype=DTYPE)

        return torch.cat([values(*pair) for pair in packed])

    impls = {"fast": lambda: dequantize_stacked(weights), "torch": stock}
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.functional import dequantize_4bit

        impls["bnb"] = lambda: tuple(dequantize_4bit(*pair) for pair in packed)
    inputs = tuple(t for raw, state in packed for t in (raw, state.absmax))
    return _dequantised(inputs, impls, "qlora", rows, k)


def _gptq(shape: Shape, device: str, *, modules: str) -> Bench:
    """fp16 scales, as in memory, and values for bf16 training."""
    rows, k = _rows(shape, modules), shape.hidden
    groups = -(-k // GROUP)
    order = torch.arange(k, dtype=torch.int32, device=device) // GROUP

    def words(*size: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, size, dtype=torch.int32, device=device)

    packed = [
        (words(k * BITS // 32, n), words(groups, n * BITS // 32), torch.rand(groups, n, device=device).half(), order)
        for n in rows
    ]
    weights = [GPTQWeight(*tensors, bits=BITS, shape=(n, k)) for tensors, n in zip(packed, rows)]

    def stock() -> Tensor:
        return torch.cat([gptq_dequantize_ref(*tensors, bits=BITS, dtype=DTYPE) for tensors in packed], 1).t()

    impls = {"fast": lambda: dequantize_stacked(weights, dtype=DTYPE), "torch": stock}
    return _dequantised(tuple(t for tensors in packed for t in tensors), impls, "gptq", rows, k)


OPS: dict[str, Callable[[Shape, int, str], Bench]] = {
    "rms_norm": partial(_rms_norm, trainable=False),
    "rms_norm_dw": partial(_rms_norm, trainable=True),
    "rope": _rope,
    "swiglu": _swiglu,
    "lora_o": partial(_lora_linear, module="o"),
    "lora_down": partial(_lora_linear, module="down"),
    "lora_qkv": _lora_qkv,
    "lora_mlp": _lora_mlp,
    "lora_mlp_dropout": partial(_lora_mlp, dropout=DROPOUT),
    "lora_mlp_recompute": partial(_lora_mlp, need_output=False),
    "linear_cross_entropy": _linear_cross_entropy,
    "dropout_bits": _dropout_bits,
    "low_rank_down": _down,
    "low_rank_outer": _outer,
    "low_rank_expand": _expand,
}
# What no number of tokens changes.
WEIGHT_OPS: dict[str, Callable[[Shape, str], Bench]] = {
    "nf4_dequantize": partial(_nf4, modules="gate"),
    "nf4_gate_up": partial(_nf4, modules="gate_up"),
    "nf4_qkv": partial(_nf4, modules="qkv"),
    "gptq_dequantize": partial(_gptq, modules="gate"),
    "gptq_gate_up": partial(_gptq, modules="gate_up"),
}
