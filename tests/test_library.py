"""The library: where files are looked for, what is complete, and that hostile headers end quickly in one error."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import shlex
import struct
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modules.errors import ModelFilesDamaged, ModelFilesUnsafe, ModelNotDownloaded
from modules.library import Library, check_gguf, check_safetensors
from modules.presets import Presets, Variant

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo" / "models"

EXL = Variant("v", "Phi-4", "exllamav2", repo="TheMelonGod/phi-4-exl2", revision="8hb-6.5bpw")
GGUF = Variant("v", "Small", "llamacpp", repo="Qwen/Qwen3-0.6B-GGUF", file="small.gguf")


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def library(models):
    return Library(models, DEMO)


# Places --------------------------------------------------------------------------------


def test_folders(library, models):
    assert library.folder(EXL) == models / "phi-4-exl2-8hb-6.5bpw"
    assert library.folder(GGUF) == models / "Qwen3-0.6B-GGUF"
    assert library.folder(replace(GGUF, revision="main")) == models / "Qwen3-0.6B-GGUF"
    assert library.folder(Variant("v", "t", "llamacpp", bundled="coding")) == DEMO
    assert library.folder(Variant("v", "t", "llamacpp", path=str(models))) == models
    assert library.folder(Variant("v", "t", "llamacpp", path=str(models / "a.gguf"))) == models


def test_relative_folders_become_absolute():
    assert Library(Path("models"), Path("demo")).folder(EXL).is_absolute()


def test_no_home_folder(library):
    with pytest.raises(ModelNotDownloaded, match="no home folder"):
        library.locate(Variant("v", "t", "llamacpp", path="~no-such-account/x.gguf"))


@pytest.mark.skipif(os.name == "nt", reason="the quoting of another shell")
def test_download_commands(models):
    library = Library(models / "my models; rm -rf", DEMO)
    words = shlex.split(library.download_command(EXL))
    target = str(models / "my models; rm -rf" / "phi-4-exl2-8hb-6.5bpw")
    assert words == [
        "hf", "download", "TheMelonGod/phi-4-exl2", "--revision", "8hb-6.5bpw", "--local-dir", target,
    ]  # fmt: skip
    gguf = replace(GGUF, file="big-00001-of-00002.gguf", projector="mmproj.gguf")
    words = shlex.split(library.download_command(gguf))
    assert words[2:6] == [gguf.repo, "big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "mmproj.gguf"]
    assert words[6] == "--local-dir"
    assert library.download_command(Variant("v", "t", "llamacpp", bundled="coding")) == ""
    assert library.download_command(Variant("v", "t", "llamacpp", path="/a.gguf")) == ""


def test_every_shipped_variant_has_a_command_or_is_bundled(library):
    for preset in Presets([ROOT / "presets"]).list():
        for variant in preset.variants:
            assert bool(library.download_command(variant)) != bool(variant.bundled)


# GGUF models ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["assistant", "vision", "coding", "reasoning"])
def test_bundled(library, name):
    variant = next(v for v in Presets([ROOT / "presets"]).get(name).variants if v.bundled)
    located = library.locate(variant)
    assert located.model == DEMO / f"{name}-q8_0.gguf"
    assert (located.projector is not None) == (name == "vision")
    files = [located.model, *([located.projector] if located.projector else [])]
    assert located.size_bytes == sum(file.stat().st_size for file in files)
    assert check_gguf(located.model).context_length >= variant.context


def test_a_bundled_model_that_is_missing(library):
    with pytest.raises(ModelNotDownloaded, match=r"no file nothing-q8_0\.gguf in folder .*models"):
        library.locate(Variant("v", "t", "llamacpp", bundled="nothing"))


def test_gguf_missing_then_there(library, models):
    folder = models / "Qwen3-0.6B-GGUF"
    with pytest.raises(ModelNotDownloaded) as caught:
        library.locate(GGUF)
    assert "small.gguf" in str(caught.value) and str(folder) in str(caught.value)
    folder.mkdir()
    (folder / "small.gguf").write_bytes((DEMO / "coding-q8_0.gguf").read_bytes())
    located = library.locate(GGUF)
    assert (located.model, located.projector) == (folder / "small.gguf", None)
    with pytest.raises(ModelNotDownloaded, match=r"mmproj\.gguf"):
        library.locate(replace(GGUF, projector="mmproj.gguf"))


def test_a_file_that_is_cut_off_after_it_was_checked(library, models):
    path = models / "own.gguf"
    path.write_bytes((DEMO / "coding-q8_0.gguf").read_bytes())
    variant = Variant("v", "t", "llamacpp", path=str(path))
    assert library.locate(variant).model == path
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ModelFilesDamaged, match="cut off"):
        library.locate(variant)


def test_checked_headers_are_remembered_and_forgotten(library, models):
    # Far more files than are remembered; each answer is that of its own file.
    whole = (DEMO / "reasoning-q8_0.gguf").read_bytes()
    (models / "0.gguf").write_bytes(whole)
    for number in range(1, 1030):
        os.link(models / "0.gguf", models / f"{number}.gguf")
        library.locate(Variant("v", "t", "llamacpp", path=str(models / f"{number}.gguf")))
    assert library.locate(Variant("v", "t", "llamacpp", path=str(models / "1.gguf"))).size_bytes == len(whole)


def test_model_and_projector_are_not_confused(library, models):
    for kind in ("model", "mmproj"):
        source = "vision-q8_0.gguf" if kind == "model" else "vision-mmproj-q8_0.gguf"
        (models / f"{kind}.gguf").write_bytes((DEMO / source).read_bytes())
    good = Variant("v", "t", "llamacpp", path=str(models / "model.gguf"), projector="mmproj.gguf")
    assert library.locate(good).projector == models / "mmproj.gguf"
    with pytest.raises(ModelFilesDamaged, match=r"mmproj\.gguf is not a model"):
        library.locate(replace(good, path=str(models / "mmproj.gguf")))
    with pytest.raises(ModelFilesDamaged, match=r"model\.gguf is not a projector"):
        library.locate(replace(good, projector="model.gguf"))


def test_an_own_folder(library, models):
    variant = Variant("v", "Own", "llamacpp", path=str(models))
    with pytest.raises(ModelNotDownloaded, match="has no file that ends in"):
        library.locate(variant)
    (models / "mmproj-a.gguf").write_bytes((DEMO / "vision-mmproj-q8_0.gguf").read_bytes())
    (models / "a.gguf").write_bytes((DEMO / "vision-q8_0.gguf").read_bytes())
    assert library.locate(variant).model == models / "a.gguf"
    (models / "b.gguf").write_bytes(b"")
    with pytest.raises(ModelNotDownloaded, match="has 2 of them"):
        library.locate(variant)
    assert library.locate(replace(variant, file="a.gguf")).model == models / "a.gguf"


def test_all_parts_of_a_split_model_are_needed(library, models):
    whole = (DEMO / "coding-q8_0.gguf").read_bytes()
    (models / "m-00001-of-00002.gguf").write_bytes(whole)
    variant = Variant("v", "Own", "llamacpp", path=str(models))
    with pytest.raises(ModelNotDownloaded, match="m-00002-of-00002"):
        library.locate(variant)
    (models / "m-00002-of-00002.gguf").write_bytes(gguf([("split.count", 4, 2), ("split.no", 4, 1)]))
    located = library.locate(variant)
    assert located.model == models / "m-00001-of-00002.gguf"
    assert located.size_bytes > len(whole)


def test_links_that_lead_out_are_refused(library, models, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "small.gguf").write_bytes((DEMO / "coding-q8_0.gguf").read_bytes())
    folder = models / "Qwen3-0.6B-GGUF"
    folder.symlink_to(outside)
    with pytest.raises(ModelFilesUnsafe, match="leads out of"):
        library.locate(GGUF)
    folder.unlink()
    folder.mkdir()
    (folder / "small.gguf").symlink_to(outside / "small.gguf")
    with pytest.raises(ModelFilesUnsafe, match="leads out of"):
        library.locate(GGUF)
    # What a person names by its own path may lie anywhere.
    assert library.locate(Variant("v", "t", "llamacpp", path=str(folder / "small.gguf"))).size_bytes > 0


def test_a_pickle_is_never_a_model(library, models):
    class Canary:
        def __reduce__(self):
            return (os.mkdir, (str(models / "canary"),))

    (models / "a.gguf").write_bytes(pickle.dumps(Canary()))
    with zipfile.ZipFile(models / "b.gguf", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Canary()))
    (models / "c.pt").write_bytes(pickle.dumps(Canary()))
    for name in ("a.gguf", "b.gguf", "c.pt"):
        with pytest.raises(ModelFilesUnsafe):
            library.locate(Variant("v", "t", "llamacpp", path=str(models / name)))
    assert not (models / "canary").exists()


# ExLlama folders --------------------------------------------------------------------------


def safetensors(header=None, data=b"\0" * 8, length=None):
    table = {"t": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]}} if header is None else header
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


@pytest.fixture
def exl(library):
    folder = library.folder(EXL)
    folder.mkdir()
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    (folder / "output.safetensors").write_bytes(safetensors())
    return folder


def test_exl_folder(library, exl):
    located = library.locate(EXL)
    assert (located.model, located.projector) == (exl, None)
    assert located.size_bytes == len(safetensors())
    assert library.locate(replace(EXL, repo="", revision="", path=str(exl))).model == exl


def test_exl_folder_missing(library, models):
    with pytest.raises(ModelNotDownloaded) as caught:
        library.locate(EXL)
    assert str(models / "phi-4-exl2-8hb-6.5bpw") in str(caught.value)


@pytest.mark.parametrize(("name", "kind"), [("config.json", "config.json"), ("output.safetensors", r"\*\.safetensors")])
def test_exl_file_missing(library, exl, name, kind):
    (exl / name).unlink()
    with pytest.raises(ModelNotDownloaded, match=f"no (file )?{kind}"):
        library.locate(EXL)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "a.PKL"])
def test_pickles_as_the_only_weights(library, exl, name):
    (exl / name).write_bytes(b"\x80\x04.")
    assert library.locate(EXL).model == exl
    (exl / "output.safetensors").unlink()
    with pytest.raises(ModelFilesUnsafe, match="run code"):
        library.locate(EXL)


def test_exl_shards(library, exl):
    (exl / "output.safetensors").rename(exl / "output-00001-of-00003.safetensors")
    (exl / "output-00003-of-00003.safetensors").write_bytes(safetensors())
    with pytest.raises(ModelNotDownloaded, match="output-00002-of-00003"):
        library.locate(EXL)
    (exl / "output-00002-of-00003.safetensors").write_bytes(safetensors())
    assert library.locate(EXL).size_bytes == 3 * len(safetensors())


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ({"weight_map": {"a": "output.safetensors"}}, None),
        ({"weight_map": {"a": "absent.safetensors"}}, ModelNotDownloaded),
        ({"weight_map": {"a": "../output.safetensors"}}, ModelFilesUnsafe),
        ({"weight_map": {"a": "/etc/passwd"}}, ModelFilesUnsafe),
        ({"weight_map": {"a": "..\\x.safetensors"}}, ModelFilesUnsafe),
        ({"weight_map": {"a": "C:x.safetensors"}}, ModelFilesUnsafe),
        ({"weight_map": {"a": "pytorch_model.bin"}}, ModelFilesUnsafe),
        ({"weight_map": {"a": 1}}, ModelFilesDamaged),
        ({"weight_map": []}, ModelFilesDamaged),
        ([], ModelFilesDamaged),
    ],
)
def test_shard_index(library, exl, index, error):
    (exl / "model.safetensors.index.json").write_text(json.dumps(index))
    if error is None:
        assert library.locate(EXL).model == exl
    else:
        with pytest.raises(error):
            library.locate(EXL)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "1" * 5000, "{}" + " " * 5_000_000, '{"a": 1, "a": 2}', "\xff"]
)
def test_config_that_is_damaged(library, exl, text):
    (exl / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelFilesDamaged, match=r"config\.json"):
        library.locate(EXL)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "extra"])
def test_exl_links_that_lead_out(library, exl, tmp_path, name):
    (tmp_path / "outside.json").write_text("{}")
    (exl / name).unlink(missing_ok=True)
    (exl / name).symlink_to(tmp_path / "outside.json")
    with pytest.raises(ModelFilesUnsafe, match="leads out of"):
        library.locate(EXL)


def test_exl_links_inside_are_fine_and_circles_are_not_followed(library, exl):
    (exl / "same.json").symlink_to("config.json")
    assert library.locate(EXL).model == exl
    (exl / "circle").symlink_to("circle")
    # Before Python 3.13 a circle cannot be resolved, and is refused.
    with contextlib.suppress(ModelFilesUnsafe):
        library.locate(EXL)


def test_exl_from_a_file(library, exl):
    with pytest.raises(ModelFilesDamaged, match="needs a folder of safetensors"):
        library.locate(replace(EXL, repo="", revision="", path=str(exl / "config.json")))


def test_a_folder_of_too_many_files(library, exl):
    for number in range(10_001):
        os.link(exl / "config.json", exl / str(number))
    with pytest.raises(ModelFilesDamaged, match="no model's folder"):
        library.locate(EXL)


def test_what_cannot_be_read(library, exl):
    (exl / "config.json").unlink()
    (exl / "config.json").mkdir()
    with pytest.raises(ModelFilesDamaged, match=r"config\.json cannot be read"):
        library.locate(EXL)


# Engines that are handed in --------------------------------------------------------------------


def test_another_engine(library, models):
    path = models / "fake.model"
    variant = Variant("v", "Fake", "fake", path=str(path))
    with pytest.raises(ModelNotDownloaded, match=r"no file fake\.model"):
        library.locate(variant)
    path.write_bytes(b"12345")
    assert library.locate(variant).size_bytes == 5
    assert library.locate(replace(variant, path=str(models))).size_bytes == 0
    assert library.locate(replace(variant, path=str(path), projector="fake.model")).projector == path
    with pytest.raises(ModelFilesUnsafe):
        library.locate(replace(variant, path=str(models / "x.pkl")))
    bundled = Variant("v", "Fake", "fake", bundled="coding")
    assert library.locate(bundled).model == DEMO / "coding-q8_0.gguf"


def test_another_engines_repo(library, models, tmp_path):
    variant = Variant("v", "Fake", "fake", repo="a/thing", revision="main")
    with pytest.raises(ModelNotDownloaded):
        library.locate(variant)
    (models / "thing-main").symlink_to(tmp_path)
    with pytest.raises(ModelFilesUnsafe):
        library.locate(variant)


# safetensors headers -----------------------------------------------------------------------------


def entry(**changes):
    return {"t": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\1\0",
        safetensors(length=2**63),
        safetensors(length=200 * 2**20),
        safetensors(length=10),
        safetensors(b"[" * 100_000),
        safetensors(b"[]"),
        safetensors(b'{"t": {}, "t": {}}'),
        safetensors({"t": 1}),
        safetensors(entry(data_offsets=[8, 0])),
        safetensors(entry(data_offsets=[0])),
        safetensors(entry(data_offsets=[0, 2**63])),
        safetensors(entry(data_offsets=[0, True])),
        safetensors(entry(data_offsets="ab")),
        safetensors(entry(shape=[2, 3])),
        safetensors(entry(shape=[-2, -2])),
        safetensors(entry(shape=[1] * 100)),
        safetensors(entry(shape=None)),
        safetensors({"a": entry()["t"], "b": entry()["t"]}),
        safetensors({"a": entry()["t"], "b": entry(data_offsets=[16, 24])["t"]}, b"\0" * 24),
        safetensors(data=b"\0" * 7),
        safetensors(data=b"\0" * 9),
    ],
)
def test_damaged_safetensors(tmp_path, raw):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    started = time.monotonic()
    with pytest.raises(ModelFilesDamaged, match=r"x\.safetensors"):
        check_safetensors(path)
    assert time.monotonic() - started < 1


def test_safetensors_with_a_huge_header(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 101 * 2**20))
        file.truncate(200 * 2**20)
    with pytest.raises(ModelFilesDamaged, match="its header has"):
        check_safetensors(path)


@pytest.mark.parametrize(
    "raw",
    [
        safetensors(),
        safetensors({}, b""),
        safetensors({"__metadata__": {"format": "pt"}, **entry()}),
        safetensors(entry(dtype="NEW4", shape=[16])),
        # A header of 640 bytes begins like a pickle.
        safetensors(json.dumps(entry()).encode().ljust(640)),
    ],
)
def test_good_safetensors(tmp_path, raw):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    check_safetensors(path)


def test_an_archive_renamed_to_safetensors(library, exl):
    with zipfile.ZipFile(exl / "output.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"\x80\x04.")
    with pytest.raises(ModelFilesUnsafe, match="under another name"):
        library.locate(EXL)


# GGUF headers ----------------------------------------------------------------------------------------


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor(name="t", shape=(32,), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


LAYOUTS = {0: "<B", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 12: "<d"}


def gguf(keys=(), tensors=(), data=b"", counts=None, version=3):
    body = b""
    for key, kind, value in keys:
        packed = struct.pack(LAYOUTS[kind], value) if kind in LAYOUTS else value
        body += string(key) + struct.pack("<I", kind) + packed
    body += b"".join(tensors)
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys)))) + body
    return head + b"\0" * (-len(head) % 32) + data


ARCH = ("general.architecture", 8, string("qwen2"))


def header_of(tmp_path, raw):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    return check_gguf(path)


def test_a_real_header():
    header = check_gguf(DEMO / "coding-q8_0.gguf")
    assert (header.version, header.architecture, header.alignment) == (3, "qwen2", 32)
    assert header.context_length == header.values["qwen2.context_length"] > 0
    assert header.tensors > 10 and header.name
    assert header.size_bytes == (DEMO / "coding-q8_0.gguf").stat().st_size
    assert "tokenizer.ggml.tokens" not in header.values
    with pytest.raises(TypeError):
        header.values["x"] = 1


def test_all_the_kinds_of_values(tmp_path):
    keys = [
        ARCH, ("a", 0, 1), ("b", 5, -1), ("c", 7, True), ("d", 10, 2**60), ("e", 12, 0.5),
        ("long", 8, string("x" * 999)), ("general.alignment", 4, 64), ("general.name", 4, 1),
        ("qwen2.context_length", 5, -5),
        ("strings", 9, struct.pack("<IQ", 8, 2) + string("a") + string("b" * 999)),
        ("numbers", 9, struct.pack("<IQ", 6, 3) + b"\0" * 12),
    ]  # fmt: skip
    raw = gguf(keys, [tensor(), tensor("u", (2,), 200, 128)])
    raw += b"\0" * (-len(raw) % 64 + 256)
    header = header_of(tmp_path, raw)
    assert (header.name, header.context_length, header.alignment, header.tensors) == ("", 0, 64, 2)
    assert {key: header.values[key] for key in "abcde"} == {"a": 1, "b": -1, "c": True, "d": 2**60, "e": 0.5}
    assert set(header.values).isdisjoint({"long", "strings", "numbers"})


GOOD = gguf([ARCH], [tensor()], b"\0" * 128)


def hostile():
    yield "empty", b""
    yield "magic", b"GGML" + GOOD[4:]
    yield "version", gguf([ARCH], [tensor()], b"\0" * 128, version=1)
    yield "big-endian", b"GGUF" + struct.pack(">I", 3) + GOOD[8:]
    yield "tensors", gguf([ARCH], [tensor()], counts=(2**60, 1))
    yield "keys", gguf([ARCH], [tensor()], counts=(1, 2**60))
    yield "key length", b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**63)
    yield "more keys", gguf([ARCH], counts=(1, 4000))
    yield "key text", gguf([ARCH, (b"\xff", 4, 1)], [tensor()])
    yield "string", gguf([ARCH, ("a", 8, struct.pack("<Q", 2**63))], [tensor()])
    yield "long string", gguf([ARCH, ("a", 8, struct.pack("<Q", 2**20))], [tensor()])
    yield "list", gguf([ARCH, ("a", 9, struct.pack("<IQ", 6, 2**62))], [tensor()])
    yield "strings", gguf([ARCH, ("a", 9, struct.pack("<IQ", 8, 2**60))], [tensor()])
    yield "string in a list", gguf([ARCH, ("a", 9, struct.pack("<IQQ", 8, 5, 2**63))], [tensor()])
    yield "list ends", gguf([ARCH, ("a", 9, struct.pack("<IQ", 8, 5))])
    yield "list of lists", gguf([ARCH, ("a", 9, struct.pack("<IQ", 9, 5) * 9)], [tensor()])
    yield "kind", gguf([ARCH, ("a", 13, b"")], [tensor()])
    yield "twice", gguf([ARCH, ARCH], [tensor()], b"\0" * 128)
    yield "no architecture", gguf([], [tensor()], b"\0" * 128)
    yield "architecture", gguf([(ARCH[0], 8, string("../x"))], [tensor()], b"\0" * 128)
    yield "architecture number", gguf([(ARCH[0], 4, 7)], [tensor()], b"\0" * 128)
    yield "no tensors", gguf([ARCH])
    for alignment in (0, 3, 48, 2**32 - 1):
        yield f"alignment {alignment}", gguf([ARCH, ("general.alignment", 4, alignment)], [tensor()], b"\0" * 128)
    yield "alignment kind", gguf([ARCH, ("general.alignment", 6, 32.0)], [tensor()], b"\0" * 128)
    yield "tensor name", gguf([ARCH], [tensor("x" * 65)], b"\0" * 128)
    yield "tensor twice", gguf([ARCH], [tensor(), tensor(offset=128)], b"\0" * 256)
    yield "dimensions", gguf([ARCH], [tensor(shape=(1,) * 5)], b"\0" * 128)
    yield "dimensions 2**32-1", gguf([ARCH], [string("t") + struct.pack("<I", 2**32 - 1)], b"\0" * 128)
    yield "shape", gguf([ARCH], [tensor(shape=(2**63, 2**63))], b"\0" * 128)
    yield "rows", gguf([ARCH], [tensor(shape=(33,), kind=8)], b"\0" * 128)
    yield "tensor type", gguf([ARCH], [tensor(kind=4000)], b"\0" * 128)
    yield "offset", gguf([ARCH], [tensor(offset=2**62)], b"\0" * 128)
    yield "odd offset", gguf([ARCH], [tensor(offset=1)], b"\0" * 256)
    yield "overlap", gguf([ARCH], [tensor(), tensor("u", offset=64)], b"\0" * 256)
    yield "truncated", GOOD[:-1]
    yield "newer type beyond the end", gguf([ARCH], [tensor(kind=99, offset=128)], b"\0" * 128)


@pytest.mark.parametrize("raw", [pytest.param(raw, id=name) for name, raw in hostile()])
def test_hostile_gguf(tmp_path, raw):
    started = time.monotonic()
    with pytest.raises(ModelFilesDamaged, match=r"x\.gguf is (damaged|cut off)"):
        header_of(tmp_path, raw)
    assert time.monotonic() - started < 1


def test_the_base_of_the_hostile_ones_is_good(tmp_path):
    assert header_of(tmp_path, GOOD).tensors == 1
    assert header_of(tmp_path, gguf([ARCH], [tensor()], b"\0" * 128, version=2)).version == 2
    assert header_of(tmp_path, gguf([ARCH], [tensor(shape=(64,), kind=8)], b"\0" * 68)).tensors == 1


def test_every_truncation_of_a_header_is_found(tmp_path):
    for length in range(len(GOOD)):
        with pytest.raises(ModelFilesDamaged):
            header_of(tmp_path, GOOD[:length])


@pytest.mark.timeout(20)
def test_a_file_full_of_empty_strings_ends_quickly_and_in_little_memory(tmp_path):
    path = tmp_path / "x.gguf"
    lists = [(f"list{n}", 9, struct.pack("<IQ", 8, 2**50)) for n in range(2)]
    with path.open("wb") as file:
        file.write(gguf([ARCH, *lists], counts=(1, 3)))
        file.truncate(40 * 2**30)  # sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with pytest.raises(ModelFilesDamaged):
        check_gguf(path)
    assert time.monotonic() - started < 1
    many = [("list", 9, struct.pack("<IQ", 8, 1_400_000)), ("rest", 8, b"")]
    with path.open("r+b") as file:
        file.write(gguf([ARCH, *many], counts=(2, 3)))  # two tensors, both without a name
    started = time.process_time()
    with pytest.raises(ModelFilesDamaged, match="occurs twice"):
        check_gguf(path)
    assert time.process_time() - started < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


@pytest.mark.parametrize("name", ["coding-q8_0.gguf", "vision-mmproj-q8_0.gguf"])
def test_mutated_headers_raise_nothing_else(tmp_path_factory, name):
    whole = (DEMO / name).read_bytes()
    path = tmp_path_factory.mktemp("fuzz") / "x.gguf"
    places = st.integers(0, 4095) | st.integers(0, 64)
    pieces = st.binary(min_size=1, max_size=9) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f"])

    @settings(max_examples=300, deadline=1000, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(places, pieces), min_size=1, max_size=6), st.none() | st.integers(0, len(whole)))
    def mutate(changes, length):
        raw = bytearray(whole)
        for place, piece in changes:
            raw[place : place + len(piece)] = piece
        path.write_bytes(raw[:length])
        try:
            header = check_gguf(path)
        except (ModelFilesDamaged, ModelFilesUnsafe):
            return
        assert header.size_bytes == len(raw[:length])

    mutate()


@settings(max_examples=300, deadline=1000, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 140), st.binary(min_size=1, max_size=9))
def test_mutated_safetensors_raise_nothing_else(tmp_path_factory, place, piece):
    raw = bytearray(safetensors({"__metadata__": {"format": "pt"}, **entry()}))
    raw[place : place + len(piece)] = piece
    path = tmp_path_factory.getbasetemp() / "x.safetensors"
    path.write_bytes(raw)
    try:
        check_safetensors(path)
    except (ModelFilesDamaged, ModelFilesUnsafe) as error:
        assert "\n" not in str(error)
