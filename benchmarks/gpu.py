"""Loading, swapping and speed on a card, on synthetic checkpoints with the real shapes of the 24 GB picks.

    python -m benchmarks gpu [--json FILE]

Loads each model from the disk with an empty page cache, from the page cache, and from
page-locked memory; swaps between all of them through the loader; and compares prompt
and decode speed with the bare library in the same run. TURNTABLE_GPU_PYTHON names the
engine's interpreter where .engines holds none; TURNTABLE_BENCH_DIR is where the
checkpoints (62 GB for all) are written and kept, TURNTABLE_BENCH_MODELS picks some.

The same models as GGUF are measured with llama.cpp where its build has a device for
them; TURNTABLE_LLAMA_PYTHON names an interpreter with an xllamacpp built for CUDA.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from modules import planner
from modules.loader import Loader
from modules.messages import Delta, EngineSpec, Finished, Message, Sampling, Start
from modules.presets import Presets, Variant
from modules.process import EngineKind, EngineProcess, Limits

ROOT = Path(__file__).resolve().parent.parent
# Preset of the 24 GB pick, and what make-model has to write for it.
PICKS = {
    "assistant": ("phi4", "6.5"), "vision": ("qwen25vl7", "8.0"), "coding": ("qwen32", "4.25"),
    "reasoning": ("qwen32", "4.25"),
}  # fmt: skip
PINNED = 100 << 30
TURNS = 3
WORDS = "alpha beta gamma delta epsilon zeta eta theta "
DECODE_TOKENS = 256


def engine_kind(pinned_bytes: int) -> EngineKind:
    """ExLlamaV2 with this budget for page-locked memory."""
    python = os.environ.get("TURNTABLE_GPU_PYTHON", "")
    more = (("TURNTABLE_PINNED_BYTES", str(pinned_bytes)),)
    if python:
        return EngineKind("exllamav2", python, keeps_process=True, memory="vram", environment=more)
    from modules.environments import Environments

    kind = Environments().kind("exllamav2")
    return dataclasses.replace(kind, environment=(*kind.environment, *more), keeps_process=True, memory="vram")


def pick(preset: str) -> Variant:
    """The first variant of a shipped preset, which is the pick for 24 GB."""
    return Presets([ROOT / "presets"]).get(preset).variants[0]


def make(place: Path, chosen: list[str]) -> dict[str, Path]:
    """Write the checkpoints that are not there yet; coding and reasoning have the same shape but are two models."""
    folders = {}
    for number, preset in enumerate(chosen):
        model, bpw = PICKS[preset]
        folder = place / f"{preset}-{model}-{bpw}"
        if not (folder / "config.json").exists():
            began = time.perf_counter()
            command = [sys.executable, "-m", "benchmarks", "make-model", model, "--bpw", bpw, "--out", str(folder)]
            subprocess.run([*command, "--seed", str(number + 1)], cwd=ROOT, check=True)
            print(f"wrote {folder.name} in {time.perf_counter() - began:.0f} s", flush=True)
        folders[preset] = folder
    return folders


def make_gguf(place: Path, preset: str) -> Path:
    """The pick's shape as a GGUF file of about the same bits, written where it is not there yet."""
    model, bpw = PICKS[preset]
    folder = place / f"{model}-{bpw}-gguf"
    if not list(folder.glob("*.gguf")):
        command = [sys.executable, "-m", "benchmarks", "make-model", model, "--bpw", bpw, "--format", "gguf"]
        subprocess.run([*command, "--out", str(folder)], cwd=ROOT, check=True)
    return next(path for path in sorted(folder.glob("*.gguf")) if "mmproj" not in path.name)


def llama_kind() -> EngineKind | None:
    """llama.cpp where its build can use a card, else None."""
    python = os.environ.get("TURNTABLE_LLAMA_PYTHON") or sys.executable
    program = "import json, xllamacpp; print(json.dumps([d['type'].name for d in xllamacpp.get_device_info()]))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    kinds = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 and done.stdout.strip() else []
    if not any(kind.endswith(("_GPU", "_IGPU")) for kind in kinds):
        return None
    return EngineKind("llamacpp", python, memory="vram")


def llama_row(kind: EngineKind, model: Path, variant: Variant) -> dict[str, Any]:
    """llama.cpp's load from the page cache and its speed, every layer on the card."""
    cache = variant.cache_mode if variant.cache_mode != "Q6" else "Q8"  # its keys and values have one type
    options = (("gpu_layers", "999"),)
    spec = EngineSpec("llamacpp", str(model), context=variant.context, cache_mode=cache, options=options)
    process = EngineProcess(kind, Limits(load_s=900, stall_s=300))
    try:
        process.load(spec, lambda event: None)  # once for the page cache
    finally:
        process.stop()
    process = EngineProcess(kind, Limits(load_s=900, stall_s=300))
    try:
        load = process.load(spec, lambda event: None).load_s
    finally:
        process.stop()
    return {"file": model.name, "bytes": model.stat().st_size, "load_s": load, **speed(kind, spec)}


def forget(folder: Path) -> None:
    """Drop the files from the page cache, so that the next load reads the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def spec_of(variant: Variant, folder: Path) -> EngineSpec:
    """The spec as the program makes it, with the synthetic folder in place of the download."""
    return EngineSpec("exllamav2", str(folder), context=variant.context, cache_mode=variant.cache_mode)


def first_token(engine: EngineProcess, words: int = 12, tokens: int = 1) -> tuple[float, Finished]:
    """Seconds from the question to the first piece of text, and the end of the answer."""
    text = WORDS * (words // 8 + 1)
    began, first = time.perf_counter(), 0.0
    asked = Start("bench", (Message("user", text),), Sampling(temperature=0.0, max_tokens=tokens))
    for event in engine.generate(asked):
        if isinstance(event, Delta) and not first:
            first = time.perf_counter() - began
        if isinstance(event, Finished):
            return first or time.perf_counter() - began, event
    raise AssertionError("an answer ends with Finished")


def load_s(kind: EngineKind, spec: EngineSpec) -> dict[str, float]:
    """One load in a fresh child, warm-up and self-made one-token answer included, and what the card then holds."""
    process = EngineProcess(kind, Limits(load_s=900, stall_s=300))
    try:
        ready = process.load(spec, lambda event: None)
        process.ping()
        return {"load_s": ready.load_s, "allocated": process.measure(), "card": card_bytes(process.pid)}
    finally:
        process.stop()


def card_bytes(pid: int) -> int:
    """VRAM that the driver counts for a process; the whole card's where it names no processes."""
    ask = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    for row in subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines():
        number, _, size = row.partition(",")
        if number.strip() == str(pid) and size.strip().isdigit():
            return int(size) << 20
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]) << 20


def wait_for_copy(process: EngineProcess, copies: int) -> None:
    """Until the child's log says that so many page-locked copies are ready."""
    deadline = time.monotonic() + 300
    while sum("page-locked copy ready" in line for line in process.log) < copies:
        refused = [line for line in process.log if "page-locked" in line and "ready" not in line]
        if refused or time.monotonic() > deadline:
            raise RuntimeError(f"no page-locked copy: {refused or 'it took too long'}")
        time.sleep(0.2)


def pinned_swaps(specs: dict[str, EngineSpec]) -> dict[str, dict[str, float]]:
    """Load every model once in one child, wait for its page-locked copy, then swap through all of them."""
    process = EngineProcess(engine_kind(PINNED), Limits(load_s=900, stall_s=300))
    found: dict[str, list[dict[str, float]]] = {preset: [] for preset in specs}
    try:
        for number, spec in enumerate(specs.values(), 1):
            process.load(spec, lambda event: None)
            process.ping()
            wait_for_copy(process, number)
            process.unload()
        for _ in range(TURNS):
            for preset, spec in specs.items():
                began = time.perf_counter()
                ready = process.load(spec, lambda event: None)
                loaded_s = time.perf_counter() - began
                first_token(process)
                answered_s = time.perf_counter() - began
                figures = {"load_s": ready.load_s, "request_to_token_s": answered_s, "wall_s": loaded_s}
                began = time.perf_counter()
                left = process.unload()
                found[preset].append({**figures, "unload_s": time.perf_counter() - began, "left": left})
        print("\n".join(line for line in process.log if line.startswith(("loaded", "page-locked"))), flush=True)
    finally:
        process.stop()
    return {preset: {n: statistics.median(row[n] for row in rows) for n in rows[0]} for preset, rows in found.items()}


def speed(kind: EngineKind, spec: EngineSpec) -> dict[str, float]:
    """Prompt and decode tokens per second through the child and its pipe, on 2,048 and 256 tokens."""
    process = EngineProcess(kind, Limits(load_s=900, stall_s=300))
    prompts, decodes = [], []
    try:
        process.load(spec, lambda event: None)
        per_word = process.count_tokens((WORDS,))[0] / 8
        for number in range(TURNS + 1):
            text = f"{number} " + WORDS * int(2048 / per_word / 8)
            asked = Start("bench", (Message("user", text),), Sampling(temperature=0.0, max_tokens=DECODE_TOKENS))
            *_, end = process.generate(asked)
            assert isinstance(end, Finished)
            if number and end.timings.prompt_s and end.timings.tokens_per_second:
                prompts.append((end.counts.prompt - end.counts.cached) / end.timings.prompt_s)
                decodes.append(end.timings.tokens_per_second)
    finally:
        process.stop()
    return {"prompt": statistics.median(prompts or [0]), "decode": statistics.median(decodes or [0])}


def bare(spec: EngineSpec, link: bool) -> dict[str, Any]:
    """The bare library's figures, in a process of its own."""
    kind = engine_kind(0)
    command = [kind.python, "-m", "benchmarks.bare_exllamav2", spec.model, str(spec.context), spec.cache_mode]
    done = subprocess.run(
        [*command, *(["--link"] if link else [])], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, **dict(kind.environment)}, timeout=900,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def loader_swap(specs: dict[str, EngineSpec]) -> dict[str, float]:
    """Request to first token through the loader, lease, drain and one-token proof included, models page-locked."""
    kind = engine_kind(PINNED)
    loader = Loader({kind.name: kind}, 1, vram_budget_bytes=1, limits=Limits(load_s=900, stall_s=300))
    found: dict[str, list[float]] = {preset: [] for preset in specs}
    try:
        for turn in range(TURNS + 1):
            for preset, spec in specs.items():
                began = time.perf_counter()
                with loader.lease(spec, needs_bytes=1) as engine:
                    first_token(engine)
                    if turn:
                        found[preset].append(time.perf_counter() - began)
                    else:
                        wait_for_copy(engine, list(specs).index(preset) + 1)
    finally:
        loader.close()
    return {preset: statistics.median(times) for preset, times in found.items()}


def measure() -> dict[str, Any]:
    """Everything; prints one table and returns the figures. Needs a card: says so and stops without one."""
    smi = shutil.which("nvidia-smi")
    if smi is None or subprocess.run([smi, "-L"], capture_output=True, check=False).returncode:
        print("No NVIDIA card answers here, so there is nothing to measure.")
        return {}
    chosen = [name for name in os.environ.get("TURNTABLE_BENCH_MODELS", ",".join(PICKS)).split(",") if name in PICKS]
    kept = os.environ.get("TURNTABLE_BENCH_DIR")
    with contextlib.ExitStack() as stack:
        place = Path(kept or stack.enter_context(tempfile.TemporaryDirectory(prefix="turntable-bench-")))
        place.mkdir(parents=True, exist_ok=True)
        folders = make(place, chosen)
        specs = {preset: spec_of(pick(preset), folder) for preset, folder in folders.items()}
        return _measure(specs)


def _measure(specs: dict[str, EngineSpec]) -> dict[str, Any]:
    smi = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    card = subprocess.run(smi, capture_output=True, text=True, check=True).stdout.strip()
    rows: dict[str, dict[str, Any]] = {}
    plain = engine_kind(0)
    for number, (preset, spec) in enumerate(specs.items()):
        folder = Path(spec.model)
        row: dict[str, Any] = {"bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors"))}
        row["bare"] = bare(spec, link=number == 0)
        row["page_cache"] = load_s(plain, spec)
        forget(folder)
        row["cold"] = load_s(plain, spec)
        row["speed"] = speed(plain, spec)
        row["predicted"] = planner.plan_variant(pick(preset)).gpu_bytes
        rows[preset] = row
        print(json.dumps({preset: row}), flush=True)
    if (llama := llama_kind()) is None:
        print("llama.cpp is not measured: no build with a device for this card is installed.")
    else:
        for preset, spec in specs.items():
            model = make_gguf(Path(spec.model).parent, preset)
            rows[preset]["llamacpp"] = llama_row(llama, model, pick(preset))
    for preset, figures in pinned_swaps(specs).items():
        rows[preset]["pinned"] = figures
    for preset, seconds in loader_swap(specs).items():
        rows[preset]["loader_swap_s"] = seconds
    link = next(iter(rows.values()))["bare"]["link_bytes_per_s"]
    result = {
        "date": datetime.date.today().isoformat(), "card": card, "link_bytes_per_s": link, "rows": rows,
        "python": platform.python_version(), "torch": next(iter(rows.values()))["bare"]["torch"],
    }  # fmt: skip
    print(table(result))
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    link = result["link_bytes_per_s"]
    lines = [
        f"{result['date']}, {result['card']}, torch {result['torch']}, link {link / 1e9:.1f} GB/s", "",
        "| preset | GB | cold s | page cache s | stock s | pinned s | of the link | request to token s | "
        "prompt t/s (bare) | decode t/s (bare) | VRAM predicted GB | measured GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for preset, row in result["rows"].items():
        pinned, fast, alone = row["pinned"], row["speed"], row["bare"]
        cells = [
            preset, f"{row['bytes'] / 1e9:.2f}", f"{row['cold']['load_s']:.2f}", f"{row['page_cache']['load_s']:.2f}",
            f"{alone['stock_load_s']:.2f}", f"{pinned['load_s']:.3f}", f"{row['bytes'] / pinned['load_s'] / link:.0%}",
            f"{row['loader_swap_s']:.3f}", f"{fast['prompt']:.0f} ({alone['prompt_tokens_per_s']:.0f})",
            f"{fast['decode']:.1f} ({alone['decode_tokens_per_s']:.1f})", f"{row['predicted'] / 1e9:.2f}",
            f"{row['page_cache']['card'] / 1e9:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    others = {preset: row["llamacpp"] for preset, row in result["rows"].items() if "llamacpp" in row}
    if others:
        lines += ["", "| llama.cpp, preset | file | GB | page cache s | prompt t/s | decode t/s |"]
        lines.append("|---|---|---|---|---|---|")
    for preset, row in others.items():
        cells = [preset, row["file"], f"{row['bytes'] / 1e9:.2f}", f"{row['load_s']:.2f}"]
        cells += [f"{row['prompt']:.0f}", f"{row['decode']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
