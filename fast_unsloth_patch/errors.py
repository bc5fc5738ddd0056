"""Exceptions and warnings that this package raises: one base each, few subclasses."""

from __future__ import annotations

import sys
import warnings


class FastPatchError(RuntimeError):
    """Base of every error of this package."""


class UnknownPatchError(FastPatchError, ValueError):
    """A name that is neither a patch id nor a family of patches."""


class OptionError(FastPatchError, ValueError):
    """An argument whose value is not one of those that exist."""


class PatchUnavailableError(FastPatchError):
    """A patch that was asked for by name, or under ``strict``, cannot be installed."""


class NotFastError(FastPatchError):
    """``Status.require`` found a patch that did not take the fast path."""


class FastPatchWarning(UserWarning):
    """Something runs stock that could run fast, or a setting was ignored. Its slug is an anchor of the README."""


def warn(slug: str, message: str) -> None:
    """Warn with ``message`` and the README anchor ``slug``.

    Most warnings arise inside somebody's import statement, where an exception would break the script. So if the filters
    turn warnings into errors, this one is printed; whoever wants errors has ``strict=True``.
    """
    try:
        warnings.warn(f"fast_unsloth_patch: {message} [README.md#{slug}]", FastPatchWarning, stacklevel=3)
    except FastPatchWarning as warning:
        print(f"{type(warning).__name__}: {warning}", file=sys.stderr)
