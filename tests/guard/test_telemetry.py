"""Metrics, as the real SDK's reader collects them: names, units, counts, and no customer in any of them."""

from __future__ import annotations

import asyncio
import gc
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from respan_guard import Customer, Guard, LimitExceeded, StorageUnavailable, Usage
from respan_guard.errors import UnpricedModel
from respan_guard.telemetry import telemetry
from tests.exporters.sink import Keeper, pending

from .conftest import MakeGuard
from .faulty import FaultyBackend, faulty_guard

Points = dict[str, list[tuple[dict[str, Any], Any]]]


class Metrics:
    """What an SDK collects."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader])

    def read(self) -> Points:
        """Points by the metric's name: attributes and value (a histogram's count)."""
        found: Points = {}
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                assert scope.scope.name == "respan_guard"
                for metric in scope.metrics:
                    points: Any = metric.data.data_points
                    found[metric.name] = [
                        (dict(point.attributes), point.count if hasattr(point, "count") else point.value)
                        for point in points
                    ]
        return found

    def value(self, name: str, **wanted: Any) -> Any:
        """The sum of the points that have these attributes, written without their namespace."""
        return sum(
            value
            for attributes, value in self.read().get(name, ())
            if all(attributes.get(f"respan_guard.{key}") == one for key, one in wanted.items())
        )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metrics]:
    """An SDK, as if the app had set it for the process."""
    found = Metrics()
    gc.collect()  # guards of tests before are no guards of this one
    with monkeypatch.context() as patched:
        patched.setattr(metrics, "get_meter_provider", lambda: found.provider)
        telemetry.look()
        assert telemetry.on
        yield found
    found.provider.shutdown()
    telemetry.look()
    assert not telemetry.on


async def test_decisions_are_counted_by_outcome_and_reason(measured: Metrics, make_guard: MakeGuard) -> None:
    """Allowed, refused for each reason, shadow; each with how long it took."""
    async with make_guard(default_limits={"rate_limit": 3, "total_budget": 1}) as guard:
        await guard.put_customer(Customer(customer_identifier="blocked", blocked=True))
        async with guard.admit("c1", estimate=Decimal(1)):
            for _ in range(2):
                with pytest.raises(LimitExceeded):
                    await guard.admit("c1", estimate=Decimal(1))
            await guard.record(Usage(cost=1))
        await guard.flush()
        for customer in ("c1", "blocked"):
            assert not await guard.try_admit(customer)
        for _ in range(4):
            await guard.try_admit("c2")
        with pytest.raises(UnpricedModel):
            await guard.admit("c3", estimate=Usage("no-such-model", 1, 1))
        await guard.switch.set("shadow")
        await guard.admit("c1")
    assert measured.value("respan_guard.decisions", outcome="allowed") == 4
    refused = {
        reason: measured.value("respan_guard.decisions", outcome="refused", reason=reason)
        for reason in ("held", "exhausted", "rate", "blocked", "unpriced")
    }
    assert refused == {"held": 2, "exhausted": 1, "rate": 1, "blocked": 1, "unpriced": 1}
    assert measured.value("respan_guard.decisions", outcome="shadow", reason="exhausted") == 1
    total = measured.value("respan_guard.decisions")
    assert measured.value("respan_guard.decision.duration") == total


async def test_spend_is_exact_and_counts_each_record_once(measured: Metrics, make_guard: MakeGuard) -> None:
    """Nano-USD as integers, by source; sent twice counts once, unpriced is visible."""
    async with make_guard(unknown_price="flag") as guard:
        for _ in range(3):
            await guard.record(Usage(cost=Decimal("0.1")), "c1", entry_id="same")
        for _ in range(10):
            guard.record_soon(Usage(cost=Decimal("0.000000001")), "c1")
        await guard.record(Usage("no-such-model", 10, 10), "c1")
        await guard.flush()
    assert measured.value("respan_guard.usage.cost") == 100_000_010
    assert measured.value("respan_guard.usage.records", priced=True, source="manual") == 11
    assert measured.value("respan_guard.usage.records", priced=False) == 1


async def test_gauges_show_what_is_in_flight_and_what_waits(
    measured: Metrics, store: FaultyBackend, tmp_path: Path
) -> None:
    """Holds, the queue, the journal and the breaker, over an outage and back."""
    async with faulty_guard(tmp_path, default_limits={"total_budget": 9}, budget_failure="open") as guard:
        async with guard.admit("c1", estimate=Decimal(2)):
            assert measured.value("respan_guard.admission.active") == 1
            assert measured.value("respan_guard.admission.held") == 2_000_000_000
            assert measured.value("respan_guard.storage.breaker.open") == 0
            store.error = StorageUnavailable("down")
            for _ in range(5):
                await guard.record(Usage(cost=1))
        assert measured.value("respan_guard.admission.active") == 0
        assert measured.value("respan_guard.journal.depth") == 5
        assert measured.value("respan_guard.storage.queue") >= 5
        assert measured.value("respan_guard.storage.breaker.open", storage="main") == 1
        async with guard.admit("c1"):
            pass
        assert measured.value("respan_guard.decisions", outcome="allowed", reason="storage_unavailable") == 1
        assert measured.value("respan_guard.storage.failures", operation="apply") >= 3
        store.error = None
        await guard.flush()
        assert measured.value("respan_guard.storage.breaker.open") == 0
    assert measured.value("respan_guard.usage.records") == 5


async def test_a_record_that_comes_again_is_not_spent_twice(measured: Metrics, make_guard: MakeGuard) -> None:
    """What an admission still holds, by the gauge and for calls that claim of it, is what the store says it holds."""
    usage = Usage("gpt-4o", cost=Decimal("0.25"), provider="openai", response_id="chatcmpl-0123456789abcdef0123456789")
    async with (
        make_guard(default_limits={"total_budget": 9}) as guard,
        guard.admit("c1", estimate=Decimal(2)) as admission,
    ):
        for _ in range(4):
            await admission.record(usage)
        assert measured.value("respan_guard.admission.held") == 1_750_000_000
        assert (await guard.status("c1")).limits[0].held == Decimal("1.75")
        for _ in range(2):
            await admission.record(Usage("gpt-4o", cost=Decimal("0.25")))
        assert measured.value("respan_guard.admission.held") == 1_250_000_000
        assert (await guard.status("c1")).limits[0].held == Decimal("1.25")


async def test_storage_is_measured_with_the_kind_of_its_error(
    measured: Metrics, store: FaultyBackend, tmp_path: Path
) -> None:
    """Batches and reads, answered and not."""
    async with faulty_guard(tmp_path, default_limits={"total_budget": 9}) as guard:
        await guard.try_admit("c1")
        await guard.status("c1")
        store.error = StorageUnavailable("down")
        with pytest.raises(StorageUnavailable):
            await guard.admit("c1")
        await asyncio.sleep(0)
        points = measured.read()["respan_guard.storage.failures"]
        assert {attributes["error.type"] for attributes, _ in points} == {"StorageUnavailable"}
        assert measured.value("respan_guard.decisions", outcome="error", reason="storage_unavailable") == 1
        assert measured.value("respan_guard.storage.duration", operation="apply") >= 2
        assert measured.value("respan_guard.storage.duration", operation="call") >= 1
        store.error = None


async def test_series_stay_few_whatever_strangers_send(measured: Metrics, make_guard: MakeGuard) -> None:
    """A thousand customers, models and providers make no series of their own, and appear in none."""
    async with make_guard(default_limits={"rate_limit": 1}, unknown_price="flag") as guard:
        for number in range(300):
            customer = f"stranger-{number}"
            async with guard.admit(customer) as admission:
                admission.record_soon(Usage(f"stranger-model-{number}", 1, 1, provider=f"stranger-{number}"))
            assert not await guard.try_admit(customer)
        await guard.flush()
    points = measured.read()
    assert sum(len(series) for series in points.values()) < 40
    assert "stranger" not in str(points)


async def test_names_and_units_follow_the_conventions_and_are_documented(
    measured: Metrics, store: FaultyBackend, tmp_path: Path
) -> None:
    """A namespace, dots, small letters; seconds are "s", things counted are in braces; each is in the docs' table."""
    async with faulty_guard(tmp_path, default_limits={"total_budget": 9}) as guard:
        await guard.record(Usage(cost=1), "c1")
        guard.add_exporter(keeper := Keeper())
        async with asyncio.timeout(20):
            while not keeper.kept or await pending(guard, "keeper"):
                await asyncio.sleep(0.01)
        store.error = StorageUnavailable("down")
        with pytest.raises(StorageUnavailable):
            await guard.admit("c1")
        store.error = None
        await guard.flush()
        data = measured.reader.get_metrics_data()
    assert data is not None
    documented = Path("docs/operations.md").read_text()
    seen = set()
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        seen.add(metric.name)
        assert re.fullmatch(r"respan_guard(\.[a-z]+)+", metric.name)
        assert metric.unit == ("s" if metric.name.endswith(".duration") else metric.unit)
        assert re.fullmatch(r"s|1|\{[a-zA-Z_]+\}", metric.unit or "")
        assert metric.description
        assert f"| `{metric.name}` |" in documented
    listed = set(re.findall(r"^\| `(respan_guard\.[a-z.]+)` \|", documented, re.MULTILINE))
    assert listed == seen


def test_an_sdk_that_is_set_after_the_guard_was_made_is_found(tmp_path: Path) -> None:
    """As where a module makes the guard and main sets up telemetry: found when the guard opens."""
    script = """
        import asyncio, sys
        from respan_guard import Guard
        guard = Guard(sys.argv[1])
        from opentelemetry import metrics
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        reader = InMemoryMetricReader()
        metrics.set_meter_provider(MeterProvider([reader]))

        async def main():
            async with guard:
                async with guard.admit("c1"):
                    pass

        asyncio.run(main())
        names = [m.name for m in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics]
        assert "respan_guard.decisions" in names, names
    """
    for url in (f"sqlite:///{tmp_path / 'guard.db'}", "memory://"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), url], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_two_guards_share_the_instruments(measured: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    """The SDK warns of instruments that are made twice; there is nothing to warn of."""
    guards = [Guard("memory://") for _ in range(2)]
    for guard in guards:
        with guard.sync.admit("c1"):
            assert measured.value("respan_guard.admission.active") == 1
    assert measured.value("respan_guard.decisions") == 2
    assert caplog.text == ""


def test_without_an_sdk_nothing_is_measured() -> None:
    """The API alone: what would measure is off."""
    guard = Guard("memory://")
    with guard.sync.admit("c1"):
        assert not telemetry.on
