"""apply and unapply: one loop over the rows of the registry, one back over what was recorded.

A target that is imported is patched at once, any other by a wrapt post-import hook on its leaf module. wrapt does
nothing else: a forward is swapped on its class by a plain function, because torch.compile bypasses wrapped methods.

The lock guards this module's state only. Nothing is imported under it: a thread in which a hook fires holds the import
lock of the module, so the two locks would wait for each other.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import FunctionType
from typing import Any, cast

from . import __version__, bootstrap, compat, registry
from .bootstrap import Config
from .errors import PatchUnavailableError, warn
from .registry import MISSING, Patch
from .status import Row, Status, announce, facts_of, tally

MARK = "__fup_patched__"


@dataclass(frozen=True)
class _Record:
    """One swap that was made, with what it takes to undo it."""

    patch: Patch
    owner: type
    attribute: str
    stock: Any
    new: Any

    def in_place(self) -> bool:
        return self.owner.__dict__.get(self.attribute, MISSING) is self.new


@dataclass
class _State:
    config: Config | None = None
    active: bool = False
    records: list[_Record] = field(default_factory=list)
    declined: dict[str, str] = field(default_factory=dict)
    hooked: set[str] = field(default_factory=set)


_lock = threading.RLock()
_state = _State()
_registering = threading.local()


def apply(*, only: Any = None, exclude: Any = None, strict: bool | None = None, recompute: str | None = None) -> Status:
    """See :func:`fast_unsloth_patch.apply`."""
    if bootstrap.mode() == "off":
        return status()
    config = bootstrap.configure(only, exclude, strict, recompute)
    bootstrap.disarm()
    problems = _apply(config, import_now=config.strict)
    asked_for = {i: why for i, why in problems.items() if config.strict or i in config.named}
    if asked_for:
        unapply()
        found = "; ".join(f"{why} ({', '.join(ids)})" for why, ids in _by_reason(asked_for).items())
        raise PatchUnavailableError(f"nothing is patched, for what was asked for cannot be installed: {found}")
    _warn_declined(problems)
    return status()


def apply_from_environment() -> None:
    """What ``FAST_UNSLOTH=1`` does as soon as transformers or peft is requested. Imports neither of them."""
    _warn_declined(_apply(bootstrap.configure(), import_now=False))


def unapply() -> None:
    """See :func:`fast_unsloth_patch.unapply`."""
    bootstrap.disarm()
    with _lock:
        _state.active = False
        stuck = _restore(lambda record: True)
    _set_policy()
    _warn_stuck(stuck)


def status(model: Any = None) -> Status:
    """See :func:`fast_unsloth_patch.status`."""
    with _lock:
        records = list(_state.records)
        config = _state.config
    facts: list[str] | None = None
    reached: dict[str, int] = {}
    if model is not None:
        facts, reached = facts_of(model, [(record.owner, record.patch.id) for record in records])
    rows = []
    for patch in registry.PATCHES:
        modules = None if model is None else reached.get(patch.id, 0)
        rows.append(Row(patch.id, patch.target, *_state_of(patch), tally(patch.id), modules))
    environment = {
        "version": __version__,
        "active": _state.active,
        "recompute": config.recompute if config else "-",
        "recompute_choice": _choice(),
        "backend": compat.backend(),
        "versions": compat.versions(),
    }
    return Status(tuple(rows), environment, facts)


def _apply(config: Config, import_now: bool) -> dict[str, str]:
    """Make ``config`` the configuration and patch what is imported; what is declined, by id."""
    with _lock:
        _state.config, _state.active = config, True
        _state.declined.clear()
        stuck = _restore(lambda record: record.patch.id in config.left_out)
    _warn_stuck(stuck)
    announce(status)
    problems: dict[str, str] = {}
    modules: dict[str, list[str]] = {}
    absent = {patch.id for patch in registry.PATCHES if is_absent(patch)}
    for patch in registry.PATCHES:
        if patch.id not in config.left_out:
            modules.setdefault(patch.module, []).append(patch.id)
    for name, ids in modules.items():
        required = (config.strict or not config.named.isdisjoint(ids)) and absent.isdisjoint(ids)
        problem = _import_problem(name, import_now) if required else None
        problem = problem or _watch(name)
        if problem is not None:
            problems.update(dict.fromkeys(ids, problem))
    _set_policy()
    with _lock:
        _state.declined.update(problems)
        return dict(_state.declined)


def _import_problem(name: str, import_now: bool) -> str | None:
    """Why module ``name`` cannot be imported; without ``import_now`` only a package that is not there is noticed."""
    package = name.partition(".")[0]
    if not _can_be_found(package):
        return compat.not_installed(package)
    if import_now:
        try:
            importlib.import_module(name)
        except Exception as error:  # strict: whatever keeps the target from being imported is the answer.
            return f"{name} cannot be imported: {type(error).__name__}: {error}"
    return None


def is_absent(patch: Patch) -> bool:
    """Whether there is nothing to patch, for want of the package that its module needs."""
    return bool(patch.optional) and not _can_be_found(patch.optional)


def _can_be_found(package: str) -> bool:
    if sys.modules.get(package) is not None:
        return True
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # A finder that blocks it, or None in sys.modules.
        return False


def _watch(name: str) -> str | None:
    """Patch the targets in module ``name`` now, or as soon as it is imported; a reason if there is no way to."""
    if (module := sys.modules.get(name)) is not None:
        _when_complete(module)
        return None
    try:
        from wrapt.importer import register_post_import_hook
    except ImportError:
        return compat.not_installed("wrapt")
    with _lock:
        if name in _state.hooked:
            return None
        _state.hooked.add(name)
    # If another thread has begun to import it meanwhile, the hook is called at once, with a module that is half built.
    _registering.now = True
    try:
        register_post_import_hook(_hook, name)
    finally:
        _registering.now = False
    return None


def _hook(module: Any) -> None:
    """wrapt calls this inside the user's import statement, when the module has been executed."""
    with _lock:
        _state.hooked.discard(module.__name__)
    if getattr(_registering, "now", False):
        _when_complete(module)
    else:
        _install_in_import(module)


def _when_complete(module: Any) -> None:
    """Patch ``module`` now, or when the import that is building it at this moment ends."""
    spec = getattr(module, "__spec__", None)
    if not getattr(spec, "_initializing", False):
        _install(module)
    elif type(spec) is ModuleSpec:
        spec.__class__ = _WatchedSpec
        if not spec._initializing:  # type: ignore[attr-defined]  # The other thread was faster.
            _install(module)


class _WatchedSpec(ModuleSpec):
    """The spec of a half-imported module.

    The import system marks the end of an import, good or bad, by ``spec._initializing = False``. Nothing else tells it
    for an import that had begun before a hook could be registered.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            module = sys.modules.get(self.name)
            if module is not None:
                _install_in_import(module)
            else:
                _watch(self.name)


def _install_in_import(module: Any) -> None:
    try:
        _warn_declined(_install(module))
    except Exception as error:  # An exception here would break the user's import.
        bootstrap.complain(error)


def _install(module: Any) -> dict[str, str]:
    """Patch the targets in ``module`` that are chosen; what is declined, by id."""
    problems: dict[str, str] = {}
    for patch in registry.PATCHES:
        if patch.module == module.__name__ and _chosen(patch) and (reason := _install_one(patch, module)) is not None:
            problems[patch.id] = reason
    _set_policy()
    with _lock:
        _state.declined.update(problems)
    return problems


def _chosen(patch: Patch) -> bool:
    return _state.active and _state.config is not None and patch.id not in _state.config.left_out


def _install_one(patch: Patch, module: Any) -> str | None:
    """Make one swap, or say why not."""
    class_name, _, attribute = patch.target.partition(".")
    owner = getattr(module, class_name, None)
    if any(record.in_place() for record in _records_of(patch) if record.owner is owner):
        return None
    try:
        if (reason := compat.unknown_target(patch, module)) is not None:
            return reason
        stock = vars(owner).get(attribute, MISSING)
        new = _build(patch, stock)
    except PatchUnavailableError as error:
        return str(error)
    except Exception as error:  # Whatever a replacement raises, the script goes on with the stock forward.
        return f"{type(error).__name__}: {error}"
    with _lock:
        if vars(owner).get(attribute, MISSING) is stock and _chosen(patch):
            _state.records = [r for r in _state.records if not (r.patch.id == patch.id and r.owner is owner)]
            new = put(cast("type", owner), attribute, new)
            _state.records.append(_Record(patch, cast("type", owner), attribute, stock, new))
    return None


def _build(patch: Patch, stock: Any) -> Any:
    module_name, _, builder = patch.replacement.partition(":")
    new = getattr(importlib.import_module(module_name), builder)(stock, tally(patch.id))
    expected = property if patch.kind == "checkpoint_property" else FunctionType
    if type(new) is not expected:
        raise TypeError(f"{patch.replacement} built a {type(new).__name__}, not a {expected.__name__}")
    if patch.kind == "forward":
        functools.update_wrapper(cast("FunctionType", new), stock)
        setattr(new, MARK, patch.id)
    return new


def put(owner: type, attribute: str, new: Any) -> Any:
    """Set ``owner.attribute``; returns what is there then.

    From 5.23 on transformers checkpoints a decoder layer in a wrapper that it puts round ``forward`` when the class is
    made. A forward that is set later needs it too, or checkpointing ends without a word.
    """
    setattr(owner, attribute, new)
    layer = getattr(sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", None)
    if attribute == "forward" and layer is not None and issubclass(owner, layer):
        wrap = vars(layer).get("__init_subclass__")
        if wrap is not None:
            wrap.__func__(owner)
    return vars(owner)[attribute]


def _restore(which: Callable[[_Record], bool]) -> list[str]:
    """Put back the originals of the records that ``which`` chooses; the targets that others have replaced since."""
    stuck = []
    for record in [record for record in _state.records if which(record)]:
        _state.records.remove(record)
        if not record.in_place():
            if vars(record.owner).get(record.attribute, MISSING) is not record.stock:
                stuck.append(record.patch.target)
        elif record.stock is MISSING:
            delattr(record.owner, record.attribute)
        else:
            setattr(record.owner, record.attribute, record.stock)
    return stuck


def _set_policy() -> None:
    """Tell the modules that make a recompute policy, if they are loaded, what the configuration says."""
    if _state.config is None:
        return
    for patch in registry.PATCHES:
        module = sys.modules.get(patch.replacement.partition(":")[0])
        if patch.kind == "checkpoint_property" and module is not None:
            module.set_policy(_state.config.recompute if _state.active else bootstrap.RECOMPUTE[0])


def _choice() -> str:
    """What a policy that chooses by itself has chosen, in words; empty for the others."""
    if _state.config is not None and _state.config.recompute in ("auto", "offload"):
        for patch in registry.PATCHES:
            module = sys.modules.get(patch.replacement.partition(":")[0])
            if patch.kind == "checkpoint_property" and module is not None:
                return str(module.describe())
    return ""


def _records_of(patch: Patch) -> list[_Record]:
    with _lock:
        return [record for record in _state.records if record.patch.id == patch.id]


def _state_of(patch: Patch) -> tuple[str, str]:
    """State and reason for the table, looked up now: somebody may have replaced the target since."""
    config = _state.config
    records = _records_of(patch)
    if bootstrap.mode() == "off" and not records:
        return "declined", "FAST_UNSLOTH=0"
    if config is None:
        return "pending", _pending_reason(patch) if bootstrap.armed() else "apply() has not been called"
    if patch.id in config.left_out:
        return "declined", config.left_out[patch.id]
    if not _state.active:
        return "reverted", ""
    if patch.id in _state.declined:
        return "declined", _state.declined[patch.id]
    if not records:
        return "pending", _pending_reason(patch)
    module = sys.modules.get(patch.module)
    if all(getattr(module, record.owner.__name__, None) is not record.owner for record in records):
        return "declined", f"conflict: {records[0].owner.__name__} was replaced or reloaded after apply()"
    if not records[-1].in_place():
        other = compat.foreign(vars(records[-1].owner).get(records[-1].attribute), patch.module)
        return "declined", f"conflict: {patch.target} was replaced after apply() by {other or 'the stock function'}"
    return "applied", compat.mapped_by_transformers(records[-1].owner.__name__) or ""


def _pending_reason(patch: Patch) -> str:
    package = patch.module.partition(".")[0]
    if package in compat.WINDOW and compat.installed(package) is None:
        return compat.not_installed(package)
    if is_absent(patch):
        return compat.not_installed(patch.optional)
    return f"{patch.module} is {'half imported' if patch.module in sys.modules else 'not imported yet'}"


def _warn_declined(problems: dict[str, str]) -> None:
    for reason, ids in _by_reason(problems).items():
        slug = "conflicts" if reason.startswith("conflict") else "declined"
        warn(slug, f"{', '.join(ids)}: runs stock, because {reason}")


def _warn_stuck(targets: list[str]) -> None:
    if targets:
        warn("conflicts", f"others have replaced {', '.join(targets)} since, which is left as it is")


def _by_reason(problems: dict[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for patch_id, reason in problems.items():
        reasons.setdefault(reason, []).append(patch_id)
    return reasons
