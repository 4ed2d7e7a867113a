"""The engines' own environments below `.engines`: list, install, test, remove.

Each ExLlama engine wants its own PyTorch, so each has a virtual environment of its
own and its compiled extension beside it. The extension is built when the engine is
installed, never at a first message. A stamp file is written last: an installation
that was cut off is seen as broken and mended by installing again.

Knows drivers, compilers, pip and child processes. Knows no model, no preset and no
page, and never imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from modules.errors import InstallFailed
from modules.process import EngineKind

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("exllamav2", "exllamav3")
STAMP, LOG, LOCK = "installed.json", "install.log", "install.lock"
EXTENSIONS = "ext"
NEEDS_DISK_BYTES = 12 * 10**9
JOB_BYTES = 10**9  # of RAM for one compiler
LIMIT_S = 90 * 60.0
# PyTorch 2.11 from the registry is built for CUDA 13.0, which needs this driver and has no code for older cards.
LEAST_DRIVER = 580
LEAST_CARD = {"exllamav2": (7, 5), "exllamav3": (8, 0)}
ABOUT_MINUTES = {"exllamav2": 10, "exllamav3": 60}  # of compiling on four cores


@dataclass(frozen=True)
class Step:
    """Progress of an installation: what is being done, and how far, 0 to 1, where that is known."""

    words: str
    fraction: float = 0.0


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


def cards_by_nvml() -> tuple[int, list[CardFound]]:
    """The driver's major version and the cards; raises InstallFailed with one line where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise InstallFailed(
            f"No NVIDIA driver answers ({error}).", hint="Install the NVIDIA driver; llama.cpp needs none."
        ) from None
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        text = driver.decode() if isinstance(driver, bytes) else str(driver)
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(handle)
            capability = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            found.append(CardFound(name.decode() if isinstance(name, bytes) else str(name), tuple(capability)))
        return int(text.split(".")[0]), found
    except (pynvml.NVMLError, ValueError) as error:
        raise InstallFailed(f"The NVIDIA driver does not answer properly: {error}.") from None
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def card_bytes() -> int:
    """Memory of all NVIDIA cards less 1 GiB each, for the loader's budget; 0 where no driver answers."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return sum(max(0, int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) - (1 << 30)) for handle in handles)
    except pynvml.NVMLError:
        return 0
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


class Environments:
    """All engines' environments of one checkout. Thread-safe; two programs at once take turns by a lock file."""

    def __init__(
        self, home: Path = ROOT, *, cards: Cards = cards_by_nvml, variables: Mapping[str, str] | None = None,
        limit_s: float = LIMIT_S,
    ) -> None:  # fmt: skip
        self._home, self._root, self._cards = home, home / ".engines", cards
        self._variables = os.environ if variables is None else variables
        self._limit_s = limit_s
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
        if _is_locked(folder / LOCK):
            return Environment(name, "installing", folder, python, problem=_last_line(folder / LOG))
        if not stamp or not python.exists():
            return Environment(
                name, "broken", folder, python, problem=f"The installation was not finished. {_last_line(folder / LOG)}"
            )
        if stamp.get("requirements") != self._wanted(name):
            return Environment(
                name, "broken", folder, python, stamp.get("versions", {}),
                problem="It was installed for other requirements; install it again.",
            )  # fmt: skip
        tested = stamp.get("tested") or {}
        state = {None: "untested", 0: "ready", 3: "untested"}.get(tested.get("code"), "failed")
        return Environment(
            name, state, folder, python, stamp.get("versions", {}), self._size(folder) if sized else 0,
            tested.get("when", ""), tested.get("problem", ""),
        )  # fmt: skip

    def kind(self, name: str) -> EngineKind:
        """How the engine's children are started."""
        folder = self._folder(name)
        environment = {
            "TORCH_EXTENSIONS_DIR": str(folder / EXTENSIONS),
            "PYTHONPATH": _place_of_built(folder / EXTENSIONS),
            "EXLLAMA_NO_XFORMERS": "1",
            "CUDA_MODULE_LOADING": "LAZY",
        }
        return EngineKind(
            name, str(_python_of(folder)), keeps_process=True, memory="vram",
            environment=tuple(sorted((k, v) for k, v in environment.items() if v)),
        )  # fmt: skip

    # Changing ----------------------------------------------------------------------------

    def install(self, name: str, report: Report, cancelled: threading.Event | None = None) -> Environment:
        """Make or mend the environment, build the extension, and try it. Blocks for minutes.

        Raises InstallFailed with one line that says what is missing or what went wrong.
        """
        stop = cancelled or threading.Event()
        report(Step("looking at the machine"))
        architectures = self.check(name)
        folder = self._folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / LOCK, name):
            stamp = folder / STAMP
            stamp.unlink(missing_ok=True)
            log = folder / LOG
            log.write_text("")
            runner = _Runner(log, stop, time.monotonic() + self._limit_s, self._variables)
            python = _python_of(folder)
            if not python.exists():
                report(Step("making the environment", 0.02))
                runner.run([sys.executable, "-m", "venv", str(folder)], "making the environment")
            self._pip(name, python, runner, report)
            self._build(name, folder, runner, report, architectures)
            versions = _versions(python, name)
            stamp.write_text(json.dumps({"requirements": self._wanted(name), "versions": versions}, indent=1))
        report(Step("trying it", 0.97))
        return self.test(name, report)

    def test(self, name: str, report: Report) -> Environment:
        """Run the self-test in the environment, and remember how it went. Raises InstallFailed when it is not there."""
        environment = self.get(name)
        if environment.state in ("absent", "broken", "installing"):
            raise InstallFailed(f"{name} is not installed.", hint=f"python app.py engines install {name}")
        kind = self.kind(name)
        done = subprocess.Popen(
            [kind.python, "-m", "modules.engines.selftest", name], cwd=self._home, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**self._variables, **dict(kind.environment)},
        )  # fmt: skip
        try:
            out, err = done.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            done.kill()
            out, err = done.communicate()
        checks = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        for check in checks:
            report(Step(f"{'ok' if check['ok'] else 'FAILED'}: {check['check']}: {check['detail']}", 1.0))
        failed = [check for check in checks if not check["ok"]]
        problem = f"{failed[0]['check']}: {failed[0]['detail']}" if failed else ""
        if done.returncode and not problem:
            problem = (err.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        stamp = environment.folder / STAMP
        table = {**self._stamp(environment.folder), "tested": {
            "code": done.returncode, "when": time.strftime("%Y-%m-%d %H:%M"), "problem": problem,
        }}  # fmt: skip
        stamp.write_text(json.dumps(table, indent=1))
        return self.get(name, sized=True)

    def remove(self, name: str) -> int:
        """Delete the environment; returns the bytes that it took. Raises InstallFailed while it is being installed."""
        environment = self.get(name)
        if environment.state == "installing":
            raise InstallFailed(f"{name} is being installed by another program.", hint="Wait for it, or stop it.")
        size = self._size(environment.folder) if environment.folder.exists() else 0
        if environment.folder.exists():
            shutil.rmtree(environment.folder)
        return size

    # Steps -------------------------------------------------------------------------------

    def check(self, name: str) -> str:
        """Refuse, in one line, a machine on which it cannot work. Returns the card architectures to build for.

        Raises InstallFailed.
        """
        self._folder(name)
        named = self._variables.get("TURNTABLE_CUDA_ARCHS", "")
        architectures = named or self._architectures(name)
        if not _find_nvcc(self._variables) and not self._prebuilt():
            raise InstallFailed(
                "nvcc is missing: the CUDA toolkit compiles the engine.",
                hint="Install the CUDA toolkit 13 from NVIDIA's packages, and put nvcc on the PATH or set CUDA_HOME.",
            )
        if not shutil.which("g++", path=self._variables.get("PATH")) and not self._prebuilt():
            raise InstallFailed("g++ is missing.", hint="sudo apt-get install g++ (Debian, Ubuntu).")
        headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if not headers.is_file() and not self._prebuilt():
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise InstallFailed(
                "Python's headers are missing.", hint=f"sudo apt-get install python{version}-dev (Debian, Ubuntu)."
            )
        self._root.mkdir(parents=True, exist_ok=True)
        needs = int(self._variables.get("TURNTABLE_ENGINE_DISK_BYTES", NEEDS_DISK_BYTES))
        free = shutil.disk_usage(self._root).free
        if free < needs:
            raise InstallFailed(
                f"{name} needs about {needs / 1e9:.0f} GB of disk, and {free / 1e9:.1f} GB are free in {self._root}."
            )
        return architectures

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
        runner.run([*pip, "-r", str(file)], words, lambda line: _pip_step(line, report))
        for bare in re.findall(r"^#no-deps: (\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE):
            runner.run([*pip, "--no-deps", bare], f"installing {bare}")

    def _prebuilt(self) -> Path | None:
        place = self._variables.get("TURNTABLE_PREBUILT", "")
        return _built(Path(place)) if place else None

    def _build(self, name: str, folder: Path, runner: _Runner, report: Report, architectures: str) -> None:
        """Compile the extension by importing the library once, with everything that the compiler must know."""
        place = folder / EXTENSIONS
        place.mkdir(exist_ok=True)
        prebuilt = self._prebuilt()
        if prebuilt is not None:
            target = place / f"{name}_ext" / prebuilt.name
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(prebuilt, target)
        for stale in place.rglob("lock"):
            stale.unlink()  # a build that was killed leaves it, and the next import would wait for it for ever
        minutes = ABOUT_MINUTES[name]
        words = f"compiling {name} for {architectures} (about {minutes} minutes on four cores)"
        report(Step(words, 0.4))
        began = time.monotonic()

        def tick() -> None:
            report(Step(words, min(0.95, 0.4 + 0.55 * (time.monotonic() - began) / (minutes * 60))))

        with _without_spaces(folder) as plain:
            python = _python_of(plain)
            variables = self._build_variables(python, plain / EXTENSIONS, architectures)
            if prebuilt is not None:
                variables["PYTHONPATH"] = _place_of_built(place)
            runner.run([str(python), "-c", f"import {name}"], words, variables=variables, tick=tick)
        if prebuilt is None and _built(place) is None and name == "exllamav2":
            raise InstallFailed(f"{name} was imported, but its extension was not built.", hint=f"See {folder / LOG}.")

    def _build_variables(self, python: Path, place: Path, architectures: str) -> dict[str, str]:
        home = _find_nvcc(self._variables)
        site = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        # Headers of cuBLAS and its like come with PyTorch's packages, where a toolkit may lack them.
        includes = [str(path) for path in sorted(Path(site, "nvidia").glob("*/include"))]
        jobs = max(1, min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4, _ram() // JOB_BYTES))
        variables = {
            "TORCH_CUDA_ARCH_LIST": architectures, "TORCH_EXTENSIONS_DIR": str(place),
            "MAX_JOBS": self._variables.get("MAX_JOBS", str(jobs)),
            "CPATH": os.pathsep.join([*includes, *filter(None, [self._variables.get("CPATH", "")])]),
            "PATH": os.pathsep.join([str(python.parent), self._variables.get("PATH", os.defpath)]),
        }  # fmt: skip
        if home is not None:
            variables["CUDA_HOME"] = str(home)
        return variables

    def _folder(self, name: str) -> Path:
        if name not in NAMES:
            raise InstallFailed(f"There is no engine {name!r} to install.", hint=f"Known: {', '.join(NAMES)}.")
        return self._root / name

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
        if known is None or known[0] != changed:
            size = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
            known = self._sizes[str(folder)] = (changed, size)
        return known[1]


class _Runner:
    """Runs the commands of one installation: into its log, with a deadline, ended as a group when cancelled."""

    def __init__(self, log: Path, cancelled: threading.Event, deadline_s: float, variables: Mapping[str, str]) -> None:
        self._log, self._cancelled, self._deadline_s, self._variables = log, cancelled, deadline_s, variables

    def run(
        self, command: list[str], words: str, on_line: Callable[[str], None] | None = None, *,
        variables: Mapping[str, str] | None = None, tick: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Raises InstallFailed with the last lines of what the command wrote."""
        environment = {**self._variables, "PYTHONUNBUFFERED": "1", "PIP_USER": "0", **(variables or {})}
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=environment, start_new_session=os.name != "nt",
        )  # fmt: skip
        ending = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(child, ending, tick), daemon=True)
        watcher.start()
        lines: list[str] = []
        assert child.stdout is not None
        with self._log.open("a", encoding="utf-8", buffering=1) as log:
            log.write(f"$ {' '.join(command)}\n")
            for line in child.stdout:
                log.write(line)
                lines = [*lines[-40:], line.rstrip()]
                if on_line:
                    on_line(line.rstrip())
        code = child.wait()
        ending.set()
        watcher.join()
        child.stdout.close()
        if self._cancelled.is_set():
            raise InstallFailed("The installation was cancelled.", hint="Installing again goes on where it stopped.")
        if time.monotonic() > self._deadline_s:
            raise InstallFailed(f"The time limit passed while {words}.", hint=f"The log is {self._log}.")
        if code:
            said = next((line for line in reversed(lines) if re.search(r"error|fatal|No space", line, re.I)), "")
            last = said or (lines or ["no output"])[-1]
            raise InstallFailed(f"It failed while {words}: {last}"[:400], hint=f"The log is {self._log}.")

    def _watch(self, child: subprocess.Popen[str], ending: threading.Event, tick: Callable[[], None] | None) -> None:
        while not ending.wait(0.2):
            if tick:
                tick()
            if self._cancelled.is_set() or time.monotonic() > self._deadline_s:
                _end(child)
                return


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
    """End a command with everything that it started: compilers would go on for minutes."""
    with contextlib.suppress(OSError):
        if os.name == "nt":
            child.kill()
        else:
            os.killpg(child.pid, signal.SIGKILL)


def _pip_step(line: str, report: Report) -> None:
    if line.startswith(("Collecting ", "Downloading ", "Installing collected")):
        report(Step(" ".join(line.split()[:3])[:100], 0.1 if "Installing" not in line else 0.35))


def _versions(python: Path, name: str) -> dict[str, str]:
    program = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", program, name, "torch"], capture_output=True, text=True, check=False)
    found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def _python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _built(place: Path) -> Path | None:
    """The compiled extension in or below a folder."""
    return next(iter(sorted(place.rglob("*_ext*.so"))), None) if place.is_dir() else None


def _place_of_built(place: Path) -> str:
    """The folder in which Python finds the compiled extension; with it on the path nothing is ever compiled again."""
    built = _built(place)
    return str(built.parent) if built is not None else ""


def _find_nvcc(variables: Mapping[str, str]) -> Path | None:
    """The toolkit's folder: CUDA_HOME, the usual place, or that of nvcc, which may be a script that calls another."""
    for given in (variables.get("CUDA_HOME"), "/usr/local/cuda"):
        if given and (Path(given) / "bin" / "nvcc").exists():
            return Path(given)
    found = shutil.which("nvcc", path=variables.get("PATH"))
    if found is None:
        return None
    real = Path(found).resolve()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if match := re.search(r"(/[\w./+-]+)/bin/nvcc", real.read_text(encoding="utf-8")):
            return Path(match[1])
    return real.parent.parent


def _ram() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 * 10**9


def _last_line(path: Path) -> str:
    with contextlib.suppress(OSError):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:200] if lines else ""
    return ""


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """One installer at a time; the lock goes with its process, however that ends."""
    with path.open("a+") as file:
        if not _take(file):
            raise InstallFailed(f"{name} is being installed by another program.", hint="Wait for it.")
        yield


def _take(file: Any) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: two installers at once are not held apart
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("a+") as file:
        return not _take(file)


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
        self._cancel = threading.Event()
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
            self._cancel = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(name, action), name=f"{action}-{name}", daemon=True)
            self._thread.start()
        self._on_change()

    def cancel(self) -> None:
        """End the running installation; what was downloaded stays for the next."""
        self._cancel.set()

    def close(self) -> None:
        """Cancel, and wait for the end."""
        self._cancel.set()
        if self._thread is not None:
            self._thread.join(20)

    def _run(self, name: str, action: str) -> None:
        error, hint = "", ""
        try:
            if action == "remove":
                self.environments.remove(name)
            elif action == "test":
                self.environments.test(name, self._tell)
            else:
                self.environments.install(name, self._tell, self._cancel)
        except InstallFailed as failure:
            error, hint = str(failure), failure.hint
        except OSError as failure:
            error = f"{failure.strerror or failure}: {failure.filename or ''}".rstrip(": ")
        with self._lock:
            assert self._job is not None
            self._job = replace(self._job, running=False, error=error, hint=hint)
        self._on_done(self.environments.get(name))
        self._on_change()

    def _tell(self, step: Step) -> None:
        with self._lock:
            assert self._job is not None
            lines = self._job.lines if self._job.words == step.words else (*self._job.lines, step.words)[-12:]
            changed = lines != self._job.lines or int(step.fraction * 100) != int(self._job.fraction * 100)
            self._job = replace(self._job, words=step.words, fraction=step.fraction, lines=lines)
        if changed:
            self._on_change()
