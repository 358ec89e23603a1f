"""Numbers, money and times as people read them."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

from respan_guard.money import from_nano

__all__ = ["ago", "change", "compact", "count", "date_text", "exact_usd", "minutes", "moment", "percent", "usd"]

_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


def usd(amount: Decimal | int | None) -> str:
    """USD, rounded so that it has what matters: cents, or three digits of what is less. An int is nano-USD."""
    if amount is None:
        return "unpriced"
    value = from_nano(amount) if isinstance(amount, int) else amount
    sign, size = ("-" if value < 0 else ""), abs(value)
    if not size:
        return "$0.00"
    if size >= 1000:
        return f"{sign}${size:,.0f}" if size >= 100_000 else f"{sign}${size:,.2f}"
    if size >= Decimal("0.1"):
        return f"{sign}${size:.2f}"
    digits = min(9, 2 - size.adjusted())
    return f"{sign}${size:.{digits}f}"


def exact_usd(amount: Decimal | int | None) -> str:
    """USD to the last digit."""
    if amount is None:
        return "no price is known"
    return f"{from_nano(amount) if isinstance(amount, int) else amount:f} USD"


def count(number: int | Decimal) -> str:
    """A whole number."""
    return f"{number:,}"


def compact(number: int) -> str:
    """A whole number in three digits: 12.3K."""
    for size, unit in _UNITS:
        if abs(number) >= size:
            value = number / size
            return f"{value:.0f}{unit}" if abs(value) >= 100 else f"{value:.1f}{unit}"
    return str(number)


def percent(part: Decimal | int, whole: Decimal | int) -> int:
    """A part in percent, 0 to 100, rounded down: what is full shows as 100 and nothing else does."""
    if whole <= 0:
        return 100
    return max(0, min(100, int(100 * part / whole)))


def change(now: int, before: int) -> str:
    """How a number changed: "+12%"; "" where there is nothing to compare with."""
    if not before:
        return ""
    by = (now - before) * 100 / before
    return "+999%" if by > 999 else f"{by:+.0f}%" if abs(by) >= 0.5 else "±0%"


def moment(when: datetime | int, zone: ZoneInfo) -> str:
    """A time on the wall."""
    at = datetime.fromtimestamp(when / 1000, UTC) if isinstance(when, int) else when
    return f"{at.astimezone(zone):%Y-%m-%d %H:%M:%S}"


def minutes(when: datetime | int, zone: ZoneInfo) -> str:
    """A time on the wall, to the minute."""
    return moment(when, zone)[:-3]


def date_text(day: int | date) -> str:
    """A date."""
    return (date.fromordinal(day) if isinstance(day, int) else day).isoformat()


def ago(ms: int, now_ms: int) -> str:
    """How long ago, in one unit."""
    seconds = max(0, now_ms - ms) // 1000
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago" if seconds >= 10 else "just now"
