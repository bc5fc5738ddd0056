"""How many layers of a device ``recompute="auto"`` keeps: what memory there is, what a layer holds, what that leaves.

Decided at the start of every forward, before any of it runs, by one :class:`Budget` a device:

    room = limit * 0.95 - cost - (peak - kept) - max(0, allocated - allocated(peak)),   layers = room // cost

``peak`` is what a whole optimizer step used at most, with optimizer state: the first step is let pass, because state
comes into being at its end, the second is measured with every layer recomputed, and later ones say more. ``kept`` are
the bytes of kept layers in that step, ``allocated(peak)`` what was allocated when its forward began: memory that has
been taken since counts. ``cost`` is what one kept layer holds, measured first in a recompute, then in kept layers.
``limit`` is the smaller of the process's fraction of the device and of what the device still has, so other processes
count; one layer and a twentieth of it stay free. Of the room, every step takes half of what it has not tried yet. A
step in which the allocator had to flush its cache ends the growth and gives half back.

A forward of a larger shape (tokens, or tokens times length, for attention that is quadratic) than any measured one
keeps nothing, and its step is measured again. Smaller ones keep more layers, by the same bytes.

The layers kept are the last ones. Activations of the last layers are the first that backward frees: at every point of
backward the layers still to come hold only their inputs, as under full recomputation, and the peak, which lies where
backward begins, rises by ``cost`` a layer at most (less, for a kept last layer needs no room for its recompute).

The statistics are only read, never reset: a script's own ``max_memory_allocated`` stays its own. A peak from before
training therefore counts as training's until the script resets it, which costs layers but is safe; and a larger shape
that stays below the peak of kept layers is bounded by what it can take at most, in proportion, besides.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import distributed, nn

from ..status import say

# Left free of the limit, besides one layer: allocations are not packed without gaps.
_MARGIN = 0.05

_WARM, _MEASURE, _RUN = "first optimizer step", "measuring", "running"


class Memory(NamedTuple):
    """Bytes of one device, as this process sees it; ``pressure`` counts flushes of the cache and failures."""

    allocated: int
    peak: int
    limit: int
    pressure: int


def memory_of(device: torch.device) -> Memory | None:
    """What PyTorch's allocator and the driver say of ``device``, or None where neither tells. About 0.1 ms."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_allocator_backend() != "native":
        return None
    if torch.cuda.is_current_stream_capturing():
        return None
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    free, total = torch.cuda.mem_get_info(device)
    mine = stats["reserved_bytes"]["all"]["current"]
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    used = stats["allocated_bytes"]["all"]
    pressure = stats["num_alloc_retries"] + stats["num_ooms"]
    return Memory(used["current"], used["peak"], min(allowed, free + mine), pressure)


class Shape(NamedTuple):
    """What the memory of a layer grows with: tokens, and tokens times the length of a row."""

    tokens: int
    square: int

    @classmethod
    def of(cls, hidden: torch.Tensor) -> Shape:
        """Of hidden states [..., length, width]."""
        length = hidden.shape[-2] if hidden.dim() > 1 else 1
        tokens = hidden.numel() // max(1, hidden.shape[-1])
        return cls(tokens, tokens * length)

    def within(self, other: Shape) -> bool:
        return self.tokens <= other.tokens and self.square <= other.square

    def over(self, other: Shape) -> float:
        """How much more memory this shape takes than ``other``, at most, or at least if it is the smaller one."""
        return max(self.tokens / other.tokens, self.square / other.square)

    def union(self, other: Shape) -> Shape:
        return Shape(max(self.tokens, other.tokens), max(self.square, other.square))


class _Step:
    """One optimizer step as it goes: from the first forward to the optimizer."""

    __slots__ = ("allocated", "broken", "extra", "kept", "peak", "pressed", "pressure", "sample", "shape", "start")

    def __init__(self, start: int, pressure: int) -> None:
        self.allocated: list[int] = []  # at the start of each forward
        self.kept: list[int] = []  # bytes of kept layers of each forward
        self.shape = Shape(0, 0)
        self.start = self.peak = start  # the peak before the step, and so far
        self.extra = 0  # bytes allocated beyond the measured step's, before a forward
        self.broken = False  # the script has reset the peak within the step
        self.pressure = pressure
        self.pressed = False
        self.sample: tuple[int, Shape] | None = None  # what a layer held, at which shape

    def see(self, memory: Memory) -> None:
        self.broken |= memory.peak < self.peak
        self.pressed |= bool(self.kept) and max(self.kept) > 0 and memory.pressure > self.pressure
        self.peak, self.pressure = memory.peak, memory.pressure

    def held(self, held: int, shape: Shape) -> None:
        if self.sample is None or (shape.tokens, held) > (self.sample[1].tokens, self.sample[0]):
            self.sample = held, shape


class _Peak(NamedTuple):
    """A measured step: its peak, the kept bytes that are in it, what was allocated before each forward, its shapes."""

    bytes: int
    kept: int
    allocated: tuple[int, ...]
    shape: Shape

    @property
    def full(self) -> int:
        """What it would have been with nothing kept, or more."""
        return max(self.bytes - self.kept, *self.allocated)


class Budget:
    """How many of the layers on one device are kept.

    Attributes:
        layers: those seen, in the order of the forward; the last ones are kept.
        kept: how many, in the forward that began last.
        free: bytes of room that they leave.
        reason: why none ever is, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reason: str | None = None
        self._announced: int | None = None
        self._forget()

    def _forget(self) -> None:
        """Start again: other layers than before."""
        self.layers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self.count = 0
        self.kept = 0
        self.free = 0
        self.settled = False
        self._phase = _WARM
        self._position = -1
        self._shape = Shape(0, 0)
        self._stepped = False
        self._step = _Step(0, 0)
        self._peak: _Peak | None = None
        self._cost: tuple[int, Shape] | None = None
        self._allowed = 0
        self._frozen = False

    @property
    def measuring(self) -> bool:
        """Whether to look at what a layer holds: nothing of this shape is known."""
        return self._phase is _MEASURE or (self._cost is not None and not self._shape.within(self._cost[1]))

    def keeps(self, layer: nn.Module, hidden: torch.Tensor) -> bool:
        """Whether to keep this call of ``layer``."""
        index = self.layers.get(layer)
        if index is None:
            if self._phase is _RUN:
                self._forget()
            index = self.layers[layer] = self.count
            self.count += 1
        shape = Shape.of(hidden)
        if index <= self._position or self._position < 0:
            memory = memory_of(self.device)
            if memory is None:
                return False
            self._begin_forward(shape, memory)
        self._position = index
        if shape != self._shape:
            self._step.shape = self._step.shape.union(shape)
            if not shape.within(self._shape):
                return False
        return self.kept > 0 and index >= self.count - self.kept

    def on_step(self, memory: Memory) -> None:
        """An optimizer has stepped."""
        if self._step.allocated:
            self._step.see(memory)
            self._stepped = True

    def _begin_forward(self, shape: Shape, memory: Memory) -> None:
        if len(self.layers) != self.count and self._phase is not _WARM:
            self._forget()
            return
        if self._stepped:
            self._stepped = False
            self._end_step()
            self._step = _Step(memory.peak, memory.pressure)
        step = self._step
        step.see(memory)
        if step.pressed:
            self._yield()
            step.pressed = False
        kept = 0
        if self._phase is _RUN:
            kept = self._choose(shape, memory)
        self.kept = kept
        self._shape = shape
        step.shape = step.shape.union(shape)
        step.allocated.append(memory.allocated)
        step.kept.append(kept * self._cost_of(shape))

    def _choose(self, shape: Shape, memory: Memory) -> int:
        assert self._peak is not None
        cost = self._cost_of(shape)
        before = self._peak.allocated[min(len(self._step.allocated), len(self._peak.allocated) - 1)]
        extra = max(0, memory.allocated - before)
        self._step.extra = max(self._step.extra, extra)
        room = int(memory.limit * (1 - _MARGIN)) - cost - self._peak.full - extra
        if not shape.within(self._peak.shape):
            return 0
        if not self._step.allocated and not self._frozen:
            grown = max(self._allowed + cost, (self._allowed + room) // 2)
            self._allowed = max(self._allowed, min(grown, room))
        kept = max(0, min(self.count, min(room, self._allowed) // cost))
        self.free = room - kept * cost
        self._settle(kept == self.count or self._frozen or room <= self._allowed, kept)
        return kept

    def _settle(self, settled: bool, kept: int) -> None:
        if settled and not self.settled and kept != self._announced:
            self._announced = kept
            say(f"recompute: auto: {self._choice(kept)}")
        self.settled = settled

    def _end_step(self) -> None:
        step = self._step
        if self._phase is _WARM:
            self._phase = _MEASURE
            return
        if self._phase is _RUN and step.pressed:
            self._yield()
        if step.sample is not None:
            held, shape = step.sample
            if self._cost is None or self._cost[1].within(shape):
                self._cost = step.sample
            elif held > self._cost_of(shape):
                self._cost = int(self._cost[0] * held / self._cost_of(shape)) + 1, self._cost[1]
        if step.broken or self._cost is None:
            return
        self._peak = self._judge(step, self._peak)

    def _judge(self, step: _Step, known: _Peak | None) -> _Peak:
        """What the step that has ended says of the peak."""
        allocated = tuple(step.allocated)
        if known is None:
            self._phase = _RUN
            return _Peak(step.peak, 0, allocated, step.shape)
        if not step.shape.within(known.shape):
            self._allowed //= 2
            self._frozen = self.settled = False
            shape = step.shape.union(known.shape)
            # If kept layers of smaller shapes had taken more than this step, its peak is not seen, but bounded.
            bound = max(allocated) + int((known.full - min(known.allocated)) * shape.over(known.shape))
            return _Peak(min(step.peak, bound), 0, allocated, shape)
        if step.peak > step.start and step.peak - max(step.kept) - step.extra > known.full:
            return _Peak(step.peak, max(step.kept), allocated, known.shape)
        again = _Peak(step.peak, min(step.kept), allocated, known.shape)
        return again if step.shape == known.shape and again.full < known.full else known

    def _yield(self) -> None:
        """The allocator had to flush its cache: there is less room than the sums say."""
        self._allowed = min(self._allowed, max(self._step.kept)) // 2
        self._frozen = True

    def _cost_of(self, shape: Shape) -> int:
        """Bytes that one kept layer holds, from the measured shape; too many rather than too few."""
        if self._cost is None:
            return 1
        held, measured = self._cost
        return max(1, int(held * shape.over(measured)))

    def run_kept(self, region: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run the region directly; while still growing, measure what it holds."""
        before = memory_of(self.device) if self.measuring or not self.settled else None
        result = region(*args)
        after = None if before is None else memory_of(self.device)
        if before is not None and after is not None:
            output = result.nbytes if isinstance(result, torch.Tensor) else 0
            self._step.held(max(after.allocated - before.allocated - output, args[0].nbytes), Shape.of(args[0]))
        return result

    def rerun(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Recompute, and measure what the recomputed layer holds and whether it communicates."""
        before, calls = memory_of(self.device), collectives()
        try:
            return function(*args, **kwargs)
        finally:
            # Often by an exception, torch's early stop: a local variable or two of the layer are still alive.
            after = memory_of(self.device)
            if before is not None and after is not None:
                self._step.see(after)
                self._step.held(max(after.allocated - before.allocated, args[0].nbytes), Shape.of(args[0]))
            if calls is None:
                self.reason = "collectives cannot be counted"
            elif calls != collectives():
                self.reason = "the recompute communicates"

    def describe(self) -> str:
        if self.reason is not None:
            return f"all layers recomputed on {self.device}: {self.reason}"
        if self._phase is not _RUN:
            return f"all layers recomputed on {self.device}: {self._phase}"
        return self._choice(self.kept) + ("" if self.settled else ", still growing")

    def _choice(self, kept: int) -> str:
        cost, peak = self._cost_of(self._shape), self._peak.bytes if self._peak else 0
        return (
            f"{kept} of {self.count} layers kept on {self.device} ({cost / 2**20:.0f} MiB each at {self._shape.tokens} "
            f"tokens, peak {peak / 2**30:.2f} GiB, {max(0, self.free) / 2**30:.2f} GiB of room left)"
        )


def several_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def collectives() -> tuple[int, ...] | None:
    """How many collectives each process group has started; None if one does not say."""
    if not several_ranks():
        return ()
    try:
        return tuple(
            group._get_sequence_number_for_group()  # type: ignore[attr-defined]  # not in the stub
            for group in distributed.distributed_c10d._world.pg_map
        )
    except RuntimeError:  # A backend that does not count.
        return None
