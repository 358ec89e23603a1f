"""Local dates and periods: they partition time in every zone, and are counted from the anchor."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from zoneinfo import ZoneInfo, available_timezones

import pytest
from dateutil.relativedelta import relativedelta
from hypothesis import example, given, settings
from hypothesis import strategies as st

from respan_guard.errors import InvalidInput
from respan_guard.periods import ALIGNED, DURATIONS, Duration, day_bounds, load_zone, local_day, period, start_of_day

HOUR = 3_600_000
DAY = 24 * HOUR
STEPS: dict[Duration, relativedelta] = {
    "yearly": relativedelta(years=1),
    "monthly": relativedelta(months=1),
    "weekly": relativedelta(weeks=1),
    "daily": relativedelta(days=1),
}


def instant(text: str, zone: str = "UTC") -> int:
    """Milliseconds of a local time."""
    return round(datetime.fromisoformat(text).replace(tzinfo=load_zone(zone)).timestamp() * 1000)


FROM, TO = instant("1970-01-01"), instant("2100-12-31")


@lru_cache(maxsize=1)
def zone_names() -> tuple[str, ...]:
    """Every zone this system knows."""
    return tuple(sorted(available_timezones()))


zones = st.deferred(lambda: st.sampled_from(zone_names()))
instants = st.integers(FROM, TO)
dates = st.dates(date(1970, 1, 1), date(2100, 12, 31))
lengths = st.one_of(st.sampled_from(DURATIONS), st.integers(1, 1000))

# What clocks did around midnight: (zone, date around which to look).
SKEWED = [
    ("Africa/Cairo", "2025-04-25"),  # no midnight, the day begins at 01:00
    ("America/Santiago", "2025-09-07"),
    ("Asia/Beirut", "2025-03-30"),
    ("America/Santiago", "2025-04-06"),  # midnight twice: 24:00 back to 23:00
    ("America/Havana", "2025-11-02"),  # 01:00 back to 00:00
    ("America/St_Johns", "2010-11-07"),  # 00:01 back to 23:01 of the day before
    ("America/Goose_Bay", "2008-11-02"),
    ("Atlantic/Azores", "2025-10-26"),
    ("America/Sao_Paulo", "2018-11-04"),
    ("America/Asuncion", "2024-03-24"),
    ("Pacific/Apia", "2011-12-30"),  # the date was skipped
    ("Pacific/Kwajalein", "1993-08-21"),
    ("Pacific/Kiritimati", "1995-01-01"),
    ("Australia/Lord_Howe", "2025-10-05"),  # half an hour
    ("Australia/Lord_Howe", "2025-04-06"),
    ("Europe/Berlin", "2025-03-30"),
    ("Europe/Dublin", "2025-10-26"),
    ("Antarctica/Troll", "2025-03-30"),  # two hours
    ("Antarctica/Casey", "2010-03-05"),
    ("Asia/Gaza", "2025-04-12"),
    ("Asia/Pyongyang", "2018-05-05"),
    ("Africa/Casablanca", "2025-02-23"),
    ("Africa/Monrovia", "1972-01-07"),  # 44 minutes 30 seconds
    ("America/Caracas", "2016-05-01"),
    ("America/Toronto", "1919-03-31"),  # 23:30 on to 00:30: the hour without a clock began the day before
]


@pytest.mark.parametrize(("name", "about"), SKEWED)
def test_local_day_is_the_latest_date_shown_so_far(name: str, about: str) -> None:
    """Each minute around a change of clocks is booked on the latest date any earlier minute showed."""
    zone = ZoneInfo(name)
    middle = instant(about)
    shown = 0
    for ms in range(middle - 3 * DAY, middle + 3 * DAY, 60_000):
        shown = max(shown, datetime.fromtimestamp(ms // 1000, zone).toordinal())
        assert local_day(ms, zone) == shown


@pytest.mark.parametrize(("name", "about"), SKEWED)
def test_bounds_of_a_day_are_its_first_and_last_instant(name: str, about: str) -> None:
    """The bounds hold exactly the instants of the date, to the millisecond, and each day begins where one ends."""
    zone = ZoneInfo(name)
    ms = instant(about) - 3 * DAY
    while ms < instant(about) + 3 * DAY:
        day, begin, end = day_bounds(ms, zone)
        assert begin <= ms < end
        assert [local_day(t, zone) == day for t in (begin - 1, begin, (begin + end) // 2, end - 1, end)] == [
            False,
            True,
            True,
            True,
            False,
        ]
        assert day_bounds(end, zone)[1] == end
        ms = end


@pytest.mark.parametrize(
    ("name", "day", "hours"),
    [
        ("UTC", "2025-03-30", 24),
        ("Europe/Berlin", "2025-03-30", 23),
        ("Europe/Berlin", "2025-10-26", 25),
        ("Africa/Cairo", "2025-04-25", 23),
        ("America/Santiago", "2025-09-07", 23),
        ("Asia/Beirut", "2025-03-30", 23),
        ("Pacific/Apia", "2011-12-30", 0),
        ("Pacific/Kwajalein", "1993-08-21", 0),
        ("Australia/Lord_Howe", "2025-10-05", 23.5),
        ("Australia/Lord_Howe", "2025-04-06", 24.5),
        ("Antarctica/Troll", "2025-03-30", 22),
        # Its 7 November began at 00:00, clocks went back at 00:01, so those 60 minutes are counted to it twice.
        ("America/St_Johns", "2010-11-07", 25),
    ],
)
def test_length_of_a_day(name: str, day: str, hours: float) -> None:
    """A date is as long as clocks made it: 0, 22, 23, 23.5, 24, 24.5 or 25 hours."""
    ordinal = date.fromisoformat(day).toordinal()
    zone = load_zone(name)
    assert start_of_day(ordinal + 1, zone) - start_of_day(ordinal, zone) == hours * HOUR


def test_a_day_without_midnight_begins_at_one() -> None:
    """Cairo, 25 April 2025: the first instant is 01:00 summer time, 22:00 UTC."""
    assert start_of_day(date(2025, 4, 25).toordinal(), ZoneInfo("Africa/Cairo")) == instant("2025-04-24T22:00")


@settings(max_examples=300, deadline=None)
@given(zones, instants)
@example("Pacific/Apia", instant("2011-12-30T10:00") - 1)
@example("America/St_Johns", instant("2010-11-07T02:31"))
def test_days_partition_time_in_every_zone(name: str, ms: int) -> None:
    """Any instant lies in its day, and the next day begins where it ends."""
    zone = ZoneInfo(name)
    day, begin, end = day_bounds(ms, zone)
    assert day == local_day(ms, zone)
    assert begin <= ms < end
    assert local_day(begin - 1, zone) < day < local_day(end, zone)
    assert day_bounds(end, zone)[1] == end


@settings(max_examples=300, deadline=None)
@given(zones, dates, lengths, instants)
@example("Pacific/Apia", date(2011, 12, 30), "daily", instant("2011-12-30T10:00") - 1)
@example("Pacific/Apia", date(2011, 12, 30), "yearly", instant("2011-12-30T10:00"))
@example("Africa/Cairo", date(2025, 4, 25), "weekly", instant("2025-04-24T22:00") - 1)
def test_periods_partition_time(name: str, anchor: date, length: Duration | int, ms: int) -> None:
    """In every zone, from every anchor: start(t) <= t < end(t), and the next period starts where one ends."""
    zone = ZoneInfo(name)

    def bounds(t: int) -> tuple[int, int]:
        first, end = period(anchor, length, local_day(t, zone))
        return start_of_day(first, zone), start_of_day(end, zone)

    begin, end = bounds(ms)
    assert begin <= ms < end
    assert bounds(end)[0] == end
    assert bounds(begin - 1)[1] == begin


def _changes(zone: ZoneInfo) -> list[tuple[int, timedelta, timedelta]]:
    """Changes of a zone's offset, found by looking every other week."""
    found = []
    fortnight = 14 * 86_400
    seconds = FROM // 1000
    offset = datetime.fromtimestamp(seconds, zone).utcoffset()
    for later in range(seconds + fortnight, TO // 1000, fortnight):
        now = datetime.fromtimestamp(later, zone).utcoffset()
        if now != offset:
            low, high = later - fortnight, later
            while high - low > 1:
                middle = (low + high) // 2
                if datetime.fromtimestamp(middle, zone).utcoffset() == offset:
                    low = middle
                else:
                    high = middle
            assert offset is not None
            assert now is not None
            found.append((high * 1000, offset, now))
            offset = now
    return found


def test_every_change_of_clocks_near_midnight() -> None:
    """No change of clocks in any zone from 1970 to 2100 makes a date come back or leaves a gap between days."""
    seen = set()
    near = 0
    for name in zone_names():
        zone = ZoneInfo(name)
        changes = _changes(zone)
        if (key := tuple(changes)) in seen:
            continue
        seen.add(key)
        for ms, before, after in changes:
            last = datetime.fromtimestamp(ms // 1000, UTC).replace(tzinfo=None) + before
            first = last - before + after
            if (last - timedelta(seconds=1)).date() == (first + timedelta(hours=2)).date() == first.date():
                continue  # in the middle of a day
            near += 1
            hour = abs(after - before) // timedelta(milliseconds=1)
            days = [local_day(t, zone) for t in (ms - hour, ms - 1, ms, ms + hour // 2, ms + hour - 1, ms + hour)]
            assert days == sorted(days), name
            _, begin, end = day_bounds(ms, zone)
            assert begin <= ms < end, name
            assert day_bounds(begin - 1, zone)[2] == begin, name
            assert day_bounds(end, zone)[1] == end, name
    assert near > 100


@pytest.mark.parametrize("anchor", [date(1970, 1, 29), date(1970, 1, 30), date(1970, 1, 31), date(2024, 2, 29)])
@pytest.mark.parametrize("duration", ["monthly", "yearly"])
def test_anchors_at_the_end_of_a_month(anchor: date, duration: Duration) -> None:
    """Over 400 years both ways, periods begin where dateutil says, always counted from the anchor."""
    step = STEPS[duration]
    count = 400 * (12 if duration == "monthly" else 1)
    starts = [(anchor + step * k).toordinal() for k in range(-count, count + 1)]
    for first, end in pairwise(starts):
        assert period(anchor, duration, first) == (first, end)
        assert period(anchor, duration, end - 1) == (first, end)


def test_the_31st_does_not_drift() -> None:
    """31 January monthly: 28 February, 31 March, 30 April, and 29 February in a leap year."""
    anchor = date(2023, 1, 31)
    found = [date(2023, 1, 31)]
    while len(found) < 15:
        end = period(anchor, "monthly", found[-1].toordinal())[1]
        found.append(date.fromordinal(end))
    assert [f"{day:%m-%d}" for day in found[1:5]] == ["02-28", "03-31", "04-30", "05-31"]
    assert [f"{day:%Y-%m-%d}" for day in found[13:]] == ["2024-02-29", "2024-03-31"]


@settings(max_examples=500, deadline=None)
@given(dates, st.sampled_from(DURATIONS), st.integers(-3000, 3000))
def test_every_period_begins_where_dateutil_says(anchor: date, duration: Duration, k: int) -> None:
    """Period k of any anchor begins at anchor + k steps, computed in one addition."""
    step = STEPS[duration]
    if duration == "yearly":
        k //= 6
    begin, end = anchor + step * k, anchor + step * (k + 1)
    assert period(anchor, duration, begin.toordinal()) == (begin.toordinal(), end.toordinal())


@settings(deadline=None)
@given(dates, st.integers(1, 400), dates)
def test_custom_lengths_roll_both_ways(anchor: date, days: int, day: date) -> None:
    """A length in days rolls over by itself, before the anchor as after it."""
    first, end = period(anchor, days, day.toordinal())
    assert first <= day.toordinal() < end
    assert end - first == days
    assert (first - anchor.toordinal()) % days == 0


def test_calendar_aligned_anchor() -> None:
    """From ALIGNED, years begin on 1 January, months on the 1st, weeks on Monday."""
    day = date(2026, 10, 15).toordinal()  # a Thursday
    firsts = {length: date.fromordinal(period(ALIGNED, length, day)[0]) for length in DURATIONS}
    assert firsts == {
        "yearly": date(2026, 1, 1),
        "monthly": date(2026, 10, 1),
        "weekly": date(2026, 10, 12),
        "daily": date(2026, 10, 15),
    }


@pytest.mark.parametrize(
    "name", ["", "Mars/Olympus", "America", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "x" * 5000]
)
def test_unknown_zones(name: str) -> None:
    """What is no IANA name is refused in a short message that shows a right one."""
    with pytest.raises(InvalidInput, match="Europe/Berlin") as caught:
        load_zone(name)
    assert caught.value.field == "time_zone"
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["localtime", "posixrules", "Localtime", "posix/localtime"])
def test_zones_of_the_machine(name: str) -> None:
    """A name that means whatever a machine is set to is refused: two would book one call on different days."""
    with pytest.raises(InvalidInput, match=r"Europe/Berlin.* another zone on each machine") as caught:
        load_zone(name)
    assert caught.value.field == "time_zone"


def test_utc_needs_no_data() -> None:
    """UTC is Python's own, so that it works where the system has no time zone data."""
    assert load_zone("UTC") is UTC
