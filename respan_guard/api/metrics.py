"""Sums of calls, from rollups where these answer, else from the records; and what Respan makes of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from respan_guard.api.filters import Filters
from respan_guard.api.search import search, too_much
from respan_guard.backends.base import AMOUNTS, Amounts, RecordQuery, UsageQuery, UsageRow
from respan_guard.markups import costs_with_markup, markups_of, with_markup
from respan_guard.money import from_nano, to_nano
from respan_guard.usage import UsageRecord

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = [
    "MARKED_UP", "METRICS", "TOPPED", "Sums", "grouped", "in_rollups", "metric", "rollups", "sum_records", "summed",
]  # fmt: skip

_ROLLED_UP = frozenset({"customer_identifier", "model", "environment"})


def _per_call(total: Decimal | int, calls: int, places: str) -> Decimal:
    return (Decimal(total) / calls).quantize(Decimal(places)) if calls else Decimal(0)


def _seconds(ms: int, count: int) -> Decimal | None:
    return _per_call(ms, count * 1000, "0.000001") if count else None


def _speed(sums: Amounts) -> Decimal | None:
    """Output tokens a second; None unless every call says how long it took."""
    if not sums.latency_ms or sums.timed < sums.calls:
        return None
    return (Decimal(sums.output_tokens) * 1000 / sums.latency_ms).quantize(Decimal("0.001"))


_OF: Final[Mapping[str, Callable[[Amounts], Decimal | int | None]]] = {
    "number_of_requests": lambda s: s.calls,
    "total_cost": lambda s: from_nano(s.cost),
    "total_tokens": lambda s: s.input_tokens + s.output_tokens,
    "total_prompt_tokens": lambda s: s.input_tokens,
    "total_completion_tokens": lambda s: s.output_tokens,
    "error_count": lambda s: s.errors,
    "error_percentage": lambda s: _per_call(s.errors * 100, s.calls, "0.0001"),
    "average_cost": lambda s: _per_call(from_nano(s.cost), s.calls, "0.000000001"),
    "average_tokens": lambda s: (s.input_tokens + s.output_tokens) // s.calls if s.calls else 0,
    "cache_hit_percentage": lambda s: _per_call(s.cache_read_tokens * 100, s.input_tokens, "0.0001"),
    "average_latency": lambda s: _seconds(s.latency_ms, s.timed),
    "average_ttft": lambda s: _seconds(s.ttft_ms, s.ttft_calls),
    "average_tps": _speed,
}
METRICS: Final = tuple(_OF)
MARKED_UP: Final = "total_cost_with_markup"
"""A metric of ours: the cost as the customers are shown it."""
TOPPED: Final[Mapping[str, str]] = {
    "number_of_requests": "calls", "total_cost": "cost", "total_tokens": "tokens", "error_count": "errors",
    "total_prompt_tokens": "input_tokens", "total_completion_tokens": "output_tokens",
}  # fmt: skip
"""What storage can give the largest of."""


@dataclass(slots=True)
class Sums:
    """Sums, and what their cost is with the customers' markup; None where nobody asked for that."""

    amounts: Amounts = field(default_factory=Amounts)
    marked_up: Decimal | None = Decimal(0)

    def add(self, other: Sums) -> None:
        """Add others."""
        self.amounts.add(other.amounts)
        both = self.marked_up is not None and other.marked_up is not None
        self.marked_up = self.marked_up + other.marked_up if both else None  # type: ignore[operator]  # both are told

    def minus(self, part: Sums) -> Sums:
        """What is left of them without some that are in them."""
        left = Amounts(*(getattr(self.amounts, name) - getattr(part.amounts, name) for name in AMOUNTS))
        both = self.marked_up is not None and part.marked_up is not None
        return Sums(left, self.marked_up - part.marked_up if both else None)  # type: ignore[operator]  # both are told


def metric(sums: Sums, name: str) -> Decimal | int | None:
    """One of Respan's metrics, or ours. `cache_hit_percentage` is the share of input tokens that a cache had."""
    return sums.marked_up if name == MARKED_UP else _OF[name](sums.amounts)


def _amounts_of(record: UsageRecord) -> Amounts:
    """What one record adds to sums."""
    usage = record.usage
    return Amounts(
        calls=record.kind != "adjustment",
        cost=0 if record.cost is None else to_nano(record.cost, signed=True),
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        unpriced=record.cost is None,
        errors=usage.status == "error",
        latency_ms=usage.latency_ms or 0,
        timed=usage.latency_ms is not None,
        ttft_ms=usage.ttft_ms or 0,
        ttft_calls=usage.ttft_ms is not None,
    )


def in_rollups(filters: Filters[UsageRecord]) -> bool:
    """Whether rollups tell what filters ask for: one customer, one model, or all."""
    asked = filters.fields()
    return asked <= _ROLLED_UP and all(condition.only is not None for condition in filters.conditions)


def rollup_query(filters: Filters[UsageRecord], days: tuple[int, int], **more: Any) -> UsageQuery:
    """What filters ask of rollups."""
    asked = {"customer": filters.only("customer_identifier"), "model": filters.only("model"), **more}
    return UsageQuery(first_day=days[0], end_day=days[1], **asked)


async def rollups(guard: Guard, filters: Filters[UsageRecord], days: tuple[int, int], **more: Any) -> list[UsageRow]:
    """Sums by day of booking."""
    if filters.only("environment") not in (None, "prod"):
        return []
    query = rollup_query(filters, days, **more)
    return await guard.lane().call(lambda backend: backend.usage(query))


async def summed(
    guard: Guard, filters: Filters[UsageRecord], days: tuple[int, int], **more: Any
) -> list[tuple[UsageRow, Sums]]:
    """The same, each with its marked-up cost."""
    rows = await rollups(guard, filters, days, **more)
    costs = await costs_with_markup(guard, rollup_query(filters, days, **more), rows)
    return [(row, Sums(row.amounts, cost)) for row, cost in zip(rows, costs, strict=True)]


async def sum_records(
    guard: Guard,
    query: RecordQuery,
    wanted: Callable[[UsageRecord], bool],
    by: Callable[[UsageRecord], Hashable],
) -> dict[Any, Sums]:
    """Sums of records, by what `by` says of each; None is left out.

    Raises:
        InvalidInput: There are more than one request may look at.
    """
    found = await search(guard, query, wanted)
    if not found.complete:
        raise too_much()
    return await grouped(guard, found.records, by)


async def grouped(
    guard: Guard, records: Iterable[UsageRecord], by: Callable[[UsageRecord], Hashable]
) -> dict[Any, Sums]:
    """The same of records that are at hand."""
    records = list(records)
    markups = await markups_of(guard, {record.customer_identifier for record in records if record.cost})
    sums: dict[Any, Sums] = {}
    for record in records:
        group = by(record)
        if group is not None:
            cost = with_markup(record.cost or Decimal(0), markups.get(record.customer_identifier))
            sums.setdefault(group, Sums()).add(Sums(_amounts_of(record), cost))
    return sums
