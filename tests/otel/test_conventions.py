"""The table of families, and reading one span: whose names, whose way to count, what is known and what is not."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from respan_guard import Usage
from respan_guard.otel.conventions import FAMILIES, UNKNOWN, family_of, is_call
from respan_guard.otel.reading import Reading, model_key, read

from .support import LANGCHAIN, NATIVE, OFFICIAL, OPENINFERENCE, call

RESPAN = "respan_instrumentation_anthropic._instrumentation"


def reading(attributes: dict[str, Any], scope: str = OFFICIAL, status: str = "UNSET", *more: Any) -> Reading:
    """Read a span of that scope."""
    return read(attributes, family_of(scope, attributes), status, *more)


def usage(attributes: dict[str, Any], scope: str = OFFICIAL) -> Usage:
    """What it says was used."""
    return reading(attributes, scope).usage


@pytest.mark.parametrize(
    ("scope", "name"),
    [
        ("opentelemetry.instrumentation.openai.v1", "Traceloop: OpenAI"),
        ("opentelemetry.instrumentation.openai_v2", "OpenTelemetry: openai-v2"),
        ("opentelemetry.instrumentation.openai_agents", "Traceloop: openai-agents"),
        ("opentelemetry.instrumentation.genai.langchain", "OpenTelemetry: LangChain"),
        ("opentelemetry.instrumentation.genai.anthropic", "OpenTelemetry: OpenAI, Anthropic"),
        ("openinference.instrumentation.openai", "OpenInference: SDKs"),
        ("openinference.instrumentation.openai_agents", "OpenInference: openai-agents"),
        ("openinference.instrumentation.crewai", "OpenInference: frameworks"),
        ("com.anthropic.sdk.python.vertex", "Anthropic's own spans"),
        ("litellm", "LiteLLM's callback"),
        ("litellm_of_mine.tracing", "any other"),
        ("opentelemetry.instrumentation.asgi", "any other"),
        ("my.app", "any other"),
        ("", "any other"),
    ],
)
def test_families_by_scope(scope: str, name: str) -> None:
    """The longest name that fits counts, whole words only; what is in no row is any other's."""
    assert family_of(scope).name == name


def test_rows_are_whole() -> None:
    """No two rows have a scope in common, and each is found by its own scopes."""
    scopes = [scope for family in FAMILIES for scope in family.scopes]
    assert len(scopes) == len(set(scopes))
    for family in FAMILIES:
        assert all(family_of(scope) is family for scope in family.scopes), family.name
    assert family_of("x" * 10) is UNKNOWN


@pytest.mark.parametrize(
    ("attributes", "answer"),
    [
        ({"gen_ai.operation.name": "chat"}, True),
        ({"gen_ai.operation.name": "acompletion"}, True),  # LiteLLM's callback, on an event loop
        ({"gen_ai.operation.name": "invoke_agent", "llm.request.type": "chat"}, False),
        ({"gen_ai.operation.name": "invoke_agent", "openinference.span.kind": "LLM"}, False),
        ({"gen_ai.operation.name": "search_memory"}, False),
        ({"gen_ai.operation.name": "of_the_future", "openinference.span.kind": "LLM"}, True),
        ({"openinference.span.kind": "CHAIN", "llm.request.type": "chat"}, False),
        ({"openinference.span.kind": "EMBEDDING"}, True),
        ({"langfuse.observation.type": "span", "llm.request.type": "chat"}, False),
        ({"langfuse.observation.type": "generation"}, True),
        ({"llm.request.type": "rerank"}, True),
        ({"llm.request.type": "unknown"}, False),
        ({"gen_ai.usage.input_tokens": 5, "gen_ai.system": "openai"}, False),
        ({"gen_ai.operation.name": ["chat"]}, False),
        ({}, False),
    ],
)
def test_which_spans_are_calls(attributes: dict[str, Any], answer: bool) -> None:
    """Operation, then OpenInference's kind, Langfuse's type, request type; tokens alone make no call."""
    assert is_call(attributes) is answer


def test_exclusive_counts_become_inclusive() -> None:
    """By the table where a family counts so, else where cached tokens would be more than all; never guessed."""
    names = {"gen_ai.usage.cache_read.input_tokens": 600, "gen_ai.usage.cache_write.input_tokens": 300}
    small = call(gen_ai__usage__input_tokens=100) | names
    large = call(gen_ai__usage__input_tokens=5000) | names
    assert [usage(small, scope).input_tokens for scope in (OFFICIAL, RESPAN)] == [1000, 1000]
    assert [usage(large, scope).input_tokens for scope in (OFFICIAL, RESPAN)] == [5000, 5900]


def test_thoughts_are_found_by_the_total() -> None:
    """Traceloop's Gemini output leaves thoughts out; the total has them."""
    attributes = call(gen_ai__usage__output_tokens=150, gen_ai__usage__total_tokens=1200)
    found = usage(attributes, "opentelemetry.instrumentation.google_generativeai")
    assert (found.output_tokens, found.reasoning_tokens) == (200, 50)
    assert usage(attributes).output_tokens == 150


@pytest.mark.parametrize(
    "attributes",
    [
        call(gen_ai__usage__input_tokens=0, gen_ai__usage__output_tokens=0),
        call(gen_ai__usage__input_tokens=0),  # LangChain over Anthropic's streams
        call(gen_ai__usage__input_tokens=None),
        call(gen_ai__usage__output_tokens=None),
        call(gen_ai__usage__input_tokens=-5),
        call(gen_ai__provider__name="anthropic", gen_ai__usage__output_tokens=1, gen_ai__response__finish_reasons=None),
    ],
)
def test_what_is_no_usage(attributes: dict[str, Any]) -> None:
    """Zeros, missing or impossible counts, and the placeholder that a stream of Anthropic's begins with."""
    found = reading(attributes)
    assert not found.complete
    assert found.made


def test_one_token_can_be_all() -> None:
    """An answer of one token is one, if the span says that it finished."""
    assert reading(call(gen_ai__provider__name="anthropic", gen_ai__usage__output_tokens=1)).complete


def test_sums_are_left_alone() -> None:
    """Neither aggregated usage nor raw details are taken for the call's own."""
    attributes = {n: v for n, v in call().items() if "usage" not in n}
    attributes |= {"gen_ai.aggregated_usage.input_tokens": 9, "gen_ai.usage.details.input_tokens": 9}
    assert not reading(attributes).complete


def test_usage_in_json() -> None:
    """Logfire's raw usage, Langfuse's details and LiteLLM's Python, each by its provider's own rules."""
    anthropic = (
        '{"input_tokens":100,"cache_read_input_tokens":600,"cache_creation_input_tokens":300,"output_tokens":200,'
    )
    anthropic += '"cache_creation":{"ephemeral_1h_input_tokens":100,"ephemeral_5m_input_tokens":200}}'
    found = usage(call(gen_ai__usage__raw=anthropic, gen_ai__usage__cache_read__input_tokens=None), "logfire.anthropic")
    assert (found.input_tokens, found.cache_read_tokens, found.cache_write_1h_tokens) == (1000, 600, 100)
    langfuse = {"langfuse.observation.type": "generation", "langfuse.observation.model.name": "gpt-4o"}
    langfuse["langfuse.observation.usage_details"] = '{"input": 1000, "output": 200, "input_cached_tokens": 400}'
    found = usage(langfuse, "langfuse-sdk")
    assert (found.input_tokens, found.output_tokens, found.cache_read_tokens) == (1000, 200, 400)
    python = "{'prompt_tokens': 1000, 'completion_tokens': 200, 'prompt_tokens_details': {'cached_tokens': 400}}"
    found = usage({"gen_ai.operation.name": "chat", "metadata.usage_object": python}, "litellm")
    assert (found.input_tokens, found.output_tokens, found.cache_read_tokens) == (1000, 200, 400)


def test_parts_that_are_more_than_their_whole_are_not_believed() -> None:
    """No reasoning beyond the output, no audio beyond the input."""
    found = usage(call(gen_ai__usage__reasoning__output_tokens=201, gen_ai__usage__audio__input_tokens=1001))
    assert (found.reasoning_tokens, found.input_audio_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("attributes", "provider"),
    [
        ({"gen_ai.provider.name": "gemini"}, "google"),
        ({"gen_ai.provider.name": "gcp.gen_ai"}, "google"),
        ({"gen_ai.provider.name": "azure.ai.openai"}, "azure"),
        ({"gen_ai.system": "OpenAI"}, "openai"),
        ({"gen_ai.system": "Anthropic"}, "anthropic"),
        ({"gen_ai.provider.name": "x_ai"}, "x-ai"),
        ({"gen_ai.provider.name": "langchain", "gen_ai.request.model": "claude-sonnet-4-6"}, "anthropic"),
        ({"llm.provider": "api.openai.com", "llm.system": "openai"}, "openai"),
        ({"gen_ai.request.model": "gemini-2.5-flash"}, "google"),
        ({"gen_ai.request.model": "my-own"}, None),
    ],
)
def test_providers_as_the_other_doors_call_them(attributes: dict[str, Any], provider: str | None) -> None:
    """One call has one id whichever door saw it, so its provider has one name."""
    assert usage({"gen_ai.operation.name": "chat"} | attributes).provider == provider


def test_models() -> None:
    """What was asked for, as the provider got it; else what answered."""
    assert usage(call(gen_ai__request__model="openai/gpt-4o")).model == "gpt-4o"
    assert usage(call(gen_ai__request__model="models/gemini-2.5-flash")).model == "gemini-2.5-flash"
    assert usage(call(gen_ai__request__model="meta-llama/llama-4")).model == "meta-llama/llama-4"
    assert usage(call(gen_ai__request__model=None)).model == "gpt-4o-2024-08-06"
    asked = {"llm.invocation_parameters": '{"model": "gpt-4o"}', "llm.model_name": "gpt-4o-2024-08-06"}
    assert usage({"openinference.span.kind": "LLM"} | asked, OPENINFERENCE).model == "gpt-4o"
    names = ("gpt-4o", "openai/gpt-4o-2024-08-06", "GPT-4o", "models/gpt-4o", "gpt-4o-20240806")
    assert {model_key(name) for name in names} == {"gpt-4o"}


def test_ids_in_replies() -> None:
    """OpenInference has the id in the reply's text; what a model wrote is no reply, and chooses no id."""
    reply = {"output.value": '{"id":"chatcmpl-0123456789abcdef","choices":[]}', "output.mime_type": "application/json"}
    assert usage({"openinference.span.kind": "LLM"} | reply, OPENINFERENCE).response_id == "chatcmpl-0123456789abcdef"
    assert usage({"openinference.span.kind": "LLM"} | reply, LANGCHAIN).response_id is None
    plain = reply | {"output.mime_type": "text/plain"}
    assert usage({"openinference.span.kind": "LLM"} | plain, OPENINFERENCE).response_id is None
    made_up = {"gen_ai.response.id": "chatcmpl-1ddec816-327f-43a2-a268-fae449bb367b", "gen_ai.system": "anthropic"}
    assert usage({"gen_ai.operation.name": "chat"} | made_up, "litellm").response_id is None


@pytest.mark.parametrize(
    ("more", "description", "kinds", "made"),
    [
        ({"error.type": "openai.RateLimitError"}, None, [], False),
        ({"error.type": "InternalServerError"}, None, [], False),
        ({"error.type": "APIConnectionError"}, None, [], False),
        ({}, "Error code: 503 - overloaded", [], False),
        ({}, None, ["anthropic.OverloadedError"], False),
        ({"http.response.status_code": 429}, None, [], False),
        ({"error.type": "ValidationError"}, "1 validation error for Answer", [], True),
        ({"error.type": "GeneratorExit"}, None, [], True),
        ({"error.type": "APITimeoutError"}, None, [], True),
        ({}, None, [], True),
        ({"error.type": "openai.RateLimitError", "gen_ai.response.id": "chatcmpl-0123456789abcdef"}, None, [], True),
        ({"output.value": "some words of an answer"}, "APIError: The server had an error", ["openai.APIError"], True),
        ({"gen_ai.usage.output_tokens": 50}, None, ["openai.APIError"], True),
        ({"output.value": '{"choices": []}'}, None, ["openai.APIError"], False),
        ({"output.value": "overloaded", "http.response.status_code": 529}, None, ["openai.APIError"], False),
    ],
)
def test_an_error_may_have_been_paid_for(
    more: dict[str, Any], description: str | None, kinds: list[str], made: bool
) -> None:
    """What the provider refused, or never got, was not made; a reply that began, came late or was no JSON was."""
    attributes = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "gpt-4o"} | more
    found = reading(attributes, OFFICIAL, "ERROR", description, kinds)
    assert (found.made, found.complete) == (made, False)


def test_costs_of_spans() -> None:
    """Floats mean what they show; what is no cost is none."""
    assert usage(call(operation__cost=0.1)).cost == Decimal("0.1")
    for value in (-1.0, float("nan"), "free", True, 1e300, 10**5000):
        assert usage(call(operation__cost=value)).cost is None
        assert usage(call(operation__cost=value, llm__cost__total=0.1)).cost == Decimal("0.1")


def test_nonsense_hides_no_other_name() -> None:
    """A count that is none is passed over for the next name that has one."""
    found = reading(call(gen_ai__usage__input_tokens="n/a", llm__token_count__prompt=1000))
    assert (found.complete, found.usage.input_tokens) == (True, 1000)


def test_anthropics_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hour share of cache writes is told by Anthropic's own spans only."""
    attributes = call(gen_ai__usage__cache_write__input_tokens=300) | {
        "anthropic.usage.cache_creation.ephemeral_1h_input_tokens": 100,
        "gen_ai.provider.name": "anthropic",
    }
    assert usage(attributes, NATIVE).cache_write_1h_tokens == 100
