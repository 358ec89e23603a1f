"""What a decision costs in memory, as ratios to one hit of `limits`' own async memory storage in the same run."""

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
CALLS = 2000
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


def calls(prefix: str, count: int, start: int = 0) -> list[tuple[Admit, Record, Release]]:
    usage = Usage(model="m", input_tokens=10, output_tokens=20)
    return [
        (
            admit(f"{prefix}{n}", f"c{(start + n) % count}"),
            Record(
                Entry(
                    f"{prefix}{n}", f"c{(start + n) % count}", DAY, NOW, 900, 10, 20, "m", f"{prefix}{n}", usage=usage
                )
            ),
            Release(f"c{(start + n) % count}", f"{prefix}{n}"),
        )
        for n in range(CALLS)
    ]


def timed(work: Callable[[], object]) -> float:
    """Microseconds per call."""
    gc.collect()
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) / CALLS * 1e6


def ours(backend: MemoryBackend, work: list[tuple[Admit, Record, Release]]) -> None:
    for ask, entry, release in work:
        backend.apply_now((ask,), NOW)
        backend.apply_now((entry, release), NOW)


def decisions(backend: MemoryBackend, work: list[tuple[Admit, Record, Release]]) -> None:
    for ask, _, release in work:
        backend.apply_now((ask,), NOW)
        backend.apply_now((release,), NOW)


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


def main() -> None:
    loop = asyncio.new_event_loop()
    rows: dict[str, list[float]] = {}
    peers = others(loop)
    stores = {count: customers(count) for count in (1, 1000, 100_000, 1_000_000)}
    gc.freeze()
    for turn in range(ROUNDS):
        for name, work in peers.items():
            rows.setdefault(name, []).append(timed(work))
        for count, backend in stores.items():
            first, second = calls(f"a{turn}-", count), calls(f"b{turn}-", count)
            rows.setdefault(f"admit + release, {count:,} customers", []).append(
                timed(lambda b=backend, w=first: decisions(b, w))  # type: ignore[misc]
            )
            rows.setdefault(f"admit + record + release, {count:,} customers", []).append(
                timed(lambda b=backend, w=second: ours(b, w))  # type: ignore[misc]
            )
        resting = calls(f"r{turn}-", 1_000_000, (turn + 1) * CALLS)
        rows.setdefault("admit + release, 1,000,000 customers, back from rest", []).append(
            timed(lambda b=stores[1_000_000], w=resting: decisions(b, w))  # type: ignore[misc]
        )
    base = rows["limits.aio fixed window, hit"]
    print(f"{'':56}{'us':>8}{'ratio':>8}")
    for name, times in rows.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(times, base, strict=True))
        print(f"{name:56}{statistics.median(times):8.2f}{ratio:8.2f}")
    print(f"bytes per idle customer: {idle_bytes():.0f}")
    loop.close()


if __name__ == "__main__":
    main()
