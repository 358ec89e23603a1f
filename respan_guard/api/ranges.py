"""Ranges of time: as days, on which everything is booked, or from instant to instant."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from respan_guard.api.fields import Day, Environment, Instant
from respan_guard.errors import InvalidInput
from respan_guard.periods import load_zone, local_day, start_of_day

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["EVER", "Span", "TimeRange", "span_of", "whole_days"]

EVER: Final = (0, 1 << 40)
_DAY_MS = 86_400_000

Preset = Literal["daily", "weekly", "monthly", "quarterly", "yearly", "last_24h", "all"]


class Span(NamedTuple):
    """A range.

    Attributes:
        days: The days that it touches: from the first to before the last.
        since_ms: The instant that it begins at, if that is no midnight.
        until_ms: The instant that it ends before, if that is no midnight.
    """

    days: tuple[int, int]
    since_ms: int | None = None
    until_ms: int | None = None

    @property
    def whole(self) -> bool:
        """Whether it is made of whole days, whose sums are kept."""
        return self.since_ms is None and self.until_ms is None


class TimeRange(BaseModel):
    """A preset, or from one time to another; the current month if neither is given."""

    model_config = ConfigDict(extra="forbid")

    summary_type: Preset | None = Field(None, description="The day, week, ... that `date` is in.")
    date: Day = Field(None, description="With `summary_type`; today if absent.")
    start_time: Instant = Field(None, description="Only calls that ended at or after it.")
    end_time: Instant = Field(None, description="Only calls that ended before it.")
    time_tick: Literal["minute", "hour", "day"] | None = Field(None, description="How long a bucket is; day if absent.")
    timezone_offset: float | None = Field(
        None, ge=-14, le=14, description="Hours from UTC, to know what day today is; the guard's zone if absent."
    )
    environment: Environment = Field(None, description='All here is "prod".')


def whole_days(start: datetime | None, end: datetime | None, guard: Guard) -> tuple[int, int] | None:
    """The days from one time to another, if both are midnights in the guard's zone; else None."""
    zone = load_zone(guard.settings.time_zone)
    first = EVER[0] if start is None else _midnight(start, zone)
    after = EVER[1] if end is None else _midnight(end, zone)
    return None if first is None or after is None else (first, after)


def _midnight(moment: datetime, zone: tzinfo) -> int | None:
    ms = _ms(moment)
    day = local_day(ms, zone)
    return day if start_of_day(day, zone) == ms else None


def _ms(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def span_of(query: TimeRange, guard: Guard) -> Span:
    """What a range is about.

    Raises:
        InvalidInput: It ends before it begins.
    """
    zone = load_zone(guard.settings.time_zone)
    today = local_day(guard.now_ms(), zone)
    if query.timezone_offset is not None:
        shifted = guard.now_ms() + int(query.timezone_offset * 3_600_000)
        today = local_day(shifted, UTC)
    if query.start_time is not None or query.end_time is not None:
        return _between(query.start_time, query.end_time, today, guard)
    if query.summary_type == "all":
        return Span(EVER)
    if query.summary_type == "last_24h":
        now = guard.now_ms()
        return Span((local_day(now - _DAY_MS, zone), local_day(now, zone) + 1), now - _DAY_MS)
    return Span(_preset(query.summary_type or "monthly", query.date or date.fromordinal(today)))


def _between(start: datetime | None, end: datetime | None, today: int, guard: Guard) -> Span:
    zone = load_zone(guard.settings.time_zone)
    after = today + 1 if end is None else local_day(_ms(end) - 1, zone) + 1
    first = after - 30 if start is None else local_day(_ms(start), zone)
    if first >= after or (start is not None and end is not None and start >= end):
        raise InvalidInput("end_time must be after start_time", field="end_time")
    since = None if start is None or _midnight(start, zone) is not None else _ms(start)
    # Nothing is later than now, so a range up to then may as well have all of today.
    open_end = end is None or _midnight(end, zone) is not None or _ms(end) > guard.now_ms()
    return Span((first, after), since, None if open_end or end is None else _ms(end))


def _preset(name: str, day: date) -> tuple[int, int]:
    if name == "daily":
        return day.toordinal(), day.toordinal() + 1
    if name == "weekly":
        monday = day.toordinal() - day.weekday()
        return monday, monday + 7
    months = {"monthly": 1, "quarterly": 3, "yearly": 12}[name]
    first = date(day.year, (day.month - 1) // months * months + 1, 1)
    year, month = divmod(first.year * 12 + first.month - 1 + months, 12)
    return first.toordinal(), date(year, month + 1, 1).toordinal()
