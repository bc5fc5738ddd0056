"""The common predicate: each state gives its reason, in the documented order, and costs little."""

from __future__ import annotations

import timeit

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fast_unsloth_patch import switch
from fast_unsloth_patch.patches.guards import blocked


@pytest.fixture
def module():
    return nn.Linear(4, 4)


X = torch.ones(2, 4)


def test_training_is_fast(module):
    assert blocked(module, X) is None
    with torch.no_grad():
        assert blocked(module, X) is None, "the forward of a reentrant checkpoint runs without gradients"
    assert blocked(module.eval(), X) is None, "evaluation mode with gradients"


def test_each_reason(module):
    with switch.disabled():
        assert blocked(module, X) == "disabled"
    assert blocked(module, nn.Parameter(X)) == "tensor subclass"
    assert blocked(module, None) == "tensor subclass"
    assert blocked(module, X[:0]) == "empty input"
    assert blocked(module, X.long()) == "dtype int64"
    assert blocked(module, X.to("meta")) == "device meta"
    with FlopCounterMode(display=False):
        assert blocked(module, X) == "dispatch mode"
    with torch.no_grad():
        assert blocked(module.eval(), X) == "eval"
    switch.keep_stock(module)
    assert blocked(module, X) == "keep_stock"


def test_transforms(module):
    seen = []

    def call(x):
        seen.append(blocked(module, x))
        return (x * 2).sum()

    torch.func.grad(call)(X)
    torch.vmap(call)(X)
    torch.jit.trace(call, (X,), check_trace=False)
    assert seen == ["functorch transform", "functorch transform", "tracing"]


def test_compiling(module):
    @torch.compile(backend="eager", fullgraph=True)
    def call(x):
        return x + 1 if blocked(module, x) == "compiling" else x - 1

    assert torch.equal(call(X), X + 1)


def test_the_first_reason_wins(module):
    switch.keep_stock(module.eval())
    with torch.no_grad(), switch.disabled():
        assert blocked(module, X.long()) == "disabled"
    with torch.no_grad():
        assert blocked(module, X.long()) == "keep_stock"
        module.__dict__[switch.KEEP_STOCK_FLAG] = False
        assert blocked(module, X.long()) == "eval"


def test_cost(module):
    # About 0.8 us; ten times that only where the machine is busy, so the bound catches a change of kind, not of degree.
    seconds = min(timeit.repeat(lambda: blocked(module, X), number=2000, repeat=5)) / 2000
    assert seconds < 8e-6


@pytest.mark.gpu
def test_gpu_dtypes(module):
    module.cuda()
    assert blocked(module, X.cuda()) is None
    assert blocked(module, X.cuda().bfloat16()) is None
    assert blocked(module, X.cuda().double()) == "dtype float64"
