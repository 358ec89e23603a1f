"""`verify` on the file: it finds what was tampered with, and the deleted are gone down to their bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from respan_guard.backends.base import Allowed, AuditRow, Recorded, RecordQuery, RefusalRow, Release

from .sqlite_support import DAY, NOW, admit, inside, opened, record, tamper

PLANTED = {
    "a day's cost is one more": "UPDATE rollups SET cost = cost + 1 WHERE c = 1",
    "a day's calls are one less": "UPDATE rollups SET calls = calls - 1 WHERE c = 2",
    "a day's tokens moved to another day": f"UPDATE rollups SET day = {DAY + 1} WHERE c = 1 AND day = {DAY}",
    "a day is gone": "DELETE FROM rollups WHERE c = 1",
    "a day of nobody": f"INSERT INTO rollups VALUES (99, {DAY}, 'gpt', 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)",
    "a total is one more": "UPDATE customers SET cost = cost + 1 WHERE c = 1",
    "a total of requests is one less": "UPDATE customers SET requests = requests - 1 WHERE c = 1",
    "everybody's day is one less": "UPDATE days SET calls = calls - 1",
    "everybody's requests are one more": "UPDATE days SET requests = requests + 1",
    "everybody's day is gone": f"DELETE FROM days WHERE day = {DAY}",
    "a day of everybody that nobody had": f"UPDATE days SET model = 'x' WHERE day = {DAY} AND model = 'gpt'",
    "a day's customers are one more": "UPDATE active SET customers = customers + 1",
    "everybody's hour is one less": "UPDATE hours SET calls = calls - 1",
    "everybody's hour costs one more": f"UPDATE hours SET cost = cost + 1 WHERE hour = {NOW // 3_600_000}",
    "everybody's hour is of another model": "UPDATE hours SET model = 'x' WHERE calls > 0",
    "a day's customers are gone": "DELETE FROM active",
    "a latency is another": "UPDATE entries SET latency_ms = 1 WHERE seq = 2",
    "active days are one more": "UPDATE customers SET active_days = active_days + 1 WHERE c = 2",
    "a customer is gone": "DELETE FROM customers WHERE c = 1",
    "an entry is gone": "DELETE FROM entries WHERE seq = 3",
    "an entry costs another amount": "UPDATE entries SET cost = cost - 1 WHERE seq = 2",
    "an entry lost its price": "UPDATE entries SET cost = NULL WHERE seq = 2",
    "an entry went to another customer": "UPDATE entries SET c = 2, id = 'moved' WHERE seq = 2",
    "an entry became an adjustment": "UPDATE entries SET kind = 'adjustment' WHERE seq = 2",
    "an entry of nobody": "UPDATE entries SET c = 99 WHERE seq = 2",
    "the log is out of order": "UPDATE entries SET latest_ms = 1 WHERE seq = 3",
    "a usage is cut off": "UPDATE entries SET body = substr(body, 1, 5) WHERE seq = 2",
    "params are cut off": "UPDATE customers SET params = '{\"na' WHERE c = 1",
    "a pruned sum is one more": "UPDATE pruned SET cost = cost + 1",
    "a hold is below 0": "UPDATE holds SET cost = -1",
    "a hold of nobody": "UPDATE holds SET c = 99",
    "a hold that nobody swept": "UPDATE holds SET expires_ms = 1",
    "a rate is below 0": "INSERT INTO rates VALUES (1, 60000, 0, -1, 0)",
    "a rate of nobody": "INSERT INTO rates VALUES (99, 60000, 0, 1, 0)",
    "a deletion of nobody": "INSERT INTO tombs VALUES ('x', 99, 0)",
}


async def written(path: Path) -> None:
    """A file with two customers, entries of all kinds, something pruned and a live hold."""
    async with opened(path) as backend:
        await backend.apply([record("old", day=DAY - 50, at_ms=NOW - 50 * 86_400_000)], NOW)
        await backend.prune(DAY - 40)
        await backend.apply(
            [admit("done"), record("e1"), Release("alice", "done"), record("e2", "bob", cost=None)], NOW
        )
        await backend.apply([admit("live"), record("e3", status="error"), record("e4", metadata={"a": 1})], NOW)
        assert await backend.verify() == []


@pytest.mark.parametrize("what", PLANTED)
async def test_verify_finds(tmp_path: Path, what: str) -> None:
    """Each of these corruptions, made behind the store's back, is found; the untouched file has none."""
    await written(tmp_path / "x.db")
    tamper(tmp_path / "x.db", PLANTED[what])
    async with opened(tmp_path / "x.db") as backend:
        assert await backend.verify() != []


async def test_verify_finds_an_entry_stored_twice(tmp_path: Path) -> None:
    """A duplicate that slipped past a broken index is found, even if the sums were made to fit."""
    await written(tmp_path / "x.db")
    columns = (
        "c, id, rev, day, at_ms, latest_ms, cost, input_tokens, output_tokens, cache_read_tokens, late, model, "
        "admission, kind, source, provider, status, trace_id, body"
    )
    tamper(
        tmp_path / "x.db",
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET sql = replace(sql, 'UNIQUE (c, id)', 'CHECK (1)') WHERE name = 'entries'",
        "DELETE FROM sqlite_master WHERE name LIKE 'sqlite_autoindex_entries%'",
    )
    tamper(
        tmp_path / "x.db",
        f"INSERT INTO entries ({columns}) SELECT {columns} FROM entries WHERE seq = 2",
        "UPDATE rollups SET calls = calls + 1, cost = cost + 60, input_tokens = input_tokens + 10, "
        f"output_tokens = output_tokens + 5 WHERE c = 1 AND day = {DAY}",
        "UPDATE customers SET calls = calls + 1, cost = cost + 60, input_tokens = input_tokens + 10, "
        "output_tokens = output_tokens + 5 WHERE c = 1",
    )
    async with opened(tmp_path / "x.db") as backend:
        assert "entry stored twice" in {found.what for found in await backend.verify()}


async def test_verify_names_both_figures(tmp_path: Path) -> None:
    """What is found says where, what is stored and what it should be."""
    await written(tmp_path / "x.db")
    tamper(tmp_path / "x.db", f"UPDATE rollups SET cost = cost + 7 WHERE c = 1 AND day = {DAY}")
    async with opened(tmp_path / "x.db") as backend:
        found = {(row.what, row.where, row.stored, row.recomputed) for row in await backend.verify()}
    assert ("cost", f"alice gpt {DAY}", 187, 180) in found
    assert ("total cost", "alice", 240, 247) in found


async def test_a_deleted_customer_leaves_no_bytes(tmp_path: Path) -> None:
    """After a deletion no file of the store has a byte of who the customer was; sums stay and are right."""
    path = tmp_path / "x.db"
    canary = "canary-7f3a"
    who = f"{canary}-id"
    async with opened(path) as backend:
        for number in range(300):  # enough to split pages, so that copies of rows are left behind if any are
            await backend.put(f"other-{number}", {"name": f"Other {number}", "note": "x" * 50}, now=NOW)
        await backend.put(who, {"name": f"{canary} one", "email": f"{canary}@example.com"}, actor="boss", now=NOW)
        await backend.put(who, {"name": f"{canary} two", "metadata": {"k": canary * 500}}, now=NOW)
        await backend.apply([admit("a", who, limits=()), record("e", who, metadata={"who": canary})], NOW)
        await backend.add_refusals([RefusalRow(who, "rate", 5, 2)])
        await backend.add_audit(AuditRow(NOW, who, "adjust", "boss", None, {"reason": canary}))
        for number in range(300):
            await backend.apply([record(f"e{number}", f"other-{number}")], NOW)
        assert canary.encode() in path.read_bytes() + Path(f"{path}-wal").read_bytes()
        assert await backend.delete(who, actor="boss", now=NOW + 1)
        left = b"".join(file.read_bytes() for file in tmp_path.iterdir() if file.name != "x.db-shm")
        assert canary.encode() not in left
        assert await backend.verify() == []
        assert await backend.get(who) is None
        (stored,) = [row for row in await backend.entries(RecordQuery(limit=1000)) if row.entry.id == "e"]
        assert stored.entry.customer.startswith("deleted-")
        assert stored.entry.cost == 60
        assert stored.entry.usage.metadata is None


async def test_a_name_of_before_a_deletion_works_after_a_restart(tmp_path: Path) -> None:
    """Usage of calls that ended before goes to the label, by a hash; the same id later is somebody new."""
    async with opened(tmp_path / "x.db") as backend:
        await backend.apply([record("e")], NOW)
        await backend.delete("alice", now=NOW + 10)
    async with opened(tmp_path / "x.db") as backend:
        outcomes = await backend.apply([record("e"), record("late", at_ms=NOW + 10)], NOW + 20)
        assert [outcome.new for outcome in outcomes if isinstance(outcome, Recorded)] == [False, True]
        assert await backend.get("alice") is None
        (answer,) = await backend.apply([admit("new")], NOW + 30)
        assert isinstance(answer, Allowed)
        assert answer.used == (0,)
        assert await backend.verify() == []


async def test_pruning_never_gives_a_place_in_the_log_twice(tmp_path: Path) -> None:
    """Even with every entry pruned and after a restart, a reader's cursor never hides a new entry."""
    async with opened(tmp_path / "x.db") as backend:
        await backend.apply([record(f"e{number}") for number in range(5)], NOW)
        assert await backend.prune(DAY + 1, limit=3) == 3
        assert await backend.prune(DAY + 1) == 2
        assert await backend.prune(DAY + 1) == 0
    async with opened(tmp_path / "x.db") as backend:
        await backend.apply([record("new", day=DAY + 2)], NOW)
        (stored,) = await backend.entries(RecordQuery())
        assert stored.seq == 6
        assert await backend.verify() == []
        row = await backend.get("alice")
        assert row is not None
        assert row.totals.calls == 6


async def test_what_is_over_is_swept(tmp_path: Path) -> None:
    """Rows of admissions don't pile up: ended ones go after a minute, expired ones after days, restart or not."""
    async with opened(tmp_path / "x.db") as backend:
        for number in range(20):
            await backend.apply([admit(f"a{number}", limits=()), Release("alice", f"a{number}")], NOW + number)
        await backend.apply([admit("crashed", limits=())], NOW)
    later = NOW + 61_000
    async with opened(tmp_path / "x.db") as backend:
        count = "SELECT (SELECT count(*) FROM ended), (SELECT count(*) FROM holds)"
        assert await inside(backend, lambda db: db.execute(count).fetchone()) == (20, 1)
        await backend.apply([record("e")], later)
        assert await inside(backend, lambda db: db.execute(count).fetchone()) == (0, 1)
        await backend.apply([record("f")], later + 7 * 86_400_000)
        assert await inside(backend, lambda db: db.execute(count).fetchone()) == (0, 0)
        assert await backend.verify() == []
