"""Where the events of a stream (`text/event-stream`) begin and end."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["BLANK", "events", "last_events", "looks_like_events"]

# A blank line: two line ends, of any of the three kinds. A CR before LF is no line end of its own.
BLANK = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")
_LF = 0x0A
_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")
_FIELD = 6  # bytes that tell the first one


def looks_like_events(data: bytes) -> bool | None:
    """Whether a body that begins so is a stream of events, whatever its type says; None if more must be seen."""
    begin = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    return None if len(begin) < _FIELD else begin.startswith(_FIELDS)


def _blanks(data: bytes) -> Iterator[tuple[int, int]]:
    if b"\r" in data:
        yield from (blank.span() for blank in BLANK.finditer(data))
        return
    at = data.find(b"\n\n")  # many times faster than the pattern, which tells on large events
    while at >= 0:
        yield at, at + 2
        at = data.find(b"\n\n", at + 2)


def events(data: bytes) -> Iterator[tuple[bytes, int, bool]]:
    """The events, where each ends, and whether a blank line ends it: what follows the last one is incomplete."""
    at = 0
    for start, end in _blanks(data):
        if event := data[at:start].lstrip(b"\r\n"):
            yield event, start, True
        at = end
    if event := data[at:].lstrip(b"\r\n"):
        yield event, len(data), False


def last_events(data: bytes) -> Iterator[tuple[bytes, int, int, bool]]:
    """The events from the last to the first: where each starts and ends, and whether a blank line ends it."""
    end, complete = len(data), False
    for start, after in _blanks_backwards(data):
        if event := data[after:end].lstrip(b"\r\n"):
            yield event, after, end, complete
        end, complete = start, True
    if event := data[:end].lstrip(b"\r\n"):
        yield event, 0, end, complete


def _blanks_backwards(data: bytes) -> Iterator[tuple[int, int]]:
    if b"\r" in data:
        yield from reversed([blank.span() for blank in BLANK.finditer(data)])
        return
    at = data.rfind(b"\n\n")
    while at >= 0:
        after = at + 2
        while at and data[at - 1] == _LF:  # as they are found from the front: the first two of a run
            at -= 1
        yield at, after
        at = data.rfind(b"\n\n", 0, at)
