"""Linear + cross-entropy without materialised logits: the loss of a language model from its last hidden states.

Rows that do not count (label -100) are dropped before the first GEMM. The others go through in chunks of a few hundred
MiB of logits: one GEMM makes a chunk of logits, one kernel turns it in place into its own gradient, two more GEMMs turn
that into gradients of the hidden states and of the weight. Nothing of the size of the logits outlives its chunk.

The gradients are made in the forward pass, of the *sum* of the losses: ``softmax - onehot``, neither divided by the
number of items nor multiplied by the loss scale, neither of which is known on the host. Backward multiplies the fp32
results of the GEMMs by the incoming gradient, one number, so fp16 under a GradScaler neither underflows nor overflows
on the way.

Source of the idea: making the gradient in the forward pass, chunk by chunk, is Liger's FusedLinearCrossEntropy (Hsu et
al., "Liger Kernel: efficient Triton kernels for LLM training", 2024); dropping ignored rows before the GEMM is from
"Cut your losses in large-vocabulary language models" (Wijmans et al., 2024).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..device.dispatch import use_triton
from ..device.launch import jit, launch, tl
from .kept_labels import Kept, prepare_labels

# Logits of one chunk. At 8192 x 128256 in bf16 it gives 4 chunks of 2048 rows: enough rows for the three GEMMs to run
# at full speed (2048 x 4096 outputs over K = 128256 are two waves of tiles on an H200), and less than training has free
# at that moment. Half of it, where the caller holds a layer besides: 1.5 to 2.5 ms more in a step of Llama-8B (H200).
_CHUNK_BYTES = 512 * 1024 * 1024
_ROW_STEP = 256
_BLOCK = 4096
_NUM_WARPS = 16
# Most probabilities of a large vocabulary are below fp16's normal range (6e-5), so there dlogits carry a power of two,
# which the fp32 results of the GEMMs lose again.
_FP16_SCALE = 4096.0


@jit
def _cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    stride,
    n_cols,
    GRAD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: ``loss = lse(x) - x[label]``, then in place ``x <- SCALE * (softmax(x) - onehot(label))``."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + row * stride
    label = tl.load(labels_ptr + row)
    # Read before the reductions below, whose barriers keep it ahead of the stores of the second pass.
    inside = (label >= 0) & (label < n_cols)
    x_label = tl.load(x_ptr + label, mask=inside, other=float("nan")).to(tl.float32)

    cols = tl.arange(0, BLOCK)
    # A maximum and a sum for each lane, so that the loop needs no exchange between threads. The smallest finite number,
    # not -inf, of which the difference of two would be NaN.
    peak = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_cols, BLOCK):
        x = tl.load(x_ptr + start + cols, mask=start + cols < n_cols, other=-float("inf")).to(tl.float32)
        # Of the two exponentials of a running maximum one is always that of zero.
        above = x - peak
        small = tl.exp(-tl.abs(above))
        total = tl.where(above > 0.0, total * small + 1.0, total + small)
        peak = tl.maximum(peak, x)
    row_peak = tl.max(peak, axis=0)
    row_total = tl.sum(total * tl.exp(peak - row_peak), axis=0)
    tl.store(losses_ptr + row, row_peak + tl.log(row_total) - x_label)

    if GRAD:
        inverse = 1.0 / row_total
        for start in range(0, n_cols, BLOCK):
            x = tl.load(x_ptr + start + cols, mask=start + cols < n_cols, other=-float("inf")).to(tl.float32)
            p = tl.exp(x - row_peak) * inverse
            p = tl.where(start + cols == label, p - 1.0, p) * SCALE
            tl.store(x_ptr + start + cols, p.to(logits_ptr.dtype.element_ty), mask=start + cols < n_cols)


def cross_entropy_chunk(
    logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, *, grad: bool, scale: float
) -> None:
    """Loss of each row of a chunk; with ``grad`` the chunk is overwritten by ``scale * (softmax - onehot)``.

    Args:
        logits: [n, V], contiguous rows; read in fp32, overwritten if ``grad``.
        labels: [n] int64 in [0, V).
        losses: [n] fp32, written.
        grad: overwrite ``logits``.
        scale: power of two that the overwritten logits are multiplied by.
    """
    if use_triton(logits):
        n_rows, n_cols = logits.shape
        block = min(_BLOCK, 1 << (n_cols - 1).bit_length())
        launch(
            _cross_entropy_kernel,
            (n_rows,),
            (logits, labels, losses, logits.stride(0), n_cols),
            {"GRAD": grad, "SCALE": scale, "BLOCK": block},
            num_warps=_NUM_WARPS,
        )
        return
    x = logits.float()
    lse = torch.logsumexp(x, dim=-1, keepdim=True)
    index = labels.unsqueeze(-1)
    torch.sub(lse, x.gather(-1, index), out=losses.unsqueeze(-1))
    if grad:
        p = torch.sub(x, lse).exp_()
        p.scatter_add_(-1, index, p.new_full(index.shape, -1.0))
        logits.copy_(p.mul_(scale))


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype in which ``F.linear`` would compute logits from ``hidden`` here: autocast's, or that of ``hidden``."""
    kind = hidden.device.type
    if hidden.dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _chunk_rows(n_rows: int, n_cols: int, itemsize: int, lean: bool = False) -> int:
    """Rows of a chunk: all of them if they fit, else chunks of equal size."""
    size = _CHUNK_BYTES // 2 if lean else _CHUNK_BYTES
    most = max(size // (n_cols * itemsize) // _ROW_STEP, 1) * _ROW_STEP
    if n_rows <= most:
        return max(n_rows, 1)
    chunks = -(-n_rows // most)
    return min(-(-n_rows // (chunks * 128)) * 128, most)


def _mm_wide(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """``out = a b`` with the result in the accumulator's dtype (fp32 for bf16 and fp16), where the device can do it."""
    if out.dtype is a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


@cache
def _has_wide_addmm(index: int, dtype: torch.dtype) -> bool:
    """Can ``addmm`` add low-precision products to an fp32 matrix? Torch 2.9 wants a matrix of their own dtype."""
    a = torch.zeros((16, 16), dtype=dtype, device=torch.device("cuda", index))
    out = torch.zeros((16, 16), dtype=torch.float32, device=a.device)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except RuntimeError:
        return False
    return True


def _add_mm_wide(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """``out += a b`` without rounding the product to the operands' dtype, where the device can do it."""
    if out.dtype is a.dtype:
        torch.addmm(out, a, b, out=out)
    elif a.is_cuda and _has_wide_addmm(a.get_device(), a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        # By strips, so that the product never needs a second buffer of the weight's size.
        for start in range(0, a.shape[0], 16384):
            strip = a[start : start + 16384]
            product = torch.empty((strip.shape[0], b.shape[1]), dtype=out.dtype, device=out.device)
            _mm_wide(strip, b, product)
            out[start : start + 16384].add_(product)


def linear_cross_entropy_fwd(
    hidden: torch.Tensor, weight: torch.Tensor, kept: Kept, *, need_dx: bool, need_dw: bool, lean: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, float]:
    """Sum of the losses of the rows that count and, where asked for, its gradients.

    Args:
        hidden: [T, H].
        weight: [V, H].
        kept: from `prepare_labels`.
        need_dx, need_dw: which gradients to make.
        lean: smaller chunks.
    Returns:
        ``(total, dx, dw, scale)``: fp32 scalar; [n, H] and [V, H] in fp32 (fp64 for fp64 operands), gradients of
        ``scale * total`` to the n kept rows and to the weight, or None.
    """
    dtype = compute_dtype(hidden)
    n_rows = kept.count()
    n_cols, width = weight.shape
    grad = need_dx or need_dw
    scale = _FP16_SCALE if dtype is torch.float16 else 1.0
    wide = torch.promote_types(dtype, torch.float32)
    new = hidden.new_empty
    losses = new((n_rows,), dtype=torch.float32)
    dx = new((n_rows, width), dtype=wide) if need_dx else None
    dw = hidden.new_zeros((n_cols, width), dtype=wide) if need_dw and n_rows == 0 else None
    chunk = _chunk_rows(n_rows, n_cols, dtype.itemsize, lean)
    # The dtypes below are chosen already; autocast would cast fp32 factors of a GEMM back.
    with torch.autocast(hidden.device.type, enabled=False):
        w = weight.to(dtype)
        buffer = new((chunk, n_cols), dtype=dtype)
        for start in range(0, n_rows, chunk):
            stop = min(start + chunk, n_rows)
            x = hidden.index_select(0, kept.rows[start:stop]).to(dtype)
            logits = torch.mm(x, w.t(), out=buffer[: stop - start])
            cross_entropy_chunk(logits, kept.labels[start:stop], losses[start:stop], grad=grad, scale=scale)
            if dx is not None:
                _mm_wide(logits, w, dx[start:stop])
            if dw is not None:
                _add_mm_wide(logits.t(), x, dw)
            elif need_dw:
                dw = new((n_cols, width), dtype=wide)
                _mm_wide(logits.t(), x, dw)
        return losses.sum(), dx, dw, scale


def linear_cross_entropy_bwd(
    factor: torch.Tensor,
    dx: torch.Tensor | None,
    dw: torch.Tensor | None,
    rows: torch.Tensor,
    total_rows: int,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``factor`` times the gradients that the forward made, rounded once, the kept rows back in their places.

    Args:
        factor: scalar tensor on the device.
        dx, dw: from `linear_cross_entropy_fwd`; read only.
        rows: [n] int64, where the rows of ``dx`` belong.
        total_rows: T.
        hidden_dtype, weight_dtype: dtypes of the results.
    Returns:
        ``(dhidden [T, H] or None, dweight [V, H] or None)``.
    """
    dhidden = dweight = None
    if dx is not None:
        dhidden = torch.mul(dx, factor, out=torch.empty_like(dx, dtype=hidden_dtype))
        if dx.shape[0] < total_rows:
            scattered = dhidden.new_zeros((total_rows, dx.shape[1]))
            dhidden = scattered.index_copy_(0, rows, dhidden)
    if dw is not None:
        if rows.shape[0] == 0:
            # Stock gives zeros too, although the factor of a mean over nothing is infinite.
            dweight = dw.to(weight_dtype, copy=True)
        else:
            dweight = torch.mul(dw, factor, out=torch.empty_like(dw, dtype=weight_dtype))
    return dhidden, dweight


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the losses; division by the number of items is left to the caller's autograd."""

    @staticmethod
    def forward(ctx, hidden, weight, kept, need_dx, need_dw, lean, tally):
        total, dx, dw, ctx.scale = linear_cross_entropy_fwd(
            hidden, weight, kept, need_dx=need_dx, need_dw=need_dw, lean=lean
        )
        ctx.save_for_backward(dx, dw, kept.rows[: kept.count()])
        ctx.total_rows, ctx.tally = kept.total, tally
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw, rows = ctx.saved_tensors
        if ctx.tally is not None:
            ctx.tally.hit_backward()
        factor = grad if ctx.scale == 1.0 else grad / ctx.scale
        dhidden, dweight = linear_cross_entropy_bwd(factor, dx, dw, rows, ctx.total_rows, *ctx.dtypes)
        return dhidden, dweight, None, None, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    num_items: torch.Tensor | float | None = None,
    ignore_index: int = -100,
    kept: Kept | None = None,
    lean: bool = False,
    tally: Any = None,
) -> torch.Tensor:
    """``sum over kept t of (logsumexp(z_t) - z_t[label_t]) / N`` with ``z = hidden W^T``, without keeping z.

    The logits are computed and rounded as ``F.linear`` would (autocast's dtype, or that of the operands), everything
    after them in fp32. At most one chunk of logits, one fp32 [n, H] and, for a trainable weight, one fp32 [V, H] exist
    at a time. Without gradients (``no_grad``, or nothing requires any) only the loss is computed.

    Args:
        hidden: [T, H], bf16, fp16 or fp32 (fp64 on a CPU).
        weight: [V, H], of the same dtype unless autocast is on; frozen or trainable.
        labels: [T] int64, already shifted; None if ``kept`` is given.
        num_items: N, a number or a tensor on any device; None for the number of rows that count.
        ignore_index: label of the rows that do not count.
        kept: from `prepare_labels`; without it the call waits for the device.
        lean: hold half as many logits at a time, for callers that hold much themselves.
        tally: counts the backward passes.
    Returns:
        fp32 scalar (of the shape of ``num_items`` if that is a larger tensor, as stock). No rows that count: NaN for a
        mean, 0 with ``num_items``; the gradients are zero. Differentiable once; a retained graph may be run through
        again.
    Raises:
        IndexError: a label is out of range.
        TypeError: dtypes that ``F.linear`` would refuse.
        ValueError: shapes that do not belong together.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [T, H] and weight [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if compute_dtype(hidden) is not compute_dtype(weight):
        raise TypeError(f"hidden is {hidden.dtype}, weight is {weight.dtype}, and no autocast to make them equal")
    if kept is None:
        if labels is None:
            raise ValueError("either labels or kept is needed")
        kept = prepare_labels(
            labels, labels, vocab_size=weight.shape[0], ignore_index=ignore_index, device=hidden.device
        )
    if kept.total != hidden.shape[0]:
        raise ValueError(f"{kept.total} labels for {hidden.shape[0]} rows")
    recording = torch.is_grad_enabled()
    need_dx, need_dw = recording and hidden.requires_grad, recording and weight.requires_grad
    if need_dx or need_dw:
        total = LinearCrossEntropy.apply(hidden, weight, kept, need_dx, need_dw, lean, tally)
    else:
        total = linear_cross_entropy_fwd(hidden, weight, kept, need_dx=False, need_dw=False)[0]
    if num_items is None:
        return total / kept.count()
    return total / (num_items.to(total.device) if isinstance(num_items, torch.Tensor) else num_items)
