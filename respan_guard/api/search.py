"""Looking through records for what no index tells, in bounded steps.

A list that no index answers is read off the log, window by window. What is looked at in one request is
bounded; who asks for more is told, and gets what was found so far with a `next` that goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from respan_guard.api.log import FAILED
from respan_guard.backends.base import RecordQuery, StoredEntry
from respan_guard.errors import InvalidInput
from respan_guard.recorder import record_from_entry
from respan_guard.usage import UsageRecord

if TYPE_CHECKING:
    from respan_guard.backends.base import Backend
    from respan_guard.guard import Guard

__all__ = ["MAX_PLACES", "MAX_RECORDS", "Found", "search", "too_much"]

MAX_RECORDS: Final = 10_000
"""How many records one request looks at itself."""
MAX_PLACES: Final = 200_000
"""How many it lets storage look at, where that can tell which are wanted."""

_PAGE = 500
_WINDOW = 20_000


@dataclass(slots=True)
class Found:
    """What a search came to.

    Attributes:
        place: Where it stopped; the next one goes on from there.
        complete: It came to the end: there is no more.
    """

    records: list[UsageRecord]
    place: int | None = None
    complete: bool = False


async def search(
    guard: Guard, query: RecordQuery, wanted: Callable[[UsageRecord], bool], limit: int | None = None
) -> Found:
    """Records that a query and `wanted` both let through, in the query's order from its `after` on.

    Args:
        guard: Whose records.
        query: What storage can filter by; its `limit` and `stop` have no effect.
        wanted: Looks at everything, also at what the query says.
        limit: How many to find at most; None for all, up to the bounds.
    """
    look = _Search(guard, query, wanted, limit)
    if query.customer is not None or query.trace_id is not None:
        await look.by_index()
    else:
        await look.by_windows()
    return look.found


def too_much(or_else: str = "") -> InvalidInput:
    """The answer to a question that would take more work than one request may make; `or_else` is another way out."""
    return InvalidInput(
        f"this needs a look at more than {MAX_RECORDS:,} records, which one request may not take; narrow it by"
        f" customer_identifier, trace_unique_id, start_time or end_time{or_else}",
        field="filters",
    )


class _Search:
    def __init__(
        self, guard: Guard, query: RecordQuery, wanted: Callable[[UsageRecord], bool], limit: int | None
    ) -> None:
        self.found = Found([], query.after)
        self._guard = guard
        self._query = query
        self._wanted = wanted
        self._limit = limit
        self._looked = 0

    async def by_index(self) -> None:
        """The records of one customer or trace, which are found without a look at the others."""
        query = self._query
        base = RecordQuery(
            customer=query.customer, trace_id=query.trace_id, since_ms=query.since_ms, descending=query.descending
        )
        while self._looked < MAX_RECORDS:
            page = await self._entries(replace(base, after=self.found.place, limit=_PAGE))
            if self._take(page):
                return
            if len(page) < _PAGE:
                self.found.complete = True
                return

    async def by_windows(self) -> None:
        """The records of a stretch of the log that storage lets through."""
        query, down = self._query, self._query.descending
        ends = await self._ends(query.since_ms)
        if ends is None:
            self.found.complete = True
            return
        first, last = ends
        at = query.after
        if at is None or (not down and at < first - 1):
            at = last + 1 if down else first - 1
        places = 0
        while places < MAX_PLACES and self._looked < MAX_RECORDS:
            if at <= first if down else at >= last:
                self.found.complete = True
                return
            stop = max(at - _WINDOW, first) if down else min(at + _WINDOW, last)
            page = await self._entries(replace(query, after=at, stop=stop, limit=_PAGE))
            if self._take(page):
                return
            reached = page[-1].seq if len(page) == _PAGE else stop
            places += abs(reached - at)
            self.found.place = at = reached

    async def _ends(self, since_ms: int | None) -> tuple[int, int] | None:
        first = await self._entries(RecordQuery(since_ms=since_ms, limit=1))
        last = await self._entries(RecordQuery(descending=True, limit=1))
        return (first[0].seq, last[0].seq) if first and last else None

    def _take(self, page: list[StoredEntry]) -> bool:
        """Keep what is wanted; True once there is enough."""
        for stored in page:
            self._looked += 1
            self.found.place = stored.seq
            record = record_from_entry(stored)
            if self._wanted(record):
                self.found.records.append(record)
                if self._limit is not None and len(self.found.records) >= self._limit:
                    return True
        return False

    async def _entries(self, query: RecordQuery) -> list[StoredEntry]:
        both = FAILED if query.status == FAILED[0] else (query.status,)
        queries = [replace(query, status=status) for status in both]

        async def read(backend: Backend) -> list[StoredEntry]:
            return [stored for one in queries for stored in await backend.entries(one)]

        found = await self._guard.lane().call(read)
        return sorted(found, key=lambda stored: stored.seq, reverse=query.descending)[: query.limit]
