"""Pages and sums for people, put together from the parts of a store."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable
from typing import Any

from respan_guard.backends.base import (
    CustomerQuery,
    CustomerRow,
    HoldRow,
    RecordQuery,
    StoredEntry,
)
from respan_guard.backends.redis.rows import customer_from, entry_from, hold_from
from respan_guard.backends.redis.shelf import Shelf
from respan_guard.backends.rows import names_of
from respan_guard.errors import InvalidInput

__all__ = ["booked_on", "count_customers", "customers", "entries", "entry", "get", "holds", "in_part", "number"]

_SORTS = ("customer", "name", "first_seen", "last_seen", "requests", "calls", "cost", "tokens")
_MANY = 200  # customers that one script looks at
_PAGE = 500  # rows that one script brings
_PATIENCE = 200  # times that a page waits for customers to be sorted in


async def get(shelf: Shelf, customer: str) -> CustomerRow | None:
    """One customer."""
    (row,) = await shelf.run("rows", shelf.parts.of(customer), customer)
    return None if row is None else customer_from(row)


async def number(shelf: Shelf, customer: str) -> tuple[int, list[int]]:
    """The part that a customer is in, and its number there, if it is known."""
    part = shelf.parts.of(customer)
    (row,) = await shelf.run("rows", part, customer)
    return part, [] if row is None else [row[7]]


# -- customers -------------------------------------------------------------------------------------


def _sort_value(row: CustomerRow, sort: str) -> str | int:
    if sort == "customer":
        return row.customer
    if sort == "name":
        return str((row.params or {}).get("name") or "")
    if sort == "first_seen":
        return row.first_seen_ms
    if sort == "last_seen":
        return row.last_seen_ms
    if sort == "tokens":
        return row.totals.input_tokens + row.totals.output_tokens
    value: int = getattr(row.totals, sort)
    return value


async def customers(shelf: Shelf, query: CustomerQuery) -> list[CustomerRow]:
    """A page of customers, read off the sorted set of its key. A search looks at all of them, 500 at a time."""
    if query.sort not in _SORTS:
        raise InvalidInput(f"sort must be one of {', '.join(_SORTS)}; got {query.sort!r}", field="sort")
    pages = await asyncio.gather(*[_customers_of(shelf, part, query) for part in range(shelf.parts.count)])
    if len(pages) == 1:
        return pages[0]
    rows = (row for page in pages for row in page)
    pick = heapq.nlargest if query.descending else heapq.nsmallest
    return pick(query.limit, rows, key=lambda row: (_sort_value(row, query.sort), row.customer))


async def _customers_of(shelf: Shelf, part: int, query: CustomerQuery) -> list[CustomerRow]:
    wanted = query.search.casefold()
    if query.blocked or query.among is not None:  # so few that they are not worth an order of their own
        return await _of_few(shelf, part, query, wanted)
    found: list[CustomerRow] = []
    after = query.after
    length = _PAGE if wanted or query.blocked is not None or query.seen_since_ms is not None else query.limit
    while len(found) < query.limit:
        page = await _customers_page(shelf, part, query, after, length)
        found += [row for row in page if _matches(row, query, wanted)]
        if len(page) < length:
            break
        after = (_sort_value(page[-1], query.sort), page[-1].customer)
    return found[: query.limit]


def _matches(row: CustomerRow, query: CustomerQuery, wanted: str) -> bool:
    params = row.params or {}
    if query.seen_since_ms is not None and row.last_seen_ms < query.seen_since_ms:
        return False
    if query.blocked is not None and bool(params.get("blocked")) != query.blocked:
        return False
    texts = (row.customer, params.get("name"), params.get("email"))
    return not wanted or any(wanted in str(text).casefold() for text in texts if text)


async def _of_few(shelf: Shelf, part: int, query: CustomerQuery, wanted: str) -> list[CustomerRow]:
    names = sorted(await shelf.members(part, "blocked")) if query.among is None else in_part(shelf, part, query.among)
    rows: list[CustomerRow] = []
    for start in range(0, len(names), _MANY):
        found = await shelf.run("rows", part, *names[start : start + _MANY])
        rows += [customer_from(row) for row in found if row is not None]

    def place(row: CustomerRow) -> Any:
        return (_sort_value(row, query.sort), row.customer)

    after: Any = query.after
    if after is not None:
        rows = [row for row in rows if (place(row) < after if query.descending else place(row) > after)]
    rows = [row for row in rows if _matches(row, query, wanted)]
    return sorted(rows, key=place, reverse=query.descending)[: query.limit]


def in_part(shelf: Shelf, part: int, among: tuple[str, ...]) -> list[str]:
    """Those of some customers who are in a part."""
    return [name for name in names_of(among) if shelf.parts.of(name) == part]


async def count_customers(shelf: Shelf, seen_since_ms: int | None, blocked: bool | None) -> int:
    """How many customers there are, counted on sorted sets."""
    given = ("" if seen_since_ms is None else seen_since_ms, "" if blocked is None else "1" if blocked else "0")
    total = 0
    for part in range(shelf.parts.count):
        for _ in range(_PATIENCE):
            waiting, count = await shelf.run("count", part, *given)
            if not waiting:
                break
        total += count
    return total


async def _customers_page(
    shelf: Shelf, part: int, query: CustomerQuery, after: tuple[str | int, str] | None, length: int
) -> list[CustomerRow]:
    score, member = "", ""
    if after is not None:
        value, customer = after
        score = "0" if query.sort in ("customer", "name") else str(value)
        member = f"{value}\0{customer}" if query.sort == "name" else customer
    arguments = (query.sort, "1" if query.descending else "0", score, member, length)
    rows: list[Any] = []
    for _ in range(_PATIENCE):
        waiting, rows = await shelf.run("customers", part, *arguments)
        if not waiting:
            break
    return [customer_from(row) for row in rows if row is not None]


# -- entries ---------------------------------------------------------------------------------------


async def entries(shelf: Shelf, query: RecordQuery) -> list[StoredEntry]:
    """Entries in order of the log. Other filters than the customer's and the time's look at each entry in turn."""
    if query.is_vain:
        return []
    parts = await asyncio.gather(*[_entries_of(shelf, part, query) for part in _parts_with(shelf, query.customer)])
    merged = heapq.merge(*[rows for _, rows in parts], key=lambda row: row.seq, reverse=query.descending)
    safe = min((horizon for horizon, _ in parts if horizon), default=None)
    return [row for row in merged if safe is None or row.seq < safe][: query.limit]


def _parts_with(shelf: Shelf, customer: str | None) -> Iterable[int]:
    return range(shelf.parts.count) if customer is None else (shelf.parts.of(customer),)


async def _entries_of(shelf: Shelf, part: int, query: RecordQuery) -> tuple[int, list[StoredEntry]]:
    """Entries of one part, and the place in the whole log from which on it may still get others."""
    parts, found, horizon = shelf.parts, list[StoredEntry](), 0
    after: int | str = ""
    if query.after is not None:
        after = parts.before(query.after, part) if query.descending else max(0, parts.behind(query.after, part))
        if query.descending and after <= 0:
            return 0, []
    since = "" if query.since_ms is None else str(query.since_ms)
    length = min(max(query.limit, 100), _PAGE)
    while len(found) < query.limit:
        given = (query.customer or "", "0" if query.customer is None else "1", after, "1" if query.descending else "0")
        open_, rows = await shelf.run("entries", part, *given, length, since, shelf.timed)
        horizon = horizon or (parts.outer(open_, part) if open_ else 0)
        for row in rows:
            stored = entry_from(row, parts.outer(row[0], part))
            if query.stop is not None and (stored.seq < query.stop if query.descending else stored.seq > query.stop):
                return horizon, found[: query.limit]
            if _wanted(stored, query):
                found.append(stored)
        if len(rows) < length:
            break
        if query.descending and query.since_ms is not None and int(rows[-1][6]) < query.since_ms:
            break  # none before it ended later
        after = rows[-1][0]
    return horizon, found[: query.limit]


async def entry(shelf: Shelf, customer: str, entry_id: str) -> StoredEntry | None:
    """One entry."""
    part = shelf.parts.of(customer)
    row = await shelf.run("entry", part, customer, entry_id)
    return None if row is None else entry_from(row, shelf.parts.outer(row[0], part))


async def booked_on(shelf: Shelf, customer: str, at_ms: int) -> str:
    """The customer, or the label that took its place then or later."""
    return str(await shelf.run("booked", shelf.parts.of(customer), customer, at_ms))


def _wanted(stored: StoredEntry, query: RecordQuery) -> bool:
    entry, told = stored.entry, stored.entry.usage
    return (
        query.model in (None, entry.model)
        and query.provider in (None, told.provider)
        and query.kind in (None, entry.kind)
        and query.source in (None, entry.source)
        and query.status in (None, told.status)
        and query.trace_id in (None, told.trace_id)
        and query.unpriced in (None, entry.cost is None)
        and (query.since_ms is None or entry.at_ms >= query.since_ms)
        and (query.until_ms is None or entry.at_ms < query.until_ms)
    )


# -- holds -----------------------------------------------------------------------------------------


async def holds(shelf: Shelf, customer: str | None, state: str, now: int, limit: int) -> list[HoldRow]:
    """Holds that are live, or that expired with something unspent. Looks at all customers that were admitted lately."""
    if state not in ("live", "expired"):
        raise InvalidInput(f"state must be live or expired, got {state!r}", field="state")
    found: list[HoldRow] = []
    for part in _parts_with(shelf, customer):
        if customer is None:
            numbers = sorted(map(int, await shelf.members(part, "open")))
        else:
            _, numbers = await number(shelf, customer)
        for start in range(0, len(numbers), _MANY):
            for name, rows in await shelf.run("holds", part, *numbers[start : start + _MANY]):
                made = (hold_from(name, row, now, state) for row in rows)
                found += [row for row in made if row is not None]
    found.sort(key=lambda row: (row.expires_ms, row.customer, row.id))
    return found[:limit]
