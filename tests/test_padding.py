"""Padded batches in training: loss and every gradient are stock's, though padding never reaches a layer."""

from __future__ import annotations

import pytest
import torch
from packed_cases import EVERYTHING, compare, packed, padded, reasons, step, tiny, tokens_seen
from tiny_llama import LAYERS, assert_same, distance, hits, layers_of, llama, lora, patched
from torch import nn
from transformers import DataCollatorForLanguageModeling

from fast_unsloth_patch.status import tally

FAMILIES = ["llama", "mistral None", "mistral 3", "mistral 100"]
SIDES = {
    "left": ([3, 0, 7], [0, 0, 0]),
    "right": ([0, 0, 0], [4, 0, 9]),
    "both": ([2, 5, 0], [3, 1, 8]),
    "one token": ([13, 1], [0, 0]),
    "an empty row": ([14, 2], [0, 3]),
}


# ---- parity


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family, side):
    compare(tiny(family), padded(*SIDES[side]), use_cache=False)


@pytest.mark.parametrize("side", ["left", "both"])
@pytest.mark.parametrize("family", ["llama", "mistral 3"])
def test_the_first_token_is_asked_of_the_padding_before_it(family, side):
    """That is what stock's shift does. Here the labels of the padding are -100 and the first token's is not."""
    model = tiny(family)
    inputs = padded(*SIDES[side])
    new, _ = compare(model, inputs, use_cache=False)
    first = inputs["attention_mask"].argmax(1)
    rows = [row for row in range(3) if first[row]]
    assert all(inputs["labels"][row, first[row]] != -100 for row in rows)
    inputs["labels"][rows, first[rows]] = -100
    other, _ = compare(model, inputs, use_cache=False)
    assert distance(new.loss, other.loss) > 1e-3


def test_biases_reach_the_padding_that_is_asked():
    """Attention gives zeros there, but o_proj adds its bias to them."""
    model = lora(llama(attention_bias=True, mlp_bias=True), lora_bias=True, bias="all")
    compare(model, padded(*SIDES["left"]), use_cache=False)


def test_full_fine_tuning():
    """The padded token that is asked trains its embedding, unless it is the padding index."""
    for index in (0, None):
        inputs = padded(*SIDES["both"])
        compare(llama(pad_token_id=index), inputs, use_cache=False)


def test_padding_reaches_no_layer():
    model = tiny("llama")
    inputs = padded(*SIDES["both"])
    seen = tokens_seen(layers_of(model)[0].mlp)
    compare(model, inputs, use_cache=False)
    # One padded token before each sequence that starts later is asked for its first.
    assert seen == [int(inputs["attention_mask"].sum()) + 2, inputs["attention_mask"].numel()]


def test_hidden_states_come_back_in_their_places():
    model = llama()
    inputs = padded(*SIDES["right"])
    real = inputs["attention_mask"].bool()
    kept = []
    model.model.register_forward_hook(lambda module, args, output: kept.append(output.last_hidden_state.detach()))
    compare(model, inputs, use_cache=False)
    new, old = kept
    assert new.shape == old.shape and not new[~real].any()
    torch.testing.assert_close(new[real], old[real], rtol=1e-5, atol=1e-5)
    with patched(*EVERYTHING):
        logits = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits[real], model(**inputs, use_cache=False).logits[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_masks_of_other_types(dtype):
    inputs = padded(*SIDES["both"])
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    compare(tiny("llama"), inputs, use_cache=False)


def test_given_positions():
    for rows in (1, 3):
        inputs = padded(*SIDES["both"])
        inputs["position_ids"] = (torch.arange(14) * 2 + torch.arange(3)[:, None])[:rows]
        compare(tiny("llama"), inputs, use_cache=False)


def test_gaps():
    """Padding inside a sequence; its neighbours' labels are -100, or it would be asked."""
    inputs = padded([0, 2], [0, 0])
    inputs["attention_mask"][0, 4:6] = 0
    inputs["labels"][0, 4:7] = -100
    compare(tiny("llama"), inputs, use_cache=False)
    compare(tiny("mistral 100"), inputs, use_cache=False)
    model = tiny("mistral 3")
    compare(model, inputs, use_cache=False, fast=False)
    assert reasons(model)["sliding window over gaps"] == 1


def test_inputs_embeds_and_gradient_of_them():
    model = llama()
    inputs = padded(*SIDES["both"])
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    grads = []
    for arm in (True, False):
        leaf = embeds.clone().requires_grad_()
        if arm:
            with patched(*EVERYTHING):
                model(inputs_embeds=leaf, use_cache=False, **inputs).loss.backward()
        else:
            model(inputs_embeds=leaf, use_cache=False, **inputs).loss.backward()
        grads.append(leaf.grad)
    assert distance(*grads) < 1e-5
    compare(model, inputs | {"inputs_embeds": embeds}, use_cache=False)


def test_hooks_on_the_embedding_see_all_tokens():
    """NEFTune's noise depends on the length of what it sees."""
    model = tiny("llama")
    shapes = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: shapes.append(output.shape) or output * 1.5
    )
    compare(model, padded(*SIDES["both"]), use_cache=False)
    assert shapes == [(3, 14, 64)] * 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral 3"])
def test_checkpointing(family, reentrant):
    model = tiny(family)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    name = family.split()[0]
    before = tally(f"{name}.attention").recomputed
    compare(model, padded(*SIDES["both"]))
    assert tally(f"{name}.attention").recomputed == before + LAYERS - 1  # the loss follows the last


def test_gradient_accumulation_and_shifted_labels():
    model = tiny("llama")
    inputs = padded(*SIDES["both"])
    n = torch.tensor(50)
    compare(model, inputs, use_cache=False, num_items_in_batch=n)
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    compare(model, inputs, use_cache=False, num_items_in_batch=n, shift_labels=shifted)


def test_other_ignored_label():
    inputs = padded(*SIDES["both"])
    inputs["labels"][inputs["labels"] == -100] = 5
    compare(tiny("llama"), inputs, use_cache=False, ignore_index=5)


def test_dropout_of_adapters_draws_for_the_tokens():
    """Another draw than stock's, with the same seed in two fast runs the same."""
    model = lora(llama(), lora_dropout=0.3)
    inputs = padded(*SIDES["both"])
    results = []
    with patched(*EVERYTHING):
        for _ in range(2):
            torch.manual_seed(7)
            results.append(step(model, inputs, use_cache=False))
    assert_same(*results, tolerance=0.0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_for_language_modelling(side):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"t{i}": i for i in range(128)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="t1")), pad_token="t0", padding_side=side
    )
    generator = torch.Generator().manual_seed(3)
    examples = [{"input_ids": torch.randint(1, 128, (n,), generator=generator).tolist()} for n in (6, 3, 9)]
    inputs = dict(DataCollatorForLanguageModeling(tokenizer, mlm=False)(examples))
    assert inputs["attention_mask"].sum() == 18
    compare(tiny("mistral 4"), inputs, use_cache=False)


def test_trainer(tmp_path):
    """Trainer turns the configuration's cache off, so its default collator's batches come here."""
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(1, 128, (n,), generator=generator) for n in (6, 3, 9, 12)]
    data = []
    for row in rows:
        ids, labels = nn.functional.pad(row, (0, 12 - len(row))), nn.functional.pad(row, (0, 12 - len(row)), value=-100)
        data.append({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels})

    def train():
        model = tiny("llama")
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
        )
        Trainer(model, args, train_dataset=data).train()
        return {k: v.detach() for k, v in model.state_dict().items() if "lora_" in k}

    before = tally("llama.packing").forward
    with patched(*EVERYTHING):
        fast = train()
    assert tally("llama.packing").forward == before + 2
    stock = train()
    assert tally("llama.packing").forward == before + 2
    far = {k: distance(fast[k], stock[k]) for k in stock if distance(fast[k], stock[k]) > 1e-5}
    assert not far, far


# ---- where stock runs, and why


def test_a_mask_of_ones_is_plain_attention():
    model = tiny("llama")
    before = reasons(model)
    compare(model, padded([0, 0], [0, 0]), use_cache=False, fast=False)
    assert reasons(model) == before


def labels_after_the_sequence(model, inputs):
    inputs["labels"] = inputs["input_ids"].clone()
    return {"use_cache": False}


def default_cache(model, inputs):
    return {}


def asked_hidden_states(model, inputs):
    return {"use_cache": False, "output_hidden_states": True}


def asked_attentions(model, inputs):
    return {"use_cache": False, "output_attentions": True}


def eager(model, inputs):
    model.set_attn_implementation("eager")
    return {"use_cache": False}


def hook_inside(model, inputs):
    layers_of(model)[1].mlp.up_proj.lora_A["default"].register_forward_hook(lambda *args: None)
    return {"use_cache": False}


def hook_on_gradients(model, inputs):
    layers_of(model)[1].register_full_backward_hook(lambda *args: None)
    return {"use_cache": False}


def attention_dropout(model, inputs):
    for layer in layers_of(model):
        layer.self_attn.attention_dropout = 1e-9
    return {"use_cache": False}


def nothing_real(model, inputs):
    inputs["attention_mask"].zero_()
    return {"use_cache": False}


@pytest.mark.parametrize(
    "case, reason",
    [
        (labels_after_the_sequence, "labels on padding"),
        (default_cache, "cache"),
        (asked_hidden_states, "hidden states asked for"),
        (asked_attentions, "attentions asked for"),
        (eager, "attention eager"),
        (hook_inside, "hooks inside a layer"),
        (hook_on_gradients, "hooks inside a layer"),
        (attention_dropout, "attention dropout"),
        (nothing_real, "nothing but padding"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_stock_runs(case, reason):
    model = tiny("llama")
    inputs = padded(*SIDES["both"])
    kwargs = case(model, inputs)
    before = reasons(model).get(reason, 0)
    new, old = compare(model, inputs, fast=False, **kwargs)
    assert reasons(model)[reason] == before + 1
    assert new.output.keys() == old.output.keys()


def test_labels_on_the_left_padding_are_asked_too():
    """labels = input_ids.clone(): padding sees nothing there, so each of its tokens stays for itself."""
    inputs = padded(*SIDES["left"])
    inputs["labels"] = inputs["input_ids"].clone()
    compare(tiny("llama"), inputs, use_cache=False)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rotary_scaling_by_length(rope):
    parameters = {"rope_type": rope, "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 8}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = lora(llama(rope_parameters=parameters))
    compare(model, padded([0, 0], [4, 7]), use_cache=False, fast=False)
    assert reasons(model)["rotary scaling by length"] >= 1
    compare(model, packed([5, 11]), use_cache=False)


def test_without_labels_and_in_evaluation():
    """Only the loss says which rows are looked at."""
    model = tiny("llama")
    inputs = padded(*SIDES["both"])
    before = tally("llama.packing").forward, reasons(model)
    with patched(*EVERYTHING):
        new = model(inputs["input_ids"], inputs["attention_mask"], use_cache=False).logits
        with torch.no_grad():
            loss = model.eval()(**inputs, use_cache=False).loss
    assert (tally("llama.packing").forward, reasons(model)) == before
    assert distance(loss, model(**inputs, use_cache=False).loss) < 1e-5
    assert distance(new, model.train()(inputs["input_ids"], inputs["attention_mask"], use_cache=False).logits) < 1e-5


def test_without_the_packing_patch():
    model = tiny("llama")
    inputs = padded(*SIDES["both"])
    before = hits()["llama.loss"]
    with patched(*(name for name in EVERYTHING if name != "llama.packing")):
        new = step(model, inputs, use_cache=False)
    assert hits()["llama.loss"] == before + 1
    assert_same(new, step(model, inputs, use_cache=False))


def test_bad_masks_are_stocks_error():
    model = tiny("llama")
    inputs = padded(*SIDES["both"]) | {"attention_mask": torch.ones(2, 14, dtype=torch.int64).tril()}
    with pytest.raises(Exception) as stock:
        step(model, inputs, use_cache=False)
    with patched(*EVERYTHING), pytest.raises(stock.type):
        step(model, inputs, use_cache=False)


# ---- fall-backs inside the layers


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("family", ["llama", "mistral 3"])
def test_layers_that_run_stock_get_their_padding_back(family, reentrant):
    """DoRA on one projection: this attention runs stock, with the mask and the shape that stock gives it."""
    model = tiny(family)
    name = family.split()[0]
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1], use_dora=True))
    model.base_model.set_adapter(["default", "other"])
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = hits()[f"{name}.attention"]
    inputs = padded(*SIDES["both"])
    counts = tally(f"{name}.packing").forward
    with patched(*EVERYTHING):
        new = step(model, inputs, use_cache=False)
    assert tally(f"{name}.packing").forward == counts + 1
    assert hits()[f"{name}.attention"] == before + (LAYERS - 1) * (1 if reentrant is None else 2)
    assert_same(new, step(model, inputs, use_cache=False))


# ---- the host waits once


def test_padding_is_looked_for_once_a_step(monkeypatch):
    model = tiny("llama")
    copies = []
    stock_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *args: copies.append(self.dtype) or stock_cpu(self, *args))
    with patched(*EVERYTHING):
        step(model, padded(*SIDES["both"]), use_cache=False)
    assert copies == [torch.uint8]


# ---- the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral 20"])
def test_gpu_fidelity(family, side):
    """With padding on the left also: stock's attention gives zeros to tokens that see nothing."""
    from test_packing import errors, gpu_model

    ends = ([40, 0, 100], [0, 0, 0])
    inputs = padded(*(ends if side == "left" else ends[::-1]), length=128)
    ratios = errors(gpu_model(family), inputs, seeds=32, use_cache=False)
    ratios.pop("loss")
    worse = {name: ratio for name, ratio in ratios.items() if not ratio <= 1.1}
    assert not worse, worse


@pytest.mark.gpu
def test_gpu_host_waits_once():
    from test_packing import gpu_model, waits

    model = gpu_model("llama")
    with patched(*EVERYTHING):
        assert waits(model, padded([40, 0, 100], [0, 30, 0], length=128), use_cache=False) == 1
