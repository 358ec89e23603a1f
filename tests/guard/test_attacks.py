"""Attacks on the engine: loops that end, forks, threads, poison, full disks, and stores that hang at the worst moment."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Admission, Guard, StorageUnavailable, Usage
from respan_guard import journal as journal_module
from respan_guard.admitting import entered
from respan_guard.backends import registry
from respan_guard.backends.base import Record, Release
from respan_guard.context import Slot
from respan_guard.customer import Customer
from respan_guard.errors import ConfigurationError, CustomerUnknown, InvalidInput
from respan_guard.journal import Journal
from respan_guard.testing import FakeClock

from .conftest import MakeGuard
from .faulty import FaultyBackend
from .test_homes import costs, script
from .test_journal import entry

DIME = Decimal("0.1")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyBackend]:
    """The store behind faulty://one."""
    monkeypatch.setitem(registry._BUILT_IN, "faulty", f"{FaultyBackend.__module__}:FaultyBackend")
    yield FaultyBackend("faulty://one")
    FaultyBackend.stores.clear()


def faulty(tmp_path: Path, **options: Any) -> Guard:
    """A guard over it."""
    return Guard("faulty://one", **({"journal_dir": tmp_path, "clock": FakeClock()} | options))


async def live(guard: Guard) -> int:
    """How many holds count."""
    now = guard.now_ms()
    return len(await guard.lane().call(lambda backend: backend.holds(state="live", now=now)))


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
    async with Guard(url, journal_dir=tmp_path) as guard:
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


def test_a_batch_on_its_way_when_the_loop_is_torn_down_is_sent_again(store: FaultyBackend, tmp_path: Path) -> None:
    """No cancellation, no farewell: the loop is stopped and closed while the store hangs, and nothing is lost."""
    guard = faulty(tmp_path)
    loop = asyncio.new_event_loop()

    async def main() -> None:
        await guard.open()
        store.gate = asyncio.Event()
        guard.record_soon(Usage(cost=1), "c1")
        for _ in range(5):
            await asyncio.sleep(0)

    loop.run_until_complete(main())
    tasks = asyncio.all_tasks(loop)
    assert len(tasks) == 1  # the drain, in the middle of its batch
    loop.close()
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
            for _ in range(300):
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
    await asyncio.to_thread(thread.join, 30)
    assert not thread.is_alive()
    assert len(answers) == 300
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
        assert (status.total_requests, status.total_calls, status.total_spend) == (40, 81, 81)
        assert await guard.verify() == []


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
    async with faulty(tmp_path, default_limits={"total_budget": 1}) as guard:
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


# -- poison ------------------------------------------------------------------------------------------


async def test_metadata_that_no_store_can_keep_is_refused_at_once(make_guard: MakeGuard) -> None:
    """It is the recording app's error, not everybody's outage."""
    async with make_guard() as guard:
        with pytest.raises(InvalidInput, match="JSON values"):
            guard.record_soon(Usage(cost=1, metadata={"when": object()}), "c1")
        await guard.record(Usage(cost=1), "c1")
        assert (await guard.status("c1")).total_calls == 1


async def test_a_models_name_without_an_encoding_fails_nobodys_batch(make_guard: MakeGuard) -> None:
    """A client's JSON may hold a lone surrogate; it is asked for, held, booked and read like any other name."""
    async with make_guard(default_limits={"total_budget": 1}, unknown_price="flag") as guard:
        async with guard.admit("c1", estimate=Usage("gpt-\ud800", 1, 1)) as admission:
            await admission.record(Usage("gpt-\ud800", 1, 1))
        await guard.flush()
        assert [record.model async for record in guard.records()] == ["gpt-?"]


async def test_an_op_that_can_never_be_stored_does_not_stop_the_others(tmp_path: Path) -> None:
    """Even if it got as far as the inbox it is found, kept as a dead letter, and the rest of its batch is stored."""
    async with Guard(f"sqlite:///{tmp_path / 'guard.db'}", journal_dir=tmp_path) as guard:
        poison = guard.make_entry(Usage(cost=1), "c1", source="manual")
        poison.model = "\ud800"
        lane = guard.lane()
        lane.post(*[Record(guard.make_entry(Usage(cost=1), "c1", source="manual")) for _ in range(5)], Record(poison))
        assert await lane.record(poison) is None
        guard.record_soon(Usage(cost=1), "c1")
        await guard.flush()
        assert (await guard.status("c1")).total_spend == 6
        assert guard._homes._journal.dead_letters.exists()
        assert guard._homes._journal.pending == 0


async def test_poison_during_an_outage_keeps_the_order(store: FaultyBackend, tmp_path: Path) -> None:
    """An overflow splits a batch and storage fails in the middle: the release still comes behind its record."""
    async with faulty(tmp_path, default_limits={"total_budget": 9_000_000}) as guard:
        await guard.record(Usage(cost=8_000_000), "whale")
        admission = await guard.admit("c1", estimate=DIME)
        seen: list[str] = []
        apply = store.apply
        failing = True

        async def recording(ops: Any, now: int | None = None) -> Any:
            nonlocal failing
            if failing and len(ops) == 1 and isinstance(ops[0], Record) and ops[0].entry.customer == "c1":
                failing = False
                raise StorageUnavailable("just now")
            found = await apply(ops, now)
            seen.extend(type(op).__name__ for op in ops if getattr(op, "customer", "c1") == "c1")
            return found

        store.apply = recording  # type: ignore[method-assign]
        guard.record_soon(Usage(cost=8_000_000), "whale")
        admission.record_soon(Usage(cost=DIME))
        admission.end()
        await guard.flush()
        assert not failing
        assert seen.index("Record") < seen.index("Release")
        assert [record.late async for record in guard.records("c1")] == [False]


async def test_a_dead_letter_that_cannot_be_written_stops_nothing(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full, too: the entry is in the log, and the home goes on."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Journal, "bury", full)
    async with faulty(tmp_path) as guard:
        for _ in range(2):
            await guard.record(Usage(cost=8_000_000), "whale")
        await guard.record(Usage(cost=1), "c1")
        assert (await guard.status("c1")).total_spend == 1
    assert "this is it" in caplog.text


def test_an_overflow_in_memory_neither_reaches_the_app_nor_leaks_the_hold() -> None:
    """The end of a request never raises: the hold is released, the record that can't be counted is in the log."""
    guard = Guard("memory://", clock=FakeClock())
    guard.record_soon(Usage(cost=8_000_000), "whale")
    admission = guard.sync.admit("whale", estimate=DIME).admission
    admission.end(admission.entry(Usage(cost=8_000_000), "manual"))
    assert asyncio.run(live(guard)) == 0
    guard.sync.record(Usage(cost=8_000_000), "whale")
    assert guard.sync.status("whale").total_spend == 8_000_000


# -- the journal -------------------------------------------------------------------------------------


def test_half_a_line_of_a_full_disk_does_not_swallow_the_next_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write that failed was not acknowledged, the one behind it was: that one is read back."""
    journal = Journal(tmp_path, "store")
    journal.write([entry(1)])
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        write(descriptor, bytes(data[: len(data) // 2]))
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(journal_module.os, "write", half)
        with pytest.raises(OSError, match="no space left"):
            journal.write([entry(2)])
    journal.write([entry(3)])
    journal.write([entry(4)])
    file = journal.rotate()
    assert file is not None
    assert [e.id for e in file.entries()] == ["e1", "e3", "e4"]
    file.close()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")
def test_a_journal_that_somebody_else_planted_is_not_booked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory for all users must not let one of them book adjustments for another."""
    journal = Journal(tmp_path, "store")
    journal.write([entry(1)])
    journal.close()
    uid = os.getuid()
    with monkeypatch.context() as patched:
        patched.setattr(journal_module.os, "getuid", lambda: uid + 1)
        assert Journal(tmp_path, "store").orphans() == []
    assert len(Journal(tmp_path, "store").orphans()) == 1


def test_lines_that_are_json_but_no_entry_do_not_stop_the_rest(tmp_path: Path) -> None:
    """Whatever lies in the file, what can be read is stored."""
    journal = Journal(tmp_path, "store")
    journal.write([entry(1)])
    file = journal.rotate()
    assert file is not None
    good = file.path.read_bytes()
    bad_cost = json.loads(good) | {"usage": {"cost": "much"}}
    file.path.write_bytes(b'5\n[]\n"x"\n' + json.dumps(bad_cost).encode() + b"\n\n" + good)
    assert [e.id for e in file.entries()] == ["e1"]
    file.close()


async def test_a_record_that_cannot_be_stored_leaves_no_journal_that_comes_back_for_ever(
    store: FaultyBackend, tmp_path: Path
) -> None:
    """Replaying a journal of nothing but poison buries it and deletes the file."""
    async with faulty(tmp_path) as guard:
        await guard.record(Usage(cost=8_000_000), "whale")
        guard._homes._journal.write([guard.make_entry(Usage(cost=8_000_000), "whale", source="manual")])
        await guard.record(Usage(cost=1), "c1")
        await guard.flush()
    assert list(tmp_path.glob("*.journal")) == []
    assert guard._homes._journal.dead_letters.read_text().count("\n") == 1


async def test_closing_while_the_store_hangs_keeps_everything_on_disk(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shutdown is bounded, the batch on its way is journalled, and the next process books it once."""
    monkeypatch.setattr("respan_guard.home._CLOSE_TIMEOUT", 0.05)
    guard = faulty(tmp_path, storage_timeout=0.02)
    await guard.open()
    store.gate = asyncio.Event()
    for number in range(3):
        guard.record_soon(Usage(cost=1), "c1", entry_id=str(number))
    await guard.aclose()
    assert len(list(tmp_path.glob("*.journal"))) == 1
    store.gate = None
    async with faulty(tmp_path) as again:
        await asyncio.gather(*again._homes._app._calls)  # type: ignore[union-attr]  # the replay
        assert (await again.status("c1")).total_spend == 3


# -- who is it ---------------------------------------------------------------------------------------


async def test_a_deleted_customer_is_unknown_at_once(make_guard: MakeGuard) -> None:
    """With unknown customers refused, what this process remembers of one that another deleted lets nobody in."""
    async with make_guard(unknown_customers="refuse") as guard:
        await guard.put_customer(Customer(customer_identifier="c1", rate_limit=5))
        async with guard.admit("c1"):
            pass
        await guard.lane().call(lambda backend: backend.delete("c1", now=guard.now_ms()))  # by another process
        for _ in range(2):
            with pytest.raises(CustomerUnknown):
                await guard.admit("c1")


async def test_a_clients_word_makes_no_customer_known(make_guard: MakeGuard) -> None:
    """A name that comes with a request puts no stranger into the store where strangers are refused."""
    async with make_guard(unknown_customers="refuse") as guard:
        with pytest.raises(CustomerUnknown):
            await guard.admissions.request(Slot(is_request=True), "stranger", None, {"name": "Me"})
        assert await guard.get_customer("stranger") is None


async def test_two_customers_at_once_in_one_request_are_told_apart_or_absent(make_guard: MakeGuard) -> None:
    """Each task charges its own admission; code that can't tell charges nobody, never somebody else."""
    async with make_guard() as guard:
        slot = Slot(is_request=True)
        both = asyncio.Barrier(3)
        with entered(slot):

            async def work(customer: str) -> None:
                async with guard.admit(customer):
                    await both.wait()
                    await guard.record(Usage(cost=1))
                    await both.wait()

            tasks = [asyncio.create_task(work(name)) for name in ("a", "b")]
            await both.wait()
            assert guard.current() is None
            await guard.record(Usage(cost=5))
            await both.wait()
            await asyncio.gather(*tasks)
        guard.admissions.end(slot)
        await guard.flush()
        found = {row.customer_identifier: row.cost async for row in _by_customer(guard)}
        assert found == {"a": 1, "b": 1, "": 5}


async def _by_customer(guard: Guard) -> Any:
    for row in await guard.usage():
        yield row


async def test_work_that_outlives_its_admission_falls_to_no_other_customer(make_guard: MakeGuard) -> None:
    """A task begun for b within a's request and going on after b's admission charges nobody, not a."""
    async with make_guard() as guard:
        slot = Slot(is_request=True)
        go = asyncio.Event()

        async def later() -> None:
            await go.wait()
            await guard.record(Usage(cost=1))

        with entered(slot):
            await guard.admit("a")
            async with guard.admit("b"):
                task = asyncio.create_task(later())
            go.set()
            await task
            await guard.record(Usage(cost=2))
        guard.admissions.end(slot)
        found = {row.customer_identifier: row.cost for row in await guard.usage()}
        assert found == {"": 1, "a": 2, "b": 0} or found == {"": 1, "a": 2}


async def test_an_id_of_ones_own_still_charges_the_admission(make_guard: MakeGuard) -> None:
    """guard.record(entry_id=...) inside an admission draws from its hold, and another door then books nothing."""
    async with make_guard(default_limits={"total_budget": 1}) as guard:
        slot = Slot(is_request=True)
        with entered(slot):
            await guard.admit("c1", estimate=DIME)
            for _ in range(2):
                await guard.record(Usage("m", 1, 1, cost=DIME), entry_id="mine")
            [limit] = (await guard.status("c1")).limits
            assert (limit.used, limit.held) == (DIME, 0)
            assert slot.recorded
        guard.admissions.end(slot, Usage("m", 1, 1, cost=DIME))
        await guard.flush()
        assert [record.id async for record in guard.records()] == ["own:mine"]


async def test_a_response_is_booked_although_the_app_ended_its_own_admission(make_guard: MakeGuard) -> None:
    """The door's admission, the app's own one released early, or even both ended: one record, one end each."""
    async with make_guard() as guard:
        for end_both in (False, True):
            slot = Slot(is_request=True)
            outer = await guard.admissions.request(slot, "c1")
            with entered(slot):
                inner = await guard.admit("c1", estimate=DIME)
                await inner.release()
                if end_both:
                    await outer.release()
            guard.admissions.end(slot, Usage("m", 1, 1, cost=1))
        await guard.flush()
        assert (await guard.status("c1")).total_spend == 2
        assert await live(guard) == 0


async def test_a_session_that_admits_for_days_does_not_grow(make_guard: MakeGuard) -> None:
    """A WebSocket that admits each message keeps no list of them."""
    async with make_guard() as guard:
        slot = Slot(is_request=True)
        with entered(slot):
            for _ in range(500):
                async with guard.admit("c1"):
                    pass
            assert len(slot.admissions) <= 64
        guard.admissions.end(slot)


# -- time --------------------------------------------------------------------------------------------


async def test_a_clock_that_steps_back_neither_frees_budget_nor_hangs(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Back over midnight and over a period's end, and forward again: the store's time counts, and goes only on."""
    async with make_guard(default_limits={"budget_duration": "daily", "period_budget": 1}) as guard:
        start = clock.now
        clock.advance(86_400)
        async with guard.admit("c1", estimate=Decimal(1)) as admission:
            await admission.record(Usage(cost=1))
        clock.set(start)
        assert not await guard.try_admit("c1", estimate=DIME)
        clock.advance(2 * 86_400)
        assert await guard.try_admit("c1", estimate=DIME)
        assert await guard.verify() == []


async def test_a_customer_never_met_is_not_let_in_blindly_while_storage_is_down(
    store: FaultyBackend, tmp_path: Path
) -> None:
    """Where customers have budgets of their own, one that this process hasn't met may have one, too."""
    async with faulty(tmp_path) as guard:
        await guard.put_customer(Customer(customer_identifier="other", total_budget=1))
        store.error = StorageUnavailable("down")
        with pytest.raises(StorageUnavailable):
            await guard.admit("c1")
