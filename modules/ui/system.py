"""The System page: the cards, the computer and the engines, what they lack, and what is being done with them.

HTML is made here on the server, escaped; live.py sends it whenever something changes.
The machine is read on a thread of its own, and only while a page shows it: a driver
that hangs holds up that thread and nothing else. Knows no gradio, so that it can be
used before gradio is there.
"""

from __future__ import annotations

import html
import logging
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from modules.doctor import EngineState, Examination, examine
from modules.environments import ABOUT_MINUTES, EngineJob, EngineJobs, Environment
from modules.errors import InstallFailed, InvalidRequest
from modules.hardware import Hardware, Machine, Sample
from modules.library import largest_weights
from modules.ui import machine as view

WORDS = {
    "absent": "not installed", "broken": "not complete", "installing": "being installed", "untested": "not tried on a card",
    "failed": "self-test failed", "ready": "ready",
}  # fmt: skip
TITLES = {
    "exllamav2": ("ExLlamaV2", "EXL2, GPTQ and FP16 models on NVIDIA cards."),
    "exllamav3": ("ExLlamaV3", "EXL3 models on NVIDIA cards, the successor of ExLlamaV2."),
}
EVERY_S = 1.0
OLD_S = 10.0
ENGINES_EVERY_S = 10.0  # somebody may install one in the terminal
LEAST_MEASURED_BYTES = 32 << 20  # a smaller file says nothing about a disk
log = logging.getLogger("turntable.system")


def engine_states(environments: Sequence[Environment], job: EngineJob | None = None) -> list[EngineState]:
    """All engines as the doctor sees them."""
    states = [EngineState("llamacpp", "llama.cpp", "ready", version("xllamacpp"))]
    for one in environments:
        running = job is not None and job.running and job.name == one.name
        state = "installing" if running else one.state
        states.append(EngineState(one.name, TITLES[one.name][0], state, one.versions.get(one.name, ""), one.problem))
    return states


class SystemPage:
    """What the page shows and what its buttons do. Thread-safe."""

    def __init__(
        self, jobs: EngineJobs, hardware: Hardware, pinned_bytes: int = 0, *,
        on_change: Callable[[], None] = lambda: None, every_s: float = EVERY_S,
    ) -> None:  # fmt: skip
        """pinned_bytes: RAM that may be page-locked. on_change is called whenever html() would say something new."""
        self._jobs, self._hardware, self._pinned_bytes = jobs, hardware, pinned_bytes
        self._on_change, self._every_s = on_change, every_s
        self._lock = threading.Lock()  # guards what follows, held for moments only
        self._pages = 0
        self._wake = threading.Event()
        self._watcher: threading.Thread | None = None
        self._seen: tuple[Machine, tuple[Sample, ...]] | None = None
        self._failed = ""
        self._measuring, self._was_measured = "", False
        self._engines: tuple[Any, float, list[Environment]] | None = None

    def html(self) -> str:
        """The whole page; waits for no driver. Reads the disk, so not on the event loop."""
        job = self._jobs.view()
        environments = self._environments(job)
        with self._lock:
            seen, failed, measuring = self._seen, self._failed, self._measuring
        engines = _engines(environments, job)
        if seen is None:
            return f"<h2>System</h2><p>{html.escape(failed) or 'Looking at the machine …'}</p>{engines}"
        machine, history = seen
        examination = examine(machine, engine_states(environments, job), self._pinned_bytes)
        return (
            f"<h2>System</h2>{f'<p>{html.escape(failed)}</p>' if failed else ''}{view.overview(machine, examination)}"
            f'<h3>Cards</h3>{view.cards(machine, history)}<h3>Computer</h3>{view.computer(machine, history, measuring)}'
            '<p class="note">The charts show the last five minutes; they are drawn while somebody looks at this page.</p>'
            f"{self._meaning(examination)}{engines}"
        )

    @staticmethod
    def _meaning(examination: Examination) -> str:
        return (
            f"<h3>Requirements</h3>{view.requirements(examination.requirements)}"
            "<h3>Advice</h3><p>Commands are for you to run; Turntable changes nothing of the machine. "
            f'<code>python app.py doctor</code> says the same in the terminal.</p><div class="findings">{view.advice(examination)}</div>'
        )

    def act(self, name: str, action: str) -> None:
        """A button. Raises TurntableError for what cannot be done now."""
        if name == "disk":
            if action != "measure":
                raise InvalidRequest(f"A disk cannot be told to {action!r}.")
            self._measure_disk()
        elif action == "cancel":
            self._jobs.cancel()
        elif name in TITLES:
            self._jobs.start(name, action)
        else:
            raise InstallFailed(f"There is no engine {name!r}.")

    def _environments(self, job: EngineJob | None) -> list[Environment]:
        """As they lie on the disk, looked at again when a job begins or ends, and now and then."""
        doing = job and (job.name, job.action, job.running)
        with self._lock:
            known = self._engines
        if known is not None and known[0] == doing and time.monotonic() - known[1] < ENGINES_EVERY_S:
            return known[2]
        found = self._jobs.environments.list()
        with self._lock:
            self._engines = (doing, time.monotonic(), found)
        return found

    # Watching the machine ----------------------------------------------------------------

    def shown(self, pages: int) -> None:
        """How many pages show this one; the machine is watched as long as there are any. Does not wait."""
        with self._lock:
            self._pages = pages
            self._wake.set()
            if pages and self._watcher is None:
                if self._seen is not None and time.time() - self._seen[0].at_s > OLD_S:
                    self._seen = None  # nobody looked for a while; it may be quite another machine by now
                self._watcher = threading.Thread(target=self._watch, name="system-page", daemon=True)
                self._watcher.start()

    def close(self) -> None:
        """Watch no more."""
        self.shown(0)

    def _watch(self) -> None:
        try:
            with self._hardware.watching():
                while self._is_shown():
                    machine = self._hardware.snapshot()
                    with self._lock:
                        self._seen, self._failed = (machine, self._hardware.history()), ""
                        first, self._was_measured = not self._was_measured, True
                    if first and not machine.disk.words:
                        self._measure_disk()
                    self._on_change()
                    self._wake.wait(self._every_s)
        except Exception as error:  # the page must say so, and the next one to look starts anew
            log.exception("the machine could not be read")
            with self._lock:
                self._watcher, self._failed = None, f"The machine could not be read: {type(error).__name__}: {error}"
            self._on_change()

    def _is_shown(self) -> bool:
        """Whether to go on. If not, the watcher has ended as far as others can tell."""
        with self._lock:
            self._wake.clear()
            if not self._pages:
                self._watcher = None
            return self._pages > 0

    def _measure_disk(self) -> None:
        with self._lock:
            if self._measuring.endswith("…"):
                return
            self._measuring = "Measuring …"
        threading.Thread(target=self._read_disk, name="measure-disk", daemon=True).start()
        self._on_change()

    def _read_disk(self) -> None:
        """On a thread of its own: a network disk may never answer."""
        words = ""
        try:
            file = largest_weights(self._hardware.models_dir)
            if file is None or file.stat().st_size < LEAST_MEASURED_BYTES:
                words = "Reading speed not measured: no downloaded model to read."
            else:
                self._hardware.measure_disk(file)
        except OSError as error:
            words = f"Reading speed not measured: {error.strerror or error}."
        with self._lock:
            self._measuring = words
        self._on_change()


# Engines --------------------------------------------------------------------------------------


def _engines(environments: Sequence[Environment], job: EngineJob | None) -> str:
    rows = "".join(_row(environment, job) for environment in environments)
    return (
        "<h3>Engines</h3><p>Each engine runs in processes of its own, with its own environment.</p>"
        '<div class="engines">'
        f'<section class="engine"><div class="top"><b>llama.cpp</b><span class="badge ready">ready</span>'
        f"<small>{html.escape(version('xllamacpp'))}</small></div><p>GGUF models on the processor; the bundled demo "
        f"models run on it.</p></section>{rows}</div>"
    )


def _row(environment: Environment, job: EngineJob | None) -> str:
    name = environment.name
    title, about = TITLES[name]
    mine = job if job is not None and job.name == name else None
    running = mine is not None and mine.running
    state = "installing" if running else environment.state
    facts = [f"{k} {v}" for k, v in environment.versions.items()]
    if environment.size_bytes:
        facts.append(f"{environment.size_bytes / 1e9:.1f} GB")
    if environment.tested:
        facts.append(f"tried {environment.tested}")
    badge = html.escape(WORDS[state] if not (mine and running) else f"{mine.action} …")
    parts = [
        f'<section class="engine" id="engine-{name}"><div class="top"><b>{title}</b>'
        f'<span class="badge {state}">{badge}</span><small>{html.escape(" · ".join(facts))}</small></div><p>{about}</p>'
    ]
    if mine is not None and (running or mine.error):
        parts.append(_progress(mine))
    elif environment.problem:
        parts.append(f'<p class="why">{html.escape(environment.problem)}</p>')
    parts.append(f'<div class="buttons">{_buttons(environment, running, job)}</div></section>')
    return "".join(parts)


def _progress(job: EngineJob) -> str:
    if not job.running:
        return f'<p class="why" role="alert">{html.escape(job.error)} {html.escape(job.hint)}</p>'
    lines = html.escape("\n".join(job.lines[-6:]))
    return (
        f'<p>{html.escape(job.words)}</p><div class="bar" role="progressbar" aria-valuenow="{job.fraction * 100:.0f}">'
        f'<i style="width:{job.fraction * 100:.0f}%"></i></div><pre class="lines">{lines}</pre>'
    )


def _buttons(environment: Environment, running: bool, job: EngineJob | None) -> str:
    def button(action: str, label: str, extra: str = "") -> str:
        where = f'data-panel="system" data-name="{environment.name}"'
        return f'<button type="button" {where} data-action="{action}"{extra}>{label}</button>'

    if running:
        return button("cancel", "Cancel") if job and job.action in ("install", "test") else ""
    off = " disabled" if job is not None and job.running else ""
    about = f"Install (5 GB, about {ABOUT_MINUTES[environment.name]} minutes)"
    out = []
    if environment.state in ("absent", "broken"):
        out.append(button("install", about if environment.state == "absent" else "Install again", off))
    if environment.state in ("untested", "failed", "ready"):
        out.append(button("test", "Test", off))
    if environment.state not in ("absent", "installing"):
        out.append(button("remove", "Remove", f' data-sure="Remove?"{off}'))
    return "".join(out)
