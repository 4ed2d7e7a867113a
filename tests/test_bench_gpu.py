"""The parts of the benchmark for a card that run without one: llama.cpp's row, and the tables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from modules.presets import Presets

from .conftest import DEMO, LLAMA, ROOT

ROW = {
    "bytes": 18_800_000_000, "page_cache": {"load_s": 1.5, "card": 22_000_000_000}, "cold": {"load_s": 9.0},
    "speed": {"prompt": 4000.0, "decode": 99.0}, "predicted": 21_900_000_000, "loader_swap_s": 0.6,
    "bare": {"stock_load_s": 4.0, "prompt_tokens_per_s": 4100.0, "decode_tokens_per_s": 100.0},
    "pinned": {"load_s": 0.4, "unload_s": 0.01, "left": 0.0},
}  # fmt: skip
RESULT = {
    "date": "2026-11-21", "card": "NVIDIA X, 580.1", "torch": "2.11", "link_bytes_per_s": 50e9, "rows": {"coding": ROW},
}  # fmt: skip


def test_the_table_has_the_figures_that_the_bars_ask_for() -> None:
    text = gpu.table(RESULT)
    assert "link 50.0 GB/s" in text
    cells = text.splitlines()[-1].strip("| ").split(" | ")
    assert cells[:8] == ["coding", "18.80", "9.00", "1.50", "4.00", "0.400", "94%", "0.600"]
    assert cells[8:] == ["4000 (4100)", "99.0 (100.0)", "21.90", "22.00"]
    assert "llama.cpp" not in text
    other = {"file": "qwen32-Q4_K_M.gguf", "bytes": 19_900_000_000, "load_s": 3.0, "prompt": 2000.0, "decode": 40.0}
    text = gpu.table({**RESULT, "rows": {"coding": {**ROW, "llamacpp": other}}})
    assert "| coding | qwen32-Q4_K_M.gguf | 19.90 | 3.00 | 2000 | 40.0 |" in text


def test_llama_cpp_is_loaded_and_timed_with_the_same_questions() -> None:
    demo = next(v for v in Presets([ROOT / "presets"]).get("assistant").variants if v.bundled)
    row = gpu.llama_row(LLAMA, DEMO / "assistant-q8_0.gguf", demo)
    assert row["bytes"] == 1172064
    assert row["load_s"] > 0 and row["prompt"] > 0 and row["decode"] > 0


def test_a_build_without_a_device_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNTABLE_LLAMA_PYTHON", sys.executable)
    assert gpu.llama_kind() is None


def test_without_a_card_the_benchmark_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu"], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    assert "No NVIDIA card answers here" in done.stdout
