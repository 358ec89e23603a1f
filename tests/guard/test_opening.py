"""A guard is opened wholly or not at all, by however many at once, and closed whoever gives up waiting."""

from __future__ import annotations

import asyncio
import gc
import operator
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from respan_guard import Guard, StorageUnavailable, Usage
from respan_guard.backends.base import Backend
from respan_guard.home import Home
from respan_guard.testing import FakeClock

from .faulty import FaultyBackend, faulty_guard

T = TypeVar("T")
_HANGS = 10.0  # seconds after which a test takes something for hanging


async def in_time(work: Awaitable[T]) -> T:
    """What `work` returns, which must not take as long as what hangs."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({task}, timeout=_HANGS)
    assert task.done(), "it waits for what hangs"
    return task.result()


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    """A guard over a file, not opened."""
    return Guard(f"sqlite:///{tmp_path / 'guard.db'}?timeout=60", journal_dir=tmp_path / "journal", clock=FakeClock())


@pytest.fixture
def homes(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> list[Home]:
    """The homes that the guard makes."""
    made: list[Home] = []
    make = guard._homes._make_home

    def kept() -> Home:
        made.append(make())
        return made[-1]

    monkeypatch.setattr(guard._homes, "_make_home", kept)
    return made


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Callable[[], sqlite3.Connection]]:
    """Locks the file, as another process may for long; unlocked in the end."""
    others: list[sqlite3.Connection] = []

    def lock() -> sqlite3.Connection:
        others.append(sqlite3.connect(tmp_path / "guard.db", isolation_level=None, check_same_thread=False))
        others[0].execute("BEGIN IMMEDIATE")
        return others[0]

    yield lock
    for other in others:
        other.close()


# -- open and close ------------------------------------------------------------------------------------


async def test_opening_at_the_same_time_makes_one_home(guard: Guard, homes: list[Home]) -> None:
    """Two servers on one loop may share a guard: it is one home, begun once, and closed by the last of them."""
    begun: list[object] = []
    guard._homes._on_open = begun.append
    await asyncio.gather(guard.open(), guard.open(), guard.open())
    assert len(homes) == len(begun) == 1
    for _ in range(2):
        await guard.aclose()
        assert homes[0].opened
    await guard.aclose()
    assert not homes[0].opened
    assert guard._homes._app is None


async def test_one_of_several_who_open_gives_up(store: FaultyBackend, tmp_path: Path, monkeypatch: Any) -> None:
    """The others' opening goes on, and the last close closes."""
    go_on, opened = asyncio.Event(), FaultyBackend.open

    async def slowly(self: FaultyBackend) -> None:
        await go_on.wait()
        await opened(self)

    monkeypatch.setattr(FaultyBackend, "open", slowly)
    guard = faulty_guard(tmp_path)
    opening = [asyncio.create_task(guard.open()) for _ in range(2)]
    await asyncio.sleep(0)
    opening[0].cancel()
    await asyncio.wait({opening[0]})
    home = guard._homes._app
    assert home is not None
    go_on.set()
    await in_time(opening[1])
    assert home.opened
    await guard.aclose()
    assert (home.opened, guard._homes._app) == (False, None)


async def test_an_opening_that_is_cancelled_is_undone(guard: Guard, homes: list[Home], monkeypatch: Any) -> None:
    """Cancelled in its last step it lets go of storage, and the next open and close are as ever."""
    begun, go_on = threading.Event(), threading.Event()

    def load() -> None:
        begun.set()
        go_on.wait(_HANGS)

    monkeypatch.setattr(guard.prices, "load", load)
    opening = asyncio.create_task(guard.open())
    await asyncio.to_thread(begun.wait, _HANGS)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    go_on.set()
    assert [home.opened for home in homes] == [False]
    async with guard:
        assert [home.opened for home in homes] == [False, True]
    assert [home.opened for home in homes] == [False, False]
    assert guard._homes._app is None


@pytest.mark.parametrize("where", ["refusals.flush", "outbox.leave", "_homes._app.flush"])
async def test_a_close_that_is_cancelled_closes(
    guard: Guard, homes: list[Home], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Wherever it waits: storage is let go of, and what was recorded is in the journal or stored."""
    await guard.open()
    guard.sync.record(Usage(cost=1), "c1")  # on the other home
    reached = asyncio.Event()

    async def hang() -> None:
        reached.set()
        await asyncio.Event().wait()

    part, _, name = where.rpartition(".")
    monkeypatch.setattr(operator.attrgetter(part)(guard), name, hang)
    guard.record_soon(Usage(cost=2), "c1")
    closing = asyncio.create_task(guard.aclose())
    await reached.wait()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await in_time(closing)
    monkeypatch.undo()
    assert [home.opened for home in homes] == [False, False]
    assert guard._homes.open_homes() == []
    async with Guard(guard.settings.storage, journal_dir=guard.journal.directory, clock=guard.clock) as other:
        await other.flush()
        assert (await other.status("c1")).total_spend == 3


async def test_records_of_a_store_whose_url_is_spelt_differently_are_found(guard: Guard, tmp_path: Path) -> None:
    """What a process that died left in its journal is stored by the next one, whatever it says beside the path."""
    guard.journal.write([guard.make_entry(Usage(model="m", cost=2), "c1", source="manual")])
    file = guard.journal.rotate()
    assert file is not None
    file.close()  # as a process does that dies
    url = guard.settings.storage.partition("?")[0] + "?synchronous=normal"
    async with Guard(url, journal_dir=tmp_path / "journal", clock=guard.clock) as other:
        await other.flush()
        assert (await other.status("c1")).total_spend == 2
    assert not file.path.exists()


# -- callers don't wait for what hangs -----------------------------------------------------------------


async def test_a_change_of_a_customer_waits_for_no_locked_file(
    guard: Guard, locked: Callable[[], sqlite3.Connection]
) -> None:
    """Params that come with a request have the storage timeout, whatever the connection's thread waits for."""
    guard.storage_timeout = 0.05
    async with guard:
        other = locked()
        for customer in ("c1", "c2"):
            with pytest.raises(StorageUnavailable, match="no answer"):
                await in_time(guard.customers.merge(customer, {"rate_limit": 5}, trusted=True))
        other.execute("COMMIT")
        await guard.customers.merge("c2", {"rate_limit": 6}, trusted=True)
        stored = await guard.get_customer("c2")
        assert stored is not None
        assert stored.rate_limit == 6
        assert await guard.verify() == []


async def test_nobody_waits_for_work_that_cannot_be_cancelled(
    store: FaultyBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A caller that is out of time or cancelled is let go at once; the work ends when it can, unheard."""
    ended: list[int] = []
    go_on = asyncio.Event()

    async def stubborn(_: Backend) -> None:
        while not go_on.is_set():
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                continue
        ended.append(1)
        raise StorageUnavailable("nobody hears this")

    async with faulty_guard(tmp_path) as guard:
        lane = guard.lane()
        with pytest.raises(StorageUnavailable, match="no answer"):
            await in_time(lane.call(stubborn, 0.01))
        caller = asyncio.create_task(lane.call(stubborn))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await in_time(caller)
        assert ended == []
        go_on.set()
    gc.collect()
    assert ended == [1, 1]
    assert "never retrieved" not in caplog.text


async def test_an_opening_goes_on_when_a_caller_gives_up(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request to a guard that nobody opened has its deadline; the next one finds the same opening, or it done."""
    go_on, opened = threading.Event(), FaultyBackend.open
    opens: list[int] = []

    async def slowly(self: FaultyBackend) -> None:
        opens.append(1)
        while not go_on.is_set():
            await asyncio.sleep(0.001)
        await opened(self)

    monkeypatch.setattr(FaultyBackend, "open", slowly)
    guard = faulty_guard(tmp_path, default_limits={"total_budget": 1}, storage_timeout=0.05)
    for _ in range(2):
        with pytest.raises(StorageUnavailable):
            await in_time(guard.admit("c1").scoped())
    assert opens == [1]
    go_on.set()
    await guard.flush()
    async with guard.admit("c1"):
        pass
    assert opens == [1]
    await asyncio.to_thread(guard.sync.close)


async def test_a_home_that_was_closed_opens_nothing(guard: Guard, homes: list[Home]) -> None:
    """Whoever still has it in hand is told: nobody would close it again."""
    await guard.open()
    await guard.aclose()
    with pytest.raises(StorageUnavailable, match="closed"):
        await homes[0].call(lambda backend: backend.get("c1"))
    assert not homes[0].opened
