"""The same promises under uvicorn, hypercorn and granian, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from respan_guard.guard import Guard
from tests.middleware.support import CHAT, QUESTION

ROOT = Path(__file__).parents[2]
SERVERS = ["uvicorn", "hypercorn", "granian"]


def command(server: str, port: int) -> list[str]:
    """How to start a server with our app."""
    app = "tests.middleware.served:app"
    return [sys.executable, "-m", server] + {
        "uvicorn": [app, "--port", str(port), "--log-level", "warning", "--timeout-graceful-shutdown", "1"],
        "hypercorn": [app, "--bind", f"127.0.0.1:{port}", "--graceful-timeout", "1"],
        "granian": [app, "--interface", "asgi", "--port", str(port), "--workers-kill-timeout", "1", "--no-access-log"],
    }[server]


class Server:
    """A running server and a raw client to it."""

    def __init__(self, name: str, directory: str) -> None:
        self.name = name
        self.url = f"sqlite:///{directory}/guard.db"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        log = Path(directory, "log")
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                command(name, self.port),
                env=os.environ | {"GUARD_URL": self.url, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                break
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{name} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)

    @contextlib.asynccontextmanager
    async def connection(self, head: str, body: bytes = b"") -> AsyncIterator[tuple[StreamReader, StreamWriter]]:
        """A connection that has said so much; closed at the end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def request(
        self, customer: str | None, body: bytes, path: str = CHAT, method: str = "POST"
    ) -> contextlib.AbstractAsyncContextManager[tuple[StreamReader, StreamWriter]]:
        """A connection that has sent a request."""
        who = "" if customer is None else f"\nx-customer: {customer}"
        head = f"{method} {path} HTTP/1.1\nhost: x\nconnection: close\ncontent-length: {len(body)}{who}"
        return self.connection(head, body)

    async def ask(
        self, customer: str | None, path: str = CHAT, method: str = "POST", **asked: Any
    ) -> tuple[int, bytes]:
        """Send a request and read the whole response."""
        body = json.dumps(QUESTION | asked).encode() if method == "POST" else b""
        async with self.request(customer, body, path, method) as (reader, _):
            raw = await asyncio.wait_for(reader.read(), 20)
        return int(raw.split(b" ", 2)[1]), raw

    async def ledger(self, customer: str) -> dict[str, Any]:
        """What the store says of the customer."""
        status, raw = await self.ask(None, f"/ledger/{customer}", "GET")
        assert status == 200
        found = raw.partition(b"\r\n\r\n")[2]
        return dict(json.loads(found[found.index(b"{") : found.rindex(b"}") + 1]))

    async def settled(self, customer: str, kinds: list[str], requests: int = 1) -> dict[str, Any]:
        """Wait until nothing of the customer's is held, and check what was booked."""
        for _ in range(100):
            found = await self.ledger(customer)
            if found["holds"] == 0 and len(found["kinds"]) == len(kinds):
                break
            await asyncio.sleep(0.05)
        assert (found["holds"], found["kinds"], found["requests"]) == (0, kinds, requests)
        return found

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module", params=SERVERS)
def server(request: Any) -> Iterator[Server]:
    """One process for all cells of a server."""
    with tempfile.TemporaryDirectory() as directory:
        running = Server(request.param, directory)
        yield running
        running.stop()


async def test_whole_answers_and_streams(server: Server) -> None:
    """Replies and streams arrive whole, with the fields once, and are booked as read."""
    for how in ("whole", "stream"):
        status, raw = await server.ask(f"ok-{how}", how=how)
        assert status == 200
        assert raw.lower().count(b"\r\nratelimit:") == 1
        await server.settled(f"ok-{how}", ["usage"])


async def test_errors_of_the_app(server: Server) -> None:
    """The app's exception is the server's 500, and nothing was spent."""
    status, _ = await server.ask("broken", how="raise")
    assert status == 500
    await server.settled("broken", [])


async def test_a_client_that_leaves_mid_stream(server: Server) -> None:
    """A disconnect while the stream runs ends the admission once, and the call is presumed."""
    async with server.request("leaver", json.dumps(QUESTION | {"how": "endless"}).encode()) as (reader, _):
        await reader.readuntil(b"data: ")
    await server.settled("leaver", ["presumed"])


async def test_a_client_that_leaves_before_the_answer(server: Server) -> None:
    """The handler runs to its end for nobody, and what it did is booked."""
    async with server.request("impatient", json.dumps(QUESTION | {"how": "slow"}).encode()):
        await asyncio.sleep(0.2)
    found = await server.settled("impatient", ["usage"])
    assert found["done"].count("slow") == 1


async def test_a_client_that_leaves_a_gateway_that_notices(server: Server) -> None:
    """The handler hears of it and stops waiting for the provider, who bills all the same: the call is presumed."""
    async with server.request("hasty", json.dumps(QUESTION | {"how": "leaving"}).encode()):
        await asyncio.sleep(0.2)
    await server.settled("hasty", ["presumed"])


async def test_a_client_that_leaves_while_it_asks(server: Server) -> None:
    """Half a body: no admission."""
    head = f"POST {CHAT} HTTP/1.1\nhost: x\nx-customer: half\ncontent-length: 500"
    async with server.connection(head, b'{"model": '):
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.1)
    await server.settled("half", [], requests=0)


async def test_refused_without_reading_the_upload(server: Server) -> None:
    """Nobody's upload of 5 MB is refused before all of it is sent, and the client can read why."""
    head = "POST /v1/files HTTP/1.1\nhost: x\ncontent-length: 5000000"
    async with server.connection(head) as (reader, writer):
        answer = asyncio.create_task(reader.readline())
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 4_900_000 and not answer.done():
                writer.write(b"x" * 100_000)
                sent += 100_000
                await writer.drain()
                await asyncio.sleep(0.001)
        assert b" 401 " in await asyncio.wait_for(answer, 10)


async def test_expect_continue_is_answered_by_the_refusal(server: Server) -> None:
    """A client that asks before it sends its body gets the refusal (hypercorn says 100 first)."""
    head = "POST /v1/files HTTP/1.1\nhost: x\ncontent-length: 9\nexpect: 100-continue"
    async with server.connection(head) as (reader, _):
        first = await asyncio.wait_for(reader.readline(), 10)
        if server.name == "hypercorn":
            assert b" 100 " in first
            await reader.readuntil(b"\r\n\r\n")
            first = await asyncio.wait_for(reader.readline(), 10)
        assert b" 401 " in first


async def test_an_admitted_upload_arrives_whole(server: Server) -> None:
    """A body beyond the cap, on a path that is no call, reaches the app to the last byte."""
    async with server.request("uploader", b"x" * 3_000_000, "/v1/files") as (reader, _):
        raw = await asyncio.wait_for(reader.read(), 20)
    assert b"3000000" in raw
    await server.settled("uploader", [])


@pytest.mark.parametrize(
    "path",
    ["/v1/chat%2fcompletions", "/v1/%63hat/completions", "/%761/chat/completions", "//v1/chat/completions",
     "/v1//chat/completions", "/./v1/chat/completions", "/x/../v1/chat/completions", "/v1/chat/completions/",
     "/v1/chat/completions?x=/health", "/V1/chat/completions", "/v1%2e/chat/completions", "/v1/chat/completions%00"],
)  # fmt: skip
async def test_no_spelling_slips_by(server: Server, path: str) -> None:
    """Without an identity, however the path is spelled on the wire: never an answer of the endpoint."""
    status, raw = await server.ask(None, path)
    assert status in (307, 400, 401, 404)
    assert b"chat.completion" not in raw


@pytest.mark.parametrize("name", SERVERS)
async def test_terminated_in_the_middle(name: str) -> None:
    """SIGTERM while a stream runs: the store verifies, and what was not ended no longer counts after its expiry."""
    with tempfile.TemporaryDirectory() as directory:
        running = Server(name, directory)
        try:
            body = json.dumps(QUESTION | {"how": "endless"}).encode()
            async with running.request("inflight", body) as (reader, _):
                await reader.readuntil(b"data: ")
                await running.ask("before")
                running.process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(running.process.wait, 15)
        finally:
            running.stop()
        async with Guard(running.url) as guard:
            assert await guard.verify() == []
            assert [record.kind async for record in guard.records("before")] == ["usage"]
            kinds = [record.kind async for record in guard.records("inflight")]
            if name != "granian":  # it gives the app no chance to end; the hold's expiry is the answer then
                assert kinds == ["presumed"]
            later = guard.now_ms() + 60_000
            assert await guard.lane().call(lambda backend: backend.holds(now=later)) == []
