"""Reading a request's body to look at it, and giving it back untouched."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from json import JSONDecodeError
from typing import Any

from respan_guard.errors import BodyTooLarge, InvalidInput
from respan_guard.middleware.headers import header
from respan_guard.middleware.weight import HEAVIEST, outline, weight

__all__ = ["RequestBody", "single_names"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

_LARGE = 256 * 1024
"""Bytes of a body from which it is looked at on another thread: other requests need not wait for it."""
_SMALL = 16 * 1024
"""Bytes of a body that is parsed at once, whatever is in it."""
_LIGHT = 3_000_000
"""The weight up to which other requests do wait: nanoseconds, roughly."""
# What may stand before a JSON object: blanks, and in other encodings than UTF-8 NULs and the marks of their order.
_BEFORE = b" \t\r\n\0\xef\xbb\xbf\xff\xfe"
# A body that says one of these twice means one thing to us and another to whoever reads it next.
_ALWAYS_SINGLE = (
    "model", "n", "best_of", "max_tokens", "max_completion_tokens", "max_output_tokens", "messages", "input", "prompt",
    "system", "tools", "contents", "generationConfig", "generation_config", "maxOutputTokens", "candidateCount",
    "candidate_count", "service_tier", "models",
)  # fmt: skip


def single_names(more: Iterable[str]) -> dict[str, bytes]:
    """Names that must not come twice in one JSON object of a body, with what to search for."""
    return {name: b'"%s"' % name.encode() for name in (*_ALWAYS_SINGLE, *more)}


class RequestBody:
    """The body of one request: read once, up to a cap, and replayed as it came.

    A body is what its first byte says, not what its headers claim: `Request.json()` does not look at them either. What
    is no JSON object (an upload, a form) is left alone from that byte on, but where calls are sent as forms.

    Args:
        scope: The request's.
        receive: The server's.
        limit: Bytes that are kept at most.
        single: What `single_names` made.
        forms: Whether calls are sent as forms there, so that all of it has to be looked at.

    Attributes:
        disconnected: The client left while it was read.
        form: All of what is no JSON object, where it may be a form. Whoever has read it lets go of it.
        is_large: Looking at it takes a while: it is a matter for another thread.
        json: The JSON object that it is.
        size: Bytes of it that were seen.
    """

    __slots__ = (
        "_everywhere", "_forms", "_limit", "_messages", "_receive", "_scope", "_single", "_unreadable", "disconnected",
        "form", "is_large", "json", "size",
    )  # fmt: skip

    def __init__(
        self,
        scope: MutableMapping[str, Any],
        receive: Receive,
        limit: int,
        single: Mapping[str, bytes],
        *,
        forms: bool = False,
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._limit = limit
        self._single = single
        self._forms = forms
        self._messages: deque[Message] = deque()
        self._unreadable: InvalidInput | None = None
        self._everywhere = False
        self.disconnected = False
        self.form: bytes | None = None
        self.is_large = False
        self.json: dict[str, Any] | None = None
        self.size = 0

    async def read(self) -> None:
        """Read and parse it. `json` is then the JSON object, if it is one; `require` tells why it isn't."""
        self._unreadable = self._by_headers()
        parts: list[bytes] = []
        size = 0
        first = b""
        while True:
            message = await self._receive()
            self._messages.append(message)
            if message["type"] != "http.request":
                self.disconnected = True
                return
            chunk = message.get("body", b"")
            size += len(chunk)
            self.size = size
            if not first:
                first = chunk[:64].lstrip(_BEFORE)[:1] or chunk.lstrip(_BEFORE)[:1]
            if size > self._limit:
                self._unreadable = self._unreadable or self._too_large()
            known = first and ((first != b"{" and not self._forms) or self._unreadable is not None)
            if size > self._limit or known:
                self._unreadable = self._unreadable or _no_object()
                # An object that is not read, or whose beginning was padded beyond the cap, may ask for anything.
                self._everywhere = first in (b"", b"{")
                return
            parts.append(chunk)
            if not message.get("more_body", False):
                break
        raw = parts[0] if len(parts) == 1 else b"".join(parts)
        if not raw or self._unreadable is not None:
            return
        self.is_large = size > _LARGE
        if self._forms and first != b"{":
            self.form, self._unreadable = raw, _no_object()
            return
        if not self.is_large and size > _SMALL:
            self.is_large = weight(raw) > _LIGHT
        if self.is_large:
            await asyncio.to_thread(self._weigh_and_parse, raw)
        else:
            self._parse(raw)

    def require(self) -> None:
        """Refuse a body that has to be understood and could not be.

        Raises:
            BodyTooLarge: It is longer than the cap, or too heavy to be parsed.
            InvalidInput: It is compressed, no JSON, or ambiguous.
        """
        if self._unreadable is not None:
            raise self._unreadable

    def check(self) -> None:
        """Refuse a body that may ask for an LLM call, whatever the path, and that we can't understand.

        Raises:
            InvalidInput: See `require`; only for what is, or begins as, a JSON object that others could read.
        """
        if self._everywhere:
            self.require()

    def replay(self) -> Receive:
        """A `receive` that gives the messages again, then those that are still to come from the server."""
        messages, receive = self._messages, self._receive
        if not messages:
            return receive

        async def replayed() -> Message:
            return messages.popleft() if messages else await receive()

        return replayed

    def _by_headers(self) -> InvalidInput | None:
        """Why the body can't be read, going by the headers."""
        headers = self._scope["headers"]
        encoding = header(headers, b"content-encoding")
        if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
            # Not unpacked: a small bomb would unfold here, and what the app reads are the packed bytes.
            return InvalidInput(
                f"a body with content-encoding {encoding.decode('latin-1')[:40]!r} can't be inspected; send it plain",
                field="content-encoding",
            )
        length = header(headers, b"content-length")
        if length is not None and length.isdigit() and len(length) < 20 and int(length) > self._limit:
            return self._too_large()
        return None

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"the request's body must be at most {self._limit:,} bytes for its customer and its cost to be known; "
            "the operator of this service can raise the middleware's max_body_bytes",
            field="body",
        )

    def _weigh_and_parse(self, raw: bytes) -> None:
        heavy, names = outline(raw)
        if heavy > HEAVIEST:
            self._everywhere = True
            self._unreadable = BodyTooLarge(
                "the request's body holds more JSON values than can be looked at; send fewer of them at once",
                field="body",
            )
        else:
            self._parse(raw, names)

    def _parse(self, raw: bytes, names: bytes | None = None) -> None:
        try:
            # As `Request.json()` reads it, so that the app sees what we see.
            found = json.loads(raw, object_pairs_hook=self._pairs if self._may_repeat(raw, names or raw) else None)
        except InvalidInput as error:
            self._unreadable, self._everywhere = error, True
        except RecursionError:
            self._unreadable, self._everywhere = _no_object(), True
        except ValueError:
            self._unreadable, self._everywhere = _no_object(), _others_may_read(raw)
        else:
            if isinstance(found, dict):
                self.json = found
            else:
                self._unreadable = _no_object()

    def _may_repeat(self, raw: bytes, names: bytes) -> bool:
        r"""Whether a name could come twice: the exact check costs a call for each object of the body.

        Where `names` has the short strings only, megabytes of text are not searched for each name.

        Names can be spelled with escapes (`\u0063ustomer_params`), and JSON can come in UTF-16 or UTF-32.
        """
        if b"\\u" in raw or b"\0" in raw[:4]:
            return True
        for quoted in self._single.values():  # noqa: SIM110  # a generator costs more than the search
            if names.count(quoted) > 1:
                return True
        return False

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen and name in self._single:
                    raise InvalidInput(f"the body names {name} twice; say it once", field=name)
                seen.add(name)
        return found


def _no_object() -> InvalidInput:
    return InvalidInput("the request's body must be a JSON object", field="body")


def _others_may_read(raw: bytes) -> bool:
    """Whether parsers that are less strict than ours make an object of it."""
    try:
        return isinstance(json.loads(raw.decode("utf-8", "replace"), strict=False), dict)
    except JSONDecodeError:
        return False
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return True
