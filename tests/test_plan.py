"""The plan of a Llama module: kept while nothing changes, and every change between two steps is seen."""

from __future__ import annotations

import timeit

import pytest
import torch
from tiny_llama import (
    LAYERS,
    assert_same,
    batch,
    both,
    check,
    layers_of,
    llama,
    lora,
    patched,
)
from torch import nn
from transformers.activations import SiLUActivation

from fast_unsloth_patch import switch
from fast_unsloth_patch.patches import plan as plans


@pytest.mark.parametrize("checkpoint", [None, True, False])
def test_a_plan_is_kept_over_steps(checkpoint):
    """Steps of an optimizer, checkpointing and hooks elsewhere change nothing that it depends on."""
    model = lora(llama(), lora_dropout=0.1)
    model.enable_input_require_grads()
    if checkpoint is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    modules = [m for layer in layers_of(model) for m in (layer.self_attn, layer.mlp)]
    kept = []
    with patched():
        for seed in range(3):
            model(**batch(seed=seed), use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.append([m.__dict__[plans._KEY] for m in modules])
            model.lm_head.register_forward_hook(lambda *args: None)
    assert all(type(p) is plans.Plan for p in kept[0])
    assert all(a is b is c for a, b, c in zip(*kept))


def test_a_plan_costs_little():
    """About 8 us for the seven projections of a layer; the bound is for a busy machine and catches a change of kind."""
    model = lora(llama(), lora_dropout=0.1)
    layer, x = layers_of(model)[0], torch.randn(2, 3, 64)
    names = (("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))

    def call():
        plans.children_plan(layer.self_attn, names[0], x)
        plans.children_plan(layer.mlp, names[1], x, (SiLUActivation,))

    assert min(timeit.repeat(call, number=500, repeat=7)) / 500 < 60e-6


def _twice(module, args, output):
    return output * 2


def _hook(path):
    return lambda layer: layer.get_submodule(path).register_forward_hook(_twice)


def _own_forward(path):
    def change(layer):
        module = layer.get_submodule(path)
        module.forward = lambda *args: type(module).forward(module, *args) * 2

    return change


def _replace(path, make):
    def change(layer):
        parent, _, name = path.rpartition(".")
        setattr(layer.get_submodule(parent), name, make())

    return change


class Doubling(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class DoublingSiLU(SiLUActivation):
    def forward(self, x):
        return super().forward(x) * 2


def _class(path, cls):
    def change(layer):
        layer.get_submodule(path).__class__ = cls

    return change


CHANGES = {
    # what: (change of a decoder layer, attention fast, mlp fast)
    "hook on q": (_hook("self_attn.q_proj"), False, True),
    "hook on a base": (_hook("self_attn.o_proj.base_layer"), False, True),
    "hook on an A": (_hook("mlp.up_proj.lora_A.default"), True, False),
    "hook on act": (_hook("mlp.act_fn"), True, False),
    "forward of down": (_own_forward("mlp.down_proj"), True, False),
    "forward of v's base": (_own_forward("self_attn.v_proj.base_layer"), False, True),
    "forward of act": (_own_forward("mlp.act_fn"), True, False),
    "gelu": (_replace("mlp.act_fn", nn.GELU), True, False),
    "another silu": (_replace("mlp.act_fn", nn.SiLU), True, True),
    "class of act": (_class("mlp.act_fn", DoublingSiLU), True, False),
    "class of a base": (_class("mlp.gate_proj.base_layer", Doubling), True, False),
    "k becomes plain": (_replace("self_attn.k_proj", lambda: nn.Linear(64, 32, bias=False)), True, True),
    "k becomes special": (_replace("self_attn.k_proj", lambda: Doubling(64, 32, bias=False)), False, True),
    "one more child": (_replace("self_attn.q_norm", lambda: nn.LayerNorm(16)), False, True),
    "scaling": (lambda layer: layer.mlp.up_proj.scaling.update(default=0.3), True, True),
    "no active": (lambda layer: setattr(layer.self_attn.q_proj, "_active_adapter", "none"), True, True),
    "merged": (lambda layer: layer.mlp.gate_proj.merge(), True, False),
    "cast": (lambda layer: setattr(layer.mlp.gate_proj, "cast_input_dtype_enabled", False), True, False),
    "base trained": (lambda layer: layer.self_attn.q_proj.base_layer.weight.requires_grad_(True), True, True),
    "A frozen": (lambda layer: layer.self_attn.q_proj.lora_A.requires_grad_(False), True, True),
    "weight data": (
        lambda layer: setattr(layer.mlp.up_proj.base_layer.weight, "data", torch.randn(128, 64)),
        True,
        True,
    ),
    "keep_stock": (lambda layer: switch.keep_stock(layer.self_attn) and None, False, True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_steps_is_seen(name):
    change, attention, mlp = CHANGES[name]
    model = lora(llama())
    check(model, batch())
    change(layers_of(model)[0])
    fast, stock, forward, _ = both(model, batch())
    assert_same(fast, stock)
    assert forward["llama.attention"] == LAYERS - (not attention)
    assert forward["llama.mlp"] == LAYERS - (not mlp)
