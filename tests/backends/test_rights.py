"""Users who may do what the docs say they need, and no more: everything works for them."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from respan_guard.backends.base import Allowed, Backend, CustomerQuery, Recorded
from respan_guard.backends.postgres import PostgresBackend
from respan_guard.backends.redis import RedisBackend
from respan_guard.backends.registry import backend_factory
from respan_guard.errors import ConfigurationError, GuardError, StorageReadOnly
from respan_guard.testing import BackendContract
from tests.backends import redis_server
from tests.backends.living import checked, live
from tests.backends.postgres_server import PostgresServer, emptied_store
from tests.backends.redis_server import Cluster, RedisServer
from tests.backends.sqlite_support import admit, record

DOCS = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()
SAFE = ("appendonly yes", "appendfsync always")


# -- Redis -----------------------------------------------------------------------------------------


def told_acl() -> list[str]:
    """The rules that the docs give."""
    found = re.search(r"An ACL for the library:\s+`([^`]+)`", DOCS)
    assert found is not None
    return found[1].split()


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """A server whose user `guard` has the ACL of the docs."""
    server = RedisServer(*SAFE)
    assert server.command("ACL", "SETUSER", "guard", "on", ">pw", *told_acl()) == b"+OK\r\n"
    yield server
    server.stop()


def as_guard(url: str) -> str:
    """The same server, as that user."""
    return url.replace("://", "://guard:pw@", 1)


class TestRedisACL(BackendContract):
    """The whole contract is kept."""

    @pytest.fixture(autouse=True)
    def server(self, redis: RedisServer) -> None:
        self.url = as_guard(redis.url)

    async def open_backend(self) -> Backend:
        backend = RedisBackend(self.url, namespace=f"test-{secrets.token_hex(6)}")
        await backend.open()
        return backend


@pytest.mark.parametrize("name", redis_server.binaries())
def test_the_acl_is_enough_for_an_app_and_its_operator(name: str) -> None:
    """A guard with its kill switch, `respan-guard check`, which sees the settings, and `respan-guard verify`."""
    server = RedisServer(*SAFE, path=redis_server.binaries()[name])
    assert server.command("ACL", "SETUSER", "guard", "on", ">pw", *told_acl()) == b"+OK\r\n"
    asyncio.run(live(as_guard(server.url), namespace="app"))
    told = checked(as_guard(server.url))
    assert told["ok"], told
    assert told["storage"]["facts"]["appendfsync"] == "always"
    assert told["storage"]["warnings"] == []
    server.stop()


def test_the_acl_is_enough_on_a_cluster() -> None:
    """Each node has the user."""
    cluster = Cluster()
    for node in cluster.nodes:
        assert node.command("ACL", "SETUSER", "guard", "on", ">pw", *told_acl()) == b"+OK\r\n"
    asyncio.run(live(as_guard(cluster.url)))
    for node in cluster.nodes:
        node.stop()


@pytest.mark.parametrize("command", ["FLUSHALL", "KEYS *", "SET other 1", "GET other", "CONFIG SET save 1", "SHUTDOWN"])
def test_the_acl_is_not_more(redis: RedisServer, command: str) -> None:
    """Other keys, and what endangers the server, are refused."""
    assert b"no permissions" in redis.command("ACL", "DRYRUN", "guard", *command.split())


@pytest.mark.parametrize("name", redis_server.binaries())
@pytest.mark.parametrize("missing", ["-time", "-hset", "resetkeys"])
def test_what_a_script_may_not_do_is_told_at_start(name: str, missing: str) -> None:
    """A user who lacks a part of the ACL is told so, not that the store is damaged; by every kind of server."""
    server = RedisServer(path=redis_server.binaries()[name])
    server.command("ACL", "SETUSER", "guard", "on", ">pw", *told_acl(), missing)
    error = asyncio.run(refused(as_guard(server.url)))
    assert isinstance(error, ConfigurationError), error
    assert "does not let this user do what the library needs" in str(error)
    server.stop()


async def refused(url: str) -> GuardError:
    """The error that opening gives."""
    backend = backend_factory(url)()
    with pytest.raises(GuardError) as caught:
        await backend.open()
    await backend.close()
    return caught.value


# -- PostgreSQL ------------------------------------------------------------------------------------


def told_grants(schema: str, role: str) -> list[sql.Composed]:
    """The statements that the docs give, for that schema and that role."""
    found = re.findall(r"`(GRANT [^`]* SCHEMA respan_guard TO app)`", DOCS)
    assert len(found) == 2
    pattern = [text.replace("respan_guard", "{schema}").replace("app", "{role}") for text in found]
    return [sql.SQL(text).format(schema=sql.Identifier(schema), role=sql.Identifier(role)) for text in pattern]


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A server with a schema that somebody else made and a role that has the GRANTs of the docs."""
    server = PostgresServer.newest()
    asyncio.run(opened_once(server.url))
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("CREATE ROLE app LOGIN")
        for statement in told_grants("respan_guard", "app"):
            db.execute(statement)
    yield server
    server.delete()


async def opened_once(url: str) -> None:
    """Open and close a store."""
    backend = PostgresBackend(url)
    await backend.open()
    await backend.close()


def as_app(url: str) -> str:
    """The same server, as that role."""
    return url.replace("://postgres@", "://app@")


class TestPostgresGrants(BackendContract):
    """The whole contract is kept."""

    @pytest.fixture(autouse=True)
    def server(self, postgres: PostgresServer) -> None:
        self.url = postgres.url

    async def open_backend(self) -> Backend:
        emptied_store(self.url, "respan_guard")
        backend = PostgresBackend(as_app(self.url))
        await backend.open()
        return backend


def test_the_grants_are_enough_for_an_app_and_its_operator(postgres: PostgresServer) -> None:
    """A guard with its kill switch, `respan-guard check` and `respan-guard verify`."""
    emptied_store(postgres.url, "respan_guard")
    asyncio.run(live(as_app(postgres.url)))
    told = checked(as_app(postgres.url))
    assert told["ok"], told


def test_who_may_not_is_told_what_is_missing(postgres: PostgresServer) -> None:
    """No right to make a schema, none on one that is there, and none to bring it to a newer version."""
    with psycopg.connect(postgres.url, autocommit=True) as db:
        db.execute("CREATE ROLE nobody LOGIN")
        db.execute("UPDATE respan_guard.store SET version = version - 1")
    error = asyncio.run(refused(f"{as_app(postgres.url)}?schema=other"))
    assert isinstance(error, ConfigurationError)
    assert "GRANT CREATE ON DATABASE" in str(error)
    error = asyncio.run(refused(postgres.url.replace("://postgres@", "://nobody@")))
    assert isinstance(error, StorageReadOnly)
    assert "this user may not do that" in str(error)
    error = asyncio.run(refused(as_app(postgres.url)))
    with psycopg.connect(postgres.url, autocommit=True) as db:
        db.execute("UPDATE respan_guard.store SET version = version + 1")
    assert isinstance(error, ConfigurationError)
    assert "let its owner open it first" in str(error)


def test_batches_go_on_between_an_upgrade_and_its_grants(postgres: PostgresServer) -> None:
    """Tables that an upgrade brought need no right of who admits and records; pages do, and say so."""
    url = as_app(postgres.url)
    emptied_store(postgres.url, "respan_guard")
    with psycopg.connect(postgres.url, autocommit=True) as db:
        db.execute("REVOKE ALL ON respan_guard.ordered, respan_guard.moved FROM app")

    async def use() -> None:
        backend = PostgresBackend(url)
        await backend.open()
        try:
            (allowed, recorded) = await backend.apply([admit("a1", limits=()), record("r1")])
            assert isinstance(allowed, Allowed)
            assert isinstance(recorded, Recorded)
            with pytest.raises(StorageReadOnly, match="ordered"):
                await backend.customers(CustomerQuery(sort="cost"))
        finally:
            await backend.close()

    try:
        asyncio.run(use())
    finally:
        with psycopg.connect(postgres.url, autocommit=True) as db:
            for statement in told_grants("respan_guard", "app"):
                db.execute(statement)
