"""The table of patches: one frozen row for every attribute that is swapped, strings only. Read this file first.

``install.py`` applies and reverts the rows, ``status.py`` shows them, ``tests/test_install.py`` proves each of them.
A new patch is one row here, one builder in ``patches/`` and its tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from .errors import OptionError, UnknownPatchError


class _Missing:
    """Stands for an attribute that a class does not define itself."""

    def __repr__(self) -> str:
        return "<missing>"


MISSING: Final = _Missing()


@dataclass(frozen=True)
class Patch:
    """One swapped attribute.

    Attributes:
        id: ``"family.name"``, as ``only`` and ``exclude`` take it.
        module: the leaf module whose import triggers the swap (never a package: those are lazy and get replaced).
        target: ``"Class.attribute"`` in it.
        replacement: ``"package.module:builder"``; ``builder(stock)`` gets the saved attribute and returns the new one.
        kind: ``"forward"``: a function of the class itself; the new one is dressed by ``functools.wraps(stock)``.
            ``"checkpoint_property"``: an attribute of instances; the builder gets :data:`MISSING` unless the class
            defines it, and returns a property. Its module has ``set_policy(recompute)``.
        requires: distributions whose installed version must lie in the window of ``compat.py``.
        parameters: the names that the stock function's signature must have, in order, ``"old|new"`` where a supported
            version renamed one; empty: any.
        optional: a package that the module cannot be imported without and that most scripts do not have: where it is
            absent there is nothing to patch, and ``strict`` does not ask for it.
        summary: one line for tables.
    """

    id: str
    module: str
    target: str
    replacement: str
    kind: Literal["forward", "checkpoint_property"] = "forward"
    requires: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    optional: str = ""
    summary: str = ""


_LLAMA = "transformers.models.llama.modeling_llama"
_PATCHES = "fast_unsloth_patch.patches"

PATCHES: tuple[Patch, ...] = (
    Patch(
        id="llama.rms_norm",
        module=_LLAMA,
        target="LlamaRMSNorm.forward",
        replacement=f"{_PATCHES}.llama:rms_norm_forward",
        requires=("torch", "transformers"),
        parameters=("self", "hidden_states"),
        summary="RMSNorm in one kernel, without an fp32 copy of the activations",
    ),
    Patch(
        id="llama.attention",
        module=_LLAMA,
        target="LlamaAttention.forward",
        replacement=f"{_PATCHES}.llama:attention_forward",
        requires=("torch", "transformers"),
        parameters=(
            "self",
            "hidden_states",
            "position_embeddings",
            "attention_mask",
            "past_key_values|cache",
            "kwargs",
        ),
        summary="q, k, v with their LoRA and RoPE as one op",
    ),
    Patch(
        id="llama.mlp",
        module=_LLAMA,
        target="LlamaMLP.forward",
        replacement=f"{_PATCHES}.llama:mlp_forward",
        requires=("torch", "transformers"),
        parameters=("self", "x"),
        summary="gate, up, SwiGLU and down with their LoRA as one op",
    ),
    Patch(
        id="llama.loss",
        module=_LLAMA,
        target="LlamaForCausalLM.forward",
        replacement=f"{_PATCHES}.causal_lm:causal_lm_forward",
        requires=("torch", "transformers"),
        parameters=(
            "self",
            "input_ids",
            "attention_mask",
            "position_ids",
            "past_key_values|cache",
            "inputs_embeds",
            "labels",
            "use_cache",
            "logits_to_keep",
            "kwargs",
        ),
        summary="loss without materialised logits",
    ),
    Patch(
        id="llama.checkpointing",
        module=_LLAMA,
        target="LlamaDecoderLayer._gradient_checkpointing_func",
        replacement=f"{_PATCHES}.checkpointing:checkpointing_func",
        kind="checkpoint_property",
        requires=("torch", "transformers"),
        summary="recompute under gradient checkpointing leaves out what nothing reads",
    ),
    Patch(
        id="peft.linear",
        module="peft.tuners.lora.layer",
        target="Linear.forward",
        replacement=f"{_PATCHES}.peft_linear:linear_forward",
        requires=("torch", "peft"),
        parameters=("self", "x", "args", "kwargs"),
        summary="a LoRA linear of any model as one op",
    ),
    Patch(
        id="peft.linear4bit",
        module="peft.tuners.lora.bnb",
        target="Linear4bit.forward",
        replacement=f"{_PATCHES}.peft_linear:linear4bit_forward",
        requires=("torch", "peft"),
        parameters=("self", "x", "args", "kwargs"),
        optional="bitsandbytes",
        summary="the same over bitsandbytes' NF4 and FP4 weights",
    ),
    Patch(
        id="peft.gptq",
        module="peft.tuners.lora.gptq",
        target="GPTQLoraLinear.forward",
        replacement=f"{_PATCHES}.peft_linear:gptq_forward",
        requires=("torch", "peft"),
        parameters=("self", "x"),
        summary="the same over gptqmodel's GPTQ weights",
    ),
)


def expand(name: object) -> tuple[str, ...]:
    """The ids that ``name``, an id or a family, stands for.

    Raises:
        UnknownPatchError: there is none; the message names the nearest one.
    """
    ids = [patch.id for patch in PATCHES]
    if isinstance(name, str):
        wanted = name.strip()
        if found := tuple(i for i in ids if i == wanted or i.startswith(f"{wanted}.")):
            return found
    from difflib import get_close_matches

    names = sorted({*ids, *(i.partition(".")[0] for i in ids)})
    near = get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise UnknownPatchError(f"unknown patch {name!r}{hint} Known names: {', '.join(names)}")


def names_of(argument: str, value: object) -> list[object]:
    """The names in ``value``: a string (several separated by commas) or an iterable of strings.

    Raises:
        OptionError: it is neither.
    """
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, Iterable):
        return list(value)
    raise OptionError(f"{argument} takes patch ids or families, for example {argument}='llama', not {value!r}")
