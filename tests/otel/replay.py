"""Spans that real instrumentations emitted, played to a processor again."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from respan_guard.otel import GuardSpanProcessor

_RESOURCE = Resource.get_empty()


def make_span(facts: dict[str, Any]) -> ReadableSpan:
    """The span of one event of a recording."""
    trace_id = int(facts["trace"], 16)

    def context(span_id: str) -> SpanContext:
        return SpanContext(trace_id, int(span_id, 16), is_remote=False, trace_flags=TraceFlags(1))

    return ReadableSpan(
        facts["name"],
        context(facts["span"]),
        parent=None if facts["parent"] is None else context(facts["parent"]),
        resource=_RESOURCE,
        attributes=facts["attributes"],
        events=[Event(event["name"], event["attributes"]) for event in facts.get("events", ())],
        kind=SpanKind[facts.get("kind", "INTERNAL")],
        status=Status(StatusCode[facts.get("status", "UNSET")], facts.get("description")),
        start_time=facts.get("start"),
        end_time=facts.get("end"),
        instrumentation_scope=None if facts["scope"] is None else InstrumentationScope(facts["scope"]),
    )


def replay(processor: GuardSpanProcessor, events: list[dict[str, Any]]) -> None:
    """Start and end the spans of a recording in their order. Spans that never end are dropped when it is over."""
    running: dict[str, ReadableSpan] = {}
    for facts in events:
        span = make_span(facts)
        if facts["event"] == "start":
            running[facts["span"]] = span
            processor.on_start(span)  # type: ignore[arg-type]  # the SDK's spans can't be made with ids of our own
        else:
            processor.on_end(span)
            running.pop(facts["span"], None)
    running.clear()
