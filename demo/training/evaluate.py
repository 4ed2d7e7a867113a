"""Measures the shipped GGUF files in xllamacpp and writes demo/README.md: `python -m demo.training.evaluate`.

`--checkpoints DIR` first copies steps and CPU seconds of the trainings from there into record.json, which the
README quotes; without it the record that is there stays.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from . import assistant, coding, reasoning, vision
from .engine import MODELS, Demo, gguf_path
from .samples import Sample

RECORD = Path(__file__).with_name("record.json")
README = MODELS.parent / "README.md"
FILES = ["assistant", "coding", "reasoning", "vision", "vision-mmproj"]
Item = tuple[str, Sample, Any]


@dataclass
class Row:
    """One line of the table."""

    model: str
    test: str
    bar: int | None
    right: int = 0
    count: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, good: bool, question: str, answer: str) -> None:
        self.count += 1
        self.right += good
        if not good:
            self.wrong.append(f"{question} -> {answer}")

    @property
    def part(self) -> bool:
        """Counts questions that another row counts too."""
        return self.test.startswith("of these")

    @property
    def percent(self) -> float:
        return 100 * self.right / self.count


def measure(model: Demo, row: Row, samples: Iterable[Sample], is_right: Any) -> Row:
    for sample in samples:
        answer = model.ask(sample.question)
        row.add(is_right(sample, answer), sample.question, answer)
    return row


def measure_pictures(model: Demo, row: Row, items: Iterable[tuple[Image.Image, Sample]]) -> Row:
    for image, sample in items:
        answer = model.ask(sample.question, image)
        row.add(answer.strip() == sample.answer, sample.question, f"{answer} (should be: {sample.answer})")
    return row


def text_rows(models: Path) -> list[Row]:
    """The three text models."""
    rows = []
    model = Demo("assistant", models)
    rows.append(measure(model, Row("assistant", "held-out wordings of known questions", 92), assistant.test_set(),
                        assistant.is_right))
    rows.append(measure(model, Row("assistant", "off-domain requests refused", 90), assistant.foreign_set(),
                        assistant.is_right))
    model = Demo("coding", models)
    samples = coding.test_set()
    rows.append(measure(model, Row("coding", "all held-out requests, code executed", 95), samples, coding.is_right))
    named = [s for s in samples if s.kind == "named"]
    rows.append(measure(model, Row("coding", "of these, with an unseen function name", None), named, coding.is_right))
    rows.append(measure(model, Row("coding", "off-domain requests refused", 90), coding.foreign_set(), coding.is_right))
    model = Demo("reasoning", models)
    samples = reasoning.test_set()
    rows.append(measure(model, Row("reasoning", "held-out number problems", 98), samples, reasoning.is_right))
    unseen = [s for s in samples if s.facts[1] in reasoning.TEST_ITEMS]
    rows.append(measure(model, Row("reasoning", "of these, with unseen names and things", None), unseen,
                        reasoning.is_right))
    rows.append(measure(model, Row("reasoning", "off-domain requests refused", 90), reasoning.foreign_set(),
                        reasoning.is_right))
    return rows


def vision_rows(models: Path) -> list[Row]:
    model = Demo("vision", models)
    rows = []
    for which, label, bar in (("seen", "1 or 2 shapes, fresh drawings of seen triples", 95),
                              ("held out", "1 or 2 shapes, held-out triples only", 95),
                              ("many", "3 or 4 shapes", None)):
        items = [(image, sample) for image, sample, _ in vision.test_set(which, 300)]
        rows.append(measure_pictures(model, Row("vision", label, bar), items))
    rows.append(measure_pictures(model, Row("vision", "off-domain questions refused", None), vision.foreign_set()))
    return rows


def keep_record(checkpoints: Path) -> None:
    """Steps and CPU seconds of the trainings whose weights are shipped, both stages of each model together."""
    record: dict[str, dict[str, Any]] = {}
    for name in FILES[:4]:
        folders = [checkpoints / f"{name}-first", checkpoints / name]
        stages = [json.loads((f / "result.json").read_text(encoding="utf-8")) for f in folders if f.exists()]
        record[name] = {"parameters": stages[-1]["parameters"], "steps": [s["steps"] for s in stages],
                        "seeds": [s["seed"] for s in stages], "cpu_seconds": sum(s["cpu_seconds"] for s in stages)}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def result_table(rows: list[Row]) -> str:
    lines = ["| model | test | questions | right | % | bar |", "|---|---|---:|---:|---:|---|"]
    for row in rows:
        bar = "" if row.bar is None else f"{row.bar} %: " + ("reached" if row.percent >= row.bar else "**missed**")
        lines.append(f"| {row.model} | {row.test} | {row.count} | {row.right} | {row.percent:.1f} | {bar} |")
    return "\n".join(lines)


def file_table(models: Path) -> str:
    lines = ["| file | bytes | sha256 |", "|---|---:|---|"]
    for name in FILES:
        path = gguf_path(name, models)
        lines.append(f"| {path.name} | {path.stat().st_size} | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |")
    return "\n".join(lines)


def training_table() -> str:
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    lines = ["| model | weights | steps | seeds | CPU seconds, one thread |", "|---|---:|---:|---:|---:|"]
    for name, run in record.items():
        steps, seeds = (" + ".join(map(str, run[key])) for key in ("steps", "seeds"))
        lines.append(f"| {name} | {run['parameters']:,} | {steps} | {seeds} | {run['cpu_seconds']} |")
    return "\n".join(lines)


def versions() -> str:
    parts = [f"Python {platform.python_version()}"]
    for package in ("xllamacpp", "torch", "transformers", "tokenizers", "gguf", "numpy", "pillow"):
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"{package} (not installed)")
    return ", ".join(parts)


def one_line(text: str) -> str:
    """A wrong answer for a list of the README."""
    flat = text.replace("```python", "").replace("```", "").replace("\n", " / ").replace("<", "&lt;")
    return flat if len(flat) <= 240 else flat[:240] + " ..."


def write_readme(rows: list[Row], models: Path) -> None:
    template = Path(__file__).with_name("readme_template.md").read_text(encoding="utf-8")
    wrong = [f"- {row.model}: {one_line(text)}" for row in rows if not row.part for text in row.wrong[:2]]
    README.write_text(template.format(
        date=datetime.date.today().isoformat(), versions=versions(), results=result_table(rows),
        training=training_table(), files=file_table(models), wrong="\n".join(wrong) or "None in these tests.",
        total=f"{sum(gguf_path(n, models).stat().st_size for n in FILES) / 1e6:.2f}", intents=len(assistant.intents()),
        assistant=assistant.REFUSAL, coding=coding.REFUSAL, reasoning=reasoning.REFUSAL_TEXT, vision=vision.REFUSAL),
        encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--checkpoints", type=Path)
    chosen = parser.parse_args()
    if chosen.checkpoints:
        keep_record(chosen.checkpoints)
    rows = text_rows(chosen.models) + vision_rows(chosen.models)
    write_readme(rows, chosen.models)
    print(result_table(rows))


if __name__ == "__main__":
    main()
