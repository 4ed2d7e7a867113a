"""What must hold while models come and go in a card's memory, as tests: a module subclasses Scenarios.

Run at full length on a card (tests/gpu), and shortly for both ExLlama adapters without
one (tests/test_exllamav2.py, tests/test_exllamav3.py), where tests/exllama_on_cpu
pretends a small card: so these are known to be right programs before they meet a card.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from modules.engines.tiny import INTERMEDIATE, write_tiny
from modules.errors import DoesNotFit, GenerateError
from modules.loader import LEFTOVER_BYTES, LeaseCancelled, Loader
from modules.messages import EngineSpec, Loading, Message, Queued
from modules.process import EngineKind, EngineProcess, Limits

from ..contract import ask

ROOT = Path(__file__).resolve().parent.parent.parent
CONVERT = "tests.exllama_on_cpu.models"  # writes the bundled models as checkpoints
LIMITS = Limits(load_s=300, stall_s=120)
ASKS = "Tell me something."
SEEN = "I see a blue square in the top left corner."
NEEDS = 100  # bytes as the loader counts them; all that it has, so that every lease of another model is a swap
LEFT_BYTES = 256 << 20  # of a card that is made full for weights
WIDE_LAYERS, WIDE_INTERMEDIATE = 16, 87_040  # 2 GiB of weights in half precision, whatever stays free above
COPY_READY = "page-locked copy ready"
# Takes a card's memory but for so many bytes, and keeps it until its stdin ends.
FILL = """
import sys, torch
left, step, held = int(sys.argv[1]), 1 << 30, []
while (free := torch.cuda.mem_get_info(0)[0] - left) >= 2 << 20 and step >= 2 << 20:
    try:
        held.append(torch.empty(min(step, free), dtype=torch.uint8, device="cuda:0"))
    except torch.OutOfMemoryError:
        step //= 2
print(sum(block.numel() for block in held), torch.cuda.mem_get_info(0)[0], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Rig:
    """One engine on one card, with models for it, and how to look at the card.

    specs are small models of at least two folders; wide has 2 GiB of weights, too_long a cache that no card holds;
    sees is the bundled model that sees, and allows pictures of large_side pixels. swaps and run are how often to swap.
    held_bytes says what the card holds for a child; fill keeps all but so many bytes of the card taken. copies: the
    engine makes page-locked copies.
    """

    kind: EngineKind
    specs: tuple[EngineSpec, ...]
    wide: EngineSpec
    too_long: EngineSpec
    sees: EngineSpec
    large_side: int
    held_bytes: Callable[[EngineProcess], int]
    fill: Callable[[int], AbstractContextManager[object]]
    swaps: int
    run: int
    copies: bool = False


def environment(kind: EngineKind) -> dict[str, str]:
    """The variables with which a child of this kind runs: without them its compiled extension is not found."""
    given = {**os.environ, **dict(kind.environment)}
    return {**given, "PYTHONPATH": os.pathsep.join(filter(None, [given.get("PYTHONPATH", ""), str(ROOT)]))}


def program(kind: EngineKind, text: str, *arguments: object) -> str:
    """Run a program with the engine's interpreter as its children run; what it printed."""
    done = subprocess.run(
        [kind.python, "-c", text, *map(str, arguments)], cwd=ROOT, env=environment(kind), capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def self_test(kind: EngineKind) -> list[dict[str, object]]:
    """The checks of the engine's self-test, which must all be passed."""
    command = [kind.python, "-m", "modules.engines.selftest", kind.name]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(kind), capture_output=True, text=True, timeout=600, check=False
    )
    checks: list[dict[str, object]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [check for check in checks if not check["ok"]] == [], done.stderr[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]
    return checks


@contextlib.contextmanager
def filled(kind: EngineKind, left_bytes: int, *, first: str = "") -> Iterator[tuple[int, int]]:
    """The card, but for so many bytes, belongs to another process meanwhile: bytes taken, and bytes still free.

    first is a line of Python for that process, which the stand-in needs.
    """
    other = subprocess.Popen(
        [kind.python, "-c", f"{first}\n{FILL}", str(left_bytes)], cwd=ROOT, env=environment(kind),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout is not None
        taken, free = map(int, other.stdout.readline().split())
        yield taken, free
    finally:
        other.communicate("", timeout=60)


def converter(python: str) -> str:
    """An interpreter that can read the bundled models; skips the test where there is none."""
    for candidate in (sys.executable, python):
        if Path(candidate).is_file():
            done = subprocess.run([candidate, "-c", "import gguf"], capture_output=True, check=False, timeout=60)
            if done.returncode == 0:
                return candidate
    pytest.skip("no interpreter with the package gguf, which reads the bundled models: ./test.sh makes .venv-exllama")


def converted(python: str, engine: str, name: str, folder: Path) -> Path:
    """A bundled model as an FP16 checkpoint for an engine, written once."""
    if not folder.exists():
        command = [converter(python), "-m", CONVERT, name, str(folder), engine]
        subprocess.run(command, cwd=ROOT, check=True, timeout=100)
    return folder


def allow_large_pictures(folder: Path, side: int) -> tuple[tuple[str, str], ...]:
    """Let a model that sees take pictures of this side whole; returns the options that its spec needs."""
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_pixels": side * side}))
    return (("max_pixels", str(side * side)),)


def write_wide(folder: Path) -> Path:
    """A model whose weights are 2 GiB of zeros in a file with a hole, so that it takes no disk."""
    write_tiny(folder)
    file = folder / "model.safetensors"
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    shapes = {n: t["shape"] for n, t in json.loads(file.read_bytes()[8 : 8 + length]).items()}
    wide = {name: shape for name, shape in shapes.items() if ".layers." not in name}
    for layer in range(WIDE_LAYERS):
        for name, shape in shapes.items():
            if ".layers.0." in name:
                more = [WIDE_INTERMEDIATE if ".mlp." in name and side == INTERMEDIATE else side for side in shape]
                wide[name.replace(".layers.0.", f".layers.{layer}.")] = more
    head, at = {}, 0
    for name, shape in wide.items():
        size = 2 * math.prod(shape)
        head[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + at)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": WIDE_LAYERS, "intermediate_size": WIDE_INTERMEDIATE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def drawn(path: Path, side: int = 112) -> str:
    """A picture file with a blue square in the top left corner."""
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).rectangle((10, 10, 40, 40), fill="blue")
    picture.save(path)
    return str(path)


def look(engine: EngineProcess, picture: str) -> str:
    return ask(engine, (Message("user", "Describe the image.", (picture,)),)).text


def wait_for_copies(process: EngineProcess, count: int) -> None:
    """Until the child has made so many page-locked copies; a copy that is refused fails the test with its reason."""
    done = threading.Event()
    for _ in range(1200):
        ready = sum(COPY_READY in line for line in process.log)
        refused = [line for line in process.log if "page-locked copy" in line and COPY_READY not in line]
        assert not refused, refused
        if ready >= count:
            return
        done.wait(0.1)
    raise AssertionError(f"{count} page-locked copies were not ready in time: {list(process.log)[-5:]}")


class Scenarios:
    """Subclasses define `rig`, a fixture that returns a Rig."""

    @pytest.fixture
    def process(self, rig: Rig) -> Iterator[EngineProcess]:
        process = EngineProcess(rig.kind, LIMITS)
        yield process
        process.stop()

    @pytest.fixture
    def loader(self, rig: Rig) -> Iterator[Loader]:
        loader = Loader({rig.kind.name: rig.kind}, 1 << 40, vram_budget_bytes=NEEDS, limits=LIMITS)
        yield loader
        loader.close()

    def test_greedy_answers_are_equal_over_random_swaps(self, rig: Rig, process: EngineProcess) -> None:
        first: dict[EngineSpec, str] = {}
        folders: set[str] = set()
        choose = random.Random(5)
        for number in range(len(rig.specs) + rig.swaps):
            every = number < len(rig.specs)  # each once; after that from its page-locked copy where there are such
            spec = rig.specs[number] if every else choose.choice(rig.specs)
            process.load(spec, lambda event: None)
            text = ask(process, ASKS).text
            assert first.setdefault(spec, text) == text
            folders.add(spec.model)
            if every and rig.copies:
                wait_for_copies(process, len(folders))
            assert process.unload() <= LEFTOVER_BYTES
        assert len(set(first.values())) > 1  # else a wrong model could pass for the right one

    def test_many_swaps_leave_no_memory_behind(self, rig: Rig, process: EngineProcess) -> None:
        left, held = [], []
        other = next(spec for spec in rig.specs if spec.model != rig.specs[0].model)
        for number in range(rig.run):
            process.load(other if number % 2 else rig.specs[0], lambda event: None)
            process.ping()
            left.append(process.unload())
            held.append(rig.held_bytes(process) if number % 4 == 3 else 0)
        settled = rig.run // 4  # what a library keeps for ever, it has by then
        assert max(left) <= LEFTOVER_BYTES
        assert max(left[settled:]) <= max(left[:settled]), left  # PyTorch's own count, to the byte
        assert max(held[settled:]) - max(held[:settled]) <= LEFTOVER_BYTES, held

    def test_after_a_load_that_was_cancelled_the_previous_model_is_back(self, rig: Rig, loader: Loader) -> None:
        stop = threading.Event()

        def cancel(event: Loading | Queued) -> None:
            if isinstance(event, Loading) and event.stage == "reading" and not stop.is_set():
                stop.set()
                loader.wake()

        def load() -> None:
            with loader.lease(rig.wide, needs_bytes=NEEDS, report=cancel, cancelled=stop):
                raise AssertionError("it was loaded")

        self.is_refused_and_the_previous_is_back(rig, loader, LeaseCancelled, load)
        assert stop.is_set()

    def test_after_weights_that_do_not_fit_the_previous_model_is_back(self, rig: Rig, loader: Loader) -> None:
        def load() -> None:
            with rig.fill(LEFT_BYTES), loader.lease(rig.wide, needs_bytes=NEEDS):
                raise AssertionError("it was loaded")

        self.is_refused_and_the_previous_is_back(rig, loader, DoesNotFit, load)

    def test_after_a_cache_that_does_not_fit_the_previous_model_is_back(self, rig: Rig, loader: Loader) -> None:
        def load() -> None:
            with loader.lease(rig.too_long, needs_bytes=NEEDS):
                raise AssertionError("it was loaded")

        self.is_refused_and_the_previous_is_back(rig, loader, DoesNotFit, load)

    def test_after_a_picture_that_does_not_fit_this_model_answers_and_the_previous_one_comes_back(
        self, rig: Rig, loader: Loader, tmp_path: Path
    ) -> None:
        large = drawn(tmp_path / "large.png", rig.large_side)

        def show() -> None:
            with loader.lease(rig.sees, needs_bytes=NEEDS) as engine:
                assert look(engine, drawn(tmp_path / "small.png")) == SEEN
                with rig.fill(0), pytest.raises(GenerateError, match="ran out of memory"):
                    look(engine, large)
                # Another file with the same picture: the engine keeps what it has seen.
                assert look(engine, drawn(tmp_path / "small.bmp")) == SEEN

        first = rig.specs[0]
        with loader.lease(first, needs_bytes=NEEDS) as engine:
            before = ask(engine, ASKS).text
        show()
        with loader.lease(first, needs_bytes=NEEDS) as engine:
            assert ask(engine, ASKS).text == before

    @staticmethod
    def is_refused_and_the_previous_is_back(
        rig: Rig, loader: Loader, refusal: type[Exception], load: Callable[[], None]
    ) -> None:
        first = rig.specs[0]
        with loader.lease(first, needs_bytes=NEEDS) as engine:
            before = ask(engine, ASKS).text
        with pytest.raises(refusal):
            load()
        assert [view.spec for view in loader.snapshot().models] == [first]  # before anybody asks for it
        with loader.lease(first, needs_bytes=NEEDS) as engine:
            assert ask(engine, ASKS).text == before


def small_models(folders: list[Path], base: EngineSpec, modes: tuple[str, ...]) -> tuple[EngineSpec, ...]:
    """Each of the folders with each cache mode, the folders first."""
    return tuple(dataclasses.replace(base, model=str(folder), cache_mode=mode) for mode in modes for folder in folders)
