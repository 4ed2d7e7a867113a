"""The hub of the pages, in its own event loop, with a question that nobody foresaw."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from modules.assistant import Assistant
from modules.chats import Chats
from modules.errors import PresetNotFound
from modules.images import Images
from modules.library import Library
from modules.live import MOST_ASKED, Live
from modules.presets import Presets

from .conftest import DEMO, FAKE, LLAMA, ROOT, eventually


def answer(said: Mapping[str, Any]) -> dict[str, Any]:
    if said.get("what") == "bug":
        return {"html": 1 / int(said["by"])}
    if said.get("what") == "error":
        raise PresetNotFound("There is none.")
    return {"html": "x" * int(said["long"])}


def test_every_question_is_answered_whatever_goes_wrong(tmp_path, make_loader) -> None:
    assistant = Assistant(
        Presets([ROOT / "presets"]), Library(tmp_path / "models", DEMO), make_loader(8 << 30),
        Chats(tmp_path / "chats.db"), Images(tmp_path / "images"), {"llamacpp": LLAMA},
    )  # fmt: skip
    live = Live(assistant, answerers={"it": answer})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        live.start()
        yield

    app = Starlette(routes=live.routes(), lifespan=lifespan)
    with TestClient(app) as client, client.websocket_connect("/live") as page:

        def ask(ref: str, **said: object) -> dict[str, Any]:
            page.send_json({"do": "ask", "to": "it", "ref": ref, **said})
            while (frame := page.receive_json()).get("ref") != ref:
                pass
            return frame

        assert ask("a", long=3) == {"t": "told", "ref": "a", "html": "xxx"}
        assert ask("b", what="error")["code"] == "preset_not_found"
        assert ask("c", what="nonsense")["code"] == "invalid_request"
        for turn in range(2 * MOST_ASKED):  # a question that failed is none that is still under way
            bug = ask(f"d{turn}", what="bug", by=0)
            assert (bug["t"], bug["message"]) == ("error", "The server could not answer that.")
        assert ask("e", long=1)["html"] == "x"
    assistant.close()


def test_a_page_that_was_closed_by_us_while_it_was_heard_ends_quietly(tmp_path, make_loader) -> None:
    assistant = Assistant(
        Presets([ROOT / "presets"]), Library(tmp_path / "models", DEMO), make_loader(8 << 30),
        Chats(tmp_path / "chats.db"), Images(tmp_path / "images"), {"llamacpp": LLAMA},
    )  # fmt: skip
    live, closed = Live(assistant), threading.Event()

    async def close_in_between(page, said) -> None:
        await live.close()
        closed.set()

    live._do_open = close_in_between  # what happens while a line is handled

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        live.start()
        yield

    app = Starlette(routes=live.routes(), lifespan=lifespan)
    with TestClient(app) as client, client.websocket_connect("/live") as page:
        page.send_json({"do": "open", "preset": "assistant"})
        with pytest.raises(WebSocketDisconnect):
            while True:
                page.receive_json()
    assert closed.is_set()
    assistant.close()


def test_an_answer_that_ends_while_its_conversation_is_read_is_shown_whole(tmp_path, make_loader) -> None:
    """As on a busy machine: the answer is complete between the reading of the messages and the frame that has them."""
    (tmp_path / "own").mkdir()
    (tmp_path / "quick.plan").write_text("{}")
    (tmp_path / "own" / "quick.toml").write_text(
        'title = "Quick"\ntask = "assistant"\n[[variants]]\ntitle = "Fake"\nengine = "fake"\ncontext = 4096\n'
        f'path = "{tmp_path / "quick.plan"}"\n'
    )
    assistant = Assistant(
        Presets([ROOT / "presets", tmp_path / "own"], ["fake"]), Library(tmp_path / "models", DEMO),
        make_loader(8 << 30), Chats(tmp_path / "chats.db"), Images(tmp_path / "images"), {"fake": FAKE},
    )  # fmt: skip
    live, plain, slow = Live(assistant), assistant.messages, threading.Event()

    def messages(chat: str, before: int | None, limit: int):
        found = plain(chat, before, limit)
        if not slow.is_set() and found and found[-1].state == "running":
            slow.set()
            eventually(lambda: assistant.job(chat) is None, 20)
        return found

    assistant.messages = messages

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        live.start()
        yield

    app = Starlette(routes=live.routes(), lifespan=lifespan)
    with TestClient(app) as client, client.websocket_connect("/live") as page:
        page.send_json({"do": "send", "preset": "quick", "text": "say 3", "ref": 1})
        while (frame := page.receive_json())["t"] != "chat":
            pass
    assert slow.is_set()
    answer = frame["messages"][-1]
    assert (answer["role"], answer["state"]) == ("assistant", "done")
    assert "w0 w1 w2" in answer["html"]
    assistant.close()
