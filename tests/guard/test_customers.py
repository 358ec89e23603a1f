"""Customers through the guard: put, merged, updated, read back; defaults and periods."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import BudgetExceeded, Customer, Guard, RateLimitExceeded, Usage
from respan_guard.context import Slot
from respan_guard.errors import CustomerBlocked, InvalidInput
from respan_guard.testing import FakeClock

from .conftest import MakeGuard


async def request(guard: Guard, customer: str | Customer, **params: object) -> None:
    """A request that brings `customer_params` along, as behind the gateway."""
    slot = Slot(guard, is_request=True)
    try:
        await guard.admissions.request(slot, customer, params=params)
    finally:
        guard.admissions.end(slot)


async def changes(guard: Guard, customer: str) -> int:
    """How often the customer was written."""
    return len(await guard.lane().call(lambda backend: backend.audit(customer=customer)))


async def test_params_of_a_request_become_the_customers(make_guard: MakeGuard) -> None:
    """In trusted mode a request's limits hold from that request on, and absent fields stay."""
    async with make_guard(trust_customer_params=True) as guard:
        await request(guard, "c1", rate_limit=100)
        await request(guard, "c1", period_budget=1000, total_budget=10000, budget_duration="monthly")
        found = await guard.get_customer("c1")
        assert found is not None
        assert (found.rate_limit, found.period_budget, found.total_budget) == (100, Decimal(1000), Decimal(10000))
        with pytest.raises(BudgetExceeded):
            await request(guard, "c1", total_budget=0)


async def test_the_same_params_again_write_nothing_and_restart_nothing(make_guard: MakeGuard, clock: FakeClock) -> None:
    """A defaulted period_start is fixed when the budget is first set, however often requests repeat the budget."""
    async with make_guard(trust_customer_params=True) as guard:
        params = {"period_budget": 5, "budget_duration": "weekly"}
        await request(guard, "c1", **params)
        started = clock.now.date()
        for _ in range(20):
            clock.advance(86_400)
            await request(guard, "c1", **params)
        assert await changes(guard, "c1") == 1
        found = await guard.get_customer("c1")
        assert found is not None
        assert found.period_anchor == started
        assert found.period_start == date.fromordinal(started.toordinal() + 14)


@pytest.mark.parametrize(
    ("now", "zone", "local"),
    [("2026-01-31T20:00", "Pacific/Auckland", "2026-02-01"), ("2026-02-01T03:00", "America/Los_Angeles", "2026-01-31")],
)
async def test_a_budget_that_comes_with_a_zone_starts_on_the_date_of_that_zone(
    make_guard: MakeGuard, clock: FakeClock, now: str, zone: str, local: str
) -> None:
    """Else its periods would begin a day off for ever, and what was spent on the first day would count for none."""
    clock.set(datetime.fromisoformat(now).replace(tzinfo=UTC))
    params: dict[str, Any] = {"time_zone": zone, "period_budget": 10}
    async with make_guard(trust_customer_params=True) as guard:
        await guard.put_customer(Customer(customer_identifier="put", **params))
        await guard.update_customer("updated", **params)
        await request(guard, "merged", **params)
        for name in ("put", "updated", "merged"):
            found = await guard.get_customer(name)
            assert found is not None
            assert str(found.period_anchor) == local
            async with guard.admit(name, estimate=Decimal(10)) as admission:
                await admission.record(Usage(cost=10))
        clock.advance(6 * 3600)
        for name in ("put", "updated", "merged"):
            with pytest.raises(BudgetExceeded):
                await guard.admit(name)


async def test_a_budget_that_comes_as_the_zone_goes_starts_on_the_date_of_the_guards(
    make_guard: MakeGuard, clock: FakeClock
) -> None:
    """What holds after the change decides, also where a field is removed."""
    clock.set(datetime(2026, 1, 31, 20, tzinfo=UTC))
    async with make_guard(default_limits={"time_zone": "Europe/Berlin"}) as guard:
        await guard.update_customer("c1", time_zone="Pacific/Auckland")
        await guard.update_customer("c1", time_zone=None, period_budget=5)
        found = await guard.get_customer("c1")
        assert found is not None
        assert str(found.period_anchor) == "2026-01-31"


async def test_a_period_that_was_read_is_written_back_with_another_zone(
    make_guard: MakeGuard, clock: FakeClock
) -> None:
    """What was read is the current period by the old zone; where the new one is a day ahead it is no new anchor."""
    clock.set(datetime(2026, 1, 31, 12, tzinfo=UTC))
    async with make_guard() as guard:
        await guard.update_customer("c1", period_budget=5)
        clock.set(datetime(2026, 3, 30, 20, tzinfo=UTC))
        read = await guard.get_customer("c1")
        assert read is not None
        assert (str(read.period_start), str(read.period_end)) == ("2026-02-28", "2026-03-31")
        await guard.update_customer(
            "c1", time_zone="Pacific/Auckland", period_start=read.period_start, period_end=read.period_end
        )
        found = await guard.get_customer("c1")
        assert found is not None
        assert str(found.period_anchor) == "2026-01-31"


async def test_what_the_app_sets_on_a_customer_holds_none_and_false_too(make_guard: MakeGuard) -> None:
    """A callable given as `identify` blocks and unblocks, limits and frees; the same again writes nothing."""
    async with make_guard() as guard:
        with pytest.raises(CustomerBlocked):
            await request(guard, Customer(customer_identifier="c1", blocked=True, total_budget=0, name="Acme"))
        for _ in range(3):
            await request(guard, Customer(customer_identifier="c1", blocked=False, total_budget=None))
        found = await guard.get_customer("c1")
        assert found is not None
        assert (found.blocked, found.total_budget, found.name) == (False, None, "Acme")
        assert await changes(guard, "c1") == 2


async def test_what_the_app_leaves_out_of_a_customer_stays(make_guard: MakeGuard) -> None:
    """Fields that a callable doesn't set are those that were stored by others: a block, too."""
    async with make_guard() as guard:
        await guard.put_customer(Customer(customer_identifier="c1", blocked=True, rate_limit=3))
        for customer in (Customer(customer_identifier="c1"), Customer(customer_identifier="c1", name="Acme")):
            with pytest.raises(CustomerBlocked):
                await request(guard, customer)
        found = await guard.get_customer("c1")
        assert found is not None
        assert (found.blocked, found.rate_limit, found.name) == (True, 3, "Acme")


@pytest.mark.parametrize(
    "params",
    [
        {"period_budget": 5, "budget_duration": None, "period_start": None, "period_end": None, "rate_limit": None},
        {"period_budget": 5, "budget_duration": "weekly", "period_start": "2026-01-05", "period_end": "2026-01-12"},
        {"period_budget": 5, "period_start": "2026-01-05", "period_end": "2026-01-15", "metadata": {}},
        {"name": None, "blocked": False, "period_budget": None, "time_zone": None},
    ],
)
async def test_the_same_customer_again_writes_nothing_and_restarts_nothing(
    make_guard: MakeGuard, clock: FakeClock, params: dict[str, Any]
) -> None:
    """An app that hands on each column of its table, empty ones too, does so with every request, for months."""
    async with make_guard() as guard:
        await request(guard, Customer(customer_identifier="c1", **params))
        first, written = await guard.get_customer("c1"), await changes(guard, "c1")
        assert first is not None
        for _ in range(20):
            clock.advance(86_400)
            await request(guard, Customer(customer_identifier="c1", **params))
        found = await guard.get_customer("c1")
        assert found is not None
        assert found.to_params() == first.to_params()
        assert await changes(guard, "c1") == written


async def test_a_customer_that_was_read_is_handed_on_unchanged(make_guard: MakeGuard, clock: FakeClock) -> None:
    """The period that a read shows is no new anchor when a callable answers with what it read."""
    async with make_guard() as guard:
        await guard.put_customer(Customer(customer_identifier="c1", period_budget=5, period_start="2025-12-31"))
        read = await guard.get_customer("c1")
        assert read is not None
        await request(guard, read)
        clock.advance(60 * 86_400)
        await request(guard, read)
        assert await changes(guard, "c1") == 1


async def test_concurrent_requests_with_different_params_all_count(make_guard: MakeGuard) -> None:
    """Each merge is retried on what the other one stored; no field is lost."""
    async with make_guard(trust_customer_params=True) as guard:
        await asyncio.gather(
            request(guard, "c1", rate_limit=100),
            request(guard, "c1", total_budget=7),
            request(guard, "c1", period_budget=5),
            request(guard, "c1", name="Acme"),
            request(guard, "c1", markup_percentage=20),
        )
        found = await guard.get_customer("c1")
        assert found is not None
        assert (found.rate_limit, found.total_budget, found.period_budget) == (100, Decimal(7), Decimal(5))
        assert (found.name, found.markup_percentage) == ("Acme", Decimal(20))


async def test_without_trust_a_request_sets_no_limits_and_renames_nobody(make_guard: MakeGuard) -> None:
    """A client's word on limits is ignored; a name is taken once, for a customer that has none."""
    async with make_guard() as guard:
        await request(guard, "c1", rate_limit=1_000_000, total_budget=9, name="Acme")
        await request(guard, "c1", name="Somebody else", email="it@acme.example")
        found = await guard.get_customer("c1")
        assert found is not None
        assert (found.rate_limit, found.total_budget) == (None, None)
        assert (found.name, found.email) == ("Acme", "it@acme.example")


async def test_params_that_cannot_work_refuse_the_request_and_change_nothing(make_guard: MakeGuard) -> None:
    """Bad params are an error of the request, and neither they nor the request leave a trace."""
    async with make_guard(trust_customer_params=True) as guard:
        await request(guard, "c1", rate_limit=5)
        bad: list[dict[str, object]] = [
            {"rate_limit": -1},
            {"period_budget": "NaN"},
            {"budget_duration": "fortnightly"},
            {"period_start": "2026-02-01", "period_end": "2026-01-01"},
            {"unheard_of": 1},
        ]
        for params in bad:
            with pytest.raises(InvalidInput):
                await request(guard, "c1", **params)
        assert await changes(guard, "c1") == 1
        assert (await guard.status("c1")).total_requests == 1


async def test_putting_a_customer_again_goes_on_with_its_period(make_guard: MakeGuard, clock: FakeClock) -> None:
    """A deployment script that puts its customers at every start restarts no budget."""
    async with make_guard() as guard:
        customer = Customer(customer_identifier="c1", budget_duration="monthly", period_budget=5)
        await guard.put_customer(customer)
        started = clock.now.date()
        clock.advance(10 * 86_400)
        await guard.put_customer(customer)
        found = await guard.get_customer("c1")
        assert found is not None
        assert found.period_anchor == started
        await guard.put_customer(found)
        assert await changes(guard, "c1") == 1


async def test_none_removes_a_limit_and_the_default_applies_again(make_guard: MakeGuard) -> None:
    """update_customer changes single fields; without a limit of its own a customer has the default one."""
    async with make_guard(default_limits={"total_budget": 1}) as guard:
        await guard.put_customer(Customer(customer_identifier="c1", total_budget=10, name="Acme"))
        await guard.record(Usage(cost=5), "c1")
        async with guard.admit("c1"):
            pass
        updated = await guard.update_customer("c1", total_budget=None)
        assert (updated.total_budget, updated.name) == (None, "Acme")
        with pytest.raises(BudgetExceeded):
            await guard.admit("c1")
        with pytest.raises(InvalidInput, match="budgte"):
            await guard.update_customer("c1", budgte=1)


async def test_a_period_rolls_over_by_itself(make_guard: MakeGuard, clock: FakeClock) -> None:
    """A budget from 31 January renews on 28 February and 31 March; nothing has to run at midnight."""
    clock.set(datetime(2026, 1, 31, 12, tzinfo=UTC))
    async with make_guard() as guard:
        await guard.put_customer(Customer(customer_identifier="c1", budget_duration="monthly", period_budget=1))
        for refused, admitted in (
            (datetime(2026, 2, 27, 23, 59, tzinfo=UTC), datetime(2026, 2, 28, tzinfo=UTC)),
            (datetime(2026, 3, 30, 23, 59, tzinfo=UTC), datetime(2026, 3, 31, tzinfo=UTC)),
        ):
            async with guard.admit("c1") as admission:
                await admission.record(Usage(cost=1))
            clock.set(refused)
            with pytest.raises(BudgetExceeded) as error:
                await guard.admit("c1")
            assert error.value.decision.resets_at == admitted
            clock.set(admitted)
        async with guard.admit("c1"):
            pass
        assert (await guard.status("c1")).total_spend == 2


async def test_days_begin_in_the_customers_own_time_zone(make_guard: MakeGuard, clock: FakeClock) -> None:
    """A daily budget of a customer in Auckland renews at midnight there."""
    clock.set(datetime(2026, 1, 15, 10, 59, tzinfo=UTC))
    async with make_guard() as guard:
        await guard.put_customer(
            Customer(customer_identifier="c1", budget_duration="daily", period_budget=1, time_zone="Pacific/Auckland")
        )
        async with guard.admit("c1") as admission:
            await admission.record(Usage(cost=1))
        with pytest.raises(BudgetExceeded):
            await guard.admit("c1")
        clock.advance(60)
        async with guard.admit("c1"):
            pass


async def test_a_changed_duration_counts_what_was_spent_before(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Going from daily to monthly starts nothing anew: the month's days are summed."""
    async with make_guard() as guard:
        await guard.put_customer(Customer(customer_identifier="c1", budget_duration="daily", period_budget=5))
        await guard.record(Usage(cost=4), "c1")
        clock.advance(86_400)
        await guard.update_customer("c1", budget_duration="monthly")
        limit = (await guard.status("c1")).limit("period_budget")
        assert limit is not None
        assert (limit.used, limit.remaining) == (Decimal(4), Decimal(1))


async def test_customers_are_listed_page_by_page_with_what_they_used(make_guard: MakeGuard) -> None:
    """Sorted by cost, the dearest first; each page goes on behind the last row of the one before."""
    async with make_guard() as guard:
        for number in range(7):
            await guard.record(Usage(cost=number % 3), f"c{number}")
        await guard.put_customer(Customer(customer_identifier="c1", name="Zed", markup_percentage=50))
        seen = []
        page = await guard.list_customers(sort="cost", descending=True, limit=3)
        while page:
            seen += page
            page = await guard.list_customers(sort="cost", descending=True, limit=3, after=seen[-1])
        assert [row.cost for row in seen] == [2, 2, 1, 1, 0, 0, 0]
        assert len({row.customer.customer_identifier for row in seen}) == 7
        [zed] = await guard.list_customers(search="zed")
        assert (zed.cost, zed.cost_with_markup) == (Decimal(1), Decimal("1.5"))
        with pytest.raises(InvalidInput, match="sort"):
            await guard.list_customers(sort="colour")


async def test_a_deletion_takes_along_what_is_not_written_yet(make_guard: MakeGuard) -> None:
    """Refusals are written a second after they are counted: by then the label stands for the customer."""
    async with make_guard(default_limits={"rate_limit": 0}) as guard:
        await guard.record(Usage(cost=1), "joe@example.com")
        for _ in range(3):
            with pytest.raises(RateLimitExceeded):
                await guard.admit("joe@example.com")
        await guard.delete_customer("joe@example.com")
        await guard.flush()
        rows = await guard.lane().call(lambda backend: backend.refusals())
        assert [(row.customer[:8], row.count) for row in rows] == [("deleted-", 3)]


async def test_what_was_so_before_the_deletion_makes_nobody_anew(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Params that are older than the deletion are dropped, trusted or not, also where the id is in use again."""
    given = {"name": "Joe", "email": "joe@example.com", "rate_limit": 5}
    async with make_guard() as guard:
        await guard.put_customer(Customer(customer_identifier="c1", name="Joe"))
        before = guard.now_ms()
        clock.advance(60)
        await guard.delete_customer("c1")
        clock.advance(60)
        for trusted in (True, False):
            await guard.customers.merge("c1", given, trusted=trusted, at_ms=before)
            assert await guard.get_customer("c1") is None
            assert await changes(guard, "c1") == 0
        await guard.put_customer(Customer(customer_identifier="c1", rate_limit=7))
        await guard.customers.merge("c1", given, trusted=True, at_ms=before)
        found = await guard.get_customer("c1")
        assert found is not None
        assert (found.name, found.rate_limit) == (None, 7)
        await guard.customers.merge("c1", given, trusted=False, at_ms=guard.now_ms())
        found = await guard.get_customer("c1")
        assert found is not None
        assert found.name == "Joe"


async def test_a_deletion_reaches_the_dead_letters_on_disk(make_guard: MakeGuard) -> None:
    """What storage would not take lies in a file, and names nobody once its customer is deleted."""
    async with make_guard() as guard:
        await guard.record(Usage(cost=1), "joe@example.com")
        noted = Usage(cost=1, metadata={"mail": "joe@example.com"})
        guard.journal.bury(guard.make_entry(noted, "joe@example.com", source="manual"), "its day is pruned")
        assert "joe" in guard.journal.dead_letters.read_text()
        await guard.delete_customer("joe@example.com")
        assert "joe" not in guard.journal.dead_letters.read_text()
        assert guard.journal.waiting().dead == 1


def test_a_script_deletes_a_customer_and_its_dead_letters(make_guard: MakeGuard) -> None:
    """`guard.sync` has no event loop where the store is in memory, and does all the same."""
    with make_guard().sync as sync:
        guard = sync._guard
        sync.record(Usage(cost=1), "joe@example.com")
        guard.journal.bury(guard.make_entry(Usage(cost=1), "joe@example.com", source="manual"), "its day is pruned")
        assert sync.delete_customer("joe@example.com")
        assert "joe" not in guard.journal.dead_letters.read_text()
        assert guard.journal.waiting().dead == 1
        assert sync.get_customer("joe@example.com") is None


async def test_the_blocking_form_on_a_loop_deletes_a_customer_in_memory(tmp_path: Path) -> None:
    """A store in memory makes nobody wait, so it may be used from a coroutine, too."""
    guard = Guard("memory://", journal_dir=tmp_path)
    guard.sync.put_customer(Customer(customer_identifier="c1", rate_limit=3))
    assert guard.sync.delete_customer("c1")
