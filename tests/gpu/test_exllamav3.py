"""ExLlamaV3 on a card: contract, self-test, swaps, memory, and failures after which the previous model is back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from modules.messages import EngineSpec
from modules.process import EngineKind, EngineProcess, Limits

from ..contract import Contract, Subject
from ..demo_answers import ASKS, answers, expected
from . import scenarios
from .scenarios import Rig, Scenarios


def test_the_self_test_passes(exllamav3_kind: EngineKind) -> None:
    assert len(scenarios.self_test(exllamav3_kind)) >= 10


def spec_of(folder: Path) -> EngineSpec:
    return EngineSpec("exllamav3", str(folder), context=1024, parallel=3)


class TestFP16(Contract):
    """An FP16 checkpoint, three answers at once."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, exllamav3_kind: EngineKind, v3_models: Path) -> Subject:
        return Subject(exllamav3_kind, spec_of(v3_models / "fp16"))


class TestEXL3(Contract):
    """An EXL3 checkpoint."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, exllamav3_kind: EngineKind, v3_models: Path) -> Subject:
        return Subject(exllamav3_kind, spec_of(v3_models / "exl3"))


class TestQuantizedCache(Contract):
    """An FP16 checkpoint with 8-bit keys and 4-bit values."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, exllamav3_kind: EngineKind, v3_models: Path) -> Subject:
        return Subject(exllamav3_kind, dataclasses.replace(spec_of(v3_models / "fp16"), cache_mode="Q6"))


class TestSwaps(Scenarios):
    """Both weights with every cache mode. A picture takes little beyond its pixels here, so the large one is larger."""

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, exllamav3_kind: EngineKind, v3_models: Path, make_rig: Callable[..., Rig]) -> Rig:
        folders = [v3_models / kind for kind in ("exl3", "fp16")]
        specs = scenarios.small_models(folders, EngineSpec("exllamav3", "", context=1024), ("FP16", "Q8", "Q6", "Q4"))
        return make_rig(exllamav3_kind, specs, large_side=4480, copies=False)


@pytest.mark.parametrize("name", ASKS)
def test_the_demo_models_answer_as_they_do_in_llama_cpp(
    exllamav3_kind: EngineKind, demo: Callable[[str, str], EngineSpec], name: str
) -> None:
    process = EngineProcess(exllamav3_kind, Limits(load_s=300))
    try:
        process.load(demo("exllamav3", name), lambda event: None)
        assert answers(process, name) == expected(name)
    finally:
        process.stop()
