"""Usage from event streams (`text/event-stream`), read while the bytes pass by.

Providers report usage in the first event or in the last ones, so only a stream's two ends are kept, and they
are looked at when somebody asks. A chunk costs an append; every 32 KiB the middle is let go, unread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from respan_guard.providers import anthropic, openai
from respan_guard.providers.base import decode_json, mapping, text
from respan_guard.providers.events import BLANK, events, last_events
from respan_guard.providers.replies import read_reply
from respan_guard.providers.strings import without_media
from respan_guard.usage import Usage

__all__ = ["EVENT_CAP", "StreamReader"]

BATCH = 32_768
HEAD = 32_768
WINDOW = 32_768
"""An event is looked at if it ends within the last so many bytes. What follows usage is an end marker, no more."""
EVENT_CAP = 8 * 1024 * 1024
"""Bytes of one event that are kept, without images. The last event of OpenAI's responses carries the whole reply."""

_LINE = re.compile(rb"\r\n|\n|\r")
# What an event that matters must contain. OpenAI sends `"usage":null` with each chunk, which isn't it.
_MATTERS = re.compile(
    rb'"usage(?:Metadata)?"\s*:\s*\{|\[DONE\]|message_stop|message_start|response\.(?:completed|incomplete|failed)'
    rb'|image_(?:generation|edit)\.completed|transcript\.text\.done|finishReason|"finish_reason"\s*:\s*"'
)
_SEVERAL = re.compile(rb'"index"\s*:\s*[1-9]')  # choices; also tool calls, which then wait for the end, too
_ENDS = frozenset({
    "response.completed", "response.incomplete", "response.failed", "message_stop", "image_generation.completed",
    "image_edit.completed", "transcript.text.done",
})  # fmt: skip
# The text of deltas: OpenAI's "content", "arguments", "refusal", "reasoning"; "text" and "thinking" of the others.
_STRING = rb'[ \t]*:[ \t]*"((?:[^"\\\r\n]|\\.)*)"'
_TEXT = re.compile(
    rb'"(?:content|text|arguments|partial_json|thinking|reasoning|reasoning_content|refusal)"' + _STRING,
)
# OpenAI's responses repeat each part when it is finished, so only their deltas count, which are strings.
_DELTA = re.compile(rb'"delta"' + _STRING)


_FIRST = re.compile(
    rb'"(?:content|text|arguments|partial_json|thinking|reasoning|reasoning_content|refusal|delta)"[ \t]*:[ \t]*"[^"]'
)
_RECENT = 32  # bytes that are enough for what _FIRST finds, but for its last


@dataclass(slots=True)
class _Findings:
    """What the two ends of a stream tell."""

    usage: Usage | None = None
    model: str | None = None
    response_id: str | None = None
    finished: bool = False
    stopped: bool = False  # a choice is complete
    broken: bool = False
    start: Mapping[str, Any] | None = None
    delta: dict[str, Any] = field(default_factory=dict)

    def name(self, body: Mapping[str, Any]) -> None:
        self.model = self.model or text(body.get("model")) or text(body.get("modelVersion"))
        self.response_id = self.response_id or text(body.get("id")) or text(body.get("responseId"))


class StreamReader:
    """Watches a stream of server-sent events for usage.

    What it tells depends on the bytes so far, not on how they were cut into chunks.

    Args:
        now: Seconds of a monotonic clock, to tell when the first text came.

    Attributes:
        first_token: When that was; None if it did not yet, or there is no clock.
    """

    # fmt: off
    __slots__ = (
        "_batch", "_closed", "_findings", "_head", "_low", "_most", "_now", "_recent", "_seen", "_size", "_skipping",
        "_tail", "_total", "first_token",
    )
    # fmt: on

    def __init__(self, now: Callable[[], float] | None = None) -> None:
        self.first_token: float | None = None
        self._now = now
        self._most = BATCH if now is None else 0  # bytes of a batch; none while the first text is looked for
        self._recent = b""
        self._batch: list[bytes] = []
        self._size = 0
        self._total = 0
        self._head = b""
        self._tail = bytearray()  # starts with an event, or within one that is too large
        self._low = 0  # no event ends before this place of the tail
        self._skipping = False
        self._closed = False
        self._seen = -1
        self._findings = _Findings()

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream, cut anywhere."""
        self._batch.append(data)
        self._size += len(data)
        if self._size >= self._most:
            if self._now is not None and self.first_token is None:
                self._look_for_text(data)
            if self._size >= BATCH:
                self._compact()

    def _look_for_text(self, data: bytes) -> None:
        data = self._recent + data
        if _FIRST.search(data) is None:
            self._recent = data[-_RECENT:]
        elif self._now is not None:
            self.first_token, self._most, self._recent = self._now(), BATCH, b""

    def close(self) -> None:
        """The stream is over; what came after the last blank line counts as an event."""
        self._closed = True
        self._seen = -1

    def usage(self) -> Usage | None:
        """The usage reported so far; None if there was none, or only a malformed one."""
        return self._look().usage

    @property
    def finished(self) -> bool:
        """Whether the event that ends the stream was seen, or the end of its only choice."""
        return self._look().finished

    @property
    def model(self) -> str | None:
        """The model that the stream names."""
        return self._look().model

    @property
    def response_id(self) -> str | None:
        """The reply's id that the stream names."""
        return self._look().response_id

    @property
    def broken(self) -> bool:
        """Whether an event near the end was larger than `EVENT_CAP` and left out; it may have held the usage."""
        return self._look().broken

    @property
    def output_bytes(self) -> int:
        """Bytes of generated text so far, as JSON spells it, to estimate tokens by when usage never came.

        Counted in the first 32 KiB; what follows is taken to hold as much text a byte as they do.
        """
        self._compact()
        head = self._head
        pattern = _DELTA if any(b'"response.' in event for event in self._first()) else _TEXT
        found = sum(len(string) for string in pattern.findall(head))
        return found if self._total <= len(head) else -(-found * self._total // len(head))

    def _compact(self) -> None:
        """Move the batch to the tail, and drop the events that ended long ago."""
        if not self._batch:
            return
        data = b"".join(self._batch)
        self._batch.clear()
        self._size = 0
        if len(self._head) < HEAD:
            self._head += data[: HEAD - len(self._head)]
        self._total += len(data)
        tail = self._tail
        tail += data
        until = len(tail) - WINDOW
        if until <= 0:
            return
        end = self._boundary(until)
        if end:
            del tail[:end]
            self._low, self._skipping = 0, False
            return
        if until > EVENT_CAP and not self._skipping:
            small = without_media(tail)
            if len(small) <= EVENT_CAP // 2:  # else it would soon be as large again
                tail[:] = small
                until = max(0, len(tail) - WINDOW)
        if self._skipping or until > EVENT_CAP:
            del tail[: max(0, until - 3)]  # not through a blank line, which has four bytes at most
            self._low, self._skipping = 0, True
        else:
            self._low = until

    def _boundary(self, until: int) -> int:
        """Where an event ends at or before that place, the later the better; 0 if none does."""
        tail, low = self._tail, max(0, self._low - 3)
        at = tail.rfind(b"\n\n", low, until)
        if at >= 0:
            return at + 2
        at = tail.rfind(b"\r\n\r\n", low, until)
        if at >= 0:
            return at + 4
        if tail.find(b"\r", low, until) < 0:
            return 0
        # One byte more, since a CR there may be half of a CR LF.
        ends = [blank.end() for blank in BLANK.finditer(tail, low, until + 1)]
        return max((end for end in ends if end <= until), default=0)

    def _first(self) -> list[bytes]:
        """The first two events with data, of those that end within the head."""
        whole = self._closed and self._total <= len(self._head)
        found = []
        for event, _, complete in events(self._head.removeprefix(b"\xef\xbb\xbf")):
            if b"data" in event and (complete or whole):
                found.append(event)
                if len(found) == 2:
                    break
        return found

    def _look(self) -> _Findings:
        self._compact()
        if self._seen == self._total:
            return self._findings
        found = _Findings()
        tail = bytes(self._tail)
        since = len(tail) - WINDOW
        if self._total == len(tail):
            tail = tail.removeprefix(b"\xef\xbb\xbf")
        large = self._skipping or len(tail) > EVENT_CAP
        for event, start, end, complete in last_events(tail):
            if end <= since or (found.usage is not None and not large):
                break
            if len(event) > EVENT_CAP:
                event = without_media(event)
            if len(event) > EVENT_CAP or (self._skipping and start == 0):
                found.broken = True
            elif found.usage is None and _may_matter(event) and (complete or self._closed):
                _read_last(found, event)
        if found.usage is None or found.model is None or found.response_id is None:
            for event in self._first():
                _read_first(found, event)
        if found.stopped and not found.finished:
            found.finished = not (_SEVERAL.search(self._head) or _SEVERAL.search(tail))
        if found.start is not None:
            found.usage = read_reply(anthropic.merge(found.start, found.delta))
        self._seen, self._findings = self._total, found
        return found


def _may_matter(event: bytes) -> bool:
    """Whether an event is worth decoding; a large one is decoded faster than it is searched."""
    return len(event) > WINDOW or _MATTERS.search(event) is not None


def _json(event: bytes) -> Mapping[str, Any] | str:
    """The event's data as a JSON object; as text for the marker of the end, "" for anything else."""
    if event.startswith(b"data:") and b"\n" not in event and b"\r" not in event:  # all of OpenAI's
        data = event[5:].strip()
    else:
        lines = (line for line in _LINE.split(event) if line.startswith(b"data:"))
        data = b"\n".join(line[6:] if line.startswith(b"data: ") else line[5:] for line in lines).strip()
    if data == b"[DONE]":
        return "[DONE]"
    found = decode_json(data)
    return found if isinstance(found, Mapping) else ""


def _read_first(found: _Findings, event: bytes) -> None:
    body = _json(event)
    if isinstance(body, str):
        return
    if body.get("type") == "message_start":
        found.start = mapping(body.get("message"))
        found.name(found.start)
    else:
        found.name(mapping(body.get("response")) if "response" in body else body)


def _read_last(found: _Findings, event: bytes) -> None:
    """Take what an event adds; the last events come first."""
    body = _json(event)
    if isinstance(body, str):
        found.finished |= body == "[DONE]"
        return
    kind = body.get("type")
    if kind == "message_delta":
        # Cumulative: a later delta's counts win, an earlier one's fill the gaps.
        for name, value in mapping(body.get("usage")).items():
            if value is not None:
                found.delta.setdefault(name, value)
        # Nothing is generated after it: who closes the stream here, not waiting for `message_stop`, knows the bill.
        found.finished |= mapping(body.get("delta")).get("stop_reason") is not None
    elif kind == "message_start":
        found.start = found.start or mapping(body.get("message"))
    else:
        found.usage = openai.event_usage(body) or read_reply(body)
        found.name(mapping(body.get("response")) if "response" in body else body)
        choices = body.get("choices")
        if isinstance(choices, list) and choices:
            found.stopped |= any(mapping(choice).get("finish_reason") is not None for choice in choices)
        elif found.usage is not None and kind is None and "choices" in body:
            found.finished = True  # OpenAI's last chunk; others count in each chunk
        candidates = body.get("candidates")
        if isinstance(candidates, list) and any("finishReason" in mapping(c) for c in candidates):
            found.finished = True
    if isinstance(kind, str) and kind in _ENDS:
        found.finished = True
