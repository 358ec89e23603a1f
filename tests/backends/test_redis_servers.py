"""Servers that refuse, forget, fail over or are something else: each has its own clear outcome."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from respan_guard.backends.base import Admit, Allowed, Recorded, RecordQuery, UsageQuery
from respan_guard.backends.redis import RedisBackend
from respan_guard.backends.redis import backend as backend_module
from respan_guard.cli.app import app
from respan_guard.errors import (
    BackendError,
    ConfigurationError,
    GuardError,
    SchemaMismatch,
    StorageFull,
    StorageReadOnly,
    StorageUnavailable,
    StoreReset,
)
from respan_guard.testing.contract_support import DAY, NOW, admit, budget, one, record, recorded, total
from tests.backends import redis_server
from tests.backends.redis_server import RedisServer, opened

SAFE = ("appendonly yes", "appendfsync always")


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server of the test's own."""
    started = RedisServer()
    yield started
    started.stop()


async def refused(url: str, **options: Any) -> GuardError:
    """The error that opening gives."""
    backend = RedisBackend(url, **options)
    with pytest.raises(GuardError) as caught:
        await backend.open()
    await backend.close()
    return caught.value


# -- at start --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://", "HOST"),
        ("redis:///0", "HOST"),
        ("redis://localhost/zero", "HOST"),
        ("redis://localhost:port/0", "HOST:PORT"),
        ("redis://localhost?colour=red", "unknown option 'colour'"),
        ("redis://localhost?timeout=soon", "timeout must be seconds"),
        ("redis://localhost?timeout=0", "timeout must be seconds"),
        ("redis://localhost#x", "# as %23"),
        ("redis+cluster://localhost:7000/3", "no databases"),
        ("redis+cluster://localhost:7000,", "HOST:PORT"),
        ("redis+unix://", "socket"),
    ],
)
def test_a_url_that_can_not_work(url: str, says: str) -> None:
    """What is wrong, and what would be right; without the password."""
    with pytest.raises(ConfigurationError, match=says):
        RedisBackend(url)
    with pytest.raises(ConfigurationError) as caught:
        RedisBackend(url.replace("://", "://user:hunter2@"))
    assert "hunter2" not in str(caught.value)


async def test_nobody_listens() -> None:
    """A port without a server, and a host that there is none of."""
    error = await refused(f"redis://127.0.0.1:{redis_server.free_port()}")
    assert isinstance(error, StorageUnavailable)
    assert "can't be reached" in str(error)
    error = await refused("redis://no-such-host.invalid")
    assert isinstance(error, StorageUnavailable)


@pytest.mark.parametrize("login", ["", ":wrong@", "nobody:secret@"])
async def test_a_wrong_password(login: str) -> None:
    """None where one is needed, a wrong one, a user there is none of."""
    server = RedisServer("requirepass secret")
    error = await refused(server.url.replace("://", f"://{login}"))
    assert isinstance(error, ConfigurationError)
    assert "refuses the login" in str(error)
    assert "redis://USER:PASSWORD@HOST" in str(error)
    assert "secret" not in str(error)
    async with opened(server.url.replace("://", "://:secret@")) as backend:
        await recorded(backend, record("e"))
        assert "secret" not in (await backend.info()).url
    server.stop()


async def test_a_user_that_may_not_do_what_is_needed(server: RedisServer) -> None:
    """The command is named."""
    server.command("ACL", "SETUSER", "half", "on", ">pw", "~*", "+@all", "-evalsha", "-eval")
    error = await refused(server.url.replace("://", "://half:pw@"))
    assert isinstance(error, ConfigurationError)
    assert "evalsha" in str(error)


async def test_a_database_that_there_is_not(server: RedisServer) -> None:
    """The server's own words."""
    error = await refused(server.url.replace("/0", "/99"))
    assert isinstance(error, (ConfigurationError, StorageUnavailable))
    assert "DB index" in str(error) or "Database" in str(error)


async def test_a_read_only_replica(server: RedisServer) -> None:
    """At start, and when the primary becomes one under us."""
    replica = RedisServer(f"replicaof 127.0.0.1 {server.port}")
    error = await refused(replica.url)
    assert isinstance(error, StorageReadOnly)
    assert "name the primary" in str(error)
    async with opened(server.url) as backend:
        server.command("REPLICAOF", "127.0.0.1", str(replica.port))
        with pytest.raises(StorageReadOnly):
            await recorded(backend, record("e"))
    replica.stop()


async def test_a_server_that_loads() -> None:
    """It says so, and answers later."""
    loading = RedisServer("enable-debug-command yes", "appendonly yes")
    async with opened(loading.url) as backend:
        await backend.apply([record(f"e{n}", customer=f"c{n}") for n in range(300)], NOW)
        loading.command("CONFIG", "SET", "key-load-delay", "2000")  # microseconds for each key
        reload = asyncio.create_task(asyncio.to_thread(loading.command, "DEBUG", "LOADAOF"))
        await asyncio.sleep(0.1)
        with pytest.raises(StorageUnavailable, match="loading"):
            await recorded(backend, record("x"))
        await reload
        for _ in range(400):
            try:
                await recorded(backend, record("x"))
            except StorageUnavailable:
                await asyncio.sleep(0.05)
            else:
                break
        assert await backend.verify() == []
    loading.stop()


async def test_no_memory_left(server: RedisServer) -> None:
    """Nothing is half written, and what was there is there when there is room again."""
    async with opened(server.url) as backend:
        await recorded(backend, record("e", 5))
        server.command("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(StorageFull, match="maxmemory"):
            await backend.apply([admit("a", total(50), cost=5), record("f", 7, admission="a")], NOW)
        server.command("CONFIG", "SET", "maxmemory", "0")
        assert (await backend.standing("ann", [total(50)], now=NOW)).used == (5,)
        assert await backend.verify() == []
        await backend.apply([admit("a", total(50), cost=5), record("f", 7, admission="a")], NOW)
        assert (await backend.standing("ann", [total(50)], now=NOW)).used == (12,)


async def test_a_store_of_a_newer_version(server: RedisServer) -> None:
    """It is left alone."""
    async with opened(server.url):
        pass
    server.command("HSET", "respan:{default}:meta", "schema", "99")
    error = await refused(server.url)
    assert isinstance(error, SchemaMismatch)
    assert "99" in str(error)


async def test_keys_of_something_else(server: RedisServer) -> None:
    """A key of another type where ours should be is damage, not zero spend."""
    async with opened(server.url) as backend:
        await recorded(backend, record("e"))
        server.command("DEL", "respan:{default}:c:ann")
        server.command("LPUSH", "respan:{default}:c:ann", "x")
        with pytest.raises(BackendError, match="can't be read"):
            await recorded(backend, record("f"))


def test_a_missing_package_says_what_to_install() -> None:
    """Without redis-py, a redis:// URL names the extra."""
    code = (
        "import sys; sys.modules['redis'] = None\n"
        "from respan_guard.backends.registry import backend_factory\n"
        "try: backend_factory('redis://localhost')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ConfigurationError" in done.stdout
    assert "pip install 'respan-guard[redis]'" in done.stdout


# -- what it forgets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem", "warning"),
    [
        ((), "appendonly is off: nothing is kept on disk", None),
        (("save 60 1000",), "only snapshots are kept", None),
        (("appendonly yes",), None, "appendfsync is everysec: a power cut takes the last second"),
        (("appendonly yes", "appendfsync no"), None, "appendfsync is no"),
        (SAFE, None, None),
        (
            ("appendonly yes", "appendfsync always", "maxmemory 64mb", "maxmemory-policy allkeys-lru"),
            "allkeys-lru",
            None,
        ),
        (("appendonly yes", "appendfsync always", "maxmemory 64mb", "maxmemory-policy volatile-lru"), None, None),
    ],
)
async def test_settings_that_forget_are_told(
    options: tuple[str, ...], problem: str | None, warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A problem is logged at start and fails the check; a store that is as safe as can be says nothing."""
    backend_module._told.clear()
    server = RedisServer(*options)
    with caplog.at_level(logging.WARNING, "respan_guard"):
        async with opened(server.url) as backend:
            info = await backend.info()
    server.stop()
    assert len(info.problems) == (problem is not None)
    assert info.durable == (not problem and not warning)
    told = " ".join(info.warnings)
    for text in (problem, warning):
        assert text is None or text in told
    assert (problem is not None) == ("do not hold" in caplog.text)
    if not problem and not warning:
        assert info.warnings == ()


def test_the_check_fails_for_a_store_that_forgets(server: RedisServer) -> None:
    """`respan-guard check` ends with 1 and says what to set; for a store that is safe it ends with 0."""
    runner = CliRunner()
    found = runner.invoke(app, ["check", "--json", "--storage", server.url])
    assert found.exit_code == 1
    assert "no budget can rest on this storage: appendonly is off" in json.loads(found.stdout)["error"]
    server.command("CONFIG", "SET", "appendonly", "yes")
    found = runner.invoke(app, ["check", "--json", "--storage", server.url])
    assert found.exit_code == 0
    assert json.loads(found.stdout)["storage"]["facts"]["appendonly"] == "yes"


async def test_the_example_s_server_forgets_nothing() -> None:
    """The options in examples/compose.yaml make a store that nothing is to be said about."""
    text = (Path(__file__).parents[2] / "examples" / "compose.yaml").read_text()
    command = re.search(r"command: redis-server (.*)", text)
    assert command is not None
    server = RedisServer(*[option.strip() for option in command[1].split("--") if option])
    async with opened(server.url) as backend:
        info = await backend.info()
    assert (info.durable, info.warnings) == (True, ())
    server.stop()


async def test_a_server_that_does_not_tell_its_settings(server: RedisServer) -> None:
    """As hosted ones do: what INFO says is used, the rest is unknown and warned of, and the store works."""
    server.command("CONFIG", "SET", "appendonly", "yes")
    server.command("ACL", "SETUSER", "hosted", "on", ">pw", "~*", "+@all", "-config")
    async with opened(server.url.replace("://", "://hosted:pw@")) as backend:
        info = await backend.info()
        await recorded(backend, record("e"))
    assert info.problems == ()
    assert not info.durable
    assert "does not tell appendfsync" in info.warnings[0]


async def test_an_old_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is needed."""
    monkeypatch.setattr(backend_module, "_MINIMUM", (99, 0))
    error = await refused(redis_server.shared_server().url)
    assert isinstance(error, ConfigurationError)
    assert "newer is needed" in str(error)


# -- a store that is gone --------------------------------------------------------------------------


@pytest.mark.parametrize("wipe", ["FLUSHALL", "another store", "a part"])
async def test_a_wiped_store_is_not_zero_spend(server: RedisServer, wipe: str) -> None:
    """Every operation and every read says so, until the process starts again."""
    async with opened(server.url) as backend:
        await recorded(backend, record("e", 90))
        if wipe == "a part":
            server.command("DEL", "respan:{default}:meta")
        else:
            server.command("FLUSHALL")
        if wipe == "another store":
            async with opened(server.url):
                pass
        for work in (
            one(backend, admit("a", total(100), cost=50)),
            backend.standing("ann", [total(100)]),
            backend.usage(UsageQuery()),
            backend.get("ann"),
            backend.cursor("x"),
            backend.put("ann", {}),
            backend.verify(),
        ):
            with pytest.raises(StoreReset, match="wiped or replaced"):
                await work


async def test_scripts_that_a_server_forgot_are_sent_again(server: RedisServer) -> None:
    """SCRIPT FLUSH and a restart cost one trip more and nothing else."""
    async with opened(server.url) as backend:
        for number in range(20):
            server.command("SCRIPT", "FLUSH")
            await backend.apply([admit(f"a{number}", cost=1), record(f"e{number}", 1, admission=f"a{number}")], NOW)
        (row,) = await backend.usage(UsageQuery())
        assert (row.amounts.calls, row.amounts.requests, row.amounts.cost) == (20, 20, 20)
        assert await backend.verify() == []


WRITING = """
import asyncio, itertools, os, sys
from respan_guard.backends.base import *
from respan_guard.backends.redis import RedisBackend
from respan_guard.testing.contract_support import DAY, NOW, admit, record
async def main():
    backend = RedisBackend(sys.argv[1])
    await backend.open()
    for number in itertools.count():
        customer = f"customer-{number % 5}"
        ops = [admit(f"{sys.argv[2]}-{number}", customer=customer, cost=5),
               record(f"{sys.argv[2]}-{number}", customer=customer)]
        await backend.apply(ops)
        os.write(1, f"{sys.argv[2]}-{number}\\n".encode())
asyncio.run(main())
"""


async def test_kill_9_of_the_server_loses_nothing_that_was_acknowledged() -> None:
    """With appendfsync always: three times under load, every acknowledged record is there, and every sum is right."""
    server = RedisServer("appendonly yes", "appendfsync always")
    acknowledged: set[str] = set()
    for turn in range(3):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITING, server.url, f"{turn}{name}"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )
            for name in "ab"
        ]  # fmt: skip
        for writer in writers:
            assert writer.stdout is not None
            acknowledged.add(writer.stdout.readline().strip())
        time.sleep(0.2 + 0.1 * turn)
        server.kill()
        for writer in writers:
            output, _ = writer.communicate(timeout=30)
            acknowledged.update(output.splitlines())
        server.start()
        async with opened(server.url) as backend:
            stored = {row.entry.id for row in await backend.entries(RecordQuery(limit=100_000))}
            assert acknowledged <= stored
            assert await backend.verify() == []
    assert len(acknowledged) > 50
    server.stop()


async def test_a_server_that_starts_again_without_its_data_is_another_store() -> None:
    """Nothing was kept on disk: the epoch is gone, so nothing is taken for zero spend."""
    server = RedisServer()
    async with opened(server.url) as backend:
        await recorded(backend, record("e", 5))
        server.kill()
        server.start()
        for _ in range(3):
            with pytest.raises((StorageUnavailable, StoreReset)):
                await one(backend, admit("a", budget(9), cost=9))
        with pytest.raises(StoreReset):
            await one(backend, admit("a", budget(9), cost=9))
    server.stop()


async def test_namespaces_are_apart() -> None:
    """Two stores on one server do not know each other, whatever they are called."""
    url = redis_server.shared_server().url
    names = ["prod", "prod}", "{prod", "prod:c:ann", "日本", "a b"]
    for number, name in enumerate(names):
        async with opened(url, namespace=name) as backend:
            await recorded(backend, record("e", number + 1))
    for number, name in enumerate(names):
        async with opened(url, namespace=name) as backend:
            answer = await one(backend, Admit("a", "ann", "", 1, 0, 1 << 50, (total(99),)))
            assert isinstance(answer, Allowed)
            assert answer.used == (number + 1,)


# -- connections -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [TypeError, AttributeError])
async def test_a_connection_that_was_just_closed_is_no_fault_of_the_data(
    monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    """CPython 3.12 and 3.13 raise a TypeError for a write to it: reads go on, and a batch can be sent again."""
    async with opened(redis_server.shared_server().url, namespace=f"closed-{fault.__name__}") as backend:
        client, line = backend._link._client, backend._link._line
        assert client is not None
        assert line is not None
        failing = [fault("'NoneType' object is not callable")]

        def once(method: Any) -> Any:
            async def execute(*words: Any, **options: Any) -> Any:
                if failing:
                    raise failing.pop()
                return await method(*words, **options)

            return execute

        monkeypatch.setattr(client, "execute_command", once(client.execute_command))
        monkeypatch.setattr(line, "execute", once(line.execute))
        assert await backend.usage(UsageQuery(by=())) == []
        assert not failing
        failing.append(fault("'NoneType' object is not callable"))
        with pytest.raises(StorageUnavailable):
            await backend.apply([record("e1", 7)])
        assert await backend.apply([record("e1", 7)]) == [Recorded(True, 7, DAY)]
