"""The chart of the measured table: where points stand, which lines there are, what is said in words."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET

import pytest

from modules.measured import Row
from modules.ui.speeds import HEIGHT, MOST_LINES, MOST_RUNS, chart

from .test_measured import ROW


def row(run: int, *speeds: float, model: str = "A", day: int = 0, **more) -> Row:
    at = f"2026-{1 + day // 28:02d}-{1 + day % 28:02d}T10:{run:02d}:00Z"
    changes = {"title": "Coding", "variant": model, "model": model, "decode_tps": speeds, **more}
    return dataclasses.replace(ROW, run=at, at=at, **changes)


def parsed(rows: list[Row]) -> ET.Element:
    """Fails where the drawing is no well-formed XML, so an unescaped name cannot hide."""
    return ET.fromstring(chart(rows).replace("<figure", "<figure xmlns:x='x'", 1))


def points(figure: ET.Element, line: int) -> list[tuple[float, float]]:
    group = figure.find(f".//g[@class='l{line}']")
    return [(float(p.get("x").rstrip("%")), float(p.get("y"))) for p in group.findall("svg")]


def texts(figure: ET.Element) -> list[str]:
    return [text.text for text in figure.iter("text")]


def test_nothing_measured_is_no_chart() -> None:
    assert chart([]) == ""


def test_faster_is_higher_and_later_is_further_right() -> None:
    figure = parsed([row(0, 10.0), row(0, 40.0, model="B"), row(1, 20.0), row(2, 30.0)])
    slow = points(figure, 0)
    assert [x for x, _ in slow] == [pytest.approx(100 * (n + 0.5) / 3, abs=0.01) for n in range(3)]
    assert slow[0][1] > slow[1][1] > slow[2][1]
    assert points(figure, 1) == [(pytest.approx(16.67), 0)]  # 40 is the top of the scale
    assert slow[1][1] == HEIGHT / 2
    assert texts(figure)[:5] == ["0", "10", "20", "30", "40"]


def test_a_run_that_a_variant_missed_leaves_its_place_empty() -> None:
    figure = parsed([row(0, 10.0), row(0, 9.0, model="B"), row(1, 10.0), row(2, 11.0), row(2, 9.5, model="B")])
    assert [x for x, _ in points(figure, 1)] == [pytest.approx(16.67), pytest.approx(83.33)]
    assert len(figure.findall(".//g[@class='l1']/line")) == 1


def test_the_spread_of_the_repetitions_is_drawn() -> None:
    figure = parsed([row(0, 30.0, 40.0, 20.0)])
    point = figure.find(".//svg[@class='point']")
    low, high = re.fullmatch(r"M0 (-?[\d.]+)V(-?[\d.]+)", point.find("path").get("d")).groups()
    assert float(point.get("y")) == HEIGHT / 4
    assert (float(low), float(high)) == (-HEIGHT / 4, HEIGHT / 4)


def test_speeds_far_apart_are_drawn_by_factors() -> None:
    figure = parsed([row(0, 10.0), row(0, 1000.0, model="B"), row(0, 100.0, model="C")])
    assert "logarithmic" in figure.find("figcaption").text
    assert [points(figure, n)[0][1] for n in range(3)] == [HEIGHT, 0, HEIGHT / 2]
    assert texts(figure)[:3] == ["10", "100", "1,000"]
    assert "logarithmic" not in chart([row(0, 10.0), row(0, 200.0, model="B")])


def test_one_model_at_two_power_limits_is_two_lines_that_say_so() -> None:
    figure = parsed([row(0, 10.0), row(1, 9.0, power_limit_w=300.0)])
    words = ["".join(item.itertext()) for item in figure.find("ul")]
    assert len(words) == 2
    assert sum("at 300 W" in text for text in words) == sum("at 360 W" in text for text in words) == 1


def test_the_key_says_the_newest_speed_and_its_change() -> None:
    words = "".join(parsed([row(0, 10.0), row(1, 9.0)]).find("ul").itertext())
    assert words == "Coding · A 9.00 tok/s −10 %"


def test_who_cannot_see_it_hears_the_figures() -> None:
    figure = parsed([row(0, 10.0), row(1, 12.0), row(1, 20.0, model="B")])
    drawing = figure.find("svg")
    assert drawing.get("role") == "img"
    assert "2 runs" in drawing.get("aria-label") and "Coding · B 20.0" in drawing.get("aria-label")
    assert [t.text.startswith("Coding · ") for t in figure.iter("title")] == [True] * 3


def test_names_stay_text() -> None:
    figure = parsed([row(0, 10.0, model='<script>"x"&'), row(1, 10.0, commit="<b>")])
    assert "<script>" in "".join(figure.find("ul").itertext())
    assert figure.find(".//script") is None


def test_many_runs_and_many_variants_stay_readable() -> None:
    rows = [row(0, 10.0 + n, model=f"M{m}", day=n) for n in range(40) for m in range(11)]
    figure = parsed(rows)
    assert len(figure.findall(".//svg[@class='point']")) == MOST_LINES * MOST_RUNS
    assert "3 more in the table" in "".join(figure.itertext())
    dates = [text for text in texts(figure) if text.count("-") == 2]
    assert 2 <= len(dates) <= 4
    assert dates[0] == "2026-02-12"  # the newest run has its date


def test_runs_of_one_day_have_times() -> None:
    assert "10:01 UTC" in texts(parsed([row(0, 10.0), row(1, 10.0)]))


@pytest.mark.parametrize("fastest", [0.3, 1.0, 7.0, 99.9, 100.0, 6771.0, 123456.0])
def test_the_scale_holds_the_fastest_with_few_round_steps(fastest: float) -> None:
    figure = parsed([row(0, fastest)])
    assert 0 <= points(figure, 0)[0][1] <= HEIGHT / 2
    assert 3 <= sum(1 for line in figure.iter("line") if line.get("class") == "grid") <= 7
