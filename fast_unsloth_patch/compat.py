"""Does what is installed look as known? Versions, signatures, other patchers. The only file that parses versions."""

from __future__ import annotations

import inspect
import os
import sys
from types import FunctionType
from typing import Any

from .registry import MISSING, Patch

# Supported: from the first release (included) to the second (excluded; None: no known limit).
WINDOW: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "torch": ((2, 9), None),
    "triton": ((3, 5), None),
    "transformers": ((5, 6), (6,)),
    "peft": ((0, 18), None),
    "wrapt": ((1, 16), None),
}


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``"2.11.0+cu130"`` -> ``(2, 11, 0)``, ``"6.0.0.dev0"`` -> ``(6, 0, 0)``."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if digits:
            numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def installed(name: str) -> str | None:
    """The version of distribution ``name``, without importing it; None if it is not installed."""
    version = getattr(sys.modules.get(name), "__version__", None)
    if isinstance(version, str):
        return version
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as of_distribution

    try:
        return of_distribution(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """The versions of everything that the window speaks of."""
    return {name: installed(name) for name in WINDOW}


def window(name: str) -> str:
    """The supported window of ``name`` as pip writes it: ``"transformers>=5.6,<6"``."""
    low, high = WINDOW[name]
    return f"{name}>={'.'.join(map(str, low))}" + (f",<{'.'.join(map(str, high))}" if high else "")


def not_installed(name: str) -> str:
    """The message that says so, and what to do."""
    return f"{name} is not installed: pip install '{window(name) if name in WINDOW else name}'"


def outside_window(name: str) -> str | None:
    """None if ``name`` is installed in a supported version, else what was found and what to do."""
    found = installed(name)
    if found is None:
        return not_installed(name)
    low, high = WINDOW[name]
    if release(found) < low or (high is not None and release(found) >= high):
        return f"{name} {found} is outside the supported window: pip install '{window(name)}'"
    return None


def unknown_target(patch: Patch, module: Any) -> str | None:
    """None if ``patch`` fits what ``module`` defines, else a reason: its version, its shape, or another patcher."""
    for name in patch.requires:
        if (reason := outside_window(name)) is not None:
            return reason
    class_name, _, attribute = patch.target.partition(".")
    owner = getattr(module, class_name, None)
    if not isinstance(owner, type):
        return f"{patch.module} has no class {class_name}"
    if owner.__module__ != patch.module:
        return f"conflict: {class_name} was replaced by {owner.__module__}.{owner.__qualname__}"
    if (mapped := mapped_by_transformers(class_name)) is not None:
        return f"conflict: {mapped}"
    stock = owner.__dict__.get(attribute, MISSING)
    if patch.kind == "checkpoint_property":
        return None if hasattr(owner, "gradient_checkpointing") else f"{class_name} is no gradient checkpointing layer"
    if stock is MISSING:
        return f"{class_name} defines no {attribute} of its own"
    if other := foreign(stock, patch.module):
        return f"conflict: {patch.target} was replaced by {other}"
    found = tuple(inspect.signature(stock).parameters)
    known = [names.split("|") for names in patch.parameters]
    if known and (len(found) != len(known) or any(name not in names for name, names in zip(found, known))):
        return f"{patch.target} takes ({', '.join(found)}), not ({', '.join(patch.parameters)}) as known"
    return None


def foreign(function: Any, module: str) -> str | None:
    """Who else wrote ``function``, or one that it wraps; None if all of it comes from the package of ``module``.

    ``functools.wraps`` copies a function's ``__module__``, its globals tell where its code stands.
    """
    package = module.partition(".")[0]
    while True:
        if not isinstance(function, FunctionType):
            return f"{type(function).__module__}.{type(function).__qualname__}"
        home = function.__globals__.get("__name__", "?")
        if home.partition(".")[0] != package:
            return f"{home}.{function.__code__.co_name}"
        if "__wrapped__" not in function.__dict__:
            return None
        function = function.__dict__["__wrapped__"]


def mapped_by_transformers(class_name: str) -> str | None:
    """Which class transformers builds models with in place of ``class_name``, in words; None: that one itself."""
    patching = sys.modules.get("transformers.monkey_patching")
    find = getattr(patching, "_find_replacement_class", None)
    if patching is None or find is None:
        return None
    replacement = find(class_name, patching.get_patch_mapping())
    if replacement is None:
        return None
    return f"transformers.monkey_patching maps {class_name} to {replacement.__module__}.{replacement.__qualname__}"


def backend() -> str:
    """What the ops run on in this process, in words. Never initialises CUDA: that would break a later fork."""
    torch = sys.modules.get("torch")
    if torch is None:
        return "not known yet (torch is not imported)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton interpreter"
    if torch.version.hip:
        return "stock (ROCm is not supported)"
    if not torch.backends.cuda.is_built():
        return "PyTorch reference (this torch has no CUDA)"
    if not torch.cuda.is_initialized():
        return "PyTorch reference (CUDA was not used yet)"
    name = torch.cuda.get_device_name()
    if (reason := outside_window("triton")) is not None:
        return f"stock ({reason}) on {name}"
    return f"Triton {installed('triton')} on {name}"
