"""How many customers are near a budget, now and at an earlier moment.

Every customer counts, so it takes the longer the more there are: a thousand at once, some statements for each thousand,
none of which reads records. A page therefore waits a moment for the count, and shows the last one with its time where
it takes longer. There is one count at a time, and a page starts another one when the last is old enough for counting to
take a small share of the time only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Final, TypeAlias

from respan_guard.backends.base import Backend, CustomerQuery, CustomerRow, Limit, UsageQuery
from respan_guard.console.standing import NEAR
from respan_guard.decision import BLOCKED
from respan_guard.policy import Policy

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["MOST_NAMES", "Near", "NearCounter", "near_budgets"]

MOST_NAMES: Final = 10_000
"""How many of those near a budget are known by name."""

_PAGE = 1_000
_PATIENCE = 0.25
_SHARE = 20  # a count is good for that many times as long as it took
_KEPT = 8
_EVER = 1 << 40
_DAY_MS = 86_400_000
_EPOCH = date(1970, 1, 1).toordinal()

_BUDGETS = ("period_budget", "budget_duration", "period_start", "period_end", "total_budget", "time_zone")
_MOST_POLICIES = 10_000

Days: TypeAlias = tuple[int, int]
Asked: TypeAlias = tuple[Limit, int, Days]
"""A budget, the moment's place among the two, and the days whose sum says how much of it was used by then."""


@dataclass(frozen=True, slots=True)
class Near:
    """Who had used `NEAR` percent of a budget or more; who is over one counts, too.

    Attributes:
        now: How many.
        then: How many by the earlier moment.
        at_ms: When they were counted.
        names: Who they are now, the first `MOST_NAMES` by identifier.
    """

    now: int
    then: int
    at_ms: int
    names: tuple[str, ...]


class NearCounter:
    """Counts, one thing after another, and remembers what came out.

    Args:
        guard: Whose customers.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._found: dict[str, tuple[Near, float]] = {}
        self._wanted: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    async def last(self, name: str, then_ms: int) -> Near | None:
        """The count for an earlier moment that has a name: a new one if that is quickly done, else the last.

        None if it was never counted and is not done yet.
        """
        found = self._found.get(name)
        if found is not None and self._guard.clock.monotonic() < found[1]:
            return found[0]
        self._wanted[name] = then_ms
        task = self._task
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            task = self._task = asyncio.create_task(self._work())
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be there to ask
        await asyncio.wait({task}, timeout=_PATIENCE)
        if task.done():
            task.result()
        found = self._found.get(name)
        return None if found is None else found[0]

    async def _work(self) -> None:
        while self._wanted:
            name, then_ms = next(iter(self._wanted.items()))
            began = self._guard.clock.monotonic()
            try:
                near = await near_budgets(self._guard, then_ms)
            finally:
                self._wanted.pop(name, None)  # whoever still wants it asks again
            ended = self._guard.clock.monotonic()
            self._found.pop(name, None)
            self._found[name] = near, ended + _SHARE * (ended - began)
            while len(self._found) > _KEPT:
                self._found.pop(next(iter(self._found)))


async def near_budgets(guard: Guard, then_ms: int) -> Near:
    """Count all customers.

    Their budgets are today's, what was used is taken by whole days, and holds are left aside.

    Args:
        guard: Knows customers, their limits and what they used.
        then_ms: The earlier moment.
    """
    moments = guard.now_ms(), then_ms
    found, names = [0, 0], list[str]()
    asking = _Asking(guard, moments)
    known = await guard.lane().call(lambda backend: _near_alike(backend, asking.default), None)
    query = CustomerQuery(limit=_PAGE)

    async def page(backend: Backend) -> list[CustomerRow]:
        rows = await backend.customers(query)
        asked = {row.customer: asking.of(row) for row in rows}
        for row, near in await _near_among(backend, rows, asked, known):
            found[0] += near[0]
            found[1] += near[1]
            if near[0] and len(names) < MOST_NAMES:
                names.append(row.customer)
        return rows

    while rows := await guard.lane().call(page, 60.0):
        query = replace(query, after=(rows[-1].customer, rows[-1].customer))
        await asyncio.sleep(0)  # a store in memory never lets others in between
    return Near(found[0], found[1], moments[0], tuple(names))


class _Asking:
    """What is to be asked of customers. Many have the same budgets: each kind is worked out once."""

    def __init__(self, guard: Guard, moments: tuple[int, int]) -> None:
        self._policies = guard.policies
        self._moments = moments
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
        for place, ms in enumerate(self._moments):
            today = policy.day_of(ms)
            for limit in policy.at(ms).limits:
                if limit.metric == "cost" and limit.name != BLOCKED and not limit.shared:
                    span = limit.first_day, min(today + 1, limit.end_day)
                    found.append((limit, place, (today + 1, _EVER) if limit.kind == "total" else span))
        return found


async def _near_alike(backend: Backend, asked: Sequence[Asked]) -> dict[Asked, set[str]]:
    """Who is near budgets that most have. Storage finds them without a look at those who can't have used so much."""
    found: dict[Asked, set[str]] = {}
    for budget in asked:
        limit, _, days = budget
        if limit.kind == "span" and limit.amount > 0:
            query = UsageQuery(*days, top="cost", least=_least(limit), limit=_EVER)
            found[budget] = {row.customer or "" for row in await backend.usage(query)}
    return found


def _least(limit: Limit) -> int:
    return -(-limit.amount * NEAR // 100)


async def _near_among(
    backend: Backend,
    rows: Sequence[CustomerRow],
    asked: Mapping[str, Sequence[Asked]],
    known: Mapping[Asked, Collection[str]],
) -> list[tuple[CustomerRow, list[bool]]]:
    """Which of some customers were near a budget at each of the moments, by one statement for each run of days."""
    runs: dict[Days, list[str]] = {}
    for row in rows:
        seen_day = row.last_seen_ms // _DAY_MS + _EPOCH + 1  # in whatever zone
        for first, end in {budget[2] for budget in asked[row.customer] if budget not in known}:
            if first <= seen_day:
                runs.setdefault((first, end), []).append(row.customer)
    sums: dict[tuple[str, Days], int] = {}
    for days, names in runs.items():
        query = UsageQuery(*days, among=tuple(names), limit=len(names))
        for used in await backend.usage(query):
            sums[used.customer or "", days] = used.amounts.cost
    found = []
    for row in rows:
        near = [False, False]
        for budget in asked[row.customer]:
            limit, place, days = budget
            if budget in known:
                is_near = row.customer in known[budget]
            elif limit.kind == "total":  # all but what came later
                is_near = row.totals.cost - sums.get((row.customer, days), 0) >= _least(limit)
            else:
                is_near = sums.get((row.customer, days), 0) >= _least(limit)
            near[place] = near[place] or is_near
        found.append((row, near))
    return found
