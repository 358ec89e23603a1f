"""Spans that are sampled out: detected, and recorded after all without being exported."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, DEFAULT_ON, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import SpanKind, set_span_in_context

from respan_guard import Usage
from respan_guard.otel import GuardSampler
from respan_guard.otel.sampler import hides_calls, warn_of_sampling

from .conftest import MakeMetered
from .support import OFFICIAL, call

UNSAMPLED = set_span_in_context(
    trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=True, trace_flags=trace.TraceFlags(0)))
)


@pytest.mark.parametrize(
    ("sampler", "why"),
    [
        (ALWAYS_ON, None),
        (ALWAYS_OFF, "100 %"),
        (TraceIdRatioBased(0.5), "%"),
        (ParentBased(TraceIdRatioBased(0.01)), "%"),
        (DEFAULT_ON, "traceparent"),
        (GuardSampler(ALWAYS_OFF), None),
        (GuardSampler(DEFAULT_ON), None),
        (GuardSampler(ParentBased(TraceIdRatioBased(0.01))), None),
    ],
    ids=["on", "off", "half", "few under a parent", "default", "off, metered", "default, metered", "few, metered"],
)
def test_samplers_that_hide_calls_are_known(sampler: Sampler, why: str | None) -> None:
    """Ratios, off, and the default one, which clients switch off by a header; none behind the guard's own sampler."""
    found = hides_calls(sampler)
    assert found is None if why is None else found is not None and why in found


def test_it_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning for a process, that says what to do."""
    monkeypatch.setattr("respan_guard.otel.sampler._warned", False)
    provider = TracerProvider(sampler=TraceIdRatioBased(0.1), shutdown_on_exit=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            warn_of_sampling(provider)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "TraceIdRatioBased{0.1}" in line
    assert "TracerProvider(sampler=GuardSampler(...))" in line


def test_the_processor_looks_at_the_tracing_in_force(
    make_metered: MakeMetered, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the first span, and, where all are dropped, when it is flushed."""
    monkeypatch.setattr("respan_guard.otel.sampler._warned", False)
    metered = make_metered()
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    provider.add_span_processor(metered.processor)
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    with caplog.at_level(logging.WARNING):
        provider.get_tracer("x").start_span("x").end()
        assert not caplog.records
        metered.processor.force_flush()
    assert "hides LLM calls" in caplog.text


def test_the_sampler_of_the_provider_it_was_added_to(
    make_metered: MakeMetered, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That provider need not be the one in force: the first span tells which sampler let it through."""
    monkeypatch.setattr("respan_guard.otel.sampler._warned", False)
    metered = make_metered()
    provider = TracerProvider(sampler=TraceIdRatioBased(0.9), shutdown_on_exit=False)
    provider.add_span_processor(metered.processor)
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            provider.get_tracer("x").start_span("x").end()
    assert "TraceIdRatioBased{0.9} hides LLM calls" in caplog.text


@pytest.mark.parametrize("when", ["it is made", "another door records"])
def test_where_all_is_dropped_it_is_said_early(
    when: str, make_metered: MakeMetered, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No span ever starts then: the tracing in force is looked at when the processor is made, and at a record."""
    monkeypatch.setattr("respan_guard.otel.sampler._warned", False)
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    first = make_metered()
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    with caplog.at_level(logging.WARNING):
        if when == "it is made":
            make_metered()
        else:
            first.guard.sync.record(Usage("gpt-4o", input_tokens=1), customer_identifier="org_1")
    assert "AlwaysOff" in caplog.text


@pytest.mark.parametrize("export", [SimpleSpanProcessor, BatchSpanProcessor])
@pytest.mark.parametrize("sampler", [ALWAYS_OFF, ParentBased(ALWAYS_ON)])
def test_dropped_calls_are_metered_and_not_exported(
    export: Callable[[InMemorySpanExporter], SimpleSpanProcessor], sampler: Sampler, make_metered: MakeMetered
) -> None:
    """Also below spans that were dropped, and behind a client's header that says not to sample."""
    metered = make_metered()
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=GuardSampler(sampler), shutdown_on_exit=False)
    provider.add_span_processor(export(exporter))
    provider.add_span_processor(metered.processor)
    tracer = provider.get_tracer(OFFICIAL)
    server = tracer.start_span("POST /ask", context=UNSAMPLED, kind=SpanKind.SERVER)
    agent = tracer.start_span("agent", context=set_span_in_context(server))
    tracer.start_span("chat", context=set_span_in_context(agent), kind=SpanKind.CLIENT, attributes=call()).end()
    agent.end()
    server.end()
    assert len(metered.records()) == 1
    assert provider.force_flush()
    assert exporter.get_finished_spans() == ()
    provider.shutdown()


@pytest.mark.parametrize("kind", [SpanKind.SERVER, SpanKind.CONSUMER])
@pytest.mark.parametrize("sampler", [ALWAYS_OFF, ParentBased(ALWAYS_ON)])
def test_dropped_requests_still_name_the_customer(sampler: Sampler, kind: SpanKind, make_metered: MakeMetered) -> None:
    """A client whose header says not to sample is charged all the same: the app's word on its span is kept."""
    metered = make_metered()
    provider = TracerProvider(sampler=GuardSampler(sampler), shutdown_on_exit=False)
    provider.add_span_processor(metered.processor)
    tracer = provider.get_tracer(OFFICIAL)
    server = tracer.start_span("POST /ask", UNSAMPLED, kind, {"http.request.method": "POST"})
    server.set_attribute("user.id", "org_1")
    tracer.start_span("chat", set_span_in_context(server), SpanKind.CLIENT, call()).end()
    server.end()
    assert not server.get_span_context().trace_flags.sampled
    assert [record.customer_identifier for record in metered.records()] == ["org_1"]


def test_what_is_kept_is_kept_and_other_work_stays_dropped() -> None:
    """The inner decision stands for what it keeps; requests sent and queries that it drops are not recorded."""
    provider = TracerProvider(sampler=GuardSampler(ALWAYS_OFF), shutdown_on_exit=False)
    tracer = provider.get_tracer("x")
    assert not tracer.start_span("send", kind=SpanKind.PRODUCER).is_recording()
    assert not tracer.start_span("GET", kind=SpanKind.CLIENT, attributes={"http.request.method": "GET"}).is_recording()
    assert not tracer.start_span("SELECT", kind=SpanKind.CLIENT, attributes={"db.system": "redis"}).is_recording()
    native = {"http.request.method": "POST", "gen_ai.operation.name": "chat"}  # Anthropic's own spans have both
    assert tracer.start_span("messages", kind=SpanKind.CLIENT, attributes=native).is_recording()
    assert tracer.start_span("ChatOpenAI").is_recording()
    kept = TracerProvider(sampler=GuardSampler(ALWAYS_ON), shutdown_on_exit=False).get_tracer("x").start_span("x")
    assert kept.get_span_context().trace_flags.sampled
    assert "AlwaysOff" in provider.sampler.get_description()
