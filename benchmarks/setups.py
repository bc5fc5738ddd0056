"""How each implementation is told to import and to build the model of a case. Importing this file loads no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import checkpoint
import experts
import shapes
from shapes import ATTENTION_TARGETS, LORA_TARGETS, MODES, SHAPES, Arm, Case

# told when a part of the set-up is over
Done = Callable[[str], None]


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
    """Its default patches; of a mixture of experts those of the rest only, unless the arm says `liger_moe`."""
    import liger_kernel.transformers as liger

    shape = SHAPES[case.model]
    moe = {"swiglu": arm.liger_moe} if shape.experts else {}
    getattr(liger, f"apply_liger_kernel_to_{shape.family}")(**moe)
    _import_stock(case, arm)


def _import_unsloth(case: Case, arm: Arm) -> None:
    # It initialises CUDA when imported, and has to be imported before transformers, trl and peft: only what it does
    # not patch can come before.
    for name in ("numpy", "torch", "triton"):
        importlib.import_module(name)


def _build_stock(case: Case, arm: Arm, done: Done) -> Any:
    """The stock model of a case, as a script would make it. Fast is the same model: its patches are on by then."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case.dtype]
    model = shapes.build(case.model, layers=case.layers, dtype=dtype, device=case.device, mode=case.mode)
    if case.mode != "full":
        model = shapes.add_lora(model, dropout=case.dropout, device=case.device, expert_lora=case.expert_lora)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _build_unsloth(case: Case, arm: Arm, done: Done) -> Any:
    """Unsloth by its public calls. It only loads models from disk, so it is given a checkpoint that is a hole.

    LoRA on experts is asked for as in its notebooks of MoE models; `shapes.build_problem` tells whether it came.
    """
    import torch
    import unsloth

    done("import unsloth")
    folder = Path.cwd() / f"hollow-{case.model}-{case.layers or 'all'}"
    checkpoint.write_hollow_checkpoint(case.model, folder, layers=case.layers)
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
        targets = list(LORA_TARGETS)
        if SHAPES[case.model].experts:
            targets = [*ATTENTION_TARGETS, *(experts.UNSLOTH_TARGETS if case.expert_lora else ())]
        model = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=shapes.LORA_RANK,
            lora_alpha=shapes.LORA_ALPHA,
            lora_dropout=case.dropout,
            target_modules=targets,
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
