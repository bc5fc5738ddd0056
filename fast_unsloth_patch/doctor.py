"""``python -m fast_unsloth_patch doctor``: what will run fast on this machine, and why something will not.

Checks the installed versions, the start-up file, the GPU, every op (a real forward and backward against its reference
in float64) and every patch (really installed, so another patcher is noticed). Exit status 0: good; 1: degraded,
something runs stock or without a GPU; 2: broken, something is missing or computes wrong.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from . import __version__, apply, bootstrap, compat, registry, status, unapply
from .errors import FastPatchWarning
from .install import is_absent

if TYPE_CHECKING:
    import torch

# From best to worst; a note does not count.
_EXIT = {"ok": 0, "note": 0, "degraded": 1, "broken": 2}
_VERDICTS = ("good", "degraded", "broken")

# Without these nothing can be patched; the others only take something away.
_ESSENTIAL = ("torch", "transformers", "wrapt")

# They replace the same forwards when a script uses them.
_OTHER_PATCHERS = ("unsloth", "liger-kernel")

# Relative L2 error against float64. The longest chain is the MLP's backward, five GEMMs: fp32 within the contract;
# bf16 rounds (relative 2^-9, uniform: RMS 2^-9 / sqrt(3)) some ten times on the way.
_TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}


class Check(NamedTuple):
    """One finding: ``state`` is ``"ok"``, ``"note"``, ``"degraded"`` or ``"broken"``."""

    section: str
    name: str
    state: str
    detail: str


def main(argv: list[str]) -> int:
    """Run every check and print them as they come, or with ``--json`` one object at the end; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fast_unsloth_patch doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    as_json = parser.parse_args(argv).json
    found = []
    for check in checks():
        found.append(check)
        if not as_json:
            print(f"{check.state:<9}{check.section:<12}{check.name:<30}{check.detail}", flush=True)
    worst = max(_EXIT[check.state] for check in found)
    if as_json:
        rows = [check._asdict() for check in found]
        print(json.dumps({"verdict": _VERDICTS[worst], "exit": worst, "checks": rows}, indent=1))
    else:
        print("", _VERDICTS[worst], *(f"  {c.name}: {c.detail}" for c in found if _EXIT[c.state]), sep="\n")
    return worst


def checks() -> Iterator[Check]:
    """Every check, in order; what cannot be checked for want of a package is left out."""
    sections = [_environment, _versions, _startup]
    if compat.outside_window("torch") is None:
        sections += [_gpu, _ops]
    if all(compat.outside_window(name) is None for name in _ESSENTIAL):
        sections.append(_patches)
    for section in sections:
        try:
            yield from section()
        except Exception as error:  # Whatever is wrong with this machine is what the doctor was called for.
            yield Check(section.__name__.strip("_"), "failed", "broken", _describe(error))


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _environment() -> Iterator[Check]:
    yield Check("environment", "fast_unsloth_patch", "ok", f"{__version__} in {os.path.dirname(__file__)}")
    yield Check("environment", "python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for name, value in sorted(os.environ.items()):
        if name.startswith(bootstrap.VARIABLE) or name == "TRITON_INTERPRET":
            yield Check("environment", name, "note", value)
    for name in _OTHER_PATCHERS:
        if (version := compat.installed(name)) is not None:
            detail = f"{version} is installed: what it patches in a script runs its way, not ours; use one of them"
            yield Check("environment", name, "note", detail)


def _versions() -> Iterator[Check]:
    for name, version in compat.versions().items():
        problem = compat.outside_window(name)
        if problem is None:
            yield Check("versions", name, "ok", f"{version} ({compat.window(name)})")
        elif name == "triton" and not _has_cuda():
            yield Check("versions", name, "note", problem)
        else:
            yield Check("versions", name, "broken" if name in _ESSENTIAL else "degraded", problem)


def _has_cuda() -> bool:
    if compat.outside_window("torch") is not None:
        return False
    import torch

    return torch.cuda.is_available()


def _startup() -> Iterator[Check]:
    """Ask a fresh interpreter with ``FAST_UNSLOTH=1`` whether it got a call from the start-up file."""
    code = "import sys; b = sys.modules.get('fast_unsloth_patch.bootstrap'); print(b is not None and b.armed())"
    child = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {bootstrap.VARIABLE: "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if child.stdout.strip() == "True":
        yield Check("startup", "start-up file", "ok", f"{bootstrap.VARIABLE}=1 works for every script")
        return
    detail = "not active here (no installed package, or start-up files are not read): "
    detail += f"{bootstrap.VARIABLE}=1 needs `python -m fast_unsloth_patch run`; apply() works"
    # Whoever has set the variable believes that it does something.
    yield Check("startup", "start-up file", "degraded" if bootstrap.mode() in ("on", "strict") else "note", detail)


def _gpu() -> Iterator[Check]:
    import torch

    from .device.dispatch import unsupported

    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA in this torch"
        yield Check("gpu", "no GPU", "degraded", f"{built}: the ops run their PyTorch reference, no faster than stock")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        reason = unsupported(torch.empty(1, device=f"cuda:{index}"))
        detail = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
        state = "ok" if reason is None else "degraded"
        yield Check("gpu", f"cuda:{index}", state, detail + ("" if reason is None else f": runs stock ({reason})"))


def _patches() -> Iterator[Check]:
    """Install everything as a script would, with the variables that are set, and see what declines."""
    was_active = status().environment["active"]
    absent = {patch.id for patch in registry.PATCHES if is_absent(patch)}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            apply()
            for module in {patch.module: None for patch in registry.PATCHES if patch.id not in absent}:
                if compat.outside_window(module.partition(".")[0]) is None:
                    importlib.import_module(module)
        # What declines has its reason in its row; this is about variables.
        for warning in caught:
            if issubclass(warning.category, FastPatchWarning) and "#activation" in str(warning.message):
                yield Check("patches", "configuration", "degraded", str(warning.message))
        for row in status().rows:
            state = "ok" if row.state == "applied" else "note" if row.id in absent else "degraded"
            yield Check("patches", row.id, state, f"{row.state}: {row.reason}" if row.reason else row.state)
    finally:
        if not was_active:
            unapply()


def _ops() -> Iterator[Check]:
    import torch

    from .device.dispatch import unsupported

    device = "cuda" if torch.cuda.is_available() and unsupported(torch.empty(1, device="cuda")) is None else "cpu"
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    for dtype in dtypes:
        for case in op_cases():
            yield _check_op(case, device, dtype)


class OpCase(NamedTuple):
    """An op and its reference, both called with (*inputs, *constants); gradients are taken for the inputs."""

    name: str
    op: Callable[..., Any]
    ref: Callable[..., Any]
    inputs: list[torch.Tensor]
    constants: list[torch.Tensor]


def _check_op(case: OpCase, device: str, dtype: torch.dtype) -> Check:
    import torch

    from .device.dispatch import use_triton

    name = str(dtype).removeprefix("torch.")
    start = time.perf_counter()
    try:
        forward, backward = op_errors(case, device, dtype)
    except Exception as error:  # As in checks(): the other ops are still worth knowing about.
        return Check("ops", f"{case.name} {name}", "broken", _describe(error))
    good = max(forward, backward) <= _TOLERANCES[name]
    kind = "Triton" if use_triton(torch.empty(0, device=device, dtype=dtype)) else "reference"
    detail = f"error {forward:.1e} forward, {backward:.1e} backward"
    detail += f" ({kind} on {device}, {time.perf_counter() - start:.1f} s)"
    return Check("ops", f"{case.name} {name}", "ok" if good else "broken", detail)


def op_errors(case: OpCase, device: str, dtype: torch.dtype) -> tuple[float, float]:
    """The largest relative L2 error of an output, and of a gradient, against the reference in float64.

    Not a number counts as infinite.
    """
    import torch

    def run(function: Callable[..., Any], place: str, precision: torch.dtype) -> tuple[list[Any], list[Any]]:
        def cast(t: torch.Tensor) -> torch.Tensor:
            return t.to(dtype).to(place, precision) if t.is_floating_point() else t.to(place)

        leaves = [cast(t).requires_grad_() for t in case.inputs]
        out = function(*leaves, *map(cast, case.constants))
        outputs = list(out) if isinstance(out, tuple) else [out]
        draw = torch.Generator().manual_seed(1)
        directions = [cast(torch.randn(t.shape, generator=draw)).to(t.dtype) for t in outputs]
        return outputs, list(torch.autograd.grad(outputs, leaves, directions))

    def worst(got: list[Any], wanted: list[Any]) -> float:
        errors = [float((g.detach().cpu().double() - w).norm() / w.norm()) for g, w in zip(got, wanted)]
        return max(error if error == error else float("inf") for error in errors)

    (out, grads), (out_ref, grads_ref) = run(case.op, device, dtype), run(case.ref, "cpu", torch.float64)
    return worst(out, [t.detach() for t in out_ref]), worst(grads, grads_ref)


def op_cases() -> Iterator[OpCase]:
    """Every op at a small shape: 2 x 33 tokens (no multiple of a tile), 128 wide, 4 heads over 2, LoRA of rank 8."""
    import torch

    from .ops.linear_cross_entropy import linear_cross_entropy
    from .ops.lora_experts import ExpertAdapter, ExpertProjection, lora_experts
    from .ops.lora_linear import Adapter, Projection, lora_linear
    from .ops.lora_mlp import lora_mlp
    from .ops.lora_qkv import lora_qkv
    from .ops.rms_norm import rms_norm
    from .ops.rope import rope
    from .ops.swiglu import swiglu
    from .reference.experts import lora_experts_ref
    from .reference.linear_cross_entropy import linear_cross_entropy_ref
    from .reference.lora import lora_linear_ref, lora_mlp_ref, lora_qkv_ref
    from .reference.rms_norm import rms_norm_ref
    from .reference.rope import rope_ref
    from .reference.swiglu import swiglu_ref

    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * scale

    def weight(n: int, k: int) -> torch.Tensor:
        return normal(n, k, scale=k**-0.5)

    def adapter(n: int, k: int) -> list[torch.Tensor]:
        return [weight(8, k), weight(n, 8)]

    def adapted(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Projection:
        return Projection(w, None, Adapter(a, b, 2.0))

    x, wide = normal(2, 33, 128), (192, 128)
    angles = torch.outer(torch.arange(33.0), 100.0 ** (-torch.arange(16) / 16)).repeat(1, 2)[None]
    turns = [angles.cos(), angles.sin()]

    def linear(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, a, b, w: function(x, adapted(w, a, b))

    def qkv(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x, aq, bq, av, bv, wq, wk, wv, cos, sin):
            return function(x, adapted(wq, aq, bq), Projection(wk, None, None), adapted(wv, av, bv), cos, sin, 32)

        return call

    def mlp(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x, ag, bg, au, bu, ad, bd, wg, wu, wd):
            return function(x, adapted(wg, ag, bg), adapted(wu, au, bu), adapted(wd, ad, bd))

        return call

    def experts(x, weights, ag, bg, ad, bd, index, wg, wd):
        stacks = [(wg, ag, bg), (wd, ad, bd)]
        return lora_experts(
            x, index, weights, *[ExpertProjection(w, ExpertAdapter(a, b, 2.0)) for w, a, b in stacks]
        )  # fmt: skip

    def experts_ref(x, weights, ag, bg, ad, bd, index, wg, wd):
        return lora_experts_ref(x, index, weights, (wg, ag, bg, 2.0), (wd, ad, bd, 2.0))

    def norm(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, w: function(x, w, 1e-6)

    labels = torch.arange(66) % 50
    labels[::7] = -100
    yield OpCase("rms_norm", norm(rms_norm), norm(rms_norm_ref), [x, 1 + normal(128, scale=0.1)], [])
    yield OpCase("rope", rope, rope_ref, [normal(2, 4, 33, 32), normal(2, 2, 33, 32)], turns)
    yield OpCase("swiglu", swiglu, swiglu_ref, [normal(2, 33, 192), normal(2, 33, 192)], [])
    yield OpCase("lora_linear", linear(lora_linear), linear(lora_linear_ref), [x, *adapter(*wide)], [weight(*wide)])
    yield OpCase(
        "lora_qkv",
        qkv(lora_qkv),
        qkv(lora_qkv_ref),
        [x, *adapter(128, 128), *adapter(64, 128)],
        [weight(128, 128), weight(64, 128), weight(64, 128), *turns],
    )
    yield OpCase(
        "lora_mlp",
        mlp(lora_mlp),
        mlp(lora_mlp_ref),
        [x, *adapter(*wide), *adapter(*wide), *adapter(128, 192)],
        [weight(*wide), weight(*wide), weight(128, 192)],
    )
    # Two experts a token of four, of which one gets no token.
    index = torch.stack((torch.arange(66) % 2, torch.full((66,), 3)), 1)
    yield OpCase(
        "lora_experts",
        experts,
        experts_ref,
        [
            normal(66, 128),
            torch.rand(66, 2, generator=draw),
            weight(32, 128),
            weight(384, 32),
            weight(32, 192),
            weight(128, 32),
        ],
        [index, normal(4, 384, 128, scale=128**-0.5), normal(4, 128, 192, scale=192**-0.5)],
    )
    yield OpCase(
        "linear_cross_entropy",
        linear_cross_entropy,
        linear_cross_entropy_ref,
        [normal(66, 128), weight(50, 128)],
        [labels],
    )
