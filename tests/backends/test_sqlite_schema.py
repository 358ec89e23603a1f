"""Versions of the schema: applied in order, each wholly or not at all, by one of several processes."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from respan_guard.backends.base import RecordQuery
from respan_guard.backends.sqlite import SQLiteBackend, schema
from respan_guard.backends.sqlite.connection import immediate
from respan_guard.errors import StorageUnavailable

from .sqlite_support import NOW, finished, opened, record

TABLES = "SELECT name FROM sqlite_master ORDER BY name"


def connected(path: Path) -> sqlite3.Connection:
    """A plain connection."""
    return sqlite3.connect(path, isolation_level=None)


REAL = schema.MIGRATIONS


@pytest.fixture
def one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with one more migration than the real one."""
    real = Path(schema.__file__).parent / "migrations"
    made = tmp_path / "package" / "migrations"
    made.mkdir(parents=True)
    for name in REAL:
        (made / name).write_text((real / name).read_text())
    (made / "more.sql").write_text("CREATE TABLE more (a INTEGER);\nINSERT INTO more SELECT count(*) FROM entries;\n")
    monkeypatch.setattr(schema, "MIGRATIONS", (*REAL, "more.sql"))
    monkeypatch.setattr(schema, "files", lambda package: made.parent)
    return made


@pytest.mark.parametrize("version", range(1, len(REAL) + 1))
async def test_a_file_of_any_version_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, version: int
) -> None:
    """A file that the first version began and an older one wrote last keeps what it had, and can what a new one can."""
    path = tmp_path / "x.db"
    path.touch()
    db = connected(path)
    with monkeypatch.context() as older:
        older.setattr(schema, "MIGRATIONS", REAL[:1])
        schema.migrate(db, path, "default")
        db.executescript((Path(__file__).parent / "data" / "sqlite_version_1.sql").read_text())
        older.setattr(schema, "MIGRATIONS", REAL[:version])
        schema.migrate(db, path, "default")
        assert db.execute("PRAGMA user_version").fetchone() == (version,)
    db.close()
    async with opened(path) as backend:
        assert (await backend.info()).schema == str(len(REAL))
        row = await backend.get("ann")
        assert row is not None
        assert (row.params, row.totals.cost, row.totals.calls) == ({"period_budget": 5}, 21, 3)
        assert [stored.entry.id for stored in await backend.entries(RecordQuery(customer="ann"))] == ["e1", "e2", "e3"]
        assert await backend.verify() == []
        assert await backend.set_fact("s", "k", "v", expected=None)
        assert await backend.fact("s", "k") == "v"
        await backend.apply([record("e4")], NOW)
        assert await backend.verify() == []
    request.getfixturevalue("one_more")
    async with opened(path) as backend:
        assert (await backend.info()).schema == str(len(REAL) + 1)
    db = connected(path)
    assert db.execute("SELECT a FROM more").fetchall() == [(5,)]
    db.close()


@pytest.mark.parametrize("at", range(60))
def test_a_crash_at_any_statement_leaves_the_version_before(tmp_path: Path, one_more: Path, at: int) -> None:
    """A migration that stops after any number of statements leaves nothing, and the next start finishes it."""
    path = tmp_path / "x.db"
    path.touch()

    class Crash(Exception):
        pass

    class Crashing(sqlite3.Connection):
        left = at

        def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
            if not sql.startswith(("BEGIN", "COMMIT", "ROLLBACK")):
                if not self.left:
                    raise Crash
                self.left -= 1
            return super().execute(sql, *values)  # type: ignore[arg-type]

    db: sqlite3.Connection = sqlite3.connect(path, isolation_level=None, factory=Crashing)
    crashed = False
    try:
        schema.migrate(db, path, "default")
    except Crash:
        crashed = True
    db.close()
    db = connected(path)
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = {name for (name,) in db.execute(TABLES)}
    newest = len(REAL) + 1
    for made_by, table in ((1, "entries"), (2, "facts"), (newest, "more")):
        assert (version >= made_by) == (table in tables)
    schema.migrate(db, path, "default")
    assert db.execute("PRAGMA user_version").fetchone()[0] == newest
    assert db.execute("SELECT count(*) FROM more").fetchone() == (1,)
    db.close()
    assert crashed or at > 30


def test_the_lock_is_taken_before_the_version_is_believed(tmp_path: Path) -> None:
    """Who waited for another process's migration does not run it again."""
    path = tmp_path / "x.db"
    path.touch()
    slow, fast = connected(path), connected(path)
    schema.migrate(fast, path, "default")
    immediate(slow, lambda db: schema._step(db, path, 1, schema.MIGRATIONS[0]))  # would raise: tables exist
    assert slow.execute("SELECT count(*) FROM meta WHERE key = 'epoch'").fetchone() == (1,)
    slow.close()
    fast.close()


OPENING = """
import asyncio, sys
from respan_guard.backends.sqlite import SQLiteBackend
async def main():
    backend = SQLiteBackend(f"sqlite:///{sys.argv[1]}")
    print("ready", flush=True)
    sys.stdin.readline()
    await backend.open()
    print(backend._writer.epoch)
    await backend.close()
asyncio.run(main())
"""


def test_processes_that_open_a_new_file_at_once_agree(tmp_path: Path) -> None:
    """Several first starts at the same moment make one store, and none of them fails."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPENING, str(tmp_path / "x.db")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [finished(process) for process in processes]
    assert len(set(outputs)) == 1
    assert outputs[0].strip()


async def test_opening_a_file_that_is_up_to_date_waits_for_no_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process keeps it locked for writing it opens at the first try and can be read; writes say so."""
    path = tmp_path / "x.db"
    async with opened(path) as backend:
        await backend.apply([record("e")], NOW)
    tries: list[Path] = []

    def counted(db: sqlite3.Connection, path: Path, namespace: str) -> None:
        tries.append(path)
        schema.migrate(db, path, namespace)

    monkeypatch.setattr("respan_guard.backends.sqlite.backend.migrate", counted)
    db = connected(path)
    db.execute("BEGIN IMMEDIATE")
    backend = SQLiteBackend(f"sqlite:///{path}?timeout=0.01")
    await backend.open()
    assert tries == [path]
    assert await backend.get("alice") is not None
    with pytest.raises(StorageUnavailable, match="locked"):
        await backend.apply([record("f")], NOW)
    db.execute("COMMIT")
    await backend.apply([record("f")], NOW)
    await backend.close()
    db.close()


async def test_opening_reads_only_the_version_when_nothing_is_to_do(tmp_path: Path) -> None:
    """A second start on an up-to-date file keeps its epoch, so other processes that have it open go on."""
    async with opened(tmp_path / "x.db") as first:
        second = SQLiteBackend(f"sqlite:///{tmp_path / 'x.db'}")
        await second.open()
        await second.apply([record("e")], NOW)
        await second.close()
        assert await first.get("alice") is not None
        await first.apply([record("f")], NOW)
