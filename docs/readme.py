"""Writes the README's generated parts, or checks that they are what the code says.

python docs/readme.py --check     prints what is out of date and ends with 1 if anything is
python docs/readme.py --write     brings the README up to date

A part is the text between `<!-- begin: NAME -->` and `<!-- end: NAME -->`. Owns how
the parts look; knows nothing of what a preset, a setting or an error is for. Reads
the code and the shipped presets only, so that every machine writes the same.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# What has no docstring to quote. Folders end in a slash; modules/ is listed file by file.
DESCRIPTIONS = {
    "presets/": "One task preset a file.",
    "tests/": "One file per module, of the same name; browser/ and gpu/ need what their names say.",
    "demo/": "The bundled models, and how they were trained.",
    "benchmarks/": "What the figures in the documentation were measured with.",
    "docs/": "Decisions, and the script that writes these tables.",
}


class ReadmeError(Exception):
    """The README's markers do not match the parts that exist."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar or a line break inside a cell cannot end it."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def code(text: str) -> str:
    """Text as code, or nothing for nothing."""
    return f"`{text}`" if text else ""


def summary(docstring: str | None) -> str:
    """The first sentence of a docstring, in one line."""
    paragraph = " ".join((docstring or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]


def gigabytes(size_bytes: int | None) -> str:
    """Bytes as people read them: 0.001 GB, 1.5 GB, 17 GB."""
    if not size_bytes:
        return ""
    size = size_bytes / 1e9
    return f"{size:.0f} GB" if size >= 10 else f"{size:.1f} GB" if size >= 0.1 else f"{size:.3f} GB"


def presets_part(root: Path) -> str:
    """Every variant of every shipped preset."""
    from modules.presets import Presets

    rows = []
    for preset in Presets([root / "presets"]).list():
        for place, variant in enumerate(preset.variants):
            rows.append(
                (
                    f"**{preset.title}**" if place == 0 else "",
                    variant.title,
                    variant.engine,
                    f"{variant.bpw:g}" if variant.bpw else "",
                    variant.cache_mode,
                    f"{variant.context:,}",
                    gigabytes(variant.size_bytes),
                )
            )
    return table(("Preset", "Variant", "Engine", "Bits per weight", "Cache", "Context", "Size"), rows)


def describe(path: Path) -> str:
    """What a file says about itself: its docstring, or the first comment of a script."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return summary(ast.get_docstring(ast.parse(text)))
    comments = (line.strip() for line in text.splitlines())
    for line in comments:
        found = re.match(r"(?:#(?!!)|rem\b)\s*(.+)", line)
        if found:
            return summary(found[1])
    return ""


def described_files(folder: Path, depth: int = 0) -> list[tuple[str, str]]:
    """The Python files of a folder and its folders, as (indented name, description), files first."""
    rows = [("  " * depth + folder.name + "/", "")]
    marker = folder / "__init__.py"
    if marker.exists():
        rows[0] = (rows[0][0], describe(marker))
    for path in sorted(folder.glob("*.py")):
        if path != marker:
            rows.append(("  " * (depth + 1) + path.name, describe(path)))
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))):
        rows += described_files(inner, depth + 1)
    return rows


def files_part(root: Path) -> str:
    """The file tree, each file with the first sentence of its docstring."""
    kinds = ("*.py", "*.sh", "*.bat", "*.toml", "requirements*.txt")
    top = [path for kind in kinds for path in sorted(root.glob(kind))]
    rows = [(path.name, describe(path)) for path in top]
    rows += described_files(root / "modules")
    # An empty folder is not in a clone.
    rows += [(name, text) for name, text in DESCRIPTIONS.items() if any((root / name).glob("*"))]
    width = max(len(name) for name, _ in rows) + 2
    return "```text\n" + "\n".join(f"{name:{width}}{text}".rstrip() for name, text in rows) + "\n```"


def settings_part(root: Path) -> str:
    """Every setting: the flag, the variable of the environment, the default, the meaning."""
    from modules.settings import SETTINGS

    rows = [(code(one.flag), code(one.env), one.default_text, one.help) for one in SETTINGS]
    return table(("Setting", "Environment", "Default", "Meaning"), rows)


def errors_part(root: Path) -> str:
    """Every error in the order of the tree."""
    from modules.errors import all_errors

    rows = [
        (code(error.__name__), code(error.code), str(error.status), summary(error.__doc__), error.hint)
        for error in all_errors()
    ]
    return table(("Error", "Code", "Status", "Meaning", "What to do"), rows)


PARTS: dict[str, Callable[[Path], str]] = {
    "presets": presets_part,
    "files": files_part,
    "settings": settings_part,
    "errors": errors_part,
}


def fill(text: str, parts: dict[str, Callable[[Path], str]], root: Path = ROOT) -> str:
    """The text with every part written anew.

    Raises ReadmeError for a part that is unknown, missing, there twice or without an end,
    so that no part can drop out of the check unseen.
    """
    begun, ended = (re.findall(rf"^<!-- {word}: (.*?) -->$", text, re.MULTILINE) for word in ("begin", "end"))
    if begun != ended:
        raise ReadmeError(f"each begin marker needs its end marker: begun {begun}, ended {ended}")
    if sorted(begun) != sorted(parts):
        raise ReadmeError(f"the README has the parts {sorted(begun)}, and should have each of {sorted(parts)} once")
    for name, write in parts.items():
        start, stop = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        before, rest = text.split(start)
        text = before + start + write(root) + "\n" + stop + rest.split(stop)[1]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or write; 0 when the README is up to date, 1 when it was not, 2 when its markers are wrong."""
    parser: Any = argparse.ArgumentParser(description="The README's generated parts.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="say what is out of date, and end with 1 if anything is")
    what.add_argument("--write", action="store_true", help="bring the README up to date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file (default: the project's)")
    options = parser.parse_args(arguments)
    old = options.readme.read_text(encoding="utf-8")
    try:
        new = fill(old, PARTS)
    except ReadmeError as error:
        print(f"{options.readme}: {error}", file=sys.stderr)
        return 2
    if options.write:
        options.readme.write_text(new, encoding="utf-8", newline="\n")
        return 0
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), "README.md", "the code", lineterm=""))
    if lines:
        print(*lines, "", "README.md is out of date: python docs/readme.py --write", sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
