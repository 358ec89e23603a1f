"""What is measured of the engine's work, where somebody measures; see `respan_guard.telemetry`."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from respan_guard.backends.base import Recorded
from respan_guard.errors import BackendError, CustomerUnknown, LimitExceeded, UnpricedModel
from respan_guard.telemetry import telemetry

if TYPE_CHECKING:
    from respan_guard.admission import Admission
    from respan_guard.backends.base import Entry, Outcome
    from respan_guard.clock import Clock
    from respan_guard.home import Home
    from respan_guard.homes import Homes
    from respan_guard.renewal import Renewer
    from respan_guard.telemetry import Reading

__all__ = ["Gauges", "observe_entry", "observed"]

_SOURCES = frozenset({"manual", "response", "transport", "span", "presumed", "api"})


async def observed(asking: Coroutine[Any, Any, Admission], clock: Clock) -> Admission:
    """Measure an admission's decision."""
    began = clock.monotonic()
    outcome, reason = "error", ""
    try:
        admission = await asking
        outcome, reason = _of(admission)
    except LimitExceeded as refused:
        outcome, reason = "refused", refused.decision.reason or ""
        raise
    except BackendError:
        reason = "storage_unavailable"
        raise
    except UnpricedModel:
        outcome, reason = "refused", "unpriced"
        raise
    except CustomerUnknown:
        outcome, reason = "refused", "unknown"
        raise
    except Exception as error:
        reason = type(error).__name__
        raise
    except BaseException:
        outcome = "cancelled"
        raise
    finally:
        telemetry.decided(outcome, reason, clock.monotonic() - began)
    return admission


def _of(admission: Admission) -> tuple[str, str]:
    decision = admission.decision
    if decision.shadow:
        return "shadow", decision.reason or ""
    return ("allowed", "") if admission.stored or not admission.id else ("allowed", "storage_unavailable")


def observe_entry(entry: Entry, outcome: Outcome | None) -> None:
    """Count what was booked: once, however often it was sent."""
    if isinstance(outcome, Recorded) and outcome.new:
        source = entry.source if entry.source in _SOURCES else "other"
        telemetry.booked(entry.cost, entry.kind, source)


class Gauges:
    """What one guard has at the moment. Read when metrics are collected, at no cost in between."""

    def __init__(self, homes: Homes, renewer: Renewer) -> None:
        self._homes = homes
        self._renewer = renewer
        telemetry.look()
        telemetry.observe(self)

    def __call__(self) -> Iterator[Reading]:
        """The readings."""
        live = list(self._renewer.live)
        yield "respan_guard.admission.active", len(live), {}
        yield "respan_guard.admission.held", sum(admission.unspent for admission in live), {}
        yield "respan_guard.journal.depth", self._homes.journalled, {}
        for home in self._homes.open_homes():
            yield "respan_guard.storage.queue", home.waiting, {}
            yield from _breakers(home)


def _breakers(home: Home) -> Iterator[Reading]:
    yield "respan_guard.storage.breaker.open", int(home.breaker.is_open), {"respan_guard.storage": "main"}
    if (rates := home.rates) is not None:
        yield "respan_guard.storage.breaker.open", int(rates.breaker.is_open), {"respan_guard.storage": "rates"}
