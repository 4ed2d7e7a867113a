"""`python -m benchmarks stream|swap|start|page|soak [--json FILE]`: print a table, and write the figures if asked."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import page, soak, start, stream, swap

BENCHMARKS = {
    "stream": stream.measure,
    "swap": swap.measure,
    "start": start.measure,
    "page": page.measure,
    "soak": soak.measure,
}


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    chosen = parser.parse_args()
    figures = BENCHMARKS[chosen.name]()
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
