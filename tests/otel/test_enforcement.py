"""`enforce=True`: a call whose customer is known to be over a limit is stopped at its span's start, or is not."""

from __future__ import annotations

import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import anthropic
import pytest
from opentelemetry import baggage
from pydantic_ai import Agent
from pydantic_ai.models.instrumented import InstrumentationSettings
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from respan_guard import BudgetExceeded, CustomerBlocked
from respan_guard.testing import StandInProvider

from .conftest import MakeMetered
from .support import NATIVE, Metered, call

LIMITS = {"total_budget": Decimal("0.01")}


def numbered(number: int) -> dict[str, Any]:
    """A call of 0.004 USD with an id of its own."""
    return call(gen_ai__response__id=f"chatcmpl-{number:024d}")


def test_a_spent_budget_stops_the_next_call(make_metered: MakeMetered) -> None:
    """Three calls of 0.004 pass a budget of 0.01, the fourth is never made; another customer goes on."""
    metered = make_metered(default_limits=LIMITS, otel_enforce=True)
    with metered.guard.on_behalf_of("org_1"):
        for number in range(3):
            metered.see(numbered(number))
            metered.records()
        with pytest.raises(BudgetExceeded) as refused:
            metered.see(numbered(3))
    assert refused.value.decision.violated[0].name == "total_budget"
    with metered.guard.on_behalf_of("org_2"):
        metered.see(numbered(4))
    assert len(metered.records()) == 4
    assert not metered.processor._running


def test_a_spent_budget_of_the_apps_stops_every_customer(make_metered: MakeMetered) -> None:
    """What others spent counts; budgets of models do not stop calls that are known by their spans alone."""
    metered = make_metered(app_budgets=LIMITS, model_budgets={"total_budget": Decimal("0.001")}, otel_enforce=True)
    for number in range(3):
        with metered.guard.on_behalf_of(f"org_{number}"):
            metered.see(numbered(number))
            metered.records()
    with metered.guard.on_behalf_of("org_9"), pytest.raises(BudgetExceeded) as refused:
        metered.see(numbered(3))
    assert [limit.name for limit in refused.value.decision.violated] == ["app_total_budget"]


def test_a_header_does_not_undo_it(make_metered: MakeMetered) -> None:
    """A client that sends baggage under the name by which the app says who it is, is stopped all the same."""
    metered = make_metered(default_limits={"total_budget": 0}, otel_enforce=True)
    for sent in ("whatever", "ann"):
        with pytest.raises(BudgetExceeded):
            metered.start(call(user__id="ann"), context=baggage.set_baggage("user.id", sent))


def test_it_is_let_through_again(make_metered: MakeMetered) -> None:
    """A budget that is raised, or a block that is lifted, counts soon."""
    metered = make_metered(default_limits={"total_budget": 0}, otel_enforce=True)
    with metered.guard.on_behalf_of("org_1"):
        with pytest.raises(BudgetExceeded):
            metered.see(numbered(0))
        metered.guard.sync.update_customer("org_1", total_budget=1)
        time.sleep(0.3)
        metered.see(numbered(1))
        metered.guard.sync.update_customer("org_1", blocked=True)
        time.sleep(0.3)
        with pytest.raises(CustomerBlocked):
            metered.see(numbered(2))


def test_a_store_that_must_be_asked(make_metered: MakeMetered, tmp_path: Path) -> None:
    """Nothing waits for SQLite: the call that asks goes on, a later one knows."""
    metered = make_metered(f"sqlite:///{tmp_path / 'guard.db'}", default_limits={"total_budget": 0}, otel_enforce=True)
    with metered.guard.on_behalf_of("org_1"):
        metered.see(numbered(0))
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                metered.see(numbered(1))
            except BudgetExceeded:
                break
            time.sleep(0.05)
        else:
            pytest.fail("it was never refused")


@pytest.mark.parametrize(
    "options", [{}, {"otel_enforce": True, "mode": "shadow"}, {"otel_enforce": True, "mode": "off"}]
)
def test_nothing_is_stopped_unless_asked_for(options: dict[str, Any], make_metered: MakeMetered) -> None:
    """By default, in shadow mode and with the guard off, everything passes."""
    metered = make_metered(default_limits={"total_budget": 0}, **options)
    with metered.guard.on_behalf_of("org_1"):
        for number in range(3):
            metered.see(numbered(number))
    assert len(metered.records()) == (0 if options.get("mode") == "off" else 3)


def test_only_calls_are_stopped(make_metered: MakeMetered) -> None:
    """Spans of agents, tools and requests start whatever the customer has left, and so do calls of nobody."""
    metered = make_metered(default_limits={"total_budget": 0}, otel_enforce=True)
    with metered.guard.on_behalf_of("org_1"):
        metered.see(call(gen_ai__operation__name="invoke_agent"))
        metered.see({"http.request.method": "GET"}, "asgi")
        with pytest.raises(BudgetExceeded):
            metered.see(numbered(0))
    metered.see(numbered(1))
    assert [record.customer_identifier for record in metered.records()] == [""]


def test_what_is_admitted_is_not_asked_again(make_metered: MakeMetered) -> None:
    """Within an admission the guard has decided already, and holds what the work may cost."""
    metered = make_metered(default_limits={"total_budget": 1}, otel_enforce=True)
    with metered.guard.sync.admit("org_1", estimate=Decimal(1)):
        metered.see(numbered(0))
    assert len(metered.records()) == 1


async def test_pydantic_ai_lets_it_through(
    make_metered: MakeMetered, provider: StandInProvider, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real framework: the refusal reaches the caller, nothing is sent, nothing is recorded."""
    metered = make_metered(default_limits={"total_budget": 0}, otel_enforce=True)
    settings = InstrumentationSettings(tracer_provider=metered.provider)
    model = OpenAIChatModel("gpt-4o", provider=OpenAIProvider(base_url=f"{url}/v1", api_key="k"))
    monkeypatch.setattr(Agent, "_instrument_default", settings)
    agent = Agent(model)
    with metered.guard.on_behalf_of("org_1"), pytest.raises(BudgetExceeded):
        await agent.run("How far is the moon?")
    assert provider.meter.calls == []


def test_anthropics_own_spans_swallow_it(
    make_metered: MakeMetered, provider: StandInProvider, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the page says: its spans never raise, so the call is made; it is still recorded."""
    monkeypatch.setenv("ANTHROPIC_OPEN_TELEMETRY", "true")
    metered = make_metered(default_limits={"total_budget": 0}, otel_enforce=True)
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", metered.provider)
    client = anthropic.Anthropic(base_url=url, api_key="k", max_retries=0)
    with client, metered.guard.on_behalf_of("org_1"):
        client.messages.create(model="claude-sonnet-4-6", max_tokens=9, messages=[{"role": "user", "content": "Hi"}])
    assert len(provider.meter.calls) == 1
    assert _scopes(metered) <= {NATIVE}


def _scopes(metered: Metered) -> set[str]:
    return {"" if record.source != "span" else NATIVE for record in metered.records()}
