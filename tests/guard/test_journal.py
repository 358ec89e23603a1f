"""The journal: synced before it is believed, adopted by whoever comes after, torn ends tolerated."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from respan_guard import Guard, Usage
from respan_guard.backends.base import Entry
from respan_guard.journal import Journal, JournalFile, entry_from_dict, entry_to_dict


def entry(number: int, customer: str = "c1") -> Entry:
    """A distinguishable entry."""
    usage = Usage("gpt-4o", 10, 20, cost=Decimal("0.1"), time=datetime(2026, 1, 1, tzinfo=UTC), metadata={"n": number})
    return Entry(id=f"e{number}", customer=customer, day=740000, at_ms=1, cost=100, input_tokens=10, usage=usage)


def test_an_entry_survives_its_way_through_json() -> None:
    """What is read back equals what was written, money and time included."""
    assert entry_from_dict(entry_to_dict(entry(1))) == entry(1)


def test_what_was_written_is_taken_once_in_order(tmp_path: Path) -> None:
    """Rotating gives the records away; they are gone from disk only when they are said to be stored."""
    journal = Journal(tmp_path, "store")
    journal.write([entry(1), entry(2)])
    journal.write([entry(3)])
    assert journal.pending == 3
    file = journal.rotate()
    assert file is not None
    assert [e.id for e in file.entries()] == ["e1", "e2", "e3"]
    assert file.path.exists()
    assert journal.pending == 3  # they are not stored yet
    journal.write([entry(4)])
    assert journal.pending == 4
    file.done()
    assert journal.pending == 1
    file = journal.rotate()
    assert file is not None
    file.close()  # left to the next process
    assert journal.pending == 0
    file.path.unlink()
    assert not list(tmp_path.iterdir())
    assert journal.rotate() is None


def test_files_and_directory_belong_to_this_user_alone(tmp_path: Path) -> None:
    """Usage records are nobody else's to read."""
    journal = Journal(tmp_path / "journal", "store")
    journal.write([entry(1)])
    [path] = (tmp_path / "journal").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_live_process_keeps_its_file_and_a_dead_ones_is_adopted(tmp_path: Path) -> None:
    """Another process's file is taken over once that process is gone, even if it was killed."""
    program = f"""
import os, signal
from respan_guard.journal import Journal
from tests.guard.test_journal import entry
Journal({str(tmp_path)!r}, "store").write([entry(7)])
print("ready", flush=True)
signal.pause()
"""
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=os.getcwd())
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    journal = Journal(tmp_path, "store")
    assert journal.orphans() == []
    writer.kill()
    writer.wait()
    writer.stdout.close()
    [orphan] = journal.orphans()
    assert [e.id for e in orphan.entries()] == ["e7"]
    assert Journal(tmp_path, "store").orphans() == []  # held by the first that found it
    orphan.close()
    assert len(Journal(tmp_path, "store").orphans()) == 1


def test_another_stores_files_are_left_alone(tmp_path: Path) -> None:
    """Two stores may share a directory."""
    Journal(tmp_path, "one").write([entry(1)])
    assert Journal(tmp_path, "two").orphans() == []


def test_a_torn_last_line_is_left_out_and_the_rest_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A process that died while writing acknowledged nothing of that line."""
    journal = Journal(tmp_path, "store")
    journal.write([entry(1), entry(2)])
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    file = journal.rotate()
    assert file is not None
    for cut in range(len(whole) // 2 + 1, len(whole) - 1, 7):
        path.write_bytes(whole[:cut])
        assert [e.id for e in file.entries()] == ["e1"]
    assert "torn" in caplog.text
    file.close()


def test_who_is_erased_is_erased_from_dead_letters(tmp_path: Path) -> None:
    """Name and metadata go, amounts stay, as do the letters of others; what is appended meanwhile stays, too."""
    journal = Journal(tmp_path, "store")
    assert journal.erase("zoë") == 0
    letters = []
    for number, customer in enumerate(["zoë", "bob", "zoë", ""]):
        letter = replace(entry(number), customer=customer)
        letters.append(replace(letter, usage=Usage(model="m", metadata={"mail": f"{customer}@example.com"})))
        journal.bury(letters[-1], f"what customer {customer!r} used is too much")
    before = journal.dead_letters.read_bytes()
    assert journal.erase("zoë") == 2
    text = journal.dead_letters.read_text()
    assert len(journal.dead_letters.read_bytes()) == len(before)
    found = [json.loads(line) for line in text.splitlines()]
    assert [letter["entry"]["customer"] for letter in found] == ["", "bob", "", ""]
    assert [letter["entry"]["id"] for letter in found] == [letter.id for letter in letters]
    assert "zo" not in text
    assert [letter["entry"]["usage"].get("metadata") for letter in found] == [
        None, {"mail": "bob@example.com"}, None, {"mail": "@example.com"}
    ]  # fmt: skip
    assert journal.waiting().dead == 4


def test_a_record_the_store_never_takes_is_kept_as_a_dead_letter(tmp_path: Path) -> None:
    """Dead letters are readable and say why."""
    journal = Journal(tmp_path, "store")
    journal.bury(entry(1), "its day is pruned")
    text = journal.dead_letters.read_text()
    assert "its day is pruned" in text
    assert '"e1"' in text


def test_a_file_that_was_adopted_while_it_was_made_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process looks for orphans between open and lock: what is acknowledged lies in a file that is there."""
    journal, other = Journal(tmp_path, "store"), Journal(tmp_path, "store")
    real = fcntl.flock
    adopted: list[JournalFile] = []

    def late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        adopted.extend(other.orphans())
        if how & fcntl.LOCK_NB:
            real(descriptor, how)  # held by the other one
        for file in adopted:
            file.done()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    journal.write([entry(1)])
    assert len(adopted) == 1
    journal.close()
    [found] = other.orphans()
    assert [e.id for e in found.entries()] == ["e1"]


def test_a_file_that_was_adopted_and_deleted_before_the_lock_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock can be had, but of a file without a name."""
    journal = Journal(tmp_path, "store")
    real = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        for file in Journal(tmp_path, "store").orphans():
            file.done()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    journal.write([entry(1)])
    journal.close()
    [found] = Journal(tmp_path, "store").orphans()
    assert [e.id for e in found.entries()] == ["e1"]


def test_a_look_leaves_nothing_that_could_be_taken_for_a_journal(tmp_path: Path) -> None:
    """It makes a file and deletes it: nobody adopts it, and none is left."""
    journal, other = Journal(tmp_path / "j", "store"), Journal(tmp_path / "j", "store")
    journal.check()
    assert list(journal.directory.iterdir()) == []
    assert other.orphans() == []


@pytest.mark.skipif(os.getuid() == 0, reason="root writes anywhere")
def test_a_directory_that_is_not_ours_to_write(tmp_path: Path) -> None:
    """It is found by looking."""
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        Journal(tmp_path, "store").check()
    tmp_path.chmod(0o700)


async def test_a_guard_that_can_journal_nothing_says_so_when_it_opens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, before there is an outage: a warning that names the directory and the setting. It goes on."""
    (tmp_path / "file").touch()
    async with Guard(f"sqlite:///{tmp_path}/guard.db", journal_dir=tmp_path / "file") as guard:
        await guard.record(Usage(cost=1), "c1")
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(told) == 1
        assert str(tmp_path / "file") in told[0]
        assert "set journal_dir" in told[0]
    caplog.clear()
    async with Guard(f"sqlite:///{tmp_path}/guard.db", journal_dir=tmp_path / "new"):
        assert [record for record in caplog.records if record.levelname == "WARNING"] == []
        assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".store"]
