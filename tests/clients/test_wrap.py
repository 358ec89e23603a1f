"""A wrapped client is the same client: key, address, headers, patience, proxies and connections."""

from __future__ import annotations

import gc
import io
import json
import subprocess
import sys
import textwrap
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from respan_guard import Guard
from respan_guard.errors import ConfigurationError
from respan_guard.testing import StandInProvider
from respan_guard.testing.provider import Answer

from .support import (
    ASK,
    CHAT,
    CLAUDE,
    EMBEDDINGS,
    arecords,
    async_claude,
    async_open_ai,
    claude,
    open_ai,
    records,
    same,
)


def ask(client: Any) -> Any:
    """A chat completion."""
    return client.chat.completions.create(model=CHAT, messages=ASK)


@pytest.mark.parametrize("make", [open_ai, async_open_ai, claude, async_claude])
def test_it_is_the_same_kind_of_client(guard: Guard, url: str, make: Any) -> None:
    """Type, key, base URL, headers, query, retries and timeout stay; the first client is as it was."""
    first = make(url, max_retries=7, timeout=12.5, default_headers={"x-team": "moon"}, default_query={"v": "1"})
    before = first._client._transport
    wrapped = guard.wrap(first)
    assert type(wrapped) is type(first)
    assert wrapped is not first
    for name in ("api_key", "base_url", "max_retries", "timeout", "_custom_query"):
        assert getattr(wrapped, name) == getattr(first, name)
    assert wrapped.default_headers["x-team"] == "moon"
    assert first._client._transport is before
    assert isinstance(wrapped._client, httpx2.Client | httpx2.AsyncClient)


class Tenant(openai.OpenAI):
    """A client with an argument of its own."""

    def __init__(self, tenant: str, **options: Any) -> None:
        super().__init__(**options)
        self.tenant = tenant

    def ask(self) -> Any:
        """A method of its own."""
        return ask(self)


class AsyncTenant(anthropic.AsyncAnthropic):
    """The same of another SDK."""

    def __init__(self, tenant: str, **options: Any) -> None:
        super().__init__(**options)
        self.tenant = tenant


def test_a_class_of_the_apps_own_is_kept(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Its `__init__` is not called again, what was set on the client stays, and its own methods are guarded."""
    first = Tenant("acme", base_url=f"{url}/v1", api_key="sk-test", max_retries=3)
    first.tenant = "moon"
    first.label = "mine"  # type: ignore[attr-defined]
    with first, guard.wrap(first, customer="c1") as wrapped:
        assert type(first) is Tenant
        assert first.chat is not wrapped.chat
        assert (type(wrapped), wrapped.tenant, wrapped.label) == (Tenant, "moon", "mine")  # type: ignore[attr-defined]
        assert (wrapped.api_key, wrapped.max_retries) == ("sk-test", 3)
        wrapped.ask()
    same(records(guard), provider)
    other = AsyncTenant("acme", base_url=url, api_key="sk-test")
    assert other.messages._client is other
    again = guard.wrap(guard.wrap(other))
    assert (type(again), again.tenant) == (AsyncTenant, "acme")
    assert again.messages._client is again


def test_what_was_set_on_a_client_stays(guard: Guard, url: str) -> None:
    """On the SDK's own classes too."""
    first = open_ai(url)
    first.label = "mine"  # type: ignore[attr-defined]
    assert guard.wrap(first).label == "mine"  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [open_ai, async_open_ai, claude, async_claude])
def test_strict_validation_stays(guard: Guard, url: str, make: Any) -> None:
    """Who has replies checked against the schema still has; the SDKs' own copies forget it."""
    assert guard.wrap(make(url, _strict_response_validation=True))._strict_response_validation is True
    assert guard.wrap(make(url))._strict_response_validation is False


def test_a_custom_http_client_is_kept(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Its hooks, headers and timeout go on working, and its connections are used."""
    seen: list[str] = []
    custom = httpx2.Client(
        timeout=3, headers={"x-custom": "yes"}, event_hooks={"request": [lambda r: seen.append(str(r.url.path))]}
    )
    with open_ai(url, http_client=custom) as first:
        ask(first)
        wrapped = guard.wrap(first)
        with guard.on_behalf_of("c1"):
            ask(wrapped)
        pool = custom._transport._pool  # type: ignore[attr-defined]  # httpcore2's
        assert len(pool.connections) == 1
    assert seen == ["/v1/chat/completions"] * 2
    assert provider.meter.calls[1].headers["x-custom"] == "yes"
    assert len(records(guard)) == 1


def test_a_proxy_is_kept(guard: Guard, provider: StandInProvider, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy from the environment, and one given by hand, carry the guarded calls."""
    nowhere = "http://provider.example"
    monkeypatch.setenv("HTTP_PROXY", url)  # the stand-in takes the absolute URL that proxies get
    with guard.wrap(open_ai(nowhere)) as client, guard.on_behalf_of("c1"):
        ask(client)
    monkeypatch.delenv("HTTP_PROXY")
    with (
        httpx2.Client(mounts={"http://": httpx2.HTTPTransport(proxy=url)}) as custom,
        guard.wrap(open_ai(nowhere, http_client=custom)) as client,
        guard.on_behalf_of("c1"),
    ):
        ask(client)
    assert len(provider.meter.calls) == 2
    same(records(guard), provider)


def test_wrapping_twice_is_wrapping_once(guard: Guard, provider: StandInProvider, url: str) -> None:
    """One record each; the later word on the customer counts, and what the SDK copies stays guarded."""
    with guard.wrap(guard.wrap(open_ai(url), customer="a")) as client:
        ask(client)
        ask(guard.wrap(client, customer="b"))
        ask(client.with_options(max_retries=1))
    found = records(guard)
    same(found, provider)
    assert [record.customer_identifier for record in found] == ["a", "b", "a"]


def test_connections_live_as_long_as_either_client(guard: Guard, provider: StandInProvider, url: str) -> None:
    """The SDKs close their connections when they are collected: that of one client must not take the other's."""
    wrapped = guard.wrap(open_ai(url), customer="c1")
    gc.collect()
    stream = wrapped.chat.completions.create(model=CHAT, messages=ASK, stream=True)
    gc.collect()
    assert list(stream)
    first = open_ai(url)
    half_read = first.chat.completions.create(model=CHAT, messages=ASK, stream=True)
    guard.wrap(first)
    gc.collect()
    assert list(half_read)
    first.close()
    wrapped.close()
    assert wrapped.is_closed()


def test_azure(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Azure's client names the model's deployment in the path; it keeps its own ways, and its calls are Azure's."""
    seen: list[str] = []
    hooks = {"request": [lambda request: seen.append(str(request.url))]}
    azure = openai.AzureOpenAI(
        azure_endpoint=url,
        api_version="2024-10-21",
        api_key="k",
        http_client=httpx2.Client(event_hooks=hooks),
    )
    with guard.wrap(azure) as client, guard.on_behalf_of("c1"):
        assert isinstance(client, openai.AzureOpenAI)
        ask(client)
    assert seen == [f"{url}/openai/deployments/{CHAT}/chat/completions?api-version=2024-10-21"]
    (record,) = records(guard)
    assert record.provider == "azure"
    assert record.cost == provider.meter.total_cost


@pytest.mark.parametrize("thing", [object(), "client", openai.OpenAI, httpx2.Client(), None, 3])
def test_what_can_not_be_wrapped(guard: Guard, thing: Any) -> None:
    """The error says what it was and what is supported."""
    with pytest.raises(ConfigurationError, match=r"AsyncOpenAI.*guard\.transport"):
        guard.wrap(thing)


def test_clients_of_unread_formats_can_not_be_wrapped(guard: Guard) -> None:
    """Bedrock and Vertex name models and frame streams in ways that are not read: no call passes uncounted."""
    client = anthropic.AnthropicVertex.__new__(anthropic.AnthropicVertex)
    with pytest.raises(ConfigurationError, match="AnthropicVertex can't be wrapped"):
        guard.wrap(client)


def test_a_transport_for_ones_own_client(guard: Guard, provider: StandInProvider, url: str) -> None:
    """An HTTP client of httpx2 with a guarded transport: raw calls are guarded, too."""
    body = {"model": CHAT, "messages": ASK}
    with httpx2.Client(transport=guard.transport(), headers={"authorization": "Bearer k"}) as http:
        with guard.on_behalf_of("c1"):
            assert http.post(f"{url}/v1/chat/completions", json=body).json()["choices"]
        guard.sync.update_customer("c1", blocked=True)
        with guard.on_behalf_of("c1"):
            assert http.post(f"{url}/v1/chat/completions", json=body).status_code == 403
    same(records(guard), provider)


async def test_an_async_transport_around_ones_own(guard: Guard, provider: StandInProvider) -> None:
    """Any transport can stand behind: here the provider itself, without a socket."""
    inner = httpx2.ASGITransport(app=provider)
    transport = guard.async_transport(inner, customer="c1")
    async with guard, httpx2.AsyncClient(transport=transport, base_url="http://provider") as http:
        client = openai.AsyncOpenAI(base_url="http://provider/v1", api_key="k", http_client=http)
        await client.embeddings.create(model=EMBEDDINGS, input="the moon")
        same(await arecords(guard), provider)
    with pytest.raises(ConfigurationError, match=r"guard\.async_transport"):
        guard.transport(httpx2.AsyncHTTPTransport())
    with pytest.raises(ConfigurationError, match="is no BaseTransport"):
        guard.transport("http://proxy")


def test_a_redirect_is_followed_and_metered_once(guard: Guard, provider: StandInProvider, url: str) -> None:
    """A 307 costs nothing and keeps the body; the call behind it is recorded."""

    class Redirecting(httpx2.HTTPTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            if request.url.path.startswith("/old"):
                return httpx2.Response(307, headers={"location": request.url.path.removeprefix("/old")})
            return super().handle_request(request)

    with (
        httpx2.Client(transport=Redirecting(), follow_redirects=True) as http,
        guard.wrap(open_ai(f"{url}/old", http_client=http)) as client,
        guard.on_behalf_of("c1"),
    ):
        ask(client)
    same(records(guard), provider)


def test_replies_that_a_transport_has_whole_are_read(guard: Guard) -> None:
    """Mocks and caches answer with a body that is there: its usage counts, hidden where not asked for."""
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": CHAT}
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    events = [
        chunk | {"choices": [{"index": 0, "delta": {"content": "moon"}}], "usage": None},
        chunk | {"choices": [], "usage": usage},
    ]
    content = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"

    def answer(request: httpx2.Request) -> httpx2.Response:
        assert json.loads(request.content)["stream_options"] == {"include_usage": True}
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=content)

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    with guard.wrap(open_ai("http://x", http_client=http), customer="c1") as client:
        chunks = list(client.chat.completions.create(model=CHAT, messages=ASK, stream=True))
    assert [choice.delta.content for chunk in chunks for choice in chunk.choices] == ["moon"]
    assert len(chunks) == 1
    (record,) = records(guard)
    assert (record.usage.input_tokens, record.usage.output_tokens) == (5, 2)


def test_forms_are_calls_too(guard: Guard) -> None:
    """Audio to write down is sent as a form: it is held for, refused and recorded as any call."""
    reply = {"text": "the moon", "usage": {"type": "tokens", "input_tokens": 14, "output_tokens": 4}}
    seen: list[bytes] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.read())
        return httpx2.Response(200, json=reply)

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    with guard.wrap(open_ai("http://x", http_client=http)) as client, guard.on_behalf_of("c1"):
        sound = io.BytesIO(b"RIFF" * 100)
        sound.name = "a.wav"
        client.audio.transcriptions.create(model="gpt-4o-transcribe", file=sound)
        assert b"RIFF" * 100 in seen[0]
        guard.sync.update_customer("c1", total_budget=0)
        with pytest.raises(openai.APIStatusError):
            client.audio.transcriptions.create(model="gpt-4o-transcribe", file=sound)
    (record,) = records(guard)
    assert (record.model, record.usage.input_tokens, record.usage.output_tokens) == ("gpt-4o-transcribe", 14, 4)
    assert len(seen) == 1


def test_nothing_is_imported_for_clients_that_nobody_wraps() -> None:
    """Neither `import respan_guard` nor a guard at work imports an SDK or an HTTP library."""
    script = textwrap.dedent(
        """
        import sys
        from respan_guard import Guard, Usage
        guard = Guard("memory://")
        guard.sync.record(Usage(cost=1), "c1")
        import respan_guard.clients
        try:
            guard.wrap(object())
        except ValueError:
            pass
        print([name for name in ("openai", "anthropic", "httpx", "httpx2") if name in sys.modules])
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_sdks_read_what_passes(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Replies reach the caller byte for byte."""
    provider.script(*[Answer(text="384,400 km", input_tokens=9, output_tokens=4)] * 2)
    with claude(url) as bare, guard.wrap(bare) as client:
        plain, guarded = (
            c.messages.with_raw_response.create(model=CLAUDE, max_tokens=9, messages=ASK) for c in (bare, client)
        )
    first, second = plain.parse(), guarded.parse()
    assert first.content == second.content
    assert first.usage == second.usage
    assert set(plain.headers) == set(guarded.headers)
