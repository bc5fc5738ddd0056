"""Mixtures of experts in the benchmarks: LoRA on stacked weights, who routes which token where, and the load of it.

A case says how tokens find their experts (`Case.routing`):

"text"    What the gates of the random model make of real text. It is not what a trained model does: hidden states of a
          random model are much alike, so that some experts get most of the tokens and others few.
"random"  Every token id has two experts of its own in each layer, drawn so that each expert gets the same number of
          tokens. The embedding holds a code of them, large enough to outlast what the layers add to it, and each gate
          reads its layer's part of that code and nothing else. The choice is by far no close one, so rounding cannot
          change it. It stands for the balanced load that training with an auxiliary loss aims at.

Importing this file loads no torch.
"""

from __future__ import annotations

import collections
import contextlib
import random
from collections.abc import Iterator
from typing import Any

ROUTINGS = ("text", "random")
# The stacks of a layer's experts as PEFT's `target_parameters`, and as Unsloth's documentation of MoE models lists them
# among `target_modules`, beside the names that they go by where they are no stacks.
STACKS = ("gate_up_proj", "down_proj")
TARGET_PARAMETERS = tuple(f"mlp.experts.{name}" for name in STACKS)
UNSLOTH_TARGETS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
# Of the code in the embedding: far above what 32 layers add to an element, and exact in 16 bits. The gate's factor
# makes the logits a few units large.
AMPLITUDE, SECOND, FACTOR = 200.0, 0.8, 0.4
# Batches of text that get an even load. Not the steps of a run: runs of other lengths have the same losses.
BATCHES = 8


def pairs_even(pairs: int, experts: int) -> list[int]:
    """Rows of each expert when all have the same number, up to one."""
    return [pairs // experts + (e < pairs % experts) for e in range(experts)]


def choices(ids: list[int], batch: int, experts: int, per_token: int, layer: int) -> dict[int, list[int]]:
    """The experts of each token id in one layer: of what gets an id, the least loaded in the batches it occurs in.

    Args:
        ids: the text.
        batch: tokens of a batch.
        experts, per_token: how many there are, how many a token has.
        layer: another layer, other experts.
    """
    draw = random.Random(layer)
    counts = [collections.Counter(ids[start : start + batch]) for start in range(0, len(ids), batch)]
    total = sum(counts, collections.Counter())
    load = [[0] * len(counts) for _ in range(experts)]
    found = {}
    for token in sorted(total, key=lambda token: (-total[token], token)):
        seen = [(b, count[token]) for b, count in enumerate(counts) if token in count]
        order = sorted((sum(load[e][b] * n for b, n in seen), draw.random(), e) for e in range(experts))
        found[token] = [e for _, _, e in order[:per_token]]
        for e in found[token]:
            for b, n in seen:
                load[e][b] += n
    return found


def route_evenly(model: Any, shape: Any, ids: list[int], batch: int) -> None:
    """Makes the routing of `model` the one called "random" above; the other weights stay.

    Raises:
        ValueError: the model has not one gate a layer, or no room for the code.
    """
    import torch

    table = model.get_input_embeddings().weight
    found = gates(model)
    width, per_token, layers = shape.experts, shape.experts_per_token, model.config.num_hidden_layers
    if len(found) != layers or layers * width > table.shape[1]:
        raise ValueError(f"random routing: {len(found)} gates for {layers} layers, code of {layers * width} elements")
    with torch.no_grad():
        for layer, gate in enumerate(found.values()):
            chosen = choices(ids, batch, width, per_token, layer)
            draw = random.Random(-1 - layer)
            rows = [chosen.get(token) or draw.sample(range(width), per_token) for token in range(table.shape[0])]
            heights = torch.linspace(1.0, SECOND, per_token) * AMPLITUDE
            code = torch.zeros(table.shape[0], width).scatter_(1, torch.tensor(rows), heights.expand(len(rows), -1))
            columns = slice(layer * width, (layer + 1) * width)
            table[:, columns] = code.to(table)
            gate.weight.zero_()
            gate.weight[:, columns] = FACTOR * torch.eye(width).to(gate.weight)


def gates(model: Any) -> dict[str, Any]:
    """The routers by name, in the order of the layers."""
    return {name: module for name, module in model.named_modules() if name.endswith(".mlp.gate")}


@contextlib.contextmanager
def counted(model: Any) -> Iterator[list[Any]]:
    """While this is entered: the pairs (token, expert) that each gate gives each expert, in the first call of each.

    Empty if an implementation does not call the gates as modules, or if they do not return their choice last.
    """
    import torch

    found: list[Any] = []

    def counter(module: Any) -> Any:
        def count(module: Any, args: Any, output: Any) -> None:
            handles.pop(module).remove()
            index = output[-1] if isinstance(output, tuple) else output
            if index.is_floating_point():  # a peer's gate, which does not say what it chose
                return
            every = torch.arange(module.weight.shape[0], device=index.device)
            found.append((index.reshape(-1, 1) == every).sum(0))

        return module.register_forward_hook(count)

    handles = {module: counter(module) for module in gates(model).values()}
    try:
        yield found
    finally:
        for handle in handles.values():
            handle.remove()


def moved(load: list[list[int]], other: list[list[int]]) -> float:
    """Of the layer that differs most, the share of pairs that would have to go elsewhere to make two loads the same."""
    if len(load) != len(other):
        return float("inf")
    return max(sum(abs(a - b) for a, b in zip(x, y)) / (2 * max(1, sum(y))) for x, y in zip(load, other))


def wrapped_stacks(model: Any) -> dict[str, str]:
    """Module of PEFT's `ParamWrapper` -> its name with that of the stack it adapts.

    The wrappers of a module's parameters are nested, so that only they know which adapter belongs to which.
    """
    wrappers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "parameter_name")}
    return {name: f"{name}.{module.parameter_name}" for name, module in wrappers.items()}


def problem(model: Any, shape: Any, layers: int, rank: int, expert_lora: bool) -> str | None:
    """Why `model`, as an implementation built it, has not the case's LoRA on experts, if it has not.

    Counted are elements, which no layout of the factors changes.
    """
    wide, narrow = 2 * shape.intermediate, shape.hidden
    each = rank * shape.experts * ((wide + narrow) + (narrow + shape.intermediate))
    expected = layers * each if expert_lora else 0
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n and ".experts" in n and p.requires_grad}
    found = sum(p.numel() for p in adapters.values())
    if found == expected:
        return None
    return f"LoRA on experts: expected {expected:,} trainable elements, found {found:,} in {len(adapters)} parameters"
