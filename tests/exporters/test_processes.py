"""Real processes: killed at each point of a batch, and two at once. What was committed arrives, under its ids."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from respan_guard import Guard
from respan_guard.exporters import JSONLExporter
from tests.exporters.sink import book, check_nothing_is_lost, dead

# A process that exports, and kills itself (as kill -9 would) at the given point of its n-th batch.
DYING = """
import asyncio, os, signal, sys
from respan_guard import Guard
from respan_guard.dead_letters import DeadLetters
from respan_guard.delivery import Delivery
from respan_guard.exporters import ExportResult, JSONLExporter

url, path, point, count = sys.argv[1:5]
left = int(count)

def die(here):
    global left
    if here == point:
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

class Exporter(JSONLExporter):
    batch_size = 5

    async def export(self, batch):
        die("before the batch is sent")
        bad = {place: "no" for place, record in enumerate(batch) if record.id[-1] in "27"}
        good = [record for place, record in enumerate(batch) if place not in bad]
        await super().export(good)
        die("behind the batch, before anything is noted")
        return ExportResult(bad)

def around(cls, name, before, after):
    real = getattr(cls, name)
    async def wrapped(self, *args, **how):
        die(before)
        result = await real(self, *args, **how)
        die(after)
        return result
    setattr(cls, name, wrapped)

around(DeadLetters, "bury", "before a dead letter", "behind a dead letter")
around(Delivery, "_advance", "before the cursor moves", "behind the cursor's move")

async def main():
    guard = Guard(url)
    guard.add_exporter(Exporter(path))
    async with guard:
        while not any(s.cursor and not s.behind for s in await guard.exporters()):
            await asyncio.sleep(0.02)

asyncio.run(main())
"""
POINTS = [
    "before the batch is sent",
    "behind the batch, before anything is noted",
    "before a dead letter",
    "behind a dead letter",
    "before the cursor moves",
    "behind the cursor's move",
]


def lines(path: Path) -> list[str]:
    """Ids of the records in a file."""
    return [json.loads(line)["id"] for line in path.read_text().splitlines()] if path.exists() else []


async def expire(url: str) -> None:
    """Let the lease of a process that is no more end, without waiting for it."""
    async with Guard(url) as guard:
        for key, _ in await guard.lane().call(lambda backend: backend.facts("outbox")):
            await guard.lane().call(lambda backend, key=key: backend.set_fact("outbox", key, None))  # type: ignore[misc]


@pytest.mark.parametrize("point", POINTS)
async def test_a_process_that_is_killed_loses_nothing(tmp_path: Path, point: str) -> None:
    """Wherever it is killed, delivered, pending and dead letters are what was committed; the next process does the
    rest, and at most the batch in hand comes twice.
    """
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    path = tmp_path / "usage.jsonl"
    async with Guard(url) as guard:
        ids = await book(guard, 20)
    done = subprocess.run(
        [sys.executable, "-c", DYING, url, str(path), point, "2"], timeout=60, check=False, cwd=tmp_path
    )
    assert done.returncode == -signal.SIGKILL
    async with Guard(url) as guard:
        await check_nothing_is_lost(guard, "jsonl", set(lines(path)))
    await expire(url)
    subprocess.run([sys.executable, "-c", DYING, url, str(path), "never", "1"], timeout=60, check=True, cwd=tmp_path)
    bad = {name for name in ids if name[-1] in "27"}
    async with Guard(url) as guard:
        assert set(await dead(guard, "jsonl")) == bad
        await check_nothing_is_lost(guard, "jsonl", set(lines(path)))
    counts = Counter(lines(path))
    assert set(counts) == set(ids) - bad
    assert sum(counts.values()) - len(counts) <= 5


WORKER = """
import asyncio, os, sys
from respan_guard import Guard, Usage
from respan_guard.exporters import JSONLExporter

async def main():
    url, path, name = sys.argv[1:]
    guard = Guard(url)
    exporter = JSONLExporter(path)
    exporter.batch_size = 7
    guard.add_exporter(exporter)
    async with guard:
        for number in range(60):
            await guard.record(Usage(model="m", cost="0.000001"), f"c{number % 3}", entry_id=f"{name}-{number}")
            await asyncio.sleep(0.01)
        await guard.flush()
        print("done", flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


async def test_two_processes_deliver_each_record_once(tmp_path: Path) -> None:
    """Both record, one exports; when both end in peace every record is in the file exactly once."""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    path = tmp_path / "usage.jsonl"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, url, str(path), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n"
        for process in running:
            assert process.stdin is not None
            process.stdin.write("end\n")
            process.stdin.flush()
            assert process.wait(30) == 0
    finally:
        for process in running:
            process.kill()
            process.communicate()
    async with Guard(url) as guard:
        committed = [record.id async for record in guard.records()]
    assert len(committed) == 120
    assert Counter(lines(path)) == Counter(committed)


async def test_a_process_that_ends_hands_over_what_it_can(tmp_path: Path) -> None:
    """With a sink that hangs, closing takes a bounded time, and the next process delivers the rest."""

    class Hanging(JSONLExporter):
        async def export(self, batch: object) -> None:
            await asyncio.sleep(60)

    url = f"sqlite:///{tmp_path / 'guard.db'}"
    path = tmp_path / "usage.jsonl"
    guard = Guard(url)
    guard.add_exporter(Hanging(path))
    async with guard:
        ids = await book(guard, 3)
        began = guard.clock.monotonic()
    assert guard.clock.monotonic() - began < 30
    guard = Guard(url)
    guard.add_exporter(JSONLExporter(path))
    async with guard:
        await check_nothing_is_lost(guard, "jsonl", set(lines(path)))
    assert lines(path) == ids


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_exports_on_its_own(tmp_path: Path) -> None:
    """The child's guard is its own: it opens, exports what it recorded and closes; the parent's tasks are not its."""
    program = """
import asyncio, os, sys
from respan_guard import Guard, Usage
from respan_guard.exporters import JSONLExporter

guard = Guard(sys.argv[1])
guard.add_exporter(JSONLExporter(sys.argv[2]))

async def work(name):
    async with guard:
        await guard.record(Usage(model="m", cost=1), "c1", entry_id=name)

asyncio.run(work("parent"))
child = os.fork()
if child == 0:
    asyncio.run(work("child"))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    path = tmp_path / "usage.jsonl"
    subprocess.run([sys.executable, "-c", program, url, str(path)], timeout=60, check=True, cwd=tmp_path)
    assert lines(path) == ["own:parent", "own:child"]


def test_a_worker_without_a_loop_exports_too(tmp_path: Path) -> None:
    """A script that uses `guard.sync` delivers what it recorded before it is closed."""
    program = """
import sys
from respan_guard import Guard, Usage
from respan_guard.exporters import JSONLExporter

guard = Guard(sys.argv[1])
guard.add_exporter(JSONLExporter(sys.argv[2]))
with guard.sync:
    for number in range(3):
        guard.sync.record(Usage(model="m", cost=1), "c1", entry_id=str(number))
"""
    url = f"sqlite:///{tmp_path / 'guard.db'}"
    path = tmp_path / "usage.jsonl"
    subprocess.run([sys.executable, "-c", program, url, str(path)], timeout=60, check=True, cwd=tmp_path)
    assert lines(path) == ["own:0", "own:1", "own:2"]
