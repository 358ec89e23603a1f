"""Bringing an answer to the client: framing, faults of the connection, and noticing that the client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from respan_guard.testing.provider.faults import Fault
from respan_guard.testing.provider.gate import Gate
from respan_guard.testing.provider.request import Event, ProviderRequest
from respan_guard.testing.serving import abort_connection

__all__ = ["ClientGone", "Connection", "ConnectionDropped", "content_type", "deliver", "frame"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientGone(Exception):
    """The client went away before the answer was out."""


class ConnectionDropped(ConnectionError):
    """Raised for a dropped connection where the app is called directly, without a server that has one to drop."""


def content_type(request: ProviderRequest) -> str:
    """The content type of an answer that goes right."""
    if not request.stream:
        return "application/json"
    return "application/json; charset=UTF-8" if request.array else "text/event-stream; charset=utf-8"


def frame(request: ProviderRequest, events: list[Event], kinds: set[str]) -> list[bytes]:
    """Put the events on the wire, one piece each; a reply without a stream is one event."""
    texts = [event.data if isinstance(event.data, str) else _dumps(event.data) for event in events]
    if "usage-twice" in kinds and not request.stream and isinstance(events[0].data, dict):
        for name in {"usage", "usageMetadata"} & events[0].data.keys():
            texts[0] = f"{texts[0][:-1]},{_dumps(name)}:{_dumps(events[0].data[name])}}}"
    if "invalid-json" in kinds:
        at = max(i for i, event in enumerate(events) if not isinstance(event.data, str))
        texts[at] = texts[at][: len(texts[at]) * 2 // 3]
    if not request.stream:
        pieces = [texts[0].encode()]
    elif request.array:
        pieces = [f"{',' if at else '['}{text}\r\n".encode() for at, text in enumerate(texts)]
        pieces[-1] += b"]"
    else:
        pieces = [
            f"{f'event: {event.name}' + chr(10) if event.name else ''}data: {text}\n\n".encode()
            for event, text in zip(events, texts, strict=True)
        ]
    if "gzip" in kinds:
        packer = zlib.compressobj(wbits=31)
        pieces = [packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) for piece in pieces]
        pieces[-1] += packer.flush()
    return pieces


def _dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


class Connection:
    """One exchange with one client."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.send = send
        self._receive = receive
        self._gone: asyncio.Task[None] | None = None

    async def body(self) -> bytes:
        """The request's body.

        Raises:
            ClientGone: The client left before it was sent.
        """
        found = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            found += message.get("body", b"")
            if not message.get("more_body"):
                return bytes(found)

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Notice from now on when the client goes away."""
        self._gone = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            self._gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._gone

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def wait_at(self, gate: Gate) -> None:
        """Wait for the gate.

        Raises:
            ClientGone: The client left meanwhile.
        """
        assert self._gone is not None
        passage = asyncio.create_task(gate.passage())
        try:
            await asyncio.wait({passage, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if not passage.done():
                raise ClientGone
        finally:
            passage.cancel()

    async def drop(self) -> None:
        """Cut the connection.

        Raises:
            ConnectionDropped: There is none, since the app was called directly.
        """
        if not abort_connection(self.scope):
            raise ConnectionDropped("the stand-in provider dropped the connection, as it was told to")
        assert self._gone is not None
        await self._gone

    def check(self) -> None:
        """Raise if the client is gone.

        Raises:
            ClientGone: It is.
        """
        if self._gone is not None and self._gone.done():
            raise ClientGone


async def deliver(
    connection: Connection,
    headers: dict[str, str],
    pieces: list[bytes],
    faults: dict[str, Fault],
    *,
    gate: Gate | None,
    usage_at: int,
    on_last: Callable[[], None],
) -> None:
    """Send an answer.

    Args:
        connection: To whom.
        headers: Of the response.
        pieces: Of the body, in order.
        faults: What shall go wrong.
        gate: Where each piece after the first waits, and a single one as well.
        usage_at: The piece that tells the usage.
        on_last: Called when nothing but the last piece is left to send.

    Raises:
        ClientGone: The client left before the end.
        ConnectionDropped: See `Connection.drop`.
    """
    single = len(pieces) == 1
    if single and any(kind.startswith(("drop-", "stall-middle")) for kind in faults):
        half = len(pieces[0]) // 2
        pieces, usage_at = [pieces[0][:half], pieces[0][half:]], 1
    drops = {"drop-after-start": 1, "drop-middle": max(1, len(pieces) // 2), "drop-before-usage": usage_at}
    drop_at = min((at for kind, at in drops.items() if kind in faults), default=None)
    stall_at = len(pieces) // 2 if "stall-middle" in faults else None
    if "drop-before" in faults:
        await connection.drop()
        return
    if "stall-before" in faults:
        await connection.wait_at(faults["stall-before"].gate)
    if gate is not None and single:
        await connection.wait_at(gate)
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await connection.send({"type": "http.response.start", "status": 200, "headers": raw})
    for at, piece in enumerate(pieces):
        if at == drop_at:
            await connection.drop()
            return
        if at == stall_at:
            await connection.wait_at(faults["stall-middle"].gate)
        if gate is not None and at:
            await connection.wait_at(gate)
        parts = [piece[i : i + 1] for i in range(len(piece))] if "one-byte-chunks" in faults else [piece]
        for left, part in zip(reversed(range(len(parts))), parts, strict=True):
            # Lets the server send this part alone, and tell that the client is gone.
            await asyncio.sleep(0)
            connection.check()
            last = at == len(pieces) - 1 and not left
            if last:
                on_last()
            await connection.send({"type": "http.response.body", "body": part, "more_body": not last})
