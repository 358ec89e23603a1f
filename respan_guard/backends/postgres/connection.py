"""One connection to the server, and one statement at a time on it.

A statement that was sent runs to its end, whoever waits for it gives up or not: so its reply is always read, no
later one gets it, and no transaction stays open. If it takes too long, the connection is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias, TypeVar

import psycopg

from respan_guard.backends.postgres.failures import READ_ONLY, RETRIED, at_connecting, translated
from respan_guard.backends.postgres.location import Location
from respan_guard.clock import SystemClock
from respan_guard.errors import ConfigurationError, StorageUnavailable

__all__ = ["Connection", "Link", "committed"]

T = TypeVar("T")
Connection: TypeAlias = psycopg.AsyncConnection[tuple[object, ...]]
_GRACE = 0.25  # seconds that the server's own timeout gets to be first
_CLOSING = 1.0  # seconds that the last statement gets
_TRIES = 10  # of a statement that deadlocked or did not serialise
_clock = SystemClock()


async def committed(db: Connection, sql: bytes, values: Sequence[object] = ()) -> tuple[object, ...] | None:
    """The first row of a statement that sees what was committed before each of its parts, whatever the default is."""
    cursor = psycopg.AsyncClientCursor(db)
    await cursor.execute(b"SET TRANSACTION ISOLATION LEVEL READ COMMITTED; " + sql, values)
    while cursor.nextset():
        pass
    return await cursor.fetchone() if cursor.description else None


class Link:
    """A connection that is made when it is needed and made anew when it was lost.

    Args:
        at: Where to.
        timeout: Seconds that `run` may take, the connecting included.
    """

    def __init__(self, at: Location, timeout: float) -> None:
        self._at = at
        self._timeout = timeout + _GRACE
        self._connection: Connection | None = None
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[object]] = set()  # the loop itself holds tasks weakly
        self._process = os.getpid()
        self._closed = False
        self._connecting: asyncio.Timeout | None = None

    async def run(self, work: Callable[[Connection], Awaitable[T]], *, repeatable: bool = True) -> T:
        """Run `work`, which sends one statement, and return what it returns; in order of the calls.

        What deadlocked or did not serialise is sent again. So is, if it is `repeatable`, what was sent on a connection
        that turns out to be dead: it may have been applied by then. A session that can only read is left, as another
        one may be with the new primary, or may write again.

        Raises:
            GuardError: As `failures` has it.
        """
        task = asyncio.create_task(self._run(work, repeatable))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited for it may be gone

    async def _run(self, work: Callable[[Connection], Awaitable[T]], repeatable: bool) -> T:
        async with self._lock:
            if self._closed:
                raise StorageUnavailable(f"{self._at.shown} was closed meanwhile")
            deadline = _clock.monotonic() + self._timeout
            failures = 0
            while True:
                fresh = self._connection is None
                connection = await self._connected(deadline - _clock.monotonic())
                try:
                    return await self._timed(connection, work, deadline)
                except psycopg.Error as error:
                    lost = connection.broken or connection.closed
                    only_reads = error.sqlstate == READ_ONLY
                    if lost or only_reads:
                        self._connection = None
                        with contextlib.suppress(psycopg.Error):
                            await connection.close()
                    left = deadline - _clock.monotonic()
                    failures += 1
                    again = failures < _TRIES and error.sqlstate in RETRIED
                    anew = not fresh and (only_reads or (lost and repeatable)) and not self._closed
                    if left <= 0 or not (again or anew):
                        if lost and left <= 0:
                            raise StorageUnavailable(f"{self._at.shown} gave no answer in time") from error
                        raise translated(error, self._at.shown) from error
                    if again:
                        await asyncio.sleep(min(left, random.random() * 0.002 * 2**failures))
                except ValueError as error:  # a text that can't be sent
                    raise translated(error, self._at.shown) from error

    async def _timed(self, connection: Connection, work: Callable[[Connection], Awaitable[T]], deadline: float) -> T:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(max(0.0, deadline - _clock.monotonic()), self._cut)
        try:
            return await work(connection)
        finally:
            timer.cancel()

    async def _connected(self, timeout: float) -> Connection:  # noqa: ASYNC109 - it ends what it began
        if self._connection is None:
            try:
                self._connection = await self._connect(timeout)
            except ConfigurationError as error:
                raise StorageUnavailable(str(error)) from error
        return self._connection

    async def _connect(self, timeout: float) -> Connection:  # noqa: ASYNC109 - it ends what it began
        try:
            async with asyncio.timeout(timeout) as self._connecting:
                return await psycopg.AsyncConnection.connect(
                    self._at.conninfo,
                    autocommit=True,
                    prepare_threshold=None,  # a pooler may give each transaction another session
                    client_encoding="utf8",
                    fallback_application_name="respan_guard",
                )
        except (psycopg.Error, OSError, TimeoutError) as error:
            raise at_connecting(error, self._at.shown) from error
        finally:
            self._connecting = None

    async def open(self) -> None:
        """Connect now.

        Raises:
            ConfigurationError: The server refuses who we say we are, or has no such database.
            StorageUnavailable: It can't be reached.
        """
        async with self._lock:
            if self._connection is None:
                self._connection = await self._connect(self._timeout)

    async def close(self) -> None:
        """Give the connection back, after what runs on it; what runs, or connects, for long is cut."""
        self._closed = True
        timer = asyncio.get_running_loop().call_later(_CLOSING, self._give_up)
        try:
            async with self._lock:
                connection, self._connection = self._connection, None
                if connection is not None:
                    await connection.close()
        finally:
            timer.cancel()

    def abandon(self) -> None:
        """Let go; from any thread. A forked child leaves the parent's connection alone."""
        connection, self._connection = self._connection, None
        if connection is not None and self._process == os.getpid():
            connection.pgconn.finish()

    def _give_up(self) -> None:
        if self._connecting is not None:
            with contextlib.suppress(RuntimeError):  # its time is over just now
                self._connecting.reschedule(asyncio.get_running_loop().time())
        self._cut()

    def _cut(self) -> None:
        """End both directions: whoever waits for a reply is told at once that there will be none."""
        if self._connection is None:
            return
        with contextlib.suppress(OSError, psycopg.Error):
            ours = socket.socket(fileno=os.dup(self._connection.fileno()))
            with ours:
                ours.shutdown(socket.SHUT_RDWR)
