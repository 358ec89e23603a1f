"""One guard for one command, and what its errors mean on the command line."""

from __future__ import annotations

import asyncio
import getpass
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from respan_guard.backends.sqlite.location import locate
from respan_guard.cli.output import FAILED, MISUSED, fail
from respan_guard.errors import ConfigurationError, GuardError, InvalidInput, StorageUnavailable
from respan_guard.guard import Guard
from respan_guard.settings import Settings

__all__ = ["JSON", "Storage", "absent", "actor", "opened", "quietly", "store_file", "told", "with_guard"]

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
    path = store_file(Settings.load(storage=storage).storage)
    if path is not None and absent(path) and not create:
        raise StorageUnavailable(f"there is no store yet at {path}")

    async def session() -> T:
        async with Guard(storage, mode="enforce", retention=None) as guard:
            return await work(guard)

    with quietly():
        return asyncio.run(session())


def with_guard(work: Callable[[Guard], Awaitable[T]], storage: str | None, *, create: bool = False) -> T:
    """Do what `opened` does, with errors told as `told` does."""
    with told():
        return opened(work, storage, create=create)


@contextmanager
def told() -> Iterator[None]:
    """Turn errors into a line and an exit code: 2 for what was asked wrongly, 1 for the rest."""
    try:
        yield
    except (ConfigurationError, InvalidInput) as error:
        fail(str(error), MISUSED)
    except GuardError as error:
        fail(str(error), FAILED)


@contextmanager
def quietly() -> Iterator[None]:
    """Say nothing of obeying the kill switch: a command decides nothing, and the switch was thrown long since."""
    log = logging.getLogger("respan_guard")
    log.addFilter(_of_interest)
    try:
        yield
    finally:
        log.removeFilter(_of_interest)


def _of_interest(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("switched from ")


def store_file(url: str) -> Path | None:
    """The file of a SQLite store; None for other stores.

    Raises:
        ConfigurationError: No file can have that name, or it is looked for from a directory that is gone.
    """
    if not url.startswith("sqlite:"):
        return None
    try:
        path = locate(url, {}).path
    except FileNotFoundError:
        raise ConfigurationError("the working directory is gone; change into one that is there") from None
    if "\0" in str(path) or any(0xD800 <= ord(character) < 0xE000 for character in str(path)):
        raise ConfigurationError(f"a SQLite store needs a path that is text in UTF-8, got {path}")
    return path


def absent(path: Path) -> bool:
    """Whether there is nothing at a path.

    Raises:
        StorageUnavailable: It can't be told: the name is too long, or a directory must not be entered.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError as error:
        raise StorageUnavailable(f"{path} can't be opened: {error.strerror}") from None
    return False


def actor() -> str:
    """Who changes something, for the audit."""
    try:
        name = getpass.getuser()[:_LONGEST_NAME]  # from the environment, if it has one: it may be any bytes
    except (KeyError, OSError):  # a user without a name, as in some containers
        return "cli"
    return f"cli:{name.encode('utf-8', 'replace').decode()}"
