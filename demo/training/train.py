"""Train one demo model: `python -m demo.training.train reasoning --out checkpoints` (a smoke run: `--steps 12`).

A model with two stages leaves the first one beside the result as NAME-first. The second stage begins from it with
a lower rate, a fresh schedule and harder samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import assistant, coding, reasoning
from .common import train_text
from .vision_model import train_vision

STAGES = {"assistant": (2000, 1000), "coding": (2000,), "reasoning": (2800, 1000), "vision": (1600, 950)}
SECOND_RATE = 1.2e-3
TEXT: dict[str, dict[str, Any]] = {
    "assistant": {"makers": (assistant.training_sample, assistant.second_stage), "vocabulary": 1536, "tokens": 1500},
    "coding": {"makers": (coding.training_sample,), "vocabulary": 1024, "tokens": 1600},
    "reasoning": {"makers": (reasoning.training_sample, reasoning.second_stage), "vocabulary": 640, "tokens": 1800},
}


def train(name: str, out: Path, steps: int | None = None) -> None:
    """All stages of one model into `out`/`name`."""
    stages = STAGES[name]
    start: Path | None = None
    for number, planned in enumerate(stages):
        last = number == len(stages) - 1
        folder = out / (name if last else f"{name}-first")
        folder.mkdir(parents=True, exist_ok=True)
        rate = SECOND_RATE if number else 2e-3
        if name == "vision":
            train_vision(folder, steps=steps or planned, seed=11 + number, rate=rate, start=start)
        else:
            plan = TEXT[name]
            train_text(name, plan["makers"][number], folder, steps=steps or planned, vocabulary=plan["vocabulary"],
                       batch_tokens=plan["tokens"], seed=1 + number, rate=rate, start=start)
        start = folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(STAGES))
    parser.add_argument("--steps", type=int, help="fewer per stage, for a smoke run; the schedule is scaled")
    parser.add_argument("--out", type=Path, default=Path("checkpoints"), help="the directory for all checkpoints")
    chosen = parser.parse_args()
    train(chosen.model, chosen.out, chosen.steps)


if __name__ == "__main__":
    main()
