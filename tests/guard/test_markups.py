"""Reports show what was paid and what it is with the customer's markup."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import pytest

from respan_guard import Customer, Guard, Usage
from respan_guard import markups as markups_module


@pytest.mark.parametrize("few", [100, 1])
async def test_reports_show_the_markup(
    make_guard: Callable[..., Guard], monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    """A customer's own, else that of the default limits; sums over several have none; budgets don't see it."""
    monkeypatch.setattr(markups_module, "_FEW", few)
    monkeypatch.setattr(markups_module, "_PAGE", 2)
    async with make_guard(default_limits={"markup_percentage": 50}) as guard:
        await guard.put_customer(Customer(customer_identifier="own", markup_percentage="12.5", total_budget=8))
        await guard.put_customer(Customer(customer_identifier="zero", markup_percentage=0))
        for name in ("own", "zero", "default", "another"):
            await guard.record(Usage(model="m", cost=8), name)
        await guard.record(Usage(model="m", cost=8))
        marked = {row.customer_identifier: row.cost_with_markup for row in await guard.usage()}
        assert marked == {"own": 9, "zero": 8, "default": 12, "another": 12, "": 8}
        by_model = await guard.usage("model", "customer")
        assert {row.customer_identifier: row.cost_with_markup for row in by_model} == marked
        (of_one,) = await guard.usage("day", customer_identifier="own")
        assert (of_one.cost, of_one.cost_with_markup) == (Decimal(8), Decimal(9))
        assert [row.cost_with_markup for row in await guard.usage("model")] == [None]
        reports = {row.customer.customer_identifier: row.cost_with_markup for row in await guard.list_customers()}
        assert {name: cost for name, cost in reports.items() if name} == {n: c for n, c in marked.items() if n}
        assert (await guard.status("own")).total_spend == 8
