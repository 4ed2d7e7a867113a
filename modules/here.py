"""This machine as the advice on models sees it: its cards as they are now, and which engines run or could run here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from modules import doctor
from modules.advice import INSTALLABLE, READY, Budget, Place, place_of
from modules.environments import Environments
from modules.errors import InstallFailed
from modules.hardware import Hardware, Machine

# Whether an engine could be installed is asked of compilers and the disk, so not for every page that is drawn.
KNOWN_FOR_S = 30.0


class Here:
    """Hands out places. Thread-safe."""

    def __init__(
        self,
        hardware: Hardware,
        environments: Environments,
        budget: Budget | None = None,
        held: Callable[[], int] | None = None,
    ) -> None:
        """budget is what models may take; held tells how much RAM our own loaded models have, which an unload frees."""
        self._hardware, self._environments = hardware, environments
        self._budget, self._held = budget, held
        self._lock = threading.Lock()
        self._known: tuple[float, tuple[str, ...], dict[str, str]] | None = None

    def place(self) -> Place:
        """This machine now."""
        machine = self._hardware.snapshot()
        return place_of(machine, self._engines(machine), self._budget, self._held() if self._held else 0)

    def forget(self) -> None:
        """An engine came or went: ask again."""
        with self._lock:
            self._known = None

    def _engines(self, machine: Machine) -> dict[str, str]:
        cards = tuple(card.uuid for card in machine.working_cards)
        with self._lock:
            if self._known and self._known[1] == cards and time.monotonic() - self._known[0] < KNOWN_FOR_S:
                return self._known[2]
        found = {"llamacpp": READY}
        found |= {name: self._state(name, machine) for name in doctor.ENGINE_CARDS}
        with self._lock:
            self._known = (time.monotonic(), cards, found)
        return found

    def _state(self, name: str, machine: Machine) -> str:
        least = doctor.ENGINE_CARDS[name]
        able = [card for card in machine.working_cards if card.capability is None or card.capability >= least]
        if not able:
            return f"It needs an NVIDIA card of compute capability {doctor.dotted(least)}."
        environment = self._environments.get(name)
        if environment.usable:
            return READY
        if environment.state == "failed":
            return f"Its self-test failed: {environment.problem}"
        try:
            self._environments.check(name)
        except (InstallFailed, OSError) as error:
            return str(error)
        return INSTALLABLE
