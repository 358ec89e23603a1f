"""Customers in order of what they used: kept beside their rows, which thereby change without touching an index."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

from respan_guard.backends.base import CustomerQuery, Discrepancy, Recorded, RefusalRow, UsageQuery
from respan_guard.backends.postgres import PostgresBackend, schema
from respan_guard.errors import StorageUnavailable
from tests.backends import postgres_server
from tests.backends.postgres_support import asked, opened, url_fixture  # noqa: F401  # a fixture
from tests.backends.sqlite_support import DAY, NOW, admit, record

MOVING = ("last_seen", "requests", "calls", "cost", "tokens")


async def costs(backend: PostgresBackend) -> list[tuple[str, int]]:
    """All customers, whoever cost most first."""
    rows = await backend.customers(CustomerQuery(sort="cost", descending=True, limit=100_000))
    return [(row.customer, row.totals.cost) for row in rows]


async def test_a_customers_row_changes_without_touching_an_index(url: str) -> None:
    """Admissions and records leave the versions of the row on its page (HOT), so ten indexes are not written to."""
    async with opened(url) as backend:
        for turn in range(40):
            for part in range(5):
                names = [f"c{number}" for number in range(part * 8, part * 8 + 8)]
                await backend.apply([admit(f"a{turn}", name, cost=5, limits=()) for name in names], NOW + turn)
                await backend.apply([record(f"r{turn}", name) for name in names], NOW + turn)
        deadline = 100
        while True:  # statistics are told when the session idles
            ((updates, hot),) = asked(
                url,
                "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_all_tables WHERE relid = '{schema}.customers'::regclass",
            )
            deadline -= 1
            if updates >= 3_000 or not deadline:
                break
            await asyncio.sleep(0.1)
    assert updates >= 3_000
    assert hot / updates > 0.8


@pytest.mark.parametrize("sort", MOVING)
async def test_what_was_booked_is_in_its_place_at_once(url: str, sort: str) -> None:
    """Whichever process booked it, and whether or not anybody has looked since."""
    async with opened(url) as first, opened(url) as second:
        for turn in range(1, 8):
            backend = first if turn % 2 else second
            name = f"c{turn * 5 % 7}"
            await backend.apply(
                [admit(f"a{turn}", name, limits=()), record(f"r{turn}", name, cost=turn * 3)], NOW + turn
            )
            rows = await (second if turn % 2 else first).customers(CustomerQuery(sort=sort, descending=True))
            amounts = [
                {"last_seen": row.last_seen_ms, "tokens": row.totals.input_tokens + row.totals.output_tokens}.get(sort)
                or getattr(row.totals, sort)
                for row in rows
            ]
            assert amounts == sorted(amounts, reverse=True)
            assert len(rows) == turn
        assert await first.verify() == []


async def test_a_batch_that_is_not_committed_is_put_in_its_place_by_the_next_look(url: str) -> None:
    """A look in the middle of another transaction does not see it, and loses nothing of it."""
    async with opened(url) as backend:
        await backend.apply([record("r1", "a", cost=5), record("r1", "b", cost=6)], NOW)
        server, _, name = url.rpartition("schema=")
        async with await psycopg.AsyncConnection.connect(server.rstrip("?&")) as other:
            await other.execute(f'UPDATE "{name}".customers SET cost = cost + 10 WHERE customer = %s'.encode(), ("a",))
            assert await costs(backend) == [("b", 6), ("a", 5)]
            await other.commit()
        assert await costs(backend) == [("a", 15), ("b", 6)]


async def test_looks_and_batches_at_once(url: str) -> None:
    """Readers put in order while batches of two processes go on: nobody waits for ever, all ends in its place."""
    async with opened(url) as first, opened(url) as second:

        async def book(backend: PostgresBackend, who: str) -> None:
            for turn in range(40):
                names = [f"c{number}" for number in range(turn % 3, 60, 3)]
                await backend.apply([record(f"{who}{turn}", name, cost=turn) for name in names], NOW + turn)

        async def look(backend: PostgresBackend) -> None:
            for _ in range(60):
                rows = await costs(backend)
                assert len({name for name, _ in rows}) == len(rows)
                await backend.usage(UsageQuery(DAY, DAY + 1, by=("customer",), top="cost", limit=3))

        async with asyncio.timeout(60):
            await asyncio.gather(book(first, "f"), book(second, "s"), look(first), look(second))
        found = await costs(first)
        assert [cost for _, cost in found] == sorted((cost for _, cost in found), reverse=True)
        assert sum(cost for _, cost in found) == 2 * sum(turn * 20 for turn in range(40))
        assert await first.verify() == []


async def test_many_changes_are_put_in_order_piece_by_piece(url: str) -> None:
    """More than ten thousand noted changes are several short transactions."""
    async with opened(url) as backend:
        await backend.apply([record("r1", f"c{number}", cost=number) for number in range(50)], NOW)
        asked(url, "INSERT INTO {schema}.moved SELECT c FROM {schema}.customers, generate_series(1, 500)")
        assert [cost for _, cost in await costs(backend)] == list(range(49, -1, -1))
    assert asked(url, "SELECT count(*) FROM {schema}.moved") == [(0,)]


async def test_who_is_forgotten_leaves_no_name_in_the_order(url: str) -> None:
    """The name is gone with the transaction that forgets it, not with the next look."""
    async with opened(url) as backend:
        await backend.apply([record("r1", "somebody", cost=5)], NOW)
        await costs(backend)
        assert await backend.delete("somebody", now=NOW + 1)
        assert asked(url, "SELECT count(*) FROM {schema}.ordered WHERE customer = 'somebody'") == [(0,)]
        ((name, cost),) = await costs(backend)
        assert (name != "somebody", cost) == (True, 5)
        assert await backend.verify() == []


async def test_refusals_of_the_very_moment_of_a_deletion_lose_the_name(url: str) -> None:
    """They are counted before, and renamed by the deletion, or behind it, and booked under the label."""
    async with opened(url) as backend:
        await backend.apply([record("r1", "somebody", cost=5)], NOW)
        server, _, name = url.rpartition("schema=")
        minute = NOW // 60_000
        async with await psycopg.AsyncConnection.connect(server.rstrip("?&")) as other:
            forget = f'SELECT "{name}".forget(%s, %s, %s, %s, %s, %s)'.encode()
            await other.execute(forget, (backend._epoch, "somebody", "deleted-1", "", NOW + 60_000, 0))
            adding = asyncio.create_task(backend.add_refusals([RefusalRow("somebody", "rate_limit", minute, 3)]))
            await asyncio.sleep(0.2)
            assert not adding.done()
            await other.commit()
        await adding
        assert await backend.refusals() == [RefusalRow("deleted-1", "rate_limit", minute, 3)]


async def test_what_is_booked_while_somebody_is_forgotten_is_forgotten_too(url: str) -> None:
    """To forget many entries holds up nobody, not even the customer's own calls; these lose their metadata, too."""
    async with opened(url) as backend:
        kept: dict[str, Any] = {"metadata": {"who": "Ann"}}
        await backend.apply([record(f"r{number}", "ann", cost=1, **kept) for number in range(300)], NOW)
        server, _, name = url.rpartition("schema=")
        async with await psycopg.AsyncConnection.connect(server.rstrip("?&")) as other:
            await other.execute(f"SELECT 1 FROM \"{name}\".entries WHERE id = 'r7' FOR UPDATE".encode())
            forgetting = asyncio.create_task(backend.delete("ann", now=NOW + 60_000))  # waits for that entry
            await asyncio.sleep(0.2)
            async with asyncio.timeout(2):
                (outcome,) = await backend.apply([record("late", "ann", cost=5, **kept)], NOW + 1)
                assert isinstance(outcome, Recorded)
                await costs(backend)
            assert not forgetting.done()
            await other.commit()
        assert await forgetting
        ((label, cost),) = await costs(backend)
        assert (label != "ann", cost) == (True, 305)
        assert asked(url, "SELECT count(*) FROM {schema}.entries WHERE body LIKE '%%Ann%%'") == [(0,)]
        assert await backend.verify() == []


async def test_a_deletion_sees_what_is_committed_whatever_the_default_isolation_is(url: str) -> None:
    """Where transactions are repeatable read by default, refusals counted meanwhile lose the name all the same."""
    server, _, name = url.rpartition("schema=")
    other_default = f"{server}options=-c%20default_transaction_isolation%3Drepeatable%5C%20read&schema={name}"
    async with opened(other_default) as first, opened(other_default) as second:
        assert (await first.info()).facts["default_transaction_isolation"] == "repeatable read"
        await first.apply([record(f"r{number}", "ann", metadata={"who": "Ann"}) for number in range(50)], NOW)
        async with await psycopg.AsyncConnection.connect(server.rstrip("?&")) as other:
            await other.execute(f"SELECT 1 FROM \"{name}\".entries WHERE id = 'r40' FOR UPDATE".encode())
            forgetting = asyncio.create_task(first.delete("ann", now=NOW + 60_000))
            await asyncio.sleep(0.2)
            await second.add_refusals([RefusalRow("ann", "rate_limit", NOW // 60_000, 1)])
            await other.commit()
        assert await forgetting
        (found,) = await second.refusals()
        assert found.customer != "ann"
        assert await second.verify() == []


async def test_the_order_is_found_by_keys_also_by_a_plan_of_when_it_was_small(url: str) -> None:
    """Plans are kept; one that was made for eight customers does not read all of 30,000 for each of them."""
    async with opened(url) as backend:
        for number in range(8):
            await backend.apply([record("r1", f"c{number}", cost=number)], NOW)
            await costs(backend)
        asked(
            url,
            "INSERT INTO {schema}.customers (customer, search, first_seen, last_seen) "
            "SELECT 'd' || g, 'd' || g, 1, 1 FROM generate_series(1, 30000) AS g",
        )
        async with asyncio.timeout(8):
            assert len(await costs(backend)) == 30_008


async def test_a_migration_waits_for_reports_and_holds_up_nobody_meanwhile(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of the processes of before go on beside it; it is made once the report is over, or says why not."""
    before = next(n for n, step in enumerate(schema.MIGRATIONS) if "0006_order.sql" in step)
    monkeypatch.setattr(schema, "_PAUSE", 0.2)
    server, _, name = url.rpartition("schema=")
    with monkeypatch.context() as older:
        older.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:before])
        old = PostgresBackend(url)
        await old.open()
    old._offset = 0  # no sweep: it calls what is of the newest version
    await old.apply([record("r1", "a", cost=5)], NOW)
    new = PostgresBackend(url)
    async with await psycopg.AsyncConnection.connect(server.rstrip("?&")) as report:
        await report.execute(f'SELECT count(*) FROM "{name}".customers'.encode())
        with monkeypatch.context() as hasty:
            hasty.setattr(schema, "_TRIES", 1)
            with pytest.raises(StorageUnavailable, match="try again later"):
                await new.open()
        migrating = asyncio.create_task(new.open())
        for number in range(5):
            async with asyncio.timeout(4):
                await old.apply([record(f"r2-{number}", "a", cost=5)], NOW)
        await report.commit()
    await migrating
    assert await costs(new) == [("a", 30)]
    assert await new.verify() == []
    await new.close()
    await old.close()


async def test_an_order_that_is_wrong_is_found(url: str) -> None:
    """`verify` tells of a customer who stands elsewhere than it should, or not at all."""
    async with opened(url) as backend:
        await backend.apply([record("r1", "a", cost=5), record("r1", "b", cost=6)], NOW)
        await costs(backend)
        asked(url, "UPDATE {schema}.ordered SET cost = 7 WHERE customer = 'a'")
        asked(url, "DELETE FROM {schema}.ordered WHERE customer = 'b'")
        found = sorted(await backend.verify(), key=lambda one: one.where)
        what = "customers out of order"
        assert found == [Discrepancy(what, "a", 5, 7), Discrepancy(what, "b", 6, 0)]


async def test_a_store_of_before_is_brought_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is there already has a place, and keeps all that was booked."""
    url = postgres_server.new_store(postgres_server.given_or_started())
    with monkeypatch.context() as older:
        before = next(n for n, step in enumerate(schema.MIGRATIONS) if "0006_order.sql" in step)
        older.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:before])
        async with opened(url) as backend:
            await backend.apply([record("r1", f"c{number}", cost=number) for number in range(9)], NOW)
    async with opened(url) as backend:
        assert await costs(backend) == [(f"c{number}", number) for number in range(8, -1, -1)]
        assert await backend.verify() == []
        indexes: list[Any] = asked(
            url,
            "SELECT indexname FROM pg_indexes WHERE schemaname = %s AND tablename = 'customers'",
            url.split("=")[-1],
        )
        assert {name for (name,) in indexes}.isdisjoint({f"customers_by_{sort}" for sort in MOVING})
