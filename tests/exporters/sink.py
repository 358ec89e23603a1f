"""A server that keeps what it is sent and answers as it is told, faults included; and an exporter like it."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

from respan_guard import Guard, Usage, UsageRecord
from respan_guard.dead_letters import DeadLetters
from respan_guard.delivery import Delivery, cursor_name
from respan_guard.exporters import Exporter, ExportResult


@dataclass
class Posted:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Its body."""
        return json.loads(self.body)


@dataclass
class Sink:
    """Plain HTTP/1.1, so that any fault can be played.

    Attributes:
        answer: Says what to answer: (status, headers, body), or "reset", "hang", "garbage".
        posted: What came.
        tls: Its certificate, if it speaks TLS.
    """

    answer: Callable[[Posted], tuple[int, dict[str, str], bytes] | str] = lambda posted: (200, {}, b"")
    posted: list[Posted] = field(default_factory=list)
    tls: ssl.SSLContext | None = None
    _server: asyncio.Server | None = None
    _clients: set[asyncio.StreamWriter] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._clients):
            writer.transport.abort()
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/hook"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while await self._one(reader, writer):
                    pass
        finally:
            self._clients.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        posted = Posted(first.split()[1], headers, body)
        self.posted.append(posted)
        answer = self.answer(posted)
        if answer == "reset":
            writer.transport.abort()
            return False
        if answer == "hang":
            await asyncio.sleep(60)
            return False
        if isinstance(answer, str):
            writer.write(b"\x00\x01 this is no HTTP\r\n\r\n")
            return False
        status, fields, content = answer
        text = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(content)}\r\n{text}\r\n".encode() + content)
        await writer.drain()
        return True


class Keeper:
    """An exporter in memory. `fault` is called with each batch before it is kept, and may raise."""

    def __init__(self, name: str = "keeper", batch_size: int = 10) -> None:
        self.name = name
        self.batch_size = batch_size
        self.kept: list[UsageRecord] = []
        self.batches: list[int] = []
        self.fault: Callable[[Sequence[UsageRecord]], ExportResult | None] = lambda batch: None

    async def export(self, batch: Sequence[UsageRecord]) -> ExportResult | None:
        """Keep a batch, but for the rows that the fault rejects."""
        self.batches.append(len(batch))
        result = self.fault(batch)
        rejected = result.rejected if result is not None else {}
        self.kept += [record for place, record in enumerate(batch) if place not in rejected]
        return result

    @property
    def ids(self) -> set[str]:
        """Of what it has."""
        return {record.id for record in self.kept}


async def book(guard: Guard, count: int, customer: str = "c1", start: int = 0, **usage: Any) -> list[str]:
    """Record calls; their ids."""
    for number in range(start, start + count):
        fields: dict[str, Any] = {"model": "gpt-4o", "input_tokens": 10, "cost": "0.000001"} | usage
        call = Usage(**fields)
        await guard.record(call, customer, entry_id=f"r{number}")
    await guard.flush()
    return [f"own:r{number}" for number in range(start, start + count)]


def delivery(guard: Guard, exporter: Exporter, owner: str = "one") -> Delivery:
    """One exporter's delivery, to be stepped by hand."""
    return Delivery(guard, exporter, owner)


async def pending(guard: Guard, name: str) -> set[str]:
    """Ids of records behind an exporter's cursor."""
    lane = guard.lane()
    cursor = await lane.call(lambda backend: backend.cursor(cursor_name(name))) or 0
    return {record.id async for record in guard.records() if record.sequence > cursor}


async def dead(guard: Guard, name: str) -> dict[str, str]:
    """Dead letters: id and reason."""
    letters = DeadLetters(name)

    async def read(backend: Any) -> dict[str, str]:
        found = {}
        async for letter in letters.all(backend):
            record = await letters.record(backend, letter)
            assert record is not None
            found[record.id] = letter.reason
        return found

    return await guard.lane().call(read)


async def check_nothing_is_lost(guard: Guard, name: str, delivered: set[str]) -> None:
    """Delivered, pending and dead letters together are what was committed."""
    committed = {record.id async for record in guard.records()}
    assert Counter(delivered | await pending(guard, name) | set(await dead(guard, name))) == Counter(committed)
