"""The example runs, and what the README and docs/otel.md say about families is what the table says."""

from __future__ import annotations

import runpy
from decimal import Decimal
from pathlib import Path

import anthropic
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from respan_guard.otel.conventions import FAMILIES
from respan_guard.testing import StandInProvider
from tests.gateway_support import EXAMPLES, load_example

from .support import Metered

ROOT = Path(__file__).parents[2]
# Scopes that are known to belong together, and whose spans nobody has recorded here.
UNMEASURED = {"Traceloop: openai-agents", "Traceloop: LiteLLM", "Traceloop: others"} | {
    f"OpenInference: {name}" for name in ("frameworks", "others", "SDKs")
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that examples make go to a directory of the test's own; no key and no tracing of others is touched."""
    monkeypatch.chdir(tmp_path)
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "RESPAN_GUARD_STORAGE", "ANTHROPIC_OPEN_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", None)
    monkeypatch.setattr("opentelemetry.trace.set_tracer_provider", lambda p: setattr(trace, "_TRACER_PROVIDER", p))


def test_the_example_shows_a_ledger(capsys: pytest.CaptureFixture[str]) -> None:
    """Three calls, of which a tenth would be exported: a record of each, two of them somebody's."""
    runpy.run_path(str(EXAMPLES / "otel_only.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["(nobody)", "acme", "bolt"]
    assert all("claude-haiku-4-5" in line and line.endswith(" USD") and "None" not in line for line in lines)


def test_the_example_is_metered_as_the_provider_does(metered: Metered, provider: StandInProvider, url: str) -> None:
    """What it records costs what the provider's own meter says."""
    example = load_example("otel_only")
    tracing: TracerProvider = example.make_provider(metered.guard)
    trace.set_tracer_provider(tracing)
    with anthropic.Anthropic(base_url=url, api_key="k") as client:
        example.work(metered.guard, client, tracing.get_tracer("app"))
    records = metered.records()
    assert len(records) == 3
    assert sum((record.cost or Decimal(0) for record in records), Decimal(0)) == provider.meter.total_cost
    tracing.shutdown()


def test_the_page_has_every_family() -> None:
    """docs/otel.md has a row for each family that was measured, and says of each whether it stops calls."""
    lines = (ROOT / "docs" / "otel.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and line.count("|") == 5]
    for family in FAMILIES:
        if family.name in UNMEASURED:
            continue
        words = [word.strip(",").lower() for word in family.name.replace(":", "").split()]
        row = next((row for row in rows if all(word in row.lower() for word in words)), None)
        assert row is not None, family.name
        answer = row.rstrip("| ").rpartition("|")[2].strip()
        assert answer.startswith("yes") == (family.stops == "yes"), (family.name, answer)
