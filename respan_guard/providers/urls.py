"""Paths as whoever stands behind us may read them."""

from __future__ import annotations

import re
from urllib.parse import unquote

__all__ = ["as_read", "is_odd", "plain_path"]

_ODD = re.compile(r"//|/\.|[%\\;?#\s\x00-\x1f\x7f]")
_ENDS = re.compile(r"[?#]")


def is_odd(path: str) -> bool:
    """Whether some router, proxy or provider may read this path as another one."""
    return _ODD.search(path) is not None


def plain_path(path: str) -> str:
    """The path as something behind us might read it.

    Decoded once more; without what then is a query or a fragment, parameters (`;a=b`), empty and dot segments, a slash
    at the end, and blanks and control characters around a segment: a route's regex ends in `$`, which also matches
    before a newline, and an app that forwards the rest of a path makes a URL of it, which is trimmed.
    """
    found: list[str] = []
    for segment in _ENDS.split(unquote(path), maxsplit=1)[0].replace("\\", "/").split("/"):
        segment = segment.partition(";")[0].strip().strip("\x00").strip()
        if segment == "..":
            if found:
                found.pop()
        elif segment not in ("", "."):
            found.append(segment)
    return "/" + "/".join(found)


def as_read(path: str) -> str:
    """The path by which requests are told from each other, without a slash at the end.

    Whoever wrote it may not be whoever routes it: what servers and proxies overlook makes no difference.
    """
    return (plain_path(path) if is_odd(path) else path).rstrip("/")
