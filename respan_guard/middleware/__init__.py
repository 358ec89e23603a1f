"""The ASGI door: one middleware in front of an app."""

from respan_guard.middleware.door import GuardMiddleware

__all__ = ["GuardMiddleware"]
