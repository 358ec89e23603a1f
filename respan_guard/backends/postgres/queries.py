"""Pages and reports as statements and their values."""

from __future__ import annotations

from typing import Any, TypeAlias

from respan_guard.backends.base import AMOUNTS, HOUR_MS, CustomerQuery, RecordQuery, UsageQuery
from respan_guard.backends.postgres.rows import CUSTOMER, ENTRY, EVER, FROM_ENTRIES
from respan_guard.backends.rows import names_of
from respan_guard.errors import InvalidInput

__all__ = [
    "CREDITED", "INDEXED", "MOVING", "Statement", "count_sql", "customers_sql", "entries_sql", "sum_of", "usage_sql",
]  # fmt: skip

Statement: TypeAlias = tuple[str, dict[str, Any]]
INDEXED = ("requests", "calls", "cost", "tokens")
"""Amounts of all time that customers are known by."""
MOVING = ("last_seen", "requests", "calls", "cost", "tokens")
"""What customers are kept in order of in a table beside theirs, which has to be brought up to date before."""
_FEW = 1_000
_SORTS = ("customer", "name", "first_seen", *MOVING)


def customers_sql(query: CustomerQuery) -> Statement:
    """A page of customers, read off the index of its sort key."""
    if query.sort not in _SORTS:
        raise InvalidInput(f"sort must be one of {', '.join(_SORTS)}; got {query.sort!r}", field="sort")
    order = "DESC" if query.descending else "ASC"
    keys = ["customer"] if query.sort == "customer" else [query.sort, "customer"]
    where: list[str] = []
    values: dict[str, Any] = {"limit": query.limit}
    if query.after is not None:
        values["value"], values["customer"] = query.after
        sign = "<" if query.descending else ">"
        given = "%(customer)s" if len(keys) == 1 else "(%(value)s, %(customer)s)"
        where.append(f"({', '.join(keys)}) {sign} {given}")
    if query.search:
        where.append("strpos(search, %(search)s) > 0")
        values["search"] = query.search.casefold()
    where += _filters(query.seen_since_ms, query.blocked, values)
    if query.among is not None:
        where.append("customer = ANY(%(among)s)")
        values["among"] = names_of(query.among)
    rest = f"{_where(where)}ORDER BY {', '.join(f'{key} {order}' for key in keys)} LIMIT %(limit)s"
    if query.sort not in MOVING:
        return f"SELECT {CUSTOMER} FROM {{schema}}.customers {rest}", values  # noqa: S608
    page = f"SELECT c, customer AS name, {query.sort} AS value FROM {{schema}}.ordered {rest}"  # noqa: S608
    # OFFSET 0: each is looked up, none of them by a plan that reads everybody.
    one = f"SELECT {CUSTOMER} FROM {{schema}}.customers WHERE c = o.c OFFSET 0"  # noqa: S608
    return (
        f"SELECT k.* FROM ({page}) AS o CROSS JOIN LATERAL ({one}) AS k ORDER BY o.value {order}, o.name {order}",  # noqa: S608
        values,
    )


def count_sql(seen_since_ms: int | None, blocked: bool | None) -> Statement:
    """How many customers pass the filters, counted on an index."""
    values: dict[str, Any] = {}
    table = "customers" if seen_since_ms is None else "ordered"
    return f"SELECT count(*) FROM {{schema}}.{table} {_where(_filters(seen_since_ms, blocked, values))}", values  # noqa: S608


def _filters(seen_since_ms: int | None, blocked: bool | None, values: dict[str, Any]) -> list[str]:
    where = []
    if seen_since_ms is not None:
        where.append("last_seen >= %(seen_since)s")
        values["seen_since"] = seen_since_ms
    if blocked is not None:
        where.append("blocked" if blocked else "NOT blocked")
    return where


def usage_sql(query: UsageQuery, rows: list[int] | None = None) -> Statement:
    """A report. It reads customers' own rollups only if it has to; what counts all together is kept beside them.

    Args:
        query: What is asked.
        rows: The customers' rows (`c`), if they are known already; see `tops`.
    """
    query.check()
    if query.among is not None:
        return _some_sql(query, names_of(query.among))
    if query.by == ("customer",) and query.least is not None and query.customer is None and query.top in INDEXED:
        return _least_sql(query)
    first, end = query.first_day, query.end_day
    table, when, where = "totals", "at", ["unit = 'd'"]
    if "hour" in query.by:
        first, end, where = query.first_hour, query.end_hour, ["unit = 'h'"]
    elif not query.of_all:
        table = "rollups"
    distinct = "NULL"
    if query.distinct:
        if table == "totals" and query.by_day_alone:
            distinct = "sum(r.customers)"
        else:
            distinct, table = "count(DISTINCT r.c)", "rollups"
    if table == "rollups":
        # One customer's by the key, all customers' by the index of days; see the schema.
        when, where = "(day + 0)" if query.customer is None and rows is None else "day", []
    where += [f"{when} >= %(first)s", f"{when} < %(end)s"]
    if query.customer is not None:
        where.append("r.c = (SELECT c FROM {schema}.customers WHERE customer = %(customer)s)")
    if rows is not None:
        where.append("r.c = ANY(%(rows)s) AND k.c = ANY(%(rows)s)")  # said of both, no plan reads all of either
    if query.model is not None:
        where.append("model = %(model)s")
    if query.by == ("customer",) and query.top is not None and query.customer is None and rows is None:
        # Who they are is found by one sum; their names and all other sums are looked up afterwards.
        found = f"SELECT r.c FROM {{schema}}.rollups r {_where(where)}GROUP BY r.c ORDER BY {sum_of(query.top)} DESC"  # noqa: S608
        days = ["day >= %(first)s", "day < %(end)s"]
        where = [*days, *where[2:], f"r.c IN ({found} FETCH FIRST %(limit)s ROWS WITH TIES)"]
    names = ["at" if table == "totals" and name in ("day", "hour") else name for name in query.by]
    source = f"{{schema}}.{table} r" + (" JOIN {schema}.customers k USING (c)" if "customer" in query.by else "")
    return (
        _grouped(query, names, source, where, distinct),
        {
            "first": min(first, EVER),
            "end": min(end, EVER),
            "customer": query.customer,
            "rows": rows,
            "model": query.model,
            "limit": query.limit,
        },
    )


def _some_sql(query: UsageQuery, among: list[str]) -> Statement:
    """A report on some customers, from their rollups; by hour, from their entries."""
    first, end = min(query.first_day, EVER), min(query.end_day, EVER)
    rows = "SELECT c FROM {schema}.customers WHERE customer = ANY(%(among)s)"
    # Of few, each one's rows are looked up on an index; of many, a plan reads what it must.
    few = f"= ANY(ARRAY({rows}))" if len(among) <= _FEW else f"IN ({rows})"
    where = [f"r.c {few}", "r.day >= %(first)s", "r.day < %(end)s"]
    source = "{schema}.rollups r"
    if "hour" in query.by:
        first, end = query.first_hour * HOUR_MS, query.end_hour * HOUR_MS
        added = ", ".join(f"{what} AS {name}" for name, what in FROM_ENTRIES.items())
        source = (
            f"(SELECT c, model, at_ms / {HOUR_MS} AS hour, 0 AS requests, {added} FROM {{schema}}.entries "  # noqa: S608
            f"WHERE c + 0 {few} AND seq >= %(seq)s AND at_ms >= %(first)s AND at_ms < %(end)s) r"
        )
        where = []
    if "customer" in query.by:
        source += " JOIN {schema}.customers k USING (c)"
    if query.customer is not None:
        where.append("r.c = (SELECT c FROM {schema}.customers WHERE customer = %(customer)s)")
    if query.model is not None:
        where.append("model = %(model)s")
    distinct = "count(DISTINCT r.c)" if query.distinct else "NULL"
    values: dict[str, Any] = {
        "first": first,
        "end": end,
        "customer": query.customer,
        "model": query.model,
        "among": among,
    }
    values |= {"limit": query.limit, "seq": 0}
    return _grouped(query, list(query.by), source, where, distinct), values


def _least_sql(query: UsageQuery) -> Statement:
    """Those who used so much within the days, from the rollups of those who can have.

    Within days nobody used more than in all time, but for who got money back. Who it is is found by one sum; their
    names and all other sums are looked up afterwards.
    """
    days = ["r.day >= %(first)s", "r.day < %(end)s"]
    if query.model is not None:
        days.append("r.model = %(model)s")
    can = f"SELECT c FROM {{schema}}.customers WHERE {query.top} >= %(least)s UNION {CREDITED}"  # noqa: S608  # checked
    some = _where([f"r.c IN ({can})", *days])
    found = f"SELECT r.c FROM {{schema}}.rollups r {some}GROUP BY r.c HAVING {sum_of(query.top or '')} >= %(least)s"  # noqa: S608
    source = "{schema}.rollups r JOIN {schema}.customers k USING (c)"
    values: dict[str, Any] = {"first": min(query.first_day, EVER), "end": min(query.end_day, EVER)}
    values |= {"model": query.model, "least": query.least, "size": EVER, "limit": query.limit}
    distinct = "count(DISTINCT r.c)" if query.distinct else "NULL"
    return _grouped(query, ["customer"], source, [*days, f"r.c IN ({found})"], distinct), values


def _grouped(query: UsageQuery, names: list[str], source: str, where: list[str], distinct: str) -> str:
    order = [] if query.top is None else [f"{sum_of(query.top)} DESC"]
    chosen = ", ".join((*names, distinct, *(f"sum(r.{name})" for name in AMOUNTS)))
    having = "count(*) > 0"
    if query.top is not None and query.least is not None:
        having = f"{sum_of(query.top)} >= {query.least:d}"
    by, ordered = (f"GROUP BY {', '.join(names)} ", f" ORDER BY {', '.join(order + names)}") if names else ("", "")
    return f"SELECT {chosen} FROM {source} {_where(where)}{by}HAVING {having}{ordered} LIMIT %(limit)s"  # noqa: S608


def sum_of(name: str) -> str:
    """The sum of an amount, or of "tokens", over rows `r`."""
    return "sum(r.input_tokens + r.output_tokens)" if name == "tokens" else f"sum(r.{name})"


def entries_sql(query: RecordQuery, first: int = 0) -> Statement:
    """A page of the log; nothing that is wanted stands at or before `first`."""
    where: list[str] = []
    values: dict[str, Any] = {"limit": query.limit}

    def also(condition: str, **given: Any) -> None:
        where.append(condition)
        values.update(given)

    if query.after is not None:
        if query.descending:
            also("e.seq < %(last)s", last=query.after)
        else:
            first = max(first, query.after)
    if query.since_ms is not None:
        also("e.at_ms >= %(since)s", since=query.since_ms)
    if first:
        also("e.seq > %(first)s", first=first)
    if query.stop is not None:
        also("e.seq >= %(stop)s" if query.descending else "e.seq <= %(stop)s", stop=query.stop)
    if query.customer is not None:
        also("e.c + 0 = (SELECT c FROM {schema}.customers WHERE customer = %(customer)s)", customer=query.customer)
    for column in ("model", "provider", "kind", "source", "status", "trace_id"):
        value = getattr(query, column)
        if value is not None:
            also(f"e.{column} = %({column})s", **{column: value})
    if query.unpriced is not None:
        also("e.cost IS NULL" if query.unpriced else "e.cost IS NOT NULL")
    if query.until_ms is not None:
        also("e.at_ms < %(until)s", until=query.until_ms)
    order = "DESC" if query.descending else "ASC"
    tables = "{schema}.entries e JOIN {schema}.customers k USING (c)"
    return f"SELECT {ENTRY} FROM {tables} {_where(where)}ORDER BY e.seq {order} LIMIT %(limit)s", values  # noqa: S608


def _where(conditions: list[str]) -> str:
    return f"WHERE {' AND '.join(conditions)} " if conditions else ""


def _with_credits(table: str) -> str:
    """Customers with credits in a table: each is one step on the index, however many credits it has."""
    least = f"SELECT min(e.c) FROM {{schema}}.{table} e WHERE e.cost < 0"  # noqa: S608  # constants
    return (
        f"(WITH RECURSIVE found (c) AS (({least}) UNION ALL"  # noqa: S608  # constants
        f" SELECT ({least} AND e.c > found.c) FROM found WHERE found.c IS NOT NULL)"
        " SELECT c FROM found WHERE c IS NOT NULL LIMIT %(size)s)"
    )


CREDITED = f"{_with_credits('entries')} UNION {_with_credits('pruned')}"
"""The rows (`c`) of up to `size` customers who got money back in each of the two tables."""
