"""The console: users, dashboard, logs and system, as an ASGI app to mount anywhere (extra `console`)."""

from __future__ import annotations

try:
    import itsdangerous  # noqa: F401
    import jinja2  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"respan_guard.console needs {error.name}: pip install 'respan-guard[console]'", name=error.name
    ) from None

from respan_guard.console.access import User
from respan_guard.console.app import Console
from respan_guard.console.panels import Panel

__all__ = ["Console", "Panel", "User"]
