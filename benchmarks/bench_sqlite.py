"""SQLite: what batches bring, against aiosqlite with one transaction per decision doing the same writes.

A lifecycle is admit + record + release, each admit and each record awaited until it is durable
(synchronous=FULL). Both sides write the same rows into the same schema. Also: two processes on one file.

    python benchmarks/bench_sqlite.py [--seconds 3] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiosqlite

from respan_guard.backends.base import (
    AMOUNTS,
    Admit,
    Allowed,
    Backend,
    Entry,
    Limit,
    Op,
    Outcome,
    Record,
    Recorded,
    Release,
)
from respan_guard.backends.sqlite import SQLiteBackend
from respan_guard.usage import Usage

CUSTOMERS = 1000
DAY = 738_000
LIMITS = (
    Limit("rate_limit", "rate", "requests", 1_000_000, window_ms=60_000),
    Limit("period_budget", "span", "cost", 10**15, first_day=DAY - 10, end_day=DAY + 20),
    Limit("total_budget", "total", "cost", 10**15),
)
USAGE = Usage(
    model="gpt-test", input_tokens=500, output_tokens=120, provider="openai", response_id="chatcmpl-abcdefghij"
)
Lifecycle = Callable[[int], Awaitable[None]]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def admit_of(number: int, prefix: str) -> Admit:
    customer = f"customer-{number * 7919 % CUSTOMERS}"
    return Admit(f"{prefix}{number}", customer, "", DAY, 0, 1 << 50, LIMITS, "gpt-test", cost=2_000_000)


def entry_of(admit: Admit) -> Entry:
    return Entry(
        f"e-{admit.id}", admit.customer, DAY, now_ms(), 1_500_000, 500, 120, "gpt-test", admit.id, usage=USAGE
    )  # fmt: skip


class Batched:
    """Batches that clock themselves, as a guard's home does: what arrived while the last one ran is the next."""

    def __init__(self, backend: Backend, prefix: str) -> None:
        self.backend = backend
        self.prefix = prefix
        self.waiting: list[tuple[Op, asyncio.Future[Outcome] | None]] = []
        self.task: asyncio.Task[None] | None = None

    def submit(self, op: Op, *behind: Op) -> asyncio.Future[Outcome]:
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.waiting.append((op, future))
        self.waiting += [(other, None) for other in behind]
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self.drain())
        return future

    async def drain(self) -> None:
        while self.waiting:
            batch, self.waiting = self.waiting[:512], self.waiting[512:]
            outcomes = await self.backend.apply([op for op, _ in batch], now_ms())
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if future is not None:
                    future.set_result(outcome)

    async def __call__(self, number: int) -> None:
        admit = admit_of(number, self.prefix)
        assert isinstance(await self.submit(admit), Allowed)
        recorded = await self.submit(Record(entry_of(admit)), Release(admit.customer, admit.id))
        assert isinstance(recorded, Recorded)


class Naive:
    """aiosqlite as its documentation shows it: BEGIN, read, decide, write, COMMIT for each decision."""

    def __init__(self, db: aiosqlite.Connection, prefix: str) -> None:
        self.db = db
        self.prefix = prefix
        self.lock = asyncio.Lock()  # one connection can hold one transaction

    async def one(self, sql: str, *values: object) -> tuple[int, ...] | None:
        async with self.db.execute(sql, values) as cursor:
            return await cursor.fetchone()  # type: ignore[return-value]

    async def __call__(self, number: int) -> None:
        admit = admit_of(number, self.prefix)
        async with self.lock:
            await self.admit(admit)
        async with self.lock:
            await self.record(admit, entry_of(admit))

    async def admit(self, op: Admit) -> None:
        db, now = self.db, now_ms()
        await db.execute("BEGIN IMMEDIATE")
        row = await self.one("SELECT c, cost FROM customers WHERE customer = ?", op.customer)
        if row is None:
            cursor = await db.execute(
                "INSERT INTO customers (customer, search, first_seen, last_seen) VALUES (?, ?, ?, ?)",
                (op.customer, op.customer, now, now),
            )
            row = (cursor.lastrowid or 0, 0)
        c = row[0]
        spent = await self.one(
            "SELECT coalesce(sum(cost), 0) FROM rollups WHERE c = ? AND day >= ? AND day < ?",
            c, LIMITS[1].first_day, LIMITS[1].end_day,
        )  # fmt: skip
        held = await self.one("SELECT coalesce(sum(cost), 0) FROM holds WHERE c = ? AND expires_ms > ?", c, now)
        window = await self.one("SELECT start_ms, previous, current FROM rates WHERE c = ? AND window_ms = 60000", c)
        start, previous, current = window or (now, 0, 0)
        assert spent is not None
        assert held is not None
        assert spent[0] + held[0] + op.cost <= LIMITS[1].amount
        await db.execute(
            "INSERT OR REPLACE INTO rates (c, window_ms, start_ms, previous, current) VALUES (?, 60000, ?, ?, ?)",
            (c, start, previous, current + 1),
        )
        await self.add(c, now, requests=1)
        await db.execute(
            "INSERT INTO holds (c, id, day, model, cost, tokens, expires_ms, answer) VALUES (?, ?, ?, ?, ?, 0, ?, ?)",
            (c, op.id, DAY, op.model, op.cost, now + op.ttl_ms, json.dumps([now, [current, *spent], [*held]])),
        )
        await db.commit()

    async def record(self, op: Admit, entry: Entry) -> None:
        db, now = self.db, now_ms()
        await db.execute("BEGIN IMMEDIATE")
        row = await self.one("SELECT c FROM customers WHERE customer = ?", op.customer)
        assert row is not None
        c = row[0]
        known = await self.one("SELECT cost FROM entries WHERE c = ? AND id = ?", c, entry.id)
        assert known is None
        hold = await self.one("SELECT cost FROM holds WHERE c = ? AND id = ?", c, op.id)
        assert hold is not None
        await db.execute(
            """INSERT INTO entries (c, id, rev, day, at_ms, latest_ms, cost, input_tokens, output_tokens,
                cache_read_tokens, late, model, admission, kind, source, provider, status, body)
                VALUES (?, ?, 1, ?, ?, ?, ?, ?, ?, 0, 0, ?, ?, 'usage', 'manual', 'openai', 'ok', ?)""",
            (c, entry.id, DAY, entry.at_ms, entry.at_ms, entry.cost, 500, 120, entry.model, op.id,
             json.dumps(entry.usage.to_dict())),
        )  # fmt: skip
        await self.add(c, now, calls=1, cost=entry.cost or 0, input_tokens=500, output_tokens=120)
        await db.execute("DELETE FROM holds WHERE c = ? AND id = ?", (c, op.id))
        await db.execute("INSERT INTO ended (c, id, ended_ms, answer) VALUES (?, ?, ?, '')", (c, op.id, now))
        await db.commit()

    async def add(self, c: int, now: int, **amounts: int) -> None:
        names = ", ".join(amounts)
        sets = ", ".join(f"{name} = {name} + ?" for name in amounts)
        zeros = {
            "requests",
            "calls",
            "cost",
            "input_tokens",
            "output_tokens",
            "cache_read_tokens",
            "unpriced",
            "errors",
        }
        rest = sorted(zeros - set(amounts))
        await self.db.execute(
            f"INSERT INTO rollups (c, day, model, {names}, {', '.join(rest)}) "
            f"VALUES (?, ?, 'gpt-test', {', '.join('?' * len(amounts))}, {', '.join('0' * len(rest))}) "
            f"ON CONFLICT (c, day, model) DO UPDATE SET {sets}",
            (c, DAY, *amounts.values(), *amounts.values()),
        )
        everybodys = ", ".join(str(amounts.get(name, 0)) for name in AMOUNTS)
        for table, column, at in (("days", "day", DAY), ("hours", "hour", now // 3_600_000)):
            await self.db.execute(
                f"INSERT INTO {table} VALUES (?, 'gpt-test', {everybodys}) "
                f"ON CONFLICT ({column}, model) DO UPDATE SET {sets}",
                (at, *amounts.values()),
            )
        await self.db.execute(f"UPDATE customers SET last_seen = ?, {sets} WHERE c = ?", (now, *amounts.values(), c))


async def measure(lifecycle: Lifecycle, concurrency: int, seconds: float) -> tuple[float, list[float]]:
    """Lifecycles per second, and how long each took."""
    numbers = itertools.count()
    took: list[float] = []
    until = time.perf_counter() + seconds

    async def worker() -> None:
        while (begun := time.perf_counter()) < until:
            await lifecycle(next(numbers))
            took.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    await asyncio.gather(*[worker() for _ in range(concurrency)])
    return len(took) / (time.perf_counter() - begun), took


async def run_batched(path: Path, concurrency: int, seconds: float, prefix: str = "a") -> tuple[float, list[float]]:
    backend = SQLiteBackend(f"sqlite:///{path}")
    await backend.open()
    try:
        return await measure(Batched(backend, prefix), concurrency, seconds)
    finally:
        await backend.close()


async def run_naive(path: Path, concurrency: int, seconds: float, prefix: str = "a") -> tuple[float, list[float]]:
    backend = SQLiteBackend(f"sqlite:///{path}")
    await backend.open()  # for the schema
    await backend.close()
    async with aiosqlite.connect(path, isolation_level=None, timeout=10) as db:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
            await db.execute(f"PRAGMA {pragma}")
        return await measure(Naive(db, prefix), concurrency, seconds)


def once(side: str, concurrency: int, seconds: float) -> tuple[float, float, float]:
    """Rate, and the 50th and 99th percentile in ms, on a fresh file."""
    with tempfile.TemporaryDirectory() as directory:
        run = run_batched if side == "batched" else run_naive
        rate, took = asyncio.run(run(Path(directory) / "bench.db", concurrency, seconds))
    took.sort()
    return rate, took[len(took) // 2] * 1000, took[len(took) * 99 // 100] * 1000


def two_processes(concurrency: int, seconds: float) -> list[float]:
    """Rates of two processes on one file; any error of either, "locked" above all, ends the run."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "bench.db"
        asyncio.run(run_batched(path, 1, 0.05, "first"))
        arguments = [sys.executable, __file__, "--child", str(path), str(concurrency), str(seconds)]
        children = [subprocess.Popen([*arguments, name], stdout=subprocess.PIPE, text=True) for name in ("p", "q")]
        outputs = [child.communicate()[0] for child in children]
        if any(child.returncode for child in children):
            raise SystemExit("a process failed")
        return [float(output) for output in outputs]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        path, concurrency, seconds, prefix = options.child
        print(asyncio.run(run_batched(Path(path), int(concurrency), float(seconds), prefix))[0])
        return
    print("| lifecycles, synchronous=FULL | concurrent | per second | p50 ms | p99 ms | ratio | target |")
    print("|---|---|---|---|---|---|---|")
    for concurrency, target in ((1, None), (32, 15), (256, 20)):
        naive: list[tuple[float, float, float]] = []
        batched: list[tuple[float, float, float]] = []
        for _ in range(options.rounds):  # in turns, so that a slow moment of the machine meets both
            naive.append(once("naive", concurrency, options.seconds))
            batched.append(once("batched", concurrency, options.seconds))
        base = statistics.median(rate for rate, _, _ in naive)
        for name, runs in (("naive aiosqlite", naive), ("respan_guard", batched)):
            rate, p50, p99 = (statistics.median(column) for column in zip(*runs, strict=True))
            goal = f">= {target}" if target and runs is batched else ""
            print(f"| {name} | {concurrency} | {rate:,.0f} | {p50:.1f} | {p99:.1f} | {rate / base:.1f} | {goal} |")
    rates = two_processes(32, options.seconds)
    share = min(rates) / max(rates)
    print(f"two processes, 32 concurrent each: {rates[0]:,.0f} and {rates[1]:,.0f} per second, no error surfaced;")
    print(f"the slower one gets {share:.2f} of the faster (target >= 0.5)")


if __name__ == "__main__":
    main()
