"""Two ranks (gloo, CPU) under DDP, FSDP2 and FSDP1: the patched training run equals the stock run in the same wrapper.

Run as a script, this file is the two ranks: `torch`, `transformers` and `peft` are imported once, then forked. Every
case trains twice from the same weights, stock under ``disabled()`` and fast, for two optimizer steps, so that a weight
that is stale after sharding, gathering or stepping shows in the second step. As a test module it starts that script
once and asserts on what both ranks wrote.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import FP32, HOOKS_OUTSIDE, LAYERS, batch, causal_lm, distance, lora
from torch import distributed as dist
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

import fast_unsloth_patch

RANKS = 2
STEPS = 2
PROJECTIONS = 7
# Gradient checkpointing: transformers' own, or torch's module wrapper, with which accelerate's FSDP plugin does it.
NONE, NON_REENTRANT, REENTRANT, WRAPPER = "no checkpoints", "non-reentrant", "reentrant", "checkpoint wrapper"
LAYER = {"llama": LlamaDecoderLayer, "mistral": MistralDecoderLayer}


@dataclass(frozen=True)
class Case:
    """One wrapper round one model; ``micro`` batches a step, of which only the last synchronises gradients."""

    wrapper: str
    checkpoint: str = NONE
    adapters: bool = True
    micro: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"

    @property
    def layer(self) -> type[torch.nn.Module]:
        return LAYER[self.family]

    def __str__(self) -> str:
        options = [f"{key}={value}" for key, value in self.options.items()]
        model = "lora" if self.adapters else "full, tied"
        if self.family != "llama":
            model = f"{self.family} {model}"
        return ", ".join([self.wrapper, model, self.checkpoint, f"{self.micro} micro", *options])


CASES = {
    str(case): case
    for case in [
        *(Case("ddp", checkpoint, micro=2) for checkpoint in (NONE, NON_REENTRANT, REENTRANT)),
        Case("ddp", REENTRANT, options={"static_graph": True}),
        Case("ddp", adapters=False, micro=2),
        *(
            Case("fsdp2", checkpoint, options={"reshard_after_forward": reshard})
            for checkpoint in (NONE, NON_REENTRANT)
            for reshard in (True, False)
        ),
        Case("fsdp2", WRAPPER, micro=2),
        *(Case("fsdp2", checkpoint, adapters=False) for checkpoint in (NONE, NON_REENTRANT)),
        *(Case("fsdp1", checkpoint) for checkpoint in (NONE, NON_REENTRANT, WRAPPER)),
        Case("fsdp1", micro=2),
        Case("fsdp1", adapters=False),
        Case("fsdp1", options={"policy": "peft"}),
        *(
            Case("fsdp1", checkpoint, adapters=False, options={"use_orig_params": False})
            for checkpoint in (NONE, NON_REENTRANT)
        ),
        Case("ddp", REENTRANT, family="mistral"),
        Case("fsdp2", NON_REENTRANT, family="mistral"),
        Case("fsdp2", adapters=False, family="mistral"),
        Case("fsdp1", family="mistral"),
    ]
}


# ---- the two ranks


def build(case: Case) -> torch.nn.Module:
    # A window that is shorter than the rows.
    size = {"sliding_window": 5} if case.family == "mistral" else {}
    model = causal_lm(case.family, tie_word_embeddings=not case.adapters, **size)
    model = lora(model) if case.adapters else model
    if case.checkpoint in (NON_REENTRANT, REENTRANT):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpoint == REENTRANT})
    return model


def checkpoint_layers(case: Case, model: torch.nn.Module) -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as module

    wrapper = partial(module.checkpoint_wrapper, checkpoint_impl=module.CheckpointImpl.NO_REENTRANT)
    module.apply_activation_checkpointing(model, wrapper, check_fn=lambda m: isinstance(m, case.layer))


def wrap(case: Case, model: torch.nn.Module) -> torch.nn.Module:
    if case.wrapper == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(
            model, find_unused_parameters=False, gradient_as_bucket_view=True, **case.options
        )
    # Checkpoint wrappers go round sharded layers in FSDP2, into them in FSDP1, as accelerate does it.
    if case.wrapper == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if case.checkpoint == WRAPPER:
            checkpoint_layers(case, model)
        options = {"mesh": init_device_mesh("cpu", (RANKS,)), **case.options}
        for layer in [module for module in model.modules() if isinstance(module, case.layer)]:
            fully_shard(layer, **options)
        return fully_shard(model, **options)
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    if case.options.get("policy") == "peft":
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = case.layer.__name__
        policy = fsdp_auto_wrap_policy(model)
    else:
        policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={case.layer})
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy,
        use_orig_params=case.options.get("use_orig_params", True),
        device_id=torch.device("cpu"),
    )
    if case.checkpoint == WRAPPER:
        checkpoint_layers(case, wrapped)
    return wrapped


@contextmanager
def unsynchronised(wrapped: torch.nn.Module):
    """Gradients stay on their rank, to be accumulated."""
    if hasattr(wrapped, "no_sync"):
        with wrapped.no_sync():
            yield
    else:
        wrapped.set_requires_gradient_sync(False)
        yield
        wrapped.set_requires_gradient_sync(True)


def gathers_gradients(case: Case) -> bool:
    return case.options.get("use_orig_params", True)


def whole(case: Case, wrapped: torch.nn.Module, what: str) -> dict[str, torch.Tensor]:
    """Copies of every parameter, or of every gradient, gathered from the ranks if FSDP1 can."""
    gather = nullcontext()
    if case.wrapper == "fsdp1" and (what == "parameter" or gathers_gradients(case)):
        gather = type(wrapped).summon_full_params(wrapped, with_grads=gathers_gradients(case))
    with gather:
        tensors = {name: p.grad if what == "grad" else p.detach() for name, p in wrapped.named_parameters()}
        return {
            f"{what} {name}": t.full_tensor() if hasattr(t, "full_tensor") else t.clone()
            for name, t in tensors.items()
            if t is not None
        }


def train(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What is this rank's own, its losses; and the gradients of each step and the final parameters, of all ranks."""
    wrapped = wrap(case, build(case))
    # Not Adam, whose first step is of one size in every element: it turns the rounding of small gradients into weights.
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    own, shared = {}, {}
    for step in range(STEPS):
        for i in range(case.micro):
            inputs = batch(length=12 - 3 * dist.get_rank(), seed=100 * step + 10 * i + dist.get_rank())
            with unsynchronised(wrapped) if i + 1 < case.micro else nullcontext():
                loss = wrapped(**inputs, use_cache=False).loss
                (loss / case.micro).backward()
            own[f"loss {step} {i}"] = loss.detach()
        gradients = {f"{step} {name}": grad for name, grad in whole(case, wrapped, "grad").items()}
        (shared if gathers_gradients(case) else own).update(gradients)
        optimizer.step()
        optimizer.zero_grad()
    return own, shared | whole(case, wrapped, "parameter")


def counts() -> Counter:
    found: Counter = Counter()
    for row in fast_unsloth_patch.status().rows:
        found.update({f"{row.id} {what}": getattr(row, what) for what in ("forward", "backward", "recomputed")})
        found.update({f"{row.id} stock: {reason}": times for reason, times in row.fallbacks.items()})
    return found


def spread(tensors: dict[str, torch.Tensor]) -> float:
    """The largest difference between the ranks."""
    highest = torch.cat([t.flatten() for t in tensors.values()])
    lowest = highest.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    return (highest - lowest).max().item()


def compare(case: Case) -> dict[str, Any]:
    start = counts()
    with fast_unsloth_patch.disabled():
        own, shared = train(case)
    between = counts()
    fast_own, fast_shared = train(case)
    wanted, got = own | shared, fast_own | fast_shared
    return {
        "stock": between - start,
        "fast": counts() - between,
        "names": [sorted(wanted), sorted(got)],
        "distances": {name: distance(got[name], wanted[name]) for name in wanted.keys() & got.keys()},
        "spread": spread(fast_shared),
    }


def rank_main(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    fast_unsloth_patch.apply()
    # A case that fails ends the run: the ranks might no longer be at the same collective.
    with open(Path(folder, f"rank{rank}"), "w", buffering=1) as file:
        for name, case in CASES.items():
            print(json.dumps([name, compare(case)]), file=file)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(rank_main, sys.argv[1:], nprocs=RANKS, start_method="fork")


# ---- the tests


def recomputes(
    case: Case, found: dict[str, int], again: dict[str, int], *, hooked: bool, may_keep: bool
) -> dict[str, int]:
    """What a checkpointed step counts besides: ``found`` and ``again`` are the forwards in all and in the layers.

    Args:
        hooked: there are hooks on the layers, FSDP2's or transformers' recorders.
        may_keep: the last layer is not recomputed, but where that might leave out what other ranks wait for.
    """
    if case.checkpoint == NONE:
        return {}
    if case.checkpoint == WRAPPER:
        # A region that is not transformers' own: its recompute looks like another forward. But the layer's end is left
        # out of it, unless there are hooks in the region.
        end = "stock: hooks on the layer" if hooked else "recomputed"
        forwards = {f"{name} forward": found[f"{name} forward"] + times for name, times in again.items()}
        return {**forwards, f"checkpointing {end}": LAYERS}
    inside = hooked and not HOOKS_OUTSIDE
    apart = case.wrapper == "fsdp1" or (case.wrapper == "fsdp2" and inside and case.checkpoint == REENTRANT)
    layers = LAYERS - (may_keep and not apart)
    counts = {f"{name} recomputed": times // LAYERS * layers for name, times in again.items()}
    counts |= {"checkpointing forward": LAYERS, "checkpointing recomputed": layers}
    return counts | ({"checkpointing stock: hooks on the layer": layers} if inside else {})


def expected(case: Case) -> dict[str, int]:
    """Every fast call of the fast arm, and every call that ran stock."""
    calls = STEPS * case.micro
    # The first norm has a backward if its input (the embedding) or its weight needs a gradient; one adapter in a flat
    # parameter of FSDP1 makes all views of it need one.
    per_adapter = case.options.get("policy") == "peft"
    flat = case.wrapper == "fsdp1" and not per_adapter
    first = case.checkpoint in (NON_REENTRANT, REENTRANT) or not case.adapters or flat
    found = {"rms_norm forward": 2 * LAYERS + 1, "rms_norm backward": 2 * LAYERS + first}
    found |= {"loss forward": 1, "loss backward": 1}
    found |= {"decoder_layer forward": LAYERS, "decoder_layer backward": LAYERS - 1 + first}
    if per_adapter:
        reason = "stock: lora_A type FullyShardedDataParallel"
        found |= {f"attention {reason}": LAYERS, f"mlp {reason}": LAYERS}
        linear = {f"peft.linear {reason}": calls * LAYERS * PROJECTIONS}
        return {f"{case.family}.{name}": calls * times for name, times in found.items()} | linear
    for name in ("attention", "mlp"):
        found |= {f"{name} forward": LAYERS, f"{name} backward": LAYERS}
    again = {"rms_norm": 2 * LAYERS, "attention": LAYERS, "mlp": LAYERS, "decoder_layer": LAYERS}
    found |= recomputes(case, found, again, hooked=case.wrapper == "fsdp2", may_keep=case.adapters)
    return {f"{case.family}.{name}": calls * times for name, times in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(ranks, name):
    written, stderr = ranks
    assert all(name in results for results in written), stderr
    for results in written:
        found = results[name]
        stock_names, fast_names = found["names"]
        assert fast_names == stock_names and len(found["distances"]) == len(stock_names)
        assert {n: d for n, d in found["distances"].items() if not d <= FP32} == {}
        assert found["spread"] == 0.0
        assert found["fast"] == expected(CASES[name])
        # Stock ran, and nothing else.
        assert found["stock"] and all(what.endswith(" stock: disabled") for what in found["stock"])
