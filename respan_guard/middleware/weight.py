"""What it would cost to parse a body, estimated at the speed of C before anybody parses it."""

from __future__ import annotations

__all__ = ["HEAVIEST", "outline", "weight"]

HEAVIEST = 150_000_000
"""Of what is parsed: nanoseconds, roughly, for which other requests wait. The parser lets go of no lock meanwhile."""

# Nanoseconds that an array or object, an element, and a name of an object's take, measured at their slowest.
_BRACKET, _COMMA, _COLON = 700, 350, 1_600
_MOST_STRINGS = 400_000
_MOST_ESCAPES = 2_000_000
_MOST_DIGITS = 100
_LONGEST_NAME = 64
_DIGITS = bytes.maketrans(b"123456789", b"000000000")


def weight(raw: bytes) -> int:
    """Roughly how many nanoseconds it takes to parse JSON: a bound for what no request of this world reaches.

    Text weighs nothing, whatever is written in it: brackets and commas count outside of strings only. A prompt of
    megabytes of code passes, as do pictures and 300,000 numbers; 250,000 empty arrays don't.
    """
    return outline(raw)[0]


def outline(raw: bytes) -> tuple[int, bytes]:
    """The weight, and the short strings in their quotes, without escapes: what may be names is among them."""
    if b"\0" in raw[:4]:
        return _structure(raw), raw  # UTF-16 or 32: nobody sends it, so its strings count, too
    escaped = raw.count(b'\\"')
    # A quote that looks escaped may close a string (`"\\"`), but none that opens one does.
    if raw.count(b'"') - escaped > _MOST_STRINGS or raw.count(b"\\") > _MOST_ESCAPES:
        return HEAVIEST + 1, b""
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if escaped else raw
    pieces = plain.split(b'"')
    names = b'""'.join([piece for piece in pieces[1::2] if len(piece) <= _LONGEST_NAME])
    return _structure(b"".join(pieces[::2])), b'"' + names + b'"'


def _structure(text: bytes) -> int:
    if b"0" * _MOST_DIGITS in text.translate(_DIGITS):
        return HEAVIEST + 1  # the time that a number takes grows with the square of its length
    brackets = text.count(b"[") + text.count(b"{")
    return _BRACKET * brackets + _COMMA * text.count(b",") + _COLON * text.count(b":")
