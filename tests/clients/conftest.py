"""A provider that keeps its own books, and guards over every embedded store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Guard
from respan_guard.testing import StandInProvider

MakeGuard = Callable[..., Guard]


@pytest.fixture
def provider() -> StandInProvider:
    """A provider that no one has asked anything yet."""
    return StandInProvider()


@pytest.fixture
def url(provider: StandInProvider) -> Iterator[str]:
    """Where it listens."""
    with provider.serve() as root:
        yield root


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage URL of an empty store."""
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'guard.db'}"


@pytest.fixture
def make_guard(storage: str, tmp_path: Path) -> Iterator[MakeGuard]:
    """Make guards with options that are closed in the end."""
    made: list[Guard] = []
    # A busy machine is not what is tested here.
    patient: dict[str, Any] = {"journal_dir": tmp_path / "journal", "storage_timeout": 30}

    def make(**options: Any) -> Guard:
        made.append(Guard(storage, **(patient | options)))
        return made[-1]

    yield make
    for guard in made:
        guard.sync.close()


@pytest.fixture
def guard(make_guard: MakeGuard) -> Guard:
    """A guard whose customers have a budget that tests don't use up."""
    return make_guard(default_limits={"rate_limit": 1000, "budget_duration": "monthly", "period_budget": 10})
