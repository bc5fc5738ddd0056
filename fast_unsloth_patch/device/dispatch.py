"""Which tensors run through Triton kernels, which through the reference, and why some through neither."""

from __future__ import annotations

import torch

from .launch import HAS_TRITON, INTERPRETED

_MIN_CAPABILITY = (8, 0)
# In the interpreter bfloat16 arithmetic works on bit patterns and is silently wrong.
_KERNEL_DTYPES = frozenset(
    (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)
)
_OP_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
# Device index -> None, or why Triton kernels cannot run there. Filled once a device.
_CUDA_REASONS: dict[int, str | None] = {}


def _cuda_reason(index: int) -> str | None:
    if torch.version.hip is not None:
        reason: str | None = "ROCm"
    elif not HAS_TRITON:
        reason = "no Triton"
    else:
        major, minor = torch.cuda.get_device_capability(index)
        reason = None if (major, minor) >= _MIN_CAPABILITY else f"compute capability {major}.{minor}"
    _CUDA_REASONS[index] = reason
    return reason


def use_triton(t: torch.Tensor) -> bool:
    """True if an op on ``t`` is to launch its Triton kernels, False if it is to run its reference.

    CUDA of compute capability 8.0 or later with Triton, in float32, bfloat16 or float16; or a CPU tensor in float32 or
    float16 under ``TRITON_INTERPRET=1``.
    """
    if t.dtype not in _KERNEL_DTYPES:
        return False
    if INTERPRETED:
        return True
    if not t.is_cuda:
        return False
    index = t.get_device()
    reason = _CUDA_REASONS[index] if index in _CUDA_REASONS else _cuda_reason(index)
    return reason is None


def unsupported(t: torch.Tensor) -> str | None:
    """Why the ops do not cover ``t``, or None if they do.

    "no Triton", "compute capability 7.5", "ROCm", "dtype float64", "device mps". On a CPU the reference covers every
    floating dtype. On CUDA it would be slower than stock: there a tensor is covered only if the kernels are.
    """
    if t.is_cuda:
        index = t.get_device()
        reason = _CUDA_REASONS[index] if index in _CUDA_REASONS else _cuda_reason(index)
        if reason is None and t.dtype not in _KERNEL_DTYPES:
            return f"dtype {str(t.dtype).removeprefix('torch.')}"
        return reason
    if t.device.type != "cpu":
        return f"device {t.device.type}"
    return None if t.dtype in _OP_DTYPES else f"dtype {str(t.dtype).removeprefix('torch.')}"
