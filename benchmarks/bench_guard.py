"""The whole life of an admission through the guard's public calls, on memory, against one `limits` hit.

DESIGN's goal is a ratio of at most 3.0. Garbage collection is off while measuring, as in `timeit`, and what is
measured is the process's own time, so that a busy machine changes less.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable

from limits import parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from respan_guard import Guard, Usage

LIMITS = {"rate_limit": 3_000_000, "period_budget": 1_000_000, "total_budget": 1_000_000}
ROUNDS = 7
TIMES = 3000


async def measure(work: Callable[[], Awaitable[object]]) -> float:
    """Microseconds of one call."""
    gc.collect()
    started = time.process_time()
    for _ in range(TIMES):
        await work()
    return (time.process_time() - started) / TIMES * 1e6


async def main() -> None:
    """Print the table."""
    limiter, item = FixedWindowRateLimiter(MemoryStorage()), parse("3000000/minute")
    guard = Guard("memory://", default_limits=LIMITS)

    async def hit() -> None:
        await limiter.hit(item, "c1")

    async def admit() -> None:
        async with guard.admit("c1"):
            pass

    async def life() -> None:
        async with guard.admit("c1") as admission:
            await admission.record(Usage("gpt-4o-mini", 10, 10, provider="openai"))

    found: dict[str, list[float]] = {"hit": [], "admit": [], "life": []}
    gc.disable()
    await life()
    for _ in range(ROUNDS):
        for name, work in (("hit", hit), ("admit", admit), ("life", life)):
            found[name].append(await measure(work))
    print(f"{'':44} us     x one limits hit")
    for name, text in (
        ("hit", "limits.aio memory, one fixed-window hit"),
        ("admit", "guard: admit, release"),
        ("life", "guard: admit, price and record, release"),
    ):
        ratios = [mine / base for mine, base in zip(found[name], found["hit"], strict=True)]
        print(f"{text:42} {statistics.median(found[name]):6.2f} {statistics.median(ratios):8.2f}")


if __name__ == "__main__":
    asyncio.run(main())
