"""Cancels the load of a model at every point where its engine reports; memory must be free and the next load work.

    python -m tests.exllama_on_cpu.cancelled_loads exllamav2 ExLlamaV2Engine FOLDER

Prints at how many points it was cancelled. Runs in the interpreter of the ExLlama tests.
"""

from __future__ import annotations

import importlib
import sys
import threading

from modules.engines.base import Progress
from modules.errors import LoadError
from modules.messages import EngineSpec, Loading


def cancelled_at(limit: int) -> Progress:
    """Raises in the report of that number, counted from 1, on this thread alone, as the worker's does."""
    here, seen = threading.get_ident(), 0

    def progress(event: Loading) -> None:
        nonlocal seen
        if threading.get_ident() != here:
            return
        seen += 1
        if seen == limit:
            raise LoadError("The load was cancelled.")

    return progress


def main(name: str, kind: str, folder: str) -> int:
    """How often the load was cancelled before it went through."""
    engine = getattr(importlib.import_module(f"modules.engines.{name}"), kind)()
    spec = EngineSpec(name, folder, context=512)
    for points in range(200):
        try:
            engine.load(spec, cancelled_at(points + 1))
        except LoadError as error:
            if "was cancelled" not in str(error) or engine.memory_bytes():
                raise
        else:
            return points
    raise AssertionError("the load never went through")


if __name__ == "__main__":
    print("cancelled at", main(*sys.argv[1:]), "points")
