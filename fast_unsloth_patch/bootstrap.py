"""The environment variables: activation, which the ``.pth`` / ``.start`` line calls, and the defaults of ``apply()``.

Every interpreter of the environment comes through :func:`activate` when ``FAST_UNSLOTH`` is set, also pip and
data-loader workers. So nothing heavy is imported (not even wrapt) until somebody asks for transformers or peft, and
nothing is raised.
"""

from __future__ import annotations

import os
import sys

from .errors import FastPatchError, OptionError, warn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VARIABLE = "FAST_UNSLOTH"

ON = ("1", "true", "on", "yes")
OFF = ("0", "false", "off", "no")

RECOMPUTE = ("full", "stock", "auto", "offload")

# The packages whose import starts the real work: the first names of the modules in the registry.
_TRIGGERS = ("transformers", "peft")


def mode() -> str | None:
    """``"on"``, ``"strict"``, ``"off"`` (the kill switch), or None: unset, or a value that means nothing."""
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value in ON:
        return "on"
    if value in OFF:
        return "off"
    return "strict" if value == "strict" else None


class _Trigger:
    """An import finder that finds nothing: the first import of a trigger package makes it start the real work.

    It stays in ``sys.meta_path`` afterwards: removing an entry there while the import system walks the list would make
    it skip the next finder.
    """

    def __init__(self) -> None:
        self.waiting = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if self.waiting and name in _TRIGGERS:
            self.waiting = False
            _start()


_trigger: _Trigger | None = None


def activate() -> None:
    """Do what ``FAST_UNSLOTH`` says. Idempotent (some virtual environments run a ``.pth`` twice); never raises."""
    global _trigger
    if _trigger is not None or not os.environ.get(VARIABLE, "").strip():
        return
    _trigger = _Trigger()
    try:
        wanted = mode()
        if wanted is None:
            warn("activation", f"{VARIABLE}={os.environ[VARIABLE]} is ignored: the values are 1, strict and 0")
        _trigger.waiting = wanted in ("on", "strict")
        if any(name in sys.modules for name in _TRIGGERS):
            _trigger.find_spec(_TRIGGERS[0])
        elif _trigger.waiting:
            sys.meta_path.insert(0, _trigger)
    except Exception as error:  # This is the start-up of somebody's interpreter.
        complain(error)


def armed() -> bool:
    """Is the variable's ``apply()`` still waiting for the first import of transformers or peft?"""
    return _trigger is not None and _trigger.waiting


def disarm() -> None:
    """A call from the script has the last word: the variable does nothing any more."""
    if _trigger is not None:
        _trigger.waiting = False


def _start() -> None:
    try:
        from .install import apply_from_environment

        apply_from_environment()
    except Exception as error:  # We are inside the user's `import transformers`.
        complain(error)


def complain(error: Exception) -> None:
    """Say what went wrong where nothing may be raised."""
    print(f"fast_unsloth_patch: {type(error).__name__}: {error}", file=sys.stderr)


class Config:
    """What an ``apply()`` asks for.

    Attributes:
        left_out: id -> why it was not chosen.
        named: ids that the argument ``only`` names: they raise rather than decline.
        strict: everything chosen raises rather than declines.
        recompute: ``"full"``, ``"stock"``, ``"auto"`` or ``"offload"``.
    """

    def __init__(self, left_out: dict[str, str], named: frozenset[str], strict: bool, recompute: str) -> None:
        self.left_out = left_out
        self.named = named
        self.strict = strict
        self.recompute = recompute


def configure(only: Any = None, exclude: Any = None, strict: bool | None = None, recompute: Any = None) -> Config:
    """Argument, else variable, else default. A wrong argument raises; a wrong variable is a warning and is ignored.

    Raises:
        UnknownPatchError, OptionError: as :func:`fast_unsloth_patch.apply` says.
    """
    from .registry import PATCHES

    ids = [patch.id for patch in PATCHES]
    left_out: dict[str, str] = {}
    wanted = _names("only", only)
    if wanted is not None:
        left_out.update((i, "not in only") for i in ids if i not in wanted)
    excluded = _names("exclude", exclude) or set()
    left_out.update((i, "in exclude") for i in ids if i in excluded)
    return Config(
        left_out=left_out,
        named=frozenset() if only is None else frozenset(ids) - left_out.keys(),
        strict=mode() == "strict" if strict is None else bool(strict),
        recompute=_recompute(recompute),
    )


def _names(argument: str, value: Any) -> set[str] | None:
    """The ids that ``only`` or ``exclude`` means; None if neither the argument nor its variable says anything."""
    from .registry import expand, names_of

    if value is not None:
        return {i for name in names_of(argument, value) for i in expand(name)}
    variable = f"{VARIABLE}_{argument.upper()}"
    found: set[str] = set()
    for name in names_of(argument, os.environ.get(variable, "")):
        try:
            found.update(expand(name))
        except FastPatchError as error:
            warn("activation", f"{variable}: {error}; the name is ignored")
    return found or None


def _recompute(value: Any) -> str:
    variable = os.environ.get(f"{VARIABLE}_RECOMPUTE", "").strip()
    asked = value if value is not None else variable or RECOMPUTE[0]
    if asked in RECOMPUTE:
        return str(asked)
    problem = f"recompute={asked!r} is unknown: use {', '.join(map(repr, RECOMPUTE[:-1]))} or {RECOMPUTE[-1]!r}"
    if value is not None:
        raise OptionError(problem)
    warn("activation", f"{VARIABLE}_RECOMPUTE is ignored: {problem}")
    return RECOMPUTE[0]


def wants_line() -> bool:
    """Is the line after the first fast step wanted? On rank 0 unless ``FAST_UNSLOTH_LOG=0``."""
    value = os.environ.get(f"{VARIABLE}_LOG", "").strip().lower()
    if value and value not in (*ON, *OFF):
        warn("activation", f"{VARIABLE}_LOG={value} is ignored: the values are 1 and 0")
    return value not in OFF and is_rank_0()


def is_rank_0() -> bool:
    """Is this the process that speaks? Launchers set ``RANK``, some only ``LOCAL_RANK``; without either, yes."""
    return (os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0").strip() == "0"


def report_path() -> str:
    """Where the report at exit goes: a path, ``"-"`` for standard output, or ``""``: nowhere."""
    return os.environ.get(f"{VARIABLE}_REPORT", "").strip()
