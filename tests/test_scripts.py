"""start.sh, test.sh and .ci/run, run for real in a copied tree with nothing to install, in a path with spaces.

What a machine may lack enters by the front door: TURNTABLE_PYTHON, or programs on PATH
that stand in for the tools. Needs no network.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for bash")

APP = """
import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "folder": os.getcwd(), "prefix": sys.prefix}))
sys.exit(7 if "fail" in sys.argv else 0)
"""
# A tool that writes down what it was called with, and fails when told to.
TOOL = """
import json, os, sys
print("TOOL", json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:], os.environ.get("TURNTABLE_CHROMIUM", "")]))
sys.exit(os.path.basename(sys.argv[0]) in os.environ.get("FAILING", "").split())
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


class Tree:
    """A copy of the scripts beside an app.py that says how it was called."""

    def __init__(self, root: Path, home: Path) -> None:
        self.root = root
        self.bin = home / "bin"
        root.mkdir(parents=True)
        for name in ("start.sh", "test.sh"):
            shutil.copy2(ROOT / name, root / name)
        (root / "app.py").write_text(APP, encoding="utf-8")
        (root / "requirements.txt").write_text("# nothing\n", encoding="utf-8")
        (root / "requirements-dev.txt").write_text("# nothing\n", encoding="utf-8")
        (root / "requirements-test-exllama.txt").write_text("# nothing\n", encoding="utf-8")
        # A Python that the tests choose, so that every machine takes the same way.
        self.environment = {
            "HOME": str(home),
            "TMPDIR": str(home),
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "PIP_NO_INDEX": "1",
            "TURNTABLE_PYTHON": sys.executable,
        }
        self.bin.mkdir(parents=True, exist_ok=True)
        program(self.bin / "uv", "#!/bin/sh\nexit 1\n")

    def run(
        self, script: str, *arguments: str, cwd: Path | None = None, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.root / script), *arguments],
            capture_output=True,
            text=True,
            cwd=cwd or self.root.parent,
            env={**self.environment, **extra},
            timeout=60,
            check=False,
        )


@pytest.fixture
def bare(tmp_path: Path) -> Tree:
    """A fresh clone."""
    return Tree(tmp_path / "a path with spaces" / "turn'table", tmp_path / "home")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A clone that was started once, by two people at the same time."""
    folder = tmp_path_factory.mktemp("started")
    tree = Tree(folder / "a path with spaces" / "turn'table", folder / "home")
    both = [
        subprocess.Popen(
            [str(tree.root / "start.sh")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=tree.environment,
            cwd=tree.root,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    if shutil.which("flock"):
        assert sum("Installing" in stderr for _, stderr in said) == 1, said
    return tree


@pytest.mark.parametrize("script", ["start.sh", "test.sh", ".ci/run"])
def test_a_script_is_valid_bash_and_may_be_run(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(ROOT / script, os.X_OK)
    assert b"\r" not in (ROOT / script).read_bytes()


def test_arguments_are_handed_on_exactly(started: Tree, tmp_path: Path) -> None:
    arguments = ["ask", "reasoning", 'two  spaces, "quotes", it\'s $HOME `x` \\ *', "", "--image", "./über.png", "a\nb"]
    done = started.run("start.sh", *arguments, cwd=tmp_path)
    assert done.returncode == 0
    # stdout is the program's alone, and relative paths mean what they meant to the caller.
    assert json.loads(done.stdout) == {
        "arguments": arguments,
        "folder": str(tmp_path),
        "prefix": str(started.root / ".venv"),
    }


def test_a_second_start_installs_nothing_and_says_nothing(started: Tree) -> None:
    done = started.run("start.sh")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_programs_exit_status_is_the_scripts(started: Tree) -> None:
    assert started.run("start.sh", "fail").returncode == 7


def test_a_link_to_the_script_and_another_shell_start_it_too(started: Tree, tmp_path: Path) -> None:
    (tmp_path / "turntable").symlink_to(started.root / "start.sh")
    for command in (["./turntable", "x"], ["sh", "./turntable", "x"]):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=started.environment, timeout=60, check=False
        )
        assert json.loads(done.stdout)["arguments"] == ["x"], done.stderr


def test_changed_requirements_are_installed_once(started: Tree) -> None:
    (started.root / "requirements.txt").write_text("# nothing, in other words\n", encoding="utf-8")
    assert "Installing requirements.txt" in started.run("start.sh").stderr
    assert started.run("start.sh").stderr == ""


def test_what_cannot_be_installed_is_said_and_tried_again(started: Tree) -> None:
    good = (started.root / "requirements.txt").read_text(encoding="utf-8")
    (started.root / "requirements.txt").write_text("no-such-distribution-anywhere\n", encoding="utf-8")
    try:
        for _ in range(2):
            done = started.run("start.sh")
            assert (done.returncode, done.stdout) == (1, "")
            assert "no-such-distribution-anywhere" in done.stderr
            assert "Could not install requirements.txt" in done.stderr.splitlines()[-1]
    finally:
        (started.root / "requirements.txt").write_text(good, encoding="utf-8")
    assert started.run("start.sh").returncode == 0


def test_a_moved_folder_gets_a_new_environment(bare: Tree) -> None:
    assert bare.run("start.sh").returncode == 0
    moved = bare.root.rename(bare.root.with_name("moved"))
    bare.root = moved
    done = bare.run("start.sh")
    assert "Installing" in done.stderr
    assert json.loads(done.stdout)["prefix"] == str(moved / ".venv")
    assert str(moved) in (moved / ".venv" / "bin" / "pip").read_text(encoding="utf-8")


def test_an_environment_whose_python_is_gone_is_made_anew(bare: Tree) -> None:
    (bare.root / ".venv" / "bin").mkdir(parents=True)
    (bare.root / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
    done = bare.run("start.sh")
    assert "Installing" in done.stderr
    assert done.returncode == 0, done.stderr


def pretend(tree: Tree, lines: str) -> dict[str, str]:
    """A Python that differs from the real one in what the lines say."""
    text = f"import sys\n{lines}\nassert sys.argv[1] == '-c'\nexec(sys.argv[2])\n"
    script = program(tree.bin / "pretended.py", text)
    # Through a shell, because a first line may hold no path with spaces.
    shell = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n'
    return {"TURNTABLE_PYTHON": str(program(tree.bin / "pretended-python", shell))}


# The environment that runs these tests is one itself, and so would need no ensurepip.
PLAIN = "sys.prefix = sys.base_prefix"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("sys.version_info = (3, 8, 18, 'final', 0)", ("Python 3.10 or newer is needed", "is 3.8", "apt-get install")),
        (f"{PLAIN}; sys.modules['ensurepip'] = None", ("Missing the venv package", "-venv (Debian", "uv")),
        (
            "import ctypes; ctypes.CDLL = open",
            ("Missing libgomp.so.1", "apt-get install libgomp1", "dnf install libgomp"),
        ),
        ("sys.exit(1)", ("TURNTABLE_PYTHON=", "does not run")),
    ],
    ids=["too old", "no ensurepip", "no libgomp", "does not run"],
)
def test_what_is_missing_is_said_in_one_line(bare: Tree, lines: str, says: tuple[str, ...]) -> None:
    if "ctypes" in lines and sys.platform != "linux":
        pytest.skip("llama.cpp needs libgomp from the system on Linux only")
    (bare.bin / "uv").unlink()  # with uv, a Python without ensurepip serves
    done = bare.run("start.sh", **pretend(bare, lines))
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for words in says:
        assert words in done.stderr
    assert not (bare.root / ".venv").exists()


def test_no_python_at_all_is_said_in_one_line(bare: Tree) -> None:
    # Only what the script itself calls.
    for tool in ("bash", "readlink", "dirname", "cat", "cksum", "grep", "flock"):
        if found := shutil.which(tool):
            (bare.bin / tool).symlink_to(found)
    (bare.bin / "uv").unlink()
    del bare.environment["TURNTABLE_PYTHON"]
    bash = str(bare.bin / "bash")
    done = subprocess.run(
        [bash, str(bare.root / "start.sh")],
        capture_output=True,
        text=True,
        env={**bare.environment, "PATH": str(bare.bin)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Missing Python 3.10 or newer: sudo apt-get install python3 python3-venv")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A tree whose tools write down how they are called; test.sh has made its environment."""
    folder = tmp_path_factory.mktemp("checked")
    tree = Tree(folder / "a path with spaces" / "turn'table", folder / "home")
    for name in ("ruff", "mypy", "pytest"):
        # `python -m NAME` finds it in the project's folder.
        (tree.root / f"{name}.py").write_text(TOOL, encoding="utf-8")
    program(tree.root / "docs" / "readme.py", TOOL)
    program(tree.bin / "chromium", "#!/bin/sh\necho Chromium 999\n")
    assert tree.run("test.sh", "--first").returncode == 0
    return tree


def calls(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    return [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("TOOL ")]


def test_everything_is_checked(checked: Tree, tmp_path: Path) -> None:
    done = checked.run("test.sh", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [call[0] for call in calls(done)] == ["ruff.py", "mypy.py", "pytest.py", "readme.py"]
    assert {call[-1] for call in calls(done)} == {str(checked.bin / "chromium")}
    assert done.stdout.endswith("All is well.\n")


@pytest.mark.parametrize("failing", ["ruff.py", "mypy.py", "pytest.py", "readme.py", "ruff.py readme.py"])
def test_whatever_fails_the_rest_is_checked_and_the_whole_fails(checked: Tree, failing: str) -> None:
    done = checked.run("test.sh", FAILING=failing)
    assert done.returncode == 1
    called = [call[0] for call in calls(done)]  # the tests that failed are run once more, alone
    again = ["pytest.py"] if failing == "pytest.py" else []
    assert called == ["ruff.py", "mypy.py", "pytest.py", *again, "readme.py"]
    said = failing.replace(".py", "").replace("readme", "docs")
    assert done.stdout.endswith(f"\nFailed: {said}\n")


def test_with_arguments_only_pytest_runs(checked: Tree) -> None:
    done = checked.run("test.sh", "-k", "loader and not swap")
    assert [call[:-1] for call in calls(done)] == [["pytest.py", "-k", "loader and not swap"]]
    assert checked.run("test.sh", "-x", FAILING="pytest.py").returncode == 1


def test_the_adapters_have_an_environment_of_their_own_unless_it_is_left_out(checked: Tree) -> None:
    python = checked.root / ".venv-exllama" / "bin" / "python"
    assert python.exists()
    shutil.rmtree(checked.root / ".venv-exllama")
    done = checked.run("test.sh", "-x", TURNTABLE_TEST_EXLLAMA="0")
    assert "will be skipped" in done.stderr
    assert not python.exists()
    assert "Installing requirements-test-exllama.txt into .venv-exllama" in checked.run("test.sh", "-x").stderr
    assert python.exists()


def test_a_named_chromium_goes_first(checked: Tree) -> None:
    named = program(checked.bin / "my chromium", "#!/bin/sh\necho Chromium 1\n")
    done = checked.run("test.sh", TURNTABLE_CHROMIUM=str(named))
    assert {call[-1] for call in calls(done)} == {str(named)}


def test_start_needs_no_install_after_test(checked: Tree) -> None:
    assert checked.run("start.sh").stderr == ""
    assert checked.run("test.sh", "-x").stderr == ""


def test_without_a_chromium_it_says_how_to_get_one(checked: Tree) -> None:
    # Browsers that are placeholders, and machines that install none.
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        program(checked.bin / name, "#!/bin/sh\necho install the snap >&2; exit 1\n")
    for name in ("apt-get", "sudo"):
        program(checked.bin / name, f"#!/bin/sh\necho no {name} here >&2; exit 1\n")
    try:
        done = checked.run("test.sh")
    finally:
        program(checked.bin / "chromium", "#!/bin/sh\necho Chromium 999\n")
    assert done.returncode == 1
    assert calls(done) == []
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Missing Chromium, which the browser tests need: sudo apt-get install chromium")
    assert "TURNTABLE_CHROMIUM=" in last
