"""Model shapes of the benchmarks, the cases measured in them, and the model that each implementation trains.

The shapes are those of the published models; nothing is downloaded. `fill_weights` gives every implementation the same
weights, so that their losses can be compared step by step: each value depends on nothing but the parameter's name.
(`quantised.py` has what is special about base weights of four bits, `experts.py` about mixtures of experts, `setups.py`
how each implementation is told to build its model.) Importing this file loads no torch, so that the driver and
`report.py` start at once.
"""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import experts
import quantised

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA_TARGETS = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")
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
    "tiny-mixtral": Shape(
        "Tiny-Mixtral", "mixtral", 64, 128, 2, 4, 2, 16, 512, rope_theta=1e6, experts=4, experts_per_token=2
    ),
}


@dataclass(frozen=True)
class Case:
    """One training set-up; what all arms of a comparison share.

    `packed`: rows of so many documents of one length, 0: rows of one. `padding`: that share of the tokens is padding,
    at the right of rows of several lengths. Of mixtures of experts, `expert_lora`: LoRA on the experts too, else on
    attention alone; `routing`: see `experts.py`. `rounded`: of what QLoRA packs, the values that it makes of them,
    unpacked; so that both can be held against each other.
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
    expert_lora: bool = True
    routing: str = "text"
    rounded: bool = False

    def __post_init__(self) -> None:
        if problem := self._problem_of_experts():
            raise ValueError(problem)
        if self.rounded and self.mode != "lora":
            raise ValueError(f"rounded: the weights of LoRA can be those of QLoRA, not the weights of mode {self.mode}")
        if self.packed < 0 or (self.packed and (self.padding or self.seq % self.packed)):
            raise ValueError(f"packed={self.packed}: not without padding, and documents of equal length in {self.seq}")
        left = round(self.batch * self.seq * (1 - self.padding)) - self.seq
        if self.padding and (self.padding < 0 or self.batch < 2 or left < 4 * (self.batch - 1)):
            raise ValueError(f"padding={self.padding}: the longest of {self.batch} rows has none, too little is left")

    def _problem_of_experts(self) -> str | None:
        if self.routing not in experts.ROUTINGS:
            return f"routing={self.routing!r} is none of {experts.ROUTINGS}"
        if not SHAPES[self.model].experts:
            plain = self.expert_lora and self.routing == "text"
            return None if plain else f"{self.model} has no experts: neither their LoRA nor their routing can be chosen"
        if self.mode == "gptq":
            return f"mode gptq: nothing here makes {self.model} with GPTQ's experts"
        if self.expert_lora and self.dropout and self.mode != "full":
            return f"dropout={self.dropout}: PEFT has none for LoRA on experts"
        return None

    def title(self) -> str:
        shape = SHAPES[self.model]
        on = ""
        if shape.experts and self.mode != "full":
            on = " on attention and experts" if self.expert_lora else " on attention"
        parts = [f"{shape.title} {MODES[self.mode][0]}{on}, {self.batch}x{self.seq}"]
        if self.packed:
            parts.append(f"{self.packed} documents a row")
        if self.padding:
            parts.append(f"{100 * self.padding:.0f} % padding")
        if self.layers:
            parts.append(f"{self.layers} of {shape.layers} layers")
        parts.append("checkpointing" if self.checkpointing else "no checkpointing")
        if self.routing != "text":
            parts.append(f"{self.routing} routing")
        if self.rounded:
            parts.append("weights rounded to NF4")
        if self.dropout:
            parts.append(f"dropout {self.dropout}")
        if self.dtype != "bf16":
            parts.append(self.dtype)
        return ", ".join(parts)


@dataclass(frozen=True)
class Arm:
    """One implementation of a case, and how it is looked at.

    `feed` is the form in which it gets the case's tokens, see `batches.Batches`; `rung` places it on the ladder; `env`
    is added to its process's environment; `liger_moe`: with Liger's own mixture of experts, which tunes itself for
    minutes; `cold`: empty Triton and Inductor caches; `profile`: one more step under torch.profiler; `host`: host time
    of forward and backward at 16 tokens.
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
    liger_moe: bool = False
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

    packed = quantised.packed_layers(mode, LORA_TARGETS) if mode in quantised.MODES else contextlib.nullcontext()
    with torch.device(device), packed:
        model = AutoModelForCausalLM.from_config(config(name, layers), dtype=dtype, attn_implementation="sdpa")
    if mode == "qlora":
        # As from_pretrained leaves it: without this PEFT takes the layers for dense ones.
        model.is_loaded_in_4bit = True
    return model


def add_lora(model: Any, *, dropout: float, device: str, expert_lora: bool = True) -> Any:
    """`model` with PEFT's LoRA on all seven projections; the adapters are fp32, PEFT's default.

    Of a mixture of experts: on the four of attention, and with `expert_lora` on the stacks of its experts' weights.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    moe = hasattr(model.config, "num_local_experts")
    lora = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=dropout,
        target_modules=list(ATTENTION_TARGETS if moe else LORA_TARGETS),
        target_parameters=list(experts.TARGET_PARAMETERS) if moe and expert_lora else None,
        task_type="CAUSAL_LM",
    )
    with torch.device(device):
        return get_peft_model(model, lora)


def canonical_name(name: str) -> str:
    """A parameter's name without what PEFT puts round it, so that every implementation agrees on it."""
    name = re.sub(r"(\.base_layer)+\.", ".", name.removeprefix("base_model.model."))
    return name.replace(".default.", ".")


def named_parameters(model: Any) -> list[tuple[str, Any]]:
    """The parameters by their canonical names; an adapter of stacked weights has the name of the stack in its own."""
    wrapped = experts.wrapped_stacks(model)
    found = []
    for name, parameter in model.named_parameters():
        module, adapter, rest = name.partition(".lora_")
        found.append((canonical_name(wrapped.get(module, module) + adapter + rest), parameter))
    return found


def fill_weights(model: Any, seed: int = 0, *, rounded: bool = False, trained: bool = False) -> None:
    """Overwrites every parameter with random values that depend on `seed` and its canonical name only.

    Matrices N(0, 0.02); norm weights 1 + N(0, 0.1); lora_A N(0, 1/(3K)), the variance of PEFT's own initialisation for
    K inputs; lora_B N(0, 0.005), not zero, so that the gradients of lora_A are exercised from the first step.
    Drawn in fp32 and rounded once to the parameter's dtype, stacked weights one expert at a time. A 4-bit weight of
    bitsandbytes becomes what that library makes of these values in the embedding's dtype; of a GPTQ weight the integers
    and the scales are drawn.

    Args:
        rounded: see `Case`.
        trained: what is trained only; the rest stays.

    Raises:
        ValueError: a 4-bit weight whose layout is not the stock arm's.
    """
    import torch

    def generator(key: str, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(zlib.crc32(key.encode()) + seed)

    def values(key: str, size: Any, device: torch.device) -> torch.Tensor:
        drawn = torch.randn(size, generator=generator(key, device), device=device, dtype=torch.float32)
        if "norm" in key:
            return drawn.mul_(0.1).add_(1.0)
        if "lora_A" in key:
            return drawn.mul_((3 * size[-1]) ** -0.5)
        return drawn.mul_(0.005 if "lora_B" in key else 0.02)

    dense = model.get_input_embeddings().weight.dtype
    with torch.no_grad():
        for key, parameter in named_parameters(model):
            if trained and not parameter.requires_grad:
                continue
            device, state = parameter.device, getattr(parameter, "quant_state", None)
            if state is not None:
                quantised.fill_nf4(key, parameter, values(key, state.shape, device).to(dense))
                continue
            count, *size = parameter.shape if parameter.dim() == 3 else (0, *parameter.shape)
            keys = [f"{key}.{expert}" for expert in range(count)] or [key]
            matrices = (values(k, torch.Size(size), device).to(dense if count else torch.float32) for k in keys)
            if quantised.is_stack(parameter):
                quantised.fill_stack(parameter, matrices)
                continue
            for part, matrix in zip(parameter if count else [parameter], matrices):
                part.copy_(matrix)
                if rounded and quantised.is_packed_by_qlora(key, LORA_TARGETS):
                    part.copy_(quantised.nf4_values(part))
        for name, module in model.named_modules():
            if quantised.is_gptq(module) and not trained:
                key = canonical_name(f"{name}.weight")
                quantised.fill_gptq(module, generator(key, module.qweight.device))


def fill(model: Any, case: Case, *, trained: bool = False) -> None:
    """`fill_weights` as `case` has them, with its routing. `trained`: what is trained, as before the first step."""
    fill_weights(model, rounded=case.rounded, trained=trained)
    if case.routing == "random" and not (trained and case.mode != "full"):
        shape, batch = SHAPES[case.model], case.batch * case.seq
        experts.route_evenly(model, shape, text_tokens(shape.vocab, experts.BATCHES * batch), batch)


def build_problem(model: Any, case: Case) -> str | None:
    """Why `model`, as an implementation built it, has not the case's base weights or adapters, if it has not."""
    shape = SHAPES[case.model]
    layers = case.layers or shape.layers
    expected = 0
    if case.mode in quantised.MODES:
        expected = layers * (len(ATTENTION_TARGETS) + len(experts.STACKS) if shape.experts else len(LORA_TARGETS))
    found = quantised.packed_weights(model)
    if found != expected:
        return f"packed weights: expected {expected}, found {found}"
    if not shape.experts:
        return None
    return experts.problem(model, shape, layers, LORA_RANK, case.expert_lora and case.mode != "full")


def text_tokens(vocab: int, count: int) -> list[int]:
    """`count` tokens of real text: the words of the standard library's help topics, hashed into the vocabulary.

    Real text because its loss falls: two implementations that agree on it agree on something that moves, and frequent
    words repeat as they do in training data. The text is repeated when it is too short (about 140,000 tokens).
    """
    from pydoc_data.topics import topics

    words = re.findall(r"\w+|[^\w\s]|\n", "\n".join(topics[key] for key in sorted(topics)))
    ids = [zlib.crc32(word.encode()) % vocab for word in words]
    return (ids * (count // len(ids) + 1))[:count]
