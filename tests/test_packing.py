"""Packed rows: as stock's sdpa with its dense mask, and as every document alone."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from packed_cases import EVERYTHING, compare, mistral, packed, reasons, step, tiny
from tiny_llama import LAYERS, assert_same, batch, distance, fallbacks, hits, layers_of, llama, lora, patched
from transformers import AttentionInterface, DataCollatorWithFlattening, DynamicCache, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fast_unsloth_patch import switch
from fast_unsloth_patch.patches import documents, packing
from fast_unsloth_patch.status import tally

FAMILIES = ["llama", "mistral None", "mistral 3", "mistral 100"]
ROWS = [[5, 11]], [[3, 1, 1, 7, 4]], [[5, 11], [9, 7], [16]]

# ---- parity


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family, rows):
    compare(tiny(family), packed(*rows), use_cache=False)


def test_one_row_of_positions_for_the_whole_batch():
    inputs = packed([5, 11], [5, 11], [5, 11])
    inputs["position_ids"] = inputs["position_ids"][:1]
    compare(tiny("mistral 3"), inputs, use_cache=False)


def test_full_fine_tuning():
    compare(llama(), packed([5, 11]), use_cache=False)


def test_inputs_embeds():
    model = lora(llama())
    inputs = packed([5, 11])
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    compare(model, inputs, use_cache=False)


@pytest.mark.parametrize("heads", [(4, 4, None), (4, 1, None), (2, 2, 64), (2, 1, 96)], ids=str)
def test_heads(heads):
    attention, kv, head_dim = heads
    extra = {} if head_dim is None else {"head_dim": head_dim}
    compare(
        tiny("llama", num_attention_heads=attention, num_key_value_heads=kv, **extra), packed([5, 11]), use_cache=False
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_every_document_alone(family):
    """Which stock's own mask promises; the window is as long inside a document as in a row of its own."""
    model = tiny(family)
    lengths = [5, 1, 8]
    inputs = packed(lengths)
    n = int((inputs["labels"] != -100).sum())
    with patched(*EVERYTHING):
        together = step(model, inputs, use_cache=False, num_items_in_batch=n)
    alone = []
    for start, length in zip((0, 5, 6), lengths):
        part = {k: v[:, start : start + length] for k, v in inputs.items() if k != "position_ids"}
        alone.append(step(model, part, use_cache=False, num_items_in_batch=n))
    summed = alone[0]._replace(
        loss=sum(r.loss for r in alone), grads={k: sum(r.grads[k] for r in alone) for k in alone[0].grads}
    )
    assert_same(together, summed)


def test_gradient_accumulation():
    model = tiny("mistral 3")
    parts = [packed([5, 11]), packed([9, 7], seed=5)]
    n = torch.tensor(sum(int((part["labels"] != -100).sum()) for part in parts))
    for part in parts:
        compare(model, part, use_cache=False, num_items_in_batch=n)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral 3"])
def test_checkpointing(family, reentrant):
    """Recomputes with the same documents, found once; a default configuration asks for a cache, checkpointing wins."""
    model = tiny(family)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    name = family.split()[0]
    before = tally(f"{name}.attention").recomputed
    compare(model, packed([5, 11], [9, 7]))
    assert tally(f"{name}.attention").recomputed == before + LAYERS - 1  # the loss follows the last


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_of_one_length(family):
    compare(tiny(family), packed([8, 8], [8, 8]), use_cache=False)
    compare(tiny(family), packed([4] * 4), use_cache=False)


def test_hidden_states_are_recorded():
    new, old = compare(tiny("llama"), packed([5, 11]), use_cache=False, output_hidden_states=True)
    for a, b in zip(new.output.hidden_states, old.output.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_positions_that_are_no_plain_restarts():
    """Stock's rule is all that counts: gaps, other starts, steps back, repeated positions."""
    model = tiny("mistral 3")
    for row in (
        [0, 1, 2, 5, 6, 7, 8, 9, 0, 1, 2, 3],
        [4, 5, 6, 7, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0],
        [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2],
        [0, 2, 4, 6, 7, 7, 8, 9, 10, 11, 12, 3],
    ):
        inputs = batch(1, 12)
        inputs["position_ids"] = torch.tensor([row])
        compare(model, inputs, use_cache=False)
        found = packing.boundaries(inputs["position_ids"], 1)
        index = masking_utils.find_packed_sequence_indices(inputs["position_ids"])[0]
        assert found.diff().tolist() == torch.unique_consecutive(index, return_counts=True)[1].tolist()


@pytest.mark.parametrize("positions", [torch.arange(12), torch.arange(12) + 7])
def test_one_document_a_row_is_plain_attention(positions):
    model = tiny("llama")
    before = reasons(model)
    inputs = batch(2, 12)
    inputs["position_ids"] = positions[None]
    compare(model, inputs, use_cache=False, fast=False)
    assert reasons(model) == before, "nothing to pack is no fall-back"


# ---- what collators make


def examples():
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(1, 128, (n,), generator=generator).tolist()} for n in (6, 3, 9)]


@pytest.mark.parametrize("keywords", [False, True])
def test_flattening_collator(keywords):
    inputs = DataCollatorWithFlattening(return_flash_attn_kwargs=keywords)(examples())
    assert ("cu_seq_lens_q" in inputs) is keywords
    compare(tiny("mistral 4"), inputs, use_cache=False)


def test_trl_padding_free():
    pytest.importorskip("trl")
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    for multiple in (None, 8):
        collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=multiple)
        inputs = collator(examples())
        assert "attention_mask" not in inputs
        compare(tiny("llama"), inputs, use_cache=False)


def test_trl_packing():
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    data = pack_dataset(Dataset.from_list(examples()), seq_length=10, strategy="bfd")
    inputs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(list(data))
    compare(tiny("llama"), inputs, use_cache=False)


def test_keywords_do_not_outrank_positions():
    """Stock's sdpa looks at the positions only."""
    inputs = packed([5, 11])
    wrong = torch.tensor([0, 8, 16], dtype=torch.int32)
    inputs |= {"cu_seq_lens_q": wrong, "cu_seq_lens_k": wrong, "max_length_q": 8, "max_length_k": 8}
    compare(tiny("llama"), inputs, use_cache=False)
    del inputs["position_ids"]
    compare(tiny("llama"), inputs, use_cache=False, fast=False)


def test_base_model_alone():
    """As TRL calls it, with a loss of its own."""
    model = llama()
    inputs = packed([5, 11])

    def call():
        out = model.model(inputs["input_ids"], None, inputs["position_ids"], use_cache=False)
        out.last_hidden_state.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return [out.last_hidden_state, *grads]

    before = tally("llama.packing").forward
    with patched(*EVERYTHING):
        new = call()
    assert tally("llama.packing").forward == before + 1
    assert all(distance(a, b) < 1e-5 for a, b in zip(new, call(), strict=True))


# ---- where stock runs, and why


def with_cache(model, inputs):
    return {"use_cache": True}


def with_default_cache(model, inputs):
    assert model.config.use_cache
    return {}


def with_given_cache(model, inputs):
    inputs["past_key_values"] = DynamicCache(config=model.config)
    return {"use_cache": False}


def with_eager(model, inputs):
    model.set_attn_implementation("eager")
    return {"use_cache": False}


def with_attentions(model, inputs):
    return {"use_cache": False, "output_attentions": True}


def without_causality(model, inputs):
    return {"use_cache": False, "is_causal": False}


def with_dropout(model, inputs):
    for layer in layers_of(model):
        layer.self_attn.attention_dropout = 1e-9
    return {"use_cache": False}


def with_hook_on_arguments(model, inputs):
    layers_of(model)[1].self_attn.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    return {"use_cache": False}


def with_instance_forward(model, inputs):
    layer = layers_of(model)[1]
    layer.forward = layer.forward
    return {"use_cache": False}


def kept_stock(model, inputs):
    switch.keep_stock(model)
    return {"use_cache": False}


@pytest.mark.parametrize(
    "case, reason",
    [
        (with_cache, "cache"),
        (with_default_cache, "cache"),
        (with_given_cache, "cache"),
        (with_eager, "attention eager"),
        (with_attentions, "attentions asked for"),
        (without_causality, "not causal"),
        (with_dropout, "attention dropout"),
        (with_hook_on_arguments, "hooks on a layer"),
        (with_instance_forward, "forward of a layer replaced"),
        (kept_stock, "keep_stock"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_stock_runs(case, reason):
    model = tiny("mistral 3")
    inputs = packed([5, 11])
    kwargs = case(model, inputs)
    before = reasons(model).get(reason, 0)
    if "past_key_values" not in inputs:
        compare(model, inputs, fast=False, **kwargs)
    else:
        # The cache is filled by a step: each arm has its own.
        results = []
        for arm in (patched(*EVERYTHING), contextlib.nullcontext()):
            inputs["past_key_values"] = DynamicCache(config=model.config)
            with arm:
                results.append(step(model, inputs, **kwargs))
        assert_same(*results)
    assert reasons(model)[reason] == before + 1


def test_with_a_cache_stock_attends_across_documents():
    model = tiny("llama")
    inputs = packed([5, 11])
    _, ignored = compare(model, inputs, use_cache=True, fast=False)
    new, _ = compare(model, inputs, use_cache=False)
    assert distance(new.loss, ignored.loss) > 1e-3
    assert ignored.output.past_key_values is not None


def test_mask_that_contradicts_the_packing():
    """With a mask stock does not look for documents; all of its tokens are real, so nothing is taken out."""
    inputs = packed([5, 11])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    compare(tiny("llama"), inputs, use_cache=False, fast=False)


@pytest.mark.parametrize("positions", [torch.arange(9)[None], torch.zeros(3, 16, dtype=torch.int64)], ids=str)
def test_positions_of_another_shape_are_stocks_error(positions):
    model = tiny("llama")
    inputs = packed([5, 11], [5, 11]) | {"position_ids": positions}
    errors = []
    for arm in (patched(*EVERYTHING), contextlib.nullcontext()):
        with arm, pytest.raises(Exception) as caught:
            model(**inputs, use_cache=False)
        errors.append(caught.type)
    assert errors[0] is errors[1]


def test_without_the_attention_patch():
    model = tiny("llama")
    inputs = packed([5, 11])
    before = reasons(model).get("attention not patched", 0)
    with patched(*(name for name in EVERYTHING if name != "llama.attention")):
        new = step(model, inputs, use_cache=False)
    assert reasons(model)["attention not patched"] == before + 1
    assert_same(new, step(model, inputs, use_cache=False))


def test_replaced_attention_function():
    model = tiny("llama")
    inputs = packed([5, 11])
    AttentionInterface.register("sdpa", lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs))
    try:
        compare(model, inputs, use_cache=False, fast=False)
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert reasons(model)["attention function replaced"] >= 1
    compare(model, inputs, use_cache=False)


def test_disabled_and_evaluation():
    model = tiny("llama")
    inputs = packed([5, 11])
    with switch.disabled():
        compare(model, inputs, use_cache=False, fast=False)
    model.eval()
    with patched(*EVERYTHING), torch.no_grad():
        before = tally("llama.packing").forward
        loss = model(**inputs, use_cache=False).loss
        assert tally("llama.packing").forward == before
    assert torch.equal(loss, model(**inputs, use_cache=False).loss)


def test_compiled():
    model = tiny("llama")
    inputs = packed([5, 11])
    torch._dynamo.reset()
    with patched(*EVERYTHING):
        loss = torch.compile(model, backend="eager")(**inputs, use_cache=False).loss
    torch._dynamo.reset()
    assert fallbacks("llama.packing").get("compiling", 0) >= 1
    assert distance(loss, model(**inputs, use_cache=False).loss) < 1e-5


# ---- fall-backs inside the layers


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("family", ["llama", "mistral 3"])
def test_layers_that_run_stock_get_stocks_mask(family, reentrant):
    model = tiny(family)
    name = family.split()[0]
    layers_of(model)[0].self_attn.q_proj.register_forward_hook(lambda *args: None)
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = hits()[f"{name}.attention"]
    inputs = packed([5, 11], [9, 7])
    with patched(*EVERYTHING):
        new = step(model, inputs, use_cache=False)
    # The first layer runs stock, the last is not recomputed.
    recomputed = 0 if reentrant is None else LAYERS - 2
    assert hits()[f"{name}.attention"] == before + LAYERS - 1 + recomputed
    assert_same(new, step(model, inputs, use_cache=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_mask_is_stocks(monkeypatch, family):
    """Element by element what reaches the attention function, and made once a step."""
    model = tiny(family)
    for layer in layers_of(model):
        layer.self_attn.v_proj.register_forward_hook(lambda *args: None)
    seen = []
    stock_sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        seen.append(attn_mask)
        return stock_sdpa(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with patched(*EVERYTHING):
        step(model, packed([5, 11], [16]), use_cache=False)
    step(model, packed([5, 11], [16]), use_cache=False)
    assert len(seen) == 2 * LAYERS and seen[0] is seen[1]
    assert torch.equal(seen[0], seen[LAYERS]) and not seen[0].all()


def test_an_attention_that_takes_the_placeholder_for_a_mask_fails():
    model = llama()
    with patched("llama.packing"):
        forward = type(layers_of(model)[0].self_attn).forward
    forward.takes_packing = forward
    try:
        with patched("llama.packing"), pytest.raises(RuntimeError):
            model(**packed([5, 11]), use_cache=False)
    finally:
        del forward.takes_packing


def test_window_of_zero_tokens_runs_stock():
    model = lora(mistral(0))
    before = reasons(model).get("sliding window", 0)
    inputs = packed([5, 11])
    with patched(*EVERYTHING):
        new = step(model, inputs, use_cache=False)
    assert reasons(model)["sliding window"] == before + 1
    assert torch.equal(new.loss, step(model, inputs, use_cache=False).loss)


def test_hooks_are_looked_for_again():
    model = tiny("llama")
    inputs = packed([5, 11])
    compare(model, inputs, use_cache=False)
    handle = layers_of(model)[0].register_forward_pre_hook(lambda m, args, kwargs: None, with_kwargs=True)
    compare(model, inputs, use_cache=False, fast=False)
    handle.remove()
    compare(model, inputs, use_cache=False)
    # Hooks that see the outputs only.
    layers_of(model)[0].register_forward_hook(lambda *args: None)
    compare(model, inputs, use_cache=False)


# ---- the host waits once


def test_documents_are_looked_for_once_a_step(monkeypatch):
    model = tiny("llama")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    copies = []
    stock_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *args: copies.append(self.shape) or stock_cpu(self, *args))
    with patched(*EVERYTHING):
        step(model, packed([5, 11], [9, 7]))
    assert copies == [(2, 16)]


def test_claims_of_collators():
    """`_claimed` believes only what has the form of the collators' keywords."""
    positions = torch.zeros(1, 16, dtype=torch.int64)
    bounds = torch.tensor([0, 5, 16], dtype=torch.int32)
    good = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 11, "max_length_k": 11}

    def claimed(rows=1, **changes):
        call = documents.Call(None, None, None, None, positions, None, None, None, good | changes)
        return packing._claimed(call, rows)

    assert claimed() == (bounds, 11)
    assert claimed(rows=2) is None
    assert claimed(cu_seq_lens_q=None) is None
    assert claimed(cu_seq_lens_k=bounds[:2]) is None
    assert claimed(cu_seq_lens_q=bounds.long()) is None
    assert claimed(max_length_q=torch.tensor(11)) is None
    assert claimed(max_length_k=12) is None


# ---- the GPU


def gpu_model(family: str, **overrides):
    size = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "max_position_embeddings": 512}
    model = tiny(family, **(size | overrides)).cuda()
    return model.to(torch.bfloat16)


def errors(model, inputs, seeds: int, **kwargs) -> dict[str, float]:
    """RMS error of fast over that of stock against float64, pooled over seeds, for the loss and each gradient."""
    import copy
    import math

    from test_fidelity import refill

    twin = copy.deepcopy(model).double()
    fast_sum, stock_sum = {}, {}
    for seed in range(seeds):
        refill(model, seed)
        twin.load_state_dict(model.state_dict())
        exact, stock = step(twin, inputs, **kwargs), step(model, inputs, **kwargs)
        before = tally(f"{model.config.model_type}.packing").forward
        with patched(*EVERYTHING):
            fast = step(model, inputs, **kwargs)
        assert tally(f"{model.config.model_type}.packing").forward == before + 1
        for sums, result in ((fast_sum, fast), (stock_sum, stock)):
            for name, value in {"loss": result.loss, **result.grads}.items():
                reference = exact.loss if name == "loss" else exact.grads[name]
                sums[name] = sums.get(name, 0.0) + distance(value, reference) ** 2
    return {name: math.sqrt(fast_sum[name] / stock_sum[name]) for name in fast_sum if stock_sum[name]}


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral 20"])
def test_gpu_fidelity(family):
    ratios = errors(gpu_model(family), packed([50, 1, 77], [128]), seeds=32, use_cache=False)
    ratios.pop("loss")  # a single number: 32 seeds of it prove nothing
    worse = {name: ratio for name, ratio in ratios.items() if not ratio <= 1.1}
    assert not worse, worse


@pytest.mark.gpu
def test_gpu_fp32_has_no_kernel_and_runs_stock():
    model = tiny("llama").cuda()
    inputs = packed([5, 11])
    before = reasons(model).get("attention in float32", 0)
    compare(model, inputs, use_cache=False, fast=False)
    assert reasons(model)["attention in float32"] == before + 1


def waits(model, inputs, **kwargs) -> int:
    """Operations of one step that make the host wait, after a first one that compiles kernels."""
    inputs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    for _ in range(2):
        model(**inputs, **kwargs).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(**inputs, **kwargs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


@pytest.mark.gpu
def test_gpu_host_waits_once_or_not_at_all():
    model = gpu_model("llama")
    with patched(*EVERYTHING):
        assert waits(model, packed([50, 1, 77], [128]), use_cache=False) == 1
        inputs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
            [{"input_ids": list(range(1, n))} for n in (50, 31, 77)]
        )
        assert waits(model, dict(inputs), use_cache=False) == 0


@pytest.mark.gpu
def test_gpu_keywords_are_believed_after_they_were_right():
    model = gpu_model("llama")
    inputs = {k: v.cuda() for k, v in packed([50, 78]).items()}
    wrong = torch.tensor([0, 64, 128], dtype=torch.int32, device="cuda")
    inputs |= {"cu_seq_lens_q": wrong, "cu_seq_lens_k": wrong, "max_length_q": 64, "max_length_k": 64}
    with patched(*EVERYTHING):
        lied = step(model, inputs, use_cache=False)
        for name in packing._KEYWORDS:
            inputs.pop(name)
        assert torch.equal(lied.loss, step(model, inputs, use_cache=False).loss)
