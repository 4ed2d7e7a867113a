"""The contract of tests/contract.py for the engine of the base environment."""

from __future__ import annotations

import subprocess
import sys

import pytest

from modules.messages import EngineSpec

from .conftest import DEMO, LLAMA, ROOT
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


AGAIN = """
import sys, threading
from modules.engines.llamacpp import LlamaCpp
from modules.messages import Delta, EngineSpec, Finished, Message, Sampling, Start

engine, ends, heard, done = LlamaCpp(), [], [], threading.Event()
engine.load(EngineSpec("llamacpp", sys.argv[1], context=512, threads=1), lambda step: None)
start = Start("a", (Message("user", "What is the capital of France?"),), Sampling(temperature=1.9, max_tokens=200))

def emit(event):
    if isinstance(event, Delta) and ends:
        heard.append(event)
        if len(heard) == 3:
            engine.cancel("a")
    elif isinstance(event, Finished):
        ends.append(event.reason)
        engine.start(start, emit) if len(ends) == 1 else done.set()

engine.start(start, emit)
print(ends if done.wait(60) else "it did not end")
"""


def test_a_name_that_is_used_again_at_once_is_that_of_the_new_answer() -> None:
    said = subprocess.run(
        [sys.executable, "-c", AGAIN, str(DEMO / "assistant-q8_0.gguf")],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert said.stdout.strip().endswith(", 'stopped']"), said.stdout + said.stderr[-2000:]
