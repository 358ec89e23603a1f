"""A customer as Respan shows a user: in lists, and by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from respan_guard.api.limits import limit_info
from respan_guard.api.rows import ENVIRONMENT
from respan_guard.backends.base import CustomerRow
from respan_guard.decision import as_datetime
from respan_guard.errors import CustomerUnknown
from respan_guard.markups import with_markup
from respan_guard.money import from_nano
from respan_guard.periods import load_zone

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["USER_KINDS", "average", "show_user", "user_field", "user_row"]

_DAY_MS = 86_400_000


def average(total: int, count: int) -> Decimal | None:
    """Milliseconds summed over calls as seconds for one of them; None if there are none."""
    return (Decimal(total) / count / 1000).quantize(Decimal("0.000001")) if count else None


def _monthly(row: CustomerRow) -> Decimal:
    """What 30 days cost on average since the customer was first seen; if that is less, what it cost so far."""
    days = max(30, -(-(row.last_seen_ms - row.first_seen_ms) // _DAY_MS))
    return (from_nano(row.totals.cost) * 30 / days).quantize(Decimal("0.000000001"))


def _param(name: str) -> Callable[[CustomerRow], Any]:
    return lambda row: (row.params or {}).get(name)


_TEXTS: Mapping[str, Callable[[CustomerRow], Any]] = {
    "customer_identifier": lambda r: r.customer,
    "name": _param("name"),
    "email": _param("email"),
    "environment": lambda r: ENVIRONMENT,
}
_NUMBERS: Mapping[str, Callable[[CustomerRow], Any]] = {
    "active_days": lambda r: r.active_days,
    "number_of_requests": lambda r: r.totals.calls,
    "total_tokens": lambda r: r.totals.input_tokens + r.totals.output_tokens,
    "total_prompt_tokens": lambda r: r.totals.input_tokens,
    "total_completion_tokens": lambda r: r.totals.output_tokens,
    "total_cost": lambda r: from_nano(r.totals.cost),
    "average_latency": lambda r: average(r.totals.latency_ms, r.totals.timed),
    "average_ttft": lambda r: average(r.totals.ttft_ms, r.totals.ttft_calls),
    "average_monthly_cost": _monthly,
}
_FIELDS = {**_TEXTS, **_NUMBERS}
USER_KINDS: Final[Mapping[str, str]] = {**dict.fromkeys(_TEXTS, "text"), **dict.fromkeys(_NUMBERS, "number")}
"""What users can be filtered and sorted by."""


def user_field(row: CustomerRow, name: str) -> Any:
    """One field of a user."""
    return _FIELDS[name](row)


def _money(value: Any) -> Decimal | None:
    return None if value is None else Decimal(value)


def user_row(row: CustomerRow, guard: Guard) -> dict[str, Any]:
    """A user as lists show it, each alias beside its name."""
    organization = guard.settings.namespace
    found = {name: get(row) for name, get in _FIELDS.items()}
    params = row.params or {}
    return found | {
        "id": f"{row.customer}{ENVIRONMENT}{organization}",
        "unique_organization_id": organization,
        "first_seen": as_datetime(row.first_seen_ms),
        "last_active_timeframe": as_datetime(row.last_seen_ms),
        "total_requests": found["number_of_requests"],
        "tokens": found["total_tokens"],
        "cost": found["total_cost"],
        "total_cost_with_markup": with_markup(found["total_cost"], guard.policies.markup(row.params)),
        "period_budget": _money(params.get("period_budget")),
        "budget_duration": params.get("budget_duration"),
        "total_budget": _money(params.get("total_budget")),
        "blocked": bool(params.get("blocked")),
    }


async def show_user(guard: Guard, identifier: str) -> dict[str, Any]:
    """A user by itself, with its current period.

    Raises:
        CustomerUnknown: There is none, any more.
    """
    lane = guard.lane()
    customer = await guard.get_customer(identifier)
    row = await lane.call(lambda backend: backend.get(identifier))
    if customer is None or row is None:
        raise CustomerUnknown("there is no such user")
    status = await guard.status(identifier)
    audit = await lane.call(lambda backend: backend.audit(customer=identifier, limit=1))
    zone = load_zone(customer.time_zone or guard.settings.time_zone)
    spent = status.period_spend
    if spent is None:  # no budget says what a period is: the calendar month
        spent = await _this_month(guard, identifier, datetime.fromtimestamp(guard.now_ms() / 1000, zone).date())
    total = from_nano(row.totals.cost)
    markup = guard.policies.markup(row.params)

    def day(value: date | None) -> datetime | None:
        return None if value is None else datetime.combine(value, time(), zone).astimezone(zone)

    return {
        "id": identifier,
        "customer_identifier": identifier,
        "unique_organization_id": guard.settings.namespace,
        "organization_name": guard.settings.namespace,
        "environment": ENVIRONMENT,
        "name": customer.name,
        "email": customer.email,
        "metadata": customer.metadata,
        "group_identifier": customer.group_identifier,
        "rate_limit": customer.rate_limit,
        "period_budget": customer.period_budget,
        "budget_duration": customer.budget_duration,
        "total_budget": customer.total_budget,
        "period_start": day(customer.period_start),
        "period_end": day(customer.period_end),
        "period_anchor": customer.period_anchor,
        "markup_percentage": customer.markup_percentage,
        "blocked": customer.blocked,
        "time_zone": customer.time_zone,
        "total_period_usage": spent,
        "total_period_usage_with_markup": with_markup(spent, markup),
        "total_usage": total,
        "total_usage_with_markup": with_markup(total, markup),
        "total_requests": row.totals.calls,
        "total_prompt_tokens": row.totals.input_tokens,
        "total_completion_tokens": row.totals.output_tokens,
        "total_tokens": row.totals.input_tokens + row.totals.output_tokens,
        "average_latency": user_field(row, "average_latency"),
        "average_ttft": user_field(row, "average_ttft"),
        "average_monthly_cost": _monthly(row),
        "active_days": row.active_days,
        "created_at": as_datetime(row.first_seen_ms),
        "last_active": as_datetime(row.last_seen_ms),
        "updated_at": as_datetime(audit[0].at_ms).astimezone(UTC) if audit else None,
        "is_test": False,
        "limit_info": limit_info(status),
    }


async def _this_month(guard: Guard, identifier: str, today: date) -> Decimal:
    first = today.replace(day=1)
    rows = await guard.usage("customer", customer_identifier=identifier, since=first)
    return rows[0].cost if rows else Decimal(0)
