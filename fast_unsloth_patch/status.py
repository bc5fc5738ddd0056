"""What really ran: counters that the patches write, and the table that ``status()`` returns. Imports nothing heavy."""

from __future__ import annotations

import atexit
import itertools
import sys

from . import bootstrap
from .errors import NotFastError, OptionError

# Not from typing: importing the package must stay cheap, also for processes that never train.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# Patches of the checkpointed region: they have no backward of their own, their second half is the recomputation.
_CHECKPOINTING = ".checkpointing"
_PACKING = ".packing"
# What happens while a model is loaded, and only if the script has asked for it.
_LOADING = "experts4bit."

# Reasons to run stock of forwards that are not training.
_NO_TRAINING = {"eval", "disabled", "keep_stock"}

_TALLIES: dict[str, Tally] = {}

# Set while the line after the first fast step is due; looked at in every fast backward, so one global.
_first_backward: Callable[[], None] | None = None


def _no() -> bool:
    return False


# `torch.compiler.is_compiling`, as soon as torch is there.
_compiling: Callable[[], bool] = _no


def _count_at_trace_time(patch_id: str, field: str, reason: str | None) -> None:
    tally(patch_id)._count(field, reason)


# torch.compile calls a function marked so once, while tracing, with constant arguments: neither a graph break nor a
# guard on the counter's value. (What torch._dynamo.assume_constant_result does, without importing torch.)
_count_at_trace_time._dynamo_marked_constant = True  # type: ignore[attr-defined]


_COUNTERS = ("forward", "backward", "recomputed", "compiled")


class Tally:
    """The counters of one patch. A method call costs about 0.1 us.

    Under ``torch.compile`` a method counts once, when the graph is traced, not at each call of the compiled forward.

    Attributes:
        id: of the patch.
        forward: forwards that took the fast path, recomputations apart.
        backward: backwards of the fast path.
        recomputed: forwards that took the fast path again, for gradient checkpointing.
        compiled: traces of the fast path by ``torch.compile``.
        fallbacks: forwards that ran stock, by reason.
    """

    __slots__ = ("id", *_COUNTERS, "fallbacks")

    forward: int
    backward: int
    recomputed: int
    compiled: int

    def __init__(self, patch_id: str) -> None:
        self.id = patch_id
        for name in _COUNTERS:
            setattr(self, name, 0)
        self.fallbacks: dict[str, int] = {}

    def hit(self, recomputing: bool = False) -> None:
        """A forward takes the fast path."""
        if _compiling():
            _count_at_trace_time(self.id, "compiled", None)
        elif recomputing:
            self.recomputed += 1
        else:
            self.forward += 1

    def hit_backward(self) -> None:
        """A backward of the fast path runs."""
        if _compiling():
            _count_at_trace_time(self.id, "backward", None)
            return
        self.backward += 1
        if _first_backward is not None:
            _first_backward()

    def fall_back(self, reason: str) -> None:
        """A forward runs stock because of ``reason``, a short phrase from a small set."""
        if _compiling():
            _count_at_trace_time(self.id, "fallbacks", reason)
        else:
            self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1

    def hit_compiled(self) -> None:
        """A forward that is being traced takes the fast path."""
        _count_at_trace_time(self.id, "compiled", None)

    def fall_back_compiled(self, reason: str) -> None:
        """A forward that is being traced runs stock."""
        _count_at_trace_time(self.id, "fallbacks", reason)

    def _count(self, field: str, reason: str | None) -> None:
        if reason is None:
            setattr(self, field, getattr(self, field) + 1)
        else:
            self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1


def tally(patch_id: str) -> Tally:
    """The counters of ``patch_id``: one object for the process's life, so a patch module keeps it in a constant."""
    global _compiling
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "compiler"):
        _compiling = torch.compiler.is_compiling
    return _TALLIES.setdefault(patch_id, Tally(patch_id))


class Row:
    """One patch in the table.

    ``state`` is ``"pending"``, ``"applied"``, ``"declined"`` or ``"reverted"``; ``reason`` says why.
    ``modules`` is the number of modules of the model that the patch reaches, None without a model.
    """

    __slots__ = ("id", "target", "state", "reason", *_COUNTERS, "fallbacks", "modules")

    forward: int
    backward: int
    recomputed: int
    compiled: int

    def __init__(
        self, patch_id: str, target: str, state: str, reason: str, counts: Tally, modules: int | None = None
    ) -> None:
        self.id = patch_id
        self.target = target
        self.state = state
        self.reason = reason
        for name in _COUNTERS:
            setattr(self, name, getattr(counts, name))
        self.fallbacks = dict(counts.fallbacks)
        self.modules = modules

    def __repr__(self) -> str:
        return f"Row({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def problem(self) -> str | None:
        """Why this patch did not take the fast path forward and backward, or None: it did."""
        if self.forward and (self.backward or (self.recomputed and self.id.endswith(_CHECKPOINTING))):
            return None
        if self.state != "applied":
            return f"{self.state}: {self.reason}" if self.reason else self.state
        if self.id.startswith(_LOADING):
            return None
        stock = ", ".join(f"{reason} ({count}x)" for reason, count in self.fallbacks.items())
        if self.forward:
            return "forward was fast, but no backward ran" + (f"; stock: {stock}" if stock else "")
        if self.compiled:
            return "only traced by torch.compile, whose calls are not counted"
        if self.id.endswith(_PACKING) and not stock:
            return None  # it acts on packed or padded batches only, and there was none
        return f"ran stock: {stock}" if stock else "applied, but never called"


class Status:
    """What :func:`fast_unsloth_patch.status` returns: a snapshot; ``str()`` of it is a table.

    Attributes:
        rows: one :class:`Row` a patch.
        environment: version, recompute policy and what it has chosen, backend, versions found.
        model: with a model: what in it keeps patches from being reached, one sentence each; else None.
    """

    def __init__(self, rows: tuple[Row, ...], environment: dict[str, Any], model: list[str] | None = None) -> None:
        self.rows = rows
        self.environment = environment
        self.model = model

    def __getitem__(self, patch_id: str) -> Row:
        for row in self.rows:
            if row.id == patch_id:
                return row
        raise KeyError(patch_id)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data that ``json.dump`` takes."""
        return {**self.environment, "rows": [row.to_dict() for row in self.rows], "model": self.model}

    def require(self, *names: str) -> Status:
        """Raise unless each named patch took the fast path, forward and backward.

        Args:
            names: ids or families.
        Returns:
            This status, so that ``status().require(...)`` can be printed.
        Raises:
            NotFastError: one did not; the message has every reason.
            UnknownPatchError: there is no such patch.
        """
        from .registry import expand

        if not names:
            raise OptionError("require() needs a name, for example require('llama.attention') or require('llama')")
        wanted = {patch_id for name in names for patch_id in expand(name)}
        slow = [f"{row.id}: {row.problem}" for row in self.rows if row.id in wanted and row.problem]
        if slow:
            raise NotFastError("not on the fast path: " + "; ".join(slow))
        return self

    def line(self) -> str:
        """One line: version, what ran fast, what did not and why."""
        fast = [row.id for row in self.rows if row.forward or row.recomputed or row.compiled]
        partly = [row for row in self.rows if row.fallbacks or (row.state == "declined" and not row.forward)]
        text = f"fast_unsloth_patch {self.environment['version']}: fast: {', '.join(fast) or 'nothing'}"
        if partly:
            text += "; stock: " + ", ".join(f"{row.id} ({_reasons(row)})" for row in partly)
        return text

    def __str__(self) -> str:
        env = self.environment
        found = ", ".join(f"{name} {version or 'not found'}" for name, version in env["versions"].items())
        head = [
            f"fast_unsloth_patch {env['version']}   recompute: {env['recompute']}   backend: {env['backend']}",
            found,
            *([f"recompute: {env['recompute_choice']}"] if env.get("recompute_choice") else []),
            "",
        ]
        titles = ["patch", "target", "state", "forward", "backward", "recomputed", "stock calls, by reason"]
        table = [titles]
        for family, rows in itertools.groupby(self.rows, lambda row: row.id.partition(".")[0]):
            table += _lines(family, list(rows))
        widths = [max(len(line[i]) for line in table) for i in range(len(titles))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
        if any(row.compiled for row in self.rows):
            lines.append("compiled: traced by torch.compile; calls of a compiled forward are not counted")
        if self.model is not None:
            lines += ["", "this model:", *(f"  {fact}" for fact in self.model or ["nothing outranks the patches"])]
        return "\n".join(head + lines)

    __repr__ = __str__


def _lines(family: str, rows: list[Row]) -> list[list[str]]:
    """The table's lines of one family; a single one while none of its modules is imported, or nobody asked for it."""
    alike = len(rows) > 1 and len({(row.state, row.reason) for row in rows}) == 1
    unasked = f"{family}." == _LOADING and rows[0].state == "applied" and not any(row.forward for row in rows)
    if alike and (rows[0].state == "pending" or unasked):
        return [[f"{family}.*", f"{len(rows)} patches", rows[0].state, "0", "0", "0", rows[0].reason or "-"]]
    table = []
    for row in rows:
        pending = row.state == "pending"
        stock = [f"{reason}: {count}" for reason, count in row.fallbacks.items()]
        table.append(
            [
                row.id,
                row.target if row.modules is None or pending else f"{row.target} x{row.modules}",
                row.state if pending or not row.reason else f"{row.state}: {row.reason}",
                f"{row.forward}" + (f" + {row.compiled} compiled" if row.compiled else ""),
                str(row.backward),
                str(row.recomputed),
                ", ".join(stock) or (row.reason if pending else "") or "-",
            ]
        )
    return table


def _reasons(row: Row) -> str:
    if row.fallbacks:
        return ", ".join(row.fallbacks)
    return row.reason or "not called"


def facts_of(model: Any, targets: list[tuple[type, str]]) -> tuple[list[str], dict[str, int]]:
    """What in ``model`` outranks or escapes a patch of the class, and how many modules each patch reaches.

    Args:
        model: an ``nn.Module``.
        targets: patched class and patch id; a class may be patched twice.
    Returns:
        Sentences, and the number of modules by patch id.
    Raises:
        OptionError: not a module.
    """
    from .switch import KEEP_STOCK_FLAG

    if not hasattr(model, "named_modules"):
        raise OptionError(f"status(model) takes a torch.nn.Module, not {type(model).__name__}")
    reached = dict.fromkeys([patch_id for _, patch_id in targets], 0)
    kept = total = 0
    outranked: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        total += 1
        kept += bool(module.__dict__.get(KEEP_STOCK_FLAG))
        for owner, patch_id in targets:
            if not isinstance(module, owner):
                continue
            reason = _outranks(module, owner, patch_id)
            if reason is None:
                reached[patch_id] += 1
            else:
                outranked.setdefault(f"{patch_id}: {type(module).__name__} {reason}", []).append(name)
    facts = [
        f"{text} ({len(names)}x, first: {names[0] or 'the model itself'})" for text, names in sorted(outranked.items())
    ]
    if kept:
        facts.insert(0, f"keep_stock: {kept} of {total} modules keep stock forwards")
    if targets and not any(reached.values()):
        facts.append(f"{type(model).__name__} contains no module that a patch reaches")
    return facts, reached


def _outranks(module: Any, owner: type, patch_id: str) -> str | None:
    if "forward" in module.__dict__ and not patch_id.endswith(_CHECKPOINTING):
        forward = module.__dict__["forward"]
        function = getattr(forward, "func", getattr(forward, "__func__", forward))
        where = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
        return f"has its own forward ({where}), which outranks the class"
    overriding = next((c for c in type(module).__mro__ if "forward" in c.__dict__), owner)
    if overriding is not owner and not patch_id.endswith(_CHECKPOINTING) and not _wraps(overriding, owner):
        return f"is a subclass whose forward ({overriding.__module__}.{overriding.__qualname__}) replaces it"
    return None


def _wraps(kind: type, owner: type) -> bool:
    """Whether the forward of ``kind`` calls that of ``owner``: transformers wraps the one of FSDP2's subclass so."""
    function: Any = vars(kind)["forward"]
    while function is not None and function is not vars(owner).get("forward"):
        function = getattr(function, "__wrapped__", None)
    return function is not None


class _Announcer:
    """Says what ran, without any logging set-up: a line after the first fast step, and a report at exit."""

    def __init__(self, snapshot: Callable[[], Status]) -> None:
        self.snapshot = snapshot
        self.line_due = bootstrap.wants_line()

    def first_backward(self) -> None:
        """In the first fast backward: have the line printed when that backward is through and has counted."""
        import torch

        if torch._C._current_graph_task_id() == -1:
            return  # Called by hand, not by the autograd engine, which alone takes callbacks.
        global _first_backward
        _first_backward = None
        torch.autograd.Variable._execution_engine.queue_callback(self.print_line)

    def print_line(self) -> None:
        if self.line_due:
            self.line_due = False
            _write(self.snapshot().line(), "stderr")

    def at_exit(self) -> None:
        """The report, and the line if training never came to a fast backward."""
        now = self.snapshot()
        if any(row.forward or row.fallbacks.keys() - _NO_TRAINING for row in now.rows):
            self.print_line()
        path = bootstrap.report_path()
        # Launchers (torchrun, accelerate) inherit the variable, and must not overwrite what their children report.
        if not path or not bootstrap.is_rank_0() or all(row.state == "pending" for row in now.rows):
            return
        if path == "-":
            _write(str(now), "stdout")
            return
        import json

        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(json.dumps(now.to_dict(), indent=2) if path.endswith(".json") else str(now))
                file.write("\n")
        except OSError as error:
            _write(f"fast_unsloth_patch: no report: {error}", "stderr")


_announcer: _Announcer | None = None


def announce(snapshot: Callable[[], Status]) -> None:
    """From now on, say what ran as ``FAST_UNSLOTH_LOG`` and ``FAST_UNSLOTH_REPORT`` want it.

    Args:
        snapshot: returns the status at the time of the call.
    """
    global _announcer, _first_backward
    if _announcer is None:
        _announcer = _Announcer(snapshot)
        atexit.register(_announcer.at_exit)
        _first_backward = _announcer.first_backward if _announcer.line_due else None


def say(text: str) -> None:
    """A line of its own to stderr, as the one after the first fast step: on rank 0, if lines are wanted."""
    if bootstrap.wants_line():
        _write(f"fast_unsloth_patch: {text}", "stderr")


def _write(text: str, stream: str) -> None:
    """Print to the stream of that name; a closed or missing one is no reason to break a backward pass or an exit."""
    file = getattr(sys, stream)
    if file is not None:
        try:
            print(text, file=file, flush=True)
        except (OSError, ValueError):
            return
