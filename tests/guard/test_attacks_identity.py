"""Attacks on the engine: who it is that asks, and when."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Guard, StorageUnavailable, Usage
from respan_guard.admitting import entered
from respan_guard.context import Slot
from respan_guard.customer import Customer
from respan_guard.errors import CustomerUnknown
from respan_guard.testing import FakeClock

from .conftest import MakeGuard
from .faulty import FaultyBackend, faulty_guard, live_holds

DIME = Decimal("0.1")


# -- who is it ---------------------------------------------------------------------------------------


async def test_a_deleted_customer_is_unknown_at_once(make_guard: MakeGuard) -> None:
    """With unknown customers refused, what this process remembers of one that another deleted lets nobody in."""
    async with make_guard(unknown_customers="refuse") as guard:
        await guard.put_customer(Customer(customer_identifier="c1", rate_limit=5))
        async with guard.admit("c1"):
            pass
        await guard.lane().call(lambda backend: backend.delete("c1", now=guard.now_ms()))  # by another process
        for _ in range(2):
            with pytest.raises(CustomerUnknown):
                await guard.admit("c1")


async def test_a_clients_word_makes_no_customer_known(make_guard: MakeGuard) -> None:
    """A name that comes with a request puts no stranger into the store where strangers are refused."""
    async with make_guard(unknown_customers="refuse") as guard:
        with pytest.raises(CustomerUnknown):
            await guard.admissions.request(Slot(guard, is_request=True), "stranger", None, {"name": "Me"})
        assert await guard.get_customer("stranger") is None


async def test_two_customers_at_once_in_one_request_are_told_apart_or_absent(make_guard: MakeGuard) -> None:
    """Each task charges its own admission; code that can't tell charges nobody, never somebody else."""
    async with make_guard() as guard:
        slot = Slot(guard, is_request=True)
        both = asyncio.Barrier(3)
        with entered(slot):

            async def work(customer: str) -> None:
                async with guard.admit(customer):
                    await both.wait()
                    await guard.record(Usage(cost=1))
                    await both.wait()

            tasks = [asyncio.create_task(work(name)) for name in ("a", "b")]
            await both.wait()
            assert guard.current() is None
            await guard.record(Usage(cost=5))
            await both.wait()
            await asyncio.gather(*tasks)
        guard.admissions.end(slot)
        await guard.flush()
        found = {row.customer_identifier: row.cost async for row in _by_customer(guard)}
        assert found == {"a": 1, "b": 1, "": 5}


async def _by_customer(guard: Guard) -> Any:
    for row in await guard.usage():
        yield row


async def test_work_that_outlives_its_admission_falls_to_no_other_customer(make_guard: MakeGuard) -> None:
    """A task begun for b within a's request and going on after b's admission charges nobody, not a."""
    async with make_guard() as guard:
        slot = Slot(guard, is_request=True)
        go = asyncio.Event()

        async def later() -> None:
            await go.wait()
            await guard.record(Usage(cost=1))

        with entered(slot):
            await guard.admit("a")
            async with guard.admit("b"):
                task = asyncio.create_task(later())
            go.set()
            await task
            await guard.record(Usage(cost=2))
        guard.admissions.end(slot)
        found = {row.customer_identifier: row.cost for row in await guard.usage()}
        assert found == {"": 1, "a": 2, "b": 0} or found == {"": 1, "a": 2}


async def test_an_id_of_ones_own_still_charges_the_admission(make_guard: MakeGuard) -> None:
    """guard.record(entry_id=...) inside an admission draws from its hold, and another door then books nothing."""
    async with make_guard(default_limits={"total_budget": 1}) as guard:
        slot = Slot(guard, is_request=True)
        with entered(slot):
            await guard.admit("c1", estimate=DIME)
            for _ in range(2):
                await guard.record(Usage("m", 1, 1, cost=DIME), entry_id="mine")
            [limit] = (await guard.status("c1")).limits
            assert (limit.used, limit.held) == (DIME, 0)
            assert slot.recorded
        guard.admissions.end(slot, Usage("m", 1, 1, cost=DIME))
        await guard.flush()
        assert [record.id async for record in guard.records()] == ["own:mine"]


async def test_a_response_is_booked_although_the_app_ended_its_own_admission(make_guard: MakeGuard) -> None:
    """The door's admission, the app's own one released early, or even both ended: one record, one end each."""
    async with make_guard() as guard:
        for end_both in (False, True):
            slot = Slot(guard, is_request=True)
            outer = await guard.admissions.request(slot, "c1")
            with entered(slot):
                inner = await guard.admit("c1", estimate=DIME)
                await inner.release()
                if end_both:
                    await outer.release()
            guard.admissions.end(slot, Usage("m", 1, 1, cost=1))
        await guard.flush()
        assert (await guard.status("c1")).total_spend == 2
        assert await live_holds(guard) == 0


async def test_a_session_that_admits_for_days_does_not_grow(make_guard: MakeGuard) -> None:
    """A WebSocket that admits each message keeps no list of them."""
    async with make_guard() as guard:
        slot = Slot(guard, is_request=True)
        with entered(slot):
            for _ in range(500):
                async with guard.admit("c1"):
                    pass
            assert len(slot.admissions) <= 64
        guard.admissions.end(slot)


# -- time --------------------------------------------------------------------------------------------


async def test_a_clock_that_steps_back_neither_frees_budget_nor_hangs(make_guard: MakeGuard, clock: FakeClock) -> None:
    """Back over midnight and over a period's end, and forward again: the store's time counts, and goes only on."""
    async with make_guard(default_limits={"budget_duration": "daily", "period_budget": 1}) as guard:
        start = clock.now
        clock.advance(86_400)
        async with guard.admit("c1", estimate=Decimal(1)) as admission:
            await admission.record(Usage(cost=1))
        clock.set(start)
        assert not await guard.try_admit("c1", estimate=DIME)
        clock.advance(2 * 86_400)
        assert await guard.try_admit("c1", estimate=DIME)
        assert await guard.verify() == []


async def test_a_customer_never_met_is_not_let_in_blindly_while_storage_is_down(
    store: FaultyBackend, tmp_path: Path
) -> None:
    """Where customers have budgets of their own, one that this process hasn't met may have one, too."""
    async with faulty_guard(tmp_path) as guard:
        await guard.put_customer(Customer(customer_identifier="other", total_budget=1))
        store.error = StorageUnavailable("down")
        with pytest.raises(StorageUnavailable):
            await guard.admit("c1")
