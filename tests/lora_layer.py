"""One linear layer with PEFT's LoRA, and a step of it with the patch against a step without."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import FP32, distance, fill_adapters, hits, patched
from torch import nn

IN, OUT = 24, 40


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=bias)

    def forward(self, x, **kwargs):
        return self.layer(x, **kwargs)


def make(base_dtype=torch.float32, adapter_dtype=None, bias=True, seed=0, **config):
    torch.manual_seed(seed)
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["layer"], "lora_dropout": 0.0}
    model = get_peft_model(Net(bias).to(base_dtype), LoraConfig(**{**values, **config}))
    fill_adapters(model, 1, adapter_dtype)
    return model.train()


def layer_of(model):
    return model.base_model.model.layer


def step(model, x, dy, autocast=None):
    """Output, dx and the gradients of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
        y = model(x)
    y.backward(dy.to(y.dtype))
    result = {"y": y.detach(), "dx": x.grad}
    result |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return result


def data(shape=(3, 5), dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(*shape, IN, generator=generator).to(dtype),
        torch.randn(*shape, OUT, generator=generator),
    )


def count():
    return hits()["peft.linear"]


def compare(model, *, autocast=None, dtype=torch.float32, shape=(3, 5), fast=True, tolerance=FP32):
    """A step with the patch and one without; the patch was taken ``fast`` or not at all."""
    x, dy = data(shape, dtype)
    with patched("peft.linear"):
        before = count()
        new = step(model, x, dy, autocast)
        assert (count() > before) == fast
    before = count()
    stock = step(model, x, dy, autocast)
    assert count() == before
    assert new.keys() == stock.keys()
    for name, expected in stock.items():
        assert new[name].dtype == expected.dtype and new[name].shape == expected.shape, name
        assert distance(new[name], expected) <= tolerance, (name, distance(new[name], expected))
