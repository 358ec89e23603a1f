"""A server that takes over without the last records: they are found to be missing, and stored again."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from respan_guard import BudgetExceeded, Guard, Usage
from respan_guard.backends.base import Recorded, RecordQuery
from respan_guard.backends.redis import RedisBackend
from respan_guard.backends.redis.recent import Recent
from respan_guard.errors import StorageReadOnly, StorageUnavailable
from respan_guard.testing.contract_support import DAY, NOW, record, recorded, total
from tests.backends.redis_server import Cluster, RedisServer, free_port, opened
from tests.faulty_proxy import FaultyProxy


@pytest.fixture
def primary() -> Iterator[RedisServer]:
    """A server."""
    started = RedisServer("repl-diskless-sync-delay 0")
    yield started
    started.stop()


@pytest.fixture
def replica(primary: RedisServer) -> Iterator[RedisServer]:
    """One that follows it."""
    started = RedisServer(f"replicaof 127.0.0.1 {primary.port}", "repl-diskless-sync-delay 0")
    started.follows()
    yield started
    started.stop()


async def lagging(backend: RedisBackend, replica: RedisServer) -> None:
    """Record 17 times; the replica gets the first ten."""
    for number in range(10):
        await recorded(backend, record(f"e{number}", 1))
    replica.follows()
    replica.command("REPLICAOF", "NO", "ONE")  # from here on nothing gets there any more
    for number in range(10, 17):
        await recorded(backend, record(f"e{number}", 1))


async def fail_over(primary: RedisServer, replica: RedisServer) -> None:
    """The replica takes the address, and the connections' ends arrive."""
    port = primary.port
    primary.kill()
    replica.take_over(port)
    await asyncio.sleep(0.05)


async def surely(backend: RedisBackend, name: str, customer: str = "ann") -> None:
    """Record, as often as it takes."""
    for _ in range(100):
        try:
            await recorded(backend, record(name, 1, customer=customer))
        except StorageUnavailable:
            await asyncio.sleep(0.05)
        else:
            return
    raise AssertionError("it never works again")


async def test_what_a_failover_lost_is_told_and_stored_again(
    primary: RedisServer, replica: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A replica that lagged takes over: the process finds what is missing, stores it again, and says how much."""
    async with opened(primary.url) as backend, opened(primary.url) as other:
        await lagging(backend, replica)
        await recorded(other, record("of-another-process", 1))
        with caplog.at_level(logging.ERROR, "respan_guard"):
            await fail_over(primary, replica)
            await surely(backend, "after")
        stored = {row.entry.id for row in await backend.entries(RecordQuery())}
        assert {f"e{n}" for n in range(17)} | {"after"} <= stored
        assert (await backend.standing("ann", [total(99)], now=NOW)).used == (18,)
        assert "lost 7 usage records that it had acknowledged" in caplog.text
        assert "7 are stored again" in caplog.text
        assert await backend.verify() == []


async def test_a_loss_is_found_behind_what_others_recorded_since(
    primary: RedisServer, replica: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The process was idle, and the log is longer than it was when it looks again."""
    async with opened(primary.url) as backend, opened(primary.url) as other:
        await lagging(backend, replica)
        await recorded(other, record("seen", 0, customer="bob"))
        await fail_over(primary, replica)
        for number in range(20):
            await surely(other, f"other{number}", "bob")
        with caplog.at_level(logging.ERROR, "respan_guard"):
            await recorded(backend, record("after", 1))
        assert (await backend.standing("ann", [total(99)], now=NOW)).used == (18,)
        assert "lost 7 usage records that it had acknowledged" in caplog.text
        assert await backend.verify() == []


async def test_a_budget_holds_across_a_failover_that_an_idle_process_did_not_see(
    primary: RedisServer, replica: RedisServer, tmp_path: Path
) -> None:
    """Of $10, nine are spent; the failover forgets five, others go on: one more is let in, and no second one."""
    one, limits = Decimal(1), {"total_budget": 10}
    with FaultyProxy(primary.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        async with (
            Guard(url, journal_dir=tmp_path / "a", default_limits=limits) as guard,
            Guard(url, journal_dir=tmp_path / "b") as other,
        ):

            async def spend() -> None:
                async with guard.admit("alice", estimate=one) as admission:
                    await admission.record(Usage(model="m", cost=one))

            for number in range(9):
                if number == 4:
                    await guard.flush()
                    replica.follows()
                    replica.command("REPLICAOF", "NO", "ONE")
                await spend()
            await guard.flush()
            primary.kill()
            proxy.lead_to(replica.port)
            for _ in range(20):
                await other.record(Usage(model="m", cost=one), "bob")
            await other.flush()
            await spend()
            with pytest.raises(BudgetExceeded):
                await spend()
            assert (await guard.status("alice")).total_spend == 10


@pytest.mark.parametrize("after", ["idle", "batch"])
async def test_a_process_that_closes_looks_for_the_last_time(
    primary: RedisServer, replica: RedisServer, after: str
) -> None:
    """No batch comes any more that would find what the failover lost, or the last one failed with it."""
    async with opened(primary.url) as backend:
        await lagging(backend, replica)
        if after == "batch":
            primary.kill()
            with pytest.raises(StorageUnavailable):
                await recorded(backend, record("never", 1))
        await fail_over(primary, replica)
    async with opened(replica.url) as later:
        assert (await later.standing("ann", [total(99)], now=NOW)).used == (17,)


async def test_a_process_closes_though_nobody_is_left_to_look_at(
    primary: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It says that it does not know what became of its records; one that recorded nothing has nothing to say."""
    async with opened(primary.url) as backend, opened(primary.url):
        await recorded(backend, record("e", 1))
        primary.kill()
        await asyncio.sleep(0.05)
        caplog.clear()
    assert [entry.levelno for entry in caplog.records] == [logging.WARNING]
    assert "still has what it acknowledged last can't be seen" in caplog.text


async def test_a_connection_that_an_idle_server_ends_costs_one_look(primary: RedisServer) -> None:
    """One trip before the next batch, none before the one after that; and none where the connection lives."""
    async with opened(primary.url) as backend:
        sent: list[str] = []
        run = backend._link.run

        async def counted(name: str, *arguments: object) -> object:
            sent.append(name)
            return await run(name, *arguments)  # type: ignore[arg-type]

        backend._link.run = counted  # type: ignore[method-assign,assignment]
        for ended, trips in ((False, 1), (True, 2), (False, 1), (False, 1), (True, 2)):
            if ended:
                primary.command("CLIENT", "KILL", "TYPE", "normal")
                await asyncio.sleep(0.05)
            sent.clear()
            together = [backend.apply([record(f"{number}", 1)], NOW) for number in range(2)]
            await asyncio.gather(*together)
            assert len(sent) == trips + 1


async def test_a_failover_of_a_cluster_is_seen_by_an_idle_process(caplog: pytest.LogCaptureFixture) -> None:
    """The other parts' logs are as they were, and this part's records are stored again on the new node."""
    cluster, bus = Cluster(options=("cluster-require-full-coverage no",)), free_port()
    replica = RedisServer("cluster-enabled yes", "cluster-node-timeout 2000", f"cluster-port {bus}",
                          "repl-diskless-sync-delay 0")  # fmt: skip
    first = cluster.nodes[0]
    told = first.command("CLUSTER", "NODES").decode()
    address = re.search(r":(\d+)@(\d+)\S* myself", told)
    assert address is not None
    replica.command("CLUSTER", "MEET", "127.0.0.1", address[1], address[2])
    for _ in range(300):
        if replica.command("CLUSTER", "REPLICATE", cluster._id(first)) == b"+OK\r\n":
            break
        await asyncio.sleep(0.05)
    replica.follows()
    names = [f"customer-{number}" for number in range(24)]
    async with opened(cluster.url) as backend:
        await backend.apply([record(f"first-{name}", 1, customer=name) for name in names])
        await asyncio.sleep(0.3)
        first.command("ACL", "SETUSER", "default", "-psync", "-sync")
        first.command("CLIENT", "KILL", "TYPE", "replica")
        await backend.apply([record(f"second-{name}", 1, customer=name) for name in names])
        first.kill()
        assert replica.command("CLUSTER", "FAILOVER", "TAKEOVER") == b"+OK\r\n"
        await asyncio.sleep(0.05)
        for number in range(200):
            try:
                await backend.apply([record(f"third-{name}", 1, customer=name) for name in names])
            except StorageUnavailable:
                assert number < 199
                await asyncio.sleep(0.05)
            else:
                break
        stored = {row.entry.id for row in await backend.entries(RecordQuery())}
        assert stored == {f"{which}-{name}" for which in ("first", "second", "third") for name in names}
        assert "usage records that it had acknowledged" in caplog.text
        assert await backend.verify() == []
    for server in (*cluster.nodes, replica):
        server.stop()


# -- what is known of the last records -------------------------------------------------------------


def test_what_was_acknowledged_in_doubt_is_asked_for_one_by_one() -> None:
    """Such a record may be on the new server while those before it are not, and the other way round."""
    recent = Recent(1, counted=True)
    ops = [record(f"e{number}") for number in range(5)]
    answers = [Recorded(True, 1, DAY)]
    for number, way in enumerate((1, 1, 2, 2, 2)):
        recent.keep([ops[number]], answers, way, number, number, number + 1)
    assert recent.doubts(2)
    asked, others, doubted = recent.parted()
    assert (asked, others) == (ops[1:], ops[:1])
    recent.trusted(2, 5, doubted)
    assert not recent.doubts(2)
    assert recent.parted()[0] == ops[4:]


def test_what_could_not_be_stored_again_is_tried_again() -> None:
    """The record that was asked for is there by then, and says nothing of the others any more."""
    recent = Recent(1, counted=False)
    for number in range(3):
        recent.keep([record(f"e{number}")], [Recorded(True, 1, DAY)], 1, number, number, number + 1)
    assert not recent.is_there([Recorded(True, 1, DAY)], 9)
    assert not recent.is_there([Recorded(False, 1, DAY)], 9)
    recent.trusted(2, 9, 0)
    assert recent.is_there([Recorded(False, 1, DAY)], 9)


# -- servers that are no primary any more ----------------------------------------------------------


async def test_a_primary_that_was_made_a_replica_is_left_for_the_new_one(
    primary: RedisServer, replica: RedisServer
) -> None:
    """The address leads to the new primary, connections that were open still to the old one: no restart is needed."""
    with FaultyProxy(primary.port) as proxy:
        async with opened(f"redis://127.0.0.1:{proxy.port}/0") as backend:
            await recorded(backend, record("before", 1))
            await backend.put("ann", {"name": "Ann"})
            replica.follows()
            replica.command("REPLICAOF", "NO", "ONE")
            primary.command("REPLICAOF", "127.0.0.1", str(replica.port))
            for _ in range(2):  # it does not lead there yet
                with pytest.raises(StorageReadOnly):
                    await recorded(backend, record("early", 1))
            proxy.lead_to(replica.port)
            await recorded(backend, record("after", 1))
            await backend.put("ann", {"name": "Anna"})
            assert (await backend.standing("ann", [total(99)], now=NOW)).used == (2,)


async def test_reads_and_changes_leave_a_replica_too(primary: RedisServer, replica: RedisServer) -> None:
    """They have connections of their own; one answer that it takes no writes ends them all."""
    with FaultyProxy(primary.port) as proxy:
        async with opened(f"redis://127.0.0.1:{proxy.port}/0") as backend:
            await asyncio.gather(*[backend.put(f"c{number}", {"name": "x"}) for number in range(8)])
            replica.follows()
            replica.command("REPLICAOF", "NO", "ONE")
            primary.command("REPLICAOF", "127.0.0.1", str(replica.port))
            proxy.lead_to(replica.port)
            with pytest.raises(StorageReadOnly):
                await backend.put("c1", {"name": "y"})
            await asyncio.gather(*[backend.put(f"c{number}", {"name": "z"}) for number in range(8)])


async def test_a_primary_that_is_cut_off_from_its_replicas_is_left(primary: RedisServer, replica: RedisServer) -> None:
    """It takes no writes and can't learn that it was replaced."""
    with FaultyProxy(primary.port) as proxy:
        async with opened(f"redis://127.0.0.1:{proxy.port}/0") as backend:
            await recorded(backend, record("before", 1))
            replica.follows()
            replica.command("REPLICAOF", "NO", "ONE")
            primary.command("CONFIG", "SET", "min-replicas-to-write", "1")
            proxy.lead_to(replica.port)
            with pytest.raises(StorageReadOnly, match="NOREPLICAS"):
                await recorded(backend, record("early", 1))
            await recorded(backend, record("after", 1))
