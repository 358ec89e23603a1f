"""Who is near a budget and who over, over every store: what a plain sum over the records comes to."""

from __future__ import annotations

import secrets
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from random import Random

import pytest

from respan_guard import Customer, Guard, Usage
from respan_guard.console import near as near_module
from respan_guard.console.near import near_budgets
from respan_guard.decision import as_datetime
from tests.backends.conftest import BACKENDS, storage_url


@pytest.mark.parametrize("name", BACKENDS)
async def test_near_is_a_sum_over_records(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Now and by an earlier moment, of budgets by month, by day and in all."""
    monkeypatch.setattr(near_module, "_PAGE", 4)
    random = Random(5)
    namespace = f"test-{secrets.token_hex(6)}" if name == "redis" else "default"
    limits = {"budget_duration": "monthly", "period_budget": 10}
    url, journal = storage_url(name, tmp_path), tmp_path / "journal"
    async with Guard(url, default_limits=limits, journal_dir=journal, namespace=namespace) as guard:
        names = [f"c{number}" for number in range(15)]
        for number, customer in enumerate(names):
            own = ({}, {"total_budget": 12}, {"budget_duration": "daily", "period_budget": 2})[number % 3]
            if own:
                await guard.put_customer(Customer.model_validate({"customer_identifier": customer} | own))
        now = as_datetime(guard.now_ms())
        for _ in range(60):
            time = now - timedelta(days=random.randrange(12))
            cost = Decimal(random.randrange(3_000)) / 1000
            await guard.record(Usage(model="m", cost=cost, time=time), random.choice(names))
        await guard.flush()
        records = [record async for record in guard.records()]
        then = now - timedelta(days=6)
        for moment in (now, then):
            today = moment.date()
            right: dict[str, set[str]] = {"near": set(), "over": set()}
            for number, customer in enumerate(names):
                costs = [
                    (date.fromisoformat(record.day), record.cost or Decimal(0))
                    for record in records
                    if record.customer_identifier == customer and date.fromisoformat(record.day) <= today
                ]
                month = sum(cost for day, cost in costs if (day.year, day.month) == (today.year, today.month))
                of_today = sum(cost for day, cost in costs if day == today)
                whole = sum(cost for _, cost in costs)
                budgets = ([(month, 10)], [(month, 10), (whole, 12)], [(of_today, 2)])[number % 3]
                if any(used >= budget for used, budget in budgets):
                    right["over"].add(customer)
                elif any(used * 100 >= budget * 80 for used, budget in budgets):
                    right["near"].add(customer)
            found = await near_budgets(guard, guard.lane(), int(moment.timestamp() * 1000))
            for state, who in right.items():
                assert (set(found.of(state)), found.count(state)) == (who, len(who))
            assert moment is then or right["near"] | right["over"]
