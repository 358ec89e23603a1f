"""The logs page: every usage record and every refusal, newest first."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from respan_guard.backends.base import Amounts, Backend, RecordQuery, RefusalRow, StoredEntry, UsageQuery
from respan_guard.console.ranges import Range, range_from
from respan_guard.console.users import csv_line
from respan_guard.markups import markups_in, markups_of, with_markup
from respan_guard.money import from_nano

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["PILLS", "LogRow", "LogsView", "latest", "logs", "logs_csv", "logs_jsonl", "record", "view_from"]

PILLS = {
    "": "All", "ok": "OK", "rate": "Rate limited", "budget": "Over budget", "error": "Error", "unpriced": "Unpriced"
}  # fmt: skip
_HIDDEN_PILLS = ("refused",)
PAGE = 50
_WINDOW = 20_000  # places of the log that a search looks at in one go
_WINDOWS = 3
_EXPORT_PAGE = 500
_MAX_REFUSALS = 200
_BUDGETS = ("period_budget", "total_budget")
_LATE_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class LogsView:
    """What the URL asks for."""

    customer: str = ""
    status: str = ""
    model: str = ""
    provider: str = ""
    source: str = ""
    trace: str = ""
    range: str = "range=30d"
    before: int | None = None
    until: int | None = None
    live: bool = False

    @classmethod
    def from_query(cls, query: Mapping[str, str], span: Range) -> LogsView:
        """Read a URL; what makes no sense is left out."""

        def number(name: str) -> int | None:
            text = query.get(name, "")
            return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None

        status = query.get("status", "")
        return cls(
            customer=query.get("customer", "").strip(),
            status=status if status in PILLS or status in _HIDDEN_PILLS else "",
            model=query.get("model", "").strip(),
            provider=query.get("provider", "").strip(),
            source=query.get("source", "").strip(),
            trace=query.get("trace", "").strip(),
            range=span.query,
            before=number("before"),
            until=number("until"),
            live=query.get("live") == "1",
        )

    def link(self, **changes: Any) -> str:
        """The query of a link that asks for the same but for some changes, from the newest on."""
        view = replace(self, **{"before": None, "until": None, "live": False, **changes})
        pairs = {
            "customer": view.customer, "status": view.status, "model": view.model, "provider": view.provider,
            "source": view.source, "trace": view.trace, "live": "1" if view.live else "",
            "before": view.before or "", "until": view.until or "",
        }  # fmt: skip
        text = urlencode({name: value for name, value in pairs.items() if value})
        return f"{text}&{view.range}" if text else view.range

    @property
    def detailed(self) -> bool:
        """Whether records are filtered by what refusals and sums do not know."""
        return bool(self.provider or self.source or self.trace)

    @property
    def of_records(self) -> bool:
        """Whether records are shown."""
        return self.status not in ("rate", "budget", "refused")

    @property
    def of_refusals(self) -> bool:
        """Whether refusals are shown."""
        return self.status in ("", "rate", "budget", "refused") and not (self.detailed or self.model)

    def to_query(self, span: Range) -> RecordQuery:
        """What to ask the store for records."""
        return RecordQuery(
            customer=self.customer or None,
            model=self.model or None,
            provider=self.provider or None,
            source=self.source or None,
            trace_id=self.trace or None,
            status=self.status if self.status in ("ok", "error") else None,
            unpriced=True if self.status == "unpriced" else None,
            since_ms=span.since_ms,
            until_ms=span.until_ms if span.name == "custom" else None,
            after=self.before,
            descending=True,
        )

    def takes(self, row: RefusalRow) -> bool:
        """Whether a refusal is of the kind that is asked for."""
        if self.status == "budget":
            return row.reason in _BUDGETS
        return self.status != "rate" or row.reason not in (*_BUDGETS, "blocked")


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
            reason = self.refusal.reason
            return "budget" if reason in _BUDGETS else "blocked" if reason == "blocked" else "rate"
        assert self.stored is not None
        entry = self.stored.entry
        if entry.usage.status == "error":
            return "error"
        return "unpriced" if entry.cost is None else "ok"


async def logs(guard: Guard, view: LogsView, span: Range) -> dict[str, Any]:
    """What the page shows."""

    async def work(backend: Backend) -> dict[str, Any]:
        stored, further = await _records(backend, view, span) if view.of_records else ([], None)
        full = len(stored) > PAGE
        stored = stored[:PAGE]
        rows = await _rows(guard, backend, stored)
        until = view.until or max(span.until_ms, guard.now_ms() + 60_000)
        since = span.since_ms
        if full or further is not None:
            since = max(since, min((row.at_ms for row in rows), default=until))
        refused: list[RefusalRow] = []
        if view.of_refusals:
            first, end = since // 60_000, -(-until // 60_000)
            limit = _MAX_REFUSALS if view.of_records else PAGE + 1
            found = await backend.refusals(
                customer=view.customer or None, since_minute=first, until_minute=end, limit=limit
            )
            refused = [row for row in found if view.takes(row)]
        rows += [LogRow(row.minute * 60_000, row.customer, refusal=row) for row in refused]
        rows.sort(key=lambda row: -row.at_ms)
        older = ""
        if full:
            older = view.link(before=stored[-1].seq, until=since)
        elif further is not None:
            older = view.link(before=further, until=since)
        elif refused and not view.of_records and len(refused) > PAGE:
            older = view.link(until=refused[-1].minute * 60_000)
        return {
            "rows": rows,
            "older": older,
            "cut_short": further is not None and not full,
            "counts": await _counts(backend, view, span),
        }

    return await guard.lane().call(work, 30.0)


async def _records(backend: Backend, view: LogsView, span: Range) -> tuple[list[StoredEntry], int | None]:
    """A page of records, and where to go on if the search was cut short.

    What is rare is searched for in windows of the log, and in so many of them only; what has an index needs none.
    """
    query = replace(view.to_query(span), limit=PAGE + 1)
    if query.after is None and query.until_ms is not None:  # begin near the end of the range, not of the log
        beyond = await backend.entries(RecordQuery(since_ms=query.until_ms + _LATE_MS, limit=1))
        query = replace(query, after=beyond[0].seq if beyond else None)
    rare = bool(query.model or query.provider or query.source) and query.trace_id is None
    if not rare:
        return await backend.entries(query), None
    newest = await backend.entries(RecordQuery(descending=True, limit=1, after=query.after))
    found: list[StoredEntry] = []
    place = newest[0].seq + 1 if newest else 0
    for _ in range(_WINDOWS):
        if place <= 1:
            return found, None
        stop = max(1, place - _WINDOW)
        found += await backend.entries(replace(query, after=place, stop=stop, limit=PAGE + 1 - len(found)))
        if len(found) > PAGE:
            return found, None
        place = stop
        oldest = await backend.entries(RecordQuery(descending=True, limit=1, after=place))
        if not oldest or oldest[0].entry.at_ms < span.since_ms - _LATE_MS:
            return found, None
    return found, place


async def _counts(backend: Backend, view: LogsView, span: Range) -> dict[str, int]:
    """How many of each status, from sums. Empty where sums do not know the filters."""
    if view.detailed:
        return {}
    sums = Amounts()
    for row in await backend.usage(
        UsageQuery(first_day=span.first_day, end_day=span.end_day, customer=view.customer or None,
                   model=view.model or None, by=())
    ):  # fmt: skip
        sums.add(row.amounts)
    refused: dict[str, int] = {}
    if not view.model:
        refused = await backend.refusal_sums(
            customer=view.customer or None,
            since_minute=span.since_ms // 60_000,
            until_minute=-(-span.until_ms // 60_000),
        )
    budget = sum(refused.get(reason, 0) for reason in _BUDGETS)
    return {
        "": sums.calls + sum(refused.values()),
        "ok": sums.calls - sums.errors,
        "rate": sum(refused.values()) - budget - refused.get("blocked", 0),
        "budget": budget,
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


def _facts(stored: StoredEntry, markup: Decimal | None) -> dict[str, Any]:
    entry, usage = stored.entry, stored.entry.usage
    cost = None if entry.cost is None else from_nano(entry.cost)
    return {
        "sequence": stored.seq, "id": entry.id, "time_ms": entry.at_ms, "customer_identifier": entry.customer,
        "model": entry.model, "provider": usage.provider, "input_tokens": entry.input_tokens,
        "output_tokens": entry.output_tokens, "cache_read_tokens": usage.cache_read_tokens,
        "cache_write_tokens": usage.cache_write_tokens, "reasoning_tokens": usage.reasoning_tokens,
        "cost_usd": None if cost is None else f"{cost:f}",
        "cost_with_markup_usd": None if cost is None else f"{with_markup(cost, markup):f}",
        "latency_ms": usage.latency_ms,
        "ttft_ms": usage.ttft_ms, "status": usage.status, "kind": entry.kind, "source": entry.source,
        "trace_id": usage.trace_id, "span_id": usage.span_id, "response_id": usage.response_id,
        "admission_id": entry.admission, "late": stored.late,
    }  # fmt: skip


async def _exported(guard: Guard, view: LogsView, span: Range) -> AsyncIterator[dict[str, Any]]:
    query = replace(view.to_query(span), after=None, descending=False, limit=_EXPORT_PAGE)
    if not view.of_records:
        minutes = (span.since_ms // 60_000, -(-span.until_ms // 60_000))
        rows = await guard.lane().call(
            lambda backend: backend.refusals(
                customer=view.customer or None, since_minute=minutes[0], until_minute=minutes[1]
            ),
            60.0,
        )
        for row in filter(view.takes, rows):
            yield {
                "time_ms": row.minute * 60_000, "customer_identifier": row.customer, "refused_by": row.reason,
                "count": row.count,
            }  # fmt: skip
        return
    known: dict[str, Decimal | None] = {}
    while True:
        page = query
        stored = await guard.lane().call(lambda backend, page=page: backend.entries(page), 60.0)  # type: ignore[misc]
        unknown = {one.entry.customer for one in stored} - known.keys()
        known |= dict.fromkeys(unknown) | (await markups_of(guard, unknown) if unknown else {})
        for one in stored:
            yield _facts(one, known[one.entry.customer])
        if len(stored) < _EXPORT_PAGE:
            return
        query = replace(query, after=stored[-1].seq)


async def logs_csv(guard: Guard, view: LogsView, span: Range) -> AsyncIterator[str]:
    """What the filters let through, oldest first, as CSV."""
    head = True
    async for facts in _exported(guard, view, span):
        if head:
            yield csv_line(list(facts))
            head = False
        yield csv_line(list(facts.values()))
    if head:
        yield csv_line(["sequence"])


async def logs_jsonl(guard: Guard, view: LogsView, span: Range) -> AsyncIterator[str]:
    """The same as one JSON object a line."""
    async for facts in _exported(guard, view, span):
        yield json.dumps(facts, ensure_ascii=False) + "\n"


def view_from(query: Mapping[str, str], guard: Guard) -> tuple[LogsView, Range]:
    """The page that a URL asks for."""
    span = range_from(query, guard)
    return LogsView.from_query(query, span), span
