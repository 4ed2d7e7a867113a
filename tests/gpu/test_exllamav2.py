"""ExLlamaV2 on a card: contract, self-test, swaps, memory, and failures after which the previous model is back."""

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


def test_the_self_test_passes(exllamav2_kind: EngineKind) -> None:
    assert len(scenarios.self_test(exllamav2_kind)) >= 10


@pytest.fixture(scope="session")
def tiny(v2_models: Path) -> dict[str, EngineSpec]:
    """Specs of the tiny models, by quantization."""
    return {kind: EngineSpec("exllamav2", str(v2_models / kind), context=1024) for kind in ("fp16", "exl2", "gptq")}


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


class TestGPTQ(Contract):
    """A GPTQ checkpoint with inputs in an order of their own."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, exllamav2_kind: EngineKind, tiny: dict[str, EngineSpec]) -> Subject:
        return Subject(exllamav2_kind, tiny["gptq"])


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


class TestSwaps(Scenarios):
    """All quantizations and cache modes; the pictures' windows are a mask of patches times patches here."""

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, exllamav2_kind: EngineKind, v2_models: Path, make_rig: Callable[..., Rig]) -> Rig:
        folders = [v2_models / kind for kind in ("exl2", "fp16", "gptq")]
        specs = scenarios.small_models(folders, EngineSpec("exllamav2", "", context=1024), ("FP16", "Q8", "Q6", "Q4"))
        return make_rig(exllamav2_kind, specs, large_side=1960, copies=True)


@pytest.mark.parametrize("name", ASKS)
def test_the_demo_models_answer_as_they_do_in_llama_cpp(
    exllamav2_kind: EngineKind, demo: Callable[[str, str], EngineSpec], name: str
) -> None:
    process = EngineProcess(exllamav2_kind, Limits(load_s=300))
    try:
        process.load(demo("exllamav2", name), lambda event: None)
        assert answers(process, name) == expected(name)
    finally:
        process.stop()
