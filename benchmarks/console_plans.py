"""The statements that the console's pages really send, and how the store goes about each of them."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg

from respan_guard.backends.base import Backend
from respan_guard.backends.postgres import PostgresBackend
from respan_guard.backends.sqlite import SQLiteBackend

__all__ = ["Plans"]

_HEAD = 170  # characters that a statement is shown with


class Plans:
    """Listens to the connection that reads, and asks it for the plans afterwards.

    A statement is shown once for each plan that it got, under the first page that sent it. On SQLite that is EXPLAIN
    QUERY PLAN, on PostgreSQL EXPLAIN ANALYZE: steps with the conditions of indexes, and the time that it took.
    """

    def __init__(self) -> None:
        self._sent: list[tuple[str, Any]] = []
        self._shown: set[tuple[str, str]] = set()

    async def of(self, backend: Backend, ask: Callable[[], Awaitable[Any]]) -> list[tuple[str, str]]:
        """What is new about what `ask` sends: statements and their plans."""
        self._sent.clear()
        if isinstance(backend, SQLiteBackend):
            explain = await self._sqlite(backend, ask)
        else:
            assert isinstance(backend, PostgresBackend)
            explain = await self._postgres(backend, ask)
        found = []
        for sql, values in self._sent:
            if not sql.lstrip().startswith(("SELECT", "WITH")):
                continue
            shape, steps, took = _short(sql), *(await explain(sql, values))
            if (shape, steps) not in self._shown:
                self._shown.add((shape, steps))
                found.append((shape, f"{steps}{took}"))
        return found

    async def _sqlite(self, backend: SQLiteBackend, ask: Callable[[], Awaitable[Any]]) -> Any:
        link = backend._read_link
        assert link is not None
        await link.run(lambda db: db.set_trace_callback(lambda sql: self._sent.append((sql, ()))))
        await ask()
        await link.run(lambda db: db.set_trace_callback(None))

        async def explain(sql: str, _: Any) -> tuple[str, str]:
            rows = await link.run(lambda db: db.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall())
            return " | ".join(row[3] for row in rows), ""

        return explain

    async def _postgres(self, backend: PostgresBackend, ask: Callable[[], Awaitable[Any]]) -> Any:
        async def listen(db: Any) -> None:
            execute = db.execute

            async def heard(sql: Any, values: Any = None, **options: Any) -> Any:
                self._sent.append((sql if isinstance(sql, str) else sql.decode(), values))
                return await execute(sql, values, **options)

            db.execute = heard

        async def stop(db: Any) -> None:
            del db.execute

        await backend._look(listen)
        await ask()
        await backend._look(stop)

        async def explain(sql: str, values: Any) -> tuple[str, str]:
            async def rows(db: Any) -> list[str]:
                cursor = psycopg.AsyncClientCursor(db)  # puts the values in
                await cursor.execute(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {sql}".encode(), values or None)
                return [row[0] for row in await cursor.fetchall()]

            lines = await backend._look(rows)
            steps = " | ".join(step for line in lines if (step := _step(line)))
            took = next(line.partition(": ")[2] for line in lines if line.startswith("Execution Time"))
            return steps, f"   [{took}]"

        return explain


def _step(line: str) -> str:
    """What a line of PostgreSQL's plan says about steps and indexes."""
    text = re.sub(r"\s*\((never executed|actual .*)\)$", "", line.strip().removeprefix("->").strip())
    text = re.sub(r"'[^']*'::[a-z\"]+|\b\d+\b", "?", text)
    wanted = text.startswith("Index Cond") or (":" not in text.split("(")[0] and not text.startswith("Buffers"))
    return text if wanted else ""


def _short(sql: str) -> str:
    """A statement without schema, values and long lists of columns."""
    text = " ".join(sql.split())
    text = re.sub(r'"[\w]+"\.', "", text)
    text = re.sub(r"%\(\w+\)s|%s|'[^']{2,}'|\b\d+\b", "?", text)
    text = re.sub(r"SELECT (?:(?!SELECT).){60,}? FROM ", "SELECT ... FROM ", text)
    return text if len(text) <= _HEAD else f"{text[:_HEAD]} ..."
