"""How much memory a model takes and how fast it can be: pure arithmetic, with the source of each formula.

From a model's shape, its quantization and how it is to be run, to bytes by part, on
the card and in the computer's memory; and from those to what a person asks: does it
fit, which context, which bits per weight and which cache mode fit, how is it split
over two cards. Reads the headers of files when it is asked to, never weights. Asks
no card, no process and no preset folder; what the machine has is handed in.

Exact where the libraries allocate exactly (weights, output head, KV cache, scratch).
Estimates, each marked so at its definition: the driver's context, activations, what
an image takes while it is read, and tokens per second.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .errors import ModelFilesDamaged, ModelFilesError
from .hardware import Machine
from .library import check_safetensors, read_config, whole_weights
from .presets import CACHE_MODES, Options, Shape, Variant

GB, MIB, GIB = 10**9, 2**20, 2**30
PAGE_TOKENS = 256  # of both ExLlama caches
CHUNK_TOKENS = 2048  # of a prompt at once; our adapters' default
BATCH_TOKENS = 256  # of llama.cpp, as our adapter sets it
MAX_OUTPUT_TOKENS = 16  # positions with logits at once, as our adapter of ExLlamaV2 sets it
MAX_DQ_ELEMENTS = 145 << 20  # ExLlamaV2's max_dq_size, as our adapter sets it
MAX_PIXELS = 1280 * 28 * 28  # of one image, our adapters' default
RAM_RESERVE_BYTES = 4 * GIB  # what page-locked copies leave to the rest of the computer
# Estimate: CUDA context, cuBLAS workspace and loaded kernels; 0.3 to 0.6 GB were seen with torch, less with llama.cpp.
DRIVER_BYTES = {"exllamav2": 450 * MIB, "exllamav3": 450 * MIB, "llamacpp": 300 * MIB}
TIGHT_BYTES = 512 * MIB  # with less to spare than this, a browser or a video can be the one too many
# Bytes of one key or value element: ExLlamaV2Cache_Q (cache.py: Q6 is 8-bit keys and 4-bit values) and CacheLayer_quant
# (exllamav3, cache/quant.py), a half-precision scale per 32 in both; llama.cpp's Q8_0 and Q4_0 come to the same.
_SCALE = 2 / 32
CACHE_BYTES = {
    "FP16": (2.0, 2.0), "Q8": (1 + _SCALE, 1 + _SCALE), "Q6": (1 + _SCALE, 0.5 + _SCALE), "Q4": (0.5 + _SCALE,) * 2,
}  # fmt: skip
# Bits per weight that ExLlama models are offered with.
BITS = (2.2, 2.5, 3.0, 3.5, 4.0, 4.25, 4.5, 5.0, 6.0, 6.5, 8.0)
# What ExLlamaV2's converter reaches when 8 is asked for: its choice of options stops where nothing is gained any more.
# From Qwen2-VL-7B at 8.0 bpw, whose files have 9.02 GB; at 6.5 and below the average is what was asked for.
EXL2_MOST_BITS = 7.6


# What a model is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionShape:
    """A vision tower. positions are rows of a learned table, mergers further projections (deepstack), merge per side.

    merger_hidden 0 means that one matrix leads to the text model, as in SmolVLM.
    """

    depth: int
    hidden: int
    intermediate: int
    patch: int
    out: int
    merge: int = 2
    temporal: int = 2
    gated: bool = False
    positions: int = 0
    mergers: int = 0
    merger_hidden: int = -1
    window: int = 0


@dataclass(frozen=True)
class LinearAttention:
    """The layers without a growing cache of a hybrid model (gated delta net)."""

    key_heads: int
    value_heads: int
    key_dim: int = 128
    value_dim: int = 128
    kernel: int = 4

    @property
    def channels(self) -> int:
        """Width of what goes through the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class ModelShape(Shape):
    """A preset's Shape and what it leaves open.

    tied: the output head is the embedding. gate: three matrices in the MLP, not two.
    gated_query: the query projection also makes a gate (Qwen3.5). experts with
    expert_intermediate; shared_intermediate is the expert that always runs.
    sliding_layers see sliding_window tokens only. mtp: layers for multi-token
    prediction in the files, which are not loaded. max_positions 0: not known.
    """

    architecture: str = ""
    tied: bool = False
    gate: bool = True
    gated_query: bool = False
    experts: int = 0
    experts_used: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    sliding_window: int = 0
    sliding_layers: int = 0
    mtp: int = 0
    max_positions: int = 0
    linear: LinearAttention | None = None
    vision: VisionShape | None = None

    @staticmethod
    def of(shape: Shape, **more: Any) -> ModelShape:
        """A ModelShape with a preset's numbers."""
        return ModelShape(**{f.name: getattr(shape, f.name) for f in fields(shape)} | more)

    @property
    def cache_layers(self) -> int:
        """Layers that keep a growing cache."""
        return self.kv_layers or self.layers

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Quantization:
    """How weights are stored. kind: exl2, exl3, gptq, gguf or full.

    bpw is the average over the layers' matrices, all overhead included for exl2 and
    gguf, without scales for gptq and exl3; 32, 16 or 8 for full. scheme is a GGUF
    file type such as Q4_K_M, which tells more than an average.
    """

    kind: str
    bpw: float
    head_bits: float = 6
    scheme: str = ""
    group: int = 128


@dataclass(frozen=True)
class TensorBytes:
    """Bytes of a model's tensors by use, as its headers say. per_layer holds the layers of the text model in order."""

    layers: int
    head: int
    embedding: int
    vision: int = 0
    other: int = 0
    per_layer: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return self.layers + self.head + self.embedding + self.vision + self.other


@dataclass(frozen=True)
class Setup:
    """A model and how it is to be run: all that decides its memory.

    context is in tokens for one answer, parallel how many answers at once, cache_size
    where it is not 0 the tokens for all of them; gpus 0 runs llama.cpp on the CPU.
    draft is a smaller model that runs ahead.
    """

    shape: ModelShape
    quantization: Quantization
    engine: str = "exllamav2"
    cache_mode: str = "FP16"
    context: int = 4096
    parallel: int = 1
    cache_size: int = 0
    chunk: int = CHUNK_TOKENS
    gpus: int = 1
    vision: bool = True
    max_pixels: int = MAX_PIXELS
    draft: Setup | None = None


# What comes out ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One use of memory. where is gpu or host."""

    name: str
    bytes: int
    where: str = "gpu"


@dataclass(frozen=True)
class Plan:
    """A setup in bytes. file_bytes is what the checkpoint takes on disk; notes are sentences for a person."""

    setup: Setup
    parts: tuple[Part, ...]
    file_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def gpu_bytes(self) -> int:
        """On all cards together."""
        return sum(part.bytes for part in self.parts if part.where == "gpu")

    @property
    def host_bytes(self) -> int:
        return sum(part.bytes for part in self.parts if part.where == "host")

    @property
    def needs_bytes(self) -> int:
        """What has to be free: on the cards, or in the computer's memory for a model on the CPU."""
        return self.gpu_bytes if self.setup.gpus else self.host_bytes

    def bytes_of(self, name: str) -> int:
        """Bytes of one part; 0 where the plan has no such part."""
        return sum(part.bytes for part in self.parts if part.name == name)


@dataclass(frozen=True)
class Card:
    """A graphics card's memory. used_bytes includes our own model, released_bytes is what its unload gives back."""

    total_bytes: int
    used_bytes: int = 0
    released_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """What a new model can take after the planned unload."""
        return max(0, min(self.total_bytes, self.total_bytes - self.used_bytes + self.released_bytes))


def cards_of(machine: Machine) -> list[Card]:
    """The cards that answer, as a plan sees them; what our own models hold counts as released.

    Everything that is not free counts as used: other programs' memory, and what the driver keeps for itself.
    """
    return [
        Card(card.total_bytes, max(0, card.total_bytes - card.free_bytes), card.ours_bytes or 0)
        for card in machine.working_cards
        if card.total_bytes and card.free_bytes is not None
    ]


@dataclass(frozen=True)
class Verdict:
    """kind: fits, tight or does not fit. spare_bytes is negative where memory is missing."""

    kind: str
    words: str
    spare_bytes: int

    @property
    def fits(self) -> bool:
        return self.kind != "does not fit"


@dataclass(frozen=True)
class CacheChoice:
    """The cache mode to take, empty where none fits, and each mode that was passed over with the reason."""

    mode: str
    plan: Plan
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Share:
    """What one card gets. split_gb is the number for ExLlama's gpu_split, in GiB: without the cache."""

    layers: int
    bytes: int
    split_gb: float


@dataclass(frozen=True)
class Split:
    """A model over several cards, in their order. verdict is about the fullest card."""

    shares: tuple[Share, ...]
    verdict: Verdict

    @property
    def gpu_split(self) -> str:
        """The option as the adapters read it."""
        return ",".join(f"{share.split_gb:.3f}" for share in self.shares)

    @property
    def used(self) -> int:
        """How many cards get layers."""
        return sum(share.layers > 0 for share in self.shares)


# Weights -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matrix:
    """rows go in, columns come out; count of them in the whole model. role decides a GGUF tensor's type."""

    role: str
    rows: int
    columns: int
    count: float = 1


def _attention(shape: ModelShape, count: float) -> Iterator[_Matrix]:
    h, q, kv = shape.hidden, shape.q_width, shape.kv_width
    if shape.architecture.startswith("Phi3"):  # GGUF keeps them in one; the ExLlama formats take them apart
        yield _Matrix("qkv", h, q, count)
        yield _Matrix("qkv", h, 2 * kv, count)
    else:
        yield _Matrix("q", h, q * (2 if shape.gated_query else 1), count)
        yield _Matrix("k", h, kv, count)
        yield _Matrix("v", h, kv, count)
    yield _Matrix("o", q, h, count)


def _mlp(shape: ModelShape, count: float) -> Iterator[_Matrix]:
    h = shape.hidden
    widths = [(shape.intermediate, 1, "")]
    if shape.experts:
        widths = [(shape.expert_intermediate or shape.intermediate, shape.experts, "expert_")]
        if shape.shared_intermediate:
            widths.append((shape.shared_intermediate, 1, ""))
    for width, times, kind in widths:
        if shape.gate:
            yield _Matrix(kind + "gate", h, width, count * times)
        yield _Matrix(kind + "up", h, width, count * times)
        yield _Matrix(kind + "down", width, h, count * times)


def _linear_of(shape: ModelShape) -> LinearAttention:
    return shape.linear or LinearAttention(16, max(1, shape.hidden // 128))


def matrices(shape: ModelShape) -> list[_Matrix]:
    """Every quantized matrix of the text model's layers."""
    found = [*_attention(shape, shape.cache_layers), *_mlp(shape, shape.layers)]
    others = shape.layers - shape.cache_layers
    if others:
        linear, h = _linear_of(shape), shape.hidden
        values = linear.value_heads * linear.value_dim
        found += [
            _Matrix("qkv", h, linear.channels, others),
            _Matrix("gate", h, values, others),
            _Matrix("o", values, h, others),
        ]
    return found


def _extra_matrices(shape: ModelShape) -> list[_Matrix]:
    """Of the layers for multi-token prediction: one block each, and a matrix that joins two states."""
    if not shape.mtp:
        return []
    join = _Matrix("o", 2 * shape.hidden, shape.hidden, shape.mtp)
    return [*_attention(shape, shape.mtp), *_mlp(shape, shape.mtp), join]


def layer_parameters(shape: ModelShape) -> int:
    """Weights in the layers' matrices."""
    return round(sum(m.rows * m.columns * m.count for m in matrices(shape)))


def parameters(shape: ModelShape) -> int:
    """Weights of the text model, embedding and output head included."""
    return layer_parameters(shape) + shape.vocab * shape.hidden * (1 if shape.tied else 2)


def _plain_parameters(shape: ModelShape) -> int:
    """Weights that stay in full or half precision: norms, routers, and the small parts of linear attention."""
    h = shape.hidden
    plain = (2 * shape.layers + 1) * h + shape.layers * shape.experts * h
    others = shape.layers - shape.cache_layers
    if others:
        linear = _linear_of(shape)
        plain += others * (linear.channels * linear.kernel + 2 * linear.value_heads * (h + 1))
    return plain


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


# Bits of a block type, scales included (ggml-common.h: bytes of a block over its elements).
TYPE_BITS = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q4_K": 4.5, "Q3_K": 3.4375,
    "Q2_K": 2.625, "Q5_1": 6.0, "Q5_0": 5.5, "Q4_1": 5.0, "Q4_0": 4.5, "MXFP4": 4.25, "IQ4_NL": 4.5, "IQ4_XS": 4.25,
}  # fmt: skip
# llama-quant.cpp: what takes the place of a type whose blocks of 256 do not divide a row.
SMALL_ROWS = {
    "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
# llama-quant.cpp: base type, the better one for values and down projections of half the layers, fused query-key-value.
MIXES = {"Q4_K_M": ("Q4_K", "Q6_K", "Q5_K"), "Q5_K_M": ("Q5_K", "Q6_K", "Q6_K")}


def _gguf_bits(role: str, rows: int, quantization: Quantization, layers: int) -> float:
    """Bits per weight of a GGUF tensor by its role. Source: llama_tensor_get_type in llama-quant.cpp."""
    scheme = quantization.scheme
    if scheme == "MXFP4":  # gpt-oss: the experts only
        return TYPE_BITS["MXFP4" if role.startswith("expert_") else "Q8_0"]
    if scheme in MIXES:
        base, better, fused = MIXES[scheme]
        small = rows % 256 != 0
        if role == "head":
            return TYPE_BITS["Q8_0" if small else "Q6_K"]
        if role == "qkv":
            base = fused
        plain = TYPE_BITS[SMALL_ROWS[base] if small else base]
        if role.removeprefix("expert_") not in ("v", "down"):
            return plain
        good = TYPE_BITS[SMALL_ROWS[better] if small else better]
        share = sum(more_bits(i, layers) for i in range(layers)) / layers
        return plain + (good - plain) * share
    base = scheme.removesuffix("_S").removesuffix("_M").removesuffix("_L")
    return TYPE_BITS.get(base, quantization.bpw)


def more_bits(layer: int, layers: int) -> bool:
    """use_more_bits in llama-quant.cpp."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _matrix_bytes(role: str, rows: int, columns: int, quantization: Quantization, layers: int = 1) -> float:
    """Bytes of one quantized matrix."""
    bits, kind = quantization.bpw, quantization.kind
    if kind == "gguf":
        return rows * columns * _gguf_bits(role, rows, quantization, layers) / 8
    if kind == "exl3":  # LinearEXL3: trellis, and suh and svh in half precision; sides padded to 128
        rows, columns = _up(rows, 128), _up(columns, 128)
        return rows * columns * bits / 8 + 2 * (rows + columns)
    if kind == "gptq":  # qweight, qzeros, scales, g_idx
        groups = math.ceil(rows / quantization.group)
        return rows * columns * bits / 8 + groups * columns * (bits / 8 + 2) + 4 * rows
    return rows * columns * bits / 8


# ExLlamaV2's options for the output head (conversion/qparams.py, qparams_headoptions): group size, bits, shares.
_HEAD_OPTIONS = {
    2: (32, (4, 2), (0.3, 0.7)), 3: (32, (4, 3), (0.15, 0.85)), 4: (32, (6, 4), (0.15, 0.85)),
    5: (128, (6, 5), (0.15, 0.85)), 6: (128, (8, 6), (0.15, 0.85)), 8: (128, (8,), (1.0,)),
}  # fmt: skip


def exl2_bytes(rows: int, columns: int, group: int, bits: Sequence[int], shares: Sequence[float]) -> int:
    """Bytes of an EXL2 matrix: QParams.total_bits in exllamav2's conversion/qparams.py. columns are padded to 32."""
    columns, left, groups, packed = _up(columns, 32), rows, 0, 0
    for width, share in zip(bits, shares, strict=True):
        count = math.ceil(min(rows * share, left) / group)
        used = min(left, count * group)
        groups, packed, left = groups + count, packed + used * columns * width, left - used
    return (packed + groups * (16 + 32 + 4 * columns) + 32 * rows) // 8


def _head_bytes(shape: ModelShape, quantization: Quantization) -> int:
    """The output head as the engine holds it on the card."""
    h, v, kind = shape.hidden, shape.vocab, quantization.kind
    if kind == "exl2" and quantization.head_bits in _HEAD_OPTIONS:
        return exl2_bytes(h, v, *_HEAD_OPTIONS[int(quantization.head_bits)])
    if kind == "exl3" and quantization.head_bits < 16:
        return round(_matrix_bytes("head", h, v, replace(quantization, bpw=quantization.head_bits)))
    if kind in ("gguf", "full"):
        role = "embedding" if shape.tied and quantization.scheme not in MIXES else "head"
        return round(_matrix_bytes(role, h, v, quantization))
    return round(h * _up(v, 32) * min(16.0, quantization.head_bits if kind == "exl2" else 16.0) / 8)


def _embedding_bytes(shape: ModelShape, quantization: Quantization) -> int:
    if quantization.kind == "gguf":
        # A tied table serves as the head as well, and gets the head's type.
        role = "head" if shape.tied else "embedding"
        return round(_matrix_bytes(role, shape.hidden, shape.vocab, quantization))
    bits = quantization.bpw if quantization.kind == "full" else 16
    return round(shape.vocab * shape.hidden * bits / 8)


def _tower_matrices(tower: VisionShape) -> list[_Matrix]:
    """From the modules of exllamav2's vlm/vision_tower.py and exllamav3's qwen3_vl.py."""
    h, i = tower.hidden, tower.intermediate
    merged = h * tower.merge**2
    inner = merged if tower.merger_hidden < 0 else tower.merger_hidden
    found = [
        _Matrix("qkvo", h, 4 * h, tower.depth),
        _Matrix("up", h, 2 * i if tower.gated else i, tower.depth),
        _Matrix("down", i, h, tower.depth),
        _Matrix("merger", inner or merged, tower.out, 1 + tower.mergers),
    ]
    if inner:
        found.append(_Matrix("merger", merged, inner, 1 + tower.mergers))
    return found


def vision_bytes(tower: VisionShape, scheme: str = "F16") -> int:
    """A tower's bytes in a file or on the card.

    ExLlama's towers are in half precision. A projector in GGUF has a scheme; norms, biases and positions are in single
    precision there, the first convolution too unless the scheme is F16, and rows that are no whole blocks of 32 are
    in half precision. Source: tensor_force_quant of the vision models in llama.cpp's convert_hf_to_gguf.py.
    """
    bits = TYPE_BITS.get(scheme, 16.0)
    weights = sum(m.rows * m.columns * m.count * (16.0 if m.rows % 32 else bits) for m in _tower_matrices(tower))
    patch = 3 * tower.temporal * tower.patch**2 * tower.hidden
    plain = tower.positions * tower.hidden + tower.depth * (8 * tower.hidden + 2 * tower.intermediate)
    single = 16 if scheme == "F16" else 32
    return round((weights + patch * single + plain * single) / 8)


def weight_bytes(setup: Setup) -> TensorBytes:
    """Predict the bytes of a checkpoint from shape and quantization alone, without what fills its headers."""
    shape, quantization = setup.shape, setup.quantization
    layers = sum(
        m.count * _matrix_bytes(m.role, m.rows, m.columns, quantization, shape.layers) for m in matrices(shape)
    )
    # llama.cpp and unquantized checkpoints of 4 bytes keep norms in single precision.
    plain = 4 if quantization.kind == "gguf" or quantization.bpw == TYPE_BITS["F32"] else 2
    layers += plain * _plain_parameters(shape)
    extra = sum(m.count * _matrix_bytes(m.role, m.rows, m.columns, quantization) for m in _extra_matrices(shape))
    tower = 0
    if shape.vision and quantization.kind != "gguf":
        tower = vision_bytes(shape.vision)
    return TensorBytes(
        round(layers), _head_bytes(shape, quantization), _embedding_bytes(shape, quantization), tower, round(extra)
    )


def file_bytes(setup: Setup, tensors: TensorBytes | None = None) -> int:
    """What the checkpoint takes on disk. The vocabulary and merges in a GGUF header are about 40 bytes a token."""
    tensors = tensors or weight_bytes(setup)
    kind = setup.quantization.kind
    shared = setup.shape.tied and kind in ("gguf", "full")
    return tensors.total - (tensors.head if shared else 0) + (40 * setup.shape.vocab if kind == "gguf" else 0)


# Cache and scratch -----------------------------------------------------------------------------------


def cache_tokens(setup: Setup) -> int:
    """Positions of the KV cache for all answers at once."""
    if setup.engine == "llamacpp":
        return setup.context * setup.parallel
    one = _up(setup.context, PAGE_TOKENS)
    return max(_up(setup.cache_size, PAGE_TOKENS), one) if setup.cache_size else one * setup.parallel


def cache_bytes(setup: Setup) -> int:
    """The KV cache: layers * positions * width * (bytes of a key + bytes of a value).

    Sources: create_state_tensors in exllamav2's cache.py (every layer has the whole
    length there, sliding or not), CacheLayer_fp16 and CacheLayer_quant in exllamav3;
    llama.cpp keeps only the window and one batch for sliding layers, and has no
    6-bit mode, so that our adapter takes Q8_0 for Q6.
    """
    shape, tokens = setup.shape, cache_tokens(setup)
    mode = "Q8" if setup.engine == "llamacpp" and setup.cache_mode == "Q6" else setup.cache_mode
    key, value = CACHE_BYTES[mode]
    positions = shape.cache_layers * tokens
    if setup.engine == "llamacpp" and shape.sliding_layers and shape.sliding_window:
        seen = min(tokens, (shape.sliding_window + BATCH_TOKENS) * setup.parallel)
        positions -= min(shape.sliding_layers, shape.cache_layers) * (tokens - seen)
    return round(positions * shape.kv_width * (key + value))


def state_bytes(setup: Setup) -> int:
    """What layers of linear attention keep for each answer, whatever the length.

    GDNLayerState in exllamav3's gated_delta_net.py: two half-precision states and a
    convolution window per slot, when the adapter makes as many slots as there are
    answers at once. llama.cpp keeps one state in single precision, which is as much.
    """
    others = setup.shape.layers - setup.shape.cache_layers
    if not others:
        return 0
    linear = _linear_of(setup.shape)
    state = 4 * linear.value_heads * linear.key_dim * linear.value_dim
    staged = 2 * linear.channels * (linear.kernel + 1) + 6 * linear.value_heads
    return others * setup.parallel * (state + staged)


def cache_scratch_bytes(setup: Setup) -> int:
    """One layer of keys and values in half precision over the whole length, beside a quantized ExLlamaV2 cache.

    ExLlamaV2Cache_Q.touch_device in cache.py, once per card. ExLlamaV3 and llama.cpp read the quantized cache directly.
    """
    if setup.engine != "exllamav2" or setup.cache_mode == "FP16":
        return 0
    return 2 * 2 * cache_tokens(setup) * setup.shape.kv_width


def _chunk(setup: Setup) -> int:
    return min(setup.chunk, _up(setup.context, PAGE_TOKENS))


def _dq_bytes(setup: Setup, rows: int, columns: int) -> int:
    return 2 * min(rows * _up(columns, 32), MAX_DQ_ELEMENTS)


def dequantization_bytes(setup: Setup) -> int:
    """Room for weights made plain while a prompt is read, once per card.

    ExLlamaV2: the largest scratch_space_fixed of any module (attn.py, mlp.py,
    moe_mlp.py, linear.py), held from the load on. ExLlamaV3: reconstruct_hgemm in
    modules/quant/exl3.py, at most 32,768 columns at once, not for the output head.
    """
    shape, chunk = setup.shape, _chunk(setup)
    h, wide = shape.hidden, (shape.experts and shape.expert_intermediate) or shape.intermediate
    if setup.engine == "exllamav3":
        if setup.quantization.kind != "exl3":
            return 0
        return max(2 * _up(m.rows, 128) * min(_up(m.columns, 128), 32768) for m in matrices(shape))
    if setup.engine != "exllamav2":
        return 0
    sides = [(m.rows, m.columns) for m in _attention(shape, 1)]
    attention = 2 * chunk * max(shape.q_width, h) + 128 + max(_dq_bytes(setup, *side) for side in sides)
    if shape.experts:
        mlp = 2 * chunk * (2 * h + 2 * wide + shape.experts) + 5 * 128
    else:
        mlp = 2 * chunk * (h + 2 * max(h, wide)) + 3 * 128
    mlp += max(_dq_bytes(setup, h, wide), _dq_bytes(setup, wide, h))
    return max(attention, mlp, _dq_bytes(setup, h, shape.vocab))


def rope_bytes(setup: Setup) -> int:
    """Sine and cosine for every position in half precision: prepare_sincos in exllamav2's device.py, once per card."""
    if setup.engine != "exllamav2":
        return 0
    return 2 * 2 * _up(setup.context, PAGE_TOKENS) * setup.shape.head_dim


def activation_bytes(setup: Setup) -> int:
    """Estimate: what one chunk of a prompt holds on its way through a layer, and the logits.

    For ExLlama the hidden state twice, queries, keys, values and the attention's
    result in half precision (the MLP works in the scratch), and logits once in half
    and once in single precision. For llama.cpp the compute buffer of a batch:
    logits for every position and the widest layer in single precision.
    """
    shape = setup.shape
    if setup.engine == "llamacpp":
        wide = max(shape.intermediate, shape.expert_intermediate * max(1, shape.experts_used))
        return 4 * min(BATCH_TOKENS, setup.context) * (shape.vocab + 2 * wide + 4 * shape.hidden)
    layer = 2 * _chunk(setup) * (2 * shape.hidden + 2 * shape.q_width + 2 * shape.kv_width)
    if setup.engine == "exllamav3":
        layer += 2 * _chunk(setup) * 2 * max(shape.hidden, shape.intermediate)
    return layer + MAX_OUTPUT_TOKENS * shape.vocab * (2 + 4)


def image_bytes(setup: Setup) -> int:
    """Estimate: what reading one image of the largest allowed size takes for a moment, in the tower.

    Eight states and two MLP rows of each patch in half precision, and for towers with
    windows the mask over all pairs of patches: get_block_diag_mask in exllamav2's
    attn_params.py, which holds it in single and in half precision while it is made.
    """
    tower = setup.shape.vision
    if tower is None or not setup.vision:
        return 0
    patches = math.ceil(setup.max_pixels / tower.patch**2)
    mask = 6 * patches**2 if tower.window and setup.engine == "exllamav2" else 0
    return 2 * patches * (8 * tower.hidden + 2 * tower.intermediate) + mask


# The plan --------------------------------------------------------------------------------------------------


def plan(setup: Setup, tensors: TensorBytes | None = None, notes: tuple[str, ...] = ()) -> Plan:
    """All the parts of a setup. tensors are the bytes of a checkpoint that is there; without, they are predicted."""
    found = tensors or weight_bytes(setup)
    cards, where = max(1, setup.gpus), "gpu" if setup.gpus else "host"
    tower = found.vision
    if setup.shape.vision and not tower:
        tower = vision_bytes(setup.shape.vision)
    # ExLlamaV2 builds a table of groups for each row at the load, beside the permutation that is in the file.
    rows = 4 * sum(m.rows * m.count for m in matrices(setup.shape)) if setup.quantization.kind == "exl2" else 0
    parts = [
        Part("weights", found.layers + round(rows), where),
        Part("output head", found.head if setup.gpus or not setup.shape.tied else 0, where),
        Part("embedding", found.embedding, "host"),
        Part("KV cache", cache_bytes(setup), where),
        Part("recurrent state", state_bytes(setup), where),
        Part("cache scratch", cards * cache_scratch_bytes(setup), where),
        Part("dequantization scratch", cards * dequantization_bytes(setup), where),
        Part("rope tables", cards * rope_bytes(setup), where),
        Part("activations", cards * activation_bytes(setup), where),
        Part("vision tower", tower if setup.vision and setup.shape.vision else 0, where),
        Part("image transients", image_bytes(setup), where),
    ]
    if setup.draft is not None:
        ahead = plan(_draft_setup(setup, setup.draft))
        lasting = [part for part in ahead.parts if part.name != "driver context"]
        parts += [
            Part("draft model", sum(part.bytes for part in lasting if part.where == place), place)
            for place in ("gpu", "host")
        ]
    if setup.gpus:
        parts.append(Part("driver context", setup.gpus * DRIVER_BYTES.get(setup.engine, 450 * MIB)))
    kept = tuple(part for part in parts if part.bytes)
    return Plan(setup, kept, file_bytes(setup, found), notes)


def _draft_setup(setup: Setup, draft: Setup) -> Setup:
    """A draft model runs with the context and the cache of the model that it runs ahead of."""
    same = ("gpus", "context", "parallel", "cache_size", "cache_mode", "chunk")
    return replace(draft, **{name: getattr(setup, name) for name in same}, vision=False)


def in_gb(count: int) -> str:
    """Bytes as people compare them with a card's label."""
    return f"{count / GB:.1f} GB"


def fit(planned: Plan, card: Card) -> Verdict:
    """Does it fit beside what others use, after the planned unload? For one card; split() answers for more.

    For a model on the CPU the card stands for the computer's memory.
    """
    return _verdict(planned.needs_bytes, card)


def _verdict(needs: int, card: Card) -> Verdict:
    free = card.free_bytes
    spare = free - needs
    after = " after the unload" if card.released_bytes else ""
    if spare < 0:
        words = f"Does not fit: it needs {in_gb(needs)}, {in_gb(free)} are free{after}, {in_gb(-spare)} are missing."
        return Verdict("does not fit", words, spare)
    if spare < TIGHT_BYTES:
        words = f"Fits tightly: it needs {in_gb(needs)} of the {in_gb(free)} free{after}. Close other programs."
        return Verdict("tight", words, spare)
    return Verdict("fits", f"Fits: it needs {in_gb(needs)} of the {in_gb(free)} free{after}.", spare)


def largest_context(setup: Setup, free_bytes: int, most: int = 0) -> int:
    """The largest context that fits, in tokens and whole pages; 0 where not even one page does.

    Never more than `most`, or than the model was made for.
    """
    limit = most or setup.shape.max_positions or 131072
    if setup.shape.max_positions:
        limit = min(limit, setup.shape.max_positions)
    low, high = 0, max(1, limit // PAGE_TOKENS)
    while low < high:
        middle = (low + high + 1) // 2
        if plan(replace(setup, context=middle * PAGE_TOKENS)).needs_bytes <= free_bytes:
            low = middle
        else:
            high = middle - 1
    return min(low * PAGE_TOKENS, limit)


def best_bits(setup: Setup, free_bytes: int, choices: Iterable[float] = BITS) -> float:
    """The most bits per weight of the choices that fit; 0 where none does."""
    fitting = [
        bits
        for bits in choices
        if plan(replace(setup, quantization=replace(setup.quantization, bpw=bits))).needs_bytes <= free_bytes
    ]
    return max(fitting, default=0.0)


def cache_warning(architecture: str, mode: str) -> str:
    """Why a cache mode is not to be taken for a model; empty where nothing speaks against it.

    Qwen2 and 2.5 keep outliers in their keys that 4 bits lose: exllamav2 issue 493, QwenLM/Qwen3 issue 840.
    """
    if mode == "Q4" and architecture.lower().startswith("qwen2"):
        return "Qwen2 and Qwen2.5 lose their thread with 4-bit keys; take Q6 or Q8."
    return ""


def choose_cache(setup: Setup, free_bytes: int) -> CacheChoice:
    """The cache mode with the least loss that fits, best first, passing over those that harm the model."""
    refused: list[tuple[str, str]] = []
    for mode in CACHE_MODES:
        planned = plan(replace(setup, cache_mode=mode))
        reason = cache_warning(setup.shape.architecture, mode)
        if not reason and planned.needs_bytes <= free_bytes:
            return CacheChoice(mode, planned, tuple(refused))
        refused.append((mode, reason or f"{in_gb(planned.needs_bytes)} do not fit in {in_gb(free_bytes)}."))
    return CacheChoice("", plan(setup), tuple(refused))


def pinned_bytes(plans: Iterable[Plan]) -> int:
    """Host memory for page-locked copies of these models: all their tensors, the embedding among them (fastload.py)."""
    return sum(planned.file_bytes for planned in plans)


def pinned_verdict(plans: Sequence[Plan], available_bytes: int) -> Verdict:
    """Can all these models keep a page-locked copy, with a reserve for the rest of the computer?"""
    needs = pinned_bytes(plans)
    spare = available_bytes - RAM_RESERVE_BYTES - needs
    kind = "fits" if spare >= 0 else "does not fit"
    words = f"Page-locked copies of {len(plans)} models need {in_gb(needs)} of memory beside a reserve of "
    words += f"{in_gb(RAM_RESERVE_BYTES)}; {in_gb(available_bytes)} are available."
    return Verdict(kind, words, spare)


# Estimates: the part of a card's bandwidth that a token reaches, and the fixed time of a layer (kernel starts).
EFFICIENCY = {"exllamav2": 0.7, "exllamav3": 0.65, "llamacpp": 0.6}
LAYER_S = {"exllamav2": 30e-6, "exllamav3": 30e-6, "llamacpp": 15e-6}


def tokens_per_second(planned: Plan, bandwidth_gb_s: float, tokens: int = 0) -> float:
    """Estimate: decoding reads every active weight and the cache so far once per token.

    1 / (bytes / (bandwidth * efficiency) + layers * fixed time), for one answer with `tokens` in its cache.
    bandwidth_gb_s is the card's, or the memory's for a model on the CPU, in 10^9 bytes a second.
    """
    setup = planned.setup
    shape = setup.shape
    weights = planned.bytes_of("weights") * active_share(shape)
    head = planned.bytes_of("output head") or planned.bytes_of("embedding")
    filled = min(tokens, cache_tokens(setup)) / cache_tokens(setup)
    read = weights + head + planned.bytes_of("KV cache") * filled
    seconds = read / (bandwidth_gb_s * GB * EFFICIENCY.get(setup.engine, 0.6))
    if setup.gpus:
        seconds += shape.layers * LAYER_S.get(setup.engine, 30e-6)
    return 1 / seconds


def active_share(shape: ModelShape) -> float:
    """The part of the layers' weights that one token uses; less than 1 with experts."""
    if not shape.experts:
        return 1.0
    sizes = [(m.rows * m.columns * m.count, m.role.startswith("expert_")) for m in matrices(shape)]
    used = shape.experts_used / shape.experts
    return sum(size * (used if expert else 1) for size, expert in sizes) / sum(size for size, _ in sizes)


# Several cards ------------------------------------------------------------------------------------------------


def split(setup: Setup, cards: Sequence[Card], tensors: TensorBytes | None = None) -> Split:
    """Divide a model over the fewest cards on which it fits: those with the most free memory, at least two.

    A card costs scratch memory however few layers it gets, so one that is small or busy can be one too many. The
    shares are those of all the cards in their order, with nothing for one that is left out.
    """
    by_room = sorted(range(len(cards)), key=lambda index: -cards[index].free_bytes)
    tried: list[Split] = []
    for count in range(min(2, len(cards)), len(cards) + 1):
        taken = sorted(by_room[:count])
        some = _split_over(setup, [cards[index] for index in taken], tensors)
        shares = dict(zip(taken, some.shares, strict=True))
        tried.append(replace(some, shares=tuple(shares.get(i, Share(0, 0, 0.0)) for i in range(len(cards)))))
    order = ("fits", "tight", "does not fit")
    best = min(order.index(each.verdict.kind) for each in tried)
    alike = [each for each in tried if order.index(each.verdict.kind) == best]
    return alike[0] if alike[0].verdict.fits else max(alike, key=lambda each: each.verdict.spare_bytes)


def _split_over(setup: Setup, cards: Sequence[Card], tensors: TensorBytes | None) -> Split:
    """Divide a model over all these cards by layers, in proportion to what each has free after its fixed parts.

    The first card also gets the vision tower and the draft model, the last one the output head.
    """
    setup = replace(setup, gpus=len(cards))
    planned = plan(setup, tensors)
    per_layer = (
        planned.bytes_of("weights") + planned.bytes_of("KV cache") + planned.bytes_of("recurrent state")
    ) / setup.shape.layers
    same = ("cache scratch", "dequantization scratch", "rope tables", "activations", "driver context")
    fixed = [sum(planned.bytes_of(name) for name in same) // len(cards)] * len(cards)
    drafted = sum(part.bytes for part in planned.parts if part.name == "draft model" and part.where == "gpu")
    fixed[0] += planned.bytes_of("vision tower") + planned.bytes_of("image transients") + drafted
    fixed[-1] += planned.bytes_of("output head")
    rooms = [max(0, card.free_bytes - taken) for card, taken in zip(cards, fixed, strict=True)]
    counts = _divide(setup.shape.layers, rooms, per_layer)
    shares = tuple(
        Share(count, round(taken + count * per_layer), _split_gb(setup, planned, count, last=index == len(cards) - 1))
        for index, (count, taken) in enumerate(zip(counts, fixed, strict=True))
    )
    verdicts = [_verdict(share.bytes, card) for share, card in zip(shares, cards, strict=True)]
    return Split(shares, min(verdicts, key=lambda verdict: verdict.spare_bytes))


def place_variant(variant: Variant, cards: Sequence[Card]) -> tuple[str, int]:
    """How a variant is laid over cards whose first is the largest: the option gpu_split, and the bytes it takes there.

    The option is empty where the first card is enough, or all together are not; the bytes
    are those of its fullest card. The cards are taken as they are handed in, so hand in
    what does not change while they are used: the same variant has to load in the same way.
    """
    setup = setup_of(variant)
    tensors, _ = variant_tensors(variant, setup)
    needs = plan(setup, tensors).gpu_bytes
    if len(cards) < 2 or needs <= cards[0].free_bytes:
        return "", needs
    spread = split(setup, cards, tensors)
    if not spread.verdict.fits:
        return "", needs
    return spread.gpu_split, max(share.bytes for share in spread.shares)


def _divide(layers: int, rooms: Sequence[int], per_layer: float) -> list[int]:
    """Whole layers in proportion to the room; what is left over goes where most room remains."""
    whole = sum(rooms)
    if not whole:  # nowhere is the right place, and one card is as good as another
        return [layers, *[0] * (len(rooms) - 1)]
    counts = [layers * room // whole for room in rooms]
    while sum(counts) < layers:  # fewer times than there are cards
        left = [room - count * per_layer for room, count in zip(rooms, counts, strict=True)]
        counts[left.index(max(left))] += 1
    return counts


def _split_gb(setup: Setup, planned: Plan, layers: int, last: bool) -> float:
    """The allocation, in GiB, with which set_device_map in exllamav2's model.py places this many layers on a card.

    It subtracts sine tables, a hidden state and a mask at the start, and reserves the
    largest scratch_space of any module, which counts one more copy of keys and values
    for all heads, and temp_attn_size. Half an attention module is added, so that
    rounding moves none: it is the smaller of a layer's two modules, and decides where
    the layer's cache goes.
    """
    shape, chunk = setup.shape, _chunk(setup)
    tokens = _up(setup.context, PAGE_TOKENS)
    constant = 2 * 2 * shape.head_dim * tokens + 2 * shape.hidden * chunk + 2 * chunk**2
    layer = planned.bytes_of("weights") / shape.layers
    first = sum(m.rows * m.columns for m in _attention(shape, 1)) * shape.cache_layers / layer_parameters(shape)
    # On the last card nothing follows that could land there by mistake.
    weights = layers * layer + (planned.bytes_of("output head") + layer if last else layer * first / 2)
    attention = 2 * chunk * (max(shape.q_width, shape.hidden) + shape.q_width + 2 * shape.kv_width)
    attention += max(_dq_bytes(setup, m.rows, m.columns) for m in _attention(shape, 1))
    if shape.kv_heads != shape.heads:
        attention += 2 * 2 * tokens * shape.q_width
    scores = 2 * 2 * shape.heads * min(chunk, tokens) ** 2
    return float(constant + weights + max(attention, dequantization_bytes(setup)) + scores) / GIB


# From a preset ------------------------------------------------------------------------------------------------------

_QWEN25_TOWER = VisionShape(32, 1280, 3420, 14, 3584, gated=True, window=112)
_QWEN3_TOWER = VisionShape(27, 1152, 4304, 16, 4096, positions=2304, mergers=3)
_QWEN35_TOWER = VisionShape(27, 1152, 4304, 16, 4096, positions=2304)
_QWEN3_SMALL = VisionShape(24, 1024, 4096, 16, 2048, positions=2304, mergers=3)
_QWEN38_TOWER = replace(_QWEN35_TOWER, out=5120)
_QWEN35_MIDDLE = VisionShape(24, 1024, 4096, 16, 2560, positions=2304)
_QWEN35_SMALL = VisionShape(12, 768, 3072, 16, 1024, positions=2304)
_SIGLIP = VisionShape(12, 768, 3072, 16, 576, merge=4, temporal=1, positions=1024, merger_hidden=0)
_QWEN2 = {"architecture": "Qwen2ForCausalLM"}
_QWEN3 = {"architecture": "Qwen3ForCausalLM"}
_QWEN2VL = {"architecture": "Qwen2VLForConditionalGeneration"}
_QWEN25VL = {"architecture": "Qwen2_5_VLForConditionalGeneration"}
_QWEN3VL = {"architecture": "Qwen3VLForConditionalGeneration"}
_HYBRID = {"architecture": "Qwen3_5ForConditionalGeneration", "gated_query": True}
# What a preset's shape leaves open, by a part of the repository's name, first match. From the models' config.json.
KNOWN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen2.5-vl-7b", {**_QWEN25VL, "vision": _QWEN25_TOWER}),
    ("qwen2.5-vl-3b", {**_QWEN25VL, "tied": True, "vision": replace(_QWEN25_TOWER, out=2048)}),
    ("qwen2-vl-2b", {**_QWEN2VL, "tied": True, "vision": VisionShape(32, 1280, 5120, 14, 1536)}),
    ("qwen3-vl-8b", {**_QWEN3VL, "vision": _QWEN3_TOWER}),
    ("qwen3-vl-2b", {**_QWEN3VL, "tied": True, "vision": _QWEN3_SMALL}),
    ("qwen3.8-27b", {**_HYBRID, "linear": LinearAttention(16, 48), "mtp": 1, "vision": _QWEN38_TOWER}),
    ("qwen3.5-9b", {**_HYBRID, "linear": LinearAttention(16, 32), "vision": _QWEN35_TOWER}),
    ("qwen3.5-4b", {**_HYBRID, "linear": LinearAttention(16, 32), "tied": True, "vision": _QWEN35_MIDDLE}),
    ("qwen3.5-0.8b", {**_HYBRID, "linear": LinearAttention(16, 16), "tied": True, "vision": _QWEN35_SMALL}),
    ("qwen3-coder-30b-a3b", {
        "architecture": "Qwen3MoeForCausalLM", "experts": 128, "experts_used": 8, "expert_intermediate": 768,
    }),
    ("qwen3-0.6b", {**_QWEN3, "tied": True}),
    ("qwen3-1.7b", {**_QWEN3, "tied": True}),
    ("qwen3-4b", {**_QWEN3, "tied": True}),
    ("qwen3", _QWEN3),
    # Its official GGUF files hold the table twice, although the model ties it.
    ("qwen/qwen2.5-coder-0.5b", _QWEN2),
    ("coder-0.5b", {**_QWEN2, "tied": True}),
    ("coder-1.5b", {**_QWEN2, "tied": True}),
    ("qwen2", _QWEN2),
    ("distill-qwen", _QWEN2),
    ("qwq", _QWEN2),
    ("fuseo1", _QWEN2),
    ("phi-4-mini", {"architecture": "Phi3ForCausalLM", "tied": True}),
    ("phi-4", {"architecture": "Phi3ForCausalLM"}),
    ("smolvlm-256m", {"architecture": "Idefics3ForConditionalGeneration", "vision": _SIGLIP}),
    ("smolvlm-500m", {"architecture": "Idefics3ForConditionalGeneration", "vision": replace(_SIGLIP, out=960)}),
    ("gpt-oss-20b", {
        "architecture": "GptOssForCausalLM", "experts": 32, "experts_used": 4, "expert_intermediate": 2880,
        "sliding_window": 128, "sliding_layers": 12,
    }),
)  # fmt: skip
_SCHEME = re.compile(
    r"(?:^|[-_.])(q\d_k_[sml]|q\d_k|q\d_[01]|iq4_xs|iq4_nl|f16|bf16|f32|mxfp4)(?=[-.]|$)", re.IGNORECASE
)
_HEAD = re.compile(r"(?:^|[-_.])(?:(\d+)hb|hb?(\d+))(?=[-_.]|$)", re.IGNORECASE)


def known_shape(name: str, shape: Shape, max_positions: int = 0) -> ModelShape:
    """A preset's shape with what is known of the model by its repository's name."""
    more = next((more for part, more in KNOWN if part in name.lower()), {})
    return ModelShape.of(shape, max_positions=max_positions, **more)


def scheme_of(file: str) -> str:
    """The GGUF file type in a file's name, such as Q4_K_M; empty where there is none."""
    found = _SCHEME.search(file.removesuffix(".gguf"))
    return found[1].upper() if found else ""


def nominal(kind: str, bpw: float, name: str = "") -> Quantization:
    """A quantization as a repository's name gives it: the bits that were asked for, and the head's where named.

    An EXL2 model is seldom what 8 bits would be, see EXL2_MOST_BITS; its converter
    takes 6 bits for the head where nothing is named, and so does EXL3's. A model at 8
    bits is usually given a head of 8.
    """
    found = _HEAD.search(name)
    bits = float(found[1] or found[2]) if found else 8.0 if bpw >= 8 else 6.0
    return Quantization(kind, min(bpw, EXL2_MOST_BITS) if kind == "exl2" else bpw, bits, scheme_of(name))


def setup_of(variant: Variant, gpus: int = 1) -> Setup:
    """How a preset's variant would run, with the draft model where its folder is there.

    Raises ValueError for a variant without a shape.
    """
    if variant.shape is None:
        raise ValueError(f"{variant.title} has no shape in its preset")
    shape = known_shape(f"{variant.repo}-{variant.path}", variant.shape, variant.max_position_embeddings)
    if variant.engine in ("exllamav2", "exllamav3"):
        kind = "exl2" if variant.engine == "exllamav2" else "exl3"
        quantization = nominal(kind, variant.bpw or 4.0, f"{variant.repo}-{variant.revision}")
    else:
        name = variant.file or f"{variant.bundled}-q8_0.gguf"
        quantization = Quantization("gguf", variant.bpw or 4.85, scheme=scheme_of(name))
    options = variant.options or Options()
    return Setup(
        shape=shape,
        quantization=quantization,
        engine=variant.engine,
        cache_mode=variant.cache_mode,
        context=variant.context,
        parallel=variant.parallel,
        cache_size=options.cache_size,
        chunk=options.chunk_size or CHUNK_TOKENS,
        gpus=gpus,
        vision=bool(variant.projector) if quantization.kind == "gguf" else shape.vision is not None,
        max_pixels=options.max_pixels or MAX_PIXELS,
        draft=_draft_of(options.draft_model, variant.engine),
    )


def _draft_of(folder: str, engine: str) -> Setup | None:
    """The draft model in this folder; None where there is none that can be read: its load will say what is wrong."""
    if not folder:
        return None
    try:
        found = read_folder(Path(folder).expanduser())
    except (OSError, ModelFilesError, ValueError, TypeError, AttributeError, ArithmeticError):
        return None
    return Setup(found.shape, found.quantization, engine)


SIZE_TOLERANCE = 0.03


def plan_variant(variant: Variant, gpus: int = 1, *, vision: bool = True, tensors: TensorBytes | None = None) -> Plan:
    """A preset's variant, with nothing downloaded. vision False leaves out a tower that the task does not use.

    Where the arithmetic and the size that the preset states differ by more than 3 %,
    the size is right, and the layers' weights are taken to be the difference; the
    plan's notes say so. tensors are the bytes of the files where they are there.
    Raises ValueError for a variant without a shape.
    """
    setup = setup_of(variant, gpus)
    setup = replace(setup, vision=setup.vision and vision)
    notes: tuple[str, ...] = ()
    if tensors is None:
        tensors, notes = variant_tensors(variant, setup)
    return plan(setup, tensors, notes)


def variant_tensors(variant: Variant, setup: Setup) -> tuple[TensorBytes, tuple[str, ...]]:
    """Bytes of a variant's tensors by the arithmetic, corrected by the size that its preset states; and notes."""
    tensors = weight_bytes(setup)
    predicted = file_bytes(setup, tensors)
    if setup.quantization.kind == "gguf" and variant.projector and setup.shape.vision:
        tower = vision_bytes(setup.shape.vision, scheme_of(variant.projector) or "F16")
        tensors, predicted = replace(tensors, vision=tower), predicted + tower
    off = variant.size_bytes - predicted
    if variant.size_bytes and abs(off) > SIZE_TOLERANCE * variant.size_bytes and tensors.layers + off > 0:
        tensors = replace(tensors, layers=tensors.layers + off)
        return tensors, (f"The size comes from the preset; the arithmetic gives {in_gb(predicted)}.",)
    return tensors, ()


# From files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A checkpoint that is there, as its headers describe it."""

    shape: ModelShape
    quantization: Quantization
    tensors: TensorBytes


# The most that a stranger's file may claim: far above any model that is known, far below what arithmetic chokes on.
# The layers are those of a preset: several formulas count them one by one.
_MOST = {
    "layers": 1024, "kv_layers": 1024, "sliding_layers": 1024, "mtp": 1024, "hidden": 1 << 17, "heads": 1 << 12,
    "kv_heads": 1 << 12, "head_dim": 1 << 14, "intermediate": 1 << 20, "vocab": 1 << 23, "experts": 1 << 14,
    "experts_used": 1 << 14, "expert_intermediate": 1 << 20, "shared_intermediate": 1 << 20,
    "sliding_window": 1 << 31, "max_positions": 1 << 31,
    "depth": 1024, "patch": 1 << 10, "out": 1 << 17, "merge": 1 << 6, "temporal": 1 << 6, "positions": 1 << 24,
    "mergers": 1024, "merger_hidden": 1 << 20, "window": 1 << 20,
    "key_heads": 1 << 12, "value_heads": 1 << 12, "key_dim": 1 << 14, "value_dim": 1 << 14, "kernel": 1 << 10,
}  # fmt: skip
_AT_LEAST_ONE = ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab")
_MOST_BITS = 32.0


def _number(table: Mapping[str, Any], *names: str, default: int = 0, least: int = 0) -> int:
    """The first of these keys that holds a whole number. Raises ModelFilesDamaged for one below `least`."""
    for name in names:
        value = table.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            if value < least:
                raise ModelFilesDamaged(f"config.json makes no sense: {name} is {_short(value)}.")
            return value
    return default


def _short(value: int | float) -> str:
    """A stranger's number in a sentence. One of thousands of digits is not written out: Python refuses to."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if abs(value) < 10**15 else "huge"


def checked_shape(shape: ModelShape, source: str = "config.json") -> ModelShape:
    """The same shape, as a file of that name gave it. Raises ModelFilesDamaged for a number that no model has."""
    for part in (shape, shape.linear, shape.vision):
        for each in fields(part) if part else ():
            value = getattr(part, each.name)
            if each.name not in _MOST or (each.name == "merger_hidden" and value == -1):
                continue
            least = int((part is shape and each.name in _AT_LEAST_ONE) or each.name == "patch")
            if not least <= value <= _MOST[each.name]:
                whose = "its vision tower's " if part is shape.vision else ""
                raise ModelFilesDamaged(f"{source} makes no sense: {whose}{each.name} is {_short(value)}.")
    if shape.kv_layers > shape.layers:
        raise ModelFilesDamaged(f"{source} makes no sense: {shape.kv_layers} of {shape.layers} layers keep a cache.")
    return shape


def stated_bits(value: Any, name: str = "bits") -> float:
    """Bits per weight as a configuration states them. Raises ModelFilesDamaged for what is none, such as -4 or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= _MOST_BITS:
        shown = _short(value) if isinstance(value, int | float) else "no number"
        raise ModelFilesDamaged(f"config.json makes no sense: {name} is {shown}.")
    return float(value)


def shape_of_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape in a parsed config.json. Raises ModelFilesDamaged where a number that decides memory is missing,
    or is that of no model.
    """
    text = {**config, **(config.get("text_config") or {})}
    layers = _number(text, "num_hidden_layers", "n_layers", "n_layer")
    hidden = _number(text, "hidden_size", "d_model", "n_embd")
    heads = _number(text, "num_attention_heads", "n_heads", "n_head")
    vocab = _number(text, "vocab_size")
    if not all((layers, hidden, heads, vocab)):
        raise ModelFilesDamaged("config.json does not say how many layers, heads and words the model has.")
    architecture = str((config.get("architectures") or [""])[0])
    many = 1 if text.get("multi_query") and not text.get("new_decoder_architecture") else heads
    types = text.get("layer_types")
    types = types if isinstance(types, list) else []
    linear = _linear_config(text)
    inner = _number(text, "intermediate_size", "ffn_hidden_size", "n_inner", default=0)
    return checked_shape(ModelShape(
        layers=layers, hidden=hidden, heads=heads,
        kv_heads=_number(text, "num_key_value_heads", "num_kv_heads", default=many),
        head_dim=_number(text, "head_dim", default=hidden // heads),
        intermediate=inner or hidden * _number(text, "expansion_ratio", default=4), vocab=vocab,
        kv_layers=_full_layers(text, types, layers) if linear else 0,
        architecture=architecture,
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        gate=not architecture.startswith(("Falcon", "RW", "MPT", "GPT", "Starcoder2")),
        gated_query=linear is not None,
        experts=_number(text, "num_local_experts", "num_experts", "n_routed_experts"),
        experts_used=_number(text, "num_experts_per_tok", "experts_per_token"),
        expert_intermediate=_number(text, "moe_intermediate_size"),
        shared_intermediate=_number(text, "shared_expert_intermediate_size"),
        sliding_window=_number(text, "sliding_window"), sliding_layers=types.count("sliding_attention"),
        max_positions=_number(text, "max_position_embeddings", "max_seq_len", "n_positions"), linear=linear,
        mtp=_number(text, "mtp_num_hidden_layers"),
        vision=_vision_config(config.get("vision_config"), hidden),
    ))  # fmt: skip


def _full_layers(text: Mapping[str, Any], types: Sequence[str], layers: int) -> int:
    """Layers with a growing cache: read_qwen3_5_layer_types in exllamav3's architecture/qwen3_5.py."""
    return types.count("full_attention") or layers // _number(text, "full_attention_interval", default=4, least=1)


def _linear_config(text: Mapping[str, Any]) -> LinearAttention | None:
    heads = _number(text, "linear_num_value_heads")
    if not heads:
        return None
    return LinearAttention(
        _number(text, "linear_num_key_heads", default=16), heads, _number(text, "linear_key_head_dim", default=128),
        _number(text, "linear_value_head_dim", default=128), _number(text, "linear_conv_kernel_dim", default=4),
    )  # fmt: skip


def _vision_config(table: Any, text_hidden: int) -> VisionShape | None:
    if not isinstance(table, dict):
        return None
    # Qwen2-VL calls the tower's width embed_dim and the text model's hidden_size.
    hidden = _number(table, "embed_dim", "hidden_size", default=1024)
    ratio = _number(table, "mlp_ratio", default=4)
    kind = str(table.get("model_type", ""))
    patch = _number(table, "patch_size", default=14, least=1)
    side = _number(table, "image_size")
    return VisionShape(
        depth=_number(table, "depth", "num_hidden_layers", default=24), hidden=hidden,
        intermediate=_number(table, "intermediate_size", default=ratio * hidden), patch=patch,
        out=_number(table, "out_hidden_size", default=text_hidden),
        merge=_number(table, "spatial_merge_size", default=1),
        temporal=_number(table, "temporal_patch_size", default=1),
        gated="fullatt_block_indexes" in table or kind == "pixtral",
        positions=_number(table, "num_position_embeddings", default=(side // patch) ** 2 if side else 0),
        mergers=len(table.get("deepstack_visual_indexes") or ()), window=_number(table, "window_size"),
        merger_hidden=-1 if _number(table, "spatial_merge_size") else 0,
    )  # fmt: skip


def read_folder(folder: Path) -> Model:
    """Describe a folder of safetensors by config.json and the headers of its weights.

    Raises ModelNotDownloaded where weights are missing, ModelFilesDamaged or ModelFilesUnsafe for files that are not
    what they should be; OSError as the disk gives it.
    """
    shape = shape_of_config(config := read_config(folder))
    sizes: dict[str, int] = {}
    for name in whole_weights(folder, sorted(os.listdir(folder)), folder.name):
        sizes.update(safetensors_sizes(folder / name))
    quantization = _folder_quantization(config, sizes, shape)
    return Model(shape, quantization, _by_use(sizes, shape, quantization))


def safetensors_sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor by name, of a file whose header library.py has checked.

    Raises ModelFilesDamaged, or ModelFilesUnsafe for another format under this name.
    """
    return check_safetensors(path)


_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h|blk)\.(\d+)\.")


def _by_use(sizes: Mapping[str, int], shape: ModelShape, quantization: Quantization) -> TensorBytes:
    """Sort tensors by where they go. The names are those of Hugging Face, and of llama.cpp in GGUF."""
    used = {"layers": 0, "head": 0, "embedding": 0, "vision": 0, "other": 0}
    per_layer = [0] * shape.layers
    for name, size in sizes.items():
        use = _use(name)
        used[use] += size
        found = _LAYER.search(name)
        if use == "layers" and found and int(found[1]) < len(per_layer):
            per_layer[int(found[1])] += size
    if not used["head"]:  # tied: the engines make the head of the embedding
        used["head"] = used["embedding"] if quantization.kind in ("gguf", "full") else 2 * shape.hidden * shape.vocab
    return TensorBytes(**used, per_layer=tuple(per_layer))


def _use(name: str) -> str:
    if name.startswith("mtp."):
        return "other"
    if re.search(r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector|connector|mm_projector)\.", name):
        return "vision"
    if "lm_head" in name or name.startswith("output."):
        return "head"
    if re.search(r"(embed_tokens|token_embd|wte|word_embeddings|tok_embeddings)\.", name):
        return "embedding"
    return "layers"


def _folder_quantization(config: Mapping[str, Any], sizes: Mapping[str, int], shape: ModelShape) -> Quantization:
    """By the tensors' names, as the engines do; the bits are what was stored, not what was asked for."""
    said = config.get("quantization_config") or {}
    layers = sum(size for name, size in sizes.items() if _use(name) == "layers")
    bits = 8 * layers / layer_parameters(shape)
    head = stated_bits(said.get("head_bits") or 6, "head_bits")
    for ending, kind in ((".q_weight", "exl2"), (".trellis", "exl3"), (".qweight", "gptq")):
        if any(name.endswith(ending) for name in sizes):
            if kind == "gptq":
                group = int(said.get("group_size") or 128)
                return Quantization(kind, stated_bits(said.get("bits", 4)), group=group if group > 0 else shape.hidden)
            return Quantization(kind, bits, head)
    return Quantization("full", float(min((32, 16, 8), key=lambda b: abs(b - bits))))


_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_GGUF_STRING, _GGUF_LIST = 8, 9
_FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
               12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
               30: "IQ4_XS", 32: "BF16", 38: "MXFP4"}  # fmt: skip


class _Cursor:
    """Walks over a GGUF header. Sources: docs/gguf.md in the repository of ggml."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data, self.at = data, 0

    def number(self, layout: str) -> Any:
        value = struct.unpack_from(layout, self.data, self.at)[0]
        self.at += struct.calcsize(layout)
        return value

    def string(self) -> str:
        length = self.number("<Q")
        if length > len(self.data) - self.at:
            raise ValueError("a string that ends behind the file")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return bytes(raw).decode("utf-8", "replace")

    def value(self) -> Any:
        """A number or a string; of a list its numbers, or None for one of strings, which is only walked over."""
        kind = self.number("<I")
        if kind in _GGUF_NUMBERS:
            return self.number(_GGUF_NUMBERS[kind])
        if kind == _GGUF_STRING:
            return self.string()
        if kind != _GGUF_LIST:
            raise ValueError(f"a value of the unknown type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _GGUF_NUMBERS and count <= 4096:  # a number for each layer; token types are more
            return [self.number(_GGUF_NUMBERS[inner]) for _ in range(count)]
        if inner in _GGUF_SIZES:
            self.at += _GGUF_SIZES[inner] * count
        else:
            self._skip_strings(count)
        return None

    def _skip_strings(self, count: int) -> None:
        # Half a million in a large vocabulary, so without the general helpers.
        unpack, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self.at = at


def gguf_tensors(path: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int]]]:
    """The metadata of a GGUF file, and shape and bytes of each tensor, padding included.

    Raises ModelFilesDamaged; whether the tensors lie within the file is library.py's question.
    """
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _walk_gguf(_Cursor(data), path.stat().st_size)
        except (struct.error, ValueError, OverflowError, IndexError) as error:
            raise ModelFilesDamaged(f"{path.name} is damaged: {error}.") from None


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) else default


def _walk_gguf(cursor: _Cursor, size: int) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int]]]:
    if cursor.number("<4s") != b"GGUF":
        raise ValueError("it does not begin like a GGUF file")
    cursor.number("<I")
    tensors, keys = cursor.number("<Q"), cursor.number("<Q")
    values: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.string()
        values[key] = cursor.value()
    found: list[tuple[int, str, tuple[int, ...]]] = []
    for _ in range(tensors):
        name = cursor.string()
        shape = tuple(cursor.number("<Q") for _ in range(cursor.number("<I")))
        cursor.number("<I")
        found.append((cursor.number("<Q"), name, shape))
    found.sort()
    start = _up(cursor.at, max(1, _whole(values.get("general.alignment"), 32)))
    ends = [offset for offset, _, _ in found[1:]] + [max(0, size - start)]
    return values, {name: (shape, max(0, end - at)) for (at, name, shape), end in zip(found, ends, strict=True)}


def read_gguf(path: Path) -> Model:
    """Describe a GGUF text model by its header. Raises ModelFilesDamaged; OSError as the disk gives it."""
    values, tensors = gguf_tensors(path)
    name = str(values.get("general.architecture", ""))

    def of(key: str, default: int = 0) -> int:
        value = values.get(f"{name}.{key}")
        if isinstance(value, list):  # one number for each layer
            return max((int(number) for number in value), default=default)
        return int(value) if isinstance(value, int) else default

    table = tensors.get("token_embd.weight")
    if table is None or not of("block_count"):
        raise ModelFilesDamaged(f"{path.name} holds no text model.")
    layers, heads, hidden = of("block_count"), of("attention.head_count", 1), of("embedding_length")
    if not 0 < layers <= _MOST["layers"]:  # before they are counted one by one
        raise ModelFilesDamaged(f"{path.name} is damaged: it claims {_short(layers)} layers.")
    cached = sum(f"blk.{i}.attn_k.weight" in tensors or f"blk.{i}.attn_qkv.weight" in tensors for i in range(layers))
    state = of("ssm.time_step_rank")
    shape = checked_shape(ModelShape(
        layers=layers, hidden=hidden, heads=heads, kv_heads=of("attention.head_count_kv", heads),
        head_dim=of("attention.key_length", hidden // max(1, heads)), intermediate=of("feed_forward_length"),
        vocab=table[0][-1], kv_layers=of("full_attention_interval") and layers // of("full_attention_interval"),
        architecture=name, tied="output.weight" not in tensors, gate="blk.0.ffn_gate.weight" in tensors or not cached,
        experts=of("expert_count"), experts_used=of("expert_used_count"),
        expert_intermediate=of("expert_feed_forward_length"), max_positions=of("context_length"),
        sliding_window=of("attention.sliding_window"),
        linear=LinearAttention(of("ssm.group_count", 16), state, of("ssm.state_size", 128)) if state else None,
    ), path.name)  # fmt: skip
    by_use = _by_use({tensor: size for tensor, (_, size) in tensors.items()}, shape, Quantization("gguf", 0))
    scheme = _FILE_TYPES.get(_whole(values.get("general.file_type"), -1), "")
    return Model(shape, Quantization("gguf", 8 * by_use.layers / layer_parameters(shape), scheme=scheme), by_use)
