"""Who used most within some days, without adding up what everybody used.

What a customer used within days is at most what it used in all time, and there is a table in order of that. So
customers are looked at in that order, until the next one's sum of all time is less than what the last of those found
used within the days. Only who ever got money back may have used more within days than in all; these few are always
looked at. Where that comes to no end, as when all used about as much, everything is added up after all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from heapq import nsmallest
from typing import Any, TypeAlias

from respan_guard.backends.base import UsageQuery
from respan_guard.backends.postgres.queries import CREDITED, INDEXED, sum_of
from respan_guard.backends.postgres.rows import EVER

__all__ = ["Ask", "largest", "may_be_found"]

Ask: TypeAlias = Callable[[str, dict[str, Any]], Awaitable[list[Any]]]
_FEW = 5_000  # customers' days that are added up faster than customers are looked at
_SHARE = 16  # a look at a customer costs as much as adding up so many customers' days
_FIRST = 32  # customers that are looked at in one go; then four times as many
_ACTIVE = """SELECT coalesce(sum(customers), 0) FROM {schema}.totals
    WHERE unit = 'd' AND at >= %(first)s AND at < %(end)s"""


def may_be_found(query: UsageQuery) -> bool:
    """Whether a report asks for the largest customers, by something that has an index."""
    indexed = query.by == ("customer",) and query.top in INDEXED and query.limit > 0
    return indexed and query.customer is None and query.among is None and query.least is None and query.model is None


async def largest(query: UsageQuery, ask: Ask) -> list[int] | None:
    """The rows (`c`) of those whom the report shows; None if adding up all is the better way.

    Args:
        query: A report that `may_be_found`.
        ask: Sends a statement. All of them must see one state of the tables.
    """
    top = query.top
    assert top is not None
    days = {"first": min(query.first_day, EVER), "end": min(query.end_day, EVER)}
    active = int((await ask(_ACTIVE, days))[0][0])
    if active <= _FEW:
        return None
    left = active // _SHARE
    found: dict[int, tuple[int, str]] = {}

    async def look(customers: str, size: int, **place: Any) -> list[Any]:
        rows = await ask(_look(top, customers), {**days, **place, "size": size})
        found.update({c: (-int(used), customer) for c, customer, _, used in rows if used is not None})
        return rows

    if top == "cost":
        left -= len(await look(_CREDITED, left + 1))
    size, last = max(_FIRST, query.limit), (1 << 62, "")
    while size <= left:
        rows = await look(_next(top), size, total=last[0], customer=last[1])
        found = dict(nsmallest(query.limit, found.items(), key=lambda item: item[1]))
        if len(rows) < size:
            return list(found)
        last = (rows[-1][2], rows[-1][1])
        if len(found) == query.limit and last[0] < -max(found.values())[0]:
            return list(found)
        left, size = left - size, 4 * size
    return None


def _look(top: str, customers: str) -> str:
    """Customers, each with what it used within the days."""
    return (
        f"SELECT k.c, k.customer, k.total, (SELECT {sum_of(top)} FROM {{schema}}.rollups r"  # noqa: S608  # constants
        f" WHERE r.c = k.c AND r.day >= %(first)s AND r.day < %(end)s) FROM ({customers}) AS k"
        " ORDER BY k.total DESC, k.customer DESC"
    )


def _next(top: str) -> str:
    """The next customers by what they used in all time."""
    return (
        f"SELECT c, customer, {top} AS total FROM {{schema}}.ordered"  # noqa: S608  # constants
        f" WHERE ({top}, customer) < (%(total)s, %(customer)s)"
        f" ORDER BY {top} DESC, customer DESC LIMIT %(size)s"
    )


_CREDITED = (
    "SELECT c, customer, cost AS total FROM {schema}.customers"  # noqa: S608  # constants
    f" WHERE c IN ({CREDITED}) LIMIT %(size)s"
)
