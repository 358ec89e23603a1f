"""From a URL to a file and how to write it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from respan_guard.errors import ConfigurationError

__all__ = ["Location", "locate"]

_SYNCHRONOUS = ("full", "normal")
_FORM = "sqlite:///guard.db for a file in the working directory, sqlite:////var/lib/app/guard.db for an absolute path"


@dataclass(frozen=True, slots=True)
class Location:
    """Where the file is, and how it is written.

    Attributes:
        url: As it was given.
        path: Absolute, so that a later change of the working directory changes nothing.
        synchronous: "full" (acknowledged means on disk) or "normal" (a power cut may take the last moments).
        timeout: Seconds to wait for a file that another process keeps locked.
    """

    url: str
    path: Path
    synchronous: str
    timeout: float


def locate(url: str, options: dict[str, Any]) -> Location:
    """Read a URL `sqlite:///PATH?synchronous=normal&timeout=5`; keywords go before the query.

    Raises:
        ConfigurationError: It names no file, or has an option that isn't known.
    """
    parts = urlsplit(url)
    if parts.scheme != "sqlite" or parts.netloc or parts.fragment:
        raise ConfigurationError(f"a SQLite store is {_FORM}; got {url!r}")
    name = unquote(parts.path).removeprefix("/")
    if not name or name == ":memory:" or name.startswith("/:memory:"):
        raise ConfigurationError(f"a SQLite store needs a file; use memory:// to keep nothing, or {_FORM}")
    given = {**dict(parse_qsl(parts.query, keep_blank_values=True)), **options}
    unknown = sorted(set(given) - {"synchronous", "timeout"})
    if unknown:
        raise ConfigurationError(f"unknown option {unknown[0]!r} of a SQLite store; known: synchronous, timeout")
    synchronous = str(given.get("synchronous", "full")).lower()
    if synchronous not in _SYNCHRONOUS:
        raise ConfigurationError(f"synchronous must be full or normal, got {given['synchronous']!r}")
    try:
        timeout = float(given.get("timeout", 5.0))
    except (TypeError, ValueError):
        timeout = math.nan
    if not 0 < timeout <= 3600:
        raise ConfigurationError(f"timeout must be seconds above 0, at most 3600, got {given['timeout']!r}")
    return Location(url, Path.cwd() / name, synchronous, timeout)
