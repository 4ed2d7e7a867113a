"""The running program for measurements: start it, talk to it as a page does, look at its process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import websockets

ROOT = Path(__file__).resolve().parent.parent
PRESET = """title = "{title}"
task = "assistant"
order = 20
[sampling]
max_tokens = 30000
[[variants]]
title = "Fake"
engine = "fake"
path = "{path}"
context = 262144
parallel = 64
"""


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def add_fake(folder: Path, name: str, **behaviour: Any) -> Path:
    """A preset of the timing-true fake engine; returns its plan file."""
    presets = folder / "presets"
    presets.mkdir(parents=True, exist_ok=True)
    plan = folder / f"{name}.plan"
    plan.write_text(json.dumps(behaviour))
    (presets / f"{name}.toml").write_text(PRESET.format(title=name.title(), path=plan))
    return plan


class Program:
    """`python app.py` in a data folder of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.began_s = time.monotonic()
        self.child = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), "--port", str(self.port), "--data-dir", str(folder),
             "--install-engines", "no", *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
        )  # fmt: skip

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; (0, b"") while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=5) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def first_byte(self) -> float:
        """Seconds from the start until the port answers."""
        while not self.get("/")[0] and time.monotonic() - self.began_s < 60:
            time.sleep(0.005)
        return time.monotonic() - self.began_s

    def usable(self) -> float:
        """Seconds from the start until the page itself is served."""
        while self.child.poll() is None and time.monotonic() - self.began_s < 60:
            state = json.loads(self.get("/ready")[1] or b'{"failed": ""}')
            if state["failed"]:
                raise RuntimeError(state["failed"])
            if state.get("ready") and self.get("/")[0] == 200:
                return time.monotonic() - self.began_s
            time.sleep(0.01)
        raise RuntimeError("the page did not become usable within a minute")

    def rss_mb(self) -> float:
        """Resident memory of the page's process in MB."""
        return int(Path(f"/proc/{self.child.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu_s(self) -> float:
        """CPU seconds of the page's process so far."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """As Ctrl-C would."""
        self.child.terminate()
        self.child.wait(15)


@contextlib.contextmanager
def program(folder: Path, *arguments: str) -> Iterator[Program]:
    """The program, usable, and stopped at the end."""
    running = Program(folder, *arguments)
    try:
        running.usable()
        yield running
    finally:
        running.stop()


class Reader:
    """One page's WebSocket, without a browser."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.chat: str | None = None

    async def __aenter__(self) -> Reader:
        self._socket = await websockets.connect(
            f"ws://{self._address}/live", max_size=None, origin=f"http://{self._address}"
        )
        return self

    async def __aexit__(self, *problem: object) -> None:
        await self._socket.close()

    async def say(self, **command: Any) -> None:
        """One command of the page."""
        await self._socket.send(json.dumps(command))

    async def until(self, kind: str) -> dict[str, Any]:
        """The next frame of this kind."""
        while True:
            frame: dict[str, Any] = json.loads(await asyncio.wait_for(self._socket.recv(), 120))
            if frame["t"] == "error":
                raise RuntimeError(frame["message"])
            if frame["t"] == kind:
                return frame

    async def send(self, preset: str, text: str) -> None:
        """Send a message in the conversation of this reader."""
        await self.say(do="send", ref=1, preset=preset, chat=self.chat, text=text)
        self.chat = (await self.until("sent"))["chat"]

    async def whole_answer(self) -> str:
        """Follow an answer to its end as the page's script does; returns the HTML that a person then sees."""
        blocks: list[str] = []
        while True:
            frame: dict[str, Any] = json.loads(await asyncio.wait_for(self._socket.recv(), 120))
            if frame["t"] == "chat" and frame.get("live"):
                blocks = frame["live"]["text"]
            elif frame["t"] == "job" and frame.get("text"):
                blocks = blocks[: frame["text"]["keep"]] + frame["text"]["blocks"]
            elif frame["t"] == "end":
                return "\n".join(blocks).rstrip()
            elif frame["t"] == "error":
                raise RuntimeError(frame["message"])

    async def first_text(self) -> None:
        """Wait for the first piece of the answer."""
        while True:
            frame = await self.until("job")
            if frame.get("text") or frame.get("reasoning"):
                return
