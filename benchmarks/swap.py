"""From the click to the first token: a cold model, one from the page cache, one in memory; the engine's own load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.running import ROOT, Reader, program
from modules.messages import EngineSpec
from modules.process import EngineKind, EngineProcess

ROUNDS = 7
QUESTIONS = {"assistant": "hello", "coding": "Write a function that squares a number."}


def measure() -> dict[str, Any]:
    """Print the table; medians in seconds. The budget holds one of the demo models: every change is a swap."""
    files = sorted((ROOT / "demo" / "models").glob("*.gguf"))
    with tempfile.TemporaryDirectory() as name:
        engine_s = statistics.median(_engine_load() for _ in range(ROUNDS))
        folder = Path(name)
        with program(folder, "--memory-budget", "110MB") as running:
            cold, cached, resident = asyncio.run(_swaps(running.address, files))
        shutil.rmtree(folder / "gradio", ignore_errors=True)
    figures = {"engine_load_s": engine_s, "cold_s": cold, "cached_s": cached, "resident_s": resident}
    figures = {name: round(value, 4) for name, value in figures.items()}
    print("click to first token            median of", ROUNDS)
    for label, value in figures.items():
        print(f"{label:28s}  {value:8.4f} s")
    return figures


def _engine_load() -> float:
    """The engine's own time: process, import, load."""
    began = time.monotonic()
    engine = EngineProcess(EngineKind("llamacpp"))
    try:
        model = ROOT / "demo" / "models" / "assistant-q8_0.gguf"
        engine.load(EngineSpec("llamacpp", str(model), context=2048, parallel=4, threads=1), lambda event: None)
        return time.monotonic() - began
    finally:
        engine.stop()


async def _swaps(address: str, files: list[Path]) -> tuple[float, float, float]:
    cold, cached, resident = [], [], []
    async with Reader(address) as reader:
        for preset in ["assistant", "coding"] * ROUNDS:
            for file in files:
                _drop_from_cache(file)
            cold.append(await _first_token(reader, preset))
            resident.append(await _first_token(reader, preset))
        for preset in ["assistant", "coding"] * ROUNDS:
            cached.append(await _first_token(reader, preset))
    return statistics.median(cold), statistics.median(cached), statistics.median(resident)


async def _first_token(reader: Reader, preset: str) -> float:
    reader.chat = None
    began = time.monotonic()
    await reader.send(preset, QUESTIONS[preset])
    await reader.first_text()
    spent = time.monotonic() - began
    await reader.until("end")
    return spent


def _drop_from_cache(file: Path) -> None:
    """Ask the kernel to forget a file's pages; without the call (macOS, Windows) cold is as warm as cached."""
    with contextlib.suppress(AttributeError), file.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
