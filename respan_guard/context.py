"""Whose work is being done here: one mutable slot, carried by a context variable.

The three doors never import each other; they meet in this slot. It is mutable, because a context
variable set in a dependency's thread, or behind another middleware's task, is not seen outside of it,
while the object that both copies of the context carry is the same.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.trace import Span

    from respan_guard.admission import Admission
    from respan_guard.backends.base import Entry
    from respan_guard.guard import Guard
    from respan_guard.usage import Usage

__all__ = ["Slot", "Witness", "current_slot", "slot_of"]

_MANY = 64


class Slot:
    """What code inside it works for, as far as one guard is asked.

    Args:
        guard: The guard. Another guard's slots are passed over: its limits are its own, and so are its records.
        is_request: Whether it is a request's.
        customer: Named by `on_behalf_of`, without an admission.

    Attributes:
        outer: The slot around it, of whichever guard.
        request: The slot of the request around it (itself, if it is one), or None.
        customer: Named by `on_behalf_of`, without an admission.
        bound: The admission that `await guard.admit(...)` bound to the request, the latest wins; or the block's.
        admissions: Every admission that belongs to a request, in order; all end with it.
        recorded: Whether a door that sees single calls (client, span, by hand) recorded one.
        called: Whether a wrapped client was asked for a call within a request: what is owed for it, that one knows.
        span: The request's own span, if it is recorded.
        costs: What calls within it cost, nano-USD, for that span.
        ended: Whether the request, or the block that names a customer, is over.
        undo: What to do once the request is over.
    """

    __slots__ = (
        "admissions",
        "bound",
        "called",
        "costs",
        "customer",
        "ended",
        "guard",
        "outer",
        "recorded",
        "request",
        "span",
        "undo",
    )

    def __init__(self, guard: Guard, *, is_request: bool = False, customer: str | None = None) -> None:
        self.guard = guard
        self.outer = outer = current_slot.get()
        if outer is not None and outer.outer is not None and outer.outer.over:
            outer.outer = outer.outer.outer  # work that starts work that starts work would keep all slots for ever
        within = slot_of(guard)
        self.request: Slot | None = self if is_request else within and within.request
        self.customer = customer
        self.bound: Admission | None = None
        self.admissions: list[Admission] = []
        self.recorded = False
        self.called = False
        self.ended = False
        self.span: Span | None = None
        self.costs: list[int] | None = None
        self.undo: Sequence[Callable[[], object]] = ()

    @property
    def admission(self) -> Admission | None:
        """The admission in force, or None. An ended admission is nobody's.

        In a request, without one bound to it, those of threads' blocks count, but only if all that are in force agree
        on the customer: right or absent, never somebody else's. A block on an event loop is for its own code.
        """
        if self.bound is not None and not self.bound.ended:
            return self.bound
        if not self.admissions:
            return None
        live = [admission for admission in self.admissions if not admission.ended]
        if any(other.customer_identifier != live[0].customer_identifier for other in live):
            return None
        return next((admission for admission in reversed(live) if admission.scope != "block"), None)

    @property
    def in_force(self) -> Admission | None:
        """The admission of this slot, or else of the request around it.

        Work that outlives an admission within a request does not fall to the request's customer, if that is another.
        """
        if self.customer is not None:
            return None if self.outer is None else self.around(self.customer)
        own = self.admission
        if own is not None or self.request is None or self.request is self:
            return own
        outer = self.request.admission
        if outer is None or self.bound is None:
            return outer
        return outer if outer.customer_identifier == self.bound.customer_identifier else None

    @property
    def customer_identifier(self) -> str | None:
        """For whom code inside works, or None."""
        if self.customer is not None:
            return self.customer
        admission = self.in_force
        return None if admission is None else admission.customer_identifier

    def keep(self, admission: Admission) -> None:
        """Have an admission end with the request, at the latest."""
        if len(self.admissions) >= _MANY:  # a WebSocket that admits each of its messages
            self.admissions[:] = [one for one in self.admissions if not one.ended or one is self.bound]
        self.admissions.append(admission)

    @property
    def over(self) -> bool:
        """Whether nothing is to be found here any more."""
        return self.ended or (self.customer is None and self.admission is None and self.request is not self)

    def around(self, customer: str) -> Admission | None:
        """The admission of that customer that code here runs within; it has counted against the rate."""
        slot: Slot | None = self
        request = self.request
        while slot is not None:
            if slot.guard is self.guard:
                admission = slot.admission
                if admission is not None and admission.customer_identifier == customer:
                    return admission
                if slot is request:
                    return None
            slot = slot.outer
        return None if request is None else request.around(customer)


current_slot: ContextVar[Slot | None] = ContextVar("respan_guard_slot", default=None)


def slot_of(guard: Guard) -> Slot | None:
    """The innermost slot of a guard here, or None."""
    slot = current_slot.get()
    while slot is not None and slot.guard is not guard:
        slot = slot.outer
    return slot


class Witness(Protocol):
    """A door that sees calls from aside, after they were made: spans. The others tell it what they record."""

    def called(self, model: str) -> object:
        """The client door sends a call from here, and will record it. Returns what the call is within."""
        ...

    def saw(self, entry: Entry, within: object = None) -> None:
        """Another door made an entry, of a call within what `called` returned."""
        ...

    def presumed(self, usage: Usage, customer: str, at_ms: int) -> Entry | None:
        """The entry that was made of a call for want of the usage that another door now brings; taken once."""
        ...

    def hand_on(self) -> None:
        """Book what was seen so far and is known well enough."""
        ...

    def settle(self, admission: Admission) -> list[Entry]:
        """An admission ends: what was seen under it is booked now, or returned to be booked before its release."""
        ...
