"""Checkpoint folders that are holes, for libraries that can only load a model from disk.

Importing this file loads no torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import shapes


def checkpoint_tensors(name: str, layers: int | None) -> dict[str, list[int]]:
    """Names and shapes of a model's tensors in 16 bits, as they are on disk: of a mixture, each expert's apart."""
    shape = shapes.SHAPES[name]
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
    }
    wide, narrow = [shape.intermediate, shape.hidden], [shape.hidden, shape.intermediate]
    if shape.experts:
        layer["block_sparse_moe.gate"] = [shape.experts, shape.hidden]
        for module in (f"block_sparse_moe.experts.{e}" for e in range(shape.experts)):
            layer |= {f"{module}.w1": wide, f"{module}.w2": narrow, f"{module}.w3": wide}
    else:
        layer |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": narrow}
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
    cfg = shapes.config(name, layers)
    cfg.architectures = [f"{shapes.SHAPES[name].family.capitalize()}ForCausalLM"]
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
