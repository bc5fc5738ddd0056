"""Which rows of a loss count: found from the labels before the layers run, so that nobody waits for the device later.

This is the first work of a training step, while the device has nothing else to do: on CUDA it is one kernel and one
copy of two numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..device.dispatch import use_triton
from ..device.launch import jit, launch, tl

# 16 labels a thread: two steps at 8192 tokens, 32 at 131072. In Triton's scan each warp adds up, one by one, what every
# warp counted, so neither more warps nor larger blocks save time.
_BLOCK, _NUM_WARPS = 4096, 8
# Positions are int32 in the kernel, up to the end of the block after the last one.
_MAX_TOKENS = 2**31 - 1 - 2 * _BLOCK


@jit
def _labels_of_block(labels_ptr, start, T, S, ignore_index, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    # What the positions from ``start`` predict; beyond the last one, and at the end of a row, nothing.
    position = start + tl.arange(0, BLOCK)
    inside = position < T
    if SHIFT:
        inside &= (position + 1) % S != 0
    return tl.load(labels_ptr + position + SHIFT, mask=inside, other=ignore_index)


# One kernel for every batch, vocabulary and ignored label.
@jit(do_not_specialize=["T", "S", "vocab_size", "ignore_index"])
def _kept_labels_kernel(
    labels_ptr, rows_ptr, kept_ptr, counts_ptr, T, S, vocab_size, ignore_index,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: rows and labels of the positions that count, in order; how many there are and how many are bad."""
    count = tl.zeros([], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    ahead = _labels_of_block(labels_ptr, 0, T, S, ignore_index, SHIFT, BLOCK)
    for start in range(0, T, BLOCK):
        label = ahead
        # Asked for before the scan, whose barriers the compiler moves no load across.
        ahead = _labels_of_block(labels_ptr, start + BLOCK, T, S, ignore_index, SHIFT, BLOCK)
        keep = label != ignore_index
        place = count + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(rows_ptr + place, (start + tl.arange(0, BLOCK)).to(tl.int64), mask=keep)
        tl.store(kept_ptr + place, label, mask=keep)
        count += tl.sum(keep.to(tl.int32), axis=0)
        bad += (keep & ((label < 0) | (label >= vocab_size))).to(tl.int32)
    tl.store(counts_ptr, count.to(tl.int64))
    tl.store(counts_ptr + 1, tl.sum(bad, axis=0).to(tl.int64))


class Kept:
    """The rows that count, worked out from the labels alone, so before the layers run: nobody waits for them later.

    Attributes:
        rows: [T] int64, the indices of the rows that count, in order, in its first ``count()`` elements. The others may
            be uninitialised.
        labels: [T] int64, the labels of those rows; as ``rows`` beyond them.
        total: T.
    """

    __slots__ = ("_counts", "_event", "_vocab_size", "labels", "rows", "total")

    def __init__(
        self, rows: torch.Tensor, labels: torch.Tensor, total: int, counts: torch.Tensor, event, vocab_size: int
    ):
        self.rows = rows
        self.labels = labels
        self.total = total
        self._counts = counts  # on the host: rows that count, rows with an impossible label
        self._event = event
        self._vocab_size = vocab_size

    def count(self) -> int:
        """How many rows count. On CUDA it waits for the copy that `prepare_labels` queued, for nothing after it.

        Raises:
            IndexError: a label is neither in [0, V) nor the ignored one. Stock raises the same on a CPU and on CUDA
                aborts the process by a device-side assertion.
        """
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        kept, bad = self._counts.tolist()
        if bad:
            raise IndexError(f"Target is out of bounds: {bad} labels are outside [0, {self._vocab_size})")
        return kept


def _find_by_scan(
    labels: torch.Tensor, shift: bool, vocab_size: int, ignore_index: int, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    labels = labels.long().contiguous()
    total = labels.numel()
    rows, kept = labels.new_empty(total), labels.new_empty(total)
    width = max(labels.shape[-1], 1) if shift else 1
    launch(
        _kept_labels_kernel,
        (1,),
        (labels, rows, kept, counts, total, width, vocab_size, int(ignore_index)),
        {"SHIFT": int(shift), "BLOCK": _BLOCK},
        num_warps=_NUM_WARPS,
    )
    return rows, kept


def _find_by_sort(
    labels: torch.Tensor, shift: bool, vocab_size: int, ignore_index: int, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if shift:
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = labels.reshape(-1).long()
    counted = target != ignore_index
    bad = counted & ((target < 0) | (target >= vocab_size))
    torch.stack((counted.sum(), bad.sum()), out=counts)
    # A stable sort rather than nonzero, whose size only the device knows.
    rows = torch.sort(counted.logical_not().to(torch.uint8), stable=True).indices
    return rows, target.index_select(0, rows)


def prepare_labels(
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    *,
    vocab_size: int,
    ignore_index: int = -100,
    device: torch.device | None = None,
) -> Kept:
    """Find the rows whose label counts, without waiting for the device.

    Call it before the first layer is launched: the two counts are then on the host long before the loss needs them.

    Args:
        labels: [..., S] int64 token ids, not shifted: position s is predicted at s - 1, the last position of a row
            counts never.
        shift_labels: labels that are shifted already (of any shape, T elements); ``labels`` is then not looked at.
        vocab_size: V, labels outside [0, V) are an error of `Kept.count`.
        ignore_index: label of the rows that do not count.
        device: where the hidden states will be; None: where the labels are.

    Other integers than int64 and other layouts than contiguous ones are copied first.
    """
    shift = shift_labels is None
    given = labels if shift_labels is None else shift_labels
    total = given.numel()
    counts = torch.empty(2, dtype=torch.int64, device=given.device)
    # `use_triton` knows floating dtypes.
    triton = use_triton(counts.view(torch.float32)) and total <= _MAX_TOKENS
    find = _find_by_scan if triton else _find_by_sort
    rows, order = find(given, shift, vocab_size, ignore_index, counts)
    event = None
    if given.is_cuda:
        host = torch.empty(2, dtype=torch.int64, pin_memory=True)
        host.copy_(counts, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(given.device))
        counts = host
    if device is not None and device != given.device:
        rows, order = rows.to(device, non_blocking=True), order.to(device, non_blocking=True)
    return Kept(rows, order, total, counts, event, vocab_size)
