"""Proof that the sums are the entries', and what people should know of the server."""

from __future__ import annotations

from typing import Any

from respan_guard.backends.base import HOUR_MS, HOURS_KEPT, Discrepancy, StoreInfo
from respan_guard.backends.postgres.connection import Connection
from respan_guard.backends.postgres.location import Location
from respan_guard.backends.postgres.rows import FROM_ENTRIES
from respan_guard.backends.postgres.schema import in_schema
from respan_guard.backends.rows import RECORDS_COUNTED, records_text

__all__ = ["info", "verify"]

_SUMS = tuple(FROM_ENTRIES)
_ALL = ("requests", *_SUMS)


def _compared(names: tuple[str, ...]) -> str:
    return ", ".join(f"sum(stored_{name}), sum(right_{name})" for name in names)


def _differ(names: tuple[str, ...]) -> str:
    return " OR ".join(f"sum(stored_{name}) <> sum(right_{name})" for name in names)


def _stored(names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} AS stored_{name}, 0::bigint AS right_{name}" for name in names)


def _right(values: Any) -> str:
    return ", ".join(f"0::bigint, {value}" for value in values)


_RECOMPUTED = f"""
SELECT coalesce((SELECT customer FROM {{schema}}.customers k WHERE k.c = found.c), 'row ' || found.c) || ' ' || model
    || ' ' || day, {_compared(_SUMS)} FROM (
    SELECT c, day, model, {_stored(_SUMS)} FROM {{schema}}.rollups
    UNION ALL SELECT c, day, model, {_right(_SUMS)} FROM {{schema}}.pruned
    UNION ALL SELECT c, day, model, {_right(FROM_ENTRIES.values())} FROM {{schema}}.entries
) AS found GROUP BY c, day, model HAVING {_differ(_SUMS)}"""  # noqa: S608  # constants, as all below
_TOTALS = (*_ALL, "active_days")
_TOTALS_OF = f"""
SELECT customer, {", ".join(f"k.{name}, coalesce(days.{name}, 0)" for name in _TOTALS)}
FROM {{schema}}.customers k LEFT JOIN (
    SELECT c, {", ".join(f"sum({name}) AS {name}" for name in _ALL)}, count(DISTINCT day) AS active_days
    FROM {{schema}}.rollups GROUP BY c
) AS days USING (c)
WHERE {" OR ".join(f"k.{name} <> coalesce(days.{name}, 0)" for name in _TOTALS)}"""  # noqa: S608
_EVERYBODY = f"""
SELECT 'all ' || model || ' ' || day, {_compared(_ALL)} FROM (
    SELECT at AS day, model, {_stored(_ALL)} FROM {{schema}}.totals WHERE unit = 'd'
    UNION ALL SELECT day, model, {_right(_ALL)} FROM {{schema}}.rollups
) AS found GROUP BY day, model HAVING {_differ(_ALL)}"""  # noqa: S608
# An hour is there in full if no entry of it was pruned, and it is not so old that its sums may have been deleted. What
# was deleted last is not known: all before the first hour that is there; and by the time that customers were seen last,
# all before that less what is kept. Requests of an hour are in no entry.
_HOURS = f"""
SELECT 'all ' || model || ' hour ' || hour, {_compared(_SUMS)} FROM (
    SELECT at AS hour, model, {_stored(_SUMS)} FROM {{schema}}.totals WHERE unit = 'h'
    UNION ALL SELECT at_ms / {HOUR_MS}, model, {_right(FROM_ENTRIES.values())} FROM {{schema}}.entries
) AS found WHERE hour >= greatest(
    (SELECT coalesce(min(at), 2147483647) FROM {{schema}}.totals WHERE unit = 'h'),
    (SELECT coalesce(max(last_seen), 0) FROM {{schema}}.customers) / {HOUR_MS} - {HOURS_KEPT},
    (SELECT pruned_ms FROM {{schema}}.store) / {HOUR_MS} + 1
) GROUP BY hour, model HAVING {_differ(_SUMS)}"""  # noqa: S608
_ROWS = (  # what, and a query of (where, stored, right)
    (
        "customers",
        """SELECT 'day ' || day, sum(stored), sum(counted) FROM (
                SELECT at AS day, customers AS stored, 0 AS counted FROM {schema}.totals WHERE unit = 'd'
                UNION ALL SELECT day, 0, count(DISTINCT c) FROM {schema}.rollups GROUP BY day
            ) AS found GROUP BY day HAVING sum(stored) <> sum(counted)""",
    ),
    (
        "budget's sum",
        """SELECT k.customer, k.span_cost, coalesce(sum(r.cost), 0) FROM {schema}.customers k
            LEFT JOIN {schema}.rollups r ON r.c = k.c AND r.day >= k.span_first AND r.day < k.span_end
            WHERE k.span_end > 0 GROUP BY k.c HAVING k.span_cost <> coalesce(sum(r.cost), 0)""",
    ),
    *(
        (
            f"held {metric}",
            f"""SELECT k.customer, k.held_{metric}, coalesce(sum(h.{metric}), 0) FROM {{schema}}.customers k
                LEFT JOIN {{schema}}.holds h ON h.c = k.c AND h.ended_ms IS NULL AND h.expires_ms > k.held_from_ms
                GROUP BY k.c HAVING k.held_{metric} <> coalesce(sum(h.{metric}), 0)""",  # noqa: S608
        )
        for metric in ("cost", "tokens")
    ),
    (
        "customers out of order",
        """SELECT coalesce(k.customer, 'row ' || o.c), k.cost, o.cost
            FROM {schema}.customers k FULL JOIN {schema}.ordered o USING (c)
            WHERE (k.customer, k.search, k.blocked, k.last_seen, k.requests, k.calls, k.cost, k.tokens)
                IS DISTINCT FROM (o.customer, o.search, o.blocked, o.last_seen, o.requests, o.calls, o.cost, o.tokens)
                AND NOT EXISTS (SELECT 1 FROM {schema}.moved m WHERE m.c = coalesce(k.c, o.c))""",
    ),
    ("hold below 0", "SELECT c || ' ' || id, least(cost, tokens), 0 FROM {schema}.holds WHERE cost < 0 OR tokens < 0"),
    (
        "hold long expired",
        """SELECT c || ' ' || id, expires_ms, newest.at
            FROM {schema}.holds, (SELECT max(last_seen) AS at FROM {schema}.customers) AS newest
            WHERE expires_ms < newest.at - 604800000""",
    ),
    (
        "rate below 0",
        """SELECT k.customer, least(k.rates[n + 2], k.rates[n + 3]), 0 FROM {schema}.customers k,
            generate_series(1, cardinality(k.rates), 4) AS n WHERE k.rates[n + 2] < 0 OR k.rates[n + 3] < 0""",
    ),
    (
        "entry stored twice",
        "SELECT c || ' ' || id, count(*), 1 FROM {schema}.entries GROUP BY c, id HAVING count(*) > 1",
    ),
    (
        "log out of order",
        """SELECT seq, latest_ms, least FROM (SELECT seq, latest_ms,
                greatest(at_ms, lag(latest_ms) OVER (ORDER BY seq)) AS least FROM {schema}.entries) AS found
            WHERE latest_ms < least""",
    ),
    (
        "log beyond its end",
        "SELECT e.seq, e.seq, t.seq FROM {schema}.entries e, {schema}.store t WHERE e.seq > t.seq",
    ),
    *(
        (
            f"{table} of nobody",
            f"""SELECT 'row ' || c, count(*), 0 FROM {{schema}}.{table}
                WHERE c NOT IN (SELECT c FROM {{schema}}.customers) GROUP BY c""",  # noqa: S608
        )
        for table in ("holds", "rollups", "pruned", "entries", "tombs")
    ),
)
_FACTS = """SELECT current_setting('server_version'), current_setting('fsync'), current_setting('synchronous_commit'),
    current_setting('full_page_writes'), current_setting('default_transaction_isolation'),
    (SELECT version FROM {schema}.store), (SELECT count(*) FROM {schema}.customers),
    (SELECT count(*) FROM (SELECT 1 FROM {schema}.entries LIMIT %s) AS few),
    (SELECT min(seq) FROM {schema}.entries), (SELECT seq FROM {schema}.store),
    (SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class
        WHERE relnamespace = to_regnamespace(%s) AND relkind = 'r'),
    current_setting('synchronous_standby_names')"""


async def verify(connection: Connection, schema: str) -> list[Discrepancy]:
    """Recompute every sum, on one state of the tables; see `Backend.verify`."""

    async def rows(sql: str) -> list[tuple[Any, ...]]:
        cursor = await connection.execute(in_schema(sql, schema))
        return await cursor.fetchall()

    found: list[Discrepancy] = []
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        await connection.execute("SET LOCAL statement_timeout = 0")
        for names, sql in (
            (_SUMS, _RECOMPUTED),
            (tuple(f"total {name}" for name in _TOTALS), _TOTALS_OF),
            (_ALL, _EVERYBODY),
            (_SUMS, _HOURS),
        ):
            for where, *pairs in await rows(sql):
                found += _differing(names, where, pairs)
        for what, sql in _ROWS:
            found += [
                Discrepancy(what, str(where), int(stored or 0), int(right or 0))
                for where, stored, right in await rows(sql)
            ]
    return found


def _differing(names: tuple[str, ...], where: str, pairs: list[Any]) -> list[Discrepancy]:
    return [
        Discrepancy(name, where, int(pairs[2 * at]), int(pairs[2 * at + 1]))
        for at, name in enumerate(names)
        if pairs[2 * at] != pairs[2 * at + 1]
    ]


async def info(connection: Connection, at: Location) -> StoreInfo:
    """What `respan-guard check` says about the server."""
    cursor = await connection.execute(in_schema(_FACTS, at.schema), (RECORDS_COUNTED + 1, f'"{at.schema}"'))
    row: Any = await cursor.fetchone()
    version, fsync, commit, pages, isolation, level, customers, records, first, seq, size, standbys = row
    durable = fsync == "on" and commit != "off" and pages == "on"
    warnings = []
    if fsync != "on":
        warnings.append("fsync=off: a crash of the machine can destroy everything")
    if commit == "off":
        warnings.append(
            "synchronous_commit=off: a crash can take the last moments of what was acknowledged; let this user have it"
            " on: ALTER ROLE ... SET synchronous_commit = on"
        )
    if pages != "on":
        warnings.append("full_page_writes=off: a crash of the machine can damage tables")
    facts = {
        "PostgreSQL": version,
        "schema": at.schema,
        "bytes": str(int(size)),
        "synchronous_commit": commit,
        "standbys that a commit waits for": standbys or "none",
        "default_transaction_isolation": isolation,
        "customers": str(customers),
        "records": records_text(records, seq - first + 1 if records else 0),
        "end of the log": str(seq),
    }
    return StoreInfo(at.shown, str(level), durable, facts, tuple(warnings))
