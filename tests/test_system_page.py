"""The System page without a browser: charts, the machine as HTML, and the panel over cards that come through NVML."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from modules.doctor import ADVICE, PROBLEM, Finding, examine
from modules.environments import EngineJob, EngineJobs, Environment, Environments
from modules.errors import InvalidRequest
from modules.hardware import (
    GIB,
    CardProcess,
    Clocks,
    Disk,
    Driver,
    Hardware,
    Machine,
    Memory,
    Pcie,
    ReadSpeed,
    Sample,
)
from modules.ui import machine as view
from modules.ui.charts import GAP_S, SPAN_S, Series, chart
from modules.ui.system import SystemPage, engine_states

from . import nvml
from .conftest import ROOT, eventually
from .test_doctor import CARD, GOOD

NOW = 1_000_000.0
HOSTILE = "<img src=x onerror=alert(1)>\u202e\"'"


def lines(points, top: float = 1.0) -> list[list[tuple[float, float]]]:
    """The drawn line's stretches, as places between 0,0 at the top left and 300,60."""
    drawn = chart("Load", "now", [Series(points)], now_s=NOW, top=top)
    path = re.search(r'class="line a" d="([^"]*)"', drawn)[1]
    return [
        [tuple(map(float, place.split(","))) for place in run.removesuffix("h.1").split()]
        for run in path.split("M")[1:]
    ]


def test_a_chart_goes_from_the_left_to_the_right_and_from_the_bottom_to_the_top() -> None:
    run = lines([(NOW - SPAN_S + i, i / SPAN_S) for i in range(int(SPAN_S) + 1)])
    assert len(run) == 1 and 95 < len(run[0]) < 105  # a point for some seconds, not for each
    assert run[0][0][0] < 3 and run[0][0][1] > 59 and run[0][-1] == (300, pytest.approx(0, abs=0.5))
    assert [x for x, _ in run[0]] == sorted(x for x, _ in run[0])


def test_what_is_too_old_is_left_out_and_what_is_too_large_is_cut() -> None:
    assert lines([(NOW - SPAN_S - 1, 0.5), (NOW - 1, 7.0), (NOW + 60, 0.5)]) == [[(299, 0)]]
    assert lines([]) == []


def test_a_gap_in_time_and_an_untold_value_break_the_line() -> None:
    def steady(first: float, last: float, value: float | None = 0.5):
        return [(NOW - s, value) for s in range(int(first), int(last), -1)]

    assert len(lines(steady(200, 150) + steady(150 - GAP_S - 4, 0))) == 2
    assert len(lines(steady(200, 150) + steady(150, 100, None) + steady(100, 0))) == 2
    assert len(lines(steady(200, 0))) == 1
    assert lines(steady(200, 0, None)) == []


def test_a_chart_says_in_words_what_it_shows() -> None:
    assert 'aria-label="VRAM over the last minutes, now 9 GB"' in chart(
        "VRAM", "9 GB", [Series([(NOW, 9.0)])], now_s=NOW, top=24.0
    )
    assert "nothing seen so far" in chart("VRAM", "–", [Series([])], now_s=NOW, top=24.0)


# The machine as HTML ------------------------------------------------------------------------------


BUSY = replace(
    CARD, index=1, uuid="GPU-3060", name="NVIDIA GeForce RTX 3060", total_bytes=12 * GIB, used_bytes=9 * GIB,
    free_bytes=3 * GIB, ours_bytes=GIB, others_bytes=8 * GIB, power_w=168.0, power_limit_w=170.0,
    power_default_w=200.0, temperature_c=71, utilisation=0.97, clocks=Clocks(1837, 405, 3105, 10501),
    slowed_by=("heat",), pcie=Pcie(4, 8, 4, 16, 4), host_to_device_bytes_per_s=12.3e9,
    processes=(CardProcess(4242, "blender", 8 * GIB, False), CardProcess(7, "python worker", GIB, True)),
)  # fmt: skip
TWO = replace(GOOD, at_s=NOW, cards=(CARD, BUSY))


def text(html: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", html)))


def history(machine: Machine) -> list[Sample]:
    return [Sample.of(replace(machine, at_s=machine.at_s - age)) for age in range(60, -1, -1)]


def test_a_card_tells_all_that_it_knows() -> None:
    said = text(view.cards(TWO, history(TWO)))
    for words in (
        "NVIDIA GeForce RTX 3060", "in use by other programs", "VRAM 12 GB", "Turntable 1 GB", "other programs 8 GB",
        "free 3 GB", "168 W of 170 W, 200 W by default", "71 °C slowed by heat", "97%", "1837 MHz of 3105 MHz",
        "405 MHz of 10501 MHz", "4.0 x8 of x16", "12.3 GB/s measured", "2 programs on this card", "blender 4242 8 GB",
        "python worker (Turntable) 7 1 GB", "resting at 1.0", "– not measured; at most 32 GB/s",
    ):  # fmt: skip
        assert words in said, words


def test_a_card_that_tells_nothing_is_still_shown() -> None:
    silent = replace(
        CARD, total_bytes=None, used_bytes=None, free_bytes=None, ours_bytes=None, others_bytes=None, power_w=None,
        power_limit_w=None, temperature_c=None, utilisation=None, pcie=Pcie(), capability=None,
    )  # fmt: skip
    machine = replace(TWO, cards=(silent,))
    said = text(view.cards(machine, history(machine)))
    assert "RTX 4090" in said and "does not tell its memory" in said and "None" not in said


def test_memory_that_cannot_be_told_apart_is_not_called_anybodys() -> None:
    said = text(view.cards(replace(TWO, cards=(replace(BUSY, ours_bytes=None, others_bytes=None),)), []))
    assert "used, by whom is not told 9 GB" in said and "Turntable" not in said.replace("(Turntable)", "")


@pytest.mark.parametrize(("state", "words"), [("lost", "has disappeared"), ("not answering", "does not answer")])
def test_a_card_that_is_gone_says_so_and_the_other_goes_on(state: str, words: str) -> None:
    gone = CARD.without_values(state, "The card has fallen off the bus.")
    machine = replace(TWO, cards=(gone, BUSY))
    html = view.cards(machine, history(TWO))
    assert words in text(html) and "fallen off the bus" in text(html) and "168 W of 170 W" in text(html)
    assert html.count("<figure") == 8  # its last minutes are still there


def test_without_cards_the_driver_has_the_word() -> None:
    machine = replace(GOOD, cards=(), driver=Driver("missing", "No NVIDIA driver was found."))
    assert "No NVIDIA driver was found. llama.cpp runs on the processor." in text(view.cards(machine, []))


def test_processor_memory_and_disk() -> None:
    speed = ReadSpeed(3.21e9, 4_500_000_000, 1.4, "direct", "/models/a.gguf")
    machine = replace(
        GOOD, cpu=replace(GOOD.cpu, load=0.25, usable=8), memory=Memory(32 * GIB, 8 * GIB, True, 2 * GIB, GIB),
        disk=replace(GOOD.disk, speed=speed),
    )  # fmt: skip
    said = text(view.computer(machine, history(machine), ""))
    for words in (
        "AMD Ryzen 9 7950X · 8 of 32 threads", "CPU 25%", "24 GB of 32 GB", "8 GB available · the container's limit",
        "swap 1 GB of 2 GB", "NVMe · /models", "1000 GB free of 2000 GB", "Reads 3.21 GB/s measured, 4.5 GB in 1.4 s",
    ):  # fmt: skip
        assert words in said, words
    broken = replace(GOOD, disk=Disk("/mnt/nas", words="The disk has not answered for 3 s."), memory=Memory(0, 0))
    said = text(view.computer(broken, [], ""))
    assert "has not answered for 3 s" in said and "does not tell its RAM" in said
    assert "disabled" in view.computer(GOOD, [], "Measuring …") and "disabled" not in view.computer(GOOD, [], "Why.")


def test_requirements_and_advice_with_commands_to_copy() -> None:
    machine = replace(TWO, cards=(replace(CARD, power_limit_w=450.0), BUSY))
    examination = examine(machine, engine_states([]))
    table, advice = view.requirements(examination.requirements), view.advice(examination)
    assert text(table).count("RAM") == 1 and '<td data-label="Minimum">11.7</td>' in table
    assert "<code>sudo nvidia-smi -i 0 -pl 360</code><button" in advice and "loses 1 to 2 %" in advice
    assert "`" not in advice and "What is fine" in advice
    whole = view.findings([Finding(PROBLEM, "engine", "No", "Why.", "python app.py engines install exllamav2")])
    assert "<code>python app.py engines install exllamav2</code>" in whole and 'role="alert"' in whole


def test_a_finding_keeps_its_name_when_its_figures_change() -> None:
    """By its name the page knows which of two lists' entries are the same."""

    def key(title: str, card: int = 0) -> str:
        return re.search('data-key="([^"]*)"', view.findings([Finding(ADVICE, "card", title, "", "", card)]))[1]

    assert key("Other programs hold 9 GB of Card 1") == key("Other programs hold 9.5 GB of Card 1")
    assert key("ExLlamaV2 is not installed") != key("ExLlamaV3 is not installed")
    assert key("It is hot") != key("It is hot", 1)


def test_nothing_that_others_wrote_becomes_html() -> None:
    card = replace(
        BUSY, name=HOSTILE, uuid=HOSTILE, state="ok", processes=(CardProcess(1, HOSTILE, GIB, False),),
        slowed_by=(HOSTILE,),
    )  # fmt: skip
    gone = replace(card, index=2, state="lost", words=HOSTILE)
    machine = replace(
        GOOD, at_s=NOW, cards=(card, gone), cpu=replace(GOOD.cpu, model=HOSTILE),
        disk=replace(GOOD.disk, path=HOSTILE, kind=HOSTILE),
        driver=replace(GOOD.driver, version=HOSTILE), system=replace(GOOD.system, release=HOSTILE),
    )  # fmt: skip
    examination = examine(machine, engine_states([]))
    html = "".join((
        view.overview(machine, examination), view.cards(machine, history(machine)),
        view.computer(machine, history(machine), HOSTILE), view.requirements(examination.requirements),
        view.advice(examination),
    ))  # fmt: skip
    assert "<img" not in html and "&lt;img" in html
    # Between quotes nothing may end them.
    assert not re.search(r'="[^"]*onerror=alert\(1\)>[^"]*"', html)


# The panel ------------------------------------------------------------------------------------------


def jobs_of(tmp_path: Path) -> EngineJobs:
    return EngineJobs(Environments(tmp_path, variables={}))


class Told:
    """Counts what a page would be sent."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def panel(tmp_path: Path, **options) -> tuple[SystemPage, Told]:
    told = Told()
    hardware = Hardware(tmp_path / "models", interval_s=0.05, limit_s=0.5)
    return SystemPage(jobs_of(tmp_path), hardware, on_change=told, every_s=0.05, **options), told


def watchers() -> int:
    return sum(thread.name in ("system-page", "hardware") for thread in threading.enumerate())


def test_the_machine_is_watched_only_while_the_page_is_shown(tmp_path: Path) -> None:
    page, told = panel(tmp_path)
    assert "Looking at the machine" in page.html() and "llama.cpp" in page.html() and watchers() == 0
    page.shown(1)
    page.shown(2)
    eventually(lambda: told.count > 5, 20)
    assert "<h3>Cards</h3>" in page.html() and "Requirements" in page.html() and watchers() == 2
    page.shown(1)
    assert watchers() == 2
    page.shown(0)
    eventually(lambda: watchers() == 0, 10)
    seen = told.count
    time.sleep(0.3)
    assert told.count == seen
    page.shown(1)
    eventually(lambda: told.count > seen + 3, 20)
    page.close()
    eventually(lambda: watchers() == 0, 10)


def test_a_page_that_comes_and_goes_leaves_one_watcher(tmp_path: Path) -> None:
    page, told = panel(tmp_path)
    for _ in range(50):
        page.shown(1)
        page.shown(0)
    page.shown(1)
    eventually(lambda: told.count > 3, 20)
    assert watchers() == 2
    page.close()
    eventually(lambda: watchers() == 0, 10)


def test_what_was_seen_long_ago_is_not_shown_as_it_were_now(tmp_path: Path) -> None:
    page, told = panel(tmp_path)
    page.shown(1)
    eventually(lambda: told.count > 1, 20)
    page.close()
    eventually(lambda: watchers() == 0, 10)
    machine, samples = page._seen
    page._seen = (replace(machine, at_s=machine.at_s - 60), samples)
    with page._hardware._reading:  # nothing is read meanwhile
        page.shown(1)
        assert "Looking at the machine" in page.html()
    page.close()
    eventually(lambda: watchers() == 0, 10)


def test_the_disk_is_measured_once_and_by_the_button(tmp_path: Path) -> None:
    page, told = panel(tmp_path)
    page.shown(1)
    eventually(lambda: "no downloaded model to read" in page.html(), 20)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small.gguf").write_bytes(b"x" * 1000)
    page.act("disk", "measure")
    eventually(lambda: "no downloaded model to read" in page.html(), 20)  # 1 KB says nothing about a disk
    (tmp_path / "models" / "model.gguf").write_bytes(os.urandom(1 << 20) * 40)
    page.act("disk", "measure")
    eventually(lambda: re.search(r"Reads <b>[\d.]+ GB/s</b> <small>measured", page.html()), 20)
    assert told.count and "not measured:" not in page.html()
    with pytest.raises(InvalidRequest, match="format"):
        page.act("disk", "format")
    page.close()
    eventually(lambda: watchers() == 0, 10)


def test_a_machine_that_cannot_be_read_is_said_and_looked_at_again(tmp_path: Path) -> None:
    """The processes of the engines are asked for at every look, and that is code of ours."""
    library, plan = nvml.build(tmp_path / "lib"), nvml.two_cards(tmp_path / "plan")
    code = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.conftest import eventually
from tests.test_system_page import jobs_of
from modules.hardware import Hardware
from modules.ui.system import SystemPage
trouble = [True]
def pids():
    if trouble[0]:
        raise RuntimeError("<b>no pids")
    return []
page = SystemPage(jobs_of(Path(sys.argv[1])), Hardware(Path(sys.argv[1]), pids), every_s=0.05)
page.shown(1)
eventually(lambda: "RuntimeError: &lt;b&gt;no pids" in page.html(), 20)
trouble[0] = False
page.shown(1)
eventually(lambda: "RTX 4090" in page.html(), 20)
assert "RuntimeError" not in page.html()
page.close()
print("good")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(ROOT)], capture_output=True, text=True, cwd=ROOT, timeout=60,
        env={**os.environ, **nvml.environment(library, plan.file)}, check=False,
    )  # fmt: skip
    assert done.stdout == "good\n", done.stderr


def test_engines_as_the_doctor_sees_them(tmp_path: Path) -> None:
    found = Environment("exllamav2", "broken", tmp_path, tmp_path, {"exllamav2": "0.3.2"}, problem="why")
    states = engine_states([found], EngineJob("exllamav3", "install", True))
    assert [(s.title, s.state, s.version, s.problem) for s in states][1] == ("ExLlamaV2", "broken", "0.3.2", "why")
    assert states[0].state == "ready" and states[0].version
    assert engine_states([found], EngineJob("exllamav2", "install", True))[1].state == "installing"
    assert engine_states([found], EngineJob("exllamav2", "install", False))[1].state == "broken"


def test_the_page_over_the_drivers_own_library(tmp_path: Path) -> None:
    """A driver that hangs holds up neither the page's HTML nor its other parts."""
    library, plan = nvml.build(tmp_path / "lib"), nvml.two_cards(tmp_path / "plan")
    code = """
import json, sys, time
from pathlib import Path
from modules.environments import EngineJobs, Environments
from modules.hardware import Hardware
from modules.ui.system import SystemPage
folder = Path(sys.argv[1])
hardware = Hardware(folder, interval_s=0.1, limit_s=0.5, retry_s=0.0)
hardware.set_bus_speed("GPU-4090", 24.1e9)
page = SystemPage(EngineJobs(Environments(folder, variables={})), hardware, every_s=0.1)
page.shown(1)
for line in sys.stdin:
    began = time.monotonic()
    html = page.html()
    print(json.dumps([html, time.monotonic() - began]), flush=True)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, **nvml.environment(library, plan.file)},
    )  # fmt: skip

    def shown() -> str:
        child.stdin.write("\n")
        child.stdin.flush()
        html, took_s = json.loads(child.stdout.readline())
        assert took_s < 5  # it reads the disk and, on a busy machine, waits for its turn; never for the driver
        return text(html)

    try:
        eventually(lambda: "24.1 GB/s measured" in shown(), 30)
        assert "other programs 9 GB" in shown() and "sudo nvidia-smi -i 0 -pl 360" in shown()
        plan.faults = [(0, "*", nvml.GPU_IS_LOST)]
        plan.write()
        eventually(lambda: "Card 0 (RTX 4090) has disappeared" in shown() and "168 W" in shown(), 30)
        plan.faults = [("*", "*", "hang")]
        plan.write()
        eventually(lambda: "The NVIDIA driver does not answer" in shown() and "168 W" not in shown(), 30)
        assert "Processor" in shown() and "llama.cpp" in shown()
        plan.faults = []
        plan.write()
        eventually(lambda: "168 W" in shown() and "does not answer" not in shown(), 30)
    finally:
        child.stdin.close()
        child.wait(20)
        child.stdout.close()
