"""Every op, forward and backward, against what the device can do and against eager PyTorch and Liger.

    python benchmarks/kernels.py --json benchmarks/results/h200.json
    python benchmarks/kernels.py --ops rms_norm,swiglu --models llama-8b --tokens 512

A line shows the device's time, the rate, its share of the limit measured in the same run (a large copy for what moves
bytes, a large bf16 GEMM for what multiplies), the time the host needs to enqueue one call, and beside it the worst
relative error of the outputs and of the gradients against the same formula in float64. Exit code 1 if an op of ours is
further off than PyTorch's own rounding explains. Dequantisation is exact: its error is how many values differ from the
reference's, and it is measured once a model, since it knows no tokens.

Of a mixture of experts its experts are measured (`--models mixtral-8x7b`), of the other models all but that.

A new op is one function in `benches.py`, `benches_layer.py` or `benches_experts.py`.
"""

from __future__ import annotations

import argparse
import datetime
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import records
import torch
from floor import copies, copy_gb_s, time_ms
from shapes import SHAPES
from torch import Tensor

if __name__ == "__main__":
    # The checkout has to come first for its code to be what is measured.
    sys.path.insert(0, str(records.ROOT))

from benches import DTYPE, OPS, WEIGHT_OPS, Bench
from benches_experts import EXPERT_OPS
from benches_layer import LAYER_OPS

if __name__ == "__main__":
    # The folder of a script is on sys.path, where this file would pass for Hugging Face's `kernels`.
    sys.path.remove(str(Path(__file__).resolve().parent))

Call = Callable[[], object]
TOKEN_OPS = OPS | LAYER_OPS | EXPERT_OPS
ALL = TOKEN_OPS | WEIGHT_OPS


class Limits(NamedTuple):
    """What this device did in this run."""

    copy_gb_s: float
    gemm_tflop_s: float


def measure_limits(device: str) -> Limits:
    """A copy of 1 GiB, bytes read and written counted; the best of three large bf16 GEMMs."""
    copy = copy_gb_s(device)
    scale = 1 if device == "cuda" else 64
    rates = []
    for m, n, k in ((8192, 14336, 4096), (8192, 4096, 14336), (8192, 8192, 8192)):
        m, n, k = m // scale, n // scale, k // scale
        x, w = torch.randn(m, k, device=device).to(DTYPE), torch.randn(n, k, device=device).to(DTYPE)
        ms = time_ms([partial(torch.mm, x, w.T)], device)
        rates.append(2.0 * m * n * k / ms / 1e9)
    return Limits(copy, max(rates))


def _outputs(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _run(fn: Callable[..., Any], inputs: tuple[Tensor, ...], grads: list[Tensor], no_output: bool) -> list[Tensor]:
    torch.manual_seed(0)  # the same dropout for all that draw it in the same way
    out = _outputs(fn(*inputs))
    # Clones: Liger writes into the gradient it is given.
    given = [g.to(o.dtype).clone() for g, o in zip(grads, out, strict=True)]
    wanted = [t for t in inputs if t.requires_grad]
    found = torch.autograd.grad(out, wanted, given) if wanted else ()
    return [*(o.detach().clone() for o in out if not no_output), *found]


def parity(bench: Bench) -> dict[str, tuple[float, ...]]:
    """Implementation -> relative error (L2) of each output and gradient against float64."""
    if bench.errors is not None:
        return {name: (bench.errors(fn),) for name, fn in bench.impls.items()}
    impls = bench.impls | ({"torch": bench.oracle} if bench.oracle else {})
    with torch.no_grad():
        grads = [torch.randn_like(o) for o in _outputs(impls["torch"](*bench.inputs))]
    wide = tuple(
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in bench.inputs
    )
    want = _run(impls["torch"], wide, grads, bench.no_output)
    del wide
    errors = {}
    for name, fn in impls.items():
        # Copies: Liger's backward writes over what it saved.
        own = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in bench.inputs)
        got = _run(fn, own, grads, bench.no_output)
        errors[name] = tuple(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))
    return errors


def agrees(bench: Bench, ours: tuple[float, ...], torchs: tuple[float, ...]) -> bool:
    """No result of ours is off by more than twice PyTorch's own rounding (one run; the tests hold it tighter)."""
    if bench.errors is not None:
        return max(ours) < 1
    return all(a <= max(2 * b, 1e-6) for a, b in zip(ours, torchs, strict=True))


def timed(calls: list[Call], device: str) -> tuple[float, float]:
    """Milliseconds of the device and microseconds of the host for one call, from the same rounds.

    The device sleeps while the host enqueues, so that neither waits for the other. The calls differ in their operands
    only, which do not fit in the cache together.
    """
    if device == "cpu":
        ms = time_ms(calls, device)
        return ms, 1e3 * ms

    def a_round(n: int, sleep_ms: float) -> tuple[float, float]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(2e6 * sleep_ms))  # cycles, of at most 2 GHz
        begin.record()
        start = time.perf_counter()
        for i in range(n):
            calls[i % len(calls)]()
        host = time.perf_counter() - start
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / n, 1e3 * host / n

    a_round(len(calls), 0.0)  # compiles
    ms, host_ms = a_round(2 * len(calls), 10.0)
    n = min(max(math.ceil(15 / ms), len(calls)), 50)
    rounds = [a_round(n, 1.0 + 1.3 * n * host_ms) for _ in range(3)]
    return statistics.median(ms for ms, _ in rounds), 1e3 * min(host for _, host in rounds)


def _calls(bench: Bench, fn: Callable[..., Any], direction: str) -> Call:
    wanted = [t for t in bench.inputs if t.requires_grad]
    if direction == "both":
        return lambda: torch.autograd.grad(fn(*bench.inputs), wanted)
    if direction == "forward":
        return partial(fn, *bench.inputs)
    out = _outputs(fn(*bench.inputs))
    return partial(torch.autograd.grad, out, wanted, [torch.randn_like(o) for o in out], retain_graph=True)


def measure(build: Callable[[], Bench], limits: Limits, device: str) -> list[records.Row]:
    """One row an implementation and direction."""
    first = build()
    errors = parity(first)
    sets = [first, *(build() for _ in range(copies(sum(t.nbytes for t in first.inputs), device) - 1))]
    rows: list[records.Row] = []
    for impl in first.impls:
        for direction, work in first.work.items():
            ms, host_us = timed([_calls(bench, bench.impls[impl], direction) for bench in sets], device)
            rate = work / ms / (1e9 if first.gemm else 1e6)
            rows.append({
                "impl": impl, "direction": direction, "ms": ms, "rate": rate,
                "unit": "TFLOP/s" if first.gemm else "GB/s",
                "share": rate / (limits.gemm_tflop_s if first.gemm else limits.copy_gb_s),
                "host_us": host_us, "errors": errors[impl],
                "outputs": 0 if first.no_output else len(errors[impl]) - _gradients(first),
                "ok": impl != "fast" or agrees(first, errors["fast"], errors["torch"]),
            })  # fmt: skip
    return rows


def _gradients(bench: Bench) -> int:
    return sum(t.requires_grad for t in bench.inputs)


def _line(row: records.Row) -> str:
    parts = row["errors"][: row["outputs"]], row["errors"][row["outputs"] :]
    errors = " ".join(f"{max(part):.1e}" if part else "-" for part in parts)
    return (
        f"  {row['direction']:8s} {row['impl']:10s} {1e3 * row['ms']:9.1f} us {row['rate']:8.1f} {row['unit']:7s} "
        f"{100 * row['share']:4.0f} %  host {row['host_us']:6.1f} us  error {errors}{'' if row['ok'] else '  DIFFERS'}"
    )


def _save(path: Path, rows: list[records.Row], limits: Limits, device: str) -> None:
    results: dict[str, list[records.Row]] = records.load_results(path)
    mine = {(row["op"], row["model"], row["tokens"]) for row in rows}
    kept = [r for r in results.get("kernels", []) if (r["op"], r["model"], r["tokens"]) not in mine]
    stamp = {"date": datetime.date.today().isoformat(), "limits": limits._asdict(), **records.environment(device)}
    results["kernels"] = kept + [row | stamp for row in rows]
    records.save_results(path, results)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", help=f"comma-separated, of {', '.join(ALL)}; default all")
    parser.add_argument("--models", default="llama-8b,llama-1b,mixtral-8x7b", help="comma-separated shapes")
    parser.add_argument("--tokens", default="512,8192", help="comma-separated")
    parser.add_argument("--cpu", action="store_true", help="run the reference paths, to see that the script works")
    parser.add_argument("--tiny", action="store_true", help="the smallest shapes and 16 tokens only")
    parser.add_argument("--json", type=Path, help="results file to put the rows into")
    options = parser.parse_args(argv)
    names = options.ops.split(",") if options.ops else list(ALL)
    models = ["tiny", "tiny-mixtral"] if options.tiny else options.models.split(",")
    for kind, given, known in (("--ops", names, ALL), ("--models", models, SHAPES)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{kind}: no {', '.join(unknown)}; there are {', '.join(known)}")
    device = "cpu" if options.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --cpu --tiny shows that the script works")
    torch.manual_seed(0)
    limits = measure_limits(device)
    print(f"copy {limits.copy_gb_s:.0f} GB/s, GEMM {limits.gemm_tflop_s:.0f} TFLOP/s")
    print("errors: the worst of the outputs, the worst of the gradients")
    sizes = [16] if options.tiny else [int(tokens) for tokens in options.tokens.split(",")]
    rows: list[records.Row] = []
    for model, shape in ((model, SHAPES[model]) for model in models):
        mine = [name for name in names if (name in EXPERT_OPS) == bool(shape.experts)]
        jobs = [(name, 0, partial(WEIGHT_OPS[name], shape, device)) for name in mine if name in WEIGHT_OPS]
        token_ops = {name: TOKEN_OPS[name] for name in mine if name in TOKEN_OPS}
        jobs += [(name, t, partial(op, shape, t, device)) for t in sizes for name, op in token_ops.items()]
        for name, tokens, build in jobs:
            print(f"{name}, {shape.title}" + (f", {tokens} tokens" if tokens else ""), flush=True)
            found = measure(build, limits, device)
            for row in found:
                print(_line(row), flush=True)
            rows += [{"op": name, "model": model, "tokens": tokens} | row for row in found]
    if not rows:
        parser.error("none of --ops is measured of any of --models")
    if options.json:
        _save(options.json, rows, limits, device)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
