"""Corners of the experts' path: what a recompute, hooks on saved tensors or an odd routing do to it, and what it keeps.

Numbers against stock or plain PyTorch on the CPU; the kernels in the interpreter.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import subprocess
import sys
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.autograd.graph
from mixtral_cases import (
    LAYERS,
    MOE,
    TURNED_ROUND,
    Net,
    as_good,
    block,
    block_of,
    both_steps,
    compare,
    data,
    exact_step,
    experts_of,
    fix_routing,
    in_four_bits,
    lora,
    lora_block,
    mixtral,
    wrapper_of,
)
from safetensors.torch import load_file
from test_lora_experts import EPS, EXPERTS, HIDDEN, INNER, TOP, check, leaves, make
from tiny_llama import FP32, assert_same, backwards, batch, distance, fallbacks, hits, layers_of, llama, patched, run
from tiny_llama import lora as lora_everywhere
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from fast_unsloth_patch.ops.lora_experts import lora_experts
from fast_unsloth_patch.patches import checkpointing, recompute
from fast_unsloth_patch.patches import mixtral as patch
from fast_unsloth_patch.weights.nf4_checkpoint import register_state_hooks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_lora = pytest.mark.skipif(TURNED_ROUND, reason="PEFT before 0.20 runs stock")
whole = pytest.mark.skipif(INTERPRETED, reason="whole models run without the interpreter")
both_kinds = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
CHECKPOINTED = (MOE, "mixtral.decoder_layer", "mixtral.rms_norm", "mixtral.attention", "mixtral.checkpointing")


def adapted(reentrant: bool | None = None, **overrides):
    """A tiny Mixtral with LoRA on experts and attention, and its batch."""
    made = lora(
        mixtral(**overrides),
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    if reentrant is not None:
        made.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        made.enable_input_require_grads()
    return made


def inputs(rows: int = 2, length: int = 12, seed: int = 2):
    return batch(rows, length, seed, vocab=96)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_gradients(got, wanted, tolerance: float = FP32) -> None:
    assert got.keys() == wanted.keys()
    apart = {name: distance(got[name], wanted[name]) for name in wanted}
    far = {name: each for name, each in apart.items() if not each <= tolerance}
    assert not far, far


def copying():
    """Hooks that copy what is saved, as ``save_on_cpu`` does on a GPU: values stay, layouts need not."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t)


# ---- routings


@whole
@pytest.mark.parametrize(
    ("experts", "choices", "reason"), [(12, 9, "more than 8 choices"), (300, 2, "more than 256 experts")]
)
def test_more_than_the_kernels_take(experts, choices, reason):
    """Stock has no bound."""
    model = block(num_local_experts=experts, num_experts_per_tok=choices)
    x, _ = data()
    with patched(MOE):
        y = model(x)
        assert fallbacks(MOE) == {reason: 1} and not hits()[MOE]
    assert distance(y, model(x)) <= FP32


@pytest.mark.parametrize("odd", [EXPERTS, -1, 2**40])
def test_a_pair_whose_expert_does_not_exist(odd):
    """It counts as zeros, as the number E does for stock's eager experts; its weight gets zero, the others theirs."""
    x, index, weights, *projections = make(trainable=True)
    outside = torch.zeros_like(index, dtype=torch.bool)
    outside[2, 1] = outside[5] = True
    named = leaves(x, index, weights, *projections)
    dy = torch.randn(x.shape)
    # The same numbers from weights of zero.
    masked = lora_experts(x, index, weights.masked_fill(outside, 0.0), *projections)
    wanted = torch.autograd.grad(masked, named.values(), dy)
    y = lora_experts(x, index.masked_fill(outside, odd), weights, *projections)
    got = torch.autograd.grad(y, named.values(), dy)
    torch.testing.assert_close(y, masked)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b)
    assert not got[list(named).index("weights")][outside].any()


@whole
@needs_lora
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_one_expert(implementation):
    """PEFT has a way of its own for it, in which the stack is a matrix."""
    compare(lora(Net(block(experts=implementation, num_local_experts=1, num_experts_per_tok=1))))


@pytest.mark.parametrize(("tokens", "top", "experts"), [(1, 1, 1), (3, 8, 9), (20, 2, 3)])
@pytest.mark.parametrize("ranks", [(3, 0), (0, 17), (70, 5)])
def test_small_cases(tokens, top, experts, ranks, poisoned_empty):
    check(make(tokens, top=top, experts=experts, ranks=ranks, trainable=True), 4 * HIDDEN * EPS[torch.float32])


# ---- what is trained


@whole
@needs_lora
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("trained", ["gate_up A", "gate_up B", "down A", "down B", "gate", "gate_up", "down", "input"])
def test_one_thing_alone(trained, reentrant):
    """Also where the script checkpoints the block by itself, whose output then is needed."""
    model = lora_block()
    wrappers = {"gate_up": wrapper_of(model, "gate_up_proj"), "down": wrapper_of(model, "down_proj")}
    parts = {"gate": block_of(model).gate.weight, "input": None}
    for name, wrapper in wrappers.items():
        parts[f"{name} A"], parts[f"{name} B"] = wrapper.lora_A.default.weight, wrapper.lora_B.default.weight
        parts[name] = getattr(experts_of(model), f"{name}_proj")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is parts[trained])
    call = model if reentrant is None else partial(checkpoint, model, use_reentrant=reentrant)

    def step():
        x, dy = data()
        x.requires_grad_()
        y = call(x)
        y.backward(dy)
        return {"y": y.detach(), "dx": x.grad, **gradients(model)}

    with patched(MOE):
        fast = step()
        assert hits()[MOE] == (1 if reentrant is None else 2) and backwards()[MOE] == 1
    assert_gradients(fast, step())


# ---- recompute


@whole
@needs_lora
@both_kinds
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_hooks_round_forward_and_backward(family, reentrant):
    """The script checkpoints its layers itself, so a recompute has no u of the down projection and leaves it to
    backward; a copy of what stands for it is as empty.
    """
    model = adapted() if family == "mixtral" else lora_everywhere(llama())
    layers = layers_of(model)

    class Checkpointed(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden, **kwargs):
            return checkpoint(partial(self.layer, **kwargs), hidden, use_reentrant=reentrant)

    for i in range(len(layers)):
        layers[i] = Checkpointed(layers[i])
    model.enable_input_require_grads()

    def step():
        with copying():
            model(**batch(vocab=96)).loss.backward()
        return gradients(model)

    with patched():
        fast = step()
    assert_gradients(fast, step())


class _Offloaded(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with copying():
            return self.inner(x)


class _Ascent(nn.Module):
    """Moves its input along the gradient of something that the block computes: a backward inside the forward."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (step,) = torch.autograd.grad(self.inner(leaf).square().mean(), leaf)
        return self.inner(x + 0.1 * step)


@whole
@needs_lora
@both_kinds
@pytest.mark.parametrize("wrapper", [_Offloaded, _Ascent])
def test_a_region_that_reads_what_its_forward_saves(wrapper, reentrant):
    """Then it is no region whose forward may leave gate and up unwritten."""
    model = adapted(reentrant)
    for layer in layers_of(model):
        layer.mlp = wrapper(layer.mlp)
    with patched(*CHECKPOINTED):
        fast = run(model, inputs())
        assert hits()[MOE] >= LAYERS
    assert_same(fast, run(model, inputs()))


@whole
@needs_lora
@both_kinds
def test_second_backward(reentrant):
    """Without what the forward kept, which went with the first recompute."""
    model = adapted(reentrant)

    def twice():
        loss = model(**inputs()).loss
        loss.backward(retain_graph=True)
        first = gradients(model)
        loss.backward()
        return first, gradients(model)

    with patched(*CHECKPOINTED):
        fast = twice()
    for got, wanted in zip(fast, twice()):
        assert_gradients(got, wanted)


@whole
@needs_lora
@both_kinds
@pytest.mark.parametrize("outer", [True, False], ids=["outer reentrant", "outer non-reentrant"])
def test_region_inside_a_region(outer, reentrant):
    model, given = adapted(reentrant), inputs()

    def step():
        embedded = model.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
        loss = checkpoint(
            lambda x: model(inputs_embeds=x, labels=given["labels"], use_cache=False).loss,
            embedded,
            use_reentrant=outer,
        )
        loss.backward()
        return {"input": embedded.grad, **gradients(model)}

    with patched(*CHECKPOINTED):
        fast = step()
        assert backwards()[MOE] == LAYERS
    assert_gradients(fast, step())


@whole
@needs_lora
@both_kinds
def test_interleaved_graphs_of_two_shapes(reentrant):
    model = adapted(reentrant)

    def step():
        losses = [model(**inputs(1, 7)).loss, model(**inputs(3, 17, seed=9)).loss]
        for loss in losses:
            loss.backward()
        return gradients(model)

    with patched(*CHECKPOINTED):
        fast = step()
    assert_gradients(fast, step())


@whole
@needs_lora
@both_kinds
@pytest.mark.parametrize("forward", ["full", "stock", "auto", "offload"])
def test_policy_changed_before_backward(forward, reentrant):
    model = adapted(reentrant)

    def step(first, then):
        checkpointing.set_policy(first)
        loss = model(**inputs()).loss
        checkpointing.set_policy(then)
        loss.backward()
        return gradients(model)

    try:
        wanted = step("full", "full")
        with patched(*CHECKPOINTED):
            for then in ("full", "stock", "auto", "offload"):
                assert_gradients(step(forward, then), wanted)
    finally:
        checkpointing.set_policy("full")


@whole
@needs_lora
@both_kinds
def test_a_kept_layer_beside_a_recomputed_one(reentrant, monkeypatch):
    """Under "auto": gate and up are written in the only forward, and nothing is kept for a recompute."""
    model, given = adapted(reentrant), []
    kept = layers_of(model)[-1]
    budget = SimpleNamespace(
        measuring=False,
        keeps=lambda layer, hidden: layer is kept,
        run_kept=lambda region, args: region(*args),
    )
    monkeypatch.setattr(recompute.Auto, "_budget", lambda self, region, args: budget)
    original = patch.lora_experts

    def seen(*args, **kwargs):
        given.append((kwargs["need_output"], kwargs["keep"], kwargs["memo"].low is not None))
        return original(*args, **kwargs)

    monkeypatch.setattr(patch, "lora_experts", seen)
    checkpointing.set_policy("auto")
    try:
        with patched(*CHECKPOINTED):
            fast = run(model, inputs())
    finally:
        checkpointing.set_policy("full")
    assert given == [(True, False, False), (True, True, False), (False, True, True)]
    assert_same(fast, run(model, inputs()))


@whole
@needs_lora
@both_kinds
def test_another_forward_of_the_block_without_gradients(reentrant):
    """A hook asks the block about other tokens, in the forward and in the recompute: what is kept is not theirs."""
    model = adapted(reentrant)
    for layer in layers_of(model):

        def hook(module, args, output, layer=layer):
            with torch.no_grad():
                layer.mlp(2 * output)

        layer.post_attention_layernorm.register_forward_hook(hook)
    with patched(*CHECKPOINTED):
        fast = run(model, inputs())
    assert_same(fast, run(model, inputs()))


# ---- what is saved


def saved_by(*args, **kwargs):
    """What the op saves for backward, and its result."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        y = lora_experts(*args, **kwargs)
    return found, y


@pytest.mark.parametrize("ranks", [(3, 5), (0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("trainable", [True, False])
def test_forward_and_recompute_save_the_same(ranks, trainable):
    """Non-reentrant checkpointing counts them and compares their shapes, dtypes and devices."""
    case = make(ranks=ranks, trainable=trainable)
    kinds = [
        [(t.shape, t.dtype, t.device) for t in saved_by(*case, **how)[0]]
        for how in ({"keep": True}, {"keep": False}, {"need_output": False})
    ]
    assert kinds[0] == kinds[1] == kinds[2]


def test_saves_no_more_than_it_must():
    """x (the caller's own), the routing and its weights, gate and up, both u: no h, no z, nothing in rows of H."""
    tokens = 200
    case = make(tokens)
    saved, _ = saved_by(*case)
    rows = saved[2].shape[0]
    assert rows <= tokens * TOP + EXPERTS * 15
    assert [tuple(t.shape) for t in saved] == [
        (tokens, HIDDEN), (tokens, TOP), (rows,), (tokens, TOP), (EXPERTS,), (rows, 2 * INNER), (rows, 16), (rows, 16),
    ]  # fmt: skip
    assert saved[0].data_ptr() == case[0].data_ptr() and saved[1].data_ptr() == case[2].data_ptr()
    # What stands for gate and up takes no memory.
    assert saved_by(*case, keep=False)[0][5].untyped_storage().nbytes() == 4


def test_nothing_outlives_backward():
    case = make()
    saved, y = saved_by(*case)
    gone = [weakref.ref(t) for t in saved if t.data_ptr() not in (case[0].data_ptr(), case[2].data_ptr())]
    del saved
    y.sum().backward()
    gc.collect()
    assert len(gone) == 6 and not any(ref() is not None for ref in gone)
    assert y.shape == case[0].shape  # alive


@whole
def test_without_gradients_gate_and_up_are_not_written(monkeypatch):
    """As in the forward of a checkpointed region: the activation comes from the product itself."""
    model, given = block(), []
    original = patch.lora_experts
    monkeypatch.setattr(patch, "lora_experts", lambda *a, **k: given.append(k["keep"]) or original(*a, **k))
    x, _ = data()
    with patched(MOE):
        with torch.no_grad():
            y = model(x)
        model(x)
    assert given == [False, True]
    assert distance(y, model(x).detach()) <= FP32


# ---- low precision


@whole
@needs_lora
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("scale", [1.0, 2.0**12, 2.0**-6])
def test_float16_under_a_loss_scale(implementation, scale):
    """Gradients of the routing weights, too, which are sums of products with what comes before those weights."""
    model = lora_block(torch.float16, implementation)
    block_of(model).gate.weight.requires_grad_()
    fix_routing(model)
    x, dy = data((2, 40), torch.float16)
    new, stock = both_steps(model, x, scale * dy)
    as_good(new, stock, exact_step(model, x, scale * dy))


@pytest.mark.skipif(INTERPRETED, reason="numpy warns of every overflow")
def test_an_overflow_reaches_every_gradient():
    """The gradient before the routing weight overflows up to twice as early as stock's: a loss scaler must see it."""
    case = make(64, dtype=torch.float16)
    y = lora_experts(*case)
    y.backward(torch.full_like(y, 6e4))
    for name in ("x", "weights", "gate_up.a", "gate_up.b"):
        assert not leaves(*case)[name].grad.isfinite().all(), name


# ---- copies and files


@whole
@needs_lora
def test_four_bit_experts_in_copies_and_files(tmp_path):
    """A model in the middle of training: deepcopy, torch.save, a state dict, PEFT's adapter."""
    model = adapted(hidden_size=64, intermediate_size=64)
    plain = in_four_bits(model)
    # What the loader does; `in_four_bits` has filled the first block.
    for module in model.modules():
        if isinstance(module, MixtralExperts):
            register_state_hooks(module)
    given = inputs()
    with patched(*CHECKPOINTED):
        wanted = run(model, given)
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.data.zero_()
        other.load_state_dict(model.state_dict())
        for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False), other):
            assert_same(run(twin, given), wanted, 0.0)
        assert not fallbacks(MOE)
    assert_same(wanted, run(plain, given))
    for made, name in ((model, "packed"), (plain, "plain")):
        made.save_pretrained(tmp_path / name)
    packed, dense = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("packed", "plain"))
    assert packed.keys() == dense.keys() and all(torch.equal(packed[key], dense[key]) for key in dense)


@whole
def test_replica_of_data_parallel():
    """Its parameters are plain tensors: stock, and the module that it was made of keeps its plan."""

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = replicate(child)
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter.clone())
        return replica

    model = block()
    x, _ = data()
    with patched(MOE):
        model(x)
        y = replicate(model)(x)
        y.sum().backward()
        assert fallbacks(MOE) == {"gate_up_proj is no parameter": 1} and hits()[MOE] == 1
        assert model.experts.down_proj.grad is not None
        model(x)
        assert hits()[MOE] == 2
    assert distance(y, model(x)) <= FP32


@pytest.mark.skipif(INTERPRETED, reason="runs this file in the interpreter")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:]
