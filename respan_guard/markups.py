"""What reports add to customers' costs. Budgets compare what was paid.

A sum over several customers is marked up from sums that are kept anyway: all of it by the markup of the default
limits, and on top, for each customer whose own markup differs, the difference on what it cost. Those customers are
known by marks, facts that are set before a customer first gets a markup of its own and go when it loses it. So a
report costs one read where nobody has one, and two reads for each who has: it grows neither with records nor with
customers. Beyond `MAX_OWN` of them a sum has no marked-up figure, rather than a slow or a wrong one.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from respan_guard.backends.base import Backend, CustomerQuery, UsageQuery, UsageRow
from respan_guard.money import EXACT, from_nano, plus_percent

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = [
    "MARKUP", "MAX_OWN", "MarkedSums", "Markups", "all_markups", "costs_with_markup", "mark", "mark_of", "marked_sums",
    "markups_in", "markups_of", "unmark", "with_markup",
]  # fmt: skip

MAX_OWN: Final = 1_000
"""How many customers may have a markup of their own for sums over several customers to be marked up."""

MARKUP: Final = "markup_percentage"
"""The field of a customer."""

_SPACE = "markups"
_FEW = 8
_PAGE = 1_000
_MOST = 1_000_000


def with_markup(cost: Decimal, percentage: Decimal | None) -> Decimal:
    """A cost as reports for the customer show it."""
    return plus_percent(cost, percentage)


async def markups_of(guard: Guard, customers: Collection[str]) -> dict[str, Decimal]:
    """The markups of customers, in percent; those that have none are left out."""
    return await guard.lane().call(lambda backend: markups_in(guard, backend, customers), None)


async def markups_in(guard: Guard, backend: Backend, customers: Collection[str]) -> dict[str, Decimal]:
    """The same for whoever has the store in hand.

    Of many, only those that are marked are looked up. Where more are than can be told, all customers are read in order:
    not more work than the report they are for.
    """
    default = guard.policies.markup(None)
    found: dict[str, Decimal | None] = dict.fromkeys(customers, default)
    asked = set(customers)
    if len(asked) > _FEW and (marked := await _marked(backend)) is not None:
        asked &= marked
    if len(asked) <= MAX_OWN:
        for customer in asked:
            if (row := await backend.get(customer)) is not None:
                found[customer] = guard.policies.markup(row.params)
    else:
        query = CustomerQuery(limit=_PAGE)
        while rows := await backend.customers(query):
            found |= {row.customer: guard.policies.markup(row.params) for row in rows if row.customer in found}
            query = replace(query, after=(rows[-1].customer, rows[-1].customer))
    return {customer: markup for customer, markup in found.items() if markup}


# -- sums over several customers -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Markups:
    """What everybody pays on top, and those customers who pay more or less than that, in percent."""

    default: Decimal
    own: Mapping[str, Decimal]

    def __bool__(self) -> bool:
        return bool(self.default or self.own)


async def all_markups(guard: Guard, backend: Backend) -> Markups | None:
    """The markups of all customers; None if more than `MAX_OWN` are marked."""
    marked = await _marked(backend)
    if marked is None:
        return None
    default = guard.policies.markup(None) or Decimal(0)
    own: dict[str, Decimal] = {}
    for customer in sorted(marked):
        row = await backend.get(customer)
        markup = default if row is None else guard.policies.markup(row.params) or Decimal(0)
        if markup != default:
            own[customer] = markup
    return Markups(default, own)


class MarkedSums:
    """The costs of a query's sums with markup.

    Args:
        percentage: What is added to everything.
        of: The query; rows of its `by` are told apart.
    """

    def __init__(self, percentage: Decimal | None, of: UsageQuery) -> None:
        self._percentage = percentage
        self._of = of
        self._more: dict[tuple[str | None, int | None], Decimal] = {}

    async def add(self, backend: Backend, customer: str, percentage: Decimal) -> None:
        """Add what a customer pays on top."""
        query = replace(self._of, customer=customer, top=None, distinct=False, limit=_MOST)
        for row in await backend.usage(query):
            nano = EXACT.multiply(row.amounts.cost, percentage)  # a hundredth of it, at the end
            for place in {(row.model, row.day), (None, row.day), (row.model, None), (None, None)}:
                self._more[place] = EXACT.add(self._more.get(place, Decimal(0)), nano)

    def cost(self, nano: int, *, model: str | None = None, day: int | None = None) -> Decimal:
        """What was paid, with markup: in all, or of a model or day that the query groups by."""
        more = self._more.get((model, day), Decimal(0)).scaleb(-11, EXACT)
        return _plain(EXACT.add(with_markup(from_nano(nano), self._percentage), more))


async def marked_sums(
    guard: Guard, backend: Backend, query: UsageQuery, markups: Markups | None = None
) -> MarkedSums | None:
    """The marked-up sums of a query that does not group by customer.

    None where they can't be had: too many customers have a markup of their own, or the query is by hour, of which no
    customer's sums are kept, and some have. Of markups that were read before, it makes no second read.
    """
    if query.customer is not None:
        found = await markups_in(guard, backend, {query.customer})
        return MarkedSums(found.get(query.customer), query)
    if markups is None:
        markups = await all_markups(guard, backend)
    if markups is None or (markups.own and "hour" in query.by):
        return None
    sums = MarkedSums(markups.default, query)
    for customer, percentage in markups.own.items():
        await sums.add(backend, customer, EXACT.subtract(percentage, markups.default))
    return sums


async def costs_with_markup(guard: Guard, query: UsageQuery, rows: Sequence[UsageRow]) -> list[Decimal | None]:
    """For each row that a query found, its cost with markup; None where it can't be had."""
    if not rows:
        return []
    if "customer" in query.by:
        markups = await markups_of(guard, {row.customer or "" for row in rows})
        return [with_markup(from_nano(row.amounts.cost), markups.get(row.customer or "")) for row in rows]
    sums = await guard.lane().call(lambda backend: marked_sums(guard, backend, query), None)
    if sums is None:
        return [None for _ in rows]
    return [sums.cost(row.amounts.cost, model=row.model, day=row.day) for row in rows]


def _plain(amount: Decimal) -> Decimal:
    """The same number without trailing zeros and without an exponent, as `from_nano` writes it."""
    found = amount.normalize(EXACT)
    return found.quantize(Decimal(1), context=EXACT) if found.as_tuple().exponent > 0 else found  # type: ignore[operator]  # finite


# -- who has one of its own ----------------------------------------------------------------------------


async def _marked(backend: Backend) -> set[str] | None:
    """Everybody who may have a markup of its own; None if they are too many."""
    facts = await backend.facts(_SPACE, limit=MAX_OWN + 1)
    return {customer for customer, _ in facts} if len(facts) <= MAX_OWN else None


async def mark(guard: Guard, customer: str, patience: float) -> None:
    """Say that a customer is about to have a markup of its own.

    A mark without a markup costs a look; a markup without a mark would make sums wrong: the mark comes first.
    """
    text = secrets.token_hex(8)  # each is another one, so that `unmark` removes the one it has seen and no other
    await guard.lane().call(lambda backend: backend.set_fact(_SPACE, customer, text), patience)


async def mark_of(guard: Guard, customer: str, patience: float) -> str | None:
    """A customer's mark; to be read before the markup goes."""
    return await guard.lane().call(lambda backend: backend.fact(_SPACE, customer), patience)


async def unmark(guard: Guard, customer: str, seen: str | None, patience: float) -> None:
    """Remove a mark after the markup went, unless somebody else set a new one meanwhile. It names a person."""
    if seen is not None:
        await guard.lane().call(lambda backend: backend.set_fact(_SPACE, customer, None, expected=seen), patience)
