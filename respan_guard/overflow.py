"""What a home can't keep in memory: records that outrun storage lie in the journal until it has taken what was before.

Only records that draw from no hold: a release must not overtake the record in front of it. Those that do can't outrun
storage, as each admission waits for it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from respan_guard.backends.base import Backend, Entry, Outcome, Record
from respan_guard.clock import Clock
from respan_guard.drain import BATCH
from respan_guard.items import Item
from respan_guard.journal import Journal, JournalFile
from respan_guard.submitting import Submitting

__all__ = ["Overflowing"]

T = TypeVar("T")
_MOST_WAITING = 50_000  # ops in memory, of which each may take 2 kB
logger = logging.getLogger("respan_guard")


class Overflowing(Submitting):
    """The part of a home that writes to the journal what is too much, and stores what lies there. See `Drain`."""

    def __init__(
        self, backend: Backend, clock: Clock, journal: Journal, *, timeout: float, server_clock: bool = False
    ) -> None:
        super().__init__(backend, clock, journal, timeout=timeout, server_clock=server_clock)
        self._calls: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._no_room = 0  # ops that wait, below which the journal is not asked again
        self._came_back = 0  # how often what was set aside could not be written
        self._files = 0  # of the journal, that were stored here
        self._overflow: asyncio.Task[None] | None = None
        self._catching_up: asyncio.Task[None] | None = None

    def _make_room(self) -> None:
        """Storage took a batch: go on with what lies in the journal, or put there what is too much."""
        if self._journal.pending and (self._catching_up is None or self._catching_up.done()):
            self._catching_up = self._keep(self._catch_up())
        waiting = len(self._inbox)
        if waiting <= _MOST_WAITING:
            self._no_room = 0
        elif waiting > self._no_room and (self._overflow is None or self._overflow.done()):
            self._overflow = self._keep(self._set_aside())

    async def _set_aside(self) -> None:
        """Move what waits here to the journal."""
        alone: list[Item] = []
        entries: list[Entry] = []
        rest: list[Item] = []
        for _ in range(len(self._inbox)):
            item = self._inbox.popleft()
            op = item.op
            if isinstance(op, Record) and op.entry.admission is None and item.future is None and not item.on_disk:
                item.taken = True
                alone.append(item)
                entries.append(op.entry)
            else:
                rest.append(item)
        self._inbox.extendleft(reversed(rest))
        if not alone:
            self._no_room = 2 * len(rest)
            return
        self._aside = alone
        try:
            await asyncio.to_thread(self._journal.write, entries)
        except Exception as fault:  # the disk's, or RuntimeError: there are no threads to be had
            logger.error("%d usage records wait in memory, as the journal can't be written: %s", len(alone), fault)
            aside, self._aside = self._aside, []
            self._inbox.extendleft(reversed(aside))
            self._came_back += 1
            self._no_room = 2 * len(self._inbox)  # to try costs more than what waits
        else:
            self._aside = []
            if not self._closed and (self._catching_up is None or self._catching_up.done()):
                self._catching_up = self._keep(self._catch_up())

    async def _catch_up(self) -> None:
        while (file := self._journal.rotate(wait=False)) is not None:
            await self._adopted(file)
            self._files += 1

    async def _adopted(self, file: JournalFile) -> None:
        """Store what an earlier process left."""
        try:
            await self._replay(file)
        except Exception:
            logger.exception("a journal could not be stored; it is left to the next process")

    async def _caught_up(self) -> None:
        """Wait for what lies in the journal now: the file that is being stored, and the one that is written to."""
        until = self._files + 2
        while self._files < until and self._catching_up is not None and not self._catching_up.done():
            await asyncio.wait([self._catching_up], timeout=0.02)

    async def _replay(self, file: JournalFile) -> None:
        """Store what lies in a journal's file, then delete it; a file that isn't wholly stored stays."""
        try:
            entries = file.entries()
            while chunk := list(itertools.islice(entries, BATCH)):
                stored: asyncio.Future[Outcome] = self.loop.create_future()
                self._inbox.extend(Item(Record(entry), None, on_disk=True) for entry in chunk)
                self._inbox.append(Item(None, stored))
                self._start()
                await stored
        except BaseException:
            file.close()
            raise
        file.done()

    def _keep(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        task = self.loop.create_task(work)
        self._calls.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._calls.discard)
        return task
