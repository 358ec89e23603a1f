"""The schema's versions: one migration each, applied in order, each in a transaction of its own."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from respan_guard.backends.sqlite.connection import immediate
from respan_guard.errors import ConfigurationError, SchemaMismatch, StorageCorrupt

__all__ = ["MIGRATIONS", "migrate"]

MIGRATIONS = ("0001_first.sql", "0002_facts.sql", "0003_reads.sql", "0004_pages.sql", "0005_hours.sql")
_APPLICATION = 0x52475244  # "RGRD"; tells our files from those of others


def migrate(db: sqlite3.Connection, path: Path, namespace: str) -> None:
    """Bring the file to the newest version. Several processes may do so at once; one of them does the work.

    Stopped anywhere, it can be run again.

    Raises:
        sqlite3.OperationalError: There is something to do, and the file is locked.
        SchemaMismatch: It was written by a newer version of the package.
        StorageCorrupt: It is the database of something else.
        ConfigurationError: It holds another namespace.
    """
    for number, name in enumerate(MIGRATIONS, start=1):
        if _version(db) < number:
            immediate(db, lambda db, number=number, name=name: _step(db, path, number, name))  # type: ignore[misc]
    version = _version(db)
    if version > len(MIGRATIONS):
        raise SchemaMismatch(
            f"{path} has schema version {version}, this version of respan_guard knows {len(MIGRATIONS)}; upgrade it"
        )
    if _application(db) != _APPLICATION:
        raise StorageCorrupt(f"{path} is the database of something else; choose another path")
    held = db.execute("SELECT value FROM meta WHERE key = 'namespace'").fetchone()
    if held is None:
        immediate(db, lambda db: db.execute("INSERT OR IGNORE INTO meta VALUES ('namespace', ?)", (namespace,)))
        held = db.execute("SELECT value FROM meta WHERE key = 'namespace'").fetchone()
    if held[0] != namespace:
        raise ConfigurationError(
            f"{path} holds the namespace {held[0]!r}, not {namespace!r}; a file has one, so give each a path of its own"
        )


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _application(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA application_id").fetchone()[0])


def _step(db: sqlite3.Connection, path: Path, number: int, name: str) -> None:
    if _version(db) >= number:  # another process was faster
        return
    made = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if made if number == 1 else _application(db) != _APPLICATION:  # never write into what is not ours
        raise StorageCorrupt(f"{path} is the database of something else; choose another path")
    script = (files(__package__) / "migrations" / name).read_text(encoding="utf-8")
    for statement in _statements(script):
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {_APPLICATION}")
    db.execute(f"PRAGMA user_version = {number}")


def _statements(script: str) -> Iterator[str]:
    """One by one, since `executescript` commits first and would split the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
