"""Connections to the file: one public await of aiosqlite runs one whole transaction in its thread.

aiosqlite hops between threads once per statement, and a caller that is cancelled between two hops leaves
a transaction open. So a callable is what we have it execute: nothing is awaited inside a transaction.

A fork waits for what runs, closing included. SQLite notes in the process's memory which locks the process has on a
file; a child forked within a transaction would find the file locked by itself, by a thread that it has not, for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar, cast
from urllib.parse import quote

import aiosqlite

from respan_guard.clock import SystemClock

__all__ = ["Link", "check_writable", "immediate", "only_read", "patiently", "prepare"]

T = TypeVar("T")
_PAUSE = (0.0002, 0.002)  # seconds between two tries for the lock: short, since the others' batches are
_FORK_WAITS = 5.0  # seconds at most: a fork is the app's, and rather goes wrong for its child than never happens
_inherited: list[object] = []
_clock = SystemClock()
logger = logging.getLogger("respan_guard")


class _Answer(Generic[T]):
    """What a callable returned, in the shape of a cursor."""

    def __init__(self, value: T) -> None:
        self._value = value

    def fetchall(self) -> T:
        return self._value


class _CallableConnection(sqlite3.Connection):
    """A connection whose `execute` also takes a callable and runs it, in the thread of the connection."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.busy = threading.RLock()  # a callable may close
        _connections.add(self)

    def execute(self, sql: Any, parameters: Any = ()) -> Any:
        if callable(sql):
            with self.busy:
                return _Answer(sql(self))
        return super().execute(sql, parameters)

    def close(self) -> None:
        with self.busy:
            super().close()


class Link:
    """One connection and its thread. Opened, used and closed on one event loop."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection
        self._pid = os.getpid()

    @classmethod
    async def open(
        cls, path: Path, setup: Callable[[sqlite3.Connection], None], patience: float, *, read_only: bool = False
    ) -> Link:
        """Connect to an existing file and run `setup`, for `patience` seconds while the file is locked.

        A connection that closes as the last one locks the file for a moment, against any statement.

        Raises:
            sqlite3.Error: It can't be opened.
        """
        made: list[_CallableConnection] = []

        def make(*args: Any, **given: Any) -> _CallableConnection:
            made.append(_CallableConnection(*args, **given))
            return made[0]

        connection = aiosqlite.connect(
            f"file:{quote(str(path))}?mode={'ro' if read_only else 'rw'}",
            uri=True,
            isolation_level=None,
            timeout=0,
            check_same_thread=False,
            cached_statements=256,
            factory=make,
        )
        # aiosqlite's thread is no daemon, and a connection that nobody closes would hang the interpreter's exit.
        # Losing the thread there is what losing power is: SQLite is made for it.
        thread = getattr(connection, "_thread", None)
        if isinstance(thread, threading.Thread):
            thread.daemon = True
        try:
            link = cls(await connection)
        except BaseException:  # then aiosqlite has told its thread to stop, and knows of no connection
            await _ended(thread)
            for unknown in made:
                unknown.close()
            raise
        try:
            await link.run(lambda db: patiently(lambda: setup(db), patience))
        except BaseException:
            await link.close()
            raise
        return link

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in the connection's thread, after everything asked before.

        Cancelled, it is left out if it has not begun; what has begun runs to its end, and that is waited for.
        """
        wanted = True
        try:
            found = await self._connection.execute_fetchall(cast(str, lambda db: work(db) if wanted else None))
        except asyncio.CancelledError:
            wanted = False
            await self._answered()
            raise
        return cast(T, found)

    async def _answered(self) -> None:
        """Wait until the thread is through with all that it was asked, however often that is cancelled.

        The loop may be about to close, and aiosqlite's thread dies if it has to answer a closed loop.
        """
        while True:
            try:
                await self._connection.execute_fetchall(cast(str, lambda _: []))
            except asyncio.CancelledError:
                continue
            except (sqlite3.Error, ValueError):
                pass  # it is closed
            return

    async def close(self) -> None:
        """Close the connection once everything asked before is done. Cancelling doesn't stop it."""
        try:
            await self.run(lambda db: db.close())
        finally:
            self.abandon()  # closes it, too

    def abandon(self) -> None:
        """Let go without waiting, from any thread. A connection of the parent process is never touched."""
        if os.getpid() != self._pid:
            # SQLite forbids even closing what came through a fork, so it must outlive every collection.
            _inherited.append(self._connection)
            return
        # Called where a loop runs, aiosqlite would answer that loop, which may be closed by then: see `_answered`.
        try:
            threading.Thread(target=self._connection.stop, daemon=True).start()
        except RuntimeError:  # no new threads while the interpreter exits; the connection's own goes with the process
            logger.debug("a connection is left to the end of the process")


async def _ended(thread: object) -> None:
    """Wait until a thread that was told to stop has, however often that is cancelled; see `Link._answered`."""
    while isinstance(thread, threading.Thread) and thread.is_alive():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.002)


_connections: weakref.WeakSet[_CallableConnection] = weakref.WeakSet()
_held: list[_CallableConnection] = []  # by the thread that forks


def _before_fork() -> None:
    until = _clock.monotonic() + _FORK_WAITS
    _held.extend(one for one in list(_connections) if one.busy.acquire(timeout=max(0.0, until - _clock.monotonic())))


def _after_fork() -> None:
    while _held:
        _held.pop().busy.release()


def _in_child() -> None:
    _held.clear()
    _connections.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


def patiently(work: Callable[[], T], timeout: float) -> T:
    """Run `work` until the file isn't locked by somebody else, for `timeout` seconds at most.

    SQLite's own handler sleeps up to 100 ms at a time, which starves the slower of two processes.

    Raises:
        sqlite3.OperationalError: SQLITE_BUSY, still.
    """
    until = _clock.monotonic() + timeout
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            if not _is_locked(error) or _clock.monotonic() >= until:
                raise
        time.sleep(random.uniform(*_PAUSE))


def _is_locked(error: sqlite3.OperationalError) -> bool:
    return (error.sqlite_errorcode & 0xFF) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def immediate(db: sqlite3.Connection, work: Callable[[sqlite3.Connection], T], timeout: float = 0.0) -> T:
    """Run `work` in one write transaction: it is committed when this returns, and rolled back if it raises.

    It is tried once, or for `timeout` seconds while the file is locked.

    A deferred transaction that reads and then writes fails at once when another one committed in between,
    whatever the timeout; hence IMMEDIATE.
    """
    patiently(lambda: db.execute("BEGIN IMMEDIATE"), timeout)
    try:
        found = work(db)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return found


def check_writable(db: sqlite3.Connection) -> None:
    """Fail now where the file can't be written, not at the first batch. One that others write to just now can be."""
    try:
        immediate(db, lambda _: None)
    except sqlite3.OperationalError as error:
        if not _is_locked(error):
            raise


def prepare(db: sqlite3.Connection, synchronous: str) -> None:
    """Set a connection up for writing."""
    for pragma in (
        f"synchronous = {synchronous}",
        "secure_delete = ON",
        "wal_autocheckpoint = 0",
        "journal_size_limit = 16777216",
        "mmap_size = 0",
        "temp_store = MEMORY",
        "trusted_schema = OFF",
        "journal_mode = WAL",
    ):
        db.execute(f"PRAGMA {pragma}")


def only_read(db: sqlite3.Connection) -> None:
    """Set a connection up for reading."""
    db.execute("PRAGMA query_only = ON")
    db.execute("PRAGMA mmap_size = 0")
    db.execute("PRAGMA cache_size = -16384")  # 16 MB: pages walk indexes of many customers
