"""Which variant is recommended on which machine: the shipped presets, and laws that hold for every machine."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules import planner
from modules.advice import (
    FREE_LICENCES,
    INSTALLABLE,
    KNOWN_CARDS,
    READY,
    SLOW_TOKENS_S,
    Judged,
    Place,
    best_bits,
    best_cache,
    judge,
    kept_quality,
    largest_context,
    places,
    rank,
    speed,
)
from modules.planner import GIB, PAGE_TOKENS, Card, Setup
from modules.presets import CACHE_MODES, EXL_ENGINES, Preset, Presets, Variant

from .conftest import ROOT

PRESETS = {preset.name: preset for preset in Presets([ROOT / "presets"]).list()}
PICKS = {
    "assistant": "Phi-4 14B, 6.5 bpw", "vision": "Qwen2.5-VL 7B, 8.0 bpw", "coding": "Qwen2.5-Coder 32B, 4.25 bpw",
    "reasoning": "FuseO1 32B Preview, 4.25 bpw",
}  # fmt: skip
V2 = {"exllamav2": READY, "exllamav3": INSTALLABLE, "llamacpp": READY}
ENGINES: dict[str, dict[str, str]] = {
    "as after ./start.sh": V2,
    "all ready": dict.fromkeys(("exllamav2", "exllamav3", "llamacpp"), READY),
    "ExLlamaV3 only": {"exllamav3": READY},
    "ExLlamaV2 only": {"exllamav2": READY, "exllamav3": "needs a newer card"},
    "none installed": {"exllamav2": INSTALLABLE, "exllamav3": INSTALLABLE, "llamacpp": READY},
    "none at all": {},
}


def place(*cards_gib: float, engines: Mapping[str, str] | None = None, ram_gib: int = 32) -> Place:
    return Place(tuple(Card(int(size * GIB)) for size in cards_gib), ram_gib * GIB, V2 if engines is None else engines)


def recommended(preset: Preset, where: Place) -> Judged | None:
    """The one that is recommended; fails when there are several, or a `why` stands at another one."""
    ranked = rank(preset, where)
    assert [j.variant for j in ranked] == list(preset.variants)
    assert [bool(j.why) for j in ranked] == [j.recommended for j in ranked]
    found = [j for j in ranked if j.recommended]
    assert len(found) <= 1
    return found[0] if found else None


@functools.cache
def chosen(name: str, engines: str, quarters: int, cards: int = 1) -> Judged | None:
    """On cards of so many quarters of a GiB."""
    return recommended(PRESETS[name], place(*[quarters / 4] * cards, engines=ENGINES[engines]))


def own(name: str, **changes: object) -> Variant:
    """A variant of the person's own, for a card: by default of 8 billion parameters at 4 bits."""
    shape = planner.Shape(36, 4096, 32, 8, 128, 12288, 151936)
    plain = Variant(name, name, "exllamav2", repo="a/b", revision="c", bpw=4.0, context=4096, shape=shape)
    return replace(plain, **changes)  # type: ignore[arg-type]


def preset_of(*variants: Variant) -> Preset:
    return Preset("own", "Own", "assistant", variants=variants)


# The shipped presets -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICKS)
def test_the_picks_for_24_gb(name: str) -> None:
    found = recommended(PRESETS[name], place(24))
    assert found
    assert found.variant.title == PICKS[name]
    assert found.verdict
    assert found.verdict.kind == "fits"


@pytest.mark.parametrize("name", PICKS)
def test_without_a_card_one_that_a_processor_can_talk_with(name: str) -> None:
    found = recommended(PRESETS[name], place())
    assert found
    assert found.plan
    assert (found.variant.engine, found.plan.gpu_bytes) == ("llamacpp", 0)
    assert speed(found.plan, place()) >= SLOW_TOKENS_S
    assert "processor" in found.why
    for judged in rank(PRESETS[name], place()):
        if judged.variant.engine in EXL_ENGINES:
            assert judged.verdict
            assert (judged.verdict.fits, "none is here" in judged.verdict.words) == (False, True)


def test_one_that_is_too_slow_for_a_processor_is_not_recommended() -> None:
    large = own("large", engine="llamacpp", repo="a/b", revision="", file="x-Q8_0.gguf", bpw=8.5)
    (judged,) = rank(preset_of(large), place(ram_gib=256))
    assert judged.plan
    assert judged.verdict
    assert judged.verdict.fits
    assert speed(judged.plan, place()) < SLOW_TOKENS_S
    assert not judged.recommended


def test_a_processor_with_too_little_memory_gets_a_smaller_one_and_in_the_end_none() -> None:
    sizes = []
    for ram_gib in (64, 2, 0):
        found = recommended(PRESETS["coding"], place(ram_gib=ram_gib))
        sizes.append(found.plan.needs_bytes if found and found.plan else 0)
    assert sizes[0] > sizes[1] > sizes[2] == 0


def test_the_bundled_demo_is_never_recommended() -> None:
    for preset, where in itertools.product(PRESETS.values(), (place(), place(4), place(96), place(ram_gib=1))):
        assert not any(j.recommended and j.variant.bundled for j in rank(preset, where))


def test_a_card_is_worth_installing_exllamav2_and_not_exllamav3() -> None:
    for preset in PRESETS.values():
        found = recommended(preset, place(24, engines=ENGINES["none installed"]))
        assert found
        assert found.variant.engine == "exllamav2"
        assert "ExLlamaV2 has to be installed first, on the System page." in found.why
        slow = {"llamacpp": READY, "exllamav3": INSTALLABLE}
        found = recommended(preset, place(24, engines=slow))
        assert found
        assert found.variant.engine == "llamacpp"
        assert "would answer better; it needs ExLlamaV3, see the System page." in found.why


# Laws ----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(PICKS)), st.sampled_from(sorted(ENGINES)), st.integers(16, 384), st.integers(1, 2))
def test_what_does_not_fit_or_cannot_run_is_never_recommended(
    name: str, engines: str, quarters: int, cards: int
) -> None:
    found = chosen(name, engines, quarters, cards)
    if found is None:
        return
    assert found.plan
    assert found.verdict
    assert found.verdict.fits
    assert ENGINES[engines][found.variant.engine] in (READY, INSTALLABLE)
    if not found.plan.setup.gpus:
        assert found.plan.needs_bytes <= 32 * GIB
    elif found.plan.setup.gpus == 1:
        assert found.plan.needs_bytes <= quarters * GIB / 4
    else:
        assert found.plan.needs_bytes <= cards * quarters * GIB / 4


@pytest.mark.parametrize("engines", ENGINES)
@pytest.mark.parametrize("name", PICKS)
def test_more_memory_on_the_card_never_lowers_the_quality(name: str, engines: str) -> None:
    on_card = [chosen(name, engines, quarters) for quarters in range(16, 97)] + [chosen(name, engines, 384)]
    qualities = [j.quality for j in on_card if j and j.plan and j.plan.setup.gpus]
    assert qualities == sorted(qualities)
    usable = ENGINES[engines].get("exllamav2"), ENGINES[engines].get("exllamav3")
    assert bool(qualities) == (usable[0] in (READY, INSTALLABLE) or usable[1] == READY)


def test_nothing_is_recommended_without_engines() -> None:
    for preset in PRESETS.values():
        ranked = rank(preset, place(24, engines={}))
        assert not any(j.recommended for j in ranked)
        assert {j.engine for j in ranked} == {f"{v.engine} is not known here" for v in preset.variants}


@given(st.floats(0.5, 32), st.floats(0, 8), st.sampled_from(["exllamav2", "exllamav3", "llamacpp"]))
def test_kept_quality_is_monotone_and_a_share(bits: float, more: float, engine: str) -> None:
    less = kept_quality(bits, engine)
    assert 0 < less <= kept_quality(bits + more, engine) <= 1
    assert less <= kept_quality(bits, "exllamav3")


def test_more_parameters_beat_more_bits_down_to_about_four() -> None:
    assert 14 * kept_quality(4.0) > 8 * kept_quality(8.0)
    assert 14 * kept_quality(2.2) < 8 * kept_quality(8.0)
    assert [kept_quality(bits) for bits in (1, 4, 6, 8)] == [0.1, 0.9, 1, 1]


# What decides, one after the other --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"bpw": 4.0}, {"bpw": 2.5, "context": 8192}),
        ({"context": 8192}, {"cache_mode": "FP16"}),
        ({"cache_mode": "Q8"}, {"cache_mode": "Q6", "licence": "mit"}),
        ({"licence": "apache-2.0"}, {"licence": "for research"}),
        ({"bpw": 6.0, "licence": "for research"}, {"bpw": 3.0, "licence": "mit"}),
        ({"bpw": 6.0}, {"bpw": 8.0}),  # equal in all that counts: the preset's own order
    ],
)
def test_the_order_of_the_reasons(better: dict[str, object], worse: dict[str, object]) -> None:
    common: dict[str, object] = {"cache_mode": "Q8"}
    first, second = own("better", **{**common, **better}), own("worse", **{**common, **worse})
    found = recommended(preset_of(first, second), place(24))
    assert found
    assert found.variant.title == "better"
    if better != {"bpw": 6.0}:
        turned = recommended(preset_of(second, first), place(24))
        assert turned
        assert turned.variant.title == "better"


@pytest.mark.parametrize("name", PICKS)
def test_the_why_names_what_a_person_compares(name: str) -> None:
    for where in (place(24), place(6), place()):
        found = recommended(PRESETS[name], where)
        assert found
        assert found.plan
        variant, setup = found.variant, found.plan.setup
        billions = planner.parameters(setup.shape) / 1e9
        bits = setup.quantization.scheme or f"{variant.bpw:g} bpw"
        assert found.why.startswith(f"{billions:.1f}B parameters at {bits}: ")
        assert f"a context of {variant.context:,} tokens" in found.why
        assert f"cache mode {variant.cache_mode}" in found.why
        assert found.verdict
        assert found.verdict.words in found.why
        assert variant.licence.lower() in FREE_LICENCES
        assert "licence" not in found.why


def test_the_why_names_a_licence_with_conditions_and_what_lacks_memory() -> None:
    large = own("the large one", bpw=16.0)
    bound = own("bound", licence="Research only (non-commercial)")
    found = recommended(preset_of(large, bound), place(8))
    assert found
    assert "Mind its licence: Research only (non-commercial)." in found.why
    (one,) = rank(preset_of(bound), place(8))
    assert "would need" not in one.why
    wider = own("wider", shape=replace(large.shape, layers=80))  # type: ignore[type-var]
    ranked = rank(preset_of(wider, bound), place(8))
    assert ranked[0].verdict
    assert f"wider would need {planner.in_gb(-ranked[0].verdict.spare_bytes)} more on the card." in ranked[1].why


def test_the_why_says_of_fewer_bits_only_where_they_are_fewer() -> None:
    small = planner.Shape(28, 1024, 16, 8, 128, 3072, 151936)
    words = "more parameters at fewer bits beat fewer at more"
    for bits, said in ((8.0, True), (3.0, False)):
        found = recommended(preset_of(own("large"), own("small", shape=small, bpw=bits)), place(24))
        assert found
        assert (found.variant.title, words in found.why) == ("large", said)
    worn = own("worn", shape=replace(small, layers=60, hidden=5120, intermediate=17408), bpw=2.2)
    found = recommended(preset_of(worn, own("sound")), place(24))
    assert found
    assert found.variant.title == "sound"
    assert "worn would fit too, but has lost more to its few bits" in found.why


def test_a_variant_without_a_shape_is_listed_and_not_judged() -> None:
    bare = own("bare", shape=None)
    ranked = rank(preset_of(bare, own("known")), place(24))
    assert (ranked[0].plan, ranked[0].verdict, ranked[0].recommended, ranked[0].why) == (None, None, False, "")
    assert ranked[1].recommended
    assert recommended(preset_of(bare), place(24)) is None


# Several cards -----------------------------------------------------------------------------------------


def test_two_cards_are_used_when_one_is_too_small() -> None:
    coding = PRESETS["coding"]
    alone, both = recommended(coding, place(16)), recommended(coding, place(16, 16))
    assert alone and both
    assert both.variant.title == PICKS["coding"] != alone.variant.title
    assert both.plan
    assert both.verdict
    assert both.plan.setup.gpus == 2
    assert both.verdict.words.startswith("Over 2 cards")
    for where in (place(24, 16), place(16, 24)):  # one is enough: the other stays free
        found = recommended(coding, where)
        assert found
        assert found.plan
        assert found.verdict
        assert (found.plan.setup.gpus, "2 cards" in found.verdict.words) == (1, False)


def test_what_a_preset_says_of_its_size_counts_on_two_cards_as_well() -> None:
    said = own("said", size_bytes=30 * 10**9)
    setup = planner.setup_of(said)
    assert judge(setup, place(12, 12))[1].fits  # by the arithmetic it would
    (judged,) = rank(preset_of(said), place(12, 12))
    assert judged.verdict
    assert not judged.verdict.fits


def test_what_others_use_on_a_card_is_not_there() -> None:
    full = Place((Card(24 * GIB, used_bytes=20 * GIB),), 32 * GIB, V2)
    found = recommended(PRESETS["coding"], full)
    assert found
    assert found.variant.title != PICKS["coding"]
    ours = Place((Card(24 * GIB, used_bytes=20 * GIB, released_bytes=20 * GIB),), 32 * GIB, V2)
    again = recommended(PRESETS["coding"], ours)
    assert again
    assert again.variant.title == PICKS["coding"]


# What fits of a model -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(8,), (12,), (24,), (12, 12), (8, 24)]), st.sampled_from(CACHE_MODES))
def test_the_largest_context_and_the_best_bits_are_the_largest_and_the_best(
    cards: tuple[float, ...], mode: str
) -> None:
    setup = replace(planner.setup_of(own("x", bpw=5.0)), cache_mode=mode)
    where = place(*cards)
    most = largest_context(setup, where)
    assert most % PAGE_TOKENS == 0
    if most:
        assert judge(replace(setup, context=most), where)[1].fits
    if most < 131072:
        assert not judge(replace(setup, context=most + PAGE_TOKENS), where)[1].fits
    bits = best_bits(setup, where)
    for each in planner.BITS:
        of = replace(setup, quantization=replace(setup.quantization, bpw=each))
        assert judge(of, where)[1].fits == (each <= bits)


def test_the_largest_context_is_not_more_than_the_model_was_made_for() -> None:
    setup = planner.setup_of(own("x", max_position_embeddings=16384))
    assert largest_context(setup, place(96)) == 16384
    assert largest_context(setup, place(96), most=4096) == 4096
    assert largest_context(setup, place(1)) == largest_context(setup, place()) == 0


def test_the_best_cache_harms_no_model() -> None:
    setup = replace(planner.setup_of(own("x")), context=32768)
    found = [best_cache(setup, place(size)) for size in (24, 8, 7, 2)]
    assert found[0] == "FP16"
    assert found[-1] == ""
    losses = [(*CACHE_MODES, "").index(mode) for mode in found]
    assert losses == sorted(losses)
    qwen = replace(setup, shape=replace(setup.shape, architecture="Qwen2ForCausalLM"))
    for size in range(4, 12):
        assert best_cache(qwen, place(size)) != "Q4"


def test_machines_that_people_ask_about() -> None:
    known = places(32 * GIB)
    assert len(known) == len(KNOWN_CARDS) + sum("2 ×" in name for name in known)
    pair = known["2 × RTX 3090, 48 GB"]
    assert [card.total_bytes for card in pair.cards] == [24 * GIB] * 2
    setup: Setup = planner.setup_of(own("x"))
    assert pair.room(setup).total_bytes == 24 * GIB
    assert pair.room(setup, over_all=True).total_bytes == 48 * GIB
    assert pair.room(replace(setup, gpus=0)).total_bytes == 32 * GIB
    assert place().room(setup).free_bytes == 0
    for name, pick in PICKS.items():
        found = recommended(PRESETS[name], known["RTX 4090, 24 GB"])
        assert found
        assert found.variant.title == pick


@pytest.mark.parametrize("cards", [(8,), (12,), (16,), (24,), (32,), (48,), (12, 12), (24, 24)])
@pytest.mark.parametrize("v2", [READY, INSTALLABLE])
@pytest.mark.parametrize("v3", [READY, INSTALLABLE])
def test_no_variant_is_said_to_be_worse_and_to_answer_better(cards: tuple[float, ...], v2: str, v3: str) -> None:
    where = place(*cards, engines={"llamacpp": READY, "exllamav2": v2, "exllamav3": v3})
    for preset in Presets([ROOT / "presets"]).list():
        best = recommended(preset, where)
        for variant in preset.variants:
            worse = best is not None and f"{variant.title} would fit too, but has lost more" in best.why
            assert not (worse and best is not None and f"{variant.title} would answer better" in best.why)


def test_a_model_made_for_a_long_context_is_offered_all_of_it() -> None:
    setup = planner.setup_of(own("x", max_position_embeddings=1 << 20))
    assert largest_context(setup, place(400)) == 1 << 20
    unknown = replace(setup, shape=replace(setup.shape, max_positions=0))
    assert largest_context(unknown, place(400)) == 131072


def test_a_busy_third_card_takes_nothing_away() -> None:
    """A 70B at 4 bits on two cards of 24 GB; the third has 0.3 GB left, less than a card costs without a layer."""
    shape = planner.ModelShape(80, 8192, 64, 8, 128, 28672, 128256, architecture="LlamaForCausalLM")
    setup = Setup(shape, planner.Quantization("exl2", 4.0), context=8192, cache_mode="Q8")
    busy = Card(8 * GIB, int(7.7 * GIB))
    two, large = place(24, 24), Card(24 * GIB)
    assert judge(setup, two)[1].fits
    for cards in ((large, large, busy), (busy, large, large), (large, busy, large)):
        planned, verdict = judge(setup, replace(two, cards=cards))
        assert verdict.fits and verdict.words.startswith("Over 2 cards") and planned.setup.gpus == 2
        spread = planner.split(setup, cards)
        assert [share.layers > 0 for share in spread.shares] == [card is large for card in cards]
        assert spread.gpu_split.split(",")[cards.index(busy)] == "0.000"
