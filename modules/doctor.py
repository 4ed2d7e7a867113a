"""What a machine means for Turntable: pure comparison with the requirements, in plain words, with what to do.

Takes a Machine as hardware.py reports it and the states of the engines; returns
findings and the table of requirements, and formats both for a terminal. Measures
nothing, starts nothing and changes nothing: commands are text for a person to run.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from modules.hardware import (
    GIB,
    MISMATCH,
    NO_FUNCTION,
    NO_LIBRARY,
    NO_PACKAGE,
    NO_PERMISSION,
    NOT_LOADED,
    Card,
    Machine,
)

OK, ADVICE, PROBLEM = "ok", "advice", "problem"
MARKS = {OK: "✓", ADVICE: "•", PROBLEM: "✗"}
COLOURS = {OK: "\x1b[32m", ADVICE: "\x1b[33m", PROBLEM: "\x1b[31m"}
LEAST_VRAM, SMALL_VRAM, GOOD_VRAM = 8, 6, 24  # in the GB that cards are sold with, which are GiB
LEAST_RAM, GOOD_RAM = 16, 32
LEAST_CORES, GOOD_CORES = 8, 16  # threads that the system counts
LEAST_CUDA, TORCH_CUDA = (11, 7), (13, 0)
# What the installed PyTorch asks for; environments.py refuses less, and a test holds the two together.
TORCH_DRIVER = 580
ENGINE_CARDS = {"exllamav2": (7, 5), "exllamav3": (8, 0)}
LEAST_CARD = (6, 0)  # Pascal
PYTHONS = ((3, 10), (3, 13))
# Sizes are told in round numbers and counted after the firmware, the graphics and ECC have taken their part.
CARD_SLACK, RAM_SLACK = 0.92, 0.88
FREE_TIGHT, FREE_GOOD = 20 * 10**9, 100 * 10**9  # one model of 32 billion weights at 4.25 bpw has 18 GB
SLOW_DISK = 0.4e9  # bytes per second; below it a model of 18 GB takes 45 s and more
EXAMPLE_BYTES = 18 * 10**9
PINNED_REST = 4 * GIB  # what page-locked copies leave to the rest of the computer
# Watts to go down to. Only the 4090's loss is a figure that people measured, so only it is told as one.
POWER_ADVICE = (
    ("RTX 4090", 360, "loses 1 to 2 % of its speed"),
    ("RTX 3090", 280, "loses a few percent of its speed (an estimate, by the 4090's)"),
    ("RTX 5090", 460, "loses a few percent of its speed (an estimate, by the 4090's)"),
)
ABOUTS = ("driver", "card", "engine", "memory", "disk", "processor", "system")


@dataclass(frozen=True)
class Finding:
    """One thing worth saying. level: ok, advice or problem; about: the part of the machine; card: its index, or -1."""

    level: str
    about: str
    title: str
    detail: str
    what_to_do: str = ""
    card: int = -1


@dataclass(frozen=True)
class Requirement:
    """A row of the table: what is asked for, what is recommended, and what this machine has."""

    name: str
    minimum: str
    recommended: str
    found: str
    level: str


@dataclass(frozen=True)
class EngineState:
    """An engine as environments.py sees it: state absent, broken, installing, untested, failed or ready."""

    name: str
    title: str
    state: str
    version: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Examination:
    """What the doctor says."""

    requirements: tuple[Requirement, ...]
    findings: tuple[Finding, ...]

    @property
    def level(self) -> str:
        """The worst one."""
        levels = {f.level for f in self.findings}
        return next((level for level in (PROBLEM, ADVICE) if level in levels), OK)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for --json."""
        return {"level": self.level, **asdict(self)}


def examine(machine: Machine, engines: Sequence[EngineState] = (), pinned_bytes: int = 0) -> Examination:
    """Compare a machine with the requirements. pinned_bytes: RAM that may be page-locked (--pinned-memory)."""
    findings = [
        *_driver(machine), *_cards(machine), *_engines(machine, engines), *_memory(machine, pinned_bytes),
        *_disk(machine), *_processor(machine), *_system(machine),
    ]  # fmt: skip
    order = (PROBLEM, ADVICE, OK)
    findings.sort(key=lambda f: (order.index(f.level), ABOUTS.index(f.about), f.card))
    return Examination(tuple(requirements(machine)), tuple(findings))


def exit_code(examination: Examination) -> int:
    """For the terminal: 1 where something does not work as it is, 0 else; advice is no failure."""
    return int(examination.level == PROBLEM)


# The table ----------------------------------------------------------------------------------------


def requirements(machine: Machine) -> Iterator[Requirement]:
    """Each requirement beside what was found."""
    best = max((card.total_bytes or 0 for card in machine.working_cards), default=0)
    sizes = " + ".join(
        f"{gib(card.total_bytes)} ({short_name(card)})" if card.total_bytes else short_name(card)
        for card in machine.working_cards
    )
    yield Requirement(
        "Memory of the card", f"{LEAST_VRAM} GB ({SMALL_VRAM} GB for small models)", f"{GOOD_VRAM} GB",
        sizes or "no NVIDIA card that answers", _two(best, LEAST_VRAM * GIB, GOOD_VRAM * GIB, CARD_SLACK),
    )  # fmt: skip
    cuda = machine.driver.cuda
    yield Requirement(
        "CUDA of the driver", dotted(LEAST_CUDA), f"{dotted(TORCH_CUDA)} (driver {TORCH_DRIVER})",
        f"{dotted(cuda)} (driver {machine.driver.version})" if cuda else "no driver that answers",
        PROBLEM if not cuda or cuda < LEAST_CUDA else OK if cuda >= TORCH_CUDA else ADVICE,
    )  # fmt: skip
    total = machine.memory.total_bytes
    yield Requirement(
        "RAM", f"{LEAST_RAM} GB", f"{GOOD_RAM} GB", gib(total) if total else "not known",
        _two(total, LEAST_RAM * GIB, GOOD_RAM * GIB, RAM_SLACK) if total else ADVICE,
    )  # fmt: skip
    cores = machine.cpu.usable
    level = OK if cores >= GOOD_CORES else ADVICE  # fewer cores make it slower, nothing breaks
    found = f"{cores:g} of {machine.cpu.logical}" if cores < machine.cpu.logical else f"{machine.cpu.logical}"
    yield Requirement("Processor cores", f"{LEAST_CORES}", f"{GOOD_CORES}", f"{found} ({machine.cpu.model})", level)
    disk = machine.disk
    speed = f", {disk.speed.bytes_per_s / 1e9:.1f} GB/s" if disk.speed else ""
    good = {"NVMe": OK, "memory": OK, "hard disk": PROBLEM, "network": PROBLEM, "shared folder": PROBLEM}
    yield Requirement(
        "Disk of the models", "SSD", "NVMe", (disk.kind or "kind not known") + speed, good.get(disk.kind, ADVICE)
    )


def _two(value: float, least: float, good: float, slack: float) -> str:
    return PROBLEM if value < least * slack else ADVICE if value < good * slack else OK


# The cards ------------------------------------------------------------------------------------------


def _driver(machine: Machine) -> Iterator[Finding]:
    driver, system = machine.driver, machine.system
    if driver.state == "ok":
        yield from _versions(machine)
    elif driver.state == "not answering":
        yield Finding(
            PROBLEM, "driver", "The NVIDIA driver does not answer", driver.words,
            "Look for errors with `sudo dmesg | grep -i -E 'nvrm|xid'`, then restart the machine. The rest of this "
            "page and models on the processor go on working.",
        )  # fmt: skip
    elif system.os == "Darwin":
        yield Finding(
            OK, "driver", "A Mac", "There are no NVIDIA cards here; llama.cpp uses the Mac's own graphics and its RAM."
        )
    else:
        yield _driver_trouble(machine)


def _driver_trouble(machine: Machine) -> Finding:
    driver, system = machine.driver, machine.system
    there = system.nvidia_devices > 0
    if driver.code == NO_PACKAGE:
        return Finding(
            PROBLEM, "driver", "Cards cannot be seen", driver.words, "python -m pip install -r requirements.txt"
        )
    if driver.code != NO_LIBRARY:
        return Finding(PROBLEM, "driver", "The NVIDIA driver does not work", driver.words, _cure(machine))
    if there and system.nouveau:
        return Finding(
            PROBLEM, "driver", "The card runs on the nouveau driver",
            "An NVIDIA card is in this machine, but models need NVIDIA's own driver.", _cure(machine),
        )  # fmt: skip
    if there:
        return Finding(
            PROBLEM, "driver", "The NVIDIA driver is missing",
            f"{_count(system.nvidia_devices, 'NVIDIA card')} in this machine, but no driver.", _cure(machine),
        )  # fmt: skip
    others = f" The {' and '.join(system.other_cards)} graphics are not used." if system.other_cards else ""
    return Finding(
        ADVICE, "driver", "No NVIDIA card",
        f"{driver.words} Models run on the processor with llama.cpp: small ones well, large ones slowly.{others}",
        _cure(machine),
    )  # fmt: skip


def _cure(machine: Machine) -> str:
    """What gets a driver to work here."""
    code, system = machine.driver.code, machine.system
    if system.container and code in (NO_LIBRARY, NOT_LOADED, NO_PERMISSION):
        return (
            f"This runs in a container ({system.container}). If the host has a card: install nvidia-container-toolkit "
            "on the host and start the container with `--gpus all`."
        )
    if system.wsl and code in (NO_LIBRARY, NOT_LOADED, NO_FUNCTION):
        return (
            "Under WSL the driver is the Windows one: install or update NVIDIA's driver in Windows, run "
            "`wsl --shutdown` there, and install no Linux driver in WSL."
        )
    if code == MISMATCH:
        return "Restart the machine."
    if code == NO_PERMISSION:
        return "Look at the rights of /dev/nvidia*, or add this user to the group that owns them."
    if code == NOT_LOADED and system.os == "Linux":
        return (
            "Try `sudo modprobe nvidia`. If it is refused, Secure Boot may block the driver, or it was not built for "
            "this kernel: install the driver again."
        )
    linux = "with your distribution's driver tool (Ubuntu: `sudo ubuntu-drivers install`)"
    where = linux if system.os == "Linux" else "from nvidia.com"
    return f"If there is an NVIDIA card, install NVIDIA's driver {where}, and restart."


def _versions(machine: Machine) -> Iterator[Finding]:
    driver = machine.driver
    said = f"Driver {driver.version or 'of unknown version'}, which knows CUDA {dotted(driver.cuda)}."
    update = "Update NVIDIA's driver in Windows." if machine.system.wsl else "Update the NVIDIA driver, and restart."
    if driver.cuda is not None and driver.cuda < LEAST_CUDA:
        yield Finding(
            PROBLEM, "driver", "The NVIDIA driver is too old", f"{said} The least is CUDA {dotted(LEAST_CUDA)}.",
            update,
        )  # fmt: skip
    elif driver.major is not None and driver.major < TORCH_DRIVER:
        yield Finding(
            ADVICE, "driver", f"The ExLlama engines need driver {TORCH_DRIVER} or newer",
            f"{said} The PyTorch of these engines is built for CUDA {dotted(TORCH_CUDA)}.", update,
        )  # fmt: skip
    else:
        yield Finding(OK, "driver", "The NVIDIA driver answers", said)
    if not machine.cards:
        yield Finding(
            PROBLEM, "driver", "The driver finds no card", f"{said} It lists no card.",
            "Look whether the card sits firmly and has its power cables, and whether the firmware shows it.",
        )  # fmt: skip


def _cards(machine: Machine) -> Iterator[Finding]:
    for card in machine.cards:
        if not card.works:
            if machine.driver.state == "ok":  # else it is the driver's finding
                yield _dead(card)
            continue
        yield from _ability(card)
        yield from _size(card, machine)
        yield from _others(card, machine)
        yield from _power(card, machine)
        yield from _link(card)
        yield from _slowed(card)


def _dead(card: Card) -> Finding:
    titles = {"lost": "has disappeared", "not answering": "does not answer", "failed": "answers with errors"}
    return Finding(
        PROBLEM, "card", f"{_named(card)} {titles[card.state]}", card.words,
        "Other cards and the processor go on. Look for the reason with `sudo dmesg | grep -i -E 'nvrm|xid'`; power "
        "supply, riser cable, heat and a loose seat are the usual ones. A restart of the machine brings it back.",
        card.index,
    )  # fmt: skip


def _ability(card: Card) -> Iterator[Finding]:
    if card.mig:
        yield Finding(
            ADVICE, "card", f"{_named(card)} is split into parts (MIG)",
            "A part has less memory than the card, and the driver does not tell everything about it.",
            "To use the whole card: `sudo nvidia-smi -mig 0`.", card.index,
        )  # fmt: skip
    if card.capability is None:
        return
    said = f"Its compute capability is {dotted(card.capability)}"
    able = [name for name, least in ENGINE_CARDS.items() if card.capability >= least]
    if card.capability < LEAST_CARD:
        yield Finding(
            PROBLEM, "card", f"{_named(card)} is too old", f"{said}; the least is {dotted(LEAST_CARD)} (Pascal).",
            "Models run on the processor with llama.cpp.", card.index,
        )  # fmt: skip
    elif len(able) < len(ENGINE_CARDS):
        missing = " and ".join(
            f"{name} needs {dotted(least)}" for name, least in ENGINE_CARDS.items() if name not in able
        )
        yield Finding(
            ADVICE, "card", f"{_named(card)} runs {' and '.join(able) or 'neither of the ExLlama engines'}",
            f"{said}; {missing}.", "" if able else "Models run on the processor with llama.cpp.", card.index,
        )  # fmt: skip


def _size(card: Card, machine: Machine) -> Iterator[Finding]:
    if not card.total_bytes:
        yield Finding(
            ADVICE, "card", f"{_named(card)} does not tell its memory", "The driver gives no figure for it.",
            "Say with --vram-budget how much models may take.", card.index,
        )  # fmt: skip
        return
    size = gib(card.total_bytes)
    level = _two(card.total_bytes, LEAST_VRAM * GIB, GOOD_VRAM * GIB, CARD_SLACK)
    if level == OK:
        fits = "Models of 32 billion weights at 4.25 bpw fit."
        yield Finding(OK, "card", f"{_named(card)} has {size}", fits, "", card.index)
    elif level == ADVICE:
        yield Finding(
            ADVICE, "card", f"{_named(card)} has {size}",
            f"That is enough; with {GOOD_VRAM} GB models of 32 billion weights fit.",
            "Each preset has variants for smaller cards, and the first that fits is taken.", card.index,
        )  # fmt: skip
    else:
        small = card.total_bytes >= SMALL_VRAM * GIB * CARD_SLACK
        bigger = any(_enough(other) for other in machine.working_cards)
        yield Finding(
            ADVICE if small or bigger else PROBLEM, "card", f"{_named(card)} has {size}",
            f"The least is {LEAST_VRAM} GB. " + ("Small models fit." if small else "Hardly any model fits on it."),
            "Take the smallest variants, or models for the processor.", card.index,
        )  # fmt: skip


def _enough(card: Card) -> bool:
    return (card.total_bytes or 0) >= LEAST_VRAM * GIB * CARD_SLACK


def _others(card: Card, machine: Machine) -> Iterator[Finding]:
    """Other programs with more than a desktop's share of the card."""
    held = card.others_bytes
    if held is None:
        if card.used_bytes and card.used_bytes > GIB:
            yield Finding(
                ADVICE, "card", f"On {_named(card)} ours and others' memory cannot be told apart",
                f"{gib(card.used_bytes)} are in use, and "
                + ("inside a container" if machine.system.container else "here")
                + " the driver does not say by which program.",
                "", card.index,
            )  # fmt: skip
        return
    if held < max(1.5 * GIB, 0.1 * (card.total_bytes or 0)):
        return
    programs = [p for p in card.processes if not p.ours]
    names = [f"{p.name} ({gib(p.used_bytes)})" if p.used_bytes else p.name for p in programs[:4]]
    more = f" and {len(programs) - 4} more" if len(programs) > 4 else ""
    by = ", ".join(names) + more if names else "programs that the driver does not name"
    yield Finding(
        ADVICE, "card", f"Other programs hold {gib(held)} of {_named(card)}", f"By size: {by}.",
        f"Close what you do not need; models have {gib(card.free_bytes)} now.", card.index,
    )  # fmt: skip


def _power(card: Card, machine: Machine) -> Iterator[Finding]:
    for name, watts, loses in POWER_ADVICE:
        full = re.search(rf"{name}(?! (?:D|Ti|SUPER|Laptop)\b)", card.name)  # those have limits of their own
        limit = card.power_limit_w
        if not full or limit is None or limit <= watts or (card.power_least_w or 0) > watts:
            continue
        command = f"nvidia-smi -i {card.index} -pl {watts}"
        how = (
            f"In a Windows terminal as administrator: `{command}`."
            if machine.system.wsl or machine.system.os == "Windows"
            else f"`sudo {command}`"
        )
        yield Finding(
            ADVICE, "card", f"{_named(card)} could run cooler",
            f"Its power limit is {limit:.0f} W. At {watts} W it {loses}, and is quieter and cooler.",
            f"{how} It holds until the next restart. Turntable never changes it.", card.index,
        )  # fmt: skip
        return


def _link(card: Card) -> Iterator[Finding]:
    """By width and greatest generation: the current speed falls while the card idles, and says nothing."""
    link = card.pcie
    speed = card.host_to_device_bytes_per_s or link.bytes_per_s
    if not link.width or not link.width_max or speed is None:
        return
    took = f"A model of {EXAMPLE_BYTES / 1e9:.0f} GB takes at least {EXAMPLE_BYTES / speed:.1f} s to the card."
    if card.host_to_device_bytes_per_s:
        took = f"Measured: {speed / 1e9:.1f} GB/s. {took}"
    what = f"PCIe {link.generation_max} x{link.width}"
    if link.width < min(16, link.width_max):
        yield Finding(
            ADVICE, "card", f"{_named(card)} has {link.width} of {link.width_max} PCIe lanes", f"{what}. {took}",
            "If the card is in a slot with fewer lanes, move it to the one nearest to the processor; look that no "
            "other card or M.2 disk shares the lanes. Some laptops widen the link only under load.", card.index,
        )  # fmt: skip
    elif link.width <= 4 or (link.generation_max or 9) < min(3, link.card_generation_max or 3):
        yield Finding(
            ADVICE, "card", f"{_named(card)} has a slow link", f"{what}. {took}",
            "Only switching models is slower; answers are not.", card.index,
        )  # fmt: skip
    elif link.generation_max and link.card_generation_max and link.generation_max < link.card_generation_max:
        yield Finding(
            OK, "card", f"{_named(card)} is linked by {what}",
            f"The card could do PCIe {link.card_generation_max}, the slot does {link.generation_max}. {took}", "",
            card.index,
        )  # fmt: skip
    else:
        yield Finding(OK, "card", f"{_named(card)} is linked by {what}", took, "", card.index)


def _slowed(card: Card) -> Iterator[Finding]:
    bad = [reason for reason in card.slowed_by if reason != "power limit"]  # at its limit a card is as it should be
    if bad:
        heat = f" at {card.temperature_c} °C" if card.temperature_c is not None else ""
        yield Finding(
            ADVICE, "card", f"{_named(card)} is slowed down", f"By {' and '.join(bad)}{heat}.",
            "Look at the fans, the dust and the case's air; a lower power limit helps against heat. For the power "
            "supply: its cables and its rating.", card.index,
        )  # fmt: skip


def _engines(machine: Machine, engines: Sequence[EngineState]) -> Iterator[Finding]:
    driver_does = machine.driver.state == "ok" and (machine.driver.major or 0) >= TORCH_DRIVER
    for engine in engines:
        title = f"{engine.title} {engine.version}".strip()
        again = f"python app.py engines install {engine.name}"
        if engine.state == "ready":
            how = "Installed, and its self-test passed." if engine.name in ENGINE_CARDS else "It needs no card."
            yield Finding(OK, "engine", f"{title} is ready", how)
        elif engine.state == "installing":
            yield Finding(OK, "engine", f"{title} is being installed", engine.problem)
        elif engine.state == "untested":
            yield Finding(
                ADVICE, "engine", f"{title} was not tried on a card", engine.problem or "It is installed.",
                f"python app.py engines test {engine.name}",
            )  # fmt: skip
        elif engine.state in ("broken", "failed"):
            what = "is not complete" if engine.state == "broken" else "failed its self-test"
            yield Finding(PROBLEM, "engine", f"{title} {what}", engine.problem, again)
        elif driver_does and any(
            (card.capability or (0, 0)) >= ENGINE_CARDS.get(engine.name, (99, 0)) for card in machine.working_cards
        ):
            yield Finding(ADVICE, "engine", f"{title} is not installed", "This machine's card can run it.", again)


# The rest of the machine ------------------------------------------------------------------------------


def _memory(machine: Machine, pinned_bytes: int) -> Iterator[Finding]:
    memory, system = machine.memory, machine.system
    if not memory.total_bytes:
        yield Finding(ADVICE, "memory", "The RAM's size is not known", "This system did not say.")
        return
    size = gib(memory.total_bytes)
    where = ""
    if memory.limited:
        where = " That is the limit of the container or of the service, not the computer's."
    elif system.wsl:
        where = " WSL takes half of the computer's unless .wslconfig says otherwise."
    level = _two(memory.total_bytes, LEAST_RAM * GIB, GOOD_RAM * GIB, RAM_SLACK)
    words = {
        PROBLEM: f"The least is {LEAST_RAM} GB.", OK: "That is enough for several models.",
        ADVICE: f"That is enough; with {GOOD_RAM} GB several models stay at hand.",
    }  # fmt: skip
    todo = {
        PROBLEM: "Take small models; the bundled demo models run anywhere.",
        ADVICE: "With several large models, more RAM makes switching faster.", OK: "",
    }  # fmt: skip
    yield Finding(level, "memory", f"{size} of RAM", words[level] + where, todo[level])
    if memory.available_bytes < min(4 * GIB, memory.total_bytes // 4):
        yield Finding(
            ADVICE, "memory", f"Only {gib(memory.available_bytes)} of RAM are free",
            "Models are read through the RAM, and models for the processor live in it.",
            "Close what you do not need.",
        )  # fmt: skip
    if machine.working_cards and pinned_bytes > max(0, memory.total_bytes - PINNED_REST):
        yield Finding(
            PROBLEM, "memory", f"{gib(pinned_bytes)} may be page-locked, of {size}",
            "Page-locked memory cannot be swapped out, and the rest of the computer would starve.",
            "Lower --pinned-memory; a third of the RAM is the default.",
        )  # fmt: skip
    elif machine.working_cards and pinned_bytes and system.wsl:
        yield Finding(
            ADVICE,
            "memory",
            "WSL page-locks less memory than asked for",
            "Windows limits it; where it is refused, switching models goes on without it, more slowly.",
        )
    if system.overcommit_never:
        yield Finding(
            ADVICE, "memory", "The kernel promises no memory that it does not have",
            "vm.overcommit_memory is 2; CUDA and large model files reserve more than they use, and may be refused.",
            "`sudo sysctl vm.overcommit_memory=0`",
        )  # fmt: skip


def _disk(machine: Machine) -> Iterator[Finding]:
    disk, system = machine.disk, machine.system
    if disk.words:
        yield Finding(
            PROBLEM, "disk", "The models' disk does not answer", disk.words,
            "Look at the disk or the network, or choose another folder with --models-dir.",
        )  # fmt: skip
        return
    if disk.free_bytes is not None and disk.free_bytes < FREE_GOOD:
        tight = disk.free_bytes < FREE_TIGHT
        yield Finding(
            PROBLEM if tight else ADVICE, "disk", f"{disk.free_bytes / 1e9:.0f} GB are free in {disk.path}",
            "That is less than one large model." if tight else "A few large models fill that.",
            "Free some space, delete models on the Models page, or choose another disk with --models-dir.",
        )  # fmt: skip
    elif disk.free_bytes is not None:
        yield Finding(OK, "disk", f"{disk.free_bytes / 1e9:.0f} GB are free", f"In {disk.path}.")
    speed = disk.speed.bytes_per_s if disk.speed and disk.speed.method != "cached" else None
    took = f" Measured: {speed / 1e9:.2f} GB/s, {EXAMPLE_BYTES / speed:.0f} s for a model of 18 GB." if speed else ""
    slow = {
        "hard disk": "A hard disk reads about 0.15 GB/s.",
        "network": "The models lie on a network disk.",
        "shared folder": "The models lie in a folder shared with another system.",
    }
    if disk.kind in slow and (speed is None or speed < 2.5 * SLOW_DISK):
        wsl = " Under WSL that is the Linux file system, not /mnt/c." if system.wsl else ""
        yield Finding(
            ADVICE if disk.kind != "hard disk" or speed else PROBLEM, "disk", "The models' disk is slow",
            slow[disk.kind] + took, f"Put the models on an SSD of this machine, with --models-dir.{wsl}",
        )  # fmt: skip
    elif speed is not None and speed < SLOW_DISK:
        yield Finding(
            ADVICE, "disk", "The models' disk is slow", took.strip(), "An NVMe disk reads 10 times as fast and more."
        )
    elif disk.kind or speed:
        kinds = {
            "NVMe": "an NVMe disk",
            "SSD": "an SSD",
            "virtual disk": "a virtual disk",
            "memory": "a disk in the RAM",
        }
        yield Finding(OK, "disk", f"The models lie on {kinds.get(disk.kind, 'a fast disk')}", took.strip())


def _processor(machine: Machine) -> Iterator[Finding]:
    cpu, system = machine.cpu, machine.system
    if cpu.avx2 is False and system.machine.lower() in ("x86_64", "amd64"):
        yield Finding(
            PROBLEM, "processor", "The processor lacks AVX2",
            f"{cpu.model}: llama.cpp is built for AVX2 and ends with 'illegal instruction'.",
            "Use the ExLlama engines on a card; for the processor, build xllamacpp from source.",
        )  # fmt: skip
    if cpu.usable < LEAST_CORES:
        limit = f" of {cpu.logical}, by affinity or the container's limit" if cpu.usable < cpu.logical else ""
        yield Finding(
            ADVICE, "processor", f"{cpu.usable:g} processor cores{limit}",
            f"{LEAST_CORES} are the least that is recommended; models on the card hardly notice.",
            "Prefer small models where they run on the processor.",
        )  # fmt: skip
    else:
        yield Finding(OK, "processor", f"{cpu.usable:g} processor cores", cpu.model)


def _system(machine: Machine) -> Iterator[Finding]:
    system = machine.system
    version = ".".join(map(str, system.python))
    low, high = PYTHONS
    if system.bits != 64:
        yield Finding(PROBLEM, "system", "Python is a 32-bit one", "No engine runs in it.", "Install a 64-bit Python.")
    elif not low <= system.python[:2] <= high:
        yield Finding(
            ADVICE if system.python[:2] > high else PROBLEM, "system", f"Python {version} was not tried",
            f"Turntable is tested with {dotted(low)} to {dotted(high)}.", f"Install Python {dotted(high)}.",
        )  # fmt: skip
    else:
        yield Finding(OK, "system", f"Python {version}", f"{system.os} {system.release}, {system.machine}.")
    if system.os == "Windows":
        yield Finding(
            ADVICE, "system", "Windows: the ExLlama engines are set up on Linux only",
            "llama.cpp runs here on the processor.", "For NVIDIA cards, run Turntable in WSL 2.",
        )  # fmt: skip


# Words ----------------------------------------------------------------------------------------------------


def gib(size_bytes: int | None) -> str:
    """In the GB that memory is sold in."""
    if size_bytes is None:
        return "an unknown part"
    value = size_bytes / GIB
    if 0 < value < 0.1:
        return f"{size_bytes / (1 << 20):.0f} MB"
    return f"{value:.0f} GB" if value >= 9.95 or value == round(value) else f"{value:.1f} GB"


def dotted(version: tuple[int, ...] | None) -> str:
    """(13, 0) as 13.0."""
    return ".".join(map(str, version)) if version else "unknown"


def short_name(card: Card) -> str:
    """Without the maker, as people call it."""
    return re.sub(r"^NVIDIA (?:GeForce )?", "", card.name)


def _named(card: Card) -> str:
    return f"Card {card.index} ({short_name(card)})"


def _count(number: int, what: str) -> str:
    return f"There is one {what}" if number == 1 else f"There are {number} {what}s"


# The terminal ------------------------------------------------------------------------------------------------


def format_report(
    machine: Machine, examination: Examination, *, colour: bool = False, ascii_only: bool = False, width: int = 100
) -> str:
    """The report as text. colour is for a terminal; ascii_only for one that shows nothing else."""
    lines = ["Requirements", *_table(examination.requirements, colour), "", "Cards"]
    lines += [f"  {_printable(line)}" for card in machine.cards for line in _card_lines(card)] or ["  none"]
    lines += ["", "Findings"]
    for finding in examination.findings:
        lines.append(f"  {_mark(finding.level, colour)} {_printable(finding.title)}")
        for words, sign in ((finding.detail, " "), (finding.what_to_do, "→")):
            if words:
                lines += textwrap.wrap(
                    _printable(words), max(40, width), initial_indent=f"    {sign} ", subsequent_indent=" " * 6,
                    break_long_words=False, break_on_hyphens=False,
                )  # fmt: skip
    ends = {
        OK: "Nothing to do.", ADVICE: "Nothing is broken; the advice makes it better.",
        PROBLEM: "Something does not work as it is; see the top of the findings.",
    }  # fmt: skip
    lines += ["", ends[examination.level]]
    text = "\n".join(lines) + "\n"
    return _ascii(text) if ascii_only else text


def _table(rows: Sequence[Requirement], colour: bool) -> Iterator[str]:
    heads = ("", "minimum", "recommended", "this machine")
    cells = [heads, *((r.name, r.minimum, r.recommended, _printable(r.found)) for r in rows)]
    widths = [max(len(cell[n]) for cell in cells) for n in range(3)]
    for row, level in zip(cells, ("", *(r.level for r in rows)), strict=True):
        mark = _mark(level, colour) if level else " "
        first = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        yield f"  {mark} " + "  ".join([*first, row[3]]).rstrip()


def _card_lines(card: Card) -> Iterator[str]:
    yield f"{card.index}  {card.name}" + ("" if card.works else f": {card.words}")
    if not card.works:
        return
    told = [f"{gib(card.total_bytes)}, {gib(card.free_bytes)} free"] if card.total_bytes else []
    if card.ours_bytes is not None and card.others_bytes is not None:
        told.append(f"ours {gib(card.ours_bytes)}, others {gib(card.others_bytes)}")
    if card.power_w is not None:
        told.append(f"{card.power_w:.0f} W" + (f" of {card.power_limit_w:.0f} W" if card.power_limit_w else ""))
    if card.temperature_c is not None:
        told.append(f"{card.temperature_c} °C")
    if card.clocks.graphics_mhz is not None:
        told.append(f"{card.clocks.graphics_mhz} MHz")
    if card.pcie.width:
        told.append(f"PCIe {card.pcie.generation_max or '?'} x{card.pcie.width}")
    if card.host_to_device_bytes_per_s:
        told.append(f"{card.host_to_device_bytes_per_s / 1e9:.1f} GB/s to the card")
    yield "   " + ", ".join(told)


def _mark(level: str, colour: bool) -> str:
    return f"{COLOURS[level]}{MARKS[level]}\x1b[0m" if colour else MARKS[level]


def _printable(text: str) -> str:
    """Names come from other programs and must not drive the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _ascii(text: str) -> str:
    for fancy, plain in {"✓": "ok", "•": "--", "✗": "!!", "→": "->", "°": "", "…": "..."}.items():
        text = text.replace(fancy, plain)
    return text.encode("ascii", "replace").decode()
