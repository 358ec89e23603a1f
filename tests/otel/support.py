"""Making spans as instrumentations do, and reading what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind

from respan_guard import Guard, UsageRecord
from respan_guard.otel import GuardSpanProcessor

OFFICIAL = "opentelemetry.instrumentation.genai.openai"
OPENINFERENCE = "openinference.instrumentation.openai"
LANGCHAIN = "openinference.instrumentation.langchain"
TRACELOOP = "opentelemetry.instrumentation.openai.v1"
NATIVE = "com.anthropic.sdk.python"
RESPONSE_ID = "chatcmpl-0123456789abcdef0123456789"


def call(**changes: Any) -> dict[str, Any]:
    """Attributes of a chat that cost 0.004 USD, in OpenTelemetry's names; None takes one out."""
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4o",
        "gen_ai.response.model": "gpt-4o-2024-08-06",
        "gen_ai.response.id": RESPONSE_ID,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 1000,
        "gen_ai.usage.output_tokens": 200,
        "gen_ai.usage.cache_read.input_tokens": 400,
    } | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in attributes.items() if value is not None}


@dataclass
class Metered:
    """A guard, its span processor, and the tracer provider that feeds it."""

    guard: Guard
    processor: GuardSpanProcessor
    provider: TracerProvider

    def start(self, attributes: dict[str, Any] | None = None, scope: str = OFFICIAL, **options: Any) -> Span:
        """Start a span as one of `scope`'s; `context` names its parent."""
        kind = options.pop("kind", SpanKind.CLIENT)
        return self.provider.get_tracer(scope).start_span("chat gpt-4o", attributes=attributes, kind=kind, **options)

    def see(self, attributes: dict[str, Any], scope: str = OFFICIAL, context: Context | None = None) -> Span:
        """Start and end a span with these attributes, half of them set at the end."""
        half = len(attributes) // 2
        names = list(attributes)
        span = self.start({name: attributes[name] for name in names[:half]}, scope, context=context)
        for name in names[half:]:
            span.set_attribute(name, attributes[name])
        span.end()
        return span

    def records(self) -> list[UsageRecord]:
        """Everything recorded, without waiting for what may yet come."""
        assert self.processor.force_flush()
        return list(self.guard.sync.records())
