"""Where a customer's limits stand, read on one state of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from respan_guard.backends.base import Allowed, Limit
from respan_guard.backends.cells import roll
from respan_guard.backends.postgres.connection import Connection
from respan_guard.backends.postgres.rows import EVER
from respan_guard.backends.postgres.schema import in_schema

__all__ = ["NOW", "standing"]

NOW = "greatest(%(floor)s, coalesce(%(now)s, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint))"
"""The time to read at: the caller's or the server's, but not before what was seen."""
_STANDING = f"""
WITH at AS MATERIALIZED (SELECT {NOW} AS now),
    mine AS MATERIALIZED (SELECT c, rates FROM {{schema}}.customers WHERE customer = %(customer)s)
SELECT at.now, mine.rates, l.n, u.requests, u.cost, u.tokens, h.cost, h.tokens
FROM at LEFT JOIN mine ON true
LEFT JOIN unnest(%(wide)s::boolean[], %(first)s::integer[], %(end)s::integer[], %(model)s::text[])
    WITH ORDINALITY AS l (wide, first, "end", model, n) ON true
LEFT JOIN LATERAL (
    SELECT coalesce(sum(a.requests), 0)::bigint AS requests, coalesce(sum(a.cost), 0)::bigint AS cost,
        coalesce(sum(a.input_tokens + a.output_tokens), 0)::bigint AS tokens
    FROM {{schema}}.rollups a
    WHERE a.c = mine.c AND NOT l.wide AND a.day >= l.first AND a.day < l."end"
        AND (l.model IS NULL OR a.model = l.model)
    UNION ALL
    SELECT coalesce(sum(a.requests), 0)::bigint, coalesce(sum(a.cost), 0)::bigint,
        coalesce(sum(a.input_tokens + a.output_tokens), 0)::bigint
    FROM {{schema}}.totals a
    WHERE a.unit = 'd' AND l.wide AND a.at >= l.first AND a.at < l."end" AND (l.model IS NULL OR a.model = l.model)
) AS u ON true
LEFT JOIN LATERAL (
    SELECT coalesce(sum(g.cost), 0)::bigint AS cost, coalesce(sum(g.tokens), 0)::bigint AS tokens
    FROM {{schema}}.holds g
    WHERE (l.wide OR g.c = mine.c) AND g.ended_ms IS NULL AND g.expires_ms > at.now
        AND g.day >= l.first AND g.day < l."end" AND (l.model IS NULL OR g.model = l.model)
) AS h ON true"""  # noqa: S608  # constants


async def standing(
    db: Connection, schema: str, customer: str, limits: Sequence[Limit], model: str, now: int | None, floor: int
) -> Allowed:
    """What an admission would see; see `Backend.standing`."""
    asked = [limit for limit in limits if not limit.window_ms]
    days = [(0, EVER) if limit.kind == "total" else (limit.first_day, limit.end_day) for limit in asked]
    cursor = await db.execute(
        in_schema(_STANDING, schema),
        {
            "customer": customer,
            "now": now,
            "floor": floor,
            "wide": [limit.scope in ("model", "all") for limit in asked],
            "first": [min(first, EVER) for first, _ in days],
            "end": [min(end, EVER) for _, end in days],
            "model": [model if limit.scope in ("customer+model", "model") else None for limit in asked],
        },
    )
    rows: list[Any] = await cursor.fetchall()
    at: int = rows[0][0]
    flat = rows[0][1] or []
    rates = {flat[i]: (flat[i + 1], flat[i + 2], flat[i + 3]) for i in range(0, len(flat), 4)}
    # Of each limit two rows of sums: the customer's and everybody's, one of them 0.
    sums: dict[int, list[int]] = {}
    for _, _, number, requests, cost, tokens, held_cost, held_tokens in rows:
        found = sums.setdefault(number or 0, [0, 0, 0, held_cost, held_tokens])
        found[0] += requests or 0
        found[1] += cost or 0
        found[2] += tokens or 0
    used, held, windows = [], [], []
    numbers = iter(range(1, len(asked) + 1))
    for limit in limits:
        if limit.window_ms:
            window = roll(rates.get(limit.window_ms), limit.window_ms, at)
            start, previous, current = window
            windows.append(window)
            used.append(previous * (limit.window_ms - max(0, at - start)) // limit.window_ms + current)
            held.append(0)
            continue
        requests, cost, tokens, held_cost, held_tokens = sums[next(numbers)]
        used.append({"requests": requests, "cost": cost, "tokens": tokens}[limit.metric])
        held.append({"requests": 0, "cost": held_cost, "tokens": held_tokens}[limit.metric])
    return Allowed(at, tuple(used), tuple(held), tuple(windows))
