"""The measured table: rows, the file and what a damaged one costs, Markdown and text."""

from __future__ import annotations

import dataclasses
import json
import threading

import pytest

from modules.measured import COLUMNS, History, Row, markdown, speed, spread, text_table

ROW = Row(
    at="2026-11-21T08:02:33Z", run="2026-11-21T08:02:30Z", engine="exllamav2", engine_version="0.3.2", commit="7ac47ed",
    preset="coding", variant="32b", title="Coding", model="Qwen2.5-Coder 32B, 4.25 bpw", file="Qwen-4_25", quant="EXL2",
    bpw=4.25, cache_mode="Q6", context=32768, wanted_tokens=512, prompt_tokens=519, tokens=128,
    prompt_tps=(1200.0, 1234.4, 1250.0), decode_tps=(35.1, 34.9, 35.0), load_s=9.257, swap_s=0.81,
    memory_bytes=20_500 << 20, device="NVIDIA GeForce RTX 3090", power_limit_w=360.0, threads=0,
)  # fmt: skip


@pytest.fixture
def history(tmp_path) -> History:
    return History(tmp_path / "new folder" / "measured.jsonl")


def damaged(**changes) -> str:
    return json.dumps({**json.loads(ROW.line()), **changes})


def test_rows_come_back_as_they_were_written(history) -> None:
    assert history.read().rows == ()
    on_cpu = dataclasses.replace(ROW, swap_s=None, power_limit_w=None, device="AMD EPYC", threads=4, title="Ünï|x")
    for row in (ROW, on_cpu):
        history.append(row)
    assert history.read().rows == (ROW, on_cpu)
    assert history.read().unreadable == 0


@pytest.mark.parametrize(
    "line",
    [
        "", "{", "[1]", "null", "\x00" * 40, "[" * 100_000, damaged(decode_tps=[]), damaged(decode_tps=[0]),
        damaged(decode_tps=["35"]), damaged(prompt_tps=None), damaged(context=-1), damaged(context=True),
        damaged(load_s=float("nan")), damaged(load_s=float("inf")), damaged(title=7), damaged(memory_bytes=1.5),
        json.dumps({k: v for k, v in json.loads(ROW.line()).items() if k != "device"}),
    ],
)  # fmt: skip
def test_a_line_that_is_no_row_is_counted_and_the_rest_is_read(history, line: str) -> None:
    history.append(ROW)
    with history.path.open("a") as file:
        file.write(line + "\n")
    history.append(ROW)
    found = history.read()
    assert found.rows == (ROW, ROW)
    assert found.unreadable == (1 if line else 0)


def test_a_row_that_was_cut_off_takes_no_other_with_it(history) -> None:
    history.append(ROW)
    half = ROW.line().encode()[:-60]
    with history.path.open("ab") as file:
        file.write(half)
    history.append(ROW)
    assert history.read().rows == (ROW, ROW)
    assert history.read().unreadable == 1
    assert half in history.path.read_bytes()  # nothing is thrown away


def test_a_field_of_a_newer_version_does_no_harm(history) -> None:
    history.append(ROW)
    history.path.write_text(damaged(watts=[300, 310]) + "\n")
    assert history.read().rows == (ROW,)


def test_several_writers_do_not_mix_their_lines(history) -> None:
    def write(place: int) -> None:
        other = History(history.path)
        for _ in range(20):
            other.append(dataclasses.replace(ROW, variant=str(place)))

    threads = [threading.Thread(target=write, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = history.read()
    assert (len(found.rows), found.unreadable) == (80, 0)


def test_the_table_as_markdown() -> None:
    head, rule, line = markdown([ROW]).splitlines()
    assert head == "| " + " | ".join(COLUMNS) + " |"
    assert rule.count("---") == len(COLUMNS)
    assert rule.count("---:") == 6
    assert line == (
        "| 2026-11-21 08:02 | exllamav2 0.3.2 | 7ac47ed | Coding · Qwen2.5-Coder 32B, 4.25 bpw | EXL2, 4.25 bpw | Q6 | "
        "32,768 | 20,500 | 1,234 (1,200–1,250) | 35.0 (34.9–35.1) | 9.26 | 0.81 | 519 + 128 | "
        "NVIDIA GeForce RTX 3090 at 360 W |"
    )


def test_a_name_cannot_end_its_cell_or_become_markup() -> None:
    line = markdown([dataclasses.replace(ROW, model="a|b\n<img src=x> [c](http://d) `e`", commit="")]).splitlines()
    assert len(line) == 3
    assert r"a\|b \<img src=x\> \[c\](http://d) \`e\`" in line[2]
    assert "| – |" in line[2]


def test_the_table_in_a_terminal_is_aligned() -> None:
    small = dataclasses.replace(
        ROW, model="Demo", decode_tps=(6789.0,), device="AMD EPYC", power_limit_w=None, threads=1
    )
    lines = text_table([ROW, small]).splitlines()
    end = lines[0].index("Decode tok/s") + len("Decode tok/s")
    assert lines[1][:end].endswith("35.0 (34.9–35.1)")
    assert lines[2][:end].endswith(" 6,789")
    assert lines[2].endswith("AMD EPYC, 1 thread")


def test_a_narrow_terminal_gets_what_tells_most() -> None:
    for width in (200, 150, 120, 80):
        lines = text_table([ROW], width).splitlines()
        assert max(map(len, lines)) <= max(width, 90)
        assert "Model" in lines[0] and "Decode tok/s" in lines[0]
    assert "Quant" not in lines[0] and "Date" not in lines[0]
    assert text_table([ROW], 400) == text_table([ROW])


@pytest.mark.parametrize(
    ("value", "shown"), [(1234.4, "1,234"), (125.54, "126"), (35.04, "35.0"), (9.876, "9.88"), (0.25, "0.25")]
)
def test_speeds_have_three_digits_that_count(value: float, shown: str) -> None:
    assert speed(value) == shown


def test_one_repetition_has_no_spread() -> None:
    assert spread((35.04,)) == "35.0"
    assert spread((10.0, 30.0, 20.0, 40.0)) == "25.0 (10.0–40.0)"


def test_the_same_thing_measured_again_is_the_same_series() -> None:
    again = dataclasses.replace(ROW, at="2027-01-01T00:00:00Z", commit="x", engine_version="9", prompt_tokens=511)
    assert again.series == ROW.series
    for change in ({"power_limit_w": 300.0}, {"cache_mode": "Q4"}, {"tokens": 64}, {"device": "Tesla T4"}):
        assert dataclasses.replace(ROW, **change).series != ROW.series
