"""A clock that stands still until it is told to move."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

__all__ = ["FakeClock"]


class FakeClock:
    """Time for tests: deterministic, and as fast as you like. Safe to use from any thread.

    Args:
        start: Where it stands first: an aware datetime, or milliseconds since the epoch.
    """

    def __init__(self, start: datetime | int = 1_768_478_400_000) -> None:  # 2026-01-15T12:00:00Z
        self._lock = threading.Lock()
        self._us = start * 1000 if isinstance(start, int) else _microseconds(start)
        self._elapsed_us = 0

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01T00:00:00Z."""
        return self._us // 1000

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return self._elapsed_us / 1_000_000

    @property
    def now(self) -> datetime:
        """The time as an aware datetime, UTC."""
        return datetime.fromtimestamp(self.now_ms() / 1000, UTC)

    def advance(self, duration: float | timedelta) -> None:
        """Go on by seconds or a timedelta, to the microsecond.

        Raises:
            ValueError: The duration is negative.
        """
        step = duration if isinstance(duration, timedelta) else timedelta(seconds=duration)
        if step < timedelta(0):
            raise ValueError("time goes on; use set() to step back")
        with self._lock:
            self._us += step // timedelta(microseconds=1)
            self._elapsed_us += step // timedelta(microseconds=1)

    def set(self, moment: datetime) -> None:
        """Step to a moment, forwards or backwards, as a machine's wall clock may; durations are not affected."""
        with self._lock:
            self._us = _microseconds(moment)


def _microseconds(moment: datetime) -> int:
    if moment.tzinfo is None:
        raise ValueError(f"a moment needs a time zone, like tzinfo=UTC; got {moment!r}")
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
