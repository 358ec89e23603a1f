"""The span processor: sees spans start and end, and hands those of LLM calls on.

What runs in `on_start` and `on_end` waits for nothing and takes no lock; see `inbox` for why.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from opentelemetry import baggage, trace
from opentelemetry.context import get_current
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.trace import get_current_span

from respan_guard.clock import SystemClock
from respan_guard.context import current_slot, slot_of
from respan_guard.errors import ConfigurationError, GuardError, StorageUnavailable
from respan_guard.guard import Guard
from respan_guard.otel.attribution import CUSTOMER_SOURCES, Attribution, propagated_by_respan
from respan_guard.otel.conventions import MARKERS, UNKNOWN, family_of, is_call
from respan_guard.otel.enforcement import Standing
from respan_guard.otel.inbox import Inbox
from respan_guard.otel.meter import Meter
from respan_guard.otel.reading import model_key
from respan_guard.otel.running import Running, attributes_of
from respan_guard.otel.sampler import warn_of_sampling

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import Span
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext

    from respan_guard.admission import Admission
    from respan_guard.backends.base import Entry
    from respan_guard.usage import Usage

__all__ = ["GuardSpanProcessor"]

logger = logging.getLogger("respan_guard")

_HELP = 256  # spans that the end of a request reads at most
_MOST_SCOPES = 4096
_CROWD = 10_000  # records that wait for storage, beyond which spans wait, too
# The SDK's own fields are read, not the properties around them: these calls would take a third of the time here.
for _field in ("_context", "_parent", "_attributes", "_instrumentation_scope"):
    if not hasattr(ReadableSpan("probe"), _field):  # said at once, rather than at the first span of an app that runs
        raise ConfigurationError(f"this opentelemetry-sdk has no ReadableSpan.{_field}; install one from 1.30 to 1.45")


class GuardSpanProcessor(SpanProcessor):
    """Turns the spans of LLM calls into usage records, each call once, whichever instrumentations see it.

    `provider.add_span_processor(GuardSpanProcessor(guard))`, as the last one, so that it sees what others set.

    Args:
        guard: Keeps the records.
        customer_sources: Where the customer is looked for, in this order; see
            `respan_guard.otel.attribution.CUSTOMER_SOURCES`.
        trust_baggage: Whether W3C baggage may name the customer. Any client can send it in a header.
        enforce: Experimental: refuse a call whose customer is known to be over its limits, by an exception at the start
            of its span. Which instrumentations let it through is in `docs/otel.md`.

    Raises:
        ConfigurationError: An argument can't work.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        customer_sources: Sequence[str] = CUSTOMER_SOURCES,
        trust_baggage: bool = False,
        enforce: bool = False,
    ) -> None:
        if not isinstance(guard, Guard):
            raise ConfigurationError(f"guard must be a Guard, got {guard!r}")
        self.guard = guard
        self._attribution = Attribution(customer_sources, trust_baggage=trust_baggage)
        self._switch = guard.switch
        self._standing = Standing(guard) if enforce else None
        self._running: dict[int, Running] = {}
        self._scopes: dict[int, str | None] = {}
        self._met: list[InstrumentationScope | None] = []
        self._peers: Any = None
        self._copied: bool | None = None  # None: the processors beside this one were not looked at yet
        self._parents: frozenset[int] = frozenset()
        self._looked = False
        self._meter: Meter
        self._inbox: Inbox
        self._forget = self._gone
        self._begin()
        first = guard.recorder.witness
        if isinstance(first, GuardSpanProcessor):  # of another tracer provider, which may see the same calls
            self._running, self._meter, self._inbox = first._running, first._meter, first._inbox
            self._ended = self._meter.ended
        else:
            guard.recorder.witness = self
        _all.add(self)
        if (provider := getattr(trace, "_TRACER_PROVIDER", None)) is not None:  # to ask for it might make one
            warn_of_sampling(provider)

    # -- what the SDK calls ------------------------------------------------------------------------

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Note whose work the span is; with `enforce`, stop a call that must not be made.

        Raises:
            LimitExceeded: With `enforce`, the customer is over a limit.
        """
        if self._switch.off:
            return
        running = Running(span, self._forget)
        running.ids = ids = span._context  # type: ignore[assignment] # of a span that runs it is there
        around = span._parent
        parent = None
        if (
            around is not None
            and (parent := self._running.get(around[1])) is not None
            and (parent.ids is around or (parent := self._find(around)) is not None)
        ):
            running.parent = parent
        slot = current_slot.get()
        if slot is not None and slot.guard is not self.guard:
            slot = slot_of(self.guard)
        if slot is not None:
            running.slot = slot
            if (customer := slot.customer) is not None:
                running.customer = customer
                if slot.outer is not None and (admission := slot.around(customer)) is not None:
                    running.admission = admission
            elif (admission := slot.in_force) is not None:
                running.admission, running.customer = admission, admission.customer_identifier
        elif parent is not None and parent.customer is not None:
            # Code without the context, a thread say, that was given the span.
            admission = parent.admission
            if admission is None or not admission.ended:  # an ended admission is nobody's
                running.customer, running.admission, running.slot = parent.customer, admission, parent.slot
        scope = span._instrumentation_scope
        try:
            known = self._scopes[id(scope)]
        except KeyError:
            known = self._meet(scope, span)
        may_be_call = known is not None or self._standing is not None
        if may_be_call or self._copied is not False:
            self._note_given(running, span, parent_context)
        if may_be_call:
            self._inbox.make_way()
            self._start_call(running, span, known, parent_context)
        elif parent is not None:  # it may yet say that it is a call: its parent's word is noted, at little cost
            self._attribution.note_around(running, 1)
        self._running[ids[1]] = running  # type: ignore[index]

    def on_end(self, span: ReadableSpan) -> None:
        """Hand the span on if it is an LLM call. Waits for nothing and never raises."""
        try:
            span_id = span._context[1]  # type: ignore[index]
            running = self._running.pop(span_id, None)
            if running is not None:
                running.ended = True
            if MARKERS.isdisjoint(attributes_of(span)) or self._switch.off:
                return
            if self._parents and span_id in self._parents:
                return  # it began before a fork: a call that the parent began is the parent's to book
            if running is not None:
                running.begun = None
            slot = slot_of(self.guard) if running is None else None
            self._inbox.put((self._ended, span, running, slot, self.guard.now_ms()))
        except Exception:
            logger.exception("a span could not be taken")

    def shutdown(self) -> None:
        """Hand on what is there; spans that end later are still taken."""
        self.force_flush()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Store the records of all spans that ended.

        Returns:
            Whether they are stored. On the event loop that opened the guard it can't wait for that loop: they are then
            in the guard's inbox (`await guard.flush()` waits).
        """
        if self._switch.off:
            return True
        if not self._met:
            warn_of_sampling()
        if not self._inbox.do(self._meter.settle_all, timeout=timeout_millis / 1000):
            return False
        clock = SystemClock()  # of the caller's patience, also where the guard's own stands still
        until = clock.monotonic() + timeout_millis / 1000
        while True:
            try:
                self.guard.sync.flush()
            except StorageUnavailable:
                if clock.monotonic() >= until:
                    return False
                time.sleep(0.05)
            except (GuardError, RuntimeError) as error:
                logger.debug("records of spans can't be waited for here: %s", error)
                return False
            else:
                return True

    # -- what the guard and its other doors call ---------------------------------------------------

    def called(self, model: str) -> Running | None:
        """The client door sends a call, within the current span: that one is not to be recorded again.

        Returns:
            What stands for the call among spans, as if it were one within the current span.
        """
        span = get_current_span().get_span_context()
        if not span.is_valid or (around := self._find(span)) is None:
            return None
        around.metered = model_key(model)
        running = Running(self)
        running.parent = around
        return running

    def saw(self, entry: Entry, within: object = None) -> None:
        """Another door made an entry, of a call that `called` was told of if that door is a client."""
        if not self._looked and not self._met:  # where all spans are dropped none is ever met
            self._looked = True
            warn_of_sampling()
        if entry.source not in ("span", "api") and entry.kind != "adjustment":
            self._inbox.put((self._meter.door, entry, within if isinstance(within, Running) else None))

    def presumed(self, usage: Usage, customer: str, at_ms: int) -> Entry | None:
        """The entry that was made of a span for want of the usage that another door now brings; taken once."""
        return self._meter.presumed(usage, customer, at_ms)

    def hand_on(self) -> None:
        """Book what has ended; calls that lack usage or customer still wait for a sighting that has them."""
        self._inbox.do(lambda: None, most=_HELP)

    def settle(self, admission: Admission) -> list[Entry]:
        """An admission ends: book what spans under it told, before its hold is released.

        Returns:
            What to book besides, for calls that nobody told the usage of.
        """
        return self._inbox.do(lambda: self._meter.owed_by(admission), most=_HELP) or []

    def _find(self, context: SpanContext) -> Running | None:
        """A span of ours that runs. What came by a `traceparent` header is a client's word, whatever id it names."""
        running = self._running.get(context.span_id)
        if running is None or context.is_remote or running.ids.trace_id != context.trace_id:
            return None
        return running

    def _begin(self) -> None:
        """Begin with nothing to do; in a forked child, what waits is the parent's."""
        self._meter = Meter(self.guard, self._attribution, self._standing)
        self._inbox = Inbox(self._meter.settle, self._meter.due, self._crowded)
        self._ended = self._meter.ended

    def _crowded(self) -> bool:
        try:
            home = self.guard.lane().home
        except RuntimeError:  # there is no home yet, and no thread to be had for one
            return False
        return home is not None and home.waiting > _CROWD

    def _gone(self, running: Running) -> None:
        """A span was collected. If it had not ended, nobody will end it."""
        if self._running.pop(running.ids.span_id, None) is running and running.begun is not None:
            self._inbox.put((self._meter.lost, running, self.guard.now_ms()))

    # -- the start of a call -----------------------------------------------------------------------

    def _meet(self, scope: InstrumentationScope | None, span: Span) -> str | None:
        """Look a scope up that was not seen before: its name, if it may tell of calls."""
        if len(self._scopes) > _MOST_SCOPES:
            self._scopes, self._met = {}, []
        self._met.append(scope)  # while it is here nobody else has its id
        name = "" if scope is None else str(scope.name)
        found = self._scopes[id(scope)] = None if family_of(name) is UNKNOWN else name
        warn_of_sampling(sampler=getattr(span, "_sampler", None))  # which need not be the global one
        return found

    def _note_given(self, running: Running, span: Span, parent_context: Context | None) -> None:
        """Note the baggage, if one of the processors beside this one may copy it on spans as they start."""
        peers = getattr(getattr(span, "_span_processor", None), "_span_processors", None)
        if self._copied is None or peers is not self._peers:
            idle = {kind.on_start for kind in (SpanProcessor, SimpleSpanProcessor, BatchSpanProcessor, type(self))}
            self._peers, self._copied = peers, peers is None or any(type(peer).on_start not in idle for peer in peers)
        if self._copied:
            running.given = baggage.get_all(parent_context) or None

    def _start_call(self, running: Running, span: Span, scope: str | None, parent_context: Context | None) -> None:
        """Note what a call may need to be known by; all reading is left to the thread that drains."""
        try:
            attributes = attributes_of(span)
            running.context = parent_context if parent_context is not None else get_current()
            noted = self._attribution.noted
            if not noted.isdisjoint(attributes):
                running.noted = {name: attributes[name] for name in list(attributes) if name in noted}
            if "respan_tracing.utils.span_factory" in sys.modules and (said := propagated_by_respan()):
                kept = {name: value for name, value in said.items() if name in noted}
                running.noted = kept | (running.noted or {})
            self._attribution.note_around(running)
            if scope is not None:
                running.begun = (scope, attributes, span.context, span.start_time)
        except Exception:
            logger.exception("the start of a span could not be read")
            return
        if self._standing is not None and running.admission is None and is_call(attributes):
            customer = self._attribution.find(running, attributes, running.customer)
            if customer is not None:
                self._standing.check(customer)


_all: weakref.WeakSet[GuardSpanProcessor] = weakref.WeakSet()


def _exit_all() -> None:
    for processor in list(_all):
        with suppress(Exception):
            processor._inbox.exiting = True
            processor.force_flush(5_000)


def _begin_all() -> None:
    for processor in list(_all):
        if processor.guard.recorder.witness is processor:
            processor._begin()
            for running in list(processor._running.values()):  # they still say whose the work within them is
                running.begun = None
    for processor in list(_all):
        first = processor.guard.recorder.witness
        if isinstance(first, GuardSpanProcessor):
            processor._meter, processor._inbox, processor._ended = first._meter, first._inbox, first._ended
            processor._parents = processor._parents.union(first._running)


atexit.register(_exit_all)  # behind that of `respan_guard.homes`, hence before it: what is posted is stored
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_all)
