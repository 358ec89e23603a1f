"""Spans that are under way: what has to be noted when one starts, and forgotten when it is gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from weakref import ref

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanContext

    from respan_guard.admission import Admission
    from respan_guard.context import Slot
    from respan_guard.otel.dedupe import Seen

__all__ = ["Running"]

_MOST_ABOVE = 100  # how far up a call looks for what it is part of


_UNSET: dict[str, object] = dict.fromkeys(
    (
        "admission",
        "begun",
        "call",
        "context",
        "customer",
        "given",
        "inner",
        "metered",
        "noted",
        "parent",
        "roof",
        "slot",
    )
) | {"ended": False}


class Running(ref):  # type: ignore[type-arg]
    """A weak reference to a span that runs, with what was true when it started.

    A span that is never ended (a stream that is dropped) takes this with it when it is collected, so memory holds no
    more than the spans that the app itself holds. What is not set reads as None: most spans are no calls, and setting
    a dozen fields would cost them more than all the rest.

    Attributes:
        ids: The span's own.
        parent: The span around it, if that is one of ours.
        admission: In force where it started.
        slot: In force where it started.
        customer: For whom the code worked that started it, by the guard's own word.
        context: OpenTelemetry's, where it started; of calls only.
        given: The baggage where it started, if a processor may have copied it on the span.
        noted: What its attributes said about the customer then.
        begun: Scope, attributes, ids and start (ns) of a span that may be a call, while it runs.
        ended: Whether it is over.
        roof: The first span around it that was over when it started; of calls only.
        metered: The model (`model_key`) of a call that the client door saw leave within this span; it records that.
        call: What this span said about a call, once it ended.
        inner: What spans within it said about calls.
    """

    __slots__ = ("ids", *_UNSET)

    ids: SpanContext
    ended: bool
    roof: Running | None
    metered: str | None
    parent: Running | None
    admission: Admission | None
    slot: Slot | None
    customer: str | None
    context: Context | None
    given: Mapping[str, object] | None
    noted: dict[str, Any] | None
    begun: tuple[str, Mapping[str, Any], SpanContext, int | None] | None
    call: Seen | None
    inner: list[Seen] | None

    if not TYPE_CHECKING:  # a type checker would take any name then

        def __getattr__(self, name: str) -> object:
            try:
                return _UNSET[name]
            except KeyError:
                raise AttributeError(name) from None

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
            if found is self.roof:
                return
            yield found
            if self.context is None:  # it was not known for a call then: the nearest was open, of the others who knows
                return
