"""Operations and files that the tests of the SQLite store share."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from respan_guard.backends.base import Admit, Entry, Limit, Record
from respan_guard.backends.sqlite import SQLiteBackend
from respan_guard.usage import Usage

T = TypeVar("T")
DAY = 738_000
NOW = 1_700_000_000_000
BUDGET = Limit("period_budget", "span", "cost", 1000, first_day=DAY, end_day=DAY + 30)
RATE = Limit("rate_limit", "rate", "requests", 1_000_000, window_ms=60_000)


def admit(name: str, customer: str = "alice", *, cost: int = 100, limits: tuple[Limit, ...] = (BUDGET,)) -> Admit:
    """An admission that holds `cost`."""
    return Admit(name, customer, "", DAY, 0, 1 << 50, limits, "gpt", cost=cost)


def record(
    name: str, customer: str = "alice", *, cost: int | None = 60, day: int = DAY, at_ms: int = NOW, **usage: object
) -> Record:
    """An entry without an admission."""
    told = Usage(model="gpt", **usage)  # type: ignore[arg-type]  # whatever the test says
    return Record(Entry(name, customer, day, at_ms, cost, 10, 5, "gpt", usage=told))


@asynccontextmanager
async def opened(path: Path, **options: object) -> AsyncIterator[SQLiteBackend]:
    """A store that is open inside the block."""
    backend = SQLiteBackend(f"sqlite:///{path}", **options)  # type: ignore[arg-type]  # whatever the test says
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


async def inside(backend: SQLiteBackend, work: Callable[[sqlite3.Connection], T]) -> T:
    """Run `work` on the connection that writes, to set it up for a fault that can't be had otherwise."""
    link = backend._write_link
    assert link is not None
    return await link.run(work)


def tamper(path: Path, *statements: str) -> None:
    """Change the file behind the store's back."""
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.execute("PRAGMA ignore_check_constraints = ON")
        for statement in statements:
            db.execute(statement)
    finally:
        db.close()


def script(body: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python script of its own process."""
    return subprocess.Popen(
        [sys.executable, "-c", body, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def finished(process: subprocess.Popen[str], timeout: float = 60) -> str:
    """What a script printed; it must have gone well."""
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors
    return output
