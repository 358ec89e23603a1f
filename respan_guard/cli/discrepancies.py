"""What `verify` found, in the words of people: money in USD, days as dates, moments in ISO 8601.

Backends speak in nano-USD, in ordinals of days, in hours and milliseconds since 1970.
"""

from __future__ import annotations

import re
from datetime import date
from typing import Any, Final

from respan_guard.backends.base import AMOUNTS, HOUR_MS, Discrepancy
from respan_guard.decision import as_datetime
from respan_guard.money import from_nano

__all__ = ["as_row"]

_MONEY: Final = re.compile(r"(total |held )?cost|budget's sum|customers out of order")
_MOMENTS: Final = re.compile(r"hold long expired.*|log out of order")
_OF_A_DAY: Final = frozenset({*AMOUNTS, "customers"})
_DAY: Final = re.compile(r"(?<= )\d{6}(?=$|:)")  # "customer model DAY", "day DAY"; of Redis "customer DAY:model"
_HOUR: Final = re.compile(r"(?<= hour )\d{6}$")
_YEAR_10000: Final = 253_402_300_800_000


def as_row(found: Discrepancy) -> dict[str, Any]:
    """A discrepancy, fit for a table and for JSON."""
    where = found.where
    if found.what in _OF_A_DAY:
        if _HOUR.search(where):
            where = _HOUR.sub(lambda match: as_datetime(int(match[0]) * HOUR_MS).isoformat(), where)
        else:
            where = _DAY.sub(lambda match: date.fromordinal(int(match[0])).isoformat(), where)
    return {
        "what": found.what,
        "where": where,
        "stored": _value(found.what, found.stored),
        "recomputed": _value(found.what, found.recomputed),
    }


def _value(what: str, value: int | str) -> object:
    if not isinstance(value, int):
        return value
    if _MONEY.fullmatch(what):
        return f"{from_nano(value):f}"
    if _MOMENTS.fullmatch(what) and 0 < value < _YEAR_10000:
        return as_datetime(value).isoformat()
    return value
