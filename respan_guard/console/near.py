"""Who is near a budget or over one, now or at an earlier moment.

Every customer counts, so it takes the longer the more there are: a page of them at once, some statements for each page,
none of which reads records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Final, TypeAlias

from respan_guard.backends.base import Backend, CustomerQuery, CustomerRow, Limit, UsageQuery
from respan_guard.console.remembered import Answer, Remembered
from respan_guard.console.standing import NEAR
from respan_guard.customers import is_shown
from respan_guard.decision import BLOCKED
from respan_guard.markups import Reads
from respan_guard.policy import Policy

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["MOST_NAMES", "Near", "near_budgets", "who_is_near"]

MOST_NAMES: Final = 10_000
"""How many of those near a budget, and of those over one, are known by name."""

_PAGE = 200
_EVER = 1 << 40
_DAY_MS = 86_400_000
_EPOCH = date(1970, 1, 1).toordinal()

_BUDGETS = ("period_budget", "budget_duration", "period_start", "period_end", "total_budget", "time_zone")
_MOST_POLICIES = 10_000

Days: TypeAlias = tuple[int, int]
Asked: TypeAlias = tuple[Limit, Days]
"""A budget, and the days whose sum says how much of it was used."""


@dataclass(frozen=True, slots=True)
class Near:
    """Whose state it is to be near a budget, and whose to be over one; who is blocked is neither.

    Attributes:
        counts: How many, by state: "near" and "over".
        names: Who they are, by state, the first `MOST_NAMES` of each by identifier.
        deleted: When those were last seen whose sums are kept under a label, and who are no customers any more.
    """

    counts: Mapping[str, int]
    names: Mapping[str, tuple[str, ...]]
    deleted: tuple[int, ...] = ()

    def of(self, *states: str) -> tuple[str, ...]:
        """Who is in one of the states, the first `MOST_NAMES` by identifier."""
        return tuple(sorted(name for state in states for name in self.names[state])[:MOST_NAMES])

    def count(self, *states: str) -> int:
        """How many are."""
        return sum(self.counts[state] for state in states)


async def who_is_near(guard: Guard, remembered: Remembered) -> Answer[Near] | None:
    """Who is near a budget or over one at the moment; of one count on all pages."""
    return await remembered.last(
        "who is near a budget", lambda reads: near_budgets(guard, reads, guard.now_ms()), anew=False
    )


async def near_budgets(guard: Guard, reads: Reads, at_ms: int) -> Near:
    """Count all customers.

    Their budgets are today's, and so is who is blocked; what was used is taken by whole days, and holds are left aside.

    Args:
        guard: Knows customers and their limits.
        reads: Knows what they used.
        at_ms: The moment.
    """
    counts, names, deleted = Counter[str](), {"near": list[str](), "over": list[str]()}, list[int]()
    asking = _Asking(guard, at_ms)
    known = await reads.call(lambda backend: _near_alike(backend, asking.default), 60.0)
    query = CustomerQuery(limit=_PAGE, blocked=False)

    async def page(backend: Backend) -> list[CustomerRow]:
        rows = await backend.customers(query)
        somebody = [row for row in rows if is_shown(row)]
        deleted.extend(row.last_seen_ms for row in rows if row.customer and not is_shown(row))
        asked = {row.customer: asking.of(row) for row in somebody}
        for customer, state in await _near_among(backend, somebody, asked, known):
            counts[state] += 1
            if len(names[state]) < MOST_NAMES:
                names[state].append(customer)
        return rows

    while rows := await reads.call(page, 60.0):
        query = replace(query, after=(rows[-1].customer, rows[-1].customer))
    return Near(counts, {state: tuple(found) for state, found in names.items()}, tuple(deleted))


class _Asking:
    """What is to be asked of customers. Many have the same budgets: each kind is worked out once."""

    def __init__(self, guard: Guard, at_ms: int) -> None:
        self._policies = guard.policies
        self._at_ms = at_ms
        self._known: dict[tuple[object, ...], list[Asked]] = {}
        self.default = self._asked(guard.policies.default.policy)

    def of(self, row: CustomerRow) -> list[Asked]:
        """What is to be asked of a customer."""
        if row.params is None:
            return self.default
        params = self._policies.effective(row.params)
        key = tuple(params.get(name) for name in _BUDGETS)
        asked = self._known.get(key)
        if asked is None:
            if len(self._known) >= _MOST_POLICIES:
                self._known.clear()
            asked = self._known[key] = self._asked(self._policies.look(row.customer, row.revision, row.params).policy)
        return asked

    def _asked(self, policy: Policy) -> list[Asked]:
        found: list[Asked] = []
        end = policy.day_of(self._at_ms) + 1
        for limit in policy.at(self._at_ms).limits:
            if limit.metric == "cost" and limit.name != BLOCKED and not limit.shared:
                span = limit.first_day, min(end, limit.end_day)
                found.append((limit, (end, _EVER) if limit.kind == "total" else span))
        return found


async def _near_alike(backend: Backend, asked: Sequence[Asked]) -> dict[Asked, dict[str, int]]:
    """Who is near budgets that most have. Storage finds them without a look at those who can't have used so much."""
    found: dict[Asked, dict[str, int]] = {}
    for budget in asked:
        limit, days = budget
        if limit.kind == "span" and limit.amount > 0:
            query = UsageQuery(*days, top="cost", least=_least(limit), limit=_EVER)
            found[budget] = {row.customer or "": row.amounts.cost for row in await backend.usage(query)}
    return found


def _least(limit: Limit) -> int:
    return -(-limit.amount * NEAR // 100)


async def _near_among(
    backend: Backend,
    rows: Sequence[CustomerRow],
    asked: Mapping[str, Sequence[Asked]],
    known: Mapping[Asked, Mapping[str, int]],
) -> list[tuple[str, str]]:
    """Those of some customers that were near a budget or over one, and which, by one statement for each run of days."""
    runs: dict[Days, list[str]] = {}
    for row in rows:
        seen_day = row.last_seen_ms // _DAY_MS + _EPOCH + 1  # in whatever zone
        for first, end in {budget[1] for budget in asked[row.customer] if budget not in known}:
            if first <= seen_day:
                runs.setdefault((first, end), []).append(row.customer)
    sums: dict[tuple[str, Days], int] = {}
    for days, names in runs.items():
        query = UsageQuery(*days, among=tuple(names), limit=len(names))
        for used in await backend.usage(query):
            sums[used.customer or "", days] = used.amounts.cost
    found = []
    for row in rows:
        states = set()
        for budget in asked[row.customer]:
            limit, days = budget
            if budget in known:
                used_up = known[budget].get(row.customer, 0)
            else:  # in all: all but what came later
                used_up = sums.get((row.customer, days), 0)
                used_up = row.totals.cost - used_up if limit.kind == "total" else used_up
            if limit.amount <= 0 or used_up >= limit.amount:
                states.add("over")
            elif used_up >= _least(limit):
                states.add("near")
        if states:
            found.append((row.customer, "over" if "over" in states else "near"))
    return found
