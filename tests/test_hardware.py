"""hardware.py: children that load a stand-in for NVIDIA's library, files of /proc and /sys, and a real disk."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from modules import hardware
from modules.hardware import Hardware, Pcie, measure_read_speed, read_cpu, read_disk, read_memory, read_system

from . import nvml
from .conftest import ROOT, eventually
from .nvml import GPU_IS_LOST, RTX_3060, RTX_4090, Plan

MIB = 1 << 20
LIMIT_S = 0.4
# Reads a command a line, says what came of it, how long it took, and how many threads there are.
CHILD = """
import contextlib, dataclasses, json, sys, threading, time
from pathlib import Path
options = json.loads(sys.argv[1])
if options.pop("without_package", False):
    sys.modules["pynvml"] = None
from modules.hardware import Hardware, Machine
ours = set(options.pop("ours", []))
hardware = Hardware(
    Path(options.pop("models")), lambda: ours, root=Path(options.pop("root", "/")), interval_s=0.1, **options
)
watchers = []
def do(name, value=None):
    if name == "snapshot":
        return dataclasses.asdict(hardware.snapshot(0 if value is None else value))
    if name == "ours":
        ours.clear()
        ours.update(value)
    elif name == "watch":
        watchers.append(contextlib.ExitStack())
        watchers[-1].enter_context(hardware.watching())
    elif name == "leave":
        watchers.pop().close()
    elif name == "history":
        return [dataclasses.asdict(sample) for sample in hardware.history()]
    elif name == "speed":
        hardware.set_bus_speed(*value)
    elif name == "crowd":
        took = []
        def look():
            began = time.monotonic()
            hardware.snapshot(0)
            took.append(time.monotonic() - began)
        crowd = [threading.Thread(target=look) for _ in range(value)]
        [thread.start() for thread in crowd]
        most = threading.active_count()
        [thread.join() for thread in crowd]
        return [max(took), most]
    elif name == "close":
        hardware.close()
for line in sys.stdin:
    began = time.monotonic()
    value = do(*json.loads(line))
    took_s = time.monotonic() - began
    print(json.dumps({"value": value, "took_s": took_s, "threads": threading.active_count()}), flush=True)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nvml.build(tmp_path_factory.mktemp("nvml"))


class Child:
    """A process that found the stand-in's library, and its Hardware."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, **environment},
        )  # fmt: skip
        self.took_s, self.threads = 0.0, 0

    def do(self, *words: object):
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        said = json.loads(self._process.stdout.readline())
        self.took_s, self.threads = said["took_s"], said["threads"]
        return said["value"]

    def cards(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(**card) for card in self.do("snapshot")["cards"]]

    def calls(self, name: str = "") -> int:
        """How often the library was called."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return sum(line.startswith(name) for line in lines)

    def end(self) -> None:
        self._process.stdin.close()
        try:
            assert self._process.wait(10) == 0
        finally:
            self._process.kill()
            self._process.stdout.close()


@pytest.fixture
def start(library: Path, tmp_path: Path) -> Iterator:
    """Start a child for a plan, on a machine that is no container, whatever the tests run in."""
    children = []
    plain = tmp_path / "plain"
    for name in ("stat", "meminfo", "cpuinfo"):
        (plain / "proc").mkdir(parents=True, exist_ok=True)
        (plain / "proc" / name).symlink_to(f"/proc/{name}")

    def begin(plan: Plan | None = None, folder: Path | None = None, **options) -> Child:
        log = tmp_path / f"calls-{len(children)}"
        environment = nvml.environment(folder or library, plan.file if plan else tmp_path / "none", log)
        options = {"models": str(tmp_path), "root": str(plain), "limit_s": LIMIT_S, "retry_s": 0.0, **options}
        children.append(Child([sys.executable, "-c", CHILD, json.dumps(options)], environment, log))
        return children[-1]

    yield begin
    for child in children:
        child.end()


@pytest.fixture
def two_cards(tmp_path: Path) -> Plan:
    return nvml.two_cards(tmp_path / "plan")


# Cards ------------------------------------------------------------------------------------------


def test_two_cards_one_busy_with_another_program(start, two_cards: Plan) -> None:
    two_cards.processes += [(0, 77, 6000, "compute", "ours"), (1, 4242, 9000, "graphics", "twice")]
    two_cards.cards[0] |= {"used": 6100, "gen": 4}
    two_cards.write()
    child = start(two_cards, ours=[77])
    machine = child.do("snapshot")
    assert machine["driver"] == {"state": "ok", "words": "", "code": 0, "version": "580.82.07", "cuda": [13, 0]}
    free, busy = (SimpleNamespace(**card) for card in machine["cards"])
    assert (free.name, free.uuid, free.state, free.capability) == ("NVIDIA GeForce RTX 4090", "GPU-4090", "ok", [8, 9])
    assert (free.total_bytes, free.used_bytes, free.reserved_bytes) == (24564 * MIB, 6100 * MIB, 400 * MIB)
    assert free.free_bytes == (24564 - 6100 - 400) * MIB
    assert (free.ours_bytes, free.others_bytes) == (6000 * MIB, 100 * MIB)
    assert (free.power_w, free.power_limit_w, free.power_default_w, free.power_least_w) == (21.5, 450, 450, 150)
    assert (free.temperature_c, free.utilisation, free.slowed_by, free.mig) == (41, 0, [], False)
    assert free.clocks == {
        "graphics_mhz": 210, "memory_mhz": 405, "graphics_max_mhz": 3105, "memory_max_mhz": 10501,
    }  # fmt: skip
    assert free.pcie == {
        "generation": 4, "width": 16, "generation_max": 4, "width_max": 16, "card_generation_max": 4,
    }  # fmt: skip
    assert (busy.ours_bytes, busy.others_bytes, busy.utilisation) == (0, 9216 * MIB, 0.97)
    # In both of the driver's lists, and counted once.
    assert busy.processes == [{"pid": 4242, "name": "blender", "used_bytes": 9000 * MIB, "ours": False}]


def test_the_driver_is_let_go_after_a_look(start, two_cards: Plan) -> None:
    child = start(two_cards)
    for _ in range(3):
        child.do("snapshot")
    assert child.calls("nvmlInitWithFlags") == child.calls("nvmlShutdown") == 3
    assert child.threads == 1


def test_a_young_snapshot_is_given_again(start, two_cards: Plan) -> None:
    child = start(two_cards)
    first = child.do("snapshot")
    assert child.do("snapshot", 60) == first
    assert child.calls("nvmlInitWithFlags") == 1


def test_what_a_card_does_not_tell_is_none(start, tmp_path: Path) -> None:
    bare = Plan(tmp_path / "plan", [{"name": "NVIDIA GB10", "uuid": "GPU-1"}], driver="", cuda=0).write()
    child = start(bare)
    machine = child.do("snapshot")
    card = machine["cards"][0]
    told = {key for key, value in card.items() if value not in (None, [], False, "")}
    assert told == {"name", "uuid", "state", "clocks", "pcie"} | ({"index"} if card["index"] else set())
    assert set(card["clocks"].values()) == set(card["pcie"].values()) == {None}
    assert machine["driver"]["version"] == "" and machine["driver"]["cuda"] is None
    nameless = Plan(tmp_path / "plan", [{}]).write()
    assert (child.cards()[0].name, child.cards()[0].uuid) == ("NVIDIA card 0", "card-0")
    nameless.cards = [{"name": "no text: \udcff", "uuid": "GPU-2"}]
    nameless.write()
    assert (child.cards()[0].name, child.cards()[0].uuid) == ("NVIDIA card 0", "GPU-2")
    nameless.cards = [dict(RTX_4090, mig=1, reasons=0x4 | 0x20 | 0x40)]
    nameless.faults = [(0, "nvmlDeviceGetMemoryInfo", 4), (0, "nvmlDeviceGetMemoryInfo_v2", 4)]
    nameless.write()
    card = child.cards()[0]
    assert (card.mig, card.slowed_by, card.state, card.total_bytes) == (True, ["power limit", "heat"], "ok", None)


def test_a_driver_from_before_these_calls_were_there(start, two_cards: Plan, tmp_path: Path) -> None:
    two_cards.driver, two_cards.cuda = "470.256.02", 11040
    two_cards.write()
    child = start(two_cards, nvml.build(tmp_path / "old", ["OLD_DRIVER"]), ours=[4242])
    machine = child.do("snapshot")
    card = SimpleNamespace(**machine["cards"][1])
    assert machine["driver"]["cuda"] == [11, 4]
    assert (card.state, card.reserved_bytes, card.ours_bytes) == ("ok", None, 9000 * MIB)
    assert card.used_bytes == (9216 + 200) * MIB  # its only form counts the driver's own part
    assert card.pcie["card_generation_max"] is None and card.pcie["generation_max"] == 4


# Whose memory it is ---------------------------------------------------------------------------------


def test_a_driver_that_does_not_say_how_much(start, two_cards: Plan) -> None:
    two_cards.processes = [(1, 4242, -1, "compute", r"C:\Program Files\Game Studio\game.exe")]
    child = start(two_cards.write(), ours=[4242])
    card = child.cards()[1]
    assert (card.ours_bytes, card.others_bytes, card.used_bytes) == (None, None, 9216 * MIB)
    assert card.processes == [{"pid": 4242, "name": "game.exe", "used_bytes": None, "ours": True}]
    child.do("ours", [1])
    assert child.cards()[1].others_bytes == 9216 * MIB


def test_figures_that_cannot_be_are_no_figures(start, two_cards: Plan) -> None:
    two_cards.cards[0]["used"] = 30_000  # MiB, of 24,564
    two_cards.write()
    first, second = start(two_cards).cards()[:2]
    assert (first.state, first.used_bytes, first.free_bytes) == ("ok", None, None)
    assert second.used_bytes == 9216 * MIB


def test_a_driver_that_does_not_list_programs(start, two_cards: Plan) -> None:
    two_cards.faults = [
        (1, f"nvmlDeviceGet{kind}RunningProcesses_{v}", 3) for kind in ("Compute", "Graphics") for v in ("v2", "v3")
    ]
    child = start(two_cards.write(), ours=[4242])
    assert child.cards()[1].ours_bytes is None
    assert child.cards()[0].ours_bytes == 0


def test_the_hosts_process_ids_are_not_this_containers(start, two_cards: Plan, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "proc" / "77").mkdir(parents=True)
    (root / ".dockerenv").touch()
    child = start(two_cards, ours=[77], root=str(root))
    assert child.cards()[1].ours_bytes is None
    two_cards.processes.append((1, 77, 100, "compute", "ours"))
    two_cards.write()
    assert child.cards()[1].ours_bytes == 100 * MIB


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("/opt/blender/blender\0--background\0secret\0", "blender"),
        ("/usr/bin/python3.11\0/home/me/ComfyUI/main.py\0--token\0secret\0", "python3.11 main.py"),
        ("python\0-m\0vllm.serve\0", "python vllm.serve"),
        ("python\0-c\0print('secret')\0", "python"),
        ("", "from-nvml"),
    ],
)
def test_programs_are_named_without_their_arguments(start, two_cards: Plan, tmp_path: Path, command, name) -> None:
    folder = tmp_path / "root" / "proc" / "4242"
    folder.mkdir(parents=True)
    (folder / "cmdline").write_text(command)
    two_cards.processes = [(1, 4242, 10, "compute", "/usr/lib/from-nvml --token secret")]
    child = start(two_cards.write(), root=str(tmp_path / "root"))
    assert child.cards()[1].processes[0]["name"] == name
    two_cards.processes = [(1, 99, 10, "compute", "")]
    two_cards.write()
    assert child.cards()[1].processes[0]["name"] == "process 99"


# What goes wrong ----------------------------------------------------------------------------------------


def test_a_card_that_falls_off_the_bus_is_lost_and_the_other_goes_on(start, two_cards: Plan) -> None:
    child = start(two_cards)
    child.cards()
    two_cards.faults = [(1, "*", GPU_IS_LOST)]
    two_cards.cards[0]["power"] = 333
    two_cards.write()
    alive, lost = child.cards()
    assert (alive.state, alive.power_w) == ("ok", 333)
    assert (lost.state, lost.name, lost.total_bytes) == ("lost", "NVIDIA GeForce RTX 3060", 12288 * MIB)
    assert (lost.used_bytes, lost.power_w, lost.processes) == (None, None, [])
    assert "GPU is lost" in lost.words
    two_cards.faults = []
    two_cards.write()
    assert [card.state for card in child.cards()] == ["ok", "ok"]


@pytest.mark.parametrize("function", ["nvmlDeviceGetPowerUsage", "nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetName"])
def test_a_card_may_be_lost_in_the_midst_of_a_look(start, two_cards: Plan, function: str) -> None:
    two_cards.faults = [(0, function, GPU_IS_LOST)]
    child = start(two_cards.write())
    lost, alive = child.cards()
    assert (lost.state, lost.name, lost.total_bytes) == ("lost", "NVIDIA card 0", None)
    assert alive.state == "ok"


def test_a_card_that_the_driver_lists_no_more_is_lost(start, two_cards: Plan) -> None:
    """The 4090 goes, and the 3060 takes its number."""
    child = start(two_cards)
    child.do("watch")
    eventually(lambda: child.do("history"))
    two_cards.faults = [(0, "*", GPU_IS_LOST)]
    two_cards.write()
    eventually(lambda: [c.state for c in child.cards()] == ["lost", "ok"])
    two_cards.cards, two_cards.processes, two_cards.faults = [two_cards.cards[1]], [], []
    two_cards.write()
    # While a card is missed, the driver is opened anew from time to time.
    unlisted = "The driver does not list the card any more."
    eventually(lambda: {c.name[-4:]: c.words for c in child.cards()} == {"4090": unlisted, "3060": ""})
    assert {c.name[-4:]: (c.state, c.index) for c in child.cards()} == {"4090": ("lost", 0), "3060": ("ok", 0)}
    two_cards.cards = [dict(RTX_4090), dict(RTX_3060)]
    two_cards.write()
    eventually(lambda: [c.state for c in child.cards()] == ["ok", "ok"])
    child.do("leave")


def test_a_card_that_answers_with_errors_has_failed(start, two_cards: Plan) -> None:
    two_cards.faults = [(1, "nvmlDeviceGetMemoryInfo", 999), (1, "nvmlDeviceGetMemoryInfo_v2", 999)]
    child = start(two_cards.write())
    assert [card.state for card in child.cards()] == ["ok", "failed"]
    two_cards.faults = [(1, "nvmlDeviceGetUtilizationRates", 16)]
    two_cards.write()
    failed = child.cards()[1]
    assert failed.state == "failed" and "GPU requires restart" in failed.words


def test_a_card_that_hangs_keeps_one_thread_and_nobody_waits_for_it_twice(start, two_cards: Plan) -> None:
    child = start(two_cards)
    child.cards()
    two_cards.faults = [(1, "nvmlDeviceGetTemperature", "hang")]
    two_cards.write()
    shutdowns = child.calls("nvmlShutdown")
    alive, hanging = child.cards()
    assert LIMIT_S * 0.9 < child.took_s < LIMIT_S + 1
    assert (alive.state, alive.temperature_c) == ("ok", 41)
    assert (hanging.state, hanging.name, hanging.used_bytes) == ("not answering", "NVIDIA GeForce RTX 3060", None)
    two_cards.cards[0]["temperature"] = 55
    two_cards.write()
    for _ in range(20):
        alive, hanging = child.cards()
        assert child.took_s < LIMIT_S / 2
        assert (alive.temperature_c, hanging.state) == (55, "not answering")
    assert child.threads == 2
    assert child.calls("nvmlShutdown") == shutdowns, "closed while a call was under way in it"
    assert "has not answered for" in hanging.words
    two_cards.faults = []
    two_cards.write()
    eventually(lambda: [card.state for card in child.cards()] == ["ok", "ok"])


@pytest.mark.parametrize("function", ["nvmlInitWithFlags", "nvmlDeviceGetCount_v2", "nvmlShutdown"])
def test_a_driver_that_hangs_is_said_to_hang(start, two_cards: Plan, function: str) -> None:
    child = start(two_cards)
    child.cards()
    two_cards.faults = [("*", function, "hang")]
    two_cards.write()
    states = []
    for _ in range(10):
        machine = child.do("snapshot")
        states.append((machine["driver"]["state"], *(card["state"] for card in machine["cards"])))
    assert states[-1] == ("not answering",) * 3
    assert child.took_s < LIMIT_S / 2 and child.threads == 2
    assert machine["driver"]["words"].startswith("The NVIDIA driver has not answered for ")
    assert machine["memory"]["total_bytes"] > 0 and machine["disk"]["free_bytes"] > 0
    slowest_s, most_threads = child.do("crowd", 20)
    # The crowd, the first thread, the call that hangs, and for a moment one that looks at the disk.
    assert slowest_s < LIMIT_S and most_threads <= 23
    two_cards.faults = []
    two_cards.write()
    eventually(lambda: [card.state for card in child.cards()] == ["ok", "ok"])


def test_a_crowd_waits_for_a_hang_only_once(start, two_cards: Plan) -> None:
    two_cards.faults = [("*", "nvmlInitWithFlags", "hang")]
    child = start(two_cards.write())
    slowest_s, most_threads = child.do("crowd", 20)
    assert LIMIT_S * 0.9 < slowest_s < LIMIT_S + 1
    assert most_threads <= 24
    assert child.do("snapshot")["cards"] == []


def test_no_library(start, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    # The loader takes this for the driver's library, wherever the test runs, and cannot read it.
    (folder / "libnvidia-ml.so.1").write_bytes(b"no library")
    driver = start(folder=folder).do("snapshot")["driver"]
    assert (driver["state"], driver["code"]) == ("missing", hardware.NO_LIBRARY)
    assert driver["words"] == "No NVIDIA driver was found: its library libnvidia-ml is not installed."


def test_no_package(start, two_cards: Plan) -> None:
    driver = start(two_cards, without_package=True).do("snapshot")["driver"]
    assert (driver["state"], driver["code"]) == ("failed", hardware.NO_PACKAGE)
    assert "nvidia-ml-py" in driver["words"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (9, "is installed, but it is not running"), (18, "its parts do not match"), (4, "may not talk to"),
        (13, "too old"), (999, "reports an error: Unknown Error"),
    ],
)  # fmt: skip
def test_a_driver_that_refuses(start, two_cards: Plan, code: int, words: str) -> None:
    child = start(two_cards)
    child.cards()
    two_cards.faults = [("*", "nvmlInitWithFlags", code)]
    two_cards.write()
    machine = child.do("snapshot")
    assert machine["driver"]["state"] == "failed" and machine["driver"]["code"] == code
    assert words in machine["driver"]["words"]
    assert [card["state"] for card in machine["cards"]] == ["lost", "lost"]
    two_cards.faults = []
    two_cards.write()
    assert [card.state for card in child.cards()] == ["ok", "ok"]


def test_a_driver_that_refuses_is_not_asked_all_the_time(start, two_cards: Plan) -> None:
    two_cards.faults = [("*", "nvmlInitWithFlags", 9)]
    child = start(two_cards.write(), retry_s=600.0)
    for _ in range(5):
        assert child.do("snapshot")["driver"]["code"] == 9
    assert child.calls("nvmlInitWithFlags") == 1


def test_a_driver_that_stops_while_it_is_open(start, two_cards: Plan) -> None:
    child = start(two_cards)
    child.do("watch")
    eventually(lambda: child.do("history"))
    two_cards.faults = [("*", "nvmlDeviceGetCount_v2", 9)]
    two_cards.write()
    eventually(lambda: child.do("snapshot")["driver"]["code"] == 9)
    child.do("leave")


# The last minutes --------------------------------------------------------------------------------------


def test_history_grows_only_while_somebody_watches(start, two_cards: Plan) -> None:
    child = start(two_cards, ours=[4242])
    assert child.do("history") == [] and child.calls() == 0
    child.do("watch")
    assert child.took_s < 0.2
    child.do("watch")
    eventually(lambda: len(child.do("history")) >= 5)
    history = child.do("history")
    steps = [b["at_s"] - a["at_s"] for a, b in itertools.pairwise(history)]
    assert min(steps) > 0.05
    sample = history[-1]
    assert 0 <= sample["cpu_load"] <= 1 and sample["memory_used_bytes"] > 0
    assert sample["cards"][1] == {
        "uuid": "GPU-3060", "state": "ok", "used_bytes": 9216 * MIB, "ours_bytes": 9000 * MIB, "utilisation": 0.97,
        "power_w": 168.0, "temperature_c": 71, "graphics_mhz": 1837,
    }  # fmt: skip
    child.do("leave")
    before = len(child.do("history"))
    eventually(lambda: len(child.do("history")) > before)  # one is left
    assert child.calls("nvmlInitWithFlags") == 1 and child.calls("nvmlShutdown") == 0
    child.do("leave")
    eventually(lambda: child.calls("nvmlShutdown") == 1 and child.do("history") is not None and child.threads == 1)
    calls, samples = child.calls(), len(child.do("history"))
    time.sleep(0.35)
    assert (child.calls(), len(child.do("history")), child.threads) == (calls, samples, 1)
    child.do("watch")
    eventually(lambda: len(child.do("history")) > samples)
    child.do("leave")


def test_a_watched_machine_is_not_read_for_each_page(start, two_cards: Plan) -> None:
    child = start(two_cards)
    child.do("watch")
    eventually(lambda: child.do("history"))
    before = child.calls("nvmlDeviceGetName")
    began = time.monotonic()
    for _ in range(50):
        child.do("snapshot")
    read = (time.monotonic() - began) / 0.1 + 2
    assert child.calls("nvmlDeviceGetName") - before <= 2 * read
    child.do("leave")


def test_watching_goes_on_over_a_hang(start, two_cards: Plan) -> None:
    child = start(two_cards)
    child.do("watch")
    eventually(lambda: child.do("history"))
    two_cards.faults = [("*", "*", "hang")]
    two_cards.write()
    eventually(lambda: child.do("history")[-1]["cards"][0]["state"] == "not answering")
    count = len(child.do("history"))
    eventually(lambda: len(child.do("history")) > count + 2)
    child.do("leave")
    eventually(lambda: child.do("history") and child.threads <= 4)
    child.do("close")
    assert child.took_s < 2


def test_close_ends_the_sampling(start, two_cards: Plan) -> None:
    child = start(two_cards)
    child.do("watch")
    eventually(lambda: child.do("history"))
    child.do("close")
    assert child.threads == 1 and child.calls("nvmlShutdown") == 1
    child.do("leave")
    child.do("watch")
    assert child.threads == 1


def test_a_disk_that_hangs_holds_up_nothing(tmp_path: Path) -> None:
    machine, go = Hardware(tmp_path, limit_s=0.2), threading.Event()
    machine._disk_calls.start(go.wait)  # as a network disk whose server is away
    began = time.monotonic()
    seen = [machine.snapshot(0) for _ in range(3)]
    assert time.monotonic() - began < 1
    assert all(one.disk.words.startswith("The disk has not answered for ") for one in seen)
    assert seen[-1].memory.total_bytes > 0
    go.set()
    eventually(lambda: machine.snapshot(0).disk.words == "")
    assert machine.snapshot(0).disk.path == str(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_sampling_can_begin_again_after_a_failure(tmp_path: Path) -> None:
    broken = put(tmp_path / "root", proc__meminfo=MEMINFO, proc__self__mountinfo="not a mount\n")
    machine = Hardware(tmp_path, interval_s=0.02, limit_s=1, root=broken)
    with machine.watching():
        eventually(lambda: machine._sampler is None)
    (broken / "proc/self/mountinfo").unlink()
    with machine.watching():
        eventually(lambda: len(machine.history()) > 1)
    machine.close()


def test_an_old_sample_makes_room(tmp_path: Path) -> None:
    machine = Hardware(tmp_path, interval_s=0.02, kept_s=0.1, limit_s=1)
    with machine.watching():
        eventually(lambda: len(machine.history()) == 5)
        first = machine.history()[0]
        eventually(lambda: first not in machine.history())
        assert len(machine.history()) == 5
    machine.close()


def test_the_engines_measured_speed_is_told_with_its_card(start, two_cards: Plan) -> None:
    child = start(two_cards)
    child.do("speed", ["GPU-3060", 12.5e9])
    assert [card.host_to_device_bytes_per_s for card in child.cards()] == [None, 12.5e9]


def test_what_the_link_carries() -> None:
    assert Pcie(1, 16, 4, 16).bytes_per_s == pytest.approx(31.5e9, rel=0.01)
    assert Pcie(1, 8, 3, 16).bytes_per_s == pytest.approx(7.88e9, rel=0.01)
    assert Pcie(1, 4, 1, 16).bytes_per_s == 1e9
    assert Pcie(1, 1, 6, 16).bytes_per_s == pytest.approx(3.94e9, rel=0.01)
    assert Pcie(1, None, 4, 16).bytes_per_s is None


# Processor, memory, surroundings ------------------------------------------------------------------------------


def put(root: Path, **files: str) -> Path:
    """Write files below a root; two underscores stand for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CPUINFO = "\n\n".join(
    f"processor\t: {n}\nmodel name\t: AMD Ryzen 7 5800X\nphysical id\t: 0\ncore id\t\t: {n // 2}\nflags\t\t: fpu avx2"
    for n in range(8)
)


def test_the_processor(tmp_path: Path) -> None:
    cpu = read_cpu(put(tmp_path, proc__cpuinfo=CPUINFO))
    assert (cpu.model, cpu.logical, cpu.physical, cpu.avx2) == ("AMD Ryzen 7 5800X", 8, 4, True)
    put(tmp_path, proc__cpuinfo="processor\t: 0\nmodel name\t: Old\nflags\t\t: fpu avx sse4_2\n")
    assert read_cpu(tmp_path).avx2 is False
    put(tmp_path, proc__cpuinfo="processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd\nModel\t\t: Raspberry Pi 5\n")
    assert (read_cpu(tmp_path).avx2, read_cpu(tmp_path).model) == (None, "Raspberry Pi 5")
    nothing = read_cpu(tmp_path / "nowhere")
    assert nothing.logical == os.cpu_count() and nothing.model


def test_the_processors_share_of_a_container(tmp_path: Path) -> None:
    put(tmp_path, proc__self__cgroup="0::/box/inner\n")
    put(tmp_path / "sys/fs/cgroup/box", cpu_dot_max="50000 100000\n")
    put(tmp_path / "sys/fs/cgroup/box/inner", cpu_dot_max="max 100000\n")
    assert read_cpu(tmp_path).usable == 0.5
    (tmp_path / "sys/fs/cgroup/box/cpu.max").unlink()
    assert read_cpu(tmp_path).usable == len(os.sched_getaffinity(0))
    put(tmp_path, proc__self__cgroup="4:cpu,cpuacct:/docker/1\n3:memory:/docker/1\n")
    put(tmp_path / "sys/fs/cgroup/cpu", **{"cpu_dot_cfs_quota_us": "25000\n", "cpu_dot_cfs_period_us": "100000\n"})
    assert read_cpu(tmp_path).usable == 0.25


def test_the_processors_load_is_of_the_time_between_two_looks(tmp_path: Path) -> None:
    put(tmp_path, proc__stat="cpu  100 0 100 700 100 0 0 0 50 0\ncpu0 1 2 3\n")
    machine = Hardware(tmp_path, root=tmp_path, limit_s=1)
    assert machine.snapshot(0).cpu.load is None
    put(tmp_path, proc__stat="cpu  150 0 110 730 110 0 0 0 50 0\ncpu0 1 2 3\n")
    assert machine.snapshot(0).cpu.load == pytest.approx(0.6)
    assert machine.snapshot(0).cpu.load is None  # no time has passed
    elsewhere = Hardware(tmp_path, root=tmp_path / "nowhere", limit_s=1)
    assert 0 <= elsewhere.snapshot(0).cpu.load <= 1  # where only the average is known


MEMINFO = (
    "MemTotal:       32000000 kB\nMemFree:  1000000 kB\nMemAvailable:   20000000 kB\nSwapTotal: 8 kB\nSwapFree: 4 kB\n"
)


def test_memory(tmp_path: Path) -> None:
    memory = read_memory(put(tmp_path, proc__meminfo=MEMINFO))
    assert (memory.total_bytes, memory.available_bytes) == (32000000 * 1024, 20000000 * 1024)
    assert (memory.limited, memory.swap_total_bytes, memory.swap_free_bytes) == (False, 8192, 4096)


@pytest.mark.parametrize("inside", [True, False], ids=["own namespace", "the host's path"])
def test_memory_of_a_container(tmp_path: Path, inside: bool) -> None:
    put(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/\n" if inside else "0::/docker/abc\n")
    group = tmp_path / "sys/fs/cgroup"
    put(
        group,
        memory_dot_max=f"{8 << 30}\n",
        memory_dot_current=f"{6 << 30}\n",
        memory_dot_stat=f"anon 1\ninactive_file {1 << 30}\n",
    )
    memory = read_memory(tmp_path)
    assert (memory.total_bytes, memory.available_bytes, memory.limited) == (8 << 30, 3 << 30, True)
    put(group, memory_dot_max="max\n")
    assert not read_memory(tmp_path).limited
    # More than there is limits nothing.
    put(group, memory_dot_max=f"{1 << 50}\n")
    assert (read_memory(tmp_path).total_bytes, read_memory(tmp_path).limited) == (32000000 * 1024, False)


def test_memory_of_a_container_of_version_1(tmp_path: Path) -> None:
    put(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="1:name=systemd:/\n5:memory:/docker/abc\n")
    put(
        tmp_path / "sys/fs/cgroup/memory/docker/abc",
        memory_dot_limit_in_bytes=f"{4 << 30}\n",
        memory_dot_usage_in_bytes=f"{5 << 30}\n",
    )
    memory = read_memory(tmp_path)
    assert (memory.total_bytes, memory.available_bytes, memory.limited) == (4 << 30, 0, True)


def test_memory_without_proc(tmp_path: Path) -> None:
    memory = read_memory(tmp_path)
    assert memory.total_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_memory_by_vm_stat(tmp_path: Path, monkeypatch) -> None:
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:  100.\nPages active:  9999.\n"
        "Pages inactive:  20.\nPages speculative:  3.\nPages purgeable:  1.\n"
    )
    assert hardware.parse_vm_stat(text, 4096) == 124 * 16384
    assert hardware.parse_vm_stat("Pages free: 2.\n", 4096) == 8192
    program = tmp_path / "vm_stat"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert read_memory(tmp_path).available_bytes == 124 * 16384


def test_the_surroundings(tmp_path: Path) -> None:
    bare = read_system(tmp_path)
    assert (bare.container, bare.wsl, bare.nvidia_devices, bare.other_cards) == ("", False, 0, ())
    assert bare.python == sys.version_info[:3] and bare.bits == 64
    bus = tmp_path / "sys/bus/pci/devices"
    put(bus / "0000:01:00.0", vendor="0x10de\n", **{"class": "0x030000\n"})
    put(bus / "0000:01:00.1", vendor="0x10de\n", **{"class": "0x040300\n"})  # its sound
    put(bus / "0000:02:00.0", vendor="0x10de\n", **{"class": "0x030200\n"})
    put(bus / "0000:03:00.0", vendor="0x1002\n", **{"class": "0x030000\n"})
    put(bus / "0000:04:00.0", vendor="0x1234\n", **{"class": "0x030000\n"})
    put(
        tmp_path,
        proc__version="Linux version 5.15.90.1-microsoft-standard-WSL2",
        proc__sys__vm__overcommit_memory="2\n",
    )
    (tmp_path / "sys/module/nouveau").mkdir(parents=True)
    found = read_system(tmp_path)
    assert (found.wsl, found.nvidia_devices, found.nouveau, found.other_cards) == (True, 2, True, ("AMD",))
    assert found.overcommit_never


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"_dot_dockerenv": ""}, "Docker"), ({"run___dot_containerenv": ""}, "Podman"),
        ({"proc__1__cgroup": "0::/kubepods/besteffort/pod1\n"}, "Kubernetes"),
        ({"proc__1__cgroup": "0::/lxc/mine\n"}, "LXC"), ({"proc__1__cgroup": "0::/init.scope\n"}, ""),
    ],
)  # fmt: skip
def test_containers_are_known(tmp_path: Path, files: dict[str, str], kind: str) -> None:
    assert read_system(put(tmp_path, **files)).container == kind


# The disk ------------------------------------------------------------------------------------------------------


def mounts(root: Path, *lines: tuple[str, str, str]) -> None:
    """A mountinfo of (mount point, file system, source)."""
    text = "".join(f"36 35 0:30 / {place} rw,noatime shared:1 - {kind} {source} rw\n" for place, kind, source in lines)
    put(root, proc__self__mountinfo=text)


def block(root: Path, name: str, rotational: str, number: str = "") -> Path:
    """A disk of /sys with one partition; number links the partition as the kernel does."""
    disk = root / "sys/devices" / name
    put(disk / "queue", rotational=rotational)
    part = disk / f"{name}p1"
    part.mkdir()
    for link in (root / "sys/class/block" / part.name, *([root / "sys/dev/block" / number] if number else [])):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(part)
    return part


@pytest.mark.parametrize(
    ("name", "rotational", "kind"),
    [
        ("nvme0n1", "0", "NVMe"), ("sda", "0", "SSD"), ("sda", "1", "hard disk"), ("vda", "1", "virtual disk"),
        ("sdz", "?", ""),
    ],
)  # fmt: skip
def test_the_kind_of_disk_by_its_number(tmp_path: Path, name: str, rotational: str, kind: str) -> None:
    device = tmp_path.stat().st_dev
    root = tmp_path / "root"
    block(root, name, rotational, f"{os.major(device)}:{os.minor(device)}")
    disk = read_disk(tmp_path / "models" / "not there yet", root)
    assert (disk.kind, disk.words) == (kind, "")
    assert 0 < disk.free_bytes <= disk.total_bytes


def test_the_kind_of_disk_by_its_mount(tmp_path: Path) -> None:
    root = tmp_path / "root"
    block(root, "nvme0n1", "0")
    spaced = tmp_path / "my models"
    spaced.mkdir()
    escaped = str(spaced).replace(" ", "\\040")
    mounts(root, ("/", "ext4", "/dev/nvme0n1p1"), ("/elsewhere", "ext4", "/dev/sdb1"), ("/proc", "proc", "proc"))
    assert read_disk(spaced, root).kind == "NVMe"
    mounts(root, ("/", "ext4", "/dev/nvme0n1p1"), (escaped, "nfs4", "server:/models"))
    assert (read_disk(spaced, root).kind, read_disk(tmp_path, root).kind) == ("network", "NVMe")
    mounts(root, ("/", "ext4", "/dev/nvme0n1p1"), (escaped, "9p", "C:"))
    assert read_disk(spaced, root).kind == "shared folder"
    mounts(root, ("/", "tmpfs", "tmpfs"))
    assert read_disk(spaced, root).kind == "memory"
    mounts(root, (escaped, "tmpfs", "tmpfs"), (escaped, "nfs4", "server:/models"), ("/", "ext4", "/dev/nvme0n1p1"))
    assert read_disk(spaced, root).kind == "network"
    mounts(root, ("/", "overlay", "overlay"))
    assert read_disk(spaced, root).kind == ""


def test_below_encryption_and_raid_the_slowest_disk_counts(tmp_path: Path) -> None:
    root = tmp_path / "root"
    fast, slow = block(root, "nvme0n1", "0"), block(root, "sda", "1")
    slaves = put(root / "sys/devices/dm-0/queue", rotational="0").parent / "slaves"
    slaves.mkdir()
    (slaves / fast.name).symlink_to(fast)
    (root / "sys/class/block/luks").symlink_to(slaves.parent)
    mounts(root, ("/", "ext4", "/dev/mapper/luks"))
    assert read_disk(tmp_path, root).kind == "NVMe"
    (slaves / slow.name).symlink_to(slow)
    assert read_disk(tmp_path, root).kind == "hard disk"


def test_a_disk_that_answers_with_an_error(tmp_path: Path) -> None:
    disk = read_disk(tmp_path / ("n" * 300))
    # Before Python 3.12 this is an error, since then a file that is not there.
    assert disk.words.endswith("File name too long.") or disk.free_bytes > 0


@pytest.mark.parametrize("size", [1, 4096, 9 * MIB + 17])
def test_reading_speed_is_of_bytes_that_were_read(tmp_path: Path, size: int) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(os.urandom(size))
    speed = measure_read_speed(file, 5)
    assert (speed.read_bytes, speed.file) == (size, str(file))
    assert speed.bytes_per_s == pytest.approx(size / speed.took_s)
    assert speed.method in ("direct", "cache dropped") and speed.took_s < 5


def test_reading_ends_in_time(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    began = time.monotonic()
    speed = measure_read_speed(file, 0.2)
    assert time.monotonic() - began < 1.5
    assert 0 < speed.read_bytes < 1 << 40 and speed.took_s < 1


UNCACHEABLE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not UNCACHEABLE.exists(), reason="needs a file that cannot be read past the cache, as /sys has some"
)
def test_a_file_that_cannot_be_read_past_the_cache() -> None:
    speed = measure_read_speed(UNCACHEABLE, 1)
    assert speed.method == "cache dropped" and speed.read_bytes > 0


def test_what_cannot_be_measured_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        measure_read_speed(tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(OSError, match="empty"):
        measure_read_speed(empty)
    with pytest.raises(IsADirectoryError):
        measure_read_speed(tmp_path)
    empty.write_bytes(b"x")
    with pytest.raises(TimeoutError, match="has not answered"):
        measure_read_speed(empty, 0.0)


def test_snapshots_carry_the_measured_speed(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(MIB))
    machine = Hardware(tmp_path, limit_s=1)
    assert machine.snapshot().disk.speed is None
    speed = machine.measure_disk(file)
    assert machine.snapshot(60).disk.speed == speed


# Calls that never come back ---------------------------------------------------------------------------------------


def test_a_call_that_hangs_is_left_alone() -> None:
    calls, go, count = hardware._Patient("test", 0.1), threading.Event(), threading.active_count()
    for n in range(5):
        began = time.monotonic()
        with pytest.raises(hardware._NoAnswer):
            calls.ask(go.wait)
        assert (time.monotonic() - began < 0.05) == (n > 0)
        assert calls.hangs and threading.active_count() == count + 1
    calls.start(lambda: 7)
    go.set()
    eventually(lambda: not calls.hangs)
    with pytest.raises(hardware._NoAnswer):
        calls.result()  # what hung has ended, but it was another question
    assert calls.ask(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        calls.ask(lambda: 1 // 0)


def test_a_cards_own_bandwidth_is_its_bus_and_its_clock() -> None:
    """As the data sheets have it: 384 bits at 10,501 MHz are the 1,008 GB/s of an RTX 4090."""
    card = hardware.Card(0, "x", clocks=hardware.Clocks(memory_max_mhz=10501), memory_bus_bits=384)
    assert card.bandwidth_gb_s == pytest.approx(1008, abs=0.2)
    assert hardware.Card(0, "x", memory_bus_bits=384).bandwidth_gb_s is None
    assert hardware.Card(0, "x", clocks=hardware.Clocks(memory_max_mhz=10501)).bandwidth_gb_s is None
