"""Calls whose model reads what the request does not show: a hard budget stays hard for them too."""

from __future__ import annotations

import concurrent.futures
import logging
import time
import uuid
from decimal import Decimal
from typing import Any

import httpx2
import openai
import pytest

from respan_guard import Guard

from .conftest import MakeGuard

WINDOW = 128_000
MODEL = "gpt-4o"
INPUT = Decimal("2.5") / 1_000_000  # USD a token


class Provider:
    """Answers with as much input as the model can read in so many rounds."""

    def __init__(self, rounds: int = 1) -> None:
        self.rounds = rounds
        self.calls = 0

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        """Answer slowly, so that the others come meanwhile."""
        self.calls += 1
        time.sleep(0.1)
        usage = {"input_tokens": WINDOW * self.rounds - 100, "output_tokens": 50, "total_tokens": 0}
        reply = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "model": MODEL, "created_at": 1, "output": []}
        return httpx2.Response(200, json={**reply, "usage": usage})

    def client(self, guard: Guard) -> openai.OpenAI:
        """A client of one customer's."""
        http = httpx2.Client(transport=httpx2.MockTransport(self))
        return guard.wrap(
            openai.OpenAI(api_key="k", base_url="http://p/v1", http_client=http, max_retries=0), customer="c1"
        )


CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {"input": "go on", "previous_response_id": "resp_1"}),
    (1, {"input": "go on", "conversation": "conv_1"}),
    (1, {"input": "x", "prompt": {"id": "pmpt_1"}}),
    (1, {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]}]}),
    (1, {"input": "x", "tools": [{"type": "web_search"}]}),
    (3, {"input": "x", "tools": [{"type": "web_search"}], "max_tool_calls": 3}),
    (4, {"input": "x", "tools": [{"type": "web_search"}], "max_tool_calls": 3, "conversation": "conv_1"}),
]


@pytest.mark.parametrize(("rounds", "request_"), CASES)
@pytest.mark.parametrize("fit", [0, 1, 3])
def test_a_hard_budget_is_not_overspent(make_guard: MakeGuard, rounds: int, request_: dict[str, Any], fit: int) -> None:
    """Twenty at once against a budget for `fit`: that many are made, though each costs what it can at most."""
    provider = Provider(rounds)
    budget = fit * (rounds * WINDOW * INPUT + Decimal("0.01")) + Decimal("0.2")
    guard = make_guard(default_limits={"total_budget": budget})
    client = provider.client(guard)

    def one(_: int) -> bool:
        try:
            client.responses.create(model=MODEL, max_output_tokens=50, service_tier="default", **request_)
        except openai.APIStatusError:
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(20) as threads:
        made = sum(threads.map(one, range(20)))
    guard.sync.flush()
    assert guard.sync.status("c1").total_spend <= budget
    assert made == provider.calls == fit


def test_what_a_bound_rests_on_is_said_once(make_guard: MakeGuard, caplog: pytest.LogCaptureFixture) -> None:
    """No number of tool runs and no context window: the log says what is assumed and what to set, once each."""
    provider = Provider()
    prices = {"mine": {"input": 1, "output": 1}}
    client = provider.client(make_guard(default_limits={"total_budget": 100}, prices=prices))
    with caplog.at_level(logging.WARNING, "respan_guard"):
        for _ in range(2):
            client.responses.create(model="mine", input="x", tools=[{"type": "web_search"}])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert '"context_window" beside its price in `prices`' in said[0]
    assert "max_tool_calls" in said[1]


def test_an_amount_to_hold_is_held_for_them_too(make_guard: MakeGuard) -> None:
    """`hold` as an amount is the way out for budgets smaller than a context window."""
    provider = Provider()
    guard = make_guard(default_limits={"total_budget": "0.26"}, hold="0.05")
    provider.client(guard).responses.create(model=MODEL, input="go on", previous_response_id="resp_1")
    assert provider.calls == 1
