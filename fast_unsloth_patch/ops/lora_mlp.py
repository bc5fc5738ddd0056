"""A SwiGLU MLP with LoRA on any of its three projections, as one differentiable operation.

``y = down(silu(gate(x)) * up(x)) (+ residual)``.

Where the persistent GEMM runs it adds the low-rank updates, and forms the hidden activation in its epilogue where gate
and up are kept by nobody. With library GEMMs the SwiGLU kernels, which are bound by memory, add the updates from the
r-wide ``u`` in registers, so that LoRA on gate and up costs no pass over the intermediate, and the backward kernel does
the same for the update of ``dY W_down``. That kernel overwrites gate and up with their gradients (only where no second
backward can come) and leaves the hidden activation in dh's place: nothing of the intermediate's size is allocated but
dh. Where there is no update to add, SwiGLU makes on the way what the adapter of ``down`` takes of the hidden
activation: ``h A^T`` forward, dA backward (`swiglu_low_rank`).

In the recompute of a checkpointed layer whose output nobody reads (``need_output=False``) the forward stops before
SwiGLU: the hidden activation is formed in backward anyway, and u of ``down`` comes from the forward by ``memos``, or
else from that activation.

SwiGLU is Shazeer, "GLU variants improve transformer" (2020); recomputing the activation in backward instead of saving
it is common to Liger and others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from ..device.dispatch import use_triton
from ..device.launch import jit, launch, tl
from . import swiglu_low_rank
from ._autograd import once_differentiable
from ._low_rank_kernels import dropped, load_factor
from ._operands import (
    TENSORS,
    Dtypes,
    OperandGrads,
    Operands,
    Parameters,
    Projection,
    adapted,
    check_width,
    factors,
    flatten,
    keep_scale,
    one_dtype,
    operands,
    rows,
    without_autocast,
)
from ._siblings import (
    Input,
    Low,
    Memo,
    base_value,
    base_values,
    draw_masks,
    keep_input,
    linear_forward,
    project_down,
    seed_for,
    siblings_forward,
    swiglu_forward,
)
from ._siblings_backward import (
    a_gradients,
    b_gradients,
    base_grads,
    down_gradient,
    input_gradient,
    on_input,
    output_gradients,
    siblings_backward,
)
from .low_rank import LIBRARY_TOKENS, Siblings, expand, pack, precision, rank_slots, widened

_MAX_FUSED_SLOTS = 64
_BLOCK_T, _BLOCK_N = 16, 128
_DOWN_STREAM = 8


@jit
def _add_update(
    value,
    u_ptr,
    m,
    rows,
    row_mask,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # value + u m for one tile. The update is rounded first, as stock rounds it: half the bytes through the layout
    # conversion.
    u = tl.load(
        u_ptr + rows[:, None] * WIDTH + (FIRST + tl.arange(0, SLOTS))[None, :], mask=row_mask[:, None], other=0.0
    )
    return value + tl.dot(u, m.to(u.dtype), input_precision=PRECISION).to(u.dtype).to(tl.float32)


@jit(do_not_specialize=["T"])
def _swiglu_fwd_kernel(
    gu_ptr, u_ptr, bg_ptr, bu_ptr, h_ptr, T,
    N: tl.constexpr, WIDTH: tl.constexpr,
    RG: tl.constexpr, RU: tl.constexpr, SLOTS_G: tl.constexpr, SLOTS_U: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # One block of columns, TILES blocks of rows: the factors stay in registers, else they would be read as often as
    # gate and up.
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    bg = load_factor(bg_ptr, cols, N, RG, SLOTS_G, True, True) if RG else 0
    bu = load_factor(bu_ptr, cols, N, RU, SLOTS_U, True, True) if RU else 0
    for tile in range(TILES):
        rows = (tl.program_id(0).to(tl.int64) * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        row_mask = rows < T
        mask = row_mask[:, None] & (cols < N)[None, :]
        at = gu_ptr + rows[:, None] * (2 * N) + cols[None, :]
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + N, mask=mask, other=0.0).to(tl.float32)
        if RG:
            gate = _add_update(gate, u_ptr, bg, rows, row_mask, 0, WIDTH, SLOTS_G, PRECISION)
        if RU:
            up = _add_update(up, u_ptr, bu, rows, row_mask, SLOTS_G if RG else 0, WIDTH, SLOTS_U, PRECISION)
        h = gate * tl.sigmoid(gate) * up
        tl.store(h_ptr + rows[:, None] * N + cols[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["T"])
def _swiglu_bwd_kernel(
    dh_ptr, gu_ptr, dgu_ptr, u_ptr, bg_ptr, bu_ptr, du_ptr, ad_ptr, bits_ptr, kept, T,
    N: tl.constexpr, WIDTH: tl.constexpr,
    RG: tl.constexpr, RU: tl.constexpr, SLOTS_G: tl.constexpr, SLOTS_U: tl.constexpr,
    RD: tl.constexpr, SLOTS_D: tl.constexpr, WORDS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # In: dh without the update of the down projection's adapter. Out: h in dh's place, dgate and dup.
    start = tl.program_id(1) * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    bg = load_factor(bg_ptr, cols, N, RG, SLOTS_G, True, True) if RG else 0
    bu = load_factor(bu_ptr, cols, N, RU, SLOTS_U, True, True) if RU else 0
    ad = load_factor(ad_ptr, cols, N, RD, SLOTS_D, False, True).to(tl.float32) * kept if RD else 0
    for tile in range(TILES):
        rows = (tl.program_id(0).to(tl.int64) * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        row_mask = rows < T
        mask = row_mask[:, None] & (cols < N)[None, :]
        at = rows[:, None] * (2 * N) + cols[None, :]
        gate = tl.load(gu_ptr + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gu_ptr + at + N, mask=mask, other=0.0).to(tl.float32)
        dh_at = dh_ptr + rows[:, None] * N + cols[None, :]
        dh = tl.load(dh_at, mask=mask, other=0.0).to(tl.float32)
        if RG:
            gate = _add_update(gate, u_ptr, bg, rows, row_mask, 0, WIDTH, SLOTS_G, PRECISION)
        if RU:
            up = _add_update(up, u_ptr, bu, rows, row_mask, SLOTS_G if RG else 0, WIDTH, SLOTS_U, PRECISION)
        if RD and WORDS:
            low = _add_update(tl.zeros_like(dh), du_ptr, ad, rows, row_mask, 0, SLOTS_D, SLOTS_D, PRECISION)
            dh += dropped(low, bits_ptr, rows, start, row_mask, WORDS, BLOCK_N)
        elif RD:
            dh = _add_update(dh, du_ptr, ad, rows, row_mask, 0, SLOTS_D, SLOTS_D, PRECISION)
        sig = tl.sigmoid(gate)
        silu = gate * sig
        dgate = dh * up * (sig + silu * (1.0 - sig))
        tl.store(dgu_ptr + at, dgate.to(dgu_ptr.dtype.element_ty), mask=mask)
        tl.store(dgu_ptr + at + N, (dh * silu).to(dgu_ptr.dtype.element_ty), mask=mask)
        tl.store(dh_at, (silu * up).to(dh_ptr.dtype.element_ty), mask=mask)


def _grid(tokens: int, width: int, tiles: int) -> tuple[int, int]:
    return -(-tokens // (_BLOCK_T * tiles)), -(-width // _BLOCK_N)


def _tiles(tokens: int) -> int:
    return 16 if tokens >= 4096 else 1


def _ranks(group: list[Operands]) -> list[int]:
    return [0 if op.a is None else op.a.shape[0] for op in group]


def _fused(gu: torch.Tensor, group: list[Operands]) -> bool:
    """Whether the kernels add the updates of this group themselves; else the GEMMs start from them."""
    return use_triton(gu) and gu.numel() > 0 and all(r == 0 or rank_slots(r) <= _MAX_FUSED_SLOTS for r in _ranks(group))


def _update_arguments(gu, u, group):
    """(u, B of gate, B of up) and the constexprs that describe them; u is None where the GEMMs started from the
    updates.
    """
    gate, up = group
    ranks = _ranks(group) if u is not None else [0, 0]
    tensors = (gu if u is None else u, gate.b.contiguous() if ranks[0] else gu, up.b.contiguous() if ranks[1] else gu)
    width = 0 if u is None else u.shape[1]
    return tensors, (width, *ranks, *(rank_slots(max(r, 1)) for r in ranks))


def _swiglu_forward(gu: torch.Tensor, u: torch.Tensor | None, group: list[Operands]) -> torch.Tensor:
    """h [T, I] = silu(gate) * up from gu [T, 2 I], with the updates of ``group`` added if u is given."""
    tokens, width = gu.shape[0], gu.shape[1] // 2
    if not use_triton(gu):
        gate, up = gu.split(width, 1)
        gate = widened(gate)
        return (gate * torch.sigmoid(gate) * widened(up)).to(gu.dtype)
    h = torch.empty((tokens, width), dtype=gu.dtype, device=gu.device)
    if h.numel():
        tensors, consts = _update_arguments(gu, u, group)
        tiles = _tiles(tokens)
        launch(_swiglu_fwd_kernel, _grid(tokens, width, tiles), (gu, *tensors, h, tokens),
               (width, *consts, precision(tensors[0].dtype), _BLOCK_T, _BLOCK_N, tiles), num_warps=4)  # fmt: skip
    return h


def swiglu_of(gu: torch.Tensor) -> torch.Tensor:
    """h [T, I] = silu(gate) * up from gate and up side by side [T, 2 I], rounded once."""
    none = Operands(gu, None, None, None, None, 0.0, 0.0)
    return _swiglu_forward(gu, None, [none, none])


def _swiglu_backward(dh, gu, dgu, u, group, op_down, du, masks):
    """Fills dgu [T, 2 I] (which may be gu) and turns dh [T, I] into h; adds the update of ``op_down`` to dh first if
    du is given.
    """
    tokens, width = dh.shape
    if not use_triton(dh):
        gate, up = (widened(t) for t in gu.split(width, 1))
        if du is not None:
            expand(du, on_input([op_down], masks), du.dtype, dh, add=True)
        grad = widened(dh)
        sig = torch.sigmoid(gate)
        silu = gate * sig
        h, dgate, dup = silu * up, grad * up * (sig + silu * (1.0 - sig)), grad * silu
        dgu[:, :width], dgu[:, width:] = dgate, dup  # only now: dgu may be gu, and grad may be dh
        dh.copy_(h)
        return
    if dh.numel() == 0:
        return
    tensors, consts = _update_arguments(gu, u, group)
    rank = 0 if du is None else op_down.a.shape[0]
    args = (
        dh, gu, dgu, *tensors, dh if du is None else du, dh if du is None else op_down.a.contiguous(),
        dh if masks is None else masks, keep_scale(op_down.dropout), tokens,
    )  # fmt: skip
    tiles = _tiles(tokens)
    consts = (
        width, *consts, rank, rank_slots(max(rank, 1)), 0 if masks is None else masks.shape[2],
        precision(tensors[0].dtype if du is None else du.dtype), _BLOCK_T, _BLOCK_N, tiles,
    )  # fmt: skip
    launch(_swiglu_bwd_kernel, _grid(tokens, width, tiles), args, consts, num_warps=4)


def second_backward_possible() -> bool:
    """In a backward: whether the graph is kept, so that what was saved must not be overwritten."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


class LoraMLP(Function):
    """Autograd node of ``lora_mlp``; saves x (or what the norm before it saves), gate and up (without their updates
    where fused), their u, the masks and the parameters.
    """

    @staticmethod
    def forward(ctx, x, residual, *rest):
        *tensors, values, dtypes, seed, need_output, keep, memos, tally = rest
        gate, up, op_down = operands(tuple(tensors), values)
        group = [gate, up]
        x2d = rows(x, dtypes.base)
        width = gate.weight.shape[0]
        masks = draw_masks(x2d, adapted(group), seed)
        low = project_down(x2d, group, masks, dtypes.low, memos[0])
        weights = base_values(group, dtypes.base, forward=True)
        h = None if keep or not need_output else swiglu_forward(x2d, group, weights, low, dtypes)
        if h is None:
            gu = torch.empty((x2d.shape[0], 2 * width), dtype=dtypes.base, device=x.device)
            done = siblings_forward(x2d, group, weights, low, gu, dtypes, updates_later=_fused(gu, group))
            updates_left = low.u is not None and not done
        else:
            gu, updates_left = stand_in(x2d, x2d.shape[0], 2 * width, dtypes.base), False
        del weights  # unpacked ones are large
        masks_down = draw_masks(gu[:, :width], adapted([op_down]), seed, _DOWN_STREAM)
        if need_output:
            u_down = None
            if masks_down is None and not updates_left:
                h, u_down = _hidden_and_u(gu, h, op_down, dtypes, memos[1])
            if h is None:
                h = _swiglu_forward(gu, low.u if updates_left else None, group)
            y = torch.empty((*x.shape[:-1], op_down.weight.shape[0]), dtype=dtypes.y, device=x.device)
            flat = y.view(x2d.shape[0], y.shape[-1])
            if u_down is None:
                u_down = project_down(h, [op_down], masks_down, dtypes.low, memos[1]).u
            joined = residual is not None and residual.dtype is y.dtype
            linear_forward(h, op_down, u_down, dtypes, flat, residual.view(flat.shape) if joined else None)
            if residual is not None and not joined:
                y = y + residual
        else:
            dtype = dtypes.y if residual is None else torch.promote_types(dtypes.y, residual.dtype)
            y = torch.zeros((), dtype=dtype, device=x.device).expand(*x.shape[:-1], op_down.weight.shape[0])
            u_down = _recalled(memos[1], masks_down)
            if u_down is None and op_down.a is not None:
                u_down = stand_in(x2d, x2d.shape[0], rank_slots(op_down.a.shape[0]), dtypes.low)
        # The same tensors whether or not the output was computed: a non-reentrant checkpoint compares forward and
        # recompute.
        kept = keep_input(x, x2d, dtypes, ctx.needs_input_grad[2 : 2 + 2 * TENSORS])
        ctx.save_for_backward(*kept, *low, masks, gu, u_down, masks_down)
        ctx.parameters = Parameters.of(tuple(tensors))
        ctx.values, ctx.dtypes, ctx.tally, ctx.updates_left = values, dtypes, tally, updates_left
        ctx.u_left_out = u_down is not None and is_stand_in(u_down)
        ctx.x_shape, ctx.x_dtype, ctx.residual_dtype = x.shape, x.dtype, None if residual is None else residual.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if ctx.tally is not None:
            ctx.tally.hit_backward()
        *kept, u, packed, masks, gu, u_down, masks_down = ctx.saved_tensors
        if is_stand_in(gu):
            raise RuntimeError("gate and up were not kept for this backward")
        gate, up, op_down = operands(ctx.parameters.unchanged(), ctx.values)
        dtypes, needs = ctx.dtypes, ctx.needs_input_grad
        d_residual = dy.to(ctx.residual_dtype) if needs[1] else None
        with without_autocast(gu):
            dy = rows(dy, dtypes.base)
            start = 2 + 2 * TENSORS
            needs_down = needs[start : start + TENSORS]
            du, db = None, None
            # The node is the forward's, what it saved may be the recompute's: then only the tensor itself can tell.
            # Hooks that copy it lose its strides, but then the node is the recompute's own.
            if op_down.a is not None and needs_down[3] and not (ctx.u_left_out or is_stand_in(u_down)):
                du, (db,) = output_gradients(dy, u_down, [op_down], [0], dtypes)
            elif op_down.a is not None:
                du = down_gradient(dy, [op_down], [0], dtypes)
            weight, du_left = base_value(op_down, dtypes.base, forward=False), du
            h = input_gradient(dy, [weight], [op_down], du, dtypes) if masks_down is None else None  # dh for now
            if h is not None:
                du_left = None
            else:
                h = torch.mm(dy, weight)
            del weight
            if du_left is not None and use_triton(h) and rank_slots(op_down.a.shape[0]) > _MAX_FUSED_SLOTS:  # type: ignore[union-attr]
                expand(du_left, on_input([op_down], masks_down), dtypes.low, h, add=True)
                du_left = None
            dgu = torch.empty_like(gu) if second_backward_possible() else gu
            da = None
            if not ctx.updates_left and du_left is None and masks_down is None:
                da = _swiglu_and_a(h, gu, dgu, op_down, du, db, dtypes, needs_down)
            if da is None:
                _swiglu_backward(
                    h,
                    gu,
                    dgu,
                    u if ctx.updates_left else None,
                    [gate, up],
                    op_down,
                    du_left,
                    masks_down if du_left is not None else None,
                )
            down_grads = _down_backward(dy, h, op_down, du, da, db, masks_down, dtypes, needs_down)
            del h
            dx, parts = siblings_backward(
                dgu,
                Input(*kept),
                Low(u, packed),
                [gate, up],
                masks,
                dtypes,
                needs[2 : 2 + 2 * TENSORS],
                need_dx=needs[0],
            )
        if dx is not None:
            dx = dx.view(ctx.x_shape).to(ctx.x_dtype)
        return dx, d_residual, *parts[0], *parts[1], *down_grads, None, None, None, None, None, None, None


def stand_in(like: torch.Tensor, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Saved for its shape, [rows, width], in place of what nobody will read, or what backward will form itself."""
    return like.new_full((), float("nan"), dtype=dtype).expand(rows, width)


def is_stand_in(t: torch.Tensor) -> bool:
    """Is it such a one?"""
    return t.stride() == (0, 0)


def _recalled(memo: Memo | None, masks: torch.Tensor | None) -> torch.Tensor | None:
    return None if memo is None or memo.low is None or masks is not None else memo.low[0]


def _hidden_and_u(
    gu: torch.Tensor, h: torch.Tensor | None, op: Operands, dtypes: Dtypes, memo: Memo | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """h, unless it is known, and u of the down projection, where one kernel makes both; else h as it is and None.
    ``memo`` as in `project_down`.
    """
    known = memo is not None and memo.low is not None
    if op.a is None or known or gu.shape[0] < LIBRARY_TOKENS or dtypes.low is not dtypes.base:
        return h, None
    if not swiglu_low_rank.covers(gu if h is None else h, rank_slots(op.a.shape[0])):
        return h, None
    (packed,) = pack(Siblings((op.a.contiguous(),), (op.scaling,)), dtypes.low)[1]
    if h is None:
        h, u = swiglu_low_rank.swiglu_down(gu, packed)
    else:
        u = swiglu_low_rank.hidden_down(h, packed)
    if memo is not None:
        memo.keep(u, packed)
    return h, u


def _swiglu_and_a(dh, gu, dgu, op: Operands, du, db, dtypes: Dtypes, needs) -> torch.Tensor | None:
    """Fills dgu as `_swiglu_backward` does and returns dA of the down projection, where one kernel does both and nobody
    else needs h; else None, and nothing is done.
    """
    need_weight, _, need_a, need_b, _ = needs
    if not need_a or need_weight or (need_b and db is None) or dtypes.low is not dtypes.base:
        return None
    if dh.shape[0] < LIBRARY_TOKENS or not swiglu_low_rank.covers(dh, du.shape[1]):
        return None
    return swiglu_low_rank.swiglu_outer(dh, gu, dgu, du, op.a.shape[0], op.a.dtype)  # type: ignore[union-attr]


def _down_backward(dy, h, op: Operands, du, da, db, masks, dtypes: Dtypes, needs) -> OperandGrads:
    """Gradients of the down projection's own parameters, from its input h and output gradient dy; dA and dB, if they
    are not known yet, the latter with u formed again. With dA known h may be anything.
    """
    grads: dict[str, Any] = base_grads(dy, h, op, needs)
    _, _, need_a, need_b, _ = needs
    if da is not None:
        grads["a"] = da
    elif need_a:
        (grads["a"],) = a_gradients(du, Input(h), [op], masks, dtypes)
    if need_b and db is None:
        (db,) = b_gradients(dy, project_down(h, [op], masks, dtypes.low).u, [op], [0], dtypes)
    return OperandGrads(**grads, b=db)


def lora_mlp(
    x: torch.Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    residual: torch.Tensor | None = None,
    need_output: bool = True,
    keep: bool = True,
    memos: tuple[Memo | None, Memo | None] = (None, None),
    tally: Any = None,
) -> torch.Tensor:
    """``down(silu(gate(x)) * up(x))``, each projection with its own adapter or none, plus ``residual`` if given.

    Args:
        x: [..., K].
        gate, up: projections to the intermediate width I.
        down: projection back to K.
        residual: [..., K], added to the result.
        need_output: False where only the backward will be used (a recompute whose output nobody reads): the result is
            then zeros of the right shape and dtype, and everything that backward needs is saved.
        keep: False where nobody will read what this call saves for backward (the forward of a checkpointed region,
            whose recompute saves it again): gate and up need not be written then.
        memos: carry ``x A^T`` of gate and up, and that of down, from the forward of a checkpointed region to its
            recompute.
        tally: object with ``hit_backward()``, called once a backward.

    Returns:
        [..., K] in the dtype that ``lora_linear`` would give ``down``'s result (promoted with the residual's).

    Raises:
        ValueError: if widths do not fit, or a packed weight computes in another dtype than x's without autocast.
    """
    check_width(x.shape[-1], gate, up)
    if gate.weight.shape != up.weight.shape or down.weight.shape[1] != gate.weight.shape[0]:
        raise ValueError(
            f"gate {tuple(gate.weight.shape)}, up {tuple(up.weight.shape)} and down {tuple(down.weight.shape)} do not "
            "fit: expected gate and up [I, K] and down [K, I]"
        )
    check_width(gate.weight.shape[0], down)
    if residual is not None and residual.shape != (*x.shape[:-1], down.weight.shape[0]):
        raise ValueError(
            f"residual {tuple(residual.shape)} does not fit the result: "
            f"expected {(*x.shape[:-1], down.weight.shape[0])}"
        )
    return LoraMLP.apply(
        x, residual, *flatten(gate), *flatten(up), *flatten(down), (factors(gate), factors(up), factors(down)),
        one_dtype(x, gate, up, down), seed_for(x, gate, up, down), need_output, keep, memos, tally,
    )  # fmt: skip
