"""One connection and its thread, while event loops end and the process forks around it."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from respan_guard.backends.sqlite import connection
from respan_guard.backends.sqlite.connection import Link, patiently
from respan_guard.testing import FakeClock

from .sqlite_support import finished, script


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty database."""
    found = tmp_path / "x.db"
    sqlite3.connect(found).close()
    return found


@pytest.fixture
def died(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What threads died of."""
    found: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: found.append(repr(args.exc_value)))
    return found


def _slowly(_: sqlite3.Connection) -> None:
    time.sleep(0.3)


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "connection_worker" in thread.name}


def _gone(threads: set[threading.Thread]) -> bool:
    for thread in threads:
        thread.join(5)
    return not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_the_loop_ends_behind_a_caller_cancelled_several_times(path: Path, died: list[str], times: int) -> None:
    """Its thread answers before the loop closes: it neither dies of a closed loop nor keeps the connection open."""
    before = _threads()

    async def main() -> Link:
        link = await Link.open(path, lambda _: None, 1)
        asked = asyncio.create_task(link.run(_slowly))
        for _ in range(times):
            await asyncio.sleep(0.02)
            asked.cancel()
        return link  # and asyncio.run cancels it once more

    link = asyncio.run(main())
    mine = _threads() - before
    link.abandon()
    assert mine
    assert _gone(mine)
    assert died == []


@pytest.mark.parametrize("times", [1, 2])
def test_the_loop_ends_while_a_connection_is_made(
    path: Path, died: list[str], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An opening that is cancelled is waited for, and its connection is closed: the thread ends in peace."""
    before, made = _threads(), connection._CallableConnection

    def slowly(*args: Any, **options: Any) -> sqlite3.Connection:
        time.sleep(0.3)
        return made(*args, **options)

    monkeypatch.setattr(connection, "_CallableConnection", slowly)

    async def main() -> None:
        opening = asyncio.create_task(Link.open(path, lambda _: None, 1))
        for _ in range(times):
            await asyncio.sleep(0.02)
            opening.cancel()

    asyncio.run(main())
    assert _gone(_threads() - before)
    assert died == []


@pytest.mark.parametrize("times", [1, 2])
def test_the_loop_ends_while_a_connection_closes(path: Path, died: list[str], times: int) -> None:
    """A close that is cancelled closes all the same, and its thread ends in peace."""
    before = _threads()

    async def main() -> Link:
        link = await Link.open(path, lambda _: None, 1)
        working = asyncio.create_task(link.run(_slowly))
        await asyncio.sleep(0.02)
        closing = asyncio.create_task(link.close())
        for _ in range(times):
            await asyncio.sleep(0.02)
            closing.cancel()
        del working
        return link

    asyncio.run(main())
    assert _gone(_threads() - before)
    assert died == []


def test_a_connection_let_go_on_a_loop_that_ends_at_once(path: Path, died: list[str]) -> None:
    """Letting go asks for no answer: the loop that happens to run then may be closed before the thread is through."""
    before = _threads()

    async def opening() -> tuple[Link, asyncio.Task[None]]:
        link = await Link.open(path, lambda _: None, 1)
        return link, asyncio.create_task(link.run(_slowly))

    async def letting_go(link: Link) -> None:
        link.abandon()

    first = asyncio.new_event_loop()
    link, working = first.run_until_complete(opening())
    first.run_until_complete(asyncio.sleep(0))  # the thread works, and this loop runs no more
    asyncio.run(letting_go(link))
    assert _gone(_threads() - before)
    first.run_until_complete(working)
    first.close()
    assert died == []


def test_letting_go_while_no_thread_can_be_started(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the interpreter's exit from 3.12 on: it is closed all the same, and nobody is told of a fault."""
    before = _threads()

    async def main() -> None:
        link = await Link.open(path, lambda _: None, 1)

        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't create new thread at interpreter shutdown")

        with monkeypatch.context() as exiting:
            exiting.setattr(threading.Thread, "start", refuse)
            await link.close()
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            await link.run(lambda db: db.execute("SELECT 1").fetchall())
        link.abandon()

    asyncio.run(main())
    assert _gone(_threads() - before)


async def test_what_nobody_waits_for_any_more_is_left_out(path: Path) -> None:
    """A cancelled caller's work that has not begun never runs; what has begun runs to its end."""
    link = await Link.open(path, lambda _: None, 1)
    begun, go_on, done = threading.Event(), threading.Event(), list[str]()

    def first(_: sqlite3.Connection) -> None:
        begun.set()
        go_on.wait(10)
        done.append("first")

    works = (first, lambda _: done.append("second"), lambda _: done.append("third"))
    asked = [asyncio.create_task(link.run(work)) for work in works]
    await asyncio.to_thread(begun.wait, 10)
    for task in asked[:2]:
        task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.wait(asked)
    await link.close()
    assert done == ["first", "third"]


def test_patience_is_a_time_and_ends_however_long_a_try_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries that take long themselves are not counted as if they took none."""
    clock, tries = FakeClock(), list[float]()
    monkeypatch.setattr(connection, "_clock", clock)

    def work() -> None:
        tries.append(clock.monotonic())
        clock.advance(2)
        if len(tries) < 9:
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise error

    with pytest.raises(sqlite3.OperationalError, match="locked"):
        patiently(work, 5)
    assert tries == [0, 2, 4]


CLOSING = """
import asyncio, os, signal, sqlite3, sys, threading, time
from pathlib import Path
path = Path(sys.argv[1])

class Slow(sqlite3.Connection):
    def close(self):  # holds the locks that closing holds, for long
        self.execute("BEGIN IMMEDIATE")
        inside.set()
        time.sleep(0.5)
        self.execute("ROLLBACK")
        super().close()

inside = threading.Event()
sqlite3.Connection = Slow  # what ours is made of
from respan_guard.backends.sqlite.connection import Link

async def main():
    link = await Link.open(path, lambda _: None, 1)
    await link.close()

thread = threading.Thread(target=lambda: asyncio.run(main()))
thread.start()
inside.wait()
child = os.fork()
if not child:
    signal.alarm(10)
    db = sqlite3.connect(path, timeout=0)
    db.execute("CREATE TABLE child (x)")
    db.close()
    os._exit(0)
print(os.waitpid(child, 0)[1])
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_within_a_close_locks_nobody_out(path: Path) -> None:
    """The fork waits for a close, too."""
    assert finished(script(CLOSING, path, "a"), timeout=40).split() == ["0"]
