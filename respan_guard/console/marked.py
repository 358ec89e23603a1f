"""What all customers together are shown of a range: its costs with markup, in all, by day and by hour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from respan_guard.backends.base import HOUR_MS, UsageQuery
from respan_guard.console.ranges import Range
from respan_guard.markups import Markups, Reads, all_markups, marked_sums

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["Marked", "marked_costs"]


@dataclass(frozen=True, slots=True)
class Marked:
    """Costs with markup as they were counted; a day or hour that the range did not have then is not there.

    Attributes:
        total: Of the range.
        by_day: Of each day.
        by_hour: Of each hour, where the range is of hours.
    """

    total: Decimal
    by_day: Mapping[int, Decimal]
    by_hour: Mapping[int, Decimal]


async def marked_costs(guard: Guard, span: Range, reads: Reads) -> Marked | None:
    """Count them all; None if nobody has a markup."""
    markups = await all_markups(guard, reads)
    if not markups:
        return None
    days = UsageQuery(by=("day",), first_day=span.first_day, end_day=span.end_day)
    total, by_day = await _counted(guard, reads, days, range(span.first_day, span.end_day), markups)
    by_hour: Mapping[int, Decimal] = {}
    if span.hourly:
        places = range(span.since_ms // HOUR_MS, span.until_ms // HOUR_MS)
        hours = UsageQuery(by=("hour",), first_hour=places.start, end_hour=places.stop)
        total, by_hour = await _counted(guard, reads, hours, places, markups)
    return Marked(total, by_day, by_hour)


async def _counted(
    guard: Guard, reads: Reads, query: UsageQuery, places: range, markups: Markups
) -> tuple[Decimal, Mapping[int, Decimal]]:
    """The costs of all, and of each day or hour."""
    sums = await marked_sums(guard, reads, query, markups)
    rows = await reads.call(lambda backend: backend.usage(query), 60.0)
    paid = {(row.hour if row.day is None else row.day) or 0: row.amounts.cost for row in rows}
    return sums.cost(sum(paid.values())), {place: sums.cost(paid.get(place, 0), when=place) for place in places}
