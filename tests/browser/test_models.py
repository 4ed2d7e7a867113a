"""The Models page in a browser: from the advice over the download to the answer, against a hub on loopback."""

from __future__ import annotations

import json
import re

import pytest

from ..conftest import DEMO
from ..hub_server import TOKEN, Hub
from ..test_models_page import CONFIG, PICKS, weights
from .conftest import Driver, Server

WIDTHS = (1280, 768, 390)
# A bundled demo model under another name: after the download it answers for real.
PRESET = """title = "Mine"
task = "assistant"
order = 9
[[variants]]
title = "Small, Q8_0"
engine = "llamacpp"
repo = "maker/small-GGUF"
file = "small-Q8_0.gguf"
bpw = 8.5
context = 2048
max_position_embeddings = 2048
size_bytes = 1172064
licence = "MIT"
shape = { layers = 4, hidden = 128, heads = 2, kv_heads = 2, head_dim = 64, intermediate = 384, vocab = 1536 }
system = ""
max_turns = 1
sampling = { temperature = 0.0, max_tokens = 400 }
"""


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        server.add("maker/model-exl2", {"README.md": b"branches"})
        files = {"config.json": CONFIG, "tokenizer.json": b"{}", "output.safetensors": weights()}
        server.add("maker/model-exl2", files, "4_25")
        server.add("maker/small-GGUF", {"small-Q8_0.gguf": (DEMO / "assistant-q8_0.gguf").read_bytes()})
        yield server


@pytest.fixture(scope="module")
def models_server(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models page")
    (folder / "data" / "presets").mkdir(parents=True)
    (folder / "data" / "presets" / "mine.toml").write_text(PRESET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv("HF_HOME", str(folder / "hub home"))
        patch.delenv("HF_TOKEN", raising=False)
        running = Server(folder, "--models-dir", str(folder / "models"))
    yield running.wait()
    running.stop()


@pytest.fixture
def drive(context, models_server):
    driver = Driver(context, models_server.url, "#models")
    driver.page.wait_for_selector(".variants tbody tr", state="visible")
    yield driver
    assert driver.errors == []
    assert driver.foreign == []


def shown(drive) -> list[str]:
    """The names of the variants that the filter leaves, in their order."""
    return drive.page.eval_on_selector_all(
        ".variants tbody tr:not([hidden])", "rows => rows.map(row => row.querySelector('b').textContent)"
    )


def numbers(drive, name: str) -> list[float]:
    return drive.page.eval_on_selector_all(
        ".variants tbody tr:not([hidden])", "(rows, name) => rows.map(row => +row.dataset[name])", name
    )


def judge_for(drive, machine: str) -> None:
    drive.page.select_option("#place", machine)
    drive.page.wait_for_function("m => document.querySelector('.machine').textContent.startsWith(m)", arg=machine)


def test_the_advice_for_a_24_gb_card_is_the_four_picks_in_words(drive) -> None:
    judge_for(drive, "RTX 4090, 24 GB")
    cards = drive.page.locator(".task").all_inner_texts()
    for pick, card in zip(PICKS, cards, strict=False):
        assert pick in card and "fits" in card and "bpw" in card and "cache mode" in card
    assert drive.page.locator(".task .parts").count() >= 4


def test_the_table_sorts_and_filters_and_stays_so_when_it_is_drawn_again(drive) -> None:
    drive.page.click("[data-sort=needs]")
    up = numbers(drive, "needs")
    assert up == sorted(up) and len(up) > 60
    drive.page.click("[data-sort=needs]")
    assert numbers(drive, "needs") == sorted(up, reverse=True)
    assert drive.page.get_attribute(".variants th:nth-child(7)", "aria-sort") == "descending"
    drive.page.click("[data-sort=title]")
    names = [name.lower() for name in shown(drive)]
    assert names[0] < names[-1]
    drive.page.fill("#filter-text", "qwen2.5-coder exllamav2")
    assert shown(drive) and all("Qwen2.5-Coder" in name for name in shown(drive))
    before = shown(drive)
    judge_for(drive, "RTX 3060, 12 GB")
    assert shown(drive) == before
    drive.page.check("#filter-fits")
    assert 0 < len(shown(drive)) < len(before)
    drive.page.fill("#filter-text", "no such model")
    drive.page.wait_for_selector("text=No variant is left by this filter.")
    drive.page.fill("#filter-text", "")
    drive.page.select_option("#filter-task", "vision")
    assert len(set(numbers(drive, "order"))) == 1
    drive.page.check("#filter-here")
    assert shown(drive) == ["Demo, 2 MB"]


def test_the_plan_moves_live_with_its_sliders(drive) -> None:
    judge_for(drive, "RTX 4090, 24 GB")
    drive.page.fill("#filter-text", "qwen2.5-coder 32b, 4.25")
    drive.page.click(".variants tr:not([hidden]) [data-plan]")
    drive.page.wait_for_selector("#plan .verdict.fits")

    def cache_gb() -> float:
        return float(re.search(r"KV cache\s*([\d.]+) GB", drive.page.inner_text("#plan .legend"))[1])

    whole = cache_gb()
    drive.page.focus("#plan-context")
    for _ in range(4):
        drive.page.keyboard.press("ArrowLeft")
    drive.page.wait_for_function(
        "whole => +document.querySelector('#plan .legend').innerText.match(/KV cache\\s*([\\d.]+)/)[1] < whole * 0.7",
        arg=whole,
    )
    assert drive.page.evaluate("document.activeElement.id") == "plan-context"
    assert drive.page.inner_text("#plan-form output >> nth=0") == "12,288 tokens"
    assert "python app.py download bartowski/" in drive.page.inner_text("#plan .command >> nth=0")
    drive.page.select_option("#plan-cache", "FP16")
    drive.page.focus("#plan-bits")
    drive.page.keyboard.press("End")
    drive.page.wait_for_selector("#plan .verdict.no")
    assert "missing" in drive.page.inner_text("#plan .verdict")
    drive.page.click("#plan [data-use=bits]")
    drive.page.wait_for_selector("#plan .verdict:not(.no)")
    assert "Other bits are another branch" in drive.page.inner_text("#plan-result")
    drive.page.keyboard.press("Escape")
    assert not drive.page.locator("#plan").is_visible()


def test_a_repository_that_was_typed_in_is_planned_without_its_weights(drive, hub) -> None:
    drive.page.fill("#look-repo", "maker/model-exl2")
    drive.page.keyboard.press("Enter")
    drive.page.click("#look-page button >> text=4_25")
    drive.page.wait_for_selector("#plan .verdict")
    assert "8.0B parameters" in drive.page.inner_text("#plan-about")
    assert "none is here" in drive.page.inner_text("#plan .verdict")
    assert hub.asked_for("output.safetensors") == []
    drive.page.click("#plan .close")
    drive.page.fill("#look-repo", "maker/nothing")
    drive.page.click("#look button")
    drive.page.wait_for_selector("#look-page .oops")
    assert "maker/nothing" in drive.page.inner_text("#look-page .oops")


def test_what_was_asked_of_a_lost_connection_is_given_up_and_the_next_plan_comes(drive, hub) -> None:
    hub.silent.set()
    try:
        drive.page.fill("#look-repo", "maker/model-exl2")
        drive.page.keyboard.press("Enter")
        drive.page.wait_for_selector("#look-page >> text=Asking")
        drive.page.wait_for_function(  # as page.js says it
            "() => { document.dispatchEvent(new Event('turntable-closed'));"
            " return document.querySelector('#look-page').textContent.includes('The connection was lost.') }"
        )
    finally:
        hub.silent.clear()
    drive.page.locator(".variants [data-plan]").first.click()
    drive.page.wait_for_selector("#plan .verdict")


def test_the_focus_stays_when_the_list_is_drawn_again(drive) -> None:
    button = drive.page.locator(".variants [data-plan]").nth(3)
    name = button.get_attribute("data-plan")
    button.focus()
    drive.page.evaluate("document.querySelector('.variants').dataset.old = 'yes'")
    drive.page.evaluate("document.querySelector('.filter [data-action=refresh]').click()")
    drive.page.wait_for_selector(".variants:not([data-old])")
    assert drive.page.evaluate("document.activeElement.dataset.plan") == name


def test_from_the_download_to_the_answer_and_away_with_undo(drive, models_server, chromium) -> None:
    other = Driver(chromium.new_context(viewport={"width": 390, "height": 800}), models_server.url, "#models")
    drive.page.click(".task[data-preset=mine] button.get")
    for page in (drive.page, other.page):  # jobs belong to the server: both pages see it, and what came of it
        page.wait_for_selector("#downloads-page [data-state=done]", timeout=20_000)
        page.wait_for_selector("#shelf-page >> text=small-GGUF")
    other.page.context.close()
    row = ".variants tr[data-preset=mine]"
    drive.page.wait_for_selector(f"{row} .badge.answers")
    assert "never" in drive.page.inner_text(".shelf tbody")
    drive.tab("mine")
    drive.send("mine", "What does 6.5 bpw mean?")
    assert "bit" in drive.answer("mine")
    drive.page.click("#tab-models")
    drive.page.wait_for_selector(".shelf >> text=within the hour")
    assert "Mine · Small, Q8_0" in drive.page.inner_text(".shelf tbody")
    drive.page.click(".shelf [data-action=delete]")
    drive.page.wait_for_selector(".gone >> text=was deleted")
    drive.page.wait_for_selector(f"{row}[data-here='0']")
    drive.page.click(".gone [data-action=undo]")
    drive.page.wait_for_selector(f"{row}[data-here='1']")
    drive.page.click(".shelf [data-action=delete]")
    drive.page.click(".gone [data-action=free]")
    drive.page.wait_for_selector("#shelf-page >> text=No model has been downloaded yet")
    assert not list((models_server.folder / "models").glob("*small*"))


def test_an_access_token_is_checked_kept_and_forgotten(drive, models_server) -> None:
    drive.page.click("#access summary")
    drive.page.wait_for_selector("text=No token is kept.")
    for given, answer in (("hf_wrong", "does not accept this token"), (TOKEN, "A token is kept.")):
        drive.page.fill("#token input", given)
        drive.page.keyboard.press("Enter")
        drive.page.wait_for_selector(f"#token-says:has-text('{answer}')")
        assert drive.page.input_value("#token input") == ""
    kept = models_server.folder / "hub home" / "token"
    assert kept.read_text() == TOKEN
    drive.page.click("#token-forget")
    drive.page.wait_for_selector("text=No token is kept.")
    assert not kept.exists()
    log = (models_server.folder / "data" / "turntable.log").read_text()
    assert TOKEN not in log + models_server.log()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_reached_at_three_widths(chromium, models_server, width: int, scheme: str) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    try:
        drive = Driver(context, models_server.url, "#models")
        drive.page.wait_for_selector(".variants tbody tr", state="visible")
        judge_for(drive, "RTX 3090, 24 GB")
        ends = "[...document.querySelectorAll('#models-list *')].map(e => e.getBoundingClientRect().right)"
        assert drive.page.evaluate(f"{ends}.every(right => right <= innerWidth + 0.5)")
        assert drive.page.locator(".variants thead").is_visible() == (width > 1149)  # below that each row is a card
        drive.page.locator(".variants [data-plan]").first.click()
        drive.page.wait_for_selector("#plan .verdict")
        box = drive.page.locator("#plan").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] >= 0
        assert drive.page.evaluate("(d => d.scrollWidth <= d.clientWidth)(document.querySelector('#plan'))")
        colours = drive.page.evaluate(
            "(s => [s.color, s.backgroundColor])(getComputedStyle(document.querySelector('#plan')))"
        )
        text, ground = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        assert (text > ground) == (scheme == "dark"), json.dumps(colours)
        assert drive.errors == []
    finally:
        context.close()
