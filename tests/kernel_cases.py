"""Which kernels the ops launch and how they are specialised: the ops run on ``meta`` tensors, launches are recorded.

A list of signatures written by hand would drift from the code that launches. Here the host code itself chooses the
configuration, for the limits of a chip that need not exist; only `launch` is replaced. `build` then compiles a recorded
launch for that chip, which needs no GPU either.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from fast_unsloth_patch import ops, weights
from fast_unsloth_patch.device import launch as _launch
from fast_unsloth_patch.ops import swiglu_low_rank
from fast_unsloth_patch.ops._expert_kernels import weighted_swiglu_bwd
from fast_unsloth_patch.ops.dropout import dropout_bits
from fast_unsloth_patch.ops.gemm import Update, gemm, gemm_dx, gemm_swiglu
from fast_unsloth_patch.ops.grouped_gemm import (
    GroupedUpdate,
    grouped_gemm,
    grouped_gemm_dx,
    grouped_gemm_swiglu,
    grouped_outer,
)
from fast_unsloth_patch.ops.grouped_low_rank import grouped_down, grouped_down_outer
from fast_unsloth_patch.ops.linear_cross_entropy import cross_entropy_chunk, prepare_labels
from fast_unsloth_patch.ops.lora_linear import Adapter, Projection, lora_linear
from fast_unsloth_patch.ops.lora_mlp import lora_mlp
from fast_unsloth_patch.ops.lora_qkv import lora_qkv
from fast_unsloth_patch.ops.rms_norm import rms_norm
from fast_unsloth_patch.ops.rope import rope
from fast_unsloth_patch.ops.routing import Routing, combine, gather, route
from fast_unsloth_patch.ops.swiglu import swiglu, swiglu_bwd
from fast_unsloth_patch.weights.gptq import GPTQWeight
from fast_unsloth_patch.weights.nf4 import Nested, Nf4Weight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_POINTERS = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32"}
_POINTERS |= {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}


class Case(NamedTuple):
    """One specialisation of a kernel, and the call that led to it."""

    origin: str  # which of `scenarios` launched it first
    kernel: Any
    signature: tuple[tuple[str, str], ...]  # name and type of each run-time argument
    constexprs: tuple[tuple[str, Any], ...]
    divisible: frozenset[int]  # positions of the arguments known to be divisible by 16
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        values = " ".join(f"{name}={value}" for name, value in (*self.constexprs, *self.options))
        return f"{self.kernel.__name__} of {self.origin} ({' '.join(kind for _, kind in self.signature)}; {values})"

    def of_a_model(self) -> bool:
        """Is it one that training of a Llama in bf16 has at its usual rank?"""
        return self.origin.startswith(("8B", "1B", "8x7B"))

    def specialisation(self) -> tuple[Any, ...]:
        """All but the origin."""
        return self[1:]


def op_modules() -> Iterator[Any]:
    for package in (ops, weights):
        for info in pkgutil.iter_modules(package.__path__):
            yield importlib.import_module(f"{package.__name__}.{info.name}")


def _as_case(origin: str, kernel: Any, args: Any, consts: Any, options: dict[str, int]) -> Case:
    """What Triton specialises on, as its own argument binding has it: 16-byte alignment, the ints 1 and 16 n, None."""
    names = kernel.arg_names
    assert len(names) == len(args) + len(consts), f"{origin}: {kernel.__name__} takes {names}"
    values = consts.values() if isinstance(consts, dict) else consts
    fixed = dict(zip(names[len(args) :], values, strict=True))
    signature, divisible = {}, set()
    for i, (parameter, value) in enumerate(zip(kernel.params, args)):
        name = parameter.name
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            divisible.add(i)
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if not parameter.do_not_specialize:
                if value == 1:
                    fixed[name] = 1
                elif value % 16 == 0:
                    divisible.add(i)
        elif value is None:
            fixed[name] = None
        else:
            signature[name] = "fp32"
    signature = {name: kind for name, kind in signature.items() if name not in fixed}
    return Case(
        origin, kernel, tuple(signature.items()), tuple(fixed.items()), frozenset(divisible), tuple(options.items())
    )


@contextlib.contextmanager
def recorded(limits: _launch.Limits, autocast: torch.dtype | None = None) -> Iterator[list[Any]]:
    """Meta tensors count as tensors on a chip with ``limits``, under ``autocast``; yields the list of launches."""
    launches: list[Any] = []

    def record(kernel, grid, args, consts, *, num_warps=4, num_stages=2):
        assert all(isinstance(n, int) and n > 0 for n in grid) and max(grid[1:], default=1) <= 65535, (kernel, grid)
        launches.append((kernel, args, consts, {"num_warps": num_warps, "num_stages": num_stages}))

    replaced = {"launch": record, "use_triton": lambda t: t.dtype in _POINTERS, "device_limits": lambda index: limits}
    enabled, dtype, context = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast
    # Torch knows no autocast for meta tensors and raises when asked.
    torch_functions = {
        "is_autocast_enabled": lambda kind="cuda": autocast is not None if kind == "meta" else enabled(kind),
        "get_autocast_dtype": lambda kind: autocast if kind == "meta" else dtype(kind),
        "autocast": lambda kind, **how: contextlib.nullcontext() if kind == "meta" else context(kind, **how),
    }
    with contextlib.ExitStack() as stack:
        for module in op_modules():
            for name in replaced.keys() & vars(module).keys():
                if module is not _launch:
                    stack.enter_context(mock.patch.object(module, name, replaced[name]))
        for name, replacement in torch_functions.items():
            stack.enter_context(mock.patch.object(torch, name, replacement))
        yield launches


def _meta(*shape: int, dtype: torch.dtype, grad: bool = True) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(grad)


class Layer(NamedTuple):
    """A decoder layer's linear part at one size."""

    tokens: int
    ranks: tuple[int, ...] = (16,) * 7  # q, k, v, o, gate, up, down; 0: no adapter
    dropout: float = 0.0
    dtype: torch.dtype = BF16
    adapters: torch.dtype = FP32
    autocast: torch.dtype | None = BF16
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    bias: bool = False
    packed: str = ""  # "nf4", "gptq": the base weights
    compute: torch.dtype = BF16  # what an NF4 layer computes in
    x: torch.dtype | None = None  # the input's dtype, by default that of the weights


def _weight(n: int, k: int, layer: Layer) -> Any:
    if not layer.packed:
        return _meta(n, k, dtype=layer.dtype, grad=False)
    empty = functools.partial(torch.empty, device="meta")
    if layer.packed == "nf4":
        nested = Nested(empty(-(-n * k // 64 // 256)), empty(256), empty(1), 256)
        packed, absmax = empty(n * k // 2, dtype=torch.uint8), empty(n * k // 64, dtype=torch.uint8)
        device = torch.device("meta")
        named = {"dtype": layer.compute, "device": device, "direct": True, "sizes": ()}
        return Nf4Weight(packed, absmax, nested, empty(16), "nf4", 64, (n, k), BF16, **named)
    groups = k // 128
    zeros = empty(groups, n // 8, dtype=torch.int32)
    scales, order = empty(groups, n, dtype=FP16), torch.arange(k, dtype=torch.int32) // 128
    return GPTQWeight(empty(k // 8, n, dtype=torch.int32), zeros, scales, order, bits=4, shape=(n, k))


def run_layer(layer: Layer) -> None:
    """Forward and backward of the attention projections and of the MLP."""
    t, h, i, d = layer.tokens, layer.hidden, layer.intermediate, layer.head_dim
    queries, keys = layer.heads * d, layer.kv_heads * d

    def projection(n: int, k: int, rank: int) -> Projection:
        bias = _meta(n, dtype=layer.dtype) if layer.bias else None
        adapter = None
        if rank:
            lora_bias = _meta(n, dtype=layer.adapters) if layer.bias else None
            a, b = _meta(rank, k, dtype=layer.adapters), _meta(n, rank, dtype=layer.adapters)
            adapter = Adapter(a, b, 2.0, layer.dropout, lora_bias)
        return Projection(_weight(n, k, layer), bias, adapter)

    sizes = (queries, h), (keys, h), (keys, h), (h, queries), (i, h), (i, h), (h, i)
    q, k, v, o, gate, up, down = (projection(*size, rank) for size, rank in zip(sizes, layer.ranks, strict=True))
    x = _meta(1, t, h, dtype=layer.x or layer.dtype)
    if layer.autocast is None and layer.x not in (None, layer.compute):
        # Such layers are not fused: see patches.packed.
        lora_linear(lora_linear(lora_linear(x, q), o), gate).sum().backward()
        return
    cos, sin = (_meta(1, t, d, dtype=layer.autocast or layer.dtype, grad=False) for _ in range(2))
    out = lora_qkv(x, q, k, v, cos, sin, d)
    attended = out[0] + torch.cat([out[1] + out[2]] * (layer.heads // layer.kv_heads), 1)
    y = lora_linear(attended.transpose(1, 2).reshape(1, t, queries), o)
    lora_mlp(y, gate, up, down, residual=y).sum().backward()


def _others(tokens: int, dtype: torch.dtype, hidden: int, intermediate: int, vocab: int) -> None:
    """The other ops, with frozen and with trainable weights."""
    x = _meta(tokens, hidden, dtype=dtype)
    for weight_dtype, grad in ((dtype, False), (dtype, True), (FP32, True)):
        rms_norm(x, _meta(hidden, dtype=weight_dtype, grad=grad), 1e-5).sum().backward()
    gate, up = (_meta(tokens, intermediate, dtype=dtype) for _ in range(2))
    swiglu(gate, up).sum().backward()
    swiglu_bwd(gate, gate, up, product=gate)
    gu = gate.new_empty(tokens, 2 * intermediate)
    for slots in (16, 32):
        if swiglu_low_rank.covers(gu, slots):
            packed = gate.new_empty(slots, intermediate)
            swiglu_low_rank.swiglu_down(gu, packed)
            swiglu_low_rank.hidden_down(gate, packed)
            swiglu_low_rank.swiglu_outer(gate, gu, gu, gate.new_empty(tokens, slots), slots, FP32)
    logits, labels = _meta(tokens, vocab, dtype=dtype), _meta(tokens, dtype=torch.int64, grad=False)
    prepare_labels(labels, vocab_size=vocab)
    prepare_labels(labels, labels, vocab_size=vocab)
    for grad in (False, True):
        scale = 4096.0 if dtype is FP16 else 1.0
        cross_entropy_chunk(logits, labels, _meta(tokens, dtype=FP32), grad=grad, scale=scale)


def _rope(dtype: torch.dtype, cos_dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, rotary: int) -> None:
    q, k = (_meta(1, 512, n, head_dim, dtype=dtype).transpose(1, 2) for n in (heads, kv_heads))
    cos, sin = (_meta(1, 512, rotary, dtype=cos_dtype, grad=False) for _ in range(2))
    out = rope(q, k, cos, sin)
    (out[0].sum() + out[1].sum()).backward()


def _layers() -> Iterator[tuple[str, Layer]]:
    large, masked = Layer(8192), Layer(8192, dropout=0.1)
    attention, mlp = (16, 16, 16, 16, 0, 0, 0), (0, 0, 0, 0, 16, 16, 16)
    for p in (0.0, 0.1):
        for tokens in (512, 2048, 8192):
            yield f"8B, {tokens} tokens, dropout {p}", Layer(tokens, dropout=p)
    yield "rank 64", masked._replace(ranks=(64,) * 7)
    yield "rank 128", masked._replace(ranks=(128,) * 7)
    yield "rank 128, no dropout", large._replace(ranks=(128,) * 7)
    yield "rank 8", large._replace(ranks=(8,) * 7)
    yield "rank 128, few tokens", masked._replace(tokens=512, ranks=(128,) * 7)
    yield "ranks that differ", masked._replace(ranks=(8, 16, 4, 24, 64, 8, 4))
    # As many columns as the low-rank kernels take in all, over three siblings and over two.
    yield "widest siblings", masked._replace(ranks=(32, 64, 32, 128, 64, 64, 128))
    yield "fp16", masked._replace(dtype=FP16, autocast=FP16)
    yield "fp32", masked._replace(dtype=FP32, autocast=None)
    yield "fp32, no dropout", large._replace(dtype=FP32, autocast=None, ranks=attention)
    yield "fp32, widest siblings", masked._replace(dtype=FP32, autocast=None, ranks=(32, 64, 32, 128, 0, 0, 0))
    yield "fp32 adapters", masked._replace(autocast=None, ranks=mlp)
    yield "fp32 adapters, no dropout", large._replace(autocast=None, ranks=attention)
    yield "fp32 adapters, few tokens", masked._replace(tokens=512, autocast=None, ranks=attention)
    yield "adapters on q, v, up", large._replace(ranks=(16, 0, 16, 0, 0, 16, 0))
    yield "no adapter", large._replace(ranks=(0,) * 7)
    yield "biases", Layer(512, bias=True)
    for packed in ("nf4", "gptq"):
        yield f"8B, {packed}", large._replace(packed=packed)
        yield f"8B, {packed}, few tokens, dropout", Layer(512, packed=packed, dropout=0.1)
    # As prepare_model_for_kbit_training leaves them: with autocast, without, and with bitsandbytes' default.
    yield "fp32 round nf4", masked._replace(packed="nf4", x=FP32)
    yield "fp32 round nf4, no autocast", masked._replace(packed="nf4", x=FP32, autocast=None)
    yield "fp32 round nf4, no autocast, no dropout", large._replace(packed="nf4", x=FP32, autocast=None)
    yield "bf16 round nf4 in fp32", masked._replace(packed="nf4", x=BF16, compute=FP32, autocast=None)
    yield "1B", Layer(2048, hidden=2048, intermediate=8192, head_dim=64)
    yield "head size 80", Layer(2048, hidden=2560, intermediate=6912, head_dim=80, kv_heads=32)
    yield "head size 96", Layer(2048, hidden=3072, intermediate=8192, head_dim=96)


def _two_adapter_dtypes(tokens: int, dropout: float) -> None:
    """Autocast brings adapters of several dtypes together, so the siblings of one launch may have them."""

    def adapted(n: int, k: int, dtype: torch.dtype) -> Projection:
        adapter = Adapter(_meta(16, k, dtype=dtype), _meta(n, 16, dtype=dtype), 2.0, dropout)
        return Projection(_meta(n, k, dtype=BF16), None, adapter)

    x, angles = _meta(1, tokens, 4096, dtype=BF16), _meta(1, tokens, 128, dtype=BF16, grad=False)
    q, k, v = adapted(4096, 4096, FP32), adapted(1024, 4096, BF16), adapted(1024, 4096, FP32)
    out = lora_qkv(x, q, k, v, angles, angles, 128)
    torch.autograd.backward(out, [torch.empty_like(o) for o in out])
    mlp = lora_mlp(x, adapted(14336, 4096, FP32), adapted(14336, 4096, BF16), adapted(4096, 14336, BF16))
    mlp.backward(torch.empty_like(mlp))


def _gemms(tokens: int, rank: int, dtype: torch.dtype) -> None:
    """The persistent GEMMs of a layer; on chips that they do not cover nothing is launched."""

    def update(*shapes: tuple[int, int]) -> Update:
        factors = [_meta(*shape, dtype=FP32, grad=False) for shape in shapes]
        return Update(x.new_empty(tokens, 64 * len(shapes)), factors, [64 * j for j in range(len(shapes))])

    x = _meta(tokens, 4096, dtype=dtype, grad=False)
    q, k, v, gate, up = (x.new_empty(n, 4096) for n in (4096, 1024, 1024, 14336, 14336))
    for siblings in ([q, k, v], [gate, up]):
        widths = [w.shape[0] for w in siblings]
        gemm(x, siblings, update=update(*[(n, rank) for n in widths]))
        gemm_dx(x.new_empty(tokens, sum(widths)), siblings, update=update(*[(rank, 4096)] * len(widths)))
    gemm_swiglu(x, gate, up, update=update((14336, rank), (14336, rank)))
    gemm(x, [q], update=update((4096, rank)), residual=x)
    gemm_dx(x, [q], update=update((rank, 4096)))
    gemm(x, [k, v], bias=x.new_empty(2048))
    gemm_dx(x, [q], addend=x)


def _grouped(rows: int, slots: int, dtype: torch.dtype, hidden: int, intermediate: int) -> None:
    """What eight experts with adapters multiply, forward and backward; two by two where their weights are packed."""

    class Packed(NamedTuple):
        shape: torch.Size
        dtype: torch.dtype
        device: torch.device

        def dequantize(self, first: int, count: int, out: Any = None, dtype: Any = None) -> Any:
            return out

    def integers(*shape: int) -> torch.Tensor:
        return _meta(*shape, dtype=torch.int32, grad=False)

    routing = Routing(integers(rows), integers(rows // 4, 2), integers(8), 128)
    make = functools.partial(torch.empty, dtype=dtype, device="meta")
    for n, k in ((2 * intermediate, hidden), (hidden, intermediate)):
        x, dy, u, dense = make(rows, k), make(rows, n), make(rows, slots), make(8, n, k)
        a, b = make(8, slots, k), make(8, n, slots)
        for weight in (dense, Packed(dense.shape, dtype, dense.device)):
            for update in (GroupedUpdate(u, b), None):
                grouped_gemm(x, weight, routing, update=update)
                grouped_gemm_swiglu(x, weight, routing, update=update)
            for update in (GroupedUpdate(u, a), None):
                grouped_gemm_dx(dy, weight, routing, update=update)
        grouped_gemm(x, a, routing)
        grouped_gemm_dx(dy, b, routing)
        grouped_down(x, a, routing, by_rows=False)
        for result in (dtype, FP32):
            grouped_outer(u, x, routing, result)
            grouped_outer(dy, u, routing, result)
            grouped_down_outer(dy, u, b, routing, result)


def _experts(
    tokens: int, k: int, experts: int, block: int, dtype: torch.dtype, index: torch.dtype, intermediate: int
) -> None:
    """Tokens to the rows of their experts and back, and what is between the products, forward and backward."""
    routing = route(_meta(tokens, k, dtype=index, grad=False), experts, block)
    x, weights = _meta(tokens, 4096, dtype=dtype, grad=False), _meta(tokens, k, dtype=FP32, grad=False)
    z = gather(x, routing)
    combine(z, routing, weights, x)
    gather(x, routing, weights)
    gather(weights.new_ones(tokens, 1), routing, weights)  # a routing weight a row
    combine(z, routing)
    dh, gu = z.new_empty(z.shape[0], intermediate), z.new_empty(z.shape[0], 2 * intermediate)
    weighted_swiglu_bwd(dh, gu, gu, routing.pairs, weights.view(-1))


def scenarios() -> Iterator[tuple[str, torch.dtype | None, Callable[[], None]]]:
    """Calls that between them choose every configuration: (what it is, autocast's dtype or None, the call)."""
    for name, layer in _layers():
        yield name, layer.autocast, lambda layer=layer: run_layer(layer)
    for dtype in (BF16, FP16, FP32):
        kind = str(dtype).removeprefix("torch.")
        yield f"8B, other ops, {kind}", None, lambda dtype=dtype: _others(2048, dtype, 4096, 14336, 128256)
        yield f"8B, rope, {kind}", None, lambda dtype=dtype: _rope(dtype, dtype, 32, 8, 128, 128)
    for tokens, p in ((4096, 0.0), (512, 0.1)):
        call = lambda tokens=tokens, p=p: _two_adapter_dtypes(tokens, p)  # noqa: E731
        yield f"adapters of two dtypes, dropout {p}", BF16, call
    for name, rank, dtype in (("8B, ", 16, BF16), ("8B, ", 32, BF16), ("", 64, FP16)):
        yield f"{name}GEMMs of rank {rank}", None, lambda rank=rank, dtype=dtype: _gemms(8192, rank, dtype)
    for name, slots, dtype in (("8x7B, ", 16, BF16), ("8x7B, ", 32, BF16), ("", 64, FP16)):
        sizes = (17280, slots, dtype, 4096, 14336)
        yield f"{name}experts of {slots} slots", None, lambda sizes=sizes: _grouped(*sizes)
    for name, *sizes, dtype, index, width in (
        ("8x7B experts", 8192, 2, 8, 128, BF16, torch.int64, 14336),
        ("8x7B experts, few tokens", 511, 2, 8, 64, FP16, torch.int64, 14336),
        ("many experts", 511, 8, 256, 16, FP32, torch.int32, 768),
    ):
        yield name, None, lambda sizes=(*sizes, dtype, index, width): _experts(*sizes)
    yield "other ops, small", None, lambda: _others(7, FP16, 64, 72, 100)
    yield "the widest norm", None, lambda: _others(7, FP32, 32768, 72, 100)
    yield "partial rope", None, lambda: _rope(FP16, FP32, 24, 3, 80, 32)
    yield "wide heads", None, lambda: _rope(FP32, FP32, 128, 8, 256, 256)
    for p in (0.1, 0.5):
        seed = _meta(1, dtype=torch.int64, grad=False)
        yield f"dropout {p}", None, lambda p=p, seed=seed: dropout_bits(seed, p, 3, 8192, 4096, kernel=True)


@functools.cache
def cases(capability: int, sm_count: int = 132) -> list[Case]:
    """Every distinct specialisation that `scenarios` launch on such a chip."""
    limits = _launch.target_limits(capability, sm_count)
    found: dict[tuple[Any, ...], Case] = {}
    for origin, autocast, call in scenarios():
        with recorded(limits, autocast) as launches:
            call()
        for kernel, args, consts, options in launches:
            case = _as_case(origin, kernel, args, consts, options)
            found.setdefault(case.specialisation(), case)
    return list(found.values())


def build(case: Case, capability: int) -> Any:
    """The compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs, types = dict(case.constexprs), dict(case.signature)
    source = ASTSource(
        fn=case.kernel,
        signature={name: types.get(name, "constexpr") for name in case.kernel.arg_names},
        constexprs=constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in case.divisible},
    )
    options = {"enable_fp_fusion": True, **dict(case.options)}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any, folder: Any) -> dict[str, int]:
    """What the assembler says that a kernel takes: "REG", "STACK" (bytes of spills and local arrays), "SHARED"."""
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)}
