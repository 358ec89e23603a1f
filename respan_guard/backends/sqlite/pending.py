"""What a batch has changed so far, and how it gets into the tables: one `executemany` per table."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from operator import attrgetter

from respan_guard.backends.base import AMOUNTS, HOUR_MS, Amounts, StoredEntry, Window
from respan_guard.backends.cells import Cell, Hold
from respan_guard.backends.sqlite.rows import (
    adding,
    answer_text,
)
from respan_guard.backends.texts import search_text, usage_text

__all__ = ["Pending", "SQLiteCell"]

_INSERT_CUSTOMER = "INSERT INTO customers (c, customer, search, first_seen, last_seen) VALUES (?, ?, ?, ?, ?)"
# Two, since an UPDATE moves the index of every column that it names, changed or not.
_ADD_REQUESTS = """UPDATE customers SET last_seen = max(last_seen, ?), active_days = active_days + ?,
    requests = requests + ? WHERE c = ?"""
_ADD_ENTRIES = f"""UPDATE customers SET last_seen = max(last_seen, ?), active_days = active_days + ?,
    {", ".join(f"{name} = {name} + ?" for name in AMOUNTS[1:])} WHERE c = ?"""  # noqa: S608  # constants
_ADD_ROLLUP = adding("rollups", "c, day, model")
_ADD_DAY = adding("days", "day, model")
_ADD_HOUR = adding("hours", "hour, model")
_ADD_ACTIVE = adding("active", "day", "customers")
_INSERT_ENTRY = """INSERT INTO entries (seq, c, id, rev, day, at_ms, latest_ms, cost, input_tokens, output_tokens,
    cache_read_tokens, late, model, admission, kind, source, provider, status, trace_id, body, latency_ms, ttft_ms)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_columns: Callable[[Amounts], tuple[int, ...]] = attrgetter(*AMOUNTS)
_INSERT_HOLD = """INSERT OR REPLACE INTO holds (c, id, day, model, cost, tokens, expires_ms, ended_ms, answer)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_INSERT_RATE = "INSERT OR REPLACE INTO rates (c, window_ms, start_ms, previous, current) VALUES (?, ?, ?, ?, ?)"


class SQLiteCell(Cell):
    """A cell that knows its row, and whether its customer was deleted once."""

    __slots__ = ("c", "days", "tombs")

    def __init__(self, customer: str) -> None:
        super().__init__(customer)
        self.c: int | None = None  # None: not stored yet
        self.days: set[int] = set()  # days known to have a rollup
        self.tombs: tuple[tuple[str, int], ...] = ()


class Pending:
    """Changes of one batch, each row at most once. Sums are differences, everything else is what it is now."""

    def __init__(self) -> None:
        self.new_customers: list[tuple[int, str, str, int, int]] = []
        self.new_days: Counter[int] = Counter()  # of customers
        self.active: Counter[int] = Counter()  # customers that are new on a day
        self.rollups: dict[tuple[int, int, str], Amounts] = {}
        self.everybody: dict[tuple[int, int, str], Amounts] = {}  # by hour, day and model
        self.holds: dict[tuple[int, str], tuple[SQLiteCell, Hold]] = {}
        self._unwritten: dict[tuple[int, str], Hold] = {}  # those of `holds` that the tables have not, or otherwise
        self.rates: dict[tuple[int, int], Window] = {}
        self.entries: dict[tuple[int, str], tuple[StoredEntry, int]] = {}  # with `latest_ms`

    def new_customer(self, c: int, customer: str, now: int) -> None:
        """A customer gets its row."""
        self.new_customers.append((c, customer, search_text(customer, None), now, now))

    def new_day(self, c: int, day: int) -> None:
        """A customer has its first sum of a day."""
        self.new_days[c] += 1
        self.active[day] += 1

    def add(self, c: int, day: int, model: str, amounts: Amounts, at_ms: int) -> None:
        """A customer's sums grow, and everybody's."""
        key = (c, day, model)
        rollup = self.rollups.get(key)
        if rollup is None:
            rollup = self.rollups[key] = Amounts()
        rollup.add(amounts)
        everybodys = (at_ms // HOUR_MS, day, model)
        total = self.everybody.get(everybodys)
        if total is None:
            total = self.everybody[everybodys] = Amounts()
        total.add(amounts)

    def keep_hold(self, c: int, cell: SQLiteCell, hold: Hold) -> None:
        """A hold is new, or has changed."""
        self.holds[c, hold.id] = (cell, hold)
        self._unwritten[c, hold.id] = hold

    def write_sums(self, db: sqlite3.Connection, now: int) -> None:
        """Write customers and rollups. May be called before the batch is over, to have sums read from the tables."""
        if self.new_customers:
            db.executemany(_INSERT_CUSTOMER, self.new_customers)
            self.new_customers = []
        if not self.rollups:
            return
        db.executemany(_ADD_ROLLUP, [(*key, *_columns(amounts)) for key, amounts in self.rollups.items()])
        customers: dict[int, Amounts] = {}
        for (c, _, _), amounts in self.rollups.items():
            if c in customers:
                customers[c].add(amounts)
            else:
                customers[c] = amounts
        for (hour, day, model), amounts in self.everybody.items():  # few: one for each model, as a rule
            columns = _columns(amounts)
            db.execute(_ADD_HOUR, (hour, model, *columns))
            db.execute(_ADD_DAY, (day, model, *columns))
        db.executemany(_ADD_ACTIVE, self.active.items())
        requests, entries = [], []
        for c, amounts in customers.items():
            _, *others = columns = _columns(amounts)
            if columns[0]:
                requests.append((now, self.new_days.pop(c, 0), columns[0], c))
            if any(others) or not columns[0]:
                entries.append((now, self.new_days.pop(c, 0), *others, c))
        db.executemany(_ADD_REQUESTS, requests)
        db.executemany(_ADD_ENTRIES, entries)
        self.rollups, self.everybody = {}, {}
        self.active.clear()

    def write_holds(self, db: sqlite3.Connection) -> None:
        """Write what is not written yet of holds; also before the batch is over, to have sums read from the table."""
        written, over = [], []
        for (c, hold_id), hold in self._unwritten.items():
            answer = answer_text(hold.outcome)
            if is_over(hold):
                over.append((c, hold_id, hold.ended, answer))
            else:
                written.append(
                    (c, hold_id, hold.day, hold.model, hold.cost, hold.tokens, hold.expires, hold.ended, answer)
                )
        if over:
            db.executemany("DELETE FROM holds WHERE c = ? AND id = ?", [row[:2] for row in over])
            db.executemany("INSERT OR REPLACE INTO ended (c, id, ended_ms, answer) VALUES (?, ?, ?, ?)", over)
        if written:
            db.executemany(_INSERT_HOLD, written)
        self._unwritten = {}

    def write_rates(self, db: sqlite3.Connection) -> None:
        """Write the states of rates."""
        if self.rates:
            db.executemany(_INSERT_RATE, [(*key, *window) for key, window in self.rates.items()])

    def write_entries(self, db: sqlite3.Connection) -> None:
        """Write new entries and revised ones, which leave their old place in the log."""
        rows, revised, credited = [], [], []
        for (c, entry_id), (stored, latest) in self.entries.items():
            entry, usage = stored.entry, stored.entry.usage
            if stored.rev > 1:
                revised.append((c, entry_id))
            if entry.cost is not None and entry.cost < 0:
                credited.append((c,))
            rows.append(
                (stored.seq, c, entry_id, stored.rev, entry.day, entry.at_ms, latest, entry.cost, entry.input_tokens,
                 entry.output_tokens, usage.cache_read_tokens, stored.late, entry.model, entry.admission, entry.kind,
                 entry.source, usage.provider, usage.status, usage.trace_id, usage_text(usage),
                 usage.latency_ms, usage.ttft_ms)
            )  # fmt: skip
        if revised:
            db.executemany("DELETE FROM entries WHERE c = ? AND id = ?", revised)
        if credited:
            db.executemany("UPDATE customers SET credited = 1 WHERE c = ? AND NOT credited", credited)
        if rows:
            db.executemany(_INSERT_ENTRY, rows)


def is_over(hold: Hold) -> bool:
    """Whether nothing but the answer is of interest any more. An expired hold shows what it never spent."""
    return hold.ended is not None and not hold.cost and not hold.tokens
