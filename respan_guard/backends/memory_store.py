"""The state behind `memory://`: customers at work and customers at rest, entries, log.

A customer at work is an `Account`, all dictionaries; a minute after its last admission ended it is packed
into one tuple, a fifth of the size, and unpacked when it comes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace

from respan_guard.backends.base import HOUR_MS, REPLAY_MS, Allowed, Amounts, Entry, StoredEntry
from respan_guard.backends.cells import Hold, amounts_of
from respan_guard.backends.ledger import Ledger
from respan_guard.backends.memory_accounts import Account, Everyone, Packed, first_busy_window, pack, sum_of, unpack
from respan_guard.backends.memory_totals import Totals

__all__ = ["MemoryStore"]

_KEEP_EXPIRED_MS = 6 * 86_400_000  # holds that were never ended are listed so long
_MAX_PACKED = 8  # days and models; unpacking more would cost more than it saves
_NOBODY = Allowed(0)


class MemoryStore(Ledger[Account]):
    """Customers, entries, log."""

    def __init__(self, max_customers: int, max_entries: int | None) -> None:
        super().__init__()
        self.max_customers = max_customers
        self.max_entries = max_entries
        self.resting: dict[str, Packed] = {}
        self.rows: deque[tuple[Account, Hold]] = deque()  # holds to forget a minute after their end
        self.due = 0  # when the first of them may be forgotten, as far as known
        self.circle: deque[str] = deque()  # customers, to look at in turn when room is needed
        self.entries: dict[tuple[str, str], StoredEntry] = {}
        self.log: list[tuple[str, str] | None] = []  # None where an entry was revised or pruned
        self.log_start = 1  # place of the log's first item
        self.gone = 0  # items at its start that are None
        self.seq = 0
        self.base: dict[tuple[str, str, int], Amounts] = {}  # what pruned entries summed up to
        self.pruned = -1
        self.prune_at = 0  # no older place has an entry to prune
        self.labels: dict[str, list[tuple[str, int]]] = {}  # of deleted customers, one for each life
        self.everyone: Everyone | None = None
        self.totals = Totals()

    # -- customers ---------------------------------------------------------------------------------

    def cell(self, customer: str) -> Account:
        """The customer at work, or one that is kept as soon as something is written to it."""
        account = self.cells.get(customer)
        if account is not None:
            return account
        packed = self.resting.pop(customer, None)
        if packed is None:
            return Account(customer)
        account = self.cells[customer] = unpack(customer, packed)
        self._to_rest_later(account)
        return account

    def peek(self, customer: str) -> Account | None:
        """The customer, for reading."""
        account = self.cells.get(customer)
        if account is None and customer in self.resting:
            return unpack(customer, self.resting[customer])
        return account

    def each(self) -> Iterator[Account]:
        """All customers, for reading."""
        yield from self.cells.values()
        for customer, packed in self.resting.items():
            yield unpack(customer, packed)

    def __len__(self) -> int:
        return len(self.cells) + len(self.resting)

    def keep(self, account: Account) -> None:
        """Keep an account: something was written to it."""
        if len(self.cells) + len(self.resting) >= self.max_customers:
            self._make_room()
        account.kept = True
        account.first_seen = account.last_seen = self.now
        self.cells[account.customer] = account
        self.circle.append(account.customer)
        self._to_rest_later(account)

    def _to_rest_later(self, account: Account) -> None:
        self.rows.append((account, Hold("", 0, "", 0, 0, self.now, _NOBODY, self.now)))

    def tidy(self, looks: int) -> None:
        """Forget some holds that nobody can ask for any more, and pack customers that are left without any.

        Between batches, because an operation must find the account that it began with where it was.
        """
        rows, now = self.rows, self.now
        for _ in range(looks):
            if not rows:
                return
            account, hold = rows[0]
            if hold.ended is not None and not (hold.cost or hold.tokens):
                if hold.ended + REPLAY_MS > now:
                    self.due = hold.ended + REPLAY_MS
                    return
            elif hold.expires + _KEEP_EXPIRED_MS > now:  # it lives, or shows what it never spent
                rows.rotate(-1)
                continue
            rows.popleft()
            holds = account.holds
            if holds.get(hold.id) is hold:
                if hold.counted:
                    account.expire(now)
                del holds[hold.id]
            few = account.sums is None or len(account.sums) <= _MAX_PACKED
            if not holds and few and self.cells.get(account.customer) is account:
                del self.cells[account.customer]
                self.resting[account.customer] = pack(account, now)

    def _make_room(self) -> None:
        """Look at two customers in turn; one at rest that nothing is known of, with quiet windows, goes."""
        for _ in range(min(2, len(self.circle))):
            customer = self.circle.popleft()
            packed = self.resting.get(customer)
            if packed is None:
                if customer in self.cells:
                    self.circle.append(customer)
                continue
            account = unpack(customer, packed)
            used = any(amounts.calls or amounts.cost for amounts in (account.sums or {}).values())
            if used or account.revision or first_busy_window(account, self.now) is not None:
                self.circle.append(customer)
            else:
                self.totals.forget(account)
                del self.resting[customer]

    def forget(self, customer: str) -> Account | None:
        """Take a customer out."""
        account = self.cells.pop(customer, None)
        if account is None and customer in self.resting:
            account = unpack(customer, self.resting.pop(customer))
        if account is not None and self.everyone is not None:
            for hold in account.holds.values():
                hold.ended = self.now if hold.ended is None else hold.ended
                self.everyone.take(hold, self.now)
        return account

    # -- what the ledger asks ----------------------------------------------------------------------

    def sum(self, customer: str | None, model: str | None, metric: str, first_day: int, end_day: int) -> int:
        """See `Ledger.sum`."""
        if customer is None:
            everyone, key = self._everyone(), (model, metric, first_day, end_day)
            if key not in everyone.spans:
                if len(everyone.spans) >= 64:
                    everyone.spans.clear()
                everyone.spans[key] = sum(sum_of(a, model, metric, first_day, end_day) for a in self.each())
            return everyone.spans[key]
        return sum_of(self.cell(customer), model, metric, first_day, end_day)

    def _everyone(self) -> Everyone:
        everyone = self.everyone
        if everyone is None:
            everyone = self.everyone = Everyone()
            for account in self.cells.values():
                for hold in account.holds.values():
                    everyone.take(hold, self.now)
        return everyone

    def held(self, model: str | None, metric: str, first_day: int, end_day: int, now: int) -> int:
        """See `Ledger.held`."""
        return self._everyone().held(model, metric, first_day, end_day, now)

    def total(self, cell: Account) -> tuple[int, int]:
        """See `Ledger.total`."""
        return cell.cost, cell.tokens

    def find(self, customer: str, entry_id: str) -> StoredEntry | None:
        """See `Ledger.find`."""
        return self.entries.get((customer, entry_id))

    def tombs(self, customer: str) -> Sequence[tuple[str, int]]:
        """See `Ledger.tombs`."""
        return self.labels.get(customer, ()) if self.labels else ()

    def pruned_to(self) -> int:
        """See `Ledger.pruned_to`."""
        return self.pruned

    # -- what the ledger tells ---------------------------------------------------------------------

    def _sums(self, account: Account, model: str, day: int, now: int) -> Amounts:
        if not account.kept:
            self.keep(account)
        account.last_seen = now
        sums = account.sums
        if sums is None:
            sums = account.sums = {}
        found = sums.get((model, day))
        if found is None:
            if all(day != known for _, known in sums):
                self.totals.customers[day] += 1
            found = sums[model, day] = Amounts()
        return found

    def add(self, cell: Account, model: str, day: int, amounts: Amounts, now: int, at_ms: int) -> None:
        """See `Ledger.add`."""
        self.totals.catch_up(self)
        self.totals.add(model, day, at_ms, amounts)
        self._sums(cell, model, day, now).add(amounts)
        cell.cost += amounts.cost
        cell.tokens += amounts.input_tokens + amounts.output_tokens
        if self.everyone is not None:
            tokens = amounts.input_tokens + amounts.output_tokens
            self.everyone.grow(model, day, amounts.requests, amounts.cost, tokens)

    def add_requests(self, cell: Account, model: str, day: int, requests: int, now: int) -> None:
        """See `Ledger.add_requests`."""
        self._sums(cell, model, day, now).requests += requests
        asked, key = self.totals.asked, (now // HOUR_MS, day, model)
        asked[key] = asked.get(key, 0) + requests
        if self.everyone is not None:
            self.everyone.grow(model, day, requests, 0, 0)

    def add_entry(self, cell: Account, entry: Entry, now: int) -> None:
        """See `Ledger.add_entry`."""
        sums = self._sums(cell, entry.model, entry.day, now)
        cost, usage = entry.cost, entry.usage
        if entry.kind != "adjustment":
            sums.calls += 1
        if cost is None:
            sums.unpriced += 1
            cost = 0
        tokens = entry.input_tokens + entry.output_tokens
        sums.cost += cost
        cell.cost += cost
        cell.tokens += tokens
        sums.input_tokens += entry.input_tokens
        sums.output_tokens += entry.output_tokens
        sums.cache_read_tokens += usage.cache_read_tokens
        if usage.status == "error":
            sums.errors += 1
        if usage.latency_ms is not None:
            sums.latency_ms += usage.latency_ms
            sums.timed += 1
        if usage.ttft_ms is not None:
            sums.ttft_ms += usage.ttft_ms
            sums.ttft_calls += 1
        if self.everyone is not None:
            self.everyone.grow(entry.model, entry.day, 0, cost, tokens)

    def keep_entry(self, entry: Entry, customer: str, rev: int, late: bool) -> None:
        """See `Ledger.keep_entry`."""
        if customer != entry.customer:
            entry = _moved(entry, customer)
        key = (customer, entry.id)
        if rev > 1:
            self._drop(self.entries[key].seq)
        self.seq += 1
        self.entries[key] = StoredEntry(self.seq, rev, entry, late)
        self.log.append(key)
        if self.max_entries is not None and len(self.entries) > self.max_entries:
            oldest = self.log[self.gone]
            assert oldest is not None
            self.fold(self.entries[oldest])

    def new_hold(self, cell: Account, hold: Hold) -> None:
        """See `Ledger.new_hold`."""
        if not cell.kept:
            self.keep(cell)
        self.rows.append((cell, hold))
        if self.everyone is not None:
            self.everyone.take(hold, self.now)

    def keep_hold(self, cell: Account, hold: Hold) -> None:
        """See `Ledger.keep_hold`."""
        if self.everyone is not None:
            self.everyone.take(hold, self.now)

    # -- log ---------------------------------------------------------------------------------------

    def fold(self, stored: StoredEntry) -> None:
        """Forget an entry, but not what it added to the sums."""
        if stored.seq > self.totals.seq:
            self.totals.catch_up(self)
        entry = stored.entry
        self.base.setdefault((entry.customer, entry.model, entry.day), Amounts()).add(amounts_of(entry))
        del self.entries[entry.customer, entry.id]
        self._drop(stored.seq)

    def _drop(self, seq: int) -> None:
        log = self.log
        log[seq - self.log_start] = None
        while self.gone < len(log) and log[self.gone] is None:
            self.gone += 1
        if self.gone > 1024 and 2 * self.gone > len(log):  # seldom, so that it costs no entry much
            del log[: self.gone]
            self.log_start += self.gone
            self.gone = 0

    def prune(self, before_day: int, read_by_all: int, limit: int) -> int:
        """See `Backend.prune`."""
        if before_day - 1 > self.pruned:
            self.pruned = before_day - 1
            self.prune_at = 0
        newest = before_day - 1 == self.pruned  # an earlier day than before finds no place to go on from
        gone, seq = 0, max(self.prune_at if newest else 0, self.log_start + self.gone)
        while gone < limit and seq <= min(self.seq, read_by_all):
            key = self.log[seq - self.log_start] if seq >= self.log_start else None
            if key is not None and self.entries[key].entry.day < before_day:
                self.fold(self.entries[key])
                gone += 1
            seq += 1
        if newest:
            self.prune_at = seq
        return gone

    def rename(self, customer: str, label: str) -> None:
        """Book a deleted customer's entries under its label, without what an app noted on them."""
        for key in [key for key in self.entries if key[0] == customer]:
            stored = self.entries.pop(key)
            entry = _moved(stored.entry, label)
            entry.usage = replace(stored.entry.usage, metadata=None)
            self.entries[label, key[1]] = replace(stored, entry=entry)
            self.log[stored.seq - self.log_start] = (label, key[1])
        for base in [key for key in self.base if key[0] == customer]:
            self.base[label, base[1], base[2]] = self.base.pop(base)


def _moved(entry: Entry, customer: str) -> Entry:
    found = copy(entry)
    found.customer = customer
    return found
