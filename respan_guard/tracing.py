"""What the guard says about a request on the request's own span. Needs OpenTelemetry's API only.

Attributes: `respan_guard.decision` ("allowed", "refused", "shadow": let in against a limit), `respan_guard.limit` (the
limits that refused), `respan_guard.cost` (USD, once the request is over), and the customer by Respan's name for it. A
refusal is an event `respan_guard.refusal`, too, since a span may see several.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from opentelemetry import context
from opentelemetry.trace import get_current_span

from respan_guard.money import from_nano

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from respan_guard.context import Slot
    from respan_guard.decision import Decision

__all__ = ["CUSTOMER", "ended", "name_customer", "recording_span", "refused", "unname", "untraced"]

logger = logging.getLogger("respan_guard")

CUSTOMER = "respan.customer_params.customer_identifier"
_SUPPRESS = ("suppress_instrumentation", "suppress_http_instrumentation")  # what instrumentations look for


def recording_span() -> Span | None:
    """The span of the work at hand, if it is recorded."""
    span = get_current_span()
    return span if span.is_recording() else None


def name_customer(slot: Slot, decision: Decision) -> None:
    """A request's customer is known, and let in."""
    span = slot.span
    if span is not None:
        span.set_attribute(CUSTOMER, decision.customer_identifier)
        _decided(span, decision)
    if "respan_tracing" in sys.modules:
        undo = _propagate(decision.customer_identifier)
        if undo is not None:
            slot.undo = [*slot.undo, undo]


def unname(slot: Slot, before: Decision | None) -> None:
    """Who was named last is not the request's customer."""
    if slot.undo:
        *slot.undo, undo = slot.undo
        with suppress(Exception):  # as in `ended`
            undo()
    if slot.span is not None:
        slot.span.set_attribute(CUSTOMER, "" if before is None else before.customer_identifier)  # can't be taken back
        if before is not None:
            _decided(slot.span, before)


def refused(span: Span | None, decision: Decision) -> None:
    """A request, or a call within it, was refused."""
    if span is None:
        return
    span.set_attribute(CUSTOMER, decision.customer_identifier)
    _decided(span, decision)
    limits = _limits(decision)
    span.add_event("respan_guard.refusal", {"respan_guard.limit": limits, "respan_guard.reason": decision.reason or ""})


def ended(slot: Slot) -> None:
    """A request is over."""
    for undo in reversed(slot.undo):
        with suppress(Exception):  # in another copy of the context (a dependency's thread) it never was set
            undo()
    slot.undo = ()
    if slot.span is not None and slot.costs:
        slot.span.set_attribute("respan_guard.cost", float(from_nano(sum(slot.costs))))


@contextmanager
def untraced() -> Generator[None]:
    """Keep instrumentations from making spans of what is sent inside: exports of spans and records are no work."""
    current = context.get_current()
    for key in _SUPPRESS:
        current = context.set_value(key, True, current)
    token = context.attach(current)
    try:
        yield
    finally:
        context.detach(token)


def _decided(span: Span, decision: Decision) -> None:
    span.set_attribute(
        "respan_guard.decision", "shadow" if decision.shadow else "allowed" if decision.allowed else "refused"
    )
    if limits := _limits(decision):
        span.set_attribute("respan_guard.limit", limits)


def _limits(decision: Decision) -> list[str]:
    return [state.name for state in decision.violated]


def _propagate(customer: str) -> Callable[[], object] | None:
    """Put the customer into what Respan's own SDK puts on every span that starts from here."""
    factory = sys.modules.get("respan_tracing.utils.span_factory")
    if factory is None:
        return None
    try:
        scope = factory.propagate_attributes(customer_identifier=customer)
        scope.__enter__()
    except Exception:
        logger.debug("Respan's propagation could not be told the customer", exc_info=True)
        return None
    return lambda: scope.__exit__(None, None, None)
