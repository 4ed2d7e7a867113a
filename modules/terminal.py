"""What can be done without the page: download a model, list the models, plan what one takes.

The arithmetic is planner.py's, the jobs are downloads.py's. This file turns names that
people type into presets, folders and repositories, prints figures as lines, and returns
exit codes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

from modules import advice, planner
from modules.advice import Place
from modules.building import budget_of
from modules.downloads import Downloads, print_models, print_plan, run_download
from modules.environments import Environments, cards_of
from modules.errors import ModelNotDownloaded
from modules.hardware import Hardware
from modules.here import Here
from modules.hub import Ref
from modules.library import Library
from modules.lookup import Found, Lookup
from modules.planner import Card, Plan, Setup
from modules.presets import Presets
from modules.settings import Settings

Write = Callable[[str], None]
PATIENCE_S = 20.0  # for a driver; one of many cards that nobody used for a while needs that long
SIZES_GB = (8, 12, 16, 24, 32, 48)  # cards that people have, for a machine without one


def run(settings: Settings) -> int:
    """`download`, `models` and `plan`: what the pages do with models, in the terminal."""
    library = Library(settings.models_dir, settings.bundled_dir)
    downloads = Downloads(library)
    terminal = Terminal(Presets(settings.preset_dirs), library, downloads, lambda text: print(text, end="", flush=True))
    hardware = Hardware(settings.models_dir, limit_s=PATIENCE_S)
    asked = Asked(settings.what, settings.file, settings.projector, settings.context, settings.cache, settings.as_json)
    try:
        if settings.command == "models":
            return terminal.models()
        place = Here(hardware, Environments(cards=cards_of(hardware)), budget_of(settings)).place()
        if settings.vram_budget_bytes and not place.cards:  # to be judged for a card that is not here
            place = dataclasses.replace(place, cards=(planner.Card(settings.vram_budget_bytes),))
        if settings.command == "download":
            return terminal.download(asked, sys.stdout.isatty(), place)
        return terminal.plan(asked, place)
    finally:
        downloads.close()
        hardware.close()


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a person typed behind `plan` or `download`. context 0 and cache "" take the model's or preset's own."""

    what: str
    file: str = ""
    projector: str = ""
    context: int = 0
    cache: str = ""
    as_json: bool = False


class Terminal:
    """The commands over the objects that the page uses as well."""

    def __init__(self, presets: Presets, library: Library, downloads: Downloads, write: Write) -> None:
        self._presets, self._library, self._downloads, self._write = presets, library, downloads, write
        self._lookup = Lookup(presets, downloads)

    def download(self, asked: Asked, live: bool, place: Place) -> int:
        """Fetch OWNER/NAME@REVISION, or of a preset the variant that is recommended for this machine."""
        if "/" in asked.what:
            ref = Ref.parse(asked.what, asked.file, asked.projector)
            return run_download(self._downloads, ref, self._write, live=live)
        best = next((j for j in advice.rank(self._presets.get(asked.what), place) if j.recommended), None)
        if best is None or not best.variant.repo:
            raise ModelNotDownloaded(f"No variant of the preset {asked.what} can be downloaded for this machine.")
        variant = best.variant
        self._write(f"{asked.what}: {variant.title}. {best.why}\n")
        return run_download(self._downloads, Ref.of(variant), self._write, live=live)

    def models(self) -> int:
        """Every variant of every preset: here or not, with its size; then the downloads under way."""
        variants = [(p.name, v) for p in self._presets.list() for v in p.variants if not v.bundled]
        print_models(self._library, variants, self._downloads, self._write)
        return 0

    def plan(self, asked: Asked, place: Place) -> int:
        """What a model takes and whether it fits, before a byte of it is downloaded."""
        found = self._find(asked)
        setup, title = found.setup, found.title
        planned = planner.plan(setup, found.tensors)
        verdicts = [(name, where, advice.judge(setup, where, found.tensors)[1]) for name, where in _named(setup, place)]
        if asked.as_json:
            figures = _figures(title, planned) | {"verdicts": {name: verdict.kind for name, _, verdict in verdicts}}
            self._write(json.dumps(figures, ensure_ascii=False, indent=1) + "\n")
            return 0
        self._write(f"{title}: {_words(setup)}\n")
        for part in planned.parts:
            self._write(f"  {_size(part.bytes)}  {part.name}{'' if part.where == 'gpu' else ' (RAM)'}\n")
        self._write(f"  {_size(planned.needs_bytes)}  together{' on the card' if setup.gpus else ''}\n")
        if warning := planner.cache_warning(setup.shape.architecture, setup.cache_mode):
            self._write(f"{warning}\n")
        for name, where, verdict in verdicts:
            most = 0 if verdict.fits else advice.largest_context(setup, where, found.tensors)
            better = f" With a context of {most:,} it would fit." if most else ""
            self._write(f"{name}: {verdict.words}{better}\n")
        return 0

    def _find(self, asked: Asked) -> Found:
        found = self._lookup.find(asked.what, asked.file, asked.projector)
        if found.download is not None and not asked.as_json:
            print_plan(found.download, self._write)
        changes: dict[str, Any] = {}
        if asked.context:
            changes["context"] = asked.context
        if asked.cache:
            changes["cache_mode"] = asked.cache
        return dataclasses.replace(found, setup=dataclasses.replace(found.setup, **changes))


def _words(setup: Setup) -> str:
    shape = setup.shape
    kind = setup.quantization.kind.upper()
    return (
        f"{shape.layers} layers of {shape.hidden}, {kind} at {setup.quantization.bpw:.2f} bpw, cache mode "
        f"{setup.cache_mode}, context size {setup.context:,}"
    )


def _named(setup: Setup, place: Place) -> list[tuple[str, Place]]:
    """What a setup is judged for: this computer's memory, its cards, or cards that people have."""
    if not setup.gpus:
        return [("This machine", place)]
    if not place.cards:  # a card sold with 24 GB has 24 GiB
        return [(f"{size} GB", dataclasses.replace(place, cards=(Card(size << 30),))) for size in SIZES_GB]
    if len(place.cards) == 1:
        return [("This card", place)]
    each = [(f"Card {n}", dataclasses.replace(place, cards=(card,))) for n, card in enumerate(place.cards)]
    return [*each, ("All cards", place)]


def _size(count: int) -> str:
    return f"{count / 1e9:7.2f} GB" if count >= 10**8 else f"{count / 1e6:7.2f} MB"


def _figures(title: str, planned: Plan) -> dict[str, Any]:
    return {
        "title": title, "needs_bytes": planned.needs_bytes, "host_bytes": planned.host_bytes,
        "file_bytes": planned.file_bytes, "parts": [dataclasses.asdict(part) for part in planned.parts],
    }  # fmt: skip
