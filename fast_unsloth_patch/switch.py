"""Fast or stock, decided at run time without patching anything again: one context variable and one flag a module.

A context variable is per thread and per asyncio task. Backward runs in another thread on CUDA, so whoever recomputes
in backward (``patches/checkpointing.py``) carries the forward's value of ``_STOCK`` to the recompute itself.
"""

from __future__ import annotations

from contextvars import ContextVar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextvars import Token
    from typing import TypeVar

    from torch import nn

    _Model = TypeVar("_Model", bound=nn.Module)

KEEP_STOCK_FLAG = "_fast_unsloth_stock"

_STOCK: ContextVar[bool] = ContextVar("fast_unsloth_stock", default=False)


def stock_only() -> bool:
    """True inside :func:`disabled`."""
    return _STOCK.get()


# torch.compile cannot trace the reading of a context variable; it calls a function marked so once, while tracing. That
# decides nothing: compiled forwards run stock. (torch._dynamo.assume_constant_result does this, but imports torch.)
stock_only._dynamo_marked_constant = True  # type: ignore[attr-defined]


class disabled:  # Used like a function. contextlib.contextmanager would double the cost of importing the package.
    """Run forwards stock inside the ``with`` block, in this thread or task; nothing is patched or unpatched."""

    def __init__(self) -> None:
        self._tokens: list[Token[bool]] = []

    def __enter__(self) -> None:
        self._tokens.append(_STOCK.set(True))

    def __exit__(self, *error: object) -> None:
        _STOCK.reset(self._tokens.pop())


def keep_stock(model: _Model) -> _Model:
    """Keep the stock forwards of ``model``, a reference or reward model, and of every module in it now.

    The mark is a plain attribute: it survives ``deepcopy`` and pickling, and is in no state dict. Modules added later
    (PEFT adapters) are not marked, so call it when the model is complete.

    Args:
        model: any ``nn.Module``.
    Returns:
        The same model.
    Raises:
        OptionError: ``model`` is not a module.
    """
    if not hasattr(model, "modules"):
        from .errors import OptionError

        raise OptionError(f"keep_stock(model) takes a torch.nn.Module, not {type(model).__name__}")
    for module in model.modules():
        module.__dict__[KEEP_STOCK_FLAG] = True
    return model
