"""A batch of operations on the file: load what they touch, decide, write what changed. All in one transaction.

Cells stay in memory between batches, for as long as no other connection commits. SQLite tells by
`PRAGMA data_version`; after any failure everything is forgotten too, so memory never runs ahead of the file.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Sequence
from itertools import islice

from respan_guard.backends.base import (
    HOUR_MS,
    HOURS_KEPT,
    REPLAY_MS,
    Admit,
    Allowed,
    Amounts,
    Entry,
    Op,
    Outcome,
    StoredEntry,
    Window,
)
from respan_guard.backends.cells import EVER, Hold
from respan_guard.backends.ledger import Ledger
from respan_guard.backends.sqlite.pending import Pending, SQLiteCell, is_over
from respan_guard.backends.sqlite.rows import (
    ENTRY,
    answer_from,
    entry_from,
    hash_of,
)
from respan_guard.backends.texts import params_from
from respan_guard.clock import SystemClock
from respan_guard.errors import CounterOverflow, StoreReset

__all__ = ["Writer"]

_MAX_CELLS = 20_000
_MAX_SUMS = 256
_SWEEP = 1024  # rows of ended admissions to delete per batch: more than a batch can add
_SWEEP_ALL_MS = 3_600_000
_KEEP_EXPIRED_MS = 6 * 86_400_000  # `verify` finds fault with holds that lie there for 7 days
_RANGE = "9000000000000000"  # stands in the CHECKs of the schema that keep sums countable
_LOAD_CELL = """SELECT c, revision, params, requests, cost, input_tokens + output_tokens FROM customers
    WHERE customer = ?"""
_LOAD_RATES = "SELECT window_ms, start_ms, previous, current FROM rates WHERE c = ?"
_LOAD_HOLDS = "SELECT id, day, model, cost, tokens, expires_ms, ended_ms, answer FROM holds WHERE c = ?"
_LOAD_TOMBS = (
    "SELECT customers.customer, deleted_ms FROM tombs JOIN customers USING (c) WHERE hash = ? ORDER BY deleted_ms, c"
)
_FIND_ENDED = "SELECT ended_ms, answer FROM ended WHERE c = ? AND id = ?"
_FIND_ENTRY = f"SELECT {ENTRY} FROM entries JOIN customers USING (c) WHERE c = ? AND id = ?"  # noqa: S608
_LAST_C = "SELECT coalesce(max(c), 0) FROM customers"
_clock = SystemClock()
_HAS_DAY = "SELECT EXISTS (SELECT 1 FROM rollups WHERE c = ? AND day = ?)"


class Writer(Ledger[SQLiteCell]):
    """The working set of one connection. Runs in that connection's thread."""

    def __init__(self, db: sqlite3.Connection, epoch: str) -> None:
        super().__init__()
        self.db = db
        self._row_of = db.cursor()  # for lookups of one row: a cursor of its own each costs as much as the lookup
        self.epoch = epoch
        self._ended: deque[tuple[int, int, str]] | None = None  # (ended, c, id) of the rows of `ended`
        self._swept_at = 0
        self.forget()

    # -- a batch -----------------------------------------------------------------------------------

    def forget(self) -> None:
        """Drop everything that was read from the file."""
        self._version = -1
        self.cells = {}
        self._sums: dict[tuple[str | None, str, int, int], int] = {}
        self._pending = Pending()

    def lost(self) -> None:
        """After a failure: memory may be ahead of the file."""
        self.forget()
        self._ended = None

    def at(self, now: int | None) -> int:
        """The time to use: the caller's, else the latest it gave, else the machine's. It never goes back."""
        if now is None:
            now = self.now or _clock.now_ms()
        self.now = max(self.now, now)
        return self.now

    def begin(self) -> None:
        """First thing in every transaction: is this still the store, and is what we know of it still so?

        Raises:
            StoreReset: It is another store, or was emptied.
        """
        db = self.db
        version = db.execute("PRAGMA data_version").fetchone()[0]
        if version == self._version:
            return
        self.forget()
        try:
            meta = dict(db.execute("SELECT key, value FROM meta").fetchall())
        except sqlite3.OperationalError as error:
            raise StoreReset("the store's tables are gone: it was wiped while it was open") from error
        if meta.get("epoch") != self.epoch:
            raise StoreReset("this is another store than the one that was opened: it was replaced while it was open")
        self.pruned_to = int(meta["pruned_to"])
        last = db.execute("SELECT seq, latest_ms FROM entries ORDER BY seq DESC LIMIT 1").fetchone() or (0, 0)
        self._seq = max(last[0], int(meta["log_end"]))
        self._latest = last[1]
        self._last_c = db.execute(_LAST_C).fetchone()[0]
        self.any_deleted = bool(db.execute("SELECT EXISTS (SELECT 1 FROM tombs)").fetchone()[0])
        self._version = version

    def reread(self, customer: str) -> None:
        """A customer's params were written beside a batch."""
        self.cells.pop(customer, None)
        self._last_c = self.db.execute(_LAST_C).fetchone()[0]

    def batch(self, ops: Sequence[Op], now: int) -> list[Outcome]:
        """Apply operations inside the transaction that is open."""
        db = self.db
        self.begin()
        for op in ops:
            if isinstance(op, Admit):
                cell = self.cell(op.customer)
                del self.cells[op.customer]  # the newest is the last to be forgotten
                self.cells[op.customer] = cell
        try:
            outcomes = self.run(ops, now)
            pending = self._pending
            pending.write_sums(db, self.now)
            pending.write_holds(db)
            pending.write_rates(db)
            pending.write_entries(db)
        except sqlite3.IntegrityError as error:
            if _RANGE in str(error):
                raise CounterOverflow("a sum of a customer would pass what every store counts exactly") from error
            raise
        self._sweep(db)
        return outcomes

    def committed(self) -> None:
        """After the commit: keep the working set small."""
        ended = self._ended
        for cell, hold in self._pending.holds.values():
            if is_over(hold) and ended is not None:
                ended.append((hold.ended or 0, cell.c or 0, hold.id))
        if len(self.cells) > _MAX_CELLS:
            for name in list(islice(self.cells, len(self.cells) - _MAX_CELLS + _MAX_CELLS // 10)):
                del self.cells[name]
        self._pending = Pending()

    def _sweep(self, db: sqlite3.Connection) -> None:
        """Delete what is too old to be asked for: little by little, and all that a crash left behind."""
        if self._ended is None:
            self._ended = deque(db.execute("SELECT ended_ms, c, id FROM ended ORDER BY ended_ms"))
        if self.now - self._swept_at >= _SWEEP_ALL_MS:
            self._swept_at = self.now
            db.execute("DELETE FROM holds WHERE expires_ms < ?", (self.now - _KEEP_EXPIRED_MS,))
            db.execute("DELETE FROM hours WHERE hour < ?", (self.now // HOUR_MS - HOURS_KEPT,))
        old: list[tuple[int, str, int]] = []
        while self._ended and self._ended[0][0] + REPLAY_MS <= self.now and len(old) < _SWEEP:
            _, c, hold_id = self._ended.popleft()
            old.append((c, hold_id, self.now - REPLAY_MS))
        if old:
            db.executemany("DELETE FROM ended WHERE c = ? AND id = ? AND ended_ms <= ?", old)

    # -- what the ledger asks ----------------------------------------------------------------------

    def cell(self, customer: str) -> SQLiteCell:
        """The customer's cell, from memory or the file."""
        cell = self.cells.get(customer)
        if cell is None:
            cell = self.cells[customer] = self._load(customer)
        return cell

    def _load(self, customer: str) -> SQLiteCell:
        db = self.db
        cell = SQLiteCell(customer)
        row = db.execute(_LOAD_CELL, (customer,)).fetchone()
        if row is not None:
            cell.c, cell.revision, cell.params = row[0], row[1], params_from(row[2])
            cell.requests, cell.cost, cell.tokens = row[3:]
            rates = db.execute(_LOAD_RATES, (cell.c,))
            cell.rates = {width: (start, prev, cur) for width, start, prev, cur in rates}
            for hold_id, day, model, cost, tokens, expires, ended, answer in db.execute(_LOAD_HOLDS, (cell.c,)):
                cell.add_hold(Hold(customer, hold_id, day, model, cost, tokens, expires, answer_from(answer), ended))
        if self.any_deleted:
            cell.tombs = tuple(db.execute(_LOAD_TOMBS, (hash_of(self.epoch, customer),)))
        return cell

    def sum(self, customer: str | None, model: str | None, metric: str, first_day: int, end_day: int) -> int:
        """A sum over days, from the rollups."""
        if customer is not None:
            cell = self.cell(customer)
            if first_day <= 0 and end_day >= EVER and model is None:
                return cell.tokens if metric == "tokens" else cell.cost if metric == "cost" else cell.requests
            return 0 if cell.c is None else self._sum(cell.c, model, metric, first_day, end_day)
        key = (model, metric, first_day, end_day)
        found = self._sums.get(key)
        if found is None:
            if len(self._sums) >= _MAX_SUMS:
                self._sums.clear()
            found = self._sums[key] = self._sum(None, model, metric, first_day, end_day)
        return found

    def _sum(self, c: int | None, model: str | None, metric: str, first_day: int, end_day: int) -> int:
        self._pending.write_sums(self.db, self.now)  # what this batch added so far counts
        column = "input_tokens + output_tokens" if metric == "tokens" else metric
        table = "rollups" if c is not None else "days"  # where everybody's sums are kept
        query = f"SELECT coalesce(sum({column}), 0) FROM {table} WHERE day >= ? AND day < ?"  # noqa: S608
        values: list[int | str] = [first_day, end_day]
        if c is not None:
            query += " AND c = ?"
            values.append(c)
        if model is not None:
            query += " AND model = ?"
            values.append(model)
        return int(self.db.execute(query, values).fetchone()[0])

    def held(self, model: str | None, metric: str, first_day: int, end_day: int, now: int) -> int:
        """What live holds of all customers hold."""
        self._pending.write_holds(self.db)
        query = f"SELECT coalesce(sum({metric}), 0) FROM holds WHERE day >= ? AND day < ? AND expires_ms > ?"  # noqa: S608
        values: list[int | str] = [first_day, end_day, now]
        if model is not None:
            query += " AND model = ?"
            values.append(model)
        return int(self.db.execute(query, values).fetchone()[0])

    def find(self, customer: str, entry_id: str) -> StoredEntry | None:
        """A stored entry, of this batch or an earlier one."""
        c = self.cell(customer).c
        if c is None:
            return None
        found = self._pending.entries.get((c, entry_id))
        if found is not None:
            return found[0]
        row = self._row_of.execute(_FIND_ENTRY, (c, entry_id)).fetchone()
        return None if row is None else entry_from(row)

    def answer(self, cell: SQLiteCell, hold_id: str, now: int) -> Allowed | None:
        """The answer of an admission that ended a moment ago, in this batch or an earlier one."""
        if cell.c is None:
            return None
        if (cell.c, hold_id) in self._pending.holds:
            _, hold = self._pending.holds[cell.c, hold_id]
            return hold.outcome if hold.ended is not None and hold.ended + REPLAY_MS > now else None
        row = self._row_of.execute(_FIND_ENDED, (cell.c, hold_id)).fetchone()
        return answer_from(row[1]) if row is not None and row[0] + REPLAY_MS > now else None

    def tombs(self, customer: str) -> Sequence[tuple[str, int]]:
        """The labels that took a deleted customer's place."""
        return self.cell(customer).tombs

    # -- what the ledger tells ---------------------------------------------------------------------

    def add(self, cell: SQLiteCell, model: str, day: int, amounts: Amounts, now: int, at_ms: int) -> None:
        """Add to the sums of a customer, model and day."""
        c = self._row(cell)
        if day not in cell.days:
            if len(cell.days) >= 8:
                cell.days.clear()
                self._pending.write_sums(self.db, now)  # so that days of this batch are seen, too
            if not self._row_of.execute(_HAS_DAY, (c, day)).fetchone()[0]:
                self._pending.new_day(c, day)
            cell.days.add(day)
        self._pending.add(c, day, model, amounts, at_ms)
        for span in self._sums:
            only, metric, first, end = span
            if first <= day < end and (only is None or only == model):
                self._sums[span] += _metric(amounts, metric)

    def keep_entry(self, entry: Entry, customer: str, rev: int, late: bool) -> None:
        """Append an entry to the log."""
        self._seq += 1
        self._latest = max(self._latest, entry.at_ms)
        c = self._row(self.cell(customer))
        self._pending.entries[c, entry.id] = (StoredEntry(self._seq, rev, entry, late), self._latest)

    def keep_hold(self, cell: SQLiteCell, hold: Hold) -> None:
        """A hold was made or changed."""
        self._pending.keep_hold(self._row(cell), cell, hold)

    def end_hold(self, cell: SQLiteCell, hold: Hold) -> None:
        """A hold is over."""
        self.keep_hold(cell, hold)

    def keep_rate(self, cell: SQLiteCell, width: int, window: Window) -> None:
        """A rate was counted."""
        self._pending.rates[self._row(cell), width] = window

    def _row(self, cell: SQLiteCell) -> int:
        """The customer's row, promised if there is none yet."""
        if cell.c is None:
            self._last_c += 1
            cell.c = self._last_c
            self._pending.new_customer(cell.c, cell.customer, self.now)
        return cell.c


def _metric(amounts: Amounts, metric: str) -> int:
    if metric == "tokens":
        return amounts.input_tokens + amounts.output_tokens
    return amounts.cost if metric == "cost" else amounts.requests
