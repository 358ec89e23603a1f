"""Usage from event streams (`text/event-stream`), read while the bytes pass by.

The price of watching is paid per 32 KiB, not per chunk: `feed` only keeps the chunk, and a full batch is
searched for the few events that can matter (usage, the end). Only those are decoded as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from respan_guard.providers import anthropic, openai
from respan_guard.providers.base import mapping, text
from respan_guard.providers.replies import read_reply
from respan_guard.usage import Usage

__all__ = ["EVENT_CAP", "StreamReader", "data_of"]

BATCH = 32_768
EVENT_CAP = 8 * 1024 * 1024
"""Bytes of one event that are kept. The last event of OpenAI's responses carries the whole reply, so
it may be large; everything else is small, and nothing is kept between events."""

# A blank line: two line ends, of any of the three kinds. A CR before LF is no line end of its own.
_BLANK = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")
_LINE = re.compile(rb"\r\n|\n|\r")
# What an event that matters must contain. OpenAI sends `"usage":null` with each chunk, which isn't it.
_MATTERS = re.compile(
    rb'"usage(?:Metadata)?"\s*:\s*\{|\[DONE\]|message_stop|message_start|response\.(?:completed|incomplete|failed)'
    rb"|image_generation\.completed|transcript\.text\.done|finishReason"
)
_ENDS = frozenset({
    "response.completed", "response.incomplete", "response.failed", "message_stop", "image_generation.completed",
    "transcript.text.done",
})  # fmt: skip
# The text of deltas: OpenAI's "content", "arguments", "refusal", "reasoning"; "text" and "thinking" of the others.
# A match stays within its line.
_STRING = rb'[ \t]*:[ \t]*"((?:[^"\\\r\n]|\\.)*)"'
_TEXT = re.compile(
    rb'"(?:content|text|arguments|partial_json|thinking|reasoning|reasoning_content|refusal)"' + _STRING,
)
# OpenAI's responses repeat each part when it is finished, so only their deltas count, which are strings.
_DELTA = re.compile(rb'"delta"' + _STRING)


def data_of(event: bytes) -> bytes:
    """The data of one event: its `data` lines, joined by newlines."""
    lines = (line for line in _LINE.split(event) if line.startswith(b"data:"))
    return b"\n".join(line[6:] if line.startswith(b"data: ") else line[5:] for line in lines)


class StreamReader:
    """Watches a stream of server-sent events for usage.

    The result doesn't depend on how the bytes were cut into chunks.

    Attributes:
        broken: An event was larger than `EVENT_CAP`; it was left out, the rest is still read.
    """

    __slots__ = (
        "_batch",
        "_delta",
        "_event_id",
        "_event_model",
        "_finished",
        "_first",
        "_output",
        "_pending",
        "_searched",
        "_size",
        "_skipping",
        "_start",
        "_text",
        "_usage",
        "broken",
    )

    def __init__(self) -> None:
        self.broken = False
        self._batch: list[bytes] = []
        self._size = 0
        self._pending = bytearray()
        self._searched = 0
        self._skipping = False
        self._first = True
        self._usage: Usage | None = None
        self._start: Mapping[str, Any] | None = None
        self._delta: dict[str, Any] = {}
        self._finished = False
        self._output = 0
        self._text = _TEXT
        self._event_model: str | None = None
        self._event_id: str | None = None

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream, cut anywhere."""
        self._batch.append(data)
        self._size += len(data)
        if self._size >= BATCH:
            self._read()

    def close(self) -> None:
        """The stream is over; what came after the last blank line counts as an event."""
        self._read()
        if self._pending and not self._skipping:
            self._events(bytes(self._pending))
        self._pending.clear()
        self._searched = 0

    def usage(self) -> Usage | None:
        """The usage reported so far; None if there was none, or only a malformed one."""
        self._read()
        if self._start is not None:
            return read_reply(anthropic.merge(self._start, self._delta))
        return self._usage

    @property
    def finished(self) -> bool:
        """Whether the event that ends the stream was seen."""
        self._read()
        return self._finished

    @property
    def model(self) -> str | None:
        """The model that the stream names."""
        self._read()
        return self._event_model

    @property
    def response_id(self) -> str | None:
        """The reply's id that the stream names."""
        self._read()
        return self._event_id

    @property
    def output_bytes(self) -> int:
        """Bytes of generated text seen so far, as JSON spells it: a bound for its tokens when usage never came."""
        self._read()
        return self._output

    def _read(self) -> None:
        if not self._batch:
            return
        pending = self._pending
        for chunk in self._batch:
            pending += chunk
        self._batch.clear()
        self._size = 0
        end = self._boundary()
        if end:
            region = bytes(pending[:end])
            del pending[:end]
            if self._skipping:
                # The event that was too large ends with the first blank line.
                blank = _BLANK.search(region)
                region = region[blank.end() :] if blank else b""
                self._skipping = False
            self._events(region)
        if len(pending) > EVENT_CAP and not self._skipping:
            # Line ends of several kinds may hide a blank line from the quick search.
            blanks = [blank.end() for blank in _BLANK.finditer(pending)]
            if blanks:
                self._events(bytes(pending[: blanks[-1]]))
                del pending[: blanks[-1]]
        if len(pending) > EVENT_CAP or self._skipping:
            self.broken = self._skipping = True
            del pending[:-3]
        self._searched = max(0, len(pending) - 3)

    def _boundary(self) -> int:
        """Where the last complete event ends; 0 if none does. Never searches the same bytes twice."""
        pending, start = self._pending, self._searched
        at = pending.rfind(b"\n\n", start)
        if at >= 0:
            return at + 2
        at = pending.rfind(b"\r\n\r\n", start)
        if at >= 0:
            return at + 4
        if pending.find(b"\r", start) < 0:
            return 0
        end = 0
        for blank in _BLANK.finditer(pending, start):
            end = blank.end()
        return end

    def _events(self, region: bytes) -> None:
        """Read complete events."""
        if self._first and region:
            region = region.removeprefix(b"\xef\xbb\xbf")
        if self._first or len(region) > EVENT_CAP or _MATTERS.search(region):
            for event in _BLANK.split(region):
                if len(event) > EVENT_CAP:
                    self.broken = True
                elif event and (self._first or _MATTERS.search(event)):
                    self._event(data_of(event))
        for found in self._text.finditer(region):
            self._output += found.end(1) - found.start(1)

    def _event(self, data: bytes) -> None:
        if not data:
            return
        if self._first and b'"response.' in data:
            self._text = _DELTA
        self._first = False
        if data.strip() == b"[DONE]":
            self._finished = True
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(event, Mapping):
            return
        kind = event.get("type")
        if kind == "message_start":
            self._start = mapping(event.get("message"))
            self._delta.clear()
            self._name(self._start)
        elif kind == "message_delta":
            self._delta.update((k, v) for k, v in mapping(event.get("usage")).items() if v is not None)
        else:
            self._name(mapping(event.get("response")) if "response" in event else event)
            usage = openai.event_usage(event) or read_reply(event)
            if usage is not None:
                self._usage = usage
            candidates = event.get("candidates")
            if isinstance(candidates, list) and any("finishReason" in mapping(c) for c in candidates):
                self._finished = True
        if isinstance(kind, str) and kind in _ENDS:
            self._finished = True

    def _name(self, body: Mapping[str, Any]) -> None:
        self._event_model = text(body.get("model")) or text(body.get("modelVersion")) or self._event_model
        self._event_id = text(body.get("id")) or text(body.get("responseId")) or self._event_id
