"""Several processes on one PostgreSQL, servers that die, statements that collide."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest

from respan_guard.backends.base import (
    Admit,
    Allowed,
    CustomerQuery,
    Limit,
    Op,
    Outcome,
    Record,
    RecordQuery,
    Release,
    StoredEntry,
)
from respan_guard.backends.postgres import PostgresBackend
from respan_guard.errors import StorageUnavailable
from tests.backends import postgres_server
from tests.backends.postgres_support import Batcher, asked, opened, script, together, url_fixture
from tests.backends.sqlite_support import DAY, NOW, admit, finished, record

__all__ = ["url_fixture"]

PREAMBLE = """
import asyncio, itertools, os, random, sys
from decimal import Decimal
from respan_guard import Customer, Guard, Usage
from respan_guard.backends.base import *
from respan_guard.backends.postgres import PostgresBackend
from tests.backends.sqlite_support import DAY, NOW, admit, record
url, name = sys.argv[1:3]
"""

SPENDING = """
tasks, requests = map(int, sys.argv[3:])
async def main():
    async with Guard(url, storage_timeout=60) as guard:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        chance = random.Random(name)
        async def work():
            for _ in range(requests):
                held = chance.randint(1, 1000)
                answer = await guard.try_admit("alice", estimate=Decimal(held) / 10**6)
                if answer:
                    await answer.record(Usage(model="m", cost=Decimal(chance.randint(0, held)) / 10**6))
                    await answer.release()
        await asyncio.gather(*[work() for _ in range(tasks)])
asyncio.run(main())
"""


async def spend(url: str, tasks: int, requests: int) -> None:
    """Eight processes spend a budget that is enough for about half of what they ask for."""
    from decimal import Decimal

    from respan_guard import Customer, Guard

    budget = Decimal(8 * tasks * requests * 125) / 10**6
    async with Guard(url, storage_timeout=60) as guard:
        await guard.put_customer(Customer(customer_identifier="alice", total_budget=budget))
    processes = [script(PREAMBLE + SPENDING, url, name, tasks, requests) for name in "abcdefgh"]
    together(processes)
    for process in processes:
        await asyncio.to_thread(finished, process, 900)
    async with Guard(url, storage_timeout=60) as guard:
        spent = (await guard.status("alice")).total_spend
        assert budget * 9 / 10 < spent <= budget
        assert await guard.verify() == []


async def test_eight_processes_never_overspend(url: str) -> None:
    """Tasks of 8 processes with upper bounds on one customer: not a nano-USD above the budget, and most of it used."""
    await spend(url, tasks=10, requests=8)


@pytest.mark.soak
@pytest.mark.timeout(1200)
async def test_eight_processes_never_overspend_for_long(url: str) -> None:
    """The same with 8 x 50 x 200 requests."""
    await spend(url, tasks=50, requests=200)


async def test_first_requests_of_a_customer_race(url: str) -> None:
    """A customer nobody knew, asked for on 8 connections at once with a tenth of its budget each: exactly 10 pass."""
    backends = [PostgresBackend(url) for _ in range(8)]
    for turn in range(5):
        for backend in backends:
            await backend.open()

        async def ask(backend: PostgresBackend, name: str) -> int:
            outcomes = [
                await backend.apply([admit(f"{name}-{number}", name.split("-")[0])], NOW) for number in range(4)
            ]
            return sum(isinstance(outcome, Allowed) for (outcome,) in outcomes)

        admitted = await asyncio.gather(
            *[ask(backend, f"customer{turn}-{number}") for number, backend in enumerate(backends)]
        )
        assert sum(admitted) == 10
    assert await backends[0].verify() == []
    for backend in backends:
        await backend.close()


async def test_several_open_a_store_that_is_not_there(url: str) -> None:
    """One of them makes the schema; none of them fails, and every record is kept."""
    backends = [PostgresBackend(url) for _ in range(8)]

    async def work(backend: PostgresBackend, name: str) -> None:
        await backend.open()
        await backend.apply([record(name)], NOW)
        await backend.close()

    await asyncio.gather(*[work(backend, f"e{number}") for number, backend in enumerate(backends)])
    async with opened(url) as backend:
        row = await backend.get("alice")
        assert row is not None
        assert row.totals.calls == 8


async def test_a_crashing_server_loses_nothing_that_was_acknowledged() -> None:
    """`pg_ctl stop -m immediate` under load, repeated: what was acknowledged is there, once, and all sums are right."""
    server = postgres_server.PostgresServer.newest(fsync=True)
    url = postgres_server.new_store(server.url)
    acknowledged: set[str] = set()
    sent: set[str] = set()
    try:
        async with opened(f"{url}&timeout=10") as backend:
            stopping = False

            async def work(name: str) -> None:
                number = 0
                while not stopping:
                    number += 1
                    entry, customer = f"{name}-{number}", f"customer-{number % 5}"
                    ask, spent = admit(entry, customer, cost=5, limits=()), record(entry, customer, cost=5)
                    ops: list[Op] = [ask, spent, Release(customer, entry)]
                    sent.add(entry)
                    while True:  # as a guard does: the same ids until there is an answer
                        try:
                            await backend.apply(ops)
                        except StorageUnavailable:
                            await asyncio.sleep(0.02)
                        else:
                            acknowledged.add(entry)
                            break

            workers = [asyncio.create_task(work(name)) for name in "abcd"]
            chance = random.Random(3)
            for _ in range(3):
                before = len(acknowledged)
                while len(acknowledged) < before + 20:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(chance.uniform(0, 0.1))
                await asyncio.to_thread(server.stop, "immediate")
                await asyncio.to_thread(server.start)
            stopping = True
            await asyncio.gather(*workers)
            assert await backend.verify() == []
            stored = [row.entry.id for row in await backend.entries(RecordQuery(limit=100_000))]
            assert len(stored) == len(set(stored))
            assert set(stored) == acknowledged == sent
            assert await backend.holds() == []
    finally:
        server.delete()


async def test_what_collides_is_sent_again(url: str) -> None:
    """Serialization failures and deadlocks, planted in the server: each batch is applied exactly once all the same."""
    async with opened(url) as backend:
        asked(url, "CREATE SEQUENCE {schema}.planted")
        asked(
            url,
            """CREATE FUNCTION {schema}.plant() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF nextval(TG_ARGV[0]) % 3 <> 0 THEN
                    RAISE EXCEPTION 'planted' USING ERRCODE = CASE WHEN random() < 0.5 THEN '40001' ELSE '40P01' END;
                END IF; RETURN NEW; END $$""",
        )
        schema = url.rpartition("=")[2]
        asked(
            url,
            "CREATE TRIGGER planted BEFORE INSERT ON {schema}.entries FOR EACH STATEMENT "
            f"EXECUTE FUNCTION {{schema}}.plant('\"{schema}\".planted')",
        )
        for number in range(30):
            ops: list[Op] = [admit(f"a{number}", cost=1), record(f"e{number}", cost=1), Release("alice", f"a{number}")]
            outcomes = await backend.apply(ops, NOW)
            assert isinstance(outcomes[0], Allowed)
        assert asked(url, "SELECT last_value > 60 FROM {schema}.planted") == [(True,)]
        row = await backend.get("alice")
        assert row is not None
        assert (row.totals.calls, row.totals.requests, row.totals.cost) == (30, 30, 30)
        assert [stored.seq for stored in await backend.entries(RecordQuery())] == list(range(1, 31))
        assert await backend.verify() == []


async def test_workers_with_overlapping_limits_never_deadlock() -> None:
    """64 workers on connections of their own, batches of the same few customers in any order: none in the log."""
    server = postgres_server.PostgresServer.newest(deadlock_timeout="10ms")
    url = f"{postgres_server.new_store(server.url)}&timeout=60"
    wide = (Limit("total", "total", "cost", 10**12, scope="all"), Limit("m", "total", "cost", 10**12, scope="model"))
    try:
        async with opened(url):
            pass
        backends = [PostgresBackend(url) for _ in range(64)]

        async def work(number: int) -> None:
            backend, chance = backends[number], random.Random(number)
            await backend.open()
            for turn in range(4):
                names = [f"customer-{chance.randrange(12 + turn)}" for _ in range(8)]
                ops: list[Op] = [op for place, name in enumerate(names) for op in (
                    admit(f"{number}-{turn}-{place}", name, cost=1, limits=wide if number % 4 == 0 else ()),
                    record(f"{number}-{turn}-{place}", name, cost=1),
                    Release(name, f"{number}-{turn}-{place}"),
                )]  # fmt: skip
                await backend.apply(ops)
            await backend.close()

        await asyncio.gather(*[work(number) for number in range(64)])
        assert server.logged("deadlock detected") == []
        async with opened(url) as backend:
            assert sum(row.totals.calls for row in await backend.customers(CustomerQuery(limit=99))) == 64 * 4 * 8
            assert await backend.verify() == []
    finally:
        server.delete()


async def test_readers_of_the_log_miss_nothing(url: str) -> None:
    """Readers by place, while 8 connections write: each record once, in order, without a gap that is filled later."""
    async with opened(url):
        pass
    written: set[str] = set()
    writing = True

    async def write(name: str) -> None:
        chance = random.Random(name)
        async with opened(url) as backend:
            for number in range(40):
                names = [f"{name}-{number}-{place}" for place in range(chance.randint(1, 4))]
                await backend.apply([record(entry, f"customer-{chance.randrange(9)}") for entry in names])
                written.update(names)

    async def read() -> list[StoredEntry]:
        seen: list[StoredEntry] = []
        async with opened(url) as backend:
            while True:
                last_turn = not writing
                page = await backend.entries(RecordQuery(after=seen[-1].seq if seen else 0, limit=7))
                seen += page
                if last_turn and not page:
                    return seen

    readers = [asyncio.create_task(read()) for _ in range(3)]
    await asyncio.gather(*[write(name) for name in "abcdefgh"])
    writing = False
    for seen in await asyncio.gather(*readers):
        assert [stored.seq for stored in seen] == list(range(1, len(written) + 1))
        assert {stored.entry.id for stored in seen} == written


FORKING = """
backend = PostgresBackend(url)
async def main():
    await backend.open()
    await backend.apply([record("parent-1")], NOW)
    child = os.fork()
    if not child:
        try:
            backend.abandon()
            import threading
            def work():
                async def write():
                    mine = PostgresBackend(url)
                    await mine.open()
                    await mine.apply([record("child")], NOW)
                    await mine.close()
                asyncio.run(write())
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    await backend.apply([record("parent-2")], NOW)
    print((await backend.get("alice")).totals.calls)
    await backend.close()
asyncio.run(main())
"""


async def test_a_forked_child_leaves_the_parents_connection_alone(url: str) -> None:
    """The child drops what it inherited without a word to the server, and works with a connection of its own."""
    assert finished(script(PREAMBLE + FORKING, url, "a"), timeout=30) == "3\n"


LEAVING = """
async def main():
    backend = PostgresBackend(url)
    await backend.open()
    await backend.apply([record(f"{name}-{number}") for number in range(50)], NOW)
    print("acknowledged", flush=True)
    os._exit(0) if name == "b" else None
    backend.abandon()
asyncio.run(main())
"""


async def test_a_process_that_never_closes_ends(url: str) -> None:
    """A store that is let go of keeps nobody from ending, and what it acknowledged is there."""
    for name in "ab":
        assert finished(script(PREAMBLE + LEAVING, url, name), timeout=30) == "acknowledged\n"
    async with opened(url) as backend:
        row = await backend.get("alice")
        assert row is not None
        assert row.totals.calls == 100


async def test_another_processs_commit_is_seen_at_once(url: str) -> None:
    """Nothing is kept in memory: sums, holds, params and deletions of another count in the next batch."""
    async with opened(url) as first, opened(url) as second:
        await first.apply([admit("a", cost=900)], NOW)
        (refused,) = await second.apply([admit("b", cost=200)], NOW)
        assert not isinstance(refused, Allowed)
        await second.apply([record("e", cost=950)], NOW)
        (refused,) = await first.apply([admit("c", cost=60)], NOW + 10_000_000)
        assert not isinstance(refused, Allowed)
        await first.delete("alice", now=NOW + 10_000_000)
        (allowed,) = await second.apply([admit("d", cost=1000)], NOW + 10_000_000)
        assert isinstance(allowed, Allowed)


async def test_clocks_of_processes_may_differ(url: str) -> None:
    """What one saw expire, another whose clock is behind still counts, and gives back exactly that."""
    limit = Limit("total_budget", "total", "cost", 100)
    async with opened(url) as ahead, opened(url) as behind:
        ask = Admit("a", "alice", "", DAY, 0, 1 << 50, (limit,), cost=60, ttl_ms=1000)
        await ahead.apply([ask], NOW)
        await ahead.apply([admit("other", cost=5, limits=(limit,))], NOW + 2000)
        (refused,) = await behind.apply([admit("b", cost=50, limits=(limit,))], NOW + 500)
        assert not isinstance(refused, Allowed)
        await behind.apply([Release("alice", "a")], NOW + 500)
        (allowed,) = await behind.apply([admit("c", cost=95, limits=(limit,))], NOW + 500)
        assert isinstance(allowed, Allowed)
        assert await ahead.verify() == []


async def test_pruning_and_booking_at_once(url: str) -> None:
    """A record of a day that is being pruned is booked before, and kept in the sums, or it is too late: never twice."""
    async with opened(url) as booking, opened(url) as pruning:
        await booking.apply([record(f"e{number}", day=DAY - 50) for number in range(50)], NOW)
        batcher = Batcher(booking, NOW)

        async def book() -> None:
            for number in range(200):
                await batcher.submit(Record(record(f"e{number % 100}", day=DAY - 50).entry))

        async def prune() -> None:
            await asyncio.sleep(0.02)
            while await pruning.prune(DAY - 40, limit=5):
                await asyncio.sleep(0)

        await asyncio.gather(book(), prune())
        row = await booking.get("alice")
        assert row is not None
        assert 50 <= row.totals.calls <= 100
        assert await booking.verify() == []
        assert await booking.entries(RecordQuery()) == []


async def test_a_loop_that_closes_under_a_batch(url: str) -> None:
    """A loop that is gone while its batch runs takes its connection with it, but no lock, and leaves no half batch."""
    async with opened(url):
        pass
    tasks: list[asyncio.Task[list[Outcome]]] = []

    def run() -> None:
        backend = PostgresBackend(url)
        loop = asyncio.new_event_loop()

        async def main() -> None:
            await backend.open()
            tasks.append(asyncio.create_task(backend.apply([record("e1"), record("e2")], NOW)))
            await asyncio.sleep(0.001)

        loop.run_until_complete(main())
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(loop), return_exceptions=True))
        loop.close()
        backend.abandon()

    thread = threading.Thread(target=run)
    thread.start()
    await asyncio.to_thread(thread.join)
    begun = time.monotonic()
    async with opened(url) as backend:
        await backend.apply([record("e3")], NOW)
        row = await backend.get("alice")
        assert row is not None
        assert row.totals.calls in (1, 3)
        assert await backend.verify() == []
    assert time.monotonic() - begun < 30
