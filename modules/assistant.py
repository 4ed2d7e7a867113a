"""The use cases: answer, stop, follow, open, delete, survey. All that the page, the terminal and the API may call.

An answer in progress is a Job. It belongs to the server: the engine never waits for
a page, the text goes into the job and onto the disk, and pages follow it. A page
that goes away and comes back attaches to it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from modules import planner, prompt
from modules.chats import ChatInfo, ChatMessage, Chats
from modules.errors import (
    Busy,
    EngineMissing,
    ImageMissing,
    InvalidRequest,
    ModelNotDownloaded,
    TurntableError,
)  # fmt: skip
from modules.images import Images, StoredImage
from modules.library import Library, Located
from modules.loader import LeaseCancelled, Loader, LoaderView, Report
from modules.messages import (
    Counts,
    Delta,
    EngineSpec,
    Event,
    Failed,
    Finished,
    Message,
    Sampling,
    Start,
    Timings,
)  # fmt: skip
from modules.planner import Card
from modules.presets import EXL_ENGINES, Options, Preset, Presets, Variant
from modules.process import EngineKind, EngineProcess

SAVE_EVERY_S = 1.0
LONGEST_TEXT = 2_000_000
MOST_IMAGES = 8
DEMO_IMAGE_TOKENS = 16
log = logging.getLogger("turntable.assistant")


@dataclasses.dataclass(frozen=True)
class VariantState:
    """A variant on this machine. state: ready, engine_missing, not_downloaded, damaged or does_not_fit; here: its
    files are on the disk."""

    variant: Variant
    state: str
    why: str
    command: str
    needs_bytes: int
    chosen: bool = False
    here: bool = False


class Job:
    """One answer in progress, an append-only list of events. Thread-safe."""

    def __init__(self, chat: str, message: ChatMessage, preset: Preset) -> None:
        self.id = f"a-{secrets.token_hex(8)}"
        self.chat, self.message, self.preset = chat, message, preset
        self.context = 0
        self.note = ""
        self.demo = False
        self.variant = ""
        self.cancelled = threading.Event()
        self.done = False
        self.engine: EngineProcess | None = None
        self._events: list[Event] = []
        self._grown = threading.Condition()
        self._pieces: dict[str, list[str]] = {"text": [], "reasoning": []}

    def put(self, event: Event, *, last: bool = False) -> None:
        """Add an event; everybody who follows is woken."""
        with self._grown:
            self._events.append(event)
            if isinstance(event, Delta):
                self._pieces[event.channel].append(event.text)
            self.done = self.done or last
            self._grown.notify_all()

    def since(self, cursor: int) -> tuple[list[Event], int, bool]:
        """Events from `cursor` on, the next cursor, and whether the job has ended."""
        with self._grown:
            return self._events[cursor:], len(self._events), self.done

    def follow(self) -> Iterator[Event]:
        """Every event from the first to the last, waiting for those to come."""
        cursor = 0
        while True:
            with self._grown:
                while len(self._events) == cursor and not self.done:
                    self._grown.wait()
                events, done = self._events[cursor:], self.done
            cursor += len(events)
            yield from events
            if done:
                return

    def text(self, channel: str = "text") -> str:
        """What has been written so far."""
        with self._grown:
            return "".join(self._pieces[channel])


class Assistant:
    """Built once in app.py; the only object that the page, the terminal and the API are handed."""

    def __init__(
        self, presets: Presets, library: Library, loader: Loader, chats: Chats, images: Images,
        kinds: dict[str, EngineKind], threads: int = 0,
    ) -> None:  # fmt: skip
        self.presets, self.library, self.chats, self.images = presets, library, chats, images
        self._loader, self.kinds, self._threads = loader, kinds, threads
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}  # by conversation
        self._claimed: set[str] = set()  # conversations whose answer is about to begin
        self._located: dict[Variant, tuple[float, Located]] = {}
        self._labels: dict[EngineSpec, str] = {}
        self.cards: tuple[Card, ...] = ()  # what models may take of each card that engines see, the largest first
        self.on_job: Callable[[Job], None] = lambda job: None
        self.on_chats: Callable[[], None] = lambda: None

    # Answers ----------------------------------------------------------------------

    def reply(self, chat: str | None, text: str, images: Sequence[str], preset_name: str) -> Job:
        """Store the message and begin the answer; returns at once.

        A chat of None starts a new conversation. Raises PresetNotFound, ChatNotFound, Busy
        when this conversation is still being answered, InvalidRequest, ImageMissing.
        What goes wrong later ends the job with Failed.
        """
        preset = self.presets.get(preset_name)
        self._check(text, images)
        if chat is None:
            chat = self.chats.create(preset.name).id
        self._claim(chat)
        try:
            self.chats.add_user(chat, text, tuple(images), preset.name)
            job = Job(chat, self.chats.begin_answer(chat, preset.name, ""), preset)
            with self._lock:
                self._jobs[chat] = job
        finally:
            with self._lock:
                self._claimed.discard(chat)
        threading.Thread(target=self._run, args=(job,), name=f"job-{job.id}", daemon=True).start()
        self.on_chats()
        return job

    def _claim(self, chat: str) -> None:
        """One answer at a time for a conversation, also when two pages send at the same moment."""
        self.chats.get(chat)
        with self._lock:
            if chat in self._jobs or chat in self._claimed:
                raise Busy("This conversation is still being answered.")
            self._claimed.add(chat)

    def stop(self, chat: str) -> bool:
        """Stop the conversation's answer; False when none is in progress."""
        job = self.job(chat)
        if job is None:
            return False
        job.cancelled.set()
        if job.engine is not None:
            job.engine.cancel(job.id)
        self._loader.wake()
        return True

    def job(self, chat: str) -> Job | None:
        """The answer in progress of a conversation."""
        with self._lock:
            return self._jobs.get(chat)

    def jobs(self) -> list[Job]:
        """All answers in progress."""
        with self._lock:
            return list(self._jobs.values())

    def close(self, grace_s: float = 4.0) -> None:
        """Stop every answer, wait until its part is stored, end the engines."""
        for job in self.jobs():
            self.stop(job.chat)
        deadline = time.monotonic() + grace_s
        while self.jobs() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._loader.close()
        while self.jobs() and time.monotonic() < deadline + 1:
            time.sleep(0.02)
        self.chats.close()

    def _check(self, text: str, images: Sequence[str]) -> None:
        if not text.strip() and not images:
            raise InvalidRequest("The message is empty.", hint="Write something first.")
        if len(text) > LONGEST_TEXT:
            raise InvalidRequest(f"The message has {len(text):,} characters; the most is {LONGEST_TEXT:,}.")
        if len(images) > MOST_IMAGES:
            raise InvalidRequest(f"{len(images)} pictures at once; the most is {MOST_IMAGES}.", hint="Send fewer.")
        for image in images:
            self.images.path(image)

    def _run(self, job: Job) -> None:
        """A job's thread, from the choice of the variant to the last word on the disk."""
        state, error, finished = "broken", None, Finished(job.id, "stop")
        try:
            finished = self._answer(job)
            state = {"stop": "done"}.get(finished.reason, finished.reason)
        except LeaseCancelled:
            state, finished = "stopped", Finished(job.id, "stopped")
        except TurntableError as failure:
            error = failure.to_wire()
            log.warning("%s: %s", job.preset.name, failure)
        except Exception:
            log.exception("an answer failed in a way that nobody expected")
            error = TurntableError("The answer failed for an unknown reason.").to_wire()
        if error is not None and job.cancelled.is_set():
            state, error, finished = "stopped", None, Finished(job.id, "stopped")
        self._store(job, state, error, finished)
        with self._lock:
            self._jobs.pop(job.chat, None)
        last: Event = Failed(job.id, **error) if error else finished
        job.put(last, last=True)
        self.on_job(job)
        self.on_chats()

    def _store(self, job: Job, state: str, error: dict[str, str] | None, finished: Finished) -> None:
        try:
            job.message = self.chats.end_answer(
                job.message.id, text=job.text(), reasoning=job.text("reasoning"), state=state,
                counts=finished.counts, timings=finished.timings, error=error, variant=job.variant,
            )  # fmt: skip
        except TurntableError as failure:  # the page still has the text; the disk has not
            log.error("an answer could not be stored: %s", failure)

    def _answer(self, job: Job) -> Finished:
        variant, located = self.choose(job.preset)
        job.variant, job.demo = variant.title, bool(variant.bundled)
        spec = self._spec(variant, located)
        self._labels[spec] = f"{job.preset.title} · {variant.title}"
        self.on_job(job)

        def report(event: Event) -> None:
            job.put(event)
            self.on_job(job)

        needs = self._needs(variant, located.size_bytes)
        with self._loader.lease(spec, needs_bytes=needs, report=report, cancelled=job.cancelled) as engine:
            start = self._start(job, variant, engine)
            job.engine = engine
            return self._stream(job, engine, start)

    def _stream(self, job: Job, engine: EngineProcess, start: Start) -> Finished:
        saved = time.monotonic()
        for event in engine.generate(start):
            if isinstance(event, Finished):
                return event
            job.put(event)
            self.on_job(job)
            if job.cancelled.is_set():
                engine.cancel(job.id)
            if isinstance(event, Delta) and time.monotonic() - saved > SAVE_EVERY_S:
                saved = time.monotonic()
                self.chats.save_progress(job.message.id, job.text(), job.text("reasoning"))
        raise AssertionError("generate ends with Finished or raises")

    def _start(self, job: Job, variant: Variant, engine: EngineProcess) -> Start:
        sampling = variant.sampling or job.preset.sampling
        system = job.preset.system if variant.system is None else variant.system
        context = engine.ready.context if engine.ready else variant.context
        job.context = context
        history = self._history(job, square=bool(variant.bundled))
        if job.preset.task == "vision" and not any(m.images for m in history):
            raise ImageMissing("There is no picture in this conversation yet.")
        bounds = prompt.Bounds(
            context, sampling.max_tokens, variant.max_turns, variant.max_images,
            DEMO_IMAGE_TOKENS if variant.bundled else prompt.IMAGE_TOKENS,
        )  # fmt: skip
        built = prompt.build(system, history, bounds, engine.count_tokens)
        job.note = built.left_out
        room = max(1, context - built.tokens)
        fitted: Sampling = dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, room))
        thinking = job.preset.thinking if variant.thinking is None else variant.thinking
        return Start(job.id, built.messages, fitted, thinking)

    def _history(self, job: Job, square: bool) -> list[Message]:
        """The conversation up to the message to answer. Thoughts and empty answers are not handed on."""
        out = []
        for m in self.chats.messages(job.chat, before_seq=job.message.seq):
            if m.role == "assistant" and not m.text.strip():
                continue
            paths = tuple(str(self.images.for_engine(image, square)) for image in m.images)
            out.append(Message(m.role, m.text, paths))
        return out

    # Models -----------------------------------------------------------------------

    def choose(self, preset: Preset) -> tuple[Variant, Located]:
        """The first variant whose engine and files are here and which fits the budget.

        A damaged or unsafe file is an error, never a reason to take something else in
        silence. Raises ModelFilesDamaged, ModelFilesUnsafe, EngineMissing or ModelNotDownloaded.
        """
        reasons: list[TurntableError] = []
        for variant in preset.variants:
            if variant.engine not in self.kinds:
                reasons.append(EngineMissing(f"The engine {variant.engine} is not installed."))
                continue
            try:
                located = self._locate(variant)
            except ModelNotDownloaded as error:
                reasons.append(error)
                continue
            fits = self._needs(variant, located.size_bytes) <= self._loader.budget_bytes(variant.engine)
            if fits or variant is preset.variants[-1]:
                return variant, located
        raise reasons[-1] if reasons else ModelNotDownloaded(f"The preset {preset.name} has no variants.")

    def survey(self, preset: Preset) -> list[VariantState]:
        """Every variant of a preset on this machine, in the preset's order."""
        try:
            chosen: Variant | None = self.choose(preset)[0]
        except TurntableError:
            chosen = None
        return [self._state(variant, variant is chosen) for variant in preset.variants]

    def _state(self, variant: Variant, chosen: bool) -> VariantState:
        needs = self._needs(variant, variant.size_bytes)
        command = self.library.download_command(variant)
        try:
            located = self._locate(variant)
        except ModelNotDownloaded:
            state = "not_downloaded" if variant.engine in self.kinds else "engine_missing"
            return VariantState(variant, state, "not downloaded", command, needs)
        except TurntableError as error:
            return VariantState(variant, "damaged", str(error), command, needs, here=True)
        if variant.engine not in self.kinds:
            why = f"{variant.engine} is not installed"
            return VariantState(variant, "engine_missing", why, command, needs, here=True)
        needs = self._needs(variant, located.size_bytes)
        if needs > self._loader.budget_bytes(variant.engine):
            why = f"needs {needs / 1e9:.1f} GB"
            return VariantState(variant, "does_not_fit", why, command, needs, chosen, here=True)
        return VariantState(variant, "ready", "ready", "", needs, chosen, here=True)

    def label(self, spec: EngineSpec) -> str:
        """What a loaded model is called on the page."""
        return self._labels.get(spec, Path(spec.model).name)

    @contextlib.contextmanager
    def lease(
        self, preset: Preset, variant: Variant, *, report: Report, cancelled: threading.Event, fresh: str = ""
    ) -> Iterator[EngineProcess]:
        """A variant's model in memory without a conversation, to measure it; it waits its turn as an answer does.

        The arguments and errors of Loader.lease; also ModelNotDownloaded and its kin. After setting
        `cancelled`, call wake().
        """
        located = self._locate(variant)
        spec = self._spec(variant, located)
        self._labels[spec] = f"{preset.title} · {variant.title}"
        needs = self._needs(variant, located.size_bytes)
        lease = self._loader.lease(spec, needs_bytes=needs, report=report, cancelled=cancelled, fresh=fresh)
        with lease as engine:
            yield engine

    def spec(self, variant: Variant) -> EngineSpec:
        """What a variant loads; variants with equal specs share it. Raises ModelNotDownloaded and its kin."""
        return self._spec(variant, self._locate(variant))

    def wake(self) -> None:
        """Let waiting leases look at their `cancelled` at once."""
        self._loader.wake()

    def held_ram_bytes(self) -> int:
        """RAM of the loaded models, which an unload gives back."""
        return self._loader.snapshot().used_bytes

    def engine_pids(self) -> list[int]:
        """Process ids of the engines' children."""
        return self._loader.pids()

    def set_cards(self, cards: Sequence[Card], budget_bytes: int) -> None:
        """The cards, and the memory for models on the largest; they may become known after the start only."""
        self.cards = tuple(cards)
        self._loader.set_vram_budget(budget_bytes)

    def loader_view(self) -> LoaderView:
        """What is in memory, for display."""
        return self._loader.snapshot()

    def _locate(self, variant: Variant) -> Located:
        """The library's answer, remembered while the file's time stamp stays the same: its checks read the header."""
        known = self._located.get(variant)
        if known and known[1].model.exists() and known[1].model.stat().st_mtime == known[0]:
            return known[1]
        located = self.library.locate(variant)
        self._located[variant] = (located.model.stat().st_mtime, located)
        return located

    def _spec(self, variant: Variant, located: Located) -> EngineSpec:
        vision = bool(variant.bundled and located.projector)
        options = (("image_tokens", str(DEMO_IMAGE_TOKENS)),) if vision else engine_options(variant.options)
        if split := self._placed(variant)[0]:
            options = tuple(sorted((*options, ("gpu_split", split))))
        return EngineSpec(
            engine=variant.engine, model=str(located.model), projector=str(located.projector or ""),
            context=variant.context, cache_mode=variant.cache_mode, parallel=variant.parallel,
            threads=variant.threads or self._threads or (1 if variant.bundled else 0), options=options,
        )  # fmt: skip

    def _placed(self, variant: Variant) -> tuple[str, int]:
        """planner.place_variant; where the preset says itself how the model is to be spread, only the bytes."""
        options = variant.options or Options()
        if variant.engine not in EXL_ENGINES or variant.shape is None or len(self.cards) < 2:
            return "", 0
        if not options.gpu_split and not options.tensor_parallel:
            return planner.place_variant(variant, self.cards)
        needs = planner.plan_variant(variant).gpu_bytes
        if needs > sum(card.free_bytes for card in self.cards):
            return "", needs
        if options.gpu_split in ("", "auto"):  # the first card is filled before the next one
            share = needs // len(self.cards) if options.tensor_parallel else min(needs, self.cards[0].free_bytes)
            return "", share
        parts = [float(part) for part in options.gpu_split.split(",")]
        return "", round(needs * max(parts) / sum(parts))

    def _needs(self, variant: Variant, size_bytes: int) -> int:
        """needs_bytes of the card that is filled most."""
        return self._placed(variant)[1] or needs_bytes(variant, size_bytes)

    # Conversations ----------------------------------------------------------------

    def conversations(self, limit: int = 200) -> list[ChatInfo]:
        """Newest first."""
        return self.chats.list(limit)

    def messages(self, chat: str, before_seq: int | None, limit: int) -> list[ChatMessage]:
        """The last `limit` messages before `before_seq`, in order."""
        return self.chats.messages(chat, before_seq=before_seq, limit=limit)

    def delete(self, chat: str) -> None:
        """Delete a conversation; an answer in progress is stopped."""
        self.stop(chat)
        self.chats.delete(chat)
        self.on_chats()

    def add_image(self, data: bytes) -> StoredImage:
        """Check and store a picture that somebody handed in."""
        return self.images.add(data)


def engine_options(options: Options | None) -> tuple[tuple[str, str], ...]:
    """A preset's options as the sorted pairs of words that cross the pipe; what was not said is left out."""
    pairs: dict[str, str] = {}
    for name, value in dataclasses.asdict(options).items() if options else ():
        if name == "loras" and value:
            pairs[name] = json.dumps([_lora(text) for text in value])
        elif value:
            pairs[name] = "1" if value is True else str(value)
    return tuple(sorted(pairs.items()))


def _lora(text: str) -> tuple[str, float]:
    """FOLDER:SCALE; a colon without a number behind it belongs to the path."""
    folder, _, scale = text.rpartition(":")
    try:
        return (folder, float(scale)) if folder else (text, 1.0)
    except ValueError:
        return text, 1.0


def needs_bytes(variant: Variant, size_bytes: int) -> int:
    """Memory that a variant takes: on the card by the planner; in RAM files, KV cache and scratch."""
    if variant.engine in EXL_ENGINES and variant.shape is not None:
        return planner.plan_variant(variant).gpu_bytes
    shape, per_value = variant.shape, {"FP16": 2.0, "Q8": 1.0625, "Q6": 0.8125, "Q4": 0.5625}[variant.cache_mode]
    cache = 0.0
    if shape:
        layers = shape.kv_layers or shape.layers
        cache = 2 * layers * shape.kv_heads * shape.head_dim * variant.context * variant.parallel * per_value
    return int(size_bytes + cache) + (32 << 20 if variant.bundled else 256 << 20)


def totals(counts: Counts | None, timings: Timings | None) -> dict[str, dict[str, float]]:
    """Counts and timings of an answer as plain numbers, for the page and `ask --json`."""
    spent = dataclasses.asdict(timings or Timings())
    return {
        "counts": dataclasses.asdict(counts or Counts()),
        "timings": {name: round(value, 4) for name, value in spent.items()},
    }
