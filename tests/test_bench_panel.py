"""The measured table as the System page shows it: what the buttons do, and what is shown."""

from __future__ import annotations

import dataclasses
import html
import re

import pytest

from modules.bench import BenchJobs
from modules.errors import Busy, InvalidRequest, PresetNotFound
from modules.hardware import Hardware
from modules.measured import History, markdown
from modules.ui.bench import MOST_ROWS, BenchPanel, MeasuredPanel

from .conftest import eventually
from .test_bench import SHORT, assistant, history  # noqa: F401  # fixtures
from .test_measured import ROW


@pytest.fixture
def rows() -> list:
    return []


@pytest.fixture
def jobs(assistant, history, tmp_path, rows):  # noqa: F811
    return BenchJobs(assistant, Hardware(tmp_path), history, on_row=rows.append, sizes=SHORT)


@pytest.fixture
def panel(jobs) -> BenchPanel:
    return BenchPanel(jobs)


def buttons(shown: str) -> list[tuple[str, str]]:
    return re.findall(r'data-name="([^"]*)" data-action="(\w+)"', shown)


def test_nothing_here_is_said(panel) -> None:
    assert "No model on this machine" in panel.html() and buttons(panel.html()) == []


def test_measure_all_or_one_and_the_row_is_told(panel, assistant, rows) -> None:  # noqa: F811
    assistant.add("a")
    assert buttons(panel.html()) == [("", "start")] and ">Measure<" in panel.html()
    assistant.add("b")
    assert buttons(panel.html()) == [("", "start"), ("a/here", "start"), ("b/here", "start")]
    panel.act("b/here", "start")
    eventually(lambda: "1 of 1 measured." in panel.html(), 20)
    assert [row.preset for row in rows] == ["b"]
    panel.act("", "start")
    eventually(lambda: "2 of 2 measured." in panel.html(), 20)
    assert [row.preset for row in rows] == ["b", "a", "b"]


def test_a_run_is_shown_with_its_progress_and_can_be_cancelled(panel, assistant) -> None:  # noqa: F811
    assistant.add("a", tokens_per_second=3)
    panel.act("", "start")
    eventually(lambda: "writes, " in panel.html(), 20)
    shown = panel.html()
    assert "1 of 1: A · Fake" in shown and 'role="progressbar"' in shown and buttons(shown) == [("", "cancel")]
    assert 0 < float(re.search(r'aria-valuenow="(\d+)"', shown)[1]) < 100
    with pytest.raises(Busy):
        panel.act("", "start")
    panel.act("", "cancel")
    eventually(lambda: "Cancelled. 0 of 1 measured." in panel.html(), 20)


def test_a_failure_is_said_in_words_that_cannot_be_markup(panel, assistant) -> None:  # noqa: F811
    assistant.add("a", fault="load_error")
    panel.act("", "start")
    eventually(lambda: "0 of 1 measured." in panel.html(), 20)
    alert = panel.html().partition('role="alert"')[2]
    assert "weights are broken" in alert and "<b>A · Fake</b>" in alert


def test_what_makes_no_sense_is_refused(panel, assistant, history) -> None:  # noqa: F811
    assistant.add("a")
    for name, action, error in (("", "explode", InvalidRequest), ("x", "start", PresetNotFound)):
        with pytest.raises(error):
            panel.act(name, action)
    with pytest.raises(InvalidRequest):
        MeasuredPanel(history).act("", "start")


def test_the_table_its_chart_and_its_markdown(tmp_path) -> None:
    history = History(tmp_path / "measured.jsonl")  # noqa: F811
    panel = MeasuredPanel(history)
    assert panel.html() == ""
    later = "2026-11-22T08:00:00Z"
    odd = dataclasses.replace(ROW, model='<img src=x onerror="a">', at=later, run=later)
    for one in (ROW, odd):
        history.append(one)
    with history.path.open("a") as file:
        file.write("half a row")
    shown = panel.html()
    assert "1 line of " in shown and "cannot be read and is left out" in shown
    assert "<img" not in shown and shown.count("<tr data-key") == 2
    table = shown.partition("<table")[2]
    assert table.index("2026-11-22 08:00") < table.index("2026-11-21 08:02")  # newest first
    hidden = re.search(r"<code hidden>(.*?)</code>", shown, re.DOTALL)[1]
    assert html.unescape(hidden) == markdown([ROW, odd])
    assert 'download="turntable-measured.md"' in shown


def test_a_long_history_is_cut_on_the_page_and_says_so(tmp_path) -> None:
    history = History(tmp_path / "measured.jsonl")  # noqa: F811
    history.path.write_text(ROW.line() * (MOST_ROWS + 7))
    shown = MeasuredPanel(history).html()
    assert shown.count("<tr data-key") == MOST_ROWS and "7 older rows" in shown
