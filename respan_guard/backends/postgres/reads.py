"""Pages and sums for people: statements and their values. They run on a connection of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from respan_guard.backends.base import (
    Allowed,
    AuditRow,
    CustomerQuery,
    CustomerRow,
    HoldRow,
    Limit,
    RecordQuery,
    RefusalRow,
    StoredEntry,
    UsageQuery,
    UsageRow,
)
from respan_guard.backends.cells import roll
from respan_guard.backends.postgres.connection import Connection
from respan_guard.backends.postgres.rows import (
    AMOUNTS,
    CUSTOMER,
    ENTRY,
    EVER,
    amounts_from,
    customer_from,
    entry_from,
    params_from,
)
from respan_guard.backends.postgres.schema import in_schema
from respan_guard.errors import InvalidInput

__all__ = ["Reads"]

_SORTS = ("customer", "name", "first_seen", "last_seen", "requests", "calls", "cost", "tokens")
_GROUPS = ("customer", "model", "day")
_MAX_SEQ = (1 << 63) - 1
_NOW = "greatest(%(floor)s, coalesce(%(now)s, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint))"
_STANDING = """
WITH at AS MATERIALIZED (SELECT {now} AS now),
    mine AS MATERIALIZED (SELECT c, rates FROM {schema}.customers WHERE customer = %(customer)s)
SELECT at.now, mine.rates, l.n, u.requests, u.cost, u.tokens, h.cost, h.tokens
FROM at LEFT JOIN mine ON true
LEFT JOIN unnest(%(wide)s::boolean[], %(first)s::integer[], %(end)s::integer[], %(model)s::text[])
    WITH ORDINALITY AS l (wide, first, "end", model, n) ON true
LEFT JOIN LATERAL (
    SELECT coalesce(sum(a.requests), 0)::bigint AS requests, coalesce(sum(a.cost), 0)::bigint AS cost,
        coalesce(sum(a.input_tokens + a.output_tokens), 0)::bigint AS tokens
    FROM {schema}.rollups a
    WHERE a.c = mine.c AND NOT l.wide AND a.day >= l.first AND a.day < l."end"
        AND (l.model IS NULL OR a.model = l.model)
    UNION ALL
    SELECT coalesce(sum(a.requests), 0)::bigint, coalesce(sum(a.cost), 0)::bigint,
        coalesce(sum(a.input_tokens + a.output_tokens), 0)::bigint
    FROM {schema}.totals a
    WHERE a.unit = 'd' AND l.wide AND a.at >= l.first AND a.at < l."end" AND (l.model IS NULL OR a.model = l.model)
) AS u ON true
LEFT JOIN LATERAL (
    SELECT coalesce(sum(g.cost), 0)::bigint AS cost, coalesce(sum(g.tokens), 0)::bigint AS tokens
    FROM {schema}.holds g
    WHERE (l.wide OR g.c = mine.c) AND g.ended_ms IS NULL AND g.expires_ms > at.now
        AND g.day >= l.first AND g.day < l."end" AND (l.model IS NULL OR g.model = l.model)
) AS h ON true"""


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
        sql, values = customers_sql(query)
        return [customer_from(row) for row in await self._rows(db, sql, values)]

    async def standing(
        self, db: Connection, customer: str, limits: Sequence[Limit], model: str, now: int | None, floor: int
    ) -> Allowed:
        """Where limits stand, on one state of the tables."""
        asked = [limit for limit in limits if not limit.window_ms]
        days = [(0, EVER) if limit.kind == "total" else (limit.first_day, limit.end_day) for limit in asked]
        rows = await self._rows(
            db,
            _STANDING.replace("{now}", _NOW),
            {
                "customer": customer,
                "now": now,
                "floor": floor,
                "wide": [limit.scope in ("model", "all") for limit in asked],
                "first": [min(first, EVER) for first, _ in days],
                "end": [min(end, EVER) for _, end in days],
                "model": [model if limit.scope in ("customer+model", "model") else None for limit in asked],
            },
        )  # fmt: skip
        at: int = rows[0][0]
        flat = rows[0][1] or []
        rates = {flat[i]: (flat[i + 1], flat[i + 2], flat[i + 3]) for i in range(0, len(flat), 4)}
        # Of each limit two rows of sums: the customer's and everybody's, one of them 0.
        sums: dict[int, list[int]] = {}
        for _, _, number, requests, cost, tokens, held_cost, held_tokens in rows:
            found = sums.setdefault(number or 0, [0, 0, 0, held_cost, held_tokens])
            found[0] += requests or 0
            found[1] += cost or 0
            found[2] += tokens or 0
        used, held, windows = [], [], []
        numbers = iter(range(1, len(asked) + 1))
        for limit in limits:
            if limit.window_ms:
                window = roll(rates.get(limit.window_ms), limit.window_ms, at)
                start, previous, current = window
                windows.append(window)
                used.append(previous * (limit.window_ms - max(0, at - start)) // limit.window_ms + current)
                held.append(0)
                continue
            requests, cost, tokens, held_cost, held_tokens = sums[next(numbers)]
            used.append({"requests": requests, "cost": cost, "tokens": tokens}[limit.metric])
            held.append({"requests": 0, "cost": held_cost, "tokens": held_tokens}[limit.metric])
        return Allowed(at, tuple(used), tuple(held), tuple(windows))

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
            f"WITH at AS MATERIALIZED (SELECT {_NOW} AS now) "  # noqa: S608  # constants
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
        """Sums of the daily rollups."""
        sql, values = usage_sql(query)
        count = len(query.by)
        return [
            UsageRow(amounts_from(row, count), **dict(zip(query.by, row[:count], strict=True)))
            for row in await self._rows(db, sql, values)
        ]

    async def entries(self, db: Connection, query: RecordQuery) -> list[StoredEntry]:
        """Entries in order of the log."""
        first = 0
        if query.since_ms is not None:
            first = await self._first_since(db, query.since_ms) - 1
        sql, values = entries_sql(query, first)
        return [entry_from(row) for row in await self._rows(db, sql, values)]

    async def entry(self, db: Connection, customer: str, entry_id: str) -> StoredEntry | None:
        """One entry."""
        row = await self._row(
            db,
            f"SELECT {ENTRY} FROM {{schema}}.entries e JOIN {{schema}}.customers k USING (c) "  # noqa: S608  # constants
            "WHERE k.customer = %s AND e.id = %s",
            (customer, entry_id),
        )
        return None if row is None else entry_from(row)

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


def customers_sql(query: CustomerQuery) -> tuple[str, dict[str, Any]]:
    """The statement of a page and its values."""
    if query.sort not in _SORTS:
        raise InvalidInput(f"sort must be one of {', '.join(_SORTS)}; got {query.sort!r}", field="sort")
    order = "DESC" if query.descending else "ASC"
    keys = "customer" if query.sort == "customer" else f"{query.sort}, customer"
    where: list[str] = []
    values: dict[str, Any] = {"limit": query.limit}
    if query.after is not None:
        sign = "<" if query.descending else ">"
        values["value"], values["customer"] = query.after
        where.append(
            f"customer {sign} %(customer)s" if keys == "customer" else f"({keys}) {sign} (%(value)s, %(customer)s)"
        )
    if query.search:
        where.append("strpos(search, %(search)s) > 0")
        values["search"] = query.search.casefold()
    ordered = ", ".join(f"{key} {order}" for key in keys.split(", "))
    condition = f"WHERE {' AND '.join(where)} " if where else ""
    return f"SELECT {CUSTOMER} FROM {{schema}}.customers {condition}ORDER BY {ordered} LIMIT %(limit)s", values  # noqa: S608


def usage_sql(query: UsageQuery) -> tuple[str, dict[str, Any]]:
    """The statement of a report and its values."""
    unknown = [name for name in query.by if name not in _GROUPS]
    if unknown:
        raise InvalidInput(f"usage is grouped by {', '.join(_GROUPS)}; got {unknown[0]!r}", field="by")
    # One customer's by the key, all customers' by the index of days; see the schema.
    day = "day" if query.customer is not None else "day + 0"
    where = [f"{day} >= %(first)s", f"{day} < %(end)s"]
    if query.customer is not None:
        where.append("c = (SELECT c FROM {schema}.customers WHERE customer = %(customer)s)")
    if query.model is not None:
        where.append("model = %(model)s")
    sums = ", ".join(f"sum(r.{name})" for name in AMOUNTS)
    names = ", ".join(query.by)
    table = "{schema}.rollups r" + (" JOIN {schema}.customers USING (c)" if "customer" in query.by else "")
    grouped = f"GROUP BY {names} ORDER BY {names}" if names else "HAVING count(*) > 0"
    chosen = f"{names}, {sums}" if names else sums
    return (
        f"SELECT {chosen} FROM {table} WHERE {' AND '.join(where)} {grouped} LIMIT %(limit)s",  # noqa: S608  # constants
        {
            "first": min(query.first_day, EVER),
            "end": min(query.end_day, EVER),
            "customer": query.customer,
            "model": query.model,
            "limit": query.limit,
        },
    )


def entries_sql(query: RecordQuery, first: int = 0) -> tuple[str, dict[str, Any]]:
    """The statement of a page and its values; nothing that is wanted stands at or before `first`."""
    where: list[str] = []
    values: dict[str, Any] = {"limit": query.limit}

    def also(condition: str, **given: Any) -> None:
        where.append(condition)
        values.update(given)

    if query.after is not None and not query.descending:
        first = max(first, query.after)
    if query.since_ms is not None:
        also("e.at_ms >= %(since)s", since=query.since_ms)
    if first:
        also("e.seq > %(first)s", first=first)
    if query.after is not None and query.descending:
        also("e.seq < %(last)s", last=query.after)
    if query.customer is not None:
        also("e.c + 0 = (SELECT c FROM {schema}.customers WHERE customer = %(customer)s)", customer=query.customer)
    for column in ("model", "provider", "kind", "source", "status", "trace_id"):
        value = getattr(query, column)
        if value is not None:
            also(f"e.{column} = %({column})s", **{column: value})
    if query.unpriced is not None:
        also("e.cost IS NULL" if query.unpriced else "e.cost IS NOT NULL")
    if query.until_ms is not None:
        also("e.at_ms < %(until)s", until=query.until_ms)
    condition = f"WHERE {' AND '.join(where)} " if where else ""
    order = "DESC" if query.descending else "ASC"
    tables = "{schema}.entries e JOIN {schema}.customers k USING (c)"
    return f"SELECT {ENTRY} FROM {tables} {condition}ORDER BY e.seq {order} LIMIT %(limit)s", values  # noqa: S608
