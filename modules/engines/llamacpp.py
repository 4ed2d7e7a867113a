"""llama.cpp through xllamacpp: GGUF models on the CPU, or on a card where the wheel was built for one.

The library is llama.cpp's own server in this process. It opens a listener whatever
one does, so it gets a Unix socket in a private folder (or, where there are none, a
random key). Answers run on threads of this file, one each; the library batches
them. The GIL is held while a model loads, so the file is read once before that, in
pieces, which brings it into the page cache and makes the progress a measured one.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import importlib.metadata
import json
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# libgomp spins at its barriers: on a busy machine that costs 30 to 50 times the speed. Must be set before the import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

import xllamacpp

from modules.engines.base import Emit, Progress
from modules.engines.thoughts import ThoughtSplitter
from modules.errors import ContextTooLong, GenerateError, InvalidRequest, LoadError, ModelNotDownloaded, TurntableError
from modules.messages import Counts, Delta, EngineSpec, Failed, Finished, Loading, Message, Prefill, Start, Timings

READ_BYTES = 8 << 20
BATCH_TOKENS = 256  # bounds how long a cancel in the prompt takes
CACHE_MODES = {"FP16": "F16", "Q8": "Q8_0", "Q6": "Q8_0", "Q4": "Q4_0"}
CONTROL_TOKEN = re.compile(r"<\|([^<>|\s]{1,40})\|>")


class LlamaCpp:
    """The Engine of base.py over xllamacpp."""

    def __init__(self) -> None:
        self._server: Any = None
        self._spec: EngineSpec | None = None
        self._folder = ""
        self._key = ""
        self._cancelled: dict[str, threading.Event] = {}
        self._opened: dict[bool | None, bool] = {}

    def version(self) -> str:
        return importlib.metadata.version("xllamacpp")

    def load(self, spec: EngineSpec, progress: Progress) -> int:
        files = [Path(name) for name in (spec.model, spec.projector) if name]
        for file in files:
            if not file.is_file():
                raise ModelNotDownloaded(f"The model file {file} is not there.")
        total = sum(file.stat().st_size for file in files)
        done = 0
        for file in files:
            done = _read_once(file, done, total, progress)
        progress(Loading("warming", total, total))
        self._folder = os.environ.get("TURNTABLE_ENGINE_DIR") or tempfile.mkdtemp(
            prefix="turntable-engine-"
        )  # mode 0700
        try:
            self._server = xllamacpp.Server(self._parameters(spec))
        except RuntimeError as error:
            raise LoadError(
                f"llama.cpp could not load {files[0].name}.",
                hint="The file may be cut off, of a kind that this llama.cpp does not know, or too big for the "
                "memory; the log has llama.cpp's own words.",
            ) from error
        self._spec = spec
        self._opened = {}
        return spec.context

    def _parameters(self, spec: EngineSpec) -> Any:
        p = xllamacpp.CommonParams()
        options = dict(spec.options)
        p.model.path = spec.model
        if spec.projector:
            p.mmproj.path = spec.projector
            p.mmproj_use_gpu = int(options.get("gpu_layers", "0")) != 0
        p.n_parallel = spec.parallel
        p.n_ctx = spec.context * spec.parallel
        p.n_batch = p.n_ubatch = BATCH_TOKENS
        threads = spec.threads or _default_threads()
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
        kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{CACHE_MODES[spec.cache_mode]}")
        p.cache_type_k = p.cache_type_v = kind
        p.n_gpu_layers = int(options.get("gpu_layers", "0"))
        p.fit_params = False
        p.cache_ram_mib = int(options.get("cache_ram_mib", "256"))
        p.verbosity = 2
        p.warmup = False  # the loader's one-token smoke test is the warm-up
        p.ui = p.endpoint_slots = False
        if "image_tokens" in options:
            p.image_min_tokens = p.image_max_tokens = int(options["image_tokens"])
        if hasattr(socket, "AF_UNIX"):
            p.hostnames = [str(Path(self._folder) / "engine.sock")]
        else:
            self._key = secrets.token_urlsafe(24)
            p.api_keys = [self._key]
        return p

    def at_once(self) -> int:
        return self._spec.parallel if self._spec else 1

    def count_tokens(self, texts: tuple[str, ...]) -> tuple[int, ...]:
        counts = []
        for text in texts:
            reply = self._post("/tokenize", {"content": text, "parse_special": False})
            counts.append(len(reply["tokens"]))
        return tuple(counts)

    def start(self, request: Start, emit: Emit) -> None:
        if self._server is None:
            raise GenerateError("No model is loaded.")
        cancelled = self._cancelled[request.id] = threading.Event()
        threading.Thread(
            target=self._answer, args=(request, emit, cancelled), name=f"answer-{request.id}", daemon=True
        ).start()

    def cancel(self, request_id: str) -> None:
        event = self._cancelled.get(request_id)
        if event is not None:
            event.set()

    def step(self) -> bool:
        return False

    def memory_bytes(self) -> int:
        return _resident_bytes()

    def keep_copies(self, most_bytes: int) -> int:
        return 0

    def unload(self) -> None:
        for event in list(self._cancelled.values()):
            event.set()
        self._server = None

    def _answer(self, request: Start, emit: Emit, cancelled: threading.Event) -> None:
        last: Finished | Failed
        try:
            opened = self._thought_is_opened(request.thinking)
            last = _Answer(request, emit, cancelled, opened).run(self._server)
        except Exception as error:  # this thread's boundary: every failure leaves as data
            known = error if isinstance(error, TurntableError) else GenerateError(f"llama.cpp failed: {error}")
            last = Failed(request.id, **known.to_wire())
        # Forgotten before the last message leaves: whoever reads that may use the name again at once.
        self._cancelled.pop(request.id, None)
        emit(last)

    def _thought_is_opened(self, thinking: bool | None) -> bool:
        """Does the model's template itself end the prompt with `<think>`? Asked once for each switch position."""
        if thinking not in self._opened:
            body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
            if thinking is not None:
                body["chat_template_kwargs"] = {"enable_thinking": thinking}
            prompt = str(self._post("/apply-template", body).get("prompt", ""))
            self._opened[thinking] = prompt.rstrip().endswith("<think>")
        return self._opened[thinking]

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask the server inside this process over its private listener."""
        connection = _connect(self._server.listening_address, self._folder)
        try:
            headers = {"Content-Type": "application/json"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            data: dict[str, Any] = json.loads(response.read())
            if response.status != 200:
                raise GenerateError(f"llama.cpp answered {response.status} to {path}.")
            return data
        finally:
            connection.close()


class _Answer:
    """One answer from its first prompt token to its Finished."""

    def __init__(self, request: Start, emit: Emit, cancelled: threading.Event, opened: bool) -> None:
        self._request, self._emit, self._cancelled = request, emit, cancelled
        self._splitter = ThoughtSplitter(opened)
        self._began = time.monotonic()
        self._first_token_s = 0.0
        self._reason = "stop"
        self._tokens = {"text": 0, "reasoning": 0}
        self._timings: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._error: dict[str, Any] | None = None

    def run(self, server: Any) -> Finished | Failed:
        """Blocks until the answer ended; the GIL is free meanwhile."""
        try:
            reply = server.handle_chat_completions(self._body(), self._on_chunk)
        except (RuntimeError, ValueError) as error:
            if not self._cancelled.is_set():
                raise _translate(str(error)) from error
            reply = None
        if isinstance(reply, dict) and "error" in reply:
            self._error = reply["error"]
        if self._error is not None and not self._cancelled.is_set():
            raise _translate(str(self._error.get("message", self._error)), self._error)
        self._say(self._splitter.finish(), 0)
        return self._finished()

    def _body(self) -> dict[str, Any]:
        s = self._request.sampling
        body: dict[str, Any] = {
            "messages": [_to_openai(m) for m in self._request.messages],
            "stream": True, "stream_options": {"include_usage": True},
            "timings_per_token": True, "return_progress": True,
            "temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k, "min_p": s.min_p,
            "repeat_penalty": s.repetition_penalty, "presence_penalty": s.presence_penalty,
            "frequency_penalty": s.frequency_penalty, "max_tokens": s.max_tokens, "reasoning_format": "none",
        }  # fmt: skip
        if s.seed is not None:
            body["seed"] = s.seed
        if self._request.full_length:
            body["ignore_eos"] = True
        if s.stop:
            body["stop"] = list(s.stop)
        constraint = self._request.constraint
        if constraint is not None and constraint.kind != "json_schema":
            raise InvalidRequest("llama.cpp holds an answer to a json_schema, not to a regex.")
        if constraint is not None:
            schema = {"name": "answer", "schema": json.loads(constraint.text)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self._request.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self._request.thinking}
        return body

    def _on_chunk(self, chunk: dict[str, Any]) -> bool:
        """True ends the answer. The library swallows what is raised here, so failures are kept and raised later."""
        try:
            self._take(chunk)
        except Exception as error:
            self._error = {"message": repr(error)}
            return True
        return self._cancelled.is_set()

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self._error = chunk["error"]
            return
        self._usage = chunk.get("usage") or self._usage
        self._timings = chunk.get("timings") or self._timings
        progress = chunk.get("prompt_progress")
        if progress:
            self._emit(Prefill(self._request.id, progress.get("processed", 0), progress.get("total", 0)))
        for choice in chunk.get("choices", ()):
            text = choice.get("delta", {}).get("content")
            if text:
                self._first_token_s = self._first_token_s or time.monotonic() - self._began
                self._say(self._splitter.feed(text), 1)
            self._reason = choice.get("finish_reason") or self._reason

    def _say(self, pieces: list[tuple[str, str]], tokens: int) -> None:
        for channel, text in pieces:
            self._tokens[channel] += tokens
            self._emit(Delta(self._request.id, text, channel, tokens))
            tokens = 0

    def _finished(self) -> Finished:
        t = self._timings
        completion = int(self._usage.get("completion_tokens") or t.get("predicted_n") or sum(self._tokens.values()))
        cached = int(t.get("cache_n", 0))
        counts = Counts(
            prompt=int(self._usage.get("prompt_tokens") or t.get("prompt_n", 0) + cached),
            cached=cached, completion=completion, reasoning=self._tokens["reasoning"],
        )  # fmt: skip
        timings = Timings(
            prompt_s=t.get("prompt_ms", 0.0) / 1000, generate_s=t.get("predicted_ms", 0.0) / 1000,
            first_token_s=self._first_token_s, tokens_per_second=t.get("predicted_per_second", 0.0),
        )  # fmt: skip
        reason = "stopped" if self._cancelled.is_set() else self._reason
        return Finished(
            self._request.id, reason if reason in ("stop", "length", "stopped") else "stop", counts, timings
        )


def _to_openai(message: Message) -> dict[str, Any]:
    # The library parses control tokens in people's text as the real ones: a typed <|im_end|> would end their own turn.
    text = CONTROL_TOKEN.sub(r"<| \1 |>", message.text) if message.role != "assistant" else message.text
    if not message.images:
        return {"role": message.role, "content": text}
    parts: list[dict[str, Any]] = []
    for path in message.images:
        data = base64.b64encode(Path(path).read_bytes()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return {"role": message.role, "content": [*parts, {"type": "text", "text": text}]}


def _translate(message: str, detail: dict[str, Any] | None = None) -> TurntableError:
    """llama.cpp's words to our errors."""
    if (detail or {}).get("type") == "exceed_context_size_error" or "exceeds the available context" in message:
        needs, has = (detail or {}).get("n_prompt_tokens", "more"), (detail or {}).get("n_ctx", "the context")
        return ContextTooLong(f"The prompt takes {needs} tokens, and the context holds {has}.")
    if "image input is not supported" in message:
        return InvalidRequest("This model cannot look at pictures.", hint="Choose a variant with vision.")
    return GenerateError(f"llama.cpp failed: {message}")


def _read_once(file: Path, done: int, total: int, progress: Progress) -> int:
    """Read a file through and report bytes; returns the new sum. Repeated reports are at least 20 ms apart."""
    buffer, last = bytearray(READ_BYTES), 0.0
    with file.open("rb", buffering=0) as source:
        while size := source.readinto(buffer):
            done += size
            now = time.monotonic()
            if now - last > 0.02:
                progress(Loading("reading", done, total))
                last = now
    return done


def _default_threads() -> int:
    """All but one of the physical cores, guessed as half of the logical ones on big machines."""
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return max(1, logical // 2 if logical > 8 else logical - 1)


def _resident_bytes() -> int:
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(30)
        self.sock.connect(self._path)


def _connect(address: str, folder: str) -> http.client.HTTPConnection:
    if hasattr(socket, "AF_UNIX"):
        return _UnixConnection(str(Path(folder) / "engine.sock"))
    return http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
