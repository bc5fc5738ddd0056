"""The longest row that trains under a memory cap: stock, this library and its peers, each at its own best setting.

    python benchmarks/max_context.py --cap-gib 24 --model llama-8b --mode qlora --json benchmarks/results/h200.json
    python benchmarks/max_context.py --impl "fast offload,unsloth offload" --start 98304 --json OUT

A length fits if two whole steps run with one row of it: forward, backward, clipping, AdamW, under gradient
checkpointing. One process an arm: the model is built once, what does not fit is caught, and the caches are emptied
between tries. The first try is one short row, the same in every arm, whose losses are compared with stock's. Two short
rows tell how memory grows with length, so that the next try is near the limit already; it ends when the shortest row
that did not fit is at most an eighth longer than the longest one that did. Both are reported, since a step of a long
row takes half a minute. `--start` makes the third try that long, to go on where an earlier search stopped.

The cap holds for what PyTorch reserves. On a GPU that has more, the rest but 2 GiB is taken out of reach first: whoever
asks the driver how much memory is free, as Unsloth's loss does to size its chunks, gets the answer of a card of that
size. All arms run with expandable segments, without which fragments decide.

The arms, and a hint for each (the longest row where it was found once), are in `plans/context.json`. The exit status is
1 if stock or fast failed or their losses disagree.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import records
import report
import shapes
import training
import workers
from shapes import Arm, Case
from training import Phases, Trainer

UNIT = 1024
WITHIN = 0.125
# Left to the driver beside the cap: its context, the code of kernels.
SLACK_GIB = 2.0
# Of the cap, what live tensors reach before there is no room between them.
USABLE = 0.96
PLAN = Path(__file__).resolve().parent / "plans" / "context.json"


class Search:
    """Which length to try next, from what the tries so far have shown.

    Args:
        common: the first length, for all arms.
        hint: about how long the longest one may be; a second short try is an eighth of it.
        limit: the longest to try.
        cap_gib: what the peak may reach.
        start: the first long try, in place of what the short ones let expect.
        unit: lengths are multiples of it.
    """

    def __init__(
        self, *, common: int, hint: int, limit: int, cap_gib: float, start: int | None = None, unit: int = UNIT
    ) -> None:
        self.common, self.hint, self.limit, self.cap_gib = common, hint, limit, cap_gib
        self.start, self.unit = start, unit
        self.peaks: dict[int, float] = {}  # of the lengths that fit
        self.failed: int | None = None
        self._failures = 0

    @property
    def longest(self) -> int | None:
        return max(self.peaks, default=None)

    def fits(self, length: int, peak_gib: float) -> None:
        self.peaks[length] = peak_gib

    def does_not_fit(self, length: int) -> None:
        self.failed = min(length, self.failed or length)
        self._failures += 1

    def next(self) -> int | None:
        """The next length to try, or None: the answer is known well enough."""
        longest = self.longest
        if longest is None:
            return self.common if self.failed is None else None
        bound = self.limit + self.unit if self.failed is None else self.failed
        step = max(self.unit, self._floor(WITHIN * longest))
        if bound - longest <= (self.unit if self.failed is None else step):
            return None
        lowest, highest = min(longest + step, bound - self.unit), bound - self.unit
        return max(lowest, min(highest, self._floor(self._guess(longest, bound))))

    def _guess(self, longest: int, bound: int) -> float:
        if len(self.peaks) == 1 and self.failed is None:
            return max(2 * longest, self.hint / 8)
        if self.start is not None and longest < self.start < bound:
            return self.start
        expected = self._expected()
        if self.failed is None:
            # without a slope there is nothing to go by but the hint
            return expected or max(self.hint, 2 * longest)
        if expected is not None and expected < self.failed:
            return expected
        nearest = math.ceil(self.failed / (1 + WITHIN) / self.unit) * self.unit
        if longest < self.hint < nearest:
            return self.hint
        # The first to fail was expected to fit, so the end is near; after that a quarter less each time.
        return nearest if self._failures == 1 else 0.75 * self.failed

    def _expected(self) -> float | None:
        """Where the straight line through the peaks of the two longest rows meets the cap."""
        if len(self.peaks) < 2:
            return None
        first, second = sorted(self.peaks)[-2:]
        slope = (self.peaks[second] - self.peaks[first]) / (second - first)
        return second + (USABLE * self.cap_gib - self.peaks[second]) / slope if slope > 0 else None

    def _floor(self, length: float) -> int:
        return math.floor(length / self.unit) * self.unit


def cap_memory(cap_gib: float) -> None:
    """Holds this process to `cap_gib` of its GPU, and takes what the GPU has beyond that out of everybody's reach.

    Raises:
        RuntimeError: the driver refused.
    """
    import torch

    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / total))
    rest = free - int((cap_gib + SLACK_GIB) * 2**30)
    if rest > 0:
        # By the driver, or the allocator would count it into the cap. It lives as long as the process.
        pointer = ctypes.c_void_p()
        status = ctypes.CDLL("libcuda.so.1").cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(rest))
        if status:
            raise RuntimeError(f"cuMemAlloc of {rest / 2**30:.1f} GiB: the driver returned {status}")


def out_of_memory(error: RuntimeError) -> bool:
    """Did the GPU have no room? Not every library says so with PyTorch's own exception."""
    text = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or "out of memory" in text or "alloc_failed" in text


def attempt(trainer: Trainer, ids: Any, length: int, steps: int = 2) -> dict[str, Any]:
    """Whole steps with one row of `length` tokens; nothing of them is left afterwards, whether it fits or not."""
    import torch

    on_gpu = trainer.case.device == "cuda"
    found: dict[str, Any] = {"length": length, "fits": True, "step_s": []}
    told = len(trainer.losses)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        for step in range(steps):
            row = ids[step * length : (step + 1) * length][None]
            found["step_s"].append(trainer.timed({"input_ids": row, "labels": row}))
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        found |= {"fits": False, "reason": str(error).splitlines()[0][:200]}
    # The exception is gone with its frames, but autograd's graph has cycles.
    trainer.optimizer.zero_grad(set_to_none=True)
    found["losses"] = [float(x) for x in trainer.losses[told:]]
    found["grad_norms"] = [float(x) for x in trainer.grad_norms[told:]]
    _collect()
    if on_gpu:
        found["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        torch.cuda.empty_cache()
    return found


def _collect() -> None:
    import gc

    gc.collect()


def search(trainer: Trainer, plan: Search, *, budget: float, tell: Any) -> list[dict[str, Any]]:
    """Tries lengths until the plan has no more, or until the next one would take longer than what is left.

    Args:
        budget: seconds.
        tell: called with all tries so far, after each.
    """
    import torch

    started = time.perf_counter()
    vocab = shapes.SHAPES[trainer.case.model].vocab
    ids = torch.tensor(shapes.text_tokens(vocab, 2 * plan.limit)).to(trainer.case.device)
    tries: list[dict[str, Any]] = []
    while (length := plan.next()) is not None:
        left = budget - (time.perf_counter() - started)
        done = [t for t in tries if t["fits"]]
        # Between the GEMMs, in proportion, and attention, with the square. The first try compiles: no measure.
        needed = 2 * done[-1]["step_s"][-1] * (length / done[-1]["length"]) ** 1.5 if len(done) > 1 else 0.0
        if needed > left:
            break
        found = attempt(trainer, ids, length)
        found["s"] = round(sum(found["step_s"]), 2)
        tries.append(found)
        if found["fits"]:
            plan.fits(length, found.get("allocated_gib", 0.0))
        else:
            plan.does_not_fit(length)
        tell(tries)
    return tries


def _result(tries: list[dict[str, Any]], plan: Search, common: int) -> dict[str, Any]:
    """What a row says: the longest that fits, the shortest that does not, and the short row all arms have."""
    fitting = {t["length"]: t for t in tries if t["fits"]}
    if not fitting:
        return {"status": "oom", "reason": f"not even {common} tokens fit", "tries": tries}
    best = fitting[max(fitting)]
    return {
        "status": "ok", "longest": best["length"], "failed_at": plan.failed, "complete": plan.next() is None,
        "tokens_per_s": best["length"] / best["step_s"][-1], "losses": fitting[common]["losses"],
        "grad_norms": fitting[common]["grad_norms"], "tries": tries,
        **{name: best[name] for name in ("allocated_gib", "reserved_gib") if name in best},
    }  # fmt: skip


def _work(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    case, arm = Case(**spec["case"]), Arm(**spec["arm"])
    if reason := training.absent(case, arm):
        return {"status": "absent", "reason": reason}
    phases = Phases()
    training.import_and_wait(case, arm, phases)
    if case.device == "cuda":
        cap_memory(spec["cap_gib"])
    # Its rows may be as long as the limit, which Unsloth wants to know.
    trainer = training.build(dataclasses.replace(case, seq=spec["limit"]), arm, phases)
    plan = Search(
        common=case.seq, hint=spec["hint"], limit=spec["limit"], cap_gib=spec["cap_gib"], start=spec["start"],
        unit=spec["unit"],
    )  # fmt: skip
    more = records.environment(case.device)

    def result(tries: list[dict[str, Any]]) -> dict[str, Any]:
        fast = {"fast": training.fast_status()} if arm.impl == "fast" else {}
        return _result(tries, plan, case.seq) | {"phases": phases.seconds} | fast | more

    def tell(tries: list[dict[str, Any]]) -> None:
        last = tries[-1]
        phases.done(f"{last['length']} {'fits' if last['fits'] else 'does not fit'}")
        # A worker that is killed, or a GPU that gives up, leaves what is known.
        workers.write_result(out, result(tries))

    found = result(search(trainer, plan, budget=spec["budget"], tell=tell))
    reserved = max((t.get("reserved_gib", 0.0) for t in found["tries"]), default=0.0)
    if reserved > spec["cap_gib"] + 0.01:
        raise RuntimeError(f"the cap did not hold: {reserved:.2f} GiB reserved")
    return found


def _problem(row: dict[str, Any]) -> str | None:
    """Why a row of stock or fast makes the run fail, if it does."""
    if row["impl"] not in ("stock", "fast"):
        return None
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason'].splitlines()[0]}"
    if not all(math.isfinite(loss) for t in row["tries"] for loss in t["losses"]):
        return "a loss is not finite"
    if row.get("parity") and not row["parity"]["ok"]:
        return "losses or gradient norms disagree with stock's"
    return None


def _line(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['label']:18s} {row['status']}: {row['reason'].splitlines()[0][:90]}"
    fails = f"{row['failed_at']} does not fit" if row["failed_at"] else "nothing longer was tried"
    memory = f"{row['allocated_gib']:.2f} GiB allocated, " if "allocated_gib" in row else ""
    off = row.get("parity")
    told = f", loss diff {off['loss_max']:.1e}{'' if off['ok'] else ' OFF'}" if off else ""
    more = "" if row["complete"] else ", stopped early"
    return (
        f"{row['label']:18s} {row['longest']:7d} fits ({memory}{row['tokens_per_s']:.0f} tokens/s), {fails}{told}{more}"
    )


def run(case: Case, arms: list[tuple[Arm, int]], options: argparse.Namespace) -> int:
    """Searches for each arm, saving each row when it exists; returns the exit status."""
    path = Path(options.json) if options.json else None
    results = records.load_results(path) if path else {}
    contexts = results.setdefault("contexts", [])
    stamp = datetime.datetime.now(datetime.timezone.utc)
    common = {"run": options.run or stamp.strftime("%Y%m%dT%H%M%S"), "date": stamp.strftime("%Y-%m-%d"),
              "commit": options.commit or records.commit(), "source": records.source_digest(),
              "cap_gib": options.cap_gib, "case": dataclasses.asdict(case)}  # fmt: skip
    hints = {arm.name(): hint for arm, hint in arms}
    spec = {name: getattr(options, name) for name in ("cap_gib", "start", "limit", "budget", "unit")}
    found = workers.run(
        [(case, arm) for arm, _ in arms], ahead=options.ahead, timeout=options.budget + options.grace,
        budget=options.total, script=Path(__file__).resolve(), more=lambda arm: spec | {"hint": hints[arm.name()]},
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    with contextlib.closing(found):
        for arm, _ in arms:
            print(arm.name(), flush=True)
            rows.append(common | {"impl": arm.impl, "label": arm.name(), "arm": dataclasses.asdict(arm)} | next(found))
            contexts.append(rows[-1])
            records.add_parity(rows, contexts)
            print(f"    {_line(rows[-1])}\n{report.details(rows[-1])}", end="", flush=True)
            if path:
                records.save_results(path, results)
    print(f"\n{report.context_title(rows[0])}", *map(_line, rows), sep="\n", flush=True)
    problems = [f"{row['label']}: {problem}" for row in rows if (problem := _problem(row))]
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


def read_plan(path: Path, alloc_conf: str) -> dict[str, tuple[Arm, int]]:
    """Label -> arm and hint."""
    plan = {}
    for entry in json.loads(path.read_text())["impls"]:
        fields = dict(entry)
        hint = fields.pop("hint")
        arm = Arm(**fields)
        if alloc_conf:
            arm = dataclasses.replace(arm, env={"PYTORCH_ALLOC_CONF": alloc_conf} | arm.env)
        plan[arm.name()] = arm, hint
    return plan


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=PLAN, help="arms and their hints")
    parser.add_argument("--impl", help="of the plan, the arms of these labels only, comma-separated")
    parser.add_argument("--model", default="llama-8b", choices=[n for n, s in shapes.SHAPES.items() if not s.experts])
    parser.add_argument("--mode", default="qlora", choices=list(shapes.MODES))
    parser.add_argument("--layers", type=int, help="only so many decoder layers")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="a CPU has no cap, only a limit")
    parser.add_argument("--cap-gib", type=float, default=24.0)
    parser.add_argument("--common", type=int, default=2 * UNIT, help="the first row, compared with stock")
    parser.add_argument("--limit", type=int, default=128 * UNIT, help="the longest row to try")
    parser.add_argument("--unit", type=int, default=UNIT, help="lengths are multiples of it")
    parser.add_argument("--start", type=int, help="the first long row to try, in every arm")
    parser.add_argument("--budget", type=float, default=180, help="seconds of an arm's search")
    parser.add_argument("--grace", type=float, default=150, help="seconds an arm has for import, build, a last try")
    parser.add_argument("--total", type=float, default=1e9, help="seconds for the whole call; the rest is skipped")
    parser.add_argument("--alloc-conf", default="expandable_segments:True", help="PYTORCH_ALLOC_CONF of every arm")
    parser.add_argument("--json", help="results file to append to")
    parser.add_argument("--run", help="name of the run (default: the time)")
    parser.add_argument("--commit", help="what to record as the commit where there is no git")
    parser.add_argument("--ahead", type=int, default=1, help="how many next workers import while one searches")
    options = parser.parse_args(argv)
    plan = read_plan(options.plan, options.alloc_conf)
    names = options.impl.split(",") if options.impl else list(plan)
    if unknown := [name for name in names if name not in plan]:
        parser.error(f"--impl: no {', '.join(unknown)}; the plan has {', '.join(plan)}")
    if options.common % options.unit or options.limit % options.unit or options.common > options.limit:
        parser.error(f"--common and --limit are multiples of {options.unit}, the limit the larger one")
    case = Case(
        options.model, options.mode, 1, options.common, True, layers=options.layers, dtype=options.dtype,
        device=options.device,
    )  # fmt: skip
    return run(case, [plan[name] for name in names], options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        training.run_worker(_work, *sys.argv[2:4])
        # the result is on disk: no time for the teardown of compile servers and of the model
        sys.stdout.flush()
        os._exit(0)
    sys.exit(main())
