"""Types of fields in requests: what is taken, how it is cleaned, and what the OpenAPI document says of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BeforeValidator, Field, WithJsonSchema

from respan_guard.errors import InvalidInput
from respan_guard.identifiers import shown
from respan_guard.money import from_nano, to_nano
from respan_guard.usage import MAX_TOKENS

__all__ = [
    "Anything", "Count", "Day", "Environment", "Flag", "Identifier", "Instant", "Key", "Money", "Object", "Seconds",
    "Text", "clean", "clean_text", "date_part", "text_of",
]  # fmt: skip

MAX_TEXT: Final = 1_000
MAX_KEY: Final = 256
MAX_KEPT_BYTES: Final = 65_536
_DEEPEST = 16
_MAX_SECONDS = 10_000_000
_LOST_PLUS = re.compile(r" (\d\d:?\d\d)$")  # "+02:00" in a query that nobody encoded


def _text(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise InvalidInput(f"must be a string, got {shown(value)}")
    return clean_text(str(value))[:MAX_TEXT]


def _identifier(value: object, most: int = MAX_TEXT) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise InvalidInput(f"must be a string, got {shown(value)}")
    text = str(value)
    if len(text) > most:
        raise InvalidInput(f"must be at most {most:,} characters")
    return clean_text(text)


def _key(value: object) -> str | None:
    return _identifier(value, MAX_KEY)


def clean_text(text: str) -> str:
    """A text as every store takes it: JSON may hold lone surrogates, which have no encoding, and U+0000."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-8", "replace").decode().replace("\0", "")


def _number(value: object, most: int, *, text: bool = False) -> Decimal:
    if text and isinstance(value, str) and len(value) <= 40:
        try:
            value = Decimal(value)
        except ArithmeticError:
            raise InvalidInput(f"must be a number, got {shown(value)}") from None
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        raise InvalidInput(f"must be a number, got {shown(value)}")
    if isinstance(value, int) and value.bit_length() > 64:
        raise InvalidInput(f"must be from 0 to {most}")
    found = Decimal(value)
    if not found.is_finite() or found < 0 or found.adjusted() > 20 or found > most:
        raise InvalidInput(f"must be from 0 to {most}, got {str(found)[:40]}")
    return found


def _count(value: object) -> int | None:
    if value is None:
        return None
    found = _number(value, MAX_TOKENS)
    if found != found.to_integral_value():
        raise InvalidInput(f"must be a whole number, got {str(found)[:40]}")
    return int(found)


def _seconds(value: object) -> Decimal | None:
    return None if value is None else _number(value, _MAX_SECONDS)


def _money(value: object) -> Decimal | None:
    """USD, rounded to nano-USD; unlike elsewhere, no float ever comes in."""
    return None if value is None else from_nano(to_nano(_number(value, 9_000_000, text=True), "it"))


def _instant(value: object) -> datetime | None:
    if value is None:
        return None
    if isinstance(value, str) and len(value) <= 40:
        try:
            found = datetime.fromisoformat(_LOST_PLUS.sub(r"+\1", value))
        except ValueError:
            raise InvalidInput(f"must be a time like 2026-01-31T12:00:00Z, got {shown(value)}") from None
        found = found if found.tzinfo is not None else found.replace(tzinfo=UTC)
        if 1970 <= found.year <= 9000:
            return found.astimezone(UTC)
        raise InvalidInput(f"must be in the years 1970 to 9000, got {shown(value)}")
    raise InvalidInput(f"must be a time like 2026-01-31T12:00:00Z, got {shown(value)}")


def date_part(text: str) -> str:
    """The date that a time like 2026-01-31T12:00:00Z begins with; anything else as it came."""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return text
    return text[:10]


def _day(value: object) -> date | None:
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", text := date_part(value), re.ASCII):
        try:
            found = date.fromisoformat(text)
        except ValueError:
            raise InvalidInput(f"must be a date like 2026-01-31, got {shown(value)}") from None
        if 1970 <= found.year <= 9000:
            return found
    raise InvalidInput(f"must be a date like 2026-01-31, got {shown(value)}")


def _object(value: object) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidInput(f"must be a JSON object, got {shown(value)}")
    return dict(value)


def _flag(value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise InvalidInput(f"must be true or false, got {shown(value)}")


def _schema(*kinds: str, **more: Any) -> WithJsonSchema:
    return WithJsonSchema({"type": [*kinds, "null"], **more})


Text: TypeAlias = Annotated[str | None, BeforeValidator(_text), _schema("string", "integer")]
"""For people; cut after 1,000 characters."""
Identifier: TypeAlias = Annotated[
    str | None, BeforeValidator(_identifier), _schema("string", "integer", maxLength=MAX_TEXT)
]
"""Compared, so never cut: too long is an error."""
Key: TypeAlias = Annotated[str | None, BeforeValidator(_key), _schema("string", "integer", maxLength=MAX_KEY)]
"""What stores have an index of, whose rows have a size: shorter."""
Count: TypeAlias = Annotated[int | None, BeforeValidator(_count), _schema("integer", minimum=0, maximum=MAX_TOKENS)]
Seconds: TypeAlias = Annotated[
    Decimal | None, BeforeValidator(_seconds), _schema("number", minimum=0, maximum=_MAX_SECONDS)
]
Money: TypeAlias = Annotated[
    Decimal | None, BeforeValidator(_money), _schema("number", "string", minimum=0, maximum=9_000_000)
]
Instant: TypeAlias = Annotated[datetime | None, BeforeValidator(_instant), _schema("string", format="date-time")]
Day: TypeAlias = Annotated[date | None, BeforeValidator(_day), _schema("string", format="date")]
Object: TypeAlias = Annotated[dict[str, Any] | None, BeforeValidator(_object), _schema("object")]
Environment: TypeAlias = Literal["prod", "test"] | None
"""All here is "prod": a guard keeps test apart by its namespace."""
Flag: TypeAlias = Annotated[bool | None, BeforeValidator(_flag), _schema("boolean")]
Anything: TypeAlias = Annotated[Any, Field(default=None), WithJsonSchema({})]


def clean(value: Any, field: str | None = None, depth: int = 0) -> Any:
    """A JSON value as it is kept: text that can be encoded, numbers that JSON has, no abyss.

    Args:
        value: What came in.
        field: Where it came in, if an abyss is an error there; else what lies too deep becomes "...".
        depth: How deep it lies.

    Raises:
        InvalidInput: It nests too deep.
    """
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Decimal):
        number = float(value) if value.is_finite() else math.inf
        return number if math.isfinite(number) else str(value)
    if isinstance(value, (Mapping, list)) and depth >= _DEEPEST:
        if field is not None:
            raise InvalidInput(f"{field} must not nest deeper than {_DEEPEST}", field=field)
        return "..."
    if isinstance(value, Mapping):
        return {clean_text(str(name)): clean(item, field, depth + 1) for name, item in value.items()}
    if isinstance(value, list):
        return [clean(item, field, depth + 1) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 63:
        return str(value)
    return value


def text_of(value: Any) -> str:
    """A value of Respan's metadata, which holds nothing but strings."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Decimal):
        return str(value)
    return json.dumps(clean(value), ensure_ascii=False)
