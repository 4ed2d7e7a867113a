"""The contract of tests/contract.py for the engine of the base environment."""

from __future__ import annotations

import pytest

from modules.messages import EngineSpec

from .conftest import DEMO, LLAMA
from .contract import Contract, Subject


class TestLlamaCpp(Contract):
    """llama.cpp with the bundled assistant."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls) -> Subject:
        spec = EngineSpec("llamacpp", str(DEMO / "assistant-q8_0.gguf"), context=1024, parallel=3, threads=1)
        return Subject(LLAMA, spec, regex=False)
