"""Sums of rollups: of customers, of all together, of some by hour."""

from __future__ import annotations

import json
import sqlite3
from typing import Any, Final

from respan_guard.backends.base import AMOUNTS, HOUR_MS, UsageQuery, UsageRow
from respan_guard.backends.rows import names_of
from respan_guard.backends.sqlite.rows import FROM_ENTRIES, amounts_from
from respan_guard.backends.sqlite.tops import INDEXED, has_shortcut, top_customers

__all__ = ["AMONG", "first_since", "usage", "usage_sql"]

AMONG: Final = "IN (SELECT c FROM customers WHERE customer IN (SELECT value FROM json_each(?)))"
"""A condition on `c`: the customers whose names are given as a list in JSON."""
_ENTRIES = ", ".join(f"{added} AS {name}" for name, added in FROM_ENTRIES.items())


def usage(db: sqlite3.Connection, query: UsageQuery) -> list[UsageRow]:
    """Sums of the rollups."""
    query.check()
    if has_shortcut(db, query):
        return top_customers(db, query)
    if "hour" in query.by and query.among is not None:
        sql, values = _hours_sql(db, query, query.among)
    else:
        sql, values = usage_sql(query)
    count = len(query.by)
    return [
        UsageRow(amounts_from(row, count + 1), customers=row[count], **dict(zip(query.by, row[:count], strict=True)))
        for row in db.execute(sql, values)
    ]


def usage_sql(query: UsageQuery) -> tuple[str, list[Any]]:
    """The statement of a report and its values.

    It reads customers' own rollups only if it has to; what counts all customers together is kept beside them.
    """
    query.check()
    when, first, end = "day", query.first_day, query.end_day
    distinct, table = "NULL", "days"
    if "hour" in query.by:
        when, first, end, table = "hour", query.first_hour, query.end_hour, "hours"
    elif not query.of_all:
        table = "rollups"
    if query.distinct:
        if table == "days" and query.by_day_alone:
            distinct = "(SELECT customers FROM active WHERE active.day = days.day)"
        else:
            distinct, table = "count(DISTINCT rollups.c)", "rollups"
    source = "rollups JOIN customers USING (c)" if "customer" in query.by else table
    where = [f"{when} >= ?", f"{when} < ?"]
    values: list[Any] = [first, end]
    if query.customer is not None:
        where.append("rollups.c = (SELECT c FROM customers WHERE customer = ?)")
        values.append(query.customer)
    if query.among is not None:
        # The customers first, whatever is known of the tables' sizes: each has few rows within the days.
        source = "customers CROSS JOIN rollups USING (c)"
        where.append(f"customers.c {AMONG}")
        values.append(json.dumps(names_of(query.among)))
    if query.model is not None:
        where.append("model = ?")
        values.append(query.model)
    if query.by == ("customer",) and query.among is None and query.least is not None and query.top in INDEXED:
        # Within days nobody used more than in all time, but for who got money back; see `tops`.
        source = "customers CROSS JOIN rollups USING (c)"
        can = f"SELECT c FROM customers WHERE {query.top} >= ? UNION ALL SELECT c FROM customers WHERE credited"  # noqa: S608
        where.append(f"customers.c IN ({can})")
        values.append(query.least)
    return _grouped(query, table, source, f"WHERE {' AND '.join(where)}", distinct), [*values, query.limit]


def _hours_sql(db: sqlite3.Connection, query: UsageQuery, among: tuple[str, ...]) -> tuple[str, list[Any]]:
    """The same of some customers' hours, from the entries of each."""
    names = names_of(among)
    first_ms, end_ms = query.first_hour * HOUR_MS, query.end_hour * HOUR_MS
    where = f"seq >= ? AND at_ms >= ? AND at_ms < ? AND entries.c {AMONG}"
    values: list[Any] = [first_since(db, first_ms), first_ms, end_ms, json.dumps(names)]
    if query.model is not None:
        where += " AND model = ?"
        values.append(query.model)
    source = (
        f"(SELECT c, model, at_ms / {HOUR_MS} AS hour, 0 AS requests, {_ENTRIES} FROM entries WHERE {where}) AS some"  # noqa: S608
    )
    if "customer" in query.by:
        source += " CROSS JOIN customers USING (c)"
    return _grouped(query, "some", source, "", "NULL"), [*values, query.limit]


def _grouped(query: UsageQuery, table: str, source: str, where: str, distinct: str) -> str:
    sums = ", ".join(f"sum({table}.{name})" for name in AMOUNTS)
    names = ", ".join(query.by)
    having = "count(*) > 0"
    if query.top is not None and query.least is not None:
        having = f"{_sum_of(table, query.top)} >= {query.least:d}"
    grouped = (f"GROUP BY {names} " if names else "") + f"HAVING {having}"
    order = [] if query.top is None else [f"{_sum_of(table, query.top)} DESC"]
    ordered = f" ORDER BY {', '.join((*order, *query.by))}" if names else ""
    chosen = ", ".join((*query.by, distinct, sums))
    return f"SELECT {chosen} FROM {source} {where} {grouped}{ordered} LIMIT ?"  # noqa: S608


def _sum_of(table: str, name: str) -> str:
    return f"sum({table}.input_tokens + {table}.output_tokens)" if name == "tokens" else f"sum({table}.{name})"


def first_since(db: sqlite3.Connection, since_ms: int) -> int:
    """The first place of the log from which on an entry may have ended at `since_ms` or later.

    `latest_ms` never falls along the log, so halving finds it without an index.
    """
    # Each end on its own: asked for both at once, SQLite reads every entry.
    low, high = db.execute(
        "SELECT coalesce((SELECT min(seq) FROM entries), 1), coalesce((SELECT max(seq) FROM entries), 0) + 1"
    ).fetchone()
    while low < high:
        middle = (low + high) // 2
        row = db.execute("SELECT seq, latest_ms FROM entries WHERE seq >= ? ORDER BY seq LIMIT 1", (middle,)).fetchone()
        if row is None or row[1] >= since_ms:
            high = middle
        else:
            low = row[0] + 1
    return int(low)
