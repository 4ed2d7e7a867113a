"""The models folder: what lies there, and deleting that can be taken back, with real files and real threads."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modules.errors import InvalidRequest, ModelFilesError
from modules.library import Library
from modules.presets import Preset, Presets, Variant
from modules.shelf import KEPT_S, TRASH, Shelf

from .conftest import eventually

root_may_write = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
ODD = ["with space", "ünï→codé", "line\nbreak", "-rf", "'; rm *", "a" * 200, "1700000000-x", "..x", "%2e%2e", "nul"]
PRESET = """title = "{title}"
task = "coding"
[[variants]]
title = "Big 4.25"
engine = "exllamav2"
repo = "maker/Big-exl2"
revision = "4_25"
[[variants]]
title = "Small Q4"
engine = "llamacpp"
repo = "maker/Small-GGUF"
file = "small-Q4.gguf"
[[variants]]
title = "Small Q8"
engine = "llamacpp"
repo = "maker/Small-GGUF"
file = "small-Q8.gguf"
[[variants]]
title = "Lone file"
engine = "llamacpp"
path = "{models}/lone.gguf"
[[variants]]
title = "Deeper"
engine = "exllamav2"
path = "{models}/Group/deeper"
[[variants]]
title = "Demo"
engine = "llamacpp"
bundled = "coding"
"""


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def models(tmp_path: Path) -> Path:
    found = tmp_path / "models"
    files = {
        "Big-exl2-4_25/config.json": 20, "Big-exl2-4_25/output.safetensors": 5000, "Small-GGUF/small-Q4.gguf": 900,
        "Small-GGUF/.cache/deep/part": 50, "lone.gguf": 70, "Group/deeper/config.json": 7, ".partial/x/y": 3,
        ".hidden/z": 4,
    }  # fmt: skip
    for name, size in files.items():
        (found / name).parent.mkdir(parents=True, exist_ok=True)
        (found / name).write_bytes(os.urandom(size))
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(models: Path, clock: Clock, tmp_path: Path) -> Iterator[Callable[..., Shelf]]:
    """Shelves over the models folder; closed at the end."""
    made: list[Shelf] = []
    own = tmp_path / "presets"
    own.mkdir()
    (own / "mine.toml").write_text(PRESET.format(title="Mine", models=models))

    def build(busy: Callable[[Path], bool] = lambda folder: False, **used: float) -> Shelf:
        library, last = Library(models, tmp_path / "bundled"), {name.replace("_", " "): at for name, at in used.items()}
        made.append(Shelf(library, Presets([own]), lambda: last, busy, clock))
        return made[-1]

    yield build
    for shelf in made:
        shelf.close()


@pytest.fixture
def shelf(make: Callable[..., Shelf]) -> Shelf:
    return make()


def names(shelf: Shelf) -> set[str]:
    return {model.name for model in shelf.models()}


def fingerprint(path: Path) -> dict[str, str]:
    """Every file below, by its bytes."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def timers() -> list[threading.Thread]:
    """Those that still wait: a cancelled one takes a moment to end."""
    found = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    return [timer for timer in found if not timer.finished.is_set()]


# What lies there -------------------------------------------------------------------------------


def test_sizes_users_and_last_use_largest_first(make: Callable[..., Shelf]) -> None:
    found = make(Big_4=1.0, Small_Q4=50.0, Small_Q8=99.0, Lone_file=7.5).models()
    assert [(m.name, m.size_bytes) for m in found] == [
        ("Big-exl2-4_25", 5020), ("Small-GGUF", 950), ("lone.gguf", 70), ("Group", 7)
    ]  # fmt: skip
    # Of two variants in one folder only the one whose file is there uses it.
    assert [m.used_by for m in found] == [
        ("Mine · Big 4.25",), ("Mine · Small Q4",), ("Mine · Lone file",), ("Mine · Deeper",)
    ]  # fmt: skip
    assert [m.last_used_s for m in found] == [0.0, 50.0, 7.5, 0.0]


def test_two_presets_use_one_model_and_one_preset_is_named_once(
    make: Callable[..., Shelf], tmp_path: Path, models: Path
) -> None:
    (tmp_path / "presets" / "other.toml").write_text(PRESET.format(title="Other", models=models))
    assert make().models()[0].used_by == ("Mine · Big 4.25", "Other · Big 4.25")


def test_a_path_in_the_home_of_somebody_unknown_hides_no_other_model(models: Path, tmp_path: Path) -> None:
    class Lost(Presets):
        def list(self) -> list[Preset]:
            """The same error as for an account without a home, which a test cannot become."""
            lost = Variant("a", "A", "llamacpp", path="~nobody-of-that-name/x.gguf")
            big = Variant("b", "B", "exllamav2", repo="maker/Big-exl2", revision="4_25")
            return [Preset("own", "Own", "coding", variants=(lost, big))]

    shelf = Shelf(Library(models, tmp_path), Lost([]))
    assert shelf.models()[0].used_by == ("Own · B",)
    shelf.close()


def test_no_models_folder_before_the_first_download(tmp_path: Path) -> None:
    shelf = Shelf(Library(tmp_path / "none", tmp_path), Presets([]))
    assert (shelf.models(), shelf.deleted()) == ([], [])
    with pytest.raises(InvalidRequest):
        shelf.delete("x")
    shelf.purge()
    shelf.close()
    assert not (tmp_path / "none").exists()


# Deleting and taking back ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Big-exl2-4_25", "Small-GGUF", "lone.gguf"])
def test_a_deleted_model_comes_back_byte_for_byte(shelf: Shelf, models: Path, clock: Clock, name: str) -> None:
    before, size = fingerprint(models / name), {m.name: m.size_bytes for m in shelf.models()}[name]
    shelf.delete(name)
    assert name not in names(shelf)
    assert not (models / name).exists()
    clock.now_s += 60
    (gone,) = shelf.deleted()
    assert (gone.name, gone.size_bytes, gone.left_s) == (name, size, pytest.approx(KEPT_S - 60, abs=0.01))
    shelf.undo(gone.id)
    assert fingerprint(models / name) == before
    assert shelf.deleted() == []
    assert name in names(shelf)
    with pytest.raises(InvalidRequest, match="deleted for good"):
        shelf.undo(gone.id)


def test_undo_does_not_touch_a_new_model_of_that_name(shelf: Shelf, models: Path) -> None:
    old = fingerprint(models / "Small-GGUF")
    shelf.delete("Small-GGUF")
    (models / "Small-GGUF").mkdir()
    (models / "Small-GGUF" / "new").write_bytes(b"new")
    (gone,) = shelf.deleted()
    with pytest.raises(ModelFilesError, match="There is a new Small-GGUF") as caught:
        shelf.undo(gone.id)
    assert "Delete that one first" in caught.value.hint
    assert (models / "Small-GGUF" / "new").read_bytes() == b"new"
    shelf.delete("Small-GGUF")  # within the same millisecond: both are kept
    assert len({d.id for d in shelf.deleted()}) == 2
    shelf.undo(gone.id)
    assert fingerprint(models / "Small-GGUF") == old


def test_undo_does_not_replace_a_link_that_leads_nowhere(shelf: Shelf, models: Path) -> None:
    shelf.delete("lone.gguf")
    (models / "lone.gguf").symlink_to("nowhere")
    with pytest.raises(ModelFilesError, match="There is a new"):
        shelf.undo(shelf.deleted()[0].id)
    assert os.readlink(models / "lone.gguf") == "nowhere"


def test_a_file_that_was_deleted_twice_at_once_is_kept_twice(shelf: Shelf, models: Path) -> None:
    for content in (b"first", b"second"):
        (models / "lone.gguf").write_bytes(content)
        shelf.delete("lone.gguf")
    aside = [models / TRASH / gone.id for gone in shelf.deleted()]
    assert [path.read_bytes() for path in aside] == [b"second", b"first"]  # the latest first


def test_free_deletes_for_good_at_once(shelf: Shelf, models: Path) -> None:
    for name in ("Small-GGUF", "lone.gguf"):
        shelf.delete(name)
    for gone in shelf.deleted():
        shelf.free(gone.id)
        with pytest.raises(InvalidRequest):
            shelf.free(gone.id)
    assert list((models / TRASH).iterdir()) == []
    assert names(shelf) == {"Big-exl2-4_25", "Group"}


@pytest.mark.parametrize("name", ODD)
def test_odd_names_go_and_come_back(shelf: Shelf, models: Path, name: str) -> None:
    (models / name).mkdir()
    (models / name / "weights").write_bytes(b"w")
    if name.startswith("."):
        assert name not in names(shelf)  # hidden ones are not ours
        return
    shelf.delete(name)
    (gone,) = shelf.deleted()
    assert gone.name == name
    shelf.undo(gone.id)
    assert (models / name / "weights").read_bytes() == b"w"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../outside", "../models/lone.gguf", "/etc", "Group/deeper", "./lone.gguf", "lone.gguf/", TRASH,
     ".partial", ".hidden", "nothing", "lone.gguf\0", "LONE.GGUF"],
)  # fmt: skip
def test_names_that_are_no_entry_of_the_folder_are_refused(
    shelf: Shelf, models: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "outside").mkdir()
    before = fingerprint(tmp_path)
    with pytest.raises(InvalidRequest, match="There is no model"):
        shelf.delete(name)
    assert fingerprint(tmp_path) == before
    assert (tmp_path / "outside").is_dir()


@pytest.mark.parametrize("wanted", ["", "..", "../lone.gguf", "1-x/../../lone.gguf", "stranger", "x-1", "lone.gguf"])
def test_ids_that_are_none_are_refused(shelf: Shelf, models: Path, wanted: str) -> None:
    shelf.delete("Small-GGUF")
    (models / TRASH / "stranger").write_bytes(b"put there by hand")
    before = fingerprint(models)
    for act in (shelf.undo, shelf.free):
        with pytest.raises(InvalidRequest, match="deleted for good"):
            act(wanted)
    assert fingerprint(models) == before


@pytest.mark.parametrize("relative", [False, True])
def test_a_link_is_taken_away_and_never_what_it_leads_to(
    shelf: Shelf, models: Path, tmp_path: Path, clock: Clock, relative: bool
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "weights").write_bytes(b"precious")
    (models / "linked").symlink_to("../outside" if relative else outside)
    (models / "Big-exl2-4_25" / "inner").symlink_to(outside)
    shelf.delete("linked")
    shelf.undo(shelf.deleted()[0].id)
    assert (models / "linked" / "weights").read_bytes() == b"precious"
    shelf.delete("linked")
    shelf.free(shelf.deleted()[0].id)
    assert not os.path.lexists(models / "linked")
    shelf.delete("Big-exl2-4_25")
    clock.now_s += KEPT_S
    shelf.purge()
    assert shelf.deleted() == []
    assert (outside / "weights").read_bytes() == b"precious"


def test_a_model_that_is_being_downloaded_stays(make: Callable[..., Shelf], models: Path) -> None:
    asked: list[Path] = []

    def busy(folder: Path) -> bool:
        asked.append(folder)
        return folder.name == "Small-GGUF"

    shelf = make(busy)
    with pytest.raises(ModelFilesError, match="Small-GGUF is being downloaded") as caught:
        shelf.delete("Small-GGUF")
    assert "Cancel the download" in caught.value.hint
    assert (models / "Small-GGUF" / "small-Q4.gguf").is_file()
    shelf.delete("lone.gguf")
    assert asked == [models / "Small-GGUF", models / "lone.gguf"]


def test_what_is_neither_a_file_nor_a_folder_can_go_as_well(shelf: Shelf, models: Path) -> None:
    os.mkfifo(models / "pipe")
    (models / "broken").symlink_to("nowhere")
    for name in ("pipe", "broken"):
        shelf.delete(name)
        shelf.free(shelf.deleted()[0].id)
    assert list((models / TRASH).iterdir()) == []


# For good ------------------------------------------------------------------------------------------------


def test_what_nobody_took_back_is_deleted_for_good(shelf: Shelf, models: Path, clock: Clock) -> None:
    shelf.delete("Small-GGUF")
    clock.now_s += 100
    shelf.delete("lone.gguf")
    clock.now_s += KEPT_S - 101
    shelf.purge()
    assert [d.name for d in shelf.deleted()] == ["lone.gguf", "Small-GGUF"]  # the latest first
    clock.now_s += 2
    shelf.purge()
    assert [d.name for d in shelf.deleted()] == ["lone.gguf"]
    clock.now_s += 100
    shelf.purge()
    assert not (models / TRASH).exists()


def test_the_next_start_goes_on_with_what_was_left(make: Callable[..., Shelf], models: Path, clock: Clock) -> None:
    first = make()
    first.delete("Small-GGUF")
    clock.now_s += 10
    first.delete("lone.gguf")
    first.close()
    assert (models / TRASH).is_dir()  # closing deletes nothing
    clock.now_s += KEPT_S - 5
    second = make()
    assert [d.name for d in second.deleted()] == ["lone.gguf"]
    assert len(timers()) == 1  # it comes back for the other


def test_the_timer_comes_when_the_oldest_has_waited_long_enough(shelf: Shelf, models: Path, clock: Clock) -> None:
    shelf.delete("Small-GGUF")
    clock.now_s += KEPT_S - 1 + 0.95
    shelf.delete("lone.gguf")  # must not put the other one's end off
    clock.now_s += 1
    eventually(lambda: [d.name for d in shelf.deleted()] == ["lone.gguf"], 3)
    assert len(timers()) == 1


@root_may_write
def test_one_that_cannot_be_deleted_does_not_keep_the_others(shelf: Shelf, models: Path, clock: Clock) -> None:
    shelf.delete("lone.gguf")
    clock.now_s += 1
    shelf.delete("Small-GGUF")
    locked = models / TRASH / shelf.deleted()[0].id / ".cache"
    clock.now_s += KEPT_S
    locked.chmod(0o500)
    try:
        shelf.purge()
        (gone,) = shelf.deleted()
        assert gone.name == "Small-GGUF"
        with pytest.raises(ModelFilesError, match="could not be deleted: Permission denied"):
            shelf.free(gone.id)
        assert len(timers()) == 1  # it will be tried again
    finally:
        locked.chmod(0o700)
    shelf.purge()
    assert shelf.deleted() == []


def test_close_leaves_no_timer(make: Callable[..., Shelf]) -> None:
    shelf = make()
    assert timers() == []
    shelf.delete("Small-GGUF")
    shelf.delete("lone.gguf")
    assert len(timers()) == 1
    shelf.close()
    assert timers() == []
    shelf.delete("Group")
    shelf.purge()
    assert timers() == []
    shelf.close()


def test_two_threads_delete_one_model_once(shelf: Shelf, models: Path) -> None:
    for _ in range(30):
        together = threading.Barrier(4)

        def act(together: threading.Barrier = together) -> str:
            together.wait()
            try:
                shelf.delete("Small-GGUF")
            except InvalidRequest:
                return "refused"
            return "deleted"

        with ThreadPoolExecutor(4) as pool:
            told = sorted(task.result() for task in [pool.submit(act) for _ in range(4)])
        assert told == ["deleted", "refused", "refused", "refused"]
        (gone,) = shelf.deleted()
        shelf.undo(gone.id)
    assert (models / "Small-GGUF" / "small-Q4.gguf").is_file()


def test_looking_while_others_delete_never_fails(shelf: Shelf) -> None:
    over = threading.Event()

    def look() -> int:
        times = 0
        while not over.is_set():
            assert {m.name for m in shelf.models()} >= {"Big-exl2-4_25", "Group"}
            times += 1
        return times

    with ThreadPoolExecutor(2) as pool:
        looking = [pool.submit(look) for _ in range(2)]
        for _ in range(100):
            shelf.delete("lone.gguf")
            shelf.undo(shelf.deleted()[0].id)
        over.set()
        assert all(task.result() > 0 for task in looking)


# A disk that refuses -------------------------------------------------------------------------------------


@root_may_write
def test_a_folder_that_may_not_be_written_to(shelf: Shelf, models: Path) -> None:
    models.chmod(0o500)
    try:
        with pytest.raises(ModelFilesError, match=r"lone\.gguf could not be moved: Permission denied"):
            shelf.delete("lone.gguf")
    finally:
        models.chmod(0o700)
    assert "lone.gguf" in names(shelf)


def test_something_in_the_way_is_said_in_words(shelf: Shelf, models: Path) -> None:
    (models / TRASH).write_bytes(b"a file, where the folder would be")
    with pytest.raises(ModelFilesError, match=rf"lone\.gguf could not be moved: {os.strerror(errno.EEXIST)}"):
        shelf.delete("lone.gguf")
    assert "lone.gguf" in names(shelf)
    assert shelf.deleted() == []
    shelf.purge()
    assert (models / TRASH).is_file()
