"""Who used most within some days, without adding up what everybody used.

What a customer used within days is at most what it used in all time, which has an index. So customers are looked at
in its order, until the next one's sum of all time is less than what the last of those found used within the days.
Only who ever got money back may have used more within days than in all; these few are always looked at.
"""

from __future__ import annotations

import sqlite3
from heapq import nsmallest
from typing import Final

from respan_guard.backends.base import AMOUNTS, Amounts, UsageQuery, UsageRow
from respan_guard.backends.groups import amount_of
from respan_guard.backends.sqlite.rows import amounts_from

__all__ = ["INDEXED", "has_shortcut", "top_customers"]

INDEXED: Final = ("requests", "calls", "cost", "tokens")
_FEW = 20_000  # customers' days that are added up faster than customers are looked at one by one
_SUM = f"SELECT {', '.join(f'sum({name})' for name in AMOUNTS)} FROM rollups WHERE c = ? AND day >= ? AND day < ?"  # noqa: S608
_CREDITED = "SELECT c, customer, 0 FROM customers WHERE credited"


def has_shortcut(db: sqlite3.Connection, query: UsageQuery) -> bool:
    """Whether a query asks for the largest customers of days in which many were active."""
    if query.by != ("customer",) or query.top not in INDEXED or query.model is not None:
        return False
    if query.customer is not None or query.among is not None or query.least is not None:
        return False
    days = "SELECT coalesce(sum(customers), 0) FROM active WHERE day >= ? AND day < ?"
    return not query.distinct and int(db.execute(days, (query.first_day, query.end_day)).fetchone()[0]) > _FEW


def top_customers(db: sqlite3.Connection, query: UsageQuery) -> list[UsageRow]:
    """The largest customers of the days; see `Backend.usage`."""
    assert query.top is not None
    top, days = query.top, (query.first_day, query.end_day)
    found: dict[int, tuple[int, str, Amounts]] = {}
    least = 0

    def look(c: int, customer: str) -> None:
        row = db.execute(_SUM, (c, *days)).fetchone()
        if row[0] is not None:
            amounts = amounts_from(row)
            found[c] = (-amount_of(amounts, top), customer, amounts)

    for c, customer, _ in db.execute(_CREDITED):
        look(c, customer)
    ordered = f"SELECT c, customer, {top} FROM customers WHERE NOT credited ORDER BY {top} DESC"  # noqa: S608  # checked
    for number, (c, customer, total) in enumerate(db.execute(ordered), start=1):
        if len(found) >= query.limit and total < least:
            break
        look(c, customer)
        if number % query.limit == 0 or number % 64 == 0:
            kept = nsmallest(query.limit, found.items(), key=lambda item: item[1][:2])
            found = dict(kept)
            least = -kept[-1][1][0] if len(kept) == query.limit else 0
    best = nsmallest(query.limit, found.values(), key=lambda item: item[:2])
    return [UsageRow(amounts, customer=customer) for _, customer, amounts in best]
