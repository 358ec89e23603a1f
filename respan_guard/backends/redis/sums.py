"""Sums of rollups, put together from the parts of a store."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from respan_guard.backends.base import HOUR_MS, Amounts, RecordQuery, UsageQuery, UsageRow
from respan_guard.backends.cells import amounts_of
from respan_guard.backends.groups import grouped
from respan_guard.backends.redis.reads import entries, in_part, number
from respan_guard.backends.redis.rows import amounts_from
from respan_guard.backends.redis.shelf import Shelf
from respan_guard.backends.rows import names_of

__all__ = ["usage"]

_MANY = 200  # customers that one script looks at
_PAGE = 500  # entries that one script brings


async def usage(shelf: Shelf, query: UsageQuery) -> list[UsageRow]:
    """Sums of the rollups: of one customer, of each that was active on the days, or kept ones of all together."""
    query.check()
    active: Counter[int] = Counter()
    hourly = "hour" in query.by
    if hourly and query.among is not None:
        found = await _hours_of(shelf, set(query.among), query)
    elif hourly or (query.of_all and (query.by_day_alone or not query.distinct)):
        found = await _kept(shelf, query, active)
    else:
        found = await _sums(shelf, query)
    return grouped(query, found, active)


async def _kept(shelf: Shelf, query: UsageQuery, active: Counter[int]) -> list[tuple[str, str, int, Amounts]]:
    """The sums that are kept of all customers together, by day or hour; and how many were active on a day."""
    if "hour" in query.by:
        given = ("hours", "t:", query.first_hour, query.end_hour, "0")
    else:
        given = ("days", "g:", query.first_day, query.end_day, "1" if query.distinct else "0")
    found = []
    for times in await shelf.run_all("days", *given):
        for when, rows, customers in times:
            active[int(when)] += customers
            found += [("", model, int(when), amounts_from(sums)) for model, sums in rows]
    return found


async def _hours_of(shelf: Shelf, among: set[str], query: UsageQuery) -> list[tuple[str, str, int, Amounts]]:
    """What entries of some customers add to hours."""
    asked = RecordQuery(
        model=query.model, since_ms=query.first_hour * HOUR_MS, until_ms=query.end_hour * HOUR_MS, limit=_PAGE
    )
    # Of few, each one's own log is read; of many, that of all.
    logs = [replace(asked, customer=name) for name in names_of(tuple(among))] if len(among) <= _MANY else [asked]
    found = []
    for log in logs:
        while page := await entries(shelf, log):
            some = [stored.entry for stored in page if stored.entry.customer in among]
            found += [(entry.customer, entry.model, entry.at_ms // HOUR_MS, amounts_of(entry)) for entry in some]
            log = replace(log, after=page[-1].seq)  # the same log, from there on
    return found


async def _sums(shelf: Shelf, query: UsageQuery) -> list[tuple[str, str, int, Amounts]]:
    if query.customer is not None:
        if query.among is not None and query.customer not in query.among:
            return []
        part, numbers = await number(shelf, query.customer)
        return await _sums_of(shelf, part, numbers, query)
    found = []
    for part in range(shelf.parts.count):
        if query.among is None:
            numbers = await _active(shelf, part, query)
        else:
            numbers = await _numbers(shelf, part, in_part(shelf, part, query.among))
        found += await _sums_of(shelf, part, numbers, query)
    return found


async def _numbers(shelf: Shelf, part: int, names: list[str]) -> list[int]:
    """The numbers of customers of a part, of those that are known."""
    found: list[int] = []
    for start in range(0, len(names), _MANY):
        rows = await shelf.run("rows", part, *names[start : start + _MANY])
        found += [row[7] for row in rows if row is not None]
    return found


async def _active(shelf: Shelf, part: int, query: UsageQuery) -> list[int]:
    """The numbers of the customers that were active on the days."""
    days = await shelf.ask(part, "ZRANGEBYSCORE", "days", query.first_day, f"({query.end_day}")
    found: set[str] = set()
    for day in days:
        found.update(await shelf.members(part, f"d:{day}"))
    return sorted(map(int, found))


async def _sums_of(
    shelf: Shelf, part: int, numbers: list[int], query: UsageQuery
) -> list[tuple[str, str, int, Amounts]]:
    found = []
    for start in range(0, len(numbers), _MANY):
        some = numbers[start : start + _MANY]
        for customer, rows in await shelf.run("sums", part, query.first_day, query.end_day, *some):
            found += [(customer, model, day, amounts_from(sums)) for day, model, sums in rows]
    return found
