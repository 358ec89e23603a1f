"""A TCP proxy between the library and a server that loses, repeats, delays and cuts, as networks do.

It knows no protocol. A request is what one read from the client brings, a reply is what the server sends
after it; clients that wait for their answers make that exact. Which requests are hit depends on the seed,
the connection's number and the request's place in it alone, so a run can be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

__all__ = ["Faults", "FaultyProxy"]

_CHUNK = 1 << 20
_START_TIMEOUT = 10.0


@dataclass(frozen=True)
class Faults:
    """What happens to requests. Shares are of 1.

    Attributes:
        drop_reply: Share of requests that reach the server, and whose connection is cut when the reply comes.
        reset: Share of requests that never reach the server: the client's connection is reset (RST).
        duplicate: Share of connections whose every byte is also sent over a second connection to the server, the
            replies to which are thrown away. TCP itself never repeats bytes; this is what a retry looks like to it.
        delay: Seconds that a reply is held back at most.
        spare: So many requests at the start of each connection are left alone (a handshake, maybe).
        match: Only requests with these bytes in them are hit.
    """

    drop_reply: float = 0.0
    reset: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    spare: int = 0
    match: bytes = b""


class FaultyProxy:
    """Listens on a free local port, on a thread and event loop of its own. Use it with `with`.

    `faults` may be replaced at any time, from any thread. `black_hole`, `refuse`, `cut`, `recover` and `lead_to` return
    when it is so.

    Args:
        port: The server's.
        host: The server's.
        faults: What happens to requests, from the start.
        seed: Makes the same requests be hit in another run.

    Attributes:
        port: Where clients connect.
        counts: How often what was done: connections, requests, and each fault by its name.
    """

    host = "127.0.0.1"

    def __init__(self, port: int, host: str = "127.0.0.1", *, faults: Faults | None = None, seed: int = 0) -> None:
        self.faults = faults or Faults()
        self.counts: Counter[str] = Counter()
        self.port = 0
        self._server_address = (host, port)
        self._seed = seed
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy", daemon=True)
        self._passing = asyncio.Event()
        self._passing.set()
        self._live: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_TIMEOUT)
        self._loop.close()

    @property
    def open_connections(self) -> int:
        """How many clients are connected."""
        return len(self._live)

    def black_hole(self) -> None:
        """Take bytes and connections and pass nothing on, in either direction, until `recover`."""
        self._run(self._set_passing(False))

    def refuse(self) -> None:
        """Cut all connections and refuse new ones, as a host without the server does, until `recover`."""
        self._run(self._refuse())

    def cut(self) -> None:
        """Reset every connection there is."""
        self._run(self._cut())

    def recover(self, *, cut: bool = False) -> None:
        """Pass on again. What a black hole held back is delivered late, as TCP does; unless it is cut."""
        self._run(self._recover(cut))

    def lead_to(self, port: int) -> None:
        """Take new connections to another server, as an address does that moved; those there are stay."""
        self._run(self._lead_to(port))

    # -- on the proxy's own loop -------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_START_TIMEOUT)

    async def _listen(self) -> None:
        self._listener = socket.create_server((self.host, self.port), backlog=1000)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._loop.add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        # Not asyncio's own server: it leaks a connection that comes while it is closed.
        with contextlib.suppress(BlockingIOError):
            accepted, _ = listener.accept()
            accepted.setblocking(False)
            task = self._loop.create_task(self._serve(accepted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, accepted: socket.socket) -> None:
        self.counts["connections"] += 1
        rng = random.Random(f"{self._seed}:{self.counts['connections']}")
        reader, writer = await asyncio.open_connection(sock=accepted, limit=_CHUNK)
        connection = _Connection(self, reader, writer, rng)
        self._live.add(connection)
        try:
            await connection.serve(self._server_address)
        finally:
            self._live.discard(connection)
            await connection.closed()

    async def _set_passing(self, passing: bool) -> None:
        (self._passing.set if passing else self._passing.clear)()

    async def _refuse(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        await self._cut()

    async def _cut(self) -> None:
        await asyncio.sleep(0)  # those that were accepted just now, too
        for connection in list(self._live):
            connection.end(reset=True)
        await asyncio.sleep(0)

    async def _recover(self, cut: bool) -> None:
        if cut:
            await self._cut()
        self._passing.set()
        if self._listener is None:
            await self._listen()

    async def _lead_to(self, port: int) -> None:
        self._server_address = (self.host, port)

    async def _close(self) -> None:
        await self._refuse()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close with the loop's next pass

    async def passing(self) -> None:
        """Return when nothing is held back."""
        await self._passing.wait()


class _Connection:
    """One client's connection, and the one or two to the server that serve it."""

    def __init__(
        self, proxy: FaultyProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random
    ) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._rng = rng
        self._writers = [writer]
        self._drop_next = False
        self._delay = 0.0
        self._ended = False

    async def serve(self, server: tuple[str, int]) -> None:
        proxy = self._proxy
        duplicated = self._rng.random() < proxy.faults.duplicate
        await proxy.passing()
        if self._ended:  # cut while it was held back
            return
        try:
            from_server, to_server = await asyncio.open_connection(*server, limit=_CHUNK)
            self._writers.append(to_server)
            sinks = [to_server]
            pumps = [self._requests(sinks), self._replies(from_server)]
            if duplicated:
                proxy.counts["duplicate"] += 1
                from_second, second = await asyncio.open_connection(*server, limit=_CHUNK)
                self._writers.append(second)
                sinks.append(second)
                pumps.append(self._throw_away(from_second))
        except OSError:
            self.end(reset=True)  # no server: what a client of its would see, a little late
            return
        tasks = [asyncio.ensure_future(pump) for pump in pumps]
        try:
            await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.end()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _requests(self, sinks: list[asyncio.StreamWriter]) -> None:
        number = 0
        with contextlib.suppress(OSError):
            while data := await self._reader.read(_CHUNK):
                number += 1
                self._proxy.counts["requests"] += 1
                faults = self._proxy.faults
                # Drawn for each request, hit or not, so that one fault's share doesn't move another's places.
                reset, drop, delay = (self._rng.random() for _ in range(3))
                if number > faults.spare and faults.match in data:
                    if reset < faults.reset:
                        self._proxy.counts["reset"] += 1
                        self.end(reset=True)
                        return
                    if drop < faults.drop_reply:
                        self._drop_next = True
                    self._delay = delay * faults.delay
                await self._proxy.passing()
                for sink in sinks:
                    sink.write(data)
                await sinks[0].drain()

    async def _replies(self, from_server: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while data := await from_server.read(_CHUNK):
                if self._drop_next:
                    self._proxy.counts["drop_reply"] += 1
                    self.end(reset=True)
                    return
                if self._delay:
                    self._proxy.counts["delay"] += 1
                    delay, self._delay = self._delay, 0.0
                    await asyncio.sleep(delay)
                await self._proxy.passing()
                self._writer.write(data)
                await self._writer.drain()

    async def _throw_away(self, from_server: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while await from_server.read(_CHUNK):
                pass

    async def closed(self) -> None:
        """Close all ends and return when they are."""
        self.end()
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 1.0)
            writer.transport.abort()  # whoever doesn't read can't keep it open
        await asyncio.sleep(0)

    def end(self, *, reset: bool = False) -> None:
        """Close all ends; the client's by a reset if asked."""
        if self._ended:
            return
        self._ended = True
        if reset:
            endpoint = self._writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()
        for writer in self._writers:
            writer.close()
