"""Several processes on one file, processes that die, callers that give up."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from respan_guard.backends.base import Allowed, CustomerQuery, RecordQuery
from respan_guard.backends.sqlite import SQLiteBackend
from respan_guard.backends.sqlite.pending import Pending

from .sqlite_support import BUDGET, NOW, admit, finished, inside, opened, record, script

PREAMBLE = """
import asyncio, itertools, os, sys
from respan_guard.backends.base import *
from respan_guard.backends.sqlite import SQLiteBackend
from respan_guard.backends.sqlite.pending import Pending
from tests.backends.sqlite_support import NOW, admit, record
path, name = sys.argv[1:3]
backend = SQLiteBackend(f"sqlite:///{path}")
"""


ADMITTING = """
async def main():
    await backend.open()
    print("ready", flush=True)
    while not os.path.exists(path + ".go"):
        await asyncio.sleep(0.001)
    admitted = 0
    for number in range(25):
        (outcome,) = await backend.apply([admit(f"{name}-{number}")], NOW)
        admitted += isinstance(outcome, Allowed)
    await backend.close()
    print(admitted)
asyncio.run(main())
"""


def test_eight_processes_never_overspend(tmp_path: Path) -> None:
    """200 admissions of a tenth of a budget each, from 8 processes at once: exactly 10 are admitted."""
    path = tmp_path / "x.db"
    processes = [script(PREAMBLE + ADMITTING, path, name) for name in "abcdefgh"]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    Path(f"{path}.go").touch()
    assert sum(int(finished(process)) for process in processes) == 10


COUNTING = """
async def main():
    await backend.open()
    print("ready", flush=True)
    while not os.path.exists(path + ".go"):
        await asyncio.sleep(0.001)
    left = 25
    while left:
        seen = await backend.fact("s", "n")
        left -= await backend.set_fact("s", "n", str(int(seen or 0) + 1), expected=seen)
    await backend.close()
asyncio.run(main())
"""


async def test_processes_that_compare_and_set_lose_nothing(tmp_path: Path) -> None:
    """4 processes count up one fact, each when it finds what it expects: all of their steps are in it."""
    path = tmp_path / "x.db"
    processes = [script(PREAMBLE + COUNTING, path, name) for name in "abcd"]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    Path(f"{path}.go").touch()
    for process in processes:
        finished(process)
    async with opened(path) as backend:
        assert await backend.fact("s", "n") == "100"


WORKING = """
async def main():
    await backend.open()
    for number in range(100):
        ops = [record(f"{name}-{number}-{i}", f"customer-{i}") for i in range(4)]
        ops.append(admit(f"{name}-{number}", "customer-0", cost=0, limits=()))
        await backend.apply(ops, NOW + number)
        await backend.apply([Release("customer-0", f"{name}-{number}")], NOW + number)
        if number % 10 == 0:
            await backend.customers(CustomerQuery(sort="cost"))
    await backend.close()
asyncio.run(main())
"""


async def test_nobody_hears_of_a_locked_database(tmp_path: Path) -> None:
    """Four processes with 600 operations each on the same customers: no error surfaces, and every sum is right."""
    path = tmp_path / "x.db"
    for process in [script(PREAMBLE + WORKING, path, name) for name in "abcd"]:
        finished(process)
    async with opened(path) as backend:
        assert await backend.verify() == []
        (row, *_) = await backend.customers(CustomerQuery(search="customer-0"))
        assert (row.totals.calls, row.totals.requests) == (400, 400)
        seqs = [stored.seq for stored in await backend.entries(RecordQuery(limit=10_000))]
        assert seqs == list(range(1, 1601))


WRITING = """
async def main():
    await backend.open()
    for number in itertools.count():
        customer = f"customer-{number % 5}"
        ops = [admit(f"{name}-{number}", customer, cost=5, limits=()), record(f"{name}-{number}", customer),
               Release(customer, f"{name}-{number}")]
        await backend.apply(ops, NOW + number)
        os.write(1, f"{name}-{number}\\n".encode())
asyncio.run(main())
"""


async def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Ten writers are killed at a random moment: every acknowledged record is there, and every sum is right."""
    path = tmp_path / "x.db"
    acknowledged: set[str] = set()
    seed = random.Random(7)
    for round_ in range(5):
        processes = [script(PREAMBLE + WRITING, path, f"{round_}{name}") for name in "ab"]
        for process in processes:
            assert process.stdout is not None
            acknowledged.add(process.stdout.readline().strip())  # it is under way
        for process in processes:
            time.sleep(seed.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            output, _ = process.communicate()
            assert process.returncode == -signal.SIGKILL
            acknowledged.update(output.split("\n")[:-1])
        async with opened(path) as backend:
            assert await backend.verify() == []  # integrity_check is a part of it
            stored = {row.entry.id for row in await backend.entries(RecordQuery(limit=100_000))}
            assert acknowledged <= stored
            assert await backend.holds(now=NOW) == []
    assert len(acknowledged) > 50


LEAVING = """
async def main():
    await backend.open()
    await backend.apply([record(f"{name}-{number}") for number in range(50)], NOW)
    print("acknowledged", flush=True)
asyncio.run(main())
"""


async def test_a_process_that_never_closes_ends(tmp_path: Path) -> None:
    """A store that is left open doesn't keep the interpreter from its exit, and what it acknowledged is there."""
    path = tmp_path / "x.db"
    assert finished(script(PREAMBLE + LEAVING, path, "a"), timeout=30) == "acknowledged\n"
    async with opened(path) as backend:
        row = await backend.get("alice")
        assert row is not None
        assert row.totals.calls == 50


FORKING = """
async def main():
    await backend.open()
    await backend.apply([record("parent-1")], NOW)
asyncio.run(main())
child = os.fork()
if not child:
    backend.abandon()
    mine = SQLiteBackend(f"sqlite:///{path}")
    async def write():
        await mine.open()
        await mine.apply([record("child")], NOW)
        await mine.close()
    asyncio.run(write())
    print("child done", flush=True)
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
print("active" if backend._checkpointer.active else "lost")
"""


def test_a_forked_child_leaves_the_parents_connection_alone(tmp_path: Path) -> None:
    """The child drops what it inherited without closing it, and works with a connection of its own."""
    output = finished(script(PREAMBLE + FORKING, tmp_path / "x.db", "a"), timeout=30)
    assert output.split("\n")[:2] == ["child done", "active"]


FORKING_WITHIN = """
import threading, time
from respan_guard import Customer, Guard

guard = Guard(f"sqlite:///{path}", journal_dir=path + ".journal", storage_timeout=3)
guard.sync.put_customer(Customer(customer_identifier="parent"))
backend = guard.lane().home.backend
within = threading.Event()

def slow(writer):
    within.set()
    time.sleep(0.5)

thread = threading.Thread(target=lambda: guard.sync.run(guard.lane().call(lambda backend: backend._change(slow))))
thread.start()
within.wait()
child = os.fork()
if not child:
    import signal
    signal.alarm(15)
    guard.sync.put_customer(Customer(customer_identifier="child"))
    guard.sync.close()
    os._exit(0)
print(os.waitpid(child, 0)[1])
thread.join()
print(sorted(row.customer.customer_identifier for row in guard.sync.list_customers()))
guard.sync.close()
"""


def test_a_fork_within_a_transaction_locks_nobody_out(tmp_path: Path) -> None:
    """The fork waits for the transaction: a child made within it would find the file locked by itself for ever."""
    output = finished(script(PREAMBLE + FORKING_WITHIN, tmp_path / "x.db", "a"), timeout=40)
    assert output.splitlines() == ["0", "['child', 'parent']"]


async def test_cancelled_callers_leave_no_transaction_open(tmp_path: Path) -> None:
    """A thousand callers give up at random: each batch is stored wholly or not at all, and the next one runs."""
    seed = random.Random(11)
    async with opened(tmp_path / "x.db", synchronous="normal") as backend:

        async def one(number: int) -> None:
            await backend.apply([admit(f"a{number}", limits=(), cost=1), record(f"e{number}")], NOW)

        patient = 0
        for first in range(0, 1000, 100):
            tasks = [asyncio.create_task(one(first + number)) for number in range(100)]
            for task in tasks:
                if seed.random() < 0.3:
                    await asyncio.sleep(0)
                if seed.random() < 0.8:
                    task.cancel()
                else:
                    patient += 1
            await asyncio.gather(*tasks, return_exceptions=True)
        assert not await inside(backend, lambda db: db.in_transaction)
        await asyncio.wait_for(backend.apply([record("next")], NOW), 5)
        assert await backend.verify() == []
        row = await backend.get("alice")
        assert row is not None
        assert row.totals.calls == row.totals.requests + 1
        assert 150 < patient < row.totals.calls <= 1001


async def test_another_processs_commit_is_seen_at_once(tmp_path: Path) -> None:
    """Cells kept in memory are dropped when somebody else has written: sums, holds, params and deletions count."""
    async with opened(tmp_path / "x.db") as first, opened(tmp_path / "x.db") as second:
        await first.apply([admit("a", cost=900)], NOW)
        (refused,) = await second.apply([admit("b", cost=200)], NOW)
        assert not isinstance(refused, Allowed)
        await second.apply([record("e", cost=950)], NOW)
        (refused,) = await first.apply([admit("c", cost=60)], NOW + 10_000_000)
        assert not isinstance(refused, Allowed)
        await first.delete("alice", now=NOW + 10_000_000)
        (allowed,) = await second.apply([admit("d", cost=1000)], NOW + 10_000_000)
        assert isinstance(allowed, Allowed)


async def test_one_connection_of_all_does_checkpoints(tmp_path: Path) -> None:
    """Exactly one has SQLite's automatic checkpoints on; when it goes, another one takes over."""
    path = tmp_path / "x.db"
    first, second = SQLiteBackend(f"sqlite:///{path}"), SQLiteBackend(f"sqlite:///{path}")
    await first.open()
    await second.open()
    asks = [
        await inside(backend, lambda db: db.execute("PRAGMA wal_autocheckpoint").fetchone()[0])
        for backend in (first, second)
    ]
    assert asks[0] > 0
    assert asks[1] == 0
    await first.close()
    for number in range(64):
        await second.apply([record(f"e{number}")], NOW)
    assert await inside(second, lambda db: db.execute("PRAGMA wal_autocheckpoint").fetchone()[0]) > 0
    await second.close()


async def test_the_log_shrinks_after_a_reader_that_stayed(tmp_path: Path) -> None:
    """A reader that stays on an old state lets the log grow; when it goes, the log is cut back to its limit."""
    path = tmp_path / "x.db"
    log = Path(f"{path}-wal")
    async with opened(path, synchronous="normal") as backend:
        await backend.apply([record("first")], NOW)
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM entries").fetchone()
        number = 0
        while log.stat().st_size < 24 << 20:
            await backend.apply(
                [record(f"{number}-{i}", f"c{i * 31 % 997}", metadata={"fill": "x" * 1000}) for i in range(500)], NOW
            )
            number += 1
        reader.execute("COMMIT")
        reader.close()
        for more in range(3):
            await backend.apply([record(f"more-{more}")], NOW)
        assert log.stat().st_size <= 16 << 20
        assert await backend.verify() == []


async def test_a_failed_batch_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure at any statement of a batch: nothing of it is in the file or in memory, and it can be sent again."""
    async with opened(tmp_path / "x.db") as backend:
        await backend.apply([admit("before", cost=100)], NOW)

        for method in ("write_sums", "write_holds", "write_rates", "write_entries"):
            with monkeypatch.context() as patched:

                def fail(*_: object) -> None:
                    raise sqlite3.OperationalError("planted")

                patched.setattr(Pending, method, fail)
                with pytest.raises(Exception, match="planted"):
                    await backend.apply([admit("a", cost=800), record("e", cost=500)], NOW)
            standing = await backend.standing("alice", [BUDGET], now=NOW)
            assert (standing.used, standing.held) == ((0,), (100,))
        outcomes = await backend.apply([admit("a", cost=800), record("e", cost=500)], NOW)
        assert isinstance(outcomes[0], Allowed)
        assert await backend.verify() == []


OPENING = """
async def main():
    for number in range(60):
        await backend.open()
        await backend.apply([record(f"{name}-{number}")], NOW)
        await backend.close()
asyncio.run(main())
"""


async def test_opening_while_others_close(tmp_path: Path) -> None:
    """The last connection that closes locks the file for a moment; whoever opens it then just waits."""
    path = tmp_path / "x.db"
    for process in [script(PREAMBLE + OPENING, path, name) for name in "abc"]:
        finished(process)
    async with opened(path) as backend:
        row = await backend.get("alice")
        assert row is not None
        assert row.totals.calls == 180


DYING_LOOP = """
import threading
threading.excepthook = lambda _: None  # aiosqlite's thread can't answer a loop that is closed
async def main():
    await backend.open()
    asyncio.ensure_future(backend.apply([record("e1"), record("e2")], NOW))
    await asyncio.sleep(0)
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
loop.close()
backend.abandon()
other = SQLiteBackend(f"sqlite:///{path}")
async def after():
    await other.open()
    await other.apply([record("e3")], NOW)
    print((await other.get("alice")).totals.calls, await other.verify())
    await other.close()
asyncio.run(after())
"""


def test_a_loop_that_closes_under_a_batch(tmp_path: Path) -> None:
    """A loop that is gone while its batch runs takes its connection with it, but no lock, and leaves no half batch."""
    calls = finished(script(PREAMBLE + DYING_LOOP, tmp_path / "x.db", "a"), timeout=30).strip()
    assert calls in ("3 []", "1 []")
