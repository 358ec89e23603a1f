"""Metrics of our own, through the OpenTelemetry API: what is decided, what it waits for, what is spent.

Without an SDK nothing is measured, and what would measure costs a look at one attribute. No attribute holds a
customer, a model or anything else that strangers choose: the number of series is small and fixed. Money is an int of
nano-USD here as everywhere, so that sums are exact; divide by 10^9 where it is shown.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

if TYPE_CHECKING:
    from opentelemetry.util.types import Attributes

__all__ = ["Reading", "Telemetry", "telemetry"]

_SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_OWN: Final = "opentelemetry.metrics"  # where the API's provider is from, which measures nothing

Reading = tuple[str, int, dict[str, str]]
"""One value that is read when asked for: the instrument's name, the value, its attributes."""
_READ: Final = {
    "respan_guard.admission.active": ("{admission}", "Admissions in force that end with a block or a request."),
    "respan_guard.admission.held": ("{nano_USD}", "What they hold and did not spend."),
    "respan_guard.storage.queue": ("{operation}", "Operations that wait for storage in memory."),
    "respan_guard.journal.depth": ("{record}", "Records on disk that storage did not take yet."),
    "respan_guard.storage.breaker.open": ("1", "1 while storage is taken for dead, else 0."),
    "respan_guard.export.lag": ("s", "How long the oldest record has waited for an exporter of this process."),
}


class Telemetry:
    """The instruments of this process.

    Attributes:
        on: Whether anybody measures.
    """

    def __init__(self) -> None:
        self.on = False
        self._provider: MeterProvider | None = None
        self._sources: weakref.WeakSet[Callable[[], Iterable[Reading]]] = weakref.WeakSet()
        self._outcomes: dict[tuple[str, str], Attributes] = {}

    def look(self) -> None:
        """See whether there is an SDK by now, and make the instruments with it. Cheap."""
        provider = metrics.get_meter_provider()
        if provider is self._provider:
            return
        self._provider = provider
        self.on = not type(provider).__module__.startswith(_OWN)
        if not self.on:
            return
        meter = provider.get_meter("respan_guard", version("respan-guard"))
        self._decisions = meter.create_counter(
            "respan_guard.decisions", "{decision}", "Admissions that were asked for, by outcome and reason."
        )
        self._decision_seconds = meter.create_histogram(
            "respan_guard.decision.duration",
            "s",
            "How long an admission took to be decided.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._storage_seconds = meter.create_histogram(
            "respan_guard.storage.duration",
            "s",
            "How long a batch of operations, or a read, took storage.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._storage_failures = meter.create_counter(
            "respan_guard.storage.failures", "{failure}", "Batches and reads that storage did not answer."
        )
        self._records = meter.create_counter("respan_guard.usage.records", "{record}", "Usage records booked.")
        self._cost = meter.create_counter("respan_guard.usage.cost", "{nano_USD}", "What they cost.")
        self._exported = meter.create_counter(
            "respan_guard.export.records", "{record}", "Records that exporters delivered, or that became dead letters."
        )
        for name, (unit, description) in _READ.items():
            meter.create_observable_gauge(name, [self._reader(name)], unit, description)

    def decided(self, outcome: str, reason: str, seconds: float) -> None:
        """Count a decision."""
        attributes = self._outcomes.get((outcome, reason))
        if attributes is None:
            attributes = {"respan_guard.outcome": outcome}
            if reason:
                attributes["respan_guard.reason"] = reason
            self._outcomes[outcome, reason] = attributes
        self._decisions.add(1, attributes)
        self._decision_seconds.record(seconds, {"respan_guard.outcome": outcome})

    def stored(self, operation: str, seconds: float, error: BaseException | None = None) -> None:
        """Measure a trip to storage: "apply" for a batch, "call" for a read or a change of customers."""
        attributes = {"respan_guard.operation": operation}
        if error is not None:
            attributes["error.type"] = type(error).__name__
            self._storage_failures.add(1, attributes)
        self._storage_seconds.record(seconds, attributes)

    def booked(self, cost: int | None, kind: str, source: str) -> None:
        """Count a usage record that storage took for the first time; None is a call without a known price."""
        attributes = {"respan_guard.kind": kind, "respan_guard.source": source}
        self._records.add(1, {**attributes, "respan_guard.priced": cost is not None})
        if cost is not None and cost > 0:
            self._cost.add(cost, attributes)

    def exported(self, exporter: str, delivered: int, dead: int) -> None:
        """Count records that left through an exporter, and those that its other side won't take."""
        for count, outcome in ((delivered, "delivered"), (dead, "dead_letter")):
            if count:
                attributes = {"respan_guard.exporter": exporter, "respan_guard.outcome": outcome}
                self._exported.add(count, attributes)

    def observe(self, source: Callable[[], Iterable[Reading]]) -> None:
        """Have values read from `source` for as long as it lives."""
        self._sources.add(source)

    def _reader(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def read(_: CallbackOptions) -> Iterable[Observation]:
            sums: dict[tuple[tuple[str, str], ...], int] = {}
            for source in list(self._sources):
                for what, value, attributes in source():
                    if what == name:
                        key = tuple(attributes.items())
                        sums[key] = sums.get(key, 0) + value
            return [Observation(value, dict(key)) for key, value in sums.items()]

        return read


telemetry = Telemetry()
"""The one of this process: instruments are made once, however many guards there are."""
