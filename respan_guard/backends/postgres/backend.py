"""`postgresql://`: a database server, for a fleet and a ledger that lasts."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar, TypeVar

import psycopg

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
from respan_guard.backends.postgres import checks
from respan_guard.backends.postgres.batch import Batch
from respan_guard.backends.postgres.changes import Changes
from respan_guard.backends.postgres.connection import Connection, Link
from respan_guard.backends.postgres.location import locate
from respan_guard.backends.postgres.reads import Reads
from respan_guard.backends.postgres.schema import epoch_of, in_schema, migrate
from respan_guard.backends.postgres.standing import standing
from respan_guard.errors import BackendError, StorageUnavailable

__all__ = ["PostgresBackend"]

T = TypeVar("T")
_SWEEP_EVERY = 64  # batches
_SWEEP_ALL_MS = 3_600_000
_ORDER_MS = 5_000  # a customer that is busy is put in its place once for all that it did meanwhile
_LONG = 6 * 3600.0  # seconds that a proof, or forgetting somebody with very many entries, may take
_READ_TIMEOUT = 30.0  # seconds that a page or report may take
_DELETED = "RG003"


class PostgresBackend(Backend):
    """Tables in a schema of their own: `respan_guard`, or `respan_guard_NAMESPACE`.

    One connection applies batches, each in one statement and one round trip; a second one reads, so that no page
    of a report holds up an admission. Both work behind a pooler that gives every transaction another session.

    Args:
        url: `postgresql://user:password@host:5432/database`, with what libpq understands in its query (`sslmode`,
            `target_session_attrs`, ...), `?timeout=5`, the seconds that a batch may take in the server, and
            `?schema=NAME` for another schema.
        namespace: Keeps several guards apart in one database.
        options: `timeout` and `schema` as in the URL.

    Raises:
        ConfigurationError: The URL can't be read, or an option is unknown.
    """

    server_clock: ClassVar[bool] = True

    def __init__(self, url: str, *, namespace: str = "default", **options: Any) -> None:
        self._at = locate(url, namespace, options)
        self.place = self._at.place
        milliseconds = max(1, round(self._at.timeout * 1000))
        # All that a transaction needs is said in it, as the next one may run in another session.
        before = (
            f"SET LOCAL statement_timeout = {milliseconds}; SET LOCAL lock_timeout = {milliseconds};"
            " SET TRANSACTION ISOLATION LEVEL READ COMMITTED; "
        )
        self._apply = in_schema(f"{before}SELECT {{schema}}.apply(%s, %s, %s, %s)", self._at.schema)
        self._reads = Reads(self._at.schema)
        self._changes = Changes(self._at.schema)
        self._epoch: str | None = None
        self._latest = 0
        self._write_link: Link | None = None
        self._read_link: Link | None = None
        self._batches = 0
        self._offset = random.randrange(_SWEEP_EVERY)  # many short-lived processes put in order as often as a long one
        self._swept_all_at = self._ordered_at = 0
        self._sweeping: asyncio.Task[None] | None = None

    # -- life --------------------------------------------------------------------------------------

    async def open(self) -> None:
        """See `Backend.open`."""
        if self._read_link is not None:
            return
        writer, reader = Link(self._at, self._at.timeout), Link(self._at, _READ_TIMEOUT)
        try:
            await writer.open()
            epoch = await writer.run(lambda db: epoch_of(db, self._at))
            if epoch is None:
                epoch = await self._alone(lambda db: migrate(db, self._at))
        except BaseException:
            await writer.close()
            raise
        self._epoch, self._write_link, self._read_link = epoch, writer, reader
        self.identity = epoch

    async def close(self) -> None:
        """See `Backend.close`."""
        # A sweep has a reader's time, which is more than closing may take: it ends with the connections.
        await asyncio.gather(*[link.close() for link in self._take_links()])
        if self._sweeping is not None:
            await asyncio.wait([self._sweeping])
            self._sweeping = None

    def abandon(self) -> None:
        """See `Backend.abandon`."""
        self._sweeping = None
        for link in self._take_links():
            link.abandon()

    def _take_links(self) -> list[Link]:
        links = [link for link in (self._read_link, self._write_link) if link is not None]
        self._read_link = self._write_link = None
        return links

    def _opened(self, link: Link | None) -> Link:
        if link is None:
            raise StorageUnavailable(f"{self._at.shown} is not open")
        return link

    async def _change(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Write something that must not be written twice."""
        return await self._opened(self._write_link).run(work, repeatable=False)

    async def _look(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        return await self._opened(self._read_link).run(work)

    async def _beside(self, work: Callable[[Connection], Awaitable[T]], *, repeatable: bool = True) -> T:
        """Do what may take long, so that neither batches nor pages wait for it."""
        self._opened(self._read_link)
        return await self._alone(work, repeatable=repeatable)

    async def _alone(self, work: Callable[[Connection], Awaitable[T]], *, repeatable: bool = True) -> T:
        """Do what may take long on a connection of its own."""
        link = Link(self._at, _LONG)
        try:
            return await link.run(work, repeatable=repeatable)
        finally:
            await link.close()

    # -- operations --------------------------------------------------------------------------------

    async def apply(self, ops: Sequence[Op], now: int | None = None) -> list[Outcome]:
        """See `Backend.apply`."""
        link = self._opened(self._write_link)
        if not ops:
            self._latest = max(self._latest, now or 0)
            return []
        batch = Batch(ops)

        async def send(db: Connection) -> str:
            nonlocal batch
            cursor = psycopg.AsyncClientCursor(db)
            for _ in range(len(ops) + 1):
                try:
                    await cursor.execute(*self._statement(batch, now))
                except psycopg.Error as error:
                    if error.sqlstate != _DELETED:
                        raise
                    labels = {place - 1: label for place, label in json.loads(error.diag.message_detail or "[]")}
                    batch = Batch(ops, batch.labels | labels)
                    continue
                while cursor.nextset():
                    pass
                row = await cursor.fetchone()
                assert row is not None
                return str(row[0])
            raise StorageUnavailable("customers are deleted faster than their usage can be booked")

        at, outcomes = batch.outcomes(await link.run(send))
        self._latest = max(self._latest, at)
        self._sweep_sometimes()
        return outcomes

    def _statement(self, batch: Batch, now: int | None) -> tuple[bytes, tuple[object, ...]]:
        """What is sent for a batch, and its values."""
        return self._apply, (self._epoch, now, self._latest, batch.argument)

    def _sweep_sometimes(self) -> None:
        """Beside the batches: what ended long ago goes, and who moved is put in its place, little by little."""
        self._batches += 1
        sweep = self._batches % _SWEEP_EVERY == 0
        order = (self._batches + self._offset) % _SWEEP_EVERY == 0 and self._latest - self._ordered_at >= _ORDER_MS
        if not (sweep or order) or (self._sweeping is not None and not self._sweeping.done()):
            return
        everything = sweep and self._latest - self._swept_all_at >= _SWEEP_ALL_MS
        if everything:
            self._swept_all_at = self._latest
        if order:
            self._ordered_at = self._latest
        self._sweeping = asyncio.create_task(self._sweep(sweep, everything, order))

    async def _sweep(self, sweep: bool, everything: bool, order: bool) -> None:
        link = self._read_link
        if link is not None:
            try:
                if sweep:
                    await link.run(lambda db: self._changes.sweep(db, self._latest, everything))
                if order:  # so that pages find little to do
                    await link.run(self._reads.put_in_order)
            except BackendError:
                return  # the next one does it, or whoever sends the next batch is told

    async def put(
        self, customer: str, params: Params, *, if_revision: str | None = None, actor: str = "", now: int | None = None
    ) -> Put | Conflict:
        """See `Backend.put`."""
        # `now` is no floor for later batches: where the server's clock counts, the caller's may be wrong.
        return await self._change(
            lambda db: self._changes.put(db, customer, params, if_revision, actor, now, self._latest)
        )

    async def delete(self, customer: str, *, actor: str = "", now: int | None = None) -> bool:
        """See `Backend.delete`."""
        epoch, label = self._epoch or "", f"deleted-{secrets.token_hex(8)}"  # the same one for each try
        return await self._beside(
            lambda db: self._changes.delete(db, epoch, customer, label, actor, now, self._latest), repeatable=False
        )

    async def get(self, customer: str) -> CustomerRow | None:
        """See `Backend.get`."""
        return await self._look(lambda db: self._reads.get(db, customer))

    async def customers(self, query: CustomerQuery) -> list[CustomerRow]:
        """See `Backend.customers`."""
        return await self._look(lambda db: self._reads.customers(db, query))

    async def count_customers(self, *, seen_since_ms: int | None = None, blocked: bool | None = None) -> int:
        """See `Backend.count_customers`."""
        return await self._look(lambda db: self._reads.count_customers(db, seen_since_ms, blocked))

    async def standing(
        self, customer: str, limits: Sequence[Limit], model: str = "", now: int | None = None
    ) -> Allowed:
        """See `Backend.standing`."""
        schema = self._at.schema
        return await self._look(lambda db: standing(db, schema, customer, limits, model, now, self._latest))

    async def usage(self, query: UsageQuery) -> list[UsageRow]:
        """See `Backend.usage`."""
        return await self._look(lambda db: self._reads.usage(db, query))

    async def entries(self, query: RecordQuery) -> list[StoredEntry]:
        """See `Backend.entries`."""
        return await self._look(lambda db: self._reads.entries(db, query))

    async def entry(self, customer: str, entry_id: str) -> StoredEntry | None:
        """See `Backend.entry`."""
        return await self._look(lambda db: self._reads.entry(db, customer, entry_id))

    async def booked_on(self, customer: str, at_ms: int) -> str:
        """See `Backend.booked_on`."""
        epoch = self._epoch or ""
        return await self._look(lambda db: self._reads.booked_on(db, epoch, customer, at_ms))

    async def holds(
        self, customer: str | None = None, *, state: str = "live", now: int | None = None, limit: int = 1000
    ) -> list[HoldRow]:
        """See `Backend.holds`."""
        return await self._look(lambda db: self._reads.holds(db, customer, state, now, self._latest, limit))

    async def add_refusals(self, rows: Sequence[RefusalRow]) -> None:
        """See `Backend.add_refusals`."""
        epoch = self._epoch or ""
        await self._change(lambda db: self._changes.add_refusals(db, epoch, rows))

    async def refusals(
        self, *, customer: str | None = None, since_minute: int = 0, until_minute: int = 1 << 40, limit: int = 10_000
    ) -> list[RefusalRow]:
        """See `Backend.refusals`."""
        return await self._look(lambda db: self._reads.refusals(db, customer, since_minute, until_minute, limit))

    async def refusal_sums(
        self, *, customer: str | None = None, since_minute: int = 0, until_minute: int = 1 << 40
    ) -> dict[str, int]:
        """See `Backend.refusal_sums`."""
        return await self._look(lambda db: self._reads.refusal_sums(db, customer, since_minute, until_minute))

    async def add_audit(self, row: AuditRow) -> None:
        """See `Backend.add_audit`."""
        await self._change(lambda db: self._changes.add_audit(db, row))

    async def audit(
        self, *, customer: str | None = None, before: int | None = None, limit: int = 100
    ) -> list[AuditRow]:
        """See `Backend.audit`."""
        return await self._look(lambda db: self._reads.audit(db, customer, before, limit))

    async def cursor(self, name: str) -> int | None:
        """See `Backend.cursor`."""
        return await self._look(lambda db: self._reads.cursor(db, name))

    async def set_cursor(self, name: str, seq: int) -> None:
        """See `Backend.set_cursor`."""
        await self._opened(self._write_link).run(lambda db: self._changes.set_cursor(db, name, seq))

    async def set_fact(self, space: str, key: str, value: str | None, *, expected: Expected = ANY) -> bool:
        """See `Backend.set_fact`."""
        check_fact(space, key, value, expected)
        return await self._change(lambda db: self._changes.set_fact(db, space, key, value, expected))

    async def fact(self, space: str, key: str) -> str | None:
        """See `Backend.fact`."""
        check_fact(space, key)
        return await self._look(lambda db: self._reads.fact(db, space, key))

    async def facts(self, space: str, *, after: str = "", limit: int = 1000) -> list[tuple[str, str]]:
        """See `Backend.facts`."""
        check_page(space, after)
        return await self._look(lambda db: self._reads.facts(db, space, after, limit))

    async def prune(self, before_day: int, *, limit: int = 1000) -> int:
        """See `Backend.prune`."""
        return await self._change(lambda db: self._changes.prune(db, before_day, limit))

    async def verify(self) -> list[Discrepancy]:
        """See `Backend.verify`."""
        return await self._beside(lambda db: checks.verify(db, self._at.schema))

    async def info(self) -> StoreInfo:
        """See `Backend.info`."""
        return await self._look(lambda db: checks.info(db, self._at))
