"""Respan's documentation and its official packages, against our mount: nothing but URL and key is changed."""

from __future__ import annotations

import asyncio
import re
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import requests
import respan

from respan_guard import Customer, Guard, Usage
from respan_guard.testing.serving import serve

from .support import KEY, MOUNT, READ_KEY, mounted

with warnings.catch_warnings():  # its own validators are deprecated by the newest pydantic
    warnings.simplefilter("ignore")
    from respan_sdk.respan_types import RespanFullLogParams  # type: ignore[import-untyped]
    from respan_sdk.respan_types.param_types import Customer as SDKCustomer  # type: ignore[import-untyped]

SNIPPET = (Path(__file__).parent / "data" / "respan_users_page_snippet.txt").read_text()
CREATED_AT = datetime(2026, 1, 15, tzinfo=UTC)


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage URL of an empty store."""
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'guard.db'}?synchronous=normal"


@pytest.fixture
def served(storage: str) -> Iterator[tuple[str, Guard]]:
    """The mount on a real server, and the guard behind it."""
    guard = Guard(storage)
    with serve(mounted(guard)) as url:
        yield f"{url}{MOUNT}", guard
    guard.sync.close()


def official(url: str, key: str, http: httpx.Client) -> respan.RespanClient:
    """The official client; whose connections we close, since it does not."""
    return respan.RespanClient(base_url=url, authorization=f"Bearer {key}", respan_api_key=key, httpx_client=http)


@pytest.fixture
def client(served: tuple[str, Guard]) -> Iterator[respan.RespanClient]:
    """The official client."""
    with httpx.Client() as http:
        yield official(served[0], KEY, http)


@pytest.fixture
async def async_client(served: tuple[str, Guard]) -> AsyncIterator[respan.AsyncRespanClient]:
    """The official client, for event loops."""
    async with httpx.AsyncClient() as http:
        yield respan.AsyncRespanClient(
            base_url=served[0], authorization=f"Bearer {KEY}", respan_api_key=KEY, httpx_client=http
        )


def test_the_first_snippet_of_the_users_page(served: tuple[str, Guard], client: respan.RespanClient) -> None:
    """It runs to the letter, but for URL and key; the user is then in the users list, the dashboard and the logs."""
    url, _ = served
    assert SNIPPET.startswith("import requests\n")
    code = SNIPPET.replace("https://api.respan.ai", url).replace("YOUR_RESPAN_API_KEY", KEY)
    assert sum(a != b for a, b in zip(code.split("\n"), SNIPPET.split("\n"), strict=True)) == 2
    names: dict[str, Any] = {}
    exec(compile(code, "respan's users page", "exec"), names)
    response: requests.Response = names["response"]
    assert response.status_code == 201, response.text
    (user,) = list(client.users.list_customers())
    assert (user.customer_identifier, user.name, user.email) == ("customer_1", "Hendrix Liu", "hendrix@respan.ai")
    assert user.number_of_requests == 1
    assert user.total_cost == pytest.approx(0.00000135)
    users = client.dashboard.list_active_users(summary_type="daily")
    assert (users.summary.active_users, users.summary.total_user_cost) == (1, pytest.approx(0.00000135))
    by_user = client.dashboard.list_metrics_breakdown(breakdown_by="customer_identifier", summary_type="daily")
    (bucket,) = by_user["total_cost"]
    assert bucket.customer_1 == pytest.approx(0.00000135)
    (log,) = list(client.spans.list_spans(filters=by("customer_identifier", "customer_1")))
    assert log["unique_id"] == response.json()["unique_id"]
    assert list(client.spans.list_spans(filters=by("customer_identifier", "customer_2"))) == []


def by(field: str, *values: Any, operator: str = "") -> respan.Filters:
    """A filter in the client's own type."""
    return respan.Filters(**{field: respan.FilterValue(operator=operator, value=list(values))})


def test_every_call_of_the_official_client(served: tuple[str, Guard], client: respan.RespanClient) -> None:
    """All of spans, users and dashboard that is here, with typed answers."""
    _, guard = served
    created = client.spans.create_span(
        model="gpt-4o-mini", prompt_messages=[{"role": "user", "content": "Hello"}],
        completion_message={"role": "assistant", "content": "Hi there!"}, prompt_tokens=50, completion_tokens=100,
        usage=respan.SpanCreateRequestUsage(cache_creation_input_tokens=0, cache_read_input_tokens=0),
        temperature=0.7, top_p=1.0, max_tokens=1024, generation_time=1.23, ttft=0.35, metadata={"feature": "chat"},
        customer_params=respan.SpanCreateRequestCustomerParams(
            customer_identifier="team/user 123", email="alice@example.com", name="Alice"
        ),
        stream=False, status_code=200, tools=[{"type": "function", "function": {"name": "lookup_order"}}],
        timestamp=datetime.fromisoformat("2026-01-04 10:30:00+00:00"), custom_identifier="order-1",
        trace_unique_id="trace-1", thread_identifier="thread-1", properties={"n": 1}, log_type="chat",
    )  # fmt: skip
    assert isinstance(created, respan.CreateSpanResponse)
    assert (created.customer_identifier, created.status, created.environment) == ("team/user 123", "success", "prod")
    assert created.cost == pytest.approx(0.0000675)
    assert (created.latency, created.time_to_first_token) == (1.23, 0.35)
    assert created.timestamp == datetime(2026, 1, 4, 10, 30, tzinfo=UTC)
    rows = [
        respan.SpanCreateRequest(
            model="gpt-4o-mini", prompt_messages=[{"role": "user", "content": "What is 2 + 2?"}],
            completion_message={"role": "assistant", "content": "4"}, customer_identifier=f"u{number % 5}",
        )
        for number in range(12)
    ]  # fmt: skip
    bulk = client.spans.bulk_create_spans(logs=rows)
    assert isinstance(bulk, respan.BulkOperationResponse)
    assert (bulk.success_count, bulk.error_count, bulk.errors) == (12, 0, [])

    listed = list(client.spans.list_spans(page_size=5))  # pages by number, as this client does
    assert len(listed) == len({log["unique_id"] for log in listed}) == 13
    costly = client.spans.list_spans(sort_by="-cost", page_size=3, include_fields="cost,model")
    assert next(iter(costly))["cost"] == pytest.approx(0.0000675)
    ranged = client.spans.list_spans(start_time=CREATED_AT, filters=by("cost", 0.00001, operator="lt"))
    assert len(list(ranged)) == 12
    detail = client.spans.retrieve_span(created.unique_id or "")
    assert isinstance(detail, respan.RetrieveSpanResponse)
    assert (detail.customer_name, detail.customer_email) == ("Alice", "alice@example.com")
    assert detail.limit_info is not None
    assert detail.limit_info.is_allowed is True
    assert (detail.custom_identifier, detail.trace_unique_id) == ("order-1", "trace-1")
    assert detail.metadata == {"feature": "chat"}
    summary = client.spans.get_spans_summary(end_time=CREATED_AT)
    assert (summary.number_of_requests, summary.total_tokens) == (1, 150)
    summary = client.spans.get_spans_summary(filters=by("model", "gpt-4o-mini"))
    assert summary.number_of_requests == 13
    for group in ("model", "customer_identifier", "trace", "thread", "custom_identifier", "provider_id", "prompt_id"):
        assert client.spans.request_logs_groups_list(group_by=group).count is not None
        found = client.spans.request_logs_groups_filter(group_by=group, filters=by("model", "gpt-4o-mini"))
        assert found.count == len(found.results)

    users = list(client.users.list_customers(page_size=2, sort_by="-total_cost"))
    assert len(users) == len({user.customer_identifier for user in users}) == 6
    assert users[0].customer_identifier == "team/user 123"
    assert [u.email for u in client.users.list_customers(filters=by_email("alice"))] == ["alice@example.com"]
    changed = client.users.update_user(
        "team/user 123", period_budget=100.5, budget_duration="monthly", total_budget=1000, markup_percentage=20,
        name="Alice B", metadata={"plan": "pro"}, period_start=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    assert (changed.period_budget, changed.budget_duration, changed.name) == (100.5, "monthly", "Alice B")
    user = client.users.retrieve_user("team/user 123")
    assert isinstance(user, respan.RetrieveUserResponse)
    assert user.total_budget == 1000
    assert user.period_start is not None
    assert user.period_start.day == 1
    customer = guard.sync.get_customer("team/user 123")
    assert customer is not None
    assert customer.period_budget == Decimal("100.5")

    active = client.dashboard.list_active_users(summary_type="all")
    assert active.summary.active_users == 6
    assert client.dashboard.get_total_users().summary.total_users == 5  # of this month
    metrics = ["number_of_requests", "total_cost", "average_latency"]
    breakdown = client.dashboard.list_metrics_breakdown(
        breakdown_by="model", summary_type="all", metrics_to_aggregate=metrics, filters=by("customer_identifier", "u1")
    )
    assert list(breakdown) == metrics
    client.users.delete_user("team/user 123")
    with pytest.raises(respan.NotFoundError):
        client.users.retrieve_user("team/user 123")
    with pytest.raises(respan.NotFoundError):
        client.spans.retrieve_span(created.unique_id or "")


def by_email(text: str) -> respan.Filters:
    """The client's type has no field for it, but takes it."""
    return respan.Filters(email=respan.FilterValue(operator="contains", value=[text]))


async def test_every_call_of_the_official_async_client(async_client: respan.AsyncRespanClient) -> None:
    """The same, on an event loop, many at once."""
    spans, users, dashboard = async_client.spans, async_client.users, async_client.dashboard
    created = await asyncio.gather(
        *(
            spans.create_span(model="gpt-4o-mini", input="Hi", output="Hello", customer_identifier=f"a/{number % 3}")
            for number in range(9)
        )
    )
    assert {span.status for span in created} == {"warning"}
    assert (
        await spans.bulk_create_spans(logs=[respan.SpanCreateRequest(model="gpt-4o-mini", cost=1)])
    ).error_count == 0
    assert len([log async for log in await spans.list_spans(page_size=4)]) == 10
    assert (await spans.retrieve_span(created[0].unique_id or "")).model == "gpt-4o-mini"
    assert (await spans.get_spans_summary()).number_of_requests == 10
    assert (await spans.request_logs_groups_list(group_by="customer_identifier")).count == 3
    assert (await spans.request_logs_groups_filter(group_by="model")).count == 1
    assert len([user async for user in await users.list_customers(page_size=2)]) == 3
    assert (await users.update_user("a/1", total_budget=5)).total_budget == 5
    assert (await users.retrieve_user("a/1")).total_budget == 5
    assert (await dashboard.list_active_users()).summary.active_users == 3
    assert (await dashboard.get_total_users()).summary.total_users == 3
    assert "total_cost" in await dashboard.list_metrics_breakdown(breakdown_by="customer_identifier")
    await users.delete_user("a/1")
    with pytest.raises(respan.NotFoundError):
        await users.retrieve_user("a/1")


def test_errors_are_the_clients_own(served: tuple[str, Guard], client: respan.RespanClient) -> None:
    """A bad filter is its `BadRequestError`, a key that may only read its `ForbiddenError`."""
    with pytest.raises(respan.BadRequestError) as refused:
        client.spans.list_spans(filters=by("prompt_tokens", "many"))
    assert "prompt_tokens" in refused.value.body["detail"]
    with httpx.Client() as http:
        reader = official(served[0], READ_KEY, http)
        assert list(reader.users.list_customers()) == []
        with pytest.raises(respan.ForbiddenError):
            reader.users.delete_user("ann")
        with pytest.raises(respan.core.api_error.ApiError) as unknown:
            list(official(served[0], "x", http).users.list_customers())
        assert unknown.value.status_code == 401


def test_respans_own_types_take_what_we_answer(served: tuple[str, Guard]) -> None:
    """`respan-sdk` validates a log and a user as they come out, and a log of its own goes in."""
    url, guard = served
    guard.sync.put_customer(
        Customer(customer_identifier="ann", name="Ann", period_budget="0.1", rate_limit=5, metadata={"a": 1})
    )
    guard.sync.record(Usage(model="gpt-4o-mini", input_tokens=9, output_tokens=3, latency_ms=10), "ann")
    with requests.Session() as session:
        session.headers["authorization"] = f"Bearer {KEY}"
        theirs = RespanFullLogParams(
            model="gpt-4o-mini", customer_identifier="ann", prompt_messages=[{"role": "user", "content": "Hi"}],
            completion_message={"role": "assistant", "content": "Hello"}, latency=0.5,
            usage={"prompt_tokens": 5, "completion_tokens": 2}, custom_identifier="from-sdk", metadata={"k": "v"},
        )  # fmt: skip
        sent = session.post(f"{url}/api/request-logs/", json=theirs.model_dump(mode="json", exclude_none=True))
        assert sent.status_code == 201, sent.text
        assert sent.json()["prompt_tokens"] == 5
        logs = session.get(f"{url}/api/request-logs/list/").json()["results"]
        assert len(logs) == 2
        for log in [*logs, *(session.get(f"{url}/api/request-logs/{log['id']}/").json() for log in logs)]:
            taken = RespanFullLogParams.model_validate(log)
            assert (taken.model, taken.customer_identifier) == ("gpt-4o-mini", "ann")
            assert taken.prompt_tokens == log["prompt_tokens"]
        user = SDKCustomer.model_validate(session.get(f"{url}/api/users/ann/").json())
        assert (user.customer_identifier, user.period_budget, user.rate_limit) == ("ann", 0.1, 5)


def test_the_client_is_the_real_one() -> None:
    """It comes from the package index, not from here."""
    module: ModuleType = sys.modules["respan"]
    assert "site-packages" in str(module.__file__)


def test_the_line_of_the_docs_makes_a_client(served: tuple[str, Guard]) -> None:
    """As it is written, but for the URL."""
    docs = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"`(RespanClient\(.*?\))`", docs)
    made: respan.RespanClient = eval(  # our own text
        line.replace("https://your.app/respan", served[0]), {"RespanClient": respan.RespanClient, "key": KEY}
    )
    assert list(made.users.list_customers()) == []
    made._client_wrapper.httpx_client.httpx_client.close()
