"""The search for the longest row: which lengths it tries, what a try leaves behind, and the command on a CPU."""

from __future__ import annotations

import importlib
import json
import sys
import types
import weakref
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# not left on the path: see test_benchmarks.py
sys.path.insert(0, str(BENCHMARKS))
try:
    max_context, records, report, setups, shapes, training, workers = map(
        importlib.import_module, ("max_context", "records", "report", "setups", "shapes", "training", "workers")
    )
finally:
    sys.path.remove(str(BENCHMARKS))

GIB = 2**30
TINY = {"model": "tiny", "mode": "lora", "device": "cpu", "dtype": "fp32", "batch": 1, "seq": 16, "checkpointing": True}


def _search(peak_gib, *, hint=8192, limit=131072, cap=24.0, start=None, fragments=1.0):
    """The lengths tried when a row of n tokens reaches `peak_gib(n)`, and what was found."""
    search = max_context.Search(common=2048, hint=hint, limit=limit, cap_gib=cap, start=start)
    tried = []
    while (length := search.next()) is not None:
        assert length % 1024 == 0 and length not in tried and len(tried) < 20
        tried.append(length)
        if peak_gib(length) * fragments <= cap:
            search.fits(length, peak_gib(length))
        else:
            search.does_not_fit(length)
    return tried, search.longest, search.failed


@pytest.mark.parametrize(
    ("truth", "hint"), [(10240, 10240), (40960, 36864), (65536, 65536), (98304, 32768), (27000, 98304)]
)
@pytest.mark.parametrize("fragments", [1.0, 1.05])
def test_a_straight_line_is_found_in_few_tries(truth, hint, fragments):
    tried, longest, failed = _search(lambda n: 7 + 17 / fragments * n / truth, hint=hint, fragments=fragments)
    assert longest <= truth < failed or fragments > 1
    assert failed - longest <= max(1024, longest / 8)
    # one for all, one short one, one near the limit, one beyond it
    assert len(tried) <= 5 and tried[0] == 2048 and tried[1] <= max(4096, hint / 8)
    assert sum(n > truth for n in tried) <= 2


@pytest.mark.parametrize("truth", [5000, 23456, 70000, 131072])
def test_memory_that_is_no_straight_line_still_ends(truth):
    """Flat where rows are short (an offload that only begins later), or steeper than it looked."""
    for peak in (
        lambda n: 8.0 if n <= 4096 and n <= truth else 24 * n / truth,
        lambda n: 6 + 18 * (n / truth) ** 2,
        lambda n: 8.0 if n <= truth else 30.0,
    ):
        tried, longest, failed = _search(peak)
        assert longest <= truth and (failed is None) == (longest == 131072)
        assert failed is None or (failed > truth and failed - longest <= max(1024, longest / 8))
        assert len(tried) <= 16


def test_limit_start_and_nothing_that_fits():
    tried, longest, failed = _search(lambda n: 5.0 + n * 1e-6)
    assert (longest, failed) == (131072, None) and len(tried) == 3
    tried, longest, failed = _search(lambda n: 7 + 17 * n / 98304, start=90112)
    assert tried[:3] == [2048, 4096, 90112] and longest >= 90112 and failed is not None
    assert _search(lambda n: 30.0) == ([2048], None, 2048)


class Held(list):
    """Something that a weak reference can follow."""


def test_a_try_that_does_not_fit_leaves_nothing_behind():
    """A frame of the failed forward holds a tensor, and so does a cycle, as autograd's graph makes them."""
    import torch

    case = shapes.Case(**TINY)
    trainer = training.build(case, shapes.Arm("stock"), training.Phases())
    ids = torch.tensor(shapes.text_tokens(512, 128))
    fits = max_context.attempt(trainer, ids, 16)
    assert fits["fits"] and len(fits["losses"]) == len(fits["grad_norms"]) == len(fits["step_s"]) == 2
    followed = []

    def no_room(module, args, output):
        held = Held([output])
        held.append(held)
        followed.append(weakref.ref(held))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    hook = trainer.model.get_base_model().model.layers[1].mlp.register_full_backward_hook(no_room)
    found = max_context.attempt(trainer, ids, 32)
    hook.remove()
    assert (found["fits"], found["reason"]) == (False, "CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert found["losses"] == [] and len(followed) == 1 and followed[0]() is None
    assert all(p.grad is None for p in trainer.parameters)
    # and it goes on
    assert max_context.attempt(trainer, ids, 32)["fits"]


def test_errors_that_are_not_about_memory_are_raised():
    import torch

    assert max_context.out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert max_context.out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not max_context.out_of_memory(RuntimeError("shapes do not match"))
    trainer = types.SimpleNamespace(case=shapes.Case(**TINY), losses=[], grad_norms=[], timed=lambda inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        max_context.attempt(trainer, torch.zeros(64), 16)


def test_the_rest_of_the_device_is_out_of_reach(monkeypatch):
    import torch

    free, total = 138 * GIB, 140 * GIB
    calls = []

    class Driver:
        status = 0

        def cuMemAlloc_v2(self, pointer, size):
            calls.append(size.value)
            return self.status

    driver = Driver()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, total))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", calls.append)
    monkeypatch.setattr(max_context.ctypes, "CDLL", lambda name: driver)
    max_context.cap_memory(24)
    assert calls == [24 / 140, (138 - 24 - 2) * GIB]
    calls.clear()
    free = 25 * GIB
    max_context.cap_memory(24)
    assert calls == [24 / 140]
    free, driver.status = 138 * GIB, 2
    with pytest.raises(RuntimeError, match="the driver returned 2"):
        max_context.cap_memory(24)


def test_time_that_is_left_decides_what_is_still_tried(monkeypatch):
    """The third try would take 2 x 8 ** 1.5 seconds of 30."""
    plan = max_context.Search(common=16, hint=256, limit=256, cap_gib=24.0, unit=16)
    trainer = types.SimpleNamespace(case=shapes.Case(**TINY))

    def attempt(trainer, ids, length):
        return {"length": length, "fits": True, "step_s": [9.0, 1.0], "losses": [1.0], "grad_norms": [1.0]}

    monkeypatch.setattr(max_context, "attempt", attempt)
    told = []
    tries = max_context.search(trainer, plan, budget=30, tell=lambda tries: told.append(len(tries)))
    assert [t["length"] for t in tries] == [16, 32] and told == [1, 2]
    found = max_context._result(tries, plan, 16)
    assert (found["longest"], found["failed_at"], found["complete"]) == (32, None, False)
    assert found["tokens_per_s"] == 32.0


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    from conftest import run_python

    folder = tmp_path_factory.mktemp("context")
    flags = ["--model", "tiny", "--mode", "lora", "--dtype", "fp32", "--device", "cpu", "--unit", "8", "--common", "16"]
    flags += ["--limit", "64", "--json", folder / "out.json", "--run", "r", "--alloc-conf", "", "--ahead", "2"]
    arguments = [BENCHMARKS / "max_context.py", *flags, "--impl", "stock,fast offload,unsloth,fast"]
    done = run_python(None, args=arguments, timeout=300)
    return done, json.loads((folder / "out.json").read_text())


def test_every_arm_searches_in_its_own_process(outcome):
    done, results = outcome
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["label"]: row for row in results["contexts"]}
    assert [(label, row["status"]) for label, row in rows.items()] == [
        ("stock", "ok"), ("fast offload", "ok"), ("unsloth", "absent"), ("fast", "ok")
    ]  # fmt: skip
    for label in ("stock", "fast", "fast offload"):
        row = rows[label]
        assert (row["longest"], row["failed_at"], row["complete"], row["cap_gib"]) == (64, None, True, 24.0)
        assert [t["length"] for t in row["tries"]] == [16, 64] and row["case"]["seq"] == 16
        assert row["tokens_per_s"] == pytest.approx(64 / row["tries"][-1]["step_s"][-1])
        assert label == "stock" or (row["parity"]["ok"] and row["parity"]["loss_max"] < 1e-5)
    assert rows["fast offload"]["fast"]["recompute"] == "offload" and rows["fast"]["fast"]["recompute"] == "full"
    assert "64 fits (" in done.stdout and "Tiny LoRA, one row, checkpointing, fp32, under 24 GiB" in done.stdout


def test_table_of_searches(outcome):
    _, results = outcome
    document = {"rows": [], "floors": [], **results}
    table = report.render("context", [document])
    title = "Tiny LoRA, one row, checkpointing, fp32, under 24 GiB"
    assert f"| {title} | stock | 64 | - |" in table and f"| {title} | Unsloth | absent | - | - | - |" in table
    assert "CPU, " in table and "commit" in table
    # a newer search of the same arm takes the older one's place
    stock = results["contexts"][0]
    newer = stock | {"longest": 10240, "failed_at": 11264, "allocated_gib": 22.51, "tokens_per_s": 1234.4}
    table = report.render("context", [{**document, "contexts": [*results["contexts"], newer]}])
    assert f"| {title} | stock | 10,240 | 11,264 | 1234 | 22.5 GiB |" in table and "| stock | 64 |" not in table
    assert report.render("context", [{"rows": [], "floors": []}]) == "No results recorded yet."


def test_what_makes_a_search_fail():
    row = {"impl": "fast", "status": "ok", "tries": [{"losses": [1.0, 2.0]}], "parity": {"ok": True}}
    assert max_context._problem(row) is None
    assert max_context._problem(row | {"parity": {"ok": False}}) == "losses or gradient norms disagree with stock's"
    assert max_context._problem(row | {"tries": [{"losses": [float("nan")]}]}) == "a loss is not finite"
    assert max_context._problem(row | {"status": "oom", "reason": "x"}) == "oom: x"
    assert max_context._problem(row | {"impl": "liger", "status": "failed", "reason": "x"}) is None


def test_plan_has_the_arms_of_the_comparison():
    plan = max_context.read_plan(max_context.PLAN, "expandable_segments:True")
    arms = {label: arm for label, (arm, _) in plan.items()}
    assert {arm.impl for arm in arms.values()} == set(setups.SETUPS)
    assert arms["fast offload"].recompute == "offload" and arms["unsloth offload"].unsloth_gc == "unsloth"
    assert all(arm.env == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} for arm in arms.values())
    assert all(hint % 1024 == 0 for _, hint in plan.values())
    with pytest.raises(SystemExit):
        max_context.main(["--impl", "slow"])


def test_a_worker_that_is_killed_leaves_what_it_knew(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        f"""
import json, pathlib, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
import workers
print("> import 0.0 s", flush=True)
workers.await_go()
spec = json.loads(pathlib.Path(sys.argv[2]).read_text())
workers.write_result(pathlib.Path(sys.argv[3]), {{"status": "ok", "longest": spec["hint"]}})
time.sleep(60)
"""
    )
    jobs = [(shapes.Case(), shapes.Arm("stock"))]
    found = workers.run(jobs, ahead=0, timeout=3, budget=1e9, script=script, more=lambda arm: {"hint": 4096})
    (result,) = found
    assert (result["status"], result["longest"]) == ("ok", 4096)
