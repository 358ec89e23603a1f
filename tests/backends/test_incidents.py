"""Incidents of other gateways, as they are on record: none of them happens on any backend.

The numbers are those of the incident pack this package was designed against: each row is a defect that
lost or invented money somewhere, told as what must hold here instead.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import pytest

from respan_guard.backends.base import (
    Admit,
    Allowed,
    Backend,
    CustomerQuery,
    Entry,
    Limit,
    Op,
    Outcome,
    Record,
    Recorded,
    RecordQuery,
    Refused,
    Release,
    UsageQuery,
)
from respan_guard.errors import CounterOverflow
from respan_guard.money import MAX_NANO
from respan_guard.testing.contract_support import (
    DAY,
    DAY_MS,
    NOW,
    admit,
    allowed,
    budget,
    dump,
    one,
    rate,
    record,
    total,
)

MIDNIGHT = NOW - NOW % DAY_MS + DAY_MS


async def nodes(make_backend: Callable[[], Backend], count: int) -> list[Backend]:
    """Several open instances of one store, as of so many processes; of a shared backend the same one."""
    opened = [make_backend() for _ in range(count)]
    for backend in opened:
        await backend.open()
    return opened


async def close(backends: Sequence[Backend]) -> None:
    """Close them all."""
    for backend in backends:
        await backend.close()


@pytest.mark.parametrize(("cap", "admitted"), [(9, 0), (10, 1), (25, 2)])
async def test_incident_2_first_requests_at_once(make_backend: Callable[[], Backend], cap: int, admitted: int) -> None:
    """64 first requests of a customer nobody knows, at once from 4 nodes: no more get in than its budget covers."""
    stores = await nodes(make_backend, 4)
    asks = [admit(f"{node}-{number}", total(cap), cost=10) for node in range(4) for number in range(16)]
    answers = await asyncio.gather(*[stores[i % 4].apply([ask], NOW) for i, ask in enumerate(asks)])
    assert sum(isinstance(answer[0], Allowed) for answer in answers) == admitted
    assert len(await stores[0].customers(CustomerQuery())) == (1 if admitted else 0)
    await close(stores)


async def test_incident_3_holds_of_the_dead_end_by_themselves(make_backend: Callable[[], Backend]) -> None:
    """1,000 calls die between reserving and settling: each hold is listed, and all are void when they expire."""
    (app,) = await nodes(make_backend, 1)
    cap = total(5_000)
    for first in range(0, 1000, 100):
        answers = await app.apply(
            [admit(str(n), cap, cost=5, ttl_ms=60_000) for n in range(first, first + 100)], NOW + first
        )
        assert all(isinstance(answer, Allowed) for answer in answers)
    app.abandon()  # nobody releases, nothing sweeps
    (other,) = await nodes(make_backend, 1)
    last = NOW + 900 + 60_000
    waiting = await one(other, admit("next", cap, cost=5_000), NOW + 60_000 - 1)
    assert isinstance(waiting, Refused)
    assert (waiting.reasons, waiting.held) == (("held",), (5_000,))
    assert {row.id for row in await other.holds("ann", now=NOW + 1_000, limit=2_000)} == {str(n) for n in range(1000)}
    assert (await other.standing("ann", [cap], now=last - 1)).held == (500,)
    after = await allowed(other, admit("next", cap, cost=5_000), last)
    assert (after.used, after.held) == ((0,), (0,))
    assert sum(row.cost for row in await other.holds("ann", state="expired", now=last, limit=2_000)) == 5_000
    assert await other.verify() == []
    await other.close()


async def test_incident_5_a_hold_is_never_cut_to_fit(backend: Backend) -> None:
    """Five calls of 0.15 USD under 0.45 USD: three get in, each holds all it asked for, the others hold nothing."""
    share, cap = 150_000_000, total(450_000_000)
    answers = await backend.apply([admit(str(n), cap, cost=share) for n in range(5)], NOW)
    assert [isinstance(answer, Allowed) for answer in answers] == [True, True, True, False, False]
    assert [row.cost for row in await backend.holds(now=NOW)] == [share] * 3
    await backend.apply([record("0", share, admission="0"), Release("ann", "0")], NOW)
    assert isinstance(await one(backend, admit("5", cap, cost=1)), Refused)


async def test_incident_5_what_does_not_fit_is_denied(backend: Backend) -> None:
    """Over random asks: in iff used + held + asked is within the budget, and then held in full."""
    source = random.Random(5)
    cap, spent = 1_000, 0
    held: dict[str, int] = {}
    for number in range(300):
        asked, name = source.choice([0, 1, 30, 100, 400, 1_001]), str(number)
        fits = spent + sum(held.values()) + asked <= cap and spent + sum(held.values()) < cap
        answer = await one(backend, admit(name, total(cap), cost=asked))
        assert isinstance(answer, Allowed) == fits
        if fits:
            held[name] = asked
        if held and source.random() < 0.5:
            done = source.choice(list(held))
            cost = min(held.pop(done), source.choice([0, 0, 0, 1, 20]))
            spent += cost
            await backend.apply([record(done, cost, admission=done), Release("ann", done)], NOW)
        assert {row.id: row.cost for row in await backend.holds("ann", now=NOW)} == held


async def test_incident_6_faults_count_nothing_twice(backend: Backend) -> None:
    """5,000 operations of which a third lose their answer, or fail with their batch, and are sent again: sums exact."""
    source = random.Random(6)
    costs: dict[str, int] = {}
    for batch in range(1_000):
        names = [f"{batch}-{n}" for n in range(2)]
        ops: list[Op] = [admit(name, total(MAX_NANO), cost=50, customer="bob") for name in names]
        for name in names:
            costs[name] = source.randrange(100)
            ops.append(record(name, costs[name], customer="bob", admission=name))
        ops.append(Release("bob", names[0]))
        fault = source.random()
        if fault < 0.15:
            first = await backend.apply(ops, NOW + batch)  # the answer is lost on the way
            again = await backend.apply(ops, NOW + batch)
            assert [_but_new(a) for a in again[:4]] == [_but_new(a) for a in first[:4]]
        else:
            if fault < 0.3:
                with pytest.raises(CounterOverflow):  # a failure in the middle of the batch
                    await backend.apply([*ops, record("x", MAX_NANO, customer="bob")], NOW + batch)
            await backend.apply(ops, NOW + batch)
    row = await backend.get("bob")
    assert row is not None
    assert (row.totals.cost, row.totals.calls, row.totals.requests) == (sum(costs.values()), 2_000, 2_000)
    standing = await backend.standing("bob", [total(1), budget(1)], now=NOW + 1_000)
    (sums,) = await backend.usage(UsageQuery())
    assert standing.used == (sums.amounts.cost, sums.amounts.cost) == (row.totals.cost, row.totals.cost)
    assert await backend.verify() == []


def _but_new(outcome: Outcome) -> Outcome:
    return Recorded(True, outcome.cost, outcome.day) if isinstance(outcome, Recorded) else outcome


async def test_incident_8_a_large_flush_is_whole(backend: Backend) -> None:
    """10,000 customers in one flush are 10,000 entries and 10,000 sums."""
    outcomes = await backend.apply([record("e", n, customer=f"c{n}") for n in range(10_000)], NOW)
    assert all(isinstance(outcome, Recorded) and outcome.new for outcome in outcomes)
    assert len(await backend.entries(RecordQuery(limit=20_000))) == 10_000
    rows = await backend.usage(UsageQuery(limit=20_000))
    assert {row.customer: row.amounts.cost for row in rows} == {f"c{n}": n for n in range(10_000)}


async def test_incident_11_no_reset_loses_or_doubles_spend(make_backend: Callable[[], Backend]) -> None:
    """16 workers on 4 nodes spend across midnight: every cost is in one period, and the new one begins at 0."""
    stores = await nodes(make_backend, 4)
    days = (budget(10**9, first=DAY, end=DAY + 1), budget(10**9, first=DAY + 1, end=DAY + 2))
    spent = {DAY: 0, DAY + 1: 0}

    async def worker(number: int) -> None:
        source, store = random.Random(number), stores[number % 4]
        for turn in range(20):
            began = MIDNIGHT + (turn - 10) * 100 + number
            day = DAY if began < MIDNIGHT else DAY + 1
            name, cost = f"{number}-{turn}", source.randrange(1_000)
            start = MIDNIGHT - DAY_MS if day == DAY else MIDNIGHT
            ask = Admit(name, "ann", "", day, start, start + DAY_MS, (days[day - DAY],), cost=1_000, ttl_ms=DAY_MS)
            (answer,) = await store.apply([ask], began)
            if not isinstance(answer, Allowed):  # another worker's clock is past midnight: the store says so
                day = DAY + 1
                ask = Admit(name, "ann", "", day, MIDNIGHT, MIDNIGHT + DAY_MS, days[1:], cost=1_000, ttl_ms=DAY_MS)
                (answer,) = await store.apply([ask], began)
            assert isinstance(answer, Allowed)
            ended = began + source.randrange(600)  # some calls end after midnight: booked where the money was held
            await store.apply(
                [Record(Entry(name, "ann", day, ended, cost, admission=name)), Release("ann", name)], ended
            )
            spent[day] += cost

    await asyncio.gather(*[worker(number) for number in range(16)])
    assert min(spent.values()) > 0
    for store in stores:
        standing = await store.standing("ann", [*days, total(1)], now=MIDNIGHT + 10_000)
        assert standing.used == (spent[DAY], spent[DAY + 1], spent[DAY] + spent[DAY + 1])
        assert standing.held == (0, 0, 0)
        assert await store.verify() == []
    await close(stores)


async def test_incident_16_what_costs_nothing_passes_when_told_so(backend: Backend) -> None:
    """With the budget spent, or overrun, a free call gets in and one of unknown cost does not; both hold nothing."""
    await backend.apply([record("e", 100)], NOW)
    for amount in (0, 99, 100):
        assert isinstance(await one(backend, admit(f"free-{amount}", total(amount), free=True)), Allowed)
        refusal = await one(backend, admit(f"unknown-{amount}", total(amount)))
        assert isinstance(refusal, Refused)
        assert refusal.reasons == ("exhausted",)
    assert isinstance(await one(backend, admit("not-free", total(100), free=True, cost=1)), Refused)


async def test_incident_20_a_refusal_leaves_no_trace(backend: Backend) -> None:
    """1,000 refusals, of rates, spent budgets and full ones, of one that is known and one that is not: no change."""
    await backend.apply([record("e", 60), admit("a", total(100), rate(9), cost=30, tokens=5)], NOW)
    limits: tuple[Limit, ...] = (rate(9), total(100), budget(100), budget(10, "tokens"))
    before = await dump(backend, NOW + 1_000, *limits)
    for number in range(250):
        answers = await backend.apply(
            [
                admit(f"rate-{number}", rate(1), customer="ann"),
                admit(f"full-{number}", rate(9), total(100), cost=20, tokens=7),
                admit(f"tokens-{number}", rate(9), total(10**6), budget(10, "tokens"), cost=1, tokens=6),
                admit(f"new-{number}", rate(0), budget(0), customer=f"new-{number}"),
            ],
            NOW + number,
        )
        assert all(isinstance(answer, Refused) for answer in answers)
    assert await dump(backend, NOW + 1_000, *limits) == before


async def test_a_customer_deleted_twice_keeps_the_records_of_both_lives(backend: Backend) -> None:
    """A record of an earlier life that comes again finds the label of that life: it counts once."""
    entry = Entry("e1", "c1", day=100, at_ms=1_000, cost=5)
    await backend.apply([Record(entry)], now=2_000)
    await backend.delete("c1", now=3_000)
    await backend.apply([Record(Entry("e2", "c1", day=100, at_ms=4_000, cost=7))], now=5_000)
    await backend.delete("c1", now=6_000)
    [again] = await backend.apply([Record(entry)], now=7_000)
    assert isinstance(again, Recorded)
    assert not again.new
    assert sum(row.amounts.cost for row in await backend.usage(UsageQuery())) == 12
    assert await backend.verify() == []
