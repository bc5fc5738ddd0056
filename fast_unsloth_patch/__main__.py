"""``python -m fast_unsloth_patch run | doctor | demo``."""

from __future__ import annotations

import importlib
import os
import sys

from . import bootstrap

_USAGE = """\
usage: python -m fast_unsloth_patch run [-m] SCRIPT_OR_MODULE [ARGUMENT ...]
       python -m fast_unsloth_patch doctor [--json]
       python -m fast_unsloth_patch demo [...]

run     the script, unchanged, as FAST_UNSLOTH=1 python SCRIPT would, also where start-up files are not read
doctor  check this machine: versions, every op against its reference, other patchers
demo    train a small Llama with LoRA twice, stock and fast, and compare"""


def main(argv: list[str]) -> int:
    """Run one command; the exit status."""
    if argv and argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if argv and argv[0] == "run":
        return run(argv[1:])
    if argv and argv[0] in ("doctor", "demo"):
        return int(importlib.import_module(f"{__package__}.{argv[0]}").main(argv[1:]) or 0)
    print(_USAGE, file=sys.stderr)
    return 2


def run(argv: list[str]) -> int:
    """Run a script or, after ``-m``, a module as ``__main__`` with the patches on, also in its child processes.

    ``FAST_UNSLOTH=0`` and ``FAST_UNSLOTH=strict`` keep their meaning.
    """
    as_module = bool(argv) and argv[0] == "-m"
    argv = argv[1:] if as_module else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, file=sys.stderr if not argv else sys.stdout)
        return 0 if argv else 2
    target = argv[0]
    if not as_module and not os.path.exists(target):
        print(f"fast_unsloth_patch run: there is no file {target!r} (a module needs -m)", file=sys.stderr)
        return 2
    if not os.environ.get(bootstrap.VARIABLE, "").strip():
        os.environ[bootstrap.VARIABLE] = "1"
    bootstrap.activate()

    import runpy

    sys.argv[:] = argv
    if as_module:
        # `python -m` has put the working directory on the path already, which is what `python -m MODULE` would do.
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return 0
    if not getattr(sys.flags, "safe_path", False) and os.path.isfile(target):
        sys.path[0] = os.path.dirname(os.path.realpath(target))
    runpy.run_path(target, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
