"""Hiding the usage that a stream's caller did not ask for."""

from __future__ import annotations

import re
import zlib

from respan_guard.providers import decode_json

__all__ = ["UsageFilter"]

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_MAYBE = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_MOST = 65_536
_ENCODINGS = ("", "gzip", "x-gzip")  # asked for none, some servers compress all the same


class UsageFilter:
    """Takes the last chunk, which holds usage and no choices, out of a stream of chat completions.

    An event that is not complete yet is kept back until it is, which no reader of events can tell; nothing else is.

    Args:
        encoding: Of what is passed in; what comes out has none.
    """

    __slots__ = ("_inflate", "_part")

    def __init__(self, encoding: str = "") -> None:
        self._part = b""
        self._inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16) if encoding else None

    @staticmethod
    def fits(content_type: str, encoding: str) -> bool:
        """Whether a response is a stream that can be edited."""
        return content_type.partition(";")[0].strip().lower() == "text/event-stream" and encoding in _ENCODINGS

    def passed(self, data: bytes) -> bytes:
        """Take the next bytes; what of them and of those before goes on."""
        if self._inflate is not None:
            data = self._inflate.decompress(data)
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
        rest, self._part = self._part, b""
        if self._inflate is not None:
            rest += self._inflate.flush()
        return b"" if _is_extra(rest) else rest


def _is_extra(event: bytes) -> bool:
    if _MAYBE.search(event) is None:
        return False
    lines = event.splitlines()
    data = b"\n".join(line[5:] for line in lines if line.startswith(b"data:"))
    body = decode_json(data)
    return isinstance(body, dict) and body.get("choices") == [] and isinstance(body.get("usage"), dict)
