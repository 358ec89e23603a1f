"""What reports add to customers' costs. Budgets compare what was paid.

A sum over several customers is marked up from sums that are kept anyway: all of it by the markup of the default
limits, and on top, for those customers whose own markup differs, the difference on what they cost. Those customers are
known by marks, facts that are set before a customer first gets a markup of its own and go when it loses it. So a
report costs one read where nobody has one, else what it costs to read the rollups of those who have, two hundred
of them at once, so that no statement holds up others for long: it does not grow with records, nor with other customers.
Sums by hour are kept of all customers together only, so theirs are added up from their entries of those hours.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from respan_guard.backends.base import Backend, CustomerQuery, UsageQuery, UsageRow
from respan_guard.money import EXACT, from_nano, plus_percent

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = [
    "MARKUP", "MarkedSums", "Markups", "Reads", "all_markups", "any_markup", "costs_with_markup", "mark", "mark_of",
    "marked_sums", "markups_in", "markups_of", "unmark", "with_markup",
]  # fmt: skip

MARKUP: Final = "markup_percentage"
"""The field of a customer."""

_SPACE = "markups"
_AT_ONCE = 200  # customers that one statement is about; of more, Redis would read the whole log for hours
_MOST = 1_000_000
_TIMEOUT = 60.0

T = TypeVar("T")


class Reads(Protocol):
    """A way to storage, as `Lane` is one, for who has much to ask: between two calls others come to it."""

    async def call(self, work: Callable[[Backend], Awaitable[T]], timeout: float | None = ..., /) -> T:  # noqa: ASYNC109
        """Run some reads."""
        ...


def with_markup(cost: Decimal, percentage: Decimal | None) -> Decimal:
    """A cost as reports for the customer show it."""
    return plus_percent(cost, percentage)


async def markups_of(guard: Guard, customers: Collection[str]) -> dict[str, Decimal]:
    """The markups of customers, in percent; those that have none are left out."""
    return await guard.lane().call(lambda backend: markups_in(guard, backend, customers), None)


async def markups_in(guard: Guard, backend: Backend, customers: Collection[str]) -> dict[str, Decimal]:
    """The same for whoever has the store in hand."""
    found: dict[str, Decimal | None] = dict.fromkeys(customers, guard.policies.markup(None))
    for names in _batches(sorted(found)):
        for row in await backend.customers(CustomerQuery(among=names, limit=len(names))):
            found[row.customer] = guard.policies.markup(row.params)
    return {customer: markup for customer, markup in found.items() if markup}


# -- sums over several customers -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Markups:
    """What everybody pays on top, and those customers who pay more or less than that, in percent."""

    default: Decimal
    own: Mapping[str, Decimal]

    def __bool__(self) -> bool:
        return bool(self.default or self.own)


async def any_markup(guard: Guard, backend: Backend) -> bool:
    """Whether anybody has a markup, or had one a moment ago."""
    return bool(guard.policies.markup(None)) or bool(await backend.facts(_SPACE, limit=1))


async def all_markups(guard: Guard, reads: Reads) -> Markups:
    """The markups of all customers."""
    default = guard.policies.markup(None) or Decimal(0)
    own: dict[str, Decimal] = {}

    async def page(backend: Backend) -> list[tuple[str, str]]:
        marks = await backend.facts(_SPACE, after=after, limit=_AT_ONCE)
        names = tuple(name for name, _ in marks)
        for row in await backend.customers(CustomerQuery(among=names, limit=len(names))) if names else ():
            markup = guard.policies.markup(row.params) or Decimal(0)
            if markup != default:
                own[row.customer] = markup
        return marks

    after = ""
    while len(marks := await reads.call(page, _TIMEOUT)) == _AT_ONCE:
        after = marks[-1][0]
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

    async def add(self, reads: Reads, own: Mapping[str, Decimal]) -> None:
        """Add what customers pay on top: each its percentage."""
        query = replace(self._of, top=None, distinct=False, limit=_MOST)
        for names in _batches(sorted(own, key=lambda name: (own[name], name))):  # most of them of one percentage
            one = own[names[0]] == own[names[-1]]
            some = replace(query, by=query.by if one else (*query.by, "customer"), among=names)
            for row in await reads.call(partial(_usage, some), _TIMEOUT):
                nano = EXACT.multiply(row.amounts.cost, own[row.customer or "" if not one else names[0]])
                when = row.hour if row.day is None else row.day
                for place in {(row.model, when), (None, when), (row.model, None), (None, None)}:
                    self._more[place] = EXACT.add(self._more.get(place, Decimal(0)), nano)  # a hundredth, at the end

    def cost(self, nano: int, *, model: str | None = None, when: int | None = None) -> Decimal:
        """What was paid, with markup: in all, or of a model, a day or an hour that the query groups by."""
        more = self._more.get((model, when), Decimal(0)).scaleb(-11, EXACT)
        return _plain(EXACT.add(with_markup(from_nano(nano), self._percentage), more))


async def marked_sums(guard: Guard, reads: Reads, query: UsageQuery, markups: Markups | None = None) -> MarkedSums:
    """The marked-up sums of a query that does not group by customer.

    Of markups that were read before, it makes no second read.
    """
    if query.customer is not None:
        found = await markups_of(guard, {query.customer})
        return MarkedSums(found.get(query.customer), query)
    if markups is None:
        markups = await all_markups(guard, reads)
    default = markups.default
    sums = MarkedSums(default, query)
    await sums.add(reads, {name: EXACT.subtract(markup, default) for name, markup in markups.own.items()})
    return sums


async def costs_with_markup(guard: Guard, query: UsageQuery, rows: Sequence[UsageRow]) -> list[Decimal]:
    """For each row that a query found, its cost with markup."""
    if not rows:
        return []
    if "customer" in query.by:
        markups = await markups_of(guard, {row.customer or "" for row in rows})
        return [with_markup(from_nano(row.amounts.cost), markups.get(row.customer or "")) for row in rows]
    sums = await marked_sums(guard, guard.lane(), query)
    return [sums.cost(row.amounts.cost, model=row.model, when=row.day) for row in rows]


async def _usage(query: UsageQuery, backend: Backend) -> list[UsageRow]:
    return await backend.usage(query)


def _batches(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(names[at : at + _AT_ONCE]) for at in range(0, len(names), _AT_ONCE))


def _plain(amount: Decimal) -> Decimal:
    """The same number without trailing zeros and without an exponent, as `from_nano` writes it."""
    found = amount.normalize(EXACT)
    return found.quantize(Decimal(1), context=EXACT) if found.as_tuple().exponent > 0 else found  # type: ignore[operator]  # finite


# -- who has one of its own ----------------------------------------------------------------------------


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
