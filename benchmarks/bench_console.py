"""The console's pages over 1,000,000 records and 100,000 customers: what each takes, and how each question is answered.

A small store has a tenth of the records for as many customers: a page whose time grows with the records would take
ten times as long on the large one. Both are filled as SQL, not through the guard, which would take an hour.

    python benchmarks/bench_console.py [--records 1000000] [--customers 100000] [--rounds 5]
"""

# ruff: noqa: E501  # SQL
from __future__ import annotations

import argparse
import asyncio
import sqlite3
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
from starlette.applications import Starlette
from starlette.routing import Mount

from respan_guard import Guard
from respan_guard.backends.base import CustomerQuery, RecordQuery, UsageQuery
from respan_guard.backends.sqlite import SQLiteBackend, reads
from respan_guard.backends.sqlite.rows import COLUMNS, FROM_ENTRIES
from respan_guard.console import Console

DAYS = 60
MODELS = ("gpt-4o", "gpt-4o-mini", "claude-sonnet-4-5", "gemini-2.5-flash", "text-embedding-3-small")
HOUR_MS = 3_600_000


def fill(path: Path, records: int, customers: int, now_ms: int) -> None:
    """Entries of the last 60 days, a few customers with most of them, and all that is kept with them."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA synchronous = OFF")
    day = datetime.fromtimestamp(now_ms / 1000, UTC).toordinal()
    start = now_ms - DAYS * 24 * HOUR_MS
    step = DAYS * 24 * HOUR_MS / records
    models = " ".join(f"WHEN {number} THEN '{model}'" for number, model in enumerate(MODELS))
    db.execute("BEGIN")
    db.execute("CREATE TEMP TABLE n (i INTEGER PRIMARY KEY)")
    db.execute(
        f"INSERT INTO n WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < {max(records, customers)}) SELECT i FROM c"
    )
    db.execute(
        "INSERT INTO customers (c, customer, search, name, first_seen, last_seen, params, revision)"
        " SELECT i, 'customer-' || i, 'customer-' || i, '', ?, ?,"
        ' \'{"rate_limit":60,"period_budget":"5","period_start":"2026-01-01","total_budget":"50"}\', \'r\' || i'
        f" FROM n WHERE i <= {customers}",
        (start, start),
    )
    # A tenth of the records are the first 100 customers', the others are spread evenly.
    db.execute(
        "INSERT INTO entries (seq, c, id, rev, day, at_ms, latest_ms, cost, input_tokens, output_tokens, cache_read_tokens,"
        " late, model, kind, source, provider, status, trace_id, body, latency_ms, ttft_ms)"
        f" SELECT i, CASE WHEN i % 10 = 0 THEN i / 10 % 100 + 1 ELSE i * 7919 % {customers} + 1 END, 'e' || i, 1,"
        f" {day - DAYS} + CAST(({start} % 86400000 + i * {step}) / 86400000 AS INTEGER),"
        f" CAST({start} + i * {step} AS INTEGER), CAST({start} + i * {step} AS INTEGER),"
        " CASE WHEN i % 5000 = 0 THEN NULL ELSE 1000 + i % 9973 * 1000 END, 900, 200, 0, 0,"
        f" CASE i % {len(MODELS)} {models} END, 'usage', CASE WHEN i % 99991 = 0 THEN 'manual' ELSE 'client' END,"
        " CASE WHEN i % 99991 = 0 THEN 'rare' ELSE 'openai' END, CASE WHEN i % 997 = 0 THEN 'error' ELSE 'ok' END, NULL,"
        ' \'{"model":"gpt-4o","input_tokens":900,"output_tokens":200,"latency_ms":1500}\', 1500, NULL'
        f" FROM n WHERE i <= {records}"
    )
    sums = ", ".join(f"sum({added})" for added in FROM_ENTRIES.values())
    db.execute(
        f"INSERT INTO rollups (c, day, model, {COLUMNS}) SELECT c, day, model, count(*), {sums} FROM entries GROUP BY 1, 2, 3"
    )
    db.execute(
        f"INSERT INTO hours (hour, model, {COLUMNS}) SELECT at_ms / 3600000, model, count(*), {sums} FROM entries GROUP BY 1, 2"
    )
    each = ", ".join(f"sum({name})" for name in COLUMNS.split(", "))
    db.execute(f"INSERT INTO days (day, model, {COLUMNS}) SELECT day, model, {each} FROM rollups GROUP BY 1, 2")
    db.execute("INSERT INTO active SELECT day, count(DISTINCT c) FROM rollups GROUP BY day")
    db.execute(
        f"UPDATE customers SET (active_days, {COLUMNS}) = (found.active_days, {', '.join(f'found.{n}' for n in COLUMNS.split(', '))}),"
        f" last_seen = found.last FROM (SELECT c, count(DISTINCT day) AS active_days, (max(day) - 719163) * 86400000 AS last,"
        f" {', '.join(f'sum({n}) AS {n}' for n in COLUMNS.split(', '))} FROM rollups GROUP BY c) AS found WHERE customers.c = found.c"
    )
    minute = now_ms // 60_000
    db.execute(
        "INSERT INTO refusals SELECT ? - i, 'customer-' || (i % 50 + 1), CASE i % 2 WHEN 0 THEN 'rate_limit' ELSE 'period_budget' END, 3"
        " FROM n WHERE i <= 50000",
        (minute,),
    )
    db.execute("INSERT INTO refusal_hours SELECT minute / 60, reason, sum(count) FROM refusals GROUP BY 1, 2")
    db.execute("COMMIT")
    db.close()


PAGES = {
    "dashboard, 24 hours": "/?range=24h",
    "dashboard, 7 days": "/?range=7d",
    "dashboard, 30 days": "/?range=30d",
    "dashboard, 90 days": "/?range=90d",
    "users by cost": "/users",
    "users by last active, page 2": '/users?sort=last_seen&after=[{last},"customer-500"]',
    "users, search": "/users?q=r-4242",
    "users, blocked": "/users?state=blocked",
    "user": "/user?id=customer-7",
    "logs": "/logs",
    "logs, deep in the past": "/logs?range=90d&before={middle}",
    "logs of a customer": "/logs?customer=customer-77",
    "logs of a model": "/logs?model=gpt-4o",
    "logs, errors": "/logs?status=error",
    "logs, unpriced": "/logs?status=unpriced",
    "logs, a rare provider": "/logs?provider=rare",
    "logs, refusals": "/logs?status=refused",
    "record": "/record?seq={middle}",
    "system": "/system",
}


async def timed(path: Path, records: int, now_ms: int, rounds: int) -> dict[str, float]:
    """Milliseconds of processor time of each page, all threads, the best of some rounds; the first is left out."""
    async with Guard(f"sqlite:///{path}", mode="enforce") as guard:
        app = Starlette(routes=[Mount("/", Console(guard, open_to_all=True))])
        found: dict[str, float] = {}
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=app), base_url="http://x", timeout=120
        ) as client:
            for name, address in PAGES.items():
                url = address.replace("{middle}", str(records // 2)).replace("{last}", str(now_ms))
                times = []
                for _ in range(rounds + 1):
                    started = time.process_time()
                    answer = await client.get(url)
                    times.append((time.process_time() - started) * 1000)
                    assert answer.status_code == 200, (name, answer.status_code)
                found[name] = min(times[1:])
        return found


def plans(path: Path, now_ms: int) -> None:
    """How SQLite goes about what the pages ask."""
    db = sqlite3.connect(path)
    day = datetime.fromtimestamp(now_ms / 1000, UTC).toordinal()
    span: dict[str, Any] = {"first_day": day - 29, "end_day": day + 1}
    for name, (sql, values) in {
        "totals by day and model": reads.usage_sql(UsageQuery(by=("day", "model"), **span)),
        "totals by hour": reads.usage_sql(UsageQuery(by=("hour", "model"), first_hour=now_ms // HOUR_MS - 23)),
        "active customers by day": reads.usage_sql(UsageQuery(by=("day",), distinct=True, **span)),
        "top customers of 30 days": reads.usage_sql(UsageQuery(by=("customer",), top="cost", limit=10, **span)),
        "a customer's days": reads.usage_sql(UsageQuery(by=("day",), customer="customer-7", **span)),
        "a page of customers": reads.customers_sql(CustomerQuery(sort="cost", descending=True, after=(10**9, "x"))),
        "blocked customers": reads.customers_sql(CustomerQuery(sort="cost", descending=True, blocked=True)),
        "a page of records": reads.entries_sql(db, RecordQuery(descending=True, after=500_000)),
        "a customer's records": reads.entries_sql(db, RecordQuery(descending=True, customer="customer-77")),
        "a window of the log": reads.entries_sql(
            db, RecordQuery(descending=True, provider="rare", after=500_000, stop=480_000)
        ),
    }.items():
        steps = " | ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", values))
        print(f"  {name:26} {steps}")
    db.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--customers", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", type=Path, help="a directory to keep the stores in, and find them again")
    chosen = parser.parse_args()
    now_ms = time.time_ns() // 1_000_000
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as place:
        for records in (chosen.records // 10, chosen.records):
            path = Path(chosen.place or place, f"{records}.db")

            async def create(path: Path = path) -> None:
                backend = SQLiteBackend(f"sqlite:///{path}")
                await backend.open()
                await backend.close()

            if not path.exists():
                asyncio.run(create())
                fill(path, records, chosen.customers, now_ms)
            found.append(asyncio.run(timed(path, records, now_ms, chosen.rounds)))
        print(
            f"{chosen.customers:,} customers; milliseconds of processor time with {chosen.records // 10:,} and {chosen.records:,} records"
        )
        for name in PAGES:
            small, large = found[0][name], found[1][name]
            print(f"  {name:32} {small:8.1f} {large:8.1f}   x{large / small:.1f}")
        print(
            f"  {'all pages, geometric mean':32} {'':17}   x{statistics.geometric_mean(found[1][n] / found[0][n] for n in PAGES):.1f}"
        )
        print("\nplans")
        plans(Path(chosen.place or place, f"{chosen.records}.db"), now_ms)


if __name__ == "__main__":
    main()
