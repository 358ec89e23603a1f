"""What only the store in memory promises: bounds, threads, size."""

from __future__ import annotations

import gc
import threading
import tracemalloc

import pytest

from respan_guard.backends.base import Allowed, AuditRow, CustomerQuery, Op, RecordQuery, RefusalRow, Release
from respan_guard.backends.memory import MemoryBackend
from respan_guard.errors import ConfigurationError, CounterOverflow
from respan_guard.testing.contract_support import DAY, MAX, NOW, admit, budget, dump, rate, record, total


def visit(backend: MemoryBackend, customer: str, now: int, *, admission: str = "a", cost: int = 0) -> None:
    """One admission under a default policy, ended at once."""
    ops: list[Op] = [
        admit(admission, rate(60), budget(10**9), customer=customer, cost=100),
        Release(customer, admission),
    ]
    backend.apply_now(ops, now)
    if cost:
        backend.apply_now([record(admission, cost, customer=customer)], now)


def test_an_idle_customer_takes_at_most_600_bytes() -> None:
    """Name included, entries not: 20,000 customers after one admission each."""
    backend = MemoryBackend()
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(20_000):
            visit(backend, f"customer-{number:06}", NOW + 10 * number)
        for number in range(20_000):
            backend.apply_now([Release("nobody", "x")], NOW + 10**6 + number)
        gc.collect()
        size = tracemalloc.get_traced_memory()[0] / 20_000
    finally:
        tracemalloc.stop()
    assert size <= 600


async def test_a_customer_at_rest_is_as_it_was() -> None:
    """Rates, sums, params and times are the same before it rests, while it does, and when it is back."""
    backend = MemoryBackend()
    limits = (rate(60, 3_600_000), rate(60), budget(10**9), total(10**9))
    await backend.put("ann", {"name": "Ann"}, now=NOW)
    row = await backend.get("ann")
    assert row is not None
    for number in range(3):
        op = admit(f"a{number}", *limits, revision=row.revision, cost=5, model="mn"[number % 2])
        entry = record(f"e{number}", 7, model="m", input_tokens=3, admission=op.id)
        backend.apply_now([op, entry, Release("ann", op.id)], NOW)
    later = NOW + 61_000
    before = await dump(backend, later, *limits)
    backend.apply_now([Release("nobody", "x")], later)
    backend.apply_now([Release("nobody", "x")], later)
    assert "ann" in backend._store.resting
    assert await dump(backend, later, *limits) == before
    assert [row.customer for row in await backend.customers(CustomerQuery(search="ann"))] == ["ann"]
    assert isinstance(backend.apply_now([admit("b", *limits, revision=row.revision)], later)[0], Allowed)
    assert (await backend.standing("ann", limits, now=later)).used == (4, 3, 21, 21)


def test_holds_are_forgotten_a_minute_after_their_end() -> None:
    """A busy customer's ended admissions don't pile up, nor does the heap of what ended early."""
    backend = MemoryBackend()
    for number in range(5000):
        visit(backend, "ann", NOW + 100 * number, admission=f"a{number}")
    cell = backend._store.cells["ann"]
    assert len(cell.holds) == 0
    assert len(cell.expiry) <= 70
    assert len(backend._store.answers) <= 700
    assert len(backend._store.ended) <= 700


def test_holds_nobody_ends_are_forgotten_after_days() -> None:
    """They are listed for six days, then go, without hindering others."""
    backend = MemoryBackend()
    for number in range(100):
        backend.apply_now([admit(f"lost{number}", cost=5, ttl_ms=1000)], NOW)
    for number in range(100):
        visit(backend, "bob", NOW + 10_000 + 1000 * number, admission=f"a{number}")
    assert len(backend._store.cells["ann"].holds) == 100
    backend.apply_now([], NOW + 6 * 86_400_000 + 2000)
    assert set(backend._store.resting) == {"ann", "bob"}


async def test_random_customers_are_bounded() -> None:
    """Above `max_customers`, idle ones that spent nothing are forgotten; spending and params never are."""
    backend = MemoryBackend(max_customers=100)
    visit(backend, "spender", NOW, cost=5)
    await backend.put("known", {"name": "x"}, now=NOW)
    for number in range(3000):
        visit(backend, f"random-{number}", NOW + 10_000 * number)
    assert len(backend._store) <= 130
    assert (await backend.standing("spender", [total(9)])).used == (5,)
    row = await backend.get("known")
    assert row is not None
    assert row.params == {"name": "x"}
    assert await backend.verify() == []


def test_a_customer_with_a_rate_in_use_is_not_forgotten() -> None:
    """Else a flood of random customers would reset somebody's window."""
    backend = MemoryBackend(max_customers=10)
    limit = rate(1, 3_600_000)
    backend.apply_now([admit("a", limit), Release("ann", "a")], NOW)
    for number in range(500):
        visit(backend, f"random-{number}", NOW + 5_000 * number)
    assert not isinstance(backend.apply_now([admit("b", limit)], NOW + 5_000 * 500)[0], Allowed)


def test_long_windows_outlast_the_bound_and_the_bound_comes_back() -> None:
    """Random customers with a rate per day outnumber it for two days: none gets its limit back, none is refused."""
    backend = MemoryBackend(max_customers=100)
    limit = rate(1, 86_400_000)

    def ask(name: str, admission: str, now: int) -> bool:
        answers = backend.apply_now([admit(admission, limit, customer=name), Release(name, admission)], now)
        return isinstance(answers[0], Allowed)

    assert all(ask(f"random-{number}", "a", NOW + 5_000 * number) for number in range(1000))
    now = NOW + 5_000 * 1000
    assert not any(ask(f"random-{number}", "b", now) for number in range(1000))
    assert len(backend._store) == 1000
    for number in range(1000):
        visit(backend, f"later-{number}", now + 2 * 86_400_000 + 5_000 * number)
    assert len(backend._store) <= 130


def test_who_is_refused_takes_no_room() -> None:
    """A flood that a limit stops leaves nothing behind."""
    backend = MemoryBackend(max_customers=10)
    for number in range(500):
        backend.apply_now([admit("a", rate(0), customer=f"random-{number}")], NOW)
    assert len(backend._store) == 0


async def test_entries_are_bounded_where_asked() -> None:
    """The oldest go, their sums stay, and the proof still holds."""
    backend = MemoryBackend(max_entries=10)
    for number in range(5000):
        backend.apply_now([record(f"e{number}", 1)], NOW)
    assert [s.entry.id for s in await backend.entries(RecordQuery())] == [f"e{n}" for n in range(4990, 5000)]
    assert (await backend.standing("ann", [total(1)])).used == (5000,)
    assert len(backend._store.log) < 3000
    assert await backend.verify() == []


async def test_refusals_and_audit_are_bounded() -> None:
    """The newest stay."""
    backend = MemoryBackend()
    await backend.add_refusals([RefusalRow(f"c{number}", "rate", number, 1) for number in range(100_010)])
    assert len(await backend.refusals(limit=200_000)) == 100_000
    for number in range(10_010):
        await backend.add_audit(AuditRow(number, "ann", "x", "y", None, None))
    assert [row.at_ms for row in await backend.audit(limit=20_000)][-1] == 10


def test_threads_share_one_store() -> None:
    """8 threads that ask for tenths of a budget: exactly ten are admitted, each time."""
    for _ in range(20):
        backend = MemoryBackend()
        admitted: list[str] = []

        def ask(worker: int, backend: MemoryBackend = backend, admitted: list[str] = admitted) -> None:
            for number in range(25):
                op = admit(f"{worker}-{number}", total(100), cost=10)
                if isinstance(backend.apply_now([op], NOW)[0], Allowed):
                    admitted.append(op.id)

        threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(admitted) == 10


async def test_a_batch_that_overflows_midway_changes_nothing() -> None:
    """Also where two entries only together pass the range, and a replay among them adds nothing."""
    backend = MemoryBackend()
    backend.apply_now([record("e", MAX - 5)], NOW)
    before = await dump(backend)
    with pytest.raises(CounterOverflow, match="'ann'"):
        backend.apply_now([record("f", 3), record("g", 3)], NOW)
    with pytest.raises(CounterOverflow):
        backend.apply_now([admit("a"), record("t", 0, input_tokens=MAX), record("u", 0, output_tokens=1)], NOW)
    assert await dump(backend) == before
    backend.apply_now([record("f", 3), record("f", 3), record("e", MAX - 5), record("g", 2)], NOW)
    assert await backend.verify() == []


async def test_verify_finds_damage() -> None:
    """Sums, totals, spans, live holds and log are each compared with what they are made from."""
    backend = MemoryBackend()
    backend.apply_now([admit("a", total(99), cost=5), record("e", 3)], NOW)
    assert await backend.verify() == []
    cell = backend._store.cells["ann"]
    cell.sums["", DAY].cost += 1
    cell.tokens += 1
    next(iter(cell.live.values())).cost += 1
    backend._store.log.append(record("lost", 0).entry)
    found = {row.what for row in await backend.verify()}
    assert found == {
        "cost",
        "total cost",
        "total tokens",
        "sum cost:",
        "held cost",
        "calls",
        "entry out of place",
        "log length",
    }


async def test_limits_over_all_customers_follow_every_change() -> None:
    """Holds that are made, drawn from, renewed, released, deleted or expire, and customers at rest."""
    backend = MemoryBackend()
    everyone = total(10**9, scope="all")
    backend.apply_now([admit("a", customer="bob", cost=10, ttl_ms=1000), record("e", 1, customer="bob")], NOW)

    async def at(now: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        found = await backend.standing("ann", [everyone], now=now)
        return found.used, found.held

    assert await at(NOW) == ((1,), (10,))
    backend.apply_now([record("f", 4, customer="bob", admission="a"), admit("b", customer="eve", cost=5)], NOW)
    assert await at(NOW) == ((5,), (11,))
    assert await at(NOW + 1000) == ((5,), (5,))
    await backend.delete("eve", now=NOW + 1000)
    assert await at(NOW + 1000) == ((5,), (0,))
    for number in range(20):
        backend.apply_now([record(f"g{number}", 1, customer="zoe")], NOW + 100_000 + number)
    assert await at(NOW + 200_000) == ((25,), (0,))


@pytest.mark.parametrize("url", ["memory://name", "memory:///path", "memory://?max_customers=5"])
def test_a_url_with_more_than_the_scheme_is_refused(url: str) -> None:
    """Nothing in it would have an effect, so it says what to write."""
    with pytest.raises(ConfigurationError, match="write memory://"):
        MemoryBackend(url)


def test_bounds_are_checked() -> None:
    """A bound of 0 can't work."""
    with pytest.raises(ConfigurationError, match="max_customers"):
        MemoryBackend(max_customers=0)
    with pytest.raises(ConfigurationError, match="max_entries"):
        MemoryBackend(max_entries=0)
