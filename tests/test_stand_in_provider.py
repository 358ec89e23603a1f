"""The stand-in provider over plain HTTP: its rules, its errors and its meter."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import httpx2
import pytest

from respan_guard.errors import InvalidInput
from respan_guard.providers import call_from_request, usage_from_reply
from respan_guard.testing import FakeClock, StandInProvider
from respan_guard.testing.provider import Answer

CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}
MESSAGE = {"model": "claude-sonnet-4-6", "max_tokens": 50, "messages": [{"role": "user", "content": "Hello"}]}
GEMINI = {"contents": [{"role": "user", "parts": [{"text": "Hello"}]}]}
GENERATE = "/v1beta/models/gemini-2.5-flash:generateContent"
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"model": "gpt-5-mini", "input": "Hello"},
    "/v1/embeddings": {"model": "text-embedding-3-small", "input": "Hello"},
    "/v1/completions": {"model": "gpt-3.5-turbo-instruct", "prompt": "Hello"},
    "/v1/images/generations": {"model": "gpt-image-1", "prompt": "Hello"},
    "/v1/messages": MESSAGE,
    GENERATE: GEMINI,
}


@pytest.fixture
def provider() -> StandInProvider:
    """A provider."""
    return StandInProvider(clock=FakeClock())


@pytest.fixture
async def client(provider: StandInProvider) -> AsyncIterator[httpx2.AsyncClient]:
    """A client that calls it directly, with a key and what Anthropic wants."""
    headers = {"authorization": "Bearer key", "anthropic-version": "2023-06-01"}
    transport = httpx2.ASGITransport(app=provider)
    async with httpx2.AsyncClient(transport=transport, base_url="http://provider", headers=headers) as client:
        yield client


def events(text: str) -> list[Any]:
    """The data of server-sent events; `[DONE]` as text."""
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in found]


# -- counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
async def test_what_it_says_it_used_is_what_it_meters(
    client: httpx2.AsyncClient, provider: StandInProvider, path: str
) -> None:
    """In every format the reply's usage, read as the guard reads it, is the meter's."""
    reply = await client.post(path, json=PATHS[path])
    assert reply.status_code == 200, reply.text
    usage = usage_from_reply(reply.json())
    call = provider.meter.calls[0]
    assert (usage.input_tokens, usage.output_tokens) == (call.input_tokens, call.output_tokens)
    assert call.output_tokens == (0 if "embeddings" in path else 32)
    assert call.input_tokens > 0
    assert call.completed
    assert call.cost is not None
    assert call.cost > 0


@pytest.mark.parametrize("path", PATHS)
async def test_input_never_exceeds_the_bounds(client: httpx2.AsyncClient, provider: StandInProvider, path: str) -> None:
    """Derived input stays within the body's bytes and within what the guard would hold for the request."""
    body = json.loads(json.dumps(PATHS[path]).replace("Hello", "Grüß Gott, 世界! 🎉" * 20))
    raw = json.dumps(body, ensure_ascii=False).encode()
    await client.post(path, content=raw)
    bound = call_from_request(path, body)
    assert bound is not None
    assert 0 < provider.meter.calls[0].input_tokens <= min(len(raw), bound.input_tokens_bound)


async def test_the_rule_for_input(client: httpx2.AsyncClient, provider: StandInProvider) -> None:
    """A token for every four bytes of text, rounded up, and four for each message."""
    messages = [{"role": "system", "content": "x" * 100}, {"role": "user", "content": [{"type": "text", "text": "ü"}]}]
    await client.post("/v1/chat/completions", json={**CHAT, "messages": messages})
    assert provider.meter.calls[0].input_tokens == 26 + 8


async def test_an_image_is_no_text(client: httpx2.AsyncClient, provider: StandInProvider) -> None:
    """An image counts as 85 tokens, however many characters its base64 has."""
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{'A' * 10_000}"}}
    body = {**CHAT, "messages": [{"role": "user", "content": [image]}]}
    await client.post("/v1/chat/completions", json=body)
    assert provider.meter.calls[0].input_tokens == 85 + 4


@pytest.mark.parametrize(
    ("path", "caps", "reason"),
    [
        ("/v1/chat/completions", {"max_tokens": 5}, ("choices", 0, "finish_reason", "length")),
        ("/v1/chat/completions", {"max_completion_tokens": 5}, ("choices", 0, "finish_reason", "length")),
        ("/v1/responses", {"max_output_tokens": 5}, ("incomplete_details", "reason", "max_output_tokens")),
        ("/v1/messages", {"max_tokens": 5}, ("stop_reason", "max_tokens")),
        (GENERATE, {"generationConfig": {"maxOutputTokens": 5}}, ("candidates", 0, "finishReason", "MAX_TOKENS")),
    ],
)
async def test_a_cap_is_obeyed(
    client: httpx2.AsyncClient, provider: StandInProvider, path: str, caps: Any, reason: tuple[Any, ...]
) -> None:
    """The answer stops at the request's cap, and says why."""
    reply = await client.post(path, json={**PATHS[path], **caps})
    found = reply.json()
    for step in reason[:-1]:
        found = found[step]
    assert found == reason[-1]
    assert provider.meter.calls[0].output_tokens == 5


async def test_choices_are_all_charged(client: httpx2.AsyncClient, provider: StandInProvider) -> None:
    """`n` answers cost n times the output."""
    reply = await client.post("/v1/chat/completions", json={**CHAT, "n": 3, "max_tokens": 4})
    assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1, 2]
    assert reply.json()["usage"]["completion_tokens"] == provider.meter.calls[0].output_tokens == 12


async def test_the_price_is_the_published_one(client: httpx2.AsyncClient, provider: StandInProvider) -> None:
    """A million tokens in and a million out of gpt-4o-mini are $0.15 and $0.60."""
    provider.script(Answer(input_tokens=1_000_000, output_tokens=1_000_000, text="long"))
    await client.post("/v1/chat/completions", json=CHAT)
    assert provider.meter.total_cost == Decimal("0.75")
    assert provider.meter.total_tokens == 2_000_000


async def test_an_unknown_model_has_no_cost(client: httpx2.AsyncClient, provider: StandInProvider) -> None:
    """It is answered and metered; its cost is unknown, which is not zero."""
    await client.post("/v1/chat/completions", json={**CHAT, "model": "house-model-7b"})
    assert provider.meter.calls[0].cost is None
    assert provider.meter.calls[0].output_tokens == 32


# -- streams ---------------------------------------------------------------------------------------


async def test_usage_in_a_stream_must_be_asked_for(client: httpx2.AsyncClient) -> None:
    """Chat streams tell usage only with `include_usage`, in a last chunk without choices, as OpenAI's do."""
    plain = events((await client.post("/v1/chat/completions", json={**CHAT, "stream": True})).text)
    assert all("usage" not in chunk for chunk in plain[:-1])
    asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    told = events((await client.post("/v1/chat/completions", json=asked)).text)
    assert [chunk["usage"] for chunk in told[:-2]] == [None] * (len(told) - 2)
    assert told[-2]["choices"] == []
    assert told[-2]["usage"]["completion_tokens"] == 32
    assert plain[-1] == told[-1] == "[DONE]"


async def test_stream_and_reply_say_the_same(client: httpx2.AsyncClient) -> None:
    """The text of a stream's pieces is the text of the reply."""
    whole = (await client.post("/v1/chat/completions", json=CHAT)).json()["choices"][0]["message"]["content"]
    chunks = events((await client.post("/v1/chat/completions", json={**CHAT, "stream": True})).text)[:-1]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole
    assert len(whole.split()) == 32


async def test_gemini_streams_as_sse_or_as_an_array(client: httpx2.AsyncClient) -> None:
    """`alt=sse` asks for events; without it the stream is one JSON array. The last chunk has the counts."""
    path = GENERATE.replace(":generate", ":streamGenerate")
    sse = await client.post(f"{path}?alt=sse", json=GEMINI)
    array = await client.post(path, json=GEMINI)
    assert sse.headers["content-type"].startswith("text/event-stream")
    assert array.headers["content-type"].startswith("application/json")
    for chunks in (events(sse.text), array.json()):
        assert len(chunks) == 8
        counts = [chunk["usageMetadata"]["candidatesTokenCount"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 32
        assert [chunk["candidates"][0].get("finishReason") for chunk in chunks] == [None] * 7 + ["STOP"]


# -- scripts ---------------------------------------------------------------------------------------


async def test_scripts_are_taken_in_order(client: httpx2.AsyncClient, provider: StandInProvider) -> None:
    """Each call takes the next script that matches; the others are answered as ever."""
    provider.script(Answer(text="one"), Answer(text="two"))
    provider.script(Answer(text="for 4o"), match=lambda request: request.model == "gpt-4o")
    said = []
    for model in ("gpt-4o-mini", "gpt-4o", "gpt-4o", "gpt-4o-mini"):
        reply = await client.post("/v1/chat/completions", json={**CHAT, "model": model, "max_tokens": 1})
        said.append(reply.json()["choices"][0]["message"]["content"])
    assert said == ["one", "two", "for 4o", "a"]


async def test_a_request_may_script_its_own_answer(client: httpx2.AsyncClient, provider: StandInProvider) -> None:
    """`x-stand-in-*` headers choose text and counts, where the provider runs in another process."""
    headers = {"x-stand-in-input-tokens": "100", "x-stand-in-cache-read-tokens": "40", "x-stand-in-text": "Hi"}
    reply = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert reply.json()["choices"][0]["message"]["content"] == "Hi"
    assert reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 40
    assert provider.meter.calls[0].input_tokens == 100
    bad = await client.post("/v1/chat/completions", json=CHAT, headers={"x-stand-in-output-tokens": "many"})
    assert bad.status_code == 400
    assert "x-stand-in-output-tokens" in bad.json()["error"]["message"]


async def test_providers_count_differently(client: httpx2.AsyncClient, provider: StandInProvider) -> None:
    """Inclusive counts of a script appear as each provider counts: Anthropic without cache, Gemini without thoughts."""
    cached = Answer(
        input_tokens=100,
        output_tokens=20,
        cache_read_tokens=30,
        cache_write_tokens=50,
        cache_write_1h_tokens=10,
        reasoning_tokens=5,
    )
    provider.script(cached, cached, cached)
    openai = (await client.post("/v1/chat/completions", json=CHAT)).json()["usage"]
    anthropic = (await client.post("/v1/messages", json=MESSAGE)).json()["usage"]
    google = (await client.post(GENERATE, json=GEMINI)).json()["usageMetadata"]
    assert (openai["prompt_tokens"], openai["completion_tokens"]) == (100, 20)
    assert openai["completion_tokens_details"]["reasoning_tokens"] == 5
    assert (anthropic["input_tokens"], anthropic["output_tokens"]) == (20, 20)
    assert anthropic["cache_creation"] == {"ephemeral_5m_input_tokens": 40, "ephemeral_1h_input_tokens": 10}
    assert (google["promptTokenCount"], google["candidatesTokenCount"], google["thoughtsTokenCount"]) == (100, 15, 5)
    assert google["cachedContentTokenCount"] == 30
    assert {call.total_tokens for call in provider.meter.calls} == {120}


async def test_audio_is_told_and_priced(client: httpx2.AsyncClient, provider: StandInProvider) -> None:
    """Audio tokens stand in the details, and cost what audio costs."""
    provider.script(Answer(input_tokens=10, input_audio_tokens=2, output_tokens=5, output_audio_tokens=4))
    reply = await client.post("/v1/chat/completions", json={**CHAT, "model": "gpt-4o-audio-preview"})
    assert reply.json()["usage"]["prompt_tokens_details"]["audio_tokens"] == 2
    assert reply.json()["usage"]["completion_tokens_details"]["audio_tokens"] == 4
    assert provider.meter.calls[0].input_audio_tokens == 2


@pytest.mark.parametrize(
    "contradiction",
    [
        {"input_tokens": 10, "cache_read_tokens": 11},
        {"input_tokens": 10, "cache_read_tokens": 6, "cache_write_tokens": 6},
        {"output_tokens": 3, "reasoning_tokens": 4},
        {"cache_write_tokens": 1, "cache_write_1h_tokens": 2},
        {"output_tokens": -1},
        {"chunks": 0},
    ],
)
def test_contradictions_are_refused(contradiction: Any) -> None:
    """A script whose parts are more than their whole can't be answered, so it can't be made."""
    with pytest.raises(InvalidInput):
        Answer(**contradiction)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/chat/completions", "Unknown parameter: 'customer_params'."),
        ("/v1/responses", "Unknown parameter: 'customer_params'."),
        ("/v1/embeddings", "Unknown parameter: 'customer_params'."),
        ("/v1/messages", "customer_params: Extra inputs are not permitted"),
        (GENERATE, 'Unknown name "customer_params"'),
    ],
)
async def test_unknown_parameters_are_refused(
    client: httpx2.AsyncClient, provider: StandInProvider, path: str, message: str
) -> None:
    """What a gateway forgot to strip is a 400 in the provider's own words, and costs nothing."""
    body = {**PATHS[path], "customer_params": {"customer_identifier": "customer_1"}}
    reply = await client.post(path, json=body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]
    assert provider.meter.total_cost == 0
    assert provider.meter.count(status=400) == 1
    lenient = StandInProvider(strict=False)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=lenient), headers=client.headers) as easy:
        assert (await easy.post(f"http://provider{path}", json=body)).status_code == 200


async def test_a_key_is_needed() -> None:
    """Without a key it is a 401, in each provider's shape; with `api_key`, any other key is too."""
    choosy = StandInProvider(api_key="right")
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=choosy), base_url="http://provider") as client:
        missing = await client.post("/v1/chat/completions", json=CHAT)
        wrong = await client.post("/v1/messages", json=MESSAGE, headers={"x-api-key": "wrong"})
        google = await client.post(f"{GENERATE}?key=wrong", json=GEMINI)
        right = await client.post(f"{GENERATE}?key=right", json=GEMINI)
    assert (missing.status_code, missing.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (401, "authentication_error")
    assert (google.status_code, google.json()["error"]["status"]) == (401, "UNAUTHENTICATED")
    assert right.status_code == 200


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", b'{"model": "gpt-4o"}', 400),
        ("/v1/chat/completions", b'{"model": "gpt-4o", "messages": [], "max_tokens": 0}', 400),
        ("/v1/chat/completions", b'{"model": "gpt-4o", "messages": [], "max_tokens": "5"}', 400),
        ("/v1/chat/completions", b'{"model": "gpt-4o", "messages": [], "stream_options": {}}', 400),
        ("/v1/messages", b'{"model": "claude-sonnet-4-6", "messages": []}', 400),
        ("/v1/somewhere", b"{}", 404),
    ],
)
async def test_bad_requests_are_refused(
    client: httpx2.AsyncClient, provider: StandInProvider, path: str, content: bytes, status: int
) -> None:
    """What a provider would not understand, it does not answer; the meter shows the refusal at no cost."""
    reply = await client.post(path, content=content)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]
    (call,) = provider.meter.calls
    assert (call.status, call.cost) == (status, Decimal(0))
    assert call.response_id is None


async def test_free_calls_are_not_metered(client: httpx2.AsyncClient, provider: StandInProvider) -> None:
    """Listing models and counting tokens cost nothing."""
    models = await client.get("/v1/models")
    counted = await client.post("/v1/messages/count_tokens", json={"model": "m", "messages": MESSAGE["messages"]})
    assert "gpt-4o-mini" in [model["id"] for model in models.json()["data"]]
    assert counted.json()["input_tokens"] > 0
    assert provider.meter.calls == []


# -- ids, meter ------------------------------------------------------------------------------------


async def test_ids_are_unique_and_shaped_like_real_ones(client: httpx2.AsyncClient, provider: StandInProvider) -> None:
    """No two answers share an id, and another provider gives out other ones, unless both are seeded alike."""
    for path in PATHS:
        await client.post(path, json=PATHS[path])
    ids = {call.endpoint: call.response_id or "" for call in provider.meter.calls}
    assert ids["chat.completions"].startswith("chatcmpl-")
    assert len(ids["chat.completions"]) == 38
    assert ids["responses"].startswith("resp_")
    assert ids["messages"].startswith("msg_01")
    assert len(ids["generateContent"]) == 22
    assert len({call.request_id for call in provider.meter.calls}) == len(PATHS)
    found = []
    for seed in ("a", "a", None):
        other = StandInProvider(seed=seed)
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=other), headers=client.headers) as easy:
            found.append((await easy.post("http://provider/v1/chat/completions", json=CHAT)).json()["id"])
    assert found[0] == found[1] != found[2]


async def test_the_meter_can_be_asked_and_reset(client: httpx2.AsyncClient, provider: StandInProvider) -> None:
    """Calls can be counted by what they have; keys are not among it; a reset forgets all."""
    retry = {"x-stainless-retry-count": "2", "x-api-key": "secret"}
    await client.post("/v1/chat/completions", json=CHAT, headers=retry)
    await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert provider.meter.count() == 2
    assert provider.meter.count(stream=True, model="gpt-4o-mini") == 1
    assert [call.attempt for call in provider.meter.calls] == [2, 0]
    assert not {"authorization", "x-api-key"} & provider.meter.calls[0].headers.keys()
    provider.reset()
    assert provider.meter.calls == []
    assert provider.meter.total_cost == 0


async def test_embeddings_come_for_each_input(client: httpx2.AsyncClient) -> None:
    """One vector for each text, of the width asked for, as numbers or packed."""
    body = {"model": "text-embedding-3-small", "input": ["a", "b"], "dimensions": 4}
    numbers = (await client.post("/v1/embeddings", json=body)).json()["data"]
    packed = (await client.post("/v1/embeddings", json={**body, "encoding_format": "base64"})).json()["data"]
    assert [len(item["embedding"]) for item in numbers] == [4, 4]
    assert numbers[0]["embedding"] != numbers[1]["embedding"]
    assert isinstance(packed[0]["embedding"], str)
