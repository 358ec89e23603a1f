"""`app_budgets` and `model_budgets`: what all customers together may spend, in all and on each model."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import BudgetExceeded, Customer, Guard, LimitExceeded, StorageUnavailable, Usage
from respan_guard.testing import FakeClock, StandInProvider
from tests.backends.conftest import BACKENDS, storage_url
from tests.clients.support import ASK, CHAT, async_open_ai

from .faulty import FaultyBackend, faulty_guard

DOWN = StorageUnavailable("down")
DIME = Decimal("0.1")
DAILY = {"budget_duration": "daily", "period_budget": 1}


@pytest.fixture(params=BACKENDS)
def make_shared(request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock) -> Callable[..., Guard]:
    """Make guards over one empty store, of each kind."""
    url, namespace = storage_url(request.param, tmp_path), "default"
    if request.param == "redis":
        namespace = f"test-{secrets.token_hex(6)}"

    def make(**options: Any) -> Guard:
        return Guard(
            url, clock=clock, journal_dir=tmp_path / "journal", storage_timeout=5, namespace=namespace, **options
        )

    return make


def call(cost: Decimal, model: str = "m") -> Usage:
    """A call of a model, at a price that is known."""
    return Usage(model=model, cost=cost)


async def spend(guard: Guard, customer: str, cost: Decimal, model: str = "m") -> None:
    """Hold what a call costs, make it, and end."""
    async with guard.admit(customer, estimate=call(cost, model)) as admission:
        await admission.record(call(cost, model))
    await guard.flush()


async def refused(guard: Guard, customer: str, cost: Decimal = DIME, model: str = "m") -> BudgetExceeded:
    """The refusal of a call."""
    with pytest.raises(BudgetExceeded) as found:
        await spend(guard, customer, cost, model)
    return found.value


# -- what counts ------------------------------------------------------------------------------------


async def test_customers_share_the_apps_budget(make_shared: Callable[..., Guard]) -> None:
    """What one spent the other can't spend, whether it has limits of its own or the default ones."""
    async with make_shared(app_budgets=DAILY | {"total_budget": 5}, default_limits={"total_budget": 3}) as guard:
        await guard.put_customer(Customer(customer_identifier="own", total_budget=4))
        await spend(guard, "ann", Decimal("0.6"))
        await spend(guard, "own", Decimal("0.4"))
        for customer in ("ann", "own", "new"):
            decision = (await refused(guard, customer)).decision
            assert [(one.name, one.reason, one.used) for one in decision.violated] == [
                ("app_period_budget", "exhausted", Decimal(1))
            ]
        names = [limit.name for limit in (await guard.status("new")).limits]
        assert names == ["total_budget", "app_period_budget", "app_total_budget"]
        app = (await guard.status("new")).limit("app_total_budget")
        assert app is not None
        assert (app.used, app.remaining, app.shared) == (1, 4, True)
        assert await guard.verify() == []


async def test_a_models_budget_counts_that_model_only(make_shared: Callable[..., Guard]) -> None:
    """One model is spent, another is not; who names none is not asked for any model's budget."""
    async with make_shared(model_budgets={"total_budget": 1}, app_budgets={"total_budget": 2}) as guard:
        await spend(guard, "ann", Decimal("0.7"), "dear")
        await spend(guard, "bob", Decimal("0.9"), "cheap")
        assert [one.name for one in (await refused(guard, "bob", Decimal("0.4"), "dear")).decision.violated] == [
            "model_total_budget"
        ]
        async with guard.admit("bob", estimate=Decimal("0.4")) as admission:
            assert [limit.name for limit in admission.decision.limits] == ["app_total_budget"]
            error = await refused(guard, "ann", Decimal("0.3"), "dear")  # of the app's two dollars 0 are free
        assert [(one.name, one.reason) for one in error.decision.violated] == [("app_total_budget", "held")]
        await spend(guard, "ann", Decimal("0.3"), "dear")
        names = [one.name for one in (await guard.status("ann")).limits]
        assert names == ["app_total_budget"], "a status is of no model"


async def test_a_new_period_begins_at_the_guards_midnight(make_shared: Callable[..., Guard], clock: FakeClock) -> None:
    """A spent day is refused until the next, and the answer says when that is; a total stays."""
    clock.set(datetime(2026, 1, 15, 22, 30, tzinfo=UTC))  # 23:30 in Berlin
    options = {"app_budgets": DAILY | {"total_budget": "1.5"}, "time_zone": "Europe/Berlin"}
    async with make_shared(**options) as guard:
        await spend(guard, "ann", Decimal(1))
        error = await refused(guard, "bob")
        assert error.decision.resets_at == datetime(2026, 1, 15, 23, tzinfo=UTC)
        clock.advance(timedelta(minutes=29))
        await refused(guard, "bob")
        clock.advance(timedelta(minutes=1))
        await spend(guard, "bob", Decimal("0.5"))
        assert [one.name for one in (await refused(guard, "ann")).decision.violated] == ["app_total_budget"]


async def test_periods_are_counted_from_their_start(make_guard: Callable[..., Guard], clock: FakeClock) -> None:
    """A week with a `period_start` begins on that weekday, a Friday, and is renewed a week later."""
    weekly = {"period_budget": 2, "budget_duration": "weekly", "period_start": "2025-12-05"}
    async with make_guard(app_budgets=weekly) as guard:
        clock.set(datetime(2026, 1, 15, 23, 59, tzinfo=UTC))
        await spend(guard, "ann", Decimal(2))
        clock.advance(60)
        await spend(guard, "ann", Decimal(2))
        clock.advance(timedelta(days=7, minutes=-1))
        await refused(guard, "bob")
        clock.advance(60)
        await spend(guard, "bob", Decimal(2))


async def test_a_customer_counts_for_the_period_of_its_own_date(
    make_shared: Callable[..., Guard], clock: FakeClock
) -> None:
    """It is tomorrow in Tokyo: what is held and spent there is tomorrow's, whose sum never passes the budget."""
    clock.set(datetime(2026, 1, 15, 20, tzinfo=UTC))
    async with make_shared(app_budgets=DAILY) as guard:
        await guard.put_customer(Customer(customer_identifier="tokyo", time_zone="Asia/Tokyo"))
        await spend(guard, "utc", Decimal(1))
        await refused(guard, "utc")
        await spend(guard, "tokyo", Decimal("0.7"))
        clock.advance(timedelta(hours=4))
        await refused(guard, "utc", Decimal("0.4"))
        async with guard.admit("tokyo", estimate=DIME):
            assert (await refused(guard, "utc", Decimal("0.3"))).decision.reason == "held"
        await spend(guard, "utc", Decimal("0.3"))


# -- never over it ----------------------------------------------------------------------------------


async def test_concurrent_calls_never_pass_a_shared_budget(make_shared: Callable[..., Guard], tmp_path: Path) -> None:
    """Many tasks of many customers on two guards, holds that are bounds: every budget is used, and none is passed."""
    budgets: dict[str, Any] = {"app_budgets": {"total_budget": 3}, "model_budgets": {"total_budget": 2}}
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(make_shared(**budgets))
        guards = [first]
        if "memory" not in first.settings.storage:  # which is another store for each guard
            guards.append(await stack.enter_async_context(make_shared(**budgets)))

        async def work(number: int) -> None:
            guard, customer, model = guards[number % len(guards)], f"c{number % 5}", ("x", "y")[number % 3 == 0]
            most = cost = Decimal(3 + number % 7) / 50
            if number % 4 == 0:
                cost = most / 2
            for _ in range(8):
                try:
                    async with guard.admit(customer, estimate=call(most, model)) as admission:
                        await asyncio.sleep(0)
                        admission.record_soon(call(cost, model))
                except LimitExceeded as error:
                    if not error.decision.transient:
                        return
                    await asyncio.sleep(0.001)

        await asyncio.gather(*[work(number) for number in range(24)])
        for guard in guards:
            await guard.flush()
        spent = {row.model: row.cost for row in await first.usage("model")}
        assert sum(spent.values()) <= 3
        assert max(spent.values()) <= 2
        assert sum(spent.values()) > Decimal("2.7"), "the budget was there to be used"
        assert await first.verify() == []


async def test_a_call_takes_nothing_of_a_hold_for_another_model(make_shared: Callable[..., Guard]) -> None:
    """Within an admission that named no model, a wrapped client's call is held against its model's budget."""
    provider = StandInProvider()
    with provider.serve() as url:
        async with (
            make_shared(model_budgets={"total_budget": "0.000001"}) as guard,
            async_open_ai(url) as bare,
            guard.wrap(bare) as client,
            guard.admit("ann", estimate=Decimal(1)),
        ):
            with pytest.raises(Exception, match="for this model") as found:
                await client.chat.completions.create(model=CHAT, messages=ASK, max_tokens=20)
            assert getattr(found.value, "status_code", None) == 402
    assert provider.meter.calls == []


async def test_a_call_takes_of_a_hold_for_its_own_model(make_shared: Callable[..., Guard]) -> None:
    """What the request holds for the very call is not held twice: a budget for one call is enough for it."""
    provider = StandInProvider()
    held = Decimal("0.001")
    with provider.serve() as url:
        async with (
            make_shared(model_budgets={"total_budget": held}) as guard,
            async_open_ai(url) as bare,
            guard.wrap(bare) as client,
            guard.admit("ann", estimate=call(held, CHAT)),
        ):
            await client.chat.completions.create(model=CHAT, messages=ASK, max_tokens=20)
    assert len(provider.meter.calls) == 1


# -- what is said, and what is not ------------------------------------------------------------------


async def test_the_sentence_says_whose_budget_is_used_up(make_guard: Callable[..., Guard]) -> None:
    """The app's own, not the customer's; where both are, the customer's. Of the app's, no sentence has an amount."""
    async with make_guard(app_budgets=DAILY, model_budgets={"total_budget": 1}) as guard:
        await guard.put_customer(Customer(customer_identifier="own", total_budget=1))
        await spend(guard, "own", Decimal(1))
        assert str(await refused(guard, "ann", DIME, "other")) == (
            "The app's own budget of this period is used up. It resets on 2026-01-16 at 00:00 UTC."
        )
        assert str(await refused(guard, "own")) == "The total budget is used up."
    async with make_guard(model_budgets={"total_budget": 1}) as guard:
        async with guard.admit("ann", estimate=call(Decimal("0.5"), "held")):
            error = await refused(guard, "bob", Decimal("0.6"), "held")
        assert str(error).startswith("The app's own total budget for this model is full because of calls in flight.")
        assert error.decision.transient


async def test_shadow_mode_reports_and_refuses_nobody(make_guard: Callable[..., Guard]) -> None:
    """A spent budget of the app's is reported in the decision, and the call goes on."""
    async with make_guard(app_budgets={"total_budget": 1}, mode="shadow") as guard:
        await spend(guard, "ann", Decimal(1))
        async with guard.admit("bob", estimate=call(DIME)) as admission:
            assert admission.decision.shadow
            assert [one.name for one in admission.decision.violated] == ["app_total_budget"]


async def test_a_model_without_a_price_is_refused(make_guard: Callable[..., Guard]) -> None:
    """The app's budget is a budget: a call that could cost anything is not let through under it."""
    async with make_guard(app_budgets={"total_budget": 1}) as guard:
        with pytest.raises(Exception, match="no price is known"):
            await guard.admit("ann", estimate=Usage(model="nobody-knows-it", input_tokens=5))


# -- storage down -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["closed", "local"])
async def test_without_storage_a_shared_budget_is_closed(mode: Any, store: FaultyBackend, tmp_path: Path) -> None:
    """Also with "local", for customers that were met too: what each was told was left is the same money."""
    async with faulty_guard(tmp_path, app_budgets={"total_budget": 100}, budget_failure=mode) as guard:
        for customer in ("ann", "bob"):
            await spend(guard, customer, DIME)
        store.error = DOWN
        for customer in ("ann", "bob", "new"):
            with pytest.raises(StorageUnavailable):
                await guard.admit(customer, estimate=DIME)
        store.error = None


async def test_without_storage_a_models_budget_closes_that_door_only(store: FaultyBackend, tmp_path: Path) -> None:
    """With "local", calls that name a model are refused, and a customer's own budget gives its share to others."""
    options: dict[str, Any] = {"default_limits": {"total_budget": 10}, "budget_failure": "local"}
    async with faulty_guard(tmp_path, model_budgets={"total_budget": 100}, **options) as guard:
        await spend(guard, "ann", DIME)
        store.error = DOWN
        with pytest.raises(StorageUnavailable):
            await guard.admit("ann", estimate=call(DIME))
        async with guard.admit("ann", estimate=DIME):
            pass
        store.error = None


async def test_without_storage_open_lets_everybody_pass(store: FaultyBackend, tmp_path: Path) -> None:
    """With "open" a shared budget stops nobody meanwhile, and what was spent is booked once storage is back."""
    async with faulty_guard(tmp_path, app_budgets={"total_budget": 1}, budget_failure="open") as guard:
        await spend(guard, "ann", DIME)
        store.error = DOWN
        async with guard.admit("bob", estimate=call(Decimal(2))) as admission:
            admission.record_soon(call(Decimal(2)))
        store.error = None
        async with asyncio.timeout(5):
            while not [row for row in await guard.usage("customer") if row.customer_identifier == "bob"]:
                await asyncio.sleep(0.02)
        await refused(guard, "ann")
