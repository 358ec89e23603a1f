"""Sessions that can't be used any more are left, and a store is closed in time whatever its server does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from respan_guard import Guard, Usage
from respan_guard.backends.postgres import PostgresBackend
from respan_guard.errors import StorageReadOnly, StorageUnavailable
from tests.backends.postgres_server import PostgresServer
from tests.backends.postgres_support import opened, url_fixture
from tests.backends.sqlite_support import NOW, record
from tests.faulty_proxy import FaultyProxy

__all__ = ["url_fixture"]


def through(url: str, proxy: FaultyProxy) -> str:
    """The same store by the proxy's port."""
    return url.replace(f":{urlsplit(url).port}/", f":{proxy.port}/")


def proxy_of(url: str) -> FaultyProxy:
    """A proxy in front of a server."""
    port = urlsplit(url).port
    assert port is not None
    return FaultyProxy(port)


# -- sessions that only read -----------------------------------------------------------------------


@pytest.fixture(name="server")
def server_fixture() -> Iterator[PostgresServer]:
    """A server of the test's own."""
    started = PostgresServer.newest()
    yield started
    started.delete()


async def test_a_standby_is_left_for_the_primary(server: PostgresServer) -> None:
    """The address led to a standby for a while: no restart is needed once it leads to a primary again."""
    standby = server.standby()
    with proxy_of(server.url) as proxy:
        async with opened(through(server.url, proxy)) as backend:
            await backend.apply([record("before")], NOW)
            proxy.lead_to(standby.port)
            proxy.cut()
            for _ in range(2):
                with pytest.raises(StorageReadOnly):
                    await backend.apply([record("meanwhile")], NOW)
            with pytest.raises(StorageReadOnly):
                await backend.put("alice", {"name": "Alice"})
            proxy.lead_to(server.port)
            await backend.apply([record("after")], NOW)
            await backend.put("alice", {"name": "Alice"})
            row = await backend.get("alice")
            assert row is not None
            assert row.totals.calls == 2
    standby.delete()


async def test_a_session_of_when_the_database_was_read_only_is_left(server: PostgresServer) -> None:
    """It keeps that setting for good; another one writes, and nobody hears of it."""
    setting = "default_transaction_read_only"
    async with opened(server.url) as backend:
        await backend.apply([record("before")], NOW)
        with psycopg.connect(server.url, autocommit=True) as other:
            other.execute(f"ALTER DATABASE postgres SET {setting} = on".encode())
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'respan_guard'"
            )
            with pytest.raises(StorageReadOnly):
                await backend.apply([record("meanwhile")], NOW)
            assert backend._write_link is not None
            await backend._write_link.open()
            other.execute(f"ALTER DATABASE postgres RESET {setting}".encode())
        await backend.apply([record("after")], NOW)
        row = await backend.get("alice")
        assert row is not None
        assert row.totals.calls == 2


# -- closing ---------------------------------------------------------------------------------------


async def test_closing_does_not_wait_for_a_sweep(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep may take as long as a page; the store is closed all the same, and what it stored is there."""

    async def slow(db: psycopg.AsyncConnection[tuple[object, ...]], *_: object) -> None:
        await db.execute("SELECT pg_sleep(30)")

    async with asyncio.timeout(15):
        async with opened(url) as backend:
            monkeypatch.setattr(backend._changes, "sweep", slow)
            for number in range(64):
                await backend.apply([record(f"e{number}")], NOW)
            await asyncio.sleep(0.05)
            assert backend._sweeping is not None
            assert not backend._sweeping.done()
    async with opened(url) as backend:
        row = await backend.get("alice")
        assert row is not None
        assert row.totals.calls == 64
        assert await backend.verify() == []


async def test_closing_does_not_wait_for_a_connection_that_is_made(url: str) -> None:
    """A server that takes connections and says nothing: who waits for one is told, the store is closed."""
    async with opened(url):
        pass
    with proxy_of(url) as proxy:
        backend = PostgresBackend(through(url, proxy))
        await backend.open()
        proxy.black_hole()
        page, proof = asyncio.create_task(backend.get("alice")), asyncio.create_task(backend.verify())
        await asyncio.sleep(0.05)
        proof.cancel()  # it has a connection of its own, and hours
        closing = asyncio.create_task(backend.close())
        done, _ = await asyncio.wait({page, proof, closing}, timeout=5)
        assert done == {page, proof, closing}
        assert proof.cancelled()
        assert isinstance(page.exception(), StorageUnavailable)
        proxy.recover(cut=True)


async def test_a_guard_closes_in_time_and_loses_nothing(url: str, tmp_path: Path) -> None:
    """The host falls silent: a record that it did not take is on disk, and booked once by who comes next."""
    async with opened(url):
        pass
    with proxy_of(url) as proxy:
        target = through(url, proxy)
        guard = Guard(target, journal_dir=tmp_path)
        await guard.open()
        async with guard.admit("alice") as admission:
            await admission.record(Usage(model="m", cost=Decimal(1)))
        await guard.flush()
        proxy.black_hole()
        proxy.cut()
        looking = asyncio.create_task(guard.status("alice"))  # the reader's connection is being made
        await asyncio.sleep(0.2)
        await guard.record(Usage(model="m", cost=Decimal(2)), "alice")
        began = time.monotonic()
        await guard.aclose()
        assert time.monotonic() - began < 15
        with pytest.raises(StorageUnavailable):
            await looking
        proxy.recover(cut=True)
        async with Guard(target, journal_dir=tmp_path) as later:
            async with asyncio.timeout(20):
                while len(found := [entry async for entry in later.records()]) < 2:
                    await asyncio.sleep(0.05)
            assert {entry.cost for entry in found} == {1, 2}
            assert len(found) == 2
            assert (await later.status("alice")).total_spend == 3
            assert await later.verify() == []
