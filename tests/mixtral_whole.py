"""Whole tiny Mixtrals with every patch, and what both arms of a comparison must share."""

from __future__ import annotations

from typing import Any

import torch
from packed_cases import EVERYTHING
from tiny_llama import (
    FP32,
    LAYERS,
    assert_same,
    distance,
    hits,
    patched,
    run,
)

LENGTH = 12
NORMS = 2 * LAYERS + 1
# None, as Mixtral has it; shorter than the rows, as long, and longer.
WINDOWS = (None, 3, LENGTH, 4096)
PARTS = ("decoder_layer", "rms_norm", "attention", "moe")
SIDES = {"left": ([3, 0, 7], [0, 0, 0]), "right": ([0, 0, 0], [4, 0, 9]), "both": ([2, 5, 0], [3, 1, 8])}
# Large enough that the loss and the router's gradient would show its absence.
BALANCED = {"router_aux_loss_coef": 0.5}


def difference(before: dict[str, int]) -> dict[str, int]:
    """Fast forwards since ``before``, by the part of the layer."""
    return {name: hits()[f"mixtral.{name}"] - before[f"mixtral.{name}"] for name in PARTS}


def parts(layer: int, rms_norm: int, attention: int, moe: int) -> dict[str, int]:
    return dict(zip(PARTS, (layer, rms_norm, attention, moe)))


def assert_outputs_same(fast: Any, stock: Any) -> None:
    """The same keys in the same order, and under each the same tensors."""
    assert type(fast) is type(stock) and list(fast.keys()) == list(stock.keys())
    for name in stock:
        new, old = fast[name], stock[name]
        if not isinstance(old, (torch.Tensor, tuple)):
            continue
        new, old = (value if isinstance(value, tuple) else (value,) for value in (new, old))
        assert len(new) == len(old), name
        for a, b in zip(new, old):
            assert a.shape == b.shape and a.dtype is b.dtype and distance(a.detach(), b.detach()) <= FP32, name


def every_patch(model, inputs, *, loss: int = 1, packing: int = 0, **kwargs):
    """Both arms with all patches are the same in every output; the loss and the packing patch ran so many times."""
    before = hits()
    with patched(*EVERYTHING):
        fast = run(model, inputs, **kwargs)
    after = hits()
    assert [after[f"mixtral.{name}"] - before[f"mixtral.{name}"] for name in ("loss", "packing")] == [loss, packing]
    assert difference(before)["decoder_layer"] >= LAYERS and difference(before)["moe"] >= LAYERS
    stock = run(model, inputs, **kwargs)
    assert hits() == after, "the stock arm took the fast path"
    if (
        isinstance(inputs.get("attention_mask"), torch.Tensor) and packing
    ):  # Then logits of the padding are not stock's.
        fast, stock = (result._replace(logits=None) for result in (fast, stock))
    else:
        assert_outputs_same(fast.output, stock.output)
    assert_same(fast, stock)
    return fast, stock
