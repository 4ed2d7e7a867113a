"""1,000 swaps of the demo models: growth of memory, open files and threads of the page's side. Takes two minutes."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.running import ROOT
from modules.loader import Loader
from modules.messages import Delta, EngineSpec, Message, Sampling, Start
from modules.process import EngineKind

SWAPS, WARM = 1000, 50


def measure() -> dict[str, Any]:
    """Print what grew between swap 50 and swap 1,000."""
    loader = Loader({"llamacpp": EngineKind("llamacpp")}, 110 << 20)
    models = [ROOT / "demo" / "models" / f"{name}-q8_0.gguf" for name in ("assistant", "coding", "reasoning")]
    specs = [EngineSpec("llamacpp", str(model), context=2048, threads=1) for model in models]
    began, failures, before = time.monotonic(), 0, (0.0, 0, 0)
    try:
        for i in range(SWAPS):
            with loader.lease(specs[i % 3], needs_bytes=64 << 20) as engine:
                start = Start(f"s{i}", (Message("user", "hello"),), Sampling(temperature=0.0, max_tokens=8))
                failures += not any(isinstance(e, Delta) for e in engine.generate(start))
            if i == WARM:
                before = _used()
        after = _used()
    finally:
        loader.close()
    figures = {
        "swaps": SWAPS, "failures": failures, "seconds_per_swap": round((time.monotonic() - began) / SWAPS, 4),
        "rss_growth_mb": round(after[0] - before[0], 2), "file_growth": after[1] - before[1],
        "thread_growth": after[2] - before[2],
    }  # fmt: skip
    for name, value in figures.items():
        print(f"{name:18s} {value}")
    return figures


def _used() -> tuple[float, int, int]:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return resident, len(os.listdir("/proc/self/fd")), threading.active_count()
