"""From sightings to records: each call once, when all that saw it have had the time to say so."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING

from respan_guard.otel.attribution import Attribution
from respan_guard.otel.books import Books
from respan_guard.otel.conventions import MARKERS, UNKNOWN, family_of, is_call
from respan_guard.otel.dedupe import DOOR, Dedupe, Seen
from respan_guard.otel.reading import read

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from respan_guard.admission import Admission
    from respan_guard.backends.base import Entry
    from respan_guard.context import Slot
    from respan_guard.guard import Guard
    from respan_guard.otel.enforcement import Standing
    from respan_guard.otel.running import Running
    from respan_guard.usage import Usage

__all__ = ["Meter"]

logger = logging.getLogger("respan_guard")

_PATIENCE = 2.0  # seconds that a sighting without usage or customer waits for one that has them
_STREAM_PATIENCE = 600.0  # and one whose stream goes on after its span, or within a call's that still runs
_MOST_WAITING = 10_000
_LONGEST = 86_400.0  # seconds that a span's word on how long its call took is believed; NaN never is


class Meter:
    """Turns the spans of LLM calls into usage records. Not safe for threads: whoever drains holds the lock.

    Args:
        guard: Keeps the records.
        attribution: Finds the customer.
        standing: Is told whose spending has changed.
    """

    def __init__(self, guard: Guard, attribution: Attribution, standing: Standing | None = None) -> None:
        self._guard = guard
        self._books = Books(guard, standing)
        self._attribution = attribution
        self._dedupe = Dedupe()
        self._soon: OrderedDict[Seen, None] = OrderedDict()  # both in the order in which patience ends
        self._later: OrderedDict[Seen, None] = OrderedDict()
        self._owed: dict[str, Seen] = {}

    # -- what is seen ------------------------------------------------------------------------------

    def ended(
        self,
        span: ReadableSpan,
        running: Running | None,
        slot: Slot | None,
        at_ms: int,
    ) -> None:
        """Take a span of an LLM call that ended.

        Args:
            span: The span.
            running: What was noted when it started; None if that was not seen.
            slot: In force where it ended, for spans that are handed in where the call was made.
            at_ms: When it ended, by the guard's clock.
        """
        attributes = dict(span.attributes or {})  # a plain one: it is read a hundred times
        context = span.get_span_context()
        if context is None or not is_call(attributes) or not self._dedupe.is_new(context.trace_id, context.span_id):
            return
        scope = span.instrumentation_scope.name if span.instrumentation_scope is not None else ""
        family = family_of(scope, attributes)
        status = span.status.status_code.name
        kinds = [
            str((event.attributes or {}).get("exception.type")) for event in span.events if event.name == "exception"
        ]
        reading = read(attributes, family, status, span.status.description, kinds)
        if not reading.made:
            return
        is_log = family.ends_in_log and attributes.get("logfire.span_type") == "log"
        usage = reading.usage
        start, end = span.start_time or 0, span.end_time or 0
        if is_log and isinstance(took := attributes.get("duration"), (int, float)) and 0 <= took <= _LONGEST:
            start = end - int(took * 1e9)
        usage.trace_id, usage.span_id = f"{context.trace_id:032x}", f"{context.span_id:016x}"
        usage.latency_ms = max(0, (end - start) // 1_000_000)
        lacking = [kind for kind in family.lacks if not getattr(usage, kind)]
        if (
            usage.cache_write_tokens
            and not usage.cache_write_1h_tokens
            and family.layer != "native"
            and not reading.whole
        ):
            lacking.append("cache_write_1h_tokens")  # they cost more, and only Anthropic's own spans tell them apart
        if lacking and reading.complete:
            usage.metadata = {"not_reported": lacking}
        if (linked := attributes.get("respan.gateway.log_id")) is not None:
            usage.metadata = {**(usage.metadata or {}), "respan_log_id": str(linked)[:100]}
        admission = running.admission if running is not None else None
        named = running.customer if running is not None else None
        if running is None and family.injects and slot is not None:
            admission = slot.in_force
            named = slot.customer_identifier
        customer = self._attribution.find(running, attributes, named)
        if admission is not None and admission.customer_identifier != customer:
            admission = None  # the order of sources was changed, and another one's word counts
        seen = Seen(
            usage,
            reading.complete,
            f"{scope or family.name}#log" if is_log else scope or family.name,
            family,
            start,
            end,
            customer,
            admission,
            request_of(running.slot if running is not None else slot),
            running,
            estimate=reading.estimate,
            max_output=reading.max_output,
            at_ms=at_ms,
            awaits_log=family.ends_in_log and not is_log and not reading.complete and status != "ERROR",
        )
        # The client door saw this call leave, within this span: it records what came back, or that nothing did.
        seen.recorded = running is not None and running.metered == seen.key and bool(seen.key)
        if customer is not None and (profile := self._attribution.profile(running, attributes)):
            self._books.learn(customer, profile)
        self._take(seen)

    def lost(self, running: Running, at_ms: int) -> None:
        """Take a span that was known to be a call when it started, and that nobody can end any more."""
        if running.begun is None:
            return
        scope, given, context, began = running.begun
        start = began or 0
        attributes, running.begun = dict(given), None
        if not is_call(attributes) or not self._dedupe.is_new(context.trace_id, context.span_id):
            return
        usage = read(attributes, family_of(scope)).usage
        usage.status, usage.metadata = "error", {"span": "never ended"}
        usage.trace_id, usage.span_id = f"{context.trace_id:032x}", f"{context.span_id:016x}"
        customer = self._attribution.find(running, attributes, running.customer)
        seen = Seen(
            usage,
            False,
            scope,
            family_of(scope),
            start,
            start,
            customer,
            running.admission if running.customer == customer else None,
            request_of(running.slot),
            running,
            at_ms=at_ms,
            unended=True,
        )
        seen.recorded = running.metered == seen.key and bool(seen.key)
        self._take(seen)

    def door(self, entry: Entry, running: Running | None) -> None:
        """Take what another door recorded: spans of the same call are none of their own.

        Args:
            entry: What it recorded.
            running: Stands for the call among spans, if it is known within which it was made.
        """
        usage = entry.usage
        end = entry.at_ms * 1_000_000
        seen = Seen(
            usage,
            entry.kind == "usage",
            DOOR,
            UNKNOWN,
            end - (usage.latency_ms or 0) * 1_000_000,
            end,
            entry.customer or None,
            running=running,
            recorded=True,
            door=entry.source,
        )
        found = self._dedupe.find(seen)
        if found is None:
            self._dedupe.add(seen)
            return
        self._forget(found)
        found.recorded = True
        found.merged.add(DOOR)
        self._dedupe.know(found, usage)
        self._dedupe.place(found, running)

    def presumed(self, usage: Usage, customer: str, at_ms: int) -> Entry | None:
        """The entry that was presumed of a call whose usage another door brings, by its response id. From any thread.

        Args:
            usage: What that door was told.
            customer: Whose the call is.
            at_ms: When it ended.
        """
        at = at_ms * 1_000_000
        found = self._dedupe.same_reply(Seen(usage, True, DOOR, UNKNOWN, at, at, customer or None))
        if found is None or (entry := found.presumed) is None or entry.customer != customer:
            return None
        found.presumed = None
        return entry

    # -- what becomes of it ------------------------------------------------------------------------

    def _take(self, seen: Seen) -> None:
        found = self._dedupe.find(seen)
        if found is not None:
            self._merge(found, seen)
            return
        self._dedupe.add(seen)
        if seen.recorded:
            return
        if seen.complete and seen.customer is not None:
            self._books.record(seen)
            return
        now = self._guard.clock.monotonic()
        seen.until = now + _STREAM_PATIENCE
        seen.due = now + (_STREAM_PATIENCE if seen.awaits_log else _PATIENCE)
        if not seen.complete and seen.admission is not None and not seen.admission.ended:
            self._owed[seen.admission.id] = seen
        waiting = self._later if seen.awaits_log else self._soon
        waiting[seen] = None
        if len(waiting) > _MOST_WAITING:
            self._settle(next(iter(waiting)))

    def _merge(self, found: Seen, seen: Seen) -> None:
        """Take a second sighting of a call."""
        found.merged.add(seen.scope)
        found.merged |= seen.merged
        found.start, found.end = min(found.start, seen.start), max(found.end, seen.end)
        self._dedupe.know(found, seen.usage)
        if seen.recorded and not found.recorded:  # by the client door
            found.recorded = True
            self._forget(found)
        self._dedupe.place(found, seen.running)
        if found.recorded:
            if found.presumed is not None and seen.complete:
                self._books.revise(found, seen)
            return
        if found.customer is None:
            found.customer, found.admission, found.slot = seen.customer, seen.admission, found.slot or seen.slot
        elif found.admission is None and seen.customer == found.customer:
            found.admission = seen.admission
        if seen.complete and not found.complete:
            ids = found.usage.response_id
            found.usage, found.complete = seen.usage, True
            found.usage.response_id = found.usage.response_id or ids
        elif not found.complete:
            found.estimate = found.estimate or seen.estimate
            found.usage.response_id = found.usage.response_id or seen.usage.response_id
        if found.complete and found.customer is not None:
            self._forget(found)
            self._books.record(found)

    def due(self) -> float | None:
        """Seconds until the next sighting has waited long enough; None if none waits."""
        firsts = [next(iter(waiting)).due or 0.0 for waiting in (self._soon, self._later) if waiting]
        return max(0.0, min(firsts) - self._guard.clock.monotonic()) if firsts else None

    def settle_all(self) -> bool:
        """Wait no longer: record all, as far as they are known. True when done."""
        self.settle(all_of_them=True)
        return True

    def settle(self, *, all_of_them: bool = False) -> None:
        """Record those that have waited long enough, as far as they are known."""
        if not self._soon and not self._later:
            return
        now = self._guard.clock.monotonic()
        for waiting in (self._soon, self._later):
            while waiting and (all_of_them or (next(iter(waiting)).due or 0.0) <= now):
                seen = next(iter(waiting))
                if not all_of_them and waiting is self._soon and now < seen.until and _may_be_told(seen):
                    seen.due = now + _PATIENCE
                    waiting.move_to_end(seen)
                else:
                    self._settle(seen)

    def owed_by(self, admission: Admission) -> list[Entry]:
        """What to book before an admission's hold is released, for calls under it that nobody told the usage of."""
        seen = self._owed.get(admission.id)
        if seen is None:
            return []
        self._owed.pop(admission.id)
        if seen.recorded or seen.estimate is not None or self._guard.settings.missing_usage != "hold":
            return []
        if not admission.free:
            return []
        self._forget(seen)
        return [self._books.owe(admission, seen)]

    def _forget(self, seen: Seen) -> None:
        """Wait for it no longer."""
        seen.due = None
        self._soon.pop(seen, None)
        self._later.pop(seen, None)
        if seen.admission is not None and self._owed.get(seen.admission.id) is seen:
            self._owed.pop(seen.admission.id)

    def _settle(self, seen: Seen) -> None:
        self._forget(seen)
        if seen.recorded:
            return
        if seen.complete:
            self._books.record(seen)
        else:
            self._books.presume(seen)


def _may_be_told(seen: Seen) -> bool:
    """Whether a span around still runs that is a call's, as far as it says: it may know usage and customer."""
    if seen.running is None:
        return False
    for above in seen.running.above():
        begun = above.begun
        if not above.ended and begun is not None and (MARKERS.isdisjoint(begun[1]) or is_call(begun[1])):
            return True
    return False


def request_of(slot: Slot | None) -> Slot | None:
    """The slot of the request around."""
    return None if slot is None else slot.request
