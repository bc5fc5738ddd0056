"""The results files of the benchmarks: read, written, stamped with what they were measured on, compared with stock.

A results file is `{"rows": [...], "floors": [...], "kernels": [...], "contexts": [...]}`: a row an arm
(`train_step.py`), a floor a case (`floor.py`), an op and size (`kernels.py`), an arm of a search (`max_context.py`).
Importing this file loads no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import experts
from shapes import SHAPES, Case

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = (
    "torch", "triton", "transformers", "peft", "accelerate", "wrapt", "bitsandbytes", "gptqmodel", "liger-kernel",
    "unsloth", "unsloth_zoo",
)  # fmt: skip
# Largest relative difference from stock: of the loss of any step, of the gradient norm of the first step, and of any
# step. fp32 starts at the contract's 1e-5 and has room for what AdamW amplifies later: where a gradient is rounding
# noise, the update is its sign. bf16: between stock and implementations that round in other places (Liger, Unsloth and
# ours; Llama-8B LoRA 4x2048, 11 steps, H200) the loss was up to 1.5e-4 to 3.4e-4 apart and the gradient norm 3.3e-3 to
# 4.5e-3. Allowed is three times that spread for the loss, about twice for the norm; the loss itself moves by tens of
# per cent. fp16 rounds finer. With dropout each arm draws other masks.
TOLERANCE = {"fp32": (1e-4, 1e-5, 1e-2), "bf16": (1e-3, 1e-2, 1e-2), "fp16": (1e-3, 1e-2, 1e-2)}
DROPOUT_TOLERANCE = (1e-2, 5e-2, 2e-1)
# Of a mixture of experts that routes text, where a close decision taken otherwise sends a token elsewhere, and decides
# others. In 16 bits, Mixtral, 4 layers, 11 steps, H200: stock with its experts one by one or grouped 7e-4 (loss) and
# 1.3e-2 (norm) apart, Unsloth and stock 1.3e-3 and 2.3e-2, this library and stock 1.8e-3 and 1.7e-2, though nearer than
# stock to the same model in fp32 (h200-notes.md). With random routing no decision is close, and `TOLERANCE` holds.
ROUTED_TOLERANCE = {"fp32": TOLERANCE["fp32"], "bf16": (3e-3, 1e-2, 4e-2), "fp16": (3e-3, 1e-2, 4e-2)}
# Of a mixture of experts: the share of a layer's pairs (token, expert) that go elsewhere than in stock, net. Gates have
# close decisions, which any other rounding takes otherwise; what goes both ways cancels.
LOAD_TOLERANCE = {"fp32": 2e-3, "bf16": 2e-2, "fp16": 2e-2}

Row = dict[str, Any]


def load_results(path: Path) -> dict[str, list[Row]]:
    """The results file, empty if there is none yet. What other benchmarks keep in it is carried along."""
    return {"rows": [], "floors": []} | (json.loads(path.read_text()) if path.exists() else {})


def save_results(path: Path, results: dict[str, list[Row]]) -> None:
    """Writes the file in one step, so that a run that is killed loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def environment(device: str) -> dict[str, Any]:
    """The device's name and the versions of all that takes part; imports torch."""
    import torch

    versions = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if device != "cuda":
        return {"device": "CPU", "versions": versions}
    versions["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {"device": torch.cuda.get_device_name(), "versions": versions}


def commit() -> str | None:
    """The checkout's commit, None where there is no git (on a machine that was sent the files alone)."""
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")


def source_digest() -> str:
    """Names the measured code also where there is no git."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "fast_unsloth_patch").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def case_of(row: Row) -> Case:
    return Case(**row["case"])


def largest_difference(ours: list[float], stock: list[float]) -> float:
    """The largest relative difference of two series.

    A NaN in one of them never passes for agreement; an infinity in both does (a step that GradScaler skips).
    """
    differences = [0.0 if a == b else abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, stock)]
    return float("inf") if any(d != d for d in differences) else max(differences)


def parity(row: Row, stock: Row) -> Row:
    """How far a row's losses and gradient norms are from stock's, and whether that is within the tolerance."""
    case, other = case_of(row), case_of(stock)
    close = SHAPES[case.model].experts and case.routing == "text"
    loss, first, later = DROPOUT_TOLERANCE if case.dropout else (ROUTED_TOLERANCE if close else TOLERANCE)[case.dtype]
    same = _same_losses(case) == _same_losses(other)
    against = [stock["run"], *([] if same else [other.title()]), *([stock["impl"]] if stock["impl"] != "stock" else [])]
    found: Row = {
        "loss_max": largest_difference(row["losses"], stock["losses"]),
        "grad_norm_first": largest_difference(row["grad_norms"][:1], stock["grad_norms"][:1]),
        "grad_norm_max": largest_difference(row["grad_norms"], stock["grad_norms"]),
        "against": ", ".join(against),
    }
    agrees = found["loss_max"] <= loss and found["grad_norm_first"] <= first and found["grad_norm_max"] <= later
    if row.get("expert_load") and stock.get("expert_load"):
        found["load_moved"] = experts.moved(row["expert_load"], stock["expert_load"])
        agrees = agrees and (bool(case.dropout) or found["load_moved"] <= LOAD_TOLERANCE[case.dtype])
    return found | {"ok": agrees}


def _same_losses(case: Case) -> Case:
    """What `case` shares with those whose losses are the same, as far as both go on."""
    return dataclasses.replace(case, steps=Case.steps, warmup=Case.warmup)


def baseline(rows: list[Row], case: Case, run: str) -> Row | None:
    """The stock row that losses of `case` are held against: of this run, wherever in its order; else the newest.

    How many steps it went does not matter. Where stock never finished the case (out of memory), its row with
    checkpointing the other way round serves: a recompute changes no loss. Nobody but this library has experts of four
    bits: there it is the case with the same values in 16 bits, by stock, else by this library. Speeds are never
    compared with what this returns.
    """
    other = dataclasses.replace(case, checkpointing=not case.checkpointing)
    wanted = [(case, "stock"), (other, "stock")]
    if case.mode == "qlora" and SHAPES[case.model].experts:
        dense = dataclasses.replace(case, mode="lora", rounded=True)
        wanted += [(dense, "stock"), (dense, "fast")]
    for like, impl in wanted:
        same = [r for r in rows if r["impl"] == r.get("label", r["impl"]) == impl and r["status"] == "ok"]
        same = [r for r in same if _same_losses(case_of(r)) == _same_losses(like)]
        if same:
            return ([r for r in same if r["run"] == run] or same)[-1]
    return None


def add_parity(rows: list[Row], known: list[Row]) -> None:
    """Compares `rows` with what `baseline` finds among `known`; again when more is known.

    Rows of the form "full" (`batches.Batches`) have seen other tokens than stock, and are compared with nothing.
    """
    for row in rows:
        if row["status"] == "ok" and row["impl"] != "stock" and row["arm"].get("feed") != "full":
            stock = baseline(known, case_of(row), row["run"])
            if stock:
                row["parity"] = parity(row, stock)
