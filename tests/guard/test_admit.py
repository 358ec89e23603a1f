"""Admission through the guard: limits, nesting, modes and refusals."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import (
    BudgetExceeded,
    Customer,
    CustomerBlocked,
    Guard,
    RateLimitExceeded,
    Refusal,
    Usage,
)
from respan_guard.errors import CustomerUnknown, InvalidIdentifier, InvalidInput, UnpricedModel
from respan_guard.testing import FakeClock

from .conftest import MakeGuard


async def test_the_request_after_the_limit_is_refused_until_the_wait_is_over(
    make_guard: MakeGuard, clock: FakeClock
) -> None:
    """100 requests a minute admit 100; the 101st is refused, and passes exactly when it was told to come back."""
    async with make_guard(default_limits={"rate_limit": 100}) as guard:
        for _ in range(100):
            async with guard.admit("c1"):
                pass
        with pytest.raises(RateLimitExceeded) as refused:
            async with guard.admit("c1"):
                pass
        wait = refused.value.retry_after
        assert wait is not None
        clock.advance(wait - 0.001)
        assert not await guard.try_admit("c1")
        clock.advance(0.001)
        async with guard.admit("c1") as admission:
            assert admission.decision.allowed


async def test_a_spent_budget_refuses_and_says_when_it_resets(make_guard: MakeGuard) -> None:
    """When the period's dollars are gone the next admission is a BudgetExceeded that is not transient."""
    async with make_guard(default_limits={"budget_duration": "monthly", "period_budget": 5}) as guard:
        async with guard.admit("c1") as admission:
            await admission.record(Usage(model="flux", cost=Decimal(5)))
        with pytest.raises(BudgetExceeded) as refused:
            await guard.admit("c1")
        assert refused.value.decision.reason == "exhausted"
        assert refused.value.retry_after is None
        assert str(refused.value.decision.resets_at) == "2026-02-01 00:00:00+00:00"


async def test_a_budget_full_of_holds_is_transient(make_guard: MakeGuard) -> None:
    """A request that only others' holds keep out is refused as transient and passes once they ended for less."""
    async with make_guard(default_limits={"total_budget": 1}) as guard:
        async with guard.admit("c1", estimate=Decimal("0.9")) as first:
            refused = await guard.try_admit("c1", estimate=Decimal("0.2"))
            assert isinstance(refused, Refusal)
            assert refused.decision.reason == "held"
            assert refused.decision.transient
            assert refused.retry_after
            await first.record(Usage(cost=Decimal("0.1")))
        admitted = await guard.try_admit("c1", estimate=Decimal("0.2"))
        assert admitted


async def test_unknown_customers_first_concurrent_requests_get_the_default_budget(make_guard: MakeGuard) -> None:
    """64 concurrent first requests of a customer whose default budget is below one request: none is admitted."""
    async with make_guard(default_limits={"period_budget": Decimal("0.01")}) as guard:
        answers = await asyncio.gather(*[guard.try_admit("new", estimate=Decimal("0.02")) for _ in range(64)])
        assert not any(answers)
        assert (await guard.status("new")).total_requests == 0


async def test_concurrent_admissions_hold_exactly_the_budget(make_guard: MakeGuard) -> None:
    """200 concurrent admissions of a tenth of a budget: exactly 10 are admitted."""
    async with make_guard(default_limits={"total_budget": 1}) as guard:
        answers = await asyncio.gather(*[guard.try_admit("c1", estimate=Decimal("0.1")) for _ in range(200)])
        assert sum(1 for answer in answers if answer) == 10


async def test_a_nested_admission_of_the_same_customer_counts_once_for_the_rate(make_guard: MakeGuard) -> None:
    """Only the outermost admission counts against the rate; an inner one still asks for its own hold."""
    async with make_guard(default_limits={"rate_limit": 1, "total_budget": 1}) as guard:
        async with guard.admit("c1"):
            async with guard.admit("c1", estimate=Decimal("0.4")):
                assert not await guard.try_admit("c1", estimate=Decimal("0.7"))
            assert guard.current() is not None
        assert (await guard.status("c1")).total_requests == 1
        assert guard.current() is None


async def test_a_blocked_customer_is_refused_and_an_unblocked_one_is_not(make_guard: MakeGuard) -> None:
    """Blocking holds from the next admission on, and so does unblocking."""
    async with make_guard() as guard:
        await guard.put_customer(Customer(customer_identifier="c1", blocked=True))
        with pytest.raises(CustomerBlocked):
            await guard.admit("c1")
        await guard.update_customer("c1", blocked=False)
        async with guard.admit("c1"):
            pass


async def test_a_change_by_another_process_takes_effect_with_the_next_admission(tmp_path: Path) -> None:
    """A policy is never stale: the store answers a cached one with the new one, before anything is admitted."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    async with Guard(url, clock=FakeClock()) as guard, Guard(url, clock=FakeClock()) as other:
        async with guard.admit("c1"):
            pass
        await other.put_customer(Customer(customer_identifier="c1", rate_limit=0))
        with pytest.raises(RateLimitExceeded):
            await guard.admit("c1")
        await other.update_customer("c1", rate_limit=None)
        async with guard.admit("c1"):
            pass


async def test_unknown_customers_can_be_refused(make_guard: MakeGuard) -> None:
    """With unknown_customers="refuse" only customers that were put are admitted, and asking creates nothing."""
    async with make_guard(unknown_customers="refuse") as guard:
        with pytest.raises(CustomerUnknown):
            await guard.admit("stranger")
        assert await guard.get_customer("stranger") is None
        await guard.put_customer(Customer(customer_identifier="c1"))
        async with guard.admit("c1"):
            pass


async def test_shadow_mode_decides_reports_and_refuses_nobody(make_guard: MakeGuard) -> None:
    """In shadow mode a refused request goes on, its decision says why, and the refusal is counted."""
    async with make_guard(mode="shadow", default_limits={"rate_limit": 1}) as guard:
        async with guard.admit("c1"):
            pass
        async with guard.admit("c1") as admission:
            assert admission.decision.shadow
            assert admission.decision.reason == "rate"
            await admission.record(Usage(cost=Decimal(1)))
        await guard.flush()
        rows = await guard.lane().call(lambda backend: backend.refusals())
        assert [(row.customer, row.reason, row.count) for row in rows] == [("c1", "rate_limit", 1)]
        assert (await guard.status("c1")).total_spend == 1
        assert await guard.verify() == []
        assert [record.late async for record in guard.records()] == [False]


async def test_shadow_mode_lets_in_whom_it_does_not_know(make_guard: MakeGuard) -> None:
    """Neither an unknown customer nor an unusable identifier is refused, in the app or at a client."""
    async with make_guard(mode="shadow", unknown_customers="refuse", default_limits={"rate_limit": 9}) as guard:
        async with guard.admit("stranger") as admission:
            await admission.record(Usage(cost=1))
        async with guard.admit("") as nobody:
            await nobody.record(Usage(cost=2))
        with guard.on_behalf_of("x" * 300):
            await guard.record(Usage(cost=3))
        await guard.flush()
        found = [(record.customer_identifier, record.cost) async for record in guard.records()]
    assert found == [("stranger", Decimal(1)), ("", Decimal(2)), ("", Decimal(3))]


async def test_off_refuses_nothing(make_guard: MakeGuard) -> None:
    """Not even an identifier that is unusable: what was a 400 would become a 500 of the app."""
    async with make_guard() as guard:
        with pytest.raises(InvalidIdentifier):
            await guard.admit("")
        await guard.switch.set("off")
        async with guard.admit(""):
            pass
        with guard.on_behalf_of("\0"):
            assert await guard.try_admit("x" * 300)


async def test_mode_off_stores_nothing(make_guard: MakeGuard) -> None:
    """With mode="off" everything is admitted and nothing is written, not even a file."""
    guard = make_guard(mode="off", default_limits={"rate_limit": 0})
    async with guard:
        async with guard.admit("c1") as admission:
            await admission.record(Usage(cost=Decimal(1)))
        await guard.record(Usage(cost=Decimal(1)), "c1")
        guard.record_soon(Usage(cost=Decimal(1)), "c1")
        await guard.flush()
    assert [record async for record in make_guard().records()] == []


async def test_an_estimate_for_a_model_without_a_price_is_refused_where_a_budget_applies(
    make_guard: MakeGuard,
) -> None:
    """A client that may name its model must not thereby spend freely; without a budget it may."""
    async with make_guard() as guard:
        estimate = Usage(model="no-such-model-xyz", input_tokens=10)
        async with guard.admit("free", estimate=estimate):
            pass
        await guard.put_customer(Customer(customer_identifier="c1", total_budget=1))
        with pytest.raises(UnpricedModel, match="no-such-model-xyz"):
            await guard.admit("c1", estimate=estimate)
    async with (
        make_guard(unknown_price="flag", default_limits={"total_budget": 1}) as guard,
        guard.admit("c2", estimate=estimate),
    ):
        pass


@pytest.mark.parametrize("bad", ["", " ", "a" * 255, "a\x00b", "a\u200bb", "\ud800", True, None, 1.5])
async def test_unusable_identifiers_are_refused(make_guard: MakeGuard, bad: object) -> None:
    """Ids that are empty, too long or hold control, zero-width or surrogate characters name nobody."""
    async with make_guard() as guard:
        with pytest.raises(InvalidIdentifier):
            await guard.admit(bad)  # type: ignore[arg-type]  # what callers do at run time


@pytest.mark.parametrize("bad", ["-1", "nan", "inf", "1e30"])
async def test_unusable_estimates_are_refused_and_change_nothing(make_guard: MakeGuard, bad: str) -> None:
    """A hold is a finite amount from 0 on."""
    async with make_guard() as guard:
        with pytest.raises(InvalidInput):
            await guard.admit("c1", estimate=Decimal(bad))
        assert await guard.get_customer("c1") is None


async def test_integers_are_identifiers_too(make_guard: MakeGuard) -> None:
    """Respan takes an int as customer_identifier; it is the same customer as its text."""
    async with make_guard(default_limits={"rate_limit": 1}) as guard:
        async with guard.admit(42):
            pass
        assert not await guard.try_admit("42")


async def test_a_restart_ends_what_a_clock_that_ran_ahead_left(clock: FakeClock, tmp_path: Path) -> None:
    """Time never goes back for a process, so a rate that is used up stays so; a new process goes by the right clock."""
    options: dict[str, Any] = {"clock": clock, "journal_dir": tmp_path, "default_limits": {"rate_limit": 1}}
    started = clock.now
    async with Guard(f"sqlite:///{tmp_path / 'guard.db'}", **options) as guard:
        clock.advance(7200)
        await guard.try_admit("c1")
        clock.set(started)
        clock.advance(1800)
        assert not await guard.try_admit("c1")
    async with Guard(f"sqlite:///{tmp_path / 'guard.db'}", **options) as guard:
        assert await guard.try_admit("c1")
        assert not await guard.try_admit("c1")
