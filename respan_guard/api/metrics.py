"""Sums of calls, from rollups where these answer, else from the records; and what Respan makes of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from respan_guard.api.filters import Filters
from respan_guard.api.search import search, too_much
from respan_guard.backends.base import Amounts, RecordQuery, UsageQuery, UsageRow
from respan_guard.money import from_nano, to_nano
from respan_guard.usage import UsageRecord

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["METRICS", "amounts_of", "in_rollups", "metric", "minus", "rollups", "sum_records"]

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
TOPPED: Final[Mapping[str, str]] = {
    "number_of_requests": "calls", "total_cost": "cost", "total_tokens": "tokens", "error_count": "errors",
    "total_prompt_tokens": "input_tokens", "total_completion_tokens": "output_tokens",
}  # fmt: skip
"""What storage can give the largest of."""


def metric(sums: Amounts, name: str) -> Decimal | int | None:
    """One of Respan's metrics. `cache_hit_percentage` is the share of input tokens that a provider's cache had."""
    return _OF[name](sums)


def amounts_of(record: UsageRecord) -> Amounts:
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


def minus(whole: Amounts, part: Amounts) -> Amounts:
    """What is left of sums without some that are in them."""
    return Amounts(*(getattr(whole, name) - getattr(part, name) for name in Amounts.__dataclass_fields__))


def in_rollups(filters: Filters[UsageRecord]) -> bool:
    """Whether rollups tell what filters ask for: one customer, one model, or all."""
    asked = filters.fields()
    return asked <= _ROLLED_UP and all(condition.only is not None for condition in filters.conditions)


async def rollups(guard: Guard, filters: Filters[UsageRecord], days: tuple[int, int], **more: Any) -> list[UsageRow]:
    """Sums by day of booking."""
    if filters.only("environment") not in (None, "prod"):
        return []
    asked = {"customer": filters.only("customer_identifier"), "model": filters.only("model"), **more}
    query = UsageQuery(first_day=days[0], end_day=days[1], **asked)
    return await guard.lane().call(lambda backend: backend.usage(query))


async def sum_records(
    guard: Guard,
    query: RecordQuery,
    wanted: Callable[[UsageRecord], bool],
    by: Callable[[UsageRecord], Hashable],
) -> dict[Any, Amounts]:
    """Sums of records, by what `by` says of each; None is left out.

    Raises:
        InvalidInput: There are more than one request may look at.
    """
    found = await search(guard, query, wanted)
    if not found.complete:
        raise too_much()
    sums: dict[Any, Amounts] = {}
    for record in found.records:
        group = by(record)
        if group is not None:
            sums.setdefault(group, Amounts()).add(amounts_of(record))
    return sums
