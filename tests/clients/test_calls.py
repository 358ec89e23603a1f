"""Every kind of call of the real SDKs, whole and streamed: the ledger says what the provider's meter says."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import httpx2
import openai
import pytest

from respan_guard import Guard
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
    holds,
    open_ai,
    records,
    same,
)


def chat(client: Any) -> Any:
    """A chat completion."""
    return client.chat.completions.create(model=CHAT, messages=ASK, max_tokens=50)


def legacy(client: Any) -> Any:
    """A legacy completion."""
    return client.completions.create(model="gpt-3.5-turbo-instruct", prompt="The moon is", max_tokens=4)


def legacy_stream(client: Any) -> Any:
    """A legacy completion, streamed."""
    return client.completions.create(model="gpt-3.5-turbo-instruct", prompt="The moon is", max_tokens=4, stream=True)


def responses(client: Any) -> Any:
    """A response."""
    return client.responses.create(model=CHAT, input="How far is the moon?")


def embeddings(client: Any) -> Any:
    """Two embeddings."""
    return client.embeddings.create(model=EMBEDDINGS, input=["the moon", "the sun"])


def chat_stream(client: Any) -> Any:
    """A chat's stream."""
    return client.chat.completions.create(model=CHAT, messages=ASK, stream=True)


def chat_stream_with_usage(client: Any) -> Any:
    """A chat's stream whose usage is asked for."""
    return client.chat.completions.create(model=CHAT, messages=ASK, stream=True, stream_options={"include_usage": True})


def responses_stream(client: Any) -> Any:
    """A response's events."""
    return client.responses.create(model=CHAT, input="How far is the moon?", stream=True)


def raw(client: Any) -> Any:
    """A chat completion, as the SDK's raw response."""
    return client.chat.completions.with_raw_response.create(model=CHAT, messages=ASK)


def messages(client: Any) -> Any:
    """A message."""
    return client.messages.create(model=CLAUDE, max_tokens=100, messages=ASK)


def messages_stream(client: Any) -> Any:
    """A message's events."""
    return client.messages.create(model=CLAUDE, max_tokens=100, messages=ASK, stream=True)


OPENAI_CALLS = [chat, legacy, responses, embeddings, raw, chat_stream, chat_stream_with_usage, responses_stream]
OPENAI_CALLS += [legacy_stream]
CLAUDE_CALLS = [messages, messages_stream]
ANSWER = Answer(input_tokens=1000, output_tokens=60, cache_read_tokens=400)


def drained(reply: Any) -> Any:
    """A stream's events; anything else as it is."""
    return list(reply) if type(reply).__name__ == "Stream" else reply


async def adrained(reply: Any) -> Any:
    """A stream's events; anything else as it is."""
    reply = await reply
    return [event async for event in reply] if type(reply).__name__ == "AsyncStream" else reply


@pytest.mark.parametrize("call", OPENAI_CALLS, ids=lambda call: call.__name__)
def test_openai_calls_are_metered(guard: Guard, provider: StandInProvider, url: str, call: Any) -> None:
    """Each endpoint of OpenAI's client is recorded once, as charged, and leaves no hold."""
    if call is not embeddings:
        provider.script(ANSWER)
    with guard.wrap(open_ai(url)) as client, guard.on_behalf_of("c1"):
        drained(call(client))
    found = records(guard)
    same(found, provider)
    assert [record.customer_identifier for record in found] == ["c1"]
    assert guard.sync.status("c1").total_requests == 1
    assert guard.sync.run(holds(guard, "c1")) == 0


@pytest.mark.parametrize("call", OPENAI_CALLS, ids=lambda call: call.__name__)
async def test_async_openai_calls_are_metered(guard: Guard, provider: StandInProvider, url: str, call: Any) -> None:
    """The same on an event loop, on which the guard is open."""
    async with guard:
        async with guard.wrap(async_open_ai(url)) as client:
            with guard.on_behalf_of("c1"):
                await adrained(call(client))
        same(await arecords(guard), provider)
        assert await holds(guard, "c1") == 0


@pytest.mark.parametrize("call", CLAUDE_CALLS, ids=lambda call: call.__name__)
def test_anthropic_calls_are_metered(guard: Guard, provider: StandInProvider, url: str, call: Any) -> None:
    """Anthropic's client, whose counts leave the cache out."""
    provider.script(Answer(input_tokens=1000, output_tokens=50, cache_read_tokens=300, cache_write_tokens=200))
    with guard.wrap(claude(url)) as client, guard.on_behalf_of("c1"):
        drained(call(client))
    same(records(guard), provider)
    assert guard.sync.run(holds(guard, "c1")) == 0


@pytest.mark.parametrize("call", CLAUDE_CALLS, ids=lambda call: call.__name__)
async def test_async_anthropic_calls_are_metered(guard: Guard, provider: StandInProvider, url: str, call: Any) -> None:
    """The same on an event loop; the guard was never opened, so storage is another thread's."""
    async with guard.wrap(async_claude(url)) as client:
        with guard.on_behalf_of("c1"):
            await adrained(call(client))
    same(await arecords(guard), provider)


def test_the_sdks_own_stream_helpers_are_metered(guard: Guard, provider: StandInProvider, url: str) -> None:
    """`responses.stream` and `messages.stream` put streams together; each is one record."""
    with guard.wrap(open_ai(url)) as client, guard.wrap(claude(url)) as other, guard.on_behalf_of("c1"):
        with client.responses.stream(model=CHAT, input="hello") as stream:
            assert stream.get_final_response().output_text
        with other.messages.stream(model=CLAUDE, max_tokens=9, messages=ASK) as told:
            assert told.get_final_message().usage.output_tokens
        with client.chat.completions.stream(model=CHAT, messages=ASK) as chunks:
            assert chunks.get_final_completion().choices[0].message.content
    same(records(guard), provider)
    assert len(provider.meter.charged) == 3


def test_calls_that_cost_nothing_pass(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Lists of models and counted tokens are no calls: nothing is asked, nothing recorded, for a blocked one too."""
    guard.sync.update_customer("c1", blocked=True)
    with guard.wrap(open_ai(url)) as client, guard.wrap(claude(url)) as other, guard.on_behalf_of("c1"):
        assert client.models.list().data
        assert other.messages.count_tokens(model=CLAUDE, messages=ASK).input_tokens
    assert records(guard) == []


def test_compaction_is_a_call(guard: Guard) -> None:
    """`responses.compact` is priced by the model asked for and recorded; one over its budget is not sent."""
    usage = {"input_tokens": 100_000, "output_tokens": 5_000, "total_tokens": 105_000}
    reply = {"id": "resp_001234567890abcdef1234", "object": "response.compaction", "created_at": 1, "output": []}
    http = httpx2.Client(transport=httpx2.MockTransport(lambda _: httpx2.Response(200, json={**reply, "usage": usage})))
    client = guard.wrap(openai.OpenAI(api_key="k", base_url="http://p/v1", http_client=http, max_retries=0))
    with guard.on_behalf_of("c1"):
        client.responses.compact(model="gpt-4o", input="x" * 10_000)
        guard.sync.update_customer("c1", total_budget="0.1")
        with pytest.raises(openai.APIStatusError):
            client.responses.compact(model="gpt-4o", input="x" * 10_000)
    [record] = records(guard)
    assert (record.kind, record.model, record.cost) == ("usage", "gpt-4o", Decimal("0.3"))


# -- streams without usage -----------------------------------------------------------------------------------


def test_who_did_not_ask_for_usage_does_not_see_it(guard: Guard, provider: StandInProvider, url: str) -> None:
    """The wrapper asks for a stream's usage, and the caller gets the chunks that the bare client gives."""
    fixed = Answer(text="384,400 km, more or less", input_tokens=20, output_tokens=9)
    provider.script(fixed, fixed)
    with open_ai(url) as bare, guard.wrap(bare) as client:
        plain, guarded = list(chat_stream(bare)), list(chat_stream(client))
    assert len(plain) == len(guarded) > 2
    assert [chunk.choices for chunk in guarded] == [chunk.choices for chunk in plain]
    assert all(chunk.usage is None for chunk in guarded)
    assert [record.usage.output_tokens for record in records(guard)] == [9]


@pytest.mark.parametrize("fault", ["gzip", "one-byte-chunks"])
def test_a_stream_is_edited_however_it_is_cut(guard: Guard, provider: StandInProvider, url: str, fault: Any) -> None:
    """Byte by byte or compressed against our wish: all chunks but that of usage arrive, and the call is recorded."""
    provider.fault(fault)
    with guard.wrap(open_ai(url)) as client:
        chunks = list(chat_stream(client))
    assert chunks[-1].choices[0].finish_reason == "stop"
    same(records(guard), provider)


def test_usage_asked_for_stays_visible(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Who asks for usage gets its chunk, and so does everybody with include_usage=False, for servers without it."""
    with guard.wrap(open_ai(url)) as client:
        chunks = list(chat_stream_with_usage(client))
    assert chunks[-1].usage is not None
    with guard.wrap(open_ai(url), include_usage=False) as client:
        chunks = list(chat_stream(client))
    assert all(chunk.usage is None for chunk in chunks)
    asked, not_asked = records(guard)
    assert asked.kind == "usage"
    assert (not_asked.kind, not_asked.usage.estimated) == ("presumed", True)


def test_no_chunk_waits_for_the_next(guard: Guard, provider: StandInProvider, url: str) -> None:
    """Chunks arrive while the provider still holds back the rest of the stream."""
    from respan_guard.testing.provider import Gate

    gate = Gate()
    provider.script(Answer(text="one two three four", gate=gate))
    with guard.wrap(open_ai(url)) as client:
        stream = chat_stream(client)
        seen = [next(stream)]
        for _ in range(3):
            gate.release()
            seen.append(next(stream))  # would wait for ever if chunks were kept back
        gate.open()
        seen.extend(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in seen) == "one two three four"
    same(records(guard), provider)


# -- customers -----------------------------------------------------------------------------------------------


def test_a_call_for_nobody_is_recorded_as_nobodys(
    guard: Guard, provider: StandInProvider, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No customer: the call is made and recorded without one, and the log says so once."""
    with guard.wrap(open_ai(url)) as client:
        chat(client)
        chat(client)
    found = records(guard)
    same(found, provider)
    assert [record.customer_identifier for record in found] == ["", ""]
    assert sum("no known customer" in record.message for record in caplog.records) == 1


def test_a_client_may_be_one_customers(guard: Guard, provider: StandInProvider, url: str) -> None:
    """wrap(customer=...) wins over on_behalf_of."""
    with guard.wrap(open_ai(url), customer=7) as client, guard.on_behalf_of("c1"):
        chat(client)
    assert [record.customer_identifier for record in records(guard)] == ["7"]


def test_off_means_off(make_guard: Any, provider: StandInProvider, url: str) -> None:
    """With mode="off" the client is as bare as before."""
    off = make_guard(mode="off", default_limits={"total_budget": 0})
    with off.wrap(open_ai(url)) as client, off.on_behalf_of("c1"):
        assert chat(client).choices
    assert records(off) == []


def test_shadow_refuses_nobody(make_guard: Any, provider: StandInProvider, url: str) -> None:
    """With mode="shadow" a call over the budget is made and recorded."""
    shadow = make_guard(mode="shadow", default_limits={"total_budget": 0})
    with shadow.wrap(open_ai(url)) as client, shadow.on_behalf_of("c1"):
        chat(client)
    same(records(shadow), provider)
    assert isinstance(client, openai.OpenAI)
