"""An API over every embedded store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from respan_guard import Guard
from respan_guard.testing import FakeClock

from .support import MOUNT, Client, mounted


@pytest.fixture
def clock() -> FakeClock:
    """A clock that stands still: 15 January 2026, noon UTC."""
    return FakeClock()


@pytest.fixture
def options() -> dict[str, Any]:
    """Options of the guard; a test class may override it."""
    return {}


@pytest.fixture(params=["memory", "sqlite"])
async def guard(
    request: pytest.FixtureRequest, clock: FakeClock, tmp_path: Path, options: dict[str, Any]
) -> AsyncIterator[Guard]:
    """An open guard."""
    storage = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'guard.db'}?synchronous=normal"
    async with Guard(storage, clock=clock, journal_dir=tmp_path / "journal", **options) as opened:
        yield opened
        assert await opened.verify() == []


@pytest.fixture
async def api(guard: Guard) -> AsyncIterator[Client]:
    """A client with the key that may do everything."""
    transport = httpx2.ASGITransport(mounted(guard))
    async with httpx2.AsyncClient(transport=transport, base_url=f"http://guard{MOUNT}") as http:
        yield Client(http)
