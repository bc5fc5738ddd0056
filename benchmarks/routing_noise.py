"""How far bf16 runs of a mixture of experts part, where experts are chosen from text, and from what.

    python benchmarks/routing_noise.py
    python benchmarks/routing_noise.py --cpu --tiny

A gate has close decisions. Any other rounding takes some of them otherwise, sends a token elsewhere, and what that
changes decides others. So losses and gradient norms of two correct implementations differ by more than of a dense
model, and nearness to stock says little. Printed are

* for one step: the loss, the losses of the tokens, the share of tokens that a layer's gate sends elsewhere, and the
  gradients of all adapters, each against the same model in fp32 with its experts one by one;
* for a run of eleven steps: the largest difference of losses and of gradient norms between each two arms, of which two
  are the same code twice.

The arms share one model; stock runs under `disabled()`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import records
import setups
import shapes
import torch
import torch.nn.functional as F
import training
from batches import Batches
from experts import gates
from shapes import Arm, Case
from torch import Tensor

if __name__ == "__main__":
    # As `training.run_worker`: the checkout comes first, and this folder, with its `kernels.py`, is not on the path.
    sys.path[0] = str(records.ROOT)

ONE_BY_ONE = "eager"


class Noise(NamedTuple):
    """An arm in one step: its loss, and how far it is from the same model in fp32."""

    loss: float
    per_token: float  # RMS of the differences of the tokens' losses
    elsewhere: list[float]  # of each layer, the share of tokens with another set of experts
    gradients: float  # of all adapters, relative


class _Step(NamedTuple):
    loss: float
    tokens: Tensor
    chosen: list[Tensor]
    gradients: dict[str, Tensor]


@contextlib.contextmanager
def _chosen(model: Any) -> Iterator[list[Tensor]]:
    """While this is entered: the experts of each token, in order, of every call of a gate."""
    found: list[Tensor] = []
    handles = [
        gate.register_forward_hook(lambda module, args, output: found.append(output[-1].sort(-1).values))
        for gate in gates(model).values()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _step(model: Any, inputs: dict[str, Any], autocast: Callable[[], Any]) -> _Step:
    labels = inputs["labels"][:, 1:].flatten()
    with _chosen(model) as chosen, torch.no_grad(), autocast():
        logits = model(**inputs).logits
    tokens = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, reduction="none")
    del logits
    model.zero_grad(set_to_none=True)
    with autocast():
        loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return _Step(loss.item(), tokens, chosen, gradients)


def _distance(got: _Step, exact: _Step) -> Noise:
    wrong = sum(((got.gradients[n] - g).square().sum() for n, g in exact.gradients.items()), torch.tensor(0.0))
    whole = sum((g.square().sum() for g in exact.gradients.values()), torch.tensor(0.0))
    elsewhere = [(a != b).any(-1).float().mean().item() for a, b in zip(got.chosen, exact.chosen, strict=True)]
    per_token = (got.tokens - exact.tokens).square().mean().sqrt().item()
    return Noise(got.loss, per_token, elsewhere, (wrong / whole).sqrt().item())


def measure(case: Case) -> tuple[float, dict[str, Noise], dict[str, training.Trainer]]:
    """The loss in fp32, every arm's noise in the first step, and every arm's run."""
    import fast_unsloth_patch

    trainer = training.build(case, Arm("fast"), training.Phases())
    batches, model = Batches(case, Arm("fast"), case.warmup + case.steps), trainer.model
    config = model.get_base_model().config
    grouped = config._experts_implementation
    stock, fast = fast_unsloth_patch.disabled, contextlib.nullcontext
    exact_model = copy.deepcopy(model).float()
    exact_model.get_base_model().config._experts_implementation = ONE_BY_ONE
    with stock():
        exact = _step(exact_model, batches[0], contextlib.nullcontext)
    del exact_model
    noise = {}
    arms = {"stock": (stock, grouped), "stock, one by one": (stock, ONE_BY_ONE), "fast": (fast, grouped)}
    for name, (context, implementation) in arms.items():
        config._experts_implementation = implementation
        with context():
            noise[name] = _distance(_step(model, batches[0], trainer.autocast), exact)
    runs = {}
    for name, arm in {"stock": "stock", "again": "stock", "one by one": "stock, one by one", "fast": "fast"}.items():
        context, config._experts_implementation = arms[arm]
        shapes.fill(model, case, trained=True)
        runs[name] = training.Trainer(model, case)
        with context():
            for step in range(len(batches)):
                runs[name].step(batches[step])
    return exact.loss, noise, runs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="on the CPU")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU can run")
    options = parser.parse_args(argv)
    model, batch, seq, layers = ("tiny-mixtral", 2, 32, 2) if options.tiny else ("mixtral-8x7b", 4, 2048, 4)
    device = "cpu" if options.cpu else "cuda"
    case = Case(model=model, batch=batch, seq=seq, layers=layers, checkpointing=True, device=device)
    setups.SETUPS["fast"].imports(case, Arm("fast"))
    exact, noise, runs = measure(case)
    print(f"{case.title()}: loss in fp32 {exact:.5f}")
    print("arm | loss | tokens' losses, RMS | tokens sent elsewhere, by layer | gradients")
    for name, found in noise.items():
        elsewhere = ", ".join(f"{100 * share:.1f}" for share in found.elsewhere)
        print(f"{name} | {found.loss:.5f} | {found.per_token:.4f} | {elsewhere} % | {found.gradients:.4f}")
    series = {name: ([x.item() for x in run.losses], [x.item() for x in run.grad_norms]) for name, run in runs.items()}
    print(f"{case.warmup + case.steps} steps | largest difference of losses | of gradient norms")
    names = list(series)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            losses, norms = (records.largest_difference(a, b) for a, b in zip(series[other], series[one]))
            print(f"{other} against {one} | {losses:.1e} | {norms:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
