"""Downloads against a real HTTP server with the hub's protocol: plans, resumption, faults, attacks, kill -9."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.downloads import Killer, judge, model, safetensors
from modules import downloads as module
from modules import hub as hub_module
from modules.downloads import MANIFEST, PARTIAL, RUNNING, Downloads, Options
from modules.errors import (
    AccessDenied,
    DownloadError,
    HashMismatch,
    ModelFilesError,
    ModelFilesUnsafe,
    ModelNotDownloaded,
    NotEnoughDisk,
    SourceNotFound,
    SourceUnreachable,
)
from modules.hub import INDEX, Plan, Ref
from modules.library import Library
from modules.presets import Presets, Variant
from modules.shelf import Shelf
from tests.conftest import eventually
from tests.hub_server import TOKEN, Hub, Repo, git_sha1

ROOT = Path(__file__).resolve().parent.parent
REF = Ref("maker/model-exl2", "4_25")
GGUF = Ref("maker/small-GGUF", file="small-Q4.gguf")
QUICK = Options(reserve_bytes=0, sync_bytes=64 * 1024, tries=3, backoff_s=0.02, timeout_s=2.0, cache_dir=os.devnull)


def gguf(size_bytes: int, architecture: str = "llama") -> bytes:
    """A GGUF file of one tensor of bytes."""
    word = lambda text: struct.pack("<Q", len(text)) + text  # noqa: E731
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + word(b"general.architecture") + struct.pack("<I", 8)
    head += word(architecture.encode()) + word(b"t") + struct.pack("<IQIQ", 1, size_bytes, 24, 0)
    return head + bytes(-len(head) % 32) + bytes(range(256)) * (size_bytes // 256) + bytes(size_bytes % 256)


@pytest.fixture
def hub():
    with Hub() as server:
        server.add(REF.repo, {"README.md": b"see the branches", "measurement.json": b"{}"})
        server.add(REF.repo, model(), REF.revision)
        server.add(GGUF.repo, {"small-Q4.gguf": gguf(300_000), "small-Q8.gguf": gguf(500_000),
                               "mmproj-F16.gguf": gguf(50_000, "clip")})  # fmt: skip
        yield server


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path / "models", tmp_path)


@pytest.fixture
def make(hub, library):
    """Downloads with quick limits; closed at the end."""
    made = []

    def build(options=QUICK, token=None, on_change=None):
        made.append(Downloads(library, hub.endpoint, lambda: token, options, on_change))
        return made[-1]

    yield build
    for downloads in made:
        downloads.close()


def finish(downloads, ref=REF):
    view = downloads.wait(downloads.start(ref).id, 30)
    assert view.state not in RUNNING, view
    return view


def done(downloads, ref=REF):
    view = finish(downloads, ref)
    assert view.state == "done", view.error
    return view


def failed(downloads, kind, words, ref=REF):
    view = finish(downloads, ref)
    assert (view.state, view.error["code"]) == ("failed", kind.code), view
    assert words in view.error["message"] + " " + view.error["hint"]
    return view


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def needed(files):
    return {name: data for name, data in files.items() if name not in ("README.md", "measurement.json")}


# Refs and plans ----------------------------------------------------------------------------


def test_a_download_is_published_whole_and_only_what_is_needed(hub, make, library):
    views = []
    downloads = make(on_change=views.append)
    view = done(downloads)
    folder = library.models_dir / "model-exl2-4_25"
    assert contents(folder) == needed(model())
    assert library.locate(REF.variant()).model == folder
    assert view.done_bytes == view.total_bytes == sum(map(len, needed(model()).values()))
    assert (view.files_done, view.files_total, view.folder) == (5, 5, str(folder))
    assert list((library.models_dir / PARTIAL).glob("model*")) == []
    states = list(dict.fromkeys(view.state for view in views))
    assert states == ["queued", "planning", "checking", "downloading", "publishing", "done"]
    manifest = module.read_manifest(folder)
    assert manifest["config.json"] == {
        "size_bytes": 19, "algorithm": "git-sha1", "digest": git_sha1(model()["config.json"]), "repo": REF.repo,
        "revision": "4_25", "commit": hub.repos[REF.repo].commit("4_25"),
    }  # fmt: skip
    assert module.verify(folder) == []
    (folder / "config.json").write_bytes(b"{" + b" " * 17 + b"}")
    (folder / "tokenizer.json").unlink()
    assert module.verify(folder) == ["config.json", "tokenizer.json"]
    json.dumps(view.to_dict())


def test_the_same_ref_is_the_same_job(hub, make):
    hub.bytes_per_s = 400_000
    downloads = make()
    first, second = downloads.start(REF), downloads.start(Ref("maker/model-exl2", "4_25"))
    assert first.id == second.id and len(downloads.jobs()) == 1
    assert Ref("maker/model-exl2", "6_5").id != first.id
    assert Ref.of(REF.variant()).id == first.id
    assert downloads.wait(first.id, 30).state == "done"
    assert len(hub.asked_for("output-00003-of-00003.safetensors")) == 1
    done(downloads)  # asked for again: all of it is there
    assert len(hub.asked_for("output-00003-of-00003.safetensors")) == 1


@pytest.mark.parametrize(
    "words",
    [("maker",), ("../x@main",), ("maker/model",), ("maker/model@a/b",), ("maker/model@..",), ("maker/m", "../a.gguf"),
     ("maker/m", "a.bin"), ("maker/m", "nul.gguf"), ("maker/m", "a.gguf", "b\\c.gguf"), ("/etc/passwd@main",)],
)  # fmt: skip
def test_refs_that_make_no_sense(words):
    with pytest.raises(SourceNotFound):
        Ref.parse(*words)


@pytest.mark.parametrize(
    ("repo", "revision", "folder"),
    [("a/con", "", "_con"), ("a/NUL", "", "_NUL"), ("a/aux.gguf", "", "_aux.gguf"), ("a/com1.x", "4.0", "_com1.x-4.0"),
     ("a/model.", "", "model._"), ("a/model", "v1.", "model-v1._"), ("a/con", "4.0", "con-4.0"),
     ("a/console", "", "console"), ("a/nul-GGUF", "", "nul-GGUF")],
)  # fmt: skip
def test_no_folder_is_named_like_a_device_of_windows(library, repo, revision, folder):
    file = "" if revision else "x.gguf"
    assert library.folder(Ref(repo, revision, file).variant()).name == folder


def test_a_repository_named_like_a_device_is_downloaded(hub, make, library):
    hub.add("maker/aux", {"x.gguf": gguf(1000)})
    ref = Ref("maker/aux", file="x.gguf")
    done(make(), ref)
    assert library.locate(ref.variant()).model == library.models_dir / "_aux" / "x.gguf"
    assert not list(library.models_dir.rglob("aux*"))


def test_refs_of_variants():
    assert Ref.parse("a/b@main") == Ref("a/b", "main")
    with pytest.raises(SourceNotFound, match="bundled"):
        Ref.of(Variant("v", "Demo", "llamacpp", bundled="coding"))
    assert Ref("a/b", file="x.gguf").title == "a/b x.gguf"


def test_a_branch_without_weights_is_noticed_before_anything_is_fetched(hub, make):
    downloads = make()
    ref = Ref(REF.repo, "main")
    with pytest.raises(SourceNotFound, match=r"holds no weights, only README\.md, measurement\.json") as caught:
        downloads.plan(ref)
    assert caught.value.hint == "Its branches: main, 4_25."
    failed(downloads, SourceNotFound, "4_25", ref)
    assert hub.asked_for("measurement.json") == []


def test_the_plan_says_what_it_takes_and_writes_nothing(hub, make, library):
    downloads = make()
    plan = downloads.plan(REF)
    assert plan.size_bytes == sum(map(len, needed(model()).values()))
    assert downloads.read_json(plan, "config.json") == {"model_type": "x"}
    assert not library.models_dir.exists()
    lines = []
    module.print_plan(plan, lines.append)
    assert "config.json" in "".join(lines) and "760.3 KB" in "".join(lines)


def planned(hub, make, files, revision="b"):
    hub.add("maker/other", files, revision)
    return {entry.name for entry in make().plan(Ref("maker/other", revision)).entries}


def index(*names):
    return json.dumps({"weight_map": {f"w{n}": name for n, name in enumerate(names)}}).encode()


def test_only_indexed_weights_are_taken(hub, make):
    files = {"config.json": b"{}", "consolidated.safetensors": b"c", "model-00001-of-00002.safetensors": b"a",
             "model-00002-of-00002.safetensors": b"b", "modeling.py": b"evil", "pytorch_model.bin": b"evil",
             "training_args.pt": b"evil", "onnx/model.safetensors": b"o", ".gitattributes": b"",
             "chat_template.jinja": b"t", "tokenizer.model": b"t"}  # fmt: skip
    parts = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    side = {"config.json", "chat_template.jinja", "tokenizer.model"}
    assert planned(hub, make, files) == parts | side
    named = {**files, "model.safetensors.index.json": index(*parts)}
    assert planned(hub, make, named) == parts | side | {"model.safetensors.index.json"}
    # The index that a converter left there names nothing of what is there.
    stale = {**files, "model.safetensors.index.json": index("model-00001-of-00014.safetensors")}
    assert planned(hub, make, stale) == parts | side
    assert planned(hub, make, {"config.json": b"{}", "consolidated.safetensors": b"c"}) == {
        "config.json", "consolidated.safetensors"}  # fmt: skip


def test_incomplete_repositories(hub, make):
    part = "model-00001-of-00002.safetensors"
    for files, words in [
        ({"config.json": b"{}", part: b"a"}, "lacks model-00002-of-00002"),
        ({"config.json": b"{}", part: b"a", "model.safetensors.index.json": index(part, "b.safetensors")}, "lacks b.s"),
        ({"model.safetensors": b"a"}, "no config.json"),
        ({"config.json": b"{}", "model.safetensors": b"a", "model.safetensors.index.json": b"[]"}, "damaged"),
        ({"config.json": b"{}", "model.safetensors": b"a", "model.safetensors.index.json": b"{"}, "damaged"),
    ]:
        with pytest.raises(SourceNotFound, match=words):
            planned(hub, make, files)
    with pytest.raises(ModelFilesUnsafe, match=r"model\.bin"):
        planned(hub, make, {"config.json": b"{}", "model.bin": b"a"})
    with pytest.raises(SourceNotFound, match=r"no file small-Q5\.gguf") as caught:
        make().plan(Ref(GGUF.repo, file="small-Q5.gguf"))
    assert "small-Q8.gguf" in caught.value.hint


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "C:x.json", "nul.json", "sub/../../x", "a//b",
     "con", "x\x00.json", ".", "com1.safetensors"],
)  # fmt: skip
def test_names_that_lead_elsewhere_refuse_the_repository(hub, make, name):
    hub.repos[REF.repo].tricks = [{"rfilename": name, "size": 1, "blobId": "0" * 40}]
    failed(make(), ModelFilesUnsafe, "leads elsewhere")


@pytest.mark.parametrize(
    ("trick", "kind", "words"),
    [
        ({"rfilename": "Config.json"}, None, ""),
        ({"rfilename": "a b.safetensors"}, ModelFilesUnsafe, "odd name"),
        ({"rfilename": "TOKENIZER.safetensors"}, None, ""),
        ({"rfilename": "vocab.json", "size": 10**12}, SourceUnreachable, "size of"),
        ({"rfilename": "vocab.json", "size": -1}, SourceUnreachable, "size of"),
        ({"rfilename": "vocab.json", "size": None}, SourceUnreachable, "size of"),
        ({"rfilename": "vocab.json", "blobId": "xyz"}, SourceUnreachable, "no hash"),
        ({"rfilename": "vocab.json", "blobId": None}, SourceUnreachable, "no hash"),
        ({"rfilename": "OUTPUT-00001-of-00003.safetensors"}, SourceNotFound, "lacks"),
    ],
)
def test_siblings_that_make_no_sense(hub, make, trick, kind, words):
    hub.repos[REF.repo].tricks = [{"size": 1, "blobId": "0" * 40, **trick}]
    if kind is None:
        make().plan(REF)
    else:
        with pytest.raises(kind, match=words):
            make().plan(REF)


def test_names_that_differ_in_capitals_and_too_many_files(hub, make):
    with pytest.raises(ModelFilesUnsafe, match="capitals"):
        planned(hub, make, {"config.json": b"{}", "a.safetensors": b"a", "A.safetensors": b"b"})
    hub.repos[REF.repo].tricks = [{"rfilename": f"{n}.txt", "size": 1, "blobId": "0" * 40} for n in range(10_001)]
    with pytest.raises(SourceNotFound, match="no model's repository"):
        make().plan(REF)
    with pytest.raises(SourceNotFound, match="which no model does"):
        planned(hub, make, {"config.json": b"{}", **{f"{n}.safetensors": b"a" for n in range(401)}}, "many")


# GGUF --------------------------------------------------------------------------------------


def test_gguf_files_share_a_folder(hub, make, library):
    downloads = make()
    done(downloads, GGUF)
    done(downloads, Ref(GGUF.repo, file="small-Q8.gguf", projector="mmproj-F16.gguf"))
    folder = library.models_dir / "small-GGUF"
    assert set(contents(folder)) == {"small-Q4.gguf", "small-Q8.gguf", "mmproj-F16.gguf"}
    assert set(module.read_manifest(folder)) == set(contents(folder))
    assert library.locate(GGUF.variant()).size_bytes == len(gguf(300_000))
    assert len(hub.asked_for("small-Q4.gguf")) == 1


def test_all_parts_of_a_split_gguf(hub, make, library):
    parts = {f"big-0000{n}-of-00003.gguf": gguf(1000 * n) for n in (1, 2, 3)}
    hub.add("maker/big", parts)
    done(make(), Ref("maker/big", file="big-00001-of-00003.gguf"))
    assert contents(library.models_dir / "big") == parts


def test_another_owners_repository_of_the_same_name(hub, make, library):
    downloads = make()
    done(downloads, GGUF)
    hub.add("rival/small-GGUF", {"small-Q4.gguf": gguf(299_999), "small-Q2.gguf": gguf(100)})
    failed(downloads, DownloadError, "of maker/small-GGUF", Ref("rival/small-GGUF", file="small-Q4.gguf"))
    done(downloads, Ref("rival/small-GGUF", file="small-Q2.gguf"))
    assert contents(library.models_dir / "small-GGUF")["small-Q4.gguf"] == gguf(300_000)


def test_a_pickle_under_another_name_is_not_published(hub, make, library):
    hub.add("maker/evil", {"a.gguf": b"PK\x03\x04" + bytes(100)})
    failed(make(), ModelFilesUnsafe, "pickle", Ref("maker/evil", file="a.gguf"))
    hub.add("maker/evil2", {"config.json": b"{}", "model.safetensors": safetensors(100)[:-1]}, "b")
    view = finish(make(), Ref("maker/evil2", "b"))
    assert view.error["code"] == "model_files_damaged"
    assert [path.name for path in library.models_dir.iterdir()] == [PARTIAL]


# What is on the machine already -------------------------------------------------------------


def test_an_existing_folder_is_used_in_place(hub, make, library):
    folder = library.models_dir / "model-exl2-4_25"
    folder.mkdir(parents=True)
    for name, data in needed(model()).items():
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("mine")
    (folder / "output-00002-of-00003.safetensors").unlink()
    hub.log.clear()
    done(make())
    sent = [asked.path.rpartition("/")[2] for asked in hub.log if asked.sent_bytes]
    assert sent == ["output-00002-of-00003.safetensors"]
    assert contents(folder) == needed(model())
    # A file of the person's own is never deleted.
    assert contents(folder.with_name(folder.name + ".replaced-1")) == {"notes.txt": b"mine"}


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mine", ["config.json", "output-00001-of-00003.safetensors", "another.safetensors", "My.GGUF"])
def test_a_folder_of_the_persons_own_is_left_alone(hub, make, library, mine):
    """A file that differs, or weights that the download would push aside: refused before anything is fetched."""
    folder = library.models_dir / "model-exl2-4_25"
    folder.mkdir(parents=True)
    (folder / mine).write_bytes(b"my own")
    (folder / "tokenizer.json").write_bytes(model()["tokenizer.json"])
    view = failed(make(), DownloadError, f"already holds another {mine}")
    assert "Move or rename" in view.error["hint"]
    assert not [asked for asked in hub.log if asked.sent_bytes]
    assert contents(folder) == {mine: b"my own", "tokenizer.json": model()["tokenizer.json"]}


def test_a_file_of_the_persons_own_is_not_replaced(hub, make, library):
    folder = library.models_dir / "small-GGUF"
    folder.mkdir(parents=True)
    (folder / GGUF.file).write_bytes(b"GGUFmine")
    downloads = make()
    failed(downloads, DownloadError, f"already holds another {GGUF.file}", GGUF)
    assert contents(folder) == {GGUF.file: b"GGUFmine"}
    (folder / GGUF.file).write_bytes(gguf(300_000))  # the very file that the hub has
    done(downloads, GGUF)
    assert not [asked for asked in hub.log if asked.sent_bytes]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_a_link_by_the_name_of_the_folder(make, library, tmp_path, kind):
    place = library.models_dir / "model-exl2-4_25"
    place.parent.mkdir()
    (tmp_path / "mine").mkdir()
    if kind == "file":
        place.write_bytes(b"mine")
    else:
        place.symlink_to(tmp_path / "mine")
    failed(make(), DownloadError, f"is a {kind}")
    assert place.is_symlink() if kind == "link" else place.read_bytes() == b"mine"


def test_another_owners_folder_of_the_same_name(hub, make, library):
    """They live side by side, and neither is taken for the other."""
    rival = Ref("rival/model-exl2", "4_25")
    files = {"config.json": model()["config.json"], "output.safetensors": safetensors(900)}
    hub.add(rival.repo, files, rival.revision)
    downloads = make()
    done(downloads)
    with pytest.raises(ModelNotDownloaded):
        library.locate(rival.variant())
    done(downloads, rival)
    first, second = library.models_dir / "model-exl2-4_25", library.models_dir / "rival--model-exl2-4_25"
    assert (contents(first), contents(second)) == (needed(model()), files)
    assert (library.locate(REF.variant()).model, library.locate(rival.variant()).model) == (first, second)
    shutil.rmtree(first)  # the second stays where it is
    assert library.locate(rival.variant()).model == second
    with pytest.raises(ModelNotDownloaded):
        library.locate(REF.variant())


def test_two_owners_downloads_that_began_together(hub, make, library):
    """Both were promised the same folder. The second is refused, and resumed it goes beside the first."""
    rival = Ref("rival/model-exl2", "4_25")
    files = {"config.json": model()["config.json"], "output.safetensors": safetensors(900)}
    hub.add(rival.repo, files, rival.revision)
    hub.bytes_per_s = 300_000
    downloads = make()
    job = under_way(downloads)
    second = downloads.start(rival).id
    hub.bytes_per_s = 0
    assert downloads.wait(job, 20).state == "done"
    view = downloads.wait(second, 20)
    assert view.state == "failed" and "of maker/model-exl2" in view.error["message"]
    assert contents(library.models_dir / "model-exl2-4_25") == needed(model())
    done(downloads, rival)
    assert contents(library.models_dir / "rival--model-exl2-4_25") == files


def test_what_comes_into_the_folder_meanwhile_is_left_alone(hub, make, library):
    """It is looked for once more before the publication; when it has been moved away, the download goes on."""
    hub.bytes_per_s = 300_000
    downloads = make()
    job = under_way(downloads)
    folder = library.models_dir / "model-exl2-4_25"
    folder.mkdir()
    (folder / "output-00001-of-00003.safetensors").write_bytes(b"my own")
    hub.bytes_per_s = 0
    view = downloads.wait(job, 20)
    assert view.state == "failed" and "already holds another output-00001" in view.error["message"]
    assert contents(folder) == {"output-00001-of-00003.safetensors": b"my own"}
    folder.rename(folder.with_name("mine"))
    sent = sum(asked.sent_bytes for asked in hub.log)
    done(downloads)
    assert contents(folder) == needed(model()) and sum(asked.sent_bytes for asked in hub.log) == sent


def test_a_part_that_is_taken_away_meanwhile_is_fetched_again(hub, make, library):
    """One that lay there already is not fetched; the model is not called whole when it is gone in the end."""
    parts = {f"big-0000{n}-of-00002.gguf": gguf(1000 if n == 1 else 300_000) for n in (1, 2)}
    hub.add("maker/big", parts)
    folder = library.models_dir / "big"
    folder.mkdir(parents=True)
    (folder / "big-00001-of-00002.gguf").write_bytes(gguf(1000))
    hub.bytes_per_s = 300_000
    downloads = make()
    ref = Ref("maker/big", file="big-00001-of-00002.gguf")
    job = under_way(downloads, ref, 50_000)
    folder.rename(folder.with_name("elsewhere"))
    hub.bytes_per_s = 0
    view = downloads.wait(job, 20)
    assert view.state == "failed" and "was taken away" in view.error["message"]
    done(downloads, ref)
    assert contents(folder) == parts


def test_a_model_that_is_put_back_under_a_download_is_not_mixed(hub, make, library):
    """Deleted while its newer version is paused, and taken back while that arrives."""
    downloads = make()
    done(downloads)
    hub.repos[REF.repo].branches[REF.revision] = model(5)
    hub.bytes_per_s = 300_000
    job = under_way(downloads, least=200_000)
    shelf = Shelf(library, Presets([]), busy=downloads.is_writing)
    with pytest.raises(ModelFilesError, match="is being downloaded"):
        shelf.delete("model-exl2-4_25")
    downloads.pause(job)
    downloads.wait(job, 5)
    shelf.delete("model-exl2-4_25")
    downloads.resume(job)
    shelf.undo(shelf.deleted()[0].id)
    hub.bytes_per_s = 0
    assert downloads.wait(job, 20).state == "done"
    assert contents(library.models_dir / "model-exl2-4_25") == needed(model(5))
    shelf.delete("model-exl2-4_25")
    done(downloads)
    with pytest.raises(ModelFilesError, match="There is a new"):
        shelf.undo(shelf.deleted()[0].id)
    shelf.close()


def test_what_the_person_changed_in_a_download_is_kept_beside_it(hub, make, library):
    downloads = make()
    done(downloads)
    done(downloads, GGUF)
    folder, shared = library.models_dir / "model-exl2-4_25", library.models_dir / "small-GGUF"
    (folder / "config.json").write_bytes(b'{"mine": 1}')
    (shared / GGUF.file).write_bytes(b"GGUFmine")
    hub.repos[REF.repo].branches[REF.revision] = model(5)
    done(downloads)
    done(downloads, GGUF)
    assert contents(folder) == needed(model(5))
    assert contents(folder.with_name(f"{folder.name}.replaced-1")) == {"config.json": b'{"mine": 1}'}
    assert contents(shared) == {GGUF.file: gguf(300_000), f"{GGUF.file}.replaced-1": b"GGUFmine"}


def test_a_manifest_that_names_files_elsewhere_deletes_none(hub, make, library, tmp_path):
    downloads = make()
    done(downloads)
    folder = library.models_dir / "model-exl2-4_25"
    (library.models_dir / "precious").write_bytes(b"mine")
    table = json.loads((folder / MANIFEST).read_text())
    entry = {"size_bytes": 4, "algorithm": "git-sha1", "digest": git_sha1(b"mine"), "repo": REF.repo}
    table["files"] |= {"../../../precious": entry, "../precious": entry, "": entry, "half": {"repo": REF.repo}}
    (folder / MANIFEST).write_text(json.dumps(table))
    hub.repos[REF.repo].branches[REF.revision] = model(5)
    done(downloads)
    assert contents(folder) == needed(model(5)) and (library.models_dir / "precious").read_bytes() == b"mine"


@pytest.mark.parametrize("taken", [False, True])
def test_a_cancelled_publication_gives_the_old_model_back(hub, make, library, taken):
    """Between its two renames the old model lies in the job's folder, which a cancel deletes."""
    downloads = make()
    done(downloads)
    folder, home = library.models_dir / "model-exl2-4_25", library.models_dir / PARTIAL / REF.id
    home.mkdir()
    folder.rename(home / "old")
    (home / "job.json").write_text(json.dumps({"ref": {"repo": REF.repo, "revision": REF.revision}, "state": "failed"}))
    if taken:
        folder.mkdir()
    again = make()
    again.cancel(REF.id)
    assert again.jobs() == [] and not home.exists()
    back = folder.with_name(f"{folder.name}.replaced-1") if taken else folder
    assert contents(back) == needed(model())


def test_a_publication_that_meets_a_foreign_folder_at_the_start_is_said(hub, make, library):
    """The server died before its publication, and the person put a folder of that name there."""
    first = make()
    (library.models_dir / "model-exl2-4_25").mkdir(parents=True)
    mine = library.models_dir / "model-exl2-4_25" / "mine.safetensors"
    home = library.models_dir / PARTIAL / REF.id
    (home / "files").mkdir(parents=True)
    for name, data in needed(model()).items():
        (home / "files" / name).write_bytes(data)
    entries = [vars(entry) for entry in first.plan(REF).entries]
    table = {"ref": vars(REF), "state": "publishing", "commit": "0" * 40, "entries": entries}
    (home / "job.json").write_text(json.dumps(table))
    mine.write_bytes(b"my own")
    second = make()
    (view,) = second.jobs()
    assert view.state == "failed" and "already holds another mine.safetensors" in view.error["message"]
    assert mine.read_bytes() == b"my own"
    mine.unlink()
    done(second)
    assert contents(mine.parent) == needed(model())


def test_the_cache_of_the_hub_library_is_used(hub, make, library, tmp_path):
    commit = hub.repos[REF.repo].commit("4_25")
    root = tmp_path / "cache" / "models--maker--model-exl2"
    (root / "blobs").mkdir(parents=True)
    (root / "snapshots" / commit).mkdir(parents=True)
    for name, data in needed(model()).items():
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data if name != "tokenizer.json" else data[::-1])
        (root / "snapshots" / commit / name).symlink_to(os.path.relpath(blob, root / "snapshots" / commit))
    done(make(replace(QUICK, cache_dir=str(tmp_path / "cache"))))
    assert [asked.path.rpartition("/")[2] for asked in hub.log if asked.sent_bytes] == ["tokenizer.json"]
    weights = library.models_dir / "model-exl2-4_25" / "output-00001-of-00003.safetensors"
    assert not weights.is_symlink() and weights.stat().st_nlink == 2  # no second copy on the disk
    assert contents(weights.parent) == needed(model())


def test_a_copy_where_links_are_impossible(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").write_bytes(b"old")
    module._link(tmp_path / "a", tmp_path / "b")  # a link onto an existing name fails like one to another disk
    assert (tmp_path / "b").read_bytes() == b"x" and (tmp_path / "a").stat().st_nlink == 1


def test_a_branch_that_moved_is_swapped_as_a_whole(hub, make, library):
    downloads = make()
    done(downloads)
    hub.repos[REF.repo].branches[REF.revision] = model(5)
    done(downloads)
    assert contents(library.models_dir / "model-exl2-4_25") == needed(model(5))
    assert {p.name for p in library.models_dir.iterdir()} == {PARTIAL, "model-exl2-4_25"}


# Pause, resume, cancel, restart ----------------------------------------------------------------


def under_way(downloads, ref=REF, least=150_000):
    view = downloads.start(ref)
    eventually(lambda: downloads.wait(view.id, 0).done_bytes > least, 10)
    return view.id


def starts(hub):
    return {name: [asked.start for asked in hub.asked_for(name)] for name in needed(model())}


def test_pause_and_resume_go_on_where_it_stopped(hub, make, library):
    hub.bytes_per_s = 300_000
    downloads = make()
    job = under_way(downloads)
    downloads.pause(job)
    view = downloads.wait(job, 5)
    assert view.state == "paused" and 150_000 < view.done_bytes < view.total_bytes
    parts = {
        p.name.removesuffix(".part"): p.stat().st_size for p in library.models_dir.glob(f"{PARTIAL}/*/parts/*.part")
    }
    assert parts
    hub.bytes_per_s = 0
    downloads.resume(job)
    assert downloads.wait(job, 20).state == "done"
    assert contents(library.models_dir / "model-exl2-4_25") == needed(model())
    for name, size in parts.items():
        assert starts(hub)[name] == [0, size], name


def test_a_restart_lists_the_job_as_paused_and_resumes_it(hub, make, library):
    hub.bytes_per_s = 300_000
    first = make()
    job = under_way(first)
    first.close()
    with pytest.raises(DownloadError, match="ending"):
        first.resume(job)
    commit = hub.repos[REF.repo].commit("4_25")
    hub.repos[REF.repo] = Repo({commit: model()})  # the commit is there, the branch is gone
    hub.repos[REF.repo].commit = lambda revision: commit
    second = make()
    (view,) = second.jobs()
    assert (view.id, view.state) == (job, "paused") and view.done_bytes > 150_000
    hub.bytes_per_s = 0
    second.resume(job)
    assert second.wait(job, 20).state == "done"
    assert make().jobs() == []


def test_resume_at_once_after_a_pause_is_one_job(hub, make):
    hub.bytes_per_s = 300_000
    downloads = make()
    job = under_way(downloads)
    for _ in range(3):
        downloads.pause(job)
        downloads.resume(job)
    hub.bytes_per_s = 0
    downloads.pause(job)
    downloads.resume(job)
    assert downloads.wait(job, 20).state == "done"


def test_cancel_deletes_what_has_arrived(hub, make, library):
    hub.bytes_per_s = 300_000
    views = []
    downloads = make(on_change=views.append)
    job = under_way(downloads)
    downloads.cancel(job)
    eventually(lambda: downloads.jobs() == [])
    eventually(lambda: views[-1].state == "cancelled")
    assert list(library.models_dir.glob(f"{PARTIAL}/*")) == [] and len(list(library.models_dir.iterdir())) == 1
    with pytest.raises(SourceNotFound, match="gone"):
        downloads.pause(job)
    job = under_way(downloads)
    downloads.pause(job)
    downloads.wait(job, 5)
    downloads.cancel(job)  # also one that rests
    assert downloads.jobs() == [] and list(library.models_dir.glob(f"{PARTIAL}/*")) == []
    hub.bytes_per_s = 0
    done(downloads)


def test_a_silent_server_does_not_hold_up_a_pause(hub, make):
    downloads = make(replace(QUICK, timeout_s=30.0))
    hub.bytes_per_s = 300_000
    job = under_way(downloads)
    hub.silent.set()
    time.sleep(0.1)
    began = time.monotonic()
    downloads.pause(job)
    assert downloads.wait(job, 10).state == "paused" and time.monotonic() - began < 2
    hub.silent.clear()


def test_a_silent_server_is_left_after_a_time(hub, make):
    hub.bytes_per_s = 300_000
    downloads = make(replace(QUICK, timeout_s=0.2, tries=2))
    job = under_way(downloads)
    hub.silent.set()
    view = downloads.wait(job, 10)
    assert view.state == "failed" and "is silent" in view.error["message"]
    hub.silent.clear()
    hub.bytes_per_s = 0
    done(downloads)


def test_two_at_once_and_the_rest_in_the_queue(hub, make):
    hub.bytes_per_s = 200_000
    hub.add("maker/c", {"c.gguf": gguf(300_000)})
    downloads = make(replace(QUICK, jobs_at_once=1))
    first = under_way(downloads, least=50_000)
    second = downloads.start(Ref("maker/c", file="c.gguf")).id
    time.sleep(0.1)
    assert downloads.wait(second, 0).state == "queued"
    downloads.pause(second)
    assert downloads.wait(second, 5).state == "paused"
    downloads.resume(second)
    hub.bytes_per_s = 0
    downloads.cancel(first)
    assert downloads.wait(second, 10).state == "done"


def test_two_servers_and_one_folder(hub, make):
    hub.bytes_per_s = 300_000
    one, two = make(), make()
    job = under_way(one)
    failed(two, DownloadError, "another Turntable")
    assert make().jobs() == []  # a third does not list what another has
    hub.bytes_per_s = 0
    assert one.wait(job, 20).state == "done"
    done(two)


def test_progress_speed_and_time_left(hub, make):
    hub.bytes_per_s = 100_000
    hub.add("maker/c", {"c.gguf": gguf(200_000)})
    downloads = make()
    job = under_way(downloads, Ref("maker/c", file="c.gguf"), 130_000)
    view = downloads.wait(job, 0)
    assert 60_000 < view.speed_bytes_s < 150_000
    assert view.left_s == pytest.approx((view.total_bytes - view.done_bytes) / view.speed_bytes_s)
    assert "KB/s" in module.progress_line(view)


def test_a_listener_that_fails_ends_nothing(make):
    def bad(view):
        raise ZeroDivisionError

    done(make(on_change=bad))


# The network ------------------------------------------------------------------------------------


def test_cut_connections_go_on_where_they_broke(hub, make, library):
    hub.cut_after = [30_000, 50_000, 64_000, 1, 0, 70_000]
    done(make(replace(QUICK, tries=5)))
    assert contents(library.models_dir / "model-exl2-4_25") == needed(model())
    for name, data in needed(model()).items():
        asked = hub.asked_for(name)
        assert [a.start for a in asked] == sorted(a.start for a in asked) and asked[-1].start <= len(data)


def test_tries_without_progress_end(hub, make):
    hub.cut_after = [0] * 50
    failed(make(), SourceUnreachable, "gave up after 3 tries. The connection to 127.0.0.1 broke.")


@pytest.mark.parametrize("headers", [{"retry-after": "1"}, {"ratelimit": '"api";r=0;t=1'}, "date"])
def test_429_waits_as_long_as_it_says(hub, make, headers):
    if headers == "date":
        headers = {"retry-after": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))}
    views = []
    hub.answers = [(429, headers)]
    began = time.monotonic()
    done(make(on_change=views.append), GGUF)
    assert time.monotonic() - began > 0.7
    assert any("asks for a pause" in view.note for view in views)


def test_429_in_the_middle_and_a_pause_meanwhile(hub, make):
    downloads = make()
    hub.answers = [(503, {}), (429, {"retry-after": "3000"})]
    view = downloads.start(GGUF)
    eventually(lambda: "3000 s" in downloads.wait(view.id, 0).note)
    downloads.pause(view.id)
    assert downloads.wait(view.id, 5).state == "paused"


def test_a_retry_after_that_is_nonsense():
    assert hub_module._retry_after({"retry-after": "soon"}) is None
    assert hub_module._retry_after({"retry-after": "99999999"}) == 3600
    assert hub_module._retry_after({}) is None


def test_no_network(library):
    downloads = Downloads(library, "http://127.0.0.1:9", lambda: None, QUICK)
    failed(downloads, SourceUnreachable, "127.0.0.1 cannot be reached")
    downloads.close()


def test_no_network_is_said_soon_to_somebody_who_asks(library):
    """With the limits of the program: the downloads' own patience is two minutes."""
    downloads = Downloads(library, "http://127.0.0.1:9", lambda: None)
    began = time.monotonic()
    for ask in (lambda: downloads.plan(REF), lambda: downloads.look(REF.repo)):
        with pytest.raises(SourceUnreachable, match=r"^127\.0\.0\.1 cannot be reached\.$") as caught:
            ask()
        assert "ask again" in caught.value.hint
    assert time.monotonic() - began < 10
    downloads.close()
    options = Options()
    assert options.lookup_tries * options.lookup_timeout_s + options.backoff_s <= 10


def test_a_lookup_tries_twice_and_waits_for_no_long_pause(hub, make):
    downloads = make()
    hub.answers = [(503, {})]
    plan = downloads.plan(REF)
    hub.answers = [(503, {})]
    assert downloads.read_json(plan, "config.json") == {"model_type": "x"}
    hub.answers = [(503, {})] * 2
    with pytest.raises(SourceUnreachable, match="answers 503"):
        downloads.plan(REF)
    hub.answers = [(429, {"retry-after": "30"})]
    began = time.monotonic()
    with pytest.raises(SourceUnreachable, match="asks for a pause"):
        downloads.plan(REF)
    assert time.monotonic() - began < 5 and hub.answers == []


def test_a_lookup_ends_when_the_program_ends(library):
    """Nobody answers the connection, and the program's end waits for nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        downloads = Downloads(library, address, lambda: None, replace(QUICK, lookup_timeout_s=30.0, timeout_s=30.0))
        said = []

        def ask():
            try:
                downloads.plan(REF)
            except DownloadError as error:
                said.append(str(error))

        asking = threading.Thread(target=ask)
        asking.start()
        connection, _ = silent.accept()
        began = time.monotonic()
        downloads.close()
        asking.join(10)
        assert said == ["Turntable is ending."] and time.monotonic() - began < 2
        with pytest.raises(DownloadError, match="ending"):
            downloads.look(REF.repo)
        connection.close()


def test_a_login_page_in_between(hub, make):
    hub.page = True
    failed(make(), SourceUnreachable, "login page")
    with pytest.raises(SourceUnreachable):
        make().plan(Ref("maker/none", "main"))


def test_a_server_without_ranges(hub, make, library):
    hub.ranges = False
    hub.cut_after = [30_000, 50_000]
    done(make())
    assert contents(library.models_dir / "model-exl2-4_25") == needed(model())


def test_compressed_answers_are_refused(hub, make):
    hub.gzip = True
    failed(make(), SourceUnreachable, "compressed")


def test_redirects_leave_no_token_and_no_encryption_behind(hub, make, library):
    done(make(token=TOKEN))
    assert {asked.token for asked in hub.log if asked.path.startswith("/api")} == {TOKEN}
    storage = [asked for asked in hub.log if asked.host == "storage" and "safetensors" in asked.path]
    assert storage and {asked.token for asked in storage} == {""}
    hub.redirect = "http://example.invalid/x"
    failed(make(), SourceUnreachable, "not encrypted", GGUF)
    hub.redirect = f"{hub.endpoint}/{GGUF.repo}/resolve/{hub.repos[GGUF.repo].commit('main')}/small-Q4.gguf"
    failed(make(), SourceUnreachable, "in a circle", GGUF)
    elsewhere = Downloads(library, "http://example.invalid", lambda: None)  # the program starts all the same
    with pytest.raises(SourceUnreachable, match="not encrypted"):
        elsewhere.plan(GGUF)


def test_offline_mode_of_the_hub_library(hub, tmp_path):
    script = f"""
        from pathlib import Path
        from modules.downloads import *
        from modules.hub import *
        d = Downloads(Library(Path({str(tmp_path / "m")!r}), Path(".")), {hub.endpoint!r}, lambda: None)
        print(d.wait(d.start(Ref("maker/model-exl2", "4_25")).id).error)
    """
    said = python(script, HF_HUB_OFFLINE="1")
    assert "source_unreachable" in said and "HF_HUB_OFFLINE" in said


def python(script, **environment):
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, env={**os.environ, **environment}, check=False,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


# Hashes -----------------------------------------------------------------------------------------


def test_wrong_bytes_are_fetched_once_more(hub, make, library):
    hub.wrong = {"output-00002-of-00003.safetensors": 1, "config.json": 1}
    done(make())
    assert contents(library.models_dir / "model-exl2-4_25") == needed(model())


def test_wrong_bytes_twice_are_an_error_and_never_listed(hub, make, library):
    hub.wrong = {"output-00002-of-00003.safetensors": 2}
    failed(make(), HashMismatch, "arrived twice with another content")
    with pytest.raises(ModelNotDownloaded):
        library.locate(REF.variant())
    again = make()
    (view,) = again.jobs()
    assert view.state == "failed" and view.error["code"] == "hash_mismatch"
    done(again)


def test_a_wrong_index_is_noticed(hub, make):
    files = {"config.json": b"{}", "model.safetensors": safetensors(9), INDEX: index("model.safetensors")}
    hub.add("maker/i", files, "b")
    hub.wrong = {INDEX: 1}
    with pytest.raises(HashMismatch):
        make().plan(Ref("maker/i", "b"))
    hub.cut_after = [3]
    assert len(make().plan(Ref("maker/i", "b")).entries) == 3


@pytest.mark.parametrize("change", [-1000, 1000])
def test_a_file_of_another_length(hub, make, change):
    plan_files = model()
    downloads = make()
    hub.repos[REF.repo].tricks = [
        {"rfilename": "extra.safetensors", "size": 5000 + change, "blobId": "0" * 40,
         "lfs": {"size": 5000 + change, "sha256": "0" * 64, "pointerSize": 1}}
    ]  # fmt: skip
    plan_files["extra.safetensors"] = b"x" * 5000
    hub.repos[REF.repo].tricks, tricks = [], hub.repos[REF.repo].tricks
    hub.repos[REF.repo].branches[REF.revision] = Shown(plan_files, tricks)
    hub.repos[REF.repo].tricks = tricks
    failed(downloads, HashMismatch, "another piece of extra.safetensors")


class Shown(dict):
    """Files of which one is described by the tricks and not by itself."""

    def __init__(self, files, tricks):
        super().__init__(files)
        self._hidden = {trick["rfilename"] for trick in tricks}

    def items(self):
        return [(name, data) for name, data in super().items() if name not in self._hidden]


# The disk -----------------------------------------------------------------------------------------


def test_the_disk_is_checked_before_with_the_reserve(hub, make):
    size = sum(map(len, needed(model()).values()))
    few = replace(QUICK, reserve_bytes=2 * 10**9, free_bytes=lambda folder: 2 * 10**9 + size - 1)
    failed(make(few), NotEnoughDisk, "2.00 GB stay in reserve, but the disk has 2.00 GB free")
    assert not [asked for asked in hub.log if asked.sent_bytes]
    done(make(replace(few, free_bytes=lambda folder: 2 * 10**9 + size)))


def test_a_disk_that_others_fill_meanwhile(hub, make):
    left = iter([10**9] + [100] * 100)
    downloads = make(replace(QUICK, reserve_bytes=1000, free_bytes=lambda folder: next(left)))
    view = failed(downloads, NotEnoughDisk, "has only 100 B left")
    assert 0 < view.done_bytes < view.total_bytes


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(hub, make, library):
    home = library.models_dir / PARTIAL / GGUF.id / "parts"
    home.mkdir(parents=True)
    (home / "small-Q4.gguf.part").symlink_to("/dev/full")
    downloads = make()
    failed(downloads, NotEnoughDisk, "is full", GGUF)
    (home / "small-Q4.gguf.part").unlink()
    done(downloads, GGUF)


@pytest.mark.skipif(os.name != "posix", reason="needs resource")
def test_a_disk_with_a_limit_for_one_file(hub, tmp_path):
    said = python(f"""
        import resource
        from pathlib import Path
        from modules.downloads import *
        from modules.hub import *
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        options = Options(reserve_bytes=0, cache_dir="/dev/null")
        d = Downloads(Library(Path({str(tmp_path / "m")!r}), Path(".")), {hub.endpoint!r}, lambda: None, options)
        view = d.wait(d.start(Ref("maker/model-exl2", "4_25")).id)
        print(view.error["code"], view.error["message"])
    """)
    assert "not_enough_disk The disk does not take files of this size." in said


def test_a_models_folder_that_cannot_be_written(hub, make, library):
    library.models_dir.write_text("a file")
    failed(make(), DownloadError, "cannot be written")


def test_other_downloads_count_against_the_disk(hub, make):
    hub.bytes_per_s = 200_000
    downloads = make(replace(QUICK, free_bytes=lambda folder: 900_000))
    job = under_way(downloads)
    failed(downloads, NotEnoughDisk, "other downloads", Ref(GGUF.repo, file="small-Q8.gguf"))
    downloads.cancel(job)


# Who may ---------------------------------------------------------------------------------------------


def test_gated_private_and_missing_repositories(hub, make):
    hub.add("maker/gated", model(), "b", gated=True)
    hub.add("maker/private", model(), "b", private=True)
    failed(make(), AccessDenied, "/maker/gated, accept the terms", Ref("maker/gated", "b"))
    failed(make(), SourceNotFound, "does not exist, or is private", Ref("maker/private", "b"))
    failed(make(), SourceNotFound, "maker/none does not exist", Ref("maker/none", "b"))
    failed(make(token=TOKEN), SourceNotFound, "maker/none does not exist", Ref("maker/none", "b"))
    view = failed(make(), SourceNotFound, "has no revision 9_0", Ref(REF.repo, "9_0"))
    assert view.error["hint"] == "Its branches: main, 4_25."
    done(make(token=TOKEN), Ref("maker/gated", "b"))
    done(make(token=TOKEN), Ref("maker/private", "b"))


def test_a_wrong_token_and_where_it_never_appears(hub, make, library, caplog):
    caplog.set_level("DEBUG")
    view = failed(make(token="hf_wrongsecret"), AccessDenied, "does not accept the stored token")
    hub.cut_after = [1000]
    done(make(token=TOKEN))
    done(make(token=TOKEN), GGUF)
    text = "".join(r.getMessage() for r in caplog.records if r.name.startswith("turntable")) + json.dumps(
        view.to_dict()
    )
    text += "".join(p.read_text(errors="replace") for p in library.models_dir.rglob("*.json"))
    for secret in ("hf_wrongsecret", TOKEN, "signature=secret"):
        assert secret not in text
    assert TOKEN not in caplog.text  # nor in anybody else's


def test_a_token_is_kept_in_the_file_of_the_hub_library(hub, tmp_path):
    script = f"""
        from pathlib import Path
        from modules.downloads import *
        from modules.hub import *
        d = Downloads(Library(Path({str(tmp_path / "m")!r}), Path(".")))
        try:
            d.save_token("hf_wrong")
        except AccessDenied as error:
            print(error)
        d.save_token({TOKEN!r})
        print(stored_token() == {TOKEN!r}, d.has_token)
        kept = (Path({str(tmp_path / "hf" / "token")!r})).read_text()
        d.forget_token()
        print(kept == {TOKEN!r}, d.has_token, stored_token())
    """
    home = tmp_path / "hf"
    said = python(script, HF_ENDPOINT=hub.endpoint, HF_HOME=str(home), HF_TOKEN="")
    assert "The hub does not accept this token.\n" in said and TOKEN not in said
    assert "True True\n" in said and "True False None\n" in said
    assert not (home / "token").exists()
    python(f"from modules.downloads import *\nDownloads(Library(Path('m'), Path('.'))).save_token({TOKEN!r})",
           HF_ENDPOINT=hub.endpoint, HF_HOME=str(home), HF_TOKEN="")  # fmt: skip
    assert (home / "token").read_text() == TOKEN and (home / "token").stat().st_mode & 0o077 == 0


# Kills and power cuts ------------------------------------------------------------------------------


def test_kill_9_at_random_moments(tmp_path):
    """A small share of `python -m benchmarks.downloads`, two at a time."""
    total = {}

    def work(first):
        with Killer() as killer:
            for run in range(first, first + 4):
                with Hub() as hub:
                    hub.add(REF.repo, model(run), REF.revision)
                    hub.bytes_per_s = 1_000_000
                    seen = killer.order("kills", hub, tmp_path / str(run), REF, run)
                    for name, value in judge(hub, model(run), seen).items():
                        total[name] = total.get(name, 0) + value

    threads = [threading.Thread(target=work, args=(first,)) for first in (1000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total["kills"] >= 30
    assert (total["half"], total["twice"], total["failed"]) == (0, 0, 0)
    # What is in the sockets and in the block that is being read when a kill comes, of four connections.
    assert total["lost"] / total["kills"] < 4 * 128 * 1024


@pytest.mark.parametrize("there", ["nothing", "older", "other"])
def test_a_crash_before_any_rename(hub, tmp_path, there):
    """Die before the first rename, the second, … until there are no more; what is listed is whole, always."""
    ref = GGUF if there == "other" else REF
    hub.repos[REF.repo].branches[REF.revision] = new = {
        "config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": safetensors(3000, 1)
    }  # fmt: skip
    new = {GGUF.file: gguf(300_000)} if ref is GGUF else new
    old = {**new, "tokenizer.json": b"{}", "model.safetensors": safetensors(3000, 2), "notes.txt": b"mine"}
    allowed = [None, digests(new)] + ([digests(old)] if there == "older" else [])
    with Killer() as killer:
        for nth in range(1, 60):
            models = tmp_path / str(nth)
            folder = Library(models, models).folder(ref.variant())
            if there != "nothing":
                folder.mkdir(parents=True)
                for name, data in (old if there == "older" else {"other.gguf": gguf(10)}).items():
                    (folder / name).write_bytes(data)
                if there == "older":
                    (folder / MANIFEST).write_text(json.dumps({"files": {
                        name: {"size_bytes": len(data), "algorithm": "sha256", "repo": ref.repo,
                               "digest": hashlib.sha256(data).hexdigest()}
                        for name, data in old.items() if name != "notes.txt"
                    }}))  # fmt: skip
            seen = killer.order("crashes", hub, models, ref, nth)
            if seen["listed"] is not None:
                seen["listed"].pop(MANIFEST, None)
                if there == "other":
                    seen["listed"].pop("other.gguf")
                    seen["listed"].pop(MANIFEST + ".new", None)  # a draft of a manifest
            assert seen["listed"] in allowed, nth
            if not seen["died"]:
                break
            assert seen["code"] == 0 and {n: seen["after"][n] for n in new} == digests(new), nth
            assert list((models / PARTIAL).glob("*/*")) == []
            kept = folder.with_name(folder.name + ".replaced-1") / "notes.txt"
            assert there != "older" or kept.read_bytes() == b"mine"
    assert nth > 5 and not seen["died"]


def digests(files):
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def test_after_a_power_cut_the_unsynced_end_is_given_up(hub, make, library):
    hub.bytes_per_s = 300_000
    first = make(replace(QUICK, sync_bytes=100_000))
    job = under_way(first, least=400_000)
    first.close()
    name = "output-00003-of-00003.safetensors"
    part = library.models_dir / PARTIAL / job / "parts" / f"{name}.part"
    mark = part.with_name(f"{name}.sync")
    size = part.stat().st_size
    # The close may have come just after a sync; an older mark is as true.
    synced = min(json.loads(mark.read_text())["synced"], size - 4096)
    assert 0 < synced < size
    with part.open("r+b") as file:  # as some file systems leave it: the length is there, the bytes are not
        file.seek(synced)
        file.write(bytes(size - synced))
    mark.write_text(json.dumps({"synced": synced, "boot": "another run of the machine"}))
    hub.bytes_per_s = 0
    second = make()
    done(second)
    assert [asked.start for asked in hub.asked_for(name)] == [0, synced]
    assert contents(library.models_dir / "model-exl2-4_25") == needed(model())


def test_damaged_journals_harm_nothing(hub, make, library):
    home = library.models_dir / PARTIAL
    for name, text in {"a": "{", "b": "[]", "c": '{"ref": {"repo": "../x"}}', "d": '{"ref": {"repo": "a/b", "x": 1}}',
                       "e": '{"ref": {"repo": "a/b", "revision": "c"}}'}.items():  # fmt: skip
        (home / name).mkdir(parents=True)
        (home / name / "job.json").write_text(text)
    (home / REF.id).mkdir()
    table = {"ref": {"repo": REF.repo, "revision": REF.revision}, "state": "publishing", "commit": "x",
             "entries": [{"name": "../evil", "size_bytes": 1, "algorithm": "sha256", "digest": "0" * 64}]}  # fmt: skip
    (home / REF.id / "job.json").write_text(json.dumps(table))
    downloads = make()
    assert [view.id for view in downloads.jobs()] == [REF.id]
    done(downloads)
    assert contents(library.models_dir / "model-exl2-4_25") == needed(model())


# The terminal ---------------------------------------------------------------------------------------


def test_the_terminal_shows_progress_and_errors(hub, make, library):
    said = []
    assert module.run_download(make(), REF, said.append, live=True) == 0
    assert "100%" in said[-1] and "5/5 files" in said[-1] and str(library.models_dir) in said[-1]
    said.clear()
    assert module.run_download(make(), Ref("maker/none", "b"), said.append) == 1
    assert "maker/none does not exist, or is private.\nCheck the name" in "".join(said)


def test_ctrl_c_pauses(hub, make):
    hub.bytes_per_s = 200_000
    downloads = make()

    def write(text):
        if "KB of" in text and "[ " not in text:
            raise KeyboardInterrupt

    assert module.run_download(downloads, REF, write, live=True) == 130
    assert downloads.jobs()[0].state == "paused"


def test_the_list_of_models(hub, make, library):
    downloads = make()
    done(downloads)
    downloads.start(Ref("maker/none", "b"))
    downloads.wait(Ref("maker/none", "b").id, 10)
    lines = []
    absent = Variant("v", "Absent", "llamacpp", repo="a/b", file="c.gguf", size_bytes=2_500_000_000)
    module.print_models(library, [("coding", REF.variant()), ("vision", absent)], downloads, lines.append)
    assert "ready, 720" in lines[0] and "not downloaded (2.50 GB)" in lines[1]
    assert any("maker/none@b" in line and "failed" in line for line in lines)


def test_times_and_sizes():
    assert [module._time(s) for s in (5, 65, 7265)] == ["5 s", "1 min 05 s", "2 h 01 min"]
    assert [module._size(n) for n in (5, 5000, 5 * 10**6, 5 * 10**9)] == ["5 B", "5.0 KB", "5.0 MB", "5.00 GB"]


def test_a_plan_is_data(tmp_path):
    assert Plan(REF, "c", tmp_path, ()).size_bytes == 0
    shutil.rmtree(tmp_path)
    assert module._free_bytes(tmp_path / "a" / "b") > 0


def test_a_publication_that_the_disk_refuses_is_finished_at_the_next_start(hub, make, library):
    """A file in the way of the folder's name stands for a folder that Windows will not rename while it is in use."""
    downloads = make()
    done(downloads)
    hub.repos[REF.repo].branches[REF.revision] = model(3)
    (library.models_dir / PARTIAL / REF.id).mkdir()
    (library.models_dir / PARTIAL / REF.id / "old").write_text("in the way")
    failed(downloads, DownloadError, "cannot be written")
    assert contents(library.models_dir / "model-exl2-4_25") == needed(model())
    (view,) = make().jobs()
    assert view.state == "failed"
    (library.models_dir / PARTIAL / REF.id / "old").unlink()
    sent = len(hub.log)
    downloads.resume(REF.id)
    assert downloads.wait(REF.id, 20).state == "done"
    assert contents(library.models_dir / "model-exl2-4_25") == needed(model(3))
    assert all(not asked.sent_bytes for asked in hub.log[sent:])


def test_a_token_cannot_be_checked_without_a_network(tmp_path):
    script = f"""
        from pathlib import Path
        from modules.downloads import *
        from modules.hub import *
        d = Downloads(Library(Path({str(tmp_path / "m")!r}), Path(".")))
        try:
            d.save_token("hf_x")
        except SourceUnreachable as error:
            print(error)
    """
    assert "so the token could not be checked" in python(
        script, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path)
    )


def test_other_statuses(hub, make):
    for status, kind in [(403, AccessDenied), (418, SourceUnreachable), (416, HashMismatch)]:
        hub.answers = [(status, {})]
        with pytest.raises(kind):
            make().plan(REF)
    plan = make().plan(GGUF)
    hub.repos[GGUF.repo].branches["main"].clear()
    with pytest.raises(SourceNotFound, match=r"no longer has the file small-Q4\.gguf"):
        make().read_json(plan, "small-Q4.gguf")
