"""The recompute policy against stock: gradients, what is left out, and who decides fast or stock in the recompute.

The MLP is a stand-in for the real op: it records whether its output is needed and returns NaN where it is not, so a
recompute that left out too much shows in the gradients. Everything runs in float64.

FAST_UNSLOTH_TEST_SITES (folders, separated like PATH) names more transformers versions to run this file with.
"""

import copy
import gc
import os
import pickle
import threading
import weakref
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path

import pytest
import torch
import transformers
from tiny_llama import HOOKS_OUTSIDE
from torch import nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from fast_unsloth_patch.errors import PatchUnavailableError
from fast_unsloth_patch.patches import checkpointing
from fast_unsloth_patch.status import tally
from fast_unsloth_patch.switch import disabled, stock_only

NAME = "_gradient_checkpointing_func"
TALLY = tally("llama.checkpointing")
SITES = [site for site in os.environ.get("FAST_UNSLOTH_TEST_SITES", "").split(os.pathsep) if site]
# What the stand-in records, one entry a call.
NEEDED, RECOMPUTED, LEFT_OUT, STOCK = "needed", "recomputed", "left out", "stock"


class _Mlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), saving what its own backward needs whether or not the output is computed."""

    @staticmethod
    def forward(ctx, x, gate, up, down, need_output):
        g, u = x @ gate.T, x @ up.T
        ctx.save_for_backward(x, g, u, gate, up, down)
        return (nn.functional.silu(g) * u) @ down.T if need_output else torch.full_like(x, float("nan"))

    @staticmethod
    def backward(ctx, dy):
        x, g, u, gate, up, down = ctx.saved_tensors
        sigmoid = torch.sigmoid(g)
        silu = g * sigmoid
        dh = dy @ down
        dg, du = dh * u * (sigmoid + silu * (1 - sigmoid)), dh * silu
        flat = [t.flatten(0, -2) for t in (x, dg, du, silu * u, dy)]
        return dg @ gate + du @ up, flat[1].T @ flat[0], flat[2].T @ flat[0], flat[4].T @ flat[3], None


class Patched:
    """Puts the property and the stand-in on the classes, and takes them off again, as install does."""

    def __init__(self):
        self.calls = []
        self.by_thread = {}

    def apply(self):
        self.stock = stock = LlamaMLP.forward

        def forward(mlp, x):
            if torch.compiler.is_compiling():
                assert not checkpointing.recomputing() and not checkpointing.output_unused(mlp)
                return stock(mlp, x)
            unused = checkpointing.output_unused(mlp)
            assert not checkpointing.output_unused(mlp.down_proj)
            if stock_only():
                call = STOCK
            else:
                call = LEFT_OUT if unused else RECOMPUTED if checkpointing.recomputing() else NEEDED
            self.calls.append(call)
            self.by_thread.setdefault(threading.get_ident(), []).append(call)
            if call == STOCK:
                return stock(mlp, x)
            return _Mlp.apply(x, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, not unused)

        LlamaMLP.forward = forward
        setattr(LlamaDecoderLayer, NAME, checkpointing.checkpointing_func(None, TALLY))

    def unapply(self):
        if NAME in LlamaDecoderLayer.__dict__:
            delattr(LlamaDecoderLayer, NAME)
            LlamaMLP.forward = self.stock

    def take(self):
        calls, self.calls[:] = self.calls[:], []
        return calls


@pytest.fixture
def patched():
    patched = Patched()
    yield patched
    patched.unapply()
    checkpointing.set_policy("full")


def build(layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).double().train()


def enable(model, use_reentrant=False, function=None):
    function = function or partial(checkpoint, use_reentrant=use_reentrant)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)


def loss_of(model, around=None):
    """A loss of the model's layers; ``around`` (a checkpoint function) goes round all of them together."""
    ids = torch.arange(10).reshape(2, 5)
    positions = torch.arange(5)[None]
    base = model.model
    x = base.embed_tokens(ids)
    rotary = base.rotary_emb(x, positions)

    def layers(x):
        for layer in base.layers:
            x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return x

    x = around(layers, x) if around else layers(x)
    return model.lm_head(base.norm(x)).square().mean()


def gradients(model, backward=torch.Tensor.backward, **kwargs):
    model.zero_grad(set_to_none=True)
    backward(loss_of(model, **kwargs))
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def in_thread(loss):
    """CUDA runs backward in a thread of autograd's, which has none of the script's context variables."""
    caught = []

    def run():
        try:
            loss.backward()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not caught, caught


def assert_same(got, wanted, tolerance=1e-12):
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.norm() > 0
        assert (got[name] - gradient).norm() <= tolerance * gradient.norm(), name


def user_checkpoint(use_reentrant):
    return partial(checkpoint, use_reentrant=use_reentrant)


@pytest.mark.parametrize("before", [True, False], ids=["enabled before", "enabled after"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
class TestGradientsEqualStock:
    def prepare(self, patched, use_reentrant, before, **kwargs):
        """Stock gradients with checkpointing on, then the patch."""
        model = build()
        enable(model, use_reentrant)
        wanted = gradients(model, **kwargs)
        if not before:
            model = build()
        patched.apply()
        if not before:
            assert not hasattr(model.model.layers[0], NAME)
            enable(model, use_reentrant)
        return model, wanted

    @pytest.mark.parametrize("backward", [torch.Tensor.backward, in_thread])
    def test_layer(self, patched, use_reentrant, before, backward):
        model, wanted = self.prepare(patched, use_reentrant, before)
        assert_same(gradients(model, backward), wanted)
        assert patched.take() == [NEEDED] * 2 + [LEFT_OUT] * 2
        checkpointing.set_policy("stock")
        assert_same(gradients(model, backward), wanted)
        assert patched.take() == [NEEDED] * 2 + [RECOMPUTED] * 2

    @pytest.mark.parametrize("outer_reentrant", [True, False])
    def test_nested_in_a_user_checkpoint(self, patched, use_reentrant, before, outer_reentrant):
        around = user_checkpoint(outer_reentrant)
        model, wanted = self.prepare(patched, use_reentrant, before, around=around)
        assert_same(gradients(model, around=around), wanted)
        calls = patched.take()
        # The outer recompute needs the first layer's output; a non-reentrant one stops before the second layer's MLP.
        assert calls.count(LEFT_OUT) == 2 and calls.count(RECOMPUTED) == 0
        assert calls[:3] == [NEEDED] * 3 and calls.count(NEEDED) in (3, 4)

    @pytest.mark.parametrize("backward", [torch.Tensor.backward, in_thread])
    def test_disabled_round_the_forward_only(self, patched, use_reentrant, before, backward):
        model, wanted = self.prepare(patched, use_reentrant, before)
        with disabled():
            loss = loss_of(model)
        model.zero_grad()
        backward(loss)
        assert_same({name: p.grad for name, p in model.named_parameters()}, wanted, tolerance=0)
        assert patched.take() == [STOCK] * 4
        assert not stock_only()

    @pytest.mark.parametrize("backward", [torch.Tensor.backward, in_thread])
    def test_disabled_round_the_backward_only(self, patched, use_reentrant, before, backward):
        model, wanted = self.prepare(patched, use_reentrant, before)
        model.zero_grad()
        loss = loss_of(model)
        with disabled():
            backward(loss)
            assert stock_only()
        assert_same({name: p.grad for name, p in model.named_parameters()}, wanted)
        assert patched.take() == [NEEDED] * 2 + [LEFT_OUT] * 2

    def test_unapply_restores(self, patched, use_reentrant, before):
        model, wanted = self.prepare(patched, use_reentrant, before)
        gradients(model)
        patched.unapply()
        patched.take()
        function = getattr(model.model.layers[0], NAME)
        assert function is model.model.layers[0].__dict__[NAME] and type(function) is partial
        assert_same(gradients(model), wanted, tolerance=0)
        assert patched.take() == []


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
class TestRegions:
    @pytest.fixture
    def wanted(self):
        return gradients(build())

    @pytest.fixture
    def model(self, wanted, patched, use_reentrant):
        patched.apply()
        model = build()
        enable(model, use_reentrant)
        return model

    def test_user_checkpoint_over_two_layers_leaves_nothing_out(self, wanted, patched, use_reentrant):
        patched.apply()
        assert_same(gradients(build(), around=user_checkpoint(use_reentrant)), wanted)
        assert patched.take() == [NEEDED] * 4

    def test_every_second_layer(self, patched, model, wanted):
        model.model.layers[0].gradient_checkpointing = False
        assert_same(gradients(model), wanted)
        assert patched.take() == [NEEDED] * 2 + [LEFT_OUT]

    def test_whole_model_by_its_own_switch(self, patched, use_reentrant):
        ids = torch.arange(10).reshape(2, 5)
        model = build()
        model(ids, labels=ids).loss.backward()
        wanted = {name: p.grad for name, p in model.named_parameters()}
        patched.apply()
        model = build()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(ids, labels=ids).loss.backward()
        assert_same({name: p.grad for name, p in model.named_parameters()}, wanted)
        assert patched.take() == [NEEDED] * 2 + [LEFT_OUT] * 2

    def test_second_backward(self, patched, model, wanted):
        loss = loss_of(model)
        model.zero_grad()
        loss.backward(retain_graph=True)
        loss.backward()
        assert_same({name: p.grad / 2 for name, p in model.named_parameters()}, wanted)
        assert patched.take() == [NEEDED] * 2 + [LEFT_OUT] * 4

    def test_gradient_accumulation_with_interleaved_graphs(self, patched, model, wanted):
        model.zero_grad()
        losses = [loss_of(model), loss_of(model)]
        for loss in losses:
            loss.backward()
        assert_same({name: p.grad / 2 for name, p in model.named_parameters()}, wanted)
        assert patched.take() == [NEEDED] * 4 + [LEFT_OUT] * 4

    def test_no_grad_and_eval(self, patched, model, wanted):
        stock_loss = loss_of(build()).item()
        patched.take()
        with torch.no_grad():
            assert loss_of(model).item() == pytest.approx(stock_loss, rel=1e-12)
        assert loss_of(model.eval()).item() == pytest.approx(stock_loss, rel=1e-12)
        assert patched.take() == [NEEDED] * 4
        assert_same(gradients(model.train()), wanted)

    def test_exception_in_the_region(self, patched, model, wanted):
        def fail(*_):
            raise KeyError("from a hook")

        loss = loss_of(model)
        for run in (lambda: loss_of(model), loss.backward):
            hook = model.model.layers[1].mlp.up_proj.register_forward_pre_hook(fail)
            replaced, LlamaMLP.forward = LlamaMLP.forward, patched.stock
            with pytest.raises(KeyError), disabled() if run is not loss.backward else nullcontext():
                run()
            hook.remove()
            LlamaMLP.forward = replaced
            assert not checkpointing.recomputing() and not stock_only()
        patched.take()
        assert_same(gradients(model), wanted)
        assert patched.take() == [NEEDED] * 2 + [LEFT_OUT] * 2

    @pytest.mark.parametrize("place", ["layer", "layer pre", "layer backward", "mlp", "mlp pre", "everywhere"])
    def test_hook_added_between_forward_and_backward(self, patched, model, wanted, place):
        seen = []

        def hook(module, *tensors):
            seen.extend(t for t in tensors if isinstance(t, torch.Tensor))

        loss = loss_of(model)
        model.zero_grad()
        module = model.model.layers[0].mlp if "mlp" in place else model.model.layers[0]
        if place == "everywhere":
            handle = nn.modules.module.register_module_forward_hook(hook)
        elif place.endswith("pre"):
            handle = module.register_forward_pre_hook(hook)
        elif place.endswith("backward"):
            handle = module.register_full_backward_hook(hook)
        else:
            handle = module.register_forward_hook(hook)
        try:
            loss.backward()
        finally:
            handle.remove()
        assert_same({name: p.grad for name, p in model.named_parameters()}, wanted)
        assert all(torch.isfinite(t).all() for t in seen)
        # Backward reaches the second layer first; only a hook on every module concerns it.
        second = RECOMPUTED if place == "everywhere" else LEFT_OUT
        first = LEFT_OUT if place.startswith("layer") and HOOKS_OUTSIDE else RECOMPUTED
        assert patched.take() == [NEEDED, NEEDED, second, first]

    def test_forward_on_the_instance(self, patched, model, wanted):
        layer = model.model.layers[0]
        layer.mlp.forward = partial(LlamaMLP.forward, layer.mlp)
        model.model.layers[1].forward = model.model.layers[1].forward
        assert_same(gradients(model), wanted)
        assert patched.take() == [NEEDED] * 2 + [LEFT_OUT if HOOKS_OUTSIDE else RECOMPUTED, RECOMPUTED]

    def test_checkpoint_function_that_is_not_torchs(self, patched, wanted, use_reentrant):
        patched.apply()

        @wraps(checkpoint)
        def wrapper(function, *args):
            return checkpoint(function, *args, use_reentrant=use_reentrant)

        for function in (wrapper, partial(wrapper)):
            model = build()
            enable(model, function=function)
            assert_same(gradients(model), wanted)
            assert patched.take() == [NEEDED] * 2 + [RECOMPUTED] * 2

    def test_foreign_function_in_the_place_of_torchs(self, patched, wanted, use_reentrant, monkeypatch):
        patched.apply()

        @wraps(checkpoint)
        def impostor(function, *args, **kwargs):
            return checkpoint(function, *args, **kwargs)

        monkeypatch.setattr(torch_checkpoint, "checkpoint", impostor)
        model = build()
        enable(model, function=partial(impostor, use_reentrant=use_reentrant))
        assert_same(gradients(model), wanted)
        assert patched.take() == [NEEDED] * 2 + [RECOMPUTED] * 2

    def test_arguments_of_torchs_checkpoint(self, patched, wanted, use_reentrant):
        patched.apply()
        cases = [({"preserve_rng_state": False}, LEFT_OUT)]
        if not use_reentrant:
            cases += [({"determinism_check": "none"}, LEFT_OUT), ({"early_stop": False}, LEFT_OUT)]
            cases += [({"context_fn": lambda: (nullcontext(), nullcontext())}, RECOMPUTED)]
        for kwargs, call in cases:
            model = build()
            enable(model, function=partial(checkpoint, use_reentrant=use_reentrant, **kwargs))
            assert_same(gradients(model), wanted)
            assert patched.take() == [NEEDED] * 2 + [call] * 2

    def test_without_early_stop(self, patched, model, wanted):
        with torch_checkpoint.set_checkpoint_early_stop(False):
            assert_same(gradients(model), wanted)
        assert patched.take() == [NEEDED] * 2 + [LEFT_OUT] * 2

    def test_layer_with_another_forward_recomputes_everything(self, patched, use_reentrant):
        class Scaled(LlamaDecoderLayer):
            """Saves the MLP's output for backward: leaving it out gives wrong gradients."""

            def forward(self, hidden_states, position_embeddings=None, **kwargs):
                residual = hidden_states
                attention, _ = self.self_attn(
                    self.input_layernorm(hidden_states), position_embeddings=position_embeddings, attention_mask=None
                )
                hidden_states = residual + attention
                return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)).square()

        def scaled():
            model = build()
            for layer in model.model.layers:
                layer.__class__ = Scaled
            return model

        wanted = gradients(scaled())
        patched.apply()
        model = scaled()
        enable(model, use_reentrant)
        assert_same(gradients(model), wanted)
        assert patched.take() == [NEEDED] * 2 + [RECOMPUTED] * 2

    def test_replaced_forward_that_claims_to_wrap_stock(self, patched, wanted, use_reentrant, monkeypatch):
        stock = LlamaDecoderLayer.forward

        @wraps(stock)
        def replaced(self, hidden_states, **kwargs):
            return stock(self, hidden_states, **kwargs)

        monkeypatch.setattr(LlamaDecoderLayer, "forward", replaced)
        rewrap = LlamaDecoderLayer.__mro__[1].__dict__.get("__init_subclass__")
        if rewrap:
            rewrap.__func__(LlamaDecoderLayer)
        patched.apply()
        model = build()
        enable(model, use_reentrant)
        assert_same(gradients(model), wanted)
        assert patched.take() == [NEEDED] * 2 + [RECOMPUTED] * 2

    def test_threads_do_not_meet(self, patched, use_reentrant, wanted):
        patched.apply()
        barrier = threading.Barrier(2, timeout=60)
        results = {}

        def train(model, stock):
            enable(model, use_reentrant)
            for _ in range(5):
                barrier.wait()
                with disabled() if stock else nullcontext():
                    loss = loss_of(model)
                barrier.wait()
                model.zero_grad()
                loss.backward()
            calls = patched.by_thread[threading.get_ident()]
            results[stock] = {name: p.grad for name, p in model.named_parameters()}, calls

        threads = [threading.Thread(target=train, args=(build(), stock)) for stock in (True, False)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for stock, expected in ((True, [STOCK] * 4), (False, [NEEDED] * 2 + [LEFT_OUT] * 2)):
            assert_same(results[stock][0], wanted)
            assert results[stock][1] == expected * 5

    def test_forward_of_another_model_inside_a_recompute(self, patched, model, wanted, use_reentrant):
        """A teacher asked from a hook, say: its layers' outputs are needed although a recompute is going on."""
        other = build()
        enable(other, use_reentrant)
        seen = []

        def ask(*_):
            with torch.no_grad():
                seen.append(loss_of(other).item())

        loss = loss_of(model)
        patched.take()
        hook = model.model.layers[1].self_attn.register_forward_pre_hook(ask)
        loss.backward()
        hook.remove()
        assert seen == [loss.item()]
        assert patched.take() == [NEEDED] * 2 + [LEFT_OUT] * 2
        assert_same({name: p.grad for name, p in model.named_parameters()}, wanted)

    def test_disabled_inside_the_scripts_checkpoint_function(self, patched, wanted, use_reentrant):
        def function(function, *args):
            with disabled():
                return checkpoint(function, *args, use_reentrant=use_reentrant)

        patched.apply()
        model = build()
        enable(model, function=function)
        assert_same(gradients(model), wanted)
        assert patched.take() == [STOCK] * 4

    def test_counts(self, model):
        forward, recomputed, reasons = TALLY.forward, TALLY.recomputed, dict(TALLY.fallbacks)

        def told():
            return {r: n - reasons.get(r, 0) for r, n in TALLY.fallbacks.items() if n != reasons.get(r, 0)}

        gradients(model)
        assert (TALLY.forward - forward, TALLY.recomputed - recomputed, told()) == (2, 2, {})
        with model.model.layers[0].mlp.register_forward_hook(lambda *_: None):
            gradients(model)
        assert (TALLY.forward - forward, TALLY.recomputed - recomputed) == (4, 4)
        assert told() == {"hooks on the layer": 1}
        with disabled():
            loss = loss_of(model)
        loss.backward()
        assert (TALLY.forward - forward, TALLY.recomputed - recomputed) == (4, 4)
        assert told() == {"hooks on the layer": 1, "disabled": 4}


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
class TestKeep:
    @pytest.fixture
    def seen(self, patched, monkeypatch):
        """What each call of an MLP found, and what it kept: its input's sum and None."""
        patched.apply()
        inner, found = LlamaMLP.forward, []

        def forward(mlp, x):
            found.append(checkpointing.kept(mlp, "sum"))
            checkpointing.keep(mlp, "sum", x.sum(), None)
            return inner(mlp, x)

        monkeypatch.setattr(LlamaMLP, "forward", forward)
        return found

    def test_from_forward_to_recompute(self, seen, use_reentrant):
        model = build()
        enable(model, use_reentrant)
        sums = []
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda mlp, args: sums.append(args[0].detach().sum()))
        loss = loss_of(model)
        regions = [o for o in gc.get_objects() if type(o) is checkpointing._Region and o.store]
        assert len(regions) == 2
        loss.backward(retain_graph=True)
        assert seen[:2] == [None, None]
        for found, wanted in zip(seen[2:], (sums[1], sums[0])):
            total, nothing = found
            assert torch.equal(total, wanted) and not total.requires_grad and nothing is None
        assert all(region.store is None for region in regions), "let go at the end of the recompute"
        del seen[:], regions
        loss.backward()
        assert seen == [None, None]

    def test_let_go_with_the_graph(self, seen, use_reentrant):
        model = build()
        enable(model, use_reentrant)
        loss = loss_of(model)
        stores = [weakref.ref(t[0]) for o in gc.get_objects() if type(o) is checkpointing._Region for t in stored(o)]
        assert len(stores) == 2 and all(store() is not None for store in stores)
        gc.disable()
        try:
            del loss
            assert all(store() is None for store in stores), "no cycle holds them"
        finally:
            gc.enable()

    def test_a_module_that_runs_twice(self, seen, use_reentrant):
        model = build()
        enable(model, use_reentrant)
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda mlp, args: mlp.forward(args[0]) * 0 + args[0])
        loss_of(model).backward()
        assert len(seen) >= 7 and set(seen) == {None}

    def test_nothing_is_kept(self, seen, use_reentrant):
        model = build()
        loss_of(model).backward()
        enable(model, use_reentrant)
        with torch.no_grad():
            loss_of(model)
        with disabled():
            loss_of(model).backward()
        checkpointing.set_policy("stock")
        loss_of(model).backward()
        assert set(seen) == {None}


def stored(region):
    return list((region.store or {}).values())


class TestAttribute:
    @pytest.fixture
    def layer(self, patched):
        patched.apply()
        model = build(1)
        enable(model, use_reentrant=True)
        return model.model.layers[0]

    def test_never_enabled_is_absent_as_in_stock(self, patched):
        with pytest.raises(AttributeError) as stock:
            getattr(build(1).model.layers[0], NAME)
        patched.apply()
        layer = build(1).model.layers[0]
        assert not hasattr(layer, NAME)
        with pytest.raises(AttributeError) as ours:
            getattr(layer, NAME)
        assert str(ours.value) == str(stock.value)
        with pytest.raises(AttributeError):
            delattr(layer, NAME)

    def test_delete(self, layer):
        delattr(layer, NAME)
        assert not hasattr(layer, NAME) and NAME not in layer.__dict__

    def test_shows_the_scripts_function(self, layer):
        function = getattr(layer, NAME)
        assert function.keywords == {"use_reentrant": True} and function.func is checkpoint
        assert not hasattr(function, "no_such_thing")

    def test_copied_from_layer_to_layer_stays_the_scripts(self, layer):
        other = build(1).model.layers[0]
        setattr(other, NAME, getattr(layer, NAME))
        assert other.__dict__[NAME] is layer.__dict__[NAME]

    @pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies(self, patched, layer, clone):
        copied = clone(layer)
        assert type(copied.__dict__[NAME]) is partial and copied.__dict__[NAME].keywords == {"use_reentrant": True}
        assert clone(getattr(layer, NAME)).keywords == {"use_reentrant": True}
        assert b"fast_unsloth" not in pickle.dumps((layer, getattr(layer, NAME)))
        model = build(1)
        model.model.layers[0] = copied
        patched.take()
        gradients(model)
        assert patched.take() == [NEEDED, LEFT_OUT]

    def test_class_level_function(self, patched):
        def class_level(self, function, *args):
            return checkpoint(function, *args, use_reentrant=False)

        patched.apply()
        wanted = gradients(build(1))
        setattr(LlamaDecoderLayer, NAME, checkpointing.checkpointing_func(class_level, TALLY))
        model = build(1)
        model.model.layers[0].gradient_checkpointing = True
        patched.take()
        assert_same(gradients(model), wanted)
        assert patched.take() == [NEEDED, RECOMPUTED]

    def test_declines_another_librarys_property(self):
        with pytest.raises(PatchUnavailableError, match="property"):
            checkpointing.checkpointing_func(property(lambda self: checkpoint), TALLY)


def test_policy_is_checked():
    with pytest.raises(ValueError, match="'full', 'stock', 'auto', 'offload', not 'x'"):
        checkpointing.set_policy("x")


def test_outside_any_region():
    assert not checkpointing.recomputing()
    assert not checkpointing.output_unused(build(1).model.layers[0].mlp)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("before", [True, False], ids=["enabled before", "enabled after"])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "layer by layer"])
def test_compile_stays_one_graph(patched, fresh_dynamo, whole, before):
    model = build()
    wanted = gradients(model)
    if before:
        enable(model)
    patched.apply()
    if not before:
        enable(model)
    if whole:
        loss = torch.compile(partial(loss_of, model), backend="aot_eager", fullgraph=True)
    else:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        loss = partial(loss_of, model)
    model.zero_grad()
    for _ in range(2):
        loss().backward()
    assert_same({name: p.grad / 2 for name, p in model.named_parameters()}, wanted)
    assert patched.take() == []


def test_transformers_is_the_one_asked_for():
    assert transformers.__file__.startswith(os.environ.get("FAST_UNSLOTH_TEST_SITE", ""))


if SITES:

    @pytest.mark.parametrize("site", SITES)
    def test_with_another_transformers(site, run_python):
        path = os.pathsep.join([site, str(Path(__file__).resolve().parents[1])])
        env = {"PYTHONPATH": path, "FAST_UNSLOTH_TEST_SITE": site}
        done = run_python(None, env, 300, ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__])
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
