"""What the breaker goes by, what the log says of an outage, and that what works beside requests never ends for good."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import sys
import threading
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Guard, StorageUnavailable, Usage
from respan_guard.backends.base import Backend, Entry, Record, RecordQuery
from respan_guard.breaker import Notices
from respan_guard.errors import BackendError, ConfigurationError, StorageFull, StorageReadOnly
from respan_guard.home import Home
from respan_guard.homes import Homes
from respan_guard.journal import JournalFile
from respan_guard.testing import FakeClock
from respan_guard.threads import in_thread

from .faulty import FaultyBackend, faulty_guard, live_holds

DIME = Decimal("0.1")
DOWN = StorageUnavailable("down")
LIMITS: dict[str, Any] = {"default_limits": {"total_budget": 5}}


def home_of(guard: Guard) -> Home:
    """The home of the loop that opened it."""
    home = guard._homes._app
    assert home is not None
    return home


async def until(condition: Callable[[], object]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def admits(guard: Guard) -> bool:
    """Whether a request is let in."""
    try:
        async with guard.admit("c1"):
            return True
    except StorageUnavailable:
        return False


def said(caplog: pytest.LogCaptureFixture, words: str) -> list[logging.LogRecord]:
    """What the log says with these words."""
    return [record for record in caplog.records if words in record.getMessage()]


def entry_of(guard: Guard) -> Entry:
    """What a call of c1 cost."""
    policy = guard.policies.get("c1").policy
    return guard.recorder.entry(Usage(cost=DIME), "c1", policy, guard.now_ms(), source="manual")


class NoThreads(concurrent.futures.ThreadPoolExecutor):
    """An executor at a limit of processes: it queues, and then finds that it can't start a thread."""

    def __init__(self) -> None:
        super().__init__(1)
        self.queued: list[Callable[[], object]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Queue, and fail."""
        self.queued.append(fn)
        raise RuntimeError("can't start new thread")


# -- no threads to be had ----------------------------------------------------------------------------


async def test_work_for_which_there_is_no_thread_is_done_once(tmp_path: Path) -> None:
    """Here and at once; a thread that is free later finds it done. What it raises is raised, and nothing else."""
    executor = NoThreads()
    asyncio.get_running_loop().set_default_executor(executor)
    done: list[int] = []
    await in_thread(lambda: done.append(threading.get_ident()))
    for late in executor.queued:
        late()
    assert done == [threading.get_ident()]

    def refuse() -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        await in_thread(refuse)


async def test_without_threads_an_outage_ends_as_ever(store: FaultyBackend, tmp_path: Path) -> None:
    """No thread can be started while the breaker is open: records are on disk all the same, and storage comes back."""
    async with faulty_guard(tmp_path, **LIMITS) as guard:
        home = home_of(guard)
        asyncio.get_running_loop().set_default_executor(NoThreads())
        store.error = DOWN
        for _ in range(4):
            guard.record_soon(Usage(cost=DIME), "c1")
            assert not await admits(guard)
        await until(lambda: guard.journal.pending == 4)
        await guard.record(Usage(cost=DIME), "c1")
        assert guard.journal.pending >= 5
        store.error = None
        await until(lambda: not home.breaker.is_open)
        assert await admits(guard)
        await guard.flush()
        assert (await guard.status("c1")).total_spend == 5 * DIME


async def test_a_guard_closes_without_threads(store: FaultyBackend, tmp_path: Path) -> None:
    """Its own thread's records are stored, and the thread ends, although no other one can be started to wait for it."""
    async with faulty_guard(tmp_path) as guard:
        await asyncio.to_thread(guard.sync.status, "c1")
        thread = guard._homes._thread
        assert thread is not None
        thread.home.post(Record(entry_of(guard)))
        asyncio.get_running_loop().set_default_executor(NoThreads())
    assert not thread._thread.is_alive()
    assert len(await store.entries(RecordQuery())) == 1


async def test_a_journal_that_fails_in_any_way_ends_nothing(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Records wait in memory, may still be withdrawn, and it is said once; storage is used again when it is back."""
    async with faulty_guard(tmp_path, **LIMITS) as guard:
        home = home_of(guard)

        def fail(entries: object) -> None:
            raise MemoryError

        with monkeypatch.context() as broken:
            broken.setattr(guard.journal, "write", fail)
            store.error = DOWN
            while not home.breaker.is_open:
                assert not await admits(guard)
            guard.record_soon(Usage(cost=DIME), "c1")
            home._wake.set()
            await until(lambda: said(caplog, "neither storage nor the journal"))
            assert not home._inbox[-1].taken
            await asyncio.sleep(0.3)
            assert len(said(caplog, "neither storage nor the journal")) == 1
        store.error = None
        await until(lambda: not home.breaker.is_open)
        await guard.flush()
        assert (await guard.status("c1")).total_spend == DIME


# -- tasks that go on --------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["_take", "_secure", "_probe", "_works", "_failed"])
async def test_a_fault_in_the_drain_does_not_end_it(
    part: str, store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it is: it is said with its traceback, what waited is sent, and nothing twice."""
    async with faulty_guard(tmp_path, **LIMITS) as guard:
        home = home_of(guard)
        await guard.record(Usage(cost=DIME), "c1")
        was, calls = getattr(home, part), 0

        def fails_twice(*args: object) -> Any:
            nonlocal calls
            calls += 1
            if calls < 3:
                raise RuntimeError("a bug")
            return was(*args)

        monkeypatch.setattr(home, part, fails_twice)
        store.error = None if part in ("_take", "_works") else DOWN
        for _ in range(4):
            guard.record_soon(Usage(cost=DIME), "c1")
            await asyncio.sleep(0.05)
        await until(lambda: calls > 2)
        store.error = None
        await until(lambda: not home.waiting and not home.breaker.failures)
        assert await admits(guard)
        assert (await guard.status("c1")).total_spend == 5 * DIME
        if part in ("_take", "_works"):  # else it is said within the ten seconds of the outage
            (record,) = said(caplog, "a fault of the guard")
            assert record.exc_info


async def test_the_guards_thread_outlives_who_wants_to_exit(
    store: FaultyBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A function of the app's that runs there, such as an exporter, may call `sys.exit`: threads are served on."""
    guard = faulty_guard(tmp_path)

    def work() -> Decimal:
        guard.sync.record(Usage(cost=DIME), "c1")
        thread = guard._homes._thread
        assert thread is not None
        thread.loop.call_soon_threadsafe(sys.exit)
        guard.sync.record(Usage(cost=DIME), "c1")
        spend = guard.sync.status("c1").total_spend
        guard.sync.close()
        assert not thread._thread.is_alive()
        return spend

    assert await asyncio.to_thread(work) == 2 * DIME
    assert said(caplog, "the guard's thread goes on")


async def test_the_kill_switch_is_looked_at_again_after_a_fault(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A look that fails in a way nobody thought of is not the last one."""
    monkeypatch.setattr("respan_guard.switch._EVERY", 0.02)
    async with faulty_guard(tmp_path) as guard, faulty_guard(tmp_path) as other:
        store.other_error = RuntimeError("a bug")
        looks = 0

        async def fails(home: Home) -> bool:
            nonlocal looks
            looks += 1
            if looks == 1:
                raise RuntimeError("a bug")
            return await again(home)

        again = guard.switch._again
        store.other_error = None
        monkeypatch.setattr(guard.switch, "_again", fails)
        await until(lambda: looks > 1)
        await other.switch.set("off")
        await until(lambda: guard.switch.off)
        assert len(said(caplog, "is done again")) == 1


async def test_background_work_waits_for_storage_that_was_never_opened(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An app that starts while storage is down prunes, and writes refusals, once it is back."""
    monkeypatch.setattr("respan_guard.home._OPEN_AGAIN", 0.02)
    store.error = store.other_error = DOWN
    async with faulty_guard(tmp_path, budget_failure="open") as guard:
        done: list[Backend] = []

        async def work(backend: Backend) -> None:
            done.append(backend)

        home_of(guard).post_call(work)
        await asyncio.sleep(0.1)
        assert not done
        store.error = store.other_error = None
        await until(lambda: done)
        await asyncio.sleep(0.05)
        assert len(done) == 1


async def test_refusals_are_written_again_after_a_close_without_storage(store: FaultyBackend, tmp_path: Path) -> None:
    """What was to write them went with the home; the next refusal has it done."""
    async with faulty_guard(tmp_path, default_limits={"total_budget": 0}) as guard:
        assert not await guard.try_admit("c1")
        home_of(guard).breaker.is_open = True
    async with guard:
        assert not await guard.try_admit("c1")
        assert guard.refusals._waiting
        async with asyncio.timeout(10):
            while not await store.refusals():
                await asyncio.sleep(0.05)


async def test_a_journal_write_that_runs_out_of_memory_loses_nothing(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that were to be set aside wait in memory again, whatever went wrong, and are stored once."""
    monkeypatch.setattr("respan_guard.overflow._MOST_WAITING", 1_000)
    async with faulty_guard(tmp_path) as guard:

        def fail(entries: object) -> None:
            raise MemoryError

        monkeypatch.setattr(guard.journal, "write", fail)
        for _ in range(5_000):
            guard.record_soon(Usage(cost=Decimal("0.000001")), "c1")
        await guard.flush()
        assert home_of(guard)._came_back
        assert (await guard.status("c1")).total_spend == Decimal("0.005")


async def test_who_finds_out_what_is_stored_may_get_lost(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went with its home before it began: half a minute later somebody else is sent."""
    clock = FakeClock()
    async with faulty_guard(tmp_path, clock=clock, budget_failure="local", **LIMITS) as guard:
        assert await admits(guard)
        store.error = DOWN
        async with guard.admit("c1", estimate=DIME) as admission:
            admission.record_soon(Usage(cost=DIME))
        account = guard.failover._accounts["c1"]
        store.error = None
        with monkeypatch.context() as lost:
            lost.setattr(Homes, "settled", False)
            lost.setattr(home_of(guard), "post_call", lambda work, delay=0.0: None)
            assert await admits(guard)
        await guard.flush()
        monkeypatch.setattr(Homes, "settled", False)  # it is never at rest
        assert await admits(guard)
        await asyncio.sleep(0.1)
        assert not account.stored
        clock.advance(31)
        assert await admits(guard)
        await until(lambda: account.stored)


async def test_a_journal_that_can_not_be_read_is_said_and_left(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What an earlier process left stays for the next one, and the guard goes on."""
    async with faulty_guard(tmp_path) as guard:
        store.error = DOWN
        guard.record_soon(Usage(cost=DIME), "c1")
    store.error = None

    def fail(file: JournalFile) -> object:
        raise OSError("a bad disk")

    with monkeypatch.context() as broken:
        broken.setattr(JournalFile, "entries", fail)
        async with faulty_guard(tmp_path) as guard:
            await until(lambda: said(caplog, "left to the next process"))
            assert await admits(guard)
    async with faulty_guard(tmp_path) as guard:
        async with asyncio.timeout(10):
            while (await guard.status("c1")).total_spend != DIME:
                await asyncio.sleep(0.02)


async def test_a_hold_that_can_not_be_renewed_holds_up_no_other(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is renewed by itself."""
    async with faulty_guard(tmp_path, **LIMITS) as guard, guard.admit("c1") as first, guard.admit("c2") as second:
        renewed: list[str] = []

        def renew(admission: Any, ttl_ms: int) -> None:
            renewed.append(admission.id)
            if admission is first:
                raise RuntimeError("a bug")

        monkeypatch.setattr(type(first), "renew", renew)
        guard.renewer._renew()
        assert renewed == [first.id, second.id]


# -- storage that answers and takes no writes --------------------------------------------------------


@pytest.mark.parametrize("error", [StorageFull("full"), StorageReadOnly("a replica")])
async def test_storage_that_takes_no_writes_is_down(
    error: BackendError, store: FaultyBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers what only reads: the breaker stays open all the same, few requests are sent, and it is said once."""
    async with faulty_guard(tmp_path, **LIMITS) as guard:
        home = home_of(guard)
        flight = await guard.admit("c1", estimate=DIME)
        store.write_error = error
        for _ in range(100):
            assert not await admits(guard)
            await asyncio.sleep(0.005)
        assert home.breaker.is_open
        assert store.refused <= 4
        assert len(said(caplog, "is unavailable")) == 1
        assert not said(caplog, "available again")
        await flight.record(Usage(cost=DIME))
        await flight.release()
        store.write_error = None
        await until(lambda: not home.breaker.is_open)
        assert await admits(guard)
        await guard.flush()
        assert len(said(caplog, "available again")) == 1
        assert (await guard.status("c1")).total_spend == DIME
        assert await live_holds(guard) == 0
        assert len(await store.entries(RecordQuery())) == 1


@pytest.mark.parametrize("error", [DOWN, StorageFull("full"), StorageReadOnly("a replica")])
async def test_an_app_starts_without_storage_that_takes_no_writes(
    error: BackendError, store: FaultyBackend, tmp_path: Path
) -> None:
    """Full, read-only or short of replicas is an outage like any other: "open" and "local" start, "closed" does not."""
    store.other_error = store.error = error
    with pytest.raises(type(error)):
        await faulty_guard(tmp_path).open()
    async with faulty_guard(tmp_path, budget_failure="open", rate_limit_failure="open") as guard:
        assert await admits(guard)
        store.other_error = store.error = None
        home = home_of(guard)
        home._start()
        await until(lambda: home.opened)
    async with faulty_guard(tmp_path, budget_failure="local"):
        pass


# -- what is said ------------------------------------------------------------------------------------


def test_the_log_is_told_seldom_and_never_left_with_what_is_not_so(caplog: pytest.LogCaptureFixture) -> None:
    """A storage that comes and goes: once in ten seconds that it is gone, and that it is back only after that."""
    notices = Notices("storage")
    for second in range(25):
        notices.failed("no answer", second)
        notices.failed("no answer", second)
        notices.worked()
        notices.worked()
    expected = ["storage is unavailable: no answer", "storage is available again"] * 3
    assert [record.getMessage() for record in caplog.records] == expected


async def test_a_hang_is_told_in_plain_words(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No answer is no fault of ours: no traceback, in the log as in what callers are told."""
    monkeypatch.setattr("respan_guard.drain._LEAST_STUCK", 0.1)
    async with faulty_guard(tmp_path, storage_timeout=0.05, **LIMITS) as guard:
        store.gate = asyncio.Event()
        with pytest.raises(StorageUnavailable, match=r"storage gave no answer within 0\.05 s"):
            await guard.admit("c1")
        await until(lambda: said(caplog, "is unavailable"))
        (record,) = said(caplog, "is unavailable")
        assert record.getMessage() == "storage is unavailable: storage gave no answer within 0.4 s"
        assert record.exc_info is None
        await until(lambda: home_of(guard).breaker.is_open)
        with pytest.raises(StorageUnavailable, match=r"storage is down: storage gave no answer within"):
            await guard.admit("c1")
        store.gate.set()
        store.gate = None


async def test_a_wrong_password_is_told_in_plain_words(
    store: FaultyBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it turns out while requests are served it is told by the storage's own text, without a traceback."""
    store.other_error = ConfigurationError("the server refuses the login")
    guard = faulty_guard(tmp_path, **LIMITS)
    with pytest.raises(StorageUnavailable, match=r"^the server refuses the login$"):
        await guard.admit("c1")
    (record,) = said(caplog, "is unavailable")
    assert record.getMessage() == "storage is unavailable: the server refuses the login"
    assert record.exc_info is None
    store.other_error = None
    await asyncio.to_thread(guard.sync.close)
