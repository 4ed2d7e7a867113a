"""The bundled demo models as checkpoints in the form of Hugging Face, FP16, for the ExLlama engines.

    python -m tests.exllama_on_cpu.models assistant FOLDER [exllamav2 | exllamav3]

Reads the GGUF files of demo/models, so the weights are the ones that llama.cpp runs,
8-bit rounding included. Needs the packages gguf and numpy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from modules.engines.tiny import write_safetensors

MODELS = Path(__file__).resolve().parent.parent.parent / "demo" / "models"
CONTROL = 3  # a token type of GGUF
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
TOWER = {"attn_out": "attn.proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
         "ln1": "norm1", "ln2": "norm2"}  # fmt: skip
# ExLlamaV2 takes this width for the merger of every Qwen2.5-VL; zeros change nothing. ExLlamaV3 reads the true one.
MERGER = {"exllamav2": 5120, "exllamav3": 0}


def convert(name: str, folder: Path, engine: str = "exllamav2") -> Path:
    """Write one demo model below `folder` as `engine` reads it; the one that sees gets its tower."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(MODELS / f"{name}-q8_0.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    kind = said["general.architecture"]
    tensors = {}
    for tensor in reader.tensors:
        head, _, tail = tensor.name.rpartition(".")
        parts = head.split(".")
        owner = f"model.layers.{parts[1]}.{NAMES[parts[2]]}" if parts[0] == "blk" else OUTER[head]
        tensors[f"{owner}.{tail}"] = ("F16", _values(tensor))
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "torch_dtype": "float16",
        "num_hidden_layers": said[f"{kind}.block_count"], "hidden_size": said[f"{kind}.embedding_length"],
        "intermediate_size": said[f"{kind}.feed_forward_length"], "vocab_size": len(said["tokenizer.ggml.tokens"]),
        "num_attention_heads": said[f"{kind}.attention.head_count"],
        "num_key_value_heads": said[f"{kind}.attention.head_count_kv"],
        "rms_norm_eps": float(said[f"{kind}.attention.layer_norm_rms_epsilon"]),
        "rope_theta": float(said[f"{kind}.rope.freq_base"]), "max_position_embeddings": said[f"{kind}.context_length"],
        "tie_word_embeddings": "lm_head.weight" not in tensors, "bos_token_id": said["tokenizer.ggml.bos_token_id"],
        "eos_token_id": said["tokenizer.ggml.eos_token_id"],
    }  # fmt: skip
    template = said["tokenizer.chat_template"]
    if kind == "qwen2vl":
        tensors |= _tower(MODELS / f"{name}-mmproj-q8_0.gguf", config, folder, MERGER[engine])
        config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
        sections = list(said["qwen2vl.rope.dimension_sections"])[:3]
        config |= {"model_type": "qwen2_5_vl", "rope_scaling": {"type": "mrope", "mrope_section": sections}}
    if kind == "qwen2vl" and engine == "exllamav3":  # words that only this library reads
        ids = {token: number for number, token in enumerate(said["tokenizer.ggml.tokens"])}
        config["vision_config"] |= {"hidden_act": "silu", "model_type": "qwen2_5_vl"}
        config |= {f"vision_{end}_token_id": ids[f"<|vision_{end}|>"] for end in ("start", "end")}
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    _tokenizer(said, folder, template)
    return folder


def _values(tensor: Any) -> np.ndarray[Any, Any]:
    return np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)


def _tower(path: Path, config: dict[str, Any], folder: Path, least_merger: int) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    said = {key: field.contents() for key, field in reader.fields.items()}
    raw = {tensor.name: _values(tensor) for tensor in reader.tensors}
    patch, hidden = said["clip.vision.patch_size"], said["clip.vision.embedding_length"]
    depth, every = said["clip.vision.block_count"], said["clip.vision.n_wa_pattern"]
    out: dict[str, Any] = {}
    for name, values in raw.items():
        parts = name.split(".")
        if parts[:2] == ["v", "blk"] and parts[3] in TOWER:
            out[f"visual.blocks.{parts[2]}.{TOWER[parts[3]]}.{parts[4]}"] = values
    for layer in range(depth):
        for tail in ("weight", "bias"):
            joined = np.concatenate([raw[f"v.blk.{layer}.attn_{part}.{tail}"] for part in "qkv"])
            out[f"visual.blocks.{layer}.attn.qkv.{tail}"] = joined
    frames = [raw["v.patch_embd.weight"], raw["v.patch_embd.weight.1"]]
    out["visual.patch_embed.proj.weight"] = np.stack([f.reshape(hidden, 3, patch, patch) for f in frames], 2)
    out["visual.merger.ln_q.weight"] = raw["v.post_ln.weight"]
    first, second = raw["mm.0.weight"], raw["mm.2.weight"]
    room = max(0, least_merger - first.shape[0])
    out["visual.merger.mlp.0.weight"] = np.pad(first, ((0, room), (0, 0)))
    out["visual.merger.mlp.0.bias"] = np.pad(raw["mm.0.bias"], (0, room))
    out["visual.merger.mlp.2.weight"] = np.pad(second, ((0, 0), (0, room)))
    out["visual.merger.mlp.2.bias"] = raw["mm.2.bias"]
    config["vision_config"] = {
        "model_type": "qwen2.5", "depth": depth, "hidden_size": hidden,
        "num_heads": said["clip.vision.attention.head_count"],
        "intermediate_size": said["clip.vision.feed_forward_length"], "patch_size": patch, "spatial_patch_size": patch,
        "spatial_merge_size": said["clip.vision.spatial_merge_size"], "temporal_patch_size": 2, "in_chans": 3,
        "window_size": said["clip.vision.window_size"], "out_hidden_size": config["hidden_size"],
        "fullatt_block_indexes": [n for n in range(depth) if (n + 1) % every == 0],
    }  # fmt: skip
    side = said["clip.vision.image_size"]
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": patch, "temporal_patch_size": 2, "merge_size": 2,
        "min_pixels": side * side, "max_pixels": side * side, "image_mean": list(said["clip.vision.image_mean"]),
        "image_std": list(said["clip.vision.image_std"]),
    }))  # fmt: skip
    return {name: ("BF16", values) for name, values in out.items()}  # as it is in the real models, EXL2 ones among them


def _tokenizer(said: dict[str, Any], folder: Path, template: str) -> None:
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    added = [
        {"id": number, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == CONTROL
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    table = {
        "version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"}, "truncation": None, "padding": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}, "post_processor": None,
        "decoder": byte_level, "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in said["tokenizer.ggml.merges"]],
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(table))
    ends = tokens[said["tokenizer.ggml.eos_token_id"]]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": ends}))


if __name__ == "__main__":
    convert(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
