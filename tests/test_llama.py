"""``LlamaAttention``, ``LlamaMLP``, ``LlamaRMSNorm`` against stock: what is trained, dtypes, inputs."""

from __future__ import annotations

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling
from tiny_llama import (
    FP32,
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
    llama,
    lora,
    oracle,
    patched,
    run,
)
from torch import nn
from transformers import AttentionInterface, DynamicCache

from fast_unsloth_patch import switch

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
    assert (backward["llama.rms_norm"], backward["llama.attention"], backward["llama.mlp"]) == (
        2 * LAYERS + 1,
        LAYERS,
        LAYERS,
    )


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
        return attention(
            hidden_states=x, position_embeddings=list(pair) if positions == "list" else pair, attention_mask=None
        )

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


def test_reasons_name_the_state():
    model = lora(llama())
    layers_of(model)[0].self_attn.q_proj.register_forward_hook(lambda *args: None)
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
        assert hits()["llama.attention"] == before, (
            "a function replaced before the patch is not known to be the rotary one"
        )


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
    norm.weight = x[0].requires_grad_()  # as FSDP1 puts a plain tensor in its place
    with patched():
        fast = norm(x)
    assert hits()["llama.rms_norm"] == before + 2
    torch.testing.assert_close(fast, norm(x))
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), norm.weight)[0] for y in (fast, norm(x))))


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
    model = lora(
        llama(base, hidden_size=256, intermediate_size=512, num_attention_heads=8), adapter_dtype=adapter
    ).cuda()
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
