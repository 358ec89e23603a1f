"""Sums of request logs: over all of them, and by what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final

from pydantic import Field
from starlette.responses import Response

from respan_guard.api import sum_schemas as schemas
from respan_guard.api.fields import Identifier
from respan_guard.api.filters import Filters
from respan_guard.api.metrics import MARKED_UP, METRICS, TOPPED, Sums, in_rollups, metric, rollups, sum_records, summed
from respan_guard.api.operation import Call, Operation
from respan_guard.api.pages import MAX_PAGE_SIZE, as_filters, sorted_slice
from respan_guard.api.ranges import whole_days
from respan_guard.api.records import FilteredBy, LogRange, read_log_filters, records_wanted, within
from respan_guard.api.rows import log_field
from respan_guard.api.wire import JSON
from respan_guard.errors import InvalidInput
from respan_guard.markups import markups_of, with_markup
from respan_guard.money import from_nano
from respan_guard.usage import UsageRecord

__all__ = ["OPERATIONS"]

MAX_GROUPS: Final = 10_000

# What to group by, and the field that names a group.
_GROUPS: Mapping[str, str] = {
    "model": "model",
    "customer_identifier": "customer_identifier",
    "provider_id": "provider_id",
    "custom_identifier": "custom_identifier",
    "prompt_id": "prompt_id",
    "trace": "trace_unique_id",
    "thread": "thread_identifier",
}
_ROLLED_UP = {"model": "model", "customer_identifier": "customer"}


class GroupQuery(LogRange):
    """Which groups of which records."""

    group_by: Identifier = Field(None, description=f"One of {', '.join(_GROUPS)}; model if absent.")
    sort_by: Identifier = Field(None, description="A metric, with `-` for descending; `-total_cost` if absent.")
    page: int = Field(1, ge=1, le=MAX_GROUPS)
    page_size: int = Field(100, ge=1, le=MAX_PAGE_SIZE)
    cursor: Identifier = None


async def summary(call: Call) -> Response:
    """Sums over all records that a range and filters let through."""
    query: LogRange = call.query
    filters = read_log_filters(query, as_filters(call.body))
    days = whole_days(query.start_time, query.end_time, call.guard)
    if days is not None and in_rollups(filters):
        rows = await summed(call.guard, filters, days, by=())
        sums = rows[0][1] if rows else Sums()
    else:
        found = await _summed(call, query, filters, lambda record: True)
        sums = found.get(True, Sums())
    shown = {name: metric(sums, name) for name in ("number_of_requests", "total_cost", "total_tokens",
                                                   "total_prompt_tokens", "total_completion_tokens")}  # fmt: skip
    averages = {"avg_latency": "average_latency", "avg_tps": "average_tps", "avg_ttft": "average_ttft"}
    shown |= {name: metric(sums, of) or Decimal(0) for name, of in averages.items()}
    return JSON({**shown, MARKED_UP: sums.marked_up, "unpriced_requests": sums.amounts.unpriced, "scores": {}})


async def groups(call: Call) -> Response:
    """Sums by what records have in common."""
    query: GroupQuery = call.query
    given = as_filters(call.body)
    filters = read_log_filters(query, given)
    name = query.group_by or "model"
    if name not in _GROUPS:
        raise InvalidInput(f"group_by must be one of {', '.join(_GROUPS)}, got {name[:80]!r}", field="group_by")
    sort, descending = _sort(query.sort_by)
    days = whole_days(query.start_time, query.end_time, call.guard)
    if name in _ROLLED_UP and days is not None and in_rollups(filters):
        sums = await _rolled_up(call, filters, days, _ROLLED_UP[name], sort, descending=descending)
    else:
        sums = await _summed(call, query, filters, lambda record: log_field(record, _GROUPS[name]) or None)
    page = call.pages.asked(call.request, query, filters.shown())
    part = sorted_slice(
        list(sums.items()),
        lambda item: (metric(item[1], sort), str(item[0])),
        page,
        descending=descending,
        names_descending=False,
    )
    if name == "customer_identifier":
        markups = await markups_of(call.guard, {group for group, _ in part.rows})  # the page's, not all groups'
        for group, found in part.rows:
            found.marked_up = with_markup(from_nano(found.amounts.cost), markups.get(group))
    rows = [_group(_GROUPS[name], group, found) for group, found in part.rows]
    return call.pages.answer(call.request, page, rows, part, current_filters=filters.shown(), filters_data={})


def _sort(text: str | None) -> tuple[str, bool]:
    name = (text or "-total_cost").strip()
    field = {"span_count": "number_of_requests"}.get(name.removeprefix("-"), name.removeprefix("-"))
    if field not in METRICS:
        raise InvalidInput(f"sort_by must be one of {', '.join(METRICS)}, with - for descending", field="sort_by")
    return field, name.startswith("-")


async def _rolled_up(
    call: Call, filters: Filters[UsageRecord], days: tuple[int, int], by: str, sort: str, *, descending: bool
) -> dict[Any, Sums]:
    top = TOPPED.get(sort) if descending else None
    asked: dict[str, Any] = {"by": (by,), "top": top, "limit": MAX_GROUPS + 1}
    if by == "customer":
        rows = [(row, Sums(row.amounts, None)) for row in await rollups(call.guard, filters, days, **asked)]
    else:
        rows = await summed(call.guard, filters, days, **asked)
    if len(rows) > MAX_GROUPS and top is None:
        raise InvalidInput(
            f"there are more than {MAX_GROUPS:,} groups, which can only be had by -{', -'.join(TOPPED)}",
            field="sort_by",
        )
    return {getattr(row, by): sums for row, sums in rows[:MAX_GROUPS] if getattr(row, by)}


async def _summed(
    call: Call, query: LogRange, filters: Filters[UsageRecord], by: Callable[[UsageRecord], Any]
) -> dict[Any, Sums]:
    base = records_wanted(query, filters)
    return await sum_records(call.guard, base, within(base, filters), by)


def _group(field: str, group: Any, sums: Sums) -> dict[str, Any]:
    found: dict[str, Any] = {field: group, "span_count": sums.amounts.calls, "unpriced_requests": sums.amounts.unpriced}
    return found | {name: metric(sums, name) for name in (*METRICS, MARKED_UP)}


_TAG = "request logs"
OPERATIONS: Final = (
    Operation("summarizeRequestLogs", "POST", "/api/request-logs/summary/", summary, "Sums over calls.", _TAG,
              {200: schemas.Summary}, query=LogRange, takes=FilteredBy, optional=True, errors=(400, 413, 415)),
    Operation("groupRequestLogs", "POST", "/api/request-logs/groups/", groups, "Sums by what calls share.", _TAG,
              {200: schemas.GroupPage}, query=GroupQuery, takes=FilteredBy, optional=True, errors=(400, 413, 415)),
    Operation("groupRequestLogsByGet", "GET", "/api/request-logs/groups/", groups, "Sums by what calls share.", _TAG,
              {200: schemas.GroupPage}, query=GroupQuery),
)  # fmt: skip
