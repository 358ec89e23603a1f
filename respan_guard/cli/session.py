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

__all__ = ["JSON", "Storage", "actor", "opened", "with_guard"]

T = TypeVar("T")

Storage = Annotated[
    str | None,
    typer.Option("--storage", metavar="URL", help="Where everything is kept; else what the settings say."),
]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON; money is in decimal strings of USD.")]


def opened(work: Callable[[Guard], Awaitable[T]], storage: str | None) -> T:
    """Open a guard on the configured storage, do `work` with it, close it.

    The guard is on whatever the settings say, because one that is off has no store; and it prunes nothing on its
    own, because who reads must not delete.

    Raises:
        GuardError: The settings can't be used, storage fails, or `work` raised it.
    """

    async def session() -> T:
        async with Guard(storage, mode="enforce", retention=None) as guard:
            return await work(guard)

    return asyncio.run(session())


def with_guard(work: Callable[[Guard], Awaitable[T]], storage: str | None) -> T:
    """Do what `opened` does, with errors as a line and an exit code: 2 for what was asked wrongly, 1 for the rest."""
    try:
        return opened(work, storage)
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
