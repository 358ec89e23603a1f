"""`postgresql://`: one statement for a batch of decisions. Needs the extra `postgres`."""

from respan_guard.backends.postgres.backend import PostgresBackend

__all__ = ["PostgresBackend"]
