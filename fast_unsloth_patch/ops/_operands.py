"""The operands of a LoRA op: projections and their adapters, the dtypes that they are computed in, and how they pass
through an autograd Function.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from ..weights import FrozenWeight


class Adapter(NamedTuple):
    """The LoRA operands of one projection.

    Args:
        a: [r, K].
        b: [N, r].
        scaling: factor of the update.
        dropout: probability of dropping an element of the update's input; 0.0 when not training.
        bias: ``lora_B.bias`` [N], or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: float = 0.0
    bias: torch.Tensor | None = None


class Projection(NamedTuple):
    """A linear layer and the adapter on it, if any.

    Args:
        weight: [N, K]; a tensor, frozen or trainable, or a packed weight.
        bias: [N], or None.
        adapter: None for a layer without LoRA.
    """

    weight: torch.Tensor | FrozenWeight
    bias: torch.Tensor | None
    adapter: Adapter | None


class Dtypes(NamedTuple):
    """Compute dtypes: of the base GEMM, of the low-rank branch, of x as it is kept (and dy, dx), and of y.

    The last two differ from ``base`` only round a packed weight whose layer computes in a dtype of its own.
    """

    base: torch.dtype
    low: torch.dtype
    x: torch.dtype
    y: torch.dtype


class Operands(NamedTuple):
    """One projection inside a Function: tensors only, the rest by value."""

    weight: torch.Tensor | FrozenWeight
    bias: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    lora_bias: torch.Tensor | None
    scaling: float
    dropout: float


class OperandGrads(NamedTuple):
    """Gradients in the order of the Function's tensor arguments."""

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    lora_bias: torch.Tensor | None = None


def resolve_dtypes(x: torch.Tensor, *projections: Projection) -> Dtypes:
    """Under autocast all is computed in its dtype; without, the base GEMM in x's and the low-rank branch in the
    adapters'.

    A packed weight may bring its own compute dtype (bitsandbytes): without autocast that is the base GEMM's, and with
    and without it the last projection's y is cast to x's dtype.
    """
    kind, own = x.device.type, None
    for projection in projections:
        if not isinstance(projection.weight, torch.Tensor):
            own = projection.weight.compute_dtype
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(kind)
        return Dtypes(dtype, dtype, dtype, dtype if own is None else x.dtype)
    base = x.dtype if own is None else own
    low = next((p.adapter.a.dtype for p in projections if p.adapter is not None), base)
    return Dtypes(base, low, x.dtype, x.dtype)


def one_dtype(x: torch.Tensor, *projections: Projection) -> Dtypes:
    """`resolve_dtypes` for an op whose intermediates are of one dtype.

    Raises:
        ValueError: a packed weight computes in another dtype than x's, without autocast.
    """
    dtypes = resolve_dtypes(x, *projections)
    if dtypes.base is not dtypes.x:
        raise ValueError(f"a packed weight computes in {dtypes.base}, expected the input's dtype, {dtypes.x}")
    return dtypes


# A Function takes tensors as separate arguments: five a projection, in the order of Operands.
TENSORS = 5


def flatten(projection: Projection) -> tuple[Any, ...]:
    """The weight and the tensors of a projection as Function arguments."""
    weight, bias, adapter = projection
    if adapter is None:
        return weight, bias, None, None, None
    return weight, bias, adapter.a, adapter.b, adapter.bias


def factors(projection: Projection) -> tuple[float, float]:
    """Scaling and dropout of a projection as Function arguments."""
    adapter = projection.adapter
    return (0.0, 0.0) if adapter is None else (adapter.scaling, adapter.dropout)


def operands(tensors: tuple[Any, ...], values: tuple[tuple[float, float], ...]) -> list[Operands]:
    """Inverse of ``flatten`` and ``factors`` for several projections."""
    return [Operands(*tensors[i * TENSORS : (i + 1) * TENSORS], *value) for i, value in enumerate(values)]  # type: ignore[call-arg]


def _versions(tensors: tuple[Any, ...]) -> tuple[int, ...]:
    # A packed weight has none: bitsandbytes and gptqmodel do not ask either.
    return tuple([t._version for t in tensors if isinstance(t, torch.Tensor) and not t.is_inference()])


class Parameters(NamedTuple):
    """The parameters of a Function, kept beside its saved tensors.

    Saving a tensor costs up to 25 us under non-reentrant checkpointing (its hooks run three times for each), and
    parameters are neither memory to be freed nor to be offloaded. What saving checks, that nobody wrote to them
    before backward, is checked here.
    """

    tensors: tuple[Any, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, tensors: tuple[Any, ...]) -> Parameters:
        return cls(tensors, _versions(tensors))

    def unchanged(self) -> tuple[Any, ...]:
        """The parameters; raises if one was modified in place since the forward, as autograd does for saved tensors."""
        if _versions(self.tensors) != self.versions:
            raise RuntimeError(
                "a weight or adapter needed for gradient computation has been modified by an inplace operation "
                "between forward and backward (an optimizer step between them?)"
            )
        return self.tensors


class Normed(NamedTuple):
    """What an op's input was made from: ``input = weight * (x * rstd)``, row by row.

    The norm keeps x for its own backward. An op that keeps x too, and not its input, saves one activation of memory.
    """

    x: torch.Tensor
    rstd: torch.Tensor
    weight: torch.Tensor
    version: int  # of the input, when it was made

    @classmethod
    def mark(cls, y: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> None:
        """Note on ``y`` itself where it comes from, if a backward may ask."""
        if not y.requires_grad:
            return
        y._fast_normed = cls(x.detach(), rstd, weight.detach(), y._version)  # type: ignore[attr-defined]

    @classmethod
    def of(cls, y: torch.Tensor) -> Normed | None:
        """What ``y`` was made from, if that is known and nobody has written to it since."""
        found = getattr(y, "_fast_normed", None)
        return found if type(found) is cls and found.version == y._version else None

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and files of y know nothing of this: OrderedDict is a type that torch.load takes from anybody.
        return OrderedDict, ()


def adapted(group: list[Operands]) -> list[Operands]:
    return [op for op in group if op.a is not None]


def reads_input(needs: tuple[bool, ...]) -> bool:
    """Whether the backward of these projections reads their input: for a trainable W or A, not for B, biases or dx."""
    return any(needs[0::TENSORS]) or any(needs[2::TENSORS])


def keep_scale(dropout: float) -> float:
    """What kept elements are multiplied by: ``1 / (1 - p)``, PEFT's ``nn.Dropout``; 0 for p = 1, where nothing is
    kept.
    """
    return 0.0 if dropout >= 1.0 else 1.0 / (1.0 - dropout)


def rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [..., K] as [T, K] in the compute dtype, rows contiguous."""
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    return flat if flat.stride(-1) == 1 or flat.numel() == 0 else flat.contiguous()


def without_autocast(x: torch.Tensor) -> AbstractContextManager[Any]:
    """The dtypes are ours: a backward called under autocast must not round fp32 products. (In a forward they are
    autocast's own.)
    """
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def check_width(features: int, *projections: Projection) -> None:
    """Shapes that a kernel would read out of bounds with."""
    for weight, _, adapter in projections:
        n, k = weight.shape
        if features != k:
            raise ValueError(f"the input has {features} features, the weight {tuple(weight.shape)} takes {k}")
        if adapter is not None and (adapter.a.shape[-1] != k or adapter.b.shape != (n, adapter.a.shape[0])):
            raise ValueError(
                f"LoRA A {tuple(adapter.a.shape)} and B {tuple(adapter.b.shape)} do not fit the weight "
                f"{tuple(weight.shape)}: expected A [r, {k}] and B [{n}, r]"
            )
