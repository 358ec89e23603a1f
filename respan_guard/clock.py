"""Where time comes from. No other module of the package reads a clock of the machine."""

from __future__ import annotations

import time
from typing import Protocol, runtime_checkable

__all__ = ["Clock", "SystemClock", "store_counts"]


@runtime_checkable
class Clock(Protocol):
    """A source of time. `respan_guard.testing.FakeClock` is one that stands still."""

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01T00:00:00Z."""
        ...

    def monotonic(self) -> float:
        """Seconds from some point on, for durations only; never goes back."""
        ...


class SystemClock:
    """The machine's own clocks."""

    __slots__ = ()

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01T00:00:00Z."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Seconds from some point on."""
        return time.monotonic()


def store_counts(clock: Clock, server_clock: bool) -> bool:
    """Whether the clock of a store counts, if it has one: a clock that an app or a test made goes before it."""
    return server_clock and isinstance(clock, SystemClock)
