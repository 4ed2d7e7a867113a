"""The self-test of the ExLlama engines, as far as it runs without a card; the rest is in gpu/."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from .conftest import ROOT

MEASURE = """
import sys
from pretend_cuda import install
install()
import torch
from modules.engines import selftest
selftest.BUS_BYTES = 8 << 20
selftest._measure_bus(selftest.Report(sys.stdout), torch)
assert torch.cuda.memory_allocated(0) == torch.cuda.memory_allocated(1) == 0, "it kept memory of the card"
"""


def measured(python: str, **variables: str) -> list[dict]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "exllama_on_cpu")])
    environment = {**os.environ, "PYTHONPATH": path, "TURNTABLE_TEST_CARDS": "2", **variables}
    done = subprocess.run(
        [python, "-c", MEASURE], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_speed_to_each_card_is_told_by_the_name_that_nvml_gives_it(exllama_python: str) -> None:
    first, second = measured(exllama_python)
    assert (first["check"], second["check"]) == ("host to card 0", "host to card 1")
    assert first["ok"] and first["detail"].endswith(" GB/s")
    (name, speed), = first["bytes_per_s"].items()
    assert name == "GPU-pretended-0" and 1e8 < speed < 1e13 and list(second["bytes_per_s"]) == ["GPU-pretended-1"]
    assert float(first["detail"].split()[0]) == pytest.approx(speed / 1e9, abs=0.06)


def test_what_cannot_be_measured_fails_no_test(exllama_python: str) -> None:
    for said in measured(exllama_python, TURNTABLE_TEST_VRAM_BYTES="1000000"):
        assert said["ok"] and "not measured: CUDA out of memory" in said["detail"] and "bytes_per_s" not in said
