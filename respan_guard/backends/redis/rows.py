"""Values of the contract as scripts take them, and what they answer as values of the contract."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

from respan_guard.backends.base import (
    AMOUNTS,
    Admit,
    Allowed,
    Amounts,
    AuditRow,
    CustomerRow,
    Ended,
    Entry,
    HoldRow,
    Limit,
    Op,
    Outcome,
    Params,
    Record,
    Recorded,
    Refused,
    Release,
    Renew,
    Stale,
    StoredEntry,
    TooLate,
    Window,
)
from respan_guard.backends.cells import EVER, amounts_of
from respan_guard.backends.texts import params_from
from respan_guard.usage import Usage

__all__ = [
    "Encoder",
    "amounts_from",
    "amounts_list",
    "audit_from",
    "customer_from",
    "entry_from",
    "hold_from",
    "outcome_from",
    "params_text",
    "row_text",
    "text",
]

_METRICS = {"requests": 0, "cost": 1, "tokens": 2}
_SCOPES = {"customer": 0, "customer+model": 1, "model": 2, "all": 3}
_REASONS = (None, "rate", "held", "exhausted")
_ENDS = (Ended("released"), Ended("expired"), Ended("renewed"), Ended("gone"))
assert AMOUNTS[:5] == ("requests", "calls", "cost", "input_tokens", "output_tokens")  # the scripts know these by place
_values = attrgetter(*AMOUNTS)
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode
_MAX_POLICIES = 1024


def text(value: Any) -> bytes:
    """A value as JSON.

    Raises:
        ValueError: It has half of a surrogate pair, which is no text.
        TypeError: It is no JSON value.
    """
    return _encode(value).encode()


def amounts_list(amounts: Amounts) -> list[int]:
    """Sums in the order of their fields."""
    return list(_values(amounts))


def amounts_from(values: Sequence[Any]) -> Amounts:
    """What `amounts_list` made; fields that came later than the sums are 0."""
    return Amounts(*map(int, values))


class Encoder:
    """Makes a batch of operations what `apply.lua` reads."""

    def __init__(self) -> None:
        # Policies are compiled once and asked with many times; the tuple is kept, so that its id stays its own.
        self._limits: dict[int, tuple[tuple[Limit, ...], list[list[int]]]] = {}

    def batch(self, ops: Sequence[Op]) -> list[bytes]:
        """The limits that are asked with, each policy's once, the operations, and the texts they refer to by place."""
        texts: list[bytes] = [b""]
        policies: dict[int, int] = {}
        rows: list[Any] = [[]]
        for op in ops:
            if isinstance(op, Admit):
                rows.append(self._admit(op, self._place(op.limits, policies, rows[0])))
            elif isinstance(op, Record):
                rows.append(self._record(op.entry, texts))
            elif isinstance(op, Release):
                rows.append([2, op.customer, op.id])
            elif isinstance(op, Renew):
                rows.append([3, op.customer, op.id, op.ttl_ms])
            else:
                raise TypeError(f"no operation of storage: {op!r}")
        texts[0] = text(rows)
        return texts

    def standing(self, customer: str, limits: tuple[Limit, ...], model: str) -> bytes:
        """The question where limits stand."""
        return text([[self.limits(limits)], [4, customer, model, 1]])

    def limits(self, limits: tuple[Limit, ...]) -> list[list[int]]:
        """Limits as numbers."""
        known = self._limits.get(id(limits))
        if known is not None and known[0] is limits:
            return known[1]
        if len(self._limits) >= _MAX_POLICIES:
            self._limits.clear()
        rows = [_limit(limit) for limit in limits]
        self._limits[id(limits)] = (limits, rows)
        return rows

    def _place(self, limits: tuple[Limit, ...], places: dict[int, int], policies: list[Any]) -> int:
        """Where a batch has limits, from 1; the operations keep them alive, so ids tell them apart."""
        place = places.get(id(limits))
        if place is None:
            policies.append(self.limits(limits))
            place = places[id(limits)] = len(policies)
        return place

    def _admit(self, op: Admit, place: int) -> list[Any]:
        return [
            0, op.customer, op.id, op.revision, op.day, op.day_from_ms, op.day_to_ms, op.model, op.requests, op.cost,
            op.tokens, op.ttl_ms, 1 if op.free else 0, place,
        ]  # fmt: skip

    def _record(self, entry: Entry, texts: list[bytes]) -> list[Any]:
        usage = entry.usage.to_dict()
        metadata = usage.pop("metadata", None)  # apart, since it goes when the customer is forgotten
        body = [
            entry.id, entry.day, entry.at_ms, entry.input_tokens, entry.output_tokens, entry.model, entry.admission,
            entry.kind, entry.source, usage,
        ]  # fmt: skip
        texts.append(text(body))
        at = len(texts) + 4  # the place of the last one among the script's arguments
        if metadata is not None:
            texts.append(text(metadata))
        return [
            1, entry.customer, entry.id, entry.day, entry.at_ms, False if entry.cost is None else entry.cost,
            _values(amounts_of(entry)), entry.model, entry.admission if entry.admission is not None else False, at,
            0 if metadata is None else at + 1,
        ]  # fmt: skip


def _limit(limit: Limit) -> list[int]:
    first, end = (0, EVER) if limit.kind == "total" else (limit.first_day, limit.end_day)
    return [_METRICS[limit.metric], limit.amount, limit.window_ms, first, end, _SCOPES[limit.scope]]


def outcome_from(row: list[Any]) -> Outcome:
    """The answer to one operation."""
    kind = row[0]
    if kind == 0:
        return Allowed(row[1], tuple(row[2]), tuple(row[3]), _windows(row[4]))
    if kind == 5:
        return _ENDS[row[1]]
    if kind == 3:
        return Recorded(row[1] == 1, row[2], row[3], row[4] == 1, row[5] == 1)
    if kind == 1:
        reasons = tuple(_REASONS[code] for code in row[5])
        return Refused(row[1], reasons, tuple(row[2]), tuple(row[3]), _windows(row[4]))
    if kind == 2:
        return Stale(row[1], row[2], params_from(row[3]))
    return TooLate(row[1])


def _windows(flat: list[int]) -> tuple[Window, ...]:
    if len(flat) == 3:
        return ((flat[0], flat[1], flat[2]),)
    return tuple((flat[at], flat[at + 1], flat[at + 2]) for at in range(0, len(flat), 3))


def params_text(params: Params) -> bytes:
    """A customer's params."""
    return text(dict(params))


def customer_from(row: list[Any]) -> CustomerRow:
    """A row of `row.lua`."""
    customer, revision, params, first_seen, last_seen, active_days, totals = row[:7]
    return CustomerRow(
        customer, revision, params_from(params), first_seen, last_seen, amounts_from(totals), active_days
    )


def entry_from(row: list[Any], seq: int) -> StoredEntry:
    """A row of `entries.lua`, at its place in the whole log."""
    _, _, customer, cost, rev, late, _, body, metadata = row
    entry_id, day, at_ms, tokens_in, tokens_out, model, admission, kind, source, told = json.loads(body)
    usage = Usage.from_dict(told)
    if metadata is not None:
        usage = replace(usage, metadata=json.loads(metadata))
    return StoredEntry(
        seq,
        int(rev),
        Entry(
            entry_id, customer, day, at_ms, int(cost) if cost else None, tokens_in, tokens_out, model, admission, kind,
            source, usage,
        ),
        late == "1",
    )  # fmt: skip


def hold_from(customer: str, row: list[Any], now: int, state: str) -> HoldRow | None:
    """A row of `holds.lua`, if it is in the state that was asked for."""
    hold_id, day, model, cost, tokens, expires, ended = row
    live = ended < 0 and expires > now
    expired = expires <= now and (cost > 0 or tokens > 0)
    if not (live if state == "live" else expired):
        return None
    return HoldRow(customer, hold_id, day, model, cost, tokens, expires, state)


def row_text(row: AuditRow) -> bytes:
    """A row of the audit, without its time and place."""
    return text([row.customer, row.action, row.actor, row.before, row.after])


def audit_from(stored: str, seq: int) -> AuditRow:
    """What `row_text` wrote, with its time before it."""
    at_ms, _, rest = stored.partition(" ")
    customer, action, actor, before, after = json.loads(rest)
    return AuditRow(int(at_ms), customer, action, actor, before, after, seq)
