"""Usage records that storage can't take at once, on this machine's disk.

One append-only file per process: a line of JSON per record, synced before anybody is told that the
record is safe. A live process holds a lock on its file; another process that finds a file without
a lock adopts it. Replaying is safe at any time and any number of times, because the store knows
record ids.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from respan_guard.backends.base import Entry
from respan_guard.errors import GuardError
from respan_guard.sightings import is_another
from respan_guard.usage import Usage

with contextlib.suppress(ImportError):  # Windows: files are replayed by their own process only
    import fcntl

__all__ = ["PRUNED", "Journal", "JournalFile", "Waiting", "entry_from_dict", "entry_to_dict"]

PRUNED = "its day is pruned"
"""Why a record is a dead letter that the store came to be too late for."""
logger = logging.getLogger("respan_guard")


def entry_to_dict(entry: Entry) -> dict[str, Any]:
    """An entry as JSON values."""
    values = asdict(entry)
    values["usage"] = entry.usage.to_dict()
    return values


def entry_from_dict(values: Mapping[str, Any]) -> Entry:
    """Rebuild what `entry_to_dict` wrote; names unknown to this version are left out."""
    known = {f.name for f in fields(Entry)}
    kept = {name: value for name, value in values.items() if name in known}
    kept["usage"] = Usage.from_dict(kept.get("usage") or {})
    entry = Entry(**kept)
    numbers = (entry.day, entry.at_ms, entry.input_tokens, entry.output_tokens, entry.cost or 0)
    if {type(number) for number in numbers} != {int}:  # a bit that flipped on the disk
        raise TypeError("an amount is no integer")
    return entry


class Waiting(NamedTuple):
    """What lies in a store's journals on this machine: files and their bytes, and records nobody will take."""

    files: int
    size: int
    dead: int


class JournalFile:
    """Records that lie on disk and wait to be stored. `done` deletes them, `close` leaves them to others."""

    def __init__(self, path: Path, descriptor: int, ended: Callable[[], None] | None = None) -> None:
        self.path = path
        self._descriptor = descriptor
        self._ended = ended

    def entries(self) -> Iterator[Entry]:
        """What was written, oldest first."""
        with self.path.open("rb") as file:
            for line in file:
                if line.isspace():
                    continue
                try:
                    yield entry_from_dict(json.loads(line))
                except (ValueError, TypeError, AttributeError, ArithmeticError, GuardError):
                    # A process died, or the disk was full, while it was written: it was never acknowledged.
                    logger.warning("%s: a torn line was left out", self.path)

    def done(self) -> None:
        """Delete the file: all of it is stored."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        ended, self._ended = self._ended, None
        if ended is not None:
            ended()
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


class Journal:
    """This process's journal for one store. Its methods may be called from any thread.

    Args:
        directory: Where files lie; None for a directory of this user below the system's temporary one.
        store: What tells stores apart, such as the storage URL; only a hash of it becomes visible.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, store: str) -> None:
        if directory is None:
            user = os.getuid() if hasattr(os, "getuid") else 0
            directory = Path(tempfile.gettempdir()) / f"respan-guard-{user}"
        self.directory = Path(directory)
        self._stem = sha256(store.encode()).hexdigest()[:16]
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._file: JournalFile | None = None
        self._torn = False
        self._written = 0
        self._replayed = 0
        self._looked = False

    @property
    def pending(self) -> int:
        """How many records were written and not stored yet, also those that are being replayed."""
        return self._written + self._replayed

    def write(self, entries: Sequence[Entry]) -> None:
        """Append records and sync them to disk.

        Raises:
            OSError: The disk won't take them.
        """
        if not entries:
            return
        lines = b"".join(json.dumps(entry_to_dict(entry), default=str).encode() + b"\n" for entry in entries)
        with self._lock:
            if self._file is None:
                self._file = self._create()
            try:
                # Half a line of a write that failed must not swallow the first line of this one.
                _append(self._file._descriptor, b"\n" + lines if self._torn else lines)
            except BaseException:
                self._torn = True
                raise
            self._torn = False
            self._written += len(entries)

    def rotate(self, *, wait: bool = True) -> JournalFile | None:
        """Take what was written so far, to be stored; None if there is nothing, or it is just written to."""
        if not self._lock.acquire(blocking=wait):  # for as long as the disk takes
            return None
        try:
            file, count = self._file, self._written
            self._file, self._written, self._torn = None, 0, False
            if file is not None:
                with self._counting:
                    self._replayed += count
                file._ended = lambda: self._end(count)
            return file
        finally:
            self._lock.release()

    def _end(self, count: int) -> None:
        with self._counting:
            self._replayed = max(0, self._replayed - count)

    def orphans(self) -> list[JournalFile]:
        """Files of this store and user that no live process holds; they are now held by this one."""
        if "fcntl" not in globals() or not self.directory.is_dir():
            return []
        found = []
        for path in sorted(self.directory.glob(f"{self._stem}-*.journal")):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:  # stored and deleted by somebody else just now, or not ours to read
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not path.exists():  # deleted between open and lock
                    raise BlockingIOError
                if os.fstat(descriptor).st_uid != os.getuid():  # planted: what it says would be booked
                    raise PermissionError
            except OSError:
                os.close(descriptor)
            else:
                found.append(JournalFile(path, descriptor))
        return found

    def bury(self, entry: Entry, why: str) -> None:
        """Keep a record that the store will never take, for people to look at: in the log if the disk won't take it."""
        logger.error("a usage record can't be stored and is kept as a dead letter: %s", why)
        line = json.dumps({"why": why, "entry": entry_to_dict(entry)}, default=str).encode() + b"\n"
        try:  # without the lock: a finalizer may bury while its own thread has it, and appends keep apart by themselves
            self._make_directory()
            descriptor = os.open(self.dead_letters, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                _append(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as disk:
            logger.error("the dead letter can't be written either (%s), this is it: %r", disk, entry)

    def erase(self, customer: str) -> int:
        """Take out of the dead letters who one was and what an app noted; how many there were.

        In its place, and not longer than before: others may append meanwhile.
        """
        found = place = 0
        try:
            with self._lock, self.dead_letters.open("r+b") as file:
                for line in file.read().splitlines(keepends=True):
                    if (erased := _erased(line, customer)) is not None:
                        file.seek(place)
                        file.write(erased.ljust(len(line) - 1) + b"\n")
                        found += 1
                    place += len(line)
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.error("a customer that was deleted may still be named in %s: %s", self.dead_letters, error)
        return found

    def waiting(self) -> Waiting:
        """What this and other processes have left to be stored."""
        sizes = []
        for path in self.directory.glob(f"{self._stem}-*.journal"):
            with contextlib.suppress(OSError):  # stored and deleted just now
                sizes.append(path.stat().st_size)
        dead = 0
        with contextlib.suppress(FileNotFoundError):
            dead = self.dead_letters.read_bytes().count(b"\n")
        return Waiting(len(sizes), sum(sizes), dead)

    @property
    def dead_letters(self) -> Path:
        """The file of records that the store will never take."""
        return self.directory / f"{self._stem}.dead"

    def close(self) -> None:
        """Let go of the file; what it holds is left to the next process."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file, self._written = None, 0

    def forget(self) -> None:
        """After a fork, in the child: the parent goes on with the file, and holds its lock.

        The child's copy of the descriptor is closed, else the lock would outlive the parent with it, and nobody could
        adopt the file.
        """
        self._lock, self._counting = threading.Lock(), threading.Lock()
        if self._file is not None:
            self._file.close()
        self._file, self._written, self._replayed, self._torn = None, 0, 0, False

    def met(self, identity: str) -> None:
        """Note which store this is, and say so if it takes the place of another one that was used here before."""
        try:
            self._make_directory()
        except OSError as error:
            logger.debug("nothing can be noted in %s: %s", self.directory, error)
            return
        if is_another(self.directory / f"{self._stem}.store", identity):
            logger.error(
                "storage is not what this machine used last here: it was wiped or replaced, and what was spent"
                " before is not counted here; restore it, or go on if that was meant"
            )

    def check(self) -> None:
        """Make a file where journals lie, and delete it. No process takes it for a journal.

        Raises:
            OSError: None can be made there, or nothing written to it.
        """
        self._make_directory()
        path = self.directory / f"{self._stem}-{os.getpid()}-{os.urandom(4).hex()}.probe"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, b"\n")
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)

    def look(self) -> None:
        """Warn, once, of a directory that can't take records: before an outage in which it would have to."""
        looked, self._looked = self._looked, True
        try:
            if not looked:
                self.check()
        except OSError as error:
            logger.warning("no usage records could wait for storage in %s: %s; set journal_dir", self.directory, error)

    def _make_directory(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid") and self.directory.parent == Path(tempfile.gettempdir()):
            found = self.directory.lstat()
            if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
                raise PermissionError(f"{self.directory} belongs to somebody else; set journal_dir")

    def _create(self) -> JournalFile:
        self._make_directory()
        while True:
            path = self.directory / f"{self._stem}-{os.getpid()}-{os.urandom(4).hex()}.journal"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            if "fcntl" not in globals():
                return JournalFile(path, descriptor)
            if self._claimed(path, descriptor):
                break
            os.close(descriptor)  # another process took it for an orphan before it was locked, and deletes it
        directory = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(directory)  # a file whose name is lost with the power is lost, too
        finally:
            os.close(directory)
        return JournalFile(path, descriptor)

    @staticmethod
    def _claimed(path: Path, descriptor: int) -> bool:
        """Lock a file that was just made; whether it is still there, and ours."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(descriptor), path.stat())
        except (BlockingIOError, FileNotFoundError):
            return False


def _append(descriptor: int, lines: bytes) -> None:
    view = memoryview(lines)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _erased(line: bytes, customer: str) -> bytes | None:
    """A dead letter that names nobody; None if it is none of the customer's."""
    try:
        letter = json.loads(line)
        entry = letter["entry"]
        if entry["customer"] != customer:
            return None
        entry["customer"] = ""
        entry["usage"].pop("metadata", None)
        letter["why"] = letter["why"].replace(customer, "")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return json.dumps(letter).encode()
