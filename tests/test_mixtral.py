"""Mixtral, whole: layers, what is trained, recorded outputs, recompute, dtypes, caches, against stock.

The block of experts by itself and LoRA on experts are tested elsewhere; here every part of the model runs with it.
"""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from mixtral_whole import (
    BALANCED,
    NORMS,
    PARTS,
    SIDES,
    assert_outputs_same,
    difference,
    every_patch,
    parts,
)
from packed_cases import EVERYTHING, compare, packed, reasons
from packed_cases import padded as padded_at
from tiny_llama import (
    FORWARDS,
    FP32,
    HOOKS_OUTSIDE,
    LAYERS,
    assert_as_good,
    assert_same,
    batch,
    both,
    check,
    distance,
    fallbacks,
    hits,
    layers_of,
    lora,
    mistral,
    mixtral,
    oracle,
    patched,
    run,
)
from transformers import AttentionInterface, DynamicCache
from transformers.models.mixtral import modeling_mixtral
from transformers.utils.output_capturing import OutputRecorder

import fast_unsloth_patch as fup
from fast_unsloth_patch import install
from fast_unsloth_patch.status import tally

# ---- what is trained


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["o_proj"]},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "v_proj": 16, "layers.1.self_attn.o_proj": 1}},
        {"layers_to_transform": [1]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_lora_on_attention(config):
    check(lora(mixtral(), **config), batch())


def test_full_fine_tuning():
    """Every weight has its gradient, the router and the experts among them."""
    fast, stock, forward, backward = both(mixtral(), batch())
    assert_same(fast, stock)
    assert len(fast.grads) == 9 * LAYERS + 3
    names = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    assert all(fast.grads[f"model.layers.1.{name}"].any() for name in names)
    assert {name: n for name, n in forward.items() if n} == {
        f"mixtral.{name}": n for name, n in parts(LAYERS, NORMS, LAYERS, LAYERS).items()
    }
    counted = {name: backward[f"mixtral.{name}"] for name in ("rms_norm", "attention", "moe")}
    assert counted == {"rms_norm": NORMS, "attention": LAYERS, "moe": LAYERS}


@pytest.mark.parametrize("trained", ["gate.weight", "experts.down_proj", "layernorm.weight", "lm_head.weight"])
def test_one_kind_of_weight_alone(trained):
    model = mixtral()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(trained))
    fast, stock = every_patch(model, batch(), use_cache=False)
    assert len(fast.grads) == {"layernorm.weight": 2 * LAYERS, "lm_head.weight": 1}.get(trained, LAYERS)
    assert all(grad.any() for grad in stock.grads.values())


@pytest.mark.parametrize("left_out", PARTS)
def test_without_one_patch(left_out):
    model = lora(mixtral())
    before = hits()
    with patched(*(name for name in FORWARDS if name != f"mixtral.{left_out}")):
        fast = run(model, batch())
    expected = parts(LAYERS, NORMS, LAYERS, LAYERS)
    expected[left_out] = 0
    if left_out == "rms_norm":
        expected["decoder_layer"] = 0
        assert fallbacks("mixtral.decoder_layer") == {"input_layernorm runs by itself": LAYERS}
    assert difference(before) == expected
    assert_same(fast, run(model, batch()))


def test_the_families_are_apart():
    before = hits()
    with patched(*(name for name in EVERYTHING if name.startswith("mixtral."))):
        run(mistral(), batch())
    with patched(*(name for name in EVERYTHING if name.startswith(("llama.", "mistral.")))):
        run(mixtral(), batch())
    assert hits() == before


# ---- the decoder layer: another order of arguments than Llama's


def a_layer(**overrides):
    """A layer alone, its input and the position embeddings that a model would give it."""
    layer = layers_of(mixtral(**overrides))[0]
    angles = torch.randn(1, 5, layer.self_attn.head_dim)
    return layer, torch.randn(2, 5, 64), (angles.cos(), angles.sin())


def test_layer_alone():
    """Value, gradient of the input and of every weight; as positional and as keyword arguments."""
    layer, x, angles = a_layer()
    x.requires_grad_()
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()

    def call(*args, **kwargs):
        y = layer(*args, **kwargs)
        return [y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])]

    def calls():
        yield call(x, position_embeddings=angles, attention_mask=mask)
        yield call(x, angles, mask, None, None)
        yield call(hidden_states=x, past_key_values=None, position_embeddings=angles, attention_mask=mask)

    before = hits()
    with patched():
        fast = list(calls())
    assert difference(before) == parts(3, 6, 3, 3)
    for new, old in zip(fast, calls()):
        assert all(distance(a, b) <= FP32 for a, b in zip(new, old, strict=True))
    assert difference(before) == parts(3, 6, 3, 3)


def test_bad_calls_fail_as_in_stock():
    layer, x, angles = a_layer()
    seen = []
    layer.self_attn.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    calls = {
        "None": ((None, angles), {}),
        "no hidden states": ((), {"position_embeddings": angles}),
        "no angles": ((x,), {}),
        "one angle": ((x, angles[:1]), {}),
        "Llama's order": ((x, None, None, None, False, angles), {}),
        "narrow": ((x[..., :32], angles), {}),
        "short": ((x[:, :3], angles), {}),
        "meta": ((x.to("meta"), angles), {}),
        "float64": ((x.double(), angles), {}),
        "too many": ((x, angles, None, None, None, 7), {}),
    }

    def errors():
        found = {}
        layer(x, angles, custom=7)
        for name, (args, given) in calls.items():
            with pytest.raises(Exception) as caught:
                layer(*args, **given)
            found[name] = type(caught.value), str(caught.value)
        return found

    with patched():
        fast = errors()
    assert len(seen) % 2 == 1 or seen[0].keys() == seen[len(seen) // 2].keys()
    assert seen[0]["custom"] == 7 and "use_cache" not in seen[0]
    assert fast == errors()


def changed(module, args, output):
    return (output[0] * 1.5 + 0.1, *output[1:]) if isinstance(output, tuple) else output * 1.5 + 0.1


@pytest.mark.parametrize(
    "child", ["", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp", "mlp.gate", "mlp.experts"]
)
def test_hooks(child):
    """Called as often as in stock, with what they return taken up."""
    model = mixtral(num_hidden_layers=1)
    (layer,) = layers_of(model)
    plain = run(model, batch())
    called = []
    layer.get_submodule(child).register_forward_hook(lambda *args: called.append(1) or changed(*args))
    before = hits()
    with patched():
        fast = run(model, batch())
    assert len(called) == 1
    fast_layer = 0 if child == "input_layernorm" else 1
    assert difference(before) == parts(fast_layer, 3, 1, 0 if child == "mlp.experts" else 1)
    stock = run(model, batch())
    assert len(called) == 2
    assert_same(fast, stock)
    if child != "mlp.gate":  # The hook on the gate changes the logits, which nobody reads.
        name = "model.embed_tokens.weight"
        assert distance(fast.grads[name], plain.grads[name]) > 0.01


def test_names_copies_and_the_way_back(monkeypatch):
    monkeypatch.setattr(install, "_state", install._State())
    owners = [modeling_mixtral.MixtralDecoderLayer, modeling_mixtral.MixtralModel, modeling_mixtral.MixtralForCausalLM]
    stock = [vars(owner)["forward"] for owner in owners]
    model = mixtral()
    try:
        fup.apply(only="mixtral")
        for owner, before in zip(owners, stock):
            new = owner.forward
            assert new is not before and new.__qualname__ == before.__qualname__
            assert inspect.signature(new) == inspect.signature(before)
        before = hits()
        data = pickle.dumps(copy.deepcopy(model))
        assert b"fast_unsloth_patch" not in data
        fast = run(pickle.loads(data), batch())
        assert difference(before) == parts(LAYERS, NORMS, LAYERS, LAYERS)
        fup.status().require(*(f"mixtral.{name}" for name in (*PARTS, "loss")))
    finally:
        fup.unapply()
    assert [vars(owner)["forward"] for owner in owners] == stock
    before = hits()
    assert_same(fast, run(model, batch()))
    assert hits() == before


def test_compiled_model_has_as_many_graphs_as_stock():
    """One, but for transformers 5.6, whose experts break it themselves."""

    def graphs(model):
        made = []
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=lambda graph, inputs: made.append(graph) or graph.forward)
        return run(compiled, batch()), len(made)

    model = lora(mixtral(num_hidden_layers=1))
    stock, expected = graphs(model)
    before = hits()
    with patched(*EVERYTHING):
        fast, found = graphs(model)
    torch._dynamo.reset()
    assert found == expected and (expected == 1 or not HOOKS_OUTSIDE)
    assert hits()["mixtral.loss"] == before["mixtral.loss"] and fallbacks("mixtral.loss") == {"compiling": 1}
    assert_same(fast, stock)


# ---- recorded outputs


RECORDED = {"output_hidden_states": LAYERS + 1, "output_attentions": LAYERS, "output_router_logits": LAYERS}


@pytest.mark.parametrize("asked", [(name,) for name in RECORDED] + [tuple(RECORDED)], ids=str)
def test_recorded_outputs(asked):
    """Of the causal model and of its base, with all patches: as many as stock records, of the same values."""
    model = lora(mixtral(attn_implementation="eager", **BALANCED))
    options = dict.fromkeys(asked, True)
    fast, _ = every_patch(model, batch(), **options)
    for name in asked:
        assert len(fast.output[name.removeprefix("output_")]) == RECORDED[name]
    before = hits()
    base = model.get_base_model().model
    with patched(*EVERYTHING):
        fast = base(batch()["input_ids"], **options)
    assert difference(before) == parts(LAYERS, NORMS, LAYERS, LAYERS)
    assert_outputs_same(fast, base(batch()["input_ids"], **options))


def test_recording_of_parts(monkeypatch):
    """``_can_record_outputs`` may name any class; what was recorded without padding would not be stock's."""
    base = modeling_mixtral.MixtralPreTrainedModel
    more = {"blocks": OutputRecorder(modeling_mixtral.MixtralSparseMoeBlock)}
    with monkeypatch.context() as patch:
        patch.setattr(base, "_can_record_outputs", {**base._can_record_outputs, **more})
        model = mixtral()
        recorded = []

        def record(module, args, output):
            recorded.append([t.detach() for t in output["blocks"]])

        model.model.register_forward_hook(record)
        compare(model, padded_at(*SIDES["both"]), fast=False, use_cache=False, output_blocks=True)
        assert reasons(model) == {"outputs asked for": 1}
    mixtral()  # The registry may be kept by class name: back to what it was.
    fast, stock = recorded
    assert len(fast) == len(stock) == LAYERS
    assert all(distance(a, b) <= FP32 for a, b in zip(fast, stock))


def test_gradients_of_recorded_outputs():
    model = lora(mixtral())

    def grads():
        output = model(**batch(), output_hidden_states=True, output_router_logits=True)
        states = [h for h in (*output.hidden_states, *output.router_logits) if h.requires_grad]
        return torch.autograd.grad(output.loss + sum(h.square().mean() for h in states), states)

    with patched(*EVERYTHING):
        fast = grads()
    stock = grads()
    assert len(fast) == len(stock) == 2 * LAYERS
    assert all(distance(a, b) <= FP32 for a, b in zip(fast, stock))


# ---- checkpointing


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("train", [lora, lambda model: model], ids=["lora", "full"])
def test_checkpointing(train, reentrant, asked):
    """Every layer but the last is recomputed, fast, once; router logits are recorded in the forward alone.

    In a reentrant region they have no gradient: where they are asked for, the last layer is recomputed too, and where
    the head trains.
    """
    model = train(mixtral(**BALANCED))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fast, _ = every_patch(model, batch(), output_router_logits=asked)
    counted = {name: (tally(f"mixtral.{name}").forward, tally(f"mixtral.{name}").recomputed) for name in PARTS}
    again = LAYERS if (reentrant and asked) or train is not lora else LAYERS - 1
    assert counted == {**dict.fromkeys(PARTS, (LAYERS, again)), "rms_norm": (NORMS, 2 * again)}
    assert tally("mixtral.checkpointing").recomputed == again
    assert (fast.output.router_logits is not None) is asked
    # Nothing reads the experts' sum in a recompute, and it is known where nothing hangs on the layer.
    told = fallbacks("mixtral.checkpointing")
    assert told == {} or (not HOOKS_OUTSIDE and set(told) == {"hooks on the layer"})


@pytest.mark.parametrize("case", ["padded", "packed"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_checkpointing_of_documents(window, reentrant, case):
    """The configuration asks for a cache; checkpointing wins."""
    model = lora(mixtral(sliding_window=window))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compare(model, padded_at(*SIDES["both"]) if case == "padded" else packed([5, 11], [9, 7]))
    assert tally("mixtral.attention").recomputed == LAYERS - 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_every_layer_is_recomputed(reentrant):
    """Seen from the attention function, in both arms. A layer's replaced forward would end checkpointing from
    transformers 5.23 on, without a word.
    """
    calls = []

    def spy(*args, **kwargs):
        calls.append(torch._C._current_graph_task_id() != -1)
        return modeling_mixtral.eager_attention_forward(*args, **kwargs)

    AttentionInterface.register("fup_mixtral_recompute", spy)
    model = lora(mixtral(attn_implementation="fup_mixtral_recompute"))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    twice = {"norm": 2 * NORMS - 1, "attention": 2 * LAYERS, "mlp": 2 * LAYERS}
    check(model, batch(), use_cache=False, **twice)
    assert calls == 2 * (LAYERS * [False] + LAYERS * [True])


# ---- several ranks: here one of one


@pytest.mark.filterwarnings("error:.*view tensor")
@pytest.mark.parametrize("asked", [False, True])
def test_fsdp2(asked, tmp_path):
    """Layers and root sharded, the experts with them; FSDP2 walks through the output without computing logits."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = mixtral(**BALANCED)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        given = {**batch(), "use_cache": False, "output_router_logits": asked}
        stock = run(copy.deepcopy(model), given)
        with patched(*EVERYTHING):
            mesh = init_device_mesh("cpu", (1,))
            for layer in layers_of(model):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            output = model(**given)
            output.loss.backward()
        assert hits()["mixtral.loss"] == 1
        assert difference(dict.fromkeys(hits(), 0)) == parts(2 * LAYERS, 2 * NORMS - 1, 2 * LAYERS, 2 * LAYERS)
        grads = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        assert_same(stock._replace(loss=output.loss.detach(), grads=grads), stock)
    finally:
        dist.destroy_process_group()


# ---- dtypes


def decisive(model):
    """Four dimensions of the residual stream say which experts a token takes, so that no rounding turns a choice over.

    A token whose second and third expert are close would take one in one arm and the other in the other: an error of
    the size of the values that tells nothing of either arm.
    """
    codes = torch.tensor(
        [[4.0, 2.0, -2.0, -4.0], [-4.0, 4.0, 2.0, -2.0], [-2.0, -4.0, 4.0, 2.0], [2.0, -2.0, -4.0, 4.0]]
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :4] = codes.repeat(32, 1)
        for layer in layers_of(model):
            layer.self_attn.o_proj.weight[:4] = 0.0
            layer.mlp.experts.down_proj[:, :4] = 0.0
            layer.post_attention_layernorm.weight[:4] = 1.0
            layer.mlp.gate.weight.mul_(0.05)[:, :4] += 0.5 * torch.eye(4)
    return model


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("base", "adapter"), [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, None)]
)
def test_low_precision(base, adapter, autocast):
    if autocast is None and base is torch.float32:
        base = torch.float16
    model = decisive(mixtral(sliding_window=5, **BALANCED)).to(base)
    if adapter is not None:
        model = lora(model, adapter_dtype=adapter)
        with torch.no_grad():
            for layer in layers_of(model):
                layer.self_attn.o_proj.lora_B["default"].weight[:4] = 0.0
    inputs = batch(rows=4, length=24)
    given = {"autocast": autocast, "output_router_logits": True}
    fast, stock, forward, _ = both(model, inputs, **given)
    assert forward["mixtral.decoder_layer"] == forward["mixtral.attention"] == forward["mixtral.moe"] == LAYERS
    exact = oracle(model, inputs, **given)
    chosen = [[x.topk(2).indices.sort().values for x in r.output.router_logits] for r in (fast, stock, exact)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*chosen))
    assert all(len(experts.unique()) == 4 for experts in chosen[0])
    assert_as_good(fast, stock, exact)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_loss_under_autocast(parameters):
    """Loss, balance and logits are those of stock's bf16 head over the same layers."""
    model = lora(mixtral(parameters, **BALANCED))
    inputs = {**batch(), "output_router_logits": True}
    stock = run(model, inputs, autocast=torch.bfloat16)
    with patched("mixtral.loss"):
        fast = run(model, inputs, autocast=torch.bfloat16)
    assert hits()["mixtral.loss"] == 1
    assert distance(fast.loss, stock.loss) < 1e-6 and fast.loss.dtype is stock.loss.dtype
    assert torch.equal(fast.output.aux_loss, stock.output.aux_loss) and torch.equal(fast.logits, stock.logits)
    for name, grad in stock.grads.items():
        assert fast.grads[name].dtype is grad.dtype and distance(fast.grads[name], grad) < 3e-2, name


# ---- caches, generation


@pytest.mark.parametrize("window", [None, 3])
def test_continuing_a_cache_in_training(window):
    """Fewer queries than keys; with a window the cache forgets."""
    model = lora(mixtral(sliding_window=window, **BALANCED))
    first, second = batch(), batch(seed=9)

    def step():
        model.zero_grad()
        cache = model(input_ids=first["input_ids"], use_cache=True).past_key_values
        assert type(cache) is DynamicCache
        output = model(**second, past_key_values=cache, use_cache=True, output_router_logits=True)
        assert output.past_key_values is cache
        output.loss.backward()
        kept = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [output.loss.detach(), output.aux_loss.detach(), *kept, *grads]

    before = hits()
    with patched(*EVERYTHING):
        fast = step()
    assert difference(before)["attention"] == 2 * LAYERS and hits()["mixtral.loss"] == before["mixtral.loss"] + 1
    stock = step()
    assert len(fast) == len(stock) and all(distance(a, b) <= FP32 for a, b in zip(fast, stock))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("training", [True, False])
def test_generate(training, window):
    """Greedy tokens of a left-padded batch: stock in evaluation, fast where a script forgot ``eval()``."""
    model = lora(mixtral(sliding_window=window)).train(training)
    ids = batch(rows=2, length=5)["input_ids"]
    ids[1, :2] = 0
    arguments = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 6, "do_sample": False}
    before = hits()
    with torch.no_grad(), patched(*EVERYTHING):
        fast = model.generate(**arguments)
    assert (hits() != before) is training and bool(fallbacks("mixtral.attention")) is not training
    assert torch.equal(fast, model.generate(**arguments))


# ---- the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpoint", [None, True, False])
def test_gpu_fp32(checkpoint, implementation, asked, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    size = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = lora(mixtral(sliding_window=7, attn_implementation=implementation, **size, **BALANCED)).cuda()
    if checkpoint is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint})
    every_patch(model, batch(rows=3, length=37), use_cache=False, output_router_logits=asked)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["plain", "packed", "padded"])
@pytest.mark.parametrize("window", [None, 5])
def test_gpu_bf16(window, case):
    model = lora(decisive(mixtral(sliding_window=window, head_dim=64)).bfloat16()).cuda()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.self_attn.o_proj.lora_B["default"].weight[:4] = 0.0
    inputs = {"plain": batch(4, 32), "packed": packed([5, 27], [16, 16]), "padded": padded_at([2, 5, 0], [3, 1, 8])}[
        case
    ]
    with patched(*EVERYTHING):
        fast = run(model, inputs, use_cache=False)
    assert hits()["mixtral.loss"] == 1 and hits()["mixtral.packing"] == (case != "plain")
    assert difference(dict.fromkeys(hits(), 0)) == parts(LAYERS, NORMS, LAYERS, LAYERS)
    stock, exact = run(model, inputs, use_cache=False), oracle(model, inputs, use_cache=False)
    if case == "padded":  # The logits of the padding are not stock's.
        real = inputs["attention_mask"].bool().cuda()
        fast, stock, exact = (r._replace(logits=r.logits[real]) for r in (fast, stock, exact))
    assert_as_good(fast, stock, exact)
