"""Exactly once: one call, however many see it, is one record; two calls are two."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import anthropic
import openai
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.trace import Span, set_span_in_context, use_span
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from respan_guard import GuardMiddleware, Usage
from respan_guard.testing import StandInProvider

from .conftest import MakeMetered
from .support import LANGCHAIN, NATIVE, OFFICIAL, OPENINFERENCE, RESPONSE_ID, Metered, call

CLAUDE = {
    "gen_ai.provider.name": "anthropic",
    "gen_ai.request.model": "claude-sonnet-4-6",
    "gen_ai.response.model": "claude-sonnet-4-6",
}
ID = {"gen_ai.response.id": RESPONSE_ID}
NO_ID = {"gen_ai.response.id": ""}
OTHER_ID = {"gen_ai.response.id": "chatcmpl-another-0123456789abcdef"}
ASK: Any = [{"role": "user", "content": "How far is the moon?"}]


def count(metered: Metered) -> int:
    """How many records there are."""
    return len(metered.records())


# -- spans among themselves ----------------------------------------------------------------------------


@pytest.mark.parametrize("customers", [("org_1", "org_1"), ("org_1", None), (None, "org_1")])
def test_one_response_id_once(customers: tuple[str | None, str | None], metered: Metered) -> None:
    """In whatever trace and scope: the customer that is known pays."""
    for customer, scope in zip(customers, (OFFICIAL, "some.other.scope"), strict=True):
        metered.see(call() | ({} if customer is None else {"user.id": customer}), scope)
    (record,) = metered.records()
    assert record.customer_identifier == "org_1"


def test_one_response_id_of_two_customers(metered: Metered) -> None:
    """Ids are unique per customer: a server that gives one again has not answered the other customer for nothing."""
    for customer, tokens in (("org_1", 10), ("org_2", 5000), ("org_3", 5000)):
        metered.see(call(gen_ai__usage__input_tokens=1000 + tokens, user__id=customer))
    assert [record.customer_identifier for record in metered.records()] == ["org_1", "org_2", "org_3"]


def test_two_names_for_the_customer_of_one_call(metered: Metered) -> None:
    """At one moment, with the same tokens, one id is one call, whoever two scopes say it is for: the first pays."""
    overlapping(metered, (call(user__id="org_1"), LANGCHAIN), (call(user__id="org_2"), OPENINFERENCE))
    (record,) = metered.records()
    assert record.customer_identifier == "org_1"


def test_one_response_id_of_two_providers(metered: Metered) -> None:
    """Another provider's reply, of another model, is another call although it has the same id."""
    metered.see(call())
    metered.see(call() | CLAUDE)
    assert count(metered) == 2


def test_a_response_id_that_comes_again_much_later(metered: Metered) -> None:
    """What is the same for minutes is not the same for ever; for one customer and provider the store holds it once."""
    for minute in (0, 30):
        start = 10**18 + minute * 60 * 10**9
        attributes = call(gen_ai__provider__name="server" if minute else "openai")
        metered.start(attributes, start_time=start).end(start + 10**9)
    assert count(metered) == 2


def test_short_response_ids_repeat(metered: Metered) -> None:
    """Some local servers number their replies from 0 to 998: these are different calls."""
    for _ in range(3):
        metered.see(call(gen_ai__response__id="chatcmpl-7"))
    assert count(metered) == 3


@pytest.mark.parametrize("order", ["inner first", "outer first"])
def test_a_span_around_another_is_the_same_call(order: str, metered: Metered) -> None:
    """A framework's span around the SDK's; also where an abandoned stream ends the outer one first."""
    outer = metered.start(call() | NO_ID, "pydantic-ai")
    between = metered.start({}, "http", context=set_span_in_context(outer))
    inner = metered.start(call(), context=set_span_in_context(between))
    for span in (inner, between, outer) if order == "inner first" else (outer, between, inner):
        span.end()
    assert count(metered) == 1


def test_a_tool_within_a_call_makes_calls_of_its_own(metered: Metered) -> None:
    """Some SDKs run tools within a call's span: what those call is another model's, another reply, other tokens."""
    outer = metered.start(call(), "opentelemetry.instrumentation.google_genai")
    inner = call(gen_ai__request__model="gpt-4o-mini", gen_ai__usage__input_tokens=70) | OTHER_ID
    metered.see(inner | {"gen_ai.response.model": "gpt-4o-mini"}, context=set_span_in_context(outer))
    outer.end()
    assert count(metered) == 2


@pytest.mark.parametrize(
    "outer", [{"llm.model_name": "gpt-4o"}, {"llm.token_count.prompt": 5000, "llm.token_count.completion": 999}]
)
def test_a_call_within_one_of_the_same_instrumentation(outer: dict[str, Any], metered: Metered) -> None:
    """One instrumentation sees a call once: another model, or other tokens, within it is another call."""
    kind = {"openinference.span.kind": "LLM", "llm.system": "openai"}
    around = metered.start(kind, OPENINFERENCE)
    tokens = {"llm.token_count.prompt": 10, "llm.token_count.completion": 5}
    metered.see(kind | tokens | {"llm.model_name": "gpt-4o-mini"}, OPENINFERENCE, set_span_in_context(around))
    around.set_attributes({"llm.model_name": "gpt-4o-mini"} | outer)
    around.end()
    assert count(metered) == 2


def test_a_span_with_the_sum_of_its_calls(metered: Metered) -> None:
    """A fallback or an agent that passes for a call and carries the sum of two."""
    outer = metered.start({}, LANGCHAIN)
    for number in (1, 2):
        inner = call(gen_ai__response__id=f"chatcmpl-{number:024d}", gen_ai__usage__input_tokens=1000 * number)
        metered.see(inner, context=set_span_in_context(outer))
    for name, value in call(gen_ai__usage__input_tokens=3000, gen_ai__usage__output_tokens=400).items():
        outer.set_attribute(name, value)
    outer.end()
    assert count(metered) == 2


def overlapping(metered: Metered, *sightings: tuple[dict[str, Any], str]) -> None:
    """Sightings beside each other, each in a trace of its own."""
    spans = [(metered.start(None, scope), attributes) for attributes, scope in sightings]
    for span, attributes in spans:
        for name, value in attributes.items():
            span.set_attribute(name, value)
        span.end()


def test_siblings_that_look_the_same_are_one_call(metered: Metered) -> None:
    """LangChain's spans are never current, so the SDK's is no child of them; nothing but looks tells."""
    overlapping(metered, (call() | NO_ID, LANGCHAIN), (call(), OPENINFERENCE))
    assert count(metered) == 1


@pytest.mark.parametrize(
    "second",
    [
        (call() | NO_ID, LANGCHAIN),  # the same scope: two calls at once
        (call() | NO_ID, "app.own"),  # a scope that nobody knows
        (call(gen_ai__usage__input_tokens=1002) | NO_ID, OPENINFERENCE),
        (call(gen_ai__request__model="gpt-4o-mini", gen_ai__response__model="gpt-4o-mini") | NO_ID, OPENINFERENCE),
        (call() | NO_ID | {"user.id": "org_2"}, OPENINFERENCE),
    ],
)
def test_siblings_that_differ_are_two(second: tuple[dict[str, Any], str], metered: Metered) -> None:
    """Same scope, unknown scope, other tokens, other model, other customer: any of these makes two calls."""
    overlapping(metered, (call() | NO_ID | {"user.id": "org_1"}, LANGCHAIN), second)
    assert count(metered) == 2


def test_one_after_the_other_are_two(metered: Metered) -> None:
    """Same looks, but not at the same time."""
    metered.start(call() | NO_ID, LANGCHAIN, start_time=10**18).end(10**18 + 10**9)
    metered.start(call() | NO_ID, OPENINFERENCE, start_time=10**18 + 2 * 10**9).end(10**18 + 3 * 10**9)
    assert count(metered) == 2


BARE = {name: value for name, value in call().items() if "usage" not in name and name != "gen_ai.response.id"}


def test_calls_at_once_of_which_one_tells_no_usage(metered: Metered) -> None:
    """Spans of pydantic-ai are current, so what stands beside them is another call: it does not vanish in this one."""
    overlapping(metered, (BARE, "pydantic-ai"), (call(), OFFICIAL))
    assert sorted(record.kind for record in metered.records()) == ["presumed", "usage"]


def test_a_call_that_began_before_and_ended_before(metered: Metered) -> None:
    """What a framework saw of a call lies around what its SDK did; spans that only overlap are of two calls."""
    framework, sdk = metered.start(BARE, LANGCHAIN), metered.start(call(), start_time=time.time_ns() + 10**8)
    framework.end(time.time_ns() + 2 * 10**8)
    sdk.end(time.time_ns() + 10**9)
    assert sorted(record.kind for record in metered.records()) == ["presumed", "usage"]


def test_what_an_app_records_itself_is_no_other_call(metered: Metered) -> None:
    """A stream whose span tells no usage, and a call that the app records meanwhile: the one is not the other."""
    with metered.guard.on_behalf_of("org_1"):
        span = metered.start(BARE, "opentelemetry.instrumentation.openai.v1")
        metered.guard.sync.record(Usage("gpt-4o", input_tokens=900, output_tokens=90, provider="openai"))
        span.end()
    assert sorted(record.kind for record in metered.records()) == ["presumed", "usage"]


def test_calls_in_a_row_are_no_moment_apart(metered: Metered) -> None:
    """The same text embedded twice, through two scopes, with 5 ms between them."""
    embedding = {"gen_ai.usage.input_tokens": 8, "gen_ai.request.model": "text-embedding-3-small"}
    for number, scope in enumerate((LANGCHAIN, OPENINFERENCE)):
        start = 10**18 + number * 15 * 10**6
        attributes = embedding | {"gen_ai.operation.name": "embeddings"}
        metered.start(attributes, scope, start_time=start).end(start + 10**7)
    assert count(metered) == 2


def test_of_each_scope_one_is_taken_for_a_call(metered: Metered) -> None:
    """Three calls at once through a framework and its SDK are three, not one."""
    overlapping(metered, *[(call() | NO_ID, scope) for scope in (LANGCHAIN, OPENINFERENCE) for _ in range(3)])
    assert count(metered) == 3


def test_what_looks_merged_is_counted(make_metered: MakeMetered, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule that may err has a metric that says how often it was used, and on whom."""
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader]).get_meter("respan_guard")
    monkeypatch.setattr("respan_guard.otel.dedupe.metrics.get_meter", lambda name: meter)
    metered = make_metered()
    overlapping(metered, (call() | NO_ID, LANGCHAIN), (call(), OPENINFERENCE))
    metered.records()
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    (point,) = metric.data.data_points
    assert metric.name == "respan_guard.spans.merged"
    assert (point.value, dict(point.attributes or {})) == (1, {"kept": LANGCHAIN, "merged": OPENINFERENCE})  # type: ignore[union-attr]


def test_anthropics_own_spans_beside_another_instrumentation(metered: Metered) -> None:
    """They are on by default, siblings of Respan's, which have no id and count without the cache."""
    respan = {
        "llm.request.type": "chat",
        "gen_ai.system": "anthropic",
        "gen_ai.request.model": "claude-sonnet-4-6",
        "gen_ai.usage.input_tokens": 600,
        "gen_ai.usage.output_tokens": 200,
        "gen_ai.usage.cache_read_input_tokens": 400,
    }
    overlapping(metered, (call() | CLAUDE, NATIVE), (respan, "respan_instrumentation_anthropic._instrumentation"))
    assert count(metered) == 1


def test_a_traceloop_stream_is_one_token_off(metered: Metered) -> None:
    """Its streams count the placeholder, too; the native span of the same call does not."""
    traceloop = call(gen_ai__usage__output_tokens=201, gen_ai__is_streaming=True) | CLAUDE | NO_ID
    traceloop |= {"gen_ai.is_streaming": True}
    overlapping(metered, (traceloop, "opentelemetry.instrumentation.anthropic"), (call() | CLAUDE, NATIVE))
    (record,) = metered.records()
    assert record.usage.output_tokens == 200


def test_usage_from_the_one_customer_from_the_other(metered: Metered) -> None:
    """The SDK's span was never told the usage, the framework's has it but not the id: one record of both."""
    bare = {n: v for n, v in call().items() if "usage" not in n}
    overlapping(metered, (bare, OFFICIAL), (call() | NO_ID | {"user.id": "org_1"}, LANGCHAIN))
    (record,) = metered.records()
    assert (record.id, record.customer_identifier) == (f"openai:{RESPONSE_ID}", "org_1")
    assert record.cost == Decimal("0.004")


@pytest.mark.parametrize("lacks", ["usage", "customer"])
def test_a_span_around_that_still_runs_is_waited_for(
    lacks: str, metered: Metered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A framework goes on reading a stream long after the SDK's span ended, and knows at its end what that did not."""
    monkeypatch.setattr("respan_guard.otel.meter._PATIENCE", 0.05)
    outer = metered.start({"gen_ai.operation.name": "chat"}, "pydantic-ai")
    inner = BARE | {"user.id": "org_1"} if lacks == "usage" else call()
    metered.see(inner, context=set_span_in_context(outer))
    time.sleep(0.3)
    assert not list(metered.guard.sync.records())
    outer.set_attributes(call(user__id="org_1"))
    outer.end()
    (record,) = metered.records()
    assert (record.customer_identifier, record.kind, record.cost) == ("org_1", "usage", Decimal("0.004"))


def test_an_agents_span_is_not_waited_for(metered: Metered, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent may run for hours, and knows no more of a call than the call."""
    monkeypatch.setattr("respan_guard.otel.meter._PATIENCE", 0.05)
    agent = metered.start({"gen_ai.operation.name": "invoke_agent"}, "pydantic-ai")
    metered.see(BARE, context=set_span_in_context(agent))
    end = time.monotonic() + 10
    while not list(metered.guard.sync.records()):
        assert time.monotonic() < end
        time.sleep(0.02)
    agent.end()


@pytest.mark.parametrize("storage", ["memory://", "sqlite"])
@pytest.mark.parametrize("held", [True, False])
def test_usage_that_comes_late_shrinks_what_was_presumed(
    held: bool, storage: str, make_metered: MakeMetered, tmp_path: Any
) -> None:
    """CONTRACT G8: real and presumed together are no more than the larger of them."""
    storage = f"sqlite:///{tmp_path / 'guard.db'}" if storage == "sqlite" else storage
    metered = make_metered(storage, missing_usage="hold" if held else "estimate", default_limits={"period_budget": 10})
    asked = BARE | {"gen_ai.request.max_tokens": 1000, "user.id": "org_1"}
    if held:
        with metered.guard.sync.admit("org_1", estimate=Decimal("0.05")):
            outer = metered.start({"gen_ai.operation.name": "chat"}, "pydantic-ai")
            metered.see(asked, context=set_span_in_context(outer))
    else:
        outer = metered.start({"gen_ai.operation.name": "chat"}, "pydantic-ai")
        metered.see(asked, context=set_span_in_context(outer))
    (presumed,) = metered.records()
    assert presumed.cost is not None
    assert presumed.cost > Decimal("0.004")
    outer.set_attributes(call())
    outer.end()
    records = {record.kind: record for record in metered.records()}
    assert records["usage"].cost == Decimal("0.004")
    assert records["presumed"].cost == presumed.cost - Decimal("0.004")
    assert {record.customer_identifier for record in records.values()} == {"org_1"}


@pytest.mark.parametrize("held", [True, False])
def test_texts_that_have_no_encoding_are_presumed_too(held: bool, make_metered: MakeMetered, tmp_path: Any) -> None:
    """Half a surrogate pair in any text of a span: what is presumed of its call is stored, not a dead letter."""
    missing = "hold" if held else "estimate"
    metered = make_metered(f"sqlite:///{tmp_path / 'guard.db'}", missing_usage=missing)
    odd = {"openai.response.service_tier": "\ud800", "respan.gateway.log_id": "\ud800x"}
    asked = BARE | odd | {"gen_ai.request.max_tokens": 1000, "user.id": "org_1"}
    if held:
        with metered.guard.sync.admit("org_1", estimate=Decimal("0.05")):
            metered.see(asked)
    else:
        metered.see(asked)
    (record,) = metered.records()
    assert (record.kind, record.customer_identifier) == ("presumed", "org_1")
    assert (record.usage.metadata or {})["respan_log_id"] == "?x"


@pytest.mark.parametrize("storage", ["memory://", "sqlite"])
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("name", ["openai", "azure"])
def test_usage_that_another_door_brings_late_shrinks_what_was_presumed(
    held: bool, name: str, storage: str, make_metered: MakeMetered, tmp_path: Any
) -> None:
    """An app that records a reply by hand, after its span was presumed for want of usage, is not charged twice."""
    storage = f"sqlite:///{tmp_path / 'guard.db'}" if storage == "sqlite" else storage
    metered = make_metered(storage, missing_usage="hold" if held else "estimate", default_limits={"period_budget": 10})
    guard = metered.guard
    with guard.sync.admit("org_1", estimate=Decimal("0.05")) if held else guard.on_behalf_of("org_1"):
        metered.see(BARE | {"gen_ai.request.max_tokens": 1000, "gen_ai.provider.name": name, **ID})
    (presumed,) = metered.records()
    assert presumed.cost is not None
    assert presumed.cost > Decimal("0.004")
    usage = Usage(model="gpt-4o", input_tokens=1000, output_tokens=200, cache_read_tokens=400, provider="openai")
    usage.response_id = RESPONSE_ID
    for customer in ("org_2", "org_1", "org_1"):  # of another's it is another call; said twice it is one
        with guard.on_behalf_of(customer):
            guard.record_soon(usage)
        metered.records()
    records = {(record.kind, record.customer_identifier): record for record in metered.records()}
    assert {about: record.cost for about, record in records.items()} == {
        ("presumed", "org_1"): presumed.cost - Decimal("0.004"),
        ("usage", "org_1"): Decimal("0.004"),
        ("usage", "org_2"): Decimal("0.004"),
    }
    assert guard.sync.status("org_1").limits[0].used == presumed.cost


# -- spans and the other doors -------------------------------------------------------------------------


def open_ai(url: str) -> openai.OpenAI:
    """OpenAI's client."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="sk-test", max_retries=0)


def as_instrumented(metered: Metered, make: Any, *, current: bool, response_id: bool, scope: str = OFFICIAL) -> Any:
    """Make a call as an instrumentation would see it: a span around it, current or not, with or without its id."""
    span: Span = metered.start({"gen_ai.operation.name": "chat", "gen_ai.request.model": "gpt-4o"}, scope)
    if current:
        with use_span(span, end_on_exit=False):
            reply = make()
    else:
        reply = make()
    usage = getattr(reply, "usage", None)
    if usage is not None:
        span.set_attribute("gen_ai.provider.name", "openai")
        span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", getattr(usage, "completion_tokens", 0))
    if response_id:
        span.set_attribute("gen_ai.response.id", reply.id)
    span.end()
    return reply


@pytest.mark.parametrize("current", [True, False])
@pytest.mark.parametrize("response_id", [True, False])
@pytest.mark.parametrize("storage", ["memory://", "sqlite"])
def test_a_wrapped_client_within_a_span(
    current: bool,
    response_id: bool,
    storage: str,
    make_metered: MakeMetered,
    url: str,
    provider: StandInProvider,
    tmp_path: Any,
) -> None:
    """Transport beats span: one record, the client's, with and without an id, current span or not."""
    metered = make_metered(
        f"sqlite:///{tmp_path / 'guard.db'}" if storage == "sqlite" else storage,
        default_limits={"period_budget": 10},
    )
    client = metered.guard.wrap(first := open_ai(url))
    with metered.guard.on_behalf_of("org_1"):
        for _ in range(3):
            make = lambda: client.chat.completions.create(model="gpt-4o", messages=ASK)  # noqa: E731
            as_instrumented(metered, make, current=current, response_id=response_id)
    records = metered.records()
    assert [record.source for record in records] == ["client"] * 3
    assert sum(record.cost or 0 for record in records) == provider.meter.total_cost
    client.close()
    first.close()


def test_embeddings_within_a_span(metered: Metered, url: str, provider: StandInProvider) -> None:
    """They have no id anywhere: the span that was current when the client sent the call is not recorded again."""
    client = metered.guard.wrap(first := open_ai(url))
    with metered.guard.on_behalf_of("org_1"):
        span = metered.start({"gen_ai.operation.name": "embeddings", "gen_ai.request.model": "text-embedding-3-small"})
        with use_span(span, end_on_exit=True):
            reply = client.embeddings.create(model="text-embedding-3-small", input="hello")
            span.set_attribute("gen_ai.usage.input_tokens", reply.usage.prompt_tokens)
    (record,) = metered.records()
    assert (record.source, record.cost) == ("client", provider.meter.total_cost)
    client.close()
    first.close()


def test_a_broken_off_stream_is_the_clients_to_presume(make_metered: MakeMetered, url: str) -> None:
    """The client door presumes what it cost; the span, which knows nothing either, adds nothing."""
    metered = make_metered(default_limits={"period_budget": 10})
    client = metered.guard.wrap(first := open_ai(url))
    with metered.guard.on_behalf_of("org_1"):
        span = metered.start({"gen_ai.operation.name": "chat", "gen_ai.request.model": "gpt-4o"})
        with use_span(span, end_on_exit=True):
            stream = client.chat.completions.create(model="gpt-4o", messages=ASK, stream=True)
            next(iter(stream))
            stream.close()
    (record,) = metered.records()
    assert (record.kind, record.source) == ("presumed", "presumed")
    assert record.cost
    client.close()
    first.close()


def test_a_tool_with_a_wrapped_client_within_another_models_span(metered: Metered, url: str) -> None:
    """The span around is another call, of another model: both are recorded."""
    client = metered.guard.wrap(first := open_ai(url))
    with metered.guard.on_behalf_of("org_1"):
        span = metered.start(call() | CLAUDE | {"gen_ai.response.id": "msg_0123456789abcdef0123"}, NATIVE)
        with use_span(span, end_on_exit=True):
            client.chat.completions.create(model="gpt-4o", messages=ASK)
    assert sorted(record.source for record in metered.records()) == ["client", "span"]
    client.close()
    first.close()


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("sdk", [True, False])
@pytest.mark.parametrize("model", ["gpt-4o", None])
def test_a_framework_without_usage_around_a_wrapped_client(
    held: bool, sdk: bool, model: str | None, make_metered: MakeMetered, url: str, provider: StandInProvider
) -> None:
    """It knows neither usage nor, maybe, the model: one record, whether or not an SDK's span stands between."""
    metered = make_metered(default_limits={"period_budget": 10})
    client = metered.guard.wrap(first := open_ai(url))
    outer_says = {"gen_ai.operation.name": "chat"} | ({"gen_ai.request.model": model} if model else {})
    guard = metered.guard

    def make() -> Any:
        return client.chat.completions.create(model="gpt-4o", messages=ASK)

    with guard.sync.admit("org_1", estimate=Decimal(1)) if held else guard.on_behalf_of("org_1"):
        outer = metered.start(outer_says, "opentelemetry.instrumentation.openai_agents")
        step = metered.start({}, "my.app", context=set_span_in_context(outer))
        with use_span(step, end_on_exit=True):
            if sdk:
                as_instrumented(metered, make, current=True, response_id=True)
            else:
                make()
        outer.end()
    (record,) = metered.records()
    assert (record.source, record.cost) == ("client", provider.meter.total_cost)
    client.close()
    first.close()


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("between", [True, False])
def test_spans_of_the_app_between_a_call_and_the_wrapped_client(
    calls: int, between: bool, metered: Metered, url: str, provider: StandInProvider
) -> None:
    """An app's own span of a call, or of the sum of its attempts, has no id and other spans in it: it adds nothing."""
    client = metered.guard.wrap(first := open_ai(url))
    given, made = 0, 0
    with metered.guard.on_behalf_of("org_1"):
        outer = metered.start({"gen_ai.operation.name": "chat", "gen_ai.request.model": "gpt-4o"}, "my.app")
        for _ in range(calls):
            inner = metered.start({}, "my.app", context=set_span_in_context(outer)) if between else outer
            with use_span(inner, end_on_exit=between):
                usage: Any = client.chat.completions.create(model="gpt-4o", messages=ASK).usage
            given, made = given + usage.prompt_tokens, made + usage.completion_tokens
        outer.set_attributes({"gen_ai.usage.input_tokens": given, "gen_ai.usage.output_tokens": made})
        outer.end()
    records = metered.records()
    assert [record.source for record in records] == ["client"] * calls
    assert sum(record.cost or 0 for record in records) == provider.meter.total_cost
    client.close()
    first.close()


@pytest.mark.parametrize("usage", [True, False])
def test_a_tool_with_a_wrapped_client_within_a_call(usage: bool, metered: Metered, url: str) -> None:
    """With tokens of its own the span around is another call, also of the same model; without, if the model differs."""
    client = metered.guard.wrap(first := open_ai(url))
    outer_says = call(gen_ai__response__id=None) if usage else BARE | CLAUDE | NO_ID
    with metered.guard.on_behalf_of("org_1"):
        outer = metered.start(outer_says, "pydantic-ai")
        tool = metered.start({"gen_ai.operation.name": "execute_tool"}, context=set_span_in_context(outer))
        with use_span(tool, end_on_exit=True):
            client.chat.completions.create(model="gpt-4o", messages=ASK)
        outer.end()
    assert sorted(record.source for record in metered.records()) == ["client", "span" if usage else "presumed"]
    client.close()
    first.close()


@pytest.mark.parametrize("first", ["by hand", "span"])
def test_recorded_by_hand_and_seen(first: str, metered: Metered) -> None:
    """An app that records replies itself and traces them too has one record of each."""
    with metered.guard.on_behalf_of("org_1"):
        usage = Usage(model="gpt-4o", input_tokens=1000, output_tokens=200, cache_read_tokens=400, provider="openai")
        usage.response_id = RESPONSE_ID
        if first == "by hand":
            metered.guard.record_soon(usage)
        metered.see(call())
        if first == "span":
            metered.guard.record_soon(usage)
    assert count(metered) == 1


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ids", [True, False])
def test_middleware_client_and_span_at_once(
    wrapped: bool, stream: bool, ids: bool, make_metered: MakeMetered, url: str, provider: StandInProvider
) -> None:
    """CONTRACT G7: a gateway with a middleware, a wrapped client and an instrumentation has one record of each call."""
    metered = make_metered(default_limits={"period_budget": 10})
    made = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
    client = metered.guard.wrap(made) if wrapped else made

    async def forward(request: Request) -> Response:
        body = await request.json()
        span = metered.start({"gen_ai.operation.name": "chat", "gen_ai.request.model": body["model"]})
        with use_span(span, end_on_exit=False):
            reply = await client.chat.completions.create(**body)

        def told(part: Any) -> None:
            span.set_attribute("gen_ai.usage.input_tokens", part.usage.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", part.usage.completion_tokens)
            if ids:
                span.set_attribute("gen_ai.response.id", part.id)
            span.end()

        if not body.get("stream"):
            told(reply)
            return JSONResponse(reply.model_dump(mode="json"))

        async def parts() -> Any:
            async for part in reply:
                if part.usage is not None:
                    told(part)
                yield f"data: {part.model_dump_json()}\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with made:
            yield

    app = Starlette(routes=[Route("/v1/chat/completions", forward, methods=["POST"])], lifespan=lifespan)
    app.add_middleware(GuardMiddleware, guard=metered.guard, identify="header:x-customer", include=["/v1/*"])
    body: dict[str, Any] = {"model": "gpt-4o", "messages": ASK}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    with TestClient(app) as browser:
        for _ in range(2):
            answer = browser.post("/v1/chat/completions", json=body, headers={"x-customer": "org_1"})
            assert answer.status_code == 200
        records = metered.records()
        holds = metered.guard.sync.status("org_1").limits[0].held
    assert [record.source for record in records] == ["client" if wrapped else "span"] * 2
    assert {record.customer_identifier for record in records} == {"org_1"}
    assert sum(record.cost or 0 for record in records) == provider.meter.total_cost
    assert not any(record.late for record in records)
    assert holds == 0


@pytest.mark.parametrize("ids", [True, False])
def test_the_response_knows_what_the_span_does_not(ids: bool, make_metered: MakeMetered, url: str) -> None:
    """Some spans tell no usage although the reply has it: the response that passes the middleware is then recorded."""
    metered = make_metered(default_limits={"period_budget": 10})
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)

    async def forward(request: Request) -> Response:
        async with client:
            span = metered.start({"gen_ai.operation.name": "chat", "gen_ai.request.model": "gpt-4o"})
            reply = await client.chat.completions.create(**await request.json())
            if ids:
                span.set_attribute("gen_ai.response.id", reply.id)
            span.end()
            return JSONResponse(reply.model_dump(mode="json"))

    app = Starlette(routes=[Route("/v1/chat/completions", forward, methods=["POST"])])
    app.add_middleware(GuardMiddleware, guard=metered.guard, identify="header:x-customer", include=["/v1/*"])
    with TestClient(app) as browser:
        body = {"model": "gpt-4o", "messages": ASK}
        assert browser.post("/v1/chat/completions", json=body, headers={"x-customer": "org_1"}).status_code == 200
        (record,) = metered.records()
    assert (record.kind, record.source, record.customer_identifier) == ("usage", "response", "org_1")


def test_a_span_charges_the_requests_hold_before_it_is_released(make_metered: MakeMetered) -> None:
    """What spans told is booked under the admission, ahead of its release, without anybody flushing."""
    metered = make_metered(default_limits={"period_budget": 10})
    for number in range(50):
        with metered.guard.sync.admit("org_1", estimate=Decimal("0.01")) as admission:
            metered.see(call(gen_ai__response__id=f"chatcmpl-{number:024d}"))
        assert admission is not None
    records = list(metered.guard.sync.records())
    assert len(records) == 50
    assert not any(record.late for record in records)
    assert all(record.admission_id for record in records)


def test_no_usage_under_an_admission_costs_what_was_held(make_metered: MakeMetered) -> None:
    """CONTRACT G8: `missing_usage="hold"` books what the hold still has, once, and with it the hold is gone."""
    metered = make_metered(default_limits={"period_budget": 10})
    bare = {n: v for n, v in call().items() if "usage" not in n}
    with metered.guard.sync.admit("org_1", estimate=Decimal("0.05")):
        metered.see(call() | OTHER_ID)
        metered.see(bare)
    records = {record.kind: record for record in metered.records()}
    assert records["usage"].cost == Decimal("0.004")
    assert records["presumed"].cost == Decimal("0.046")
    status = metered.guard.sync.status("org_1").limits[0]
    assert (status.used, status.held) == (Decimal("0.05"), 0)


@pytest.mark.parametrize(
    ("policy", "content", "cost"),
    [
        ("hold", False, None),
        ("flag", False, None),
        ("flag", True, None),
        ("hold", True, Decimal("0.002515")),  # 6 tokens in by the length of the question, 250 out
        ("estimate", True, Decimal("0.002515")),
        ("estimate", False, Decimal("0.01")),  # as many as were asked for at most, 1000
    ],
)
def test_no_usage_and_no_hold(policy: Any, content: bool, cost: Decimal | None, make_metered: MakeMetered) -> None:
    """By the texts on the span where there are some, else by `missing_usage`; always marked, never a silent zero."""
    metered = make_metered(missing_usage=policy)
    attributes = {n: v for n, v in call(gen_ai__request__max_tokens=1000).items() if "usage" not in n}
    if content:
        attributes["gen_ai.input.messages"] = (
            '[{"role": "user", "parts": [{"type": "text", "content": "How far is the moon?!?!"}]}]'
        )
        attributes["gen_ai.output.messages"] = f'[{{"role": "assistant", "parts": [{{"content": "{"word" * 250}"}}]}}]'
    metered.see(attributes)
    (record,) = metered.records()
    assert (record.kind, record.cost, record.usage.estimated) == ("presumed", cost, True)


def test_anthropics_own_spans_live(
    metered: Metered, url: str, provider: StandInProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real SDK, which makes spans by itself, alone and with a wrapped client beside it."""
    monkeypatch.setenv("ANTHROPIC_OPEN_TELEMETRY", "true")
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", metered.provider)
    bare = anthropic.Anthropic(base_url=url, api_key="k", max_retries=0)
    wrapped = metered.guard.wrap(bare)
    with metered.guard.on_behalf_of("org_1"):
        for client in (bare, wrapped):
            client.messages.create(model="claude-sonnet-4-6", max_tokens=50, messages=ASK)
            with client.messages.stream(model="claude-sonnet-4-6", max_tokens=50, messages=ASK) as stream:
                for _ in stream:
                    pass
    records = metered.records()
    assert sorted(record.source for record in records) == ["client", "client", "span", "span"]
    assert sum(record.cost or 0 for record in records) == provider.meter.total_cost
    bare.close()
