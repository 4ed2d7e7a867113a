"""ExLlamaV2 on a card: contract, self-test, swaps, memory, and failures after which the previous model is back."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from modules.errors import DoesNotFit, TurntableError
from modules.loader import Loader
from modules.messages import EngineSpec, Message
from modules.process import EngineKind, EngineProcess, Limits

from ..contract import Contract, Subject, ask
from ..demo_answers import ASKS, answers, expected
from .conftest import ROOT

SWAPS, RUN = 50, 200
GREEDY_ASKS = "Tell me something."


def test_the_self_test_passes(exllamav2_kind: EngineKind) -> None:
    done = subprocess.run(
        [exllamav2_kind.python, "-m", "modules.engines.selftest", "exllamav2"], cwd=ROOT, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    checks = [json.loads(line) for line in done.stdout.splitlines()]
    assert [c for c in checks if not c["ok"]] == []
    assert done.returncode == 0, done.stderr
    assert len(checks) >= 10


class TestFP16(Contract):
    """An FP16 checkpoint."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, exllamav2_kind: EngineKind, tiny: dict[str, EngineSpec]) -> Subject:
        return Subject(exllamav2_kind, tiny["fp16"])


class TestEXL2(Contract):
    """An EXL2 checkpoint with a quantized cache."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, exllamav2_kind: EngineKind, tiny: dict[str, EngineSpec]) -> Subject:
        return Subject(exllamav2_kind, dataclasses.replace(tiny["exl2"], cache_mode="Q6"))


class TestNgram(Contract):
    """Speculation from the text itself."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, exllamav2_kind: EngineKind, tiny: dict[str, EngineSpec]) -> Subject:
        return Subject(exllamav2_kind, dataclasses.replace(tiny["exl2"], options=(("draft", "ngram"),)))


class TestDraft(Contract):
    """A draft model, here the model itself."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, exllamav2_kind: EngineKind, tiny: dict[str, EngineSpec]) -> Subject:
        spec = tiny["exl2"]
        return Subject(exllamav2_kind, dataclasses.replace(spec, options=(("draft_model", spec.model),)))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], EngineSpec]:
    """The bundled models as FP16 checkpoints."""
    pytest.importorskip("gguf", reason="the package gguf reads the bundled models; it is not installed here")
    from ..exllama_on_cpu.models import convert

    place = tmp_path_factory.mktemp("demo")
    return lambda name: EngineSpec("exllamav2", str(convert(name, place / name)), context=1024)


@pytest.mark.parametrize("name", ASKS)
def test_the_demo_models_answer_as_they_do_in_llama_cpp(
    exllamav2_kind: EngineKind, demo: Callable[[str], EngineSpec], name: str
) -> None:
    process = EngineProcess(exllamav2_kind, Limits(load_s=300))
    try:
        process.load(demo(name), lambda event: None)
        assert answers(process, name) == expected(name)
    finally:
        process.stop()


def test_the_demo_that_sees_names_what_is_drawn(
    exllamav2_kind: EngineKind, demo: Callable[[str], EngineSpec], tmp_path: Path
) -> None:
    picture = Image.new("RGB", (112, 112), "white")
    ImageDraw.Draw(picture).rectangle((10, 10, 40, 40), fill="blue")
    picture.save(tmp_path / "a.png")
    process = EngineProcess(exllamav2_kind, Limits(load_s=300))
    try:
        process.load(demo("vision"), lambda event: None)
        turn = (Message("user", "Describe the image.", (str(tmp_path / "a.png"),)),)
        assert ask(process, turn).text == "I see a blue square in the top left corner."
    finally:
        process.stop()


def test_greedy_answers_are_equal_over_random_swaps(exllamav2_kind: EngineKind, tiny: dict[str, EngineSpec]) -> None:
    specs = [dataclasses.replace(spec, cache_mode=mode) for spec in tiny.values() for mode in ("FP16", "Q8", "Q4")]
    process = EngineProcess(exllamav2_kind, Limits(load_s=300))
    first: dict[EngineSpec, str] = {}
    choose = random.Random(5)
    try:
        for _ in range(SWAPS):
            spec = choose.choice(specs)
            process.load(spec, lambda event: None)
            text = ask(process, GREEDY_ASKS).text
            assert first.setdefault(spec, text) == text
            assert process.unload() == 0
    finally:
        process.stop()


def test_many_swaps_leave_no_memory_behind(exllamav2_kind: EngineKind, tiny: dict[str, EngineSpec]) -> None:
    process = EngineProcess(exllamav2_kind, Limits(load_s=300))
    used: list[int] = []
    try:
        for number in range(RUN):
            process.load(tiny["exl2" if number % 2 else "fp16"], lambda event: None)
            process.ping()
            assert process.unload() == 0
            if number % 20 == 19:
                used.append(_process_bytes(process.pid))
    finally:
        process.stop()
    assert used[-1] - used[1] <= 64 << 20, used


def _process_bytes(pid: int) -> int:
    """VRAM of one process as the driver counts it, or of the card where the driver hides processes."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    rows = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    for row in rows:
        number, _, size = row.partition(",")
        if number.strip() == str(pid) and size.strip().isdigit():
            return int(size) << 20
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) << 20


def _loader(kind: EngineKind) -> Loader:
    return Loader({kind.name: kind}, 1 << 40, vram_budget_bytes=1 << 40, limits=Limits(load_s=300))


def _card_bytes() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) << 20


def test_a_cache_that_does_not_fit_is_refused_and_the_previous_model_is_back(
    exllamav2_kind: EngineKind, tiny: dict[str, EngineSpec], tmp_path: Path
) -> None:
    # The tiny model's cache takes 2 layers * 2 heads * 64 * 2 (K, V) * 2 bytes = 1 KiB a token.
    tokens = (_card_bytes() // 1024 + (4 << 20)) // 256 * 256
    huge = dataclasses.replace(tiny["exl2"], options=(("cache_size", str(tokens)),))
    loader = _loader(exllamav2_kind)
    budget = loader.budget_bytes(exllamav2_kind.name)
    try:
        with loader.lease(tiny["fp16"], needs_bytes=budget) as engine:
            before = ask(engine, GREEDY_ASKS).text
        with pytest.raises(DoesNotFit), loader.lease(huge, needs_bytes=budget):
            pass
        assert [view.spec for view in loader.snapshot().models] == [tiny["fp16"]]
        with loader.lease(tiny["fp16"], needs_bytes=budget) as engine:
            assert ask(engine, GREEDY_ASKS).text == before
    finally:
        loader.close()


def test_weights_that_do_not_fit_are_refused_and_the_previous_model_is_back(
    exllamav2_kind: EngineKind, tiny: dict[str, EngineSpec]
) -> None:
    """The card is filled by another process first, so that small weights do not fit."""
    fill = (
        "import sys, torch\n"
        "free, _ = torch.cuda.mem_get_info(0)\n"
        "held = torch.empty(max(0, free - int(sys.argv[1])), dtype=torch.uint8, device='cuda:0')\n"
        "print('full', flush=True); sys.stdin.read()"
    )
    loader = _loader(exllamav2_kind)
    budget = loader.budget_bytes(exllamav2_kind.name)
    wide = dataclasses.replace(tiny["exl2"], options=(("cache_size", str(1 << 20)),))  # 1 GiB of cache
    try:
        with loader.lease(tiny["fp16"], needs_bytes=budget) as engine:
            before = ask(engine, GREEDY_ASKS).text
        other = subprocess.Popen(
            [exllamav2_kind.python, "-c", fill, str(512 << 20)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"full\n"
            with pytest.raises(TurntableError), loader.lease(wide, needs_bytes=budget):
                pass
            with loader.lease(tiny["fp16"], needs_bytes=budget) as engine:
                assert ask(engine, GREEDY_ASKS).text == before
        finally:
            other.communicate(b"")
    finally:
        loader.close()
