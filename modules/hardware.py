"""The machine: NVIDIA cards through NVML, processor, memory, disk, and the last minutes of them.

NVML comes by nvidia-ml-py, never through torch. A driver can hang inside a call, and
nothing can end such a call: every call runs on a thread that is given up after a time
limit, one thread for the driver and one for each card, and none is started while the
last one hangs. A card that hangs or falls off the bus is reported as such, the others
go on. What a machine does not tell (laptops, MIG, WSL, containers) is None.

Knows no model, no engine and no page. Which processes are ours is handed in. It
reports; what is good or bad about a machine is doctor.py's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

MIB, GIB = 1 << 20, 1 << 30
INTERVAL_S, KEPT_S = 1.0, 300.0
LIMIT_S = 3.0  # for one call; a driver that nobody used for a while takes a second or two to wake up
RETRY_S = 15.0  # between two tries with a driver that refused, or for a card that was lost
READ_BLOCK_BYTES, READ_THREADS = 4 * MIB, 4  # an NVMe disk is fast only when several reads are under way
# Codes of nvml.h that decide what is said.
NO_PERMISSION, NOT_LOADED, NO_LIBRARY, NO_FUNCTION, LOST, RESET, MISMATCH, NOT_FOUND = 4, 9, 12, 13, 15, 16, 18, 28
NOT_SUPPORTED = 3
UNINITIALIZED = 1
CARD_IS_GONE = (UNINITIALIZED, NOT_LOADED, LOST, RESET, NOT_FOUND)
DRIVER_WORDS = {
    NO_LIBRARY: ("missing", "No NVIDIA driver was found: its library libnvidia-ml is not installed."),
    NOT_LOADED: ("failed", "The NVIDIA driver is installed, but it is not running."),
    MISMATCH: ("failed", "The NVIDIA driver was updated while it was running, and its parts do not match."),
    NO_PERMISSION: ("failed", "This user may not talk to the NVIDIA driver."),
    NO_FUNCTION: ("failed", "The NVIDIA driver is too old to be asked."),
}
NO_PACKAGE = -1
SLOWED_BY = {0x4: "power limit", 0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat", 0x80: "power supply"}
NETWORK = ("nfs", "cifs", "smb", "sshfs", "ceph", "gluster", "lustre", "afs", "fuse.s3")
SHARED = ("9p", "drvfs", "virtiofs", "vboxsf", "fuse.vmhgfs")
VENDORS = {"0x1002": "AMD", "0x8086": "Intel"}


# What a machine is ----------------------------------------------------------------------------


@dataclass(frozen=True)
class CardProcess:
    """A program with memory on a card. used_bytes None: the driver does not say (Windows, WSL)."""

    pid: int
    name: str
    used_bytes: int | None
    ours: bool


@dataclass(frozen=True)
class Clocks:
    graphics_mhz: int | None = None
    memory_mhz: int | None = None
    graphics_max_mhz: int | None = None
    memory_max_mhz: int | None = None


@dataclass(frozen=True)
class Pcie:
    """The link to the card. The current values fall while the card idles; the greatest ones are card and slot together.

    card_generation_max is what the card alone could do.
    """

    generation: int | None = None
    width: int | None = None
    generation_max: int | None = None
    width_max: int | None = None
    card_generation_max: int | None = None

    @property
    def bytes_per_s(self) -> float | None:
        """What the link carries under load, one way, by the standard: rate x width, less the line code."""
        lane = {1: 0.25e9, 2: 0.5e9, 3: 8e9 / 8 * 128 / 130, 4: 16e9 / 8 * 128 / 130, 5: 32e9 / 8 * 128 / 130}
        if not self.generation_max or not self.width:
            return None
        return lane.get(min(self.generation_max, 5), 0.0) * self.width


@dataclass(frozen=True)
class Card:
    """One NVIDIA card. state: ok, not answering, lost or failed, with words for the last three.

    Every number is None where the card or the driver does not tell. used_bytes is what programs use, without
    reserved_bytes, which the driver keeps for itself. utilisation is 0 to 1.
    """

    index: int
    name: str
    uuid: str = ""
    state: str = "ok"
    words: str = ""
    total_bytes: int | None = None
    used_bytes: int | None = None
    free_bytes: int | None = None
    reserved_bytes: int | None = None
    ours_bytes: int | None = None
    others_bytes: int | None = None
    processes: tuple[CardProcess, ...] = ()
    power_w: float | None = None
    power_limit_w: float | None = None
    power_default_w: float | None = None
    power_least_w: float | None = None
    temperature_c: int | None = None
    utilisation: float | None = None
    clocks: Clocks = field(default_factory=Clocks)
    slowed_by: tuple[str, ...] = ()
    pcie: Pcie = field(default_factory=Pcie)
    capability: tuple[int, int] | None = None
    mig: bool = False
    host_to_device_bytes_per_s: float | None = None
    memory_bus_bits: int | None = None

    @property
    def bandwidth_gb_s(self) -> float | None:
        """Of its own memory, in 10^9 bytes a second: two transfers in each cycle of the clock that NVML tells."""
        if not self.memory_bus_bits or not self.clocks.memory_max_mhz:
            return None
        return self.memory_bus_bits / 8 * 2 * self.clocks.memory_max_mhz / 1000

    @property
    def works(self) -> bool:
        return self.state == "ok"

    def without_values(self, state: str, words: str) -> Card:
        """What is still known of a card that says nothing any more."""
        return Card(
            self.index, self.name, self.uuid, state, words, total_bytes=self.total_bytes, capability=self.capability,
            power_limit_w=self.power_limit_w,
        )  # fmt: skip


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver. state: ok, missing, not answering or failed; code is NVML's, 0 where it gave none."""

    state: str
    words: str = ""
    code: int = 0
    version: str = ""
    cuda: tuple[int, int] | None = None

    @property
    def major(self) -> int | None:
        found = re.match(r"\d+", self.version)
        return int(found[0]) if found else None


@dataclass(frozen=True)
class Cpu:
    """The processor. usable: cores that this process may use, by affinity and by the container. load is 0 to 1."""

    model: str
    logical: int
    physical: int
    usable: float
    load: float | None = None
    avx2: bool | None = None


@dataclass(frozen=True)
class Memory:
    """RAM, already cut down to the container's limit; limited says that there is one."""

    total_bytes: int
    available_bytes: int
    limited: bool = False
    swap_total_bytes: int = 0
    swap_free_bytes: int = 0


@dataclass(frozen=True)
class ReadSpeed:
    """How fast a file was read. method: direct, cache dropped, or cached (then it may be the RAM's speed)."""

    bytes_per_s: float
    read_bytes: int
    took_s: float
    method: str
    file: str


@dataclass(frozen=True)
class Disk:
    """Where the models lie. kind: NVMe, SSD, hard disk, virtual disk, network, shared folder, memory or empty."""

    path: str
    total_bytes: int | None = None
    free_bytes: int | None = None
    kind: str = ""
    words: str = ""
    speed: ReadSpeed | None = None


@dataclass(frozen=True)
class System:
    """The surroundings. nvidia_devices are on the PCI bus, with or without a driver; other_cards are vendors."""

    os: str
    release: str
    machine: str
    python: tuple[int, int, int]
    bits: int
    container: str = ""
    wsl: bool = False
    nvidia_devices: int = 0
    nouveau: bool = False
    other_cards: tuple[str, ...] = ()
    overcommit_never: bool = False


@dataclass(frozen=True)
class Machine:
    """Everything at one moment. at_s is the time of day in seconds since 1970."""

    at_s: float
    driver: Driver
    cards: tuple[Card, ...]
    cpu: Cpu
    memory: Memory
    disk: Disk
    system: System

    @property
    def working_cards(self) -> tuple[Card, ...]:
        return tuple(card for card in self.cards if card.works)


@dataclass(frozen=True)
class CardSample:
    """One card in a sample of the history; used_bytes is ours and others' together."""

    uuid: str
    state: str
    used_bytes: int | None
    ours_bytes: int | None
    utilisation: float | None
    power_w: float | None
    temperature_c: int | None
    graphics_mhz: int | None


@dataclass(frozen=True)
class Sample:
    """One second of the history."""

    at_s: float
    cpu_load: float | None
    memory_used_bytes: int
    cards: tuple[CardSample, ...]

    @staticmethod
    def of(machine: Machine) -> Sample:
        cards = tuple(
            CardSample(
                c.uuid, c.state, c.used_bytes if c.works else None, c.ours_bytes, c.utilisation, c.power_w,
                c.temperature_c, c.clocks.graphics_mhz,
            )
            for c in machine.cards
        )  # fmt: skip
        memory = machine.memory
        return Sample(machine.at_s, machine.cpu.load, memory.total_bytes - memory.available_bytes, cards)


# Calls that may never come back -----------------------------------------------------------------


class _NoAnswer(Exception):
    """A call is still under way after its time limit."""

    def __init__(self, for_s: float) -> None:
        super().__init__(f"no answer for {for_s:.0f} s")
        self.for_s = for_s


class _Call:
    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.done = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None
        self.began = time.monotonic()

    def run(self) -> None:
        try:
            self.value = self.work()
        except BaseException as error:  # handed to whoever waits; a thread has nobody else to tell
            self.error = error
        finally:
            self.done.set()


class _Patient:
    """Runs calls on a thread, one at a time, and stops waiting after a limit; a call that hangs keeps the thread."""

    def __init__(self, name: str, limit_s: float) -> None:
        self._name, self._limit_s = name, limit_s
        self._call: _Call | None = None
        self._is_new = False

    @property
    def hangs(self) -> bool:
        return self._call is not None and not self._call.done.is_set()

    def start(self, work: Callable[[], Any]) -> None:
        """Begin; does nothing while the last call still hangs."""
        self._is_new = not self.hangs
        if self._is_new:
            self._call = _Call(work)
            threading.Thread(target=self._call.run, name=self._name, daemon=True).start()

    def result(self) -> Any:
        """What the call returned or raised. Raises _NoAnswer after the limit, at once where start() did nothing."""
        assert self._call is not None
        # What hung may end at any moment, but it was another call, and its value answers another question.
        left_s = max(0.0, self._call.began + self._limit_s - time.monotonic())
        if not (self._is_new and self._call.done.wait(left_s)):
            raise _NoAnswer(time.monotonic() - self._call.began)
        if self._call.error is not None:
            raise self._call.error
        return self._call.value

    def ask(self, work: Callable[[], Any]) -> Any:
        self.start(work)
        return self.result()


# NVML -----------------------------------------------------------------------------------------


class _CardGone(Exception):
    """A card that NVML does not talk to any more. state: lost or failed."""

    def __init__(self, state: str, words: str) -> None:
        super().__init__(words)
        self.state, self.words = state, words


class _Nvml:
    """NVML as nvidia-ml-py gives it. Any method may block for ever, so that only threads of _Patient call them."""

    def __init__(self, root: Path, in_container: bool, retry_s: float) -> None:
        self._root, self._in_container, self._retry_s = root, in_container, retry_s
        self._lib: Any = None
        self._is_open = False
        self._refused: Driver | None = None
        self._tried = 0.0

    def begin(self, again: bool) -> tuple[Driver, int]:
        """The driver and how many cards it has; again starts anew, which shows cards that have come or gone."""
        if self._refused is not None and time.monotonic() - self._tried < self._retry_s:
            return self._refused, 0
        if again and self._is_open and time.monotonic() - self._tried >= self._retry_s:
            self.close()
        try:
            if not self._is_open:
                self._open()
            version = self._ask("nvmlSystemGetDriverVersion") or ""
            cuda = self._ask("nvmlSystemGetCudaDriverVersion_v2")
            # 12040 is 12.4.
            driver = Driver("ok", "", 0, version, (cuda // 1000, cuda % 1000 // 10) if cuda else None)
            return driver, int(self._lib.nvmlDeviceGetCount())
        except ImportError:
            words = "The Python package nvidia-ml-py is missing, so that cards cannot be seen."
            self._refused = Driver("failed", words, NO_PACKAGE)
        except Exception as error:
            code = getattr(error, "value", 0)
            state, words = DRIVER_WORDS.get(code, ("failed", f"The NVIDIA driver reports an error: {error}."))
            self.close()
            self._refused = Driver(state, words, code)
        return self._refused, 0

    def _open(self) -> None:
        import pynvml

        self._lib, self._tried = pynvml, time.monotonic()
        pynvml.nvmlInit()
        self._is_open, self._refused = True, None

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(self._lib.NVMLError):
                self._lib.nvmlShutdown()

    def card(self, index: int, ours: frozenset[int]) -> Card:
        """Everything about one card. Raises _CardGone."""
        try:
            handle = self._lib.nvmlDeviceGetHandleByIndex(index)
            card = self._identity(index, handle)
            return self._with_use(self._with_values(card, handle), handle, ours)
        except self._lib.NVMLError as error:
            if error.value == LOST:
                raise _CardGone("lost", "The card has fallen off the bus (NVML: GPU is lost).") from None
            raise _CardGone("failed", f"The card answers with an error: {error}.") from None

    def _identity(self, index: int, handle: Any) -> Card:
        capability = self._ask("nvmlDeviceGetCudaComputeCapability", handle)
        mig = self._ask("nvmlDeviceGetMigMode", handle)
        return Card(
            index, self._ask("nvmlDeviceGetName", handle) or f"NVIDIA card {index}",
            self._ask("nvmlDeviceGetUUID", handle) or f"card-{index}",
            capability=tuple(capability) if capability else None, mig=bool(mig and mig[0]),
        )  # fmt: skip

    def _with_values(self, card: Card, handle: Any) -> Card:
        watts = [
            None if milliwatts is None else milliwatts / 1000
            for milliwatts in (
                self._ask("nvmlDeviceGetPowerUsage", handle),
                self._ask("nvmlDeviceGetPowerManagementLimit", handle),
                self._ask("nvmlDeviceGetPowerManagementDefaultLimit", handle),
                (self._ask("nvmlDeviceGetPowerManagementLimitConstraints", handle) or [None])[0],
            )
        ]
        rates = self._ask("nvmlDeviceGetUtilizationRates", handle)
        reasons = self._first(
            ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"), handle
        )
        return replace(
            card, power_w=watts[0], power_limit_w=watts[1], power_default_w=watts[2], power_least_w=watts[3],
            temperature_c=self._first(("nvmlDeviceGetTemperature", "nvmlDeviceGetTemperatureV"), handle, 0),
            utilisation=None if rates is None else rates.gpu / 100,
            slowed_by=tuple(dict.fromkeys(words for bit, words in SLOWED_BY.items() if (reasons or 0) & bit)),
            clocks=Clocks(
                self._ask("nvmlDeviceGetClockInfo", handle, 0), self._ask("nvmlDeviceGetClockInfo", handle, 2),
                self._ask("nvmlDeviceGetMaxClockInfo", handle, 0), self._ask("nvmlDeviceGetMaxClockInfo", handle, 2),
            ),
            pcie=Pcie(
                self._ask("nvmlDeviceGetCurrPcieLinkGeneration", handle),
                self._ask("nvmlDeviceGetCurrPcieLinkWidth", handle),
                self._ask("nvmlDeviceGetMaxPcieLinkGeneration", handle),
                self._ask("nvmlDeviceGetMaxPcieLinkWidth", handle),
                self._ask("nvmlDeviceGetGpuMaxPcieLinkGeneration", handle),
            ),
            memory_bus_bits=self._ask("nvmlDeviceGetMemoryBusWidth", handle),
        )  # fmt: skip

    def _with_use(self, card: Card, handle: Any, ours: frozenset[int]) -> Card:
        """Memory, and whose it is."""
        # The first form counts what the driver keeps for itself as used; drivers before 510 know no other.
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle, getattr(self._lib, "nvmlMemory_v2", 0x02000028))
        memory = memory or self._ask("nvmlDeviceGetMemoryInfo", handle, needed=True)
        if memory is None:
            return card
        if not 0 <= int(memory.used) <= int(memory.total) or not 0 <= int(memory.free) <= int(memory.total):
            return card  # a driver that is out of its mind: better no figure than terabytes to plan with
        found = self._processes(handle, ours)
        mine, others = _shares(int(memory.used), found, ours, self._in_container and not self._visible(found))
        return replace(
            card, total_bytes=int(memory.total), used_bytes=int(memory.used), free_bytes=int(memory.free),
            reserved_bytes=getattr(memory, "reserved", None), ours_bytes=mine, others_bytes=others,
            processes=tuple(found or ()),
        )  # fmt: skip

    def _processes(self, handle: Any, ours: frozenset[int]) -> list[CardProcess] | None:
        """Programs on the card, the largest first; None where the driver does not tell."""
        lists = [
            self._first((f"nvmlDeviceGet{kind}RunningProcesses_v3", f"nvmlDeviceGet{kind}RunningProcesses_v2"), handle)
            for kind in ("Compute", "Graphics")
        ]
        if lists[0] is None and lists[1] is None:
            return None
        sizes: dict[int, int | None] = {}
        for entry in [*(lists[0] or ()), *(lists[1] or ())]:  # a program that does both stands in both, as the same
            known = sizes.get(entry.pid)
            sizes[entry.pid] = max(known or 0, entry.usedGpuMemory) if entry.usedGpuMemory is not None else known
        found = [CardProcess(pid, self._program(pid), size, pid in ours) for pid, size in sizes.items()]
        return sorted(found, key=lambda p: (-(p.used_bytes or 0), p.pid))

    def _program(self, pid: int) -> str:
        """A short name: the program's file, and of an interpreter the script as well. Never its arguments."""
        with contextlib.suppress(OSError):
            words = (self._root / "proc" / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
            name = _last_part(words[0])
            if re.match(r"(python|node|ruby|perl|java)[\d.]*$", name) and len(words) > 1:
                script = words[1] if not words[1].startswith("-") else words[2] if words[1] == "-m" else ""
                name = f"{name} {_last_part(script)}".strip()
            if name:
                return name
        named = self._ask("nvmlSystemGetProcessName", pid) or ""
        return _last_part(named.split(" -")[0]) or f"process {pid}"

    def _visible(self, found: list[CardProcess] | None) -> bool:
        """Are the process ids of this container? The driver may list the host's, or none."""
        return any((self._root / "proc" / str(process.pid)).exists() for process in found or ())

    def _first(self, names: tuple[str, ...], *arguments: Any) -> Any:
        """The newest form that driver and package both know."""
        for name in names:
            value = self._ask(name, *arguments)
            if value is not None:
                return value
        return None

    def _ask(self, name: str, *arguments: Any, needed: bool = False) -> Any:
        """None for what the card does not tell. Raises NVMLError for a card that is gone; needed, for any error."""
        try:
            return getattr(self._lib, name)(*arguments)
        except self._lib.NVMLError as error:
            untold = (NOT_SUPPORTED, NO_PERMISSION, NO_FUNCTION)
            if error.value in CARD_IS_GONE or (needed and error.value not in untold):
                raise
        except (AttributeError, UnicodeDecodeError):
            pass  # a package older than the call, or a name that is no text
        return None


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path)[-1]


def _shares(
    used_bytes: int, found: list[CardProcess] | None, ours: frozenset[int], foreign_ids: bool
) -> tuple[int | None, int | None]:
    """What our processes use and what others use; None, None where it cannot be told."""
    if not ours:
        return 0, used_bytes
    mine = [process for process in found or () if process.ours]
    if found is None or foreign_ids or any(process.used_bytes is None for process in mine):
        return None, None
    total = min(used_bytes, sum(process.used_bytes or 0 for process in mine))
    return total, used_bytes - total


# The one object ----------------------------------------------------------------------------------


def _no_processes() -> Iterable[int]:
    return ()


class Hardware:
    """The machine as it is now, and its last minutes. Thread-safe; no thread runs and no driver is open unless watched.

    models_dir is the folder whose disk is reported; our_pids gives the engines' process ids; root is where /proc and
    /sys lie. A call waits for a driver that hangs at most limit_s twice, and not at all once it is known to hang.
    """

    def __init__(
        self, models_dir: Path, our_pids: Callable[[], Iterable[int]] = _no_processes, *,
        interval_s: float = INTERVAL_S, kept_s: float = KEPT_S, limit_s: float = LIMIT_S, retry_s: float = RETRY_S,
        root: Path = Path("/"),
    ) -> None:  # fmt: skip
        self._models_dir, self._our_pids, self._root = models_dir, our_pids, root
        self._interval_s, self._limit_s = interval_s, limit_s
        self._system = read_system(root)
        self._nvml = _Nvml(root, bool(self._system.container), retry_s)
        self._driver_calls = _Patient("nvml", limit_s)
        self._card_calls: dict[int, _Patient] = {}
        self._disk_calls = _Patient("disk", limit_s)
        self._known: dict[str, Card] = {}  # by uuid, everything that ever answered
        self._places: dict[int, str] = {}  # index to uuid, as it was last
        self._cpu: Cpu | None = None
        self._ticks: tuple[int, int] | None = None
        self._speed: ReadSpeed | None = None
        self._bus_speeds: dict[str, float] = {}
        self._reading = threading.Lock()  # one reading at a time; held for a bounded time
        self._last: Machine | None = None
        self._last_at = -1e9
        self._state = threading.Lock()  # watchers and history; held for moments only
        self._history: deque[Sample] = deque(maxlen=max(2, int(kept_s / interval_s)))
        self._watchers, self._closed = 0, False
        self._sampler: threading.Thread | None = None
        self._wake = threading.Event()

    @property
    def models_dir(self) -> Path:
        """The folder whose disk is reported."""
        return self._models_dir

    # Reading ---------------------------------------------------------------------------

    def snapshot(self, max_age_s: float = 0.5) -> Machine:
        """The machine now, or as it was at most max_age_s ago; while it is watched, as the last sample saw it."""
        with self._state:
            age_s = max(max_age_s, 1.5 * self._interval_s if self._watchers else 0.0)
        with self._reading:
            if self._last is None or time.monotonic() - self._last_at > age_s:
                self._read()
                with self._state:
                    watched = self._watchers > 0
                if not watched:
                    self._let_go()
            assert self._last is not None
            return self._last

    def history(self) -> tuple[Sample, ...]:
        """Samples of the last minutes, oldest first. There is a gap where nobody watched."""
        with self._state:
            return tuple(self._history)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While anybody is inside, one thread samples once an interval. Enters and leaves without waiting."""
        with self._state:
            self._watchers += 1
            if self._sampler is None and not self._closed:
                self._sampler = threading.Thread(target=self._sample, name="hardware", daemon=True)
                self._sampler.start()
        try:
            yield
        finally:
            with self._state:
                self._watchers -= 1
                if not self._watchers:
                    self._wake.set()

    def measure_disk(self, file: Path, limit_s: float = 1.5) -> ReadSpeed:
        """Read a model's file for a moment; snapshots carry the speed from then on. Raises OSError."""
        self._speed = measure_read_speed(file, limit_s)
        self._last_at = -1e9
        return self._speed

    def set_bus_speed(self, uuid: str, bytes_per_s: float) -> None:
        """What an engine measured from page-locked memory to this card."""
        self._bus_speeds[uuid] = bytes_per_s

    def close(self) -> None:
        """Let the driver go; watchers see no new samples from then on."""
        with self._state:
            self._closed, sampler = True, self._sampler
            self._wake.set()
        if sampler is not None:
            sampler.join(2 * self._limit_s + 1)

    def _sample(self) -> None:
        try:
            self._sample_while_watched()
        except BaseException:
            with self._state:
                self._sampler = None  # the next watcher starts a new one
            raise

    def _sample_while_watched(self) -> None:
        while True:
            began = time.monotonic()
            with self._reading:
                self._read()
                assert self._last is not None
                sample = Sample.of(self._last)
            with self._state:
                self._history.append(sample)
            self._wake.wait(max(0.0, self._interval_s - (time.monotonic() - began)))
            with self._reading:
                with self._state:
                    self._wake.clear()
                    if self._watchers and not self._closed:
                        continue
                    self._sampler = None
                self._let_go()
                return

    def _let_go(self) -> None:
        """Close the driver, so that an idle card can sleep; not while a call hangs in it."""
        if not any(calls.hangs for calls in (self._driver_calls, *self._card_calls.values())):
            with contextlib.suppress(_NoAnswer):
                self._driver_calls.ask(self._nvml.close)

    def _read(self) -> None:
        self._disk_calls.start(lambda: read_disk(self._models_dir, self._root))
        driver, cards = self._read_cards()
        cpu, self._ticks = self._read_cpu()
        try:
            disk = self._disk_calls.result()
        except _NoAnswer as silent:
            disk = Disk(str(self._models_dir), words=f"The disk has not answered for {silent.for_s:.0f} s.")
        self._last = Machine(
            time.time(), driver, cards, cpu, read_memory(self._root), replace(disk, speed=self._speed), self._system
        )
        self._last_at = time.monotonic()

    def _read_cpu(self) -> tuple[Cpu, tuple[int, int] | None]:
        if self._cpu is None:
            self._cpu = read_cpu(self._root)
        ticks = _cpu_ticks(self._root)
        load = None
        if ticks and self._ticks and ticks[1] > self._ticks[1]:
            load = 1 - (ticks[0] - self._ticks[0]) / (ticks[1] - self._ticks[1])
            load = min(1.0, max(0.0, load))
        elif ticks is None and hasattr(os, "getloadavg"):
            load = min(1.0, os.getloadavg()[0] / max(1, self._cpu.logical))
        return replace(self._cpu, load=load), ticks or self._ticks

    def _read_cards(self) -> tuple[Driver, tuple[Card, ...]]:
        shaky = bool(self._last and any(card.state in ("lost", "failed") for card in self._last.cards))
        hanging = any(calls.hangs for calls in self._card_calls.values())
        try:
            driver, count = self._driver_calls.ask(lambda: self._nvml.begin(shaky and not hanging))
        except _NoAnswer as silent:
            words = f"The NVIDIA driver has not answered for {silent.for_s:.0f} s."
            return Driver("not answering", words), self._silent("not answering", words)
        if driver.state != "ok":
            return driver, self._silent("lost", driver.words)
        ours = frozenset(self._our_pids())
        for index in range(count):
            calls = self._card_calls.setdefault(index, _Patient(f"nvml-{index}", self._limit_s))
            calls.start(lambda index=index: self._nvml.card(index, ours))  # type: ignore[misc]
        cards = [self._card(index) for index in range(count)]
        for card in cards:
            self._places[card.index] = card.uuid
            if card.works:
                self._known[card.uuid] = card
        seen = {card.uuid for card in cards}
        gone = [card for uuid, card in self._known.items() if uuid not in seen]
        words = "The driver does not list the card any more."
        cards += [card.without_values("lost", words) for card in gone]
        return driver, tuple(sorted(cards, key=lambda card: card.index))

    def _card(self, index: int) -> Card:
        try:
            card: Card = self._card_calls[index].result()
        except _NoAnswer as silent:
            state, words = "not answering", f"The card has not answered for {silent.for_s:.0f} s."
        except _CardGone as gone:
            state, words = gone.state, gone.words
        else:
            return replace(card, host_to_device_bytes_per_s=self._bus_speeds.get(card.uuid))
        uuid = self._places.get(index, f"card-{index}")
        return self._known.get(uuid, Card(index, f"NVIDIA card {index}", uuid)).without_values(state, words)

    def _silent(self, state: str, words: str) -> tuple[Card, ...]:
        return tuple(card.without_values(state, words) for card in self._known.values())


# Processor, memory, surroundings ------------------------------------------------------------------


def _text(path: Path) -> str:
    """The file's text, empty where there is none; the system's own files are short."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_cpu(root: Path = Path("/")) -> Cpu:
    """The processor, without its load."""
    text = _text(root / "proc" / "cpuinfo")
    logical = len(re.findall(r"^processor\s*:", text, re.MULTILINE)) or os.cpu_count() or 1
    named = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    places = re.findall(r"^(physical id|core id)\s*:\s*(\d+)$", text, re.MULTILINE)
    cores = {(a[1], b[1]) for a, b in zip(places[::2], places[1::2], strict=False)}
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    model = named[1].strip() if named else platform.processor() or platform.machine()
    usable: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    quota = _cgroup_cpus(root)
    avx2 = "avx2" in flags[1].split() if flags else None
    return Cpu(model, logical, len(cores) or logical, min(usable, quota) if quota else usable, avx2=avx2)


def _cpu_ticks(root: Path) -> tuple[int, int] | None:
    """Idle and total time of all cores since the start, in the kernel's ticks."""
    fields = re.match(r"cpu\s+([\d ]+)", _text(root / "proc" / "stat"))
    if not fields:
        return None
    ticks = [int(n) for n in fields[1].split()[:8]]  # what follows, the guests' time, is counted in the first two
    return ticks[3] + ticks[4], sum(ticks)


def read_memory(root: Path = Path("/")) -> Memory:
    """RAM as this process may use it."""
    kib = {k: int(v) for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", _text(root / "proc" / "meminfo"), re.MULTILINE)}
    if "MemTotal" not in kib:
        return _memory_elsewhere()
    total, available = kib["MemTotal"] * 1024, kib.get("MemAvailable", kib.get("MemFree", 0)) * 1024
    swap = kib.get("SwapTotal", 0) * 1024, kib.get("SwapFree", 0) * 1024
    limited = False
    for limit, used in _cgroup_limits(root):
        if limit < total:
            total, limited = limit, True
        available = min(available, max(0, limit - used))
    return Memory(total, available, limited, *swap)


def _cgroup_folders(root: Path, kind: str) -> Iterator[Path]:
    """Folders whose limits hold for this process, its own first; version 2, then version 1 of this kind."""
    base = root / "sys" / "fs" / "cgroup"
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        number, kinds, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not kinds:
            top = base
        elif kind in kinds.split(","):
            top = base / kind
        else:
            continue
        folder = top / path.lstrip("/")
        # Within a container the path may be the host's, and only the top is there.
        yield from (place for place in (folder, *folder.parents) if place == top or top in place.parents)


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each level that has a limit; what the kernel can drop at once is not use."""
    for folder in _cgroup_folders(root, "memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        ):  # fmt: skip
            limit, used = _text(folder / limit_name).strip(), _text(folder / used_name).strip()
            if limit.isdigit() and used.isdigit():
                inactive = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                yield int(limit), max(0, int(used) - (int(inactive[1]) if inactive else 0))


def _cgroup_cpus(root: Path) -> float | None:
    """How many cores the container may use at a time; None without a limit."""
    found = []
    for folder in _cgroup_folders(root, "cpu"):
        words = _text(folder / "cpu.max").split() or [
            _text(folder / "cpu.cfs_quota_us").strip(), _text(folder / "cpu.cfs_period_us").strip()
        ]  # fmt: skip
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def parse_vm_stat(text: str, page_bytes: int) -> int:
    """Bytes that macOS can hand out, from `vm_stat`: free, inactive, speculative and purgeable pages."""
    kinds = ("free", "inactive", "speculative", "purgeable")
    said = {kind: re.search(rf"^Pages {kind}:\s+(\d+)\.", text, re.MULTILINE) for kind in kinds}
    size = re.search(r"page size of (\d+) bytes", text)
    return sum(int(found[1]) for found in said.values() if found) * (int(size[1]) if size else page_bytes)


if sys.platform == "win32":

    class _MemoryStatus(ctypes.Structure):
        """MEMORYSTATUSEX of the Windows API."""

        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "available", "page_total", "page_free", "virtual", "virtual_free", "extended")
        ]

    def _memory_elsewhere() -> Memory:
        """RAM of Windows."""
        status = _MemoryStatus()
        status.length = ctypes.sizeof(status)
        if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            return Memory(0, 0)
        swap = max(0, status.page_total - status.total), max(0, status.page_free - status.available)
        return Memory(status.total, status.available, False, *swap)

else:

    def _memory_elsewhere() -> Memory:
        """RAM where there is no /proc, as of a Mac."""
        try:
            page = os.sysconf("SC_PAGE_SIZE")
            total = page * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError):
            return Memory(0, 0)
        try:
            out = subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=2, check=False).stdout
        except (OSError, subprocess.TimeoutExpired):
            return Memory(total, total)
        return Memory(total, min(total, parse_vm_stat(out, page) or total))


def read_system(root: Path = Path("/")) -> System:
    """What surrounds us, read once."""
    bus = root / "sys" / "bus" / "pci" / "devices"
    vendors = [
        _text(device / "vendor").strip()
        for device in (sorted(bus.iterdir()) if bus.is_dir() else ())
        if _text(device / "class").startswith("0x03")
    ]
    version = _text(root / "proc" / "version")
    return System(
        platform.system(), platform.release(), platform.machine(), sys.version_info[:3],
        64 if sys.maxsize > 2**32 else 32, _container(root), "microsoft" in version.lower(), vendors.count("0x10de"),
        (root / "sys" / "module" / "nouveau").is_dir(),
        tuple(dict.fromkeys(VENDORS[vendor] for vendor in vendors if vendor in VENDORS)),
        _text(root / "proc" / "sys" / "vm" / "overcommit_memory").strip() == "2",
    )  # fmt: skip


def _container(root: Path) -> str:
    """The container's kind, or empty outside of one."""
    if (root / ".dockerenv").exists():
        return "Docker"
    if (root / "run" / ".containerenv").exists():
        return "Podman"
    groups = _text(root / "proc" / "1" / "cgroup")
    for mark, kind in (("kubepods", "Kubernetes"), ("docker", "Docker"), ("lxc", "LXC"), ("libpod", "Podman")):
        if mark in groups:
            return kind
    return ""


# Disk -----------------------------------------------------------------------------------------------


def read_disk(path: Path, root: Path = Path("/")) -> Disk:
    """The disk below a folder, which need not exist yet. Blocks where a network disk does not answer."""
    there = path
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        usage = shutil.disk_usage(there)
        number = there.stat().st_dev
    except OSError as error:
        return Disk(str(path), words=f"{there}: {error.strerror}.")
    return Disk(str(path), usage.total, usage.free, _disk_kind(there.resolve(), number, root))


def _disk_kind(path: Path, number: int, root: Path) -> str:
    source, system = _mount_of(path, root)
    if any(system.startswith(name) for name in NETWORK):
        return "network"
    if any(system.startswith(name) for name in SHARED):
        return "shared folder"
    if system in ("tmpfs", "ramfs"):
        return "memory"
    block = root / "sys" / "class" / "block" / Path(source).name
    if sys.platform != "win32":
        numbered = root / "sys" / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}"
        block = numbered if numbered.exists() else block  # btrfs and its like have numbers of their own
    return _block_kind(block)


def _mount_of(path: Path, root: Path) -> tuple[str, str]:
    """Source and file system of the mount below a path: of several, the one nearest to it, and of those the last."""
    best, found = -1, ("", "")
    for line in _text(root / "proc" / "self" / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        place = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), before.split()[4])
        kind, source = after.split()[:2]
        if (place == "/" or path == Path(place) or Path(place) in path.parents) and len(place) >= best:
            best, found = len(place), (source, kind)
    return found


def _block_kind(block: Path, depth: int = 0) -> str:
    """NVMe, SSD, hard disk or virtual disk; encryption, LVM and RAID are followed to the slowest disk below."""
    device = block.resolve()
    below = sorted((device / "slaves").iterdir()) if (device / "slaves").is_dir() else []
    if below and depth < 5:
        order = ["hard disk", "", "virtual disk", "SSD", "NVMe"]
        return min((_block_kind(slave, depth + 1) for slave in below), key=order.index)
    disk = device if (device / "queue").is_dir() else device.parent
    rotational = _text(disk / "queue" / "rotational").strip()
    if disk.name.startswith("nvme"):
        return "NVMe"
    if re.match(r"(vd|xvd)[a-z]", disk.name):
        return "virtual disk"  # it says that it turns, whatever the host has
    return {"0": "SSD", "1": "hard disk"}.get(rotational, "")


class _Reading:
    """What the threads of one measurement share."""

    def __init__(self, file: Path, size_bytes: int, until: float) -> None:
        self.file, self.size_bytes, self.until = file, size_bytes, until
        self._lock = threading.Lock()
        self._next = self.read_bytes = 0
        self.ended_at = time.monotonic()
        self.error: OSError | None = None
        self.direct = sys.platform == "linux"

    def run(self) -> None:
        try:
            with self._opened() as file, mmap.mmap(-1, READ_BLOCK_BYTES) as buffer:
                while time.monotonic() < self.until and (offset := self._take()) is not None:
                    if sys.platform == "linux" and not self.direct:
                        os.posix_fadvise(file.fileno(), offset, READ_BLOCK_BYTES, os.POSIX_FADV_DONTNEED)
                    file.seek(offset)
                    self._done(file.readinto(buffer) or 0)
        except OSError as error:
            self.error = error

    def _opened(self) -> io.FileIO:
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
        if sys.platform == "linux" and self.direct:
            flags |= os.O_DIRECT
        file = io.FileIO(os.open(self.file, flags), "rb")
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(file.fileno(), fcntl.F_NOCACHE, 1)
        return file

    def _take(self) -> int | None:
        with self._lock:
            offset, self._next = self._next, self._next + READ_BLOCK_BYTES
            return offset if offset < self.size_bytes else None

    def _done(self, count: int) -> None:
        with self._lock:
            self.read_bytes += count
            self.ended_at = time.monotonic()


def measure_read_speed(file: Path, limit_s: float = 1.5) -> ReadSpeed:
    """Read a large file for at most limit_s past the page cache, several blocks at a time as the engines do.

    Raises OSError where it cannot be read, TimeoutError (an OSError) where the disk does not answer.
    """
    size = file.stat().st_size
    if not size:
        raise OSError(errno.ENODATA, "the file is empty", str(file))
    for direct in (True, False):
        began = time.monotonic()
        reading = _Reading(file, size, began + limit_s)
        reading.direct = direct and reading.direct
        threads = [threading.Thread(target=reading.run, name="disk-speed", daemon=True) for _ in range(READ_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, began + limit_s + 0.5 - time.monotonic()))
        refused = reading.error is not None and reading.error.errno in (errno.EINVAL, errno.EOPNOTSUPP)
        if not (refused and reading.direct):  # not every file system can be read past the cache
            break
    if reading.error is not None:
        raise reading.error
    if not reading.read_bytes:
        raise TimeoutError(errno.ETIMEDOUT, f"the disk has not answered for {limit_s:.1f} s", str(file))
    took_s = max(1e-6, reading.ended_at - began)
    dropped = "cache dropped" if sys.platform in ("linux", "darwin") else "cached"
    method = "direct" if reading.direct else dropped
    return ReadSpeed(reading.read_bytes / took_s, reading.read_bytes, took_s, method, str(file))
