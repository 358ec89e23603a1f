"""One connection that one batch at a time goes over."""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio import Redis

__all__ = ["Line"]


class Line:
    """A connection of redis-py's, without its pool and its task for each send: half of what a trip costs a client.

    A connection on which anything went wrong is closed, a cancelled caller's with its answer unread; the next batch
    connects again. One that the server closed meanwhile is noticed before it is used.

    Args:
        address: As redis-py wants it.
        timeout: Seconds that connecting and an answer may take.
        given: What else redis-py's connections take.
    """

    def __init__(self, address: str, timeout: float, given: dict[str, Any]) -> None:
        # The deadline is ours and spans the whole trip; redis-py's own costs a task for each send.
        pool = Redis.from_url(address, **{**given, "socket_timeout": None}).connection_pool
        self.connection: Any = pool.make_connection()  # type: ignore[no-untyped-call]  # theirs
        self._timeout = timeout
        self._turn = asyncio.Lock()

    async def execute(self, *words: Any) -> Any:
        """Send a command and read its answer.

        Raises:
            RedisError: The server says no, or the connection broke.
            TimeoutError: There was no answer in time.
        """
        connection = self.connection
        async with self._turn:
            try:
                async with asyncio.timeout(self._timeout):
                    reader = connection._reader
                    if reader is not None and reader.at_eof():
                        await connection.disconnect(nowait=True)
                    await connection.send_packed_command(connection.pack_command(*words), check_health=False)
                    return await connection.read_response()
            except TimeoutError:
                await connection.disconnect(nowait=True)
                raise

    async def close(self) -> None:
        """Close the connection."""
        async with self._turn:
            await self.connection.disconnect()
