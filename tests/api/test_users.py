"""One user: created, read, changed, blocked, erased; whatever it is called."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import pytest

from respan_guard import Customer, Guard, Usage
from respan_guard.testing import FakeClock

from .support import Client, escaped

STRANGE = [
    "a/b", "a b", "/", "a/", "a//b", "ünï", "日本語 🙂", "%", "100%25", "a?b=c&d", "#x", "...", "a+b", "{x}",
    "<script>", "'; DROP TABLE customers; --", "block", "list", "a/block", "create", "x" * 254, "\\", "a;b", '"',
    "deleted-0", "~user", ":memory:", "x.json", "openapi.json", "a/openapi.json",
]  # fmt: skip


async def test_any_identifier_works_in_paths(api: Client, guard: Guard) -> None:
    """Escaped once, it is read, changed, blocked, found and deleted; it reaches nobody else."""
    await api("POST", "/api/users/create/", {"customer_identifier": "other", "name": "Other"}, 201)
    for name in STRANGE:
        created = await api("POST", "/api/users/create/", {"customer_identifier": name, "period_budget": 5}, 201)
        assert created["customer_identifier"] == name
        path = f"/api/users/{escaped(name)}/"
        if name != "list":  # that is the list; it is found in it
            assert await api("GET", path) == created
        changed = await api("PATCH", path, {"name": name})
        assert (changed["customer_identifier"], changed["name"], changed["period_budget"]) == (name, name, 5)
        assert (await api("POST", f"{path}block/"))["blocked"] is True
        assert (await api("POST", f"{path}unblock/"))["blocked"] is False
        logged = await api.log(customer_identifier=name, cost=1)
        assert (await api("GET", f"/api/request-logs/{logged['unique_id']}/"))["customer_identifier"] == name
        assert (await api.logs({"customer_identifier": {"value": [name]}}))["count"] == 1
        (row,) = (await api.users({"customer_identifier": {"value": [name]}}))["results"]
        assert row["customer_identifier"] == name
        if name not in ("list", "/", "a/"):  # without its last slash the path is the same
            assert (await api("GET", path.removesuffix("/")))["customer_identifier"] == name
        await api("DELETE", path, status=204)
        if name != "list":
            await api("GET", path, status=404)
    other = await guard.get_customer("other")
    assert other is not None
    assert (other.name, other.blocked) == ("Other", False)


async def test_a_user_is_read_with_its_period(api: Client, guard: Guard, clock: FakeClock) -> None:
    """All of Respan's fields, with the current period's bounds and spend, and ours beside."""
    await guard.put_customer(
        Customer(
            customer_identifier="ann", name="Ann", email="ann@acme.dev", metadata={"plan": "pro"}, rate_limit=60,
            period_budget=10, budget_duration="monthly", period_start="2025-12-31", total_budget=100,
            markup_percentage=20, group_identifier="acme", time_zone="Europe/Berlin",
        )
    )  # fmt: skip
    await guard.record(Usage(model="m", cost="1.5", input_tokens=3), "ann")
    clock.advance(86_400 * 20)  # 4 February: a new period
    await guard.record(Usage(model="m", cost="0.25", output_tokens=4), "ann")
    assert await api("GET", "/api/users/ann/") == {
        "id": "ann", "customer_identifier": "ann", "unique_organization_id": "default",
        "organization_name": "default", "environment": "prod", "name": "Ann", "email": "ann@acme.dev",
        "metadata": {"plan": "pro"}, "group_identifier": "acme", "rate_limit": 60, "period_budget": 10,
        "budget_duration": "monthly", "total_budget": 100, "period_start": "2026-01-31T00:00:00+01:00",
        "period_end": "2026-02-28T00:00:00+01:00", "period_anchor": "2025-12-31", "markup_percentage": 20,
        "blocked": False, "time_zone": "Europe/Berlin", "total_period_usage": Decimal("0.25"),
        "total_period_usage_with_markup": Decimal("0.3"), "total_usage": Decimal("1.75"),
        "total_usage_with_markup": Decimal("2.1"), "total_requests": 2, "total_prompt_tokens": 3,
        "total_completion_tokens": 4, "total_tokens": 7, "average_latency": None, "average_ttft": None,
        "average_monthly_cost": Decimal("1.75"), "active_days": 2, "created_at": "2026-01-15T12:00:00Z",
        "last_active": "2026-02-04T12:00:00Z", "updated_at": "2026-01-15T12:00:00Z", "is_test": False,
        "limit_info": {"is_allowed": True, "limits": [
            {"name": "customer_rate_limit", "current_value": 0, "new_value": 0, "limit_value": 60,
             "is_within_limit": True},
            {"name": "customer_budget", "current_value": Decimal("0.25"), "new_value": Decimal("0.25"),
             "limit_value": 10, "is_within_limit": True},
            {"name": "customer_total_budget", "current_value": Decimal("1.75"), "new_value": Decimal("1.75"),
             "limit_value": 100, "is_within_limit": True},
        ]},
    }  # fmt: skip


async def test_what_was_read_can_be_written_back(api: Client, guard: Guard, clock: FakeClock) -> None:
    """Nothing changes by it, least of all where a period begins."""
    await guard.put_customer(Customer(customer_identifier="ann", period_budget=10, period_start="2025-12-31"))
    clock.advance(86_400 * 30)
    read = await api("GET", "/api/users/ann/")
    for key in [key for key, value in read.items() if isinstance(value, Decimal)]:
        read[key] = float(read[key])
    assert (await api("PATCH", "/api/users/ann/", read))["period_anchor"] == "2025-12-31"
    customer = await guard.get_customer("ann")
    assert customer is not None
    assert customer.anchor == date(2025, 12, 31)


class TestDefaultMarkup:
    """A guard whose default limits have a markup."""

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        return {"default_limits": {"markup_percentage": 50, "total_budget": 9}}

    async def test_writing_back_takes_no_default_away(self, api: Client, guard: Guard) -> None:
        """What a user does not have of its own is not shown as its own, and shown costs have the default markup."""
        await api.log(customer_identifier="ann", cost=2)
        read = await api("GET", "/api/users/ann/")
        assert (read["markup_percentage"], read["total_budget"], read["total_usage_with_markup"]) == (None, None, 3)
        assert read["limit_info"]["limits"][0]["limit_value"] == 9
        after = await api("PATCH", "/api/users/ann/", api.last.content)
        assert after["total_usage_with_markup"] == 3
        row = await guard.lane().call(lambda backend: backend.get("ann"))
        assert row is not None
        assert not row.params
        assert (await api.users())["results"][0]["total_cost_with_markup"] == 3


async def test_budgets_are_set_and_removed(api: Client, guard: Guard) -> None:
    """By PATCH under both names of the path; they hold from the next admission on; null removes."""
    await api.log(customer_identifier="ann", cost=2)
    changed = await api("PATCH", "/api/users/ann/", {"period_budget": 1.5, "budget_duration": "weekly"})
    assert (changed["period_budget"], changed["budget_duration"]) == (Decimal("1.5"), "weekly")
    assert (changed["period_start"], changed["period_end"]) == ("2026-01-15T00:00:00Z", "2026-01-22T00:00:00Z")
    assert changed["limit_info"]["is_allowed"] is False
    assert not (await guard.try_admit("ann")).decision.allowed
    changed = await api("PATCH", "/api/user/update/ann/", {"period_budget": None})
    assert changed["period_budget"] is None
    assert (await guard.try_admit("ann")).decision.allowed


async def test_a_custom_period(api: Client) -> None:
    """Start and end instead of a duration; as times or dates."""
    await api("POST", "/api/users/create/", {"customer_identifier": "ann"}, 201)
    period = {"period_budget": 5, "period_start": "2026-01-10T00:00:00Z", "period_end": "2026-01-20"}
    changed = await api("PATCH", "/api/users/ann/", period)
    assert (changed["period_start"], changed["period_end"]) == ("2026-01-10T00:00:00Z", "2026-01-20T00:00:00Z")


async def test_creating_one_that_usage_has_created(api: Client, guard: Guard) -> None:
    """Sets what is given and answers 200; what it has besides stays."""
    await api.log(customer_params={"customer_identifier": "ann", "name": "Ann"}, cost=1)
    created = await api("POST", "/api/users/create/", {"customer_identifier": "ann", "total_budget": 7}, 200)
    assert (created["name"], created["total_budget"], created["total_usage"]) == ("Ann", 7, 1)
    again = await api("POST", "/api/users/create/", {"customer_identifier": "ann"}, 200)
    assert again["total_budget"] == 7


async def test_blocked_is_refused(api: Client, guard: Guard) -> None:
    """Until unblocked; the audit says who did it."""
    await api.log(customer_identifier="ann", cost=1)
    await api("POST", "/api/users/ann/block/")
    assert (await guard.try_admit("ann")).decision.reason == "blocked"
    assert (await api("GET", "/api/users/ann/"))["limit_info"]["is_allowed"] is False
    await api("POST", "/api/users/ann/unblock/")
    assert (await guard.try_admit("ann")).decision.allowed
    audit = await guard.lane().call(lambda backend: backend.audit(customer="ann"))
    assert {row.actor for row in audit} == {"api"}


async def test_deleting_erases_who_it_was_and_keeps_the_sums(api: Client, guard: Guard, clock: FakeClock) -> None:
    """No trace of name, email, metadata or identifiers is left anywhere; the totals are what they were."""
    personal = {
        "customer_params": {"customer_identifier": "ann@acme.dev", "name": "Ann Adams", "email": "ann@acme.dev"},
        "metadata": {"who": "Ann Adams"}, "custom_identifier": "order of Ann Adams",
        "thread_identifier": "ann@acme.dev",
        "properties": {"who": "Ann Adams"}, "error_message": "no such user: Ann Adams",
    }  # fmt: skip
    logged = await api.log(personal, cost=3)
    before = await api("POST", "/api/request-logs/summary/", {})
    await api("DELETE", "/api/users/ann@acme.dev/", status=204)
    for method, path in (("GET", "/api/users/ann@acme.dev/"), ("DELETE", "/api/users/ann@acme.dev/"),
                         ("GET", f"/api/request-logs/{logged['unique_id']}/")):  # fmt: skip
        await api(method, path, status=404)
    assert await api("POST", "/api/request-logs/summary/", {}) == before
    rows = await api.logs()
    text = f"{rows} {[r async for r in guard.records()]} {await guard.list_customers()}".lower()
    assert rows["count"] == 1
    assert "adams" not in text
    assert "acme" not in text
    assert (await api.users())["count"] == 0
    dashboard = await api("POST", "/api/dashboard/users/", {}, summary_type="daily")
    assert dashboard["summary"]["total_user_cost"] == 3
    clock.advance(1)  # what ended when it was deleted, or before, goes to the nameless one
    await api.log(personal, cost=1)
    assert (await api("GET", "/api/users/ann@acme.dev/"))["total_usage"] == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"period_budget": -1}, "period_budget"),
    ({"period_budget": "x"}, "period_budget"),
    ({"total_budget": 1e300}, "total_budget"),
    ({"budget_duration": "hourly"}, "budget_duration"),
    ({"period_start": "x"}, "period_start"),
    ({"period_start": "2026-02-30"}, "period_start"),
    ({"period_end": "2026-01-01"}, "period_end"),
    ({"rate_limit": "fast"}, "rate_limit"),
    ({"markup_percentage": -5}, "markup_percentage"),
    ({"metadata": "x"}, "metadata"),
    ({"name": 5}, "name"),
    ({"blocked": "yes"}, "blocked"),
    ({"period_start": "2026-01-01garbage"}, "period_start"),
    ({"period_start": "2026-01-01T12:00:00 o'clock"}, "period_start"),
    ({"time_zone": "Mars"}, "time_zone"),
    ({"time_zone": "localtime"}, "time_zone"),
    ({"period_buget": 5}, "period_buget"),
    ({"customer_identifier": "bob"}, "customer_identifier"),
]


async def test_bad_changes_change_nothing(api: Client, guard: Guard) -> None:
    """A typo is an error, too; the answer names the field."""
    await api("POST", "/api/users/create/", {"customer_identifier": "ann", "period_budget": 5}, 201)
    before = await guard.get_customer("ann")
    for body, field in REFUSED:
        refused = await api("PATCH", "/api/users/ann/", {"name": "New", **body}, 400)
        assert refused["field"] == field
        assert await guard.get_customer("ann") == before
    assert await guard.get_customer("bob") is None


async def test_who_is_not_there(api: Client) -> None:
    """Reading, changing, blocking and deleting answer 404, also for what can be no identifier."""
    for name in ("nobody", "%00", "%E2%80%8B", "x" * 300, "%F0%9F"):
        for method, path, body in (
            ("GET", f"/api/users/{name}/", None),
            ("PATCH", f"/api/users/{name}/", {"name": "x"}),
            ("DELETE", f"/api/users/{name}/", None),
            ("POST", f"/api/users/{name}/block/", None),
        ):
            await api(method, path, body, 404)
    assert (await api.users())["count"] == 0
    await api("POST", "/api/users/create/", {"customer_identifier": ""}, 400)
    await api("POST", "/api/users/create/", {"name": "x"}, 400)


async def test_environments(api: Client) -> None:
    """All is in "prod": nobody is in "test"."""
    await api.log(customer_identifier="ann", cost=1)
    await api("GET", "/api/users/ann/", environment="prod")
    await api("GET", "/api/users/ann/", status=404, environment="test")
    await api("DELETE", "/api/users/ann/", status=404, environment="test")
    assert (await api.users(environment="test"))["count"] == 0


async def test_the_name_that_sums_are_left_under_is_no_user(api: Client, guard: Guard) -> None:
    """It can't be read, changed, blocked or deleted; it stays in sums, and nobody can be called so."""
    await api.log(customer_identifier="ann", cost=1)
    await api("DELETE", "/api/users/ann/", status=204)
    groups = await api("GET", "/api/request-logs/groups/", group_by="customer_identifier")
    (label,) = (row["customer_identifier"] for row in groups["results"])
    assert (await api.users())["count"] == 0
    await api("GET", f"/api/users/{label}/", status=404)
    await api("PATCH", f"/api/users/{label}/", {"name": "n"}, 404)
    await api("POST", f"/api/users/{label}/block/", status=404)
    await api("DELETE", f"/api/users/{label}/", status=404)
    assert (await api.log({"customer_identifier": label}, 400))["field"] == "customer_identifier"
    new = {"customer_identifier": "deleted-0123456789abcdef"}
    assert (await api("POST", "/api/users/create/", new, 400))["field"] == "customer_identifier"
    total = await api("POST", "/api/dashboard/total-users/", summary_type="all")
    assert total["summary"]["total_users"] == 1


class TestAppBudgets:
    """A guard whose customers share a budget."""

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        return {"app_budgets": {"total_budget": 7}}

    async def test_limit_info_is_the_customers(self, api: Client, guard: Guard) -> None:
        """What all share is not listed, so that the row can be handed on; once it is used up nobody is allowed."""
        await guard.put_customer(Customer(customer_identifier="ann", total_budget=5))
        info = (await api("GET", "/api/users/ann/"))["limit_info"]
        assert info["is_allowed"] is True
        assert [limit["name"] for limit in info["limits"]] == ["customer_total_budget"]
        await guard.record(Usage(model="m", cost=7), "bob")
        info = (await api("GET", "/api/users/ann/"))["limit_info"]
        assert info["is_allowed"] is False
        assert [limit["is_within_limit"] for limit in info["limits"]] == [True]
