"""Mixtral's experts in four bits: quantised while loading, in stock code, under PEFT, saved and reloaded."""

from __future__ import annotations

import copy
import gc
import json
import os
import re
import weakref
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from conftest import run_python
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

import fast_unsloth_patch
from fast_unsloth_patch import quantize, registry
from fast_unsloth_patch.errors import FastPatchError, FastPatchWarning, PatchUnavailableError
from fast_unsloth_patch.patches import quantize_experts as patch
from fast_unsloth_patch.status import tally
from fast_unsloth_patch.weights import WeightLayoutError
from fast_unsloth_patch.weights.nf4_experts import Nf4Experts

functional = pytest.importorskip("bitsandbytes.functional")

# bitsandbytes' own dequantisation on a CPU (0.50.2) is wrong where a row is no multiple of a block.
LAYERS, EXPERTS, HIDDEN, WIDE = 2, 4, 64, 128
BF16, FP32 = torch.bfloat16, torch.float32
STACKS = [(layer, name) for layer in range(LAYERS) for name in ("gate_up_proj", "down_proj")]
METHODS = tuple(row.target.partition(".")[2] for row in registry.PATCHES if row.id.startswith("experts4bit."))


@pytest.fixture(autouse=True)
def _nothing_asked_for(monkeypatch):
    monkeypatch.setattr(quantize, "_asked", None)
    monkeypatch.delenv(quantize.VARIABLE, raising=False)
    yield
    fast_unsloth_patch.unapply()


@pytest.fixture
def applied():
    fast_unsloth_patch.apply(only="experts4bit")
    quantize.quantize_experts()


@contextmanager
def stock():
    """The methods as transformers has them."""
    fast_unsloth_patch.unapply()
    yield
    fast_unsloth_patch.apply(only="experts4bit")


def config(**options) -> MixtralConfig:
    return MixtralConfig(
        **{
            "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 128, "num_local_experts": EXPERTS, "max_position_embeddings": 64,
            **options,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A Mixtral in bfloat16, as transformers saves it: experts one by one, in several files."""
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    model = MixtralForCausalLM(config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.7 / parameter.shape[-1] ** 0.5)
    model.to(BF16).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 5
    return folder


@pytest.fixture(scope="module")
def weights(saved) -> dict[tuple[int, str], torch.Tensor]:
    """The stacks in full."""
    model = MixtralForCausalLM.from_pretrained(saved, dtype=BF16)
    return {key: stack_of(model, *key).detach() for key in STACKS}


def bnb(**options) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_compute_dtype": BF16, **options})


NESTED = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def load(folder, dtype=BF16, loader=MixtralForCausalLM, **options):
    return loader.from_pretrained(folder, quantization_config=bnb(**{**NESTED, **options}), dtype=dtype)


def stack_of(model, layer: int, name: str):
    return getattr(model.model.layers[layer].mlp.experts, name)


def dense_twin(model):
    """A copy whose experts are the values of the packed ones, in full."""
    twin = copy.deepcopy(model)
    for layer, name in STACKS:
        experts = twin.model.layers[layer].mlp.experts
        setattr(experts, name, nn.Parameter(getattr(experts, name).dequantize(), requires_grad=False))
    return twin


def expected(weight: torch.Tensor, quant_type: str, double: bool) -> torch.Tensor:
    """What bitsandbytes makes of each expert's matrix by itself."""
    options = {"blocksize": 64, "compress_statistics": double, "quant_type": quant_type}
    return torch.stack([functional.dequantize_4bit(*functional.quantize_4bit(one, **options)) for one in weight])


def batch(rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids.clone()}


def assert_packed(model, packed: bool = True) -> None:
    assert {isinstance(stack_of(model, *key), Nf4Experts) for key in STACKS} == {packed}


# (quant type, double quantisation, storage, dtype)
OPTIONS = [
    ("nf4", True, torch.uint8, BF16),
    ("nf4", False, torch.uint8, BF16),
    ("fp4", True, torch.uint8, BF16),
    ("fp4", False, BF16, torch.float16),
    ("nf4", True, BF16, FP32),
]


@pytest.mark.parametrize(("quant_type", "double", "storage", "dtype"), OPTIONS, ids=str)
def test_to_the_bit_as_bitsandbytes(applied, saved, weights, quant_type, double, storage, dtype):
    model = load(
        saved, dtype, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double, bnb_4bit_quant_storage=storage
    )
    for key in STACKS:
        stack = stack_of(model, *key)
        assert type(stack) is Nf4Experts and isinstance(stack, nn.Parameter) and not stack.requires_grad
        assert stack.dtype is stack.stored_dtype is dtype and stack.quant_type == quant_type
        assert (stack.absmax2 is not None) is double
        assert torch.equal(stack.dequantize(), expected(weights[key].to(dtype), quant_type, double))
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert tally("experts4bit.quantize").forward == len(STACKS)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_forward_and_gradient_of_stock_code(applied, saved, implementation):
    model = load(saved)
    twin = dense_twin(model)
    for each in (model, twin):
        each.set_experts_implementation(implementation)
    results = []
    for each in (model, twin):
        inputs = each.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
        output = each(inputs_embeds=inputs, labels=batch()["labels"], output_router_logits=True)
        output.loss.backward()
        results.append((output.loss, output.logits, inputs.grad, *output.router_logits))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert_packed(model)
    assert results[0][2].abs().max() > 0


def test_without_the_flag_everything_is_stock(saved, weights, capsys):
    fast_unsloth_patch.apply(only="experts4bit")
    model = load(saved)
    assert_packed(model, False)
    assert all(torch.equal(stack_of(model, *key), weights[key]) for key in STACKS)
    assert "fast_unsloth_patch: " not in capsys.readouterr().err
    assert "get_weight_conversions" not in vars(model.hf_quantizer) and tally("experts4bit.quantize").forward == 0


def test_the_line(applied, saved, capsys, monkeypatch):
    load(saved)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fast_unsloth_patch: ")]
    assert len(lines) == 1
    assert re.search(
        rf"quantised the experts of {LAYERS} layers in nf4, double quantisation: 0\.00 GiB instead of 0\.00 GiB in bfl",
        lines[0],
    )
    monkeypatch.setattr(patch, "_UNIT", 2**10)
    model = load(saved)
    full = LAYERS * EXPERTS * 3 * HIDDEN * WIDE * 2
    packed = sum(stack_of(model, *key).nbytes for key in STACKS)
    assert full / 4 < packed < full / 3
    assert f": {packed / 1024:.2f} GiB instead of {full / 1024:.2f} GiB in bfloat16" in capsys.readouterr().err
    monkeypatch.setenv("FAST_UNSLOTH_LOG", "0")
    load(saved)
    assert "fast_unsloth_patch: " not in capsys.readouterr().err


def live_bytes(dtype: torch.dtype, at_least: int) -> int:
    """What is held in tensors of ``dtype`` of at least so many values, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.dtype is dtype and thing.numel() >= at_least:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes() if thing.device.type == "cpu" else 0
    return sum(storages.values())


def test_one_stack_at_a_time_is_there_in_full(applied, saved, monkeypatch):
    """When a stack is quantised no expert is there in full but its own; nor when all are loaded."""
    one = HIDDEN * WIDE  # values of the smallest matrix of an expert; larger than any other parameter of a layer
    seen, alive = [], []
    stock_op = patch.quantize

    def spy(values, quantization_config):
        gc.collect()
        seen.append((tuple(values.shape), live_bytes(BF16, one)))
        assert [reference() for reference in alive] == [None] * len(alive)
        alive.append(weakref.ref(values))
        return stock_op(values, quantization_config)

    monkeypatch.setattr(patch, "quantize", spy)
    gc.collect()
    before = live_bytes(BF16, one)
    model = load(saved)
    sizes = {(EXPERTS, 2 * WIDE, HIDDEN): 2 * EXPERTS * 2 * one, (EXPERTS, HIDDEN, WIDE): 2 * EXPERTS * one}
    assert sorted(shape for shape, _ in seen) == sorted([*sizes] * LAYERS)
    for shape, size in seen:
        # Embeddings and head are in full too.
        assert size - before <= sizes[shape] + 2 * 128 * HIDDEN * 2
    gc.collect()
    assert live_bytes(BF16, one) - before <= 2 * 128 * HIDDEN * 2
    assert_packed(model)


def test_skipped_modules(applied, saved, weights, capsys):
    model = load(saved, llm_int8_skip_modules=["lm_head", "model.layers.0.mlp", "down_proj"])
    packed = {key: isinstance(stack_of(model, *key), Nf4Experts) for key in STACKS}
    assert packed == {key: key == (1, "gate_up_proj") for key in STACKS}
    assert all(torch.equal(stack_of(model, *key), weights[key]) for key in STACKS if not packed[key])
    assert "the experts of 1 layers" in capsys.readouterr().err


def test_saved_and_reloaded_in_part(applied, saved, tmp_path):
    model = load(saved, llm_int8_skip_modules=["lm_head", "model.layers.0.mlp"])
    model.save_pretrained(tmp_path)
    again = MixtralForCausalLM.from_pretrained(tmp_path)
    for key in STACKS:
        assert type(stack_of(again, *key)) is type(stack_of(model, *key))
        assert torch.equal(stack_of(again, *key) + 0, stack_of(model, *key) + 0)
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)


def test_experts_that_are_no_multiple_of_a_block(applied, tmp_path):
    MixtralForCausalLM(config(intermediate_size=7, hidden_size=36)).to(BF16).save_pretrained(tmp_path)
    with pytest.warns(
        FastPatchWarning, match=r"no multiple|not a multiple of 64 values: model\.layers\.0.*\(14 x 36\)"
    ):
        model = load(tmp_path, llm_int8_skip_modules=["self_attn", "lm_head"])
    assert_packed(model, False)


def test_a_model_without_experts(applied, tmp_path):
    LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    ).to(BF16).save_pretrained(tmp_path)
    model = load(tmp_path, loader=LlamaForCausalLM)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert tally("experts4bit.quantize").forward == 0


# Saving and reloading.


def stored(folder) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of each tensor of a checkpoint."""
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            for key in list(reader.keys()):
                found[key] = reader.get_slice(key).get_dtype(), reader.get_slice(key).get_shape()
    return found


@pytest.mark.parametrize("shards", ["60KB", "5GB"])
@pytest.mark.parametrize("flag", [True, False], ids=["flag", "by itself"])
@pytest.mark.parametrize(
    "options", [NESTED, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}], ids=str
)
def test_saved_and_reloaded(applied, saved, tmp_path, capsys, options, flag, shards):
    model = load(saved, **options)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    tensors = {key: value for key, value in stored(tmp_path).items() if "experts" in key}
    quant_type, nested = options["bnb_4bit_quant_type"], options["bnb_4bit_use_double_quant"]
    suffixes = ["", ".absmax", ".quant_map", f".quant_state.bitsandbytes__{quant_type}"]
    suffixes += [".nested_absmax", ".nested_quant_map"] if nested else []
    prefix = {key.partition("experts")[0] for key in tensors}
    names = {f"{name}{suffix}" for _, name in STACKS for suffix in suffixes}
    assert {key.partition("experts.")[2] for key in tensors} == names and len(prefix) == LAYERS
    full = LAYERS * EXPERTS * 3 * HIDDEN * WIDE
    assert sum(shape[0] for key, (_, shape) in tensors.items() if key.endswith("_proj")) == full // 2
    assert {dtype for key, (dtype, _) in tensors.items() if key.endswith("_proj")} == {"U8"}
    quantize.quantize_experts(flag)
    capsys.readouterr()
    again = MixtralForCausalLM.from_pretrained(tmp_path)
    assert f"loaded the experts of {LAYERS} layers in {quant_type}" in capsys.readouterr().err
    for key in STACKS:
        a, b = stack_of(model, *key), stack_of(again, *key)
        assert type(b) is Nf4Experts and a.dtype is b.dtype and a.stored_dtype is b.stored_dtype
        for mine, other in zip(a.parts, b.parts):
            assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)
    again.save_pretrained(tmp_path / "again")
    third = MixtralForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(third(**batch()).logits, model(**batch()).logits)


def test_saved_in_the_layout_of_the_modules(applied, saved, tmp_path):
    model = load(saved)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.1.mlp.experts.down_proj.absmax" in stored(tmp_path)
    assert torch.equal(MixtralForCausalLM.from_pretrained(tmp_path)(**batch()).logits, model(**batch()).logits)


def test_stacks_in_the_checkpoint(applied, saved, weights, tmp_path):
    """A checkpoint that has the experts' stacks, not the experts."""
    MixtralForCausalLM.from_pretrained(saved, dtype=BF16).save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in stored(tmp_path)
    model = load(tmp_path)
    for key in STACKS:
        assert torch.equal(stack_of(model, *key).dequantize(), expected(weights[key], "nf4", True))


def test_reloaded_in_another_dtype(applied, saved, tmp_path):
    model = load(saved)
    model.save_pretrained(tmp_path)
    again = MixtralForCausalLM.from_pretrained(tmp_path, dtype=FP32)
    stack = stack_of(again, 0, "gate_up_proj")
    assert stack.dtype is FP32 and stack.stored_dtype is BF16
    assert torch.equal(stack.dequantize(), stack_of(model, 0, "gate_up_proj").dequantize().float())
    # The experts alone: 5.17 leaves the router, whose name is another on disk, in the checkpoint's dtype.
    token, twin = torch.randn(5, HIDDEN), dense_twin(again)
    chosen = torch.randint(0, EXPERTS, (5, 2)), torch.rand(5, 2)
    mine, other = (each.model.layers[0].mlp.experts(token, *chosen) for each in (again, twin))
    assert mine.dtype is FP32 and torch.equal(mine, other)


def test_without_the_patches_such_a_checkpoint_is_refused(applied, saved, tmp_path):
    """By transformers 5.24 while it is loaded; by older ones in the first forward, for the shapes do not fit."""
    load(saved).save_pretrained(tmp_path)
    with stock(), pytest.raises((RuntimeError, ValueError, IndexError)):
        MixtralForCausalLM.from_pretrained(tmp_path)(**batch())


def drop(tensors, key):
    del tensors[key]


def halve(tensors, key):
    tensors[key] = tensors[key][::2].contiguous()


def reshaped(tensors, key):
    settings = json.loads(bytes(tensors[key].tolist()))
    settings["shape"] = [EXPERTS, HIDDEN, WIDE]
    tensors[key] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


BROKEN = {
    "no absmax": (drop, "absmax", r"gate_up_proj\.absmax: expected 1024 elements, found no such tensor"),
    "no nested absmax": (
        drop,
        "nested_absmax",
        r"gate_up_proj\.nested_absmax: expected 4 elements, found no such tensor",
    ),
    "no settings": (
        drop,
        "quant_state.bitsandbytes__nf4",
        r"gate_up_proj\.quant_state.*expected the settings .*, found no such",
    ),
    "no values": (drop, "", r"gate_up_proj: expected 32768 elements, found no such tensor"),
    "half of it": (halve, "", r"gate_up_proj: expected 32768 elements for \[4, 256, 64\], found 16384"),
    "other shape": (
        reshaped,
        "quant_state.bitsandbytes__nf4",
        r"gate_up_proj: expected \[4, 256, 64\], found \[4, 64, 128\]",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_does_not_fit(applied, saved, tmp_path, name):
    load(saved).save_pretrained(tmp_path)
    change, suffix, message = BROKEN[name]
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if re.search(r"layers\.1\..*gate_up_proj$", key.partition(".absmax")[0]))
    change(tensors, f"{key}.{suffix}".rstrip("."))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        WeightLayoutError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj.*" + message[message.find("expected") :]
    ):
        MixtralForCausalLM.from_pretrained(tmp_path)


def test_a_quantised_checkpoint_whose_experts_are_not(applied, saved, tmp_path, weights):
    quantize.quantize_experts(False)
    load(saved).save_pretrained(tmp_path)
    model = MixtralForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(stack_of(model, *key), weights[key]) for key in STACKS)
    quantize.quantize_experts()
    with pytest.raises(FastPatchError, match="quantised already, its experts are not"):
        MixtralForCausalLM.from_pretrained(tmp_path)


def test_a_state_dict(applied, saved):
    model, other = load(saved), load(saved, bnb_4bit_quant_type="nf4")
    with torch.no_grad():
        for key in STACKS:
            stack_of(other, *key).packed.zero_()
    state = {key: value.clone() for key, value in model.state_dict().items() if "experts" in key}
    assert all(type(value) is torch.Tensor for value in state.values())
    report = other.load_state_dict(state, strict=False)
    assert not [key for key in (*report.missing_keys, *report.unexpected_keys) if "experts" in key]
    assert all(torch.equal(stack_of(other, *key) + 0, stack_of(model, *key) + 0) for key in STACKS)


def test_dequantized(applied, saved, tmp_path):
    model = load(saved)
    values = {key: stack_of(model, *key).dequantize() for key in STACKS}
    model = model.dequantize()
    assert_packed(model, False)
    assert all(torch.equal(stack_of(model, *key), values[key]) for key in STACKS)
    model.save_pretrained(tmp_path)
    again = MixtralForCausalLM.from_pretrained(tmp_path, dtype=BF16)
    assert all(torch.equal(stack_of(again, *key), values[key]) for key in STACKS)


# PEFT.

TARGETS = {
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "both": {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}


def adapted(model, **targets):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **targets))


def gradients(model):
    model.zero_grad(set_to_none=True)
    loss = model(**batch()).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_lora_of_stock_peft(applied, saved, name, checkpointing):
    model = prepare_model_for_kbit_training(load(saved), use_gradient_checkpointing=checkpointing)
    assert_packed(model)
    twin = dense_twin(model)
    model, twin = (adapted(each, **TARGETS[name]).train() for each in (model, twin))
    for _ in range(2):
        fast, dense = gradients(model), gradients(twin)
        assert fast.keys() == dense.keys() and len(fast) > LAYERS
        assert all(torch.equal(fast[key], dense[key]) and fast[key].abs().sum() > 0 for key in fast)
        for each in (model, twin):
            torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1).step()
    assert_packed(model.get_base_model()) if name == "attention" else None


def test_adapters_are_saved_as_ever(applied, saved, tmp_path):
    model = adapted(load(saved), **TARGETS["experts"]).eval()
    model.save_pretrained(tmp_path)
    twin = PeftModel.from_pretrained(dense_twin(load(saved)), tmp_path).eval()
    with torch.no_grad():
        logits = model(**batch()).logits
        assert torch.equal(logits, twin(**batch()).logits)
        assert torch.equal(logits, PeftModel.from_pretrained(load(saved), tmp_path).eval()(**batch()).logits)
        with model.disable_adapter():
            assert not torch.equal(logits, model(**batch()).logits)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert keys and all("lora_" in key for key in keys)


def test_prepared_for_kbit_training(applied, saved):
    model = prepare_model_for_kbit_training(load(saved))
    assert_packed(model)
    assert {stack_of(model, *key).dtype for key in STACKS} == {BF16}
    assert model.model.norm.weight.dtype is model.lm_head.weight.dtype is FP32
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_numbers_of_parameters_and_bytes(applied, saved, capsys):
    full = MixtralForCausalLM.from_pretrained(saved, dtype=BF16)
    model = load(saved)
    assert model.num_parameters() == full.num_parameters()
    experts = LAYERS * EXPERTS * 3 * HIDDEN * WIDE
    rest = sum(p.nbytes for n, p in model.named_parameters() if "experts" not in n)
    assert model.get_memory_footprint(return_buffers=False) == rest + experts // 2
    peft = adapted(model, **TARGETS["experts"])
    trainable, total = peft.get_nb_trainable_parameters()
    assert total == full.num_parameters() + trainable and type(total) is int
    capsys.readouterr()
    peft.print_trainable_parameters()
    assert f"all params: {total:,d}" in capsys.readouterr().out


def test_merging_is_refused(applied, saved):
    model = adapted(load(saved), **TARGETS["experts"])
    with pytest.raises(RuntimeError, match=r"weights of four bits cannot be changed; to merge an adapter"):
        model.merge_and_unload()


def test_copies_and_moves(applied, saved):
    model = load(saved)
    logits = model(**batch()).logits
    twin = copy.deepcopy(model).to("cpu")
    assert_packed(twin)
    assert torch.equal(twin(**batch()).logits, logits)
    assert stack_of(twin, 0, "down_proj").identity() != stack_of(model, 0, "down_proj").identity()


# The flag.


def test_the_patches_must_be_applied():
    with pytest.raises(PatchUnavailableError, match=r"call fast_unsloth_patch\.apply\(\) first"):
        quantize.quantize_experts()
    assert not quantize.wanted()
    fast_unsloth_patch.apply(only="experts4bit")
    quantize.quantize_experts()
    assert quantize.wanted()
    quantize.quantize_experts(False)
    assert not quantize.wanted()
    fast_unsloth_patch.apply(only="llama")
    with pytest.raises(PatchUnavailableError, match=r"experts4bit\.before: not in only"):
        quantize.quantize_experts()
    fast_unsloth_patch.apply(only="experts4bit")
    fast_unsloth_patch.unapply()
    with pytest.raises(PatchUnavailableError, match="reverted"):
        quantize.quantize_experts()


def test_kill_switch(monkeypatch):
    monkeypatch.setenv("FAST_UNSLOTH", "0")
    with pytest.warns(FastPatchWarning, match="not quantised, because FAST_UNSLOTH=0"):
        quantize.quantize_experts()
    assert not quantize.wanted()


@pytest.mark.parametrize(("value", "on"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_variable(monkeypatch, saved, value, on):
    fast_unsloth_patch.apply(only="experts4bit")
    monkeypatch.setenv(quantize.VARIABLE, value)
    assert quantize.wanted() is on
    assert_packed(load(saved), on)
    quantize.quantize_experts(not on)
    assert quantize.wanted() is not on


def test_a_variable_that_means_nothing(monkeypatch):
    monkeypatch.setenv(quantize.VARIABLE, "banana")
    with pytest.warns(FastPatchWarning, match="FAST_UNSLOTH_QUANTIZE_EXPERTS=banana is ignored"):
        assert not quantize.wanted()


def test_light_to_import():
    code = """
import sys
import fast_unsloth_patch.quantize as q
q.wanted()
print([name for name in ("torch", "transformers", "bitsandbytes", "wrapt") if name in sys.modules])
"""
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_unapply_puts_back_the_methods():
    before = {method: vars(Bnb4BitHfQuantizer)[method] for method in METHODS}
    fast_unsloth_patch.apply(only="experts4bit")
    assert all(vars(Bnb4BitHfQuantizer)[method] is not before[method] for method in before)
    fast_unsloth_patch.unapply()
    assert all(vars(Bnb4BitHfQuantizer)[method] is before[method] for method in before)
