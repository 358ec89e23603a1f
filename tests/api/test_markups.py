"""Costs with markup beside costs, wherever the API shows what usage cost."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any

import pytest

from respan_guard import Customer, Guard, Usage
from respan_guard.testing import FakeClock

from .support import Client

SUMMARY, GROUPS = "/api/request-logs/summary/", "/api/request-logs/groups/"
USERS, BREAKDOWN = "/api/dashboard/users/", "/api/dashboard/time-series/breakdown/"
FACTORS = {"ann": Decimal("1.2"), "bob": Decimal("1.1"), "free": Decimal(1), None: Decimal("1.1")}
RECORDS: dict[str, Any] = {"filters": {"cost": {"operator": "gte", "value": [0]}}}
"""What no rollup tells, so that records are summed."""


@pytest.fixture
def options() -> dict[str, Any]:
    """10 % on everybody who says nothing else."""
    return {"default_limits": {"markup_percentage": 10}}


@pytest.fixture(autouse=True)
async def filled(guard: Guard, clock: FakeClock) -> None:
    """Two days of two models: ann has 20 %, free has none, bob and nobody have the default."""
    await guard.put_customer(Customer(customer_identifier="ann", markup_percentage=20))
    await guard.put_customer(Customer(customer_identifier="free", markup_percentage=0))
    for _ in range(2):
        for number, name in enumerate(FACTORS):
            await guard.record(Usage(model="big", cost=number + 1, provider="p"), name)
            await guard.record(Usage(model="small", cost=Decimal("0.01"), provider="q"), name)
        clock.advance(86_400)
    await guard.record(Usage(model="unknown"), "ann")


ALL = 2 * (sum((Decimal(number + 1) * factor for number, factor in enumerate(FACTORS.values())), Decimal(0)))
SMALL = 2 * Decimal("0.01") * sum(FACTORS.values())


async def test_logs(api: Client) -> None:
    """Each with its customer's markup; an unknown cost stays unknown; asked for by name like any field."""
    rows = (await api.logs())["results"]
    assert len(rows) == 17
    for row in rows:
        if row["model"] == "unknown":
            assert (row["cost"], row["cost_with_markup"]) == (None, None)
        else:
            assert row["cost_with_markup"] == row["cost"] * FACTORS[row["customer_identifier"]]
        detail = await api("GET", f"/api/request-logs/{row['unique_id']}/")
        assert detail["cost_with_markup"] == row["cost_with_markup"]
    only = (await api("GET", "/api/request-logs/list/", include_fields="cost_with_markup", page_size=2))["results"]
    assert [set(row) for row in only] == [{"id", "cost_with_markup"}] * 2


@pytest.mark.parametrize("body", [{}, RECORDS])
async def test_summary(api: Client, body: dict[str, Any]) -> None:
    """Over all customers, from rollups as from records."""
    found = await api("POST", SUMMARY, body)
    assert found["total_cost"] == Decimal("20.08")
    assert found["total_cost_with_markup"] == ALL + SMALL


@pytest.mark.parametrize("body", [{}, RECORDS])
async def test_groups(api: Client, body: dict[str, Any]) -> None:
    """By model, provider and customer."""
    by_model = (await api("POST", GROUPS, body, group_by="model"))["results"]
    shown = {row["model"]: row["total_cost_with_markup"] for row in by_model if row["total_cost"]}
    assert shown == {"big": ALL, "small": SMALL}
    by_provider = (await api("POST", GROUPS, body, group_by="provider_id"))["results"]
    assert {row["provider_id"]: row["total_cost_with_markup"] for row in by_provider} == {"p": ALL, "q": SMALL}
    by_customer = (await api("POST", GROUPS, body, group_by="customer_identifier"))["results"]
    assert {row["customer_identifier"] for row in by_customer} == {"ann", "bob", "free"}
    for row in by_customer:
        assert row["total_cost_with_markup"] == row["total_cost"] * FACTORS[row["customer_identifier"]]


@pytest.mark.parametrize("query", [{}, {"time_tick": "hour"}])
async def test_active_users(api: Client, query: dict[str, Any]) -> None:
    """Bucket by bucket and in all."""
    found = await api("POST", USERS, {}, summary_type="all", **query)
    spent = [row for row in found["activity"] if row["total_cost"]]
    assert [row["total_cost_with_markup"] for row in spent] == [(ALL + SMALL) / 2] * 2
    assert found["summary"]["total_user_cost"] == Decimal("20.08")
    assert found["summary"]["total_user_cost_with_markup"] == ALL + SMALL
    ann = {"filters": {"customer_identifier": {"value": ["ann"]}}}
    found = await api("POST", USERS, ann, summary_type="all", **query)
    assert found["summary"]["total_user_cost_with_markup"] == Decimal("2.02") * FACTORS["ann"]


@pytest.mark.parametrize("tick", ["day", "hour"])
@pytest.mark.parametrize("by", ["model", "customer_identifier", "provider_id"])
async def test_breakdown(api: Client, guard: Guard, by: str, tick: str) -> None:
    """A metric of its own, column by column; what is folded into "Others" is in there with its own markup."""
    for number in range(12):
        name = f"u{number}"
        await guard.put_customer(Customer(customer_identifier=name, markup_percentage=number))
        await guard.record(Usage(model=f"m{number}", cost=number, provider=f"p{number}"), name)
    body = {"metrics_to_aggregate": ["total_cost_with_markup", "total_cost"]}
    found = await api("POST", BREAKDOWN, body, summary_type="all", breakdown_by=by, time_tick=tick)
    assert list(found) == ["total_cost_with_markup", "total_cost"]
    marked, raw = (
        sum((Counter({n: v for n, v in row.items() if n != "date_group"}) for row in found[name]), Counter())
        for name in found
    )
    assert "Others" in marked
    assert sum(marked.values()) == ALL + SMALL + sum(n * (100 + Decimal(n)) / 100 for n in range(12))
    expected = {"model": {"big": ALL}, "provider_id": {"p": ALL}}.get(
        by, {"u11": Decimal(11) * 111 / 100, "(none)": raw["(none)"] * FACTORS[None]}
    )
    assert {name: marked[name] for name in expected} == expected


async def test_breakdown_of_one_model(api: Client) -> None:
    """Filters narrow what is marked up."""
    body = {"metrics_to_aggregate": ["total_cost_with_markup"], "filters": {"model": {"value": ["small"]}}}
    for by in ("model", "customer_identifier"):
        found = await api("POST", BREAKDOWN, body, summary_type="all", breakdown_by=by)
        rows = found["total_cost_with_markup"]
        assert sum(v for row in rows for n, v in row.items() if n != "date_group") == SMALL, by
