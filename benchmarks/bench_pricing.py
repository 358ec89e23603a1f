"""What pricing a call costs: a resolved plan against `genai_prices.calc_price`, in the same run.

Rounds are interleaved, so that a busy machine slows both sides; the ratio is the result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime

import genai_prices

from respan_guard.pricing import PriceBook
from respan_guard.usage import Usage

TARGET = 0.02
AT = datetime(2026, 11, 24, 12, tzinfo=UTC)
CASES = (
    Usage("gpt-4o", 1_234, 567, provider="openai"),
    Usage("gpt-4o", 1_234, 567, provider="openai", cache_read_tokens=1_000),
    Usage("claude-sonnet-4-5-20250929", 9_000, 500, 4_000, 2_000, cache_write_1h_tokens=500, provider="anthropic"),
    Usage("gemini-2.5-pro", 300_000, 700, cache_read_tokens=1_000, reasoning_tokens=400, provider="google"),
    Usage("deepseek-chat", 1_234, 567, provider="deepseek"),
)


def per_call(work: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times * 1e6


def main() -> None:
    book = PriceBook()
    print(f"{'model':30} {'calc_price us':>14} {'plan us':>9} {'ratio':>7}   target {TARGET}")
    for usage in CASES:
        counts = {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cache_read_tokens": usage.cache_read_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
            "cache_write_1h_tokens": usage.cache_write_1h_tokens,
        }
        theirs, ours = [], []

        def calc(usage: Usage = usage, counts: dict[str, int] = counts) -> object:
            return genai_prices.calc_price(
                counts, usage.model, provider_id=usage.provider, genai_request_timestamp=AT
            ).total_price

        def plan(usage: Usage = usage) -> object:
            return book.cost(usage, AT)

        calc(), plan()
        for _ in range(9):
            theirs.append(per_call(calc, 300))
            ours.append(per_call(plan, 10_000))
        a, b = statistics.median(theirs), statistics.median(ours)
        print(f"{usage.model:30} {a:14.1f} {b:9.3f} {b / a:7.4f}   {'met' if b / a <= TARGET else 'MISSED'}")


if __name__ == "__main__":
    main()
