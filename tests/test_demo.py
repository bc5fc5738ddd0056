"""`python -m fast_unsloth_patch demo`: both runs, their comparison, and what it says when something is wrong."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import sys

import pytest

from fast_unsloth_patch import demo


def _row(forward=0, **fields):
    row = {"id": "llama.mlp", "state": "applied", "reason": "", "forward": forward, "backward": forward}
    return row | {"recomputed": 0, "compiled": 0, "fallbacks": {}} | fields


def _run(losses, device="cpu"):
    return {"losses": losses, "steps": len(losses), "device": device, "tokens_per_s": 10.0, "peak_bytes": 2**20}


def test_stock_and_fast_agree_and_fast_was_patched(run_python):
    done = run_python(None, args=["-m", "fast_unsloth_patch", "demo", "--steps", "8", "--device", "cpu", "--json"])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    stock, fast = result["stock"], result["fast"]
    assert stock["steps"] == len(stock["losses"]) == len(fast["losses"]) == 8
    assert stock["losses"] == pytest.approx(fast["losses"], rel=1e-5)
    assert stock["losses"][0] - stock["losses"][7] > 0.5  # the loss moves by far more than it may differ
    assert fast["tokens_per_s"] > 0 and fast["peak_bytes"] > 100 * 2**20
    rows = {row["id"]: row for row in result["status"]}
    # four layers, two norms each and the last one; eight steps
    assert rows["llama.rms_norm"]["forward"] == 72
    assert "stock  step 8/8" in done.stderr and "fast   step 8/8" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_qlora_trains_on_packed_weights(run_python):
    arguments = ["--mode", "qlora", "--steps", "4", "--device", "cpu", "--json"]
    done = run_python(None, args=["-m", "fast_unsloth_patch", "demo", *arguments])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    stock, fast = result["stock"], result["fast"]
    # two weights a byte: 3.4 million, had they not been quantised
    assert stock["parameters"] == fast["parameters"] < 2.5e6
    assert stock["losses"] == pytest.approx(fast["losses"], rel=1e-5)
    assert stock["losses"][0] - stock["losses"][3] > 0.2
    rows = {row["id"]: row for row in result["status"]}
    for name in ("llama.attention", "llama.mlp"):
        assert (rows[name]["forward"], rows[name]["backward"], rows[name]["fallbacks"]) == (16, 16, {})


def test_qlora_without_bitsandbytes_says_what_to_install(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    assert demo.main(["--mode", "qlora"]) == 2
    said = capsys.readouterr().err
    assert said == "the demo needs bitsandbytes, not installed here: pip install bitsandbytes\n"


def test_the_script_imports_nothing_of_ours():
    tree = ast.parse(demo._SCRIPT.read_text())
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "transformers" in imported
    assert not [name for name in imported if name.startswith(("fast_unsloth_patch", "."))]


def test_problem_when_losses_disagree():
    stock = _run([5.0, 4.0])
    assert demo._compare(stock, _run([5.0, 4.0001]), [_row(8)])["problem"] is None
    assert "disagree" in demo._compare(stock, _run([5.0, 4.01]), [_row(8)])["problem"]
    assert "disagree" in demo._compare(stock, _run([5.0, float("nan")]), [_row(8)])["problem"]
    # bf16 kernels of one formula differ by more
    assert demo._compare(_run([5.0, 4.0], "cuda"), _run([5.0, 4.01], "cuda"), [_row(8)])["problem"] is None


def test_problem_when_nothing_was_patched(monkeypatch):
    stock = _run([5.0, 4.0])
    problem = demo._compare(stock, stock, [_row(fallbacks={"device": 8})])["problem"]
    assert "nothing was patched" in problem and "llama.mlp: device 8x" in problem
    monkeypatch.setenv("FAST_UNSLOTH", "0")
    assert "FAST_UNSLOTH='0'" in demo._compare(stock, stock, [])["problem"]


def test_exit_status_1_with_the_problem_on_stderr(monkeypatch, capsys):
    monkeypatch.setattr(demo, "_train", lambda name, *_: _run([5.0, 4.0]))
    assert demo.main(["--steps", "2"]) == 1
    said = capsys.readouterr()
    assert "nothing was patched" in said.err
    assert "tokens/s" in said.out and "1.00x" in said.out


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(demo, "_NEEDED", ("torch", "transformers_is_not_here"))
    assert demo.main([]) == 2
    assert "pip install transformers_is_not_here" in capsys.readouterr().err


def test_a_run_that_fails_shows_what_it_said(monkeypatch, capsys, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; print('out of luck', file=sys.stderr); sys.exit(3)")
    monkeypatch.setattr(demo, "_SCRIPT", script)
    assert demo.main([]) == 2
    said = capsys.readouterr().err
    assert "the stock run ended with status 3" in said and "out of luck" in said


def test_a_run_that_stops_early_is_a_failure(tmp_path):
    lines = ['{"steps": 2, "device": "cpu"}', '{"step": 1, "loss": 5.0}', '{"tokens_per_s": 1.0}']
    code = f"print({os.linesep.join(lines)!r})"
    with pytest.raises(demo._ChildError, match="ended with status 0"):
        demo._train("stock", [sys.executable, "-c", code], dict(os.environ), demo._Progress(io.StringIO()))


def test_progress_moves_on_a_terminal_only():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, parts in ((Terminal(), ["\rstock", "\n"]), (io.StringIO(), ["stock  step 1/60"])):
        progress = demo._Progress(stream)
        for step in range(1, 61):
            progress.step("stock", step, 60, 4.0)
        text = stream.getvalue()
        assert all(part in text for part in parts)
        assert ("\r" in text) == stream.isatty()
        assert text.count("\n") == (1 if stream.isatty() else 7)
