"""The objects behind every way in, without any network: engines, loader, presets, library, conversations."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from modules.assistant import Assistant
from modules.chats import Chats
from modules.environments import NAMES, Environments
from modules.errors import SettingsError
from modules.hardware import Hardware
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
    kinds |= engines_for_cards(settings)
    limits = Limits(load_s=settings.load_timeout_s, stall_s=settings.stall_timeout_s)
    vram = settings.vram_budget_bytes or hardware.snapshot().card_budget_bytes
    loader = Loader(
        kinds, settings.memory_budget_bytes, vram_budget_bytes=vram, limits=limits, on_change=on_change
    )
    presets = Presets(settings.preset_dirs, [name for name, _ in settings.extra_engines])
    library = Library(settings.models_dir, settings.bundled_dir)
    images = Images(settings.data_dir / "images")
    return Assistant(presets, library, loader, chats, images, kinds, settings.threads)


def engines_for_cards(settings: Settings) -> dict[str, EngineKind]:
    """The kinds of the ExLlama engines whose environments are installed."""
    environments = Environments()
    usable = [found.name for found in map(environments.get, NAMES) if found.usable]
    pinned = ("TURNTABLE_PINNED_BYTES", str(settings.pinned_memory_bytes))
    kinds = {name: environments.kind(name) for name in usable}
    return {name: dataclasses.replace(k, environment=(*k.environment, pinned)) for name, k in kinds.items()}


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
