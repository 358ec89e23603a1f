"""`/api/dashboard/`: who was active, how many there are, what each cost."""

from __future__ import annotations

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
from respan_guard.api.metrics import METRICS, TOPPED, amounts_of, in_rollups, metric, minus, rollups
from respan_guard.api.operation import Call, Operation
from respan_guard.api.pages import as_filters
from respan_guard.api.ranges import EVER, TimeRange, days_of
from respan_guard.api.records import FilteredBy, LogRange, read_log_filters, records_wanted, within
from respan_guard.api.rows import log_field
from respan_guard.api.search import search, too_much
from respan_guard.api.wire import JSON
from respan_guard.backends.base import Amounts, UsageRow
from respan_guard.errors import InvalidInput
from respan_guard.money import from_nano
from respan_guard.periods import load_zone, start_of_day
from respan_guard.usage import UsageRecord

__all__ = ["OPERATIONS"]

TOP: Final = 10
MAX_DAYS: Final = 4_000
OTHERS: Final = "Others"
NOBODY: Final = "(none)"

_FILLED_DAYS = 400
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

    metrics_to_aggregate: Anything = Field(None, description=f"Any of {', '.join(METRICS)}.")


# -- users -------------------------------------------------------------------------------------------


async def active_users(call: Call) -> Response:
    """How many users were active, and what they cost, bucket by bucket."""
    buckets, whole, count = await _activity(call, as_filters(call.body))
    activity = [
        {
            "date_group": at,
            "active_users": users,
            "total_cost": from_nano(sums.cost),
            "average_cost_per_user": _each(sums.cost, users),
        }
        for at, sums, users in buckets
    ]
    overall = {
        "active_users": count,
        "average_cost_per_user": _each(whole.cost, count),
        "total_user_cost": from_nano(whole.cost),
    }
    return JSON({"activity": activity, "summary": overall})


async def total_users(call: Call) -> Response:
    """How many different users there were, bucket by bucket and in all."""
    buckets, _, count = await _activity(call, {})
    data = [{"date_group": at, "total_users": users} for at, _, users in buckets]
    return JSON({"data": data, "summary": {"total_users": count}})


def _each(cost: int, users: int) -> Decimal:
    return (from_nano(cost) / users).quantize(Decimal("0.000000001")) if users else Decimal(0)


async def _activity(call: Call, given: Mapping[str, Any]) -> tuple[list[tuple[datetime, Amounts, int]], Amounts, int]:
    """Buckets with their sums and number of users; and both for the whole."""
    query: TimeRange = call.query
    days = days_of(query, call.guard)
    filters = _filters(query, given)
    if query.time_tick in (None, "day") and in_rollups(filters):
        rows = await _by_day(call, filters, days, distinct=True)
        whole = await rollups(call.guard, filters, days, by=(), distinct=True)
        found = whole[0] if whole else UsageRow(Amounts(), customers=0)
        nobody = await _days_of_nobody(call, filters, days)
        buckets = [(_day_start(call, day), row.amounts, (row.customers or 0) - (day in nobody)) for day, row in rows]
        return buckets, found.amounts, (found.customers or 0) - bool(nobody)
    records = await _records(call, days, filters)
    sums: dict[datetime, Amounts] = {}
    users: dict[datetime, set[str]] = {}
    for record in records:
        at = _bucket(call, query, record)
        sums.setdefault(at, Amounts()).add(amounts_of(record))
        users.setdefault(at, set()).update({record.customer_identifier} - {""})
    total = Amounts()
    for one in sums.values():
        total.add(one)
    everybody = set().union(*users.values()) if users else set()
    return [(at, sums[at], len(users[at])) for at in sorted(sums)], total, len(everybody)


async def _days_of_nobody(call: Call, filters: Filters[UsageRecord], days: tuple[int, int]) -> set[int]:
    """On which days there was usage of nobody's, which storage counts as one more customer."""
    if filters.only("customer_identifier") is not None:
        return set()
    return {row.day or 0 for row in await rollups(call.guard, filters, days, by=("day",), customer="", limit=MAX_DAYS)}


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


async def _records(call: Call, days: tuple[int, int], filters: Filters[UsageRecord]) -> list[UsageRecord]:
    zone = load_zone(call.guard.settings.time_zone)
    since, until = (None if day in EVER else start_of_day(day, zone) for day in days)
    base = replace(records_wanted(LogRange(), filters), since_ms=since, until_ms=until)
    found = await search(call.guard, base, within(base, filters))
    if not found.complete:
        raise too_much()
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
    days = days_of(query, call.guard)
    if query.time_tick in (None, "day") and dimension in _ROLLED_UP and in_rollups(filters):
        cells = await _rolled_up(call, filters, days, _ROLLED_UP[dimension], names)
    else:
        cells = await _from_records(call, query, filters, days, dimension)
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
    if not isinstance(given, list) or not given or any(name not in METRICS for name in given):
        raise InvalidInput(
            f"metrics_to_aggregate must be a list of any of {', '.join(METRICS)}", field="metrics_to_aggregate"
        )
    return tuple(dict.fromkeys(given))


async def _rolled_up(
    call: Call, filters: Filters[UsageRecord], days: tuple[int, int], by: str, names: tuple[str, ...]
) -> dict[datetime, dict[str, Amounts]]:
    top = next((TOPPED[name] for name in names if name in TOPPED), "cost")
    largest = await rollups(call.guard, filters, days, by=(by,), top=top, limit=TOP)
    whole = await _by_day(call, filters, days)
    left = {day: row.amounts for day, row in whole}
    cells: dict[int, dict[str, Amounts]] = {day: {} for day in left}
    for one in largest:
        value = getattr(one, by)
        only = {"customer": filters.only("customer_identifier"), "model": filters.only("model"), by: value}
        condition = _narrowed(only)
        for row in await rollups(call.guard, condition, days, by=("day",), limit=MAX_DAYS):
            day = row.day or 0
            if day in left:
                _put(cells[day], value, row.amounts)
                left[day] = minus(left[day], row.amounts)
    for day, rest in left.items():
        if rest != Amounts():
            _put(cells[day], OTHERS, rest)
    return {_day_start(call, day): columns for day, columns in cells.items()}


def _narrowed(only: Mapping[str, str | None]) -> Filters[UsageRecord]:
    names = {"customer": "customer_identifier", "model": "model"}
    given = {names[name]: {"value": [value]} for name, value in only.items() if value is not None}
    return read_log_filters(LogRange(), given)


def _put(columns: dict[str, Amounts], value: str | None, sums: Amounts) -> None:
    name = NOBODY if not value else OTHERS if value == "date_group" else value
    columns.setdefault(name, Amounts()).add(sums)


async def _from_records(
    call: Call, query: TimeRange, filters: Filters[UsageRecord], days: tuple[int, int], dimension: str
) -> dict[datetime, dict[str, Amounts]]:
    value: Callable[[UsageRecord], Any] = lambda record: log_field(record, dimension) or ""  # noqa: E731
    records = await _records(call, days, filters)
    totals: dict[str, Amounts] = {}
    for record in records:
        totals.setdefault(value(record), Amounts()).add(amounts_of(record))
    largest = sorted(totals, key=lambda name: (-totals[name].cost, name))[:TOP]
    cells: dict[datetime, dict[str, Amounts]] = {}
    for record in records:
        name = value(record)
        columns = cells.setdefault(_bucket(call, query, record), {})
        _put(columns, name if name in largest else OTHERS, amounts_of(record))
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
