"""Measuring, over the real loader: what a row holds, what is measured again, what fails, and the command itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from modules.assistant import Assistant
from modules.bench import Bench, BenchJobs, Sizes, commit_of, place_of, prompt_of
from modules.chats import Chats
from modules.errors import Busy, InvalidRequest, ModelNotDownloaded, PresetNotFound
from modules.hardware import Card, Cpu, Disk, Driver, Hardware, Machine, Memory, System
from modules.images import Images
from modules.library import Library
from modules.measured import History
from modules.messages import EngineSpec
from modules.presets import Presets
from modules.settings import BenchChoice

from .conftest import FAKE, KEEPS, LLAMA, ROOT, eventually

PRESET = """title = "{title}"
task = "assistant"
[[variants]]
id = "gone"
title = "Not here"
engine = "llamacpp"
path = "~/nothing.gguf"
[[variants]]
id = "here"
title = "Fake"
engine = "{engine}"
path = "{path}"
context = {context}
note = "Of {title}."
"""
SHORT = Sizes(prompt_tokens=100, tokens=12, repeats=2)


@pytest.fixture
def assistant(tmp_path, make_loader):
    own = tmp_path / "presets"
    own.mkdir()
    made = Assistant(
        Presets([own], ["fake", "keeps"]), Library(tmp_path / "models", tmp_path), make_loader(8 << 30),
        Chats(":memory:"), Images(tmp_path / "images"), {"fake": FAKE, "keeps": KEEPS, "llamacpp": LLAMA},
    )  # fmt: skip

    def add(name, engine="fake", context=4096, same_as="", **behaviour):
        plan = tmp_path / f"{same_as or name}.plan"
        if not same_as:
            plan.write_text(json.dumps({"bytes": 5 << 20, **behaviour}))
        (own / f"{name}.toml").write_text(
            PRESET.format(title=name.title(), engine=engine, path=plan, context=context)
        )

    made.add = add
    yield made
    made.close()


@pytest.fixture
def history(tmp_path):
    return History(tmp_path / "measured.jsonl")


@pytest.fixture
def bench(assistant, history, tmp_path):
    return Bench(assistant, Hardware(tmp_path), history)


def silent(step) -> None:
    pass


def test_a_row_holds_what_the_engine_said(assistant, bench, history) -> None:
    assistant.add("a", tokens_per_second=400, prompt_tokens_per_second=4000, load_s=0.2)
    steps = []
    outcome = bench.run(bench.targets(), SHORT, steps.append)
    assert (outcome.failures, outcome.cancelled) == ([], False)
    (row,) = outcome.rows
    assert history.read().rows == (row,)
    # The fake engine cannot be faster than it was told to be; how much slower it is depends on the machine.
    assert 0 < row.decode_speed <= 400 * 1.01
    assert 0 < row.prompt_speed <= 4000 * 1.01
    assert row.load_s > 0.2
    assert len(row.decode_tps) == len(row.prompt_tps) == SHORT.repeats
    assert (row.memory_bytes, row.context, row.tokens, row.wanted_tokens) == (5 << 20, 4096, 12, 100)
    assert 90 <= row.prompt_tokens <= 100
    assert (row.engine, row.engine_version, row.preset, row.variant, row.swap_s) == ("fake", "1.0", "a", "here", None)
    assert row.device and row.power_limit_w is None
    fractions = [step.fraction for step in steps]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    words = " ".join(step.words for step in steps)
    for part in ("loads", "warm-up", "reads the prompt", "writes, 12 of 12 tokens (run 2 of 2)"):
        assert part in words


def test_an_engine_that_stays_is_timed_cold_and_as_a_swap(assistant, bench) -> None:
    assistant.add("a", "keeps", load_s=0.1)
    (row,) = bench.run(bench.targets(), SHORT, silent).rows
    assert row.load_s > row.swap_s > 0.1  # the start of the child lies between them


def test_variants_that_share_a_load_are_measured_once(assistant, bench) -> None:
    assistant.add("a")
    assistant.add("b", same_as="a")
    assistant.add("c")
    assert [target.name for target in bench.targets()] == ["a/here", "c/here"]
    assert [target.name for target in bench.targets(["c", "b/here", "a"])] == ["c/here", "b/here"]


def test_names_that_mean_nothing_and_models_that_are_not_here(assistant, bench, tmp_path) -> None:
    with pytest.raises(ModelNotDownloaded, match="No model"):
        bench.targets()
    assistant.add("coding")
    with pytest.raises(PresetNotFound, match="coding"):
        bench.targets(["codin"])
    with pytest.raises(InvalidRequest, match="no variant 'x'") as caught:
        bench.targets(["coding/x"])
    assert "gone, here" in caught.value.hint
    with pytest.raises(ModelNotDownloaded, match="coding/gone cannot be measured"):
        bench.targets(["coding/gone"])
    (tmp_path / "coding.plan").unlink()
    with pytest.raises(ModelNotDownloaded, match="preset coding"):
        bench.targets(["coding"])


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ({"fault": "load_error"}, "weights are broken"), ({"fault": "load_crash"}, "going down while loading"),
        ({"fault": "crash_after"}, "ended by itself"), ({"fault": "error_after"}, "failed on order"),
    ],
)  # fmt: skip
def test_a_variant_that_fails_says_why_writes_no_row_and_the_rest_goes_on(
    assistant, bench, history, behaviour, says
) -> None:
    assistant.add("a", **behaviour)
    assistant.add("b")
    outcome = bench.run(bench.targets(), SHORT, silent)
    (failure,) = outcome.failures
    assert failure.name == "a/here" and says in failure.error and failure.hint
    assert [row.preset for row in outcome.rows] == [row.preset for row in history.read().rows] == ["b"]


def test_a_prompt_is_cut_to_the_context_and_no_room_at_all_is_said(assistant, bench) -> None:
    assistant.add("a", context=256)
    (row,) = bench.run(bench.targets(), Sizes(1000, 12, 1), silent).rows
    assert row.wanted_tokens == 256 - 12 - 64 and row.prompt_tokens <= row.wanted_tokens
    (failure,) = bench.run(bench.targets(), Sizes(1000, 250, 1), silent).failures
    assert "no room for a prompt" in failure.error


def test_what_an_answer_disturbed_is_measured_again(assistant, bench) -> None:
    assistant.add("a", tokens_per_second=100)
    assistant.add("b")
    asked, steps = [], []

    def tell(step) -> None:
        steps.append(step.words)
        if step.words.startswith("writes, 1 of 12 tokens (run 1") and not asked:
            asked.append(assistant.reply(None, "say 3", (), "b"))

    outcome = bench.run(bench.targets(["a"]), SHORT, tell)
    assert len(outcome.rows) == 1 and len(outcome.rows[0].decode_tps) == 2
    assert list(asked[0].follow())[-1].reason == "stop"
    assert sum(words.startswith("writes, 12 of 12 tokens (run 1") for words in steps) == 2


def test_an_answer_that_runs_already_ends_first(assistant, bench) -> None:
    assistant.add("a")
    assistant.add("b", tokens_per_second=15)
    targets, steps = bench.targets(["a"]), []
    job = assistant.reply(None, "say 30", (), "b")
    eventually(lambda: job.text() != "", 20)
    assert len(bench.run(targets, SHORT, lambda step: steps.append((step.words, job.text().count("w")))).rows) == 1
    assert steps[0][0] == "waits until the running answers have ended"
    assert all(said == 30 for words, said in steps if not words.startswith("waits until"))


def test_no_prompt_is_like_another(assistant, bench) -> None:
    assistant.add("a")
    (target,) = bench.targets()
    with assistant.lease(target.preset, target.variant, report=silent, cancelled=threading.Event()) as engine:
        texts = [prompt_of(engine, 100) for _ in range(3)]
        assert all(90 <= count <= 100 for count in engine.count_tokens(tuple(texts)))
    assert len({text[:14] for text in texts}) == 3


def test_who_is_asked_all_the_time_is_not_measured(assistant, bench) -> None:
    assistant.add("a")

    def tell(step) -> None:
        if step.words.startswith("writes, 1 of"):
            assistant.reply(None, "say 2", (), "a")

    outcome = bench.run(bench.targets(), SHORT, tell)
    assert outcome.rows == [] and "Other answers ran" in outcome.failures[0].error


@pytest.mark.parametrize(
    ("behaviour", "when"), [({"load_s": 8}, "loads, "), ({"tokens_per_second": 0.05, "burst": 1}, "writes, 1 of"),
                            ({"prompt_tokens_per_second": 64}, "reads the prompt")],
)  # fmt: skip
def test_cancel_ends_it_soon_and_keeps_what_is_measured(assistant, bench, history, behaviour, when) -> None:
    assistant.add("a")
    assistant.add("b", **behaviour)
    reached, result = threading.Event(), []

    def tell(step) -> None:
        if step.number == 2 and step.words.startswith(when):
            reached.set()

    thread = threading.Thread(target=lambda: result.append(bench.run(bench.targets(), SHORT, tell)))
    thread.start()
    assert reached.wait(20)
    began = time.monotonic()
    bench.cancel()
    thread.join(20)
    assert time.monotonic() - began < 5
    (outcome,) = result
    assert outcome.cancelled and outcome.failures == []
    assert [row.preset for row in outcome.rows] == [row.preset for row in history.read().rows] == ["a"]


def test_one_run_at_a_time_for_all_pages(assistant, history, tmp_path) -> None:
    assistant.add("a", tokens_per_second=5)
    told = []
    jobs = BenchJobs(assistant, Hardware(tmp_path), history, lambda: told.append(jobs.view()), sizes=SHORT)
    assert jobs.view() is None
    jobs.cancel()  # harmless
    jobs.start()
    with pytest.raises(Busy, match="running already"):
        jobs.start(["a"])
    eventually(lambda: jobs.view().step is not None, 20)
    jobs.cancel()
    eventually(lambda: not jobs.view().running, 20)
    assert jobs.view().said == "Cancelled. 0 of 1 measured." and history.read().rows == ()
    assistant.add("a")
    jobs.start(["a"])
    eventually(lambda: not jobs.view().running, 20)
    assert jobs.view().said == "1 of 1 measured." and len(history.read().rows) == 1
    assert told[-1] == jobs.view() and len(told) > 4


def test_a_table_that_cannot_be_written_is_said(assistant, tmp_path) -> None:
    assistant.add("a")
    (tmp_path / "file").write_text("")
    jobs = BenchJobs(assistant, Hardware(tmp_path), History(tmp_path / "file" / "measured.jsonl"), sizes=SHORT)
    jobs.start()
    eventually(lambda: not jobs.view().running, 20)
    assert "could not be written" in jobs.view().error


def test_the_command_and_the_page_measure_alike() -> None:
    chosen = BenchChoice()
    assert Sizes() == Sizes(chosen.prompt_tokens, chosen.tokens, chosen.repeats)


def machine(*cards: Card) -> Machine:
    return Machine(
        0.0, Driver("ok"), cards, Cpu("A CPU", 8, 4, 8.0), Memory(1, 1), Disk("/"), System("", "", "", (3, 11, 0), 64)
    )


def test_where_a_model_ran() -> None:
    one = Card(0, "RTX 3090", "a", power_limit_w=360.0)
    two = Card(1, "RTX 3090", "b", power_limit_w=360.0)
    other = Card(2, "RTX 4090", "c", power_limit_w=400.0)
    lost = Card(3, "RTX 5090", "d", state="lost")
    on_card, on_cpu = EngineSpec("exllamav2", "x"), EngineSpec("llamacpp", "x")
    assert place_of(on_card, "vram", machine(one, lost)) == ("RTX 3090", 360.0)
    assert place_of(on_card, "vram", machine(one, two)) == ("2 × RTX 3090", 360.0)
    assert place_of(on_card, "vram", machine(one, two, other)) == ("2 × RTX 3090 + RTX 4090", None)
    assert place_of(on_cpu, "ram", machine(one)) == ("A CPU", None)
    assert place_of(on_card, "vram", machine(lost)) == ("a card that does not tell its name", None)
    offloaded = EngineSpec("llamacpp", "x", options=(("gpu_layers", "99"),))
    assert place_of(offloaded, "ram", machine(one)) == ("RTX 3090", 360.0)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_of_a_checkout(tmp_path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert commit_of(tmp_path) == ""
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    (tmp_path / "below").mkdir()
    git("add", "a")
    git("commit", "-q", "-m", "x")
    assert commit_of(tmp_path) == git("rev-parse", "--short", "HEAD")
    assert commit_of(tmp_path / "below") == ""
    (tmp_path / "a").write_text("2")
    assert commit_of(tmp_path).endswith("-dirty")


# The command, with the bundled models on the real llama.cpp ------------------------------------------


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "app.py"), "--data-dir", str(tmp_path / "data"), *arguments]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    child = start(tmp_path, *arguments)
    out, err = child.communicate(timeout=60)
    return child.returncode, out, err


def test_the_command_measures_the_bundled_models(tmp_path: Path) -> None:
    short = ("--prompt-tokens", "64", "--tokens", "16", "--repeats", "2")
    code, out, err = run(tmp_path, "bench", "coding", "vision", *short, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["preset"] for row in rows] == ["coding", "vision"]
    for row in rows:
        assert row["quant"] == "Q8_0" and row["bpw"] == 8.5 and row["context"] == 2048 and row["swap_s"] is None
        assert row["tokens"] == 16 and 48 <= row["prompt_tokens"] <= 64 + 64
        assert min(row["decode_tps"]) > 1 and min(row["prompt_tps"]) > 1 and 0 < row["load_s"] < 60
        assert 20 << 20 < row["memory_bytes"] < 1 << 30
    assert err.splitlines() == ["1 of 2: Coding · Demo, 1 MB", "2 of 2: Vision · Demo, 2 MB"]
    with (tmp_path / "data" / "measured.jsonl").open("a") as file:
        file.write("{half a row\n")
    code, out, err = run(tmp_path, "bench", "--history", "--markdown", "table.md")
    assert code == 0 and "1 lines of" in err and "cannot be read" in err
    assert out.count("Demo") == 2 and "Decode tok/s" in out
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("| Date |") and table.count("\n") == 4 and "| Q8_0, 8.50 bpw |" in table
    code, out, err = run(tmp_path, "bench", "coding", "--history", "--markdown", "-")
    assert out.count("\n") == 3 and "Coding · Demo" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("bench", "codin"), 1, "coding"), (("bench", "coding/x"), 1, "no variant"),
        (("bench", "--tokens", "2"), 2, "--tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_sentence(tmp_path: Path, arguments, code: int, words: str) -> None:
    done, _, err = run(tmp_path, *arguments)
    assert done == code and words in err and err.count("\n") == 1


def test_ctrl_c_keeps_the_rows_so_far(tmp_path: Path) -> None:
    (tmp_path / "data" / "presets").mkdir(parents=True)
    for name, plan in (("fast", {}), ("slow", {"tokens_per_second": 2})):
        (tmp_path / f"{name}.plan").write_text(json.dumps({"bytes": 5 << 20, **plan}))
        (tmp_path / "data" / "presets" / f"{name}.toml").write_text(
            PRESET.format(title=name, engine="fake", path=tmp_path / f"{name}.plan", context=4096)
        )
    child = start(tmp_path, "--engine", "fake=tests.fake_engine:FakeEngine", "bench", "fast", "slow", "--tokens", "50")
    assert "1 of 2" in child.stderr.readline() and "2 of 2" in child.stderr.readline()
    os.kill(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert child.returncode == 130 and "Cancelled" in err and "Traceback" not in err
    assert "fast · Fake" in out and "slow" not in out
    assert len(History(tmp_path / "data" / "measured.jsonl").read().rows) == 1
