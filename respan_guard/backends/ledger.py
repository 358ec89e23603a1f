"""The decisions of the contract, once, for every store that keeps its working set in this process.

Memory keeps everything in cells; SQLite loads a customer's cell when it is asked about, runs a batch
of operations on cells inside one transaction, and writes back what changed. Both answer alike because
both run this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

from respan_guard.backends.base import (
    REPLAY_MS,
    Admit,
    Allowed,
    Amounts,
    Ended,
    Entry,
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
from respan_guard.errors import CounterOverflow
from respan_guard.money import MAX_NANO

__all__ = ["EVER", "Cell", "Hold", "Ledger", "amounts_of", "roll"]

EVER = 1 << 40
"""A day after all days: the end of a total."""
_MAX_SPANS = 8
_GONE = Ended("gone")


def roll(window: Window | None, width: int, now: int) -> Window:
    """The state of a rate at `now`: a window starts with the first hit after two quiet ones, else behind the last."""
    if window is None:
        return (now, 0, 0)
    start, _, cur = window
    if now < start + width:
        return window if now >= start - width else (now, 0, 0)
    return (start + width, cur, 0) if now < start + 2 * width else (now, 0, 0)


def amounts_of(entry: Entry, sign: int = 1) -> Amounts:
    """What an entry adds to the sums of its customer, model and day."""
    call = sign if entry.kind != "adjustment" else 0
    return Amounts(
        0,
        call,
        sign * (entry.cost or 0),
        sign * entry.input_tokens,
        sign * entry.output_tokens,
        sign * entry.usage.cache_read_tokens,
        sign if entry.cost is None else 0,
        sign if entry.usage.status == "error" else 0,
    )


class Hold:
    """The row of one admission. `cost` and `tokens` are what is left of the hold."""

    __slots__ = ("cost", "day", "ended", "expires", "id", "model", "outcome", "tokens")

    def __init__(
        self,
        hold_id: str,
        day: int,
        model: str,
        cost: int,
        tokens: int,
        expires: int,
        outcome: Allowed,
        ended: int | None = None,
    ) -> None:
        self.id = hold_id
        self.day = day
        self.model = model
        self.cost = cost
        self.tokens = tokens
        self.expires = expires
        self.outcome = outcome
        self.ended = ended


class Cell:
    """What is known of one customer: all that admissions, records and releases of it touch."""

    __slots__ = ("customer", "expiry", "holds", "live", "params", "rates", "revision", "spans")

    def __init__(self, customer: str, revision: str = "", params: Params | None = None) -> None:
        self.customer = customer
        self.revision = revision
        self.params = params
        self.rates: dict[int, Window] | None = None
        self.holds: dict[str, Hold] = {}
        self.live: dict[tuple[int, str], list[int]] | None = None  # (day, model) -> [cost, tokens] held
        self.expiry: list[tuple[int, str]] | None = None  # heap of (expires, id) of holds that hold something
        self.spans: dict[tuple[str, int, int, str | None], int] | None = None  # sums worked out before

    def add_hold(self, hold: Hold) -> None:
        """Take a hold into the working set."""
        self.holds[hold.id] = hold
        if hold.ended is None and (hold.cost or hold.tokens):
            if self.live is None or self.expiry is None:
                self.live, self.expiry = {}, []
            sums = self.live.setdefault((hold.day, hold.model), [0, 0])
            sums[0] += hold.cost
            sums[1] += hold.tokens
            heappush(self.expiry, (hold.expires, hold.id))

    def drop(self, hold: Hold, cost: int, tokens: int) -> None:
        """A live hold holds less from now on."""
        if self.live is not None and (cost or tokens):
            key = (hold.day, hold.model)
            sums = self.live.get(key)
            if sums is not None:
                sums[0] -= cost
                sums[1] -= tokens
                if sums == [0, 0]:
                    del self.live[key]

    def expire(self, now: int) -> None:
        """Stop counting holds that expired; their rows keep what they never spent."""
        heap = self.expiry
        while heap and heap[0][0] <= now:
            _, hold_id = heappop(heap)
            hold = self.holds.get(hold_id)
            if hold is None or hold.ended is not None:
                continue
            if hold.expires > now:  # renewed meanwhile
                heappush(heap, (hold.expires, hold_id))
            else:
                self.drop(hold, hold.cost, hold.tokens)


class Ledger(ABC):
    """Applies operations. Subclasses say where cells and sums come from, and what becomes of a change."""

    def __init__(self) -> None:
        self.now = 0
        self._do: dict[type, Callable[[Any, int], Outcome]] = {
            Admit: self._admit,
            Record: self._record,
            Release: self._release,
            Renew: self._renew,
        }

    # -- storage -----------------------------------------------------------------------------------

    @abstractmethod
    def cell(self, customer: str) -> Cell:
        """The customer's cell, loaded or new."""

    @abstractmethod
    def sum(self, customer: str | None, model: str | None, metric: str, first_day: int, end_day: int) -> int:
        """A sum over days, of all customers or models where None. Called for what no cell has at hand."""

    @abstractmethod
    def held(self, model: str | None, metric: str, first_day: int, end_day: int, now: int) -> int:
        """What all customers' live holds hold, for limits that span customers."""

    @abstractmethod
    def total(self, customer: str) -> int:
        """The customer's cost of all time, to see that it stays countable."""

    @abstractmethod
    def find(self, customer: str, entry_id: str) -> StoredEntry | None:
        """A stored entry."""

    @abstractmethod
    def tomb(self, customer: str) -> tuple[str, int] | None:
        """The label that took a deleted customer's place, and when."""

    @abstractmethod
    def pruned_to(self) -> int:
        """The last day whose entries may be gone."""

    @abstractmethod
    def add(self, cell: Cell, model: str, day: int, amounts: Amounts, now: int) -> None:
        """Add to the sums of the cell's customer, a model and a day."""

    @abstractmethod
    def keep_entry(self, entry: Entry, customer: str, rev: int, late: bool) -> None:
        """Append an entry to the log, or a revision of one that is stored."""

    @abstractmethod
    def keep_hold(self, cell: Cell, hold: Hold) -> None:
        """A hold was made or changed."""

    @abstractmethod
    def keep_rate(self, cell: Cell, width: int, window: Window) -> None:
        """A rate was counted."""

    # -- operations --------------------------------------------------------------------------------

    def run(self, ops: Sequence[Op], now: int) -> list[Outcome]:
        """Apply operations in order.

        Raises:
            CounterOverflow: A sum would pass what can be counted exactly. Nothing was applied.
        """
        if now > self.now:
            self.now = now
        now = self.now
        self._check_range(ops)
        do = self._do
        return [do[op.__class__](op, now) for op in ops]

    def _check_range(self, ops: Sequence[Op]) -> None:
        growing: dict[str, int] = {}
        for op in ops:
            if isinstance(op, Record) and op.entry.cost is not None:
                entry = op.entry
                before = growing.get(entry.customer)
                if before is None:
                    before = self.total(entry.customer)
                growing[entry.customer] = after = before + op.entry.cost
                if not -MAX_NANO <= after <= MAX_NANO:
                    raise CounterOverflow(f"the cost of customer {entry.customer!r} would pass 9,000,000 USD")

    def evaluate(
        self, cell: Cell, limits: Sequence[Limit], model: str, now: int
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Window, ...]]:
        """Used, held and rate states of limits at `now`, without changing anything that is stored."""
        if cell.expiry:
            cell.expire(now)
        used, held, windows = [], [], []
        for limit in limits:
            if limit.kind == "rate":
                width = limit.window_ms
                window = roll(cell.rates.get(width) if cell.rates else None, width, now)
                windows.append(window)
                start, prev, cur = window
                if prev:
                    cur += prev * (width - max(0, now - start)) // width
                used.append(cur)
                held.append(0)
                continue
            first, end = (0, EVER) if limit.kind == "total" else (limit.first_day, limit.end_day)
            scope = limit.scope
            if scope == "customer" or scope == "customer+model":
                only = None if scope == "customer" else model
                key = (limit.metric, first, end, only)
                spans = cell.spans
                if spans is None:
                    spans = cell.spans = {}
                amount = spans.get(key)
                if amount is None:
                    if len(spans) >= _MAX_SPANS:
                        spans.clear()
                    amount = spans[key] = self.sum(cell.customer, only, limit.metric, first, end)
                used.append(amount)
                held.append(self._held_by(cell, limit.metric, first, end, only) if cell.live else 0)
            else:
                only = model if scope == "model" else None
                used.append(self.sum(None, only, limit.metric, first, end))
                held.append(0 if limit.metric == "requests" else self.held(only, limit.metric, first, end, now))
        return tuple(used), tuple(held), tuple(windows)

    @staticmethod
    def _held_by(cell: Cell, metric: str, first: int, end: int, model: str | None) -> int:
        if metric == "requests" or not cell.live:
            return 0
        index = 0 if metric == "cost" else 1
        return sum(
            sums[index]
            for (day, held_model), sums in cell.live.items()
            if first <= day < end and (model is None or model == held_model)
        )

    def _admit(self, op: Admit, now: int) -> Outcome:
        cell = self.cell(op.customer)
        known = cell.holds.get(op.id)
        if known is not None and (known.expires if known.ended is None else known.ended) + REPLAY_MS > now:
            return known.outcome
        if cell.revision != op.revision or not op.day_from_ms <= now < op.day_to_ms:
            return Stale(now, cell.revision, cell.params)
        limits, requests = op.limits, op.requests
        used, held, windows = self.evaluate(cell, limits, op.model, now)
        refused = False
        reasons: list[str | None] = []
        for limit, u, h in zip(limits, used, held, strict=True):
            reason = None
            if limit.metric == "requests":
                if u + requests > limit.amount:
                    reason = "rate" if limit.kind == "rate" else "exhausted"
            else:
                w = op.cost if limit.metric == "cost" else op.tokens
                amount = limit.amount
                if u + h + w > amount or (u + h >= amount and not op.free):
                    reason = "held" if u < amount and u + w <= amount else "exhausted"
            reasons.append(reason)
            if reason is not None:
                refused = True
        if refused:
            return Refused(now, tuple(reasons), used, held, windows)
        if windows:
            states = iter(windows)
            for limit in limits:
                if limit.kind == "rate":
                    start, prev, cur = next(states)
                    window = (start, prev, cur + requests)
                    if cell.rates is None:
                        cell.rates = {}
                    cell.rates[limit.window_ms] = window
                    self.keep_rate(cell, limit.window_ms, window)
        outcome = Allowed(now, used, held, windows)
        if requests:
            self._add(cell, op.model, op.day, Amounts(requests), now)
        hold = Hold(op.id, op.day, op.model, op.cost, op.tokens, now + op.ttl_ms, outcome)
        cell.add_hold(hold)
        self.keep_hold(cell, hold)
        return outcome

    def _add(self, cell: Cell, model: str, day: int, amounts: Amounts, now: int) -> None:
        spans = cell.spans
        if spans:
            for key in spans:
                metric, first, end, only = key
                if first <= day < end and (only is None or only == model):
                    if metric == "cost":
                        spans[key] += amounts.cost
                    elif metric == "requests":
                        spans[key] += amounts.requests
                    else:
                        spans[key] += amounts.input_tokens + amounts.output_tokens
        self.add(cell, model, day, amounts, now)

    def _record(self, op: Record, now: int) -> Outcome:
        entry = op.entry
        if entry.day <= self.pruned_to():
            return TooLate(self.pruned_to())
        customer = entry.customer
        tomb = self.tomb(customer)
        if tomb is not None and entry.at_ms <= tomb[1]:
            customer = tomb[0]
        stored = self.find(customer, entry.id)
        if stored is not None:
            first = stored.entry
            same = (first.cost, first.input_tokens, first.output_tokens) == (
                entry.cost,
                entry.input_tokens,
                entry.output_tokens,
            )
            conflict = not same and first.kind != "presumed"
            return Recorded(False, first.cost, first.day, stored.late, conflict)
        late = self._draw(entry, customer, now) if entry.admission is not None else False
        self._add(self.cell(customer), entry.model, entry.day, amounts_of(entry), now)
        self.keep_entry(entry, customer, 1, late)
        return Recorded(True, entry.cost, entry.day, late)

    def _draw(self, entry: Entry, customer: str, now: int) -> bool:
        """Draw from the admission's hold, or else shrink what was presumed of it; whether the entry is late."""
        cell = self.cell(entry.customer)
        assert entry.admission is not None
        hold = cell.holds.get(entry.admission)
        if hold is not None and hold.ended is None and hold.expires > now:
            cost, tokens = min(hold.cost, max(0, entry.cost or 0)), min(hold.tokens, entry.tokens)
            if cost or tokens:
                cell.drop(hold, cost, tokens)
                hold.cost -= cost
                hold.tokens -= tokens
                self.keep_hold(cell, hold)
            return False
        presumed_id = f"presumed:{entry.admission}"
        if entry.id == presumed_id or not entry.cost or entry.cost < 0:
            return True
        presumed = self.find(customer, presumed_id)
        if presumed is not None and presumed.entry.cost:
            old = presumed.entry
            cut = min(presumed.entry.cost, entry.cost)
            less = Entry(
                old.id, old.customer, old.day, old.at_ms, presumed.entry.cost - cut, old.input_tokens,
                old.output_tokens, old.model, old.admission, old.kind, old.source, old.usage,
            )  # fmt: skip
            self._add(self.cell(customer), old.model, old.day, Amounts(cost=-cut), now)
            self.keep_entry(less, customer, presumed.rev + 1, presumed.late)
        return True

    def _release(self, op: Release, now: int) -> Outcome:
        cell = self.cell(op.customer)
        hold = cell.holds.get(op.id)
        if hold is None or hold.ended is not None:
            return _GONE
        cell.expire(now)
        if hold.expires <= now:
            hold.ended = hold.expires
            state = "expired"
        else:
            cell.drop(hold, hold.cost, hold.tokens)
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
