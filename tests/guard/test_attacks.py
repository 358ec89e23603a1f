"""Attacks on the engine: loops that end, forks, and threads."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from decimal import Decimal
from pathlib import Path

import pytest

from respan_guard import Admission, Guard, StorageUnavailable, Usage
from respan_guard.backends.base import Record, Release
from respan_guard.errors import ConfigurationError
from respan_guard.journal import Journal
from respan_guard.testing import FakeClock

from .conftest import MakeGuard
from .faulty import FaultyBackend, faulty_guard
from .test_homes import costs, script
from .test_journal import entry

DIME = Decimal("0.1")


# -- loops that end ----------------------------------------------------------------------------------


def test_an_admission_outlives_the_loop_it_was_made_on(tmp_path: Path) -> None:
    """What is recorded and released after that loop was closed and its home adopted is stored all the same."""
    guard = Guard(f"sqlite:///{tmp_path / 'guard.db'}", journal_dir=tmp_path, default_limits={"total_budget": 1})

    async def main() -> Admission:
        await guard.open()
        return await guard.admit("c1", estimate=DIME)

    admission = asyncio.run(main())
    assert guard.sync.status("c1").limits[0].held == DIME  # adopts the home of the loop that is gone
    admission.record_soon(Usage(cost=DIME))
    admission.end()
    guard.sync.flush()
    status = guard.sync.status("c1")
    assert (status.total_spend, status.limits[0].held) == (DIME, 0)
    guard.sync.close()


async def test_what_is_posted_to_a_closed_guard_is_stored(tmp_path: Path) -> None:
    """A thread that ends its work after the app shut down still has it booked, and the hold is given back."""
    guard = Guard(f"sqlite:///{tmp_path / 'guard.db'}", journal_dir=tmp_path, default_limits={"total_budget": 1})
    async with guard:
        admission = await guard.admit("c1", estimate=DIME)
    admission.record_soon(Usage(cost=DIME))
    admission.end()
    await guard.flush()
    status = await guard.status("c1")
    assert (status.total_spend, status.limits[0].held) == (DIME, 0)
    await asyncio.to_thread(guard.sync.close)


async def test_a_loop_that_stopped_but_was_never_closed_loses_nothing(tmp_path: Path) -> None:
    """A program that runs its loop by hand and just ends: the interpreter's exit stores what waits."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    done = script(
        """
        import asyncio, sys, warnings
        from respan_guard import Guard, Usage
        guard = Guard(sys.argv[1], journal_dir=sys.argv[2])
        async def main():
            await guard.open()
            for _ in range(50):
                guard.record_soon(Usage(cost=1), "c1")
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        warnings.simplefilter("ignore")  # the loop is left unclosed on purpose
        """,
        url,
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    async with Guard(url, journal_dir=tmp_path):
        for file in tmp_path.glob("*.journal"):  # where threads can't be started at exit, the next process stores
            while file.exists():
                await asyncio.sleep(0.01)
    assert len(await costs(url)) == 50


def test_a_drain_that_is_cancelled_before_its_first_step_loses_nothing(tmp_path: Path) -> None:
    """asyncio.run cancels the drain in the very pass that started it; the next user adopts what it was for."""
    guard = Guard(f"sqlite:///{tmp_path / 'guard.db'}", journal_dir=tmp_path)

    async def main() -> None:
        await guard.open()
        guard.record_soon(Usage(cost=1), "c1")

    asyncio.run(main())
    guard.record_soon(Usage(cost=1), "c1")
    guard.sync.flush()
    assert guard.sync.status("c1").total_spend == 2
    guard.sync.close()


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_batch_on_its_way_when_the_loop_is_torn_down_is_sent_again(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """No cancellation, no farewell: the loop is stopped and closed while the store hangs, and nothing is lost."""
    monkeypatch.setattr(FaultyBackend, "at_once", at_once)
    guard = faulty_guard(tmp_path)
    loop = asyncio.new_event_loop()

    async def main() -> None:
        await guard.open()
        store.gate = asyncio.Event()
        guard.record_soon(Usage(cost=1), "c1")
        for _ in range(5):
            await asyncio.sleep(0)

    loop.run_until_complete(main())
    tasks = asyncio.all_tasks(loop)
    assert len(tasks) == at_once  # the drain, in the middle of its batch; and the batch, if it is a task of its own
    loop.close()
    asyncio.set_event_loop(None)  # where nothing can be awaited any more
    store.gate = None
    guard.sync.flush()
    assert guard.sync.status("c1").total_spend == 1
    guard.sync.close()
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is pending, that is the point
    del tasks
    gc.collect()


async def test_a_guard_opened_on_one_loop_and_closed_while_another_asks_hangs_nobody(tmp_path: Path) -> None:
    """Callers on other loops get an answer or StorageUnavailable when the guard closes under them, never silence."""
    guard = Guard(f"sqlite:///{tmp_path / 'guard.db'}", journal_dir=tmp_path)
    answers: list[str] = []
    started = threading.Event()

    def other() -> None:
        async def ask() -> None:
            started.set()
            for _ in range(100):  # each a commit to a disk that may be slow
                try:
                    await guard.try_admit("c1")
                    answers.append("answer")
                except StorageUnavailable:
                    answers.append("unavailable")

        asyncio.run(ask())

    async with guard:
        thread = threading.Thread(target=other)
        thread.start()
        await asyncio.to_thread(started.wait)
    for _ in range(20):
        async with guard:
            await asyncio.sleep(0)
    await asyncio.to_thread(thread.join, 90)
    assert not thread.is_alive()
    assert len(answers) == 100
    await asyncio.to_thread(guard.sync.close)


# -- waiting for oneself -----------------------------------------------------------------------------


async def test_blocking_on_the_loop_that_has_to_do_the_work_is_an_error_not_a_deadlock(tmp_path: Path) -> None:
    """guard.sync.flush() and close() on the opening loop say what to write instead."""
    async with Guard(f"sqlite:///{tmp_path / 'guard.db'}", journal_dir=tmp_path) as guard:
        with pytest.raises(ConfigurationError, match=r"await guard\.flush"):
            guard.sync.flush()
        with pytest.raises(ConfigurationError, match=r"await guard\.aclose"):
            guard.sync.close()
        await guard.record(Usage(cost=1), "c1")
        await asyncio.to_thread(guard.sync.flush)


def test_blocking_on_the_guards_own_thread_is_an_error_not_a_deadlock(tmp_path: Path) -> None:
    """A callback that runs on the guard's thread can't wait for that thread."""
    guard = Guard(f"sqlite:///{tmp_path / 'guard.db'}", journal_dir=tmp_path)

    async def inside() -> str:
        with pytest.raises(RuntimeError, match="wait for itself"):
            guard.sync.status("c1")
        return "refused"

    assert guard._homes.run(inside()) == "refused"
    guard.sync.close()


# -- forks -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
async def test_parent_and_children_never_make_the_same_ids(tmp_path: Path) -> None:
    """As under gunicorn --preload: all work for one customer, and every admission and every record counts."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    done = script(
        """
        import os, sys, warnings
        from decimal import Decimal
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what servers do
        from respan_guard import Guard, Usage
        guard = Guard(sys.argv[1], journal_dir=sys.argv[2], default_limits={"rate_limit": 1000})
        guard.sync.record(Usage(cost=1), "c1")
        children = []
        def work():
            for _ in range(10):
                with guard.sync.admit("c1") as admission:
                    admission.record(Usage(cost=1))
                guard.sync.record(Usage(cost=1), "c1")
        for n in range(3):
            pid = os.fork()
            if pid == 0:
                work()
                guard.sync.close()
                os._exit(0)
            children.append(pid)
        work()
        assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
        guard.sync.close()
        """,
        url,
        str(tmp_path),
    )
    assert (done.returncode, done.stderr) == (0, "")
    async with Guard(url, journal_dir=tmp_path) as guard:
        status = await guard.status("c1")
        assert (status.total_requests, status.total_calls) == (40, 81)
        assert status.total_spend == 81
        assert await guard.verify() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_fork_in_the_middle_of_another_threads_work_stops_nobody(tmp_path: Path, kind: str) -> None:
    """Whatever lock of ours a thread of the parent holds while it forks, the child works on."""
    done = script(
        """
        import os, signal, sys, threading, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from decimal import Decimal
        from respan_guard import Customer, Guard, Usage, admission
        guard = Guard(sys.argv[1], journal_dir=sys.argv[2], budget_failure="local")
        guard.sync.record(Usage("gpt-4o", input_tokens=1), "c1")
        homes = guard._homes
        held = [admission._claiming, guard.prices._lock, guard.policies._lock, guard.failover._lock, homes._lock,
                homes._journal._lock, guard.refusals._lock, guard.failover._windows._turns._lock]
        if homes.shared is not None:
            held.append(homes.shared.backend._turns._lock)
        taken, done = threading.Event(), threading.Event()
        def hold():
            for lock in held:
                lock.acquire()
            taken.set()
            done.wait()
            for lock in held:
                lock.release()
        thread = threading.Thread(target=hold)
        thread.start()
        taken.wait()
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            guard.sync.put_customer(Customer(customer_identifier="c1", total_budget=9))
            with guard.sync.admit("c1", estimate=Decimal("0.5")) as let_in:
                guard.current().settle(guard.current().claim(5))
                let_in.record(Usage("gpt-4o-mini", input_tokens=1))
            assert guard.sync.status("c1").total_calls >= 1
            guard.sync.flush()
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        done.set()
        thread.join()
        assert status == 0, status
        """,
        f"sqlite:///{tmp_path / 'guard.db'}" if kind == "sqlite" else "memory://",
        str(tmp_path),
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
async def test_a_child_that_inherits_a_request_books_on_its_own(tmp_path: Path) -> None:
    """A request's handler forks: parent and child both record under the admission, both count."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    done = script(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from respan_guard import Guard, Usage
        guard = Guard(sys.argv[1], journal_dir=sys.argv[2])
        with guard.sync.admit("c1") as admission:
            pid = os.fork()
            guard.record_soon(Usage(cost=1))
            if pid == 0:
                guard.sync.flush()
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        guard.sync.close()
        """,
        url,
        str(tmp_path),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert await costs(url) == [1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_childs_copy_of_the_journal_does_not_keep_it_locked(tmp_path: Path) -> None:
    """The parent dies, a child of it lives on: the journal is still adopted."""
    journal = Journal(tmp_path, "store")
    journal.write([entry(1)])
    file = journal._file
    assert file is not None
    copy = os.dup(file._descriptor)  # the parent's, as after a fork
    journal.forget()
    assert Journal(tmp_path, "store").orphans() == []  # the parent lives
    os.close(copy)
    [orphan] = Journal(tmp_path, "store").orphans()
    assert [e.id for e in orphan.entries()] == ["e1"]
    orphan.close()


# -- threads -----------------------------------------------------------------------------------------


async def test_a_thread_of_a_request_books_before_the_requests_release(store: FaultyBackend, tmp_path: Path) -> None:
    """record_soon from a worker thread goes into the admission's own inbox: the money is held or spent, always."""
    async with faulty_guard(tmp_path, default_limits={"total_budget": 1}) as guard:
        async with guard.admit("c1", estimate=Decimal(1)):
            store.gate = asyncio.Event()
            await asyncio.to_thread(guard.record_soon, Usage(cost=1))
        waiting = [type(item.op) for home in (guard._homes._app,) if home for item in (*home._batch, *home._inbox)]
        assert waiting == [Record, Release]
        assert guard._homes._remote is None
        gate, store.gate = store.gate, None
        gate.set()
        assert not await guard.try_admit("c1", estimate=DIME)
        assert [record.late async for record in guard.records()] == [False]


async def test_an_admission_can_be_recorded_on_from_another_loop(make_guard: MakeGuard) -> None:
    """A thread with a loop of its own awaits admission.record; what it returns from is stored."""
    async with make_guard() as guard:
        admission = await guard.admit("c1")
        await asyncio.to_thread(lambda: asyncio.run(admission.record(Usage(cost=1))))
        assert (await guard.status("c1")).total_spend == 1
        await admission.release()


async def test_threads_that_record_under_one_admission_make_no_id_twice(make_guard: MakeGuard) -> None:
    """2,000 records by 4 threads under one admission are 2,000 records."""
    async with make_guard() as guard:
        async with guard.admit("c1") as admission:

            def work() -> None:
                for _ in range(500):
                    admission.record_soon(Usage(cost=1))

            await asyncio.gather(*[asyncio.to_thread(work) for _ in range(4)])
        await guard.flush()
        assert (await guard.status("c1")).total_calls == 2000


def test_blocking_admissions_that_nobody_ends_expire(make_guard: MakeGuard, clock: FakeClock) -> None:
    """A bare guard.sync.admit that is never released is not renewed for ever, and not remembered either."""
    guard = make_guard(default_limits={"total_budget": 1}, hold_ttl=600)
    guard.sync.admit("c1", estimate=Decimal(1))
    assert guard.renewer._live == {}
    clock.advance(600)
    with guard.sync.admit("c1", estimate=Decimal(1)):
        guard._homes.run(asyncio.sleep(0)) if guard._homes.shared is None else None
        assert len(guard.renewer._live) == 1
    assert guard.renewer._live == {}
    guard.sync.close()
