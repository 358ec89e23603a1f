"""Reading: a page costs the page, whatever the number of rows, and holds nobody up."""

from __future__ import annotations

import itertools
import random
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from respan_guard.backends import rows
from respan_guard.backends.base import CustomerQuery, Op, RecordQuery, UsageQuery
from respan_guard.backends.sqlite import SQLiteBackend, reads, sums, tops
from respan_guard.errors import InvalidInput

from .sqlite_support import DAY, NOW, admit, inside, opened, record

TOPS = ("cost", "requests", "calls", "tokens")
SORTS = ("customer", "name", "first_seen", "last_seen", "requests", "calls", "cost", "tokens")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SQLiteBackend]:
    """A store with 60 customers, of whom several tie in everything, and 300 entries."""
    async with opened(tmp_path / "x.db") as backend:
        for round_ in range(5):
            ops: list[Op] = []
            for number in range(60):
                name = f"c{number:02}"
                ops.append(record(f"r{round_}", name, cost=number % 7, at_ms=NOW + round_ * 1000 + number))
                if number % 3 == 0:
                    ops.append(admit(f"a{round_}", name, cost=0))
            await backend.apply(ops, NOW + round_ * 1000)
        await backend.put("c07", {"name": "Ärger", "email": "x@y.z"}, now=NOW)
        await backend.put("c50", {"name": "50%_Off"}, now=NOW)
        yield backend


def plan(db: sqlite3.Connection, sql: str, values: object) -> str:
    """How SQLite goes about a statement."""
    return " | ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", values))  # type: ignore[arg-type]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("sort", SORTS)
async def test_pages_of_customers_walk_an_index(store: SQLiteBackend, sort: str, descending: bool) -> None:
    """First and later pages of every sort key read an index in order: no sorting, no scan of the table."""
    after = ("c30", "c30") if sort in ("customer", "name") else (3, "c30")
    for query in (
        CustomerQuery(sort=sort, descending=descending),
        CustomerQuery(sort=sort, descending=descending, after=after),
    ):
        sql, values = reads.customers_sql(query)
        found = await inside(store, lambda db, sql=sql, values=values: plan(db, sql, values))  # type: ignore[misc]
        assert "TEMP B-TREE" not in found
        assert "USING INDEX" in found
        if query.after is not None:
            assert "SEARCH" in found


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("sort", SORTS)
async def test_pages_of_customers_lose_and_repeat_nobody(store: SQLiteBackend, sort: str, descending: bool) -> None:
    """Page by page, each continuing after the last row of the one before, everybody comes once, in order."""
    seen: list[tuple[str | int, str]] = []
    after: tuple[str | int, str] | None = None
    while rows := await store.customers(CustomerQuery(sort=sort, descending=descending, after=after, limit=7)):
        for row in rows:
            value: str | int
            if sort == "customer":
                value = row.customer
            elif sort == "name":
                value = str((row.params or {}).get("name", ""))
            elif sort.endswith("seen"):
                value = getattr(row, f"{sort}_ms")
            elif sort == "tokens":
                value = row.totals.input_tokens + row.totals.output_tokens
            else:
                value = getattr(row.totals, sort)
            seen.append((value, row.customer))
        after = seen[-1]
    assert seen == sorted(seen, reverse=descending)
    assert len(set(seen)) == 60


async def test_search_takes_text_literally_in_any_case(store: SQLiteBackend) -> None:
    """Percent and underscore are just characters; umlauts have cases too; a match never spans two fields."""

    async def found(text: str) -> list[str]:
        return [row.customer for row in await store.customers(CustomerQuery(search=text))]

    assert await found("0%_o") == ["c50"]
    assert await found("c5_") == []
    assert await found("äRGER") == ["c07"]
    assert await found("X@Y") == ["c07"]
    assert await found("c07ärger") == []
    assert await found("C0") == [f"c0{number}" for number in range(10)]


async def test_unknown_names_are_refused(store: SQLiteBackend) -> None:
    """Sort keys, groups and states never reach SQL unless they are ours."""
    with pytest.raises(InvalidInput, match="sort must be one of"):
        await store.customers(CustomerQuery(sort="c; DROP TABLE customers"))
    with pytest.raises(InvalidInput, match="grouped by"):
        await store.usage(UsageQuery(by=("day; --",)))
    with pytest.raises(InvalidInput, match="live or expired"):
        await store.holds(state="ended")


@pytest.mark.parametrize(
    ("query", "uses"),
    [
        (RecordQuery(), "SCAN entries"),
        (RecordQuery(after=100), "SEARCH entries USING INTEGER PRIMARY KEY (rowid>?)"),
        (RecordQuery(after=100, descending=True), "SEARCH entries USING INTEGER PRIMARY KEY (rowid<?)"),
        (RecordQuery(after=100, stop=50, descending=True), "PRIMARY KEY (rowid>? AND rowid<?)"),
        (RecordQuery(customer="c05"), "entries_by_customer (c=?)"),
        (RecordQuery(customer="c05", after=100), "entries_by_customer (c=? AND rowid>?)"),
        (RecordQuery(since_ms=NOW + 4000), "SEARCH entries USING INTEGER PRIMARY KEY (rowid>?)"),
        (RecordQuery(trace_id="t"), "entries_by_trace (trace_id=?)"),
        (RecordQuery(unpriced=True), "entries_unpriced"),
        (RecordQuery(status="error", descending=True), "entries_errors"),
    ],
)
async def test_pages_of_records_walk_an_index(store: SQLiteBackend, query: RecordQuery, uses: str) -> None:
    """Records come in the order of the log without sorting, by customer, from a time on, by trace or unpriced."""

    def explain(db: sqlite3.Connection) -> str:
        return plan(db, *reads.entries_sql(db, query))

    found = await inside(store, explain)
    assert "TEMP B-TREE" not in found
    assert uses in found


async def test_records_from_a_time_on(store: SQLiteBackend) -> None:
    """Halving the log for a time finds exactly what looking at every entry finds, late entries included."""
    await store.apply([record("late", "c01", at_ms=NOW + 500), record("z", "c02", at_ms=NOW + 9000)], NOW + 9000)
    everything = await store.entries(RecordQuery(limit=1000))
    for since, until in itertools.product(range(NOW - 1, NOW + 9100, 331), (None, NOW + 3000)):
        wanted = [
            stored.seq
            for stored in everything
            if stored.entry.at_ms >= since and (until is None or stored.entry.at_ms < until)
        ]
        for descending in (False, True):
            found = await store.entries(RecordQuery(since_ms=since, until_ms=until, limit=1000, descending=descending))
            assert [stored.seq for stored in found] == (wanted[::-1] if descending else wanted)


async def test_a_window_of_the_log_is_all_that_is_read(store: SQLiteBackend) -> None:
    """Not all places since a time, where the window begins later; nor the other way round."""
    for since, stop, first in ((NOW + 1000, 200, 200), (NOW + 4000, 200, 241)):
        query = RecordQuery(since_ms=since, after=280, stop=stop, descending=True, provider="nobody")
        sql, values = await inside(store, lambda db, query=query: reads.entries_sql(db, query))  # type: ignore[misc]
        assert sql.count("seq >") == 1
        assert first - 1 in values
        found = await store.entries(replace(query, provider=None, limit=1000))
        assert [stored.seq for stored in found] == list(range(279, first - 1, -1))


async def test_usage_reads_days_not_records(store: SQLiteBackend) -> None:
    """A report of a customer or of all for some days searches the rollups by customer or day."""
    for query, uses in (
        (
            UsageQuery(DAY, DAY + 1, customer="c05", by=("day",)),
            "SEARCH rollups USING PRIMARY KEY (c=? AND day>? AND day<?)",
        ),
        (UsageQuery(DAY, DAY + 1, by=("model",)), "SEARCH days USING PRIMARY KEY (day>? AND day<?)"),
        (UsageQuery(first_hour=1, by=("hour", "model")), "SEARCH hours USING PRIMARY KEY (hour>? AND hour<?)"),
        (UsageQuery(DAY, DAY + 1, by=("day",), distinct=True), "SEARCH active USING INTEGER PRIMARY KEY (rowid=?)"),
        (UsageQuery(DAY, DAY + 1, by=("customer",), top="cost"), "rollups_by_day (day>? AND day<?)"),
        (
            UsageQuery(DAY, DAY + 1, by=("customer",), among=("c05",)),
            "SEARCH rollups USING PRIMARY KEY (c=? AND day>? AND day<?)",
        ),
        (
            UsageQuery(DAY, DAY + 1, by=("customer",), top="cost", least=5),
            "customers_by_cost (cost>?)",
        ),
    ):
        sql, values = sums.usage_sql(query)
        found = await inside(store, lambda db, sql=sql, values=values: plan(db, sql, values))  # type: ignore[misc]
        assert uses in found
        assert "entries" not in found
        if "customer" not in query.by and query.customer is None:
            assert "rollups" not in found


async def test_the_largest_customers_are_found_without_adding_up_all(tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever was spent when, given back included: the shortcut finds the very rows that adding everything up does."""
    chance = random.Random(5)
    async with opened(tmp_path / "x.db") as backend:
        for number in range(400):
            name, day = f"c{chance.randrange(40):02}", DAY - chance.randrange(6)
            cost = chance.choice((1, 2, 3, 50, 900, None)) if chance.random() < 0.9 else -chance.randrange(500)
            ops: list[Op] = [record(f"e{number}", name, cost=cost, day=day, input_tokens=chance.randrange(4))]
            if chance.random() < 0.5:
                ops.append(admit(f"a{number}", name, cost=0))
            await backend.apply(ops, NOW)
        for first, end, limit, top in itertools.product(range(DAY - 6, DAY + 1), (DAY, DAY + 1), (1, 3, 10, 100), TOPS):
            query = UsageQuery(first, end, by=("customer",), top=top, limit=limit)
            monkeypatch.setattr(tops, "_FEW", 1 << 40)
            right = await backend.usage(query)
            monkeypatch.setattr(tops, "_FEW", -1)
            assert await backend.usage(query) == right, query


async def test_very_many_records_are_not_counted(store: SQLiteBackend, tmp_path: Path, monkeypatch: Any) -> None:
    """What people are told of the store takes no longer with more records: of many it tells the places of the log."""
    assert (await store.info()).facts["records"] == "300"
    monkeypatch.setattr(rows, "RECORDS_COUNTED", 299)
    assert (await store.info()).facts["records"] == "about 300"
    async with opened(tmp_path / "empty.db") as empty:
        assert (await empty.info()).facts["records"] == "0"


async def test_a_page_is_read_while_a_batch_is_written(store: SQLiteBackend, tmp_path: Path) -> None:
    """Reading waits for no writer: a page is answered while another connection is inside a transaction."""
    other = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("UPDATE customers SET name = 'half done'")
    assert len(await store.customers(CustomerQuery(limit=60))) == 60
    assert (await store.usage(UsageQuery(by=())))[0].amounts.calls == 300
    other.execute("ROLLBACK")
    other.close()


async def test_the_connection_for_reads_cannot_write(store: SQLiteBackend) -> None:
    """Whatever a report does, it changes nothing."""
    link = store._read_link
    assert link is not None
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        await link.run(lambda db: db.execute("DELETE FROM entries"))
