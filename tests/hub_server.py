"""A model hub on loopback: a real HTTP server with the hub's protocol, and with every fault a download can meet.

Speaks files, revisions, ranges, redirects to a second host that stands for the
storage, hashes, refs, gated and private repositories, tokens. Faults are fields
of Hub, read at every request; `log` has what was asked and how much was sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
BLOCK_BYTES = 16 * 1024


@dataclass
class Asked:
    """One request: what for, from which byte, with which token, and how many bytes went out."""

    host: str
    path: str
    start: int
    token: str
    sent_bytes: int = 0
    at: float = field(default_factory=time.monotonic)


@dataclass
class Repo:
    """branches: name to files; a file is its bytes. gated and private ask for the token."""

    branches: dict[str, dict[str, bytes]]
    gated: bool = False
    private: bool = False
    tricks: list[dict[str, Any]] = field(default_factory=list)  # further siblings, as they are

    def commit(self, revision: str) -> str:
        return hashlib.sha1(revision.encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        for name, files in self.branches.items():
            if revision in (name, self.commit(name)):
                return files
        return None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """The server. Use as a context manager; endpoint is its address."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[Asked] = []
        self.answers: list[tuple[int, dict[str, str]]] = []  # given out before anything else, first to last
        self.cut_after: list[int] = []  # the next file responses break after so many bytes
        self.wrong: dict[str, int] = {}  # file name to how many times its bytes come wrong
        self.bytes_per_s = 0  # of one connection; 0 is as fast as it goes
        self.ranges = True
        self.gzip = False
        self.redirect = ""  # instead of the storage host
        self.silent = threading.Event()  # set: a file response stops in the middle and says nothing more
        self.page = False  # a login page answers everything
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._servers: list[ThreadingHTTPServer] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Hub:
        for _ in range(2):
            handler = type("Handler", (_Handler,), {"hub": self})
            server = _Server(("127.0.0.1", 0), handler)
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            self._servers.append(server)
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage(self) -> str:
        return f"http://localhost:{self._servers[1].server_port}"

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main", **more: Any) -> Repo:
        found = self.repos.setdefault(repo, Repo({}, **more))
        found.branches[revision] = files
        return found

    def asked_for(self, name: str) -> list[Asked]:
        """The requests that sent bytes of a file, oldest first."""
        with self._lock:
            return [a for a in self.log if a.path.endswith("/" + name) and a.host == "storage"]

    def note(self, asked: Asked) -> Asked:
        with self._lock:
            self.log.append(asked)
        return asked

    def take(self, queue: list[Any]) -> Any:
        with self._lock:
            return queue.pop(0) if queue else None

    def corrupt(self, name: str, data: bytes) -> bytes:
        with self._lock:
            if self.wrong.get(name, 0) <= 0:
                return data
            self.wrong[name] -= 1
        return bytes([data[0] ^ 1]) + data[1:]

    def pace(self, sent: int, began: float) -> None:
        if self.bytes_per_s:
            self._over.wait(max(0.0, sent / self.bytes_per_s - (time.monotonic() - began)))

    def hang(self) -> None:
        while self.silent.is_set() and not self._over.is_set():
            time.sleep(0.01)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        # Little is on its way when a client is killed, so that what was sent tells what was received.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        storage = self.server.server_port != int(self.hub.endpoint.rpartition(":")[2])
        asked = self.hub.note(Asked("storage" if storage else "hub", path, int(begin[1]) if begin else 0, token))
        if self.hub.page:
            return self._send(200, b"<html>Please log in</html>", {"content-type": "text/html"})
        if answer := self.hub.take(self.hub.answers):
            return self._send(answer[0], b"", answer[1])
        if storage:
            return self._file(asked, self._find(path.split("/", 2)[2]))
        if path == "/api/whoami-v2":
            if token != TOKEN:
                return self._send(401, b"", {"x-error-message": "Invalid credentials in Authorization header"})
            return self._json({"name": "me", "auth": {"accessToken": {"displayName": "t", "role": "read"}}})
        return self._repo(path, token, asked)

    def _repo(self, path: str, token: str, asked: Asked) -> None:
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        repo = self.hub.repos.get(name)
        if token and token != TOKEN:
            return self._send(401, b"", {"x-error-message": "Invalid credentials in Authorization header"})
        if repo is None or (repo.private and not token):
            return self._send(404 if token else 401, b"", {"x-error-code": "RepoNotFound"})
        rest = path.partition(name)[2].strip("/").split("/")
        if rest[0] == "refs":
            refs = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": repo.commit(b)} for b in repo.branches]
            return self._json({"branches": refs, "converts": [], "tags": []})
        if repo.gated and not token and rest[0] in ("auth-check", "resolve"):
            return self._send(401, b"", {"x-error-code": "GatedRepo"})
        if rest[0] == "auth-check":
            return self._json({})
        files = repo.files(rest[1])
        if files is None:
            return self._send(404, b"", {"x-error-code": "RevisionNotFound"})
        if rest[0] == "revision":
            return self._info(name, repo, rest[1], files)
        data = files.get(rest[2])
        if data is None:
            return self._send(404, b"", {"x-error-code": "EntryNotFound"})
        if _large(rest[2]):
            to = self.hub.redirect or f"{self.hub.storage}/{rest[1]}/{name}/{rest[2]}?signature=secret"
            return self._send(302, b"", {"location": to})
        asked.host = "storage"  # small files come from the hub itself
        return self._file(asked, data)

    def _info(self, name: str, repo: Repo, revision: str, files: dict[str, bytes]) -> None:
        siblings: list[dict[str, Any]] = []
        for file, data in files.items():
            entry: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": git_sha1(data)}
            if _large(file):
                entry["lfs"] = {"size": len(data), "sha256": sha256(data), "pointerSize": 130}
            siblings.append(entry)
        branch = next(b for b in repo.branches if revision in (b, repo.commit(b)))
        self._json({"id": name, "modelId": name, "sha": repo.commit(branch), "siblings": siblings + repo.tricks,
                    "gated": "auto" if repo.gated else False, "private": repo.private, "tags": []})  # fmt: skip

    def _find(self, path: str) -> bytes:
        repo, _, name = path.rpartition("/")
        return next(files[name] for files in self.hub.repos[repo].branches.values() if name in files)

    def _file(self, asked: Asked, whole: bytes) -> None:
        hub, start = self.hub, asked.start if self.hub.ranges else 0
        whole = hub.corrupt(asked.path.rpartition("/")[2], whole)
        cut = hub.take(hub.cut_after)
        if start > len(whole):
            return self._send(416, b"", {})
        data = memoryview(whole)[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("content-range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        if hub.gzip:
            self.send_header("content-encoding", "gzip")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while data:
                hub.hang()
                block = data[: min(BLOCK_BYTES, len(data) if cut is None else cut - asked.sent_bytes)]
                if not block:
                    # A reset, not an orderly end.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    self.connection.close()
                    return None
                asked.sent_bytes += self.connection.send(block)
                data = memoryview(whole)[start + asked.sent_bytes :]
                hub.pace(asked.sent_bytes, began)
        return None

    def _json(self, table: dict[str, Any]) -> None:
        self._send(200, json.dumps(table).encode(), {"content-type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


def _large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf", ".bin"))
