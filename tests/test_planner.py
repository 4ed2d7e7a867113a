"""The planner: known sizes, known predictions, and laws that hold for every model."""

from __future__ import annotations

import json
import math
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.errors import ModelFilesDamaged, ModelNotDownloaded
from modules.hardware import Card as SeenCard
from modules.hardware import Cpu, Disk, Driver, Machine, Memory, System
from modules.planner import (
    BITS,
    CHUNK_TOKENS,
    GB,
    GIB,
    MIB,
    PAGE_TOKENS,
    Card,
    LinearAttention,
    ModelShape,
    Plan,
    Quantization,
    Setup,
    TensorBytes,
    VisionShape,
    active_share,
    best_bits,
    cache_bytes,
    cache_scratch_bytes,
    cache_tokens,
    cache_warning,
    cards_of,
    choose_cache,
    dequantization_bytes,
    exl2_bytes,
    file_bytes,
    fit,
    gguf_tensors,
    image_bytes,
    known_shape,
    largest_context,
    nominal,
    parameters,
    pinned_bytes,
    pinned_verdict,
    plan,
    plan_variant,
    read_folder,
    read_gguf,
    safetensors_sizes,
    scheme_of,
    setup_of,
    shape_of_config,
    split,
    state_bytes,
    stated_bits,
    tokens_per_second,
    vision_bytes,
    weight_bytes,
)
from modules.presets import CACHE_MODES, Options, Presets, Shape, Variant

ROOT = Path(__file__).parent.parent

SHAPES = {
    "fuseo1-32b": Shape(64, 5120, 40, 8, 128, 27648, 152064),
    "gpt-oss-20b": Shape(24, 2880, 64, 8, 64, 2880, 201088),
    "phi-4": Shape(40, 5120, 40, 10, 128, 17920, 100352),
    "phi-4-mini": Shape(32, 3072, 24, 8, 128, 8192, 200064),
    "qwen2-vl-2b": Shape(28, 1536, 12, 2, 128, 8960, 151936),
    "qwen2.5-coder-0.5b": Shape(24, 896, 14, 2, 64, 4864, 151936),
    "qwen2.5-coder-1.5b": Shape(28, 1536, 12, 2, 128, 8960, 151936),
    "qwen2.5-coder-14b": Shape(48, 5120, 40, 8, 128, 13824, 152064),
    "qwen2.5-coder-32b": Shape(64, 5120, 40, 8, 128, 27648, 152064),
    "qwen2.5-coder-7b": Shape(28, 3584, 28, 4, 128, 18944, 152064),
    "qwen2.5-vl-3b": Shape(36, 2048, 16, 2, 128, 11008, 151936),
    "qwen2.5-vl-7b": Shape(28, 3584, 28, 4, 128, 18944, 152064),
    "qwen3-0.6b": Shape(28, 1024, 16, 8, 128, 3072, 151936),
    "qwen3-4b-2507": Shape(36, 2560, 32, 8, 128, 9728, 151936),
    "qwen3-8b": Shape(36, 4096, 32, 8, 128, 12288, 151936),
    "qwen3-coder-30b-a3b": Shape(48, 2048, 32, 4, 128, 6144, 151936),
    "qwen3-vl-2b": Shape(28, 2048, 16, 8, 128, 6144, 151936),
    "qwen3-vl-8b": Shape(36, 4096, 32, 8, 128, 12288, 151936),
    "qwen3.5-0.8b": Shape(24, 1024, 8, 2, 256, 3584, 248320, 6),
    "qwen3.5-4b": Shape(32, 2560, 16, 4, 256, 9216, 248320, 8),
    "qwen3.5-9b": Shape(32, 4096, 16, 4, 256, 12288, 248320, 8),
    "qwen3.8-27b": Shape(64, 5120, 24, 4, 256, 17408, 248320, 16),
    "qwq-32b": Shape(64, 5120, 40, 8, 128, 27648, 152064),
    "r1-distill-qwen-1.5b": Shape(28, 1536, 12, 2, 128, 8960, 151936),
    "r1-distill-qwen-14b": Shape(48, 5120, 40, 8, 128, 13824, 152064),
    "r1-distill-qwen-7b": Shape(28, 3584, 28, 4, 128, 18944, 152064),
    "smolvlm-256m": Shape(30, 576, 9, 3, 64, 1536, 49280),
    "smolvlm-500m": Shape(32, 960, 15, 5, 64, 2560, 49280),
}  # fmt: skip
# Why a published size cannot be met within 2 %.
DYNAMIC = "a dynamic mix: each tensor's type was chosen by measurement, and no rule gives it"
ROUNDED = "published in steps of 0.1 GiB"
GUESSED = "never seen, only guessed from a model of another size"
ALLOWED = {"": 0.02, DYNAMIC: 0.06, ROUNDED: 0.045, GUESSED: 0.045}
# Model, repository, revision or file, bits per weight asked for, published size in 10^9 bytes, what hinders it.
PUBLISHED = [
    ("phi-4", "TheMelonGod/phi-4-exl2", "8hb-6.5bpw", 6.5, 12.62, ""),
    ("qwen2.5-vl-7b", "turboderp/Qwen2.5-VL-7B-Instruct-exl2", "8.0bpw", 8.0, 9.02, ""),
    ("qwen2.5-coder-32b", "bartowski/Qwen2.5-Coder-32B-Instruct-exl2", "4_25", 4.25, 18.76, ""),
    ("fuseo1-32b", "bartowski/FuseO1-DeepSeekR1-QwQ-SkyT1-32B-Preview-exl2", "4_25", 4.25, 18.76, ""),
    ("phi-4", "TheMelonGod/phi-4-exl2", "8hb-6.0bpw", 6.0, 11.77, ""),
    ("qwen2.5-coder-14b", "DrNicefellow/Qwen2.5-Coder-14B-Instruct-4.0bpw-exl2", "main", 4.0, 8.78, ""),
    ("qwen2.5-coder-32b", "bartowski/Qwen2.5-Coder-32B-Instruct-exl2", "3_0", 3.0, 13.88, ""),
    ("r1-distill-qwen-14b", "bartowski/DeepSeek-R1-Distill-Qwen-14B-exl2", "6_5", 6.5, 13.07, ""),
    ("phi-4", "TheMelonGod/phi-4-exl2", "8hb-4.5bpw", 4.5, 9.21, ""),
    ("qwen2.5-vl-7b", "turboderp/Qwen2.5-VL-7B-Instruct-exl2", "6.0bpw", 6.0, 7.77, ""),
    ("r1-distill-qwen-14b", "bartowski/DeepSeek-R1-Distill-Qwen-14B-exl2", "4_25", 4.25, 9.16, ""),
    ("qwen3-8b", "TheMelonGod/Qwen3-8B-exl2", "8hb-4.5bpw", 4.5, 5.77, ""),
    ("phi-4", "TheMelonGod/phi-4-exl2", "6hb-3.0bpw", 3.0, 6.52, ""),
    ("qwen2-vl-2b", "turboderp/Qwen2-VL-2B-Instruct-exl2", "8.0bpw", 8.0, 3.27, ""),
    ("qwen2.5-vl-7b", "turboderp/Qwen2.5-VL-7B-Instruct-exl2", "4.0bpw", 4.0, 6.11, ""),
    ("qwen2.5-coder-7b", "bartowski/Qwen2.5-Coder-7B-Instruct-exl2", "5_0", 5.0, 5.58, ""),
    ("qwen2.5-coder-7b", "bartowski/Qwen2.5-Coder-7B-Instruct-exl2", "4_25", 4.25, 4.99, ""),
    ("r1-distill-qwen-7b", "lucyknada/deepseek-ai_DeepSeek-R1-Distill-Qwen-7B-exl2", "6.0bpw", 6.0, 6.39, ""),
    ("qwq-32b", "bartowski/QwQ-32B-exl2", "4_25", 4.25, 18.76, ""),
    ("qwen3.8-27b", "turboderp/Qwen3.8-27B-exl3", "4.00bpw", 4.0, 16.86, ""),
    ("qwen3.8-27b", "turboderp/Qwen3.8-27B-exl3", "3.00bpw", 3.0, 13.85, ""),
    ("qwen3.5-9b", "turboderp/Qwen3.5-9B-exl3", "5.00bpw", 5.0, 8.05, ""),
    ("qwen3.5-9b", "turboderp/Qwen3.5-9B-exl3", "4.00bpw", 4.0, 7.19, ""),
    ("qwen3.5-9b", "turboderp/Qwen3.5-9B-exl3", "3.50bpw", 3.5, 6.75, ""),
    ("qwen3-vl-8b", "ArtusDev/Qwen_Qwen3-VL-8B-Instruct-EXL3", "3.5bpw_H6", 3.5, 5.7, GUESSED),
    ("qwen3-vl-8b", "turboderp/Qwen3-VL-8B-Instruct-exl3", "4.0bpw", 4.0, 6.6, GUESSED),
    ("qwen3-coder-30b-a3b", "ArtusDev/Qwen_Qwen3-Coder-30B-A3B-Instruct-EXL3", "3.0bpw_H6", 3.0, 12.3, ""),
    ("phi-4", "cmh/phi-4_exl3", "4bpw", 4.0, 8.24, ""),
    ("qwen3-8b", "turboderp/Qwen3-8B-exl3", "4.0bpw", 4.0, 5.21, ""),
    ("qwen3-0.6b", "Qwen/Qwen3-0.6B-GGUF", "Qwen3-0.6B-Q8_0.gguf", 0, 0.639446688, ""),
    ("qwen3.5-0.8b", "unsloth/Qwen3.5-0.8B-GGUF", "Qwen3.5-0.8B-Q4_K_M.gguf", 0, 0.53251712, ""),
    ("phi-4-mini", "unsloth/Phi-4-mini-instruct-GGUF", "Phi-4-mini-instruct-Q4_K_M.gguf", 0, 2.47, ""),
    ("qwen3-4b-2507", "unsloth/Qwen3-4B-Instruct-2507-GGUF", "Qwen3-4B-Instruct-2507-Q4_K_M.gguf", 0, 2.47, ""),
    ("qwen3.5-4b", "unsloth/Qwen3.5-4B-GGUF", "Qwen3.5-4B-Q4_K_M.gguf", 0, 2.740937888, ""),
    ("smolvlm-500m", "ggml-org/SmolVLM-500M-Instruct-GGUF", "SmolVLM-500M-Instruct-Q8_0.gguf", 0, 0.437, ""),
    ("smolvlm-500m", "ggml-org/SmolVLM-500M-Instruct-GGUF", "mmproj-SmolVLM-500M-Instruct-Q8_0.gguf", 0, 0.109, ""),
    ("smolvlm-256m", "ggml-org/SmolVLM-256M-Instruct-GGUF", "SmolVLM-256M-Instruct-Q8_0.gguf", 0, 0.175054528, ""),
    (
        "smolvlm-256m",
        "ggml-org/SmolVLM-256M-Instruct-GGUF",
        "mmproj-SmolVLM-256M-Instruct-Q8_0.gguf",
        0,
        0.103769856,
        "",
    ),
    ("qwen3.5-0.8b", "unsloth/Qwen3.5-0.8B-GGUF", "mmproj-F16.gguf", 0, 0.204987232, ""),
    ("qwen3-vl-2b", "Qwen/Qwen3-VL-2B-Instruct-GGUF", "Qwen3VL-2B-Instruct-Q8_0.gguf", 0, 1.825, ""),
    ("qwen3-vl-2b", "Qwen/Qwen3-VL-2B-Instruct-GGUF", "mmproj-Qwen3VL-2B-Instruct-Q8_0.gguf", 0, 0.445, ""),
    ("qwen2.5-vl-3b", "ggml-org/Qwen2.5-VL-3B-Instruct-GGUF", "Qwen2.5-VL-3B-Instruct-Q4_K_M.gguf", 0, 1.929901056, ""),
    (
        "qwen2.5-vl-3b",
        "ggml-org/Qwen2.5-VL-3B-Instruct-GGUF",
        "mmproj-Qwen2.5-VL-3B-Instruct-Q8_0.gguf",
        0,
        0.844757728,
        "",
    ),
    ("qwen2.5-vl-7b", "unsloth/Qwen2.5-VL-7B-Instruct-GGUF", "Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf", 0, 4.724, ""),
    ("qwen2.5-vl-7b", "unsloth/Qwen2.5-VL-7B-Instruct-GGUF", "mmproj-F16.gguf", 0, 1.396, ROUNDED),
    ("qwen3.5-4b", "unsloth/Qwen3.5-4B-GGUF", "mmproj-F16.gguf", 0, 0.672423616, ""),
    (
        "qwen2.5-coder-0.5b",
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        0,
        0.491400064,
        "",
    ),
    (
        "qwen2.5-coder-1.5b",
        "unsloth/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        "Qwen2.5-Coder-1.5B-Instruct-Q4_K_M.gguf",
        0,
        0.986,
        "",
    ),
    ("qwen2.5-coder-7b", "Qwen/Qwen2.5-Coder-7B-Instruct-GGUF", "qwen2.5-coder-7b-instruct-q4_k_m.gguf", 0, 4.724, ""),
    (
        "r1-distill-qwen-1.5b",
        "unsloth/DeepSeek-R1-Distill-Qwen-1.5B-GGUF",
        "DeepSeek-R1-Distill-Qwen-1.5B-Q4_K_M.gguf",
        0,
        1.074,
        ROUNDED,
    ),
    ("qwen3-4b-2507", "unsloth/Qwen3-4B-Thinking-2507-GGUF", "Qwen3-4B-Thinking-2507-Q4_K_M.gguf", 0, 2.47, ""),
    (
        "r1-distill-qwen-7b",
        "unsloth/DeepSeek-R1-Distill-Qwen-7B-GGUF",
        "DeepSeek-R1-Distill-Qwen-7B-Q4_K_M.gguf",
        0,
        4.68,
        "",
    ),
    ("qwen3.8-27b", "unsloth/Qwen3.8-27B-GGUF", "Qwen3.8-27B-UD-Q4_K_XL.gguf", 0, 17.559178144, DYNAMIC),
    ("qwen3.8-27b", "unsloth/Qwen3.8-27B-GGUF", "mmproj-F16.gguf", 0, 0.927607488, ""),
    ("gpt-oss-20b", "ggml-org/gpt-oss-20b-GGUF", "gpt-oss-20b-mxfp4.gguf", 0, 12.133, ""),
    ("phi-4", "pipilok/phi-4-exl2", "4.5bpw-hb8", 4.5, 9.206, ""),
    ("phi-4", "pipilok/phi-4-exl2", "5.5bpw-hb8", 5.5, 10.92, ""),
    ("qwen2.5-coder-32b", "bartowski/Qwen2.5-Coder-32B-Instruct-exl2", "2_2", 2.2, 10.83, ""),
    ("qwen2.5-coder-32b", "bartowski/Qwen2.5-Coder-32B-Instruct-exl2", "6_5-8hb", 6.5, 27.68, ""),
    ("qwen3.8-27b", "turboderp/Qwen3.8-27B-exl3", "6.00bpw", 6.0, 22.98, ""),
    ("qwen3.8-27b", "turboderp/Qwen3.8-27B-exl3", "5.00bpw", 5.0, 19.86, ""),
    ("qwen3.8-27b", "turboderp/Qwen3.8-27B-exl3", "3.50bpw", 3.5, 15.35, ""),
    ("qwen3.8-27b", "turboderp/Qwen3.8-27B-exl3", "2.50bpw", 2.5, 12.35, ""),
    ("qwen3.8-27b", "turboderp/Qwen3.8-27B-exl3", "2.00bpw", 2.0, 10.74, ""),
]


def predicted(model: str, repo: str, name: str, bpw: float) -> int:
    """The file's bytes by arithmetic alone."""
    shape = known_shape(repo, SHAPES[model])
    if name.endswith(".gguf"):
        if name.startswith("mmproj"):
            assert shape.vision
            return vision_bytes(shape.vision, scheme_of(name))
        return file_bytes(Setup(shape, Quantization("gguf", 4.85, scheme=scheme_of(name)), "llamacpp"))
    kind = repo[-4:].lower() if repo[-4:].lower() in ("exl2", "exl3") else "exl2"
    return file_bytes(Setup(shape, nominal(kind, bpw, f"{repo}-{name}"), "exllamav2"))


@pytest.mark.parametrize(("model", "repo", "name", "bpw", "size_gb", "why"), PUBLISHED)
def test_published_sizes(model: str, repo: str, name: str, bpw: float, size_gb: float, why: str) -> None:
    assert predicted(model, repo, name, bpw) == pytest.approx(size_gb * GB, rel=ALLOWED[why])


def test_most_published_sizes_are_met_much_closer() -> None:
    errors = sorted(abs(predicted(m, r, n, b) / (g * GB) - 1) for m, r, n, b, g, why in PUBLISHED if not why)
    assert errors[len(errors) // 2] < 0.005


PHI4 = known_shape("phi-4", SHAPES["phi-4"], 16384)
QWEN32 = known_shape("qwen2.5-coder-32b", SHAPES["qwen2.5-coder-32b"], 32768)
VL7 = known_shape("qwen2.5-vl-7b", SHAPES["qwen2.5-vl-7b"], 128000)
PICKS = {
    # GiB without the driver's context, activations and an image's transients, for bits that really are what they say.
    "phi-4": (Setup(PHI4, Quantization("exl2", 6.5, 6), cache_mode="Q8", context=16384), 12.77),
    "vl-7b": (Setup(VL7, Quantization("exl2", 8.0, 8), cache_mode="FP16", context=32768), 9.90),
    "coder-32b": (Setup(QWEN32, Quantization("exl2", 4.25, 6), cache_mode="Q6", context=32768), 19.90),
    "fuseo1-32b": (
        Setup(known_shape("fuseo1", SHAPES["fuseo1-32b"]), Quantization("exl2", 4.25, 6), "exllamav2", "Q6", 32768),
        19.90,
    ),
}
ESTIMATES = ("driver context", "activations", "image transients")


def lasting(planned: Plan) -> int:
    """What the library holds for certain."""
    return sum(part.bytes for part in planned.parts if part.where == "gpu" and part.name not in ESTIMATES)


@pytest.mark.parametrize("pick", PICKS)
def test_the_picks_for_24_gb(pick: str) -> None:
    setup, expected = PICKS[pick]
    assert lasting(plan(setup)) == pytest.approx(expected * GIB, rel=0.03)


def test_parts_of_the_coding_pick() -> None:
    planned = plan(PICKS["coder-32b"][0])
    # 64 layers, 8 heads of 128, 32768 positions: 1.0625 + 0.5625 bytes for a key and a value.
    assert planned.bytes_of("KV cache") == 64 * 8 * 128 * 32768 * 1.625
    assert planned.bytes_of("cache scratch") == 2 * 2 * 32768 * 8 * 128
    assert planned.bytes_of("rope tables") == 4 * 32768 * 128
    # mlp.py: temp_state, temp_a, temp_b and temp_dq, each but the last with 128 bytes more.
    assert (
        planned.bytes_of("dequantization scratch")
        == 2 * (2048 * (5120 + 2 * 27648) + 5120 * 27648) + 3 * 128
        == dequantization_bytes(planned.setup)
    )
    assert planned.bytes_of("embedding") == planned.host_bytes == 2 * 152064 * 5120
    assert planned.bytes_of("recurrent state") == planned.bytes_of("nonsense") == 0
    assert sum(part.bytes for part in planned.parts) == planned.gpu_bytes + planned.host_bytes


def test_the_scratch_of_a_small_model_is_that_of_its_output_head() -> None:
    shape = ModelShape(24, 1024, 16, 16, 64, 2816, 151936)
    assert dequantization_bytes(Setup(shape, Quantization("exl2", 4.0))) == 2 * (145 << 20)
    narrow = replace(shape, vocab=1000)  # padded to 1024 columns
    assert dequantization_bytes(Setup(narrow, Quantization("exl2", 4.0), chunk=256)) > 2 * 1024 * 1024


# VRAM in GB that people are told a model needs, quantized to 4 bits and with 2048 positions.
NEEDS = [
    ("Llama 2 7B", ModelShape(32, 4096, 32, 32, 128, 11008, 32000), 6, 6.74),
    ("Llama 2 13B", ModelShape(40, 5120, 40, 40, 128, 13824, 32000), 12, 13.02),
    ("Llama 2 70B", ModelShape(80, 8192, 64, 8, 128, 28672, 32000), 48, 68.98),
    ("Falcon 7B", ModelShape(32, 4544, 71, 1, 64, 18176, 65024, tied=True, gate=False), 6, 6.92),
    ("Falcon 40B", ModelShape(60, 8192, 128, 8, 64, 32768, 65024, tied=True, gate=False), 24, 41.3),
    ("MPT 7B", ModelShape(32, 4096, 32, 32, 128, 16384, 50432, tied=True, gate=False), 6, 6.65),
]


@pytest.mark.parametrize(("name", "shape", "vram_gb", "billions"), NEEDS)
def test_the_public_table_of_needs(name: str, shape: ModelShape, vram_gb: int, billions: float) -> None:
    assert parameters(shape) == pytest.approx(billions * 1e9, rel=0.005), name
    needs = plan(Setup(shape, Quantization("gptq", 4), context=2048)).gpu_bytes
    assert 0.75 * vram_gb * GB < needs <= vram_gb * GB


@pytest.mark.parametrize(("bits", "size_gb"), [(32, 280), (16, 140), (8, 70)])
def test_full_precision_takes_4_2_and_1_bytes_a_weight(bits: int, size_gb: int) -> None:
    setup = Setup(NEEDS[2][1], Quantization("full", bits))
    assert file_bytes(setup) == pytest.approx(size_gb * GB, rel=0.02)


def test_a_measured_table_of_2023_is_met_within_a_tenth() -> None:
    shape = NEEDS[0][1]
    gptq = plan(Setup(shape, Quantization("gptq", 4), context=2048)).gpu_bytes
    gguf = plan(Setup(shape, Quantization("gguf", 4.85, scheme="Q4_K_M"), "llamacpp", context=2048)).gpu_bytes
    assert gptq == pytest.approx(5466 * MIB, rel=0.1)
    assert gguf == pytest.approx(5480 * MIB, rel=0.1)


# Laws ------------------------------------------------------------------------------------------------------

towers = st.builds(
    VisionShape, depth=st.integers(1, 40), hidden=st.sampled_from([256, 768, 1280]),
    intermediate=st.sampled_from([1024, 3420, 5120]), patch=st.sampled_from([14, 16]), out=st.just(1024),
    gated=st.booleans(), window=st.sampled_from([0, 112]),
)  # fmt: skip
shapes = st.builds(
    ModelShape, layers=st.integers(4, 80), hidden=st.sampled_from([256, 896, 2048, 5120]), heads=st.integers(4, 64),
    kv_heads=st.integers(1, 16), head_dim=st.sampled_from([32, 64, 128, 256]),
    intermediate=st.sampled_from([512, 4864, 11008, 27648]), vocab=st.integers(500, 260000),
    kv_layers=st.integers(0, 4), architecture=st.sampled_from(["LlamaForCausalLM", "Phi3ForCausalLM", "Qwen2"]),
    tied=st.booleans(), gate=st.booleans(), gated_query=st.booleans(), experts=st.sampled_from([0, 8, 128]),
    experts_used=st.integers(1, 8), expert_intermediate=st.sampled_from([0, 768]),
    shared_intermediate=st.sampled_from([0, 512]), sliding_window=st.sampled_from([0, 512]),
    sliding_layers=st.integers(0, 4), mtp=st.integers(0, 1), vision=st.none() | towers,
    linear=st.none() | st.builds(LinearAttention, st.sampled_from([8, 16]), st.sampled_from([16, 48])),
)  # fmt: skip
KINDS = (
    ("exl2", "exllamav2"),
    ("gptq", "exllamav2"),
    ("full", "exllamav2"),
    ("exl3", "exllamav3"),
    ("gguf", "llamacpp"),
)


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    kind, engine = draw(st.sampled_from(KINDS))
    scheme = draw(st.sampled_from(["", "Q4_K_M", "Q8_0", "MXFP4"])) if kind == "gguf" else ""
    bits = draw(st.sampled_from([8.0, 16.0]) if kind == "full" else st.sampled_from(BITS))
    quantization = Quantization(kind, bits, draw(st.sampled_from([2, 4, 5.5, 6, 8])), scheme)
    return Setup(
        shape=draw(shapes), quantization=quantization, engine=engine, cache_mode=draw(st.sampled_from(CACHE_MODES)),
        context=draw(st.integers(1, 131072)), parallel=draw(st.integers(1, 4)),
        cache_size=draw(st.sampled_from([0, 65536])), chunk=draw(st.sampled_from([256, 512, CHUNK_TOKENS])),
        gpus=draw(st.integers(0 if engine == "llamacpp" else 1, 3)), vision=draw(st.booleans()),
        max_pixels=draw(st.sampled_from([50176, 1003520])),
    )  # fmt: skip


def total(setup: Setup) -> int:
    planned = plan(setup)
    return planned.gpu_bytes + planned.host_bytes


LARGER_SHAPE = {
    "hidden": lambda n: n + 128, "heads": lambda n: n + 4, "kv_heads": lambda n: n + 1,
    "intermediate": lambda n: n + 256,
    "vocab": lambda n: n + 1, "experts": lambda n: n + 8 if n else 0, "mtp": lambda n: n + 1,
}  # fmt: skip
LARGER_SETUP = {
    "context": lambda n: n + 1, "parallel": lambda n: n + 1, "chunk": lambda n: n + 256, "max_pixels": lambda n: n * 2,
    "gpus": lambda n: n + 1 if n else 0,
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(setups(), st.sampled_from(sorted(LARGER_SHAPE)))
def test_a_larger_shape_never_takes_less(setup: Setup, name: str) -> None:
    larger = replace(setup.shape, **{name: LARGER_SHAPE[name](getattr(setup.shape, name))})
    if setup.quantization.scheme == "Q4_K_M":
        # Rows that are whole blocks of 256 have a smaller type: wider can then be less, as it is in such files.
        larger = replace(
            larger, hidden=setup.shape.hidden, intermediate=setup.shape.intermediate, heads=setup.shape.heads
        )
    assert total(replace(setup, shape=larger)) >= total(setup)


@settings(max_examples=100, deadline=None)
@given(setups(), st.integers(1, 20))
def test_more_layers_take_more(setup: Setup, more: int) -> None:
    shape = replace(setup.shape, layers=setup.shape.layers + more, kv_layers=0)
    assert total(replace(setup, shape=shape)) > total(replace(setup, shape=replace(setup.shape, kv_layers=0)))


@settings(max_examples=150, deadline=None)
@given(setups(), st.sampled_from(sorted(LARGER_SETUP)))
def test_more_of_anything_never_takes_less(setup: Setup, name: str) -> None:
    larger = replace(setup, **{name: LARGER_SETUP[name](getattr(setup, name))})
    assert total(larger) >= total(setup)


@settings(max_examples=100, deadline=None)
@given(setups())
def test_more_bits_a_draft_and_a_tower_take_more(setup: Setup) -> None:
    bits = replace(setup.quantization, bpw=setup.quantization.bpw * 1.5)
    assert total(replace(setup, quantization=bits)) >= total(setup)
    head = replace(setup.quantization, head_bits=8)
    assert total(replace(setup, quantization=head)) >= total(setup)
    draft = Setup(ModelShape(24, 896, 14, 2, 64, 4864, 151936), Quantization("exl2", 4.0), setup.engine)
    assert total(replace(setup, draft=draft)) > total(setup)
    assert total(replace(setup, vision=True)) >= total(replace(setup, vision=False))


@settings(max_examples=60, deadline=None)
@given(setups())
def test_a_smaller_cache_mode_never_takes_a_larger_cache(setup: Setup) -> None:
    sizes = [cache_bytes(replace(setup, cache_mode=mode)) for mode in CACHE_MODES]
    assert sizes == sorted(sizes, reverse=True)


@settings(max_examples=60, deadline=None)
@given(setups(), st.integers(0, 80 * GB))
def test_the_largest_context_is_the_largest(setup: Setup, free: int) -> None:
    found = largest_context(setup, free, most=65536)
    if found:
        assert plan(replace(setup, context=found)).needs_bytes <= free
    if found < 65536:
        assert plan(replace(setup, context=found + PAGE_TOKENS)).needs_bytes > free


@settings(max_examples=60, deadline=None)
@given(setups(), st.floats(100, 4000), st.integers(0, 4096))
def test_tokens_per_second_grow_with_bandwidth_and_fall_with_length(
    setup: Setup, bandwidth: float, length: int
) -> None:
    planned = plan(setup)
    speed = tokens_per_second(planned, bandwidth, length)
    assert 0 < speed <= tokens_per_second(planned, bandwidth * 1.5, length)
    assert speed <= tokens_per_second(planned, bandwidth, 0)


# Questions ---------------------------------------------------------------------------------------------------


def test_does_it_fit_beside_others_and_after_the_unload() -> None:
    planned = plan(PICKS["coder-32b"][0])
    card = Card(24 * GIB)
    assert fit(planned, card).kind == "fits"
    taken = replace(card, used_bytes=20 * GIB)
    verdict = fit(planned, taken)
    assert not verdict.fits
    assert verdict.spare_bytes < 0
    assert "are missing" in verdict.words
    freed = fit(planned, replace(taken, released_bytes=19 * GIB))
    assert freed.fits
    assert "after the unload" in freed.words
    tight = fit(planned, Card(planned.gpu_bytes + 100 * MIB))
    assert (tight.kind, tight.fits, tight.spare_bytes) == ("tight", True, 100 * MIB)


def test_a_card_never_has_more_free_than_it_has() -> None:
    assert Card(8 * GIB, used_bytes=GIB, released_bytes=2 * GIB).free_bytes == 8 * GIB
    assert Card(8 * GIB, used_bytes=9 * GIB).free_bytes == 0


def test_the_largest_context_respects_what_the_model_was_made_for() -> None:
    setup = PICKS["phi-4"][0]
    assert largest_context(setup, 80 * GB) == 16384
    assert largest_context(setup, 80 * GB, most=8192) == 8192
    assert 0 < largest_context(setup, 13 * GB) < 16384
    assert largest_context(setup, 4 * GB) == 0
    assert largest_context(replace(setup, shape=replace(PHI4, max_positions=1000)), 80 * GB) == 768
    assert largest_context(replace(setup, shape=replace(PHI4, max_positions=0)), 200 * GB) == 131072


def test_the_best_bits_that_fit() -> None:
    setup = PICKS["coder-32b"][0]
    assert best_bits(setup, round(22.5 * GIB)) == 4.5
    assert best_bits(setup, 16 * GIB) < 4.25
    assert best_bits(setup, 4 * GIB) == 0
    assert best_bits(setup, 80 * GIB, choices=(3.0, 5.0)) == 5.0


def test_the_cache_mode_to_take_and_the_one_not_to() -> None:
    setup = PICKS["coder-32b"][0]
    free = round(22.5 * GIB)
    choice = choose_cache(setup, free)
    assert choice.mode in ("Q8", "Q6")
    assert choice.plan.gpu_bytes <= free
    assert choice.refused[0][0] == "FP16"
    nothing = choose_cache(setup, plan(replace(setup, cache_mode="Q4")).gpu_bytes)
    assert nothing.mode == ""
    assert "Qwen2" in dict(nothing.refused)["Q4"]
    phi = PICKS["phi-4"][0]
    assert choose_cache(phi, plan(replace(phi, cache_mode="Q4")).gpu_bytes).mode == "Q4"
    assert choose_cache(phi, 80 * GIB).mode == "FP16"


def test_q4_is_refused_for_qwen2_under_any_of_its_names() -> None:
    for architecture in ("Qwen2ForCausalLM", "Qwen2_5_VLForConditionalGeneration", "qwen2"):
        assert cache_warning(architecture, "Q4")
        assert not cache_warning(architecture, "Q6")
    assert not cache_warning("Qwen3ForCausalLM", "Q4")


def test_page_locked_copies() -> None:
    plans = [plan(setup) for setup, _ in PICKS.values()]
    # Two models of 18.8, one of 12.5 and one of 9.5: with the embeddings, which lie in host memory anyway.
    assert pinned_bytes(plans) == pytest.approx(59.5 * GB, rel=0.02)
    assert pinned_verdict(plans, 64 * GIB).fits
    refused = pinned_verdict(plans, 48 * GIB)
    assert not refused.fits
    assert "4 models" in refused.words
    assert refused.spare_bytes == 48 * GIB - 4 * GIB - pinned_bytes(plans)


def test_speed_counts_only_the_experts_that_are_used() -> None:
    shape = known_shape("qwen3-coder-30b-a3b", SHAPES["qwen3-coder-30b-a3b"])
    assert parameters(shape) == pytest.approx(30.5e9, rel=0.01)
    assert active_share(shape) * parameters(shape) == pytest.approx(3.0e9, rel=0.1)
    assert active_share(PHI4) == 1
    planned = plan(PICKS["phi-4"][0])
    # Not more than the bandwidth allows, and not less than half of it.
    ceiling = 936 * GB / (planned.bytes_of("weights") + planned.bytes_of("output head"))
    assert ceiling / 2 < tokens_per_second(planned, 936) < ceiling
    assert tokens_per_second(planned, 936, 16384) < 0.95 * tokens_per_second(planned, 936)


def test_on_the_cpu_everything_is_in_host_memory() -> None:
    setup = Setup(known_shape("qwen3-0.6b", SHAPES["qwen3-0.6b"]), Quantization("gguf", 8.5, scheme="Q8_0"), "llamacpp")
    planned = plan(replace(setup, gpus=0))
    assert planned.gpu_bytes == 0
    assert planned.bytes_of("driver context") == planned.bytes_of("output head") == 0
    assert plan(setup).host_bytes < planned.host_bytes
    assert 5 < tokens_per_second(planned, 40) < 100
    assert fit(planned, Card(16 * GIB)).fits
    assert not fit(planned, Card(GIB // 2)).fits
    assert 0 < largest_context(replace(setup, gpus=0), 4 * GIB) < largest_context(replace(setup, gpus=0), 8 * GIB)


@pytest.mark.parametrize(
    ("scheme", "bandwidth", "measured"),
    [("Q4_0", 936, 125.5), ("Q4_0", 1008, 146.8), ("Q4_K_M", 936, 114.7), ("Q4_K_M", 1008, 138.8)],
)
def test_speed_is_near_what_was_measured_in_2023(scheme: str, bandwidth: float, measured: float) -> None:
    # Llama 2 7B with llama.cpp on a 3090 and a 4090, by their bandwidths in GB/s.
    planned = plan(Setup(NEEDS[0][1], Quantization("gguf", 4.5, scheme=scheme), "llamacpp", context=2048))
    assert tokens_per_second(planned, bandwidth) == pytest.approx(measured, rel=0.2)


# Engines ---------------------------------------------------------------------------------------------------------


def test_cache_positions_are_whole_pages_and_shared_by_answers() -> None:
    setup = Setup(PHI4, Quantization("exl2", 4.0), context=1000, parallel=3)
    assert cache_tokens(setup) == 3 * 1024
    assert cache_tokens(replace(setup, cache_size=2000)) == 2048
    assert cache_tokens(replace(setup, cache_size=100)) == 1024
    assert cache_tokens(replace(setup, engine="llamacpp")) == 3000


def test_exllamav3_has_no_cache_scratch_and_reconstructs_one_matrix() -> None:
    shape = known_shape("qwen3.8-27b", SHAPES["qwen3.8-27b"])
    setup = Setup(shape, Quantization("exl3", 4.0), "exllamav3", "Q8", 32768)
    assert cache_scratch_bytes(setup) == 0
    assert dequantization_bytes(setup) == 2 * 5120 * 17408
    # The 16 layers with attention keep keys and values; the other 48 a state that does not grow.
    assert cache_bytes(setup) == 16 * 32768 * 4 * 256 * 2.125
    assert state_bytes(setup) == state_bytes(replace(setup, context=1024))
    assert state_bytes(setup) == pytest.approx(48 * 4 * 48 * 128 * 128, rel=0.05)
    assert dequantization_bytes(replace(setup, quantization=Quantization("full", 16))) == 0


def test_llamacpp_keeps_a_window_for_sliding_layers_and_has_no_q6() -> None:
    shape = known_shape("gpt-oss-20b", SHAPES["gpt-oss-20b"])
    setup = Setup(shape, Quantization("gguf", 4.25, scheme="MXFP4"), "llamacpp", context=32768)
    whole = cache_bytes(replace(setup, shape=replace(shape, sliding_layers=0)))
    assert cache_bytes(setup) == whole / 2 + 12 * (128 + 256) * 8 * 64 * 4
    assert cache_bytes(replace(setup, cache_mode="Q6")) == cache_bytes(replace(setup, cache_mode="Q8"))
    assert dequantization_bytes(setup) == 0


def test_an_image_costs_more_when_it_may_be_larger() -> None:
    setup = PICKS["vl-7b"][0]
    capped = image_bytes(setup)
    whole = image_bytes(replace(setup, max_pixels=12845056))
    assert capped < 512 * MIB
    assert whole > 24 * GIB  # 65,536 patches with a mask over all pairs of them: why the adapters cap an image
    assert image_bytes(replace(setup, vision=False)) == 0
    unwindowed = replace(setup, shape=replace(VL7, vision=replace(VL7.vision, window=0)))
    assert image_bytes(unwindowed) < capped


def test_what_surrounds_the_bits_of_exl3_and_gptq() -> None:
    shape = ModelShape(1, 100, 1, 1, 128, 300, 1000)
    sides = [(100, 128)] * 3 + [(128, 100)] + [(100, 300)] * 2 + [(300, 100)]
    padded = [(-(-rows // 128) * 128, -(-columns // 128) * 128) for rows, columns in sides]
    norms = 2 * 3 * 100
    # trellis, suh and svh; sides padded to 128.
    exl3 = sum(rows * columns // 2 + 2 * (rows + columns) for rows, columns in padded) + norms
    found = weight_bytes(Setup(shape, Quantization("exl3", 4, 6), "exllamav3"))
    assert found.layers == exl3
    assert found.head == 128 * 1024 * 6 // 8 + 2 * (128 + 1024)
    # qweight, qzeros and scales for each group, g_idx; the head is not quantized and padded to 32.
    gptq = sum(rows * columns / 2 + -(-rows // 128) * columns * 2.5 + 4 * rows for rows, columns in sides) + norms
    found = weight_bytes(Setup(shape, Quantization("gptq", 4)))
    assert (found.layers, found.head, found.embedding) == (gptq, 2 * 100 * 1024, 2 * 100 * 1000)


def test_an_exl2_head_is_what_the_converter_makes() -> None:
    # 8 bits for 15 % of the rows, 6 for the rest, groups of 128: 6.33 bits a weight.
    assert 8 * exl2_bytes(5120, 152064, 128, (8, 6), (0.15, 0.85)) / (5120 * 152064) == pytest.approx(6.33, abs=0.01)
    head = plan(Setup(QWEN32, Quantization("exl2", 4.25, 8))).bytes_of("output head")
    assert 8 * head / (5120 * 152064) == pytest.approx(8.035, abs=0.01)
    assert plan(Setup(QWEN32, Quantization("exl2", 4.25, 16))).bytes_of("output head") == 2 * 5120 * 152064


# Two cards ---------------------------------------------------------------------------------------------------------


def device_map(setup: Setup, split_gb: list[float]) -> list[int]:
    """Layers on each card as ExLlamaV2.set_device_map places them, written down from model.py, attn.py and mlp.py."""
    shape, chunk = setup.shape, setup.chunk
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    most = 145 << 20
    dq = {n: 2 * min(n, most) for n in (h * q, h * shape.intermediate, h * shape.vocab)}
    attention = 2 * chunk * (max(q, h) + q + 2 * kv) + 4 * 128 + dq[h * q]
    attention += 2 * 2 * setup.context * q + 128 if shape.kv_heads != shape.heads else 0
    mlp = 2 * chunk * (h + 2 * max(h, shape.intermediate)) + 3 * 128 + dq[h * shape.intermediate]
    scores = 2 * min(chunk**2, setup.context**2) * shape.heads * 2 + 128
    bits = setup.quantization.bpw / 8
    modules = [((2 * h * q + 2 * h * kv) * bits, attention, scores), (3 * h * shape.intermediate * bits, mlp, 0)]
    modules = modules * shape.layers + [(2 * h, 0, 0), (weight_bytes(setup).head, dq[h * shape.vocab], 0)]
    used = 2 * 2 * shape.head_dim * setup.context + 2 * h * chunk + 2 * chunk**2
    free = [gb * GIB - used for gb in split_gb]
    scratch, extra, placed, card = [0.0] * len(free), [0.0] * len(free), [0] * len(free), 0
    for footprint, space, attn in modules:
        while footprint + max(space, scratch[card]) + max(attn, extra[card]) > free[card]:
            card += 1
            assert card < len(free), "Insufficient space in device allocation"
        scratch[card], extra[card] = max(space, scratch[card]), max(attn, extra[card])
        free[card] -= footprint
        placed[card] += attn > 0
    return placed


@pytest.mark.parametrize("sizes_gib", [(24, 24), (12, 24), (24, 12), (16, 10, 16)])
@pytest.mark.parametrize("kv_heads", [8, 40])
def test_a_split_lands_as_planned(sizes_gib: tuple[int, ...], kv_heads: int) -> None:
    shape = replace(QWEN32, kv_heads=kv_heads)
    # A long context with shared heads: the map then reserves a copy for all heads, which is its largest scratch.
    context = 32768 if kv_heads == 8 else 4096
    setup = Setup(shape, Quantization("exl2", 4.5, 6), cache_mode="Q4", context=context)
    divided = split(setup, [Card(size * GIB, used_bytes=300 * MIB) for size in sizes_gib])
    assert divided.verdict.fits
    assert sum(share.layers for share in divided.shares) == 64
    placed = device_map(setup, [float(part) for part in divided.gpu_split.split(",")])
    assert placed == [share.layers for share in divided.shares]


def test_a_larger_card_gets_more_and_too_small_ones_are_refused() -> None:
    setup = PICKS["coder-32b"][0]
    first, last = split(setup, [Card(24 * GIB), Card(24 * GIB)]).shares
    assert first.layers > last.layers  # the last one has the output head
    assert first.bytes == pytest.approx(last.bytes, rel=0.03)
    small, large = split(setup, [Card(12 * GIB), Card(24 * GIB)]).shares
    assert small.layers < large.layers
    assert small.bytes <= 12 * GIB
    refused = split(setup, [Card(8 * GIB), Card(8 * GIB)])
    assert not refused.verdict.fits
    assert not split(setup, [Card(0), Card(0)]).verdict.fits
    draft = Setup(ModelShape(24, 896, 14, 2, 64, 4864, 151936), Quantization("exl2", 4.0))
    first = split(replace(setup, draft=draft), [Card(24 * GIB), Card(24 * GIB)]).shares[0]
    assert first.layers < split(setup, [Card(24 * GIB), Card(24 * GIB)]).shares[0].layers


def test_a_draft_model_shares_context_and_cache_mode() -> None:
    setup = PICKS["coder-32b"][0]
    draft = Setup(ModelShape(24, 896, 14, 2, 64, 4864, 151936), Quantization("exl2", 4.0), context=256)
    parts = [part for part in plan(replace(setup, draft=draft)).parts if part.name == "draft model"]
    alone = plan(replace(draft, context=32768, cache_mode="Q6"))
    assert [part.where for part in parts] == ["gpu", "host"]
    assert parts[0].bytes == alone.gpu_bytes - alone.bytes_of("driver context")
    assert parts[1].bytes == 2 * 151936 * 896


def test_two_cards_hold_what_every_card_needs_twice() -> None:
    one, two = (plan(replace(PICKS["coder-32b"][0], gpus=gpus)) for gpus in (1, 2))
    for name in ("cache scratch", "dequantization scratch", "rope tables", "driver context"):
        assert two.bytes_of(name) == 2 * one.bytes_of(name)
    assert two.bytes_of("weights") == one.bytes_of("weights")


# Presets -------------------------------------------------------------------------------------------------------------


def shipped() -> list[Variant]:
    presets = Presets([ROOT / "presets"])
    return [variant for preset in presets.list() for variant in preset.variants if variant.shape]


@pytest.mark.parametrize("variant", shipped(), ids=lambda variant: variant.title)
def test_every_shipped_variant_is_planned_at_once(variant: Variant) -> None:
    began = time.perf_counter()
    planned = plan_variant(variant, gpus=0 if variant.engine == "llamacpp" else 1)
    assert time.perf_counter() - began < 0.2
    assert planned.file_bytes == pytest.approx(variant.size_bytes, rel=0.031)
    label_gb = {"nvidia-24": 24, "nvidia-16": 16, "nvidia-12": 12, "nvidia-8": 8}.get(variant.tier)
    if label_gb:
        # A card's label is in GiB. A desktop takes up to one; the largest picks say that other programs must be closed.
        assert planned.gpu_bytes < (label_gb - 1) * GIB


def test_a_size_in_the_preset_wins_over_the_arithmetic() -> None:
    variant = Variant(
        "v", "Mixed", "llamacpp", repo="someone/Some-GGUF", file="some-UD-Q4_K_XL.gguf", size_bytes=20 * GB,
        shape=Shape(64, 5120, 24, 4, 256, 17408, 248320, 16), context=4096,
    )  # fmt: skip
    planned = plan_variant(variant)
    assert planned.file_bytes == pytest.approx(20 * GB, rel=0.001)
    assert "preset" in planned.notes[0]
    assert plan_variant(replace(variant, size_bytes=0)).notes == ()
    there = TensorBytes(9 * GB, GB, GB)
    assert plan_variant(variant, tensors=there).bytes_of("weights") == 9 * GB


def test_options_of_a_variant_count() -> None:
    variant = next(v for v in shipped() if v.title.startswith("Qwen2.5-VL 7B, 8.0"))
    plain = setup_of(variant)
    assert (plain.chunk, plain.cache_size, plain.vision) == (CHUNK_TOKENS, 0, True)
    options = Options(chunk_size=512, cache_size=65536, max_pixels=50176)
    other = setup_of(replace(variant, options=options), gpus=2)
    assert (other.chunk, other.cache_size, other.max_pixels, other.gpus) == (512, 65536, 50176, 2)
    blind = plan_variant(variant, vision=False)
    assert blind.bytes_of("vision tower") == blind.bytes_of("image transients") == 0
    assert blind.gpu_bytes < plan_variant(variant).gpu_bytes


def test_a_draft_model_counts_when_its_folder_is_there(tmp_path: Path) -> None:
    variant = next(v for v in shipped() if v.engine == "exllamav2" and "VL" not in v.title)
    folder = tmp_path / "draft"
    drafted = replace(variant, options=Options(draft_model=str(folder)))
    alone = plan_variant(variant)
    assert plan_variant(drafted).gpu_bytes == alone.gpu_bytes  # nothing there, nothing to count
    folder.mkdir()
    folder_with(folder, ".q_weight", {"quantization_config": {"bits": 4.0}})
    read = setup_of(drafted).draft
    assert read is not None and (read.shape.layers, read.quantization.kind) == (2, "exl2")
    planned = plan_variant(drafted)
    ahead = planned.bytes_of("draft model")
    keys = 2 * 2 * 16 * variant.context  # layers, heads, width: at least one byte each for a key and a value
    assert ahead > keys
    assert planned.gpu_bytes > alone.gpu_bytes and planned.gpu_bytes + planned.host_bytes == (
        alone.gpu_bytes + alone.host_bytes + ahead
    )
    for broken in ("{", '{"hidden_size": []}'):
        (folder / "config.json").write_text(broken)
        assert setup_of(drafted).draft is None


def test_a_variant_without_a_shape_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match="no shape"):
        plan_variant(Variant("v", "Bare", "exllamav2", repo="a/b"))


def test_bits_in_names() -> None:
    assert nominal("exl2", 6.5, "TheMelonGod/phi-4-exl2-8hb-6.5bpw").head_bits == 8
    assert nominal("exl3", 3.5, "ArtusDev/Qwen-EXL3-3.5bpw_H6").head_bits == 6
    assert nominal("exl2", 4.25, "bartowski/x-4_25") == Quantization("exl2", 4.25, 6)
    assert nominal("exl2", 8.0).bpw < 8 == nominal("exl3", 8.0).bpw
    for file, scheme in (
        ("a-Q4_K_M.gguf", "Q4_K_M"), ("b.Q8_0.gguf", "Q8_0"), ("c-q6_k.gguf", "Q6_K"), ("d-UD-Q4_K_XL.gguf", ""),
        ("mmproj-F16.gguf", "F16"), ("e-mxfp4.gguf", "MXFP4"), ("f.gguf", ""),
    ):  # fmt: skip
        assert scheme_of(file) == scheme


# Files ------------------------------------------------------------------------------------------

QWEN_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40,
    "num_hidden_layers": 64, "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}  # fmt: skip


def test_a_plain_config() -> None:
    assert shape_of_config(QWEN_CONFIG) == QWEN32


def test_a_vision_config() -> None:
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "hidden_size": 3584, "intermediate_size": 18944,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15],
        },
    }  # fmt: skip
    assert shape_of_config(config) == VL7
    old = {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1536,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
    }
    tower = shape_of_config(config | {"vision_config": old}).vision
    assert tower
    assert (tower.hidden, tower.intermediate, tower.gated) == (1280, 5120, False)
    siglip = config | {
        "vision_config": {"num_hidden_layers": 12, "hidden_size": 768, "image_size": 512, "patch_size": 16}
    }
    small = shape_of_config(siglip).vision
    assert small
    assert (small.positions, small.merger_hidden, small.depth) == (1024, 0, 12)


def test_a_hybrid_config_with_a_text_table() -> None:
    text = {
        "hidden_size": 5120, "intermediate_size": 17408, "num_attention_heads": 24, "num_hidden_layers": 64,
        "head_dim": 256, "num_key_value_heads": 4, "vocab_size": 248320, "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "full_attention_interval": 4, "mtp_num_hidden_layers": 1, "max_position_embeddings": 262144,
    }  # fmt: skip
    config = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text, "vision_config": "none"}
    shape = shape_of_config(config)
    expected = known_shape("qwen3.8-27b", SHAPES["qwen3.8-27b"], 262144)
    assert shape == replace(expected, vision=None)
    typed = config | {"text_config": text | {"layer_types": ["linear_attention"] * 54 + ["full_attention"] * 10}}
    assert shape_of_config(typed).kv_layers == 10


def test_older_and_mixed_configs() -> None:
    falcon = {"architectures": ["FalconForCausalLM"], "hidden_size": 4544, "num_attention_heads": 71,
              "multi_query": True, "num_hidden_layers": 32, "vocab_size": 65024,
              "tie_word_embeddings": True}  # fmt: skip
    assert shape_of_config(falcon) == replace(NEEDS[3][1], architecture="FalconForCausalLM")
    mpt = {"architectures": ["MPTForCausalLM"], "d_model": 4096, "n_heads": 32, "n_layers": 32, "expansion_ratio": 4,
           "vocab_size": 50432, "tie_word_embeddings": True}  # fmt: skip
    assert shape_of_config(mpt) == replace(NEEDS[5][1], architecture="MPTForCausalLM")
    mixed = QWEN_CONFIG | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
                           "layer_types": ["sliding_attention", "full_attention"] * 32,
                           "sliding_window": 128}  # fmt: skip
    shape = shape_of_config(mixed)
    assert (shape.experts, shape.experts_used, shape.expert_intermediate) == (128, 8, 768)
    assert (shape.sliding_layers, shape.sliding_window, shape.kv_layers) == (32, 128, 0)


@pytest.mark.parametrize("missing", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"])
def test_a_config_that_lacks_a_number_is_refused(missing: str) -> None:
    config = {key: value for key, value in QWEN_CONFIG.items() if key != missing}
    with pytest.raises(ModelFilesDamaged):
        shape_of_config(config | {missing: True})


def safetensors(path: Path, sizes: dict[str, int]) -> None:
    """A file with these tensors, all of them zero."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(at))


SMALL_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512,
}  # fmt: skip


def folder_with(path: Path, ending: str, config: dict[str, object], head: bool = True) -> Path:
    sizes = {f"model.layers.{i}.mlp.down_proj{ending}": 8192 for i in range(2)}
    sizes |= {"model.embed_tokens.weight": 12800, "model.norm.weight": 128, "mtp.fc.weight": 50}
    sizes |= {"visual.blocks.0.attn.qkv.weight": 300} | ({f"lm_head{ending}": 4000} if head else {})
    safetensors(path / "output.safetensors", sizes)
    (path / "config.json").write_text(json.dumps(SMALL_CONFIG | config))
    return path


def test_a_folder_is_sorted_by_use(tmp_path: Path) -> None:
    model = read_folder(folder_with(tmp_path, ".q_weight", {"quantization_config": {"bits": 4.0, "head_bits": 8}}))
    tensors = model.tensors
    assert (tensors.layers, tensors.head, tensors.embedding) == (2 * 8192 + 128, 4000, 12800)
    assert (tensors.vision, tensors.other, tensors.per_layer) == (300, 50, (8192, 8192))
    assert tensors.total == sum((tensors.layers, 4000, 12800, 300, 50))
    assert (model.quantization.kind, model.quantization.head_bits) == ("exl2", 8)
    planned = plan(Setup(model.shape, model.quantization, context=512), tensors)
    assert planned.file_bytes == tensors.total
    assert planned.bytes_of("output head") == 4000


@pytest.mark.parametrize(
    ("ending", "kind"), [(".q_weight", "exl2"), (".trellis", "exl3"), (".qweight", "gptq"), (".weight", "full")]
)
def test_the_kind_is_told_by_the_tensors(tmp_path: Path, ending: str, kind: str) -> None:
    model = read_folder(folder_with(tmp_path, ending, {"quantization_config": {"group_size": -1}}, head=False))
    assert model.quantization.kind == kind
    if kind == "gptq":
        assert (model.quantization.bpw, model.quantization.group) == (4, 64)
    # Tied: the engine makes a head of the embedding.
    assert model.tensors.head == 12800


@pytest.mark.parametrize(
    "raw",
    [b"", struct.pack("<Q", 99) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{x",
     struct.pack("<Q", 9) + b'{"a": {}}', struct.pack("<Q", 8) + b'{"a": 1}'],
)  # fmt: skip
def test_a_damaged_safetensors_header_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ModelFilesDamaged):
        safetensors_sizes(path)


@pytest.mark.parametrize("name", ["assistant", "coding", "reasoning", "vision"])
def test_the_bundled_models(name: str) -> None:
    path = ROOT / "demo" / "models" / f"{name}-q8_0.gguf"
    model = read_gguf(path)
    expected = next(v.shape for v in shipped() if v.bundled == name)
    assert {f: getattr(model.shape, f) for f in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab")} == {
        f: getattr(expected, f) for f in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab")
    }
    assert model.quantization.scheme == "Q8_0"
    assert model.quantization.bpw == pytest.approx(8.5, rel=0.05)
    setup = Setup(model.shape, model.quantization, "llamacpp", context=2048)
    assert model.tensors.layers == pytest.approx(weight_bytes(setup).layers, rel=0.02)
    sizes = {tensor: size for tensor, (_, size) in gguf_tensors(path)[1].items()}
    shared = model.tensors.head if model.shape.tied else 0
    assert model.tensors.total - shared == sum(sizes.values()) < path.stat().st_size


def gguf(path: Path, values: list[tuple[str, int, bytes]], tensors: list[tuple[str, tuple[int, ...], int]]) -> Path:
    """A GGUF file of single-precision tensors; values are name, type and raw bytes."""
    raw, at = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)), 0
    for name, kind, value in values:
        raw += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value
    for name, shape, size in tensors:
        raw += struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        raw += struct.pack("<IQ", 0, at)
        at += size
    raw += bytes(-len(raw) % 32) + bytes(at)
    path.write_bytes(raw)
    return path


def u32(name: str, number: int) -> tuple[str, int, bytes]:
    return name, 4, struct.pack("<I", number)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def test_a_hybrid_gguf_with_lists(tmp_path: Path) -> None:
    heads = struct.pack("<IQ4I", 4, 4, 0, 0, 0, 2)  # a number for each layer; those without attention have none
    values = [
        ("general.architecture", 8, text("qwen35")), u32("qwen35.block_count", 4), u32("qwen35.embedding_length", 64),
        u32("qwen35.attention.head_count", 4), ("qwen35.attention.head_count_kv", 9, heads),
        u32("qwen35.attention.key_length", 32), u32("qwen35.feed_forward_length", 128),
        u32("qwen35.full_attention_interval", 4), u32("qwen35.ssm.time_step_rank", 8), u32("qwen35.ssm.group_count", 4),
        u32("qwen35.ssm.state_size", 16), u32("qwen35.context_length", 4096),
        ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("bc")),
        ("tokenizer.ggml.scores", 9, struct.pack("<IQ", 6, 5000) + bytes(20000)),
        ("general.alignment", 4, struct.pack("<I", 32)), ("general.file_type", 4, struct.pack("<I", 99)),
    ]  # fmt: skip
    tensors = [("blk.3.attn_k.weight", (64, 64), 16384), ("token_embd.weight", (64, 100), 25600),
               ("output.weight", (64, 100), 25600), ("blk.0.ffn_gate.weight", (64, 128), 32768)]  # fmt: skip
    model = read_gguf(gguf(tmp_path / "m.gguf", values, tensors))
    assert (model.shape.kv_heads, model.shape.kv_layers, model.shape.vocab, model.shape.tied) == (2, 1, 100, False)
    assert model.shape.linear == LinearAttention(4, 8, 16)
    assert model.tensors.embedding == model.tensors.head == 25600
    assert model.tensors.per_layer == (32768, 0, 0, 16384)
    assert model.quantization.scheme == ""


def test_a_projector_is_no_text_model(tmp_path: Path) -> None:
    values = [("general.architecture", 8, text("clip"))]
    path = gguf(tmp_path / "mmproj.gguf", values, [("v.patch_embd.weight", (4, 8), 128), ("mm.0.weight", (4, 8), 128)])
    assert set(gguf_tensors(path)[1]) == {"v.patch_embd.weight", "mm.0.weight"}
    with pytest.raises(ModelFilesDamaged, match="no text model"):
        read_gguf(path)


@pytest.mark.parametrize(
    "raw",
    [b"", b"GGUF", b"GGML" + bytes(40), b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**60) + b"x",
     b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<I", 77),
     b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 5) + text("a"),
     b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 0, 2**63),
     b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64)],
)  # fmt: skip
def test_a_damaged_gguf_header_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(ModelFilesDamaged):
        read_gguf(path)


def test_a_damaged_config_file_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, ".weight", {})
    for raw in ("[1]", "{"):
        (folder / "config.json").write_text(raw)
        with pytest.raises(ModelFilesDamaged):
            read_folder(folder)


def test_the_cards_of_a_machine_as_a_plan_sees_them() -> None:
    """What is not free is used, by whomever; what is ours comes back; a card that says nothing is left out."""
    told = SeenCard(
        0, "RTX 4090", total_bytes=24 * GIB, used_bytes=9 * GIB, free_bytes=14 * GIB, ours_bytes=5 * GIB,
        others_bytes=4 * GIB,
    )  # fmt: skip
    machine = Machine(
        0.0, Driver("ok"), (told, replace(told, index=1, ours_bytes=None), told.without_values("lost", "Gone."),
                            SeenCard(3, "RTX 3060")),
        Cpu("", 1, 1, 1.0), Memory(0, 0), Disk("/"), System("Linux", "", "", (3, 11, 0), 64),
    )  # fmt: skip
    cards = cards_of(machine)
    assert cards == [Card(24 * GIB, 10 * GIB, 5 * GIB), Card(24 * GIB, 10 * GIB, 0)]
    assert [card.free_bytes for card in cards] == [19 * GIB, 14 * GIB]


SANE = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "intermediate_size": 128, "max_position_embeddings": 2048,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "named"),
    [({"num_hidden_layers": 10**10}, "layers is 10000000000"), ({"hidden_size": 10**6}, "hidden is 1000000"),
     ({"num_hidden_layers": -4}, "num_hidden_layers is -4"), ({"hidden_size": -4096}, "hidden_size is -4096"),
     ({"max_position_embeddings": -5}, "max_position_embeddings is -5"), ({"vocab_size": 10**5000}, "vocab is huge"),
     ({"num_key_value_heads": 0}, "kv_heads is 0"),
     ({"full_attention_interval": 0, "linear_num_value_heads": 4}, "full_attention_interval is 0"),
     ({"linear_num_value_heads": 4, "linear_key_head_dim": 10**9}, "key_dim"),
     ({"linear_num_value_heads": 4, "layer_types": ["full_attention"] * 9}, "9 of 4 layers"),
     ({"vision_config": {"patch_size": 0}}, "patch_size is 0"), ({"vision_config": {"depth": 10**9}}, "depth")],
)  # fmt: skip
def test_figures_of_no_model_are_refused(more: dict[str, object], named: str) -> None:
    assert shape_of_config(SANE).layers == 4
    with pytest.raises(ModelFilesDamaged, match=named):
        shape_of_config(SANE | more)


@pytest.mark.parametrize("bits", [-4, 0, 1e9, math.nan, math.inf, True, "4"])
def test_bits_of_no_quantization_are_refused(bits: object) -> None:
    with pytest.raises(ModelFilesDamaged, match="bits is"):
        stated_bits(bits)
    assert stated_bits(4) == stated_bits(4.0) == 4


def test_layers_that_fit_nowhere_are_divided_at_once() -> None:
    """The work grows with the cards and not with the layers: so many one by one would take hours."""
    full = Card(24 * GIB, 24 * GIB)
    shape = replace(PHI4, layers=10**10)
    spread = split(Setup(shape, Quantization("full", 16.0)), [full, full])
    assert sum(share.layers for share in spread.shares) == 10**10
    assert not spread.verdict.fits


def test_a_gguf_with_figures_of_no_model_is_refused(tmp_path: Path) -> None:
    table = [("token_embd.weight", (64, 100), 25600)]
    for key, number in (("block_count", 2**32 - 1), ("embedding_length", 2**31), ("context_length", 2**32 - 1)):
        said = {"block_count": 4, "embedding_length": 64, "attention.head_count": 4, "feed_forward_length": 128}
        said[key] = number
        values = [("general.architecture", 8, text("llama")), *(u32(f"llama.{k}", n) for k, n in said.items())]
        with pytest.raises(ModelFilesDamaged):
            read_gguf(gguf(tmp_path / "m.gguf", values, table))


def test_a_header_is_not_read_before_its_length_is_checked(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, ".weight", {})
    with (folder / "output.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", (3 << 30) - 8))
        file.truncate(3 << 30)  # a hole: takes no disk
    with pytest.raises(ModelFilesDamaged, match="header has"):
        read_folder(folder)
    (folder / "config.json").write_text(json.dumps(SMALL_CONFIG | {"filler": "x" * (5 << 20)}))
    with pytest.raises(ModelFilesDamaged, match="larger than"):
        read_folder(folder)


def test_tensors_that_end_before_they_begin_are_refused(tmp_path: Path) -> None:
    raw = json.dumps({"model.layers.0.a.weight": {"dtype": "F16", "shape": [1], "data_offsets": [10**12, 0]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(ModelFilesDamaged, match="makes no sense"):
        safetensors_sizes(path)


def test_a_folder_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL_CONFIG))
    with pytest.raises(ModelNotDownloaded, match=r"no \*.safetensors"):
        read_folder(tmp_path)
    safetensors(tmp_path / "model-00001-of-00002.safetensors", {"model.norm.weight": 128})
    with pytest.raises(ModelNotDownloaded, match="model-00002-of-00002"):
        read_folder(tmp_path)
    safetensors(tmp_path / "model-00002-of-00002.safetensors", {"model.layers.0.mlp.up_proj.weight": 8192})
    assert read_folder(tmp_path).tensors.layers == 8320
    named = {"weight_map": {"model.norm.weight": "other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(named))
    with pytest.raises(ModelNotDownloaded, match="no file other"):
        read_folder(tmp_path)
