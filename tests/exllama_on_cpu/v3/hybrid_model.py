"""A tiny hybrid model with random weights: Qwen3.5 with three layers of gated delta rule and one of attention.

python -m tests.exllama_on_cpu.v3.hybrid_model FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from modules.engines.tiny import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, VOCAB, write_tiny

LAYERS, KEY_HEADS, VALUE_HEADS, WIDTH, CONVOLUTION = 4, 2, 4, 32, 4
CHANNELS = (2 * KEY_HEADS + VALUE_HEADS) * WIDTH


def write_hybrid(folder: Path) -> Path:
    """The tokenizer and the sizes of tiny.py with other layers. Returns the folder."""
    write_tiny(folder)
    random = torch.Generator().manual_seed(1)

    def weight(*shape: int, scale: float = 0.05) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) * scale).to(torch.bfloat16)

    root = "model.language_model"
    tensors = {f"{root}.embed_tokens": weight(VOCAB, HIDDEN, scale=1), "lm_head": weight(VOCAB, HIDDEN)}
    tensors[f"{root}.norm"] = weight(HIDDEN, scale=0)  # these norms multiply by one more than the weight
    for number in range(LAYERS):
        layer = f"{root}.layers.{number}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}"] = weight(HIDDEN, scale=0)
        for name in ("gate_proj", "up_proj"):
            tensors[f"{layer}.mlp.{name}"] = weight(INTERMEDIATE, HIDDEN)
        tensors[f"{layer}.mlp.down_proj"] = weight(HIDDEN, INTERMEDIATE)
        if number == LAYERS - 1:
            own = f"{layer}.self_attn"
            for name, outputs in (("q", 2 * HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):  # queries bring their gates
                tensors[f"{own}.{name}_proj"] = weight(outputs * HEAD_DIM, HIDDEN)
            tensors[f"{own}.o_proj"] = weight(HIDDEN, HEADS * HEAD_DIM)
            tensors |= {f"{own}.{name}_norm": weight(HEAD_DIM, scale=0) for name in "qk"}
            continue
        own = f"{layer}.linear_attn"
        for name, outputs in (("qkv", CHANNELS), ("z", VALUE_HEADS * WIDTH), ("b", VALUE_HEADS), ("a", VALUE_HEADS)):
            tensors[f"{own}.in_proj_{name}"] = weight(outputs, HIDDEN)
        tensors[f"{own}.out_proj"] = weight(HIDDEN, VALUE_HEADS * WIDTH)
        tensors[f"{own}.conv1d"] = weight(CHANNELS, 1, CONVOLUTION, scale=0.4)
        tensors[f"{own}.norm"] = torch.ones(WIDTH, dtype=torch.bfloat16)
        tensors[f"{own}.A_log"] = torch.rand(VALUE_HEADS, generator=random).log()
        tensors[f"{own}.dt_bias"] = torch.ones(VALUE_HEADS, dtype=torch.bfloat16)
    bare = ("A_log", "dt_bias")
    named = {name if name.endswith(bare) else f"{name}.weight": value for name, value in tensors.items()}
    save_file(named, str(folder / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "num_hidden_layers": LAYERS,
        "full_attention_interval": LAYERS, "linear_conv_kernel_dim": CONVOLUTION, "linear_key_head_dim": WIDTH,
        "linear_value_head_dim": WIDTH, "linear_num_key_heads": KEY_HEADS, "linear_num_value_heads": VALUE_HEADS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    write_hybrid(Path(sys.argv[1]))
