"""environments.py with real virtual environments and pip, and what is built on it: the System page and `engines`.

A folder of tiny wheels stands for the registry, and a small shared library for the NVIDIA driver.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from modules.environments import (
    NAMES,
    STAMP,
    CardFound,
    EngineJob,
    EngineJobs,
    Environment,
    Environments,
    Step,
    _PipProgress,
    covers,
    to_dict,
)
from modules.errors import InstallFailed
from modules.hardware import Hardware
from modules.ui.system import SystemPage

from . import nvml
from .browser.conftest import free_port
from .conftest import ROOT, eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these engines are installed on Linux only")

# Stands for the library: compiles for as long as it is told, and writes down what the compiler was told.
LIBRARY = """
import json, os, pathlib, subprocess, sys, time
place = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "exllamav2_ext"
if os.environ.get("TORCH_CUDA_ARCH_LIST"):
    assert " " not in __file__ + str(place) + os.environ["CPATH"], "the linker gets these unquoted"
if not any(pathlib.Path(p, "exllamav2_ext.so").exists() for p in sys.path):
    assert not (place / "lock").exists(), "waiting for ever"
    place.mkdir(parents=True, exist_ok=True)
    (place / "lock").touch()
    # Each in a process group of its own, as ninja starts compilers.
    compiler = [sys.executable, "-c", f"import time; time.sleep({os.environ.get('FAKE_BUILD_S', '0')}) # compiler"]
    subprocess.run(compiler, cwd=place, preexec_fn=os.setpgrp)
    if os.environ.get("FAKE_BUILD_FAILS"):
        print("fatal error: cublas_v2.h: No such file")
        sys.exit(1)
    told = {n: os.environ.get(n) for n in ("CUDA_HOME", "CPATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")}
    (place / "told.json").write_text(json.dumps(told))
    (place / "exllamav2_ext.so").touch()
    (place / "lock").unlink()
"""
SELFTEST = """
import json, os, sys
code = int(os.environ.get("FAKE_TEST", "0"))
print(json.dumps({"check": "import", "ok": True, "detail": "fine"}))
speeds = {"GPU-4090": 24e9, "GPU-odd": "fast"}
print(json.dumps({"check": "host to card 0", "ok": True, "detail": "24.0 GB/s", "bytes_per_s": speeds}))
print(json.dumps({"check": "odd", "ok": True, "detail": "", "bytes_per_s": 7}))
if code:
    print(json.dumps({"check": "numbers", "ok": False, "detail": "wrong"}))
sys.exit(code)
"""
EXTENSION = """
#include <Python.h>
static struct PyModuleDef def = {PyModuleDef_HEAD_INIT, "exllamav2_ext"};
PyMODINIT_FUNC PyInit_exllamav2_ext(void) { return PyModule_Create(&def); }
"""
GOOD_CARD = (580, [CardFound("RTX 4090", (8, 9)), CardFound("GTX 1060", (6, 1))])


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        kind = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", kind)
        archive.writestr(f"{info}/RECORD", "")


def compiled(source: str, out: Path, *flags: str) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to compile a stand-in with")
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(out), *flags], input=source, text=True, check=True
    )
    return out


@pytest.fixture(scope="session")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with pip in it; most tests begin behind this step, which takes seconds."""
    folder = tmp_path_factory.mktemp("venv") / "empty"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=60)
    return folder


@pytest.fixture
def begun(home: Path, empty_environment: Path) -> Path:
    """A checkout in which an installation was cut off after its first step."""
    shutil.copytree(empty_environment, home / ".engines" / "exllamav2", symlinks=True)
    return home


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A checkout with requirements, a self-test, wheels, and a toolkit whose nvcc is a script that calls another."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "torch", "2.11.0", {"torch/__init__.py": "", "nvidia/cu13/include/cublas_v2.h": ""})
    wheel(wheels, "exllamav2", "0.3.2", {"exllamav2/__init__.py": LIBRARY})
    folder = tmp_path / "my home"
    (folder / "modules" / "engines").mkdir(parents=True)
    (folder / "modules" / "engines" / "selftest.py").write_text(SELFTEST)
    (folder / "requirements-exllamav2.txt").write_text("# Why.\ntorch==2.11.0\n#no-deps: exllamav2==0.3.2\n")
    (folder / "requirements-exllamav3.txt").write_text("torch==2.11.0\n")
    toolkit = tmp_path / "toolkit" / "bin"
    toolkit.mkdir(parents=True)
    (toolkit / "nvcc").write_text("#!/bin/sh\necho Cuda compilation tools, release ${FAKE_CUDA:-13.0}, V13.0.88\n")
    (toolkit / "nvcc").chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvcc").write_text(f'#!/bin/sh\nexec {toolkit}/nvcc "$@"\n')
    (tools / "nvcc").chmod(0o755)
    return folder


def made(home: Path, cards=GOOD_CARD, limit_s: float = 60.0, **variables: str) -> Environments:
    place = home.parent
    given = {
        "PATH": os.pathsep.join([str(place / "tools"), *os.environ["PATH"].split(os.pathsep)]), "HOME": str(place),
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(place / "wheels"), "CUDA_HOME": str(place / "toolkit"),
        "TURNTABLE_ENGINE_DISK_BYTES": "1000", **variables,
    }  # fmt: skip
    known = {k: v for k, v in given.items() if v}
    return Environments(home, cards=lambda: cards, variables=known, limit_s=limit_s, toolkits=())


def quiet(step: Step) -> None:
    pass


def test_installed_tested_listed_and_removed(home: Path) -> None:
    environments, steps = made(home), []
    assert [e.state for e in environments.list()] == ["absent", "absent"]
    lock = home / ".engines" / "exllamav2" / "ext" / "exllamav2_ext" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()  # of a build that was killed: the library would wait for it for ever
    found = environments.install("exllamav2", steps.append)
    assert (found.state, found.usable, found.problem) == ("ready", True, "")
    assert found.versions == {"exllamav2": "0.3.2", "torch": "2.11.0"}
    assert found.size_bytes > 1_000_000
    assert [s.fraction for s in steps] == sorted(s.fraction for s in steps)
    assert any("compiling exllamav2 for 8.9" in s.words for s in steps)
    told = json.loads((found.folder / "ext" / "exllamav2_ext" / "told.json").read_text())
    assert told["CUDA_HOME"] == str(home.parent / "toolkit")
    assert told["TORCH_CUDA_ARCH_LIST"] == "8.9"
    assert told["CPATH"].endswith("nvidia/cu13/include")
    assert int(told["MAX_JOBS"]) >= 1
    json.dumps(to_dict(found))
    assert found.bus_speeds == {"GPU-4090": 24e9} == made(home).get("exllamav2").bus_speeds

    # Its children find the extension with neither compiler nor toolkit.
    kind = environments.kind("exllamav2")
    assert (kind.keeps_process, kind.memory) == (True, "vram")
    bare = {"PATH": "/nonexistent", **dict(kind.environment)}
    subprocess.run([kind.python, "-c", "import exllamav2"], env=bare, check=True, timeout=20)

    assert made(home, FAKE_TEST="1").test("exllamav2", quiet).state == "failed"
    assert environments.get("exllamav2").problem == "numbers: wrong"
    assert not environments.get("exllamav2").usable
    assert made(home, FAKE_TEST="3").test("exllamav2", quiet).state == "untested"
    (home / "requirements-exllamav2.txt").write_text("torch==2.12.0\n")
    assert "other requirements" in environments.get("exllamav2").problem
    assert environments.remove("exllamav2") > 1_000_000
    assert environments.get("exllamav2").state == "absent"
    assert environments.remove("exllamav2") == 0


@pytest.mark.parametrize(
    ("cards", "variables", "words"),
    [
        ((570, GOOD_CARD[1]), {}, "driver is version 570; the engine's PyTorch needs 580"),
        ((580, [CardFound("GTX 1060", (6, 1))]), {}, r"compute capability 7\.5 or newer; found: GTX 1060 \(6\.1\)"),
        ((580, []), {}, "found: none"),
        (GOOD_CARD, {"TURNTABLE_ENGINE_DISK_BYTES": str(10**18)}, "GB of disk"),
    ],
)
def test_a_machine_on_which_it_cannot_work_is_refused_in_one_line(home: Path, cards, variables, words: str) -> None:
    environments = made(home, cards, **variables)
    with pytest.raises(InstallFailed, match=words) as caught:
        environments.install("exllamav2", quiet)
    assert "\n" not in str(caught.value)
    assert environments.get("exllamav2").state == "absent"


def test_a_missing_or_unfit_compiler_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for environments, words in (
        (made(home, PATH=str(empty)), r"g\+\+ is missing"),
        (made(home, PATH=str(empty), CUDA_HOME=""), "nvcc is missing"),
        (made(home, FAKE_CUDA="12.4"), r"only a toolkit of CUDA 13 .* found: CUDA 12 in .*toolkit"),
    ):
        with pytest.raises(InstallFailed, match=words) as caught:
            environments.install("exllamav2", quiet)
        assert "\n" not in str(caught.value) + caught.value.hint
    # A script on the PATH leads to the toolkit; the headers lie there and not beside the script.
    assert made(home, CUDA_HOME="").check("exllamav2") == "8.9"
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(InstallFailed, match="venv package is missing"):
        made(home).install("exllamav2", quiet)
    assert made(home).get("exllamav2").state == "absent"


ASK_CARDS = """
import json, sys
from pathlib import Path
from modules.environments import Environments, cards_of
from modules.errors import InstallFailed
from modules.hardware import Hardware
look = cards_of(Hardware(Path("/"), limit_s=1.0))
print(json.dumps(Environments(Path(sys.argv[1]), cards=look, variables={}).has_driver()))
try:
    driver, cards = look()
    print(json.dumps([driver, [[c.name, *c.capability] for c in cards]]))
except InstallFailed as error:
    print(json.dumps([str(error), error.hint]))
"""


@pytest.mark.parametrize(
    ("changes", "faults", "has_driver", "expected"),
    [
        ({}, [], True, [580, [["NVIDIA GeForce RTX 4090", 8, 9], ["NVIDIA GeForce RTX 3060", 8, 6]]]),
        ({}, [(0, "*", nvml.GPU_IS_LOST)], True, [580, [["NVIDIA GeForce RTX 3060", 8, 6]]]),
        ({"driver": "535.1", "cards": []}, [], True, [535, []]),
        ({"driver": "new", "cards": []}, [], False, [0, []]),
        ({}, [("*", "nvmlInitWithFlags", 9)], False, "installed, but it is not running"),
        ({}, [("*", "nvmlInitWithFlags", "hang")], False, "has not answered for 1 s"),
    ],
)
def test_the_driver_is_asked_through_its_own_library(tmp_path: Path, changes, faults, has_driver, expected) -> None:
    plan = nvml.two_cards(tmp_path / "plan")
    for key, value in changes.items():
        setattr(plan, key, value)
    plan.processes, plan.faults = [], faults
    plan.write()
    variables = {**os.environ, **nvml.environment(nvml.build(tmp_path / "driver"), plan.file)}
    done = subprocess.run(
        [sys.executable, "-c", ASK_CARDS, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, env=variables,
        timeout=60, check=True,
    )  # fmt: skip
    found, said = map(json.loads, done.stdout.splitlines())
    assert found is has_driver
    if isinstance(expected, str):
        assert expected in said[0] and "\n" not in said[0] and "doctor" in said[1]
    else:
        assert said == expected


def test_who_only_looks_at_engines_asks_no_driver(begun: Path) -> None:
    environments = Environments(begun, variables={})
    assert environments.get("exllamav2").state == "broken" and not environments.has_driver()


def test_a_build_that_fails_says_why_and_the_next_install_mends_it(begun: Path) -> None:
    home = begun
    assert made(home).is_wanted("exllamav2")
    with pytest.raises(InstallFailed, match=r"cublas_v2\.h: No such file") as caught:
        made(home, FAKE_BUILD_FAILS="1").install("exllamav2", quiet)
    assert "install.log" in caught.value.hint
    broken = made(home).get("exllamav2")
    assert broken.state == "broken"
    assert "cublas_v2.h: No such file" in broken.problem
    assert not made(home).is_wanted("exllamav2")  # unasked it would fail at every start
    with pytest.raises(InstallFailed, match="not installed"):
        made(home).test("exllamav2", quiet)
    assert made(home).install("exllamav2", quiet).state == "ready"


def test_a_time_limit_and_a_cancel_end_the_compilers_at_once(begun: Path) -> None:
    home = begun
    environments = made(home, FAKE_BUILD_S="60")
    cancel = threading.Event()

    def report(step: Step) -> None:
        if "compiling" in step.words:
            cancel.set()

    began = time.monotonic()
    with pytest.raises(InstallFailed, match="cancelled"):
        environments.install("exllamav2", report, cancel)
    with pytest.raises(InstallFailed, match="time limit"):
        made(home, FAKE_BUILD_S="60", limit_s=1.6).install("exllamav2", quiet)
    assert time.monotonic() - began < 40
    assert environments.get("exllamav2").state == "broken"
    assert "time limit" in environments.get("exllamav2").problem
    assert compilers(home) == []


def compilers(home: Path) -> list[int]:
    """Processes that compile for a checkout."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, place = (entry / "cmdline").read_bytes(), os.readlink(entry / "cwd")
        except OSError:
            continue
        if b"# compiler" in command and place.startswith(str(home.parent)):
            found.append(int(entry.name))
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_ends_the_installer_ends_the_compilers(begun: Path, how: signal.Signals) -> None:
    home = begun
    program = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from tests.test_environments import made, quiet\n"
        "made(Path(sys.argv[1]), FAKE_BUILD_S='60').install('exllamav2', quiet)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(home), str(ROOT)], cwd=home.parent, stderr=subprocess.DEVNULL
    )
    eventually(lambda: compilers(home), 30)
    supervisor = os.getsid(compilers(home)[0])
    try:
        environments = made(home)
        assert environments.get("exllamav2").state == "installing"
        changes = (lambda: environments.install("exllamav2", quiet), lambda: environments.remove("exllamav2"))
        for change in changes if how == signal.SIGKILL else ():
            with pytest.raises(InstallFailed, match="by another program"):
                change()
        if how == signal.SIGKILL:
            os.kill(supervisor, signal.SIGSTOP)  # slow
        child.send_signal(how)
        child.wait(10)
        if how == signal.SIGKILL:
            assert environments.get("exllamav2").state == "installing", "the lock lasts as long as the compilers"
            os.kill(supervisor, signal.SIGCONT)
        eventually(lambda: not compilers(home), 3)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor, signal.SIGCONT)
        child.kill()
        child.wait()
    eventually(lambda: environments.get("exllamav2").state == "broken", 3)
    assert "not finished" in environments.get("exllamav2").problem
    assert environments.is_wanted("exllamav2")
    if how == signal.SIGKILL:
        assert environments.install("exllamav2", quiet).state == "ready"


def test_a_prebuilt_extension_needs_no_compiler(begun: Path, tmp_path: Path) -> None:
    place = tmp_path / "carried"
    compiled(EXTENSION, place / "exllamav2_ext.so", f"-I{sysconfig.get_paths()['include']}")
    no_tools = tmp_path / "no tools"
    no_tools.mkdir()
    bare = {"CUDA_HOME": "", "PATH": str(no_tools), "FAKE_BUILD_FAILS": "1"}
    found = made(begun, TURNTABLE_PREBUILT=str(place), **bare).install("exllamav2", quiet)
    assert found.state == "ready"
    kept = found.folder / "ext" / "exllamav2_ext.so"
    assert dict(made(begun).kind("exllamav2").environment)["PYTHONPATH"] == str(kept.parent)

    # Laid into the environment by hand, it is found there; an unfit one is refused and not kept.
    (found.folder / STAMP).unlink()
    assert made(begun, **bare).install("exllamav2", quiet).state == "ready"
    kept.unlink()
    (place / "exllamav2_ext.so").write_text("for another Python")
    with pytest.raises(InstallFailed, match=r"taking exllamav2_ext\.so, which was compiled elsewhere: ImportError"):
        made(begun, TURNTABLE_PREBUILT=str(place), **bare).install("exllamav2", quiet)
    assert not kept.exists()
    with pytest.raises(InstallFailed, match="holds no exllamav3_ext"):
        made(begun, TURNTABLE_PREBUILT=str(place)).install("exllamav3", quiet)


def test_without_a_card_it_is_built_for_what_is_named(begun: Path) -> None:
    assert made(begun, (0, []), TURNTABLE_CUDA_ARCHS="9.0").has_driver()
    assert made(begun).has_driver() and not made(begun, (0, [])).has_driver()
    found = made(begun, (0, []), TURNTABLE_CUDA_ARCHS="8.6;9.0", FAKE_TEST="3").install("exllamav2", quiet)
    assert found.state == "untested"
    assert "8.6;9.0" in (found.folder / "ext" / "exllamav2_ext" / "told.json").read_text()


def test_a_damaged_stamp_is_a_broken_environment(begun: Path) -> None:
    environments = made(begun)
    stamp = begun / ".engines" / "exllamav2" / STAMP
    for text in ("", "[]", "{"):
        stamp.write_text(text)
        assert environments.get("exllamav2").state == "broken"


def test_a_self_test_that_says_nonsense_or_nothing_is_a_failure_in_words(begun: Path) -> None:
    environments = made(begun)
    folder = begun / ".engines" / "exllamav2"
    (folder / STAMP).write_text(json.dumps({"requirements": environments._wanted("exllamav2"), "versions": {}}))
    for program, words in (
        ("import sys; print('{broken'); print('{}'); print('[1]'); sys.exit('torch is missing')", "torch is missing"),
        ("import os; os._exit(139)", "exit code 139"),
        ("import os; os.kill(os.getpid(), 11)", "exit code 139"),
    ):
        (begun / "modules" / "engines" / "selftest.py").write_text(program)
        found = environments.test("exllamav2", quiet)
        assert (found.state, found.problem) == ("failed", words)
    (begun / "modules" / "engines" / "selftest.py").write_text("import time; time.sleep(60)")
    cancel = threading.Event()
    threading.Timer(0.5, cancel.set).start()
    with pytest.raises(InstallFailed, match="cancelled"):
        environments.test("exllamav2", quiet, cancel)


def test_the_share_of_the_download_follows_the_sizes_that_pip_says() -> None:
    steps: list[Step] = []
    progress = _PipProgress("downloading", steps.append)
    for line in (
        "Looking in indexes", "Collecting torch==2.11.0 (from -r requirements.txt (line 4))",
        "  Downloading torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl.metadata (29 kB)",
        "Downloading torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl (1.5 GB)",
        "Using cached numpy-2.4-cp312.whl (16.6 MB)", "Installing collected packages: torch",
    ):  # fmt: skip
        progress.take(line)
    assert [s.detail for s in steps] == [
        "collecting torch==2.11.0", "downloading torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl (1.5 GB)",
        "using cached numpy-2.4-cp312.whl (16.6 MB)", "unpacking",
    ]  # fmt: skip
    assert [round(s.fraction, 2) for s in steps] == [0.05, 0.05, 0.2, 0.36]


# On a thread of the server, and on the page ---------------------------------------------


def running_jobs(home: Path, **variables: str) -> tuple[EngineJobs, list[Environment]]:
    done: list[Environment] = []
    return EngineJobs(made(home, **variables), on_done=done.append), done


def ended(jobs: EngineJobs, within_s: float = 20) -> EngineJob:
    eventually(lambda: jobs.view() is not None and not jobs.view().running, within_s)
    job = jobs.view()
    assert job is not None
    return job


def test_what_a_person_cancelled_or_removed_is_not_taken_up_again_unasked(begun: Path) -> None:
    jobs, done = running_jobs(begun, FAKE_BUILD_S="60")
    environments = jobs.environments
    assert jobs.view() is None

    jobs.start("exllamav2", "install")
    eventually(lambda: "compiling" in jobs.view().words, 20)
    for action in ("install", "test", "remove"):
        with pytest.raises(InstallFailed, match="exllamav2 is busy: compiling"):
            jobs.start("exllamav3", action)
    jobs.close()  # the program ends: the next start goes on
    assert "cancelled" in ended(jobs).error and environments.is_wanted("exllamav2")

    jobs.start("exllamav2", "install")
    eventually(lambda: "compiling" in jobs.view().words, 20)
    jobs.cancel()
    assert "cancelled" in ended(jobs).error and not environments.is_wanted("exllamav2")
    assert environments.get("exllamav2").problem == "The installation was cancelled."

    jobs, done = running_jobs(begun)
    jobs.start("exllamav2", "install")
    assert ended(jobs).error == "" and done[0].state == "ready" and not environments.is_wanted("exllamav2")
    assert any("compiling" in line for line in jobs.view().lines) and "ok: import: fine" in jobs.view().lines
    jobs.start("exllamav2", "test")
    assert ended(jobs).error == ""
    jobs.start("exllamav2", "remove")
    assert ended(jobs).error == "" and [e.state for e in done] == ["ready", "ready", "absent"]
    assert not environments.is_wanted("exllamav2") and environments.is_wanted("exllamav3")


def test_a_job_ends_whatever_happens(home: Path) -> None:
    changes: list[int] = []

    def surprise():
        raise RuntimeError("nobody thought of this")

    environments = Environments(home, cards=surprise, variables={})
    jobs = EngineJobs(environments, on_change=lambda: changes.append(1))
    jobs.start("exllamav2", "install")
    assert ended(jobs).error == "RuntimeError: nobody thought of this" and changes
    (home / ".engines").write_text("no folder")
    jobs, _ = running_jobs(home)
    jobs.start("exllamav2", "install")
    assert "exists" in ended(jobs).error or "Not a directory" in ended(jobs).error
    with pytest.raises(InstallFailed, match="'paint' is none of these"):
        jobs.start("exllamav2", "paint")
    with pytest.raises(InstallFailed, match="no engine 'gpt'"):
        jobs.start("gpt", "install")


def buttons(html: str) -> list[str]:
    found = re.findall(r'<button [^>]*"(exllamav\d)" data-action="(\w+)"[^>]*?( disabled)?>', html)
    return ["".join([name, " ", action, off]) for name, action, off in found]


def test_the_page_shows_states_and_buttons_and_escapes(begun: Path) -> None:
    jobs, _ = running_jobs(begun, FAKE_BUILD_S="60")
    page = SystemPage(jobs, Hardware(begun))
    (begun / ".engines" / "exllamav2" / "problem.txt").write_text("<script>alert(1)</script>")
    html = page.html()
    assert "&lt;script&gt;" in html and "<script>" not in html
    assert "not complete" in html and "not installed" in html and "Install again" in html
    assert buttons(html) == ["exllamav2 install", "exllamav2 remove", "exllamav3 install"]
    page.act("exllamav2", "install")
    eventually(lambda: "compiling" in page.html(), 20)
    html = page.html()
    assert buttons(html) == ["exllamav2 cancel", "exllamav3 install disabled"] and 'role="progressbar"' in html
    page.act("exllamav2", "cancel")
    ended(jobs)
    assert "The installation was cancelled." in page.html()
    with pytest.raises(InstallFailed, match="no engine"):
        page.act("<b>", "install")


# The program ----------------------------------------------------------------------------


@pytest.fixture
def checkout(begun: Path) -> Path:
    """A copy of Turntable in which engines can be installed, with the tools and wheels of the tests."""
    place = begun.parent / "turntable"
    shutil.copytree(ROOT / "modules", place / "modules", ignore=shutil.ignore_patterns("__pycache__"))
    (place / "modules" / "engines" / "selftest.py").write_text(SELFTEST)
    shutil.copy(ROOT / "app.py", place)
    for name in NAMES:
        shutil.copy(begun / f"requirements-{name}.txt", place)
    for name in ("presets", "demo"):
        (place / name).symlink_to(ROOT / name)
    shutil.copytree(begun / ".engines", place / ".engines", symlinks=True)
    return place


def program(checkout: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    tools = checkout.parent
    # Without the variables of coverage.py: it would count this copy as code of its own.
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")},
        "PATH": os.pathsep.join([str(tools / "tools"), os.environ["PATH"]]), "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tools / "wheels"), "CUDA_HOME": str(tools / "toolkit"),
        "TURNTABLE_CUDA_ARCHS": "8.9", "TURNTABLE_ENGINE_DISK_BYTES": "1000", **variables,
    }  # fmt: skip
    command = [sys.executable, str(checkout / "app.py"), "--data-dir", str(checkout / "data"), *arguments]
    return subprocess.Popen(
        command, cwd=checkout, env=environment, stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def engines(checkout: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    child = program(checkout, "engines", *arguments, **variables)
    said, _ = child.communicate(timeout=60)
    return child.returncode, said


def test_engines_in_the_terminal(checkout: Path) -> None:
    code, said = engines(checkout)
    states = [line.split()[:2] for line in said.splitlines()]
    assert code == 0 and states == [["exllamav2", "broken"], ["exllamav3", "absent"]]
    child = program(checkout, "engines", "install", "exllamav2", FAKE_BUILD_S="60")
    assert child.stdout is not None
    while "compiling" not in child.stdout.readline():
        pass
    eventually(lambda: compilers(checkout), 10)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=10)
    assert child.returncode == 130 and "Cancelled." in said and "Traceback" not in said
    eventually(lambda: not compilers(checkout), 3)
    code, said = engines(checkout, "install", "exllamav2")
    assert code == 0 and "ok: import: fine" in said and said.endswith("exllamav2: ready\n")
    assert engines(checkout, "test", "exllamav2", FAKE_TEST="3")[0] == 3
    code, said = engines(checkout, "test", "exllamav2", FAKE_TEST="1")
    assert code == 1 and "NOT OK: numbers: wrong" in said and said.endswith("failed, numbers: wrong\n")
    code, said = engines(checkout, "remove", "exllamav2", "--yes")
    assert code == 0 and "GB freed" in said
    assert engines(checkout, "remove", "exllamav2") == (0, "exllamav2 is not installed.\n")
    for arguments, code, words in (
        (("install", "exllamav2"), 1, "CUDA 12"), (("test", "exllamav2"), 1, "not installed"),
        (("install",), 2, "name the engine"), (("remove", "gpt"), 1, "no engine 'gpt'"),
    ):  # fmt: skip
        found = engines(checkout, *arguments, FAKE_CUDA="12.4", PIP_FIND_LINKS="/nonexistent")
        lines = [line for line in found[1].splitlines() if "looking at" not in line]
        assert found[0] == code and len(lines) == 1 and words in lines[0], found


def test_the_first_start_installs_in_the_background_and_a_removed_engine_stays_away(checkout: Path) -> None:
    environments = made(checkout)
    wanted = checkout / ".engines" / "exllamav2"

    def stopped(server: subprocess.Popen) -> str:
        server.send_signal(signal.SIGTERM)
        said, _ = server.communicate(timeout=20)
        assert server.returncode == 0 and "Traceback" not in said, said
        return said

    def started(**variables: str) -> tuple[subprocess.Popen, int]:
        port = free_port()
        return program(checkout, "--port", str(port), **variables), port

    servers = []
    try:
        # The page does not wait for the engine, and the end of the program ends the compilers.
        server, port = started(FAKE_BUILD_S="60")
        servers.append(server)
        eventually(lambda: compilers(checkout), 20)
        eventually(lambda: is_ready(port), 20)
        assert "is being installed in the background" in stopped(server) and not compilers(checkout)
        assert environments.get("exllamav2").state == "broken"
        # The next start goes on with it.
        server, port = started()
        servers.append(server)
        eventually(lambda: environments.get("exllamav2").state == "ready", 20)
        said = stopped(server)
        assert "engine exllamav2: compiling exllamav2 for 8.9" in said and "engine exllamav2: ready" in said
        assert environments.remove("exllamav2") > 0
        server, port = started()
        servers.append(server)
        eventually(lambda: is_ready(port), 20)
        assert "installed" not in stopped(server) and not wanted.exists()
    finally:
        for server in servers:
            server.kill()
            server.wait()


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2) as reply:
            return bool(json.load(reply)["ready"])
    except OSError:
        return False


def test_an_unknown_engine_is_an_error(home: Path) -> None:
    for change in (made(home).get, made(home).remove, lambda name: made(home).install(name, quiet)):
        with pytest.raises(InstallFailed, match="no engine 'gpt'"):
            change("gpt")


def test_the_real_requirements_name_what_the_children_import() -> None:
    for name in ("exllamav2", "exllamav3"):
        text = (ROOT / f"requirements-{name}.txt").read_text()
        assert f"{name}==" in text
        assert "torch==2.11.0" in text
        assert "jinja2" in text


def test_jobs_run_one_at_a_time_and_tell_how_far_they_are(begun: Path) -> None:
    seen: list[object] = []
    done: list[str] = []
    jobs = EngineJobs(
        made(begun, FAKE_BUILD_S="0.5"),
        on_change=lambda: seen.append(jobs.view()),
        on_done=lambda e: done.append(e.state),
    )
    page = SystemPage(jobs, Hardware(begun))
    assert jobs.view() is None
    assert 'data-action="install"' in page.html()
    assert 'data-action="test"' not in page.html()
    page.act("exllamav2", "install")
    with pytest.raises(InstallFailed, match="is busy"):
        jobs.start("exllamav3", "install")
    assert 'data-action="cancel"' in page.html()
    assert "disabled" in page.html()
    eventually(lambda: not jobs.view().running, 60)
    assert jobs.view().error == ""
    assert done == ["ready"]
    assert len(seen) > 3
    text = page.html()
    assert "exllamav2 0.3.2 · torch 2.11.0" in text
    assert 'data-action="test"' in text
    page.act("exllamav2", "remove")
    eventually(lambda: not jobs.view().running, 30)
    assert done == ["ready", "absent"]
    for name, action in (("gpt", "install"), ("exllamav2", "paint")):
        with pytest.raises(InstallFailed):
            page.act(name, action)
    jobs.close()


def test_a_job_that_fails_shows_its_reason_and_a_cancelled_one_ends(begun: Path) -> None:
    jobs = EngineJobs(made(begun, FAKE_BUILD_FAILS="<b>1"))
    page = SystemPage(jobs, Hardware(begun))
    page.act("exllamav2", "install")
    eventually(lambda: not jobs.view().running, 60)
    assert "cublas_v2.h" in jobs.view().error
    assert 'role="alert"' in page.html()
    assert "Install again" in page.html()
    jobs = EngineJobs(made(begun, FAKE_BUILD_S="60"))
    jobs.start("exllamav2", "install")
    eventually(lambda: "compiling" in jobs.view().words, 60)
    SystemPage(jobs, Hardware(begun)).act("", "cancel")
    eventually(lambda: not jobs.view().running, 20)
    assert "cancelled" in jobs.view().error


def test_foreign_text_on_the_page_is_escaped(begun: Path) -> None:
    folder = begun / ".engines" / "exllamav2"
    (folder / "install.log").write_text("<script>alert(1)</script>")
    text = SystemPage(EngineJobs(made(begun)), Hardware(begun)).html()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_a_card_that_it_was_not_compiled_for_asks_for_a_new_installation(begun: Path) -> None:
    environments = made(begun)
    assert environments.install("exllamav2", quiet).state == "ready"
    assert json.loads((begun / ".engines" / "exllamav2" / STAMP).read_text())["architectures"] == "8.9"
    newer = (580, [CardFound("RTX 5090", (12, 0)), CardFound("GTX 1060", (6, 1))])
    found = made(begun, newer).get("exllamav2")
    assert (found.state, found.usable) == ("broken", False)
    assert found.problem == "It was compiled for compute capability 8.9, and RTX 5090 has 12.0; install it again."
    assert made(begun, newer).is_wanted("exllamav2")  # the next start does it
    # A card that no engine of this kind runs on says nothing, nor does a driver that does not answer.
    assert made(begun, (580, [CardFound("GTX 1060", (6, 1))])).get("exllamav2").state == "ready"
    assert Environments(begun, variables={}).get("exllamav2").state == "ready"
    assert made(begun, newer, TURNTABLE_CUDA_ARCHS="8.9").get("exllamav2").state == "ready"
    assert made(begun, newer).install("exllamav2", quiet).state == "ready"
    assert "12.0" in (begun / ".engines" / "exllamav2" / "ext" / "exllamav2_ext" / "told.json").read_text()


@pytest.mark.parametrize(
    ("built", "capability", "covered"),
    [
        ("8.6", (8, 6), True), ("8.6", (8, 9), True), ("8.9", (8, 6), False), ("8.6", (9, 0), False),
        ("8.0;9.0", (8, 6), True), ("8.6+PTX", (12, 0), True), ("8.6+PTX", (8, 0), False), ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False), ("10.0f", (10, 3), True), ("7.5 8.6", (7, 5), True), ("Ampere", (12, 0), True),
    ],
)  # fmt: skip
def test_machine_code_runs_within_a_major_number_and_ptx_on_all_later_cards(built, capability, covered: bool) -> None:
    assert covers(built, capability) is covered


CHANGED = """
import json, sys
from pathlib import Path
from modules.environments import Environments, cards_of
from modules.hardware import Hardware
look = cards_of(Hardware(Path("/"), limit_s=1.0))
found = Environments(Path(sys.argv[1]), cards=look, variables={}).get("exllamav2")
print(json.dumps([found.state, found.problem]))
"""


def test_a_changed_card_is_seen_through_the_drivers_own_library(begun: Path, tmp_path: Path) -> None:
    made(begun).install("exllamav2", quiet)
    plan = nvml.two_cards(tmp_path / "plan")
    library = nvml.build(tmp_path / "driver")
    for cards, faults, state, words in (
        ([nvml.RTX_4090], [], "ready", ""),
        ([nvml.RTX_4090, nvml.RTX_3060], [], "broken", "RTX 3060 has 8.6; install it again"),
        ([nvml.RTX_4090, nvml.RTX_3060], [(1, "*", nvml.GPU_IS_LOST)], "ready", ""),
        ([nvml.RTX_3060], [("*", "nvmlInitWithFlags", "hang")], "ready", ""),
    ):
        plan.cards, plan.processes, plan.faults = cards, [], faults
        plan.write()
        done = subprocess.run(
            [sys.executable, "-c", CHANGED, str(begun)], capture_output=True, text=True, cwd=ROOT, timeout=60,
            check=True, env={**os.environ, **nvml.environment(library, plan.file)},
        )  # fmt: skip
        said = json.loads(done.stdout)
        assert said[0] == state and words in said[1], said


@pytest.mark.parametrize(
    ("release", "given", "told"),
    [("13.0", "", None), ("13.3", "", "-std=c++20"), ("13.4", "-O1", "-O1 -std=c++20"), ("13.3", "-std=c++23", None)],
)
def test_a_toolkit_that_misreads_pytorch_as_cpp17_compiles_as_cpp20(begun: Path, release, given, told) -> None:
    environments = made(begun, FAKE_CUDA=release, NVCC_APPEND_FLAGS=given)
    variables = environments._build_variables(Path(sys.executable), begun / "ext", "8.9")
    assert variables.get("NVCC_APPEND_FLAGS") == told
