"""Mixtral's loss with the one that balances experts, packed rows and padded batches, against stock."""

from __future__ import annotations

import inspect
from contextlib import nullcontext

import pytest
import torch
from mixtral_whole import (
    BALANCED,
    LENGTH,
    SIDES,
    assert_outputs_same,
    every_patch,
)
from packed_cases import EVERYTHING, compare, packed, reasons, tokens_seen
from packed_cases import padded as padded_at
from tiny_llama import (
    FP32,
    LAYERS,
    assert_same,
    batch,
    distance,
    fallbacks,
    hits,
    layers_of,
    lora,
    mixtral,
    patched,
    run,
)
from torch import nn
from transformers.models.mixtral import modeling_mixtral

from fast_unsloth_patch.errors import FastPatchError
from fast_unsloth_patch.patches.lazy_logits import LazyLogits
from fast_unsloth_patch.status import tally

# ---- the loss, and the one that balances the experts


def test_the_balancing_loss_is_seen():
    """What the tests below compare would be another loss and other gradients without it."""
    model = mixtral(**BALANCED)
    without, with_it = (run(model, batch(), output_router_logits=asked) for asked in (False, True))
    assert distance(with_it.loss, without.loss) > 0.05
    name = "model.layers.0.mlp.gate.weight"
    assert distance(with_it.grads[name], without.grads[name]) > 0.05


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("labels", ["all", "some", "accumulated", "shifted"])
@pytest.mark.parametrize("how", ["argument", "configuration", "against the configuration", "no"])
def test_balancing_loss(how, labels, masked):
    """Loss, aux_loss, logits, router logits, every gradient; the mask of ones counts in the balance as stock's."""
    configured = how in ("configuration", "against the configuration")
    model = mixtral(output_router_logits=configured, **BALANCED)
    inputs = batch()
    if labels == "some":
        inputs["labels"][:, :5] = -100
    elif labels == "accumulated":
        inputs["num_items_in_batch"] = torch.tensor(40)
    elif labels == "shifted":
        inputs["shift_labels"] = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    if masked:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if how in ("argument", "against the configuration"):
        inputs["output_router_logits"] = how == "argument"
    fast, _ = every_patch(model, inputs)
    assert (fast.output.aux_loss is not None) is (how in ("argument", "configuration"))


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("train", [lora, lambda model: model], ids=["lora", "full"])
def test_tuple(train, asked):
    """``return_dict=False``: as many values as stock has, in its order."""
    model = train(mixtral(**BALANCED))
    with patched(*EVERYTHING):
        before = hits()["mixtral.loss"]
        fast = model(**batch(), return_dict=False, output_router_logits=asked, use_cache=False)
        assert hits()["mixtral.loss"] == before + 1
    stock = model(**batch(), return_dict=False, output_router_logits=asked, use_cache=False)
    assert type(fast) is tuple and len(fast) == len(stock) == (4 if asked else 2)
    for a, b in zip(fast, stock):
        new, old = (value if isinstance(value, tuple) else (value,) for value in (a, b))
        assert len(new) == len(old) and all(distance(x, y) <= FP32 for x, y in zip(new, old))
    assert isinstance(fast[2 if asked else 1], LazyLogits)
    model.config.return_dict = False
    for arm in (patched(*EVERYTHING), nullcontext()):
        with arm, pytest.raises(AttributeError, match="last_hidden_state"):
            model(**batch())


def test_positional_arguments():
    """``output_router_logits`` stands before ``logits_to_keep``."""
    model = mixtral(**BALANCED)
    ids, labels = batch().values()
    arguments = (ids, None, None, None, None, labels, False, True)

    def step(*more):
        output = model(*arguments, *more)
        output.loss.backward()
        grads = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        return [output.loss, output.aux_loss, *output.router_logits, *grads]

    before = hits()["mixtral.loss"]
    with patched(*EVERYTHING):
        fast = step()
        assert hits()["mixtral.loss"] == before + 1
        kept = step(torch.arange(LENGTH))
    assert hits()["mixtral.loss"] == before + 1 and fallbacks("mixtral.loss") == {"logits_to_keep": 1}
    for new, more in ((fast, ()), (kept, (torch.arange(LENGTH),))):
        assert all(distance(a, b) <= FP32 for a, b in zip(new, step(*more), strict=True))


@pytest.mark.parametrize("coefficient", [0.0, 0.02, torch.tensor(0.3, dtype=torch.float64)], ids=str)
def test_coefficient_is_the_models(coefficient):
    """It stands on the model, where scripts set it, and not only in the configuration; the loss keeps its dtype."""
    model = mixtral(router_aux_loss_coef=7.0)
    model.router_aux_loss_coef = coefficient
    fast, _ = every_patch(model, batch(), output_router_logits=True)
    assert fast.loss.dtype is torch.float32


def test_replaced_balancing_loss(monkeypatch):
    """As DeepSpeed and TRL's users do it: by the name in the modeling module, at any time."""
    seen = []

    def mine(gate_logits, num_experts, top_k, attention_mask):
        seen.append((len(gate_logits), num_experts, top_k, attention_mask is None))
        return sum(logits.logsumexp(-1).square().mean() for logits in gate_logits)

    model = mixtral(**BALANCED)
    plain = run(model, batch(), output_router_logits=True)
    with patched(*EVERYTHING):
        monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", mine)
        before = hits()["mixtral.loss"]
        fast = run(model, batch(), output_router_logits=True)
        assert hits()["mixtral.loss"] == before + 1
    assert_same(fast, run(model, batch(), output_router_logits=True))
    assert seen == [(LAYERS, 4, 2, True)] * 2
    assert distance(fast.loss, plain.loss) > 0.05


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("case", ["no labels", "evaluation", "no gradients"])
def test_stock_loss(case, asked):
    model = mixtral(**BALANCED)
    inputs = {**batch(), "output_router_logits": asked, "use_cache": False}
    if case == "no labels":
        del inputs["labels"]
    if case == "evaluation":
        model.eval()
    reason = {"no labels": "no labels", "evaluation": "evaluation", "no gradients": "evaluation"}[case]
    results = []
    with torch.set_grad_enabled(case != "no gradients"):
        with patched(*EVERYTHING):
            results.append(model(**inputs))
        results.append(model(**inputs))
    assert fallbacks("mixtral.loss") == {reason: 1}
    assert_outputs_same(*results)
    assert (results[0].loss is None) is (case == "no labels") and (results[0].aux_loss is None) is not asked


def test_size_of_the_vocabulary_is_the_models():
    """Stock tells the loss ``self.vocab_size``, whatever the configuration says."""
    model = mixtral()
    model.config.vocab_size = 5
    every_patch(model, batch())
    model.vocab_size = 64
    with patched(*EVERYTHING), pytest.raises(ValueError):
        run(model, batch())
    with pytest.raises(ValueError):
        run(model, batch())
    assert fallbacks("mixtral.loss") == {"vocab_size": 1}


def test_logits_are_computed_on_access():
    model = lora(mixtral(**BALANCED))
    with patched(*EVERYTHING):
        output = model(**batch(), output_router_logits=True)
        assert isinstance(output.logits, LazyLogits) and isinstance(output[2], LazyLogits)
        stock = model.get_base_model().lm_head(output.logits._source.compute.__self__.hidden)
    assert distance(output.logits, stock) <= FP32


def test_all_labels_ignored():
    """NaN of the mean, or the balancing loss alone of a sum."""
    model = mixtral(**BALANCED)
    inputs = {**batch(), "output_router_logits": True}
    inputs["labels"].fill_(-100)
    with patched(*EVERYTHING):
        assert run(model, inputs).loss.isnan()
    assert run(model, inputs).loss.isnan()
    fast, _ = every_patch(model, {**inputs, "num_items_in_batch": 3})
    assert distance(fast.loss, 0.5 * fast.output.aux_loss.detach()) <= FP32


def test_tied_head():
    every_patch(mixtral(tie_word_embeddings=True, **BALANCED), batch(), output_router_logits=True)


def test_trainer_sees_the_stock_signature():
    """Otherwise it would drop the columns of the batch, or average accumulated gradients wrongly."""
    signature = inspect.signature(modeling_mixtral.MixtralForCausalLM.forward)
    with patched(*EVERYTHING):
        new = modeling_mixtral.MixtralForCausalLM.forward
        assert inspect.signature(new) == signature
        # Before transformers 5.24 stock says `past_key_values`, which comes in by `**kwargs`.
        raw = list(inspect.signature(new, follow_wrapped=False).parameters)
        assert raw == [{"past_key_values": "cache"}.get(name, name) for name in signature.parameters]


def test_advice_names_the_family():
    model = mixtral()
    with patched(*EVERYTHING):
        logits = model(**batch()).logits
    # As FSDP frees a gathered weight.
    model.lm_head.weight.untyped_storage().resize_(0)
    with pytest.raises(FastPatchError, match=r'apply\(exclude="mixtral\.loss"\)'):
        logits.sum()


# ---- packed rows


@pytest.mark.parametrize("rows", [[[5, 11]], [[3, 1, 1, 7, 4]], [[5, 11], [9, 7], [16]]], ids=str)
@pytest.mark.parametrize("window", [None, 3, 100])
def test_packed_rows(window, rows):
    compare(lora(mixtral(sliding_window=window)), packed(*rows), use_cache=False)


@pytest.mark.parametrize("asked", [False, True])
def test_packed_full_fine_tuning(asked):
    """Packing takes no row away: router logits and the balance are those of all tokens."""
    fast, _ = every_patch(
        mixtral(**BALANCED), packed([5, 11], [9, 7]), packing=1, use_cache=False, output_router_logits=asked
    )
    if asked:
        assert [logits.shape for logits in fast.output.router_logits] == [(32, 4)] * LAYERS


def test_packed_rows_equal_every_document_alone():
    model = lora(mixtral())
    lengths = [5, 1, 8]
    inputs = packed(lengths)
    n = int((inputs["labels"] != -100).sum())
    with patched(*EVERYTHING):
        together = run(model, inputs, keep_logits=False, use_cache=False, num_items_in_batch=n)
    assert hits()["mixtral.packing"] == 1
    alone = []
    for start, length in zip((0, 5, 6), lengths):
        part = {k: v[:, start : start + length] for k, v in inputs.items() if k != "position_ids"}
        alone.append(run(model, part, keep_logits=False, use_cache=False, num_items_in_batch=n))
    summed = alone[0]._replace(
        loss=sum(r.loss for r in alone), grads={k: sum(r.grads[k] for r in alone) for k in alone[0].grads}
    )
    assert_same(together, summed)


def test_packed_rows_with_a_cache_are_stocks():
    model = lora(mixtral())
    compare(model, packed([5, 11]), fast=False)
    assert reasons(model) == {"cache": 1}


# ---- padded batches


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("window", [None, 3, 100])
def test_padding_is_left_out(window, side):
    compare(lora(mixtral(sliding_window=window)), padded_at(*SIDES[side]), use_cache=False)


def test_padding_reaches_no_expert():
    """Full fine-tuning: no gradient of router and experts comes from padding in stock either."""
    model = mixtral()
    inputs = padded_at(*SIDES["both"])
    seen = tokens_seen(layers_of(model)[0].mlp.gate)
    compare(model, inputs, use_cache=False)
    # One padded token before each sequence that starts later is asked for its first.
    assert seen == [int(inputs["attention_mask"].sum()) + 2, inputs["attention_mask"].numel()]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_padding_stays_where_router_logits_are_asked_for(how, side):
    """They have a row for each padded token; the mask keeps those out of the balance."""
    model = mixtral(output_router_logits=how == "configuration", **BALANCED)
    inputs = padded_at(*SIDES[side])
    given = {"output_router_logits": True} if how == "argument" else {}
    fast, _ = every_patch(model, inputs, use_cache=False, **given)
    assert reasons(model) == {"router logits asked for": 1}
    assert [logits.shape for logits in fast.output.router_logits] == [(42, 4)] * LAYERS
    # The argument outranks the configuration: told no, it leaves the padding out.
    model.config.output_router_logits = True
    compare(model, inputs, use_cache=False, output_router_logits=False)


def test_padding_stays_for_other_recorded_outputs():
    model = mixtral(attn_implementation="sdpa")
    every_patch(model, padded_at(*SIDES["both"]), use_cache=False, output_hidden_states=True)
    assert reasons(model) == {"hidden states asked for": 1}


def test_hooks_on_the_router_see_all_tokens():
    model = lora(mixtral())
    shapes = []
    layers_of(model)[1].mlp.gate.register_forward_hook(lambda module, args, output: shapes.append(output[0].shape))
    compare(model, padded_at(*SIDES["both"]), fast=False, use_cache=False)
    assert shapes == [(42, 4)] * 2 and reasons(model) == {"hooks inside a layer": 1}


@pytest.mark.parametrize("case", ["plain", "packed", "padded"])
def test_router_jitter(case):
    """Noise on the routers' input, drawn for all tokens and written in place: the same numbers from the same seed."""
    model = lora(mixtral(router_jitter_noise=0.3))
    inputs = {"plain": batch(), "packed": packed([5, 11]), "padded": padded_at(*SIDES["both"])}[case]
    keep_logits = case != "padded"
    results = []
    for arm in (patched(*EVERYTHING), nullcontext()):
        torch.manual_seed(5)
        with arm:
            results.append(run(model, inputs, keep_logits=keep_logits, use_cache=False))
    assert_same(*results)
    assert fallbacks("mixtral.moe") == {"router jitter": LAYERS} and hits()["mixtral.decoder_layer"] == LAYERS
    assert hits()["mixtral.packing"] == (1 if case == "packed" else 0)
    assert reasons(model) == ({"router jitter": 1} if case == "padded" else {})
    assert distance(run(model, inputs, keep_logits=False, use_cache=False).loss, results[0].loss) > 1e-4


@pytest.mark.parametrize("inputs", [batch(), padded_at(*SIDES["both"]), packed([5, 11])], ids=["", "padded", "packed"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_jitter_is_the_same_in_the_recompute(reentrant, inputs):
    model = lora(mixtral(router_jitter_noise=0.3))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    results = []
    for arm in (patched(*EVERYTHING), nullcontext()):
        torch.manual_seed(5)
        with arm:
            results.append(run(model, inputs, keep_logits=False))
    assert tally("mixtral.decoder_layer").recomputed == LAYERS - 1  # the loss follows the last
    assert_same(*results)
