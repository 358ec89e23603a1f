"""Reading: a page costs the page, whatever the number of rows; and no plan of a batch reads more than its rows."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from respan_guard.backends import rows
from respan_guard.backends.base import CustomerQuery, Op, RecordQuery, UsageQuery, UsageRow
from respan_guard.backends.postgres import PostgresBackend, reads, tops
from respan_guard.backends.postgres.batch import Batch
from respan_guard.backends.postgres.connection import Connection
from respan_guard.backends.postgres.queries import Statement, count_sql, customers_sql, entries_sql, usage_sql
from respan_guard.backends.postgres.schema import in_schema
from tests.backends import postgres_server
from tests.backends.postgres_support import asked, opened
from tests.backends.sqlite_support import DAY, NOW, admit, record

TOPS = ("cost", "requests", "calls", "tokens", "errors")
SORTS = ("customer", "name", "first_seen", "last_seen", "requests", "calls", "cost", "tokens")


@pytest.fixture(scope="module")
def filled() -> str:
    """A store with 3,000 customers, of whom many tie in everything, and 6,000 entries; with statistics."""
    url = postgres_server.new_store(postgres_server.given_or_started())

    async def fill() -> None:
        async with opened(url) as backend:
            for first in range(0, 3000, 250):
                ops: list[Op] = []
                for number in range(first, first + 250):
                    name = f"c{number:04}"
                    for turn in range(2):
                        at = NOW + number * 1000 + turn
                        trace = {"trace_id": f"{number:032x}"} if number % 50 == 0 else {}
                        ops.append(record(f"r{turn}", name, cost=number % 7, at_ms=at, day=DAY + number % 40, **trace))
                    ops.append(admit("a", name, cost=0, limits=()))
                await backend.apply(ops, NOW + first)
            await backend.put("c0007", {"name": "Ärger", "blocked": True}, now=NOW)
            await backend.customers(CustomerQuery(sort="cost"))  # puts them in order

    asyncio.run(fill())
    for table in ("customers", "ordered", "entries", "rollups", "totals", "holds"):
        asked(url, f"VACUUM ANALYZE {{schema}}.{table}")
    return url


@pytest.fixture
async def store(filled: str) -> AsyncIterator[PostgresBackend]:
    """That store, open."""
    async with opened(filled) as backend:
        yield backend


async def plan(backend: PostgresBackend, statement: Statement) -> str:
    """How PostgreSQL goes about a statement, with its values in it."""
    sql, values = statement

    async def explain(db: Connection) -> str:
        cursor = psycopg.AsyncClientCursor(db)
        await cursor.execute(b"EXPLAIN " + in_schema(sql, backend._at.schema), values)
        rows: list[Any] = await cursor.fetchall()
        return "\n".join(row[0] for row in rows)

    return await backend._look(explain)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("sort", SORTS)
async def test_pages_of_customers_walk_an_index(store: PostgresBackend, sort: str, descending: bool) -> None:
    """First and later pages of every sort key read an index in order: no sorting, no scan of the table."""
    after = ("c0030", "c0030") if sort in ("customer", "name") else (3, "c0030")
    for query in (
        CustomerQuery(sort=sort, descending=descending),
        CustomerQuery(sort=sort, descending=descending, after=after),
    ):
        found = await plan(store, customers_sql(query))
        assert "Sort" not in found
        assert "Index" in found
        if query.after is not None:
            assert "Index Cond" in found


@pytest.mark.parametrize("descending", [False, True])
async def test_pages_of_the_log_walk_an_index(store: PostgresBackend, descending: bool) -> None:
    """All of it, from a place, of a customer, of a trace, without a price."""
    for query in (
        RecordQuery(descending=descending),
        RecordQuery(descending=descending, after=300),
        RecordQuery(descending=descending, after=300, stop=400),
        RecordQuery(descending=descending, customer="c0030"),
        RecordQuery(descending=descending, customer="c0030", after=300),
        RecordQuery(descending=descending, trace_id=f"{50:032x}"),
        RecordQuery(descending=descending, unpriced=True),
        RecordQuery(descending=descending, status="error"),
    ):
        found = await plan(store, entries_sql(query))
        assert "Seq Scan on entries" not in found, query
        assert "Index" in found
        assert query.status is None or "entries_errors" in found


async def test_a_time_is_found_by_halving(store: PostgresBackend) -> None:
    """Since: the page begins at the right entry, and nothing before it is read."""
    page = await store.entries(RecordQuery(since_ms=NOW + 2_000_000, limit=4))
    assert [stored.entry.customer for stored in page] == ["c2000", "c2000", "c2001", "c2001"]
    assert await store.entries(RecordQuery(since_ms=NOW + 10**9)) == []


async def test_reports_read_totals_or_a_range_of_days(store: PostgresBackend) -> None:
    """All customers' sums are kept; by customer it is the days that were asked for, of one the rows it has."""
    for query in (UsageQuery(by=("day",)), UsageQuery(by=("model",)), UsageQuery(by=(), model="gpt"),
                  UsageQuery(by=("day",), distinct=True), UsageQuery(by=("hour",))):  # fmt: skip
        assert "rollups" not in await plan(store, usage_sql(query)), query
    found = await plan(store, usage_sql(UsageQuery(by=("customer",), first_day=DAY + 3, end_day=DAY + 4)))
    assert "rollups_by_day" in found
    assert "rollups_pkey" in await plan(store, usage_sql(UsageQuery(by=("day",), customer="c0030")))


async def test_the_largest_customers_are_looked_up(store: PostgresBackend) -> None:
    """Found by one sum, or known already: the rest is read by the key, for those who are shown only."""
    query = UsageQuery(DAY, DAY + 40, by=("customer",), top="cost", limit=5)
    for known in (None, [1, 2, 3]):
        found = await plan(store, usage_sql(query, known))
        assert "rollups_pkey" in found
        assert "customers_pkey" in found
        assert "Seq Scan on customers" not in found
    asked: list[Statement] = []

    async def ask(sql: str, values: dict[str, Any]) -> list[Any]:
        asked.append((sql, values))
        return [(10**6,)] if len(asked) == 1 else []

    assert await tops.largest(query, ask) == []
    _, credited, walked = [await plan(store, statement) for statement in asked]
    assert "entries_credits" in credited
    assert "pruned_credits" in credited
    assert "ordered_by_cost" in walked
    assert "rollups_pkey" in walked
    assert "Seq Scan on rollups" not in credited + walked


async def test_the_largest_customers_are_found_without_adding_up_all(monkeypatch: Any) -> None:
    """Whatever was spent when, given back and pruned included: each way finds what adding everything up finds."""
    chance = random.Random(5)
    chosen: list[list[int] | None] = []

    async def largest(query: UsageQuery, ask: tops.Ask) -> list[int] | None:
        chosen.append(await tops.largest(query, ask))
        return chosen[-1]

    monkeypatch.setattr(reads, "largest", largest)
    monkeypatch.setattr(tops, "_FIRST", 4)
    monkeypatch.setattr(tops, "_SHARE", 2)
    async with opened(postgres_server.new_store(postgres_server.given_or_started())) as backend:
        ops: list[Op] = []
        for number in range(500):
            name, day = f"c{chance.randrange(60):02}", DAY - chance.randrange(6)
            cost = chance.choice((1, 2, 3, 50, 900, None)) if chance.random() < 0.9 else -chance.randrange(500)
            ops.append(record(f"e{number}", name, cost=cost, day=day, input_tokens=chance.randrange(4)))
            if chance.random() < 0.5:
                ops.append(admit(f"a{number}", name, cost=0))
        await backend.apply(ops, NOW)
        await backend.prune(DAY - 3)
        for first, end in itertools.product(range(DAY - 6, DAY + 1), (DAY, DAY + 1)):
            everybody = await backend.usage(UsageQuery(first, end, by=("customer",)))
            for limit, top, few in itertools.product((1, 3, 100), TOPS, (-1, 1 << 40)):
                monkeypatch.setattr(tops, "_FEW", few)

                def amount(row: UsageRow, top: str = top) -> int:
                    sums = row.amounts
                    return sums.input_tokens + sums.output_tokens if top == "tokens" else int(getattr(sums, top))

                right = sorted(everybody, key=lambda row: (-amount(row), row.customer))[:limit]
                query = UsageQuery(first, end, by=("customer",), top=top, limit=limit)
                assert await backend.usage(query) == right, query
    walked = [found for found in chosen if found is not None]
    assert len(walked) > 50
    assert len(chosen) - len(walked) > len(chosen) // 2  # those who must, and those who gave up


async def test_counts_read_no_customer(store: PostgresBackend) -> None:
    """How many, how many since, how many blocked: from an index alone."""
    for seen, blocked in ((None, None), (NOW + 2500, None), (None, True)):
        assert "Index Only Scan" in await plan(store, count_sql(seen, blocked))
    assert await store.count_customers(blocked=True) == 1


async def test_very_many_records_are_not_counted(store: PostgresBackend, monkeypatch: Any) -> None:
    """What people are told of the store takes no longer with more records: of many it tells the places of the log."""
    assert (await store.info()).facts["records"] == "6000"
    monkeypatch.setattr(rows, "RECORDS_COUNTED", 5000)
    assert (await store.info()).facts["records"] == "about 6000"


_READ = """SELECT coalesce(sum(pg_stat_get_xact_tuples_returned(oid)), 0) FROM pg_class
    WHERE relnamespace = %s::regnamespace"""


async def test_a_batch_reads_its_rows_only(store: PostgresBackend) -> None:
    """One customer among thousands: a few rows of tables and indexes, in a session that made its plans anew."""
    schema = store._at.schema
    async with opened(f"{store._at.conninfo}?schema={schema}") as other:
        for number in range(3):

            async def batch(db: Connection, number: int = number) -> int:
                ops: list[Op] = [admit(f"p{number}", "c0100", cost=1), record(f"p{number}", "c0100", cost=1)]
                async with db.transaction():
                    await psycopg.AsyncClientCursor(db).execute(*other._statement(Batch(ops), NOW))
                    row: Any = await (await db.execute(_READ, (f'"{schema}"',))).fetchone()
                return int(row[0])

            link = other._write_link
            assert link is not None
            assert 0 < await link.run(batch) < 60
