"""Conversations: what is kept through kills, full disks, damage and threads, and what is refused.

Every fault is a real one: processes are killed, files cut and overwritten, limits set by the system.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modules.chats import (
    MIGRATIONS,
    RENAME_CHARS,
    TEXT_BYTES,
    TITLE_CHARS,
    ChatMessage,
    Chats,
    clean_title,
    upgrade,
)
from modules.errors import ChatDamaged, ChatNotFound, EngineCrashed, InvalidRequest
from modules.messages import Counts, Timings

ROOT = Path(__file__).resolve().parent.parent
PAGE_BYTES = 4096

# The first version as it went out. It never changes: files of people look like this.
VERSION_1 = """
PRAGMA application_id = 1414680148;
CREATE TABLE chats (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, title TEXT NOT NULL,
    titled INTEGER NOT NULL DEFAULT 0, preset TEXT NOT NULL, created_s REAL NOT NULL, updated_s REAL NOT NULL,
    messages INTEGER NOT NULL DEFAULT 0, change INTEGER NOT NULL UNIQUE, deleted INTEGER NOT NULL DEFAULT 0);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT, chat TEXT NOT NULL, seq INTEGER NOT NULL, role TEXT NOT NULL,
    state TEXT NOT NULL, images TEXT NOT NULL, preset TEXT NOT NULL, variant TEXT NOT NULL,
    counts TEXT, timings TEXT, error TEXT, created_s REAL NOT NULL,
    text TEXT NOT NULL, reasoning TEXT NOT NULL, UNIQUE (chat, seq));
CREATE INDEX messages_running ON messages (id) WHERE state = 'running';
CREATE INDEX messages_with_images ON messages (images) WHERE images <> '[]';
INSERT INTO chats VALUES (1, 'old', 'An old one', 1, 'vision', 10.5, 11.5, 1, 1, 0);
INSERT INTO messages VALUES (1, 'old', 1, 'user', 'done', '["i1"]', 'vision', '', NULL, NULL, NULL, 10.5, 'hello', '');
PRAGMA user_version = 1;
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "chats.db"


@pytest.fixture
def chats(path: Path) -> Iterator[Chats]:
    with closing(Chats(path)) as opened:
        yield opened


@contextmanager
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    """The file without our code in between."""
    path.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        yield db


def filled(path: Path, chat_count: int = 20, pairs: int = 5) -> list[ChatMessage]:
    """A file with conversations of equal length; returns the messages as they were acknowledged."""
    told = []
    with closing(Chats(path)) as chats:
        for number in range(chat_count):
            chat = chats.create("coding").id
            for turn in range(pairs):
                told.append(chats.add_user(chat, f"needle-{number}-{turn} " + "q" * 300, ("img",), "coding"))
                answer = chats.begin_answer(chat, "coding", "Demo")
                told.append(chats.end_answer(answer.id, text="a" * 300, reasoning="", state="done"))
    return told


def everything(chats: Chats) -> list[ChatMessage]:
    """All the messages; fails when the count, the order or a chat's line does not fit them."""
    found = []
    for info in chats.list(limit=100_000):
        messages = chats.messages(info.id)
        assert [m.seq for m in messages] == sorted({m.seq for m in messages})
        assert info.messages == max([m.seq for m in messages], default=0)
        found += messages
    return sorted(found, key=lambda m: m.id)


def run_child(code: str, *words: object) -> str:
    """Run a script of ours to its end; what it printed."""
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The ordinary life of a conversation ----------------------------------------------


def test_a_conversation_from_question_to_answer_survives_the_restart(path: Path) -> None:
    counts, timings = Counts(prompt=5, completion=2), Timings(generate_s=0.5, tokens_per_second=4.0)
    with closing(Chats(path)) as chats:
        chat = chats.create("vision")
        assert (chat.title, chat.preset, chat.messages) == ("New conversation", "vision", 0)
        assert re.fullmatch(r"[A-Za-z0-9_-]{16,}", chat.id)
        question = chats.add_user(chat.id, "What is\nthis?", ("i1", "i2"), "vision")
        answer = chats.begin_answer(chat.id, "vision", "Big")
        assert (question.seq, answer.seq, answer.state, answer.text) == (1, 2, "running", "")
        chats.save_progress(answer.id, "A c", "Let me see")
        assert chats.messages(chat.id)[1].text == "A c"
        ended = chats.end_answer(
            answer.id, text="A cat.", reasoning="Let me see.", state="done", counts=counts, timings=timings
        )
    assert (ended.counts, ended.timings, ended.variant, ended.error) == (counts, timings, "Big", None)
    with closing(Chats(path)) as chats:
        assert chats.notices == ()
        assert chats.messages(chat.id) == [question, ended]
        info = chats.get(chat.id)
        assert (info.title, info.messages) == ("What is", 2)
        assert chats.used_images() == {"i1", "i2"}
        assert chats.recover() == 0


def test_an_answer_can_end_badly_and_says_why(chats: Chats) -> None:
    chat = chats.create("a").id
    error = EngineCrashed("It ended.").to_wire()
    ended = chats.end_answer(
        chats.begin_answer(chat, "a", "Big").id, text="ha", reasoning="", state="broken", error=error, variant="Small"
    )
    assert (ended.state, ended.error, ended.variant, ended.text) == ("broken", error, "Small", "ha")
    assert chats.messages(chat) == [ended]


def test_the_first_end_of_an_answer_stands(chats: Chats) -> None:
    chat = chats.create("a").id
    answer = chats.begin_answer(chat, "a", "Big")
    first = chats.end_answer(answer.id, text="one", reasoning="", state="stopped")
    before = chats.get(chat)
    assert chats.end_answer(answer.id, text="two", reasoning="", state="done") == first
    chats.save_progress(answer.id, "late", "late")
    assert chats.messages(chat) == [first]
    assert chats.get(chat) == before


def test_a_wrong_state_is_a_mistake_of_the_caller(chats: Chats) -> None:
    answer = chats.begin_answer(chats.create("a").id, "a", "Big")
    with pytest.raises(ValueError, match="running"):
        chats.end_answer(answer.id, text="", reasoning="", state="running")


def test_pages_of_messages_come_in_order(chats: Chats) -> None:
    chat = chats.create("a").id
    for number in range(1, 11):
        chats.add_user(chat, str(number), (), "a")
    seqs = lambda **which: [m.seq for m in chats.messages(chat, **which)]  # noqa: E731
    assert seqs() == list(range(1, 11))
    assert seqs(limit=3) == [8, 9, 10]
    assert seqs(before_seq=8, limit=3) == [5, 6, 7]
    assert seqs(before_seq=3) == [1, 2]
    assert seqs(limit=0) == seqs(limit=-5) == seqs(before_seq=-(10**30)) == []
    assert seqs(before_seq=10**30, limit=10**30) == list(range(1, 11))


def test_the_list_is_ordered_by_change_and_comes_in_pages(chats: Chats) -> None:
    ids = [chats.create("a").id for _ in range(7)]
    answer = chats.begin_answer(ids[2], "a", "Big")
    chats.add_user(ids[4], "x", (), "a")
    chats.rename(ids[0], "y")
    chats.end_answer(answer.id, text="", reasoning="", state="done")
    expected = [ids[2], ids[0], ids[4], ids[6], ids[5], ids[3], ids[1]]
    assert [info.id for info in chats.list()] == expected
    paged, cursor = [], None
    while page := chats.list(limit=2, before=cursor):
        paged += [info.id for info in page]
        cursor = page[-1].cursor
    assert paged == expected
    assert chats.list(limit=0) == chats.list(limit=-1) == []


def test_a_clock_that_jumps_does_not_change_the_order(path: Path) -> None:
    with closing(Chats(path)) as chats:
        ids = [chats.create("a").id for _ in range(4)]
    with raw(path) as db:
        for chat, time_s in zip(ids, (3e9, 5.0, -1e9, 1e9), strict=True):
            db.execute("UPDATE chats SET updated_s = ?, created_s = ? WHERE id = ?", (time_s, time_s, chat))
    with closing(Chats(path)) as chats:
        assert [info.id for info in chats.list()] == ids[::-1]
        chats.add_user(ids[1], "x", (), "a")
        assert chats.list()[0].id == ids[1]


@pytest.mark.parametrize("before", [(), ("x", "y"), (None,), 5])
def test_a_wrong_place_in_the_list_is_refused(chats: Chats, before: object) -> None:
    with pytest.raises(InvalidRequest):
        chats.list(before=before)  # type: ignore[arg-type]


def test_the_preset_last_used_stays_with_the_conversation(chats: Chats) -> None:
    chat = chats.create("a").id
    chats.add_user(chat, "x", (), "b")
    assert chats.get(chat).preset == "b"
    chats.begin_answer(chat, "c", "Big")
    assert [chats.get(chat).preset, chats.messages(chat)[0].preset] == ["c", "b"]


def test_when_each_model_last_answered(path: Path) -> None:
    with closing(Chats(path)) as chats:
        assert chats.last_used() == {}
        chat, other = chats.create("a").id, chats.create("b").id
        chats.add_user(chat, "a question names no model", (), "a")
        asked = ((chat, "Big"), (chat, "Small"), (other, "Big"))
        answers = [chats.begin_answer(each, "a", variant).id for each, variant in asked]
    with raw(path) as db:
        db.executemany("UPDATE messages SET created_s = ? WHERE id = ?", zip((30.5, 20.0, 10.0), answers, strict=True))
    with closing(Chats(path)) as chats:
        assert chats.last_used() == {"Big": 30.5, "Small": 20.0}


# Titles and texts -----------------------------------------------------------------


def test_the_first_text_gives_the_title_and_a_person_may_change_it(chats: Chats) -> None:
    chat = chats.create("a").id
    chats.add_user(chat, " \n", ("i",), "a")
    assert chats.get(chat).title == "New conversation"
    chats.add_user(chat, "first words", (), "a")
    chats.add_user(chat, "second words", (), "a")
    assert chats.get(chat).title == "first words"
    assert chats.rename(chat, "  mine\x1b[31m ").title == "mine[31m"
    chats.add_user(chat, "third words", (), "a")
    assert chats.get(chat).title == "mine[31m"
    with pytest.raises(InvalidRequest):
        chats.rename(chat, "\u200b\n")
    named = chats.create("a").id
    chats.rename(named, "z" * 500)
    chats.add_user(named, "words", (), "a")
    assert chats.get(named).title == "z" * RENAME_CHARS


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("", ""),
        ("\n\n  two \t words\nmore", "two words"),
        ("a\x00b\x07c\x7f", "abc"),
        ("\u202egpj.exe\u2066", "gpj.exe"),
        ("a\u2028b", "a"),
        ("\ufeff\u200b\u200d\n\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
        ("x" * 100, "x" * TITLE_CHARS),
        ("x" * 59 + " yz", "x" * 59),
        ("\ud800lone", "lone"),
        ("<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>"),
        (" " * 20_000 + "far", ""),
    ],
)
def test_titles_are_one_clean_line(text: str, title: str) -> None:
    assert clean_title(text, TITLE_CHARS) == title


def test_lone_surrogates_are_replaced_everywhere(chats: Chats) -> None:
    bad, good = "x\ud800y\udc00", "x\ufffdy\ufffd"
    chat = chats.create(bad).id
    assert chats.get(chat).preset == good
    said = chats.add_user(chat, bad, (bad,), bad)
    ended = chats.end_answer(
        chats.begin_answer(chat, bad, bad).id, text=bad, reasoning=bad, state="broken", error={"message": bad}
    )
    assert (said.text, said.images, said.preset) == (good, (good,), good)
    assert (ended.text, ended.reasoning, ended.error, ended.variant) == (good, good, {"message": good}, good)
    assert chats.messages(chat) == [said, ended]
    assert chats.used_images() == {good}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=())))
def test_every_text_comes_back(chats: Chats, text: str) -> None:
    chat = chats.create("a").id
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    said = chats.add_user(chat, text, (), "a")
    assert chats.messages(chat) == [said]
    assert said.text == expected


def test_ten_megabytes_are_kept_and_more_is_refused_or_cut(chats: Chats) -> None:
    chat, most = chats.create("a").id, "é" * (TEXT_BYTES // 2)
    assert chats.add_user(chat, most, (), "a").text == most
    with pytest.raises(InvalidRequest, match="10 MB"):
        chats.add_user(chat, most + "x", (), "a")
    answer = chats.begin_answer(chat, "a", "Big")
    ended = chats.end_answer(answer.id, text="x" + most, reasoning=most, state="length")
    assert ended.text.startswith("xé")
    assert "\ufffd" not in ended.text
    assert ended.text.endswith("was not kept.]")
    assert ended.reasoning == most
    assert chats.messages(chat)[0].text == most


# What is not there, and what is not ours ------------------------------------------

NAMES = ["", "../x", "..\\x", "%2e%2e", "//etc/passwd", "C:\\x", "\\\\host\\x", "a\x00b", "é" * 300, "CON", "\ud800"]
NAMES += ["' OR 1=1 --", None, 7]  # type: ignore[list-item]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_an_unknown_conversation_is_not_found(chats: Chats, path: Path, name: str) -> None:
    chats.create("a")
    calls: list[Callable[[], object]] = [
        lambda: chats.get(name),
        lambda: chats.messages(name),
        lambda: chats.add_user(name, "x", (), "a"),
        lambda: chats.begin_answer(name, "a", "Big"),
        lambda: chats.rename(name, "x"),
        lambda: chats.delete(name),
        lambda: chats.undelete(name),
    ]
    for call in calls:
        with pytest.raises(ChatNotFound):
            call()
    if isinstance(name, str) and clean_title(name, 10):
        chats.rename(chats.list()[0].id, name)
    assert {file.name for file in path.parent.rglob("*")} == {"chats.db", "chats.db-wal"}
    assert len(chats.list()) == 1


@pytest.mark.parametrize("message_id", [0, -1, 99, 10**30])
def test_an_unknown_answer_is_not_found(chats: Chats, message_id: int) -> None:
    chats.save_progress(message_id, "x", "")
    with pytest.raises(ChatNotFound):
        chats.end_answer(message_id, text="", reasoning="", state="done")


def test_deleting_can_be_taken_back_until_the_next_start(path: Path) -> None:
    with closing(Chats(path)) as chats:
        kept, gone, back = (chats.create("a").id for _ in range(3))
        chats.add_user(gone, "the secret " + "of the files " * 1000, ("i1",), "a")
        answer = chats.begin_answer(back, "a", "Big")
        for chat in (gone, back):
            chats.delete(chat)
            with pytest.raises(ChatNotFound):
                chats.delete(chat)
        assert [info.id for info in chats.list()] == [kept]
        assert chats.used_images() == {"i1"}
        chats.end_answer(answer.id, text="done meanwhile", reasoning="", state="done")
        assert chats.undelete(back).messages == 1
        assert chats.undelete(kept).id == kept
        assert chats.messages(back)[0].text == "done meanwhile"
    size_bytes = path.stat().st_size
    assert b"secret" in path.read_bytes()
    with closing(Chats(path)) as chats:
        assert [info.id for info in chats.list()] == [back, kept]
        assert chats.used_images() == set()
        with pytest.raises(ChatNotFound):
            chats.undelete(gone)
        assert b"secret" not in b"".join(file.read_bytes() for file in path.parent.iterdir())
        assert path.stat().st_size < size_bytes
        assert chats.add_user(kept, "x", (), "a").id > answer.id


def test_files_are_for_the_owner_only(chats: Chats, path: Path) -> None:
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


def test_an_opening_that_fails_does_not_keep_the_file_locked(path: Path) -> None:
    with pytest.raises(TypeError):
        Chats(path, max_bytes="many")  # type: ignore[arg-type]
    Chats(path).close()


def test_a_closed_file_says_so(path: Path) -> None:
    chats = Chats(path)
    chats.close()
    chats.close()
    for call in (lambda: chats.create("a"), chats.list, chats.used_images):
        with pytest.raises(ChatDamaged, match="closed"):
            call()


def test_a_second_turntable_is_turned_away_at_once(chats: Chats, path: Path) -> None:
    chat = chats.create("a").id
    answer = chats.begin_answer(chat, "a", "Big")
    began_s = time.monotonic()
    said = run_child(
        "import sys\nfrom modules.chats import Chats, ChatDamaged\n"
        "try: Chats(sys.argv[1])\nexcept ChatDamaged as error: print(error, error.hint)",
        path,
    )
    assert "in use" in said
    assert time.monotonic() - began_s < 20
    with pytest.raises(ChatDamaged, match="in use"):
        Chats(path)
    assert chats.messages(chat) == [answer]


# Versions of the file -------------------------------------------------------------


def test_a_file_of_version_1_made_by_hand_is_read(path: Path) -> None:
    with raw(path) as db:
        db.executescript(VERSION_1)
    with closing(Chats(path)) as chats:
        assert chats.notices == ()
        assert [(info.id, info.title, info.messages) for info in chats.list()] == [("old", "An old one", 1)]
        assert [(m.text, m.images) for m in chats.messages("old")] == [("hello", ("i1",))]
        assert chats.add_user("old", "again", (), "vision").seq == 2


def test_the_first_version_never_changes() -> None:
    with closing(sqlite3.connect(":memory:")) as frozen, closing(sqlite3.connect(":memory:")) as fresh:
        frozen.executescript(VERSION_1)
        upgrade(fresh, MIGRATIONS[:1])
        schemas = [
            {" ".join(sql.split()) for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
            for db in (frozen, fresh)
        ]
        assert schemas[0] == schemas[1]
        for pragma in ("user_version", "application_id"):
            assert frozen.execute(f"PRAGMA {pragma}").fetchone() == fresh.execute(f"PRAGMA {pragma}").fetchone()


def test_a_later_step_starts_at_the_files_version_and_is_done_whole_or_not_at_all() -> None:
    def second(db: sqlite3.Connection) -> None:
        db.execute("ALTER TABLE chats ADD COLUMN colour TEXT NOT NULL DEFAULT 'red'")

    def broken(db: sqlite3.Connection) -> None:
        db.execute("DROP TABLE chats")
        db.execute("nonsense")

    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.executescript(VERSION_1)
        with pytest.raises(sqlite3.OperationalError):
            upgrade(db, (*MIGRATIONS[:1], second, broken))
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
        assert db.execute("SELECT id, colour FROM chats").fetchall() == [("old", "red")]
        upgrade(db, (*MIGRATIONS[:1], second))
        assert db.execute("PRAGMA user_version").fetchone() == (2,)


def hot_copy(path: Path, db: sqlite3.Connection) -> None:
    """A file with an open log of writes, as a killed program leaves it: copied while it is in use."""
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA wal_autocheckpoint = 0")
    db.execute("PRAGMA user_version = 99")
    source = Path(db.execute("PRAGMA database_list").fetchone()[2])
    path.parent.mkdir(exist_ok=True)
    for end in ("", "-wal"):
        shutil.copy(f"{source}{end}", f"{path}{end}")


@pytest.mark.parametrize("hot", [False, True])
def test_a_file_from_a_newer_version_is_refused_and_not_touched(tmp_path: Path, path: Path, hot: bool) -> None:
    with raw(tmp_path / "newer.db") as db:
        db.executescript(VERSION_1)
        hot_copy(path, db)
    if not hot:
        Path(f"{path}-wal").unlink()
        shutil.copy(tmp_path / "newer.db", path)
    before = {name: Path(name).read_bytes() for name in (str(path), f"{path}-wal") if os.path.exists(name)}
    with pytest.raises(ChatDamaged, match="99"):
        Chats(path)
    assert {name: Path(name).read_bytes() for name in before} == before
    assert not list(path.parent.glob("*damaged*"))


def test_a_newer_file_is_not_touched_where_it_cannot_be_looked_into_first(path: Path) -> None:
    with raw(path) as db:
        db.executescript("CREATE TABLE x (y); PRAGMA user_version = 99;")
    before = path.read_bytes()
    Path(f"{path}-journal").write_bytes(b"\0" * 512)
    with pytest.raises(ChatDamaged, match="99"):
        Chats(path)
    assert path.read_bytes() == before


def test_the_database_of_another_program_is_refused_and_not_touched(path: Path) -> None:
    with raw(path) as db:
        db.execute("CREATE TABLE bookmarks (url)")
    before = path.read_bytes()
    with pytest.raises(ChatDamaged, match="another program"):
        Chats(path)
    assert path.read_bytes() == before


def test_links_and_folders_are_refused(tmp_path: Path, path: Path) -> None:
    filled(tmp_path / "outside.db", 1, 1)
    path.parent.mkdir()
    path.symlink_to(tmp_path / "outside.db")
    with pytest.raises(ChatDamaged, match="link"):
        Chats(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ChatDamaged, match="link or a folder"):
        Chats(path)
    with pytest.raises(ChatDamaged, match="data folder"):
        Chats(tmp_path / "outside.db" / "chats.db")


def test_a_first_start_that_was_cut_off_is_taken_up_again(tmp_path: Path, path: Path) -> None:
    # A transaction that is larger than its cache writes into the file before it ends.
    with raw(tmp_path / "source.db") as db:
        db.execute("PRAGMA cache_size = 1")
        db.execute("CREATE TABLE x (y)")
        db.execute("DROP TABLE x")
        db.execute("BEGIN")
        db.execute("CREATE TABLE x (y)")
        db.executemany("INSERT INTO x VALUES (?)", [("z" * 3000,)] * 20)
        path.parent.mkdir()
        for end in ("", "-journal"):
            shutil.copy(tmp_path / f"source.db{end}", f"{path}{end}")
    assert Path(f"{path}-journal").stat().st_size > 0
    with closing(Chats(path)) as chats:
        assert chats.notices == ()
        chats.create("a")
    path.write_bytes(b"")
    with closing(Chats(path)) as chats:
        assert (chats.notices, chats.list()) == ((), [])


# Damage ---------------------------------------------------------------------------


def break_page(path: Path, needle: bytes) -> None:
    """Overwrite the head of the page in which these bytes stand."""
    data = bytearray(path.read_bytes())
    start = data.index(needle) // PAGE_BYTES * PAGE_BYTES
    data[start : start + 100] = os.urandom(100)
    path.write_bytes(data)


def test_one_broken_page_costs_only_what_stood_on_it(path: Path) -> None:
    told = filled(path)
    break_page(path, b"needle-7-2")
    broken = path.read_bytes()
    with closing(Chats(path)) as chats:
        (notice,) = chats.notices
        found = everything(chats)
        assert set(map(repr, found)) < set(map(repr, told))
        assert len(found) > len(told) - 20
        assert f"(messages: {len(found)})" in notice
        assert "chats.db.damaged-1" in notice
        assert str(path.parent) not in notice
        chats.add_user(found[0].chat, "and on", (), "a")
    aside = path.with_name("chats.db.damaged-1")
    assert aside.read_bytes() == broken
    assert {file.name for file in path.parent.iterdir()} == {"chats.db", aside.name}
    with closing(Chats(path)) as chats:
        assert chats.notices == ()
        assert len(everything(chats)) == len(found) + 1


def test_messages_are_kept_where_the_conversations_line_is_lost(path: Path) -> None:
    told = filled(path, 3, 2)
    with raw(path) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'chats'").fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * PAGE_BYTES)
        file.write(b"\xff" * PAGE_BYTES)
    with closing(Chats(path)) as chats:
        assert everything(chats) == told
        assert {info.title for info in chats.list()} == {"Recovered conversation"}
        assert [info.id for info in chats.list()] == list(dict.fromkeys(m.chat for m in told))[::-1]


def test_each_damaged_file_gets_a_place_of_its_own(path: Path) -> None:
    path.parent.mkdir()
    path.with_name("chats.db.damaged-2-wal").write_bytes(b"older")
    for number, data in ((1, b"not a database, and long enough to be one " * 200), (3, b"x")):
        path.write_bytes(data)
        with closing(Chats(path)) as chats:
            assert chats.list() == []
            assert "nothing in it could be read" in chats.notices[0]
            assert f"damaged-{number}." in chats.notices[0]
        assert path.with_name(f"chats.db.damaged-{number}").read_bytes() == data
    assert path.with_name("chats.db.damaged-2-wal").read_bytes() == b"older"


@pytest.mark.parametrize("emptied", [True, False])
def test_a_log_that_lost_its_file_is_kept(path: Path, emptied: bool) -> None:
    path.parent.mkdir()
    if emptied:
        path.touch()
    Path(f"{path}-wal").write_bytes(b"what was said")
    with closing(Chats(path)) as chats:
        assert "nothing in it" in chats.notices[0]
    assert path.with_name("chats.db.damaged-1-wal").read_bytes() == b"what was said"


def test_a_missing_table_is_damage(path: Path) -> None:
    told = filled(path, 2, 1)
    with raw(path) as db:
        db.execute("DROP TABLE chats")
    with closing(Chats(path)) as chats:
        assert everything(chats) == told
        assert len(chats.notices) == 1


def test_a_rescue_that_was_cut_off_is_finished(path: Path) -> None:
    told = filled(path)
    rescued = path.with_name("chats.db.rescued")
    # Cut off before the move: the copy may be half, and the rescue begins anew.
    break_page(path, b"needle-7-2")
    rescued.write_bytes(b"half a copy")
    with closing(Chats(path)) as chats:
        assert len(everything(chats)) > len(told) - 20
    # Cut off in the move: the copy is whole, and the old log must not get into it.
    os.rename(path, rescued)
    Path(f"{path}-wal").write_bytes(b"the log of the damaged file")
    with closing(Chats(path)) as chats:
        assert len(everything(chats)) > len(told) - 20
    assert path.with_name("chats.db.damaged-2-wal").read_bytes() == b"the log of the damaged file"
    assert not rescued.exists()


def test_a_damaged_file_that_cannot_be_moved_stays(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"garbage" * 1000)
    path.with_name("chats.db.rescued").mkdir()
    with pytest.raises(ChatDamaged, match="moved aside"):
        Chats(path)
    assert path.read_bytes() == b"garbage" * 1000


@pytest.mark.parametrize("seed", range(60))
def test_no_damage_ends_in_anything_but_a_sentence(tmp_path: Path, path: Path, seed: int) -> None:
    chance = random.Random(seed)
    told = filled(path, 6, 3)
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 3, 20))):
        at, size = chance.randrange(len(data)), chance.choice((1, 4, 100, 5000))
        data[at : at + size] = chance.randbytes(len(data[at : at + size]))
    if seed % 5 == 0:
        del data[chance.randrange(len(data)) :]
    path.write_bytes(data)
    try:
        with closing(Chats(path)) as chats:
            damaged = chats.notices
            assert len(everything(chats)) <= len(told)
            chats.recover()
            chats.used_images()
            chats.create("a")
    except ChatDamaged:
        assert path.read_bytes() == data  # it looks newer, or like another program's
        return
    if damaged:
        assert path.with_name("chats.db.damaged-1").read_bytes() == data


def test_a_flipped_bit_in_a_detail_costs_the_detail_only(path: Path) -> None:
    told = filled(path, 1, 4)
    with raw(path) as db:
        db.execute("UPDATE messages SET text = CAST(x'41ff42' AS TEXT), images = '{\"a\": 1}' WHERE seq = 1")
        db.execute("UPDATE messages SET counts = '{nonsense', timings = '[1]', error = '[1]' WHERE seq = 2")
        db.execute("UPDATE messages SET counts = '{\"prompt\": 4, \"later\": 1}', error = '{}' WHERE seq = 4")
    with closing(Chats(path)) as chats:
        found = chats.messages(told[0].chat)
        assert (found[0].text, found[0].images) == ("A\ufffdB", ())
        assert (found[1].counts, found[1].timings, found[1].error) == (None, None, None)
        assert (found[3].counts, found[3].error) == (Counts(prompt=4), {})
        assert [found[2], *found[4:]] == [told[2], *told[4:]]


def test_damage_found_while_running_is_a_sentence_and_the_next_start_mends_it(path: Path) -> None:
    told = filled(path)
    data = path.read_bytes()
    with closing(Chats(path)) as chats:
        break_page(path, b"needle-7-2")
        with pytest.raises(ChatDamaged, match="damaged") as caught:
            for info in chats.list():
                chats.messages(info.id)
        assert "Restart" in caught.value.hint
        assert isinstance(caught.value.__cause__, sqlite3.DatabaseError)
    assert path.read_bytes() != data
    with closing(Chats(path)) as chats:
        assert len(chats.notices) == 1
        assert len(everything(chats)) > len(told) - 20


# Full disks and other refusals of the system --------------------------------------


def test_a_full_file_loses_nothing_and_goes_on_when_there_is_room(path: Path) -> None:
    told = []
    with closing(Chats(path, max_bytes=300_000)) as chats:
        chat = chats.create("a").id
        with pytest.raises(ChatDamaged, match="disk is full") as caught:
            for number in range(100):
                told.append(chats.add_user(chat, f"{number}" + "x" * 20_000, (), "a"))
        assert "space" in caught.value.hint
        assert len(told) > 5
        assert chats.messages(chat) == told
        answer = chats.begin_answer(chat, "a", "Big")
        with pytest.raises(ChatDamaged):
            chats.end_answer(answer.id, text="y" * 50_000, reasoning="", state="done")
        assert chats.messages(chat) == [*told, answer]
    assert path.stat().st_size <= 300_000
    with closing(Chats(path)) as chats:
        assert chats.messages(chat) == [*told, answer]
        assert chats.recover() == 1
        chats.add_user(chat, "x" * 50_000, (), "a")
    with raw(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# The system refuses to let files grow past a limit, at one size after another, as a full disk does.
NO_ROOM = """
import os, resource, sys
from modules.chats import Chats
from modules.errors import ChatDamaged

path, told, refused = sys.argv[1], [], 0
chats = Chats(path)
chat = chats.create("a").id
for step in range(120):
    text = f"{step} " + "x" * 3000
    room = os.path.getsize(path + "-wal") + step * 977 % 70000
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    for attempt in range(1 + step % 3):
        try:
            told.append(chats.add_user(chat, text, (), "a"))
            break
        except ChatDamaged as error:
            assert "/" not in str(error), error
            refused += 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    told.append(chats.add_user(chat, text + "again", (), "a"))
    assert chats.messages(chat) == told, step
chats.close()
chats = Chats(path)
assert chats.messages(chat) == told and not chats.notices
print(refused, len(told))
"""


def test_writes_that_the_system_refuses_lose_nothing_and_work_again_later(path: Path) -> None:
    refused, told = map(int, run_child(NO_ROOM, path).split())
    assert refused > 20
    assert told > 130


# Without the rights of root, in a folder that may be read only.
READ_ONLY = """
import os, sys
from modules.chats import Chats
from modules.errors import ChatDamaged
if os.getuid() == 0:
    os.setuid(65534)
for path in sys.argv[1:]:
    try:
        Chats(path)
        print("opened")
    except ChatDamaged as error:
        print(error)
"""


def test_a_folder_without_write_access_is_a_sentence_and_stays_as_it_is() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        filled(folder / "chats.db", 1, 1)
        before = (folder / "chats.db").read_bytes()
        (folder / "chats.db").chmod(0o444)
        folder.chmod(0o555)
        said = run_child(READ_ONLY, folder / "chats.db", folder / "new.db", folder / "deeper" / "new.db").splitlines()
        assert len(said) == 3
        assert all(re.search("cannot be (opened|written|used)", sentence) for sentence in said)
        assert (folder / "chats.db").read_bytes() == before
        assert [file.name for file in folder.iterdir()] == ["chats.db"]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


# Kills and losses of power --------------------------------------------------------

WRITER = """
import sys
from modules.chats import Chats

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()

chats = Chats(sys.argv[1])
chats.recover()
say("open")
chat = chats.create("a").id
for turn in range(int(sys.argv[2])):
    said = chats.add_user(chat, f"question {turn} " + "q" * (turn * 977 % 9000), (), "a")
    say(said.id, said.text)
    answer = chats.begin_answer(chat, "a", "Big")
    for part in range(1, 4):
        chats.save_progress(answer.id, "part " * part * 200, "")
    ended = chats.end_answer(answer.id, text=f"answer {turn} " + "a" * (turn * 577 % 9000), reasoning="", state="done")
    say(ended.id, ended.text)
say("end")
"""


def kill_a_writer(path: Path, chance: random.Random) -> dict[int, str]:
    """Start a process that writes, kill it at a random moment, and return what it had acknowledged by then."""
    command = [sys.executable, "-c", WRITER, str(path), "100000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        if chance.random() < 0.7:
            assert child.stdout.readline() == "open\n"
            time.sleep(chance.uniform(0, 0.06))
        else:  # somewhere in the start, the opening or the first writes
            time.sleep(chance.uniform(0.05, 0.25))
        child.send_signal(signal.SIGKILL)
        lines = child.stdout.read().splitlines(keepends=True)
    told = (line[:-1].split(" ", 1) for line in lines if line.endswith("\n") and line != "open\n")
    return {int(key): text for key, text in told}


def check_after_kill(path: Path, told: dict[int, str]) -> None:
    with closing(Chats(path)) as chats:
        assert chats.notices == ()
        found = everything(chats)
        assert told.items() <= {m.id: m.text for m in found}.items()
        running = [m.id for m in found if m.state == "running"]
        assert len(running) <= 1
        assert chats.recover() == len(running)
        for message in everything(chats):
            assert message.state == ("broken" if message.id in running else message.state)
            assert message.state != "broken" or message.error is not None
        assert chats.recover() == 0


def test_sixty_kills_lose_no_acknowledged_message(tmp_path: Path) -> None:
    def one_file(seed: int) -> int:
        chance, told = random.Random(seed), dict[int, str]()
        for _ in range(10):
            told |= kill_a_writer(tmp_path / f"{seed}.db", chance)
            check_after_kill(tmp_path / f"{seed}.db", told)
        return len(told)

    with ThreadPoolExecutor(6) as pool:
        counts = list(pool.map(one_file, range(6)))
    assert all(count > 20 for count in counts)


def test_a_torn_log_keeps_all_that_came_before_the_tear(tmp_path: Path, path: Path) -> None:
    source = tmp_path / "source.db"
    command = [sys.executable, "-c", WRITER, str(source), "12"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        told = []
        for line in child.stdout:
            told.append(line)
            if len(told) == 20:
                child.kill()
    log = Path(f"{source}-wal").read_bytes()
    chance, lengths = random.Random(7), set()
    for number in range(100):
        case = tmp_path / f"{number}.db"
        shutil.copy(source, case)
        at = chance.randrange(len(log))
        torn = log[:at] + (chance.randbytes(min(3000, len(log) - at)) + log[at + 3000 :] if number % 2 else b"")
        Path(f"{case}-wal").write_bytes(torn)
        with closing(Chats(case)) as chats:
            assert chats.notices == ()
            found = everything(chats)
            ended = [f"{m.id} {m.text}\n" for m in found if m.state == "done"]
            assert ended == told[1 : len(ended) + 1] or len(ended) > len(told) - 1
            assert [m.id for m in found] == list(range(1, len(found) + 1))
            lengths.add(len(found))
    assert len(lengths) > 5


def test_an_acknowledged_message_is_on_the_disk(path: Path) -> None:
    """The system calls themselves: no acknowledgement while something written waits for its sync."""
    trace = path.parent.parent / "trace"
    command = ["strace", "-f", "-y", "-e", "trace=pwrite64,fdatasync,fsync,write", "-o", str(trace)]
    command += [sys.executable, "-c", WRITER, str(path), "5"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("strace is not installed")
    if done.returncode or "end\n" not in done.stdout:
        pytest.skip("strace may not trace here")
    waiting, acknowledged, syncs = 0, 0, 0
    for line in trace.read_text().splitlines():
        if re.search(r"pwrite64\(\d+<[^>]*-wal>", line):
            waiting += 1
        elif re.search(r"f(data)?sync\(\d+<[^>]*-wal>", line):
            waiting, syncs = 0, syncs + 1
        elif re.search(r'write\(1<[^>]*>, "\d+ (question|answer)', line):
            acknowledged += 1
            assert waiting == 0, line
    assert acknowledged == 10
    assert syncs >= 10


def test_only_the_answers_of_earlier_processes_are_recovered(path: Path) -> None:
    with closing(Chats(path)) as chats:
        chat = chats.create("a").id
        chats.save_progress(chats.begin_answer(chat, "a", "Big").id, "half of", "thought")
        order = chats.list()
    with closing(Chats(path)) as chats:
        mine = chats.begin_answer(chats.create("a").id, "a", "Big")
        assert chats.recover() == 1
        (broken,) = chats.messages(chat)
        assert (broken.state, broken.text, broken.reasoning) == ("broken", "half of", "thought")
        assert broken.error is not None
        assert broken.error["code"] == "engine_crashed"
        assert "ended while this answer" in broken.error["message"]
        assert set(broken.error) == {"code", "message", "hint"}
        assert chats.messages(mine.chat) == [mine]
        assert chats.list()[1:] == order


# Threads and sizes ----------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", ":memory:"])
def test_eight_threads_lose_and_double_nothing(path: Path, place: str) -> None:
    with closing(Chats(path if place == "file" else place)) as chats:
        shared = chats.create("a").id

        def work(worker: int) -> list[ChatMessage]:
            own, told = chats.create("a").id, []
            for turn in range(15):
                told.append(chats.add_user(shared, f"{worker} {turn}", (f"{worker}",), "a"))
                answer = chats.begin_answer(own, "a", "Big")
                chats.save_progress(answer.id, "x" * turn * 100, "")
                told.append(chats.end_answer(answer.id, text=f"{worker} {turn}", reasoning="", state="done"))
                assert chats.list(limit=3)
                assert len(chats.messages(own)) == turn + 1
            return told

        with ThreadPoolExecutor(8) as pool:
            told = [message for part in pool.map(work, range(8)) for message in part]
        assert everything(chats) == sorted(told, key=lambda m: m.id)
        assert [m.seq for m in chats.messages(shared)] == list(range(1, 121))
        assert chats.used_images() == set("01234567")
        assert len({info.change for info in chats.list()}) == 9


def best_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(7):
        began_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - began_s)
    return min(times)


def test_long_lists_and_long_conversations_stay_quick(path: Path) -> None:
    with closing(Chats(path)) as chats:
        chat = chats.create("a").id
        chats.add_user(chat, "x", ("i",), "a")
    with raw(path) as db:
        db.execute("BEGIN")
        db.executemany(
            "INSERT INTO chats (id, title, preset, created_s, updated_s, change) VALUES (?, 't', 'a', 0, 0, ?)",
            ((f"chat{n}", n) for n in range(3, 10_003)),
        )
        db.executemany(
            "INSERT INTO messages (chat, seq, role, state, images, preset, variant, created_s, text, reasoning)"
            " VALUES (?, ?, 'user', 'done', '[]', 'a', '', 0, ?, '')",
            ((chat, n, "x" * 800) for n in range(2, 10_001)),
        )
        db.execute("UPDATE chats SET messages = 10000 WHERE id = ?", (chat,))
        db.execute("COMMIT")
    assert best_s(lambda: Chats(path).close()) < 5
    with closing(Chats(path)) as chats:
        assert best_s(lambda: chats.messages(chat, limit=24)) < 0.05
        assert best_s(lambda: chats.messages(chat, before_seq=5000, limit=24)) < 0.05
        assert best_s(chats.list) < 0.5
        assert best_s(lambda: chats.list(before=(5000, ""))) < 0.5
        assert best_s(chats.recover) < 0.5
        assert chats.used_images() == {"i"}
        assert (len(chats.list()), len(chats.list(limit=20_000))) == (200, 10_001)
