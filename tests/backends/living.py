"""What an app and its operator do with a store, from the first customer to the last page."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

from typer.testing import CliRunner

from respan_guard import BudgetExceeded, Customer, Guard, Usage
from respan_guard.cli.app import app

__all__ = ["checked", "live"]


async def live(url: str, **options: Any) -> None:
    """Limits, admissions, records, pages, a reader's place, the kill switch and a proof, over one guard.

    The store must be empty, and is left with one customer who has spent 3 USD of 3.
    """
    async with Guard(url, **{"storage_timeout": 10.0, **options}) as guard:
        await guard.put_customer(Customer(customer_identifier="ann", name="Ann", total_budget=3, rate_limit=100))
        for _ in range(3):
            async with guard.admit("ann", estimate=Decimal(1)) as admission:
                await admission.record(Usage(model="gpt-4o", input_tokens=10, cost="1"))
        try:
            async with guard.admit("ann", estimate=Decimal(1)):
                raise AssertionError("a spent budget was not noticed")
        except BudgetExceeded:
            pass
        assert (await guard.status("ann")).total_spend == 3
        assert [record.usage.input_tokens async for record in guard.records("ann")] == [10, 10, 10]
        assert [report.customer.name for report in await guard.list_customers()] == ["Ann"]
        lane = guard.lane()
        await lane.call(lambda backend: backend.set_cursor("reader", 2))
        assert await lane.call(lambda backend: backend.cursor("reader")) == 2
        await guard.switch.set("shadow", reason="a try")
        async with guard.admit("ann", estimate=Decimal(1)) as admission:
            assert admission.decision.shadow
        await guard.switch.set(None)
        assert await guard.verify() == []


def checked(url: str) -> dict[str, Any]:
    """What `respan-guard check` says of a store, and `respan-guard verify` with it."""
    runner = CliRunner()
    found = runner.invoke(app, ["check", "--json", "--storage", url])
    verified = runner.invoke(app, ["verify", "--json", "--storage", url])
    assert verified.exit_code == 0, verified.stdout
    told: dict[str, Any] = json.loads(found.stdout)
    assert found.exit_code == (0 if told["ok"] else 1)
    return told
