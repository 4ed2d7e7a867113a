"""Measures what is on this machine: load time, prompt and decode speed, memory, of each variant that is ready.

Goes through the assistant and the loader as an answer does: it waits its turn, and
others' answers come in between. What was measured while another answer ran is
measured again, because two share the machine. A variant that cannot be measured says
why, writes no row, and the rest go on. The table itself is measured.py's.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from modules import planner
from modules.assistant import Assistant
from modules.errors import Busy, GenerateError, InvalidRequest, ModelFilesError, ModelNotDownloaded, TurntableError
from modules.hardware import Hardware, Machine
from modules.loader import LeaseCancelled
from modules.measured import History, Row
from modules.messages import EngineSpec, Finished, Loading, Message, Prefill, Queued, Sampling, Start
from modules.presets import Preset, Variant
from modules.process import EngineProcess

ROOT = Path(__file__).resolve().parent.parent
WORDS = "A train leaves the station at noon and comes back in the evening. "
WARM_UP_TOKENS = 8
TEMPLATE_TOKENS = 64  # kept free for what the chat template adds
TELL_EVERY_S = 0.1
TRIES = 5  # of one measurement that answers of others disturb
log = logging.getLogger("turntable.bench")
T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """How much is measured: tokens of the prompt, tokens to write, and how often. The defaults are our table's."""

    prompt_tokens: int = 512
    tokens: int = 128
    repeats: int = 3


@dataclass(frozen=True)
class Target:
    """A variant that can be measured. name is what a person types: coding/demo-1-mb."""

    preset: Preset
    variant: Variant
    spec: EngineSpec

    @property
    def name(self) -> str:
        return f"{self.preset.name}/{self.variant.id}"

    @property
    def title(self) -> str:
        return f"{self.preset.title} · {self.variant.title}"


@dataclass(frozen=True)
class Failure:
    """A variant that could not be measured, and why."""

    name: str
    title: str
    error: str
    hint: str


@dataclass(frozen=True)
class Step:
    """Progress: which of how many variants, what is being done with it, and how far all of it is, 0 to 1."""

    number: int
    total: int
    title: str
    words: str
    fraction: float


@dataclass
class Outcome:
    """What a run gave. cancelled: it was ended before all were measured; the rows so far are written."""

    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    cancelled: bool = False


Tell = Callable[[Step], None]


class Bench:
    """Runs measurements, one at a time for each caller; run() blocks, cancel() may come from any thread."""

    def __init__(self, assistant: Assistant, hardware: Hardware, history: History) -> None:
        self.history = history
        self._assistant, self._hardware = assistant, hardware
        self._cancelled = threading.Event()
        self._speaking: tuple[EngineProcess, str] | None = None
        self._ids = itertools.count(1)

    def targets(self, names: Sequence[str] = ()) -> list[Target]:
        """The variants that are ready: all, or those of the named presets, or PRESET/VARIANT.

        Variants that share their load are measured once. Raises PresetNotFound, InvalidRequest for an unknown variant,
        and ModelNotDownloaded where nothing of what was named is ready.
        """
        if not names:
            ready = self._ready(self._assistant.presets.list())
            if not ready:
                raise ModelNotDownloaded("No model on this machine is ready to be measured.")
            return ready
        found: dict[EngineSpec, Target] = {}
        for name in names:
            preset, _, wanted = name.partition("/")
            for target in self._named(self._assistant.presets.get(preset), wanted):
                found.setdefault(target.spec, target)
        return list(found.values())

    def _ready(self, presets: Sequence[Preset]) -> list[Target]:
        targets: dict[EngineSpec, Target] = {}
        for preset in presets:
            for state in self._assistant.survey(preset):
                if state.state == "ready":
                    spec = self._assistant.spec(state.variant)
                    targets.setdefault(spec, Target(preset, state.variant, spec))
        return list(targets.values())

    def _named(self, preset: Preset, wanted: str) -> list[Target]:
        if not wanted:
            ready = self._ready([preset])
            if not ready:
                raise ModelNotDownloaded(f"No variant of the preset {preset.name} is ready on this machine.")
            return ready
        for state in self._assistant.survey(preset):
            if state.variant.id == wanted:
                if state.state != "ready":
                    raise ModelNotDownloaded(f"{preset.name}/{wanted} cannot be measured: {state.why}.")
                return [Target(preset, state.variant, self._assistant.spec(state.variant))]
        known = ", ".join(variant.id for variant in preset.variants)
        raise InvalidRequest(f"The preset {preset.name} has no variant {wanted!r}.", hint=f"It has {known}.")

    def run(
        self, targets: Sequence[Target], sizes: Sizes, tell: Tell, on_row: Callable[[Row], None] = lambda row: None
    ) -> Outcome:
        """Measure one after the other; each row is on the disk before the next begins. Raises OSError of the disk."""
        outcome, began, commit = Outcome(), now(), commit_of(ROOT)
        for place, target in enumerate(targets):
            run = _Run(target, sizes, place, len(targets), tell)
            try:
                row = self._measure(run, began, commit)
                self.history.append(row)
                outcome.rows.append(row)
                on_row(row)
            except LeaseCancelled:
                outcome.cancelled = True
                break
            except TurntableError as error:
                if self._cancelled.is_set():
                    outcome.cancelled = True
                    break
                log.warning("%s could not be measured: %s", target.name, error)
                outcome.failures.append(Failure(target.name, target.title, str(error), error.hint))
        return outcome

    def cancel(self) -> None:
        """End the run soon; rows that are written stay."""
        self._cancelled.set()
        speaking = self._speaking
        if speaking is not None:
            speaking[0].cancel(speaking[1])
        self._assistant.wake()

    # One variant -----------------------------------------------------------------------------

    def _measure(self, run: _Run, began: str, commit: str) -> Row:
        load_s, keeps = self._undisturbed(run, lambda: self._load(run, "child"))
        swap_s = self._undisturbed(run, lambda: self._load(run, "again"))[0] if keeps else None
        run.loaded(keeps)
        sizes = run.sizes
        self._undisturbed(run, lambda: self._speak(run, replace(sizes, tokens=WARM_UP_TOKENS)))
        heard = []
        for _ in range(sizes.repeats):
            run.next()
            heard.append(self._undisturbed(run, lambda: self._speak(run, sizes)))
        last, target = heard[-1], run.target  # memory is of the first: llama.cpp keeps prompts in RAM as they come
        machine = self._hardware.snapshot()
        device, power = place_of(target.spec, last.memory_kind, machine)
        kind, bpw = quantization(target)
        return Row(
            at=now(), run=began, engine=target.spec.engine, engine_version=last.version, commit=commit,
            preset=target.preset.name, variant=target.variant.id, title=target.preset.title, model=target.variant.title,
            file=Path(target.spec.model).name, quant=kind, bpw=round(bpw, 2), cache_mode=target.spec.cache_mode,
            context=last.context, wanted_tokens=last.wanted_tokens, prompt_tokens=last.prompt_tokens,
            tokens=last.tokens, prompt_tps=tuple(five_digits(one.prompt_tps) for one in heard),
            decode_tps=tuple(five_digits(one.decode_tps) for one in heard), load_s=round(load_s, 3),
            swap_s=None if swap_s is None else round(swap_s, 3), memory_bytes=heard[0].memory_bytes,
            device=device, power_limit_w=power, threads=target.spec.threads,
        )  # fmt: skip

    def _undisturbed(self, run: _Run, work: Callable[[], T]) -> T:
        """The result of a try during which no model but this one was used or loaded; `work` takes one lease.

        Raises Busy after too many tries, LeaseCancelled.
        """
        for _ in range(TRIES):
            before = self._wait_for_quiet(run)
            result = work()
            after = self._assistant.loader_view()
            if after.quiet and after.granted == before + 1:
                return result
        raise Busy(
            f"Other answers ran during each of {TRIES} tries, so nothing could be measured.",
            hint="Measure when nobody is asking anything.",
        )

    def _wait_for_quiet(self, run: _Run) -> int:
        while True:
            if self._cancelled.is_set():
                raise LeaseCancelled
            view = self._assistant.loader_view()
            if view.quiet:
                return view.granted
            run.say("waits until the running answers have ended")
            self._cancelled.wait(0.1)

    @contextlib.contextmanager
    def _lease(self, run: _Run, fresh: str = "") -> Iterator[EngineProcess]:
        target = run.target
        with self._assistant.lease(
            target.preset, target.variant, report=run.report, cancelled=self._cancelled, fresh=fresh
        ) as engine:
            yield engine

    def _load(self, run: _Run, fresh: str) -> tuple[float, bool]:
        """Seconds of a load, and whether the engine's child takes the next model."""
        with self._lease(run, fresh) as engine:
            return engine.up_s, engine.kind.keeps_process

    def _speak(self, run: _Run, sizes: Sizes) -> _Heard:
        """One prompt of the asked length, never seen before, and exactly so many tokens written."""
        with self._lease(run) as engine:
            context = engine.ready.context if engine.ready else run.target.variant.context
            room = context - sizes.tokens - TEMPLATE_TOKENS
            if room < 16:
                raise InvalidRequest(
                    f"The context of {context} has no room for a prompt and {sizes.tokens} tokens.",
                    hint="Measure fewer tokens.",
                )
            wanted = min(sizes.prompt_tokens, room)
            text = prompt_of(engine, wanted)
            sampling = Sampling(temperature=0.0, max_tokens=sizes.tokens)
            id = f"bench-{next(self._ids)}"
            self._speaking = engine, id
            try:
                finished = self._hear(run, engine, Start(id, (Message("user", text),), sampling, full_length=True))
            finally:
                self._speaking = None
            return _Heard.of(finished, (wanted, sizes.tokens), engine, context)

    def _hear(self, run: _Run, engine: EngineProcess, start: Start) -> Finished:
        written, most, told = 0, start.sampling.max_tokens, 0.0
        for event in engine.generate(start):
            if isinstance(event, Finished):
                if self._cancelled.is_set():
                    raise LeaseCancelled
                return event
            if self._cancelled.is_set():
                engine.cancel(start.id)
            first = not written
            written += getattr(event, "tokens", 0)
            if not first and written < most and time.monotonic() - told < TELL_EVERY_S:
                continue  # nobody reads faster, and a slow terminal must not hold up the pipe
            told = time.monotonic()
            if isinstance(event, Prefill):
                part = event.done / max(1, event.total)
                run.say(f"reads the prompt, {event.done} of {event.total} tokens", 0.4 * part)
            else:
                run.say(f"writes, {written} of {most} tokens", 0.4 + 0.6 * min(1.0, written / most))
        raise AssertionError("generate ends with Finished or raises")


class _Run:
    """One variant's place in the whole, and what is said of it."""

    def __init__(self, target: Target, sizes: Sizes, place: int, total: int, tell: Tell) -> None:
        self.target, self.sizes = target, sizes
        self._place, self._total, self._tell = place, total, tell
        self._round, self._rounds = -1, sizes.repeats
        self._done = 0.0  # never goes back, also where a load is followed by another

    def loaded(self, swapped: bool) -> None:
        """All loads are done; what follows is the warm-up."""
        self._round = 0
        self.say("is loaded a second time" if swapped else "is loaded")

    def next(self) -> None:
        """The next repetition begins."""
        self._round += 1

    def say(self, words: str, part: float = 0.0) -> None:
        """part of what is being done now is done."""
        if self._round > 0:
            words = f"{words} (run {self._round} of {self._rounds})"
        elif self._round == 0:
            words = f"{words} (warm-up)"
        self._done = max(self._done, (self._round + 1 + part) / (self._rounds + 2))
        fraction = (self._place + self._done) / self._total
        self._tell(Step(self._place + 1, self._total, self.target.title, words, fraction))

    def report(self, event: Loading | Queued) -> None:
        """Of the loader."""
        if isinstance(event, Queued):
            self.say(f"waits for the model, place {event.place}")
        else:
            words = {"unloading": "makes room", "restoring": "brings the previous model back"}.get(event.stage, "loads")
            self.say(f"{words}, {event.fraction:.0%}", event.fraction)


@dataclass(frozen=True)
class _Heard:
    """One repetition."""

    wanted_tokens: int
    prompt_tokens: int
    tokens: int
    prompt_tps: float
    decode_tps: float
    memory_bytes: int
    context: int
    version: str
    memory_kind: str

    @classmethod
    def of(cls, end: Finished, wanted: tuple[int, int], engine: EngineProcess, context: int) -> _Heard:
        """Raises GenerateError where the figures would mean nothing."""
        counts, timings = end.counts, end.timings
        read = counts.prompt - counts.cached
        if counts.completion < wanted[1]:
            raise GenerateError(f"The model wrote {counts.completion} of {wanted[1]} tokens, which measures nothing.")
        if read <= 0 or timings.prompt_s <= 0 or timings.tokens_per_second <= 0:
            raise GenerateError("The engine did not say how long the prompt and the answer took.")
        return cls(
            wanted[0], counts.prompt, counts.completion, read / timings.prompt_s, timings.tokens_per_second,
            engine.measure(), context, engine.version, engine.kind.memory,
        )  # fmt: skip


def prompt_of(engine: EngineProcess, tokens: int) -> str:
    """A text of about so many tokens, at most; its beginning is new each time, so that nothing is kept of the last."""
    begin = f"Note {secrets.token_hex(4)}. "
    each = engine.count_tokens((WORDS,))[0]
    text = begin + WORDS * int(1.1 * tokens / max(1, each) + 1)
    while (counted := engine.count_tokens((text,))[0]) > tokens and len(text) > len(begin):
        text = text[: int(len(text) * tokens / counted)]
    return text


def five_digits(value: float) -> float:
    """What a clock can tell; never rounded down to nothing."""
    return float(f"{value:.5g}")


def place_of(spec: EngineSpec, memory: str, machine: Machine) -> tuple[str, float | None]:
    """What a model ran on: the cards with their power limit in watts where they agree, or the processor."""
    if memory != "vram" and dict(spec.options).get("gpu_layers", "0") == "0":
        return machine.cpu.model, None
    cards = machine.working_cards
    if not cards:
        return "a card that does not tell its name", None
    names = sorted({card.name for card in cards})
    counts = [sum(card.name == name for card in cards) for name in names]
    device = " + ".join(name if count == 1 else f"{count} × {name}" for name, count in zip(names, counts, strict=True))
    limits = {card.power_limit_w for card in cards}
    return device, limits.pop() if len(limits) == 1 else None


def quantization(target: Target) -> tuple[str, float]:
    """How the files say that their weights are stored, and bits per weight; empty and 0 where nothing says it."""
    path = Path(target.spec.model)
    try:
        found = (planner.read_folder(path) if path.is_dir() else planner.read_gguf(path)).quantization
    except (ModelFilesError, OSError):
        return "", target.variant.bpw or 0.0
    return found.scheme or found.kind.upper(), target.variant.bpw or found.bpw


def commit_of(root: Path) -> str:
    """The checkout's commit, with "-dirty" where files were changed; empty where there is no checkout or no git."""
    if not (root / ".git").exists():
        return ""  # a folder above may be one, but not of this program
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True,
            timeout=5, check=False, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def now() -> str:
    """This moment, ISO 8601 in UTC, to the millisecond: small models are measured several times a second."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# For the page -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchView:
    """The running measurement, or the last one. error: what ended it; said: how it ended, in words."""

    running: bool
    step: Step | None = None
    measured: int = 0
    failures: tuple[Failure, ...] = ()
    said: str = ""
    error: str = ""


class BenchJobs:
    """Measures on a thread of its own, one run at a time; every page sees the same one."""

    def __init__(
        self, assistant: Assistant, hardware: Hardware, history: History, on_change: Callable[[], None] = lambda: None,
        *, on_row: Callable[[Row], None] = lambda row: None, sizes: Sizes | None = None,
    ) -> None:  # fmt: skip
        self._make: Callable[[], Bench] = lambda: Bench(assistant, hardware, history)
        self.history = history
        self._on_change, self._on_row, self._sizes = on_change, on_row, sizes or Sizes()
        self._lock = threading.Lock()
        self._view: BenchView | None = None
        self._bench: Bench | None = None
        self._thread: threading.Thread | None = None

    def view(self) -> BenchView | None:
        """None before the first run."""
        with self._lock:
            return self._view

    def targets(self) -> list[Target]:
        """What can be measured now."""
        try:
            return self._make().targets()
        except ModelNotDownloaded:
            return []

    def start(self, names: Sequence[str] = ()) -> None:
        """Begin a run over the named presets or variants, or over all. Raises Busy, and what Bench.targets raises."""
        bench = self._make()
        targets = bench.targets(names)
        with self._lock:
            if self._view is not None and self._view.running:
                raise Busy("A measurement is running already.", hint="Wait for it, or cancel it.")
            self._view, self._bench = BenchView(True), bench
            self._thread = threading.Thread(target=self._run, args=(bench, targets), name="bench", daemon=True)
            self._thread.start()
        self._on_change()

    def cancel(self) -> None:
        """End the run; what is measured already stays. Harmless when none is running."""
        if self._bench is not None:
            self._bench.cancel()

    def close(self) -> None:
        """End it because the program ends, and wait a moment for that."""
        self.cancel()
        if self._thread is not None:
            self._thread.join(5)

    def _run(self, bench: Bench, targets: list[Target]) -> None:
        try:
            outcome = bench.run(targets, self._sizes, self._tell, self._on_row)
            view = BenchView(
                False, measured=len(outcome.rows), failures=tuple(outcome.failures),
                said=f"{'Cancelled. ' if outcome.cancelled else ''}{len(outcome.rows)} of {len(targets)} measured.",
            )  # fmt: skip
        except OSError as error:
            view = BenchView(False, error=f"The table could not be written: {error.strerror or error}.")
        except Exception as error:  # a run that never ends would hold up all others
            log.exception("the measurement failed in a way that nobody expected")
            view = BenchView(False, error=f"{type(error).__name__}: {error}")
        with self._lock:
            self._view = view
        self._on_change()

    def _tell(self, step: Step) -> None:
        with self._lock:
            before = self._view.step if self._view else None
            self._view = BenchView(True, step)
        if before is None or _shown(before) != _shown(step):
            self._on_change()


def _shown(step: Step) -> tuple[Any, ...]:
    """What of a step is worth a new picture: whole percents, and no count of tokens."""
    return step.number, int(step.fraction * 100), step.words.split(",")[0]
