"""Guards over every embedded store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Guard
from respan_guard.backends import registry
from respan_guard.testing import FakeClock

from .faulty import FaultyBackend

MakeGuard = Callable[..., Guard]


@pytest.fixture
def clock() -> FakeClock:
    """A clock that stands still."""
    return FakeClock()


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage URL of an empty store."""
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'guard.db'}"


@pytest.fixture
def make_guard(storage: str, clock: FakeClock, tmp_path: Path) -> MakeGuard:
    """Make a guard with options; its journal lies in the test's own directory."""

    def make(**options: Any) -> Guard:
        defaults: dict[str, Any] = {"clock": clock, "journal_dir": tmp_path / "journal"}
        return Guard(storage, **(defaults | options))

    return make


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyBackend]:
    """The store behind faulty://one, which becomes a known scheme."""
    monkeypatch.setitem(registry._BUILT_IN, "faulty", f"{FaultyBackend.__module__}:FaultyBackend")
    yield FaultyBackend("faulty://one")
    FaultyBackend.stores.clear()
