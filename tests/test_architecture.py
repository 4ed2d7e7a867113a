"""The laws of the layout, as data, checked over the syntax tree: who may import whom, and what no file may do.

Knows the files' names and nothing of what they do. A new module takes its place in
ORDER; a new library takes its place in requirements.txt, and in ONLY_HERE when one
folder alone may know it.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules import errors

ROOT = Path(__file__).resolve().parent.parent
FILES = [*sorted((ROOT / "modules").rglob("*.py")), *sorted(ROOT.glob("app.py"))]
MAX_FUNCTION_LINES, MAX_ARGUMENTS = 70, 7

# A file imports only what stands before it. ui is a folder, whose files may import each other.
ORDER = (
    "messages", "errors", "settings", "presets", "library", "hub", "downloads", "hardware", "planner", "lookup",
    "advice", "shelf", "doctor",
    "images", "process", "environments", "here", "loader", "chats", "prompt", "render", "assets",
    "assistant", "measured", "bench", "building", "terminal", "gate", "live", "ui", "commands", "server", "app",
)  # fmt: skip
# The engines live in another process, and know only the words they share with it.
ENGINES_KNOW = ("messages", "errors", "engines")
STANDARD_LIBRARY_ONLY = ("messages", "errors")
# Of these, only the files whose names start so may know.
ONLY_HERE = {
    "gradio": "modules/ui/",
    "xllamacpp": "modules/engines/",
    "exllamav2": "modules/engines/",
    "exllamav3": "modules/engines/",
    "torch": "modules/engines/",
    "numpy": "modules/engines/",
}
# What is imported under another name than it is installed under.
INSTALLED_AS = {
    "PIL": "pillow",
    "pynvml": "nvidia-ml-py",
    "markdown_it": "markdown-it-py",
    "multipart": "python-multipart",
}
# Installed with the ExLlama engines, into environments of their own.
OTHER_ENVIRONMENTS = ("exllamav2", "exllamav3", "torch", "numpy", "llguidance")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def place(path: Path) -> str:
    """The word that stands for a file in ORDER: modules/ui/chat.py is ui, app.py is app."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "modules" else parts[0]


def imports(path: Path) -> Iterator[str]:
    """Every imported name, dotted and absolute, from anywhere in the file."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            # `from modules import errors` names the module last.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    """The places in ORDER, and engines, that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("modules.")}


def foreign(path: Path) -> set[str]:
    """The top-level names of other people's libraries that a file imports."""
    return {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"modules"}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


each_file = pytest.mark.parametrize("path", FILES, ids=name)


@each_file
def test_a_file_imports_only_what_stands_before_it(path: Path) -> None:
    here = place(path)
    if here == "__init__":
        allowed: set[str] = set()
    elif here == "engines":
        allowed = set(ENGINES_KNOW)
    else:
        assert here in ORDER, f"{name(path)} has no place in ORDER yet"
        allowed = set(ORDER[: ORDER.index(here)]) | ({"ui"} if here == "ui" else set())
    assert ours(path) <= allowed, f"{name(path)} may not import {sorted(ours(path) - allowed)}"


@each_file
def test_heavy_libraries_are_known_in_one_folder(path: Path) -> None:
    strays = [lib for lib in foreign(path) if not name(path).startswith(ONLY_HERE.get(lib, ""))]
    assert strays == [], f"{name(path)} imports {strays}"


@each_file
def test_libraries_stand_in_the_requirements(path: Path) -> None:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    required = {found.lower().replace("_", "-") for found in re.findall(r"^([A-Za-z][\w.-]*)", text, re.MULTILINE)}
    needed = {INSTALLED_AS.get(lib, lib).lower().replace("_", "-") for lib in foreign(path) - set(OTHER_ENVIRONMENTS)}
    assert needed <= required, f"{name(path)} needs {sorted(needed - required)}"


@pytest.mark.parametrize("module", STANDARD_LIBRARY_ONLY)
def test_the_first_modules_need_nothing(module: str) -> None:
    path = ROOT / "modules" / f"{module}.py"
    assert foreign(path) | ours(path) == set()


@each_file
def test_a_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{name(path)} has no docstring"


@each_file
def test_there_is_no_global_statement(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)] == []


@each_file
def test_functions_are_short_and_take_few_arguments(path: Path) -> None:
    for function in functions(path):
        where = f"{name(path)}:{function.lineno} {function.name}"
        assert function.end_lineno is not None
        assert function.end_lineno - function.lineno < MAX_FUNCTION_LINES, where
        every = [*function.args.posonlyargs, *function.args.args]  # those given by name explain themselves
        assert len([a for a in every if a.arg not in ("self", "cls")]) <= MAX_ARGUMENTS, where


def test_the_errors_tree_names_each_class_with_its_status() -> None:
    tree = errors.__doc__ or ""
    for error in errors.all_errors()[1:]:
        # A branch stands at the left, and its status is seldom seen.
        is_branch = len(errors.all_errors(error)) > 1
        pattern = rf"\b{error.__name__}\b" if is_branch else rf"\b{error.__name__} +{error.status}\b"
        assert re.search(pattern, tree), f"the tree at the top of errors.py lacks {error.__name__} {error.status}"
    named = set(re.findall(r"\b[A-Z][a-z]+[A-Z]\w+\b", tree.split("\n\n")[1]))
    assert named <= {error.__name__ for error in errors.all_errors()}


def test_every_error_has_a_code_of_its_own_a_meaning_and_a_hint() -> None:
    known = errors.all_errors()
    codes = [vars(error).get("code") for error in known]
    assert all(codes), "an error without a code of its own cannot come back over the pipe"
    assert len(set(codes)) == len(codes)
    for error in known:
        assert error.__doc__, error.__name__
        assert error.hint.endswith("."), error.__name__
        assert 400 <= error.status <= 599, error.__name__


# Imports each module, and writes down what the interpreter was asked to do meanwhile: written files, child processes,
# sockets, threads, and libraries that only the child or the page may load.
WATCH = """
import importlib, json, os, sys, threading
done = []
def watch(event, args):
    if event == "open" and (isinstance(args[1], str) and set(args[1]) & set("wax+")):
        done.append(f"{current} writes {args[0]}")
    elif event in ("os.mkdir", "os.remove", "os.rename", "subprocess.Popen", "os.exec", "os.fork", "os.putenv",
                   "socket.bind", "socket.connect", "sqlite3.connect"):
        done.append(f"{current} does {event} {args!r:.80}")
sys.addaudithook(watch)
for current in json.loads(sys.argv[1]):
    threads = threading.active_count()
    importlib.import_module(current)
    if threading.active_count() != threads:
        done.append(f"{current} starts a thread")
    done += [f"{current} loads {heavy}" for heavy in json.loads(sys.argv[2]) if heavy in sys.modules]
print(json.dumps(done))
"""


def test_importing_a_module_does_nothing(tmp_path: Path) -> None:
    # What knows a heavy library loads it and sets it up, each in the process that is there for it.
    paths = [
        path for path in (ROOT / "modules").rglob("*.py") if place(path) != "ui" and not foreign(path) & set(ONLY_HERE)
    ]
    dotted = [name(path)[:-3].replace("/", ".").removesuffix(".__init__") for path in sorted(paths)]
    environment = {
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", WATCH, json.dumps(dotted), json.dumps(list(ONLY_HERE))]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    assert list(tmp_path.iterdir()) == []
