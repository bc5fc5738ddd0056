"""``recompute="offload"``: full recomputation, with the layers' inputs in host memory from forward to backward.

What a checkpointed layer holds is its input, the hidden states; with 32 layers and long rows these are most of the
memory of a step. Here each is copied to pinned host memory while its layer runs, and back while the layer after it runs
backward. Both copies are on a stream of their own:

* forward of layer i: its input is being copied out; its GPU memory is let go when layer i + 1 begins, after the compute
  stream was told to wait for that copy. So two inputs at most are on the GPU. (What a layer keeps of its adapters for
  its recompute stays there: 3 % of its input in an 8B model at rank 16.)
* backward of layer i: its input is already there, and that of layer i - 1 is being copied in: two at most again.

The compute stream's wait is what makes letting go safe. ``record_stream`` would be too, but the allocator then asks
whether the copy has happened when memory is next needed, and the host, many layers ahead of the GPU, always hears no:
nothing would ever be reused within a forward.

The last layer's input is still on the GPU when backward begins, and is used from there. Buffers in host memory are
pooled, for pinning is slow: a page-locked buffer goes back to the pool when autograd drops what it stands for. PyTorch
rounds them up to powers of two.

The hooks are ``saved_tensors_hooks`` round the script's checkpoint function, where only the layer's arguments are
saved: by ``ctx.save_for_backward`` in a reentrant one, by the frame in a non-reentrant one, whose own hooks take what
the layer saves. Copies are exact. Only the first argument goes out, and only if it is a dense floating-point tensor.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch

from ..switch import _STOCK, KEEP_STOCK_FLAG
from .layer_end import is_plain_checkpoint
from .recompute import saved_tensors_hooked

# Below this a copy costs more in launches than it saves in memory.
_SMALLEST = 1 << 20


class Cuda:
    """Copies between one GPU and pinned memory, on a stream beside the compute stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def pinned(self, size: int) -> torch.Tensor:
        """[size] bytes of page-locked host memory."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> tuple[torch.cuda.Event, torch.cuda.Stream]:
        """Start ``target = source`` after what the current stream has been given so far, and after earlier copies.

        Returns:
            The event of its end, and the current stream.
        """
        compute = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(compute)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event(), compute

    def wait(self, copy: tuple[torch.cuda.Event, torch.cuda.Stream]) -> None:
        """Let the stream that started ``copy``, and the current one, go on only when it has ended.

        The first is the one in whose order the memory was allocated and will be used again; in a garbage collection
        of another thread it is not the current one.
        """
        event, compute = copy
        compute.wait_event(event)
        current = torch.cuda.current_stream(self.device)
        if current != compute:
            current.wait_event(event)


def copier_of(device: torch.device) -> Any:
    """What copies between ``device`` and the host, or None: its tensors stay where they are."""
    return Cuda(device) if device.type == "cuda" and not torch.version.hip else None


class _Offloaded:
    """One layer's input: a buffer in host memory, and for part of the time the tensor on the GPU besides.

    Attributes:
        tensor: on the GPU; None while it is in host memory alone.
        copy: the copy under way that reads or writes ``tensor``, None if that need not be waited for.
        before: weak reference to the input that was offloaded before it: the next one that backward will want.
    """

    __slots__ = ("__weakref__", "before", "buffer", "copy", "host", "layout", "tensor")

    buffer: Any
    copy: Any
    tensor: torch.Tensor | None

    def __init__(self, host: Host, source: torch.Tensor, before: Any) -> None:
        self.host = host
        self.before = before
        self.layout = source.shape, source.dtype
        self.buffer = self.copy = self.tensor = None  # what __del__ finds if pinning fails
        self.buffer = host.take(source.nbytes)
        self.tensor = source.detach()
        self.copy = host.copier.copy(self.tensor, self._view())

    def _view(self) -> torch.Tensor:
        shape, dtype = self.layout
        size = shape.numel() * dtype.itemsize
        return self.buffer[:size].view(dtype).view(shape)

    def settle(self) -> None:
        """From here on the compute stream may use the GPU memory, for this tensor or, once it is free, for another."""
        if self.copy is not None:
            self.host.copier.wait(self.copy)
            self.copy = None

    def release(self) -> None:
        """Let go of the GPU memory."""
        self.settle()
        self.tensor = None

    def fetch(self) -> None:
        """Start copying it back, unless it is there."""
        if self.tensor is None:
            shape, dtype = self.layout
            self.tensor = torch.empty(shape, dtype=dtype, device=self.host.device)
            self.copy = self.host.copier.copy(self._view(), self.tensor)
            self.host.loads += 1

    def unpack(self) -> torch.Tensor:
        """The tensor on the GPU; that of the layer before is on its way then."""
        self.fetch()
        self.settle()
        tensor, self.tensor = self.tensor, None
        before = self.before()
        if before is not None:
            before.fetch()
        assert tensor is not None
        return tensor

    def __del__(self) -> None:
        if self.buffer is not None and not sys.is_finalizing():
            self.release()
            self.host.give_back(self.buffer)


class Host:
    """The host memory behind one device.

    Attributes:
        stores, loads: copies out and in so far.
    """

    def __init__(self, device: torch.device, copier: Any) -> None:
        self.device = device
        self.copier = copier
        self.stores = self.loads = self.pinned = 0
        self._free: list[torch.Tensor] = []
        self._last: Any = _nothing

    def pack(self, source: torch.Tensor) -> _Offloaded:
        """Start copying ``source`` out, and let go of the one before it."""
        before = self._last()
        if before is not None and before.tensor is not None:
            before.release()
        handle = _Offloaded(self, source, self._last)
        self._last = weakref.ref(handle)
        self.stores += 1
        return handle

    def take(self, size: int) -> torch.Tensor:
        """The smallest free buffer of ``size`` bytes or more; if all are too small, a new one in place of one."""
        fitting = [buffer for buffer in self._free if buffer.nbytes >= size]
        if fitting:
            best = min(fitting, key=lambda buffer: buffer.nbytes)
            self._free = [buffer for buffer in self._free if buffer is not best]
            return best
        if self._free:
            self.pinned -= self._free.pop().nbytes
        capacity = 1 << (size - 1).bit_length()
        self.pinned += capacity
        return self.copier.pinned(capacity)

    def give_back(self, buffer: torch.Tensor) -> None:
        self._free.append(buffer)


def _nothing() -> None:
    """A dead weak reference."""


class Offload:
    """The policy: one :class:`Host` a device, from :meth:`start` to :meth:`stop`."""

    def __init__(self) -> None:
        self.hosts: dict[torch.device, Host] = {}

    def start(self) -> None:
        self.hosts = {}

    def stop(self) -> None:
        """Forget the pools; buffers in use go with what they stand for."""
        self.hosts = {}

    def run(self, region: Any, args: tuple[Any, ...]) -> Any:
        """Run a region of a layer as the script wants it checkpointed, its input in host memory."""
        if _STOCK.get() or KEEP_STOCK_FLAG in region.layer.__dict__ or not torch.is_grad_enabled():
            return region.checkpoint(region, *args)
        hidden = args[0] if args else None
        reason = self._reason(region, hidden)
        if reason is not None:
            region.tally.fall_back(f"offload: {reason}")
            return region.checkpoint(region, *args)
        assert isinstance(hidden, torch.Tensor)
        host, where, size = self.hosts[hidden.device], hidden.data_ptr(), hidden.nbytes

        def pack(saved: torch.Tensor) -> Any:
            same = type(saved) is torch.Tensor and saved.data_ptr() == where and saved.nbytes == size
            return host.pack(saved) if same and saved.is_contiguous() else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return region.checkpoint(region, *args)

    def describe(self) -> str:
        return (
            "; ".join(
                f"{host.stores} layer inputs sent from {device}, {host.loads} fetched back, "
                f"{host.pinned / 2**30:.2f} GiB of pinned memory"
                for device, host in self.hosts.items()
            )
            or "no layer has been checkpointed yet"
        )

    def _reason(self, region: Any, hidden: Any) -> str | None:
        """Why the input stays on its device, or None."""
        if type(hidden) is not torch.Tensor or not hidden.is_floating_point() or hidden.layout is not torch.strided:
            return "first argument is no plain tensor"
        if not is_plain_checkpoint(region.checkpoint):
            return "other checkpoint function"
        if torch._C._current_graph_task_id() != -1 or saved_tensors_hooked():
            return "inside another region or saved-tensors hooks"
        if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]  # not in the stub
            return "saved-tensors hooks are disabled"
        if not hidden.is_contiguous():
            return "input not contiguous"
        if hidden.nbytes < _SMALLEST:
            return "small input"
        if hidden.device not in self.hosts:
            copier = copier_of(hidden.device)
            if copier is None:
                return f"nothing to offload from {hidden.device.type}"
            self.hosts[hidden.device] = Host(hidden.device, copier)
        return None


def _unpack(saved: Any) -> torch.Tensor:
    return saved.unpack() if type(saved) is _Offloaded else saved
