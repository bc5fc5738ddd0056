"""Whether ``from_pretrained(..., load_in_4bit)`` is to quantise the experts of a mixture too. Imports nothing heavy."""

from __future__ import annotations

import os
import sys

from . import bootstrap
from .errors import PatchUnavailableError, warn

VARIABLE = f"{bootstrap.VARIABLE}_QUANTIZE_EXPERTS"
FAMILY = "experts4bit"

# What the script said; None: nothing, so the variable counts.
_asked: bool | None = None


def quantize_experts(enabled: bool = True) -> None:
    """From now on ``from_pretrained`` with ``BitsAndBytesConfig(load_in_4bit=True)`` quantises Mixtral's experts too.

    transformers quantises ``nn.Linear`` only, and leaves the experts, 97 % of Mixtral-8x7B, in bfloat16. With this each
    expert is quantised as a linear layer of its shape would be, with the options of the ``BitsAndBytesConfig``, one
    layer at a time while the checkpoint is read. One line on stderr says what was quantised and what that saves. A
    model that was saved so is recognised when it is loaded, whatever this says.

    The default is off; ``FAST_UNSLOTH_QUANTIZE_EXPERTS=1`` turns it on without touching the script.

    Args:
        enabled: False: experts are loaded as transformers does.
    Raises:
        PatchUnavailableError: the patches that do it are not there: call ``apply()`` first. (Under the kill switch
            ``FAST_UNSLOTH=0`` this is a warning: the experts stay as they are.)
    """
    global _asked
    if enabled and (missing := _missing()):
        if bootstrap.mode() != "off":
            raise PatchUnavailableError(
                f"quantize_experts() needs the patches {FAMILY}.*; call fast_unsloth_patch.apply() first ({missing})"
            )
        warn("quantize-experts", f"the experts are not quantised, because {bootstrap.VARIABLE}=0")
        enabled = False
    _asked = bool(enabled)


def wanted() -> bool:
    """Are experts to be quantised while a model is loaded?"""
    if _asked is not None:
        return _asked
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value not in ("", *bootstrap.ON, *bootstrap.OFF):
        warn("activation", f"{VARIABLE}={value} is ignored: the values are 1 and 0")
    return value in bootstrap.ON


def say(message: str) -> None:
    """The line on stderr, from rank 0 unless ``FAST_UNSLOTH_LOG=0``."""
    if bootstrap.wants_line():
        print(f"fast_unsloth_patch: {message}", file=sys.stderr)


def _missing() -> str:
    """Which of the patches are not there, and why; empty: all are, or will be when transformers is imported."""
    from .install import status

    rows = [row for row in status().rows if row.id.partition(".")[0] == FAMILY]
    if not rows:
        return f"there is no patch {FAMILY}"
    ready = ("applied", "pending") if status().environment["active"] or bootstrap.armed() else ("applied",)
    return "; ".join(f"{row.id}: {row.reason or row.state}" for row in rows if row.state not in ready)
