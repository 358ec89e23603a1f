"""What can be wrong with a URL, a server or a store, and that each is said for what it is."""

from __future__ import annotations

import asyncio
import builtins
import secrets
import sys
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from respan_guard import Guard
from respan_guard.backends.base import Limit, RecordQuery
from respan_guard.backends.postgres import PostgresBackend
from respan_guard.backends.postgres import schema as schema_module
from respan_guard.backends.postgres.schema import MIGRATIONS
from respan_guard.backends.registry import backend_factory
from respan_guard.errors import (
    BackendError,
    ConfigurationError,
    CounterOverflow,
    InvalidInput,
    SchemaMismatch,
    StorageCorrupt,
    StorageReadOnly,
    StorageUnavailable,
    StoreReset,
)
from tests.backends import postgres_server
from tests.backends.postgres_support import asked, opened, url_fixture
from tests.backends.sqlite_support import NOW, admit, record

__all__ = ["url_fixture"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://u:secret@h/db?nonsense=1", "unknown option 'nonsense'"),
        ("postgresql://u:secret@h:port/db", "port"),
        ("postgresql://h/db?timeout=soon", "timeout must be seconds"),
        ("postgresql://h/db?timeout=0", "timeout must be seconds"),
        ("postgresql://h/db?schema=a%22b", "can't name a schema"),
        ("postgresql://h/db?schema=pg_mine", "can't name a schema"),
        ("postgresql://h/db?schema=" + "x" * 64, "can't name a schema"),
    ],
)
def test_a_url_that_can_not_work(url: str, message: str) -> None:
    """It is refused when the guard is made, with what is wrong and no password in it."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        PostgresBackend(url)
    assert "secret" not in str(caught.value)


def test_an_option_that_is_not_known() -> None:
    """The ones that are get named."""
    with pytest.raises(ConfigurationError, match="known: schema, timeout"):
        PostgresBackend("postgresql://h/db", synchronous="full")


def test_without_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    for name in [name for name in sys.modules if name.startswith(("psycopg", "respan_guard.backends.postgres"))]:
        monkeypatch.delitem(sys.modules, name)
    importing = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "psycopg":
            raise ImportError("No module named 'psycopg'")
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for scheme in ("postgresql", "postgres"):
        with pytest.raises(ConfigurationError, match=r"pip install 'respan-guard\[postgres\]'"):
            backend_factory(f"{scheme}://localhost/db")


async def test_a_refused_connection() -> None:
    """Nobody listens there: unavailable, not misconfigured, since a server may come."""
    backend = PostgresBackend(f"postgresql://u:secret@127.0.0.1:{postgres_server._free_port()}/db")
    with pytest.raises(StorageUnavailable, match="can't be reached") as caught:
        await backend.open()
    assert "secret" not in str(caught.value)
    await backend.close()


@pytest.fixture(scope="module")
def server() -> Iterator[postgres_server.PostgresServer]:
    """A server with a user who needs a password, to do to as these tests like."""
    started = postgres_server.PostgresServer.newest(max_wal_senders="3")
    with psycopg.connect(started.url, autocommit=True) as db:
        db.execute(f"CREATE ROLE {postgres_server.LOCKED} LOGIN PASSWORD 'right'".encode())
    yield started
    started.delete()


def as_locked(server: postgres_server.PostgresServer, password: str = "") -> str:
    """The server's URL for the user who needs a password."""
    return server.url.replace("postgres@", f"{postgres_server.LOCKED}{password and ':'}{password}@")


@pytest.mark.parametrize("password", ["wrong", ""])
async def test_a_wrong_password(server: postgres_server.PostgresServer, password: str) -> None:
    """Said for what it is, without the password."""
    with pytest.raises(ConfigurationError, match="password") as caught:
        await PostgresBackend(as_locked(server, password)).open()
    assert "wrong" not in str(caught.value)


async def test_names_that_the_server_does_not_know(server: postgres_server.PostgresServer) -> None:
    """A database, a user, a host."""
    with pytest.raises(ConfigurationError, match="no such database"):
        await PostgresBackend(server.url.removesuffix("postgres") + "nowhere").open()
    with pytest.raises(ConfigurationError, match="no such user"):
        await PostgresBackend(server.url.replace("postgres@", "nobody-at-all@")).open()
    with pytest.raises(StorageUnavailable, match="reached"):  # name servers fail, too: it may well come back
        await PostgresBackend(server.url.replace("127.0.0.1", "no.such.host.invalid")).open()


async def test_a_user_who_may_not_make_a_schema(server: postgres_server.PostgresServer) -> None:
    """It says what to grant; with that, it works."""
    url = f"{as_locked(server, 'right')}?schema=granted"
    with pytest.raises(ConfigurationError, match="GRANT CREATE ON DATABASE"):
        await PostgresBackend(url).open()
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute(f"CREATE SCHEMA granted AUTHORIZATION {postgres_server.LOCKED}".encode())
    async with opened(url) as backend:
        await backend.apply([record("e")], NOW)
        assert await backend.verify() == []


async def test_a_standby_is_read_only(server: postgres_server.PostgresServer) -> None:
    """A server that follows another one is refused at the start, whether it has the store or not."""
    async with opened(f"{server.url}?schema=followed"):
        pass
    follower = server.standby()
    try:
        for schema in ("followed", "not_there"):
            with pytest.raises(StorageReadOnly, match="standby"):
                await PostgresBackend(f"{follower.url}?schema={schema}").open()
    finally:
        follower.delete()


async def test_a_server_that_becomes_read_only(server: postgres_server.PostgresServer) -> None:
    """While it runs: batches say so, pages are still shown, and it goes on by itself."""
    async with opened(f"{server.url}?schema=frozen") as backend:
        await backend.apply([record("e")], NOW)
        with psycopg.connect(server.url, autocommit=True) as db:
            db.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            db.execute("SELECT pg_reload_conf()")
            try:
                for _ in range(100):
                    try:
                        await backend.apply([record("f")], NOW)
                    except StorageReadOnly:
                        break
                    await asyncio.sleep(0.02)
                else:
                    pytest.fail("it was never read-only")
                assert len(await backend.entries(RecordQuery(limit=1))) == 1
            finally:
                db.execute("SET default_transaction_read_only = off")
                db.execute("ALTER SYSTEM RESET default_transaction_read_only")
                db.execute("SELECT pg_reload_conf()")
        for _ in range(100):
            try:
                await backend.apply([record("g")], NOW)
                break
            except StorageReadOnly:
                await asyncio.sleep(0.02)
        assert await backend.verify() == []


async def test_a_store_of_a_newer_version(url: str) -> None:
    """It is not touched."""
    async with opened(url):
        pass
    asked(url, f"UPDATE {{schema}}.store SET version = {len(MIGRATIONS) + 1}")
    with pytest.raises(SchemaMismatch, match=f"has schema version {len(MIGRATIONS) + 1}.* knows {len(MIGRATIONS)}"):
        await PostgresBackend(url).open()


async def test_a_store_of_an_older_version(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is brought up to date, however much longer than a batch that may take; whoever opens it meanwhile waits."""
    with monkeypatch.context() as older:
        older.setattr(schema_module, "MIGRATIONS", MIGRATIONS[:3])
        async with opened(url) as backend:
            await backend.apply([record("g", cost=None)], NOW)
    server, _, schema = url.rpartition("?schema=")
    async with await psycopg.AsyncConnection.connect(server) as other:
        await other.execute(f'LOCK TABLE "{schema}".entries'.encode())
        backends = [PostgresBackend(url, timeout=0.1) for _ in range(2)]
        opening = [asyncio.create_task(backend.open()) for backend in backends]
        done, _ = await asyncio.wait(opening, timeout=1.0)  # ten times a batch's time
        assert not done
        await other.rollback()
    await asyncio.gather(*opening)
    assert asked(url, "SELECT version FROM {schema}.store") == [(len(MIGRATIONS),)]
    for backend in backends:
        assert await backend.verify() == []
        await backend.close()


async def test_a_schema_of_something_else(url: str) -> None:
    """It is not touched either, not even if it has a table of that name."""
    asked(url, "CREATE SCHEMA {schema}")
    asked(url, "CREATE TABLE {schema}.users (name text)")
    with pytest.raises(StorageCorrupt, match="something else"):
        await PostgresBackend(url).open()
    asked(url, "CREATE TABLE {schema}.store (name text)")
    with pytest.raises(StorageCorrupt, match="something else"):
        await PostgresBackend(url).open()
    assert asked(url, "SELECT count(*) FROM pg_tables WHERE schemaname = %s", url.rpartition("=")[2]) == [(2,)]


@pytest.mark.parametrize(
    "wipe",
    [
        "DROP SCHEMA {schema} CASCADE",
        "TRUNCATE {schema}.store",
        "UPDATE {schema}.store SET epoch = 'another'",
        "DROP TABLE {schema}.customers",
    ],
)
async def test_a_wiped_store_is_not_zero_spend(url: str, wipe: str) -> None:
    """Wiped, emptied or replaced while it is open: every batch says so, none begins at zero."""
    async with opened(url) as backend:
        await backend.apply([record("e")], NOW)
        asked(url, wipe)
        for _ in range(2):
            with pytest.raises(StoreReset, match="restart"):
                await backend.apply([admit("a")], NOW)


async def test_data_that_can_not_be_stored(url: str) -> None:
    """It is the data's fault, not the storage's: it is not tried for ever, and what travels with it is unharmed."""
    async with opened(url) as backend:
        for poison in (record("a\0b"), record("a", status="\ud800"), record(secrets.token_hex(50_000))):
            with pytest.raises(ValueError):  # noqa: PT011 - whatever the driver says
                await backend.apply([record("good"), poison], NOW)
        with pytest.raises(InvalidInput):
            await backend.apply([record("a\0b")], NOW)
        assert await backend.entries(RecordQuery()) == []
        await backend.apply([record("good")], NOW)
        assert await backend.verify() == []


async def test_requests_beyond_the_range(url: str) -> None:
    """A sum that the tables refuse is an overflow, not a damaged store."""
    requests = Limit("n", "total", "requests", 9 * 10**15)
    async with opened(url) as backend:
        ask = admit("a", cost=0, limits=(requests,))
        ask.requests = 9 * 10**15
        await backend.apply([ask], NOW)
        with pytest.raises(CounterOverflow):
            await backend.apply([admit("b", cost=0, limits=())], NOW)
        assert await backend.verify() == []


async def test_a_guard_says_what_is_wrong_at_start() -> None:
    """Not later, at a customer's request."""
    with pytest.raises(BackendError, match="can't be reached"):
        async with Guard(f"postgresql://127.0.0.1:{postgres_server._free_port()}/db"):
            pass


async def test_a_server_that_loses_on_a_crash_is_warned_of(url: str) -> None:
    """fsync=off, as the tests' own server has it: not durable, and why."""
    async with opened(url) as backend:
        info = await backend.info()
        (off,) = asked(url, "SELECT current_setting('fsync') = 'off'")[0]
        assert info.durable is not off
        assert bool(info.warnings) == off
        assert info.facts["schema"] == url.rpartition("=")[2]


async def test_namespaces_are_apart(url: str) -> None:
    """Several guards in one database: the same ids are other customers."""
    async with opened(url) as one, opened(url, namespace="other.one-2") as other:
        await one.apply([record("e", cost=5)], NOW)
        await other.apply([record("e", cost=7)], NOW)
        rows = [await backend.get("alice") for backend in (one, other)]
        assert [row.totals.cost for row in rows if row] == [5, 7]
        assert await other.verify() == []


async def test_tampering_is_found(url: str) -> None:
    """Sums that are not the entries', in each table that keeps any."""
    async with opened(url) as backend:
        for table, change in (
            ("rollups", "cost = cost + 1"),
            ("customers", "calls = calls + 1"),
            ("customers", "active_days = active_days + 1"),
            ("customers", "held_cost = held_cost + 1"),
            ("customers", "span_cost = span_cost + 1"),
            ("totals", "output_tokens = output_tokens + 1"),
            ("totals", "customers = customers + 1"),
            ("totals", "cost = cost + 1 WHERE unit = 'h'"),
            ("entries", "cost = cost + 1"),
            ("store", "seq = 0"),
        ):
            await backend.apply([admit(f"{table}{change}"), record(f"{table}{change}")], NOW)
            assert await backend.verify() == []
            asked(url, f"UPDATE {{schema}}.{table} SET {change}")
            assert await backend.verify() != [], (table, change)
            left, _, added = change.partition(" = ")
            back = added.replace("+", "-") if "+" in added else "(SELECT max(seq) FROM {schema}.entries)"
            asked(url, f"UPDATE {{schema}}.{table} SET {left} = {back}")
