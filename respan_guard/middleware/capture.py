"""Reading usage off a response that passes by. Nothing of it is held back, and no fault here reaches the app."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

from respan_guard.estimates import text_seen
from respan_guard.middleware.answers import refusal_in
from respan_guard.middleware.faults import Faults
from respan_guard.providers import Call, Reader, reader_for, usage_of_call
from respan_guard.sending import timed_out
from respan_guard.usage import Usage

__all__ = ["Capture"]


_UNKNOWN = Call(provider="", operation="", model="", input_tokens_bound=0)
_GAVE_UP = frozenset({408, 499, 504})
"""What gateways answer that did not wait for the reply to what they had sent."""
_IDS = {"chatcmpl-": "openai", "cmpl-": "openai", "resp_": "openai", "gen-": "openrouter", "msg_": "anthropic"}
"""How the ids of providers' replies begin."""


class Capture:
    """What one response says about the LLM call that its request asked for.

    Args:
        call: What the request asked for; None if that is not known. A provider's reply then counts as it is.
        faults: Where faults of ours are reported.
        now: Seconds of the guard's monotonic clock.
    """

    __slots__ = ("_call", "_ended", "_faults", "_left", "_now", "_reader", "_started", "_status", "_streams")

    def __init__(self, call: Call | None, faults: Faults, now: Callable[[], float]) -> None:
        self._call = call or _UNKNOWN
        self._now = now
        self._started = now()
        self._ended: float | None = None
        self._faults = faults
        self._reader: Reader | None = None
        self._status = 0
        self._streams = self._left = False

    def start(self, message: MutableMapping[str, Any]) -> Callable[[bytes], None] | None:
        """Look at `http.response.start`.

        Returns:
            What takes the bytes of the body; None if they tell nothing.
        """
        try:
            self._status = message["status"]
            headers: Iterable[tuple[bytes, bytes]] = message.get("headers") or ()
            kind, encoding = b"", None
            for name, value in headers:
                lower = name.lower()
                if lower == b"content-type":
                    kind = value
                elif lower == b"content-encoding":
                    encoding = value.decode("latin-1")
            self._streams = kind.lower().startswith(b"text/event-stream")
            self._reader = reader_for(kind.decode("latin-1"), encoding, self._now)
        except Exception:
            self.give_up()
        return None if self._reader is None else self._reader.feed

    @property
    def silent(self) -> bool:
        """Whether neither the request nor the response tells of a call."""
        return self._reader is None and self._call is _UNKNOWN

    def left(self) -> None:
        """The app was told that its client has left; that counts if no answer has begun."""
        self._left = self._left or not self._status

    def complete(self) -> None:
        """The body is complete; what the app does behind it is no part of the call."""
        self._ended = self._now()

    def usage(self) -> Usage | None:
        """What the response reported, if it did; after the last message."""
        reader = self._reader
        if reader is None:
            return None
        try:
            usage = usage_of_call(reader, self._call, self._started, self._ended or self._now())
            if self._call is _UNKNOWN and usage is not None and not reader.finished:
                # Cut off: what went in is known, what came out was seen, and of the request there is nothing to go by.
                usage.output_tokens = max(usage.output_tokens, -(-reader.output_bytes // 4))
                usage.estimated = True
            return usage
        except Exception:
            self.give_up()
            return None

    def call(self) -> Call | None:
        """The call that was asked for; if that is not known, the one that a provider's stream tells of."""
        if self._call is not _UNKNOWN:
            return self._call
        reader = self._reader
        if reader is None or not self._streams:
            return None
        try:
            model, reply = reader.model, reader.response_id or ""
        except Exception:
            self.give_up()
            return None
        provider = next((name for begin, name in _IDS.items() if reply.startswith(begin)), None)
        if provider is None or not model:
            return None
        return Call(provider=provider, operation="chat", model=model, input_tokens_bound=0, stream=True)

    @property
    def seen(self) -> int:
        """Bytes of text that the response brought, if it was a stream; after the last message."""
        try:
            return text_seen(self._reader)
        except Exception:
            self.give_up()
            return 0

    def sent(self, failure: BaseException | None, *, called: bool) -> bool:
        """Whether the call was made, as far as the door can tell: what it cost is then owed, known or not.

        It was, if the response is a success, whole or cut off. It is taken to have been, since the provider goes on
        and bills, if it is known what was asked for, no wrapped client knows better, and the app gave up (408, 499,
        504, a timeout that it raised), or its client left or the work was cancelled before there was an answer. It was
        not, if the app answered with another error or failed otherwise.

        Args:
            failure: What the app raised.
            called: Whether a wrapped client took part.
        """
        status = self._status
        if 0 < status < 300:
            return True
        if self._call is _UNKNOWN or called or refusal_in(failure) is not None:
            return False
        if status in _GAVE_UP or self._left:
            return True
        if status and status < 500:
            return False
        # An error page that a framework makes of an exception, which it then raises on, is no answer of the app's.
        return timed_out(failure) or (not status and failure is not None and not isinstance(failure, Exception))

    def give_up(self) -> None:
        """Read no more of this response, because of the exception being handled."""
        self._reader = None
        self._faults.report("the usage of a response could not be read; the response itself is untouched")
