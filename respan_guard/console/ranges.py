"""Spans of time that pages show: the last 24 hours or days, the budget's period, or two dates."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from respan_guard.backends.base import HOUR_MS

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["RANGES", "Range", "as_local", "day_start_ms", "range_from"]

RANGES = {"24h": "24 hours", "7d": "7 days", "30d": "30 days", "90d": "90 days", "period": "This period"}
_LONGEST = 3660


@dataclass(frozen=True, slots=True)
class Range:
    """A run of days, or the last 24 hours.

    Attributes:
        name: What the URL calls it.
        first_day: Ordinal of the first day.
        end_day: Ordinal of the day after the last.
        since_ms: When it begins.
        until_ms: When it ends; may be to come.
        hourly: Whether it is the last 24 hours, not days.
        query: What a link carries to keep it.
    """

    name: str
    first_day: int
    end_day: int
    since_ms: int
    until_ms: int
    hourly: bool = False
    query: str = ""

    @property
    def title(self) -> str:
        """For people."""
        if self.name in RANGES:
            return RANGES[self.name]
        last = date.fromordinal(self.end_day - 1)
        return f"{date.fromordinal(self.first_day)} to {last}"

    @property
    def first(self) -> date:
        """The first day."""
        return date.fromordinal(self.first_day)

    @property
    def last(self) -> date:
        """The last day."""
        return date.fromordinal(self.end_day - 1)

    def before(self, zone: ZoneInfo) -> Range:
        """The span of the same length before it."""
        days = self.end_day - self.first_day
        if self.hourly:
            return Range("", self.first_day - 1, self.end_day - 1, self.since_ms - 24 * HOUR_MS, self.since_ms, True)
        first = self.first_day - days
        return Range("", first, self.first_day, day_start_ms(first, zone), self.since_ms)


def day_start_ms(day: int, zone: ZoneInfo) -> int:
    """When a local day begins."""
    start = datetime.combine(date.fromordinal(max(1, min(day, date.max.toordinal()))), datetime.min.time(), zone)
    return int(start.astimezone(UTC).timestamp()) * 1000


def as_local(ms: int, zone: ZoneInfo) -> datetime:
    """An instant on the guard's clock on the wall."""
    return datetime.fromtimestamp(ms / 1000, UTC).astimezone(zone)


def range_from(query: Mapping[str, str], guard: Guard, default: str = "30d") -> Range:
    """The span that a URL asks for; what makes no sense is the default."""
    zone = ZoneInfo(guard.settings.time_zone)
    now = guard.now_ms()
    today = as_local(now, zone).toordinal()
    name = query.get("range", "")
    first, end = today - 29, today + 1
    if name == "custom" or (not name and query.get("from")):
        with suppress(ValueError):
            start = date.fromisoformat(query.get("from", ""))
            last = date.fromisoformat(query.get("to") or date.fromordinal(today).isoformat())
            if start <= last and last - start < timedelta(days=_LONGEST) and 1900 < start.year < last.year + 1 < 3000:
                first, end = start.toordinal(), last.toordinal() + 1
                link = f"range=custom&from={start}&to={last}"
                return Range("custom", first, end, day_start_ms(first, zone), day_start_ms(end, zone), query=link)
        name = default
    if name not in RANGES:
        name = default
    link = f"range={name}"
    if name == "24h":
        since = (now // HOUR_MS - 23) * HOUR_MS
        return Range(name, as_local(since, zone).toordinal(), today + 1, since, since + 24 * HOUR_MS, True, link)
    if name == "period":
        bounds = guard.policies.default.policy.at(now).period
        if bounds is not None:
            first, end = bounds[0].toordinal(), bounds[1].toordinal()
        else:
            first = date.fromordinal(today).replace(day=1).toordinal()
        end = min(end, today + 1)
    else:
        first = today - int(name[:-1]) + 1
    return Range(name, first, end, day_start_ms(first, zone), day_start_ms(end, zone), query=link)
