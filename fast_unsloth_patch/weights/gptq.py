"""GPTQ weights as gptqmodel (>= 7) keeps them in memory: packed integers, a scale and a zero point a group.

``W[k, n] = scales[g[k], n] * (q[k, n] - zero[g[k], n])``

``q`` is packed along K into int32 words [ceil(K bits / 32), N], lowest bits first; zero points are packed along N. So
neighbouring words are neighbours along N, and a weight written as [K, N] is written in whole lines by whoever reads
the words in whole lines. Writing [N, K] would take a transposition through shared memory. Nothing asks for it: cuBLAS
multiplies by either order without a copy. Hence the result is a [K, N] buffer, **returned as its transposed view**
[N, K] (strides 1 and N), the shape of an ``nn.Linear`` weight: ``F.linear(x, w)`` is then ``x @ buffer``, the product
that gptqmodel computes, ``dy @ w`` is ``dy @ buffer^T``, and no op need know which kind of weight it has.
``GPTQWeight.k_contiguous`` says so to whoever allocates the buffer.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ..device.dispatch import use_triton
from ..device.launch import jit, launch, tl
from ..reference.gptq import gptq_dequantize_ref, v1_to_v2_addend
from . import WeightLayoutError

_BITS = (2, 4, 8)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Of gptqmodel's kernels with a backward, those whose packed tensors stay as they came from the checkpoint. A subclass
# (for another device, or of an embedding) has another name and is not one of them.
_KERNELS = ("TorchLinear", "TritonV2Linear")
_ADVICE = "load the model with GPTQConfig(..., backend='gptq_triton') or 'gptq_torch'"
# A program is four warps; each unpacks _STEPS rows of words by 256 columns. A warp's store is 512 bytes of one row, 16
# a thread. All tensors of the kernel have this one shape: with another (a row of scales to broadcast) Triton would
# carry each result through shared memory to the layout of the store.
_WARPS, _STEPS, _BLOCK_N = 4, 4, 256
# How often a thread loads its scales and zero points.
_ONCE, _EACH_WORD, _EACH_ROW = 0, 1, 2


@jit
def _unpacked(words, shift, BITS: tl.constexpr):
    # The field as the float 2^23 + field: its bits are those of 2^23 with the field in the lowest places. Two of these
    # differ by exactly the difference of the fields, so that nothing is converted from integer to float.
    return (((words >> shift) & ((1 << BITS) - 1)) | 0x4B000000).to(tl.float32, bitcast=True)


@jit
def _scale_and_zero(
    scales_ptr,
    qzeros_ptr,
    group,  # [WARPS, 1]
    n_size,
    BITS: tl.constexpr,
    QZERO_ADD: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    fields: tl.constexpr = 32 // BITS
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    scale = tl.load(scales_ptr + group * n_size + cols, mask=cols < n_size, other=0.0).to(tl.float32)
    # Each word once, and spread over its columns. In 4 bits they are the eight of one thread; in 8 bits a thread has
    # two words, which Triton passes through shared memory (once a program, unless RELOAD says otherwise).
    words_in_row = tl.cdiv(n_size, fields)
    at = tl.program_id(0) * (BLOCK_N // fields) + tl.arange(0, BLOCK_N // fields)[None, :]
    words = tl.load(qzeros_ptr + group * words_in_row + at, mask=at < words_in_row, other=0) + QZERO_ADD
    zero = _unpacked(words[:, :, None], tl.arange(0, fields)[None, None, :] * BITS, BITS)
    return scale, tl.reshape(zero, (WARPS, BLOCK_N))


@jit
def _gptq_dequantize_kernel(
    qweight_ptr,  # [ceil(K / fields), N] int32
    qzeros_ptr,  # [G, ceil(N / fields)] int32
    scales_ptr,  # [G, N]
    g_idx_ptr,  # [K] int32
    out_ptr,  # [K, N], rows stride_out apart
    k_size,
    n_size,
    stride_out,
    BITS: tl.constexpr,
    QZERO_ADD: tl.constexpr,
    RELOAD: tl.constexpr,  # scales and zero points: 0 once a program, 1 for every word, 2 for every row of W
    ROUND: tl.constexpr,  # to the dtype of the scales, before the rounding to that of out
    WARPS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    fields: tl.constexpr = 32 // BITS
    first = (tl.program_id(1) * WARPS + tl.arange(0, WARPS)[:, None]) * STEPS
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    in_n = cols < n_size
    words_ptr = qweight_ptr + first.to(tl.int64) * n_size + cols
    out_ptrs = out_ptr + first.to(tl.int64) * fields * stride_out + cols
    following = tl.load(words_ptr, mask=(first * fields < k_size) & in_n, other=0)
    if RELOAD == 0:
        group = tl.load(g_idx_ptr + first * fields, mask=first * fields < k_size, other=0)
        scale, zero = _scale_and_zero(scales_ptr, qzeros_ptr, group, n_size, BITS, QZERO_ADD, WARPS, BLOCK_N)
    for i in tl.static_range(STEPS):
        k = (first + i) * fields
        words = following
        if i + 1 < STEPS:
            # On its way while this one's rows are written: loads and stores stay in the order written here.
            following = tl.load(words_ptr + (i + 1) * n_size, mask=(k + fields < k_size) & in_n, other=0)
        if RELOAD == 1:
            group = tl.load(g_idx_ptr + k, mask=k < k_size, other=0)
            scale, zero = _scale_and_zero(scales_ptr, qzeros_ptr, group, n_size, BITS, QZERO_ADD, WARPS, BLOCK_N)
        for j in tl.static_range(fields):
            if RELOAD == 2:
                group = tl.load(g_idx_ptr + k + j, mask=k + j < k_size, other=0)
                scale, zero = _scale_and_zero(scales_ptr, qzeros_ptr, group, n_size, BITS, QZERO_ADD, WARPS, BLOCK_N)
            w = (_unpacked(words, j * BITS, BITS) - zero) * scale
            if ROUND:
                w = w.to(scales_ptr.dtype.element_ty).to(tl.float32)
            tl.store(
                out_ptrs + (i * fields + j) * stride_out, w.to(out_ptr.dtype.element_ty), mask=(k + j < k_size) & in_n
            )


def _reload(g_idx: Tensor, bits: int) -> int:
    """How often the kernel must load scales for ``g_idx`` [K] (on the CPU).

    Once, if the rows that a thread unpacks are always of one group: groups of 32 or more in 4 bits (16 in 8 bits), in
    any order, as long as each is in one piece. For every word, if its rows are. Else (activation order) for every row.
    """
    fields = 32 // bits
    for how, rows in ((_ONCE, fields * _STEPS), (_EACH_WORD, fields)):
        padded = torch.cat((g_idx, g_idx[-1:].expand(-g_idx.shape[0] % rows)))
        if bool((padded.view(-1, rows) == padded[::rows, None]).all()):
            return how
    return _EACH_ROW


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensor_problem(name: str, found: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> str | None:
    expected = f"{name}: expected contiguous {' or '.join(map(_name, dtypes))} {list(shape)}, found"
    if not isinstance(found, Tensor):
        return f"{expected} {type(found).__name__}"
    if tuple(found.shape) != shape or found.dtype not in dtypes:
        return f"{expected} {_name(found.dtype)} {list(found.shape)}"
    return None if found.is_contiguous() else f"{expected} strides {list(found.stride())}"


def _problem(
    qweight: Any, qzeros: Any, scales: Any, g_idx: Any, bits: int, shape: tuple[int, int], qzero_format: int
) -> str | None:
    if bits not in _BITS:
        return f"bits: expected 2, 4 or 8, found {bits}"
    if qzero_format not in (1, 2):
        return f"qzero format: expected 1 or 2, found {qzero_format}"
    n, k = shape
    groups = scales.shape[0] if isinstance(scales, Tensor) and scales.ndim == 2 else 1
    problem = (
        _tensor_problem("qweight", qweight, (-(-k * bits // 32), n), (torch.int32,))
        or _tensor_problem("scales", scales, (groups, n), _FLOATS)
        or _tensor_problem("qzeros", qzeros, (groups, -(-n * bits // 32)), (torch.int32,))
        or _tensor_problem("g_idx", g_idx, (k,), (torch.int32, torch.int64))
    )
    if problem is None and not qweight.device == qzeros.device == scales.device:
        return f"scales and qzeros: expected on {qweight.device}, found on {scales.device} and {qzeros.device}"
    return problem


def layout_problem(module: Any) -> str | None:
    """Why ``module`` is no GPTQ layer that `GPTQWeight.of` can read, or None: its predicate.

    A kernel without a backward (Marlin, ExLlama, Machete, ...) is named, with what to load instead; so is the tensor
    that does not fit, with what was expected and found. Reads attributes and shapes, never values: no sync.
    """
    kernel = type(module).__name__
    if getattr(module, "SUPPORTS_TRAINING", True) is False:
        return f"{kernel} has no backward: {_ADVICE}"
    if kernel not in _KERNELS:
        return f"GPTQ kernel: expected {' or '.join(_KERNELS)}, found {kernel}: {_ADVICE}"
    if module.pack_dtype is not torch.int32:
        return f"pack_dtype: expected int32, found {_name(module.pack_dtype)}"
    if getattr(module, "adapter", None) is not None:
        return f"{kernel} applies an adapter of gptqmodel's own"
    if getattr(module, "online_full_had", False) or getattr(module, "online_partial_had", False):
        return f"{kernel} rotates its input"
    return _problem(*_parts(module))


def _parts(module: Any) -> tuple[Any, Any, Any, Any, int, tuple[int, int], int]:
    # Both kernels read zero points as v2 whatever the module's own mark says: that stays at 1 where a v2 checkpoint
    # was loaded and nothing had to be converted. The mark counts where the class does not say.
    qzero_format = 2 if getattr(module, "REQUIRES_FORMAT_V2", False) else module.qzero_format()
    shape = module.out_features, module.in_features
    return module.qweight, module.qzeros, module.scales, module.g_idx, module.bits, shape, qzero_format


def _state(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> tuple[Hashable, ...]:
    return (
        id(qweight),
        id(qzeros),
        id(scales),
        id(g_idx),
        qweight.device,
        # ``.data = ...`` keeps the object.
        qweight.numel(),
        qzeros.numel(),
        scales.numel(),
        scales.dtype,
        g_idx.data_ptr(),
        # A tensor made under inference_mode counts no versions.
        None if g_idx.is_inference() else g_idx._version,
        bits,
    )


class GPTQWeight:
    """The packed tensors of one GPTQ weight, by reference, and how they become values.

    Args:
        qweight: [ceil(K bits / 32), N] int32, packed along K.
        qzeros: [G, ceil(N bits / 32)] int32, packed along N.
        scales: [G, N] float16, bfloat16 or float32.
        g_idx: [K] int32 or int64, the group of each row: any order, any group size, also on another device (gptqmodel
            moves it to the CPU in evaluation); -1 is the last group, as in indexing.
        bits: 2, 4 or 8.
        shape: (N, K), as an ``nn.Linear`` has it.
        qzero_format: 1 where ``zero - 1`` is stored, as in checkpoints; 2 where the zero point itself is.

    Raises:
        WeightLayoutError: a tensor does not fit; which one, what was expected, what was found.

    Making one looks at the values of g_idx, which on a GPU waits for it: once a weight, never in a step. Tensors that
    gptqmodel made under ``inference_mode`` cannot be saved for backward: keep the weight itself.
    """

    __slots__ = (
        "_g_idx",
        "_reload",
        "_state",
        "bits",
        "g_idx",
        "qweight",
        "qzero_format",
        "qzeros",
        "scales",
        "shape",
    )

    def __init__(
        self,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor,
        *,
        bits: int,
        shape: tuple[int, int],
        qzero_format: int = 2,
    ) -> None:
        problem = _problem(qweight, qzeros, scales, g_idx, bits, shape, qzero_format)
        if problem is not None:
            raise WeightLayoutError(problem)
        self.qweight, self.qzeros, self.scales, self.g_idx = qweight, qzeros, scales, g_idx
        self.bits, self.shape, self.qzero_format = bits, shape, qzero_format
        known, groups = g_idx.cpu(), scales.shape[0]
        low, high = (int(known.min()), int(known.max())) if known.numel() else (0, -1)
        # Checked here because nothing checks it in the kernel.
        if low < -groups or high >= groups:
            raise WeightLayoutError(f"g_idx: expected values in [{-groups}, {groups - 1}], found [{low}, {high}]")
        if low < 0:
            known = torch.where(known < 0, known + groups, known)
        self._reload = _reload(known, bits)
        as_it_is = low >= 0 and g_idx.dtype is torch.int32 and g_idx.device == scales.device
        self._g_idx = g_idx if as_it_is else known.to(device=scales.device, dtype=torch.int32)
        self._state = _state(qweight, qzeros, scales, g_idx, bits)

    @classmethod
    def of(cls, module: Any) -> GPTQWeight:
        """The weight of a ``TorchLinear`` or ``TritonV2Linear`` of gptqmodel.

        Raises:
            WeightLayoutError: with the text of `layout_problem`.
        """
        problem = layout_problem(module)
        if problem is not None:
            raise WeightLayoutError(problem)
        *tensors, bits, shape, qzero_format = _parts(module)
        return cls(*tensors, bits=bits, shape=shape, qzero_format=qzero_format)

    @property
    def dtype(self) -> torch.dtype:
        """That of the scales: the layer itself computes in its input's."""
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    @property
    def compute_dtype(self) -> None:
        return None

    @property
    def direct(self) -> bool:
        return False  # of the kernels in training

    @property
    def k_contiguous(self) -> bool:
        return False

    def identity(self) -> tuple[Hashable, ...]:
        return (*self._state, self.shape, self.qzero_format)

    def describes(self, module: Any) -> bool:
        """Whether this is still the description of ``module``: a cheap test, for every call.

        gptqmodel replaces tensors and moves g_idx, torch moves and casts buffers in place: each is seen. Other group
        numbers written into g_idx are seen where torch counts versions; the other tensors are read anew at every call.
        """
        return self._state == _state(module.qweight, module.qzeros, module.scales, module.g_idx, module.bits)

    def dequantize(
        self, out: Tensor | None = None, dtype: torch.dtype | None = None, *, direct: bool = False
    ) -> Tensor:
        """The values [N, K], to the bit as gptqmodel computes them. On CUDA one launch, no host sync.

        Args:
            out: the buffer to write to: float16, bfloat16 or float32, unit stride along **N**, any along K, so that it
                may be some of the rows of a larger [N, K].
            dtype: without ``out``: that of the result, default ``self.dtype``.
            direct: round the product once, to the result's dtype, as TritonV2Linear does in evaluation; else to the
                dtype of the scales before, as TorchLinear always does and TritonV2Linear in training. No difference
                while the two dtypes are the same.

        Raises:
            WeightLayoutError: if ``out`` does not fit.
        """
        n, k = self.shape
        if out is None:
            out = torch.empty((k, n), dtype=dtype or self.dtype, device=self.device).t()
        elif (
            tuple(out.shape) != (n, k)
            or out.dtype not in _FLOATS
            or out.device != self.device
            or (n > 1 and out.stride(0) != 1)
        ):
            raise WeightLayoutError(
                f"out: expected floating {[n, k]} on {self.device} with unit stride along its columns, "
                f"found {_name(out.dtype)} {list(out.shape)} on {out.device}, strides {list(out.stride())}"
            )
        if use_triton(out) and use_triton(self.scales):
            if out.numel():
                self._launch(out, direct)
        else:
            out.t().copy_(self._reference(out.dtype, direct))
        return out

    def _launch(self, out: Tensor, direct: bool) -> None:
        n, k = self.shape
        consts = {
            "BITS": self.bits,
            "QZERO_ADD": v1_to_v2_addend(self.bits) if self.qzero_format == 1 else 0,
            "RELOAD": self._reload,
            "ROUND": not direct and out.dtype is not self.scales.dtype,
            "WARPS": _WARPS,
            "STEPS": _STEPS,
            "BLOCK_N": _BLOCK_N,
        }
        launch(
            _gptq_dequantize_kernel,
            (-(-n // _BLOCK_N), -(-self.qweight.shape[0] // (_WARPS * _STEPS))),
            (self.qweight, self.qzeros, self.scales, self._g_idx, out, k, n, out.stride(1)),
            consts,
            num_warps=_WARPS,
        )

    def _reference(self, dtype: torch.dtype, direct: bool) -> Tensor:
        return gptq_dequantize_ref(
            self.qweight,
            self.qzeros,
            self.scales,
            self._g_idx,
            bits=self.bits,
            qzero_format=self.qzero_format,
            dtype=dtype,
            direct=direct,
        )
