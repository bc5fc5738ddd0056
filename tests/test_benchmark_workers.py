"""The processes of the benchmarks: what overlaps, what does not, and that none is left. Without torch."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# not left on the path: see test_benchmarks.py
sys.path.insert(0, str(BENCHMARKS))
try:
    shapes, workers = map(importlib.import_module, ("shapes", "workers"))
finally:
    sys.path.remove(str(BENCHMARKS))

# A worker that does nothing but keep the protocol. What it does after "go" is its FAKE, and ends when the log has the
# words that follow; the log is what really happened, in order.
FAKE_WORKER = """
import json, os, pathlib, subprocess, sys, time
sys.path.insert(0, {benchmarks!r})
import workers
log, label = pathlib.Path({log!r}), json.loads(pathlib.Path(sys.argv[2]).read_text())["arm"]["label"]
def event(name, pid):
    with log.open("a") as file:
        file.write(f"{{label}} {{name}} {{pid}}\\n")
event("start", os.getpid())
what, _, until = os.environ.get("FAKE", "").partition(" ")
if what == "crash":
    sys.exit("no such library")
print("> import 0.0 s", flush=True)
event("imported", os.getpid())
workers.await_go()
event("measure", os.getpid())
print("> data 0.0 s", flush=True)
if what == "hang":
    event("child", subprocess.Popen(["sleep", "60"]).pid)
    time.sleep(60)
end = time.monotonic() + (30 if until else 0)
while until not in log.read_text() and time.monotonic() < end:
    time.sleep(0.01)
event("done", os.getpid())
workers.write_result(pathlib.Path(sys.argv[3]), {{"status": "ok"}})
os._exit(0)
"""


class Fakes:
    """Jobs whose workers are `FAKE_WORKER`, and what became of them."""

    def __init__(self, folder):
        self.log, self.script = folder / "log", folder / "worker.py"
        self.log.touch()
        self.script.write_text(FAKE_WORKER.format(benchmarks=str(BENCHMARKS), log=str(self.log)))

    def run(self, *what, ahead=1, timeout=60.0, budget=1e9):
        """Fakes a, b, c, ..., each of which does that after "go"."""
        arms = [shapes.Arm("stock", label, env={"FAKE": w}) for label, w in zip("abcdef", what)]
        jobs = [(shapes.Case(), arm) for arm in arms]
        return contextlib.closing(workers.run(jobs, ahead=ahead, timeout=timeout, budget=budget))

    def events(self):
        return [line.rpartition(" ")[0] for line in self.log.read_text().splitlines()]

    def alive(self):
        """The processes that started and have not ended; the wait is for those that are being ended by a signal."""
        started = {line.split()[2] for line in self.log.read_text().splitlines()}
        end = time.monotonic() + 10
        while (left := [pid for pid in started if _running(pid)]) and time.monotonic() < end:
            time.sleep(0.02)
        return left


def _running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    found = Fakes(tmp_path)
    monkeypatch.setattr(workers, "SCRIPT", found.script)
    return found


def test_only_imports_overlap(fakes):
    # a and b only end when the next one has imported: they would time out without the overlap
    with fakes.run("until b imported", "until c imported", "", timeout=25) as results:
        assert [r["status"] for r in results] == ["ok"] * 3
    events = fakes.events()
    order = [events.index(e) for e in ("a measure", "a done", "b measure", "b done", "c measure", "c done")]
    assert order == sorted(order)
    assert events.index("b imported") < events.index("a done") < events.index("c start") < events.index("b done")
    assert not fakes.alive()


def test_environment_of_a_worker(monkeypatch, tmp_path):
    monkeypatch.setenv("FAST_UNSLOTH", "1")
    monkeypatch.setenv("KEPT", "1")
    arm = shapes.Arm("stock", env={"GPTQMODEL_DISABLE_PACK_EXT": "0", "MORE": "1"})
    env = workers._environment(arm, tmp_path)
    assert "FAST_UNSLOTH" not in env and env["KEPT"] == env["MORE"] == env["HF_HUB_OFFLINE"] == "1"
    # what the arm says counts
    assert env["GPTQMODEL_DISABLE_PACK_EXT"] == "0"
    assert workers._environment(shapes.Arm("stock"), tmp_path)["GPTQMODEL_DISABLE_PACK_EXT"] == "1"


def test_without_overlap_each_starts_when_the_last_has_ended(fakes):
    with fakes.run("", "", ahead=0) as results:
        assert [(r["status"], r["import_beside_s"]) for r in results] == [("ok", 0.0)] * 2
    assert fakes.events() == [f"{label} {e}" for label in "ab" for e in ("start", "imported", "measure", "done")]


def test_crash_of_a_waiting_worker_is_its_own_result(fakes):
    with fakes.run("until b start", "crash", "") as results:
        first, second, third = results
    assert (first["status"], second["status"], third["status"]) == ("ok", "failed", "ok")
    assert second["reason"] == "the process ended with status 1" and "no such library" in second["log_tail"]
    assert not fakes.alive()


def test_worker_that_hangs_is_killed_with_its_children(fakes):
    with fakes.run("hang", "", timeout=3) as results:
        first, second = results
    assert (first["status"], first["reason"]) == ("failed", "no result after 3 s")
    assert second["status"] == "ok" and second["clock"]["start"] < first["clock"]["end"] <= second["clock"]["go"]
    events = fakes.events()
    assert "a child" in events and "a done" not in events
    assert not fakes.alive()


def test_waiting_worker_ends_with_the_plan(fakes):
    with fakes.run("until b imported", "") as results:
        assert next(results)["status"] == "ok"
    assert not fakes.alive() and "b measure" not in fakes.events()


def test_budget_spent_while_a_worker_waits(fakes, monkeypatch):
    monkeypatch.setattr(workers, "LEAST", 1000.0)
    # longer than the budget has above the least, and b has started by then
    with fakes.run("until b imported", "", budget=1000.001) as results:
        first, second = results
    assert first["status"] == "ok" and second == {"status": "skipped", "reason": "no time left in --budget"}
    assert not fakes.alive() and "b measure" not in fakes.events()


def test_no_worker_outlives_a_killed_driver(fakes):
    code = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import pathlib, shapes, workers
workers.SCRIPT = pathlib.Path({str(fakes.script)!r})
arms = [shapes.Arm("stock", "a", env={{"FAKE": "hang"}}), shapes.Arm("stock", "b")]
list(workers.run([(shapes.Case(), arm) for arm in arms], ahead=1, timeout=60, budget=1e9))
"""
    driver = subprocess.Popen([sys.executable, "-c", code])
    try:
        end = time.monotonic() + 30
        while not {"a child", "b imported"} <= set(fakes.events()) and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    assert {"a child", "b imported"} <= set(fakes.events())
    assert not fakes.alive()
