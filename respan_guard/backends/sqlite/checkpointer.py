"""Which of all connections moves the log (WAL) back into the file: one, the holder of a lock beside it.

SQLite before 3.51.3 can damage a file whose log is reset by one connection while another checkpoints,
so all but one connection leave checkpoints alone. When the holder goes, the next writer takes over.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from respan_guard.backends.sqlite.failures import translating

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, and one process per file is the rule there
    _LOCKS = False
else:
    _LOCKS = True

__all__ = ["Checkpointer"]

_PAGES = 4000  # 16 MB of log between checkpoints: rare enough to cost little, short enough to stay quick
_TRY_EVERY = 64  # batches


class Checkpointer:
    """The lock `FILE-checkpoint`, held or not."""

    def __init__(self, path: Path) -> None:
        self._database = path
        self._path = Path(f"{path}-checkpoint")
        self._fd: int | None = None
        self._pid = os.getpid()
        self._batches = 0
        self.active = False

    def open(self, db: sqlite3.Connection) -> None:
        """Take the lock if it is free. The file stays when the lock goes: a deleted one could be locked twice.

        Raises:
            BackendError: The file can't be made, or can't be opened.
        """
        if self._fd is None:
            with translating(self._path):
                self._fd = self._made_or_opened()
        self._take(db)

    def _made_or_opened(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            fd = os.open(self._path, flags | os.O_EXCL, 0o600)
        except FileExistsError:  # a link, maybe, that somebody put there: what it names is given to nobody
            return os.open(self._path, flags, 0o600)
        self._share(fd)
        return fd

    def _share(self, fd: int) -> None:
        """Give a new lock to whom the database belongs, as SQLite does with its log.

        Else a command that root runs first would keep the app out.
        """
        with contextlib.suppress(OSError, AttributeError):  # only root may; or this is Windows
            database = self._database.stat()
            os.fchmod(fd, 0o600 | (database.st_mode & 0o666))
            os.fchown(fd, database.st_uid, database.st_gid)

    def after_batch(self, db: sqlite3.Connection) -> None:
        """Now and then, see whether the holder is gone."""
        self._batches += 1
        if not self.active and self._batches % _TRY_EVERY == 0 and self._fd is not None:
            self._take(db)

    def truncate(self, db: sqlite3.Connection) -> bool:
        """Move all of the log into the file and empty it, so that deleted bytes are gone from both; False if in use."""
        if not self.active:
            return False
        return not db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]

    def close(self) -> None:
        """Let go. In a forked child that takes nothing from the parent: the lock is the open file's, not ours."""
        fd, self._fd, self.active = self._fd, None, False
        if fd is not None:
            os.close(fd)

    def _take(self, db: sqlite3.Connection) -> None:
        if _LOCKS and self._fd is not None:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return
        self.active = True
        db.execute(f"PRAGMA wal_autocheckpoint = {_PAGES}")
