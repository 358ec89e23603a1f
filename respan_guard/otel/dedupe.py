"""Exactly once: which sightings are of one call.

One call may be seen by an SDK's instrumentation, by a framework's around it, by the SDK's own spans and by the guard's
other doors. The rules, each tried only where those before say nothing:

1. the same span, ended twice
2. the same response id, if it is long enough to be unique
3. one span is around the other, and nothing says that they are two calls
4. two scopes that are known to see the same calls (`Family.layer`), same model, same tokens, overlapping in time, and
   nothing says that they are two calls; at most one of each scope. This rule may err, so it is counted.

They were checked against the spans of real instrumentations (`tests/data/otel`), alone and two at a time.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opentelemetry import metrics

from respan_guard.otel.conventions import Family
from respan_guard.otel.reading import model_key
from respan_guard.recorder import response_entry_id
from respan_guard.usage import Usage

if TYPE_CHECKING:
    from respan_guard.admission import Admission
    from respan_guard.context import Slot
    from respan_guard.otel.running import Running

__all__ = ["Dedupe", "Seen"]

_MOST_IDS = 16_384
_MOST_MODELS = 64
_MOST_RECENT = 128  # calls of one model
_MOST_INNER = 64
_REMEMBERED_NS = 120 * 10**9
_SLACK_NS = 20 * 10**6  # spans of one call begin and end some moments apart
_LOG_SLACK_NS = 2 * 10**9  # from a request's end until what it answered begins to be read
DOOR = "respan_guard"
"""The scope under which calls stand here that another door of the guard recorded."""


@dataclass(slots=True, eq=False)
class Seen:
    """One sighting of a call.

    Attributes:
        usage: What it says was consumed.
        complete: Whether that is all of it.
        scope: Who saw it.
        family: The row of that scope.
        start: Nanoseconds since the epoch.
        end: Likewise.
        customer: Whose it is, if that is known.
        admission: Under which it was made.
        slot: Of the request it was made in.
        running: What was noted when its span started.
        recorded: Whether a record of the call exists.
        estimate: Tokens by the length of its texts.
        max_output: The cap on output that was asked for.
        at_ms: When it ended, by the guard's clock.
        due: When to wait no longer for a sighting that knows more, by the guard's monotonic clock.
        merged: Scopes of the sightings that were taken for this call.
        awaits_log: Its stream goes on, and another span will tell of its end; see `Family.ends_in_log`.
        key: What the names of its model have in common.
    """

    usage: Usage
    complete: bool
    scope: str
    family: Family
    start: int
    end: int
    customer: str | None = None
    admission: Admission | None = None
    slot: Slot | None = None
    running: Running | None = None
    recorded: bool = False
    estimate: tuple[int, int] | None = None
    max_output: int | None = None
    at_ms: int = 0
    due: float | None = None
    merged: set[str] = field(default_factory=set)
    awaits_log: bool = False
    key: str = ""

    def __post_init__(self) -> None:
        self.key = model_key(self.usage.model or self.usage.response_model or "")

    def let_go(self) -> None:
        """It is booked. It is remembered for minutes, which must not keep requests and their spans alive."""
        self.admission = self.slot = None
        running = self.running
        if running is not None:
            running.admission = running.slot = running.context = running.noted = running.given = None


class Dedupe:
    """Remembers the calls of the last minutes. Not safe for threads: whoever drains holds the lock."""

    def __init__(self) -> None:
        self._spans: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._ids: OrderedDict[str, Seen] = OrderedDict()
        self._recent: OrderedDict[str, deque[Seen]] = OrderedDict()
        self._merged = metrics.get_meter("respan_guard").create_counter(
            "respan_guard.spans.merged",
            unit="{span}",
            description="Spans taken for the same LLM call as another sighting because model, tokens and time agree",
        )

    def is_new(self, trace_id: int, span_id: int) -> bool:
        """Whether a span has not been ended before; some are replayed."""
        key = (trace_id, span_id)
        if key in self._spans:
            return False
        self._spans[key] = None
        if len(self._spans) > _MOST_IDS:
            self._spans.popitem(last=False)
        return True

    def find(self, seen: Seen) -> Seen | None:
        """The sighting, of those before, that is of the same call."""
        key = _unique_id(seen.usage)
        if key is not None and (found := self._ids.get(key)) is not None and found is not seen:
            return found
        return self._around(seen) or self._beside(seen)

    def add(self, seen: Seen) -> None:
        """Remember a sighting of a call that no other was of."""
        self.know(seen)
        recent = self._recent.get(seen.key)
        if recent is None:
            recent = self._recent[seen.key] = deque(maxlen=_MOST_RECENT)
            if len(self._recent) > _MOST_MODELS:
                self._recent.popitem(last=False)
        else:
            self._recent.move_to_end(seen.key)
        recent.append(seen)
        while recent and recent[0].end < seen.end - _REMEMBERED_NS and recent[0].due is None:
            recent.popleft()
        running = seen.running
        if running is not None:
            running.call = seen
            for above in running.above():
                if above.inner is None:
                    above.inner = []
                if len(above.inner) < _MOST_INNER:
                    above.inner.append(seen)

    def know(self, seen: Seen, usage: Usage | None = None) -> None:
        """Remember a response id, of the sighting's own or of another of the same call."""
        key = _unique_id(usage or seen.usage)
        if key is not None:
            self._ids.setdefault(key, seen)
            if len(self._ids) > _MOST_IDS:
                self._ids.popitem(last=False)

    def _around(self, seen: Seen) -> Seen | None:
        """A call of a span within this one, or around it."""
        running = seen.running
        if running is None:
            return None
        inner = running.inner
        if inner:
            found = next((other for other in reversed(inner) if not _apart(seen, other)), None)
            if found is not None:
                return found
            if any(_strangers(seen, other) for other in inner):
                return None
            sums = [sum(other.usage.input_tokens for other in inner), sum(other.usage.output_tokens for other in inner)]
            if seen.complete and _near(sums, [seen.usage.input_tokens, seen.usage.output_tokens], len(inner)):
                return inner[-1]
        for above in running.above():
            if above.call is not None and not _apart(seen, above.call):
                return above.call
        return None

    def _candidates(self, seen: Seen) -> Iterator[Seen]:
        """Calls that may be the same, the latest first: of the same model, or of none that is known."""
        if seen.key:
            yield from reversed(self._recent.get(seen.key, ()))
            yield from reversed(self._recent.get("", ()))
        else:
            for recent in reversed(self._recent.values()):
                yield from (other for other in reversed(recent) if other.usage.provider == seen.usage.provider)

    def _beside(self, seen: Seen) -> Seen | None:
        """A call that only looks the same."""
        for other in self._candidates(seen):
            slack = _LOG_SLACK_NS if other.awaits_log and other.family is seen.family else _SLACK_NS
            if (
                other.scope != seen.scope
                and seen.scope not in other.merged
                and _pair(other, seen)
                and other.start <= seen.end + slack
                and seen.start <= other.end + slack
                and _alike(other, seen)
            ):
                self._merged.add(1, {"kept": other.scope, "merged": seen.scope})
                return other
        return None


def _unique_id(usage: Usage) -> str | None:
    """The response id, where it is unique. Without the provider: its names differ between instrumentations."""
    return usage.response_id if response_entry_id(None, usage.response_id) is not None else None


def _apart(one: Seen, other: Seen) -> bool:
    """Whether two sightings, one around the other, are of two calls: a tool that a call ran, which made a call.

    It takes two signs, since each of them has been seen to be wrong alone: LiteLLM makes up ids, Traceloop adds
    placeholders to counts.
    """
    if _strangers(one, other):
        return True
    if not one.complete or not other.complete:
        return False
    ids = _unique_id(one.usage), _unique_id(other.usage)
    told_apart = (None not in ids and ids[0] != ids[1]) or (one.key != other.key and bool(one.key and other.key))
    return told_apart and not _near(_tokens(one), _tokens(other), 1)


def _alike(one: Seen, other: Seen) -> bool:
    """Whether two sightings beside each other may be of one call."""
    if _strangers(one, other):
        return False
    ids = _unique_id(one.usage), _unique_id(other.usage)
    if None not in ids and ids[0] != ids[1]:
        return False
    if not (one.key and other.key) and one.usage.provider != other.usage.provider:
        return False
    if not one.complete or not other.complete:
        return True
    return _near(_tokens(one), _tokens(other), 1)


def _strangers(one: Seen, other: Seen) -> bool:
    return one.customer is not None and other.customer is not None and one.customer != other.customer


def _tokens(seen: Seen) -> list[int]:
    return [seen.usage.input_tokens, seen.usage.output_tokens]


def _near(one: list[int], other: list[int], slack: int) -> bool:
    return all(abs(a - b) <= slack for a, b in zip(one, other, strict=True))


def _pair(one: Seen, other: Seen) -> bool:
    """Whether two scopes are known to see the same calls: each in the table, or a door of ours."""
    if one.family is other.family and one.family.ends_in_log:
        return one.awaits_log or other.awaits_log  # a stream's span and the one that brings its usage
    return all(seen.family.scopes or seen.scope == DOOR for seen in (one, other))
