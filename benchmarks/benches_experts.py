"""What `kernels.py` measures of a mixture of experts: sorting rows, grouped products, and the whole block.

Every token has its experts drawn at random, so that the load is nearly even. This library's grouped products take rows
padded to whole blocks, the others take them without padding; work is that of the pairs (token, expert). "torch" is one
cuBLAS call an expert (and the float64 oracle), with the sizes known on the host; "grouped_mm" PyTorch's own.

The rows of two layouts cannot be compared element by element, so an error here is a share of what is allowed: twice the
distance of "torch" from float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from benches import DTYPE, SCALING, Bench, Call
from shapes import LORA_RANK, Shape
from torch import Tensor

from fast_unsloth_patch.ops._expert_kernels import weighted_swiglu_bwd
from fast_unsloth_patch.ops.grouped_gemm import (
    GroupedUpdate,
    grouped_gemm,
    grouped_gemm_dx,
    grouped_gemm_swiglu,
    grouped_outer,
)
from fast_unsloth_patch.ops.grouped_low_rank import grouped_down, grouped_down_outer
from fast_unsloth_patch.ops.lora_experts import ExpertAdapter, ExpertProjection, lora_experts
from fast_unsloth_patch.ops.routing import Routing, combine, gather, route
from fast_unsloth_patch.reference.experts import lora_experts_ref

# Rows of a block: what the persistent kernel takes; on a CPU few, so that little is padding.
_BLOCKS = {"cuda": 128, "cpu": 16}


def _randn(*size: int, device: str, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    return (scale * torch.randn(size, device=device)).to(dtype)


class _Rows(NamedTuple):
    """One routing in both layouts."""

    index: Tensor  # [T, k]
    weights: Tensor  # [T, k] float32
    routing: Routing  # of padded blocks
    order: Tensor  # [P]: the pair of each row without padding, grouped by expert
    places: Tensor  # [P]: the padded row of the same pair
    ends: Tensor  # [E] int32: one past each expert's last row without padding
    edges: list[int]  # the same on the host, from 0 on

    @property
    def pairs(self) -> int:
        return self.order.numel()

    def padded(self, rows: Tensor) -> Tensor:
        """Rows without padding in their padded places; zeros between."""
        return rows.new_zeros(self.routing.pairs.numel(), *rows.shape[1:]).index_copy_(0, self.places, rows)


def _rows(shape: Shape, tokens: int, device: str) -> _Rows:
    scores = torch.rand(tokens, shape.experts, device=device)
    top, index = scores.topk(shape.experts_per_token, -1)
    routing = route(index, shape.experts, _BLOCKS[device])
    order = index.flatten().argsort(stable=True)
    ends = torch.bincount(index.flatten(), minlength=shape.experts).cumsum(0).to(torch.int32)
    places = routing.rows.flatten().long()[order]
    return _Rows(index, top / top.sum(-1, keepdim=True), routing, order, places, ends, [0, *ends.tolist()])


def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    found: Tensor = (getattr(F, "grouped_mm", None) or torch._grouped_mm)(a, b, offs=ends)
    return found


def _problem(call: Callable[[], object]) -> str | None:
    """Why PyTorch's own product does not take this case, if it does not."""
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _compared(rows: _Rows, inputs: tuple[Tensor, ...], impls: dict[str, Call], work: float, gemm: bool) -> Bench:
    """A bench of functions of the same inputs whose results are padded (more rows than pairs), not, or [E, ...]."""

    def aligned(out: Tensor) -> Tensor:
        return (out[rows.places] if out.shape[0] == rows.routing.pairs.numel() else out).double()

    def distance(fn: Call) -> float:
        wide = (t.double() if t.is_floating_point() else t for t in inputs)
        want = impls["torch"](*wide)
        return ((aligned(fn(*inputs)) - want).norm() / want.norm()).item()

    def errors(fn: Call) -> float:
        return distance(fn) / max(2 * distance(impls["torch"]), 1e-6)

    if "grouped_mm" in impls and (problem := _problem(partial(impls["grouped_mm"], *inputs))):
        print(f"  grouped_mm: {problem}")
        impls = {name: fn for name, fn in impls.items() if name != "grouped_mm"}
    return Bench(inputs, impls, {"forward": work}, gemm=gemm, errors=errors)


def _worst(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want))


def _each(rows: _Rows, product: Callable[..., Tensor], *by_expert: Tensor) -> list[Tensor]:
    """``product(rows of e, *(operand[e] for operand in by_expert))`` for each expert."""
    return [
        product(slice(start, end), *(t[e] for t in by_expert)) for e, (start, end) in enumerate(pairwise(rows.edges))
    ]


def _product(shape: Shape, tokens: int, device: str, *, n: int, k: int, back: bool = False, rank: int = 0) -> Bench:
    """``y = x W_e^T``, or ``dx = dy W_e`` if `back`; with `rank` the low-rank update in the same product."""
    rows = _rows(shape, tokens, device)
    weight = _randn(shape.experts, n, k, device=device, scale=k**-0.5)
    inside, outside = (n, k) if back else (k, n)
    x = _randn(rows.pairs, inside, device=device)
    low = (_randn(rows.pairs, rank, device=device), _randn(shape.experts, outside, rank, device=device, scale=0.1))
    padded, op = rows.padded(x), grouped_gemm_dx if back else grouped_gemm
    update = GroupedUpdate(rows.padded(low[0]), low[1].mT.contiguous() if back else low[1]) if rank else None

    def fast(x: Tensor, w: Tensor, *low: Tensor) -> Tensor:
        return op(padded, w, rows.routing, update=update)

    def stock(x: Tensor, w: Tensor, *low: Tensor) -> Tensor:
        def one(part: slice, matrix: Tensor, *b: Tensor) -> Tensor:
            matrix = matrix if back else matrix.t()
            return torch.addmm(low[0][part] @ b[0].t(), x[part], matrix) if b else x[part] @ matrix

        return torch.cat(_each(rows, one, w, *low[1:]))

    def library(x: Tensor, w: Tensor, *low: Tensor) -> Tensor:
        y = _grouped_mm(x, w if back else w.mT, rows.ends)
        return y.add_(_grouped_mm(low[0], low[1].mT, rows.ends)) if low else y

    impls = {"fast": fast, "torch": stock, "grouped_mm": library}
    inputs = (x, weight, *(low if rank else ()))
    work = 2.0 * rows.pairs * n * k + 2.0 * rows.pairs * rank * outside
    return _compared(rows, inputs, impls, work, True)


def _gate_up(shape: Shape, tokens: int, device: str, **options: Any) -> Bench:
    return _product(shape, tokens, device, n=2 * shape.intermediate, k=shape.hidden, **options)


def _down(shape: Shape, tokens: int, device: str, **options: Any) -> Bench:
    return _product(shape, tokens, device, n=shape.hidden, k=shape.intermediate, **options)


def _skinny(shape: Shape, tokens: int, device: str, *, k: int) -> Bench:
    """``u = x A_e^T`` for x of k columns: of gate_up, of down, and, as dy B, of gate_up's gradient."""
    rows = _rows(shape, tokens, device)
    x = _randn(rows.pairs, k, device=device)
    a = _randn(shape.experts, LORA_RANK, k, device=device, scale=k**-0.5)
    padded = rows.padded(x)
    impls: dict[str, Call] = {
        "fast": lambda x, a: grouped_down(padded, a, rows.routing, by_rows=False),
        "torch": lambda x, a: torch.cat(_each(rows, lambda part, m: x[part] @ m.t(), a)),
        "grouped_mm": lambda x, a: _grouped_mm(x, a.mT, rows.ends),
    }
    return _compared(rows, (x, a), impls, float(x.nbytes), False)


def _low_rank_backward(shape: Shape, tokens: int, device: str) -> Bench:
    """``dy B_e`` and dB of gate_up in one pass over dy; "apart": in two."""
    rows, n = _rows(shape, tokens, device), 2 * shape.intermediate
    dy, u = (_randn(rows.pairs, width, device=device) for width in (n, LORA_RANK))
    b = _randn(shape.experts, n, LORA_RANK, device=device, scale=n**-0.5)
    padded, narrow = rows.padded(dy), rows.padded(u)

    def apart(dy: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        down = grouped_down(padded, b, rows.routing, by_rows=True)
        return down, grouped_outer(padded, narrow, rows.routing, torch.float32)

    def stock(dy: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        down = _each(rows, lambda part, m: dy[part] @ m, b)
        return torch.cat(down), torch.stack(_each(rows, lambda part: dy[part].t() @ u[part]))

    def errors(fn: Call) -> float:
        want, torchs = stock(dy.double(), u.double(), b.double()), stock(dy, u, b)
        found = torchs
        if fn is not stock:
            d, db = fn(dy, u, b)
            found = d[rows.places], db
        return _worst(found, want) / (2 * _worst(torchs, want))

    impls: dict[str, Call] = {
        "fast": lambda dy, u, b: grouped_down_outer(padded, narrow, b, rows.routing, torch.float32),
        "torch": stock,
        "apart": apart,
    }
    return Bench((dy, u, b), impls, {"forward": float(dy.nbytes)}, errors=errors)


def _swiglu(shape: Shape, tokens: int, device: str) -> Bench:
    """Gate, up and SwiGLU, of which nothing but h is kept."""
    rows = _rows(shape, tokens, device)
    x = _randn(rows.pairs, shape.hidden, device=device)
    weight = _randn(shape.experts, 2 * shape.intermediate, shape.hidden, device=device, scale=shape.hidden**-0.5)
    padded = rows.padded(x)

    def activated(gu: Tensor) -> Tensor:
        gate, up = gu.chunk(2, -1)
        return F.silu(gate) * up

    impls: dict[str, Call] = {
        "fast": lambda x, w: grouped_gemm_swiglu(padded, w, rows.routing),
        "torch": lambda x, w: torch.cat(_each(rows, lambda part, m: activated(x[part] @ m.t()), w)),
        "grouped_mm": lambda x, w: activated(_grouped_mm(x, w.mT, rows.ends)),
    }
    return _compared(rows, (x, weight), impls, 2.0 * rows.pairs * weight[0].numel(), True)


def _outer(shape: Shape, tokens: int, device: str, *, n: int, k: int) -> Bench:
    """``left_e^T right_e``: dA with left the r-wide one, dB with right."""
    rows = _rows(shape, tokens, device)
    left, right = (_randn(rows.pairs, width, device=device) for width in (n, k))
    padded = rows.padded(left), rows.padded(right)

    def stock(left: Tensor, right: Tensor) -> Tensor:
        return torch.stack(_each(rows, lambda part: left[part].t() @ right[part]))

    impls: dict[str, Call] = {
        "fast": lambda left, right: grouped_outer(*padded, rows.routing, torch.float32),
        "torch": stock,
    }
    return _compared(rows, (left, right), impls, float(max(left.nbytes, right.nbytes)), False)


def _gather(shape: Shape, tokens: int, device: str) -> Bench:
    rows = _rows(shape, tokens, device)
    x = _randn(tokens, shape.hidden, device=device)
    impls: dict[str, Call] = {
        "fast": lambda x: gather(x, rows.routing),
        "torch": lambda x: x[rows.order // shape.experts_per_token],
    }
    moved = float(x.nbytes * (1 + shape.experts_per_token))
    return _compared(rows, (x,), impls, moved, False)


def _combine(shape: Shape, tokens: int, device: str) -> Bench:
    """The weighted sum over a token's experts; "torch" as stock's grouped path has it, in the routing weights' fp32."""
    rows = _rows(shape, tokens, device)
    z = _randn(rows.pairs, shape.hidden, device=device)
    padded, back = rows.padded(z), rows.order.argsort()

    def stock(z: Tensor, weights: Tensor) -> Tensor:
        each = (z * weights.flatten()[rows.order, None])[back]
        return each.view(tokens, shape.experts_per_token, -1).sum(1).to(z.dtype)

    impls: dict[str, Call] = {"fast": lambda z, w: combine(padded, rows.routing, w), "torch": stock}
    moved = z.nbytes * (1 + 1 / shape.experts_per_token)
    return _compared(rows, (z, rows.weights), impls, moved, False)


def _swiglu_backward(shape: Shape, tokens: int, device: str) -> Bench:
    """h, dgate, dup and the gradient of the routing weight from dh before that weight: [pairs, 3 I + 1]."""
    rows = _rows(shape, tokens, device)
    dh, gu = (_randn(rows.pairs, n * shape.intermediate, device=device) for n in (1, 2))
    weights = rows.weights.flatten()
    # what the kernel overwrites; its time is the same for what it finds there later
    own, padded, dgu = rows.padded(dh), rows.padded(gu), rows.padded(gu)

    def kernel(*_: Tensor) -> Tensor:
        return weighted_swiglu_bwd(own, padded, dgu, rows.routing.pairs, weights)

    def stock(dh: Tensor, gu: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        gate, up = gu.chunk(2, -1)
        weight = weights[rows.order, None].to(dh.dtype)
        sig = torch.sigmoid(gate)
        silu = gate * sig
        h, dw = silu * up, (silu * up * dh).sum(-1, keepdim=True)
        return h, torch.cat([dh * weight * up * (sig + silu * (1 - sig)), dh * weight * silu], -1), dw

    def errors(fn: Call) -> float:
        want = stock(dh.double(), gu.double(), weights.double())
        torchs = _worst(stock(dh, gu, weights), want)
        if fn is stock:
            return 0.5
        own.copy_(rows.padded(dh))
        dw = kernel()
        found = own[rows.places], dgu[rows.places], dw[rows.places, None]
        return _worst(found, want) / max(2 * torchs, 1e-6)

    # reads dh, gate and up; writes h, dgate and dup
    return Bench((dh, gu, weights), {"fast": kernel, "torch": stock}, {"forward": 6.0 * dh.nbytes}, errors=errors)


def _block(shape: Shape, tokens: int, device: str, *, lora: bool) -> Bench:
    """The experts of a layer, forward and backward; under "torch" one expert after another, adapters in low-rank form.

    Adapters are fp32 under bf16 autocast. PEFT's own form is not here: it would take W + BA for the whole stack.
    """
    rows = _rows(shape, tokens, device)
    sizes = (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    factors: list[Tensor] = []
    for n, k in sizes:
        factors.append(_randn(shape.experts, n, k, device=device, scale=k**-0.5))
        if lora:
            wide = shape.experts * LORA_RANK
            factors.append(_randn(wide, k, device=device, scale=k**-0.5, dtype=torch.float32).requires_grad_())
            factors.append(_randn(n, wide, device=device, scale=0.1, dtype=torch.float32).requires_grad_())

    def fast(x: Tensor, weights: Tensor, index: Tensor, *f: Tensor) -> Tensor:
        groups = [f[i : i + len(f) // 2] for i in (0, len(f) // 2)]
        stacks = [ExpertProjection(w, ExpertAdapter(*ab, SCALING) if ab else None) for w, *ab in groups]
        with torch.autocast(device, DTYPE):
            return lora_experts(x, index, weights, *stacks)

    def stock(x: Tensor, weights: Tensor, index: Tensor, *f: Tensor) -> Tensor:
        groups = [f[i : i + len(f) // 2] for i in (0, len(f) // 2)]
        stacks = [(w, *(ab or (None, None)), SCALING) for w, *ab in groups]
        with torch.autocast(device, DTYPE, enabled=x.dtype == DTYPE):
            return lora_experts_ref(x, index, weights, *stacks)  # type: ignore[arg-type]

    x = _randn(tokens, shape.hidden, device=device).requires_grad_()
    base = sum(2.0 * rows.pairs * n * k for n, k in sizes)
    low = sum(2.0 * rows.pairs * LORA_RANK * (n + k) for n, k in sizes) if lora else 0.0
    inputs = (x, rows.weights.requires_grad_(), rows.index, *factors)
    work = {"forward": base + low, "backward": base + 2 * low}
    return Bench(inputs, {"fast": fast, "torch": stock}, work, gemm=True)


def _outer_of(shape: Shape, tokens: int, device: str, *, factor: str) -> Bench:
    n, k = {"a": (LORA_RANK, shape.hidden), "b": (2 * shape.intermediate, LORA_RANK)}[factor]
    return _outer(shape, tokens, device, n=n, k=k)


EXPERT_OPS: dict[str, Callable[[Shape, int, str], Bench]] = {
    "experts_gather": _gather,
    "experts_combine": _combine,
    "experts_gate_up": _gate_up,
    "experts_gate_up_lora": partial(_gate_up, rank=LORA_RANK),
    "experts_gate_up_swiglu": _swiglu,
    "experts_gate_up_dx": partial(_gate_up, back=True),
    "experts_gate_up_dx_lora": partial(_gate_up, back=True, rank=LORA_RANK),
    "experts_down": _down,
    "experts_down_dx": partial(_down, back=True),
    "experts_low_rank": lambda shape, *args: _skinny(shape, *args, k=shape.hidden),
    "experts_low_rank_down": lambda shape, *args: _skinny(shape, *args, k=shape.intermediate),
    "experts_low_rank_backward": _low_rank_backward,
    "experts_outer_a": partial(_outer_of, factor="a"),
    "experts_outer_b": partial(_outer_of, factor="b"),
    "experts_swiglu_backward": _swiglu_backward,
    "experts_block": partial(_block, lora=False),
    "experts_block_lora": partial(_block, lora=True),
}
