"""Proof that the sums are the entries', and what people should know of the file."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from respan_guard.backends.base import AMOUNTS, HOUR_MS, HOURS_KEPT, Discrepancy, StoreInfo
from respan_guard.backends.rows import RECORDS_COUNTED, records_text
from respan_guard.backends.sqlite.location import Location
from respan_guard.backends.sqlite.rows import FROM_ENTRIES

__all__ = ["info", "verify"]

_SUMS = tuple(FROM_ENTRIES)
_WHO = "coalesce((SELECT customer FROM customers WHERE customers.c = found.c), 'row ' || found.c)"
_RECOMPUTED = f"""
SELECT {_WHO}, model, day, {", ".join(f"sum(stored_{name}), sum(right_{name})" for name in _SUMS)} FROM (
    SELECT c, day, model, {", ".join(f"{name} AS stored_{name}, 0 AS right_{name}" for name in _SUMS)} FROM rollups
    UNION ALL
    SELECT c, day, model, {", ".join(f"0, {name}" for name in _SUMS)} FROM pruned
    UNION ALL
    SELECT c, day, model, {", ".join(f"0, {added}" for added in FROM_ENTRIES.values())} FROM entries
) AS found GROUP BY c, day, model
HAVING {" OR ".join(f"sum(stored_{name}) <> sum(right_{name})" for name in _SUMS)}"""  # noqa: S608  # constants
_TOTALS = ("requests", *_SUMS, "active_days")
_TOTALS_OF = f"""
SELECT customer, {", ".join(f"customers.{name}, coalesce(days.{name}, 0)" for name in _TOTALS)}
FROM customers LEFT JOIN (
    SELECT c, {", ".join(f"sum({name}) AS {name}" for name in _TOTALS[:-1])}, count(DISTINCT day) AS active_days
    FROM rollups GROUP BY c
) AS days USING (c)
WHERE {" OR ".join(f"customers.{name} <> coalesce(days.{name}, 0)" for name in _TOTALS)}"""  # noqa: S608
_EVERYBODY = f"""
SELECT model, day, {", ".join(f"sum(stored_{name}), sum(right_{name})" for name in AMOUNTS)} FROM (
    SELECT day, model, {", ".join(f"{name} AS stored_{name}, 0 AS right_{name}" for name in AMOUNTS)} FROM days
    UNION ALL
    SELECT day, model, {", ".join(f"0, {name}" for name in AMOUNTS)} FROM rollups
) GROUP BY day, model
HAVING {" OR ".join(f"sum(stored_{name}) <> sum(right_{name})" for name in AMOUNTS)}"""  # noqa: S608
# An hour is there in full if no entry of it was pruned, and it is not so old that its sums may have been deleted. What
# was deleted last is not known: all before the first hour that is there; and by the time that customers were seen last,
# all before that less what is kept. Requests of an hour are in no entry.
_HOURS = f"""
WITH kept AS (
    SELECT max((SELECT coalesce(min(hour), 1 << 40) FROM hours),
        (SELECT coalesce(max(last_seen), 0) FROM customers) / {HOUR_MS} - {HOURS_KEPT},
        (SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'pruned_ms') / {HOUR_MS} + 1) AS first
)
SELECT model, hour, {", ".join(f"sum(stored_{name}), sum(right_{name})" for name in _SUMS)} FROM (
    SELECT hour, model, {", ".join(f"{name} AS stored_{name}, 0 AS right_{name}" for name in _SUMS)} FROM hours
    UNION ALL
    SELECT at_ms / {HOUR_MS}, model, {", ".join(f"0, {added}" for added in FROM_ENTRIES.values())} FROM entries
) WHERE hour >= (SELECT first FROM kept) GROUP BY hour, model
HAVING {" OR ".join(f"sum(stored_{name}) <> sum(right_{name})" for name in _SUMS)}"""  # noqa: S608
_ROWS = (  # what, and a query of (where, stored, right)
    (
        "customers",
        """SELECT 'day ' || day, sum(stored), sum(right) FROM (
                SELECT day, customers AS stored, 0 AS right FROM active
                UNION ALL SELECT day, 0, count(DISTINCT c) FROM rollups GROUP BY day
            ) GROUP BY day HAVING sum(stored) <> sum(right)""",
    ),
    ("hold below 0", "SELECT c || ' ' || id, min(cost, tokens), 0 FROM holds WHERE cost < 0 OR tokens < 0"),
    (
        "hold long expired",
        """SELECT c || ' ' || id, expires_ms, newest.at
            FROM holds, (SELECT max(last_seen) AS at FROM customers) AS newest
            WHERE expires_ms < newest.at - 604800000""",
    ),
    (
        "rate below 0",
        "SELECT c || ' ' || window_ms, min(previous, current), 0 FROM rates WHERE previous < 0 OR current < 0",
    ),
    (
        "entry stored twice",
        "SELECT c || ' ' || id, count(*), 1 FROM entries NOT INDEXED GROUP BY c, id HAVING count(*) > 1",
    ),
    ("usage is no JSON", "SELECT seq, 'damaged', 'JSON' FROM entries WHERE NOT json_valid(body)"),
    (
        "params are no JSON",
        "SELECT customer, 'damaged', 'JSON' FROM customers WHERE params IS NOT NULL AND NOT json_valid(params)",
    ),
    (
        "log out of order",
        """SELECT seq, latest_ms, least FROM (SELECT seq, latest_ms,
                max(at_ms, coalesce(lag(latest_ms) OVER (ORDER BY seq), at_ms)) AS least FROM entries)
            WHERE latest_ms < least""",
    ),
    *(
        (
            f"{table} of nobody",
            f"SELECT 'row ' || c, count(*), 0 FROM {table} WHERE c NOT IN (SELECT c FROM customers) GROUP BY c",  # noqa: S608
        )
        for table in ("holds", "ended", "rates", "rollups", "pruned", "entries", "tombs")
    ),
)
_FIXED_WAL_RESET = (3, 51, 3)
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "afs", "glusterfs", "lustre"})


def verify(db: sqlite3.Connection) -> list[Discrepancy]:
    """Recompute every sum, on one state of the file; see `Backend.verify`."""
    db.execute("BEGIN")
    try:
        found = [
            Discrepancy("file", "integrity_check", str(text), "ok")
            for (text,) in db.execute("PRAGMA integrity_check")
            if text != "ok"
        ]
        for row in db.execute(_RECOMPUTED):
            where = f"{row[0]} {row[1]} {row[2]}"
            found += _differing(_SUMS, where, row[3:])
        for row in db.execute(_TOTALS_OF):
            found += _differing(tuple(f"total {name}" for name in _TOTALS), row[0], row[1:])
        for row in db.execute(_EVERYBODY):
            found += _differing(AMOUNTS, f"all {row[0]} {row[1]}", row[2:])
        for row in db.execute(_HOURS):
            found += _differing(_SUMS, f"all {row[0]} hour {row[1]}", row[2:])
        for what, query in _ROWS:
            found += [Discrepancy(what, str(where), stored, right) for where, stored, right in db.execute(query)]
    finally:
        db.execute("COMMIT")
    return found


def _differing(names: tuple[str, ...], where: str, pairs: tuple[int, ...]) -> list[Discrepancy]:
    return [
        Discrepancy(name, where, pairs[2 * at], pairs[2 * at + 1])
        for at, name in enumerate(names)
        if pairs[2 * at] != pairs[2 * at + 1]
    ]


def info(db: sqlite3.Connection, at: Location, checkpointer: bool) -> StoreInfo:
    """What `respan-guard check` says about the file."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    customers, records, first, last = db.execute(
        "SELECT (SELECT count(*) FROM customers), (SELECT count(*) FROM (SELECT 1 FROM entries LIMIT ?)), "
        "(SELECT min(seq) FROM entries), (SELECT max(seq) FROM entries)",
        (RECORDS_COUNTED + 1,),
    ).fetchone()
    log = Path(f"{at.path}-wal")
    facts = {
        "SQLite": sqlite3.sqlite_version,
        "file": str(at.path),
        "bytes": str(at.path.stat().st_size),
        "bytes in the log": str(log.stat().st_size if log.exists() else 0),
        "journal_mode": str(db.execute("PRAGMA journal_mode").fetchone()[0]),
        "synchronous": at.synchronous,
        "checkpoints": "by this process" if checkpointer else "by another process",
        "customers": str(customers),
        "records": records_text(records, last - first + 1 if records else 0),
    }
    warnings = []
    if sqlite3.sqlite_version_info < _FIXED_WAL_RESET:
        warnings.append(
            f"SQLite {sqlite3.sqlite_version} is older than 3.51.3, which mends a bug that can damage a file used by"
            " several connections; respan_guard lets only one of them checkpoint, other programs may not"
        )
    if at.synchronous == "normal":
        warnings.append("synchronous=normal: a power cut can take the last moments; the default, full, can't lose any")
    kind = _file_system(at.path)
    if kind in _NETWORK:
        warnings.append(f"the file is on {kind}, where SQLite's locks can't be relied on; use a local disk")
    return StoreInfo(at.url, str(version), at.synchronous == "full", facts, tuple(warnings))


def _file_system(path: Path) -> str:
    """The type of the file system; "" where the system has no list of them."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    mounts = {fields[1]: fields[2] for fields in (line.split(" ") for line in lines) if len(fields) > 2}
    real = Path(os.path.realpath(path))
    return next((mounts[str(parent)] for parent in real.parents if str(parent) in mounts), "")
