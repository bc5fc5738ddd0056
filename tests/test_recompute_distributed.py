"""Two ranks (gloo, CPU) whose memory differs: under DDP and FSDP2 they keep different layers, and train as with "full".

Run as a script, this file is the two ranks, as ``test_distributed.py`` is; a rank that waits for a collective that the
other does not start ends in a timeout, and the case is missing.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import HOOKS_OUTSIDE, batch, llama, lora
from torch import distributed as dist
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import fast_unsloth_patch
from fast_unsloth_patch.patches import budget, checkpointing
from fast_unsloth_patch.status import tally

RANKS = 2
MANY = 4
STEPS = 6
# Layers that the memory of each rank has room for.
KEPT = (1, 3)
CASES = [
    ("ddp", True),
    ("ddp", False),
    ("fsdp2", False),
    ("fsdp2, kept gathered", False),
    ("fsdp2, units inside", False),
    ("fsdp2", True),
]


def wrap(wrapper: str, model: torch.nn.Module) -> torch.nn.Module:
    if wrapper == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (RANKS,))}
    options["reshard_after_forward"] = wrapper != "fsdp2, kept gathered"
    for layer in [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]:
        if wrapper == "fsdp2, units inside":
            fully_shard(layer.mlp, **options)
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def train(wrapper: str, use_reentrant: bool, policy: str) -> dict[str, torch.Tensor]:
    fast_unsloth_patch.apply(recompute=policy)
    model = lora(llama(num_hidden_layers=MANY))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    wrapped = wrap(wrapper, model)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    seen = {}
    for step in range(STEPS):
        for i in range(2):
            loss = wrapped(**batch(seed=100 * step + 10 * i + dist.get_rank()), use_cache=False).loss
            loss.backward()
            seen[f"loss {step} {i}"] = loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in wrapped.named_parameters():
        seen[name] = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
    return seen


def compare(wrapper: str, use_reentrant: bool) -> dict[str, Any]:
    wanted = train(wrapper, use_reentrant, "full")
    counts = tally("llama.checkpointing")
    recomputed = counts.recomputed
    counts.fallbacks.clear()
    got = train(wrapper, use_reentrant, "auto")
    return {
        "different": [name for name in wanted if not torch.equal(got[name], wanted[name])],
        "names": len(wanted),
        "recomputed": counts.recomputed - recomputed,
        "reasons": {reason: n for reason, n in counts.fallbacks.items() if reason.startswith("auto")},
        "choice": checkpointing.describe(),
    }


def rank_main(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    cost = 2 * 12 * 64 * 4
    limit = int((KEPT[rank] + 1.5) * cost / 0.95)
    budget.memory_of = lambda device: budget.Memory(0, 0, limit, 0)
    with open(Path(folder, f"rank{rank}"), "w", buffering=1) as file:
        for wrapper, use_reentrant in CASES:
            print(json.dumps([f"{wrapper} {use_reentrant}", compare(wrapper, use_reentrant)]), file=file)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(rank_main, sys.argv[1:], nprocs=RANKS, start_method="fork")


@pytest.mark.parametrize(("wrapper", "use_reentrant"), CASES)
def test_ranks_choose_by_themselves(ranks, wrapper, use_reentrant):
    written, stderr = ranks
    name = f"{wrapper} {use_reentrant}"
    assert all(name in results for results in written), stderr
    reason = {
        "fsdp2, units inside": "units of FSDP inside the layer",
        "fsdp2": "FSDP2 with reentrant checkpoints" if use_reentrant and not HOOKS_OUTSIDE else None,
    }.get(wrapper)
    for results, kept in zip(written, KEPT):
        found = results[name]
        assert found["different"] == [] and found["names"] > 100
        calls = 2 * STEPS * MANY
        if reason is not None:
            assert found["reasons"] == {f"auto: {reason}": calls} and found["recomputed"] == calls
        else:
            assert found["reasons"] == {}
            assert f"{kept} of {MANY} layers kept" in found["choice"]
            # Two steps with nothing kept; the third tries half of the room, the others half of the rest.
            assert found["recomputed"] == calls - 2 * {1: 1 + 1 + 1 + 1, 3: 1 + 2 + 3 + 3}[kept]
