"""NF4 and FP4 weights of bitsandbytes: their description, checked once, and their values in one launch.

The layout and the roundings are in `reference.nf4`. The kernel does everything in one pass: absmax, its own
quantisation, offset and code. It is meant to run at the speed of memory (the figures are arithmetic, for an H200):

- A thread loads 16 bytes of packed values and stores 16 bytes at a time, each warp 512 bytes in a row. For that the
  words, eight values each, and their scales change threads once, through shared memory; the values never do.
- The 16 codes are looked up in a table of 64 bytes, which stays in the L1 cache. 32 lanes that read from one line cost
  one pass of the load unit, whatever they read, so a look-up an element takes a fifth of what that unit can do at the
  rate of memory. A tree of selects would take 15 selects an element, more than the arithmetic units can do at that
  rate; shuffles go through the same unit as loads; a table of 256 pairs has 16 lines, and random lanes would need one
  pass for each; and `tl.gather` brings both operands into a layout of its own first.
- The scale is worked out for every word: three loads that hit L1 in seven of eight cases, and no reduction over blocks.

bitsandbytes is never imported: it is the caller who hands over a parameter and its ``quant_state``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device.dispatch import use_triton
from ..device.launch import INTERPRETED, jit, launch, tl
from ..reference.nf4 import CODES, dequantize_4bit_ref, nested_absmax_ref
from . import WeightLayoutError, check_outs

# Values of one program: a multiple of every blocksize, so that a program starts with a block.
_VALUES = 4096
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_STORAGES = (torch.uint8, *_FLOATS)
# How the kernel is told of the dtype that a value is rounded to on its way.
_THROUGH = {None: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_LAUNCHED = 3
_CODES: dict[tuple[str, torch.device], Tensor] = {}


@jit
def _dequantize_tile(
    pid,
    code_ptr,
    packed_ptr,
    absmax_ptr,
    absmax2_ptr,
    code2_ptr,
    offset_ptr,
    out_ptr,
    n_units,
    stride_on,
    K: tl.constexpr,
    PER: tl.constexpr,
    ODD: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    THROUGH: tl.constexpr,
    VALUES: tl.constexpr,
):
    UNITS: tl.constexpr = VALUES // PER
    first = pid.to(tl.int64) * UNITS
    unit = tl.arange(0, UNITS)
    mask = unit < n_units - first
    # The parameter may pose as a float tensor (quant_storage): its bytes are what counts.
    if PER == 8:
        words = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + first + unit, mask=mask, other=0)
    else:
        words = tl.load(packed_ptr.to(tl.pointer_type(tl.uint8)) + first + unit, mask=mask, other=0).to(tl.int32)
    block = pid * (VALUES // BLOCKSIZE) + unit // (BLOCKSIZE // PER)
    scale = tl.load(absmax_ptr + block, mask=mask, other=0)
    if BLOCKSIZE2 > 0:
        nested = tl.load(code2_ptr + scale.to(tl.int32))
        scale2 = tl.load(absmax2_ptr + block // BLOCKSIZE2, mask=mask, other=0.0)
        # bitsandbytes rounds the product, and the sum in another kernel. As the sum of a fused operation the zero keeps
        # the compiler from fusing the product with the offset.
        scale = tl.fma(nested, scale2, tl.zeros_like(nested)) + tl.load(offset_ptr)
    j = tl.arange(0, PER)
    # Little-endian words, and in a byte the high half comes first.
    shifts = 8 * (j // 2) + 4 * (1 - j % 2)
    index = (words[:, None] >> shifts[None, :]) & 15
    value = tl.load(code_ptr + index) * scale[:, None]
    if THROUGH == 1:
        value = value.to(tl.bfloat16).to(tl.float32)
    elif THROUGH == 2:
        value = value.to(tl.float16).to(tl.float32)
    if K == 0:  # rows without gaps
        target = out_ptr + first * PER + unit[:, None] * PER + j[None, :]
    elif K % PER == 0:
        place = pid * UNITS + unit
        row = place // (K // PER)
        start = row.to(tl.int64) * stride_on + (place - row * (K // PER)) * PER
        target = out_ptr + start[:, None] + j[None, :]
    else:
        place = (first + unit)[:, None] * PER + j[None, :]
        target = out_ptr + (place // K) * stride_on + place % K
    inside = mask[:, None]
    if ODD:  # the last byte holds one value
        inside = (unit[:, None] * PER + j[None, :]) < (n_units - first) * PER - 1
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _dequantize_4bit_kernel(
    code_ptr,
    packed0_ptr,
    absmax0_ptr,
    absmax20_ptr,
    code20_ptr,
    offset0_ptr,
    out0_ptr,
    n0,
    packed1_ptr,
    absmax1_ptr,
    absmax21_ptr,
    code21_ptr,
    offset1_ptr,
    out1_ptr,
    n1,
    packed2_ptr,
    absmax2_ptr,
    absmax22_ptr,
    code22_ptr,
    offset2_ptr,
    out2_ptr,
    n2,
    stride_on,
    COUNT: tl.constexpr,
    K: tl.constexpr,
    PER: tl.constexpr,
    ODD: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    THROUGH: tl.constexpr,
    VALUES: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles0 = tl.cdiv(n0, VALUES // PER)
    tiles1 = tl.cdiv(n1, VALUES // PER)
    # fmt: off
    if COUNT == 1 or pid < tiles0:
        _dequantize_tile(
            pid, code_ptr, packed0_ptr, absmax0_ptr, absmax20_ptr, code20_ptr, offset0_ptr, out0_ptr, n0,
            stride_on, K, PER, ODD, BLOCKSIZE, BLOCKSIZE2, THROUGH, VALUES,
        )
    elif COUNT == 2 or pid < tiles0 + tiles1:
        _dequantize_tile(
            pid - tiles0, code_ptr, packed1_ptr, absmax1_ptr, absmax21_ptr, code21_ptr, offset1_ptr, out1_ptr, n1,
            stride_on, K, PER, ODD, BLOCKSIZE, BLOCKSIZE2, THROUGH, VALUES,
        )
    else:
        _dequantize_tile(
            pid - tiles0 - tiles1, code_ptr, packed2_ptr, absmax2_ptr, absmax22_ptr, code22_ptr, offset2_ptr, out2_ptr,
            n2, stride_on, K, PER, ODD, BLOCKSIZE, BLOCKSIZE2, THROUGH, VALUES,
        )
    # fmt: on


class Nested(NamedTuple):
    """The second quantisation: that of the absmax."""

    absmax: Tensor  # [ceil(blocks / blocksize)] float32
    code: Tensor  # [256] float32
    offset: Tensor  # one float32
    blocksize: int


class Nf4Weight(NamedTuple):
    """A bitsandbytes weight of four bits, NF4 or FP4. Make one with `of`, which checks it.

    ``dtype`` is what the layer computes in (``Linear4bit.compute_dtype``), ``stored_dtype`` what the weight had before
    it was quantised (``quant_state.dtype``). bitsandbytes dequantises to the latter and casts the result, so that is
    what `dequantize` does, in one pass.
    """

    packed: Tensor  # ceil(N K / 2) bytes
    absmax: Tensor  # [blocks], float32 or (nested) uint8
    nested: Nested | None
    code: Tensor  # [16] float32
    quant_type: str
    blocksize: int
    shape: tuple[int, int]
    stored_dtype: torch.dtype
    dtype: torch.dtype
    device: torch.device
    direct: bool  # bitsandbytes' forward (not its backward) does without the rounding to stored_dtype
    sizes: tuple[Any, ...]  # what `.data = ...` and `.to(...)` change in the tensors above, see _sizes

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def k_contiguous(self) -> bool:
        return True

    @classmethod
    def of(
        cls, packed: Tensor, quant_state: Any, dtype: torch.dtype | None = None, *, direct: bool = False
    ) -> Nf4Weight:
        """The description of ``packed``, the parameter or its data.

        Args:
            packed: ceil(N K / 2) bytes of any shape, contiguous, in uint8 or the float dtype of ``quant_storage``.
            quant_state: an object with bitsandbytes' ``absmax, shape, blocksize, quant_type, dtype, offset,
                state2, nested``.
            dtype: what the layer computes in; default the dtype that the weight had.
            direct: whether the layer's forward rounds once: bitsandbytes >= 0.50 (``gemm_4bit``).

        Raises:
            WeightLayoutError: with the text of `layout_problem`.
        """
        problem = layout_problem(packed, quant_state)
        if problem is not None:
            raise WeightLayoutError(problem)
        nested = None
        if quant_state.nested:
            second = quant_state.state2
            nested = Nested(second.absmax, second.code, quant_state.offset, second.blocksize)
        n, k = quant_state.shape
        return cls(
            packed,
            quant_state.absmax,
            nested,
            _code(quant_state.quant_type, packed.device),
            quant_state.quant_type,
            quant_state.blocksize,
            (n, k),
            quant_state.dtype,
            dtype or quant_state.dtype,
            packed.device,
            direct,
            _sizes(packed, quant_state.absmax, None if nested is None else nested.absmax),
        )

    def dequantize(
        self, out: Tensor | None = None, dtype: torch.dtype | None = None, *, direct: bool = False
    ) -> Tensor:
        """The values [N, K], as ``bitsandbytes.functional.dequantize_4bit(packed, state).to(dtype)`` to the bit.

        Args:
            out: the buffer to write to, of any floating dtype, unit stride along K.
            dtype: without ``out``: that of the result, default ``self.dtype``.
            direct: round once, to the result's dtype, and not to ``stored_dtype`` before: as bitsandbytes >= 0.50 does
                in the forward of a linear layer (``gemm_4bit``), though not in its backward. No difference while the
                two dtypes are the same or the stored one is float32.

        Raises:
            WeightLayoutError: if ``out`` does not fit.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        self.dequantize_many([self], [out], direct=direct)
        return out

    @staticmethod
    def dequantize_many(weights: Sequence[Nf4Weight], outs: Sequence[Tensor], *, direct: bool = False) -> None:
        """The values of several weights, each into its own buffer; what the kernel can do together in one launch."""
        check_outs(weights, outs)
        waiting: list[tuple[Nf4Weight, Tensor]] = []
        settings = None
        for weight, out in zip(weights, outs):
            through = weight._through(out.dtype, direct)
            if not _launchable(weight, out, through):
                out.copy_(weight._reference(out.dtype, through))
                continue
            needed = _settings(weight, out, through)
            if waiting and (needed != settings or len(waiting) == _MAX_LAUNCHED):
                _launch_together(waiting, settings)
                waiting = []
            settings = needed
            waiting.append((weight, out))
        if waiting:
            _launch_together(waiting, settings)

    def identity(self) -> tuple[Hashable, ...]:
        # Addresses as well: ``param.data = ...`` keeps the object, and the new data may be packed in another way.
        tensors = [self.packed, self.absmax, *(self.nested[:3] if self.nested else ())]
        return (
            self.quant_type,
            self.blocksize,
            self.shape,
            self.stored_dtype,
            self.dtype,
            *((id(t), t.data_ptr()) for t in tensors),
        )

    def describes(self, packed: Tensor, quant_state: Any) -> bool:
        """Whether this is still the description of ``packed`` and ``quant_state``: a cheap test, for every call.

        ``quant_state.to(device)`` and bitsandbytes' packing for CPUs put other tensors into the same state object.
        """
        nested = self.nested
        if (
            packed is not self.packed
            or quant_state is None
            or quant_state.absmax is not self.absmax
            or _sizes(packed, self.absmax, None if nested is None else nested.absmax) != self.sizes
            or quant_state.dtype is not self.stored_dtype
            or quant_state.shape != self.shape
            or quant_state.blocksize != self.blocksize
            or quant_state.quant_type != self.quant_type
            or quant_state.nested is (nested is None)
        ):
            return False
        if nested is None:
            return True
        second = quant_state.state2
        return (
            quant_state.offset is nested.offset
            and second.absmax is nested.absmax
            and second.code is nested.code
            and second.blocksize == nested.blocksize
        )

    def _through(self, dtype: torch.dtype, direct: bool) -> torch.dtype | None:
        stored = self.stored_dtype
        return None if direct or stored is dtype or stored is torch.float32 else stored

    def _reference(self, dtype: torch.dtype, through: torch.dtype | None) -> Tensor:
        absmax, nested = self.absmax, self.nested
        if nested is not None:
            absmax = nested_absmax_ref(absmax, nested.code, nested.absmax, nested.offset, nested.blocksize)
        return dequantize_4bit_ref(
            self.packed,
            absmax,
            self.shape,
            quant_type=self.quant_type,
            blocksize=self.blocksize,
            through=through,
            dtype=dtype,
        )


def _sizes(packed: Tensor, absmax: Tensor, absmax2: Tensor | None) -> tuple[Any, ...]:
    second = 0 if absmax2 is None else absmax2.numel()
    return packed.dtype, packed.numel(), packed.device, absmax.numel(), absmax.device, second


def layout_problem(packed: Tensor, quant_state: Any) -> str | None:
    """What about a packed weight does not fit (which tensor, expected and found), or None: the predicate of `of`."""
    if quant_state is None:
        return "quant_state: expected the state of a quantised weight, found None (not moved to its device yet?)"
    if getattr(quant_state, "packing_format_for_cpu", False):
        return "quant_state: packed for inference on this CPU; call train() before the first forward"
    quant_type, blocksize, shape = quant_state.quant_type, quant_state.blocksize, quant_state.shape
    if quant_type not in CODES:
        return f"quant_state.quant_type: expected nf4 or fp4, found {quant_type!r}"
    if blocksize not in _BLOCKSIZES:
        return f"quant_state.blocksize: expected one of {_BLOCKSIZES}, found {blocksize!r}"
    if quant_state.dtype not in _FLOATS:
        return f"quant_state.dtype: expected float32, bfloat16 or float16, found {quant_state.dtype}"
    if shape is None or len(shape) != 2:
        return f"quant_state.shape: expected [N, K], found {shape if shape is None else list(shape)}"
    values = math.prod(shape)
    size = (values + 1) // 2
    if packed.dtype not in _STORAGES:
        return f"weight: expected uint8, float32, bfloat16 or float16 storage, found {packed.dtype}"
    # Wide storage may round the bytes up.
    if not size <= packed.nbytes < size + packed.itemsize or not packed.is_contiguous():
        return (
            f"weight: expected {size} contiguous bytes for {list(shape)}, found {packed.nbytes} "
            f"({packed.dtype} {list(packed.shape)}, strides {list(packed.stride())})"
        )
    blocks = -(-values // blocksize)
    absmax, second = quant_state.absmax, getattr(quant_state, "state2", None)
    if not quant_state.nested:
        return _tensor_problem("quant_state.absmax", absmax, blocks, torch.float32, packed.device)
    problem = _tensor_problem("quant_state.absmax", absmax, blocks, torch.uint8, packed.device)
    if problem is not None:
        return problem
    if second is None:
        return "quant_state.state2: expected the state of the quantised absmax, found None"
    if type(second.blocksize) is not int or second.blocksize <= 0:
        return f"quant_state.state2.blocksize: expected a positive number, found {second.blocksize!r}"
    if second.dtype is not torch.float32 or getattr(second, "nested", False):
        return f"quant_state.state2: expected float32 that is not nested itself, found {second.dtype}"
    blocks2 = -(-blocks // second.blocksize)
    return (
        _tensor_problem("quant_state.state2.absmax", second.absmax, blocks2, torch.float32, packed.device)
        or _tensor_problem("quant_state.state2.code", second.code, 256, torch.float32, packed.device)
        or _tensor_problem("quant_state.offset", quant_state.offset, 1, torch.float32, packed.device)
    )


def _tensor_problem(name: str, found: Any, numel: int, dtype: torch.dtype, device: torch.device) -> str | None:
    expected = f"{name}: expected {numel} contiguous {dtype} on {device}, found"
    if not isinstance(found, Tensor):
        return f"{expected} {type(found).__name__}"
    if found.numel() != numel or found.dtype is not dtype or found.device != device or not found.is_contiguous():
        return f"{expected} {found.numel()} ({found.dtype} {list(found.shape)} on {found.device})"
    return None


def _code(quant_type: str, device: torch.device) -> Tensor:
    # Ours and not quant_state.code: bitsandbytes, too, goes by the type, and its kernels have the codes built in.
    key = quant_type, device
    if key not in _CODES:
        _CODES[key] = torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)
    return _CODES[key]


def _launchable(weight: Nf4Weight, out: Tensor, through: torch.dtype | None) -> bool:
    # The kernel counts bytes and blocks in 32 bits. The interpreter has no bfloat16.
    return (
        use_triton(out)
        and not (INTERPRETED and through is torch.bfloat16)
        and 0 < weight.shape[0] * weight.shape[1] < 2**32 - 2 * _VALUES
    )


class _Settings(NamedTuple):
    """What the weights of one launch have in common: the stride between rows, then the kernel's constants."""

    out_dtype: torch.dtype
    code: int
    stride: int
    k: int
    per: int
    odd: bool
    blocksize: int
    blocksize2: int
    through: int


def _settings(weight: Nf4Weight, out: Tensor, through: torch.dtype | None) -> _Settings:
    n, k = weight.shape
    values = n * k
    dense = out.stride(0) == k or n == 1
    words = values % 8 == 0 and weight.packed.data_ptr() % 4 == 0
    return _Settings(
        out.dtype,
        id(weight.code),
        0 if dense else out.stride(0),
        0 if dense else k,
        8 if words else 2,
        values % 2 == 1,
        weight.blocksize,
        weight.nested.blocksize if weight.nested is not None else 0,
        _THROUGH[through],
    )


def _launch_together(pairs: Sequence[tuple[Nf4Weight, Tensor]], settings: _Settings | None) -> None:
    assert settings is not None
    args: list[Any] = [pairs[0][0].code]
    programs = 0
    for weight, out in pairs:
        nested = weight.nested
        second = (None, None, None) if nested is None else nested[:3]
        units = -(-weight.shape[0] * weight.shape[1] // settings.per)
        programs += -(-units * settings.per // _VALUES)
        args += (weight.packed, weight.absmax, *second, out, units)
    args += (None, None, None, None, None, None, 0) * (_MAX_LAUNCHED - len(pairs))
    args.append(settings.stride)
    launch(_dequantize_4bit_kernel, (programs,), args, (len(pairs), *settings[3:], _VALUES), num_warps=4, num_stages=1)
