"""How many customers are near a budget: the figure of the dashboard, now and when its range began."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from random import Random

from respan_guard import Customer, Guard, Usage
from respan_guard.backends.base import Backend, CustomerQuery
from respan_guard.console.near import near_budgets
from respan_guard.testing import FakeClock
from tests.guard.conftest import MakeGuard, clock, make_guard, storage

__all__ = ["clock", "make_guard", "storage"]

OWN: dict[int, dict[str, object]] = {
    0: {"budget_duration": "weekly", "period_budget": 10, "period_start": "2025-12-30"},
    1: {"total_budget": 30},
    2: {"budget_duration": "daily", "period_budget": 5, "total_budget": 60},
    3: {"rate_limit": 5, "period_budget": 0, "budget_duration": "monthly", "blocked": True},
}


async def near(guard: Guard, then_ms: int) -> tuple[int, int]:
    """The figures of all customers."""

    async def look(backend: Backend) -> tuple[int, int]:
        rows = await backend.customers(CustomerQuery())
        return await near_budgets(guard, backend, rows, then_ms)

    return await guard.lane().call(look)


async def test_near_is_what_status_says(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Of customers with budgets of all kinds, the figure is what their own statuses say, at both moments.

    Some share a calendar's period, some have one of their own, one has no budget, one is blocked, and some start a new
    period in between.
    """
    random = Random(7)
    async with make_guard(default_limits={"budget_duration": "monthly", "period_budget": 10}) as guard:
        names = [f"c{number}" for number in range(12)]
        for number, name in enumerate(names):
            if number in OWN:
                await guard.put_customer(Customer.model_validate({"customer_identifier": name} | OWN[number]))
        figures = []
        for _ in range(9):
            for name in names:
                cost = Decimal(random.randrange(2_500)) / 1000
                await guard.record(Usage(model="m", cost=cost), name)
            await guard.flush()

            expected = 0
            for name in names:
                limits = (await guard.status(name)).limits
                budgets = [one for one in limits if one.name in ("period_budget", "total_budget")]
                expected += any(one.used * 100 >= one.limit * 80 for one in budgets)
            figures.append((guard.now_ms(), expected))
            for at_ms, then in figures:
                assert await near(guard, at_ms) == (expected, then)
            clock.advance(timedelta(days=1).total_seconds())
        assert len({figure for _, figure in figures}) > 3
