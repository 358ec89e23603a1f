"""The same answers on every store: one life of an API, from the first log to the deletion."""

from __future__ import annotations

import secrets
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest

from respan_guard import Guard
from respan_guard.testing import FakeClock
from tests.backends.conftest import BACKENDS, storage_url

from .support import MOUNT, Client, mounted


@pytest.mark.parametrize("name", BACKENDS)
async def test_one_life(name: str, tmp_path: Path) -> None:
    """Logged, listed, filtered, grouped, summed, blocked, erased: to the cent, whatever the store."""
    options: dict[str, Any] = {"namespace": f"test-{secrets.token_hex(6)}", "journal_dir": tmp_path}
    clock = FakeClock()
    if name in ("memory", "sqlite"):
        options["clock"] = clock
    async with Guard(storage_url(name, tmp_path), **options) as guard:
        transport = httpx2.ASGITransport(mounted(guard))
        async with httpx2.AsyncClient(transport=transport, base_url=f"http://x{MOUNT}") as http:
            await live(Client(http), guard)


async def live(api: Client, guard: Guard) -> None:
    """What happens to an API."""
    first = await api.log(customer_params={"customer_identifier": "a/b", "name": "Ann"}, input="Hi", output="Hello")
    assert first["cost"] == Decimal("0.00000135")
    again = [await api.log(customer_identifier="bob", custom_identifier="x", cost=n) for n in (1, 2)]
    assert [log["cost"] for log in again] == [1, 1]
    rows = [{"model": f"m{n % 3}", "customer_identifier": f"c{n % 4}", "cost": n / 10, "latency": n} for n in range(40)]
    bulk = await api("POST", "/api/request-logs/bulk/", {"logs": [*rows, {"model": ""}]}, 201)
    assert (bulk["success_count"], [error["index"] for error in bulk["errors"]]) == (40, [40])
    await guard.flush()
    for sort in ("-id", "id", "-cost", "latency"):
        logs = await api.follow(await api.logs(page_size=7, sort_by=sort))
        assert len({log["unique_id"] for log in logs}) == len(logs) == 42
    costs = [log["cost"] for log in await api.follow(await api.logs(sort_by="-cost", page_size=9))]
    assert costs == sorted(costs, reverse=True)
    assert (await api.logs({"customer_identifier": {"value": ["c1"]}}))["count"] == 10
    assert (await api.logs({"model": {"value": ["m2"]}, "cost": {"operator": "gt", "value": [3]}}))["count"] == 3
    assert await api("GET", f"/api/request-logs/{first['unique_id']}/")
    await api.log({"status": "error"}, customer_identifier="c3", model="m0", log_type="tool")
    assert (await api.logs({"status": {"value": ["failed"]}}))["count"] == 1
    summary = await api("POST", "/api/request-logs/summary/")
    assert summary["total_cost"] == Decimal("79.00000135")
    groups = await api("GET", "/api/request-logs/groups/", group_by="customer_identifier")
    assert groups["results"][0]["customer_identifier"] == "c3"
    assert groups["results"][0]["error_count"] == 0
    users = await api.follow(await api.users(page_size=2, sort_by="-total_cost"))
    assert [user["customer_identifier"] for user in users] == ["c3", "c2", "c1", "c0", "bob", "a/b"]
    by_latency = (await api.users(sort_by="-average_latency"))["results"]
    assert by_latency[0]["customer_identifier"] == "c3"
    found = await api("POST", "/api/dashboard/users/", {}, summary_type="all")
    assert found["summary"]["active_users"] == 6
    body = {"metrics_to_aggregate": ["total_cost"]}
    breakdown = await api("POST", "/api/dashboard/time-series/breakdown/", body, summary_type="all",
                          breakdown_by="customer_identifier")  # fmt: skip
    assert sum(row["c3"] for row in breakdown["total_cost"]) == 21
    changed = await api("PATCH", "/api/users/a/b/", {"period_budget": 5, "markup_percentage": 20})
    assert changed["total_usage_with_markup"] == Decimal("0.00000162")
    assert (await api("POST", "/api/request-logs/summary/"))["total_cost_with_markup"] == Decimal("79.00000162")
    found = await api("POST", "/api/dashboard/users/", {}, summary_type="all")
    assert found["summary"]["total_user_cost_with_markup"] == Decimal("79.00000162")
    assert (await api("POST", "/api/users/a/b/block/"))["blocked"] is True
    assert not (await guard.try_admit("a/b")).decision.allowed
    await api("DELETE", "/api/users/a/b/", status=204)
    await api("GET", "/api/users/a/b/", status=404)
    summary = await api("POST", "/api/request-logs/summary/")
    assert (summary["total_cost"], summary["total_cost_with_markup"]) == (Decimal("79.00000135"),) * 2
    assert not await guard.lane().call(lambda backend: backend.facts("markups"))
    assert await guard.verify() == []
