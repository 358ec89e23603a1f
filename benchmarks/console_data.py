"""Stores for the benchmark of the console: filled as SQL, not through the guard, which would take an hour.

All sums are filled from the entries, so that `verify` finds nothing; of each entry one request is counted. Left out is
what only the next admission reads: holds, rates, and the sum of the budget in a customer's row.
"""

# ruff: noqa: E501  # SQL
from __future__ import annotations

import asyncio
import sqlite3
from datetime import UTC, datetime

import psycopg

from respan_guard.backends.base import AMOUNTS, HOUR_MS, Backend
from respan_guard.backends.postgres.rows import FROM_ENTRIES as POSTGRES_SUMS
from respan_guard.backends.sqlite.rows import COLUMNS, FROM_ENTRIES

__all__ = ["fill_postgres", "fill_sqlite", "is_filled", "proved"]

_DAYS = 60
_DAY_MS = 24 * HOUR_MS
_MODELS = ("gpt-4o", "gpt-4o-mini", "claude-sonnet-4-5", "gemini-2.5-flash", "text-embedding-3-small")
_MODEL = f"CASE {{j}} / 7 % {len(_MODELS)} {' '.join(f'WHEN {place} THEN {model!r}' for place, model in enumerate(_MODELS))} END"
_PARAMS = '{"rate_limit":60,"period_budget":"5","period_start":"2026-01-01","total_budget":"50"}'
_BODY = '{"model":"gpt-4o","input_tokens":900,"output_tokens":200,"latency_ms":1500}'
_PARTS = 16
"""Of PostgreSQL's totals: as many as there can be, as after many processes wrote."""
_EACH = ", ".join(f"sum({name})" for name in AMOUNTS)


_MARKUP = "UPDATE customers SET params = {}"
_MARKS = "INSERT INTO facts SELECT 'markups', customer, 'x' FROM customers"
"""Where everybody has a markup of its own, of seven percentages."""


def _entry(records: int, customers: int, now_ms: int, false: str, each: int) -> str:
    """Columns of entry `i`: of the last 60 days, in order; a tenth are of the first 100 customers, the rest of all.

    So many in a row are of one customer, day and model as `each` says.
    """
    start = now_ms - _DAYS * _DAY_MS
    day = datetime.fromtimestamp(start / 1000, UTC).toordinal()
    j = "i" if each == 1 else f"((i - 1) / {each} + 1)"
    at = f"({start} + {j} * {_DAYS * _DAY_MS} / {records // each})"
    return (
        f"i, CASE WHEN {j} % 10 = 0 THEN {j} / 10 % 100 + 1 ELSE {j} * 7919 % {customers} + 1 END, 'e' || i, 1,"
        f" {day} + ({at} - {start // _DAY_MS * _DAY_MS}) / {_DAY_MS}, {at}, {at},"
        " CASE WHEN i % 49999 = 0 THEN -2000000 WHEN i % 5000 = 0 THEN NULL ELSE 1000 + i % 9973 * 1000 END,"
        f" 900, 200, 0, {false}, {_MODEL.format(j=j)},"
        " CASE WHEN i % 49999 = 0 THEN 'adjustment' ELSE 'usage' END, CASE WHEN i % 99991 = 0 THEN 'manual' ELSE 'client' END,"
        " CASE WHEN i % 99991 = 0 THEN 'rare' ELSE 'openai' END, CASE WHEN i % 997 = 0 THEN 'error' ELSE 'ok' END,"
        f" NULL, '{_BODY}', 1500, NULL"
    )


_ENTRY = """(seq, c, id, rev, day, at_ms, latest_ms, cost, input_tokens, output_tokens, cache_read_tokens, late, model,
    kind, source, provider, status, trace_id, body, latency_ms, ttft_ms)"""
_CUSTOMER = f"'customer-' || i, 'customer-' || i, '', '{_PARAMS}', 'r' || i"
_REFUSAL = "'customer-' || (i % 50 + 1), CASE i % 2 WHEN 0 THEN 'rate_limit' ELSE 'period_budget' END, 3"
_PROFILE = f"""UPDATE customers SET (active_days, last_seen, {", ".join(AMOUNTS)})
    = (found.active_days, found.last, {", ".join(f"found.{name}" for name in AMOUNTS)})
    FROM (SELECT c, count(DISTINCT day) AS active_days, (max(day) - 719163) * CAST({_DAY_MS} AS bigint) AS last,
        {", ".join(f"sum({name}) AS {name}" for name in AMOUNTS)} FROM rollups GROUP BY c) AS found
    WHERE customers.c = found.c"""


def fill_sqlite(url: str, records: int, customers: int, now_ms: int, each: int, marked: bool) -> None:
    """Fill the tables that `SQLiteBackend` made; where it is `marked`, everybody has a markup of its own."""
    db = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    db.execute("PRAGMA synchronous = OFF")
    start = now_ms - _DAYS * _DAY_MS
    sums = ", ".join(f"sum({added})" for added in FROM_ENTRIES.values())
    for statement in (
        "BEGIN",
        "CREATE TEMP TABLE n (i INTEGER PRIMARY KEY)",
        f"INSERT INTO n WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < {max(records, customers)}) SELECT i FROM c",
        (
            "INSERT INTO customers (c, customer, search, name, params, revision, first_seen, last_seen)"
            f" SELECT i, {_CUSTOMER}, {start}, {start} FROM n WHERE i <= {customers}"
        ),
        f"INSERT INTO entries {_ENTRY} SELECT {_entry(records, customers, now_ms, '0', each)} FROM n WHERE i <= {records}",
        f"INSERT INTO rollups (c, day, model, {COLUMNS}) SELECT c, day, model, count(*), {sums} FROM entries GROUP BY 1, 2, 3",
        f"INSERT INTO hours (hour, model, {COLUMNS}) SELECT at_ms / {HOUR_MS}, model, count(*), {sums} FROM entries GROUP BY 1, 2",
        f"INSERT INTO days (day, model, {COLUMNS}) SELECT day, model, {_EACH} FROM rollups GROUP BY 1, 2",
        "INSERT INTO active SELECT day, count(DISTINCT c) FROM rollups GROUP BY day",
        _PROFILE,
        f"INSERT INTO refusals SELECT {now_ms // 60_000} - i, {_REFUSAL} FROM n WHERE i <= 50000",
        "INSERT INTO refusal_hours SELECT minute / 60, reason, sum(count) FROM refusals GROUP BY 1, 2",
        *(
            (_MARKUP.format("json_set(params, '$.markup_percentage', CAST(1 + c % 7 * 5 AS TEXT))"), _MARKS)
            if marked
            else ()
        ),
        "COMMIT",
    ):
        db.execute(statement)
    db.close()


def fill_postgres(url: str, records: int, customers: int, now_ms: int, each: int, marked: bool) -> None:
    """Fill the tables that `PostgresBackend` made, and give them the statistics that autovacuum would make."""
    markup = "jsonb_set(params::jsonb, '{markup_percentage}', to_jsonb((1 + c % 7 * 5)::text))::text"
    server, _, schema = url.rpartition("schema=")
    start = now_ms - _DAYS * _DAY_MS
    sums = ", ".join(("count(*)", *(f"sum({added})" for added in POSTGRES_SUMS.values())))
    names = ", ".join(AMOUNTS)
    tables = ("customers", "facts", "ordered", "moved", "entries", "rollups", "totals", "refusals", "refusal_hours")
    with psycopg.connect(server.rstrip("?&"), autocommit=True) as db:
        for statement in (
            f"SET search_path = \"{schema}\"; SET work_mem = '256MB'; SET synchronous_commit = off",
            (
                "INSERT INTO customers (c, customer, search, name, params, revision, first_seen, last_seen)"
                f" OVERRIDING SYSTEM VALUE SELECT i, {_CUSTOMER}, {start}, {start} FROM generate_series(1, {customers}) AS i"
            ),
            f"SELECT setval(pg_get_serial_sequence('customers', 'c'), {customers})",
            f"INSERT INTO entries {_ENTRY} SELECT {_entry(records, customers, now_ms, 'false', each)} FROM generate_series(1::bigint, {records}) AS i",
            "UPDATE store SET (seq, latest_ms) = (SELECT max(seq), max(latest_ms) FROM entries)",
            f"INSERT INTO rollups (c, day, model, {names}) SELECT c, day, model, {sums} FROM entries GROUP BY 1, 2, 3",
            (
                f"INSERT INTO totals (unit, at, model, part, customers, {names})"
                f" SELECT 'h', at_ms / {HOUR_MS}, model, c % {_PARTS}, 0, {sums} FROM entries GROUP BY 2, 3, 4"
            ),
            (
                f"INSERT INTO totals (unit, at, model, part, customers, {names}) SELECT 'd', day, model, c % {_PARTS},"
                f" sum((model = first)::integer), {_EACH} FROM"
                " (SELECT *, min(model) OVER (PARTITION BY c, day) AS first FROM rollups) AS r GROUP BY 2, 3, 4"
            ),
            _PROFILE,
            f"INSERT INTO refusals SELECT {now_ms // 60_000} - i, {_REFUSAL} FROM generate_series(1, 50000) AS i",
            "INSERT INTO refusal_hours SELECT minute / 60, reason, sum(count) FROM refusals GROUP BY 1, 2",
            *((_MARKUP.format(markup), _MARKS) if marked else ()),
            "DO $$ BEGIN WHILE NOT put_in_order() LOOP END LOOP; END $$",
            *(f"VACUUM FREEZE ANALYZE {table}" for table in tables),
        ):
            db.execute(statement.encode())


def is_filled(backend: Backend) -> bool:
    """Make the tables; whether they hold something already."""

    async def count() -> int:
        await backend.open()
        try:
            return await backend.count_customers()
        finally:
            await backend.close()

    return asyncio.run(count()) > 0


def proved(backend: Backend) -> str:
    """What `verify` says, in a line."""

    async def verify() -> str:
        await backend.open()
        try:
            found = await backend.verify()
        finally:
            await backend.close()
        return f"verify found {len(found)} discrepancies, {found[0]} first" if found else "verify found nothing"

    return asyncio.run(verify())
