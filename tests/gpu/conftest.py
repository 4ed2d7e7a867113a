"""Which interpreter has the engine, whether there is a card, and models to try it with.

TURNTABLE_GPU_PYTHON names an interpreter that has exllamav2 or exllamav3; otherwise
the installed environments below .engines are taken. Nothing here imports torch: the
card is seen by the engines' children alone.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from modules.environments import Environments
from modules.messages import EngineSpec
from modules.process import EngineKind, EngineProcess

from ..conftest import EXLLAMA_PYTHON, ROOT
from . import scenarios
from .scenarios import Rig

PROBE = "import torch, {0}; assert torch.cuda.is_available(), 'no card'; print(torch.cuda.get_device_name(0))"
KEPT = os.environ.get("TURNTABLE_GPU_PYTHON", "")  # read at import: the fences take it out of the environment
PINNED = os.environ.get("TURNTABLE_PINNED_BYTES", str(8 << 30))
SWAPS, RUN = 50, 200
WRITE_V2 = (
    "import sys; from pathlib import Path; from modules.engines.tiny import write_tiny\n"
    "for kind in ('fp16', 'exl2', 'gptq'): write_tiny(Path(sys.argv[1]) / kind, quantization=kind)"
)
WRITE_V3 = (
    "import sys; from pathlib import Path; from modules.engines.exllamav3 import write_exl3, write_tiny\n"
    "write_tiny(Path(sys.argv[1]) / 'fp16'); write_exl3(Path(sys.argv[1]) / 'exl3')"
)


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
    kind = EngineKind(name, python, keeps_process=True, memory="vram") if KEPT else Environments().kind(name)
    probe = subprocess.run(
        [python, "-c", PROBE.format(name)], capture_output=True, text=True, cwd=ROOT, check=False, timeout=300,
        env=scenarios.environment(kind),
    )  # fmt: skip
    if probe.returncode:
        pytest.skip(f"{name} cannot run here: {(probe.stderr.strip().splitlines() or ['no reason'])[-1]}")
    return kind


def with_variables(kind: EngineKind, **more: str) -> EngineKind:
    return dataclasses.replace(kind, environment=(*kind.environment, *more.items()))


@pytest.fixture(scope="session")
def exllamav2_kind() -> EngineKind:
    return with_variables(engine_kind("exllamav2"), TURNTABLE_PINNED_BYTES=PINNED)


@pytest.fixture(scope="session")
def exllamav3_kind(tmp_path_factory: pytest.TempPathFactory) -> EngineKind:
    # Every test has a home of its own, and Triton would compile its kernels anew in each.
    return with_variables(engine_kind("exllamav3"), TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


@pytest.fixture(scope="session")
def v2_models(exllamav2_kind: EngineKind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random models of tiny.py, by quantization."""
    place = tmp_path_factory.mktemp("tiny-v2")
    scenarios.program(exllamav2_kind, WRITE_V2, place)
    return place


@pytest.fixture(scope="session")
def v3_models(exllamav3_kind: EngineKind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model of tiny.py in half precision, and with EXL3 weights at 4 bits."""
    place = tmp_path_factory.mktemp("tiny-v3")
    scenarios.program(exllamav3_kind, WRITE_V3, place)
    return place


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], EngineSpec]:
    """The bundled models as FP16 checkpoints: engine, name -> spec."""
    place = tmp_path_factory.mktemp("demo")

    def spec(engine: str, name: str) -> EngineSpec:
        folder = scenarios.converted(EXLLAMA_PYTHON, engine, name, place / engine / name)
        return EngineSpec(engine, str(folder), context=1024)

    return spec


@pytest.fixture(scope="session")
def make_rig(demo: Callable[[str, str], EngineSpec], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rig]:
    """kind, specs and more of a Rig -> the rig on this machine's card."""

    def make(kind: EngineKind, specs: tuple[EngineSpec, ...], large_side: int, copies: bool) -> Rig:
        place = tmp_path_factory.mktemp("wide")
        sees = demo(kind.name, "vision")
        options = scenarios.allow_large_pictures(Path(sees.model), large_side)
        # The tiny model's cache takes 2 layers * 2 heads * 64 * 2 (K, V) * 2 bytes = 1 KiB a token.
        tokens = str((_card("total") // 1024 + (4 << 20)) // 256 * 256)
        return Rig(
            kind, specs, dataclasses.replace(specs[0], model=str(scenarios.write_wide(place / "wide"))),
            dataclasses.replace(specs[0], options=(("cache_size", tokens),)),
            dataclasses.replace(sees, options=options), large_side, held_bytes, partial(scenarios.filled, kind),
            SWAPS, RUN, copies,
        )  # fmt: skip

    return make


def held_bytes(process: EngineProcess) -> int:
    """VRAM of a child as the driver counts it, or of the card where the driver hides processes."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    rows = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    for row in rows:
        number, _, size = row.partition(",")
        if number.strip() == str(process.pid) and size.strip().isdigit():
            return int(size) << 20
    return _card("used")


def _card(what: str) -> int:
    query = ["nvidia-smi", f"--query-gpu=memory.{what}", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) << 20
