"""ExLlamaV3 on a card: the contract, its self-test, the demo models, and swaps without growth."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from modules.messages import EngineSpec
from modules.process import EngineKind, EngineProcess, Limits

from ..contract import Contract, Subject, ask
from ..demo_answers import ASKS, answers, expected
from .conftest import ROOT

SWAPS = 50


@pytest.fixture(scope="session")
def tiny(exllamav3_kind: EngineKind, tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
    """The tiny random FP16 model of tiny.py."""
    place = tmp_path_factory.mktemp("tiny-v3")
    return written(exllamav3_kind, "modules.engines.tiny import write_tiny as write", place)


@pytest.fixture(scope="session")
def exl3(exllamav3_kind: EngineKind, tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
    """The same with EXL3 weights at 4 bits."""
    place = tmp_path_factory.mktemp("tiny-exl3")
    return written(exllamav3_kind, "modules.engines.exllamav3 import write_exl3 as write", place)


def written(kind: EngineKind, source: str, place: Path) -> EngineSpec:
    """A tiny model, written by the engine's own interpreter."""
    program = f"import sys; from pathlib import Path; from {source}\nwrite(Path(sys.argv[1]))"
    subprocess.run([kind.python, "-c", program, str(place)], cwd=ROOT, check=True, timeout=300)
    return EngineSpec("exllamav3", str(place), context=1024, parallel=3)


def test_the_self_test_passes(exllamav3_kind: EngineKind) -> None:
    done = subprocess.run(
        [exllamav3_kind.python, "-m", "modules.engines.selftest", "exllamav3"], cwd=ROOT, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    checks = [json.loads(line) for line in done.stdout.splitlines()]
    assert [c for c in checks if not c["ok"]] == []
    assert done.returncode == 0, done.stderr


class TestFP16(Contract):
    """An FP16 checkpoint, three answers at once."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, exllamav3_kind: EngineKind, tiny: EngineSpec) -> Subject:
        return Subject(exllamav3_kind, tiny)


class TestEXL3(Contract):
    """An EXL3 checkpoint."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, exllamav3_kind: EngineKind, exl3: EngineSpec) -> Subject:
        return Subject(exllamav3_kind, exl3)


class TestQuantizedCache(Contract):
    """The same with 8-bit keys and 4-bit values."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, exllamav3_kind: EngineKind, tiny: EngineSpec) -> Subject:
        return Subject(exllamav3_kind, dataclasses.replace(tiny, cache_mode="Q6"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], EngineSpec]:
    """The bundled models as FP16 checkpoints."""
    pytest.importorskip("gguf", reason="the package gguf reads the bundled models; it is not installed here")
    from ..exllama_on_cpu.models import convert

    place = tmp_path_factory.mktemp("demo-v3")
    return lambda name: EngineSpec("exllamav3", str(convert(name, place / name)), context=1024)


@pytest.mark.parametrize("name", ASKS)
def test_the_demo_models_answer_as_they_do_in_llama_cpp(
    exllamav3_kind: EngineKind, demo: Callable[[str], EngineSpec], name: str
) -> None:
    process = EngineProcess(exllamav3_kind, Limits(load_s=300))
    try:
        process.load(demo(name), lambda event: None)
        assert answers(process, name) == expected(name)
    finally:
        process.stop()


def test_swaps_change_nothing_and_leave_nothing(exllamav3_kind: EngineKind, tiny: EngineSpec) -> None:
    process = EngineProcess(exllamav3_kind, Limits(load_s=300))
    first: dict[str, str] = {}
    try:
        for number in range(SWAPS):
            spec = dataclasses.replace(tiny, cache_mode=("FP16", "Q8", "Q4")[number % 3])
            process.load(spec, lambda event: None)
            text = ask(process, "Tell me something.").text
            assert first.setdefault(spec.cache_mode, text) == text
            assert process.unload() <= 64 << 20
    finally:
        process.stop()
