"""`python -m fast_unsloth_patch demo`: the same training script, stock and fast, side by side.

`_demo_script.py` trains a small Llama with LoRA on real text and knows nothing of this library. It runs twice, each
time in its own process: as it is, and by `python -m fast_unsloth_patch run`. Then a table of both: loss, speed, memory,
and what took the fast path. With `--mode qlora` the model's weights are NF4, by bitsandbytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

_SCRIPT = Path(__file__).with_name("_demo_script.py")
_NEEDED = ("torch", "transformers", "peft", "accelerate", "wrapt")
# and of a mode
_MODES: dict[str, tuple[str, ...]] = {"lora": (), "qlora": ("bitsandbytes",)}

# Largest relative difference of any step's loss. Rounding differs, and AdamW amplifies it over the steps: in fp32 to
# about 1e-5, in bf16 to what two kernels of the same formula differ by. The loss itself falls by a fifth or more.
_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}


class _ChildError(Exception):
    """A training process ended without a result; the text is what the user should see."""


class _Progress:
    """One line that moves on a terminal; a few lines where there is none."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.moving = stream.isatty()

    def step(self, name: str, step: int, steps: int, loss: float) -> None:
        text = f"{name:5s}  step {step}/{steps}  loss {loss:.4f}"
        if self.moving:
            end = "\n" if step == steps else ""
            print(f"\r{text}", end=end, file=self.stream, flush=True)
        elif step == 1 or step == steps or step % max(steps // 6, 1) == 0:
            print(text, file=self.stream, flush=True)

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


def _train(name: str, command: list[str], env: dict[str, str], progress: _Progress) -> dict[str, Any]:
    """Runs one training process: device, number of parameters, losses, tokens/s and peak memory.

    Raises:
        _ChildError: the process failed.
    """
    result: dict[str, Any] = {"losses": []}
    progress.say(f"{name}: starting")
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if not line.startswith("{"):
                    continue
                record = json.loads(line)
                if "loss" in record:
                    result["losses"].append(record["loss"])
                    progress.step(name, record["step"], result["steps"], record["loss"])
                else:
                    result |= record
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        said = errors.read()
    if code or "tokens_per_s" not in result or len(result["losses"]) != result["steps"]:
        raise _ChildError(f"the {name} run ended with status {code}; the end of what it said:\n{said[-2000:]}")
    return result


def _compare(stock: dict[str, Any], fast: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Both runs, the largest loss difference, and the problem if there is one."""
    differences = [abs(a - b) / abs(b) for a, b in zip(fast["losses"], stock["losses"])]
    # max() would lose a NaN
    largest = float("inf") if any(d != d for d in differences) else max(differences)
    tolerance = _TOLERANCE[stock["device"]]
    problem = None
    if not any(row["forward"] for row in rows):
        problem = f"nothing was patched. {_why_nothing(rows)}"
    elif largest > tolerance:
        problem = f"the losses disagree: by {largest:.1e} at most, where {tolerance:.0e} is allowed"
    return {
        "stock": stock,
        "fast": fast,
        "status": rows,
        "largest_loss_difference": largest,
        "tolerance": tolerance,
        "problem": problem,
    }


def _why_nothing(rows: list[dict[str, Any]]) -> str:
    if not rows:
        setting = os.environ.get("FAST_UNSLOTH", "")
        return f"The patches were never started (FAST_UNSLOTH={setting!r})."
    reasons = []
    for row in rows:
        stock_calls = ", ".join(f"{reason} {count}x" for reason, count in row["fallbacks"].items())
        reasons.append(f"{row['id']}: {stock_calls or row['reason'] or row['state']}")
    return "Reasons: " + "; ".join(reasons)


def _table(result: dict[str, Any]) -> str:
    stock, fast = result["stock"], result["fast"]
    steps, on_gpu = stock["steps"], stock["device"] == "cuda"
    lines = [f"{'':26s}{'stock':>12s}{'fast':>12s}"]
    for step in sorted({1, *(max(steps * i // 4, 1) for i in (1, 2, 3, 4))}):
        a, b = stock["losses"][step - 1], fast["losses"][step - 1]
        lines.append(f"{f'loss, step {step}':26s}{a:12.4f}{b:12.4f}")
    gain = fast["tokens_per_s"] / stock["tokens_per_s"]
    lines.append(f"{'tokens/s':26s}{stock['tokens_per_s']:12.0f}{fast['tokens_per_s']:12.0f}   {gain:.2f}x")
    mib = [run["peak_bytes"] / 2**20 for run in (stock, fast)]
    memory = "peak memory, MiB allocated" if on_gpu else "peak memory, MiB resident"
    lines.append(f"{memory:26s}{mib[0]:12.0f}{mib[1]:12.0f}   {mib[1] / mib[0]:.2f}x")
    lines.append(
        f"largest loss difference: {result['largest_loss_difference']:.1e} (allowed {result['tolerance']:.0e})"
    )
    lines.append("what took the fast path, forward / backward / recomputed; calls that ran stock:")
    for row in result["status"]:
        calls = ", ".join(f"{reason}: {count}" for reason, count in row["fallbacks"].items())
        if row["state"] != "applied":
            calls = f"{row['state']}: {row['reason']}"
        counts = f"{row['forward']} / {row['backward']} / {row['recomputed']}"
        lines.append(f"  {row['id']:24s}{counts:24s}{calls}".rstrip())
    if not on_gpu:
        lines.append("On a CPU the fast path runs in plain PyTorch: this shows that the numbers stay, not the speed.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the demo. Exit status: 0 good; 1 the losses disagree or nothing was patched; 2 it could not run."""
    parser = argparse.ArgumentParser(prog="python -m fast_unsloth_patch demo", description=__doc__)
    parser.add_argument("--steps", type=int, help="training steps of each run (default: 100)")
    parser.add_argument("--mode", choices=list(_MODES), default="lora", help="qlora: on weights of four bits")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", action="store_true", help="the result as JSON; progress goes to stderr")
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 1:
        parser.error("--steps must be at least 1")
    needed = _NEEDED + _MODES[options.mode]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        print(f"the demo needs {', '.join(missing)}, not installed here: pip install {names}", file=sys.stderr)
        return 2

    progress = _Progress(sys.stderr if options.json else sys.stdout)
    arguments = [str(_SCRIPT), "--device", options.device, "--mode", options.mode]
    if options.steps:
        arguments += ["--steps", str(options.steps)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        try:
            stock = _train("stock", [sys.executable, *arguments], env | {"FAST_UNSLOTH": "0"}, progress)
            fast_command = [sys.executable, "-m", __package__, "run", *arguments]
            fast = _train("fast", fast_command, env | {"FAST_UNSLOTH_REPORT": str(report)}, progress)
        except _ChildError as error:
            print(f"demo: {error}", file=sys.stderr)
            return 2
        rows = json.loads(report.read_text())["rows"] if report.exists() else []
    result = _compare(stock, fast, rows)
    print(json.dumps(result, indent=1) if options.json else "\n" + _table(result))
    if result["problem"]:
        print(f"demo: {result['problem']}", file=sys.stderr)
        return 1
    return 0
