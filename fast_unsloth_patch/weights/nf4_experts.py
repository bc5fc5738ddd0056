"""A stack of experts [E, N, K] in bitsandbytes' four bits, as one frozen tensor that any torch code can use.

Each expert is quantised by itself, so that its values are, to the bit, those of bitsandbytes for its matrix [N, K], and
everything about it is a contiguous slice: `dequantize` unpacks the experts that are asked for. What the layer's code
does to the parameter without reading its values (moving, cloning, wrapping, copying, saving) leaves it packed; every
other operation gets the values, of one expert where one is selected, and gives a plain tensor.
What each operation does is in `nf4_dispatch`, how a stack stands in a state dict or a checkpoint in `nf4_checkpoint`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import warn
from ..reference.nf4 import CODES
from . import WeightLayoutError
from .nf4 import Nf4Weight
from .nf4_dispatch import describe, dispatch

__all__ = ["OFFSET_WIDTH", "Nf4Experts", "Nf4Stack", "Packed", "layout_problem"]

# The offset of an expert's double quantisation takes 16 bytes, so that its address is aligned as Triton likes it for
# every expert: one compiled kernel instead of several.
OFFSET_WIDTH = 4


class Packed(NamedTuple):
    """What a stack holds. B blocks an expert; the last three tensors are None without double quantisation."""

    packed: Tensor  # [E, N K / 2] uint8
    absmax: Tensor  # [E, B] float32, under double quantisation uint8
    absmax2: Tensor | None  # [E, ceil(B / blocksize2)] float32
    code2: Tensor | None  # [256] float32
    offset: Tensor | None  # [E, 4] float32, of which the first column counts
    quant_type: str  # nf4 or fp4
    blocksize: int
    blocksize2: int  # 0 without double quantisation

    def map(self, function: Callable[[Tensor], Tensor]) -> Packed:
        parts: list[Any] = [function(part) if isinstance(part, Tensor) else part for part in self]
        return Packed(*parts)


class _HalfByte(int):
    """The size of an element: as a factor it is one half, by itself 1, for it must be an int."""

    def __mul__(self, count: int) -> int:
        return int(count) // 2

    __rmul__ = __mul__


class Nf4Stack(NamedTuple):
    """A stack as the ops know one. It is no tensor: no kernel can take its address for that of values."""

    weights: tuple[Nf4Weight, ...]
    shape: tuple[int, ...]  # E, N, K
    dtype: torch.dtype
    device: torch.device

    def dequantize(
        self, first: int = 0, count: int | None = None, out: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The values of experts ``first`` to ``first + count``; on CUDA one launch for up to three experts.

        Args:
            first, count: which experts; default all from ``first`` on.
            out: the buffer to write to, [count, N, K] of any floating dtype, unit stride along K.
            dtype: without ``out``: that of the result, default ``self.dtype``.

        Returns:
            [count, N, K].

        Raises:
            IndexError: experts that there are not.
            WeightLayoutError: if ``out`` does not fit.
        """
        experts, n, k = self.shape
        count = experts - first if count is None else count
        if first < 0 or count < 0 or first + count > experts:
            raise IndexError(f"experts {first} to {first + count} of {experts}")
        if out is None:
            out = torch.empty((count, n, k), dtype=dtype or self.dtype, device=self.device)
        elif tuple(out.shape) != (count, n, k):
            raise WeightLayoutError(f"out: expected {[count, n, k]}, found {list(out.shape)}")
        Nf4Weight.dequantize_many(self.weights[first : first + count], out.unbind(0))
        return out


class Nf4Experts(Tensor):
    """The weights [E, N, K] of E experts, four bits each. Make one with `of` or `stack`.

    ``dtype`` is that of the values; they are rounded to ``stored_dtype``, which the weight had before it was quantised,
    and then brought to ``dtype``, as ``bitsandbytes.functional.dequantize_4bit(...).to(dtype)`` does.

    The class calls itself ``Params4bit``. By this name PEFT's ``prepare_model_for_kbit_training``, which brings every
    other bfloat16 parameter to float32, and accelerate's ``set_module_tensor_to_device`` know a parameter of four bits;
    where PEFT counts parameters of this name it multiplies by ``2 * element_size()``, which is therefore 1.

    It gets no gradient, and it cannot be written to except from another stack; ``torch.distributed.broadcast`` sends it
    packed. It cannot be sharded: FSDP must leave it out, whole on every rank, and gets an error that says how.
    """

    stored_dtype: torch.dtype
    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    code2: Tensor | None
    offset: Tensor | None
    quant_type: str
    blocksize: int
    blocksize2: int

    @staticmethod
    def __new__(cls: type[Nf4Experts], data: Nf4Experts, requires_grad: bool = False, **_kwargs: Any) -> Nf4Experts:
        """``data`` as a parameter: what accelerate calls, with the attributes of the parameter before as keywords."""
        if not isinstance(data, Nf4Experts):
            raise TypeError(f"a stack of 4-bit experts cannot be made of {describe(data)}: use Nf4Experts.of")
        return data.as_parameter()

    @staticmethod
    def wrap(parts: Packed, shape: Sequence[int], dtype: torch.dtype, stored: torch.dtype) -> Nf4Experts:
        """As `of`, without its checks."""
        self = torch.Tensor._make_wrapper_subclass(
            Nf4Experts, tuple(shape), dtype=dtype, device=parts.packed.device, requires_grad=False
        )
        self.stored_dtype = stored
        for name, part in parts._asdict().items():
            setattr(self, name, part)
        return self

    @classmethod
    def of(
        cls, parts: Packed, shape: Sequence[int], stored_dtype: torch.dtype, dtype: torch.dtype | None = None
    ) -> Nf4Experts:
        """The stack [E, N, K] of what ``parts`` holds.

        Raises:
            WeightLayoutError: which tensor does not fit, expected and found.
        """
        problem = layout_problem(parts, shape, stored_dtype)
        if problem is not None:
            raise WeightLayoutError(problem)
        return cls.wrap(parts, shape, dtype or stored_dtype, stored_dtype)

    @classmethod
    def stack(cls, quantised: Sequence[tuple[Tensor, Any]]) -> Nf4Experts:
        """The stack of matrices that ``bitsandbytes.functional.quantize_4bit`` has quantised with the same options.

        Args:
            quantised: for each expert its bytes and its ``QuantState``.

        Raises:
            WeightLayoutError: the options differ.
        """
        data, states = zip(*quantised)
        first = states[0]
        for name in ("quant_type", "blocksize", "dtype", "shape", "nested"):
            if len(found := {getattr(state, name) for state in states}) > 1:
                raise WeightLayoutError(f"experts to stack: expected one {name}, found {sorted(map(str, found))}")
        packed = torch.stack([one.reshape(-1).view(torch.uint8) for one in data])
        absmax = torch.stack([state.absmax.reshape(-1) for state in states])
        parts = Packed(packed, absmax, None, None, None, first.quant_type, first.blocksize, 0)
        if first.nested:
            if any(not torch.equal(state.state2.code, first.state2.code) for state in states):
                raise WeightLayoutError("experts to stack: expected one code of the double quantisation, found several")
            absmax2 = torch.stack([state.state2.absmax.reshape(-1) for state in states])
            offset = nn.functional.pad(
                torch.stack([state.offset.reshape(1) for state in states]), (0, OFFSET_WIDTH - 1)
            )
            parts = Packed(*parts[:2], absmax2, first.state2.code, offset, *parts[5:7], first.state2.blocksize)
        return cls.of(parts, (len(states), *first.shape), first.dtype)

    @property
    def parts(self) -> Packed:
        return Packed(*(getattr(self, name) for name in Packed._fields))

    def dequantize(
        self, first: int = 0, count: int | None = None, out: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The values of experts ``first`` to ``first + count``, a plain tensor: as `Nf4Stack.dequantize`."""
        return self.frozen().dequantize(first, count, out, dtype)

    def frozen(self) -> Nf4Stack:
        """What an op is given; made once, it holds views of what is here."""
        made: Nf4Stack | None = self.__dict__.get("_frozen")
        if made is None:
            weights = tuple(self._expert(e) for e in range(self.shape[0]))
            made = self.__dict__["_frozen"] = Nf4Stack(weights, tuple(self.shape), self.dtype, self.device)
        return made

    def _expert(self, e: int) -> Nf4Weight:
        second = offset = None
        if self.absmax2 is not None and self.offset is not None:
            second = SimpleNamespace(
                absmax=self.absmax2[e], code=self.code2, blocksize=self.blocksize2, dtype=torch.float32, nested=False
            )
            offset = self.offset[e, 0]
        state = SimpleNamespace(
            absmax=self.absmax[e],
            shape=torch.Size(self.shape[1:]),
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.stored_dtype,
            offset=offset,
            state2=second,
            nested=second is not None,
        )
        return Nf4Weight.of(self.packed[e], state, self.dtype)

    def identity(self) -> tuple[Hashable, ...]:
        """Equal for two tensors over the same storage, while both exist; for the fingerprint of a plan."""
        addresses = tuple(part.data_ptr() for part in self.parts if isinstance(part, Tensor))
        return (tuple(self.shape), self.dtype, self.stored_dtype, self.quant_type, self.blocksize, *addresses)

    def as_parameter(self) -> Nf4Experts:
        """The same storage as an ``nn.Parameter``."""
        return nn.Parameter(self, requires_grad=False)  # type: ignore[return-value]

    # What torch asks of a tensor that wraps others.

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = [name for name, part in self.parts._asdict().items() if isinstance(part, Tensor)]
        return names, (self.dtype, self.stored_dtype, self.quant_type, self.blocksize, self.blocksize2)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, outer_size: Any, outer_stride: Any) -> Nf4Experts:
        dtype, stored, *settings = meta
        return Nf4Experts.wrap(Packed(*map(inner.get, Packed._fields[:5]), *settings), outer_size, dtype, stored)  # type: ignore[arg-type]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks func
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(Nf4Experts, func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        nested = ", double quantised" if self.absmax2 is not None else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Nf4Experts({list(self.shape)}, {dtype} in {self.quant_type}{nested}, device={str(self.device)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Nf4Experts:
        if id(self) not in memo:
            parts = self.parts.map(lambda part: copy.deepcopy(part, memo))
            memo[id(self)] = _rebuild(parts, tuple(self.shape), self.dtype, self.stored_dtype, self._is_parameter)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (tuple(self.parts), tuple(self.shape), self.dtype, self.stored_dtype, self._is_parameter)

    @property
    def _is_parameter(self) -> bool:
        return isinstance(self, nn.Parameter)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Nf4Experts) or value.shape != self.shape:
            raise TypeError(f"the data of {self!r}: expected as many weights of four bits, found {describe(value)}")
        parts = tuple(value.parts)
        new = _rebuild(parts, tuple(value.shape), value.dtype, value.stored_dtype, self._is_parameter)
        torch.utils.swap_tensors(self, new)

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Nf4Experts:
        """Stays False; True is a warning."""
        if requires_grad:
            warn("quantize-experts", "experts of four bits get no gradient; their requires_grad stays False")
        return self

    def element_size(self) -> int:
        """Half a byte: a factor of one half. What `nbytes` counts besides is the statistics."""
        return _HalfByte(1)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return sum(part.nbytes for part in self.parts if isinstance(part, Tensor))


# See the docstring of the class. Pickles find it by its qualified name.
Nf4Experts.__name__ = "Params4bit"


def _rebuild(
    parts: Sequence[Any], shape: tuple[int, ...], dtype: torch.dtype, stored: torch.dtype, parameter: bool
) -> Nf4Experts:
    """What pickles call."""
    made = Nf4Experts.wrap(Packed(*parts), shape, dtype, stored)
    return made.as_parameter() if parameter else made


# torch.load(weights_only=True) reads a stack wherever this module is imported.
torch.serialization.add_safe_globals([_rebuild])


def layout_problem(parts: Packed, shape: Sequence[int], stored: torch.dtype) -> str | None:
    """What of ``parts`` does not fit a stack [E, N, K] of ``stored`` weights (expected and found), or None."""
    if len(shape) != 3:
        return f"experts: expected [E, N, K], found {list(shape)}"
    if parts.quant_type not in CODES:
        return f"quant_type: expected nf4 or fp4, found {parts.quant_type!r}"
    if stored not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype: expected float32, bfloat16 or float16, found {stored}"
    experts, values = shape[0], math.prod(shape[1:])
    if parts.blocksize <= 0 or values % parts.blocksize:
        return f"experts of {list(shape[1:])}: expected a multiple of the blocksize {parts.blocksize}, found {values}"
    blocks = values // parts.blocksize
    nested = parts.absmax2 is not None
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "packed": ((experts, values // 2), torch.uint8),
        "absmax": ((experts, blocks), torch.uint8 if nested else torch.float32),
    }
    if nested:
        if parts.blocksize2 <= 0:
            return f"blocksize of the absmax: expected a positive number, found {parts.blocksize2!r}"
        expected["absmax2"] = ((experts, -(-blocks // parts.blocksize2)), torch.float32)
        expected["code2"] = ((256,), torch.float32)
        expected["offset"] = ((experts, OFFSET_WIDTH), torch.float32)
    device = parts.packed.device
    for name, (size, dtype) in expected.items():
        part = getattr(parts, name)
        fits = isinstance(part, Tensor) and (tuple(part.shape), part.dtype, part.device) == (size, dtype, device)
        if not fits or not part.is_contiguous():
            return f"{name}: expected contiguous {dtype} {list(size)} on {device}, found {describe(part)}"
    return None
