"""The objects behind every way in, without any network: engines, loader, presets, library, conversations."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

from modules import doctor, planner
from modules.advice import Budget
from modules.assistant import Assistant
from modules.chats import Chats
from modules.environments import NAMES, Environments, cards_of
from modules.errors import SettingsError
from modules.hardware import Card as SeenCard
from modules.hardware import Hardware, Machine
from modules.images import Images
from modules.library import Library
from modules.loader import Loader
from modules.presets import Presets
from modules.process import EngineKind, Limits
from modules.settings import Settings

MEASURED = "measured.jsonl"  # in the data folder


def build(settings: Settings, chats: Chats, on_change: Callable[[], None], hardware: Hardware) -> Assistant:
    """The objects without any network."""
    kinds = {"llamacpp": EngineKind("llamacpp", environment=(("OMP_WAIT_POLICY", "PASSIVE"),))}
    kinds |= {name: EngineKind(name, where=where) for name, where in settings.extra_engines}
    machine = hardware.snapshot()
    kinds |= engines_for_cards(settings, hardware)
    limits = Limits(load_s=settings.load_timeout_s, stall_s=settings.stall_timeout_s)
    cards, vram = cards_for_models(settings, machine)
    loader = Loader(
        kinds, settings.memory_budget_bytes, vram_budget_bytes=vram, limits=limits, on_change=on_change
    )
    presets = Presets(settings.preset_dirs, [name for name, _ in settings.extra_engines])
    library = Library(settings.models_dir, settings.bundled_dir)
    images = Images(settings.data_dir / "images")
    assistant = Assistant(presets, library, loader, chats, images, kinds, settings.threads)
    assistant.set_cards(cards, vram)
    return assistant


def engines_for_cards(settings: Settings, hardware: Hardware) -> dict[str, EngineKind]:
    """The kinds of the ExLlama engines whose environments are installed, with code for the cards that are here."""
    environments = Environments(cards=cards_of(hardware))
    usable = [found.name for found in map(environments.get, NAMES) if found.usable]
    order = _order_of_cards(hardware.snapshot())
    kinds = {name: environments.kind(name) for name in usable}
    kinds = {name: dataclasses.replace(k, environment=(*k.environment, *order)) for name, k in kinds.items()}
    if "exllamav2" in kinds:  # ExLlamaV3 keeps no copies
        kinds["exllamav2"] = dataclasses.replace(kinds["exllamav2"], copies_bytes=settings.pinned_memory_bytes)
    return kinds


def visible_cards(machine: Machine) -> list[SeenCard]:
    """The cards that engines see, in their order: as CUDA_VISIBLE_DEVICES has it, else the largest first.

    A model goes to the first one. Of several, those that the engines do not run on are left out.
    """
    cards = list(machine.working_cards)
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        by_name = {str(card.index): card for card in cards} | {card.uuid: card for card in cards}
        return [by_name[name.strip()] for name in said.split(",") if name.strip() in by_name]
    least = min(doctor.ENGINE_CARDS.values())
    able = [card for card in cards if (card.capability or least) >= least]
    return sorted(able or cards, key=lambda card: -(card.total_bytes or 0))


def _order_of_cards(machine: Machine) -> tuple[tuple[str, str], ...]:
    """Variables that make a child see the cards in that order: CUDA's own puts the fastest first, not the largest."""
    order = ("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    uuids = [card.uuid for card in visible_cards(machine)]
    if len(machine.working_cards) < 2 or "CUDA_VISIBLE_DEVICES" in os.environ or not all(uuids):
        return (order,)
    return (order, ("CUDA_VISIBLE_DEVICES", ",".join(uuids)))


def cards_for_models(settings: Settings, machine: Machine) -> tuple[list[planner.Card], int]:
    """What models may take of each card that engines see, and of the first one."""
    most = settings.vram_budget_bytes
    free = [max(0, (card.total_bytes or 0) - planner.GIB) for card in visible_cards(machine)]
    cards = [planner.Card(min(size, most) if most else size) for size in free]
    return cards, most or (cards[0].total_bytes if cards else 0)


def budget_of(settings: Settings) -> Budget:
    """What the loader will use of this machine, for the advice on models."""
    return Budget(visible_cards, settings.vram_budget_bytes, settings.memory_budget_bytes)


def tell_bus_speeds(environments: Environments, hardware: Hardware) -> None:
    """What the engines' self-tests measured of each card's link; the fastest, where several did."""
    speeds: dict[str, float] = {}
    for found in map(environments.get, NAMES):
        for card, speed in found.bus_speeds.items():
            speeds[card] = max(speed, speeds.get(card, 0.0))
    for card, speed in speeds.items():
        hardware.set_bus_speed(card, speed)


def lock_data(settings: Settings) -> Any:
    """One server for one data folder: two would write the same conversations."""
    file = (settings.data_dir / "lock").open("w")
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise SettingsError(
                f"Another Turntable uses the data folder {settings.data_dir}.",
                hint="Use that one, or choose another folder with --data-dir.",
            ) from error
    return file
