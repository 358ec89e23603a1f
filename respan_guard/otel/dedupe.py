"""Exactly once: which sightings are of one call.

One call may be seen by an SDK's instrumentation, by a framework's around it, by the SDK's own spans and by the guard's
other doors. The rules, each tried only where those before say nothing:

1. the same span, ended twice
2. the same response id, if it is long enough to be unique, within minutes, of one customer and one provider or model
3. one span is around the other, and nothing says that they are two calls
4. two scopes that are known to see the same calls, same model, same tokens, overlapping in time, and nothing says that
   they are two calls; at most one of each scope. Where one has no tokens, one of the families is known to stand beside
   others (`Family.aside`), and one span lies within the time of the other. This rule may err, so it is counted.

Where in doubt, two: a record too many is seen, and one too few is not.

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
    from respan_guard.backends.base import Entry
    from respan_guard.context import Slot
    from respan_guard.otel.running import Running

__all__ = ["Dedupe", "Seen"]

_MOST_IDS = 16_384
_MOST_OF_ONE_ID = 8
_MOST_MODELS = 64
_MOST_RECENT = 128  # calls of one model
_MOST_INNER = 64
_REMEMBERED_NS = 120 * 10**9
_SAME_ID_NS = 600 * 10**9  # a reply that comes again later was given again
_SLACK_NS = 20 * 10**6  # where begin or end is not that of a span: what another door records has the time of its record
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
        until: When to wait no longer although a span around it still runs.
        merged: Scopes of the sightings that were taken for this call.
        awaits_log: Its stream goes on, and another span will tell of its end; see `Family.ends_in_log`.
        unended: Its span was dropped: when it was over is not known.
        door: What kind of record it is, if another door's.
        presumed: The entry that was made of it for want of usage.
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
    until: float = 0.0
    merged: set[str] = field(default_factory=set)
    awaits_log: bool = False
    unended: bool = False
    door: str = ""
    presumed: Entry | None = None
    key: str = ""

    def __post_init__(self) -> None:
        self.key = model_key(self.usage.model or self.usage.response_model or "")

    def let_go(self) -> None:
        """It is booked. It is remembered for minutes, which must not keep requests and their spans alive."""
        self.admission = self.slot = None
        running = self.running
        if running is not None:
            running.admission = running.slot = running.context = running.noted = running.given = running.around = None


class Dedupe:
    """Remembers the calls of the last minutes. Not safe for threads: whoever drains holds the lock."""

    def __init__(self) -> None:
        self._spans: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._ids: OrderedDict[str, list[Seen]] = OrderedDict()
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
        return self.same_reply(seen) or self._around(seen) or self._beside(seen)

    def same_reply(self, seen: Seen) -> Seen | None:
        """The sighting that has the same response id. This may be asked from any thread."""
        for other in reversed(self._ids.get(_unique_id(seen.usage) or "", ())):
            if other is not seen and _same_reply(other, seen):
                return other
        return None

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
        self.place(seen, seen.running)

    def place(self, seen: Seen, running: Running | None) -> None:
        """Remember what the span of a sighting, and those around that, are known to be of: each sees the call anew."""
        if running is None:
            return
        if running.call is None:
            running.call = seen
        for above in running.above():
            if above.inner is None:
                above.inner = []
            if len(above.inner) < _MOST_INNER and seen not in above.inner:
                above.inner.append(seen)

    def know(self, seen: Seen, usage: Usage | None = None) -> None:
        """Remember a response id, of the sighting's own or of another of the same call."""
        key = _unique_id(usage or seen.usage)
        if key is not None:
            known = self._ids.setdefault(key, [])
            if seen not in known:
                known.append(seen)
                del known[:-_MOST_OF_ONE_ID]
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
            slack = _slack(other, seen)
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
    if one.door or other.door:
        return _apart_from(*((one, other) if one.door else (other, one)))
    ids = _unique_id(one.usage), _unique_id(other.usage)
    other_ids, other_model = None not in ids and ids[0] != ids[1], one.key != other.key and bool(one.key and other.key)
    if one.scope == other.scope:  # one instrumentation sees a call once: here each sign is enough
        whole = one.complete and other.complete
        return other_ids or other_model or (whole and not _near(_tokens(one), _tokens(other), 1))
    if not one.complete or not other.complete:
        return False
    return (other_ids or other_model) and not _near(_tokens(one), _tokens(other), 1)


def _apart_from(door: Seen, span: Seen) -> bool:
    """Whether a span is of another call than what a door recorded within it, as it was sent and answered."""
    if span.complete:
        return not door.complete or not _near(_tokens(door), _tokens(span), 1)
    names = [{model_key(name) for name in (s.usage.model, s.usage.response_model) if name} for s in (door, span)]
    return all(names) and names[0].isdisjoint(names[1])


def _same_reply(one: Seen, other: Seen) -> bool:
    """Whether two sightings with the same response id are of one call. Servers of one's own may give ids again."""
    apart = max(one.start - other.end, other.start - one.end)
    near = not (one.complete and other.complete) or _near(_tokens(one), _tokens(other), 1)
    if _strangers(one, other):  # sources may name the customer of one call differently, at one moment
        return one.scope != other.scope and apart < 0 and near
    if apart > _SAME_ID_NS:
        return False
    names = one.usage.provider, other.usage.provider
    return None in names or names[0] == names[1] or (near and (one.key == other.key or not (one.key and other.key)))


def _alike(one: Seen, other: Seen) -> bool:
    """Whether two sightings beside each other may be of one call."""
    if _strangers(one, other):
        return False
    ids = _unique_id(one.usage), _unique_id(other.usage)
    if None not in ids and ids[0] != ids[1]:
        return False
    if not (one.key and other.key) and one.usage.provider != other.usage.provider:
        return False
    if one.complete and other.complete:
        return _near(_tokens(one), _tokens(other), 1)
    return DOOR in (one.scope, other.scope) or one.family is other.family or _within(one, other) or _within(other, one)


def _within(one: Seen, other: Seen) -> bool:
    return other.start - _SLACK_NS <= one.start and one.end <= other.end + _SLACK_NS


def _slack(one: Seen, other: Seen) -> int:
    """How far apart two sightings of one call may be (ns). Spans of two calls in a row are no moment apart."""
    if one.awaits_log and one.family is other.family:
        return _LOG_SLACK_NS
    return _SLACK_NS if one.unended or other.unended or DOOR in (one.scope, other.scope) else 0


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
    if not all(seen.family.scopes or seen.scope == DOOR for seen in (one, other)):
        return False
    aside = one.family.aside or other.family.aside
    if one.complete and other.complete:
        return True
    doors = one.door or other.door
    return doors == "response" or (aside and doors not in _APPS_WORD)


_APPS_WORD = ("manual", "api")  # what an app records itself is what it says: without usage no span is known to be that
