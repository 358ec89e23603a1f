"""Refusals as the official clients see them, over a real server on loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
import uvicorn

from tests.middleware.support import gateway, make_guard, provider


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Run an app under uvicorn in a thread; gives its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


class Counting:
    """Counts the requests that reach the app below."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.requests = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests += scope["type"] == "http"
        await self.app(scope, receive, send)


# limits, status, error type, code, requests that the client makes
CASES: list[tuple[dict[str, Any], int, str, str, int]] = [
    ({"default_limits": {"total_budget": 0}}, 402, "budget_exceeded", "total_budget", 1),
    ({"default_limits": {"total_budget": 0}, "budget_status_code": 429}, 429, "budget_exceeded", "total_budget", 1),
    ({"default_limits": {"rate_limit": 0}}, 429, "rate_limit_exceeded", "rate_limit", 1),
    ({"default_limits": {"total_budget": "0.0000001"}}, 402, "budget_exceeded", "total_budget", 1),
]


@pytest.mark.parametrize(("options", "status", "kind", "code", "requests"), CASES)
@pytest.mark.parametrize("client", ["openai", "anthropic"])
def test_what_is_final_is_asked_once(
    client: str, options: dict[str, Any], status: int, kind: str, code: str, requests: int
) -> None:
    """A spent budget is the client's own exception with type and code, after exactly one request."""
    guard, _ = make_guard(**options)
    app = Counting(gateway(provider, guard))
    with serving(app) as url:
        error: Any
        if client == "openai":
            with (
                openai.OpenAI(api_key="x", base_url=f"{url}/v1", default_headers={"x-customer": "c"}) as one,
                pytest.raises(openai.APIStatusError) as refused,
            ):
                one.chat.completions.create(
                    model="gpt-4o-mini", max_tokens=10, messages=[{"role": "user", "content": "hi"}]
                )
            error = refused.value
            assert (error.type, error.code) == (kind, code)
            assert isinstance(error, openai.RateLimitError) == (status == 429)
        else:
            with (
                anthropic.Anthropic(api_key="x", base_url=url, default_headers={"x-customer": "c"}) as other,
                pytest.raises(anthropic.APIStatusError) as denied,
            ):
                other.messages.create(
                    model="claude-haiku-4-5", max_tokens=10, messages=[{"role": "user", "content": "hi"}]
                )
            error = denied.value
            assert error.body["error"]["type"] == kind
            assert isinstance(error, anthropic.RateLimitError) == (status == 429)
        assert error.status_code == status
        assert app.requests == requests


def test_a_rate_is_waited_for_and_then_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client sleeps as long as it is told, not longer than a minute, and its second try is let in."""
    guard, ledger = make_guard(default_limits={"rate_limit": 1})
    clock: Any = guard.clock
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.advance(seconds)

    app = Counting(gateway(provider, guard))
    with (
        serving(app) as url,
        openai.OpenAI(api_key="x", base_url=f"{url}/v1", default_headers={"x-customer": "c"}) as client,
    ):
        monkeypatch.setattr("openai._base_client.time.sleep", sleep)
        for _ in range(2):
            clock.advance(5)
            reply = client.chat.completions.create(
                model="gpt-4o-mini", max_tokens=10, messages=[{"role": "user", "content": "hi"}]
            )
            assert reply.usage is not None
    assert app.requests == 3
    assert len(slept) == 1
    assert 1 <= slept[0] <= 61
    assert len(ledger.entries) == 2


def test_streams_through_the_door() -> None:
    """The official client reads a stream through the door, and it is booked."""
    guard, ledger = make_guard()
    with (
        serving(gateway(provider, guard)) as url,
        openai.OpenAI(api_key="x", base_url=f"{url}/v1", default_headers={"x-customer": "c"}) as client,
    ):
        stream = client.chat.completions.create(
            model="gpt-4o-mini", max_tokens=10, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        words = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    assert words == ["hel", "lo"]
    assert ledger.kinds == ["usage"]


def test_respans_snippet() -> None:
    """Respan's own: `extra_body={"customer_params": ...}` sets the limit that the next request meets."""
    guard, _ = make_guard(default_limits=None, trust_customer_params=True)
    with (
        serving(gateway(provider, guard, identify="body")) as url,
        openai.OpenAI(api_key="x", base_url=f"{url}/v1", max_retries=0) as client,
    ):

        def ask() -> None:
            client.chat.completions.create(
                model="gpt-4o-mini",
                messages=[{"role": "user", "content": "hi"}],
                extra_body={"customer_params": {"customer_identifier": "customer_1", "rate_limit": 3}},
            )

        for _ in range(3):
            ask()
        with pytest.raises(openai.RateLimitError) as refused:
            ask()
    assert refused.value.code == "rate_limit"
