"""Reading a request's body to look at it, and giving it back untouched."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from respan_guard.errors import BodyTooLarge, InvalidInput
from respan_guard.middleware.headers import header

__all__ = ["RequestBody", "single_names"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

_LARGE = 256 * 1024
"""Bytes of a body from which it is looked at on another thread: other requests need not wait for it."""
# A body that says one of these twice means one thing to us and another to whoever reads it next.
_ALWAYS_SINGLE = ("model", "n", "max_tokens", "max_completion_tokens", "max_output_tokens")


def single_names(more: Iterable[str]) -> dict[str, bytes]:
    """Names that must not come twice in one JSON object of a body, with what to search for."""
    return {name: b'"%s"' % name.encode() for name in (*_ALWAYS_SINGLE, *more)}


class RequestBody:
    """The body of one request: read once, up to a cap, and replayed as it came.

    Args:
        scope: The request's.
        receive: The server's.
        limit: Bytes that are kept at most.
        single: What `single_names` made.
    """

    __slots__ = (
        "_limit", "_messages", "_receive", "_scope", "_single", "_unreadable", "disconnected", "is_large", "json"
    )  # fmt: skip

    def __init__(
        self, scope: MutableMapping[str, Any], receive: Receive, limit: int, single: Mapping[str, bytes]
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._limit = limit
        self._single = single
        self._messages: deque[Message] = deque()
        self._unreadable: InvalidInput | None = None
        self.disconnected = False
        self.is_large = False
        self.json: dict[str, Any] | None = None

    async def read(self) -> None:
        """Read and parse it. `json` is then the JSON object, if it is one; `require` tells why it isn't."""
        headers = self._scope["headers"]
        encoding = header(headers, b"content-encoding")
        if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
            # Not unpacked: a small bomb would unfold here, and what the app reads are the packed bytes.
            self._unreadable = InvalidInput(
                f"a body with content-encoding {encoding.decode('latin-1')[:40]!r} can't be inspected; send it plain",
                field="content-encoding",
            )
            return
        length = header(headers, b"content-length")
        if length is not None and length.isdigit() and len(length) < 20 and int(length) > self._limit:
            self._too_large()
            return
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            self._messages.append(message)
            if message["type"] != "http.request":
                self.disconnected = True
                return
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._limit:
                self._too_large()
                return
            parts.append(chunk)
            if not message.get("more_body", False):
                break
        raw = parts[0] if len(parts) == 1 else b"".join(parts)
        self.is_large = size > _LARGE
        if self.is_large:
            await asyncio.to_thread(self._parse, raw)
        else:
            self._parse(raw)

    def require(self) -> None:
        """Refuse a body that has to be understood and could not be.

        Raises:
            BodyTooLarge: It is longer than the cap.
            InvalidInput: It is compressed, no JSON, or ambiguous.
        """
        if self._unreadable is not None:
            raise self._unreadable

    def replay(self) -> Receive:
        """A `receive` that gives the messages again, then those that are still to come from the server."""
        messages, receive = self._messages, self._receive
        if not messages:
            return receive

        async def replayed() -> Message:
            return messages.popleft() if messages else await receive()

        return replayed

    def _too_large(self) -> None:
        self._unreadable = BodyTooLarge(
            f"the request's body must be at most {self._limit:,} bytes for its customer and its cost to be known; "
            "the operator of this service can raise the middleware's max_body_bytes",
            field="body",
        )

    def _parse(self, raw: bytes) -> None:
        if not raw:
            return
        try:
            # As `Request.json()` reads it, so that the app sees what we see.
            found = json.loads(raw, object_pairs_hook=self._pairs if self._may_repeat(raw) else None)
        except InvalidInput as error:
            self._unreadable = error
        except (ValueError, RecursionError):  # also nesting beyond reason, and integers of thousands of digits
            self._unreadable = InvalidInput("the request's body must be JSON", field="body")
        else:
            if isinstance(found, dict):
                self.json = found
            else:
                self._unreadable = InvalidInput("the request's body must be a JSON object", field="body")

    def _may_repeat(self, raw: bytes) -> bool:
        r"""Whether a name could come twice: the exact check costs a call for each object of the body.

        Names can be spelled with escapes (`\u0063ustomer_params`), and JSON can come in UTF-16 or UTF-32.
        """
        if b"\\u" in raw or b"\0" in raw[:4]:
            return True
        for quoted in self._single.values():  # noqa: SIM110  # a generator costs more than the search
            if raw.count(quoted) > 1:
                return True
        return False

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            for name in self._single:
                if sum(key == name for key, _ in pairs) > 1:
                    raise InvalidInput(f"the body names {name} twice; say it once", field=name)
        return found
