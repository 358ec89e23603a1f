"""A Redis Cluster: the contract, one order over the logs of its parts, slots that move, limits it can't keep."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.testclient import TestClient
from typer.testing import CliRunner

from respan_guard import Guard, GuardMiddleware
from respan_guard.backends.base import Allowed, Backend, Op, Recorded, RecordQuery, Release, UsageQuery
from respan_guard.backends.redis import RedisBackend
from respan_guard.cli.app import app as cli
from respan_guard.errors import ConfigurationError, CounterOverflow, GuardError, StorageUnavailable
from respan_guard.testing import BackendContract
from respan_guard.testing.contract_support import MAX, NOW, admit, one, rate, record, recorded, total
from tests.backends import redis_server
from tests.backends.redis_server import Cluster


def new_backend() -> RedisBackend:
    """A store of its own on the cluster."""
    return RedisBackend(redis_server.shared_cluster().url, namespace=f"test-{secrets.token_hex(6)}")


@asynccontextmanager
async def opened(cluster: Cluster, namespace: str) -> AsyncIterator[RedisBackend]:
    """A store that is closed whatever happens."""
    backend = RedisBackend(cluster.url, namespace=namespace)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


class TestContract(BackendContract):
    """What a server answers, a cluster answers; but for limits that span customers."""

    async def open_backend(self) -> Backend:
        backend = new_backend()
        await backend.open()
        return backend

    async def test_scopes(self, backend: Backend) -> None:
        """Limits of a customer, and of a customer and a model, are kept; others are refused with the reason."""
        await recorded(backend, record("e", 5, model="m"))
        own = [total(99), total(99, scope="customer+model")]
        assert (await backend.standing("ann", own, "m", now=NOW)).used == (5, 5)
        for scope in ("model", "all"):
            with pytest.raises(ConfigurationError, match=r"total_budget counts all customers.*PostgreSQL"):
                await one(backend, admit("a", total(99, scope=scope)))
            with pytest.raises(ConfigurationError, match="Redis Cluster"):
                await backend.standing("ann", [total(99, scope=scope)], now=NOW)


@pytest.fixture
async def backend() -> RedisBackend:
    """An open, empty store."""
    opened = new_backend()
    await opened.open()
    return opened


async def test_a_batch_over_many_customers_is_answered_in_order(backend: RedisBackend) -> None:
    """It is cut by customer and put together again; each customer's ops are applied in order."""
    ops: list[Op] = []
    for number in range(200):
        ops += [admit(f"a{number}", rate(1), total(10), customer=f"c{number % 100}", cost=5)]
        ops += [record(f"e{number}", number, customer=f"c{number % 100}", admission=f"a{number}")]
        ops += [Release(f"c{number % 100}", f"a{number}")]
    outcomes = await backend.apply(ops, NOW)
    assert [isinstance(outcome, Allowed) for outcome in outcomes[::3]] == [True] * 100 + [False] * 100
    assert [outcome.cost for outcome in outcomes[1::3] if isinstance(outcome, Recorded)] == list(range(200))
    rows = await backend.usage(UsageQuery())
    assert {row.customer: row.amounts.cost for row in rows} == {f"c{n}": 2 * n + 100 for n in range(100)}
    assert await backend.verify() == []
    await backend.close()


async def test_a_part_that_overflows_says_so_and_the_rest_may_be_sent_again(backend: RedisBackend) -> None:
    """Other parts may have been applied; sent again one by one, each op counts once."""
    await recorded(backend, record("e", MAX))
    ops: list[Op] = [record("x", 1), *[record("e", 1, customer=f"c{n}") for n in range(50)]]
    with pytest.raises(CounterOverflow, match="ann"):
        await backend.apply(ops, NOW)
    for op in ops[1:]:
        await one(backend, op)
    assert sum(row.amounts.calls for row in await backend.usage(UsageQuery())) == 51
    assert await backend.verify() == []
    await backend.close()


async def test_a_reader_of_the_log_misses_nothing(backend: RedisBackend) -> None:
    """8 writers on all parts; a reader by cursor meanwhile gets every record once, in an order that stays."""
    done, seen = asyncio.Event(), list[tuple[int, str]]()

    async def write(name: str) -> None:
        for number in range(60):
            await backend.apply([record(f"{name}{number}", 1, customer=f"{name}-{number % 7}")])

    async def read() -> None:
        after = 0
        while True:
            over = done.is_set()
            page = await backend.entries(RecordQuery(after=after, limit=50))
            seen.extend((stored.seq, stored.entry.id) for stored in page)
            after = page[-1].seq if page else after
            if over and not page:
                return
            await asyncio.sleep(0.001)

    reader = asyncio.create_task(read())
    await asyncio.gather(*[write(name) for name in "abcdefgh"])
    await asyncio.sleep(0.1)
    done.set()
    await reader
    assert sorted(entry for _, entry in seen) == sorted(f"{name}{n}" for name in "abcdefgh" for n in range(60))
    assert [seq for seq, _ in seen] == sorted({seq for seq, _ in seen})
    whole = await backend.entries(RecordQuery(limit=1000))
    assert [(stored.seq, stored.entry.id) for stored in whole] == seen
    await backend.close()


async def test_slots_that_move_count_nothing_twice() -> None:
    """While operations run, slots of the store go to another node: MOVED is followed, sums are exact."""
    cluster = Cluster()
    async with opened(cluster, "moving") as backend:
        await _move_while_working(cluster, backend)


async def _move_while_working(cluster: Cluster, backend: RedisBackend) -> None:
    slots = [_slot(backend._at.keys(part)[0]) for part in range(16)]
    spent = 0

    async def surely(op: Op) -> None:
        while True:
            try:
                await backend.apply([op])
            except StorageUnavailable:  # on the move: sent again, as a guard's home does
                await asyncio.sleep(0.01)
            else:
                return

    async def work() -> None:
        nonlocal spent
        for number in range(150):
            customer = f"c{number % 40}"
            await surely(admit(f"a{number}", total(MAX), customer=customer, cost=9))
            await surely(record(f"e{number}", 7, customer=customer, admission=f"a{number}"))
            await surely(Release(customer, f"a{number}"))
            spent += 7

    async def move() -> None:
        for slot in slots[:8]:
            await asyncio.to_thread(cluster.move_slot, slot)

    await asyncio.gather(work(), move())
    rows = await backend.usage(UsageQuery(by=()))
    assert (rows[0].amounts.cost, rows[0].amounts.calls, rows[0].amounts.requests) == (spent, 150, 150)
    assert await backend.holds() == []
    assert await backend.verify() == []


async def test_connections_that_die_fail_nobody() -> None:
    """Every 0.1 s the nodes cut all connections while slots move: reads and decisions go on, and count once."""
    cluster = Cluster()
    async with opened(cluster, "cut") as backend:
        await _cut_while_working(cluster, backend)


async def _cut_while_working(cluster: Cluster, backend: RedisBackend) -> None:
    slots = [_slot(backend._at.keys(part)[0]) for part in range(16)]
    over = asyncio.Event()
    booked = 0

    async def book(worker: int) -> None:
        nonlocal booked
        while not over.is_set():
            booked, number, customer = booked + 1, booked, f"c{worker}"
            (told,) = await backend.apply([admit(f"a{number}", total(MAX), customer=customer, cost=9)])
            assert isinstance(told, Allowed)
            await backend.apply([record(f"e{number}", 7, customer=customer, admission=f"a{number}")])
            await backend.apply([Release(customer, f"a{number}")])

    async def look() -> None:
        while not over.is_set():
            await backend.usage(UsageQuery(by=()))

    async def cut() -> None:
        for turn in range(12):
            for node in cluster.nodes:
                await asyncio.to_thread(node.command, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await asyncio.to_thread(cluster.move_slot, slots[turn % 16])
            await asyncio.sleep(0.1)
        over.set()

    async with asyncio.TaskGroup() as tasks:
        for work in (cut(), look(), look(), look(), *map(book, range(6))):
            tasks.create_task(work)
    rows = await backend.usage(UsageQuery(by=()))
    assert (rows[0].amounts.cost, rows[0].amounts.calls, rows[0].amounts.requests) == (7 * booked, booked, booked)
    assert await backend.holds() == []
    assert await backend.verify() == []


def _slot(key: str) -> int:
    from redis.crc import key_slot

    return int(key_slot(key.encode()))


async def test_a_server_and_a_cluster_are_told_apart() -> None:
    """A node named as a single server, and a single server named as a cluster, are refused with what would be right."""
    node = redis_server.shared_cluster().nodes[0]
    with pytest.raises(ConfigurationError, match=r"write redis\+cluster://"):
        await RedisBackend(node.url).open()
    with pytest.raises(ConfigurationError, match="write redis://"):
        await RedisBackend(redis_server.shared_server().url.replace("redis://", "redis+cluster://")).open()


async def test_the_store_is_spread_over_all_nodes() -> None:
    """16 parts; each node of three has some."""
    cluster = redis_server.shared_cluster()
    backend = new_backend()
    parts = [_slot(backend._at.keys(part)[0]) for part in range(16)]
    owners = [next(at for at, node in enumerate(cluster.nodes) if cluster._owns(node, slot)) for slot in parts]
    assert set(owners) == {0, 1, 2}


@pytest.mark.parametrize("option", ["app_budgets", "model_budgets"])
async def test_a_guard_with_shared_budgets_does_not_start(option: str, tmp_path: Path) -> None:
    """Opening says why and what to use instead, whichever mode budgets fail in; without such a budget it opens."""
    for mode in ("closed", "open", "local"):
        options: Any = {option: {"total_budget": 5}, "budget_failure": mode, "journal_dir": tmp_path}
        with pytest.raises(ConfigurationError, match=r"_total_budget counts all customers .* use .* PostgreSQL"):
            await Guard(redis_server.shared_cluster().url, **options).open()
    namespace = f"test-{secrets.token_hex(6)}"
    url = redis_server.shared_cluster().url
    async with Guard(url, namespace=namespace, journal_dir=tmp_path) as guard, guard.admit("ann"):
        pass


async def test_an_app_with_shared_budgets_does_not_start(tmp_path: Path) -> None:
    """The middleware fails the startup of the app's lifespan with the same words."""
    guard = Guard(redis_server.shared_cluster().url, app_budgets={"total_budget": 5}, journal_dir=tmp_path)
    app = Starlette(middleware=[Middleware(GuardMiddleware, guard=guard)])
    with pytest.raises(ConfigurationError, match="app_total_budget counts all customers together"), TestClient(app):
        pass


def test_check_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`respan-guard check` fails with the reason."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESPAN_GUARD_APP_BUDGETS", '{"total_budget": 5}')
    found = CliRunner().invoke(cli, ["check", "--storage", redis_server.shared_cluster().url])
    assert found.exit_code == 1
    assert "wrong: app_total_budget counts all customers together" in " ".join(found.output.split())


async def test_a_guard_that_nobody_opens_refuses(tmp_path: Path) -> None:
    """It asks storage with its first admission, and lets nobody in; the log says why."""
    options: Any = {"app_budgets": {"total_budget": 5}, "journal_dir": tmp_path}
    guard = Guard(redis_server.shared_cluster().url, **options)
    with pytest.raises(GuardError):
        await guard.admit("ann")
    await asyncio.to_thread(guard._homes.close_blocking)
