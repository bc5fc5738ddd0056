"""Shared by all tests: seeds, the ``gpu`` marker, poisoned allocations, Python in a subprocess."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_python(code, env=None, timeout=120, args=(), cwd=None):
    """Run ``code`` in a fresh interpreter that imports this checkout; no ``FAST_UNSLOTH*`` variable is inherited.

    Args:
        code: source text, run with ``python -c``; None to run ``args`` alone.
        env: variables to set on top; None as a value removes one.
        timeout: seconds.
        args: further command-line arguments.
    Returns:
        ``subprocess.CompletedProcess`` with text ``stdout`` and ``stderr``; the caller looks at ``returncode``.
    """
    full = {k: v for k, v in os.environ.items() if not k.startswith("FAST_UNSLOTH") and k != "TRITON_INTERPRET"}
    full["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [full.get("PYTHONPATH")])])
    full.setdefault("OMP_NUM_THREADS", "1")
    full["HF_HUB_OFFLINE"] = "1"
    for key, value in (env or {}).items():
        if value is None:
            full.pop(key, None)
        else:
            full[key] = str(value)
    command = [sys.executable, *([] if code is None else ["-c", code]), *map(str, args)]
    return subprocess.run(command, env=full, cwd=cwd, timeout=timeout, capture_output=True, text=True)


@pytest.fixture(name="run_python")
def _run_python_fixture():
    return run_python


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config, items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _cuda_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    """The same random numbers in every test, whatever ran before it. Does not import torch where a test does not."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _counters_at_zero():
    """Every test counts from zero, whatever ran before it in this process: its counters live as long as that does."""
    if status := sys.modules.get("fast_unsloth_patch.status"):
        for tally in status._TALLIES.values():
            for name in status._COUNTERS:
                setattr(tally, name, 0)
            tally.fallbacks.clear()


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Uninitialised tensors hold NaN (integers their largest value), so that reading what nobody wrote is seen."""
    import torch

    def poison(allocate):
        def poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            with torch.no_grad():
                if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                    tensor.fill_(float("nan"))
                elif tensor.dtype is torch.bool:
                    tensor.fill_(True)
                else:
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    """Runs the test's file, which as a script is two ranks (gloo, CPU): what each wrote, by case; the end of stderr."""
    folder = tmp_path_factory.mktemp("ranks")
    script = request.module.__file__
    done = run_python(None, {"CUDA_VISIBLE_DEVICES": "", "FAST_UNSLOTH_LOG": "0"}, 300, [script, folder])
    files = [folder / f"rank{rank}" for rank in range(2)]
    written = [dict(map(json.loads, file.read_text().splitlines())) if file.exists() else {} for file in files]
    return written, done.stderr[-3000:]
