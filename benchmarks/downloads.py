"""Downloads under kill -9: whole runs, killed at random moments until they end, against the hub on loopback.

`python -m benchmarks.downloads [RUNS]` prints the figures. The child processes are
forked by a process of their own that has no threads (`--child`), so a kill costs
milliseconds. The tests use the same process with fewer runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modules.downloads import PARTIAL, Downloads, Options
from modules.errors import ModelNotDownloaded
from modules.hub import Ref
from modules.library import Library
from tests.hub_server import Hub, sha256

ROOT = Path(__file__).resolve().parent.parent
RUNS = 200
OPTIONS = Options(reserve_bytes=0, sync_bytes=64 * 1024, tries=3, backoff_s=0.05, cache_dir=os.devnull)
REF = Ref("maker/model-exl2", "4_25")


def safetensors(size_bytes: int, seed: int = 0) -> bytes:
    """A safetensors file of one tensor of bytes."""
    table = {"t": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}}
    head = json.dumps(table).encode()
    return len(head).to_bytes(8, "little") + head + random.Random(seed).randbytes(size_bytes)


def model(seed: int = 0) -> dict[str, bytes]:
    """The files of a small model in three parts."""
    parts = {f"output-{n:05d}-of-00003.safetensors": safetensors(120_000 * n, seed + n) for n in (1, 2, 3)}
    return {"config.json": b'{"model_type": "x"}', "tokenizer.json": b"{}" * 20_000, **parts, "README.md": b"hello"}


# The process that forks --------------------------------------------------------------------------


def _download(endpoint: str, models: Path, ref: Ref) -> int:
    downloads = Downloads(Library(models, models), endpoint, lambda: None, OPTIONS)
    view = downloads.wait(downloads.start(ref).id, 60)
    downloads.close()
    return 0 if view.state == "done" else 1


def _forked(act: Callable[[], int]) -> int:
    pid = os.fork()
    if not pid:
        code = 70
        try:
            code = act()
        finally:
            os._exit(code)
    return pid


def _sizes(models: Path, ref: Ref) -> dict[str, int]:
    """The bytes on the disk of each file of an unfinished job."""
    home = models / PARTIAL / ref.id
    parts = {path.name.removesuffix(".part"): path.stat().st_size for path in home.glob("parts/*.part")}
    return parts | {path.name: path.stat().st_size for path in home.glob("files/*") if path.name[0] != "."}


def _listed(models: Path, ref: Ref) -> dict[str, str] | None:
    """The hashes of what the library lists, None when it lists nothing."""
    library = Library(models, models)
    try:
        library.locate(ref.variant())
    except ModelNotDownloaded:
        return None
    return {path.name: sha256(path.read_bytes()) for path in library.folder(ref.variant()).iterdir()}


def _kills(endpoint: str, models: Path, ref: Ref, seed: int) -> dict[str, Any]:
    """Download, killed at random moments until it ends by itself. Every life with its end and what it left."""
    dice = random.Random(seed)
    lives: list[dict[str, Any]] = []
    while True:
        pid = _forked(lambda: _download(endpoint, models, ref))
        deadline = time.monotonic() + dice.uniform(0.005, 0.15)
        done = status = 0
        while not done and (time.monotonic() < deadline or len(lives) > 100):
            time.sleep(0.002)
            done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        lives.append({"end": time.monotonic(), "sizes": _sizes(models, ref), "listed": _listed(models, ref)})
        if done:
            return {"lives": lives, "code": os.waitstatus_to_exitcode(status)}


def _crashes(endpoint: str, models: Path, ref: Ref, nth: int) -> dict[str, Any]:
    """Download in a process that dies before its nth rename, then again in one that lives."""

    def dies() -> int:
        left = nth

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if event == "os.rename":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        return _download(endpoint, models, ref)

    _, status = os.waitpid(_forked(dies), 0)
    first = _listed(models, ref)
    code = 0
    if died := os.WIFSIGNALED(status):
        _, status = os.waitpid(_forked(lambda: _download(endpoint, models, ref)), 0)
        code = os.waitstatus_to_exitcode(status)
    return {"died": died, "listed": first, "after": _listed(models, ref), "code": code}


def child() -> None:
    """Read orders as JSON lines, answer each with one: {"do": "kills" or "crashes", …}."""
    acts = {"kills": _kills, "crashes": _crashes}
    for line in sys.stdin:
        order = json.loads(line)
        result = acts[order["do"]](order["endpoint"], Path(order["models"]), Ref(**order["ref"]), order["number"])
        print(json.dumps(result), flush=True)


class Killer:
    """The forking process, seen from outside."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.downloads", "--child"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Killer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._child.stdin and self._child.stdout
        self._child.stdin.close()
        self._child.wait(30)
        self._child.stdout.close()

    def order(self, do: str, hub: Hub, models: Path, ref: Ref, number: int) -> dict[str, Any]:
        """Let it do one thing, and wait for what it saw."""
        assert self._child.stdin and self._child.stdout
        table = {"do": do, "endpoint": hub.endpoint, "models": str(models), "ref": vars(ref), "number": number}
        self._child.stdin.write(json.dumps(table) + "\n")
        self._child.stdin.flush()
        result: dict[str, Any] = json.loads(self._child.stdout.readline())
        return result


# What is counted ------------------------------------------------------------------------------------


def judge(hub: Hub, files: dict[str, bytes], seen: dict[str, Any]) -> dict[str, int]:
    """Count, over one run: kills, half models listed, bytes on the disk asked for again, bytes lost in flight."""
    wanted = {name: sha256(data) for name, data in files.items() if name != "README.md"}
    lives = seen["lives"]
    half = sum(
        any(life["listed"].get(name) != digest for name, digest in wanted.items())
        for life in lives
        if life["listed"] is not None
    )
    twice = lost = 0
    for name in wanted:
        had, place = 0, 0
        for asked in hub.asked_for(name):
            while place < len(lives) and lives[place]["end"] < asked.at:
                had, place = lives[place]["sizes"].get(name, had), place + 1
            twice += max(0, had - asked.start)
        lost += max(0, sum(asked.sent_bytes for asked in hub.asked_for(name)) - len(files[name]))
    whole = seen["code"] == 0 and lives[-1]["listed"] is not None
    return {"kills": len(lives) - 1, "half": half, "twice": twice, "lost": lost, "failed": int(not whole)}


def measure(runs: int = RUNS) -> dict[str, Any]:
    """Print and return the figures of so many runs."""
    total: dict[str, int] = {}
    worst = 0.0
    size_bytes = 0
    began = time.monotonic()
    with Killer() as killer:
        for run in range(runs):
            with tempfile.TemporaryDirectory() as folder, Hub() as hub:
                files = model(run)
                size_bytes += sum(len(data) for name, data in files.items() if name != "README.md")
                hub.add(REF.repo, files, REF.revision)
                hub.bytes_per_s = 1_000_000
                counted = judge(hub, files, killer.order("kills", hub, Path(folder), REF, run))
            total = {name: total.get(name, 0) + value for name, value in counted.items()}
            worst = max(worst, counted["lost"] / max(1, counted["kills"]))
    figures = {
        "runs": runs, "kills": total["kills"], "runs_failed": total["failed"], "half_models_listed": total["half"],
        "bytes_on_disk_fetched_again": total["twice"], "bytes_lost_in_flight": total["lost"],
        "lost_per_kill": round(total["lost"] / max(1, total["kills"])), "lost_per_kill_worst_run": round(worst),
        "bytes_of_models": size_bytes, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    for name, value in figures.items():
        print(f"{name:28s}  {value}")
    return figures


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        with contextlib.suppress(KeyboardInterrupt):
            child()
    else:
        measure(int(sys.argv[1]) if sys.argv[1:] else RUNS)
