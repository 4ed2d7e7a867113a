"""What a name stands for, against a real hub on loopback: what is found, what is asked for, and what is refused."""

from __future__ import annotations

import ast
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.downloads import model
from modules import planner
from modules.downloads import Downloads, Options
from modules.errors import (
    AccessDenied,
    InvalidRequest,
    LoadError,
    ModelFilesDamaged,
    ModelFilesUnsafe,
    ModelNotDownloaded,
    PresetNotFound,
    SourceNotFound,
    TurntableError,
)
from modules.hub import Ref
from modules.library import Library
from modules.lookup import DEFAULT_CONTEXT, EXLLAMAV2_KNOWS, FOLDER, HEAD_BYTES, Choices, Found, Lookup
from modules.presets import Presets
from modules.ui.downloads import DownloadsPanel
from modules.ui.plan import _choices

from .conftest import DEMO, ROOT
from .hub_server import Hub

CODING = (DEMO / "coding-q8_0.gguf").read_bytes()
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 8192,
}  # fmt: skip
EXL2 = {"quantization_config": {"quant_method": "exl2", "bits": 4.25, "head_bits": 8}}
PRESET = """title = "Mine"
task = "assistant"
[[variants]]
title = "For a card"
engine = "exllamav2"
repo = "maker/model-exl2"
revision = "4_25"
bpw = 4.25
cache_mode = "Q6"
context = 1024
size_bytes = 4000000
shape = { layers = 2, hidden = 256, heads = 4, kv_heads = 2, head_dim = 64, intermediate = 512, vocab = 512 }
[[variants]]
title = "For a processor"
engine = "llamacpp"
repo = "maker/other"
file = "other.gguf"
"""
BARE = """title = "Bare"
task = "assistant"
[[variants]]
title = "No shape"
engine = "llamacpp"
repo = "maker/other"
file = "other.gguf"
"""
PROCESSOR = BARE + """shape = { layers = 2, hidden = 256, heads = 4, kv_heads = 2, head_dim = 64, intermediate = 512, \
vocab = 512 }
"""


def folder(more: dict[str, Any] | None = None) -> dict[str, bytes]:
    """The files of a small model whose config.json says more."""
    return {**model(), "config.json": json.dumps({**CONFIG, **(more or {})}).encode()}


def with_header(raw: bytes, more_bytes: int) -> bytes:
    """The same GGUF file with one more entry in front, which makes the header at least so much longer."""
    key = b"x.filler"
    fixed = 8 + len(key) + 4 + 4 + 8
    count = (more_bytes + 31) // 32 * 32 + 32 - fixed  # whole blocks of the alignment, so that all the rest moves alike
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, count) + bytes(count)
    magic, version, tensors, keys = struct.unpack_from("<4sIQQ", raw)
    return struct.pack("<4sIQQ", magic, version, tensors, keys + 1) + entry + raw[24:]


def gguf(values: dict[str, int | str], tensors: dict[str, tuple[int, ...]]) -> bytes:
    """A GGUF file of single-precision tensors."""

    def word(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    raw, at = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values)), 0
    for key, value in values.items():
        raw += word(key)
        raw += struct.pack("<I", 8) + word(value) if isinstance(value, str) else struct.pack("<II", 4, value)
    for name, (columns, rows) in tensors.items():
        raw += word(name) + struct.pack("<IQQIQ", 2, columns, rows, 0, at)
        at += 4 * columns * rows
    return raw + bytes(-len(raw) % 32) + bytes(at)


LLAMA: dict[str, int | str] = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64, "llama.context_length": 512,
    "llama.attention.head_count": 2, "llama.attention.head_count_kv": 2, "llama.feed_forward_length": 128,
}  # fmt: skip


def layer(number: int) -> dict[str, tuple[int, ...]]:
    kinds = {"attn_q": 64, "attn_k": 64, "attn_v": 64, "attn_output": 64, "ffn_gate": 128, "ffn_up": 128}
    found = {f"blk.{number}.{kind}.weight": (64, rows) for kind, rows in kinds.items()}
    return {**found, f"blk.{number}.ffn_down.weight": (128, 64)}


FIRST = {"token_embd.weight": (64, 96), "output.weight": (64, 96), **layer(0)}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture
def presets(tmp_path: Path) -> Presets:
    own = tmp_path / "presets"
    own.mkdir()
    for name, text in (("mine", PRESET), ("bare", BARE), ("processor", PROCESSOR)):
        (own / f"{name}.toml").write_text(text)
    return Presets([own])


@pytest.fixture
def lookup(hub: Hub, presets: Presets, tmp_path: Path) -> Iterator[Lookup]:
    quick = Options(reserve_bytes=0, tries=2, backoff_s=0.02, timeout_s=2.0, cache_dir=os.devnull)
    downloads = Downloads(Library(tmp_path / "models", tmp_path), hub.endpoint, lambda: None, quick, None)
    yield Lookup(presets, downloads)
    downloads.close()


def parts(found: Found) -> dict[str, int]:
    return {part.name: part.bytes for part in planner.plan(found.setup, found.tensors).parts}


def of_file(lookup: Lookup, path: Path, raw: bytes) -> Found:
    """The same bytes, found as a file: with all of them there."""
    path.write_bytes(raw)
    return lookup.find(str(path))


def asked(hub: Hub) -> list[str]:
    """Names of the files of which bytes were sent, oldest first."""
    return [one.path.rpartition("/")[2] for one in hub.log if one.host == "storage"]


# On this machine --------------------------------------------------------------------------------


def test_a_preset_is_its_first_variant_as_its_plan_takes_it(lookup: Lookup, presets: Presets, hub: Hub) -> None:
    found = lookup.find("mine")
    assert (found.title, found.download) == ("For a card", None)
    assert (found.setup.engine, found.setup.cache_mode, found.setup.context) == ("exllamav2", "Q6", 1024)
    assert planner.plan(found.setup, found.tensors).parts == planner.plan_variant(presets.get("mine").variants[0]).parts
    assert hub.log == []


def test_a_preset_for_a_processor_takes_nothing_of_a_card(lookup: Lookup) -> None:
    found = lookup.find("processor")
    planned = planner.plan(found.setup, found.tensors)
    assert (found.setup.gpus, planned.gpu_bytes) == (0, 0)
    assert planned.host_bytes > 0


def test_a_preset_without_a_shape_is_refused_with_advice(lookup: Lookup) -> None:
    with pytest.raises(InvalidRequest, match="bare does not give the shape of No shape") as caught:
        lookup.find("bare")
    assert "repository" in caught.value.hint


def test_an_unknown_name_is_answered_with_the_nearest(lookup: Lookup) -> None:
    with pytest.raises(PresetNotFound, match="mine") as caught:
        lookup.find("min")
    assert "OWNER/NAME@REVISION" in caught.value.hint


def test_a_folder_is_read_by_the_headers_of_its_weights(lookup: Lookup, tmp_path: Path) -> None:
    place = tmp_path / "own"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelNotDownloaded, match=r"no config\.json"):
        lookup.find(str(tmp_path))
    header = json.dumps({
        "model.layers.0.mlp.up_proj.q_weight": {"dtype": "U8", "shape": [3000], "data_offsets": [0, 3000]},
        "model.embed_tokens.weight": {"dtype": "U8", "shape": [500], "data_offsets": [3000, 3500]},
    }).encode()  # fmt: skip
    (place / "output.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3500))
    found = lookup.find(str(place))
    assert (found.title, found.setup.engine, found.setup.gpus) == ("own", "exllamav2", 1)
    assert (found.setup.quantization.kind, found.setup.context) == ("exl2", 8192)
    assert found.tensors
    assert (found.tensors.layers, found.tensors.embedding) == (3000, 500)


def test_a_gguf_file_runs_on_the_processor(lookup: Lookup) -> None:
    path = DEMO / "coding-q8_0.gguf"
    found = lookup.find(str(path))
    read = planner.read_gguf(path)
    assert (found.title, found.setup.engine, found.setup.gpus) == (path.name, "llamacpp", 0)
    assert (found.setup.shape, found.tensors) == (read.shape, read.tensors)
    assert found.setup.context == min(read.shape.max_positions, DEFAULT_CONTEXT)


def test_a_path_may_begin_at_home(lookup: Lookup, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "small.gguf").write_bytes(CODING)
    assert lookup.find("~/small.gguf").title == "small.gguf"


@pytest.mark.parametrize("what", ["~nobody-of-that-name/x", "a/" + "b" * 5000, "a/\0b", "x" * 5000, "a/b/c.gguf", "\0"])
def test_what_cannot_be_a_path_is_refused_in_words(lookup: Lookup, what: str) -> None:
    with pytest.raises((SourceNotFound, PresetNotFound)):
        lookup.find(what)


@pytest.mark.parametrize("raw", [b"", b"GGUF", b"\x80\x04}", CODING[:5000], CODING[:24] + bytes(2000)])
def test_a_file_that_is_no_model_is_damaged(lookup: Lookup, tmp_path: Path, raw: bytes) -> None:
    with pytest.raises((ModelFilesDamaged, ModelFilesUnsafe), match=r"x\.gguf"):
        of_file(lookup, tmp_path / "x.gguf", raw)


def test_a_pipe_is_not_waited_for(lookup: Lookup, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFilesDamaged, match="neither a file nor a folder"):
        lookup.find(str(tmp_path / "pipe"))


def test_a_header_that_claims_billions_of_layers_is_refused_at_once(lookup: Lookup, hub: Hub, tmp_path: Path) -> None:
    raw = gguf({**LLAMA, "llama.block_count": 4_000_000_000}, FIRST)
    with pytest.raises(ModelFilesDamaged, match="4000000000 layers"):
        of_file(lookup, tmp_path / "x.gguf", raw)
    hub.add("maker/gguf", {"x.gguf": raw})
    with pytest.raises(ModelFilesDamaged, match="4000000000 layers"):
        lookup.find("maker/gguf", "x.gguf")


@pytest.mark.parametrize(
    "wrong",
    [{"quantization_config": [1]}, {"quantization_config": {"quant_method": "exl2", "head_bits": "six"}},
     {"text_config": [1]}, {"architectures": {"a": 1}}, {"vision_config": {"patch_size": 0, "image_size": 9}},
     {"vocab_size": None}, {"num_attention_heads": 0}],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_damaged(lookup: Lookup, hub: Hub, wrong: dict[str, Any]) -> None:
    hub.add("maker/odd", folder(wrong))
    with pytest.raises(ModelFilesDamaged, match=r"config\.json"):
        lookup.find("maker/odd@main")


# A repository of safetensors -----------------------------------------------------------------------


def test_a_branch_is_planned_by_its_config_and_its_sizes(lookup: Lookup, hub: Hub, tmp_path: Path) -> None:
    files = folder(EXL2)
    hub.add("maker/model-exl2", {"README.md": b"see the branches"})
    hub.add("maker/model-exl2", files, "4_25")
    found = lookup.find("maker/model-exl2@4_25")
    assert found.title == "maker/model-exl2@4_25"
    assert (found.setup.engine, found.setup.context) == ("exllamav2", 8192)
    quantization = found.setup.quantization
    assert (quantization.kind, quantization.bpw, quantization.head_bits) == ("exl2", 4.25, 8)
    assert found.setup.shape == planner.shape_of_config(CONFIG)
    weights = sum(len(data) for name, data in files.items() if name.endswith(".safetensors"))
    assert planner.file_bytes(found.setup, found.tensors) == weights
    assert found.download
    assert {e.name: e.size_bytes for e in found.download.entries}["config.json"] == len(files["config.json"])
    assert asked(hub) == ["config.json"]  # and of the weights not a byte
    assert not any(one.path.endswith(".safetensors") for one in hub.log)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("said", "revision", "engine", "kind", "bits"),
    [
        ({"quant_method": "exl3", "bits": 3.5}, "main", "exllamav3", "exl3", 3.5),
        ({"quant_method": "exl2"}, "6.5bpw", "exllamav2", "exl2", 6.5),
        ({"quant_method": "exl2"}, "4_25", "exllamav2", "exl2", 4.25),
        ({"quant_method": "GPTQ", "bits": 4}, "main", "exllamav2", "gptq", 4.0),
        (None, "main", "exllamav2", "full", 16.0),
    ],
)
def test_engine_and_bits(
    lookup: Lookup, hub: Hub, said: dict[str, Any] | None, revision: str, engine: str, kind: str, bits: float
) -> None:
    hub.add("maker/x", folder({"quantization_config": said}), revision)
    setup = lookup.find(f"maker/x@{revision}").setup
    assert (setup.engine, setup.quantization.kind, setup.quantization.bpw) == (engine, kind, bits)


def test_a_repository_without_a_revision_is_not_guessed_at(lookup: Lookup, hub: Hub) -> None:
    hub.add("maker/model-exl2", folder(EXL2), "4_25")
    with pytest.raises(SourceNotFound, match="needs a revision"):
        lookup.find("maker/model-exl2")
    with pytest.raises(SourceNotFound, match="no revision 9_9") as caught:
        lookup.find("maker/model-exl2@9_9")
    assert "4_25" in caught.value.hint


def test_missing_and_gated_repositories(lookup: Lookup, hub: Hub) -> None:
    hub.add("maker/secret", folder(), gated=True)
    hub.add("maker/private", folder(), private=True)
    for ask in (lambda repo: lookup.find(f"{repo}@main"), lookup.choices):
        with pytest.raises(AccessDenied, match="accepted its terms"):
            ask("maker/secret")
        for repo in ("maker/nowhere", "maker/private"):
            with pytest.raises(SourceNotFound, match="does not exist, or is private"):
                ask(repo)


# A repository of GGUF files -------------------------------------------------------------------------


def test_a_gguf_file_is_planned_by_its_header_alone(lookup: Lookup, hub: Hub, tmp_path: Path) -> None:
    hub.add("maker/gguf", {"coding.gguf": CODING, "other.gguf": b"x"})
    found = lookup.find("maker/gguf", "coding.gguf")
    here = of_file(lookup, tmp_path / "coding.gguf", CODING)
    assert parts(found) == parts(here)
    assert (found.setup, found.tensors) == (here.setup, here.tensors)
    assert found.title == "maker/gguf coding.gguf"
    assert found.download
    assert found.download.size_bytes == len(CODING)
    assert asked(hub) == ["coding.gguf"]


def test_a_large_file_is_not_fetched_for_its_small_header(lookup: Lookup, hub: Hub, tmp_path: Path) -> None:
    raw = CODING + bytes(32 << 20)
    hub.add("maker/gguf", {"large.gguf": raw})
    assert parts(lookup.find("maker/gguf", "large.gguf")) == parts(of_file(lookup, tmp_path / "large.gguf", raw))
    (one,) = hub.asked_for("large.gguf")
    assert one.sent_bytes < len(raw) / 2  # a megabyte, and what was on its way


def test_a_longer_header_is_asked_for_again_with_more(lookup: Lookup, hub: Hub, tmp_path: Path) -> None:
    raw = with_header(CODING, HEAD_BYTES[0])
    hub.add("maker/gguf", {"long.gguf": raw})
    found = lookup.find("maker/gguf", "long.gguf")
    assert parts(found) == parts(of_file(lookup, tmp_path / "long.gguf", raw))
    assert parts(found) == parts(lookup.find(str(DEMO / "coding-q8_0.gguf")))
    assert asked(hub) == ["long.gguf"] * 2


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_header_cut_off_among_its_tensors_is_not_taken_for_a_whole_one(
    lookup: Lookup, hub: Hub, tmp_path: Path, share: float
) -> None:
    names = [CODING.index(name.encode()) for name in planner.gguf_tensors(DEMO / "coding-q8_0.gguf")[1]]
    cut = min(names) + round(share * (max(names) + 40 - min(names)))
    raw = with_header(CODING, HEAD_BYTES[0] - cut - 32)
    hub.add("maker/gguf", {"cut.gguf": raw})
    assert parts(lookup.find("maker/gguf", "cut.gguf")) == parts(of_file(lookup, tmp_path / "cut.gguf", raw))


def test_a_model_in_parts_counts_all_of_them(lookup: Lookup, hub: Hub, tmp_path: Path) -> None:
    names = [f"big-{n:05d}-of-00002.gguf" for n in (1, 2)]
    files = dict(zip(names, (gguf(LLAMA, FIRST), gguf({"split.count": 2}, layer(1))), strict=True))
    hub.add("maker/gguf", files)
    whole = of_file(lookup, tmp_path / "whole.gguf", gguf(LLAMA, {**FIRST, **layer(1)}))
    assert isinstance(whole.tensors, planner.TensorBytes)
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    for found in (
        lookup.find("maker/gguf", names[0]), lookup.find("maker/gguf", names[1]), lookup.find(str(tmp_path / names[1]))
    ):  # fmt: skip
        assert found.setup.shape == whole.setup.shape
        assert found.tensors
        # What the second part has beside its tensors is its small header.
        assert 0 <= found.tensors.total - whole.tensors.total < 1000
        assert found.setup.quantization.bpw == pytest.approx(whole.setup.quantization.bpw, rel=0.01)
        assert found.tensors.head == whole.tensors.head
    assert asked(hub) == [names[0]] * 2


def test_the_projector_counts(lookup: Lookup, hub: Hub) -> None:
    seeing = {name: (DEMO / name).read_bytes() for name in ("vision-q8_0.gguf", "vision-mmproj-q8_0.gguf")}
    hub.add("maker/gguf", seeing)
    blind = parts(lookup.find("maker/gguf", *list(seeing)[:1]))
    found = lookup.find("maker/gguf", *seeing)
    assert parts(found)["vision tower"] == len(seeing["vision-mmproj-q8_0.gguf"])
    assert parts(found)["image transients"] > 0
    assert {k: v for k, v in parts(found).items() if k not in ("vision tower", "image transients")} == blind


@pytest.mark.parametrize(
    "raw",
    [b"GGUF" * 100, b"", CODING[:3000], (DEMO / "vision-mmproj-q8_0.gguf").read_bytes(),
     gguf({**LLAMA, "llama.feed_forward_length": 0, "llama.embedding_length": 0}, FIRST),
     struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 1 << 60) + bytes(3 << 20)],
    ids=["garbage", "empty", "cut off", "projector", "no width", "endless"],
)  # fmt: skip
def test_a_header_that_says_nothing(lookup: Lookup, hub: Hub, raw: bytes) -> None:
    hub.add("maker/gguf", {"x.gguf": raw})
    with pytest.raises(ModelFilesDamaged, match=r"x\.gguf does not say in its header"):
        lookup.find("maker/gguf", "x.gguf")


def test_an_unknown_file_is_answered_with_the_nearest(lookup: Lookup, hub: Hub) -> None:
    hub.add("maker/gguf", {"small-Q4.gguf": CODING})
    with pytest.raises(SourceNotFound) as caught:
        lookup.find("maker/gguf", "small-Q5.gguf")
    assert "small-Q4.gguf" in caught.value.hint


# What a repository holds ------------------------------------------------------------------------------


def test_gguf_files_to_choose_from_without_parts_and_projectors(lookup: Lookup, hub: Hub) -> None:
    files = {"a-Q4_K_M.gguf": b"1" * 10, "a-Q8_0.gguf": b"2" * 20, "mmproj-F16.gguf": b"3", "README.md": b"r",
             "a-F16-00001-of-00002.gguf": b"4", "a-F16-00002-of-00002.gguf": b"5", "model.safetensors": b"6",
             "deep/b.gguf": b"7"}  # fmt: skip
    hub.add("maker/gguf", files)
    found = lookup.choices("maker/gguf")
    assert isinstance(found, Choices)
    assert (found.repo, found.branches) == ("maker/gguf", ())
    assert dict(found.files) == {"a-Q4_K_M.gguf": 10, "a-Q8_0.gguf": 20}
    assert asked(hub) == []


def test_where_there_are_only_parts_the_first_stands_for_all(lookup: Lookup, hub: Hub) -> None:
    files = {f"a-{n:05d}-of-00003.gguf": b"x" * n for n in (1, 2, 3)} | {"b-00001-of-00001.gguf": b"yy"}
    hub.add("maker/gguf", files)
    found = lookup.choices("maker/gguf")
    assert isinstance(found, Choices)
    assert dict(found.files) == {"a-00001-of-00003.gguf": 6, "b-00001-of-00001.gguf": 2}


def test_branches_to_choose_from_where_main_holds_no_weights(lookup: Lookup, hub: Hub) -> None:
    hub.add("maker/model-exl2", {"README.md": b"see the branches", "measurement.json": b"{}"})
    for revision in ("4_25", "6_5"):
        hub.add("maker/model-exl2", folder(EXL2), revision)
    assert lookup.choices("maker/model-exl2") == Choices("maker/model-exl2", ("4_25", "6_5"), {})


def test_one_model_needs_no_choice(lookup: Lookup, hub: Hub) -> None:
    hub.add("maker/plain", folder())
    assert lookup.choices("maker/plain") == Ref("maker/plain", "main")
    hub.add("maker/plain", folder(), "draft")
    assert lookup.choices("maker/plain") == Choices("maker/plain", ("main", "draft"), {})
    assert lookup.choices("maker/plain", "draft") == Ref("maker/plain", "draft")
    assert asked(hub) == []


def test_gguf_files_hide_neither_the_safetensors_beside_them_nor_the_branches(lookup: Lookup, hub: Hub) -> None:
    hub.add("maker/both", {**folder(), "a-Q8_0.gguf": b"x"})
    hub.add("maker/both", folder(EXL2), "4_25")
    found = lookup.choices("maker/both")
    assert found == Choices("maker/both", ("4_25",), {"a-Q8_0.gguf": 1}, (), "main")
    assert lookup.find("maker/both@main", FOLDER).setup.quantization.kind == "full"
    shown = _choices(found)
    DownloadsPanel(lookup._downloads, lookup._presets).act(f"hub:maker/both@main|{FOLDER}|", "fetch")
    assert [job.id for job in lookup._downloads.jobs()] == [Ref("maker/both", "main").id]
    assert 'data-look="maker/both@main" data-file="."' in shown and 'data-look="maker/both@4_25"' in shown


def test_weights_in_subfolders_are_named(lookup: Lookup, hub: Hub) -> None:
    hub.add("maker/deep", {f"Q{n}/a-Q{n}.gguf": b"x" for n in (2, 3, 4, 5)} | {"README.md": b"r"})
    with pytest.raises(SourceNotFound, match=r"subfolders.*'Q2/a-Q2\.gguf', .* and 1 more"):
        lookup.choices("maker/deep")


def test_a_name_that_turns_its_letters_around_is_shown_as_it_is() -> None:
    shown = _choices(Choices("maker/odd", ("b\u202e",), {"a\u202efugg.gguf": 1}))
    assert "a\\u202efugg.gguf <small>" in shown and ">b\\u202e<" in shown


@pytest.mark.parametrize(
    "files", [{"README.md": b"r"}, {"pytorch_model.bin": b"b"}, {"mmproj-F16.gguf": b"m"}, {}], ids=str
)
def test_a_repository_without_weights(lookup: Lookup, hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("maker/none", files)
    with pytest.raises(SourceNotFound, match="no weights that an engine of ours could load"):
        lookup.choices("maker/none")


@pytest.mark.parametrize("repo", ["", "one", "../x", "a/b/c", "a/b c", "a/" + "b" * 500])
def test_names_that_are_no_repositories(lookup: Lookup, repo: str) -> None:
    with pytest.raises(TurntableError):
        lookup.choices(repo)


@pytest.mark.parametrize(
    ("more", "why"),
    [({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
     ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
     ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "8 bits"),
     ({"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}}, "marlin"),
     ({"architectures": ["BertModel"]}, "BertModel"),
     ({"architectures": ["MambaForCausalLM"], **EXL2}, "MambaForCausalLM")],
)  # fmt: skip
def test_a_model_that_no_engine_loads_is_refused(
    lookup: Lookup, hub: Hub, tmp_path: Path, more: dict[str, Any], why: str
) -> None:
    files = folder(more)
    hub.add("maker/other-kind", files)
    with pytest.raises(LoadError, match=f"No engine of ours loads maker/other-kind.*{why}"):
        lookup.find("maker/other-kind@main")
    own = tmp_path / "own"
    own.mkdir()
    for name, raw in files.items():
        (own / name).write_bytes(raw)
    with pytest.raises(LoadError, match=why):
        lookup.find(str(own))


def test_the_engine_follows_kind_and_architecture(lookup: Lookup, hub: Hub) -> None:
    for name, more, engine in (
        ("plain", {}, "exllamav2"), ("new", {"architectures": ["Qwen3_5ForConditionalGeneration"]}, "exllamav3"),
        ("gptq", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "exllamav2"),
        ("exl3", {"quantization_config": {"quant_method": "exl3", "bits": 4}}, "exllamav3"),
    ):  # fmt: skip
        hub.add(f"maker/{name}", folder(more))
        assert lookup.find(f"maker/{name}@main").setup.engine == engine


def test_the_list_of_architectures_is_the_engines_own() -> None:
    """Read as text: the engine's file imports a library that is not in this environment."""
    source = ast.parse((ROOT / "modules" / "engines" / "exllamav2.py").read_text(encoding="utf-8"))
    named = [
        node.value for node in source.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "ARCHITECTURES" and isinstance(node.value, ast.Call)
    ]  # fmt: skip
    [call] = named
    assert isinstance(call.func, ast.Attribute)
    assert frozenset(ast.literal_eval(call.func.value).split()) == EXLLAMAV2_KNOWS
