"""One WebSocket to each page: answers in progress, status, conversations; and the routes for pictures.

Knows frames and pages, not how an answer is made. All of it runs on the event loop;
threads of the assistant only wake it. The text of an answer is rendered once, and
the same frame goes to every page that shows the conversation. A page that reads too
slowly is given the whole state again instead of a growing backlog.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from modules import render
from modules.assistant import Assistant, Job, totals
from modules.chats import ChatMessage
from modules.errors import ImageTooLarge, InvalidRequest, TurntableError
from modules.messages import Delta, Failed, Finished, Loading, Prefill, Queued

PAGE_MESSAGES = 24
TICK_S = 0.05  # at most 20 frames a second for one answer
MOST_ASKED = 4  # questions of one page that wait for their answer; the hub is asked for some
MOST_ENDED = 256
MOST_WAITING = 64  # frames kept for a slow page before it is given the whole state instead
SLOW_S = 60.0
log = logging.getLogger("turntable.live")


class _Thought:
    """A thought as it grows, with the methods of render.Stream. It is shown as it was written: 6*7 is no emphasis."""

    def __init__(self) -> None:
        self._shown, self._new = "", ""

    def feed(self, piece: str) -> None:
        self._new += piece

    def patch(self) -> render.Patch | None:
        if not self._new:
            return None
        fresh, self._new = _escaped(self._new), ""
        first, self._shown = not self._shown, self._shown + fresh
        return render.Patch(0, [_thought(fresh)]) if first else render.Patch(1, [], fresh)

    finish = patch

    def snapshot(self) -> list[str]:
        return [_thought(self._shown)] if self._shown else []


def _escaped(text: str) -> str:
    """Escaped text without the block that render.plain puts around it."""
    return render.plain(text).removeprefix('<div class="plain">').removesuffix("</div>")


def _thought(html: str) -> str:
    return f'<div class="plain" data-open>{html}</div>'


class _Answer:
    """The rendering of one job, shared by all pages that show it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._cursor = 0
        self._streams: dict[str, render.Stream | _Thought] = {"text": render.Stream(), "reasoning": _Thought()}
        self._stage: dict[str, Any] | None = {"stage": "starting"}
        self._tokens = 0
        self._first_s = 0.0
        self._began = time.monotonic()
        self._prompt = 0
        self.ended = False

    def frame(self) -> str | None:
        """What is new since the last call, as a frame; None when nothing is."""
        events, self._cursor, self.ended = self.job.since(self._cursor)
        if not events and not self.ended:
            return None
        stage = self._stage
        for event in events:
            self._take(event)
        body: dict[str, Any] = {"t": "job", "chat": self.job.chat, "m": self.job.message.id}
        for channel, stream in self._streams.items():
            patch = stream.finish() if self.ended else stream.patch()
            if patch is not None:
                body[channel] = {"keep": patch.keep, "blocks": patch.blocks, "append": patch.append}
        if self._stage != stage:
            body["stage"] = self._stage
        body["speed"] = self.speed()
        return json.dumps(body)

    @property
    def shown(self) -> bool:
        """Has the first piece of text gone out?"""
        return self._first_s > 0

    def speed(self) -> dict[str, Any]:
        """Tokens per second so far, time to first token, context used."""
        spent = time.monotonic() - self._first_s if self._first_s else 0.0
        return {
            "tps": round(self._tokens / spent, 1) if spent > 0.2 else 0, "tokens": self._tokens,
            "first_s": round(self._first_s - self._began, 3) if self._first_s else 0,
            "used": self._prompt + self._tokens, "context": self.job.context,
        }  # fmt: skip

    def snapshot(self) -> dict[str, Any]:
        """The whole answer as shown now, for a page that joins."""
        return {
            "text": self._streams["text"].snapshot(), "reasoning": self._streams["reasoning"].snapshot(),
            "stage": self._stage, "speed": self.speed(),
        }  # fmt: skip

    def _take(self, event: Any) -> None:
        if isinstance(event, Delta):
            self._first_s = self._first_s or time.monotonic()
            self._tokens += event.tokens
            self._streams[event.channel].feed(event.text)
            self._stage = None
        elif isinstance(event, Queued):
            self._stage = {"stage": "queued", "place": event.place}
        elif isinstance(event, Loading):
            self._stage = {"stage": event.stage, "done": event.done_bytes, "total": event.total_bytes}
        elif isinstance(event, Prefill):
            self._prompt = event.total
            if not self._first_s:
                self._stage = {"stage": "prompt", "done": event.done, "total": event.total}
        elif isinstance(event, Finished | Failed):
            self._stage = None


class Panel(Protocol):
    """A part of the page that the server draws: the engines, the downloads."""

    def html(self) -> str:
        """What it shows; blocks."""

    def act(self, name: str, action: str) -> None:
        """A button was pressed; raises TurntableError."""


@runtime_checkable
class WatchedPanel(Panel, Protocol):
    """A panel that works only while it is on a screen."""

    def shown(self, pages: int) -> None:
        """How many pages show it now. Must not wait."""


Answerer = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # blocks; raises TurntableError, or ValueError for nonsense


async def _received(socket: WebSocket) -> str | None:
    """The next line of a page; None once we have closed its socket ourselves. Raises WebSocketDisconnect."""
    try:
        return await socket.receive_text()
    except RuntimeError:  # closed by close() or by the writer, while a line of the page was being handled
        return None


class _Page:
    """One browser tab."""

    def __init__(self, socket: WebSocket) -> None:
        self.socket = socket
        self.shows: dict[str, str | None] = {}  # preset -> conversation
        self.panels: set[str] = set()  # those that it shows
        self.asked = 0  # questions under way
        self.outbox: asyncio.Queue[str] = asyncio.Queue(MOST_WAITING)
        self.behind_since_s = 0.0

    def push(self, frame: str) -> None:
        try:
            self.outbox.put_nowait(frame)
        except asyncio.QueueFull:
            self.behind_since_s = self.behind_since_s or time.monotonic()

    def shows_chat(self, chat: str) -> bool:
        return chat in self.shows.values()


class Live:
    """The hub. start() is called on the event loop before the first page comes."""

    def __init__(
        self, assistant: Assistant, most_image_bytes: int = 20_000_000, panels: Mapping[str, Panel] | None = None,
        answerers: Mapping[str, Answerer] | None = None,
    ) -> None:  # fmt: skip
        """panels are drawn for every page alike; answerers answer one page's question, such as what a model takes."""
        self._assistant, self._most_image_bytes, self._panels = assistant, most_image_bytes, panels or {}
        self._answerers = answerers or {}
        self._panels_changed: set[str] = set()
        self._pages: set[_Page] = set()
        self._answers: dict[str, _Answer] = {}
        self._ended: dict[int, tuple[str, int]] = {}  # note and context of the latest answers, which are not stored
        self._loop: asyncio.AbstractEventLoop | None = None
        self._poked = False
        self._timer: asyncio.TimerHandle | None = None
        self._chats_changed = False
        self._flushed_s = 0.0
        self._status = ""
        self._tasks: set[asyncio.Task[None]] = set()

    def routes(self) -> list[BaseRoute]:
        return [
            WebSocketRoute("/live", self.page),
            Route("/upload", self.upload, methods=["POST"]),
            Route("/image/{id}", self.image),
        ]

    def start(self) -> None:
        """Take the running event loop and listen to the assistant."""
        self._loop = asyncio.get_running_loop()
        self._assistant.on_job = self._job_changed
        self._assistant.on_chats = self._list_changed

    async def close(self) -> None:
        """Say goodbye to every page: an open socket would hold up the end of the server."""
        for page in list(self._pages):
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await page.socket.close(1001)

    # Threads of the assistant come in here ------------------------------------------

    def changed(self) -> None:
        """Something of the loader changed."""
        self._wake()

    def panel_changed(self, name: str) -> None:
        """Something that this panel shows changed."""
        self._panels_changed.add(name)
        self._wake()

    def _job_changed(self, job: Job) -> None:
        self._wake()

    def _list_changed(self) -> None:
        self._chats_changed = True
        self._wake()

    def _wake(self) -> None:
        if self._poked or self._loop is None:
            return
        self._poked = True
        with contextlib.suppress(RuntimeError):  # the loop is closing
            self._loop.call_soon_threadsafe(self._soon)

    # On the event loop ---------------------------------------------------------------

    def _soon(self) -> None:
        """The first word and the end are shown at once; what lies between goes out at most once a tick."""
        assert self._loop is not None
        self._poked = False
        known = {answer.job.id for answer in self._answers.values()}
        urgent = any(a.job.done or not a.shown for a in self._answers.values()) or any(
            job.id not in known for job in self._assistant.jobs()
        )
        wait = self._flushed_s + TICK_S - time.monotonic()
        if urgent or wait <= 0:
            self._flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(wait, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._flushed_s = time.monotonic()
        for job in self._assistant.jobs():
            if job.id not in self._answers:
                self._answers[job.id] = _Answer(job)
        for answer in list(self._answers.values()):
            frame = answer.frame()
            if frame is not None:
                self._to_chat(answer.job.chat, frame)
            if answer.ended:
                self._end(answer)
        self._send_status()
        if self._chats_changed:
            self._chats_changed = False
            self._to_all(self._list_frame())
        changed, self._panels_changed = self._panels_changed, set()
        if changed and self._loop is not None:
            self._tasks.add(task := self._loop.create_task(self._send_panels(changed)))
            task.add_done_callback(self._tasks.discard)

    async def _send_panels(self, names: set[str]) -> None:
        for name in names & set(self._panels):
            pages = [page for page in self._pages if name in page.panels]
            frame = await self._panel_frame(name) if pages else ""
            for page in pages:
                page.push(frame)

    async def _panel_frame(self, name: str) -> str:
        return json.dumps({"t": "panel", "name": name, "html": await run_in_threadpool(self._panels[name].html)})

    def _end(self, answer: _Answer) -> None:
        """The last frame. The pages have the text already; drawing a long one once more would stall them."""
        job = answer.job
        del self._answers[job.id]
        self._ended[job.message.id] = (job.note, job.context)
        while len(self._ended) > MOST_ENDED:
            del self._ended[next(iter(self._ended))]
        message = self._message(job.message, job, with_text=False)
        message |= {"html": bool(job.text()), "think": bool(job.text("reasoning"))}
        self._to_chat(job.chat, json.dumps({"t": "end", "chat": job.chat, "message": message, "streamed": True}))

    def _to_chat(self, chat: str, frame: str) -> None:
        for page in self._pages:
            if page.shows_chat(chat):
                page.push(frame)

    def _to_all(self, frame: str) -> None:
        for page in self._pages:
            page.push(frame)

    def _send_status(self) -> None:
        status = self._status_frame()
        if status != self._status:
            self._status = status
            self._to_all(status)

    def _status_frame(self) -> str:
        view = self._assistant.loader_view()
        loading = None
        if view.loading is not None:
            p = view.progress
            loading = {
                "name": self._assistant.label(view.loading), "stage": p.stage if p else "starting",
                "done": p.done_bytes if p else 0, "total": p.total_bytes if p else 0,
            }  # fmt: skip
        return json.dumps({
            "t": "status", "loading": loading, "waiting": view.waiting,
            "models": [{"name": self._assistant.label(m.spec), "busy": m.leases} for m in view.models],
            "used": view.used_bytes, "budget": view.budget_bytes,
        })  # fmt: skip

    def _list_frame(self) -> str:
        chats = [{"id": c.id, "title": c.title, "preset": c.preset} for c in self._assistant.conversations()]
        return json.dumps({"t": "chats", "chats": chats})

    # One page ------------------------------------------------------------------------

    async def page(self, socket: WebSocket) -> None:
        """The WebSocket of one page, from its hello to its end."""
        await socket.accept()
        page = _Page(socket)
        self._pages.add(page)
        writer = asyncio.create_task(self._write(page))
        try:
            page.push(self._status_frame())
            page.push(await run_in_threadpool(self._list_frame))
            while (line := await _received(socket)) is not None:
                await self._handle(page, line)
        except WebSocketDisconnect:
            pass
        finally:
            self._pages.discard(page)
            for name in page.panels:
                self._tell_shown(name)
            writer.cancel()

    async def _write(self, page: _Page) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the reader notices the same end
            while True:
                await page.socket.send_text(await page.outbox.get())
                if not page.behind_since_s:
                    continue
                if time.monotonic() - page.behind_since_s > SLOW_S:
                    await page.socket.close(1013)
                    return
                if page.outbox.empty():
                    page.behind_since_s = 0.0
                    for preset in list(page.shows):
                        await self._open(page, preset, page.shows[preset])

    async def _handle(self, page: _Page, line: str) -> None:
        where: dict[str, Any] = {}
        try:
            said = json.loads(line)
            if not isinstance(said, dict):
                raise InvalidRequest("The page sent something that is not a command.")
            where = said
            action = {
                "open": self._do_open, "send": self._do_send, "stop": self._do_stop,
                "delete": self._do_delete, "earlier": self._do_earlier, "panel": self._do_panel,
                "act": self._do_act, "ask": self._do_ask,
            }.get(str(where.get("do")))  # fmt: skip
            if action is None:
                raise InvalidRequest(f"The page sent an unknown command {where.get('do')!r}.")
            await action(page, where)
        except TurntableError as error:
            self._refuse(page, where, error)
        except (ValueError, TypeError, KeyError) as error:
            log.debug("a page sent nonsense: %s", error)
            self._refuse(page, where, InvalidRequest("The page sent a broken command."))

    @staticmethod
    def _refuse(page: _Page, said: Mapping[str, Any], error: TurntableError) -> None:
        frame = {"t": "error", "preset": said.get("preset"), "ref": said.get("ref"), **error.to_wire()}
        page.push(json.dumps(frame))

    async def _do_open(self, page: _Page, said: dict[str, Any]) -> None:
        await self._open(page, str(said["preset"]), said.get("chat") or None)

    async def _open(self, page: _Page, preset: str, chat: str | None) -> None:
        page.shows[preset] = chat
        frame: dict[str, Any] = {"t": "chat", "preset": preset, "chat": chat, "messages": [], "earlier": False}
        if chat is not None:
            try:
                frame |= await run_in_threadpool(self._read, chat)
                await run_in_threadpool(self._assistant.chats.get, chat)
            except TurntableError:
                page.shows[preset] = None
                raise
            if any(m["state"] == "running" for m in frame["messages"]) and self._assistant.job(chat) is None:
                # It ended while it was read, and its last frame went out before this one.
                frame |= await run_in_threadpool(self._read, chat)
            self._attach(frame, chat)
        page.push(json.dumps(frame))

    def _read(self, chat: str) -> dict[str, Any]:
        """The last messages, rendered, and whether there are earlier ones."""
        found = self._assistant.messages(chat, None, PAGE_MESSAGES + 1)
        shown = [self._message(m) for m in found[-PAGE_MESSAGES:]]
        return {"messages": shown, "earlier": len(found) > PAGE_MESSAGES}

    def _attach(self, frame: dict[str, Any], chat: str) -> None:
        """The answer in progress as shown now; later frames continue from exactly here."""
        job = self._assistant.job(chat)
        if job is None:
            return
        answer = self._answers.get(job.id)
        if answer is None:
            answer = self._answers[job.id] = _Answer(job)
        frame["live"] = {"m": job.message.id, **answer.snapshot()}

    async def _do_send(self, page: _Page, said: dict[str, Any]) -> None:
        preset, text = str(said["preset"]), str(said.get("text", ""))
        images = [str(image) for image in said.get("images") or []]
        job = await run_in_threadpool(self._assistant.reply, said.get("chat") or None, text, images, preset)
        page.shows[preset] = job.chat
        page.push(json.dumps({"t": "sent", "ref": said.get("ref"), "preset": preset, "chat": job.chat}))
        for other in self._pages:
            if other.shows_chat(job.chat):
                await self._open(other, preset, job.chat)
        self._wake()

    async def _do_stop(self, page: _Page, said: dict[str, Any]) -> None:
        await run_in_threadpool(self._assistant.stop, str(said["chat"]))

    async def _do_delete(self, page: _Page, said: dict[str, Any]) -> None:
        chat = str(said["chat"])
        await run_in_threadpool(self._assistant.delete, chat)
        for other in self._pages:
            for preset, shown in list(other.shows.items()):
                if shown == chat:
                    await self._open(other, preset, None)

    async def _do_earlier(self, page: _Page, said: dict[str, Any]) -> None:
        chat, before = str(said["chat"]), int(said["before"])
        found = await run_in_threadpool(self._assistant.messages, chat, before, PAGE_MESSAGES + 1)
        messages = await run_in_threadpool(lambda: [self._message(m) for m in found[-PAGE_MESSAGES:]])
        frame = {"t": "earlier", "preset": said.get("preset"), "chat": chat, "messages": messages}
        page.push(json.dumps({**frame, "earlier": len(found) > PAGE_MESSAGES}))

    async def _do_panel(self, page: _Page, said: dict[str, Any]) -> None:
        """The page shows a panel, or with "off" does not show it any more."""
        name = str(said["name"])
        if name not in self._panels:
            return
        (page.panels.discard if said.get("off") else page.panels.add)(name)
        self._tell_shown(name)
        if name in page.panels:
            page.push(await self._panel_frame(name))

    def _tell_shown(self, name: str) -> None:
        panel = self._panels[name]
        if isinstance(panel, WatchedPanel):
            panel.shown(sum(name in page.panels for page in self._pages))

    async def _do_act(self, page: _Page, said: dict[str, Any]) -> None:
        panel = self._panels[str(said["panel"])]
        await run_in_threadpool(panel.act, str(said["name"]), str(said["action"]))

    async def _do_ask(self, page: _Page, said: dict[str, Any]) -> None:
        """Answered beside the page's other commands: the hub may take its time, and Stop must not wait for it."""
        answerer = self._answerers[str(said["to"])]
        if page.asked >= MOST_ASKED:
            raise InvalidRequest("This page has asked too much at once.", hint="Wait for the answers.")
        page.asked += 1
        assert self._loop is not None
        self._tasks.add(task := self._loop.create_task(self._answer(page, said, answerer)))
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, page: _Page, said: dict[str, Any], answerer: Answerer) -> None:
        try:
            answer = await run_in_threadpool(answerer, said)
            page.push(json.dumps({"t": "told", "ref": said.get("ref"), **answer}))
        except TurntableError as error:
            self._refuse(page, said, error)
        except (ValueError, TypeError, KeyError) as error:
            log.debug("a page asked nonsense: %s", error)
            self._refuse(page, said, InvalidRequest("The page asked something that cannot be answered."))
        except Exception:  # a page that waits for an answer has to get one
            log.exception("a page's question could not be answered")
            self._refuse(page, said, TurntableError("The server could not answer that."))
        finally:
            page.asked -= 1

    def _message(self, m: ChatMessage, job: Job | None = None, with_text: bool = True) -> dict[str, Any]:
        """One stored message, rendered."""
        note, context = (job.note, job.context) if job else self._ended.get(m.id, ("", 0))
        if not with_text:
            html, think = "", ""
        elif m.role == "user":
            html, think = render.plain(m.text), ""
        else:
            html, think = "".join(render.to_html(m.text)), _thought(_escaped(m.reasoning)) if m.reasoning else ""
        return {
            "id": m.id, "seq": m.seq, "role": m.role, "state": m.state, "error": m.error, "images": list(m.images),
            "html": html, "think": think,
            "variant": m.variant, "stats": self._stats(m),
            "note": note, "context": context,
        }  # fmt: skip

    def _stats(self, m: ChatMessage) -> dict[str, float] | None:
        if m.timings is None:
            return None
        numbers = totals(m.counts, m.timings)
        return {**numbers["counts"], **numbers["timings"]}

    # Pictures --------------------------------------------------------------------------

    async def upload(self, request: Request) -> Response:
        """POST a picture's bytes; the answer holds its id. Nothing is decoded before its header was checked."""
        data = bytearray()
        try:
            async for piece in request.stream():
                data += piece
                if len(data) > self._most_image_bytes:
                    raise ImageTooLarge(f"The picture has more than {self._most_image_bytes // 1_000_000} MB.")
            stored = await run_in_threadpool(self._assistant.add_image, bytes(data))
        except TurntableError as error:
            return JSONResponse({"error": error.to_wire()}, error.status)
        return JSONResponse({"id": stored.id, "width": stored.width, "height": stored.height})

    async def image(self, request: Request) -> Response:
        """A picture in display size."""
        try:
            data = await run_in_threadpool(self._assistant.images.thumbnail, request.path_params["id"])
        except TurntableError as error:
            return JSONResponse({"error": error.to_wire()}, error.status)
        kind = "image/webp" if data[8:12] == b"WEBP" else "image/png"
        return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=31536000, immutable"})
