"""The examples run, and do what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from starlette.testclient import TestClient

from respan_guard import Guard
from respan_guard.testing import FakeClock, StandInProvider
from respan_guard.testing.provider import Answer, Gate
from respan_guard.testing.serving import serve
from tests.gateway_support import load_example, records_of


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that examples make go to a directory of the test's own, and no key of the developer's is used."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "RESPAN_GUARD_STORAGE"):
        monkeypatch.delenv(name, raising=False)


# -- quickstarts -----------------------------------------------------------------------------------


def test_starlette_quickstart_refuses_the_fourth_and_the_sixth() -> None:
    """Three drawings pass, the fourth within the minute is a 429; with a higher rate, the sixth of a day is a 402."""
    example = load_example("quickstart_starlette")
    with TestClient(example.app) as client:

        def draw(customer: str) -> Any:
            return client.post("/v1/draw", json={"prompt": "a river"}, headers={"x-customer": customer})

        assert [draw("org_1").status_code for _ in range(4)] == [200, 200, 200, 429]
        assert draw("org_2").json() == {"picture": "a picture of a river"}
        example.guard.sync.update_customer("org_3", rate_limit=100)
        assert [draw("org_3").status_code for _ in range(6)] == [200] * 5 + [402]
        assert client.post("/v1/draw", json={"prompt": "a river"}).status_code == 401
        assert [record.cost for record in records_of(example.guard, "org_3", 5)] == [Decimal("0.04")] * 5


def test_fastapi_quickstart_refuses_and_shows_the_standing() -> None:
    """The dependency's refusal is the response; `/me/usage` tells what was spent and counts for nothing."""
    example = load_example("quickstart_fastapi")
    acme, bolt = ({"authorization": f"Bearer key-of-{name}"} for name in ("acme", "bolt"))
    with TestClient(example.app) as client:
        drawn = [client.post("/draw?prompt=a+river", headers=acme) for _ in range(4)]
        assert [reply.status_code for reply in drawn] == [200, 200, 200, 429]
        assert drawn[0].json() == {"picture": "a picture of a river"}
        assert drawn[3].json()["error"]["code"] == "rate_limit"
        assert drawn[3].headers["retry-after"]
        example.guard.sync.update_customer("bolt", rate_limit=100)
        assert [client.post("/draw?prompt=x", headers=bolt).status_code for _ in range(6)] == [200] * 5 + [402]
        example.guard.sync.flush()
        standing = client.get("/me/usage", headers=acme).json()
        budget = next(limit for limit in standing["limits"] if limit["name"] == "period_budget")
        assert (Decimal(budget["used"]), Decimal(budget["remaining"])) == (Decimal("0.12"), Decimal("0.08"))
        assert client.get("/me/usage", headers={"authorization": "Bearer stranger"}).status_code == 401


# -- the gateway -----------------------------------------------------------------------------------


@pytest.fixture
def provider() -> StandInProvider:
    """The provider behind the gateway."""
    return StandInProvider(clock=FakeClock())


@pytest.fixture
def guard() -> Guard:
    """A guard that trusts requests, as a gateway for one's own back ends does."""
    return Guard("memory://", clock=FakeClock(), trust_customer_params=True)


@pytest.fixture
def url(provider: StandInProvider, guard: Guard) -> Iterator[str]:
    """The gateway's base URL."""
    gateway = load_example("gateway")
    with (
        provider.serve() as upstream,
        serve(gateway.create_app(guard, base_url=f"{upstream}/v1", api_key="of-the-gateway")) as root,
    ):
        yield f"{root}/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client of the gateway."""
    with openai.OpenAI(base_url=url, api_key="of-the-back-end", max_retries=0) as client:
        yield client


MESSAGES: Any = [{"role": "user", "content": "Hello"}]
ACME = {"customer_params": {"customer_identifier": "acme", "period_budget": 1, "budget_duration": "monthly"}}


def test_gateway_serves_every_openai_call(client: openai.OpenAI, provider: StandInProvider, guard: Guard) -> None:
    """Chat, responses, embeddings and streams pass, and each is one record that costs what the provider charges."""
    client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES, extra_body=ACME)
    for _ in client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES, stream=True, extra_body=ACME):
        pass
    client.responses.create(model="gpt-5-mini", input="Hello", extra_body=ACME)
    for _ in client.responses.create(model="gpt-5-mini", input="Hello", stream=True, extra_body=ACME):
        pass
    client.embeddings.create(model="text-embedding-3-small", input="Hello", extra_body=ACME)
    client.completions.create(model="gpt-3.5-turbo-instruct", prompt="Hello", extra_body=ACME)
    records = records_of(guard, "acme", 6)
    assert [record.cost for record in records] == [call.cost for call in provider.meter.calls]
    assert [record.kind for record in records] == ["usage"] * 6
    assert provider.meter.count(status=200) == 6


def test_gateway_strips_what_is_for_itself(client: openai.OpenAI, provider: StandInProvider) -> None:
    """The provider, which refuses unknown names, sees neither the params nor the back end's key."""
    extra = {**ACME, "respan_params": {}, "keywordsai_params": {}, "customer_identifier": "acme"}
    client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES, extra_body=extra)
    assert provider.meter.count(status=200) == 1
    gateway = load_example("gateway")
    assert gateway.without_customer_params({"model": "m", **extra}) == {"model": "m"}


def test_gateway_pays_with_its_own_key(provider: StandInProvider, url: str) -> None:
    """The provider lets in only the gateway's key; the back end's is not passed on."""
    provider.api_key = "of-the-gateway"
    with openai.OpenAI(base_url=url, api_key="of-the-back-end", max_retries=0) as client:
        client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES, extra_body=ACME)
    assert provider.meter.count(status=200) == 1


@pytest.mark.parametrize("asked", [False, True])
def test_gateway_shows_usage_to_those_who_asked(client: openai.OpenAI, guard: Guard, asked: bool) -> None:
    """A stream has a chunk without choices only for a client that wants usage; the ledger has it in any case."""
    options: Any = {"stream_options": {"include_usage": True}} if asked else {}
    chunks = list(
        client.chat.completions.create(
            model="gpt-4o-mini", messages=MESSAGES, stream=True, extra_body={**ACME, **options}
        )
    )
    assert [chunk.usage is not None for chunk in chunks[-2:]] == [False, asked]
    assert all(chunk.choices for chunk in chunks[:-1])
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).count(" ") == 31
    (record,) = records_of(guard, "acme", 1)
    assert record.usage.output_tokens == 32


def test_gateway_passes_a_stream_on_as_it_comes(client: openai.OpenAI, provider: StandInProvider) -> None:
    """A piece arrives while the provider still holds back the next."""
    gate = Gate()
    provider.script(Answer(text="ab", chunks=2, gate=gate))
    stream = client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES, stream=True, extra_body=ACME)
    assert next(stream).choices[0].delta.role == "assistant"
    gate.wait_for_arrival()
    gate.release()
    assert next(stream).choices[0].delta.content == "a"
    gate.wait_for_arrival(2)
    gate.open()
    assert next(stream).choices[0].delta.content == "b"
    assert [chunk.choices[0].finish_reason for chunk in stream] == ["stop"]


def test_gateway_lets_go_of_the_provider_when_the_client_leaves(
    client: openai.OpenAI, provider: StandInProvider, guard: Guard
) -> None:
    """The provider's stream is closed too, and what the call may have cost is owed: the hold becomes an entry."""
    gate = Gate()
    provider.script(Answer(gate=gate))
    stream = client.chat.completions.create(
        model="gpt-4o-mini", messages=MESSAGES, stream=True, max_tokens=50, extra_body=ACME
    )
    next(stream)
    gate.wait_for_arrival()
    stream.close()
    records = records_of(guard, "acme", 1)
    assert [record.kind for record in records] == ["presumed"]
    (charged,) = provider.meter.charged
    assert not charged.completed
    assert (records[0].cost or 0) >= (charged.cost or 0)


def test_gateway_passes_errors_on(client: openai.OpenAI, provider: StandInProvider, guard: Guard) -> None:
    """The provider's refusal is the client's, with its status, body and `Retry-After`, and nothing is booked."""
    provider.fault("error", status=429, retry_after=7, message="slow down")
    with pytest.raises(openai.RateLimitError, match="slow down") as refused:
        client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES, extra_body=ACME)
    assert refused.value.response.headers["retry-after"] == "7"
    guard.sync.flush()
    assert list(guard.sync.records()) == []


def test_gateway_says_when_the_provider_is_away(guard: Guard) -> None:
    """Nobody listens there: 502, nothing is booked, nothing stays held."""
    gateway = load_example("gateway")
    with TestClient(gateway.create_app(guard, base_url="http://127.0.0.1:9/v1")) as client:
        reply = client.post("/v1/chat/completions", json={"model": "gpt-4o-mini", "messages": MESSAGES, **ACME})
        assert (reply.status_code, reply.json()["error"]["type"]) == (502, "gateway_error")
        guard.sync.flush()
        status = guard.sync.status("acme")
        assert [(limit.used, limit.held) for limit in status.limits if limit.metric == "cost"] == [(0, 0)]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"model": "gpt-4o-mini", "messages": []}, 401),
        ("/v1/files", ACME, 404),
        ("/v1/../admin", ACME, 404),
        ("/v1/chat/completions", [], 400),
    ],
)
def test_gateway_refuses_the_rest(url: str, provider: StandInProvider, path: str, body: Any, status: int) -> None:
    """Nobody's calls, unknown endpoints and bodies that are no objects never reach the provider."""
    target = httpx2.URL(url).copy_with(raw_path=path.encode())
    reply = httpx2.post(target, content=json.dumps(body), headers={"content-type": "application/json"})
    assert reply.status_code == status
    assert provider.meter.calls == []


def test_gateway_runs_without_settings() -> None:
    """`uvicorn examples.gateway:app` serves with a stand-in provider and a file in the current directory."""
    gateway = load_example("gateway")
    body = {"model": "gpt-4o-mini", "messages": MESSAGES, **ACME}
    assert not Path("respan_guard.db").exists()
    with TestClient(gateway.app) as client:
        reply = client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200
        assert "ratelimit" in reply.headers
    assert Path("respan_guard.db").exists()


def test_gateway_follows_the_environment(provider: StandInProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """`OPENAI_BASE_URL` and `OPENAI_API_KEY` put another provider there."""
    provider.api_key = "real"
    with provider.serve() as upstream:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{upstream}/v1/")
        monkeypatch.setenv("OPENAI_API_KEY", "real")
        with TestClient(load_example("gateway").app) as client:
            reply = client.post("/v1/chat/completions", json={"model": "gpt-4o-mini", "messages": MESSAGES, **ACME})
    assert reply.status_code == 200
    assert provider.meter.count(status=200) == 1
