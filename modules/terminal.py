"""What can be done without the page: download a model, list the models, plan what one takes.

The arithmetic is planner.py's, the jobs are downloads.py's. This file turns names that
people type into presets, folders and repositories, prints figures as lines, and returns
exit codes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from modules import planner
from modules.downloads import Downloads, print_models, print_plan, run_download
from modules.errors import ModelNotDownloaded
from modules.hub import Ref
from modules.library import Library
from modules.lookup import Found, Lookup
from modules.planner import Card, Plan, Setup
from modules.presets import Presets, Variant

Write = Callable[[str], None]
SIZES_GB = (8, 12, 16, 24, 32, 48)  # cards that people have, for a machine without one


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

    def download(self, asked: Asked, live: bool, card_bytes: int = 0) -> int:
        """Fetch OWNER/NAME@REVISION, or the best variant of a preset that fits this machine."""
        if "/" in asked.what:
            ref = Ref.parse(asked.what, asked.file, asked.projector)
            return run_download(self._downloads, ref, self._write, live=live)
        variant = self._variant(asked.what, card_bytes)
        self._write(f"{asked.what}: {variant.title}\n")
        return run_download(self._downloads, Ref.of(variant), self._write, live=live)

    def models(self) -> int:
        """Every variant of every preset: here or not, with its size; then the downloads under way."""
        variants = [(p.name, v) for p in self._presets.list() for v in p.variants if not v.bundled]
        print_models(self._library, variants, self._downloads, self._write)
        return 0

    def plan(self, asked: Asked, cards: list[Card]) -> int:
        """What a model takes and whether it fits, before a byte of it is downloaded."""
        found = self._find(asked)
        setup, title = found.setup, found.title
        planned = planner.plan(setup, found.tensors)
        if asked.as_json:
            self._write(json.dumps(_figures(title, planned, cards), ensure_ascii=False, indent=1) + "\n")
            return 0
        self._write(f"{title}: {_words(setup)}\n")
        for part in planned.parts:
            self._write(f"  {_size(part.bytes)}  {part.name}{'' if part.where == 'gpu' else ' (RAM)'}\n")
        self._write(f"  {_size(planned.needs_bytes)}  together{' on the card' if setup.gpus else ''}\n")
        if warning := planner.cache_warning(setup.shape.architecture, setup.cache_mode):
            self._write(f"{warning}\n")
        for name, card in _named(cards):
            self._write(f"{name}: {planner.fit(planned, card).words}{self._better(setup, planned, card)}\n")
        return 0

    @staticmethod
    def _better(setup: Setup, planned: Plan, card: Card) -> str:
        """The largest context that fits, where it is another than the one that was asked for."""
        most = planner.largest_context(setup, card.free_bytes)
        if planner.fit(planned, card).fits or not most:
            return ""
        return f" With a context of {most:,} it would fit."

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

    def _variant(self, name: str, card_bytes: int) -> Variant:
        """The best variant of a preset for this machine: on the card where it fits, else one for the processor."""
        preset = self._presets.get(name)
        for variant in preset.variants:
            if not variant.repo:
                continue
            on_card = variant.engine in ("exllamav2", "exllamav3")
            if on_card and (not card_bytes or variant.shape is None):
                continue
            if not on_card or planner.plan_variant(variant).needs_bytes <= card_bytes:
                return variant
        raise ModelNotDownloaded(f"No variant of the preset {name} can be downloaded for this machine.")


def _words(setup: Setup) -> str:
    shape = setup.shape
    kind = setup.quantization.kind.upper()
    return (
        f"{shape.layers} layers of {shape.hidden}, {kind} at {setup.quantization.bpw:.2f} bpw, cache mode "
        f"{setup.cache_mode}, context size {setup.context:,}"
    )


def _named(cards: list[Card]) -> list[tuple[str, Card]]:
    if cards:
        return [(f"Card {n}" if len(cards) > 1 else "This card", card) for n, card in enumerate(cards)]
    return [(f"{size} GB", Card(size << 30)) for size in SIZES_GB]  # a card sold with 24 GB has 24 GiB


def _size(count: int) -> str:
    return f"{count / 1e9:7.2f} GB" if count >= 10**8 else f"{count / 1e6:7.2f} MB"


def _figures(title: str, planned: Plan, cards: list[Card]) -> dict[str, Any]:
    return {
        "title": title, "needs_bytes": planned.needs_bytes, "host_bytes": planned.host_bytes,
        "file_bytes": planned.file_bytes, "parts": [dataclasses.asdict(part) for part in planned.parts],
        "verdicts": {name: planner.fit(planned, card).kind for name, card in _named(cards)},
    }  # fmt: skip
