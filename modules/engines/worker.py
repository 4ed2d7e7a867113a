"""The child process: one engine, at most one model, many answers at a time.

    python -m modules.engines.worker ENGINE [MODULE:CLASS]

Reads messages from stdin and writes messages to the pipe that was stdout, one JSON
object a line. Before an engine is imported, file descriptor 1 is pointed at stderr,
so that what a C library prints can never be taken for a message. Runs under any
Python that has the engine's library: this file, messages.py and errors.py need the
standard library alone.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, TextIO

from modules import messages
from modules.engines.base import Engine
from modules.errors import EngineMissing, GenerateError, LoadError, TurntableError

ENGINES = {
    "llamacpp": "modules.engines.llamacpp:LlamaCpp",
    "exllamav2": "modules.engines.exllamav2:ExLlamaV2Engine",
    "exllamav3": "modules.engines.exllamav3:ExLlamaV3Engine",
}


def take_stdout() -> TextIO:
    """The pipe to the parent, with file descriptor 1 pointed away from it."""
    pipe = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def open_engine(name: str, where: str) -> Engine:
    """Import an engine. Raises EngineMissing with the reason of the import's failure."""
    if not where:
        raise EngineMissing(f"There is no engine called {name!r}.")
    module, _, attribute = where.partition(":")
    try:
        engine: Engine = getattr(importlib.import_module(module), attribute)()
    except (ImportError, OSError, AttributeError) as error:
        raise EngineMissing(f"The engine {name} cannot be imported: {error}") from error
    return engine


@dataclass(eq=False)
class _Waiting:
    """A Start that the engine may not have heard of yet, or a Load: its cancel has to be remembered here."""

    message: messages.Start | messages.Load
    cancelled: bool = False


class Worker:
    """Carries messages between the pipe and the engine."""

    def __init__(self, name: str, where: str, out: TextIO) -> None:
        self._name, self._where, self._out = name, where, out
        self._writing = threading.Lock()
        self._inbox: queue.Queue[Any] = queue.Queue()
        self._waiting: dict[str, _Waiting] = {}
        self._waiting_lock = threading.Lock()
        self._engine: Engine | None = None

    def say(self, message: Any) -> None:
        """Write one message; a parent that is gone ends this process."""
        try:
            with self._writing:
                self._out.write(messages.encode(message))
        except (BrokenPipeError, ValueError):
            os._exit(0)

    def listen(self) -> None:
        """Runs on its own thread: a cancel must be heard while the engine is busy.

        The end of stdin means that the parent wants this process gone, or is gone
        itself. Leave at once, even in the middle of a load: no orphan keeps memory.
        """
        for line in sys.stdin:
            message = messages.decode(line)
            if isinstance(message, messages.Cancel):
                self._cancel(message.id)
            elif isinstance(message, messages.Start | messages.Load):
                waiting = _Waiting(message)
                with self._waiting_lock:
                    self._waiting[getattr(message, "id", "")] = waiting
                self._inbox.put(waiting)
            else:
                self._inbox.put(message)
        os._exit(0)

    def _cancel(self, request_id: str) -> None:
        with self._waiting_lock:
            waiting = self._waiting.get(request_id)
            if waiting is not None:
                waiting.cancelled = True
                return
        if request_id and self._engine is not None:
            self._engine.cancel(request_id)

    def _begun(self, request_id: str, waiting: _Waiting) -> None:
        """From now on a cancel is for the engine."""
        with self._waiting_lock:
            if self._waiting.get(request_id) is waiting:  # the id may be in use again
                del self._waiting[request_id]

    def _start(self, waiting: _Waiting, start: messages.Start) -> None:
        """Begin an answer. A cancel that came before the engine knows it ends it here, or right after its start."""
        if not waiting.cancelled:
            self._guard(start.id, lambda engine: engine.start(start, self.say))
        else:
            self.say(messages.Finished(start.id, "stopped"))
        self._begun(start.id, waiting)
        if waiting.cancelled and self._engine is not None:
            self._engine.cancel(start.id)

    def run(self) -> int:
        """Serve until stdin ends."""
        threading.Thread(target=self.listen, name="listen", daemon=True).start()
        try:
            self._engine = open_engine(self._name, self._where)
        except TurntableError as error:
            self.say(messages.Failed("", **error.to_wire()))
            return 1
        self.say(messages.Hello(self._name, self._engine.version(), os.getpid()))
        while True:
            self._handle(self._inbox.get())
            while self._engine.step():
                with contextlib.suppress(queue.Empty):
                    while True:
                        self._handle(self._inbox.get_nowait())

    def _handle(self, message: Any) -> None:
        assert self._engine is not None
        if isinstance(message, _Waiting):
            if isinstance(message.message, messages.Load):
                self._load(message, message.message)
            else:
                self._start(message, message.message)
        elif isinstance(message, messages.Count):
            self._guard(
                message.id, lambda engine: self.say(messages.Counted(message.id, engine.count_tokens(message.texts)))
            )
        elif isinstance(message, messages.Measure):
            self._guard(message.id, lambda engine: self.say(messages.Measured(message.id, engine.memory_bytes())))
        elif isinstance(message, messages.Keep):
            self._guard(
                message.id, lambda engine: self.say(messages.Kept(message.id, engine.keep_copies(message.most_bytes)))
            )
        elif isinstance(message, messages.Unload):
            self._engine.unload()
            self.say(messages.Unloaded(self._engine.memory_bytes()))

    def _load(self, waiting: _Waiting, load: messages.Load) -> None:
        assert self._engine is not None
        began, here = time.monotonic(), threading.get_ident()

        def progress(event: messages.Loading) -> None:
            if waiting.cancelled and threading.get_ident() == here:
                raise LoadError("The load was cancelled.")
            self.say(event)

        try:
            if waiting.cancelled:
                raise LoadError("The load was cancelled.")
            if load.copies_bytes >= 0:
                self._engine.keep_copies(load.copies_bytes)
            context = self._engine.load(load.spec, progress)
            spent_s = round(time.monotonic() - began, 4)
            ready = messages.Ready(context, self._engine.memory_bytes(), spent_s, self._engine.at_once())
        except Exception as error:  # the boundary: every failure leaves as data
            known = error if isinstance(error, TurntableError) else LoadError(f"The engine could not load it: {error}")
            self._begun("", waiting)
            self.say(messages.Failed("", **known.to_wire()))
            return
        self._begun("", waiting)
        self.say(ready)

    def _guard(self, request_id: str, work: Any) -> None:
        try:
            work(self._engine)
        except Exception as error:  # the boundary again
            known = error if isinstance(error, TurntableError) else GenerateError(f"The engine failed: {error!r}")
            self.say(messages.Failed(request_id, **known.to_wire()))


def main(arguments: list[str]) -> int:
    """Entry point. The terminal's Ctrl-C is the parent's business; it closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    name = arguments[0]
    where = arguments[1] if len(arguments) > 1 else ENGINES.get(name, "")
    return Worker(name, where, take_stdout()).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
