"""Whole training steps: stock Hugging Face, this library and its peers, each in its own process, parity beside speed.

    python benchmarks/train_step.py --impl stock,fast,liger,unsloth --model llama-8b --mode lora --batch 4 --seq 2048 \
        --checkpointing --json benchmarks/results/h200.json
    python benchmarks/train_step.py --plan benchmarks/plans/issue2.json --json OUT

The setting: random weights in the real model's shape, the same in every implementation
(`shapes.fill_weights`); autocast; fp32 LoRA adapters r=16 on all seven projections, or every weight in full mode; fused
AdamW; gradients clipped to norm 1; a new batch of real text each step; the median of `--steps` steps after `--warmup`,
the device synchronised at each step's end, as Trainer's own NaN filter does. In the modes qlora (bitsandbytes) and gptq
(gptqmodel) the base weights have four bits (`quantised.py`); GPTQ has a fast path here only. `--packed 16` makes each
row of 16 documents told by `position_ids`, `--padding 0.5` half of the tokens padding (`batches.py`); tokens/s count
what is no padding. Peers that would take a packed row for one document show it by their parity.

Of Mixtral, LoRA is on attention and experts, with `--attention-only` on attention; `--routing random` gives every
expert the same number of tokens, where real text is what it is by default (`experts.py`). The load of the first step,
with the weights it starts from, is told for each layer and compared with stock's. With `--mode qlora` the experts have
four bits too, which is this library's alone; `--rounded` trains LoRA on the same values in 16 bits, to compare.

While an arm measures, the next one's worker already imports, and waits (`workers.py`; `--no-overlap` for one after the
other). Only imports overlap: a worker builds, runs and measures when no other one uses the GPU. Imports and the wait
are phases of their own; `first_step_s`, as every other time in a row, contains neither.

A plan is `{"defaults": {...}, "cases": [{...}]}`. A case has the fields of `Case` and `impls`, each a name or the
fields of `Arm`: `{"impl": "fast", "label": "norms", "only": ["llama.rms_norm"], "rung": 1}` is a rung of the ladder,
`"cold"`, `"profile"` and `"host"` are the options of these names for one arm, and `"feed"` gives it the same tokens in
another form. Unsloth's import cannot be hidden (it initialises CUDA), but it hides the next arm's. Rows are saved as
soon as they exist. The exit status is 1 if stock or fast failed, if their losses or gradient norms disagree, or if fast
patched nothing; a peer that is absent, fails or disagrees is only reported, as is a stock model that the GPU's memory
does not hold.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import experts
import records
import report
import setups
import shapes
import training
import workers
from batches import Batches
from shapes import Arm, Case
from training import Phases, Trainer

# An arm that chooses by itself what it recomputes has settled when its choice was the same in so many steps; at most so
# many more steps are waited for it.
SETTLED, SETTLING = 3, 24
KERNEL_KINDS = {
    "attention": r"flash|fmha|sdpa|attention",
    "gemm": r"nvjet|gemm|cutlass|cublas|splitK|aten::(add)?mm",
    "copy": r"Memcpy|Memset|copy_kernel|CatArray|aten::copy_",
    "torch": r"at::|aten::",
    "triton": r"^_?\w+(kernel|_\d+)$|^triton_",
}


def _measure(trainer: Trainer, batches: Batches, phases: Phases) -> dict[str, Any]:
    """Runs warm-up and measured steps; peak memory is that of the measured steps.

    An arm that chooses by itself what it recomputes warms up until its choice has been the same in `SETTLED` steps.
    """
    import torch

    case, arm = batches.case, batches.arm
    on_gpu = case.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    steps = iter(range(len(batches)))
    times: list[float] = []
    choices: list[Any] = []
    while len(times) < case.warmup or (
        _settles(arm) and len(times) < case.warmup + SETTLING and (len(choices) < SETTLED or len(set(choices)) > 1)
    ):
        times.append(trainer.timed(batches[next(steps)]))
        if arm.impl == "fast":
            choices = [*choices, training.fast_status().get("recompute_choice", "")][-SETTLED:]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    measured = [1e3 * trainer.timed(batches[next(steps)]) for _ in range(case.steps)]
    phases.done("steps")
    median = statistics.median(measured)
    result: dict[str, Any] = {
        "step_ms": {"median": median, "min": min(measured), "max": max(measured), "all": measured},
        "tokens": batches.tokens,
        "tokens_per_s": 1e3 * batches.tokens / median,
        "first_step_s": times[0] if times else measured[0] / 1e3,
        "first_three_s": sum([*times, *(ms / 1e3 for ms in measured)][:3]),
        "warmup": len(times),
        "losses": [float(x) for x in trainer.losses],
        "grad_norms": [float(x) for x in trainer.grad_norms],
    }
    if _settles(arm):
        result["settled"] = len(set(choices)) == 1
    if on_gpu:
        result["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return result


def _settles(arm: Arm) -> bool:
    return arm.impl == "fast" and arm.recompute == "auto"


def _kernel_name(name: str) -> str:
    """What tells a kernel from others, short enough for a table: its functor, not its argument list."""
    return re.sub(r"^void |at::native::|at_cuda_detail::|\(anonymous namespace\)::", "", name)[:110]


def _kind(name: str) -> str:
    """The part of a step that a kernel belongs to, by its name."""
    for kind, pattern in KERNEL_KINDS.items():
        if re.search(pattern, name):
            return kind
    return "other"


def _profile(trainer: Trainer, inputs: dict[str, Any]) -> dict[str, Any]:
    """One profiled step: device time by kernel (CPU operators on a CPU), and how often each was launched."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = trainer.case.device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    trainer.synchronize()
    with profile(activities=activities) as profiler:
        trainer.step(inputs)
        trainer.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    groups: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    kinds: dict[str, float] = collections.defaultdict(float)
    for event in profiler.key_averages():
        if event.device_type != wanted or getattr(event, "is_user_annotation", False):
            continue
        ms = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
        group = groups[_kernel_name(event.key)]
        group[0] += ms
        group[1] += event.count
        kinds[_kind(event.key)] += ms
    rows = sorted(((ms, count, name) for name, (ms, count) in groups.items()), reverse=True)
    return {
        "busy_ms": sum(row[0] for row in rows),
        "launches": sum(row[1] for row in rows),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "top": [{"ms": round(ms, 3), "count": count, "name": name} for ms, count, name in rows[:40]],
    }


def _host(trainer: Trainer, ids: Any, repeats: int = 12) -> dict[str, float]:
    """Host time of forward and backward with 16 tokens, where the device has nothing to do but launch."""
    forward, backward = [], []
    for _ in range(repeats):
        trainer.synchronize()
        start = time.perf_counter()
        loss = trainer.loss({"input_ids": ids, "labels": ids})
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        trainer.optimizer.zero_grad(set_to_none=True)
        forward.append(middle - start)
        backward.append(end - middle)
    layers = trainer.case.layers or shapes.SHAPES[trainer.case.model].layers
    medians = {"forward": statistics.median(forward[4:]), "backward": statistics.median(backward[4:])}
    return {f"{name}_ms": 1e3 * t for name, t in medians.items()} | {
        f"{name}_us_per_layer": 1e6 * t / layers for name, t in medians.items()
    }


def _expert_load(trainer: Trainer, batches: Batches) -> list[list[int]]:
    """Pairs (token, expert) of each layer's experts in the first step, before its weights were trained.

    A forward of its own, after all measurements: nothing has hooks while it is measured, and all arms have the same
    weights here. Empty if an implementation's gates do not tell it.
    """
    shapes.fill(trainer.model, batches.case, trained=True)
    with experts.counted(trainer.model) as found:
        trainer.loss(batches[0])
    return [load.tolist() for load in found]


def _work(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    case, arm = Case(**spec["case"]), Arm(**spec["arm"])
    if reason := training.absent(case, arm):
        return {"status": "absent", "reason": reason}
    phases = Phases()
    cuda_at_import = training.import_and_wait(case, arm, phases)
    trainer = training.build(case, arm, phases)
    batches = Batches(case, arm, case.warmup + case.steps + (SETTLING if _settles(arm) else 0))
    phases.done("data")
    result = {"status": "ok", **_measure(trainer, batches, phases)}
    # before `_expert_load`, whose forward is no step
    fast = training.fast_status() if arm.impl == "fast" else None
    result["trainable"] = {
        "parameters": sum(p.numel() for p in trainer.parameters),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in trainer.parameters}),
    }
    if fast:
        result["fast"] = fast
    if shapes.SHAPES[case.model].experts:
        result["expert_load"] = _expert_load(trainer, batches)
        phases.done("load")
    if arm.host:
        result["host"] = _host(trainer, batches[0]["input_ids"].reshape(-1)[:16][None].contiguous())
        phases.done("host")
    if arm.profile:
        result["profile"] = _profile(trainer, batches[0])
        result["profile"]["idle_ms"] = result["step_ms"]["median"] - result["profile"]["busy_ms"]
        phases.done("profile")
    result |= {"phases": phases.seconds, "cuda_at_import": cuda_at_import}
    return result | records.environment(case.device)


def _problem(row: dict[str, Any]) -> str | None:
    """Why a row of stock or fast makes the run fail, if it does."""
    if row["impl"] not in ("stock", "fast") or (row["impl"], row["status"]) == ("stock", "oom"):
        return None
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason'].splitlines()[0]}"
    if row["impl"] == "fast" and not any(r["forward"] for r in row["fast"]["rows"]):
        return "; ".join(["no patch took its fast path", *report.not_fast(row)])
    if row.get("parity") and not row["parity"]["ok"]:
        return "losses or gradient norms disagree with stock's"
    return None


def run_plan(plan: list[tuple[Case, list[Arm]]], options: argparse.Namespace) -> int:
    """Measures all cases, saving each row when it exists; returns the exit status."""
    path = Path(options.json) if options.json else None
    results = records.load_results(path) if path else {"rows": [], "floors": []}
    stamp = datetime.datetime.now(datetime.timezone.utc)
    common = {"run": options.run or stamp.strftime("%Y%m%dT%H%M%S"), "date": stamp.strftime("%Y-%m-%d"),
              "commit": options.commit or records.commit(), "source": records.source_digest()}  # fmt: skip
    jobs = [(case, arm) for case, arms in plan for arm in arms]
    problems: list[str] = []
    tables: list[str] = []
    outcomes = workers.run(jobs, ahead=options.ahead, timeout=options.timeout, budget=options.budget)
    with contextlib.closing(outcomes):
        for case, arms in plan:
            rows: list[dict[str, Any]] = []
            for arm in arms:
                print(f"{case.title()}: {arm.name()}", flush=True)
                row = common | {"impl": arm.impl, "label": arm.name(), "case": dataclasses.asdict(case),
                                "arm": dataclasses.asdict(arm), "cold": arm.cold} | next(outcomes)  # fmt: skip
                rows.append(row)
                results["rows"].append(row)
                records.add_parity(rows, results["rows"])
                print(report.details(row), end="", flush=True)
                if path:
                    records.save_results(path, results)
            # only now: stock may have been the last of them
            problems += [f"{case.title()}: {r['label']}: {p}" for r in rows if (p := _problem(r))]
            tables.append(f"{case.title()}\n{report.console_table(rows)}")
            if len(plan) > 1:
                print(f"\n{tables[-1]}\n", flush=True)
    print("\n" + "\n\n".join(tables), flush=True)
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _names(text))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", default="stock,fast,liger,unsloth", help="comma-separated")
    parser.add_argument("--model", default="llama-8b", choices=list(shapes.SHAPES))
    parser.add_argument("--mode", default="lora", choices=list(shapes.MODES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--layers", type=int, help="only so many decoder layers")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"], help="fp32 runs without autocast")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", type=_names, help="fast: these patches only")
    parser.add_argument("--exclude", type=_names, default=(), help="fast: without these patches")
    parser.add_argument("--packed", type=int, default=0, metavar="DOCS", help="rows of so many documents of one length")
    parser.add_argument("--padding", type=float, default=0.0, metavar="SHARE", help="share of padding, 0.5 for half")
    parser.add_argument("--attention-only", dest="expert_lora", action="store_false", help="no LoRA on experts")
    parser.add_argument("--routing", default="text", choices=experts.ROUTINGS, help="of tokens to experts")
    parser.add_argument("--rounded", action="store_true", help="LoRA on the values that --mode qlora makes of weights")
    parser.add_argument("--feed", default="", choices=["", "apart", "flat", "full"], help="see batches.py")
    parser.add_argument("--recompute", default="full", choices=["full", "stock", "auto", "offload"], help="fast only")
    parser.add_argument("--unsloth-gc", default="true", choices=["true", "unsloth"])
    parser.add_argument("--plan", type=Path, help="cases from a file, in place of the options above")
    parser.add_argument("--cases", type=_numbers, default=(), help="of the plan, these only, counted from 1")
    parser.add_argument("--json", help="results file to append to")
    parser.add_argument("--run", help="name of the run (default: the time); one name lets two calls count as one run")
    parser.add_argument("--commit", help="what to record as the commit where there is no git")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one worker, from its turn on")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds for the whole call; the rest is skipped")
    parser.add_argument("--cold", action="store_true", help="empty Triton and Inductor caches")
    parser.add_argument("--profile", action="store_true", help="one more step under torch.profiler: the top 40 kernels")
    parser.add_argument("--host", action="store_true", help="host time of forward and backward at 16 tokens")
    parser.add_argument("--ahead", type=int, default=1, help="how many next workers import while one measures")
    parser.add_argument("--no-overlap", dest="ahead", action="store_const", const=0, help="the same as --ahead 0")
    options = parser.parse_args(argv)
    if (options.mode, options.dtype) == ("full", "fp16"):
        parser.error("GradScaler refuses fp16 gradients: fp16 goes with adapters, not with --mode full")
    if options.plan:
        plan = shapes.read_plan(options.plan)
        if not set(options.cases) <= set(range(1, len(plan) + 1)):
            parser.error(f"--cases: the plan has the cases 1 to {len(plan)}")
        plan = [plan[n - 1] for n in options.cases] or plan
    else:
        try:
            case = Case(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Case)})
        except ValueError as error:
            parser.error(str(error))
        if options.feed not in shapes.feeds(case):
            parser.error(f"--feed {options.feed}: of {case.title()} there is none")
        arm_options = {n: getattr(options, n) for n in ("only", "exclude", "recompute", "unsloth_gc", "feed")}
        plan = [(case, [Arm(name, **arm_options) for name in _names(options.impl)])]
    unknown = {arm.impl for _, arms in plan for arm in arms} - set(setups.SETUPS)
    if unknown:
        parser.error(f"unknown implementation {', '.join(sorted(unknown))}; known: {', '.join(setups.SETUPS)}")
    flags: dict[str, Any] = {name: True for name in ("cold", "profile", "host") if getattr(options, name)}
    return run_plan([(case, [dataclasses.replace(arm, **flags) for arm in arms]) for case, arms in plan], options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        training.run_worker(_work, *sys.argv[2:4])
        # the result is on disk: no time for the teardown of compile servers and of 20 GiB of tensors
        sys.stdout.flush()
        os._exit(0)
    sys.exit(main())
