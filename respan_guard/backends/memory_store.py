"""The state behind `memory://`: customers at work and customers at rest, entries, log.

A customer at work is an `Account`, all dictionaries; a minute after its last admission ended it is packed
into one tuple, a fifth of the size, and unpacked when it comes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from respan_guard.backends.base import HOUR_MS, REPLAY_MS, Allowed, Amounts, Entry, Window
from respan_guard.backends.cells import Hold
from respan_guard.backends.ledger import Ledger
from respan_guard.backends.memory_accounts import Account, Everyone, Packed, first_busy_window, pack, sum_of, unpack
from respan_guard.backends.memory_log import EntryLog

__all__ = ["MemoryStore"]

_KEEP_EXPIRED_MS = 6 * 86_400_000  # holds that were never ended are listed so long
_MAX_PACKED = 8  # days and models; unpacking more would cost more than it saves
_TIDY_MS = 100
_LOOKS = 32
Answer: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...], tuple[Window, ...]]
"""When its hold ended, and the fields of an `Allowed`: a tuple of numbers costs the garbage collector nothing."""


class MemoryStore(EntryLog, Ledger[Account]):
    """Customers and their ended admissions, upon the log."""

    def __init__(self, max_customers: int, max_entries: int | None) -> None:
        Ledger.__init__(self)
        EntryLog.__init__(self, max_entries)
        self.max_customers = max_customers
        self.resting: dict[str, Packed] = {}
        self.answers: dict[tuple[str, str], Answer] = {}  # of holds that are over, by customer and id
        self.ended: deque[tuple[str, str]] = deque()  # their keys, in that order
        self.working: deque[tuple[int, Account]] = deque()  # when to see whether an account may rest
        self.due = 0  # when there may be something to tidy
        self.circle: deque[str] = deque()  # customers, to look at in turn when room is needed
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
        """Look at two customers in turn; one at rest that nothing is known of, with quiet windows, goes.

        If neither may go there is one more than wanted: a window that still counts is a limit that would be given back.
        """
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
            if all(day != known for _, known in account.sums):
                self.totals.customers[day] += 1
            found = account.sums[model, day] = Amounts()
        return found

    def add(self, cell: Account, model: str, day: int, amounts: Amounts, now: int, at_ms: int) -> None:
        """See `Ledger.add`."""
        self.totals.catch_up(self)
        self.totals.add(model, day, at_ms, amounts)
        self._sums(cell, model, day, now).add(amounts)
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
        if usage.latency_ms is not None:
            sums.latency_ms += usage.latency_ms
            sums.timed += 1
        if usage.ttft_ms is not None:
            sums.ttft_ms += usage.ttft_ms
            sums.ttft_calls += 1
        if self.everyone is not None:
            self.everyone.grow(entry.model, entry.day, 0, cost, tokens)

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
