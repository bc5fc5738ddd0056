"""The speed of light of a training step: its large GEMMs and attention calls, and nothing else.

    python benchmarks/floor.py --model llama-8b --batch 4 --seq 2048 --checkpointing --json benchmarks/results/h200.json
    python benchmarks/floor.py --plan benchmarks/plans/issue2.json --json benchmarks/results/h200.json

Every large GEMM and attention call of the step, each at the best time that PyTorch's own libraries give for its shape
(cuBLAS or cuBLASLt, projections of one input stacked or apart; cuDNN or FlashAttention, two layouts), with a full
recompute of each layer under checkpointing. No norm, no LoRA, no element-wise pass, no optimizer. Frozen weights need
no dW; `--mode full` adds them. Real work can go below: the recompute does not need the layer's last GEMM (printed too).
With packed base weights (`--mode qlora`, `gptq`) the floor is that of LoRA; what their dequantisation moves, at the
speed of a copy, is told beside it, since a kernel that multiplies by packed weights need not do it. Of packed or padded
rows: the tokens that are no padding, attention inside each document only. Of a mixture of experts: the products of each
expert's rows, one after the other or as PyTorch's grouped product, with the load that the newest run of the case in the
results file had (a few of its layers), else with an even one. Neither routing nor sorting is counted.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import experts
import quantised
import records
import report
from batches import documents
from shapes import MODES, SHAPES, Case, Shape, read_plan

Call = Callable[[], Any]
# Layers of a mixture whose products are measured: a load takes seconds, and the mean of a few is that of all.
LAYERS = 4


class Part(NamedTuple):
    """One kind of work in a step: `ms` for one call, `calls` of them."""

    name: str
    calls: int
    ms: float
    flops: float
    best: str


def time_ms(calls: list[Call], device: str) -> float:
    """Milliseconds of one call, the median of several rounds over `calls`.

    The calls differ in their operands only: together these do not fit in the cache, as the weights of a model's layers
    do not. On a GPU the clock is the device's, and the host enqueues everything while the device sleeps, so that small
    calls are not charged with their launch.
    """
    import torch

    if device == "cpu":
        start = time.perf_counter()
        for call in calls:
            call()
        return 1e3 * (time.perf_counter() - start) / len(calls)

    def round_ms(n: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(20_000_000)  # cycles: about 10 ms
        begin.record()
        for i in range(n):
            calls[i % len(calls)]()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / n

    first = round_ms(2 * len(calls))
    n = min(max(math.ceil(40 / first), len(calls)), 60)
    return statistics.median(round_ms(n) for _ in range(5))


def copies(bytes_each: int, device: str) -> int:
    """How many operands of that size are more than twice the last-level cache."""
    import torch

    if device == "cpu":
        return 1
    return max(2, math.ceil(2.5 * torch.cuda.get_device_properties(0).L2_cache_size / bytes_each))


def copy_gb_s(device: str) -> float:
    """What a copy of 1 GiB reaches, bytes read and written counted."""
    import torch

    a = torch.empty(2**30 // (1 if device == "cuda" else 64), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / time_ms([lambda: b.copy_(a)], device) / 1e6


class Gemms:
    """Times C[m, n] = A[m, k] B[k, n] in bf16, each shape once."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._known: dict[tuple[int, int, int, str], tuple[float, str]] = {}

    def best(self, m: int, k: int, n: int, layout: str) -> tuple[float, str]:
        """Milliseconds and library. `layout`: "nt" for a forward (B is a weight [n, k]), "nn" for dX, "tn" for dW."""
        import torch

        key = (m, k, n, layout)
        if key in self._known:
            return self._known[key]

        def operand(rows: int, columns: int, transposed: bool) -> Any:
            size = (columns, rows) if transposed else (rows, columns)
            tensor = torch.randn(size, device=self.device, dtype=torch.bfloat16)
            return tensor.t() if transposed else tensor

        calls: list[Call] = []
        for _ in range(copies(2 * (m * k + k * n), self.device)):
            a, b = operand(m, k, layout == "tn"), operand(k, n, layout == "nt")
            out = torch.empty(m, n, device=self.device, dtype=torch.bfloat16)
            calls.append(partial(torch.mm, a, b, out=out))
        if self.device == "cpu":
            found = [(time_ms(calls, self.device), "cpu")]
        else:
            usual = torch.backends.cuda.preferred_blas_library()
            found = []
            for library in ("cublas", "cublaslt"):
                torch.backends.cuda.preferred_blas_library(library)
                found.append((time_ms(calls, self.device), library))
            torch.backends.cuda.preferred_blas_library(usual)
        self._known[key] = min(found)
        return self._known[key]

    def grouped(self, load: list[int], k: int, n: int, layout: str) -> tuple[float, str]:
        """Products of each expert's rows, so many as `load` says, with its own weight [n, k]. See `best`."""
        import torch

        def random(*size: int) -> Any:
            return torch.randn(size, device=self.device, dtype=torch.bfloat16)

        x, dy, w = random(sum(load), k), random(sum(load), n), random(len(load), n, k)
        left, right, size = {
            "nt": (x.split(load), w.mT, dy.shape), "nn": (dy.split(load), w, x.shape),
            "tn": ([part.t() for part in dy.split(load)], x.split(load), w.shape),
        }[layout]  # fmt: skip
        out = torch.empty(size, device=self.device, dtype=torch.bfloat16)
        outs = out if layout == "tn" else out.split(load)

        def one_by_one() -> None:
            for a, b, c in zip(left, right, outs):
                torch.mm(a, b, out=c)

        # one set of operands: the weights of all experts do not fit in the cache
        if self.device == "cpu":
            return time_ms([one_by_one], self.device), "cpu"
        usual = torch.backends.cuda.preferred_blas_library()
        found = []
        for library in ("cublas", "cublaslt"):
            torch.backends.cuda.preferred_blas_library(library)
            found.append((time_ms([one_by_one], self.device), f"{library}, one by one"))
        torch.backends.cuda.preferred_blas_library(usual)
        ends = torch.tensor(list(itertools.accumulate(load)), dtype=torch.int32, device=self.device)
        operands = {"nt": (x, w.mT), "nn": (dy, w), "tn": (dy.t(), x)}[layout]
        grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
        try:
            found.append((time_ms([partial(grouped_mm, *operands, offs=ends)], self.device), "grouped_mm"))
        except RuntimeError as error:  # it does not take this case
            print(f"  grouped_mm: {str(error).splitlines()[0]}", file=sys.stderr)
        return min(found)

    def siblings(self, t: int, k: int, widths: list[int], layout: str) -> tuple[float, str]:
        """Projections of one input [t, k] to `widths`: stacked into one GEMM or apart, whichever is faster."""

        def shape(n: int) -> tuple[int, int, int]:
            return {"nt": (t, k, n), "nn": (t, n, k), "tn": (n, t, k)}[layout]

        stacked = self.best(*shape(sum(widths)), layout)
        if len(widths) == 1:
            return stacked
        apart = sum(self.best(*shape(n), layout)[0] for n in widths)
        return min((stacked[0], f"stacked, {stacked[1]}"), (apart, "apart"))


def attention(shape: Shape, sizes: list[int], device: str, *, variable: bool = False) -> dict[str, tuple[float, str]]:
    """Best causal attention inside each of documents of these sizes: milliseconds and what gave them, for both ways.

    Documents of one size may be the rows of a batch. `variable`: also as one row of FlashAttention's variable-length
    form, which is the only one that knows sliding windows.
    """
    import torch

    window = shape.sliding_window if shape.sliding_window and shape.sliding_window < max(sizes) else None
    candidates: list[tuple[str, Any, Call]] = []
    if device == "cpu":
        candidates.append(_one_by_one(shape, sizes, window))
    else:
        if len(set(sizes)) == 1 and window is None:
            candidates += _batched(shape, len(sizes), sizes[0], device)
        if variable or window is not None:
            candidates.append(_variable(shape, sizes, window, device))
    found: dict[str, list[tuple[float, str]]] = {"forward": [], "backward": []}
    for name, operands, forward in candidates:
        try:
            out = forward()
        except RuntimeError as error:  # this backend does not take this case
            print(f"  {name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        backward = partial(torch.autograd.grad, out, operands, torch.randn_like(out), retain_graph=True)
        with torch.no_grad():
            found["forward"].append((time_ms([forward] * 4, device), name))
        found["backward"].append((time_ms([backward] * 4, device), name))
    return {way: min(times) for way, times in found.items()}


def _operands(shape: Shape, size: Callable[[int], tuple[int, ...]], device: str, swap: bool = False) -> tuple[Any, ...]:
    """q, k, v of these sizes, a function of the number of heads; `swap`: dimensions 1 and 2 as attention wants them."""
    import torch

    tensors = (torch.randn(size(n), device=device, dtype=torch.bfloat16) for n in (shape.heads, *2 * [shape.kv_heads]))
    return tuple((t.transpose(1, 2) if swap else t).requires_grad_() for t in tensors)


def _batched(shape: Shape, batch: int, seq: int, device: str) -> list[tuple[str, Any, Call]]:
    """sdpa over rows of a batch, by each backend and in each layout."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def call(backend: Any, q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    d = shape.head_dim
    layouts = {"[B,S,H,D]": (lambda n: (batch, seq, n, d), True), "[B,H,S,D]": (lambda n: (batch, n, seq, d), False)}
    found: list[tuple[str, Any, Call]] = []
    for layout, (size, swap) in layouts.items():
        operands = _operands(shape, size, device, swap)
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            name = f"{backend.name.split('_')[0].lower()} {layout}"
            found.append((name, operands, partial(call, backend, *operands)))
    return found


def _variable(shape: Shape, sizes: list[int], window: int | None, device: str) -> tuple[str, Any, Call]:
    """The operator that `torch.nn.attention.varlen` wraps, whose arguments are older and stay the same."""
    import torch

    q, k, v = operands = _operands(shape, lambda n: (sum(sizes), n, shape.head_dim), device)
    ends = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device)
    longest, left = max(sizes), -1 if window is None else window - 1

    def forward() -> Any:
        return torch.ops.aten._flash_attention_forward(
            q, k, v, ends, ends, longest, longest, 0.0, True, False, window_size_left=left, window_size_right=0
        )[0]

    return f"variable length, {len(sizes)} documents", operands, forward


def _one_by_one(shape: Shape, sizes: list[int], window: int | None) -> tuple[str, Any, Call]:
    """For a CPU, where only the script is looked at."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    operands = _operands(shape, lambda n: (n, sum(sizes), shape.head_dim), "cpu")

    def forward() -> Any:
        outs = []
        for n, q, k, v in zip(sizes, *(t.split(sizes, 1) for t in operands)):
            mask = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - (window or n))
            outs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))
        return torch.cat(outs, 1)

    return "cpu", operands, forward


def attention_flops(shape: Shape, sizes: list[int]) -> float:
    """Of the forward: two GEMMs over the triangle of each document, as far as the window reaches. Backward has five."""

    def pairs(n: int) -> float:
        w = min(n, shape.sliding_window or n)
        return n * w - w * w / 2

    return 4.0 * shape.heads * shape.head_dim * sum(map(pairs, sizes))


def expert_loads(case: Case, rows: list[records.Row]) -> tuple[list[list[int]], str]:
    """Rows of each expert in some layers of a mixture, and where that is from.

    `rows` are those of a results file; a load of other tokens, as with padding left in, is none of this case.
    """
    shape, title = SHAPES[case.model], report.floor_title(case)
    pairs = sum(documents(case)) * shape.experts_per_token
    for row in reversed(rows):
        loads = row.get("expert_load")
        if loads and report.floor_title(records.case_of(row)) == title and {sum(load) for load in loads} == {pairs}:
            some = loads[:: max(1, len(loads) // LAYERS)][:LAYERS]
            return some, f"the load of {row['label']} in run {row['run']}, {len(some)} of {len(loads)} layers"
    return [experts.pairs_even(pairs, shape.experts)], "an even load"


def _expert_parts(case: Case, gemms: Gemms, loads: list[list[int]]) -> list[Part]:
    """The large products of a mixture's experts; the time of one is the mean over layers."""
    shape = SHAPES[case.model]
    layers = case.layers or shape.layers
    ways = {"forward": ("nt", (2 if case.checkpointing else 1) * layers), "dX": ("nn", layers)}
    if case.mode == "full":
        ways["dW"] = ("tn", layers)
    parts = []
    for name, k, n in (
        ("gate_up", shape.hidden, 2 * shape.intermediate), ("down", shape.intermediate, shape.hidden),
    ):  # fmt: skip
        for way, (layout, calls) in ways.items():
            found = [gemms.grouped(load, k, n, layout) for load in loads]
            ms = sum(one for one, _ in found) / len(found)
            best = " and ".join(sorted({what for _, what in found}))
            parts.append(Part(f"{name} {way}", calls, ms, 2.0 * sum(loads[0]) * k * n, best))
    return parts


def measure(case: Case, gemms: Gemms, loads: list[list[int]] | None = None) -> list[Part]:
    """All parts of a step of `case`; `loads` of a mixture of experts, see `expert_loads`."""
    shape, sizes = SHAPES[case.model], documents(case)
    t = sum(sizes)
    layers = case.layers or shape.layers
    groups = {
        "qkv": (shape.hidden, [shape.heads * shape.head_dim] + 2 * [shape.kv_heads * shape.head_dim]),
        "o": (shape.heads * shape.head_dim, [shape.hidden]),
        "gate_up": (shape.hidden, 2 * [shape.intermediate]),
        "down": (shape.intermediate, [shape.hidden]),
        "lm_head": (shape.hidden, [shape.vocab]),
    }
    runs = 2 if case.checkpointing else 1
    parts = []
    if loads:
        parts += _expert_parts(case, gemms, loads)
        del groups["gate_up"], groups["down"]
    for name, (k, widths) in groups.items():
        count = 1 if name == "lm_head" else layers
        forwards = count if name == "lm_head" else runs * layers
        flops = 2.0 * t * k * sum(widths)
        parts.append(Part(f"{name} forward", forwards, *_timed(gemms.siblings(t, k, widths, "nt"), flops)))
        parts.append(Part(f"{name} dX", count, *_timed(gemms.siblings(t, k, widths, "nn"), flops)))
        if case.mode == "full":
            parts.append(Part(f"{name} dW", count, *_timed(gemms.siblings(t, k, widths, "tn"), flops)))
    flops = attention_flops(shape, sizes)
    for way, found in attention(shape, sizes, case.device, variable=bool(case.packed or case.padding)).items():
        count = runs * layers if way == "forward" else layers
        parts.append(Part(f"attention {way}", count, *_timed(found, flops if way == "forward" else 2.5 * flops)))
    return parts


def dequantised_bytes(case: Case) -> float:
    """Bytes that the dequantisations of a step move: each reads a packed weight and writes 16 bits a value.

    One in the forward and one in the backward; under checkpointing one more in the recompute, but not of the layer's
    last weight, which it does not need.
    """
    shape, runs = SHAPES[case.model], 3 if case.checkpointing else 2
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def moved(n: int, k: int) -> float:
        return quantised.packed_bytes(case.mode, n, k) + 2 * n * k

    attention = moved(queries, shape.hidden) + 2 * moved(keys, shape.hidden) + moved(shape.hidden, queries)
    many = max(1, shape.experts)
    first = attention + many * 2 * moved(shape.intermediate, shape.hidden)
    return (case.layers or shape.layers) * (runs * first + 2 * many * moved(shape.hidden, shape.intermediate))


def _timed(found: tuple[float, str], flops: float) -> tuple[float, float, str]:
    return found[0], flops, found[1]


def record(case: Case, gemms: Gemms, file: str | None) -> None:
    """Measures the floor of `case`, prints it, appends it to the results file."""
    path = Path(file) if file else None
    results = records.load_results(path) if path else {"rows": [], "floors": []}
    loads, source = expert_loads(case, results["rows"]) if SHAPES[case.model].experts else (None, "")
    parts = measure(case, gemms, loads)
    total = sum(part.calls * part.ms for part in parts)
    down = next(part for part in parts if part.name == "down forward")
    less = (case.layers or SHAPES[case.model].layers) * down.ms if case.checkpointing else 0.0
    print(report.floor_title(case) + (f"; experts: {source}" if source else ""))
    for part in parts:
        rate = part.flops / part.ms / 1e9
        print(f"  {part.name:20s} {part.calls:4d} x {1e3 * part.ms:8.1f} us  {rate:6.1f} TFLOP/s  {part.best}")
    print(f"  floor {total:.1f} ms; without the recompute's last GEMM {total - less:.1f} ms", flush=True)
    packed: dict[str, Any] = {}
    if case.mode in quantised.MODES:
        moved, rate = dequantised_bytes(case), copy_gb_s(case.device)
        ms = moved / rate / 1e6
        packed = {"dequantize_ms": ms, "copy_gb_s": rate}
        print(f"  + dequantisation {ms:.1f} ms: {moved / 1e9:.0f} GB at {rate:.0f} GB/s", flush=True)
    if path:
        packed |= {"expert_load": source} if source else {}
        results["floors"].append({
            "title": report.floor_title(case), "total_ms": total, "without_last_gemm_ms": total - less,
            "parts": [part._asdict() for part in parts], "date": datetime.date.today().isoformat(), **packed,
            **records.environment(case.device),
        })  # fmt: skip
        records.save_results(path, results)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-8b", choices=list(SHAPES))
    parser.add_argument("--mode", default="lora", choices=list(MODES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--packed", type=int, default=0, metavar="DOCS", help="rows of so many documents of one length")
    parser.add_argument("--padding", type=float, default=0.0, metavar="SHARE", help="share of padding, 0.5 for half")
    parser.add_argument("--routing", default="text", choices=experts.ROUTINGS, help="of a mixture: which rows' load")
    parser.add_argument("--layers", type=int, help="only so many decoder layers")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--plan", type=Path, help="the floor of each case of a plan of train_step.py, each once")
    parser.add_argument("--json", help="results file to append to")
    options = parser.parse_args(argv)
    if options.plan:
        cases = list({report.floor_title(case): case for case, _ in read_plan(options.plan)}.values())
    else:
        cases = [Case(
            options.model, options.mode, options.batch, options.seq, options.checkpointing,
            layers=options.layers, device=options.device, packed=options.packed, padding=options.padding,
            routing=options.routing,
        )]  # fmt: skip
    gemms = {case.device: Gemms(case.device) for case in cases}
    for case in cases:
        record(case, gemms[case.device], options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
