"""The history of the measured table as a chart: decode speed of each variant, run by run, as inline SVG.

Takes rows and gives HTML: no library, no script, colours by the style sheet. Runs
stand at equal distances, because measurements come in bursts months apart. Places
across are in percent, so that the chart fits a phone without shrinking its words.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from modules.measured import Row, speed

HEIGHT = 200  # of the drawing in pixels, without the words below it
MOST_LINES, MOST_RUNS, MOST_DATES = 8, 24, 4
LOG_ABOVE = 20  # a slow model beside one twenty times as fast would lie on the ground
DODGE = 7  # pixels between lines at the same run, so that equal speeds do not hide each other
# Shapes as well as colours tell the lines apart.
SHAPES = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "M-4-4H4V4H-4z", "M0-5.5L5.5 0 0 5.5-5.5 0z", "M0-5L5 4H-5z")
TELLING = (
    ("cache_mode", "{} cache"), ("context", "context {:,}"), ("place", "{}"), ("wanted_tokens", "prompt {}"),
    ("tokens", "{} tokens"), ("file", "{}"),
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One variant over the runs that it was measured in: (run, row), oldest first."""

    label: str
    points: tuple[tuple[int, Row], ...]


def chart(rows: Sequence[Row]) -> str:
    """The figure with its legend; empty where there is nothing to show."""
    runs = list(dict.fromkeys(row.run for row in rows))[-MOST_RUNS:]
    lines = _lines([row for row in rows if row.run in set(runs)], runs)
    if not lines:
        return ""
    shown = lines[:MOST_LINES]
    least = min(min(row.decode_tps) for line in shown for _, row in line.points)
    most = max(max(row.decode_tps) for line in shown for _, row in line.points)
    scale = _Scale(least, most)
    drawn = "".join(_grid(scale)) + "".join(_dates(runs))
    drawn += "".join(_drawn(line, place, len(shown), len(runs), scale) for place, line in enumerate(shown))
    more = f"<p><small>{len(lines) - len(shown)} more in the table.</small></p>" if len(lines) > len(shown) else ""
    said = f"Decode speed in tokens per second, {len(runs)} run{'s' if len(runs) > 1 else ''}: " + "; ".join(
        f"{line.label} {speed(line.points[-1][1].decode_speed)}" for line in shown
    )
    return (
        f'<figure class="speeds"><figcaption>Decode speed, tok/s{", logarithmic" if scale.log else ""}</figcaption>'
        f'<svg class="plot" height="{HEIGHT + 28}" role="img" aria-label="{html.escape(said)}">{drawn}</svg>'
        f'<ul class="key">{"".join(_key(line, place) for place, line in enumerate(shown))}</ul>{more}</figure>'
    )


def _lines(rows: Sequence[Row], runs: Sequence[str]) -> list[Line]:
    """A line for each series, the one measured last first; of several rows in one run the last counts."""
    series: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        series.setdefault(row.series, {})[row.run] = row
    found = sorted(([*group.values()] for group in series.values()), key=lambda group: group[-1].run, reverse=True)
    labels = _labels([group[-1] for group in found])
    place = {run: number for number, run in enumerate(runs)}
    return [
        Line(label, tuple((place[row.run], row) for row in group)) for label, group in zip(labels, found, strict=True)
    ]


def _labels(rows: Sequence[Row]) -> list[str]:
    """Names, and where several have the same one, what tells them apart."""
    out = []
    for row in rows:
        twins = [other for other in rows if other.name == row.name]
        telling = [
            form.format(getattr(row, name)) for name, form in TELLING if len({getattr(one, name) for one in twins}) > 1
        ]
        out.append(", ".join([row.name, *telling]))
    return out


class _Scale:
    """Speeds to pixels from the top: from zero, or by factors where the speeds are far apart."""

    def __init__(self, least: float, most: float) -> None:
        self.log = most > LOG_ABOVE * least
        self.ticks = _decades(least, most) if self.log else _steps(most)
        self._low, self._high = self.ticks[0], self.ticks[-1]

    def y(self, value: float) -> float:
        low, high = self._low, self._high
        share = math.log(value / low) / math.log(high / low) if self.log else value / high
        return round(HEIGHT * (1 - share), 1)


def _steps(most: float) -> list[float]:
    """0 and up to five round steps, the last at or above `most`."""
    raw = most / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return [step * number for number in range(math.ceil(most / step) + 1)]


def _decades(least: float, most: float) -> list[float]:
    """Powers of ten around the speeds."""
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
    return [10.0**power for power in range(low, max(high, low + 1) + 1)]


def _grid(scale: _Scale) -> Iterator[str]:
    for tick in scale.ticks:
        y = scale.y(tick)
        words = f"{tick:,.0f}" if tick >= 1 or tick == 0 else f"{tick:g}"
        yield f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/><text x="-8" y="{y + 4}" text-anchor="end">{words}</text>'


def _dates(runs: Sequence[str]) -> Iterator[str]:
    """A few dates below; times where all is of one day."""
    one_day = len({run[:10] for run in runs}) == 1
    step = math.ceil(len(runs) / MOST_DATES)
    for number in range(len(runs) - 1, -1, -step):
        words = runs[number][11:16] + " UTC" if one_day else runs[number][:10]
        yield f'<text x="{_x(number, len(runs))}%" y="{HEIGHT + 22}" text-anchor="middle">{html.escape(words)}</text>'


def _x(run: int, runs: int) -> float:
    return round(100 * (run + 0.5) / runs, 2)


def _drawn(line: Line, place: int, lines: int, runs: int, scale: _Scale) -> str:
    shift = round(DODGE * (place - (lines - 1) / 2), 1)
    parts = []
    for (at, row), (then, after) in zip(line.points, line.points[1:], strict=False):
        parts.append(
            f'<line x1="{_x(at, runs)}%" y1="{scale.y(row.decode_speed)}" x2="{_x(then, runs)}%" y2="{scale.y(after.decode_speed)}"/>'
        )
    for at, row in line.points:
        top, y, low = (scale.y(value) for value in (max(row.decode_tps), row.decode_speed, min(row.decode_tps)))
        said = f"{line.label}: {speed(row.decode_speed)} tok/s, {row.at[:16].replace('T', ' ')} UTC, {row.engine_version} {row.commit}"
        # A drawing of its own, since only those can stand at a percentage.
        parts.append(
            f'<svg class="point" x="{_x(at, runs)}%" y="{y}"><title>{html.escape(said)}</title>'
            f'<path class="range" d="M0 {top - y:.1f}V{low - y:.1f}"/><path class="dot" d="{SHAPES[place % len(SHAPES)]}"/></svg>'
        )
    return f'<g class="l{place}" transform="translate({shift} 0)">{"".join(parts)}</g>'


def _key(line: Line, place: int) -> str:
    newest = line.points[-1][1].decode_speed
    change = ""
    if len(line.points) > 1:
        change = f" <small>{100 * (newest / line.points[-2][1].decode_speed - 1):+.0f} %</small>".replace("-", "−")
    return (
        f'<li><svg class="l{place}" width="12" height="12" viewBox="-6 -6 12 12" aria-hidden="true">'
        f'<path class="dot" d="{SHAPES[place % len(SHAPES)]}"/></svg><span>{html.escape(line.label)} <b>{speed(newest)} tok/s</b>{change}</span></li>'
    )
