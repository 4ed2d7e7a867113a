"""The use cases over the real loader and the fake engine: what is stored, stopped, refused, chosen."""

from __future__ import annotations

import json

import pytest

from modules.assistant import Assistant, engine_options, needs_bytes
from modules.chats import Chats
from modules.errors import Busy, ChatNotFound, InvalidRequest, PresetNotFound
from modules.images import Images
from modules.library import Library
from modules.messages import Delta, Failed, Finished
from modules.presets import Options, Presets

from .conftest import DEMO, FAKE, LLAMA, ROOT, eventually, in_thread

PRESET = """title = "{name}"
task = "{task}"
order = 9
system = "Be kind."
[sampling]
max_tokens = 500
[[variants]]
title = "Not here"
engine = "exllamav2"
repo = "a/b"
revision = "4.0bpw"
cache_mode = "Q8"
context = 4096
[[variants]]
title = "Fake"
engine = "fake"
path = "{path}"
context = 4096
"""


@pytest.fixture
def assistant(tmp_path, make_loader):
    own = tmp_path / "presets"
    own.mkdir()
    presets = Presets([ROOT / "presets", own], ["fake"])
    made = Assistant(
        presets, Library(tmp_path / "models", DEMO), make_loader(8 << 30), Chats(tmp_path / "chats.db"),
        Images(tmp_path / "images"), {"fake": FAKE, "llamacpp": LLAMA},
    )  # fmt: skip

    def add(name, task="assistant", **behaviour):
        (tmp_path / f"{name}.plan").write_text(json.dumps(behaviour))
        (own / f"{name}.toml").write_text(PRESET.format(name=name.title(), task=task, path=tmp_path / f"{name}.plan"))
        return name

    made.add_preset = add
    yield made
    made.close()


def test_an_answer_is_streamed_and_stored(assistant):
    job = assistant.reply(None, "say 4", (), assistant.add_preset("a"))
    events = list(job.follow())
    assert "".join(e.text for e in events if isinstance(e, Delta)) == "w0 w1 w2 w3 "
    assert isinstance(events[-1], Finished)
    user, answer = assistant.messages(job.chat, None, 10)
    assert (user.text, answer.text, answer.state, answer.variant) == ("say 4", "w0 w1 w2 w3 ", "done", "Fake")
    assert answer.counts.completion == 4 and assistant.job(job.chat) is None
    again = assistant.reply(job.chat, "say 2", (), "a")
    list(again.follow())
    assert [m.text for m in assistant.messages(job.chat, None, 10)][2:] == ["say 2", "w0 w1 "]


def test_stop_keeps_the_half_answer(assistant):
    job = assistant.reply(None, "say 500", (), assistant.add_preset("a", tokens_per_second=100))
    eventually(lambda: "w5" in job.text())
    with pytest.raises(Busy):
        assistant.reply(job.chat, "more", (), "a")
    assert assistant.stop(job.chat)
    assert list(job.follow())[-1].reason == "stopped"
    answer = assistant.messages(job.chat, None, 10)[-1]
    assert answer.state == "stopped" and answer.text.startswith("w0 w1") and not assistant.stop(job.chat)


def test_two_pages_that_send_at_the_same_moment_get_one_answer(assistant):
    first = assistant.reply(None, "say 1", (), assistant.add_preset("a", tokens_per_second=50))
    list(first.follow())
    outcomes = []

    def send():
        try:
            outcomes.append(assistant.reply(first.chat, "say 40", (), "a"))
        except Busy:
            outcomes.append(None)

    threads = [in_thread(send) for _ in range(8)]
    for thread in threads:
        thread.join(10)
    assert sum(o is not None for o in outcomes) == 1 and len(outcomes) == 8
    assert [m.role for m in assistant.messages(first.chat, None, 20)] == ["user", "assistant"] * 2


def test_stop_while_the_model_loads(assistant):
    job = assistant.reply(None, "say 5", (), assistant.add_preset("a", load_s=8))
    eventually(lambda: assistant.loader_view().progress is not None)
    assistant.stop(job.chat)
    eventually(lambda: job.done, 2)
    assert assistant.messages(job.chat, None, 10)[-1].state == "stopped"


def test_a_crash_keeps_and_marks_the_half_answer_and_the_next_message_works(assistant, tmp_path):
    job = assistant.reply(None, "say 9", (), assistant.add_preset("a", fault="crash_after", after=4))
    assert isinstance(list(job.follow())[-1], Failed)
    answer = assistant.messages(job.chat, None, 10)[-1]
    assert answer.state == "broken" and answer.text == "w0 w1 w2 w3 " and answer.error["code"] == "engine_crashed"
    (tmp_path / "a.plan").write_text("{}")
    list(assistant.reply(job.chat, "say 1", (), "a").follow())
    assert assistant.messages(job.chat, None, 10)[-1].state == "done"


def test_refusals_before_anything_is_stored(assistant):
    assistant.add_preset("a")
    for chat, text, images, preset, error in [
        (None, "x", (), "assistent", PresetNotFound), (None, "  ", (), "a", InvalidRequest),
        ("nope", "x", (), "a", ChatNotFound), (None, "x" * 2_000_001, (), "a", InvalidRequest),
        (None, "x", ("a",) * 9, "a", InvalidRequest),
    ]:  # fmt: skip
        with pytest.raises(error):
            assistant.reply(chat, text, images, preset)
    assert assistant.conversations() == []


def test_the_message_is_stored_even_when_the_model_cannot_load(assistant):
    job = assistant.reply(None, "hi", (), assistant.add_preset("a", fault="load_error"))
    assert list(job.follow())[-1].code == "load_failed"
    assert [m.state for m in assistant.messages(job.chat, None, 9)] == ["done", "broken"]


def test_survey_says_what_is_here(assistant):
    states = {s.variant.tier or s.variant.title: s for s in assistant.survey(assistant.presets.get("reasoning"))}
    assert states["nvidia-24"].state == "engine_missing" and "--revision" in states["nvidia-24"].command
    assert states["cpu-better"].state == "not_downloaded" and states["demo"].chosen and states["demo"].state == "ready"


def test_the_vision_preset_asks_for_a_picture(assistant):
    job = assistant.reply(None, "What is in the picture?", (), "vision")
    assert list(job.follow())[-1].code == "image_missing"


def test_delete_stops_the_answer(assistant):
    job = assistant.reply(None, "say 5000", (), assistant.add_preset("a", tokens_per_second=50))
    eventually(job.text)
    assistant.delete(job.chat)
    eventually(lambda: job.done)
    with pytest.raises(ChatNotFound):
        assistant.messages(job.chat, None, 5) or assistant.chats.get(job.chat)


@pytest.mark.parametrize(
    ("preset", "question", "words"),
    [("reasoning", "What is 12 + 13?", "25"), ("assistant", "What does 6.5 bpw mean?", "weight")],
)
def test_the_demo_models_answer(assistant, preset, question, words):
    job = assistant.reply(None, question, (), preset)
    assert isinstance(list(job.follow())[-1], Finished) and words in job.message.text


def test_options_cross_the_pipe_as_words():
    options = Options(force_thought=True, draft="ngram", draft_tokens=3, loras=("/a/b:0.5", "/c", "C:/d"))
    assert engine_options(options) == (
        ("draft", "ngram"), ("draft_tokens", "3"), ("force_thought", "1"),
        ("loras", '[["/a/b", 0.5], ["/c", 1.0], ["C:/d", 1.0]]'),
    )  # fmt: skip
    assert engine_options(None) == engine_options(Options()) == ()


def test_what_a_model_takes_on_the_card_comes_from_the_planner():
    coding = Presets([ROOT / "presets"]).get("coding")
    assert 20e9 < needs_bytes(coding.variants[0], 18_760_000_000) < 23e9
