"""environments.py with real virtual environments and pip, a folder of tiny wheels in place of the registry, no card."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from modules.environments import STAMP, CardFound, EngineJobs, Environments, Step, to_dict
from modules.errors import InstallFailed
from modules.ui.system import SystemPage

from .conftest import ROOT, eventually

# Stands for the library: compiles for as long as it is told, and writes down what the compiler was told.
LIBRARY = """
import json, os, pathlib, sys, time
place = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "exllamav2_ext"
if os.environ.get("TORCH_CUDA_ARCH_LIST"):
    assert " " not in __file__ + str(place) + os.environ["CPATH"], "the linker gets these unquoted"
if not any(pathlib.Path(p, "exllamav2_ext.so").exists() for p in sys.path):
    assert not (place / "lock").exists(), "waiting for ever"
    place.mkdir(parents=True, exist_ok=True)
    (place / "lock").touch()
    time.sleep(float(os.environ.get("FAKE_BUILD_S", "0")))
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
if code:
    print(json.dumps({"check": "numbers", "ok": False, "detail": "wrong"}))
sys.exit(code)
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
    (toolkit / "nvcc").write_text("")
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
    return Environments(home, cards=lambda: cards, variables={k: v for k, v in given.items() if v}, limit_s=limit_s)


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


def test_a_missing_compiler_is_named(home: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    toolkit = str(tmp_path / "toolkit")
    with pytest.raises(InstallFailed, match=r"g\+\+ is missing"):
        made(home, PATH=str(empty), CUDA_HOME=toolkit).install("exllamav2", quiet)
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        with pytest.raises(InstallFailed, match="nvcc is missing"):
            made(home, PATH=str(empty), CUDA_HOME="").install("exllamav2", quiet)


def test_there_is_no_driver_here_or_it_is_read(home: Path) -> None:
    from modules.environments import cards_by_nvml

    try:
        driver, _ = cards_by_nvml()
        assert driver > 100
    except InstallFailed as error:
        assert "driver" in str(error)


def test_a_build_that_fails_says_why_and_the_next_install_mends_it(home: Path) -> None:
    with pytest.raises(InstallFailed, match=r"cublas_v2\.h: No such file") as caught:
        made(home, FAKE_BUILD_FAILS="1").install("exllamav2", quiet)
    assert "install.log" in caught.value.hint
    broken = made(home).get("exllamav2")
    assert broken.state == "broken"
    assert "not finished" in broken.problem
    with pytest.raises(InstallFailed, match="not installed"):
        made(home).test("exllamav2", quiet)
    assert made(home).install("exllamav2", quiet).state == "ready"


def test_a_time_limit_and_a_cancel_end_the_compilers_at_once(home: Path) -> None:
    environments = made(home, FAKE_BUILD_S="60")
    cancel = threading.Event()

    def report(step: Step) -> None:
        if "compiling" in step.words:
            cancel.set()

    began = time.monotonic()
    with pytest.raises(InstallFailed, match="cancelled"):
        environments.install("exllamav2", report, cancel)
    with pytest.raises(InstallFailed, match="time limit"):
        made(home, FAKE_BUILD_S="60", limit_s=4.0).install("exllamav2", quiet)
    assert time.monotonic() - began < 40
    assert environments.get("exllamav2").state == "broken"


def test_a_killed_installer_leaves_something_broken_and_two_do_not_meet(home: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from tests.test_environments import made, quiet\n"
        "made(Path(sys.argv[1]), FAKE_BUILD_S='60').install('exllamav2', quiet)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(home), str(ROOT)], cwd=ROOT)
    log = home / ".engines" / "exllamav2" / "install.log"
    eventually(lambda: log.exists() and "import exllamav2" in log.read_text(), 30)
    environments = made(home)
    assert environments.get("exllamav2").state == "installing"
    for change in (lambda: environments.install("exllamav2", quiet), lambda: environments.remove("exllamav2")):
        with pytest.raises(InstallFailed, match="by another program"):
            change()
    child.send_signal(signal.SIGKILL)
    child.wait()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):  # what the installer had started goes on without it
        with_path = entry.read_bytes() if entry.exists() else b""
        if str(home).encode() in with_path and b"import exllamav2" in with_path:
            os.kill(int(entry.parent.name), signal.SIGKILL)
    eventually(lambda: environments.get("exllamav2").state == "broken", 10)
    assert environments.install("exllamav2", quiet).state == "ready"


def test_a_prebuilt_extension_needs_no_compiler(home: Path, tmp_path: Path) -> None:
    place = tmp_path / "carried"
    place.mkdir()
    (place / "exllamav2_ext.so").touch()
    environments = made(home, CUDA_HOME="", TURNTABLE_PREBUILT=str(place), FAKE_BUILD_FAILS="1")
    assert environments.install("exllamav2", quiet).state == "ready"
    assert (home / ".engines" / "exllamav2" / "ext" / "exllamav2_ext" / "exllamav2_ext.so").exists()


def test_without_a_card_it_is_built_for_what_is_named(home: Path) -> None:
    found = made(home, (0, []), TURNTABLE_CUDA_ARCHS="8.6;9.0", FAKE_TEST="3").install("exllamav2", quiet)
    assert found.state == "untested"
    assert "8.6;9.0" in (found.folder / "ext" / "exllamav2_ext" / "told.json").read_text()


def test_a_damaged_stamp_is_a_broken_environment(home: Path) -> None:
    environments = made(home)
    environments.install("exllamav2", quiet)
    for text in ("", "[]", "{"):
        (home / ".engines" / "exllamav2" / STAMP).write_text(text)
        assert environments.get("exllamav2").state == "broken"


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


def test_jobs_run_one_at_a_time_and_tell_how_far_they_are(home: Path) -> None:
    seen: list[object] = []
    done: list[str] = []
    jobs = EngineJobs(
        made(home, FAKE_BUILD_S="1"), on_change=lambda: seen.append(jobs.view()), on_done=lambda e: done.append(e.state)
    )
    page = SystemPage(jobs)
    assert jobs.view() is None
    assert 'data-action="install"' in page.html()
    assert 'data-action="remove"' not in page.html()
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


def test_a_job_that_fails_shows_its_reason_and_a_cancelled_one_ends(home: Path) -> None:
    jobs = EngineJobs(made(home, FAKE_BUILD_FAILS="<b>1"))
    page = SystemPage(jobs)
    page.act("exllamav2", "install")
    eventually(lambda: not jobs.view().running, 60)
    assert "cublas_v2.h" in jobs.view().error
    assert 'role="alert"' in page.html()
    assert "Install again" in page.html()
    jobs = EngineJobs(made(home, FAKE_BUILD_S="60"))
    jobs.start("exllamav2", "install")
    eventually(lambda: "compiling" in (jobs.view().words or ""), 60)
    SystemPage(jobs).act("", "cancel")
    eventually(lambda: not jobs.view().running, 20)
    assert "cancelled" in jobs.view().error


def test_foreign_text_on_the_page_is_escaped(home: Path) -> None:
    folder = home / ".engines" / "exllamav2"
    folder.mkdir(parents=True)
    (folder / "install.log").write_text("<script>alert(1)</script>")
    text = SystemPage(EngineJobs(made(home))).html()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
