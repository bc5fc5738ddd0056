"""The processes of `train_step.py` and `max_context.py`: one an arm, measuring in turn, the next ones importing.

A worker imports, which takes 12 to 27 s and touches no GPU, then waits for a line on its standard input. The driver
writes it when the worker before has ended, together with all that it had started. So only imports overlap with a
measurement. They take CPU cores and disk bandwidth, nothing of the GPU; `import_beside_s` of a row says for how many
seconds of its measurement another worker was importing.

No worker outlives the driver: its standard input ends with the driver, however that dies, and it then kills its group.
Importing this file loads no torch.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from shapes import Arm, Case

SCRIPT = Path(__file__).resolve().parent / "train_step.py"
# seconds that must be left of the budget for a worker to be worth its start
LEAST = 20.0

Result = dict[str, Any]


def await_go() -> None:
    """In a worker: blocks until the driver lets it go. Ends the process if the driver has ended."""
    if not os.read(0, 16):
        os._exit(1)
    threading.Thread(target=_end_with_driver, daemon=True).start()


def _end_with_driver() -> None:
    # nothing more is ever written: this returns when the pipe's other end is closed
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def write_result(path: Path, result: Result) -> None:
    """In a worker: the whole result or none, even if it is killed here."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.replace(path)


def _environment(arm: Arm, folder: Path) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("FAST_UNSLOTH")}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    env |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_DISABLE_AUTO_UPDATES": "1"}
    env["GPTQMODEL_DISABLE_PACK_EXT"] = "1"  # it would compile an extension that packs, which nothing here does
    if arm.cold:
        env |= {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    return env | arm.env


class Worker:
    """One arm's process, from its start to its result.

    `clock` has the `time.perf_counter()` of its start, of the end of each phase that it told of, and of its end.
    """

    def __init__(self, case: Case, arm: Arm, script: Path, more: dict[str, Any]) -> None:
        self._files = contextlib.ExitStack()
        exchange = Path(self._files.enter_context(tempfile.TemporaryDirectory()))
        if arm.cold:
            folder = Path(self._files.enter_context(tempfile.TemporaryDirectory()))
        else:
            # keeps what a peer compiles there between calls
            folder = Path(tempfile.gettempdir()) / "fast_unsloth_bench"
            folder.mkdir(exist_ok=True)
        self._out = exchange / "out.json"
        spec = exchange / "spec.json"
        spec.write_text(json.dumps({"case": dataclasses.asdict(case), "arm": dataclasses.asdict(arm), **more}))
        self._process = subprocess.Popen(
            [sys.executable, str(script), "--worker", str(spec), str(self._out)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            cwd=folder, env=_environment(arm, folder), start_new_session=True,
        )  # fmt: skip
        self.clock = {"start": time.perf_counter()}
        self._tail: collections.deque[str] = collections.deque(maxlen=60)
        self._lock = threading.Lock()
        self._held: list[str] | None = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Notes the phases, passes them on once it is this worker's turn, keeps the end of everything else."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith("> "):
                self._tail.append(line)
                continue
            with self._lock:
                self.clock[line[2:].rsplit(" ", 2)[0]] = time.perf_counter()
                if self._held is None:
                    print(f"    {line[2:].rstrip()}", flush=True)
                else:
                    self._held.append(line)
        self.clock.setdefault("end", time.perf_counter())

    def finish(self, timeout: float) -> Result:
        """Lets the worker measure and returns its result; a hang or a crash, also one while it waited, is one too."""
        with self._lock:
            for line in self._held or []:
                print(f"    {line[2:].rstrip()}", flush=True)
            self._held = None
        self.clock["go"] = time.perf_counter()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended already
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        try:
            ended = f"the process ended with status {self._process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            ended = f"no result after {timeout:.0f} s"
        self._kill()
        found = json.loads(self._out.read_text()) if self._out.exists() else {"status": "failed", "reason": ended}
        if found["status"] not in ("ok", "absent"):
            found["log_tail"] = "".join(self._tail)[-4000:]
        self._files.close()
        return dict(found)

    def _kill(self) -> None:
        """Ends the worker and whatever it started: compile servers outlive it and hold the pipe open."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(10)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self.clock.setdefault("end", time.perf_counter())

    def stop(self) -> None:
        """Ends a worker that is not wanted any more."""
        self._kill()
        self._files.close()

    def import_beside(self, others: list[Worker]) -> float:
        """Seconds of this worker's measurement during which one of `others` was importing."""
        if "data" not in self.clock:
            return 0.0
        begin, end = self.clock["data"], self.clock["end"]
        imported = [w.clock.get("import", w.clock.get("end", end)) for w in others]
        return sum(max(0.0, min(end, at) - max(begin, w.clock["start"])) for w, at in zip(others, imported))


def run(
    jobs: list[tuple[Case, Arm]],
    *,
    ahead: int,
    timeout: float,
    budget: float,
    script: Path | None = None,
    more: Callable[[Arm], dict[str, Any]] | None = None,
) -> Generator[Result, None, None]:
    """Yields the result of each job, in order; close the generator to end all workers.

    Args:
        jobs: what to measure.
        script: what a worker runs, with ``--worker SPECIFICATION RESULT``; default `SCRIPT`.
        more: what the specification of an arm has beside case and arm.
        ahead: how many of the next workers import while one measures; 0 for none.
        timeout: seconds for a worker from its turn on. What is left of its import at its turn counts, a wait does not.
        budget: seconds for all; what cannot start any more is skipped.
    """
    started = time.perf_counter()
    workers: collections.deque[Worker] = collections.deque()
    upcoming = collections.deque(jobs)
    try:
        for _ in jobs:
            left = budget - (time.perf_counter() - started)
            if left < LEAST:
                yield {"status": "skipped", "reason": "no time left in --budget"}
                continue
            while upcoming and len(workers) <= ahead:
                case, arm = upcoming.popleft()
                workers.append(Worker(case, arm, script or SCRIPT, more(arm) if more else {}))
            worker = workers[0]
            result = worker.finish(min(timeout, left))
            workers.popleft()
            result["import_beside_s"] = round(worker.import_beside(list(workers)), 2)
            result["clock"] = {name: round(at - started, 3) for name, at in worker.clock.items()}
            yield result
    finally:
        for worker in workers:
            worker.stop()
