"""Usage from whole JSON bodies, and from bodies that travel compressed."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Protocol

from respan_guard.providers.base import decode_json, text
from respan_guard.providers.events import looks_like_events
from respan_guard.providers.replies import read_reply
from respan_guard.providers.stream import StreamReader
from respan_guard.providers.strings import without_media
from respan_guard.usage import Usage

__all__ = ["BODY_CAP", "Inflater", "JSONReader", "Reader", "reader_for"]

BODY_CAP = 8 * 1024 * 1024
"""Bytes of a JSON body that are kept, after decompression and without images."""
_BATCH = 1024 * 1024
_MARK = 2  # bytes that begin gzip's data, or zlib's
_DEFLATED = 8  # zlib's mark of the one way to compress that there is
_CODINGS = ("gzip", "x-gzip", "deflate")
_MOST_CODINGS = 3  # on top of each other
_LARGE = 262_144
_END = 4_096
_STEP = 65_536
_PIECE = 16_384  # what zlib has not consumed is copied at each step, so it gets little at a time
_RATIO = 200


class Reader(Protocol):
    """Watches a response body for usage; the body itself goes its own way."""

    @property
    def broken(self) -> bool:
        """Whether a part that may have held the usage was given up."""
        ...

    @property
    def first_token(self) -> float | None:
        """When the first text of a stream came, if the reader was given a clock."""
        ...

    def feed(self, data: bytes) -> None:
        """Take the next bytes, cut anywhere."""
        ...

    def close(self) -> None:
        """The body is complete, or there will be no more of it."""
        ...

    def usage(self) -> Usage | None:
        """The usage reported so far, if any."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the reply was seen to its end."""
        ...

    @property
    def model(self) -> str | None:
        """The model that the reply names."""
        ...

    @property
    def response_id(self) -> str | None:
        """The reply's id."""
        ...

    @property
    def output_bytes(self) -> int:
        """Bytes of generated text seen: a bound for its tokens when usage never came."""
        ...


class JSONReader:
    """Keeps a JSON body and reads it when it is complete.

    Images and audio are let go while they pass, each MiB, so a reply may have any number of them. Of a body that is
    still larger than `BODY_CAP` only the two ends are kept, which is enough for embeddings.

    Attributes:
        broken: The body is larger than that and no embeddings, or it is no JSON.
    """

    __slots__ = ("_body", "_head", "_new", "_parts", "_size", "_usage", "broken")

    broken: bool
    first_token = None

    def __init__(self) -> None:
        self.broken = False
        self._parts: list[bytes] = []
        self._head = b""
        self._size = self._new = 0
        self._body: Mapping[str, object] | None = None
        self._usage: Usage | None = None

    def feed(self, data: bytes) -> None:
        """Take the next bytes, cut anywhere."""
        self._size += len(data)
        self._new += len(data)
        self._parts.append(data)
        if self._new > _BATCH:
            self._compact()

    def _compact(self) -> bytes:
        """What is kept of the bytes so far."""
        whole = b"".join(self._parts)
        if len(whole) > _LARGE:
            whole = without_media(whole)
        if self._head or len(whole) > BODY_CAP:
            self._head = self._head or whole[:_END]
            whole = whole[-_END:]
        self._parts = [whole]
        self._new = 0
        return whole

    def close(self) -> None:
        """Read the body.

        Gemini streams without `alt=sse` as one array of chunks, the last of which has the final counts.
        """
        if self._body is not None or not self._parts:
            return
        whole = self._compact()
        self._parts.clear()
        if len(whole) > _LARGE or self._head:
            self._body = _embeddings(self._head or whole[:_END], whole[-_END:])
            if self._body is None and not self._head and b'"usage' not in whole:
                self._body = {}  # any large JSON; decoding it would stall the event loop, and for nothing
        if self._body is None and not self._head:
            body = decode_json(whole)
            for item in body if isinstance(body, list) else [body]:
                if isinstance(item, Mapping):
                    self._body = item
                    self._usage = read_reply(item) or self._usage
        elif self._body is not None:
            self._usage = read_reply(self._body)
        self.broken = self._body is None

    def usage(self) -> Usage | None:
        """The usage; None before `close`, and if there is none."""
        return self._usage

    @property
    def finished(self) -> bool:
        """Whether the body is complete JSON."""
        return self._body is not None

    @property
    def model(self) -> str | None:
        """The model that the reply names."""
        body = self._body or {}
        return text(body.get("model")) or text(body.get("modelVersion"))

    @property
    def response_id(self) -> str | None:
        """The reply's id."""
        body = self._body or {}
        return text(body.get("id")) or text(body.get("responseId"))

    @property
    def output_bytes(self) -> int:
        """Bytes of the body."""
        return self._size


_EMBEDDINGS = re.compile(
    rb'\s*\{[^\[]{0,2000}"data"\s*:\s*\[\s*\{[^\[{]{0,500}"(?:object"\s*:\s*"embedding"|embedding"\s*:)'
)
_MODEL = re.compile(rb'"model"\s*:\s*"([^"\\]{1,256})"')


def _embeddings(head: bytes, tail: bytes) -> Mapping[str, object] | None:
    """What matters of an embeddings reply, by its two ends; decoding megabytes of numbers would stall the event loop.

    There is no text of a user's in such a reply, so its last "usage" is its own.
    """
    if not _EMBEDDINGS.match(head) or b'"list"' not in head[:2_500] + tail[-2_500:]:
        return None
    _, found, rest = tail.rpartition(b'"usage"')
    model = _MODEL.search(tail) or _MODEL.search(head[:2_500])
    try:
        usage, _ = json.JSONDecoder().raw_decode(rest.decode().lstrip(" \t\r\n:"))
    except ValueError:
        return None
    if not found:
        return None
    name = model[1].decode("utf-8", "replace") if model else None
    return {"object": "list", "data": [{"object": "embedding"}], "model": name, "usage": usage}


class _Behind:
    """What readers in front of another reader share."""

    __slots__ = ("_reader", "broken")

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.broken = False

    def close(self) -> None:
        """The body is complete."""
        self._reader.close()
        self.broken |= self._reader.broken

    def usage(self) -> Usage | None:
        """The usage reported so far, if any."""
        return self._reader.usage()

    @property
    def first_token(self) -> float | None:
        """When the first text came."""
        return self._reader.first_token

    @property
    def finished(self) -> bool:
        """Whether the reply was seen to its end."""
        return self._reader.finished

    @property
    def model(self) -> str | None:
        """The model that the reply names."""
        return self._reader.model

    @property
    def response_id(self) -> str | None:
        """The reply's id."""
        return self._reader.response_id

    @property
    def output_bytes(self) -> int:
        """Bytes of generated text seen."""
        return self._reader.output_bytes


class Inflater(_Behind):
    """Decompresses gzip or deflate, raw too, in front of another reader.

    Args:
        reader: Reads what comes out.
        encoding: What the header says.

    A body that unfolds to more than `BODY_CAP` and more than 200 times its size is a bomb: the rest of it is not read.
    """

    __slots__ = ("_begin", "_in", "_inflate", "_may_be_raw", "_out")

    def __init__(self, reader: Reader, encoding: str) -> None:
        super().__init__(reader)
        self._begin: bytes | None = b""
        self._may_be_raw = encoding == "deflate"
        self._inflate = zlib.decompressobj(wbits=47)  # gzip or zlib, whatever the header says
        self._in = self._out = 0

    def feed(self, data: bytes) -> None:
        """Take the next compressed bytes, cut anywhere."""
        if self._begin is not None:
            data = self._begin = self._begin + data
            if len(data) < _MARK:
                return
            self._begin = None
            if self._may_be_raw and (data[0] & 15 != _DEFLATED or int.from_bytes(data[:_MARK], "big") % 31):
                self._inflate = zlib.decompressobj(wbits=-zlib.MAX_WBITS)  # servers that leave zlib's header out
        try:
            for at in range(0, len(data), _PIECE):
                self._inflate_piece(data[at : at + _PIECE])
        except zlib.error:
            self.broken = True

    def _inflate_piece(self, data: bytes) -> None:
        while data and not self.broken:
            plain = self._inflate.decompress(data, _STEP)
            rest = self._inflate.unconsumed_tail
            if self._inflate.eof and self._inflate.unused_data:
                rest = self._inflate.unused_data  # gzip members may follow each other
                self._inflate = zlib.decompressobj(wbits=47)
            self._in += len(data) - len(rest)
            self._out += len(plain)
            data = rest
            self._reader.feed(plain)
            self.broken = self._out > BODY_CAP and self._out > _RATIO * self._in


class Unlabelled(_Behind):
    """Reads a body as what it begins like, as the SDKs do, since its content type does not say events.

    Args:
        now: Seconds of a monotonic clock, to tell when a stream's first text came.
        labelled: Whether the type says JSON, so that what is no stream is JSON, however it is encoded.
    """

    __slots__ = ("_begin", "_now", "_passes")

    def __init__(self, now: Callable[[], float] | None, *, labelled: bool) -> None:
        super().__init__(JSONReader())
        self._now = now
        self._begin: bytes | None = b""  # None once it is known what this is
        self._passes = labelled

    def feed(self, data: bytes) -> None:
        """Take the next bytes, cut anywhere."""
        if self._begin is not None:
            data = self._begin = (self._begin + data).lstrip()
            streams = looks_like_events(data)
            if streams is None:
                return
            self._begin = None
            if streams:
                self._reader = StreamReader(self._now)
            self._passes = self._passes or streams or data.startswith((b"{", b"["))
        if self._passes:
            self._reader.feed(data)


def reader_for(
    content_type: str, content_encoding: str | None = None, now: Callable[[], float] | None = None
) -> Reader | None:
    """The reader for a response.

    Args:
        content_type: Of the body.
        content_encoding: Of the body.
        now: Seconds of a monotonic clock, to tell when a stream's first text came.

    Returns:
        None for sound and pictures, and for encodings that the standard library can't undo (br, zstd).
    """
    kind = content_type.partition(";")[0].strip().lower()
    reader: Reader
    if kind == "text/event-stream":
        reader = StreamReader(now)
    elif kind.startswith(("audio/", "image/", "video/")):
        return None
    else:
        labelled = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
        reader = Unlabelled(now, labelled=labelled)
    codings = [name for part in (content_encoding or "").lower().split(",") if (name := part.strip())]
    codings = [name for name in codings if name != "identity"]
    if len(codings) > _MOST_CODINGS or not set(codings).issubset(_CODINGS):
        return None
    for coding in codings:
        reader = Inflater(reader, coding)
    return reader
