"""What reports add to a customer's costs. Budgets compare what was paid."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING

from respan_guard.backends.base import Backend, CustomerQuery

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["markups_of", "with_markup"]

_FEW = 100
_PAGE = 1_000


def with_markup(cost: Decimal, percentage: Decimal | None) -> Decimal:
    """A cost as reports for the customer show it."""
    return cost if not percentage else cost * (100 + percentage) / 100


async def markups_of(guard: Guard, customers: Collection[str]) -> dict[str, Decimal]:
    """The markups of customers, in percent; those that have none are left out.

    A few are looked up, many are read in order with all that are between them: not more work than the report they
    are for.
    """

    async def look(backend: Backend) -> dict[str, Decimal]:
        found = {customer: guard.policies.markup(None) for customer in customers}
        if len(customers) <= _FEW:
            for customer in customers:
                if (row := await backend.get(customer)) is not None:
                    found[customer] = guard.policies.markup(row.params)
        else:
            query = CustomerQuery(limit=_PAGE)
            while rows := await backend.customers(query):
                found |= {row.customer: guard.policies.markup(row.params) for row in rows if row.customer in found}
                query = replace(query, after=(rows[-1].customer, rows[-1].customer))
        return {customer: markup for customer, markup in found.items() if markup}

    return await guard.lane().call(look, None)
