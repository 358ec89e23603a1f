"""Params and usage as the texts that stores keep, alike in all that keep texts."""

from __future__ import annotations

import json

from respan_guard.backends.base import Params
from respan_guard.usage import Usage

__all__ = ["params_from", "params_text", "search_text", "usage_text"]

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode


def usage_text(usage: Usage) -> str:
    """A usage as JSON, without what equals its defaults."""
    return _encode(usage.to_dict())


def params_text(params: Params | None) -> str | None:
    """A customer's params as JSON."""
    return None if params is None else _encode(dict(params))


def params_from(text: str | None) -> Params | None:
    """What `params_text` wrote."""
    return None if text is None else json.loads(text)


def search_text(customer: str, params: Params | None) -> str:
    """What a search looks at, in one case; a line break keeps a match from spanning two fields."""
    given = params or {}
    return "\n".join((customer, str(given.get("name") or ""), str(given.get("email") or ""))).casefold()
