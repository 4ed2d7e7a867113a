"""A tiny model with random weights, to try an engine on: FP16, or EXL2 with the real packed format.

What it says makes no sense; that its logits agree with each other is what counts.
Sizes are the smallest that both ExLlama libraries' kernels take. numpy only.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2, 256, 512, 4, 2, 64, 320
DTYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "I16": np.int16}
# The loud weights of a trained model are missing here, so the deviation is larger than in one: logits must differ.
DEVIATION = 0.05


def write_tiny(folder: Path, *, quantization: str = "fp16", seed: int = 1) -> Path:
    """Write a two-layer Llama with 320 tokens: 256 bytes, a few words and the control tokens of ChatML.

    quantization is "fp16", "exl2" (4 and 6 bits in groups of 32) or "gptq" (4 bits in groups of 64, inputs in an order
    of their own). Returns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors: dict[str, tuple[str, Any]] = {}
    tensors["model.embed_tokens.weight"] = ("F16", random.normal(0, 1, (VOCAB, HIDDEN)))
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "self_attn.q_proj": (HIDDEN, q), "self_attn.k_proj": (HIDDEN, kv), "self_attn.v_proj": (HIDDEN, kv),
        "self_attn.o_proj": (q, HIDDEN), "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
        "mlp.up_proj": (HIDDEN, INTERMEDIATE), "mlp.down_proj": (INTERMEDIATE, HIDDEN),
    }  # fmt: skip
    for layer in range(LAYERS):
        for name, (rows, columns) in shapes.items():
            tensors |= _weight(f"model.layers.{layer}.{name}", rows, columns, quantization, random)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = ("F16", np.ones(HIDDEN))
    tensors["model.norm.weight"] = ("F16", np.ones(HIDDEN))
    tensors |= _weight("lm_head", HIDDEN, VOCAB, quantization, random)
    write_safetensors(folder / ("output.safetensors" if quantization == "exl2" else "model.safetensors"), tensors)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 2048, "hidden_act": "silu", "tie_word_embeddings": False,
        "bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 256, "torch_dtype": "float16",
    }  # fmt: skip
    if quantization == "exl2":
        config["quantization_config"] = {"quant_method": "exl2", "version": "0.3.2", "bits": 4.5, "head_bits": 6}
    if quantization == "gptq":
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)
    return folder


def _weight(
    key: str, rows: int, columns: int, quantization: str, random: np.random.Generator
) -> dict[str, tuple[str, Any]]:
    """One linear layer with `rows` inputs and `columns` outputs."""
    if quantization == "fp16":
        return {f"{key}.weight": ("F16", random.normal(0, DEVIATION, (columns, rows)))}
    if quantization == "gptq" and key == "lm_head":  # never quantized in this format
        return {f"{key}.weight": ("F16", random.normal(0, DEVIATION, (columns, rows)))}
    if quantization == "gptq":
        groups = rows // 64
        return {
            f"{key}.qweight": ("I32", random.integers(-(2**31), 2**31, (rows // 8, columns))),
            f"{key}.qzeros": ("I32", np.full((groups, columns // 8), 0x77777777)),  # 7 means 8, the middle
            f"{key}.scales": ("F16", np.full((groups, columns), DEVIATION / 4.6)),
            f"{key}.g_idx": ("I32", random.permutation(np.arange(rows) // 64)),
        }
    bits = [6] + [4] * (rows // 32 - 1)
    begins = np.concatenate([[0], np.cumsum(bits)[:-1]])  # a group of 32 rows of b bits takes b words of 32 bits
    return {
        f"{key}.q_weight": ("I32", random.integers(-(2**31), 2**31, (sum(bits), columns))),
        f"{key}.q_scale": ("I32", random.integers(-(2**31), 2**31, (len(bits), columns // 8))),
        f"{key}.q_scale_max": ("F16", np.array([2.5 * 0.1476 / 2**b for b in bits])),
        f"{key}.q_groups": ("I16", np.stack([bits, begins], 1).reshape(-1)),
        f"{key}.q_invperm": ("I32", random.permutation(rows)),
    }


def write_safetensors(path: Path, tensors: dict[str, tuple[str, Any]]) -> None:
    """Write tensors, given as their type (F32, BF16, F16, I32 or I16) and their values, into one file."""
    head: dict[str, Any] = {}
    parts, at = [], 0
    for name, (dtype, values) in tensors.items():
        data = (bfloat16(values) if dtype == "BF16" else np.ascontiguousarray(values.astype(DTYPES[dtype]))).tobytes()
        head[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def bfloat16(values: Any) -> Any:
    """Numbers in BF16, as the upper halves of single precision, rounded to the nearest even; unsigned 16-bit."""
    bits = np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_tokenizer(folder: Path) -> None:
    """Bytes as tokens, in the way of GPT-2, and ChatML's control tokens."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in visible}
    letters |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in visible)}
    vocabulary = {letters[b]: b for b in range(256)}
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = {token: 256 + n for n, token in enumerate(control)}
    added = [
        {"id": number, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for token, number in tokens.items()
    ]  # fmt: skip
    vocabulary |= {f"{letters[32]}w{number}": number for number in range(256 + len(control), VOCAB)}
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary, "merges": [], "fuse_unk": False}
    model |= {"dropout": None, "unk_token": None}
    table: dict[str, Any] = {
        "version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": pieces,
        "post_processor": None, "decoder": pieces, "truncation": None, "padding": None,
        "model": model,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(table))
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
