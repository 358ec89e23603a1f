"""One request on its way through the door."""

from __future__ import annotations

from typing import TYPE_CHECKING

from respan_guard.context import Slot
from respan_guard.errors import GuardError
from respan_guard.tracing import recording_span

if TYPE_CHECKING:
    from respan_guard.decision import Decision
    from respan_guard.guard import Guard
    from respan_guard.middleware.body import RequestBody
    from respan_guard.middleware.capture import Capture

__all__ = ["Gone", "Passage", "RefusedHere"]


class Passage:
    """One request on its way through the door; the value of `scope["respan_guard"]`.

    Attributes:
        guard: Whose request it is. A second middleware of the same guard joins the first.
        slot: What the app's admissions are bound to.
        admitted: Whether a door has admitted it.
        body: Its body, if a door has read it.
        capture: What reads the response.
        refused: The decision to show in the headers instead of an admission's.
    """

    __slots__ = ("admitted", "body", "capture", "guard", "refused", "slot")

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.slot = Slot(guard, is_request=True)
        if (span := recording_span()) is not None:
            self.slot.span, self.slot.costs = span, []
        self.admitted = False
        self.body: RequestBody | None = None
        self.capture: Capture | None = None
        self.refused: Decision | None = None

    def is_of(self, guard: Guard) -> bool:
        """Whether this is the guard's, and still under way: a scope may be used again, for a second try."""
        return self.guard is guard and not self.slot.ended

    def give_up(self) -> None:
        """Read no more of the response: a fault of ours is being handled."""
        if self.capture is not None:
            self.capture.give_up()

    def end(self, failure: BaseException | None) -> None:
        """End the request, exactly once. Waits for nothing, so no cancellation can come in between."""
        capture = self.capture
        if capture is None or capture.silent:
            self.guard.admissions.end(self.slot)
        else:
            usage = capture.usage()
            self.guard.admissions.end(self.slot, usage, capture.call(), sent=capture.sent(failure))


class Gone(Exception):
    """The client left while its request was read."""


class RefusedHere(Exception):
    """The door itself said no, before the app was asked."""

    def __init__(self, error: GuardError) -> None:
        super().__init__(error)
        self.error = error
