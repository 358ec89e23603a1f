"""The stand-in provider and the providers' own SDKs, over a socket: they parse it, and the meter agrees with them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from decimal import Decimal

import anthropic
import openai
import pytest
from google import genai
from google.genai import types

from respan_guard.testing import StandInProvider
from respan_guard.testing.provider import Answer, MeteredCall

CHAT = "gpt-4o-mini"
CLAUDE = "claude-haiku-4-5"
GEMINI = "gemini-2.5-flash"


@pytest.fixture
def provider() -> StandInProvider:
    """A provider that no one has asked anything yet."""
    return StandInProvider()


@pytest.fixture
def url(provider: StandInProvider) -> Iterator[str]:
    """Where it listens."""
    with provider.serve() as root:
        yield root


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-test", max_retries=0) as found:
        yield found


@pytest.fixture
async def async_client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client for event loops."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-test", max_retries=0) as found:
        yield found


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    """Anthropic's client."""
    with anthropic.Anthropic(base_url=url, api_key="sk-test", max_retries=0) as found:
        yield found


@pytest.fixture
def gemini(url: str) -> Iterator[genai.Client]:
    """Google's client."""
    found = genai.Client(api_key="test", http_options=types.HttpOptions(base_url=url))
    yield found
    found.close()


def only(provider: StandInProvider) -> MeteredCall:
    """The one call so far, which was answered to the end."""
    (call,) = provider.meter.calls
    assert call.completed
    assert call.status == 200
    return call


def ask(text: str = "How far is the moon?") -> openai.types.chat.ChatCompletionUserMessageParam:
    """A message."""
    return {"role": "user", "content": text}


# -- OpenAI ------------------------------------------------------------------------------------------------


def test_chat(provider: StandInProvider, client: openai.OpenAI) -> None:
    """A chat completion has text, a finish reason, and the very counts and id of the meter."""
    reply = client.chat.completions.create(model=CHAT, messages=[ask()])
    call = only(provider)
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (call.input_tokens, call.output_tokens)
    assert reply.usage.total_tokens == call.input_tokens + call.output_tokens
    assert reply.id == call.response_id
    assert (call.endpoint, call.model, call.stream) == ("chat.completions", CHAT, False)
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"


def test_chat_counts_are_ours_to_script(provider: StandInProvider, client: openai.OpenAI) -> None:
    """Scripted counts arrive kind by kind, and their cost is that of the price list, to the last digit."""
    provider.script(
        Answer(input_tokens=1000, output_tokens=500, cache_read_tokens=400, reasoning_tokens=100, text="384,400 km")
    )
    reply = client.chat.completions.create(model=CHAT, messages=[ask()])
    call = only(provider)
    usage = reply.usage
    assert reply.choices[0].message.content == "384,400 km"
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.completion_tokens_details is not None
    assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (1000, 400)
    assert (usage.completion_tokens, usage.completion_tokens_details.reasoning_tokens) == (500, 100)
    counted = (call.input_tokens, call.cache_read_tokens, call.output_tokens, call.reasoning_tokens)
    assert counted == (1000, 400, 500, 100)
    # USD 0.15 a million for input, 0.075 from the cache, 0.60 for output, reasoning included.
    assert call.cost == provider.meter.total_cost == Decimal("0.00042")


def test_chat_stream_with_usage(provider: StandInProvider, client: openai.OpenAI) -> None:
    """A stream that asks for usage ends with a chunk of it that has no choices; all chunks have one id."""
    stream = client.chat.completions.create(
        model=CHAT, messages=[ask()], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    call = only(provider)
    assert call.stream
    assert {chunk.id for chunk in chunks} == {call.response_id}
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    told = (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens)
    assert told == (call.input_tokens, call.output_tokens)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_chat_stream_without_usage(provider: StandInProvider, client: openai.OpenAI) -> None:
    """A stream that doesn't ask for usage tells none, though the meter has it."""
    chunks = list(client.chat.completions.create(model=CHAT, messages=[ask()], stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert only(provider).output_tokens > 0


def test_several_choices_and_a_cap(provider: StandInProvider, client: openai.OpenAI) -> None:
    """Each of `n` answers is as long as the cap lets it be, says so, and is charged."""
    reply = client.chat.completions.create(model=CHAT, messages=[ask()], n=3, max_completion_tokens=5)
    assert [choice.finish_reason for choice in reply.choices] == ["length"] * 3
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert only(provider).output_tokens == 15


def test_responses(provider: StandInProvider, client: openai.OpenAI) -> None:
    """A response is completed, has text, and the meter's counts."""
    reply = client.responses.create(model=CHAT, input="How far is the moon?")
    call = only(provider)
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (call.input_tokens, call.output_tokens)
    assert (reply.id, reply.status, call.endpoint) == (call.response_id, "completed", "responses")
    assert reply.output_text


def test_responses_stream(provider: StandInProvider, client: openai.OpenAI) -> None:
    """The SDK puts a stream's deltas together to the text that its last event holds, with the meter's counts."""
    with client.responses.stream(model=CHAT, input="How far is the moon?") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        reply = stream.get_final_response()
    call = only(provider)
    assert "".join(deltas) == reply.output_text
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (call.input_tokens, call.output_tokens)
    assert call.stream


def test_responses_cut_short(provider: StandInProvider, client: openai.OpenAI) -> None:
    """A response that meets its cap is incomplete, and says why."""
    reply = client.responses.create(model=CHAT, input="How far is the moon?", max_output_tokens=16)
    assert reply.status == "incomplete"
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert only(provider).output_tokens == 16


def test_embeddings(provider: StandInProvider, client: openai.OpenAI) -> None:
    """Each text gets a vector, in the packed form that the SDK asks for; there is no output to charge."""
    reply = client.embeddings.create(model="text-embedding-3-small", input=["the moon", "the sun"])
    call = only(provider)
    assert [item.index for item in reply.data] == [0, 1]
    assert all(item.embedding and isinstance(item.embedding[0], float) for item in reply.data)
    assert (reply.usage.prompt_tokens, call.output_tokens) == (call.input_tokens, 0)
    assert call.endpoint == "embeddings"
    assert call.cost is not None
    assert call.cost > 0


def test_legacy_completions(provider: StandInProvider, client: openai.OpenAI) -> None:
    """The old endpoint answers with text."""
    reply = client.completions.create(model="gpt-3.5-turbo-instruct", prompt="The moon is", max_tokens=4)
    assert reply.usage is not None
    assert reply.usage.completion_tokens == only(provider).output_tokens == 4
    assert reply.choices[0].text


def test_models(provider: StandInProvider, client: openai.OpenAI) -> None:
    """Models can be listed, which is no call to be charged."""
    assert CHAT in [model.id for model in client.models.list()]
    assert provider.meter.calls == []


async def test_async_chat_and_stream(provider: StandInProvider, async_client: openai.AsyncOpenAI) -> None:
    """The async client reads the same answers."""
    reply = await async_client.chat.completions.create(model=CHAT, messages=[ask()])
    stream = await async_client.chat.completions.create(
        model=CHAT, messages=[ask()], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    whole, streamed = provider.meter.calls
    assert whole.completed
    assert streamed.completed
    assert reply.usage is not None
    assert chunks[-1].usage is not None
    assert reply.usage.prompt_tokens == whole.input_tokens
    assert chunks[-1].usage.completion_tokens == streamed.output_tokens
    assert reply.choices[0].message.content == "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert whole.response_id != streamed.response_id


async def test_async_responses_and_embeddings(provider: StandInProvider, async_client: openai.AsyncOpenAI) -> None:
    """The other endpoints serve the async client too."""
    reply = await async_client.responses.create(model=CHAT, input="How far is the moon?")
    vectors = await async_client.embeddings.create(model="text-embedding-3-small", input="the moon")
    first, second = provider.meter.calls
    assert reply.usage is not None
    assert reply.usage.total_tokens == first.input_tokens + first.output_tokens
    assert vectors.usage.total_tokens == second.input_tokens


def test_unknown_parameters_are_refused() -> None:
    """A strict provider refuses what OpenAI doesn't know, in OpenAI's words, and charges nothing."""
    provider = StandInProvider(strict=True)
    with (
        provider.serve() as root,
        openai.OpenAI(base_url=f"{root}/v1", api_key="sk-test", max_retries=0) as strict,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        strict.chat.completions.create(model=CHAT, messages=[ask()], extra_body={"customer_params": {}})
    assert "Unknown parameter: 'customer_params'." in caught.value.message
    assert caught.value.param == "customer_params"
    (call,) = provider.meter.calls
    assert (call.status, call.input_tokens, call.cost) == (400, 0, Decimal(0))


def test_wrong_key_is_refused() -> None:
    """A provider with a key lets no other in."""
    provider = StandInProvider(api_key="sk-right")
    with provider.serve() as root:
        for key, error in (("sk-right", None), ("sk-wrong", openai.AuthenticationError)):
            with openai.OpenAI(base_url=f"{root}/v1", api_key=key, max_retries=0) as client:
                if error is None:
                    client.chat.completions.create(model=CHAT, messages=[ask()])
                else:
                    with pytest.raises(error):
                        client.chat.completions.create(model=CHAT, messages=[ask()])
    assert [call.status for call in provider.meter.calls if call.response_id] == [200]


# -- Anthropic ---------------------------------------------------------------------------------------------


def test_messages(provider: StandInProvider, claude: anthropic.Anthropic) -> None:
    """A message has text and the meter's counts."""
    reply = claude.messages.create(
        model=CLAUDE, max_tokens=100, messages=[{"role": "user", "content": "How far is the moon?"}]
    )
    call = only(provider)
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (call.input_tokens, call.output_tokens)
    assert (reply.id, reply.stop_reason, call.endpoint) == (call.response_id, "end_turn", "messages")
    assert reply.content[0].type == "text"


def test_messages_count_the_cache_apart(provider: StandInProvider, claude: anthropic.Anthropic) -> None:
    """On the wire the cache's tokens are no part of `input_tokens`; in the meter they are. Whole and streamed."""
    answer = Answer(
        input_tokens=1000, output_tokens=50, cache_read_tokens=300, cache_write_tokens=200, cache_write_1h_tokens=150
    )
    provider.script(answer, answer)
    message: anthropic.types.MessageParam = {"role": "user", "content": "How far is the moon?"}
    whole = claude.messages.create(model=CLAUDE, max_tokens=100, messages=[message])
    with claude.messages.stream(model=CLAUDE, max_tokens=100, messages=[message]) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert text
    for usage in (whole.usage, streamed.usage):
        assert (usage.input_tokens, usage.output_tokens) == (500, 50)
        assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (300, 200)
        assert usage.cache_creation is not None
        assert usage.cache_creation.ephemeral_1h_input_tokens == 150
        assert usage.cache_creation.ephemeral_5m_input_tokens == 50
    # USD a million: input 1, read 0.10, written for 5 minutes 1.25 and for an hour 2, output 5.
    cost = Decimal("0.0005") + Decimal("0.00003") + Decimal("0.0000625") + Decimal("0.0003") + Decimal("0.00025")
    for call in provider.meter.calls:
        assert (call.input_tokens, call.cache_read_tokens, call.cache_write_tokens) == (1000, 300, 200)
        assert (call.cache_write_1h_tokens, call.output_tokens, call.completed) == (150, 50, True)
        assert call.cost == cost


# -- Google ------------------------------------------------------------------------------------------------


def test_generate_content(provider: StandInProvider, gemini: genai.Client) -> None:
    """An answer has text and the meter's counts, its thoughts apart."""
    provider.script(Answer(input_tokens=1000, output_tokens=100, reasoning_tokens=60, cache_read_tokens=400))
    reply = gemini.models.generate_content(model=GEMINI, contents="How far is the moon?")
    call = only(provider)
    usage = reply.usage_metadata
    assert usage is not None
    assert (usage.prompt_token_count, usage.cached_content_token_count) == (1000, 400)
    assert (usage.candidates_token_count, usage.thoughts_token_count) == (40, 60)
    assert (call.input_tokens, call.output_tokens, call.reasoning_tokens) == (1000, 100, 60)
    assert (reply.response_id, call.endpoint, call.model) == (call.response_id, "generateContent", GEMINI)
    assert reply.text


def test_generate_content_stream(provider: StandInProvider, gemini: genai.Client) -> None:
    """The counts of a stream grow, and its last chunk has the meter's."""
    config = types.GenerateContentConfig(max_output_tokens=20)
    chunks = list(gemini.models.generate_content_stream(model=GEMINI, contents="How far is the moon?", config=config))
    call = only(provider)
    counts = [chunk.usage_metadata.candidates_token_count or 0 for chunk in chunks if chunk.usage_metadata]
    assert len(chunks) > 1
    assert counts == sorted(counts)
    assert counts[-1] == call.output_tokens == 20
    assert chunks[-1].candidates is not None
    assert chunks[-1].candidates[0].finish_reason == types.FinishReason.MAX_TOKENS
    assert {chunk.response_id for chunk in chunks} == {call.response_id}
    assert call.stream
