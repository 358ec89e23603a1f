"""The schema's versions: one migration each, applied in order under a lock, all in one transaction."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from importlib.resources import files

import psycopg

from respan_guard.backends.postgres.connection import Connection
from respan_guard.backends.postgres.failures import translated
from respan_guard.backends.postgres.location import Location
from respan_guard.errors import ConfigurationError, SchemaMismatch, StorageCorrupt, StorageReadOnly, StorageUnavailable

__all__ = ["MIGRATIONS", "epoch_of", "in_schema", "migrate"]

MIGRATIONS = (
    ("0001_first.sql",),
    ("0002_apply_1_load.sql", "0002_apply_2_decide.sql", "0002_apply_3_write.sql"),  # one function, read as one
    ("0003_changes.sql",),
    ("0004_pages.sql",),
    ("0005_hours.sql",),
    ("0006_order.sql",),
)
_TRIES = 6
_PAUSE = 1.0  # seconds between them, in which those who waited go on
MINIMUM = 130000  # gen_random_uuid
_STATE = """SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean,
    to_regnamespace(%(quoted)s) IS NOT NULL, to_regclass(%(quoted)s || '.store') IS NOT NULL,
    EXISTS (SELECT 1 FROM pg_class WHERE relnamespace = to_regnamespace(%(quoted)s))"""


def in_schema(sql: str, schema: str) -> bytes:
    """A statement of ours, about the tables of a schema. What is in it is ours; what is given comes as parameters."""
    return sql.replace("'{schema}'", f"'{schema}'").replace("{schema}", f'"{schema}"').encode()


async def epoch_of(connection: Connection, at: Location) -> str | None:
    """The store's epoch; None if its schema is not made, or not of the newest version.

    Raises:
        SchemaMismatch: It was written by a newer version of the package.
        StorageCorrupt: The schema holds something else.
        StorageReadOnly: The server is a standby or set read-only.
        ConfigurationError: The server is too old.
    """
    server = connection.info.server_version
    if server < MINIMUM:
        raise ConfigurationError(f"PostgreSQL 13 or newer is needed, {at.shown} is {server // 10000}")
    read_only, _, ours, _ = await _state(connection, at)
    if read_only:
        raise StorageReadOnly(f"{at.shown} is read-only: a standby, or a database set so")
    version, epoch = await _version(connection, at) if ours else (0, "")
    return epoch if version == len(MIGRATIONS) else None


async def migrate(connection: Connection, at: Location) -> str:
    """Bring the schema to the newest version, and tell the store's epoch. Of several at once, one does the work.

    It takes the time that indexes of large tables take.

    Raises:
        SchemaMismatch: It was written by a newer version of the package.
        StorageCorrupt: The schema holds something else.
        ConfigurationError: This user may not make the schema.
    """
    for _ in range(_TRIES):
        with suppress(psycopg.errors.LockNotAvailable):  # a report reads what changes, and writers wait behind us
            return await _migrate(connection, at)
        await asyncio.sleep(_PAUSE)
    raise StorageUnavailable(f"{at.shown} can't be brought to a newer schema while reports run on it; try again later")


async def _migrate(connection: Connection, at: Location) -> str:
    try:
        async with connection.transaction():
            await connection.execute("SET LOCAL lock_timeout = 0")
            await connection.execute("SET LOCAL statement_timeout = 0")
            await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (at.schema,))
            _, exists, ours, taken = await _state(connection, at)
            if not ours and taken:
                raise StorageCorrupt(f"the schema {at.schema} at {at.shown} holds something else; choose a namespace")
            if not exists:
                await connection.execute(f'CREATE SCHEMA "{at.schema}"'.encode())
            applied = (await _version(connection, at))[0] if ours else 0
            for names in MIGRATIONS[applied:]:
                script = "".join((files(__package__) / "migrations" / name).read_text("utf-8") for name in names)
                await connection.execute(in_schema(script, at.schema))
            done = in_schema("UPDATE {schema}.store SET version = %s", at.schema)
            await connection.execute(done, (len(MIGRATIONS),))
    except psycopg.errors.InsufficientPrivilege as error:
        if ours:
            raise ConfigurationError(
                f"{at.schema} at {at.shown} is of schema version {applied}, and this user may not bring it to"
                f" {len(MIGRATIONS)} ({error.diag.message_primary}); let its owner open it first: respan-guard check"
            ) from error
        raise ConfigurationError(
            f"this user may not make the schema {at.schema} at {at.shown} ({error.diag.message_primary}); let it:"
            " GRANT CREATE ON DATABASE ... TO ..."
        ) from error
    except psycopg.errors.LockNotAvailable:
        raise
    except psycopg.Error as error:
        raise translated(error, at.shown) from error
    return (await _version(connection, at))[1]


async def _state(connection: Connection, at: Location) -> tuple[bool, bool, bool, bool]:
    """Whether the server is read-only, the schema exists, our tables do, and whether anything is in it."""
    cursor = await connection.execute(_STATE, {"quoted": f'"{at.schema}"'})
    return await cursor.fetchone()  # type: ignore[return-value]  # always a row


async def _version(connection: Connection, at: Location) -> tuple[int, str]:
    try:
        cursor = await connection.execute(in_schema("SELECT version, epoch FROM {schema}.store WHERE one", at.schema))
        row: tuple[int, str] | None = await cursor.fetchone()  # type: ignore[assignment]
    except psycopg.errors.UndefinedColumn:
        row = None
    if row is None:
        raise StorageCorrupt(f"the schema {at.schema} at {at.shown} holds something else; choose a namespace")
    if row[0] > len(MIGRATIONS):
        raise SchemaMismatch(
            f"{at.schema} at {at.shown} has schema version {row[0]}, this version of respan_guard knows"
            f" {len(MIGRATIONS)}; upgrade it"
        )
    return row
