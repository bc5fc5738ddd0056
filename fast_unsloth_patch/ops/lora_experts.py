"""A mixture of SwiGLU experts, with LoRA in low-rank form on their stacked weights, as one differentiable operation.

``y_t = sum_j w_tj down_e(silu(gate_e(x_t)) * up_e(x_t)) (+ residual_t)`` with ``e = index_tj``, and for each stack
``project_e(x) = x W_e^T + s (x A_e^T) B_e^T``.

Rows are sorted by expert once (`routing`), the products are grouped (`grouped_gemm`), the results of a token are summed
in fp32 in the order of its choices, without atomics. PEFT builds ``W + s B A`` for all experts in each layer, keeps it
for backward and forms the dense gradient of it; none of the three exists here.

The routing weights are applied to what is small or read anyway: in backward to the r-wide products and inside the
SwiGLU kernel, whose row sums ``<h, dh>`` are the gradient of the routing weights (``z = W h``, so ``<z, dy> = <h, W^T
dy>``). Hence the experts' output is needed by nobody in backward, and the recompute of a checkpointed layer whose
output nobody reads (``need_output=False``) ends before SwiGLU, with the routing and both ``x A^T`` from the forward.

The gradient of a routing weight without the expert's output is due to Guo et al., "SonicMoE" (2025); rows padded to
whole blocks an expert to Gale et al., "MegaBlocks" (2022).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..device.dispatch import use_triton
from ..device.launch import device_limits
from ._autograd import once_differentiable
from ._expert_kernels import pack_a, pack_b, unpack_a, unpack_b, weighted_swiglu_bwd
from ._operands import Dtypes, Parameters, without_autocast
from ._siblings import Input, Memo, keep_input
from .grouped_gemm import GroupedUpdate, grouped_gemm, grouped_gemm_dx, grouped_gemm_swiglu, grouped_outer
from .grouped_low_rank import grouped_down, grouped_down_outer
from .lora_mlp import is_stand_in, second_backward_possible, stand_in, swiglu_of
from .low_rank import rank_slots
from .routing import Routing, combine, gather, route


class ExpertAdapter(NamedTuple):
    """LoRA on a stack of expert weights, as PEFT stores it (from 0.20 on).

    Args:
        a: [E * r, K], an expert's rows together.
        b: [N, r * E], column ``rank * E + expert``.
        scaling: factor of the update.
    """

    a: Tensor
    b: Tensor
    scaling: float


class ExpertProjection(NamedTuple):
    """A stack of expert weights and the adapter on it, if any.

    Args:
        weight: [E, N, K]; a tensor, frozen or trainable, or a packed stack (`grouped_gemm`).
        adapter: None without LoRA.
    """

    weight: Any
    adapter: ExpertAdapter | None


class _Stack(NamedTuple):
    """One projection inside the Function."""

    weight: Any
    a: Tensor | None
    b: Tensor | None
    scaling: float

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The scaled A's [E, slots, K] and the B's [E, N, slots] in the compute dtype."""
        if self.a is None or self.b is None:
            return None, None
        experts = self.weight.shape[0]
        return pack_a(self.a, experts, self.scaling, dtype), pack_b(self.b, experts, dtype)


_TENSORS = 3  # of a projection: weight, A, B


def _block(x: Tensor, dtype: torch.dtype) -> int:
    """Rows a block: what the persistent kernel takes where it runs, else few, so that little is padding."""
    persistent = dtype in (torch.bfloat16, torch.float16) and x.is_cuda and use_triton(x.new_empty(0, dtype=dtype))
    return 128 if persistent and device_limits(x.get_device()).capability == 90 else 16


def _update(u: Tensor | None, factors: Tensor | None) -> GroupedUpdate | None:
    return None if u is None or factors is None else GroupedUpdate(u, factors)


def _low(x: Tensor, a: Tensor | None, routing: Routing, known: Tensor | None) -> Tensor | None:
    """``u_r = s x_r A_e^T`` [R, slots]; None without an adapter."""
    if a is None:
        return None
    return grouped_down(x, a, routing, by_rows=False) if known is None else known


def _weighted(t: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None or scale is None else (t * scale).to(dtype)


def _low_back(
    dy: Tensor, b: Tensor | None, u: Tensor | None, routing: Routing, stack: _Stack
) -> tuple[Tensor | None, Tensor | None]:
    """``du_r = dy_r B_e`` [R, slots] and ``dy_e^T u_e``; None without an adapter, or for the latter without u."""
    if b is None:
        return None, None
    if u is None:
        return grouped_down(dy, b, routing, by_rows=True), None
    return grouped_down_outer(dy, u, b, routing, stack.b.dtype)  # type: ignore[union-attr]


class LoraExperts(Function):
    """Autograd node of `lora_experts`; saves x (or what its norm saves), the routing, gate and up, and both u."""

    @staticmethod
    def forward(ctx, x, weights, residual, *rest):
        *tensors, index, scalings, dtype, need_output, keep, memo, tally = rest
        gate_up, down = _stacks(tensors, scalings)
        experts, width = gate_up.weight.shape[0], gate_up.weight.shape[1] // 2
        known = None if memo is None else memo.low
        with without_autocast(x):
            x2d = x.reshape(-1, x.shape[-1]).to(dtype)
            routing, u, u_down = _recalled(known, x2d, index, experts)
            a, b = gate_up.factors(dtype)
            rows = gather(x2d, routing)
            u = _low(rows, a, routing, u)
            gu, h = None, None
            if need_output and not keep:
                h = grouped_gemm_swiglu(rows, gate_up.weight, routing, update=_update(u, b))
                gu = stand_in(x2d, rows.shape[0], 2 * width, dtype)
            else:
                gu = grouped_gemm(rows, gate_up.weight, routing, update=_update(u, b))
            del rows, a, b
            if need_output:
                if h is None:
                    h = swiglu_of(gu)
                a, b = down.factors(dtype)
                u_down = _low(h, a, routing, u_down)
                z = grouped_gemm(h, down.weight, routing, update=_update(u_down, b))
                y = torch.empty(x.shape, dtype=_result_dtype(x, residual), device=x.device)
                # y itself, and no view of it, is returned: to views hooks like FSDP2's do not keep.
                flat = None if residual is None else residual.reshape(x2d.shape)
                combine(z, routing, weights, flat, out=y.view(x2d.shape))
            else:
                y = torch.zeros((), dtype=_result_dtype(x, residual), device=x.device).expand(x.shape)
                if u_down is None and down.a is not None:
                    slots = rank_slots(down.a.shape[0] // experts)
                    u_down = stand_in(x2d, routing.pairs.shape[0], slots, dtype)
        if memo is not None and known is None:
            memo.keep(*routing[:3], u, u_down)
        # The same tensors whether or not the output was computed: a non-reentrant checkpoint compares.
        weight, a, b = ctx.needs_input_grad[3 : 3 + _TENSORS]
        kept = keep_input(x, x2d, Dtypes(dtype, dtype, dtype, dtype), (weight, False, a, b, False))
        ctx.save_for_backward(*kept, weights, *routing[:3], gu, u, u_down)
        ctx.parameters = Parameters.of(tuple(tensors))
        ctx.scalings, ctx.dtype, ctx.block, ctx.tally = scalings, dtype, routing.block, tally
        # Noted, for hooks that copy what is saved lose the strides that show it.
        ctx.u_left_out = u_down is not None and is_stand_in(u_down)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if ctx.tally is not None:
            ctx.tally.hit_backward()
        *kept, weights, pairs, rows, ends, gu, u, u_down = ctx.saved_tensors
        routing = Routing(pairs, rows, ends, ctx.block)
        if is_stand_in(gu):
            raise RuntimeError("gate and up were not kept for this backward")
        gate_up, down = _stacks(ctx.parameters.unchanged(), ctx.scalings)
        needs, dtype = ctx.needs_input_grad, ctx.dtype
        u_down = None if ctx.u_left_out else u_down
        d_residual = dy.to(ctx.residual_dtype) if needs[2] else None
        dx = d_weights = None
        with without_autocast(gu):
            dy = dy.reshape(-1, dy.shape[-1]).to(dtype)
            rows = gather(dy, routing)
            gate_up_needs, down_needs = needs[3 : 3 + _TENSORS], needs[3 + _TENSORS : 3 + 2 * _TENSORS]
            scale = None
            if down_needs[1] or down_needs[2]:
                # The routing weights of the rows; they are in none of rows, du and u.
                scale = gather(weights.new_ones((weights.shape[0], 1)), routing, weights)
            if not down_needs[2] or u_down is None or is_stand_in(u_down):
                u_down = None
            a, b = down.factors(dtype)
            du, db = _low_back(rows, b, _weighted(u_down, scale, dtype), routing, down)
            h = grouped_gemm_dx(rows, down.weight, routing, update=_update(du, a))  # dh, before the routing weight
            dgu = torch.empty_like(gu) if second_backward_possible() else gu
            dw = weighted_swiglu_bwd(h, gu, dgu, routing.pairs, weights.reshape(-1))  # and h, in dh's place
            if needs[1]:
                d_weights = _of_pairs(dw, routing).to(weights.dtype)
            if down_needs[2] and db is None:
                u_down = _weighted(_low(h, a, routing, None), scale, dtype)
                db = grouped_outer(rows, u_down, routing, down.b.dtype)  # type: ignore[union-attr, arg-type]
            da, db = _low_grads(down, _weighted(du, scale, dtype), h, db, routing, down_needs)
            d_down = (
                grouped_outer(gather(dy, routing, weights), h, routing, down.weight.dtype) if down_needs[0] else None
            )
            down_grads = d_down, da, db
            del h, rows, du
            a, b = gate_up.factors(dtype)
            du, db = _low_back(dgu, b, u if gate_up_needs[2] else None, routing, gate_up)
            if needs[0]:
                rows = grouped_gemm_dx(dgu, gate_up.weight, routing, update=_update(du, a))
                dx = combine(rows, routing, dtype=ctx.x_dtype).view(ctx.x_shape)
                del rows
            grads = _gate_up_grads(gate_up, Input(*kept), dgu, du, db, routing, gate_up_needs)
        return dx, d_weights, d_residual, *grads, *down_grads, None, None, None, None, None, None, None


def _stacks(tensors: Any, scalings: tuple[float, float]) -> tuple[_Stack, _Stack]:
    weight, a, b, down_weight, down_a, down_b = tensors
    return _Stack(weight, a, b, scalings[0]), _Stack(down_weight, down_a, down_b, scalings[1])


def _recalled(known: Any, x: Tensor, index: Tensor, experts: int) -> tuple[Routing, Tensor | None, Tensor | None]:
    """Routing and both u of the forward, if this is its recompute; else the routing only.

    The rows of u lie as the routing says. Were it found again, from gate logits with other last bits, they might not.
    (The routing weights are the recompute's own: should its gate choose otherwise, at a near tie, that token's gradient
    goes to the other logit.)
    """
    block = _block(x, x.dtype)
    if known is None:
        return route(index, experts, block), None, None
    pairs, rows, ends, u, u_down = known
    return Routing(pairs, rows, ends, block), u, u_down


def _of_pairs(values: Tensor, routing: Routing) -> Tensor:
    """What each pair's row has [T, k]; zero for a pair whose expert does not exist."""
    rows = routing.rows.reshape(-1)
    return values.index_select(0, rows.clamp_min(0)).masked_fill_(rows < 0, 0.0).view(routing.rows.shape)


def _result_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _low_grads(
    stack: _Stack,
    du: Tensor | None,
    x: Tensor | None,
    db: Tensor | None,
    routing: Routing,
    needs: Any,
    norm_weight: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dA and dB of a stack as PEFT stores them, from ``du = dy B``, the product's input and ``db``, dB by expert.

    With ``norm_weight``, x is what that multiplies to give the input.
    """
    da = None
    experts = stack.weight.shape[0]
    if needs[1]:
        da = grouped_outer(du, x, routing, stack.a.dtype if norm_weight is None else torch.float32)  # type: ignore[union-attr, arg-type]
        da = unpack_a(da if norm_weight is None else da * norm_weight, stack.a, experts, stack.scaling)  # type: ignore[arg-type]
    return da, unpack_b(db, stack.b, experts) if needs[2] else None  # type: ignore[arg-type]


def _gate_up_grads(
    stack: _Stack, kept: Input, dgu: Tensor, du: Tensor | None, db: Tensor | None, routing: Routing, needs: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of a norm's result, ``x = w (n rstd)``, the norm's input is kept: then ``dA = (du^T (n rstd)) w``."""
    x, rstd, norm_weight = kept
    rows = None
    if x is not None and any(needs):
        rows = gather(x, routing, None if rstd is None else rstd.view(-1, 1).expand(routing.rows.shape))
    da, db = _low_grads(stack, du, rows, db, routing, needs, norm_weight)
    dw = grouped_outer(dgu, rows, routing, stack.weight.dtype) if needs[0] else None  # type: ignore[arg-type]
    return dw, da, db


def lora_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: ExpertProjection,
    down: ExpertProjection,
    *,
    dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    need_output: bool = True,
    keep: bool = True,
    memo: Memo | None = None,
    tally: Any = None,
) -> Tensor:
    """``y_t = sum_j w_tj down_e(silu(gate_e(x_t)) * up_e(x_t))``, ``e = index_tj``, plus ``residual`` if given.

    Args:
        x: [..., H], T tokens in all.
        top_k_index: [T, k], integers below E.
        top_k_weights: [T, k], floating; they get a gradient.
        gate_up: stack [E, 2 I, H], the first I rows of an expert its gate.
        down: stack [E, H, I].
        dtype: what the products are computed in; default the weights' dtype.
        residual: [..., H], added to the result in fp32, before its only rounding.
        need_output: False where only the backward will be used (a recompute whose output nobody reads): the result is
            then zeros of the right shape and dtype.
        keep: False where nobody will read what this call saves for backward (the forward of a checkpointed region).
        memo: carries the routing and both ``x A^T`` from the forward of a checkpointed region to its recompute.
        tally: object with ``hit_backward()``, called once a backward.

    Returns:
        [..., H] in x's dtype (promoted with the residual's). Products accumulate in fp32, gate, up, h and the experts'
        outputs are rounded to ``dtype``, the sum over a token's experts is fp32. Differentiable once, in x, the routing
        weights, the residual, the adapters and the weights that require it.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(x, top_k_index, top_k_weights, gate_up, down, residual)
    return LoraExperts.apply(
        x, top_k_weights, residual, *_flat(gate_up), *_flat(down), top_k_index, (_scaling(gate_up), _scaling(down)),
        dtype or gate_up.weight.dtype, need_output, keep, memo, tally,
    )  # fmt: skip


def _flat(projection: ExpertProjection) -> tuple[Any, ...]:
    weight, adapter = projection
    return (weight, None, None) if adapter is None else (weight, adapter.a, adapter.b)


def _scaling(projection: ExpertProjection) -> float:
    return 0.0 if projection.adapter is None else projection.adapter.scaling


def _check(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: ExpertProjection,
    down: ExpertProjection,
    residual: Tensor | None,
) -> None:
    """Shapes that a kernel would read out of bounds with."""
    shapes = tuple(gate_up.weight.shape), tuple(down.weight.shape)
    if (
        len(shapes[0]) != 3
        or shapes[0] != (shapes[0][0], 2 * (shapes[0][1] // 2), x.shape[-1])
        or shapes[1] != (shapes[0][0], x.shape[-1], shapes[0][1] // 2)
    ):
        raise ValueError(
            f"gate_up {shapes[0]} and down {shapes[1]} do not fit x {tuple(x.shape)}: expected x [..., H], gate_up "
            "[E, 2 I, H] and down [E, H, I]"
        )
    tokens = x.numel() // x.shape[-1]
    if index.dim() != 2 or index.shape != weights.shape or index.shape[0] != tokens:
        raise ValueError(
            f"top_k_index {tuple(index.shape)} and top_k_weights {tuple(weights.shape)}: expected both [T, k] for the "
            f"{tokens} tokens of x"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)}: expected {tuple(x.shape)}")
    for name, (weight, adapter) in (("gate_up", gate_up), ("down", down)):
        if adapter is None:
            continue
        experts, n, k = weight.shape
        rank = adapter.a.shape[0] // experts
        if adapter.a.shape != (rank * experts, k) or adapter.b.shape != (n, rank * experts) or rank == 0:
            raise ValueError(
                f"LoRA A {tuple(adapter.a.shape)} and B {tuple(adapter.b.shape)} do not fit {name} "
                f"{tuple(weight.shape)}: expected A [{experts} * r, {k}] and B [{n}, r * {experts}]"
            )
