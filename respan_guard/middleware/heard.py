"""What an app took of its request: did the client leave meanwhile; and the body once more, for who answers instead."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from respan_guard.middleware.passage import Passage

__all__ = ["Heard", "unheard"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class Heard:
    """An app's `receive` that is listened to.

    Args:
        passage: The request, which is told when the client left.
        receive: What the app would have been given.
        limit: Bytes of the body that are kept at most, to be read once more; 0 keeps nothing.
    """

    __slots__ = ("_ended", "_gone", "_limit", "_parts", "_passage", "_receive", "_size")

    def __init__(self, passage: Passage, receive: Receive, limit: int) -> None:
        self._passage = passage
        self._receive = receive
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0
        self._ended = self._gone = False

    async def receive(self) -> Message:
        """The next message, for the app."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone = True
            if self._passage.capture is not None:
                self._passage.capture.left()
        elif self._limit:
            chunk = message.get("body", b"")
            self._size += len(chunk)
            self._ended = not message.get("more_body", False)
            if self._size > self._limit:
                self._parts.clear()
            elif chunk:
                self._parts.append(chunk)
        return message

    def forget(self) -> None:
        """Keep nothing of the body any more: the answer has begun."""
        self._limit = 0
        self._parts.clear()

    def replay(self) -> Receive:
        """A `receive` that gives the body from its beginning, whatever the app took of it; what it did not comes after.

        A body of which nothing could be kept reads as an empty one: nobody may wait for what will never come again.
        """
        lost = self._size > self._limit
        pending: Message | None = None
        if lost or self._parts or self._ended:
            body = b"" if lost else b"".join(self._parts)
            pending = {"type": "http.request", "body": body, "more_body": not (lost or self._ended)}

        async def replayed() -> Message:
            nonlocal pending
            if pending is not None:
                message, pending = pending, None
                return message
            return {"type": "http.disconnect"} if self._gone else await self._receive()

        return replayed


def unheard(passage: Passage, receive: Receive) -> Receive:
    """The body from its beginning, of which the app was given nothing yet."""
    return receive if passage.body is None else passage.body.replay()
