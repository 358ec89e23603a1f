"""What lies between the store and its server: callers that give up, networks that fail, poolers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from respan_guard import Guard, Usage
from respan_guard.backends.base import Admit, Allowed, Op, Recorded, RecordQuery, Release, Renew, Stale
from respan_guard.backends.postgres import PostgresBackend
from respan_guard.errors import StorageUnavailable
from tests.backends import postgres_server
from tests.backends.postgres_support import asked, opened, url_fixture
from tests.backends.sqlite_support import DAY, NOW, admit, record
from tests.faulty_proxy import Faults, FaultyProxy

__all__ = ["url_fixture"]


def port_of(url: str) -> int:
    """Where the server listens."""
    port = urlsplit(url).port
    assert port is not None
    return port


def through(url: str, port: int, **query: object) -> str:
    """The same store by another port."""
    return url.replace(f":{port_of(url)}/", f":{port}/") + "".join(f"&{key}={value}" for key, value in query.items())


async def give_up_at_random(url: str, calls: int) -> None:
    """Callers give up at random moments; every answer that comes is the one to its own question."""
    chance = random.Random(5)
    async with opened(url) as backend:
        for number in range(10):
            await backend.put(f"c{number}", {"name": f"n{number}"}, now=NOW)

        async def ask(number: int) -> None:
            name, kind = f"c{number % 10}", number % 3
            if kind == 0:
                (answer,) = await backend.apply([Admit("x", name, "old", DAY, 0, 1 << 50, ())], NOW)
                assert isinstance(answer, Stale)
                assert answer.params == {"name": f"n{number % 10}"}
            elif kind == 1:
                row = await backend.get(name)
                assert row is not None
                assert row.customer == name
            else:
                (booked,) = await backend.apply([record(f"e{number}", name, cost=number)], NOW)
                assert isinstance(booked, Recorded)
                assert booked.cost == number

        for first in range(0, calls, 50):
            tasks = [asyncio.create_task(ask(first + place)) for place in range(50)]
            for task in tasks:
                if chance.random() < 0.3:
                    await asyncio.sleep(chance.choice([0, 0, 0.001]))
                if chance.random() < 0.7:
                    task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError), result
        await asyncio.wait_for(backend.apply([record("last", "c0", cost=1)], NOW), 5)
        assert await backend.verify() == []
        states = asked(url, "SELECT state FROM pg_stat_activity WHERE application_name = 'respan_guard'")
        assert not [state for (state,) in states if state and state.startswith("idle in transaction")]


async def test_callers_that_give_up_get_nobody_elses_answer(url: str) -> None:
    """1,500 calls, most of them cancelled: no reply reaches the wrong caller, no transaction stays open."""
    await give_up_at_random(url, 1500)


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_callers_that_give_up_for_long(url: str) -> None:
    """The same with 20,000."""
    await give_up_at_random(url, 20_000)


async def lose_replies(url: str, faults: Faults, lives: int) -> None:
    """A network that fails: what gets no answer is sent again under its ids, until there is one; sums are exact."""
    async with opened(url):
        pass
    with FaultyProxy(port_of(url), seed=1) as proxy:
        async with opened(through(url, proxy.port)) as backend:
            proxy.faults = faults

            async def surely(*ops: Op) -> list[Any]:
                while True:
                    try:
                        return await backend.apply(list(ops), NOW)
                    except StorageUnavailable:
                        await asyncio.sleep(0)

            for number in range(lives):
                name, hold = f"c{number % 3}", f"a{number}"
                (allowed,) = await surely(admit(hold, name, cost=5, limits=()))
                assert isinstance(allowed, Allowed)
                await surely(Renew(name, hold, 700_000))
                (booked,) = await surely(record(f"e{number}", name, cost=3))
                assert booked.cost == 3
                await surely(Release(name, hold))
            proxy.faults = Faults()
            assert sum(proxy.counts.values()) > 0
    async with opened(url) as backend:
        rows = [await backend.get(f"c{number}") for number in range(3)]
        assert sum(row.totals.calls for row in rows if row) == sum(row.totals.requests for row in rows if row) == lives
        assert sum(row.totals.cost for row in rows if row) == 3 * lives
        assert await backend.holds(now=NOW) == []
        assert await backend.verify() == []
        assert [stored.seq for stored in await backend.entries(RecordQuery(limit=10_000))] == list(range(1, lives + 1))


@pytest.mark.parametrize(
    "faults",
    [
        Faults(drop_reply=0.2, spare=2),
        Faults(drop_reply=0.1, reset=0.1, delay=0.005, spare=2),
        Faults(duplicate=0.5, drop_reply=0.1, spare=2),
    ],
    ids=["lost replies", "resets and delays", "everything twice"],
)
async def test_sums_are_exact_over_a_network_that_fails(url: str, faults: Faults) -> None:
    """A fifth of the replies lost, connections reset, bytes late or sent twice: each operation counts once."""
    await lose_replies(url, faults, 40)


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_sums_are_exact_over_a_network_that_fails_for_long(url: str) -> None:
    """1,000 operations of each kind, a fifth of the replies lost."""
    await lose_replies(url, Faults(drop_reply=0.2, spare=2), 1000)


async def test_a_batch_is_one_message(url: str) -> None:
    """One decision or many, known customers or new ones: one message there, one back."""
    async with opened(url):
        pass
    with FaultyProxy(port_of(url)) as proxy:
        async with opened(through(url, proxy.port)) as backend:
            for number in range(5):
                before = proxy.counts["requests"]
                names = [f"{number}-{place}" for place in range(number * 5 + 1)]
                asks: list[Op] = [admit(name, f"c{name}", limits=(), cost=5) for name in names]
                spent: list[Op] = [record(name, f"c{name}", cost=5, metadata={"k": "'\\\""}) for name in names]
                await backend.apply([*asks, *spent, *[Release(f"c{name}", name) for name in names]])
                assert proxy.counts["requests"] == before + 1
            assert await backend.verify() == []


async def test_a_black_hole_ends(url: str) -> None:
    """A server that takes bytes and says nothing is given up in time; once it answers, everything goes on."""
    async with opened(url):
        pass
    with FaultyProxy(port_of(url)) as proxy:
        async with opened(through(url, proxy.port, timeout="0.3")) as backend:
            await backend.apply([record("before")], NOW)
            proxy.black_hole()
            for _ in range(2):  # in the middle of a connection, and in the making of one
                async with asyncio.timeout(5):
                    with pytest.raises(StorageUnavailable):
                        await backend.apply([record("meanwhile")], NOW)
            proxy.recover(cut=True)
            await backend.apply([record("meanwhile"), record("after")], NOW)
            row = await backend.get("alice")
            assert row is not None
            assert row.totals.calls == 3
            assert await backend.verify() == []
        for _ in range(200):  # the proxy hears of a close a moment later
            if not proxy.open_connections:
                break
            await asyncio.sleep(0.02)
        assert proxy.open_connections == 0


async def test_closing_does_not_wait_for_a_black_hole(url: str) -> None:
    """What waits on a server that says nothing is told so, and the store is closed all the same."""
    async with opened(url):
        pass
    with FaultyProxy(port_of(url)) as proxy:
        backend = PostgresBackend(through(url, proxy.port, timeout="60"))
        await backend.open()
        await backend.get("alice")
        proxy.black_hole()
        waiting = [asyncio.create_task(backend.apply([record("e")], NOW)), asyncio.create_task(backend.get("alice")),
                   asyncio.create_task(backend.get("bob"))]  # fmt: skip
        await asyncio.sleep(0.05)
        async with asyncio.timeout(10):
            await backend.close()
            for task in waiting:
                with pytest.raises(StorageUnavailable):
                    await task
        proxy.recover(cut=True)


async def test_a_guard_goes_on_after_a_black_hole(url: str, tmp_path: Path) -> None:
    """Callers get their answer when the deadline is over, and what was recorded meanwhile is stored once."""
    async with opened(url):
        pass
    with FaultyProxy(port_of(url)) as proxy:
        target = through(url, proxy.port, timeout="0.5")
        async with Guard(
            target, journal_dir=tmp_path, storage_timeout=0.2, default_limits={"total_budget": 5}
        ) as guard:
            async with guard.admit("alice") as admission:
                proxy.black_hole()
                async with asyncio.timeout(5):
                    await admission.record(Usage(model="m", cost=Decimal("0.5")))
                async with asyncio.timeout(5):
                    with pytest.raises(StorageUnavailable):
                        await guard.try_admit("alice")
                proxy.recover(cut=True)
            for _ in range(100):
                with contextlib.suppress(StorageUnavailable):
                    if (await guard.status("alice")).total_spend:
                        break
                await asyncio.sleep(0.05)
            await guard.flush()
            assert (await guard.status("alice")).total_spend == Decimal("0.5")
            assert await guard.verify() == []


async def test_a_server_that_ends_our_session_is_asked_again(url: str) -> None:
    """An administrator or a pooler ends idle sessions: the next batch makes a new one, and nobody hears of it."""
    async with opened(url) as backend:
        for number in range(3):
            await backend.apply([record(f"e{number}")], NOW)
            asked(
                url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'respan_guard'"
                " AND query LIKE '%%{schema}%%' AND pid <> pg_backend_pid()",
            )
        await backend.apply([record("last")], NOW)
        row = await backend.get("alice")
        assert row is not None
        assert row.totals.calls == 4


async def test_a_locked_row_is_not_waited_for_for_ever(url: str) -> None:
    """Somebody else's transaction keeps a customer's row: the batch fails in time, and passes once it is gone."""
    async with opened(f"{url}&timeout=0.3") as backend:
        await backend.apply([record("e1")], NOW)
        server, _, schema = url.rpartition("?schema=")
        with psycopg.connect(server) as other:
            other.execute(f'SELECT 1 FROM "{schema}".customers FOR UPDATE'.encode())
            with pytest.raises(StorageUnavailable, match=r"locked|in time"):
                await backend.apply([record("e2")], NOW)
            await backend.apply([record("e3", "bob")], NOW)  # others are not held up
            other.rollback()
        await backend.apply([record("e2")], NOW)
        assert await backend.verify() == []


@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
async def test_a_database_of_another_isolation_level(url: str, level: str) -> None:
    """Whatever a user's transactions are by default, batches of several connections are exact."""
    async with opened(url):
        pass
    target = f"{url}&options=-c%20default_transaction_isolation%3D{level.replace(' ', chr(92) + chr(92) + ' ')}"
    target = target.replace("\\\\ ", "%5C%20")
    async with opened(target) as first, opened(target) as second:
        info = await first.info()
        assert info.facts["default_transaction_isolation"] == level

        async def spend(backend: Any, name: str) -> int:
            outcomes = [await backend.apply([admit(f"{name}{number}")], NOW) for number in range(15)]
            return sum(isinstance(outcome, Allowed) for (outcome,) in outcomes)

        assert sum(await asyncio.gather(spend(first, "a"), spend(second, "b"))) == 10
        assert await first.verify() == []


@pytest.fixture
def pooled(url: str) -> Iterator[str]:
    """The store behind a real pgbouncer that gives each transaction another of three sessions."""
    program = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("no pgbouncer; apt-get install pgbouncer")
        pytest.skip("no pgbouncer; apt-get install pgbouncer")
    parts = urlsplit(url)
    directory = Path(tempfile.mkdtemp(prefix="respan-guard-pgbouncer-"))
    port = postgres_server._free_port()
    (directory / "users").write_text('"postgres" ""\n')
    (directory / "ini").write_text(
        f"[databases]\npostgres = host={parts.hostname} port={parts.port} dbname=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = trust\n"
        f"auth_file = {directory}/users\npool_mode = transaction\ndefault_pool_size = 3\nserver_reset_query =\n"
        f"server_round_robin = 1\nunix_socket_dir =\nlogfile = {directory}/log\n"
    )
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        for path in (directory, *directory.iterdir()):
            os.chown(path, user.pw_uid, user.pw_gid)
        process = subprocess.Popen(
            [program, "-q", directory / "ini"], user="nobody", group=user.pw_gid, extra_groups=[]
        )
    else:
        process = subprocess.Popen([program, "-q", directory / "ini"])
    try:
        for _ in range(200):
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres").close()
                break
            time.sleep(0.05)
        yield through(url, port)
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(directory, ignore_errors=True)


async def test_behind_a_pooler_in_transaction_mode(url: str, pooled: str) -> None:
    """Eight stores share three sessions: batches, reads, params, deletion, pruning and proof all work."""

    async def work(name: str) -> int:
        admitted = 0
        async with opened(pooled) as backend:
            await backend.put(f"own-{name}", {"name": name}, now=NOW)
            for number in range(12):
                (answer,) = await backend.apply([admit(f"{name}{number}")], NOW)
                admitted += isinstance(answer, Allowed)
                await backend.apply([record(f"{name}{number}", f"own-{name}")], NOW)
                row = await backend.get(f"own-{name}")
                assert row is not None
                assert row.totals.calls == number + 1
            assert await backend.delete(f"own-{name}", now=NOW)
        return admitted

    assert sum(await asyncio.gather(*[work(name) for name in "abcdefgh"])) == 10
    async with opened(pooled) as backend:
        assert await backend.prune(DAY + 1) == 96
        assert await backend.verify() == []
        assert (await backend.info()).durable in (True, False)
    sessions = asked(url, "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%%'")
    assert sessions == [(0,)]
