"""The page on a fresh machine: four tabs, four real models, and what goes wrong."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
from PIL import Image, ImageDraw

from .conftest import Driver, Server

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]


@pytest.fixture
def picture(tmp_path):
    image = Image.new("RGB", (300, 300), (240, 240, 240))
    ImageDraw.Draw(image).ellipse([115, 115, 185, 185], fill=(220, 40, 40))
    image.save(tmp_path / "circle.png")
    return tmp_path / "circle.png"


def test_a_sum_with_its_thought_folded(drive):
    drive.tab("reasoning")
    drive.send("reasoning", "Tom has 7 boxes with 36 pens in each and gives away 58 pens. How many pens are left?")
    assert "194" in drive.answer("reasoning")
    thought = drive.last("reasoning").locator("details.think")
    assert thought.get_attribute("open") is None and not thought.locator(".body").is_visible()
    thought.locator("summary").click()
    assert "36*7=252" in thought.locator(".body").inner_text()
    assert "Reasoning" in drive.page.inner_text("#status-model")
    assert re.search(r"\d+ tok/s.*first token.*context \d+/2048", drive.page.inner_text("#status-speed"))


def test_a_function_that_runs(drive):
    drive.tab("coding")
    drive.send("coding", "Write a Python function called tally that counts the vowels in a string.")
    drive.answer("coding")
    code = drive.last("coding").locator(".code code").inner_text()
    space: dict = {}
    exec(code, space)
    assert space["tally"]("Hello") == 2


def test_a_picture_described(drive, picture):
    drive.tab("vision")
    drive.send("vision", "What is in the picture?")
    drive.page.wait_for_selector("#chat-vision .oops")
    assert "picture" in drive.last("vision").locator(".oops").inner_text().lower()
    drive.page.set_input_files("#image-vision input[type=file]", picture)
    drive.page.wait_for_selector("#image-vision .tray img")
    drive.send("vision", "What is in the picture?")
    answer = drive.answer("vision", 2)
    assert "red" in answer and "circle" in answer
    assert drive.page.locator("#chat-vision .msg.user .shots img").count() == 1


def test_a_question_about_the_app(drive):
    drive.send("assistant", "What does 6.5 bpw mean?")
    assert "bits per weight" in drive.answer("assistant").lower()
    assert drive.errors == [] and drive.foreign == []


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_pictures_come_by_paste_and_by_drop(drive, picture, way):
    import base64

    drive.tab("vision")
    drive.page.evaluate(
        """([way, data]) => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            const box = document.querySelector('#message-vision textarea');
            const carrier = new DataTransfer();
            carrier.items.add(new File([bytes], 'circle.png', { type: 'image/png' }));
            const how = { bubbles: true, cancelable: true };
            const event = way === 'paste' ? new ClipboardEvent('paste', { clipboardData: carrier, ...how })
              : new DragEvent('drop', { dataTransfer: carrier, ...how });
            box.dispatchEvent(event);
        }""",
        [way, base64.b64encode(picture.read_bytes()).decode()],
    )
    drive.page.wait_for_selector("#image-vision .tray img")
    drive.send("vision", "What do you see?")
    assert "red circle" in drive.answer("vision")
    drive.send("vision", "What colour is the circle?")
    assert "red" in drive.answer("vision", 2)
    assert "only your last message" in drive.last("vision").inner_text()


def test_several_pictures_and_taking_one_away(drive, picture):
    drive.tab("vision")
    other = picture.with_name("other.png")
    Image.new("RGB", (64, 64), "blue").save(other)
    drive.page.set_input_files("#image-vision input[type=file]", [picture, other])
    drive.page.wait_for_function("document.querySelectorAll('#image-vision .tray img').length === 2")
    drive.page.locator("#image-vision .tray button").last.click()
    assert drive.page.locator("#image-vision .tray img").count() == 1


def test_what_is_no_picture_is_refused(drive, tmp_path):
    drive.tab("vision")
    fake = tmp_path / "x.png"
    fake.write_text("<svg onload=alert(1)>")
    drive.page.set_input_files("#image-vision input[type=file]", fake)
    drive.page.wait_for_selector(".toast")
    box = drive.page.locator(".toast").bounding_box()
    assert box["x"] > 640 and 400 < box["y"] < 800 and "SVG" in drive.page.inner_text(".toast")
    assert drive.page.locator("#image-vision .tray img").count() == 0


def test_conversations_reload_open_new_and_delete(drive):
    drive.send("assistant", "hello")
    first = drive.answer("assistant")
    drive.page.reload()
    drive.page.wait_for_selector("#chat-assistant .msg.bot footer")
    assert drive.last("assistant").locator(".body.text").inner_text() == first
    drive.page.click("#new-chat")
    drive.page.wait_for_selector("#chat-assistant .welcome")
    count = drive.page.locator(".conversation").count()
    drive.page.locator(".conversation .open").first.click()
    drive.page.wait_for_selector("#chat-assistant .msg.bot footer")
    drive.page.locator(".conversation.on .delete").click()
    drive.page.locator(".conversation.on .delete.sure").click()
    drive.page.wait_for_function(f"document.querySelectorAll('.conversation').length === {count - 1}")
    drive.page.wait_for_selector("#chat-assistant .welcome")


def test_hostile_text_stays_text(drive):
    drive.send("assistant", "<img src=x onerror=document.title='gone'><script>document.title='gone'</script>")
    drive.answer("assistant")
    assert drive.page.title() == "Turntable" and drive.page.locator("#chat-assistant .msg.user img").count() == 0


def test_the_demo_says_what_it_is_and_leads_to_real_models(drive):
    assert "demo model" in drive.page.inner_text("#chat-assistant .demo")
    drive.page.click("#get-model-assistant")
    drive.page.wait_for_selector(".variants tbody tr", state="visible")
    text = drive.page.inner_text("#models-list")
    assert "Phi-4" in text and "not usable here" in text and "answers" in text


def test_the_system_page_shows_the_engines_and_what_can_be_done(drive):
    drive.page.click("#tab-system")
    drive.page.wait_for_selector("#engine-exllamav3", state="visible")
    text = drive.page.inner_text("#system-page")
    assert "llama.cpp" in text and "ExLlamaV2" in text and "ready" in text
    assert drive.page.locator("#engine-exllamav2 button").count() >= 1
    # A removal asks first, an unknown engine is refused in words.
    drive.page.evaluate("""document.querySelector('#topbar').insertAdjacentHTML('beforeend',
        '<button type="button" id="odd" data-panel="system" data-name="gpt" data-action="remove" '
        + 'data-sure="Remove?">x</button>')""")
    drive.page.click("#odd")
    assert drive.page.inner_text("#odd") == "Remove?"
    drive.page.click("#odd")
    drive.page.wait_for_selector("text=There is no engine 'gpt'")
    assert drive.foreign == []


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844), (768, 1000)])
def test_nothing_is_wider_than_the_window(chromium, server, width, height):
    context = chromium.new_context(viewport={"width": width, "height": height})
    drive = Driver(context, server.url)
    for name in ("assistant", "vision", "coding", "reasoning"):
        drive.tab(name)
        assert drive.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert drive.page.locator(f"#send-{name}").bounding_box()["x"] < width - 30
    for name in ("models", "system"):
        drive.page.click(f"#tab-{name}")
        assert drive.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()


@pytest.mark.parametrize(("width", "first"), [(1280, True), (390, False)])
def test_the_list_of_conversations_opens_and_closes(chromium, server, width, first):
    context = chromium.new_context(viewport={"width": width, "height": 800})
    drive = Driver(context, server.url)

    def seen() -> bool:
        return drive.page.evaluate(
            "(() => { const r = document.querySelector('#new-chat').getBoundingClientRect();"
            " return r.width > 0 && r.left >= 0 })()"
        )

    assert seen() is first
    for wanted in (not first, first):
        drive.page.click("#side-toggle")
        drive.page.wait_for_timeout(400)
        assert seen() is wanted
    context.close()


# With the timing-true fake engine -----------------------------------------------------------


PRESET = """title = "{title}"
task = "assistant"
order = {order}
system = ""
[sampling]
max_tokens = 30000
[[variants]]
title = "Fake"
engine = "fake"
path = "{path}"
context = 65536
parallel = 4
"""


def fake_server(folder, **plans):
    presets = folder / "data" / "presets"
    presets.mkdir(parents=True, exist_ok=True)
    for order, (name, behaviour) in enumerate(plans.items()):
        import json

        plan = folder / f"{name}.plan"
        plan.write_text(json.dumps(behaviour))
        (presets / f"{name}.toml").write_text(PRESET.format(title=name.title(), order=order + 10, path=plan))
    return Server(folder, "--engine", "fake=tests.fake_engine:FakeEngine").wait()


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    running = fake_server(
        tmp_path_factory.mktemp("fake"), slow={"tokens_per_second": 40}, quick={"tokens_per_second": 400},
        broken={"fault": "load_error"}, loading={"load_s": 2, "bytes": 5_000_000},
    )  # fmt: skip
    yield running
    running.stop()


def test_switching_tabs_while_an_answer_streams_and_stop(context, fake):
    drive = Driver(context, fake.url)
    drive.tab("slow")
    drive.send("slow", "say 2000")
    drive.page.wait_for_selector("#chat-slow .msg.bot.live")
    drive.tab("quick")
    drive.send("quick", "say 30")
    assert drive.answer("quick").split()[-1] == "w29"
    drive.tab("slow")
    before = len(drive.last("slow").inner_text())
    drive.page.wait_for_function(f"document.querySelector('#chat-slow .msg.bot')?.innerText.length > {before + 20}")
    drive.page.click("#stop-slow")
    words = drive.answer("slow").split()
    assert words[:3] == ["w0", "w1", "w2"] and len(words) < 1500
    assert "Stopped" in drive.last("slow").inner_text()


def test_a_reload_in_the_middle_loses_nothing(context, fake):
    drive = Driver(context, fake.url)
    drive.tab("slow")
    drive.send("slow", "say 120")
    drive.page.wait_for_function("document.querySelector('#chat-slow .msg.bot .text')?.innerText.includes('w10')")
    drive.page.reload()
    other = Driver(context, fake.url, drive.page.evaluate("location.hash"))
    for page in (drive, other):
        page.page.wait_for_selector("#chat-slow .msg.bot")
        assert page.answer("slow").split() == [f"w{i}" for i in range(120)]


def test_a_broken_model_says_why_and_the_rest_works(context, fake):
    drive = Driver(context, fake.url)
    drive.tab("broken")
    drive.send("broken", "hi")
    drive.page.wait_for_selector("#chat-broken .oops")
    assert "weights are broken" in drive.page.inner_text("#chat-broken .oops")
    drive.tab("quick")
    drive.send("quick", "say 3")
    assert drive.answer("quick").split() == ["w0", "w1", "w2"]


def test_the_page_answers_clicks_while_a_model_loads(context, fake):
    drive = Driver(context, fake.url)
    drive.tab("loading")
    drive.send("loading", "say 2")
    drive.page.wait_for_function("document.querySelector('#status-model').innerText.includes('MB')")
    assert re.search(r"\d+ %", drive.page.inner_text("#status-model"))
    for name in ("quick", "slow", "loading"):
        began = time.monotonic()
        drive.page.click(f"#tab-{name}")
        drive.page.wait_for_selector(f"#message-{name} textarea", state="visible")
        assert time.monotonic() - began < 0.5
    assert drive.answer("loading").split() == ["w0", "w1"]


def test_an_engine_killed_in_the_middle_of_an_answer(context, fake):
    drive = Driver(context, fake.url)
    drive.tab("slow")
    drive.send("slow", "say 500")
    drive.page.wait_for_function("document.querySelector('#chat-slow .msg.bot .text')?.innerText.includes('w10')")
    for pid in fake.engines():
        os.kill(pid, signal.SIGKILL)
    drive.page.wait_for_selector("#chat-slow .oops", timeout=1500)
    assert "w10" in drive.answer("slow") and "Broken off" in drive.last("slow").inner_text()
    drive.send("slow", "say 3")
    assert drive.answer("slow", 2).split() == ["w0", "w1", "w2"]


def test_a_broken_model_file(context, tmp_path):
    presets = tmp_path / "data" / "presets"
    presets.mkdir(parents=True)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(200))
    text = PRESET.format(title="Bad", order=9, path=bad).replace('engine = "fake"', 'engine = "llamacpp"')
    (presets / "bad.toml").write_text(text)
    (presets / "wrong.toml").write_text("title = 3\n")
    server = Server(tmp_path).wait()
    try:
        drive = Driver(context, server.url)
        drive.tab("bad")
        drive.send("bad", "hi")
        drive.page.wait_for_selector("#chat-bad .oops")
        assert "bad.gguf" in drive.page.inner_text("#chat-bad .oops")
        drive.tab("assistant")
        drive.send("assistant", "hello")
        assert drive.answer("assistant")
        drive.page.click("#tab-models")
        drive.page.wait_for_selector("#models-list .oops", state="visible")
        assert "wrong" in drive.page.inner_text("#models-list .oops")
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.log()
