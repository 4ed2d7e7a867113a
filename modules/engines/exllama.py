"""What the adapters of ExLlamaV2 and ExLlamaV3 share: answers in progress, events, prompts, pictures, memory.

Both libraries have a generator that is driven from one thread: jobs go in, and each
iteration gives back a list of dictionaries. This file owns the translation of those
into events, and knows neither library: an adapter says how to open a model, make a
job and measure the card.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.engines.base import Emit, Progress
from modules.engines.checkpoint import Checkpoint, Rules, prepare, read_checkpoint
from modules.engines.templates import ChatTemplate, Rendered
from modules.engines.thoughts import ThoughtSplitter
from modules.errors import (
    ContextTooLong,
    DoesNotFit,
    GenerateError,
    InvalidRequest,
    LoadError,
    TurntableError,
)
from modules.messages import Constraint, Counts, Delta, EngineSpec, Failed, Finished, Prefill, Start, Timings

PAGE_TOKENS = 256  # both libraries' caches come in pages of this many tokens
DEFAULT_CHUNK_TOKENS = 2048
DEFAULT_MAX_PIXELS = 1280 * 28 * 28  # about 1,280 tokens of a picture
# Qwen's picture processors refuse sides below 28 pixels (32 for Qwen3-VL), and one side 200 times the other.
MIN_SIDE_PX, MAX_RATIO = 32, 190.0
MAX_EMBEDDINGS = 64
MAX_EMBEDDING_BYTES = 512 << 20
MAX_SCHEMA_BYTES = 256 << 10
MAX_FOLDERS = 16  # whose checkpoints are kept read
MAX_TOKENIZERS = 4  # that are kept for a swap back; a large vocabulary takes a second


@dataclass
class Answer:
    """One answer in progress. ids is the prompt with pictures as the library counts them."""

    request: Start
    emit: Emit
    splitter: ThoughtSplitter
    prompt_tokens: int
    job: Any = None
    tokens: dict[str, int] = field(default_factory=lambda: {"text": 0, "reasoning": 0})
    began_s: float = field(default_factory=time.monotonic)
    first_token_s: float = 0.0
    cached: int = 0
    prompt_done_s: float = 0.0


@dataclass(frozen=True)
class Options:
    """The options of an EngineSpec that both adapters know, with their defaults. Sizes in tokens."""

    chunk: int = DEFAULT_CHUNK_TOKENS
    cache: int = 0
    draft_model: str = ""
    draft: str = ""
    draft_tokens: int = 4
    gpu_split: str = ""
    tensor_parallel: bool = False
    loras: tuple[tuple[str, float], ...] = ()
    max_pixels: int = DEFAULT_MAX_PIXELS
    force_thought: bool = False

    @staticmethod
    def of(spec: EngineSpec) -> Options:
        """Raises LoadError for an option that makes no sense, with its name."""
        given = dict(spec.options)
        known = {
            "chunk_size", "cache_size", "draft_model", "draft", "draft_tokens", "gpu_split", "tensor_parallel", "loras",
            "max_pixels", "force_thought",
        }  # fmt: skip
        for name in given:
            if name not in known:
                raise LoadError(f"{spec.engine} has no option {name!r}.", hint=f"It knows {', '.join(sorted(known))}.")
        try:
            chunk = int(given.get("chunk_size", DEFAULT_CHUNK_TOKENS))
            loras = tuple((path, float(scale)) for path, scale in json.loads(given.get("loras", "[]")))
            options = Options(
                chunk=chunk, cache=int(given.get("cache_size", 0)), draft_model=given.get("draft_model", ""),
                draft=given.get("draft", ""), draft_tokens=int(given.get("draft_tokens", 4)),
                gpu_split=given.get("gpu_split", ""), tensor_parallel=given.get("tensor_parallel", "0") == "1",
                loras=loras, max_pixels=int(given.get("max_pixels", DEFAULT_MAX_PIXELS)),
                force_thought=given.get("force_thought", "0") == "1",
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise LoadError(f"An option of the preset makes no sense: {error}") from None
        if chunk % PAGE_TOKENS or not PAGE_TOKENS <= chunk <= 16384:
            raise LoadError(f"chunk_size is {chunk}; it must be a multiple of {PAGE_TOKENS} up to 16384.")
        if options.draft not in ("", "ngram"):
            raise LoadError(f"draft is {options.draft!r}; it can only be ngram.")
        if not 1 <= options.draft_tokens <= 8:
            raise LoadError(f"draft_tokens is {options.draft_tokens}; it must be from 1 to 8.")
        return options

    def split_gb(self) -> list[float] | None:
        """The chosen gigabytes for each card, or None."""
        if not self.gpu_split or self.gpu_split == "auto":
            return None
        try:
            split = [float(part) for part in self.gpu_split.split(",")]
        except ValueError:
            raise LoadError(f"gpu_split is {self.gpu_split!r}; it must be auto or gigabytes such as 20,24.") from None
        if not split or any(part < 0 for part in split):
            raise LoadError(f"gpu_split is {self.gpu_split!r}; it must be auto or gigabytes such as 20,24.")
        return split


def pages_up(tokens: int) -> int:
    """The next whole number of pages, in tokens."""
    return -(-tokens // PAGE_TOKENS) * PAGE_TOKENS


class ExLlamaEngine:
    """The Engine of base.py, driven by step(). Subclasses fill in the library."""

    rules: Rules

    def __init__(self) -> None:
        self._answers: dict[str, Answer] = {}
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()
        self._spec: EngineSpec | None = None
        self._checkpoint: Checkpoint | None = None
        self._template: ChatTemplate | None = None
        self._options = Options()
        self._context = 0
        self._embeddings: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._draft_folder: Path | None = None
        self._views = 0
        self._folders: OrderedDict[tuple[Any, ...], tuple[Checkpoint, ChatTemplate, Path]] = OrderedDict()
        self._tokenizers: OrderedDict[int, tuple[Checkpoint, Any]] = OrderedDict()

    # What a library's adapter provides -------------------------------------------------

    def version(self) -> str:
        """Version of the library."""
        raise NotImplementedError

    def _open(self, folder: Path, progress: Progress) -> None:
        """Load the model of self._checkpoint from `folder`; on failure _close cleans up."""
        raise NotImplementedError

    def _close(self) -> None:
        """Let go of every reference to the model; must work after a load that failed half way."""
        raise NotImplementedError

    def _encode(self, text: str, pictures: list[Any]) -> Any:
        """Token ids of shape (1, n), control tokens included; pictures are what _embed gave."""
        raise NotImplementedError

    def _count(self, text: str) -> int:
        """Tokens of plain text."""
        raise NotImplementedError

    def _embed(self, path: str) -> tuple[Any, int]:
        """A picture as the library's embedding, and its size in bytes."""
        raise NotImplementedError

    def _make_job(self, answer: Answer, ids: Any, pictures: list[Any], max_new_tokens: int) -> Any:
        """A job whose identifier is the request's id, and which stops at self._checkpoint.stop_ids."""
        raise NotImplementedError

    def _enqueue(self, job: Any) -> None:
        raise NotImplementedError

    def _iterate(self) -> Iterable[dict[str, Any]]:
        raise NotImplementedError

    def _cancel_job(self, job: Any) -> None:
        raise NotImplementedError

    def _reset(self) -> None:
        """After an iteration failed: make the generator usable again, with an empty cache."""
        raise NotImplementedError

    def _is_out_of_memory(self, error: BaseException) -> bool:
        raise NotImplementedError

    def _device_bytes(self) -> int:
        """Bytes of the cards that this process has allocated and uses."""
        raise NotImplementedError

    def _free(self) -> None:
        """Give unused memory of the cards back to the driver."""
        raise NotImplementedError

    def _extra_tokens(self) -> int:
        """Tokens that the library keeps free beyond an answer, for speculation."""
        return 0

    # Engine ------------------------------------------------------------------------------

    def load(self, spec: EngineSpec, progress: Progress) -> int:
        self._options = Options.of(spec)
        checkpoint, self._template, folder = self._read(Path(spec.model))
        if checkpoint.max_position_embeddings and spec.context > checkpoint.max_position_embeddings:
            raise LoadError(
                f"The context size is {spec.context}, and the model was made for {checkpoint.max_position_embeddings}.",
                hint="Make the preset's context smaller.",
            )
        self._draft_folder = self._read_draft(Path(self._options.draft_model).expanduser(), checkpoint)
        self._spec, self._checkpoint, self._context = spec, checkpoint, pages_up(spec.context)
        try:
            self._open(folder, progress)
        except Exception as error:
            known = self._explain_load(error, checkpoint)
            # The traceback holds the frames of the load, and they hold tensors on the card.
            error.__traceback__ = None
            del error
            self.unload()
            raise known from None
        return spec.context

    def _read_draft(self, folder: Path, main: Checkpoint) -> Path | None:
        """The folder of the draft model for the library, judged as the model's own is; None without one."""
        if not self._options.draft_model:
            return None
        draft, _, place = self._read(folder, answers=False)
        if main.vocabulary and draft.vocabulary > main.vocabulary:
            # Its guesses are looked up in the model's embedding, where there is no check on the card.
            raise LoadError(
                f"{folder.name} has a larger vocabulary than the model, so it cannot guess its tokens.",
                hint="Take a draft model of the same family.",
            )
        return place

    def _read(self, folder: Path, *, answers: bool = True) -> tuple[Checkpoint, ChatTemplate, Path]:
        """A folder's checkpoint, its compiled template and the folder for the library.

        Kept for the swap back, because reading a large vocabulary takes a tenth of a second; a folder in which
        anything changed is read again.
        """
        stamp = (answers, *_stamp(folder))
        known = self._folders.get(stamp)
        if known is None:
            checkpoint = read_checkpoint(folder, self.rules, answers=answers)
            for repair in checkpoint.repairs:
                _say(repair)
            template = ChatTemplate(
                checkpoint.template, bos_token=checkpoint.bos_token, eos_token=checkpoint.eos_token,
                special=checkpoint.special_tokens,
            )  # fmt: skip
            self._views += 1
            place = Path(os.environ.get("TURNTABLE_ENGINE_DIR") or tempfile.mkdtemp(prefix="turntable-engine-"))
            known = (checkpoint, template, prepare(checkpoint, place / f"view-{self._views}"))
            self._folders[stamp] = known
            while len(self._folders) > MAX_FOLDERS:
                self._folders.popitem(last=False)
        self._folders.move_to_end(stamp)
        return known

    def _tokenizer_of(self, read: Checkpoint, make: Callable[[], Any]) -> Any:
        """The model's tokenizer, kept as long as its files are the same; llguidance's tables hang on it too."""
        if id(read) not in self._tokenizers:
            self._tokenizers[id(read)] = (read, make())  # holding `read` keeps the id its own
        self._tokenizers.move_to_end(id(read))
        while len(self._tokenizers) > MAX_TOKENIZERS:
            self._tokenizers.popitem(last=False)
        return self._tokenizers[id(read)][1]

    def _explain_load(self, error: Exception, checkpoint: Checkpoint) -> TurntableError:
        if isinstance(error, TurntableError):
            return error
        if self._is_out_of_memory(error):
            return DoesNotFit(
                f"{checkpoint.folder.name} does not fit into the card's memory with this context and cache mode.",
                hint="Close other programs that use the card, take a smaller context, a smaller cache mode or fewer "
                "bits per weight.",
            )
        return LoadError(
            f"{self.rules.engine} could not load {checkpoint.folder.name}: {_short(error)}",
            hint="The log has the engine's own words.",
        )

    def at_once(self) -> int:
        return self._spec.parallel if self._spec else 1

    def count_tokens(self, texts: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self._count(text) for text in texts)

    def start(self, request: Start, emit: Emit) -> None:
        if self._checkpoint is None or self._spec is None:
            raise GenerateError("No model is loaded.")
        if request.constraint is not None:
            check_constraint(request.constraint)
        began = time.monotonic()
        try:
            rendered, pictures = self._render(request)
            ids = self._encode(rendered.text, pictures)
            prompt = int(ids.shape[-1])
            room = self._spec.context - prompt - self._extra_tokens()
            if room < 1:
                raise ContextTooLong(f"The prompt takes {prompt} tokens, and the context holds {self._spec.context}.")
            answer = Answer(request, emit, ThoughtSplitter(rendered.opens_thought), prompt, began_s=began)
            wanted = max(1, min(request.sampling.max_tokens, room))
            answer.job = self._make_job(answer, ids, pictures, wanted)
            self._enqueue(answer.job)
        except TurntableError:
            raise
        except Exception as error:
            raise self._explain_answer(error) from None
        self._answers[request.id] = answer

    def _stop_conditions(self, request: Start) -> list[int | str]:
        """Tokens and texts that end an answer; none where its length is given."""
        assert self._checkpoint is not None
        return [] if request.full_length else [*self._checkpoint.stop_ids, *request.sampling.stop]

    def _render(self, request: Start) -> tuple[Rendered, list[Any]]:
        assert self._checkpoint is not None and self._template is not None
        pictures: list[Any] = []

        def picture(path: str) -> str:
            embedding = self._embedding(path)
            if not any(embedding is known for known in pictures):
                pictures.append(embedding)
            alias: str = embedding.text_alias
            return alias

        if any(m.images for m in request.messages) and not self._checkpoint.vision:
            raise InvalidRequest("This model cannot look at pictures.", hint="Choose a variant with vision.")
        rendered = self._template.render(
            request.messages, thinking=request.thinking, picture=picture, force_thought=self._options.force_thought
        )
        return rendered, pictures

    def _embedding(self, path: str) -> Any:
        """A picture's embedding, kept by the hash of its file: the same ids again are what lets a prefix be reused."""
        key = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if key in self._embeddings:
            self._embeddings.move_to_end(key)
            return self._embeddings[key][0]
        self._embeddings[key] = self._embed(path)
        while (
            len(self._embeddings) > MAX_EMBEDDINGS
            or sum(size for _, size in self._embeddings.values()) > MAX_EMBEDDING_BYTES
        ) and len(self._embeddings) > 1:
            self._embeddings.popitem(last=False)
        return self._embeddings[key][0]

    def cancel(self, request_id: str) -> None:
        with self._lock:
            self._cancelled.add(request_id)

    def step(self) -> bool:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
        for request_id in cancelled:
            answer = self._answers.pop(request_id, None)
            if answer is not None:
                self._cancel_job(answer.job)
                self._finish(answer, "stopped", {})
        if not self._answers:
            return False
        try:
            results = list(self._iterate())
        except Exception as error:
            self._fail_all(error)
            return bool(self._answers)
        for result in results:
            self._take(result)
        return bool(self._answers)

    def memory_bytes(self) -> int:
        return self._device_bytes()

    def keep_copies(self, most_bytes: int) -> int:
        return 0

    def unload(self) -> None:
        self._answers.clear()
        self._embeddings.clear()
        self._spec, self._checkpoint, self._template = None, None, None
        self._close()
        gc.collect()
        self._free()

    # Results -----------------------------------------------------------------------------

    def _take(self, result: dict[str, Any]) -> None:
        name = result.get("identifier") or getattr(result.get("job"), "identifier", "")
        answer = self._answers.get(str(name))
        if answer is None:
            return
        stage = result["stage"]
        if stage == "prefill":
            answer.emit(Prefill(answer.request.id, int(result["curr_progress"]), int(result["max_progress"])))
        elif stage == "streaming":
            self._stream(answer, result)
        elif stage == "error":
            self._answers.pop(answer.request.id)
            error = self._explain_answer(result["error"])
            answer.emit(Failed(answer.request.id, **error.to_wire()))

    def _stream(self, answer: Answer, result: dict[str, Any]) -> None:
        if not answer.first_token_s:
            answer.first_token_s = time.monotonic() - answer.began_s
        token_ids = result.get("token_ids")
        count = 0 if token_ids is None else int(token_ids.shape[-1])
        self._say(answer, result.get("text") or "", count)
        if not result["eos"]:
            return
        reason = result.get("eos_reason", "stop_token")
        if reason == "stop_token":
            # What was held back (half a character, the beginning of a stop text) belongs to the answer; the token
            # that ended it does not.
            held = (result.get("held") or {}).get("text", "")
            self._say(answer, held.removesuffix(result.get("eos_triggering_token_str") or "\0"), 0)
        self._answers.pop(answer.request.id)
        self._finish(answer, "length" if reason == "max_new_tokens" else "stop", result)

    def _say(self, answer: Answer, text: str, tokens: int) -> None:
        if text:
            self._give(answer, answer.splitter.feed(text), tokens)

    def _give(self, answer: Answer, pieces: list[tuple[str, str]], tokens: int) -> None:
        for channel, piece in pieces:
            answer.tokens[channel] += tokens
            answer.emit(Delta(answer.request.id, piece, channel, tokens))
            tokens = 0

    def _finish(self, answer: Answer, reason: str, result: dict[str, Any]) -> None:
        self._give(answer, answer.splitter.finish(), 0)
        completion = int(result.get("new_tokens") or sum(answer.tokens.values()))
        generate_s = float(result.get("time_generate") or 0.0)
        counts = Counts(
            prompt=answer.prompt_tokens, cached=int(result.get("cached_tokens") or 0), completion=completion,
            reasoning=answer.tokens["reasoning"],
        )  # fmt: skip
        timings = Timings(
            prompt_s=float(result.get("time_prefill") or 0.0), generate_s=generate_s,
            first_token_s=answer.first_token_s,
            # The first token comes out of the prompt; the time of generation holds the others.
            tokens_per_second=(completion - 1) / generate_s if generate_s > 0 and completion > 1 else 0.0,
        )  # fmt: skip
        answer.emit(Finished(answer.request.id, reason, counts, timings))

    def _fail_all(self, error: Exception) -> None:
        known = self._explain_answer(error)
        error.__traceback__ = None
        answers, self._answers = list(self._answers.values()), {}
        try:
            self._reset()
        finally:
            for answer in answers:
                answer.emit(Failed(answer.request.id, **known.to_wire()))

    def _explain_answer(self, error: Exception) -> TurntableError:
        if isinstance(error, TurntableError):
            return error
        if self._is_out_of_memory(error):
            with contextlib.suppress(Exception):
                self._free()
            return GenerateError(
                "The card ran out of memory while it answered.",
                hint="Close other programs that use the card, send a smaller picture, or take a smaller context.",
            )
        return GenerateError(f"{self.rules.engine} failed: {_short(error)}")


def widened(picture: Any, max_pixels: int) -> Any:
    """The picture (of Pillow, RGB), with white beside it where it is too narrow, and larger where it is too small.

    Afterwards no side is below MIN_SIDE_PX, also when the picture is made smaller to max_pixels.
    """
    from PIL import Image, ImageOps

    ratio = min(MAX_RATIO, 0.9 * max_pixels / MIN_SIDE_PX**2)  # at max_pixels the shorter side is sqrt(pixels / ratio)
    least = math.ceil(max(picture.size) / max(1.0, ratio))
    width, height = (max(side, least) for side in picture.size)
    if (width, height) != picture.size:
        picture = ImageOps.pad(picture, (width, height), color="white")
    scale = MIN_SIDE_PX / min(width, height)
    if scale <= 1:
        return picture
    size = (math.ceil(width * scale), math.ceil(height * scale))
    return picture.resize(size, Image.Resampling.BICUBIC)


def clear_workspaces() -> None:
    """Free what cuBLAS keeps on the cards for its matrix products, 8 to 32 MB on each. Only while no model is loaded.

    PyTorch counts it as allocated for the life of the process (its issue 95668), so that it looks like a leak.
    """
    import torch

    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:  # PyTorch for the CPU has none
        clear()


def check_constraint(constraint: Constraint) -> None:
    """Raises InvalidRequest for a constraint that is no schema or expression, or is too large."""
    if len(constraint.text.encode()) > MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"The {constraint.kind} is larger than {MAX_SCHEMA_BYTES >> 10} KB.")
    if constraint.kind not in ("json_schema", "regex"):
        raise InvalidRequest(f"An answer can be held to a json_schema or a regex, not to a {constraint.kind}.")


def grammar(constraint: Constraint) -> str:
    """The constraint in llguidance's own form. Raises InvalidRequest with llguidance's reason."""
    from llguidance import LLMatcher

    try:
        if constraint.kind == "json_schema":
            # Blank space wherever JSON allows it lets a model write nothing else until it runs out of tokens.
            written: str = LLMatcher.grammar_from_json_schema(constraint.text, defaults={"whitespace_flexible": False})
        else:
            written = LLMatcher.grammar_from_regex(constraint.text)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"The {constraint.kind} cannot be used: {_short(error)}") from None
    return written


def _stamp(folder: Path) -> tuple[Any, ...]:
    """The folder with the name, size and time of everything in it; just the folder when it is not there."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries]
    except OSError:
        found = []
    return (str(folder), *sorted(found))


def _short(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else words[:297] + "…"


def _say(words: str) -> None:
    print(words, flush=True)  # file descriptor 1 is the log: worker.py points it at stderr
