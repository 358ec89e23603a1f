"""The state behind `memory://`: customers at work and customers at rest, entries, log.

A customer at work is an `Account`, all dictionaries; a minute after its last admission ended it is packed
into one tuple, a fifth of the size, and unpacked when it comes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import TypeAlias

from respan_guard.backends.base import REPLAY_MS, Allowed, Amounts, Entry, StoredEntry, Window
from respan_guard.backends.cells import Hold, amounts_of
from respan_guard.backends.ledger import Ledger
from respan_guard.backends.memory_accounts import Account, Everyone, Packed, first_busy_window, pack, sum_of, unpack

__all__ = ["MemoryStore"]

_KEEP_EXPIRED_MS = 6 * 86_400_000  # holds that were never ended are listed so long
_MAX_PACKED = 8  # days and models; unpacking more would cost more than it saves
_TIDY_MS = 100
_LOOKS = 32
_PLAIN = (1, False)
Answer: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...], tuple[Window, ...]]
"""When its hold ended, and the fields of an `Allowed`: a tuple of numbers costs the garbage collector nothing."""


class MemoryStore(Ledger[Account]):
    """Customers, entries, log."""

    def __init__(self, max_customers: int, max_entries: int | None) -> None:
        super().__init__()
        self.max_customers = max_customers
        self.max_entries = max_entries
        self.resting: dict[str, Packed] = {}
        self.answers: dict[tuple[str, str], Answer] = {}  # of holds that are over, by customer and id
        self.ended: deque[tuple[str, str]] = deque()  # their keys, in that order
        self.working: deque[tuple[int, Account]] = deque()  # when to see whether an account may rest
        self.due = 0  # when there may be something to tidy
        self.circle: deque[str] = deque()  # customers, to look at in turn when room is needed
        self.log: list[Entry | None] = []  # None where an entry was revised or pruned
        self.places: dict[tuple[str, str], int] = {}  # seq of each entry in it, by customer and id
        self.remarks: dict[int, tuple[int, bool]] = {}  # rev and late, of the few that are no first ones in time
        self.log_start = 1  # place of the log's first item
        self.gone = 0  # items at its start that are None
        self.seq = 0
        self.base: dict[tuple[str, str, int], Amounts] = {}  # what pruned entries summed up to
        self.prune_at = 0  # no older place has an entry to prune
        self.labels: dict[str, list[tuple[str, int]]] = {}  # of deleted customers, one for each life
        self.everyone: Everyone | None = None

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
        self.working.append((self.now + REPLAY_MS, account))

    def tidy(self) -> None:
        """Forget some answers that nobody can ask for any more, and pack customers at rest.

        Between batches, because an operation must find the account that it began with where it was. A little at a
        time, but more than one operation can add.
        """
        now, answers, ended, working = self.now, self.answers, self.ended, self.working
        self.due = now + _TIDY_MS
        for _ in range(_LOOKS):
            if not ended:
                break
            answer = answers.get(ended[0])
            if answer is not None:
                if answer[0] + REPLAY_MS > now:
                    break
                del answers[ended[0]]
            ended.popleft()
        else:
            self.due = now
        for _ in range(_LOOKS):
            if not working or working[0][0] > now:
                break
            _, account = working.popleft()
            if self.cells.get(account.customer) is account and not self._rest(account):
                self._to_rest_later(account)
        else:
            self.due = now

    def _rest(self, account: Account) -> bool:
        """Pack an account that is left without holds; whether it was."""
        now, holds = self.now, account.holds
        if account.last_seen + REPLAY_MS > now or len(account.sums) > _MAX_PACKED:
            return False
        account.expire(now)
        for old in [hold.id for hold in holds.values() if hold.expires + _KEEP_EXPIRED_MS <= now]:
            del holds[old]
        if holds:
            return False
        del self.cells[account.customer]
        self.resting[account.customer] = pack(account, now)
        return True

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
            used = any(amounts.calls or amounts.cost for amounts in account.sums.values())
            if used or account.revision or first_busy_window(account, self.now) is not None:
                self.circle.append(customer)
            else:
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
        for key in [key for key in self.answers if key[0] == customer]:
            del self.answers[key]
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

    def find(self, customer: str, entry_id: str) -> StoredEntry | None:
        """See `Ledger.find`."""
        seq = self.places.get((customer, entry_id))
        if seq is None:
            return None
        entry = self.log[seq - self.log_start]
        assert entry is not None
        return self.stored(seq, entry)

    def stored(self, seq: int, entry: Entry) -> StoredEntry:
        """An entry as reads show it."""
        rev, late = self.remarks.get(seq, _PLAIN)
        return StoredEntry(seq, rev, entry, late)

    def answer(self, cell: Account, hold_id: str, now: int) -> Allowed | None:
        """See `Ledger.answer`."""
        found = self.answers.get((cell.customer, hold_id))
        if found is None or found[0] + REPLAY_MS <= now:
            return None
        _, told, used, held, windows = found
        return Allowed(told, used, held, windows)

    def tombs(self, customer: str) -> Sequence[tuple[str, int]]:
        """See `Ledger.tombs`."""
        return self.labels.get(customer, ())

    # -- what the ledger tells ---------------------------------------------------------------------

    def _sums(self, account: Account, model: str, day: int, now: int) -> Amounts:
        if not account.kept:
            self.keep(account)
        account.last_seen = now
        found = account.sums.get((model, day))
        if found is None:
            found = account.sums[model, day] = Amounts()
        return found

    def add(self, cell: Account, model: str, day: int, amounts: Amounts, now: int) -> None:
        """See `Ledger.add`."""
        self._sums(cell, model, day, now).add(amounts)
        if self.everyone is not None:
            tokens = amounts.input_tokens + amounts.output_tokens
            self.everyone.grow(model, day, amounts.requests, amounts.cost, tokens)

    def add_requests(self, cell: Account, model: str, day: int, requests: int, now: int) -> None:
        """See `Ledger.add_requests`."""
        self._sums(cell, model, day, now).requests += requests
        if self.everyone is not None:
            self.everyone.grow(model, day, requests, 0, 0)

    def add_entry(self, cell: Account, entry: Entry, cost: int, tokens: int, now: int) -> None:
        """See `Ledger.add_entry`."""
        sums = self._sums(cell, entry.model, entry.day, now)
        usage = entry.usage
        if entry.kind != "adjustment":
            sums.calls += 1
        if entry.cost is None:
            sums.unpriced += 1
        sums.cost += cost
        sums.input_tokens += entry.input_tokens
        sums.output_tokens += entry.output_tokens
        sums.cache_read_tokens += usage.cache_read_tokens
        if usage.status == "error":
            sums.errors += 1
        if self.everyone is not None:
            self.everyone.grow(entry.model, entry.day, 0, cost, tokens)

    def keep_entry(self, entry: Entry, customer: str, rev: int, late: bool) -> None:
        """See `Ledger.keep_entry`."""
        if customer != entry.customer:
            entry = _moved(entry, customer)
        key = (customer, entry.id)
        if rev > 1:
            self._drop(self.places[key])
        self.seq = seq = self.seq + 1
        self.log.append(entry)
        self.places[key] = seq
        if late or rev > 1:
            self.remarks[seq] = (rev, late)
        if self.max_entries is not None and len(self.places) > self.max_entries:
            oldest = self.log[self.gone]
            assert oldest is not None
            self.fold(oldest)

    def new_hold(self, cell: Account, hold: Hold) -> None:
        """See `Ledger.new_hold`."""
        if not cell.kept:
            self.keep(cell)
        if self.everyone is not None:
            self.everyone.take(hold, self.now)

    def keep_hold(self, cell: Account, hold: Hold) -> None:
        """See `Ledger.keep_hold`."""
        if self.everyone is not None:
            self.everyone.take(hold, self.now)

    def end_hold(self, cell: Account, hold: Hold) -> None:
        """See `Ledger.end_hold`."""
        key, told = (hold.customer, hold.id), hold.outcome
        assert hold.ended is not None
        self.answers[key] = (hold.ended, told.now, told.used, told.held, told.windows)
        self.ended.append(key)
        if self.everyone is not None:
            self.everyone.take(hold, self.now)

    # -- log ---------------------------------------------------------------------------------------

    def fold(self, entry: Entry) -> None:
        """Forget an entry, but not what it added to the sums."""
        self.base.setdefault((entry.customer, entry.model, entry.day), Amounts()).add(amounts_of(entry))
        self._drop(self.places.pop((entry.customer, entry.id)))

    def _drop(self, seq: int) -> None:
        log = self.log
        log[seq - self.log_start] = None
        self.remarks.pop(seq, None)
        while self.gone < len(log) and log[self.gone] is None:
            self.gone += 1
        if self.gone > 1024 and 2 * self.gone > len(log):  # seldom, so that it costs no entry much
            del log[: self.gone]
            self.log_start += self.gone
            self.gone = 0

    def prune(self, before_day: int, read_by_all: int, limit: int) -> int:
        """See `Backend.prune`."""
        if before_day - 1 > self.pruned_to:
            self.pruned_to = before_day - 1
            self.prune_at = 0
        newest = before_day - 1 == self.pruned_to  # an earlier day than before finds no place to go on from
        gone, seq = 0, max(self.prune_at if newest else 0, self.log_start + self.gone)
        while gone < limit and seq <= min(self.seq, read_by_all):
            entry = self.log[seq - self.log_start] if seq >= self.log_start else None
            if entry is not None and entry.day < before_day:
                self.fold(entry)
                gone += 1
            seq += 1
        if newest:
            self.prune_at = seq
        return gone

    def rename(self, customer: str, label: str) -> None:
        """Book a deleted customer's entries under its label, without what an app noted on them."""
        for key in [key for key in self.places if key[0] == customer]:
            seq = self.places[label, key[1]] = self.places.pop(key)
            entry = self.log[seq - self.log_start]
            assert entry is not None
            self.log[seq - self.log_start] = entry = _moved(entry, label)
            entry.usage = replace(entry.usage, metadata=None)
        for base in [key for key in self.base if key[0] == customer]:
            self.base[label, base[1], base[2]] = self.base.pop(base)


def _moved(entry: Entry, customer: str) -> Entry:
    found = copy(entry)
    found.customer = customer
    return found
