"""doctor.py: machines good and bad, what is said of each, and the report; once with cards that come through NVML."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules import doctor, environments, hardware
from modules.doctor import ADVICE, OK, PROBLEM, EngineState, Examination, Finding, examine, exit_code, format_report
from modules.hardware import (
    GIB,
    Card,
    CardProcess,
    Cpu,
    Disk,
    Driver,
    Machine,
    Memory,
    Pcie,
    ReadSpeed,
    System,
)

from . import nvml
from .conftest import ROOT
from .nvml import RTX_3060, RTX_4090

LINK = Pcie(1, 16, 4, 16, 4)
CARD = Card(
    0, "NVIDIA GeForce RTX 4090", "GPU-4090", total_bytes=24564 << 20, used_bytes=GIB // 2, free_bytes=23 * GIB,
    ours_bytes=0, others_bytes=GIB // 2, power_w=20.0, power_limit_w=360.0, power_default_w=450.0, power_least_w=150.0,
    temperature_c=41, utilisation=0.0, pcie=LINK, capability=(8, 9),
)  # fmt: skip
GOOD = Machine(
    0.0, Driver("ok", version="580.82.07", cuda=(13, 0)), (CARD,), Cpu("AMD Ryzen 9 7950X", 32, 16, 32, avx2=True),
    Memory(62 * GIB, 50 * GIB), Disk("/models", 2 * 10**12, 10**12, "NVMe"),
    System("Linux", "6.8", "x86_64", (3, 12, 3), 64),
)  # fmt: skip
SLOW = ReadSpeed(0.2e9, 10**9, 1.0, "direct", "/models/a.gguf")


def with_card(card: Card = CARD, **changes) -> Machine:
    return replace(GOOD, cards=(replace(card, **changes),))


def without_driver(code: int = hardware.NO_LIBRARY, state: str = "missing", **system) -> Machine:
    return replace(GOOD, driver=Driver(state, "Words.", code), cards=(), system=replace(GOOD.system, **system))


def told(machine: Machine, *engines: EngineState, pinned_bytes: int = 0) -> list[Finding]:
    return [f for f in examine(machine, engines, pinned_bytes).findings if f.level != OK]


def only(machine: Machine, *engines: EngineState, pinned_bytes: int = 0) -> Finding:
    """The one finding that is not ok: what is wrong is said once, and nothing else is."""
    findings = told(machine, *engines, pinned_bytes=pinned_bytes)
    assert len(findings) == 1, findings
    return findings[0]


def test_a_good_machine_has_nothing_to_do() -> None:
    examination = examine(GOOD, [EngineState("exllamav3", "ExLlamaV3", "ready", "1.6.5")], 20 * GIB)
    assert told(GOOD) == [] and (examination.level, exit_code(examination)) == (OK, 0)
    assert {row.level for row in examination.requirements} == {OK}
    assert {f.about for f in examination.findings} == set(doctor.ABOUTS)
    assert format_report(GOOD, examination).endswith("Nothing to do.\n")


def test_findings_stand_in_order() -> None:
    machine = replace(with_card(total_bytes=12 * GIB), memory=Memory(8 * GIB, 6 * GIB))
    examination = examine(machine)
    levels = [f.level for f in examination.findings]
    assert levels == sorted(levels, key=(PROBLEM, ADVICE, OK).index) and set(levels) == {PROBLEM, ADVICE, OK}
    assert (examination.level, exit_code(examination)) == (PROBLEM, 1)
    assert exit_code(examine(with_card(total_bytes=12 * GIB))) == 0


# The driver ---------------------------------------------------------------------------------------------


def test_what_pytorch_needs_is_what_the_installer_refuses_by() -> None:
    assert doctor.TORCH_DRIVER == environments.LEAST_DRIVER
    assert doctor.ENGINE_CARDS == environments.LEAST_CARD


@pytest.mark.parametrize(
    ("version", "cuda", "level", "title"),
    [
        ("510.47.03", (11, 6), PROBLEM, "too old"),
        ("515.43.04", (11, 7), ADVICE, "need driver 580"),
        ("575.57.08", (12, 9), ADVICE, "need driver 580"),
    ],
)
def test_an_old_driver(version: str, cuda: tuple[int, int], level: str, title: str) -> None:
    machine = replace(GOOD, driver=Driver("ok", version=version, cuda=cuda))
    finding = only(machine)
    assert (finding.level, finding.about) == (level, "driver")
    assert title in finding.title and version in finding.detail and "Update" in finding.what_to_do
    row = next(row for row in doctor.requirements(machine) if row.name == "CUDA of the driver")
    assert (row.minimum, row.level) == ("11.7", level)
    wsl = replace(machine, system=replace(GOOD.system, wsl=True))
    assert "Windows" in next(f for f in told(wsl) if f.about == "driver").what_to_do


def test_a_driver_of_unknown_version_is_not_blamed() -> None:
    assert told(replace(GOOD, driver=Driver("ok"))) == []


@pytest.mark.parametrize(
    ("machine", "level", "title", "todo"),
    [
        (without_driver(), ADVICE, "No NVIDIA card", "ubuntu-drivers"),
        (without_driver(os="Windows"), ADVICE, "No NVIDIA card", "nvidia.com"),
        (without_driver(nvidia_devices=1), PROBLEM, "driver is missing", "ubuntu-drivers"),
        (without_driver(nvidia_devices=2, nouveau=True), PROBLEM, "nouveau", "ubuntu-drivers"),
        (without_driver(nvidia_devices=1, container="Docker"), PROBLEM, "driver is missing", "--gpus all"),
        (without_driver(wsl=True), ADVICE, "No NVIDIA card", "wsl --shutdown"),
        (without_driver(hardware.NO_PACKAGE, "failed"), PROBLEM, "cannot be seen", "pip install"),
        (without_driver(hardware.MISMATCH, "failed"), PROBLEM, "does not work", "Restart the machine."),
        (without_driver(hardware.NO_PERMISSION, "failed"), PROBLEM, "does not work", "/dev/nvidia"),
        (without_driver(hardware.NOT_LOADED, "failed"), PROBLEM, "does not work", "modprobe"),
        (without_driver(hardware.NO_FUNCTION, "failed"), PROBLEM, "does not work", "install NVIDIA's driver"),
        (without_driver(0, "not answering"), PROBLEM, "does not answer", "dmesg"),
        (replace(GOOD, cards=()), PROBLEM, "finds no card", "power cables"),
    ],
)
def test_no_card_that_can_be_used(machine: Machine, level: str, title: str, todo: str) -> None:
    finding = next(f for f in told(machine) if f.about == "driver")
    assert (finding.level, finding.about) == (level, "driver")
    assert title in finding.title and todo in finding.what_to_do
    assert machine.driver.words in finding.detail or machine.system.nvidia_devices
    assert next(doctor.requirements(machine)).level == PROBLEM


def test_graphics_of_others_and_macs() -> None:
    assert "AMD and Intel graphics are not used" in only(without_driver(other_cards=("AMD", "Intel"))).detail
    mac = without_driver(os="Darwin", machine="arm64")
    assert [f for f in told(mac) if f.about == "driver"] == []


# The cards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "title"),
    [("lost", "has disappeared"), ("not answering", "does not answer"), ("failed", "answers with errors")],
)
def test_a_card_that_is_gone_is_a_problem_and_the_other_is_looked_at(state: str, title: str) -> None:
    gone = replace(CARD, index=1).without_values(state, "These words.")
    findings = told(replace(GOOD, cards=(replace(CARD, total_bytes=12 * GIB), gone)))
    assert [(f.level, f.card) for f in findings] == [(PROBLEM, 1), (ADVICE, 0)]
    assert title in findings[0].title and findings[0].detail == "These words."
    # A driver that hangs is told once, not for each card.
    hanging = replace(GOOD, driver=Driver("not answering", "Hangs."), cards=(gone,))
    assert [f.about for f in told(hanging)] == ["driver"]


@pytest.mark.parametrize(
    ("total", "level", "words"),
    [
        (24564 << 20, OK, "32 billion"), (23028 << 20, OK, "32 billion"), (16376 << 20, ADVICE, "enough"),
        (8188 << 20, ADVICE, "enough"), (8000 << 20, ADVICE, "enough"), (6144 << 20, ADVICE, "Small models fit"),
        (4096 << 20, PROBLEM, "Hardly any"),
    ],
)  # fmt: skip
def test_the_memory_of_a_card(total: int, level: str, words: str) -> None:
    machine = with_card(total_bytes=total)
    finding = next(f for f in examine(machine).findings if " has " in f.title)
    assert finding.level == level and words in finding.detail
    row = next(doctor.requirements(machine))
    assert row.level == (PROBLEM if total < 7 * GIB else level) and "RTX 4090" in row.found


def test_a_small_card_beside_a_large_one_is_no_problem() -> None:
    small = replace(CARD, index=1, total_bytes=2 * GIB)
    assert only(replace(GOOD, cards=(CARD, small))).level == ADVICE
    assert only(with_card(total_bytes=None, used_bytes=None, others_bytes=None)).what_to_do.startswith(
        "Say with --vram"
    )


@pytest.mark.parametrize(
    ("capability", "level", "words"),
    [
        ((5, 2), PROBLEM, "too old"), ((6, 1), ADVICE, "neither"), ((7, 0), ADVICE, "neither"),
        ((7, 5), ADVICE, "runs exllamav2"), ((8, 0), "", ""), (None, "", ""),
    ],
)  # fmt: skip
def test_what_a_card_can_run(capability, level: str, words: str) -> None:
    machine = with_card(capability=capability)
    if not level:
        assert told(machine) == []
        return
    finding = only(machine)
    assert finding.level == level and words in finding.title
    assert ("processor" in finding.what_to_do) == (words != "runs exllamav2")


def test_other_programs_are_named_with_their_memory() -> None:
    programs = tuple(CardProcess(n, f"game{n}", n * GIB, False) for n in range(5, 0, -1))
    mine = CardProcess(9, "python worker.py", 3 * GIB, True)
    finding = only(
        with_card(used_bytes=18 * GIB, ours_bytes=3 * GIB, others_bytes=15 * GIB, processes=(*programs, mine))
    )
    assert (finding.level, finding.card) == (ADVICE, 0) and "15 GB" in finding.title
    assert finding.detail == "By size: game5 (5 GB), game4 (4 GB), game3 (3 GB), game2 (2 GB) and 1 more."
    unnamed = only(with_card(others_bytes=15 * GIB))
    assert "does not name" in unnamed.detail
    sizeless = only(with_card(others_bytes=15 * GIB, processes=(CardProcess(1, "game.exe", None, False),)))
    assert sizeless.detail == "By size: game.exe."
    assert told(with_card(others_bytes=GIB)) == []  # a desktop


def test_memory_that_cannot_be_told_apart() -> None:
    machine = with_card(ours_bytes=None, others_bytes=None, used_bytes=9 * GIB)
    assert "told apart" in only(machine).title
    boxed = replace(machine, system=replace(GOOD.system, container="Docker"))
    assert "inside a container" in only(boxed).detail
    assert told(with_card(ours_bytes=None, others_bytes=None)) == []


@pytest.mark.parametrize(
    ("name", "limit", "watts"),
    [
        ("NVIDIA GeForce RTX 4090", 450, 360), ("NVIDIA GeForce RTX 4090", 360, 0), ("NVIDIA GeForce RTX 4090", 300, 0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 450, 0), ("NVIDIA GeForce RTX 4090 D", 425, 0),
        ("NVIDIA GeForce RTX 3090", 350, 280), ("NVIDIA GeForce RTX 3090 Ti", 450, 0), ("NVIDIA H100", 700, 0),
        ("NVIDIA GeForce RTX 4090", None, 0),
    ],
)  # fmt: skip
def test_advice_on_the_power_limit(name: str, limit: float | None, watts: int) -> None:
    machine = with_card(name=name, power_limit_w=limit, index=2)
    if not watts:
        assert told(machine) == []
        return
    finding = only(machine)
    assert f"`sudo nvidia-smi -i 2 -pl {watts}`" in finding.what_to_do and finding.level == ADVICE
    assert ("1 to 2 %" in finding.detail) == ("4090" in name)
    assert ("estimate" in finding.detail) == ("4090" not in name)  # only one of them was measured
    assert "Turntable never changes it." in finding.what_to_do


def test_no_advice_below_what_a_card_allows_and_no_sudo_in_windows() -> None:
    assert told(with_card(power_limit_w=450, power_least_w=400)) == []
    machine = replace(with_card(power_limit_w=450), system=replace(GOOD.system, wsl=True))
    assert "sudo" not in only(machine).what_to_do


@pytest.mark.parametrize(
    ("link", "level", "words"),
    [
        (Pcie(1, 16, 4, 16, 4), OK, "PCIe 4 x16"),  # idle: the current generation says nothing
        (Pcie(4, 8, 4, 16, 4), ADVICE, "8 of 16 PCIe lanes"),
        (Pcie(4, 4, 4, 16, 4), ADVICE, "4 of 16 PCIe lanes"),
        (Pcie(4, 8, 4, 8, 4), OK, "PCIe 4 x8"),  # a card that has only eight
        (Pcie(3, 4, 3, 4, 4), ADVICE, "slow link"),
        (Pcie(2, 16, 2, 16, 4), ADVICE, "slow link"),
        (Pcie(3, 16, 3, 16, 4), OK, "PCIe 3 x16"),
        (Pcie(None, 16, None, 16, None), None, ""),
        (Pcie(), None, ""),
    ],
)
def test_the_link_is_judged_by_width_and_greatest_generation(link: Pcie, level: str | None, words: str) -> None:
    findings = [f for f in examine(with_card(pcie=link)).findings if re.search("PCIe|link", f.title)]
    if level is None:
        assert findings == []
        return
    assert findings[0].level == level and words in findings[0].title


def test_a_measured_link_is_told() -> None:
    finding = only(with_card(pcie=Pcie(4, 8, 4, 16, 4), host_to_device_bytes_per_s=12e9))
    assert "Measured: 12.0 GB/s" in finding.detail and "at least 1.5 s" in finding.detail


def test_a_hot_card() -> None:
    finding = only(with_card(slowed_by=("power limit", "heat"), temperature_c=88))
    assert finding.detail == "By heat at 88 °C." and "fans" in finding.what_to_do
    assert only(with_card(slowed_by=("power supply",), temperature_c=None)).detail == "By power supply."
    assert told(with_card(slowed_by=("power limit",))) == []


def test_a_card_in_parts() -> None:
    assert "MIG" in only(with_card(mig=True)).title


# Engines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "level", "todo"),
    [
        ("ready", OK, ""), ("installing", OK, ""), ("untested", ADVICE, "engines test exllamav2"),
        ("broken", PROBLEM, "engines install exllamav2"), ("failed", PROBLEM, "engines install exllamav2"),
        ("absent", ADVICE, "engines install exllamav2"),
    ],
)  # fmt: skip
def test_engines(state: str, level: str, todo: str) -> None:
    engine = EngineState("exllamav2", "ExLlamaV2", state, "0.3.2", "Why." if state in ("broken", "failed") else "")
    finding = next(f for f in examine(GOOD, [engine]).findings if f.about == "engine")
    assert (finding.level, finding.what_to_do) == (level, f"python app.py {todo}" if todo else "")
    assert "0.3.2" in finding.title and ("Why." in finding.detail) == (state in ("broken", "failed"))


def test_an_engine_is_recommended_only_where_it_would_run() -> None:
    absent = [EngineState("exllamav2", "ExLlamaV2", "absent"), EngineState("exllamav3", "ExLlamaV3", "absent")]
    old = replace(GOOD, driver=Driver("ok", version="550.1", cuda=(12, 4)))
    for machine in (without_driver(), old, with_card(capability=(6, 1)), with_card(capability=None)):
        assert [f for f in told(machine, *absent) if f.about == "engine"] == []
    turing = [f.title for f in told(with_card(capability=(7, 5)), *absent) if f.about == "engine"]
    assert turing == ["ExLlamaV2 is not installed"]
    assert only(GOOD, EngineState("other", "Other", "broken")).level == PROBLEM
    assert told(GOOD, EngineState("other", "Other", "absent")) == []


# The rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "level"),
    [(Memory(62 * GIB, 50 * GIB), OK), (Memory(31 * GIB, 20 * GIB), OK), (Memory(15 * GIB, 9 * GIB), ADVICE),
     (Memory(8 * GIB, 6 * GIB), PROBLEM), (Memory(0, 0), ADVICE)],
)  # fmt: skip
def test_ram(memory: Memory, level: str) -> None:
    machine = replace(GOOD, memory=memory)
    found = [f for f in examine(machine).findings if f.about == "memory"]
    assert [f.level for f in found] == [level]
    assert next(row for row in doctor.requirements(machine) if row.name == "RAM").level == level


def test_ram_that_is_short_limited_or_spoken_for() -> None:
    assert "Only 2 GB of RAM" in only(replace(GOOD, memory=Memory(62 * GIB, 2 * GIB))).title
    limited = replace(GOOD, memory=Memory(20 * GIB, 18 * GIB, limited=True))
    assert "limit of the container" in only(limited).detail
    wsl = replace(GOOD, memory=Memory(20 * GIB, 18 * GIB), system=replace(GOOD.system, wsl=True))
    assert ".wslconfig" in only(wsl).detail
    assert "--pinned-memory" in only(GOOD, pinned_bytes=60 * GIB).what_to_do
    assert told(replace(GOOD, cards=(), driver=Driver("ok")), pinned_bytes=60 * GIB)[0].about == "driver"
    assert "WSL page-locks less" in {f.title[:19] for f in told(wsl, pinned_bytes=GIB)}
    strict = replace(GOOD, system=replace(GOOD.system, overcommit_never=True))
    assert only(strict).what_to_do == "`sudo sysctl vm.overcommit_memory=0`"


@pytest.mark.parametrize(
    ("disk", "level", "words"),
    [
        (Disk("/m", 10**12, 10**12, "NVMe"), OK, "an NVMe disk"),
        (Disk("/m", 10**12, 10**12, "SSD", speed=SLOW), ADVICE, "is slow"),
        (Disk("/m", 10**12, 10**12, "virtual disk", speed=replace(SLOW, bytes_per_s=3e9)), OK, "a virtual disk"),
        (Disk("/m", 10**12, 10**12, "hard disk"), PROBLEM, "is slow"),
        (Disk("/m", 10**12, 10**12, "hard disk", speed=SLOW), ADVICE, "is slow"),
        (Disk("/m", 10**12, 10**12, "network"), ADVICE, "is slow"),
        (Disk("/m", 10**12, 10**12, "network", speed=replace(SLOW, bytes_per_s=3e9)), OK, "a fast disk"),
        (Disk("/m", 10**12, 10**12, "shared folder"), ADVICE, "is slow"),
        (Disk("/m", 10**12, 10**12, "SSD", speed=replace(SLOW, method="cached")), OK, "an SSD"),
        (Disk("/m", 10**12, 15 * 10**9, "NVMe"), PROBLEM, "15 GB are free"),
        (Disk("/m", 10**12, 60 * 10**9, "NVMe"), ADVICE, "60 GB are free"),
        (Disk("/m", words="No answer."), PROBLEM, "does not answer"),
    ],
)
def test_disks(disk: Disk, level: str, words: str) -> None:
    machine = replace(GOOD, disk=disk)
    found = next(f for f in examine(machine).findings if f.about == "disk" and words in f.title)
    assert found.level == level
    assert ("--models-dir" in found.what_to_do) == (level != OK and disk.kind != "SSD")
    if disk.speed and disk.speed.method == "direct" and level == ADVICE:
        assert "0.20 GB/s, 90 s for a model of 18 GB" in found.detail


def test_a_disk_of_unknown_kind_is_not_judged() -> None:
    assert told(replace(GOOD, disk=Disk("/m", None, None))) == []
    wsl = replace(GOOD, disk=Disk("/mnt/c", 10**12, 10**12, "shared folder"), system=replace(GOOD.system, wsl=True))
    assert "not /mnt/c" in only(wsl).what_to_do


def test_processors() -> None:
    old = replace(GOOD, cpu=Cpu("Old", 32, 16, 32, avx2=False))
    assert only(old).title == "The processor lacks AVX2"
    assert told(replace(old, system=replace(GOOD.system, machine="aarch64"))) == []
    assert told(replace(GOOD, cpu=Cpu("Unknown", 32, 16, 32))) == []
    small = only(replace(GOOD, cpu=Cpu("Small", 4, 4, 4)))
    assert small.title == "4 processor cores"
    boxed = only(replace(GOOD, cpu=Cpu("Large", 32, 16, 2.5)))
    assert boxed.title.startswith("2.5 processor cores of 32, by affinity")


@pytest.mark.parametrize(
    ("python", "bits", "level"),
    [((3, 10, 0), 64, OK), ((3, 13, 9), 64, OK), ((3, 14, 0), 64, ADVICE), ((3, 9, 1), 64, PROBLEM),
     ((3, 12, 0), 32, PROBLEM)],
)  # fmt: skip
def test_python(python: tuple[int, int, int], bits: int, level: str) -> None:
    found = examine(replace(GOOD, system=replace(GOOD.system, python=python, bits=bits))).findings
    assert [f.level for f in found if f.about == "system"] == [level]


def test_windows() -> None:
    assert "WSL 2" in only(replace(GOOD, system=replace(GOOD.system, os="Windows"))).what_to_do


# The report ------------------------------------------------------------------------------------------------------


BAD = replace(
    GOOD, memory=Memory(8 * GIB, 6 * GIB),
    cards=(replace(CARD, power_limit_w=450.0, host_to_device_bytes_per_s=24e9),
           replace(CARD, index=1).without_values("lost", "Gone."), Card(2, "NVIDIA Bare")),
)  # fmt: skip


def test_the_report_holds_everything() -> None:
    examination = examine(BAD)
    text = format_report(BAD, examination)
    for row in examination.requirements:
        assert row.name in text and row.found in text
    for finding in examination.findings:
        assert finding.title in text
        assert finding.what_to_do.split(".")[0][:30] in text
    assert "\x1b" not in text
    assert (
        "24 GB, 23 GB free, ours 0 GB, others 0.5 GB, 20 W of 450 W, 41 °C, PCIe 4 x16, 24.0 GB/s to the card" in text
    )
    assert "1  NVIDIA GeForce RTX 4090: Gone." in text
    assert text.endswith("Something does not work as it is; see the top of the findings.\n")
    assert "Nothing is broken" in format_report(GOOD, examine(with_card(total_bytes=12 * GIB)))
    assert "  none" in format_report(without_driver(), examine(without_driver()))


def test_the_report_in_colour_and_in_ascii() -> None:
    examination = examine(BAD)
    colour = format_report(BAD, examination, colour=True)
    assert "\x1b[31m✗\x1b[0m" in colour
    assert re.sub(r"\x1b\[\d+m", "", colour) == format_report(BAD, examination)
    plain = format_report(BAD, examination, ascii_only=True)
    assert plain.isascii() and "!! " in plain and "-> " in plain and "?" not in plain


@pytest.mark.parametrize("width", [10, 60, 200])
def test_the_report_keeps_to_the_terminals_width(width: int) -> None:
    text = format_report(BAD, examine(BAD), width=width).split("Findings")[1]
    long = [line for line in text.splitlines() if len(line) > max(width, 40) and line.startswith("    ")]
    assert all(len(line.split()) <= 2 for line in long)  # a word that is longer than the line stays whole


def test_names_of_other_programs_do_not_drive_the_terminal() -> None:
    evil = CardProcess(1, "\x1b]0;owned\x07\x1b[2Jgame\n✓", 20 * GIB, False)
    machine = with_card(name="NVIDIA \x1b[31mred\r", others_bytes=20 * GIB, processes=(evil,))
    text = format_report(machine, examine(machine))
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    coloured = format_report(machine, examine(machine), colour=True)
    ours = "|".join(re.escape(f"{colour}{doctor.MARKS[level]}\x1b[0m") for level, colour in doctor.COLOURS.items())
    assert "\x1b" in coloured and "\x1b" not in re.sub(ours, "", coloured)


def test_as_data() -> None:
    data = json.loads(json.dumps(examine(BAD).to_dict()))
    assert data["level"] == PROBLEM
    assert set(data["findings"][0]) == {"level", "about", "title", "detail", "what_to_do", "card"}
    assert data["requirements"][0]["minimum"] == "8 GB (6 GB for small models)"
    assert Examination((), ()).level == OK


maybe = st.none() | st.integers(0, 1 << 42)
cards = st.builds(
    Card, st.integers(0, 7), st.sampled_from(["", "NVIDIA GeForce RTX 4090", "\x1b[2J", "T4"]), st.just("GPU-1"),
    st.sampled_from(["ok", "lost", "failed", "not answering"]), st.text(max_size=5), total_bytes=maybe,
    used_bytes=maybe, free_bytes=maybe, ours_bytes=maybe, others_bytes=maybe, power_w=st.none() | st.floats(0, 900),
    power_limit_w=st.none() | st.floats(0, 900),
    capability=st.none() | st.tuples(st.integers(3, 12), st.integers(0, 9)),
    pcie=st.builds(Pcie, *[st.none() | st.integers(0, 16)] * 5), mig=st.booleans(),
    slowed_by=st.lists(st.sampled_from(["heat", "power limit"])).map(tuple),
    host_to_device_bytes_per_s=st.none() | st.floats(1e6, 1e12),
)  # fmt: skip
machines = st.builds(
    Machine, st.just(0.0),
    st.builds(
        Driver, st.sampled_from(["ok", "missing", "failed", "not answering"]), st.text(max_size=5),
        st.integers(-1, 30), st.sampled_from(["", "580.1", "x"]), st.none() | st.just((11, 0)),
    ),
    st.lists(cards, max_size=3).map(tuple),
    st.builds(Cpu, st.text(max_size=5), st.integers(1, 99), st.integers(1, 99), st.floats(0.1, 99)),
    st.builds(Memory, st.integers(0, 1 << 42), st.integers(0, 1 << 42), st.booleans()),
    st.builds(Disk, st.text(max_size=5), maybe, maybe, st.sampled_from(["", "NVMe", "SSD", "hard disk", "network"])),
    st.builds(
        System, st.sampled_from(["Linux", "Windows", "Darwin", ""]), st.text(max_size=5), st.text(max_size=5),
        st.just((3, 12, 0)), st.just(64), st.sampled_from(["", "Docker"]), st.booleans(), st.integers(0, 3),
        st.booleans(),
    ),
)  # fmt: skip


@given(machines, st.integers(0, 1 << 42), st.booleans())
def test_any_machine_gets_a_report(machine: Machine, pinned: int, ascii_only: bool) -> None:
    engines = [EngineState("exllamav2", "ExLlamaV2", "absent")]
    examination = examine(machine, engines, pinned)
    text = format_report(machine, examination, ascii_only=ascii_only)
    assert all(c.isprintable() or c == "\n" for c in text) and (text.isascii() or not ascii_only)
    assert all(f.title and f.level in (OK, ADVICE, PROBLEM) and f.about in doctor.ABOUTS for f in examination.findings)
    assert all(f.what_to_do for f in examination.findings if f.level == PROBLEM)


def test_the_doctor_over_the_drivers_own_library(tmp_path: Path) -> None:
    """Two cards, one busy with another program, one that vanishes between two looks."""
    library, plan = nvml.build(tmp_path / "lib"), nvml.two_cards(tmp_path / "plan")
    code = """
import sys
from pathlib import Path
from modules.doctor import examine, format_report
from modules.hardware import Hardware
hardware = Hardware(Path(sys.argv[1]), retry_s=0.0)
for _ in range(2):
    machine = hardware.snapshot(0)
    print(format_report(machine, examine(machine)), flush=True)
    print("again", flush=True)
    sys.stdin.readline()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, **nvml.environment(library, plan.file), "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    first = "".join(iter(child.stdout.readline, "again\n"))
    plan.faults = [(0, "*", nvml.GPU_IS_LOST)]
    plan.write()
    second, _ = child.communicate("\n\n", timeout=30)
    assert child.returncode == 0
    assert "`sudo nvidia-smi -i 0 -pl 360`" in first and "Other programs hold 9 GB of Card 1 (RTX 3060)" in first
    assert "blender (8.8 GB)" in first and "--background" not in first
    assert "✗ Card 0 (RTX 4090) has disappeared" in second and "168 W of 170 W" in second


# The command ------------------------------------------------------------------------------------


def run_doctor(tmp_path: Path, plan: nvml.Plan | None, *arguments: str, **variables: str):
    """`python app.py doctor` as a person starts it, with the stand-in's cards or with no driver at all."""
    library = nvml.build(tmp_path / "lib") if plan else tmp_path / "none"
    if plan is None:
        library.mkdir()
        (library / "libnvidia-ml.so.1").write_text("no library")  # as good as none, also where there is a real one
    known = {**nvml.environment(library, plan.file if plan else tmp_path), "PYTHONIOENCODING": "utf-8", **variables}
    return subprocess.run(
        [sys.executable, str(ROOT / "app.py"), "--data-dir", str(tmp_path / "data"), "doctor", *arguments],
        capture_output=True, text=True, encoding="utf-8", cwd=tmp_path, env={**os.environ, **known}, timeout=100,
        check=False,
    )  # fmt: skip


def test_the_command_tells_cards_findings_and_the_disks_speed(tmp_path: Path) -> None:
    models = tmp_path / "data" / "models" / "maker" / "model"
    models.mkdir(parents=True)
    (models / "model.safetensors").write_bytes(os.urandom(1 << 20) * 8)
    done = run_doctor(tmp_path, nvml.two_cards(tmp_path / "plan"))
    assert done.stderr == "" and "\x1b" not in done.stdout
    assert "22 W of 450 W, 41 °C, 210 MHz, PCIe 4 x16" in done.stdout
    assert "`sudo nvidia-smi -i 0 -pl 360`" in done.stdout and "blender (8.8 GB)" in done.stdout
    assert re.search(r"Disk of the models .*, [\d.]+ GB/s", done.stdout)
    assert "llama.cpp" in done.stdout and "ExLlamaV2" in done.stdout


def test_the_command_as_data(tmp_path: Path) -> None:
    done = run_doctor(tmp_path, nvml.two_cards(tmp_path / "plan"), "--json")
    said = json.loads(done.stdout)
    assert done.returncode == (said["level"] == "problem")
    assert [card["name"] for card in said["machine"]["cards"]] == [card["name"] for card in (RTX_4090, RTX_3060)]
    assert said["machine"]["cards"][1]["others_bytes"] == 9216 << 20
    assert 0 <= said["machine"]["cpu"]["load"] <= 1  # two looks lie behind it
    assert said["machine"]["disk"]["speed"] is None  # there is no model to read


def test_the_command_ends_though_the_driver_hangs(tmp_path: Path) -> None:
    plan = nvml.two_cards(tmp_path / "plan")
    plan.faults = [("*", "*", "hang")]
    plan.write()
    done = run_doctor(tmp_path, plan)
    assert done.returncode == 1 and "✗ The NVIDIA driver does not answer" in done.stdout
    assert "sudo dmesg" in done.stdout and "RAM" in done.stdout


def test_the_command_without_a_driver_in_ascii(tmp_path: Path) -> None:
    done = run_doctor(tmp_path, None, PYTHONIOENCODING="ascii")
    assert done.stdout.isascii() and "-- No NVIDIA card" in done.stdout and done.stderr == ""
