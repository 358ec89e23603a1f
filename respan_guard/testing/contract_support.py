"""What the tests of the contract are made of: operations with defaults, and a picture of a whole store."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from respan_guard.backends.base import (
    Admit,
    Allowed,
    Backend,
    CustomerQuery,
    Entry,
    Limit,
    Op,
    Outcome,
    Record,
    Recorded,
    RecordQuery,
    Refused,
    UsageQuery,
)
from respan_guard.usage import Usage

__all__ = [
    "DAY",
    "DAY_MS",
    "MAX",
    "NOW",
    "BackendFixture",
    "admit",
    "allowed",
    "budget",
    "dump",
    "one",
    "rate",
    "record",
    "recorded",
    "refused",
    "total",
]

DAY = date(2026, 1, 15).toordinal()
DAY_MS = 86_400_000
NOW = (DAY - date(1970, 1, 1).toordinal()) * DAY_MS + 12 * 3_600_000
MAX = 9_000_000_000_000_000


class BackendFixture:
    """Opens a store for each test."""

    async def open_backend(self) -> Backend:
        """Give an open and empty store; it is closed by the suite."""
        raise NotImplementedError("a suite of the contract says which store it is about: override open_backend()")

    @pytest.fixture
    async def backend(self) -> Any:
        """An open and empty store."""
        opened = await self.open_backend()
        yield opened
        await opened.close()


def rate(amount: int, window_ms: int = 60_000) -> Limit:
    """Requests per minute."""
    return Limit("rate_limit", "rate", "requests", amount, window_ms)


def budget(
    amount: int, metric: str = "cost", *, first: int = DAY, end: int = DAY + 30, scope: str = "customer"
) -> Limit:
    """A budget of 30 days from today on."""
    return Limit("period_budget", "span", metric, amount, first_day=first, end_day=end, scope=scope)


def total(amount: int, metric: str = "cost", *, scope: str = "customer") -> Limit:
    """A budget for all time."""
    return Limit("total_budget", "total", metric, amount, scope=scope)


def admit(admission: str, *limits: Limit, customer: str = "ann", day: int = DAY, **fields: Any) -> Admit:
    """Ask under the customer's first revision, at any time of any day."""
    given = {"revision": "", "day_from_ms": 0, "day_to_ms": 1 << 52, **fields}
    return Admit(admission, customer, day=day, limits=limits, **given)


def record(entry: str, cost: int | None = 1, *, customer: str = "ann", day: int = DAY, **fields: Any) -> Record:
    """Book an entry that ended now."""
    usage = {"at_ms": NOW, "usage": Usage(), **fields}
    return Record(Entry(entry, customer, day, cost=cost, **usage))


async def one(backend: Backend, op: Op, now: int = NOW) -> Outcome:
    """Apply one operation."""
    outcomes = await backend.apply([op], now)
    assert len(outcomes) == 1
    return outcomes[0]


async def allowed(backend: Backend, op: Admit, now: int = NOW) -> Allowed:
    """Ask, and be let in."""
    outcome = await one(backend, op, now)
    assert isinstance(outcome, Allowed), outcome
    return outcome


async def refused(backend: Backend, op: Admit, now: int = NOW) -> Refused:
    """Ask, and be turned down."""
    outcome = await one(backend, op, now)
    assert isinstance(outcome, Refused), outcome
    return outcome


async def recorded(backend: Backend, op: Record, now: int = NOW) -> Recorded:
    """Book."""
    outcome = await one(backend, op, now)
    assert isinstance(outcome, Recorded), outcome
    return outcome


async def dump(backend: Backend, now: int = NOW, *limits: Limit) -> list[Any]:
    """All that can be read of a store, to see that something changed nothing."""
    customers = await backend.customers(CustomerQuery(limit=1000))
    return [
        customers,
        await backend.usage(UsageQuery(by=("customer", "model", "day"))),
        await backend.entries(RecordQuery(limit=1000)),
        await backend.holds(now=now),
        await backend.holds(state="expired", now=now),
        await backend.audit(limit=1000),
        await backend.refusals(),
        [await backend.standing(row.customer, limits, now=now) for row in customers],
        await backend.verify(),
    ]
