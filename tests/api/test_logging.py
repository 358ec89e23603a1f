"""Logging usage: what is counted, priced, booked and kept."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from respan_guard import Customer, Guard, Usage, UsageRecord
from respan_guard.testing import FakeClock

from .support import Client

PAGE_SNIPPET = {
    "model": "gpt-4o-mini",
    "input": [{"role": "user", "content": "Hi"}],
    "output": {"role": "assistant", "content": "Hello!"},
    "customer_params": {
        "customer_identifier": "customer_1", "name": "Hendrix Liu", "email": "hendrix@respan.ai",
    },
}  # fmt: skip


REPLY: dict[str, Any] = {
    "id": "chatcmpl-0123456789abcdefghij", "object": "chat.completion", "model": "gpt-4o-mini-2024-07-18",
    "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
}  # fmt: skip


async def records(guard: Guard, customer: str | None = None) -> list[UsageRecord]:
    """What is stored."""
    await guard.flush()
    return [record async for record in guard.records(customer)]


async def test_usage_is_priced_and_counts_towards_the_budget(api: Client, guard: Guard) -> None:
    """Tokens that the log counts are priced by the guard's prices, exactly, and are spent."""
    await guard.put_customer(Customer(customer_identifier="ann", period_budget=1))
    logged = await api.log(customer_identifier="ann", prompt_tokens=1000, completion_tokens=100)
    assert logged["cost"] == Decimal("0.00021")  # 0.15 and 0.6 USD per million
    assert (logged["status"], logged["warnings"]) == ("success", None)
    status = await guard.status("ann")
    assert (status.period_spend, status.total_spend, status.total_calls) == (logged["cost"], logged["cost"], 1)
    (record,) = await records(guard, "ann")
    assert (record.source, record.usage.estimated, record.day) == ("api", False, "2026-01-15")


async def test_a_spent_budget_refuses_the_next_admission(api: Client, guard: Guard) -> None:
    """Usage that was logged stops work at the guard, and is itself never refused: it is spent."""
    await guard.put_customer(Customer(customer_identifier="ann", total_budget=1))
    await api.log(customer_identifier="ann", cost=0.75)
    async with guard.admit("ann"):
        pass
    await api.log(customer_identifier="ann", cost=0.75)
    refused = await guard.try_admit("ann")
    assert not refused.decision.allowed
    await api.log(customer_identifier="ann", cost=5)
    assert (await guard.status("ann")).total_spend == Decimal("6.5")


async def test_a_cost_that_is_given_is_taken_to_the_last_digit(api: Client, guard: Guard) -> None:
    """Also where no float would hold it; half a nano-USD is rounded to even."""
    for text, cost in (
        ("0.1", "0.1"), ("0.000000001", "0.000000001"), ("8999999.999999999", "8999999.999999999"),
        ("1e-7", "0.0000001"), ("0.0000000025", "0.000000002"), ("0", "0"), ("12", "12"),
    ):  # fmt: skip
        body = f'{{"model": "m", "customer_identifier": "c{text}", "cost": {text}, "prompt_tokens": 1}}'
        logged = await api("POST", "/api/request-logs/", body, 201)
        assert logged["cost"] == Decimal(cost)
        (record,) = await records(guard, f"c{text}")
        assert record.cost == Decimal(cost)
    await api.logs({"cost": {"operator": "gt", "value": [1000]}})
    assert b'"cost":8999999.999999999,' in api.last.content


async def test_tokens_that_nobody_counted_are_estimated_and_flagged(api: Client, guard: Guard) -> None:
    """From the bytes of the text, four to a token; the answer says so."""
    logged = await api.log(PAGE_SNIPPET)
    assert (logged["prompt_tokens"], logged["completion_tokens"]) == (1, 2)
    assert logged["cost"] == Decimal("0.00000135")
    assert logged["status"] == "warning"
    assert "estimated" in logged["warnings"]
    (record,) = await records(guard, "customer_1")
    assert record.usage.estimated


@pytest.mark.parametrize(
    ("given", "made", "tokens"),
    [
        ("x" * 8, "y" * 4, (2, 1)),
        ([{"role": "user", "content": [{"type": "text", "text": "abcd"}, {"type": "image_url", "image_url": {"url":
          "data:image/png;base64,AAAAAAAAAAAAAAAA"}}]}], {"content": None, "tool_calls": [{"function": {"arguments":
          "{}{}"}}]}, (1, 1)),
        ({"question": "äöü"}, ["abc", "d"], (2, 1)),
    ],
)  # fmt: skip
async def test_text_of_any_shape_is_estimated(api: Client, given: Any, made: Any, tokens: tuple[int, int]) -> None:
    """Strings, messages, parts, tool calls; not images by value."""
    logged = await api.log(input=given, output=made)
    assert (logged["prompt_tokens"], logged["completion_tokens"]) == tokens


async def test_an_unknown_price_is_not_zero(api: Client, guard: Guard) -> None:
    """A model that nobody knows, or a call of which nothing is known: the cost is null, and said to be unknown."""
    for fields in ({"model": "my-model", "prompt_tokens": 5}, {"model": "gpt-4o-mini"}):
        logged = await api.log(fields, customer_identifier="ann")
        assert logged["cost"] is None
        assert logged["status"] == "warning"
        assert "not zero" in logged["warnings"]
    assert [record.unpriced for record in await records(guard, "ann")] == [True, True]


async def test_own_prices_of_a_log(api: Client) -> None:
    """`prompt_unit_price` and `completion_unit_price` are USD per million; a given cost goes before them."""
    prices = {"model": "mine", "prompt_unit_price": 0.1, "completion_unit_price": 3, "prompt_tokens": 10}
    assert (await api.log(prices, completion_tokens=1))["cost"] == Decimal("0.000004")
    assert (await api.log(prices, cost=7))["cost"] == 7


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}, (10, 2, 0, 0)),
        ({"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4}}, (10, 0, 4, 0)),
        ({"input_tokens": 10, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 4}}, (10, 2, 4, 0)),
        ({"input_tokens": 10, "output_tokens": 2, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 3},
         (18, 2, 5, 3)),
        ({"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12, "cache_read_input_tokens": 5},
         (10, 2, 5, 0)),
        ({"prompt_tokens": 10, "completion_tokens": 2, "cache_read_input_tokens": 5}, (15, 2, 5, 0)),
        ({"total_tokens": 9}, (9, 0, 0, 0)),
    ],
)  # fmt: skip
async def test_who_counts_how(api: Client, usage: Any, expected: tuple[int, ...]) -> None:
    """OpenAI counts cached tokens into the input, Anthropic beside it; here they always are part of it."""
    logged = await api.log(usage=usage)
    names = ("prompt_tokens", "completion_tokens", "prompt_cache_hit_tokens", "prompt_cache_creation_tokens")
    assert tuple(logged[name] for name in names) == expected


async def test_the_same_custom_identifier_counts_once(api: Client, guard: Guard) -> None:
    """For a customer; the first stands, other amounts are answered with a warning, the answer is what is stored."""
    first = await api.log(customer_identifier="ann", custom_identifier="x", cost=1)
    again = await api.log(customer_identifier="ann", custom_identifier="x", cost=1)
    other = await api.log(customer_identifier="ann", custom_identifier="x", cost=2)
    assert first == again
    assert (other["unique_id"], other["cost"], other["status"]) == (first["unique_id"], 1, "warning")
    assert "logged before" in other["warnings"]
    await api.log(customer_identifier="bob", custom_identifier="x", cost=1)
    assert (await guard.status("ann")).total_spend == 1
    ids = {record.id for record in await records(guard)}
    assert len(ids) == 1
    await guard.record(Usage(cost=1), "ann", entry_id="x")  # the app's own ids are others
    assert (await guard.status("ann")).total_spend == 2
    assert "x" not in ids


async def test_a_call_that_another_door_saw_is_one_record(api: Client, guard: Guard) -> None:
    """The provider's reply in `full_response` names the call as the other doors name it."""
    await guard.record(Usage.from_response(REPLY), "ann")
    logged = await api.log(customer_identifier="ann", full_response=REPLY, input="Hi")
    assert (logged["prompt_tokens"], logged["completion_tokens"]) == (100, 10)
    assert len(await records(guard, "ann")) == 1


@pytest.mark.parametrize("door_first", [True, False])
async def test_such_a_call_is_one_record_whatever_it_is_called_besides(
    api: Client, guard: Guard, door_first: bool
) -> None:
    """The id of its reply goes before a custom identifier, which is kept to be found by; without one that counts."""
    if door_first:
        await guard.record(Usage.from_response(REPLY), "ann")
    for _ in range(2):
        await api.log(customer_identifier="ann", custom_identifier="mine", full_response=REPLY)
    if not door_first:
        by_both = {"customer_identifier": {"value": ["ann"]}, "custom_identifier": {"value": ["mine"]}}
        assert [row["prompt_tokens"] for row in (await api.logs(by_both))["results"]] == [100]
        assert (await api.logs(by_both | {"custom_identifier": {"value": ["other"]}}))["count"] == 0
        await guard.record(Usage.from_response(REPLY), "ann")
    (record,) = await records(guard, "ann")
    assert (record.usage.input_tokens, record.kind) == (100, "usage")
    for _ in range(2):  # of a server that numbers its replies
        await api.log(customer_identifier="bob", custom_identifier="mine", full_response=REPLY | {"id": "chatcmpl-7"})
    assert len(await records(guard, "bob")) == 1


async def test_work_around_a_call_is_not_that_call(api: Client, guard: Guard) -> None:
    """A workflow that repeats the reply of a call inside does not take that call's place."""
    await api.log(customer_identifier="ann", log_type="workflow", full_response=REPLY)
    await guard.record(Usage.from_response(REPLY), "ann")
    assert sorted(record.kind for record in await records(guard, "ann")) == ["adjustment", "usage"]
    user = await api("GET", "/api/users/ann/")
    assert (user["total_requests"], user["total_tokens"]) == (1, 110)


async def test_usage_of_the_past_falls_into_its_own_period(api: Client, guard: Guard) -> None:
    """By the customer's own calendar; what ended before midnight there is of the day before."""
    await guard.put_customer(
        Customer(
            customer_identifier="ann", period_budget=10, budget_duration="monthly", period_start="2026-01-01",
            time_zone="America/New_York",
        )
    )  # fmt: skip
    guard.policies.drop("ann")  # as in a process that never saw the customer
    await api.log(customer_identifier="ann", cost=1, timestamp="2026-01-01T04:59:59Z")
    await api.log(customer_identifier="ann", cost=2, timestamp="2026-01-01T05:00:00+00:00")
    await api.log(customer_identifier="ann", cost=4, timestamp="2026-01-15T13:00:00+01:00")
    await api.log(customer_identifier="ann", cost=8, timestamp="2026-02-15T12:00:00")  # not yet: it is now
    days = [record.day for record in await records(guard, "ann")]
    assert days == ["2025-12-31", "2026-01-01", "2026-01-15", "2026-01-15"]
    user = await api("GET", "/api/users/ann/")
    assert (user["total_period_usage"], user["total_usage"]) == (14, 15)
    assert user["period_start"] == "2026-01-01T00:00:00-05:00"


async def test_times_fill_each_other_in(api: Client, guard: Guard) -> None:
    """`timestamp` is the end; start and latency make one that is missing."""
    start = "2026-01-10T10:00:00Z"
    await api.log(customer_identifier="a", start_time=start, latency=1.5, ttft=0.25)
    await api.log(customer_identifier="b", start_time=start, timestamp="2026-01-10T10:00:02Z")
    await api.log(customer_identifier="c", generation_time=3, timestamp="2026-01-10T10:00:09Z")
    (a,), (b,), (c,) = [await records(guard, name) for name in "abc"]
    assert a.time == datetime(2026, 1, 10, 10, 0, 1, 500_000, UTC)
    assert (a.usage.latency_ms, a.usage.ttft_ms) == (1500, 250)
    assert (b.usage.latency_ms, c.usage.latency_ms) == (2000, 3000)
    row = (await api.logs({"customer_identifier": {"value": ["a"]}}))["results"][0]
    assert (row["start_time"], row["timestamp"]) == ("2026-01-10T10:00:00Z", "2026-01-10T10:00:01.500000Z")
    assert (row["latency"], row["time_to_first_token"]) == (Decimal("1.5"), Decimal("0.25"))


async def test_usage_before_what_is_kept_is_refused(api: Client, guard: Guard) -> None:
    """A record of a pruned day could not be told from one sent again, so it is not booked, and the client hears why."""
    await api.log(customer_identifier="ann", cost=1, timestamp="2025-10-01T00:00:00Z")
    await guard.prune(datetime(2025, 11, 1, tzinfo=UTC).date())
    refused = await api.log(customer_identifier="ann", cost=1, timestamp="2025-10-01T00:00:00Z", status=400)
    assert refused["field"] == "timestamp"
    assert (await guard.status("ann")).total_spend == 1


async def test_what_is_no_call_costs_what_it_says(api: Client) -> None:
    """Workflows, agents and tools repeat the calls inside: a cost that they say counts, the rest is shown only."""
    about = {"customer_identifier": "ann", "usage": {"prompt_tokens": 1000, "completion_tokens": 10}, "latency": 2}
    call = await api.log(about)
    workflow = await api.log(about, log_type="workflow")
    tool = await api.log(log_type="tool", cost=0.01, customer_identifier="ann")
    assert (workflow["cost"], tool["cost"]) == (0, Decimal("0.01"))
    shown = ("prompt_tokens", "completion_tokens", "latency")
    assert [workflow[name] for name in shown] == [call[name] for name in shown] == [1000, 10, 2]
    rows = (await api.logs({"customer_identifier": {"value": ["ann"]}}))["results"]
    assert [row["log_type"] for row in rows] == ["tool", "workflow", "chat"]
    assert [row["total_request_tokens"] for row in rows] == [0, 1010, 1010]
    assert [row["start_time"] for row in rows[1:]] == ["2026-01-15T11:59:58Z"] * 2
    user = await api("GET", "/api/users/ann/")
    assert (user["total_tokens"], user["total_requests"]) == (1010, 1)
    assert user["total_usage"] == call["cost"] + tool["cost"]
    for filters in ({}, {"cost": {"operator": "gte", "value": [0]}}):  # of whole days, and of the records
        found = await api("POST", "/api/request-logs/summary/", {"filters": filters})
        assert (found["number_of_requests"], found["total_tokens"], found["avg_latency"]) == (1, 1010, 2)


async def test_failed_work_around_calls_is_no_error_in_sums(api: Client) -> None:
    """It is shown and found as failed; a share of errors is one of calls."""
    for _ in range(5):
        await api.log({"status": "error"}, customer_identifier="ann", log_type="tool")
    await api.log(customer_identifier="ann", cost=1)
    await api.log({"status": "error"}, customer_identifier="ann", cost=1)
    for filters in ({}, {"cost": {"operator": "gte", "value": [0]}}):  # of rollups, and of the records
        groups = await api("POST", "/api/request-logs/groups/", {"filters": filters}, group_by="customer_identifier")
        (row,) = groups["results"]
        assert (row["number_of_requests"], row["error_count"], row["error_percentage"]) == (2, 1, 50)
    for status, types in (("failed", ["chat", *["tool"] * 5]), ("success", ["chat"])):
        found = await api.follow(await api.logs({"status": {"value": [status]}}, page_size=4))
        assert [(row["status"], row["log_type"]) for row in found] == [(status, kind) for kind in types]
        found = await api.follow(await api.logs({"status": {"value": [status]}}, page_size=4, sort_by="id"))
        assert [row["log_type"] for row in found] == types[::-1]


async def test_a_failed_call_is_an_error_and_costs_nothing(api: Client) -> None:
    """Unless it says a cost, or an answer came before it broke off."""
    failed = await api.log(status_code=500, input="Hi", error_message="boom", customer_identifier="ann")
    assert (failed["cost"], failed["status"]) == (0, "failed")
    cut = await api.log({"status": "error"}, input="Hi", output="Hello", customer_identifier="ann")
    assert cut["cost"] > 0
    row = (await api.logs({"status_code": {"operator": "gte", "value": [500]}}))["results"][0]
    assert (row["error_message"], row["status_code"]) == ("boom", 500)
    summary = await api("POST", "/api/request-logs/groups/", {}, group_by="model")
    assert summary["results"][0]["error_count"] == 2


async def test_who_it_is(api: Client) -> None:
    """`customer_params` goes before the top level, `respan_params` before both; an int is its digits."""
    assert (await api.log(customer_identifier=7))["customer_identifier"] == "7"
    inner = {"customer_params": {"customer_identifier": "b"}, "customer_identifier": "a"}
    assert (await api.log(inner))["customer_identifier"] == "b"
    outer = {"respan_params": {"customer_identifier": "d"}, "customer_identifier": "c"}
    assert (await api.log(outer))["customer_identifier"] == "d"
    legacy = {"keywordsai_params": {"customer_params": {"customer_identifier": "e"}}}
    assert (await api.log(legacy))["customer_identifier"] == "e"
    assert (await api.log())["customer_identifier"] is None


async def test_a_log_names_who_has_no_name_and_renames_nobody(api: Client, guard: Guard) -> None:
    """As at Respan, name and email are taken when the customer is first seen; limits need the guard's trust."""
    await api.log(customer_params={"customer_identifier": "ann", "name": "Ann", "period_budget": 5, "unknown": 1})
    await api.log(customer_params={"customer_identifier": "ann", "name": "Bob", "email": "ann@example.com"})
    customer = await guard.get_customer("ann")
    assert customer is not None
    assert (customer.name, customer.email, customer.period_budget) == ("Ann", "ann@example.com", None)


class TestTrusted:
    """A guard that trusts `customer_params`."""

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        return {"trust_customer_params": True}

    async def test_limits_come_with_the_log(self, api: Client, guard: Guard) -> None:
        """They are stored, and hold from the next admission on."""
        await api.log(customer_params={"customer_identifier": "ann", "total_budget": 1}, cost=2)
        assert not (await guard.try_admit("ann")).decision.allowed


async def test_text_is_dropped(api: Client, guard: Guard) -> None:
    """Nothing of the input and the output is stored, in no field."""
    secret = "the secret of the user"
    message = {"role": "user", "content": secret}
    await api.log(
        input=[message], output={"content": secret}, prompt_messages=[message], completion_message=message,
        full_request={"messages": [message]}, full_response={"choices": [message]}, messages=[message],
        tools=[{"description": secret}], variables={"x": secret}, prompt_tokens=1,
    )  # fmt: skip
    (record,) = await records(guard)
    assert secret not in repr(record)
    assert (await api.logs())["results"][0]["input"] is None


class TestContent:
    """A guard with `store_content=True`."""

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        return {"store_content": True}

    async def test_text_is_kept_and_goes_with_the_customer(self, api: Client, guard: Guard) -> None:
        """It is shown, unless `disable_log`; long text is cut; deleting the customer deletes it."""
        await api.log(PAGE_SNIPPET, custom_identifier="x")
        await api.log(customer_identifier="customer_1", input="z" * 100_000, disable_log=False)
        await api.log(PAGE_SNIPPET, disable_log=True)
        hidden, long, kept = (await api.logs())["results"]
        assert (kept["input"], kept["output"]) == (PAGE_SNIPPET["input"], PAGE_SNIPPET["output"])
        assert long["input"].endswith("[cut]")
        assert len(long["input"]) < 66_000
        assert hidden["input"] is None
        await api("DELETE", "/api/users/customer_1/", status=204)
        rows = (await api.logs())["results"]
        assert len(rows) == 3
        assert all(row["input"] is None and row["custom_identifier"] is None for row in rows)
        assert "Hello!" not in repr(await records(guard))


async def test_metadata_is_strings_and_properties_keep_their_types(api: Client) -> None:
    """As at Respan; keys with an underscore are reserved."""
    logged = {"metadata": {"plan": "pro", "seats": 5, "rate": 0.10, "on": True, "list": [1], "_own": "x"},
              "properties": {"seats": 5, "rate": 0.5, "deep": {"a": [None]}}}  # fmt: skip
    created = await api.log(logged)
    row = await api("GET", f"/api/request-logs/{created['unique_id']}/")
    assert row["metadata"] == {"plan": "pro", "seats": "5", "rate": "0.1", "on": "true", "list": "[1]"}
    assert row["properties"] == {"seats": 5, "rate": Decimal("0.5"), "deep": {"a": [None]}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": ""}, "model"),
    ({"model": 5}, "model"),
    ({"cost": -1}, "cost"),
    ({"cost": "free"}, "cost"),
    ({"cost": 9_000_001}, "cost"),
    ({"cost": True}, "cost"),
    ({"prompt_tokens": -1}, "prompt_tokens"),
    ({"prompt_tokens": 1.5}, "prompt_tokens"),
    ({"prompt_tokens": 10**13}, "prompt_tokens"),
    ({"usage": []}, "usage"),
    ({"usage": {"prompt_tokens": "many"}}, "usage.prompt_tokens"),
    ({"latency": -0.1}, "latency"),
    ({"timestamp": "yesterday"}, "timestamp"),
    ({"timestamp": "0001-01-01T00:00:00Z"}, "timestamp"),
    ({"timestamp": 5}, "timestamp"),
    ({"customer_identifier": "\u200b"}, "customer_identifier"),
    ({"customer_identifier": "x" * 300}, "customer_identifier"),
    ({"customer_identifier": ["a"]}, "customer_identifier"),
    ({"customer_params": "ann"}, "customer_params"),
    ({"customer_params": {"customer_identifier": "ann", "name": 5}}, "name"),
    ({"metadata": [1]}, "metadata"),
    ({"metadata": {"k": "x" * 20_000}}, "metadata"),
    ({"stream": "yes"}, "stream"),
    ({"custom_identifier": "x" * 2000}, "custom_identifier"),
    ({"model": "x" * 257}, "model"),
    ({"trace_unique_id": "x" * 257}, "trace_unique_id"),
]
UNREADABLE: list[tuple[bytes, int]] = [
    (b"{", 400), (b"[]", 400), (b"5", 400), (b"", 400), (b"null", 400), (b'{"model": NaN}', 400), (b"\xff", 400),
    (b'{"model": "m", "cost": Infinity}', 400), (b"[" * 100_000, 400), (b'{"cost": ' + b"9" * 6000 + b"}", 400),
    (b'{"model": "m", "cost": 1e999999999999}', 400), (b" " * 20_000_001, 413),
]  # fmt: skip


async def test_bad_fields_are_named_and_nothing_is_booked(api: Client, guard: Guard) -> None:
    """The answer says which field, what was wrong, and what would be right."""
    for fields, field in REFUSED:
        refused = await api.log(fields, status=400)
        assert refused["field"] == field, fields
        assert len(refused["detail"]) < 400
    assert await records(guard) == []


async def test_bodies_that_are_no_log(api: Client, guard: Guard) -> None:
    """No JSON, the wrong JSON, too much of it: an answer that says so."""
    for body, status in UNREADABLE:
        refused = await api("POST", "/api/request-logs/", body, status)
        assert refused["detail"]
    assert await records(guard) == []


async def test_only_json_is_taken(api: Client) -> None:
    """A form of a web page can't log, and nothing is unpacked."""
    for headers in ({"content-type": "text/plain"}, {"content-type": "application/json", "content-encoding": "gzip"}):
        answer = await api.http.post(
            "/api/request-logs/", content=b"{}", headers={"authorization": "Bearer sk-full-of-power", **headers}
        )
        assert answer.status_code == 415


async def test_bulk_takes_each_row_by_itself(api: Client, guard: Guard) -> None:
    """Good rows are booked, bad ones are told by their index; one of two with the same id counts."""
    rows: list[Any] = [
        {"model": "m", "customer_identifier": "ann", "cost": 1},
        {"model": "m", "cost": -1},
        "no log",
        {"model": "m", "customer_identifier": "ann", "cost": 2, "custom_identifier": "x"},
        {"model": "m", "customer_identifier": "ann", "cost": 4, "custom_identifier": "x"},
        {"cost": 3},
    ]
    answer = await api("POST", "/api/request-logs/bulk/", {"logs": rows}, 201)
    assert (answer["success_count"], answer["error_count"]) == (3, 3)
    assert [error["index"] for error in answer["errors"]] == [1, 2, 5]
    assert "cost" in answer["errors"][0]["error"]
    assert not any(error["retryable"] for error in answer["errors"])
    assert answer["warnings"] == [{"index": 4, "warning": "logged before with other amounts; the first stands"}]
    assert (await guard.status("ann")).total_spend == 3


async def test_bulk_takes_500_rows_and_no_more(api: Client, guard: Guard) -> None:
    """All are booked; 501 are refused as a whole; so are none."""
    rows = [{"model": "m", "customer_identifier": f"c{n % 7}", "cost": 0.001} for n in range(500)]
    answer = await api("POST", "/api/request-logs/bulk/", {"logs": rows}, 201)
    assert answer == {"success_count": 500, "error_count": 0, "errors": [], "warnings": []}
    assert len(await records(guard)) == 500
    bad: list[Any] = [[*rows, rows[0]], [], None, {}]
    for logs in bad:
        refused = await api("POST", "/api/request-logs/bulk/", {"logs": logs}, 400)
        assert refused["field"] == "logs"
    assert len(await records(guard)) == 500


async def test_bulk_of_nothing_but_bad_rows(api: Client) -> None:
    """It is a 400, in the same shape."""
    answer = await api("POST", "/api/request-logs/bulk/", {"logs": [{}, {}]}, 400)
    assert (answer["success_count"], answer["error_count"]) == (0, 2)


async def test_the_old_name_of_the_path(api: Client) -> None:
    """`/api/request-logs/create/` does the same; a path without its last slash, too."""
    for path in ("/api/request-logs/create/", "/api/request-logs", "/api/request-logs/create"):
        assert (await api("POST", path, {"model": "m", "cost": 1}, 201))["cost"] == 1


async def test_a_log_of_somebody_who_was_deleted(api: Client, clock: FakeClock) -> None:
    """It counts and says that there is nothing to find it by, each time that it is sent."""
    await api.log(customer_identifier="ann", cost=1)
    clock.advance(60)
    await api("DELETE", "/api/users/ann/", status=204)
    clock.advance(60)
    late = {"customer_identifier": "ann", "cost": 2, "timestamp": "2026-01-15T12:00:30Z", "custom_identifier": "x"}
    for _ in range(2):
        logged = await api.log(late)
        assert (logged["id"], logged["unique_id"], logged["customer_identifier"]) == (None, None, None)
        assert logged["status"] == "warning"
    assert (await api("POST", "/api/request-logs/summary/"))["total_cost"] == 3
    found = await api.log(late, timestamp="2026-01-15T12:01:30Z")
    assert (await api("GET", f"/api/request-logs/{found['id']}/"))["cost"] == 2


async def test_a_log_older_than_the_deletion_brings_nobody_back(api: Client, guard: Guard, clock: FakeClock) -> None:
    """Neither name nor address of somebody deleted comes with a log of the time before; a later one is a new start."""
    params = {"customer_identifier": "ann", "name": "Ann", "email": "ann@example.org"}
    await api.log(customer_params=params, cost=1)
    clock.advance(60)
    await api("DELETE", "/api/users/ann/", status=204)
    clock.advance(60)
    await api.log(customer_params=params, cost=2, timestamp="2026-01-15T12:00:30Z")
    assert await guard.get_customer("ann") is None
    await api.log(customer_params=params, cost=2)
    found = await guard.get_customer("ann")
    assert found is not None
    assert found.name == "Ann"


async def test_half_the_name_of_a_span_names_no_call(api: Client, guard: Guard) -> None:
    """Trace and span together make a log idempotent; one of them alone does not, so it counts each time."""
    for customer, named, cost in (
        ("both", {"trace_unique_id": "t", "span_unique_id": "s"}, 1),
        ("trace", {"trace_unique_id": "t"}, 2),
        ("span", {"span_unique_id": "s"}, 2),
    ):
        for _ in range(2):
            await api.log(named, customer_identifier=customer, cost=1)
        assert (await guard.status(customer)).total_spend == cost, customer
