"""The models on the disk: what lies there, how large, which presets use it, when it last answered; deleting with undo.

A deleted model is moved aside within the models folder, which costs nothing and can
be taken back, and is deleted for good after KEPT_S, or at once when somebody needs
the space. Works by names of the folder's own entries only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from modules.downloads import PARTIAL
from modules.errors import InvalidRequest, ModelFilesError
from modules.library import Library
from modules.presets import Presets, Variant

TRASH = ".deleted"
KEPT_S = 600.0
_ASIDE = re.compile(r"(\d+)-(.+)", re.DOTALL)


@dataclass(frozen=True)
class OnDisk:
    """One entry of the models folder. last_used_s is seconds since the epoch, 0 where it never answered."""

    name: str
    size_bytes: int
    used_by: tuple[str, ...]
    last_used_s: float = 0.0


@dataclass(frozen=True)
class Deleted:
    """A model that can still be had back. id is what undo() takes."""

    id: str
    name: str
    size_bytes: int
    left_s: float


class Shelf:
    """The models folder as a person sees it. Thread-safe. Raises ModelFilesError where the disk refuses."""

    def __init__(
        self, library: Library, presets: Presets, last_used: Callable[[], Mapping[str, float]] = dict,
        busy: Callable[[Path], bool] = lambda folder: False, now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """last_used gives when each variant, by its title, last answered; busy says that a download writes there."""
        self._library, self._presets, self._last_used, self._busy, self._now = library, presets, last_used, busy, now
        self._aside = library.models_dir / TRASH
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._closed = False
        self.purge()

    def models(self) -> list[OnDisk]:
        """Largest first."""
        used = self._last_used()
        found = []
        for path in self._entries():
            users = list(self._users(path))
            last = max((used.get(title, 0.0) for _, title in users), default=0.0)
            names = tuple(dict.fromkeys(f"{preset} · {title}" for preset, title in users))
            found.append(OnDisk(path.name, _size(path), names, last))
        return sorted(found, key=lambda entry: -entry.size_bytes)

    def deleted(self) -> list[Deleted]:
        """What can be taken back, the latest first."""
        with self._lock:
            return [Deleted(p.name, name, _size(p), since + KEPT_S - self._now()) for p, name, since in self._kept()]

    def delete(self, name: str) -> None:
        """Move a model aside. A model that is loaded goes on answering until it is swapped out."""
        with self._lock:
            path = next((p for p in self._entries() if p.name == name), None)
            if path is None:
                raise InvalidRequest(f"There is no model {name!r} in the models folder.")
            if self._busy(path):
                raise ModelFilesError(f"{name} is being downloaded.", hint="Cancel the download first.")
            with _words(name):
                self._aside.mkdir(exist_ok=True)
                path.rename(self._free_place(name))
            self._later()

    def undo(self, deleted: str) -> None:
        """Put a model back."""
        with self._lock:
            path, name = self._one(deleted)
            target = self._library.models_dir / name
            if os.path.lexists(target):  # a link that leads nowhere would be replaced
                raise ModelFilesError(f"There is a new {name} in the models folder.", hint="Delete that one first.")
            with _words(name):
                path.rename(target)

    def free(self, deleted: str) -> None:
        """Delete for good, now."""
        with self._lock:
            path, name = self._one(deleted)
            with _words(name, "deleted"):
                _remove(path)

    def purge(self) -> None:
        """Delete for good what nobody took back in time."""
        with self._lock:
            for path, _, since in self._kept():
                if self._now() - since >= KEPT_S:
                    with contextlib.suppress(OSError):  # one that the disk refuses must not keep the others
                        _remove(path)
            with contextlib.suppress(OSError):
                if not any(self._aside.iterdir()):
                    self._aside.rmdir()
            self._later()

    def close(self) -> None:
        """No timer is left behind. What was moved aside waits for the next start."""
        with self._lock:
            self._closed = True
            timer = self._timer
        if timer is not None:
            timer.cancel()
            timer.join()

    def _later(self) -> None:
        """Come back when the oldest has waited long enough. The lock is held."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        kept = self._kept()
        if not kept or self._closed:
            return
        left_s = kept[-1][2] + KEPT_S - self._now()
        # One that could not be deleted is tried again, but not at once. A clock that was set back is not believed.
        self._timer = threading.Timer(min(left_s, KEPT_S) + 1 if left_s > 0 else KEPT_S, self.purge)
        self._timer.daemon = True
        self._timer.start()

    def _free_place(self, name: str) -> Path:
        """Where to move a model; another one of the name may have gone there within the same millisecond."""
        stamp = int(self._now() * 1000)
        while os.path.lexists(place := self._aside / f"{stamp}-{name}"):
            stamp += 1
        return place

    def _entries(self) -> list[Path]:
        folder = self._library.models_dir
        try:
            return [p for p in folder.iterdir() if not p.name.startswith(".") and p.name not in (PARTIAL, TRASH)]
        except OSError:
            return []  # there is no models folder before the first download

    def _kept(self) -> list[tuple[Path, str, float]]:
        found = []
        with contextlib.suppress(OSError):
            for path in self._aside.iterdir():
                if match := _ASIDE.fullmatch(path.name):
                    found.append((path, match[2], int(match[1]) / 1000))
        return sorted(found, key=lambda entry: -entry[2])

    def _one(self, deleted: str) -> tuple[Path, str]:
        for path, name, _ in self._kept():
            if path.name == deleted:
                return path, name
        raise InvalidRequest("That model has been deleted for good.")

    def _users(self, path: Path) -> Iterator[tuple[str, str]]:
        for preset in self._presets.list():
            for variant in preset.variants:
                if not variant.bundled and self._uses(variant, path):
                    yield preset.title, variant.title

    def _uses(self, variant: Variant, path: Path) -> bool:
        try:
            folder = self._library.folder(variant)
        except ModelFilesError:  # its path begins with ~, and this account has no home
            return False
        if folder == path:
            return not variant.file or (path / variant.file).exists()
        if not variant.path:
            return False
        # A file of its own, or something deeper in the folder.
        return path in folder.parents or (folder == path.parent and Path(variant.path).name == path.name)


def _size(path: Path) -> int:
    """Bytes of the files of a folder, or of a file; what cannot be read counts nothing."""
    total = 0
    if path.is_file():
        with contextlib.suppress(OSError):
            total = path.stat().st_size
        return total
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(folder, name)).st_size
    return total


def _remove(path: Path) -> None:
    """A link is taken away, never what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def _words(name: str, done: str = "moved") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelFilesError(f"{name} could not be {done}: {error.strerror or error}.") from error
