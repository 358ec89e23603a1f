"""What options may be set to: each takes what was given, and says what is wrong with it.

They raise `ValueError`, which pydantic turns into the end of an error message; a `TypeError` would get through.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

from respan_guard.customer import Customer
from respan_guard.errors import InvalidInput
from respan_guard.money import to_nano
from respan_guard.periods import is_set_by_machine, load_zone

__all__ = [
    "BUDGET_FIELDS",
    "DEFAULT_LIMIT_FIELDS",
    "LEAST_RETENTION",
    "days",
    "default_limits",
    "hold",
    "money",
    "nearest",
    "number",
    "rate_storage",
    "shared_budgets",
    "storage",
    "zone",
]

BUDGET_FIELDS: Final = ("budget_duration", "period_budget", "total_budget", "period_start", "period_end")
"""The fields of a customer that budgets consist of: all that `app_budgets` and `model_budgets` may set."""
DEFAULT_LIMIT_FIELDS: Final = ("rate_limit", *BUDGET_FIELDS, "markup_percentage", "time_zone")
"""The fields of a customer that `default_limits` may set; the others say who one customer is."""
LEAST_RETENTION: Final = 40
"""Days that records are kept at least. A pruned day takes no more usage, so no call in flight, no customer's date and
no record that waits somewhere may still be on one; and a retry must be told from a new record."""


def nearest(name: str, known: list[str]) -> str:
    """Say which known name was probably meant, else which there are: the end of an error message."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def number(value: object) -> object:
    """A number. True is an int to Python, never to someone who writes settings."""
    if isinstance(value, bool):
        raise ValueError("got a boolean")
    return value


def money(value: object) -> object:
    """An amount of USD from 0."""
    to_nano(value, "the amount")  # type: ignore[arg-type]  # it is there to refuse what is no amount
    return Decimal(str(value))


def hold(value: object) -> object:
    """How much to hold."""
    if isinstance(value, str) and value in ("upper_bound", "none"):
        return value
    return money(value)


def days(value: object) -> object:
    """A number of days, also as "400 days"."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d{1,6})(?:\s*days?)?\s*", value)):
        return int(match[1])
    return number(value)


def storage(value: object) -> object:
    """A URL."""
    if not isinstance(value, str) or not re.match(r"\s*[a-z][a-z0-9+.-]*://", value) or "\0" in value:
        raise ValueError("that is no URL")
    return value.strip()  # a secret read from a file often ends with a newline


def rate_storage(value: object) -> object:
    """A URL; None stays None."""
    return None if value is None else storage(value)


def zone(value: object) -> object:
    """The name of a time zone."""
    if not isinstance(value, str):
        raise ValueError("there is no such zone")
    try:
        load_zone(value)
    except InvalidInput:
        why = "it is another zone on each machine" if is_set_by_machine(value) else "there is no such zone"
        raise ValueError(why) from None
    return value


def default_limits(value: object) -> dict[str, Any] | None:
    """Limits of a customer, as checked JSON values; None stays None."""
    return None if value is None else _params(value, DEFAULT_LIMIT_FIELDS, "limit")


def shared_budgets(value: object) -> dict[str, Any] | None:
    """Budgets that all customers share, as checked JSON values; None stays None."""
    if value is None:
        return None
    params = _params(value, BUDGET_FIELDS, "budget")
    if "period_budget" not in params and "total_budget" not in params:
        raise ValueError("there is neither a period_budget nor a total_budget in it")
    return params


def _params(value: object, fields: tuple[str, ...], what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError("that is no mapping; in the environment write it as JSON")
    for name in value:
        if name not in fields:
            raise ValueError(f"{name!r} is no {what}; {nearest(str(name), list(fields))}")
    return Customer.from_params("default", value).to_params()
