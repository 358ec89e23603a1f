"""`/api/request-logs/`: the records there are, as lists and one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from pydantic import Field
from starlette.responses import Response

from respan_guard.api import schemas
from respan_guard.api.fields import Identifier
from respan_guard.api.intake import LogBatch, bulk, create
from respan_guard.api.limits import limit_info
from respan_guard.api.log import Log
from respan_guard.api.operation import Call, Operation
from respan_guard.api.pages import MAX_PAGE_SIZE, Page, Slice, as_filters, checked, sorted_slice
from respan_guard.api.records import (
    LOG_ALIASES,
    FilteredBy,
    LogRange,
    instant_ms,
    named,
    read_log_filters,
    records_wanted,
    with_condition,
    within,
)
from respan_guard.api.rows import LOG_KINDS, log_field, log_row, read_unique_id, size_of
from respan_guard.api.search import search, too_much
from respan_guard.api.wire import JSON
from respan_guard.backends.base import RecordQuery
from respan_guard.errors import CustomerUnknown, InvalidInput
from respan_guard.markups import markups_of
from respan_guard.usage import UsageRecord

__all__ = ["OPERATIONS"]


class LogPage(LogRange):
    """Which page of which records."""

    page: int = Field(1, ge=1, le=1_000_000)
    page_size: int = Field(100, ge=1, le=MAX_PAGE_SIZE)
    cursor: Identifier = Field(None, description="From `next`: where the page begins.")
    sort_by: Identifier = Field(
        None, description="`-id` (the default: newest first, as logged), `id`, or any field with or without `-`."
    )
    log_type: Identifier = None
    include_fields: Identifier = Field(None, description="Comma-separated names; all if absent.")
    filters: Identifier = Field(None, description="In a GET: the filters, as JSON.")


async def list_logs(call: Call) -> Response:
    """A page of records."""
    query: LogPage = call.query
    given = as_filters(call.body, query.filters)
    if query.log_type is not None:
        given = with_condition(given, "log_type", query.log_type)
    filters = read_log_filters(query, given)
    page = call.pages.asked(call.request, query, filters.shown())
    descending, sort = _sort(query.sort_by)
    base = replace(records_wanted(query, filters), descending=descending)
    wanted = within(base, filters)
    one = None if (name := named(filters)) is None else await call.guard.bookings.find(*name)
    if one is not None or filters.only("unique_id") is not None:
        found = Slice([one] if one is not None and page.number == 1 and wanted(one) else [], None, more=False)
    elif sort == "id":
        found = await _in_order(call, base, wanted, page)
    else:
        found = await _sorted(call, base, wanted, page, sort)
    rows = await _shown(call, found.rows)
    if query.include_fields is not None:
        names = {"id", *(name.strip() for name in query.include_fields.split(","))}
        rows = [{name: value for name, value in row.items() if name in names} for row in rows]
    return call.pages.answer(call.request, page, rows, found)


async def _shown(call: Call, records: list[UsageRecord]) -> list[dict[str, Any]]:
    """Records as lists show them, with their customers' markups: these cost the page."""
    markups = await markups_of(call.guard, {record.customer_identifier for record in records if record.cost})
    space = call.guard.settings.namespace
    return [log_row(record, space, markups.get(record.customer_identifier)) for record in records]


def _sort(text: str | None) -> tuple[bool, str]:
    name = (text or "-id").strip()
    field = name.removeprefix("-")
    field = LOG_ALIASES.get(field, field)
    if field == "unique_id":
        field = "id"
    if field not in ("id", "timestamp", "start_time", *LOG_KINDS):
        raise InvalidInput(
            f"sort_by must be id, timestamp or one of {', '.join(LOG_KINDS)}, with - for descending", field="sort_by"
        )
    return name.startswith("-"), field


async def _in_order(
    call: Call, base: RecordQuery, wanted: Callable[[UsageRecord], bool], page: Page
) -> Slice[UsageRecord]:
    """A page in order of the log: costs the page, and what the filters pass over."""
    start = checked(page.start, int)
    base = replace(base, after=start[0] if start else None)
    if page.skip:
        passed = await search(call.guard, base, wanted, page.skip)
        if len(passed.records) < page.skip and not passed.complete:
            raise InvalidInput("page is too far; go on from `next` of the page before", field="page")
        if passed.complete:
            return Slice([], None, more=False)
        base = replace(base, after=passed.place)
    found = await search(call.guard, base, wanted, page.size)
    if not found.complete and not found.records:
        raise too_much()
    end = None if found.place is None or not found.records else [found.place]
    return Slice(found.records, end, more=not found.complete)


async def _sorted(
    call: Call, base: RecordQuery, wanted: Callable[[UsageRecord], bool], page: Page, sort: str
) -> Slice[UsageRecord]:
    """A page in order of a field that has no index: reads all that the filters let through, up to the bound."""
    found = await search(call.guard, replace(base, descending=False), wanted)
    if not found.complete:
        raise too_much()

    def key(record: UsageRecord) -> tuple[Any, str]:
        if sort in ("timestamp", "start_time"):
            latency = (size_of(record, "latency_ms") or 0) if sort == "start_time" else 0
            value: Any = instant_ms(record.time) - latency
        else:
            value = log_field(record, sort)
        return value, str(log_field(record, "unique_id"))

    return sorted_slice(found.records, key, page, descending=base.descending)


async def retrieve(call: Call) -> Response:
    """One record, with where its customer's limits stand now."""
    named = read_unique_id(call.path("unique_id"))
    record = None if named is None else await call.guard.bookings.find(*named)
    if record is None:
        raise CustomerUnknown("there is no such log; its id is the `unique_id` that lists show")
    (row,) = await _shown(call, [record])
    row |= {"customer_name": None, "customer_email": None, "limit_info": None}
    if record.customer_identifier:
        customer = await call.guard.get_customer(record.customer_identifier)
        if customer is not None:
            row |= {"customer_name": customer.name, "customer_email": customer.email}
        row["limit_info"] = limit_info(await call.guard.status(record.customer_identifier))
    return JSON(row)


_TAG = "request logs"
_LOGGED = {201: schemas.CreatedLog, 202: schemas.CreatedLog}
_LISTED = {200: schemas.LogPage}

OPERATIONS: Final = (
    Operation("createRequestLog", "POST", "/api/request-logs/", create, "Log one call.", _TAG, _LOGGED, writes=True,
              takes=Log, errors=(400, 409, 413, 415)),
    Operation("createRequestLogLegacy", "POST", "/api/request-logs/create/", create, "The same, under its old name.",
              _TAG, _LOGGED, writes=True, takes=Log, errors=(400, 409, 413, 415)),
    Operation("bulkCreateRequestLogs", "POST", "/api/request-logs/bulk/", bulk, "Log up to 500 calls.", _TAG,
              {201: schemas.BulkResult, 202: schemas.BulkResult, 400: schemas.BulkRefusal}, writes=True, takes=LogBatch,
              errors=(400, 413, 415)),
    Operation("listRequestLogs", "POST", "/api/request-logs/list/", list_logs, "List calls.", _TAG, _LISTED,
              query=LogPage, takes=FilteredBy, optional=True, errors=(400, 413, 415)),
    Operation("listRequestLogsByGet", "GET", "/api/request-logs/list/", list_logs, "List calls.", _TAG, _LISTED,
              query=LogPage),
)  # fmt: skip
DETAIL: Final = Operation(
    "retrieveRequestLog", "GET", "/api/request-logs/{unique_id:path}/", retrieve, "One call.", _TAG,
    {200: schemas.LogDetail}, errors=(400, 404),
)  # fmt: skip
"""Its path takes in all others below it, so it comes last."""
