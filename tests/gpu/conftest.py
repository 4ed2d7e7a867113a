"""Which interpreter has the engine, whether there is a card, and models to try it with.

TURNTABLE_GPU_PYTHON names an interpreter that has exllamav2 or exllamav3; otherwise
the installed environments below .engines are taken. Nothing here imports torch: the
card is seen by the engines' children alone.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.messages import EngineSpec
from modules.process import EngineKind

ROOT = Path(__file__).resolve().parent.parent.parent
PROBE = "import torch, {0}; assert torch.cuda.is_available(), 'no card'; print(torch.cuda.get_device_name(0))"
KEPT = os.environ.get("TURNTABLE_GPU_PYTHON", "")  # read at import: the fences take it out of the environment
PINNED = os.environ.get("TURNTABLE_PINNED_BYTES", str(8 << 30))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(900))


def engine_kind(name: str) -> EngineKind:
    """The engine on this machine's card; skips with the reason where it cannot run."""
    python = KEPT or str(ROOT / ".engines" / name / "bin" / "python")
    if not Path(python).exists():
        pytest.skip(f"{name} is not installed: python app.py engines install {name}")
    kind = EngineKind(name, python, keeps_process=True, memory="vram")
    if not KEPT:
        kind = _installed(name, kind)
    probe = subprocess.run(
        [python, "-c", PROBE.format(name)], capture_output=True, text=True, cwd=ROOT, check=False, timeout=300,
        env={**os.environ, **dict(kind.environment)},
    )  # fmt: skip
    if probe.returncode:
        pytest.skip(f"{name} cannot run here: {(probe.stderr.strip().splitlines() or ['no reason'])[-1]}")
    return kind


def _installed(name: str, kind: EngineKind) -> EngineKind:
    sys.path.insert(0, str(ROOT))
    from modules.environments import Environments

    found: EngineKind = Environments().kind(name)
    return dataclasses.replace(found, keeps_process=kind.keeps_process, memory=kind.memory)


@pytest.fixture(scope="session")
def exllamav2_kind() -> EngineKind:
    kind = engine_kind("exllamav2")
    return dataclasses.replace(kind, environment=(*kind.environment, ("TURNTABLE_PINNED_BYTES", PINNED)))


@pytest.fixture(scope="session")
def exllamav3_kind() -> EngineKind:
    return engine_kind("exllamav3")


@pytest.fixture(scope="session")
def tiny(exllamav2_kind: EngineKind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EngineSpec]]:
    """Specs of the tiny random models of tiny.py, by quantization."""
    place = tmp_path_factory.mktemp("tiny")
    program = (
        "import sys; from pathlib import Path; from modules.engines.tiny import write_tiny\n"
        "for kind in ('fp16', 'exl2', 'gptq'): write_tiny(Path(sys.argv[1]) / kind, quantization=kind)"
    )
    subprocess.run([exllamav2_kind.python, "-c", program, str(place)], cwd=ROOT, check=True, timeout=120)
    yield {kind: EngineSpec("exllamav2", str(place / kind), context=1024) for kind in ("fp16", "exl2", "gptq")}
