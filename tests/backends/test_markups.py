"""Sums with markup over every store: what a plain sum over the records comes to."""

from __future__ import annotations

import secrets
from collections import defaultdict
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from random import Random

import pytest

from respan_guard import Customer, Guard, Usage
from respan_guard import markups as markups_module
from respan_guard.backends.base import HOUR_MS, UsageQuery
from respan_guard.clock import SystemClock
from respan_guard.decision import as_datetime
from respan_guard.markups import all_markups, marked_sums
from tests.backends.conftest import BACKENDS, storage_url

MARKUPS = {"a": "20", "b": "20", "c": "20", "d": "33.333", "e": "0", "f": "7.5", "g": "12", "gone": "50"}
DEFAULT = Decimal("7.5")


@pytest.mark.parametrize("at_once", [1000, 2])
@pytest.mark.parametrize("name", BACKENDS)
async def test_sums_with_markup_are_those_of_the_records(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """By model, day and hour, however many customers have a markup of their own; a deleted one's is the default."""
    monkeypatch.setattr(markups_module, "_AT_ONCE", at_once)
    random = Random(3)
    clock = SystemClock()
    now = as_datetime(clock.now_ms())
    namespace = f"test-{secrets.token_hex(6)}" if name == "redis" else "default"
    limits = {"markup_percentage": DEFAULT}
    url, journal = storage_url(name, tmp_path), tmp_path / "journal"
    async with Guard(url, clock=clock, default_limits=limits, journal_dir=journal, namespace=namespace) as guard:
        for customer, markup in MARKUPS.items():
            await guard.put_customer(Customer(customer_identifier=customer, markup_percentage=markup))
        for _ in range(80):
            cost = Decimal(random.randrange(10**9)).scaleb(-9)
            time = now - timedelta(hours=random.randrange(30), minutes=random.randrange(60))
            usage = Usage(model=random.choice("mno"), cost=cost, time=time)
            await guard.record(usage, random.choice([*MARKUPS, "stranger", None]))
        await guard.flush()
        await guard.delete_customer("gone")
        right: defaultdict[object, Decimal] = defaultdict(Decimal)
        async for record in guard.records():
            own = MARKUPS.get(record.customer_identifier)
            marked = (record.cost or 0) * (100 + (DEFAULT if own is None else Decimal(own))) / 100
            for key in (None, record.model, record.day, record.time.timestamp() * 1000 // HOUR_MS):
                right[key] += marked
        assert sum(row.cost_with_markup for row in await guard.usage()) == right[None]
        for row in (*await guard.usage("model"), *await guard.usage("day")):
            assert row.cost_with_markup == right[row.model or (row.day and row.day.isoformat())]
        hour = clock.now_ms() // HOUR_MS
        query = UsageQuery(by=("hour",), first_hour=hour - 23, end_hour=hour + 1)

        sums = await marked_sums(guard, guard.lane(), query, await all_markups(guard, guard.lane()))
        rows = await guard.lane().call(lambda backend: backend.usage(query))
        hours = [(row.hour or 0, row.amounts.cost) for row in rows]
        assert len(hours) > 5
        assert [sums.cost(cost, when=at) for at, cost in hours] == [right[at] for at, _ in hours]
        assert sums.cost(sum(cost for _, cost in hours)) == sum(right[at] for at, _ in hours)
        assert await guard.verify() == []
