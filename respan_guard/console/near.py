"""How many customers are near a budget, now and at an earlier moment, without a look at each of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from respan_guard.backends.base import Backend, CustomerRow, Limit, UsageQuery
from respan_guard.backends.cells import EVER
from respan_guard.console.standing import NEAR, policy_of
from respan_guard.decision import BLOCKED

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["near_budgets"]

_FEW = 4  # customers of one period that are read one by one
_TOP = 200


async def near_budgets(guard: Guard, backend: Backend, rows: Sequence[CustomerRow], at_ms: int, *, now: bool) -> int:
    """How many of some customers had used `NEAR` percent of a budget by an instant; those that are over one, too.

    Their budgets are today's, what was used is taken by whole days, and holds are left aside. Customers whose periods
    begin and end alike, most of them as a rule, are read together: those who used most in that time.

    Args:
        guard: Knows their limits.
        backend: What they used.
        rows: The customers.
        at_ms: The instant.
        now: Whether it is the present one.
    """
    budgets: dict[tuple[int, int], list[tuple[CustomerRow, Limit, int]]] = defaultdict(list)
    near: set[str] = set()
    for row in rows:
        policy = policy_of(guard, row)
        day = policy.day_of(at_ms)
        for limit in policy.at(at_ms).limits:
            if limit.metric != "cost" or limit.name == BLOCKED:
                continue
            if limit.kind == "span":
                budgets[limit.first_day, min(limit.end_day, day + 1)].append((row, limit, 0))
            elif now:
                if _is_near(row.totals.cost, limit):
                    near.add(row.customer)
            else:  # what it used in all, less what it used since
                budgets[day + 1, EVER].append((row, limit, row.totals.cost))
    for (first, end), asked in budgets.items():
        used = await _used(backend, [row.customer for row, _, _ in asked], first, end)
        for row, limit, total in asked:
            cost = used.get(row.customer, 0)
            if _is_near(total - cost if limit.kind == "total" else cost, limit):
                near.add(row.customer)
    return len(near)


async def _used(backend: Backend, customers: list[str], first: int, end: int) -> dict[str, int]:
    """What customers used within some days, nano-USD."""
    found: dict[str, int] = {}
    left = set(customers)
    if len(customers) > _FEW:
        tops = await backend.usage(UsageQuery(first_day=first, end_day=end, top="cost", limit=_TOP))
        found = {row.customer or "": row.amounts.cost for row in tops}
        left = set() if len(tops) < _TOP else left - found.keys()
    for customer in left:
        for row in await backend.usage(UsageQuery(first, end, customer)):
            found[customer] = row.amounts.cost
    return found


def _is_near(used: int, limit: Limit) -> bool:
    return used * 100 >= limit.amount * NEAR
