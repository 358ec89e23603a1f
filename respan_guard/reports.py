"""The reading half: where customers stand, what was used, who was refused."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from respan_guard.backends.base import (
    Amounts,
    Backend,
    CustomerQuery,
    CustomerRow,
    RecordQuery,
    RefusalRow,
    StoredEntry,
    UsageQuery,
)
from respan_guard.clock import Clock
from respan_guard.customer import Customer, normalise_identifier
from respan_guard.decision import Decision, Status, as_datetime, limit_statuses
from respan_guard.errors import InvalidInput
from respan_guard.identifiers import check_text, check_texts
from respan_guard.markups import costs_with_markup, with_markup
from respan_guard.money import from_nano
from respan_guard.option_values import LEAST_RETENTION
from respan_guard.rated import with_rates
from respan_guard.recorder import record_from_entry
from respan_guard.usage import UsageRecord

if TYPE_CHECKING:
    from respan_guard.backends.base import Allowed, Limit, Refused
    from respan_guard.guard import Guard
    from respan_guard.lanes import Lane

__all__ = ["CustomerReport", "RefusalLog", "Reports", "UsageReport"]

_PAGE = 500
_MAX_GROUPS = 1_000_000
_PRUNE_EVERY = 3600.0
_PRUNE_PAUSE = 0.05
_MAX_REFUSAL_KEYS = 10_000
_FILTERS = frozenset({"model", "provider", "kind", "source", "status", "trace_id", "unpriced"})


@dataclass(frozen=True, slots=True)
class UsageReport:
    """Sums of a group of calls. What was not asked for is None.

    Attributes:
        requests: Admissions.
        calls: LLM calls.
        cost: USD, without calls whose price is unknown.
        unpriced: How many calls have no known price.
        cost_with_markup: The cost with each customer's `markup_percentage`.
    """

    customer_identifier: str | None
    model: str | None
    day: date | None
    requests: int
    calls: int
    cost: Decimal
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    unpriced: int
    errors: int
    cost_with_markup: Decimal


@dataclass(frozen=True, slots=True)
class CustomerReport:
    """A customer and what it used in all time.

    Attributes:
        cost: USD that was paid.
        cost_with_markup: The same with the customer's `markup_percentage`.
        active_days: On how many days it was admitted or booked on.
    """

    customer: Customer
    first_seen: datetime
    last_seen: datetime
    active_days: int
    requests: int
    calls: int
    cost: Decimal
    cost_with_markup: Decimal
    input_tokens: int
    output_tokens: int
    unpriced: int


class Reports:
    """What the guard tells."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def customers(
        self, search: str, sort: str, descending: bool, limit: int, after: CustomerReport | None
    ) -> list[CustomerReport]:
        """A page of customers."""
        if sort not in _SORTS:
            raise InvalidInput(f"sort must be one of {', '.join(_SORTS)}, got {sort!r}", field="sort")
        key = None if after is None else (_SORTS[sort](after), after.customer.customer_identifier)
        query = CustomerQuery(check_text(search, "search"), sort, descending, key, limit)
        rows = await self._guard.lane().call(lambda backend: backend.customers(query))
        return [_customer_report(row, self._guard.policies.markup(row.params)) for row in rows]

    async def status(self, identifier: str) -> Status:
        """Where a customer stands now."""
        guard = self._guard
        lane = guard.lane()
        row = await lane.call(lambda backend: backend.get(identifier))
        known = guard.policies.default
        if row is not None and row.params is not None:
            known = guard.policies.learn(identifier, row.revision, row.params)
        now = guard.now_ms()
        terms = known.policy.at(now)
        rates: list[Limit] = []
        if guard.settings.rate_limit_storage is not None:
            rates = [limit for limit in terms.limits if limit.kind == "rate"]
        stored = [limit for limit in terms.limits if limit not in rates]
        standing: Allowed | Refused = await lane.call(lambda backend: backend.standing(identifier, stored, now=now))
        if rates:
            counted = await lane.look_at_rates(identifier, rates)
            standing = with_rates(terms.limits, standing, counted, 0)
        period_spend = next(
            (
                from_nano(used)
                for limit, used in zip(terms.limits, standing.used, strict=True)
                if limit.name == "period_budget"
            ),
            None,
        )
        totals = row.totals if row is not None else Amounts()
        return Status(
            customer_identifier=identifier,
            limits=limit_statuses(terms.limits, terms.resets, standing),
            period_spend=period_spend,
            total_spend=from_nano(totals.cost),
            total_requests=totals.requests,
            total_calls=totals.calls,
            blocked=bool((known.params or {}).get("blocked")),
            period_start=terms.period[0].isoformat() if terms.period else None,
            period_end=terms.period[1].isoformat() if terms.period else None,
        )

    async def records(
        self,
        customer_identifier: str | int | None,
        since: datetime | None,
        until: datetime | None,
        filters: Mapping[str, Any],
    ) -> AsyncIterator[UsageRecord]:
        """Usage records, page by page, oldest first."""
        if unknown := set(filters) - _FILTERS:
            raise InvalidInput(f"unknown filter {sorted(unknown)[0]!r}; known: {', '.join(sorted(_FILTERS))}")
        customer = None if customer_identifier is None else normalise_identifier(customer_identifier)
        check_texts(filters)
        query = RecordQuery(
            customer=customer,
            since_ms=_instant(since, "since"),
            until_ms=_instant(until, "until"),
            limit=_PAGE, **filters,
        )  # fmt: skip
        while True:
            page = await self._page(query)
            for stored in page:
                yield record_from_entry(stored)
            if len(page) < _PAGE:
                return
            query = replace(query, after=page[-1].seq)

    async def _page(self, query: RecordQuery) -> list[StoredEntry]:
        return await self._guard.lane().call(lambda backend: backend.entries(query))

    async def usage(
        self,
        by: tuple[str, ...],
        customer_identifier: str | int | None,
        model: str | None,
        since: date | None,
        until: date | None,
    ) -> list[UsageReport]:
        """Sums of the daily rollups."""
        for name in by:
            if name not in ("customer", "model", "day"):
                raise InvalidInput(f"usage can be summed by customer, model and day, not by {name!r}", field="by")
        query = UsageQuery(
            first_day=0 if since is None else since.toordinal(),
            end_day=1 << 40 if until is None else until.toordinal(),
            customer=None if customer_identifier is None else normalise_identifier(customer_identifier),
            model=None if model is None else check_text(model, "model"),
            by=by,
            limit=_MAX_GROUPS,
        )
        rows = await self._guard.lane().call(lambda backend: backend.usage(query))
        marked = await costs_with_markup(self._guard, query, rows)
        return [
            UsageReport(
                customer_identifier=row.customer,
                model=row.model,
                day=None if row.day is None else date.fromordinal(row.day),
                requests=row.amounts.requests,
                calls=row.amounts.calls,
                cost=from_nano(row.amounts.cost),
                input_tokens=row.amounts.input_tokens,
                output_tokens=row.amounts.output_tokens,
                cache_read_tokens=row.amounts.cache_read_tokens,
                unpriced=row.amounts.unpriced,
                errors=row.amounts.errors,
                cost_with_markup=cost,
            )
            for row, cost in zip(rows, marked, strict=True)
        ]

    async def prune(self, before: date, progress: Callable[[int], None] | None = None) -> int:
        """Delete records booked before a day, in small batches that let others in between.

        Raises:
            InvalidInput: The day is too late: usage of days that are pruned can't be recorded any more.
        """
        latest = self._days_ago(LEAST_RETENTION)
        if before > latest:
            wrong = f"before must be a day up to {latest}, as records of {LEAST_RETENTION} days are kept, got {before}"
            raise InvalidInput(wrong, field="before")
        gone = 0
        while count := await self._guard.lane().call(lambda backend: backend.prune(before.toordinal()), None):
            gone += count
            if progress is not None:
                progress(gone)
        return gone

    def keep_pruned(self, lane: Lane, days: int) -> None:
        """Delete records older than `days`: now, and from then on every hour."""

        async def work(backend: Backend) -> None:
            before = self._days_ago(days)
            more = 0
            try:
                more = await backend.prune(before.toordinal())
            finally:  # storage that fails once is tried again in an hour
                if not backend.shared:  # a store in memory is pruned whenever it is opened
                    lane.post_call(work, _PRUNE_PAUSE if more else _PRUNE_EVERY)  # small batches: others come between

        lane.post_call(work)

    def _days_ago(self, days: int) -> date:
        return as_datetime(self._guard.now_ms()).date() - timedelta(days=days)


class RefusalLog:
    """Counts refusals by customer, reason and minute, and writes them at most once a second.

    A refusal writes nothing when it is decided, so that refusing stays cheap; this is where it becomes visible.
    """

    def __init__(self, clock: Clock, lane: Callable[[], Lane]) -> None:
        self._clock = clock
        self._lane = lane
        self._counts: Counter[tuple[str, str, int]] = Counter()
        self._lock = threading.Lock()
        self._waiting = False

    def add(self, decision: Decision) -> None:
        """Count a refusal."""
        now = self._clock.now_ms()
        names = [status.name for status in decision.violated]
        key = (decision.customer_identifier, names[0] if names else "", now // 60_000)
        with self._lock:
            if len(self._counts) >= _MAX_REFUSAL_KEYS and key not in self._counts:
                key = ("", key[1], key[2])  # a flood of random ids is counted, not remembered id by id
            self._counts[key] += 1
            if self._waiting:
                return
            self._waiting = True
        self._lane().post_call(self._write, 1.0)

    def forget(self) -> None:
        """After a fork, in the child: what is counted is the parent's."""
        self._lock = threading.Lock()
        self._counts, self._waiting = Counter(), False

    async def flush(self) -> None:
        """Write what is counted."""
        if self._counts:
            self._waiting = False  # what was posted may have gone with its home
            await self._lane().call(self._write)

    async def _write(self, backend: Backend) -> None:
        with self._lock:
            counts, self._counts = self._counts, Counter()
            self._waiting = False
        rows = [RefusalRow(customer, reason, minute, n) for (customer, reason, minute), n in counts.items()]
        if not rows:
            return
        try:
            await backend.add_refusals(rows)
        except BaseException:
            with self._lock:
                self._counts.update(counts)
            raise


def _instant(moment: datetime | None, name: str) -> int | None:
    if moment is None:
        return None
    if moment.tzinfo is None:
        raise InvalidInput(f"{name} must be an aware datetime; add tzinfo=timezone.utc", field=name)
    return int(moment.timestamp() * 1000)


_SORTS: Mapping[str, Callable[[CustomerReport], str | int]] = {
    "customer": lambda row: row.customer.customer_identifier,
    "name": lambda row: row.customer.name or "",
    "first_seen": lambda row: int(row.first_seen.timestamp() * 1000),
    "last_seen": lambda row: int(row.last_seen.timestamp() * 1000),
    "requests": lambda row: row.requests,
    "calls": lambda row: row.calls,
    "cost": lambda row: int(row.cost.scaleb(9)),
    "tokens": lambda row: row.input_tokens + row.output_tokens,
}


def _customer_report(row: CustomerRow, markup: Decimal | None) -> CustomerReport:
    customer = Customer.from_params(row.customer, row.params) if row.customer else _UNATTRIBUTED
    cost = from_nano(row.totals.cost)
    return CustomerReport(
        customer=customer,
        first_seen=as_datetime(row.first_seen_ms),
        last_seen=as_datetime(row.last_seen_ms),
        active_days=row.active_days,
        requests=row.totals.requests,
        calls=row.totals.calls,
        cost=cost,
        cost_with_markup=with_markup(cost, markup),
        input_tokens=row.totals.input_tokens,
        output_tokens=row.totals.output_tokens,
        unpriced=row.totals.unpriced,
    )


_UNATTRIBUTED = Customer.model_construct(customer_identifier="")
