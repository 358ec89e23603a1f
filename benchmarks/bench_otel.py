"""What the span processor adds to a span: the SDK bare, and with the processor, by turns.

Goals: at most 1.15 of the SDK's own span cost on spans that are no LLM call, 1.30 on those that are. "here" is what the
code pays that ends the span (the time of its thread); "all" adds the thread that turns spans into records, priced and
stored in memory, which is the whole process. The goals are for "here": a span that ends holds nobody up.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind, Tracer, set_span_in_context

from respan_guard import Guard, GuardSpanProcessor

ROUNDS = 101
SPANS = 100
GOALS = {"no LLM call": 1.15, "LLM call": 1.30}
SERVER = {
    "http.request.method": "POST",
    "url.path": "/ask",
    "url.scheme": "https",
    "server.address": "app.example",
    "network.protocol.version": "1.1",
    "client.address": "10.0.0.7",
    "user_agent.original": "curl/8.5",
}
# What OpenTelemetry's own instrumentation of OpenAI's SDK sets, at the start and at the end.
BEGUN = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "gpt-4o",
    "server.address": "api.openai.com",
    "server.port": 443,
}
TOLD = {
    "gen_ai.response.finish_reasons": ("stop",),
    "gen_ai.response.model": "gpt-4o-2024-08-06",
    "gen_ai.usage.input_tokens": 1000,
    "gen_ai.usage.output_tokens": 200,
    "gen_ai.usage.cache_read.input_tokens": 400,
    "gen_ai.usage.reasoning.output_tokens": 50,
    "openai.response.service_tier": "default",
}
numbers = iter(range(10**9))


def other_work(tracer: Tracer) -> None:
    """A request with one piece of work in it: two spans."""
    for _ in range(SPANS // 2):
        server = tracer.start_span("POST /ask", kind=SpanKind.SERVER, attributes=SERVER)
        inner = tracer.start_span("work", context=set_span_in_context(server))
        inner.set_attribute("rows", 3)
        inner.end()
        server.set_attribute("http.response.status_code", 200)
        server.end()


def calls(tracer: Tracer) -> None:
    """LLM calls."""
    for _ in range(SPANS):
        span = tracer.start_span("chat gpt-4o", kind=SpanKind.CLIENT, attributes=BEGUN)
        for name, value in TOLD.items():
            span.set_attribute(name, value)
        span.set_attribute("gen_ai.response.id", f"chatcmpl-{next(numbers):024d}")
        span.end()


def measure(work: Callable[[Tracer], None], tracer: Tracer, settle: Callable[[], object]) -> tuple[float, float]:
    """Microseconds for a span: of this thread, and of the process until all is recorded."""
    here, everything = time.thread_time_ns(), time.process_time_ns()
    work(tracer)
    here = time.thread_time_ns() - here
    settle()
    return here / SPANS / 1000, (time.process_time_ns() - everything) / SPANS / 1000


def main() -> None:
    """Print the table."""
    guard = Guard("memory://")
    processor = GuardSpanProcessor(guard)
    plain, guarded = TracerProvider(shutdown_on_exit=False), TracerProvider(shutdown_on_exit=False)
    guarded.add_span_processor(processor)
    scope = "opentelemetry.instrumentation.genai.openai"
    rows = [("no LLM call", other_work, "opentelemetry.instrumentation.asgi"), ("LLM call", calls, scope)]
    print(f"{'':14} {'bare us':>9} {'here us':>9} {'all us':>9} {'here':>7} {'all':>7} {'goal':>7}")
    with guard.on_behalf_of("org_1"):
        for name, work, module in rows:
            bare, mine = plain.get_tracer(module), guarded.get_tracer(module)
            for tracer in (bare, mine, bare, mine):
                measure(work, tracer, processor.force_flush)
            gc.collect()
            gc.disable()
            try:
                rounds = [
                    (measure(work, bare, processor.force_flush), measure(work, mine, processor.force_flush))
                    for _ in range(ROUNDS)
                ]
            finally:
                gc.enable()
            here = statistics.median(mine[0] / base[0] for base, mine in rounds)
            everything = statistics.median(mine[1] / base[1] for base, mine in rounds)
            base_us, here_us, all_us = (
                statistics.median(column)
                for column in zip(*[(base[0], mine[0], mine[1]) for base, mine in rounds], strict=True)
            )
            goal = GOALS[name]
            print(f"{name:14} {base_us:9.2f} {here_us:9.2f} {all_us:9.2f} {here:7.2f} {everything:7.2f} {goal:7.2f}")
    guard.sync.close()


if __name__ == "__main__":
    main()
