"""One guard for one command, and what its errors mean on the command line."""

from __future__ import annotations

import asyncio
import getpass
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from respan_guard.backends.sqlite.location import locate
from respan_guard.cli.output import FAILED, MISUSED, fail
from respan_guard.errors import ConfigurationError, GuardError, InvalidInput, StorageUnavailable
from respan_guard.guard import Guard
from respan_guard.settings import Settings

__all__ = ["JSON", "Storage", "actor", "opened", "with_guard"]

T = TypeVar("T")
_LONGEST_NAME = 64

Storage = Annotated[
    str | None,
    typer.Option("--storage", metavar="URL", help="Where everything is kept; else what the settings say."),
]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON; money is in decimal strings of USD.")]


def opened(work: Callable[[Guard], Awaitable[T]], storage: str | None, *, create: bool = False) -> T:
    """Open a guard on the configured storage, do `work` with it, close it.

    The guard is on whatever the settings say, because one that is off has no store; and it prunes nothing on its
    own, because who reads must not delete.

    Args:
        work: What to do.
        storage: The URL that was given; None for what the settings say.
        create: Whether a SQLite file that isn't there is made; else a misspelt path would be an empty store.

    Raises:
        GuardError: The settings can't be used, storage fails or isn't there, or `work` raised it.
    """
    url = Settings.load(storage=storage).storage
    if not create and url.startswith("sqlite:") and not locate(url, {}).path.exists():
        raise StorageUnavailable(f"there is no store yet at {locate(url, {}).path}")

    async def session() -> T:
        async with Guard(storage, mode="enforce", retention=None) as guard:
            return await work(guard)

    return asyncio.run(session())


def with_guard(work: Callable[[Guard], Awaitable[T]], storage: str | None, *, create: bool = False) -> T:
    """Do what `opened` does, with errors as a line and an exit code: 2 for what was asked wrongly, 1 for the rest."""
    try:
        return opened(work, storage, create=create)
    except (ConfigurationError, InvalidInput) as error:
        fail(str(error), MISUSED)
    except GuardError as error:
        fail(str(error), FAILED)


def actor() -> str:
    """Who changes something, for the audit."""
    try:
        name = getpass.getuser()[:_LONGEST_NAME]  # from the environment, if it has one: it may be any bytes
    except (KeyError, OSError):  # a user without a name, as in some containers
        return "cli"
    return f"cli:{name.encode('utf-8', 'replace').decode()}"
