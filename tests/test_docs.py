"""docs/readme.py: what it writes into the README, and what it refuses. Runs the real script on the real code."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modules import errors

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docs" / "readme.py"
NAMES = ("presets", "settings", "errors", "files")


@pytest.fixture(scope="module")
def readme() -> dict[str, Any]:
    """The script's functions."""
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A README whose parts the script has just written."""
    path = tmp_path_factory.mktemp("docs") / "README.md"
    path.write_text(skeleton(), encoding="utf-8")
    done = run("--write", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return path.read_text(encoding="utf-8")


def skeleton(*, old: str = "", names: tuple[str, ...] = NAMES) -> str:
    return (
        "# Title\n\n" + "\n".join(f"<!-- begin: {name} -->\n{old}<!-- end: {name} -->\n" for name in names) + "Tail.\n"
    )


def part(text: str, name: str) -> str:
    return text.split(f"<!-- begin: {name} -->\n")[1].split(f"<!-- end: {name} -->")[0]


def run(what: str, path: Path) -> subprocess.CompletedProcess[str]:
    # From another folder: the script finds its project by itself.
    command = [sys.executable, str(SCRIPT), what, "--readme", str(path)]
    return subprocess.run(command, capture_output=True, text=True, cwd=path.parent, timeout=60, check=False)


def test_the_readme_is_up_to_date() -> None:
    done = run("--check", ROOT / "README.md")
    assert done.returncode == 0, done.stdout + done.stderr


def test_writing_fills_the_parts_and_leaves_the_rest(written: str) -> None:
    assert written.startswith("# Title\n\n<!-- begin: presets -->\n| Preset |")
    assert written.endswith("<!-- end: files -->\nTail.\n")


def test_checking_what_was_written_finds_nothing_and_changes_nothing(written: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(written, encoding="utf-8")
    done = run("--check", path)
    assert (done.returncode, done.stdout) == (0, "")
    assert path.read_text(encoding="utf-8") == written


def test_a_stale_part_is_shown_and_not_touched(written: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    stale = written.replace("`busy`", "`occupied`")
    assert stale != written
    path.write_text(stale, encoding="utf-8")
    done = run("--check", path)
    assert done.returncode == 1
    assert re.search(r"^-.*`occupied`", done.stdout, re.MULTILINE)
    assert re.search(r"^\+.*`busy`", done.stdout, re.MULTILINE)
    assert done.stdout.rstrip().endswith("README.md is out of date: python docs/readme.py --write")
    assert path.read_text(encoding="utf-8") == stale


def test_every_error_has_its_row(written: str) -> None:
    rows = part(written, "errors").splitlines()
    assert len(rows) == 2 + len(errors.all_errors())
    row = next(row for row in rows if "`DoesNotFit`" in row)
    assert "| `does_not_fit` | 507 |" in row
    assert errors.DoesNotFit.hint in row


def test_every_setting_has_its_row(written: str) -> None:
    from modules.settings import SETTINGS

    rows = part(written, "settings").splitlines()
    assert len(rows) == 2 + len(SETTINGS)
    for setting, row in zip(SETTINGS, rows[2:], strict=True):
        assert setting.flag in row


def test_every_variant_has_its_row(written: str) -> None:
    from modules.presets import Presets

    presets = Presets([ROOT / "presets"]).list()
    rows = part(written, "presets").splitlines()[2:]
    assert len(rows) == sum(len(preset.variants) for preset in presets)
    assert [row for row in rows if row.startswith("| **")] == [
        next(row for row in rows if row.startswith(f"| **{preset.title}** |")) for preset in presets
    ]


def test_every_module_stands_in_the_tree_and_says_what_it_is(written: str) -> None:
    tree = part(written, "files").splitlines()
    for path in (ROOT / "modules").rglob("*.py"):
        if path.name != "__init__.py":
            assert any(re.match(rf" +{re.escape(path.name)} +\S", line) for line in tree), path.name
    assert any(re.match(r"start\.sh +\S", line) for line in tree)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (skeleton(names=NAMES[1:]), "should have each of"),
        (skeleton(names=(*NAMES, "weather")), "weather"),
        (skeleton(names=(*NAMES, "errors")), "once"),
        (skeleton().replace("<!-- end: files -->", ""), "needs its end marker"),
        ("", "should have each of"),
    ],
    ids=["a part missing", "an unknown part", "a part twice", "no end", "no markers"],
)
def test_wrong_markers_are_refused_and_the_file_is_left_alone(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    for what in ("--check", "--write"):
        done = run(what, path)
        assert done.returncode == 2
        assert says in done.stderr
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("One thing. Another.", "One thing."),
        ("One thing that\nwraps. Another.", "One thing that wraps."),
        ("One thing\n\nAnother.", "One thing"),
        ("Version 1.5 of it: the file.toml, say. The rest.", "Version 1.5 of it: the file.toml, say."),
        (None, ""),
    ],
)
def test_a_summary_is_the_first_sentence(readme: dict[str, Any], docstring: str | None, expected: str) -> None:
    assert readme["summary"](docstring) == expected


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [(0, ""), (None, ""), (1_100_000, "0.001 GB"), (4_680_000_000, "4.7 GB"), (17_100_000_000, "17 GB")],
)
def test_sizes_are_readable(readme: dict[str, Any], size_bytes: int | None, expected: str) -> None:
    assert readme["gigabytes"](size_bytes) == expected


def test_a_cell_cannot_break_the_table(readme: dict[str, Any]) -> None:
    assert readme["table"](("a",), [("x|y\nz",)]).splitlines() == ["| a |", "| --- |", "| x\\|y z |"]


def test_a_script_is_described_by_its_first_comment(readme: dict[str, Any], tmp_path: Path) -> None:
    for name, text in {
        "a.sh": "#!/bin/sh\n# Does it. Well.\n",
        "a.bat": "@echo off\nrem Does it. Well.\n",
        "a.py": '"""Does it. Well."""\n',
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert readme["describe"](tmp_path / name) == "Does it."
    (tmp_path / "bare.sh").write_text("true\n", encoding="utf-8")
    assert readme["describe"](tmp_path / "bare.sh") == ""
