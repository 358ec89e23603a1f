"""The one place where what SQLite or the system reports becomes an error of the guard."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from respan_guard.errors import (
    BackendError,
    InvalidInput,
    StorageCorrupt,
    StorageFull,
    StorageReadOnly,
    StorageUnavailable,
    StoreReset,
)

__all__ = ["translating"]

_READONLY_DBMOVED = 1032
# What a row holds that no column takes: SQLITE_CONSTRAINT_CHECK, _NOTNULL and _DATATYPE, SQLITE_TOOBIG and _MISMATCH.
_OF_THE_DATA = (275, 1299, 3091, 18, 20)


@contextlib.contextmanager
def translating(path: Path) -> Iterator[None]:
    """Raise a `BackendError` for an error of SQLite or the system that is raised inside."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translated(error, path) from error
    except OSError as error:
        raise _of_system(error, path) from error
    except ValueError as error:
        if "onnection" not in str(error):  # aiosqlite says so of a connection that is closed or never was
            raise
        raise StorageUnavailable(f"{path} is not open: {error}") from error


def _translated(error: sqlite3.Error, path: Path) -> BackendError | InvalidInput:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    if code in _OF_THE_DATA or "binding" in str(error):
        return InvalidInput(f"SQLite can't store this: {error}")
    primary = code & 0xFF
    if code == _READONLY_DBMOVED:
        return StoreReset(f"{path} was moved or deleted while it was open; restart to use what is there now")
    if primary == sqlite3.SQLITE_FULL or (primary == sqlite3.SQLITE_IOERR and _disk_is_full(path)):
        return StorageFull(f"no space left for {path}; it goes on by itself once there is some")
    if primary == sqlite3.SQLITE_READONLY:
        return StorageReadOnly(f"{path}, or the directory it is in, is read-only for this process")
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StorageCorrupt(f"{path} is damaged or no SQLite file ({error}); restore a backup or choose another path")
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StorageUnavailable(f"{path} stays locked by another process")
    if primary == sqlite3.SQLITE_CONSTRAINT:
        return StorageCorrupt(f"a row of {path} breaks a rule of the schema ({error}); see `respan-guard verify`")
    if "no such table" in str(error) or "no such column" in str(error):
        return StorageCorrupt(f"{path} lacks a part of the schema: {error}")
    return StorageUnavailable(f"SQLite failed on {path}: {error}")


def _of_system(error: OSError, path: Path) -> BackendError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"no space left for {path}")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageReadOnly(f"{path} can't be written: {error.strerror}")
    return StorageUnavailable(f"{path} can't be used: {error}")


def _disk_is_full(path: Path) -> bool:
    try:
        disk = os.statvfs(path.parent)
    except (OSError, AttributeError):
        return False
    return disk.f_bavail * disk.f_frsize < 65_536
