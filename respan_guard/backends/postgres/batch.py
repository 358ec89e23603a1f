"""A batch of operations as the argument of the function that applies it, and its answers as outcomes.

Everything travels as arrays, one column each, in one array of their texts: numbers point from one family of arrays
into another, so the server looks nothing up twice. The families are described in `migrations/0002_apply_1_load.sql`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from respan_guard.backends.base import (
    Admit,
    Allowed,
    Ended,
    Entry,
    Limit,
    Op,
    Outcome,
    Record,
    Recorded,
    Refused,
    Release,
    Stale,
    TooLate,
    Window,
)
from respan_guard.backends.cells import nameless
from respan_guard.backends.evaluation import reason
from respan_guard.backends.postgres.rows import (
    EVER,
)
from respan_guard.backends.texts import params_from, search_text, usage_text

__all__ = ["Batch"]

_SEPARATOR = "\x1e"  # in no answer: JSON escapes it
_METRICS = {"requests": 0, "cost": 1, "tokens": 2}
_TEXTS = frozenset((7, 11, 23, 24, 25, 26, 27, 28))  # columns of an operation that are texts
_NO_ADMIT: tuple[Any, ...] = ("", 0, 0, 0)
_NO_LIMITS: tuple[Any, ...] = (False, 1, 0)
_NO_RECORD: tuple[Any, ...] = (0, 0, None, None, "", "", None, "", None, "")
_ENDED = {"G": Ended("gone"), "X": Ended("expired"), "E": Ended("released"), "W": Ended("renewed")}
_Sum = tuple[int, int, int, int, str | None]  # whose (0: everybody's), metric, first day, end day, model
_Limits = tuple[tuple[bool, int, int], ...]  # of each: whether it is a rate, its sum or rate, its amount


class Batch:
    """Operations on their way. Made once, it may be sent any number of times.

    Args:
        ops: What to do.
        labels: By place of an operation: under whom its entry is booked instead, as its customer was deleted.
    """

    def __init__(self, ops: Sequence[Op], labels: dict[int, str] | None = None) -> None:
        self.ops = ops
        self.labels = labels or {}
        names = {op.entry.customer if op.__class__ is Record else op.customer for op in ops}  # type: ignore[union-attr]
        self._names = sorted(names.union(self.labels.values()))
        self._who = {name: number for number, name in enumerate(self._names, start=1)}
        self._holds: dict[tuple[int, str], int] = {}
        self._entries: dict[tuple[int, str], int] = {}
        self._own: set[int] = set()  # entries that the batch itself books
        self._sums: dict[_Sum, int] = {}
        self._rates: dict[tuple[int, int], int] = {}
        self._limits: list[tuple[bool, int, int]] = []
        self._planned: dict[tuple[int, int, str], int] = {}
        rows = [self._row(place, op) for place, op in enumerate(ops)]
        self.argument = _texts([*self._families(), *_columns(rows)])

    # -- there -------------------------------------------------------------------------------------

    def _row(self, place: int, op: Op) -> tuple[Any, ...]:
        """An operation's columns."""
        if isinstance(op, Admit):
            who = self._who[op.customer]
            return (
                1, who, who, _number(self._holds, (who, op.id)), 0, 0, op.day, op.model, op.cost, op.tokens, 0,
                op.revision, op.day_from_ms, op.day_to_ms, op.requests, op.ttl_ms, op.free,
                self._plan(who, op.limits, op.model), len(op.limits), *_NO_RECORD,
            )  # fmt: skip
        if isinstance(op, Record):
            return self._record(place, op.entry)
        who = self._who[op.customer]
        hold = _number(self._holds, (who, op.id))
        kind, ttl = (3, 0) if isinstance(op, Release) else (4, op.ttl_ms)
        return (kind, who, who, hold, 0, 0, 0, "", 0, 0, 0, *_NO_ADMIT, ttl, *_NO_LIMITS, *_NO_RECORD)

    def _record(self, place: int, entry: Entry) -> tuple[Any, ...]:
        who = self._who[entry.customer]
        booked = self._who[self.labels.get(place, entry.customer)]
        own = _number(self._entries, (booked, entry.id))
        self._own.add(own)
        hold = presumed = 0
        if entry.admission is not None:
            hold = _number(self._holds, (who, entry.admission))
            if entry.id != (made_up := f"presumed:{entry.admission}"):
                presumed = _number(self._entries, (booked, made_up))
        usage = (entry if booked == who else nameless(entry)).usage
        return (
            2, who, booked, hold, own, presumed, entry.day, entry.model, entry.cost, entry.input_tokens,
            entry.output_tokens, *_NO_ADMIT, 0, *_NO_LIMITS, entry.at_ms, usage.cache_read_tokens, usage.latency_ms,
            usage.ttft_ms, entry.kind, entry.source, usage.provider, usage.status, usage.trace_id,
            usage_text(usage),
        )  # fmt: skip

    def _plan(self, who: int, limits: tuple[Limit, ...], model: str) -> int:
        """Where the limits of an admission stand among those of the batch; the same ones stand there once."""
        key = (who, id(limits), model)
        found = self._planned.get(key)
        if found is None:
            found = self._planned[key] = len(self._limits) + 1
            for limit in limits:
                if limit.window_ms:
                    self._limits.append((True, _number(self._rates, (who, limit.window_ms)), limit.amount))
                    continue
                scope = limit.scope
                total = limit.kind == "total"
                asked = (
                    who if scope in ("customer", "customer+model") else 0,
                    _METRICS[limit.metric],
                    0 if total else min(limit.first_day, EVER),
                    EVER if total else min(limit.end_day, EVER - 1),
                    model if scope in ("customer+model", "model") else None,
                )
                self._limits.append((False, _number(self._sums, asked), limit.amount))
        return found

    def _families(self) -> Iterable[str]:
        """The arrays that operations point into."""
        names = self._names
        yield _texts(names)
        yield _texts([search_text(name, None) for name in names])
        yield from _pairs(self._holds)
        yield from _pairs(self._entries)
        yield _array(number in self._own for number in self._entries.values())
        # By customer, and those across customers last, so that a customer's are found by two numbers.
        order = sorted(self._sums, key=lambda asked: asked[0] or len(names) + 1)
        place = {self._sums[asked]: number for number, asked in enumerate(order, start=1)}
        whose = [asked[0] for asked in order]
        yield _array(whose)
        for column in (1, 2, 3):
            yield _array(asked[column] for asked in order)  # type: ignore[misc]  # the fifth alone is a text
        yield _texts([asked[4] for asked in order])
        first, last = [1] * len(names), [0] * len(names)
        wide = len(order) + 1
        for number, who in reversed(list(enumerate(whose, start=1))):
            if who:
                first[who - 1] = number
                last[who - 1] = last[who - 1] or number
            else:
                wide = number
        yield _array(first)
        yield _array(last)
        yield str(wide)
        yield _array(who for who, _ in self._rates)
        yield _array(width for _, width in self._rates)
        yield _array(is_rate for is_rate, _, _ in self._limits)
        yield _array(number if is_rate else place[number] for is_rate, number, _ in self._limits)
        yield _array(amount for _, _, amount in self._limits)

    # -- and back ----------------------------------------------------------------------------------

    def outcomes(self, answer: str) -> tuple[int, list[Outcome]]:
        """The server's time, and what became of each operation."""
        first, *answers = answer.split(_SEPARATOR)
        now = int(first)
        return now, [_outcome(op, text, now) for op, text in zip(self.ops, answers, strict=True)]


def _outcome(op: Op, text: str, now: int) -> Outcome:
    kind = text[0]
    ended = _ENDED.get(kind)
    if ended is not None:
        return ended
    if kind == "T":
        return TooLate(int(text[1:]))
    if isinstance(op, Record):
        if kind == "N":
            return Recorded(True, op.entry.cost, op.entry.day, text[1] == "1")
        cost, day, late, conflict = text[1:].split("|")
        return Recorded(False, int(cost) if cost else None, int(day), late == "1", conflict == "1")
    if kind == "S":
        revision, _, params = text[1:].partition("|")
        return Stale(now, revision, params_from(params or None))
    at, standing, told = text[1:].split("|")
    numbers = _numbers(standing)
    used, held = tuple(numbers[::2]), tuple(numbers[1::2])
    windows = _windows(_numbers(told))
    if kind == "A":
        return Allowed(int(at), used, held, windows)
    assert isinstance(op, Admit)
    return Refused(now, tuple(map(reason, [op] * len(used), op.limits, used, held)), used, held, windows)


def _numbers(text: str) -> list[int]:
    """Of a text like ",1,2"."""
    return list(map(int, text[1:].split(","))) if text else []


def _windows(numbers: list[int]) -> tuple[Window, ...]:
    return tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))


def _number(known: dict[Any, int], key: Any) -> int:
    """The number of a key, from 1 on, in order of appearance."""
    found = known.get(key)
    if found is None:
        found = known[key] = len(known) + 1
    return found


def _pairs(known: dict[tuple[int, str], int]) -> tuple[str, str]:
    return _array(who for who, _ in known), _texts([text for _, text in known])


def _columns(rows: list[tuple[Any, ...]]) -> Iterable[str]:
    return [
        _texts(column) if number in _TEXTS else _array(column)
        for number, column in enumerate(zip(*rows, strict=True))
    ]  # fmt: skip


def _array(values: Iterable[int | None]) -> str:
    """Numbers and truth values as a PostgreSQL array."""
    return "{" + ",".join(map(str, values)).replace("None", "NULL") + "}"


def _texts(values: Sequence[str | None]) -> str:
    """Texts as a PostgreSQL array."""
    if values and None not in values:
        joined = '","'.join(values)  # type: ignore[arg-type]  # just looked
        if "\\" not in joined and joined.count('"') == 2 * len(values) - 2:  # most need no quoting of their own
            return f'{{"{joined}"}}'
    return "{" + ",".join(["NULL" if text is None else _quoted(text) for text in values]) + "}"


def _quoted(text: str) -> str:
    if "\\" in text:
        text = text.replace("\\", "\\\\")
    return '"' + text.replace('"', '\\"') + '"'
