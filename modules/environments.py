"""The engines' own environments below `.engines`: list, install, test, remove.

Each ExLlama engine wants its own PyTorch, so each has a virtual environment of its
own and its compiled extension beside it. The extension is built when the engine is
installed, never at a first message. A stamp file is written last: an installation
that was cut off is seen as broken and mended by installing again. Whatever ends the
installer, the commands that it runs end with it.

From the environment of its own process it reads TURNTABLE_CUDA_ARCHS (architectures
to build for, "8.6;9.0"; no card is looked for then), TURNTABLE_PREBUILT (a folder with
an extension that was compiled elsewhere), TURNTABLE_ENGINE_DISK_BYTES, CUDA_HOME,
CPATH, MAX_JOBS and pip's own variables.

Knows drivers, compilers, pip and child processes. Knows no model, no preset and no
page, and never imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from modules.errors import InstallFailed
from modules.hardware import Hardware
from modules.process import EngineKind

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("exllamav2", "exllamav3")
STAMP, LOG, TEST_LOG, PROBLEM = "installed.json", "install.log", "selftest.log", "problem.txt"
EXTENSIONS = "ext"
NEEDS_DISK_BYTES = 12 * 10**9
DOWNLOAD_MB = 3000  # about that much comes from the registry
JOB_BYTES = 12 * 10**8  # of free RAM for one compiler
# 31 and 107 minutes of one core were measured, and half of that for two cores; one slow file alone takes 23.
LIMIT_S = {"exllamav2": 90 * 60.0, "exllamav3": 180 * 60.0}
TEST_LIMIT_S = 15 * 60.0
# PyTorch 2.11 from the registry is built for CUDA 13.0, which needs this driver and has no code for older cards.
LEAST_DRIVER = 580
TOOLKIT = 13
# From this one on nvcc misreads a header of PyTorch as C++17; the last -std on its line is the one that counts.
CPP20_TOOLKIT, CPP20 = (13, 3), "-std=c++20"
TOOLKITS = (Path("/usr/local/cuda"), Path("/usr/local/cuda-13"), Path("/usr/local/cuda-13.0"), Path("/opt/cuda"))
LEAST_CARD = {"exllamav2": (7, 5), "exllamav3": (8, 0)}
ABOUT_MINUTES = {"exllamav2": 10, "exllamav3": 60}  # of compiling on four cores
log = logging.getLogger("turntable.environments")
# Runs a command, and ends it with all that it started when the installer's end of the pipe closes: a killed installer
# must not leave compilers behind that a second one would meet. By session, since ninja puts each compiler into a
# process group of its own. Nice, because a person may be chatting meanwhile.
SUPERVISOR = """
import os, signal, subprocess, sys, threading, time
os.nice(int(sys.argv[1]))
child = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
ending = threading.Event()
def mine():
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                fields = file.read().rsplit(b")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == os.getpid() != int(entry) and fields[0] not in (b"Z", b"X"):
            yield int(entry)
def watch():
    sys.stdin.buffer.read()
    ending.set()
    while left := list(mine()):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        time.sleep(0.01)
    os._exit(137)
threading.Thread(target=watch, daemon=True).start()
code = child.wait()
if ending.is_set():
    threading.Event().wait()  # watch() has the last word
os._exit(code if code >= 0 else 128 - code)
"""


@dataclass(frozen=True)
class Step:
    """Progress of an installation: what is being done, how far, 0 to 1, and what of it is in hand just now."""

    words: str
    fraction: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Environment:
    """One engine's environment. state: absent, broken, installing, untested, failed (its self-test) or ready."""

    name: str
    state: str
    folder: Path
    python: Path
    versions: dict[str, str] = field(default_factory=dict)
    size_bytes: int = 0
    tested: str = ""
    problem: str = ""
    bus_speeds: dict[str, float] = field(default_factory=dict)  # card's uuid -> bytes per second, by the self-test

    @property
    def usable(self) -> bool:
        """Whether models may be loaded with it."""
        return self.state in ("ready", "untested")


@dataclass(frozen=True)
class CardFound:
    """What the driver says of one card."""

    name: str
    capability: tuple[int, int]


Report = Callable[[Step], None]
Cards = Callable[[], tuple[int, list[CardFound]]]


def cards_of(hardware: Hardware) -> Cards:
    """A look at the driver and the cards that waits for no driver that hangs."""

    def look() -> tuple[int, list[CardFound]]:
        machine = hardware.snapshot()
        if machine.driver.state != "ok":
            hint = "`python app.py doctor` says what to do; llama.cpp needs no driver."
            raise InstallFailed(machine.driver.words, hint=hint)
        cards = [CardFound(card.name, card.capability) for card in machine.working_cards if card.capability]
        return machine.driver.major or 0, cards

    return look


def no_cards() -> tuple[int, list[CardFound]]:
    """For those who only look at what is installed."""
    raise InstallFailed("Nobody looked for cards.", hint="This is a bug of ours.")


class Environments:
    """All engines' environments of one checkout. Thread-safe; two programs at once take turns by a lock file."""

    def __init__(
        self, home: Path = ROOT, *, cards: Cards = no_cards, variables: Mapping[str, str] | None = None,
        limit_s: float = 0.0, toolkits: Sequence[Path] = TOOLKITS,
    ) -> None:  # fmt: skip
        """cards is how the driver is asked; limit_s 0 is the engine's own time limit; toolkits are where nvcc is
        looked for besides the PATH."""
        self._home, self._root, self._cards = home, home / ".engines", cards
        self._variables = os.environ if variables is None else variables
        self._limit_s, self._usual = limit_s, toolkits
        self._sizes: dict[str, tuple[float, int]] = {}

    # Looking ---------------------------------------------------------------------------

    def list(self) -> list[Environment]:
        """Every engine that can have an environment, in order."""
        return [self.get(name, sized=True) for name in NAMES]

    def get(self, name: str, sized: bool = False) -> Environment:
        """One engine's environment as it is on the disk; sized counts its bytes, which takes a second.

        Raises InstallFailed for a name that is no engine.
        """
        folder = self._folder(name)
        python = _python_of(folder)
        if not folder.exists():
            return Environment(name, "absent", folder, python)
        stamp = self._stamp(folder)
        if _is_locked(self._lock(name)):
            return Environment(name, "installing", folder, python, problem=_last_line(folder / LOG))
        if not stamp or not python.exists():
            problem = _text(folder / PROBLEM) or f"The installation was not finished. {_last_line(folder / LOG)}"
            return Environment(name, "broken", folder, python, problem=problem)
        if stamp.get("requirements") != self._wanted(name):
            return Environment(
                name, "broken", folder, python, stamp.get("versions", {}),
                problem="It was installed for other requirements; install it again.",
            )  # fmt: skip
        if problem := self._uncovered(name, str(stamp.get("architectures") or "")):
            return Environment(name, "broken", folder, python, stamp.get("versions", {}), problem=problem)
        tested = stamp.get("tested") or {}
        state = {None: "untested", 0: "ready", 3: "untested"}.get(tested.get("code"), "failed")
        return Environment(
            name, state, folder, python, stamp.get("versions", {}), self._size(folder) if sized else 0,
            tested.get("when", ""), tested.get("problem", ""), _speeds(tested.get("bus")),
        )  # fmt: skip

    def _uncovered(self, name: str, built: str) -> str:
        """Why the extension has no code for a card that is here now; empty where it has, or nothing is known.

        built is what it was compiled for, empty for one that was compiled elsewhere. A driver that does not answer
        says nothing against it, and who names architectures answers for them.
        """
        if not built or self._variables.get("TURNTABLE_CUDA_ARCHS"):
            return ""
        try:
            cards = self._cards()[1]
        except InstallFailed:
            return ""
        for card in cards:
            if card.capability >= LEAST_CARD[name] and not covers(built, card.capability):
                major, minor = card.capability
                return (
                    f"It was compiled for compute capability {built.replace(';', ', ')}, and {card.name} has "
                    f"{major}.{minor}; install it again."
                )
        return ""

    def kind(self, name: str) -> EngineKind:
        """How the engine's children are started."""
        folder = self._folder(name)
        environment = {
            "TORCH_EXTENSIONS_DIR": str(folder / EXTENSIONS),
            "PYTHONPATH": _place_of_built(folder / EXTENSIONS, name),
            "EXLLAMA_NO_XFORMERS": "1",
            "CUDA_MODULE_LOADING": "LAZY",
        }
        return EngineKind(
            name, str(_python_of(folder)), keeps_process=True, memory="vram",
            environment=tuple(sorted((k, v) for k, v in environment.items() if v)),
        )  # fmt: skip

    def is_wanted(self, name: str) -> bool:
        """Whether a start may install it unasked: absent or cut off, but not removed, given up or failed."""
        environment = self.get(name)
        if environment.state == "absent":
            return not self._removed(name).exists()
        return environment.state == "broken" and not (environment.folder / PROBLEM).exists()

    def has_driver(self) -> bool:
        """Whether an NVIDIA driver answers, or a person named architectures to build for."""
        try:
            return bool(self._variables.get("TURNTABLE_CUDA_ARCHS")) or self._cards()[0] > 0
        except InstallFailed:
            return False

    # Changing ----------------------------------------------------------------------------

    def install(self, name: str, report: Report, cancelled: threading.Event | None = None) -> Environment:
        """Make or mend the environment, build the extension, and try it. Blocks for minutes.

        Raises InstallFailed with one line that says what is missing or what went wrong.
        """
        stop = cancelled or threading.Event()
        report(Step("looking at the machine"))
        architectures = self.check(name)
        folder = self._folder(name)
        with _locked(self._lock(name), name) as lock:
            folder.mkdir(exist_ok=True)
            for old in (folder / STAMP, folder / PROBLEM, self._removed(name)):
                old.unlink(missing_ok=True)
            (folder / LOG).write_text("")
            deadline_s = time.monotonic() + (self._limit_s or LIMIT_S[name])
            runner = _Runner(folder / LOG, stop, deadline_s, self._variables, lock)
            try:
                self._fill(name, runner, report, architectures)
            except InstallFailed as error:
                if not stop.is_set():
                    self.give_up(name, str(error))
                raise
        return self.test(name, report, stop)

    def _fill(self, name: str, runner: _Runner, report: Report, architectures: str) -> None:
        folder = self._folder(name)
        python = _python_of(folder)
        if not python.exists():
            report(Step("making the environment", 0.02))
            runner.run([sys.executable, "-m", "venv", str(folder)], "making the environment")
        self._pip(name, python, runner, report)
        built = self._build(name, folder, runner, report, architectures)
        said = {"requirements": self._wanted(name), "versions": _versions(python, name), "architectures": built}
        _write(folder / STAMP, said)

    def give_up(self, name: str, why: str) -> None:
        """Remember why an unfinished installation must not be taken up again unasked."""
        folder = self._folder(name)
        if folder.is_dir() and not self._stamp(folder):
            (folder / PROBLEM).write_text(why, encoding="utf-8")

    def test(self, name: str, report: Report, cancelled: threading.Event | None = None) -> Environment:
        """Run the self-test in the environment, and remember how it went. Raises InstallFailed when it is not there."""
        environment = self.get(name)
        if environment.state in ("absent", "broken", "installing"):
            raise InstallFailed(f"{name} is not installed.", hint=f"python app.py engines install {name}")
        report(Step("trying it", 0.97))
        log = environment.folder / TEST_LOG
        log.write_text("")
        stop = cancelled or threading.Event()
        runner = _Runner(log, stop, time.monotonic() + TEST_LIMIT_S, self._variables)
        failed: list[str] = []
        speeds: dict[str, float] = {}

        def take(line: str) -> None:
            try:
                check = json.loads(line)
                tried, ok, detail = str(check["check"]), bool(check["ok"]), str(check["detail"])
            except (ValueError, TypeError, KeyError):
                return  # not a line of the report
            speeds.update(_speeds(check.get("bytes_per_s")))
            report(Step("trying it", 0.98, f"{'ok' if ok else 'NOT OK'}: {tried}: {detail}"))
            if not ok:
                failed.append(f"{tried}: {detail}")

        kind = self.kind(name)
        command = [kind.python, "-m", "modules.engines.selftest", name]
        code = runner.call(command, take, variables=dict(kind.environment), cwd=self._home, apart=True)
        if stop.is_set():
            raise InstallFailed("The self-test was cancelled.", hint=f"python app.py engines test {name}")
        problem = failed[0] if failed else ""
        if runner.is_late():
            problem = f"the self-test took more than {TEST_LIMIT_S / 60:.0f} minutes"
        elif code and not problem:
            problem = _last_line(log) or f"exit code {code}"
        with log.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in runner.lines)
        when = time.strftime("%Y-%m-%d %H:%M")
        tested = {"code": code or int(bool(problem)), "when": when, "problem": problem, "bus": speeds}
        _write(environment.folder / STAMP, {**self._stamp(environment.folder), "tested": tested})
        return self.get(name, sized=True)

    def remove(self, name: str) -> int:
        """Delete the environment; returns the bytes that it took. Raises InstallFailed while it is being installed.

        That it was removed is remembered, so that no start installs it unasked.
        """
        folder = self._folder(name)
        if not folder.exists():
            return 0
        with _locked(self._lock(name), name):
            size = self._size(folder)
            self._removed(name).touch()
            (folder / STAMP).unlink(missing_ok=True)  # first: what is cut off in the middle must not look whole
            shutil.rmtree(folder)
        return size

    # Steps -------------------------------------------------------------------------------

    def check(self, name: str) -> str:
        """Refuse, in one line, a machine on which it cannot work. Returns the card architectures to build for.

        Raises InstallFailed.
        """
        folder = self._folder(name)
        if platform.system() != "Linux":
            raise InstallFailed(
                "The engines for NVIDIA cards are installed on Linux only: elsewhere PyTorch comes without CUDA.",
                hint="On Windows, start Turntable inside WSL.",
            )
        architectures = self._variables.get("TURNTABLE_CUDA_ARCHS", "") or self._architectures(name)
        if importlib.util.find_spec("ensurepip") is None:
            raise InstallFailed("Python's venv package is missing.", hint=_apt("-venv"))
        if self._prebuilt(name) is None:
            self._check_compilers()
        self._root.mkdir(parents=True, exist_ok=True)
        # What an earlier try has left there counts.
        needs = int(self._variables.get("TURNTABLE_ENGINE_DISK_BYTES", NEEDS_DISK_BYTES)) - self._size(folder)
        free = shutil.disk_usage(self._root).free
        if free < needs:
            raise InstallFailed(
                f"{name} needs about {needs / 1e9:.0f} GB of disk, and {free / 1e9:.1f} GB are free in {self._root}."
            )
        return architectures

    def _check_compilers(self) -> None:
        toolkits = _toolkits(self._variables, self._usual)
        if not toolkits:
            raise InstallFailed(
                "nvcc is missing: the CUDA toolkit compiles the engine.",
                hint=f"Install the CUDA toolkit {TOOLKIT} from NVIDIA's packages, and put nvcc on the PATH or set "
                "CUDA_HOME.",
            )
        if not any(version[0] == TOOLKIT for _, version in toolkits):
            found = ", ".join(f"CUDA {version[0]} in {place}" for place, version in toolkits)
            raise InstallFailed(
                f"The engine's PyTorch is made with CUDA {TOOLKIT}, and only a toolkit of CUDA {TOOLKIT} can compile "
                f"for it; found: {found}.",
                hint=f"Install the CUDA toolkit {TOOLKIT} beside it, and set CUDA_HOME to its folder.",
            )
        if not shutil.which("g++", path=self._variables.get("PATH")):
            raise InstallFailed("g++ is missing.", hint="sudo apt-get install g++ (Debian, Ubuntu).")
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
            raise InstallFailed("Python's headers are missing.", hint=_apt("-dev"))

    def _architectures(self, name: str) -> str:
        driver, cards = self._cards()
        if driver < LEAST_DRIVER:
            raise InstallFailed(
                f"The NVIDIA driver is version {driver}; the engine's PyTorch needs {LEAST_DRIVER} or newer.",
                hint="Update the NVIDIA driver, then install again.",
            )
        least = LEAST_CARD[name]
        fitting = sorted({card.capability for card in cards if card.capability >= least})
        if not fitting:
            found = ", ".join(f"{c.name} ({c.capability[0]}.{c.capability[1]})" for c in cards) or "none"
            raise InstallFailed(
                f"{name} needs a card of compute capability {least[0]}.{least[1]} or newer; found: {found}.",
                hint="llama.cpp runs on this machine without a card.",
            )
        return ";".join(f"{major}.{minor}" for major, minor in fitting)

    def _pip(self, name: str, python: Path, runner: _Runner, report: Report) -> None:
        file = self._home / f"requirements-{name}.txt"
        words = "downloading and installing PyTorch and the library (about 3 GB)"
        report(Step(words, 0.05))
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        runner.run([*pip, "-r", str(file)], words, _PipProgress(words, report).take)
        for bare in re.findall(r"^#no-deps: (\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE):
            runner.run([*pip, "--no-deps", bare], f"installing {bare}")

    def _prebuilt(self, name: str) -> Path | None:
        """An extension that was compiled elsewhere: in TURNTABLE_PREBUILT, or laid into the environment's `ext`."""
        given = self._variables.get("TURNTABLE_PREBUILT", "")
        if given:
            found = _built(Path(given), name)
            if found is None:
                raise InstallFailed(f"TURNTABLE_PREBUILT={given} holds no {name}_ext*.so.", hint="Correct or unset it.")
            return found
        return next(iter(sorted((self._folder(name) / EXTENSIONS).glob(f"{name}_ext*.so"))), None)

    def _build(self, name: str, folder: Path, runner: _Runner, report: Report, architectures: str) -> str:
        """Compile the extension by importing the library once, with everything that the compiler must know.

        Returns the architectures that it has code for, empty where it was compiled elsewhere.
        """
        place = folder / EXTENSIONS
        place.mkdir(exist_ok=True)
        for stale in place.rglob("lock"):
            stale.unlink()  # a build that was killed leaves it, and the next import would wait for it for ever
        prebuilt = self._prebuilt(name)
        if prebuilt is not None:
            self._take_prebuilt(name, prebuilt, runner, report)
            return ""
        minutes = ABOUT_MINUTES[name]
        words = f"compiling {name} for {architectures} (about {minutes} minutes on four cores)"
        report(Step(words, 0.4))
        began = time.monotonic()

        def tick() -> None:
            report(Step(words, min(0.95, 0.4 + 0.55 * (time.monotonic() - began) / (minutes * 60))))

        with _without_spaces(folder) as plain:
            python = _python_of(plain)
            variables = self._build_variables(python, plain / EXTENSIONS, architectures)
            runner.run([str(python), "-c", f"import {name}"], words, variables=variables, tick=tick)
        if _built(place, name) is None:
            raise InstallFailed(f"{name} was imported, but its extension was not built.", hint=f"See {folder / LOG}.")
        return architectures

    def _take_prebuilt(self, name: str, prebuilt: Path, runner: _Runner, report: Report) -> None:
        """It is tried before it is taken: it fits one Python and one PyTorch only."""
        words = f"taking {prebuilt.name}, which was compiled elsewhere"
        report(Step(words, 0.9))
        folder = self._folder(name)
        variables = {"PYTHONPATH": str(prebuilt.parent), "TORCH_EXTENSIONS_DIR": str(folder / EXTENSIONS)}
        # PyTorch first: the extension finds the libraries that it needs only then.
        program = f"import torch, {name}_ext, {name}"
        runner.run([str(_python_of(folder)), "-c", program], words, variables=variables)
        target = folder / EXTENSIONS / prebuilt.name
        if prebuilt.resolve() != target.resolve():
            shutil.copy2(prebuilt, target)

    def _build_variables(self, python: Path, place: Path, architectures: str) -> dict[str, str]:
        fitting = [found for found in _toolkits(self._variables, self._usual) if found[1][0] == TOOLKIT]
        home, version = fitting[0] if fitting else (None, (0, 0))
        program = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        done = subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=False)
        if done.returncode:
            raise InstallFailed(f"The environment's Python does not run: {done.stderr.strip()[-200:]}")
        site = done.stdout.strip()
        # Headers of cuBLAS and its like come with PyTorch's packages, where a toolkit may lack them.
        includes = [str(path) for path in sorted(Path(site, "nvidia").glob("*/include"))]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = max(1, min(cores, _free_ram_bytes() // JOB_BYTES))
        variables = {
            "TORCH_CUDA_ARCH_LIST": architectures, "TORCH_EXTENSIONS_DIR": str(place),
            "MAX_JOBS": self._variables.get("MAX_JOBS", str(jobs)),
            "CPATH": os.pathsep.join([*includes, *filter(None, [self._variables.get("CPATH", "")])]),
            "PATH": os.pathsep.join([str(python.parent), self._variables.get("PATH", os.defpath)]),
        }  # fmt: skip
        if home is not None:
            variables["CUDA_HOME"] = str(home)
        given = self._variables.get("NVCC_APPEND_FLAGS", "")
        if version >= CPP20_TOOLKIT and "-std" not in given:
            variables["NVCC_APPEND_FLAGS"] = f"{given} {CPP20}".strip()
        return variables

    def _folder(self, name: str) -> Path:
        if name not in NAMES:
            raise InstallFailed(f"There is no engine {name!r} to install.", hint=f"Known: {', '.join(NAMES)}.")
        return self._root / name

    def _lock(self, name: str) -> Path:
        return self._root / f"{name}.lock"  # beside the folder, so that a removal does not take it away

    def _removed(self, name: str) -> Path:
        return self._root / f"{name}.removed"

    def _stamp(self, folder: Path) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            table = json.loads((folder / STAMP).read_text())
            if isinstance(table, dict):
                return table
        return {}

    def _wanted(self, name: str) -> str:
        """What the requirements say, without the comments' wording."""
        lines = (self._home / f"requirements-{name}.txt").read_text(encoding="utf-8").splitlines()
        said = [line.strip() for line in lines if line.strip() and (line[0] != "#" or line.startswith("#no-deps:"))]
        return hashlib.sha256("\n".join(said).encode()).hexdigest()

    def _size(self, folder: Path) -> int:
        """Bytes of the folder, counted once a change: a PyTorch has 15,000 files."""
        changed = (folder / STAMP).stat().st_mtime if (folder / STAMP).exists() else 0.0
        known = self._sizes.get(str(folder))
        if known is not None and changed and known[0] == changed:
            return known[1]
        size = 0
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # a compiler's passing file
                size += path.lstat().st_size if not path.is_dir() else 0
        self._sizes[str(folder)] = (changed, size)
        return size


class _Runner:
    """Runs the commands of one job: into its log, with a deadline, ended with all they started when cancelled."""

    def __init__(
        self, log: Path, cancelled: threading.Event, deadline_s: float, variables: Mapping[str, str], lock: int = -1
    ) -> None:
        """lock is a descriptor that the commands keep open, so that a lock lasts as long as they do."""
        self._log, self._cancelled, self._deadline_s = log, cancelled, deadline_s
        self._variables, self._lock = variables, lock
        self.lines: list[str] = []

    def is_late(self) -> bool:
        """Has the deadline passed?"""
        return time.monotonic() > self._deadline_s

    def run(
        self, command: list[str], words: str, on_line: Callable[[str], None] = lambda line: None, *,
        variables: Mapping[str, str] | None = None, tick: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Raises InstallFailed with the line that says what went wrong."""
        code = self.call(command, on_line, variables=variables, tick=tick)
        if self._cancelled.is_set():
            raise InstallFailed("The installation was cancelled.", hint="Installing again goes on where it stopped.")
        if self.is_late():
            raise InstallFailed(f"The time limit passed while {words}.", hint=f"The log is {self._log}.")
        if code:
            said = next((line for line in reversed(self.lines) if re.search(r"error|fatal|No space", line, re.I)), "")
            last = said or (self.lines or ["no output"])[-1]
            raise InstallFailed(f"It failed while {words}: {last.strip()}"[:400], hint=f"The log is {self._log}.")

    def call(
        self, command: list[str], on_line: Callable[[str], None], *, variables: Mapping[str, str] | None = None,
        tick: Callable[[], None] = lambda: None, cwd: Path | None = None, apart: bool = False,
    ) -> int:  # fmt: skip
        """The command's exit code. apart: what it writes to stderr goes into the log alone."""
        environment = {**self._variables, "PYTHONUNBUFFERED": "1", "PIP_USER": "0", **(variables or {})}
        supervised = [sys.executable, "-I", "-c", SUPERVISOR, "0" if apart else "10", *command]
        self.lines = []
        with self._log.open("a", encoding="utf-8", buffering=1) as log:
            log.write("" if apart else f"$ {' '.join(command)}\n")
            child = subprocess.Popen(
                supervised, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log if apart else subprocess.STDOUT,
                text=True, errors="replace", env=environment, start_new_session=True, cwd=cwd,
                pass_fds=[self._lock] if self._lock >= 0 else [],
            )  # fmt: skip
            ended = threading.Event()
            watcher = threading.Thread(target=self._watch, args=(child, ended, tick), daemon=True)
            watcher.start()
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    if not apart:
                        log.write(line)
                    self.lines = [*self.lines[-40:], line.rstrip()]
                    on_line(line.rstrip())
            except BaseException:  # Ctrl-C comes out here
                _end(child)
                raise
            finally:
                code = child.wait()
                ended.set()
                watcher.join()
                for pipe in filter(None, (child.stdin, child.stdout)):
                    pipe.close()
        return code

    def _watch(self, child: subprocess.Popen[str], ended: threading.Event, tick: Callable[[], None]) -> None:
        while not ended.wait(0.2):
            tick()
            if self._cancelled.is_set() or self.is_late():
                _end(child)
                return


class _PipProgress:
    """pip's lines as steps; the share follows the megabytes that it announces."""

    def __init__(self, words: str, report: Report) -> None:
        self._words, self._report, self._mb = words, report, 0.0

    def take(self, line: str) -> None:
        match = re.match(r"\s*(Collecting|Downloading|Using cached|Installing collected) ?(\S*)(.*)", line)
        if match is None:
            return
        what, name, rest = match.groups()
        if what == "Installing collected":
            self._report(Step(self._words, 0.36, "unpacking"))
            return
        # The size stands there when a download begins, so it counts for the next line.
        share = 0.05 + 0.3 * min(1.0, self._mb / DOWNLOAD_MB)
        if size := re.search(r"\(([\d.]+) ([kMG])B\)", rest):
            self._mb += float(size[1]) * {"k": 0.001, "M": 1.0, "G": 1000.0}[size[2]]
        name = name.rsplit("/", 1)[-1]
        if not name.endswith(".metadata"):
            self._report(Step(self._words, share, f"{what.lower()} {name} {size[0] if size else ''}".rstrip()))


@contextlib.contextmanager
def _without_spaces(folder: Path) -> Iterator[Path]:
    """The folder under a path without spaces: PyTorch hands its paths to the linker unquoted."""
    if not re.search(r"\s", str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="turntable-") as place:
        link = Path(place) / folder.name
        link.symlink_to(folder, target_is_directory=True)
        yield link


def _end(child: subprocess.Popen[str]) -> None:
    """Have the supervisor end everything."""
    assert child.stdin is not None
    with contextlib.suppress(OSError):
        child.stdin.close()


def _speeds(said: Any) -> dict[str, float]:
    """Speeds by card, of what a stamp or a self-test says; empty where it is no such table."""
    if not isinstance(said, dict):
        return {}
    return {str(card): float(speed) for card, speed in said.items() if isinstance(speed, int | float) and speed > 0}


def _versions(python: Path, name: str) -> dict[str, str]:
    program = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", program, name, "torch"], capture_output=True, text=True, check=False)
    found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def _python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _built(place: Path, name: str) -> Path | None:
    """The compiled extension in or below a folder; one that was laid there wins over one that was built there."""
    found = place.rglob(f"{name}_ext*.so") if place.is_dir() else ()
    return min(found, key=lambda path: (len(path.parts), path), default=None)


def _place_of_built(place: Path, name: str) -> str:
    """The folder in which Python finds the compiled extension; with it on the path nothing is ever compiled again."""
    built = _built(place, name)
    return str(built.parent) if built is not None else ""


def covers(built: str, capability: tuple[int, int]) -> bool:
    """Has an extension that was compiled for these architectures ("8.6;9.0+PTX") code for such a card?

    Machine code runs on cards of the same major number and no smaller minor one, that for 9.0a on 9.0 alone, and PTX
    is compiled for any later card. A list that cannot be read is taken to cover everything. Source: CUDA C++
    Programming Guide, binary and PTX compatibility.
    """
    for one in filter(None, re.split(r"[;\s]+", built)):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", one)
        if match is None:
            return True
        least = (int(match[1]), int(match[2]))
        exact, has_ptx = match[3] == "a", bool(match[4])
        if capability == least or (not exact and capability > least and (has_ptx or capability[0] == least[0])):
            return True
    return False


def _toolkits(variables: Mapping[str, str], usual: Sequence[Path]) -> list[tuple[Path, tuple[int, int]]]:
    """The CUDA toolkits with their versions: that in CUDA_HOME alone, or those of the PATH and the usual places.

    nvcc on the PATH may be a script that calls the real one, so it is asked where its toolkit is.
    """
    named = variables.get("CUDA_HOME")
    on_path = shutil.which("nvcc", path=variables.get("PATH"))
    places = [Path(named)] if named else [*([_toolkit_of(Path(on_path))] if on_path else []), *usual]
    found: dict[Path, tuple[int, int]] = {}
    for place in places:
        nvcc = place / "bin" / "nvcc"
        if place not in found and nvcc.exists():
            said = _said([str(nvcc), "--version"], variables)
            match = re.search(r"release (\d+)\.(\d+)", said)
            found[place] = (int(match[1]), int(match[2])) if match else (0, 0)
    return list(found.items())


def _toolkit_of(nvcc: Path) -> Path:
    real = nvcc.resolve()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if match := re.search(r"(/[^\s'\"]+)/bin/nvcc", real.read_text(encoding="utf-8")):
            return Path(match[1])
    return real.parent.parent


def _said(command: list[str], variables: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=dict(variables))
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _free_ram_bytes() -> int:
    with contextlib.suppress(OSError, ValueError):
        if match := re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()):
            return int(match[1]) * 1024
    return 8 * 10**9


def _apt(suffix: str) -> str:
    return f"sudo apt-get install python{sys.version_info.major}.{sys.version_info.minor}{suffix} (Debian, Ubuntu)."


def _write(path: Path, table: dict[str, Any]) -> None:
    """By a rename: a stamp is whole or not there."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(table, indent=1), encoding="utf-8")
    fresh.replace(path)


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""


def _last_line(path: Path) -> str:
    with contextlib.suppress(OSError):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:200] if lines else ""
    return ""


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[int]:
    """One installer at a time; the lock goes with its process and commands, however they end. Yields a descriptor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        for _ in range(10):  # one who only looks holds it for a moment
            if _take(file):
                break
            time.sleep(0.05)
        else:
            raise InstallFailed(f"{name} is being installed by another program.", hint="Wait for it, or stop it.")
        yield file.fileno()


def _take(file: Any, shared: bool = False) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: two installers at once are not held apart
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r") as file:
            return not _take(file, shared=True)
    except FileNotFoundError:
        return False


def to_dict(environment: Environment) -> dict[str, Any]:
    """For the page and for programs."""
    return {**asdict(environment), "folder": str(environment.folder), "python": str(environment.python)}


@dataclass(frozen=True)
class EngineJob:
    """The last or running installation, test or removal, for display. lines are the latest things it said."""

    name: str
    action: str
    running: bool
    words: str = ""
    fraction: float = 0.0
    lines: tuple[str, ...] = ()
    error: str = ""
    hint: str = ""


class EngineJobs:
    """Installs, tests and removes on a thread of its own, one at a time; every page sees the same job."""

    def __init__(
        self, environments: Environments, *, on_change: Callable[[], None] = lambda: None,
        on_done: Callable[[Environment], None] = lambda environment: None,
    ) -> None:  # fmt: skip
        self.environments = environments
        self._on_change, self._on_done = on_change, on_done
        self._lock = threading.Lock()
        self._job: EngineJob | None = None
        self._cancel, self._given_up = threading.Event(), False
        self._thread: threading.Thread | None = None

    def view(self) -> EngineJob | None:
        """The running job, or the last one; None before the first."""
        with self._lock:
            return self._job

    def start(self, name: str, action: str) -> None:
        """Begin "install", "test" or "remove". Raises InstallFailed while another job runs or for an unknown word."""
        if action not in ("install", "test", "remove"):
            raise InstallFailed(f"An engine can be installed, tested and removed; {action!r} is none of these.")
        self.environments.get(name)
        with self._lock:
            if self._job is not None and self._job.running:
                busy = f"{self._job.name} is busy: {self._job.words or self._job.action}."
                raise InstallFailed(busy, hint="Wait for it.")
            self._job = EngineJob(name, action, True)
            self._cancel, self._given_up = threading.Event(), False
            self._thread = threading.Thread(target=self._run, args=(name, action), name=f"{action}-{name}", daemon=True)
            self._thread.start()
        self._on_change()

    def cancel(self) -> None:
        """End the running installation or test; what was downloaded stays, and no start goes on with it unasked."""
        self._given_up = True
        self._cancel.set()

    def close(self) -> None:
        """End it because the program ends, and wait for that; the next start goes on."""
        self._cancel.set()
        if self._thread is not None:
            self._thread.join(20)

    def _run(self, name: str, action: str) -> None:
        error, hint = "", ""
        try:
            self._work(name, action)
        except InstallFailed as failure:
            error, hint = str(failure), failure.hint
        except OSError as failure:
            error = f"{failure.strerror or failure}: {failure.filename or ''}".rstrip(": ")
        except Exception as failure:  # a job that never ends would hold up all others
            log.exception("%s of %s failed", action, name)
            error = f"{type(failure).__name__}: {failure}"
        if self._given_up and action == "install":
            self.environments.give_up(name, "The installation was cancelled.")
        try:
            self._on_done(self.environments.get(name))  # before it is called done: who sees that may use the engine
        except Exception as failure:
            log.exception("taking note of %s failed", name)
            error = error or f"{type(failure).__name__}: {failure}"
        with self._lock:
            assert self._job is not None
            self._job = replace(self._job, running=False, error=error, hint=hint)
        self._on_change()

    def _work(self, name: str, action: str) -> None:
        if action == "remove":
            self.environments.remove(name)
        elif action == "test":
            self.environments.test(name, self._tell, self._cancel)
        else:
            self.environments.install(name, self._tell, self._cancel)

    def _tell(self, step: Step) -> None:
        with self._lock:
            before = self._job
            assert before is not None
            said = step.detail or step.words
            lines = before.lines if before.lines[-1:] == (said,) else (*before.lines, said)[-12:]
            self._job = replace(before, words=step.words, fraction=step.fraction, lines=lines)
        if step.words != before.words:
            log.info("engine %s: %s", before.name, step.words)
        if lines != before.lines or int(step.fraction * 100) != int(before.fraction * 100):
            self._on_change()
