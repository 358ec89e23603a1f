"""`memory://`: everything in this process. The reference for what a backend does: read it first."""

from __future__ import annotations

import secrets
import threading
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from respan_guard.backends import memory_reads as reads
from respan_guard.backends.base import (
    REPLAY_MS,
    Allowed,
    Amounts,
    AuditRow,
    Backend,
    Conflict,
    CustomerQuery,
    CustomerRow,
    Discrepancy,
    Entry,
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
    UsageQuery,
    UsageRow,
    Window,
)
from respan_guard.backends.ledger import EVER, Cell, Hold, Ledger, held_by
from respan_guard.errors import ConfigurationError

__all__ = ["MemoryBackend"]

_MAX_AUDIT = 10_000
_MAX_REFUSALS = 100_000


class Account(Cell):
    """A customer's cell with what other stores keep on disk: its daily sums and when it was seen."""

    __slots__ = ("first_seen", "last_seen", "sums", "total")

    def __init__(self, customer: str) -> None:
        super().__init__(customer)
        self.first_seen = self.last_seen = 0
        self.total = 0
        self.sums: dict[tuple[str, int], Amounts] | None = None  # (model, day)


class MemoryStore(Ledger):
    """The state: accounts, entries, log."""

    def __init__(self, max_customers: int) -> None:
        super().__init__()
        self.max_customers = max_customers
        self.accounts: dict[str, Account] = {}
        self.entries: dict[tuple[str, str], StoredEntry] = {}
        self.log: dict[int, tuple[str, str]] = {}  # seq -> key, in order; a revised entry's old place is dropped
        self.base: dict[tuple[str, str, int], Amounts] = {}  # what pruned entries summed up to
        self.tombs: dict[str, tuple[str, int]] = {}
        self.pruned = -1
        self.seq = 0
        self.ended: deque[tuple[int, str, str]] = deque()  # (when to forget, customer, hold id)
        self.idle: deque[str] = deque()  # customers to look at when room is needed, in a circle

    def cell(self, customer: str) -> Account:
        account = self.accounts.get(customer)
        return account if account is not None else Account(customer)

    def known(self, cell: Cell) -> Account:
        """Keep the account from now on: something was written to it."""
        assert isinstance(cell, Account)
        if cell.customer not in self.accounts:
            if len(self.accounts) >= self.max_customers:
                self._make_room()
            self.accounts[cell.customer] = cell
            cell.first_seen = cell.last_seen = self.now
        return cell

    def _make_room(self) -> None:
        """Look at two accounts in turn; one that nothing is known of, and whose windows are quiet, goes."""
        if not self.idle:
            self.idle.extend(self.accounts)
        for _ in range(min(2, len(self.idle))):
            account = self.accounts.get(self.idle.popleft())
            if account is None or account.revision or account.holds or account.total:
                continue
            if account.sums and any(amounts.calls for amounts in account.sums.values()):
                continue
            if all(self.now >= start + 2 * width for width, (start, _, _) in (account.rates or {}).items()):
                del self.accounts[account.customer]

    def sum(self, customer: str | None, model: str | None, metric: str, first_day: int, end_day: int) -> int:
        accounts = self.accounts.values() if customer is None else [self.cell(customer)]
        return sum(
            _metric(amounts, metric)
            for account in accounts
            for (of_model, day), amounts in (account.sums or {}).items()
            if first_day <= day < end_day and (model is None or model == of_model)
        )

    def held(self, model: str | None, metric: str, first_day: int, end_day: int, now: int) -> int:
        held = 0
        for account in self.accounts.values():
            account.expire(now)
            held += held_by(account, metric, first_day, end_day, model)
        return held

    def total(self, customer: str) -> int:
        return self.cell(customer).total

    def find(self, customer: str, entry_id: str) -> StoredEntry | None:
        return self.entries.get((customer, entry_id))

    def tomb(self, customer: str) -> tuple[str, int] | None:
        return self.tombs.get(customer) if self.tombs else None

    def pruned_to(self) -> int:
        return self.pruned

    def add(self, cell: Cell, model: str, day: int, amounts: Amounts, now: int) -> None:
        account = self.known(cell)
        account.last_seen = now
        account.total += amounts.cost
        sums = account.sums
        if sums is None:
            sums = account.sums = {}
        found = sums.get((model, day))
        if found is None:
            found = sums[model, day] = Amounts()
        found.add(amounts)

    def keep_entry(self, entry: Entry, customer: str, rev: int, late: bool) -> None:
        if customer != entry.customer:
            entry = reads.moved(entry, customer)
        key = (customer, entry.id)
        before = self.entries.get(key)
        if before is not None:
            del self.log[before.seq]
        self.seq += 1
        self.entries[key] = StoredEntry(self.seq, rev, entry, late)
        self.log[self.seq] = key

    def keep_hold(self, cell: Cell, hold: Hold) -> None:
        if hold.ended is not None:
            self.ended.append((hold.ended + REPLAY_MS, cell.customer, hold.id))
            ended = self.ended
            for _ in range(2):  # as many as can come: the row of each admission goes a minute after its end
                if not ended or ended[0][0] > self.now:
                    break
                _, customer, hold_id = ended.popleft()
                account = self.accounts.get(customer)
                if account is not None:
                    gone = account.holds.get(hold_id)
                    if gone is not None and gone.ended is not None and not gone.cost:
                        del account.holds[hold_id]
        else:
            self.known(cell)

    def keep_rate(self, cell: Cell, width: int, window: Window) -> None:
        self.known(cell)


def _metric(amounts: Amounts, metric: str) -> int:
    if metric == "cost":
        return amounts.cost
    return amounts.requests if metric == "requests" else amounts.input_tokens + amounts.output_tokens


class MemoryBackend(Backend):
    """A locked store without connections: any thread and any loop may use it. Gone with the process.

    Args:
        url: "memory://".
        namespace: Each backend is a store of its own, so this has no effect.
        max_customers: Above so many, customers that nothing was spent for are forgotten when they are idle.
    """

    shared = True

    def __init__(self, url: str = "memory://", *, namespace: str = "default", max_customers: int = 1_000_000) -> None:
        if url not in ("memory://", "memory:///"):
            raise ConfigurationError(f"a store in memory has no name or options; write memory:// instead of {url}")
        self._lock = threading.Lock()
        self._store = MemoryStore(max_customers)
        self._refusals: Counter[tuple[int, str, str]] = Counter()
        self._audit: deque[AuditRow] = deque(maxlen=_MAX_AUDIT)
        self._audited = 0
        self._cursors: dict[str, int] = {}

    def abandon(self) -> None:
        """After a fork another thread's lock may be held for ever in the child."""
        self._lock = threading.Lock()

    async def open(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to give back: a guard that opens again finds what it left."""

    def apply_now(self, ops: Sequence[Op], now: int) -> list[Outcome]:
        """What `apply` does, from any thread."""
        with self._lock:
            if len(ops) > 1:
                self._store.check_range(ops)
            return self._store.run(ops, now)

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
        with self._lock:
            at = self._now(now)
            account = self._store.cell(customer)
            if if_revision is not None and if_revision != account.revision:
                return Conflict(account.revision, account.params)
            if account.params == params:
                return Put(account.revision, False)
            before, account.params = account.params, dict(params)
            account.revision = secrets.token_hex(8)
            self._store.known(account)
            self._note(AuditRow(at, customer, "put", actor, before, account.params))
            return Put(account.revision, True)

    async def delete(self, customer: str, *, actor: str = "", now: int | None = None) -> bool:
        """See `Backend.delete`."""
        with self._lock:
            at = self._now(now)
            store = self._store
            account = store.accounts.pop(customer, None)
            if account is None:
                return False
            label = f"deleted-{secrets.token_hex(8)}"
            store.tombs[customer] = (label, at)
            heir = Account(label)
            heir.first_seen, heir.last_seen = account.first_seen, account.last_seen
            heir.sums, heir.total = account.sums, account.total
            store.accounts[label] = heir
            reads.rename(store, customer, label)
            self._audit = deque((row for row in self._audit if row.customer != customer), maxlen=_MAX_AUDIT)
            self._refusals = Counter(
                {(m, label if c == customer else c, r): n for (m, c, r), n in self._refusals.items()}
            )
            self._note(AuditRow(at, label, "delete", actor, None, None))
            return True

    def _note(self, row: AuditRow) -> None:
        self._audited += 1
        self._audit.append(reads.numbered(row, self._audited))

    async def get(self, customer: str) -> CustomerRow | None:
        """See `Backend.get`."""
        with self._lock:
            account = self._store.accounts.get(customer)
            return None if account is None else reads.customer_row(account)

    async def customers(self, query: CustomerQuery) -> list[CustomerRow]:
        """See `Backend.customers`."""
        with self._lock:
            return reads.customers(self._store, query)

    async def standing(
        self, customer: str, limits: Sequence[Limit], model: str = "", now: int | None = None
    ) -> Allowed:
        """See `Backend.standing`."""
        with self._lock:
            at = self._now(now)
            return self._store.standing(self._store.cell(customer), limits, model, at)

    async def usage(self, query: UsageQuery) -> list[UsageRow]:
        """See `Backend.usage`."""
        with self._lock:
            return reads.usage(self._store, query)

    async def entries(self, query: RecordQuery) -> list[StoredEntry]:
        """See `Backend.entries`."""
        with self._lock:
            return reads.entries(self._store, query)

    async def holds(
        self, customer: str | None = None, *, state: str = "live", now: int | None = None, limit: int = 1000
    ) -> list[HoldRow]:
        """See `Backend.holds`."""
        with self._lock:
            return reads.holds(self._store, customer, state, self._now(now))[:limit]

    async def add_refusals(self, rows: Sequence[RefusalRow]) -> None:
        """See `Backend.add_refusals`."""
        with self._lock:
            for row in rows:
                self._refusals[row.minute, row.customer, row.reason] += row.count
            while len(self._refusals) > _MAX_REFUSALS:
                del self._refusals[next(iter(self._refusals))]

    async def refusals(
        self, *, customer: str | None = None, since_minute: int = 0, until_minute: int = EVER, limit: int = 10_000
    ) -> list[RefusalRow]:
        """See `Backend.refusals`."""
        with self._lock:
            found = [
                RefusalRow(who, reason, minute, count)
                for (minute, who, reason), count in self._refusals.items()
                if since_minute <= minute < until_minute and customer in (None, who)
            ]
        return sorted(found, key=lambda row: (-row.minute, row.customer, row.reason))[:limit]

    async def add_audit(self, row: AuditRow) -> None:
        """See `Backend.add_audit`."""
        with self._lock:
            self._note(row)

    async def audit(
        self, *, customer: str | None = None, before: int | None = None, limit: int = 100
    ) -> list[AuditRow]:
        """See `Backend.audit`."""
        with self._lock:
            rows = [r for r in reversed(self._audit) if customer in (None, r.customer)]
        return [row for row in rows if before is None or row.seq < before][:limit]

    async def cursor(self, name: str) -> int | None:
        """See `Backend.cursor`."""
        return self._cursors.get(name)

    async def set_cursor(self, name: str, seq: int) -> None:
        """See `Backend.set_cursor`."""
        with self._lock:
            self._cursors[name] = seq

    async def prune(self, before_day: int, *, limit: int = 1000) -> int:
        """See `Backend.prune`."""
        with self._lock:
            return reads.prune(self._store, before_day, min(self._cursors.values(), default=EVER), limit)

    async def verify(self) -> list[Discrepancy]:
        """See `Backend.verify`."""
        with self._lock:
            return reads.verify(self._store)

    async def info(self) -> StoreInfo:
        """See `Backend.info`."""
        with self._lock:
            facts: dict[str, Any] = {
                "customers": str(len(self._store.accounts)),
                "records": str(len(self._store.entries)),
            }
        return StoreInfo("memory://", "none", False, facts, ("everything is lost when the process ends",))
