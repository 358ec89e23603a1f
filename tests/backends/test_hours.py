"""`verify` holds the sums of hours to the entries: those that are there in full, and only those."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis

from respan_guard.backends.base import (
    HOUR_MS,
    HOURS_KEPT,
    Backend,
    Discrepancy,
    Record,
    UsageQuery,
)
from respan_guard.backends.memory import MemoryBackend
from respan_guard.backends.postgres import PostgresBackend
from respan_guard.backends.postgres import schema as postgres_schema
from respan_guard.backends.redis import RedisBackend
from respan_guard.backends.registry import backend_factory
from respan_guard.backends.sqlite import SQLiteBackend
from respan_guard.backends.sqlite import schema as sqlite_schema
from respan_guard.testing.contract_support import DAY, DAY_MS, NOW, admit, one, record, recorded, total
from tests.backends import postgres_server
from tests.backends.conftest import new_store

HOUR = NOW // HOUR_MS
_ADD = """local sums = cmsgpack.unpack(redis.call('HGET', KEYS[1], ARGV[1]))
sums[3] = sums[3] + ARGV[2]
redis.call('HSET', KEYS[1], ARGV[1], cmsgpack.pack(sums))"""


def add_to_hour(backend: Backend, hour: int, model: str, cost: int) -> None:
    """Change an hour's cost behind the store's back."""
    if isinstance(backend, MemoryBackend):
        backend._store.totals.hours[hour, model].cost += cost
    elif isinstance(backend, SQLiteBackend):
        with sqlite3.connect(backend._at.path) as db:
            db.execute("UPDATE hours SET cost = cost + ? WHERE (hour, model) = (?, ?)", (cost, hour, model))
        db.close()
    elif isinstance(backend, PostgresBackend):
        with psycopg.connect(backend._at.conninfo) as pg:
            query = (
                f"UPDATE \"{backend._at.schema}\".totals SET cost = cost + %s WHERE (unit, at, model) = ('h', %s, %s)"
            )
            pg.execute(query.encode(), (cost, hour, model))
    else:
        assert isinstance(backend, RedisBackend)
        with Redis.from_url(backend._at.address) as client:
            client.eval(_ADD, 1, f"{backend._at.prefix}t:{hour}", model, str(cost))


async def test_a_sum_of_an_hour_that_is_wrong(backend: Backend) -> None:
    """It is named with what is stored and what it should be, alike on every backend."""
    await backend.apply([record("e", 5, model="m"), record("f", 2, model="n"), record("g", None, model="m")], NOW)
    await recorded(backend, record("h", 3, model="m", at_ms=NOW - HOUR_MS), NOW)
    assert await backend.verify() == []
    add_to_hour(backend, HOUR, "m", 2)
    add_to_hour(backend, HOUR - 1, "m", -1)
    found = sorted(await backend.verify(), key=lambda row: row.where)
    assert found == [
        Discrepancy("cost", f"all m hour {HOUR - 1}", 2, 3),
        Discrepancy("cost", f"all m hour {HOUR}", 7, 5),
    ]
    add_to_hour(backend, HOUR, "m", -2)
    add_to_hour(backend, HOUR - 1, "m", 1)
    assert await backend.verify() == []


async def test_an_entry_that_is_revised_counts_in_its_own_hour(backend: Backend) -> None:
    """What was presumed is taken back where it was booked, however much later the real usage comes."""
    await one(backend, admit("a", total(100), cost=9, ttl_ms=1000))
    later = NOW + 3 * HOUR_MS
    await recorded(backend, record("presumed:a", 9, admission="a", kind="presumed", model="m"), later)
    await recorded(backend, record("real", 4, admission="a", model="m", at_ms=later), later)
    assert await backend.verify() == []
    rows = await backend.usage(UsageQuery(by=("hour",), first_hour=HOUR, end_hour=HOUR + 4))
    assert {row.hour: row.amounts.cost for row in rows if row.amounts.cost} == {HOUR: 5, HOUR + 3: 4}


@pytest.mark.parametrize("day", [DAY - 50, DAY - 1], ids=["booked on another day", "booked on its day"])
async def test_an_hour_that_lost_an_entry_is_left_out(backend: Backend, day: int) -> None:
    """Pruned entries are in its sums and nowhere else; hours behind the last of them are held to the entries."""
    await recorded(backend, record("old", 5, day=day, at_ms=NOW - DAY_MS))
    await recorded(backend, record("same hour", 6, at_ms=NOW - DAY_MS))
    await recorded(backend, record("new", 7))
    assert await backend.prune(DAY) == 1
    assert await backend.verify() == []
    add_to_hour(backend, (NOW - DAY_MS) // HOUR_MS, "", 1)
    assert await backend.verify() == []
    add_to_hour(backend, HOUR, "", 1)
    assert await backend.verify() == [Discrepancy("cost", f"all  hour {HOUR}", 8, 7)]


async def test_hours_that_are_too_old_are_left_out(make_backend: Callable[[], Backend]) -> None:
    """Their sums go, little by little, while entries stay; an entry that comes late for one makes a new sum."""
    backend = make_backend()
    await backend.open()
    await recorded(backend, record("old", 5))
    await recorded(backend, record("next", 6, at_ms=NOW + HOUR_MS), NOW + HOUR_MS)
    later = NOW + (HOURS_KEPT + 2) * HOUR_MS
    for number in range(3):
        await recorded(backend, record(f"new{number}", 7, at_ms=later + number * HOUR_MS), later + number * HOUR_MS)
        assert await backend.verify() == []
    await recorded(backend, record("late", 8, at_ms=NOW + 1), later + 3 * HOUR_MS)
    assert await backend.verify() == []
    add_to_hour(backend, later // HOUR_MS + 1, "", 1)
    assert await backend.verify() == [Discrepancy("cost", f"all  hour {later // HOUR_MS + 1}", 8, 7)]
    await backend.close()


async def test_no_false_alarm_while_traffic_runs(make_backend: Callable[[], Backend]) -> None:
    """Records, revisions and pruning beside it, in the hours that are compared; a wrong sum is still found after."""
    backend, other = make_backend(), make_backend()
    await backend.open()
    if other is not backend:
        await other.open()
    done = False

    async def book() -> int:
        number = 0
        while not done:
            ops: list[Any] = [
                admit(f"a{number}", total(1 << 40), customer=f"c{number % 7}", cost=5, ttl_ms=1),
                record(f"e{number}", number % 5, customer=f"c{number % 7}", model=f"m{number % 3}", at_ms=NOW + number),
            ]
            presumed: Record = record(
                f"presumed:a{number}", 5, customer=f"c{number % 7}", kind="presumed", admission=f"a{number}"
            )
            real = record(f"r{number}", 3, customer=f"c{number % 7}", admission=f"a{number}", at_ms=NOW + number)
            await other.apply(ops, NOW + 10 * number)
            await other.apply([presumed], NOW + 10 * number + 5)
            await other.apply([real], NOW + 10 * number + 6)
            number += 1
            await asyncio.sleep(0)
        return number

    traffic = asyncio.create_task(book())
    for _ in range(15):
        assert await backend.verify() == []
        await asyncio.sleep(0.01)
    done = True
    assert await traffic > 5
    add_to_hour(backend, HOUR, "m1", 1)
    assert [row.where for row in await backend.verify()] == [f"all m1 hour {HOUR}"]
    await backend.close()
    await other.close()


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
async def test_a_store_that_was_pruned_before_that_was_noted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is brought to the newest version: its hours up to then are left out, later ones are held to the entries."""
    schema = sqlite_schema if name == "sqlite" else postgres_schema
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    if name == "postgresql":
        url = postgres_server.new_store(postgres_server.given_or_started())
    with monkeypatch.context() as older:
        before = next(n for n, step in enumerate(schema.MIGRATIONS) if "0005_hours.sql" in step)
        older.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:before])
        backend = backend_factory(url)()
        await backend.open()
        if isinstance(backend, PostgresBackend):
            backend._offset = 0  # no sweep: it calls what is of the newest version
        await recorded(backend, record("old", 5, day=DAY - 50))
        await recorded(backend, record("kept", 6))
        assert await backend.prune(DAY - 40) == 1
        await backend.close()
    backend = backend_factory(url)()
    await backend.open()
    await recorded(backend, record("new", 7, at_ms=NOW + HOUR_MS), NOW + HOUR_MS)
    assert await backend.verify() == []
    add_to_hour(backend, HOUR + 1, "", 1)
    assert await backend.verify() == [Discrepancy("cost", f"all  hour {HOUR + 1}", 8, 7)]
    await backend.close()


async def test_a_redis_that_was_pruned_before_that_was_noted(tmp_path: Path) -> None:
    """Nobody knows which hours lost entries: none is compared, now or later."""
    backend = new_store("redis", tmp_path)()
    await backend.open()
    assert isinstance(backend, RedisBackend)
    with Redis.from_url(backend._at.address) as client:
        assert client.hdel(f"{backend._at.prefix}meta", "pruned_ms") == 1
    await backend.apply([record("old", 5, day=DAY - 50), record("kept", 6)], NOW)
    for _ in range(2):
        await backend.prune(DAY - 40)
        assert await backend.verify() == []
    await backend.close()
