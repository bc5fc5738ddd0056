"""The patched Llama in a script: checkpointing, wrappers, evaluation, states of PEFT, dropout, copies, compile."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from tiny_llama import (
    ALL,
    FP32,
    LAYERS,
    assert_same,
    batch,
    both,
    check,
    distance,
    fallbacks,
    fill_adapters,
    hits,
    layers_of,
    llama,
    lora,
    oracle,
    patched,
    run,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaMLP

from fast_unsloth_patch import switch
from fast_unsloth_patch.ops import gemm
from fast_unsloth_patch.ops._siblings import update_of
from fast_unsloth_patch.patches import checkpointing

# ---- checkpointing, accumulation, wrappers


@pytest.mark.parametrize("policy", ["full", "stock"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("adapters", [True, False])
def test_checkpointing(adapters, reentrant, policy, request):
    model = lora(llama()) if adapters else llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if adapters:
        model.enable_input_require_grads()
    checkpointing.set_policy(policy)
    request.addfinalizer(lambda: checkpointing.set_policy("full"))
    check(model, batch(), norm=4 * LAYERS + 1, attention=2 * LAYERS, mlp=2 * LAYERS, use_cache=False)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_masks_again(reentrant):
    model = lora(llama(), lora_dropout=0.3)
    model.enable_input_require_grads()
    with patched():
        torch.manual_seed(11)
        plain = run(model, batch(), use_cache=False)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(11)
        recomputed = run(model, batch(), use_cache=False)
    assert_same(recomputed, plain)


class _KeepsAll:
    """A policy that keeps every layer, as ``recompute="auto"`` does where memory is free."""

    def run(self, region, args):
        region.keeps = True
        return region(*args)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        "checkpointed",
        "inside another",
        "hooked",
        "kept",
        "not checkpointed",
        "stock policy",
        "context_fn",
        "other hooks",
    ],
)
def test_gate_and_up_are_left_out_only_where_nobody_reads_them(case, reentrant, monkeypatch):
    """The forward of a region saves stand-ins of NaN for them, where a kernel forms h without them (here on a CPU)."""
    if case == "context_fn" and reentrant:
        pytest.skip("torch's reentrant checkpoint takes none")
    calls = []

    def without(x, group, values, low, dtypes):
        calls.append(checkpointing.recomputing())
        factors = None if low.u is None else update_of(low.u, group, [op.b for op in group])
        return gemm.gemm_swiglu(x, *values[0], update=factors)

    def step(model):
        """Loss and gradients, one checkpoint round the whole model besides if the case says so."""
        model.zero_grad()
        base, ids = model.get_base_model(), batch()["input_ids"]
        stack = lambda x: base.model(inputs_embeds=x, use_cache=False).last_hidden_state  # noqa: E731
        x = base.model.embed_tokens(ids).detach().requires_grad_()
        hidden = checkpoint(stack, x, use_reentrant=reentrant) if case == "inside another" else stack(x)
        base.lm_head(hidden).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = lora(llama())
    stock = step(model)
    if case != "not checkpointed":
        options = {"use_reentrant": reentrant}
        if case == "context_fn":
            options["context_fn"] = lambda: (nullcontext(), nullcontext())
        model.gradient_checkpointing_enable(options)
    monkeypatch.setattr("fast_unsloth_patch.ops.lora_mlp.swiglu_forward", without)
    if case == "kept":
        monkeypatch.setattr(checkpointing, "_runner", _KeepsAll())
    if case == "hooked":  # then the recompute computes all that the forward does
        for layer in layers_of(model):
            layer.mlp.register_forward_hook(lambda *_: None)
    if case == "other hooks":  # inside the region: they would take what stands for gate and up
        stock_call = LlamaMLP.__call__

        def offloaded(self, x):
            with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
                return stock_call(self, x)

        monkeypatch.setattr(type(layers_of(model)[0].mlp), "__call__", offloaded)
        for layer in layers_of(model):  # so that the decoder layer calls the module
            layer.mlp.register_forward_hook(lambda *_: None)
    if case == "stock policy":
        monkeypatch.setattr(checkpointing, "_policy", "stock")
    with patched():
        fast = step(model)
    far = {name: distance(fast[name], stock[name]) for name in stock}
    assert fast.keys() == stock.keys() and max(far.values()) <= FP32, far
    # In the outer checkpoint's recompute a layer's region is a new one, which is called and recomputed once more. Where
    # there are no gradients, as in a reentrant forward, nobody reads them whatever the policy.
    once = int(reentrant)
    times = {"checkpointed": 1, "hooked": 1, "inside another": 2, "stock policy": once, "other hooks": once}
    assert calls == [False] * LAYERS * times.get(case, 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_disabled_round_the_forward_only(reentrant):
    """What the forward decided, the recompute in backward repeats."""
    model = lora(llama())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = hits()
    with patched():
        with switch.disabled():
            output = model(**batch(), use_cache=False)
        output.loss.backward()
    assert hits() == before
    fast = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    stock = run(model, batch(), use_cache=False)
    assert all(torch.equal(fast[n], stock.grads[n]) for n in stock.grads)


def test_gradient_accumulation():
    model = lora(llama())

    def steps():
        model.zero_grad()
        for seed in range(3):
            (model(**batch(seed=seed)).loss / 3).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with patched():
        fast = steps()
    for name, grad in steps().items():
        assert distance(fast[name], grad) <= FP32


def test_two_backwards_of_one_graph():
    model = lora(llama())

    def grads():
        model.zero_grad()
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with patched():
        fast = grads()
    for name, grad in grads().items():
        assert distance(fast[name], grad) <= FP32


def test_training_with_an_optimizer_follows_stock():
    """Writes through ``.data`` and fused optimizers between the steps: no operand may be a stale copy."""

    def train(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
        losses = []
        for seed in range(6):
            optimizer.zero_grad()
            loss = model(**batch(seed=seed % 2)).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model = lora(llama())
    twin = copy.deepcopy(model)
    with patched():
        fast = train(model)
    stock = train(twin)
    assert fast == pytest.approx(stock, rel=1e-4) and stock[-1] < stock[0]


def test_accelerate_mixed_precision():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # One state a process, which the Trainer of another test may have made.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = lora(llama())
    exact = oracle(model, batch(rows=4, length=24))
    prepared = accelerator.prepare_model(model)
    fast, stock, forward, _ = both(prepared, batch(rows=4, length=24))
    assert forward["llama.attention"] == LAYERS and fast.logits.dtype is torch.float32
    fast, stock, exact = ({**r.grads, "logits": r.logits} for r in (fast, stock, exact))
    for name in exact:
        scale = (stock[name] - exact[name]).norm()
        assert (fast[name] - stock[name]).norm() <= 2.5 * scale, name


@pytest.fixture
def one_process(tmp_path):
    from torch import distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp(one_process):
    from torch.nn.parallel import DistributedDataParallel

    model = lora(llama())
    wrapped = DistributedDataParallel(model)
    check(wrapped, batch())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check(wrapped, batch(), norm=4 * LAYERS + 1, attention=2 * LAYERS, mlp=2 * LAYERS, use_cache=False)


@pytest.mark.parametrize("checkpoint", [None, True, False])
@pytest.mark.parametrize("adapters", [True, False])
def test_fsdp2_by_decoder_layer(one_process, adapters, checkpoint):
    """Inside a sharded layer's forward its parameters are whole and plain."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The default is a mesh of GPUs where there are any.
    mesh = init_device_mesh("cpu", (1,))

    model = lora(llama()) if adapters else llama()
    if checkpoint is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint})
    stock = run(copy.deepcopy(model), batch(), use_cache=False)
    before = hits()
    with patched():
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for _ in range(2):
            model.zero_grad()
            loss = model(**batch(), use_cache=False).loss
            loss.backward()
    times = 2 if checkpoint is None else 4
    assert hits()["llama.attention"] - before["llama.attention"] == times * LAYERS
    assert hits()["llama.mlp"] - before["llama.mlp"] == times * LAYERS
    assert distance(loss.detach(), stock.loss) <= FP32
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == stock.grads.keys()
    assert max(distance(grads[n], stock.grads[n]) for n in grads) <= FP32


def test_sharded_leaf_and_meta_weight_are_left_to_stock(one_process):
    """Stock raises for a DTensor (torch returns noise for a meta weight): left to it, with the reason counted."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    model = lora(llama())
    check(model, batch())
    first, second = layers_of(model)
    base = first.self_attn.k_proj.base_layer
    base.weight = nn.Parameter(distribute_tensor(base.weight.data, init_device_mesh("cpu", (1,)), [Replicate()]))
    base = second.mlp.up_proj.base_layer
    base.weight = nn.Parameter(base.weight.to("meta"))
    x = torch.randn(1, 3, 64)
    position_embeddings = (torch.ones(1, 3, 16), torch.zeros(1, 3, 16))
    with patched():
        with pytest.raises(RuntimeError, match="DTensor"):
            first.self_attn(x, position_embeddings, None)
        second.mlp(x)
    assert fallbacks("llama.attention")["DTensor weight"] == 1
    assert fallbacks("llama.mlp")["meta weight"] == 1


# ---- evaluation


def test_evaluation_and_generate_are_stock():
    model = lora(llama()).eval()
    ids = batch(rows=2, length=5)["input_ids"]
    before = hits()
    with torch.no_grad(), patched():
        fast = model(ids).logits
        tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert hits() == before and fallbacks("llama.attention")["eval"] > 0
    with torch.no_grad():
        assert torch.equal(fast, model(ids).logits)
        assert torch.equal(tokens, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False))


def test_generate_in_training_mode():
    """RL scripts forget ``eval()``: one token at a time through the fast path, with the same tokens."""
    model = lora(llama())
    ids = batch(rows=2, length=5)["input_ids"]
    before = hits()["llama.attention"]
    with torch.no_grad(), patched():
        tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert hits()["llama.attention"] > before
    assert torch.equal(tokens, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False))


def test_evaluation_mode_with_gradients_is_fast():
    check(lora(llama(), lora_dropout=0.5).eval(), batch())


# ---- states of PEFT


def test_dora_runs_stock():
    model = lora(llama(), use_dora=True)
    check(model, batch(), attention=0, mlp=0)
    assert fallbacks("llama.mlp")["variant: dora"] == LAYERS


def test_dora_on_one_projection_only():
    model = lora(llama(), target_modules=["q_proj"])
    model.add_adapter("dora", LoraConfig(r=2, use_dora=True, target_modules=["up_proj"]))
    fill_adapters(model, 4)
    model.base_model.set_adapter(["default", "dora"])
    check(model, batch(), mlp=0)


def test_merged():
    model = lora(llama())
    expected = run(model, batch())
    model.merge_adapter()
    layers_of(model)[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    fast, _ = check(model, batch(), attention=0, mlp=0)
    torch.testing.assert_close(fast.loss, expected.loss, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    check(model, batch())


def test_disabled_adapters():
    model = lora(llama())
    enabled = run(model, batch())
    with patched(), model.disable_adapter():
        fast = model(**batch()).loss
    with model.disable_adapter():
        stock = model(**batch()).loss
    torch.testing.assert_close(fast, stock)
    assert abs(fast - enabled.loss) > 0.01
    check(model, batch())


def test_several_adapters():
    model = lora(llama())
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "k_proj", "gate_proj"]))
    fill_adapters(model, 6)
    check(model, batch())
    model.set_adapter("other")
    check(model, batch())
    model.base_model.set_adapter(["default", "other"])
    check(model, batch(), attention=0, mlp=0, linear=4 * LAYERS)
    assert fallbacks("llama.mlp")["several active adapters"] == LAYERS
    model.set_adapter("default")
    check(model, batch())
    model.delete_adapter("other")
    check(model, batch())


def test_mixed_batch():
    model = lora(llama())
    model.add_adapter("other", LoraConfig(r=3, target_modules=list(ALL)))
    fill_adapters(model, 6)
    model.eval()
    ids = batch()["input_ids"]

    def call():
        return model(input_ids=ids, adapter_names=["default", "other"]).logits

    before = hits()
    with patched():
        fast = call()
    assert hits()["llama.attention"] == before["llama.attention"] and hits()["peft.linear"] == before["peft.linear"]
    torch.testing.assert_close(fast, call())
    check(model, batch())


# ---- LoRA dropout


def test_dropout_masks_of_q_k_and_v_are_independent():
    """W = 0, A = B = 1, no rotation: q, k and v are the input under their own masks."""
    p, n = 0.4, 64
    model = lora(llama(num_key_value_heads=4), r=n, lora_alpha=n, lora_dropout=p)
    attention = layers_of(model)[0].self_attn
    seen = []

    def spy(module, query, key, value, mask, **kwargs):
        seen.extend(t.transpose(1, 2).flatten(2) for t in (query, key, value))
        return query.transpose(1, 2), None

    AttentionInterface.register("fup_masks", spy)
    attention.config._attn_implementation = "fup_masks"
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            part = getattr(attention, name)
            part.base_layer.weight.zero_()
            part.lora_A["default"].weight.copy_(torch.eye(n))
            part.lora_B["default"].weight.copy_(torch.eye(n))
    x = (torch.rand(4, 50, n) + 0.5).requires_grad_()
    cos, sin = torch.ones(1, 50, 16), torch.zeros(1, 50, 16)
    before = hits()["llama.attention"]
    with patched():
        attention(x, (cos, sin), None)
    assert hits()["llama.attention"] == before + 1
    masks = [t.detach() != 0 for t in seen]
    grads = [torch.randn_like(x) for _ in seen]
    torch.autograd.backward(seen, grads)
    for t, mask in zip(seen, masks):
        torch.testing.assert_close(t.detach(), x.detach() * mask / (1 - p))
    torch.testing.assert_close(x.grad, sum(g * m / (1 - p) for g, m in zip(grads, masks)))
    sigma = lambda q: 5 * (q * (1 - q) / masks[0].numel()) ** 0.5  # noqa: E731
    for i, mask in enumerate(masks):
        assert abs(mask.float().mean() - (1 - p)) < sigma(p)
        agreement = (mask == masks[i - 1]).float().mean()
        expected = p * p + (1 - p) ** 2
        assert abs(agreement - expected) < sigma(expected)


def test_dropout_masks_of_gate_and_up_are_independent():
    p, n = 0.4, 64
    model = lora(llama(intermediate_size=n), r=n, lora_alpha=n, lora_dropout=p)
    mlp = layers_of(model)[0].mlp
    mlp.down_proj.lora_dropout["default"].p = 0.0
    with torch.no_grad():
        for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            part.base_layer.weight.zero_()
            part.lora_A["default"].weight.copy_(torch.eye(n))
            part.lora_B["default"].weight.copy_(torch.eye(n))
    x = torch.full((200, n), 2.0)
    with patched():
        y = mlp(x)
    kept = y != 0
    expected = (1 - p) ** 2
    assert abs(kept.float().mean() - expected) < 5 * (expected * (1 - expected) / kept.numel()) ** 0.5
    value = torch.tensor(2.0 / (1 - p))
    torch.testing.assert_close(y[kept], (nn.functional.silu(value) * value).expand(int(kept.sum())))


def test_dropout_gradients_by_finite_differences():
    """In float64 with the masks held fixed by the seed: along a random direction of all adapters and of the input."""
    model = lora(llama(), lora_dropout=0.3).double()
    embedding = model.get_input_embeddings()
    inputs = batch()
    x = embedding(inputs["input_ids"]).detach().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad] + [x]
    torch.manual_seed(1)
    direction = [torch.randn_like(p) * p.norm() / p.numel() ** 0.5 for p in trained]

    weights = torch.randn(2, 12, 128, dtype=torch.float64)

    def loss():
        # Of the logits: transformers computes the loss itself in float32.
        torch.manual_seed(5)
        return (model(inputs_embeds=x).logits * weights).mean()

    @torch.no_grad()
    def loss_at(epsilon):
        for p, d in zip(trained, direction):
            p.add_(d, alpha=epsilon)
        value = loss().item()
        for p, d in zip(trained, direction):
            p.sub_(d, alpha=epsilon)
        return value

    before = hits()["llama.mlp"]
    with patched():
        grads = torch.autograd.grad(loss(), trained)
        slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    assert hits()["llama.mlp"] == before + 3 * LAYERS
    analytic = sum((g * d).sum().item() for g, d in zip(grads, direction))
    assert analytic == pytest.approx(slope, rel=1e-6)


def test_dropout_has_the_distribution_of_stock():
    """Mean loss over 60 draws of each arm, within 5 standard errors of their difference."""
    model = lora(llama(num_hidden_layers=1), lora_dropout=0.5)

    def draws():
        with torch.no_grad():
            return torch.stack([model(**batch()).loss for _ in range(60)])

    with patched():
        fast = draws()
    stock = draws()
    error = ((fast.var() + stock.var()) / 60).sqrt()
    assert stock.std() > 0 and (fast.mean() - stock.mean()).abs() < 5 * error
    assert 0.6 < fast.std() / stock.std() < 1.7


# ---- copies, compile


def test_deepcopy_of_a_patched_model():
    model = lora(llama())
    with patched():
        run(model, batch())
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.1)
        fast = run(twin, batch())
    assert_same(fast, run(twin, batch()))
    check(model, batch())


def test_pickle_knows_nothing_of_us():
    model = llama()
    with patched():
        run(model, batch())
        data = pickle.dumps(model)
    assert b"fast_unsloth_patch" not in data
    check(pickle.loads(data), batch())


@pytest.mark.parametrize("adapters", [True, False])
def test_compile(adapters):
    """One graph, no recompilation, every forward stock and counted once while tracing."""
    torch._dynamo.reset()
    model = llama(num_hidden_layers=1)
    if adapters:
        model = lora(model)
    stock = run(model, batch())
    frames = []

    def backend(graph, example_inputs):
        frames.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    before, compiled = hits(), fallbacks("llama.attention").get("compiling", 0)
    with patched():
        step = torch.compile(model, backend=backend, fullgraph=True)
        for _ in range(3):
            fast = run(step, batch())
    assert len(frames) == 1 and hits() == before
    assert fallbacks("llama.attention")["compiling"] == compiled + 1
    for name, grad in stock.grads.items():
        torch.testing.assert_close(fast.grads["_orig_mod." + name], grad)
    torch._dynamo.reset()


def test_selective_checkpointing_runs_stock():
    """It intercepts torch's calls in the order of the forward."""
    from functools import partial

    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    model = lora(llama())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, policy)}
    )
    check(model, batch(), norm=1, attention=0, mlp=0, use_cache=False)
