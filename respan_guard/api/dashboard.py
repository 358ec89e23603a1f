"""`/api/dashboard/`: who was active, how many there are, what each cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final

from pydantic import Field
from starlette.responses import Response

from respan_guard.api import sum_schemas as schemas
from respan_guard.api.fields import Anything, Identifier
from respan_guard.api.filters import Filters
from respan_guard.api.metrics import (
    MARKED_UP,
    METRICS,
    TOPPED,
    Sums,
    grouped,
    in_rollups,
    metric,
    rollup_query,
    rollups,
)
from respan_guard.api.operation import Call, Operation
from respan_guard.api.pages import as_filters
from respan_guard.api.ranges import EVER, Span, TimeRange, span_of
from respan_guard.api.records import FilteredBy, LogRange, read_log_filters, records_wanted, within
from respan_guard.api.rows import log_field
from respan_guard.api.search import search, too_much
from respan_guard.api.wire import JSON
from respan_guard.backends.base import Amounts, UsageRow
from respan_guard.errors import InvalidInput
from respan_guard.markups import MarkedSums, marked_sums, markups_of, with_markup
from respan_guard.money import from_nano
from respan_guard.periods import load_zone, start_of_day
from respan_guard.usage import UsageRecord

__all__ = ["OPERATIONS"]

TOP: Final = 10
MAX_DAYS: Final = 4_000
OTHERS: Final = "Others"
NOBODY: Final = "(none)"

_FILLED_DAYS = 400
_METRICS = (*METRICS, MARKED_UP)
_DEFAULT_METRICS = ("number_of_requests", "total_cost", "total_tokens")
_DIMENSIONS: Mapping[str, str] = {
    name: name for name in ("model", "customer_identifier", "custom_identifier", "prompt_id", "provider_id")
}
_ROLLED_UP = {"model": "model", "customer_identifier": "customer"}
_TICKS = {"minute": timedelta(minutes=1), "hour": timedelta(hours=1)}


class BreakdownQuery(TimeRange):
    """What to break down by."""

    breakdown_by: Identifier = Field(None, description=f"One of {', '.join(_DIMENSIONS)}; model if absent.")
    scope: Identifier = Field(None, description='"span", the only one here.')


class BreakdownBody(FilteredBy):
    """Which metrics, of which records."""

    metrics_to_aggregate: Anything = Field(None, description=f"Any of {', '.join(_METRICS)}.")


# -- users -------------------------------------------------------------------------------------------


async def active_users(call: Call) -> Response:
    """How many users were active, and what they cost, bucket by bucket."""
    buckets, whole, count = await _activity(call, as_filters(call.body))
    activity = [
        {
            "date_group": at,
            "active_users": users,
            "total_cost": from_nano(sums.amounts.cost),
            "average_cost_per_user": _each(sums.amounts.cost, users),
            MARKED_UP: sums.marked_up,
        }
        for at, sums, users in buckets
    ]
    overall = {
        "active_users": count,
        "average_cost_per_user": _each(whole.amounts.cost, count),
        "total_user_cost": from_nano(whole.amounts.cost),
        "total_user_cost_with_markup": whole.marked_up,
    }
    return JSON({"activity": activity, "summary": overall})


async def total_users(call: Call) -> Response:
    """How many different users there were, bucket by bucket and in all."""
    buckets, _, count = await _activity(call, {}, costs=False)
    data = [{"date_group": at, "total_users": users} for at, _, users in buckets]
    return JSON({"data": data, "summary": {"total_users": count}})


def _each(cost: int, users: int) -> Decimal:
    return (from_nano(cost) / users).quantize(Decimal("0.000000001")) if users else Decimal(0)


async def _activity(
    call: Call, given: Mapping[str, Any], *, costs: bool = True
) -> tuple[list[tuple[datetime, Sums, int]], Sums, int]:
    """Buckets with their sums and number of users, and both for the whole; marked up where costs are shown."""
    query: TimeRange = call.query
    span = span_of(query, call.guard)
    days = span.days
    filters = _filters(query, given)
    if query.time_tick in (None, "day") and span.whole and in_rollups(filters):
        rows = await _by_day(call, filters, days, distinct=True)
        marked = await _marked(call, filters, days, by=("day",)) if costs else None
        all_days = await rollups(call.guard, filters, days, by=(), distinct=True)
        nobody = await _days_of_nobody(call, filters, days)
        buckets = []
        whole = Sums()
        for day, row in rows:
            sums = Sums(row.amounts, None if marked is None else marked.cost(row.amounts.cost, when=day))
            buckets.append((_day_start(call, day), sums, (row.customers or 0) - (day in nobody)))
            whole.add(sums)
        count = (all_days[0].customers or 0) if all_days else 0
        return buckets, whole, count - bool(nobody)
    records = await _records(call, span, filters)
    found = await grouped(call.guard, records, lambda record: _bucket(call, query, record))
    users: dict[datetime, set[str]] = {}
    for at in _all_days(call, query, span):
        found.setdefault(at, Sums())
        users[at] = set()
    for record in records:
        users.setdefault(_bucket(call, query, record), set()).update({record.customer_identifier} - {""})
    total = Sums()
    for one in found.values():
        total.add(one)
    everybody = set().union(*users.values()) if users else set()
    return [(at, found[at], len(users[at])) for at in sorted(found)], total, len(everybody)


async def _days_of_nobody(call: Call, filters: Filters[UsageRecord], days: tuple[int, int]) -> set[int]:
    """On which days there was usage of nobody's, which storage counts as one more customer."""
    if filters.only("customer_identifier") is not None:
        return set()
    return {row.day or 0 for row in await rollups(call.guard, filters, days, by=("day",), customer="", limit=MAX_DAYS)}


async def _marked(call: Call, filters: Filters[UsageRecord], days: tuple[int, int], by: tuple[str, ...]) -> MarkedSums:
    query = rollup_query(filters, days, by=by)
    return await marked_sums(call.guard, call.guard.lane(), query)


def _filters(query: TimeRange, given: Mapping[str, Any]) -> Filters[UsageRecord]:
    return read_log_filters(LogRange(environment=query.environment), dict(given))


def _day_start(call: Call, day: int) -> datetime:
    zone = load_zone(call.guard.settings.time_zone)
    return datetime.combine(date.fromordinal(day), time(), zone)


async def _by_day(
    call: Call, filters: Filters[UsageRecord], days: tuple[int, int], **more: Any
) -> list[tuple[int, UsageRow]]:
    """Days with their sums; those without any are filled in, unless they are very many."""
    found = await rollups(call.guard, filters, days, by=("day",), limit=MAX_DAYS + 1, **more)
    if len(found) > MAX_DAYS:
        raise InvalidInput(f"a range must have at most {MAX_DAYS:,} days with usage", field="start_time")
    rows = {row.day or 0: row for row in found}
    if days != EVER and days[1] - days[0] <= _FILLED_DAYS:
        for day in range(*days):
            rows.setdefault(day, UsageRow(Amounts(), day=day, customers=0))
    return sorted(rows.items())


def _all_days(call: Call, query: TimeRange, span: Span) -> list[datetime]:
    """The buckets to show whether there is anything in them or not."""
    first, after = span.days
    filled = query.time_tick in (None, "day") and after - first <= _FILLED_DAYS
    return [_day_start(call, day) for day in range(first, after)] if filled else []


async def _records(call: Call, span: Span, filters: Filters[UsageRecord]) -> list[UsageRecord]:
    zone = load_zone(call.guard.settings.time_zone)
    since, until = (None if day in EVER else start_of_day(day, zone) for day in span.days)
    since = since if span.since_ms is None else span.since_ms
    until = until if span.until_ms is None else span.until_ms
    base = replace(records_wanted(LogRange(), filters), since_ms=since, until_ms=until)
    found = await search(call.guard, base, within(base, filters))
    if not found.complete:
        raise too_much("" if span.whole else ", or let these be midnights: sums of whole days are kept")
    return found.records


def _bucket(call: Call, query: TimeRange, record: UsageRecord) -> datetime:
    tick = _TICKS.get(query.time_tick or "day")
    if tick is None:
        return _day_start(call, date.fromisoformat(record.day).toordinal())
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    return epoch + (record.time - epoch) // tick * tick


# -- breakdown ---------------------------------------------------------------------------------------


async def breakdown(call: Call) -> Response:
    """Metrics bucket by bucket, a column for each of the largest models, users, ...; the rest is "Others"."""
    query: BreakdownQuery = call.query
    if query.scope not in (None, "span"):
        raise InvalidInput('scope must be "span": calls are what is kept here', field="scope")
    dimension = query.breakdown_by or "model"
    if dimension not in _DIMENSIONS:
        raise InvalidInput(f"breakdown_by must be one of {', '.join(_DIMENSIONS)}", field="breakdown_by")
    names = _metrics(call.body)
    filters = _filters(query, as_filters(call.body))
    span = span_of(query, call.guard)
    if query.time_tick in (None, "day") and span.whole and dimension in _ROLLED_UP and in_rollups(filters):
        cells = await _rolled_up(call, filters, span.days, _ROLLED_UP[dimension], names)
    else:
        cells = await _from_records(call, query, filters, span, dimension)
    body = {
        name: [
            {**{column: metric(sums, name) for column, sums in columns.items()}, "date_group": at}
            for at, columns in cells.items()
        ]
        for name in names
    }
    return JSON(body)


def _metrics(body: Any) -> tuple[str, ...]:
    given = body.get("metrics_to_aggregate") if isinstance(body, dict) else None
    if given is None:
        return _DEFAULT_METRICS
    if not isinstance(given, list) or not given or any(name not in _METRICS for name in given):
        raise InvalidInput(
            f"metrics_to_aggregate must be a list of any of {', '.join(_METRICS)}", field="metrics_to_aggregate"
        )
    return tuple(dict.fromkeys(given))


async def _rolled_up(
    call: Call, filters: Filters[UsageRecord], days: tuple[int, int], by: str, names: tuple[str, ...]
) -> dict[datetime, dict[str, Sums]]:
    top = next((TOPPED[name] for name in names if name in TOPPED), "cost")
    largest = [getattr(row, by) for row in await rollups(call.guard, filters, days, by=(by,), top=top, limit=TOP)]
    cost = await _costs(call, filters, days, by, largest if MARKED_UP in names else None)
    whole = await _by_day(call, filters, days)
    left = {day: Sums(row.amounts, cost(row.amounts.cost, day, None)) for day, row in whole}
    cells: dict[int, dict[str, Sums]] = {day: {} for day in left}
    for value in largest:
        only = {"customer": filters.only("customer_identifier"), "model": filters.only("model"), by: value}
        condition = _narrowed(only)
        for row in await rollups(call.guard, condition, days, by=("day",), limit=MAX_DAYS):
            day = row.day or 0
            if day in left:
                sums = Sums(row.amounts, cost(row.amounts.cost, day, value))
                left[day] = left[day].minus(sums)
                _put(cells[day], value, sums)
    for day, rest in left.items():
        if rest.amounts != Amounts() or rest.marked_up:
            _put(cells[day], OTHERS, rest)
    return {_day_start(call, day): columns for day, columns in cells.items()}


async def _costs(
    call: Call, filters: Filters[UsageRecord], days: tuple[int, int], by: str, largest: list[str] | None
) -> Callable[[int, int, str | None], Decimal | None]:
    """What an amount of a day is with markup, of one of the largest or of all; without these, nothing."""
    if largest is None:
        return lambda nano, day, value: None
    of_customers = by == "customer"
    markups = await markups_of(call.guard, set(largest)) if of_customers else {}
    marked = await _marked(call, filters, days, by=("day",) if of_customers else ("day", "model"))

    def cost(nano: int, day: int, value: str | None) -> Decimal | None:
        if value is not None and of_customers:
            return with_markup(from_nano(nano), markups.get(value))
        return marked.cost(nano, model=value, when=day)

    return cost


def _narrowed(only: Mapping[str, str | None]) -> Filters[UsageRecord]:
    names = {"customer": "customer_identifier", "model": "model"}
    given = {names[name]: {"value": [value]} for name, value in only.items() if value is not None}
    return read_log_filters(LogRange(), given)


def _put(columns: dict[str, Sums], value: str | None, sums: Sums) -> None:
    name = NOBODY if not value else OTHERS if value == "date_group" else value
    columns.setdefault(name, Sums()).add(sums)


async def _from_records(
    call: Call, query: TimeRange, filters: Filters[UsageRecord], span: Span, dimension: str
) -> dict[datetime, dict[str, Sums]]:
    value: Callable[[UsageRecord], Any] = lambda record: log_field(record, dimension) or ""  # noqa: E731
    records = await _records(call, span, filters)
    found = await grouped(call.guard, records, lambda record: (_bucket(call, query, record), value(record)))
    totals: Counter[str] = Counter()
    for (_, name), sums in found.items():
        totals[name] += sums.amounts.cost
    largest = sorted(totals, key=lambda name: (-totals[name], name))[:TOP]
    cells: dict[datetime, dict[str, Sums]] = {at: {} for at in _all_days(call, query, span)}
    for (at, name), sums in found.items():
        _put(cells.setdefault(at, {}), name if name in largest else OTHERS, sums)
    return dict(sorted(cells.items()))


_TAG = "dashboard"
OPERATIONS: Final = (
    Operation("listActiveUsers", "POST", "/api/dashboard/users/", active_users, "Active users and their cost.", _TAG,
              {200: schemas.ActiveUsers}, query=TimeRange, takes=FilteredBy, optional=True, errors=(400, 413, 415)),
    Operation("getTotalUsers", "POST", "/api/dashboard/total-users/", total_users, "How many users there were.", _TAG,
              {200: schemas.TotalUsers}, query=TimeRange, errors=(400,)),
    Operation("listMetricsBreakdown", "POST", "/api/dashboard/time-series/breakdown/", breakdown,
              "Metrics by model, user, ...", _TAG, {200: schemas.Breakdown}, query=BreakdownQuery,
              takes=BreakdownBody, optional=True, errors=(400, 413, 415)),
)  # fmt: skip
