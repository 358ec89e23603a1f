"""Spans that are under way: what has to be noted when one starts, and forgotten when it is gone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import ref

if TYPE_CHECKING:
    from respan_guard.admission import Admission
    from respan_guard.context import Slot
    from respan_guard.otel.dedupe import Seen

__all__ = ["Running"]

_MOST_ABOVE = 100  # how far up a call looks for what it is part of


class Running(ref):  # type: ignore[type-arg]
    """A weak reference to a span that runs, with what was true when it started.

    A span that is never ended (a stream that is dropped) takes this with it when it is collected, so memory holds no
    more than the spans that the app itself holds.

    Attributes:
        key: The span's id.
        trace: The trace's.
        parent: The span around it, if that is one of ours.
        admission: In force where it started.
        slot: Of the request it started in.
        customer: For whom the code worked that started it, by the guard's own word.
        noted: What its attributes said about the customer then.
        begun: Scope, attributes and start (ns) of a span that was known to be a call when it started.
        born: When it started, as a number that only grows.
        died: When it ended; 0 while it runs.
        metered: The model (`model_key`) of a call that the client door saw leave within this span; it records that.
        call: What this span said about a call, once it ended.
        inner: What spans within it said about calls.
    """

    __slots__ = (
        "admission",
        "begun",
        "born",
        "call",
        "customer",
        "died",
        "inner",
        "key",
        "metered",
        "noted",
        "parent",
        "slot",
        "trace",
    )

    key: int
    born: int
    died: int
    trace: int
    metered: str | None
    parent: Running | None
    admission: Admission | None
    slot: Slot | None
    customer: str | None
    noted: dict[str, Any] | None
    begun: tuple[str, dict[str, Any], int] | None
    call: Seen | None
    inner: list[Seen] | None

    def above(self) -> Iterator[Running]:
        """The spans around this one, the nearest first."""
        found, left = self.parent, _MOST_ABOVE
        while found is not None and left:
            yield found
            found = found.parent
            left -= 1

    def open_above(self) -> Iterator[Running]:
        """Those of them that were still open when the one within them began, up to the first that wasn't.

        A worker that is started lazily goes on within a request's span that has long ended: that customer is not its.
        """
        for found in self.above():
            if found.died and found.died < self.born:
                return
            yield found
