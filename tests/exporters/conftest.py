"""Guards over every embedded store, and a server that answers as it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Guard
from respan_guard.exporters.http import Sender
from respan_guard.testing import FakeClock
from tests.guard.conftest import store
from tests.guard.test_telemetry import measured

from .sink import Sink

__all__ = ["measured", "store"]

MakeGuard = Callable[..., Guard]


@pytest.fixture
def clock() -> FakeClock:
    """A clock that stands still."""
    return FakeClock()


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage URL of an empty store."""
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'guard.db'}?synchronous=normal"


@pytest.fixture
def make_guard(storage: str, clock: FakeClock, tmp_path: Path) -> MakeGuard:
    """Make a guard with options."""

    def make(**options: Any) -> Guard:
        defaults: dict[str, Any] = {"clock": clock, "journal_dir": tmp_path / "journal"}
        return Guard(storage, **(defaults | options))

    return make


@pytest.fixture
async def sink(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Sink]:
    """A running server; connections to it are closed behind the test."""
    senders: list[Sender] = []
    make = Sender.__init__

    def made(self: Sender, *args: Any, **how: Any) -> None:
        make(self, *args, **how)
        senders.append(self)

    monkeypatch.setattr(Sender, "__init__", made)
    async with Sink() as running:
        yield running
        for sender in senders:
            await sender.close()
