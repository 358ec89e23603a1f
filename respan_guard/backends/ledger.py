"""The decisions of the contract, once, for every store that keeps its working set in this process.

Memory keeps everything in cells; SQLite loads a customer's cell when it is asked about, runs a batch
of operations on cells inside one transaction, and writes back what changed. Both answer alike because
both run this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any, TypeAlias

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

__all__ = ["EVER", "Cell", "Hold", "Ledger", "Span", "amounts_of", "roll"]

EVER = 1 << 40
"""A day after all days: the end of a total."""
_MAX_SPANS = 8
_GONE = Ended("gone")
_ONE_REQUEST = Amounts(1)
_NOTHING_HELD = (0,) * 64


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


def held_by(cell: Cell, metric: str, first: int, end: int, model: str | None) -> int:
    """What a customer's live holds hold of a metric, on a run of days."""
    index = 0 if metric == "cost" else 1
    return sum(
        sums[index]
        for (day, held_model), sums in (cell.live or {}).items()
        if first <= day < end and (model is None or model == held_model)
    )


def _days(limit: Limit) -> tuple[int, int]:
    return (0, EVER) if limit.kind == "total" else (limit.first_day, limit.end_day)


def _reason(op: Admit, limit: Limit, used: int, held: int) -> str | None:
    """Why a limit refuses, or None if it does not."""
    amount = limit.amount
    if limit.metric == "requests":
        if used + op.requests <= amount:
            return None
        return "rate" if limit.kind == "rate" else "exhausted"
    asked = op.cost if limit.metric == "cost" else op.tokens
    if used + held + asked <= amount and (used + held < amount or op.free):
        return None
    return "held" if used < amount and used + asked <= amount else "exhausted"


def _in_range(customer: str, cost: int) -> int:
    if not -MAX_NANO <= cost <= MAX_NANO:
        raise CounterOverflow(f"the cost of customer {customer!r} would pass 9,000,000 USD")
    return cost


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


class Span:
    """The sum of one metric over a run of days, kept up with every change."""

    __slots__ = ("amount", "end", "first", "metric", "model")

    def __init__(self, metric: str, first: int, end: int, model: str | None, amount: int) -> None:
        self.metric = metric
        self.first = first
        self.end = end
        self.model = model
        self.amount = amount


Planned: TypeAlias = tuple[int, str, int, Span | None, Limit]
"""A limit as evaluations want it: amount, metric, width of a rate, the customer's own sum, the limit."""


class Cell:
    """What is known of one customer: all that admissions, records and releases of it touch."""

    __slots__ = (
        "customer",
        "expiry",
        "holds",
        "limits",
        "live",
        "model",
        "params",
        "plan",
        "rates",
        "revision",
        "spans",
        "wide",
        "widths",
    )

    def __init__(self, customer: str, revision: str = "", params: Params | None = None) -> None:
        self.customer = customer
        self.revision = revision
        self.params = params
        self.rates: dict[int, Window] | None = None
        self.holds: dict[str, Hold] = {}
        self.live: dict[tuple[int, str], list[int]] | None = None  # (day, model) -> [cost, tokens] held
        self.expiry: list[tuple[int, str]] | None = None  # heap of (expires, id) of holds that hold something
        self.spans: dict[str, Span] | None = None  # sums worked out before
        self.limits: tuple[Limit, ...] | None = None  # those that the plan below is made for
        self.model = ""
        self.plan: Sequence[Planned] = ()
        self.wide = False  # a limit of the plan spans customers
        self.widths: tuple[int, ...] = ()  # of the plan's rates

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
            CounterOverflow: A sum would pass what can be counted exactly. Earlier ops of the batch are applied:
                the store rolls the batch back, or sees to it beforehand with `check_range`.
        """
        if now > self.now:
            self.now = now
        else:
            now = self.now
        do = self._do
        return [do[op.__class__](op, now) for op in ops]

    def check_range(self, ops: Sequence[Op]) -> None:
        """Refuse a batch in which a sum might pass what can be counted exactly, before any of it is applied."""
        growing: dict[str, int] = {}
        for op in ops:
            if isinstance(op, Record) and op.entry.cost is not None:
                customer = op.entry.customer
                before = growing[customer] if customer in growing else self.total(customer)
                growing[customer] = _in_range(customer, before + op.entry.cost)

    def evaluate(
        self, cell: Cell, limits: tuple[Limit, ...], now: int, op: Admit
    ) -> tuple[bool, list[int], Sequence[int], list[Window]]:
        """Whether `op` fits all limits at `now`, and used, held and rate states. Changes nothing that is stored."""
        if limits is not cell.limits or op.model != cell.model:
            self._plan(cell, limits, op.model)
        if cell.expiry:
            cell.expire(now)
        held: list[int] | None = [] if cell.live or cell.wide else None
        used: list[int] = []
        windows: list[Window] = []
        fits = True
        for amount, metric, width, span, limit in cell.plan:
            holding = 0
            if width:
                window = cell.rates.get(width) if cell.rates else None
                if window is None or not 0 <= now - window[0] < width:
                    window = roll(window, width, now)
                windows.append(window)
                start, prev, spent = window
                if prev:
                    spent += prev * (width - max(0, now - start)) // width
                if spent + op.requests > amount:
                    fits = False
            else:
                spent = self._wide_sum(limit, op.model) if span is None else span.amount
                if metric == "requests":
                    if spent + op.requests > amount:
                        fits = False
                else:
                    if held is not None:
                        holding = self._held(cell, limit, op.model, now)
                    asked = op.cost if metric == "cost" else op.tokens
                    if spent + holding + asked > amount or (spent + holding >= amount and not op.free):
                        fits = False
            used.append(spent)
            if held is not None:
                held.append(holding)
        return fits, used, _NOTHING_HELD[: len(used)] if held is None else held, windows

    def standing(self, cell: Cell, limits: Sequence[Limit], model: str, now: int) -> Allowed:
        """Where limits stand at `now`, as an admission would see it."""
        _, used, held, windows = self.evaluate(
            cell, tuple(limits), now, Admit("", cell.customer, "", 0, 0, 0, (), model)
        )
        return Allowed(now, tuple(used), tuple(held), tuple(windows))

    def _plan(self, cell: Cell, limits: tuple[Limit, ...], model: str) -> None:
        """Look up once what every evaluation of these limits needs."""
        if cell.spans is None or len(cell.spans) + len(limits) > _MAX_SPANS:
            cell.spans = {}
        plan: list[Planned] = []
        for limit in limits:
            span = None
            if not limit.window_ms and limit.scope in ("customer", "customer+model"):
                only = model if limit.scope == "customer+model" else None
                key = limit.key if only is None else f"{limit.key}:{only}"
                span = cell.spans.get(key)
                if span is None:
                    first, end = _days(limit)
                    amount = self.sum(cell.customer, only, limit.metric, first, end)
                    span = cell.spans[key] = Span(limit.metric, first, end, only, amount)
            plan.append((limit.amount, limit.metric, limit.window_ms, span, limit))
        cell.plan, cell.limits, cell.model = plan, limits, model
        cell.wide = any(span is None and not width for _, _, width, span, _ in plan)
        cell.widths = tuple(width for _, _, width, _, _ in plan if width)

    def _wide_sum(self, limit: Limit, model: str) -> int:
        first, end = _days(limit)
        return self.sum(None, model if limit.scope == "model" else None, limit.metric, first, end)

    def _held(self, cell: Cell, limit: Limit, model: str, now: int) -> int:
        first, end = _days(limit)
        only = model if limit.scope in ("customer+model", "model") else None
        if limit.scope in ("model", "all"):
            return self.held(only, limit.metric, first, end, now)
        return held_by(cell, limit.metric, first, end, only)

    def _admit(self, op: Admit, now: int) -> Outcome:
        cell = self.cell(op.customer)
        known = cell.holds.get(op.id)
        if known is not None and (known.expires if known.ended is None else known.ended) + REPLAY_MS > now:
            return known.outcome
        if cell.revision != op.revision or not op.day_from_ms <= now < op.day_to_ms:
            return Stale(now, cell.revision, cell.params)
        fits, used, held, windows = self.evaluate(cell, op.limits, now, op)
        if not fits:
            reasons = tuple(map(_reason, [op] * len(used), op.limits, used, held))
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
            self._add(cell, op.model, op.day, _ONE_REQUEST if requests == 1 else Amounts(requests), now)
        outcome = Allowed(now, tuple(used), tuple(held), tuple(windows))
        hold = Hold(op.id, op.day, op.model, op.cost, op.tokens, now + op.ttl_ms, outcome)
        if op.cost or op.tokens:
            cell.add_hold(hold)
        else:
            cell.holds[op.id] = hold
        self.keep_hold(cell, hold)
        return outcome

    def _add(self, cell: Cell, model: str, day: int, amounts: Amounts, now: int) -> None:
        spans = cell.spans
        if spans:
            for span in spans.values():
                if amounts is _ONE_REQUEST and span.metric != "requests":
                    continue
                if span.first <= day < span.end and (span.model is None or span.model == model):
                    if span.metric == "cost":
                        span.amount += amounts.cost
                    elif span.metric == "requests":
                        span.amount += amounts.requests
                    else:
                        span.amount += amounts.input_tokens + amounts.output_tokens
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
        if entry.cost:
            _in_range(customer, self.total(customer) + entry.cost)
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
