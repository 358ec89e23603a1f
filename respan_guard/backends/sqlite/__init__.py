"""`sqlite:///`: the default store. One file, one machine, several processes."""

from respan_guard.backends.sqlite.backend import SQLiteBackend

__all__ = ["SQLiteBackend"]
