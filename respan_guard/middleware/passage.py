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
    """One request on its way through the door; the innermost guard's is the value of `scope["respan_guard"]`.

    Args:
        guard: Whose request it is.
        around: The value that the scope had: the passages of other guards, or one that is over.

    Attributes:
        guard: Whose request it is. A second middleware of the same guard joins the first.
        slot: What the app's admissions are bound to.
        admitted: Whether a door has admitted it.
        body: Its body, if a door has read it.
        capture: What reads the response.
        outer: The passage around it, another guard's.
        refused: The decision to show in the headers instead of an admission's.
    """

    __slots__ = ("admitted", "body", "capture", "guard", "outer", "refused", "slot")

    def __init__(self, guard: Guard, around: Passage | None = None) -> None:
        while around is not None and around.slot.ended:
            around = around.outer  # a scope that is used again and again would keep all of them
        self.outer: Passage | None = around
        self.guard = guard
        self.slot: Slot = Slot(guard, is_request=True)
        if (span := recording_span()) is not None:
            self.slot.span, self.slot.costs = span, []
        self.admitted = False
        self.body: RequestBody | None = None
        self.capture: Capture | None = None
        self.refused: Decision | None = None

    def of(self, guard: Guard) -> Passage | None:
        """The guard's, of this and those around it, if still under way: a scope may be used again, for a second try."""
        passage: Passage | None = self
        while passage is not None and (passage.guard is not guard or passage.slot.ended):
            passage = passage.outer
        return passage

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
            sent = capture.sent(failure, called=self.slot.called)
            seen = capture.seen if sent and usage is None else 0
            self.guard.admissions.end(self.slot, usage, capture.call(), sent=sent, seen=seen)


class Gone(Exception):
    """The client left while its request was read."""


class RefusedHere(Exception):
    """The door itself said no, before the app was asked."""

    def __init__(self, error: GuardError) -> None:
        super().__init__(error)
        self.error = error
