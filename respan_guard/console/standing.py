"""Where customers stand: limits as meters, and a state in one word."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

from respan_guard.backends.base import Backend, CustomerRow, UsageQuery
from respan_guard.console.charts import sparkline
from respan_guard.console.formats import percent
from respan_guard.customer import Customer
from respan_guard.customers import is_shown
from respan_guard.decision import BLOCKED, LimitStatus, limit_statuses
from respan_guard.markups import with_markup
from respan_guard.money import from_nano
from respan_guard.policy import Policy

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["NEAR", "Line", "Meter", "lines", "meters", "policy_of", "profile", "state_of"]

NEAR = 80
"""Percent of a limit from which on a customer is near it."""
_SPARK_DAYS = 30
_TITLES = {
    "period_budget": "Period budget",
    "total_budget": "Total budget",
    "app_period_budget": "The app's period budget",
    "app_total_budget": "The app's total budget",
}


@dataclass(frozen=True, slots=True)
class Meter:
    """A limit and how much of it is gone."""

    status: LimitStatus

    @property
    def taken(self) -> Decimal | int:
        """Used and held."""
        return self.status.used + self.status.held

    @property
    def percent(self) -> int:
        """How much of the limit is used or held."""
        return percent(self.taken, self.status.limit)

    @property
    def level(self) -> str:
        """One of "ok", "near" and "over"."""
        return "over" if self.percent >= 100 else "near" if self.percent >= NEAR else "ok"

    @property
    def title(self) -> str:
        """For people."""
        if self.status.window_seconds:
            return f"Rate, {_duration(self.status.window_seconds)}"
        return _TITLES.get(self.status.name, self.status.name)

    @property
    def resets_at(self) -> datetime | None:
        """When it is full again."""
        return self.status.resets_at


@dataclass(frozen=True, slots=True)
class Line:
    """A customer on the users page."""

    row: CustomerRow
    customer: Customer
    state: str
    limits: list[Meter]
    spark: str
    markup: Decimal | None
    rate_limit: int | str | None

    @property
    def cost_with_markup(self) -> Decimal:
        """What the customer would be charged."""
        return with_markup(from_nano(self.row.totals.cost), self.markup)

    @property
    def tokens(self) -> int:
        """In and out."""
        return self.row.totals.input_tokens + self.row.totals.output_tokens

    def limit(self, name: str) -> Meter | None:
        """The limit of that name."""
        return next((meter for meter in self.limits if meter.status.name == name), None)


def profile(row: CustomerRow) -> Customer:
    """Who a customer is; one that was never put has nothing but its identifier."""
    if not row.customer:
        return Customer.model_construct(customer_identifier="")
    return Customer.from_params(row.customer, row.params)


def policy_of(guard: Guard, row: CustomerRow | None) -> Policy:
    """The limits in force for a customer."""
    if row is None or row.params is None:
        return guard.policies.default.policy
    return guard.policies.learn(row.customer, row.revision, row.params).policy


async def meters(
    guard: Guard, backend: Backend, row: CustomerRow | None, customer: str, *, own: bool = False
) -> list[Meter]:
    """Every limit of a customer as it stands, and unless only its `own` are asked for, those that all share.

    What is nobody's has none.
    """
    if row is not None and not is_shown(row):
        return []
    now = guard.now_ms()
    terms = policy_of(guard, row).at(now)
    places = [place for place, limit in enumerate(terms.limits) if not (own and limit.shared)]
    if not places:
        return []
    limits = tuple(terms.limits[place] for place in places)
    outcome = await backend.standing(customer, limits, now=now)
    statuses = limit_statuses(limits, tuple(terms.resets[place] for place in places), outcome)
    return [Meter(status) for status in statuses if status.name != BLOCKED]


def state_of(customer: Customer, limits: list[Meter]) -> str:
    """One of "blocked", "over", "near" and "ok". Its own budgets count; a rate is full for a minute at most."""
    if customer.blocked:
        return "blocked"
    levels = {meter.level for meter in limits if not (meter.status.window_seconds or meter.status.shared)}
    return next((level for level in ("over", "near") if level in levels), "ok")


async def lines(guard: Guard, backend: Backend, rows: list[CustomerRow]) -> list[Line]:
    """Customers with where they stand and what they spent of late."""
    found = []
    for row in rows:
        customer = profile(row)
        limits = await meters(guard, backend, row, row.customer, own=True)
        end = policy_of(guard, row).day_of(guard.now_ms()) + 1
        days = await backend.usage(
            UsageQuery(first_day=end - _SPARK_DAYS, end_day=end, customer=row.customer, by=("day",))
        )
        costs = {day.day: day.amounts.cost for day in days}
        spark = sparkline([costs.get(day, 0) for day in range(end - _SPARK_DAYS, end)])
        markup = guard.policies.markup(row.params)
        rate = guard.policies.effective(row.params or {}).get("rate_limit") if is_shown(row) else None
        found.append(Line(row, customer, state_of(customer, limits), limits, spark, markup, rate))
    return found


def day_or_none(value: date | None) -> str:
    """A date, or nothing."""
    return "" if value is None else value.isoformat()


def _duration(seconds: int) -> str:
    for size, unit in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds % size == 0:
            number = seconds // size
            return f"each {unit}" if number == 1 else f"each {number} {unit}s"
    return f"each {seconds} seconds"
