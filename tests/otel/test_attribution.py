"""Whose call it is: right, or nobody's, never somebody else's."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest
from opentelemetry import baggage, trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import SpanKind, set_span_in_context

from respan_guard.otel import CUSTOMER_SOURCES

from .conftest import MakeMetered
from .support import LANGCHAIN, OFFICIAL, Metered, call

ATTRIBUTES = [
    "respan.customer_params.customer_identifier",
    "keywordsai.customer_params.customer_identifier",
    "user.id",
    "enduser.id",
    "langfuse.user.id",
    "traceloop.association.properties.customer_id",
    "traceloop.association.properties.user_id",
    "gen_ai.user",
    "llm.user",
    "metadata.user_api_key_end_user_id",
]


def numbered(number: int, **more: Any) -> dict[str, Any]:
    """A call with an id of its own."""
    return call(gen_ai__response__id=f"chatcmpl-{number:024d}") | more


def whose(metered: Metered) -> list[str]:
    """The customers of all records."""
    return [record.customer_identifier for record in metered.records()]


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("when", ["start", "end"])
def test_every_attribute_names_the_customer(name: str, when: str, metered: Metered) -> None:
    """Each of the names that real instrumentations use, set when the span starts or before it ends."""
    span = metered.start(call() | ({name: "org_1"} if when == "start" else {}))
    if when == "end":
        span.set_attribute(name, "org_1")
    span.end()
    assert whose(metered) == ["org_1"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metadata", '{"customer_identifier": "org_1"}'),
        ("metadata", '{"ls_provider": "x", "user_id": "org_1"}'),
        ("llm.invocation_parameters", '{"model": "gpt-4o", "user": "org_1"}'),
        ("llm.invocation_parameters", '{"safety_identifier": "org_1"}'),
        ("llm.invocation_parameters", '{"metadata": {"user_id": "org_1"}}'),
        ("respan.metadata.anthropic.request", '{"metadata": {"user_id": "org_1"}}'),
    ],
)
def test_json_within_attributes(name: str, value: str, metered: Metered) -> None:
    """Some have it in the JSON of the request's parameters or metadata only."""
    metered.see(call() | {name: value})
    assert whose(metered) == ["org_1"]


def test_texts_of_users_name_nobody(metered: Metered) -> None:
    """What a user wrote, or a model answered, is no source, though it is JSON that looks like one."""
    claim = '{"user": "victim", "customer_identifier": "victim", "metadata": {"user_id": "victim"}}'
    names = (
        "input.value",
        "output.value",
        "gen_ai.input.messages",
        "gen_ai.output.messages",
        "gen_ai.prompt.0.content",
    )
    metered.see(call() | dict.fromkeys(names, claim), LANGCHAIN)
    assert whose(metered) == [""]


def test_the_order_is_as_documented(metered: Metered) -> None:
    """The guard's own word comes first, then each attribute before those behind it, the start before the end."""
    attributes = [name for name in CUSTOMER_SOURCES if name not in ("context", "parent") and "#" not in name]
    for number in range(len(attributes)):
        metered.see(numbered(number) | {name: f"by {name}" for name in attributes[number:]})
    assert whose(metered) == [f"by {name}" for name in attributes]
    with metered.guard.on_behalf_of("own"):
        span = metered.start(numbered(100) | dict.fromkeys(attributes, "else"))
    span.end()
    span = metered.start(numbered(101, **{"user.id": "first"}))
    span.set_attribute("user.id", "then")
    span.end()
    assert whose(metered)[-2:] == ["own", "first"]


def test_the_order_can_be_changed(make_metered: MakeMetered) -> None:
    """Sources can be put before the guard's own word, be left out, and be an app's own attributes."""
    metered = make_metered(otel_customer_sources=["app.tenant", "context", "app.json#tenant.id"])
    with metered.guard.on_behalf_of("org_1"):
        metered.see(numbered(1, **{"app.tenant": "org_2"}))
        metered.see(numbered(2, **{"user.id": "org_3"}))
    metered.see(numbered(3, **{"user.id": "org_3"}))
    metered.see(numbered(4, **{"app.json": '{"tenant": {"id": 17}}'}))
    assert sorted(whose(metered)) == ["", "17", "org_1", "org_2"]


@pytest.mark.parametrize("value", ["", " ", "None", "null", "a\u200bb", "x" * 300, True, 1.5, ("org_1",)])
def test_what_can_be_no_customer_is_passed_over(value: Any, metered: Metered) -> None:
    """Placeholders and unusable identifiers are no answer; the next source is asked."""
    metered.see(call() | {"user.id": value, "enduser.id": "org_1"})
    assert whose(metered) == ["org_1"]


def test_a_call_of_nobody_is_kept(metered: Metered) -> None:
    """It is recorded with its cost, without a customer."""
    metered.see(call())
    (record,) = metered.records()
    assert (record.customer_identifier, record.cost) == ("", Decimal("0.004"))


def test_name_and_email_are_learnt_once(metered: Metered) -> None:
    """Respan's `customer_params` on a span give a customer the name and email that it has not; they rename nobody."""
    own = {"respan.customer_params.customer_identifier": "org_1", "respan.customer_params.email": "it@acme.example"}
    metered.see(numbered(1, **own, **{"respan.customer_params.name": "Acme"}))
    metered.records()
    metered.see(numbered(2, **own, **{"respan.customer_params.name": "Mallory"}))
    metered.records()
    customer = metered.guard.sync.get_customer("org_1")
    assert customer is not None
    assert (customer.name, customer.email) == ("Acme", "it@acme.example")


# -- baggage -------------------------------------------------------------------------------------------


class BaggageOnSpans(SpanProcessor):
    """What OpenTelemetry's BaggageSpanProcessor and Logfire do: copy baggage on every span."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        for name, value in baggage.get_all(parent_context).items():
            span.set_attribute(name, value)


class LangfuseOnSpans(SpanProcessor):
    """What Langfuse's processor does: baggage has other names than the attributes it becomes."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        for name, value in baggage.get_all(parent_context).items():
            span.set_attribute("user.id" if name == "langfuse_user_id" else name, value)


def copy_baggage(metered: Metered, copier: SpanProcessor) -> None:
    """Put a processor before the guard's."""
    metered.provider._active_span_processor._span_processors = (copier, metered.processor)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("where", ["the call's own span", "its parent's"])
def test_baggage_counts_only_if_it_is_trusted(
    copied: bool, trusted: bool, where: str, make_metered: MakeMetered
) -> None:
    """Any client can send `baggage: user.id=victim`; a processor that copies it on spans makes it no truer."""
    metered = make_metered(otel_trust_baggage=trusted)
    if copied:
        copy_baggage(metered, BaggageOnSpans())
    context = baggage.set_baggage("user.id", "victim")
    parent = metered.start({}, "asgi", kind=SpanKind.SERVER, context=context)
    inner = set_span_in_context(parent, context)
    metered.see(call(), context=context if where == "the call's own span" else inner)
    parent.end()
    assert whose(metered) == (["victim"] if trusted else [""])


def test_an_app_that_names_its_user_is_heard_in_spite_of_baggage(metered: Metered) -> None:
    """What is hidden is the attribute that came as baggage, not the guard's word or another attribute."""
    context = baggage.set_baggage("user.id", "victim")
    metered.see(numbered(1, **{"enduser.id": "org_1"}), context=context)
    with metered.guard.on_behalf_of("org_2"):
        metered.see(numbered(2), context=context)
    assert sorted(whose(metered)) == ["org_1", "org_2"]


@pytest.mark.parametrize("where", ["the call's own span", "its parent's"])
@pytest.mark.parametrize(("copied", "sent"), [(False, "ann"), (False, "eve"), (True, "eve")])
def test_a_header_takes_nobodys_name_away(where: str, copied: bool, sent: str, metered: Metered) -> None:
    """A client that sends `baggage: user.id=...` stays the user that the app says, and so is charged and refused."""
    if copied:
        copy_baggage(metered, BaggageOnSpans())
    context = baggage.set_baggage("user.id", sent)
    parent = metered.start({}, "asgi", kind=SpanKind.SERVER, context=context)
    if where == "its parent's":
        parent.set_attribute("user.id", "ann")
    span = metered.start(call(), context=set_span_in_context(parent, context))
    if where == "the call's own span":
        span.set_attribute("user.id", "ann")
    span.end()
    parent.end()
    assert whose(metered) == ["ann"]


@pytest.mark.parametrize("names", [("langfuse_user_id", "langfuse_user_id"), ("user.id", "enduser.id")])
@pytest.mark.parametrize("copier", [BaggageOnSpans, LangfuseOnSpans])
def test_what_langfuse_propagates_is_baggage_too(
    copier: type[SpanProcessor], names: tuple[str, str], metered: Metered
) -> None:
    """A header names no victim, under whatever name it becomes an attribute."""
    copy_baggage(metered, copier())
    context = baggage.set_baggage(names[1], "victim", baggage.set_baggage(names[0], "victim"))
    metered.see(call(), context=context)
    assert whose(metered) == [""]


@pytest.mark.parametrize("how", ["only the span", "the span, in a thread of its own"])
def test_the_baggage_of_a_span_around_is_its_own(how: str, metered: Metered) -> None:
    """Code that was given the request's span without its baggage does not believe what was copied there."""
    copy_baggage(metered, BaggageOnSpans())
    server = metered.start({}, "asgi", kind=SpanKind.SERVER, context=baggage.set_baggage("user.id", "victim"))

    def work() -> None:
        with trace.use_span(server):
            metered.see(call())

    if how == "only the span":
        metered.see(call(), context=set_span_in_context(server, Context()))
    else:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    server.end()
    assert whose(metered) == [""]


# -- parents -------------------------------------------------------------------------------------------


def test_the_span_around_names_the_customer(metered: Metered) -> None:
    """An attribute of the request's span is not copied to its children: it is read there as the call begins."""
    server = metered.start({}, "asgi", kind=SpanKind.SERVER)
    agent = metered.start({}, "agents", kind=SpanKind.INTERNAL, context=set_span_in_context(server))
    early = metered.start(numbered(1), context=set_span_in_context(agent))
    server.set_attribute("enduser.id", "org_1")
    span = metered.start(numbered(2), context=set_span_in_context(agent))
    early.end()
    span.end()
    assert sorted(whose(metered)) == ["", "org_1"]
    agent.end()
    server.end()


@pytest.mark.parametrize("scope", [OFFICIAL, "my.app"])
def test_a_span_around_that_names_one_after_another(scope: str, metered: Metered) -> None:
    """A worker's span says for each job whose it is: each call is of whom it began for, whenever it ends or is read."""
    batch = metered.start({}, "worker", kind=SpanKind.INTERNAL)
    spans = []
    for number in range(4):
        batch.set_attribute("user.id", f"org_{number}")
        # It says that it is a call at its end only.
        spans.append(metered.start({}, scope, context=set_span_in_context(batch)))
    for number, span in enumerate(spans):
        span.set_attributes(numbered(number))
        span.end()
    batch.end()
    assert whose(metered) == ["org_0", "org_1", "org_2", "org_3"]


def test_spans_around_that_are_gone_when_the_call_is_read(metered: Metered) -> None:
    """A request that ends right behind its call takes its span's memory with it: the call stays its customer's."""
    for number in range(20):
        server = metered.start({"user.id": "org_1"}, "asgi", kind=SpanKind.SERVER)
        agent = metered.start({}, "my.app", kind=SpanKind.INTERNAL, context=set_span_in_context(server))
        metered.see(numbered(number), context=set_span_in_context(agent))
        agent.end()
        server.end()
        del agent, server
    assert whose(metered) == ["org_1"] * 20


def test_parents_can_come_before_the_guards_own_word(make_metered: MakeMetered) -> None:
    """In the order of `customer_sources`; left out, no parent is asked."""
    for sources, found in ((["parent", "context", "user.id"], "above"), (["context", "user.id"], "own")):
        metered = make_metered(otel_customer_sources=sources)
        server = metered.start({"user.id": "above"}, "asgi", kind=SpanKind.SERVER)
        with metered.guard.on_behalf_of("own"):
            metered.see(call(), context=set_span_in_context(server))
        server.end()
        assert whose(metered) == [found]


def test_a_parent_that_was_over_names_nobody(metered: Metered) -> None:
    """A worker that a request started goes on within that request's span: later calls are not that customer's."""
    server = metered.start({"user.id": "org_1"}, "asgi", kind=SpanKind.SERVER)
    worker = metered.start({}, "worker", kind=SpanKind.INTERNAL, context=set_span_in_context(server))
    metered.see(numbered(1), context=set_span_in_context(worker))
    server.end()
    metered.see(numbered(2), context=set_span_in_context(worker))
    metered.see(numbered(3), context=set_span_in_context(server))
    worker.end()
    assert whose(metered) == ["org_1", "", ""]


@pytest.mark.parametrize("how", ["another trace's", "remote", "remote, the trace's own"])
def test_a_traceparent_header_names_nobody(how: str, metered: Metered) -> None:
    """Whoever sends the id of another customer's running span is not that customer."""
    with metered.guard.on_behalf_of("victim"):
        other = metered.start({"user.id": "victim"}, "asgi", kind=SpanKind.SERVER)
    running = other.get_span_context()
    trace_id = running.trace_id if how == "remote, the trace's own" else 0x1234
    sent = trace.SpanContext(trace_id, running.span_id, how != "another trace's", trace.TraceFlags(1))
    server = metered.start({}, "asgi", kind=SpanKind.SERVER, context=set_span_in_context(trace.NonRecordingSpan(sent)))
    metered.see(numbered(1), context=set_span_in_context(server))
    metered.see(numbered(2), context=set_span_in_context(trace.NonRecordingSpan(sent)))
    assert whose(metered) == ["", ""]


def test_a_traceparent_header_takes_no_call_away(metered: Metered) -> None:
    """A wrapped client's call within a context from outside does not pass for the call of the span that it names."""
    span = metered.start(call(user__id="org_1"))
    running = span.get_span_context()
    sent = trace.NonRecordingSpan(trace.SpanContext(running.trace_id, running.span_id, is_remote=True))
    with trace.use_span(sent):
        metered.processor.called("gpt-4o")
    span.end()
    assert whose(metered) == ["org_1"]


def test_an_admission_that_is_over_names_nobody(metered: Metered) -> None:
    """CONTRACT G11, for the code of an ended admission and for spans below a span of it."""
    with metered.guard.sync.admit("org_1"):
        around = metered.start({}, "worker", kind=SpanKind.INTERNAL)
        metered.see(numbered(1))
        thread = threading.Thread(target=lambda: metered.see(numbered(2), context=set_span_in_context(around)))
        thread.start()
        thread.join()
        late = metered.start(numbered(3))
    late.end()
    metered.see(numbered(4), context=set_span_in_context(around))
    around.end()
    found = {record.usage.response_id[-1]: record for record in metered.records() if record.usage.response_id}
    assert {number: record.customer_identifier for number, record in found.items()} == {
        "1": "org_1",
        "2": "org_1",
        "3": "org_1",
        "4": "",
    }
    assert [found[number].late for number in "123"] == [False, False, True]


# -- tasks, threads, executors -------------------------------------------------------------------------


async def test_tasks_of_many_customers_at_once(make_metered: MakeMetered) -> None:
    """A thousand tasks that take turns: each call is its own task's."""
    metered = make_metered()

    async def work(number: int) -> None:
        with metered.guard.on_behalf_of(f"org_{number}"):
            await asyncio.sleep(0)
            span = metered.start(numbered(number))
            await asyncio.sleep(0.001 * (number % 7))
        span.end()

    await asyncio.gather(*[work(number) for number in range(1000)])
    records = await asyncio.to_thread(metered.records)
    assert len(records) == 1000
    for record in records:
        assert record.usage.response_id == f"chatcmpl-{int(record.customer_identifier[4:]):024d}"


async def test_threads_of_a_request(make_metered: MakeMetered) -> None:
    """`asyncio.to_thread` carries the customer; a bare executor does not, and then the call is nobody's."""
    metered = make_metered()
    with metered.guard.on_behalf_of("org_1"), ThreadPoolExecutor(1) as pool:
        await asyncio.to_thread(metered.see, numbered(1))
        pool.submit(metered.see, numbered(2)).result()
    assert sorted(whose(metered)) == ["", "org_1"]


def test_nested_customers(metered: Metered) -> None:
    """The innermost counts, and the outer one again behind it; a span that was started inside stays inside's."""
    with metered.guard.on_behalf_of("outer"):
        with metered.guard.on_behalf_of("inner"):
            metered.see(numbered(1))
            span = metered.start(numbered(2))
        metered.see(numbered(3), context=set_span_in_context(span))
        metered.see(numbered(4))
        span.end()
    found = {
        record.usage.response_id[-1]: record.customer_identifier
        for record in metered.records()
        if record.usage.response_id
    }
    assert found == {"1": "inner", "2": "inner", "3": "outer", "4": "outer"}


def test_a_concurrent_multi_processor(make_metered: MakeMetered) -> None:
    """It calls processors on threads of its own, without context variables: attributes still name the customer."""
    from opentelemetry.sdk.trace import ConcurrentMultiSpanProcessor, TracerProvider

    metered = make_metered()
    provider = TracerProvider(shutdown_on_exit=False, active_span_processor=ConcurrentMultiSpanProcessor(2))
    provider.add_span_processor(metered.processor)
    tracer = provider.get_tracer(OFFICIAL)
    with metered.guard.on_behalf_of("org_1"):
        tracer.start_span("chat", attributes=numbered(1)).end()
        tracer.start_span("chat", attributes=numbered(2, **{"user.id": "org_2"})).end()
    assert sorted(whose(metered)) == ["", "org_2"]
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_a_second_sighting_names_the_customer(metered: Metered) -> None:
    """The SDK's span knows no customer, the framework's around it does at its end: one record, attributed."""
    outer = metered.start({"openinference.span.kind": "LLM"}, LANGCHAIN)
    metered.see(call(), context=set_span_in_context(outer))
    outer.set_attribute("metadata", '{"customer_id": "org_1"}')
    outer.set_attribute("llm.token_count.prompt", 1000)
    outer.set_attribute("llm.token_count.completion", 200)
    outer.end()
    assert whose(metered) == ["org_1"]


def test_respans_propagation_is_read(metered: Metered, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Respan's own SDK propagates names the customer, also where its processor comes behind ours."""
    import sys
    import types

    factory = types.ModuleType("respan_tracing.utils.span_factory")
    said = {"respan.customer_params.customer_identifier": "org_1", "respan.threads.thread_identifier": "t"}
    factory.read_propagated_attributes = lambda: said  # type: ignore[attr-defined]  # as in respan-tracing 2.24
    monkeypatch.setitem(sys.modules, "respan_tracing.utils.span_factory", factory)
    metered.see(call())
    assert whose(metered) == ["org_1"]
