"""What a decision costs in memory, as ratios to one hit of `limits`' own async memory storage in the same run.

The clock goes on by 10 ms with every admission, so that what a store has to forget is forgotten at the pace at which
it comes, as in a process that runs for long. What is asked is made a moment before, as a guard does, and not timed.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable

from limits import parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter

from respan_guard.backends.base import Admit, Entry, Limit, Op, Record, Release
from respan_guard.backends.memory import MemoryBackend
from respan_guard.usage import Usage

DAY = 739_631
NOW = 1_768_478_400_000
STEP = 10
CALLS = 2000
CHUNK = 50
ROUNDS = 9
LIMITS = (
    Limit("rate_limit", "rate", "requests", 3_000_000, window_ms=60_000),
    Limit("period_budget", "span", "cost", 10**14, first_day=DAY, end_day=DAY + 30),
    Limit("total_budget", "total", "cost", 10**15),
)


def customers(count: int) -> MemoryBackend:
    """A store that has seen so many, each once."""
    backend = MemoryBackend(max_customers=max(count, 1) * 2)
    for number in range(count):
        ops: list[Op] = [admit(f"w{number}", f"c{number}"), Release(f"c{number}", f"w{number}")]
        backend.apply_now(ops, NOW - 200_000 + number * 100_000 // count)
    for _ in range(count):  # what was put off until now is no part of what is measured
        backend.apply_now((Release("nobody", "x"),), NOW)
    return backend


def admit(admission: str, customer: str) -> Admit:
    return Admit(admission, customer, "", DAY, 0, 1 << 52, LIMITS, "m", cost=1000)


def calls(prefix: str, count: int, start: int) -> list[tuple[Admit, Record, Release]]:
    usage = Usage(model="m", input_tokens=10, output_tokens=20)
    made = []
    for number in range(start, start + CHUNK):
        name, customer = f"{prefix}{number}", f"c{number % count}"
        entry = Entry(name, customer, DAY, NOW, 900, 10, 20, "m", name, usage=usage)
        made.append((admit(name, customer), Record(entry), Release(customer, name)))
    return made


class Store:
    """A store that is measured, and the time that passes while it is.

    Args:
        count: How many customers it has seen before.
    """

    def __init__(self, count: int) -> None:
        self.backend = customers(count)
        self.count = count
        self.now = NOW

    def life(self, prefix: str, *, start: int = 0, record: bool) -> float:
        """Microseconds of one admission's life."""
        apply, now, spent = self.backend.apply_now, self.now, 0.0
        gc.collect()
        for at in range(start, start + CALLS, CHUNK):
            work = calls(prefix, self.count, at)
            began = time.process_time()
            if record:
                for ask, entry, release in work:
                    now += STEP
                    apply((ask,), now)
                    apply((entry, release), now)
            else:
                for ask, _, release in work:
                    now += STEP
                    apply((ask,), now)
                    apply((release,), now)
            spent += time.process_time() - began
        self.now = now
        return spent / CALLS * 1e6


def timed(work: Callable[[], object]) -> float:
    """Microseconds per call."""
    gc.collect()
    began = time.process_time()
    work()
    return (time.process_time() - began) / CALLS * 1e6


def others(loop: asyncio.AbstractEventLoop) -> dict[str, Callable[[], object]]:
    """One hit each of what people use otherwise; those that are not installed are left out."""
    item, found = parse("100000000/minute"), {}

    def limits_hit(limiter: FixedWindowRateLimiter | SlidingWindowCounterRateLimiter) -> Callable[[], object]:
        async def hits() -> None:
            for _ in range(CALLS):
                await limiter.hit(item, "c0")

        return lambda: loop.run_until_complete(hits())

    found["limits.aio fixed window, hit"] = limits_hit(FixedWindowRateLimiter(MemoryStorage()))
    found["limits.aio sliding window counter, hit"] = limits_hit(SlidingWindowCounterRateLimiter(MemoryStorage()))
    try:
        from throttled import RateLimiterType, Throttled, rate_limiter
    except ImportError:
        pass
    else:
        throttled = Throttled(key="c0", using=RateLimiterType.SLIDING_WINDOW.value, quota=rate_limiter.per_min(10**8))
        found["throttled-py sliding window, limit"] = lambda: [throttled.limit() for _ in range(CALLS)]
    try:
        from pyrate_limiter import Duration, InMemoryBucket, Limiter, Rate
    except ImportError:
        pass
    else:
        limiter = Limiter(InMemoryBucket([Rate(10**8, Duration.MINUTE)]))
        found["pyrate-limiter, try_acquire"] = lambda: [limiter.try_acquire("c0") for _ in range(CALLS)]
    return found


def idle_bytes(count: int = 20_000) -> float:
    """What a customer takes a minute after its only admission ended, its name included."""
    gc.collect()
    tracemalloc.start()
    backend = customers(count)
    for number in range(count):
        backend.apply_now((Release("nobody", "x"),), NOW + number)
    gc.collect()
    size = tracemalloc.get_traced_memory()[0] / count
    tracemalloc.stop()
    return size


async def among(count: int, rounds: int = 20) -> float:
    """Microseconds that a hit of `limits` adds to a pass of the event loop where so many customers are known.

    Its storage looks at every key each time the loop goes round.
    """
    limiter, item = FixedWindowRateLimiter(MemoryStorage()), parse("100000000/minute")
    for number in range(count):
        await limiter.hit(item, f"c{number}")
    spent = []
    for hit in (True, False):
        await asyncio.sleep(0.01)
        began = time.process_time()
        for number in range(rounds):
            if hit:
                await limiter.hit(item, f"c{number % count}")
            await asyncio.sleep(0)
        spent.append((time.process_time() - began) / rounds * 1e6)
    return spent[0] - spent[1]


def main() -> None:
    loop = asyncio.new_event_loop()
    rows: dict[str, list[float]] = {}
    peers = others(loop)
    stores = [Store(count) for count in (1, 1000, 100_000, 1_000_000)]
    gc.freeze()
    for turn in range(ROUNDS):
        for name, work in peers.items():
            rows.setdefault(name, []).append(timed(work))
        for store in stores:
            for what, record in (("admit + release", False), ("admit + record + release", True)):
                spent = store.life(f"{what}{turn}-", record=record)
                rows.setdefault(f"{what}, {store.count:,} customers", []).append(spent)
        spent = stores[-1].life(f"rest{turn}-", start=(turn + 1) * CALLS, record=False)
        rows.setdefault("admit + release, 1,000,000 customers, back from rest", []).append(spent)
    base = rows["limits.aio fixed window, hit"]
    print(f"{'':56}{'us':>8}{'ratio':>8}{'at best':>9}")
    for name, times in rows.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(times, base, strict=True))
        print(f"{name:56}{statistics.median(times):8.2f}{ratio:8.2f}{min(times) / min(base):9.2f}")
    for count in (1, 1000, 10_000):
        added = loop.run_until_complete(among(count))
        print(f"{f'limits.aio, a hit and a pass of the loop, {count:,} customers':56}{added:8.2f}")
    print(f"bytes per idle customer: {idle_bytes():.0f}")
    loop.close()


if __name__ == "__main__":
    main()
