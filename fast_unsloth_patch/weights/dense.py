"""A frozen weight that is stored as it is used, for where one is among the siblings of packed ones."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from . import WeightLayoutError, check_outs


class DenseWeight(NamedTuple):
    """``nn.Linear.weight`` of a layer whose weight is frozen."""

    tensor: Tensor  # [N, K]

    @classmethod
    def of(cls, tensor: Tensor) -> DenseWeight:
        """Raises WeightLayoutError unless ``tensor`` is a floating matrix."""
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise WeightLayoutError(f"weight: expected floating [N, K], found {tensor.dtype} {list(tensor.shape)}")
        return cls(tensor)

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.tensor.shape
        return n, k

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def compute_dtype(self) -> None:
        return None

    @property
    def direct(self) -> bool:
        return False

    @property
    def k_contiguous(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def dequantize(
        self, out: Tensor | None = None, dtype: torch.dtype | None = None, *, direct: bool = False
    ) -> Tensor:
        """The tensor itself, without a copy, unless ``out`` or another dtype asks for one."""
        if out is None:
            return self.tensor.detach().to(dtype or self.tensor.dtype)
        check_outs([self], [out])
        return out.copy_(self.tensor.detach())

    def identity(self) -> tuple[Hashable, ...]:
        # Without the address: an optimizer or ``param.data = ...`` may change what the tensor holds, and it is read
        # when the values are asked for.
        return "dense", id(self.tensor), self.tensor.dtype, self.tensor.device, self.shape
