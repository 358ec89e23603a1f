"""Sums over all customers of a store in memory, by day and by hour."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from respan_guard.backends.base import HOUR_MS, HOURS_KEPT, Amounts
from respan_guard.backends.cells import amounts_of

if TYPE_CHECKING:
    from respan_guard.backends.memory_accounts import Account
    from respan_guard.backends.memory_log import EntryLog

__all__ = ["Totals"]


class Totals:
    """Kept up from the log when they are asked for, so that recording pays nothing for them."""

    def __init__(self) -> None:
        self.days: dict[tuple[int, str], Amounts] = {}  # (day, model)
        self.hours: dict[tuple[int, str], Amounts] = {}  # (hour, model)
        self.customers: Counter[int] = Counter()  # by day
        self.asked: dict[tuple[int, int, str], int] = {}  # (hour, day, model) -> requests not yet in the sums
        self.seq = 0  # how far the log is in the sums

    def add(self, model: str, day: int, at_ms: int, amounts: Amounts) -> None:
        """Add to a day's and an hour's sums."""
        for sums, when in ((self.days, day), (self.hours, at_ms // HOUR_MS)):
            found = sums.get((when, model))
            if found is None:
                found = sums[when, model] = Amounts()
            found.add(amounts)

    def catch_up(self, store: EntryLog) -> None:
        """Add what came since."""
        for (hour, day, model), requests in self.asked.items():
            self.add(model, day, hour * HOUR_MS, Amounts(requests))
        self.asked.clear()
        if self.seq == store.seq:
            return
        for seq in range(max(self.seq + 1, store.log_start + store.gone), store.seq + 1):
            entry = store.log[seq - store.log_start]
            if entry is not None and store.is_first(seq):  # a revision's difference came through `add`
                self.add(entry.model, entry.day, entry.at_ms, amounts_of(entry))
        self.seq = store.seq
        first = store.now // HOUR_MS - HOURS_KEPT
        for old in [key for key in self.hours if key[0] < first]:
            del self.hours[old]

    def forget(self, account: Account) -> None:
        """A customer is forgotten that nothing was spent for."""
        for day in {day for _, day in account.sums}:
            self.customers[day] -= 1
