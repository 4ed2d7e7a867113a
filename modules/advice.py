"""Which of a preset's variants to run on this machine, and why, in words. Pure: numbers of the machine are handed in.

The order of the reasons: what does not fit is out; a model on the card comes before
one for the processor, which is slower, and there an engine that is here before one
that would have to be installed, unless that takes an hour; then the model that should
answer best. That is a rule of thumb and not a measurement: more parameters at fewer bits beat fewer at more, down
to about 4 bits per weight (kept_quality). Then context, then cache precision, then a
licence without conditions, then the preset's own order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from modules import planner
from modules.hardware import Card as SeenCard
from modules.hardware import Machine
from modules.planner import Card, Plan, Setup, TensorBytes, Verdict
from modules.presets import CACHE_MODES, EXL_ENGINES, Preset, Variant

READY, INSTALLABLE = "ready", "installable"
# Weights that a processor can read in a second, for "too slow to talk with": two channels of DDR4, estimate.
MEMORY_GB_S = 40.0
SLOW_TOKENS_S = 4.0
UNKNOWN_CONTEXT = 131072  # tokens, the most that is offered for a model that does not say what it was made for
FREE_LICENCES = ("mit", "apache-2.0", "bsd-3-clause")
# How much of a model's ability is left at so many bits per weight: our reading of the perplexity tables that ExLlamaV2,
# ExLlamaV3 and llama.cpp publish. Flat to about 4 bits, then steep.
_KEPT = ((2.0, 0.1), (2.5, 0.2), (3.0, 0.42), (3.5, 0.7), (4.0, 0.9), (5.0, 0.98), (6.0, 1.0))
EXL3_GAIN_BITS = 0.75  # EXL3 at 3.25 bits does about what EXL2 does at 4


# Cards that people have: name, memory in GiB, bandwidth in 10^9 bytes a second by NVIDIA's data sheets.
KNOWN_CARDS = (
    ("RTX 4060", 8, 272.0), ("RTX 3060", 12, 360.0), ("RTX 4070", 12, 504.0), ("RTX 4060 Ti", 16, 288.0),
    ("RTX 4080", 16, 717.0), ("RTX 3090", 24, 936.0), ("RTX 4090", 24, 1008.0), ("RTX 5090", 32, 1792.0),
    ("RTX A6000", 48, 768.0),
)  # fmt: skip
OFTEN_PAIRED = ("RTX 3060", "RTX 3090", "RTX 4090")


@dataclass(frozen=True)
class Place:
    """A machine, as far as advice needs it. engines: each engine's name to READY, INSTALLABLE or why it is neither."""

    cards: tuple[Card, ...] = ()
    ram_bytes: int = 0
    engines: Mapping[str, str] = field(default_factory=dict)
    bandwidths_gb_s: tuple[float, ...] = ()  # of each card's memory, 0 where it is not known

    @property
    def card(self) -> Card | None:
        """The card with the most room."""
        return max(self.cards, key=lambda card: card.free_bytes, default=None)

    def bandwidth_gb_s(self, setup: Setup) -> float:
        """Of the memory that a setup is to go to; of several cards the slowest. 0 where it is not known."""
        if not setup.gpus:
            return MEMORY_GB_S
        if setup.gpus > 1 or self.card is None or len(self.bandwidths_gb_s) != len(self.cards):
            return min(self.bandwidths_gb_s, default=0.0)
        return self.bandwidths_gb_s[self.cards.index(self.card)]

    def room(self, setup: Setup, over_all: bool = False) -> Card:
        """The memory that a setup is to go to: the best card, all of them taken together, or the computer's."""
        if not setup.gpus:
            return Card(self.ram_bytes)
        if over_all:
            numbers = ((c.total_bytes, c.used_bytes, c.released_bytes) for c in self.cards)
            return Card(*(sum(column) for column in zip(*numbers, strict=True)))
        return self.card or Card(0)


@dataclass(frozen=True)
class Judged:
    """A variant on a machine. plan is None where the preset gives no shape. quality compares, it has no unit."""

    variant: Variant
    plan: Plan | None
    verdict: Verdict | None
    engine: str  # READY, INSTALLABLE, or why not
    quality: float
    recommended: bool = False
    why: str = ""


def places(ram_bytes: int) -> dict[str, Place]:
    """Machines that people ask about, by name: one card or two, nothing else on them, both engines there."""
    found = {}
    for name, size, bandwidth in KNOWN_CARDS:
        engines = {"llamacpp": READY, "exllamav2": READY, "exllamav3": INSTALLABLE}
        found[f"{name}, {size} GB"] = Place((Card(size << 30),), ram_bytes, engines, (bandwidth,))
        if name in OFTEN_PAIRED:
            found[f"2 × {name}, {2 * size} GB"] = Place((Card(size << 30),) * 2, ram_bytes, engines, (bandwidth,) * 2)
    return found


@dataclass(frozen=True)
class Budget:
    """What models may take. cards are those that engines see, None for all that work; 0 bytes: as much as is there."""

    cards: Callable[[Machine], Sequence[SeenCard]] | None = None
    vram_bytes: int = 0  # of each card
    ram_bytes: int = 0


def place_of(
    machine: Machine, engines: Mapping[str, str], budget: Budget | None = None, held_bytes: int = 0
) -> Place:
    """This machine, as its hardware was last seen. What our own models hold counts as free: they can be unloaded."""
    budget = budget or Budget()
    seen = budget.cards(machine) if budget.cards else machine.working_cards
    known = [card for card in seen if card.total_bytes and card.free_bytes is not None]
    cards = planner.cards_of(replace(machine, cards=tuple(known)))
    if budget.vram_bytes:
        cards = [_capped(card, budget.vram_bytes) for card in cards]
    ram = machine.memory.available_bytes + held_bytes
    ram = min(ram, budget.ram_bytes or ram, machine.memory.total_bytes or ram)
    return Place(tuple(cards), ram, engines, tuple(card.bandwidth_gb_s or 0.0 for card in known))


def _capped(card: Card, most_bytes: int) -> Card:
    """The card, as if it had no more memory than that; what others use only counts where it leaves less."""
    total = min(card.total_bytes, most_bytes)
    free = min(total, card.free_bytes)
    return Card(total, total - free + card.released_bytes, card.released_bytes)


def kept_quality(bpw: float, engine: str = "exllamav2") -> float:
    """The share of a model's ability that is left at so many bits per weight, between 0 and 1; monotone."""
    bits = bpw + (EXL3_GAIN_BITS if engine == "exllamav3" else 0.0)
    if bits <= _KEPT[0][0]:
        return _KEPT[0][1]
    for (low, less), (high, more) in itertools.pairwise(_KEPT):
        if bits <= high:
            return less + (more - less) * (bits - low) / (high - low)
    return 1.0


def judge(setup: Setup, place: Place, tensors: TensorBytes | None = None) -> tuple[Plan, Verdict]:
    """A setup on a machine: on its best card, over all of them where one is not enough, or in the computer's memory."""
    return _fit(planner.plan(setup, tensors), place, tensors)


def _fit(planned: Plan, place: Place, tensors: TensorBytes | None = None) -> tuple[Plan, Verdict]:
    setup = planned.setup
    if not setup.gpus:
        return planned, planner.fit(planned, Card(place.ram_bytes))
    if place.card is None:
        return planned, Verdict("does not fit", "Needs an NVIDIA card, and none is here.", -planned.needs_bytes)
    verdict = planner.fit(planned, place.card)
    if verdict.fits or len(place.cards) < 2:
        return planned, verdict
    split = planner.split(setup, place.cards, tensors)
    if not split.verdict.fits:
        return planned, verdict
    words = f"Over {split.used} cards, the fullest: {split.verdict.words}"
    over_all = planner.plan(replace(setup, gpus=split.used), tensors, planned.notes)
    return over_all, replace(split.verdict, words=words)


def largest_context(setup: Setup, place: Place, tensors: TensorBytes | None = None, most: int = 0) -> int:
    """The largest context that fits there, in whole pages of tokens; 0: none.

    At most what the model was made for, where that is not known UNKNOWN_CONTEXT, and never more than `most`.
    """
    limit = setup.shape.max_positions or most or UNKNOWN_CONTEXT
    limit = min(limit, most or limit)
    low, high = 0, limit // planner.PAGE_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        if judge(replace(setup, context=middle * planner.PAGE_TOKENS), place, tensors)[1].fits:
            low = middle
        else:
            high = middle - 1
    return low * planner.PAGE_TOKENS


def best_cache(setup: Setup, place: Place, tensors: TensorBytes | None = None) -> str:
    """The cache mode with the least loss that fits and does the model no harm; empty where none does."""
    for mode in CACHE_MODES:
        harm = planner.cache_warning(setup.shape.architecture, mode)
        if not harm and judge(replace(setup, cache_mode=mode), place, tensors)[1].fits:
            return mode
    return ""


def best_bits(setup: Setup, place: Place) -> float:
    """The most bits per weight that fit, of those that ExLlama models are offered with; 0 where none does."""
    for bits in sorted(planner.BITS, reverse=True):
        if judge(replace(setup, quantization=replace(setup.quantization, bpw=bits)), place)[1].fits:
            return bits
    return 0.0


def speed(planned: Plan, place: Place) -> float:
    """Estimate of tokens per second at an empty cache; 0 where the memory's bandwidth is not known."""
    gb_s = place.bandwidth_gb_s(planned.setup)
    return planner.tokens_per_second(planned, gb_s) if gb_s else 0.0


def rank(preset: Preset, place: Place) -> list[Judged]:
    """Every variant of a preset in its order, with the one that is recommended marked and explained."""
    judged = [_judged(variant, place) for variant in preset.variants]
    fitting = [j for j in judged if _may_be_recommended(j, place)]
    if not fitting:
        return judged
    best = max(fitting, key=lambda j: (_rank_of(j, place), -judged.index(j)))
    return [replace(j, recommended=True, why=_why(j, judged, place)) if j is best else j for j in judged]


def _judged(variant: Variant, place: Place) -> Judged:
    engine = place.engines.get(variant.engine, f"{variant.engine} is not known here")
    if variant.shape is None:
        return Judged(variant, None, None, engine, 0.0)
    setup = planner.setup_of(variant, gpus=1 if variant.engine in EXL_ENGINES else 0)
    tensors, notes = planner.variant_tensors(variant, setup)
    planned, verdict = _fit(planner.plan(setup, tensors, notes), place, tensors)
    quantization = planned.setup.quantization
    size = planner.parameters(planned.setup.shape)
    quality = size / 1e9 * kept_quality(quantization.bpw, variant.engine)
    return Judged(variant, planned, verdict, engine, quality)


def _may_be_recommended(judged: Judged, place: Place) -> bool:
    if judged.plan is None or judged.verdict is None or not judged.verdict.fits or judged.variant.bundled:
        return False
    if judged.engine not in (READY, INSTALLABLE):
        return False
    return bool(judged.plan.setup.gpus) or speed(judged.plan, place) >= SLOW_TOKENS_S


def _rank_of(judged: Judged, place: Place) -> tuple[float, ...]:
    """Compared from the first number on; see the head of this file."""
    variant, engine = judged.variant, _engine_rank(judged)
    free = float(variant.licence.lower() in FREE_LICENCES)
    if variant.engine not in EXL_ENGINES:
        return (engine, 0.0, free)  # on a processor the preset's order weighs speed against ability
    cache = float(-CACHE_MODES.index(variant.cache_mode))
    return (engine, 1.0, _step(judged.quality), float(variant.context), cache, free)


def _engine_rank(judged: Judged) -> float:
    # A card is worth ten minutes of installing ExLlamaV2. ExLlamaV3 compiles for the better part of an hour: not the
    # first thing to ask of somebody.
    if judged.variant.engine not in EXL_ENGINES:
        return 1.0
    if judged.engine == READY:
        return 3.0
    return 2.0 if judged.variant.engine == "exllamav2" else 0.0


def _step(quality: float) -> float:
    """Qualities within about a tenth of each other are the same step."""
    step, value = 0, quality
    while value > 1:
        value /= 1.1
        step += 1
    return float(step)


def _why(best: Judged, judged: Sequence[Judged], place: Place) -> str:
    """Sentences: what it has, what was passed over and why."""
    assert best.plan is not None and best.verdict is not None
    variant, setup = best.variant, best.plan.setup
    billions = planner.parameters(setup.shape) / 1e9
    said = [f"{billions:.1f}B parameters at {_bits(setup, variant.bpw)}: {_reason(best, judged)}"]
    where = f"a context of {variant.context:,} tokens, cache mode {setup.cache_mode}"
    said.append(f"{best.verdict.words} That is with {where}.")
    if best.engine == INSTALLABLE:
        said.append(f"{_name(variant.engine)} has to be installed first, on the System page.")
    if variant.licence and variant.licence.lower() not in FREE_LICENCES:
        said.append(f"Mind its licence: {variant.licence}.")
    passed = _passed_over(best, judged, place)
    return " ".join([*said, *([passed] if passed else [])])


def _reason(best: Judged, judged: Sequence[Judged]) -> str:
    assert best.plan is not None
    if not best.plan.setup.gpus:
        return "the first that fits of this task's list for a processor, where small models answer at a bearable speed."
    size, bits = planner.parameters(best.plan.setup.shape), best.plan.setup.quantization.bpw
    others = [
        j for j in judged
        if j is not best and j.plan is not None and j.verdict is not None and j.verdict.fits and not j.variant.bundled
        and _engine_rank(j) == _engine_rank(best) and bool(j.plan.setup.gpus) == bool(best.plan.setup.gpus)
    ]  # fmt: skip
    larger = [j for j in others if j.plan is not None and planner.parameters(j.plan.setup.shape) > 1.15 * size]
    if larger:
        name = larger[0].variant.title
        return f"{name} would fit too, but has lost more to its few bits than its size is worth."
    plans = [j.plan.setup for j in others if j.plan is not None]
    if any(planner.parameters(s.shape) < size / 1.15 and s.quantization.bpw > bits for s in plans):
        return "more parameters at fewer bits beat fewer at more, down to about 4 bits."
    return "the most that fits here."


def _passed_over(best: Judged, judged: Sequence[Judged], place: Place) -> str:
    """The better one that lacks only its engine, or memory."""
    better = [j for j in judged if j.quality > 1.1 * best.quality and j.plan is not None and j.verdict is not None]
    for j in better:
        able = j.verdict is not None and j.verdict.fits and j.engine == INSTALLABLE
        if able and j.variant.engine != best.variant.engine:
            return f"{j.variant.title} would answer better; it needs {_name(j.variant.engine)}, see the System page."
    for j in better:
        if j.plan is not None and j.verdict is not None and not j.verdict.fits and j.engine in (READY, INSTALLABLE):
            missing = planner.in_gb(-j.verdict.spare_bytes)
            where = "on the card" if place.cards and j.plan.setup.gpus else "of memory"
            if j.plan.setup.gpus and not place.cards:
                continue
            return f"{j.variant.title} would need {missing} more {where}."
    return ""


def _bits(setup: Setup, bpw: float | None) -> str:
    quantization = setup.quantization
    return quantization.scheme or f"{bpw or quantization.bpw:.2f}".rstrip("0").rstrip(".") + " bpw"


def _name(engine: str) -> str:
    return {"exllamav2": "ExLlamaV2", "exllamav3": "ExLlamaV3", "llamacpp": "llama.cpp"}.get(engine, engine)
