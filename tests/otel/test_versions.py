"""Versions of OpenTelemetry's SDK: the oldest that is said to do, and one that can't."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.environments import python_with

COUNT = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from respan_guard import Guard
from respan_guard.otel import GuardSpanProcessor

guard = Guard("memory://")
provider = TracerProvider()
provider.add_span_processor(GuardSpanProcessor(guard))
tracer = provider.get_tracer("opentelemetry.instrumentation.genai.openai")
with guard.on_behalf_of("c1"), tracer.start_as_current_span("POST /ask"):
    with tracer.start_as_current_span("chat", attributes={"gen_ai.operation.name": "chat"}) as span:
        span.set_attribute("gen_ai.request.model", "gpt-4o-mini")
        span.set_attribute("gen_ai.usage.input_tokens", 100)
        span.set_attribute("gen_ai.usage.output_tokens", 10)
provider.force_flush()
import opentelemetry.sdk.version
(record,) = guard.sync.records()
print(opentelemetry.sdk.version.__version__, record.customer_identifier, record.usage.input_tokens, record.cost)
guard.sync.close()
"""

LACKING = """
import opentelemetry.sdk.trace as sdk
before = sdk.ReadableSpan.__init__
def init(self, *args, **options):
    before(self, *args, **options)
    del self._instrumentation_scope
sdk.ReadableSpan.__init__ = init
import respan_guard.otel
"""


def test_the_oldest_sdk_counts_alike(pytestconfig: pytest.Config) -> None:
    """What pyproject.toml names as the oldest version of the SDK does, with the API of its time."""
    python = python_with(pytestconfig, "oldest-otel", ["opentelemetry-sdk==1.30.0", "opentelemetry-api==1.30.0"])
    done = subprocess.run([python, "-c", COUNT], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.30.0", "c1", "100", "0.000021"]


def test_an_sdk_that_keeps_its_spans_otherwise_is_told_at_once() -> None:
    """An SDK without the fields that the processor reads is an error at import, with what to install."""
    done = subprocess.run([sys.executable, "-c", LACKING], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "has no ReadableSpan._instrumentation_scope; install one from 1.30 to 1.45" in done.stderr
