"""`respan-guard serve`: the console on its own."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import typer
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from respan_guard.cli.output import FAILED, say
from respan_guard.cli.session import opened, quietly
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

    The password is `CONSOLE_PASSWORD`; without one, a new one is made for this run and printed. Nothing is printed
    before storage answers and the port is known to be free.

    Raises:
        GuardError: The settings can't be used, storage fails or isn't there.
        OSError: There can be no server at this address.
    """
    opened(_answers, storage)
    asyncio.run(_try_to_listen(host, port))
    guard = Guard(storage, mode="enforce", retention=None)
    password = os.environ.get(PASSWORD_VARIABLE)
    app = console_app(guard, password or (made := secrets.token_urlsafe(12)))
    shown = f"[{host}]" if ":" in host else host
    say(f"The console of {guard.settings.sources()['storage'][0]} is at http://{shown}:{port}/")
    if not password:
        say(f"Password for this run: {made} (set {PASSWORD_VARIABLE} to choose one)")
    try:
        with quietly():
            uvicorn.run(app, host=host, port=port, log_level="warning")
    except SystemExit:  # uvicorn has said why it did not start
        raise typer.Exit(FAILED) from None


async def _answers(guard: Guard) -> None:
    await guard.info()


async def _try_to_listen(host: str, port: int) -> None:
    """Raise what uvicorn would only log."""
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)
    server.close()
    await server.wait_closed()
