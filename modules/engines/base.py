"""What an engine is. It knows no preset, no conversation, no page, no process.

An engine has either threads of its own (llama.cpp: `start` returns at once and
`step` always says False) or is driven by the worker's thread (ExLlamaV2 and V3:
`start` enqueues a job and `step` runs one iteration for all of them). In both
cases events leave through `emit`, which may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from modules.messages import EngineSpec, Loading, Start

Emit = Callable[[Any], None]
Progress = Callable[[Loading], None]


class Engine(Protocol):
    """One engine library, with at most one model loaded."""

    def version(self) -> str:
        """Version of the library, for the status line and reports."""

    def load(self, spec: EngineSpec, progress: Progress) -> int:
        """Bring the model into memory and return its context in tokens for one request.

        Raises LoadError or ModelFilesError with a message for a person. Called on the
        worker's main thread, never while another model is loaded. When the load is
        cancelled, `progress` raises on that thread; an engine lets that through and
        holds no memory afterwards. On other threads it never raises.
        """

    def at_once(self) -> int:
        """How many answers run side by side with the model that is loaded."""

    def count_tokens(self, texts: tuple[str, ...]) -> tuple[int, ...]:
        """Tokens of each text, without the words of the chat template."""

    def start(self, request: Start, emit: Emit) -> None:
        """Begin an answer: Prefill and Delta events, then one Finished or Failed, all with request.id."""

    def cancel(self, request_id: str) -> None:
        """Stop an answer, in the prompt or in the text. Thread-safe; an unknown id is ignored."""

    def step(self) -> bool:
        """Advance all running answers by one step; False when nothing has to be driven from here."""

    def memory_bytes(self) -> int:
        """Memory in use by the model: resident memory of the process, or memory of the card."""

    def keep_copies(self, most_bytes: int) -> int:
        """Hold at most so many bytes of page-locked copies of models; returns what is held.

        Asked only of engines that keep copies (EngineKind.copies_bytes).
        """

    def unload(self) -> None:
        """Give the memory back. Called only when no answer is running."""
