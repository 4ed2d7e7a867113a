"""The parts of the benchmark for a card that run without one: llama.cpp's row, tables, and what a failure leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from modules.engines.tiny import write_tiny
from modules.messages import EngineSpec
from modules.presets import Presets

from .conftest import DEMO, LLAMA, ROOT

ROW = {
    "bytes": 18_800_000_000, "page_cache": {"load_s": 1.5, "card": 22_000_000_000}, "cold": {"load_s": 9.0},
    "speed": {"prompt": 4000.0, "decode": 99.0}, "predicted": 21_900_000_000, "loader_swap_s": 0.6,
    "bare": {"stock_load_s": 4.0, "prompt_tokens_per_s": 4100.0, "decode_tokens_per_s": 100.0,
             "device_bytes": 17_000_000_000},
    "pinned": {"load_s": 0.4, "unload_s": 0.01, "left": 0.0},
}  # fmt: skip
RESULT = {
    "date": "2026-11-21", "card": "NVIDIA X, 580.1", "torch": "2.11", "link_bytes_per_s": 50e9, "rows": {"coding": ROW},
    "failed_steps": [],
}  # fmt: skip


def rows(text: str) -> list[list[str]]:
    """The cells of the first table and of the bars, without the heads."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| coding |")]


def test_the_table_has_the_figures_that_the_bars_ask_for() -> None:
    text = gpu.table(RESULT)
    assert "link 50.00 GB/s" in text
    cells, bars = rows(text)
    # Only what goes over the bus counts against the link: 17 GB in 0.4 s.
    assert cells[:9] == ["coding", "18.80", "17.00", "9.00", "1.50", "4.00", "0.400", "85%", "0.600"]
    assert cells[9:] == ["4000 (4100)", "99.0 (100.0)", "21.90", "22.00"]
    assert bars == ["coding", "60, met", "99.0%, met", "99.5%, met"]
    assert "Bars met: 3 of 3; not met: 0; not measured: 0." in text
    assert "llama.cpp" not in text
    other = {"file": "qwen32-Q4_K_M.gguf", "bytes": 19_900_000_000, "load_s": 3.0, "prompt": 2000.0, "decode": 40.0}
    text = gpu.table({**RESULT, "rows": {"coding": {**ROW, "llamacpp": other}}})
    assert "| coding | qwen32-Q4_K_M.gguf | 19.90 | 3.00 | 2000 | 40.0 |" in text


def test_a_bar_that_is_missed_says_so() -> None:
    slow = {**ROW, "pinned": {"load_s": 0.491}, "speed": {"prompt": 1.0, "decode": 97.9}, "predicted": 21_300_000_000}
    text = gpu.table({**RESULT, "rows": {"coding": slow}})
    assert rows(text)[1] == ["coding", "151, NOT MET", "97.9%, NOT MET", "96.8%, NOT MET"]
    assert "Bars met: 0 of 3; not met: 3; not measured: 0." in text


def test_what_is_missing_is_marked_and_the_rest_is_there() -> None:
    """No page-locked copy of one model, and another whose steps failed or were never begun."""
    bare = {"bytes": 1_000_000_000, "predicted": 2_000_000_000}
    result = {
        **RESULT, "failed_steps": [{"step": "vision: speed", "reason": "The engine crashed."}],
        "rows": {"coding": {**ROW, "pinned": {"missing": "no room"}, "loader_swap_s": None}, "vision": bare},
    }  # fmt: skip
    text = gpu.table(result)
    cells, bars = rows(text)
    assert cells[6:9] == ["no copy", "no copy", "no copy"]
    assert bars == ["coding", "not measured", "99.0%, met", "99.5%, met"]
    assert "| vision | 1.00 | – | – | – | – | – | – | – | – (–) | – (–) | 2.00 | – |" in text
    assert "No page-locked copy: no room." in text
    assert text.splitlines()[-1] == "FAILED: vision: speed: The engine crashed."
    assert "Bars met: 2 of 6; not met: 0; not measured: 4." in text


def test_models_share_a_child_as_far_as_their_copies_fit_into_ram() -> None:
    sizes = {"a": 11, "b": 8, "c": 17, "d": 17}
    assert gpu.groups(sizes, 100) == [["a", "b", "c", "d"]]
    assert gpu.groups(sizes, 40) == [["a", "b", "c"], ["d"]]
    assert gpu.groups(sizes, 20) == [["a", "b"], ["c"], ["d"]]
    assert gpu.groups(sizes, 0) == [["a"], ["b"], ["c"], ["d"]]
    assert 0 < gpu.free_ram_bytes() < 1 << 50


SMI = """#!/bin/sh
case "$*" in *compute-apps*) ;; *memory.used*) echo 500 ;; *name,driver*) echo "Pretended, 580" ;; *) echo 1 ;; esac
"""
BENCH = """
import sys
from benchmarks import __main__, gpu
gpu.TURNS, gpu.DECODE_TOKENS, gpu.RESERVE_BYTES = 1, 12, 1 << 30
gpu.llama_kind = lambda: None
sys.exit(__main__.main())
"""


def run(tmp_path: Path, python: str, path: str) -> tuple[int, str, dict]:
    """The whole benchmark in a process of its own, with a tiny model in the place of one pick."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(SMI)
    smi.chmod(0o755)
    folder = write_tiny(tmp_path / "models" / "assistant-phi4-6.5", quantization="exl2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16384}))
    variables = {
        **os.environ, "PATH": f"{smi.parent}{os.pathsep}{os.environ['PATH']}", "TURNTABLE_GPU_PYTHON": python,
        "TURNTABLE_BENCH_DIR": str(folder.parent), "TURNTABLE_BENCH_MODELS": "assistant", "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    found = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-c", BENCH, "gpu", "--json", str(found)], cwd=ROOT, env=variables,
        capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert found.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode, done.stdout, json.loads(found.read_text())


def test_the_whole_benchmark_runs_on_a_pretended_card(exllama_python: str, tmp_path: Path) -> None:
    stand_in = ROOT / "tests" / "exllama_on_cpu"
    code, text, found = run(tmp_path, exllama_python, os.pathsep.join(map(str, (stand_in, stand_in / "v2", ROOT))))
    assert found["failed_steps"] == []
    assert code == 0
    row = found["rows"]["assistant"]
    embedding = 320 * 256 * 2  # stays in RAM
    assert 0 < row["bare"]["device_bytes"] < row["bytes"] - embedding + 100_000
    if "missing" in row["pinned"]:
        assert "GB of RAM" in row["pinned"]["missing"], row["pinned"]
        pytest.skip(f"not enough free RAM here for a page-locked copy: {row['pinned']['missing']}")
    assert row["pinned"]["load_s"] > 0
    assert row["loader_swap_s"] > 0
    assert "Bars met: " in text and "not measured: 0." in text


def test_a_machine_without_the_ram_for_a_copy_begins_none_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RESERVE_BYTES", 1 << 60)
    found: dict = {"assistant": {"bytes": 1_500_000_000}}
    steps = gpu.Steps()
    gpu._swaps({"assistant": EngineSpec("exllamav2", "/nowhere", context=1024)}, found, steps)
    assert found["assistant"]["pinned"]["missing"].startswith("assistant needs 1.5 GB of RAM, and 0.0 GB are free")
    assert steps.failed == []


def test_steps_that_fail_are_named_and_the_table_is_there(tmp_path: Path) -> None:
    """The interpreter has no ExLlamaV2, so that every step fails."""
    code, text, found = run(tmp_path, sys.executable, str(ROOT))
    assert code == 1
    named = [step["step"] for step in found["failed_steps"]]
    assert named == [
        "assistant: the bare library", "assistant: load from the page cache", "assistant: load from the disk",
        "assistant: speed", "assistant: page-locked",
    ]  # fmt: skip
    assert "exllamav2" in found["failed_steps"][0]["reason"]
    assert sum(line.startswith("FAILED: ") for line in text.splitlines()) == 2 * len(named)  # at once, and at the end
    assert "| assistant | 0.00 |" in text and "not measured: 3." in text


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


def test_a_run_that_is_interrupted_is_named_like_a_failure() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    steps = gpu.Steps()
    with pytest.raises(KeyboardInterrupt):
        steps.run("coding: speed", interrupted)
    assert steps.failed == [{"step": "coding: speed", "reason": "KeyboardInterrupt"}]
