"""What the tables tell people. The statements run on a connection of their own."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

from respan_guard.backends.base import (
    HOUR_MS,
    AuditRow,
    CustomerQuery,
    CustomerRow,
    HoldRow,
    RecordQuery,
    RefusalRow,
    StoredEntry,
    UsageQuery,
    UsageRow,
)
from respan_guard.backends.postgres.connection import Connection, committed
from respan_guard.backends.postgres.queries import MOVING, count_sql, customers_sql, entries_sql, usage_sql
from respan_guard.backends.postgres.rows import (
    CUSTOMER,
    ENTRY,
    EVER,
    amounts_from,
    customer_from,
    entry_from,
)
from respan_guard.backends.postgres.schema import in_schema
from respan_guard.backends.postgres.standing import NOW
from respan_guard.backends.postgres.tops import largest, may_be_found
from respan_guard.backends.texts import params_from
from respan_guard.errors import InvalidInput

__all__ = ["Reads"]

_MAX_SEQ = (1 << 63) - 1
_MOST_PIECES = 5_000  # of two thousand changes each: what comes meanwhile must not keep a page waiting for ever


class Reads:
    """What can be asked of the tables of a schema.

    Args:
        schema: Its name.
    """

    def __init__(self, schema: str) -> None:
        self._schema = schema

    async def _rows(self, connection: Connection, sql: str, values: Any = ()) -> list[Any]:
        cursor = await connection.execute(in_schema(sql, self._schema), values)
        return await cursor.fetchall()

    async def _row(self, connection: Connection, sql: str, values: Any = ()) -> Any:
        rows = await self._rows(connection, sql, values)
        return rows[0] if rows else None

    # -- customers ---------------------------------------------------------------------------------

    async def get(self, db: Connection, customer: str) -> CustomerRow | None:
        """One customer."""
        row = await self._row(db, f"SELECT {CUSTOMER} FROM {{schema}}.customers WHERE customer = %s", (customer,))  # noqa: S608
        return None if row is None else customer_from(row)

    async def customers(self, db: Connection, query: CustomerQuery) -> list[CustomerRow]:
        """A page of customers, read off the index of its sort key."""
        statement = customers_sql(query)
        if query.sort in MOVING:
            await self.put_in_order(db)
        return [] if query.is_vain else [customer_from(row) for row in await self._rows(db, *statement)]

    async def count_customers(self, db: Connection, seen_since_ms: int | None, blocked: bool | None) -> int:
        """How many customers pass the filters; those not blocked are all but the blocked ones."""
        if blocked is False:
            everybody = await self.count_customers(db, seen_since_ms, None)
            return everybody - await self.count_customers(db, seen_since_ms, True)
        if seen_since_ms is not None:
            await self.put_in_order(db)
        return int((await self._row(db, *count_sql(seen_since_ms, blocked)))[0])

    async def put_in_order(self, db: Connection) -> None:
        """Bring the order of customers up to date with what was committed before."""
        for _ in range(_MOST_PIECES):
            row = await committed(db, in_schema("SELECT {schema}.put_in_order()", self._schema))
            if row is None or row[0]:
                return

    async def holds(
        self, db: Connection, customer: str | None, state: str, now: int | None, floor: int, limit: int
    ) -> list[HoldRow]:
        """Holds that are live, or that expired with something unspent."""
        if state not in ("live", "expired"):
            raise InvalidInput(f"state must be live or expired, got {state!r}", field="state")
        live = "g.ended_ms IS NULL AND g.expires_ms > at.now"
        expired = "g.expires_ms <= at.now AND (g.cost > 0 OR g.tokens > 0)"
        whose = "" if customer is None else " AND k.customer = %(customer)s"
        rows = await self._rows(
            db,
            f"WITH at AS MATERIALIZED (SELECT {NOW} AS now) "  # noqa: S608  # constants
            "SELECT k.customer, g.id, g.day, g.model, g.cost, g.tokens, g.expires_ms FROM at, {schema}.holds g "
            f"JOIN {{schema}}.customers k USING (c) WHERE {live if state == 'live' else expired}{whose} "
            "ORDER BY g.expires_ms, k.customer, g.id LIMIT %(limit)s",
            {"customer": customer, "now": now, "floor": floor, "limit": limit},
        )
        return [
            HoldRow(who, hold_id, day, of_model, cost, tokens, expires, state)
            for who, hold_id, day, of_model, cost, tokens, expires in rows
        ]

    # -- usage -------------------------------------------------------------------------------------

    async def usage(self, db: Connection, query: UsageQuery) -> list[UsageRow]:
        """Sums of the rollups."""
        query.check()
        count = len(query.by)
        if may_be_found(query):
            found = await self._largest(db, query)
        else:
            sql, values = usage_sql(query)
            if "hour" in query.by and query.among is not None:
                values["seq"] = await self._first_since(db, query.first_hour * HOUR_MS)
            found = await self._rows(db, sql, values)
        return [
            UsageRow(
                amounts_from(row, count + 1),
                customers=None if row[count] is None else int(row[count]),
                **dict(zip(query.by, row[:count], strict=True)),
            )
            for row in found
        ]

    async def _largest(self, db: Connection, query: UsageQuery) -> list[Any]:
        """Those who used most, all read from one state of the tables."""
        await self.put_in_order(db)
        async with db.transaction():
            await db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            rows = await largest(query, partial(self._rows, db))
            return await self._rows(db, *usage_sql(query, rows))

    async def entries(self, db: Connection, query: RecordQuery) -> list[StoredEntry]:
        """Entries in order of the log."""
        if query.is_vain:
            return []
        first = 0
        if query.since_ms is not None:
            first = await self._first_since(db, query.since_ms) - 1
        return [entry_from(row) for row in await self._rows(db, *entries_sql(query, first))]

    async def entry(self, db: Connection, customer: str, entry_id: str) -> StoredEntry | None:
        """One entry."""
        row = await self._row(
            db,
            f"SELECT {ENTRY} FROM {{schema}}.entries e JOIN {{schema}}.customers k USING (c) "  # noqa: S608  # constants
            "WHERE k.customer = %s AND e.id = %s",
            (customer, entry_id),
        )
        return None if row is None else entry_from(row)

    async def booked_on(self, db: Connection, epoch: str, customer: str, at_ms: int) -> str:
        """The customer, or the label that took its place then or later."""
        row = await self._row(
            db,
            "SELECT k.customer FROM {schema}.tombs t JOIN {schema}.customers k USING (c) "
            "WHERE t.hash = encode(sha256(convert_to(%s || %s, 'UTF8')), 'hex') AND t.deleted_ms >= %s "
            "ORDER BY t.deleted_ms, t.c LIMIT 1",
            (epoch, customer, at_ms),
        )
        return customer if row is None else str(row[0])

    async def _first_since(self, db: Connection, since_ms: int) -> int:
        """The first place of the log from which on an entry may have ended at `since_ms` or later.

        `latest_ms` never falls along the log, so halving finds it without an index.
        """
        low, high = await self._row(db, "SELECT coalesce(min(seq), 1), coalesce(max(seq), 0) + 1 FROM {schema}.entries")
        while low < high:
            middle = (low + high) // 2
            row = await self._row(
                db, "SELECT seq, latest_ms FROM {schema}.entries WHERE seq >= %s ORDER BY seq LIMIT 1", (middle,)
            )
            if row is None or row[1] >= since_ms:
                high = middle
            else:
                low = row[0] + 1
        return int(low)

    # -- the rest ----------------------------------------------------------------------------------

    async def refusals(
        self, db: Connection, customer: str | None, since_minute: int, until_minute: int, limit: int
    ) -> list[RefusalRow]:
        """Counts of refusals, newest first."""
        whose = "" if customer is None else " AND customer = %(customer)s"
        rows = await self._rows(
            db,
            "SELECT customer, reason, minute, count FROM {schema}.refusals "  # noqa: S608  # constants
            f"WHERE minute >= %(since)s AND minute < %(until)s{whose} "
            "ORDER BY minute DESC, customer, reason LIMIT %(limit)s",
            {
                "customer": customer,
                "since": min(since_minute, EVER),
                "until": min(until_minute, EVER),
                "limit": limit,
            },
        )
        return [RefusalRow(*row) for row in rows]

    async def refusal_sums(
        self, db: Connection, customer: str | None, since_minute: int, until_minute: int
    ) -> dict[str, int]:
        """Refusals by reason: of one customer by its minutes; of all by whole hours, and minutes at both ends."""
        since, until = min(since_minute, EVER), min(until_minute, EVER)
        if customer is not None:
            by_minute = (
                "SELECT reason, sum(count) FROM {schema}.refusals "
                "WHERE customer = %s AND minute >= %s AND minute < %s GROUP BY reason"
            )
            return {reason: int(count) for reason, count in await self._rows(db, by_minute, (customer, since, until))}
        first_hour, end_hour = -(-since // 60), until // 60
        if first_hour > end_hour:  # within one hour
            first_hour = end_hour = 0
            edges = [(since, until)]
        else:
            edges = [(since, first_hour * 60), (end_hour * 60, until)]
        by_hour = "SELECT reason, count FROM {schema}.refusal_hours WHERE hour >= %s AND hour < %s"
        at_edges = "SELECT reason, count FROM {schema}.refusals WHERE minute >= %s AND minute < %s"
        found: Counter[str] = Counter()
        for sql, bounds in ((by_hour, (first_hour, end_hour)), *((at_edges, edge) for edge in edges)):
            for reason, count in await self._rows(db, sql, bounds):
                found[reason] += count
        return dict(found)

    async def audit(self, db: Connection, customer: str | None, before: int | None, limit: int) -> list[AuditRow]:
        """The audit, newest first."""
        whose = "" if customer is None else " AND customer = %(customer)s"
        rows = await self._rows(
            db,
            "SELECT at_ms, customer, action, actor, before, after, seq FROM {schema}.audit "  # noqa: S608  # constants
            f"WHERE seq < %(before)s{whose} ORDER BY seq DESC LIMIT %(limit)s",
            {"customer": customer, "before": _MAX_SEQ if before is None else before, "limit": limit},
        )
        return [
            AuditRow(at, who, action, actor, params_from(was), params_from(then), seq)
            for at, who, action, actor, was, then, seq in rows
        ]

    async def cursor(self, db: Connection, name: str) -> int | None:
        """How far a reader has read the log."""
        row = await self._row(db, "SELECT seq FROM {schema}.cursors WHERE name = %s", (name,))
        return None if row is None else row[0]

    async def fact(self, db: Connection, space: str, key: str) -> str | None:
        """One fact."""
        row = await self._row(db, "SELECT value FROM {schema}.facts WHERE space = %s AND key = %s", (space, key))
        return None if row is None else row[0]

    async def facts(self, db: Connection, space: str, after: str, limit: int) -> list[tuple[str, str]]:
        """A page of facts, by key."""
        return await self._rows(
            db,
            "SELECT key, value FROM {schema}.facts WHERE space = %s AND key > %s ORDER BY key LIMIT %s",
            (space, after, max(limit, 0)),
        )
