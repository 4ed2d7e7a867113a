"""What every engine promises, as tests: a module subclasses Contract, and says which engine and which model.

Run for llama.cpp, for both ExLlama adapters without a card (tests/exllama_on_cpu), and
on a card (tests/gpu). A model's words do not matter here; that they stay the same does.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from modules.errors import ContextTooLong, InvalidRequest, ModelFilesError, TurntableError
from modules.messages import Constraint, Delta, EngineSpec, Finished, Loading, Message, Prefill, Sampling, Start
from modules.process import EngineKind, EngineProcess, Limits

GREEDY = Sampling(temperature=0.0, max_tokens=24)
SCHEMA = {
    "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One engine with one model. schema and regex: it can hold answers to them; reuses: it keeps what it has read."""

    kind: EngineKind
    spec: EngineSpec
    asks: str = "What is the capital of France?"
    schema: bool = True
    regex: bool = True
    reuses: bool = True
    unload_leaves_bytes: int = 64 << 20


@dataclass(frozen=True)
class Heard:
    """One answer as it came out of the engine."""

    text: str
    deltas: int
    prefills: list[Prefill]
    end: Finished


def ask(
    engine: EngineProcess, text: str | tuple[Message, ...], id: str = "r", *, sampling: Sampling = GREEDY,
    constraint: Constraint | None = None, on_event: Callable[[object], None] = lambda event: None,
) -> Heard:  # fmt: skip
    messages = (Message("user", text),) if isinstance(text, str) else text
    said, prefills, end = [], [], None
    for event in engine.generate(Start(id, messages, sampling, constraint=constraint)):
        on_event(event)
        if isinstance(event, Delta):
            said.append(event.text)
        elif isinstance(event, Prefill):
            prefills.append(event)
        elif isinstance(event, Finished):
            end = event
    assert end is not None
    return Heard("".join(said), len(said), prefills, end)


class Contract:
    """Subclasses define `subject`, a fixture that returns a Subject."""

    @pytest.fixture(scope="class")
    @classmethod
    def process(cls, subject: Subject) -> Iterator[EngineProcess]:
        process = EngineProcess(subject.kind, Limits(load_s=300, stall_s=120))
        process.load(subject.spec, lambda event: None)
        yield process
        process.stop()

    def test_loading_is_told_in_order_and_ends_ready(self, subject: Subject) -> None:
        seen: list[Loading] = []
        process = EngineProcess(subject.kind, Limits(load_s=300))
        try:
            ready = process.load(subject.spec, seen.append)
            assert ready.context == subject.spec.context
            assert ready.memory_bytes > 0
            assert process.version
            assert seen
            assert [e.done_bytes for e in seen] == sorted(e.done_bytes for e in seen)
            assert seen[-1].fraction == 1
        finally:
            process.stop()

    def test_an_answer_comes_in_pieces_and_ends_with_its_counts(self, process: EngineProcess, subject: Subject) -> None:
        heard = ask(process, subject.asks)
        assert heard.text
        assert heard.deltas > 1
        assert heard.end.reason in ("stop", "length")
        counts = heard.end.counts
        assert counts.prompt > 0
        assert 0 < counts.completion <= GREEDY.max_tokens
        assert heard.end.timings.first_token_s > 0
        assert heard.prefills == sorted(heard.prefills, key=lambda e: e.done)

    def test_a_greedy_answer_is_the_same_again(self, process: EngineProcess, subject: Subject) -> None:
        first, second = ask(process, subject.asks), ask(process, subject.asks)
        assert second.text == first.text
        assert second.end.counts.completion == first.end.counts.completion

    def test_a_seed_repeats_an_answer_and_another_changes_it(self, process: EngineProcess, subject: Subject) -> None:
        def drawn(seed: int) -> str:
            warm = Sampling(temperature=1.8, seed=seed, max_tokens=24)
            return ask(process, subject.asks, sampling=warm).text

        assert drawn(7) == drawn(7)
        assert len({drawn(seed) for seed in range(6)}) > 1

    def test_the_longest_answer_is_kept_to(self, process: EngineProcess, subject: Subject) -> None:
        heard = ask(process, subject.asks, sampling=dataclasses.replace(GREEDY, max_tokens=3))
        assert (heard.end.reason, heard.end.counts.completion) == ("length", 3)
        assert ask(process, subject.asks).text.startswith(heard.text)

    def test_an_answer_of_full_length_goes_on_where_the_model_would_end(
        self, process: EngineProcess, subject: Subject
    ) -> None:
        long = dataclasses.replace(GREEDY, max_tokens=60)
        start = Start("r", (Message("user", subject.asks),), long, full_length=True)
        end = [event for event in process.generate(start) if isinstance(event, Finished)].pop()
        assert (end.reason, end.counts.completion) == ("length", 60)
        assert ask(process, subject.asks, sampling=long).end.counts.completion <= 60

    def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(self, process: EngineProcess, subject: Subject) -> None:
        whole = ask(process, subject.asks).text
        stop = next(whole[i : i + 3] for i in range(2, len(whole)) if whole[i : i + 3].isascii())
        heard = ask(process, subject.asks, sampling=dataclasses.replace(GREEDY, stop=(stop,)))
        assert heard.text.rstrip() == whole[: whole.index(stop)].rstrip()
        assert heard.end.reason == "stop"

    def test_an_answer_stops_soon_after_it_was_cancelled(self, process: EngineProcess, subject: Subject) -> None:
        at: list[float] = []

        def cancel(event: object) -> None:
            if isinstance(event, Delta) and not at:
                at.append(time.monotonic())
                process.cancel("r")

        for seed in range(30):  # a drawn answer may be empty, and a short one complete before it is cancelled
            warm = Sampling(temperature=1.5, seed=seed, max_tokens=400)
            at.clear()
            heard = ask(process, subject.asks, sampling=warm, on_event=cancel)
            assert not at or time.monotonic() - at[0] < 5
            if heard.end.reason == "stopped":
                break
        assert heard.end.reason == "stopped"
        assert ask(process, subject.asks).text == ask(process, subject.asks).text

    def test_a_cancel_in_the_prompt_works_and_unknown_ids_are_ignored(
        self, process: EngineProcess, subject: Subject
    ) -> None:
        words = self.long_prompt(process, subject, 0.6)
        process.cancel("nobody")

        def cancel(event: object) -> None:
            if isinstance(event, Prefill):
                process.cancel("r")

        assert ask(process, words, on_event=cancel).end.reason in ("stopped", "stop", "length")
        assert ask(process, subject.asks).text

    def test_a_prompt_that_is_too_long_is_refused_and_the_next_is_answered(
        self, process: EngineProcess, subject: Subject
    ) -> None:
        with pytest.raises(ContextTooLong, match="context holds"):
            ask(process, self.long_prompt(process, subject, 1.3))
        assert ask(process, subject.asks).text

    def test_tokens_are_counted(self, process: EngineProcess) -> None:
        none, one, more = process.count_tokens(("", "word", "word and some more words"))
        assert (none, one > 0, more > one) == (0, True, True)

    def test_answers_side_by_side_are_each_complete(self, process: EngineProcess, subject: Subject) -> None:
        alone = ask(process, subject.asks).text
        heard: dict[int, Heard] = {}

        def run(number: int) -> None:
            heard[number] = ask(process, subject.asks, f"side-{number}")

        threads = [threading.Thread(target=run, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(heard) == len(threads)
        for answer in heard.values():
            # Kernels for another batch size may choose another of two nearly equal tokens; the beginning stays.
            assert answer.text[:8] == alone[:8]

    def test_a_conversation_that_goes_on_is_not_read_again(self, process: EngineProcess, subject: Subject) -> None:
        if not subject.reuses:
            pytest.skip("this engine or model keeps nothing between answers")
        first = (Message("user", f"{subject.asks} {'Please think about it. ' * 12}"),)
        heard = ask(process, first)
        second = (*first, Message("assistant", heard.text), Message("user", "And then?"))
        counts = ask(process, second).end.counts
        assert counts.cached >= heard.end.counts.prompt // 2
        assert counts.prompt > heard.end.counts.prompt

    def test_an_answer_can_be_held_to_a_schema(self, process: EngineProcess, subject: Subject) -> None:
        if not subject.schema:
            pytest.skip("this engine knows no schemas")
        form = Constraint("json_schema", json.dumps(SCHEMA))
        heard = ask(process, subject.asks, sampling=dataclasses.replace(GREEDY, max_tokens=60), constraint=form)
        assert set(json.loads(heard.text)) == {"ok"}
        assert heard.end.reason == "stop"

    def test_an_answer_can_be_held_to_an_expression(self, process: EngineProcess, subject: Subject) -> None:
        form = Constraint("regex", "(yes|no), [0-9]{3}")
        if not subject.regex:
            with pytest.raises(InvalidRequest):
                ask(process, subject.asks, constraint=form)
            return
        text = ask(process, subject.asks, constraint=form).text
        assert text[-5:-3] == ", "
        assert text[:-5] in ("yes", "no")
        assert text[-3:].isdigit()

    def test_a_bad_form_is_refused_and_the_next_answer_comes(self, process: EngineProcess, subject: Subject) -> None:
        for form in (Constraint("json_schema", '{"type": "nonsense"}'), Constraint("poem", "x")):
            with pytest.raises(TurntableError):
                ask(process, subject.asks, constraint=form)
        assert ask(process, subject.asks).text

    def test_unloading_gives_the_memory_back_and_the_model_comes_back_the_same(self, subject: Subject) -> None:
        process = EngineProcess(subject.kind, Limits(load_s=300))
        try:
            process.load(subject.spec, lambda event: None)
            before = ask(process, subject.asks).text
            if subject.kind.keeps_process:
                assert process.unload() <= subject.unload_leaves_bytes
                process.load(subject.spec, lambda event: None)
            assert ask(process, subject.asks).text == before
        finally:
            process.stop()

    def test_a_model_that_is_not_there_is_an_error_and_the_child_lives(self, subject: Subject) -> None:
        process = EngineProcess(subject.kind, Limits(load_s=300))
        try:
            with pytest.raises(ModelFilesError):
                process.load(dataclasses.replace(subject.spec, model=f"{subject.spec.model}-gone"), lambda event: None)
            if subject.kind.keeps_process:
                process.load(subject.spec, lambda event: None)
                assert ask(process, subject.asks).text
        finally:
            process.stop()

    @staticmethod
    def long_prompt(process: EngineProcess, subject: Subject, share: float) -> str:
        """A text of about this share of the context."""
        piece = "There was a word. "
        return piece * int(subject.spec.context * share / max(1, process.count_tokens((piece,))[0]))
