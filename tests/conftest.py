"""Fences and fixtures for all tests: a home of its own, loopback only, no child left behind, the fake engine."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from modules.loader import Loader
from modules.messages import EngineSpec
from modules.process import EngineKind, Limits

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo" / "models"
FAKE = EngineKind("fake", where="tests.fake_engine:FakeEngine")
KEEPS = EngineKind("keeps", where="tests.fake_engine:FakeEngine", keeps_process=True)
CARD = EngineKind("card", where="tests.fake_engine:FakeEngine", keeps_process=True, memory="vram")
LLAMA = EngineKind("llamacpp")
# The interpreter that has PyTorch for the CPU and both ExLlama libraries; test.sh makes it.
EXLLAMA_PYTHON = os.environ.get("TURNTABLE_EXLLAMA_PYTHON") or str(ROOT / ".venv-exllama" / "bin" / "python")


def children() -> set[int]:
    """Engine processes whose parent is this one."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
            command = (entry.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z" and b"modules.engines.worker" in command:
            found.add(int(entry.parent.name))
    return found


def eventually(condition, within_s: float = 5.0, words: str = "it did not happen in time") -> None:
    """Wait until a condition holds; fails the test when it never does."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, words
        time.sleep(0.01)


@pytest.fixture
def exllama_python() -> str:
    """The interpreter for tests of the ExLlama adapters; the test is skipped where there is none."""
    if not Path(EXLLAMA_PYTHON).is_file():
        pytest.skip("no environment with PyTorch and the ExLlama libraries: ./test.sh makes .venv-exllama")
    return EXLLAMA_PYTHON


@pytest.fixture(autouse=True)
def fences(tmp_path, monkeypatch, request):
    """A home of its own; after the test no child of ours is left."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home" / "data"))
    for name in list(os.environ):
        if name.startswith("TURNTABLE_") and name not in ("TURNTABLE_CHROMIUM", "TURNTABLE_EXLLAMA_PYTHON"):
            monkeypatch.delenv(name)
    before = children() if sys.platform == "linux" else set()
    yield
    if sys.platform == "linux" and "browser" not in request.keywords:
        eventually(lambda: not children() - before, 6, "a child process was left behind")


@pytest.fixture(scope="session", autouse=True)
def loopback_only():
    """No test reaches beyond this machine."""
    connect = socket.socket.connect

    def fenced(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(
            ("127.", "::1", "localhost")
        ):
            raise AssertionError(f"a test wanted to reach {address}")
        return connect(self, address)

    socket.socket.connect = fenced
    yield
    socket.socket.connect = connect


@pytest.fixture
def plan(tmp_path):
    """Write the "model file" of the fake engine and return its spec."""

    def write(name: str = "a", engine: str = "fake", context: int = 4096, **behaviour) -> EngineSpec:
        file = tmp_path / f"{name}.plan"
        file.write_text(json.dumps(behaviour))
        return EngineSpec(engine, str(file), context=context)

    return write


@pytest.fixture
def make_loader():
    """Loaders with the fake engine and a budget in bytes; closed after the test."""
    made: list[Loader] = []

    def make(budget: int = 10_000, **options) -> Loader:
        options.setdefault("limits", Limits(load_s=20, stall_s=5))
        made.append(Loader({"fake": FAKE, "keeps": KEEPS, "card": CARD, "llamacpp": LLAMA}, budget, **options))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def in_thread(work) -> threading.Thread:
    """Run on a thread; the test joins it."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
