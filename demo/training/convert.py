"""Hugging Face directory -> GGUF: `python -m demo.training.convert checkpoints/reasoning reasoning-q8_0.gguf`.

For a vision checkpoint the language part; `--mmproj` writes its vision tower. Only Qwen2 and Qwen2.5-VL.
Qwen2 needs no permutation of q and k, because llama.cpp rotates its heads as transformers does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

Q8 = gguf.GGMLQuantizationType.Q8_0
Q8_FILE = 7
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

TEXT_PARTS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
TOWER_PARTS = {"attn.proj": "attn_out", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
               "mlp.down_proj": "ffn_down", "norm1": "ln1", "norm2": "ln2"}


def tensors(source: Path) -> dict[str, np.ndarray]:
    with safe_open(str(source / "model.safetensors"), framework="np") as store:
        return {key: store.get_tensor(key).astype(np.float32) for key in store.keys()}  # noqa: SIM118 - not a dict


def put(writer: gguf.GGUFWriter, name: str, values: np.ndarray) -> None:
    """Matrices as Q8_0 where their rows allow it, vectors as float32."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.ndim == 1:
        writer.add_tensor(name, values)
    elif values.shape[-1] % 32:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, Q8), raw_dtype=Q8)


def add_vocabulary(writer: gguf.GGUFWriter, source: Path, size: int) -> None:
    """Tokens, merges, special tokens and the chat template."""
    stored = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, number in stored["model"]["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for added in stored["added_tokens"]:
        visible = added["content"] in ("<think>", "</think>")
        tokens[added["id"]], types[added["id"]] = added["content"], USER_DEFINED if visible else CONTROL
    merges = [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template((source / "chat_template.jinja").read_text(encoding="utf-8"))


def add_text_settings(writer: gguf.GGUFWriter, text: dict[str, Any], sections: list[int]) -> None:
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(float(text["rope_parameters"]["rope_theta"]))
    writer.add_vocab_size(text["vocab_size"])
    if sections:
        writer.add_rope_dimension_sections([*sections, 0])


def text_name(key: str) -> str:
    """The name that llama.cpp gives a tensor of the language part."""
    key = key.replace("model.language_model.", "model.")
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if key in fixed:
        return fixed[key]
    _, _, block, rest = key.split(".", 3)
    part, suffix = rest.rsplit(".", 1)
    return f"blk.{block}.{TEXT_PARTS[part]}.{suffix}"


def start(path: Path, architecture: str, name: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name(name)
    writer.add_file_type(Q8_FILE)
    writer.add_quantization_version(2)
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert_text(source: Path, path: Path) -> None:
    """The language part of a checkpoint."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    vision = "vision_config" in config
    text = config["text_config"] if vision else config
    writer = start(path, "qwen2vl" if vision else "qwen2", f"Turntable demo {source.name}")
    add_text_settings(writer, text, text["rope_parameters"]["mrope_section"] if vision else [])
    add_vocabulary(writer, source, text["vocab_size"])
    for key, values in tensors(source).items():
        if "visual." not in key and key != "lm_head.weight":
            put(writer, text_name(key), values)
    finish(writer)


def add_tower_settings(writer: gguf.GGUFWriter, tower: dict[str, Any]) -> None:
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "qwen2.5vl_merger")
    writer.add_bool("clip.use_silu", True)
    numbers = {"image_size": 112, "patch_size": tower["patch_size"], "spatial_merge_size": tower["spatial_merge_size"],
               "embedding_length": tower["hidden_size"], "feed_forward_length": tower["intermediate_size"],
               "block_count": tower["depth"], "attention.head_count": tower["num_heads"],
               "projection_dim": tower["out_hidden_size"], "n_wa_pattern": tower["fullatt_block_indexes"][0] + 1,
               "window_size": tower["window_size"]}
    for key, value in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", int(value))
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)


def put_tower(writer: gguf.GGUFWriter, key: str, values: np.ndarray) -> None:
    """One tensor of the vision tower: patches are split over time, the fused q, k, v into three."""
    if key == "patch_embed.proj.weight":
        for step, suffix in enumerate(("", ".1")):
            part = np.ascontiguousarray(values[:, :, step]).astype(np.float16)
            writer.add_tensor(f"v.patch_embd.weight{suffix}", part)
        return
    if key == "merger.ln_q.weight":
        put(writer, "v.post_ln.weight", values)
        return
    if key.startswith("merger.mlp."):
        put(writer, "mm." + key.removeprefix("merger.mlp."), values)
        return
    _, block, rest = key.split(".", 2)
    part_name, suffix = rest.rsplit(".", 1)
    if part_name == "attn.qkv":
        for letter, part in zip("qkv", np.split(values, 3, 0), strict=True):
            put(writer, f"v.blk.{block}.attn_{letter}.{suffix}", part)
    else:
        put(writer, f"v.blk.{block}.{TOWER_PARTS[part_name]}.{suffix}", values)


def convert_mmproj(source: Path, path: Path) -> None:
    """The vision tower of a checkpoint."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    writer = start(path, "clip", f"Turntable demo {source.name} tower")
    writer.add_type("mmproj")
    add_tower_settings(writer, config["vision_config"])
    for key, values in tensors(source).items():
        if "visual." in key:
            put_tower(writer, key.split("visual.", 1)[1], values)
    finish(writer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mmproj", action="store_true", help="write the vision tower")
    chosen = parser.parse_args()
    (convert_mmproj if chosen.mmproj else convert_text)(chosen.source, chosen.out)
    print(chosen.out, chosen.out.stat().st_size)


if __name__ == "__main__":
    main()
