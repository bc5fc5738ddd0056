"""QLoRA under FSDP2 with two ranks (gloo, CPU): the packed weights are sharded as the floats that they pose as.

Run as a script, this file is the two ranks, as in `test_distributed`: every case trains twice from the same weights,
stock under ``disabled()`` and fast. Inside FSDP2's forward a weight is a plain parameter without its ``quant_state``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_llama import BF16, F32, adapted, load_4bit
from test_distributed import RANKS, STEPS, counts
from tiny_llama import FP32, HOOKS_OUTSIDE, LAYERS, batch, distance, llama
from torch import distributed as dist
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import fast_unsloth_patch

# name: (dtype of everything and of the storage, checkpointing, reshard after forward)
CASES = {
    "float32": (F32, None, True),
    "float32, kept whole": (F32, None, False),
    "float32, non-reentrant": (F32, False, True),
    "bf16": (BF16, None, True),
    "bf16, non-reentrant": (BF16, False, True),
}


def checkpoint_of(folder: str, dtype: torch.dtype) -> str:
    return f"{folder}/{str(dtype).removeprefix('torch.')}"


def train(folder: str, dtype: torch.dtype, checkpoint: bool | None, reshard: bool) -> dict[str, torch.Tensor]:
    """Losses, whole gradients of each step, and the parameters after them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = load_4bit(checkpoint_of(folder, dtype), dtype, storage=dtype)
    model = adapted(model, checkpoint=checkpoint, adapter_dtype=dtype)
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (RANKS,)), "reshard_after_forward": reshard}
    for layer in [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    found = {}
    for step in range(STEPS):
        inputs = batch(length=12 - 3 * dist.get_rank(), seed=10 * step + dist.get_rank())
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        found.update({f"{step} {name}": p.grad.full_tensor() for name, p in trained.items()})
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: p.detach().full_tensor() for name, p in trained.items()}


def compare(folder: str, case) -> dict[str, Any]:
    start = counts()
    with fast_unsloth_patch.disabled():
        wanted = train(folder, *case)
    between = counts()
    got = train(folder, *case)
    return {
        "stock": between - start,
        "fast": counts() - between,
        "names": [sorted(wanted), sorted(got)],
        "distances": {name: distance(got[name], wanted[name]) for name in wanted.keys() & got.keys()},
    }


def rank_main(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    fast_unsloth_patch.apply(exclude="llama.loss")
    with open(Path(folder, f"rank{rank}"), "w", buffering=1) as file:
        for name, case in CASES.items():
            print(json.dumps([name, compare(folder, case)]), file=file)
    dist.destroy_process_group()


if __name__ == "__main__":
    # transformers saves on one rank only.
    for dtype in (F32, BF16):
        llama(dtype).save_pretrained(checkpoint_of(sys.argv[1], dtype))
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(rank_main, sys.argv[1:], nprocs=RANKS, start_method="fork")


# ---- the tests


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("name", CASES)
def test_two_ranks(ranks, name):
    written, stderr = ranks
    dtype, checkpoint, _ = CASES[name]
    assert all(name in results for results in written), stderr
    for results in written:
        found = results[name]
        stock_names, fast_names = found["names"]
        assert fast_names == stock_names and len(found["distances"]) == len(stock_names) > STEPS * 14 * LAYERS
        # In bf16 the roundings of a whole model, and only as far as the first step: Adam makes signs of gradients.
        tolerance, compared = FP32, found["distances"]
        if dtype is BF16:
            tolerance, compared = 0.1, {n: d for n, d in compared.items() if n.startswith(("loss 0", "0 "))}
        worst = {n: d for n, d in compared.items() if not d <= tolerance}
        assert worst == {}
        assert found["stock"] and all(what.endswith(" stock: disabled") for what in found["stock"])
        times = STEPS * LAYERS
        for patch in ("llama.attention", "llama.mlp"):
            assert found["fast"][f"{patch} forward"] == found["fast"][f"{patch} backward"] == times
            assert found["fast"].get(f"{patch} recomputed", 0) == (0 if checkpoint is None else times)
        stock = [what for what in found["fast"] if " stock: " in what]
        hooked = checkpoint is not None and not HOOKS_OUTSIDE  # FSDP2's own
        assert stock == (["llama.checkpointing stock: hooks on the layer"] if hooked else [])
