"""Run real instrumentations against the stand-in provider and write down what they emit, as JSON on stdout.

python capture.py CALLS FAMILY [FAMILY ...]
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

from respan_guard.testing import StandInProvider
from tests.otel import families


class Writer(SpanProcessor):
    """Notes every start and end, in order."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self.events.append(self._facts("start", span))

    def on_end(self, span: Any) -> None:
        self.events.append(self._facts("end", span))

    def _facts(self, event: str, span: Any) -> dict[str, Any]:
        scope = span.instrumentation_scope
        facts: dict[str, Any] = {
            "event": event,
            "name": span.name,
            "trace": f"{span.context.trace_id:032x}",
            "span": f"{span.context.span_id:016x}",
            "parent": None if span.parent is None else f"{span.parent.span_id:016x}",
            "scope": None if scope is None else scope.name,
            "start": span.start_time,
            "attributes": dict(span.attributes or {}),
        }
        if event == "end":
            facts |= {
                "kind": span.kind.name,
                "end": span.end_time,
                "status": span.status.status_code.name,
                "description": span.status.description,
                "events": [{"name": e.name, "attributes": dict(e.attributes or {})} for e in span.events],
            }
        return facts


def fails_as_told(stand_in: StandInProvider) -> None:
    """Let calls fail whose header says so: `x-fail: 503`, or `once`."""

    def fails(request: Any) -> bool:
        wanted = request.headers.get("x-fail")
        retried = request.headers.get("x-stainless-retry-count", "0") != "0"
        return wanted is not None and not (wanted == "once" and retried)

    stand_in.fault("error", times=None, status=503, match=fails)


_FACTS = ("response_id", "provider", "model", "completed", "input_tokens", "output_tokens")
_KINDS = ("cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens", "reasoning_tokens")


def served_by(stand_in: StandInProvider) -> list[dict[str, Any]]:
    """What the provider charged for."""
    return [
        {name: getattr(call, name) for name in (*_FACTS, *_KINDS)} | {"cost": str(call.cost)}
        for call in stand_in.meter.charged
    ]


def main() -> None:
    """Print the cases."""
    which, *names = sys.argv[1:]
    writer = Writer()
    provider = TracerProvider()
    provider.forward = writer  # type: ignore[attr-defined]
    if not any(name.startswith("respan") for name in names):
        provider.add_span_processor(writer)
        trace.set_tracer_provider(provider)
    else:
        tracing: Any = importlib.import_module("respan_tracing")
        tracing.RespanTelemetry(app_name="t", api_key="k", base_url="http://127.0.0.1:9")
        current: Any = trace.get_tracer_provider()
        current.add_span_processor(writer)
    stand_in = StandInProvider()
    fails_as_told(stand_in)
    cases = []
    with stand_in.serve() as url, families.instrumented(names, provider):
        for case, call in families.CALLS[which](url).items():
            writer.events = []
            stand_in.meter.reset()
            try:
                call()
            except Exception as error:
                sys.stderr.write(f"{names} {case}: {error!r}\n")
                continue
            gc.collect()
            time.sleep(0.4 if which == "litellm" else 0.05)
            cases.append(
                {
                    "families": names,
                    "calls": which,
                    "case": case,
                    "events": writer.events,
                    "served": served_by(stand_in),
                }
            )
    json.dump(cases, sys.stdout, default=str)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
