"""From a usage to an entry of the ledger: its id, its day and its cost, all fixed before the first send."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import reprlib
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import INVALID_SPAN, get_current_span

from respan_guard.backends.base import Entry
from respan_guard.decision import as_datetime
from respan_guard.errors import InvalidInput
from respan_guard.money import from_nano, to_nano
from respan_guard.pricing import PriceBook
from respan_guard.usage import TOKEN_KINDS, Usage, UsageRecord

if TYPE_CHECKING:
    from respan_guard.backends.base import StoredEntry
    from respan_guard.context import Witness
    from respan_guard.policy import Policy

__all__ = ["Ids", "Recorder", "record_from_entry", "response_entry_id"]

logger = logging.getLogger("respan_guard")

_PREFIX = re.compile(r"^[A-Za-z]{1,16}[-_]")
_UNIQUE = 16
_OWN_WORD = ("manual", "api")  # sources that are the app itself
_MAX_ID = 300
_MOST_REPLIES = 32_768  # whose ids are remembered; at most twice as many
_TEXTS = (
    "model", "status", "provider", "response_id", "response_model", "operation", "service_tier", "trace_id", "span_id"
)  # fmt: skip
_NEEDED = 2  # of them; the others may be None
_texts_of = attrgetter(*_TEXTS)
_counts_of = attrgetter(*TOKEN_KINDS)
_PLAIN, _INTEGERS = frozenset({str, type(None)}), frozenset({int})
_TIMES = ("latency_ms", "ttft_ms")
_EPOCH, _MS = datetime(1970, 1, 1, tzinfo=UTC), timedelta(milliseconds=1)
_MOST_MS = 1 << 40  # 34 years: sums of it stay countable


def storable(text: str) -> str:
    """A text as databases take it: a client's JSON may hold lone surrogates, which have no encoding, and U+0000."""
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in text else text


class Ids:
    """Ids that no other process makes: random bytes once, then a counter. Much cheaper than a UUID each."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin anew, after a fork: the parent goes on with the ids it was at."""
        self._prefix = f"{os.urandom(8).hex()}-"
        self._count = itertools.count(1)

    def __call__(self) -> str:
        """The next id."""
        return f"{self._prefix}{next(self._count):x}"


def response_entry_id(provider: str | None, response_id: str | None) -> str | None:
    """The entry id that a provider's response id makes, or None where that id may repeat.

    Some local servers number their replies: Ollama sends `chatcmpl-0` to `chatcmpl-998`. An id counts as unique
    with 16 characters or more behind its prefix.
    """
    if not response_id or len(response_id) > _MAX_ID:
        return None
    prefix = _PREFIX.match(response_id)
    if len(response_id) - (prefix.end() if prefix else 0) < _UNIQUE:
        return None
    return f"{provider or 'unknown'}:{response_id}"


class Recorder:
    """Turns usage into entries.

    Args:
        prices: What models cost.
        ids: Makes ids for calls that have none of their own.
    """

    def __init__(self, prices: PriceBook, ids: Ids) -> None:
        self._prices = prices
        self._ids = ids
        self._warned: set[str] = set()
        self._replies: dict[int, object] = {}
        self._earlier = self._replies
        self.witness: Witness | None = None

    def own_id(self, usage: Usage, customer: str, door: str, request_ids: tuple[str, ...]) -> str | None:
        """An id for a call that a door saw and whose reply's id is not its own; None if that may well be.

        Some servers make it of an id that the request brings (vLLM: `X-Request-Id`), which may be one for many calls,
        and a door sees each call once: an id that it meets again, of one customer, is another call's.

        Args:
            usage: What the reply says.
            customer: Whose call it is.
            door: Who saw it; what two doors see is one call.
            request_ids: What the request brought.
        """
        reply = response_entry_id(usage.provider, usage.response_id)
        if reply is None:
            return None
        if any(name and name in reply for name in request_ids):
            return self._ids()
        if len(self._replies) >= _MOST_REPLIES:
            self._earlier, self._replies = self._replies, {}
        key, mark = hash((door, customer, reply)), object()
        is_first = self._replies.setdefault(key, mark) is mark and (
            self._earlier is self._replies or key not in self._earlier
        )
        return None if is_first else self._ids()

    def entry(
        self,
        usage: Usage,
        customer: str,
        policy: Policy,
        now_ms: int,
        *,
        source: str,
        admission: str | None = None,
        number: int | str = 0,
        held_day: int | None = None,
        entry_id: str | None = None,
    ) -> Entry:
        """Make the entry of one call.

        Args:
            usage: What the call consumed.
            customer: Whose it is; "" for nobody's.
            policy: Tells the customer's local date.
            now_ms: The store's time, as well as it is known.
            source: Which door saw the call. The app's own word on a cost is taken, a reply's must be plausible.
            admission: Whose hold it draws from.
            number: Of the call, within the admission.
            held_day: The admission's day if it held money, so that money held in a period is booked in it.
            entry_id: An id the caller chose.

        Raises:
            InvalidInput: The usage holds what no store can keep.
        """
        _check_storable(usage)
        at_ms, then = now_ms, usage.time
        if then is not None:
            at_ms = _ms_of(then)
            if at_ms >= now_ms:  # by a clock that is ahead of ours
                at_ms, then = now_ms, as_datetime(now_ms)
        if usage.cost is not None and source in ("manual", "api"):
            cost: int | None = to_nano(usage.cost, "cost")
        else:
            cost = self._prices.accept_cost(usage, then)  # None: now, by the guard's clock
            if cost is None:
                self._warn(usage)
        if (
            self.witness is not None
            and source not in ("span", "api")
            and (presumed := self.witness.presumed(usage, customer, at_ms)) is not None
        ):  # storage shrinks by this entry what was presumed under the name that it now has, on that one's day
            admission, held_day = presumed.id.removeprefix("presumed:"), presumed.day
        traced = usage.trace_id is not None and usage.span_id is not None
        if usage.trace_id is None and (span := get_current_span()) is not INVALID_SPAN:
            context = span.get_span_context()  # of the work around the call; its span may hold several calls
            if context.is_valid:
                usage.trace_id = f"{context.trace_id:032x}"
        entry = Entry(
            id=(entry_id and storable(entry_id))
            or response_entry_id(usage.provider, usage.response_id)
            or (f"{usage.trace_id}:{usage.span_id}" if traced else None)
            or (f"{admission}:{number}" if admission is not None else self._ids()),
            customer=customer,
            day=held_day if held_day is not None else policy.day_of(at_ms),
            at_ms=at_ms,
            cost=cost,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            model=usage.model,
            admission=admission,
            source=source,
            usage=usage,
        )
        if self.witness is not None and source != "client":  # that door says so itself, and within what it was made
            self.witness.saw(entry)
        return entry

    def hand_on(self) -> None:
        """Have what was seen from aside booked, as far as it is known."""
        if self.witness is not None:
            self.witness.hand_on()

    def presumed(
        self, of: str, admission: str | None, customer: str, day: int, now_ms: int, cost: int | None, usage: Usage
    ) -> Entry:
        """The entry of a call that was made and whose usage stayed unknown.

        Real usage that comes later under the same admission shrinks it in the store, if `of` is the admission's id.

        Raises:
            InvalidInput: The usage holds what no store can keep.
        """
        _check_storable(usage)
        return Entry(
            id=f"presumed:{of}",
            customer=customer,
            day=day,
            at_ms=now_ms,
            cost=cost,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            model=usage.model,
            admission=admission,
            kind="presumed",
            source="presumed",
            usage=usage,
        )

    def _warn(self, usage: Usage) -> None:
        if usage.model not in self._warned and len(self._warned) < 1000:
            self._warned.add(usage.model)
            logger.warning(
                "no price is known for model %r: its calls are recorded as unpriced and no budget sees them; "
                "add it to `prices`",
                usage.model[:100],
            )


def _check_storable(usage: Usage) -> None:
    """One record that can't be written would fail every batch that it is part of."""
    if usage.metadata is not None:
        try:
            if "\\u" in json.dumps(dict(usage.metadata), allow_nan=False):  # something in it is not ASCII
                usage.metadata = _storable_value(dict(usage.metadata))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(f"metadata must hold JSON values only: {error}", field="metadata") from None
    if not _INTEGERS.issuperset(map(type, _counts_of(usage))):  # it was changed since it was made
        usage.check_counts()
    texts = _texts_of(usage)
    if not _PLAIN.issuperset(map(type, texts)) or None in texts[:_NEEDED]:
        texts = _plain_texts(usage, texts)
    together = "{}{}{}{}{}{}{}{}{}".format(*texts)
    if not together.isascii() or "\0" in together:
        for name, text in zip(_TEXTS, texts, strict=True):
            if text is not None:
                setattr(usage, name, storable(text))
    estimated: object = usage.estimated
    if estimated.__class__ is not bool:
        usage.estimated = bool(estimated)
    if usage.latency_ms is not None or usage.ttft_ms is not None:
        for name in _TIMES:
            value = getattr(usage, name)
            if value is not None and (value.__class__ is not int or not 0 <= value <= _MOST_MS):
                setattr(usage, name, _whole_ms(name, value))


def _plain_texts(usage: Usage, texts: tuple[Any, ...]) -> tuple[str | None, ...]:
    """The texts as plain strings, which an enum's members may be made of."""
    found: list[str | None] = []
    for place, (name, text) in enumerate(zip(_TEXTS, texts, strict=True)):
        if isinstance(text, str):
            text = str.__str__(text)
            setattr(usage, name, text)
        elif text is not None or place < _NEEDED:
            raise InvalidInput(f"{name} must be a string, got {reprlib.repr(text)}", field=name)
        found.append(text)
    return tuple(found)


def _whole_ms(name: str, value: object) -> int:
    """Milliseconds; who takes the time in floats gets them rounded."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _MOST_MS:
        return round(value)
    raise InvalidInput(f"{name} must be milliseconds from 0 to {_MOST_MS:,}, got {reprlib.repr(value)}", field=name)


def _ms_of(time: datetime) -> int:
    if time < _EPOCH:
        raise InvalidInput(f"time must be when the call ended, got {time}", field="time")
    return (time - _EPOCH) // _MS


def _storable_value(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, dict):
        return {_storable_value(key): _storable_value(one) for key, one in value.items()}
    return [_storable_value(one) for one in value] if isinstance(value, list | tuple) else value


def record_from_entry(stored: StoredEntry, markup: Decimal | None = None) -> UsageRecord:
    """The ledger's entry as people read it."""
    entry = stored.entry
    return UsageRecord(
        id=entry.id,
        customer_identifier=entry.customer,
        time=as_datetime(entry.at_ms),
        day=date.fromordinal(entry.day).isoformat(),
        usage=entry.usage,
        cost=None if entry.cost is None else from_nano(entry.cost),
        kind=entry.kind,
        source=entry.source,
        admission_id=entry.admission,
        sequence=stored.seq,
        revision=stored.rev,
        late=stored.late,
        markup_percentage=markup,
    )
