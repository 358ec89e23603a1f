"""Sums: summary, groups, active users, breakdowns."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from respan_guard import Guard, Usage
from respan_guard.testing import FakeClock

from .support import Client

DAY = 86_400


@pytest.fixture
async def filled(guard: Guard, clock: FakeClock) -> None:
    """Three days from 15 January on: ann daily, bob on the second, nobody on the third."""
    for day in range(3):
        await guard.record(
            Usage(model="big", cost="0.5", input_tokens=100, output_tokens=20, cache_read_tokens=50, latency_ms=2000,
                  ttft_ms=500, provider="openai", trace_id=f"t{day}"), "ann",
        )  # fmt: skip
        if day == 1:
            await guard.record(Usage(model="small", cost="0.1", input_tokens=10, latency_ms=1000), "bob")
            await guard.record(Usage(model="small", cost=0, status="error"), "bob")
        if day == 2:
            await guard.record(Usage(model="unknown", input_tokens=5))
        clock.advance(DAY)


@pytest.mark.usefixtures("filled")
class TestSummary:
    """`/api/request-logs/summary/`."""

    async def test_everything(self, api: Client) -> None:
        """All of Respan's sums; unknown costs are counted, not added."""
        assert await api("POST", "/api/request-logs/summary/") == {
            "number_of_requests": 6, "total_cost": Decimal("1.6"), "total_tokens": 375, "total_prompt_tokens": 315,
            "total_completion_tokens": 60, "avg_latency": Decimal("1.75"), "avg_tps": 0,
            "avg_ttft": Decimal("0.5"), "total_cost_with_markup": Decimal("1.6"), "unpriced_requests": 1, "scores": {},
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("filters", "query", "count", "cost"),
        [
            ({"customer_identifier": {"value": ["ann"]}}, {}, 3, "1.5"),
            ({"model": {"value": ["small"]}}, {}, 2, "0.1"),
            ({"customer_identifier": {"value": ["ann"]}, "model": {"value": ["small"]}}, {}, 0, "0"),
            ({"status": {"value": ["failed"]}}, {}, 1, "0"),
            ({"cost": {"operator": "gt", "value": [0.2]}}, {}, 3, "1.5"),
            ({}, {"start_time": "2026-01-16", "end_time": "2026-01-17T00:00:00Z"}, 3, "0.6"),
            ({}, {"start_time": "2026-01-16T12:00:00Z"}, 5, "1.1"),
            ({}, {"start_time": "2026-01-16T12:00:00.001Z"}, 2, "0.5"),
            ({}, {"end_time": "2026-01-16T12:00:00Z"}, 1, "0.5"),
            ({"model": {"value": ["big"]}}, {"start_time": "2026-01-16"}, 2, "1.0"),
            ({}, {"environment": "test"}, 0, "0"),
            ({}, {"start_time": "2030-01-01"}, 0, "0"),
        ],
    )
    async def test_parts(self, api: Client, filters: Any, query: dict[str, Any], count: int, cost: str) -> None:
        """From rollups or from records, it is the same."""
        summary = await api("POST", "/api/request-logs/summary/", {"filters": filters}, **query)
        assert (summary["number_of_requests"], summary["total_cost"]) == (count, Decimal(cost))

    async def test_it_agrees_with_the_list(self, api: Client) -> None:
        """The summary is the sum of the rows."""
        rows = await api.follow(await api.logs(page_size=2))
        summary = await api("POST", "/api/request-logs/summary/")
        assert summary["total_cost"] == sum(row["cost"] or 0 for row in rows)
        assert summary["total_tokens"] == sum(row["total_request_tokens"] for row in rows)


@pytest.mark.usefixtures("filled")
class TestGroups:
    """`/api/request-logs/groups/`."""

    async def test_by_customer(self, api: Client) -> None:
        """The costliest first, with all metrics; nobody's usage is no group."""
        page = await api("GET", "/api/request-logs/groups/", group_by="customer_identifier")
        ann, bob = page["results"]
        assert ann == {
            "customer_identifier": "ann", "span_count": 3, "number_of_requests": 3, "total_cost": Decimal("1.5"),
            "total_tokens": 360, "total_prompt_tokens": 300, "total_completion_tokens": 60, "error_count": 0,
            "error_percentage": 0, "average_cost": Decimal("0.5"), "average_tokens": 120, "cache_hit_percentage": 50,
            "average_latency": 2, "average_ttft": Decimal("0.5"), "average_tps": 10, "unpriced_requests": 0,
            "total_cost_with_markup": Decimal("1.5"),
        }  # fmt: skip
        assert (bob["customer_identifier"], bob["error_count"], bob["error_percentage"]) == ("bob", 1, 50)
        assert bob["average_tps"] is None

    @pytest.mark.parametrize(
        ("by", "field", "expected"),
        [
            ("model", "model", ["big", "small", "unknown"]),
            ("provider_id", "provider_id", ["openai"]),
            ("trace", "trace_unique_id", ["t0", "t1", "t2"]),
            ("thread", "thread_identifier", []),
            ("custom_identifier", "custom_identifier", []),
            ("prompt_id", "prompt_id", []),
        ],
    )
    async def test_by(self, api: Client, by: str, field: str, expected: list[str]) -> None:
        """Whatever records have in common."""
        page = await api("POST", "/api/request-logs/groups/", {}, group_by=by)
        assert [group[field] for group in page["results"]] == expected

    @pytest.mark.parametrize("by_number", [False, True])
    async def test_groups_that_come_in_meanwhile(self, api: Client, by_number: bool) -> None:
        """They push no group to the next page, so none is there twice."""
        page = await api("POST", "/api/request-logs/groups/", {}, page_size=1)
        seen = [row["model"] for row in page["results"]]
        for number in range(2, 4):
            await api.log({"model": f"new-{number}"}, cost=number)
            if by_number:
                page = await api("POST", "/api/request-logs/groups/", {}, page_size=1, page=number)
            else:
                page = await api("POST", page["next"], {})
            seen += [row["model"] for row in page["results"]]
        assert seen == ["big", "small", "unknown"]

    async def test_pages_and_order(self, api: Client) -> None:
        """By any metric, up and down, page by page; filters count."""
        for sort, expected in (
            ("total_cost", ["unknown", "small", "big"]), ("-number_of_requests", ["big", "small", "unknown"]),
            ("-error_count", ["small", "big", "unknown"]), ("-average_latency", ["big", "small", "unknown"]),
        ):  # fmt: skip
            rows = await api.follow(await api("POST", "/api/request-logs/groups/", {}, sort_by=sort, page_size=1))
            assert [row["model"] for row in rows] == expected, sort
        filters = {"filters": {"customer_identifier": {"value": ["bob"]}}}
        page = await api("POST", "/api/request-logs/groups/", filters, group_by="model")
        assert [row["model"] for row in page["results"]] == ["small"]
        assert page["current_filters"] == {"customer_identifier": [{"operator": "", "value": ["bob"]}]}

    async def test_markup(self, api: Client, guard: Guard) -> None:
        """Groups of one customer, and by customer, show the cost with its markup beside the cost."""
        await guard.update_customer("ann", markup_percentage=20)
        by_customer = (await api("GET", "/api/request-logs/groups/", group_by="customer_identifier"))["results"]
        shown = [(row["total_cost"], row["total_cost_with_markup"]) for row in by_customer]
        assert shown == [(Decimal("1.5"), Decimal("1.8")), (Decimal("0.1"), Decimal("0.1"))]
        ann = {"filters": {"customer_identifier": {"value": ["ann"]}}}
        (big,) = (await api("POST", "/api/request-logs/groups/", ann, group_by="model"))["results"]
        assert big["total_cost_with_markup"] == Decimal("1.8")
        assert (await api("POST", "/api/request-logs/summary/", ann))["total_cost_with_markup"] == Decimal("1.8")
        log = (await api.logs(ann["filters"]))["results"][0]
        detail = await api("GET", f"/api/request-logs/{log['unique_id']}/")
        assert (detail["cost"], detail["cost_with_markup"]) == (Decimal("0.5"), Decimal("0.6"))

    async def test_what_is_not_kept(self, api: Client) -> None:
        """Groups and orders that are not known are named."""
        for query in ({"group_by": "deployment_id"}, {"group_by": "x"}, {"sort_by": "x"}, {"cursor": "x"}):
            refused = await api("GET", "/api/request-logs/groups/", status=400, **query)
            assert refused["field"] == next(iter(query))


class TestZones:
    """A guard whose days begin in Berlin."""

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        return {"time_zone": "Europe/Berlin"}

    async def test_days_are_the_guards(self, api: Client) -> None:
        """Its midnights bound days of booking; any other time, UTC's midnight too, is looked up in the records."""
        for at in ("2026-01-13T22:59:59Z", "2026-01-13T23:00:00Z", "2026-01-14T00:00:00Z", "2026-01-14T23:00:00Z"):
            await api.log(customer_identifier="ann", cost=1, timestamp=at)
        for start, end, count in (
            ("2026-01-14T00:00:00+01:00", "2026-01-15T00:00:00+01:00", 2),
            ("2026-01-14T00:00:00Z", "2026-01-15T00:00:00Z", 2),
            ("2026-01-13T00:00:00Z", "2026-01-14T00:00:00Z", 2),
            ("2026-01-13T00:00:00+01:00", "2026-01-14T00:00:00+01:00", 1),
        ):
            summary = await api("POST", "/api/request-logs/summary/", {}, start_time=start, end_time=end)
            assert summary["number_of_requests"] == count, start
        found = await api("POST", "/api/dashboard/users/", {}, start_time="2026-01-14T12:00:00Z",
                          end_time="2026-01-14T13:00:00Z")  # fmt: skip
        assert [row["date_group"] for row in found["activity"]] == ["2026-01-14T00:00:00+01:00"]
        assert found["summary"]["total_user_cost"] == 0
        assert (await by_the_hour(api, "2026-01-14T00:00:00Z", "2026-01-14T23:00:00.001Z"))["total_user_cost"] == 2


async def by_the_hour(api: Client, start: str, end: str) -> Any:
    """The sums of a range: the same by hours as by days, and in a breakdown."""
    query: dict[str, Any] = {"start_time": start, "end_time": end}
    found = await api("POST", "/api/dashboard/users/", {}, **query)
    hours = await api("POST", "/api/dashboard/users/", {}, time_tick="hour", **query)
    assert hours["summary"] == found["summary"]
    assert sum(row["total_cost"] for row in found["activity"]) == found["summary"]["total_user_cost"]
    total = await api("POST", "/api/dashboard/total-users/", **query)
    assert total["summary"]["total_users"] == found["summary"]["active_users"]
    for tick in ("day", "hour"):
        body = {"metrics_to_aggregate": ["total_cost"]}
        cells = await api("POST", "/api/dashboard/time-series/breakdown/", body, time_tick=tick, **query)
        cost = sum(cost for row in cells["total_cost"] for name, cost in row.items() if name != "date_group")
        assert cost == found["summary"]["total_user_cost"]
    return found["summary"]


async def test_a_range_within_a_day_is_that_range(api: Client, guard: Guard) -> None:
    """It begins and ends at its instants, whatever the ticks; so do the last 24 hours."""
    for at, cost in (("14T06:00", 100), ("14T12:00", 10), ("14T13:00", 1), ("15T01:00", 1000), ("15T11:30", 5)):
        await api.log(customer_identifier=f"c{cost}", cost=cost, timestamp=f"2026-01-{at}:00Z")
    for start, end, cost, users in (
        ("2026-01-15T11:00:00Z", "2026-01-15T12:00:00Z", 5, 1),
        ("2026-01-15T11:00:00Z", "2026-01-15T11:30:00Z", 0, 0),
        ("2026-01-14T06:00:00.001Z", "2026-01-15T11:30:00.001Z", 1016, 4),
        ("2026-01-14T13:00:00Z", "2026-01-16T00:00:00Z", 1006, 3),
        ("2026-01-14T00:00:00Z", "2026-01-15T01:00:00Z", 111, 3),
        ("2026-01-14T00:00:00Z", "2026-01-15T20:00:00Z", 1116, 5),  # nothing is later than now
    ):
        summary = await by_the_hour(api, start, end)
        assert (summary["total_user_cost"], summary["active_users"]) == (cost, users), start
    for tick in ("day", "hour"):
        found = await api("POST", "/api/dashboard/users/", {}, summary_type="last_24h", time_tick=tick)
        assert found["summary"]["total_user_cost"] == 1016
    refused = await api(
        "POST", "/api/dashboard/users/", {}, 400, start_time="2026-01-15T11:00:00Z", end_time="2026-01-15T10:00:00Z"
    )
    assert refused["field"] == "end_time"


@pytest.mark.usefixtures("filled")
class TestUsers:
    """`/api/dashboard/users/` and `/total-users/`."""

    async def test_active_users_by_day(self, api: Client) -> None:
        """Different users a day and in all, which do not add up; days without any are there; nobody is no user."""
        found = await api("POST", "/api/dashboard/users/", {}, start_time="2026-01-14", end_time="2026-01-19")
        days = [(row["date_group"][:10], row["active_users"], row["total_cost"]) for row in found["activity"]]
        assert days == [
            ("2026-01-14", 0, 0), ("2026-01-15", 1, Decimal("0.5")), ("2026-01-16", 2, Decimal("0.6")),
            ("2026-01-17", 1, Decimal("0.5")), ("2026-01-18", 0, 0),
        ]  # fmt: skip
        assert found["activity"][2]["average_cost_per_user"] == Decimal("0.3")
        assert found["summary"] == {
            "active_users": 2, "average_cost_per_user": Decimal("0.8"), "total_user_cost": Decimal("1.6"),
            "total_user_cost_with_markup": Decimal("1.6"),
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("query", "days", "users"),
        [
            ({"summary_type": "daily", "date": "2026-01-16"}, 1, 2),
            ({"summary_type": "weekly", "date": "2026-01-18"}, 7, 2),
            ({"summary_type": "weekly"}, 7, 2),
            ({"summary_type": "monthly"}, 31, 2),
            ({"summary_type": "quarterly"}, 90, 2),
            ({"summary_type": "yearly"}, 365, 2),
            ({"summary_type": "last_24h"}, 2, 1),
            ({"summary_type": "all"}, 3, 2),
            ({}, 31, 2),
            ({"summary_type": "daily"}, 1, 0),
            ({"summary_type": "daily", "timezone_offset": "-13"}, 1, 1),
            ({"end_time": "2026-01-17T12:00:00Z"}, 30, 2),
        ],
    )
    async def test_presets(self, api: Client, query: dict[str, Any], days: int, users: int) -> None:
        """Calendar units around `date`, or today, which is 18 January, noon."""
        found = await api("POST", "/api/dashboard/users/", {}, **query)
        assert (len(found["activity"]), found["summary"]["active_users"]) == (days, users)
        total = await api("POST", "/api/dashboard/total-users/", **query)
        assert (len(total["data"]), total["summary"]["total_users"]) == (days, users)

    async def test_filters_and_ticks(self, api: Client) -> None:
        """By rollups where these know, else by records; an hour's bucket is that hour."""
        for filters, users in (
            ({"model": {"value": ["small"]}}, 1), ({"customer_identifier": {"value": ["ann"]}}, 1),
            ({"status": {"value": ["failed"]}}, 1), ({"cost": {"operator": "gte", "value": [0.1]}}, 2),
        ):  # fmt: skip
            found = await api("POST", "/api/dashboard/users/", {"filters": filters}, summary_type="all")
            assert found["summary"]["active_users"] == users, filters
        hours = await api("POST", "/api/dashboard/users/", {}, summary_type="weekly", time_tick="hour")
        assert [row["date_group"] for row in hours["activity"]] == [f"2026-01-{d}T12:00:00Z" for d in (15, 16, 17)]
        assert hours["summary"]["active_users"] == 2
        refused = await api("POST", "/api/dashboard/users/", {}, 400, start_time="2026-01-02", end_time="2026-01-01")
        assert refused["field"] == "end_time"


@pytest.mark.usefixtures("filled")
class TestBreakdown:
    """`/api/dashboard/time-series/breakdown/`."""

    PATH = "/api/dashboard/time-series/breakdown/"

    async def test_cost_by_user(self, api: Client) -> None:
        """A column for each, day by day."""
        found = await api("POST", self.PATH, {"metrics_to_aggregate": ["total_cost"]}, summary_type="all",
                          breakdown_by="customer_identifier")  # fmt: skip
        assert list(found) == ["total_cost"]
        assert found["total_cost"] == [
            {"ann": Decimal("0.5"), "date_group": "2026-01-15T00:00:00Z"},
            {"ann": Decimal("0.5"), "bob": Decimal("0.1"), "date_group": "2026-01-16T00:00:00Z"},
            {"ann": Decimal("0.5"), "(none)": 0, "date_group": "2026-01-17T00:00:00Z"},
        ]

    async def test_the_defaults(self, api: Client) -> None:
        """By model, with requests, cost and tokens, for this month."""
        found = await api("POST", self.PATH)
        assert list(found) == ["number_of_requests", "total_cost", "total_tokens"]
        assert len(found["total_cost"]) == 31
        assert sum(row.get("big", 0) for row in found["number_of_requests"]) == 3

    async def test_the_rest_is_others(self, api: Client, guard: Guard) -> None:
        """More than ten are folded, from rollups as from records, and nothing is lost."""
        for number in range(14):
            await guard.record(Usage(model="m", cost=number, provider=f"p{number}"), f"u{number}")
        for by in ("customer_identifier", "provider_id"):
            body = {"metrics_to_aggregate": ["total_cost", "number_of_requests"]}
            found = await api("POST", self.PATH, body, summary_type="all", breakdown_by=by)
            columns = {name for row in found["total_cost"] for name in row}
            assert len(columns) <= 12
            assert "Others" in columns
            total = sum(value for row in found["total_cost"] for name, value in row.items() if name != "date_group")
            assert total == Decimal("92.6")

    async def test_every_metric(self, api: Client) -> None:
        """Each of Respan's, also by the hour."""
        names = ["number_of_requests", "total_cost", "total_tokens", "error_count", "error_percentage",
                 "average_cost", "average_tokens", "cache_hit_percentage", "average_latency", "average_ttft",
                 "average_tps"]  # fmt: skip
        for tick in ("day", "hour", "minute"):
            found = await api("POST", self.PATH, {"metrics_to_aggregate": names}, summary_type="all", time_tick=tick)
            assert list(found) == names
            assert found["average_latency"][0]["big"] == 2

    async def test_a_user_called_like_a_column(self, api: Client, guard: Guard) -> None:
        """`date_group` stays the date."""
        await guard.record(Usage(model="m", cost=5), "date_group")
        found = await api("POST", self.PATH, {}, summary_type="daily", breakdown_by="customer_identifier")
        assert found["total_cost"] == [{"Others": 5, "date_group": "2026-01-18T00:00:00Z"}]

    async def test_what_is_not_kept(self, api: Client) -> None:
        """Dimensions, scopes and metrics that are not known are named."""
        for query in (
            {"breakdown_by": "deployment_id"}, {"scope": "trace"}, {"summary_type": "hourly"},
            {"time_tick": "second"}, {"timezone_offset": "99"}, {"timezone_offset": "nan"}, {"date": "2026-01-15Tx"},
        ):  # fmt: skip
            refused = await api("POST", self.PATH, {}, 400, **query)
            assert refused["field"] == next(iter(query))
        bad: list[Any] = [[], ["x"], "total_cost", [[]]]
        for metrics in bad:
            refused = await api("POST", self.PATH, {"metrics_to_aggregate": metrics}, 400)
            assert refused["field"] == "metrics_to_aggregate"
