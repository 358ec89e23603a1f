"""Hiding the usage that a stream's caller did not ask for."""

from __future__ import annotations

import re

from respan_guard.providers import decode_json, looks_like_events

__all__ = ["UsageFilter"]

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_MAYBE = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_MOST = 65_536
_MOST_BEFORE = 4_096  # blanks before what tells whether a body is a stream


class UsageFilter:
    """Takes the last chunk, which holds usage and no choices, out of a stream of chat completions.

    A body that is none passes as it is. An event that is not complete yet is kept back until it is, which no reader of
    events can tell; nothing else is.

    Args:
        content_type: Of the body; where it does not say events, the body's beginning tells, as the SDKs don't look.
    """

    __slots__ = ("_begin", "_part", "_streams")

    def __init__(self, content_type: str) -> None:
        self._part = b""
        self._streams = content_type.partition(";")[0].strip().lower() == "text/event-stream"
        self._begin: bytes | None = None if self._streams else b""  # None once it is known what this is

    def passed(self, data: bytes) -> bytes:
        """Take the next bytes; what of them and of those before goes on."""
        if self._begin is not None:
            data = self._begin + data
            streams = looks_like_events(data)
            if streams is None and len(data) < _MOST_BEFORE:
                self._begin = data
                return b""
            self._begin, self._streams = None, bool(streams)
        if not self._streams:
            return data
        if not self._part and data.endswith(b"\n\n") and _MAYBE.search(data) is None:
            return data  # whole events, none of them to be hidden: the usual case
        return self._edited(data)

    def _edited(self, data: bytes) -> bytes:
        data = self._part + data
        kept: list[bytes] = []
        at = 0
        for end in _END.finditer(data):
            event = data[at : end.end()]
            at = end.end()
            if not _is_extra(event):
                kept.append(event)
        self._part = data[at:]
        if len(self._part) > _MOST:  # no chunk of usage is that long
            kept.append(self._part)
            self._part = b""
        return b"".join(kept)

    def rest(self) -> bytes:
        """What is left when the stream is over."""
        rest, self._part, self._begin = (self._begin or b"") + self._part, b"", None
        return b"" if _is_extra(rest) else rest


def _is_extra(event: bytes) -> bool:
    """Whether an event came because it was asked for; what tells its cost comes unasked (OpenRouter)."""
    if _MAYBE.search(event) is None:
        return False
    lines = event.splitlines()
    data = b"\n".join(line[5:] for line in lines if line.startswith(b"data:"))
    body = decode_json(data)
    usage = body.get("usage") if isinstance(body, dict) and body.get("choices") == [] else None
    return isinstance(usage, dict) and "cost" not in usage
