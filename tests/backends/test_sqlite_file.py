"""The file of the SQLite store: where it is, who may use it, and what is said when it can't be used."""

from __future__ import annotations

import itertools
import os
import sqlite3
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from respan_guard.backends.base import Allowed, RecordQuery
from respan_guard.backends.sqlite import SQLiteBackend
from respan_guard.errors import (
    ConfigurationError,
    SchemaMismatch,
    StorageCorrupt,
    StorageFull,
    StorageUnavailable,
    StoreReset,
)

from .sqlite_support import NOW, admit, finished, inside, opened, record, script, tamper


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite://", "memory://"),
        ("sqlite:///", "memory://"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite://guard.db", "sqlite:///guard.db"),
        ("sqlite:///x.db?synchronous=off", "full or normal"),
        ("sqlite:///x.db?timeout=soon", "timeout must be seconds"),
        ("sqlite:///x.db?timeout=-1", "timeout must be seconds"),
        ("sqlite:///x.db?journal=wal", "unknown option 'journal'"),
    ],
)
def test_urls_that_cannot_work(url: str, says: str) -> None:
    """A URL without a file or with an unknown option is refused at once, saying what would be right."""
    with pytest.raises(ConfigurationError, match=says):
        SQLiteBackend(url)


async def test_relative_and_absolute_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slashes are a path in the working directory as it was at first, four an absolute one; %20 is a space."""
    monkeypatch.chdir(tmp_path)
    backend = SQLiteBackend("sqlite:///a%20b.db")
    monkeypatch.chdir("/")
    await backend.open()
    await backend.close()
    assert (tmp_path / "a b.db").exists()
    async with opened(tmp_path / "absolute.db"):
        assert (tmp_path / "absolute.db").exists()


async def test_open_and_close_are_idempotent(tmp_path: Path) -> None:
    """Opening an open store and closing a closed one do nothing, and it can be opened again."""
    backend = SQLiteBackend(f"sqlite:///{tmp_path / 'x.db'}")
    await backend.close()
    for _ in range(2):
        await backend.open()
        await backend.open()
        assert isinstance((await backend.apply([admit("a")], NOW))[0], Allowed)
        await backend.close()
        await backend.close()
    with pytest.raises(StorageUnavailable, match="is not open"):
        await backend.apply([admit("b")], NOW)
    with pytest.raises(StorageUnavailable, match="is not open"):
        await backend.get("alice")


async def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    """The file, its log, its index and its lock are for their owner only, whatever the umask."""
    before = os.umask(0)
    try:
        async with opened(tmp_path / "x.db") as backend:
            await backend.apply([record("e")], NOW)
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("x.db", "x.db-wal", "x.db-shm", "x.db-checkpoint"), 384)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
async def test_what_root_opens_first_stays_the_apps(tmp_path: Path) -> None:
    """A lock that root makes beside an app's database belongs to the app, with the database's mode, as the log does."""
    async with opened(tmp_path / "x.db"):
        pass
    lock = tmp_path / "x.db-checkpoint"
    lock.unlink()
    os.chown(tmp_path / "x.db", 65534, 65533)
    (tmp_path / "x.db").chmod(0o660)
    async with opened(tmp_path / "x.db"):
        found = lock.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (65534, 65533, 0o660)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
async def test_root_gives_away_no_file_that_a_link_names(tmp_path: Path) -> None:
    """An app that may write beside its database must not become the owner of root's files by it."""
    async with opened(tmp_path / "x.db"):
        pass
    os.chown(tmp_path / "x.db", 65534, 65534)
    (tmp_path / "x.db-checkpoint").unlink()
    (tmp_path / "roots").touch(0o600)
    (tmp_path / "x.db-checkpoint").symlink_to(tmp_path / "roots")
    async with opened(tmp_path / "x.db"):
        pass
    assert (tmp_path / "roots").stat().st_uid == 0


async def test_a_lock_that_can_not_be_opened_is_named(tmp_path: Path) -> None:
    """The error names the lock, not the database, which is all right."""
    (tmp_path / "x.db-checkpoint").mkdir()
    with pytest.raises(StorageUnavailable, match=r"x\.db-checkpoint can't be used"):
        await SQLiteBackend(f"sqlite:///{tmp_path / 'x.db'}").open()


async def test_durable_by_default(tmp_path: Path) -> None:
    """Synchronous is FULL unless asked otherwise, and then the check says what that can cost."""
    async with opened(tmp_path / "x.db") as backend:
        assert await inside(backend, lambda db: db.execute("PRAGMA synchronous").fetchone()) == (2,)
        assert (await backend.info()).durable
    async with opened(tmp_path / "x.db", synchronous="normal") as backend:
        assert await inside(backend, lambda db: db.execute("PRAGMA synchronous").fetchone()) == (1,)
        info = await backend.info()
    assert not info.durable
    assert any("power cut" in warning for warning in info.warnings)


async def test_info_tells_which_sqlite_runs(tmp_path: Path) -> None:
    """The check names the version of SQLite, and warns of one that can damage a file used by several connections."""
    async with opened(tmp_path / "x.db") as backend:
        info = await backend.info()
    assert info.facts["SQLite"] == sqlite3.sqlite_version
    warned = any("3.51.3" in warning for warning in info.warnings)
    assert warned == (sqlite3.sqlite_version_info < (3, 51, 3))


async def test_a_missing_directory_is_a_wrong_setting(tmp_path: Path) -> None:
    """The message says how to make the directory; none is made behind the user's back."""
    with pytest.raises(ConfigurationError, match="mkdir -p"):
        await SQLiteBackend(f"sqlite:///{tmp_path / 'not' / 'x.db'}").open()
    with pytest.raises(ConfigurationError, match="is a directory"):
        await SQLiteBackend(f"sqlite:///{tmp_path}").open()
    assert list(tmp_path.iterdir()) == []


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    """Text, and a database with a damaged header, are reported as damaged and left as they are."""
    text = tmp_path / "notes.db"
    text.write_text("not a database " * 1000)
    with pytest.raises(StorageCorrupt, match="damaged or no SQLite file"):
        await SQLiteBackend(f"sqlite:///{text}").open()
    assert text.read_text() == "not a database " * 1000
    async with opened(tmp_path / "x.db") as backend:
        await backend.apply([record("e")], NOW)
    with (tmp_path / "x.db").open("r+b") as file:
        file.write(b"\0" * 100)
    with pytest.raises(StorageCorrupt):
        await SQLiteBackend(f"sqlite:///{tmp_path / 'x.db'}").open()


async def test_a_page_that_rots_is_not_silent(tmp_path: Path) -> None:
    """A table's damaged page fails what needs it, with an error that says so."""
    async with opened(tmp_path / "x.db") as backend:
        await backend.apply([record(f"e{number}") for number in range(200)], NOW)
    db = sqlite3.connect(tmp_path / "x.db")
    page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'entries'").fetchone()[0]
    db.close()
    with (tmp_path / "x.db").open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    with pytest.raises(StorageCorrupt):
        async with opened(tmp_path / "x.db") as backend:
            await backend.entries(RecordQuery())


async def test_the_database_of_something_else(tmp_path: Path) -> None:
    """Another application's database is refused and not changed."""
    tamper(tmp_path / "other.db", "CREATE TABLE theirs (a)")
    with pytest.raises(StorageCorrupt, match="something else"):
        await SQLiteBackend(f"sqlite:///{tmp_path / 'other.db'}").open()
    tamper(tmp_path / "other2.db", "CREATE TABLE theirs (a)", "PRAGMA user_version = 1")
    with pytest.raises(StorageCorrupt, match="something else"):
        await SQLiteBackend(f"sqlite:///{tmp_path / 'other2.db'}").open()
    for name in ("other.db", "other2.db"):
        db = sqlite3.connect(tmp_path / name)
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]
        db.close()


async def test_a_file_of_a_newer_version(tmp_path: Path) -> None:
    """A schema from the future is refused, with both versions in the message."""
    async with opened(tmp_path / "x.db"):
        pass
    tamper(tmp_path / "x.db", "PRAGMA user_version = 99")
    with pytest.raises(SchemaMismatch, match=r"99.*upgrade"):
        await SQLiteBackend(f"sqlite:///{tmp_path / 'x.db'}").open()


async def test_a_file_has_one_namespace(tmp_path: Path) -> None:
    """A second namespace in the same file would count on the first one's customers, so it is refused."""
    async with opened(tmp_path / "x.db", namespace="shop"):
        pass
    async with opened(tmp_path / "x.db", namespace="shop"):
        pass
    with pytest.raises(ConfigurationError, match=r"holds the namespace 'shop', not 'default'"):
        await SQLiteBackend(f"sqlite:///{tmp_path / 'x.db'}").open()


READ_ONLY = """
import asyncio, os, sys
from respan_guard.backends.sqlite import SQLiteBackend
from respan_guard.errors import BackendError
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
async def main():
    backend = SQLiteBackend(f"sqlite:///{sys.argv[1]}")
    try:
        await backend.open()
    except BackendError as error:
        print(type(error).__name__)
asyncio.run(main())
"""


@pytest.mark.parametrize("what", ["file", "directory", "new file"])
async def test_read_only(tmp_path: Path, what: str) -> None:
    """A file or a directory that can't be written is reported as that, when it is opened."""
    tmp_path = tmp_path / "store"
    tmp_path.mkdir()
    for parent in itertools.takewhile(lambda parent: parent != Path(tempfile.gettempdir()), tmp_path.parents):
        parent.chmod(0o755)
    path = tmp_path / "x.db"
    if what != "new file":
        async with opened(path):
            pass
    for made in tmp_path.iterdir():
        made.chmod(0o444 if what == "file" else 0o666)
    tmp_path.chmod(0o777 if what == "file" else 0o555)
    assert finished(script(READ_ONLY, path)).strip() == "StorageReadOnly"
    tmp_path.chmod(0o755)


async def test_a_full_disk_and_afterwards(tmp_path: Path) -> None:
    """No space: the batch fails as a whole and says why. With space again it goes on, without a restart."""
    async with opened(tmp_path / "x.db") as backend:
        await backend.apply([record("first")], NOW)
        pages = await inside(backend, lambda db: db.execute("PRAGMA page_count").fetchone()[0])
        await inside(backend, lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchall())
        with pytest.raises(StorageFull):
            await backend.apply([record(f"e{number}") for number in range(500)], NOW)
        assert len(await backend.entries(RecordQuery())) == 1
        await inside(backend, lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchall())
        await backend.apply([record(f"e{number}") for number in range(500)], NOW)
        assert len(await backend.entries(RecordQuery(limit=1000))) == 501
        assert await backend.verify() == []


async def test_a_full_file_system_and_afterwards(tmp_path: Path) -> None:
    """The same on a real file system without space, log and index included."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        async with opened(tmp_path / "x.db") as backend:
            stored = 0

            async def fill() -> None:
                nonlocal stored
                while stored < 10_000:
                    await backend.apply([record(f"{stored}-{number}") for number in range(50)], NOW)
                    stored += 50

            with pytest.raises(StorageFull):
                await fill()
            subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path)], check=True)
            await backend.apply([record("after")], NOW)
            assert len(await backend.entries(RecordQuery(limit=10_000))) == stored + 1
            assert await backend.verify() == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


async def test_a_file_that_stays_locked(tmp_path: Path) -> None:
    """Another program's lock is waited for until the timeout, then reported; without the lock it goes on."""
    async with opened(tmp_path / "x.db", timeout=0.05) as backend:
        other = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageUnavailable, match="stays locked by another process"):
            await backend.apply([record("e")], NOW)
        assert await backend.get("alice") is None  # reading goes on
        other.execute("ROLLBACK")
        other.close()
        await backend.apply([record("e")], NOW)


async def test_a_file_deleted_while_it_is_open(tmp_path: Path) -> None:
    """Counting never goes on in a file that nobody can find any more."""
    async with opened(tmp_path / "x.db") as backend:
        await backend.apply([admit("a")], NOW)
        (tmp_path / "x.db").unlink()
        for _ in range(2):
            with pytest.raises(StoreReset, match="deleted"):
                await backend.apply([admit("b")], NOW)
        with pytest.raises(StoreReset, match="deleted"):
            await backend.get("alice")


async def test_a_file_replaced_while_it_is_open(tmp_path: Path) -> None:
    """Another file at the same path is not taken for the one that was opened."""
    async with opened(tmp_path / "new.db"):
        pass
    async with opened(tmp_path / "x.db") as backend:
        (tmp_path / "new.db").rename(tmp_path / "x.db")
        with pytest.raises(StoreReset, match="replaced"):
            await backend.apply([admit("b")], NOW)


@pytest.mark.parametrize("wipe", ["UPDATE meta SET value = 'other' WHERE key = 'epoch'", "DROP TABLE meta"])
async def test_a_store_wiped_while_it_is_open(tmp_path: Path, wipe: str) -> None:
    """A store that was emptied or restored in place is not zero spend: every operation says that it is another one."""
    async with opened(tmp_path / "x.db") as backend:
        await backend.apply([admit("a")], NOW)
        tamper(tmp_path / "x.db", wipe)
        with pytest.raises(StoreReset):
            await backend.apply([admit("b")], NOW)
        with pytest.raises(StoreReset):
            await backend.put("alice", {"name": "A"}, now=NOW)
