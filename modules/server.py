"""The server: build the objects, answer the port, bring up the page, stop in order.

The port answers before gradio is imported: a plain waiting page is served meanwhile
and reloads by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.handlers
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from modules.assistant import Assistant
from modules.bench import BenchJobs
from modules.building import (
    MEASURED,
    budget_of,
    build,
    cards_for_models,
    engines_for_cards,
    lock_data,
    tell_bus_speeds,
)
from modules.chats import Chats
from modules.downloads import Downloads, JobView
from modules.environments import EngineJobs, Environment, Environments, cards_of
from modules.errors import InstallFailed, SettingsError
from modules.hardware import Hardware, Machine
from modules.here import Here
from modules.lookup import Lookup
from modules.measured import History
from modules.settings import Settings
from modules.shelf import Shelf
from modules.ui.bench import BenchPanel, MeasuredPanel
from modules.ui.downloads import DownloadsPanel
from modules.ui.models import ModelsPanel
from modules.ui.plan import Planning
from modules.ui.shelf import ShelfPanel
from modules.ui.system import SystemPage

log = logging.getLogger("turntable")
MOST_BODY_BYTES = 25_000_000
CARDS_AGAIN_S = 5.0


def serve(settings: Settings) -> int:
    """Run until a signal says stop. Exit code 0, or 1 when the port or the data folder is taken."""
    lock = lock_data(settings)
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
    here = Here(hardware, environments, budget_of(settings), assistant.held_ram_bytes)

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
        "shelf": ShelfPanel(shelf, lambda: redraw("models", "shelf", "downloads")),
    }  # fmt: skip
    answerers = answerers_of(models, assistant, downloads) | {"token": panels["downloads"].token}
    live = Live(assistant, panels=panels, answerers=answerers)
    hub.append(live)
    ended = threading.Event()
    wait_for_cards(settings, assistant, hardware, ended, lambda: redraw("models"))
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


def wait_for_cards(
    settings: Settings, assistant: Assistant, hardware: Hardware, ended: threading.Event, found: Callable[[], None]
) -> None:
    """A driver may be slower than the start is patient; its cards count from when it answers. Does not wait itself."""

    def is_silent(machine: Machine) -> bool:
        return "not answering" in (machine.driver.state, *(card.state for card in machine.cards))

    def wait() -> None:
        while not ended.wait(CARDS_AGAIN_S):
            machine = hardware.snapshot()
            if not is_silent(machine):
                cards, budget = cards_for_models(settings, machine)
                assistant.kinds.update(engines_for_cards(settings, hardware))
                assistant.set_cards(cards, budget)
                log.info("the NVIDIA driver answers now: %d MB for models", budget >> 20)
                found()
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
    usable = engines_for_cards(settings, hardware)
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
