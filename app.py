"""Composition root: read the settings, build the objects, answer the port, bring up the page, stop in order.

The port answers before gradio is imported: a plain waiting page is served meanwhile
and reloads by itself. The order of the imports here is the order of need.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import logging.handlers
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modules import doctor, planner
from modules import settings as settings_module
from modules.assistant import Assistant, totals
from modules.bench import Bench, BenchJobs, Outcome, Sizes
from modules.bench import Step as BenchStep
from modules.chats import Chats
from modules.downloads import Downloads, JobView
from modules.environments import NAMES, EngineJobs, Environment, Environments, Step, cards_of
from modules.errors import InstallFailed, SettingsError, TurntableError
from modules.hardware import Hardware, Machine
from modules.here import Here
from modules.images import Images
from modules.library import Library, largest_weights
from modules.loader import Loader
from modules.lookup import Lookup
from modules.measured import History, Row, markdown, text_table
from modules.messages import Delta, Failed, Finished, Loading, Queued
from modules.presets import Presets
from modules.process import EngineKind, Limits
from modules.settings import Settings
from modules.shelf import Shelf
from modules.terminal import Asked, Terminal
from modules.ui.bench import BenchPanel, MeasuredPanel
from modules.ui.downloads import DownloadsPanel
from modules.ui.models import ModelsPanel
from modules.ui.plan import Planning
from modules.ui.shelf import ShelfPanel
from modules.ui.system import SystemPage, engine_states

log = logging.getLogger("turntable")
MOST_BODY_BYTES = 25_000_000
MEASURED = "measured.jsonl"  # in the data folder
PATIENCE_S = 20.0  # of a command for a driver; one of many cards that nobody used for a while needs that long
CARDS_AGAIN_S = 5.0


def build(settings: Settings, chats: Chats, on_change: Callable[[], None], hardware: Hardware) -> Assistant:
    """The objects without any network."""
    kinds = {"llamacpp": EngineKind("llamacpp", environment=(("OMP_WAIT_POLICY", "PASSIVE"),))}
    kinds |= {name: EngineKind(name, where=where) for name, where in settings.extra_engines}
    kinds |= engines_for_cards(settings)
    limits = Limits(load_s=settings.load_timeout_s, stall_s=settings.stall_timeout_s)
    vram = settings.vram_budget_bytes or hardware.snapshot().card_budget_bytes
    loader = Loader(
        kinds, settings.memory_budget_bytes, vram_budget_bytes=vram, limits=limits, on_change=on_change
    )
    presets = Presets(settings.preset_dirs, [name for name, _ in settings.extra_engines])
    library = Library(settings.models_dir, settings.bundled_dir)
    images = Images(settings.data_dir / "images")
    return Assistant(presets, library, loader, chats, images, kinds, settings.threads)


def engines_for_cards(settings: Settings) -> dict[str, EngineKind]:
    """The kinds of the ExLlama engines whose environments are installed."""
    environments = Environments()
    usable = [found.name for found in map(environments.get, NAMES) if found.usable]
    kinds = {name: environments.kind(name) for name in usable}
    if "exllamav2" in kinds:  # ExLlamaV3 keeps no copies
        kinds["exllamav2"] = dataclasses.replace(kinds["exllamav2"], copies_bytes=settings.pinned_memory_bytes)
    return kinds


def set_up_logging(settings: Settings) -> None:
    """To stderr in short, to a file in the data folder in full; no conversation is ever logged."""
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    root = logging.getLogger("turntable")
    root.setLevel(settings.log_level.upper())
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(logging.Formatter("%(levelname).1s %(message)s"))
    file = logging.handlers.RotatingFileHandler(
        settings.data_dir / "turntable.log", maxBytes=2_000_000, backupCount=2, encoding="utf-8"
    )
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if settings.command in ("ask", "bench"):
        terminal.setLevel("ERROR")
    for handler in (terminal, file):
        root.addHandler(handler)


def ask(settings: Settings) -> int:
    """`ask PRESET TEXT`: print an answer, streamed, by the path that the page uses. Nothing is kept."""
    text = sys.stdin.read() if settings.ask_text == "-" else settings.ask_text
    hardware = Hardware(settings.models_dir)
    assistant = build(settings, Chats(":memory:"), lambda: None, hardware)
    try:
        images = [assistant.add_image(_read(path)).id for path in settings.ask_images]
        job = assistant.reply(None, text, images, settings.ask_preset)
        try:
            return _print_answer(assistant, job, settings.ask_json)
        except KeyboardInterrupt:
            assistant.stop(job.chat)
            return 130
    finally:
        assistant.close()
        hardware.close()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"--image {path}: {error.strerror}.", hint="Give the path of a picture.") from error


def _print_answer(assistant: Assistant, job: Any, as_json: bool) -> int:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    dim, plain = ("\x1b[2m", "\x1b[0m") if colour else ("", "")
    channel, failed, finished = "", None, None
    for event in job.follow():
        if isinstance(event, Failed):
            failed = event
        elif isinstance(event, Finished):
            finished = event
        elif isinstance(event, Delta) and not as_json:
            if event.channel != channel:
                start = dim if event.channel == "reasoning" else plain
                print(("\n\n" if channel else "") + start, end="")
                channel = event.channel
            print(_printable(event.text), end="", flush=True)
        elif isinstance(event, Loading | Queued) and sys.stderr.isatty():
            print("\r\x1b[K" + _progress_words(event), end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if not as_json:
        print(plain)
    else:
        message = job.message
        print(json.dumps({
            "preset": job.preset.name, "variant": job.variant, "text": message.text, "reasoning": message.reasoning,
            "reason": finished.reason if finished else "error", **totals(message.counts, message.timings),
            "error": message.error,
        }, ensure_ascii=False))  # fmt: skip
    if failed:
        print(f"turntable: {failed.message} {failed.hint}".rstrip(), file=sys.stderr)
        return 1
    return 0


def _printable(text: str) -> str:
    """A model's text must not drive the terminal: control characters other than line ends and tabs are shown."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _progress_words(event: Loading | Queued) -> str:
    if isinstance(event, Queued):
        return f"waiting, place {event.place}"
    return f"{event.stage} {event.fraction:.0%} of {event.total_bytes / 1e6:.0f} MB"


def run_terminal(settings: Settings) -> int:
    """`download`, `models` and `plan`: what the pages do with models, in the terminal."""
    library = Library(settings.models_dir, settings.bundled_dir)
    downloads = Downloads(library)
    terminal = Terminal(Presets(settings.preset_dirs), library, downloads, lambda text: print(text, end="", flush=True))
    hardware = Hardware(settings.models_dir, limit_s=PATIENCE_S)
    asked = Asked(settings.what, settings.file, settings.projector, settings.context, settings.cache, settings.as_json)
    try:
        if settings.command == "models":
            return terminal.models()
        place = Here(hardware, Environments(cards=cards_of(hardware))).place()
        if settings.vram_budget_bytes:
            place = dataclasses.replace(place, cards=(planner.Card(settings.vram_budget_bytes),))
        if settings.command == "download":
            return terminal.download(asked, sys.stdout.isatty(), place)
        return terminal.plan(asked, place)
    finally:
        downloads.close()
        hardware.close()


def run_doctor(settings: Settings) -> int:
    """`doctor`: this machine beside what Turntable needs; exit code 1 where something does not work as it is."""
    hardware, environments = Hardware(settings.models_dir, limit_s=PATIENCE_S), Environments()
    try:
        tell_bus_speeds(environments, hardware)
        machine = examined(settings, hardware)
    finally:
        hardware.close()
    examination = doctor.examine(machine, engine_states(environments.list()), settings.pinned_memory_bytes)
    if settings.as_json:
        print(json.dumps({**examination.to_dict(), "machine": dataclasses.asdict(machine)}, indent=1))
    else:
        plain = not _can_print(doctor.MARKS[doctor.OK] + doctor.MARKS[doctor.PROBLEM] + "→°")
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        width = min(120, shutil.get_terminal_size((100, 24)).columns)
        print(doctor.format_report(machine, examination, colour=colour, ascii_only=plain, width=width), end="")
    return doctor.exit_code(examination)


def examined(settings: Settings, hardware: Hardware) -> Machine:
    """Two looks, since load is of the time between; what lies between them is the disk's reading speed."""
    before = hardware.snapshot(0)
    file = None if before.disk.words else largest_weights(settings.models_dir)
    if file is None:
        time.sleep(0.5)
    else:
        try:
            hardware.measure_disk(file)
        except OSError as error:
            log.warning("The disk's reading speed was not measured: %s", error)
    return hardware.snapshot(0)


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def tell_bus_speeds(environments: Environments, hardware: Hardware) -> None:
    """What the engines' self-tests measured of each card's link; the fastest, where several did."""
    speeds: dict[str, float] = {}
    for found in map(environments.get, NAMES):
        for card, speed in found.bus_speeds.items():
            speeds[card] = max(speed, speeds.get(card, 0.0))
    for card, speed in speeds.items():
        hardware.set_bus_speed(card, speed)


def run_bench(settings: Settings) -> int:
    """`bench`: measure what is ready and add it to the table, or show the table. 1 when something was not measured."""
    asked, history = settings.bench, History(settings.data_dir / MEASURED)
    if asked.history:
        found = history.read()
        if found.unreadable:
            print(f"turntable: {found.unreadable} lines of {history.path} cannot be read.", file=sys.stderr)
        wanted = [r for r in found.rows if not asked.names or {r.preset, f"{r.preset}/{r.variant}"} & {*asked.names}]
        print_rows(wanted, settings, {"unreadable": found.unreadable})
        return 0
    try:
        _lock(settings).close()
    except SettingsError:
        words = "Turntable is running with this data folder; what it does meanwhile falsifies the figures."
        print(f"turntable: {words} Its System page can measure as well.", file=sys.stderr)
    hardware = Hardware(settings.models_dir, limit_s=PATIENCE_S)
    assistant = build(settings, Chats(":memory:"), lambda: None, hardware)
    bench = Bench(assistant, hardware, history)
    outcome = Outcome()
    try:
        targets = bench.targets(asked.names)
        # On a thread, because Ctrl-C must reach the lease that waits, and not cut through it.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            sizes = Sizes(asked.prompt_tokens, asked.tokens, asked.repeats)
            running = pool.submit(bench.run, targets, sizes, bench_teller())
            try:
                outcome = running.result()
            except KeyboardInterrupt:
                bench.cancel()
                outcome = running.result()
    finally:
        assistant.close()
        hardware.close()
    print("\r\x1b[K" if sys.stderr.isatty() else "", end="", file=sys.stderr, flush=True)
    print_rows(outcome.rows, settings, {"failures": [dataclasses.asdict(one) for one in outcome.failures]})
    for failure in outcome.failures:
        print(f"turntable: {failure.title}: {failure.error} {failure.hint}".rstrip(), file=sys.stderr)
    if outcome.cancelled:
        print("turntable: Cancelled; the rows above are kept.", file=sys.stderr)
        return 130
    return 1 if outcome.failures else 0


def bench_teller() -> Callable[[BenchStep], None]:
    """Progress on stderr: one line that changes on a terminal, else a line for each variant."""
    live, said = sys.stderr.isatty(), [0]

    def tell(step: BenchStep) -> None:
        head = f"{step.number} of {step.total}: {_printable(step.title)}"
        if live:
            line = f"{step.fraction:4.0%}  {head} {step.words}"
            width = shutil.get_terminal_size().columns - 1
            print("\r\x1b[K" + line[:width], end="", file=sys.stderr, flush=True)
        elif step.number != said[0]:
            said[0] = step.number
            print(head, file=sys.stderr, flush=True)

    return tell


def print_rows(rows: Sequence[Row], settings: Settings, more: dict[str, Any]) -> None:
    """The table as a person asked for it: text, one JSON object, Markdown, or Markdown in a file beside the text."""
    asked = settings.bench
    if asked.markdown not in ("", "-"):
        Path(asked.markdown).write_text(markdown(rows), encoding="utf-8")
    if settings.as_json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], **more}, ensure_ascii=False))
    elif asked.markdown == "-":
        print(markdown(rows), end="")
    elif rows:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        print(_printable(text_table(rows, width)), end="")
    else:
        print("Nothing has been measured.")


def run_engines(settings: Settings) -> int:
    """`engines`: list them, or install, test or remove one, with progress."""
    environments = Environments(cards=cards_of(Hardware(settings.models_dir, limit_s=PATIENCE_S)))
    if settings.action == "list":
        for found in environments.list():
            versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
            size = f"{found.size_bytes / 1e9:.1f} GB" if found.size_bytes else ""
            print("  ".join(filter(None, [f"{found.name:10s} {found.state:10s}", versions, size, found.problem])))
        return 0
    if not settings.what:
        raise SettingsError(f"engines {settings.action}: name the engine.", hint="exllamav2 or exllamav3.")
    if settings.action == "remove":
        return remove_engine(environments, settings)
    clear = "\r\x1b[K" if sys.stdout.isatty() else ""
    said = [""]

    def tell(step: Step) -> None:
        if step.words != said[0]:
            said[0] = step.words
            print(f"{clear}{step.fraction:4.0%}  {step.words}", flush=True)
        if step.detail.startswith(("ok: ", "NOT OK: ")):
            print(f"{clear}      {_printable(step.detail)}", flush=True)
        elif clear:
            line = f"{step.fraction:4.0%}  {_printable(step.detail or step.words)}"
            print(clear + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)

    try:
        change = environments.install if settings.action == "install" else environments.test
        found = change(settings.what, tell)
    except KeyboardInterrupt:
        print(f"{clear}Cancelled. The same command goes on where it stopped.")
        return 130
    print(f"{clear}{found.name}: {found.state}{f', {found.problem}' if found.problem else ''}")
    if settings.action == "test" and found.state == "untested":
        return 3  # there is no card to try it on
    return 0 if found.usable else 1


def remove_engine(environments: Environments, settings: Settings) -> int:
    """Asks a person first; a script says what it wants by calling this."""
    found = environments.get(settings.what, sized=True)
    if found.state == "absent":
        print(f"{found.name} is not installed.")
        return 0
    if sys.stdin.isatty() and not settings.yes:
        answer = input(f"Delete {found.folder}? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            return 1
    print(f"{found.name} removed, {environments.remove(found.name) / 1e9:.1f} GB freed.")
    return 0


# The server ---------------------------------------------------------------------------


def serve(settings: Settings) -> int:
    """Run until a signal says stop. Exit code 0, or 1 when the port or the data folder is taken."""
    lock = _lock(settings)
    listener = _listen(settings.port)
    from modules.gate import Gate, GateRules
    from modules.live import Live

    chats = Chats(settings.data_dir / "chats.db")
    broken = chats.recover()
    if broken:
        log.warning("%d answers were cut off when Turntable ended last time; they are marked", broken)
    hub: list[Live] = []
    built: list[Assistant] = []
    hardware = Hardware(settings.models_dir, lambda: built[0].engine_pids() if built else ())
    assistant = build(settings, chats, lambda: hub[0].changed() if hub else None, hardware)
    built.append(assistant)
    assistant.images.remove_unused(chats.used_images(), older_than_s=86400, now_s=time.time())
    environments = Environments(cards=cards_of(hardware))
    tell_bus_speeds(environments, hardware)
    here = Here(hardware, environments)

    def redraw(*names: str) -> None:
        for name in names if hub else ():
            hub[0].panel_changed(name)

    def moved(view: JobView) -> None:
        redraw("downloads", *(("models", "shelf") if view.state in ("done", "cancelled") else ()))

    def taken(found: Environment) -> None:
        take_engine(found, assistant, settings, hardware)
        here.forget()
        redraw("models")  # what can be run is another now

    jobs = EngineJobs(environments, on_change=lambda: redraw("system"), on_done=taken)
    system = SystemPage(jobs, hardware, settings.pinned_memory_bytes, on_change=lambda: redraw("system"))
    downloads = Downloads(assistant.library, on_change=moved)
    shelf = Shelf(assistant.library, assistant.presets, chats.last_used, downloads.is_writing)
    models = ModelsPanel(assistant, here.place, lambda: redraw("models", "shelf"))
    bench = build_bench(assistant, hardware, settings, redraw)
    panels: dict[str, Any] = {
        "system": system, "bench": BenchPanel(bench), "measured": MeasuredPanel(bench.history),
        "downloads": DownloadsPanel(downloads, assistant.presets), "models": models,
        "shelf": ShelfPanel(shelf, lambda: redraw("models", "shelf")),
    }  # fmt: skip
    answerers = answerers_of(models, assistant, downloads) | {"token": panels["downloads"].token}
    live = Live(assistant, panels=panels, answerers=answerers)
    hub.append(live)
    ended = threading.Event()
    wait_for_cards(settings, assistant, hardware, ended)
    install_engine(jobs, settings)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    page = Page(settings, assistant, live, address)
    gate = Gate(page.application(), GateRules(max_body_bytes=MOST_BODY_BYTES))

    server = _server(gate)
    log.info("Turntable is on its way at %s", address)
    try:
        server.run(sockets=[listener])
    finally:
        ended.set()
        system.close()
        jobs.close()
        bench.close()
        downloads.close()
        shelf.close()
        assistant.close()
        hardware.close()
        lock.close()
        log.info("Turntable has ended")
    return 0


def _server(gate: Any) -> Any:
    """uvicorn, with limits, and signals that end it in order."""
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn sends itself the signal again once it has ended, which would skip what ends the engines."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for sig, handler in before.items():
                    signal.signal(sig, handler)

    return Server(uvicorn.Config(
        gate, log_level="error", access_log=False, ws="websockets-sansio", ws_max_size=4_000_000, lifespan="on",
        timeout_graceful_shutdown=3, server_header=False, date_header=False, http="h11",
        h11_max_incomplete_event_size=65536,
    ))  # fmt: skip


def wait_for_cards(settings: Settings, assistant: Assistant, hardware: Hardware, ended: threading.Event) -> None:
    """A driver may be slower than the start is patient; its cards count from when it answers. Does not wait itself."""

    def is_silent(machine: Machine) -> bool:
        return "not answering" in (machine.driver.state, *(card.state for card in machine.cards))

    def wait() -> None:
        while not ended.wait(CARDS_AGAIN_S):
            machine = hardware.snapshot()
            if not is_silent(machine):
                assistant.set_vram_budget(settings.vram_budget_bytes or machine.card_budget_bytes)
                log.info("the NVIDIA driver answers now: %d MB for models", machine.card_budget_bytes >> 20)
                return

    if is_silent(hardware.snapshot()):
        log.warning("the NVIDIA driver or a card does not answer; Turntable starts without it")
        threading.Thread(target=wait, name="late-cards", daemon=True).start()


def build_bench(
    assistant: Assistant, hardware: Hardware, settings: Settings, redraw: Callable[[str], None]
) -> BenchJobs:
    """The measurements that are started from the page."""
    history = History(settings.data_dir / MEASURED)
    return BenchJobs(
        assistant, hardware, history, lambda: redraw("bench"), on_row=lambda row: redraw("measured")
    )  # fmt: skip


def take_engine(found: Environment, assistant: Assistant, settings: Settings, hardware: Hardware) -> None:
    """After an installation, test or removal: the engine can be used, or not any more, without a new start."""
    log.info("engine %s: %s %s", found.name, found.state, found.problem)
    tell_bus_speeds(Environments(), hardware)
    usable = engines_for_cards(settings)
    if found.name in usable:
        assistant.kinds[found.name] = usable[found.name]
    else:
        assistant.kinds.pop(found.name, None)


def answerers_of(models: ModelsPanel, assistant: Assistant, downloads: Downloads) -> dict[str, Any]:
    """What a single page may ask: the list for another machine, a repository, the plan of a model."""
    planning = Planning(assistant, Lookup(assistant.presets, downloads), models.place)
    return {"models": models.ask, "look": planning.look, "plan": planning.plan}


def install_engine(jobs: EngineJobs, settings: Settings) -> None:
    """On a machine with a card that ExLlamaV2 runs on, set it up in the background at the first start.

    One that was cut off is taken up again; one that a person removed or cancelled, or that failed, is left alone.
    """
    if not settings.install_engines or not jobs.environments.is_wanted("exllamav2"):
        return
    if not jobs.environments.has_driver():
        return  # most machines without a card: nothing to say
    try:
        jobs.environments.check("exllamav2")
        jobs.start("exllamav2", "install")
        log.info("ExLlamaV2 is being installed in the background; the System page shows how far it is")
    except InstallFailed as error:
        log.info("ExLlamaV2 was not installed: %s %s", error, error.hint)


def _listen(port: int) -> socket.socket:
    # The protocol is named because asyncio switches Nagle off only for sockets that say TCP: 40 ms at every first word.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"Port {port} is in use: {error.strerror}.", hint="Choose another one with --port."
        ) from error
    listener.listen(256)
    listener.setblocking(False)
    return listener


def _lock(settings: Settings) -> Any:
    """One server for one data folder: two would write the same conversations."""
    file = (settings.data_dir / "lock").open("w")
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise SettingsError(
                f"Another Turntable uses the data folder {settings.data_dir}.",
                hint="Use that one, or choose another folder with --data-dir.",
            ) from error
    return file


class Page:
    """The ASGI application: our own routes at once, gradio's page as soon as it is there."""

    def __init__(self, settings: Settings, assistant: Assistant, live: Any, address: str) -> None:
        self._settings, self._assistant, self._live, self._address = settings, assistant, live, address
        self._inner: Any = None
        self._failed = ""
        self._leave: contextlib.AsyncExitStack | None = None
        self._began = time.monotonic()

    def application(self) -> Any:
        """Everything that the gate stands before."""
        from starlette.applications import Starlette
        from starlette.routing import Mount, Route

        from modules.assets import asset_routes

        routes = [
            *self._live.routes(), *asset_routes(), Route("/ready", self._ready), Mount("/", app=self._page),
        ]  # fmt: skip
        return Starlette(routes=routes, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[None]:
        self._live.start()
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._build, args=(loop,), name="build-page", daemon=True).start()
        async with contextlib.AsyncExitStack() as stack:
            self._leave = stack
            yield
            self._leave = None
            await self._live.close()

    def _build(self, loop: asyncio.AbstractEventLoop) -> None:
        """On a thread: importing gradio takes seconds, and the port answers meanwhile."""
        try:
            from modules.ui import build_page

            inner = build_page(self._assistant, self._settings)
            asyncio.run_coroutine_threadsafe(self._take(inner), loop).result()
        except Exception as error:
            log.exception("the page could not be built")
            self._failed = f"{type(error).__name__}: {error}"

    async def _take(self, inner: Any) -> None:
        if self._leave is not None:
            await self._leave.enter_async_context(inner.router.lifespan_context(inner))
            self._inner = inner
            log.info("the page is ready at %s (%.1f s)", self._address, time.monotonic() - self._began)

    async def _ready(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse({"ready": self._inner is not None, "failed": self._failed})

    async def _page(self, scope: Any, receive: Any, send: Any) -> None:
        if self._inner is not None:
            # Mount has put "/" into root_path's place; gradio wants to believe that it stands alone.
            await self._inner({**scope, "root_path": ""}, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013})
            return
        from modules.assets import waiting_page

        await waiting_page(self._failed)(scope, receive, send)


def main(arguments: list[str]) -> int:
    """Entry point; errors a person can meet end in one sentence and exit code 2 or 1."""
    try:
        settings = settings_module.read(arguments)
        set_up_logging(settings)
        if settings.command == "engines":
            return run_engines(settings)
        if settings.command == "bench":
            return run_bench(settings)
        if settings.command in ("download", "models", "plan"):
            return run_terminal(settings)
        if settings.command == "doctor":
            return run_doctor(settings)
        return ask(settings) if settings.command == "ask" else serve(settings)
    except SettingsError as error:
        print(f"turntable: {error} {error.hint}".rstrip(), file=sys.stderr)
        return 2
    except TurntableError as error:
        print(f"turntable: {error} {error.hint}".rstrip(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"turntable: {error}. Look at the rights and the free space of the data folder.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
