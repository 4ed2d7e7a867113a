"""Checkpoints with random contents: real layouts that the checks, the planner and the engines take for real ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from benchmarks.make_model import (
    BLOCKS,
    FORMATS,
    RECIPES,
    Bits,
    Pools,
    Tensor,
    Wanted,
    _zeros,
    block_bytes,
    gguf_type,
    main,
    make_model,
    resized,
    safetensors_pieces,
    scheme_for,
    vocabulary,
    write_pieces,
)
from modules.library import Library, check_gguf, check_safetensors
from modules.planner import (
    Quantization,
    Setup,
    cache_bytes,
    cache_scratch_bytes,
    dequantization_bytes,
    exl2_bytes,
    file_bytes,
    gguf_tensors,
    layer_parameters,
    read_folder,
    read_gguf,
    shape_of_config,
    vision_bytes,
    weight_bytes,
)
from modules.presets import Variant

ROOT = Path(__file__).parent.parent
# Two layers and a small vocabulary of each, so that a test writes megabytes and not gigabytes.
SMALL = {"layers": 2, "vocab": 2048}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A place for hundreds of megabytes, which does not keep them."""
    yield tmp_path / "model"
    shutil.rmtree(tmp_path / "model", ignore_errors=True)


def digest(folder: Path) -> str:
    together = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        together.update(path.name.encode() + path.read_bytes())
    return together.hexdigest()


def tensors(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a folder of safetensors, read independently of the code under test."""
    kinds = {"I32": "<i4", "I16": "<u2", "F16": "<f2", "BF16": "<u2"}
    found = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                data = np.frombuffer(raw[8 + length + begin : 8 + length + end], kinds[entry["dtype"]])
                found[name] = data.reshape(entry["shape"])
    return found


# Layout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_passes_the_checks_and_is_as_large_as_planned(folder: Path, name: str, form: str) -> None:
    size = {} if name == "tiny" else SMALL
    figures = make_model(Wanted(name, form, bpw=4.5, **size), folder)
    shape = resized(RECIPES[name], **size).shape
    assert figures["layer_parameters"] == layer_parameters(shape)
    assert figures["size_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    engine = "llamacpp" if form == "gguf" else "exllamav2"
    files = {"file": f"{name}-Q4_K_M.gguf"} if form == "gguf" else {}
    if form == "gguf" and shape.vision:
        files["projector"] = f"mmproj-{name}-F16.gguf"
    located = Library(folder.parent, folder.parent).locate(Variant("v", name, engine, path=str(folder), **files))
    if form == "gguf":
        header = check_gguf(located.model)
        assert header.architecture == RECIPES[name].gguf
        setup = Setup(shape, Quantization("gguf", 4.85, scheme="Q4_K_M"), engine)
        planned = file_bytes(setup) + (vision_bytes(shape.vision) if shape.vision else 0)
    else:
        for path in located.model.glob("*.safetensors"):
            check_safetensors(path)
        kind = Quantization("exl2", 4.5, 6) if form == "exl2" else Quantization("full", 16)
        planned = file_bytes(Setup(shape, kind, engine))
    assert located.size_bytes == pytest.approx(planned, rel=0.01 if name != "tiny" else 0.04)


@pytest.mark.parametrize("form", FORMATS)
def test_headers_tell_the_shape_again(folder: Path, form: str) -> None:
    make_model(Wanted("qwen25vl7", form, bpw=6.0, head_bits=8, **SMALL), folder)
    recipe = resized(RECIPES["qwen25vl7"], **SMALL)
    if form == "gguf":
        model = read_gguf(folder / "qwen25vl7-Q5_K_M.gguf")
        same = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "tied", "max_positions")
        assert all(getattr(model.shape, key) == getattr(recipe.shape, key) for key in same)
        assert model.quantization.scheme == "Q5_K_M"
        return
    assert shape_of_config(json.loads((folder / "config.json").read_text())) == recipe.shape
    model = read_folder(folder)
    assert model.shape == recipe.shape
    assert model.tensors.vision == pytest.approx(vision_bytes(recipe.shape.vision), rel=0.001)
    assert model.quantization.kind == ("exl2" if form == "exl2" else "full")
    assert len(model.tensors.per_layer) == 2
    setup = Setup(model.shape, model.quantization)
    assert model.tensors.total == pytest.approx(file_bytes(setup), rel=0.001)


@pytest.mark.parametrize("bpw", [2.2, 3.0, 4.0, 4.25, 5.0, 6.5, 8.0])
def test_bits_per_weight_are_what_was_asked_for(bpw: float) -> None:
    bits, shape = Bits(bpw), RECIPES["qwen32"].shape
    h, i = shape.hidden, shape.intermediate
    used = weights = 0
    for rows, columns in [(h, shape.q_width), (h, shape.kv_width), (h, shape.kv_width), (h, i), (h, i), (i, h)] * 4:
        groups = bits.groups(rows, columns)
        assert sum(size for _, size in groups) == rows
        assert [width for width, _ in groups] == sorted((width for width, _ in groups), reverse=True)
        used += sum(width * size * columns for width, size in groups) + len(groups) * (48 + 4 * columns) + 32 * rows
        weights += rows * columns
    assert used / weights == pytest.approx(bpw, abs=0.035 if bpw == 8 else 0.005)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_head_is_as_large_as_the_planner_says(folder: Path, bits: int) -> None:
    make_model(Wanted("tiny", head_bits=bits), folder)
    model = read_folder(folder)
    assert model.tensors.head == weight_bytes(Setup(model.shape, replace(model.quantization, head_bits=bits))).head
    groups = Bits.head(5120, bits)
    packed = sum(width * size for width, size in groups) * 32 + len(groups) * (48 + 4 * 32) + 32 * 5120
    assert packed == 8 * exl2_bytes(5120, 32, groups[0][1], *shares(bits))


def shares(bits: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return {
        2: ((4, 2), (0.3, 0.7)), 3: ((4, 3), (0.15, 0.85)), 4: ((6, 4), (0.15, 0.85)), 5: ((6, 5), (0.15, 0.85)),
        6: ((8, 6), (0.15, 0.85)), 8: ((8,), (1.0,)),
    }[bits]  # fmt: skip


def dequantized(found: dict[str, np.ndarray[Any, Any]], key: str) -> np.ndarray[Any, Any]:
    """An EXL2 matrix as numbers, by the layout's description: rows of bits packed upwards in each column."""
    packed = found[f"{key}.q_weight"].view(np.uint32)
    scales = found[f"{key}.q_scale"].view(np.uint32)
    groups, largest = found[f"{key}.q_groups"], found[f"{key}.q_scale_max"].astype(np.float32)
    order = found[f"{key}.q_invperm"]
    rows = []
    for group, (width, first) in enumerate(zip(groups[0::2], groups[1::2], strict=True)):
        last = groups[2 * group + 3] if 2 * group + 3 < len(groups) else len(packed)
        bits = np.unpackbits(packed[first:last].T.copy().view(np.uint8), axis=1, bitorder="little")
        quants = bits.reshape(len(bits), -1, width) @ (1 << np.arange(width))
        nibbles = (scales[group][:, None] >> (4 * np.arange(8))) & 15
        scale = (nibbles.reshape(-1) + 1.0) ** 2 * largest[group] / 256
        rows.append((quants.T - (1 << (width - 1))) * scale)
    assert sorted(order) == list(range(len(order)))
    return np.concatenate(rows)[order]


@pytest.mark.parametrize("bpw", [2.5, 4.25, 6.5])
def test_exl2_weights_have_a_small_deviation(folder: Path, bpw: float) -> None:
    make_model(Wanted("tiny", bpw=bpw), folder)
    found = tensors(folder)
    for key in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        weights = dequantized(found, key)
        assert weights.shape == (found[f"{key}.q_invperm"].size, found[f"{key}.q_weight"].shape[1])
        assert np.isfinite(weights).all()
        # Two and three bits have no zero in their middle, and a mean of half a step.
        assert weights.std() == pytest.approx(0.02, rel=0.25)


def test_half_precision_weights_are_finite_and_small(folder: Path) -> None:
    make_model(Wanted("tiny", "fp16"), folder)
    found = tensors(folder)
    assert found["model.layers.0.self_attn.q_proj.weight"].shape == (256, 256)
    assert (found["model.norm.weight"] == 1).all()
    for name, data in found.items():
        assert np.isfinite(data.astype(np.float32)).all()
        if data.ndim == 2:
            assert data.astype(np.float32).std() == pytest.approx(0.02, rel=0.05), name


def test_a_vision_tower_is_in_bf16_as_the_published_ones_are(folder: Path) -> None:
    make_model(Wanted("qwen25vl7", "exl2", bpw=4.5, **SMALL), folder)
    raw = (folder / "output.safetensors").read_bytes()
    head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    kinds = {name: entry["dtype"] for name, entry in head.items() if name.endswith((".weight", ".bias"))}
    assert {kind for name, kind in kinds.items() if name.startswith("visual.")} == {"BF16"}
    assert {kind for name, kind in kinds.items() if not name.startswith("visual.")} == {"F16"}
    found = {name: (data.astype(np.uint32) << 16).view(np.float32) for name, data in tensors(folder).items()
             if name.startswith("visual.")}  # fmt: skip
    assert (found["visual.merger.ln_q.weight"] == 1).all()
    assert found["visual.blocks.0.attn.qkv.weight"].std() == pytest.approx(0.02, rel=0.05)


def scale_of(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return block["d"][:, 0].astype(np.float32)


@pytest.mark.parametrize(("bpw", "scheme"), [(4.5, "Q4_K_M"), (5.5, "Q5_K_M"), (6.6, "Q6_K"), (8.0, "Q8_0")])
def test_every_gguf_block_has_a_small_scale(folder: Path, bpw: float, scheme: str) -> None:
    # Tensors of more than 64 MiB are written in pieces, which must not cut a block in two.
    make_model(Wanted("phi4", "gguf", bpw=bpw, **SMALL), folder)
    path = folder / f"phi4-{scheme}.gguf"
    shapes = gguf_tensors(path)[1]
    raw = np.memmap(path, np.uint8, "r")
    at = len(raw) - sum(size for _, size in shapes.values())  # in the order of the file, padding included
    for name, (shape, size) in shapes.items():
        data, at = raw[at : at + size], at + size
        if name.endswith("norm.weight"):
            continue
        kind = kind_of(name, scheme, shape)
        form = np.dtype([(key, layout, (count,)) for key, layout, count in BLOCKS[kind][2]])
        scales = scale_of(data.view(form))
        assert len(scales) == int(np.prod(shape)) // BLOCKS[kind][1]
        assert 0.7 * np.median(scales) < scales.min() <= scales.max() < 1.3 * np.median(scales), name
    assert raw[:4].tobytes() == b"GGUF"


def kind_of(name: str, scheme: str, shape: tuple[int, ...]) -> str:
    roles = {"token_embd": "embedding", "output": "head", "attn_qkv": "qkv", "attn_output": "o", "ffn_up": "up",
             "ffn_down": "down"}  # fmt: skip
    *block, part, _ = name.split(".")
    return gguf_type(scheme, roles[part], shape[0], int(block[1]) if block else 0, 2)


def test_gguf_types_by_role() -> None:
    assert gguf_type("Q4_K_M", "head", 5120) == gguf_type("Q4_K_M", "down", 5120, 0, 8) == "Q6_K"
    assert gguf_type("Q4_K_M", "down", 5120, 1, 8) == gguf_type("Q4_K_M", "q", 5120) == "Q4_K"
    # Rows that are no whole blocks of 256, and of 32.
    assert (gguf_type("Q4_K_M", "q", 896), gguf_type("Q6_K", "q", 896)) == ("Q5_0", "Q8_0")
    assert gguf_type("Q8_0", "q", 100) == gguf_type("F16", "q", 100) == "F16"
    assert [scheme_for(bpw) for bpw in (2, 4.25, 6, 7, 8, 16)] == ["Q4_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16"]


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0"])
def test_pools_hold_whole_blocks(kind: str) -> None:
    pool, step = Pools(1, 1 << 16).get(kind)
    assert step == block_bytes(kind)
    assert len(pool) % step == 0
    form = np.dtype([(key, layout, (count,)) for key, layout, count in BLOCKS[kind][2]])
    assert 0 < scale_of(pool.view(form)).max() < 0.01


# Writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, form: str) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder, seed, workers in zip(folders, (1, 1, 2), (1, 4, 4), strict=True):
        make_model(Wanted("tiny", form, seed=seed, workers=workers), folder)
    first, again, other = map(digest, folders)
    assert first == again != other


def test_no_two_tensors_are_alike(folder: Path) -> None:
    make_model(Wanted("tiny", "fp16"), folder)
    found = [data.tobytes() for name, data in tensors(folder).items() if data.ndim == 2]
    assert len(set(found)) == len(found) > 10


def test_tensors_longer_than_the_pool(tmp_path: Path) -> None:
    odd = Tensor("odd", "Q8_0", (32 * 5000,), 34 * 5000, "Q8_0")
    pools = Pools(3, most_bytes=34 * 100)
    pieces = safetensors_pieces(tmp_path, "output", [odd, _zeros("zeros", 5)])
    write_pieces(pieces, pools, workers=2)
    raw = (tmp_path / "output.safetensors").read_bytes()
    form = np.dtype([("d", "<f2"), ("bits", "u1", (32,))])
    scales = np.frombuffer(raw[-34 * 5000 - 20 : -20], form)["d"].astype(np.float32)
    assert 0.7 * np.median(scales) < scales.min() <= scales.max() < 1.3 * np.median(scales)
    assert raw[-20:] == bytes(20)


@pytest.mark.parametrize("stem", ["model", "output"])
def test_a_large_model_is_divided_over_files(tmp_path: Path, stem: str) -> None:
    parts = [Tensor(f"t{n}", "F16", (1000,), 2000, "normal") for n in range(5)]
    write_pieces(safetensors_pieces(tmp_path, stem, parts, shard_bytes=4500), Pools(1, 1 << 12))
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"{stem}-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    for name in names:
        check_safetensors(tmp_path / name)
    assert set(tensors(tmp_path)) == {f"t{n}" for n in range(5)}
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (stem == "model")
    if stem == "model":
        assert set(json.loads(index.read_text())["weight_map"].values()) == set(names)


def test_a_full_model_is_planned_in_time_and_has_the_published_size() -> None:
    # 18.76 GB are published for the repository that this imitates; nothing is written here.
    setup = Setup(RECIPES["qwen32"].shape, Quantization("exl2", 4.25, 6))
    assert file_bytes(setup) == pytest.approx(18.76e9, rel=0.001)


# The other files --------------------------------------------------------------------------------------------------


def render(folder: Path, messages: list[dict[str, Any]]) -> str:
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    return (
        jinja2.Environment(autoescape=False).from_string(template).render(messages=messages, add_generation_prompt=True)
    )


def test_templates(tmp_path: Path) -> None:
    for name in ("phi4", "qwen25vl7"):
        (tmp_path / name).mkdir()
        make_model(Wanted(name, layers=1, vocab=1024), tmp_path / name)
    said = [{"role": "user", "content": "Hi"}]
    assert render(tmp_path / "phi4", said) == ("<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>")
    assert render(tmp_path / "qwen25vl7", said) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert "<|vision_start|><|image_pad|><|vision_end|>What?" in render(tmp_path / "qwen25vl7", shown)
    assert (tmp_path / "qwen25vl7" / "preprocessor_config.json").is_file()
    for name in ("phi4", "qwen25vl7"):
        shutil.rmtree(tmp_path / name)


def test_real_control_tokens_have_their_real_numbers() -> None:
    phi, qwen = RECIPES["phi4"], RECIPES["qwen32"]
    assert [phi.special(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>")] == [
        100257, 100264, 100265, 100266,
    ]  # fmt: skip
    assert phi.first_special + len(phi.specials) == phi.shape.vocab
    assert [qwen.special(name) for name in ("<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>")] == [
        151643, 151645, 151652, 151655,
    ]  # fmt: skip
    for recipe in RECIPES.values():
        words = vocabulary(recipe)
        assert len(set(words)) == len(words) == recipe.first_special
        assert recipe.first_special + len(recipe.specials) <= recipe.shape.vocab


# The command line ----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "made"
    command = [sys.executable, "-m", "benchmarks", "make-model", "tiny", "--bpw", "5", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["size_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 5
    assert (out / "generation_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bpw", "9"], "at most 8 bits"), (["--bpw", "2"], "more than 2"), (["--head-bits", "7"], "head"),
        (["--vocab", "100"], "multiple of 32"), (["--vocab", "1001"], "multiple of 32"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["tiny", "--out", str(tmp_path / "made"), *arguments]) == 1
    assert words in capsys.readouterr().err


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["tiny", "--out", str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="known are"):
        make_model(Wanted("llama"), tmp_path / "other")
    with pytest.raises(ValueError, match="known are"):
        make_model(Wanted("tiny", "onnx"), tmp_path / "other")


# The engines --------------------------------------------------------------------------------------------------------

LOAD_IN_LLAMACPP = """
import json, os, sys, tempfile
os.environ["OMP_WAIT_POLICY"], os.environ["GGML_NO_BACKTRACE"] = "PASSIVE", "1"
import xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.mmproj.path = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
p.n_ctx, p.n_batch, p.n_ubatch, p.n_parallel, p.n_gpu_layers, p.cache_ram_mib = 512, 128, 128, 1, 0, 0
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 2
p.mmproj_use_gpu = p.warmup = p.ui = False
p.hostnames = [os.path.join(tempfile.mkdtemp(), "engine.sock")]
server = xllamacpp.Server(p)
reply = server.handle_chat_completions({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "seed": 1})
print(json.dumps(reply["usage"]))
"""


@pytest.mark.parametrize(
    ("name", "bpw"), [("tiny", 4.25), ("tiny", 8.0), ("tiny", 16.0), ("phi4", 5.5), ("qwen25vl7", 4.5)]
)
def test_llamacpp_loads_it_and_generates(folder: Path, name: str, bpw: float) -> None:
    make_model(Wanted(name, "gguf", bpw=bpw, **({} if name == "tiny" else SMALL)), folder)
    files = sorted(folder.glob("*.gguf"), key=lambda path: path.name.startswith("mmproj"))
    command = [sys.executable, "-c", LOAD_IN_LLAMACPP, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 1 <= json.loads(done.stdout.splitlines()[-1])["completion_tokens"] <= 3


LOAD_IN_EXLLAMA = """
import json, sys, types, warnings
warnings.simplefilter("ignore")
class Extension(types.ModuleType):  # the compiled kernels, which planning a load does not need
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None
sys.modules["exllamav2_ext"] = Extension("exllamav2_ext")
import exllamav2
from exllamav2 import cache
config = exllamav2.ExLlamaV2Config(sys.argv[1])
config.max_dq_size, config.max_output_len, config.max_seq_len = 145 << 20, 16, 4096
model = exllamav2.ExLlamaV2(config)
tokens = exllamav2.ExLlamaV2Tokenizer(config)
found = {
    "footprint": sum(module.weight_footprint() for module in model.modules),
    "scratch": max(module.scratch_space_fixed() for module in model.modules),
    "ids": tokens.encode("Hi<|im_end|>", encode_special_tokens=True).tolist()[0],
    "text": tokens.get_id_to_piece_list()[300],
    "eos": config.generation_config["eos_token_id"],
}
if hasattr(config, "vision_hidden_size") and config.vision_model_type:
    tower = exllamav2.ExLlamaV2VisionTower(config)
    found["tower"] = sum(module.weight_footprint() for module in tower.modules)
for mode, kind in (("FP16", cache.ExLlamaV2Cache), ("Q8", cache.ExLlamaV2Cache_Q8), ("Q6", cache.ExLlamaV2Cache_Q6),
                   ("Q4", cache.ExLlamaV2Cache_Q4)):
    model.get_cache_devices = lambda: ["cpu"]
    model.cache_map = {layer: "cpu" for layer in range(config.num_hidden_layers)}
    made = kind(model, max_seq_len=4096)
    found[mode] = sum(t.numel() * t.element_size() for t in made.all_tensors())
    found[mode + "-scratch"] = sum(
        t.numel() * t.element_size() for pair in getattr(made, "temp_tensors", {}).values() for t in pair)
print(json.dumps(found))
"""


@pytest.mark.parametrize(("name", "form"), [*((name, "exl2") for name in RECIPES), ("phi4", "fp16"), ("tiny", "fp16")])
def test_exllamav2_takes_it_and_allocates_what_is_planned(
    folder: Path, name: str, form: str, exllama_python: str
) -> None:
    make_model(Wanted(name, form, bpw=4.5, **({} if name == "tiny" else SMALL)), folder)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder.parent)}
    done = subprocess.run(
        [exllama_python, "-c", LOAD_IN_EXLLAMA, str(folder)],
        capture_output=True, text=True, timeout=100, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    recipe = resized(RECIPES[name], **({} if name == "tiny" else SMALL))
    assert found["ids"] == [72, 105, recipe.special("<|im_end|>")]
    assert found["eos"] == [recipe.special("<|im_end|>"), recipe.special("<|endoftext|>")]
    assert found["text"] == " w300"
    model = read_folder(folder)
    text = model.tensors.total - model.tensors.vision
    assert found["footprint"] == pytest.approx(text, rel=0.001)
    assert found.get("tower", 0) == pytest.approx(model.tensors.vision, rel=0.001)
    setup = Setup(model.shape, model.quantization, context=4096)
    assert found["scratch"] == dequantization_bytes(setup)
    for mode in ("FP16", "Q8", "Q6", "Q4"):
        planned = replace(setup, cache_mode=mode)
        assert found[mode] == cache_bytes(planned), mode
        assert found[f"{mode}-scratch"] == cache_scratch_bytes(planned), mode
