"""`python -m benchmarks NAME [--json FILE]`: print a table, and write the figures if asked; --help lists the names.

`python -m benchmarks make-model NAME --out DIR` writes a checkpoint with random contents to measure with.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

BENCHMARKS = ("stream", "swap", "start", "page", "soak", "gpu", "downloads")


def main() -> int:
    """Run one benchmark, or make a model."""
    if sys.argv[1:2] == ["make-model"]:
        return int(importlib.import_module("benchmarks.make_model").main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS, help="or make-model, which has a --help of its own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    chosen = parser.parse_args()
    # Each has needs of its own; make-model runs where there is nothing but numpy.
    figures = importlib.import_module(f"benchmarks.{chosen.name}").measure()
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if figures.get("failed_steps") else 0


if __name__ == "__main__":
    sys.exit(main())
