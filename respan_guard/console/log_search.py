"""The search behind the logs page: a page of records and refusals, and where the next one begins.

Pages show each record and each row of refusals once. Both are gone through in an order of their own, records by their
place in the log, refusals by minute, customer and reason, and a page takes what is newest of both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from respan_guard.backends.base import Backend, RecordQuery, RefusalRow, StoredEntry
from respan_guard.console.log_view import LogsView, Place, Refused
from respan_guard.console.ranges import Range

__all__ = ["Found", "search"]

_WINDOW = 20_000  # places of the log that a search for what is rare looks at in one go
_WINDOWS = 3
_REFUSALS = 1_000  # rows of refusals that a search for some kinds of them looks at in one go
_ENOUGH = 20_000  # rows of refusals after which it offers to go on
_LATE_MS = 86_400_000
_NO_RECORDS = (1, 1)  # a place before the first, and nothing late
_NO_REFUSALS = (-1, "", "")


@dataclass(frozen=True, slots=True)
class Found:
    """What a page shows.

    Attributes:
        records: By place in the log, last first.
        refusals: Newest first.
        older: Where the next page begins; None if this is the last.
        cut_short: Nothing is known yet of a next page: the search stopped, and goes on there.
    """

    records: list[StoredEntry]
    refusals: list[RefusalRow]
    older: Place | None
    cut_short: bool


async def search(backend: Backend, view: LogsView, span: Range, size: int, *, whole: bool = False) -> Found:
    """Find a page of up to `size` rows; with `whole`, however many records it takes to look at."""
    at = view.place
    records, split, further = (
        await _records(backend, view, span, size + 1, whole) if view.of_records else ([], None, None)
    )
    refusals, beyond = await _refusals(backend, view, span, size + 1) if view.of_refusals else ([], None)
    moments = _moments(records)
    i = j = 0
    while i + j < size and (i < len(records) or j < len(refusals)):
        if j == len(refusals) or (i < len(records) and moments[i] >= refusals[j].minute * 60_000):
            i += 1
        else:
            j += 1
    more = i < len(records) or j < len(refusals)
    before: int | None
    late: int | None
    refused: Refused | None
    before, late = further or _NO_RECORDS
    if i < len(records):
        before, late = at.before, at.late
        if i:
            before = records[i - 1].seq
            late = split if split is not None and before >= split else None
    refused = beyond or _NO_REFUSALS
    if j < len(refusals):
        refused = _key(refusals[j - 1]) if j else at.refused
    cut_short = not more and (further is not None or beyond is not None)
    older = Place(before, late, refused) if more or cut_short else None
    return Found(records[:i], refusals[:j], older, cut_short)


def _moments(records: list[StoredEntry]) -> list[int]:
    """When each was logged, as well as those before it in the log tell; when it ended may have been long ago."""
    found: list[int] = []
    latest = 0
    for one in reversed(records):
        latest = max(latest, one.entry.at_ms)
        found.append(latest)
    return found[::-1]


# -- records ---------------------------------------------------------------------------------------


async def _records(
    backend: Backend, view: LogsView, span: Range, size: int, whole: bool
) -> tuple[list[StoredEntry], int | None, tuple[int, int | None] | None]:
    """Records; the place from which on they are late; and where to go on (before, late) if the search was cut short.

    Of a span that is over, the part of the log is looked at that was written then, and after it what was logged later.
    What is rare is searched for in windows of the log, and in so many of them only; what has an index needs none.
    """
    query, at = view.to_query(span), view.place
    first = await backend.entries(RecordQuery(since_ms=span.since_ms, limit=1))
    if not first:
        return [], None, None
    split = at.late
    stretches: list[tuple[int | None, int, int | None]]  # before, down to, and whether that is late
    if split is not None:
        stretches = [(at.before, split, split)]
    else:
        split = await _split(backend, query)
        stretches = [(at.before if at.before is not None else split, first[0].seq, None)]
        if split is not None:
            stretches.append((None, split, split))
    found: list[StoredEntry] = []
    windows = _WINDOWS
    for before, stop, late in stretches:
        rare = not whole and _rare(query, late is not None)
        if not rare:
            found += await backend.entries(replace(query, after=before, stop=stop, limit=size - len(found)))
        while rare and len(found) < size:
            newest = await backend.entries(RecordQuery(after=before, stop=stop, descending=True, limit=1))
            if not newest:
                break
            if not windows:
                return found, split, (newest[0].seq + 1, late)
            windows -= 1
            low = max(stop, newest[0].seq + 1 - _WINDOW)
            found += await backend.entries(replace(query, after=before, stop=low, limit=size - len(found)))
            before = low
        if len(found) >= size:
            break
    return found, split, None


async def _split(backend: Backend, query: RecordQuery) -> int | None:
    """The place of the log from which on all was written after a span, and a day for those who come late."""
    if query.until_ms is None:
        return None
    beyond = await backend.entries(RecordQuery(since_ms=query.until_ms + _LATE_MS, limit=1))
    return beyond[0].seq if beyond else None


def _rare(query: RecordQuery, late: bool) -> bool:
    """Whether a page may have to pass over many records, and no index knows which ones."""
    if query.trace_id is not None:
        return False
    indexed = query.customer is not None or query.status == "error" or query.unpriced
    return bool(query.model or query.provider or query.source) or (late and not indexed)


# -- refusals --------------------------------------------------------------------------------------


async def _refusals(
    backend: Backend, view: LogsView, span: Range, size: int
) -> tuple[list[RefusalRow], Refused | None]:
    """Rows of refusals, and the last one that was looked at if the search was cut short."""
    since, until = span.since_ms // 60_000, -(-span.until_ms // 60_000)
    last = view.place.refused
    found: list[RefusalRow] = []
    limit = size if view.status in ("", "refused") else _REFUSALS
    looked_at = 0
    while last is None or last[0] >= since:
        rows = await backend.refusals(
            customer=view.customer or None,
            since_minute=since,
            until_minute=until if last is None else min(until, last[0] + 1),
            limit=limit,
        )
        new = [row for row in rows if last is None or _order(_key(row)) > _order(last)]
        found += [row for row in new if view.takes(row)]
        if len(found) >= size or len(rows) < limit:
            return found[:size], None
        if not new:  # a minute in which more were refused
            limit *= 4
            continue
        last = _key(new[-1])
        looked_at += len(new)
        if looked_at >= _ENOUGH:
            return found, last
    return found, None


def _key(row: RefusalRow) -> Refused:
    return row.minute, row.customer, row.reason


def _order(key: Refused) -> Refused:
    return -key[0], key[1], key[2]
