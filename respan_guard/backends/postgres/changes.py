"""What is written beside the batches: params, deletion, refusals, audit, cursors, facts, pruning. A statement each."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from respan_guard.backends.base import ANY, AuditRow, Conflict, Expected, Params, Put, RefusalRow
from respan_guard.backends.postgres.connection import Connection, committed
from respan_guard.backends.postgres.schema import in_schema
from respan_guard.backends.texts import params_from, params_text, search_text

__all__ = ["Changes"]

_READ_PARAMS = """SELECT revision, params, greatest(%s, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint)
    FROM (SELECT 1) AS one LEFT JOIN {schema}.customers ON customer = %s"""
_PUT = """WITH changed AS (
    INSERT INTO {schema}.customers AS k (customer, revision, params, name, search, blocked, first_seen, last_seen)
    VALUES (%(customer)s, %(revision)s, %(params)s, %(name)s, %(search)s, %(blocked)s, %(now)s, %(now)s)
    ON CONFLICT (customer) DO UPDATE SET revision = excluded.revision, params = excluded.params, name = excluded.name,
        search = excluded.search, blocked = excluded.blocked
    WHERE k.revision = %(before)s
    RETURNING 1
)
INSERT INTO {schema}.audit (at_ms, customer, action, actor, before, after)
SELECT %(now)s::bigint, %(customer)s, 'put', %(actor)s, %(was)s, %(params)s FROM changed RETURNING seq"""
_ADD_REFUSALS = """WITH counts AS MATERIALIZED (
    SELECT n.minute, coalesce(
            (SELECT k.customer FROM {schema}.tombs t JOIN {schema}.customers k USING (c)
                WHERE t.hash = encode(sha256(convert_to(%s || n.customer, 'UTF8')), 'hex')
                    AND t.deleted_ms >= n.minute::bigint * 60000
                ORDER BY t.deleted_ms, t.c LIMIT 1),
            n.customer) AS customer, n.reason, n.count
    FROM unnest(%s::integer[], %s::text[], %s::text[], %s::bigint[]) AS n (minute, customer, reason, count)
), minutes AS (
    INSERT INTO {schema}.refusals AS r (minute, customer, reason, count)
        SELECT minute, customer, reason, sum(count) FROM counts GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
        ON CONFLICT (minute, customer, reason) DO UPDATE SET count = r.count + excluded.count
)
INSERT INTO {schema}.refusal_hours AS r (hour, reason, count)
    SELECT minute / 60, reason, sum(count) FROM counts GROUP BY 1, 2 ORDER BY 1, 2
    ON CONFLICT (hour, reason) DO UPDATE SET count = r.count + excluded.count"""

_RENAME_REFUSALS = """UPDATE {schema}.refusals r SET customer = %s WHERE r.ctid = ANY (ARRAY(
    SELECT o.ctid FROM {schema}.refusals o WHERE o.customer = %s LIMIT %s))"""
_PIECE = 1000  # rows that are changed at a time


class Changes:
    """What can be written to the tables of a schema.

    Args:
        schema: Its name.
    """

    def __init__(self, schema: str) -> None:
        self._schema = schema

    async def _run(self, db: Connection, sql: str, values: Any = ()) -> Any:
        """The first row of a statement's result, or None."""
        cursor = await db.execute(in_schema(sql, self._schema), values)
        return await cursor.fetchone() if cursor.description else cursor.rowcount

    async def put(
        self,
        db: Connection,
        customer: str,
        params: Params,
        if_revision: str | None,
        actor: str,
        now: int | None,
        floor: int,
    ) -> Put | Conflict:
        """Store a customer's params; see `Backend.put`. What somebody else changes in between is read again."""
        after = dict(params)
        while True:
            stored, text, clock = await self._run(db, _READ_PARAMS, (floor, customer))
            revision, before = stored or "", params_from(text)
            if if_revision is not None and if_revision != revision:
                return Conflict(revision, before)
            if stored is not None and before == after:
                return Put(revision, False)
            made = secrets.token_hex(8)
            done = await self._run(
                db,
                _PUT,
                {
                    "customer": customer,
                    "revision": made,
                    "params": params_text(after),
                    "name": str(after.get("name") or ""),
                    "search": search_text(customer, after),
                    "blocked": bool(after.get("blocked")),
                    "now": clock if now is None else max(now, floor),
                    "before": revision,
                    "actor": actor,
                    "was": params_text(before),
                },
            )
            if done is not None:
                return Put(made, True)

    async def delete(
        self, db: Connection, epoch: str, customer: str, label: str, actor: str, now: int | None, floor: int
    ) -> bool:  # fmt: skip
        """Forget who a customer was; see `Backend.delete`. What takes long comes first, while nobody waits for it."""
        if await self._run(db, "SELECT 1 FROM {schema}.customers WHERE customer = %s", (customer,)) is None:
            return False
        stripped = 0
        while True:
            (last,) = await self._run(db, "SELECT {schema}.strip(%s, %s::bigint, %s)", (customer, stripped, _PIECE))
            if last is None:
                break
            stripped = last
        while await self._run(db, _RENAME_REFUSALS, (label, customer, _PIECE)) == _PIECE:
            pass
        sql = in_schema("SELECT {schema}.forget(%s, %s, %s, %s, %s::bigint, %s::bigint, %s::bigint)", self._schema)
        row = await committed(db, sql, (epoch, customer, label, actor, now, floor, stripped))
        return row is not None and bool(row[0])

    async def add_refusals(self, db: Connection, epoch: str, rows: Sequence[RefusalRow]) -> None:
        """Add counts; the same customer, reason and minute are summed. Of who was deleted since: to the label."""
        columns = [
            [row.minute for row in rows],
            [row.customer for row in rows],
            [row.reason for row in rows],
            [row.count for row in rows],
        ]
        async with db.transaction():
            await self._run(db, "SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            # `forget` holds it: who is being deleted just now is seen as deleted, or these counts are seen by that.
            await self._run(db, "SELECT pg_advisory_xact_lock_shared(hashtextextended('{schema}', 3))")
            await self._run(db, _ADD_REFUSALS, (epoch, *columns))

    async def add_audit(self, db: Connection, row: AuditRow) -> None:
        """Add a row to the audit."""
        await self._run(
            db,
            "INSERT INTO {schema}.audit (at_ms, customer, action, actor, before, after) "
            "VALUES (%s, %s, %s, %s, %s, %s)",
            (row.at_ms, row.customer, row.action, row.actor, params_text(row.before), params_text(row.after)),
        )

    async def set_cursor(self, db: Connection, name: str, seq: int) -> None:
        """Say how far a reader has read the log."""
        await self._run(
            db,
            "INSERT INTO {schema}.cursors (name, seq) VALUES (%s, %s) "
            "ON CONFLICT (name) DO UPDATE SET seq = excluded.seq",
            (name, seq),
        )

    async def set_fact(self, db: Connection, space: str, key: str, value: str | None, expected: Expected) -> bool:
        """Compare and set; see `Backend.set_fact`. One statement each, so of several at once one finds it."""
        if value is None:
            if expected is None:
                row = await self._run(db, "SELECT 1 FROM {schema}.facts WHERE space = %s AND key = %s", (space, key))
                return row is None
            sql, values = "DELETE FROM {schema}.facts WHERE space = %s AND key = %s", [space, key]
            if expected is not ANY:
                sql += " AND value = %s"
                values.append(expected)
        elif expected is None:
            sql = "INSERT INTO {schema}.facts (space, key, value) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING"
            values = [space, key, value]
        elif expected is ANY:
            sql = (
                "INSERT INTO {schema}.facts (space, key, value) VALUES (%s, %s, %s) "
                "ON CONFLICT (space, key) DO UPDATE SET value = excluded.value"
            )
            values = [space, key, value]
        else:
            sql = "UPDATE {schema}.facts SET value = %s WHERE space = %s AND key = %s AND value = %s"
            values = [value, space, key, expected]
        changed = await self._run(db, sql, values)
        return expected is ANY or bool(changed)

    async def prune(self, db: Connection, before_day: int, limit: int) -> int:
        """Delete old entries and keep what they summed up to; see `Backend.prune`."""
        (gone,) = await self._run(db, "SELECT {schema}.prune(%s, %s)", (before_day, limit))
        return int(gone)

    async def sweep(self, db: Connection, now: int, everything: bool) -> None:
        """Delete admissions that nobody can ask for again."""
        await self._run(db, "SELECT {schema}.sweep(%s, %s)", (now, everything))
