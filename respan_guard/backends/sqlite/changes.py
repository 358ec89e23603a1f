"""What is written beside the batches: params, deletion, refusals, audit, cursors, facts, pruning. In a transaction."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Sequence

from respan_guard.backends.base import ANY, AuditRow, Conflict, Expected, Params, Put, RefusalRow
from respan_guard.backends.sqlite.rows import (
    FROM_ENTRIES,
    adding,
    hash_of,
)
from respan_guard.backends.texts import params_from, params_text, search_text

__all__ = ["add_audit", "add_refusals", "booked_on", "delete", "prune", "put", "set_cursor", "set_fact"]

_EPOCH_DAY = 719_163  # ordinal of 1970-01-01
_MAX_SEQ = (1 << 63) - 1
_KEEP_SUMS = f"""INSERT INTO pruned (c, day, model, {", ".join(FROM_ENTRIES)})
    SELECT c, day, model, {", ".join(f"sum({added})" for added in FROM_ENTRIES.values())}
    FROM entries WHERE seq IN (SELECT seq FROM going) GROUP BY c, day, model
    ON CONFLICT (c, day, model) DO UPDATE
    SET {", ".join(f"{name} = {name} + excluded.{name}" for name in FROM_ENTRIES)}"""  # noqa: S608  # a constant

_LABEL = (
    "SELECT customers.customer FROM tombs JOIN customers USING (c) WHERE hash = ? AND deleted_ms >= ? "
    "ORDER BY deleted_ms, c LIMIT 1"
)


def put(
    db: sqlite3.Connection, customer: str, params: Params, if_revision: str | None, actor: str, now: int
) -> Put | Conflict:
    """Store a customer's params; see `Backend.put`."""
    row = db.execute("SELECT revision, params FROM customers WHERE customer = ?", (customer,)).fetchone()
    revision, before = ("", None) if row is None else (row[0], params_from(row[1]))
    if if_revision is not None and if_revision != revision:
        return Conflict(revision, before)
    after = dict(params)
    if before == after:
        return Put(revision, False)
    revision = secrets.token_hex(8)
    db.execute(
        """INSERT INTO customers (customer, revision, params, name, search, blocked, first_seen, last_seen)
            VALUES (:customer, :revision, :params, :name, :search, :blocked, :now, :now)
            ON CONFLICT (customer) DO UPDATE
            SET revision = :revision, params = :params, name = :name, search = :search, blocked = :blocked""",
        {
            "customer": customer,
            "revision": revision,
            "params": params_text(after),
            "name": str(after.get("name") or ""),
            "search": search_text(customer, after),
            "blocked": bool(after.get("blocked")),
            "now": now,
        },
    )
    add_audit(db, AuditRow(now, customer, "put", actor, before, after))
    return Put(revision, True)


def delete(db: sqlite3.Connection, epoch: str, customer: str, actor: str, now: int) -> bool:
    """Forget who a customer was; see `Backend.delete`. The row keeps its number, so the sums stay where they are."""
    row = db.execute("SELECT c FROM customers WHERE customer = ?", (customer,)).fetchone()
    if row is None:
        return False
    c, label = row[0], f"deleted-{secrets.token_hex(8)}"
    db.execute(
        "UPDATE customers SET customer = :label, search = :label, revision = '', params = NULL, name = '', blocked = 0 "
        "WHERE c = :c",
        {"label": label, "c": c},
    )
    db.execute("INSERT INTO tombs (hash, c, deleted_ms) VALUES (?, ?, ?)", (hash_of(epoch, customer), c, now))
    for table in ("rates", "holds", "ended"):
        db.execute(f"DELETE FROM {table} WHERE c = ?", (c,))  # noqa: S608  # names of ours
    # What an app put into a record's metadata may say who the customer was.
    db.execute(
        "UPDATE entries SET body = json_remove(body, '$.metadata') "
        "WHERE c = ? AND json_type(body, '$.metadata') IS NOT NULL",
        (c,),
    )
    db.execute("DELETE FROM audit WHERE customer = ?", (customer,))
    db.execute("UPDATE refusals SET customer = ? WHERE customer = ?", (label, customer))
    add_audit(db, AuditRow(now, label, "delete", actor, None, None))
    return True


def booked_on(db: sqlite3.Connection, epoch: str, customer: str, at_ms: int) -> str:
    """The customer, or the label that took its place then or later."""
    label = db.execute(_LABEL, (hash_of(epoch, customer), at_ms)).fetchone()
    return customer if label is None else str(label[0])


def add_refusals(db: sqlite3.Connection, epoch: str, rows: Sequence[RefusalRow]) -> None:
    """Add counts; the same customer, reason and minute are summed. Those of who was deleted since go to the label."""
    db.executemany(
        adding("refusals", "minute, customer, reason", "count"),
        [(row.minute, booked_on(db, epoch, row.customer, row.minute * 60_000), row.reason, row.count) for row in rows],
    )
    db.executemany(
        adding("refusal_hours", "hour, reason", "count"), [(row.minute // 60, row.reason, row.count) for row in rows]
    )


def add_audit(db: sqlite3.Connection, row: AuditRow) -> None:
    """Add a row to the audit."""
    db.execute(
        "INSERT INTO audit (at_ms, customer, action, actor, before, after) VALUES (?, ?, ?, ?, ?, ?)",
        (row.at_ms, row.customer, row.action, row.actor, params_text(row.before), params_text(row.after)),
    )


def set_cursor(db: sqlite3.Connection, name: str, seq: int) -> None:
    """Say how far a reader has read the log."""
    db.execute("INSERT OR REPLACE INTO cursors (name, seq) VALUES (?, ?)", (name, seq))


def set_fact(db: sqlite3.Connection, space: str, key: str, value: str | None, expected: Expected) -> bool:
    """Compare and set; see `Backend.set_fact`."""
    if expected is not ANY:
        row = db.execute("SELECT value FROM facts WHERE space = ? AND key = ?", (space, key)).fetchone()
        if (None if row is None else row[0]) != expected:
            return False
    if value is None:
        db.execute("DELETE FROM facts WHERE space = ? AND key = ?", (space, key))
    else:
        db.execute("INSERT OR REPLACE INTO facts (space, key, value) VALUES (?, ?, ?)", (space, key, value))
    return True


def prune(db: sqlite3.Connection, before_day: int, limit: int) -> int:
    """Delete old entries and keep what they summed up to; see `Backend.prune`. Old counts of refusals go with them."""
    db.execute(
        "UPDATE meta SET value = max(CAST(value AS INTEGER), ?) WHERE key = 'pruned_to'",
        (before_day - 1,),
    )
    db.execute(
        "UPDATE meta SET value = max(CAST(value AS INTEGER), (SELECT coalesce(max(seq), 0) FROM entries)) "
        "WHERE key = 'log_end'"
    )
    read_by_all = db.execute("SELECT min(seq) FROM cursors").fetchone()[0]
    db.execute("CREATE TEMP TABLE IF NOT EXISTS going (seq INTEGER PRIMARY KEY)")
    db.execute("DELETE FROM going")
    db.execute(
        "INSERT INTO going SELECT seq FROM entries WHERE day < ? AND seq <= ? ORDER BY day LIMIT ?",
        (before_day, _MAX_SEQ if read_by_all is None else read_by_all, limit),
    )
    db.execute(_KEEP_SUMS)
    db.execute(
        "UPDATE meta SET value = max(CAST(value AS INTEGER), (SELECT coalesce(max(at_ms), -1) FROM entries "
        "WHERE seq IN (SELECT seq FROM going))) WHERE key = 'pruned_ms'"
    )
    gone = db.execute("DELETE FROM entries WHERE seq IN (SELECT seq FROM going)").rowcount
    db.execute("DELETE FROM refusals WHERE minute < ?", ((before_day - _EPOCH_DAY) * 1440,))
    return gone
