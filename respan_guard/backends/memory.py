"""`memory://`: everything in this process. The reference for what a backend does: read it first."""

from __future__ import annotations

import logging
import secrets
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

from respan_guard.backends import memory_reads as reads
from respan_guard.backends.base import (
    ANY,
    Allowed,
    AuditRow,
    Backend,
    Conflict,
    CustomerQuery,
    CustomerRow,
    Discrepancy,
    Expected,
    HoldRow,
    Limit,
    Op,
    Outcome,
    Params,
    Put,
    RecordQuery,
    RefusalRow,
    StoredEntry,
    StoreInfo,
    Told,
    UsageQuery,
    UsageRow,
)
from respan_guard.backends.cells import EVER
from respan_guard.backends.facts import check_fact, check_page
from respan_guard.backends.memory_accounts import Account
from respan_guard.backends.memory_facts import Facts
from respan_guard.backends.memory_store import MemoryStore
from respan_guard.backends.memory_turns import Turns
from respan_guard.errors import ConfigurationError, CounterOverflow
from respan_guard.urls import mask_url

__all__ = ["MemoryBackend"]

logger = logging.getLogger("respan_guard")
_MAX_AUDIT = 10_000
_MAX_REFUSALS = 100_000


class MemoryBackend(Backend):
    """A locked store without connections: any thread and any loop may use it. Gone with the process.

    A decision costs the same whatever the number of customers; pages of customers and reports look at all of them.

    Args:
        url: "memory://".
        namespace: Each backend is a store of its own, so this has no effect.
        max_customers: Above so many, customers that nothing was spent for and who were never put are forgotten, some
            with each new one, once they were idle for a minute, hold nothing, and none of their rates' windows counts
            any more: two windows after it began. No hard bound: forgetting sooner would give a limit back, refusing
            newcomers would let whoever sends random ids shut out all others. So with a rate per minute those of about
            two minutes come on top, with a rate per day those of two days. Whoever is refused takes no room.
        max_entries: Above so many, the oldest entries are forgotten; their sums stay. An entry that is sent again
            after that counts again.
    """

    shared = True

    def __init__(
        self,
        url: str = "memory://",
        *,
        namespace: str = "default",
        max_customers: int = 1_000_000,
        max_entries: int | None = None,
    ) -> None:
        if url not in ("memory://", "memory:///"):
            raise ConfigurationError(
                f"a store in memory has no name or options; write memory:// instead of {mask_url(url)}"
            )
        for name, value in (("max_customers", max_customers), ("max_entries", max_entries)):
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {value}")
        self._turns = Turns(self._run_posted)
        self._store = MemoryStore(max_customers, max_entries)
        self._refusals: OrderedDict[tuple[int, str, str], int] = OrderedDict()
        self._audit: deque[AuditRow] = deque(maxlen=_MAX_AUDIT)
        self._audited = 0
        self._cursors: dict[str, int] = {}
        self._facts = Facts()

    def abandon(self) -> None:
        """After a fork another thread's turn would last for ever in the child."""
        self._turns.forget()

    async def open(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to give back: a guard that opens again finds what it left."""

    def apply_now(self, ops: Sequence[Op], now: int) -> list[Outcome]:
        """See `Backend.apply_now`."""
        return self._turns.take(self._run, ops, now)

    def _run(self, ops: Sequence[Op], now: int) -> list[Outcome]:
        store = self._store
        if len(ops) > 1:
            store.check_range(ops)
        outcomes = store.run(ops, now)
        if store.due <= store.now:
            store.tidy()
        return outcomes

    def post_now(self, ops: Sequence[Op], now: int, told: Told | None = None) -> None:
        """See `Backend.post_now`."""
        self._turns.post(ops, now, told)

    def _run_posted(self, ops: Sequence[Op], now: int, told: Told | None) -> None:
        try:
            outcomes = self._run(ops, now)
        except CounterOverflow as error:
            if len(ops) == 1:
                logger.error("a usage record can't be stored, this is it: %r: %s", ops[0], error)
            else:
                for op in ops:  # one of them is it; the others, a release above all, must get through
                    self._run_posted((op,), now, told)
        else:
            if told is not None:
                told(ops, outcomes)

    async def apply(self, ops: Sequence[Op], now: int | None = None) -> list[Outcome]:
        """See `Backend.apply`."""
        return self.apply_now(ops, now or 0)

    def _now(self, now: int | None) -> int:
        self._store.now = max(self._store.now, now or 0)
        return self._store.now

    async def put(
        self, customer: str, params: Params, *, if_revision: str | None = None, actor: str = "", now: int | None = None
    ) -> Put | Conflict:
        """See `Backend.put`."""
        with self._turns:
            at = self._now(now)
            account = self._store.cell(customer)
            if if_revision is not None and if_revision != account.revision:
                return Conflict(account.revision, account.params)
            if account.params == params:
                return Put(account.revision, False)
            before, account.params = account.params, deepcopy(dict(params))
            account.revision = secrets.token_hex(8)
            if not account.kept:
                self._store.keep(account)
            self._note(AuditRow(at, customer, "put", actor, before, account.params))
            return Put(account.revision, True)

    async def delete(self, customer: str, *, actor: str = "", now: int | None = None) -> bool:
        """See `Backend.delete`."""
        with self._turns:
            at = self._now(now)
            store = self._store
            account = store.forget(customer)
            if account is None:
                return False
            label = f"deleted-{secrets.token_hex(8)}"
            store.labels.setdefault(customer, []).append((label, at))
            store.any_deleted = True
            heir = Account(label)
            store.keep(heir)
            heir.first_seen, heir.last_seen = account.first_seen, account.last_seen
            heir.sums, heir.requests, heir.cost, heir.tokens = (
                account.sums, account.requests, account.cost, account.tokens
            )  # fmt: skip
            store.rename(customer, label)
            self._audit = deque((row for row in self._audit if row.customer != customer), maxlen=_MAX_AUDIT)
            for key in [key for key in self._refusals if key[1] == customer]:
                self._refusals[key[0], label, key[2]] = self._refusals.pop(key)
            self._note(AuditRow(at, label, "delete", actor, None, None))
            return True

    def _note(self, row: AuditRow) -> None:
        self._audited += 1
        self._audit.append(replace(row, seq=self._audited))

    async def get(self, customer: str) -> CustomerRow | None:
        """See `Backend.get`."""
        with self._turns:
            account = self._store.peek(customer)
            return None if account is None else reads.customer_row(account)

    async def customers(self, query: CustomerQuery) -> list[CustomerRow]:
        """See `Backend.customers`."""
        with self._turns:
            return reads.customers(self._store, query)

    async def count_customers(self, *, seen_since_ms: int | None = None, blocked: bool | None = None) -> int:
        """See `Backend.count_customers`."""
        with self._turns:
            if seen_since_ms is None and blocked is None:
                return len(self._store)
            each = self._store.each()
            return sum(reads.is_one(account, seen_since_ms=seen_since_ms, blocked=blocked) for account in each)

    async def standing(
        self, customer: str, limits: Sequence[Limit], model: str = "", now: int | None = None
    ) -> Allowed:
        """See `Backend.standing`."""
        with self._turns:
            at = self._now(now)
            return self._store.standing(self._store.cell(customer), limits, model, at)

    async def usage(self, query: UsageQuery) -> list[UsageRow]:
        """See `Backend.usage`."""
        with self._turns:
            return reads.usage(self._store, query)

    async def entries(self, query: RecordQuery) -> list[StoredEntry]:
        """See `Backend.entries`."""
        with self._turns:
            return reads.entries(self._store, query)

    async def entry(self, customer: str, entry_id: str) -> StoredEntry | None:
        """See `Backend.entry`."""
        with self._turns:
            return self._store.find(customer, entry_id)

    async def booked_on(self, customer: str, at_ms: int) -> str:
        """See `Backend.booked_on`."""
        with self._turns:
            return self._store.booked_on(customer, at_ms)

    async def holds(
        self, customer: str | None = None, *, state: str = "live", now: int | None = None, limit: int = 1000
    ) -> list[HoldRow]:
        """See `Backend.holds`."""
        with self._turns:
            return reads.holds(self._store, customer, state, self._now(now))[:limit]

    async def add_refusals(self, rows: Sequence[RefusalRow]) -> None:
        """See `Backend.add_refusals`."""
        with self._turns:
            for row in rows:
                key = (row.minute, self._store.booked_on(row.customer, row.minute * 60_000), row.reason)
                self._refusals[key] = self._refusals.get(key, 0) + row.count
            while len(self._refusals) > _MAX_REFUSALS:
                self._refusals.popitem(last=False)

    async def refusals(
        self, *, customer: str | None = None, since_minute: int = 0, until_minute: int = EVER, limit: int = 10_000
    ) -> list[RefusalRow]:
        """See `Backend.refusals`."""
        with self._turns:
            found = [
                RefusalRow(who, reason, minute, count)
                for (minute, who, reason), count in self._refusals.items()
                if since_minute <= minute < until_minute and customer in (None, who)
            ]
        return sorted(found, key=lambda row: (-row.minute, row.customer, row.reason))[:limit]

    async def refusal_sums(
        self, *, customer: str | None = None, since_minute: int = 0, until_minute: int = EVER
    ) -> dict[str, int]:
        """See `Backend.refusal_sums`."""
        found: Counter[str] = Counter()
        with self._turns:
            for (minute, who, reason), count in self._refusals.items():
                if since_minute <= minute < until_minute and customer in (None, who):
                    found[reason] += count
        return dict(found)

    async def add_audit(self, row: AuditRow) -> None:
        """See `Backend.add_audit`."""
        with self._turns:
            self._note(row)

    async def audit(
        self, *, customer: str | None = None, before: int | None = None, limit: int = 100
    ) -> list[AuditRow]:
        """See `Backend.audit`."""
        with self._turns:
            rows = [r for r in reversed(self._audit) if customer in (None, r.customer)]
        return [row for row in rows if before is None or row.seq < before][:limit]

    async def cursor(self, name: str) -> int | None:
        """See `Backend.cursor`."""
        return self._cursors.get(name)

    async def set_cursor(self, name: str, seq: int) -> None:
        """See `Backend.set_cursor`."""
        with self._turns:
            self._cursors[name] = seq

    async def set_fact(self, space: str, key: str, value: str | None, *, expected: Expected = ANY) -> bool:
        """See `Backend.set_fact`."""
        check_fact(space, key, value, expected)
        with self._turns:
            return self._facts.put(space, key, value, expected)

    async def fact(self, space: str, key: str) -> str | None:
        """See `Backend.fact`."""
        check_fact(space, key)
        with self._turns:
            return self._facts.get(space, key)

    async def facts(self, space: str, *, after: str = "", limit: int = 1000) -> list[tuple[str, str]]:
        """See `Backend.facts`."""
        check_page(space, after)
        with self._turns:
            return self._facts.page(space, after, limit)

    async def prune(self, before_day: int, *, limit: int = 1000) -> int:
        """See `Backend.prune`."""
        with self._turns:
            return self._store.prune(before_day, min(self._cursors.values(), default=EVER), limit)

    async def verify(self) -> list[Discrepancy]:
        """See `Backend.verify`."""
        with self._turns:
            return reads.verify(self._store)

    async def info(self) -> StoreInfo:
        """See `Backend.info`."""
        with self._turns:
            facts = {"customers": str(len(self._store)), "records": str(len(self._store.places))}
        return StoreInfo("memory://", "none", False, facts, ("everything is lost when the process ends",))
