"""A clock that stands still until it is told to move."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

__all__ = ["FakeClock"]


class FakeClock:
    """Time for tests: deterministic, and as fast as you like.

    Args:
        start: Where it stands first: an aware datetime, or milliseconds since the epoch.
    """

    def __init__(self, start: datetime | int = 1_768_478_400_000) -> None:  # 2026-01-15T12:00:00Z
        self._ms: float = start if isinstance(start, int) else start.timestamp() * 1000
        self._monotonic = 0.0

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01T00:00:00Z."""
        return round(self._ms)

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return self._monotonic

    @property
    def now(self) -> datetime:
        """The time as an aware datetime, UTC."""
        return datetime.fromtimestamp(self.now_ms() / 1000, UTC)

    def advance(self, duration: float | timedelta) -> None:
        """Go on by seconds or a timedelta."""
        seconds = duration.total_seconds() if isinstance(duration, timedelta) else duration
        if seconds < 0:
            raise ValueError("time goes on; use set() to step back")
        self._ms += seconds * 1000
        self._monotonic += seconds

    def set(self, moment: datetime) -> None:
        """Step to a moment, forwards or backwards, as a machine's wall clock may; durations are not affected."""
        self._ms = moment.timestamp() * 1000
