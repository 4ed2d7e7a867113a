"""Decides which models are in memory. Only this file starts, swaps or stops one.

    with loader.lease(spec, needs_bytes=n, report=tell) as engine:
        for event in engine.generate(start): ...

There is no public `load()`. Whether a start is needed is decided here, under the lock
that owns the answer; `snapshot()` is for showing, never for deciding.

One model goes through

    ABSENT -> LOADING -> READY <-> LEASED (n answers) -> DRAINING -> UNLOADING -> ABSENT
                 |                                                        ^
                 `-> ABSENT (the reason goes to whoever asked; what had   |
                     been unloaded for it is loaded again: RESTORING)     |
    a crash takes READY, LEASED or DRAINING to ABSENT at once ------------'

Several models stay in memory within the budget; the least recently used goes first.
Requests for a model in memory are served at once and batched by its engine, as many
as it runs side by side; the others wait for a place, because in the engine they would
wait in silence, where they look like a fault. These and the requests that need a swap
wait in one queue, first come first served. A model that must make
room finishes its answers first, and takes newcomers only until the first in the
queue has waited `patience_s`; so nobody waits for ever and models do not thrash.
No background task ever causes a swap.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from modules.errors import (
    DoesNotFit,
    EngineCrashed,
    EngineMissing,
    EngineStuck,
    LoadError,
    LoadTimedOut,
    ModelFilesError,
    TurntableError,
)
from modules.messages import EngineSpec, Loading, Queued
from modules.process import EngineKind, EngineProcess, Limits

LEFTOVER_BYTES = 64 << 20  # more than this after an unload in place means a leak: the child is replaced
CRASHES_PER_MINUTE = 3
FRESH = ("", "again", "child")  # a lease may ask for a load that is to be measured, see lease()
Report = Callable[[Loading | Queued], None]
log = logging.getLogger("turntable.loader")


class LeaseCancelled(Exception):
    """The one who asked for the lease does not want it any more."""


@dataclass(frozen=True)
class ModelView:
    """One model in memory, for display."""

    spec: EngineSpec
    leases: int
    memory_bytes: int
    version: str


@dataclass(frozen=True)
class LoaderView:
    """What is in memory and on its way, for display. used and budget in bytes, the cards' memory apart.

    granted counts the leases since the start: who measures sees by it that somebody else was there in between.
    """

    models: tuple[ModelView, ...]
    loading: EngineSpec | None
    progress: Loading | None
    waiting: int
    used_bytes: int
    budget_bytes: int
    vram_used_bytes: int = 0
    vram_budget_bytes: int = 0
    granted: int = 0

    @property
    def quiet(self) -> bool:
        """Nothing is being loaded and nobody uses a model."""
        return self.loading is None and not any(model.leases for model in self.models)


@dataclass
class _Resident:
    process: EngineProcess
    spec: EngineSpec
    memory_bytes: int
    at_once: int
    leases: int = 0
    last_used: int = 0
    wanted_by: _Ticket | None = None


@dataclass(eq=False)
class _Ticket:
    spec: EngineSpec
    needs_bytes: int
    report: Report
    cancelled: threading.Event
    fresh: str = ""
    since_s: float = 0.0  # set with the place in the queue, so that both have the same order


class Loader:
    """The one owner of the models in memory."""

    def __init__(
        self, kinds: dict[str, EngineKind], budget_bytes: int, *, vram_budget_bytes: int = 0,
        limits: Limits | None = None, patience_s: float = 10.0, on_change: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._kinds, self._limits = kinds, limits or Limits()
        self._budgets = {"ram": budget_bytes, "vram": vram_budget_bytes}
        self._patience_s, self._on_change = patience_s, on_change
        self._see = threading.Condition()  # guards everything below, held for moments only
        self._residents: dict[EngineSpec, _Resident] = {}
        self._queue: list[_Ticket] = []
        self._swapping: _Ticket | None = None
        self._starting: EngineProcess | None = None
        self._progress: Loading | None = None
        self._children: list[EngineProcess] = []  # every child that may still hold memory, whatever it does
        self._idle: dict[str, EngineProcess] = {}  # children without a model, of engines that keep their process
        self._crashes: dict[EngineSpec, list[float]] = {}
        self._clock = 0
        self._granted = 0
        self._closed = False

    def snapshot(self) -> LoaderView:
        """What to show. It may be old by the time it is read."""
        with self._see:
            residents = sorted(self._residents.values(), key=lambda r: -r.last_used)
            models = tuple(ModelView(r.spec, r.leases, r.memory_bytes, r.process.version) for r in residents)
            used = {
                memory: sum(r.memory_bytes for r in residents if r.process.kind.memory == memory)
                for memory in self._budgets
            }
            return LoaderView(
                models, self._swapping.spec if self._swapping else None, self._progress,
                sum(t is not self._swapping for t in self._queue), used["ram"], self._budgets["ram"], used["vram"],
                self._budgets["vram"], self._granted,
            )  # fmt: skip

    def set_vram_budget(self, size_bytes: int) -> None:
        """For cards that answered only after the start. Takes effect with the next model."""
        with self._see:
            self._budgets["vram"] = size_bytes

    def pids(self) -> list[int]:
        """Process ids of the engines' children, to tell our use of a card from others'."""
        with self._see:
            return [process.pid for process in self._children if process.alive]

    def budget_bytes(self, engine: str) -> int:
        """Memory for the models of an engine, in RAM or on the cards; 0 for an engine that is not there."""
        return self._budgets[self._kinds[engine].memory] if engine in self._kinds else 0

    @contextlib.contextmanager
    def lease(
        self, spec: EngineSpec, *, needs_bytes: int = 0, report: Report = lambda event: None,
        cancelled: threading.Event | None = None, fresh: str = "",
    ) -> Iterator[EngineProcess]:  # fmt: skip
        """Have `spec` in memory, and keep it there while the block runs.

        needs_bytes is what the model is expected to take; report gets Queued and Loading
        events; setting `cancelled` and calling wake() ends the wait or the load with
        LeaseCancelled. What had been unloaded for that load is loaded again in any case.
        fresh loads the model although it is in memory, to measure that: "again" as a swap
        does, "child" in a new child. Its running answers end first; a load that fails or is
        cancelled leaves it out of memory, and the next lease loads it.
        Raises EngineMissing, DoesNotFit, LoadTimedOut, EngineCrashed or another LoadError.
        """
        assert fresh in FRESH
        ticket = _Ticket(spec, needs_bytes, report, cancelled or threading.Event(), fresh)
        resident = self._acquire(ticket)
        with self._see:
            self._granted += 1
        try:
            if ticket.cancelled.is_set():  # too late to stop the load: the model stays for whoever comes next
                raise LeaseCancelled
            yield resident.process
        finally:
            with self._see:
                resident.leases -= 1
                self._touch(resident)
                self._see.notify_all()
            self._on_change()

    def wake(self) -> None:
        """Let waiting leases look at their `cancelled` at once; a load under way for a cancelled one is ended."""
        with self._see:
            if self._starting:
                self._starting.look()
            self._see.notify_all()

    def close(self) -> None:
        """End every child. Leases that still run see their engine crash."""
        with self._see:
            self._closed = True
            if self._starting:
                self._starting.abort()
            self._residents.clear()
            self._idle.clear()
            self._see.notify_all()
            processes = list(self._children)
        for process in processes:
            process.stop()

    def _acquire(self, ticket: _Ticket) -> _Resident:
        with self._see:
            self._refuse_hopeless(ticket)
            ticket.since_s = time.monotonic()
            self._queue.append(ticket)
        told = 0
        try:
            while True:
                with self._see:
                    resident, victims = self._look(ticket)
                    place = self._queue.index(ticket) + 1
                if resident is not None:
                    return resident
                if victims is not None:
                    return self._swap(ticket, victims)
                if place != told:
                    told = place
                    ticket.report(Queued(place))
                    self._on_change()
                with self._see:
                    self._see.wait(0.25)
        finally:
            with self._see:
                self._queue.remove(ticket)
                for other in self._residents.values():
                    if other.wanted_by is ticket:
                        other.wanted_by = None
                if self._swapping is ticket:
                    self._swapping, self._progress = None, None
                self._see.notify_all()
            self._on_change()

    def _refuse_hopeless(self, ticket: _Ticket) -> None:
        if ticket.spec.engine not in self._kinds:
            raise EngineMissing(f"The engine {ticket.spec.engine} is not installed on this machine.")
        budget = self.budget_bytes(ticket.spec.engine)
        if ticket.needs_bytes > budget:
            on_card = self._kinds[ticket.spec.engine].memory == "vram"
            what = "memory budget of the card" if on_card else "memory budget"
            flag = "--vram-budget" if on_card else "--memory-budget"
            raise DoesNotFit(
                f"The model needs about {ticket.needs_bytes / 1e9:.1f} GB, and the {what} is {budget / 1e9:.1f} GB.",
                hint=f"Choose a smaller variant or a shorter context, or raise {flag}.",
            )
        recent = [t for t in self._crashes.get(ticket.spec, ()) if time.monotonic() - t < 60]
        self._crashes[ticket.spec] = recent
        if len(recent) >= CRASHES_PER_MINUTE:
            raise EngineCrashed(
                f"The engine {ticket.spec.engine} crashed {len(recent)} times within a minute with this model; "
                "it is left alone.",
                hint="Wait a minute, or choose another variant; the log has the engine's last lines.",
            )

    def _look(self, ticket: _Ticket) -> tuple[_Resident | None, list[_Resident] | None]:
        """Decide, with the lock held: a lease on a model in memory, or the models to unload, or neither (wait)."""
        if ticket.cancelled.is_set() or self._closed:
            raise LeaseCancelled
        resident = self._residents.get(ticket.spec)
        if resident is not None and resident.process.alive and not ticket.fresh:
            full = resident.leases >= resident.at_once or self._first_for(ticket.spec) is not ticket
            if full or self._must_stand_back(resident, ticket):
                return None, None
            resident.leases += 1
            self._touch(resident)
            return resident, None
        if resident is not None and not resident.process.alive:
            del self._residents[ticket.spec]  # it crashed a moment ago
        if self._swapping is not None or self._first_swap() is not ticket:
            return None, None
        victims = self._victims(ticket)
        if any(victim.leases or self._is_awaited(victim, ticket) for victim in victims):
            for victim in victims:
                victim.wanted_by = victim.wanted_by or ticket
            return None, None
        self._swapping = ticket
        for victim in victims:
            del self._residents[victim.spec]
        return None, victims

    def _must_stand_back(self, resident: _Resident, ticket: _Ticket) -> bool:
        rival = resident.wanted_by
        return (
            rival is not None and rival.since_s < ticket.since_s and time.monotonic() - rival.since_s > self._patience_s
        )

    def _is_awaited(self, resident: _Resident, ticket: _Ticket) -> bool:
        """Does somebody who came before the ticket wait for a place there?"""
        first = self._first_for(resident.spec)
        return first is not None and first.since_s < ticket.since_s

    def _first_for(self, spec: EngineSpec) -> _Ticket | None:
        return next((t for t in self._queue if t.spec == spec and not t.fresh), None)

    def _first_swap(self) -> _Ticket | None:
        return next((t for t in self._queue if t.fresh or t.spec not in self._residents), None)

    def _victims(self, ticket: _Ticket) -> list[_Resident]:
        """Least recently used first, until the newcomer fits; idle ones before busy ones.

        Only models in the same kind of memory make room for each other.
        """
        memory = self._kinds[ticket.spec.engine].memory
        rivals = [r for r in self._residents.values() if r.process.kind.memory == memory]
        used = sum(r.memory_bytes for r in rivals)
        victims = [r for r in rivals if r.spec == ticket.spec]  # only where it is to be loaded anew
        used -= sum(r.memory_bytes for r in victims)
        others = [r for r in rivals if r.spec != ticket.spec]
        for resident in sorted(others, key=lambda r: (r.leases > 0, r.last_used)):
            if used + ticket.needs_bytes <= self._budgets[memory]:
                break
            victims.append(resident)
            used -= resident.memory_bytes
        return victims

    def _swap(self, ticket: _Ticket, victims: list[_Resident]) -> _Resident:
        """Runs without the lock; `_swapping` keeps every other swap away."""
        for victim in victims:
            self._tell(ticket, Loading("unloading", 0, ticket.needs_bytes))
            self._retire(victim, ticket.spec)
        try:
            resident = self._load(ticket, ticket.spec, ticket.needs_bytes)
        except (TurntableError, LeaseCancelled):
            for victim in reversed(victims):
                if victim.spec != ticket.spec:  # the same load has just failed or was given up
                    self._restore(ticket, victim)
            raise
        return resident

    def _retire(self, resident: _Resident, wanted: EngineSpec) -> None:
        """Unload, and make sure that the memory came back: the process is gone, or says how much it still holds."""
        process = resident.process
        log.info("unloading %s", resident.spec.model)
        if not resident.process.kind.keeps_process:
            process.stop()
            return
        try:
            left = process.unload()
        except TurntableError:
            left = LEFTOVER_BYTES + 1
        if left > LEFTOVER_BYTES:
            log.warning("%d MB stayed in use after an unload; the engine's process is replaced", left >> 20)
            process.stop()
        else:
            self._park(process, wanted)

    def _park(self, process: EngineProcess, wanted: EngineSpec) -> None:
        """Keep a child without a model for the next one, the one that knows the wanted model if there is a choice.

        One of each kind: every further one would hold a CUDA context and page-locked memory for nothing.
        """
        surplus: EngineProcess | None = process
        with self._see:
            other = self._idle.get(process.kind.name)
            if not self._closed and (other is None or wanted.model in process.known - other.known):
                self._idle[process.kind.name], surplus = process, other
        if surplus is not None:
            surplus.stop()

    def _share_of_copies(self, process: EngineProcess, needs_bytes: int) -> int:
        """How much a child may page-lock with its next model: what the others of its kind do not hold; -1 for no say.

        The others give up only what that model may need, and may hold no more than the rest
        until their own next load. So the sum stays within the budget at any time.
        """
        budget = process.kind.copies_bytes
        if not budget:
            return -1
        with self._see:
            others = [c for c in self._children if c.kind.name == process.kind.name and c is not process and c.alive]
        held = [_limit_copies(other, other.copies_limit) for other in others]
        lack = min(needs_bytes, budget) + sum(held) - budget
        for number, other in enumerate(others):
            now = _limit_copies(other, max(0, held[number] - max(0, lack)))
            lack -= held[number] - now
            held[number] = now
        return max(0, budget - sum(held))

    def _take_child(self, ticket: _Ticket, spec: EngineSpec) -> tuple[EngineProcess, float]:
        """The idle child of the kind or a new one, and when that began. From here on it is the one that starts."""
        kind, began = self._kinds[spec.engine], time.monotonic()
        with self._see:
            process = self._idle.pop(kind.name, None)
        if process is not None and ticket.fresh == "child" and spec == ticket.spec:
            process.stop()
            began = time.monotonic()
        if process is None or not process.alive:
            process = EngineProcess(kind, self._limits, self._on_exit)
        with self._see:
            self._children = [child for child in self._children if child.alive and child is not process] + [process]
            self._starting = process
            closed = self._closed
        if closed:  # close() has ended the others already
            process.stop()
            raise LeaseCancelled
        return process, began

    def _load(self, ticket: _Ticket, spec: EngineSpec, needs_bytes: int) -> _Resident:
        # What is restored is not for the one who cancelled, and nobody may cancel it.
        cancelled = ticket.cancelled if spec == ticket.spec else None
        if cancelled is not None and cancelled.is_set():
            raise LeaseCancelled
        process, began = self._take_child(ticket, spec)
        ready = None
        try:
            share = self._share_of_copies(process, needs_bytes)
            ready = process.load(spec, lambda event: self._tell(ticket, event), cancelled, share)
            process.ping()
            process.up_s = time.monotonic() - began
            log.info("loaded %s in %.2f s, %d MB", spec.model, ready.load_s, ready.memory_bytes >> 20)
        except (TurntableError, LeaseCancelled) as error:
            if ready is None and self._is_clean(process, error):
                self._park(process, ticket.spec)
            else:
                process.stop()
            if ticket.cancelled.is_set() and spec == ticket.spec:
                raise LeaseCancelled from error
            if isinstance(error, EngineCrashed):
                self._crashes.setdefault(spec, []).append(time.monotonic())
            for line in list(process.log)[-8:]:
                log.warning("%s: %s", spec.engine, line)
            raise
        finally:
            with self._see:
                self._starting = None
        # Who waited for the load has its first place; others look for theirs as soon as it stands among the residents.
        leases = int(spec == ticket.spec)
        resident = _Resident(process, spec, max(ready.memory_bytes, needs_bytes), max(1, ready.at_once), leases)
        with self._see:
            if self._closed:
                process.stop()
                raise LeaseCancelled
            self._residents[spec] = resident
            self._touch(resident)
        self._on_change()
        return resident

    def _is_clean(self, process: EngineProcess, error: Exception) -> bool:
        """After a load that was refused: may the child take the next model? It must be well and hold no memory."""
        refused = isinstance(error, LoadError | ModelFilesError) and not isinstance(error, EngineCrashed | LoadTimedOut)
        if not (process.kind.keeps_process and refused and process.alive):
            return False
        try:
            return process.measure() <= LEFTOVER_BYTES
        except TurntableError:
            return False

    def _restore(self, ticket: _Ticket, victim: _Resident) -> None:
        """Bring back what had to go for a load that failed. Its own failure is only logged: the first reason counts."""
        self._tell(ticket, Loading("restoring", 0, victim.memory_bytes))
        try:
            self._load(ticket, victim.spec, victim.memory_bytes)
        except (TurntableError, LeaseCancelled) as error:
            log.error("the previous model %s could not be restored: %s", victim.spec.model, error)

    def _tell(self, ticket: _Ticket, event: Loading) -> None:
        with self._see:
            self._progress = event
        ticket.report(event)
        self._on_change()

    def _touch(self, resident: _Resident) -> None:
        self._clock += 1
        resident.last_used = self._clock

    def _on_exit(self, process: EngineProcess) -> None:
        """Runs on the reader thread of a child that ended by itself."""
        with self._see:
            for spec, resident in list(self._residents.items()):
                if resident.process is process:
                    del self._residents[spec]
                    self._crashes.setdefault(spec, []).append(time.monotonic())
            if self._idle.get(process.kind.name) is process:
                del self._idle[process.kind.name]
            self._see.notify_all()
        process.stop()
        for line in list(process.log)[-8:]:
            log.warning("%s: %s", process.kind.name, line)
        self._on_change()


def _limit_copies(process: EngineProcess, most_bytes: int) -> int:
    """Bytes that a child holds after it was told how much it may hold; of one that is gone, nothing is left."""
    try:
        return process.keep_copies(most_bytes)
    except (EngineCrashed, EngineStuck) as error:
        log.warning("%s", error)
        return 0
