"""Fast fine-tuning of stock Hugging Face models: ``fast_unsloth_patch.apply()``, and the script stays as it is.

Importing this package loads neither torch, transformers, peft, triton nor wrapt. With ``FAST_UNSLOTH=1`` set, importing
it is enough.
"""

from __future__ import annotations

import os as _os

from .errors import (
    FastPatchError,
    FastPatchWarning,
    NotFastError,
    OptionError,
    PatchUnavailableError,
    UnknownPatchError,
)
from .quantize import quantize_experts

# Imported before the function `status` is defined: the first import of a submodule binds its name here.
from .status import Status
from .switch import disabled, keep_stock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__version__ = "0.1.0"

__all__ = [
    "FastPatchError",
    "FastPatchWarning",
    "NotFastError",
    "OptionError",
    "PatchUnavailableError",
    "Status",
    "UnknownPatchError",
    "apply",
    "disabled",
    "keep_stock",
    "quantize_experts",
    "status",
    "unapply",
]


def apply(
    *,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    strict: bool | None = None,
    recompute: str | None = None,
) -> Status:
    """Patch what is imported, and what will be as soon as it is. A second call replaces the configuration of the first.

    An argument that is None means: what its environment variable says, else the default.

    Args:
        only: patch ids or families (``"llama"``, ``"peft.linear"``) to install; default all (``FAST_UNSLOTH_ONLY``).
        exclude: ids or families to leave stock; default none (``FAST_UNSLOTH_EXCLUDE``).
        strict: import the targets now and raise if one cannot be installed; default False (``FAST_UNSLOTH=strict``).
        recompute: under gradient checkpointing, ``"full"`` (the default): the recompute leaves out what nothing reads;
            ``"stock"``: it computes everything; ``"auto"``: as full, and layers are kept from being recomputed as far
            as free GPU memory allows; ``"offload"``: as full, and the layers' inputs wait in host memory
            (``FAST_UNSLOTH_RECOMPUTE``).
    Returns:
        The status now.
    Raises:
        UnknownPatchError: a name in ``only`` or ``exclude``; the message has the nearest one.
        OptionError: another value that does not exist.
        PatchUnavailableError: under ``strict``, or for a name in ``only``, what cannot be installed. Then nothing is.
    """
    from .install import apply as _apply

    return _apply(only=only, exclude=exclude, strict=strict, recompute=recompute)


def unapply() -> None:
    """Put back the identical original objects; hooks that have not fired stay inert until the next :func:`apply`."""
    from .install import unapply as _unapply

    _unapply()


def status(model: nn.Module | None = None) -> Status:
    """What is patched, what ran fast and what did not, and why; with ``model`` also what in it outranks the patches."""
    from .install import status as _installed

    return _installed(model)


if _os.environ.get("FAST_UNSLOTH"):
    from .bootstrap import activate as _activate

    _activate()
