"""The bundled demo models: their data, their files, and what they answer in the real engine."""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import hashlib
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from demo.training import assistant, coding, reasoning, vision

ROOT = Path(__file__).resolve().parent.parent
FILES = ["assistant", "coding", "reasoning", "vision", "vision-mmproj"]


# Data


@pytest.mark.parametrize("module", [assistant, coding, reasoning])
def test_text_generators_repeat(module) -> None:
    first, second = random.Random(5), random.Random(5)
    assert [module.training_sample(first) for _ in range(200)] == [module.training_sample(second) for _ in range(200)]


@pytest.mark.parametrize("module", [assistant, coding, reasoning])
def test_held_out_questions_are_not_trained(module) -> None:
    held_out = {s.question.lower().strip(" ?.!") for s in [*module.test_set(), *module.foreign_set()]}
    rng = random.Random(6)
    trained = {module.training_sample(rng).question.lower().strip(" ?.!") for _ in range(12_000)}
    assert len(held_out) > 150
    assert not held_out & trained


def test_training_has_no_test_name_or_thing() -> None:
    rng = random.Random(7)
    names = {coding.request(rng).facts[1] for _ in range(4000)}
    things = {reasoning.problem(rng).facts[1] for _ in range(4000)}
    assert not names & set(coding.TEST_NAMES)
    assert not things & set(reasoning.TEST_ITEMS)


def test_expected_answers_are_right_by_their_own_checkers() -> None:
    assert all(coding.is_right(s, s.answer) for s in coding.test_set())
    assert all(reasoning.is_right(s, s.answer) for s in reasoning.test_set())


def test_worked_steps_are_true() -> None:
    rng = random.Random(8)
    for _ in range(500):
        for left, right in re.findall(r"(\d+(?:[-+*]\d+)+)=(\d+)", reasoning.problem(rng).answer):
            assert eval(left) == int(right)


def test_pictures_repeat_and_hold_out_triples() -> None:
    first, second = random.Random(9), random.Random(9)
    for _ in range(30):
        (shapes, image), (again, other) = vision.training_scene(first), vision.training_scene(second)
        assert shapes == again and image.tobytes() == other.tobytes()
        assert not {s.triple for s in shapes} & set(vision.HELD_OUT)
    assert len(vision.HELD_OUT) + len(vision.SEEN) == 189 and len(vision.HELD_OUT) >= 20
    for pair in [(0, 1), (0, 2), (1, 2)]:
        wanted = {(t[pair[0]], t[pair[1]]) for t in vision.HELD_OUT}
        assert wanted <= {(t[pair[0]], t[pair[1]]) for t in vision.SEEN}


# Files


def test_files_are_those_of_the_readme() -> None:
    readme = (ROOT / "demo" / "README.md").read_text(encoding="utf-8")
    for name in FILES:
        data = (ROOT / "demo" / "models" / f"{name}-q8_0.gguf").read_bytes()
        assert f"| {name}-q8_0.gguf | {len(data)} | `{hashlib.sha256(data).hexdigest()}` |" in readme


def test_files_stay_small() -> None:
    assert sum(p.stat().st_size for p in (ROOT / "demo" / "models").glob("*.gguf")) < 7_000_000


# Answers


@pytest.fixture(scope="module")
def ask() -> Callable[..., str]:
    """Asks a demo model in the real llama.cpp; each is loaded once."""
    pytest.importorskip("xllamacpp", reason="the engine is needed to ask a model")
    from demo.training.engine import Demo

    loaded: dict[str, Demo] = {}

    def ask_model(name: str, question: str, image: Image.Image | None = None) -> str:
        if name not in loaded:
            loaded[name] = Demo(name)
        return loaded[name].ask(question, image)

    return ask_model


@pytest.mark.parametrize(("question", "key"), [
    ("What does 6.5 bpw mean?", "bpw"), ("What is cache mode?", "cache_mode"), ("Where is the load button?", "load"),
    ("What fits in 24 GB?", "fits24"), ("How do I add a tab?", "newtab"), ("Does it work offline?", "offline"),
    ("What is GGUF?", "gguf"), ("How do I delete a conversation?", "delete"), ("Who are you?", "who"),
    ("What is the memory budget?", "budget"), ("How do I change the port?", "port"), ("hello", "hello")])
def test_assistant_answers_from_the_faq(ask: Callable[..., str], question: str, key: str) -> None:
    assert ask("assistant", question) == {i.key: i.answer for i in assistant.intents()}[key]


@pytest.mark.parametrize(("question", "name", "call", "result"), [
    ("Write a function called frobnicate that reverses a string.", "frobnicate", ("abc",), "cba"),
    ("Write a Python function called zed that checks if a number is even.", "zed", (4,), True),
    ("Create a Python function named calc_price that adds two numbers.", "calc_price", (2, 3), 5),
    ("Write a function that checks if a number is prime", "is_prime", (97,), True),
    ("Write a Python function that checks if a string is a palindrome.", "is_palindrome", ("Anna",), True),
    ("Please write a Python function that returns the n-th Fibonacci number.", "fibonacci", (10,), 55),
    ("I need a function that counts the vowels in a string.", "count_vowels", ("Hello",), 2),
    ("Give me a Python function that computes the factorial of a number.", "factorial", (5,), 120),
    ("Write a function that sums a list of numbers.", "total", ([1, 2, 3],), 6),
    ("Can you write a Python function that returns the gcd of two integers?", "gcd", (12, 18), 6),
    ("python function that converts Celsius to Fahrenheit", "to_fahrenheit", (100,), 212),
    ("Write a function tally that counts the words in a text.", "tally", ("a b c",), 3)])
def test_coding_writes_functions_that_work(ask, question: str, name: str, call: tuple, result: object) -> None:
    code = re.search(r"```python\n(.*?)```", ask("coding", question), re.S)
    assert code
    space: dict = {}
    exec(code.group(1), space)
    assert space[name](*call) == result


@pytest.mark.parametrize(("question", "answer"), [
    ("Tom has 7 boxes with 36 pens in each and gives away 58 pens. How many pens are left?", "194 pens"),
    ("Tom has 3 lemons and buys 4 more. How many lemons does Tom have?", "7 lemons"),
    ("A shop has 81 books and sells 27. How many books remain?", "54 books"),
    ("Anna has 25 coins and Ben has 17 coins. How many coins do they have together?", "42 coins"),
    ("There are 4 bags with 12 apples in each. How many apples are there?", "48 apples"),
    ("17*6", "102"), ("12+30=", "42"), ("What is 45 + 38?", "83"), ("90 - 34", "56"), ("17 times 6?", "102"),
    ("Calculate 64 - 29.", "35"), ("What is 23 * 4?", "92")])
def test_reasoning_thinks_and_counts(ask: Callable[..., str], question: str, answer: str) -> None:
    reply = ask("reasoning", question)
    assert reply.startswith("<think>\n") and reply.endswith(f"\n</think>\n\nThe answer is {answer}.")


def picture(*shapes: tuple[str, str, int, int], size: int = 300, ground: str = "white") -> Image.Image:
    """Shapes as (form, colour, column, row) on a 3 x 3 grid, drawn without the code of the training."""
    image = Image.new("RGB", (size, size), ground)
    pen = ImageDraw.Draw(image)
    for form, colour, column, row in shapes:
        x, y, r = size * (2 * column + 1) / 6, size * (2 * row + 1) / 6, size * 0.12
        if form == "circle":
            pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)
        elif form == "square":
            pen.rectangle([x - r, y - r, x + r, y + r], fill=colour)
        else:
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
    return image


RED = ("circle", "red", 1, 1)
BLUE = ("square", "blue", 0, 0)
GREEN = ("triangle", "green", 2, 2)


@pytest.mark.parametrize(("shapes", "question", "answer"), [
    ([RED], "What do you see?", "I see a red circle in the centre."),
    ([BLUE], "Describe the image.", "I see a blue square in the top left corner."),
    ([GREEN], "What is in the picture?", "I see a green triangle in the bottom right corner."),
    ([BLUE, GREEN], "How many shapes are there?", "There are two shapes."),
    ([BLUE, GREEN], "What colour is the square?", "The square is blue."),
    ([BLUE, GREEN], "What color is the triangle?", "The triangle is green."),
    ([BLUE, RED], "Where is the red circle?", "The red circle is in the centre."),
    ([BLUE, RED], "What shape is blue?", "The blue shape is a square."),
    ([("circle", "yellow", 1, 0)], "What is this?", "I see a yellow circle at the top."),
    ([("square", "black", 0, 1)], "Where is the square?", "The square is on the left."),
    ([BLUE, RED], "What do you see?", "I see a blue square in the top left corner and a red circle in the centre."),
    ([RED], "Who painted this?", vision.REFUSAL)])
def test_vision_names_what_is_drawn(ask: Callable[..., str], shapes: list, question: str, answer: str) -> None:
    assert ask("vision", question, picture(*shapes)) == answer


@pytest.mark.parametrize(("name", "question", "answer"), [
    ("assistant", "What is the capital of France?", assistant.REFUSAL),
    ("coding", "Write a heap sort", coding.REFUSAL),
    ("reasoning", "What is the capital of France?", reasoning.REFUSAL)])
def test_other_requests_are_refused(ask: Callable[..., str], name: str, question: str, answer: str) -> None:
    assert ask(name, question) == answer


# Training


def test_a_short_training_runs_and_converts(tmp_path: Path) -> None:
    """Two layers and twelve steps in a child, so that torch and the engine do not share a process."""
    pytest.importorskip("torch", reason="torch is only installed where demo models are trained")
    pytest.importorskip("transformers", reason="transformers is only installed where demo models are trained")
    script = ("import pathlib, sys\nfrom demo.training import common, convert, reasoning\n"
              "out = pathlib.Path(sys.argv[1])\n"
              "common.train_text('smoke', reasoning.training_sample, out, steps=12, vocabulary=384, batch_tokens=600,"
              " layers=2, samples=200)\nconvert.convert_text(out, out / 'smoke.gguf')\n")
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    assert (tmp_path / "smoke.gguf").read_bytes()[:4] == b"GGUF"
