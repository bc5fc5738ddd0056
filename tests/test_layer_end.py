"""Checkpoints that the script puts round the layers itself, and what ``layer_end`` believes of a layer's forward.

With the stand-in of ``test_checkpointing.py``.
"""

from contextlib import nullcontext
from functools import partial, wraps
from types import FunctionType

import pytest
import torch
from test_checkpointing import LEFT_OUT, NAME, NEEDED, TALLY, assert_same, build, enable, in_thread, loss_of
from test_checkpointing import patched as patched_fixture
from tiny_llama import patched as all_patched
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from fast_unsloth_patch.patches import checkpointing, layer_end

# A fixture, by the name that it is asked for.
patched = patched_fixture


def through(layer, *args, **kwargs):
    """A function of the script's that returns the layer's result as its own."""
    return layer(*args, **kwargs)


def twice_through(layer, *args, **kwargs):
    return through(layer, *args, **kwargs)


def through_and_more(layer, *args, **kwargs):
    hidden = layer(*args, **kwargs)
    return hidden * hidden


def through_in_a_block(layer, *args, **kwargs):
    with nullcontext():
        return layer(*args, **kwargs)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
class TestCheckpointOfTheScripts:
    """torch.utils.checkpoint.checkpoint called by the script round each layer, with no help of transformers."""

    def loss(self, model, use_reentrant, how=None, **kwargs):
        ids, positions = torch.arange(10).reshape(2, 5), torch.arange(5)[None]
        x = model.model.embed_tokens(ids)
        rotary = model.model.rotary_emb(x, positions)
        for layer in model.model.layers:
            function = layer if how is None else partial(how, layer)
            function = partial(function, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            x = checkpoint(function, x, use_reentrant=use_reentrant, **kwargs)
        return model.lm_head(model.model.norm(x)).square().mean()

    def compare(self, patched, use_reentrant, calls, backward=torch.Tensor.backward, **kwargs):
        model = build()
        backward(self.loss(model, use_reentrant, **kwargs))
        wanted = {name: p.grad for name, p in model.named_parameters()}
        patched.apply()
        model = build()
        backward(self.loss(model, use_reentrant, **kwargs))
        assert_same({name: p.grad for name, p in model.named_parameters()}, wanted)
        assert patched.take() == calls

    @pytest.mark.parametrize("backward", [torch.Tensor.backward, in_thread])
    @pytest.mark.parametrize("how", [None, through, twice_through])
    def test_leaves_out_the_same(self, patched, use_reentrant, how, backward):
        self.compare(patched, use_reentrant, [NEEDED] * 2 + [LEFT_OUT] * 2, backward, how=how)
        assert TALLY.recomputed == 2 and TALLY.forward == 0

    @pytest.mark.parametrize("how", [through_and_more, through_in_a_block])
    def test_code_after_the_layer(self, patched, use_reentrant, how):
        self.compare(patched, use_reentrant, [NEEDED] * 4, how=how)
        assert TALLY.recomputed == 0

    def test_policy_stock(self, patched, use_reentrant):
        checkpointing.set_policy("stock")
        self.compare(patched, use_reentrant, [NEEDED] * 4)

    def test_without_the_patch(self, patched, use_reentrant):
        patched.apply()
        delattr(LlamaDecoderLayer, NAME)
        self.loss(build(), use_reentrant).backward()
        assert patched.take() == [NEEDED] * 4
        setattr(LlamaDecoderLayer, NAME, None)

    def test_hooks(self, patched, use_reentrant):
        patched.apply()
        model = build()
        seen = []
        model.model.layers[0].register_forward_hook(lambda *values: seen.append(values[2]))
        model.model.layers[1].mlp.register_forward_hook(lambda *values: seen.append(values[2]))
        self.loss(model, use_reentrant).backward()
        assert patched.take() == [NEEDED] * 4
        assert len(seen) >= 2 and all(torch.isfinite(t).all() for t in seen)

    def test_checkpoint_wrapper(self, patched, use_reentrant):
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as module

        model = build()
        loss_of(model).backward()
        wanted = {name: p.grad for name, p in model.named_parameters()}
        patched.apply()
        model = build()
        kind = module.CheckpointImpl.REENTRANT if use_reentrant else module.CheckpointImpl.NO_REENTRANT
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = module.checkpoint_wrapper(layer, checkpoint_impl=kind)
        loss_of(model).backward()
        got = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
        assert_same(got, wanted)
        assert patched.take() == [NEEDED] * 2 + [LEFT_OUT] * 2

    def test_selective(self, patched, use_reentrant):
        """It replays what operations returned, by their number: none may be left out."""
        if use_reentrant:
            return
        context = partial(torch_checkpoint.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        self.compare(patched, use_reentrant, [NEEDED] * 4, context_fn=context)

    def test_nested(self, patched, use_reentrant):
        """Inside an outer recompute a layer's first call is needed."""

        def outer(model, inner_reentrant):
            return checkpoint(partial(self.loss, use_reentrant=inner_reentrant), model, use_reentrant=False)

        for inner_reentrant in (True, False):
            model = build()
            self.loss(model, use_reentrant).backward()
            wanted = {name: p.grad for name, p in model.named_parameters()}
            patched.apply()
            model = build()
            outer(model, inner_reentrant).backward()
            assert_same({name: p.grad for name, p in model.named_parameters()}, wanted)
            assert patched.take().count(LEFT_OUT) == 2
            patched.unapply()

    def test_transformers_checkpoint_inside(self, patched, use_reentrant):
        patched.apply()
        model = build()
        self.loss(model, use_reentrant).backward()
        wanted = {name: p.grad for name, p in model.named_parameters()}
        for inner_reentrant in (True, False):
            model = build()
            enable(model, inner_reentrant)
            self.loss(model, use_reentrant).backward()
            assert_same({name: p.grad for name, p in model.named_parameters()}, wanted)


class TestLayerEnd:
    def test_ours_is_believed_what_wraps_it_is_not(self):
        def builder():
            def forward(self, hidden_states):
                return hidden_states

            forward.ends_with_mlp = True
            return forward

        foreign = builder()
        assert not layer_end.ends_with_mlp(foreign)
        ours = FunctionType(foreign.__code__, {"__name__": "fast_unsloth_patch.patches.decoder"}, "forward")
        assert not layer_end.ends_with_mlp(ours)
        ours = FunctionType(foreign.__code__, {"__name__": "fast_unsloth_patch.patches.decoder"}, "forward")
        ours.ends_with_mlp = True
        assert layer_end.ends_with_mlp(ours)

        @wraps(ours)
        def wrapper(self, hidden_states):
            return ours(self, hidden_states) ** 2

        assert wrapper.ends_with_mlp and not layer_end.ends_with_mlp(wrapper)

    def test_stock_and_the_wrapper_that_checkpoints_it(self):
        assert layer_end.ends_with_mlp(LlamaDecoderLayer.forward)
        assert not layer_end.ends_with_mlp(LlamaMLP.forward)
        assert not layer_end.ends_with_mlp(None)

    def test_the_patched_layer(self):
        with all_patched("llama.decoder_layer", "llama.checkpointing"):
            assert layer_end.ends_with_mlp(LlamaDecoderLayer.forward)
