"""The one place where what PostgreSQL or its driver reports becomes an error of the guard."""

from __future__ import annotations

import psycopg

from respan_guard.errors import (
    BackendError,
    ConfigurationError,
    CounterOverflow,
    GuardError,
    InvalidInput,
    SchemaMismatch,
    StorageCorrupt,
    StorageFull,
    StorageReadOnly,
    StorageUnavailable,
    StoreReset,
)

__all__ = ["READ_ONLY", "RETRIED", "at_connecting", "translated"]

RETRIED = ("40001", "40P01")
"""Serialization failure, deadlock: nothing was applied, and the same statement may well pass now."""

READ_ONLY = "25006"
"""A write in a session, or on a server, that only reads: nothing was applied."""

_UNSTORABLE = (  # a text with U+0000, an index row that is too large, nothing where something must be
    "22021", "22P05", "54000", "22P02", "23502"
)  # fmt: skip
_GONE = ("42P01", "42883", "3F000", "42703")  # tables, functions, the schema
_CORRUPT = ("XX001", "XX002")
_AT_CONNECTING = (  # libpq tells no code of a connection that it doesn't get, only the server's words
    ("password authentication failed", "the server at {where} does not accept the password of this user"),
    ("no password supplied", "the server at {where} wants a password; put it into the URL, or into ~/.pgpass"),
    ("no pg_hba.conf entry", "the server at {where} does not let this user in from here: see its pg_hba.conf"),
    ('role "', "the server at {where} knows no such user"),
    ('database "', "there is no such database at {where}; make it: createdb NAME"),
    ("invalid sslmode value", "{where} can't be used"),
    ("server does not support SSL", "the server at {where} speaks no TLS; see sslmode"),
    ("certificate", "the server at {where} can't be trusted"),
)


def translated(error: Exception, where: str) -> GuardError | ValueError:
    """What to raise instead of an error of the driver."""
    if isinstance(error, GuardError):
        return error
    code = getattr(error, "sqlstate", None) or ""
    said = _said(error)
    if code == "RG001" or code in _GONE:
        return StoreReset(f"the store at {where} was wiped or replaced while it was open ({said}); restart to use it")
    if code in ("RG002", "22003"):
        return CounterOverflow(f"what customer {said!r} used would pass 9,000,000 USD, or 9.0e15 tokens")
    if code == "23514":
        if "9000000000000000" in said or "customers" in said:
            return CounterOverflow(f"a sum of a customer would pass what every store counts exactly ({said})")
        return StorageCorrupt(f"a row of {where} breaks a rule of the schema ({said}); see `respan-guard verify`")
    unsendable = isinstance(error, psycopg.ProgrammingError) and not code and "adapt" in said
    if unsendable or code in _UNSTORABLE or isinstance(error, (psycopg.DataError, UnicodeError)):
        return InvalidInput(f"PostgreSQL can't store this: {said}")
    if code == READ_ONLY:
        return StorageReadOnly(f"{where} is read-only: a standby, or a database set so ({said})")
    if code == "42501":
        return StorageReadOnly(f"this user may not do that at {where}: {said}")
    if code in ("53100", "53200"):
        return StorageFull(f"no space left at {where} ({said}); it goes on by itself once there is some")
    if code in _CORRUPT:
        return StorageCorrupt(f"{where} is damaged: {said}")
    if code.startswith("23"):
        return StorageCorrupt(f"a row of {where} breaks a rule of the schema ({said}); see `respan-guard verify`")
    if code == "57014":
        return StorageUnavailable(f"{where} did not finish in time")
    if code == "55P03":
        return StorageUnavailable(f"rows at {where} stay locked by another session")
    return StorageUnavailable(f"PostgreSQL failed at {where}: {said}")


def at_connecting(error: Exception, where: str) -> GuardError:
    """What to raise for a connection that could not be had."""
    if isinstance(error, (BackendError, ConfigurationError, SchemaMismatch)):
        return error
    if isinstance(error, TimeoutError):
        return StorageUnavailable(f"no answer from {where}")
    said = _said(error)
    for pattern, message in _AT_CONNECTING:
        if pattern in said and not (pattern in ('role "', 'database "') and "does not exist" not in said):
            return ConfigurationError(f"{message.format(where=where)} ({said})")
    return StorageUnavailable(f"{where} can't be reached: {said}")


def _said(error: Exception) -> str:
    diag = getattr(error, "diag", None)
    return " ".join(str(getattr(diag, "message_primary", None) or error).split()) or repr(error)
