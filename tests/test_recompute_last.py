"""``recompute="full"``: the last layer before a fused loss is kept, every other layer is recomputed, wherever and by
whatever a layer is checkpointed.
"""

from functools import partial

import pytest
import torch
from packed_cases import EVERYTHING
from tiny_llama import batch, layers_of, llama, lora, mixtral, patched
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fast_unsloth_patch
from fast_unsloth_patch.patches import budget, causal_lm, checkpointing
from fast_unsloth_patch.status import tally

LAYERS = 3
TALLY = tally("llama.checkpointing")


@pytest.fixture(autouse=True)
def policy():
    checkpointing.set_policy("stock")
    checkpointing.set_policy("full")
    yield checkpointing.set_policy
    checkpointing.set_policy("full")


def build(train=lora, make=llama, reentrant=False, **options):
    model = train(make(num_hidden_layers=LAYERS, **options))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


def recomputed(model, inputs=None, patches=EVERYTHING, run=None, counts=TALLY):
    """Loss, gradients, and how many layers backward recomputed."""
    model.zero_grad(set_to_none=True)
    with patched(*patches):
        before = counts.recomputed
        loss = (run or (lambda m, i: m(**i, use_cache=False).loss))(model, inputs or batch())
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), grads, counts.recomputed - before


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("train", [lora, lambda model: model], ids=["lora", "full"])
def test_the_last_layer_is_kept(policy, train, reentrant):
    """With the bits that a recompute of all layers gives; not beside a head that trains."""
    model = build(train, reentrant=reentrant)
    loss, grads, times = recomputed(model)
    assert times == (LAYERS - 1 if train is lora else LAYERS)
    assert ("the last, which the loss follows" in checkpointing.describe()) is (train is lora)
    policy("offload")
    wanted_loss, wanted, all_of_them = recomputed(model)
    assert all_of_them == LAYERS and torch.equal(loss, wanted_loss) and grads.keys() == wanted.keys()
    assert all(torch.equal(grads[name], wanted[name]) for name in grads)


@pytest.mark.parametrize("name", ["full", "offload"])
def test_the_loss_is_lean_where_a_layer_is_held(policy, name, monkeypatch):
    """The kept layer lives while the loss is computed; with nothing kept there is room for larger chunks."""
    told, loss = [], causal_lm.linear_cross_entropy
    monkeypatch.setattr(causal_lm, "linear_cross_entropy", lambda *a, **k: told.append(k["lean"]) or loss(*a, **k))
    policy(name)
    recomputed(build())
    plain = lora(llama(num_hidden_layers=LAYERS))
    recomputed(plain)
    assert told == [name == "full", False]


def test_each_forward_before_a_backward_keeps_its_own():
    def run(model, inputs):
        return sum(model(**batch(seed=seed), use_cache=False).loss for seed in range(3))

    assert recomputed(build(), run=run)[2] == 3 * (LAYERS - 1)


def test_mixtral():
    assert recomputed(build(make=mixtral), counts=tally("mixtral.checkpointing"))[2] == LAYERS - 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_frozen_inputs_train_as_stock_does(reentrant):
    """Without gradients of the embedding a reentrant checkpoint of stock's trains nothing; nor does a kept layer."""
    model = lora(llama(num_hidden_layers=LAYERS)).train()
    function = partial(checkpoint, use_reentrant=reentrant)
    model.get_base_model()._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    if not reentrant:
        assert recomputed(model)[2] == LAYERS - 1
        return
    with pytest.raises(RuntimeError, match="does not require grad"):
        recomputed(model)


def own_loss(model, inputs):
    """As trainers with a loss of their own: the model returns logits."""
    logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


def disabled(model, inputs):
    with fast_unsloth_patch.disabled():
        return model(**inputs, use_cache=False).loss


def hooked(model, inputs):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return model(**inputs, use_cache=False).loss


def base_model(model, inputs):
    return model.get_base_model().model(inputs["input_ids"], use_cache=False).last_hidden_state.square().mean()


@pytest.mark.parametrize("run", [own_loss, hooked, base_model])
def test_all_are_recomputed_where_no_fused_loss_follows_at_once(run):
    assert recomputed(build(), run=run)[2] == LAYERS


def test_a_disabled_region_is_stocks(monkeypatch):
    """Which does not count it: so by how often attention runs, in the forward and again."""
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or sdpa(*a, **k)
    )
    assert recomputed(build(), run=disabled)[2] == 0 and len(calls) == 2 * LAYERS
    calls.clear()
    left = build()
    fast_unsloth_patch.keep_stock(left.get_base_model().model)
    before = tally("llama.loss").forward
    recomputed(left)
    assert len(calls) == 2 * LAYERS and tally("llama.loss").forward == before + 1, "the layers' alone"
    calls.clear()
    assert recomputed(build())[2] == LAYERS - 1 and len(calls) == 2 * LAYERS - 1


def test_a_kept_layer_leaves_nothing_for_a_recompute():
    model, told = build(), []

    def tell(*_):
        region = checkpointing._REGION.get()
        told.append((region.keeps, region.store is None))

    for layer in layers_of(model):
        layer.mlp.register_forward_hook(tell)
    assert recomputed(model)[2] == LAYERS - 1
    assert told[:LAYERS] == [(False, False)] * (LAYERS - 1) + [(True, True)]


def test_all_are_recomputed_where_the_script_said_so(policy):
    assert recomputed(build(), patches=[p for p in EVERYTHING if p != "llama.loss"])[2] == LAYERS
    policy("stock")
    assert recomputed(build())[2] == LAYERS
    assert checkpointing.describe() == ""


def test_another_checkpoint_function_is_called():
    """Selective checkpointing looks at what the region computes."""
    model = build()
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    function = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    for layer in layers_of(model):
        layer._gradient_checkpointing_func = function
    assert recomputed(model)[2] == LAYERS


def test_ranks_that_would_wait_for_its_recompute(monkeypatch):
    model = build()
    monkeypatch.setattr(budget, "several_ranks", lambda: True)
    assert recomputed(model)[2] == LAYERS - 1, "DDP: nothing communicates"
    layers_of(model)[-1].mlp._is_hooked = True
    assert recomputed(model)[2] == LAYERS


def test_the_last_layer_of_a_model_asked_inside_is_no_last_layer():
    asked, teacher = [], build()

    def ask(module, args, output):
        asked.append(base_model(teacher, batch(seed=1)))

    def run(model, inputs):
        handle = model.get_input_embeddings().register_forward_hook(ask)
        loss = model(**inputs, use_cache=False).loss
        handle.remove()
        return loss + asked.pop()

    assert recomputed(build(), run=run)[2] == LAYERS - 1 + LAYERS
