"""How many customers are near a budget, now and at an earlier moment, by one read of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from respan_guard.backends.base import Backend, CustomerRow, Limit, UsageQuery
from respan_guard.console.standing import NEAR, policy_of
from respan_guard.decision import BLOCKED

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["near_budgets"]


async def near_budgets(guard: Guard, backend: Backend, rows: Sequence[CustomerRow], then_ms: int) -> tuple[int, int]:
    """How many of some customers had used `NEAR` percent of a budget, now and by an earlier instant.

    Who is over one counts, too. Their budgets are today's, what was used is taken by whole days, and holds are left
    aside.

    Args:
        guard: Knows their limits.
        backend: What they used.
        rows: The customers.
        then_ms: The earlier instant.
    """
    now_ms = guard.now_ms()
    found = [0, 0]
    for row in rows:
        policy = policy_of(guard, row)
        moments = [(policy.day_of(ms), _budgets(policy.at(ms).limits)) for ms in (now_ms, then_ms)]
        if not any(budgets for _, budgets in moments):
            continue
        firsts = [limit.first_day for _, budgets in moments for limit in budgets if limit.kind == "span"]
        query = UsageQuery(min([moments[1][0] + 1, *firsts]), customer=row.customer, by=("day",), limit=100_000)
        days = {day.day or 0: day.amounts.cost for day in await backend.usage(query)}
        for place, (today, budgets) in enumerate(moments):
            later = sum(cost for day, cost in days.items() if day > today)
            found[place] += any(
                _is_near(_used(limit, today, days, row.totals.cost - later), limit) for limit in budgets
            )
    return found[0], found[1]


def _budgets(limits: Sequence[Limit]) -> list[Limit]:
    return [limit for limit in limits if limit.metric == "cost" and limit.name != BLOCKED and not limit.shared]


def _used(limit: Limit, today: int, days: dict[int, int], total: int) -> int:
    """What a budget's days hold up to a day, nano-USD; `total` is what was used in all by then."""
    if limit.kind == "total":
        return total
    return sum(cost for day, cost in days.items() if limit.first_day <= day <= min(today, limit.end_day - 1))


def _is_near(used: int, limit: Limit) -> bool:
    return used * 100 >= limit.amount * NEAR
