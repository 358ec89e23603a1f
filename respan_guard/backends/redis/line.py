"""One connection that batches go over, one behind the other."""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from respan_guard.backends.redis.demoted import refuses_writes

__all__ = ["Line"]

_SILENCE = 0.2  # seconds without an answer after which a caller that gives up takes the connection with it


class _Talk:
    """A connection, and what is said on it."""

    __slots__ = ("asked", "connection", "heard", "number", "since")

    def __init__(self, connection: Any, number: int) -> None:
        self.connection = connection
        self.number = number
        self.asked = self.heard = 0
        self.since = 0.0  # when it was heard of last, or had something to answer again

    @property
    def ended(self) -> bool:
        """Whether the server closed it."""
        reader = self.connection._reader
        return reader is not None and bool(reader.at_eof())


class Line:
    """A connection of redis-py's, without its pool and its task for each send: half of what a trip costs a client.

    What is sent while another's answer is waited for stands behind it, at the server and here: answers come in the
    order of the questions, and one whose caller gave up is read and dropped by the next. A connection that broke or
    is silent is closed, nobody waits on it any more, and the next batch makes another one. One that the server closed
    meanwhile is noticed before it is used. One over which a server says that it takes no writes is closed as well: the
    address may lead to another one by now.

    Args:
        address: As redis-py wants it.
        timeout: Seconds that connecting and an answer may take.
        given: What else redis-py's connections take.
    """

    def __init__(self, address: str, timeout: float, given: dict[str, Any]) -> None:
        # The deadline is ours and spans the whole trip; redis-py's own costs a task for each send.
        self._pool: Any = Redis.from_url(address, **{**given, "socket_timeout": None}).connection_pool
        self._talk = self._begin(1)
        self._timeout = timeout
        self._sending = asyncio.Lock()
        self._reading = asyncio.Lock()  # both are fair: who sends first reads first

    def _begin(self, number: int) -> _Talk:
        return _Talk(self._pool.make_connection(), number)

    @property
    def connection(self) -> Any:
        """The connection that the next batch goes over."""
        return self._talk.connection

    @property
    def number(self) -> int:
        """Which connection the next batch goes over, as it looks now: one that replaces another has a higher number."""
        return self._talk.number + self._talk.ended

    async def execute(self, *words: Any) -> Any:
        """Send a command and read its answer.

        Raises:
            RedisError: The server says no, or the connection broke.
            TimeoutError: There was no answer in time.
        """
        talk, number, now = self._talk, 0, asyncio.get_running_loop().time  # 0: nothing was sent
        try:
            async with asyncio.timeout(self._timeout):
                async with self._sending:
                    if self._talk.ended:
                        await self._end(self._talk)
                    talk, number = self._talk, -1  # it may be sent in part
                    packed = talk.connection.pack_command(*words)
                    await talk.connection.send_packed_command(packed, check_health=False)
                    if talk.asked == talk.heard:
                        talk.since = now()
                    number = talk.asked = talk.asked + 1
                async with self._reading:  # asked for in the same breath as the turn to send is given up
                    return await self._answer(talk, number)
        except ResponseError as error:
            if refuses_writes(error):
                await self._end(talk)
            raise  # else that is an answer
        except asyncio.CancelledError:
            if number < 0 or (number and now() - talk.since > _SILENCE):
                await self._end(talk)
            raise
        except BaseException:
            if number:
                await self._end(talk)
            raise

    async def _answer(self, talk: _Talk, number: int) -> Any:
        """Read up to an answer."""
        while True:
            answer: Any = None
            refusal: ResponseError | None = None
            try:
                answer = await talk.connection.read_response(disconnect_on_error=False)
            except ResponseError as error:
                refusal = error
            talk.heard += 1
            talk.since = asyncio.get_running_loop().time()
            if talk.heard == number:
                if refusal is not None:
                    raise refusal
                return answer

    async def _end(self, talk: _Talk) -> None:
        """Close a connection, and with it the answers that were to come; nobody ever connects it again.

        It is another object that connects next: who still waits behind the failure can't read what others asked there.
        """
        if talk is self._talk:
            self._talk = self._begin(talk.number + 1)
        await talk.connection.disconnect(nowait=True)

    async def close(self) -> None:
        """Close the connection."""
        async with self._sending, self._reading:
            await self._talk.connection.disconnect()
