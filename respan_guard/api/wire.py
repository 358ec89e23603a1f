"""JSON in and out without a float: numbers with a point are `Decimal` on both sides, so that no cent is rounded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from respan_guard.errors import InvalidInput

__all__ = ["JSON", "Unreadable", "read_body", "to_json"]

_ALL_DIGITS = 40
# A body that says one of these twice means one thing to us and another to whoever reads it next.
_SINGLE = ("customer_identifier", "customer_params", "respan_params", "keywordsai_params", "cost", "logs")


class Unreadable(InvalidInput):
    """A body that was not even looked at.

    Args:
        message: Why.
        status: The HTTP status that says so.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class JSON(Response):
    """A JSON response."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Bytes of the value."""
        return to_json(content)


async def read_body(request: Request, limit: int) -> Any:
    """The JSON of a request's body; None if it has none.

    Raises:
        Unreadable: It is too large, compressed, or calls itself something else.
        InvalidInput: It is no JSON.
    """
    length = request.headers.get("content-length", "")
    if length.isdigit() and len(length) < 20 and int(length) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            parts.append(chunk)
    except ClientDisconnect:
        raise Unreadable("the client went away", 400) from None
    body = b"".join(parts)
    if not body.strip():
        return None
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise Unreadable("the body must not be compressed; send it plain", 415)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Unreadable("the body must be JSON: send it with content-type: application/json", 415)
    if (found := parse(body)) is None:
        raise InvalidInput("the body must be a JSON object, not null")
    return found


def parse(body: bytes | str) -> Any:
    """JSON with `Decimal`s.

    Raises:
        InvalidInput: It is none, nests so deep that nobody can have meant it, or says twice whose or what it is.
    """
    try:
        return json.loads(body, parse_float=Decimal, parse_constant=_no_number, object_pairs_hook=_object)
    except InvalidInput:
        raise
    except RecursionError:
        raise InvalidInput("the body nests too deep") from None
    except ValueError as error:  # no JSON, no UTF-8, an integer of thousands of digits
        raise InvalidInput(f"the body is no JSON: {str(error)[:200]}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        for name in _SINGLE:
            if names.count(name) > 1:
                raise InvalidInput(f"the body names {name} twice; say it once", field=name)
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _too_large(limit: int) -> Unreadable:
    return Unreadable(f"the body must be at most {limit:,} bytes", 413)


def to_json(value: Any) -> bytes:
    """The JSON of a value; a `Decimal` becomes a number with all its digits."""
    parts: list[str] = []
    _write(value, parts)
    return "".join(parts).encode()


def _write(value: Any, parts: list[str]) -> None:
    if isinstance(value, Decimal):
        parts.append(_number(value))
    elif isinstance(value, Mapping):
        mark = "{"
        for name, item in value.items():
            parts.append(f"{mark}{json.dumps(str(name))}:")
            _write(item, parts)
            mark = ","
        parts.append("}" if value else "{}")
    elif isinstance(value, (list, tuple)):
        mark = "["
        for item in value:
            parts.append(mark)
            _write(item, parts)
            mark = ","
        parts.append("]" if value else "[]")
    elif isinstance(value, (datetime, date)):
        parts.append(json.dumps(value.isoformat().replace("+00:00", "Z")))
    else:
        parts.append(json.dumps(value, allow_nan=False))


def _number(value: Decimal) -> str:
    if not value.is_finite():
        raise ValueError(f"{value} is no JSON number")
    exponent = value.as_tuple().exponent
    short = isinstance(exponent, int) and -_ALL_DIGITS < exponent <= 0
    return format(value, "f") if short else str(value)  # str() of a small or huge one has an exponent: JSON, too
