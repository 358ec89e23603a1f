"""A store that is open: its epoch, its parts, and the ways to ask it."""

from __future__ import annotations

from typing import Any

from respan_guard.backends.redis.link import Link
from respan_guard.backends.redis.parts import Parts

__all__ = ["Shelf"]


class Shelf:
    """Runs scripts on the store that was opened, and on no other: each of them compares the epoch first."""

    def __init__(self, link: Link, epoch: str) -> None:
        self.link = link
        self.epoch = epoch
        self.parts = Parts(link.at.shards)
        self.timed = "1" if self.parts.count > 1 else "0"  # places in the log are times

    async def run(self, name: str, part: int, *arguments: Any) -> Any:
        """Run a script on a part.

        Raises:
            StoreReset: This is another store.
            BackendError: It can't be done.
        """
        return await self.link.run(name, part, self.epoch, *arguments)

    async def run_all(self, name: str, *arguments: Any) -> list[Any]:
        """Run a script on every part."""
        return await self.link.run_all(name, self.epoch, *arguments)

    async def ask(self, part: int, command: str, key: str, *arguments: Any) -> Any:
        """Run one command on one key of a part."""
        return await self.run("ask", part, command, key, *arguments)

    async def members(self, part: int, key: str) -> set[str]:
        """The members of a set, read in steps that hold up nobody."""
        found: set[str] = set()
        cursor = "0"
        while True:
            cursor, some = await self.ask(part, "SSCAN", key, cursor, "COUNT", 1000)
            found.update(some)
            if cursor == "0":
                return found
