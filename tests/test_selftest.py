"""The self-test of the ExLlama engines, as far as it runs without a card; the rest is in gpu/."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from modules import loader
from modules.engines import selftest

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


def run(python: str, program: str, **variables: str) -> list[dict]:
    """The lines of the report that a program writes on two pretended cards."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "exllama_on_cpu")])
    environment = {**os.environ, "PYTHONPATH": path, "TURNTABLE_TEST_CARDS": "2", **variables}
    done = subprocess.run(
        [python, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_speed_to_each_card_is_told_by_the_name_that_nvml_gives_it(exllama_python: str) -> None:
    first, second = run(exllama_python, MEASURE)
    assert (first["check"], second["check"]) == ("host to card 0", "host to card 1")
    assert first["ok"] and first["detail"].endswith(" GB/s")
    (name, speed), = first["bytes_per_s"].items()
    assert name == "GPU-pretended-0" and 1e8 < speed < 1e13 and list(second["bytes_per_s"]) == ["GPU-pretended-1"]
    assert float(first["detail"].split()[0]) == pytest.approx(speed / 1e9, abs=0.06)


def test_what_cannot_be_measured_fails_no_test(exllama_python: str) -> None:
    for said in run(exllama_python, MEASURE, TURNTABLE_TEST_VRAM_BYTES="1000000"):
        assert said["ok"] and "not measured: CUDA out of memory" in said["detail"] and "bytes_per_s" not in said


LEAVES = """
import sys
from pretend_cuda import WORKSPACE_BYTES, install
install()
import torch
from modules.engines import selftest
from modules.engines.exllama import clear_workspaces
report, kept = selftest.Report(sys.stdout), []
def product():
    card = torch.ones(8, 8, device="cuda:0")
    card @ card
report.check("workspace", lambda: selftest.nothing_left(product))
assert torch.cuda.memory_allocated() == WORKSPACE_BYTES
clear_workspaces()
assert torch.cuda.memory_allocated() == 0
report.check("small leak", lambda: selftest.nothing_left(lambda: kept.append(torch.ones(8, device="cuda:0"))))
kept = torch.ones(selftest.LEFTOVER_BYTES + 1, dtype=torch.uint8, device="cuda:0")
report.check("large remainder", lambda: selftest.nothing_left(product))
"""


def test_what_cublas_keeps_is_no_leak_and_what_grows_is_one(exllama_python: str) -> None:
    workspace, small, large = run(exllama_python, LEAVES)
    assert workspace["ok"] and "8519680 bytes stayed" in workspace["detail"]
    assert not small["ok"] and "after the first of 3 loads" in small["detail"]
    assert not large["ok"] and "the most is 67108864" in large["detail"]


def test_the_self_test_and_the_loader_allow_the_same_remainder() -> None:
    assert selftest.LEFTOVER_BYTES == loader.LEFTOVER_BYTES
