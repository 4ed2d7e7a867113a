"""Loading, swapping and speed on a card, on synthetic checkpoints with the real shapes of the 24 GB picks.

    python -m benchmarks gpu [--json FILE]

Loads each model from the disk with an empty page cache, from the page cache, and from
page-locked memory; swaps between all of them through the loader; and compares prompt
and decode speed with the bare library in the same run. A step that fails leaves its
cells empty and is named below the table. TURNTABLE_GPU_PYTHON names the engine's
interpreter where .engines holds none; TURNTABLE_BENCH_DIR is where the checkpoints
(62 GB for all) are written and kept, TURNTABLE_BENCH_MODELS picks some. The page-locked
copies get the RAM that is free; models that do not fit together have them in turn.

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
from collections.abc import Callable, Mapping
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
# What the engine leaves free when it makes a page-locked copy (RAM_RESERVE_BYTES in fastload.py), and as much again
# for the checkpoints that are read beside it.
RESERVE_BYTES = 8 << 30
COPY_WAIT_S = 300.0
COPY_SHARE = 1.02  # of the file's size: the copy has three small tables for each one in the file
# The bars: beside the copy of the weights a load takes so long at most, decoding has so much of the bare library's
# speed at least, and the plan is so near to what the driver counts.
MOST_BESIDE_S, LEAST_DECODE, MOST_OFF = 0.150, 0.98, 0.03
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


def free_ram_bytes() -> int:
    """RAM that programs can still take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def groups(sizes: Mapping[str, int], budget_bytes: int) -> list[list[str]]:
    """The models, in order, in groups whose page-locked copies fit into the budget together.

    A model that is too large by itself is a group of its own.
    """
    found: list[list[str]] = []
    for name in sizes:
        if found and sum(sizes[other] for other in (*found[-1], name)) * COPY_SHARE <= budget_bytes:
            found[-1].append(name)
        else:
            found.append([name])
    return found


def copy_problem(process: EngineProcess, copies: int) -> str:
    """Wait until the child has made so many page-locked copies; the reason where one is refused, else nothing."""
    deadline = time.monotonic() + COPY_WAIT_S
    while sum("page-locked copy ready" in line for line in process.log) < copies:
        refused = [line for line in process.log if "page-locked copy" in line and "ready" not in line]
        if refused:
            return refused[-1]
        if not process.alive or time.monotonic() > deadline:
            return f"no page-locked copy was made within {COPY_WAIT_S:.0f} s"
        time.sleep(0.2)
    return ""


def pinned_swaps(specs: dict[str, EngineSpec], budget_bytes: int) -> dict[str, dict[str, Any]]:
    """Load every model once in one child, wait for its page-locked copy, then swap through all of them.

    Medians for each preset; {"missing": reason} for all of them where a copy is refused.
    """
    process = EngineProcess(engine_kind(budget_bytes), Limits(load_s=900, stall_s=300))
    found: dict[str, list[dict[str, float]]] = {}
    try:
        for preset, spec in specs.items():
            process.load(spec, lambda event: None)
            process.ping()
            if problem := copy_problem(process, len(found) + 1):
                return {other: {"missing": f"{preset}: {problem}"} for other in specs}
            found[preset] = []
            process.unload()
        for _ in range(TURNS):
            for preset in found:
                began = time.perf_counter()
                ready = process.load(specs[preset], lambda event: None)
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
    command += [str(TURNS), str(DECODE_TOKENS)]
    done = subprocess.run(
        [*command, *(["--link"] if link else [])], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, **dict(kind.environment)}, timeout=900,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def loader_swap(specs: dict[str, EngineSpec], budget_bytes: int) -> dict[str, float]:
    """Request to first token through the loader, lease, drain and one-token proof included, models page-locked."""
    kind = engine_kind(budget_bytes)
    loader = Loader({kind.name: kind}, 1, vram_budget_bytes=1, limits=Limits(load_s=900, stall_s=300))
    found: dict[str, list[float]] = {preset: [] for preset in specs}
    try:
        for turn in range(TURNS + 1):
            for number, (preset, spec) in enumerate(specs.items(), 1):
                began = time.perf_counter()
                with loader.lease(spec, needs_bytes=1, fresh="again") as engine:  # a group may have one model only
                    first_token(engine)
                    if turn:
                        found[preset].append(time.perf_counter() - began)
                    elif problem := copy_problem(engine, number):
                        raise RuntimeError(problem)
    finally:
        loader.close()
    return {preset: statistics.median(times) for preset, times in found.items()}


class Steps:
    """Runs the steps, and remembers which failed: what was measured before and after them is not lost."""

    def __init__(self) -> None:
        self.failed: list[dict[str, str]] = []

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """What the work returns, or None. Ctrl-C ends the whole run, and is named like a failure."""
        try:
            return work()
        except (Exception, KeyboardInterrupt) as error:
            words = " ".join(str(error).split()) or type(error).__name__
            hint = getattr(error, "hint", "")
            self.failed.append({"step": name, "reason": f"{words} {hint}".strip()[-600:]})
            print(f"FAILED: {name}: {self.failed[-1]['reason']}", flush=True)
            if isinstance(error, KeyboardInterrupt):
                raise
        return None


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
    """The table is printed and the figures are returned whatever fails."""
    steps = Steps()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "python": platform.python_version(), "card": "", "torch": "",
        "link_bytes_per_s": 0.0, "rows": {}, "failed_steps": steps.failed,
    }  # fmt: skip
    for preset, spec in specs.items():
        size = sum(path.stat().st_size for path in Path(spec.model).glob("*.safetensors"))
        result["rows"][preset] = {"bytes": size, "predicted": planner.plan_variant(pick(preset)).gpu_bytes}
    with contextlib.suppress(KeyboardInterrupt):
        _alone(specs, result, steps)
        _beside_llama(specs, result["rows"], steps)
        _swaps(specs, result["rows"], steps)
    print(table(result))
    return result


def _alone(specs: dict[str, EngineSpec], result: dict[str, Any], steps: Steps) -> None:
    """Each model by itself, and the bare library."""
    smi = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    result["card"] = subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip()
    plain = engine_kind(0)
    for preset, spec in specs.items():
        row = result["rows"][preset]
        link = not result["link_bytes_per_s"]
        row["bare"] = steps.run(f"{preset}: the bare library", lambda s=spec, n=link: bare(s, link=n))
        if row["bare"] and link:
            result |= {"link_bytes_per_s": row["bare"]["link_bytes_per_s"], "torch": row["bare"]["torch"]}
        row["page_cache"] = steps.run(f"{preset}: load from the page cache", lambda s=spec: load_s(plain, s))
        forget(Path(spec.model))
        row["cold"] = steps.run(f"{preset}: load from the disk", lambda s=spec: load_s(plain, s))
        row["speed"] = steps.run(f"{preset}: speed", lambda s=spec: speed(plain, s))
        print(json.dumps({preset: row}), flush=True)


def _beside_llama(specs: dict[str, EngineSpec], rows: dict[str, dict[str, Any]], steps: Steps) -> None:
    llama = steps.run("look for llama.cpp's devices", llama_kind)
    if llama is None:
        print("llama.cpp is not measured: no build with a device for this card is installed.")
        return
    for preset, spec in specs.items():
        found = steps.run(
            f"{preset}: llama.cpp",
            lambda s=spec, p=preset: llama_row(llama, make_gguf(Path(s.model).parent, p), pick(p)),
        )
        rows[preset] |= {"llamacpp": found} if found else {}


def _swaps(specs: dict[str, EngineSpec], rows: dict[str, dict[str, Any]], steps: Steps) -> None:
    """From page-locked copies, as many models in one child as the RAM holds copies of."""
    budget = max(0, free_ram_bytes() - RESERVE_BYTES)
    for names in groups({preset: rows[preset]["bytes"] for preset in specs}, budget):
        if (needs := sum(rows[preset]["bytes"] for preset in names) * COPY_SHARE) > budget:
            words = f"{names[0]} needs {needs / 1e9:.1f} GB of RAM, and {budget / 1e9:.1f} GB are free for it"
            rows[names[0]]["pinned"] = {"missing": words}
            continue
        some = {preset: specs[preset] for preset in names}
        pinned = steps.run(f"{', '.join(names)}: page-locked", lambda s=some: pinned_swaps(s, budget)) or {}
        for preset in names:
            rows[preset]["pinned"] = pinned.get(preset)
        if not pinned or any("missing" in found for found in pinned.values()):
            continue
        swapped = steps.run(f"{', '.join(names)}: through the loader", lambda s=some: loader_swap(s, budget)) or {}
        for preset in names:
            rows[preset]["loader_swap_s"] = swapped.get(preset)


NOTHING = "–"  # of a step that failed


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown: loads and speeds, the bars, llama.cpp, and what is missing and why."""
    link, rows = result["link_bytes_per_s"], result["rows"]
    lines = [
        f"{result['date']}, {result['card']}, torch {result['torch'] or NOTHING}, link {_cell(link / 1e9)} GB/s", "",
        "| preset | GB | to the card GB | cold s | page cache s | stock s | pinned s | of the link | "
        "request to token s | prompt t/s (bare) | decode t/s (bare) | VRAM predicted GB | measured GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {preset} | {' | '.join(_cells(row, link))} |" for preset, row in rows.items()]
    lines += [
        "", f"| preset | beside the copy ms, at most {MOST_BESIDE_S * 1e3:.0f} | decode of bare, at least "
        f"{LEAST_DECODE:.0%} | VRAM predicted of measured, within {MOST_OFF:.0%} |", "|---|---|---|---|",
    ]  # fmt: skip
    for preset, row in rows.items():
        lines.append(f"| {preset} | {' | '.join(words for words, _ in bars(row, link))} |")
    met = [met for row in rows.values() for _, met in bars(row, link)]
    lines += ["", f"Bars met: {met.count(True)} of {len(met)}; not met: {met.count(False)}; not measured: "
              f"{met.count(None)}."]  # fmt: skip
    return "\n".join([*lines, *_llama_lines(rows), *_missing_lines(result)])


def _cell(value: float | None, form: str = ".2f") -> str:
    return format(value, form) if value else NOTHING


def _of(row: dict[str, Any], step: str, name: str) -> float | None:
    """A figure of one step; None where the step failed."""
    value: float | None = (row.get(step) or {}).get(name)
    return value


def _cells(row: dict[str, Any], link: float) -> list[str]:
    pinned, device = _of(row, "pinned", "load_s"), _of(row, "bare", "device_bytes")
    share = device / pinned / link if device and pinned and link else None
    no_copy = "no copy" if (row.get("pinned") or {}).get("missing") else ""
    return [
        _cell(row["bytes"] / 1e9), _cell((device or 0) / 1e9), _cell(_of(row, "cold", "load_s")),
        _cell(_of(row, "page_cache", "load_s")), _cell(_of(row, "bare", "stock_load_s")),
        no_copy or _cell(pinned, ".3f"), no_copy or _cell(share, ".0%"),
        no_copy or _cell(row.get("loader_swap_s"), ".3f"),
        f"{_cell(_of(row, 'speed', 'prompt'), '.0f')} ({_cell(_of(row, 'bare', 'prompt_tokens_per_s'), '.0f')})",
        f"{_cell(_of(row, 'speed', 'decode'), '.1f')} ({_cell(_of(row, 'bare', 'decode_tokens_per_s'), '.1f')})",
        _cell(row["predicted"] / 1e9), _cell((_of(row, "page_cache", "card") or 0) / 1e9),
    ]  # fmt: skip


def bars(row: dict[str, Any], link: float) -> list[tuple[str, bool | None]]:
    """Each bar's figure in words, and whether it is met; None where a part of it was not measured.

    Beside the copy is what a load from page-locked memory takes beyond the time in which the link carries the bytes
    that go to the card: the embedding stays in RAM and does not count.
    """
    found: list[tuple[str, bool | None]] = []

    def judge(value: float | None, form: str, met: Callable[[float], bool]) -> None:
        if value is None:
            found.append(("not measured", None))
        else:
            found.append((f"{value:{form}}, {'met' if met(value) else 'NOT MET'}", met(value)))

    pinned, device = _of(row, "pinned", "load_s"), _of(row, "bare", "device_bytes")
    beside = (pinned - device / link) * 1e3 if pinned and device and link else None
    judge(beside, ".0f", lambda ms: ms <= MOST_BESIDE_S * 1e3)
    decode, alone = _of(row, "speed", "decode"), _of(row, "bare", "decode_tokens_per_s")
    judge(decode / alone if decode and alone else None, ".1%", lambda ratio: ratio >= LEAST_DECODE)
    card = _of(row, "page_cache", "card")
    judge(row["predicted"] / card if card else None, ".1%", lambda ratio: abs(ratio - 1) <= MOST_OFF)
    return found


def _llama_lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    others = {preset: row["llamacpp"] for preset, row in rows.items() if "llamacpp" in row}
    lines = ["", "| llama.cpp, preset | file | GB | page cache s | prompt t/s | decode t/s |"]
    lines.append("|---|---|---|---|---|---|")
    for preset, row in others.items():
        cells = [preset, row["file"], f"{row['bytes'] / 1e9:.2f}", f"{row['load_s']:.2f}"]
        cells += [f"{row['prompt']:.0f}", f"{row['decode']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if others else []


def _missing_lines(result: dict[str, Any]) -> list[str]:
    """Why cells are empty."""
    copies = {(row.get("pinned") or {}).get("missing") for row in result["rows"].values()} - {None}
    lines = [f"No page-locked copy: {reason}." for reason in sorted(copies)]
    lines += [f"FAILED: {step['step']}: {step['reason']}" for step in result["failed_steps"]]
    return ["", *lines] if lines else []
