"""The conversations on disk: one SQLite file, its versions, and what becomes of a damaged one.

Owns the schema and the promises about loss: what `add_user` and `end_answer` have
returned survives a crash of the process and a loss of power; of an answer that is
being written, a crash of the process costs what came after the last
`save_progress`, and a loss of power may cost a few seconds more. The order of the
conversations is a counter, never the clock. One process at a time: the file stays
locked while it is open, so a second Turntable cannot write into it.

A file from a newer Turntable, or of another program, is refused and left as it is. A
damaged file is moved aside, what can still be read of it is copied into a new one,
and `notices` says so. A failed write raises ChatDamaged and changes nothing; the next
one tries anew. Knows nothing of models, prompts, pages or users.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from modules.errors import ChatDamaged, ChatNotFound, EngineCrashed, InvalidRequest
from modules.messages import Counts, Timings

TEXT_BYTES = 10_000_000
TITLE_CHARS = 60
RENAME_CHARS = 120
END_STATES = ("done", "stopped", "broken", "length")

_APPLICATION_ID = 0x54524E54  # "TRNT", so that another program's database is not taken for ours
_CHECK_BYTES = 512_000_000  # larger files are not read through at every start
_SMALLEST_BYTES = 512  # one page
_LOCK_WAIT_S = 0.5
_WAL_BYTES = 16_000_000
_SALVAGE_FAILURES = 100_000  # rows on broken pages after which the rest counts as lost; about a second
_LARGEST = 2**63 - 1
_PARTS = ("", "-wal", "-journal", "-shm")  # the endings of all the files of one database
_UNTITLED = "New conversation"
_CUT = "\n\n[The rest was longer than 10 MB and was not kept.]"
# The columns in the order of the fields of ChatInfo and ChatMessage.
_CHATS = "SELECT id, title, preset, created_s, updated_s, messages, change FROM chats"
_MESSAGES = (
    "SELECT id, chat, seq, role, text, reasoning, images, state, error, preset, variant, counts, timings, created_s"
    " FROM messages"
)

_Figures = TypeVar("_Figures", Counts, Timings)


@dataclass(frozen=True)
class ChatInfo:
    """One line of the list. messages counts them; change grows with every change of any conversation."""

    id: str
    title: str
    preset: str
    created_s: float
    updated_s: float
    messages: int
    change: int = 0

    @property
    def cursor(self) -> tuple[int, str]:
        """What `list(before=…)` takes to go on after this one."""
        return (self.change, self.id)


@dataclass(frozen=True)
class ChatMessage:
    """One message. id grows over all conversations; seq counts from 1 in its own.

    state is running, done, stopped, broken or length; error has code, message and
    hint; variant is the title of the model that answered.
    """

    id: int
    chat: str
    seq: int
    role: str
    text: str
    reasoning: str
    images: tuple[str, ...]
    state: str
    error: dict[str, Any] | None
    preset: str
    variant: str
    counts: Counts | None
    timings: Timings | None
    created_s: float


# `list` is a method of Chats, and would hide the type in its annotations.
ChatInfos = list[ChatInfo]
ChatMessages = list[ChatMessage]


# Versions of the file -------------------------------------------------------------


def _version_1(db: sqlite3.Connection) -> None:
    """The first version. Long columns come last, so that reading the others never walks through a text."""
    db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    db.execute(
        """CREATE TABLE chats (
            number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, title TEXT NOT NULL,
            titled INTEGER NOT NULL DEFAULT 0, preset TEXT NOT NULL, created_s REAL NOT NULL, updated_s REAL NOT NULL,
            messages INTEGER NOT NULL DEFAULT 0, change INTEGER NOT NULL UNIQUE, deleted INTEGER NOT NULL DEFAULT 0)"""
    )
    db.execute(
        """CREATE TABLE messages (
            id INTEGER PRIMARY KEY AUTOINCREMENT, chat TEXT NOT NULL, seq INTEGER NOT NULL, role TEXT NOT NULL,
            state TEXT NOT NULL, images TEXT NOT NULL, preset TEXT NOT NULL, variant TEXT NOT NULL,
            counts TEXT, timings TEXT, error TEXT, created_s REAL NOT NULL,
            text TEXT NOT NULL, reasoning TEXT NOT NULL, UNIQUE (chat, seq))"""
    )
    db.execute("CREATE INDEX messages_running ON messages (id) WHERE state = 'running'")
    db.execute("CREATE INDEX messages_with_images ON messages (images) WHERE images <> '[]'")


# Append only: the place in this list is the version of the file that the step leads to.
MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_version_1,)


def upgrade(db: sqlite3.Connection, steps: Sequence[Callable[[sqlite3.Connection], None]]) -> None:
    """Take the file to version len(steps); each step is done whole or not at all."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    for number, step in enumerate(steps[version:], start=version + 1):
        with _transaction(db):
            step(db)
            db.execute(f"PRAGMA user_version = {number}")


# The conversations ----------------------------------------------------------------


class Chats:
    """All the conversations of one file. Every method may be called from any thread."""

    def __init__(self, path: Path | str, *, max_bytes: int | None = None) -> None:
        """Open or create the file; ":memory:" keeps nothing. max_bytes limits the size of the file.

        Raises ChatDamaged when the file cannot be used: it is newer, another
        program's, locked by another Turntable, or in a folder without write access.
        """
        self._lock = threading.Lock()
        self._notices: list[str] = []
        with _plain_words():
            if str(path) == ":memory:":
                self._db = _prepare(_connect(":memory:"))
            else:
                self._db = self._open(Path(os.path.abspath(path)))
        try:
            with _plain_words():
                self._purge()
                if max_bytes is not None:
                    (page_bytes,) = self._db.execute("PRAGMA page_size").fetchone()
                    self._db.execute(f"PRAGMA max_page_count = {max(1, max_bytes // page_bytes)}")
                # Answers of this process are not for recover().
                (self._earlier,) = self._db.execute("SELECT coalesce(max(id), 0) FROM messages").fetchone()
        except BaseException:
            self._db.close()
            raise

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences for the person about what happened to the file at its opening."""
        return tuple(self._notices)

    def create(self, preset: str) -> ChatInfo:
        """A new, empty conversation."""
        chat, now = secrets.token_urlsafe(16), time.time()
        with self._write() as db:
            db.execute(
                "INSERT INTO chats (id, title, preset, created_s, updated_s, change) VALUES (?, ?, ?, ?, ?, ?)",
                (chat, _UNTITLED, _storable(preset), now, now, _next_change(db)),
            )
            return _chat(db, chat)

    def list(self, limit: int = 200, before: tuple[int, str] | None = None) -> ChatInfos:
        """The conversations, last changed first; before is the `cursor` of the last one seen."""
        change = _LARGEST
        if before is not None:
            try:
                change = _integer(before[0])
            except (TypeError, ValueError, LookupError) as error:
                raise InvalidRequest("This is not a position in the list of conversations.") from error
        with self._read() as db:
            rows = db.execute(
                _CHATS + " WHERE deleted = 0 AND change < ? ORDER BY change DESC LIMIT ?",
                (change, max(0, _integer(limit))),
            ).fetchall()
        return [ChatInfo(*row) for row in rows]

    def get(self, chat: str) -> ChatInfo:
        """One conversation. Raises ChatNotFound."""
        with self._read() as db:
            return _chat(db, chat)

    def add_user(self, chat: str, text: str, images: Sequence[str], preset: str) -> ChatMessage:
        """Save what a person said; the first text names the conversation. On the disk for good when this returns.

        Raises ChatNotFound, and InvalidRequest for a text of more than 10 MB.
        """
        text, preset = _storable(text), _storable(preset)
        if len(text.encode()) > TEXT_BYTES:
            raise InvalidRequest("The message is longer than 10 MB.", hint="Send it in smaller parts.")
        title = clean_title(text, TITLE_CHARS)
        with self._write() as db:
            message = _append(db, chat, "user", preset, text=text, images=images, state="done")
            if title:
                db.execute("UPDATE chats SET title = ?, titled = 1 WHERE id = ? AND titled = 0", (title, message.chat))
        return message

    def begin_answer(self, chat: str, preset: str, variant: str) -> ChatMessage:
        """The empty answer, in the state running. Raises ChatNotFound."""
        preset, variant = _storable(preset), _storable(variant)
        with self._write(durable=False) as db:
            return _append(db, chat, "assistant", preset, variant=variant, state="running")

    def save_progress(self, message_id: int, text: str, reasoning: str) -> None:
        """Keep what there is of a running answer. One that has ended, or is unknown, stays as it is."""
        text, reasoning = _shortened(text), _shortened(reasoning)
        with self._write(durable=False) as db:
            db.execute(
                "UPDATE messages SET text = ?, reasoning = ? WHERE id = ? AND state = 'running'",
                (text, reasoning, _integer(message_id)),
            )

    def end_answer(
        self,
        message_id: int,
        *,
        text: str,
        reasoning: str,
        state: str,
        counts: Counts | None = None,
        timings: Timings | None = None,
        error: dict[str, Any] | None = None,
        variant: str | None = None,
    ) -> ChatMessage:
        """Save the end of an answer; on the disk for good when this returns.

        The first end stands: ending an answer again changes nothing and returns what
        is stored, so a caller may try again after ChatDamaged. Raises ChatNotFound.
        """
        if state not in END_STATES:
            raise ValueError(f"an answer ends as one of {', '.join(END_STATES)}, not as {state!r}")
        key = _integer(message_id)
        values = (_shortened(text), _shortened(reasoning), state, _figures_json(counts), _figures_json(timings))
        with self._write() as db:
            ended = db.execute(
                "UPDATE messages SET text = ?, reasoning = ?, state = ?, counts = ?, timings = ?, error = ?,"
                " variant = coalesce(?, variant) WHERE id = ? AND state = 'running'",
                (*values, _json(error), None if variant is None else _storable(variant), key),
            ).rowcount
            row = db.execute(_MESSAGES + " WHERE id = ?", (key,)).fetchone()
            if row is None:
                raise ChatNotFound("The answer's conversation was deleted.")
            message = _message(row)
            if ended:
                _touch(db, message.chat)
        return message

    def messages(self, chat: str, *, before_seq: int | None = None, limit: int | None = None) -> ChatMessages:
        """The messages in order; with a limit the last ones, of those before before_seq. Raises ChatNotFound."""
        before = _LARGEST if before_seq is None else _integer(before_seq)
        most = -1 if limit is None else max(0, _integer(limit))
        with self._read() as db:
            rows = db.execute(
                _MESSAGES + " WHERE chat = ? AND seq < ? ORDER BY seq DESC LIMIT ?",
                (_chat(db, chat).id, before, most),
            ).fetchall()
        return [_message(row) for row in reversed(rows)]

    def rename(self, chat: str, title: str) -> ChatInfo:
        """Give a title. Raises ChatNotFound, and InvalidRequest when nothing of it can be seen."""
        title = clean_title(title, RENAME_CHARS)
        if not title:
            raise InvalidRequest("A title needs at least one visible character.", hint="Type another title.")
        with self._write() as db:
            found = _chat(db, chat)
            db.execute("UPDATE chats SET title = ?, titled = 1 WHERE id = ?", (title, found.id))
            _touch(db, found.id)
            return _chat(db, found.id)

    def delete(self, chat: str) -> None:
        """Hide a conversation; the next start removes it from the disk. Raises ChatNotFound."""
        with self._write() as db:
            db.execute("UPDATE chats SET deleted = 1 WHERE id = ?", (_chat(db, chat).id,))

    def undelete(self, chat: str) -> ChatInfo:
        """Take back a `delete` of this process; at its old place in the list. Raises ChatNotFound."""
        with self._write() as db:
            db.execute("UPDATE chats SET deleted = 0 WHERE id = ?", (_key(chat),))
            return _chat(db, chat)

    def recover(self) -> int:
        """Mark the answers that an earlier process left running as broken; returns how many."""
        error = {
            "code": EngineCrashed.code,
            "message": "Turntable ended while this answer was being written.",
            "hint": "What was written is kept. Send the message again for a whole answer.",
        }
        with self._write() as db:
            return db.execute(
                "UPDATE messages SET state = 'broken', error = ? WHERE state = 'running' AND id <= ?",
                (_json(error), self._earlier),
            ).rowcount

    def used_images(self) -> set[str]:
        """The ids of all the images that a conversation shows, deleted ones included while they can come back."""
        with self._read() as db:
            rows = db.execute("SELECT DISTINCT images FROM messages WHERE images <> '[]'").fetchall()
        return {image for (images,) in rows for image in _images(images)}

    def last_used(self) -> dict[str, float]:
        """When each model last answered, by the variant's title, in seconds since the epoch."""
        with self._read() as db:
            latest = "SELECT variant, MAX(CAST(created_s AS REAL)) FROM messages WHERE variant <> '' GROUP BY variant"
            found = db.execute(latest)
            return {str(variant): float(when) for variant, when in found}

    def close(self) -> None:
        """Close the file; later calls raise ChatDamaged. Closing twice is harmless."""
        with self._lock, _plain_words():
            self._db.close()

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _plain_words():
            yield self._db

    @contextmanager
    def _write(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction. Durable ones wait for the disk (and so secure the earlier ones that did not)."""
        with self._lock, _plain_words():
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            with _transaction(self._db):
                yield self._db

    def _open(self, path: Path) -> sqlite3.Connection:
        """Open the file. Where it is damaged, copy what can be read into a new one and set it aside.

        The damaged file leaves its place only when the copy is whole, so that a crash or
        a full disk in between leaves it to the next start.
        """
        rescued = path.with_name(path.name + ".rescued")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if rescued.exists() and not path.exists():
                _set_aside(path)
                os.replace(rescued, path)
            if not _damaged(path):
                return _open_sound(path)
        except OSError as error:
            raise ChatDamaged("The data folder cannot be used for the conversations.") from error
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
        try:
            messages = _rescue(path, rescued)
            aside = _set_aside(path)
            os.replace(rescued, path)
        except OSError as error:
            raise ChatDamaged("The file of the conversations is damaged and cannot be moved aside.") from error
        kept = f"what could be read of it is kept (messages: {messages})" if messages else "nothing in it could be read"
        self._notices.append(f"The file of the conversations was damaged; {kept}. The damaged file is {aside.name}.")
        return _open_sound(path)

    def _purge(self) -> None:
        """Remove what was deleted in earlier runs, from the file too and not only from the lists."""
        if self._db.execute("SELECT 1 FROM chats WHERE deleted = 1 LIMIT 1").fetchone() is None:
            return
        with _transaction(self._db):
            self._db.execute("DELETE FROM messages WHERE chat IN (SELECT id FROM chats WHERE deleted = 1)")
            self._db.execute("DELETE FROM chats WHERE deleted = 1")
        self._db.execute("PRAGMA incremental_vacuum").fetchall()
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


# Rows -----------------------------------------------------------------------------


def _key(chat: Any) -> str:
    """What a page calls an id may be anything; what is not text finds nothing."""
    return _storable(chat) if isinstance(chat, str) else ""


def _chat(db: sqlite3.Connection, chat: Any) -> ChatInfo:
    row = db.execute(_CHATS + " WHERE id = ? AND deleted = 0", (_key(chat),)).fetchone()
    if row is None:
        raise ChatNotFound("This conversation does not exist, or was deleted.")
    return ChatInfo(*row)


def _next_change(db: sqlite3.Connection) -> int:
    (change,) = db.execute("SELECT coalesce(max(change), 0) + 1 FROM chats").fetchone()
    return int(change)


def _touch(db: sqlite3.Connection, chat: str) -> None:
    """Put a conversation first in the list."""
    db.execute("UPDATE chats SET change = ?, updated_s = ? WHERE id = ?", (_next_change(db), time.time(), chat))


def _append(db: sqlite3.Connection, chat: str, role: str, preset: str, **given: Any) -> ChatMessage:
    """Add a message at the end. The conversation takes over its preset, so that it opens with the last one used."""
    info = _chat(db, chat)
    images = tuple(_storable(image) for image in given.get("images", ()))
    text, state, variant = given.get("text", ""), given["state"], given.get("variant", "")
    seq, now = info.messages + 1, time.time()
    key = db.execute(
        "INSERT INTO messages (chat, seq, role, state, images, preset, variant, created_s, text, reasoning)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, '')",
        (info.id, seq, role, state, json.dumps(images, ensure_ascii=False), preset, variant, now, text),
    ).lastrowid
    db.execute("UPDATE chats SET messages = ?, preset = ? WHERE id = ?", (seq, preset, info.id))
    _touch(db, info.id)
    return ChatMessage(
        id=int(key or 0), chat=info.id, seq=seq, role=role, text=text, reasoning="", images=images, state=state,
        error=None, preset=preset, variant=variant, counts=None, timings=None, created_s=now,
    )  # fmt: skip


def _message(row: tuple[Any, ...]) -> ChatMessage:
    values = dict(zip((field.name for field in fields(ChatMessage)), row, strict=True))
    error = _parsed(values["error"])
    return ChatMessage(
        **{
            **values,
            "images": _images(values["images"]),
            "error": error if isinstance(error, dict) else None,
            "counts": _figures(Counts, values["counts"]),
            "timings": _figures(Timings, values["timings"]),
        }
    )


def _parsed(stored: str | None) -> Any:
    """The JSON of a column. A flipped bit in it costs this one detail, not the whole conversation."""
    with suppress(TypeError, ValueError, RecursionError):
        return json.loads(stored or "null")
    return None


def _images(stored: str) -> tuple[str, ...]:
    images = _parsed(stored)
    return tuple(str(image) for image in images) if isinstance(images, list) else ()


def _figures(kind: type[_Figures], stored: str | None) -> _Figures | None:
    data = _parsed(stored)
    if not isinstance(data, dict):
        return None
    return kind(**{field.name: data[field.name] for field in fields(kind) if field.name in data})


def _figures_json(figures: Counts | Timings | None) -> str | None:
    return None if figures is None else _json(asdict(figures))


def _json(data: dict[str, Any] | None) -> str | None:
    return None if data is None else _storable(json.dumps(data, ensure_ascii=False, default=str))


# Text -----------------------------------------------------------------------------


def _storable(text: str) -> str:
    """The text with lone surrogates replaced: neither SQLite nor a web page can take them."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _shortened(text: str) -> str:
    """An answer is cut at the limit and says so, for a refusal would lose all of it."""
    data = (text := _storable(text)).encode()
    return text if len(data) <= TEXT_BYTES else data[:TEXT_BYTES].decode(errors="ignore") + _CUT


def clean_title(text: str, limit_chars: int) -> str:
    """The first line with anything to see in it, without control, direction and invisible characters."""
    joiners = "\u200c\u200d"  # parts of emoji and of several scripts
    for line in text[:10_000].splitlines():
        shown = (" " if c.isspace() else c for c in line)
        kept = "".join(c for c in shown if unicodedata.category(c) not in ("Cc", "Cf", "Cs") or c in joiners)
        title = " ".join(kept.split())[:limit_chars].strip(joiners + " ")
        if title:
            return title
    return ""


def _integer(value: Any) -> int:
    """A number that SQLite can hold; larger ones find nothing either."""
    return max(-_LARGEST, min(_LARGEST, int(value)))


# The file -------------------------------------------------------------------------


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")
        raise


_SENTENCES = (  # what SQLite says, what a person reads, what they can do
    ("full", "The conversation could not be saved: the disk is full.", "Free some space, then try again."),
    ("locked", "The file of the conversations is in use.", "Close the other Turntable that uses this data folder."),
    ("readonly", "The file of the conversations cannot be written to.", "Look at the rights of the data folder."),
    ("unable to open", "The file of the conversations cannot be opened.", "Look at the rights of the data folder."),
    ("I/O", "The disk failed while conversations were read or saved.", "Look at the disk and its free space."),
    ("closed", "The conversations are closed already.", "Start Turntable again."),
)
_DAMAGE = ("malformed", "not a database", "no such table", "no such column", "unsupported file format")


@contextmanager
def _plain_words() -> Iterator[None]:
    """Translate SQLite's errors; its own words stay in the cause, for the log."""
    try:
        yield
    except sqlite3.Error as error:
        if _is_damage(error):
            raise ChatDamaged(
                "The file of the conversations is damaged.",
                hint="Restart Turntable: it sets the file aside and keeps what can be read.",
            ) from error
        for words, sentence, hint in _SENTENCES:
            if words in str(error):
                raise ChatDamaged(sentence, hint=hint) from error
        raise ChatDamaged("The conversations could not be read or saved.") from error


def _is_damage(error: sqlite3.Error) -> bool:
    return any(words in str(error) for words in _DAMAGE)


def _connect(path: str, *, uri: bool = False) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_LOCK_WAIT_S, isolation_level=None, check_same_thread=False, uri=uri)
    # A flipped bit in a text costs one character, not the conversation.
    db.text_factory = lambda data: data.decode("utf-8", "replace")
    return db


def _connect_to_look(path: Path) -> sqlite3.Connection:
    """A connection that changes neither the file nor its log of writes, not even by closing."""
    return _connect(f"{path.as_uri()}?mode=ro", uri=True)


def _prepare(db: sqlite3.Connection) -> sqlite3.Connection:
    """Set a new connection up and bring its file to the present version."""
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
        _version_of_ours(db)
        for setting in (
            "auto_vacuum = INCREMENTAL",
            "journal_mode = WAL",
            "synchronous = FULL",
            "fullfsync = ON",  # macOS: through the disk's own cache
            "secure_delete = FAST",
            "temp_store = MEMORY",
            f"journal_size_limit = {_WAL_BYTES}",
        ):
            db.execute(f"PRAGMA {setting}").fetchall()
        upgrade(db, MIGRATIONS)
        with _transaction(db):  # takes the lock for good
            pass
    except BaseException:
        db.close()
        raise
    return db


def _open_sound(path: Path) -> sqlite3.Connection:
    # Conversations are private, and SQLite gives its other files the rights of this one.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return _prepare(_connect(str(path)))


def _version_of_ours(db: sqlite3.Connection) -> int:
    """The version of the file, 0 for an empty one. Raises ChatDamaged where this program may not touch it."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise ChatDamaged(
            f"The file of the conversations has version {version}; this Turntable knows {len(MIGRATIONS)}.",
            hint="Start the newer Turntable, or choose another data folder.",
        )
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if (version or tables) and db.execute("PRAGMA application_id").fetchone() != (_APPLICATION_ID,):
        raise ChatDamaged(
            "The file of the conversations belongs to another program.", hint="Choose another data folder."
        )
    return int(version)


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _damaged(path: Path) -> bool:
    """Whether the file must be set aside, found without changing it.

    Raises ChatDamaged where the file is none that this version may touch.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ChatDamaged("The file of the conversations is a link or a folder.", hint="Put a plain file there.")
    size_bytes = _size_bytes(path)
    if size_bytes == 0:  # SQLite would delete a log that has lost its file
        return _size_bytes(path.with_name(path.name + "-wal")) > 0
    if size_bytes < _SMALLEST_BYTES:  # SQLite takes a file of one byte for an empty one, and writes over it
        return True
    if _size_bytes(path.with_name(path.name + "-journal")):
        return False  # the first start was cut off; opening the file for writing takes that back
    with closing(_connect_to_look(path)) as db:
        if _version_of_ours(db) == len(MIGRATIONS):
            for query in (_CHATS, _MESSAGES):
                db.execute(query + " LIMIT 0")
        return size_bytes <= _CHECK_BYTES and db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",)


def _set_aside(path: Path) -> Path:
    """Move the file and what belongs to it to the first free `<name>.damaged-<n>`."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.damaged-{number}")
        if not any(os.path.lexists(f"{aside}{part}") for part in _PARTS):
            break
    for part in _PARTS:
        with suppress(FileNotFoundError):
            os.rename(f"{path}{part}", f"{aside}{part}")
    # Looking into the file leaves these behind, and they hold nothing.
    Path(f"{aside}-shm").unlink(missing_ok=True)
    if not _size_bytes(log := Path(f"{aside}-wal")):
        log.unlink(missing_ok=True)
    return aside


def _rescue(source: Path, target: Path) -> int:
    """Copy all that can still be read into a new file; returns how many messages that is."""
    for part in _PARTS:  # of a rescue that was cut off
        Path(f"{target}{part}").unlink(missing_ok=True)
    with closing(_open_sound(target)) as new:
        if _size_bytes(source):
            with closing(_connect_to_look(source)) as old, _transaction(new):
                for table in ("chats", "messages"):
                    _copy_table(old, new, table)
                _mend(new)
        (messages,) = new.execute("SELECT count(*) FROM messages").fetchone()
    return int(messages)


def _copy_table(old: sqlite3.Connection, new: sqlite3.Connection, table: str) -> None:
    """Copy the columns that both files have; only our own names for them get into a statement."""
    columns = [name for _, name, *_ in new.execute(f"PRAGMA table_info({table})")]
    try:
        found = {name for _, name, *_ in old.execute(f"PRAGMA table_info({table})")}
    except sqlite3.DatabaseError:
        return
    columns = [name for name in columns if name in found]
    if columns:
        into, marks = ", ".join(columns), ", ".join("?" * len(columns))
        insert = f"INSERT OR IGNORE INTO {table} ({into}) VALUES ({marks})"  # noqa: S608
        new.executemany(insert, _readable_rows(old, table, columns))


def _readable_rows(db: sqlite3.Connection, table: str, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The rows in the order of the first column, their key; where a page is broken, one key after another is tried."""
    key = columns[0]
    select = f"SELECT {', '.join(columns)} FROM {table} WHERE {key}"  # noqa: S608
    at, failures, seeking = 0, 0, True
    while failures < _SALVAGE_FAILURES:
        try:
            if seeking:
                row = db.execute(f"{select} > ? ORDER BY {key} LIMIT 1", (at,)).fetchone()
                if row is None:
                    return
            else:
                row = db.execute(f"{select} = ?", (at + 1,)).fetchone()
        except sqlite3.DatabaseError:
            failures += 1
            at += 0 if seeking else 1
            seeking = False
            continue
        seeking = True
        at = row[0] if row else at + 1
        if row:
            yield row


def _mend(db: sqlite3.Connection) -> None:
    """Make a salvaged file consistent: messages whose conversation was lost get a new one of the same id."""
    lost = db.execute("SELECT chat, max(preset), min(created_s) FROM messages WHERE chat NOT IN"
                      " (SELECT id FROM chats) GROUP BY chat ORDER BY min(id)").fetchall()  # fmt: skip
    for chat, preset, created_s in lost:
        db.execute(
            "INSERT INTO chats (id, title, titled, preset, created_s, updated_s, change) VALUES (?, ?, 1, ?, ?, ?, ?)",
            (chat, "Recovered conversation", preset, created_s, created_s, _next_change(db)),
        )
    db.execute("UPDATE chats SET messages = coalesce((SELECT max(seq) FROM messages WHERE chat = chats.id), 0)")
