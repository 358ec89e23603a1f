"""A power cut at any moment: what reached the disk is found again, and nothing that was acknowledged is missing.

A process works on a store while a small C library, preloaded, logs every write and sync of its files in order
(`disk_log.c`). From the log the disk is rebuilt as a power cut at a random moment might leave it: what was synced is
there; of what was not, any part is, in any order and down to single sectors, as SQLite's own documentation of its
crash tests describes it (sqlite.org/testing.html, 3.3). Then the library opens that disk.

A file's name is taken to be durable with its first sync, as on ext4 and XFS.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from respan_guard import Guard

SECTOR = 512
CUTS = 40
ACKNOWLEDGED = "acknowledged"
WORK = """
import asyncio, os, sys
from decimal import Decimal
from respan_guard import Customer, Guard, Usage
from respan_guard.backends.sqlite import checkpointer

checkpointer._PAGES = 60  # of the log between checkpoints: several in this short run

async def main(folder, query, journal):
    told = os.open(f"{folder}/acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    async with Guard(f"sqlite:///{folder}/guard.db{query}", storage_timeout=60, journal_dir=journal) as guard:
        async def one(task):
            await guard.put_customer(Customer(customer_identifier=f"c{task}", period_budget=1000))
            for number in range(40):
                async with guard.admit(f"c{task}", estimate=Decimal("0.01")):
                    name = f"{task}-{number}"
                    await guard.record(Usage(model="m", cost=Decimal("0.001")), f"c{task}", entry_id=name)
                    os.write(told, f"own:{name}\\n".encode())
        await asyncio.gather(*[one(task) for task in range(6)])

asyncio.run(main(*sys.argv[1:]))
"""


class Disk:
    """The files of a directory, as far as they are durable, and what was written since."""

    def __init__(self) -> None:
        self.durable: dict[str, bytearray] = {}
        self.waiting: dict[str, list[tuple[str, int, bytes]]] = {}

    def apply(self, kind: str, path: str, offset: int, data: bytes) -> None:
        """Take one event of the log."""
        if kind == "s":
            file = self.durable.setdefault(path, bytearray())
            for change in self.waiting.pop(path, []):
                _change(file, *change)
        elif kind == "u":
            self.durable.pop(path, None)
            self.waiting.pop(path, None)
        else:
            self.waiting.setdefault(path, []).append((kind, offset, data))

    def after_a_cut(self, rng: random.Random) -> dict[str, bytearray]:
        """What may be left: all that is durable, and of the rest what the cache happened to have written."""
        found = {path: bytearray(file) for path, file in self.durable.items()}
        share = rng.choice([0.0, 0.5, 0.9, 1.0])
        for path, changes in self.waiting.items():
            file = found.setdefault(path, bytearray())
            for kind, offset, data in changes:
                if kind == "t":
                    if rng.random() < share:
                        _change(file, kind, offset, data)
                    continue
                for at in range(0, len(data), SECTOR):
                    if rng.random() < share:
                        _change(file, kind, offset + at, data[at : at + SECTOR])
        return found


def _change(file: bytearray, kind: str, offset: int, data: bytes) -> None:
    if kind == "t":
        del file[offset:]
        file.extend(bytes(offset - len(file)))
    else:
        file.extend(bytes(max(0, offset - len(file))))
        file[offset : offset + len(data)] = data


def events(log: Path) -> Iterator[tuple[str, str, int, bytes]]:
    """What the process did to its files, in order."""
    raw, at = memoryview(log.read_bytes()), 0
    while at < len(raw):
        kind, offset, length, path_length = struct.unpack_from("<cQIH", raw, at)
        at += 15
        path = bytes(raw[at : at + path_length]).decode()
        at += path_length
        yield kind.decode(), path, offset, bytes(raw[at : at + length])
        at += length


@pytest.fixture(scope="module")
def disk_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library to preload."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler to watch what reaches the disk")
    library = tmp_path_factory.mktemp("disk_log") / "disk_log.so"
    source = Path(__file__).with_name("disk_log.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


def run(library: Path, folder: Path, query: str) -> list[tuple[str, str, int, bytes]]:
    """Do the work on a store in `folder` and tell what it did to the disk."""
    store, log = folder / "store", folder / "log"
    store.mkdir()
    watched = os.environ | {"LD_PRELOAD": str(library), "DISK_LOG": str(log), "DISK_LOG_DIR": str(store)}
    command = [sys.executable, "-c", WORK, str(store), query, str(folder / "journal")]
    subprocess.run(command, env=watched, check=True, timeout=120, cwd=Path(__file__).parents[2])
    return [event for event in events(log) if not event[1].endswith("-shm")]  # the index is made anew from the log


async def after_cuts(done: list[tuple[str, str, int, bytes]], folder: Path, seed: int) -> tuple[int, int, int]:
    """Cut the power at random moments.

    Returns:
        How many stores were damaged, how many acknowledged records were gone, how many were acknowledged in all.
    """
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(len(done)), CUTS))
    disk, told, damaged, lost = Disk(), b"", 0, 0
    for number, event in enumerate(done):
        if cuts and number == cuts[0]:
            cuts.pop(0)
            left = disk.after_a_cut(rng)
            where = folder / f"cut-{number}"
            where.mkdir()
            for path, file in left.items():
                (where / path).write_bytes(file)
            async with Guard(f"sqlite:///{where}/guard.db", journal_dir=folder / "none") as guard:
                damaged += bool(await guard.verify())
                stored = {record.id async for record in guard.records()}
            lost += len(set(told.decode().split()) - stored)
            shutil.rmtree(where)
        if event[1] == ACKNOWLEDGED:
            told += event[3]
        else:
            disk.apply(*event)
    return damaged, lost, len(told.split())


async def test_a_power_cut_loses_nothing_that_was_acknowledged(disk_log: Path, tmp_path: Path) -> None:
    """40 cuts in a run with several checkpoints: `verify` passes after each, and every acknowledged record is there."""
    done = run(disk_log, tmp_path, "")
    assert sum(kind == "s" and path == "guard.db" for kind, path, _, _ in done) > 2, "no checkpoint came within the run"
    assert await after_cuts(done, tmp_path, seed=1) == (0, 0, 240)


async def test_the_simulation_finds_what_is_not_synced(disk_log: Path, tmp_path: Path) -> None:
    """With `synchronous=normal`, which says so, the last moments go, and the store is whole all the same."""
    done = run(disk_log, tmp_path, "?synchronous=normal")
    damaged, lost, _ = await after_cuts(done, tmp_path, seed=2)
    assert damaged == 0
    assert lost > 0
