"""Local dates and periods: the only place where a time zone is asked.

Amounts are booked on a local date, a period is a run of dates counted from an anchor. So all that a
zone is needed for is to turn an instant into a date (`local_day`) and to say when a date begins
(`start_of_day`). Instants are milliseconds UTC, days are ordinals (`datetime.date.toordinal`),
intervals are half-open.

A date that has begun is not left again: where clocks are set back over midnight (St. John's until 2011:
00:01 to 23:01), the repeated minutes count to the new date. So dates, hence periods, partition time in
every zone, days of 0, 23, 24.5 or 25 hours included, and a budget that was renewed stays so.
"""

from __future__ import annotations

import calendar
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Final, Literal, TypeAlias
from zoneinfo import ZoneInfo

from respan_guard.errors import InvalidInput

__all__ = [
    "ALIGNED", "DURATIONS", "Duration", "day_bounds", "is_set_by_machine", "load_zone", "local_day", "period",
    "start_of_day",
]  # fmt: skip

Duration: TypeAlias = Literal["yearly", "monthly", "weekly", "daily"]
DURATIONS: Final[tuple[Duration, ...]] = ("yearly", "monthly", "weekly", "daily")

ALIGNED: Final = date(2001, 1, 1)
"""A Monday, the first of a month and of a year: periods counted from it are those of the calendar."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY = _EPOCH.toordinal()
_DAY_MS = 86_400_000
_MS, _NOTHING = timedelta(milliseconds=1), timedelta(0)
_MONTHS = {"monthly": 1, "yearly": 12}
_DAYS = {"daily": 1, "weekly": 7}


def is_set_by_machine(zone: str) -> bool:
    """Whether the name of a zone means whatever the machine is set to, so that two would book on different days."""
    return zone.rpartition("/")[2].lower() in ("localtime", "posixrules")


@lru_cache(maxsize=1024)
def load_zone(name: str) -> tzinfo:
    """The time zone of an IANA name like "Europe/Berlin".

    Raises:
        InvalidInput: There is no such zone, it is another one on each machine, or the system has no time zone data.
    """
    if name == "UTC":  # needs no data, which small container images lack
        return UTC
    if is_set_by_machine(name):
        raise InvalidInput(
            f"time_zone must be an IANA name like 'Europe/Berlin' or 'UTC', got {name[:80]!r}, which is another zone on"
            " each machine",
            field="time_zone",
        )
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError):
        raise InvalidInput(
            f"time_zone must be an IANA name like 'Europe/Berlin' or 'UTC', got {name[:80]!r}"
            " (where the system has no time zone data, install tzdata)",
            field="time_zone",
        ) from None


def local_day(ms: int, zone: tzinfo) -> int:
    """The date on which an instant is booked: the latest that clocks of the zone have shown by then."""
    local = (_EPOCH + timedelta(milliseconds=ms)).astimezone(zone)
    if not local.fold:
        return local.toordinal()
    # Clocks were set back a while ago and repeat what they showed. The last instant before that showed the
    # latest time, so its date holds until clocks are past it. The change is in (low, high].
    back = (local.replace(fold=0).utcoffset() or _NOTHING) - (local.utcoffset() or _NOTHING)
    low, high = ms - back // _MS, ms
    while high - low > 1:
        middle = (low + high) // 2
        if (_EPOCH + timedelta(milliseconds=middle)).astimezone(zone).fold:
            high = middle
        else:
            low = middle
    return (_EPOCH + timedelta(milliseconds=low)).astimezone(zone).toordinal()


def start_of_day(day: int, zone: tzinfo) -> int:
    """The instant at which a date begins: the first that `local_day` puts on it or on a later one.

    A date that a zone skipped begins and ends at once.
    """
    midnight = datetime.fromordinal(day).replace(tzinfo=zone)
    guess = (midnight - _EPOCH) // _MS
    if local_day(guess, zone) >= day > local_day(guess - 1, zone):
        return guess
    # Midnight does not exist, exists twice, or the whole date was skipped. Offsets are less than a day.
    high = (day - _EPOCH_DAY + 1) * _DAY_MS
    low = high - 2 * _DAY_MS
    while high - low > 1:
        middle = (low + high) // 2
        if local_day(middle, zone) >= day:
            high = middle
        else:
            low = middle
    return high


def day_bounds(ms: int, zone: tzinfo) -> tuple[int, int, int]:
    """The date of an instant with the first instant of it and the first one after it."""
    day = local_day(ms, zone)
    # A skipped date has no instant, so the day after a real one may begin two dates later.
    return day, start_of_day(day, zone), start_of_day(day + 1, zone)


def period(anchor: date, length: Duration | int, day: int) -> tuple[int, int]:
    """The period that a day is in, as its first day and the first day after it.

    Period k begins k lengths from the anchor, forwards or backwards, and always counted from the anchor: from
    31 January, months begin on 28 or 29 February, 31 March, 30 April.

    Args:
        anchor: First day of period 0.
        length: "yearly", "monthly", "weekly", "daily", or a number of days.
        day: Any day of the period that is asked for.
    """
    months = _MONTHS.get(length) if isinstance(length, str) else None
    if months is None:
        days = _DAYS[length] if isinstance(length, str) else length
        start = anchor.toordinal()
        first = start + (day - start) // days * days
        return first, first + days
    asked = date.fromordinal(day)
    k = ((asked.year - anchor.year) * 12 + asked.month - anchor.month) // months
    # The estimate is right or one too late: the period may begin later in its month than the day is.
    if _add_months(anchor, k * months) > day:
        k -= 1
    return _add_months(anchor, k * months), _add_months(anchor, (k + 1) * months)


def _add_months(anchor: date, months: int) -> int:
    year, month = divmod(anchor.year * 12 + anchor.month - 1 + months, 12)
    return date(year, month + 1, min(anchor.day, calendar.monthrange(year, month + 1)[1])).toordinal()
