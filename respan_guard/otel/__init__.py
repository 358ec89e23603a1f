"""The third door: spans of LLM calls become usage records. Needs the extra `otel`.

`provider.add_span_processor(GuardSpanProcessor(guard))`
"""

from __future__ import annotations

from respan_guard.errors import MissingExtra

try:
    import opentelemetry.sdk.trace  # noqa: F401
except ModuleNotFoundError as _missing:
    raise MissingExtra("GuardSpanProcessor needs OpenTelemetry's SDK: pip install 'respan-guard[otel]'") from _missing

from respan_guard.otel.attribution import CUSTOMER_SOURCES
from respan_guard.otel.processor import GuardSpanProcessor
from respan_guard.otel.sampler import GuardSampler

__all__ = ["CUSTOMER_SOURCES", "GuardSampler", "GuardSpanProcessor"]
