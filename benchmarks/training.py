"""What a worker does before and while it measures: imports, waits for its turn, builds, and trains."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import records
import setups
import shapes
import workers
from shapes import Arm, Case

PACKAGES = {"fast": "fast_unsloth_patch", "liger": "liger_kernel", "unsloth": "unsloth"}
LEARNING_RATE = {"lora": 2e-4, "full": 1e-5, "qlora": 2e-4, "gptq": 2e-4}


class Phases:
    """Seconds of each part of the worker's life, said as they pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def done(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now
        print(f"> {name} {self.seconds[name]:.1f} s", flush=True)


class Trainer:
    """The training step of a case: forward, backward, clip, AdamW; losses and norms stay on the device."""

    def __init__(self, model: Any, case: Case) -> None:
        import torch

        self.model, self.case = model, case
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE[case.mode], weight_decay=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(case.device, enabled=case.dtype == "fp16")
        self.losses: list[Any] = []
        self.grad_norms: list[Any] = []

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        if self.case.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.case.device, torch.bfloat16 if self.case.dtype == "bf16" else torch.float16)

    def loss(self, inputs: dict[str, Any]) -> Any:
        with self.autocast():
            return self.model(**inputs).loss

    def step(self, inputs: dict[str, Any]) -> None:
        import torch

        loss = self.loss(inputs)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        # clip_grad_norm_ in two parts: its own norm of bf16 gradients is bf16, too coarse to compare.
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2.0, dtype=torch.float32)))
        torch.nn.utils.clip_grads_with_norm_(self.parameters, 1.0, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())
        self.grad_norms.append(norm.detach())

    def timed(self, inputs: dict[str, Any]) -> float:
        """Seconds of a step, the device synchronised before and after."""
        self.synchronize()
        start = time.perf_counter()
        self.step(inputs)
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        import torch

        if self.case.device == "cuda":
            torch.cuda.synchronize()


def absent(case: Case, arm: Arm) -> str | None:
    """Why an arm cannot run here, if it cannot."""
    if case.mode == "gptq" and arm.impl not in ("stock", "fast"):
        return f"{arm.impl} has no fast path for GPTQ"
    if case.mode == "qlora" and shapes.SHAPES[case.model].experts and arm.impl != "fast":
        return f"{arm.impl} leaves experts in 16 bits under load_in_4bit"
    needed = [PACKAGES[arm.impl]] if arm.impl in PACKAGES else []
    if case.rounded:
        needed.append("bitsandbytes")
    for package in (*needed, *shapes.MODES[case.mode][1]):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if arm.impl == "unsloth" and case.device != "cuda":
        return "unsloth needs a CUDA device"
    return None


def import_and_wait(case: Case, arm: Arm, phases: Phases) -> bool:
    """Imports, then waits for the driver; whether the imports made a context on the GPU."""
    setups.SETUPS[arm.impl].imports(case, arm)
    import torch

    # a context on the GPU that another worker may be measuring; to have asked for the device's properties is none
    cuda_at_import = torch.cuda.is_initialized() and torch._C._cuda_hasPrimaryContext(0)  # type: ignore[attr-defined]
    phases.done("import")
    workers.await_go()
    phases.done("wait")
    return bool(cuda_at_import)


def build(case: Case, arm: Arm, phases: Phases) -> Trainer:
    """The arm's model with the weights that all arms have, ready for its first step.

    Raises:
        ValueError: the implementation built other base weights or adapters than the case asks for.
    """
    import torch

    model = setups.SETUPS[arm.impl].build(case, arm, phases.done)
    model.train()
    if problem := shapes.build_problem(model, case):
        raise ValueError(problem)
    shapes.fill(model, case)
    torch.manual_seed(0)
    phases.done("build")
    return Trainer(model, case)


def fast_status() -> dict[str, Any]:
    import fast_unsloth_patch

    return fast_unsloth_patch.status().to_dict()


def run_worker(work: Callable[[dict[str, Any], Path], dict[str, Any]], spec_file: str, out_file: str) -> None:
    """A worker's process: `work` on the specification that the driver wrote, its result or its failure written.

    Args:
        work: gets the specification and the file of the result, where it may leave what it has so far.
        spec_file, out_file: as `workers.Worker` names them.
    """
    # The folder of a script comes first on sys.path, and `benchmarks/kernels.py` would pass there for Hugging Face's
    # package `kernels`; the checkout has to come first for `fast` to be what is measured.
    sys.path[0] = str(records.ROOT)
    try:
        result = work(json.loads(Path(spec_file).read_text()), Path(out_file))
    except Exception as error:  # whatever a peer raises is a row of the results, not the end of the run
        traceback.print_exc()
        status = "oom" if type(error).__name__ == "OutOfMemoryError" else "failed"
        result = {"status": status, "reason": f"{type(error).__name__}: {error}"[:600]}
    workers.write_result(Path(out_file), result)
