"""The decisions of the contract, once, for every store that keeps its working set in this process.

Memory keeps everything in cells; SQLite loads a customer's cell when it is asked about, runs a batch
of operations on cells inside one transaction, and writes back what changed. Both answer alike because
both run this.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, TypeVar

from respan_guard.backends.base import (
    REPLAY_MS,
    Admit,
    Allowed,
    Amounts,
    Ended,
    Entry,
    Op,
    Outcome,
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
from respan_guard.backends.cells import Cell, Hold, Span, amounts_of
from respan_guard.backends.evaluation import Evaluator, reason
from respan_guard.errors import CounterOverflow
from respan_guard.money import MAX_NANO

__all__ = ["Ledger"]

C = TypeVar("C", bound=Cell)
_GONE = Ended("gone")


def _grown(customer: str, cost: int, tokens: int, entry: Entry) -> tuple[int, int]:
    """The sums of a customer with the entry in them."""
    cost += entry.cost or 0
    tokens += entry.input_tokens + entry.output_tokens
    if not -MAX_NANO <= cost <= MAX_NANO or tokens > MAX_NANO:
        raise CounterOverflow(f"what customer {customer!r} used would pass 9,000,000 USD, or 9.0e15 tokens")
    return cost, tokens


class Ledger(Evaluator[C]):
    """Applies operations. Subclasses say where cells and sums come from, and what becomes of a change."""

    def __init__(self) -> None:
        self.now = 0
        self.cells: dict[str, C] = {}  # those at hand; `cell` is asked for any other
        self._do: dict[type, Callable[[Any, int], Outcome]] = {
            Admit: self._admit,
            Record: self._record,
            Release: self._release,
            Renew: self._renew,
        }

    # -- what a store is asked ---------------------------------------------------------------------

    @abstractmethod
    def cell(self, customer: str) -> C:
        """The customer's cell, loaded or new."""

    @abstractmethod
    def total(self, cell: C) -> tuple[int, int]:
        """The customer's cost and tokens of all time, to see that they stay countable."""

    @abstractmethod
    def find(self, customer: str, entry_id: str) -> StoredEntry | None:
        """A stored entry."""

    @abstractmethod
    def tombs(self, customer: str) -> Sequence[tuple[str, int]]:
        """The labels that took a deleted customer's place, and when; one for each of its lives, in order."""

    @abstractmethod
    def pruned_to(self) -> int:
        """The last day whose entries may be gone."""

    # -- what a store is told ----------------------------------------------------------------------

    @abstractmethod
    def add(self, cell: C, model: str, day: int, amounts: Amounts, now: int, at_ms: int) -> None:
        """Add to the sums of the cell's customer, model and day, and to the totals of the hour that `at_ms` is in."""

    def add_requests(self, cell: C, model: str, day: int, requests: int, now: int) -> None:
        """Add admitted requests to the sums."""
        self.add(cell, model, day, Amounts(requests), now, now)

    def add_entry(self, cell: C, entry: Entry, now: int) -> None:
        """Add a new entry to the sums."""
        self.add(cell, entry.model, entry.day, amounts_of(entry), now, entry.at_ms)

    @abstractmethod
    def keep_entry(self, entry: Entry, customer: str, rev: int, late: bool) -> None:
        """Append an entry to the log, or a revision of one that is stored."""

    def new_hold(self, cell: C, hold: Hold) -> None:
        """A hold was made."""
        self.keep_hold(cell, hold)

    @abstractmethod
    def keep_hold(self, cell: C, hold: Hold) -> None:
        """A hold was made or changed."""

    def keep_rate(self, cell: C, width: int, window: Window) -> None:
        """A rate was counted."""

    # -- operations --------------------------------------------------------------------------------

    def run(self, ops: Sequence[Op], now: int) -> list[Outcome]:
        """Apply operations in order.

        Raises:
            CounterOverflow: A sum would pass what can be counted exactly. Earlier ops of the batch are applied:
                the store rolls the batch back, or sees to it beforehand with `check_range`.
        """
        if now > self.now:
            self.now = now
        else:
            now = self.now
        do = self._do
        if len(ops) == 1:
            op = ops[0]
            return [do[op.__class__](op, now)]
        return [do[op.__class__](op, now) for op in ops]

    def check_range(self, ops: Sequence[Op]) -> None:
        """Refuse a batch that would stop midway because a sum leaves the range, before any of it is applied.

        Raises:
            CounterOverflow: It would.
        """
        for op in islice(ops, 1, None):  # the first op checks before it changes anything
            if op.__class__ is Record:
                break
        else:
            return
        new: dict[tuple[str, str], None] = {}
        sums: dict[str, tuple[int, int]] = {}
        for op in ops:
            if not isinstance(op, Record) or op.entry.day <= self.pruned_to():
                continue
            customer = self._booked_on(op.entry)
            key = (customer, op.entry.id)
            if key not in new and self.find(*key) is None:
                new[key] = None
                before = sums[customer] if customer in sums else self.total(self.cell(customer))
                sums[customer] = _grown(customer, *before, op.entry)

    def _admit(self, op: Admit, now: int) -> Outcome:
        cell = self.cells.get(op.customer)
        if cell is None:
            cell = self.cell(op.customer)
        known = cell.holds.get(op.id)
        if known is not None and (known.expires if known.ended is None else known.ended) + REPLAY_MS > now:
            return known.outcome
        if cell.revision != op.revision or not op.day_from_ms <= now < op.day_to_ms:
            return Stale(now, cell.revision, cell.params)
        fits, used, held, windows = self.evaluate(cell, op.limits, now, op)
        if not fits:
            reasons = tuple(map(reason, [op] * len(used), op.limits, used, held))
            return Refused(now, reasons, tuple(used), tuple(held), tuple(windows))
        requests = op.requests
        if requests:
            if windows:
                rates = cell.rates
                if rates is None:
                    rates = cell.rates = {}
                for width, (start, prev, cur) in zip(cell.widths, windows, strict=True):
                    rates[width] = window = (start, prev, cur + requests)
                    self.keep_rate(cell, width, window)
            if cell.counts_requests and cell.spans:
                _grow(cell.spans, op.model, op.day, requests, 0, 0)
            self.add_requests(cell, op.model, op.day, requests, now)
        outcome = Allowed(now, tuple(used), tuple(held), tuple(windows))
        hold = Hold(op.id, op.day, op.model, op.cost, op.tokens, now + op.ttl_ms, outcome)
        if op.cost or op.tokens:
            cell.add_hold(hold)
        else:
            cell.holds[op.id] = hold
        self.new_hold(cell, hold)
        return outcome

    def _booked_on(self, entry: Entry) -> str:
        """The customer, or the label that took its place before the call ended."""
        for label, deleted_at in self.tombs(entry.customer):
            if entry.at_ms <= deleted_at:
                return label
        return entry.customer

    def _record(self, op: Record, now: int) -> Outcome:
        entry = op.entry
        if entry.day <= self.pruned_to():
            return TooLate(self.pruned_to())
        customer = self._booked_on(entry)
        stored = self.find(customer, entry.id)
        if stored is not None:
            first = stored.entry
            same = (
                first.cost == entry.cost
                and first.input_tokens == entry.input_tokens
                and first.output_tokens == entry.output_tokens
            )
            return Recorded(False, first.cost, first.day, stored.late, not same and first.kind != "presumed")
        cell = self.cells.get(customer)
        if cell is None:
            cell = self.cell(customer)
        _grown(customer, *self.total(cell), entry)
        late = self._draw(entry, cell, now) if entry.admission is not None else False
        if cell.spans:
            _grow(cell.spans, entry.model, entry.day, 0, entry.cost or 0, entry.input_tokens + entry.output_tokens)
        self.add_entry(cell, entry, now)
        self.keep_entry(entry, customer, 1, late)
        return Recorded(True, entry.cost, entry.day, late)

    def _draw(self, entry: Entry, booked: C, now: int) -> bool:
        """Draw from the admission's hold, or else shrink what was presumed of it; whether the entry is late."""
        assert entry.admission is not None
        cell = booked if booked.customer == entry.customer else self.cell(entry.customer)
        hold = cell.holds.get(entry.admission)
        if hold is not None and hold.ended is None and hold.expires > now:
            if hold.cost or hold.tokens:
                tokens = entry.input_tokens + entry.output_tokens
                cost = entry.cost or 0
                cost = min(hold.cost, cost) if cost > 0 else 0
                tokens = min(hold.tokens, tokens)
                cell.drop(hold, cost, tokens)
                hold.cost -= cost
                hold.tokens -= tokens
                self.keep_hold(cell, hold)
            return False
        presumed_id = f"presumed:{entry.admission}"
        if entry.id == presumed_id or not entry.cost or entry.cost < 0:
            return True
        presumed = self.find(booked.customer, presumed_id)
        if presumed is not None and presumed.entry.cost:
            old = presumed.entry
            cut = min(presumed.entry.cost, entry.cost)
            less = Entry(
                old.id, old.customer, old.day, old.at_ms, presumed.entry.cost - cut, old.input_tokens,
                old.output_tokens, old.model, old.admission, old.kind, old.source, old.usage,
            )  # fmt: skip
            if booked.spans:
                _grow(booked.spans, old.model, old.day, 0, -cut, 0)
            self.add(booked, old.model, old.day, Amounts(cost=-cut), now, old.at_ms)
            self.keep_entry(less, booked.customer, presumed.rev + 1, presumed.late)
        return True

    def _release(self, op: Release, now: int) -> Outcome:
        cell = self.cells.get(op.customer)
        if cell is None:
            cell = self.cell(op.customer)
        hold = cell.holds.get(op.id)
        if hold is None or hold.ended is not None:
            return _GONE
        if hold.expires <= now:
            cell.expire(now)
            hold.ended = hold.expires
            state = "expired"
        else:
            if hold.counted:
                cell.drop(hold, hold.cost, hold.tokens)
                hold.counted = False
            hold.ended = now
            hold.cost = hold.tokens = 0
            state = "released"
        self.keep_hold(cell, hold)
        return Ended(state)

    def _renew(self, op: Renew, now: int) -> Outcome:
        cell = self.cell(op.customer)
        hold = cell.holds.get(op.id)
        if hold is None or hold.ended is not None or hold.expires <= now:
            return _GONE
        hold.expires = max(hold.expires, now + op.ttl_ms)
        self.keep_hold(cell, hold)
        return Ended("renewed")


def _grow(spans: dict[str, Span], model: str, day: int, requests: int, cost: int, tokens: int) -> None:
    """Keep up sums that were worked out before."""
    for span in spans.values():
        if span.first <= day < span.end and (span.model is None or span.model == model):
            metric = span.metric
            span.amount += cost if metric == "cost" else requests if metric == "requests" else tokens
