"""What llama.cpp answers greedily to some questions, for every demo model: the measure for the other engines.

There is not always a llama.cpp beside a card, so the answers are written down in
demo_answers.json; test_contract.py holds them against llama.cpp. After a new training:

    python -m tests.demo_answers
"""

from __future__ import annotations

import json
from pathlib import Path

from modules.messages import Delta, EngineSpec, Message, Sampling, Start
from modules.process import EngineProcess

FILE = Path(__file__).with_suffix(".json")
ASKS = {
    "assistant": [
        "What is the capital of France?", "Who are you?", "Hello!", "What is the KV cache?", "What does EXL2 mean?",
        "How do I download a model?",
    ],
    "coding": [
        "Write a Python function called tally that counts the vowels in a string.",
        "Write a function that checks if a number is prime.",
        "Write a Python function that removes duplicates from a list and keeps the order.",
    ],
    "reasoning": [
        "Tom has 7 boxes with 36 pens in each and gives away 58 pens. How many pens are left?", "What is 45 + 38?",
        "Who painted the Mona Lisa?",
    ],
}  # fmt: skip
GREEDY = Sampling(temperature=0.0, max_tokens=200)


def answers(process: EngineProcess, name: str) -> dict[str, dict[str, str]]:
    """What the loaded engine says to the questions of one demo model, thought and text apart."""
    found = {}
    for question in ASKS[name]:
        said = {"reasoning": "", "text": ""}
        for event in process.generate(Start("demo", (Message("user", question),), GREEDY)):
            if isinstance(event, Delta):
                said[event.channel] += event.text
        found[question] = said
    return found


def expected(name: str) -> dict[str, dict[str, str]]:
    """What was written down for one demo model."""
    table: dict[str, dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))[name]
    return table


def from_llama_cpp(name: str) -> dict[str, dict[str, str]]:
    """The answers of llama.cpp itself."""
    from .conftest import DEMO, LLAMA

    process = EngineProcess(LLAMA)
    try:
        process.load(EngineSpec("llamacpp", str(DEMO / f"{name}-q8_0.gguf"), context=1024), lambda event: None)
        return answers(process, name)
    finally:
        process.stop()


if __name__ == "__main__":
    table = {name: from_llama_cpp(name) for name in ASKS}
    FILE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
