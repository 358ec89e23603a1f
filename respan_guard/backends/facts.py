"""Facts: what a backend remembers for others under a name, in a space of its own; and what may be one."""

from __future__ import annotations

from enum import Enum
from typing import Final, Literal, TypeAlias

from respan_guard.errors import InvalidInput
from respan_guard.identifiers import shown

__all__ = ["ANY", "MAX_FACT_BYTES", "MAX_KEY_BYTES", "MAX_SPACE_BYTES", "Expected", "check_fact", "check_page"]

MAX_SPACE_BYTES: Final = 64
MAX_KEY_BYTES: Final = 512
MAX_FACT_BYTES: Final = 262_144


class _Any(Enum):
    ANY = "any"


ANY: Final = _Any.ANY
"""Whatever is there now, or nothing."""
Expected: TypeAlias = str | Literal[_Any.ANY] | None
"""What has to be there: this value, nothing (None), or `ANY`."""


def check_fact(space: str, key: str, value: str | None = None, expected: Expected = ANY) -> None:
    """Refuse what not every backend can keep.

    Raises:
        InvalidInput: Something is too long, holds U+0000 or half of a surrogate pair; or space or key is empty.
    """
    _check("space", space, MAX_SPACE_BYTES)
    _check("key", key, MAX_KEY_BYTES)
    if value is not None:
        _check("value", value, MAX_FACT_BYTES, empty=True)
    if isinstance(expected, str):
        _check("expected", expected, MAX_FACT_BYTES, empty=True)


def check_page(space: str, after: str) -> None:
    """Refuse a page that no backend can find.

    Raises:
        InvalidInput: As `check_fact`; `after` may be empty.
    """
    _check("space", space, MAX_SPACE_BYTES)
    _check("after", after, MAX_KEY_BYTES, empty=True)


def _check(what: str, text: str, most: int, *, empty: bool = False) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidInput(f"{what} must not hold half of a surrogate pair: {shown(text)}", field=what) from None
    if size > most:
        raise InvalidInput(f"{what} must be at most {most} bytes of UTF-8, got {size}", field=what)
    if not (size or empty):
        raise InvalidInput(f"{what} must not be empty", field=what)
    if "\0" in text:
        raise InvalidInput(f"{what} must not hold U+0000: {shown(text)}", field=what)
