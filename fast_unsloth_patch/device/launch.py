"""Launching Triton kernels: the import of Triton, the cached launch, what a device can hold.

`kernel[grid](...)` binds and specialises every argument anew. `launch` goes that way once per specialisation and
afterwards calls the compiled handle directly. What that saves grows with the number of arguments; for eight it is
little (12.4 us against 13.5 on an H200's host with triton 3.6).

Every op module takes ``jit``, ``tl`` and ``triton`` from here, so that a missing Triton is dealt with in one place: the
modules still import, ``HAS_TRITON`` is False and `dispatch.use_triton` never chooses a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

try:
    import triton as _triton
    import triton.language as _tl
    from triton import knobs as _knobs
except ImportError:
    HAS_TRITON = False
else:
    HAS_TRITON = True


class _Absent:
    """Stands in for ``triton`` and ``tl`` where Triton is not installed: kernels can be defined, not run."""

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


triton: Any
tl: Any
jit: Any
if HAS_TRITON:
    triton, tl, jit = _triton, _tl, _triton.jit
    # Triton reads the variable when a kernel is decorated, so this is fixed for the life of the process.
    INTERPRETED: bool = bool(_knobs.runtime.interpret)
    _runtime: Any = _knobs.runtime
else:
    triton = tl = _Absent()
    INTERPRETED = False
    _runtime = None

    def jit(fn: Any = None, **_options: Any) -> Any:
        return fn if fn is not None else (lambda f: f)


class _Handle(NamedTuple):
    kernel: Any  # keeps the JITFunction alive, so that its id in the key is never that of another kernel
    run: Any
    function: Any
    metadata: Any


_HANDLES: dict[tuple[Any, ...], _Handle] = {}
# A CPU-only build of torch has neither of these; there, launch is reached only in the interpreter.
_current_device = getattr(torch._C, "_cuda_getDevice", None)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_Tensor = torch.Tensor


def launch(
    kernel: Any,
    grid: Sequence[int],
    args: Sequence[Any],
    consts: Mapping[str, Any] | Sequence[Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
) -> None:
    """Launch ``kernel`` on the device of its first tensor argument, on that device's current stream.

    The first call of a specialisation goes through ``kernel[grid](...)``, which compiles; later ones call the compiled
    handle. The key holds everything that Triton specialises on: for a tensor its dtype, 16-byte alignment and device;
    for an int whether it is 1, divisible by 16, wider than 32 bits; None; the constexprs and the options.

    Args:
        kernel: function decorated with `jit`.
        grid: one to three ints (no callable).
        args: the run-time arguments in the kernel's order: tensors, ints, floats, bools or None. With any other kind of
            argument (a tensor descriptor made on the host) each call takes Triton's own way.
        consts: the constexpr arguments in the kernel's order, all of them after ``args``; a dict has its names checked
            at the first call. A constexpr keeps its Python type from call to call (True and 1 would share a key).
        num_warps, num_stages: Triton's options.

    Raises:
        TypeError: at the first call, if ``args`` and ``consts`` are not the kernel's parameters in order.

    Launch hooks (Triton's profiler) are honoured by taking the ordinary way while one is set.
    """
    constants = consts.values() if isinstance(consts, dict) else consts
    if INTERPRETED:
        kernel[grid](*args, *constants)
        return
    # The key is built inline: a call per argument would double its cost.
    parts: list[Any] = [id(kernel), num_warps, num_stages, *constants]
    values: list[Any] = []
    device = -1
    known = True
    for a in args:
        cls = a.__class__
        if cls is int:
            # 1: equal to one; 16: divisible by 16; 2: needs 64 bits. Triton treats each as another signature.
            parts.append(1 if a == 1 else (0 if a & 15 else 16) + (0 if -0x80000000 <= a < 0x80000000 else 2))
            values.append(a)
        elif isinstance(a, _Tensor):
            pointer = a.data_ptr()
            index = a.get_device()
            if device < 0:
                device = index
            parts += (a.dtype, pointer & 15 == 0, index)
            # The launcher takes an address as an int, and then need not ask the driver whose it is.
            values.append(pointer)
        else:
            parts.append(cls)
            values.append(a)
            known = known and (a is None or cls is float or cls is bool)
    if device >= 0 and device != _current_device():  # type: ignore[misc]  # absent only where no tensor is on a GPU
        with torch.cuda.device(device):
            launch(kernel, grid, args, consts, num_warps=num_warps, num_stages=num_stages)
        return
    key = tuple(parts)
    handle = _HANDLES.get(key)
    if handle is None or not known or _hooked(_runtime.launch_enter_hook) or _hooked(_runtime.launch_exit_hook):
        compiled = _launch_slowly(kernel, grid, args, consts, num_warps, num_stages)
        if known and compiled is not None:
            _HANDLES[key] = _Handle(kernel, compiled.run, compiled.function, compiled.packed_metadata)
        return
    n = len(grid)
    handle.run(
        grid[0],
        grid[1] if n > 1 else 1,
        grid[2] if n > 2 else 1,
        _current_stream(device),  # type: ignore[misc]  # absent only where no handle can exist
        handle.function,
        handle.metadata,
        None,
        None,
        None,
        *values,
        *constants,
    )


def _hooked(hook: Any) -> bool:
    # A HookChain (triton >= 3.5), callable even when empty; None or a plain function where somebody assigned one.
    return hook is not None and bool(getattr(hook, "calls", True))


def _launch_slowly(
    kernel: Any,
    grid: Sequence[int],
    args: Sequence[Any],
    consts: Mapping[str, Any] | Sequence[Any],
    num_warps: int,
    num_stages: int,
) -> Any:
    if not HAS_TRITON:
        raise RuntimeError("Triton is not installed: ask dispatch.use_triton before launching a kernel")
    rest = list(kernel.arg_names[len(args) :])
    if (rest != list(consts)) if isinstance(consts, dict) else (len(rest) != len(consts)):
        raise TypeError(f"after {len(args)} run-time arguments {kernel.__name__} takes {rest}, got constexprs {consts}")
    constants = consts.values() if isinstance(consts, dict) else consts
    # Contraction of a product and a sum is Triton's default up to 3.9 and ends in 3.10: say it, so that results stay.
    return kernel[tuple(grid)](*args, *constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


def as_rows(t: torch.Tensor) -> torch.Tensor:
    """``t`` [..., N] as [T, N] with unit stride along N: a view where the layout allows it, or else a copy."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


# Shared memory that one block may opt in to, bytes (CUDA C++ Programming Guide, technical specifications per compute
# capability).
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    87: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    110: 227 * 1024,
    120: 99 * 1024,
    121: 99 * 1024,
}
# What the compile test builds for: every kind of chip that the kernels promise to run on.
TARGETS = (80, 86, 89, 90, 100, 120)


class Limits(NamedTuple):
    """What a device offers a kernel."""

    capability: int  # 90 for compute capability 9.0
    smem: int  # bytes of shared memory a block may have
    sm_count: int


class Config(NamedTuple):
    """One row of an op's table of configurations."""

    block: tuple[int, ...]
    num_warps: int = 4
    num_stages: int = 2
    smem: int = 0  # bytes of shared memory it needs at most; the compile test holds it to that
    min_capability: int = 80


def target_limits(capability: int, sm_count: int = 100) -> Limits:
    """The limits of a kind of chip; an unknown one gets the smallest shared memory of all."""
    return Limits(capability, SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values())), sm_count)


@functools.cache
def device_limits(index: int) -> Limits:
    """Limits of CUDA device ``index``; of a small imaginary sm_80 for -1, the index of a CPU tensor (interpreter)."""
    if index < 0:
        return target_limits(80, sm_count=4)
    properties = torch.cuda.get_device_properties(index)
    known = target_limits(properties.major * 10 + properties.minor, properties.multi_processor_count)
    # The driver's own figure, where torch passes it on, is right for chips that this file has never heard of.
    return known._replace(smem=getattr(properties, "shared_memory_per_block_optin", known.smem))


def pick(table: Sequence[Config], limits: Limits) -> Config:
    """The first row of ``table`` that ``limits`` can hold. The last row of a table must fit every supported chip."""
    for config in table:
        if config.smem <= limits.smem and config.min_capability <= limits.capability:
            return config
    raise ValueError(f"no configuration fits {limits}; the last row of a table must fit every chip")
