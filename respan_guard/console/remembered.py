"""What may take long to count, with the time it was counted at.

A page waits a moment for what it wants and gets it fresh; where that takes longer, it gets what came out last, and says
when. The count goes on behind the page: by statements after each of which others come to storage, resting in between,
and one at a time with others that take long. What came out is then good for many times as long as it took, so that
counting takes a small share of the time, and only while somebody looks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from respan_guard.backends.base import Backend
from respan_guard.markups import Reads

if TYPE_CHECKING:
    from respan_guard.guard import Guard

__all__ = ["Answer", "Remembered", "Work"]

T = TypeVar("T")
Work: TypeAlias = Callable[[Reads], Awaitable[T]]
"""Counts something, all of it by statements through what it is given."""

_PATIENCE = 0.25
_SHARE = 20  # what came out is good for so many times as long as it took
_REST = 0.1  # seconds at most: all that a page asks is answered in that
_KEPT = 32
logger = logging.getLogger("respan_guard")


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What was counted.

    Attributes:
        value: What came out.
        at_ms: When it was begun.
        fresh: Whether that was when it was asked for, or later.
    """

    value: T
    at_ms: int
    fresh: bool


class Remembered:
    """Counts, and remembers what came out.

    Args:
        guard: Whose storage.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._found: dict[str, tuple[Answer[Any], float]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[str, asyncio.Task[Answer[Any]]] = {}
        self._long = asyncio.Lock()

    async def last(self, name: str, work: Work[T], *, anew: bool) -> Answer[T] | None:
        """A fresh answer if that is quickly had, else the last; None if there is none yet.

        Args:
            name: Of what is counted: the answer is that of all who ask by this name.
            work: Counts it.
            anew: Whether what is quickly counted is counted for each page. Else it is good for a few seconds, too.
        """
        if (found := self._good(name)) is not None:
            return found
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # what an earlier one had begun ended with it
            self._loop, self._tasks, self._long = loop, {}, asyncio.Lock()
        end = loop.time() + _PATIENCE
        older = self._tasks.get(name)  # begun before this was asked for, so not fresh
        if older is not None:
            await asyncio.wait({older}, timeout=_PATIENCE)
        if (older is None or older.done()) and self._good(name) is None:
            task = self._tasks.get(name) or self._begin(name, work, anew=anew)
            if task is not None:
                await asyncio.wait({task}, timeout=max(0, end - loop.time()))
                if task.done():
                    return task.result()
        return self._found[name][0] if name in self._found else None

    def _good(self, name: str) -> Answer[Any] | None:
        """What need not be counted again yet."""
        found = self._found.get(name)
        return found[0] if found is not None and self._guard.clock.monotonic() < found[1] else None

    def _begin(self, name: str, work: Work[Any], *, anew: bool) -> asyncio.Task[Answer[Any]] | None:
        tasks = self._tasks
        if len(tasks) >= _KEPT:
            return None

        def ended(task: asyncio.Task[Answer[Any]]) -> None:
            del tasks[name]
            if not task.cancelled() and (error := task.exception()) is not None:  # nobody may be there to be told
                logger.warning("the console can't count %s: %s", name, error)

        task = tasks[name] = asyncio.create_task(self._count(name, work, anew=anew))
        task.add_done_callback(ended)
        return task

    async def _count(self, name: str, work: Work[Any], *, anew: bool) -> Answer[Any]:
        at_ms, paced = self._guard.now_ms(), _Paced(self._guard, self._long)
        try:
            found = Answer(await work(paced), at_ms, fresh=True)
        finally:
            paced.end()
        good = 0.0 if anew and not paced.is_long else _SHARE * paced.took
        self._found.pop(name, None)
        self._found[name] = replace(found, fresh=False), self._guard.clock.monotonic() + good
        while len(self._found) > _KEPT:
            del self._found[next(iter(self._found))]
        return found


class _Paced:
    """The way to storage as it is when a count begins; if that is closed meanwhile, so is the count."""

    def __init__(self, guard: Guard, long: asyncio.Lock) -> None:
        self._lane = guard.lane()
        self._clock = guard.clock
        self._long = long
        self._holds = False
        self._began = guard.clock.monotonic()
        self._idle = 0.0

    @property
    def is_long(self) -> bool:
        """Whether pages that wanted it no longer wait."""
        return self._clock.monotonic() - self._began > _PATIENCE

    @property
    def took(self) -> float:
        """How long it worked."""
        return self._clock.monotonic() - self._began - self._idle

    async def call(self, work: Callable[[Backend], Awaitable[T]], timeout: float | None = 60.0, /) -> T:  # noqa: ASYNC109
        """Run some reads, then let others in."""
        before = self._clock.monotonic()
        found = await self._lane.call(work, timeout)
        after = self._clock.monotonic()
        if self.is_long:
            if not self._holds:
                await self._long.acquire()
                self._holds = True
            await asyncio.sleep(min(after - before, _REST))
            self._idle += self._clock.monotonic() - after
        else:
            await asyncio.sleep(0)  # a store in memory never lets others in by itself
        return found

    def end(self) -> None:
        """Let the next one go on."""
        if self._holds:
            self._long.release()
