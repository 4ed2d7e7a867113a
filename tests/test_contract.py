"""The contract of tests/contract.py for the engine of the base environment."""

from __future__ import annotations

import pytest

from modules.messages import EngineSpec

from .conftest import DEMO, LLAMA
from .contract import Contract, Subject
from .demo_answers import ASKS, expected, from_llama_cpp


class TestLlamaCpp(Contract):
    """llama.cpp with the bundled assistant."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls) -> Subject:
        spec = EngineSpec("llamacpp", str(DEMO / "assistant-q8_0.gguf"), context=1024, parallel=3, threads=1)
        return Subject(LLAMA, spec, regex=False)


@pytest.mark.parametrize("name", ASKS)
def test_the_answers_that_the_other_engines_are_held_to_are_those_of_llama_cpp(name: str) -> None:
    assert from_llama_cpp(name) == expected(name)
