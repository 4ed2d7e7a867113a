"""The System page in Chromium: a stand-in for NVML with two cards, one busy, one that vanishes, a driver that hangs."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path

import pytest
from websockets.sync.client import connect

from .. import nvml
from ..conftest import eventually
from ..nvml import GPU_IS_LOST, Plan
from .conftest import Driver, Server

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]
SIZES = [(1280, 800), (768, 1000), (390, 844)]
BOTH = '[data-card="0"]', '[data-card="1"]'
# A page may wait for the driver's limit twice, and the machine may be busy with other tests.
PATIENCE_MS = 40_000


class Machine:
    """A server whose driver is the stand-in."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, self.log = folder, folder / "calls"
        self.plan = nvml.two_cards(folder / "plan", os.getpid())
        variables = nvml.environment(nvml.build(folder / "lib"), self.plan.file, self.log)
        models = folder / "data" / "models"
        models.mkdir(parents=True)
        (models / "model.safetensors").write_bytes(os.urandom(1 << 20) * 40)
        self.server = Server(folder, *arguments, variables=variables)
        self.url = self.server.url

    def reset(self) -> None:
        """As it was at first."""
        fresh = nvml.two_cards(self.plan.file, os.getpid())
        self.plan.cards, self.plan.processes, self.plan.faults = fresh.cards, fresh.processes, []

    def calls(self) -> int:
        return self.log.read_bytes().count(b"\n") if self.log.exists() else 0


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    plan = tmp_path_factory.mktemp("fake") / "model.plan"
    plan.write_text(json.dumps({"tokens_per_second": 100}))
    folder = tmp_path_factory.mktemp("machine with cards")
    presets = folder / "data" / "presets"
    presets.mkdir(parents=True)
    (presets / "quick.toml").write_text(
        'title = "Quick"\ntask = "assistant"\norder = 10\n[sampling]\nmax_tokens = 3000\n[[variants]]\ntitle = "Fake"\n'
        f'engine = "fake"\npath = "{plan}"\ncontext = 8192\n'
    )
    made = Machine(folder, "--engine", "fake=tests.fake_engine:FakeEngine")
    made.server.wait()
    yield made
    assert made.server.stop() == 0
    assert "Traceback" not in made.server.log()


@pytest.fixture
def machine(running):
    running.reset()
    return running


@pytest.fixture
def look(chromium, machine):
    """Open the System page in a window of a size."""
    contexts = []

    def at(width: int = 1280, height: int = 800, server: Machine | None = None) -> Driver:
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}))
        contexts[-1].set_default_timeout(PATIENCE_MS)
        drive = Driver(contexts[-1], (server or machine).url, "#system")
        drive.page.wait_for_selector("#system-page .verdict")
        return drive

    yield at
    for context in contexts:
        context.close()


def has(drive: Driver, words: str, place: str = "#system-page") -> None:
    """Wait until the words stand there."""
    drive.page.wait_for_function(
        "([place, words]) => document.querySelector(place)?.innerText.replace(/\\s+/g, ' ').includes(words)",
        arg=[place, words],
    )


def has_not(drive: Driver, words: str, place: str = "#system-page") -> None:
    drive.page.wait_for_function(
        "([place, words]) => !document.querySelector(place).innerText.replace(/\\s+/g, ' ').includes(words)",
        arg=[place, words],
    )


def too_wide(drive: Driver) -> list[str]:
    """What reaches over the window's edge, or is cut off by the box around it."""
    return drive.page.evaluate(
        """() => [...document.querySelectorAll('#system-page *')].filter(e => e.getClientRects().length).filter(e => {
            const r = e.getBoundingClientRect();
            const cut = getComputedStyle(e).overflow === 'hidden' && e.scrollWidth > e.clientWidth + 1;
            return r.left < -1 || r.right > innerWidth + 1 || (cut && !e.closest('svg, pre'));
        }).map(e => e.outerHTML.slice(0, 120))"""
    )


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_two_cards_one_busy_with_another_program(look, machine, width: int, height: int) -> None:
    drive = look(width, height)
    first, second = BOTH
    has(drive, "free 24 GB", first)
    for words in ("RTX 4090", "VRAM 24 GB", "22 W", "of 450 W", "41 °C", "210 MHz", "4.0 x16"):
        has(drive, words, first)
    for words in ("in use by other programs", "other programs 9 GB", "168 W", "71 °C", "97%", "One program"):
        has(drive, words, second)
    drive.page.click(f"{second} summary")
    assert str(os.getpid()) in drive.page.inner_text(f"{second} details")
    has(drive, "sudo nvidia-smi -i 0 -pl 360")
    has(drive, "loses 1 to 2 %")
    has(drive, "Requirements")
    has(drive, "CUDA of the driver")
    drive.page.wait_for_function("/Reads [0-9.]+ GB\\/s/.test(document.querySelector('#system-page').innerText)")
    assert too_wide(drive) == []
    assert drive.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # Every chart is drawn, and can be seen.
    charts = drive.page.locator("#system-page .chart svg")
    assert charts.count() == 10
    assert all(box["width"] > 100 and box["height"] > 40 for box in (c.bounding_box() for c in charts.all()))
    load = f"{second} [data-key=Utilisation] .line"
    before = drive.page.get_attribute(load, "d")
    drive.page.wait_for_function(
        "([s, d]) => { const now = document.querySelector(s).getAttribute('d'); return now !== d && now.length > 5 }",
        arg=[load, before],
    )
    assert drive.errors == [] and drive.foreign == []


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_card_that_vanishes_while_the_page_is_open(look, machine, width: int, height: int) -> None:
    drive = look(width, height)
    has(drive, "22 W", BOTH[0])
    machine.plan.faults = [(0, "*", GPU_IS_LOST)]
    machine.plan.write()
    has(drive, "has disappeared", BOTH[0])
    has(drive, "fallen off the bus", BOTH[0])
    has(drive, "Card 0 (RTX 4090) has disappeared", ".finding.level-problem")
    has(drive, "Something does not work as it is", ".verdict")
    assert too_wide(drive) == []
    # The other one goes on: a new figure arrives.
    machine.plan.cards[1]["power"] = 99
    machine.plan.write()
    has(drive, "99 W", BOTH[1])
    machine.reset()
    has(drive, "22 W", BOTH[0])
    has_not(drive, "has disappeared")


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_driver_that_hangs_while_the_page_is_open(look, machine, width: int, height: int) -> None:
    drive = look(width, height)
    has(drive, "22 W", BOTH[0])
    machine.plan.faults = [("*", "*", "hang")]
    machine.plan.write()
    try:
        has(drive, "The NVIDIA driver does not answer", ".finding.level-problem")
        has_not(drive, "168 W")
        assert too_wide(drive) == []
        # The processor's chart goes on, and so does everything else.
        before = drive.page.get_attribute("[data-key=Processor] .line", "d")
        drive.page.wait_for_function(
            "d => document.querySelector('[data-key=Processor] .line').getAttribute('d') !== d", arg=before
        )
        drive.page.click("#system-page button[data-action=measure]")
        drive.tab("quick")
        drive.send("quick", "say 3")
        assert drive.answer("quick", timeout=PATIENCE_MS).split()[:3] == ["w0", "w1", "w2"]
        drive.page.click("#tab-system")
        has(drive, "has not answered for")
    finally:
        machine.reset()
    has(drive, "22 W", BOTH[0])
    has_not(drive, "does not answer")


def test_a_new_picture_of_the_machine_disturbs_nobody(look, machine) -> None:
    """Open details, the focus, a selection, and a button that asks whether one is sure."""
    drive, second = look(), BOTH[1]
    has(drive, "One program", second)
    drive.page.click(f"{second} summary")
    drive.page.click(".fine summary")
    drive.page.focus("#engine-exllamav3 button")
    drive.page.evaluate("""() => {
        window.kept = ['*:focus', '.fine', '[data-card="1"]'].map(s => document.querySelector(s));
        const codes = [...document.querySelectorAll('.finding code')];
        getSelection().selectAllChildren(codes.find(code => code.textContent.includes('-pl 360')));
        document.querySelector('#engine-exllamav3 .buttons').insertAdjacentHTML('beforeend', '<i id="mark"></i>');
    }""")
    machine.plan.cards[1]["power"] = 77
    machine.plan.write()
    has(drive, "77 W", second)
    state = drive.page.evaluate("""() => ({
        open: [document.querySelector('[data-card="1"] details').open, document.querySelector('.fine').open],
        same: ['*:focus', '.fine', '[data-card="1"]'].map(s => document.querySelector(s))
          .map((e, i) => e === window.kept[i]),
        selected: getSelection().toString(), mark: !!document.querySelector('#mark'),
    })""")
    # What the server did not draw is gone: it was a new picture indeed.
    assert state == {
        "open": [True, True], "same": [True] * 3, "selected": "sudo nvidia-smi -i 0 -pl 360", "mark": False,
    }  # fmt: skip


def test_a_figure_that_is_selected_waits_until_it_was_copied(look, machine) -> None:
    drive, power = look(), f"{BOTH[1]} [data-key=Power] b >> nth=0"
    has(drive, "168 W", BOTH[1])
    drive.page.locator(power).evaluate("e => getSelection().selectAllChildren(e)")
    machine.plan.cards[1] |= {"power": 66, "temperature": 55}
    machine.plan.write()
    has(drive, "55 °C", BOTH[1])
    assert drive.page.evaluate("getSelection().toString()") == "168 W"
    drive.page.evaluate("getSelection().removeAllRanges()")
    has(drive, "66 W", BOTH[1])


def test_a_button_that_asks_is_left_alone(look, machine) -> None:
    """As those that delete: the second press must not meet a fresh button."""
    drive = look()
    for _ in range(10):
        drive.page.evaluate("""() => {
            const button = document.querySelector('#engine-exllamav3 button'), began = Date.now();
            window.label = button.textContent;
            window.seen = [];
            new MutationObserver(() => window.seen.push([Date.now() - began, button.isConnected && button.textContent]))
              .observe(document.querySelector('[data-card="1"]'), { attributes: true, subtree: true });
            Object.assign(button.dataset, { sure: 'Really?', name: 'gpt' });
            button.click();
        }""")
        drive.page.wait_for_function("document.querySelector('#engine-exllamav3 button').textContent === window.label")
        while_asking = [text for at_ms, text in drive.page.evaluate("window.seen") if at_ms < 2800]
        if while_asking:  # on a busy machine nothing may have come meanwhile
            break
    assert set(while_asking) == {"Really?"}


def test_the_driver_is_asked_only_while_the_page_is_shown(look, machine) -> None:
    drive, other = look(), look(390, 844)

    def is_asked() -> bool:
        before = machine.calls()
        time.sleep(2.5)
        return machine.calls() > before

    assert is_asked()
    drive.page.click("#tab-assistant")
    assert is_asked()  # the other window still shows it
    other.page.close()
    eventually(lambda: not is_asked(), 30)
    drive.page.click("#tab-system")
    has(drive, "22 W", BOTH[0])
    assert is_asked()
    # A window behind others, or a phone in a pocket.
    drive.page.evaluate("""() => {
        Object.defineProperty(document, 'hidden', { value: true, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));
    }""")
    eventually(lambda: not is_asked(), 30)
    drive.page.evaluate("""() => {
        Object.defineProperty(document, 'hidden', { value: false, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));
    }""")
    eventually(is_asked, 30)


def test_a_connection_that_breaks_off_watches_no_more(machine) -> None:
    """A browser says goodbye before it goes; one that crashed, or a phone out of reach, does not."""
    with connect(machine.url.replace("http", "ws") + "/live") as page:
        page.send(json.dumps({"do": "panel", "name": "system"}))
        frames = (json.loads(page.recv(timeout=30)) for _ in range(50))
        assert any(frame["t"] == "panel" and "RTX 4090" in frame["html"] for frame in frames)
        page.socket.shutdown(socket.SHUT_RDWR)

    def is_quiet() -> bool:
        before = machine.calls()
        time.sleep(2.5)
        return machine.calls() == before

    eventually(is_quiet, 30)


def test_nonsense_about_panels_is_survived(machine) -> None:
    with connect(machine.url.replace("http", "ws") + "/live") as page:
        for said in ({"name": "nothing"}, {"name": ["system"]}, {"name": "nothing", "off": True}, {}):
            page.send(json.dumps({"do": "panel", **said}))
        page.send(json.dumps({"do": "act", "panel": "system", "name": "disk", "action": "format"}))
        frames = (json.loads(page.recv(timeout=30)) for _ in range(50))
        assert any(frame["t"] == "error" and "format" in frame["message"] for frame in frames)


def test_what_our_models_hold_is_told_from_what_others_hold(look, machine) -> None:
    drive = look()
    drive.tab("quick")
    drive.send("quick", "say 2")
    drive.answer("quick")
    children = machine.server.engines()
    machine.plan.cards[0]["used"] = 6144
    machine.plan.processes += [(0, pid, 4096, "compute", "python") for pid in children[-1:]]
    machine.plan.write()
    drive.page.click("#tab-system")
    has(drive, "Turntable 4 GB", BOTH[0])
    has(drive, "other programs 2 GB", BOTH[0])


def test_a_start_with_a_driver_that_hangs(look, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("hangs at the start")
    machine = Machine.__new__(Machine)
    plan = Plan(folder / "plan", faults=[("*", "*", "hang")]).write()
    variables = nvml.environment(nvml.build(folder / "lib"), plan.file)
    machine.server = Server(folder, variables=variables)
    machine.url = machine.server.url
    try:
        machine.server.wait()
        drive = look(server=machine)
        has(drive, "The NVIDIA driver does not answer", ".finding.level-problem")
        has(drive, "models on the processor go on working", ".finding.level-problem")
        drive.tab("assistant")
        drive.send("assistant", "What does 6.5 bpw mean?")
        assert "bits per weight" in drive.answer("assistant", timeout=PATIENCE_MS).lower()
        drive.page.click("#tab-system")
        nvml.two_cards(plan.file)
        has(drive, "22 W", BOTH[0])
        eventually(lambda: re.search(r"driver answers now: 23\d\d\d MB for models", machine.server.log()), 30)
    finally:
        assert machine.server.stop() == 0
    assert "Traceback" not in machine.server.log()
