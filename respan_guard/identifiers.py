"""What may name a customer, and the one form that is compared and stored."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from datetime import date
from typing import Final

from respan_guard.errors import InvalidIdentifier, InvalidInput

__all__ = [
    "MAX_IDENTIFIER_BYTES",
    "MAX_TEXT_BYTES",
    "check_identifier",
    "check_text",
    "check_texts",
    "normalise_identifier",
    "shown",
]

MAX_IDENTIFIER_BYTES: Final = 254
MAX_TEXT_BYTES: Final = 4096
"""Of what people write for others to read: why, and who."""

_UNPRINTABLE = {
    "Cc": "a control character",
    "Cf": "an invisible character",
    "Cs": "half of a surrogate pair",
    "Zl": "a line separator",
    "Zp": "a paragraph separator",
}
# Letters and marks by category, blank on every screen: two ids that look alike must not differ by one of them.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")


def normalise_identifier(value: object) -> str:
    """Turn what names a customer into the one form that is compared and stored.

    A string is brought to Unicode's NFC, and spaces around it are dropped; an int is taken as its digits. Case is kept.

    Raises:
        InvalidIdentifier: Not a string or int, empty, longer than 254 bytes of UTF-8, or with control,
            surrogate or invisible characters (zero-width, bidirectional marks, line separators) in it.
    """
    if isinstance(value, str) and value.isascii() and value.isprintable():
        text = value.strip(" ")
        if 0 < len(text) <= MAX_IDENTIFIER_BYTES:
            return text
    return check_identifier(value, "customer_identifier")


def check_identifier(value: object, field: str) -> str:
    """Apply the rules of `normalise_identifier` to another field that names somebody."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise InvalidIdentifier(f"{field} must be a string or an int, got {shown(value)}", field=field)
    if isinstance(value, int):
        if value.bit_length() > 8 * MAX_IDENTIFIER_BYTES:  # str() refuses huge ones
            raise _too_long(field)
        text = str(int(value))
    else:
        text = str.__str__(value)  # of an enum's member, the value
    if len(text) > 4 * MAX_IDENTIFIER_BYTES:  # far beyond what NFC and stripping can take away; bounds their work
        raise _too_long(field)
    for position, character in enumerate(text):
        what = _UNPRINTABLE.get(unicodedata.category(character))
        if what or character in _BLANK:
            raise InvalidIdentifier(
                f"{field} must not contain {what or 'an invisible character'}:"
                f" U+{ord(character):04X} at position {position}",
                field=field,
            )
    text = unicodedata.normalize("NFC", text).strip()
    if not text:
        raise InvalidIdentifier(f"{field} must not be empty", field=field)
    if len(text.encode()) > MAX_IDENTIFIER_BYTES:
        raise _too_long(field)
    return text


def _too_long(field: str) -> InvalidIdentifier:
    return InvalidIdentifier(f"{field} must be at most {MAX_IDENTIFIER_BYTES} bytes of UTF-8", field=field)


def check_text(value: object, field: str) -> str:
    """A text that every store keeps, else an error before anything is written or asked.

    Raises:
        InvalidInput: No string, longer than 4096 bytes of UTF-8, or with U+0000 or half of a surrogate pair in it.
    """
    if not isinstance(value, str):
        raise InvalidInput(f"{field} must be a string, got {shown(value)}", field=field)
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidInput(f"{field} must not hold half of a surrogate pair: {shown(value)}", field=field) from None
    if "\0" in value:
        raise InvalidInput(f"{field} must not hold U+0000: {shown(value)}", field=field)
    if size > MAX_TEXT_BYTES:
        raise InvalidInput(f"{field} must be at most {MAX_TEXT_BYTES} bytes of UTF-8, got {size}", field=field)
    return value


def check_texts(values: Mapping[str, object]) -> None:
    """Apply `check_text` to those of several values, by name, that are strings."""
    for field, value in values.items():
        if isinstance(value, str):
            check_text(value, field)


def shown(value: object) -> str:
    """A value for a message: what was typed if it's short, else its kind."""
    if value is None or isinstance(value, (bool, float, date)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() < 256 else "a huge integer"
    if isinstance(value, str):
        return repr(value) if len(value) <= 80 else repr(value[:80]) + "..."
    return f"a {type(value).__name__}"
