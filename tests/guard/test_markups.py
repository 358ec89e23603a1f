"""Reports show what was paid and what it is with the customers' markup."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from typing import Any

import pytest

from respan_guard import Customer, Guard, Usage
from respan_guard import markups as markups_module
from respan_guard.errors import StorageUnavailable
from respan_guard.markups import all_markups, markups_of
from respan_guard.testing import FakeClock

from .faulty import FaultyBackend

MakeGuard = Callable[..., Guard]


async def marks(guard: Guard) -> list[str]:
    """Whom the store has marked as having a markup of its own."""
    return [customer for customer, _ in await guard.lane().call(lambda backend: backend.facts("markups"))]


@pytest.mark.parametrize("at_once", [1000, 2])
async def test_reports_show_the_markup(make_guard: MakeGuard, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """A customer's own, else that of the default limits, also of nobody's usage; budgets don't see it."""
    monkeypatch.setattr(markups_module, "_AT_ONCE", at_once)
    async with make_guard(default_limits={"markup_percentage": 50}) as guard:
        await guard.put_customer(Customer(customer_identifier="own", markup_percentage="12.5", total_budget=8))
        await guard.put_customer(Customer(customer_identifier="zero", markup_percentage=0))
        for name in ("own", "zero", "default", "another"):
            await guard.record(Usage(model="m", cost=8), name)
        await guard.record(Usage(model="m", cost=8))
        marked = {row.customer_identifier: row.cost_with_markup for row in await guard.usage()}
        assert marked == {"own": 9, "zero": 8, "default": 12, "another": 12, "": 12}
        by_model = await guard.usage("model", "customer")
        assert {row.customer_identifier: row.cost_with_markup for row in by_model} == marked
        (of_one,) = await guard.usage("day", customer_identifier="own")
        assert (of_one.cost, of_one.cost_with_markup) == (Decimal(8), Decimal(9))
        reports = {row.customer.customer_identifier: row.cost_with_markup for row in await guard.list_customers()}
        assert reports == marked
        assert (await guard.status("own")).total_spend == 8


@pytest.mark.parametrize("at_once", [1000, 2])
@pytest.mark.parametrize("default", [None, 0, "7.5"])
async def test_sums_over_several_customers(
    make_guard: MakeGuard, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, default: object, at_once: int
) -> None:
    """By model, by day, by both, or of one model and a range: what the customers' own reports add up to, exactly.

    And however many have a markup of their own: those of one percentage are summed by storage, others one by one.
    """
    monkeypatch.setattr(markups_module, "_AT_ONCE", at_once)
    limits = None if default is None else {"markup_percentage": default}
    async with make_guard(default_limits=limits) as guard:
        for name, markup in (("a", "20"), ("b", "33.333"), ("c", "0"), ("d", "7.5"), ("e", None), ("f", "20")):
            await guard.put_customer(Customer(customer_identifier=name, markup_percentage=markup))
        for day in range(3):
            for number, whose in enumerate(("a", "b", "c", "d", "e", "f", "stranger", None)):
                for model in ("m", "n")[: 1 + number % 2]:
                    await guard.record(Usage(model=model, cost=Decimal(f"0.00{day}00{number}007")), whose)
            clock.advance(86_400)
        for by in (("model",), ("day",), ("model", "day"), ("day", "model")):
            asked: dict[str, Any]
            for asked in ({}, {"model": "n"}, {"since": date(2026, 1, 16), "until": date(2026, 1, 17)}):
                expected: defaultdict[object, Decimal] = defaultdict(Decimal)
                for row in await guard.usage("customer", *by, **asked):
                    assert row.cost_with_markup is not None
                    expected[row.model, row.day] += row.cost_with_markup
                found = await guard.usage(*by, **asked)
                assert {(row.model, row.day): row.cost_with_markup for row in found} == expected, (by, asked)
                assert len(found) == len(expected) > 0


async def test_where_nobody_has_a_markup_a_sum_is_what_was_paid(make_guard: MakeGuard) -> None:
    """Then it costs one read more, and no customer is looked at."""
    async with make_guard() as guard:
        for name in ("a", "b"):
            await guard.put_customer(Customer(customer_identifier=name, total_budget=9))
            await guard.record(Usage(model="m", cost="0.1"), name)
        (row,) = await guard.usage("model")
        assert (row.cost, row.cost_with_markup) == (Decimal("0.2"), Decimal("0.2"))
        assert await marks(guard) == []
        assert not await all_markups(guard, guard.lane())


class TestMarks:
    """Who has a markup of its own is marked, and nobody else for long."""

    async def test_a_mark_comes_and_goes_with_the_markup(self, make_guard: MakeGuard) -> None:
        """Put, updated, taken away, deleted; a mark names the customer, so a deleted one leaves none."""
        async with make_guard() as guard:
            await guard.put_customer(Customer(customer_identifier="c", total_budget=5))
            assert await marks(guard) == []
            await guard.update_customer("c", markup_percentage=10)
            assert await marks(guard) == ["c"]
            await guard.update_customer("c", markup_percentage=20, name="See")
            assert await marks(guard) == ["c"]
            await guard.update_customer("c", markup_percentage=None)
            assert await marks(guard) == []
            await guard.put_customer(Customer(customer_identifier="c", markup_percentage=0))
            assert await marks(guard) == ["c"]
            await guard.put_customer(Customer(customer_identifier="c"))
            assert await marks(guard) == []
            await guard.put_customer(Customer(customer_identifier="c", markup_percentage=5))
            assert await guard.delete_customer("c")
            assert await marks(guard) == []
            assert await markups_of(guard, {"c"}) == {}

    async def test_from_requests(self, make_guard: MakeGuard) -> None:
        """Params that came with a request mark as well."""
        async with make_guard() as guard:
            await guard.customers.merge("c", {"markup_percentage": "15"}, trusted=True)
            assert await marks(guard) == ["c"]

    async def test_a_deletion_does_not_take_a_new_mark_along(self, make_guard: MakeGuard) -> None:
        """Whoever is made anew while being deleted stays marked, wherever the two meet."""
        async with make_guard() as guard:
            for number in range(20):
                name = f"c{number}"
                await guard.put_customer(Customer(customer_identifier=name, markup_percentage=5))

                async def slow_delete(name: str = name, number: int = number) -> None:
                    await asyncio.sleep(number % 5 * 0.001)
                    await guard.delete_customer(name)

                again = Customer(customer_identifier=name, markup_percentage=10, total_budget=number + 1)
                await asyncio.gather(slow_delete(), guard.put_customer(again))
                found = await guard.get_customer(name)
                has = found is not None and found.markup_percentage is not None
                assert not has or name in await marks(guard)

    async def test_a_new_customer_is_marked_twice(self, make_guard: MakeGuard, monkeypatch: pytest.MonkeyPatch) -> None:
        """What deletes a customer that is only being made sees its first mark; the second stays."""
        async with make_guard() as guard:
            write = guard.customers._write

            async def deleted_before(*args: object) -> object:
                monkeypatch.setattr(guard.customers, "_write", write)
                seen = await markups_module.mark_of(guard, "c", 1)
                written = await write(*args)  # type: ignore[arg-type]
                await markups_module.unmark(guard, "c", seen, 1)
                return written

            monkeypatch.setattr(guard.customers, "_write", deleted_before)
            await guard.put_customer(Customer(customer_identifier="c", markup_percentage=5))
            assert await marks(guard) == ["c"]

    async def test_a_mark_without_a_markup_does_no_harm(self, make_guard: MakeGuard) -> None:
        """As a crash between the two leaves it."""
        async with make_guard(default_limits={"markup_percentage": 10}) as guard:
            await markups_module.mark(guard, "c", 1)
            await markups_module.mark(guard, "never seen", 1)
            await guard.record(Usage(model="m", cost=1), "c")
            assert [row.cost_with_markup for row in await guard.usage("model")] == [Decimal("1.1")]

    async def test_no_markup_without_its_mark(
        self, store: FaultyBackend, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the mark can't be written, the markup isn't."""
        async with Guard("faulty://one", clock=clock) as guard:
            await guard.put_customer(Customer(customer_identifier="c"))

            async def down(*args: object) -> None:
                raise StorageUnavailable("down")

            monkeypatch.setattr(markups_module, "mark", down)
            monkeypatch.setattr("respan_guard.customers.mark", down)
            with pytest.raises(StorageUnavailable):
                await guard.update_customer("c", markup_percentage=10)
            found = await guard.get_customer("c")
            assert found is not None
            assert found.markup_percentage is None
