"""`python -m benchmarks make-model NAME --out DIR`: a checkpoint with a real model's shapes and random contents.

Load, swap, memory and speed can so be measured on any machine without a download:
what a model says decides nothing of these. Formats: exl2 and fp16 as folders that
the ExLlama engines open, gguf for llama.cpp. Weights have a standard deviation of
about 0.02, so that logits stay finite. The same seed writes the same bytes.

Nothing is held in memory but a pool of random bytes for each kind of contents, which
is tiled over the tensors at random phases, so that the disk is the limit. numpy only.
Knows the formats' layouts and the tensors' names; knows no engine.

Sources: exllamav2/conversion (EXL2), ggml-common.h (GGUF blocks), docs/gguf.md of ggml.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from modules.planner import MIXES, SMALL_ROWS, ModelShape, VisionShape, layer_parameters, more_bits

SHARD_BYTES = 8 << 30
PIECE_BYTES = 64 << 20
POOL_BYTES = 64 << 20
DEVIATION = 0.02
WORKERS = min(8, os.cpu_count() or 1)
FORMATS = ("exl2", "gguf", "fp16")


# The models ------------------------------------------------------------------------------------------

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PHI4 = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}<|im_sep|>{{ message['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
_QWEN_SPECIALS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()
_PHI4_NAMED = {0: "<|endoftext|>", 7: "<|im_start|>", 8: "<|im_end|>", 9: "<|im_sep|>", 19: "<|endofprompt|>"}
_PHI4_SPECIALS = [_PHI4_NAMED.get(place, f"<|dummy_{place}|>") for place in range(95)]


@dataclass(frozen=True)
class Recipe:
    """A model's public numbers. specials are its control tokens in order, the first with the id first_special."""

    shape: ModelShape
    model_type: str
    specials: Sequence[str]
    first_special: int
    template: str = _CHATML
    bias: bool = False
    epsilon: float = 1e-6
    theta: float = 1e6
    gguf: str = "qwen2"
    config: Mapping[str, Any] = field(default_factory=dict)

    def special(self, name: str) -> int:
        return self.first_special + list(self.specials).index(name)


_MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
RECIPES = {
    "phi4": Recipe(
        ModelShape(40, 5120, 40, 10, 128, 17920, 100352, architecture="Phi3ForCausalLM", max_positions=16384),
        "phi3", _PHI4_SPECIALS, 100257, _PHI4, epsilon=1e-5, theta=250000.0, gguf="phi3",
        config={"original_max_position_embeddings": 16384},
    ),
    "qwen25vl7": Recipe(
        ModelShape(
            28, 3584, 28, 4, 128, 18944, 152064, architecture="Qwen2_5_VLForConditionalGeneration",
            max_positions=128000, vision=VisionShape(32, 1280, 3420, 14, 3584, gated=True, window=112),
        ),
        "qwen2_5_vl", _QWEN_SPECIALS, 151643, bias=True, gguf="qwen2vl", config=_MROPE,
    ),
    "qwen32": Recipe(
        ModelShape(64, 5120, 40, 8, 128, 27648, 152064, architecture="Qwen2ForCausalLM", max_positions=32768),
        "qwen2", _QWEN_SPECIALS, 151643, bias=True,
    ),
    # The smallest that both ExLlama libraries' kernels take; its cache can have every mode.
    "tiny": Recipe(
        ModelShape(2, 256, 4, 2, 64, 512, 512, architecture="Qwen2ForCausalLM", max_positions=4096),
        "qwen2", _QWEN_SPECIALS, 490, bias=True,
    ),
}  # fmt: skip


def resized(recipe: Recipe, layers: int = 0, vocab: int = 0) -> Recipe:
    """The recipe with fewer layers, of the vision tower too, or with a smaller vocabulary; 0 leaves them."""
    shape = recipe.shape
    if layers:
        tower = replace(shape.vision, depth=min(shape.vision.depth, layers)) if shape.vision else None
        shape = replace(shape, layers=layers, vision=tower)
    if not vocab:
        return replace(recipe, shape=shape)
    if vocab < 256 + len(recipe.specials) or vocab % 32:
        raise ValueError(f"the vocabulary must be a multiple of 32 and at least {256 + len(recipe.specials)}")
    return replace(recipe, shape=replace(shape, vocab=vocab), first_special=vocab - len(recipe.specials))


# Contents ------------------------------------------------------------------------------------------------

# GGUF type: number in the format, elements of a block, fields of a block with their numpy types.
_HALF = "<f2"
BLOCKS: dict[str, tuple[int, int, list[tuple[str, str, int]]]] = {
    "F32": (0, 1, [("x", "<f4", 1)]),
    "F16": (1, 1, [("x", _HALF, 1)]),
    "Q5_0": (6, 32, [("d", _HALF, 1), ("bits", "u1", 20)]),
    "Q5_1": (7, 32, [("d", _HALF, 1), ("m", _HALF, 1), ("bits", "u1", 20)]),
    "Q8_0": (8, 32, [("d", _HALF, 1), ("bits", "u1", 32)]),
    "Q4_K": (12, 256, [("d", _HALF, 1), ("m", _HALF, 1), ("bits", "u1", 140)]),
    "Q5_K": (13, 256, [("d", _HALF, 1), ("m", _HALF, 1), ("bits", "u1", 172)]),
    "Q6_K": (14, 256, [("bits", "u1", 208), ("d", _HALF, 1)]),
}
# Block scales, and block minima as a multiple of them, with which random bits have a mean of 0 and a deviation of 0.02:
# the deviation of scale * quant - minimum for bits that are evenly spread.
_SCALES = {"Q5_0": (9.2, 0.0), "Q5_1": (9.2, -15.5), "Q8_0": (73.9, 0.0), "Q4_K": (255.0, 7.5), "Q5_K": (520.0, 15.5),
           "Q6_K": (1369.0, 0.0)}  # fmt: skip


def block_bytes(kind: str) -> int:
    return sum(np.dtype(form).itemsize * count for _, form, count in BLOCKS[kind][2])


@dataclass(frozen=True)
class Tensor:
    """source names a pool, or makes the exact bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    source: str | Callable[[], bytes]


class Pools:
    """Random contents by kind: bits, normal (half precision), and the blocks of each GGUF type."""

    def __init__(self, seed: int, most_bytes: int = POOL_BYTES) -> None:
        self.seed = seed
        self._most = most_bytes
        self._made: dict[str, tuple[np.ndarray[Any, Any], int]] = {}

    def get(self, name: str) -> tuple[np.ndarray[Any, Any], int]:
        """The pool as bytes, and the step at which a tensor may begin in it."""
        if name not in self._made:
            rng = np.random.default_rng([self.seed, sum(name.encode())])
            self._made[name] = _POOLS[name](rng, self._most) if name in _POOLS else _blocks(name, rng, self._most)
        return self._made[name]


def _bits(rng: np.random.Generator, size: int) -> tuple[np.ndarray[Any, Any], int]:
    return np.frombuffer(rng.bytes(size), np.uint8), 64


def _normal(rng: np.random.Generator, size: int) -> tuple[np.ndarray[Any, Any], int]:
    numbers = rng.standard_normal(size // 8, dtype=np.float32) * DEVIATION
    return np.tile(numbers.astype(np.float16).view(np.uint8), 4), 64


def _brain(rng: np.random.Generator, size: int) -> tuple[np.ndarray[Any, Any], int]:
    """The same in BF16, which is the upper half of single precision."""
    numbers = rng.standard_normal(size // 8, dtype=np.float32) * DEVIATION
    return np.tile((numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8), 4), 64


def _brain_ones(rng: np.random.Generator, size: int) -> tuple[np.ndarray[Any, Any], int]:
    del rng
    return np.full(size // 16, 0x3F80, np.uint16).view(np.uint8), 2


def _ones(rng: np.random.Generator, size: int) -> tuple[np.ndarray[Any, Any], int]:
    del rng
    return np.ones(size // 16, np.float16).view(np.uint8), 2


def _blocks(kind: str, rng: np.random.Generator, size: int) -> tuple[np.ndarray[Any, Any], int]:
    _, _, parts = BLOCKS[kind]
    step = block_bytes(kind)
    table: np.ndarray[Any, Any] = np.zeros(
        size // step, np.dtype([(name, form, (count,)) for name, form, count in parts])
    )
    if kind == "F32":
        return np.ones(size // 16, np.float32).view(np.uint8), step
    deviation, minimum = _SCALES[kind]
    scales = rng.uniform(0.8, 1.2, len(table)).astype(np.float32) * DEVIATION / deviation
    table["d"][:, 0] = scales
    if "m" in (table.dtype.names or ()):
        table["m"][:, 0] = scales * minimum
    table["bits"] = np.frombuffer(rng.bytes(table["bits"].size), np.uint8).reshape(table["bits"].shape)
    return table.view(np.uint8).reshape(-1), step


_POOLS: dict[str, Callable[[np.random.Generator, int], tuple[np.ndarray[Any, Any], int]]] = {
    "bits": _bits, "normal": _normal, "F16": _normal, "ones": _ones, "BF16": _brain,
    "BF16 ones": _brain_ones,
}  # fmt: skip


# Writing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A stretch of one tensor, and where it goes. key decides its random phases."""

    path: Path
    at: int
    size: int
    source: str | Callable[[], bytes]
    key: str


def write_file(path: Path, head: bytes, tensors: Sequence[tuple[int, Tensor]], size: int) -> list[Piece]:
    """Write the header and give the file its length; the pieces are what is left to write, offsets from its start."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    pieces = []
    for at, tensor in tensors:
        for part in range(0, tensor.size, PIECE_BYTES):
            key = f"{tensor.name}/{part}"
            pieces.append(Piece(path, at + part, min(PIECE_BYTES, tensor.size - part), tensor.source, key))
    return pieces


def write_pieces(pieces: Sequence[Piece], pools: Pools, workers: int = WORKERS) -> None:
    """Write all pieces with several threads; the system's copies do not hold Python's lock."""
    for name in sorted({piece.source for piece in pieces if isinstance(piece.source, str)}):
        pools.get(name)
    with ThreadPoolExecutor(max(1, workers)) as threads:
        for _ in threads.map(functools.partial(_write_piece, pools=pools), pieces):
            pass


def _write_piece(piece: Piece, pools: Pools) -> None:
    with piece.path.open("r+b", buffering=0) as file:
        file.seek(piece.at)
        if not isinstance(piece.source, str):
            file.write(piece.source())
            return
        pool, step = pools.get(piece.source)
        view = pool.data
        phases = random.Random(f"{pools.seed}/{piece.key}")
        left = piece.size
        # What does not fit before the pool's end goes on from another place: blocks stay whole.
        offset = int(piece.key.rpartition("/")[2]) % step
        while left:
            start = phases.randrange(len(view) // step // 2) * step + offset
            count = file.write(view[start : start + left])
            left, offset = left - count, (offset + count) % step


def safetensors_pieces(
    folder: Path, stem: str, tensors: Sequence[Tensor], shard_bytes: int = SHARD_BYTES
) -> list[Piece]:
    """Divide tensors over files, and write their headers, and an index for more than one `model` file."""
    shards: list[list[Tensor]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if tensor.size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size
    pieces: list[Piece] = []
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in shard:
            span = [at, at + tensor.size]
            table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
            at += tensor.size
            places[tensor.name] = name
        raw = json.dumps(table).encode()
        raw += b" " * (-len(raw) % 8)
        start = 8 + len(raw)
        starts = [(start + table[tensor.name]["data_offsets"][0], tensor) for tensor in shard]
        pieces += write_file(folder / name, struct.pack("<Q", len(raw)) + raw, starts, start + at)
    if stem == "model" and len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.size for tensor in tensors)}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)
    return pieces


# EXL2 ------------------------------------------------------------------------------------------------------

_WIDTHS = (2, 3, 4, 5, 6, 8)
_HEAD_GROUPS = {
    2: (32, ((4, 0.3), (2, 0.7))), 3: (32, ((4, 0.15), (3, 0.85))), 4: (32, ((6, 0.15), (4, 0.85))),
    5: (128, ((6, 0.15), (5, 0.85))), 6: (128, ((8, 0.15), (6, 0.85))), 8: (128, ((8, 1.0),)),
}  # fmt: skip


class Bits:
    """Chooses the bit widths of each EXL2 matrix so that the average over all of them is what was asked for."""

    def __init__(self, bpw: float) -> None:
        if not _WIDTHS[0] < bpw <= 8.1:
            raise ValueError(f"EXL2 has more than {_WIDTHS[0]} and at most 8 bits a weight, not {bpw:g}")
        self._bpw, self._debt = bpw, 0.0

    def groups(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Pairs of bits and rows, most bits first, as the library wants them."""
        group = 128 if rows % 128 == 0 and rows >= 1024 else 32
        count = math.ceil(rows / group)
        over = count * (48 + 4 * columns) + 32 * rows
        wanted = self._bpw * rows * columns + self._debt - over
        low = max((width for width in _WIDTHS[:-1] if width * rows * columns <= wanted), default=_WIDTHS[0])
        high = _WIDTHS[_WIDTHS.index(low) + 1]
        many = round((wanted / columns - low * rows) / ((high - low) * group))
        many = min(count, max(0, many))
        found = [(high, group)] * many + [(low, group)] * (count - many)
        used = sum(width * size * columns for width, size in found)
        self._debt = wanted - used
        return found

    @staticmethod
    def head(rows: int, bits: int) -> list[tuple[int, int]]:
        """The output head's groups: qparams_headoptions in conversion/qparams.py."""
        group, shares = _HEAD_GROUPS[bits]
        found: list[tuple[int, int]] = []
        left = rows
        for width, share in shares:
            for _ in range(math.ceil(min(rows * share, left) / group)):
                found.append((width, min(group, left)))
                left -= found[-1][1]
        return found


def exl2_matrix(key: str, rows: int, columns: int, groups: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """The tensors of one weight. A value is (q - 2^(bits-1)) * (scale+1)^2 * scale_max / 256."""
    columns += -columns % 32
    table: list[int] = []
    packed = 0
    for width, size in groups:
        table += [width, packed]
        packed += size * width // 32
    largest = [7.38 * DEVIATION / 2**width for width, _ in groups]
    yield Tensor(f"{key}.q_weight", "I32", (packed, columns), 4 * packed * columns, "bits")
    yield Tensor(f"{key}.q_scale", "I32", (len(groups), columns // 8), len(groups) * columns // 2, "bits")
    half = np.array(largest, np.float16).tobytes()
    yield Tensor(f"{key}.q_scale_max", "F16", (len(groups),), len(half), functools.partial(bytes, half))
    short = np.array(table, np.uint16).tobytes()
    yield Tensor(f"{key}.q_groups", "I16", (len(table),), len(short), functools.partial(bytes, short))
    yield Tensor(f"{key}.q_invperm", "I32", (rows,), 4 * rows, functools.partial(_permutation, key, rows))


def _permutation(key: str, rows: int) -> bytes:
    return bytes(np.random.default_rng(list(key.encode())).permutation(rows).astype(np.int32).tobytes())


def _half(name: str, *shape: int, source: str = "normal") -> Tensor:
    return Tensor(name, "F16", shape, 2 * math.prod(shape), source)


def _brain_tensor(name: str, *shape: int, source: str = "BF16") -> Tensor:
    return Tensor(name, "BF16", shape, 2 * math.prod(shape), source)


def folder_tensors(recipe: Recipe, matrix: Callable[[str, int, int], Iterator[Tensor]], fused: bool) -> list[Tensor]:
    """All tensors of a Hugging Face style checkpoint in file order. matrix makes a layer's or the head's weight."""
    shape = recipe.shape
    h, q, kv, i = shape.hidden, shape.q_width, shape.kv_width, shape.intermediate
    found = [_half("model.embed_tokens.weight", shape.vocab, h)]
    parts = [("self_attn.q_proj", h, q), ("self_attn.k_proj", h, kv), ("self_attn.v_proj", h, kv)]
    wide = [("mlp.gate_proj", h, i), ("mlp.up_proj", h, i)]
    if fused and recipe.model_type == "phi3":
        parts, wide = [("self_attn.qkv_proj", h, q + 2 * kv)], [("mlp.gate_up_proj", h, 2 * i)]
    for layer in range(shape.layers):
        key = f"model.layers.{layer}."
        for name, rows, columns in (*parts, ("self_attn.o_proj", q, h), *wide, ("mlp.down_proj", i, h)):
            found += matrix(key + name, rows, columns)
            if recipe.bias and name.endswith(("q_proj", "k_proj", "v_proj")):
                found.append(_half(f"{key}{name}.bias", columns))
        for name in ("input_layernorm", "post_attention_layernorm"):
            found.append(_half(f"{key}{name}.weight", h, source="ones"))
    found.append(_half("model.norm.weight", h, source="ones"))
    found += matrix("lm_head", h, shape.vocab)
    if shape.vision:
        found += tower_tensors(shape.vision)
    return found


def tower_tensors(tower: VisionShape) -> Iterator[Tensor]:
    """Qwen2.5-VL's vision tower in BF16: that is how it is published, and the EXL2 converter copies it as it is."""
    h, i, merged = tower.hidden, tower.intermediate, tower.hidden * tower.merge**2
    yield _brain_tensor("visual.patch_embed.proj.weight", h, 3, tower.temporal, tower.patch, tower.patch)
    sides = (("attn.qkv", 3 * h, h), ("attn.proj", h, h), ("mlp.gate_proj", i, h), ("mlp.up_proj", i, h),
             ("mlp.down_proj", h, i))  # fmt: skip
    for block in range(tower.depth):
        for name, columns, rows in sides:
            yield _brain_tensor(f"visual.blocks.{block}.{name}.weight", columns, rows)
            yield _brain_tensor(f"visual.blocks.{block}.{name}.bias", columns)
        for name in ("norm1", "norm2"):
            yield _brain_tensor(f"visual.blocks.{block}.{name}.weight", h, source="BF16 ones")
    yield _brain_tensor("visual.merger.ln_q.weight", h, source="BF16 ones")
    for name, columns, rows in (("mlp.0", merged, merged), ("mlp.2", tower.out, merged)):
        yield _brain_tensor(f"visual.merger.{name}.weight", columns, rows)
        yield _brain_tensor(f"visual.merger.{name}.bias", columns)


def make_folder(recipe: Recipe, out: Path, bpw: float | None, head_bits: int) -> list[Piece]:
    """Plan an EXL2 folder, or one in half precision where bpw is None, and write everything but the contents."""
    if bpw is None:
        tensors = folder_tensors(recipe, _plain_matrix, fused=True)
    else:
        bits = Bits(bpw)

        def packed(key: str, rows: int, columns: int) -> Iterator[Tensor]:
            groups = Bits.head(rows, head_bits) if key == "lm_head" else bits.groups(rows, columns)
            return exl2_matrix(key, rows, columns, groups)

        tensors = folder_tensors(recipe, packed, fused=False)
    quantization = {
        "quant_method": "exl2", "version": "0.3.2", "bits": bpw, "head_bits": head_bits,
        "calibration": {"rows": 115, "length": 2048, "dataset": "(random contents)"},
    }  # fmt: skip
    write_configs(recipe, out, {} if bpw is None else {"quantization_config": quantization})
    write_tokenizer(recipe, out)
    return safetensors_pieces(out, "model" if bpw is None else "output", tensors)


def _plain_matrix(key: str, rows: int, columns: int) -> Iterator[Tensor]:
    yield _half(f"{key}.weight", columns, rows)


def write_configs(recipe: Recipe, out: Path, more: Mapping[str, Any]) -> None:
    """config.json, generation_config.json and, for a model that sees, preprocessor_config.json."""
    shape = recipe.shape
    end, start = recipe.special("<|im_end|>"), recipe.special("<|endoftext|>")
    config = {
        "architectures": [shape.architecture], "model_type": recipe.model_type, "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab, "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions, "rms_norm_eps": recipe.epsilon, "rope_theta": recipe.theta,
        "bos_token_id": start, "eos_token_id": end, "pad_token_id": start, "tie_word_embeddings": False,
        "torch_dtype": "float16", **recipe.config,
    }  # fmt: skip
    if shape.head_dim * shape.heads != shape.hidden:
        config["head_dim"] = shape.head_dim
    tower = shape.vision
    if tower:
        whole = [block for block in (7, 15, 23, 31) if block < tower.depth] or [tower.depth - 1]
        config["vision_config"] = {
            "depth": tower.depth, "hidden_size": tower.hidden, "intermediate_size": tower.intermediate, "num_heads": 16,
            "in_chans": 3, "out_hidden_size": tower.out, "patch_size": tower.patch, "spatial_merge_size": tower.merge,
            "spatial_patch_size": tower.patch, "window_size": tower.window, "fullatt_block_indexes": whole,
            "tokens_per_second": 2, "temporal_patch_size": tower.temporal, "hidden_act": "silu",
        }  # fmt: skip
        for key, name in (("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>"),
                          ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>")):  # fmt: skip
            config[key] = recipe.special(name)
        _write_json(out / "preprocessor_config.json", {
            "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056,
            "patch_size": tower.patch, "temporal_patch_size": tower.temporal, "merge_size": tower.merge,
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        })  # fmt: skip
    _write_json(out / "config.json", {**config, **more})
    _write_json(
        out / "generation_config.json", {"bos_token_id": start, "eos_token_id": [end, start], "do_sample": True}
    )


def vocabulary(recipe: Recipe) -> list[str]:
    """Every token below the control tokens: the 256 bytes in the alphabet of byte-level BPE, then invented words."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    letters = {byte: chr(byte) for byte in seen} | {byte: chr(256 + place) for place, byte in enumerate(unseen)}
    return [letters[byte] for byte in range(256)] + [f"Ġw{place}" for place in range(256, recipe.first_special)]


def write_tokenizer(recipe: Recipe, out: Path) -> None:
    """tokenizer.json and tokenizer_config.json: a byte is a token, so that any text can be counted and read back."""
    common = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": recipe.first_special + n, "content": name, **common} for n, name in enumerate(recipe.specials)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "merges": [],
        "vocab": {word: n for n, word in enumerate(vocabulary(recipe))},
    }  # fmt: skip
    _write_json(out / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model,
    })  # fmt: skip
    decoder = {str(token["id"]): {"content": token["content"], **common} for token in added}
    _write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "added_tokens_decoder": decoder,
        "chat_template": recipe.template, "model_max_length": recipe.shape.max_positions,
    })  # fmt: skip


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# GGUF --------------------------------------------------------------------------------------------------------

_FILE_TYPES = {"F16": 1, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
_U32, _F32, _BOOL, _STRING, _LIST, _I32 = 4, 6, 7, 8, 9, 5


def scheme_for(bpw: float) -> str:
    """The GGUF file type nearest below these bits per weight; Q4_K_M is the smallest here."""
    known = ((16.0, "F16"), (8.0, "Q8_0"), (6.5, "Q6_K"), (5.5, "Q5_K_M"))
    return next((scheme for bits, scheme in known if bpw >= bits), "Q4_K_M")


def gguf_type(scheme: str, role: str, rows: int, layer: int = 0, layers: int = 1) -> str:
    """A tensor's type by its role: llama_tensor_get_type in llama-quant.cpp."""
    kind = scheme
    if scheme in MIXES:
        base, better, fused = MIXES[scheme]
        kind = {"head": "Q6_K", "qkv": fused}.get(role, base)
        if role in ("v", "down") and more_bits(layer, layers):
            kind = better
    if rows % BLOCKS[kind][1]:
        kind = SMALL_ROWS.get(kind, "F16")
    return kind if rows % BLOCKS[kind][1] == 0 else "F16"


def _gguf_tensor(name: str, kind: str, *shape: int) -> Tensor:
    """shape as numpy has it: outputs first, rows of inputs last."""
    size = math.prod(shape) // BLOCKS[kind][1] * block_bytes(kind)
    return Tensor(name, kind, shape, size, kind)


def gguf_tensors(recipe: Recipe, scheme: str) -> Iterator[Tensor]:
    """The text model's tensors under llama.cpp's names."""
    shape = recipe.shape
    h, q, kv, i, n = shape.hidden, shape.q_width, shape.kv_width, shape.intermediate, shape.layers
    yield _gguf_tensor("token_embd.weight", gguf_type(scheme, "embedding", h), shape.vocab, h)
    yield _gguf_tensor("output_norm.weight", "F32", h)
    yield _gguf_tensor("output.weight", gguf_type(scheme, "head", h), shape.vocab, h)
    sides = [("attn_q", "q", q, h), ("attn_k", "k", kv, h), ("attn_v", "v", kv, h)]
    wide = [("ffn_gate", "gate", i, h), ("ffn_up", "up", i, h)]
    if recipe.gguf == "phi3":
        sides, wide = [("attn_qkv", "qkv", q + 2 * kv, h)], [("ffn_up", "up", 2 * i, h)]
    for layer in range(n):
        key = f"blk.{layer}."
        for name, role, columns, rows in (*sides, ("attn_output", "o", h, q), *wide, ("ffn_down", "down", h, i)):
            yield _gguf_tensor(f"{key}{name}.weight", gguf_type(scheme, role, rows, layer, n), columns, rows)
            if recipe.bias and role in ("q", "k", "v"):
                yield _zeros(f"{key}{name}.bias", columns)
        yield _gguf_tensor(f"{key}attn_norm.weight", "F32", h)
        yield _gguf_tensor(f"{key}ffn_norm.weight", "F32", h)


def _zeros(name: str, count: int) -> Tensor:
    return Tensor(name, "F32", (count,), 4 * count, functools.partial(bytes, 4 * count))


def projector_tensors(tower: VisionShape) -> Iterator[Tensor]:
    """Qwen2.5-VL's tower as llama.cpp's mmproj file has it, in half precision."""
    h, i, merged = tower.hidden, tower.intermediate, tower.hidden * tower.merge**2
    for ending in ("", ".1"):
        yield _gguf_tensor(f"v.patch_embd.weight{ending}", "F16", h, 3, tower.patch, tower.patch)
    sides = [(f"attn_{name}", h, h) for name in ("q", "k", "v", "out")]
    sides += [("ffn_gate", i, h), ("ffn_up", i, h), ("ffn_down", h, i)]
    for block in range(tower.depth):
        for name, columns, rows in sides:
            yield _gguf_tensor(f"v.blk.{block}.{name}.weight", "F16", columns, rows)
            yield _zeros(f"v.blk.{block}.{name}.bias", columns)
        for name in ("ln1", "ln2"):
            yield _gguf_tensor(f"v.blk.{block}.{name}.weight", "F32", h)
    yield _gguf_tensor("v.post_ln.weight", "F32", h)
    for name, columns, rows in (("mm.0", merged, merged), ("mm.2", tower.out, merged)):
        yield _gguf_tensor(f"{name}.weight", "F16", columns, rows)
        yield _zeros(f"{name}.bias", columns)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A value of the metadata with its type."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", _LIST, _STRING, len(value)) + b"".join(map(_text, value))
    kind, layout = (_F32, "f") if value and isinstance(value[0], float) else (_I32, "i")
    return struct.pack("<IIQ", _LIST, kind, len(value)) + struct.pack(f"<{len(value)}{layout}", *value)


def gguf_values(recipe: Recipe, name: str, scheme: str) -> dict[str, Any]:
    """The metadata of the text model."""
    shape, arch = recipe.shape, recipe.gguf
    tokens = vocabulary(recipe) + list(recipe.specials)
    normal, control, unused = 1, 3, 5
    kinds = [normal] * recipe.first_special + [control] * len(recipe.specials)
    rest = shape.vocab - len(tokens)
    tokens += [f"[PAD{place}]" for place in range(len(tokens), shape.vocab)]
    values = {
        "general.architecture": arch, "general.name": f"{name}, random contents",
        "general.file_type": _FILE_TYPES[scheme],
        "general.quantization_version": 2, f"{arch}.context_length": shape.max_positions,
        f"{arch}.embedding_length": shape.hidden, f"{arch}.block_count": shape.layers,
        f"{arch}.feed_forward_length": shape.intermediate, f"{arch}.attention.head_count": shape.heads,
        f"{arch}.attention.head_count_kv": shape.kv_heads, f"{arch}.attention.key_length": shape.head_dim,
        f"{arch}.attention.value_length": shape.head_dim, f"{arch}.rope.dimension_count": shape.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": recipe.epsilon, f"{arch}.rope.freq_base": recipe.theta,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds + [unused] * rest, "tokenizer.ggml.merges": ["Ġ w"],
        "tokenizer.ggml.eos_token_id": recipe.special("<|im_end|>"), "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.bos_token_id": recipe.special("<|endoftext|>"),
        "tokenizer.ggml.padding_token_id": recipe.special("<|endoftext|>"), "tokenizer.chat_template": recipe.template,
    }  # fmt: skip
    if arch == "qwen2vl":
        values["qwen2vl.rope.dimension_sections"] = [16, 24, 24, 0]
    return values


def projector_values(tower: VisionShape) -> dict[str, Any]:
    """The metadata of the mmproj file."""
    windowed = 8 if tower.depth >= 8 else tower.depth
    return {
        "general.architecture": "clip", "general.type": "mmproj", "general.name": "random contents",
        "general.file_type": _FILE_TYPES["F16"], "clip.has_vision_encoder": True,
        "clip.projector_type": "qwen2.5vl_merger", "clip.use_silu": True, "clip.vision.image_size": 560,
        "clip.vision.patch_size": tower.patch, "clip.vision.spatial_merge_size": tower.merge,
        "clip.vision.embedding_length": tower.hidden, "clip.vision.feed_forward_length": tower.intermediate,
        "clip.vision.block_count": tower.depth, "clip.vision.attention.head_count": 16,
        "clip.vision.projection_dim": tower.out, "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.image_mean": [0.48145466, 0.4578275, 0.40821073],
        "clip.vision.image_std": [0.26862954, 0.26130258, 0.27577711], "clip.vision.n_wa_pattern": windowed,
        "clip.vision.window_size": tower.window,
    }  # fmt: skip


def gguf_pieces(path: Path, values: Mapping[str, Any], tensors: Sequence[Tensor], alignment: int = 32) -> list[Piece]:
    """Write a GGUF header, version 3, and plan its contents."""
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)))
    for key, value in values.items():
        head += _text(key) + _value(value)
    starts, at = [], 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        head += _text(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", BLOCKS[tensor.dtype][0], at)
        starts.append(at)
        at += tensor.size + -tensor.size % alignment
    head += bytes(-len(head) % alignment)
    placed = [(len(head) + start, tensor) for start, tensor in zip(starts, tensors, strict=True)]
    return write_file(path, bytes(head), placed, len(head) + at)


def make_gguf(name: str, recipe: Recipe, out: Path, scheme: str) -> list[Piece]:
    """Plan one GGUF file, and an mmproj file for a model that sees."""
    path = out / f"{name}-{scheme}.gguf"
    pieces = gguf_pieces(path, gguf_values(recipe, name, scheme), list(gguf_tensors(recipe, scheme)))
    tower = recipe.shape.vision
    if tower:
        mmproj = out / f"mmproj-{name}-F16.gguf"
        pieces += gguf_pieces(mmproj, projector_values(tower), list(projector_tensors(tower)))
    return pieces


# All of it -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What to make. bpw counts for exl2, and chooses the file type for gguf; layers and vocab 0 leave the model's."""

    name: str
    format: str = "exl2"
    bpw: float = 4.25
    head_bits: int = 6
    layers: int = 0
    vocab: int = 0
    seed: int = 1
    workers: int = WORKERS


def make_model(wanted: Wanted, out: Path) -> dict[str, Any]:
    """Write the checkpoint into a new or empty folder; what was written, and how fast.

    Raises ValueError for what cannot be made, FileExistsError where the folder holds something.
    """
    if wanted.name not in RECIPES or wanted.format not in FORMATS:
        raise ValueError(f"known are {', '.join(RECIPES)} as {', '.join(FORMATS)}")
    if wanted.format == "exl2" and wanted.head_bits not in _HEAD_GROUPS:
        raise ValueError(f"an EXL2 head has {', '.join(map(str, _HEAD_GROUPS))} bits, not {wanted.head_bits}")
    recipe = resized(RECIPES[wanted.name], wanted.layers, wanted.vocab)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    began = time.perf_counter()
    if wanted.format == "gguf":
        pieces = make_gguf(wanted.name, recipe, out, scheme_for(wanted.bpw))
    else:
        pieces = make_folder(recipe, out, wanted.bpw if wanted.format == "exl2" else None, wanted.head_bits)
    write_pieces(pieces, Pools(wanted.seed), wanted.workers)
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in out.iterdir())
    return {
        "name": wanted.name, "format": wanted.format, "folder": str(out), "size_bytes": size,
        "layer_parameters": layer_parameters(recipe.shape), "seconds": round(seconds, 2),
        "gb_per_second": round(size / seconds / 1e9, 2),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m benchmarks make-model`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks make-model", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--format", choices=FORMATS, default="exl2")
    parser.add_argument("--bpw", type=float, default=4.25, help="bits per weight; chooses the file type for gguf")
    parser.add_argument("--head-bits", type=int, default=6, help="of an EXL2 output head")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model has")
    parser.add_argument("--vocab", type=int, default=0, help="a smaller vocabulary")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=WORKERS, help="threads that write")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    try:
        figures = make_model(Wanted(**given), out)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures))
    return 0
