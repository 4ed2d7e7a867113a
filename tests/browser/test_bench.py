"""Measuring from the page: pressed, seen from another page, cancelled, and the table at three widths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Driver, Server

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]
SLOW = """title = "Slow"
task = "assistant"
order = 9
[[variants]]
id = "slow"
title = "Fake"
engine = "fake"
path = "{path}"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench server")
    (folder / "data" / "presets").mkdir(parents=True)
    (folder / "slow.plan").write_text(json.dumps({"tokens_per_second": 5}))
    (folder / "data" / "presets" / "slow.toml").write_text(SLOW.format(path=folder / "slow.plan"))
    running = Server(folder, "--engine", "fake=tests.fake_engine:FakeEngine").wait()
    yield running
    running.stop()


def measure(page, name: str) -> None:
    page.click("#bench-one summary")
    page.click(f'#bench-page [data-name="{name}"]')


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (768, 1000), (390, 844)])
def test_a_variant_is_measured_and_its_row_chart_and_markdown_appear(chromium, server, width, height) -> None:
    context = chromium.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(30_000)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    driver = Driver(context, server.url, "#system")
    page = driver.page
    page.wait_for_selector("#bench-page [data-state=idle]", state="visible")
    before = page.locator("#measured-page tbody tr").count()
    measure(page, "coding/demo-demo-1-mb")
    page.wait_for_function("n => document.querySelectorAll('#measured-page tbody tr').length === n + 1", arg=before)
    row = page.locator("#measured-page tbody tr").first
    assert "Coding · Demo, 1 MB" in row.inner_text() and "Q8_0, 8.50 bpw" in row.inner_text()
    page.wait_for_selector("#bench-page >> text=1 of 1 measured.")
    assert page.locator(".speeds .point").count() >= before + 1
    assert page.locator(".speeds .dot").first.evaluate("e => getComputedStyle(e).fill") == "rgb(13, 148, 136)"
    # Nothing lies outside the window: cells, chart, buttons; on narrow pages a row is a card with its labels.
    right = page.evaluate(
        """Math.max(...[...document.querySelectorAll('#bench-page *, #measured-page *')]
            .filter(e => e.getClientRects().length).map(e => e.getBoundingClientRect().right))"""
    )
    assert right <= width
    label = page.locator("#measured-page td").nth(3).evaluate("e => getComputedStyle(e, '::before').content")
    assert label == ('"Decode tok/s"' if width < 900 else "none")
    page.click("#measured-page [data-copy]")
    page.wait_for_selector("#measured-page >> text=Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("| Date | Engine | Commit |") and copied.count("\n") == before + 3
    with page.expect_download() as saved:
        page.click("#measured-page a[download]")
    assert saved.value.suggested_filename == "turntable-measured.md"
    assert Path(saved.value.path()).read_text() == copied
    assert driver.errors == []
    context.close()


def test_a_run_is_seen_and_cancelled_from_another_page_and_the_chat_goes_on(chromium, server) -> None:
    # A context each: a page behind another one of the same window is slowed down.
    contexts = [chromium.new_context() for _ in range(2)]
    for context in contexts:
        context.set_default_timeout(30_000)
    one, other = (Driver(context, server.url, "#system") for context in contexts)
    one.page.wait_for_selector("#bench-page [data-state=idle]", state="visible")
    measure(one.page, "slow/slow")
    other.page.wait_for_selector("#bench-page >> text=Slow · Fake writes")
    one.tab("reasoning")
    one.send("reasoning", "What is 12 + 13?")
    assert "25" in one.answer("reasoning")
    assert other.page.locator("#bench-page [data-state=running]").count() == 1
    other.page.click("#bench-page [data-action=cancel]")
    other.page.wait_for_selector("#bench-page >> text=Cancelled. 0 of 1 measured.")
    one.page.click("#tab-system")
    one.page.wait_for_selector("#bench-page >> text=Cancelled. 0 of 1 measured.")
    assert one.errors == other.errors == []
    for context in contexts:
        context.close()
