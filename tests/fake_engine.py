"""An engine without a model, timing-true, with faults on order. It enters by the front door: `--engine fake=...`.

The "model file" is a small JSON file that says how to behave:
{"load_s": 0, "count_s": 0, "bytes": 1000, "burst": 0, "tokens_per_second": 1000, "prompt_tokens_per_second": 100000,
 "at_once": 1000, "text": "...", "after": 3,
 "fault": one of load_error, load_crash, load_hang, crash_after, hang_after, garbage, error_after}
Of each model it keeps a "copy" as large as the model, the latest ones within the limit.
Of more than at_once answers the others wait, and nothing is heard of them.
A user message "say N" answers with N tokens; "echo" repeats the message; otherwise `text` is the answer.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path

from modules.engines.base import Emit, Progress
from modules.engines.thoughts import ThoughtSplitter
from modules.errors import ContextTooLong, GenerateError, LoadError
from modules.messages import Counts, Delta, EngineSpec, Finished, Loading, Prefill, Start, Timings

WORD = re.compile(r"\s*\S+\s?|\s+")


class FakeEngine:
    """Speaks words on a clock; one word is one token."""

    def __init__(self) -> None:
        self.plan: dict = {}
        self.context = 4096
        self.cancelled: dict[str, threading.Event] = {}
        self.places = threading.Semaphore()
        self.copies: dict[str, int] = {}
        self.most_bytes = 0

    def version(self) -> str:
        return "1.0"

    def load(self, spec: EngineSpec, progress: Progress) -> int:
        self.plan = json.loads(Path(spec.model).read_text())
        self.context = spec.context
        self.places = threading.Semaphore(self.at_once())
        fault, total = self.plan.get("fault"), int(self.plan.get("bytes", 1000))
        if fault == "load_error":
            raise LoadError("The weights are broken.")
        if fault == "load_crash":
            print("fake: going down while loading", file=__import__("sys").stderr, flush=True)
            os._exit(7)
        steps = 10 if self.plan.get("load_s") else 1
        for step in range(steps):
            time.sleep(float(self.plan.get("load_s", 0)) / steps)
            progress(Loading("reading", total * (step + 1) // steps, total))
        if fault == "load_hang":
            time.sleep(3600)
        self.copies = {**{k: v for k, v in self.copies.items() if k != spec.model}, spec.model: total}
        self.keep_copies(self.most_bytes)
        return spec.context

    def at_once(self) -> int:
        return int(self.plan.get("at_once", 1000))

    def count_tokens(self, texts: tuple[str, ...]) -> tuple[int, ...]:
        time.sleep(float(self.plan.get("count_s", 0)))
        return tuple(len(WORD.findall(text)) for text in texts)

    def start(self, request: Start, emit: Emit) -> None:
        self.cancelled[request.id] = threading.Event()
        threading.Thread(target=self._wait, args=(request, emit), daemon=True).start()

    def _words(self, request: Start) -> list[str]:
        asked = request.messages[-1].text
        if match := re.search(r"say (\d+)", asked):
            return [f"w{i} " for i in range(int(match[1]))]
        if asked.startswith("echo"):
            return WORD.findall(asked)
        if request.full_length:
            return [f"w{i} " for i in range(request.sampling.max_tokens + 1)]
        return WORD.findall(self.plan.get("text", "Hello from the fake engine."))

    def _wait(self, request: Start, emit: Emit) -> None:
        stop, places = self.cancelled[request.id], self.places
        while not places.acquire(timeout=0.02):
            if stop.is_set():
                emit(Finished(request.id, "stopped"))
                return
        try:
            self._answer(request, emit)
        finally:
            places.release()

    def _answer(self, request: Start, emit: Emit) -> None:
        stop = self.cancelled[request.id]
        began = time.monotonic()
        prompt = sum(self.count_tokens(tuple(m.text for m in request.messages)))
        if prompt > self.context:
            emit(_failed(request.id, ContextTooLong(f"The prompt takes {prompt} tokens, the context {self.context}.")))
            return
        rate = float(self.plan.get("prompt_tokens_per_second", 100_000))
        for done in range(0, prompt, 64):
            if stop.wait(min(64, prompt - done) / rate):
                emit(Finished(request.id, "stopped", Counts(prompt=prompt)))
                return
            emit(Prefill(request.id, min(prompt, done + 64), prompt))
        self._speak(request, emit, stop, began, prompt)

    def _speak(self, request: Start, emit: Emit, stop: threading.Event, began: float, prompt: int) -> None:
        words = self._words(request)
        limited = words[: request.sampling.max_tokens]
        pace, first, said = 1 / float(self.plan.get("tokens_per_second", 1000)), 0.0, 0
        splitter, start = ThoughtSplitter(), time.monotonic()
        burst = int(self.plan.get("burst", 0))  # so many words come at once
        for word in limited:
            if stop.wait(max(0.0, start + (said + 1 - burst) * pace - time.monotonic())):
                break
            self._fault(request, emit, said)
            first = first or time.monotonic() - began
            said += 1
            for channel, text in splitter.feed(word):
                emit(Delta(request.id, text, channel, 1))
        for channel, text in splitter.finish():
            emit(Delta(request.id, text, channel, 0))
        reason = "stopped" if stop.is_set() else "length" if len(limited) < len(words) else "stop"
        spent = max(1e-9, time.monotonic() - start)
        self.cancelled.pop(request.id, None)  # first: whoever hears the end may use the name again at once
        emit(
            Finished(request.id, reason, Counts(prompt, 0, said, 0), Timings(start - began, spent, first, said / spent))
        )

    def _fault(self, request: Start, emit: Emit, said: int) -> None:
        fault = self.plan.get("fault")
        if fault is None or said != int(self.plan.get("after", 3)):
            return
        if fault == "crash_after":
            os._exit(9)
        if fault == "hang_after":
            time.sleep(3600)
        if fault == "error_after":
            emit(_failed(request.id, GenerateError("The fake engine failed on order.")))
            raise SystemExit
        if fault == "garbage":
            os.write(1, b"this is no message\n")
            print("neither is this", flush=True)

    def cancel(self, request_id: str) -> None:
        if request_id in self.cancelled:
            self.cancelled[request_id].set()

    def step(self) -> bool:
        return False

    def memory_bytes(self) -> int:
        return int(self.plan.get("bytes", 0))

    def keep_copies(self, most_bytes: int) -> int:
        self.most_bytes = most_bytes
        while sum(self.copies.values()) > most_bytes:
            self.copies.pop(next(iter(self.copies)))
        return sum(self.copies.values())

    def unload(self) -> None:
        self.plan = {}


def _failed(request_id: str, error):
    from modules.messages import Failed

    return Failed(request_id, **error.to_wire())
