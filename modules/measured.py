"""The measured table: what a row holds, the file that the rows lie in, and the table as Markdown and as text.

One JSON object a line, only ever appended to, so that a crash costs at most the last
line. Lines that cannot be read are counted, never thrown away. Knows no engine and no
page: bench.py fills the rows, ui/bench.py draws them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
COLUMNS = (
    "Date", "Engine", "Commit", "Model", "Quant", "Cache mode", "Context", "Memory MiB", "Prompt tok/s", "Decode tok/s",
    "Load s", "Swap s", "Tokens", "Device",
)  # fmt: skip
RIGHT = ("Context", "Memory MiB", "Prompt tok/s", "Decode tok/s", "Load s", "Swap s")


@dataclass(frozen=True)
class Row:
    """One variant, measured once.

    at and run are ISO 8601 in UTC, of the measurement and of the start of the run it belongs to. commit is the
    checkout's, empty where there is none. bpw 0: not known. prompt_tps and decode_tps hold tokens per second of each
    repetition, as the engine timed them. prompt_tokens and tokens are how many were read and written, wanted_tokens how
    long the prompt was to be: texts differ a little. load_s is from the start of a new child to a first token, swap_s
    the same in a child that is up, None for engines without such a swap. memory_bytes is what the engine says that it
    holds: RAM of its process, or memory of the cards. device is the card or the processor that the model ran on;
    threads 0 leaves their number to the engine.
    """

    at: str
    run: str
    engine: str
    engine_version: str
    commit: str
    preset: str
    variant: str
    title: str
    model: str
    file: str
    quant: str
    bpw: float
    cache_mode: str
    context: int
    wanted_tokens: int
    prompt_tokens: int
    tokens: int
    prompt_tps: tuple[float, ...]
    decode_tps: tuple[float, ...]
    load_s: float
    swap_s: float | None
    memory_bytes: int
    device: str
    power_limit_w: float | None
    threads: int

    @property
    def prompt_speed(self) -> float:
        """Median, in tokens per second."""
        return statistics.median(self.prompt_tps)

    @property
    def decode_speed(self) -> float:
        """Median, in tokens per second."""
        return statistics.median(self.decode_tps)

    @property
    def name(self) -> str:
        """What people know it by."""
        return f"{self.title} · {self.model}"

    @property
    def place(self) -> str:
        """The device with what limits it, as the public tables write it."""
        if self.power_limit_w:
            return f"{self.device} at {self.power_limit_w:.0f} W"
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else ""
        return self.device + threads

    @property
    def series(self) -> tuple[Any, ...]:
        """Rows that agree in this are the same thing measured again."""
        return (
            self.preset, self.variant, self.engine, self.file, self.cache_mode, self.context, self.wanted_tokens,
            self.tokens, self.device, self.power_limit_w, self.threads,
        )  # fmt: skip

    def line(self) -> str:
        """The row as it lies in the file."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n"

    @classmethod
    def of_line(cls, line: str) -> Row:
        """A line of the file; raises ValueError for anything that is no row. A field of a newer version is ignored."""
        data = json.loads(line)
        if not isinstance(data, dict):
            raise ValueError("not an object")
        values = {}
        for field in dataclasses.fields(cls):
            if field.name not in data:
                raise ValueError(f"{field.name} is missing")
            values[field.name] = _checked(field.name, str(field.type), data[field.name])
        return cls(**values)


def _checked(name: str, kind: str, value: Any) -> Any:
    """The value as the annotation wants it; ValueError for what no measurement can be."""
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "tuple[float, ...]" and isinstance(value, list) and value and all(_speed(one) for one in value):
        return tuple(float(one) for one in value)
    if value is None and kind == "float | None":
        return None
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if kind.startswith("float") and _number(value):
        return float(value)
    raise ValueError(f"{name} is {value!r}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _speed(value: Any) -> bool:
    return _number(value) and value > 0


@dataclass(frozen=True)
class Found:
    """The rows in the file's order, and how many of its lines could not be read."""

    rows: tuple[Row, ...]
    unreadable: int


class History:
    """The file with the rows. Two programs may append to it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def append(self, row: Row) -> None:
        """Add a row at the end, on the disk before this returns. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock, self.path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            # A line that was cut off must not take this one with it.
            cut = size > 0 and file.read(1) != b"\n"
            file.write((b"\n" if cut else b"") + row.line().encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> Found:
        """Everything in the file; nothing where there is no file. Raises OSError."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return Found((), 0)
        rows, unreadable = [], 0
        for line in data.split(b"\n"):
            if not line.strip():
                continue
            try:
                rows.append(Row.of_line(line.decode()))
            except (ValueError, RecursionError):
                unreadable += 1
        return Found(tuple(rows), unreadable)


# The table ----------------------------------------------------------------------------------------


def cells(row: Row) -> tuple[str, ...]:
    """The row in the words of COLUMNS."""
    engine = f"{row.engine} {row.engine_version}".strip()
    return (
        row.at[:16].replace("T", " "), engine, row.commit or "–", row.name, quant(row), row.cache_mode,
        f"{row.context:,}", f"{row.memory_bytes / MIB:,.0f}", spread(row.prompt_tps), spread(row.decode_tps),
        seconds(row.load_s), seconds(row.swap_s), f"{row.prompt_tokens} + {row.tokens}", row.place,
    )  # fmt: skip


def markdown(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table, as the public tables have them; speeds are medians, least and most in brackets."""
    lines = [COLUMNS, tuple("---:" if column in RIGHT else "---" for column in COLUMNS)]
    lines += [tuple(_cell(text) for text in cells(row)) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def text_table(rows: Sequence[Row], width: int = 0) -> str:
    """The rows for a terminal of so many characters; where they are too few, the least telling columns are left out."""
    head = ["Date", "Model", "Quant", "Prompt tok/s", "Decode tok/s", "Load s", "Memory MiB", "Device"]
    text = _text_table(rows, head)
    for column in ("Quant", "Date", "Device", "Memory MiB"):
        if width and max(map(len, text.splitlines())) > width:
            head.remove(column)
            text = _text_table(rows, head)
    return text


def _text_table(rows: Sequence[Row], head: Sequence[str]) -> str:
    lines = [tuple(head)]
    for row in rows:
        named = dict(zip(COLUMNS, cells(row), strict=True))
        lines.append(tuple(named[column] for column in head))
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    text = ""
    for line in lines:
        padded = zip(head, line, widths, strict=True)
        text += "  ".join(t.rjust(w) if c in RIGHT else t.ljust(w) for c, t, w in padded).rstrip() + "\n"
    return text


def spread(samples: Sequence[float]) -> str:
    """Median, and the least and the most where they differ: 612 (598–640)."""
    middle, least, most = speed(statistics.median(samples)), speed(min(samples)), speed(max(samples))
    return middle if least == most else f"{middle} ({least}–{most})"


def speed(value: float) -> str:
    """Three digits that count, as in the public tables: 1,234, 125, 12.5, 0.25."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def seconds(value: float | None) -> str:
    """Two digits after the point; a dash where there is none."""
    return "–" if value is None else f"{value:.2f}"


def quant(row: Row) -> str:
    """The way the weights are stored and their bits: Q8_0, 8.50 bpw."""
    return ", ".join(filter(None, (row.quant, f"{row.bpw:.2f} bpw" if row.bpw else ""))) or "–"


def _cell(text: str) -> str:
    """A name cannot end its cell, and nothing in it is markup."""
    for mark in "\\|`*<>[]":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())
