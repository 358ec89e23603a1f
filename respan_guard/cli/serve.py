"""`respan-guard serve`: the console on its own."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from respan_guard.cli.output import say
from respan_guard.console import Console
from respan_guard.guard import Guard

__all__ = ["PASSWORD_VARIABLE", "console_app", "run_serve"]

PASSWORD_VARIABLE = "CONSOLE_PASSWORD"  # noqa: S105  # its name, not it


def console_app(guard: Guard, password: str, path: str = "/") -> Starlette:
    """An app of nothing but the console, which opens and closes the guard."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with guard:
            yield

    return Starlette(routes=[Mount(path, Console(guard, password=password))], lifespan=lifespan)


def run_serve(storage: str | None, host: str, port: int) -> None:
    """Serve the console until Ctrl-C.

    The password is `CONSOLE_PASSWORD`; without one, a new one is made for this run and printed.
    """
    guard = Guard(storage, mode="enforce", retention=None)
    password = os.environ.get(PASSWORD_VARIABLE)
    app = console_app(guard, password or (made := secrets.token_urlsafe(12)))
    say(f"The console of {guard.settings.sources()['storage'][0]} is at http://{host}:{port}/")
    if not password:
        say(f"Password for this run: {made} (set {PASSWORD_VARIABLE} to choose one)")
    uvicorn.run(app, host=host, port=port, log_level="warning")
