"""A batch of operations on the file: load what they touch, decide, write what changed. All in one transaction.

Cells stay in memory between batches, for as long as no other connection commits. SQLite tells by
`PRAGMA data_version`; after any failure everything is forgotten too, so memory never runs ahead of the file.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Sequence
from itertools import islice

from respan_guard.backends.base import REPLAY_MS, Admit, Amounts, Entry, Op, Outcome, Params, StoredEntry, Window
from respan_guard.backends.ledger import EVER, Cell, Hold, Ledger
from respan_guard.backends.sqlite.rows import (
    AMOUNTS,
    ENTRY,
    amounts_from,
    answer_from,
    answer_text,
    entry_from,
    hash_of,
    params_from,
    search_text,
    usage_text,
)
from respan_guard.errors import CounterOverflow, StoreReset

__all__ = ["Writer"]

_MAX_CELLS = 20_000
_MAX_SUMS = 256
_SWEEP = 1024  # rows of ended admissions to delete per batch: more than a batch can add
_SWEEP_ALL_MS = 3_600_000
_KEEP_EXPIRED_MS = 6 * 86_400_000  # `verify` finds fault with holds that lie there for 7 days
_RANGE = "9000000000000000"  # stands in the CHECKs of the schema that keep sums countable
_INSERT_CUSTOMER = """INSERT INTO customers (c, customer, search, first_seen, last_seen) VALUES (?, ?, ?, ?, ?)"""
_UPDATE_CUSTOMER = """UPDATE customers SET last_seen = max(last_seen, ?), active_days = active_days + ?,
    requests = requests + ?, calls = calls + ?, cost = cost + ?, input_tokens = input_tokens + ?,
    output_tokens = output_tokens + ?, cache_read_tokens = cache_read_tokens + ?, unpriced = unpriced + ?,
    errors = errors + ? WHERE c = ?"""
_UPSERT_ROLLUP = f"""INSERT INTO rollups (c, day, model, {AMOUNTS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (c, day, model) DO UPDATE SET requests = requests + excluded.requests, calls = calls + excluded.calls,
    cost = cost + excluded.cost, input_tokens = input_tokens + excluded.input_tokens,
    output_tokens = output_tokens + excluded.output_tokens,
    cache_read_tokens = cache_read_tokens + excluded.cache_read_tokens,
    unpriced = unpriced + excluded.unpriced, errors = errors + excluded.errors"""  # noqa: S608  # a constant
_INSERT_ENTRY = """INSERT INTO entries (seq, c, id, rev, day, at_ms, latest_ms, cost, input_tokens, output_tokens,
    cache_read_tokens, late, model, admission, kind, source, provider, status, trace_id, body)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_LOAD_CELL = f"SELECT c, revision, params, {AMOUNTS} FROM customers WHERE customer = ?"  # noqa: S608
_LOAD_HOLDS = "SELECT id, day, model, cost, tokens, expires_ms, ended_ms, answer FROM holds WHERE c = ?"
_INSERT_HOLD = """INSERT OR REPLACE INTO holds (c, id, day, model, cost, tokens, expires_ms, ended_ms, answer)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_FIND_ENTRY = f"SELECT {ENTRY} FROM entries JOIN customers USING (c) WHERE c = ? AND id = ?"  # noqa: S608


class SQLiteCell(Cell):
    """A cell that knows its row, its sums of all time, and whether its customer was deleted once."""

    __slots__ = ("c", "days", "tomb", "totals")

    def __init__(self, customer: str, revision: str = "", params: Params | None = None) -> None:
        super().__init__(customer, revision, params)
        self.c: int | None = None  # None: not stored yet
        self.totals = Amounts()
        self.days: set[int] = set()  # days known to have a rollup
        self.tomb: tuple[str, int] | None = None


class Writer(Ledger):
    """The working set of the one connection that writes. Runs in that connection's thread."""

    db: sqlite3.Connection

    def __init__(self, epoch: str) -> None:
        super().__init__()
        self.epoch = epoch
        self.ended: deque[tuple[int, int, str]] | None = None  # (ended, c, id) of the rows of `ended`
        self._swept_at = 0
        self.forget()

    def forget(self) -> None:
        """Drop everything that was read from the file."""
        self._version = -1
        self._cells: dict[str, SQLiteCell] = {}
        self._sums: dict[tuple[str | None, str, int, int], int] = {}
        self._reset_batch()

    def lost(self) -> None:
        """After a failure: memory may be ahead of the file."""
        self.forget()
        self.ended = None

    def at(self, now: int) -> int:
        """The time to use: it never goes back."""
        self.now = max(self.now, now)
        return self.now

    def _reset_batch(self) -> None:
        self._rollups: dict[tuple[int, int, str], Amounts] = {}
        self._customers: dict[int, tuple[list[int], Amounts]] = {}
        self._new_customers: list[tuple[int, str, str, int, int]] = []
        self._holds: dict[tuple[int, str], tuple[SQLiteCell, Hold]] = {}
        self._rates: dict[tuple[int, int], Window] = {}
        self._entries: dict[tuple[str, str], tuple[StoredEntry, int]] = {}  # with `latest_ms`
        self._replayed: list[tuple[SQLiteCell, Hold]] = []

    # -- a batch -----------------------------------------------------------------------------------

    def begin(self, db: sqlite3.Connection) -> None:
        """First thing in every write transaction: is this still the store, and is what we know still so?

        Raises:
            StoreReset: It is another store, or was emptied.
        """
        self.db = db
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
        self._pruned_to = int(meta["pruned_to"])
        last = db.execute("SELECT seq, latest_ms FROM entries ORDER BY seq DESC LIMIT 1").fetchone() or (0, 0)
        self._seq = max(last[0], int(meta["log_end"]))
        self._latest = last[1]
        self._last_c = db.execute("SELECT coalesce(max(c), 0) FROM customers").fetchone()[0]
        self._any_tombs = bool(db.execute("SELECT EXISTS (SELECT 1 FROM tombs)").fetchone()[0])
        self._version = version

    def batch(self, db: sqlite3.Connection, ops: Sequence[Op], now: int) -> list[Outcome]:
        """Apply operations inside the transaction that is open."""
        self.begin(db)
        self._reset_batch()
        for op in ops:
            if isinstance(op, Admit):
                self._recall(op, max(now, self.now))
        try:
            outcomes = self.run(ops, now)
            self._write_customers()
            self._write_holds()
            self._write_rates()
            self._write_entries()
        except sqlite3.IntegrityError as error:
            if _RANGE in str(error):
                raise CounterOverflow("a sum of a customer would pass what every store counts exactly") from error
            raise
        self._sweep()
        return outcomes

    def committed(self) -> None:
        """After the commit: keep the working set small."""
        ended: list[tuple[int, int, str]] = []
        for cell, hold in self._holds.values():
            if _is_over(hold) and cell.holds.get(hold.id) is hold:
                del cell.holds[hold.id]
                ended.append((hold.ended or 0, cell.c or 0, hold.id))
            if cell.expiry is not None and len(cell.expiry) > 2 * len(cell.holds) + 64:
                # The heap keeps what ended early until it would have expired; a busy customer's must not grow by that.
                cell.expire(self.now)
                cell.expiry = sorted(
                    (hold.expires, hold.id)
                    for hold in cell.holds.values()
                    if hold.ended is None and hold.expires > self.now and (hold.cost or hold.tokens)
                )
        if self.ended is not None:
            self.ended.extend(ended)
        for cell, hold in self._replayed:
            if cell.holds.get(hold.id) is hold:
                del cell.holds[hold.id]
        if len(self._cells) > _MAX_CELLS:
            for name in list(islice(self._cells, len(self._cells) - _MAX_CELLS + _MAX_CELLS // 10)):
                del self._cells[name]
        self._reset_batch()

    def _recall(self, op: Admit, now: int) -> None:
        """Let the ledger see an admission under this id that ended a moment ago."""
        cell = self.cell(op.customer)
        self._cells[op.customer] = self._cells.pop(op.customer)  # the newest is the last to be forgotten
        if cell.c is None or op.id in cell.holds:
            return
        row = self.db.execute("SELECT ended_ms, answer FROM ended WHERE c = ? AND id = ?", (cell.c, op.id)).fetchone()
        if row is not None and row[0] + REPLAY_MS > now:
            hold = cell.holds[op.id] = Hold(op.id, 0, "", 0, 0, row[0], answer_from(row[1]), row[0])
            self._replayed.append((cell, hold))

    # -- what the ledger asks ----------------------------------------------------------------------

    def cell(self, customer: str) -> SQLiteCell:
        """The customer's cell, from memory or the file."""
        cell = self._cells.get(customer)
        if cell is None:
            cell = self._cells[customer] = self._load(customer)
        return cell

    def _load(self, customer: str) -> SQLiteCell:
        db = self.db
        row = db.execute(_LOAD_CELL, (customer,)).fetchone()
        cell = SQLiteCell(customer)
        if row is not None:
            cell.c, cell.revision, cell.params = row[0], row[1], params_from(row[2])
            cell.totals = amounts_from(row, 3)
            rates = db.execute("SELECT window_ms, start_ms, previous, current FROM rates WHERE c = ?", (cell.c,))
            cell.rates = {width: (start, prev, cur) for width, start, prev, cur in rates} or None
            for hold_id, day, model, cost, tokens, expires, ended, answer in db.execute(_LOAD_HOLDS, (cell.c,)):
                cell.add_hold(Hold(hold_id, day, model, cost, tokens, expires, answer_from(answer), ended))
        if self._any_tombs:
            tomb = db.execute(
                "SELECT customers.customer, deleted_ms FROM tombs JOIN customers USING (c) WHERE hash = ?",
                (hash_of(self.epoch, customer),),
            ).fetchone()
            cell.tomb = tomb
        return cell

    def sum(self, customer: str | None, model: str | None, metric: str, first_day: int, end_day: int) -> int:
        """A sum over days, from the rollups."""
        if customer is not None:
            cell = self.cell(customer)
            if first_day <= 0 and end_day >= EVER and model is None:
                totals = cell.totals
                return totals.input_tokens + totals.output_tokens if metric == "tokens" else getattr(totals, metric)
            if cell.c is None:
                return 0
            return self._sum(cell.c, model, metric, first_day, end_day)
        key = (model, metric, first_day, end_day)
        found = self._sums.get(key)
        if found is None:
            if len(self._sums) >= _MAX_SUMS:
                self._sums.clear()
            found = self._sums[key] = self._sum(None, model, metric, first_day, end_day)
        return found

    def _sum(self, c: int | None, model: str | None, metric: str, first_day: int, end_day: int) -> int:
        self._write_customers()  # what this batch added so far counts
        column = "input_tokens + output_tokens" if metric == "tokens" else metric
        query = f"SELECT coalesce(sum({column}), 0) FROM rollups WHERE day >= ? AND day < ?"  # noqa: S608
        values: list[int | str] = [first_day, end_day]
        for name, value in (("c", c), ("model", model)):
            if value is not None:
                query += f" AND {name} = ?"
                values.append(value)
        return int(self.db.execute(query, values).fetchone()[0])

    def held(self, model: str | None, metric: str, first_day: int, end_day: int, now: int) -> int:
        """What live holds of all customers hold."""
        self._write_holds()
        query = f"SELECT coalesce(sum({metric}), 0) FROM holds WHERE day >= ? AND day < ? AND expires_ms > ?"  # noqa: S608
        values: list[int | str] = [first_day, end_day, now]
        if model is not None:
            query += " AND model = ?"
            values.append(model)
        return int(self.db.execute(query, values).fetchone()[0])

    def total(self, customer: str) -> int:
        """The customer's cost of all time."""
        return self.cell(customer).totals.cost

    def find(self, customer: str, entry_id: str) -> StoredEntry | None:
        """A stored entry, of this batch or an earlier one."""
        found = self._entries.get((customer, entry_id))
        if found is not None:
            return found[0]
        c = self.cell(customer).c
        row = None if c is None else self.db.execute(_FIND_ENTRY, (c, entry_id)).fetchone()
        return None if row is None else entry_from(row)

    def tomb(self, customer: str) -> tuple[str, int] | None:
        """The label that took a deleted customer's place."""
        return self.cell(customer).tomb

    def pruned_to(self) -> int:
        """The last day whose entries may be gone."""
        return self._pruned_to

    # -- what the ledger tells ---------------------------------------------------------------------

    def add(self, cell: Cell, model: str, day: int, amounts: Amounts, now: int) -> None:
        """Add to the sums of a customer, model and day."""
        assert isinstance(cell, SQLiteCell)
        c = self._row(cell)
        key = (c, day, model)
        rollup = self._rollups.get(key)
        if rollup is None:
            rollup = self._rollups[key] = Amounts()
        rollup.add(amounts)
        cell.totals.add(amounts)
        change = self._customers.get(c)
        if change is None:
            change = self._customers[c] = ([now, 0], Amounts())
        change[1].add(amounts)
        if day not in cell.days:
            if not self.db.execute(
                "SELECT EXISTS (SELECT 1 FROM rollups WHERE c = ? AND day = ?)", (c, day)
            ).fetchone()[0]:
                change[0][1] += 1
            if len(cell.days) >= 8:
                cell.days.clear()
            cell.days.add(day)
        for span in self._sums:
            only, metric, first, end = span
            if first <= day < end and (only is None or only == model):
                tokens = amounts.input_tokens + amounts.output_tokens
                self._sums[span] += tokens if metric == "tokens" else getattr(amounts, metric)

    def _row(self, cell: SQLiteCell) -> int:
        """The customer's row, promised if there is none yet."""
        if cell.c is None:
            self._last_c += 1
            cell.c = self._last_c
            self._new_customers.append((cell.c, cell.customer, search_text(cell.customer, None), self.now, self.now))
        return cell.c

    def keep_entry(self, entry: Entry, customer: str, rev: int, late: bool) -> None:
        """Append an entry to the log; a revision leaves its old place."""
        self._seq += 1
        self._latest = max(self._latest, entry.at_ms)
        self._entries[customer, entry.id] = (StoredEntry(self._seq, rev, entry, late), self._latest)

    def keep_hold(self, cell: Cell, hold: Hold) -> None:
        """A hold was made or changed."""
        assert isinstance(cell, SQLiteCell)
        self._holds[self._row(cell), hold.id] = (cell, hold)

    def keep_rate(self, cell: Cell, width: int, window: Window) -> None:
        """A rate was counted."""
        assert isinstance(cell, SQLiteCell)
        self._rates[self._row(cell), width] = window

    # -- writing -----------------------------------------------------------------------------------

    def _write_customers(self) -> None:
        if self._new_customers:
            self.db.executemany(_INSERT_CUSTOMER, self._new_customers)
            self._new_customers = []
        if self._rollups:
            self.db.executemany(
                _UPSERT_ROLLUP,
                [
                    (c, day, model, a.requests, a.calls, a.cost, a.input_tokens, a.output_tokens, a.cache_read_tokens,
                     a.unpriced, a.errors)
                    for (c, day, model), a in self._rollups.items()
                ],
            )  # fmt: skip
            self._rollups = {}
        if self._customers:
            self.db.executemany(
                _UPDATE_CUSTOMER,
                [
                    (seen[0], seen[1], a.requests, a.calls, a.cost, a.input_tokens, a.output_tokens,
                     a.cache_read_tokens, a.unpriced, a.errors, c)
                    for c, (seen, a) in self._customers.items()
                ],
            )  # fmt: skip
            self._customers = {}

    def _write_holds(self) -> None:
        written, over = [], []
        for (c, hold_id), (_, hold) in self._holds.items():
            answer = answer_text(hold.outcome)
            if _is_over(hold):
                over.append((c, hold_id, hold.ended, answer))
            else:
                written.append(
                    (c, hold_id, hold.day, hold.model, hold.cost, hold.tokens, hold.expires, hold.ended, answer)
                )
        if over:
            self.db.executemany("DELETE FROM holds WHERE c = ? AND id = ?", [row[:2] for row in over])
            self.db.executemany("INSERT OR REPLACE INTO ended (c, id, ended_ms, answer) VALUES (?, ?, ?, ?)", over)
        if written:
            self.db.executemany(_INSERT_HOLD, written)

    def _write_rates(self) -> None:
        if self._rates:
            self.db.executemany(
                "INSERT OR REPLACE INTO rates (c, window_ms, start_ms, previous, current) VALUES (?, ?, ?, ?, ?)",
                [(c, width, *window) for (c, width), window in self._rates.items()],
            )

    def _write_entries(self) -> None:
        rows, revised = [], []
        for (customer, entry_id), (stored, latest) in self._entries.items():
            c, entry, usage = self.cell(customer).c, stored.entry, stored.entry.usage
            if stored.rev > 1:
                revised.append((c, entry_id))
            rows.append(
                (stored.seq, c, entry_id, stored.rev, entry.day, entry.at_ms, latest, entry.cost, entry.input_tokens,
                 entry.output_tokens, usage.cache_read_tokens, stored.late, entry.model, entry.admission, entry.kind,
                 entry.source, usage.provider, usage.status, usage.trace_id, usage_text(usage))
            )  # fmt: skip
        if revised:
            self.db.executemany("DELETE FROM entries WHERE c = ? AND id = ?", revised)
        if rows:
            self.db.executemany(_INSERT_ENTRY, rows)

    def _sweep(self) -> None:
        """Delete what is too old to be asked for: little by little, and all that a crash left behind."""
        if self.ended is None:
            self.ended = deque(self.db.execute("SELECT ended_ms, c, id FROM ended ORDER BY ended_ms"))
        if self.now - self._swept_at >= _SWEEP_ALL_MS:
            self._swept_at = self.now
            self.db.execute("DELETE FROM holds WHERE expires_ms < ?", (self.now - _KEEP_EXPIRED_MS,))
        old: list[tuple[int, str, int]] = []
        while self.ended and self.ended[0][0] + REPLAY_MS <= self.now and len(old) < _SWEEP:
            _, c, hold_id = self.ended.popleft()
            old.append((c, hold_id, self.now - REPLAY_MS))
        if old:
            self.db.executemany("DELETE FROM ended WHERE c = ? AND id = ? AND ended_ms <= ?", old)


def _is_over(hold: Hold) -> bool:
    """Whether nothing but the answer is of interest any more. An expired hold shows what it never spent."""
    return hold.ended is not None and not hold.cost and not hold.tokens
