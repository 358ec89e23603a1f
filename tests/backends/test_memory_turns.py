"""A store in memory while garbage collections and threads come in between."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest

from respan_guard import Guard, Usage
from respan_guard.backends.base import Allowed, Ended, Op, Release
from respan_guard.backends.memory import MemoryBackend
from respan_guard.backends.memory_turns import Turns
from respan_guard.errors import StorageUnavailable
from respan_guard.money import MAX_NANO
from respan_guard.testing.contract_support import NOW, admit, record, total


class Abandoned:
    """Something that the collector finds in a cycle, as it finds an abandoned stream, and that then acts."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act
        self.itself = self

    def __del__(self) -> None:
        self.act()


def in_time(work: Callable[[], None]) -> None:
    """Run `work` on a thread that must come back: a deadlock fails the test instead of hanging the suite."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "the store waits for itself"
    if failures:
        raise failures[0]


@pytest.fixture
def eager_collector() -> Iterator[None]:
    """Once it is switched on, the collector runs at nearly each allocation."""
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    yield
    gc.enable()
    gc.set_threshold(*before)


@pytest.mark.usefixtures("eager_collector")
async def test_a_collection_within_an_operation_may_post(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of streams that are collected while the store works: each booked once, each hold ended, sums right."""
    backend = MemoryBackend()
    interrupted = 0
    evaluate = backend._store.evaluate

    def switched_on(*args: Any) -> Any:
        gc.enable()
        return evaluate(*args)

    monkeypatch.setattr(backend._store, "evaluate", switched_on)

    def work() -> None:
        nonlocal interrupted
        for number in range(300):
            name, now = f"a{number}", NOW + number
            ask: list[Op] = [admit(name, total(10**9), cost=10)]
            last: list[Op] = [record(f"e{number}", 3, admission=f"a{number - 1}"), Release("ann", f"a{number - 1}")]

            def act(ops: list[Op] = last, now: int = now) -> None:
                nonlocal interrupted
                interrupted += backend._turns._busy
                backend.post_now(ops, now)

            gc.disable()
            Abandoned(act)
            assert isinstance(backend.apply_now(ask, now)[0], Allowed)
        backend.post_now([Release("ann", "a299")], NOW + 300)

    in_time(work)
    assert interrupted > 100, "no collection came within the store's work, so this proves nothing"
    standing = await backend.standing("ann", [total(10**9)])
    assert (standing.used, standing.held) == ((900,), (0,))
    assert await backend.verify() == []


async def test_a_finalizer_that_asks_within_the_stores_work_is_told_so() -> None:
    """It can't have an answer; but a record that it books is not lost."""
    guard = Guard("memory://")
    shared = guard._homes.shared
    assert shared is not None
    backend = shared.backend
    assert isinstance(backend, MemoryBackend)

    def work() -> None:
        with backend._turns:  # where a finalizer of this thread may run
            with pytest.raises(StorageUnavailable, match="finalizer"):
                backend.apply_now([admit("a")], NOW)
            guard.sync.record(Usage("m", cost=Decimal(3)), "ann")

    in_time(work)
    assert (await guard.status("ann")).total_spend == 3


async def test_what_is_posted_while_another_thread_works_is_applied_behind_it() -> None:
    """Whoever posts does not wait; and whoever asks after it finds it applied, in order."""
    backend = MemoryBackend()
    working, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with backend._turns:
            working.set()
            go_on.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    working.wait(30)
    backend.post_now([record("e", 3), record("f", 4)], NOW)
    backend.post_now([record("e", 5)], NOW)  # a replay: the first one counts
    go_on.set()
    thread.join(30)
    assert (await backend.standing("ann", [total(99)])).used == (7,)


def test_many_threads_post_and_ask() -> None:
    """Nothing that is posted gets stuck in the inbox, whichever thread has the turn."""
    applied: list[int] = []
    turns = Turns(lambda ops, now, told: applied.append(now))

    def work(worker: int) -> None:
        for number in range(2000):
            turns.post((), worker * 2000 + number)
            if number % 3 == 0:
                turns.take(lambda ops, now: None, (), 0)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(applied) == list(range(8000))
    for worker in range(4):
        mine = [n for n in applied if n // 2000 == worker]
        assert mine == sorted(mine), "a thread's posts changed places"


def test_what_is_posted_and_cannot_be_counted_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The release that travels with it gets through."""
    backend = MemoryBackend()
    backend.apply_now([record("big", MAX_NANO), admit("a", cost=5)], NOW)
    with caplog.at_level(logging.ERROR, "respan_guard"):
        backend.post_now([record("more", 1), Release("ann", "a")], NOW)
    assert "can't be stored" in caplog.text
    assert backend.apply_now([Release("ann", "a")], NOW) == [Ended("gone")]
