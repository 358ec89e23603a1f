"""Rates: what people type for `rate_limit`, in the language of `limits`, as amounts per window."""

from __future__ import annotations

from typing import Final

from limits import parse_many

from respan_guard.errors import InvalidInput

__all__ = ["MAX_AMOUNT", "MAX_WINDOW_SECONDS", "Rate", "canonical_rate", "parse_rates", "rate_unit"]

# Up to here, amount x window stays exact in the doubles that a Lua script computes with.
MAX_AMOUNT: Final = 3_000_000
MAX_WINDOW_SECONDS: Final = 31 * 86_400

Rate = tuple[int, int]
"""Requests, and the seconds within which they may be made."""

_UNITS = ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second"))
_MAX_TEXT = 200
_MAX_RATES = 8


def parse_rates(value: object) -> tuple[Rate, ...]:
    """Read a `rate_limit`, shortest window first. Of several for one window the smallest counts.

    Args:
        value: An int, or a string of digits, is requests per minute; else a string of `limits` like
            "100/minute; 2000/hour" (https://limits.readthedocs.io/en/stable/quickstart.html#rate-limit-string-notation).

    Raises:
        InvalidInput: It is neither, an amount is above 3,000,000, or a window longer than 31 days.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_AMOUNT:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return ((_amount(value), 60),)
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise _unreadable(value)
    text = value.strip()
    if text.isascii() and text.isdigit():
        return ((_amount(int(text)), 60),)
    try:
        items = parse_many(text)
    except ValueError:
        raise _unreadable(value) from None
    found: dict[int, int] = {}
    for item in items:
        window = item.get_expiry()
        if window > MAX_WINDOW_SECONDS:
            raise InvalidInput(
                f"a window of rate_limit must be at most 31 days, got {window // 86_400};"
                " for longer ones use a budget (period_budget with budget_duration, total_budget)",
                field="rate_limit",
            )
        found[window] = min(_amount(item.amount), found.get(window, MAX_AMOUNT))
    if len(found) > _MAX_RATES:
        raise InvalidInput(f"rate_limit must be at most {_MAX_RATES} rates, got {len(found)}", field="rate_limit")
    return tuple((found[window], window) for window in sorted(found))


def canonical_rate(value: object) -> int | str:
    """A `rate_limit` in the one form for its meaning: an int if it is per minute, else like "100/minute; 2000/hour".

    Raises:
        InvalidInput: As `parse_rates`.
    """
    rates = parse_rates(value)
    if len(rates) == 1 and rates[0][1] == 60:
        return rates[0][0]
    return "; ".join(f"{amount}/{rate_unit(seconds)}" for amount, seconds in rates)


def rate_unit(seconds: int) -> str:
    """A window in words: "minute", "30second", "2hour"."""
    size, unit = next((size, unit) for size, unit in _UNITS if seconds % size == 0)
    return unit if seconds == size else f"{seconds // size}{unit}"


def _amount(value: int) -> int:
    if not 0 <= value <= MAX_AMOUNT:
        shown = str(value) if value.bit_length() < 64 else "far more"
        raise InvalidInput(f"rate_limit must be from 0 to {MAX_AMOUNT:,} requests, got {shown}", field="rate_limit")
    return value


def _unreadable(value: object) -> InvalidInput:
    shown = repr(value) if isinstance(value, (str, int, float)) or value is None else f"a {type(value).__name__}"
    return InvalidInput(
        "rate_limit must be a whole number of requests per minute, or a string like '100/minute; 2000/hour',"
        f" got {shown[:80]}",
        field="rate_limit",
    )
