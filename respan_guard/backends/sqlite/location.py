"""From a URL to a file and how to write it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from respan_guard.errors import ConfigurationError
from respan_guard.urls import mask_url, split_url, unknown_option

__all__ = ["Location", "locate"]

_SYNCHRONOUS = ("full", "normal")
_LOGIN = re.compile(r"/[^/:@]{2,}:[^@]*@")  # a drive of Windows has one letter
_FORM = "sqlite:///guard.db for a file in the working directory, sqlite:////var/lib/app/guard.db for an absolute path"


@dataclass(frozen=True, slots=True)
class Location:
    """Where the file is, and how it is written.

    Attributes:
        url: As it was given, fit to be shown.
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
    parts = split_url(url, _FORM)
    if parts.scheme != "sqlite" or parts.netloc or _LOGIN.match(parts.path):
        raise ConfigurationError(f"a SQLite store is {_FORM}, and has no login; got {mask_url(url)}")
    name = unquote(parts.path).removeprefix("/")
    if not name or name == ":memory:" or name.startswith("/:memory:"):
        raise ConfigurationError(f"a SQLite store needs a file; use memory:// to keep nothing, or {_FORM}")
    given = {**dict(parse_qsl(parts.query, keep_blank_values=True)), **options}
    unknown = sorted(set(given) - {"synchronous", "timeout"})
    if unknown:
        raise ConfigurationError(f"{unknown_option(unknown, url)} of a SQLite store; known: synchronous, timeout")
    synchronous = str(given.get("synchronous", "full")).lower()
    if synchronous not in _SYNCHRONOUS:
        raise ConfigurationError(f"synchronous must be full or normal, got {given['synchronous']!r}")
    try:
        timeout = float(given.get("timeout", 5.0))
    except (TypeError, ValueError):
        timeout = math.nan
    if not 0 < timeout <= 3600:
        raise ConfigurationError(f"timeout must be seconds above 0, at most 3600, got {given['timeout']!r}")
    return Location(mask_url(url), Path.cwd() / name, synchronous, timeout)
