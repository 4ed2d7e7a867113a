"""Tries an engine on this machine's card: is it installed, does it run, and are its numbers right?

    python -m modules.engines.selftest exllamav2

Prints one JSON object a line, {"check": name, "ok": true, "detail": words}. Exit
status 0: all is well; 1: a check failed; 3: there is no card to try it on.

The checks that matter compare the engine with itself. A logit must not depend on
later tokens (ExLlamaV2's own fallback attention fails this), and a text read at once
must give the logits of the same text read token by token, which takes other kernels.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

FAILED, NO_CARD = 1, 3
TOKENS = 96
BUS_BYTES, BUS_TRIES = 256 << 20, 3
LEFTOVER_BYTES = 64 << 20  # the same as loader.py's, which replaces a child that keeps more
MEMORY_TRIES = 3
TOLERANCE = 0.05  # of the logits' own spread; half precision gives about 0.005


class Report:
    """Prints each check as it ends, and remembers whether one failed."""

    def __init__(self, out: TextIO) -> None:
        self.failed = False
        self._out = out

    def say(self, name: str, ok: bool, detail: str, **figures: Any) -> None:
        """One line of the report; figures are for programs."""
        print(json.dumps({"check": name, "ok": ok, "detail": detail, **figures}), file=self._out, flush=True)

    def check(self, name: str, work: Callable[[], str]) -> bool:
        """Run `work`; what it returns is the detail, what it raises is the failure."""
        try:
            detail, ok = work(), True
        except Exception as error:  # every failure of a check is a finding
            detail, ok = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
        self.failed = self.failed or not ok
        self.say(name, ok, detail)
        return ok


def run(engine: str, out: TextIO) -> int:
    """All checks of one engine, written to `out`; returns the exit status."""
    report = Report(out)
    if not report.check("import", lambda: _import(engine)):
        return FAILED
    import torch

    if not torch.cuda.is_available():
        report.say("card", False, "no NVIDIA card that PyTorch can use")
        return NO_CARD
    if not report.check("card", lambda: _card(torch)):
        return FAILED
    adapter = importlib.import_module(f"modules.engines.{engine}")
    with tempfile.TemporaryDirectory(prefix="turntable-selftest-") as place:
        adapter.self_test(report, Path(place))
    _measure_bus(report, torch)
    return FAILED if report.failed else 0


def _import(engine: str) -> str:
    importlib.import_module(f"modules.engines.{engine}")
    import torch

    return f"{engine} {importlib.metadata.version(engine)}, torch {torch.__version__}"


def _card(torch: Any) -> str:
    found = torch.cuda.get_device_properties(0)
    torch.ones(8, device="cuda:0").sum().item()
    return f"{found.name}, {found.total_memory >> 20} MB, compute capability {found.major}.{found.minor}"


def _measure_bus(report: Report, torch: Any) -> None:
    """How fast each card is fed. Says nothing of the engine, so that it cannot fail its test."""
    for index in range(torch.cuda.device_count()):
        name = f"host to card {index}"
        try:
            speed = _host_to_device(torch, f"cuda:{index}")
            card = f"GPU-{torch.cuda.get_device_properties(index).uuid}"  # as NVML writes it
        except Exception as error:  # page-locked memory may be refused, as in WSL
            report.say(name, True, f"not measured: {' '.join(str(error).split())[:200]}")
        else:
            report.say(name, True, f"{speed / 1e9:.1f} GB/s", bytes_per_s={card: round(speed)})


def _host_to_device(torch: Any, device: str) -> float:
    """Bytes per second from page-locked memory to a card, the best of a few copies; the first one warms up."""
    host = torch.empty(BUS_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(BUS_BYTES, dtype=torch.uint8, device=device)
    took_s = []
    for _ in range(1 + BUS_TRIES):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize(device)
        took_s.append(time.perf_counter() - began)
    return BUS_BYTES / min(took_s[1:])


def nothing_left(use: Callable[[], object]) -> str:
    """What stays in use on the cards after `use` loaded, used and unloaded a model; raises RuntimeError for a leak.

    A library and PyTorch may keep a little for the life of the process; a leak grows with every load, however small
    the model is.
    """
    left = []
    for _ in range(MEMORY_TRIES):
        use()
        left.append(_in_use())
    words = f"{left[-1]} bytes stayed in use after unloading"
    if left[-1] > LEFTOVER_BYTES:
        raise RuntimeError(f"{words}; the most is {LEFTOVER_BYTES}")
    if left[-1] > left[0]:
        raise RuntimeError(f"{words}, and {left[0]} after the first of {MEMORY_TRIES} loads")
    return words


def _in_use() -> int:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    return sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))


def close_enough(got: Any, expected: Any, what: str) -> str:
    """The greatest difference of two sets of logits in words; raises RuntimeError above the tolerance."""
    worst = float((got.float() - expected.float()).abs().max())
    spread = float(expected.float().std())
    if not worst <= TOLERANCE * max(spread, 1e-6):  # NaN fails too
        raise RuntimeError(f"{what}: the logits differ by {worst:.4g}, their spread is {spread:.4g}")
    return f"greatest difference {worst:.2g}, spread of the logits {spread:.2g}"


def main(arguments: list[str]) -> int:
    """Entry point. What libraries print goes to stderr, so that stdout holds the report alone."""
    if len(arguments) != 1 or arguments[0] not in ("exllamav2", "exllamav3"):
        print("usage: python -m modules.engines.selftest exllamav2|exllamav3", file=sys.stderr)
        return 2
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return run(arguments[0], out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
