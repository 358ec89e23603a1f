"""What each limit does while storage gives no answer: closed, open, or a local share; and it is all accounted for."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from pathlib import Path
from typing import Literal

import pytest

from respan_guard import (
    Customer,
    CustomerBlocked,
    Guard,
    RateLimitExceeded,
    StorageUnavailable,
    Usage,
)
from respan_guard.errors import StorageCorrupt
from respan_guard.home import Home
from respan_guard.testing import FakeClock

from .faulty import FaultyBackend, faulty_guard, live_holds

DIME = Decimal("0.1")
DOWN = StorageUnavailable("down")


async def spend(guard: Guard, customer: str = "c1", amount: Decimal = DIME, *, record: bool = True) -> bool:
    """Do one piece of work that holds and costs `amount`; whether it was let in."""
    try:
        async with guard.admit(customer, estimate=amount) as admission:
            if record:
                admission.record_soon(Usage(cost=amount))
    except StorageUnavailable:
        return False
    return True


async def stored(guard: Guard) -> None:
    """Wait until the store has everything, also what lay in the journal."""
    await guard.flush()
    home = guard._homes._app
    assert home is not None
    while home._calls:
        await asyncio.wait(home._calls)
        await asyncio.sleep(0)  # those that are done leave with the loop's next pass
    await guard.flush()


async def back(home: Home) -> None:
    """Wait until the breaker is closed."""
    async with asyncio.timeout(3):
        while home.breaker.is_open:
            await asyncio.sleep(0.01)


def refuse(part: object) -> None:
    """A connection that is down."""
    raise DOWN


# -- closed and open ---------------------------------------------------------------------------------


async def test_a_budget_fails_closed_and_a_rate_goes_local_by_default(store: FaultyBackend, tmp_path: Path) -> None:
    """Money is refused, requests get their share of a tenth and then a 429 that says when."""
    async with faulty_guard(tmp_path, default_limits={"rate_limit": 20}) as guard:
        await guard.put_customer(Customer(customer_identifier="paid", total_budget=5, rate_limit=20))
        store.error = DOWN
        with pytest.raises(StorageUnavailable):
            await guard.admit("paid")
        guard.policies.any_own = False  # as if the only customers with limits of their own were known here
        for _ in range(2):
            async with guard.admit("c1") as admission:
                assert [limit.limit for limit in admission.decision.limits] == [2]
        with pytest.raises(RateLimitExceeded) as refused:
            await guard.admit("c1")
        assert 0 < (refused.value.retry_after or 0) < 61


async def test_a_customer_that_was_never_met_fails_closed_where_any_has_limits_of_its_own(
    store: FaultyBackend, tmp_path: Path
) -> None:
    """It may have a budget that this process doesn't know."""
    async with faulty_guard(tmp_path, default_limits={"rate_limit": 20}) as guard:
        await guard.put_customer(Customer(customer_identifier="paid", total_budget=5))
        store.error = DOWN
        with pytest.raises(StorageUnavailable):
            await guard.admit("stranger")


@pytest.mark.parametrize("mode", ["closed", "local"])
async def test_a_process_that_never_heard_of_the_store_lets_nobody_in(
    mode: Literal["closed", "local"], store: FaultyBackend, tmp_path: Path
) -> None:
    """Started after storage went down it can't know that ann is blocked and eve has no money: 503 for whoever asks."""
    async with faulty_guard(tmp_path) as guard:
        await guard.put_customer(Customer(customer_identifier="ann", total_budget=1, blocked=True))
        await guard.put_customer(Customer(customer_identifier="eve", total_budget=0))
    store.error = store.other_error = DOWN
    guard = faulty_guard(tmp_path, budget_failure=mode)
    if mode == "local":
        await guard.open()
    for customer in ("ann", "eve", "nobody"):
        with pytest.raises(StorageUnavailable):
            await guard.admit(customer)
        with pytest.raises(StorageUnavailable):
            await asyncio.to_thread(guard.sync.admit, customer)
    store.error = store.other_error = None
    await guard.aclose()
    await asyncio.to_thread(guard.sync.close)


async def test_rates_that_fail_closed_refuse_a_stranger_too(store: FaultyBackend, tmp_path: Path) -> None:
    """With open budgets as well: it may have a rate of its own. With both open it is let in."""
    store.error = store.other_error = DOWN
    async with faulty_guard(tmp_path, budget_failure="open", rate_limit_failure="closed") as guard:
        with pytest.raises(StorageUnavailable):
            await guard.admit("ann")
    async with faulty_guard(tmp_path, budget_failure="open", rate_limit_failure="open") as guard:
        assert await spend(guard, "ann")


async def test_an_app_without_any_limits_goes_on(store: FaultyBackend, tmp_path: Path) -> None:
    """The store said that nobody has limits of their own just before it went: nobody is refused, however long."""
    clock = FakeClock()
    async with faulty_guard(tmp_path, clock=clock) as guard:
        store.error = store.other_error = DOWN
        for _ in range(3):
            assert await spend(guard)
            clock.advance(3600)


async def test_what_an_idle_process_heard_long_ago_is_not_believed(store: FaultyBackend, tmp_path: Path) -> None:
    """Another process puts the first customer with limits while this one sleeps, then storage goes."""
    clock = FakeClock()
    async with faulty_guard(tmp_path, clock=clock) as guard:
        assert await spend(guard, "zoe")
        await guard.flush()
        home = guard._homes._app
        assert home is not None
        home.repeat = lambda every, work: None  # type: ignore[method-assign]
        home.asleep = True  # as after ten seconds without work
        clock.advance(12)
        async with faulty_guard(tmp_path) as other:
            await other.put_customer(Customer(customer_identifier="ann", blocked=True, total_budget=0))
        clock.advance(2)
        guard.policies.any_own = False  # a look that came in between would have told
        guard.policies._heard_at = clock.monotonic() - 14
        store.error = store.other_error = DOWN
        with pytest.raises(StorageUnavailable):
            await guard.admit("ann")
        store.error = store.other_error = None
        await back(home)
        with pytest.raises(CustomerBlocked):
            await guard.admit("ann")
        assert await spend(guard, "zoe")


@pytest.mark.parametrize("limits", [{"rate_limit": 5}, {"total_budget": 5}, {"rate_limit": 5, "total_budget": 5}])
async def test_closed_refuses_whatever_the_limit(limits: dict[str, int], store: FaultyBackend, tmp_path: Path) -> None:
    """Both kinds closed: whoever has a limit is refused."""
    async with faulty_guard(tmp_path, default_limits=limits, rate_limit_failure="closed") as guard:
        store.error = DOWN
        with pytest.raises(StorageUnavailable):
            await guard.admit("c1")


async def test_open_lets_everybody_in_and_books_it_later(store: FaultyBackend, tmp_path: Path) -> None:
    """50 requests while storage is down: none refused, each booked once, under its customer and day."""
    limits = {"rate_limit": 5, "total_budget": 1}
    clock = FakeClock()
    async with faulty_guard(
        tmp_path, default_limits=limits, budget_failure="open", rate_limit_failure="open", clock=clock
    ) as guard:
        assert await spend(guard)
        await stored(guard)
        store.error = DOWN
        assert all([await spend(guard) for _ in range(50)])
        clock.advance(86_400)  # it is back the next day
        store.error = None
        await stored(guard)
        assert (await guard.status("c1")).total_spend == Decimal("5.1")
        assert {record.day for record in [r async for r in guard.records("c1")]} == {"2026-01-15"}
        assert await live_holds(guard) == 0
        assert await guard.verify() == []
        assert not await guard.try_admit("c1")


async def test_a_blocked_customer_stays_blocked(store: FaultyBackend, tmp_path: Path) -> None:
    """Open is for limits; a block is not one that an outage lifts."""
    async with faulty_guard(tmp_path, budget_failure="open", rate_limit_failure="open") as guard:
        await guard.put_customer(Customer(customer_identifier="c1", blocked=True))
        store.error = DOWN
        with pytest.raises(CustomerBlocked):
            await guard.admit("c1")


async def test_shadow_mode_refuses_nobody(store: FaultyBackend, tmp_path: Path) -> None:
    """Whatever the failure modes say."""
    async with faulty_guard(
        tmp_path, mode="shadow", default_limits={"total_budget": 0}, rate_limit_failure="closed"
    ) as guard:
        store.error = DOWN
        async with guard.admit("c1"):
            pass


# -- a local share of money --------------------------------------------------------------------------


LOCAL = {"budget_failure": "local", "default_limits": {"total_budget": 10}, "local_share": 0.1}


async def test_a_local_budget_is_a_share_of_what_was_left(store: FaultyBackend, tmp_path: Path) -> None:
    """10 USD, 5 spent, so a tenth of 5 may be spent without storage: five dimes, and no sixth."""
    async with faulty_guard(tmp_path, **LOCAL) as guard:
        await guard.record(Usage(cost=5), "c1")
        async with guard.admit("c1"):
            pass
        await guard.flush()
        store.error = DOWN
        assert [await spend(guard) for _ in range(7)] == [True] * 5 + [False] * 2
        store.error = None
        await stored(guard)
        assert (await guard.status("c1")).total_spend == Decimal("5.5")


async def test_a_local_budget_holds_and_gives_back(store: FaultyBackend, tmp_path: Path) -> None:
    """Work in flight counts against the share; what it did not spend is free again."""
    async with faulty_guard(tmp_path, **LOCAL) as guard:
        async with guard.admit("c1"):
            pass
        store.error = DOWN
        flights = [await guard.admit("c1", estimate=DIME) for _ in range(10)]
        assert not await spend(guard)
        for flight in flights:
            await flight.release()
        assert [await spend(guard, record=False) for _ in range(20)] == [True] * 20
        flight = await guard.admit("c1", estimate=DIME)
        await flight.record(Usage(cost=Decimal("0.95")))  # more than it held: the share shrinks by all of it
        await flight.release()
        assert not await spend(guard)


async def test_a_customer_whose_spend_was_never_known_has_no_share(store: FaultyBackend, tmp_path: Path) -> None:
    """A process that hasn't heard of it can't say what is left."""
    async with faulty_guard(tmp_path, **LOCAL) as guard:
        store.error = DOWN
        with pytest.raises(StorageUnavailable, match="never known"):
            await guard.admit("c1")


async def test_what_was_known_of_another_period_is_not_known(store: FaultyBackend, tmp_path: Path) -> None:
    """Over midnight a daily budget is another one, of which others may have spent all."""
    clock = FakeClock()
    limits = {"budget_duration": "daily", "period_budget": 10}
    async with faulty_guard(tmp_path, **(LOCAL | {"default_limits": limits}), clock=clock) as guard:
        assert await spend(guard)
        store.error = DOWN
        assert await spend(guard)
        clock.advance(86_400)
        assert not await spend(guard)


async def test_a_flapping_store_gives_no_second_share_before_it_was_heard(store: FaultyBackend, tmp_path: Path) -> None:
    """Down, up and down again without a decision for this customer in between is one outage to its budget."""
    async with faulty_guard(tmp_path, **LOCAL) as guard:
        async with guard.admit("c1"):
            pass
        await guard.flush()
        spent = 0
        for _ in range(5):
            store.error = DOWN
            while await spend(guard):
                spent += 1
            store.error = None
            await stored(guard)
        assert spent == 10
        assert await spend(guard)  # the store says what is left, 9 less the dimes
        await guard.flush()
        store.error = DOWN
        again = 0
        while await spend(guard):
            again += 1
        assert again == 8


async def test_what_waits_in_another_home_is_not_forgotten(store: FaultyBackend, tmp_path: Path) -> None:
    """Storage answers a thread before the loop's records have come: the thread's decision gives no second share."""
    async with faulty_guard(tmp_path, **LOCAL) as guard:
        async with guard.admit("c1"):
            pass
        await asyncio.to_thread(guard.sync.status, "c1")
        await guard.flush()
        home = guard._homes._app
        assert home is not None
        store.error = DOWN
        for _ in range(3):
            assert await spend(guard)
        send = home._send
        home._send = refuse  # type: ignore[method-assign]  # of the two homes, this one's connection stays down
        store.error = None

        def on_a_thread() -> None:
            with guard.sync.admit("c1"):
                pass

        for _ in range(3):
            await asyncio.to_thread(on_a_thread)
        assert guard.failover._accounts["c1"].spent == 300_000_000
        home._send = send  # type: ignore[method-assign]
        await stored(guard)
        assert await spend(guard)
        assert guard.failover._accounts["c1"].spent == 0
        await guard.flush()
        assert (await guard.status("c1")).total_spend == Decimal("0.4")


async def test_a_busy_home_learns_what_is_stored_all_the_same(store: FaultyBackend, tmp_path: Path) -> None:
    """It never rests; what was recorded without storage is booked behind a marker, and then known."""
    async with faulty_guard(tmp_path, **LOCAL) as guard:
        async with guard.admit("c1"):
            pass
        home = guard._homes._app
        assert home is not None
        store.error = DOWN
        assert await spend(guard)
        store.error = None
        busy = True

        async def others() -> None:
            while busy:
                async with guard.admit("c2"):
                    pass

        work = [asyncio.create_task(others()) for _ in range(4)]
        async with asyncio.timeout(5):
            while not guard.failover._accounts["c1"].known:
                async with guard.admit("c1"):
                    await asyncio.sleep(0.02)
        busy = False
        await asyncio.gather(*work)
        assert guard.failover._accounts["c1"].spent == 0


async def test_a_budget_is_passed_by_no_more_than_shares_that_are_still_on_their_way(
    store: FaultyBackend, tmp_path: Path
) -> None:
    """One process has storage back and uses up the budget before another's records have come.

    What comes late is the other's share, and once storage has said so neither has one any more.
    """
    options = LOCAL | {"local_share": 0.5}
    async with faulty_guard(tmp_path, **options) as one, faulty_guard(tmp_path, **options) as other:
        for guard in (one, other):
            async with guard.admit("c1"):
                pass
        await one.flush()
        home = one._homes._app
        assert home is not None
        store.error = DOWN
        spent = 0
        while await spend(one):
            spent += 1
        assert spent == 50
        send = home._send
        home._send = home._probe = refuse  # type: ignore[method-assign, assignment]  # its connection stays down
        store.error = None
        while await other.try_admit("c1"):
            await other.record(Usage(cost=DIME), "c1")
        home._send = send  # type: ignore[method-assign]
        del home._probe
        await stored(one)
        assert (await one.status("c1")).total_spend == 15  # the budget, and the other's share
        for guard in (one, other):
            assert not await guard.try_admit("c1")
        await one.flush()
        store.error = DOWN
        for guard in (one, other):
            assert not await spend(guard)


async def test_several_limits_and_a_refused_rate_take_nothing_of_the_budget(
    store: FaultyBackend, tmp_path: Path
) -> None:
    """Rate first, then budget: a 429 leaves the allowance as it was."""
    async with faulty_guard(tmp_path, **(LOCAL | {"default_limits": {"rate_limit": 20, "total_budget": 10}})) as guard:
        async with guard.admit("c1"):
            pass
        store.error = DOWN
        assert await spend(guard)
        assert await spend(guard)
        with pytest.raises(RateLimitExceeded):
            await guard.admit("c1", estimate=DIME)
        assert guard.failover._accounts["c1"].held == 0
        assert guard.failover._accounts["c1"].spent == 200_000_000


async def test_the_last_words_of_storage_are_bounded(store: FaultyBackend, tmp_path: Path) -> None:
    """A thousand customers and room for ten: ten are remembered."""
    async with faulty_guard(tmp_path, **LOCAL, max_cached_customers=10) as guard:
        for number in range(1000):
            async with guard.admit(f"c{number}"):
                pass
        assert len(guard.failover._accounts) == 10


# -- the breaker -------------------------------------------------------------------------------------


async def test_a_dead_store_costs_nothing_after_the_first_failures(store: FaultyBackend, tmp_path: Path) -> None:
    """Three failures open the breaker: then requests don't reach storage, probes do, and its return is noticed."""
    async with faulty_guard(tmp_path, default_limits={"total_budget": 1}) as guard:
        home = guard._homes._app
        assert home is not None
        store.error = DOWN
        tries = 0
        while not home.breaker.is_open:
            assert not await spend(guard)
            tries += 1
        assert tries <= 3
        seen: list[str] = []
        apply = store.apply

        async def spy(ops, now=None):  # type: ignore[no-untyped-def]
            seen.extend(type(op).__name__ for op in ops)
            return await apply(ops, now)

        store.apply = spy  # type: ignore[method-assign]
        for _ in range(100):
            assert not await spend(guard)
        await asyncio.sleep(0.3)
        assert set(seen) == {"Release"}  # probes
        assert len(seen) < 10
        store.error = None
        await back(home)
        assert await spend(guard)


async def test_a_black_hole_opens_the_breaker_and_an_answer_closes_it(store: FaultyBackend, tmp_path: Path) -> None:
    """While nothing comes back each request costs one deadline, after three deadlines none."""
    async with faulty_guard(tmp_path, default_limits={"total_budget": 1}, storage_timeout=0.5) as guard:
        home = guard._homes._app
        assert home is not None
        store.gate = asyncio.Event()
        waits = []
        for _ in range(8):
            began = asyncio.get_running_loop().time()
            assert not await spend(guard)
            waits.append(asyncio.get_running_loop().time() - began)
        assert home.breaker.is_open
        assert sum(wait > 0.4 for wait in waits) <= 4
        assert waits[-1] < 0.4
        gate, store.gate = store.gate, None
        gate.set()  # what was in flight arrives after all
        await back(home)
        assert await spend(guard)
        await guard.flush()
        assert await live_holds(guard) == 0


async def test_a_hang_that_never_ends_is_given_up_and_probed(store: FaultyBackend, tmp_path: Path) -> None:
    """A connection that died without a word: the batch is sent again on another one, and counts once."""
    async with faulty_guard(tmp_path, storage_timeout=0.05) as guard:
        await guard.record(Usage(cost=1), "c1")
        store.gate = asyncio.Event()
        guard.record_soon(Usage(cost=1), "c1")
        await asyncio.sleep(0.01)
        store.gate = None  # new calls work; the one in flight waits for ever
        async with asyncio.timeout(10):
            while (await guard.status("c1")).total_calls < 2:
                await asyncio.sleep(0.05)
        await guard.flush()
        assert (await guard.status("c1")).total_spend == 2


async def test_records_across_an_open_breaker_count_exactly_once(store: FaultyBackend, tmp_path: Path) -> None:
    """Awaited and posted, before, during and after; answers lost, too: the sum is exact and no journal is left."""
    async with faulty_guard(tmp_path, storage_timeout=1) as guard:
        home = guard._homes._app
        assert home is not None
        for phase in range(6):
            store.error, store.applied_anyway = (DOWN, phase % 4 == 1) if phase % 2 else (None, False)
            for number in range(20):
                async with guard.admit("c1") as admission:
                    if number % 2:
                        await admission.record(Usage(cost=DIME))
                    else:
                        admission.record_soon(Usage(cost=DIME))
            if phase % 2:
                assert home.breaker.is_open
                assert list(tmp_path.glob("*.journal"))
            else:
                await stored(guard)
                assert not home.breaker.is_open
        store.error = None
        await stored(guard)
        status = await guard.status("c1")
        assert (status.total_calls, status.total_spend) == (120, Decimal(12))
        assert await guard.verify() == []
    assert list(tmp_path.glob("*.journal")) == []


async def test_what_was_journalled_behind_an_open_breaker_outlives_the_process(
    store: FaultyBackend, tmp_path: Path
) -> None:
    """The guard closes while the breaker is open; the next one books all of it, once."""
    async with faulty_guard(tmp_path, budget_failure="open", default_limits={"total_budget": 1}) as guard:
        store.error = DOWN
        for number in range(10):
            async with guard.admit("c1") as admission:
                if number % 2:
                    await admission.record(Usage(cost=DIME))
                else:
                    admission.record_soon(Usage(cost=DIME))
    store.error = None
    async with faulty_guard(tmp_path) as guard:
        await stored(guard)
        assert (await guard.status("c1")).total_spend == 1


async def test_who_waits_when_the_breaker_opens_is_told_at_once(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty ask, one is sent at a time: after three failures the others don't wait for their deadlines of a minute."""
    monkeypatch.setattr("respan_guard.drain.BATCH", 1)
    async with faulty_guard(tmp_path, default_limits={"total_budget": 1}, storage_timeout=60) as guard:
        store.error = DOWN
        guard.record_soon(Usage(cost=1), "c2")
        async with asyncio.timeout(20):
            answers = await asyncio.gather(*[spend(guard) for _ in range(50)])
        assert not any(answers)
        store.error = None
        await stored(guard)
        assert (await guard.status("c2")).total_spend == 1
        assert await live_holds(guard) == 0


async def test_reads_fail_at_once_while_the_breaker_is_open(store: FaultyBackend, tmp_path: Path) -> None:
    """A page that asks a dead store gets its error now, not after ten seconds."""
    async with faulty_guard(tmp_path, default_limits={"total_budget": 1}) as guard:
        store.error = DOWN
        for _ in range(5):
            await spend(guard)
        with pytest.raises(StorageUnavailable, match="down"):
            await guard.status("c1")


# -- starting without storage ------------------------------------------------------------------------


async def test_an_app_starts_without_storage_unless_budgets_fail_closed(store: FaultyBackend, tmp_path: Path) -> None:
    """Closed could serve nobody with a budget; the others serve by their failure modes until storage is back."""
    limits = {"rate_limit": 10, "total_budget": 5}
    store.error = store.other_error = DOWN
    with pytest.raises(StorageUnavailable):
        await faulty_guard(tmp_path, default_limits=limits).open()
    async with faulty_guard(tmp_path, default_limits=limits, budget_failure="open") as guard:
        async with guard.admit("c1") as admission:
            await admission.record(Usage(cost=1))
        store.error = store.other_error = None
        await stored(guard)
        assert (await guard.status("c1")).total_spend == 1


async def test_what_is_wrong_for_good_stops_every_start(store: FaultyBackend, tmp_path: Path) -> None:
    """No failure mode makes a damaged store usable."""
    store.other_error = StorageCorrupt("damaged")
    with pytest.raises(StorageCorrupt):
        await faulty_guard(tmp_path, budget_failure="open").open()
