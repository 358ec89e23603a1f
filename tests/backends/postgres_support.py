"""What the tests of the PostgreSQL store share."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from respan_guard.backends.base import Op, Outcome
from respan_guard.backends.postgres import PostgresBackend
from tests.backends import postgres_server

__all__ = ["Batcher", "asked", "opened", "script", "together", "url_fixture"]


@pytest.fixture(name="url")
def url_fixture() -> str:
    """A store of its own."""
    return postgres_server.new_store(postgres_server.given_or_started())


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[PostgresBackend]:
    """A store that is open inside the block."""
    backend = PostgresBackend(url, **options)
    await backend.open()
    backend._offset = 0  # the first sweep comes with the 64th batch, not with any before
    try:
        yield backend
    finally:
        await backend.close()


def asked(url: str, statement: str, *values: object) -> list[tuple[Any, ...]]:
    """Rows of a statement, on a connection beside the store's; {schema} stands for the store's schema."""
    server, _, schema = url.rpartition("schema=")
    with psycopg.connect(server.rstrip("?&"), autocommit=True) as db:
        cursor = db.execute(statement.replace("{schema}", f'"{schema}"').encode(), values or None)
        return cursor.fetchall() if cursor.description else []


class Batcher:
    """Batches that clock themselves, as a guard's home does: what arrived while the last one ran is the next."""

    def __init__(self, backend: PostgresBackend, now: int | None = None) -> None:
        self._backend = backend
        self._now = now
        self._waiting: list[tuple[Op, asyncio.Future[Outcome]]] = []
        self._task: asyncio.Task[None] | None = None

    def submit(self, *ops: Op) -> asyncio.Future[Outcome]:
        """Send operations with the next batch; the last one's outcome."""
        for op in ops:
            self._waiting.append((op, asyncio.get_running_loop().create_future()))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return self._waiting[-1][1]

    async def _drain(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:512], self._waiting[512:]
            outcomes = await self._backend.apply([op for op, _ in batch], self._now)
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if not future.done():
                    future.set_result(outcome)


def script(body: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python script of its own process; what it reads can be written to it."""
    return subprocess.Popen(
        [sys.executable, "-c", body, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def together(processes: list[subprocess.Popen[str]]) -> None:
    """Let scripts that say they are ready begin at once."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
