"""Small charts of the last minutes as inline SVG: no library, no script, colours by the style sheet.

Takes samples and gives HTML. A gap in time is a gap in the line, since nobody looked
then. Knows no gradio and no machine.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

SPAN_S = 300.0
BUCKET_S = 3.0  # a point each; more cannot be told apart at this size, and each is sent once a second
GAP_S = 12.0  # longer than a look at a driver that hangs
WIDTH, HEIGHT = 300, 60

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Series:
    """A line with the area below it. points are (seconds, value), oldest first; look is a class of the style sheet."""

    points: Points
    look: str = "a"


def chart(title: str, value: str, series: Sequence[Series], *, now_s: float, top: float, scale: str = "") -> str:
    """A figure with its title, the present value in words and the last five minutes, from 0 to `top`.

    scale says in words what `top` is. The first series is drawn lowest.
    """
    drawn = "".join(_drawn(one, now_s, top) for one in series)
    seen = [v for one in series for at, v in one.points if v is not None and now_s - at <= SPAN_S]
    said = f"{title} over the last minutes, now {value}" if seen else f"{title}: nothing seen so far"
    more = f" <small>{html.escape(scale)}</small>" if scale else ""
    return (
        f'<figure class="chart" data-key="{html.escape(title)}"><figcaption><span>{html.escape(title)}</span>'
        f'<b>{html.escape(value)}</b>{more}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" '
        f'role="img" aria-label="{html.escape(said)}"><path class="grid" d="M0,{HEIGHT / 2:g}h{WIDTH}M0,.5h{WIDTH}"/>'
        f"{drawn}</svg></figure>"
    )


def _drawn(series: Series, now_s: float, top: float) -> str:
    line, area = [], []
    for run in _runs(_means(series.points, now_s)):
        places = [
            f"{WIDTH - (now_s - at) * WIDTH / SPAN_S:.4g},{HEIGHT * (1 - min(1.0, max(0.0, value / top))):.4g}"
            for at, value in run
        ]
        first, last = places[0].split(",")[0], places[-1].split(",")[0]
        line.append("M" + " ".join(places) + "h.1" * (len(places) == 1))
        area.append(f"M{first},{HEIGHT} " + " ".join(places) + f" {last},{HEIGHT}z")
    return f'<path class="area {series.look}" d="{"".join(area)}"/><path class="line {series.look}" d="{"".join(line)}"/>'


def _means(points: Points, now_s: float) -> Iterator[tuple[float, float | None]]:
    """One point per bucket of time, at its last second: the mean, or None where nothing was told in it."""
    values: list[float] = []
    bucket, last_s = None, 0.0
    for at, value in points:
        if not 0 <= now_s - at <= SPAN_S:
            continue
        if bucket is not None and at // BUCKET_S != bucket:
            yield last_s, (sum(values) / len(values) if values else None)
            values = []
        bucket, last_s = at // BUCKET_S, at
        if value is not None:
            values.append(value)
    if bucket is not None:
        yield last_s, (sum(values) / len(values) if values else None)


def _runs(points: Iterable[tuple[float, float | None]]) -> Iterator[list[tuple[float, float]]]:
    """Stretches without a gap."""
    run: list[tuple[float, float]] = []
    for at, value in points:
        if run and (value is None or at - run[-1][0] > GAP_S):
            yield run
            run = []
        if value is not None:
            run.append((at, value))
    if run:
        yield run
