"""``LlamaAttention``, ``LlamaMLP``, ``LlamaRMSNorm``: whole tiny models against stock, over every state a script can put them in."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling
from peft import LoraConfig
from torch import nn
from transformers import AttentionInterface, DynamicCache
from transformers.activations import SiLUActivation

from fast_unsloth_patch import switch
from fast_unsloth_patch.patches import checkpointing
from tiny_llama import (
    ALL,
    FP32,
    assert_as_good,
    assert_same,
    backwards,
    batch,
    distance,
    fallbacks,
    fill_adapters,
    hits,
    llama,
    lora,
    oracle,
    patched,
    run,
)

FUSED = ("llama.rms_norm", "llama.attention", "llama.mlp")
LAYERS = 2


def both(model, inputs, **kwargs):
    """The fast and the stock run, with the fast path's forward and backward counted in one and absent from the other."""
    forward, backward = hits(), backwards()
    with patched():
        fast = run(model, inputs, **kwargs)
    new_forward = {k: hits()[k] - forward[k] for k in forward}
    new_backward = {k: backwards()[k] - backward[k] for k in backward}
    stock = run(model, inputs, **kwargs)
    assert {k: hits()[k] - forward[k] for k in forward} == new_forward, "the stock arm took the fast path"
    return fast, stock, new_forward, new_backward


def check(model, inputs, *, norm=2 * LAYERS + 1, attention=LAYERS, mlp=LAYERS, linear=0, tolerance=FP32, **kwargs):
    """Fast equals stock, with exactly these fast forwards."""
    fast, stock, forward, _ = both(model, inputs, **kwargs)
    assert_same(fast, stock, tolerance)
    got = (forward["llama.rms_norm"], forward["llama.attention"], forward["llama.mlp"], forward["peft.linear"])
    assert got == (norm, attention, mlp, linear)
    return fast, stock


def layers_of(model):
    return model.get_base_model().model.layers if hasattr(model, "peft_config") else model.model.layers


# ---- what is trained


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["o_proj", "up_proj"]},
        {"target_modules": ["down_proj"]},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "v_proj": 16, "up_proj": 5, "layers.1.mlp.down_proj": 1}},
        {"alpha_pattern": {"k_proj": 3, "gate_proj": 40}},
        {"r": 33},
    ],
    ids=str,
)
def test_lora(config):
    check(lora(llama(), **config), batch())


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("bias", [False, True])
def test_lora_bias(bias):
    check(lora(llama(attention_bias=bias, mlp_bias=bias), lora_bias=True), batch())


def test_biases():
    check(lora(llama(attention_bias=True, mlp_bias=True)), batch())
    check(llama(attention_bias=True, mlp_bias=True), batch())


def test_full_fine_tuning():
    fast, stock, forward, backward = both(llama(), batch())
    assert_same(fast, stock)
    assert len(fast.grads) == 9 * LAYERS + 3
    assert (forward["llama.attention"], forward["llama.mlp"]) == (LAYERS, LAYERS)
    assert (backward["llama.rms_norm"], backward["llama.attention"], backward["llama.mlp"]) == (2 * LAYERS + 1, LAYERS, LAYERS)


def test_backward_is_counted_once_even_where_the_first_op_needs_none():
    """Only o_proj of the first layer has an adapter: nothing before it has a gradient."""
    model = lora(llama(num_hidden_layers=1), target_modules=["o_proj"])
    _, _, forward, backward = both(model, batch())
    assert (forward["llama.attention"], backward["llama.attention"]) == (1, 1)


def test_trainable_base_and_lora():
    model = lora(llama())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    check(model, batch())


def test_modules_to_save_and_trained_norms():
    model = lora(llama(), modules_to_save=["lm_head"])
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    check(model, batch())


@pytest.mark.parametrize("heads", [(4, 4, None), (4, 1, None), (8, 2, 8), (4, 2, 32)], ids=str)
def test_heads(heads):
    attention, kv, head_dim = heads
    extra = {} if head_dim is None else {"head_dim": head_dim}
    check(lora(llama(num_attention_heads=attention, num_key_value_heads=kv, **extra)), batch())


# ---- dtypes: stock has two references, autocast on and off


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_dtypes(base, adapter, autocast):
    model = lora(llama(base), adapter_dtype=adapter)
    inputs = batch(rows=4, length=24)
    fast, stock, forward, _ = both(model, inputs, autocast=autocast)
    assert forward["llama.attention"] == LAYERS and forward["llama.mlp"] == LAYERS
    if {base, adapter, autocast} == {torch.float32, None}:
        assert_same(fast, stock)
    else:
        assert_as_good(fast, stock, oracle(model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_fine_tuning_under_autocast(dtype):
    model = llama()
    inputs = batch(rows=4, length=24)
    fast, stock, forward, _ = both(model, inputs, autocast=dtype)
    assert forward["llama.attention"] == LAYERS
    assert_as_good(fast, stock, oracle(model, inputs))


def test_adapters_of_several_dtypes_run_stock():
    model = lora(llama(torch.bfloat16))
    for layer in layers_of(model):
        for part in (layer.self_attn.v_proj, layer.mlp.up_proj):
            part.lora_A.bfloat16(), part.lora_B.bfloat16()
    inputs = batch(rows=4, length=24)
    fast, stock, forward, _ = both(model, inputs)
    assert forward["llama.attention"] == 0 and forward["llama.mlp"] == 0
    # The single layers are fast each.
    assert forward["peft.linear"] == 7 * LAYERS
    assert fallbacks("llama.attention")["adapters of several dtypes"] == LAYERS
    assert_as_good(fast, stock, oracle(model, inputs))
    both(model, inputs, autocast=torch.bfloat16)
    assert fallbacks("llama.attention")["adapters of several dtypes"] == LAYERS, "autocast brings them together"


# ---- inputs, positions, masks, attention functions


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, implementation):
    inputs = batch(rows=3)
    mask = torch.ones_like(inputs["input_ids"])
    for row, n in enumerate((0, 4, 7)):
        where = slice(0, n) if side == "left" else slice(mask.shape[1] - n, None)
        mask[row, where] = 0
    inputs["attention_mask"] = mask
    inputs["labels"] = inputs["labels"].masked_fill(mask == 0, -100)
    check(lora(llama(attn_implementation=implementation)), inputs)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 8},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 500000.0,
        },
    ],
    ids=lambda r: r["rope_type"],
)
def test_scaled_rope(rope):
    check(lora(llama(rope_parameters=rope)), batch())


def test_position_ids():
    inputs = batch(rows=3)
    inputs["position_ids"] = torch.stack([torch.arange(12) + start for start in (0, 5, 20)])
    check(lora(llama()), inputs)


def test_packed_rows():
    inputs = batch(rows=1, length=16)
    inputs["position_ids"] = torch.cat([torch.arange(5), torch.arange(11)])[None]
    check(lora(llama()), inputs, use_cache=False)


def test_partial_rotary_is_left_to_stock():
    """Llama's own rotary function cannot do it, so the stock forward raises, and so does the patched one."""
    model = lora(llama())
    attention = layers_of(model)[0].self_attn
    x, cos = torch.randn(1, 3, 64), torch.randn(1, 3, 8)
    with patched(), pytest.raises(RuntimeError):
        attention(x, position_embeddings=(cos, cos), attention_mask=None)
    assert fallbacks("llama.attention")["rotary shape"] == 1


@pytest.mark.parametrize("positions", ["positional", "keyword", "list"])
def test_calls_of_a_layer_alone(positions):
    attention = layers_of(lora(llama(attn_implementation="eager")))[0].self_attn
    x, angles = torch.randn(2, 3, 64), torch.randn(1, 3, 16)
    pair = (angles.cos(), angles.sin())

    def call():
        if positions == "positional":
            return attention(x, pair, None)
        return attention(hidden_states=x, position_embeddings=list(pair) if positions == "list" else pair, attention_mask=None)

    before = hits()["llama.attention"]
    with patched():
        fast = call()
    assert hits()["llama.attention"] == before + 1
    stock = call()
    assert type(fast) is tuple and len(fast) == 2
    for a, b in zip(fast, stock):
        torch.testing.assert_close(a, b)


def test_outputs_are_recorded():
    model = lora(llama(attn_implementation="eager"))
    fast, stock = check(model, batch(), output_attentions=True, output_hidden_states=True)
    for name, n in (("attentions", LAYERS), ("hidden_states", LAYERS + 1)):
        new, old = getattr(fast.output, name), getattr(stock.output, name)
        assert len(new) == len(old) == n
        for a, b in zip(new, old):
            torch.testing.assert_close(a, b, rtol=FP32, atol=FP32)


def test_cache_in_training():
    model = lora(llama())
    fast, stock = check(model, batch(), use_cache=True)
    new, old = fast.output.past_key_values, stock.output.past_key_values
    assert type(new) is type(old) is DynamicCache and new.get_seq_length() == 12
    for a, b in zip(new.layers, old.layers):
        torch.testing.assert_close(a.keys, b.keys, rtol=FP32, atol=FP32)
        torch.testing.assert_close(a.values, b.values, rtol=FP32, atol=FP32)


def test_continuing_a_cache_in_training():
    """Prefix tuning and chunked training: fewer queries than keys."""
    model = lora(llama())
    first, second = batch(), batch(seed=9)

    def step():
        model.zero_grad()
        cache = model(input_ids=first["input_ids"], use_cache=True).past_key_values
        loss = model(**second, past_key_values=cache, use_cache=True).loss
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = hits()["llama.attention"]
    with patched():
        fast = step()
    assert hits()["llama.attention"] == before + 2 * LAYERS
    for a, b in zip(fast, step()):
        assert distance(a, b) <= FP32


def test_attention_gets_what_stock_gives_it():
    """Dropout, scaling and every keyword argument reach the attention function; its weights come back."""
    seen = []

    def spy(module, query, key, value, mask, **kwargs):
        seen.append({"shapes": (query.shape, key.shape, value.shape), "mask": mask, "module": module, **kwargs})
        return modeling.eager_attention_forward(module, query, key, value, None, **{**kwargs, "dropout": 0.0})

    AttentionInterface.register("fup_spy", spy)
    model = lora(llama(attn_implementation="fup_spy", attention_dropout=0.25))
    check(model, batch(), custom_argument=7, use_cache=False)
    fast, stock = seen[:LAYERS], seen[LAYERS:]
    assert len(fast) == len(stock) == LAYERS
    for a, b in zip(fast, stock):
        assert a.keys() == b.keys() and a["custom_argument"] == 7 and a["dropout"] == 0.25
        same = [torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a]
        assert all(same), a.keys()


def test_attention_dropout_is_stock():
    model = lora(llama(attn_implementation="eager", attention_dropout=0.3))
    torch.manual_seed(4)
    with patched():
        fast = run(model, batch())
    torch.manual_seed(4)
    assert_same(fast, run(model, batch()))


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


def test_ddp(tmp_path):
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = lora(llama())
        wrapped = DistributedDataParallel(model)
        check(wrapped, batch())
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        check(wrapped, batch(), norm=4 * LAYERS + 1, attention=2 * LAYERS, mlp=2 * LAYERS, use_cache=False)
    finally:
        dist.destroy_process_group()


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


# ---- changes between two steps: the plan must not be stale


def _twice(module, args, output):
    return output * 2


def _hook(path):
    return lambda layer: layer.get_submodule(path).register_forward_hook(_twice)


def _own_forward(path):
    def change(layer):
        module = layer.get_submodule(path)
        module.forward = lambda *args: type(module).forward(module, *args) * 2

    return change


def _replace(path, make):
    def change(layer):
        parent, _, name = path.rpartition(".")
        setattr(layer.get_submodule(parent), name, make())

    return change


class Doubling(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class DoublingSiLU(SiLUActivation):
    def forward(self, x):
        return super().forward(x) * 2


def _class(path, cls):
    def change(layer):
        layer.get_submodule(path).__class__ = cls

    return change


CHANGES = {
    # what: (change of a decoder layer, attention fast, mlp fast)
    "hook on q": (_hook("self_attn.q_proj"), False, True),
    "hook on a base": (_hook("self_attn.o_proj.base_layer"), False, True),
    "hook on an A": (_hook("mlp.up_proj.lora_A.default"), True, False),
    "hook on act": (_hook("mlp.act_fn"), True, False),
    "forward of down": (_own_forward("mlp.down_proj"), True, False),
    "forward of v's base": (_own_forward("self_attn.v_proj.base_layer"), False, True),
    "forward of act": (_own_forward("mlp.act_fn"), True, False),
    "gelu": (_replace("mlp.act_fn", nn.GELU), True, False),
    "another silu": (_replace("mlp.act_fn", nn.SiLU), True, True),
    "class of act": (_class("mlp.act_fn", DoublingSiLU), True, False),
    "class of a base": (_class("mlp.gate_proj.base_layer", Doubling), True, False),
    "k becomes plain": (_replace("self_attn.k_proj", lambda: nn.Linear(64, 32, bias=False)), True, True),
    "k becomes special": (_replace("self_attn.k_proj", lambda: Doubling(64, 32, bias=False)), False, True),
    "one more child": (_replace("self_attn.q_norm", lambda: nn.LayerNorm(16)), False, True),
    "scaling": (lambda layer: layer.mlp.up_proj.scaling.update(default=0.3), True, True),
    "no active": (lambda layer: setattr(layer.self_attn.q_proj, "_active_adapter", "none"), True, True),
    "merged": (lambda layer: layer.mlp.gate_proj.merge(), True, False),
    "cast": (lambda layer: setattr(layer.mlp.gate_proj, "cast_input_dtype_enabled", False), True, False),
    "base trained": (lambda layer: layer.self_attn.q_proj.base_layer.weight.requires_grad_(True), True, True),
    "A frozen": (lambda layer: layer.self_attn.q_proj.lora_A.requires_grad_(False), True, True),
    "weight data": (lambda layer: setattr(layer.mlp.up_proj.base_layer.weight, "data", torch.randn(128, 64)), True, True),
    "keep_stock": (lambda layer: switch.keep_stock(layer.self_attn) and None, False, True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_steps_is_seen(name):
    change, attention, mlp = CHANGES[name]
    model = lora(llama())
    check(model, batch())
    change(layers_of(model)[0])
    fast, stock, forward, _ = both(model, batch())
    assert_same(fast, stock)
    assert forward["llama.attention"] == LAYERS - (not attention)
    assert forward["llama.mlp"] == LAYERS - (not mlp)


def test_reasons_name_the_state():
    model = lora(llama())
    layers_of(model)[0].self_attn.q_proj.register_forward_hook(_twice)
    layers_of(model)[0].mlp.act_fn = nn.GELU()
    with patched():
        run(model, batch())
    assert fallbacks("llama.attention")["hooks on q_proj"] > 0
    assert fallbacks("llama.mlp")["activation GELU"] > 0


def test_other_activation_of_the_config():
    check(lora(llama(hidden_act="gelu")), batch(), mlp=0, linear=3 * LAYERS)


def test_replaced_rotary_function_runs_stock(monkeypatch):
    stock_rotary = modeling.apply_rotary_pos_emb
    model = lora(llama())
    check(model, batch())
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, cos, sin: stock_rotary(q, k, sin, cos))
    check(model, batch(), attention=0, linear=4 * LAYERS)
    with patched():
        monkeypatch.undo()
        before = hits()["llama.attention"]
        run(model, batch())
        assert hits()["llama.attention"] == before, "a function replaced before the patch is not known to be the rotary one"


def test_kernelized_rotary_function_runs_stock(monkeypatch):
    """The ``kernels`` package makes the function a module; ``kernelize`` then puts a forward on that object."""
    stock_rotary = modeling.apply_rotary_pos_emb

    class Func(nn.Module):
        def forward(self, *args):
            return stock_rotary(*args)

    rotary = Func()
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", rotary)
    model = lora(llama())
    check(model, batch())
    rotary.forward = lambda q, k, cos, sin: stock_rotary(q * 2, k, cos, sin)
    check(model, batch(), attention=0, linear=4 * LAYERS)


def test_norm_weights():
    model = llama()
    norm = model.model.norm
    x = torch.randn(3, 64)
    norm.weight.data = norm.weight.data.double()
    before = hits()["llama.rms_norm"]
    with patched():
        fast = norm(x)
    stock = norm(x)
    assert hits()["llama.rms_norm"] == before + 1 and fast.dtype == stock.dtype == torch.float64
    torch.testing.assert_close(fast, stock, rtol=1e-6, atol=1e-6)
    del norm.weight
    norm.weight = x[0]
    with patched():
        assert torch.equal(norm(x), stock * 0 + norm(x))
    assert fallbacks("llama.rms_norm")["weight is no parameter"] > 0


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


# ---- the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoint", [None, True, False])
@pytest.mark.parametrize("adapters", [True, False])
def test_gpu_fp32(adapters, checkpoint):
    size = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = lora(llama(**size)) if adapters else llama(**size)
    model.cuda()
    if checkpoint is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint})
    times = 1 if checkpoint is None else 2
    check(
        model,
        batch(rows=3, length=37),
        norm=2 * LAYERS * times + 1,
        attention=LAYERS * times,
        mlp=LAYERS * times,
        use_cache=False,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_dtypes(base, adapter, autocast):
    model = lora(llama(base, hidden_size=256, intermediate_size=512, num_attention_heads=8), adapter_dtype=adapter).cuda()
    inputs = batch(rows=4, length=64)
    fast, stock, forward, _ = both(model, inputs, autocast=autocast)
    assert forward["llama.attention"] == LAYERS and forward["llama.mlp"] == LAYERS
    if {base, adapter, autocast} == {torch.float32, None}:
        assert_same(fast, stock)
    else:
        assert_as_good(fast, stock, oracle(model, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", [True, False])
def test_gpu_dropout_and_disabled(reentrant):
    model = lora(llama(), lora_dropout=0.3).cuda()
    model.enable_input_require_grads()
    with patched():
        torch.manual_seed(11)
        plain = run(model, batch(), use_cache=False)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(11)
        assert_same(run(model, batch(), use_cache=False), plain)
        before = hits()
        with switch.disabled():
            output = model(**{k: v.cuda() for k, v in batch().items()}, use_cache=False)
        output.loss.backward()
        assert hits() == before
