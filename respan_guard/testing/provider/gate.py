"""A gate that stops an answer until a test lets it go on, whatever thread or loop each of them runs in."""

from __future__ import annotations

import asyncio
import threading

__all__ = ["Gate"]


class Gate:
    """Holds back what comes to it. Safe to use from any thread and any event loop.

    Each piece of an answer that comes to the gate waits for a permit. Closed at first.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._permits = 0
        self._open = False
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._arrivals = 0

    def release(self, count: int = 1) -> None:
        """Let `count` more pieces through."""
        with self._changed:
            self._permits += count
            self._wake()

    def open(self) -> None:
        """Let everything through from now on."""
        with self._changed:
            self._open = True
            self._wake()

    @property
    def arrivals(self) -> int:
        """How many pieces have come to the gate so far."""
        with self._changed:
            return self._arrivals

    def wait_for_arrival(self, count: int = 1, timeout: float = 10) -> None:
        """Block until `count` pieces have come to the gate since it was made.

        Raises:
            TimeoutError: They didn't come within `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._arrivals >= count, timeout):
                raise TimeoutError(f"{self._arrivals} of {count} pieces came to the gate within {timeout} s")

    async def arrival(self, count: int = 1, timeout: float = 10) -> None:  # noqa: ASYNC109  # as its blocking twin
        """What `wait_for_arrival` does, for code on an event loop."""
        await asyncio.to_thread(self.wait_for_arrival, count, timeout)

    async def passage(self) -> None:
        """Wait until this piece may pass."""
        loop = asyncio.get_running_loop()
        with self._changed:
            self._arrivals += 1
            self._changed.notify_all()
            if self._open:
                return
            if self._permits:
                self._permits -= 1
                return
            future: asyncio.Future[None] = loop.create_future()
            self._waiting.append((loop, future))
        await future

    def _wake(self) -> None:
        while self._waiting and (self._open or self._permits):
            loop, future = self._waiting.pop(0)
            if future.cancelled() or loop.is_closed():
                continue
            if not self._open:
                self._permits -= 1
            loop.call_soon_threadsafe(_let_go, future)


def _let_go(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
