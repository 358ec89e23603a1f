"""Respan's HTTP API over a guard: code written for Respan works against the app's own mount."""

from respan_guard.api.app import RespanAPI

__all__ = ["RespanAPI"]
