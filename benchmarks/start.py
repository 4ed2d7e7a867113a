"""From `python app.py` to a usable page: import, first byte, usable, memory, idle CPU."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.running import ROOT, Program

ROUNDS = 3
IDLE_S = 10.0


def measure() -> dict[str, Any]:
    """Print the table; medians of three starts."""
    rows: list[dict[str, float]] = []
    import_s = statistics.median(_import() for _ in range(ROUNDS))
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as name:
            running = Program(Path(name))
            try:
                row = {"first_byte_s": running.first_byte(), "usable_s": running.usable()}
                time.sleep(1)
                cpu = running.cpu_s()
                time.sleep(IDLE_S)
                row |= {"rss_mb": running.rss_mb(), "idle_cpu_percent": 100 * (running.cpu_s() - cpu) / IDLE_S}
            finally:
                running.stop()
            rows.append(row)
    figures = {"import_s": round(import_s, 3)}
    figures |= {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}
    for name, value in figures.items():
        print(f"{name:18s} {value:9.3f}")
    return figures


def _import() -> float:
    """Seconds of importing gradio as the page does it, in a fresh process."""
    code = (
        "import sys,time;t=time.perf_counter();from modules.ui import _NoStubs;"
        "sys.modules.setdefault('matplotlib',None);"
        "sys.meta_path.insert(0,_NoStubs());import gradio;print(time.perf_counter()-t)"
    )
    return float(
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )
