"""Every op, forward and backward, against what the device can do and against eager PyTorch and Liger.

    python benchmarks/kernels.py --json benchmarks/results/h200.json
    python benchmarks/kernels.py --ops rms_norm,swiglu --models llama-8b --tokens 512

A line shows the device's time, the rate, its share of the limit measured in the same run (a large copy for what moves
bytes, a large bf16 GEMM for what multiplies), the time the host needs to enqueue one call, and beside it the relative
error of outputs and gradients against the same formula in float64. Exit code 1 if an op of ours is further off than
PyTorch's own rounding explains.

A new op is one function that returns a `Bench`, and one row in `OPS`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch
from floor import copies, time_ms
from shapes import SHAPES, Shape
from torch import Tensor

if __name__ == "__main__":
    # The folder of a script comes first on sys.path, where this file would pass for Hugging Face's `kernels`;
    # the checkout has to come first for its code to be what is measured.
    sys.path[0] = str(report.ROOT)

from fast_unsloth_patch import reference
from fast_unsloth_patch.ops.rms_norm import rms_norm
from fast_unsloth_patch.ops.rope import rope
from fast_unsloth_patch.ops.swiglu import swiglu

DTYPE = torch.bfloat16
EPS = 1e-5


class Bench(NamedTuple):
    """One op at one size: its operands, who computes it, and the work that nobody can avoid."""

    inputs: tuple[Tensor, ...]  # those that require grad are differentiated
    impls: dict[str, Callable[..., Any]]  # "fast", "torch" (also the float64 oracle) and, where there is one, "liger"
    work: tuple[float, float]  # of forward and backward: bytes, or floating-point operations if `gemm`
    gemm: bool = False


def _liger(module: str, name: str) -> Callable[..., Any] | None:
    try:
        found = importlib.import_module(f"liger_kernel.ops.{module}")
    except ImportError:
        return None
    apply: Callable[..., Any] = getattr(found, name).apply
    return apply


def _impls(fast: Callable[..., Any], torch_: Callable[..., Any], liger: Callable[..., Any] | None) -> dict[str, Any]:
    return {"fast": fast, "torch": torch_} | ({"liger": liger} if liger else {})


def _randn(*shape: int, device: str, grad: bool = True) -> Tensor:
    return torch.randn(shape, device=device).to(DTYPE).requires_grad_(grad)


def _rms_norm(shape: Shape, tokens: int, device: str, *, trainable: bool) -> Bench:
    x = _randn(tokens, shape.hidden, device=device)
    weight = (1 + 0.1 * torch.randn(shape.hidden, device=device)).to(DTYPE).requires_grad_(trainable)
    liger = _liger("rms_norm", "LigerRMSNormFunction")
    return Bench(
        (x, weight),
        _impls(
            lambda x, w: rms_norm(x, w, EPS),
            lambda x, w: reference.rms_norm_ref(x, w, EPS),
            liger and (lambda x, w: liger(x, w, EPS)),
        ),
        (2.0 * x.nbytes, 3.0 * x.nbytes),
    )


def _rope(shape: Shape, tokens: int, device: str) -> Bench:
    seq = min(tokens, 2048)
    batch = tokens // seq
    # As attention has them: [B, S, heads, D] seen as [B, heads, S, D].
    q, k = (
        _randn(batch, seq, heads, shape.head_dim, device=device, grad=False).transpose(1, 2).requires_grad_()
        for heads in (shape.heads, shape.kv_heads)
    )
    positions = torch.arange(seq, device=device)[:, None]
    frequencies = 1e4 ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
    angles = torch.cat([positions * frequencies] * 2, dim=-1)[None]
    moved = 2.0 * (q.nbytes + k.nbytes)
    return Bench(
        (q, k, angles.cos().to(DTYPE), angles.sin().to(DTYPE)),
        _impls(rope, reference.rope_ref, _liger("rope", "LigerRopeFunction")),
        (moved, moved),
    )


def _swiglu(shape: Shape, tokens: int, device: str) -> Bench:
    gate, up = (_randn(tokens, shape.intermediate, device=device) for _ in range(2))
    return Bench(
        (gate, up),
        _impls(swiglu, reference.swiglu_ref, _liger("swiglu", "LigerSiLUMulFunction")),
        (3.0 * gate.nbytes, 5.0 * gate.nbytes),
    )


OPS: dict[str, Callable[[Shape, int, str], Bench]] = {
    "rms_norm": lambda shape, tokens, device: _rms_norm(shape, tokens, device, trainable=False),
    "rms_norm_dw": lambda shape, tokens, device: _rms_norm(shape, tokens, device, trainable=True),
    "rope": _rope,
    "swiglu": _swiglu,
}


class Limits(NamedTuple):
    """What this device did in this run."""

    copy_gb_s: float
    gemm_tflop_s: float


def measure_limits(device: str) -> Limits:
    """A copy of 1 GiB, bytes read and written counted; the best of three large bf16 GEMMs."""
    scale = 1 if device == "cuda" else 64
    a = torch.empty(2**30 // scale, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / time_ms([lambda: b.copy_(a)], device) / 1e6
    rates = []
    for m, n, k in ((8192, 14336, 4096), (8192, 4096, 14336), (8192, 8192, 8192)):
        m, n, k = m // scale, n // scale, k // scale
        x, w = torch.randn(m, k, device=device).to(DTYPE), torch.randn(n, k, device=device).to(DTYPE)
        ms = time_ms([partial(torch.mm, x, w.T)], device)
        rates.append(2.0 * m * n * k / ms / 1e9)
    return Limits(copy, max(rates))


def _outputs(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _run(fn: Callable[..., Any], inputs: tuple[Tensor, ...], grads: list[Tensor]) -> list[Tensor]:
    out = _outputs(fn(*inputs))
    # Clones: Liger writes into the gradient it is given.
    given = [g.to(o.dtype).clone() for g, o in zip(grads, out, strict=True)]
    wanted = [t for t in inputs if t.requires_grad]
    return [*(o.detach().clone() for o in out), *torch.autograd.grad(out, wanted, given)]


def parity(bench: Bench) -> dict[str, tuple[float, ...]]:
    """Implementation -> relative error (L2) of each output and gradient against float64."""
    grads = [torch.randn_like(o) for o in _outputs(bench.impls["torch"](*bench.inputs))]
    wide = tuple(
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in bench.inputs
    )
    want = _run(bench.impls["torch"], wide, grads)
    errors = {}
    for name, fn in bench.impls.items():
        # Copies: Liger's backward writes over what it saved.
        own = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in bench.inputs)
        got = _run(fn, own, grads)
        errors[name] = tuple(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))
    return errors


def agrees(ours: tuple[float, ...], torchs: tuple[float, ...]) -> bool:
    """No result of ours is off by more than twice PyTorch's own rounding (one run; the tests hold it tighter)."""
    return all(a <= max(2 * b, 1e-6) for a, b in zip(ours, torchs, strict=True))


def host_us(call: Callable[[], object], device: str) -> float:
    """Microseconds until the call returns, with the device kept busy so that it never waits for it."""
    best = float("inf")
    for _ in range(3):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(20_000_000)
        start = time.perf_counter()
        for _ in range(20):
            call()
        best = min(best, (time.perf_counter() - start) / 20 * 1e6)
    return best


def measure(build: Callable[[], Bench], limits: Limits, device: str) -> list[report.Row]:
    """One row an implementation and direction."""
    first = build()
    errors = parity(first)
    sets = [first, *(build() for _ in range(copies(sum(t.nbytes for t in first.inputs), device) - 1))]
    rows: list[report.Row] = []
    for impl, fn in first.impls.items():
        calls: dict[str, list[Callable[[], object]]] = {"forward": [], "backward": []}
        for bench in sets:
            wanted = [t for t in bench.inputs if t.requires_grad]
            out = _outputs(fn(*bench.inputs))
            given = [torch.randn_like(o) for o in out]
            calls["forward"].append(partial(fn, *bench.inputs))
            calls["backward"].append(partial(torch.autograd.grad, out, wanted, given, retain_graph=True))
        for direction, work in zip(calls, first.work, strict=True):
            ms = time_ms(calls[direction], device)
            rate = work / ms / (1e9 if first.gemm else 1e6)
            rows.append({
                "impl": impl, "direction": direction, "ms": ms, "rate": rate,
                "unit": "TFLOP/s" if first.gemm else "GB/s",
                "share": rate / (limits.gemm_tflop_s if first.gemm else limits.copy_gb_s),
                "host_us": host_us(calls[direction][0], device), "errors": errors[impl],
                "ok": impl != "fast" or agrees(errors["fast"], errors["torch"]),
            })  # fmt: skip
    return rows


def _line(row: report.Row) -> str:
    errors = " ".join(f"{e:.1e}" for e in row["errors"])
    return (
        f"  {row['direction']:8s} {row['impl']:6s} {1e3 * row['ms']:9.1f} us {row['rate']:8.1f} {row['unit']:7s} "
        f"{100 * row['share']:4.0f} %  host {row['host_us']:6.1f} us  error {errors}{'' if row['ok'] else '  DIFFERS'}"
    )


def _save(path: Path, rows: list[report.Row], limits: Limits, device: str) -> None:
    results: dict[str, list[report.Row]] = report.load_results(path)
    mine = {(row["op"], row["model"], row["tokens"]) for row in rows}
    kept = [r for r in results.get("kernels", []) if (r["op"], r["model"], r["tokens"]) not in mine]
    stamp = {"date": datetime.date.today().isoformat(), "limits": limits._asdict(), **report.environment(device)}
    results["kernels"] = kept + [row | stamp for row in rows]
    report.save_results(path, results)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", help=f"comma-separated, of {', '.join(OPS)}; default all")
    parser.add_argument("--models", default="llama-8b,llama-1b", help="comma-separated shapes")
    parser.add_argument("--tokens", default="512,8192", help="comma-separated")
    parser.add_argument("--cpu", action="store_true", help="run the reference paths, to see that the script works")
    parser.add_argument("--tiny", action="store_true", help="the smallest shape and 16 tokens only")
    parser.add_argument("--json", type=Path, help="results file to put the rows into")
    options = parser.parse_args(argv)
    names = options.ops.split(",") if options.ops else list(OPS)
    models = ["tiny"] if options.tiny else options.models.split(",")
    for kind, given, known in (("--ops", names, OPS), ("--models", models, SHAPES)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{kind}: no {', '.join(unknown)}; there are {', '.join(known)}")
    device = "cpu" if options.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --cpu --tiny shows that the script works")
    torch.manual_seed(0)
    limits = measure_limits(device)
    print(f"copy {limits.copy_gb_s:.0f} GB/s, GEMM {limits.gemm_tflop_s:.0f} TFLOP/s; errors: outputs, then gradients")
    rows: list[report.Row] = []
    for model in models:
        for tokens in [16] if options.tiny else map(int, options.tokens.split(",")):
            for name in names:
                print(f"{name}, {SHAPES[model].title}, {tokens} tokens", flush=True)
                found = measure(partial(OPS[name], SHAPES[model], tokens, device), limits, device)
                for row in found:
                    print(_line(row), flush=True)
                rows += [{"op": name, "model": model, "tokens": tokens} | row for row in found]
    if options.json:
        _save(options.json, rows, limits, device)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
