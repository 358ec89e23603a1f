"""Samplers: a span that is not recorded is seen by no processor, so its call is metered by nobody."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes

if TYPE_CHECKING:
    from opentelemetry.context import Context

__all__ = ["GuardSampler", "hides_calls", "warn_of_sampling"]

logger = logging.getLogger("respan_guard")

_OTHER_WORK = frozenset(
    {"http.request.method", "http.method", "db.system", "db.system.name", "rpc.system", "messaging.system"}
)
_REQUESTS = (SpanKind.SERVER, SpanKind.CONSUMER)
_PROBES = 64
_CALL: Attributes = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "gpt-4o",
}


class GuardSampler(Sampler):
    """Lets LLM calls be metered that another sampler drops, without exporting any more of them.

    `TracerProvider(sampler=GuardSampler(TraceIdRatioBased(0.1)))`. What the inner sampler keeps is kept. What it drops
    is recorded but not sampled, so that processors see it and exporters don't, unless its kind or its attributes say
    that it is no LLM call: many instrumentations tell only at the end that a span was one. Spans of requests and of
    messages that are consumed are recorded, too: what the app says there of the customer is the calls' within them.

    Args:
        inner: Decides what is exported.
    """

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """The inner sampler's decision, but for dropped spans that may be LLM calls, or tell whose they are."""
        result = self._inner.should_sample(parent_context, trace_id, name, kind, attributes, links)
        if result.decision is not Decision.DROP or kind is SpanKind.PRODUCER:
            return result
        if (
            kind not in _REQUESTS
            and attributes
            and not _OTHER_WORK.isdisjoint(attributes)
            and "gen_ai.operation.name" not in attributes
        ):
            return result
        return SamplingResult(Decision.RECORD_ONLY, attributes, result.trace_state)

    def get_description(self) -> str:
        """What it is."""
        return f"GuardSampler({self._inner.get_description()})"


def hides_calls(sampler: Sampler) -> str | None:
    """Why a sampler hides LLM calls from the guard; None if it hides none."""
    dropped = 0
    for number in range(_PROBES):
        trace_id = ((number * 0x9E3779B97F4A7C15) & (2**64 - 1)) | (1 << 127)
        context = trace.set_span_in_context(trace.INVALID_SPAN)
        found = sampler.should_sample(context, trace_id, "chat gpt-4o", SpanKind.CLIENT, _CALL)
        dropped += found.decision is Decision.DROP
    if dropped:
        return f"it drops about {100 * dropped // _PROBES or 1} % of them"
    unsampled = trace.SpanContext(1 << 127 | 1, 1 << 63 | 1, is_remote=True, trace_flags=trace.TraceFlags(0))
    context = trace.set_span_in_context(trace.NonRecordingSpan(unsampled))
    server = sampler.should_sample(context, unsampled.trace_id, "POST /ask", SpanKind.SERVER)
    if server.decision is Decision.DROP:
        found = sampler.should_sample(context, unsampled.trace_id, "chat gpt-4o", SpanKind.CLIENT, _CALL)
        if found.decision is Decision.DROP:
            return (
                "it drops what a client's `traceparent` header says not to sample, so clients can switch metering off"
            )
    return None


_warned = False


def warn_of_sampling(provider: object = None, *, sampler: object = None) -> None:
    """Log, once, that a sampler hides LLM calls: this one, or that of the tracer provider given or in force."""
    global _warned
    if _warned:
        return
    if sampler is None:
        found = provider if provider is not None else trace.get_tracer_provider()
        sampler = found.sampler if isinstance(found, TracerProvider) else None
    if not isinstance(sampler, Sampler):
        return
    try:
        why = hides_calls(sampler)
    except Exception:
        logger.debug("a sampler could not be asked", exc_info=True)
        return
    if why is not None:
        _warned = True
        logger.warning(
            "the sampler %s hides LLM calls from respan_guard (%s): they are made, and neither recorded nor counted; "
            "use TracerProvider(sampler=GuardSampler(...)) from respan_guard.otel",
            sampler.get_description(),
            why,
        )
