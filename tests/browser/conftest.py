"""A server of its own for each module, a fresh browser context for each test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`python app.py` as a person starts it; variables are added to its environment."""

    def __init__(self, folder: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = (folder / "server.log").open("ab")
        command = [
            sys.executable,
            str(ROOT / "app.py"),
            "--port",
            str(self.port),
            "--data-dir",
            str(folder / "data"),
            "--install-engines",
            "no",
            *arguments,
        ]
        self.child = subprocess.Popen(
            command, cwd=folder, stdout=self._log, stderr=self._log, env={**os.environ, **(variables or {})}
        )

    def wait(self) -> Server:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(self.url + "/ready", timeout=2) as reply:
                    state = json.load(reply)
                assert not state["failed"], state["failed"]
                if state["ready"]:
                    return self
            except OSError:
                pass
            assert self.child.poll() is None, self.log()
            time.sleep(0.05)
        raise AssertionError("the page was not ready: " + self.log())

    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    def engines(self) -> list[int]:
        """Process ids of the engine children."""
        out = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == self.child.pid:
                    out.append(int(stat.parent.name))
            except OSError:
                continue
        return out

    def stop(self) -> int:
        self.child.send_signal(signal.SIGTERM)
        try:
            code = self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            raise
        finally:
            self._log.close()
        return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page server")


@pytest.fixture(scope="module")
def server(folder):
    running = Server(folder).wait()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def chromium():
    path = os.environ.get("TURNTABLE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    flags = [
        "--no-sandbox",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def context(chromium):
    made = chromium.new_context(viewport={"width": 1280, "height": 800})
    made.set_default_timeout(15_000)
    yield made
    made.close()


class Driver:
    """What a person does on the page."""

    def __init__(self, context, url: str, query: str = "") -> None:
        self.page = context.new_page()
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "request",
            lambda r: (
                self.foreign.append(r.url) if not r.url.startswith((url, "data:", "blob:", "ws://127.0.0.1")) else None
            ),
        )
        self.page.goto(url + "/" + query)
        self.page.wait_for_selector("body.ready:not(.offline)", timeout=30_000)

    def tab(self, name: str) -> None:
        self.page.click(f"#tab-{name}")
        self.page.wait_for_selector(f"#message-{name} textarea", state="visible")

    def send(self, preset: str, text: str) -> None:
        self.page.fill(f"#message-{preset} textarea", text)
        self.page.click(f"#send-{preset}")

    def last(self, preset: str):
        return self.page.locator(f"#chat-{preset} .msg.bot").last

    def answer(self, preset: str, count: int = 1, timeout: int = 20_000) -> str:
        """Text of the newest answer once `count` answers have ended."""
        self.page.wait_for_function(
            "([p, n]) => { const all = [...document.querySelectorAll(`#chat-${p} .msg.bot`)];"
            " return all.length >= n && !all[all.length-1].classList.contains('live')"
            " && all[all.length-1].querySelector('footer').childNodes.length }",
            arg=[preset, count], timeout=timeout,
        )  # fmt: skip
        return self.last(preset).locator(".body.text").inner_text()


@pytest.fixture
def drive(context, server):
    return Driver(context, server.url)
