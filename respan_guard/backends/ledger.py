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
from respan_guard.backends.cells import Cell, Hold, Span, amounts_of, nameless
from respan_guard.backends.evaluation import Evaluator
from respan_guard.errors import CounterOverflow
from respan_guard.money import MAX_NANO

__all__ = ["Ledger"]

C = TypeVar("C", bound=Cell)
_GONE, _RELEASED, _EXPIRED, _RENEWED = Ended("gone"), Ended("released"), Ended("expired"), Ended("renewed")


class Ledger(Evaluator[C]):
    """Applies operations. Subclasses say where cells and sums come from, and what becomes of a change."""

    def __init__(self) -> None:
        self.now = 0
        self.pruned_to = -1  # the last day whose entries may be gone
        self.any_deleted = False  # whether `tombs` needs to be asked
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
    def find(self, customer: str, entry_id: str) -> StoredEntry | None:
        """A stored entry."""

    @abstractmethod
    def answer(self, cell: C, hold_id: str, now: int) -> Allowed | None:
        """The answer of an admission whose hold is no longer in the cell, if it ended less than `REPLAY_MS` ago."""

    @abstractmethod
    def tombs(self, customer: str) -> Sequence[tuple[str, int]]:
        """The labels that took a deleted customer's place, and when; one for each of its lives, in order."""

    # -- what a store is told ----------------------------------------------------------------------

    @abstractmethod
    def add(self, cell: C, model: str, day: int, amounts: Amounts, now: int, at_ms: int) -> None:
        """Add to the sums of the cell's customer, model and day, and to the totals of the hour that `at_ms` is in."""

    def add_requests(self, cell: C, model: str, day: int, requests: int, now: int) -> None:
        """Add admitted requests to the sums."""
        self.add(cell, model, day, Amounts(requests), now, now)

    def add_entry(self, cell: C, entry: Entry, cost: int, tokens: int, now: int) -> None:
        """Add a new entry to the sums; `cost` and `tokens` are what it counts for limits."""
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

    @abstractmethod
    def end_hold(self, cell: C, hold: Hold) -> None:
        """A hold is over, and out of the cell: only its answer is of interest, for `REPLAY_MS` more."""

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
            if not isinstance(op, Record) or op.entry.day <= self.pruned_to:
                continue
            entry = op.entry
            customer = self.booked_on(entry.customer, entry.at_ms)
            key = (customer, entry.id)
            if key not in new and self.find(*key) is None:
                new[key] = None
                cell = self.cell(customer)
                cost, tokens = sums.get(customer, (cell.cost, cell.tokens))
                sums[customer] = cost, tokens = cost + (entry.cost or 0), tokens + entry.tokens
                _check(customer, cost, tokens)

    def _admit(self, op: Admit, now: int) -> Outcome:
        cell = self.cells.get(op.customer)
        if cell is None:
            cell = self.cell(op.customer)
        known = cell.holds.get(op.id)
        if known is not None:
            if (known.expires if known.ended is None else known.ended) + REPLAY_MS > now:
                return known.outcome
        elif (answer := self.answer(cell, op.id, now)) is not None:
            return answer
        if cell.revision != op.revision or not op.day_from_ms <= now < op.day_to_ms:
            return Stale(now, cell.revision, cell.params)
        outcome = self.evaluate(cell, op.limits, now, op)
        if isinstance(outcome, Refused):
            return outcome
        requests = op.requests
        if requests:
            for (_, _, width), (start, prev, cur) in zip(cell.plan.rates, outcome.windows, strict=True):
                cell.rates[width] = window = (start, prev, cur + requests)
                self.keep_rate(cell, width, window)
            if cell.counts_requests:
                _grow(cell.spans, op.model, op.day, requests, 0, 0)
            cell.requests += requests
            self.add_requests(cell, op.model, op.day, requests, now)
        hold = Hold(op.customer, op.id, op.day, op.model, op.cost, op.tokens, now + op.ttl_ms, outcome)
        cell.add_hold(hold)
        self.new_hold(cell, hold)
        return outcome

    def booked_on(self, customer: str, at_ms: int) -> str:
        """The customer, or the label that took its place before the call ended."""
        if self.any_deleted:
            for label, deleted_at in self.tombs(customer):
                if at_ms <= deleted_at:
                    return label
        return customer

    def _record(self, op: Record, now: int) -> Outcome:
        entry = op.entry
        if entry.day <= self.pruned_to:
            return TooLate(self.pruned_to)
        customer = self.booked_on(entry.customer, entry.at_ms) if self.any_deleted else entry.customer
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
        cost, tokens = entry.cost or 0, entry.input_tokens + entry.output_tokens
        _check(customer, cell.cost + cost, cell.tokens + tokens)
        late = self._draw(entry, cell, cost, tokens, now) if entry.admission is not None else False
        cell.cost += cost
        cell.tokens += tokens
        if cell.spans:
            _grow(cell.spans, entry.model, entry.day, 0, cost, tokens)
        self.add_entry(cell, entry, cost, tokens, now)
        self.keep_entry(entry if customer == entry.customer else nameless(entry), customer, 1, late)
        return Recorded(True, entry.cost, entry.day, late)

    def _draw(self, entry: Entry, booked: C, cost: int, tokens: int, now: int) -> bool:
        """Draw from the admission's hold, or else shrink what was presumed of it; whether the entry is late."""
        assert entry.admission is not None
        cell = booked if booked.customer == entry.customer else self.cell(entry.customer)
        hold = cell.holds.get(entry.admission)
        if hold is not None and hold.ended is None and hold.expires > now:
            if hold.pool is not None:
                cost = 0 if cost < 0 else cost if cost < hold.cost else hold.cost
                tokens = tokens if tokens < hold.tokens else hold.tokens
                hold.pool.cost -= cost
                hold.pool.tokens -= tokens
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
            booked.cost -= cut
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
            if hold.cost or hold.tokens:
                self.keep_hold(cell, hold)  # it shows what it never spent
            else:
                del cell.holds[op.id]
                self.end_hold(cell, hold)
            return _EXPIRED
        pool = hold.pool
        if pool is not None:
            pool.cost -= hold.cost
            pool.tokens -= hold.tokens
            hold.pool = None
            cell.counted -= 1
        hold.ended = now
        hold.cost = hold.tokens = 0
        del cell.holds[op.id]
        self.end_hold(cell, hold)
        return _RELEASED

    def _renew(self, op: Renew, now: int) -> Outcome:
        cell = self.cell(op.customer)
        hold = cell.holds.get(op.id)
        if hold is None or hold.ended is not None or hold.expires <= now:
            return _GONE
        hold.expires = max(hold.expires, now + op.ttl_ms)
        self.keep_hold(cell, hold)
        return _RENEWED


def _check(customer: str, cost: int, tokens: int) -> None:
    """See that the sums of a customer stay countable."""
    if not -MAX_NANO <= cost <= MAX_NANO or tokens > MAX_NANO:
        raise CounterOverflow(f"what customer {customer!r} used would pass 9,000,000 USD, or 9.0e15 tokens")


def _grow(spans: dict[str, Span], model: str, day: int, requests: int, cost: int, tokens: int) -> None:
    """Keep up sums that were worked out before."""
    for span in spans.values():
        if span.first <= day < span.end and (span.model is None or span.model == model):
            metric = span.metric
            span.amount += cost if metric == "cost" else requests if metric == "requests" else tokens
