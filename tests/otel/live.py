"""Run real calls through real instrumentations into a guard, and hold its records against the provider's meter.

python -m tests.otel.live CALLS FAMILY [FAMILY ...]        prints, as JSON, what differs by case
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from respan_guard import Guard, GuardSpanProcessor
from respan_guard.testing import StandInProvider
from tests.otel import families
from tests.otel.capture import fails_as_told, served_by
from tests.otel.test_corpus import differences


def main() -> None:
    """Print the differences of each case."""
    which, *names = sys.argv[1:]
    provider = TracerProvider(shutdown_on_exit=False)
    trace.set_tracer_provider(provider)
    stand_in = StandInProvider()
    fails_as_told(stand_in)
    guard = Guard("memory://")
    processor = GuardSpanProcessor(guard)
    provider.add_span_processor(processor)
    found: dict[str, Any] = {}
    known: set[str] = set()
    with stand_in.serve() as url, families.instrumented(names, provider):
        for case, call in families.CALLS[which](url).items():
            stand_in.meter.reset()
            with guard.on_behalf_of("c1"):
                call()
            gc.collect()
            assert processor.force_flush()
            records = [record for record in guard.sync.records() if record.id not in known]
            known |= {record.id for record in records}
            facts = {"families": names, "case": case, "served": served_by(stand_in)}
            found[case] = differences(records, json.loads(json.dumps(facts, default=str)))
    guard.sync.close()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
