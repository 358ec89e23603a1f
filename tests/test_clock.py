"""`FakeClock`: time that moves when it is told to."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta, timezone

import pytest

from respan_guard import Guard
from respan_guard.clock import Clock
from respan_guard.testing import FakeClock


def test_it_stands_still_at_a_known_moment() -> None:
    """A new clock says 2026-01-15 12:00 UTC, however often it is asked."""
    clock = FakeClock()
    assert clock.now_ms() == clock.now_ms() == 1_768_478_400_000
    assert clock.now == datetime(2026, 1, 15, 12, tzinfo=UTC)
    assert clock.monotonic() == clock.monotonic()


def test_it_is_a_clock() -> None:
    """It offers what the package asks of a clock."""
    assert isinstance(FakeClock(), Clock)


@pytest.mark.parametrize(
    "start",
    [
        1_800_000_000_000,
        datetime(2027, 1, 15, 8, tzinfo=UTC),
        datetime(2027, 1, 15, 9, tzinfo=timezone(timedelta(hours=1))),
    ],
)
def test_it_starts_where_it_is_told(start: datetime | int) -> None:
    """Milliseconds and aware datetimes of any zone name the same moment."""
    assert FakeClock(start).now_ms() == 1_800_000_000_000


@pytest.mark.parametrize("step", [1.5, timedelta(seconds=1, milliseconds=500)])
def test_advancing_moves_both_times(step: float | timedelta) -> None:
    """Seconds and timedeltas move the wall clock and the monotonic one alike."""
    clock = FakeClock(0)
    before = clock.monotonic()
    clock.advance(step)
    assert clock.now_ms() == 1_500
    assert clock.monotonic() - before == 1.5


def test_small_steps_add_up() -> None:
    """Steps below a millisecond are not lost."""
    clock = FakeClock(0)
    for _ in range(1_000):
        clock.advance(0.0001)
    assert clock.now_ms() == 100


def test_it_does_not_advance_backwards() -> None:
    """A negative step is a mistake; going back is `set`."""
    clock = FakeClock()
    with pytest.raises(ValueError, match="set"):
        clock.advance(-1)
    assert clock.now_ms() == 1_768_478_400_000


def test_setting_leaves_durations_alone() -> None:
    """As on a machine whose wall clock is corrected: the monotonic time does not jump."""
    clock = FakeClock()
    before = clock.monotonic()
    clock.set(datetime(2020, 1, 1, tzinfo=UTC))
    assert clock.now == datetime(2020, 1, 1, tzinfo=UTC)
    assert clock.monotonic() == before


def test_threads_may_advance_it_together() -> None:
    """No step is lost when several threads move the clock."""
    clock = FakeClock(0)

    def run() -> None:
        for _ in range(2_000):
            clock.advance(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.now_ms() == 8_000_000


async def test_a_guard_lives_by_it() -> None:
    """A refused request is admitted once the clock has gone on by `retry_after`, without anybody waiting."""
    clock = FakeClock()
    guard = Guard("memory://", default_limits={"rate_limit": 1}, clock=clock)
    async with guard.admit("org_1"):
        pass
    refused = await guard.try_admit("org_1")
    assert not refused.decision.allowed
    assert refused.decision.retry_after is not None
    clock.advance(refused.decision.retry_after)
    async with guard.admit("org_1") as admission:
        assert admission.decision.allowed


def test_a_moment_needs_a_time_zone() -> None:
    """A naive datetime would mean whatever the machine's zone is, so it is refused."""
    with pytest.raises(ValueError, match="time zone"):
        FakeClock(datetime(2026, 1, 1))  # noqa: DTZ001  # that is the point
    with pytest.raises(ValueError, match="time zone"):
        FakeClock().set(datetime(2026, 1, 1))  # noqa: DTZ001  # that is the point
