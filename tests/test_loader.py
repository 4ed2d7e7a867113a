"""The one owner of the models: lease, queue, budget, swap, rollback, crash."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time

import pytest

from modules.errors import DoesNotFit, EngineCrashed, EngineMissing, LoadError
from modules.loader import LeaseCancelled, Loader
from modules.messages import EngineSpec, Loading, Message, Queued, Start
from modules.process import Limits

from .conftest import CARD, children, eventually, in_thread


def say(engine, count: int = 3, id: str = "r") -> int:
    return sum(1 for e in engine.generate(Start(id, (Message("user", f"say {count}"),))) if type(e).__name__ == "Delta")


def held(loader) -> list[str]:
    return [m.spec.model.rsplit("/")[-1][:-5] for m in loader.snapshot().models]


def test_a_resident_model_is_leased_without_a_load(make_loader, plan):
    loader, spec, events = make_loader(), plan(bytes=100), []
    with loader.lease(spec, needs_bytes=100, report=events.append) as engine:
        assert say(engine) == 3
        first = engine.pid
    assert any(isinstance(e, Loading) for e in events)
    events.clear()
    with loader.lease(spec, needs_bytes=100, report=events.append) as engine:
        assert engine.pid == first and loader.snapshot().models[0].leases == 1
    assert events == [] and loader.snapshot().models[0].leases == 0


def test_several_models_stay_within_the_budget_and_the_least_recently_used_goes(make_loader, plan):
    loader = make_loader(budget=250)
    for name in "abac":
        with loader.lease(plan(name, bytes=100), needs_bytes=100) as engine:
            say(engine)
    assert held(loader) == ["c", "a"] and len(children()) == 2
    assert loader.snapshot().used_bytes == 200


def test_a_swap_waits_for_the_running_answer(make_loader, plan):
    loader, order = make_loader(budget=150), []
    a, b = plan("a", bytes=100, tokens_per_second=60), plan("b", bytes=100)

    def long():
        with loader.lease(a, needs_bytes=100) as engine:
            say(engine, 40)
            order.append("a ended")

    thread = in_thread(long)
    eventually(lambda: held(loader) == ["a"] and loader.snapshot().models[0].leases)
    told = []
    with loader.lease(b, needs_bytes=100, report=told.append):
        order.append("b has it")
    thread.join(5)
    assert order == ["a ended", "b has it"] and told[0] == Queued(1) and held(loader) == ["b"]


def test_nobody_waits_for_ever_behind_a_busy_model(make_loader, plan):
    loader = make_loader(budget=150, patience_s=0.3)
    a, b, stop, served = plan("a", bytes=100, tokens_per_second=50), plan("b", bytes=100), threading.Event(), []

    def flood(i):
        n = 0
        while not stop.is_set():
            with loader.lease(a, needs_bytes=100) as engine:
                say(engine, 10, f"f{i}-{n}")
            n += 1
            served.append(i)

    floods = [in_thread(lambda i=i: flood(i)) for i in range(3)]
    eventually(lambda: len(served) > 2)
    began = time.monotonic()
    with loader.lease(b, needs_bytes=100):
        waited = time.monotonic() - began
    stop.set()
    for thread in floods:
        thread.join(10)
    assert waited < 3


def test_answers_beyond_what_the_engine_runs_at_once_wait_for_a_place_in_order(make_loader, plan):
    loader, spec = make_loader(), plan("a", at_once=2)
    order, most, told = [], [], {name: [] for name in "abcde"}
    wishes = {name: threading.Event() for name in told}
    ends = {name: threading.Event() for name in told}

    def answer(name):
        try:
            with loader.lease(spec, report=told[name].append, cancelled=wishes[name]) as engine:
                order.append(name)
                most.append(loader.snapshot().models[0].leases)
                assert say(engine, 2, name) == 2
                ends[name].wait(20)
        except LeaseCancelled:
            order.append(f"{name} gave up")

    threads = []
    for number, name in enumerate(told, 1):
        threads.append(in_thread(lambda name=name: answer(name)))
        eventually(lambda n=number: (len(order), loader.snapshot().waiting) == (min(n, 2), max(0, n - 2)))
    eventually(lambda: told["e"] == [Queued(3)])
    wishes["d"].set()
    loader.wake()
    eventually(lambda: order[2:] == ["d gave up"] and told["e"][-1] == Queued(2))
    for name in "abce":
        ends[name].set()
        eventually(lambda n=name: order[-1] == {"a": "c", "b": "e"}.get(n, "e"))
    for thread in threads:
        thread.join(20)
    assert order == ["a", "b", "d gave up", "c", "e"] and max(most) == 2
    assert told["b"] == [] and told["c"] == [Queued(1)]


def test_a_swap_goes_before_those_who_wait_for_a_place_and_came_later(make_loader, plan):
    loader, order, end = make_loader(budget=150, patience_s=0.2), [], threading.Event()
    a, b = plan("a", bytes=100, at_once=1), plan("b", bytes=100)

    def answer(name, spec):
        with loader.lease(spec, needs_bytes=100):
            order.append(name)
            end.wait(20)

    threads = []
    for number, (name, spec) in enumerate((("first", a), ("second", a), ("swap", b), ("late", a))):
        threads.append(in_thread(lambda name=name, spec=spec: answer(name, spec)))
        eventually(lambda n=number: order == ["first"] and loader.snapshot().waiting == n)
    time.sleep(0.3)  # the swap's patience
    end.set()
    for thread in threads:
        thread.join(20)
    assert order == ["first", "second", "swap", "late"]


def test_a_load_that_fails_brings_the_previous_model_back(make_loader, plan):
    loader, told = make_loader(budget=150), []
    a, broken = plan("a", bytes=100), plan("broken", bytes=100, fault="load_error")
    with loader.lease(a, needs_bytes=100):
        pass
    with (
        pytest.raises(LoadError, match="weights are broken"),
        loader.lease(broken, needs_bytes=100, report=told.append),
    ):
        raise AssertionError("no lease on a broken model")
    assert held(loader) == ["a"] and "restoring" in [e.stage for e in told if isinstance(e, Loading)]
    with loader.lease(a, needs_bytes=100, report=told.append) as engine:
        assert say(engine) == 3


def test_a_model_that_loads_but_cannot_speak_is_refused(make_loader, plan):
    loader = make_loader()
    with pytest.raises(EngineCrashed), loader.lease(plan(fault="crash_after", after=0)):
        raise AssertionError("the smoke test must catch it")
    assert held(loader) == []


def test_what_can_never_fit_is_refused_before_anything_goes(make_loader, plan):
    loader = make_loader(budget=150)
    with loader.lease(plan("a", bytes=100), needs_bytes=100):
        pass
    with pytest.raises(DoesNotFit, match="budget"), loader.lease(plan("b"), needs_bytes=1000):
        pass
    with pytest.raises(EngineMissing), loader.lease(EngineSpec("exllamav2", "x")):
        pass
    assert held(loader) == ["a"]


def test_a_crash_frees_the_place_and_the_next_lease_starts_anew(make_loader, plan):
    changed = threading.Event()
    loader, spec = make_loader(on_change=changed.set), plan(bytes=100, tokens_per_second=50)
    with pytest.raises(EngineCrashed), loader.lease(spec, needs_bytes=100) as engine:
        threading.Timer(0.2, os.kill, (engine.pid, signal.SIGKILL)).start()
        say(engine, 1000)
    eventually(lambda: held(loader) == [], 1)
    with loader.lease(spec, needs_bytes=100) as engine:
        assert say(engine, 2) == 2


def test_a_model_that_crashes_again_and_again_is_left_alone(make_loader, plan):
    loader, spec = make_loader(), plan(fault="load_crash")
    for _ in range(3):
        with pytest.raises(EngineCrashed, match="exit code 7"), loader.lease(spec):
            pass
    with pytest.raises(EngineCrashed, match="left alone"), loader.lease(spec):
        pass


def test_two_who_want_the_same_model_share_one_load(make_loader, plan):
    loader, spec, pids = make_loader(), plan(load_s=0.3), []

    def one():
        with loader.lease(spec) as engine:
            pids.append(engine.pid)

    threads = [in_thread(one) for _ in range(5)]
    for thread in threads:
        thread.join(10)
    assert len(pids) == 5 and len(set(pids)) == 1


def test_cancel_in_the_queue_and_in_the_load(make_loader, plan):
    loader, wish = make_loader(), threading.Event()
    outcome = []

    def slow():
        try:
            with loader.lease(plan("slow", load_s=5), cancelled=wish):
                outcome.append("loaded")
        except LeaseCancelled:
            outcome.append("cancelled")

    thread = in_thread(slow)
    eventually(lambda: loader.snapshot().progress is not None)
    wish.set()
    loader.wake()
    thread.join(1.5)
    assert outcome == ["cancelled"]
    with loader.lease(plan("b")) as engine:
        assert say(engine, 1) == 1


@pytest.mark.parametrize("stage", ["unloading", "reading"])
def test_a_cancelled_load_keeps_the_child_and_a_second_cancel_does_not_stop_the_way_back(make_loader, plan, stage):
    loader, wish, stages = make_loader(vram_budget_bytes=150), threading.Event(), []
    a = plan("a", "card", bytes=100)
    with loader.lease(a, needs_bytes=100) as engine:
        first = engine.pid
    plan("a", "card", bytes=100, load_s=0.5)

    def report(event):
        if isinstance(event, Loading):
            stages.append(event.stage)
            if event.stage in (stage, "reading"):  # of the new model, and again of the old one on its way back
                wish.set()
                loader.wake()

    began = time.monotonic()
    with (
        pytest.raises(LeaseCancelled),
        loader.lease(plan("b", "card", bytes=100, load_s=15), needs_bytes=100, cancelled=wish, report=report),
    ):
        raise AssertionError("it was loaded")
    assert time.monotonic() - began < 10 and stages[-1] == "reading" and "restoring" in stages
    assert held(loader) == ["a"] and children() == {first}
    with loader.lease(a, needs_bytes=100) as engine:
        assert engine.pid == first and say(engine) == 3


def test_a_child_that_does_not_give_up_a_load_is_ended(make_loader, plan):
    loader, wish = make_loader(vram_budget_bytes=150, limits=Limits(load_s=60, cancel_s=0.3)), threading.Event()
    with loader.lease(plan("a", "card", bytes=100), needs_bytes=100) as engine:
        first = engine.pid

    def report(event):
        if isinstance(event, Loading) and event.fraction == 1:
            wish.set()
            loader.wake()

    hangs = plan("b", "card", bytes=100, fault="load_hang")
    with pytest.raises(LeaseCancelled), loader.lease(hangs, needs_bytes=100, cancelled=wish, report=report):
        raise AssertionError("it was loaded")
    assert held(loader) == ["a"] and len(children()) == 1 and children() != {first}


def test_a_cancel_that_comes_when_the_model_is_up_leaves_it_there(make_loader, plan):
    wish, spec = threading.Event(), plan("a")
    loader = make_loader(on_change=lambda: held(loader) and wish.set())
    with pytest.raises(LeaseCancelled), loader.lease(spec, cancelled=wish):
        raise AssertionError("nobody wants it any more")
    assert held(loader) == ["a"] and loader.snapshot().models[0].leases == 0
    with loader.lease(spec) as engine:
        assert say(engine) == 3


def test_an_engine_that_keeps_its_process_swaps_in_place(make_loader, plan):
    loader = make_loader(budget=150)
    with loader.lease(plan("a", "keeps", bytes=100), needs_bytes=100) as engine:
        first = engine.pid
    with loader.lease(plan("b", "keeps", bytes=100), needs_bytes=100) as engine:
        assert engine.pid == first and say(engine) == 3
    assert held(loader) == ["b"] and len(children()) == 1


def test_close_ends_every_child(make_loader, plan):
    loader = make_loader()
    for name in "ab":
        with loader.lease(plan(name)):
            pass
    assert len(children()) == 2
    loader.close()
    assert children() == set()
    with pytest.raises(LeaseCancelled), loader.lease(plan("a")):
        pass


def test_children_whose_models_made_room_together_are_ended_but_one(make_loader, plan):
    loader = make_loader(vram_budget_bytes=100)
    small, big = [plan(name, "card", bytes=30) for name in "abc"], plan("d", "card", bytes=95)
    for _ in range(2):
        for spec in small:
            with loader.lease(spec, needs_bytes=30):
                pass
        assert len(children()) == 3
        with loader.lease(big, needs_bytes=95) as engine:
            assert children() == {engine.pid} and say(engine) == 3
    with loader.lease(small[0], needs_bytes=30) as again:
        assert again.pid == engine.pid
    # Also where the load fails for which they made room, and the last of them comes back.
    for spec in small:
        with loader.lease(spec, needs_bytes=30):
            pass
    broken = plan("broken", "card", bytes=0, fault="load_error")
    with pytest.raises(LoadError, match="broken"), loader.lease(broken, needs_bytes=95):
        pass
    assert sorted(held(loader)) == ["a", "b", "c"] and len(children()) == 3


def test_of_two_idle_children_the_one_that_knows_the_model_takes_it(make_loader, plan):
    loader = make_loader(vram_budget_bytes=100)
    specs = {name: plan(name, "card", bytes=size) for name, size in (("a", 40), ("b", 40), ("big", 90))}
    pids = {}
    for name in ("big", "a", "b", "a", "big"):  # the child of big and a is used last, and so unloaded last
        with loader.lease(specs[name], needs_bytes=90 if name == "big" else 40) as engine:
            pids.setdefault(name, engine.pid)
    assert pids["big"] == pids["a"] != pids["b"] and children() == {engine.pid} == {pids["big"]}


@pytest.mark.parametrize(("budget", "held_at_the_end"), [(100, 80), (1000, 240)])
def test_page_locked_copies_stay_within_the_budget_over_all_children(plan, budget, held_at_the_end):
    card = dataclasses.replace(CARD, copies_bytes=budget)
    loader = Loader({"card": card}, 1, vram_budget_bytes=100, limits=Limits(load_s=20, stall_s=5))
    engines = {}
    try:
        for name in "abc" * 4:
            with loader.lease(plan(name, "card", bytes=40), needs_bytes=40) as engine:
                engines[engine.pid] = engine
                limits = [e.copies_limit for e in engines.values()]
                assert all(limit >= 0 for limit in limits) and sum(limits) <= budget
                assert engine.keep_copies(engine.copies_limit) >= 40  # the model that came last has its copy
        assert len(engines) == 2
        assert sum(e.keep_copies(e.copies_limit) for e in engines.values()) == held_at_the_end
        os.kill(min(engines), signal.SIGKILL)
        eventually(lambda: len(children()) == 1)
        with loader.lease(plan("d", "card", bytes=60), needs_bytes=60) as engine:
            assert engine.copies_limit >= 60
    finally:
        loader.close()


def test_close_ends_a_child_that_is_starting_and_no_other_takes_its_place(make_loader, plan):
    loader, outcome = make_loader(budget=150), []
    with loader.lease(plan("a", bytes=100), needs_bytes=100):
        plan("a", bytes=100, load_s=20)  # were it loaded again, that would show

    def swap():
        try:
            with loader.lease(plan("b", bytes=100, load_s=20), needs_bytes=100):
                outcome.append("loaded")
        except (EngineCrashed, LeaseCancelled):
            outcome.append("ended")

    thread = in_thread(swap)
    eventually(lambda: loader.snapshot().progress is not None and loader.snapshot().progress.stage == "reading")
    loader.close()
    thread.join(8)
    assert outcome == ["ended"] and children() == set()


def test_many_swaps_leave_nothing_behind(make_loader, plan):
    loader = make_loader(budget=150)
    specs = [plan(name, bytes=100) for name in "ab"]

    def swap(times):
        for i in range(times):
            with loader.lease(specs[i % 2], needs_bytes=100) as engine:
                say(engine, 1)

    swap(4)
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    swap(20)
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= files and threading.active_count() <= threads)


def test_models_on_the_card_and_in_ram_do_not_make_room_for_each_other(make_loader, plan):
    loader = make_loader(budget=150, vram_budget_bytes=120)
    for name, engine in (("a", "fake"), ("b", "card"), ("c", "card"), ("d", "fake")):
        with loader.lease(plan(name, engine, bytes=100), needs_bytes=100) as process:
            say(process)
    assert held(loader) == ["d", "c"]
    view = loader.snapshot()
    assert (view.used_bytes, view.budget_bytes, view.vram_used_bytes, view.vram_budget_bytes) == (100, 150, 100, 120)
    assert (loader.budget_bytes("card"), loader.budget_bytes("fake"), loader.budget_bytes("nothing")) == (120, 150, 0)


def test_a_model_too_large_for_the_card_is_refused_whatever_the_ram(make_loader, plan):
    loader = make_loader(budget=10_000, vram_budget_bytes=120)
    with pytest.raises(DoesNotFit, match="budget of the card"), loader.lease(plan("a", "card"), needs_bytes=130):
        pass
    with loader.lease(plan("b"), needs_bytes=130):
        pass


def test_a_card_that_answers_late_counts_from_then_on(make_loader, plan):
    loader = make_loader()
    with pytest.raises(DoesNotFit), loader.lease(plan("a", "card"), needs_bytes=100):
        pass
    loader.set_vram_budget(120)
    with loader.lease(plan("a", "card"), needs_bytes=100):
        assert loader.snapshot().vram_budget_bytes == 120


def test_the_process_ids_of_all_children_are_told(make_loader, plan):
    loader = make_loader(budget=150)
    assert loader.pids() == []
    with loader.lease(plan("a", bytes=100), needs_bytes=100) as first:
        assert loader.pids() == [first.pid]
    with loader.lease(plan("b", bytes=100), needs_bytes=100) as second:
        assert loader.pids() == [second.pid] != [first.pid]  # it made room
    kept = plan("k", "keeps", bytes=10)
    with loader.lease(kept, needs_bytes=10) as third:
        assert sorted(loader.pids()) == sorted([second.pid, third.pid]) == sorted(children())
    os.kill(third.pid, signal.SIGKILL)
    eventually(lambda: loader.pids() == [second.pid])
    # While one is still loading, it takes memory already.
    slow = in_thread(lambda: loader.lease(plan("s", load_s=2, bytes=10), needs_bytes=10).__enter__())
    eventually(lambda: len(loader.pids()) == 2)
    slow.join()
    loader.close()
    assert loader.pids() == []


def test_a_child_that_refused_a_model_takes_the_next_one(make_loader, plan):
    loader = make_loader(vram_budget_bytes=150)
    good = plan("a", "card", bytes=100)
    with loader.lease(good, needs_bytes=100) as engine:
        first = engine.pid
    with pytest.raises(LoadError, match="broken"), loader.lease(
        plan("b", "card", bytes=0, fault="load_error"), needs_bytes=100
    ):
        pass
    with loader.lease(good, needs_bytes=100) as engine:
        assert engine.pid == first
        assert say(engine) == 3
    # One that keeps memory after a refusal is replaced.
    with pytest.raises(LoadError, match="broken"), loader.lease(
        plan("c", "card", bytes=1 << 30, fault="load_error"), needs_bytes=100
    ):
        pass
    with loader.lease(good, needs_bytes=100) as engine:
        assert engine.pid != first


def test_a_fresh_lease_loads_what_is_in_memory_once_more(make_loader, plan):
    loader = make_loader()
    for engine, fresh, same_child in (("fake", "child", False), ("keeps", "again", True), ("keeps", "child", False)):
        spec, told = plan(f"{engine}-{fresh}", engine, bytes=100, load_s=0.1), []
        with loader.lease(spec, needs_bytes=100) as process:
            first = process.pid
        with loader.lease(spec, needs_bytes=100, report=told.append, fresh=fresh) as process:
            assert (process.pid == first) is same_child and say(process) == 3
            assert process.up_s > 0.1
        assert next(e.stage for e in told if isinstance(e, Loading)) == "unloading"
        assert held(loader).count(f"{engine}-{fresh}") == 1


def test_a_fresh_load_waits_for_running_answers_and_keeps_its_neighbours(make_loader, plan):
    loader, order = make_loader(budget=250), []
    a, b = plan("a", bytes=100, tokens_per_second=60), plan("b", bytes=100)
    with loader.lease(b, needs_bytes=100) as engine:
        neighbour = engine.pid

    def long():
        with loader.lease(a, needs_bytes=100) as engine:
            say(engine, 30)
            order.append("answer ended")

    thread = in_thread(long)
    eventually(lambda: any(m.spec == a and m.leases for m in loader.snapshot().models))
    with loader.lease(a, needs_bytes=100, fresh="child"):
        order.append("loaded anew")
    thread.join(5)
    assert order == ["answer ended", "loaded anew"]
    with loader.lease(b, needs_bytes=100) as engine:
        assert engine.pid == neighbour


def test_a_fresh_load_that_fails_is_not_tried_twice_and_the_next_lease_loads(make_loader, plan):
    loader, spec, told = make_loader(), plan("a", bytes=100), []
    with loader.lease(spec, needs_bytes=100):
        pass
    plan("a", bytes=100, fault="load_error")
    with (
        pytest.raises(LoadError, match="weights are broken"),
        loader.lease(spec, needs_bytes=100, report=told.append, fresh="child"),
    ):
        raise AssertionError("no lease on a broken model")
    assert held(loader) == [] and "restoring" not in [e.stage for e in told if isinstance(e, Loading)]
    plan("a", bytes=100)
    with loader.lease(spec, needs_bytes=100) as engine:
        assert say(engine) == 3


def test_a_cancelled_fresh_load_lets_the_model_alone_that_waits(make_loader, plan):
    loader, spec, cancelled = make_loader(), plan("a", bytes=100, tokens_per_second=40), threading.Event()
    with loader.lease(spec, needs_bytes=100) as engine:
        caught = []

        def ask():
            try:
                with loader.lease(spec, needs_bytes=100, fresh="child", cancelled=cancelled):
                    caught.append("loaded")
            except LeaseCancelled:
                caught.append("cancelled")

        thread = in_thread(ask)
        eventually(lambda: loader.snapshot().waiting == 1)
        cancelled.set()
        loader.wake()
        thread.join(5)
        assert caught == ["cancelled"] and say(engine) == 3
    with loader.lease(spec, needs_bytes=100) as again:
        assert again.pid == engine.pid
