"""Redis under traffic: trips, processes, replies that get lost, callers that give up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path

import pytest
from redis import Redis

from respan_guard import Guard, Usage
from respan_guard.backends.base import (
    Admit,
    Allowed,
    Backend,
    Ended,
    Op,
    Outcome,
    RecordQuery,
    Refused,
    Release,
    UsageQuery,
)
from respan_guard.backends.redis import RedisBackend
from respan_guard.errors import BackendError, StorageUnavailable
from respan_guard.testing.contract_support import MAX, NOW, admit, one, rate, record, recorded, total
from tests.backends import redis_server
from tests.backends.redis_server import RedisServer
from tests.faulty_proxy import Faults, FaultyProxy


@pytest.fixture
async def backend() -> AsyncIterator[RedisBackend]:
    """An open, empty store."""
    opened = RedisBackend(redis_server.shared_url(), namespace=f"test-{secrets.token_hex(6)}")
    await opened.open()
    yield opened
    await opened.close()


# -- trips -----------------------------------------------------------------------------------------


async def test_an_admission_is_one_trip_and_nothing_is_awaited_after_it() -> None:
    """Counted by the server: one script before the app runs, one for the record and the release behind it."""
    server = RedisServer()
    counting = Redis.from_url(server.url)
    async with Guard(server.url) as guard:
        async with guard.admit("ann", estimate=Decimal("0.01")):  # the first one loads the script
            pass
        await guard.flush()
        counting.config_resetstat()
        async with guard.admit("ann", estimate=Decimal("0.01")) as admission:
            await asyncio.sleep(0.05)
            assert _calls(counting) == {"evalsha": 1}
            await admission.record(Usage(model="m", cost="0.001"))
            assert _calls(counting) == {"evalsha": 2}  # asked for, so it was waited for
        await guard.flush()
        assert _calls(counting) == {"evalsha": 3}
        counting.config_resetstat()
        async with guard.admit("ann", estimate=Decimal("0.01")) as admission:
            admission.record_soon(Usage(model="m", cost="0.001"))
        await guard.flush()
        assert _calls(counting) == {"evalsha": 2}
    counting.close()
    server.stop()


def _calls(counting: Redis) -> dict[str, int]:
    """Scripts and transactions that clients sent since the counters were reset."""
    found = counting.info("commandstats")
    assert isinstance(found, dict)
    names = {name.removeprefix("cmdstat_"): entry["calls"] for name, entry in found.items()}
    return {name: calls for name, calls in names.items() if name in ("eval", "evalsha", "multi", "exec", "fcall")}


async def test_operations_that_wait_together_travel_together() -> None:
    """100 admissions of one pass of the loop are at most a few scripts."""
    server = RedisServer()
    counting = Redis.from_url(server.url)
    async with Guard(server.url, storage_timeout=5) as guard:
        async with guard.admit("ann"):
            pass
        await guard.flush()
        counting.config_resetstat()
        admissions = await asyncio.gather(*[guard.try_admit(f"c{n}") for n in range(100)])
        assert all(admissions)
        assert _calls(counting)["evalsha"] <= 3
        for admission in admissions:
            await admission.release()  # type: ignore[union-attr]
    counting.close()
    server.stop()


# -- processes -------------------------------------------------------------------------------------

ADMITTING = """
import asyncio, os, sys
from respan_guard.backends.base import *
from respan_guard.backends.redis import RedisBackend
from respan_guard.testing.contract_support import admit, record, total
url, namespace, go, name, tasks, requests = *sys.argv[1:5], *map(int, sys.argv[5:])
cap, inside = total(int(os.environ["CAP"])), 0
async def turn(backend, request):  # what all tasks ask for travels together, as from a guard's home
    global inside
    ids = [f"{name}-{number}-{request}" for number in range(tasks)]
    outcomes = await backend.apply([admit(id, cap, customer="hot", cost=100) for id in ids])
    ended = []
    for id, outcome in zip(ids, outcomes):
        if isinstance(outcome, Allowed):
            inside += 1
            cost = hash(id) % 101  # an upper bound was held; what is spent is at most that
            ended += [record(id, cost, customer="hot", admission=id), Release("hot", id)]
    await backend.apply(ended)
async def main():
    backend = RedisBackend(url, namespace=namespace)
    await backend.open()
    print("ready", flush=True)
    while not os.path.exists(go):
        await asyncio.sleep(0.001)
    for request in range(requests):
        await turn(backend, request)
    await backend.close()
    print(inside)
asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("tasks", "requests"), [(10, 20), pytest.param(50, 200, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
)
async def test_eight_processes_spend_0_over_a_budget(
    backend: RedisBackend, tmp_path: Path, tasks: int, requests: int
) -> None:
    """Upper bounds are held, so not one nano-USD more than the budget is spent, and little of it is left."""
    cap = 8 * tasks * requests * 20  # a fifth of what all would hold
    arguments = [redis_server.shared_url(), _namespace(backend), str(tmp_path / "go")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ADMITTING, *arguments, name, str(tasks), str(requests)],
            stdout=subprocess.PIPE, text=True, env={"CAP": str(cap), "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for name in "abcdefgh"
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    inside = sum(int(process.communicate(timeout=1500)[0]) for process in processes)
    at = await backend.standing("hot", [total(cap)])
    assert at.held == (0,)
    assert at.used[0] <= cap
    assert inside >= cap // 100
    assert await backend.verify() == []


def _namespace(backend: RedisBackend) -> str:
    return backend._at.prefix.split("{")[1].split("}")[0]


async def test_one_hundred_and_first_request_is_refused_whoever_asks(backend: RedisBackend) -> None:
    """A rate of 100 over 10 connections at once: exactly 100 are admitted."""
    others = [RedisBackend(redis_server.shared_url(), namespace=_namespace(backend)) for _ in range(10)]
    for other in others:
        await other.open()
    ops = [(other, admit(f"{at}-{n}", rate(100))) for at, other in enumerate(others) for n in range(20)]
    answers = await asyncio.gather(*[one(other, op, NOW) for other, op in ops])
    assert sum(isinstance(answer, Allowed) for answer in answers) == 100
    for other in others:
        await other.close()


# -- the network -----------------------------------------------------------------------------------


async def surely(backend: Backend, op: Op) -> Outcome:
    """Send until there is an answer, as a guard's home does; the clock is the server's."""
    while True:
        try:
            return (await backend.apply([op]))[0]
        except StorageUnavailable:
            await asyncio.sleep(0)


async def test_a_fifth_of_all_replies_is_lost_and_sums_are_exact() -> None:
    """1,000 operations of each kind through a proxy that cuts connections instead of answering: each counts once."""
    server = RedisServer()
    with FaultyProxy(server.port, faults=Faults(drop_reply=0.2, reset=0.05, match=b"EVALSHA"), seed=5) as proxy:
        through = RedisBackend(f"redis://127.0.0.1:{proxy.port}")
        direct = RedisBackend(server.url)
        for store in (through, direct):
            await _open(store)
        spent = 0
        for number in range(1000):
            hold, cost = f"a{number}", number % 97
            answer = await surely(through, admit(hold, rate(5_000_000 // 2), total(MAX), cost=100))
            assert isinstance(answer, Allowed)
            await surely(through, record(f"e{number}", cost, admission=hold))
            await surely(through, Release("ann", hold))
            spent += cost
        assert proxy.counts["drop_reply"] > 400
        at = await direct.standing("ann", [total(1), total(1, "requests")])
        assert (at.used, at.held) == ((spent, 1000), (0, 0))
        assert [row.entry.id for row in await direct.entries(RecordQuery(limit=2000))] == [f"e{n}" for n in range(1000)]
        assert await direct.holds() == []
        assert await direct.verify() == []
        for store in (through, direct):
            await store.close()
    server.stop()


async def _open(backend: Backend) -> None:
    while True:
        try:
            await backend.open()
        except BackendError:
            continue
        return


@pytest.mark.parametrize("faults", [Faults(duplicate=1.0), Faults(delay=0.02)])
async def test_requests_that_come_twice_or_late_count_once(faults: Faults) -> None:
    """What a network may do to what a client sent once."""
    server = RedisServer()
    with FaultyProxy(server.port, faults=faults, seed=1) as proxy:
        through = RedisBackend(f"redis://127.0.0.1:{proxy.port}")
        await through.open()
        for number in range(60):
            await surely(through, admit(f"a{number}", total(MAX), cost=9))
            await surely(through, record(f"e{number}", 7, admission=f"a{number}"))
            await surely(through, Release("ann", f"a{number}"))
        await asyncio.sleep(0.1)
        (row,) = await through.usage(UsageQuery())
        assert (row.amounts.cost, row.amounts.calls, row.amounts.requests) == (420, 60, 60)
        assert await through.holds() == []
        assert await through.verify() == []
        await through.close()
    server.stop()


async def test_a_black_hole_is_got_over() -> None:
    """While nothing answers, nobody waits longer than the guard's deadline; afterwards all is booked, once."""
    server = RedisServer()
    with FaultyProxy(server.port) as proxy:
        async with Guard(f"redis://127.0.0.1:{proxy.port}", storage_timeout=0.25) as guard:
            loop = asyncio.get_running_loop()
            async with guard.admit("ann") as admission:
                proxy.black_hole()
                admission.record_soon(Usage(model="m", cost="0.5"))
            for _ in range(3):
                begun = loop.time()
                with contextlib.suppress(BackendError):
                    await guard.try_admit("ann")
                assert loop.time() - begun < 2  # the deadline is 0.25; this machine may be busy
            proxy.recover(cut=True)
            for _ in range(200):
                try:
                    spent = (await guard.status("ann")).total_spend
                except BackendError:
                    spent = None
                if spent == Decimal("0.5"):
                    break
                await asyncio.sleep(0.05)
            assert spent == Decimal("0.5")
            assert await guard.verify() == []
    server.stop()


@pytest.mark.parametrize("wanted", [150, pytest.param(20_000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
async def test_cancelled_callers_get_nobody_elses_answer(backend: RedisBackend, wanted: int) -> None:
    """Batches are cancelled at random moments: every answer that arrives is the caller's own, and sums are exact."""
    source, numbers, booked = random.Random(3), itertools.count(1), dict[str, int]()

    async def call(number: int) -> None:
        name = f"e{number}"
        booked[name] = number
        (outcome,) = await backend.apply([record(name, number, customer=f"c{number % 5}")], NOW)
        assert outcome.cost == number  # type: ignore[union-attr]  # its own cost, not another's

    cancelled = 0
    while cancelled < wanted:
        tasks = [asyncio.create_task(call(next(numbers))) for _ in range(20)]
        await asyncio.sleep(source.uniform(0, 0.004))
        for task in source.sample(tasks, 12):
            cancelled += task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError), result
    for name, cost in booked.items():
        await recorded(backend, record(name, cost, customer=f"c{cost % 5}"))
    (row,) = await backend.usage(UsageQuery(by=()))
    assert (row.amounts.cost, row.amounts.calls) == (sum(booked.values()), len(booked))
    assert await backend.verify() == []


# -- keys ------------------------------------------------------------------------------------------


async def test_no_id_reaches_anothers_keys(backend: RedisBackend) -> None:
    """Customers, admissions, entries and models that are called like parts of keys are apart."""
    names = ["ann", "{ann}", "c:ann", "ann:1", "1", "meta", "log", "names", "}:c:ann", "*", "ann\r\nDEL x", "a\tb", " "]
    for number, name in enumerate(names):
        ops: list[Op] = [admit(hold, total(MAX), customer=name, model=hold, cost=1) for hold in names]
        await backend.apply(ops, NOW)
        await backend.apply([record(entry, number, customer=name, model=entry) for entry in names], NOW)
    for number, name in enumerate(names):
        at = await backend.standing(name, [total(1), total(1, scope="customer+model")], names[0], now=NOW)
        assert (at.used, at.held) == ((number * len(names), number), (len(names), 1))
        assert len(await backend.holds(name, now=NOW)) == len(names)
    assert await backend.verify() == []


async def test_every_key_of_a_store_is_its_own(backend: RedisBackend) -> None:
    """All begin with the namespace in braces, so that they share a slot and nobody else's are touched."""
    client = Redis.from_url(redis_server.shared_url(), decode_responses=True)
    before = set(client.scan_iter("*"))
    await backend.put("ann", {"name": "x", "blocked": True}, now=NOW)
    await recorded(backend, record("e", 5))
    after = set(client.scan_iter("*"))
    client.close()
    prefix = backend._at.prefix
    made = {key for key in after - before if key.startswith(prefix)}
    assert after - before == made
    assert f"{prefix}c:ann" in made


async def test_deleting_a_customer_leaves_no_trace_of_it() -> None:
    """An address in every field there is: after the deletion no byte of it is in the whole database."""
    server = RedisServer()
    canary = "canary-7f3a@example.com"
    store = RedisBackend(server.url)
    await store.open()
    await store.put(canary, {"name": canary, "email": canary, "blocked": True}, actor=canary, now=NOW)
    row = await store.get(canary)
    assert row is not None
    await one(store, admit("a", customer=canary, revision=row.revision, cost=5))
    usage = Usage(metadata={"who": canary})
    await recorded(store, record("e", 3, customer=canary, admission="a", usage=usage))
    assert canary in repr(await store.entries(RecordQuery()))
    assert await store.delete(canary, actor="dpo", now=NOW + 1)
    client = Redis.from_url(server.url)
    for key in client.scan_iter("*"):
        assert canary.encode() not in key
        assert canary.encode() not in (client.dump(key) or b""), key
    client.close()
    assert await store.verify() == []
    await store.close()
    server.stop()


async def test_an_id_that_ends_is_forgotten_in_the_end() -> None:
    """A million ended admissions would be a leak: their answers go a few minutes after they ended."""
    server = RedisServer()
    store = RedisBackend(server.url)
    await store.open()
    client = Redis.from_url(server.url)
    for turn in range(12):
        at = NOW + turn * 60_000
        for number in range(20):
            await store.apply([admit(f"{turn}-{number}", cost=1), Release("ann", f"{turn}-{number}")], at)
    left = sum(client.hlen(f"respan:{{default}}:{name}") for name in ("a0", "a1"))
    assert left <= 20 * 7
    assert client.exists("respan:{default}:h:1") == 0
    client.close()
    await store.close()
    server.stop()


async def test_holds_that_nobody_ended_go_after_six_days(backend: RedisBackend) -> None:
    """They are listed as expired until then; pages and sums are right all along."""
    await one(backend, admit("a", total(9), cost=5, ttl_ms=1000))
    assert isinstance(await one(backend, admit("b", total(9), cost=5)), Refused)
    day = 86_400_000
    for days, listed in ((1, 1), (5, 1), (7, 0)):
        at = NOW + days * day
        assert await one(backend, Release("nobody", "x"), at) == Ended("gone")
        await one(backend, admit(f"n{days}", customer="bob", ttl_ms=1), at)
        assert len(await backend.holds(state="expired", now=at)) == listed
    assert await backend.verify() == []
    assert isinstance(await one(backend, Admit("c", "ann", "", 1, 0, 1 << 52, (total(9),), cost=9)), Allowed)
