"""Bodies that are looked at as they pass by."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from respan_guard.clients.exchange import Exchange
from respan_guard.clients.streams import UsageFilter

__all__ = ["Body", "Decoded", "WatchedAsyncStream", "WatchedStream"]

logger = logging.getLogger("respan_guard")


class Body:
    """A request's body that tells whether it was asked for."""

    def __init__(self, stream: Any, *, taken: bool) -> None:
        self.stream = stream
        self.taken = taken

    def __iter__(self) -> Iterator[bytes]:
        self.taken = True
        return iter(self.stream)

    def __aiter__(self) -> AsyncIterator[bytes]:
        self.taken = True
        found: AsyncIterator[bytes] = self.stream.__aiter__()
        return found


class Decoded:
    """A response's body as the HTTP library decodes it, with the library's own errors.

    Args:
        response: The library's.
    """

    def __init__(self, response: Any) -> None:
        self.response = response

    def __iter__(self) -> Iterator[bytes]:
        found: Iterator[bytes] = self.response.iter_bytes()
        return found

    def __aiter__(self) -> AsyncIterator[bytes]:
        found: AsyncIterator[bytes] = self.response.aiter_bytes()
        return found

    def close(self) -> None:
        """Let go of the connection."""
        self.response.close()

    async def aclose(self) -> None:
        """Let go of the connection."""
        await self.response.aclose()


class Watched:
    """A response's body that is read as it passes by.

    Args:
        stream: The body.
        exchange: The call that it answers.
        feed: Takes what passes.
        hide: Takes out what the caller did not ask for.
    """

    def __init__(
        self, stream: Any, exchange: Exchange, feed: Callable[[bytes], None] | None, hide: UsageFilter | None
    ) -> None:
        self.stream = stream
        self.exchange = exchange
        self.feed = feed
        self.hide = hide

    def passed(self, chunk: bytes) -> bytes:
        """Look at a chunk; what of it goes on."""
        if self.feed is not None:
            try:
                self.feed(chunk)
            except Exception:  # a fault of ours must not touch the response
                self.feed = None
                logger.exception("the usage of a reply could not be read; the reply itself is untouched")
        return chunk if self.hide is None else self.hide.passed(chunk)

    def rest(self) -> bytes:
        """What is left at the end."""
        return b"" if self.hide is None else self.hide.rest()


class WatchedStream(Watched):
    """For clients that block."""

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self.stream:
                if chunk := self.passed(chunk):
                    yield chunk
            if chunk := self.rest():
                yield chunk
        finally:
            self.exchange.finish()

    def close(self) -> None:
        """Let go of the connection."""
        try:
            self.stream.close()
        finally:
            self.exchange.finish()


class WatchedAsyncStream(Watched):
    """For clients on an event loop."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self.stream:
                if chunk := self.passed(chunk):
                    yield chunk
            if chunk := self.rest():
                yield chunk
        finally:
            self.exchange.finish()

    async def aclose(self) -> None:
        """Let go of the connection."""
        try:
            await self.stream.aclose()
        finally:
            self.exchange.finish()
