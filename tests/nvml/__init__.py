"""A stand-in for NVIDIA's library that enters by the library's own interface: its file name on the loader's path.

Builds fake_nvml.c with the machine's compiler, writes the plan that drives it, and gives
the environment in which a child finds it. Whoever starts a child this way sees cards
that are not there: the tests of hardware.py, of the doctor and of the System page.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("fake_nvml.c")
GPU_IS_LOST = 15
RTX_4090 = {
    "name": "NVIDIA GeForce RTX 4090", "uuid": "GPU-4090", "capability": "8.9", "total": 24564, "used": 1,
    "reserved": 400, "power": 21.5, "limit": 450, "default": 450, "least": 150, "temperature": 41, "load": 0,
    "graphics": 210, "memory": 405, "graphics_max": 3105, "memory_max": 10501, "gen": 1, "width": 16, "gen_max": 4,
    "width_max": 16, "card_gen": 4, "mig": 0, "reasons": 1, "bus": 384,
}  # fmt: skip
RTX_3060 = RTX_4090 | {
    "name": "NVIDIA GeForce RTX 3060", "uuid": "GPU-3060", "capability": "8.6", "total": 12288, "reserved": 200,
    "power": 12, "limit": 170, "default": 170, "least": 100, "temperature": 38, "bus": 192, "memory_max": 7501,
}  # fmt: skip


@dataclass
class Plan:
    """What the stand-in answers. write() counts from its next call on, the number of cards from its next opening."""

    file: Path
    cards: list[dict[str, object]] = field(default_factory=list)
    processes: list[tuple[int, int, int, str, str]] = field(default_factory=list)
    faults: list[tuple[object, str, object]] = field(default_factory=list)
    driver: str = "580.82.07"
    cuda: int = 13000
    count: int | None = None

    def write(self) -> Plan:
        """Put it in place, whole: a call that comes meanwhile sees the old plan or the new one.

        processes are (card, pid, MiB or -1, "compute", "graphics" or "both", name), faults are (card or "*",
        function or "*", NVML's code or "hang").
        """
        lines = [f"driver {self.driver}"] * bool(self.driver) + [f"cuda {self.cuda}"] * bool(self.cuda)
        lines.append(f"cards {len(self.cards) if self.count is None else self.count}")
        for index, card in enumerate(self.cards):
            lines += [f"{index}.{key} {value}" for key, value in card.items()]
        lines += [f"{card}.process {pid} {mib} {kind} {name}" for card, pid, mib, kind, name in self.processes]
        lines += [f"fault {who} {function} {code}" for who, function, code in self.faults]
        fresh = self.file.with_suffix(".new")
        fresh.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
        fresh.replace(self.file)
        return self


def build(folder: Path, defines: Iterable[str] = ()) -> Path:
    """Compile the library into the folder, and return the folder. Skips the test where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler: gcc, cc or clang builds the stand-in for NVIDIA's library")
    folder.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libnvidia-ml.so.1"]
    command += [*(f"-D{name}" for name in defines), str(SOURCE), "-o", str(folder / "libnvidia-ml.so.1")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def environment(library: Path, plan: Path, log: Path | None = None) -> dict[str, str]:
    """Variables for a child that shall see the planned cards; log gets the name of every function that is called."""
    found = os.pathsep.join(filter(None, [str(library), os.environ.get("LD_LIBRARY_PATH", "")]))
    said = {"LD_LIBRARY_PATH": found, "FAKE_NVML_PLAN": str(plan)}
    return said | ({"FAKE_NVML_LOG": str(log)} if log else {})


def two_cards(file: Path, pid: int = 4242) -> Plan:
    """A 4090 that is ours to use, and a 3060 on which another program has 9 GB."""
    busy = RTX_3060 | {"used": 9216, "load": 97, "power": 168, "temperature": 71, "graphics": 1837, "gen": 4}
    return Plan(file, [dict(RTX_4090), busy], [(1, pid, 9000, "compute", "/opt/games/blender --background")]).write()
