"""Spans that are under way: what has to be noted when one starts, and forgotten when it is gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import ref

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext

    from respan_guard.admission import Admission
    from respan_guard.context import Slot
    from respan_guard.otel.dedupe import Seen

__all__ = ["Around", "Running", "attributes_of"]

_MOST_ABOVE = 100  # how far up a call looks for what it is part of
Around: TypeAlias = tuple[Mapping[str, Any], Mapping[str, Any] | None, Mapping[str, object] | None]
"""What a span around says about the customer, what it said when it started, and the baggage then."""


_UNSET: dict[str, object] = dict.fromkeys(
    (
        "admission",
        "around",
        "begun",
        "call",
        "context",
        "customer",
        "given",
        "inner",
        "metered",
        "noted",
        "parent",
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
        around: What the spans around it that were open said about the customer then, the nearest first.
        begun: Scope, attributes, ids and start (ns) of a span that may be a call, while it runs.
        ended: Whether it is over.
        metered: The model (`model_key`) of a call that the client door saw leave within this span; it records that.
        call: What this span said about a call, once it ended.
        inner: What spans within it said about calls.
    """

    __slots__ = ("ids", *_UNSET)

    ids: SpanContext
    ended: bool
    metered: str | None
    parent: Running | None
    admission: Admission | None
    slot: Slot | None
    customer: str | None
    context: Context | None
    given: Mapping[str, object] | None
    noted: dict[str, Any] | None
    around: Sequence[Around] | None
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


def attributes_of(span: ReadableSpan) -> Mapping[str, Any]:
    """A span's attributes: the SDK's own dict, if it is there.

    To look through the public mapping takes as long as all else that is done at a start, and of a span that runs it
    takes a lock.
    """
    try:
        return span._attributes._dict  # type: ignore[union-attr, no-any-return]
    except AttributeError:
        return span.attributes or {}
