"""The storage contract without cleverness: every sum is recomputed from what happened.

Written against the docstrings of `respan_guard.backends.base`, not against any backend. What a store
makes up at random (revisions, labels of the deleted) is told to the oracle, not guessed by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from respan_guard.backends.base import (
    REPLAY_MS,
    Admit,
    Allowed,
    Amounts,
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

__all__ = ["Oracle"]


@dataclass
class Held:
    """One admission."""

    day: int
    model: str
    cost: int
    tokens: int
    expires: int
    answer: Allowed
    ended: int | None = None

    def lives(self, now: int) -> bool:
        """Whether it counts."""
        return self.ended is None and self.expires > now


@dataclass
class Known:
    """A customer the store has heard of."""

    first_seen: int
    last_seen: int
    revision: str = ""
    params: Params | None = None


class Oracle:
    """The state, and the operations on it."""

    def __init__(self) -> None:
        self.now = 0
        self.known: dict[str, Known] = {}
        self.rates: dict[tuple[str, int], Window] = {}
        self.holds: dict[tuple[str, str], Held] = {}
        self.requests: dict[tuple[str, str, int], int] = {}
        self.entries: dict[tuple[str, str], StoredEntry] = {}
        self.gone: list[Entry] = []
        self.tombs: dict[str, list[tuple[str, int]]] = {}
        self.pruned_to = -1
        self.seq = 0

    def apply(self, ops: list[Op], now: int) -> list[Outcome]:
        """Answer operations in order."""
        self.now = max(self.now, now)
        return [self._one(op) for op in ops]

    def _one(self, op: Op) -> Outcome:
        if isinstance(op, Admit):
            return self._admit(op)
        if isinstance(op, Record):
            return self._record(op.entry)
        return self._release(op) if isinstance(op, Release) else self._renew(op)

    # -- sums --------------------------------------------------------------------------------------

    def booked(self) -> Iterator[Entry]:
        """Every entry there ever was, in its last revision."""
        yield from self.gone
        for stored in self.entries.values():
            yield stored.entry

    def sums(self) -> dict[tuple[str, str, int], Amounts]:
        """What each customer, model and day adds up to."""
        found: dict[tuple[str, str, int], Amounts] = {}
        for key, requests in self.requests.items():
            found.setdefault(key, Amounts()).requests += requests
        for entry in self.booked():
            sums = found.setdefault((entry.customer, entry.model, entry.day), Amounts())
            sums.calls += entry.kind != "adjustment"
            sums.cost += entry.cost or 0
            sums.input_tokens += entry.input_tokens
            sums.output_tokens += entry.output_tokens
            sums.cache_read_tokens += entry.usage.cache_read_tokens
            sums.unpriced += entry.cost is None
            sums.errors += entry.usage.status == "error"
        return found

    def window(self, customer: str, width: int) -> Window:
        """The state of a rate now."""
        now = self.now
        start, prev, cur = self.rates.get((customer, width), (now, 0, 0))
        if now >= start + 2 * width or now < start - width:
            return (now, 0, 0)
        return (start + width, cur, 0) if now >= start + width else (start, prev, cur)

    def used(self, limit: Limit, customer: str, model: str) -> int:
        """What counts against a limit."""
        if limit.kind == "rate":
            start, prev, cur = self.window(customer, limit.window_ms)
            return prev * (limit.window_ms - max(0, self.now - start)) // limit.window_ms + cur
        return sum(
            {
                "requests": amounts.requests,
                "cost": amounts.cost,
                "tokens": amounts.input_tokens + amounts.output_tokens,
            }[limit.metric]
            for (of, of_model, day), amounts in self.sums().items()
            if _in_scope(limit, customer, model, of, of_model) and _in_days(limit, day)
        )

    def held(self, limit: Limit, customer: str, model: str) -> int:
        """What live holds hold of a limit."""
        if limit.metric == "requests":
            return 0
        return sum(
            hold.cost if limit.metric == "cost" else hold.tokens
            for (of, _), hold in self.holds.items()
            if hold.lives(self.now) and _in_scope(limit, customer, model, of, hold.model) and _in_days(limit, hold.day)
        )

    def standing(self, customer: str, limits: tuple[Limit, ...], model: str) -> Allowed:
        """Where limits stand."""
        return Allowed(
            self.now,
            tuple(self.used(limit, customer, model) for limit in limits),
            tuple(self.held(limit, customer, model) for limit in limits),
            tuple(self.window(customer, limit.window_ms) for limit in limits if limit.kind == "rate"),
        )

    # -- operations --------------------------------------------------------------------------------

    def _seen(self, customer: str, *, active: bool = True) -> None:
        known = self.known.setdefault(customer, Known(self.now, self.now))
        if active:
            known.last_seen = self.now

    def _admit(self, op: Admit) -> Outcome:
        now = self.now
        hold = self.holds.get((op.customer, op.id))
        if hold is not None and (hold.expires if hold.ended is None else hold.ended) + REPLAY_MS > now:
            return hold.answer
        known = self.known.get(op.customer, Known(0, 0))
        if op.revision != known.revision or not op.day_from_ms <= now < op.day_to_ms:
            return Stale(now, known.revision, known.params)
        answer = self.standing(op.customer, op.limits, op.model)
        reasons = [
            _reason(op, limit, used, held)
            for limit, used, held in zip(op.limits, answer.used, answer.held, strict=True)
        ]
        if any(reasons):
            return Refused(now, tuple(reasons), answer.used, answer.held, answer.windows)
        if op.requests:
            for width in {limit.window_ms for limit in op.limits if limit.kind == "rate"}:
                start, prev, cur = self.window(op.customer, width)
                self.rates[op.customer, width] = (start, prev, cur + op.requests)
            key = (op.customer, op.model, op.day)
            self.requests[key] = self.requests.get(key, 0) + op.requests
        self._seen(op.customer, active=op.requests > 0)
        self.holds[op.customer, op.id] = Held(op.day, op.model, op.cost, op.tokens, now + op.ttl_ms, answer)
        return answer

    def _record(self, entry: Entry) -> Outcome:
        if entry.day <= self.pruned_to:
            return TooLate(self.pruned_to)
        lives = self.tombs.get(entry.customer, [])
        customer = next((label for label, deleted_at in lives if entry.at_ms <= deleted_at), entry.customer)
        stored = self.entries.get((customer, entry.id))
        if stored is not None:
            first = stored.entry
            differs = _figures(first) != _figures(entry) and first.kind != "presumed"
            return Recorded(False, first.cost, first.day, stored.late, differs)
        late = False
        if entry.admission is not None:
            hold = self.holds.get((entry.customer, entry.admission))
            if hold is not None and hold.lives(self.now):
                hold.cost -= min(hold.cost, max(0, entry.cost or 0))
                hold.tokens -= min(hold.tokens, entry.tokens)
            else:
                late = True
                self._shrink_presumed(customer, entry)
        self._store(replace(entry, customer=customer), 1, late)
        self._seen(customer)
        return Recorded(True, entry.cost, entry.day, late)

    def _shrink_presumed(self, customer: str, entry: Entry) -> None:
        stored = self.entries.get((customer, f"presumed:{entry.admission}"))
        if stored is None or stored.entry.id == entry.id:
            return
        cut = min(stored.entry.cost or 0, max(0, entry.cost or 0))
        if cut:
            self._store(replace(stored.entry, cost=(stored.entry.cost or 0) - cut), stored.rev + 1, stored.late)

    def _store(self, entry: Entry, rev: int, late: bool) -> None:
        self.seq += 1
        self.entries[entry.customer, entry.id] = StoredEntry(self.seq, rev, entry, late)

    def _release(self, op: Release) -> Ended:
        hold = self.holds.get((op.customer, op.id))
        if hold is None or hold.ended is not None:
            return Ended("gone")
        if hold.expires <= self.now:
            hold.ended = hold.expires
            return Ended("expired")
        hold.ended, hold.cost, hold.tokens = self.now, 0, 0
        return Ended("released")

    def _renew(self, op: Renew) -> Ended:
        hold = self.holds.get((op.customer, op.id))
        if hold is None or not hold.lives(self.now):
            return Ended("gone")
        hold.expires = max(hold.expires, self.now + op.ttl_ms)
        return Ended("renewed")

    # -- customers ---------------------------------------------------------------------------------

    def put(self, customer: str, params: Params, revision: str, now: int) -> bool:
        """Store params; whether that changed anything. `revision` is the one the store made up."""
        self.now = max(self.now, now)
        known = self.known.get(customer)
        if known is not None and known.params == params:
            return False
        self._seen(customer, active=False)
        self.known[customer].revision, self.known[customer].params = revision, params
        return True

    def delete(self, customer: str, label: str, now: int) -> None:
        """Forget who a customer was. `label` is the one the store made up."""
        self.now = max(self.now, now)
        known = self.known.pop(customer)
        self.known[label] = Known(known.first_seen, known.last_seen)
        self.tombs.setdefault(customer, []).append((label, self.now))
        self.rates = {key: window for key, window in self.rates.items() if key[0] != customer}
        self.holds = {key: hold for key, hold in self.holds.items() if key[0] != customer}
        self.requests = {
            (label if of == customer else of, model, day): n for (of, model, day), n in self.requests.items()
        }
        self.gone = [replace(entry, customer=label) if entry.customer == customer else entry for entry in self.gone]
        self.entries = {
            (label if of == customer else of, entry_id): (
                replace(stored, entry=replace(stored.entry, customer=label)) if of == customer else stored
            )
            for (of, entry_id), stored in self.entries.items()
        }

    # -- reads -------------------------------------------------------------------------------------

    def log(self) -> list[StoredEntry]:
        """Entries in order."""
        return sorted(self.entries.values(), key=lambda stored: stored.seq)

    def hold_rows(self, state: str) -> list[HoldRow]:
        """Holds that live, or that expired with something unspent."""
        rows = [
            HoldRow(customer, hold_id, hold.day, hold.model, hold.cost, hold.tokens, hold.expires, state)
            for (customer, hold_id), hold in self.holds.items()
            if (
                hold.lives(self.now)
                if state == "live"
                else hold.expires <= self.now and hold.ended in (None, hold.expires) and (hold.cost or hold.tokens)
            )
        ]
        return sorted(rows, key=lambda row: (row.expires_ms, row.customer, row.id))

    def prune(self, before_day: int, read_to: int) -> int:
        """Let go of old entries up to a place in the log; how many went."""
        self.pruned_to = max(self.pruned_to, before_day - 1)
        old = [s for s in self.log() if s.entry.day < before_day and s.seq <= read_to]
        for stored in old:
            self.gone.append(self.entries.pop((stored.entry.customer, stored.entry.id)).entry)
        return len(old)


def _in_scope(limit: Limit, customer: str, model: str, of: str, of_model: str) -> bool:
    return {
        "customer": of == customer,
        "customer+model": of == customer and of_model == model,
        "model": of_model == model,
        "all": True,
    }[limit.scope]


def _in_days(limit: Limit, day: int) -> bool:
    return limit.kind == "total" or limit.first_day <= day < limit.end_day


def _figures(entry: Entry) -> tuple[int | None, int, int]:
    return (entry.cost, entry.input_tokens, entry.output_tokens)


def _reason(op: Admit, limit: Limit, used: int, held: int) -> str | None:
    if limit.metric == "requests":
        if used + op.requests > limit.amount:
            return "rate" if limit.kind == "rate" else "exhausted"
        return None
    asked = op.cost if limit.metric == "cost" else op.tokens
    if op.free and asked == 0:
        return None
    if used + held + asked > limit.amount or used + held >= limit.amount:
        return "held" if used + asked <= limit.amount and used < limit.amount else "exhausted"
    return None
