"""What the logs page shows, all pages of it, as files."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from respan_guard.backends.base import Backend
from respan_guard.console.log_search import search
from respan_guard.console.log_view import LogsView, Place
from respan_guard.console.logs import LogRow, found_rows
from respan_guard.console.ranges import Range
from respan_guard.console.users import csv_line
from respan_guard.money import from_nano

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["logs_csv", "logs_jsonl"]

_PAGE = 500
_COLUMNS = (
    "sequence", "id", "time_ms", "customer_identifier", "model", "provider", "input_tokens", "output_tokens",
    "cache_read_tokens", "cache_write_tokens", "reasoning_tokens", "cost_usd", "cost_with_markup_usd", "latency_ms",
    "ttft_ms", "status", "kind", "source", "trace_id", "span_id", "response_id", "admission_id", "late", "refused_by",
    "count",
)  # fmt: skip


def _facts(row: LogRow) -> dict[str, Any]:
    """A row by the names of its columns; what a record or a refusal does not have is None."""
    facts: dict[str, Any] = dict.fromkeys(_COLUMNS)
    facts |= {"time_ms": row.at_ms, "customer_identifier": row.customer}
    if row.refusal is not None:
        return facts | {"status": row.status, "kind": "refusal", "refused_by": row.refusal.reason,
                        "count": row.refusal.count}  # fmt: skip
    assert row.stored is not None
    entry, usage = row.stored.entry, row.stored.entry.usage
    cost = None if entry.cost is None else from_nano(entry.cost)
    marked = cost if row.marked is None else row.marked
    return facts | {
        "sequence": row.stored.seq, "id": entry.id, "model": entry.model, "provider": usage.provider,
        "input_tokens": entry.input_tokens, "output_tokens": entry.output_tokens,
        "cache_read_tokens": usage.cache_read_tokens, "cache_write_tokens": usage.cache_write_tokens,
        "reasoning_tokens": usage.reasoning_tokens, "cost_usd": None if cost is None else f"{cost:f}",
        "cost_with_markup_usd": None if marked is None else f"{marked:f}", "latency_ms": usage.latency_ms,
        "ttft_ms": usage.ttft_ms, "status": usage.status, "kind": entry.kind, "source": entry.source,
        "trace_id": usage.trace_id, "span_id": usage.span_id, "response_id": usage.response_id,
        "admission_id": entry.admission, "late": row.stored.late, "count": 1,
    }  # fmt: skip


async def _exported(guard: Guard, view: LogsView, span: Range) -> AsyncIterator[list[dict[str, Any]]]:
    """The rows of all pages, page by page, in their order."""
    place: Place | None = Place()
    while place is not None:
        at = replace(view, place=place)

        async def work(backend: Backend, at: LogsView = at) -> tuple[list[LogRow], Place | None]:
            found = await search(backend, at, span, _PAGE, whole=True)
            return await found_rows(guard, backend, found), found.older

        rows, place = await guard.lane().call(work, 60.0)
        yield [_facts(row) for row in rows]


async def logs_csv(guard: Guard, view: LogsView, span: Range) -> AsyncIterator[str]:
    """What the filters let through, newest first, as CSV."""
    head = csv_line(list(_COLUMNS))
    async for page in _exported(guard, view, span):
        yield head + "".join(csv_line(list(facts.values())) for facts in page)
        head = ""


async def logs_jsonl(guard: Guard, view: LogsView, span: Range) -> AsyncIterator[str]:
    """The same as one JSON object a line."""
    async for page in _exported(guard, view, span):
        yield "".join(json.dumps(facts, ensure_ascii=False) + "\n" for facts in page)
