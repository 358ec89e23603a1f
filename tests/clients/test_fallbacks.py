"""Requests that let the server choose among models: OpenRouter's `models`."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import httpx2
import openai
import pytest

from respan_guard import Guard
from respan_guard.providers import call_from_request

from .support import ASK, open_ai, records

CHEAP, DEAR = "openai/gpt-4o-mini", "anthropic/claude-opus-4.1"
PATH = "/api/v1/chat/completions"


def test_a_dearer_model_that_answered_is_paid_for(guard: Guard) -> None:
    """Its price is the reply's word, and without it the price list's; the record is under the model asked for first."""
    usage: dict[str, Any] = {"prompt_tokens": 10_000, "completion_tokens": 10_000, "cost": 0.85}

    def answer(_: httpx2.Request) -> httpx2.Response:
        reply = {"object": "chat.completion", "model": DEAR, "choices": [], "usage": usage}
        return httpx2.Response(200, json=reply)

    client = guard.wrap(open_ai("http://p", http_client=httpx2.Client(transport=httpx2.MockTransport(answer))))
    with guard.on_behalf_of("c1"):
        client.chat.completions.create(model=CHEAP, messages=ASK, extra_body={"models": [CHEAP, DEAR]})
        del usage["cost"]
        client.chat.completions.create(model=CHEAP, messages=ASK, extra_body={"models": [CHEAP, DEAR]})
        guard.sync.update_customer("c1", total_budget="1.76")
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(model=CHEAP, messages=ASK, extra_body={"models": [CHEAP, DEAR]})
    told, priced = records(guard)
    assert (told.model, told.cost, priced.cost) == (CHEAP, Decimal("0.85"), Decimal("0.9"))


@pytest.mark.parametrize(
    ("models", "as_much_as"),
    [([CHEAP, DEAR], DEAR), ([DEAR, CHEAP], DEAR), ([CHEAP], CHEAP), ([], CHEAP), (None, CHEAP)],
)
def test_the_dearest_is_held(guard: Guard, models: list[str] | None, as_much_as: str) -> None:
    """The server may choose any of them."""
    body = {"model": CHEAP, "messages": ASK, "max_tokens": 100}
    several = guard.estimator.of_call(call_from_request(PATH, {**body, "models": models}))
    alone = guard.estimator.of_call(call_from_request(PATH, {**body, "model": as_much_as}))
    assert alone.cost <= several.cost <= 2 * alone.cost
    assert several.model == CHEAP


@pytest.mark.parametrize("models", [[CHEAP, "nonsense"], [CHEAP, 7], [CHEAP] * 33])
def test_a_model_without_a_price_is_not_let_in_among_others(guard: Guard, models: list[Any]) -> None:
    """No price, or too many names to look at: a budget refuses the call."""
    call = call_from_request(PATH, {"model": CHEAP, "messages": ASK, "models": models})
    assert guard.estimator.of_call(call).unpriced is not None


def test_what_is_presumed_is_the_dearests(make_guard: Any) -> None:
    """A call without usage may have been the dearest's, where it is estimated too."""
    guard = make_guard(missing_usage="estimate")
    body = {"model": CHEAP, "messages": ASK, "max_tokens": 1000, "models": [CHEAP, DEAR]}
    call = call_from_request(PATH, body)
    assert call is not None
    cost, usage = guard.estimator.presume(call, 0)
    assert cost is not None
    assert cost >= 1000 * 75_000
    assert usage.model == CHEAP
