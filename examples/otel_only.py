"""An app that traces its LLM calls already, and gets a ledger from that: no wrapped client, no middleware.

    pip install 'respan-guard[otel]' 'anthropic>=2'
    python examples/otel_only.py

Anthropic's SDK makes spans by itself; for others, and for frameworks, switch an instrumentation on as usual
(docs/otel.md lists those that are read). Without `ANTHROPIC_API_KEY` a stand-in provider answers.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from anthropic import Anthropic
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from respan_guard import Guard, GuardSpanProcessor
from respan_guard.otel import GuardSampler
from respan_guard.testing import StandInProvider


def make_provider(guard: Guard) -> TracerProvider:
    """The app's own tracing, of which a tenth is exported; the guard sees all of it."""
    provider = TracerProvider(sampler=GuardSampler(ParentBased(TraceIdRatioBased(0.1))))
    # provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))  # whatever the app exports to
    provider.add_span_processor(GuardSpanProcessor(guard))  # last, so that it sees what other processors set
    return provider


def ask(client: Anthropic, question: str) -> str:
    """What the app does, and knows nothing of the guard."""
    reply = client.messages.create(
        model="claude-haiku-4-5", max_tokens=200, messages=[{"role": "user", "content": question}]
    )
    return "".join(block.text for block in reply.content if block.type == "text")


def work(guard: Guard, client: Anthropic, tracer: trace.Tracer) -> None:
    """Three requests, each of which names its customer in its own way."""
    with guard.on_behalf_of("acme"):  # by the guard
        ask(client, "How far is the moon?")
    with tracer.start_as_current_span("POST /ask", attributes={"user.id": "bolt"}):  # by the span around
        ask(client, "How far is the sun?")
    ask(client, "Who am I?")  # not at all: it is recorded as nobody's


def main() -> None:
    """Make three calls and show the ledger."""
    with ExitStack() as stack:
        guard = Guard(os.environ.get("RESPAN_GUARD_STORAGE", "sqlite:///otel_only.db"))
        stack.enter_context(guard.sync)
        provider = make_provider(guard)
        trace.set_tracer_provider(provider)
        if "ANTHROPIC_API_KEY" in os.environ:
            client = Anthropic()
        else:
            client = Anthropic(base_url=stack.enter_context(StandInProvider().serve()), api_key="no-key")
        with client:
            work(guard, client, trace.get_tracer("app"))
        provider.force_flush()
        for record in guard.sync.records():
            usage = record.usage
            name = record.customer_identifier or "(nobody)"
            print(f"{name}: {record.model}, {usage.input_tokens} + {usage.output_tokens} tokens, {record.cost} USD")


if __name__ == "__main__":
    main()
