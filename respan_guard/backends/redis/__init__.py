"""`redis://`, `valkey://` and clusters of them: one store for a fleet."""

from respan_guard.backends.redis.backend import RedisBackend

__all__ = ["RedisBackend"]
