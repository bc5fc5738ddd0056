"""Model shapes of the benchmarks, the cases measured in them, and the model that each implementation trains.

The shapes are those of the published models; nothing is downloaded. `fill_weights` gives every implementation the same
weights, so that their losses can be compared step by step: each value depends on nothing but the parameter's name.
(`quantised.py` has what is special about base weights of four bits.) Importing this file loads no torch, so that the
driver and `report.py` start at once.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import quantised

# told when a part of the set-up is over
Done = Callable[[str], None]

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_RANK = 16
LORA_ALPHA = 32

# mode -> how a title calls it, and what a script of it imports beside transformers
MODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "lora": ("LoRA", ("peft",)),
    "full": ("full fine-tune", ()),
    "qlora": ("QLoRA", ("peft", "bitsandbytes")),
    "gptq": ("LoRA on GPTQ", ("peft", "gptqmodel", "optimum")),
}


@dataclass(frozen=True)
class Shape:
    """What fixes the cost of a training step of one decoder-only model."""

    title: str
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    rope_theta: float = 10000.0
    sliding_window: int | None = None
    experts: int = 0
    experts_per_token: int = 0


SHAPES = {
    # Llama-3.2-1B, Meta-Llama-3-8B, Mistral-7B-v0.1, Mixtral-8x7B-v0.1
    "llama-1b": Shape("Llama-1B", "llama", 2048, 8192, 16, 32, 8, 64, 128256, tied=True, rope_theta=5e5),
    "llama-8b": Shape("Llama-8B", "llama", 4096, 14336, 32, 32, 8, 128, 128256, rope_theta=5e5),
    "mistral-7b": Shape("Mistral-7B", "mistral", 4096, 14336, 32, 32, 8, 128, 32000, sliding_window=4096),
    "mixtral-8x7b": Shape(
        "Mixtral-8x7B", "mixtral", 4096, 14336, 32, 32, 8, 128, 32000, rope_theta=1e6, experts=8, experts_per_token=2
    ),
    # for the smoke tests on a CPU
    "tiny": Shape("Tiny", "llama", 64, 128, 2, 4, 2, 16, 512),
    "tiny-mistral": Shape("Tiny-Mistral", "mistral", 64, 128, 2, 4, 2, 16, 512, sliding_window=12),
}


@dataclass(frozen=True)
class Case:
    """One training set-up; what all arms of a comparison share.

    `packed`: rows of so many documents of one length, 0: rows of one. `padding`: that share of the tokens is padding,
    at the right of rows of several lengths.
    """

    model: str = "llama-8b"
    mode: str = "lora"
    batch: int = 4
    seq: int = 2048
    checkpointing: bool = False
    dropout: float = 0.0
    layers: int | None = None
    dtype: str = "bf16"
    steps: int = 8
    warmup: int = 3
    device: str = "cuda"
    packed: int = 0
    padding: float = 0.0

    def __post_init__(self) -> None:
        if self.packed < 0 or (self.packed and (self.padding or self.seq % self.packed)):
            raise ValueError(f"packed={self.packed}: not without padding, and documents of equal length in {self.seq}")
        left = round(self.batch * self.seq * (1 - self.padding)) - self.seq
        if self.padding and (self.padding < 0 or self.batch < 2 or left < 4 * (self.batch - 1)):
            raise ValueError(f"padding={self.padding}: the longest of {self.batch} rows has none, too little is left")

    def title(self) -> str:
        shape = SHAPES[self.model]
        parts = [f"{shape.title} {MODES[self.mode][0]}, {self.batch}x{self.seq}"]
        if self.packed:
            parts.append(f"{self.packed} documents a row")
        if self.padding:
            parts.append(f"{100 * self.padding:.0f} % padding")
        if self.layers:
            parts.append(f"{self.layers} of {shape.layers} layers")
        parts.append("checkpointing" if self.checkpointing else "no checkpointing")
        if self.dropout:
            parts.append(f"dropout {self.dropout}")
        if self.dtype != "bf16":
            parts.append(self.dtype)
        return ", ".join(parts)


@dataclass(frozen=True)
class Arm:
    """One implementation of a case, and how it is looked at.

    `feed` is the form in which it gets the case's tokens, see `batches.Batches`; `rung` places it on the ladder; `env`
    is added to its process's environment; `cold`: empty Triton and Inductor caches; `profile`: one more step under
    torch.profiler; `host`: host time of forward and backward at 16 tokens.
    """

    impl: str
    label: str = ""
    only: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    recompute: str = "full"
    unsloth_gc: str = "true"
    feed: str = ""
    rung: int | None = None
    env: dict[str, str] = field(default_factory=dict)
    cold: bool = False
    profile: bool = False
    host: bool = False

    def name(self) -> str:
        return self.label or self.impl


def feeds(case: Case) -> tuple[str, ...]:
    """The forms that `batches.Batches` knows of a case."""
    return ("", *(["apart"] if case.packed else []), *(["flat", "full"] if case.padding else []))


def read_plan(path: Path) -> list[tuple[Case, list[Arm]]]:
    """The cases of a plan (`train_step.py` says what it looks like) and what is measured in each.

    Raises:
        ValueError: an arm whose form is none of its case.
    """
    document = json.loads(path.read_text())
    plan = []
    for entry in document["cases"]:
        fields = document.get("defaults", {}) | entry
        arms = [Arm(impl=a) if isinstance(a, str) else Arm(**a) for a in fields.pop("impls")]
        case = Case(**fields)
        for arm in arms:
            if arm.feed not in feeds(case):
                raise ValueError(f"{case.title()}: {arm.name()}: feed {arm.feed!r} is none of {feeds(case)}")
        plan.append((case, arms))
    return plan


def config(name: str, layers: int | None = None) -> Any:
    """The transformers configuration of a shape, with `layers` decoder layers (default: all of the model's)."""
    from transformers import AutoConfig

    shape = SHAPES[name]
    values: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers or shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "max_position_embeddings": 131072,
        "use_cache": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if shape.family != "llama":
        values["sliding_window"] = shape.sliding_window
    if shape.experts:
        values |= {"num_local_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token}
    return AutoConfig.for_model(shape.family, **values)


def build(name: str, *, layers: int | None, dtype: Any, device: str, mode: str = "lora") -> Any:
    """A causal language model of that shape, made directly on `device` (8B parameters in about a second on a GPU).

    `mode` "qlora" or "gptq": the projections are packed, each as it is made; all else has `dtype`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    packed = quantised.packed_linears(mode, LORA_TARGETS) if mode in quantised.MODES else contextlib.nullcontext()
    with torch.device(device), packed:
        model = AutoModelForCausalLM.from_config(config(name, layers), dtype=dtype, attn_implementation="sdpa")
    if mode == "qlora":
        # As from_pretrained leaves it: without this PEFT takes the layers for dense ones.
        model.is_loaded_in_4bit = True
    return model


def add_lora(model: Any, *, dropout: float, device: str) -> Any:
    """`model` with PEFT's LoRA on all seven projections; the adapters are fp32, PEFT's default."""
    import torch
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=dropout,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
    )
    with torch.device(device):
        return get_peft_model(model, lora)


def canonical_name(name: str) -> str:
    """A parameter's name without what PEFT puts round it, so that every implementation agrees on it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")


def fill_weights(model: Any, seed: int = 0) -> None:
    """Overwrites every parameter with random values that depend on `seed` and its canonical name only.

    Matrices N(0, 0.02); norm weights 1 + N(0, 0.1); lora_A N(0, 1/(3K)), the variance of PEFT's own initialisation for
    K inputs; lora_B N(0, 0.005), not zero, so that the gradients of lora_A are exercised from the first step.
    Drawn in fp32 and rounded once to the parameter's dtype. A 4-bit weight of bitsandbytes becomes what that library
    makes of these values in the embedding's dtype; of a GPTQ weight the integers and the scales are drawn.

    Raises:
        ValueError: a 4-bit weight whose layout is not the stock arm's.
    """
    import torch

    def generator(key: str, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(zlib.crc32(key.encode()) + seed)

    dense = model.get_input_embeddings().weight.dtype
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            key, device = canonical_name(name), parameter.device
            state = getattr(parameter, "quant_state", None)
            shape = parameter.shape if state is None else state.shape
            values = torch.randn(shape, generator=generator(key, device), device=device, dtype=torch.float32)
            if "norm" in key:
                values = values.mul_(0.1).add_(1.0)
            elif "lora_A" in key:
                values = values.mul_((3 * parameter.shape[-1]) ** -0.5)
            else:
                values = values.mul_(0.005 if "lora_B" in key else 0.02)
            if state is None:
                parameter.copy_(values)
            else:
                quantised.fill_nf4(key, parameter, values.to(dense))
        for name, module in model.named_modules():
            if quantised.is_gptq(module):
                key = canonical_name(f"{name}.weight")
                quantised.fill_gptq(module, generator(key, module.qweight.device))


def packing_problem(model: Any, case: Case) -> str | None:
    """Why `model`, as an implementation built it, has not the base weights of the case's mode, if it has not."""
    layers = case.layers or SHAPES[case.model].layers
    expected = len(LORA_TARGETS) * layers if case.mode in quantised.MODES else 0
    found = quantised.packed_weights(model)
    return None if found == expected else f"packed weights: expected {expected}, found {found}"


def text_tokens(vocab: int, count: int) -> list[int]:
    """`count` tokens of real text: the words of the standard library's help topics, hashed into the vocabulary.

    Real text because its loss falls: two implementations that agree on it agree on something that moves, and frequent
    words repeat as they do in training data. The text is repeated when it is too short (about 140,000 tokens).
    """
    from pydoc_data.topics import topics

    words = re.findall(r"\w+|[^\w\s]|\n", "\n".join(topics[key] for key in sorted(topics)))
    ids = [zlib.crc32(word.encode()) % vocab for word in words]
    return (ids * (count // len(ids) + 1))[:count]


def checkpoint_tensors(name: str, layers: int | None) -> dict[str, list[int]]:
    """Names and shapes of a dense model's tensors, as they are on disk."""
    shape = SHAPES[name]
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": [shape.vocab, shape.hidden], "model.norm.weight": [shape.hidden]}
    if not shape.tied:
        tensors["lm_head.weight"] = [shape.vocab, shape.hidden]
    layer = {
        "input_layernorm": [shape.hidden],
        "post_attention_layernorm": [shape.hidden],
        "self_attn.q_proj": [queries, shape.hidden],
        "self_attn.k_proj": [keys, shape.hidden],
        "self_attn.v_proj": [keys, shape.hidden],
        "self_attn.o_proj": [shape.hidden, queries],
        "mlp.gate_proj": [shape.intermediate, shape.hidden],
        "mlp.up_proj": [shape.intermediate, shape.hidden],
        "mlp.down_proj": [shape.hidden, shape.intermediate],
    }
    for i in range(layers or shape.layers):
        tensors |= {f"model.layers.{i}.{module}.weight": size for module, size in layer.items()}
    return tensors


def write_hollow_checkpoint(name: str, folder: Path, *, layers: int | None) -> None:
    """A bf16 checkpoint folder in that shape, for libraries that can only load a model from disk.

    The weights file is a real safetensors header followed by a hole: it takes no disk space and no time to write, and
    reads as zeros. `fill_weights` must follow the loading. The tokenizer is a byte-level one with no merges. No model
    is built here: the library may already have replaced transformers' classes.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, size in checkpoint_tensors(name, layers).items():
        start, end = end, end + 2 * math.prod(size)
        header[key] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    cfg = config(name, layers)
    cfg.architectures = [f"{SHAPES[name].family.capitalize()}ForCausalLM"]
    cfg.dtype = torch.bfloat16
    cfg.save_pretrained(folder)

    # ids 1 and 2 are the configuration's bos and eos
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


class Setup(NamedTuple):
    """What an implementation does before it trains: what it needs no GPU for, and the rest.

    `imports` runs while another worker measures. It does what a script of that implementation does before it builds a
    model, and no more: what is first needed in a step has to stay in `first_step_s`.
    """

    imports: Callable[[Case, Arm], None]
    build: Callable[[Case, Arm, Done], Any]


def _import_stock(case: Case, arm: Arm) -> None:
    family = SHAPES[case.model].family
    importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for name in MODES[case.mode][1]:
        importlib.import_module(name)


def _import_fast(case: Case, arm: Arm) -> None:
    import fast_unsloth_patch

    fast_unsloth_patch.apply(only=arm.only, exclude=arm.exclude, recompute=arm.recompute)
    _import_stock(case, arm)


def _import_liger(case: Case, arm: Arm) -> None:
    import liger_kernel.transformers as liger

    getattr(liger, f"apply_liger_kernel_to_{SHAPES[case.model].family}")()
    _import_stock(case, arm)


def _import_unsloth(case: Case, arm: Arm) -> None:
    # It initialises CUDA when imported, and has to be imported before transformers, trl and peft: only what it does
    # not patch can come before.
    for name in ("numpy", "torch", "triton"):
        importlib.import_module(name)


def _build_stock(case: Case, arm: Arm, done: Done) -> Any:
    """The stock model of a case, as a script would make it."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case.dtype]
    model = build(case.model, layers=case.layers, dtype=dtype, device=case.device, mode=case.mode)
    if case.mode != "full":
        model = add_lora(model, dropout=case.dropout, device=case.device)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _build_unsloth(case: Case, arm: Arm, done: Done) -> Any:
    """Unsloth by its public calls. It only loads models from disk, so it is given a checkpoint that is a hole."""
    import torch
    import unsloth

    done("import unsloth")
    folder = Path.cwd() / f"hollow-{case.model}-{case.layers or 'all'}"
    write_hollow_checkpoint(case.model, folder, layers=case.layers)
    done("hollow checkpoint")
    checkpointing: bool | str = case.checkpointing
    if case.checkpointing and arm.unsloth_gc == "unsloth":
        checkpointing = "unsloth"  # its own, which offloads to host memory
    # it cuts longer rows; its padding-free mode makes one row of a batch
    longest = case.seq * (case.batch if arm.feed == "flat" else 1)
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=longest,
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype],
        load_in_4bit=case.mode == "qlora",  # double quantisation is its default
        full_finetuning=case.mode == "full",
        use_gradient_checkpointing=checkpointing,
        local_files_only=True,
    )
    done("load")
    if case.mode != "full":
        model = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=LORA_RANK,
            lora_alpha=LORA_ALPHA,
            lora_dropout=case.dropout,
            target_modules=list(LORA_TARGETS),
            bias="none",
            use_gradient_checkpointing=checkpointing,
            random_state=0,
            max_seq_length=longest,
        )
    return model


SETUPS = {
    "stock": Setup(_import_stock, _build_stock),
    "fast": Setup(_import_fast, _build_stock),
    "liger": Setup(_import_liger, _build_stock),
    "unsloth": Setup(_import_unsloth, _build_unsloth),
}
