"""The table of patches: one frozen row for every attribute that is swapped, strings only. Read this file first.

``install.py`` applies and reverts the rows, ``status.py`` shows them, ``tests/test_install.py`` proves each of them.
A new patch is one row here, one builder in ``patches/`` and its tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

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
        replacement: ``"package.module:builder"``; ``builder(stock, tally)`` gets the saved attribute and the patch's
            counters, and returns the new one.
        kind: ``"forward"``: a function of the class itself; the new one is dressed by ``functools.wraps(stock)``, and
            on a layer that transformers checkpoints in its forward (from 5.23 on) wrapped as the stock one was.
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


_PATCHES = "fast_unsloth_patch.patches"


class _Part(NamedTuple):
    """A row of a family of models: what is the same for every family that has it."""

    name: str
    target: str  # without the family's prefix
    builder: str  # in patches/
    parameters: str
    summary: str


_RMS_NORM = _Part(
    "rms_norm",
    "RMSNorm.forward",
    "decoder:rms_norm_forward",
    "self hidden_states",
    "RMSNorm in one kernel, without an fp32 copy of the activations",
)
_ATTENTION = _Part(
    "attention",
    "Attention.forward",
    "decoder:attention_forward",
    "self hidden_states position_embeddings attention_mask past_key_values|cache kwargs",
    "q, k, v with their LoRA and RoPE as one op",
)
_WINDOWED_ATTENTION = _ATTENTION._replace(builder="decoder:windowed_attention_forward")
_MLP = _Part(
    "mlp",
    "MLP.forward",
    "decoder:mlp_forward",
    "self x",
    "gate, up, SwiGLU and down with their LoRA as one op",
)
_MOE = _Part(
    "moe",
    "SparseMoeBlock.forward",
    "mixtral:moe_forward",
    "self hidden_states",
    "the experts of every token, with their LoRA, as one op of grouped products",
)
_LOSS = _Part(
    "loss",
    "ForCausalLM.forward",
    "causal_lm:causal_lm_forward",
    "self input_ids attention_mask position_ids past_key_values|cache inputs_embeds labels use_cache "
    "logits_to_keep kwargs",
    "loss without materialised logits",
)
_MOE_LOSS = _LOSS._replace(
    builder="causal_lm:moe_causal_lm_forward",
    parameters=_LOSS.parameters.replace("logits_to_keep", "output_router_logits logits_to_keep"),
)
_PACKING = _Part(
    "packing",
    "Model.forward",
    "packing:model_forward",
    "self input_ids attention_mask position_ids past_key_values|cache inputs_embeds use_cache kwargs",
    "packed documents and padded batches as variable-length attention",
)
_DECODER_LAYER = _Part(
    "decoder_layer",
    "DecoderLayer.forward",
    "decoder:decoder_layer_forward",
    "self hidden_states attention_mask position_ids past_key_values|cache use_cache position_embeddings kwargs",
    "each residual addition in one pass with its norm or the MLP",
)
_MOE_DECODER_LAYER = _DECODER_LAYER._replace(
    builder="decoder:moe_decoder_layer_forward",
    parameters="self hidden_states position_embeddings attention_mask position_ids past_key_values|cache kwargs",
    summary="each residual addition in one pass with its norm or the experts",
)
_CHECKPOINTING = _Part(
    "checkpointing",
    "DecoderLayer._gradient_checkpointing_func",
    "checkpointing:checkpointing_func",
    "",
    "recompute under gradient checkpointing leaves out what nothing reads",
)


def _family(family: str, prefix: str, *parts: _Part) -> tuple[Patch, ...]:
    """The rows of ``transformers.models.<family>``, whose classes begin with ``prefix``."""
    return tuple(
        Patch(
            id=f"{family}.{part.name}",
            module=f"transformers.models.{family}.modeling_{family}",
            target=f"{prefix}{part.target}",
            replacement=f"{_PATCHES}.{part.builder}",
            kind="forward" if part.parameters else "checkpoint_property",
            requires=("torch", "transformers"),
            parameters=tuple(part.parameters.split()),
            summary=part.summary,
        )
        for part in parts
    )


def _experts4bit(name: str, method: str, parameters: str, builder: str = "") -> Patch:
    """A method of transformers' quantiser for bitsandbytes in four bits."""
    return Patch(
        id=f"experts4bit.{name}",
        module="transformers.quantizers.quantizer_bnb_4bit",
        target=f"Bnb4BitHfQuantizer.{method}",
        replacement=f"{_PATCHES}.quantize_experts:{builder or method}",
        requires=("torch", "transformers"),
        parameters=tuple(parameters.split()),
        summary="load_in_4bit takes Mixtral's experts too, if quantize_experts() was called",
    )


PATCHES: tuple[Patch, ...] = (
    *_family("llama", "Llama", _RMS_NORM, _ATTENTION, _MLP, _LOSS, _PACKING, _DECODER_LAYER, _CHECKPOINTING),
    *_family(
        "mistral", "Mistral", _RMS_NORM, _WINDOWED_ATTENTION, _MLP, _LOSS, _PACKING, _DECODER_LAYER, _CHECKPOINTING
    ),
    *_family(
        "mixtral",
        "Mixtral",
        _RMS_NORM,
        _WINDOWED_ATTENTION,
        _MOE,
        _MOE_LOSS,
        _PACKING,
        _MOE_DECODER_LAYER,
        _CHECKPOINTING,
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
        replacement=f"{_PATCHES}.peft_linear:linear_forward",
        requires=("torch", "peft"),
        parameters=("self", "x", "args", "kwargs"),
        optional="bitsandbytes",
        summary="the same over bitsandbytes' NF4 and FP4 weights",
    ),
    Patch(
        id="peft.gptq",
        module="peft.tuners.lora.gptq",
        target="GPTQLoraLinear.forward",
        replacement=f"{_PATCHES}.peft_linear:linear_forward",
        requires=("torch", "peft"),
        parameters=("self", "x"),
        summary="the same over gptqmodel's GPTQ weights",
    ),
    _experts4bit(
        "before", "_process_model_before_weight_loading", "self model device_map kwargs", "before_weight_loading"
    ),
    _experts4bit("selection", "param_needs_quantization", "self model param_name kwargs"),
    _experts4bit("quantize", "get_quantize_ops", "self"),
    _experts4bit("after", "_process_model_after_weight_loading", "self model kwargs", "after_weight_loading"),
    _experts4bit("dequantize", "_dequantize", "self model dtype", "dequantize"),
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
