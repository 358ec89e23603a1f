"""`sqlite:///`: the embedded database, for one machine and any number of processes on it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from respan_guard.backends.base import (
    ANY,
    Allowed,
    AuditRow,
    Backend,
    Conflict,
    CustomerQuery,
    CustomerRow,
    Discrepancy,
    Expected,
    HoldRow,
    Limit,
    Op,
    Outcome,
    Params,
    Put,
    RecordQuery,
    RefusalRow,
    StoredEntry,
    StoreInfo,
    UsageQuery,
    UsageRow,
)
from respan_guard.backends.facts import check_fact, check_page
from respan_guard.backends.sqlite import changes, checks, reads
from respan_guard.backends.sqlite.checkpointer import Checkpointer
from respan_guard.backends.sqlite.connection import Link, check_writable, immediate, only_read, patiently, prepare
from respan_guard.backends.sqlite.failures import translating
from respan_guard.backends.sqlite.location import locate
from respan_guard.backends.sqlite.schema import migrate
from respan_guard.backends.sqlite.writer import Writer
from respan_guard.errors import ConfigurationError, StorageUnavailable, StoreReset

__all__ = ["SQLiteBackend"]

T = TypeVar("T")
_MINIMUM = (3, 37, 0)  # STRICT tables


class SQLiteBackend(Backend):
    """A SQLite file in WAL mode.

    One connection writes: a batch is one transaction, run in one go in the connection's thread. A second one
    reads, so that no page of a report holds up an admission.

    Args:
        url: `sqlite:///guard.db` (relative) or `sqlite:////var/lib/app/guard.db` (absolute), with
            `?synchronous=normal` to trade the last moments before a power cut for speed, and `?timeout=5`, the seconds
            to wait for a file that another process keeps locked.
        namespace: Written into a new file; a file has one namespace.
        options: `synchronous` and `timeout` as in the URL.

    Raises:
        ConfigurationError: The URL names no file, or an option is unknown.
    """

    default_timeout: ClassVar[float] = 1.0  # a disk's slow fsync is no outage
    _writer: Writer  # made in the thread of each connection, when that is opened
    _reader: Writer

    def __init__(self, url: str, *, namespace: str = "default", **options: Any) -> None:
        if sqlite3.sqlite_version_info < _MINIMUM:
            raise ConfigurationError(f"SQLite 3.37 or newer is needed, this Python has {sqlite3.sqlite_version}")
        self._at = locate(url, options)
        self._namespace = namespace
        self.place = f"sqlite://{os.path.realpath(self._at.path)}#{namespace}"
        self._checkpointer = Checkpointer(self._at.path)
        self._write_link: Link | None = None
        self._read_link: Link | None = None
        self._file = (0, 0)

    # -- life --------------------------------------------------------------------------------------

    async def open(self) -> None:
        """See `Backend.open`."""
        if self._read_link is not None:
            return
        path, timeout = self._at.path, self._at.timeout
        if not path.parent.is_dir():
            raise ConfigurationError(f"the directory {path.parent} does not exist; create it: mkdir -p {path.parent}")
        if path.is_dir():
            raise ConfigurationError(f"{path} is a directory; name a file in it, such as {path / 'guard.db'}")
        with translating(path):
            self._create()
            try:
                self._write_link = await Link.open(path, self._prepare, timeout)
                self._read_link = await Link.open(path, self._prepare_reader, timeout, read_only=True)
            except BaseException:
                await self.close()
                raise

    async def close(self) -> None:
        """See `Backend.close`."""
        for link in (self._read_link, self._write_link):  # the writer last: the last one out empties the log
            if link is not None:
                with translating(self._at.path):
                    await link.close()
        self._read_link = self._write_link = None
        self._checkpointer.close()

    def abandon(self) -> None:
        """See `Backend.abandon`."""
        for link in (self._read_link, self._write_link):
            if link is not None:
                link.abandon()
        self._read_link = self._write_link = None
        self._checkpointer.close()

    def _create(self) -> None:
        """Make the file for this user only; the log and its index inherit that."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        # One that exists is not even opened: closing a second descriptor would drop this process's locks on it.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._at.path, flags, 0o600))

    def _prepare(self, db: sqlite3.Connection) -> None:
        """What `Link.open` tries again while the file is locked. A file that is up to date needs no lock to write."""
        prepare(db, self._at.synchronous)
        migrate(db, self._at.path, self._namespace)
        check_writable(db)
        self._writer = Writer(db, db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0])
        self._file, self.identity = self._file_now(), self._writer.epoch
        self._checkpointer.open(db)

    def _prepare_reader(self, db: sqlite3.Connection) -> None:
        only_read(db)
        self._reader = Writer(db, self._writer.epoch)

    def _seen(self, now: int | None) -> int:
        """The time to read at: not before what was last written."""
        latest = max(now or 0, self._writer.now)
        return self._reader.at(latest or None)

    def _file_now(self) -> tuple[int, int]:
        try:
            found = self._at.path.stat()
        except FileNotFoundError as error:
            raise StoreReset(f"{self._at.path} was deleted while it was open; restart to begin a new one") from error
        return found.st_dev, found.st_ino

    def _same_file(self) -> None:
        if self._file_now() != self._file:
            raise StoreReset(f"{self._at.path} was replaced while it was open; restart to use what is there now")

    # -- the two ways to the file ------------------------------------------------------------------

    async def _change(self, work: Callable[[Writer], T], *, then: Callable[[Writer], None] = Writer.forget) -> T:
        """Run `work` in a write transaction, and `then` after its commit."""
        link = self._opened(self._write_link)

        def transaction(db: sqlite3.Connection) -> T:
            writer = self._writer
            self._same_file()
            try:
                found = immediate(db, lambda db: work(writer), self._at.timeout)
            except BaseException:
                writer.lost()
                raise
            then(writer)
            self._same_file()  # else what was just acknowledged would be in a file that nobody finds
            self._checkpointer.after_batch(db)
            return found

        with translating(self._at.path):
            return await link.run(transaction)

    async def _look(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` on one state of the file."""
        link = self._opened(self._read_link)

        def transaction(db: sqlite3.Connection) -> T:
            self._same_file()
            db.execute("BEGIN")
            try:
                return work(db)
            finally:
                db.execute("COMMIT")

        with translating(self._at.path):
            return await link.run(lambda db: patiently(lambda: transaction(db), self._at.timeout))

    def _opened(self, link: Link | None) -> Link:
        if link is None:
            raise StorageUnavailable(f"{self._at.path} is not open")
        return link

    # -- operations --------------------------------------------------------------------------------

    async def apply(self, ops: Sequence[Op], now: int | None = None) -> list[Outcome]:
        """See `Backend.apply`."""
        return await self._change(lambda writer: writer.batch(ops, writer.at(now)), then=Writer.committed)

    async def put(
        self, customer: str, params: Params, *, if_revision: str | None = None, actor: str = "", now: int | None = None
    ) -> Put | Conflict:
        """See `Backend.put`."""

        def work(writer: Writer) -> Put | Conflict:
            writer.begin()
            done = changes.put(writer.db, customer, params, if_revision, actor, writer.at(now))
            writer.reread(customer)
            return done

        return await self._change(work, then=_nothing)

    async def delete(self, customer: str, *, actor: str = "", now: int | None = None) -> bool:
        """See `Backend.delete`. The bytes are overwritten, and gone from the log once all readers have moved on."""

        def work(writer: Writer) -> bool:
            writer.begin()
            return changes.delete(writer.db, writer.epoch, customer, actor, writer.at(now))

        found = await self._change(work)
        if found:
            with translating(self._at.path):
                await self._opened(self._write_link).run(self._checkpointer.truncate)
        return found

    async def get(self, customer: str) -> CustomerRow | None:
        """See `Backend.get`."""
        return await self._look(lambda db: reads.get(db, customer))

    async def customers(self, query: CustomerQuery) -> list[CustomerRow]:
        """See `Backend.customers`."""
        return await self._look(lambda db: reads.customers(db, query))

    async def count_customers(self, *, seen_since_ms: int | None = None, blocked: bool | None = None) -> int:
        """See `Backend.count_customers`."""
        return await self._look(lambda db: reads.count_customers(db, seen_since_ms, blocked))

    async def standing(
        self, customer: str, limits: Sequence[Limit], model: str = "", now: int | None = None
    ) -> Allowed:
        """See `Backend.standing`."""

        def work(db: sqlite3.Connection) -> Allowed:
            reader = self._reader
            reader.begin()
            return reader.standing(reader.cell(customer), limits, model, self._seen(now))

        return await self._look(work)

    async def usage(self, query: UsageQuery) -> list[UsageRow]:
        """See `Backend.usage`."""
        return await self._look(lambda db: reads.usage(db, query))

    async def entries(self, query: RecordQuery) -> list[StoredEntry]:
        """See `Backend.entries`."""
        return await self._look(lambda db: reads.entries(db, query))

    async def entry(self, customer: str, entry_id: str) -> StoredEntry | None:
        """See `Backend.entry`."""
        return await self._look(lambda db: reads.entry(db, customer, entry_id))

    async def booked_on(self, customer: str, at_ms: int) -> str:
        """See `Backend.booked_on`."""
        return await self._look(lambda db: changes.booked_on(db, self._reader.epoch, customer, at_ms))

    async def holds(
        self, customer: str | None = None, *, state: str = "live", now: int | None = None, limit: int = 1000
    ) -> list[HoldRow]:
        """See `Backend.holds`."""
        return await self._look(lambda db: reads.holds(db, customer, state, self._seen(now), limit))

    async def add_refusals(self, rows: Sequence[RefusalRow]) -> None:
        """See `Backend.add_refusals`."""
        await self._change(lambda writer: changes.add_refusals(writer.db, writer.epoch, rows), then=_nothing)

    async def refusals(
        self, *, customer: str | None = None, since_minute: int = 0, until_minute: int = 1 << 40, limit: int = 10_000
    ) -> list[RefusalRow]:
        """See `Backend.refusals`."""
        return await self._look(lambda db: reads.refusals(db, customer, since_minute, until_minute, limit))

    async def refusal_sums(
        self, *, customer: str | None = None, since_minute: int = 0, until_minute: int = 1 << 40
    ) -> dict[str, int]:
        """See `Backend.refusal_sums`."""
        return await self._look(lambda db: reads.refusal_sums(db, customer, since_minute, until_minute))

    async def add_audit(self, row: AuditRow) -> None:
        """See `Backend.add_audit`."""
        await self._change(lambda writer: changes.add_audit(writer.db, row), then=_nothing)

    async def audit(
        self, *, customer: str | None = None, before: int | None = None, limit: int = 100
    ) -> list[AuditRow]:
        """See `Backend.audit`."""
        return await self._look(lambda db: reads.audit(db, customer, before, limit))

    async def cursor(self, name: str) -> int | None:
        """See `Backend.cursor`."""
        return await self._look(lambda db: reads.cursor(db, name))

    async def set_cursor(self, name: str, seq: int) -> None:
        """See `Backend.set_cursor`."""
        await self._change(lambda writer: changes.set_cursor(writer.db, name, seq), then=_nothing)

    async def set_fact(self, space: str, key: str, value: str | None, *, expected: Expected = ANY) -> bool:
        """See `Backend.set_fact`."""
        check_fact(space, key, value, expected)

        def work(writer: Writer) -> bool:
            writer.begin()
            return changes.set_fact(writer.db, space, key, value, expected)

        return await self._change(work, then=_nothing)

    async def fact(self, space: str, key: str) -> str | None:
        """See `Backend.fact`."""
        check_fact(space, key)
        return await self._look(lambda db: reads.fact(db, space, key))

    async def facts(self, space: str, *, after: str = "", limit: int = 1000) -> list[tuple[str, str]]:
        """See `Backend.facts`."""
        check_page(space, after)
        return await self._look(lambda db: reads.facts(db, space, after, limit))

    async def prune(self, before_day: int, *, limit: int = 1000) -> int:
        """See `Backend.prune`."""
        return await self._change(lambda writer: changes.prune(writer.db, before_day, limit))

    async def verify(self) -> list[Discrepancy]:
        """See `Backend.verify`. Runs on a connection of its own: it takes long, and pages shall not wait."""
        with translating(self._at.path):
            self._same_file()
            link = await Link.open(self._at.path, only_read, self._at.timeout, read_only=True)
            try:
                return await link.run(checks.verify)
            finally:
                await link.close()

    async def info(self) -> StoreInfo:
        """See `Backend.info`."""
        return await self._look(lambda db: checks.info(db, self._at, self._checkpointer.active))


def _nothing(_: Writer) -> None:
    """What is kept in memory is still right."""
