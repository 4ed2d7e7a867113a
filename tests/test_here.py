"""What this machine is to the advice: its cards, and the engines that run or could be installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from . import nvml
from .conftest import ROOT

PROGRAM = """
import dataclasses, json, sys
from pathlib import Path
from modules.environments import Environments, cards_of
from modules.hardware import Hardware
from modules.here import Here
hardware = Hardware(Path("."), limit_s=5)
environments = Environments(Path(sys.argv[1]), cards=cards_of(hardware))
here = Here(hardware, environments)
place = here.place()
states = [place.engines]
if len(sys.argv) > 2:
    Path(sys.argv[2]).unlink()  # the compiler goes
    states.append(here.place().engines)
    here.forget()
    states.append(here.place().engines)
print(json.dumps({"free": [c.free_bytes >> 30 for c in place.cards], "gb_s": place.bandwidths_gb_s, "states": states}))
"""


def seen(home: Path, *arguments: str, **environment: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(home), *arguments], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_a_card_only_the_processor_is_left(tmp_path: Path) -> None:
    found = seen(tmp_path)
    assert found["free"] == []
    engines = found["states"][0]
    assert engines["llamacpp"] == "ready"
    assert "NVIDIA card" in engines["exllamav2"] and "8.0" in engines["exllamav3"]


def test_a_card_without_a_compiler_says_what_is_missing(tmp_path: Path) -> None:
    library = nvml.build(tmp_path / "library")
    nvml.two_cards(tmp_path / "plan")
    found = seen(tmp_path / "home", **nvml.environment(library, tmp_path / "plan"), CUDA_HOME=str(tmp_path))
    assert found["free"] == [23, 2]
    assert [round(speed) for speed in found["gb_s"]] == [1008, 360]
    assert "nvcc" in found["states"][0]["exllamav2"]


def test_a_card_with_a_compiler_makes_the_engines_installable_and_that_is_asked_anew_when_told(tmp_path: Path) -> None:
    if not shutil.which("g++") or not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        pytest.skip("g++ and Python's headers are not installed here")
    library = nvml.build(tmp_path / "library")
    nvml.two_cards(tmp_path / "plan")
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    variables = {"CUDA_HOME": str(tmp_path / "cuda"), "TURNTABLE_ENGINE_DISK_BYTES": "1000"}
    found = seen(tmp_path / "home", str(nvcc), **nvml.environment(library, tmp_path / "plan"), **variables)
    first, remembered, asked_anew = found["states"]
    assert first["exllamav2"] == first["exllamav3"] == remembered["exllamav2"] == "installable"
    assert "nvcc" in asked_anew["exllamav2"]
