"""What a real Chromium does while answers stream: lag behind the engine's end, main thread, long answers, many tabs."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.running import add_fake, program

PIECE = (
    "## Part {i}\n\nSome **bold** ones, a `name` and a [link](https://example.org/{i}) in a paragraph that goes on "
    "for a while so that it wraps.\n\n- first point\n- second *point*\n\n| a | b |\n|---|---|\n| 1 | {i} |\n\n"
    "```python\ndef f{i}(x):\n    return x + {i}\n```\n\n"
)
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def measure() -> dict[str, Any]:
    """Print the table. Needs playwright and a Chromium (TURNTABLE_CHROMIUM, or one on the path)."""
    from playwright.sync_api import sync_playwright

    mixed = _words("".join(PIECE.format(i=i) for i in range(1200)))
    path = os.environ.get("TURNTABLE_CHROMIUM") or shutil.which("chromium")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        add_fake(folder, "mixed", tokens_per_second=100, text="".join(mixed[:2000]))
        long = "".join(mixed[:18000])
        add_fake(folder, "long", tokens_per_second=100, text=long + "".join(mixed[:600]), burst=18000)
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        with program(folder, "--engine", "fake=tests.fake_engine:FakeEngine") as running:
            figures = {
                "mixed_2000": _one(browser, running.address, "mixed", 20.0),
                "after_18000": _one(browser, running.address, "long", 6.0),
                "tabs_beside": _tabs(browser, running.address),
            }
        browser.close()
    print("2,000 tokens of mixed Markdown at 100/s, and 600 at 100/s on top of 18,000")
    for label in ("mixed_2000", "after_18000"):
        row = figures[label]
        print(f"{label:12s} {row['seconds']:7.2f} s, lag {row['lag_s']:.3f} s, main thread busy {row['busy']:.0%}")
    print(f"tabs of the same browser that stay alive beside a streaming one: {figures['tabs_beside']}")
    return figures


def _words(text: str) -> list[str]:
    import re

    return re.findall(r"\s*\S+\s?|\s+", text)


def _busy_s(session: Any) -> float:
    """Seconds of tasks on the page's main thread so far."""
    metrics = session.send("Performance.getMetrics")["metrics"]
    return float(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))


def _one(browser: Any, address: str, preset: str, paced_s: float) -> dict[str, float]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.goto(f"http://{address}/")
    page.wait_for_selector("body.ready:not(.offline)")
    page.click(f"#tab-{preset}")
    page.fill(f"#message-{preset} textarea", "go")
    session = context.new_cdp_session(page)
    session.send("Performance.enable")
    page.click(f"#send-{preset}")
    page.wait_for_function(f"document.querySelector('#chat-{preset} .msg.bot .text')?.childElementCount")
    began, busy = time.monotonic(), _busy_s(session)
    page.wait_for_function(
        f"document.querySelector('#chat-{preset} .msg.bot footer')?.childElementCount", timeout=180_000, polling=20
    )
    spent, busy = time.monotonic() - began, _busy_s(session) - busy
    context.close()
    return {"seconds": spent, "lag_s": spent - paced_s, "busy": busy / spent}


def _tabs(browser: Any, address: str) -> int:
    """A tab streams; three more of the same browser must load and answer beside it."""
    context = browser.new_context()
    first = context.new_page()
    first.goto(f"http://{address}/")
    first.wait_for_selector("body.ready:not(.offline)")
    first.click("#tab-mixed")
    first.fill("#message-mixed textarea", "go")
    first.click("#send-mixed")
    alive = 0
    for _ in range(3):
        page = context.new_page()
        page.goto(f"http://{address}/")
        page.wait_for_selector("body.ready:not(.offline)", timeout=15_000)
        page.fill("#message-assistant textarea", "hello")
        page.click("#send-assistant")
        page.wait_for_selector("#chat-assistant .msg.bot footer .copy-all", timeout=15_000)
        alive += 1
    first.click("#stop-mixed")
    first.wait_for_selector("#chat-mixed .mark.stopped")
    context.close()
    return alive
