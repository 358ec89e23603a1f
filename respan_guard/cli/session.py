"""One guard for one command, and what its errors mean on the command line."""

from __future__ import annotations

import asyncio
import getpass
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from respan_guard.cli.output import FAILED, MISUSED, fail
from respan_guard.errors import ConfigurationError, GuardError, InvalidInput
from respan_guard.guard import Guard

__all__ = ["JSON", "Storage", "actor", "with_guard"]

T = TypeVar("T")

Storage = Annotated[
    str | None,
    typer.Option(
        "--storage", metavar="URL", help="Where everything is kept; else RESPAN_GUARD_STORAGE, else the file."
    ),
]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON; money is in decimal strings of USD.")]


def with_guard(work: Callable[[Guard], Awaitable[T]], storage: str | None) -> T:
    """Open a guard on the configured storage, do `work` with it, close it.

    The guard enforces whatever the settings say, because only a guard that is on has a store.

    Raises:
        typer.Exit: 2 if the settings or the input can't be used, 1 if storage fails or something is not there.
    """

    async def session() -> T:
        async with Guard(storage, mode="enforce") as guard:
            return await work(guard)

    try:
        return asyncio.run(session())
    except (ConfigurationError, InvalidInput) as error:
        fail(str(error), MISUSED)
    except GuardError as error:
        fail(str(error), FAILED)


def actor() -> str:
    """Who changes something, for the audit."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a user without a name, as in some containers
        return "cli"
