"""Attacks on the engine: poison, full disks, journals, and stores that hang."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Guard, StorageUnavailable, Usage
from respan_guard.backends.base import Record
from respan_guard.errors import InvalidInput
from respan_guard.journal import Journal
from respan_guard.testing import FakeClock

from .conftest import MakeGuard
from .faulty import FaultyBackend, faulty_guard, live_holds
from .test_journal import entry

DIME = Decimal("0.1")


# -- poison ------------------------------------------------------------------------------------------


async def test_metadata_that_no_store_can_keep_is_refused_at_once(make_guard: MakeGuard) -> None:
    """It is the recording app's error, not everybody's outage."""
    async with make_guard() as guard:
        with pytest.raises(InvalidInput, match="JSON values"):
            guard.record_soon(Usage(cost=1, metadata={"when": object()}), "c1")
        await guard.record(Usage(cost=1), "c1")
        assert (await guard.status("c1")).total_calls == 1


async def test_a_models_name_without_an_encoding_fails_nobodys_batch(make_guard: MakeGuard) -> None:
    """A client's JSON may hold a lone surrogate; it is asked for, held, booked and read like any other name."""
    async with make_guard(default_limits={"total_budget": 1}, unknown_price="flag") as guard:
        async with guard.admit("c1", estimate=Usage("gpt-\ud800", 1, 1)) as admission:
            await admission.record(Usage("gpt-\ud800", 1, 1))
        await guard.flush()
        assert [record.model async for record in guard.records()] == ["gpt-?"]


async def test_an_op_that_can_never_be_stored_does_not_stop_the_others(tmp_path: Path) -> None:
    """Even if it got as far as the inbox it is found, kept as a dead letter, and the rest of its batch is stored."""
    async with Guard(f"sqlite:///{tmp_path / 'guard.db'}", journal_dir=tmp_path) as guard:
        poison = guard.make_entry(Usage(cost=1), "c1", source="manual")
        poison.model = "\ud800"
        lane = guard.lane()
        lane.post(*[Record(guard.make_entry(Usage(cost=1), "c1", source="manual")) for _ in range(5)], Record(poison))
        assert await lane.record(poison) is None
        guard.record_soon(Usage(cost=1), "c1")
        await guard.flush()
        assert (await guard.status("c1")).total_spend == 6
        assert guard._homes._journal.dead_letters.exists()
        assert guard._homes._journal.pending == 0


async def test_poison_during_an_outage_keeps_the_order(store: FaultyBackend, tmp_path: Path) -> None:
    """An overflow splits a batch and storage fails in the middle: the release still comes behind its record."""
    async with faulty_guard(tmp_path, default_limits={"total_budget": 9_000_000}) as guard:
        await guard.record(Usage(cost=8_000_000), "whale")
        admission = await guard.admit("c1", estimate=DIME)
        seen: list[str] = []
        apply = store.apply
        failing = True

        async def recording(ops: Any, now: int | None = None) -> Any:
            nonlocal failing
            if failing and len(ops) == 1 and isinstance(ops[0], Record) and ops[0].entry.customer == "c1":
                failing = False
                raise StorageUnavailable("just now")
            found = await apply(ops, now)
            seen.extend(type(op).__name__ for op in ops if getattr(op, "customer", "c1") == "c1")
            return found

        store.apply = recording  # type: ignore[method-assign]
        guard.record_soon(Usage(cost=8_000_000), "whale")
        admission.record_soon(Usage(cost=DIME))
        admission.end()
        await guard.flush()
        assert not failing
        assert seen.index("Record") < seen.index("Release")
        assert [record.late async for record in guard.records("c1")] == [False]


async def test_a_dead_letter_that_cannot_be_written_stops_nothing(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full, too: the entry is in the log, and the home goes on."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("respan_guard.journal._append", full)
    async with faulty_guard(tmp_path) as guard:
        for _ in range(2):
            await guard.record(Usage(cost=8_000_000), "whale")
        await guard.record(Usage(cost=1), "c1")
        assert (await guard.status("c1")).total_spend == 1
    assert "this is it" in caplog.text


def test_an_overflow_in_memory_neither_reaches_the_app_nor_leaks_the_hold() -> None:
    """The end of a request never raises: the hold is released, the record that can't be counted is in the log."""
    guard = Guard("memory://", clock=FakeClock())
    guard.record_soon(Usage(cost=8_000_000), "whale")
    admission = guard.sync.admit("whale", estimate=DIME).admission
    admission.end(admission.entry(Usage(cost=8_000_000), "manual"))
    assert asyncio.run(live_holds(guard)) == 0
    guard.sync.record(Usage(cost=8_000_000), "whale")
    assert guard.sync.status("whale").total_spend == 8_000_000


# -- the journal -------------------------------------------------------------------------------------


def test_half_a_line_of_a_full_disk_does_not_swallow_the_next_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write that failed was not acknowledged, the one behind it was: that one is read back."""
    journal = Journal(tmp_path, "store")
    journal.write([entry(1)])
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        write(descriptor, bytes(data[: len(data) // 2]))
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        with pytest.raises(OSError, match="no space left"):
            journal.write([entry(2)])
    journal.write([entry(3)])
    journal.write([entry(4)])
    file = journal.rotate()
    assert file is not None
    assert [e.id for e in file.entries()] == ["e1", "e3", "e4"]
    file.close()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")
def test_a_journal_that_somebody_else_planted_is_not_booked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory for all users must not let one of them book adjustments for another."""
    journal = Journal(tmp_path, "store")
    journal.write([entry(1)])
    journal.close()
    uid = os.getuid()
    with monkeypatch.context() as patched:
        patched.setattr(os, "getuid", lambda: uid + 1)
        assert Journal(tmp_path, "store").orphans() == []
    assert len(Journal(tmp_path, "store").orphans()) == 1


def test_lines_that_are_json_but_no_entry_do_not_stop_the_rest(tmp_path: Path) -> None:
    """Whatever lies in the file, what can be read is stored."""
    journal = Journal(tmp_path, "store")
    journal.write([entry(1)])
    file = journal.rotate()
    assert file is not None
    good = file.path.read_bytes()
    bad_cost = json.loads(good) | {"usage": {"cost": "much"}}
    file.path.write_bytes(b'5\n[]\n"x"\n' + json.dumps(bad_cost).encode() + b"\n\n" + good)
    assert [e.id for e in file.entries()] == ["e1"]
    file.close()


async def test_a_record_that_cannot_be_stored_leaves_no_journal_that_comes_back_for_ever(
    store: FaultyBackend, tmp_path: Path
) -> None:
    """Replaying a journal of nothing but poison buries it and deletes the file."""
    async with faulty_guard(tmp_path) as guard:
        await guard.record(Usage(cost=8_000_000), "whale")
        guard._homes._journal.write([guard.make_entry(Usage(cost=8_000_000), "whale", source="manual")])
        await guard.record(Usage(cost=1), "c1")
        await guard.flush()
    assert list(tmp_path.glob("*.journal")) == []
    assert guard._homes._journal.dead_letters.read_text().count("\n") == 1


async def test_closing_while_the_store_hangs_keeps_everything_on_disk(
    store: FaultyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shutdown is bounded, the batch on its way is journalled, and the next process books it once."""
    monkeypatch.setattr("respan_guard.home._CLOSE_TIMEOUT", 0.05)
    guard = faulty_guard(tmp_path, storage_timeout=0.02)
    await guard.open()
    store.gate = asyncio.Event()
    for number in range(3):
        guard.record_soon(Usage(cost=1), "c1", entry_id=str(number))
    await guard.aclose()
    assert len(list(tmp_path.glob("*.journal"))) == 1
    store.gate = None
    async with faulty_guard(tmp_path) as again:
        await asyncio.gather(*again._homes._app._calls)  # type: ignore[union-attr]  # the replay
        assert (await again.status("c1")).total_spend == 3
