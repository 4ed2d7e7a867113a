"""What a repository on the hub holds, which of its files a model needs, and their bytes: the hub's protocol.

Knows no job and writes nothing. The hub library is imported when it is first needed:
it takes a third of the time in which `plan` of a preset answers.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from .errors import (
    AccessDenied,
    DownloadError,
    HashMismatch,
    ModelFilesUnsafe,
    SourceNotFound,
    SourceUnreachable,
    TurntableError,
)
from .library import DEVICE
from .presets import Variant

log = logging.getLogger("turntable.downloads")

_MAX_REPO_FILES = 10_000
_MAX_NEEDED_FILES = 400
_MAX_FILE_BYTES = 2 * 10**12
_MAX_SIDE_FILE_BYTES = 512 * 2**20  # tokenizers reach 35 MB
_MAX_REDIRECTS = 8
_LONGEST_RETRY_AFTER_S = 3600.0
_SHOWN_BRANCHES = 12

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")
_PLAIN = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.+-]{0,198}[A-Za-z0-9_+-])?")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf|\.safetensors)")
INDEX = "model.safetensors.index.json"
# What the ExLlama engines read beside the weights. Code and pickles are never among it.
_SIDE_FILES = re.compile(
    r"config\.json|generation_config\.json|quantization_config\.json|(?:video_)?preprocessor_config\.json"
    r"|processor_config\.json|tokenizer\.json|tokenizer_config\.json|tokenizer\.model|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.json|vocab\.txt|merges\.txt|spiece\.model|[\w.-]+\.tiktoken|chat_template\.[\w.]+"
)
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)
_OK, _PARTIAL_CONTENT, _UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _BAD_RANGE, _TOO_MANY = 200, 206, 401, 403, 404, 416, 429
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class _Library:
    """The hub library's names, imported with the first of them."""

    def __getattr__(self, name: str) -> Any:
        if name in ("constants", "errors"):  # modules, which may be there only once somebody has imported them
            return importlib.import_module(f"huggingface_hub.{name}")
        return getattr(importlib.import_module("huggingface_hub"), name)

    @property
    def transport_error(self) -> type[Exception]:
        """The base of its HTTP library's errors: it changed that library between versions, and its own error tells."""
        base: type[Exception] = self.errors.HfHubHTTPError.__bases__[0]
        return base


_library = _Library()


def stored_token() -> str | None:
    """The token from the hub library's file or variable, None without one."""
    token: str | None = _library.get_token()
    return token


class Transient(Exception):
    """Worth another try. after_s is what the hub asked to wait, None where it did not say."""

    def __init__(self, sentence: str, after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.after_s = after_s


@dataclass(frozen=True)
class Ref:
    """What to download: a repository at a revision; for GGUF one file, in all its parts, and perhaps its projector."""

    repo: str
    revision: str = ""
    file: str = ""
    projector: str = ""

    def __post_init__(self) -> None:
        if not _REPO.fullmatch(self.repo) or ".." in self.repo:
            raise SourceNotFound(f"{_shown(self.repo)} is no repository.", hint="Write it as OWNER/NAME.")
        if self.revision and (not _REVISION.fullmatch(self.revision) or ".." in self.revision):
            raise SourceNotFound(f"{_shown(self.revision)} is no branch or commit.")
        for name in (self.file, self.projector):
            if name and (not _PLAIN.fullmatch(name) or DEVICE.fullmatch(name) or not name.endswith(".gguf")):
                raise SourceNotFound(f"{_shown(name)} is no plain name of a GGUF file.")
        if not self.file and not self.revision:
            # The main branch of such a repository often holds no weights, and downloads "well" in a second.
            raise SourceNotFound(
                f"{self.repo} needs a revision, because the weights lie on branches.",
                hint="Write OWNER/NAME@REVISION, or name a GGUF file.",
            )

    @classmethod
    def of(cls, variant: Variant) -> Ref:
        """The ref of a preset's variant. Raises SourceNotFound for one without a repository."""
        if not variant.repo:
            raise SourceNotFound(f"{variant.title} is not downloaded: it is bundled, or a path on this machine.")
        return cls(variant.repo, variant.revision, variant.file, variant.projector)

    @classmethod
    def parse(cls, text: str, file: str = "", projector: str = "") -> Ref:
        """OWNER/NAME@REVISION, as written on the command line."""
        repo, _, revision = text.partition("@")
        return cls(repo, revision, file, projector)

    @property
    def id(self) -> str:
        """A name for the job that is the same for the same ref, and fit for a file name."""
        words = "|".join((self.repo.lower(), self.revision or "main", self.file, self.projector))
        name = re.sub(r"[^A-Za-z0-9]+", "-", f"{self.repo.partition('/')[2]}-{self.file or self.revision}")
        return f"{name[:60].strip('-')}-{hashlib.sha256(words.encode()).hexdigest()[:10]}"

    @property
    def title(self) -> str:
        """For people."""
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{at}" + (f" {self.file}" if self.file else "")

    def variant(self) -> Variant:
        """The least that the library needs to know where the files belong."""
        return Variant(
            self.id, self.title, "llamacpp" if self.file else "exllamav2",
            repo=self.repo, revision=self.revision, file=self.file, projector=self.projector,
        )  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One needed file. digest is its sha256, or for small files git's sha1 of the blob."""

    name: str
    size_bytes: int
    algorithm: str
    digest: str

    def hasher(self) -> Any:
        """An empty hash of the right kind."""
        if self.algorithm == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)


@dataclass(frozen=True)
class Plan:
    """What a download takes: the commit to which the revision was resolved, and the files that are needed."""

    ref: Ref
    commit: str
    folder: Path
    entries: tuple[Entry, ...]

    @property
    def size_bytes(self) -> int:
        """All the files together."""
        return sum(entry.size_bytes for entry in self.entries)


@dataclass(frozen=True)
class Look:
    """weights: top-level GGUF and safetensors files of the branch that was looked at, to bytes; branches: all names.

    nested are the files of weights in subfolders, which are not supported.
    """

    weights: dict[str, int]
    branches: tuple[str, ...]
    nested: tuple[str, ...] = ()


class Hub:
    """The hub's protocol: metadata, and bytes from a position on. Foreign errors become ours here and nowhere else."""

    def __init__(self, endpoint: str, token: Callable[[], str | None], timeout_s: float) -> None:
        self._given, self._token, self._timeout_s = endpoint, token, timeout_s

    @functools.cached_property
    def endpoint(self) -> str:
        """Its address, by default that of the hub library's settings."""
        return str(self._given or _library.constants.ENDPOINT).rstrip("/")

    @property
    def _origin(self) -> tuple[str, str]:
        parts = urlsplit(self.endpoint)
        return (parts.scheme, parts.netloc)

    @property
    def _plain(self) -> bool:
        parts = urlsplit(self.endpoint)
        return parts.scheme == "http" and parts.hostname in _LOOPBACK

    def _must_be_encrypted(self) -> None:
        """Checked at every use and not before: a wrong HF_ENDPOINT must not keep the program from starting."""
        if not self._plain and self._origin[0] != "https":
            raise SourceUnreachable(f"The hub's address {self.endpoint} is not encrypted.", hint="Use https.")

    def info(self, ref: Ref) -> Any:
        """The hub's description of the repository at the revision."""
        self._must_be_encrypted()
        api = _library.HfApi(endpoint=self.endpoint, token=self._token() or False)
        with self._foreign(ref), self._sense(ref):
            found = api.model_info(
                ref.repo, revision=ref.revision or "main", files_metadata=True, timeout=self._timeout_s
            )
        if getattr(found, "gated", False):
            self._ask(ref, "auth-check")  # the list of files is public, the files are not: better now than later
        return found

    def _ask(self, ref: Ref, what: str) -> Any:
        """One more question to the repository's API; the hub library's own functions for these wait for ever."""
        with self._foreign(ref), self._get(f"{self.endpoint}/api/models/{ref.repo}/{what}", 0) as response:
            self._check(ref, response, "")
            return response.read()

    def branches(self, ref: Ref) -> list[str]:
        """The names of the branches; a help in a message only, so without them when they cannot be had."""
        try:
            with self._sense(ref):
                return [str(branch["name"]) for branch in json.loads(self._ask(ref, "refs"))["branches"]]
        except (TurntableError, Transient):
            return []

    @contextlib.contextmanager
    def stream(self, plan: Plan, name: str, start: int) -> Iterator[Any]:
        """The response with the file's bytes from start on; the status is for the caller to judge when it is good."""
        url = _library.hf_hub_url(plan.ref.repo, name, revision=plan.commit, endpoint=self.endpoint)
        for _ in range(_MAX_REDIRECTS):
            with self._foreign(plan.ref, name), self._get(url, start) as response:
                if response.status_code not in _REDIRECTS:
                    self._check(plan.ref, response, name)
                    yield response
                    return
                url = self._redirect(url, response.headers.get("location", ""))
        raise SourceUnreachable(f"The hub sends requests for {name} in a circle.")

    def _get(self, url: str, start: int) -> Any:
        self._must_be_encrypted()
        # The token is for the hub; a redirect leads to a storage host, whose address carries its own permission.
        parts = urlsplit(url)
        token = self._token() if (parts.scheme, parts.netloc) == self._origin else None
        # Positions and hashes count the file's own bytes, so nothing may be compressed on the way.
        headers = {"user-agent": "turntable", "accept-encoding": "identity"}
        if token:
            headers["authorization"] = f"Bearer {token}"
        if start:
            headers["range"] = f"bytes={start}-"
        session: Any = _library.get_session()
        return session.stream("GET", url, headers=headers, follow_redirects=False, timeout=self._timeout_s)

    def _redirect(self, url: str, location: str) -> str:
        target = urljoin(url, location)
        parts = urlsplit(target)
        if parts.scheme == "https" or (self._plain and parts.scheme == "http" and parts.hostname in _LOOPBACK):
            return target
        raise SourceUnreachable(f"The hub redirects to {parts.scheme}://{parts.hostname}, which is not encrypted.")

    @contextlib.contextmanager
    def _foreign(self, ref: Ref, name: str = "") -> Iterator[None]:
        try:
            yield
        except _library.errors.HfHubHTTPError as error:
            self._check(ref, error.response, name)
            raise SourceUnreachable(f"The hub's answer for {ref.title} makes no sense.") from None
        except _library.errors.OfflineModeIsEnabled:
            hint = "Unset HF_HUB_OFFLINE and start again."
            raise SourceUnreachable("The hub library is told to work offline.", hint=hint) from None
        except _library.transport_error as error:
            raise Transient(_why(error, urlsplit(self.endpoint).hostname or "the hub")) from None

    @contextlib.contextmanager
    def _sense(self, ref: Ref) -> Iterator[None]:
        """Around what takes the hub's JSON apart: another server's page is no bug of ours."""
        try:
            yield
        except _library.errors.HfHubHTTPError:  # also a ValueError for some statuses
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.debug("the hub's answer for %s: %r", ref.title, error)
            host = urlsplit(self.endpoint).hostname
            raise SourceUnreachable(f"{host} does not answer like the hub; is a login page in between?") from None

    def _check(self, ref: Ref, response: Any, name: str) -> None:
        """Raise what the status means; return when it is a good one."""
        status, code = response.status_code, response.headers.get("x-error-code", "")
        if status in (_OK, _PARTIAL_CONTENT):
            return
        if status in _TRANSIENT:
            what = "asks for a pause" if status == _TOO_MANY else f"answers {status}"
            raise Transient(f"The hub {what}.", _retry_after(response.headers))
        page = f"{self.endpoint}/{ref.repo}"
        if code == "GatedRepo" or (status == _FORBIDDEN and code != "RepoNotFound"):
            keep = "keep a token of that account: on the Models page, or by `hf auth login`"
            hint = f"Open {page}, accept the terms, and {keep}."
            raise AccessDenied(f"{ref.repo} is handed out only to those who accepted its terms.", hint=hint)
        if status == _UNAUTHORIZED and code != "RepoNotFound" and self._token():
            hint = "Keep a new token on the Models page or by `hf auth login`, or forget the old one there."
            raise AccessDenied("The hub does not accept the stored token.", hint=hint)
        raise self._absent(ref, status, code, name)

    def _absent(self, ref: Ref, status: int, code: str, name: str) -> DownloadError:
        if code == "RevisionNotFound":
            return SourceNotFound(f"{ref.repo} has no revision {ref.revision or 'main'}.", hint=self.advice(ref))
        if code == "EntryNotFound" or (name and status == _NOT_FOUND):
            return SourceNotFound(f"{ref.repo} no longer has the file {name}.", hint="Cancel and start again.")
        if status in (_UNAUTHORIZED, _NOT_FOUND):
            hint = "Check the name; for a private one, store a token with `hf auth login`."
            return SourceNotFound(f"{ref.repo} does not exist, or is private.", hint=hint)
        if status == _BAD_RANGE:
            return HashMismatch(f"{name} is shorter on the hub than the hub says.")
        return SourceUnreachable(f"The hub answers {status} for {ref.title}.")

    def advice(self, ref: Ref) -> str | None:
        """The branches there are, as a hint; None keeps the error's own."""
        names = self.branches(ref)
        if not names:
            return None
        more = ", …" if len(names) > _SHOWN_BRANCHES else ""
        return f"Its branches: {', '.join(names[:_SHOWN_BRANCHES])}{more}."


    def login(self, token: str) -> None:
        """Check a token and keep it where the hub library keeps it. Raises AccessDenied or SourceUnreachable."""
        errors = _library.errors
        try:
            _library.login(token=token, skip_if_logged_in=False)
        except (errors.HfHubHTTPError, ValueError):
            hint = "Make a new one with the right to read on the hub's page, under Settings, Access Tokens."
            raise AccessDenied("The hub does not accept this token.", hint=hint) from None
        except (_library.transport_error, errors.OfflineModeIsEnabled):
            raise SourceUnreachable("The hub cannot be reached, so the token could not be checked.") from None

    @staticmethod
    def logout() -> None:
        """Delete the token that the hub library keeps. A token in a variable of the environment stays."""
        _library.logout()

    @staticmethod
    def cached(plan: Plan, entry: Entry, cache_dir: str = "") -> Path | None:
        """The file in the hub library's own cache, where it is there."""
        cache = cache_dir or _library.constants.HF_HUB_CACHE
        found = _library.try_to_load_from_cache(plan.ref.repo, entry.name, cache_dir=cache, revision=plan.commit)
        return Path(found) if isinstance(found, str) else None


def _why(error: Exception, host: str) -> str:
    """A transport error in words, without its address, which may carry a signature."""
    kind = type(error).__name__
    if "Connect" in kind:
        return f"{host} cannot be reached."
    return f"{host} is silent." if "Timeout" in kind else f"The connection to {host} broke."


def _retry_after(headers: Any) -> float | None:
    """Seconds that the hub asks to wait: Retry-After in seconds or as a date, or the reset of its rate limit."""
    said = str(headers.get("retry-after", "")).strip()
    limit = re.search(r";\s*t\s*=\s*(\d+)", str(headers.get("ratelimit", "")))
    wait_s: float | None = None
    if said.isdigit():
        wait_s = float(said)
    elif said:
        with contextlib.suppress(ValueError, TypeError):
            wait_s = max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    elif limit:
        wait_s = float(limit[1])
    return None if wait_s is None else min(wait_s, _LONGEST_RETRY_AFTER_S)


# The plan: which files are needed -----------------------------------------------------------------


def entries_of(ref: Ref, info: Any) -> dict[str, Entry]:
    """The repository's top-level files by name. Raises ModelFilesUnsafe for names that are tricks."""
    siblings = list(info.siblings or ())
    if len(siblings) > _MAX_REPO_FILES:
        raise SourceNotFound(f"{ref.repo} has {len(siblings)} files, so it is no model's repository.")
    found: dict[str, Entry] = {}
    for sibling in siblings:
        name = sibling.rfilename
        _refuse_tricks(ref, name)
        if "/" not in name:
            lfs = sibling.lfs
            size = lfs.size if lfs else sibling.size
            digest = lfs.sha256 if lfs else sibling.blob_id
            found[name] = Entry(
                name, size if type(size) is int else -1, "sha256" if lfs else "git-sha1", str(digest or "").lower()
            )
    return found


def _refuse_tricks(ref: Ref, name: Any) -> None:
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") or DEVICE.fullmatch(part) or re.search(r"[\\:\x00-\x1f]", part) for part in parts):
        raise ModelFilesUnsafe(
            f"{ref.repo} has a file whose name leads elsewhere: {_shown(name)}.",
            hint="Do not use this repository; its author means harm.",
        )


def checked(ref: Ref, entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The needed files, after every check of what the hub says of them."""
    chosen = tuple(sorted(entries, key=lambda entry: entry.name))
    if len(chosen) > _MAX_NEEDED_FILES:
        raise SourceNotFound(f"{ref.title} needs {len(chosen)} files, which no model does.")
    if len({entry.name.lower() for entry in chosen}) != len(chosen):
        raise ModelFilesUnsafe(f"{ref.repo} has files whose names differ in capitals only.")
    for entry in chosen:
        weights = entry.name.endswith((".gguf", ".safetensors"))
        if not _PLAIN.fullmatch(entry.name):
            raise ModelFilesUnsafe(f"{ref.repo} has a needed file with an odd name: {_shown(entry.name)}.")
        if not 0 <= entry.size_bytes <= (_MAX_FILE_BYTES if weights else _MAX_SIDE_FILE_BYTES):
            raise SourceUnreachable(f"The hub gives {entry.name} a size of {entry.size_bytes} bytes.")
        if not re.fullmatch(r"[0-9a-f]{64}" if entry.algorithm == "sha256" else r"[0-9a-f]{40}", entry.digest):
            raise SourceUnreachable(f"The hub gives no hash for {entry.name}, so it could not be checked.")
    return chosen


def gguf_entries(ref: Ref, found: dict[str, Entry]) -> list[Entry]:
    names = [name for base in (ref.file, ref.projector) if base for name in parts_of(base)]
    for name in names:
        if name not in found:
            near = difflib.get_close_matches(name, [n for n in found if n.endswith(".gguf")], n=3, cutoff=0.0)
            hint = f"The nearest names there: {', '.join(near)}." if near else "It has no GGUF files at the top."
            raise SourceNotFound(f"{ref.title} is not there: the repository has no file {name}.", hint=hint)
    return [found[name] for name in names]


def parts_of(name: str) -> list[str]:
    """All the parts of a model of which this file is one; just the name for a model in one file."""
    match = _SHARD.fullmatch(name)
    if not match or not 0 < int(match[3]) <= _MAX_NEEDED_FILES:
        return [name]
    return [f"{match[1]}-{part:05d}-of-{match[3]}{match[4]}" for part in range(1, int(match[3]) + 1)]


def folder_entries(ref: Ref, found: dict[str, Entry], indexed: set[str] | None) -> list[Entry]:
    """The files of a folder of safetensors. indexed are the weights that its index names, None without an index."""
    weights = {name for name in found if name.endswith(".safetensors")}
    side = {name for name in found if _SIDE_FILES.fullmatch(name)}
    if indexed is not None and not indexed & weights:
        indexed = None  # the index of the model before it was quantized, left in the repository by the converter
    elif indexed is not None:
        if missing := sorted(indexed - weights):
            raise SourceNotFound(f"{ref.title} is not complete on the hub: it lacks {missing[0]}.")
        side.add(INDEX)
        weights = indexed
    if len(weights) > 1:  # the same weights again, in one file, for another program
        weights = {name for name in weights if not name.startswith("consolidated")} or weights
    for name in sorted(weights):
        if missing := [part for part in parts_of(name) if part not in found]:
            raise SourceNotFound(f"{ref.title} is not complete on the hub: it lacks {missing[0]}.")
    return [found[name] for name in weights | side]


def _shown(value: Any) -> str:
    """A foreign name in a message: short, and on one line."""
    return json.dumps(value)[:80]
