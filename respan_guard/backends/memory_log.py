"""The log of a store in memory: entries in the order in which they came, found by customer and id."""

from __future__ import annotations

from copy import copy

from respan_guard.backends.base import Amounts, Entry, StoredEntry
from respan_guard.backends.cells import amounts_of, nameless
from respan_guard.backends.memory_totals import Totals

__all__ = ["EntryLog"]

_PLAIN = (1, False)


class EntryLog:
    """Entries, what forgotten ones summed up to, and the sums over all customers, which follow the log.

    Args:
        max_entries: Above so many, the oldest are forgotten; their sums stay.
    """

    now: int
    """The store's time."""

    def __init__(self, max_entries: int | None) -> None:
        self.max_entries = max_entries
        self.log: list[Entry | None] = []  # None where an entry was revised or pruned
        self.places: dict[tuple[str, str], int] = {}  # seq of each entry in it, by customer and id
        self.remarks: dict[int, tuple[int, bool]] = {}  # rev and late, of the few that are no first ones in time
        self.log_start = 1  # place of the log's first item
        self.gone = 0  # items at its start that are None
        self.seq = 0
        self.base: dict[tuple[str, str, int], Amounts] = {}  # what pruned entries summed up to
        self.pruned_to = -1  # the last day whose entries may be gone
        self.prune_at = 0  # no older place has an entry to prune
        self.pruned_ms = -1  # the greatest `at_ms` of an entry that is gone
        self.totals = Totals()

    def find(self, customer: str, entry_id: str) -> StoredEntry | None:
        """See `Ledger.find`."""
        seq = self.places.get((customer, entry_id))
        if seq is None:
            return None
        entry = self.log[seq - self.log_start]
        assert entry is not None
        return self.stored(seq, entry)

    def is_first(self, seq: int) -> bool:
        """Whether an entry is as it came, and no revision."""
        return self.remarks.get(seq, _PLAIN)[0] == 1

    def stored(self, seq: int, entry: Entry) -> StoredEntry:
        """An entry as reads show it."""
        rev, late = self.remarks.get(seq, _PLAIN)
        return StoredEntry(seq, rev, entry, late)

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

    def fold(self, entry: Entry) -> None:
        """Forget an entry, but not what it added to the sums."""
        seq = self.places.pop((entry.customer, entry.id))
        if seq > self.totals.seq:
            self.totals.catch_up(self)
        self.base.setdefault((entry.customer, entry.model, entry.day), Amounts()).add(amounts_of(entry))
        self.pruned_ms = max(self.pruned_ms, entry.at_ms)
        self._drop(seq)

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
            self.log[seq - self.log_start] = _moved(nameless(entry), label)
        for base in [key for key in self.base if key[0] == customer]:
            self.base[label, base[1], base[2]] = self.base.pop(base)


def _moved(entry: Entry, customer: str) -> Entry:
    found = copy(entry)
    found.customer = customer
    return found
