"""The forward of a decoder layer as a whole, Llama's and Mistral's, against stock: children, hooks, recompute, code of
others that hangs on them."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
import wrapt
from tiny_llama import (
    FAMILIES,
    FORWARDS,
    FP32,
    LAYERS,
    assert_as_good,
    assert_same,
    batch,
    both,
    causal_lm,
    check,
    distance,
    fallbacks,
    hits,
    layers_of,
    lora,
    oracle,
    patched,
    run,
)
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.utils.output_capturing import OutputRecorder

import fast_unsloth_patch as fup
from fast_unsloth_patch import install

MODELING = {"llama": modeling_llama, "mistral": modeling_mistral}
NORMS = 2 * LAYERS + 1
every_family = pytest.mark.parametrize("family", FAMILIES)


def class_of(family: str, part: str) -> type:
    return getattr(MODELING[family], family.capitalize() + part)


def difference(before: dict[str, int], family: str) -> dict[str, int]:
    """Fast forwards since ``before``, by the part of the layer."""
    return {
        name: hits()[f"{family}.{name}"] - before[f"{family}.{name}"]
        for name in ("decoder_layer", "rms_norm", "attention", "mlp")
    }


def parts(layer: int, rms_norm: int, attention: int, mlp: int) -> dict[str, int]:
    return {"decoder_layer": layer, "rms_norm": rms_norm, "attention": attention, "mlp": mlp}


def a_layer(family: str, **overrides):
    """A layer alone, its input and the keyword arguments that a model would give it."""
    layer = layers_of(causal_lm(family, **overrides))[0]
    angles = torch.randn(1, 5, layer.self_attn.head_dim)
    return layer, torch.randn(2, 5, 64), {"position_embeddings": (angles.cos(), angles.sin())}


# ---- the layer and its parts


@every_family
def test_alone(family):
    """Value, gradient of the input and of every weight; as positional and as keyword arguments."""
    layer, x, kwargs = a_layer(family)
    x.requires_grad_()

    def call(*args, **kwargs):
        y = layer(*args, **kwargs)
        return [y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])]

    before = hits()
    with patched():
        fast = call(x, **kwargs)
        by_place = call(x, None, None, None, False, kwargs["position_embeddings"])
        by_name = call(hidden_states=x, past_key_values=None, **kwargs)
    assert difference(before, family) == parts(3, 6, 3, 3)
    for got in (fast, by_place, by_name):
        assert all(distance(a, b) <= FP32 for a, b in zip(got, call(x, **kwargs)))
    assert difference(before, family) == parts(3, 6, 3, 3)


@every_family
@pytest.mark.parametrize("left_out", ["rms_norm", "attention", "mlp", "decoder_layer"])
def test_without_one_patch(family, left_out):
    model = lora(causal_lm(family))
    before = hits()
    with patched(*(name for name in FORWARDS if name != f"{family}.{left_out}")):
        fast = run(model, batch())
    expected = parts(LAYERS, NORMS, LAYERS, LAYERS)
    expected[left_out] = 0
    if left_out == "rms_norm":
        expected["decoder_layer"] = 0
        assert fallbacks(f"{family}.decoder_layer") == {"input_layernorm runs by itself": LAYERS}
    assert difference(before, family) == expected
    assert_same(fast, run(model, batch()))


@every_family
def test_trained_norms_and_frozen_middle(family):
    """The residual stream needs a gradient, has none yet, or passes a layer in which nothing is trained."""
    model = lora(causal_lm(family, num_hidden_layers=3), layers_to_transform=[0, 2])
    check(model, batch(), norm=7, attention=3, mlp=3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    check(model, batch(), norm=7, attention=3, mlp=3)


@every_family
def test_fp32_norms_over_a_bf16_model(family):
    """``prepare_model_for_kbit_training`` makes them so, and the embedding with them."""
    model = lora(causal_lm(family, torch.bfloat16))
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name:
            parameter.data = parameter.data.float()
    inputs = batch(rows=4, length=24)
    fast, stock, forward, _ = both(model, inputs, autocast=torch.bfloat16)
    assert forward[f"{family}.decoder_layer"] == forward[f"{family}.mlp"] == LAYERS
    assert_as_good(fast, stock, oracle(model, inputs))


# ---- whoever looks at the parts


def changed(module, args, output):
    return (output[0] * 1.5 + 0.1, *output[1:]) if isinstance(output, tuple) else output * 1.5 + 0.1


def shifted(module, args, kwargs):
    args, kwargs = list(args), dict(kwargs)
    if args:
        args[0] = args[0] + 0.2
    else:
        kwargs["hidden_states"] = kwargs["hidden_states"] + 0.2
    return tuple(args), kwargs


HOOKS = {
    "forward": lambda module, hook: module.register_forward_hook(hook(changed)),
    "pre": lambda module, hook: module.register_forward_pre_hook(hook(shifted), with_kwargs=True),
    "backward": lambda module, hook: module.register_full_backward_hook(
        hook(lambda module, grads, _: tuple(None if g is None else g * 1.5 for g in grads))
    ),
}


@every_family
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("child", ["", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp"])
def test_hooks(family, child, kind):
    """Called as often as in stock, with what they return taken up."""
    model = causal_lm(family, num_hidden_layers=1)
    (layer,) = layers_of(model)
    plain = run(model, batch())
    called = []
    HOOKS[kind](layer.get_submodule(child), lambda hook: lambda *args: called.append(1) or hook(*args))
    before = hits()
    with patched():
        fast = run(model, batch())
    assert len(called) == 1
    assert difference(before, family) == parts(0 if child == "input_layernorm" else 1, 3, 1, 1)
    stock = run(model, batch())
    assert len(called) == 2
    assert_same(fast, stock)
    if (child, kind) != ("self_attn", "backward"):  # Called with keywords only, a module has no gradients to change.
        name = "model.embed_tokens.weight"
        assert distance(fast.grads[name], plain.grads[name]) > 0.01


@every_family
def test_hooks_on_all_modules(family):
    model = causal_lm(family)
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with patched():
            fast = run(model, batch())
        fast_seen = seen[:]
        seen.clear()
        stock = run(model, batch())
    finally:
        handle.remove()
    assert fast_seen == seen and f"{family.capitalize()}MLP" in seen
    assert_same(fast, stock)


@every_family
def test_instance_forward_of_a_child(family):
    """As accelerate, kernelize and other patchers put it."""
    model = lora(causal_lm(family))
    for layer in layers_of(model):
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: forward(x) * 2
    plain = run(lora(causal_lm(family)), batch())
    stock = run(model, batch())
    before = hits()
    with patched():
        assert_same(run(model, batch()), stock)
    assert difference(before, family) == parts(LAYERS, NORMS, LAYERS, 0)
    assert abs(stock.loss - plain.loss) > 0.01


@every_family
def test_recorded_outputs(family):
    model = lora(causal_lm(family, attn_implementation="eager"))
    fast, stock = check(model, batch(), output_attentions=True, output_hidden_states=True)
    for name, n in (("attentions", LAYERS), ("hidden_states", LAYERS + 1)):
        new, old = getattr(fast.output, name), getattr(stock.output, name)
        assert len(new) == len(old) == n
        assert all(distance(a, b) <= FP32 for a, b in zip(new, old))


@every_family
def test_gradients_of_hidden_states(family):
    model = lora(causal_lm(family))

    def grads():
        output = model(**batch(), output_hidden_states=True)
        states = [h for h in output.hidden_states if h.requires_grad]
        return torch.autograd.grad(output.loss + sum(h.square().mean() for h in states), states)

    with patched():
        fast = grads()
    stock = grads()
    assert len(fast) == len(stock) == LAYERS
    assert all(distance(a, b) <= FP32 for a, b in zip(fast, stock))


@every_family
def test_recording_of_parts(family, monkeypatch):
    """``_can_record_outputs`` may name any class: MLP and norms are then called as modules."""
    base = class_of(family, "PreTrainedModel")
    more = {"mlps": OutputRecorder(class_of(family, "MLP")), "norms": OutputRecorder(class_of(family, "RMSNorm"))}
    with monkeypatch.context() as patch:
        patch.setattr(base, "_can_record_outputs", {**base._can_record_outputs, **more})
        model = causal_lm(family)

        def record():
            output = model.model(input_ids=batch()["input_ids"], output_mlps=True, output_norms=True)
            return [*output["mlps"], *output["norms"]]

        with patched():
            fast = record()
        stock = record()
    causal_lm(family)  # The registry is kept by class name: back to what it was.
    assert len(fast) == len(stock) == LAYERS + NORMS
    assert all(distance(a, b) <= FP32 for a, b in zip(fast, stock))


# ---- recompute


def own_checkpoint(layer, reentrant):
    """The script checkpoints a layer itself, with torch's function."""
    from torch.utils.checkpoint import checkpoint

    forward = layer.forward

    def checkpointed(hidden_states, *args, **kwargs):
        return checkpoint(functools.partial(forward, **kwargs), hidden_states, *args, use_reentrant=reentrant)

    layer.forward = checkpointed


def wrapped_checkpoint(model):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as module

    wrapper = functools.partial(module.checkpoint_wrapper, checkpoint_impl=module.CheckpointImpl.NO_REENTRANT)
    module.apply_activation_checkpointing(model, wrapper, check_fn=lambda m: type(m).__name__.endswith("DecoderLayer"))


@every_family
@pytest.mark.parametrize("how", ["transformers", "torch", "torch's wrapper"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_every_layer_is_recomputed(family, how, reentrant):
    """Attention runs once in the forward, once in the recompute: seen from the attention function, in both arms.

    A layer's replaced forward would end checkpointing from transformers 5.23 on, without a word.
    """
    if how == "torch's wrapper" and reentrant:
        pytest.skip("the wrapper's reentrant form takes no keyword arguments")
    calls = []

    def spy(*args, **kwargs):
        calls.append(torch._C._current_graph_task_id() != -1)
        return MODELING[family].eager_attention_forward(*args, **kwargs)

    AttentionInterface.register("fup_recompute", spy)
    model = lora(causal_lm(family, attn_implementation="fup_recompute"))
    model.enable_input_require_grads()
    if how == "transformers":
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    elif how == "torch":
        for layer in layers_of(model):
            own_checkpoint(layer, reentrant)
    else:
        wrapped_checkpoint(model)
    before = hits()
    with patched():
        if how == "torch":  # What the script bound must be the patched forward.
            for layer in layers_of(model):
                del layer.forward
                own_checkpoint(layer, reentrant)
        fast = run(model, batch(), use_cache=False)
    fast_calls = calls[:]
    assert difference(before, family) == parts(2 * LAYERS, 2 * NORMS - 1, 2 * LAYERS, 2 * LAYERS)
    calls.clear()
    if how == "torch":
        for layer in layers_of(model):
            del layer.forward
            own_checkpoint(layer, reentrant)
    stock = run(model, batch(), use_cache=False)
    assert fast_calls == calls == LAYERS * [False] + LAYERS * [True]
    assert_same(fast, stock)


@every_family
def test_counters_tell_recomputes(family):
    model = causal_lm(family)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with patched():
        run(model, batch(), use_cache=False)
        rows = fup.status()
    row = rows[f"{family}.decoder_layer"]
    assert (row.forward, row.recomputed) == (LAYERS, LAYERS)
    assert rows[f"{family}.checkpointing"].recomputed == LAYERS


@every_family
def test_evaluation_of_a_checkpointed_model(family):
    """No checkpoint there, a cache, and greedy tokens as stock's; training again checkpoints again."""
    model = lora(causal_lm(family))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    ids = batch(rows=2, length=5)["input_ids"]
    twice = {"norm": 2 * NORMS - 1, "attention": 2 * LAYERS, "mlp": 2 * LAYERS, "use_cache": False}
    check(model, batch(), **twice)
    model.eval()
    before = hits()
    with patched():
        tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert hits() == before and fallbacks(f"{family}.decoder_layer")["eval"] > 0
    assert torch.equal(tokens, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False))
    check(model.train(), batch(), **twice)


# ---- names, copies, the way back, compile, wrappers


@every_family
def test_names_copies_and_the_way_back(family, monkeypatch):
    monkeypatch.setattr(install, "_state", install._State())
    layer_class = class_of(family, "DecoderLayer")
    stock = {attribute: vars(layer_class).get(attribute) for attribute in ("forward", "_gradient_checkpointing_func")}
    signature = inspect.signature(layer_class.forward)
    model = causal_lm(family)
    try:
        fup.apply(only=family)
        new = layer_class.forward
        assert new is not stock["forward"] and new.__name__ == "forward" and new.__module__ == layer_class.__module__
        assert new.__qualname__ == stock["forward"].__qualname__ and inspect.signature(new) == signature
        assert layer_class.__name__ == f"{family.capitalize()}DecoderLayer"
        # accelerate and FSDP find the class by its name among the modules.
        names = {type(module).__name__ for module in model.modules()}
        assert names.issuperset(model._no_split_modules) and set(model._no_split_modules) == {layer_class.__name__}
        before = hits()
        data = pickle.dumps(copy.deepcopy(model))
        assert b"fast_unsloth_patch" not in data
        fast = run(pickle.loads(data), batch())
        assert hits()[f"{family}.decoder_layer"] == before[f"{family}.decoder_layer"] + LAYERS
    finally:
        fup.unapply()
    for attribute, value in stock.items():
        assert vars(layer_class).get(attribute) is value
    before = hits()
    assert_same(fast, run(model, batch()))
    assert hits() == before


@every_family
@pytest.mark.parametrize("adapters", [True, False])
def test_compiled_layers_are_stock_and_one_graph_each(family, adapters):
    torch._dynamo.reset()
    model = lora(causal_lm(family, num_hidden_layers=1)) if adapters else causal_lm(family, num_hidden_layers=1)
    stock = run(model, batch())
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    before = hits()
    with patched():
        for layer in layers_of(model):
            layer.compile(backend=backend, fullgraph=True)
        for _ in range(2):
            fast = run(model, batch())
    assert len(graphs) == 1
    assert difference(before, family) == parts(0, 2, 0, 0), "the last norm is not in the layer"
    assert fallbacks(f"{family}.decoder_layer")["compiling"] == 1
    assert_same(fast, stock)
    torch._dynamo.reset()


@pytest.fixture
def one_process(tmp_path):
    from torch import distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("error:.*view tensor")
@every_family
@pytest.mark.parametrize("when", ["patched before", "patched after"])
def test_fsdp2_by_decoder_layer(family, when, one_process, monkeypatch):
    """Sharded before the patch, the layer's class keeps the forward it had (from transformers 5.23 on): right numbers,
    the parts fast one by one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.fsdp._fully_shard import _fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model = causal_lm(family)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    stock = run(copy.deepcopy(model), batch(), use_cache=False)

    def shard():
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    # torch keeps the classes that it makes, with the forward that they were made with.
    monkeypatch.setattr(_fully_shard, "cls_to_fsdp_cls", {})
    before = hits()
    if when == "patched after":
        shard()
    with patched():
        if when == "patched before":
            shard()
        loss = model(**batch(), use_cache=False).loss
        loss.backward()
    got = difference(before, family)
    captured = "forward" in vars(type(layers_of(model)[0]))
    layers = 0 if captured and when == "patched after" else 2 * LAYERS
    assert got == parts(layers, 2 * NORMS - 1, 2 * LAYERS, 2 * LAYERS)
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == stock.grads.keys() and distance(loss.detach(), stock.loss) <= FP32
    assert max(distance(grads[name], stock.grads[name]) for name in grads) <= FP32


# ---- code of others, bad input


def by_wraps(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs).tanh()

    return wrapper


def by_wrapt(forward):
    return wrapt.FunctionWrapper(forward, lambda wrapped, _, args, kwargs: wrapped(*args, **kwargs).tanh())


@pytest.mark.parametrize("checkpoint", [None, True, False])
@pytest.mark.parametrize("wrap", [by_wraps, by_wrapt])
@pytest.mark.parametrize("part", ["MLP", "RMSNorm", "DecoderLayer"])
def test_forward_wrapped_by_others(part, wrap, checkpoint, monkeypatch):
    """A profiler or another library wraps our function on the class, copies or passes on what we noted on it, and keeps
    for its own backward what our forward returned."""
    owner = class_of("mistral", part)

    def step():
        model = lora(causal_lm("mistral"))
        model.enable_input_require_grads()
        if checkpoint is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpoint})
        with monkeypatch.context() as patch:
            patch.setattr(owner, "forward", wrap(owner.forward))
            return run(model, batch(), use_cache=False)

    before = hits()
    with patched():
        fast = step()
    assert difference(before, "mistral")["attention"] >= LAYERS
    assert_same(fast, step())


def test_subclass_of_a_part(monkeypatch):
    """Its forward reads what ours, which it calls, has returned: in a recompute too."""

    class Squashed(class_of("llama", "MLP")):
        def forward(self, x):
            return super().forward(x).sigmoid()

    monkeypatch.setattr(modeling_llama, "LlamaMLP", Squashed)
    model = lora(causal_lm("llama"))
    monkeypatch.undo()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before = hits()
    with patched():
        fast = run(model, batch(), use_cache=False)
    assert difference(before, "llama") == parts(2 * LAYERS, 2 * NORMS - 1, 2 * LAYERS, 2 * LAYERS)
    assert_same(fast, run(model, batch(), use_cache=False))


@every_family
@pytest.mark.parametrize("child", ["mlp", "post_attention_layernorm", "input_layernorm"])
def test_traced_child(family, child):
    """torch.jit's modules have no forward on their class."""
    model = lora(causal_lm(family))
    for layer in layers_of(model):
        with torch.no_grad():
            setattr(layer, child, torch.jit.trace(getattr(layer, child), torch.randn(2, 12, 64), check_trace=False))
    stock = run(model, batch())
    before = hits()
    with patched():
        fast = run(model, batch())
    assert difference(before, family)["decoder_layer"] == (0 if child == "input_layernorm" else LAYERS)
    assert_same(fast, stock)


def test_compiled_child_stays_compiled():
    torch._dynamo.reset()
    model = lora(causal_lm("mistral", num_hidden_layers=1))
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    layers_of(model)[0].mlp.compile(backend=backend)
    with patched():
        fast = run(model, batch())
    assert len(graphs) == 1
    assert_same(fast, run(model, batch()))
    torch._dynamo.reset()


def test_child_that_is_no_module():
    model = lora(causal_lm("llama"))
    for layer in layers_of(model):
        mlp = layer.mlp
        del layer.mlp
        layer.__dict__["mlp"] = lambda x, mlp=mlp: mlp(x) * 2
    with patched():
        fast = run(model, batch())
    assert_same(fast, run(model, batch()))


@every_family
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_mode_without_gradients(family, mode):
    model = lora(causal_lm(family))
    before = hits()
    with patched(), mode():
        fast = model(**batch()).loss
    assert difference(before, family) == parts(LAYERS, NORMS, LAYERS, LAYERS)
    with mode():
        torch.testing.assert_close(fast, model(**batch()).loss)


def test_saved_activations_know_nothing_of_us():
    """A script collects the inputs of a projection and stores them."""
    model = lora(causal_lm("llama"))
    seen = []
    layers_of(model)[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with patched():
        run(model, batch())
    with io.BytesIO() as file:
        torch.save(seen, file)
        assert b"fast_unsloth_patch" not in file.getvalue()


class Other(nn.Module):
    """Attention of somebody else: a result of any dtype and shape."""

    def __init__(self, dtype, shape):
        super().__init__()
        self.dtype, self.shape = dtype, shape

    def forward(self, hidden_states, **kwargs):
        return (hidden_states.mean() + torch.linspace(-1, 1, 64)).expand(self.shape).to(self.dtype), None


@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 5, 64), (3, 2, 5, 64), (4, 5, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_what_attention_returns(dtype, shape):
    """Promoted, broadcast or refused as stock does it."""
    layer, x, _ = a_layer("mistral")
    layer.self_attn = Other(dtype, shape)
    x.requires_grad_()

    def call():
        try:
            y = layer(x)
            return y, *torch.autograd.grad(y.double().sin().sum(), x)
        except RuntimeError as error:
            return str(error)

    with patched():
        fast = call()
    stock = call()
    if isinstance(stock, str):
        assert fast == stock
        return
    for a, b in zip(fast, stock, strict=True):
        assert a.dtype is b.dtype and a.shape == b.shape and distance(a, b) <= FP32


@every_family
def test_bad_calls_fail_as_in_stock(family):
    layer, x, kwargs = a_layer(family)
    seen = []
    layer.self_attn.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    layer(x, **kwargs, custom=7)

    cos, _ = angles = kwargs["position_embeddings"]
    calls = {
        "tuple": (((x,),), kwargs),
        "None": ((None,), kwargs),
        "no hidden states": ((), kwargs),
        "no angles": ((x,), {}),
        "one angle": ((x,), {"position_embeddings": (cos,)}),
        "narrow": ((x[..., :32],), kwargs),
        "short": ((x[:, :3],), kwargs),
        "empty": ((x[:0],), kwargs),
        "meta": ((x.to("meta"),), kwargs),
        "2-D": ((x[0],), kwargs),
        "float64": ((x.double(),), kwargs),
        "too many": ((x, None, None, None, False, angles, 7), {}),
    }

    def errors():
        found = {}
        for name, (args, given) in calls.items():
            with pytest.raises(Exception) as caught:
                layer(*args, **given)
            found[name] = type(caught.value), str(caught.value)
        return found

    other_dtypes = [x.long(), x.bfloat16()]
    with patched():
        layer(x, **kwargs, custom=7)
        fast, values = errors(), [layer(y, **kwargs) for y in other_dtypes]
    assert fast == errors()
    assert seen[0].keys() == seen[1].keys() and seen[1]["custom"] == 7
    for a, y in zip(values, other_dtypes):
        torch.testing.assert_close(a, layer(y, **kwargs))
