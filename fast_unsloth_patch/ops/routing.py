"""The rows of a mixture of experts: which pair (token, choice) is computed in which row, and the way there and back.

Every pair gets a row. Rows are grouped by expert and each expert's are padded to a multiple of ``block``, so that a
block of rows has one expert and no kernel masks at the edge of a group. The number of rows is a bound that depends on
shapes alone, so nothing is read back from the device; what lies beyond the last expert's rows belongs to nobody.

Padding each group to whole tiles of the GEMM is the layout of vLLM's fused MoE kernels (``moe_align_block_size``,
Apache-2.0); there are no atomics here: a counting sort of two launches, the same result every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..device.dispatch import use_triton
from ..device.launch import as_rows, jit, launch, tl
from ..reference.routing import combine_ref, gather_ref, route_ref

MAX_CHOICES, MAX_EXPERTS = 8, 256
# Elements of the tiles [pairs, experts] of the counting sort: 8 a thread.
_SORT_TILE, _SORT_WARPS = 2048, 8
# Programs of the sort at most: each adds up what all of them counted.
_SORT_PROGRAMS = 128
# Elements of a tile: 32 a thread, four 16-byte loads in bf16; where they are read for every choice, half of that.
_GATHER_TILE, _COMBINE_TILE = 4096, 2048
# Rows whose padding one program of `gather` looks for.
_PADDING_ROWS = 64


class Routing(NamedTuple):
    """Where the pairs (token, choice) of T tokens with k choices each are computed.

    With P = T * k pairs R is ``(P + min(E, P) * (block - 1)) // block * block``; all tensors are int32 and contiguous.

    Args:
        pairs: [R], the pair that a row holds, as token * k + choice; -1: none (padding, or a block that nobody uses).
        rows: [T, k], the row of each pair, the inverse of ``pairs``; -1 for a pair whose expert does not exist.
        ends: [E], one past each expert's last row, its padding included (``offs`` of torch's ``grouped_mm``).
        block: rows of a block.
    """

    pairs: Tensor
    rows: Tensor
    ends: Tensor
    block: int


@jit
def _tile_of_pairs(index_ptr, stride_t, stride_k, first, n_pairs, K: tl.constexpr, SUB: tl.constexpr):
    # The experts of SUB pairs; -1 beyond the last. Compared in the index's own width: no large index wraps round.
    pair = first + tl.arange(0, SUB)
    at = (pair // K).to(tl.int64) * stride_t + (pair % K) * stride_k
    return pair, tl.load(index_ptr + at, mask=pair < n_pairs, other=-1)


@jit(do_not_specialize=["n_pairs", "chunk"])
def _count_kernel(
    index_ptr, counts_ptr, stride_t, stride_k, n_pairs, chunk,
    K: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """counts[c, e]: how many of the chunk's pairs go to expert e. SLOTS is E, rounded up to a power of two."""
    start = tl.program_id(0) * chunk
    experts = tl.arange(0, SLOTS)
    total = tl.zeros([SLOTS], tl.int32)
    for first in range(start, start + chunk, SUB):
        _, expert = _tile_of_pairs(index_ptr, stride_t, stride_k, first, n_pairs, K, SUB)
        mine = (expert[:, None] == experts[None, :]) & (experts < E)[None, :]
        total += tl.sum(mine.to(tl.int32), axis=0)
    tl.store(counts_ptr + tl.program_id(0) * SLOTS + experts, total)


@jit(do_not_specialize=["n_pairs", "n_rows", "n_chunks", "chunk", "share"])
def _place_kernel(
    index_ptr, counts_ptr, pairs_ptr, rows_ptr, ends_ptr, stride_t, stride_k,
    n_pairs, n_rows, n_chunks, chunk, share,
    K: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr, SUB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk of pairs to its rows; then, in a share of the rows, the padding."""
    pid = tl.program_id(0)
    experts = tl.arange(0, SLOTS)
    # Pairs of each expert, and those of them in the chunks before this one.
    total = tl.zeros([SLOTS], tl.int32)
    before = tl.zeros([SLOTS], tl.int32)
    for first in range(0, n_chunks, SUB):
        chunks = first + tl.arange(0, SUB)
        at = counts_ptr + chunks[:, None] * SLOTS + experts[None, :]
        counts = tl.load(at, mask=(chunks < n_chunks)[:, None], other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((chunks < pid)[:, None], counts, 0), axis=0)
    padded = (total + BLOCK - 1) // BLOCK * BLOCK
    ends = tl.cumsum(padded, axis=0)
    starts = ends - padded
    if pid == 0:
        tl.store(ends_ptr + experts, ends, mask=experts < E)

    free = starts + before
    start = pid * chunk
    for first in range(start, start + chunk, SUB):
        pair, expert = _tile_of_pairs(index_ptr, stride_t, stride_k, first, n_pairs, K, SUB)
        mine = ((expert[:, None] == experts[None, :]) & (experts < E)[None, :]).to(tl.int32)
        place = tl.cumsum(mine, axis=0) - 1 + free[None, :]
        row = tl.sum(mine * place, axis=1)
        found = tl.sum(mine, axis=1) > 0
        tl.store(rows_ptr + pair, tl.where(found, row, -1), mask=pair < n_pairs)
        tl.store(pairs_ptr + row, pair, mask=found)
        free += tl.sum(mine, axis=0)

    start = pid * share
    for first in range(start, start + share, SUB):
        row = first + tl.arange(0, SUB)
        held = (row[:, None] >= starts[None, :]) & (row[:, None] < (starts + total)[None, :])
        padding = tl.sum(held.to(tl.int32), axis=1) == 0
        tl.store(pairs_ptr + row, tl.full([SUB], -1, tl.int32), mask=padding & (row < n_rows))


@jit(do_not_specialize=["n_tokens", "n_rows", "token_tiles"])
def _gather_kernel(
    x_ptr, pairs_ptr, rows_ptr, scale_ptr, out_ptr, stride_xt, n_tokens, n_rows, token_tiles,
    H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Tokens to their rows, each read once; the programs after these write the rows without a pair."""
    blocks: tl.constexpr = (H + BLOCK - 1) // BLOCK
    tile = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = (cols < H)[None, :]
    if tile < token_tiles:
        tokens = tile * TOKENS + tl.arange(0, TOKENS)
        known = tokens < n_tokens
        at = x_ptr + tokens.to(tl.int64)[:, None] * stride_xt + cols[None, :]
        x = tl.load(at, mask=known[:, None] & inside, other=0.0)
        for j in tl.static_range(K):
            row = tl.load(rows_ptr + tokens * K + j, mask=known, other=-1)
            y = x
            if SCALED:
                scale = tl.load(scale_ptr + tokens * K + j, mask=known, other=0.0).to(tl.float32)
                y = (x.to(tl.float32) * scale[:, None]).to(x.dtype)
            at = out_ptr + row.to(tl.int64)[:, None] * H + cols[None, :]
            tl.store(at, y, mask=(row >= 0)[:, None] & inside)
    else:
        first = (tile - token_tiles) * ROWS
        for step in range(0, ROWS, TOKENS):
            row = first + step + tl.arange(0, TOKENS)
            empty = tl.load(pairs_ptr + row, mask=row < n_rows, other=0) < 0
            if tl.sum(empty.to(tl.int32), axis=0) > 0:
                at = out_ptr + row.to(tl.int64)[:, None] * H + cols[None, :]
                zeros = tl.zeros([TOKENS, BLOCK], out_ptr.dtype.element_ty)
                tl.store(at, zeros, mask=empty[:, None] & inside)


@jit(do_not_specialize=["n_tokens"])
def _combine_kernel(
    z_ptr, rows_ptr, weights_ptr, residual_ptr, out_ptr, stride_zr, stride_rt, n_tokens,
    H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    WEIGHTED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (H + BLOCK - 1) // BLOCK
    tokens = (tl.program_id(0) // blocks) * TOKENS + tl.arange(0, TOKENS)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    known = tokens < n_tokens
    inside = (cols < H)[None, :]
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    for j in tl.static_range(K):
        row = tl.load(rows_ptr + tokens * K + j, mask=known, other=-1)
        at = z_ptr + row.to(tl.int64)[:, None] * stride_zr + cols[None, :]
        z = tl.load(at, mask=(row >= 0)[:, None] & inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            z *= tl.load(weights_ptr + tokens * K + j, mask=known, other=0.0).to(tl.float32)[:, None]
        total += z
    token = tokens.to(tl.int64)[:, None]
    mask = known[:, None] & inside
    if ADD:
        total += tl.load(residual_ptr + token * stride_rt + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * H + cols[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _check_index(top_k_index: Tensor, num_experts: int, block: int) -> None:
    if top_k_index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"route takes top_k_index of int64 or int32; got {top_k_index.dtype}")
    shape = tuple(top_k_index.shape)
    if len(shape) != 2 or shape[0] < 1 or not 1 <= shape[1] <= MAX_CHOICES:
        raise ValueError(f"route takes top_k_index [T, k], T at least 1 and k from 1 to {MAX_CHOICES}; got {shape}")
    if not 1 <= num_experts <= MAX_EXPERTS or block < 1:
        raise ValueError(
            f"route takes from 1 to {MAX_EXPERTS} experts and blocks of at least one row; got {num_experts} experts "
            f"and blocks of {block}"
        )


def route(top_k_index: Tensor, num_experts: int, block: int) -> Routing:
    """Give every pair (token, choice) a row: a stable counting sort by expert, each expert's rows padded to blocks.

    Args:
        top_k_index: [T, k], int64 or int32, any strides; T >= 1, k from 1 to 8. A pair whose index is outside
            0 .. num_experts - 1 (which is not checked on the device) gets no row: `combine` counts it as zeros.
        num_experts: E, up to 256.
        block: each expert's rows are padded to a multiple of it.

    Returns:
        `Routing`; the rows of an expert are in the order of their pairs. Every element of its tensors is written.

    Raises:
        ValueError: a shape, dtype or size that is not covered.

    No host sync, no atomics: programs count their chunks of pairs; then each adds up the counts before its own and
    writes its pairs' places.
    """
    _check_index(top_k_index, num_experts, block)
    tokens, k = top_k_index.shape
    n_pairs = tokens * k
    n_rows = (n_pairs + min(num_experts, n_pairs) * (block - 1)) // block * block
    ends = torch.empty(num_experts, dtype=torch.int32, device=top_k_index.device)
    # `use_triton` knows floating dtypes.
    if not use_triton(ends.view(torch.float32)):
        return Routing(*route_ref(top_k_index, num_experts, block), block)
    pairs, rows = ends.new_empty(n_rows), ends.new_empty(tokens, k)
    slots = 1 << (num_experts - 1).bit_length()
    sub = _SORT_TILE // slots
    programs = min(_SORT_PROGRAMS, _ceil(n_rows, sub))
    chunk, share = (_ceil(_ceil(n, programs), sub) * sub for n in (n_pairs, n_rows))
    chunks = _ceil(n_pairs, chunk)
    counts = ends.new_empty(chunks, slots)
    strides = top_k_index.stride()
    consts = {"K": k, "E": num_experts, "SLOTS": slots, "SUB": sub}
    counted = top_k_index, counts, *strides, n_pairs, chunk
    launch(_count_kernel, (chunks,), counted, consts, num_warps=_SORT_WARPS)
    outputs = pairs, rows, ends
    sizes = n_pairs, n_rows, chunks, chunk, share
    launch(
        _place_kernel,
        (programs,),
        (top_k_index, counts, *outputs, *strides, *sizes),
        {**consts, "BLOCK": block},
        num_warps=_SORT_WARPS,
    )
    return Routing(*outputs, block)


def _check_choices(name: str, given: Tensor | None, routing: Routing) -> None:
    if given is not None and (given.shape != routing.rows.shape or not given.is_floating_point()):
        raise ValueError(
            f"{name} must be floating, of the shape of the routing's rows, {tuple(routing.rows.shape)}; got "
            f"{tuple(given.shape)} {given.dtype}"
        )


def _check_matrix(name: str, given: Tensor, count: int, what: str) -> None:
    if given.dim() != 2 or given.shape[0] != count or not given.is_floating_point():
        raise ValueError(
            f"{name} must be a floating matrix with a row for each of {count} {what}; got {tuple(given.shape)} "
            f"{given.dtype}"
        )


def _settings(h: int, size: int) -> tuple[int, int]:
    # (BLOCK, TOKENS) of tiles of up to ``size`` elements.
    block = min(1024, 1 << (h - 1).bit_length())
    return block, min(16, size // block)


def gather(x: Tensor, routing: Routing, scale: Tensor | None = None) -> Tensor:
    """``out[r] = x[pairs[r] // k] (* scale[pair])``: the tokens in the rows of their experts.

    Args:
        x: [T, H], float32, bfloat16, float16 (float64 by the reference); rows may be strided.
        routing: of these tokens.
        scale: [T, k], any floating dtype; multiplied in float32, the product is rounded once.

    Returns:
        [R, H], contiguous, of x's dtype; rows without a pair are zeros. All R rows are written.

    Raises:
        ValueError: x or scale does not fit the routing, or is not floating.

    No autograd: this is for use inside a Function. The gradient of x is ``combine(dout, routing)``, with the scale as
    weights if there was one; and ``gather`` is in the same way the gradient of `combine`.
    """
    tokens, k = routing.rows.shape
    _check_matrix("x", x, tokens, "tokens")
    _check_choices("scale", scale, routing)
    if not use_triton(x) or not (scale is None or use_triton(scale)):
        return gather_ref(x, routing.pairs, k, scale)
    n_rows, h = routing.pairs.shape[0], x.shape[1]
    x = as_rows(x)
    out = torch.empty((n_rows, h), dtype=x.dtype, device=x.device)
    block, tile = _settings(h, _GATHER_TILE)
    token_tiles = _ceil(tokens, tile)
    launch(
        _gather_kernel,
        ((token_tiles + _ceil(n_rows, _PADDING_ROWS)) * _ceil(h, block),),
        (
            x, routing.pairs, routing.rows, None if scale is None else scale.contiguous(), out, x.stride(0), tokens,
            n_rows, token_tiles,
        ),
        {"H": h, "K": k, "BLOCK": block, "TOKENS": tile, "ROWS": _PADDING_ROWS, "SCALED": scale is not None},
    )  # fmt: skip
    return out


def combine(
    z: Tensor,
    routing: Routing,
    weights: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``out[t] = sum_j (weights[t, j] *) z[rows[t, j]] (+ residual[t])``: what the experts made, back at the tokens.

    Args:
        z: [R, H], float32, bfloat16, float16 (float64 by the reference); rows may be strided. Rows without a pair are
            not read.
        routing: of these rows.
        weights: [T, k], any floating dtype.
        residual: [T, H], any floating dtype; rows may be strided.
        dtype: of the result, by default z's.
        out: where to write it, contiguous, any floating dtype (``dtype`` is not looked at then); None: a new tensor.

    Returns:
        [T, H], contiguous.

    Raises:
        ValueError: an operand does not fit the routing, or is not floating.

    Products and sums are float32, in the order of choice, the residual last, rounded once: no atomics, the same bits
    every time. No autograd: the gradient of z is ``gather(dout, routing, weights)``, that of the residual dout.
    """
    tokens, k = routing.rows.shape
    _check_matrix("z", z, routing.pairs.shape[0], "rows")
    _check_choices("weights", weights, routing)
    if residual is not None:
        _check_matrix("residual", residual, tokens, "tokens")
        if residual.shape[1] != z.shape[1]:
            raise ValueError(f"residual is {residual.shape[1]} wide and z {z.shape[1]}; they must be the same")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"the result's dtype must be floating; got {dtype}")
    if out is None:
        out = torch.empty((tokens, z.shape[1]), dtype=z.dtype if dtype is None else dtype, device=z.device)
    elif out.shape != (tokens, z.shape[1]) or not out.is_contiguous() or not out.is_floating_point():
        raise ValueError(f"out must be floating and contiguous, {(tokens, z.shape[1])}; got {tuple(out.shape)}")
    if not all([use_triton(t) for t in (z, weights, residual, out) if t is not None]):
        return out.copy_(combine_ref(z, routing.rows, weights, residual, out.dtype))
    h = z.shape[1]
    z = as_rows(z)
    stride = 0
    if residual is not None:
        residual = as_rows(residual)
        stride = residual.stride(0)
    block, tile = _settings(h, _COMBINE_TILE)
    launch(
        _combine_kernel,
        (_ceil(tokens, tile) * _ceil(h, block),),
        (
            z, routing.rows, None if weights is None else weights.contiguous(), residual, out, z.stride(0), stride,
            tokens,
        ),
        {
            "H": h, "K": k, "BLOCK": block, "TOKENS": tile, "WEIGHTED": weights is not None,
            "ADD": residual is not None,
        },
    )  # fmt: skip
    return out
