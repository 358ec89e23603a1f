"""The logs page: every usage record and every refusal, newest first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from respan_guard.backends.base import HOUR_MS, Amounts, Backend, RecordQuery, RefusalRow, StoredEntry, UsageQuery
from respan_guard.console.log_search import Found, search
from respan_guard.console.log_view import LogsView, status_of
from respan_guard.console.ranges import Range
from respan_guard.decision import BUDGETS
from respan_guard.markups import markups_in, with_markup
from respan_guard.money import from_nano

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["LogRow", "found_rows", "latest", "logs", "record"]

_PAGE = 50


@dataclass(frozen=True, slots=True)
class LogRow:
    """A record or, with `refusal`, what was refused within a minute."""

    at_ms: int
    customer: str
    stored: StoredEntry | None = None
    refusal: RefusalRow | None = None
    marked: Decimal | None = None
    """What the record's cost is with markup, where the customer has one."""

    @property
    def status(self) -> str:
        """One of the pills, or "blocked"."""
        if self.refusal is not None:
            return status_of(self.refusal)
        assert self.stored is not None
        entry = self.stored.entry
        if entry.usage.status in ("error", "failed"):  # a call, or work around calls
            return "error"
        return "unpriced" if entry.cost is None else "ok"


async def logs(guard: Guard, view: LogsView, span: Range) -> dict[str, Any]:
    """What the page shows."""

    async def work(backend: Backend) -> dict[str, Any]:
        found = await search(backend, view, span, _PAGE)
        return {
            "rows": await found_rows(guard, backend, found),
            "older": "" if found.older is None else view.link(place=found.older),
            "cut_short": found.cut_short,
            "counts": await _counts(backend, view, span),
        }

    return await guard.lane().call(work, 30.0)


async def found_rows(guard: Guard, backend: Backend, found: Found) -> list[LogRow]:
    """What a search found, newest first."""
    rows = await _rows(guard, backend, found.records)
    rows += [LogRow(row.minute * 60_000, row.customer, refusal=row) for row in found.refusals]
    return sorted(rows, key=lambda row: -row.at_ms)


async def _counts(backend: Backend, view: LogsView, span: Range) -> dict[str, int]:
    """How many of each status, from sums; without those that sums do not know."""
    if view.detailed:
        return {}
    refused: dict[str, int] = {}
    if not view.model:
        refused = await backend.refusal_sums(
            customer=view.customer or None,
            since_minute=span.since_ms // 60_000,
            until_minute=-(-span.until_ms // 60_000),
        )
    budget = sum(refused.get(reason, 0) for reason in BUDGETS)
    counts = {"rate": sum(refused.values()) - budget - refused.get("blocked", 0), "budget": budget}
    if span.hourly and view.customer:  # what single customers used is kept by day
        return counts
    if span.hourly:
        query = UsageQuery(first_hour=span.since_ms // HOUR_MS, end_hour=span.until_ms // HOUR_MS, by=("hour",))
    else:
        query = UsageQuery(first_day=span.first_day, end_day=span.end_day, customer=view.customer or None, by=())
    sums = Amounts()
    for row in await backend.usage(replace(query, model=view.model or None)):
        sums.add(row.amounts)
    return counts | {
        "": sums.calls + sum(refused.values()),
        "ok": sums.calls - sums.errors,
        "error": sums.errors,
        "unpriced": sums.unpriced,
    }


async def _rows(guard: Guard, backend: Backend, stored: list[StoredEntry]) -> list[LogRow]:
    """Records, with the markup of those customers who have one."""
    markups = await markups_in(guard, backend, {one.entry.customer for one in stored if one.entry.cost})
    return [
        LogRow(one.entry.at_ms, one.entry.customer, stored=one, marked=_marked(one, markups.get(one.entry.customer)))
        for one in stored
    ]


def _marked(stored: StoredEntry, markup: Decimal | None) -> Decimal | None:
    cost = stored.entry.cost
    return with_markup(from_nano(cost), markup) if cost and markup else None


async def latest(guard: Guard, backend: Backend, customer: str, limit: int) -> list[LogRow]:
    """A customer's newest records and refusals."""
    stored = await backend.entries(RecordQuery(customer=customer, descending=True, limit=limit))
    refused = await backend.refusals(customer=customer, limit=limit)
    rows = await _rows(guard, backend, stored)
    rows += [LogRow(row.minute * 60_000, customer, refusal=row) for row in refused]
    return sorted(rows, key=lambda row: -row.at_ms)[:limit]


async def record(guard: Guard, seq: int) -> LogRow | None:
    """The record at a place of the log."""
    query = RecordQuery(after=seq - 1, stop=seq, limit=1)

    async def work(backend: Backend) -> list[LogRow]:
        return await _rows(guard, backend, await backend.entries(query))

    found = await guard.lane().call(work)
    return found[0] if found else None
