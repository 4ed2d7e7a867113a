"""Downloads of models: what is needed, jobs that pause and resume, checked hashes, and publication in one step.

Owns the folder `.partial` in the models folder: a journal for each unfinished job,
its files, and the locks that keep two servers apart. A file is fetched in ranges
from where its part ends, so a kill costs the block in flight; its hash is computed
while it arrives. A model appears under its name only by a rename, when it is whole.

The metadata comes through huggingface_hub. The bytes do not: its own downloads
compare no hash, cannot be paused, and begin anew after a restart
(docs/decisions.md). The token stays in the hub library's file; it goes to the hub
alone, never to the host that a redirect names, and into no message of ours.

Knows nothing of engines, memory or pages.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import logging
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .errors import (
    DownloadError,
    HashMismatch,
    InvalidRequest,
    ModelFilesUnsafe,
    NotEnoughDisk,
    SourceNotFound,
    SourceUnreachable,
    TurntableError,
    from_wire,
)
from .hub import (
    INDEX,
    Entry,
    Hub,
    Look,
    Plan,
    Ref,
    Transient,
    checked,
    entries_of,
    folder_entries,
    gguf_entries,
    stored_token,
)
from .library import MANIFEST, PICKLES, Library, check_gguf, check_safetensors
from .presets import Variant

log = logging.getLogger("turntable.downloads")

PARTIAL = ".partial"
_WEIGHTS = (".gguf", ".safetensors")
_MOVE = "Move or rename what lies there; a preset can use it by its path. Then resume the download."
RUNNING = ("queued", "planning", "checking", "downloading", "publishing")

_GB = 10**9
_MAX_JSON_BYTES = 16 * 2**20
_PARTIAL_CONTENT = 206
_READ_BYTES = 2**20
_NOTIFY_EVERY_S = 0.25
_SPEED_WINDOW_S = 10.0

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True)
class JobView:
    """A job as people see it. left_s is None where nothing can be said yet; note says what is waited for."""

    id: str
    repo: str
    revision: str
    file: str
    folder: str
    state: str  # one of RUNNING, or paused, failed, done, cancelled
    done_bytes: int
    total_bytes: int
    speed_bytes_s: float
    left_s: float | None
    files_done: int
    files_total: int
    note: str
    error: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the page."""
        return asdict(self)


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@dataclass(frozen=True)
class Options:
    """Limits. tries is how often in a row a request may fail without a new byte; timeout_s is the longest silence.

    The same two for a lookup, for which somebody waits.
    """

    reserve_bytes: int = 2 * _GB
    connections: int = 4
    jobs_at_once: int = 2
    tries: int = 8
    timeout_s: float = 20.0
    lookup_tries: int = 2
    lookup_timeout_s: float = 4.5
    backoff_s: float = 1.0
    longest_backoff_s: float = 60.0
    sync_bytes: int = 64 * 2**20
    free_bytes: Callable[[Path], int] = _free_bytes
    cache_dir: str = ""  # the hub library's own cache; empty takes its setting


class _Stopped(Exception):
    """The person paused or cancelled, or the server ends."""


_LONGEST_PAUSE_S = 2.0  # in which a person who looks at a page still waits
_ENDING = "Turntable is ending."


class _Busy(Exception):
    """Another process holds the lock."""


# The hub --------------------------------------------------------------------------------------


class _Patience:
    """Tries again after a pause that grows, at most so many times in a row without progress."""

    def __init__(self, stop: threading.Event, options: Options, note: Callable[[str], None]) -> None:
        self._stop, self._options, self._note = stop, options, note
        self._failed = 0

    def progressed(self) -> None:
        """A new byte has come: the count starts anew."""
        if self._failed:
            self._failed = 0
            self._note("")

    def again(self, error: Transient) -> None:
        """Wait before the next try. Raises SourceUnreachable when it was the last, _Stopped when paused meanwhile."""
        if self._stop.is_set():
            raise _Stopped
        self._failed += 1
        if self._failed >= self._options.tries:
            raise SourceUnreachable(f"The download gave up after {self._failed} tries. {error}")
        grown = self._options.backoff_s * 2 ** (self._failed - 1)
        wait_s = min(grown, self._options.longest_backoff_s) if error.after_s is None else error.after_s
        self._note(f"{error} Next try in {wait_s:.0f} s.")
        if self._stop.wait(wait_s):
            raise _Stopped

    def call(self, act: Callable[[], Any]) -> Any:
        """Do it until it works."""
        while True:
            try:
                result = act()
            except Transient as error:
                self.again(error)
            else:
                self.progressed()
                return result


class _ShortPatience(_Patience):
    """For somebody who waits for the answer: few tries, and no long pause that the hub may ask for."""

    def __init__(self, stop: threading.Event, options: Options) -> None:
        super().__init__(stop, replace(options, tries=options.lookup_tries), lambda sentence: None)

    def again(self, error: Transient) -> None:
        self._failed += 1
        wait_s = self._options.backoff_s if error.after_s is None else error.after_s
        if self._failed >= self._options.tries or wait_s > _LONGEST_PAUSE_S:
            raise SourceUnreachable(str(error), hint="Check the network, and ask again in a while.")
        if self._stop.wait(wait_s):
            raise _Stopped


def _refuse_empty(ref: Ref, hub: Hub, found: dict[str, Entry]) -> None:
    """An EXL2 repository's main branch holds no weights; say so before anything is fetched."""
    if not any(name.endswith(".safetensors") for name in found):
        pickled = sorted(name for name in found if name.lower().endswith(PICKLES))
        if pickled:
            raise ModelFilesUnsafe(f"{ref.title} has its weights in {pickled[0]}, which can run code when opened.")
        what = ", ".join(sorted(name for name in found if not name.startswith("."))[:4]) or "nothing"
        raise SourceNotFound(f"{ref.title} holds no weights, only {what}.", hint=hub.advice(ref))
    if "config.json" not in found:
        raise SourceNotFound(f"{ref.title} has no config.json, so no engine could load it.")


def _small_json(hub: Hub, plan: Plan, entry: Entry, patience: _Patience) -> dict[str, Any]:
    def fetch() -> bytes:
        raw = b""
        with hub.stream(plan, entry.name, 0) as response:
            for block in response.iter_raw():
                raw += block
                if len(raw) > entry.size_bytes:
                    break
        if len(raw) < entry.size_bytes:
            raise Transient("The hub's answer ended too early.")
        return raw

    if entry.size_bytes > _MAX_JSON_BYTES:
        raise SourceUnreachable(f"{entry.name} has {entry.size_bytes} bytes, which is no sensible size.")
    raw, digest = patience.call(fetch), entry.hasher()
    digest.update(raw)
    if digest.hexdigest() != entry.digest:
        raise HashMismatch(f"{entry.name} is not what the hub announced.")
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise SourceNotFound(f"{entry.name} of {plan.ref.title} is damaged on the hub.")
    return table


# Files and locks -----------------------------------------------------------------------------------


class _Lock:
    """A lock between processes, let go by the system when its holder dies."""

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = path.open("a+b")
            try:
                _lock_file(self._file, wait)
                same = os.fstat(self._file.fileno()).st_ino == path.stat().st_ino
            except FileNotFoundError:
                same = False
            except OSError:
                self._file.close()
                raise _Busy from None
            if same:
                break
            self._file.close()  # its last holder deleted it between our open and our lock
        self._path = path

    def release(self, *, delete: bool = False) -> None:
        """Let go. Deletes the file only while it is still held, so that nobody holds a deleted one for long."""
        if delete:
            with contextlib.suppress(OSError):  # Windows deletes no open file, and an empty file harms nobody
                self._path.unlink()
        self._file.close()


if sys.platform == "win32":
    import msvcrt

    def _lock_file(file: Any, wait: bool) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock_file(file: Any, wait: bool) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _write_json(path: Path, table: dict[str, Any], *, sync: bool = True) -> None:
    """The whole table under the name, or the old file untouched."""
    draft = path.with_name(path.name + ".new")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(table, file, indent=1)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(draft, path)


def _read_json(path: Path) -> dict[str, Any]:
    """The table, or an empty one where there is none that can be read."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _boot_id() -> str:
    """Changes when the machine starts; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the disk's format or another disk does not allow that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        draft = target.with_name(target.name + ".part")
        shutil.copyfile(source, draft)
        os.replace(draft, target)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """What was published into a folder: file name to size_bytes, algorithm, digest, repo, revision and commit."""
    files = _read_json(folder / MANIFEST).get("files")
    return {n: e for n, e in files.items() if isinstance(e, dict)} if isinstance(files, dict) else {}


def verify(folder: Path) -> list[str]:
    """Read every published file of a folder again; the names of those that are gone or changed."""
    bad = []
    for name, table in read_manifest(folder).items():
        entry = Entry(name, int(table["size_bytes"]), str(table["algorithm"]), str(table["digest"]))
        if not _is(folder / name, entry, threading.Event()):
            bad.append(name)
    return bad


def _is(path: Path, entry: Entry, stop: threading.Event) -> bool:
    """Whether the file is the one that the entry describes; reads it whole when the size is right."""
    try:
        if not path.is_file() or path.stat().st_size != entry.size_bytes:
            return False
        digest = entry.hasher()
        with path.open("rb") as file:
            _feed(file, digest, entry.size_bytes, stop)
    except OSError:
        return False
    return bool(digest.hexdigest() == entry.digest)


def _feed(file: Any, digest: Any, size_bytes: int, stop: threading.Event) -> None:
    left = size_bytes
    while left > 0:
        if stop.is_set():
            raise _Stopped
        block = file.read(min(left, _READ_BYTES))
        if not block:
            return
        digest.update(block)
        left -= len(block)


# One file ------------------------------------------------------------------------------------------


class _Fetch:
    """Brings one file to the disk: NAME.part grows to the whole, is checked, and loses its ending.

    NAME.sync says how much of the part was forced to the disk and in which run of the
    machine. After a power cut the end of a part may hold zeros, so all beyond that
    mark is given up; after a kill the size is the truth, because the kernel lived on.
    """

    def __init__(self, job: _Job, plan: Plan, entry: Entry, hub: Hub, options: Options) -> None:
        self._job, self._plan, self._entry, self._hub, self._options = job, plan, entry, hub, options
        self._final = job.staged / entry.name
        self._part = job.staged.parent / "parts" / (entry.name + ".part")
        self._mark = self._part.with_name(entry.name + ".sync")
        self._synced = self._at = 0
        self._digest: Any = None
        self._boot = _boot_id()

    def run(self) -> None:
        """Return when the file is there and right. Raises HashMismatch when it came wrong twice."""
        self._part.parent.mkdir(parents=True, exist_ok=True)
        patience = _Patience(self._job.stop, self._options, self._job.note)
        for _ in range(2):
            with self._open() as out:
                self._receive(out, patience)
                os.fsync(out.fileno())
            if self._digest.hexdigest() == self._entry.digest:
                os.replace(self._part, self._final)
                self._mark.unlink(missing_ok=True)
                return
            self._part.unlink()
            self._mark.unlink(missing_ok=True)
            self._job.arrived(self._entry.name, 0)
        raise HashMismatch(f"{self._entry.name} arrived twice with another content than the hub announced.")

    def _open(self) -> Any:
        """The part, its hash so far, and where to go on."""
        out = self._part.open("r+b" if self._part.exists() else "w+b", buffering=0)
        try:
            size_bytes = os.fstat(out.fileno()).st_size
            mark = _read_json(self._mark)
            self._synced = mark.get("synced", 0) if type(mark.get("synced", 0)) is int else 0
            if mark.get("boot", "") != self._boot or size_bytes > self._entry.size_bytes:
                size_bytes = min(size_bytes, self._synced, self._entry.size_bytes)
            if size_bytes < os.fstat(out.fileno()).st_size:
                out.truncate(size_bytes)
            self._synced = min(self._synced, size_bytes)
            self._save_mark()
            self._digest = self._entry.hasher()
            _feed(out, self._digest, size_bytes, self._job.stop)
            self._at = out.seek(size_bytes)
            self._job.arrived(self._entry.name, self._at)
        except BaseException:
            out.close()
            raise
        return out

    def _receive(self, out: Any, patience: _Patience) -> None:
        while self._at < self._entry.size_bytes:
            try:
                with self._hub.stream(self._plan, self._entry.name, self._at) as response, self._job.reading(response):
                    self._accept(out, response)
                    for block in response.iter_raw():
                        self._write(out, block)
                        patience.progressed()
                if self._at < self._entry.size_bytes:
                    raise Transient("The hub's answer ended too early.")
            except Transient as error:
                patience.again(error)

    def _accept(self, out: Any, response: Any) -> None:
        """Check that the response is the piece that was asked for."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise SourceUnreachable(f"The hub sends {self._entry.name} compressed, so it cannot be checked.")
        begin, total = 0, response.headers.get("content-length", "")
        if response.status_code == _PARTIAL_CONTENT:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            begin, total = (int(match[1]), match[3]) if match else (-1, "")
        elif self._at:  # a proxy that knows no ranges; then only the whole file can be had
            self._at = out.seek(0)
            out.truncate(0)
            self._synced, self._digest = 0, self._entry.hasher()
            self._save_mark()
        if begin != self._at or (total.isdigit() and int(total) != self._entry.size_bytes):
            raise HashMismatch(f"The hub sends another piece of {self._entry.name} than the one asked for.")

    def _write(self, out: Any, block: bytes) -> None:
        if self._job.stop.is_set():
            raise _Stopped
        if self._at + len(block) > self._entry.size_bytes:
            raise HashMismatch(f"{self._entry.name} is longer than the hub announced.")
        view = memoryview(block)
        while view:
            view = view[out.write(view) :]
        self._digest.update(block)
        self._at += len(block)
        self._job.arrived(self._entry.name, self._at, received=len(block))
        if self._at - self._synced >= self._options.sync_bytes:
            os.fsync(out.fileno())
            self._synced = self._at
            self._save_mark()
            self._job.check_reserve()

    def _save_mark(self) -> None:
        # Not forced to the disk: an older mark only gives up more than it must.
        _write_json(self._mark, {"synced": self._synced, "boot": self._boot}, sync=False)


# One job -------------------------------------------------------------------------------------------


class _Job:
    """The numbers and the intentions of one download. Its files and threads are the business of Downloads."""

    def __init__(self, ref: Ref, home: Path, target: Path, changed: Callable[[_Job], None]) -> None:
        self.ref, self.home, self.target = ref, home, target
        self.staged = home / "files"
        self.stop = threading.Event()
        self.cancelled = self.rest = False  # what the person wants; stop is also set when a file fails
        self.resting = True  # no thread is at work
        self.state = "queued"
        self.error: dict[str, Any] | None = None
        self.plan: Plan | None = None
        self.thread: threading.Thread | None = None
        self.check_reserve: Callable[[], None] = lambda: None
        self._changed = changed
        self._guard = threading.Lock()
        self._note = ""
        self._have: dict[str, int] = {}
        self._received = 0
        self._samples: collections.deque[tuple[float, int]] = collections.deque()
        self._told = 0.0
        self._sockets: set[Any] = set()

    def enter(self, state: str) -> None:
        """A new state: tell everybody at once."""
        with self._guard:
            self.state, self._note = state, ""
            self._samples.clear()
        self._changed(self)

    def note(self, sentence: str) -> None:
        """What the job waits for; empty when it goes on."""
        with self._guard:
            self._note = sentence
        self._changed(self)

    def arrived(self, name: str, have_bytes: int, *, received: int = 0) -> None:
        """A file has so many bytes now, of which so many have just come over the network."""
        now = time.monotonic()
        with self._guard:
            self._have[name] = have_bytes
            self._received += received
            tell = now - self._told >= _NOTIFY_EVERY_S
            if tell:
                self._told = now
                self._samples.append((now, self._received))
                while now - self._samples[0][0] > _SPEED_WINDOW_S:
                    self._samples.popleft()
        if tell:
            self._changed(self)

    def left_bytes(self) -> int:
        """What is still to be written to the disk."""
        plan = self.plan
        with self._guard:
            return plan.size_bytes - sum(self._have.values()) if plan else 0

    @contextlib.contextmanager
    def reading(self, response: Any) -> Iterator[None]:
        """While the response is read, interrupt() can end a read that waits for a silent server."""
        stream = response.extensions.get("network_stream")
        sock = stream.get_extra_info("socket") if stream else None
        with self._guard:
            self._sockets.add(sock)
        try:
            yield
        finally:
            with self._guard:
                self._sockets.discard(sock)

    def interrupt(self) -> None:
        """Make the job's threads stop soon."""
        self.stop.set()
        with self._guard:
            for sock in self._sockets:
                with contextlib.suppress(OSError, AttributeError):
                    # Not SSLSocket's own shutdown, which takes the encryption away from under the reading thread.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def view(self) -> JobView:
        """The job now."""
        with self._guard:
            plan, have = self.plan, dict(self._have)
            total = plan.size_bytes if plan else 0
            done = total if self.state == "done" else sum(have.values())
            speed = self._speed() if self.state == "downloading" else 0.0
            entries = plan.entries if plan else ()
            finished = sum(have.get(entry.name, -1) == entry.size_bytes for entry in entries)
            return JobView(
                self.ref.id, self.ref.repo, self.ref.revision, self.ref.file, str(self.target), self.state, done, total,
                speed, (total - done) / speed if speed else None,
                len(entries) if self.state == "done" else finished, len(entries), self._note, self.error,
            )  # fmt: skip

    def _speed(self) -> float:
        """The mean of the last seconds, also when nothing has come since the last sample."""
        if len(self._samples) < 2:
            return 0.0
        begin, first = self._samples[0]
        return (self._received - first) / max(time.monotonic() - begin, 1e-6)


# The journal ----------------------------------------------------------------------------------------


def _save_journal(job: _Job, state: str) -> None:
    plan = job.plan
    job.home.mkdir(parents=True, exist_ok=True)
    _write_json(job.home / "job.json", {
        "version": 1, "state": state, "error": job.error, "ref": asdict(job.ref),
        "commit": plan.commit if plan else "",
        "entries": [asdict(entry) for entry in plan.entries] if plan else [],
    })  # fmt: skip


def _load_plan(table: dict[str, Any], ref: Ref, folder: Path) -> Plan | None:
    """The plan in a journal, checked like the hub's own answer; None where it has none yet."""
    try:
        entries = checked(ref, (Entry(**entry) for entry in table["entries"]))
    except (KeyError, TypeError, TurntableError):
        return None
    return Plan(ref, str(table.get("commit", "")), folder, entries) if entries else None


# Publication ----------------------------------------------------------------------------------------


def _recorded(folder: Path, repo: str) -> dict[str, Entry]:
    """The files of a folder that a download of this repository put there, as they were then."""
    found = {}
    for name, table in read_manifest(folder).items():
        size, algorithm, digest = table.get("size_bytes"), str(table.get("algorithm")), str(table.get("digest"))
        plain = not re.search(r"[\\/\x00]", name) and name not in ("", ".", "..")
        if plain and type(size) is int and str(table.get("repo")).lower() == repo.lower():
            found[name] = Entry(name, size, algorithm, digest)
    return found


def _same(path: Path, other: Path) -> bool:
    """Two names of one file, as _link() makes them; what it had to copy is told by its hash."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def _refuse_foreign(job: _Job, plan: Plan, stop: threading.Event, missing: Iterable[Entry] = ()) -> None:
    """Raise a DownloadError where publication would take a file from its place that is somebody else's.

    missing are the files that are not staged yet. What the hub would send anyway may
    be anybody's, and so may a file that the model does not need, unless it is weights:
    those would lie in another folder than before, under the name of this model.
    """
    target, repo = job.target, plan.ref.repo
    if target.is_symlink() or (os.path.lexists(target) and not target.is_dir()):
        what = "is a link" if target.is_symlink() else "is a file"
        raise DownloadError(f"{target} {what}, and the folder of {repo} would have its name.", hint=_MOVE)
    own = _recorded(target, repo)
    wanted = {entry.name: entry for entry in plan.entries}
    names = [name for name in wanted if os.path.lexists(target / name)]
    if target.is_dir() and not plan.ref.file:
        names += [p.name for p in target.iterdir() if p.name.lower().endswith(_WEIGHTS) and p.name not in wanted]
    for name in sorted(set(names) - own.keys()):
        path, staged, entry = target / name, job.staged / name, wanted.get(name)
        if entry is not None:
            in_place = not staged.exists() and entry not in missing
            if in_place or _same(path, staged) or _is(path, entry, stop):
                continue
        owner = read_manifest(target).get(name, {}).get("repo")
        whose = f"of {owner}" if owner else f"which no download of {repo} put there"
        raise DownloadError(f"{target} already holds another {name}, {whose}. Nothing was changed.", hint=_MOVE)


def _publish(job: _Job, plan: Plan) -> None:
    """Put the staged files under the model's name. Safe to be killed anywhere, and to be called again after that.

    A folder of safetensors is swapped as a whole. Into a folder of GGUF files, which
    may hold other models in use, the parts are moved one by one; the library takes
    a model for present only when every part and the projector are. Raises
    DownloadError, before anything is moved, where a file of somebody else's came there
    since the download began.
    """
    target, staged, old = job.target, job.staged, job.home / "old"
    if staged.is_dir():
        for entry in plan.entries:
            if not ((staged / entry.name).exists() or (plan.ref.file and (target / entry.name).exists())):
                hint = "Resume the download; it is fetched again."
                raise DownloadError(f"{entry.name} was taken away from {target} meanwhile.", hint=hint)
        _refuse_foreign(job, plan, threading.Event())  # a half publication is never paused
        if target.is_dir() and plan.ref.file:
            recorded = _recorded(target, plan.ref.repo)
            for entry in plan.entries:
                if (staged / entry.name).exists():
                    _spare(target / entry.name, recorded.get(entry.name), entry)
                    os.replace(staged / entry.name, target / entry.name)
            _sync_folder(target)
            _write_manifest(target, plan)
        else:
            _write_manifest(staged, plan)
            _sync_folder(staged)
            if target.exists():
                if old.is_dir():  # an earlier try ended between its two renames, and the name was taken since
                    _clear(old, target, plan)
                os.rename(target, old)
            os.rename(staged, target)
            _sync_folder(target.parent)
    if old.is_dir():
        _clear(old, target, plan)


def _spare(path: Path, recorded: Entry | None, wanted: Entry) -> None:
    """Move a file aside that is about to be replaced, unless it can be had from the hub again."""
    if os.path.lexists(path) and not _known(path, recorded, wanted):
        os.rename(path, _kept_name(path))


def _known(path: Path, *entries: Entry | None) -> bool:
    return any(entry is not None and _is(path, entry, threading.Event()) for entry in entries)


def _kept_name(path: Path) -> Path:
    """Where to keep what lay at a path."""
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.replaced-{number}")):
        number += 1
    return kept


def _write_manifest(folder: Path, plan: Plan) -> None:
    files = read_manifest(folder) if plan.ref.file else {}
    where = {"repo": plan.ref.repo, "revision": plan.ref.revision or "main", "commit": plan.commit}
    for entry in plan.entries:
        shown = asdict(entry)
        name = shown.pop("name")
        files[name] = {**shown, **where}
    _write_json(folder / MANIFEST, {"version": 1, "files": files})


def _clear(old: Path, target: Path, plan: Plan) -> None:
    """Delete of what was replaced the files that the hub sent, unchanged. All others are kept beside the model."""
    recorded = _recorded(old, plan.ref.repo)
    wanted = {entry.name: entry for entry in plan.entries}
    for name in sorted(recorded.keys() | wanted.keys()):
        if _same(old / name, target / name) or _known(old / name, recorded.get(name), wanted.get(name)):
            (old / name).unlink()
    (old / MANIFEST).unlink(missing_ok=True)  # the last: after a kill it is needed again
    try:
        old.rmdir()
    except OSError:
        os.rename(old, _kept_name(target))


# All jobs -------------------------------------------------------------------------------------------


class Downloads:
    """The jobs of one models folder. Thread-safe; they belong to the server and outlive every page.

    on_change gets a job's view at every change of state and a few times a second
    while bytes arrive, on the job's thread, and must return quickly.
    """

    def __init__(
        self,
        library: Library,
        endpoint: str = "",
        token: Callable[[], str | None] = stored_token,
        options: Options | None = None,
        on_change: Callable[[JobView], None] | None = None,
    ) -> None:
        self._library, self._options = library, options or Options()
        self._token = token
        self._hub = Hub(endpoint, token, self._options.timeout_s)
        self._asked = Hub(endpoint, token, self._options.lookup_timeout_s)
        self._on_change = on_change
        self._home = library.models_dir / PARTIAL
        self._jobs: dict[str, _Job] = {}
        self._turn = threading.Condition()
        self._active: set[_Job] = set()
        self._closed = False
        self._ended = threading.Event()
        self._lookups: set[Future[Any]] = set()
        self._recover()

    # What people ask for ------------------------------------------------------------------

    def plan(self, ref: Ref) -> Plan:
        """What the download takes, from the hub; nothing is written. Raises a DownloadError or ModelFilesUnsafe."""
        found: Plan = self._answer(lambda patience: self._ask_hub(ref, self._asked, patience))
        return found

    def read_json(self, plan: Plan, name: str) -> dict[str, Any]:
        """One small JSON file of the plan, checked against its hash, such as config.json."""
        entry = next(entry for entry in plan.entries if entry.name == name)
        table: dict[str, Any] = self._answer(lambda patience: _small_json(self._asked, plan, entry, patience))
        return table

    def look(self, repo: str, revision: str = "") -> Look:
        """What a repository holds: its branches, and the weights of one of them, the main one where none is named.

        Raises a DownloadError or ModelFilesUnsafe.
        """
        ref = Ref(repo, revision or "main")

        def ask(patience: _Patience) -> Look:
            info = patience.call(lambda: self._asked.info(ref))
            found = entries_of(ref, info)
            weights = {name: entry.size_bytes for name, entry in found.items() if name.endswith(_WEIGHTS)}
            names = [each.rfilename for each in info.siblings or ()]
            nested = tuple(sorted(name for name in names if "/" in name and name.endswith(_WEIGHTS)))
            return Look(weights, () if revision else tuple(self._asked.branches(ref)), nested)

        looked: Look = self._answer(ask)
        return looked

    def read_head(self, plan: Plan, name: str, limit_bytes: int) -> bytes:
        """The first bytes of a file of the plan: its header, without the weights. Nothing vouches for their hash."""

        def fetch() -> bytes:
            raw = bytearray()
            with self._asked.stream(plan, name, 0) as response:
                for block in response.iter_raw():
                    raw += block
                    if len(raw) >= limit_bytes:
                        break
            return bytes(raw[:limit_bytes])

        found: bytes = self._answer(lambda patience: patience.call(fetch))
        return found

    def _answer(self, ask: Callable[[_Patience], Any]) -> Any:
        """A lookup's result, and not a moment's wait after close().

        On a daemon thread of its own: nothing ends a connection that is not answered,
        and the program must not wait for one.
        """
        future: Future[Any] = Future()

        def work() -> None:
            result, failure = None, None
            try:
                result = ask(_ShortPatience(self._ended, self._options))
            except BaseException as error:
                failure = error
            with self._turn:
                if future in self._lookups:  # else close() has answered it
                    self._lookups.discard(future)
                    if failure is None:
                        future.set_result(result)
                    else:
                        future.set_exception(failure)

        with self._turn:
            if self._closed:
                raise DownloadError(_ENDING, hint="Start it again, and ask again.")
            self._lookups.add(future)
        threading.Thread(target=work, name="lookup", daemon=True).start()
        return future.result()

    def start(self, ref: Ref) -> JobView:
        """Begin or go on; the same ref is the same job. Errors come in the view, when they are known."""
        with self._turn:
            job = before = self._jobs.get(ref.id)
            if job is None or job.cancelled:
                job = _Job(ref, self._home / ref.id, self._library.folder(ref.variant()), self._tell)
                self._jobs[ref.id] = job
            elif job.state in RUNNING and not job.rest and not job.resting:
                return job.view()
            elif job.resting:  # another owner's model may have taken the folder since
                job.target = self._library.folder(ref.variant())
            self._spawn(job, before.thread if before else None)
            return job.view()

    def is_writing(self, folder: Path) -> bool:
        """Does a job under way put its files there?"""
        with self._turn:
            return any(job.target == folder and job.state in RUNNING for job in self._jobs.values())

    def resume(self, job_id: str) -> JobView:
        """Go on with a job that is paused or failed."""
        return self.start(self._job(job_id).ref)

    def pause(self, job_id: str) -> None:
        """Stop soon, at the latest when a server that has not begun to answer is given up; what has arrived is kept."""
        job = self._job(job_id)
        with self._turn:
            job.rest = True
            job.interrupt()
            self._turn.notify_all()

    def cancel(self, job_id: str) -> None:
        """Stop and delete what has arrived. What was published stays."""
        job = self._job(job_id)
        with self._turn:
            job.cancelled = job.rest = True
            resting = job.resting
            job.interrupt()
            self._turn.notify_all()
        if resting:
            self._discard(job)

    def dismiss(self, job_id: str) -> None:
        """Take a job that is done out of the list. The model stays."""
        job = self._job(job_id)
        with self._turn:
            if job.state != "done":
                raise InvalidRequest(f"{job.ref.title} is not done.", hint="Cancel it instead.")
            del self._jobs[job_id]
        self._tell(job)

    def jobs(self) -> list[JobView]:
        """All the jobs, oldest first, without those that are done and whose model is gone."""
        with self._turn:
            found = list(self._jobs.values())
        return [job.view() for job in found if job.state != "done" or (job.target / job.ref.file).exists()]

    def wait(self, job_id: str, timeout_s: float | None = None) -> JobView:
        """Wait until the job rests, at most so long."""
        job = self._job(job_id)
        if job.thread is not None:
            job.thread.join(timeout_s)
        return job.view()

    def close(self, grace_s: float = 5.0) -> None:
        """Pause everything and wait until the files are closed. The jobs are there again at the next start."""
        with self._turn:
            self._closed = True
            self._ended.set()
            for future in self._lookups:
                future.set_exception(DownloadError(_ENDING, hint="Start it again, and ask again."))
            self._lookups.clear()
            found = list(self._jobs.values())
            for job in found:
                job.rest = True
                job.interrupt()
            self._turn.notify_all()
        deadline = time.monotonic() + grace_s
        for job in found:
            if job.thread is not None:
                job.thread.join(max(0.0, deadline - time.monotonic()))

    def save_token(self, token: str) -> None:
        """Check a token with the hub and keep it where the hub library keeps it. Raises AccessDenied."""
        self._hub.login(token)

    def forget_token(self) -> None:
        """Delete the kept token."""
        self._hub.logout()

    @property
    def has_token(self) -> bool:
        """Is a token kept? It is never shown."""
        return bool(self._token())

    # Threads --------------------------------------------------------------------------------

    def _job(self, job_id: str) -> _Job:
        with self._turn:
            if job_id not in self._jobs:
                raise SourceNotFound("This download is gone.", hint="Start it again.")
            return self._jobs[job_id]

    def _spawn(self, job: _Job, before: threading.Thread | None) -> None:
        if self._closed:
            raise DownloadError(_ENDING, hint="Start it again; the downloads are kept.")
        job.rest = job.resting = False
        job.state, job.error = "queued", None
        name = f"download-{job.ref.id}"
        job.thread = threading.Thread(target=self._run, args=(job, before), name=name, daemon=True)
        job.thread.start()

    def _tell(self, job: _Job) -> None:
        if self._on_change is None:
            return
        try:
            self._on_change(job.view())
        except Exception:  # a listener's bug must not end a download
            log.exception("a listener of the downloads failed")

    def _run(self, job: _Job, before: threading.Thread | None) -> None:
        """The job's thread, from the queue to its rest."""
        if before is not None:
            before.join()  # it was paused a moment ago and still closes its files
        with self._turn:
            if not job.rest:
                job.stop.clear()
        job.enter("queued")
        state = "paused"
        try:
            with self._place(job):
                state = self._attempt(job)
        except _Stopped:
            pass
        with self._turn:
            job.resting = True
            cancelled = job.cancelled
        if cancelled:
            self._discard(job)
        else:
            job.enter(state)

    @contextlib.contextmanager
    def _place(self, job: _Job) -> Iterator[None]:
        """Wait for a place among those that run, and for any other job into the same folder."""
        with self._turn:
            while len(self._active) >= self._options.jobs_at_once or any(
                other.target == job.target for other in self._active
            ):
                self._turn.wait()
                if job.stop.is_set():
                    raise _Stopped
            if job.stop.is_set():
                raise _Stopped
            self._active.add(job)
        try:
            yield
        finally:
            with self._turn:
                self._active.discard(job)
                self._turn.notify_all()

    def _attempt(self, job: _Job) -> str:
        """Do the work under the job's lock; the state in which the job rests."""
        try:
            lock = _Lock(self._home / f"{job.ref.id}.lock")
        except _Busy:
            error = DownloadError(
                f"{job.ref.title} is being downloaded by another Turntable.", hint="Wait until it has finished."
            )
            job.error = error.to_wire()
            return "failed"
        except OSError as error:
            job.error = self._disk_error(error).to_wire()
            return "failed"
        state = "paused"
        try:
            self._work(job)
            state = "done"
        except TurntableError as error:
            job.error, state = error.to_wire(), "failed"
        except OSError as error:
            job.error, state = self._disk_error(error).to_wire(), "failed"
        except _Stopped:
            pass
        except Exception as error:
            log.exception("the download of %s failed", job.ref.title)
            job.error, state = DownloadError(f"The download broke: {type(error).__name__}.").to_wire(), "failed"
        finally:
            if state == "done":
                shutil.rmtree(job.home, ignore_errors=True)  # what stays is deleted at the next start
            elif job.home.is_dir() and not job.cancelled:
                with contextlib.suppress(OSError):  # a full disk; the journal that is there still names the ref
                    _save_journal(job, state)
            lock.release(delete=state == "done")
        return state

    def _disk_error(self, error: OSError) -> TurntableError:
        name = Path(error.filename).name if isinstance(error.filename, str) else "a file"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NotEnoughDisk(f"The disk with {self._library.models_dir} is full.")
        if error.errno == errno.EFBIG:
            hint = "Choose a folder on another disk with --models-dir; FAT disks end at 4 GB a file."
            return NotEnoughDisk("The disk does not take files of this size.", hint=hint)
        hint = "Look at the rights of the models folder, and unload the model if it is in use."
        return DownloadError(f"{name} cannot be written: {error.strerror or error}.", hint=hint)

    # The work -------------------------------------------------------------------------------

    def _work(self, job: _Job) -> None:
        # Another server may have finished it since, or have come further than we know.
        journal = _read_json(job.home / "job.json")
        plan = _load_plan(journal, job.ref, job.target)
        if plan is not None and journal.get("state") == "publishing":
            job.plan = plan
        else:
            plan, todo = self._prepare(job, plan)
            self._fetch_all(job, plan, todo)
            self._check_headers(job, plan)
        _save_journal(job, "publishing")
        job.enter("publishing")
        lock = _Lock(self._home / "publish.lock", wait=True)
        try:
            _publish(job, plan)
        finally:
            lock.release()

    def _prepare(self, job: _Job, plan: Plan | None) -> tuple[Plan, list[Entry]]:
        """Plan where there is none, take what is on this machine already; the plan, and what is to be fetched."""
        job.enter("planning")
        plan = plan or self._ask_hub(job.ref, self._hub, _Patience(job.stop, self._options, job.note))
        job.plan = plan
        job.staged.mkdir(parents=True, exist_ok=True)
        _save_journal(job, "running")
        job.enter("checking")
        missing = [entry for entry in plan.entries if not self._adopt(job, plan, entry)]
        _refuse_foreign(job, plan, job.stop, missing)
        return plan, missing

    def _ask_hub(self, ref: Ref, hub: Hub, patience: _Patience) -> Plan:
        info = patience.call(lambda: hub.info(ref))
        if not _COMMIT.fullmatch(str(info.sha or "")):
            raise SourceUnreachable(f"The hub names no commit for {ref.title}.")
        found = entries_of(ref, info)
        folder = self._library.folder(ref.variant())
        if ref.file:
            return Plan(ref, info.sha, folder, checked(ref, gguf_entries(ref, found)))
        _refuse_empty(ref, hub, found)
        indexed = None
        if INDEX in found:
            (entry,) = checked(ref, [found[INDEX]])
            table = _small_json(hub, Plan(ref, info.sha, folder, (entry,)), entry, patience).get("weight_map")
            indexed = {str(name) for name in table.values()} if isinstance(table, dict) else set()
        return Plan(ref, info.sha, folder, checked(ref, folder_entries(ref, found, indexed)))

    def _adopt(self, job: _Job, plan: Plan, entry: Entry) -> bool:
        """Take a file that an earlier run finished, that lies in the folder already, or in the hub library's cache."""
        staged, placed = job.staged / entry.name, job.target / entry.name
        if staged.is_file() and staged.stat().st_size == entry.size_bytes:
            pass  # it got its name only after its hash was right
        elif _is(placed, entry, job.stop):
            if not job.ref.file:
                _link(placed.resolve(), staged)
        elif (own := self._hub.cached(plan, entry, self._options.cache_dir)) is not None and _is(own, entry, job.stop):
            _link(own.resolve(), staged)
        else:
            return False
        job.arrived(entry.name, entry.size_bytes)
        return True

    def _fetch_all(self, job: _Job, plan: Plan, missing: Sequence[Entry]) -> None:
        """Several files at once, the largest first, until all are there or one fails."""
        todo = collections.deque(sorted(missing, key=lambda entry: entry.size_bytes, reverse=True))
        self._count_parts(job, todo)
        self._check_disk(job)
        job.check_reserve = self._check_reserve
        job.enter("downloading")
        failures: list[BaseException] = []

        def work() -> None:
            while not failures and not job.stop.is_set():
                try:
                    entry = todo.popleft()
                except IndexError:
                    return
                try:
                    _Fetch(job, plan, entry, self._hub, self._options).run()
                except BaseException as error:
                    failures.append(error)
                    job.interrupt()  # the other files stop too; what they have is kept

        count = min(self._options.connections, len(todo))
        threads = [threading.Thread(target=work, name=f"fetch-{job.ref.id}-{n}", daemon=True) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        real = [error for error in failures if not isinstance(error, _Stopped)]
        if real:
            raise real[0]
        if job.stop.is_set():
            raise _Stopped

    def _count_parts(self, job: _Job, todo: Iterable[Entry]) -> None:
        for entry in todo:
            part = job.home / "parts" / (entry.name + ".part")
            job.arrived(entry.name, min(part.stat().st_size, entry.size_bytes) if part.exists() else 0)

    def _check_disk(self, job: _Job) -> None:
        with self._turn:
            others = sum(other.left_bytes() for other in self._active if other is not job)
        needs, free = job.left_bytes(), self._options.free_bytes(self._library.models_dir)
        reserve = self._options.reserve_bytes
        if needs and needs + others + reserve > free:
            more = f", other downloads {_size(others)}" if others else ""
            raise NotEnoughDisk(
                f"{job.ref.title} needs {_size(needs)}{more}, and {_size(reserve)} stay in reserve, "
                f"but the disk has {_size(free)} free."
            )

    def _check_reserve(self) -> None:
        free = self._options.free_bytes(self._library.models_dir)
        if free < self._options.reserve_bytes:
            raise NotEnoughDisk(
                f"The disk has only {_size(free)} left; {_size(self._options.reserve_bytes)} stay in reserve."
            )

    def _check_headers(self, job: _Job, plan: Plan) -> None:
        """What the library would refuse is not published."""
        for entry in plan.entries:
            staged = job.staged / entry.name
            if staged.exists() and entry.name.endswith(".gguf"):
                check_gguf(staged)
            elif staged.exists() and entry.name.endswith(".safetensors"):
                check_safetensors(staged)

    # Between two runs of the server -----------------------------------------------------------

    def _discard(self, job: _Job) -> None:
        """Delete a cancelled job's files, unless another server is at work on them."""
        try:
            lock = _Lock(self._home / f"{job.ref.id}.lock")
        except (_Busy, OSError):
            log.info("the files of %s are left to another server", job.ref.title)
        else:
            try:
                self._settle(job)
            except (TurntableError, OSError) as error:
                log.warning("what the download of %s replaced stays in %s: %s", job.ref.title, job.home, error)
            else:
                shutil.rmtree(job.home, ignore_errors=True)
            lock.release(delete=True)
        with self._turn:
            if self._jobs.get(job.ref.id) is job:
                del self._jobs[job.ref.id]
        job.enter("cancelled")

    @staticmethod
    def _settle(job: _Job) -> None:
        """End a publication that was cut off, so that the job's folder holds nothing but what the hub sent."""
        old = job.home / "old"
        if _read_json(job.home / "job.json").get("state") == "publishing" and job.plan is not None:
            _publish(job, job.plan)  # it is whole, and its folder may be between two names
        elif old.is_dir():
            os.rename(old, _kept_name(job.target) if os.path.lexists(job.target) else job.target)

    def _recover(self) -> None:
        """List the unfinished jobs as paused, and finish what a crash cut off in the middle of its publication."""
        for path in sorted(self._home.glob("*/job.json")):
            table = _read_json(path)
            try:
                ref = Ref(**table["ref"])
            except (KeyError, TypeError, SourceNotFound):
                log.warning("%s is damaged; delete its folder", path)
                continue
            if ref.id == path.parent.name:
                self._recover_one(ref, table)

    def _recover_one(self, ref: Ref, table: dict[str, Any]) -> None:
        job = _Job(ref, self._home / ref.id, self._library.folder(ref.variant()), self._tell)
        try:
            lock = _Lock(self._home / f"{ref.id}.lock")
        except (_Busy, OSError):
            return  # another server has it
        finished = False
        try:
            job.plan = _load_plan(table, ref, job.target)
            if table.get("state") == "publishing" and job.plan is not None:
                _publish(job, job.plan)
                shutil.rmtree(job.home, ignore_errors=True)
                finished = True
        except TurntableError as error:
            job.error = error.to_wire()
        except OSError as error:
            job.error = self._disk_error(error).to_wire()
        finally:
            lock.release(delete=finished)
        if finished:
            return
        job.state = "failed" if job.error or table.get("state") == "failed" else "paused"
        job.error = job.error or (table["error"] if isinstance(table.get("error"), dict) else None)
        for entry in job.plan.entries if job.plan else ():
            for file in (job.staged / entry.name, job.home / "parts" / (entry.name + ".part")):
                if file.is_file():
                    job.arrived(entry.name, min(file.stat().st_size, entry.size_bytes))
        self._jobs[ref.id] = job


# The terminal ---------------------------------------------------------------------------------------


def run_download(downloads: Downloads, ref: Ref, write: Callable[[str], None], *, live: bool = False) -> int:
    """Download in the foreground: 0 when the model is there, 1 when it failed, 130 after Ctrl+C, which pauses.

    write gets text with its line ends. live says that it is a terminal, where one line is
    written over and over; else a line comes every ten seconds.
    """
    view = downloads.start(ref)
    shown = 0.0
    try:
        while view.state in RUNNING:
            view = downloads.wait(view.id, 0.2)
            if live:
                write("\r\x1b[2K" + progress_line(view))
            elif time.monotonic() - shown >= 10:
                shown = time.monotonic()
                write(progress_line(view) + "\n")
    except KeyboardInterrupt:
        downloads.pause(view.id)
        downloads.wait(view.id, 10)
        write("\nPaused. The same command goes on where it stopped.\n")
        return 130
    write(("\r\x1b[2K" if live else "") + progress_line(view) + "\n")
    if view.error:
        error = from_wire(view.error)
        write(f"{error}\n{error.hint}\n")
    return 0 if view.state == "done" else 1


def progress_line(view: JobView) -> str:
    """A job on one line: a bar, bytes, speed, time left, or what it waits for."""
    share = view.done_bytes / view.total_bytes if view.total_bytes else 0.0
    words = [f"{view.state:11s}", f"[{'#' * int(share * 24):24s}] {share:4.0%}"]
    if view.total_bytes:
        words.append(f"{_size(view.done_bytes)} of {_size(view.total_bytes)}")
        words.append(f"{view.files_done}/{view.files_total} files")
    if view.speed_bytes_s:
        words.append(f"{_size(view.speed_bytes_s)}/s")
    if view.left_s is not None:
        words.append(f"{_time(view.left_s)} left")
    if view.state == "done":
        words.append(view.folder)
    return "  ".join([*words, view.note] if view.note else words)


def print_models(
    library: Library, variants: Sequence[tuple[str, Variant]], downloads: Downloads, write: Callable[[str], None]
) -> None:
    """Every variant with its preset's name: on this machine or not, and how to get it; then the unfinished jobs."""
    for preset, variant in variants:
        try:
            located = library.locate(variant)
            state = f"ready, {_size(located.size_bytes)}"
        except TurntableError as error:
            size = f" ({_size(variant.size_bytes)})" if variant.size_bytes else ""
            state = {"model_not_downloaded": f"not downloaded{size}"}.get(error.code, str(error))
        write(f"{preset:12s} {variant.title:44s} {state}\n")
    for view in downloads.jobs():
        write(f"{view.repo}@{view.revision or 'main'} {view.file}\n  {progress_line(view)}\n")


def print_plan(plan: Plan, write: Callable[[str], None]) -> None:
    """The files of a download with their sizes."""
    write(f"{plan.ref.title} at commit {plan.commit[:12]}\n")
    for entry in plan.entries:
        write(f"  {_size(entry.size_bytes):>9s}  {entry.name}\n")
    write(f"  {_size(plan.size_bytes):>9s}  into {plan.folder}\n")


def _size(size_bytes: float) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.2f} {unit}" if unit == "GB" else f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def _time(left_s: float) -> str:
    minutes, seconds = divmod(int(left_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
