"""Putting sums together by what a query groups by, for stores that have no language of their own for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from heapq import nsmallest
from typing import Any

from respan_guard.backends.base import Amounts, UsageQuery, UsageRow

__all__ = ["amount_of", "grouped"]


def grouped(
    query: UsageQuery, found: Iterable[tuple[str, str, int, Amounts]], active: Mapping[int, int]
) -> list[UsageRow]:
    """The rows of a query's answer, in its order.

    Args:
        query: What was asked; customers, days and hours were picked already.
        found: Customer ("" in sums of all together), model, day or hour, and amounts.
        active: How many customers were active on each day, for sums of all together.
    """
    groups: dict[tuple[Any, ...], Amounts] = {}
    members: dict[tuple[Any, ...], set[str]] = {}
    for customer, model, when, amounts in found:
        if query.model in (None, model):
            values = {"customer": customer, "model": model, "day": when, "hour": when}
            key = tuple(values[name] for name in query.by)
            groups.setdefault(key, Amounts()).add(amounts)
            members.setdefault(key, set()).add(customer)
    top = query.top
    if top is not None and query.least is not None:
        groups = {key: amounts for key, amounts in groups.items() if amount_of(amounts, top) >= query.least}
    if top is None:
        keys = sorted(groups)[: query.limit]
    else:
        keys = nsmallest(query.limit, groups, key=lambda key: (-amount_of(groups[key], top), key))

    def different(key: tuple[Any, ...]) -> int | None:
        if not query.distinct:
            return None
        return active[key[0]] if query.of_all and query.by_day_alone else len(members[key])

    return [UsageRow(groups[key], customers=different(key), **dict(zip(query.by, key, strict=True))) for key in keys]


def amount_of(amounts: Amounts, name: str) -> int:
    """One of the amounts, or "tokens" for those of input and output together."""
    if name == "tokens":
        return amounts.input_tokens + amounts.output_tokens
    value: int = getattr(amounts, name)
    return value
