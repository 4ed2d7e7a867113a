"""One engine child: load, ask, cancel, crash, hang, garbage, orphan."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from modules.errors import EngineCrashed, EngineMissing, EngineStuck, GenerateError, LoadError, LoadTimedOut, from_wire
from modules.messages import Cancel, Delta, EngineSpec, Finished, Message, Prefill, Sampling, Start, decode, encode
from modules.process import EngineKind, EngineProcess, Limits

from .conftest import DEMO, FAKE, LLAMA, ROOT, eventually, in_thread


def start(text: str, id: str = "r1", **sampling) -> Start:
    return Start(id, (Message("user", text),), Sampling(**sampling))


def spoken(events) -> str:
    return "".join(e.text for e in events if isinstance(e, Delta))


@pytest.fixture
def begin():
    made = []

    def make(kind=FAKE, **options):
        made.append(EngineProcess(kind, **options))
        return made[-1]

    yield make
    for process in made:
        process.stop()


def test_load_count_and_answer(begin, plan):
    engine, seen = begin(), []
    ready = engine.load(plan(bytes=500, load_s=0.05), seen.append)
    assert ready.context == 4096 and ready.memory_bytes == 500
    assert [e.done_bytes for e in seen] == sorted(e.done_bytes for e in seen) and seen[-1].fraction == 1
    assert engine.version == "1.0" and engine.measure() == 500
    assert engine.count_tokens(("one two", "three", "")) == (2, 1, 0)
    events = list(engine.generate(start("say 5")))
    assert spoken(events) == "w0 w1 w2 w3 w4 "
    assert isinstance(events[-1], Finished) and events[-1].reason == "stop" and events[-1].counts.completion == 5


def test_answers_share_the_pipe(begin, plan):
    engine = begin()
    engine.load(plan(tokens_per_second=200), print)
    got = {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: spoken(engine.generate(start(f"say {20 + i}", f"r{i}")))}))
        for i in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(10)
    assert {i: len(text.split()) for i, text in got.items()} == {i: 20 + i for i in range(8)}


def test_cancel_in_the_answer_and_in_the_prompt(begin, plan):
    engine = begin()
    engine.load(plan(tokens_per_second=50, prompt_tokens_per_second=1000), print)
    events = []
    for event in engine.generate(start("say 5000")):
        events.append(event)
        if len([e for e in events if isinstance(e, Delta)]) == 3:
            engine.cancel("r1")
    assert events[-1].reason == "stopped" and len(spoken(events).split()) < 8
    began = time.monotonic()
    events = []
    for event in engine.generate(start("word " * 4000, "r2")):
        events.append(event)
        engine.cancel("r2")
    assert events[-1].reason == "stopped" and not spoken(events) and isinstance(events[0], Prefill)
    assert time.monotonic() - began < 2


def test_a_cancel_that_overtakes_its_answer_is_not_lost(begin, plan):
    engine, events = begin(), []
    engine.load(plan(tokens_per_second=50, count_s=0.4), print)
    for number in range(3):
        counting = in_thread(lambda: engine.count_tokens(("one",)))  # the worker does nothing else meanwhile
        time.sleep(0.1)
        answering = in_thread(lambda id=f"r{number}": events.extend(engine.generate(start("say 500", id))))
        time.sleep(0.1)
        engine.cancel(f"r{number}")
        answering.join(8)
        counting.join()
        assert isinstance(events[-1], Finished) and events[-1].reason == "stopped" and len(events) < 100
    assert spoken(engine.generate(start("say 2", "r2"))) == "w0 w1 "


def test_a_reader_that_walks_away_cancels(begin, plan):
    engine = begin()
    engine.load(plan(tokens_per_second=100), print)
    answer = engine.generate(start("say 100000"))
    next(answer)
    answer.close()
    assert spoken(engine.generate(start("say 3", "r2"))) == "w0 w1 w2 "


@pytest.mark.parametrize(
    ("behaviour", "error", "words"),
    [
        ({"fault": "load_error"}, LoadError, "weights are broken"),
        ({"fault": "load_crash"}, EngineCrashed, "exit code 7.*going down while loading"),
        ({"fault": "load_hang"}, LoadTimedOut, "not ready in time"),
    ],
)
def test_a_load_that_fails(begin, plan, behaviour, error, words):
    engine = begin(limits=Limits(load_s=1))
    with pytest.raises(error, match=words):
        engine.load(plan(**behaviour), print)


def test_a_crash_is_told_within_a_second_and_keeps_what_was_said(begin, plan):
    gone = threading.Event()
    engine = begin(on_exit=lambda process: gone.set())
    engine.load(plan(fault="crash_after", after=3), print)
    events, began = [], time.monotonic()
    with pytest.raises(EngineCrashed, match="exit code 9"):
        for event in engine.generate(start("say 10")):
            events.append(event)
    assert spoken(events) == "w0 w1 w2 " and time.monotonic() - began < 1.5
    assert gone.wait(2) and not engine.alive
    with pytest.raises(EngineCrashed):
        list(engine.generate(start("again", "r2")))


def test_a_kill_in_the_middle(begin, plan):
    engine = begin()
    engine.load(plan(tokens_per_second=50), print)
    began = 0.0
    with pytest.raises(EngineCrashed, match="signal 9"):
        for event in engine.generate(start("say 1000")):
            if isinstance(event, Delta) and not began:
                os.kill(engine.pid, signal.SIGKILL)
                began = time.monotonic()
    assert time.monotonic() - began < 1


def test_a_silent_engine_is_ended(begin, plan):
    engine = begin(limits=Limits(stall_s=0.6))
    engine.load(plan(fault="hang_after", after=2), print)
    with pytest.raises(EngineStuck, match="no sign of life"):
        list(engine.generate(start("say 10")))
    eventually(lambda: not engine.alive)


def test_an_answer_that_waits_for_another_is_no_sign_of_a_stuck_engine(begin, plan):
    engine = begin(limits=Limits(stall_s=1.5))
    assert engine.load(plan(at_once=1, tokens_per_second=20), print).at_once == 1
    long = []
    first = in_thread(lambda: long.extend(engine.generate(start("say 60"))))  # 3 seconds
    eventually(lambda: long)
    assert spoken(engine.generate(start("say 2", "r2"))) == "w0 w1 "
    first.join(5)
    assert long[-1].counts.completion == 60


def test_an_error_of_the_engine_leaves_it_alive(begin, plan):
    engine = begin()
    engine.load(plan(fault="error_after", after=1), print)
    with pytest.raises(GenerateError, match="failed on order"):
        list(engine.generate(start("say 4")))
    assert engine.alive and spoken(engine.generate(start("say 1", "r2"))) == "w0 "


def test_what_a_library_prints_is_never_taken_for_a_message(begin, plan):
    engine = begin()
    engine.load(plan(fault="garbage", after=1), print)
    assert spoken(engine.generate(start("say 3"))) == "w0 w1 w2 "
    eventually(lambda: any("this is no message" in line for line in engine.log))


def test_an_engine_that_cannot_be_imported(begin):
    with pytest.raises(EngineMissing, match="no engine called"):
        begin(EngineKind("nothing")).load(EngineSpec("nothing", "x"), print)
    with pytest.raises(EngineMissing, match="cannot be imported"):
        begin(EngineKind("x", where="tests.no_such:Engine")).load(EngineSpec("x", "x"), print)
    with pytest.raises(EngineCrashed, match="could not be started"):
        begin(EngineKind("x", python="/no/such/python"))


def test_no_orphan_when_the_parent_is_killed(plan):
    spec = plan(load_s=0)
    code = (
        "import sys,time;from modules.process import *;from modules.messages import *;"
        f"p=EngineProcess(EngineKind('fake',where='tests.fake_engine:FakeEngine'));p.load(EngineSpec('fake',{spec.model!r}),id);"
        "print(p.pid,flush=True);time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    eventually(lambda: not _running(child), 2)


def _running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_messages_survive_the_pipe_and_garbage_is_one_kind_of_error():
    message = Start("1", (Message("user", "hé\u2028\U0001f600", ("a.png",)),), Sampling(stop=("x",), seed=3), True)
    assert decode(encode(message)) == message and encode(message).count("\n") == 1
    for line in ("", "nonsense", "[]", '{"kind":"Nobody"}', '{"kind":"Delta"}', "3", '{"kind":[]}'):
        with pytest.raises(ValueError, match="not a message"):
            decode(line)
    assert decode('{"kind":"Cancel","id":"1","later":2}') == Cancel("1")
    assert isinstance(from_wire({"code": "no such code"}), EngineCrashed)


def spec(name: str, **options) -> EngineSpec:
    return EngineSpec("llamacpp", str(DEMO / f"{name}-q8_0.gguf"), context=2048, threads=1, **options)


def test_llamacpp_answers_thinks_counts_and_stops(begin):
    engine = begin(LLAMA)
    assert engine.load(spec("reasoning", parallel=2), print).at_once == 2
    engine.ping()
    assert engine.count_tokens(("", "12 + 13"))[0] == 0
    events = list(engine.generate(start("What is 12 + 13?", temperature=0.0)))
    thought = "".join(e.text for e in events if isinstance(e, Delta) and e.channel == "reasoning")
    answer = "".join(e.text for e in events if isinstance(e, Delta) and e.channel == "text")
    assert "12+13=25" in thought and "think>" not in thought + answer and answer == "The answer is 25."
    end = events[-1]
    assert end.counts.completion > end.counts.reasoning > 5 and end.timings.tokens_per_second > 1
    cut = list(engine.generate(start("What is 12 + 13?", "r2", temperature=0.0, max_tokens=3)))[-1]
    assert cut.reason == "length" and cut.counts.completion == 3


def test_llamacpp_says_what_is_wrong_with_a_file(begin, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(1000))
    with pytest.raises(LoadError, match=r"could not load bad\.gguf"):
        begin(LLAMA).load(EngineSpec("llamacpp", str(bad)), print)


def test_llamacpp_refuses_a_prompt_that_is_too_long(begin):
    engine = begin(LLAMA)
    engine.load(EngineSpec("llamacpp", str(DEMO / "assistant-q8_0.gguf"), context=256, threads=1), print)
    from modules.errors import ContextTooLong

    with pytest.raises(ContextTooLong, match="256"):
        list(engine.generate(start("hello there " * 500)))
