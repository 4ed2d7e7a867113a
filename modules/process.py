"""The handle on one engine child: start, load, ask, cancel, stop, time limits, exit code, last log lines.

Knows pipes and processes. Does not know presets, conversations, or which model
ought to be in memory: that is the loader's business. Many answers share the pipe;
a reader thread sorts what arrives by request id.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules import messages
from modules.errors import EngineCrashed, EngineStuck, LoadTimedOut, TurntableError, from_wire
from modules.messages import EngineSpec, Message, Sampling, Start

ROOT = Path(__file__).resolve().parent.parent
STOP_GRACE_S = 3.0
LOG_LINES = 200
_END = object()
_LOOK = object()


@dataclass(frozen=True)
class EngineKind:
    """How the children of one engine are started.

    python is the interpreter that has the engine's library; where names the class as
    "module:Class" (empty: the worker's own table); keeps_process says that the child
    unloads in place and takes the next model, as engines on a GPU do; memory is the
    kind of memory that its models take, "ram" or "vram"; copies_bytes is how much RAM
    its children together may page-lock for copies of models.
    """

    name: str
    python: str = sys.executable
    where: str = ""
    keeps_process: bool = False
    memory: str = "ram"
    copies_bytes: int = 0
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Limits:
    """Time limits of a child in seconds.

    stall_s is the longest silence of a child that owes an answer, cancel_s what it may take to give up a load.
    """

    load_s: float = 600.0
    stall_s: float = 120.0
    hello_s: float = 60.0
    cancel_s: float = 5.0


@dataclass
class _Mailbox:
    events: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)


class EngineProcess:
    """One child process. Thread-safe."""

    def __init__(
        self, kind: EngineKind, limits: Limits | None = None, on_exit: Callable[[EngineProcess], None] | None = None
    ) -> None:
        self.kind = kind
        self.spec: EngineSpec | None = None
        self.ready: messages.Ready | None = None
        self.copies_limit = -1  # in bytes, as it was told last
        self.known: set[str] = set()  # models that it has loaded, whose tokenizers and copies it may hold
        self.up_s = 0.0  # the last load as a person waits for it, to a first token; the start of a new child included
        self.version = ""
        self.log: collections.deque[str] = collections.deque(maxlen=LOG_LINES)
        self._limits = limits or Limits()
        self._on_exit = on_exit
        self._writing = threading.Lock()
        self._boxes: dict[str, _Mailbox] = {"": _Mailbox()}
        self._boxes_lock = threading.Lock()
        self._heard_s = 0.0  # when the child last said anything, to anybody
        self._ended = False
        self._stopping = False
        self._ids = itertools.count(1)
        self._folder = tempfile.mkdtemp(prefix="turntable-engine-")  # private, for the engine's socket; ours to delete
        self._child = self._spawn()
        self._threads = [
            threading.Thread(target=self._keep_log, name=f"log-{kind.name}", daemon=True),
            threading.Thread(target=self._read, name=f"read-{kind.name}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _spawn(self) -> subprocess.Popen[str]:
        environment = {
            **os.environ, **dict(self.kind.environment),
            "PYTHONUNBUFFERED": "1", "MALLOC_ARENA_MAX": "1", "TURNTABLE_ENGINE_DIR": self._folder,
        }  # fmt: skip
        command = [self.kind.python, "-m", "modules.engines.worker", self.kind.name]
        if self.kind.where:
            command.append(self.kind.where)
        try:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, encoding="utf-8", errors="replace",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=1,
            )  # fmt: skip
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise EngineCrashed(f"The engine {self.kind.name} could not be started: {error}") from error

    @property
    def alive(self) -> bool:
        return not self._ended and self._child.poll() is None

    @property
    def pid(self) -> int:
        return self._child.pid

    def load(
        self, spec: EngineSpec, progress: Callable[[messages.Loading], None],
        cancelled: threading.Event | None = None, copies_bytes: int = -1,
    ) -> messages.Ready:  # fmt: skip
        """Wait until the model is up. Raises the child's LoadError, EngineCrashed or LoadTimedOut.

        Setting `cancelled` and calling look() gives the load up: in the child, which keeps
        what it holds for the next model and reports a LoadError. It is ended when that takes
        longer than cancel_s, and at once where its kind does not keep the process. A load
        that is complete by then returns as ever. copies_bytes limits the page-locked copies
        of models from now on; -1 leaves the limit as it is.
        """
        self.spec, self.copies_limit = spec, copies_bytes
        self._send(messages.Load(spec, copies_bytes))
        deadline, given_up = time.monotonic() + self._limits.load_s, False
        while True:
            if cancelled is not None and cancelled.is_set() and not given_up:
                given_up = True
                deadline = min(deadline, self._give_up())
            event = self._next("", deadline, LoadTimedOut, "The model was not ready in time.")
            if isinstance(event, messages.Hello):
                self.version = event.version
            elif isinstance(event, messages.Loading):
                progress(event)
            elif isinstance(event, messages.Ready):
                self.ready = event
                self.known.add(spec.model)
                return event

    def look(self) -> None:
        """Let a load under way look at its `cancelled`. Thread-safe and harmless at any other time."""
        with self._boxes_lock:
            self._boxes[""].events.put(_LOOK)

    def _give_up(self) -> float:
        """Cancel the load under way; returns when the child must have complied."""
        if self.kind.keeps_process:
            self.cancel("")
        else:
            self.abort()  # it has nothing to keep, and llama.cpp cannot hear while it loads
        return time.monotonic() + self._limits.cancel_s

    def generate(self, start: Start) -> Iterator[messages.Event]:
        """Yield the events of one answer, the last of them Finished.

        Raises what the child reported, EngineCrashed when it died and EngineStuck when
        it was silent for too long (then it is ended): towards everybody, because an answer
        may wait for another one. A caller that walks away cancels.
        """
        finished = False
        self._open_box(start.id)
        try:
            self._send(start)
            while True:
                event = self._hear(
                    start.id, f"The engine gave no sign of life for {self._limits.stall_s:g} s and was ended."
                )
                finished = isinstance(event, messages.Finished)
                yield event
                if finished:
                    return
        except TurntableError:
            finished = True
            raise
        finally:
            if not finished:
                self.cancel(start.id)
            self._close_box(start.id)

    def count_tokens(self, texts: tuple[str, ...]) -> tuple[int, ...]:
        """Tokens of each text."""
        counted = self._ask(lambda call: messages.Count(call, texts))
        tokens: tuple[int, ...] = counted.tokens
        return tokens

    def measure(self) -> int:
        """Bytes in use by the model."""
        return int(self._ask(messages.Measure).memory_bytes)

    def keep_copies(self, most_bytes: int) -> int:
        """Limit the page-locked copies of models; returns the bytes that it holds."""
        self.copies_limit = most_bytes
        return int(self._ask(lambda call: messages.Keep(call, most_bytes)).kept_bytes)

    def ping(self) -> None:
        """Generate one token: the only proof that a model answers. Raises what went wrong."""
        start = Start(f"ping-{next(self._ids)}", (Message("user", "Hi"),), Sampling(temperature=0.0, max_tokens=1))
        for _ in self.generate(start):
            pass

    def unload(self) -> int:
        """Unload in place; returns the bytes still in use. Only for kinds that keep their process."""
        self._send(messages.Unload())
        deadline = time.monotonic() + 60
        while True:
            event = self._next("", deadline, EngineStuck, "The engine did not unload in time.")
            if isinstance(event, messages.Unloaded):
                self.spec = None
                return event.memory_bytes

    def cancel(self, request_id: str) -> None:
        """Stop an answer; harmless when it has ended or the child is gone."""
        with contextlib.suppress(EngineCrashed):
            self._send(messages.Cancel(request_id))

    def abort(self) -> None:
        """End the child at once, from any thread. Whoever waits for it gets EngineCrashed."""
        with contextlib.suppress(OSError):
            self._child.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)

    def stop(self) -> None:
        """End the child and wait until it is gone: only then is its memory back."""
        self._stopping = True
        with contextlib.suppress(OSError, ValueError), self._writing:
            assert self._child.stdin is not None
            self._child.stdin.close()
        try:
            self._child.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        for pipe in (self._child.stdout, self._child.stderr):
            if pipe is not None:
                pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # a private folder left behind harms nobody

    def _ask(self, make: Callable[[str], Any]) -> Any:
        call = f"call-{next(self._ids)}"
        self._open_box(call)
        try:
            self._send(make(call))
            return self._hear(call, "The engine did not reply.")
        finally:
            self._close_box(call)

    def _open_box(self, name: str) -> None:
        with self._boxes_lock:
            self._boxes[name] = _Mailbox()
            if self._ended:
                self._boxes[name].events.put(_END)

    def _close_box(self, name: str) -> None:
        with self._boxes_lock:
            self._boxes.pop(name, None)

    def _hear(self, box: str, words: str) -> Any:
        """The next event of an answer or a call. Silence is that of the child: whatever it says shows that it lives."""
        stall_s = self._limits.stall_s
        return self._next(box, time.monotonic() + stall_s, EngineStuck, words, stall_s)

    def _next(
        self, box: str, deadline: float, late: type[TurntableError], words: str, silence_s: float = 0.0
    ) -> Any:
        """The next event of a mailbox. Past the deadline and silence_s after its last word the child is ended."""
        with self._boxes_lock:
            mailbox = self._boxes[box]
        while True:
            left_s = max(deadline, self._heard_s + silence_s) - time.monotonic()
            try:
                event = mailbox.events.get(timeout=max(0.0, left_s))
                break
            except queue.Empty:
                if left_s <= 0:
                    self.abort()
                    raise late(words) from None
        if event is _END:
            mailbox.events.put(_END)  # for whoever asks next
            raise self._crash()
        if isinstance(event, messages.Failed):
            raise from_wire({"code": event.code, "message": event.message, "hint": event.hint})
        return event

    def _send(self, message: Any) -> None:
        try:
            with self._writing:
                assert self._child.stdin is not None
                self._child.stdin.write(messages.encode(message))
                self._child.stdin.flush()
        except (OSError, ValueError) as error:
            raise self._crash() from error

    def _crash(self) -> EngineCrashed:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(1.0)
        self._threads[0].join(0.5)  # its last words may still be on their way
        said = [line for line in self.log if line.strip()]
        code = self._child.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        last = f" Its last words: {said[-1].strip()}" if said else ""
        return EngineCrashed(f"The engine {self.kind.name} ended by itself ({how}).{last}")

    def _read(self) -> None:
        """Runs on its own thread until the pipe closes."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            try:
                event = messages.decode(line)
            except ValueError as error:
                self.log.append(f"dropped a line: {error}")
                continue
            self._heard_s = time.monotonic()
            with self._boxes_lock:
                box = self._boxes.get(getattr(event, "id", ""))
            if box is not None:
                box.events.put(event)
        with self._boxes_lock:
            self._ended = True
            for box in self._boxes.values():
                box.events.put(_END)
        self._child.wait()
        if self._on_exit is not None and not self._stopping:
            self._on_exit(self)

    def _keep_log(self) -> None:
        assert self._child.stderr is not None
        for line in self._child.stderr:
            self.log.append(line.rstrip("\n"))
