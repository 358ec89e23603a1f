"""The proxy that the fault tests stand on does what it says, and only that."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from .faulty_proxy import Faults, FaultyProxy


class Echo:
    """A server that counts: to each line it answers "LINE N", N lines so far on all connections."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.connections = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(5)

    def _run(self) -> None:
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while line := await reader.readline():
                self.lines.append(line.strip())
                writer.write(line.strip() + b" %d\n" % len(self.lines))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self.connections -= 1
            self._tasks.discard(task)
            writer.close()

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()


@pytest.fixture
def server() -> Iterator[Echo]:
    """The server behind the proxy."""
    echo = Echo()
    yield echo
    echo.close()


class Client:
    """A connection that asks and waits for its answer."""

    def __init__(self, proxy: FaultyProxy) -> None:
        self._socket = socket.create_connection((proxy.host, proxy.port), 10.0)
        self._file = self._socket.makefile("rwb")

    def ask(self, line: bytes) -> bytes:
        self._file.write(line + b"\n")
        self._file.flush()
        answer = self._file.readline()
        if not answer:
            raise ConnectionError("closed")
        return answer.strip()

    def hurry(self) -> None:
        """Wait a tenth of a second only, from now on."""
        self._socket.settimeout(0.1)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._socket.close()


def asked(proxy: FaultyProxy, count: int) -> list[bool]:
    """Ask so often, with a new connection after each failure; whether each got its answer."""
    client = Client(proxy)
    found = []
    for number in range(count):
        try:
            answer = client.ask(b"q%d" % number)
        except OSError:
            found.append(False)
            client.close()
            client = Client(proxy)
        else:
            assert answer.startswith(b"q%d " % number)
            found.append(True)
    client.close()
    return found


def eventually(condition: object, *, within: float = 5.0) -> None:
    """Wait until it is so."""
    assert callable(condition)
    until = time.monotonic() + within
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.005)


def test_without_faults_everything_passes_and_ends(server: Echo) -> None:
    """Bytes of any size come through whole, and a client that leaves takes its connection to the server along."""
    with FaultyProxy(server.port) as proxy:
        client = Client(proxy)
        long = b"x" * 60_000
        assert client.ask(b"hello") == b"hello 1"
        assert client.ask(long) == long + b" 2"
        client.close()
        eventually(lambda: server.connections == 0)
        eventually(lambda: proxy.open_connections == 0)
        assert proxy.counts["connections"] == 1
        assert set(proxy.counts) == {"connections", "requests"}


def test_a_dropped_reply_is_of_a_request_that_was_carried_out(server: Echo) -> None:
    """Each request reaches the server exactly once; a share of the answers never comes back."""
    with FaultyProxy(server.port, faults=Faults(drop_reply=0.3), seed=1) as proxy:
        found = asked(proxy, 200)
        assert server.lines == [b"q%d" % number for number in range(200)]
        assert found.count(False) == proxy.counts["drop_reply"]
        assert 30 < found.count(False) < 90


def test_a_reset_request_is_never_carried_out(server: Echo) -> None:
    """A share of the requests doesn't reach the server, and the client is told by a reset."""
    with FaultyProxy(server.port, faults=Faults(reset=0.3), seed=1) as proxy:
        found = asked(proxy, 200)
        assert server.lines == [b"q%d" % number for number, answered in enumerate(found) if answered]
        assert found.count(False) == proxy.counts["reset"] > 30


def test_the_same_seed_hits_the_same_requests(server: Echo) -> None:
    """A run can be repeated, and another seed is another run."""

    def run(seed: int) -> list[bool]:
        with FaultyProxy(server.port, faults=Faults(drop_reply=0.2, reset=0.1), seed=seed) as proxy:
            return asked(proxy, 100)

    first = run(7)
    assert run(7) == first
    assert run(8) != first


def test_a_duplicated_connection_has_every_request_carried_out_twice(server: Echo) -> None:
    """The client sees the answers to the first of the two only."""
    with FaultyProxy(server.port, faults=Faults(duplicate=1.0)) as proxy:
        client = Client(proxy)
        for number in range(20):
            assert client.ask(b"q%d" % number).startswith(b"q%d " % number)
        eventually(lambda: len(server.lines) == 40)
        assert sorted(server.lines) == sorted([b"q%d" % number for number in range(20)] * 2)
        client.close()
        eventually(lambda: server.connections == 0)


def test_a_delayed_reply_comes_whole_and_in_order(server: Echo) -> None:
    """Each answer is held back at random, none is lost or overtaken."""
    with FaultyProxy(server.port, faults=Faults(delay=0.02), seed=3) as proxy:
        assert all(asked(proxy, 30))
        assert proxy.counts["delay"] == 30


def test_the_first_requests_of_a_connection_can_be_spared_and_others_picked(server: Echo) -> None:
    """A handshake stays whole, and only requests with certain bytes in them are hit."""
    with FaultyProxy(server.port, faults=Faults(drop_reply=1.0, spare=2)) as proxy:
        client = Client(proxy)
        client.ask(b"one")
        client.ask(b"two")
        with pytest.raises(OSError, match=r"closed|reset"):
            client.ask(b"three")
        client.close()
        proxy.faults = Faults(drop_reply=1.0, match=b"write")
        client = Client(proxy)
        client.ask(b"read")
        with pytest.raises(OSError, match=r"closed|reset"):
            client.ask(b"write")
        client.close()
        assert server.lines[-1] == b"write"


def test_a_black_hole_swallows_and_delivers_late(server: Echo) -> None:
    """Neither old nor new connections get an answer; after recovery what was sent arrives after all."""
    with FaultyProxy(server.port) as proxy:
        client = Client(proxy)
        client.ask(b"before")
        proxy.black_hole()
        client.hurry()
        with pytest.raises(TimeoutError):
            client.ask(b"into the hole")
        late = Client(proxy)  # connecting works
        late.hurry()
        with pytest.raises(TimeoutError):
            late.ask(b"too")
        assert server.lines == [b"before"]
        proxy.recover()
        eventually(lambda: sorted(server.lines) == [b"before", b"into the hole", b"too"])
        client.close()
        late.close()


def test_a_black_hole_that_is_cut_delivers_nothing(server: Echo) -> None:
    """What was sent into it is gone with its connections; new ones work."""
    with FaultyProxy(server.port) as proxy:
        client = Client(proxy)
        client.ask(b"before")
        proxy.black_hole()
        client.hurry()
        with pytest.raises(TimeoutError):
            client.ask(b"into the hole")
        client.close()
        proxy.recover(cut=True)
        again = Client(proxy)
        assert again.ask(b"after") == b"after 2"
        again.close()


def test_a_refused_port_comes_back_where_it_was(server: Echo) -> None:
    """Connections are cut and refused, then the same address serves again."""
    with FaultyProxy(server.port) as proxy:
        client = Client(proxy)
        client.ask(b"before")
        proxy.refuse()
        with pytest.raises(OSError, match=r"closed|reset"):
            client.ask(b"gone")
        with pytest.raises(ConnectionRefusedError):
            Client(proxy)
        client.close()
        proxy.recover()
        again = Client(proxy)
        assert again.ask(b"after") == b"after 2"
        proxy.cut()
        with pytest.raises(OSError, match=r"closed|reset"):
            again.ask(b"cut")
        again.close()


def _asked(proxy: FaultyProxy) -> None:
    client = Client(proxy)
    try:
        client.ask(b"hello")
    finally:
        client.close()


def test_without_a_server_clients_are_cut() -> None:
    """The proxy stands, what it stands before does not: a client's connection ends at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with FaultyProxy(free.getsockname()[1]) as proxy, pytest.raises(OSError, match=r"closed|reset|Broken"):
            _asked(proxy)  # cut while it connects, or when it asks
