"""Pages and sums for people. They run on a connection of their own, which never holds up the one that writes."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from typing import Any

from respan_guard.backends.base import (
    AuditRow,
    CustomerQuery,
    CustomerRow,
    HoldRow,
    RecordQuery,
    RefusalRow,
    StoredEntry,
)
from respan_guard.backends.rows import names_of
from respan_guard.backends.sqlite.rows import (
    CUSTOMER,
    ENTRY,
    customer_from,
    entry_from,
)
from respan_guard.backends.sqlite.sums import AMONG, first_since, usage
from respan_guard.backends.texts import params_from
from respan_guard.errors import InvalidInput

__all__ = [
    "audit",
    "count_customers",
    "cursor",
    "customers",
    "entries",
    "entry",
    "fact",
    "facts",
    "get",
    "holds",
    "refusal_sums",
    "refusals",
    "usage",
]

_SORTS = ("customer", "name", "first_seen", "last_seen", "requests", "calls", "cost", "tokens")


def get(db: sqlite3.Connection, customer: str) -> CustomerRow | None:
    """One customer."""
    row = db.execute(f"SELECT {CUSTOMER} FROM customers WHERE customer = ?", (customer,)).fetchone()  # noqa: S608
    return None if row is None else customer_from(row)


def customers(db: sqlite3.Connection, query: CustomerQuery) -> list[CustomerRow]:
    """A page of customers, read off the index of its sort key."""
    sql, values = customers_sql(query)
    return [] if query.is_vain else [customer_from(row) for row in db.execute(sql, values)]


def customers_sql(query: CustomerQuery) -> tuple[str, list[Any]]:
    """The statement of a page and its values."""
    if query.sort not in _SORTS:
        raise InvalidInput(f"sort must be one of {', '.join(_SORTS)}; got {query.sort!r}", field="sort")
    order = "DESC" if query.descending else "ASC"
    keys = "customer" if query.sort == "customer" else f"{query.sort}, customer"
    where: list[str] = []
    values: list[Any] = []
    if query.after is not None:
        sign = "<" if query.descending else ">"
        if query.sort == "customer":
            where.append(f"customer {sign} ?")
            values.append(query.after[1])
        else:
            where.append(f"({keys}) {sign} (?, ?)")
            values += query.after
    if query.search:
        # From an index that has little else in it; the page then walks its own, and looks up only who is shown.
        where.append("c IN (SELECT c FROM customers WHERE instr(search, ?) > 0)")
        values.append(query.search.casefold())
    if query.among is not None:
        where.append(f"c {AMONG}")
        values.append(json.dumps(names_of(query.among)))
    where += filters(query.seen_since_ms, query.blocked, values)
    ordered = ", ".join(f"{key} {order}" for key in keys.split(", "))
    condition = f"WHERE {' AND '.join(where)} " if where else ""
    return f"SELECT {CUSTOMER} FROM customers {condition}ORDER BY {ordered} LIMIT ?", [*values, query.limit]  # noqa: S608


def filters(seen_since_ms: int | None, blocked: bool | None, values: list[Any]) -> list[str]:
    """Conditions on customers; their values are added to `values`."""
    where = []
    if seen_since_ms is not None:
        where.append("last_seen >= ?")
        values.append(seen_since_ms)
    if blocked is not None:
        where.append("c IN (SELECT c FROM customers WHERE blocked)")  # from an index of these few
        if not blocked:
            where[-1] = "NOT " + where[-1]
    return where


def count_customers(db: sqlite3.Connection, seen_since_ms: int | None, blocked: bool | None) -> int:
    """How many customers pass the filters, counted on an index; those not blocked are all but the blocked ones."""
    if blocked is False:
        return count_customers(db, seen_since_ms, None) - count_customers(db, seen_since_ms, True)
    values: list[Any] = []
    where = " AND ".join(filters(seen_since_ms, blocked, values)) or "true"
    return int(db.execute(f"SELECT count(*) FROM customers WHERE {where}", values).fetchone()[0])  # noqa: S608


def entries(db: sqlite3.Connection, query: RecordQuery) -> list[StoredEntry]:
    """Entries in order of the log."""
    return [] if query.is_vain else [entry_from(row) for row in db.execute(*entries_sql(db, query))]


def entries_sql(db: sqlite3.Connection, query: RecordQuery) -> tuple[str, list[Any]]:
    """The statement of a page and its values."""
    where: list[str] = []
    values: list[Any] = []

    def also(condition: str, *given: Any) -> None:
        where.append(condition)
        values.extend(given)

    first = query.after if query.after is not None and not query.descending else 0
    if query.since_ms is not None:
        also("at_ms >= ?", query.since_ms)
        first = max(first, first_since(db, query.since_ms) - 1)
    if query.stop is not None and query.descending:
        first = max(first, query.stop - 1)  # of two bounds SQLite would go down to either
    elif query.stop is not None:
        also("seq <= ?", query.stop)
    if first:
        also("seq > ?", first)
    if query.after is not None and query.descending:
        also("seq < ?", query.after)
    if query.customer is not None:
        also("entries.c = (SELECT c FROM customers WHERE customer = ?)", query.customer)
    for column in ("model", "provider", "kind", "source", "status", "trace_id"):
        value = getattr(query, column)
        if value is not None:
            also(f"entries.{column} = ?", value)
    if query.unpriced is not None:
        also("entries.cost IS NULL" if query.unpriced else "entries.cost IS NOT NULL")
    if query.until_ms is not None:
        also("at_ms < ?", query.until_ms)
    condition = f"WHERE {' AND '.join(where)} " if where else ""
    order = "DESC" if query.descending else "ASC"
    return (
        f"SELECT {ENTRY} FROM entries CROSS JOIN customers USING (c) {condition}ORDER BY seq {order} LIMIT ?",  # noqa: S608
        [*values, query.limit],
    )


def entry(db: sqlite3.Connection, customer: str, entry_id: str) -> StoredEntry | None:
    """One entry."""
    row = db.execute(
        f"SELECT {ENTRY} FROM customers CROSS JOIN entries USING (c) WHERE customer = ? AND entries.id = ?",  # noqa: S608
        (customer, entry_id),
    ).fetchone()
    return None if row is None else entry_from(row)


def holds(db: sqlite3.Connection, customer: str | None, state: str, now: int, limit: int) -> list[HoldRow]:
    """Holds that are live, or that expired with something unspent."""
    if state not in ("live", "expired"):
        raise InvalidInput(f"state must be live or expired, got {state!r}", field="state")
    live = "ended_ms IS NULL AND expires_ms > ?"
    expired = "expires_ms <= ? AND (holds.cost > 0 OR holds.tokens > 0)"
    where = [live if state == "live" else expired]
    values: list[Any] = [now]
    if customer is not None:
        where.append("customer = ?")
        values.append(customer)
    rows = db.execute(
        "SELECT customer, id, day, model, holds.cost, holds.tokens, expires_ms "  # noqa: S608
        f"FROM holds JOIN customers USING (c) WHERE {' AND '.join(where)} ORDER BY expires_ms, customer, id LIMIT ?",
        (*values, limit),
    )
    return [
        HoldRow(who, hold_id, day, model, cost, tokens, expires, state)
        for who, hold_id, day, model, cost, tokens, expires in rows
    ]


def refusals(
    db: sqlite3.Connection, customer: str | None, since_minute: int, until_minute: int, limit: int
) -> list[RefusalRow]:
    """Counts of refusals, newest first."""
    where = ["minute >= ?", "minute < ?"]
    values: list[Any] = [since_minute, until_minute]
    if customer is not None:
        where.append("customer = ?")
        values.append(customer)
    rows = db.execute(
        f"SELECT customer, reason, minute, count FROM refusals WHERE {' AND '.join(where)} "  # noqa: S608
        "ORDER BY minute DESC, customer, reason LIMIT ?",
        (*values, limit),
    )
    return [RefusalRow(*row) for row in rows]


def refusal_sums(db: sqlite3.Connection, customer: str | None, since_minute: int, until_minute: int) -> dict[str, int]:
    """Refusals by reason: of one customer by its minutes; of all by whole hours, and minutes at both ends."""
    if customer is not None:
        return dict(
            db.execute(
                "SELECT reason, sum(count) FROM refusals WHERE customer = ? AND minute >= ? AND minute < ? "
                "GROUP BY reason",
                (customer, since_minute, until_minute),
            )
        )
    first_hour, end_hour = -(-since_minute // 60), until_minute // 60
    if first_hour > end_hour:  # within one hour
        first_hour = end_hour = 0
        minutes = [(since_minute, until_minute)]
    else:
        minutes = [(since_minute, first_hour * 60), (end_hour * 60, until_minute)]
    found: Counter[str] = Counter(
        dict(
            db.execute(
                "SELECT reason, sum(count) FROM refusal_hours WHERE hour >= ? AND hour < ? GROUP BY reason",
                (first_hour, end_hour),
            )
        )
    )
    for bounds in minutes:
        found.update(
            dict(
                db.execute(
                    "SELECT reason, sum(count) FROM refusals WHERE minute >= ? AND minute < ? GROUP BY reason", bounds
                )
            )
        )
    return dict(found)


def audit(db: sqlite3.Connection, customer: str | None, before: int | None, limit: int) -> list[AuditRow]:
    """The audit, newest first."""
    where = ["seq < ?"]
    values: list[Any] = [before if before is not None else (1 << 63) - 1]
    if customer is not None:
        where.append("customer = ?")
        values.append(customer)
    rows = db.execute(
        f"SELECT at_ms, customer, action, actor, before, after, seq FROM audit WHERE {' AND '.join(where)} "  # noqa: S608
        "ORDER BY seq DESC LIMIT ?",
        (*values, limit),
    )
    return [
        AuditRow(at, who, action, actor, params_from(before_text), params_from(after_text), seq)
        for at, who, action, actor, before_text, after_text, seq in rows
    ]


def cursor(db: sqlite3.Connection, name: str) -> int | None:
    """How far a reader has read the log."""
    row = db.execute("SELECT seq FROM cursors WHERE name = ?", (name,)).fetchone()
    return None if row is None else int(row[0])


def fact(db: sqlite3.Connection, space: str, key: str) -> str | None:
    """One fact."""
    row = db.execute("SELECT value FROM facts WHERE space = ? AND key = ?", (space, key)).fetchone()
    return None if row is None else str(row[0])


def facts(db: sqlite3.Connection, space: str, after: str, limit: int) -> list[tuple[str, str]]:
    """A page of facts, by key."""
    rows = db.execute(
        "SELECT key, value FROM facts WHERE space = ? AND key > ? ORDER BY key LIMIT ?", (space, after, max(limit, 0))
    )
    return rows.fetchall()
