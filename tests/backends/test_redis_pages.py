"""What a page costs on Redis, and that `verify` finds what somebody changed by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from redis import Redis

from respan_guard.backends.base import Backend, CustomerQuery, RecordQuery, Release, UsageQuery
from respan_guard.backends.redis import RedisBackend
from respan_guard.testing.contract_support import DAY, NOW, admit, allowed, one, record, total
from tests.backends.redis_server import RedisServer

SORTS = ("customer", "name", "first_seen", "last_seen", "requests", "calls", "cost", "tokens")
PREFIX = "respan:{default}:"


@pytest.fixture
def client() -> Iterator[Redis]:
    """A client of a server of the test's own."""
    server = RedisServer()
    made = Redis.from_url(server.url, decode_responses=True)
    yield made
    made.close()
    server.stop()


@pytest.fixture
async def backend(client: Redis) -> AsyncIterator[RedisBackend]:
    """An open, empty store on that server."""
    opened = RedisBackend(f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}")
    await opened.open()
    yield opened
    await opened.close()


def commands(client: Redis) -> int:
    """How many commands ran since the counters were reset, those inside scripts included."""
    stats: Any = client.info("commandstats")
    return sum(
        entry["calls"] for name, entry in stats.items() if name not in ("cmdstat_info", "cmdstat_config|resetstat")
    )


async def fill(backend: Backend, count: int) -> None:
    """Customers with sums that have an order."""
    for start in range(0, count, 500):
        names = range(start, min(count, start + 500))
        await backend.apply([record("e", n * 7919 % count, customer=f"c{n:05}", output_tokens=n) for n in names], NOW)


async def test_a_page_costs_its_rows(client: Redis, backend: RedisBackend) -> None:
    """Among 5,000 customers, a page of 10 in any order takes as many commands as it has rows, and a few to find it."""
    await fill(backend, 5000)
    await backend.customers(CustomerQuery(limit=1))  # what waits to be sorted in is sorted in once
    for sort in SORTS:
        for descending in (False, True):
            query = CustomerQuery(sort=sort, descending=descending, limit=10)
            page = await backend.customers(query)
            row = page[-1]
            values: dict[str, str | int] = {
                "customer": row.customer, "name": "", "first_seen": row.first_seen_ms, "last_seen": row.last_seen_ms,
                "requests": row.totals.requests, "calls": row.totals.calls, "cost": row.totals.cost,
                "tokens": row.totals.output_tokens,
            }  # fmt: skip
            after = (values[sort], row.customer)
            client.config_resetstat()
            more = await backend.customers(CustomerQuery(sort=sort, descending=descending, limit=10, after=after))
            assert len(more) == 10
            assert {one.customer for one in more}.isdisjoint(one.customer for one in page)
            assert commands(client) < 60, sort


async def test_other_reads_cost_what_they_show(client: Redis, backend: RedisBackend) -> None:
    """One customer, its log's page, the newest of the log, totals by day: none looks at 5,000 customers."""
    await fill(backend, 5000)
    await backend.apply([record(f"x{n}", 1, customer="c00007") for n in range(300)], NOW)
    await backend.customers(CustomerQuery(limit=1))
    reads: list[tuple[Any, int]] = [
        (backend.get("c00007"), 8),
        (backend.standing("c00007", [total(1)], now=NOW), 12),
        (backend.entries(RecordQuery(customer="c00007", limit=10)), 500),
        (backend.entries(RecordQuery(descending=True, limit=10)), 500),
        (backend.usage(UsageQuery(by=("day",), distinct=True)), 12),
        (backend.usage(UsageQuery(customer="c00007", by=("model",))), 12),
        (backend.count_customers(), 6),
        (backend.count_customers(seen_since_ms=NOW), 8),
    ]
    for read, most in reads:
        client.config_resetstat()
        await read
        assert commands(client) <= most, read


async def test_writers_keep_what_waits_to_be_sorted_in_short(client: Redis, backend: RedisBackend) -> None:
    """A reader that comes after any number of new customers finds some thousand at most to sort in."""
    await fill(backend, 5000)
    assert client.scard(f"{PREFIX}unsorted") <= 4096 + 512
    assert len(await backend.customers(CustomerQuery(limit=10_000))) == 5000
    assert client.scard(f"{PREFIX}unsorted") == 0


async def test_a_customer_that_is_swept_and_sorted_in_by_one_batch_keeps_its_place(backend: RedisBackend) -> None:
    """The hourly sweep and the writer's own sorting look at the same customers: what they spend later moves them."""
    names, later = [f"h{at:03}" for at in range(400)], NOW + 3_600_000
    await backend.apply([admit("a", customer=name, ttl_ms=86_400_000) for name in names], NOW)
    await backend.customers(CustomerQuery(limit=1))  # all are sorted in
    await fill(backend, 4500)  # so many wait that the next batch sorts in some, its own ones too
    await backend.apply([record("e1", 1, customer=name) for name in names], later)
    await backend.apply([record("e2", 10_000 + at, customer=name) for at, name in enumerate(names)], later + 1)
    page = await backend.customers(CustomerQuery(sort="cost", descending=True, limit=400))
    assert [row.customer for row in page] == names[::-1]


async def test_a_hold_of_a_dead_process_ends_for_limits_over_all_customers(backend: RedisBackend) -> None:
    """Its customer was swept before there was such a limit and never comes back: its time is over all the same."""
    wide, hour = total(100, scope="all"), 3_600_000
    await one(backend, admit("x0", customer="x"))
    await one(backend, admit("c1", customer="c", cost=5, ttl_ms=600_000), NOW + hour - 1000)
    await one(backend, Release("c", "c1"), NOW + hour - 900)
    await one(backend, admit("x1", customer="x"), NOW + hour)  # sweeps
    await one(backend, admit("x2", wide, customer="x", cost=1, ttl_ms=1000), NOW + hour + 60_000)
    await one(backend, admit("c2", wide, customer="c", cost=80, ttl_ms=600_000), NOW + hour + 120_000)
    await allowed(backend, admit("x3", wide, customer="x", cost=50), NOW + 26 * hour)
    assert await backend.verify() == []


PLANTED: dict[str, tuple[Any, ...]] = {
    "an entry is gone": ("XDEL", "log", "1"),
    "an entry's place is gone": ("ZREM", "e:1", "e0"),
    "a day's customers are one less": ("SREM", f"d:{DAY}", "1"),
    "a day's customers are one more": ("SADD", f"d:{DAY}", "77"),
    "everybody's day is gone": ("DEL", f"g:{DAY}"),
    "a customer's older day is gone": ("DEL", "s:1"),
    "a hold is gone": ("DEL", "h:1"),
    "a customer is gone": ("DEL", "c:ann"),
    "a pruned day is another": ("DEL", "b:1"),
}


@pytest.mark.parametrize("what", PLANTED)
async def test_what_was_changed_by_hand_is_found(client: Redis, backend: RedisBackend, what: str) -> None:
    """`verify` is empty before, and says something after."""
    for number in range(8):  # so many days that the older ones are in the hash of their own
        await backend.apply([record(f"e{number}", 5, day=DAY - number, model="m")], NOW)
    await backend.apply([record("old", 5, day=DAY - 60), record("f", 2, customer="bob")], NOW)
    assert await backend.prune(DAY - 40) == 1
    await one(backend, admit("a", total(99), cost=5))
    assert await backend.verify() == []
    command, key, *rest = PLANTED[what]
    assert client.execute_command(command, f"{PREFIX}{key}", *rest) == 1  # type: ignore[no-untyped-call]  # theirs
    assert await backend.verify() != []
