"""An ordinary Hugging Face script: LoRA on a small Llama, trained on real text with Trainer. It knows no other library.

`python -m fast_unsloth_patch demo` runs it twice, once as it is and once with `python -m fast_unsloth_patch run`. The
text is the help of the standard library, as bytes; the base model's weights are random, and with `--mode qlora` they
are quantised to NF4. It prints a line of JSON at the start, for each step, and at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback


class Setting(NamedTuple):
    model: dict[str, Any]
    dtype: torch.dtype
    steps: int
    batch: int
    seq: int
    learning_rate: float


# 3.4 million parameters in fp32: about half a minute on two cores. The widths are multiples of bitsandbytes' blocks of
# 64: of others its AVX-512 code does not give back the values it quantised.
CPU = Setting(
    {
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        # so narrow a model learns little through a frozen head of the usual 0.02
        "initializer_range": 0.05,
    },
    torch.float32,
    steps=100,
    batch=4,
    seq=128,
    learning_rate=2e-3,
)
# Llama-3.2-1B's shape in bf16
CUDA = Setting(
    {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    torch.bfloat16,
    steps=100,
    batch=8,
    seq=1024,
    learning_rate=5e-4,
)


def base_model(setting: Setting, device: str, mode: str) -> Any:
    """The model with random weights, made on the device; for QLoRA saved, and loaded as one loads a checkpoint."""
    config = LlamaConfig(**setting.model, max_position_embeddings=setting.seq, use_cache=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=setting.dtype)
    if mode == "lora":
        return model
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=setting.dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=setting.dtype, quantization_config=quantization, device_map={"": device}
        )


def text_rows(seq: int) -> list[dict[str, list[int]]]:
    """The text as rows of `seq` bytes."""
    from pydoc_data.topics import topics

    data = "\n".join(topics[key] for key in sorted(topics)).encode()
    rows = [list(data[i : i + seq]) for i in range(0, len(data) - seq, seq)]
    return [{"input_ids": row, "labels": row} for row in rows]


def peak_memory(device: str) -> int:
    """Bytes: what torch allocated on the GPU at most, or the largest resident size of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Log(TrainerCallback):
    """Prints each step's loss and time."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self._now() - self.start)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            print(json.dumps({"step": state.global_step, "loss": float(logs["loss"])}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--mode", choices=["lora", "qlora"], default="lora")
    options = parser.parse_args()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = CUDA if device == "cuda" else CPU
    steps = options.steps or setting.steps

    set_seed(0)
    model = base_model(setting, device, options.mode)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with torch.device(device):
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    total = sum(p.numel() for p in model.parameters())
    print(json.dumps({"steps": steps, "device": device, "parameters": total}), flush=True)

    log = Log(device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=setting.batch,
            learning_rate=setting.learning_rate,
            warmup_steps=5,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            gradient_checkpointing=device == "cuda",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=device == "cuda",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=text_rows(setting.seq), callbacks=[log])
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    # the first steps compile and warm up
    seconds = log.seconds[min(5, len(log.seconds) - 1) :]
    speed = setting.batch * setting.seq / statistics.median(seconds)
    print(json.dumps({"tokens_per_s": speed, "peak_bytes": peak_memory(device)}), flush=True)


if __name__ == "__main__":
    main()
