"""Redis: what batches bring, against redis-py calling the same script one by one, and `limits.aio` on the same server.

Starts a server of its own (nothing on disk, so that the disk is not what is measured). An admission is a rate, two
budgets, a hold with its id, and sums by day and hour; `limits` counts a rate alone. In the same run: exactly the limit
is admitted.

    python -m benchmarks.bench_redis [--seconds 2] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis import Redis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio import Redis as AsyncRedis

from benchmarks.bench_sqlite import DAY, Batched, admit_of, entry_of, measure, now_ms
from respan_guard import Guard, Usage
from respan_guard.backends.base import Admit, Allowed, Limit, Op, Outcome, Record, Release
from respan_guard.backends.redis import RedisBackend
from respan_guard.backends.redis.rows import Encoder
from respan_guard.backends.redis.scripts import script
from tests.backends.redis_server import RedisServer

KEY = "respan:{default}:meta"
LEAST = 8  # ops that a home does not part
ZSET_LAYOUT = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local gone = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)
local v = redis.call('HMGET', KEYS[1], 'start', 'prev', 'cur', 'period', 'total', 'held')
local start, prev, cur = tonumber(v[1] or now), tonumber(v[2] or 0), tonumber(v[3] or 0)
local period, total, held = tonumber(v[4] or 0), tonumber(v[5] or 0), tonumber(v[6] or 0)
for _, member in ipairs(gone) do held = held - tonumber(string.match(member, ':(%d+)$')) end
if gone[1] then redis.call('ZREM', KEYS[2], unpack(gone)) end
if now >= start + 60000 then start, prev, cur = start + 60000, cur, 0 end
local amount = tonumber(ARGV[2])
held = held + amount
local over = period + held > tonumber(ARGV[4]) or total + held > tonumber(ARGV[5])
if over or cur + 1 > tonumber(ARGV[3]) then return 0 end
redis.call('HSET', KEYS[1], 'start', start, 'prev', prev, 'cur', cur + 1, 'held', held)
redis.call('ZADD', KEYS[2], now + 600000, ARGV[1] .. ':' .. ARGV[2])
return 1
"""
"""A hold as a member of a sorted set, as is commonly done. No replays, no sums by day, no numbers of a refusal."""


# -- the server's time -----------------------------------------------------------------------------


def server_time(client: Redis, source: str, arguments: Callable[[int], list[Any]], rounds: int, per: int = 1) -> float:
    """Microseconds that the server takes for one operation, as it counts itself: the least of many short rounds.

    Short, because a round in which something else had the processor says nothing.
    """
    sha, numbers, best = client.script_load(source), itertools.count(), float("inf")
    for _ in range(rounds):
        pipeline = client.pipeline(transaction=False)
        for _ in range(5):
            pipeline.execute_command("EVALSHA", sha, *arguments(next(numbers)))
        client.config_resetstat()
        pipeline.execute()
        stats: Any = client.info("commandstats")
        best = min(best, max(stats["cmdstat_evalsha"]["usec_per_call"], 0.1))  # it counts whole ones, at times none
    return best / per


def show_server_time(client: Redis, epoch: str, rounds: int) -> None:
    """What the layout costs, in times of an empty script."""
    encoder, source = Encoder(), script("apply").source

    def ours(make: Callable[[int], Sequence[Op]]) -> Callable[[int], list[Any]]:
        return lambda n: [1, KEY, epoch, 0, "1", "0", *encoder.batch(make(n))]

    def zset(n: int) -> list[Any]:
        customer = n % 1000
        return [2, f"b:{customer}", f"z:{customer}", f"a{n}", 2_000_000, 1_000_000, 10**15, 10**15]

    def lifecycles(n: int) -> list[Op]:
        asks = [admit_of(32 * n + i, f"s{rounds}-") for i in range(32)]
        return [op for ask in asks for op in (ask, Record(entry_of(ask)), Release(ask.customer, ask.id))]

    def ends(n: int) -> list[Op]:
        ask = admit_of(n, "t")
        return [Record(entry_of(ask)), Release(ask.customer, ask.id)]

    empty = server_time(client, "return 1", lambda n: [0], rounds)
    together = ours(lambda n: [admit_of(32 * n + i, "u") for i in range(32)])
    rows = [
        ("return 1", empty),
        ("a hold in a sorted set, alone", server_time(client, ZSET_LAYOUT, zset, rounds)),
        ("ours: admit, alone", server_time(client, source, ours(lambda n: [admit_of(n, "t")]), rounds)),
        ("ours: admit, 32 together", server_time(client, source, together, rounds, 32)),
        ("ours: record and release, alone", server_time(client, source, ours(ends), rounds)),
        ("ours: admit, record, release, 32 together", server_time(client, source, ours(lifecycles), rounds, 32)),
    ]
    print("| the server's time | us | times an empty script | times the sorted set |")
    print("|---|---|---|---|")
    for name, took in rows:
        print(f"| {name} | {took:.1f} | {took / empty:.1f} | {took / rows[1][1]:.2f} |")


class TwoAtOnce(Batched):
    """As a guard's home does with a store that takes it: two batches are under way, alike in size."""

    async def drain(self) -> None:
        parts: deque[tuple[list[tuple[Op, asyncio.Future[Outcome] | None]], asyncio.Task[list[Outcome]]]] = deque()
        while self.waiting or parts:
            while self.waiting and len(parts) < self.backend.at_once:
                share = -(-(len(self.waiting) + sum(len(part) for part, _ in parts)) // self.backend.at_once)
                most = min(512, max(share, LEAST))
                part, self.waiting = self.waiting[:most], self.waiting[most:]
                sending = self.backend.apply([op for op, _ in part], now_ms())
                parts.append((part, asyncio.create_task(sending)))
            part, answers = parts[0]
            for (_, future), outcome in zip(part, await answers, strict=True):
                if future is not None:
                    future.set_result(outcome)
            parts.popleft()
            if parts:
                await asyncio.sleep(0)


# -- clients ---------------------------------------------------------------------------------------

Call = Callable[[int], Awaitable[object]]


async def clients(url: str, prefix: str) -> tuple[dict[str, Call], Callable[[], Awaitable[None]]]:
    """What is compared: each does one admission, or one request's whole life."""
    backend = RedisBackend(url)
    await backend.open()
    assert backend._shelf is not None
    epoch, encoder, sha = backend._shelf.epoch, Encoder(), script("apply").sha
    client = AsyncRedis(
        connection_pool=BlockingConnectionPool.from_url(url, max_connections=64, timeout=60, decode_responses=True)
    )
    storage = RedisStorage(f"async+{url}", implementation="redispy", max_connections=512)
    limiter, item = SlidingWindowCounterRateLimiter(storage), RateLimitItemPerMinute(1_000_000)
    batched, plain = TwoAtOnce(backend, f"{prefix}-b"), await client.script_load(ZSET_LAYOUT)

    async def alone(ops: Sequence[Op]) -> None:
        await client.evalsha(sha, 1, KEY, epoch, 0, "1", "0", *encoder.batch(ops))  # type: ignore[misc]

    async def theirs_life(number: int) -> None:
        ask = admit_of(number, f"{prefix}-t")
        await alone([ask])
        await alone([Record(entry_of(ask)), Release(ask.customer, ask.id)])

    async def four_commands(number: int) -> None:
        customer, hold = number % 1000, f"{prefix}-{number}"
        keys = (f"b:{customer}", f"z:{customer}")
        await client.evalsha(plain, 2, *keys, hold, 2_000_000, 1_000_000, 10**15, 10**15)  # type: ignore[misc]
        await client.hincrby(keys[0], "total", 1_500_000)  # type: ignore[misc]
        await client.zrem(keys[1], f"{hold}:2000000")
        await client.xadd("records", {"c": customer, "cost": 1_500_000, "model": "gpt-test"})

    async def ours_life(number: int) -> None:
        ask = admit_of(number, f"{prefix}-o")
        assert isinstance(await batched.submit(ask), Allowed)
        batched.submit(Record(entry_of(ask)), Release(ask.customer, ask.id))  # rides behind, nobody waits

    async def close() -> None:
        while batched.task is not None and not batched.task.done():
            await batched.task
        await backend.close()
        await client.aclose()

    return {
        "redis-py, one by one: admit": lambda n: alone([admit_of(n, f"{prefix}-p")]),
        "ours: admit": lambda n: batched.submit(admit_of(n, f"{prefix}-a")),
        "limits.aio sliding window: hit": lambda n: limiter.hit(item, f"c{n % 1000}"),
        "redis-py, one by one: whole life": theirs_life,
        "redis-py, script and 3 commands: whole life": four_commands,
        "ours: whole life": ours_life,
    }, close


def show_clients(url: str, seconds: float, rounds: int) -> dict[tuple[str, int], float]:
    """Throughput and latency, in turns, so that a slow moment of the machine meets all."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for turn in range(rounds):
        for concurrency in (1, 32, 256):

            async def run(turn: int = turn, concurrency: int = concurrency) -> None:
                each, close = await clients(url, f"{turn}-{concurrency}")
                for name, call in each.items():

                    async def once(number: int, call: Call = call) -> None:
                        await call(number)

                    rate, took = await measure(once, concurrency, seconds)
                    found.setdefault((name, concurrency), []).append((rate, sorted(took)[len(took) // 2] * 1000))
                await close()

            asyncio.run(run())
    medians = {
        key: (statistics.median(rate for rate, _ in runs), statistics.median(p50 for _, p50 in runs))
        for key, runs in found.items()
    }
    print("\n| client | concurrent | per second | p50 ms |")
    print("|---|---|---|---|")
    for (name, concurrency), (rate, p50) in sorted(medians.items(), key=lambda item: item[0][1]):
        print(f"| {name} | {concurrency} | {rate:,.0f} | {p50:.2f} |")
    return {key: rate for key, (rate, _) in medians.items()}


async def alone(url: str, rounds: int) -> float:
    """How long redis-py takes for one script call, in times of ours; in turns of 20, so that both meet one machine."""
    each, close = await clients(url, "alone")
    names = ("redis-py, one by one: admit", "ours: admit")
    took: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(40 * rounds):
        for name in names:
            begun = time.perf_counter()
            for number in range(20):
                await each[name](20 * turn + number)
            took[name].append(time.perf_counter() - begun)
    await close()
    theirs, ours = (statistics.median(took[name]) for name in names)
    return theirs / ours


def show_ratios(rates: dict[tuple[str, int], float], one_alone: float) -> None:
    """Against the targets."""
    one, ours, limits = "redis-py, one by one: admit", "ours: admit", "limits.aio sliding window: hit"
    mine, lives, four = (
        "ours: whole life",
        "redis-py, one by one: whole life",
        "redis-py, script and 3 commands: whole life",
    )
    print("\n| ratio | | target |")
    print("|---|---|---|")
    for what, ratio, target in (
        (
            "admit, 32 concurrent: ours / redis-py one by one",
            rates[ours, 32] / rates[one, 32],
            ">= 2.5 (1.5 is the least)",
        ),
        ("admit, 256 concurrent: ours / redis-py one by one", rates[ours, 256] / rates[one, 256], ""),
        ("admit, alone, in turns: ours / redis-py one by one", one_alone, ">= 0.9: never slower alone"),
        ("admit, 32 concurrent: ours / limits.aio rate alone", rates[ours, 32] / rates[limits, 32], ">= 3"),
        ("whole life, alone: ours / script and 3 commands", rates[mine, 1] / rates[four, 1], ">= 2"),
        ("whole life, 32 concurrent: ours / redis-py one by one", rates[mine, 32] / rates[lives, 32], ""),
        ("whole life, 32 concurrent: ours / script and 3 commands", rates[mine, 32] / rates[four, 32], ""),
    ):
        print(f"| {what} | {ratio:.2f} | {target} |")


# -- trips, the server's ceiling, exactness ------------------------------------------------------------


async def trips(url: str, client: Redis) -> None:
    """Commands for one request, as the server counts them."""
    async with Guard(url, storage_timeout=10) as guard:
        async with guard.admit("trips"):
            pass
        await guard.flush()
        client.config_resetstat()
        for _ in range(100):
            async with guard.admit("trips") as admission:
                stats: Any = client.info("commandstats")
                admission.record_soon(Usage(model="m", cost="0.001"))
            await guard.flush()
        inside = stats["cmdstat_evalsha"]["calls"]
        stats = client.info("commandstats")
        all_ = sum(entry["calls"] for name, entry in stats.items() if name in ("cmdstat_evalsha", "cmdstat_eval"))
    print(f"\ncommands for a request: {all_ / 100:.2f} (target <= 2), {inside - 2 * 99} of them before the app runs")


def ceiling(server: RedisServer, epoch: str, ours: float) -> None:
    """The same script from redis-benchmark, which does nothing with the answers."""
    if shutil.which("redis-benchmark") is None:
        print("no redis-benchmark here: the server's ceiling is not measured")
        return
    asked = Encoder().batch([admit_of(0, "x")])[0].decode()
    asked = asked.replace("customer-0", "customer-__rand_int__").replace('"x0"', '"x__rand_int__"')
    for pipeline, clients_ in ((32, 8), (1, 32)):
        done = subprocess.run(
            ["redis-benchmark", "-p", str(server.port), "-q", "-n", "40000", "-r", "100000", "-P", str(pipeline),
             "-c", str(clients_), "EVALSHA", script("apply").sha, "1", KEY, epoch, "0", "1", "0", asked],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        rate = float(done.stdout.replace("\r", "\n").strip().splitlines()[-1].split(":")[-1].split()[0])
        share = ours / rate
        print(
            f"redis-benchmark -P {pipeline} -c {clients_}, same script: {rate:,.0f} per second; ours {share:.2f} of it"
        )


def spend(url: str, name: str, budget: int, asks: int, results: multiprocessing.Queue[int]) -> None:
    """Ask at once; what is let in spends all that it held."""

    async def run() -> int:
        backend = RedisBackend(url)
        await backend.open()
        limits = (Limit("total_budget", "total", "cost", budget),)
        batched, admitted = TwoAtOnce(backend, name), 0

        async def ask(number: int) -> None:
            nonlocal admitted
            op = Admit(f"{name}{number}", "exact", "", DAY, 0, 1 << 50, limits, cost=1000)
            if isinstance(await batched.submit(op), Allowed):
                admitted += 1
                entry = entry_of(op)
                entry.cost, entry.customer = 1000, "exact"
                await batched.submit(Record(entry), Release("exact", op.id))

        await asyncio.gather(*[ask(number) for number in range(asks)])
        await backend.close()
        return admitted

    results.put(asyncio.run(run()))


def gate(url: str) -> bool:
    """4 processes ask 4,000 times against a budget for 1,000: exactly 1,000 are admitted, and all of it is spent."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=spend, args=(url, name, 1_000_000, 1000, results)) for name in "abcd"]
    for process in processes:
        process.start()
    admitted = sum(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()

    async def look() -> tuple[int, int]:
        backend = RedisBackend(url)
        await backend.open()
        at = await backend.standing("exact", [Limit("total_budget", "total", "cost", 1)])
        found = len(await backend.verify())
        await backend.close()
        return at.used[0], found

    spent, wrong = asyncio.run(look())
    print(f"admits exactly the limit: {admitted} of 1000 admitted, {spent:,} of 1,000,000 spent, {wrong} discrepancies")
    return admitted == 1000 and spent == 1_000_000 and wrong == 0


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    server = RedisServer()
    client = Redis.from_url(server.url, decode_responses=True)

    async def prepare() -> str:
        backend = RedisBackend(server.url)
        await backend.open()
        await backend.apply([admit_of(number, "first") for number in range(1000)])
        assert backend._shelf is not None
        await backend.close()
        return str(client.hget(KEY, "epoch"))

    epoch = asyncio.run(prepare())
    show_server_time(client, epoch, 60 * options.rounds)
    rates = show_clients(server.url, options.seconds, options.rounds)
    show_ratios(rates, asyncio.run(alone(server.url, options.rounds)))
    asyncio.run(trips(server.url, client))
    ceiling(server, epoch, rates["ours: admit", 32])
    right = gate(server.url)
    client.close()
    server.stop()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
