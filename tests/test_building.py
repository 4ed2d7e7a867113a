"""Which cards the engines see, in which order, and what of each is for models; a model that needs more than one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from modules import building, planner
from modules.advice import place_of
from modules.assistant import Assistant
from modules.chats import Chats
from modules.hardware import Card, Cpu, Disk, Driver, Machine, Memory, System
from modules.images import Images
from modules.library import Library
from modules.planner import GIB
from modules.presets import Options, Presets
from modules.settings import read

from .conftest import DEMO, LLAMA, ROOT

SMALL = Card(0, "RTX 3060", "GPU-3060", total_bytes=12 * GIB, free_bytes=12 * GIB, capability=(8, 6))
LARGE = Card(1, "RTX 4090", "GPU-4090", total_bytes=24 * GIB, free_bytes=24 * GIB, capability=(8, 9))
OLD = Card(2, "P40", "GPU-P40", total_bytes=48 * GIB, free_bytes=48 * GIB, capability=(6, 1))
LOST = Card(3, "RTX 5090", "GPU-5090", "lost", "It is gone.", total_bytes=32 * GIB)
PLAIN = read([])


def machine(*cards: Card) -> Machine:
    return Machine(
        0.0, Driver("ok"), cards, Cpu("cpu", 4, 4, 4), Memory(32 * GIB, 20 * GIB), Disk("/models", 1, 1, "SSD"),
        System("Linux", "6", "x86_64", (3, 11, 7), 64),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_largest_card_that_engines_run_on_comes_first() -> None:
    several = machine(SMALL, LARGE, OLD, LOST)
    assert [card.uuid for card in building.visible_cards(several)] == ["GPU-4090", "GPU-3060"]
    assert building._order_of_cards(several) == (
        ("CUDA_DEVICE_ORDER", "PCI_BUS_ID"), ("CUDA_VISIBLE_DEVICES", "GPU-4090,GPU-3060"),
    )  # fmt: skip
    assert building._order_of_cards(machine(SMALL)) == (("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),)
    assert building.visible_cards(machine(OLD)) == [OLD]
    assert building.visible_cards(machine()) == []


def test_what_a_person_made_visible_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    several = machine(SMALL, LARGE)
    for said, order in (("0,1", ["GPU-3060", "GPU-4090"]), ("GPU-3060", ["GPU-3060"]), ("", []), ("7", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
        assert [card.uuid for card in building.visible_cards(several)] == order
        assert "CUDA_VISIBLE_DEVICES" not in dict(building._order_of_cards(several))


def test_models_get_the_cards_less_a_gigabyte_or_what_was_said() -> None:
    cards, budget = building.cards_for_models(PLAIN, machine(SMALL, LARGE))
    assert [card.free_bytes for card in cards] == [23 * GIB, 11 * GIB]
    assert budget == 23 * GIB
    cards, budget = building.cards_for_models(replace(PLAIN, vram_budget_bytes=20 * GIB), machine(SMALL, LARGE))
    assert [card.free_bytes for card in cards] == [20 * GIB, 11 * GIB]
    assert budget == 20 * GIB
    assert building.cards_for_models(PLAIN, machine()) == ([], 0)


def test_advice_counts_with_the_cards_and_the_memory_that_the_loader_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    several = machine(SMALL, replace(LARGE, free_bytes=6 * GIB, ours_bytes=0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    chosen = read(["--vram-budget", "8GB", "--memory-budget", "1GB"])
    found = place_of(several, {}, building.budget_of(chosen))
    assert [(card.total_bytes, card.free_bytes) for card in found.cards] == [(8 * GIB, 6 * GIB)]
    assert found.ram_bytes == 1 * GIB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [card.free_bytes for card in place_of(several, {}, building.budget_of(chosen)).cards] == [8 * GIB]
    ample = replace(chosen, memory_budget_bytes=31 * GIB)
    for held, ram in ((0, 20), (5 * GIB, 25), (90 * GIB, 31)):  # an unload gives back what our own models hold
        assert place_of(several, {}, building.budget_of(ample), held).ram_bytes == ram * GIB


@pytest.fixture
def assistant(tmp_path, make_loader):
    made = Assistant(
        Presets([ROOT / "presets"]), Library(tmp_path / "models", DEMO), make_loader(8 << 30),
        Chats(tmp_path / "chats.db"), Images(tmp_path / "images"), {"llamacpp": LLAMA},
    )  # fmt: skip
    yield made
    made.close()


def test_a_model_is_spread_only_where_the_first_card_is_not_enough(assistant) -> None:
    coder = assistant.presets.get("coding").variants[0]
    alone = planner.plan_variant(coder).gpu_bytes
    for cards in ([24], [24, 24], [48, 8]):
        assistant.set_cards([planner.Card(size * GIB) for size in cards], cards[0] * GIB)
        assert assistant._placed(coder)[0] == ""
        assert assistant._needs(coder, 0) == alone
    assistant.set_cards([planner.Card(16 * GIB), planner.Card(11 * GIB)], 16 * GIB)
    split, share = assistant._placed(coder)
    first, second = map(float, split.split(","))
    assert 0 < second < first < 16
    assert alone / 2 < share <= 16 * GIB
    assert assistant._placed(coder) == (split, share)  # the same again, or it would be loaded again
    assistant.set_cards([planner.Card(6 * GIB), planner.Card(6 * GIB)], 6 * GIB)
    assert assistant._placed(coder) == ("", alone)
    assert assistant._needs(coder, 0) > 6 * GIB  # so that it is refused


@pytest.mark.parametrize(
    ("options", "share"),
    [
        (Options(gpu_split="auto"), min),
        (Options(gpu_split="10,30"), lambda needs, first: needs * 3 / 4),
        (Options(tensor_parallel=True), lambda needs, first: needs / 2),
    ],
)  # fmt: skip
def test_what_the_preset_says_of_the_cards_stays(assistant, options: Options, share) -> None:
    assistant.set_cards([planner.Card(16 * GIB), planner.Card(16 * GIB)], 16 * GIB)
    coder = replace(assistant.presets.get("coding").variants[0], options=options)
    split, needs = assistant._placed(coder)
    assert split == ""
    assert needs == pytest.approx(share(planner.plan_variant(coder).gpu_bytes, 16 * GIB), rel=0.001)
