"""The line to a Redis: questions stand behind each other, answers reach who asked, whoever gives up meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.exceptions import ConnectionError, ResponseError  # noqa: A004 - theirs

from respan_guard.backends.redis import line as module
from respan_guard.backends.redis.line import Line


class Server:
    """Answers a command `["SAY", text]` with the text, and `["NO", text]` with an error, once it is let."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.heard: list[str] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.writers.append(writer)
        try:
            while parts := await self._command(reader):
                self.heard.append(parts[1])
                await self.let.wait()
                writer.write(f"${len(parts[1])}\r\n{parts[1]}\r\n".encode() if parts[0] == "SAY" else b"-ERR no\r\n")
        except (ConnectionError, OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _command(self, reader: asyncio.StreamReader) -> list[str]:
        count = await reader.readline()
        words = []
        for _ in range(int(count[1:] or 0)):
            size = int((await reader.readline())[1:])
            words.append((await reader.readexactly(size + 2))[:-2].decode())
        return words

    async def got(self, count: int) -> None:
        """Wait until so many commands arrived."""
        async with asyncio.timeout(10):
            while len(self.heard) < count:
                await asyncio.sleep(0.001)


@asynccontextmanager
async def opened(timeout: float = 10) -> AsyncIterator[tuple[Server, Line]]:
    """A server, and a line to it."""
    server = Server()
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        given = {"decode_responses": True, "driver_info": None, "protocol": 2}
        line = Line(f"redis://127.0.0.1:{port}", timeout, given)
        try:
            yield server, line
        finally:
            server.let.set()
            await line.close()
            for writer in server.writers:
                writer.close()
            await asyncio.sleep(0)


def ask(line: Line, text: str, word: str = "SAY") -> asyncio.Task[object]:
    """Send a command."""
    return asyncio.create_task(line.execute(word, text))


async def test_a_second_batch_is_sent_before_the_first_is_answered() -> None:
    """Only one command is read at a time by this server: both are on their way, and answered in order."""
    async with opened() as (server, line):
        tasks = [ask(line, str(number)) for number in range(20)]
        await server.got(1)
        await asyncio.sleep(0.01)
        assert line._talk.asked == 20
        server.let.set()
        assert await asyncio.gather(*tasks) == [str(number) for number in range(20)]
        assert len(server.writers) == 1


async def test_a_refusal_reaches_who_asked() -> None:
    """An error is an answer: the one behind it gets its own, on the same connection."""
    async with opened() as (server, line):
        server.let.set()
        first, second, third = await asyncio.gather(
            ask(line, "1"), ask(line, "2", "NO"), ask(line, "3"), return_exceptions=True
        )
        assert (first, third) == ("1", "3")
        assert isinstance(second, ResponseError)
        assert len(server.writers) == 1


@pytest.mark.parametrize("gone", [[0], [1], [0, 1], [0, 2], [1, 2, 3]])
async def test_the_answers_of_those_who_gave_up_are_dropped(gone: list[int]) -> None:
    """Callers are cancelled while the server works: the others get their own answers, and so does the next one."""
    async with opened() as (server, line):
        tasks = [ask(line, str(number)) for number in range(4)]
        await server.got(1)
        for number in gone:
            tasks[number].cancel()
        await asyncio.sleep(0)
        server.let.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for number, answer in enumerate(answers):
            assert isinstance(answer, asyncio.CancelledError) if number in gone else answer == str(number)
        assert await line.execute("SAY", "next") == "next"
        assert len(server.writers) == 1


async def test_who_gives_up_on_a_silent_connection_takes_it_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was heard for long: the connection is closed, who waits behind is told, the next one gets another."""
    monkeypatch.setattr(module, "_SILENCE", 0.05)
    async with opened() as (server, line):
        first, second = ask(line, "1"), ask(line, "2")
        await server.got(1)
        await asyncio.sleep(0.1)
        first.cancel()
        with pytest.raises(ConnectionError):
            await second
        server.let.set()
        assert await line.execute("SAY", "3") == "3"
        assert len(server.writers) == 2


async def test_a_broken_connection_fails_who_waits_on_it_and_nobody_else() -> None:
    """What was asked and not answered is unknown; what is asked after it goes over another connection."""
    async with opened() as (server, line):
        tasks = [ask(line, str(number)) for number in range(3)]
        await server.got(1)
        server.writers[0].close()
        later = [ask(line, "later")]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(answer, ConnectionError) for answer in found)
        server.let.set()
        await asyncio.gather(*later, return_exceptions=True)  # asked before the end was seen, it may share it
        assert await line.execute("SAY", "3") == "3"


async def test_a_server_that_never_answers_is_given_up() -> None:
    """After the line's own deadline everybody who waits on the connection is told."""
    async with opened(timeout=0.1) as (server, line):
        found = await asyncio.gather(ask(line, "1"), ask(line, "2"), return_exceptions=True)
        assert all(isinstance(answer, (TimeoutError, ConnectionError)) for answer in found)
        assert server.heard == ["1"]
        server.let.set()
        assert await line.execute("SAY", "3") == "3"


async def test_each_connection_has_a_number() -> None:
    """It goes up where the next batch goes over another one, made yet or not; an answer changes nothing."""
    async with opened() as (server, line):
        server.let.set()
        before = line.number
        assert await line.execute("SAY", "1") == "1"
        with pytest.raises(ResponseError):
            await line.execute("NO", "2")
        assert line.number == before
        server.writers[0].close()
        await asyncio.sleep(0.05)
        assert line.number == before + 1
        assert await line.execute("SAY", "3") == "3"
        assert line.number == before + 1
