"""Respan's documentation runs as it stands: the snippets of its users page, by the official client."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import openai
import pytest

from respan_guard import Guard
from respan_guard.testing import FakeClock, StandInProvider
from respan_guard.testing.serving import serve
from tests.gateway_support import load_example, records_of

HERE = Path(__file__).parent
# The page's two snippets that call a model, to the letter.
RATE_LIMIT, BUDGET = (HERE / "data" / "respan_users_page_snippets.txt").read_text().split("\n\n")


@pytest.fixture
def clock() -> FakeClock:
    """Time that stands still, so that all requests fall within one minute."""
    return FakeClock()


@pytest.fixture
def guard(clock: FakeClock, tmp_path: Path) -> Guard:
    """The demo gateway's kind of guard: on SQLite, obeying what requests say about their customer."""
    return Guard(f"sqlite:///{tmp_path}/guard.db", trust_customer_params=True, clock=clock)


@pytest.fixture
def client(guard: Guard, clock: FakeClock) -> Iterator[openai.OpenAI]:
    """The official client: nothing is set but `base_url` and `api_key`."""
    gateway = load_example("gateway")
    provider = StandInProvider(clock=clock)
    with (
        provider.serve() as upstream,
        serve(gateway.create_app(guard, base_url=f"{upstream}/v1", api_key="key")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="YOUR_RESPAN_API_KEY") as client,
    ):
        yield client


def run(snippet: str, client: openai.OpenAI) -> Any:
    """Run a snippet with its `client`; gives its `response`."""
    names: dict[str, Any] = {"client": client}
    exec(compile(snippet, "respan's users page", "exec"), names)
    return names["response"]


def test_the_snippets_are_the_pages() -> None:
    """Nobody has adapted them: they set what the page sets, and use `client` alone."""
    assert '"rate_limit": 100  # requests per minute' in RATE_LIMIT
    assert '"period_budget": 1000,' in BUDGET
    assert RATE_LIMIT.startswith("response = client.chat.completions.create(")
    assert BUDGET.startswith("response = client.chat.completions.create(")


def test_the_rate_limit_holds(client: openai.OpenAI, guard: Guard, clock: FakeClock) -> None:
    """The customer gets the limit; request 101 within the minute is the SDK's `RateLimitError`, with its code."""
    first = run(RATE_LIMIT, client)
    assert first.choices[0].message.content
    customer = guard.sync.get_customer("customer_1")
    assert customer is not None
    assert customer.rate_limit == 100
    for _ in range(99):
        run(RATE_LIMIT, client)
    with pytest.raises(openai.RateLimitError) as refused:
        run(RATE_LIMIT, client.with_options(max_retries=0))
    assert refused.value.status_code == 429
    assert refused.value.code == "rate_limit"
    assert refused.value.type == "rate_limit_exceeded"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    records_of(guard, "customer_1", 100)
    clock.advance(120)
    assert run(RATE_LIMIT, client).choices


def test_the_budgets_hold(client: openai.OpenAI, guard: Guard, clock: FakeClock) -> None:
    """The customer gets both budgets, and the spend is booked against them; repeating the params restarts nothing."""
    run(BUDGET, client)
    clock.advance(86_400)
    run(BUDGET, client)
    customer = guard.sync.get_customer("customer_1")
    assert customer is not None
    assert customer.budget_duration == "monthly"
    assert (customer.period_budget, customer.total_budget) == (Decimal(1000), Decimal(10000))
    assert customer.period_start == date(2026, 1, 15)
    spent = sum(record.cost or 0 for record in records_of(guard, "customer_1", 2))
    status = guard.sync.status("customer_1")
    assert spent > 0
    assert status.total_spend == status.period_spend == spent
    assert {limit.name: (limit.limit, limit.used) for limit in status.limits if limit.metric == "cost"} == {
        "period_budget": (1000, spent),
        "total_budget": (10000, spent),
    }


def test_both_snippets_are_one_customer(client: openai.OpenAI, guard: Guard) -> None:
    """What one request leaves out stays as another set it."""
    run(RATE_LIMIT, client)
    run(BUDGET, client)
    run(RATE_LIMIT, client)
    customer = guard.sync.get_customer("customer_1")
    assert customer is not None
    assert customer.rate_limit == 100
    assert (customer.period_budget, customer.total_budget) == (Decimal(1000), Decimal(10000))


def test_a_spent_budget_is_a_402(client: openai.OpenAI, guard: Guard) -> None:
    """The page's budget snippet, with a budget that one answer uses up: the next is refused, and not retried."""
    tiny = BUDGET.replace('"period_budget": 1000,', '"period_budget": 0.0026,')
    assert tiny != BUDGET
    run(tiny, client)
    guard.sync.adjust("customer_1", Decimal(1), "spent elsewhere")
    with pytest.raises(openai.APIStatusError) as refused:
        run(tiny, client)
    assert refused.value.status_code == 402
    assert refused.value.code == "period_budget"
    assert refused.value.type == "budget_exceeded"
