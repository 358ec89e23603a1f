"""The same on every store: order, cursors, leases, dead letters, pruning."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from respan_guard import Guard, UsageRecord
from respan_guard.exporters import BatchRefused, ExportResult
from respan_guard.testing import FakeClock
from tests.backends.conftest import BACKENDS, storage_url

from .sink import Keeper, book, check_nothing_is_lost, dead, delivery


@pytest.fixture(params=BACKENDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Every store there is."""
    return storage_url(request.param, tmp_path)


async def test_a_whole_life_on_every_store(storage: str, clock: FakeClock, tmp_path: Path) -> None:
    """Two processes of one exporter, a row that is refused, a replay, a takeover, pruning behind all of it."""
    options: dict[str, Any] = {"clock": clock, "journal_dir": tmp_path / "journal"}
    if storage.startswith("redis"):
        options["namespace"] = f"test-{secrets.token_hex(6)}"
    keeper = Keeper(batch_size=4)
    bad = {"own:r5"}

    def fault(batch: Sequence[UsageRecord]) -> ExportResult | None:
        if any(record.id in bad for record in batch):
            raise BatchRefused("HTTP 400")
        return None

    keeper.fault = fault
    async with Guard(storage, **options) as guard:
        first, second = delivery(guard, keeper, "one"), delivery(guard, keeper, "two")
        ids = await book(guard, 12)
        for _ in range(12):
            await first.step()
            await second.step()
            await check_nothing_is_lost(guard, "keeper", keeper.ids)
        assert [record.id for record in keeper.kept] == [name for name in ids if name not in bad]
        assert set(await dead(guard, "keeper")) == bad
        [status] = await guard.exporters()
        assert (status.behind, status.dead_letters) == (0, 1)
        ids += await book(guard, 3, start=12)
        clock.advance(31)  # the first falls silent
        await second.step()
        assert second.leads
        assert len(keeper.kept) == 14
        clock.advance(timedelta(days=60))
        day = clock.now.date() - timedelta(days=40)
        assert await guard.prune(day) == 5, "up to the dead letter, and no further"
        bad.clear()
        assert await guard.lane().call(second.letters.replay) == 1
        for _ in range(3):
            await second.step()
        assert keeper.ids == set(ids)
        assert await guard.prune(day) == 10
        assert await guard.verify() == []
